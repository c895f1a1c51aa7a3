"""Calibration of an SO-101: where the joints' angles are zero and how far they go, in lerobot's file format.

    python hardware/calibrate.py --port /dev/ttyACM0 --assign-ids          new motors: gives them ids 1 to 6, one by one
    python hardware/calibrate.py --port /dev/ttyACM0 --out my_arm.json     calibrates: you move the arm, it watches
    python hardware/calibrate.py --port /dev/ttyACM0 --check my_arm.json   compares a file with the motors; reads only
    python hardware/calibrate.py --port /dev/ttyACM0 --write my_arm.json   puts a file, lerobot's too, into the motors
    python hardware/calibrate.py --port /dev/ttyACM0 --read my_arm.json    saves what the motors hold
    python hardware/calibrate.py --port /dev/ttyACM0 --hand-over           full torque again, for other programs
    python hardware/calibrate.py --emulate --out my_arm.json               tries it out on an arm that is not there

Torque is off all the time. Nothing is written, neither into the motors nor to a file, before the very end, when
everything has been measured and shown and you have agreed; then only what differs is, and all of it or nothing: what
interrupts the writing puts the old values back. The old values are noted down first, in runs/hardware/unfinished.json:
where they could not be put back, since the cable was out or the program killed, the next command does it.

How: with all joints in the middle of their ranges, each motor's offset is chosen so that it reads 2047 there, half a
turn from the ends at which its reading jumps. Then each joint is moved from stop to stop, which gives its range, and
the middle of the range is its angle zero. So go to both stops: what is missing at one shifts the zero by half as much.
wrist_roll, whose stops are farther away, gets the whole turn as its range; its zero is where it was held at first.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware import so101, torque
from hardware.feetech import REGISTERS, STEPS, Bus, BusError, SerialTransport, decode, encode
from hardware.so101 import (
    JOINTS,
    UNDONE,
    ArmFault,
    Calibration,
    JointCalibration,
    check_motors,
    numbers,
    read_eeprom,
    undo,
    write_eeprom,
)

IDS = tuple(range(1, len(JOINTS) + 1))
UNFINISHED = Path(__file__).resolve().parent.parent / "runs/hardware/unfinished.json"
AGAIN = "run calibrate.py with --out or --write again: it first puts the old ones back"
MIDDLE = 2047  # what a motor reads in the middle of its joint's range
ROLL = JOINTS.index("wrist_roll")
# Degrees from stop to stop: the limits of SO-ARM100's model; the jaw's, of its servo
EXPECTED = dict(
    shoulder_pan=220.0, shoulder_lift=200.0, elbow_flex=193.7, wrist_flex=190.0, gripper=127.1
)
SHORT, UNUSUAL = (
    0.5,
    15.0,
)  # less than this share of it is refused; so many degrees more or less are pointed out
PATIENCE = 25  # reads in a row that a motor may leave unanswered
TURNED = 50  # raw; 4 degrees: how far a hand must have turned a motor that is alone
AGREES = 20  # raw; what a motor may read after the new offset besides what was computed
DEGREES = 360 / STEPS  # of a step


@dataclass
class Args:
    port: str | None = None  # of the arm's adapter, such as /dev/ttyACM0
    out: str | None = None  # calibrate, and write this new file
    check: str | None = None  # compare this file with the motors
    write: str | None = None  # put this file into the motors
    read: str | None = None  # save what the motors hold to this new file
    assign_ids: bool = False  # give new motors their ids, one by one
    hand_over: bool = False  # undo the weak torque that motors power up with, for another program
    emulate: bool = False  # an emulated arm, moved by an emulated hand, in place of --port

    def check_choices(self) -> None:
        """Raises ValueError for choices that cannot work together."""
        tasks = [self.out, self.check, self.write, self.read, self.assign_ids, self.hand_over]
        new = self.out or self.read
        for message, wrong in {
            "give one of --out, --check, --write, --read, --hand-over and --assign-ids": sum(
                map(bool, tasks)
            )
            != 1,
            "give --port, or --emulate": bool(self.port) == self.emulate,
            f"{new} exists: choose another name, or move it away": bool(new) and Path(new).exists(),
        }.items():
            if wrong:
                raise ValueError(message)


# --- People -----------------------------------------------------------------------------------------------------------
class Person:
    """At the keyboard."""

    def ask(self, text: str) -> None:
        """Waits for Enter. Raises EOFError if there is no keyboard."""
        print(f"\n{text}\nThen press Enter (Ctrl-C gives up). ", end="", flush=True)
        self._line()

    def done(self) -> bool:
        """Whether Enter was pressed meanwhile."""
        return bool(select.select([sys.stdin], [], [], 0)[0]) and bool(self._line())

    @staticmethod
    def _line() -> str:
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line


class EmulatedPerson:
    """Moves the shafts of emulated servos: to the middle when asked for the first time, then from stop to stop."""

    def __init__(
        self, servos, clock, middle=(2300, 1700, 2450, 1900, 2100, 1640), share: float = 1.0
    ):
        """middle: encoder in the middle of each joint's range. share: of the way to the stops that it goes."""
        self.servos, self.clock = list(servos.servos.values()), clock
        self.middle, self.share, self.moves = np.array(middle, float), share, None
        self.half = np.array([EXPECTED.get(name, 0.0) / DEGREES / 2 for name in JOINTS])

    def place(self, encoders) -> None:
        for servo, encoder in zip(self.servos, encoders, strict=True):
            servo.encoder, servo.velocity = float(encoder), 0.0

    def ask(self, text: str) -> None:
        print(f"\n{text}")
        if self.moves is None:
            self.place(self.middle)
            self.moves = self._sweep()

    def _sweep(self):
        way = np.sin(np.linspace(0, 2 * np.pi, 81)) * self.share
        for at in range(len(JOINTS)):
            for share in way:
                here = self.middle.copy()
                here[at] += share * self.half[at]
                yield here

    def done(self) -> bool:
        here = next(self.moves, None)
        if here is not None:
            self.place(here)
        return here is None


