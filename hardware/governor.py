"""What stands between a policy and the arm: pure functions that turn an action into joint targets within every limit.

    action -> finite? -> [-1, 1] -> x scale, plus the target -> near the joint -> joint limits -> speed, acceleration

The last two are a range around the present target that always holds zero, so that standing still never breaks a rule,
no rule can contradict another, and a target once inside the joint limits stays inside: the move is a shortened way
towards a point that is inside. A target that starts outside comes in, no faster than the speed limit.

The training environment applies the same rules with the same numbers (`SO101Env._next_target`, a test compares them):
they travel in the checkpoint's `spec`, which `Limits.from_spec` reads. Angles in radians, seconds, numpy float64.
"""

from dataclasses import dataclass

import numpy as np

RULES = ("finite", "present", "action", "tracking", "joint", "velocity", "acceleration")
TRACKING_ERROR = (
    0.35,
    0.35,
    0.35,
    0.35,
    0.35,
    0.6,
)  # for a checkpoint whose spec does not say; as envs/so101
JOINT_MARGIN = 0.02  # likewise
ROUNDING = 1e-9  # radians; a smaller change is not reported as a rule that fired


@dataclass(frozen=True, eq=False)
class Limits:
    """What targets must keep to. All of shape (J,) for J joints but `margin`."""

    low: np.ndarray  # joint limits, radians
    high: np.ndarray
    velocity: np.ndarray  # largest speed of a target, radians per second
    acceleration: (
        np.ndarray
    )  # largest gain of speed, away from rest; a target may always stop. rad/s^2
    tracking_error: np.ndarray  # largest distance of a target from the measured joint, radians
    margin: float  # distance that targets keep from low and high, radians
    joint_names: tuple[str, ...]

    @classmethod
    def from_spec(cls, spec: dict) -> "Limits":
        """Limits of the environment that a policy was trained in. `spec`: the checkpoint's, see envs/so101.

        A spec without limits (an older checkpoint) gets what it was trained with: speeds and accelerations that one
        action can ask for; and TRACKING_ERROR and JOINT_MARGIN. Raises ValueError naming what is missing or wrong.
        """
        needed = ("joint_names", "joint_low", "joint_high", "action_scale", "control_hz")
        if missing := [key for key in needed if key not in spec]:
            raise ValueError(
                f"the policy's spec has no {', '.join(missing)}: train it again with an SO-101 task"
            )
        names, hz = tuple(spec["joint_names"]), float(spec["control_hz"])
        speed = np.asarray(spec["action_scale"], float) * hz
        rows = {
            "low": spec["joint_low"], "high": spec["joint_high"], "velocity": spec.get("velocity_limit", speed),
            "acceleration": spec.get("acceleration_limit", speed * hz),
            "tracking_error": spec.get("tracking_error", TRACKING_ERROR),
        }  # fmt: skip
        rows = {name: np.array(row, np.float64) for name, row in rows.items()}
        margin = float(spec.get("joint_margin", JOINT_MARGIN))
        for name, row in rows.items():
            if row.shape != (len(names),) or not np.isfinite(row).all():
                raise ValueError(
                    f"the policy's spec: {name} must be {len(names)} finite numbers, not {row.tolist()}"
                )
            if name not in ("low", "high") and (row <= 0).any():
                raise ValueError(f"the policy's spec: {name} must be positive, not {row.tolist()}")
            row.setflags(write=False)
        if not 0 <= margin < np.inf or (rows["low"] + 2 * margin >= rows["high"]).any():
            raise ValueError(
                f"the policy's spec: a margin of {margin} leaves no room between the joint limits"
            )
        return cls(**rows, margin=margin, joint_names=names)


@dataclass(frozen=True, eq=False)
class Command:
    """What to send, and why it is not what the policy asked for."""

    target: np.ndarray  # (J,) radians
    velocity: (
        np.ndarray
    )  # (J,) of the target, radians per second: what `govern` wants at the next tick
    rules: tuple[
        str, ...
    ]  # those that changed something: "finite", "present", or "<rule> <joint>"; see RULES


