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

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hardware.camera import Camera, CameraError, FileSource, OpenCVSource, aligned_cameras
from hardware.deployment import (
    FRAME_AGE,
    Deployment,
    Fault,
    Interrupted,
    Refused,
    check_policy,
    emulated_episode,
)
from hardware.feetech import Bus, BusError, SerialTransport
from hardware.policy import PolicyError, load_policy
from hardware.recording import Recorder, Recording, replay
from hardware.so101 import JOINTS, SO101, ArmFault, Calibration

FIRST_SCALE = 0.25  # of every action, in the first run of a policy on an arm
BUS_TIMEOUT = 0.03  # s for a servo's answer, outside of ticks
HEARTBEAT = 0.25  # s that the watchdog waits for a sign of life
RETURN = 60.0  # s that a port which has gone may take to come back
SEEN = Path("runs/hardware/seen.json")  # (policy, arm) pairs that have run without a fault


@dataclass
class Args:
    checkpoint: str  # the policy: a checkpoint (.pt) or an export (.onnx, .npz)
    port: str | None = None  # of the arm's adapter, such as /dev/ttyACM0
    calibration: str | None = (
        None  # the arm's calibration, lerobot's JSON: see hardware/calibrate.py
    )
    camera: tuple[str, ...] = ()  # number, device, image or video; several as name=device
    episodes: int = 1  # runs, each from the start pose
    steps: int | None = None  # ticks of an episode; None: as in training
    scale: float | None = (
        None  # factor on every action, up to 1; None: 0.25 in the first run, then 1
    )
    step: Literal["auto", "yes", "no"] = "auto"  # ask before every tick; auto: in the first run
    dry_run: bool = False  # no torque and no goal: only say what would be commanded
    record: str | None = None  # folder of the recording; None: a new one in runs/hardware
    replay: str | None = None  # a recording: feed it to the policy again and compare the commands
    hold: bool = False  # go to the start pose and stay until stopped, the policy does not act: to align the camera
    allow_auto: bool = False  # accept a camera that does not lock its exposure or white balance
    max_frame_age: float = (
        FRAME_AGE  # s; a tick with an older image holds, three in a row stop the arm
    )
    keyboard: bool = True  # stop on space, q, Esc, and when the terminal goes away

    emulate: bool = False  # the emulated arm in place of port and camera
    latency_periods: int = (
        0  # control periods between an observation and its command; to try out delays
    )
    camera_delay: float = 0.0  # s that emulated images are late
    seed: int = 10_000  # of the emulated episodes
    randomize: bool = (
        True  # emulated episodes vary as in training; off: all in the middle of their ranges
    )
    frame_size: int = (
        240  # pixels a side that the emulated camera draws, enlarged to 480; divides 480
    )

    def check(self) -> None:
        """Raises Refused for choices that cannot work together."""
        for message, wrong in {
            "give --port and --camera, or --emulate": not (self.emulate or self.replay)
            and not self.port,
            "--emulate brings its own port and camera": self.emulate
            and (self.port or self.camera or self.calibration),
            "--calibration is missing: make one with hardware/calibrate.py": self.port
            and not self.calibration,
            "--camera is missing": self.port and not self.camera and not self.hold,
            "--hold needs the arm: give --port, and not --dry-run": self.hold
            and (not self.port or self.dry_run),
            "--scale must be above 0 and not above 1": self.scale is not None
            and not 0 < self.scale <= 1,
            "--episodes and --steps must be at least 1": self.episodes < 1 or (self.steps or 1) < 1,
            "--max-frame-age must be above 0 and at most 1 s": not 0 < self.max_frame_age <= 1,
            "--latency-periods must be 0 to 10": not 0 <= self.latency_periods <= 10,
            "--replay takes a recording alone": self.replay and (self.emulate or self.port),
        }.items():
            if wrong:
                raise Refused(message)


# ---------------------------------------------------------------------------------------------------------- the rigs --
def facts_of(args: Args, policy, **more) -> dict:
    """What a recording begins with."""
    return {
        "format": 1, "policy": {"path": str(args.checkpoint), "digest": policy.digest, "algo": policy.algo},
        "spec": policy.spec, "latency": args.latency_periods, "frame_age": args.max_frame_age,
        "dry": args.dry_run, "args": asdict(args),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), **more,
    }  # fmt: skip


def folder_of(args: Args, policy) -> Path:
    """Where the recording goes."""
    return Path(
        args.record or f"runs/hardware/{policy.spec['env_id']}__{time.strftime('%Y%m%d-%H%M%S')}"
    )


