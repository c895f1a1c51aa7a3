"""A table of faults by operation on emulated servos, through the byte path, in virtual time.

    python -m hardware.faults                   prints the table
    python -m hardware.faults --write           and writes it into docs/hardware.md, between its markers
    python -m hardware.faults --only mute       the faults whose name has this word

Every row is one run of one operation, with the deployer's or the calibration's own code, in which one thing goes wrong:
    start        idle -> hold; the fault is there before
    move, home   to the start pose and back
    run          the policy acts, 10 times a second
    step         the same, a person is asked before every tick and takes a second
    calibrate    measuring and writing        assign ids   one new motor after the other
The watchdog's ladder is the real one, under the virtual clock; its process is tested in tests/test_watchdog.py.

Columns: what happened; torque, as the last line says it and as the emulated servos have it; the exit status; seconds of
virtual time from the fault to the first torque-off on the wire, or to the refusal; the last line. No servo may run
faster than its speed limit, but for what a hand does to it.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hardware import calibrate, emulate
from hardware.camera import ArraySource, Camera, frame_around
from hardware.deploy_so101 import Signals, sentence, status
from hardware.deployment import Deployment, check_policy
from hardware.deployment import Fault as deployment_fault  # noqa: N813
from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, encode
from hardware.policy import area_mean, load_policy, middle_square
from hardware.recording import Recorder
from hardware.so101 import JOINTS, POWER_UP_TORQUE, SO101, Calibration
from hardware.torque import KNOWN, LAST_RESORT, Outcome
from hardware.watchdog import Watch

PAGE = Path(__file__).resolve().parent.parent / "docs/hardware.md"
BEGIN, END = (
    "<!-- faults: python -m hardware.faults --write -->",
    "<!-- end of the table of faults -->",
)
IDS = tuple(range(1, 7))
HEARTBEAT, FROZEN, HANGS = 0.25, 1.0, 10.0  # s, as the deployer's and the watchdog's
FASTER = 1.05  # times its speed limit: more than a controller's overshoot
AT = 0.53  # s after an operation has begun: in the middle of a tick, and of a movement
FOLDED = np.array([0.3, -0.5, 0.5, 1.1, -1.1, 0.6])
SPEC = {
    "env_id": "SO101ReachCube-v1", "robot": "so101", "joint_names": list(JOINTS),
    "joint_low": [-1.919862, -1.745329, -1.69, -1.658063, -2.743847, -0.174533],
    "joint_high": [1.919862, 1.745329, 1.69, 1.658063, 2.841206, 2.094395],
    "start_pose": [0.0, 0.0, 0.0, math.pi / 2, -math.pi / 2, math.pi / 3],
    "action_scale": [0.1, 0.1, 0.1, 0.1, 0.1, 0.2], "action_semantics": "target += action * action_scale",
    "control_hz": 10.0, "state_layout": ["joint_position"] * 6 + ["joint_target"] * 6,
    "cameras": {"wrist": {}}, "max_episode_steps": 50,
}  # fmt: skip


class Killed(BaseException):
    """The program has been killed: it does nothing any more."""


class Policy:
    """Swings all joints but the jaw, which closes. `act` may be replaced."""

    digest, algo = "0" * 16, "fault"

    def __init__(self, spec: dict):
        self.spec = spec
        self.ticks = itertools.count()

    def reset(self) -> None:
        pass

    def preprocess(self, frame: np.ndarray) -> np.ndarray:
        return area_mean(middle_square(frame)[None], 16)

    def act(self, obs: dict) -> np.ndarray:
        swing = 0.5 * math.cos(next(self.ticks) / 4)
        return np.array([[swing, swing, -swing, swing, swing, -0.4]], np.float32)


class VirtualWatch(Watch):
    """The watchdog's process, under the rig's clock."""

    def __init__(self, rig: "Rig"):
        self.rig, self.clock = rig, rig.clock
        self.bus = Bus(EmulatedTransport(rig.servos, rig.clock), rig.clock, timeout=0.05)
        self.ids, self.ladder, self.returns = list(IDS), {}, 60.0
        self.path, self.port, self.timeout = "the emulated port", -1, HEARTBEAT
        self.reason, self.outcome = None, None
        self.taken = self.hurried = self.told_to_end = self.dead = self.asleep = False
        self.last = None  # when the program's heart beat

    def report(self, **what) -> None:
        if "outcome" in what:
            self.outcome = Outcome(**what["outcome"])

    def say(self, text: str) -> None:
        self.rig.said.append(text)

    def open_again(self):
        if not self.rig.servos.plugged:
            raise BusError("not there")
        return EmulatedTransport(self.rig.servos, self.clock)

    def listen(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    def take(self) -> None:
        self.taken = True

    def look(self) -> None:
        """Every 50 ms: whether the heart still beats."""
        self.clock.at(self.clock() + 0.05, self.look)
        if self.taken or self.dead or self.asleep or self.last is None:
            return
        if self.clock() - self.last > HEARTBEAT:
            self.down(f"no heartbeat for {HEARTBEAT:g} s")
            hung = self.clock() + HANGS
            self.clock.at(hung, lambda: self.kill() if self.last < hung - HANGS else None)

    def down(self, reason: str) -> None:
        """Goes down the ladder."""
        if self.taken or self.dead or self.asleep:
            return
        self.reason = reason
        self.go_down()

    def kill(self) -> None:
        self.say("the program hangs: it is ended")
        raise Killed

    def beat(self) -> None:
        """The program's side."""
        self.check()
        if self.dead:
            raise BusError("the watchdog's process has died: stopping", kind="watchdog")
        if self.asleep and self.clock() - self.asleep > FROZEN:
            raise BusError(f"the watchdog is frozen, for {FROZEN:g} s: stopping", kind="watchdog")
        self.last = self.clock()

    def check(self) -> None:
        if self.taken:
            raise BusError(f"stopped by the watchdog: {self.reason}", kind="stopped")


