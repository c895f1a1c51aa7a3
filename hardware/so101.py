"""The SO-101 arm in radians: calibration, a start that does not move it, one read and one write a tick, a stop.

    arm = SO101(Bus(SerialTransport("/dev/ttyACM0")), Calibration.from_json("arm.json"), arm_limits(policy.spec))
    with arm:                      # whatever happens inside, leaving stops the arm
        arm.start()                # idle -> hold: torque on, where the arm stands
        state = arm.read()         # joints, currents, temperatures ...; raises ArmFault for what must not go on
        arm.write(target)          # six joint angles; hardware/governor.py makes them

What it promises, each with a test in tests/test_hardware_so101.py:
 1. `start` does not move the arm, whatever torque and goals the servos power up with: torque off, read back; ids,
    models and settings compared; goals set to where the joints are, read back; weak torque on, read back; joints
    compared once more; only then full torque. Where anything is not as it should be, torque is off again.
 2. Registers that are kept without power, and wear out, are written only where they differ.
 3. A tick costs one sync read of 31 bytes a joint, and one sync write of 7, in which acceleration and speed limits of
    the servo itself stand beside each goal: a second wall behind the governor's.
 4. `stop` lets go of every motor and reads it back, also where some are silent, faulty or gone. It never raises, and
    from then on not one byte goes to a goal register, because a goal switches torque on again.
 5. Each read also reads back what a servo forgets when it restarts: torque, goal, speed, torque limit. A servo that
    restarted is a fault at the next tick, and until then too weak to run faster than its speed limit was.
 6. Error bits, heat, supply voltage, a blocked joint, a jump of a reading, an angle next to the encoder's end, and
    readings that stay away raise ArmFault with a sentence. A fault latches: `write` refuses from then on.
 7. A joint that presses on something, works too hard or gets hot is weakened before it is switched off
    (`governor.spare_motors`).

Angles in radians, except where a name says raw: steps of the encoder, 4096 a turn. Not yet tried on a real servo: the
thresholds below are starting points.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hardware import feetech as ft
from hardware import governor, torque
from hardware.feetech import REGISTERS, STEPS, Bus, BusError, decode, encode
from hardware.governor import Effort, Limits

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
GRIPPER = JOINTS.index("gripper")
# The jaw's lever is not 1 : 1: degrees of the servo, from the middle of its range, and degrees of the simulated joint.
GRIPPER_SERVO, GRIPPER_JOINT = (-62.5, 64.62), (-10.0, 120.0)
JAW_SHORT = 4.0  # degrees that its range may lack at one end without a word
WRAP = 114  # raw; 10 degrees: goals keep this distance from the encoder's ends, where a reading jumps by a whole turn

# What the arm itself allows, whatever a file says: radians, seconds. The limits of SO-ARM100's model, the jaw's of ours
ARM_LOW = np.array([-1.92, -1.7454, -1.6901, -1.6582, -2.7439, -0.1746])
ARM_HIGH = np.array([1.92, 1.7454, 1.6901, 1.6582, 2.8413, 2.0945])
ARM_VELOCITY, ARM_ACCELERATION, ARM_TRACKING, ARM_MARGIN = 2.5, 125.0, 1.0, 0.5

# Shares of the stall torque. A run's limit is below the servo's own overload threshold (80 %, of the jaw 25 % for 2 s),
# which would let go on its own.
START_TORQUE, JAW_HOLD_TORQUE = 0.4, 0.24
RUN_TORQUE = np.array([0.7, 0.7, 0.7, 0.7, 0.7, 0.5])
# A joint that presses on something
HOLD_TORQUE = np.array([START_TORQUE] * 5 + [JAW_HOLD_TORQUE])
# A servo that restarts has forgotten its speed limit, and may have torque and an old goal. What it powers up with is
# weaker than anything that is sent, which gives it away, and too weak for more than POWER_UP_SPEED: a motor with a
# share of its duty reaches that share of its speed without load (4.8 rad/s).
POWER_UP_TORQUE = np.array([300, 300, 300, 300, 300, 230])  # per mille
POWER_UP_SPEED = 1.5  # rad/s; the wall of a policy that moves at 1 rad/s

# Kept without power; but for max_torque lerobot's, so that using both programs wears out nothing. A function: of the
# old value
SETTINGS: dict[str, int | Callable[[int], int]] = {
    "return_delay": 0, "response_level": 1, "mode": 0, "p": 16, "i": 0, "d": 32, "max_torque": int(POWER_UP_TORQUE[0]),
    "phase": lambda old: old & ~0x10,  # positions within one turn
    "unload_mask": lambda old: old | 0x2C,  # the servo's own protections: heat, current, overload
}  # fmt: skip
GRIPPER_SETTINGS = {
    "max_torque": int(POWER_UP_TORQUE[GRIPPER]),
    "protection_current": 250,
    "overload_torque": 25,
}
CALIBRATED = ("homing_offset", "min_position", "max_position")

WALL_SPEED, WALL_ACCELERATION = 1.5, 4.0  # times the governor's: what the servo itself keeps to
HOT_START, WARM, HOT = 50.0, 60.0, 65.0  # degrees Celsius: no start; a warning; a fault
STALL_TIME = 1.0  # s that a joint may stand away from its goal; the jaw may for ever
LOW_VOLTAGE, SAGGING = (
    0.55,
    0.5,
)  # share of the servo's highest voltage; s that it may be out of range
JUMP_FACTOR, JUMP_SLACK = 4.0, 0.05  # a reading may move by so many times the speed limit, plus rad
MISSES, MISS_SHARE, MISS_WINDOW = 3, 0.05, 5.0  # incomplete reads in a row, or a share of s
UNTAKEN = 3  # reads in a row in which a servo has not taken what was sent
STILL, MOVED = 0.05, 0.05  # rad/s and rad: what counts as not moving during the start
OUTSIDE = 12  # raw; 1 degree: how far outside its recorded range a joint may stand at the start
BUDGET = 0.8  # of a control period, for a read with its retries
SLOW_ADAPTER = 0.006  # s for an answer, above which an adapter's latency timer is at fault

# Torque, goal, speed and torque limit; then position, speed, load, voltage, temperature, ..., current
FIRST = REGISTERS["torque_enable"][0]
COUNT = sum(REGISTERS["present_current"]) - FIRST
MEASURED = ("position", "speed", "load", "current", "temperature", "voltage")
VOLATILE = ("torque_enable", "acceleration", "goal_position", "goal_speed", "torque_limit")


class ArmFault(Exception):
    """The arm must stop; one sentence. kind: start, bus, error, heat, voltage, stall, restart, jump, wrap, stopped.
    joints: whose."""

    def __init__(self, message: str, kind: str, joints: Iterable[str] = ()):
        super().__init__(message)
        self.kind, self.joints = kind, tuple(joints)


# --- Calibration ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class JointCalibration:
    """One joint, in lerobot's words. present = encoder - homing_offset; the ranges are of present positions."""

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int