def named_cameras(args: Args, policy) -> dict[str, str]:
    """{name: device, image or video} of --camera; a single one needs no name."""
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
                cameras[name] = Camera(FileSource(device), threaded=False, name=name)
            else:
                source = OpenCVSource(device, turn=aligned.get(name, {}).get("quarter_turns", 0),
                                      allow_auto=args.allow_auto)  # fmt: skip
                cameras[name] = Camera(source, name=name, need_colour=True, frozen_after=1.0)
            cameras[name].wait()
    except BaseException:
        for camera in cameras.values():
            camera.close()
        raise
    return cameras


def seen() -> dict[str, str]:
    """(policy, arm) pairs that have run without a fault, and when."""
    try:
        content = json.loads(SEEN.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remember(key: str) -> None:
    """From now on it is `seen`."""
    SEEN.parent.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    SEEN.with_suffix(".tmp").write_text(json.dumps(seen() | {key: now}, indent=1))
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


def asker(key: Callable[[], str | None], action_scale) -> Callable[[dict], bool | None]:
    """A `confirm` that shows the next command once, and says None until a key was pressed: enter or y for one tick, c
    for all, others stop."""
    free, shown = False, None

    def confirm(record: dict) -> bool | None:
        nonlocal free, shown
        if free:
            return True
        if shown is not record:
            shown = record
            wish = np.degrees(record["asked"] * action_scale)
            moves = ", ".join(
                f"{name} {move:+.1f}" for name, move in zip(JOINTS, wish, strict=True)
            )
            print(
                f"tick {record['tick']}: {moves} degrees. Enter: do it; c: ask no more; other keys: stop",
                flush=True,
            )
        if (pressed := key()) is None:
            return None
        free = pressed in "cC"
        return free or pressed in "\n\ryY"

    return confirm


def report(record: dict) -> None:
    """One line a tick, for dry runs."""
    moves = ", ".join(
        f"{name} {goal:.1f}"
        for name, goal in zip(JOINTS, np.degrees(record["target"]), strict=True)
    )
    rules = f" [{', '.join(record['rules'])}]" if record["rules"] else ""
    print(
        f"tick {record['tick']}: would go to {moves} degrees; frame {1000 * record['frame_age']:.0f} ms old{rules}"
    )


def real(args: Args, policy) -> dict:
    """The arm behind --port. -> summary. Raises what stopped it; torque is off then."""
    from hardware.watchdog import Watchdog

    aligned = aligned_cameras()
    limits = check_policy(
        policy, None if args.hold else tuple(named_cameras(args, policy)), aligned
    )
    try:
        calibration = Calibration.from_json(args.calibration)
    except (ValueError, FileNotFoundError) as error:
        raise Refused(str(error)) from None
    key = f"{policy.digest} {calibration.hash}"
    first = not (args.dry_run or args.hold or key in seen())
    scale = args.scale if args.scale is not None else FIRST_SCALE if first else 1.0
    step = first if args.step == "auto" else args.step == "yes"
    if first and (args.scale is None or args.step == "auto"):
        asking = "and asks before every tick" if step else "without asking"
        print(
            f"the first run of this policy on this arm: at scale {scale} {asking} (see --scale, --step)"
        )
    if step and not args.keyboard:
        raise Refused("--step needs the keyboard")
    steps, hz = (
        args.steps or int(policy.spec["max_episode_steps"]),
        float(policy.spec["control_hz"]),
    )
    summary, recorder, dog, deployment = {"episodes": 0}, None, None, None

    def ending() -> str:
        """What became of the torque: what the watchdog found, who comes last; its own word if there is none."""
        if dog and dog.outcome:
            return dog.outcome.sentence(arm.names)
        return deployment.ending()

    def end_recording() -> None:
        torque = deployment.torque if deployment else {}
        if dog and dog.outcome and deployment:
            for state in ("off", "silent", "on"):
                torque |= {arm.names[id]: state for id in getattr(dog.outcome, state)}
        recorder.close({"problem": deployment and deployment.problem, "torque": torque})

    def each_tick(record: dict) -> None:
        recorder.add(record)
        if args.dry_run:
            report(record)

    try:
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
            if not args.hold:
                facts = facts_of(args, policy, scale=scale, calibration={name: asdict(joint) for name, joint in
                                 calibration.joints.items()}, arm=calibration.hash)  # fmt: skip
                recorder = Recorder(folder_of(args, policy), facts, hz, live=True)
                stack.callback(end_recording)
            if not args.dry_run:
                keyboard = 0 if args.keyboard else None
                dog = stack.enter_context(
                    Watchdog(transport, calibration.ids, HEARTBEAT, keyboard, returns=RETURN)
                )
            bus = Bus(dog.transport if dog else transport, timeout=BUS_TIMEOUT)
            arm = SO101(bus, calibration, limits, period=1 / hz)
            deployment = Deployment(
                policy, arm, cameras, limits, time.monotonic, time.sleep, latency=args.latency_periods, scale=scale,
                beat=lambda: (asked.check(), dog and dog.beat()), each_tick=each_tick, dry=args.dry_run,
                frame_age=args.max_frame_age,
            )  # fmt: skip
            if step:
                deployment.confirm = asker(dog.key if dog else lambda: "y", deployment.action_scale)
            with deployment:
                deployment.start()
                deployment.move(policy.spec["start_pose"])
                if args.hold:
                    print(
                        "the arm stands in its start pose; space, q or Ctrl-C lets it go",
                        flush=True,
                    )
                    deployment.stay()
                for episode in range(args.episodes):
                    deployment.run(steps)
                    last = episode == args.episodes - 1
                    deployment.move(deployment.home if last else policy.spec["start_pose"])
            deployment.check_whole()
            summary |= {"episodes": args.episodes, "bus": bus.statistics, "warnings": arm.warnings}
        if dog and dog.outcome and not dog.outcome.known:
            raise Fault("the run is over")
    except BaseException as error:
        if deployment:
            error.add_note(ending())
        raise
    if recorder and recorder.problem:
        summary["recording_problem"] = recorder.problem
    if not args.dry_run and not args.hold:
        remember(key)
    return summary | {"recording": str(recorder.folder) if recorder else None}


def emulated(args: Args, policy) -> dict:
    """The emulated arm: every episode from power-up to torque off. -> summary with the success rate."""
    from hardware.emulate import EmulatedArm, EmulationError, episodes

    limits, scale = check_policy(policy, measured=aligned_cameras()), args.scale or 1.0
    try:
        rig = EmulatedArm(policy.spec, frame_size=args.frame_size, camera_delay=args.camera_delay)
        scenes = episodes(policy.spec["env_id"], max(args.episodes, 64), args.seed, args.randomize)[
            : args.episodes
        ]
    except (EmulationError, CameraError) as error:
        raise Refused(str(error)) from None
    calibration = Calibration.from_dict(rig.calibration())
    facts = facts_of(args, policy, scale=scale, calibration=rig.calibration(), arm=calibration.hash)
    person = lambda: rig.scene.view(320)  # noqa: E731
    recorder = Recorder(folder_of(args, policy), facts, policy.spec["control_hz"], person)
    steps, results, problem = args.steps or int(policy.spec["max_episode_steps"]), [], None
    try:
        with Signals() as asked:
            for episode, scene in enumerate(scenes):
                options = dict(latency=args.latency_periods, scale=scale, number=episode, each_tick=recorder.add,
                               beat=asked.check)  # fmt: skip
                results.append(
                    emulated_episode(rig, scene, policy, limits, calibration, steps, **options)
                )
                outcome = "solved" if results[-1]["success"] else "not solved"
                print(f"episode {episode + 1} of {len(scenes)}: {outcome}", flush=True)
    except BaseException as error:
        problem = str(error) or type(error).__name__
        raise
    finally:
        recorder.close({"results": results, "problem": problem})
    rate = sum(result["success"] for result in results) / len(results)
    return {"success_rate": rate, "episodes": len(results), "recording": str(recorder.folder)}


def main(args: Args) -> dict:
    """What the arguments ask for. -> summary. Raises what `command` knows how to tell."""
    args.check()
    policy = load_policy(args.checkpoint)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # one small network: more threads only make its time vary
    if args.replay:
        recording = Recording.load(args.replay)
        try:
            differences = replay(policy, recording)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{args.replay} is damaged ({type(error).__name__}: {error})") from None
        for line in differences[:5]:
            print(line)
        if differences:
            raise Fault(f"{len(differences)} values differ from the recording's")
        return {"replayed_ticks": len(recording.ticks), "identical": True}
    return emulated(args, policy) if args.emulate else real(args, policy)


def sentence(error: BaseException) -> str:
    """What has stopped the program, and what became of the torque."""
    what = str(error) or type(error).__name__
    known = isinstance(
        error, Refused | PolicyError | Interrupted | Fault | ArmFault | BusError | CameraError
    )
    what = what if known else f"{type(error).__name__}: {what}"
    notes = [note for note in getattr(error, "__notes__", ()) if note not in what]
    return "; ".join([f"error: {what}", *dict.fromkeys(notes)])


def status(error: BaseException) -> int:
    """What the program exits with."""
    return getattr(error, "status", 2 if isinstance(error, Refused | PolicyError) else 1)


def command() -> int:
    """The command line. -> exit status."""
    import tyro

    try:
        print(json.dumps(main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))))
    except (Refused, PolicyError, Interrupted, Fault, ArmFault, BusError, CameraError) as error:
        print(sentence(error), file=sys.stderr)
        return status(error)
    except Exception as error:  # not foreseen, but not without a sentence either
        import traceback

        traceback.print_exc()
        print(sentence(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command())