# --- Calibration ------------------------------------------------------------------------------------------------------
def calibrate(
    bus: Bus,
    person,
    sleep: Callable[[float], None] = time.sleep,
    show: Callable[[str], None] = print,
):
    """-> (Calibration, what a person should know of it: list of sentences). Writes nothing.

    Raises ArmFault or BusError if motors are missing or stay away, ValueError if what was shown cannot be right.
    """
    let_go(bus, sleep)
    eeprom = check_motors(bus, IDS)
    old = np.array([eeprom[id]["homing_offset"] for id in IDS])
    person.ask(
        "Put all joints in the middle of their ranges: base straight ahead, upper arm upright, forearm and\n"
        "hand level and straight ahead, jaw half open, its moving part above the other. Hold the arm there."
    )
    first, last_byte = REGISTERS["torque_enable"][0], sum(REGISTERS["present_position"])
    here, absent = np.zeros(len(IDS), int), np.full(len(IDS), PATIENCE)

    def encoders() -> np.ndarray:
        """Where the shafts stand, 0 to 4095, whatever the motors' offsets; of one that does not answer, its last."""
        answers = bus.sync_read(IDS, first, last_byte - first)
        for at, id in enumerate(IDS):
            absent[at] += 1
            if id in answers:
                if answers[id].data[0]:
                    raise ArmFault(
                        f"{JOINTS[at]} has torque again: it has restarted; check its cable",
                        "restart",
                    )
                here[at] = (decode("present_position", answers[id].data, first) + old[at]) % STEPS
                absent[at] = 0
        if names := [name for name, reads in zip(JOINTS, absent, strict=True) if reads > PATIENCE]:
            raise ArmFault(
                f"no answer from {', '.join(names)}: check power and cable", "bus", names
            )
        return here.copy()

    offsets = np.clip(encoders() - MIDDLE, -2047, 2047)

    def readings() -> np.ndarray:
        return (encoders() - offsets) % STEPS  # with the new offsets

    last = low = high = readings()
    show(
        "Move every joint but wrist_roll slowly from stop to stop. Then press Enter. Degrees so far:"
    )
    while not person.done():
        now = readings()
        jump = np.abs(now - last) > STEPS // 2
        jump[ROLL] = False
        if jump.any():
            name = JOINTS[int(jump.argmax())]
            raise ValueError(
                f"{name} has passed the end of its encoder's turn: it did not start in the middle; again"
            )
        last, low, high = now, np.minimum(low, now), np.maximum(high, now)
        if sys.stdout.isatty():
            spans = [
                f"{name} {(b - a) * DEGREES:.0f}"
                for name, a, b in zip(JOINTS, low, high, strict=True)
            ]
            print("\r" + "   ".join(spans), end="    ", flush=True)
        sleep(0.02)
    show("")
    low[ROLL], high[ROLL] = 0, STEPS - 1
    return judge(offsets, low, high)