class Guarded(EmulatedTransport):
    """The program's port: refused once the watchdog has the bus; a write is a heartbeat."""

    def __init__(self, rig: "Rig"):
        super().__init__(rig.servos, rig.clock)
        self.dog = rig.dog

    def write(self, data: bytes) -> None:
        self.dog.check()
        if self.dog.last is not None:
            self.dog.last = self.clock()
        super().write(data)

    def read(self, n: int, timeout: float) -> bytes:
        self.dog.check()
        return super().read(n, timeout)

    def flush_input(self) -> None:
        self.dog.check()
        super().flush_input()


class Rig:
    """An arm with everything around it."""

    def __init__(self, spec: dict | None = None, options: dict | None = None):
        spec, options = spec or {}, options or {}
        self.clock, self.said = VirtualClock(), []
        self.spec = SPEC | spec
        self.servos = EmulatedBus(IDS, self.clock, **options)
        content = emulate.recorded_calibration(SPEC)
        emulate.calibrate(self.servos, content)
        for servo in self.servos.servos.values():  # not its first start
            servo._set("max_torque", int(POWER_UP_TORQUE[servo.id - 1]), servo.eeprom)
            servo.power_up()
        emulate.place(self.servos, FOLDED)
        self.calibration = Calibration.from_dict(content)
        self.policy = Policy(self.spec)
        self.fastest = 0.0  # of a servo, as a share of the speed that it was told to keep to
        self.image = frame_around(np.full((16, 16, 3), 100, np.uint8))
        self.source = ArraySource([self.image], clock=self.clock)
        self.camera = Camera(lambda: self.source(), self.clock, threaded=False, name="wrist")
        self.injected, self.noticed = 0.0, None
        self.dog = VirtualWatch(self)
        self.signals = Signals()
        self.signals.caught, self.signals.told = None, False
        self.recorder, self.confirm = None, None
        self.deployment = None

    def watch_speed(self) -> None:
        """Every 20 ms."""
        self.clock.at(self.clock() + 0.02, self.watch_speed)
        self.servos.advance()
        wall = getattr(self.deployment and self.deployment.arm, "wall_speed", None)
        if wall is not None:
            now = [
                abs(servo.velocity) if servo.torque else 0.0
                for servo in self.servos.servos.values()
            ]
            self.fastest = max(self.fastest, float((now / wall).max()))

    def torques(self) -> list[str]:
        """Joints that have torque."""
        return [JOINTS[i] for i, s in enumerate(self.servos.servos.values()) if s.torque]

    def deploy(self, operation: str) -> None:
        """The deployer's way through the operation. Raises what stops it."""
        hz = float(self.spec["control_hz"])
        self.dog.look()
        self.watch_speed()
        try:
            limits = check_policy(self.policy)
            arm = SO101(
                Bus(Guarded(self), self.clock, timeout=0.03), self.calibration, limits, self.clock,
                self.clock.sleep, 1 / hz,
            )  # fmt: skip
            each = self.recorder.add if self.recorder else lambda record: None
            self.deployment = d = Deployment(
                self.policy, arm, {"wrist": self.camera}, limits, self.clock, self.clock.sleep,
                beat=lambda: (self.signals.check(), self.dog.beat()), each_tick=each,
            )  # fmt: skip
            if operation == "step":
                d.confirm = self.person
            with d:
                if operation == "start":
                    self.begin()
                d.start()
                if operation == "move":
                    self.begin()
                d.move(self.spec["start_pose"])
                if operation in ("run", "step"):
                    self.begin()
                d.run(20 if operation != "step" else 4)
                if operation == "home":
                    self.begin()
                d.move(d.home)
            d.check_whole()
            self.end_watchdog(True)
            if not self.dog.outcome.known:
                raise deployment_fault("the run is over")
        except BaseException as error:
            self.noticed = self.clock()
            self.end_watchdog(False)
            if self.deployment:
                error.add_note(self.ending())
            raise

    def end_watchdog(self, calm: bool) -> None:
        dog = self.dog
        if dog.taken or dog.dead or dog.asleep:
            return
        if calm:
            dog.take()
            dog.outcome = dog.off()
        else:
            dog.down("the controlling program has ended")

    def ending(self) -> str:
        if self.dog.outcome:
            return self.dog.outcome.sentence(self.deployment.arm.names)
        return self.deployment.ending()

    def begin(self) -> None:
        if self.fault.standing:
            self.injected = self.injected or self.clock()
        else:
            self.clock.at(self.clock() + AT, self.strike)

    def strike(self) -> None:
        self.injected = self.clock()
        self.fault.inject(self)

    def person(self, record: dict) -> bool | None:
        """Takes a second for every tick."""
        if self.confirm is not record:
            self.confirm, self.asked = record, self.clock()
        return True if self.clock() - self.asked > 1.0 else None


