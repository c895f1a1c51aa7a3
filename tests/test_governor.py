"""The governor: each rule by hand, a million steps of nonsense, and the same limits in the training environment."""

import numpy as np
import pytest

from hardware import emulator, so101
from hardware.governor import (
    JOINT_MARGIN,
    PRESSING,
    RULES,
    TRACKING_ERROR,
    Effort,
    Limits,
    govern,
    limit_targets,
    spare_motors,
)

NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
SPEC = dict(
    joint_names=list(NAMES), joint_low=[-1.0] * 6, joint_high=[1.0] * 6,
    action_scale=[0.1] * 5 + [0.2], control_hz=10.0,
    velocity_limit=[1.0] * 5 + [2.0], acceleration_limit=[5.0] * 5 + [10.0], tracking_error=[0.3] * 6, joint_margin=0.1,
)  # fmt: skip
LIMITS, DT = Limits.from_spec(SPEC), 0.1
SCALE = np.array(SPEC["action_scale"])


def one(
    action=(0, 0, 0, 0, 0, 0),
    target=0.0,
    velocity=0.0,
    present=None,
    dt=DT,
    scale=SCALE,
    limits=LIMITS,
):
    target = np.broadcast_to(np.asarray(target, float), (6,))
    present = target if present is None else np.broadcast_to(np.asarray(present, float), (6,))
    velocity = np.broadcast_to(np.asarray(velocity, float), (6,))
    return govern(
        np.broadcast_to(np.asarray(action, float), (6,)),
        target,
        velocity,
        present,
        dt,
        limits,
        scale,
    )


# --- Each rule by hand ------------------------------------------------------------------------------------------------
def test_an_action_within_all_limits_is_the_integrator_of_training():
    command = one([0.5, -0.5, 0.25, 0, 0.1, 0.5], target=0.2)
    np.testing.assert_allclose(command.target, [0.25, 0.15, 0.225, 0.2, 0.21, 0.3])
    np.testing.assert_allclose(command.velocity, [0.5, -0.5, 0.25, 0, 0.1, 1.0], atol=1e-12)
    assert command.rules == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_anywhere_moves_nothing(bad):
    command = one([1, bad, 1, 1, 1, 1], target=0.3, velocity=0.2)
    assert (
        command.rules == ("finite",)
        and (command.target == 0.3).all()
        and (command.velocity == 0).all()
    )


def test_without_finite_joint_readings_nothing_moves():
    command = one([1] * 6, target=0.3, present=[0.3, 0.3, np.nan, 0.3, 0.3, 0.3])
    assert command.rules == ("present",) and (command.target == 0.3).all()


def test_actions_are_clipped_and_said_to_be():
    command = one([3.0, 0, 0, 0, 0, 0], velocity=1.0)
    assert command.target[0] == pytest.approx(0.1) and command.rules == ("action shoulder_pan",)


def test_speed_is_limited_in_radians_per_second_whatever_the_scale():
    command = one([1, 0, 0, 0, 0, -1], velocity=[1, 0, 0, 0, 0, -2], scale=1.0)
    np.testing.assert_allclose(command.target, [0.1, 0, 0, 0, 0, -0.2], atol=1e-12)
    assert command.rules == (
        "tracking shoulder_pan",
        "tracking gripper",
        "velocity shoulder_pan",
        "velocity gripper",
    )


def test_speed_builds_up_within_the_acceleration_limit_and_a_stop_is_free():
    command = one([1, 0, 0, 0, 0, 0])  # 5 rad/s^2 for 0.1 s
    assert command.velocity[0] == pytest.approx(0.5) and command.rules == (
        "acceleration shoulder_pan",
    )
    command = one([1, 0, 0, 0, 0, 0], target=command.target, velocity=command.velocity)
    assert command.velocity[0] == pytest.approx(1.0) and command.rules == ()
    stopped = one(target=command.target, velocity=command.velocity)
    assert stopped.velocity[0] == 0 and stopped.rules == ()
    # turning round: from 1 rad/s through zero, and then no faster than from rest
    back = one([-1, 0, 0, 0, 0, 0], target=command.target, velocity=command.velocity)
    assert back.velocity[0] == pytest.approx(-0.5) and back.rules == ("acceleration shoulder_pan",)


