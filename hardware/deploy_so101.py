"""Runs a trained policy on an SO-101 arm, or on the emulated one.

    python hardware/deploy_so101.py --checkpoint runs/NAME/best.pt --emulate          an arm that is not there, rendered
    python hardware/deploy_so101.py --checkpoint runs/NAME/best.pt --port /dev/ttyACM0 --camera 0 \\
        --calibration my_arm.json --dry-run                                           reads everything, moves nothing
    the same without --dry-run                                                        moves the arm
    python hardware/deploy_so101.py --checkpoint runs/NAME/best.pt --replay runs/hardware/NAME
                                                            a recording again: the commands must be the same, bit by bit

The checkpoint may be an export (.onnx, .npz: see hardware/export.py); then torch is not needed, and never a simulator.

States: idle (no torque) -> hold (goal = where it stands) -> move (to the start pose and back) -> run (the policy acts)
-> stop, which is final: a new start is a new command. A tick is read joints and newest frame -> policy -> governor ->
write, at the control rate of the checkpoint and with absolute deadlines. Every way out, an exception, Ctrl-C, SIGTERM
and SIGHUP included, ends with torque off, read back from the servos; after SIGKILL the watchdog's process does it.
Space, q or Esc stop the arm. The real emergency stop is the power switch: keep it within reach.

The first run of a policy on an arm asks before every step and moves at a quarter of the scale; `--step` and
`--scale` say otherwise. Everything is recorded: every tick in ticks.jsonl, a video, the settings in run.json.
Exit status: 0 done, 1 a fault (torque is off unless the last line says else), 2 refused before anything moved, 130 and
143 stopped by Ctrl-C or SIGTERM.
"""
# ruff: noqa: E402  (the lines down to the imports must run before them)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("hardware") is None:
    # `make` installs the project in .venv; going on in there lets `python hardware/deploy_so101.py` work as typed.
    if Path(sys.prefix).resolve() == VENV or not (VENV / "bin/python").exists():
        sys.exit(f"cleanrobot is not installed for {sys.executable}: run `make setup` (or `pip install -e .`) first")
    os.execv(VENV / "bin/python", [VENV / "bin/python", *sys.argv])

import base64
import contextlib
import dataclasses
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from hardware.camera import Camera, CameraError, FileSource, OpenCVSource, aligned_cameras
from hardware.feetech import Bus, BusError, SerialTransport
from hardware.governor import Limits, govern
from hardware.policy import PolicyError, load_policy
from hardware.so101 import JOINTS, SO101, ArmFault, Calibration, State

MOVE_SPEED = 0.5  # rad/s, the fastest joint on the way to the start pose and back
REACHED = 0.15  # rad from the start pose at which the arm counts as being there: gravity makes it hang a little
FIRST_SCALE = 0.25  # of every action, in the first run of a policy on an arm
LATE_TICKS = 3  # so many ticks in a row, each late by more than a period, stop the arm
BUS_TIMEOUT, HEARTBEAT = 0.01, 0.25  # s: for a servo's answer; for the watchdog to wait for a sign of life
FASTEST = 2.5  # rad/s that a policy may ask of a joint; the servos end at about 4.7
SEEN = Path("runs/hardware/seen.json")  # (policy, arm) pairs that have run without a fault
SEMANTICS = "target += action * action_scale"
LAYOUT = ["joint_position"] * 6 + ["joint_target"] * 6
NEXT = {"idle": ("hold", "stop"), "hold": ("move", "run", "stop"), "move": ("hold", "stop"), "run": ("hold", "stop"),
        "stop": ()}  # fmt: skip


class Refused(Exception):
    """Something does not fit, and nothing has moved; one sentence."""


class Fault(Exception):
    """The arm had to be stopped; one sentence."""


class Interrupted(Exception):
    """The operator or the system asked to stop; `status` is what to exit with."""

    def __init__(self, message: str, status: int = 130):
        super().__init__(message)
        self.status = status