class Bench(Rig):
    """The same servos, and the commands of hardware/calibrate.py."""

    def __init__(self, spec: dict | None = None, options: dict | None = None):
        super().__init__(spec, options)
        self.bus = Bus(EmulatedTransport(self.servos, self.clock), self.clock, timeout=0.05)
        self.motors = list(self.servos.servos.values())
        self.hand = calibrate.EmulatedPerson(self.servos, self.clock)
        self.journal = Path(tempfile.mkdtemp()) / "unfinished.json"
        self.turned, self.connected = 900, None
        self.burn = None  # called when the first register that is kept is written

    def sleep(self, seconds: float) -> None:
        if self.burn and any(a < 40 for _, _, a, _ in self.servos.writes):
            burn, self.burn = self.burn, None
            self.injected = self.clock()
            burn()
        self.clock.sleep(seconds)

    def ask(self, text: str) -> None:
        if text.startswith("Connect"):
            self.connected = next(at for at, name in enumerate(JOINTS) if f" {name} " in text)
            for at, servo in enumerate(self.motors):
                servo.deaf = at != self.connected
        elif text.startswith("Turn"):
            self.motors[self.connected].encoder += self.turned
        else:
            self.hand.ask(text)

    def done(self) -> bool:
        self.clock.sleep(0.02)
        return self.hand.done()

    def deploy(self, operation: str) -> None:
        self.begin()
        if operation == "calibrate":
            emulate.calibrate(self.servos, emulate.recorded_calibration(SPEC))
            for servo in self.motors:
                servo._set("homing_offset", 5, servo.eeprom), servo.power_up()
            args = calibrate.Args(out=str(Path(tempfile.mkdtemp()) / "arm.json"), emulate=True)
        else:
            for servo in self.motors:
                servo.registers[5] = servo.eeprom[5] = 1
            args = calibrate.Args(assign_ids=True, emulate=True)
        self.before = [bytes(servo.eeprom) for servo in self.motors]
        calibrate.main(args, (self.bus, self, self.sleep), self.journal)

    def changed(self) -> str:
        now = [bytes(servo.eeprom) for servo in self.motors]
        count = sum(new != old for new, old in zip(now, self.before, strict=True))
        many = {0: "no motor", 1: "1 motor", len(now): "all motors"}
        return many.get(count, f"{count} motors") + " changed"

    def next_start(self) -> str:
        """The cable is in again, the program is started again. -> what it says of what was cut off."""
        self.servos.unplug(False)
        for servo in self.motors:
            servo.silent = False
        bus = Bus(EmulatedTransport(self.servos, self.clock), self.clock, timeout=0.05)
        return calibrate.settle(bus, self.journal, self.clock.sleep) or ""


# --- Faults -----------------------------------------------------------------------------------------------------------
RUNNING = ("move", "run", "step", "home")
ALL = ("start", *RUNNING)
NOTHING: Callable = lambda rig: None  # noqa: E731


@dataclass
class Fault:
    """inject: called on the rig in the middle of the operation. before: on a new rig. The fault is `standing` if only
    `before` is given. stops: whether the operation has to end; False: it has to go on. by_hand: a hand moves it."""

    name: str
    inject: Callable = NOTHING
    operations: tuple[str, ...] = ("run",)
    before: Callable = NOTHING
    spec: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    stops: bool = True
    by_hand: bool = False

    @property
    def standing(self) -> bool:
        return self.inject is NOTHING


def everyone(call: Callable) -> Callable:
    return lambda rig: [call(rig, id) for id in IDS]


