"""A policy in charge of an SO-101, real or emulated: what must fit, and the control loop with its states and limits.

`hardware/deploy_so101.py` runs it on an arm and says what the states are; `hardware/emulate.py` measures with it.
"""

import math
import re
from collections import deque
from collections.abc import Callable

import numpy as np

from hardware.camera import Camera, CameraError
from hardware.feetech import Bus, BusError
from hardware.governor import Limits, govern
from hardware.so101 import (
    ARM_VELOCITY,
    GRIPPER,
    JOINTS,
    SO101,
    ArmFault,
    Calibration,
    State,
    arm_limits,
)

MOVE_SPEED = 0.5  # rad/s, the fastest joint on the way to the start pose and back
REACHED = 0.15  # rad from the start pose at which the arm counts as being there: gravity makes it hang a little
LATE, LATE_TICKS = (
    0.25,
    3,
)  # periods by which a tick is late and is left out; so many in a row stop the arm
BAD_ACTIONS = 2  # that are no numbers, in a run: one may hold, the second stops
# s: an image 33 ms late costs nothing, 66 ms a quarter of the success (docs/hardware.md). A tick without a newer one
# holds, so many in a row stop the arm.
FRAME_AGE, LATE_FRAMES = 0.05, 3
LONGEST = 100_000  # ticks of an episode
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


# ------------------------------------------------------------------------------------------------ what must fit -------
def check_policy(
    policy, cameras: tuple[str, ...] | None = None, measured: dict | None = None
) -> Limits:
    """The limits of a policy that fits the arm. Raises Refused with the first thing that does not.

    cameras: names of those given, if known. measured: what hardware/align_camera.py has written of this arm's cameras.
    """
    try:
        return _check_policy(policy.spec, cameras, measured)
    except KeyError as error:
        raise Refused(f"the policy's spec has no {error.args[0]}: train it again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(
            str(error)
            if isinstance(error, ValueError)
            else f"the policy's spec is damaged: {error}"
        ) from None


def _check_policy(spec: dict, cameras: tuple[str, ...] | None, measured: dict | None) -> Limits:
    if spec.get("robot") != "so101":
        raise Refused(
            f"the policy was trained for {spec.get('robot') or spec.get('env_id', '?')}, not for an SO-101"
        )
    if not re.fullmatch(r"[\w.-]{1,100}", str(spec["env_id"])):
        raise Refused(f"the policy's task {str(spec['env_id'])[:100]!r} is no name of one")
    if tuple(spec["joint_names"]) != JOINTS:
        raise Refused(
            f"the policy's joints are {', '.join(spec['joint_names'])}; the arm's are {', '.join(JOINTS)}"
        )
    if list(spec["state_layout"]) != LAYOUT:
        raise Refused(
            "the policy's state is not six joint positions and six targets: servos have no more to say"
        )
    if not str(spec.get("action_semantics", "")).startswith(SEMANTICS):
        raise Refused(
            f"the policy's actions mean {spec.get('action_semantics')!r}; the deployer does {SEMANTICS!r}"
        )
    scale, hz = np.asarray(spec["action_scale"], float), float(spec["control_hz"])
    if scale.shape != (6,) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise Refused(
            f"the policy's action_scale must be six positive numbers, not {spec['action_scale']}"
        )
    if not 1 <= hz <= 50:
        raise Refused(
            f"the policy was trained at {hz:g} Hz; the bus and a camera of 30 frames a second allow 1 to 50"
        )
    if (speed := float((scale * hz).max())) > ARM_VELOCITY:
        raise Refused(
            f"the policy may ask for {speed:.2f} rad/s, more than the {ARM_VELOCITY} that the arm allows"
        )
    if not 1 <= int(spec["max_episode_steps"]) <= LONGEST:
        raise Refused(
            f"the policy's episodes have {spec['max_episode_steps']} steps; 1 to {LONGEST} are allowed"
        )
    limits = arm_limits(spec)
    start = np.asarray(spec["start_pose"], float)
    inside = start.shape == (6,) and (start >= limits.low).all() and (start <= limits.high).all()
    if not inside:  # NaN too
        raise Refused(f"the policy's start pose {spec['start_pose']} is outside its joint limits")
    if not spec["cameras"]:
        raise Refused("the policy was trained without a camera, on what only a simulator knows")
    if cameras is not None and tuple(cameras) != tuple(spec["cameras"]):
        raise Refused(
            f"the policy sees by {', '.join(spec['cameras'])}; given is {', '.join(cameras) or 'no camera'}"
        )
    for name, values in (measured or {}).items():
        for key in ("mount", "pos", "quat_wxyz", "fovy_degrees") if name in spec["cameras"] else ():
            trained = spec["cameras"][name][key]
            same = (
                trained == values[key]
                if key == "mount"
                else np.allclose(trained, values[key], atol=1e-4)
            )
            if not same:
                raise Refused(
                    f"the policy was trained with another {name} camera than this arm has: {key} {trained}, aligned "
                    f"here {values[key]}; train with the aligned camera (see docs/hardware.md)"
                )
    return limits