@dataclass
class Args:
    checkpoint: str  # the policy: a checkpoint (.pt) or an export (.onnx, .npz)
    port: str | None = None  # of the arm's adapter, such as /dev/ttyACM0
    calibration: str | None = None  # the arm's calibration, lerobot's JSON: see hardware/calibrate.py
    camera: tuple[str, ...] = ()  # number, device, picture or video; several as name=device
    episodes: int = 1  # runs, each from the start pose
    steps: int | None = None  # ticks of an episode; None: as in training
    scale: float | None = None  # factor on every action, up to 1; None: 0.25 in the first run, then 1
    step: Literal["auto", "yes", "no"] = "auto"  # ask before every tick; auto: in the first run
    dry_run: bool = False  # no torque and no goal: only say what would be commanded
    record: str | None = None  # folder of the recording; None: a new one in runs/hardware
    replay: str | None = None  # a recording: feed it to the policy again and compare the commands
    hold: bool = False  # go to the start pose and stay until stopped, the policy does not act: to align the camera
    allow_auto: bool = False  # accept a camera that does not lock its exposure or white balance
    max_frame_age: float = 0.2  # s; an older frame stops the arm
    keyboard: bool = True  # stop on space, q, Esc, and when the terminal goes away

    emulate: bool = False  # the emulated arm in place of port and camera
    latency_periods: int = 0  # control periods between an observation and its command; to try out delays
    camera_delay: float = 0.0  # s that emulated pictures are late
    seed: int = 10_000  # of the emulated episodes
    randomize: bool = True  # emulated episodes vary as in training; off: all in the middle of their ranges
    frame_size: int = 240  # pixels a side that the emulated camera draws, enlarged to 480; divides 480

    def check(self) -> None:
        """Raises Refused for choices that cannot work together."""
        for message, wrong in {
            "give --port and --camera, or --emulate": not (self.emulate or self.replay) and not self.port,
            "--emulate brings its own port and camera": self.emulate and (self.port or self.camera or self.calibration),
            "--calibration is missing: make one with hardware/calibrate.py": self.port and not self.calibration,
            "--camera is missing": self.port and not self.camera and not self.hold,
            "--hold needs the arm: give --port, and not --dry-run": self.hold and (not self.port or self.dry_run),
            "--scale must be above 0 and not above 1": self.scale is not None and not 0 < self.scale <= 1,
            "--episodes and --steps must be at least 1": self.episodes < 1 or (self.steps or 1) < 1,
            "--latency-periods must be 0 to 10": not 0 <= self.latency_periods <= 10,
            "--replay takes a recording alone": self.replay and (self.emulate or self.port),
        }.items():
            if wrong:
                raise Refused(message)


# ------------------------------------------------------------------------------------------------ what must fit -------
def check_policy(policy, cameras: tuple[str, ...] | None = None, measured: dict | None = None) -> Limits:
    """The limits of a policy that fits the arm. Raises Refused with the first thing that does not.

    cameras: names of those given, if known. measured: what hardware/align_camera.py has written of this arm's cameras.
    """
    spec = policy.spec
    if spec.get("robot") != "so101":
        raise Refused(f"the policy was trained for {spec.get('robot') or spec.get('env_id', '?')}, not for an SO-101")
    if tuple(spec["joint_names"]) != JOINTS:
        raise Refused(f"the policy's joints are {', '.join(spec['joint_names'])}; the arm's are {', '.join(JOINTS)}")
    if list(spec["state_layout"]) != LAYOUT:
        raise Refused("the policy's state is not six joint positions and six targets: servos have no more to say")
    if not str(spec.get("action_semantics", "")).startswith(SEMANTICS):
        raise Refused(f"the policy's actions mean {spec.get('action_semantics')!r}; the deployer does {SEMANTICS!r}")
    scale, hz = np.asarray(spec["action_scale"], float), float(spec["control_hz"])
    if scale.shape != (6,) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise Refused(f"the policy's action_scale must be six positive numbers, not {spec['action_scale']}")
    if not 1 <= hz <= 50:
        raise Refused(f"the policy was trained at {hz:g} Hz; the bus and a camera of 30 frames a second allow 1 to 50")
    if (speed := float((scale * hz).max())) > FASTEST:
        raise Refused(f"the policy may ask for {speed:.2f} rad/s, more than the {FASTEST} that the deployer allows")
    try:
        limits = Limits.from_spec(spec)
    except ValueError as error:
        raise Refused(str(error)) from None
    start = np.asarray(spec["start_pose"], float)
    if start.shape != (6,) or (start < limits.low).any() or (start > limits.high).any():
        raise Refused(f"the policy's start pose {spec['start_pose']} is outside its joint limits")
    if not spec["cameras"]:
        raise Refused("the policy was trained without a camera, on what only a simulator knows")
    if cameras is not None and tuple(cameras) != tuple(spec["cameras"]):
        raise Refused(f"the policy sees by {', '.join(spec['cameras'])}; given is {', '.join(cameras) or 'no camera'}")
    for name, values in (measured or {}).items():
        for key in ("mount", "pos", "quat_wxyz", "fovy_degrees") if name in spec["cameras"] else ():
            trained = spec["cameras"][name][key]
            same = trained == values[key] if key == "mount" else np.allclose(trained, values[key], atol=1e-4)
            if not same:
                raise Refused(
                    f"the policy was trained with another {name} camera than this arm has: {key} {trained}, aligned "
                    f"here {values[key]}; train with the aligned camera (see docs/hardware.md)"
                )
    return limits