def answer(value) -> Callable:
    """The policy answers this from now on: a value, or what a function makes of the right answer."""

    def inject(rig: Rig) -> None:
        act = rig.policy.act
        rig.policy.act = lambda obs: value(act(obs)) if callable(value) else value

    return inject


def once(value) -> Callable:
    def inject(rig: Rig) -> None:
        act = rig.policy.act
        rig.policy.act = lambda obs: (setattr(rig.policy, "act", act), value)[1]

    return inject


def slow(seconds: float, times: int = 10**9) -> Callable:
    """The policy takes so long."""

    def inject(rig: Rig) -> None:
        act, left = rig.policy.act, itertools.count()
        rig.policy.act = lambda obs: (
            rig.clock.sleep(seconds) if next(left) < times else None,
            act(obs),
        )[1]

    return inject


def broken(obs) -> None:
    raise RuntimeError("weights are damaged")


def ending(obs) -> None:
    raise SystemExit(0)


def camera(source: Callable) -> Callable:
    return lambda rig: setattr(rig, "source", lambda: source(rig))


def no_camera(rig: Rig) -> None:
    raise OSError("device is gone")


def late_image(ticks: int) -> Callable:
    """Images arrive 60 ms before they are asked for, so many times."""

    def inject(rig: Rig) -> None:
        latest, left = rig.camera.latest, itertools.count()

        def late():
            frame = latest()
            return (
                frame
                if next(left) >= ticks
                else frame.__class__(frame.rgb, frame.time - 0.06, frame.index)
            )

        rig.camera.latest = late

    return inject


def when_torque_comes(call: Callable) -> Callable:
    """In the middle of the start: 50 ms after the first servo has got torque."""

    def before(rig: Rig) -> None:
        servo = rig.servos.servos[1]
        write, left = servo.write, iter([True])

        def watched(address: int, data: bytes) -> None:
            write(address, data)
            if servo.torque and next(left, False):
                rig.injected = rig.clock() + 0.05
                rig.clock.at(rig.injected, lambda: call(rig))

        servo.write = watched

    return before


def push(rig: Rig) -> None:
    rig.servos.advance()
    rig.servos.servos[3].encoder += 512


def twist(rig: Rig) -> None:
    """Someone turns the wrist to its encoder's end, slowly."""
    servo = rig.servos.servos[5]
    servo.load = -0.9


def stuck(rig: Rig, id: int = 2) -> None:
    rig.servos.block(id)


def hold_object(rig: Rig) -> None:
    rig.servos.block(6)


def unplug_for(seconds: float) -> Callable:
    def inject(rig: Rig) -> None:
        rig.servos.unplug()
        rig.clock.at(rig.clock() + seconds, lambda: rig.servos.unplug(False))

    return inject


def off_for(seconds: float, *ids: int) -> Callable:
    """These servos' cables are out for so long."""

    def inject(rig: Rig) -> None:
        for id in ids:
            rig.servos.disconnect(id)
            rig.clock.at(rig.clock() + seconds, lambda id=id: rig.servos.disconnect(id, False))

    return inject


def lose_all(rig: Rig) -> None:
    rig.servos.lose(10**9)


def foreign(register: str, value: int) -> Callable:
    """Another program writes to a servo."""
    address = REGISTERS[register][0]
    return lambda rig: rig.servos.servos[2].write(address, encode(register, value))


def deaf_goals(rig: Rig) -> None:
    servo = rig.servos.servos[4]
    write = servo.write
    servo.write = lambda address, data: None if address == 41 else write(address, data)


def signalled(number: int) -> Callable:
    return lambda rig: setattr(rig.signals, "caught", number)


def killed(rig: Rig) -> None:
    rig.dog.down("the controlling program has ended")
    raise Killed


def key(rig: Rig) -> None:
    rig.dog.down("a stop key was pressed")


def dead_dog(rig: Rig) -> None:
    rig.dog.dead = True


def frozen_dog(rig: Rig) -> None:
    rig.dog.asleep = rig.clock()


def asleep_for(seconds: float) -> Callable:
    """The program is stopped (Ctrl-Z), and goes on later."""
    return lambda rig: rig.clock.sleep(seconds)


def full_disk(rig: Rig) -> None:
    folder = Path(tempfile.mkdtemp())
    rig.recorder = Recorder(folder / "film", {"spec": {"cameras": {}}}, 10.0)
    rig.recorder.ticks.close()
    rig.recorder.ticks = open("/dev/full", "w", buffering=1)  # noqa: SIM115


def checkpoint(algo: str) -> Callable:
    def before(rig: Rig) -> None:
        import torch

        path = Path(tempfile.mkdtemp()) / "best.pt"
        torch.save({"algo": algo, "spec": rig.spec}, path)
        os.chdir(path.parent)
        load_policy("best.pt")

    return before


