"""How late is everything? Steps the jaw of an SO-101 and waits for the encoder, and the camera, to notice.

    python hardware/latency.py --port /dev/ttyACM0 --calibration my_arm.json --camera 0 --checkpoint runs/NAME/best.pt
    python hardware/latency.py --emulate --camera-delay 0.1           tries it out: finds the delay that it was given

Without --camera only the bus is measured, without --checkpoint no policy. The camera has to see the jaw, as one at the
wrist does. The arm holds where it stands, and only the jaw moves, by 0.4 rad to and fro: keep it clear. Measured are:

    read, write              one sync read of all joints' states; handing over one sync write
    frame interval           from one frame of the camera to the next
    frame age                how long ago the newest frame had come in, when the control loop asks
    command to encoder       from the goal to the first movement that the encoder reports
    encoder to frame         from the moment when the jaw is half way to the arrival of the first frame that shows it
                             farther than that: the camera's delay, and up to one frame interval until the exposure
    picture, policy          cutting out and shrinking the frame; the network
    observation to command   a whole tick: read, newest frame, picture, policy, write

A frame shows the jaw past the middle when it is more like the picture after the step than like the one before; where
that is not exactly half way, it is as much too late in one direction as too early in the other, so look at the median.
The table is printed, and appended to a file of one JSON object a line.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.camera import Camera, CameraError, Frame, OpenCVSource
from hardware.deployment import Refused, check_policy
from hardware.feetech import Bus, BusError, SerialTransport
from hardware.governor import Limits
from hardware.policy import PolicyError, load_policy
from hardware.so101 import GRIPPER, JOINTS, SO101, ArmFault, Calibration

STEP = 0.4  # rad of the jaw
MOVING = 2  # raw steps of the encoder that count as a movement
SEEN, BLOCK = (
    2.0,
    16,
)  # of 255, besides noise: change of a block of so many pixels a side that counts as seen
WATCH = 1.5  # s after a step in which encoder and camera are watched
# Speeds of the simulated task, for a measurement without a policy; the jaw's joint limits keep a margin from its stops
SPEC = dict(joint_names=list(JOINTS), joint_low=[-3.0] * 5 + [0.0], joint_high=[3.0] * 5 + [1.6],
            action_scale=[0.1] * 5 + [0.2], control_hz=10.0)  # fmt: skip


@dataclass
class Args:
    port: str | None = None  # of the arm's adapter, such as /dev/ttyACM0
    calibration: str | None = (
        None  # the arm's calibration, lerobot's JSON: see hardware/calibrate.py
    )
    camera: str | None = None  # number or device of the camera; none: only the bus is measured
    checkpoint: str | None = (
        None  # policy whose time is measured: a checkpoint (.pt) or an export (.onnx, .npz)
    )
    repeats: int = 5  # steps of the jaw in each direction
    ticks: int = 100  # reads and writes
    out: str = "runs/hardware/latency.jsonl"  # file to which the result is appended
    emulate: bool = False  # emulated servos, and a camera that draws the jaw as a line
    camera_delay: float = 0.1  # s of the emulated camera

    def check(self) -> None:
        """Raises ValueError for choices that cannot work together."""
        for message, wrong in {
            "give --port, or --emulate": bool(self.port) == self.emulate,
            "--calibration is missing: make one with hardware/calibrate.py": self.port
            and not self.calibration,
            "--emulate brings its own camera and calibration": self.emulate
            and (self.camera or self.calibration),
            "--repeats and --ticks must be at least 1": min(self.repeats, self.ticks) < 1,
            "--checkpoint needs a camera": self.checkpoint and not (self.camera or self.emulate),
            "--camera-delay must be 0 to 1 s": not 0 <= self.camera_delay <= 1,
        }.items():
            if wrong:
                raise ValueError(message)


# --- Measurements -----------------------------------------------------------------------------------------------------
def blocks(rgb: np.ndarray) -> np.ndarray:
    """Mean brightness of blocks of BLOCK x BLOCK pixels: uint8 (H, W, 3) -> (H / BLOCK, W / BLOCK)."""
    h, w = (side // BLOCK * BLOCK for side in rgb.shape[:2])
    return (
        rgb[:h, :w].reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK * 3).mean((1, 3), dtype=np.float32)
    )


class Latency:
    """Measures an arm that has started, and its camera. beat: called all the time, for a watchdog."""

    def __init__(self, arm: SO101, camera, clock: Callable[[], float], sleep: Callable[[float], None],
                 beat: Callable[[], None] = lambda: None):  # fmt: skip
        self.arm, self.camera, self.clock, self.wait, self.beat = arm, camera, clock, sleep, beat
        self.target = arm.last.position.copy()  # where it holds
        self.samples: dict[str, list[float]] = {}  # name -> seconds
        self.unseen = 0  # steps that the camera did not notice

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def bus(self, ticks: int) -> None:
        """read, write."""
        for _ in range(ticks):
            self.beat()
            begin = self.clock()
            self.arm.read()
            middle = self.clock()
            self.arm.write(self.target)
            self.add("read", middle - begin)
            self.add("write", self.clock() - middle)
            self.wait(0.005)

    def frames(self, seconds: float = 2.0) -> None:
        """frame interval, frame age; and the noise of the resting picture."""
        end, last, rest = self.clock() + seconds, None, []
        while self.clock() < end:
            self.beat()
            frame = self.camera.latest()
            self.add("frame age", self.clock() - frame.time)
            if last is not None and frame.index != last.index:
                self.add("frame interval", (frame.time - last.time) / (frame.index - last.index))
            if last is None or frame.index != last.index:
                rest.append(blocks(frame.rgb))
            last = frame
            self.wait(0.003)
        self.noise = max((float(np.abs(a - rest[0]).max()) for a in rest), default=0.0)

    def step(self, radians: float) -> None:
        """command to encoder, encoder to frame."""
        raw, seen, last = (
            self.arm.read().raw[GRIPPER],
            [],
            self.camera.latest() if self.camera else None,
        )
        before = blocks(last.rgb) if last else None
        self.target[GRIPPER] += radians
        begin = self.clock()
        self.arm.write(self.target)
        times, path = [begin], [raw]
        while self.clock() < begin + WATCH:
            self.beat()
            state = self.arm.read()
            times.append(state.time), path.append(state.raw[GRIPPER])
            frame = self.camera.latest() if self.camera else None
            if frame and frame.index != last.index:
                seen.append((frame.time, blocks(frame.rgb)))
                last = frame
            self.wait(0.001)
        times, way = np.array(times), np.abs(np.array(path) - raw)
        half = abs(radians / self.arm.calibration.slope[GRIPPER]) / 2
        if way[-1] < half:
            raise ArmFault(
                "the jaw has not gone where it was sent: is something in its way?",
                "stall",
                ["gripper"],
            )
        self.add("command to encoder", times[way >= MOVING][0] - begin)
        after = int(
            np.argmax(way > half)
        )  # the middle lies between this reading and the one before
        middle = np.interp(half, way[after - 1 : after + 1], times[after - 1 : after + 1])
        if self.camera is None:
            return
        end = seen[-1][1] if seen else before
        if np.abs(end - before).max() <= 3 * self.noise + SEEN:
            self.unseen += 1
            return
        past = next(
            when for when, now in seen if np.abs(now - end).sum() < np.abs(now - before).sum()
        )
        self.add("encoder to frame", past - middle)

    def tick(self, policy, ticks: int = 50) -> None:
        """picture, policy, observation to command. What the policy says is not carried out."""
        policy.reset()
        for _ in range(ticks):
            self.beat()
            begin = self.clock()
            state, frame = self.arm.read(), self.camera.latest()
            thinking = time.perf_counter()  # computing takes real time, whatever the arm's clock
            rgb = np.concatenate([policy.preprocess(frame.rgb)] * len(policy.spec["cameras"]), -1)
            drawn = time.perf_counter()
            numbers = np.concatenate((state.position, self.target)).astype(np.float32)[None]
            policy.act({"rgb": rgb, "state": numbers})
            acted = time.perf_counter()
            if self.clock is not time.monotonic:
                self.wait(acted - thinking)
            self.arm.write(self.target)
            self.add("picture", drawn - thinking)
            self.add("policy", acted - drawn)
            self.add("observation to command", self.clock() - begin)
            self.wait(0.002)

    def table(self) -> list[dict]:
        """One row a quantity: milliseconds, median, 95 % and largest, and of how many."""
        rows = []
        for name, seconds in self.samples.items():
            ms = 1000 * np.array(seconds)
            rows.append(dict(what=name, median_ms=float(np.median(ms)), p95_ms=float(np.quantile(ms, 0.95)),
                             max_ms=float(ms.max()), n=len(ms)))  # fmt: skip
        return rows


def measure(
    arm: SO101,
    camera,
    clock,
    sleep,
    policy=None,
    repeats: int = 5,
    ticks: int = 100,
    beat=lambda: None,
):
    """Everything, on an arm that has started. -> Latency."""
    latency = Latency(arm, camera, clock, sleep, beat)
    latency.bus(ticks)
    if camera:
        latency.frames()
    low, high = arm.calibration.angles([arm.calibration.low, arm.calibration.high])[:, GRIPPER]
    towards = STEP if latency.target[GRIPPER] < (low + high) / 2 else -STEP  # where there is room
    for i in range(2 * repeats):
        sleep(i * 0.618 % 1 * 0.1)  # so that the steps fall anywhere between two frames
        latency.step(towards if i % 2 == 0 else -towards)
    if camera and policy:
        latency.tick(policy)
    return latency


# --- An arm that is not there -----------------------------------------------------------------------------------------
class DrawnCamera:
    """Exposes at `fps`, delivers `delay` later: the jaw of an emulated arm as a line that turns."""

    def __init__(self, servo, clock, delay: float, fps: float = 30.0):
        self.servo, self.clock, self.delay, self.fps = servo, clock, delay, fps
        self.past: list[tuple[float, float]] = []
        self.drawn: Frame | None = None

    def latest(self) -> Frame:
        """As of hardware.camera.Camera."""
        self.servo.options.advance()
        self.past.append((self.clock(), self.servo.position))
        index = math.floor((self.clock() - self.delay) * self.fps + 1e-9)
        if self.drawn is None or index != self.drawn.index:
            exposed = index / self.fps
            position = next(
                (p for when, p in reversed(self.past) if when <= exposed), self.past[0][1]
            )
            self.drawn = Frame(self._draw(position), exposed + self.delay, index)
        return self.drawn

    @staticmethod
    def _draw(position: float) -> np.ndarray:
        angle = position * 2 * math.pi / 4096
        across = np.abs(
            (np.arange(640) - 320) * math.sin(angle)
            - (np.arange(480) - 240)[:, None] * math.cos(angle)
        )
        return np.repeat(np.where(across < 12, 220, 60).astype(np.uint8)[..., None], 3, 2)


def emulated(camera_delay: float):
    """-> an emulated arm that has started, a camera that sees its jaw, their clock's two functions."""
    from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock

    clock = VirtualClock()
    servos = EmulatedBus(range(1, 7), clock)
    calibration = Calibration.from_dict({
        name: dict(id=id, drive_mode=0, homing_offset=0, range_min=1300, range_max=2800)
        for id, name in enumerate(JOINTS, start=1)
    })  # fmt: skip
    for id, registers in calibration.eeprom().items():
        for name, value in registers.items():
            servos.servos[id]._set(name, value, servos.servos[id].eeprom)
    servos.power_cycle()
    arm = SO101(
        Bus(EmulatedTransport(servos, clock), clock),
        calibration,
        Limits.from_spec(SPEC),
        clock,
        clock.sleep,
    )
    return arm, DrawnCamera(servos.servos[GRIPPER + 1], clock, camera_delay), clock, clock.sleep