def limit_targets(action, target, velocity, present, dt: float, limits: Limits, action_scale):
    """The rules, for one arm (J,) or many (..., J). -> next target, its velocity, {rule: where it fired (..., J)}

    action: what the policy says, anything. target, velocity: of the last command. present: measured joints.
    An action that is not finite in any joint is none at all, and without finite joint readings nothing moves.
    Raises ValueError if target, velocity, dt or action_scale are not finite: then there is nothing to hold on to.
    """
    target, velocity = np.asarray(target, np.float64), np.asarray(velocity, np.float64)
    action, present = np.asarray(action, np.float64), np.asarray(present, np.float64)
    if not (
        np.isfinite(target).all()
        and np.isfinite(velocity).all()
        and np.isfinite(action_scale).all()
    ):
        raise ValueError("governor: target, velocity and action scale must be finite")
    if not 0 < dt < np.inf:
        raise ValueError(f"governor: the period must be positive, not {dt}")
    shape = np.broadcast_shapes(action.shape, target.shape, present.shape)
    known = np.isfinite(action).all(-1, keepdims=True)
    felt = np.isfinite(present).all(-1, keepdims=True)
    asked = np.where(known, action, 0.0)
    clipped = np.clip(asked, -1.0, 1.0)
    wish = target + clipped * np.asarray(action_scale, np.float64)
    near = np.clip(wish, present - limits.tracking_error, present + limits.tracking_error)
    low, high = limits.low + limits.margin, limits.high - limits.margin
    inside = np.clip(near, low, high)
    step = inside - target
    slow = np.clip(step, -limits.velocity * dt, limits.velocity * dt)
    gain = limits.acceleration * dt
    calm = np.clip(
        slow, (np.minimum(velocity, 0) - gain) * dt, (np.maximum(velocity, 0) + gain) * dt
    )
    following = np.where(
        calm == step, inside, target + calm
    )  # exactly the limit where it is reached
    following = np.where(felt, following, target)
    with np.errstate(invalid="ignore"):  # where present is not finite
        changed = {
            "action": clipped != asked, "tracking": np.abs(near - wish) > ROUNDING,
            "joint": np.abs(inside - near) > ROUNDING, "velocity": np.abs(slow - step) > ROUNDING,
            "acceleration": np.abs(calm - slow) > ROUNDING,
        }  # fmt: skip
    fired = {"finite": ~known, "present": ~felt} | {
        rule: mask & felt for rule, mask in changed.items()
    }
    return (
        following,
        (following - target) / dt,
        {rule: np.broadcast_to(mask, shape) for rule, mask in fired.items()},
    )


def govern(action, target, velocity, present, dt: float, limits: Limits, action_scale) -> Command:
    """The next command of one arm; arguments and errors as in `limit_targets`."""
    following, speed, fired = limit_targets(
        action, target, velocity, present, dt, limits, action_scale
    )
    rules = []
    for rule, mask in fired.items():
        if rule in ("finite", "present"):
            rules += [rule] * bool(mask.any())
        else:
            rules += [
                f"{rule} {name}" for name, hit in zip(limits.joint_names, mask, strict=True) if hit
            ]
    return Command(following, speed, tuple(rules))


# --- Motors -----------------------------------------------------------------------------------------------------------
STALL_CURRENT = 2.4  # A, of an STS3215 at 7.4 V
EFFORT_TIME = 10.0  # s over which the square of the current, which heats, is averaged
EASY, HARD = (
    0.06,
    0.16,
)  # of that average, as a share of the stall current's: full torque below, least above
COOL, WARM = 50.0, 60.0  # degrees Celsius, likewise
PRESSING, PRESSING_TIME = (
    0.1,
    0.3,
)  # rad from its goal at which, and s after which, a still joint presses
STILL = 0.2  # rad/s below which a joint is still
STEP = 0.02  # of the stall torque: limits change in such steps, so that they are not sent at every tick


@dataclass(frozen=True, eq=False)
class Effort:
    """How hard motors have worked so far, (J,) each."""

    heating: np.ndarray  # average of (current / stall current)^2 over EFFORT_TIME
    pressing: np.ndarray  # seconds that a joint has stood still away from its goal

    @classmethod
    def none(cls, joints: int) -> "Effort":
        return cls(np.zeros(joints), np.zeros(joints))


def spare_motors(effort: Effort, current, temperature, error, speed, dt: float, run, hold):
    """Torque that motors may use, from what they have done: weaker before they get hot. -> Effort, shares (J,)

    current: A. temperature: degrees Celsius. error: rad between goal and joint. speed: rad/s. dt: s since the last
    call. run, hold: shares of the stall torque, most and least; the result is always between them. A joint that has
    pressed for PRESSING_TIME gets the least until it is near its goal again. What is not finite counts as the worst.
    """
    current, temperature = np.asarray(current, float), np.asarray(temperature, float)
    square = np.nan_to_num(np.square(current / STALL_CURRENT), nan=1.0, posinf=1.0)
    heating = effort.heating + -np.expm1(-dt / EFFORT_TIME) * (
        np.minimum(square, 1.0) - effort.heating
    )
    weak = effort.pressing >= PRESSING_TIME
    near = np.where(weak, PRESSING / 2, PRESSING)
    away = ~(np.asarray(error, float) <= near)
    stands = weak | ~(np.abs(np.asarray(speed, float)) > STILL)
    pressing = np.where(away & stands, effort.pressing + dt, 0.0)
    warmth = np.nan_to_num(temperature, nan=WARM, posinf=WARM, neginf=WARM)
    room = np.minimum((HARD - heating) / (HARD - EASY), (WARM - warmth) / (WARM - COOL))
    room = np.where(pressing >= PRESSING_TIME, 0.0, np.clip(room, 0.0, 1.0))
    steps = np.floor(room * (run - hold) / STEP + 1e-9) * STEP
    shares = np.where(room >= 1.0, run, np.clip(hold + steps, np.minimum(run, hold), run))
    return Effort(heating, pressing), shares