def test_targets_stay_a_margin_away_from_the_joint_limits_and_come_in_slowly_from_outside():
    command = one(
        [1, -1, 0, 0, 0, 0], target=[0.85, -0.85, 0, 0, 0, 0], velocity=[1, -1, 0, 0, 0, 0]
    )
    assert command.target[0] == 0.9 and command.target[1] == -0.9
    assert command.rules == ("joint shoulder_pan", "joint shoulder_lift")
    command = one(target=[2.0, 0, 0, 0, 0, 0], velocity=[-1.0, 0, 0, 0, 0, 0])
    assert command.target[0] == pytest.approx(1.9)
    assert command.rules == ("joint shoulder_pan", "velocity shoulder_pan")


def test_the_target_of_a_blocked_joint_stays_near_it():
    target, velocity = np.zeros(6), np.zeros(6)
    for _ in range(20):
        command = one([1, 0, 0, 0, 0, 0], target=target, velocity=velocity, present=0.0)
        target, velocity = command.target, command.velocity
    assert target[0] == 0.3 and command.rules == ("tracking shoulder_pan",)
    # and follows one that is pushed away, no faster than allowed
    command = one(target=target, velocity=velocity, present=[-0.9, 0, 0, 0, 0, 0])
    assert command.target[0] == pytest.approx(0.25)
    assert command.rules == (
        "tracking shoulder_pan",
        "velocity shoulder_pan",
        "acceleration shoulder_pan",
    )


def test_what_cannot_be_held_on_to_is_an_error():
    for words in (dict(target=np.nan), dict(velocity=np.inf), dict(scale=np.nan)):
        with pytest.raises(ValueError, match="must be finite"):
            one(present=0.0, **words)
    for dt in (0.0, -0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="period"):
            one(dt=dt)


# --- A million steps --------------------------------------------------------------------------------------------------
def nonsense(random, n, stuck):
    """Actions of a broken policy, one kind an arm: NaN, infinities, huge, stuck at a limit, noise, now and then all."""
    action = random.normal(size=(n, 6)) * 10.0 ** random.integers(-3, 4, (n, 1))
    kind = np.arange(n) % 8
    action[kind == 1] = np.nan
    action[kind == 2] = random.choice([np.inf, -np.inf], (sum(kind == 2), 6))
    action[kind == 3] *= 1e300
    action[(kind == 4) | (kind == 5)] = stuck[(kind == 4) | (kind == 5)]
    spoilt = random.random((n, 6)) < 0.02
    action[spoilt] = random.choice([np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324], spoilt.sum())
    return action


@pytest.mark.parametrize("dt", [0.1, 1 / 30])
def test_a_million_steps_of_nonsense_never_exceed_a_limit(dt):
    random, n, steps = np.random.default_rng(0), 1000, 1000
    stuck = random.choice([-1.0, 1.0, 1e6], (n, 6))
    low, high = LIMITS.low + LIMITS.margin, LIMITS.high - LIMITS.margin
    target = random.uniform(low, high, (n, 6))
    velocity, present, seen = np.zeros((n, 6)), target.copy(), dict.fromkeys(RULES, False)
    for _ in range(steps):
        # joints that follow, that are blocked, that are pushed about, that jump, and that cannot be read
        how = random.integers(0, 40, (n, 6))
        present = np.where(how < 20, present + 0.5 * (np.nan_to_num(target) - present), present)
        present = np.where(how == 38, random.uniform(-4, 4, (n, 6)), np.nan_to_num(present))
        felt = np.where((how == 39) & (random.random((n, 6)) < 0.2), np.nan, present)
        action = nonsense(random, n, stuck)
        following, speed, fired = limit_targets(action, target, velocity, felt, dt, LIMITS, SCALE)
        assert np.isfinite(following).all() and ((low <= following) & (following <= high)).all()
        move = following - target
        assert (np.abs(move) <= LIMITS.velocity * dt + 1e-12).all()
        gain = LIMITS.acceleration * dt
        assert (move <= (np.maximum(velocity, 0) + gain) * dt + 1e-12).all()
        assert (move >= (np.minimum(velocity, 0) - gain) * dt - 1e-12).all()
        # no target leaves its joint: it is near, or not farther than before
        away, before = np.abs(following - present), np.abs(target - present)
        readable = np.isfinite(felt).all(1)
        assert (away <= np.maximum(LIMITS.tracking_error, before) + 1e-12)[readable].all()
        broken = ~(np.isfinite(action).all(1) & readable)
        still = broken & (before <= LIMITS.tracking_error).all(1)
        assert (move[still] == 0).all()
        np.testing.assert_allclose(speed, move / dt)
        seen = {rule: seen[rule] or bool(fired[rule].any()) for rule in RULES}
        target, velocity = following, speed
    assert all(seen.values()), "the nonsense should have met every rule"