# --- Command ----------------------------------------------------------------------------------------------------------
def main(args: Args) -> Latency:
    """Measures, prints and stores. Raises ValueError, OSError, ArmFault, BusError, CameraError or PolicyError."""
    args.check()
    policy = load_policy(args.checkpoint) if args.checkpoint else None
    if policy and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # as when deploying
    with contextlib.ExitStack() as stack:
        if args.emulate:
            arm, camera, clock, sleep = emulated(args.camera_delay)
            clock.sleep(1.0)  # so that the camera has frames to show
            name, beat = "emulated", lambda: None
        else:
            from hardware.watchdog import Watchdog

            calibration, clock, sleep = (
                Calibration.from_json(args.calibration),
                time.monotonic,
                time.sleep,
            )
            camera = None
            if args.camera:
                camera = Camera(OpenCVSource(args.camera, allow_auto=True), clock)
                stack.callback(camera.close)
                camera.wait()
            port = SerialTransport(args.port)
            stack.callback(port.close)
            dog = stack.enter_context(Watchdog(port, calibration.ids))
            limits = check_policy(policy) if policy else Limits.from_spec(SPEC)
            arm = SO101(Bus(dog.transport), calibration, limits, clock)
            arm.sleep = lambda seconds: (dog.beat(), sleep(seconds))
            name, beat = calibration.hash, dog.beat
        try:
            with arm:
                arm.start()
                latency = measure(arm, camera, clock, sleep, policy, args.repeats, args.ticks, beat)
        except BaseException as error:
            error.add_note(arm.outcome.sentence(arm.names))
            raise
    rows = latency.table()
    print(f"{'milliseconds':<24}{'median':>9}{'95 %':>9}{'largest':>9}{'of':>6}")
    for row in rows:
        numbers = "".join(f"{row[key]:>9.2f}" for key in ("median_ms", "p95_ms", "max_ms"))
        print(f"{row['what']:<24}{numbers}{row['n']:>6}")
    if latency.unseen:
        print(
            f"the camera did not see {latency.unseen} of {2 * args.repeats} steps: does it look at the jaw?"
        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(dict(time=time.strftime("%Y-%m-%d %H:%M:%S"), arm=name, port=args.port,
                                   camera=args.camera, checkpoint=args.checkpoint, rows=rows)) + "\n")  # fmt: skip
    return latency


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, OSError, ArmFault, BusError, CameraError, PolicyError, Refused) as error:
        print("; ".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # the policy's, or not foreseen
        text = f"error: {type(error).__name__}: {error}"
        print("; ".join([text, *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("; ".join(["\nstopped by Ctrl-C", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(130)