def other_offset(rig: Rig) -> None:
    rig.servos.servos[2]._set("homing_offset", 5)


def other_model(rig: Rig) -> None:
    rig.servos.servos[4].registers[3:5] = b"\x01\x02"


def at_joint(at: int, value: float) -> Callable:
    return lambda rig: emulate.place(rig.servos, np.where(np.arange(6) == at, value, FOLDED))


def sag(volts: float) -> Callable:
    return lambda rig: setattr(rig.servos, "voltage", volts)


def burning(call: Callable) -> Callable:
    """Happens when the first register that is kept has been written."""
    return lambda rig: setattr(rig, "burn", lambda: call(rig))


def kill_writer(rig: Bench) -> None:
    def gone(data: bytes) -> None:
        raise Killed

    rig.bus.transport.write = gone
    raise Killed


def give_up(rig: Rig) -> None:
    raise KeyboardInterrupt("given up by Ctrl-C")


def terminate(rig: Rig) -> None:
    raise KeyboardInterrupt(f"given up by {signal.SIGTERM.name}")


def short_jaw(rig: Bench) -> None:
    rig.hand.half = rig.hand.half * np.array([1, 1, 1, 1, 1, 600 / 723])


def short_sweep(rig: Bench) -> None:
    rig.hand.share = 0.3


def jolt(rig: Bench) -> None:
    rig.motors[5].encoder += 60


def stubborn(rig: Bench) -> None:
    servo = rig.motors[3]
    write = servo.write
    servo.write = lambda address, data: None if address < 40 else write(address, data)


def twin(rig: Rig) -> None:
    """A second motor with the same id, in the same place: answers equal in every bit."""
    other = rig.servos.duplicate(6)
    other.eeprom[:] = rig.motors[5].eeprom
    other.eeprom[5] = 1
    other.power_up()


def two_ids(rig: Rig) -> None:
    other = rig.servos.duplicate(6)
    other.registers[5] = other.eeprom[5] = 9


def other_motor(rig: Bench) -> None:
    rig.turned = 0