def test_one_arm_gets_what_many_get():
    random = np.random.default_rng(1)
    action, velocity = nonsense(random, 64, np.ones((64, 6))), random.uniform(-1, 1, (64, 6))
    target, present = random.uniform(-0.9, 0.9, (64, 6)), random.uniform(-1, 1, (64, 6))
    following, speed, fired = limit_targets(action, target, velocity, present, DT, LIMITS, SCALE)
    for i in range(64):
        command = govern(action[i], target[i], velocity[i], present[i], DT, LIMITS, SCALE)
        assert (command.target == following[i]).all() and (command.velocity == speed[i]).all()
        names = [rule for rule in ("finite", "present") if fired[rule][i].any()]
        names += [f"{rule} {NAMES[j]}" for rule in RULES[2:] for j in range(6) if fired[rule][i, j]]
        assert command.rules == tuple(names)


# --- One source with training -----------------------------------------------------------------------------------------
def test_limits_come_from_the_policys_spec():
    assert LIMITS.margin == 0.1 and LIMITS.joint_names == NAMES
    assert (LIMITS.velocity == SPEC["velocity_limit"]).all() and (
        LIMITS.tracking_error == 0.3
    ).all()
    old = {
        key: SPEC[key]
        for key in ("joint_names", "joint_low", "joint_high", "action_scale", "control_hz")
    }
    limits = Limits.from_spec(old)
    np.testing.assert_allclose(limits.velocity, [1, 1, 1, 1, 1, 2])
    np.testing.assert_allclose(limits.acceleration, [10, 10, 10, 10, 10, 20])
    assert (limits.tracking_error == TRACKING_ERROR).all() and limits.margin == JOINT_MARGIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(joint_low=[-1.0] * 5), "low must be 6 finite numbers"),
        (dict(velocity_limit=[1, 1, 1, 1, 1, np.nan]), "velocity must be 6 finite numbers"),
        (dict(tracking_error=[0.3, 0, 0.3, 0.3, 0.3, 0.3]), "tracking_error must be positive"),
        (dict(joint_margin=1.0), "no room between the joint limits"),
        (dict(joint_margin=-0.1), "no room between the joint limits"),
    ],
)
def test_a_spec_that_cannot_be_gets_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Limits.from_spec(SPEC | change)
    assert "\n" not in str(error.value)


def test_a_spec_without_joints_is_refused_by_name():
    with pytest.raises(ValueError, match="no joint_low, action_scale"):
        Limits.from_spec(
            {key: value for key, value in SPEC.items() if key not in ("joint_low", "action_scale")}
        )