# ------------------------------------------------------------------------------------------------- the control loop ---
class Deployment:
    """A policy in charge of an arm: see the states above. Leaving it as a context stops the arm, come what may.

    arm             hardware.so101.SO101, or what has its methods
    cameras         {name: Camera}, in the order of the policy's
    clock, sleep    seconds, and how to let them pass
    latency         control periods by which every action is held back
    confirm         asked before every tick of a run; False stops. None: not asked
    beat            called at least every 50 ms while torque may be on; may raise to stop
    each_tick       called with the record of every tick of a run, before the wait for the next one
    dry             torque stays off and nothing is written to the arm
    """

    def __init__(
        self, policy, arm, cameras: dict[str, Camera], limits: Limits, clock: Callable[[], float],
        sleep: Callable[[float], None], *, latency: int = 0, scale: float = 1.0,
        confirm: Callable[[dict], bool] | None = None, beat: Callable[[], None] = lambda: None,
        each_tick: Callable[[dict], None] = lambda record: None, dry: bool = False,
    ):  # fmt: skip
        self.policy, self.arm, self.cameras, self.limits, self.dry = policy, arm, cameras, limits, dry
        self.clock, self.wait, self.beat, self.confirm, self.each_tick = clock, sleep, beat, confirm, each_tick
        self.latency, self.scale, self.period = latency, scale, 1 / float(policy.spec["control_hz"])
        self.action_scale = np.asarray(policy.spec["action_scale"], np.float64)
        self.state, self.home, self.problem, self.torque = "idle", None, None, {}
        self.target, self.velocity = None, np.zeros(6)
        self.episode = self.tick = 0

    # States
    def _enter(self, state: str) -> None:
        if state not in NEXT[self.state]:
            reason = f" ({self.problem})" if self.problem else ""
            raise Fault(f"{state} cannot follow {self.state}{reason}" + "; start anew" * (self.state == "stop"))
        self.state = state

    def sleep(self, seconds: float) -> None:
        """Lets time pass and the heart beat."""
        end = self.clock() + seconds
        while (left := end - self.clock()) > 1e-9:
            self.beat()
            self.wait(min(left, 0.05))
        self.beat()

    def start(self) -> State:
        """idle -> hold: the arm's own start-up, which does not move it, and a frame of every camera."""
        if self.state != "idle":
            self._enter("hold")  # says why not
        for camera in self.cameras.values():
            camera.wait()
        (self.arm.identify if self.dry else self.arm.start)()
        present = self.arm.read()
        self._enter("hold")
        self.target, self.velocity = np.array(present.position, np.float64), np.zeros(6)
        self.home = self.target.copy()  # where it stood without torque, so where it can be let go
        return present

    def move(self, goal) -> None:
        """hold -> move -> hold: to a pose, at MOVE_SPEED at most. Raises Fault if the arm does not get there."""
        self._enter("move")
        goal = np.clip(goal, self.limits.low + self.limits.margin, self.limits.high - self.limits.margin)
        begin = self.target.copy()
        steps = 0 if self.dry else math.ceil(np.abs(goal - begin).max() * math.pi / 2 / MOVE_SPEED / self.period)
        settle = math.ceil(0.5 / self.period)
        deadline = self.clock()
        for i in range(1, steps + settle + 1 if steps else 0):
            share = (1 - math.cos(math.pi * min(i / steps, 1))) / 2
            way = begin + share * (goal - begin) - self.target
            self._command(way / self.action_scale, self.arm.read(self.period / 2))
            deadline += self.period
            self.sleep(deadline - self.clock())
        if steps:
            off = np.abs(self.arm.read(self.period / 2).position - goal)
            if off.max() > REACHED:
                joint = JOINTS[int(off.argmax())]
                raise Fault(f"{joint} stayed {math.degrees(off.max()):.0f} degrees from where it was to go: blocked?")
        if self.dry:
            self.target = goal.astype(np.float64)  # as if it stood there
        self.velocity = np.zeros(6)
        self._enter("hold")

    def stay(self, seconds: float = math.inf) -> None:
        """hold: stands there, watched, for some time or until something stops it."""
        end = self.clock() + seconds
        while self.clock() < end:
            self.arm.read(self.period / 2)
            self.sleep(min(self.period, end - self.clock()))

    def _command(self, action, present: State):
        """Governor and bus. Far actions of `move` are cut to the speed limit there."""
        position = self.target if self.dry else present.position  # without torque the joints do not follow
        command = govern(action, self.target, self.velocity, position, self.period, self.limits, self.action_scale)
        if not self.dry:
            self.arm.write(command.target)
        self.target, self.velocity = command.target, command.velocity
        return command

    def run(self, steps: int) -> None:
        """hold -> run -> hold: the policy acts for `steps` ticks. Raises whatever stops it; the caller then stops."""
        self._enter("run")
        self.policy.reset()
        waiting, late, begin, due = deque(), 0, self.clock(), 0
        for self.tick in range(steps):
            late = late + 1 if self.clock() > begin + (due + 1) * self.period else 0
            if late >= LATE_TICKS:
                raise Fault(f"{late} ticks in a row came more than a period late: the computer is too slow or too busy")
            due = max(due, math.floor((self.clock() - begin) / self.period + 1e-6))  # missed ticks are not made up for
            self.beat()
            begun, present = self.clock(), self.arm.read(self.period / 2)
            frames = {name: camera.latest() for name, camera in self.cameras.items()}
            rgb = np.concatenate([self.policy.preprocess(frame.rgb) for frame in frames.values()], -1)
            state = np.concatenate((present.position, self.target)).astype(np.float32)[None]
            action = np.asarray(self.policy.act({"rgb": rgb, "state": state}), np.float64)[0]
            waiting.append(action)
            delayed = waiting.popleft() if len(waiting) > self.latency else np.zeros(6)
            record = dict(
                episode=self.episode, tick=self.tick, time=begun, state=present, rgb=rgb, frames=frames, action=action,
                frame_age=max(self.clock() - frame.time for frame in frames.values()), late=late,
                target_before=self.target, velocity_before=self.velocity, asked=delayed * self.scale,
            )  # fmt: skip
            if self.confirm is not None:
                if not self.confirm(record):
                    raise Interrupted("stopped by the operator")
                begin, due = self.clock(), 0  # the pause does not count
            command = self._command(delayed * self.scale, present)
            record |= dict(target=command.target, velocity=command.velocity, rules=command.rules, sent=self.clock())
            self.each_tick(record)
            due += 1
            self.sleep(begin + due * self.period - self.clock())
        self.episode += 1
        self._enter("hold")

    def stop(self, reason: str | None = None, hard: bool = False) -> dict[str, str]:
        """any -> stop, which is final. Hold, grow weak, let go; `hard`: let go at once. Never raises.

        -> {joint: "off", "on" or "silent"}, as read back; also in `torque`.
        """
        self.problem = self.problem or reason
        ladder = not hard and self.state in ("hold", "move", "run") and not self.dry
        self.state = "stop"
        for action, pause in ((self.arm.hold, 0.3), (self.arm.low_torque, 1.0)) if ladder else ():
            try:
                action()
                self.sleep(pause)
            except Exception:  # whatever fails on the way down, the next step is tried
                break
        self.torque = {} if self.dry else self.arm.stop()
        return self.torque

    def ending(self) -> str:
        """What became of the torque, in a sentence."""
        if self.dry:
            return "nothing was written to the servos"
        left = [name for name, state in self.torque.items() if state != "off"]
        return f"torque-off is not confirmed by {', '.join(left)}: switch the power off" if left else "torque is off"

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A hot servo can still hold; what has another fault, or a bus that fails, is not given another goal.
        hard = isinstance(error, BusError) or isinstance(error, ArmFault) and error.kind != "heat"
        self.stop(None if error is None else str(error) or kind.__name__, hard)


