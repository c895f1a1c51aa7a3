"""A policy in charge of an SO-101, real or emulated: what must fit, and the control loop with its states and limits.

`hardware/deploy_so101.py` runs it on an arm and says what the states are; `hardware/emulate.py` measures with it.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from hardware.camera import Camera
from hardware.feetech import Bus, BusError
from hardware.governor import Limits, govern
from hardware.so101 import JOINTS, SO101, ArmFault, Calibration, State

MOVE_SPEED = 0.5  # rad/s, the fastest joint on the way to the start pose and back
REACHED = 0.15  # rad from the start pose at which the arm counts as being there: gravity makes it hang a little
LATE_TICKS = 3  # so many ticks in a row, each late by more than a period, stop the arm
FASTEST = 2.5  # rad/s that a policy may ask of a joint; the servos end at about 4.7
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
    spec = policy.spec
    if spec.get("robot") != "so101":
        raise Refused(
            f"the policy was trained for {spec.get('robot') or spec.get('env_id', '?')}, not for an SO-101"
        )
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
    if (speed := float((scale * hz).max())) > FASTEST:
        raise Refused(
            f"the policy may ask for {speed:.2f} rad/s, more than the {FASTEST} that the deployer allows"
        )
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
    ):
        self.policy, self.arm, self.cameras, self.limits, self.dry = (
            policy,
            arm,
            cameras,
            limits,
            dry,
        )
        self.clock, self.wait, self.beat, self.confirm, self.each_tick = (
            clock,
            sleep,
            beat,
            confirm,
            each_tick,
        )
        self.latency, self.scale, self.period = latency, scale, 1 / float(policy.spec["control_hz"])
        self.action_scale = np.asarray(policy.spec["action_scale"], np.float64)
        self.state, self.home, self.problem, self.torque = "idle", None, None, {}
        self.target, self.velocity = None, np.zeros(6)
        self.episode = self.tick = 0

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
            self.arm.read(self.period / 2)
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
        self.policy.reset()
        waiting, late, begin, due = deque(), 0, self.clock(), 0
        for self.tick in range(steps):
            late = late + 1 if self.clock() > begin + (due + 1) * self.period else 0
            if late >= LATE_TICKS:
                raise Fault(
                    f"{late} ticks in a row came more than a period late: the computer is too slow or too busy"
                )
            due = max(
                due, math.floor((self.clock() - begin) / self.period + 1e-6)
            )  # missed ticks are not made up for
            self.beat()
            begun, present = self.clock(), self.arm.read(self.period / 2)
            frames = {name: camera.latest() for name, camera in self.cameras.items()}
            rgb = np.concatenate(
                [self.policy.preprocess(frame.rgb) for frame in frames.values()], -1
            )
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
            record |= dict(
                target=command.target,
                velocity=command.velocity,
                rules=command.rules,
                sent=self.clock(),
            )
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
        return (
            f"torque-off is not confirmed by {', '.join(left)}: switch the power off"
            if left
            else "torque is off"
        )

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A hot servo can still hold; what has another fault, or a bus that fails, is not given another goal.
        hard = isinstance(error, BusError) or isinstance(error, ArmFault) and error.kind != "heat"
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
    if any(state != "off" for state in deployment.torque.values()):
        raise Fault(deployment.ending())
    return {"success": success, "success_once": success or any(once), "rules": fired}