OVERLOAD = "a servo reports an overload"
FAULTS = [
    # Servos
    Fault("a servo restarts, without torque", lambda rig: rig.servos.power_cycle(3), RUNNING),
    Fault("a servo restarts, with torque and goal 0", lambda rig: rig.servos.power_cycle(3), RUNNING,
          options=dict(power_up_torque=True)),
    Fault("a servo restarts when torque comes on", operations=("start",), options=dict(power_up_torque=True),
          before=when_torque_comes(lambda rig: rig.servos.power_cycle(3))),
    Fault("a servo falls silent when torque comes on", operations=("start",),
          before=when_torque_comes(lambda rig: rig.servos.mute(3))),
    Fault("the adapter is unplugged when torque comes on", operations=("start",),
          before=when_torque_comes(lambda rig: rig.servos.unplug())),
    Fault("Ctrl-C when torque comes on", operations=("start",), before=when_torque_comes(
          lambda rig: setattr(rig.signals, "caught", signal.SIGINT))),
    Fault("the program is killed when torque comes on", operations=("start",), before=when_torque_comes(
          lambda rig: killed(rig))),
    Fault("all servos restart, with torque", lambda rig: rig.servos.power_cycle(), ("run", "step"),
          options=dict(power_up_torque=True)),
    Fault(OVERLOAD, lambda rig: rig.servos.error(3, 0x20), RUNNING),
    Fault(OVERLOAD, operations=("start",), before=lambda rig: rig.servos.error(3, 0x20)),
    Fault("an encoder fails", lambda rig: rig.servos.error(3, 0x02)),
    Fault("a servo gets 67 degrees hot", lambda rig: rig.servos.heat(3, 67), RUNNING),
    Fault("a servo is at 55 degrees", operations=("start",), before=lambda rig: rig.servos.heat(3, 55)),
    Fault("a servo falls silent", lambda rig: rig.servos.mute(3), RUNNING),
    Fault("a servo falls silent", operations=("start", "calibrate"), before=lambda rig: rig.servos.mute(3)),
    Fault("a servo's cable comes off", lambda rig: rig.servos.disconnect(3), RUNNING),
    Fault("a servo's cable comes off", operations=("start",), before=lambda rig: rig.servos.disconnect(3)),
    Fault("a servo's cable is off for 5 s", off_for(5.0, 3), RUNNING),
    Fault("a joint is blocked", stuck, ("move", "run", "home")),
    Fault("the jaw presses on an object", hold_object, stops=False),
    Fault("a joint is pushed by 45 degrees", push, ("run", "step"), by_hand=True),
    Fault("the wrist is turned to its encoder's end", twist, ("run",), by_hand=True),
    Fault("a servo does not take its goals", deaf_goals, ("move", "run")),
    Fault("another program raises a torque limit", foreign("torque_limit", 1000), RUNNING),
    Fault("another program writes a speed", foreign("goal_speed", 0), ("run",)),
    Fault("a servo of another baud rate", operations=("start",), before=lambda rig: rig.servos.wrong_baud(500_000, 4)),
    Fault("a servo of another model", other_model, ("start",), before=other_model),
    Fault("two servos with one id", operations=("start",), before=lambda rig: rig.servos.duplicate(6, 900.0)),
    Fault("another arm's calibration", operations=("start",), before=other_offset),
    Fault("a joint stands outside its range", operations=("start",), before=at_joint(1, 2.0)),
    Fault("readings beyond the encoder's ends", operations=("start",),
          before=lambda rig: setattr(rig.servos.servos[5], "encoder", 30.0), options=dict(readings_wrap=False)),
    Fault("readings beyond the encoder's ends", operations=("calibrate",), options=dict(readings_wrap=False),
          stops=False),
    # Supply and line
    Fault("12 V for servos of 7.4 V", operations=("start",), before=sag(12.0)),
    Fault("4.2 V for servos of 7.4 V", operations=("start",), before=sag(4.2)),
    Fault("the supply sags to 4.3 V", sag(4.3), RUNNING),
    Fault("the adapter is unplugged", lambda rig: rig.servos.unplug(), (*RUNNING, "calibrate")),
    Fault("the adapter is unplugged", operations=("start", "assign ids"), before=lambda rig: rig.servos.unplug()),
    Fault("the adapter is unplugged for 3 s", unplug_for(3.0), RUNNING),
    Fault("no request reaches a servo", lose_all, ("run", "step")),
    Fault("no request reaches a servo for 5 s", off_for(5.0, *IDS), RUNNING),
    Fault("2 % of the replies are lost", options=dict(loss=0.02), stops=False),
    Fault("5 % of the replies are lost", options=dict(loss=0.05), stops=False),
    Fault("5 % of the replies are lost, at 30 Hz", options=dict(loss=0.05), spec=dict(
          control_hz=30.0, action_scale=[0.05] * 6), stops=False),
    Fault("5 % of the replies are lost, at 50 Hz", options=dict(loss=0.05), spec=dict(
          control_hz=50.0, action_scale=[0.03] * 6), stops=False),
    Fault("half of the replies are lost", options=dict(), inject=lambda rig: setattr(rig.servos, "loss", 0.5)),
    Fault("four replies are garbled", lambda rig: rig.servos.corrupt(4), ("move", "run"), stops=False),
    Fault("three replies are late", lambda rig: rig.servos.delay(3, 0.012, 3), ("move", "run"), stops=False),
    Fault("two requests are lost", lambda rig: rig.servos.lose(2), ("move", "run"), stops=False),
    Fault("the adapter keeps replies for 16 ms", options=dict(usb_latency=0.016), stops=False),
    Fault("the adapter keeps replies for 16 ms, at 30 Hz", operations=("start",), options=dict(usb_latency=0.016),
          spec=dict(control_hz=30.0, action_scale=[0.05] * 6)),
    # Policy
    Fault("the policy says NaN once", once(np.full((1, 6), np.nan)), stops=False),
    Fault("the policy says NaN", answer(np.full((1, 6), np.nan)), ("run", "step")),
    Fault("the policy says infinity", answer(lambda a: a / 0.0)),
    Fault("the policy says a billion", answer(lambda a: np.sign(a) * 1e9), stops=False),
    Fault("the policy's answer has another shape", answer(np.zeros((1, 5))), ("run", "step")),
    Fault("the policy's answer is a text", answer("left")),
    Fault("the policy raises an exception", lambda rig: setattr(rig.policy, "act", broken), ("run", "step")),
    Fault("the policy ends the program", lambda rig: setattr(rig.policy, "act", ending), ("run", "step")),
    Fault("the policy hangs", slow(1000.0), ("run", "step")),
    Fault("the policy takes 0.2 s", slow(0.2)),
    Fault("the policy takes 0.18 s once", slow(0.18, 1), stops=False),
    # Camera
    Fault("the camera gives no image", camera(lambda rig: None)),
    Fault("the camera's driver raises an exception", camera(no_camera), ("run", "step")),
    Fault("the image is black", camera(lambda rig: rig.image * 0)),
    Fault("the image has another size", camera(lambda rig: rig.image[:240])),
    Fault("two images are 60 ms late", late_image(2), stops=False),
    Fault("all images are 60 ms late", late_image(10**9)),
    # Person, computer
    Fault("Ctrl-C", signalled(signal.SIGINT), RUNNING),
    Fault("SIGTERM", signalled(signal.SIGTERM), ("run",)),
    Fault("the program is killed", killed, RUNNING),
    Fault("the program is stopped for 5 s", asleep_for(5.0), ("run", "step")),
    Fault("a stop key", key, RUNNING),
    Fault("the watchdog dies", dead_dog, RUNNING),
    Fault("the watchdog freezes", frozen_dog, RUNNING),
    Fault("the disk is full", before=full_disk, stops=False),
    # Files
    Fault("a checkpoint asks for 1e9 rad/s", operations=("start",), spec=dict(velocity_limit=[1e9] * 6)),
    Fault("a checkpoint's joints go to 100 rad", operations=("start",), spec=dict(joint_high=[100.0] * 6)),
    Fault("a checkpoint's start pose is NaN", operations=("start",), spec=dict(start_pose=[math.nan] * 6)),
    Fault("a checkpoint's rate is 1e6 Hz", operations=("start",), spec=dict(control_hz=1e6)),
    Fault("a checkpoint's tracking error is infinite", operations=("start",), spec=dict(tracking_error=[math.inf] * 6)),
    Fault("a checkpoint's task is a path", operations=("start",), spec=dict(env_id="../../etc/x")),
    Fault("a checkpoint names a module", operations=("start",), before=checkpoint("resfit")),
    # Calibration and ids
    Fault("the jaw's range is 2030 to 3230", operations=("calibrate",), before=short_jaw, stops=False),
    Fault("joints are hardly moved", operations=("calibrate",), before=short_sweep),
    Fault("a servo restarts with torque", lambda rig: rig.servos.power_cycle(3), ("calibrate",),
          options=dict(power_up_torque=True)),
    Fault("Ctrl-C while motors are written to", operations=("calibrate", "assign ids"), before=burning(give_up)),
    Fault("SIGTERM while motors are written to", operations=("calibrate",), before=burning(terminate)),
    Fault("a servo falls silent while it is written to", operations=("calibrate", "assign ids"),
          before=burning(lambda rig: rig.servos.mute(2 if rig.connected is None else 6))),
    Fault("the adapter is unplugged while motors are written to", operations=("calibrate", "assign ids"),
          before=burning(lambda rig: rig.servos.unplug())),
    Fault("the program is killed while motors are written to", operations=("calibrate",),
          before=burning(kill_writer)),
    Fault("the arm is moved while motors are written to", operations=("calibrate",), before=burning(jolt)),
    Fault("a motor does not keep what it is told", operations=("calibrate", "assign ids"), before=lambda rig: (
          stubborn(rig), setattr(rig.motors[5], "write", lambda address, data: None)
          if rig.operation == "assign ids" else None)),
    Fault("two motors with one id, equal in every bit", operations=("assign ids",), before=twin),
    Fault("two motors with two ids", operations=("assign ids",), before=two_ids),
    Fault("another motor is turned", operations=("assign ids",), before=other_motor),
]  # fmt: skip