def judge(offsets, low, high) -> tuple[Calibration, list[str]]:
    """Makes a Calibration of what was measured. Raises ValueError for what cannot be right."""
    remarks = []
    for at, name in enumerate(JOINTS):
        if at == ROLL:
            continue
        span, expected = (high[at] - low[at]) * DEGREES, EXPECTED[name]
        if span < SHORT * expected:
            raise ValueError(
                f"{name} moved by {span:.0f} degrees of {expected:.0f}: move it from stop to stop"
            )
        if low[at] < so101.WRAP or high[at] > STEPS - 1 - so101.WRAP:
            raise ValueError(
                f"{name} comes within 10 degrees of its encoder's end: start nearer to its middle"
            )
        if abs(span - expected) > UNUSUAL:
            remarks.append(
                f"{name} moved by {span:.0f} degrees; the model's joint moves by {expected:.0f}"
            )
    joints = {name: JointCalibration(id, 0, int(offset), int(a), int(b))
              for name, id, offset, a, b in zip(JOINTS, IDS, offsets, low, high, strict=True)}  # fmt: skip
    calibration = Calibration(joints)
    return calibration, remarks + so101.reach(calibration)


def let_go(bus: Bus, sleep: Callable[[float], None], ids=IDS) -> torque.Outcome:
    """Raises ArmFault unless no motor that answers has torque."""
    found = torque.torque_off(bus, ids, sleep)
    if found.on:
        raise ArmFault(f"torque does not go off: {found.sentence()}", "start")
    return found


# --- Whole or undone --------------------------------------------------------------------------------------------------
def note_down(journal: Path, changes: list) -> None:
    """Before the first write: what is going to be written over what. Raises ValueError if that cannot be kept."""
    content = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": changes}
    temporary = journal.with_suffix(".tmp")
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, journal)
    except OSError as error:
        raise ValueError(
            f"{journal} cannot be written ({error.strerror}), so nothing goes into the motors"
        ) from None


def unfinished(journal: Path) -> tuple[str, list]:
    """When a calibration was cut off, and its (id, register, old, new). Raises ValueError for what is no such file."""
    try:
        content = json.loads(journal.read_text())
        changes = [(id, name, old, new) for id, name, old, new in content["changes"]]
        for id, name, old, new in changes:
            if any(type(value) is not int for value in (id, old, new)):
                raise ValueError
            if name not in so101.CALIBRATED or not 0 <= id <= 253:
                raise ValueError
            encode(name, old), encode(name, new)  # raises for what does not fit
        return str(content["time"]), changes
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"{journal} is damaged: compare with --check, then delete it") from None