# ------------------------------------------------------------------------------------------------- the control loop ---
class Ticker:
    """Absolute deadlines, one a period. A tick that is late by more than LATE of a period is left out, not made up for.

    late: such ticks in a row.
    """

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], None], period: float):
        self.clock, self.sleep, self.period = clock, sleep, period
        self.due, self.late = clock(), 0

    def wait(self) -> None:
        """Until the next deadline. Raises Fault after LATE_TICKS late ones in a row."""
        self.due += self.period
        behind = (self.clock() - self.due) / self.period
        if behind <= LATE:
            self.late = 0
        else:
            self.late += 1
            self.due += math.ceil(behind - 1e-6) * self.period
        if self.late >= LATE_TICKS:
            raise Fault(
                f"{self.late} ticks in a row came too late: the computer is too slow or too busy"
            )
        self.sleep(self.due - self.clock())


class Deployment:
    """A policy in charge of an arm: see the states above. Leaving it as a context stops the arm, come what may.

    arm             hardware.so101.SO101, or what has its methods
    cameras         {name: Camera}, in the order of the policy's
    clock, sleep    seconds, and how to let them pass
    latency         control periods by which every action is held back
    confirm         asked before every tick of a run, again and again while it says None; False stops. None: not asked
    beat            called at least every 50 ms while torque may be on; may raise to stop
    each_tick       called with the record of every tick of a run, before the wait for the next one
    dry             torque stays off and nothing is written to the arm
    """

    def __init__(
        self,
        policy,
        arm,
        cameras: dict[str, Camera],
        limits: Limits,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        *,
        latency: int = 0,
        scale: float = 1.0,
        confirm: Callable[[dict], bool] | None = None,
        beat: Callable[[], None] = lambda: None,
        each_tick: Callable[[dict], None] = lambda record: None,
        dry: bool = False,
        frame_age: float = FRAME_AGE,
    ):
        self.policy, self.arm, self.cameras = policy, arm, cameras
        self.limits, self.dry, self.frame_age = limits, dry, frame_age
        self.clock, self.wait, self.beat = clock, sleep, beat
        self.confirm, self.each_tick = confirm, each_tick
        self.latency, self.scale, self.period = latency, scale, 1 / float(policy.spec["control_hz"])
        arm.sleep, arm.period = (
            self.sleep,
            self.period,
        )  # the heart beats during the arm's own waits too
        self.action_scale = np.asarray(policy.spec["action_scale"], np.float64)
        self.state, self.home, self.problem, self.torque = "idle", None, None, {}
        self.target, self.velocity = None, np.zeros(6)
        self.episode = self.tick = self.bad_actions = self.late_frames = 0

    # States
    def _enter(self, state: str) -> None:
        if state not in NEXT[self.state]:
            reason = f" ({self.problem})" if self.problem else ""
            raise Fault(
                f"{state} cannot follow {self.state}{reason}"
                + "; start anew" * (self.state == "stop")
            )
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
        self.beat()
        (self.arm.identify if self.dry else self.arm.start)()
        present = self.arm.read()
        self._enter("hold")
        self.target, self.velocity = np.array(present.position, np.float64), np.zeros(6)
        self.home = self.target.copy()  # where it stood without torque, so where it can be let go
        return present

    def move(self, goal) -> None:
        """hold -> move -> hold: to a pose, at MOVE_SPEED at most. Raises Fault if the arm does not get there."""
        self._enter("move")
        goal = np.clip(
            goal, self.limits.low + self.limits.margin, self.limits.high - self.limits.margin
        )
        begin = self.target.copy()
        steps = (
            0
            if self.dry
            else math.ceil(np.abs(goal - begin).max() * math.pi / 2 / MOVE_SPEED / self.period)
        )
        settle = math.ceil(0.5 / self.period)
        ticker = Ticker(self.clock, self.sleep, self.period)
        for i in range(1, steps + settle + 1 if steps else 0):
            share = (1 - math.cos(math.pi * min(i / steps, 1))) / 2
            way = begin + share * (goal - begin) - self.target
            self._command(way / self.action_scale, self.arm.read())
            ticker.wait()
        if steps:
            off = self.arm.read().position - goal
            off[GRIPPER] = min(off[GRIPPER], 0.0)  # a jaw that does not close holds something
            off = np.abs(off)
            if off.max() > REACHED:
                joint = JOINTS[int(off.argmax())]
                raise Fault(
                    f"{joint} stayed {math.degrees(off.max()):.0f} degrees from where it was to go: blocked?"
                )
        if self.dry:
            self.target = goal.astype(np.float64)  # as if it stood there
        self.velocity = np.zeros(6)
        self._enter("hold")

    def stay(self, seconds: float = math.inf) -> None:
        """hold: stands there, watched, for some time or until something stops it."""
        end = self.clock() + seconds
        while self.clock() < end:
            self.arm.read()
            self.sleep(min(self.period, end - self.clock()))

    def _command(self, action, present: State):
        """Governor and bus. Far actions of `move` are cut to the speed limit there."""
        position = (
            self.target if self.dry else present.position
        )  # without torque the joints do not follow
        command = govern(
            action,
            self.target,
            self.velocity,
            position,
            self.period,
            self.limits,
            self.action_scale,
        )
        if not self.dry:
            self.arm.write(command.target)
        self.target, self.velocity = command.target, command.velocity
        return command

    def run(self, steps: int) -> None:
        """hold -> run -> hold: the policy acts for `steps` ticks. Raises whatever stops it; the caller then stops."""
        self._enter("run")
        self._ask(self.policy.reset)
        waiting, ticker = deque(), Ticker(self.clock, self.sleep, self.period)
        for self.tick in range(steps):
            self.beat()
            begun, present = self.clock(), self.arm.read()
            frames = {name: camera.latest() for name, camera in self.cameras.items()}
            age = max(self.clock() - frame.time for frame in frames.values())
            images = [self._ask(self.policy.preprocess, frame.rgb) for frame in frames.values()]
            rgb = np.concatenate(images, -1)
            action = self._act(rgb, present, age)
            waiting.append(action)
            delayed = waiting.popleft() if len(waiting) > self.latency else np.zeros(6)
            record = dict(
                episode=self.episode, tick=self.tick, time=begun, state=present, rgb=rgb, frames=frames, action=action,
                frame_age=age, late=ticker.late, target_before=self.target, velocity_before=self.velocity,
                asked=delayed * self.scale,
            )  # fmt: skip
            if self.confirm is not None:
                present = self._wait_for_person(record, present)
                ticker = Ticker(self.clock, self.sleep, self.period)  # the pause does not count
            command = self._command(delayed * self.scale, present)
            record |= dict(
                target=command.target,
                velocity=command.velocity,
                rules=command.rules,
                sent=self.clock(),
            )
            self.each_tick(record)
            ticker.wait()
        self.episode += 1
        self._enter("hold")

    def _ask(self, call, *arguments):
        """What the policy answers. Raises Fault for whatever it raises."""
        try:
            return call(*arguments)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # Ctrl-C itself is only noted
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            raise Fault(f"the policy failed at tick {self.tick}: {what}") from error

    def _act(self, rgb: np.ndarray, present: State, age: float) -> np.ndarray:
        """The policy's action, (6,). One that is no number, or an image that is late, holds for a tick; more of them,
        and whatever else is wrong with the policy, raise Fault or CameraError."""
        if age > self.frame_age:
            self.late_frames += 1
            if self.late_frames >= LATE_FRAMES:
                raise CameraError(
                    f"the newest image is {1000 * age:.0f} ms old, {LATE_FRAMES} times in a row; more than "
                    f"{1000 * self.frame_age:.0f} ms cost success. Is the camera slower than 30 frames a second?"
                )
            return np.zeros(6)
        self.late_frames = 0
        state = np.concatenate((present.position, self.target)).astype(np.float32)[None]
        answer = self._ask(self.policy.act, {"rgb": rgb, "state": state})
        action = self._ask(np.asarray, answer, np.float64)
        if action.shape != (1, 6):
            raise Fault(f"the policy's action has the shape {action.shape}, not (1, 6)")
        if not np.isfinite(action).all():
            self.bad_actions += 1
            if self.bad_actions >= BAD_ACTIONS:
                raise Fault(
                    f"the policy's action is no number, for the second time, at tick {self.tick}"
                )
        return action[0]

    def _wait_for_person(self, record: dict, present: State) -> State:
        """Until `confirm` decides. The arm is watched meanwhile. -> its newest state. Raises Interrupted for a no."""
        while (answer := self.confirm(record)) is None:
            self.sleep(self.period)
            present = self.arm.read()
        if not answer:
            raise Interrupted("stopped by the operator")
        return present

    def stop(self, reason: str | None = None, hard: bool = False) -> dict[str, str]:
        """any -> stop, which is final. Hold, grow weak, let go; `hard`: let go at once. Never raises.

        -> {joint: "off", "on" or "silent"}, as read back; also in `torque`.
        """
        self.problem = self.problem or reason
        self.state = "stop"
        self.torque = {} if self.dry else self.arm.stop(gently=not hard)
        return self.torque

    def ending(self) -> str:
        """What became of the torque, in a sentence."""
        if self.dry:
            return "nothing was written to the servos"
        if self.arm.outcome is None:
            return "the arm has not started"
        return self.arm.outcome.sentence(self.arm.names)

    def check_whole(self) -> None:
        """After the arm was let go: raises Fault if the run must not count as one without a fault."""
        if any(state != "off" for state in self.torque.values()):
            raise Fault(self.ending())
        if self.bad_actions:
            raise Fault("the policy's action was no number once; the arm held for that tick")

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A hot servo can still hold; what has another fault, or a bus that fails, is not given another goal.
        hard = isinstance(error, BusError) and error.kind != "watchdog"
        hard = hard or isinstance(error, ArmFault) and error.kind != "heat"
        self.stop(None if error is None else str(error) or kind.__name__, hard)