# ------------------------------------------------------------------------------------------------------ recordings ----
class Recorder:
    """Every tick as a line of ticks.jsonl, written at once, and a video of what the cameras and the policy saw."""

    def __init__(self, folder: str | Path, facts: dict, fps: float, person: Callable[[], np.ndarray] | None = None):
        self.folder, self.fps, self.person, self.video = Path(folder), fps, person, None
        if (self.folder / "run.json").exists():
            raise Refused(f"{folder} has a recording already: choose another --record")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1))
            self.ticks = (self.folder / "ticks.jsonl").open("w", buffering=1)  # line by line: a crash loses one
        except OSError as error:
            raise Refused(f"{folder} cannot be written: {error.strerror}") from None

    def add(self, record: dict) -> None:
        """One tick, as `Deployment.run` hands it out."""
        state = {field.name: plain(getattr(record["state"], field.name)) for field in dataclasses.fields(State)}
        rgb = record["rgb"]
        line = {key: plain(value) for key, value in record.items() if key not in ("state", "rgb", "frames")}
        line |= {"state": state, "rgb": {"shape": rgb.shape, "bytes": base64.b64encode(rgb.tobytes()).decode()}}
        self.ticks.write(json.dumps(line) + "\n")
        self._film(record)

    def _film(self, record: dict, side: int = 320) -> None:
        import imageio.v2 as imageio

        views = [self.person()] if self.person else []
        for i, frame in enumerate(record["frames"].values()):
            views += [frame.rgb, record["rgb"][0, ..., 3 * i:3 * i + 3]]
        if self.video is None:
            self.video = imageio.get_writer(self.folder / "video.mp4", fps=self.fps, macro_block_size=1)
        self.video.append_data(np.concatenate([fit(view, side) for view in views], 1))

    def close(self, summary: dict) -> None:
        """Ends the files; the summary becomes the last line of ticks.jsonl."""
        with contextlib.suppress(OSError):
            self.ticks.write(json.dumps({"end": summary}) + "\n")
            self.ticks.close()
            if self.video is not None:
                self.video.close()