# --- Running them -----------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """One fault in one operation, and what came of it."""

    fault: Fault
    operation: str
    happened: str
    said: str  # what the last line says of the torque: off, unknown, on, untouched
    on: list[str]  # joints that truly have torque
    exit: int
    seconds: float | None
    message: str
    fastest: float = 0.0

    @property
    def torque(self) -> str:
        return f"{self.said}; {len(self.on)} on" if self.on else f"{self.said}; none on"

    @property
    def honest(self) -> bool:
        """Whether the last line is true: it does not say off of anything that is on."""
        return not self.on if self.said != "unknown, said so" else True

    @property
    def outcome(self) -> tuple:
        """What rows of the page have in common: the fault, and what came of it. KNOWN stands in the torque's column."""
        message = self.message.removesuffix("; " + KNOWN)
        return self.fault.name, self.happened, self.torque, str(self.exit), message


def run(fault: Fault, operation: str) -> Row:
    """One row."""
    rig = (Bench if operation in ("calibrate", "assign ids") else Rig)(fault.spec, fault.options)
    rig.fault, rig.operation = fault, operation
    printed, error, here = io.StringIO(), None, os.getcwd()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            fault.before(rig)
            rig.deploy(operation)
        except (Exception, KeyboardInterrupt, Killed) as caught:
            error = caught
        finally:
            os.chdir(here)
            if rig.recorder:
                rig.recorder.close({})
    rig.servos.advance()
    after = rig.clock()
    while rig.clock() < after + 1.0:  # nothing switches torque on again
        rig.clock.sleep(0.1)
    exit_status, message = end_of(rig, error, printed.getvalue())
    came, joints = happened(rig, error), rig.torques()
    if isinstance(rig, Bench) and rig.journal.exists():
        later = rig.next_start()
        came += f"; after the next start {rig.changed()}"
        later = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", later)
        message = "; then: ".join(filter(None, (message, later)))
    offs = [
        when
        for when, *_, data in rig.servos.written("torque_enable", rig.injected)
        if data == b"\x00"
    ]
    stopped = error is not None
    seconds = None
    if stopped:
        end = rig.noticed if rig.noticed is not None else after
        seconds = max(0.0, (offs[0] if offs and rig.said_off else end) - rig.injected)
    return Row(
        fault,
        operation,
        came,
        torque_of(message, rig),
        joints,
        exit_status,
        seconds,
        message,
        rig.fastest,
    )