def test_the_training_environment_keeps_to_the_same_limits():
    """Random actions, half of them of a policy stuck at full speed: the arm meets joint limits, table and itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')
    from envs import so101

    env = so101.make("SO101ReachCube-v1", 8, "cpu", seed=0, stagger=False, images=False, threads=1)
    limits = Limits.from_spec(env.spec)
    old = {
        key: value
        for key, value in env.spec.items()
        if not key.endswith(("limit", "error", "margin"))
    }
    for name in ("low", "high", "velocity", "acceleration", "tracking_error", "margin"):
        np.testing.assert_allclose(
            getattr(Limits.from_spec(old), name), getattr(limits, name), err_msg=name
        )
    generator, seen = torch.Generator().manual_seed(0), set()
    velocity, stuck = np.zeros((8, 6)), torch.randn(8, 6, generator=generator).sign()
    for _ in range(49):
        actions = torch.rand(8, 6, generator=generator) * 2 - 1
        actions[::2] = stuck[::2]
        target, present = (
            env.target.double().numpy().copy(),
            env.qpos[:, :6].double().numpy().copy(),
        )
        action, scale = actions.double().numpy(), so101.ACTION_SCALE
        wanted, velocity, fired = limit_targets(
            action, target, velocity, present, DT, limits, scale
        )
        env.step(actions)
        np.testing.assert_allclose(env.target.numpy(), wanted, atol=1e-6)
        velocity = (env.target.double().numpy() - target) / DT
        seen |= {rule for rule, mask in fired.items() if mask.any()}
    assert {"joint", "tracking"} <= seen


# --- Motors -----------------------------------------------------------------------------------------------------------
RUN, HOLD = so101.RUN_TORQUE, so101.HOLD_TORQUE


def spared(seconds, current=0.0, temperature=30.0, error=0.0, speed=0.0, effort=None, dt=0.1):
    """Shares after some time of the same."""
    effort = effort or Effort.none(6)
    for _ in range(round(seconds / dt)):
        rows = (
            np.broadcast_to(np.asarray(x, float), 6) for x in (current, temperature, error, speed)
        )
        effort, shares = spare_motors(effort, *rows, dt, RUN, HOLD)
    return effort, shares


def test_a_motor_at_ease_may_use_all_its_torque():
    assert (spared(60, current=0.5)[1] == RUN).all()


def test_a_joint_that_presses_is_weak_after_a_moment_until_it_is_near_its_goal():
    effort, shares = spared(0.2, error=0.2)
    assert (shares == RUN).all()
    effort, shares = spared(0.1, error=0.2, effort=effort)
    assert (shares == HOLD).all()
    effort, shares = spared(0.1, error=0.07, effort=effort)
    assert (shares == HOLD).all(), "not at once"
    assert (spared(0.1, error=0.03, effort=effort)[1] == RUN).all()
    assert (spared(5, error=0.2, speed=0.5)[1] == RUN).all(), "on its way"


def test_a_motor_that_works_hard_or_is_warm_is_weaker():
    hard = [spared(seconds, current=1.2)[1][0] for seconds in (1, 3, 6, 30)]
    assert hard[0] == RUN[0] and np.all(np.diff(hard) <= 0) and hard[-1] == HOLD[0]
    warm = [spared(1, temperature=t)[1][0] for t in (49, 52, 55, 58, 60, 90)]
    assert warm[0] == RUN[0] and np.all(np.diff(warm) <= 0) and warm[-2] == warm[-1] == HOLD[0]


@pytest.mark.parametrize("joint", ["arm", "jaw"])
def test_whatever_a_joint_presses_with_it_grows_weak_before_it_gets_too_hot(joint):
    """Half an hour against something, from 0.01 to 0.35 rad off its goal, in the emulator's motor and thermal model:
    a joint is off by its distance or at 65 degrees, and was weak by then; the jaw keeps its grip and stays below."""
    error = np.linspace(0.01, 0.35, 35)
    stiffness = 16 * emulator.DUTY_PER_STEP * 4096 / (2 * np.pi)  # duty per rad, P = 16
    run, hold = (np.full(35, share[0 if joint == "arm" else 5]) for share in (RUN, HOLD))
    temperature, effort, shares, off = np.full(35, 25.0), Effort.none(35), run, np.zeros(35, bool)
    hottest, weak, dt = temperature, np.zeros(35, bool), 0.1
    for _ in range(18_000):
        duty = np.where(off, 0.0, np.minimum(stiffness * error, shares))
        final = 25 + emulator.COOLING_TIME * emulator.HEATING * duty**2
        temperature = final + (temperature - final) * np.exp(-dt / emulator.COOLING_TIME)
        hottest = np.maximum(hottest, temperature)
        current = emulator.STALL_CURRENT * duty
        effort, shares = spare_motors(effort, current, temperature, error, 0 * error, dt, run, hold)
        weak |= ~off & (shares <= hold)
        off |= temperature >= so101.HOT
        if joint == "arm":
            off |= effort.pressing > so101.STALL_TIME
    assert (hottest < so101.HOT + 0.2).all() and weak[off].all()
    if joint == "arm":
        assert off[error > PRESSING].all() and off[stiffness * error > 0.3].all()
        assert hottest[error > PRESSING + 1e-9].max() < 30, "a stall ends before it heats"
    else:
        assert not off.any() and hottest.max() < so101.WARM


def test_a_million_steps_of_nonsense_never_leave_the_motors_limits():
    random, effort = np.random.default_rng(3), Effort(np.zeros((1000, 6)), np.zeros((1000, 6)))
    worst = [np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0]
    for _ in range(1000):
        rows = random.normal(0, [[[2.0]], [[60.0]], [[0.3]], [[0.5]]], (4, 1000, 6))
        wild = random.random(rows.shape) < 0.05
        rows[wild] = random.choice(worst, wild.sum())
        dt = float(random.choice([0.0, 0.02, 0.1, 1.0]))
        with np.errstate(over="ignore"):
            effort, shares = spare_motors(effort, *rows, dt, RUN, HOLD)
        assert ((shares >= HOLD) & (shares <= RUN)).all() and np.isfinite(effort.heating).all()
        assert (effort.heating <= 1).all() and (shares[effort.pressing >= 0.3] < 0.5).all()
        unknown = ~np.isfinite(rows[1])
        assert (shares[unknown] == np.broadcast_to(HOLD, shares.shape)[unknown]).mean() > 0.6