def plain(value):
    """For JSON: arrays as lists, of floats that read back to the same bits."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def fit(picture: np.ndarray, side: int) -> np.ndarray:
    """Any picture as (side, side, 3), nearest pixels, its middle square."""
    edge = min(picture.shape[:2])
    top, left = (picture.shape[0] - edge) // 2, (picture.shape[1] - edge) // 2
    at = np.arange(side) * edge // side
    return picture[top + at][:, left + at]


@dataclass
class Recording:
    """What `Recorder` wrote: the settings, and the ticks as dicts."""

    facts: dict
    ticks: list[dict]

    @classmethod
    def load(cls, folder: str | Path) -> "Recording":
        """Raises Refused for what is no recording. A last line that was cut off is left out."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / "run.json").read_text())
            lines = (folder / "ticks.jsonl").read_text().splitlines()
        except (OSError, ValueError):
            raise Refused(f"{folder} is no recording: it needs run.json and ticks.jsonl") from None
        ticks = []
        for number, line in enumerate(lines):
            try:
                tick = json.loads(line)
            except ValueError:
                if number < len(lines) - 1:
                    raise Refused(f"{folder}/ticks.jsonl, line {number + 1}, is damaged") from None
                break
            ticks += [tick] if "end" not in tick else []
        if not ticks:
            raise Refused(f"{folder} has no tick of a run")
        return cls(facts, ticks)


class ReplayArm:
    """Answers with a recording's joint readings; remembers what is written."""

    def __init__(self, ticks: list[dict]):
        self.states, self.written = iter(ticks), []

    def read(self, budget: float | None = None) -> State:
        state = next(self.states)["state"]
        return State(**{name: np.asarray(value) if isinstance(value, list) else value for name, value in state.items()})

    def write(self, target) -> None:
        self.written.append(np.array(target))

    def start(self) -> None:
        pass

    hold = low_torque = stop = start


class ReplayCamera:
    """Shows a recording's pictures, as they were after preprocessing: once more leaves them as they are."""

    def __init__(self, ticks: list[dict], index: int):
        self.index, self.pictures = index, iter(ticks)

    def wait(self):
        return None

    def latest(self):
        from hardware.camera import Frame

        rgb = next(self.pictures)["rgb"]
        rgb = np.frombuffer(base64.b64decode(rgb["bytes"]), np.uint8).reshape(rgb["shape"])[0]
        return Frame(rgb[..., 3 * self.index:3 * self.index + 3], 0.0, 0)