# ------------------------------------------------------------------------------------------------ an emulated run -----
def emulated_episode(
    rig,
    scene: dict,
    policy,
    limits: Limits,
    calibration: Calibration,
    steps: int,
    *,
    latency: int = 0,
    scale: float = 1.0,
    number: int = 0,
    each_tick: Callable[[dict], None] = lambda record: None,
    beat: Callable[[], None] = lambda: None,
) -> dict:
    """One episode from power-up to torque off. -> success at its end and at any tick, and what the governor did."""
    first, once, fired = rig.begin(scene), [], {}
    arm = SO101(Bus(rig.transport, rig.clock), calibration, limits, rig.clock, rig.clock.sleep)

    def tick(record: dict) -> None:
        for rule in record["rules"]:
            fired[rule.split()[0]] = fired.get(rule.split()[0], 0) + 1
        if record["tick"]:
            once.append(rig.scene.success(record["target_before"]))
        each_tick(record)

    options = dict(latency=latency, scale=scale, each_tick=tick, beat=beat)
    deployment = Deployment(
        policy, arm, rig.cameras(), limits, rig.clock, rig.clock.sleep, **options
    )
    with deployment:
        deployment.episode = number
        deployment.start()
        deployment.move(first)
        deployment.run(steps)
        success = rig.scene.success(deployment.target)
    deployment.check_whole()
    return {"success": success, "success_once": success or any(once), "rules": fired}