@dataclass(frozen=True)
class Calibration:
    """Where the joints' angles are zero, and how far they go. Raises ValueError where that cannot be.

    As in lerobot's degrees, an angle is zero in the middle of the range that was recorded, and a turn has 4095 steps:
    angle = (raw - (range_min + range_max) / 2) 360 / 4095 degrees. That is the zero of the simulated joints as well,
    but for the gripper, whose two scales meet at GRIPPER_SERVO and GRIPPER_JOINT.
    """

    joints: dict[str, JointCalibration]

    def __post_init__(self):
        if tuple(self.joints) != JOINTS:
            raise ValueError(
                f"calibration: the joints must be {', '.join(JOINTS)}, not {', '.join(self.joints)}"
            )
        ids = [joint.id for joint in self.joints.values()]
        for name, joint in self.joints.items():
            values = asdict(joint)
            if any(type(value) is not int for value in values.values()):
                raise ValueError(f"calibration: {name} must have whole numbers, not {values}")
            if not 0 <= joint.id <= 253 or ids.count(joint.id) > 1:
                raise ValueError(
                    f"calibration: {name} has id {joint.id}; ids are 0 to 253, each once"
                )
            if joint.drive_mode:
                raise ValueError(
                    f"calibration: {name} has drive_mode {joint.drive_mode}; an SO-101 has only 0"
                )
            if (
                abs(joint.homing_offset) > 2047
                or not 0 <= joint.range_min < joint.range_max < STEPS
            ):
                raise ValueError(f"calibration: {name} is out of range ({values}): calibrate again")
            if min(joint.range_max, STEPS - 1 - WRAP) - max(joint.range_min, WRAP) < WRAP:
                raise ValueError(
                    f"calibration: {name} can move by less than 10 degrees ({values}): calibrate again"
                )
        half = np.array([joint.range_min + joint.range_max for joint in self.joints.values()]) / 2
        slope = np.full(len(JOINTS), math.radians(360 / (STEPS - 1)))  # radians a step
        (first, last), (closed, open_) = GRIPPER_SERVO, GRIPPER_JOINT
        half[GRIPPER] += (first - closed * (last - first) / (open_ - closed)) * (STEPS - 1) / 360
        slope[GRIPPER] *= (open_ - closed) / (last - first)
        low = np.array([max(joint.range_min, WRAP) for joint in self.joints.values()])
        high = np.array([min(joint.range_max, STEPS - 1 - WRAP) for joint in self.joints.values()])
        for key, value in dict(ids=tuple(ids), zero=half, slope=slope, low=low, high=high).items():
            object.__setattr__(self, key, value)  # zero, low and high are raw, (6,)

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, int]]) -> "Calibration":
        """From {joint: {"id": ..., "drive_mode": ..., ...}}, in any order of the joints."""
        fields = set(JointCalibration.__dataclass_fields__)
        if set(content) != set(JOINTS):
            raise ValueError(
                f"calibration: the joints must be {', '.join(JOINTS)}, not {', '.join(map(str, content))}"
            )
        for name, joint in content.items():
            if not isinstance(joint, Mapping) or set(joint) != fields:
                raise ValueError(
                    f"calibration: {name} must have exactly {', '.join(sorted(fields))}"
                )
        return cls({name: JointCalibration(**content[name]) for name in JOINTS})

    @classmethod
    def from_json(cls, path: str | Path) -> "Calibration":
        """Reads lerobot's file. Raises ValueError or FileNotFoundError in one line."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no calibration {path}: make one with hardware/calibrate.py"
            )
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError):
            raise ValueError(f"{path} is no calibration: it is not JSON") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no calibration: it has no joints")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path: str | Path) -> None:
        """Writes lerobot's file, at once or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(
            json.dumps({name: asdict(joint) for name, joint in self.joints.items()}, indent=4)
        )
        os.replace(temporary, path)

    @property
    def hash(self) -> str:
        """Tells one calibration from another: 16 hexadecimal digits."""
        content = json.dumps(
            {name: asdict(joint) for name, joint in self.joints.items()}, sort_keys=True
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def eeprom(self) -> dict[int, dict[str, int]]:
        """id -> register -> value, as the motors have to hold it."""
        return {joint.id: dict(homing_offset=joint.homing_offset, min_position=joint.range_min,
                               max_position=joint.range_max) for joint in self.joints.values()}  # fmt: skip

    def to_radians(self, joint: str, raw):
        """Angle of a joint whose present_position reads `raw` (a number or an array)."""
        at = JOINTS.index(joint)
        return (np.asarray(raw, float) - self.zero[at]) * self.slope[at]

    def to_raw(self, joint: str, radians):
        """The nearest present_position of an angle, limited to nothing. (lerobot rounds towards zero instead.)"""
        at = JOINTS.index(joint)
        return np.rint(self.zero[at] + np.asarray(radians, float) / self.slope[at]).astype(int)

    def angles(self, raw) -> np.ndarray:
        """All joints: raw (..., 6) -> radians (..., 6)."""
        return (np.asarray(raw, float) - self.zero) * self.slope

    def goals(self, radians) -> np.ndarray:
        """All joints: radians (..., 6) -> raw (..., 6) within the recorded ranges and clear of the encoder's ends."""
        raw = np.rint(self.zero + np.asarray(radians, float) / self.slope)
        return np.clip(raw, self.low, self.high).astype(int)


def arm_limits(spec: Mapping) -> Limits:
    """The limits of a policy's `spec`. Raises ValueError where they go beyond what the arm itself allows."""
    limits = Limits.from_spec(spec)
    if tuple(limits.joint_names) != JOINTS:
        raise ValueError(
            f"the limits are for {', '.join(limits.joint_names)}; the arm has {', '.join(JOINTS)}"
        )
    for name, values, allowed in (
        ("joint_low", -limits.low, -ARM_LOW),
        ("joint_high", limits.high, ARM_HIGH),
        ("velocity_limit", limits.velocity, ARM_VELOCITY),
        ("acceleration_limit", limits.acceleration, ARM_ACCELERATION),
        ("tracking_error", limits.tracking_error, ARM_TRACKING),
        ("joint_margin", np.full(len(JOINTS), limits.margin), ARM_MARGIN),
    ):
        over = values > np.broadcast_to(allowed, values.shape) + 1e-6
        if over.any():
            at = int(over.argmax())
            wrong, most = (
                abs(float(np.broadcast_to(v, values.shape)[at])) for v in (values, allowed)
            )
            raise ValueError(
                f"the policy's spec: {name} of {JOINTS[at]} is {wrong:g}; the arm allows {most:g}"
            )
    return limits


def reach(calibration: Calibration) -> list[str]:
    """What a person should know of the range that was recorded, compared with the model's joints."""
    said = []
    ends = np.degrees(calibration.angles([calibration.low, calibration.high]))[:, GRIPPER]
    ends = np.round(ends) + 0.0  # no -0
    closed, opened = GRIPPER_JOINT
    if ends[0] > closed + JAW_SHORT or ends[1] < opened - JAW_SHORT:
        said.append(
            f"the jaw goes from {ends[0]:.0f} to {ends[1]:.0f} degrees; the model's goes from {closed:.0f} to "
            f"{opened:.0f}: it cannot close or open as far as a policy asks. Calibrate again, from stop to stop"
        )
    return said


# --- Registers that are kept ------------------------------------------------------------------------------------------
def read_eeprom(bus: Bus, ids: Iterable[int]) -> dict[int, dict[str, int]]:
    """id -> register -> value of everything that a servo keeps without power. Raises BusError."""
    kept = [name for name, (address, _) in REGISTERS.items() if address < ft.EEPROM_END]
    blocks = {id: bus.read(id, 0, ft.EEPROM_END).data for id in ids}
    return {id: {name: decode(name, data, 0) for name in kept} for id, data in blocks.items()}


def differences(
    have: Mapping[int, Mapping], wanted: Mapping[int, Mapping]
) -> list[tuple[int, str, int, int]]:
    """(id, register, value there, value wanted) wherever they are not the same."""
    found = []
    for id, registers in wanted.items():
        for name, value in registers.items():
            value = value(have[id][name]) if callable(value) else value
            found += [(id, name, have[id][name], value)] * (have[id][name] != value)
    return found


UNDONE = "all servos have their old values"


def write_eeprom(
    bus: Bus,
    wanted: Mapping[int, Mapping],
    sleep: Callable[[float], None] = time.sleep,
    later: str = "the next start writes them all",
) -> list:
    """Writes what differs, all of it or nothing; returns the differences there were. Torque must be off.

    Nobody confirms these writes (a servo may be set not to), so they are read back. Raises BusError if one has failed.
    Whatever interrupts it, Ctrl-C too, the old values are written back, and the error says which servos have what;
    later: what becomes of servos for which that fails.
    """
    have = read_eeprom(bus, wanted)
    changes = differences(have, wanted)
    if not changes:
        return changes
    try:
        _burn(bus, changes, sleep)
        left = differences(read_eeprom(bus, wanted), wanted)
        if left:
            id, name, there, value = left[0]
            raise BusError(
                f"servo {id} does not keep {name} = {value}: it still has {there}", [id], "status"
            )
    except BaseException as error:
        error.add_note(undo(bus, changes, sleep, later))
        raise
    return changes


def _burn(bus: Bus, changes: list, sleep: Callable[[float], None]) -> None:
    for id in dict.fromkeys(id for id, *_ in changes):
        bus.sync_write(REGISTERS["lock"][0], {id: b"\x00"})
        try:
            for _, name, _, value in (change for change in changes if change[0] == id):
                bus.sync_write(REGISTERS[name][0], {id: encode(name, value)})
                sleep(0.01)  # the servo is busy while it burns them in
        finally:
            bus.sync_write(REGISTERS["lock"][0], {id: b"\x01"})
            sleep(0.01)


def undo(bus: Bus, changes: list, sleep: Callable[[float], None], later: str) -> str:
    """Writes the old values back where they were changed, and says in a sentence what became of it. Never raises."""
    wanted, kept = {}, []
    for id, name, value, _ in changes:
        wanted.setdefault(id, {})[name] = value
    blind = {
        id: [(id, name, None, value) for name, value in old.items()] for id, old in wanted.items()
    }
    for _ in range(3):
        for id in [id for id in wanted if id not in kept]:
            try:
                _burn(bus, blind[id], sleep)  # also where no answer comes
                if not differences(read_eeprom(bus, [id]), {id: wanted[id]}):
                    kept.append(id)
            except (Exception, KeyboardInterrupt):  # the next servo, and the next round
                pass
    if len(kept) == len(wanted):
        return UNDONE
    there = numbers(kept) if kept else "none"
    lost = numbers([id for id in wanted if id not in kept])
    return f"old values read back from {there}; {lost} may have new ones: {later}"


def numbers(ids: Iterable[int]) -> str:
    """servo 3; servos 1, 2"""
    ids = sorted(ids)
    return f"servo{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"


# --- What needs no calibration ----------------------------------------------------------------------------------------
def check_motors(bus: Bus, ids: Iterable[int]) -> dict[int, dict[str, int]]:
    """Makes sure that the six motors are there, each once, and of a known model. -> `read_eeprom`. Raises ArmFault."""
    absent, names = [], dict(zip(ids, JOINTS, strict=True))
    for id, name in names.items():
        try:
            bus.ping(id)
        except BusError as error:
            if error.kind != "timeout":
                raise
            absent.append(f"{name} (id {id})")
    if absent:
        raise ArmFault(f"no answer from {', '.join(absent)}: check power, cable and ids", "start")
    eeprom = read_eeprom(bus, names)
    for id, name in names.items():
        if (model := eeprom[id]["model"]) not in ft.MODELS:
            known = ", ".join(f"{text} ({number})" for number, text in ft.MODELS.items())
            raise ArmFault(
                f"{name} (id {id}) is a servo of model {model}; this driver knows {known}",
                "start",
                [name],
            )
    return eeprom


# --- The arm ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class State:
    """What one read tells, (6,) each. A joint that did not answer has its last values, and their age in seconds."""

    position: np.ndarray  # rad
    velocity: np.ndarray  # rad/s
    load: np.ndarray  # share of the stall torque, by duty
    current: np.ndarray  # A
    temperature: np.ndarray  # degrees Celsius
    voltage: np.ndarray  # V
    errors: np.ndarray  # bits of feetech.ERROR_BITS
    time: float  # of the clock: no value is older, but those with an age
    raw: np.ndarray  # present_position as read
    age: np.ndarray  # s; 0: this read's own


class SO101:
    """See the docstring of the module. state: "idle", "hold" (started), or "stopped", which is final."""

    def __init__(
        self,
        bus: Bus,
        calibration: Calibration,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        period: float = 0.1,
    ):
        """period: seconds between two reads of a run; what a read with its retries may take follows from it."""
        self.bus, self.calibration, self.limits = bus, calibration, limits
        self.clock, self.sleep, self.period = clock, sleep, period
        if tuple(limits.joint_names) != JOINTS:
            raise ValueError(
                f"the limits are for {', '.join(limits.joint_names)}; the arm has {', '.join(JOINTS)}"
            )
        self.ids, self.state = calibration.ids, "idle"
        self.fault: ArmFault | None = None
        self.warnings: list[str] = []  # what a person should know but nothing stops for; each once
        self.changed: list[tuple[int, str, int, int]] = []  # settings that `start` had to write
        self.firmware: dict[str, str] = {}
        self.last: State | None = None
        self.goal: np.ndarray | None = None  # rad, as sent
        self.torque = dict.fromkeys(JOINTS, "unknown")  # what `stop` has found: off, on or silent
        self.outcome: torque.Outcome | None = None  # the same, by id
        self.effort = Effort.none(len(JOINTS))  # how hard the motors have worked
        self.most = np.full(
            len(JOINTS), START_TORQUE
        )  # of the stall torque, that they may ever use
        self.shares = self.most  # and now
        self.sent: dict[str, np.ndarray] = {}  # what every servo must hold: raw, (6,) each
        self.untaken = np.zeros(len(JOINTS), int)  # reads in a row in which it did not
        self.supply = np.tile([[0.0], [np.inf]], len(JOINTS))  # V, lowest and highest
        self.sagged = np.full(len(JOINTS), np.inf)  # since when it is outside
        self._reads: deque[tuple[float, bool]] = deque()  # (time, whether a joint was missing)
        self._misses = 0
        # The second wall, in the servo's units. 0 would mean none: at least 1
        speed = WALL_SPEED * limits.velocity / calibration.slope
        acceleration = WALL_ACCELERATION * limits.acceleration / calibration.slope / 100
        self.wall_speed = np.clip(np.ceil(speed), 1, 32767).astype(int)
        self.wall_acceleration = np.clip(np.ceil(acceleration), 1, 254).astype(int)

    def __enter__(self) -> "SO101":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @contextlib.contextmanager
    def _latching(self):
        """Whatever the bus raises becomes an ArmFault, and the first fault is remembered: no goal is sent after it."""
        try:
            yield
        except (BusError, ArmFault) as error:
            if isinstance(error, BusError):
                names = dict(zip(self.ids, JOINTS, strict=True))
                joints = [names[id] for id in error.ids if id in names]
                kind = "stopped" if error.kind == "stopped" else "bus"
                text = "; ".join([str(error), *getattr(error, "__notes__", ())])
                error = ArmFault(text, kind, joints)
            self.fault = self.fault or error
            raise error from None

    # Starting
    def start(self) -> State:
        """idle -> hold. Raises ArmFault, torque off, if anything is not as it should be: then make a new SO101."""
        if self.state != "idle":
            raise ArmFault(f"the arm cannot start: it is {self.state}; make a new SO101", "start")
        try:
            with self._latching():
                self.bus.broadcast_torque_off()  # before anything is asked
                self._check_adapter()
                found = torque.torque_off(self.bus, self.ids, self.sleep)
                if found.on:
                    raise ArmFault(f"torque does not go off: {found.sentence(self.names)}", "start")
                self.identify()
                wanted = {id: SETTINGS for id in self.ids}
                wanted[self.ids[GRIPPER]] = SETTINGS | GRIPPER_SETTINGS
                self.changed = write_eeprom(self.bus, wanted, self.sleep)
                return self._take_hold()
        except BaseException:
            self.stop()
            raise

    @property
    def names(self) -> dict[int, str]:
        """id -> joint."""
        return dict(zip(self.ids, JOINTS, strict=True))

    def _check_adapter(self) -> None:
        """Raises ArmFault where the adapter keeps answers back for longer than a tick can wait."""
        times = (self.bus.round_trip(id) for id in self.ids)
        seconds = next((time for time in times if time is not None), 0.0)
        if seconds < SLOW_ADAPTER:
            return
        path = str(getattr(self.bus.transport, "port", ""))
        port = path.rsplit("/", 1)[-1] if "/" in path else "ttyUSB0"
        text = (
            f"an answer takes {1000 * seconds:.0f} ms: the adapter collects bytes before it hands them over. Set its "
            f"latency timer to 1 ms: echo 1 | sudo tee /sys/bus/usb-serial/devices/{port}/latency_timer"
        )
        if seconds > BUDGET * self.period / (1 + self.bus.retries):
            raise ArmFault(f"{text} (too slow for {1 / self.period:.0f} Hz)", "start")
        self.bus.timeout = max(self.bus.timeout, 3 * seconds)
        self._warn(text)

    def identify(self) -> None:
        """Compares ids, models and calibration with what the motors hold. Reads only. Raises ArmFault."""
        with self._latching():
            eeprom = check_motors(self.bus, self.ids)
            for name, id in zip(JOINTS, self.ids, strict=True):
                self.firmware[name] = "{}.{}".format(*eeprom[id]["firmware"].to_bytes(2, "little"))
            if len(set(self.firmware.values())) > 1:
                self._warn(f"the motors differ in firmware: {self.firmware}")
            if other := differences(eeprom, self.calibration.eeprom()):
                id, register, have, wanted = other[0]
                name = self.names[id]
                text = f"{name} holds {register} = {have}, the calibration says {wanted} ({len(other)} values differ)"
                raise ArmFault(f"{text}: another arm's file? hardware/calibrate.py --write puts a file into the motors",
                               "start", [name])  # fmt: skip
            highest = np.array([eeprom[id]["max_voltage"] for id in self.ids]) / 10
            lowest = np.array([eeprom[id]["min_voltage"] for id in self.ids]) / 10
            self.supply = np.array([np.maximum(lowest + 0.5, LOW_VOLTAGE * highest), highest])
            for remark in reach(self.calibration):
                self._warn(remark)
            ends = self.calibration.angles([self.calibration.low, self.calibration.high])
            missing = np.maximum(ends[0] - self.limits.low, self.limits.high - ends[1])
            missing -= self.limits.margin
            for at in np.flatnonzero(missing > math.radians(5)):
                self._warn(f"{JOINTS[at]}: the policy may go {math.degrees(missing[at]):.0f} degrees farther than the "
                           "range that was recorded; such goals are cut off")  # fmt: skip

    def _take_hold(self) -> State:
        self._torque_limits(self.most)
        self._compare("torque_limit", self.sent["torque_limit"], "its torque limit")
        state = self.read()
        self._all_answer(state)
        low, high = self.calibration.low, self.calibration.high
        for at, name in enumerate(JOINTS):
            if not low[at] - OUTSIDE <= state.raw[at] <= high[at] + OUTSIDE:
                text = f"{name} stands at {state.raw[at]}, outside of {low[at]} to {high[at]}, where goals may be"
                raise ArmFault(
                    f"{text}: move it inside by hand, or calibrate again", "start", [name]
                )
            if state.temperature[at] >= HOT_START:
                text = f"{name} has {state.temperature[at]:.0f} degrees: let it cool below {HOT_START:.0f}"
                raise ArmFault(text, "heat", [name])
            if not self.supply[0, at] <= state.voltage[at] <= self.supply[1, at]:
                raise self._wrong_supply(state, at)
            if abs(state.velocity[at]) > STILL:
                raise ArmFault(
                    f"{name} is moving: hold the arm still until it has taken hold", "start", [name]
                )
        # A goal switches torque on, so from here on the arm holds, weakly, where it is.
        raw = np.clip(state.raw, low, high)
        self._send(raw)
        self._compare("goal_position", raw, "its goal")
        for id in self.ids:
            self.bus.write(id, REGISTERS["torque_enable"][0], b"\x01")
        self.sleep(0.1)
        self._compare("torque_enable", np.ones(len(JOINTS), int), "torque")
        self.sent["torque_enable"] = np.ones(len(JOINTS), int)
        self.state = "hold"
        after = self.read()
        self._all_answer(after)
        moved = np.abs(after.position - state.position)
        if (most := moved.max()) > MOVED:
            name = JOINTS[int(moved.argmax())]
            text = f"{name} moved by {math.degrees(most):.1f} degrees when torque came on"
            raise ArmFault(
                f"{text}: support the arm, and check its load and calibration", "start", [name]
            )
        self.most = RUN_TORQUE
        self._torque_limits(RUN_TORQUE)
        return after

    def _compare(self, register: str, wanted: np.ndarray, what: str) -> None:
        """Raises ArmFault unless all servos answer that `register` has the value wanted."""
        answers = self.bus.sync_read(self.ids, *REGISTERS[register])
        for name, id, value in zip(JOINTS, self.ids, wanted, strict=True):
            if id not in answers:
                raise ArmFault(f"{name} (id {id}) does not answer during the start", "bus", [name])
            if (have := decode(register, answers[id].data)) != value:
                text = (
                    f"{name} (id {id}) has not taken {what}: {register} reads {have}, not {value}"
                )
                raise ArmFault(text, "start", [name])

    def _all_answer(self, state: State) -> None:
        if absent := [name for name, age in zip(JOINTS, state.age, strict=True) if age > 0]:
            raise ArmFault(f"no answer from {', '.join(absent)} during the start", "bus", absent)

    # One tick
    def read(self) -> State:
        """One sync read. Raises ArmFault for what must not go on."""
        with self._latching():
            answers = self.bus.sync_read(self.ids, FIRST, COUNT, BUDGET * self.period)
            before = self.last
            now = min((status.time for status in answers.values()), default=self.clock())
            absent = np.array([id not in answers for id in self.ids])
            self._count_miss(now, absent)
            if absent.any() and before is None:
                names = [name for name, missing in zip(JOINTS, absent, strict=True) if missing]
                raise ArmFault(
                    f"no answer from {', '.join(names)}: check power and cable", "bus", names
                )
            measured = self._values(answers, [f"present_{name}" for name in MEASURED])
            raw, speed, load, current, temperature, voltage = measured
            errors = np.array([answers[id].error if id in answers else 0 for id in self.ids])
            fields = dict(
                position=self.calibration.angles(raw),
                velocity=speed * self.calibration.slope,
                load=load / 1000,
                current=current * ft.CURRENT_UNIT,
                temperature=temperature.astype(float),
                voltage=voltage / 10,
                errors=errors,
                raw=raw,
            )
            age = np.zeros(len(JOINTS))
            if absent.any():  # the last values, and how old they are
                for name, values in fields.items():
                    fields[name] = np.where(absent, getattr(before, name), values)
                age = np.where(absent, before.age + now - before.time, 0.0)
            state = self.last = State(**fields, time=now, age=age)
            self._check(state, before)
            if self.state == "hold":
                self._check_memory(answers)
                self._spare(state, before)
            return state

    def _values(self, answers: Mapping, registers: Iterable[str]) -> np.ndarray:
        """(registers, 6) of a tick's answers; 0 where a servo is missing."""
        values = np.zeros((len(registers), len(JOINTS)), int)
        for at, id in enumerate(self.ids):
            if id in answers:
                values[:, at] = [decode(name, answers[id].data, FIRST) for name in registers]
        return values

    def write(self, target) -> None:
        """Sends six goals, radians, with the servos' own speed and acceleration limits. Raises ArmFault."""
        if self.fault is not None:
            raise self.fault
        if self.state != "hold":
            raise ArmFault(f"no goal can be sent: the arm is {self.state}", "stopped")
        with self._latching():
            target = np.asarray(target, np.float64)
            if target.shape != (len(JOINTS),) or not np.isfinite(target).all():
                raise ArmFault(
                    f"a goal must be six finite angles, not {target.tolist()}", "stopped"
                )
            self._send(self.calibration.goals(target))

    def _send(self, raw: np.ndarray) -> None:
        """Acceleration, goal, time 0 and speed: 7 bytes a joint. The only place that addresses goals."""
        if self.state == "stopped":
            raise ArmFault("no goal can be sent: the arm is stopped", "stopped")
        rows = zip(self.ids, self.wall_acceleration, raw, self.wall_speed, strict=True)
        values = {id: struct.pack("<BHHH", a, goal, 0, speed) for id, a, goal, speed in rows}
        self.bus.sync_write(REGISTERS["acceleration"][0], values)
        self.goal = self.calibration.angles(raw)
        self.sent |= dict(
            acceleration=self.wall_acceleration, goal_position=raw, goal_speed=self.wall_speed
        )

    # Watching
    def _check(self, state: State, before: State | None) -> None:
        for at, name in enumerate(JOINTS):
            if state.errors[at]:
                text = f"{name} reports: {ft.describe_errors(int(state.errors[at]))}"
                raise ArmFault(
                    f"{text}; once its cause is gone, take its power away for a moment",
                    "error",
                    [name],
                )
            if state.temperature[at] >= HOT:
                raise ArmFault(
                    f"{name} has {state.temperature[at]:.0f} degrees: too hot", "heat", [name]
                )
            if state.temperature[at] >= WARM:
                self._warn(f"{name} is getting hot: {WARM:.0f} degrees; it stops at {HOT:.0f}")
        if self.state != "hold":  # without torque it may be turned by hand
            return
        outside = (state.voltage < self.supply[0]) | (state.voltage > self.supply[1])
        self.sagged = np.where(outside, np.minimum(self.sagged, state.time), np.inf)
        if (state.time - self.sagged > SAGGING).any():
            raise self._wrong_supply(state, int(np.argmin(self.sagged)))
        raw = np.where(state.age > 0, STEPS // 2, state.raw)
        if (at := np.flatnonzero((raw < WRAP // 2) | (raw > STEPS - 1 - WRAP // 2))).size:
            name = JOINTS[at[0]]
            text = f"{name} reads {raw[at[0]]}, next to the encoder's end, where a reading jumps by a turn"
            raise ArmFault(
                f"{text}: turn it back by hand, or calibrate again with the horn moved",
                "wrap",
                [name],
            )
        if before is not None:
            dt = np.maximum(state.time - before.time + before.age, 0.0)
            most = JUMP_FACTOR * self.limits.velocity * dt + JUMP_SLACK
            jump = np.where(state.age > 0, 0.0, np.abs(state.position - before.position))
            if (jump > most).any():
                at = int((jump / most).argmax())
                text = f"{JOINTS[at]} jumped by {math.degrees(jump[at]):.0f} degrees within {dt[at]:.2f} s"
                raise ArmFault(
                    f"{text}: pushed, or a broken encoder or cable?", "jump", [JOINTS[at]]
                )

    def _wrong_supply(self, state: State, at: int) -> ArmFault:
        low, high = self.supply[:, at]
        text = f"{JOINTS[at]} has {state.voltage[at]:.1f} V, outside of {low:.1f} to {high:.1f} V"
        return ArmFault(f"{text}: the wrong supply, or too weak a one?", "voltage", [JOINTS[at]])

    def _check_memory(self, answers: Mapping) -> None:
        """What a servo forgets when it restarts: raises ArmFault if one has, or does not take what is sent."""
        have = dict(zip(VOLATILE, self._values(answers, VOLATILE), strict=True))
        there = np.array([id in answers for id in self.ids])
        shares = have["torque_limit"] / 1000  # what no program but this one sends
        lost = (shares < HOLD_TORQUE) | (shares > np.maximum(RUN_TORQUE, START_TORQUE))
        for name in ("torque_enable", "acceleration", "goal_speed"):  # the same at every tick
            lost |= have[name] != self.sent[name]
        if (lost & there).any():
            name = JOINTS[int((lost & there).argmax())]
            text = f"{name} has forgotten what it was told: it has restarted, or another program writes to it"
            raise ArmFault(f"{text}. Check its cable and the supply", "restart", [name])
        other = have["goal_position"] != self.sent["goal_position"]
        weaker = have["torque_limit"] != self.sent["torque_limit"]
        if (weaker & there).any():
            self._torque_limits(self.shares)  # once more: nobody confirms a write
        self.untaken = np.where((other | weaker) & there, self.untaken + 1, 0)
        if (self.untaken >= UNTAKEN).any():
            name = JOINTS[int(self.untaken.argmax())]
            text = f"{name} does not take what it is sent, {UNTAKEN} times in a row"
            raise ArmFault(f"{text}: check its cable", "bus", [name])

    def _spare(self, state: State, before: State | None) -> None:
        """Weakens joints that press, work hard or get hot; raises ArmFault if one but the jaw presses for too long."""
        dt = min(max(state.time - before.time, 0.0), 1.0) if before is not None else 0.0
        error = np.where(state.age > 0, 0.0, np.abs(self.goal - state.position))
        self.effort, shares = governor.spare_motors(
            self.effort, state.current, state.temperature, error, state.velocity, dt, self.most,
            HOLD_TORQUE,
        )  # fmt: skip
        stalled = self.effort.pressing > STALL_TIME
        stalled[GRIPPER] = False  # it is there to meet resistance
        if stalled.any():
            at = int(stalled.argmax())
            text = f"{JOINTS[at]} is stalled: {state.current[at]:.1f} A, {math.degrees(error[at]):.0f} degrees from "
            raise ArmFault(f"{text}its goal: is something in the way?", "stall", [JOINTS[at]])
        if (shares != self.shares).any():
            self._torque_limits(shares)

    def _count_miss(self, now: float, absent: np.ndarray) -> None:
        """Raises ArmFault when readings stay away: three in a row, or too many of the last five seconds'."""
        missed = bool(absent.any())
        self._misses = self._misses + 1 if missed else 0
        self._reads.append((now, missed))
        while self._reads[0][0] < now - MISS_WINDOW:
            self._reads.popleft()
        count = sum(missed for _, missed in self._reads)
        if self._misses >= MISSES or count >= MISSES and count > MISS_SHARE * len(self._reads):
            names = [name for name, missing in zip(JOINTS, absent, strict=True) if missing]
            row = self._misses >= MISSES
            often = (
                f"{self._misses} times in a row" if row else f"{count} times of {len(self._reads)}"
            )
            text = f"no complete answer {often}, last not from {', '.join(names) or 'all'}: check power and cable"
            raise ArmFault(text, "bus", names)

    # Stopping
    def stop(self, gently: bool = False) -> dict[str, str]:
        """Torque off, read back. -> {joint: "off", "on" or "silent"}; never raises, may be called again at any time.

        gently: holds for a moment and sinks before it is let go (`torque.let_go`). silent: the command was sent, by
        broadcast and by id, but no answer came to say that it is obeyed.
        """
        gently = gently and self.state == "hold"
        self.state = "stopped"  # first of all: from here on no goal of a policy is sent
        way = torque.let_go if gently else torque.torque_off
        self.outcome = way(self.bus, self.ids, sleep=self.sleep)
        for state in ("off", "silent", "on"):
            for id in getattr(self.outcome, state):
                self.torque[self.names[id]] = state
        return self.torque

    # Small things
    def _torque_limits(self, shares: np.ndarray) -> None:
        raw = np.rint(1000 * np.asarray(shares)).astype(int)
        values = {
            id: encode("torque_limit", int(limit)) for id, limit in zip(self.ids, raw, strict=True)
        }
        self.bus.sync_write(REGISTERS["torque_limit"][0], values)
        self.shares, self.sent["torque_limit"] = np.array(shares), raw

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