def replay(policy, recording: Recording) -> list[str]:
    """Differences between a recording's commands and those that its observations give again; [] if bit-identical.

    Raises Refused if the policy is not the recording's.
    """
    facts = recording.facts
    if facts["policy"]["digest"] != policy.digest:
        raise Refused(f"the recording was made with another policy, {facts['policy']['path']}: give that one")
    limits, differences, now = check_policy(policy), [], [0.0]

    def compare(record: dict) -> None:
        tick = ticks[record["tick"]]
        for key in ("action", "asked", "target", "velocity", "rules"):
            if plain(record[key]) != tick[key]:
                where = f"episode {tick['episode']}, tick {tick['tick']}"
                differences.append(f"{where}: {key} is {plain(record[key])}, in the recording {tick[key]}")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for episode in sorted({tick["episode"] for tick in recording.ticks}):
        ticks = [tick for tick in recording.ticks if tick["episode"] == episode]
        cameras = {name: ReplayCamera(ticks, i) for i, name in enumerate(policy.spec["cameras"])}
        again = Deployment(policy, ReplayArm(ticks), cameras, limits, lambda: now[0], sleep, latency=facts["latency"],
                           scale=facts["scale"], dry=facts["dry"], each_tick=compare)  # fmt: skip
        again.state = "hold"
        again.target, again.velocity = (np.array(ticks[0][f"{key}_before"]) for key in ("target", "velocity"))
        again.run(len(ticks))
    return differences


# ---------------------------------------------------------------------------------------------------------- the rigs --
def facts_of(args: Args, policy, **more) -> dict:
    """What a recording begins with."""
    return {
        "format": 1, "policy": {"path": str(args.checkpoint), "digest": policy.digest, "algo": policy.algo},
        "spec": policy.spec, "latency": args.latency_periods, "dry": args.dry_run, "args": asdict(args),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), **more,
    }  # fmt: skip


def folder_of(args: Args, policy) -> Path:
    """Where the recording goes."""
    return Path(args.record or f"runs/hardware/{policy.spec['env_id']}__{time.strftime('%Y%m%d-%H%M%S')}")


def named_cameras(args: Args, policy) -> dict[str, str]:
    """{name: device, picture or video} of --camera; a single one needs no name."""
    pairs = [word.split("=", 1) if "=" in word else ["", word] for word in args.camera]
    known = tuple(policy.spec["cameras"])
    if len(pairs) == 1 and len(known) == 1 and not pairs[0][0]:
        pairs[0][0] = known[0]
    if any(not name for name, _ in pairs):
        raise Refused(f"name each camera: --camera {' '.join(f'{name}=DEVICE' for name in known)}")
    given = dict(pairs)
    if set(given) != set(known) or len(given) != len(pairs):
        names = ", ".join(name for name, _ in pairs) or "none"
        raise Refused(f"the policy sees by {', '.join(known)}; given is {names}")
    return {name: given[name] for name in known}


def open_cameras(args: Args, policy, aligned: dict) -> dict[str, Camera]:
    """A Camera for each of the policy's, already giving frames. Raises CameraError, Refused; then none is left open."""
    cameras = {}
    try:
        for name, device in named_cameras(args, policy).items():
            if Path(device).suffix and not device.startswith("/dev/"):
                cameras[name] = Camera(FileSource(device), threaded=False, name=name, max_age=args.max_frame_age)
            else:
                source = OpenCVSource(device, turn=aligned.get(name, {}).get("quarter_turns", 0),
                                      allow_auto=args.allow_auto)  # fmt: skip
                cameras[name] = Camera(source, name=name, max_age=args.max_frame_age, need_colour=True,
                                       frozen_after=1.0)  # fmt: skip
            cameras[name].wait()
    except BaseException:
        for camera in cameras.values():
            camera.close()
        raise
    return cameras


def seen_before(key: str) -> bool:
    """Whether this policy has run on this arm without a fault."""
    try:
        return key in json.loads(SEEN.read_text())
    except (OSError, ValueError):
        return False