def settle(bus: Bus, journal: Path, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Puts the old values back where an earlier command was cut off. -> what was found and done; None: nothing was.

    Raises ArmFault if these are not the servos of then, BusError if one is missing; the note stays until it is done.
    """
    if not journal.exists():
        return None
    when, changes = unfinished(journal)
    ids = list(dict.fromkeys(id for id, *_ in changes))
    try:
        let_go(bus, sleep, ids)
        have = read_eeprom(bus, ids)
    except BusError as error:
        error.add_note(f"a calibration of {numbers(ids)} was cut off on {when}: {AGAIN}")
        raise
    for id, name, old, new in changes:  # byte by byte: power may have failed in between
        bytes_of = (encode(name, value) for value in (have[id][name], old, new))
        if any(there not in (a, b) for there, a, b in zip(*bytes_of, strict=True)):
            text = f"a calibration was cut off on {when}, of another arm, or servo {id} was written to since"
            raise ArmFault(f"{text}. Connect that arm first, or delete {journal}", "start")
    new = {id for id, name, old, _ in changes if have[id][name] != old}
    if (done := undo(bus, changes, sleep, AGAIN)) != UNDONE:
        raise BusError(done, ids)
    journal.unlink()
    found = f"{numbers(new)} had new values" if new else "no servo had new values"
    return f"the calibration of {when} was cut off, and {found}; {UNDONE}"


def put(
    bus: Bus,
    calibration: Calibration,
    sleep: Callable[[float], None] = time.sleep,
    journal: Path | None = None,
) -> list:
    """Writes a calibration into the motors, where it differs. -> the differences there were. Torque goes off.

    Afterwards every motor has to read what its new offset makes of the old reading; otherwise, and whatever else
    happens meanwhile, everything is written back, and the exception says so. journal: where the old values are kept
    until then (`settle`).
    """
    let_go(bus, sleep, calibration.ids)
    eeprom = check_motors(bus, calibration.ids)
    address, size = REGISTERS["present_position"]
    before = {
        id: decode("present_position", bus.read(id, address, size).data) for id in calibration.ids
    }
    changes = so101.differences(eeprom, calibration.eeprom())
    if changes and journal:
        note_down(journal, changes)
    try:
        write_eeprom(bus, calibration.eeprom(), sleep, AGAIN)
        for name, joint in calibration.joints.items():
            expected = before[joint.id] + eeprom[joint.id]["homing_offset"] - joint.homing_offset
            now = decode("present_position", bus.read(joint.id, address, size).data)
            if abs((now - expected + STEPS // 2) % STEPS - STEPS // 2) > AGREES:
                raise ArmFault(f"{name} reads {now} with its new offset, not {expected % STEPS}. Was the arm moved? "
                               "Hold it still and try again", "start", [name])  # fmt: skip
    except BaseException as error:
        if not getattr(error, "__notes__", ()):  # write_eeprom has undone its own
            error.add_note(undo(bus, changes, sleep, AGAIN))
        if journal and UNDONE in error.__notes__:
            journal.unlink(missing_ok=True)
        raise
    if journal:
        journal.unlink(missing_ok=True)
    return changes


def table(calibration: Calibration) -> str:
    """For people."""
    rows = [f"{'joint':<14} id  offset  range          degrees"]
    for name, joint in calibration.joints.items():
        span = (joint.range_max - joint.range_min) * DEGREES
        place = f"{joint.range_min} to {joint.range_max}"
        rows.append(
            f"{name:<14} {joint.id:>2}  {joint.homing_offset:>6}  {place:<13}  {span:>7.1f}"
        )
    return "\n".join(rows)


# --- Ids --------------------------------------------------------------------------------------------------------------
def set_id(bus: Bus, old: int, new: int, sleep: Callable[[float], None] = time.sleep) -> None:
    """Gives the only motor on the bus another id. Raises BusError if it does not answer to it afterwards, and to it
    alone; whatever is raised has a note of the id that it answers to."""
    lock, address = REGISTERS["lock"][0], REGISTERS["id"][0]
    if old == new:
        bus.sync_write(lock, {new: b"\x01"})  # a command that was killed may have left it open
        return
    try:
        try:
            bus.sync_write(lock, {old: b"\x00"})
            bus.sync_write(address, {old: bytes((new,))})
            sleep(0.01)
        finally:
            bus.sync_write(lock, {old: b"\x01", new: b"\x01"})
        sleep(0.01)
        if bus.read(new, address, 1).data[0] != new:
            raise BusError(
                f"the motor answers to id {new}, but does not say so: try again", [new], "status"
            )
        if bus.scan([old]):
            raise BusError(f"a motor still answers to id {old}: there are two", [old], "corrupt")
    except BaseException as error:
        error.add_note(answers_to(bus, old, new))
        raise


def answers_to(bus: Bus, *ids: int) -> str:
    """Which of these ids answers. Never raises."""
    try:
        found = [str(id) for id in bus.scan(ids)]
    except (Exception, KeyboardInterrupt):
        found = []
    if not found:
        return (
            f"the motor has id {' or '.join(map(str, ids))}, and answers to neither now: "
            "--assign-ids finds it again"
        )
    return f"the motor answers to id {' and '.join(found)}"


def check_alone(bus: Bus, id: int, person, name: str) -> None:
    """Raises ArmFault if two motors have this id: their answers differ once a hand has turned one of them."""

    def position() -> int:
        """Of a long answer, three times: two motors that talk at once garble it, unless they agree in every bit."""
        before = bus.statistics["corrupt"]
        for _ in range(3):
            data = bus.read(id, 0, sum(REGISTERS["present_current"])).data
        if bus.statistics["corrupt"] > before:
            raise BusError(f"servo {id}: what comes back is garbled", [id], "corrupt")
        return decode("present_position", data, 0)

    try:
        before = position()
        person.ask(
            f"Turn the horn of the motor of {name} by hand, by a quarter turn or so, and let it stand."
        )
        turned = abs((position() - before + STEPS // 2) % STEPS - STEPS // 2)
    except BusError as error:
        if error.kind != "corrupt":
            raise
        raise ArmFault(
            f"two motors answer to id {id}: connect that of {name} alone", "start"
        ) from None
    if turned < TURNED:
        raise ArmFault(
            f"the motor that answers was not turned: is it that of {name}, and is it alone?",
            "start",
        )


def assign_ids(
    bus: Bus,
    person,
    sleep: Callable[[float], None] = time.sleep,
    show: Callable[[str], None] = print,
):
    """Ids 1 to 6 for new motors, each alone on the bus, the gripper's first. Raises ArmFault if several answer;
    whatever is raised has a note of the motors that have their id."""
    done, found, id = [], [], None
    try:
        for id, name in reversed(list(zip(IDS, JOINTS, strict=True))):
            person.ask(
                f"Connect the motor of {name} alone to the adapter, nothing behind it, and switch the power on."
            )
            found = []
            bus.limp.clear()  # those were others
            bus.broadcast_torque_off()
            found = bus.scan(range(254))
            if len(found) != 1:
                what = (
                    f"motors {', '.join(map(str, found))} answer" if found else "no motor answers"
                )
                raise ArmFault(
                    f"{what}: exactly one may be connected, with power, at 1 Mbaud; its id may be any",
                    "start",
                )
            let_go(bus, sleep, found)
            check_alone(bus, found[0], person, name)
            set_id(bus, found[0], id, sleep)
            done.append(f"{name} {id}")
            show(f"{name}: id {id}" + (f", was {found[0]}" if found[0] != id else ", as before"))
    except BaseException as error:
        error.add_note(f"ids that are given: {', '.join(done) or 'none'}")
        error.add_note(one_off(bus, {*found, id} - {None}, sleep))
        raise


def one_off(bus: Bus, ids, sleep: Callable[[float], None]) -> str:
    """Torque off for whichever of these ids is connected, in a sentence. Never raises."""
    port, there = "", []
    try:
        bus.broadcast_torque_off()
        there = bus.scan(sorted(ids))
    except BusError as error:
        port = str(error)
    if there:
        return torque.torque_off(bus, there, sleep).sentence()
    if bus.limp:  # one motor is connected, whatever its id is by now
        return torque.Outcome([], sorted(bus.limp), [], port, sorted(bus.limp)).sentence()
    if port:
        return torque.Outcome([], sorted(ids), [], port).sentence()
    return f"torque-off was sent, and no motor answered: {torque.LAST_RESORT}"


# --- Command ----------------------------------------------------------------------------------------------------------
def emulated() -> tuple[Bus, EmulatedPerson, Callable[[float], None]]:
    """A bus of emulated servos, factory new but for their ids, and someone who moves the arm."""
    from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock

    clock = VirtualClock()
    servos = EmulatedBus(IDS, clock)
    return Bus(EmulatedTransport(servos, clock), clock), EmulatedPerson(servos, clock), clock.sleep


def real(port: str) -> tuple[Bus, Person, Callable[[float], None]]:
    """The bus behind a port; nothing here is in a hurry."""
    return Bus(SerialTransport(port), timeout=0.05), Person(), time.sleep


def main(args: Args, bench: tuple | None = None, journal: Path | None = None) -> None:
    """Does what the arguments ask for. Raises ValueError, OSError, ArmFault or BusError, one sentence each; a note says
    what became of the torque. bench: a bus, a person and a clock's sleep in place of the arguments' own, with their
    journal."""
    args.check_choices()
    journal = journal if bench or args.emulate else UNFINISHED
    file = args.check or args.write
    calibration = Calibration.from_json(file) if file else None
    bus, person, sleep = bench or (emulated() if args.emulate else real(args.port))
    ids = calibration.ids if calibration else IDS
    try:
        if journal and journal.exists():
            if args.out or args.write:
                print(settle(bus, journal, sleep))
            else:
                when, changes = unfinished(journal)
                who = numbers({id for id, *_ in changes})
                print(f"note: a calibration of {who} was cut off on {when}: {AGAIN}")
        if args.assign_ids:
            assign_ids(bus, person, sleep)
        elif args.hand_over:
            hand_over(bus, sleep)
        elif args.out:
            make(bus, person, sleep, args.out, journal)
        elif args.write:
            changes = put(bus, calibration, sleep, journal)
            for id, name, old, new in changes:
                print(f"{JOINTS[calibration.ids.index(id)]}: {name} {old} -> {new}")
            print("\n".join([*(f"note: {remark}" for remark in so101.reach(calibration)),
                             f"the motors have {args.write}" + ("" if changes else " already")]))  # fmt: skip
        elif args.check:
            found = so101.differences(check_motors(bus, calibration.ids), calibration.eeprom())
            for id, name, have, wanted in found:
                print(
                    f"{JOINTS[calibration.ids.index(id)]}: {name} is {have} in the motor, {wanted} in the file"
                )
            if found:
                raise ArmFault(
                    f"{len(found)} values differ: --write puts the file into the motors", "start"
                )
            print(f"the motors have {args.check}")
        else:
            eeprom = check_motors(bus, IDS)
            joints = {name: JointCalibration(id, 0, *(eeprom[id][key] for key in so101.CALIBRATED))
                      for id, name in zip(IDS, JOINTS, strict=True)}  # fmt: skip
            Calibration(joints).to_json(args.read)
            print(f"{table(Calibration(joints))}\n{args.read} is written")
    except BaseException as error:
        if args.check or args.read:
            error.add_note("nothing was written to the servos")
        elif not args.assign_ids:  # which has said so already
            error.add_note(torque.torque_off(bus, ids, sleep).sentence())
        raise
    finally:
        bus.close()


def hand_over(bus: Bus, sleep: Callable[[float], None]) -> None:
    """Motors power up with the torque that lerobot expects, not with SO101's weak one, which its next start writes."""
    let_go(bus, sleep)
    check_motors(bus, IDS)
    wanted = {
        id: {"max_torque": 500 if name == "gripper" else 1000}
        for name, id in zip(JOINTS, IDS, strict=True)
    }
    for id, _, old, new in write_eeprom(bus, wanted, sleep, "run it again"):
        print(
            f"{JOINTS[IDS.index(id)]}: powers up with {new / 10:g} % of its torque, was {old / 10:g} %"
        )
    print("the motors are ready for another program; switch their power off and on")


def make(
    bus: Bus, person, sleep: Callable[[float], None], out: str, journal: Path | None = None
) -> None:
    """Measures, shows, asks, and writes the motors and the file."""
    calibration, remarks = calibrate(bus, person, sleep)
    print("\n".join([table(calibration), *(f"note: {remark}" for remark in remarks)]))
    person.ask(f"Hold the arm still: these values go into the motors and to {out}.")
    put(bus, calibration, sleep, journal)
    try:
        calibration.to_json(out)
    except OSError as error:
        text = f"{out} cannot be written ({error.strerror}), but the motors have it: save it with --read"
        raise ValueError(text) from None
    print(f"{out} is written; the motors have it")


def sentence(error: BaseException) -> str:
    """What has stopped the command, what is written and what became of the torque."""
    what = str(error) or "given up"
    if isinstance(error, EOFError):
        what = "the keyboard's input has ended: start in a terminal"
    return "; ".join([f"error: {what}", *dict.fromkeys(getattr(error, "__notes__", ()))])


def give_up(number, _) -> None:
    """SIGTERM and a closed terminal are Ctrl-C: what is half written is undone."""
    raise KeyboardInterrupt(f"given up by {signal.Signals(number).name}")


def command() -> int:
    """The command line. -> exit status."""
    import tyro

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, give_up)
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, FileNotFoundError, ArmFault, BusError, OSError) as error:
        print(sentence(error), file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt) as error:
        print(f"\n{sentence(error)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command())