def end_of(rig: Rig, error: BaseException | None, printed: str) -> tuple[int, str]:
    """Exit status and last line."""
    bench = isinstance(rig, Bench)
    rig.said_off = not bench
    if isinstance(error, Killed) and bench:
        return 137, ""
    if isinstance(error, Killed):
        return 137, "watchdog: " + "; ".join([*rig.said, rig.dog.outcome.sentence()])
    if error is not None and bench:
        message = calibrate.sentence(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 2, message
    if error is not None:
        return status(error), sentence(error)
    lines = [
        *(rig.deployment.arm.warnings if rig.deployment else []),
        rig.recorder and rig.recorder.problem,
    ]
    lines += [line for line in printed.splitlines() if line.startswith("note: ")]
    return 0, "; ".join(filter(None, lines))


def happened(rig: Rig, error: BaseException | None) -> str:
    if isinstance(rig, Bench):
        return rig.changed()
    if isinstance(error, Killed):
        return (
            "ended by the watchdog" if "killed" not in rig.fault.name else "stopped by the watchdog"
        )
    if error is None:
        return "went on"
    if rig.dog.taken and "stopped by the watchdog" in str(error):
        return "stopped by the watchdog"
    goals = rig.servos.written("goal_position")
    return "stopped" if goals else "refused"


def torque_of(message: str, rig: Rig) -> str:
    if KNOWN in message:
        return "off"
    if LAST_RESORT in message:
        return "unknown, said so"
    if "torque was read as off" in message:
        return "off when last read"
    if not message.startswith(("error", "watchdog")):
        return "off"
    if rig.deployment is None or "has not started" in message:
        return "none given"
    return "?"


def rows(only: str = "", every: int = 1) -> list[Row]:
    """The rows of the table; of every n-th fault and operation."""
    pairs = [(fault, op) for fault in FAULTS for op in fault.operations if only in fault.name]
    return [run(fault, op) for fault, op in pairs[::every]]


HEAD = (
    "| fault | operations | what happened | torque: said; true | exit | s | last line |\n"
    "|---|---|---|---|---:|---:|---|"
)


def table(found: list[Row]) -> str:
    """A line for all operations in which the same came of a fault."""
    groups: dict[tuple, list[Row]] = {}
    for row in found:
        groups.setdefault(row.outcome, []).append(row)
    lines = [HEAD]
    for (name, happened, torque, exit, message), rows in groups.items():
        times = sorted({f"{row.seconds:.2f}" for row in rows if row.seconds is not None}, key=float)
        seconds = times[0] + f" to {times[-1]}" * (len(times) > 1) if times else ""
        operations = ", ".join(row.operation for row in rows)
        cells = (name, operations, happened, torque, exit, seconds, message)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    parser.add_argument("--only", default="", help="faults whose name has this word")
    args = parser.parse_args()
    found = rows(args.only)
    print(table(found))
    wrong = [row for row in found if bad(row)]
    said = Counter(row.said for row in found)
    print(
        f"\n{len(found)} faults by operation, {sum(row.exit != 0 for row in found)} ended it, "
        f"{len(wrong)} not as they should; torque: {dict(said)}",
        file=sys.stderr,
    )
    for row in found:
        if row.fastest > FASTER:
            about = f"{row.fault.name}, {row.operation}"
            print(f"{row.fastest:.1f} times its speed limit: {about}", file=sys.stderr)
    for row in wrong:
        print(f"not as it should: {row}", file=sys.stderr)
    if args.write:
        text = PAGE.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:begin]}\n{table(found)}\n{text[end:]}")
    return int(bool(wrong))


def bad(row: Row) -> bool:
    """Whether a row breaks the promise: a sentence, a status, a torque that is known and said truthfully, and no servo
    that runs faster than it may."""
    ended = row.exit != 0
    one = bool(re.fullmatch(r"(error: |watchdog: |the calibration of DATE ).+", row.message))
    nan_once = "NaN once" in row.fault.name  # goes on to its end, and is not remembered
    return (
        ended != (row.fault.stops or nan_once)
        or ended
        and not one
        or not row.honest
        or row.said == "?"
        or row.fastest > FASTER
        and not row.fault.by_hand
    )


if __name__ == "__main__":
    sys.exit(main())