def remember(key: str) -> None:
    """From now on `seen_before`."""
    try:
        known = json.loads(SEEN.read_text())
    except (OSError, ValueError):
        known = {}
    SEEN.parent.mkdir(parents=True, exist_ok=True)
    SEEN.with_suffix(".tmp").write_text(json.dumps(known | {key: time.strftime("%Y-%m-%d %H:%M:%S")}, indent=1))
    os.replace(SEEN.with_suffix(".tmp"), SEEN)


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP are noted, and `check` raises Interrupted once: at a heartbeat, not in the middle of
    something. A program that hangs there has no heartbeat, and the watchdog's process takes over.
    """

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def __enter__(self) -> "Signals":
        self.caught, self.told = None, False
        self.before = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def _note(self, number, _) -> None:
        self.caught = self.caught or number

    def check(self) -> None:
        """Raises Interrupted at the first call after a signal; what follows, the stop, is not interrupted."""
        if self.caught and not self.told:
            self.told = True
            raise Interrupted(f"stopped by {signal.Signals(self.caught).name}", 128 + self.caught)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def asker(key: Callable[[], str | None], sleep: Callable[[float], None], action_scale) -> Callable[[dict], bool]:
    """A `confirm` that shows the next command and waits for a key: enter or y for one tick, c for all, others stop."""
    free = False

    def confirm(record: dict) -> bool:
        nonlocal free
        if free:
            return True
        wish = np.degrees(record["asked"] * action_scale)
        moves = ", ".join(f"{name} {move:+.1f}" for name, move in zip(JOINTS, wish, strict=True))
        print(f"tick {record['tick']}: {moves} degrees. Enter: do it; c: ask no more; other keys: stop", flush=True)
        while (pressed := key()) is None:
            sleep(0.05)
        free = pressed in "cC"
        return free or pressed in "\n\ryY"

    return confirm


def report(record: dict) -> None:
    """One line a tick, for dry runs."""
    moves = ", ".join(f"{name} {goal:.1f}" for name, goal in zip(JOINTS, np.degrees(record["target"]), strict=True))
    rules = f" [{', '.join(record['rules'])}]" if record["rules"] else ""
    print(f"tick {record['tick']}: would go to {moves} degrees; frame {1000 * record['frame_age']:.0f} ms old{rules}")


def real(args: Args, policy) -> dict:
    """The arm behind --port. -> summary. Raises what stopped it; torque is off then."""
    from hardware.watchdog import Watchdog

    aligned = aligned_cameras()
    limits = check_policy(policy, None if args.hold else tuple(named_cameras(args, policy)), aligned)
    try:
        calibration = Calibration.from_json(args.calibration)
    except (ValueError, FileNotFoundError) as error:
        raise Refused(str(error)) from None
    key = f"{policy.digest} {calibration.hash}"
    first = not (args.dry_run or args.hold or seen_before(key))
    scale = args.scale if args.scale is not None else FIRST_SCALE if first else 1.0
    step = first if args.step == "auto" else args.step == "yes"
    if first and (args.scale is None or args.step == "auto"):
        asking = "and asks before every tick" if step else "without asking"
        print(f"the first run of this policy on this arm: at scale {scale} {asking} (see --scale, --step)")
    if step and not args.keyboard:
        raise Refused("--step needs the keyboard")
    steps = args.steps or int(policy.spec["max_episode_steps"])
    summary, recorder, dog = {"episodes": 0}, None, None
    with contextlib.ExitStack() as stack:
        try:
            cameras = {} if args.hold else open_cameras(args, policy, aligned)
            for camera in cameras.values():
                stack.callback(camera.close)
            transport = SerialTransport(args.port)
            stack.callback(transport.close)
        except (CameraError, BusError) as error:
            raise Refused(str(error)) from None
        asked = stack.enter_context(Signals())
        if not args.dry_run:
            dog = stack.enter_context(Watchdog(transport, calibration.ids, HEARTBEAT, 0 if args.keyboard else None))
        bus = Bus(dog.transport if dog else transport, timeout=BUS_TIMEOUT)
        arm = SO101(bus, calibration, limits)
        if not args.hold:
            facts = facts_of(args, policy, scale=scale, calibration={name: asdict(joint) for name, joint in
                             calibration.joints.items()}, arm=calibration.hash)  # fmt: skip
            recorder = Recorder(folder_of(args, policy), facts, policy.spec["control_hz"])
            stack.callback(lambda: recorder.close({"problem": deployment.problem, "torque": deployment.torque}))

        def each_tick(record: dict) -> None:
            recorder.add(record)
            if args.dry_run:
                report(record)

        deployment = Deployment(
            policy, arm, cameras, limits, time.monotonic, time.sleep, latency=args.latency_periods, scale=scale,
            beat=lambda: (asked.check(), dog and dog.beat()), each_tick=each_tick, dry=args.dry_run,
        )  # fmt: skip
        if step:
            deployment.confirm = asker(dog.key if dog else lambda: "y", deployment.sleep, deployment.action_scale)
        try:
            with deployment:
                deployment.start()
                deployment.move(policy.spec["start_pose"])
                if args.hold:
                    print("the arm stands in its start pose; space, q or Ctrl-C lets it go", flush=True)
                    deployment.stay()
                for episode in range(args.episodes):
                    deployment.run(steps)
                    last = episode == args.episodes - 1
                    deployment.move(deployment.home if last else policy.spec["start_pose"])
        except BaseException as error:
            if not (isinstance(error, BusError) and error.kind == "stopped"):  # else the watchdog has said what it did
                error.add_note(deployment.ending())
            raise
        if any(state != "off" for state in deployment.torque.values()):
            raise Fault(deployment.ending())
        summary |= {"episodes": args.episodes, "bus": bus.statistics, "warnings": arm.warnings}
    if not args.dry_run and not args.hold:
        remember(key)
    return summary | {"recording": str(recorder.folder) if recorder else None}


def emulated(args: Args, policy) -> dict:
    """The emulated arm: every episode from power-up to torque off. -> summary with the success rate."""
    from hardware.emulate import EmulatedArm, EmulationError, episodes

    limits, scale = check_policy(policy, measured=aligned_cameras()), args.scale or 1.0
    try:
        rig = EmulatedArm(policy.spec, frame_size=args.frame_size, camera_delay=args.camera_delay)
        scenes = episodes(policy.spec["env_id"], max(args.episodes, 64), args.seed, args.randomize)[: args.episodes]
    except (EmulationError, CameraError) as error:
        raise Refused(str(error)) from None
    calibration = Calibration.from_dict(rig.calibration())
    facts = facts_of(args, policy, scale=scale, calibration=rig.calibration(), arm=calibration.hash)
    person = lambda: rig.world.view(320)  # noqa: E731
    recorder = Recorder(folder_of(args, policy), facts, policy.spec["control_hz"], person)
    steps, results, problem = args.steps or int(policy.spec["max_episode_steps"]), [], None
    try:
        with Signals() as asked:
            for episode, scene in enumerate(scenes):
                options = dict(latency=args.latency_periods, scale=scale, number=episode, each_tick=recorder.add,
                               beat=asked.check)  # fmt: skip
                results.append(emulated_episode(rig, scene, policy, limits, calibration, steps, **options))
                outcome = "solved" if results[-1]["success"] else "not solved"
                print(f"episode {episode + 1} of {len(scenes)}: {outcome}", flush=True)
    except BaseException as error:
        problem = str(error) or type(error).__name__
        raise
    finally:
        recorder.close({"results": results, "problem": problem})
    rate = sum(result["success"] for result in results) / len(results)
    return {"success_rate": rate, "episodes": len(results), "recording": str(recorder.folder)}


def emulated_episode(
    rig, scene: dict, policy, limits: Limits, calibration: Calibration, steps: int, *, latency: int = 0,
    scale: float = 1.0, number: int = 0, each_tick: Callable[[dict], None] = lambda record: None,
    beat: Callable[[], None] = lambda: None,
) -> dict:  # fmt: skip
    """One episode from power-up to torque off. -> success at its end and at any tick, and what the governor did."""
    first, once, fired = rig.begin(scene), [], {}
    arm = SO101(Bus(rig.transport, rig.clock), calibration, limits, rig.clock, rig.clock.sleep)

    def tick(record: dict) -> None:
        for rule in record["rules"]:
            fired[rule.split()[0]] = fired.get(rule.split()[0], 0) + 1
        if record["tick"]:
            once.append(rig.world.success(record["target_before"]))
        each_tick(record)

    options = dict(latency=latency, scale=scale, each_tick=tick, beat=beat)
    deployment = Deployment(policy, arm, rig.cameras(), limits, rig.clock, rig.clock.sleep, **options)
    with deployment:
        deployment.episode = number
        deployment.start()
        deployment.move(first)
        deployment.run(steps)
        success = rig.world.success(deployment.target)
    if any(state != "off" for state in deployment.torque.values()):
        raise Fault(deployment.ending())
    return {"success": success, "success_once": success or any(once), "rules": fired}


def main(args: Args) -> dict:
    """What the arguments ask for. -> summary. Raises what `command` knows how to tell."""
    args.check()
    policy = load_policy(args.checkpoint)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # one small network: more threads only make its time vary
    if args.replay:
        recording = Recording.load(args.replay)
        differences = replay(policy, recording)
        for line in differences[:5]:
            print(line)
        if differences:
            raise Fault(f"{len(differences)} values differ from the recording's")
        return {"replayed_ticks": len(recording.ticks), "identical": True}
    return emulated(args, policy) if args.emulate else real(args, policy)


def command() -> int:
    """The command line. -> exit status."""
    import tyro

    try:
        print(json.dumps(main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))))
    except (Refused, PolicyError, Interrupted, Fault, ArmFault, BusError, CameraError) as error:
        print("; ".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return getattr(error, "status", 2 if isinstance(error, Refused | PolicyError) else 1)
    return 0


if __name__ == "__main__":
    sys.exit(command())
