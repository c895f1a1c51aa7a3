"""The Go1 tasks: the model's figures, every reward term by hand, episodes, randomisation, back ends side by side."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

for module in ("jax", "mujoco.mjx"):
    pytest.importorskip(module, reason='needs JAX, MuJoCo and MJX: pip install -e ".[go1]"')
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402

from envs import check, go1  # noqa: E402
from envs.go1 import EnvConfig, Go1Env, robot, task  # noqa: E402
from envs.go1.env import Draws  # noqa: E402
from envs.go1.render import Renderer  # noqa: E402
from envs.go1.robot import DEFAULT_POSE, LEGS  # noqa: E402

STILL = dict(noise_level=0.0)
# Everything that can vary at once; converged on every back end, so that they can be compared.
VARIED = EnvConfig(
    noise_level=0.0,
    domain_randomization=True,
    kp_factor=(0.9, 1.1),
    kd_factor=(0.5, 1.5),
    action_latency=(0.0, 0.02),
    pushes=True,
    push_wait=(0.0, 0.02),
    linvel=False,
    iterations=10,
    ls_iterations=20,
    warp_worlds=4,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs that run for a few steps: what optimising them costs is not earned back. They are kept between runs."""
    names = dict(
        jax_disable_most_optimizations=True,
        jax_persistent_cache_min_compile_time_secs=0.2,
        jax_compilation_cache_dir=str(Path(__file__).parent.parent / ".pytest_cache/jax"),
    )
    before = {name: jax.config.values[name] for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def numpy(tree):
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def flat():
    return Go1Env("Go1JoystickFlat", EnvConfig(episode_length=6, **STILL), "mujoco-c", threads=1)


@pytest.fixture(scope="module")
def varied():
    return Go1Env("Go1JoystickFlat", VARIED, "mujoco-c", threads=2)


# --- The model ------------------------------------------------------------------------------------
def test_model_has_the_figures_of_the_robot():
    model = robot.build_model(EnvConfig(), False, 100, 50)
    assert (model.nq, model.nv, model.nu, model.nbody) == (19, 18, 12, 14)
    assert model.body_subtreemass[0] == pytest.approx(12.743, abs=1e-3)
    assert [model.joint(i).name for i in range(1, 13)] == [
        model.actuator(i).name for i in range(12)
    ]
    assert [model.joint(i).name for i in range(1, 13)] == list(robot.JOINTS)
    ranges = [(-0.863, 0.863), (-0.686, 4.501), (-2.818, -0.888)] * 4
    assert np.allclose(model.jnt_range[1:], ranges) and np.allclose(
        model.actuator_ctrlrange, ranges
    )
    assert np.allclose(model.actuator_forcerange[:, 1], [23.7, 23.7, 35.55] * 4)
    assert np.allclose(model.dof_frictionloss[6:], [0.3, 0.3, 1.0] * 4) and np.allclose(
        model.dof_armature[6:], 0.005
    )
    assert np.allclose(model.dof_damping[6:], 0.5) and np.allclose(
        model.actuator_gainprm[:, 0], 35.0
    )
    assert np.allclose(model.key_qpos[0, 7:], DEFAULT_POSE)
    colliding = [
        model.geom(i).name
        for i in range(model.ngeom)
        if model.geom_contype[i] or model.geom_conaffinity[i]
    ]
    assert colliding == ["floor", *(f"{leg}_foot" for leg in LEGS)]
    assert model.geom("floor").id == robot.FLOOR and model.body("trunk").id == robot.TRUNK


def test_left_and_right_are_mirror_images():
    """Inertia tensors about the hips' own frames, reflected in y; the calves are alike on both sides."""
    model = robot.build_model(EnvConfig(), False, 100, 50)
    flip = np.diag([1.0, -1.0, 1.0])

    def tensor(body):
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, body.iquat)
        turn = turn.reshape(3, 3)
        return turn @ np.diag(body.inertia) @ turn.T

    for end in "FR":
        for part in ("hip", "thigh"):
            right, left = model.body(f"{end}R_{part}"), model.body(f"{end}L_{part}")
            assert np.allclose(flip @ right.ipos, left.ipos) and np.allclose(
                flip @ right.pos, left.pos
            )
            assert np.allclose(flip @ tensor(right) @ flip, tensor(left), atol=1e-8)


def test_robot_settles_at_26_centimetres():
    model = robot.build_model(EnvConfig(), False, 100, 50)
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, 0)
    mujoco.mj_step(model, data, 1000)
    assert (
        data.qpos[2] == pytest.approx(0.26, abs=0.005)
        and np.abs(data.qvel).max() < 0.05
        and data.ncon == 4
    )


def test_gains_and_time_step_are_those_of_the_configuration():
    config = EnvConfig(kp=20.0, kd=1.5, sim_dt=0.002)
    model = robot.build_model(config, False, 100, 50)
    assert np.allclose(model.actuator_gainprm[:, 0], 20.0) and np.allclose(
        model.actuator_biasprm[:, 1], -20.0
    )
    assert (
        np.allclose(model.dof_damping[6:], 1.5)
        and model.opt.timestep == 0.002
        and config.substeps == 10
    )


def test_terrain_is_rough_fixed_and_where_mujoco_expects_it():
    heights = robot.terrain_heights()
    assert (
        heights.shape == (256, 256)
        and heights.min() == 0
        and heights.max() == 1
        and heights.std() > 0.1
    )
    assert (
        np.abs(np.diff(heights, axis=0)).max() < 0.4
    )  # neighbours are 8 cm apart: no steps above 2 cm
    assert np.array_equal(heights, robot.terrain_heights())
    model = robot.build_model(EnvConfig(), True, 100, 50)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for row, column in ((20, 200), (128, 37)):  # rows along y, columns along x
        place = np.array([column, row]) / 255 * 20 - 10
        geom = np.zeros(1, np.int32)
        group = np.array([1, 0, 0, 0, 0, 0], np.uint8)
        distance = mujoco.mj_ray(
            model, data, np.array([*place, 5.0]), np.array([0.0, 0, -1]), group, 1, -1, geom, None
        )
        assert (
            5.0 - distance == pytest.approx(0.05 * heights[row, column], abs=1e-3)
            and geom[0] == robot.FLOOR
        )


# --- Reward terms, by hand ------------------------------------------------------------------------
COMMAND, STOP = jnp.array([1.0, -0.5, 0.8]), jnp.array([0.005, 0.0, -0.005])
POSE = jnp.asarray(DEFAULT_POSE)
UP_FEET = jnp.array([[0.0, 0.0, 0.02], [0.0, 0.0, 0.1], [0.0, 0.0, 0.25], [0.0, 0.0, 0.08]])
FEET_VEL = jnp.array([[0.3, 0.4, 9.0], [1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
ON, FIRST = jnp.array([True, False, True, False]), jnp.array([True, False, False, True])
EIGHTHS = jnp.array([0.5, -1.0, 0.25, 0, 0, 0, 0, 0, 0, 0, 0, 0])

TERMS = {  # name -> (function, arguments, value worked out by hand)
    "tracking_lin_vel": (
        task.tracking_lin_vel,
        (COMMAND, jnp.array([0.7, -0.1, 5.0])),
        math.exp(-0.25 / 0.25),
    ),
    "tracking_ang_vel": (
        task.tracking_ang_vel,
        (COMMAND, jnp.array([5.0, 5.0, 0.3])),
        math.exp(-0.25 / 0.25),
    ),
    "lin_vel_z": (task.lin_vel_z, (jnp.array([3.0, 3.0, -0.5]),), 0.25),
    "ang_vel_xy": (task.ang_vel_xy, (jnp.array([0.5, -2.0, 7.0]),), 4.25),
    "orientation": (task.orientation, (jnp.array([0.6, 0.0, 0.8]),), 0.36),
    "dof_pos_limits": (
        task.dof_pos_limits,
        (jnp.array([-1.0, 0.0, 2.5]), jnp.array([-0.8, -0.5, -2.0]), jnp.array([0.8, 0.5, 2.0])),
        0.2 + 0.0 + 0.5,
    ),
    "pose": (task.pose, (POSE.at[0].add(0.5).at[2].add(1.0),), math.exp(-(0.25 + 0.1 * 1.0))),
    "termination": (task.termination, (jnp.array(True),), 1.0),
    "stand_still": (task.stand_still, (STOP, POSE + EIGHTHS), 1.75),
    "torques": (task.torques, (jnp.array([3.0, -4.0, *[0.0] * 10]),), 5.0 + 7.0),
    "action_rate": (task.action_rate, (EIGHTHS, 2 * EIGHTHS), 0.25 + 1.0 + 0.0625),
    "energy": (task.energy, (jnp.array([2.0, -3.0]), jnp.array([-1.0, 2.0])), 8.0),
    # |z - 0.1| sqrt|v|: 0.08 sqrt 0.5 + 0 + 0.15 * 2 + 0
    "feet_clearance": (
        task.feet_clearance,
        (UP_FEET, FEET_VEL),
        0.08 * math.sqrt(0.5) + 0.15 * 2.0,
    ),
    # (0.05 / 0.1 - 1)^2 + (0.3 / 0.1 - 1)^2 of the two that touch down
    "feet_height": (
        task.feet_height,
        (jnp.array([0.05, 0.9, 0.9, 0.3]), FIRST, COMMAND),
        0.25 + 4.0,
    ),
    "feet_slip": (task.feet_slip, (FEET_VEL, ON, COMMAND), 0.25 + 16.0),
    "feet_air_time": (
        task.feet_air_time,
        (jnp.array([0.3, 9.0, 9.0, 0.05]), FIRST, COMMAND),
        0.2 - 0.05,
    ),
}
STAND_TERMS = {
    "height": (task.stand_height, (jnp.array([0.25, 0.0, 0.0]), 0.28), math.exp(-1.0)),
    # nose down by 0.3 against a command of none: gravity (sin 0.3, 0, -cos 0.3) against (0, 0, -1)
    "tilt": (
        task.stand_tilt,
        (jnp.zeros(3), jnp.array([math.sin(0.3), 0.0, -math.cos(0.3)])),
        math.exp(-(math.sin(0.3) ** 2 + (1 - math.cos(0.3)) ** 2) / 0.02),
    ),
}


@pytest.mark.parametrize("name", [*TERMS, *STAND_TERMS])
def test_reward_term_by_hand(name):
    function, arguments, value = (TERMS | STAND_TERMS)[name]
    assert float(function(*arguments)) == pytest.approx(value, rel=1e-5)


def test_terms_that_depend_on_the_command_vanish_where_they_should():
    assert task.stand_still(COMMAND, POSE + EIGHTHS) == 0
    assert task.feet_height(jnp.full(4, 0.5), FIRST, STOP) == 0
    assert task.feet_slip(FEET_VEL, ON, STOP) == 0
    assert task.feet_air_time(jnp.ones(4), FIRST, STOP) == 0
    assert (
        float(
            task.stand_tilt(
                jnp.array([0.3, 0.2, -0.1]), task.stand_gravity(jnp.array([0, 0.2, -0.1]))
            )
        )
        == 1
    )


def test_scales_are_the_published_ones():
    assert task.VELOCITY_REWARDS == {
        "tracking_lin_vel": 1.0,
        "tracking_ang_vel": 0.5,
        "lin_vel_z": -0.5,
        "ang_vel_xy": -0.05,
        "orientation": -5.0,
        "dof_pos_limits": -1.0,
        "pose": 0.5,
        "termination": -1.0,
        "stand_still": -1.0,
        "torques": -2e-4,
        "action_rate": -0.01,
        "energy": -1e-3,
        "feet_clearance": -2.0,
        "feet_height": -0.2,
        "feet_slip": -0.1,
        "feet_air_time": 0.1,
    }
    assert set(TERMS) == set(task.VELOCITY_REWARDS)


# --- One step, worked out from MuJoCo's own state -------------------------------------------------
def replay(env, state, action, world=0):
    """MuJoCo's data (sensors as of the last physics step) after one control step of one world, by plain mj_step."""
    data = mujoco.MjData(env.model)
    data.qpos[:], data.qvel[:] = state.qpos[world], state.qvel[world]
    data.qacc_warmstart[:] = state.warmstart[world]
    data.ctrl[:] = DEFAULT_POSE + 0.5 * np.clip(action, -1, 1)
    mujoco.mj_step(env.model, data, 5)
    return data


def test_reward_and_observation_of_a_step_against_plain_mujoco(flat):
    """Two steps; the second is computed here again, term by term, from MuJoCo's data."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.2, 1.2, (2, 2, 12)).astype(np.float32)  # beyond 1: clipped
    before = flat.step_batch(flat.reset_batch(keys(2)), actions[0])
    before = before._replace(command=jnp.array([[0.5, -0.3, 0.7], [1.0, 0.0, 0.0]]))
    after, before = numpy(flat.step_batch(before, actions[1])), numpy(before)
    data, action, last = (
        replay(flat, before, actions[1][0]),
        np.clip(actions[1][0], -1, 1),
        before.last_action[0],
    )
    assert np.allclose(last, np.clip(actions[0][0], -1, 1))
    assert np.allclose(after.qpos[0], data.qpos, atol=1e-5) and np.allclose(
        after.qvel[0], data.qvel, atol=1e-4
    )
    read = {flat.model.sensor(i).name: data.sensor(i).data for i in range(flat.model.nsensor)}
    q, qd, tau = data.qpos[7:], data.qvel[6:], data.actuator_force
    feet = np.stack([read[f"{leg}_pos"] for leg in LEGS])
    speed = np.stack([read[f"{leg}_vel"] for leg in LEGS])
    contact = np.array([read[f"{leg}_contact"][0] > 0 for leg in LEGS])
    first = (before.air_time[0] > 0) & (contact | before.contact[0])
    air, peak = before.air_time[0] + 0.02, np.maximum(before.swing_peak[0], feet[:, 2])
    command = before.command[0]
    limits = flat.model.jnt_range[1:] * 0.95
    expected = {
        "tracking_lin_vel": np.exp(-((command[:2] - read["linvel"][:2]) ** 2).sum() / 0.25),
        "tracking_ang_vel": 0.5 * np.exp(-((command[2] - read["gyro"][2]) ** 2) / 0.25),
        "lin_vel_z": -0.5 * read["world_linvel"][2] ** 2,
        "ang_vel_xy": -0.05 * (read["world_angvel"][:2] ** 2).sum(),
        "orientation": -5.0 * (read["up"][:2] ** 2).sum(),
        "dof_pos_limits": -np.sum(
            np.clip(limits[:, 0] - q, 0, None) + np.clip(q - limits[:, 1], 0, None)
        ),
        "pose": 0.5 * np.exp(-((q - DEFAULT_POSE) ** 2 * np.array([1, 1, 0.1] * 4)).sum()),
        "termination": 0.0,
        "stand_still": 0.0,
        "torques": -2e-4 * (np.sqrt((tau**2).sum()) + np.abs(tau).sum()),
        "action_rate": -0.01 * ((action - last) ** 2).sum(),
        "energy": -1e-3 * (np.abs(qd) * np.abs(tau)).sum(),
        "feet_clearance": -2.0
        * (np.abs(feet[:, 2] - 0.1) * np.sqrt(np.linalg.norm(speed[:, :2], axis=1))).sum(),
        "feet_height": -0.2 * ((peak / 0.1 - 1) ** 2 * first).sum(),
        "feet_slip": -0.1 * ((speed[:, :2] ** 2).sum(1) * contact).sum(),
        "feet_air_time": 0.1 * ((air - 0.1) * first).sum(),
    }
    for name, value in expected.items():
        assert after.metrics[f"reward/{name}"][0] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    assert after.reward[0] == pytest.approx(
        max(0.0, sum(expected.values()) * 0.02), rel=2e-3, abs=1e-5
    )
    distance = np.linalg.norm(command[:2] - read["linvel"][:2])
    assert after.metrics["lin_vel_error"][0] == pytest.approx(distance, rel=1e-3)
    assert after.metrics["yaw_vel_error"][0] == pytest.approx(
        abs(command[2] - read["gyro"][2]), rel=1e-3
    )
    turn = data.site("imu").xmat.reshape(3, 3)  # as of the last physics step, like the sensors
    gravity = turn.T @ [0.0, 0.0, -1.0]
    state48 = np.concatenate(
        [
            read["linvel"],
            read["gyro"],
            gravity,
            q - DEFAULT_POSE,
            qd,
            action,
            after.command[0],
        ]
    )
    privileged = np.concatenate(
        [
            state48,
            read["gyro"],
            read["accelerometer"],
            gravity,
            read["linvel"],
            read["world_angvel"],
            q - DEFAULT_POSE,
            qd,
            tau,
            contact,
            speed.ravel(),
            air,
            np.zeros(4),
        ]
    )
    seen = after.obs["privileged_state"][0]
    assert (
        seen.shape == (123,) and np.abs(seen - privileged).max() < 5e-3 * np.abs(privileged).max()
    )
    assert np.allclose(seen, privileged, rtol=5e-3, atol=5e-4)
    assert np.array_equal(after.obs["state"], after.obs["privileged_state"][:, :48])
    assert np.allclose(after.air_time[0], air * ~contact) and np.allclose(
        after.swing_peak[0], peak * ~contact
    )


def test_first_observation_is_what_the_sensors_would_read(flat):
    """The closed form at an episode's start against mj_forward: all but accelerometer, torques and contact."""
    state = numpy(flat.reset_batch(keys(3, 5)))
    for world in range(3):
        data = mujoco.MjData(flat.model)
        data.qpos[:], data.qvel[:], data.ctrl[:] = (
            state.qpos[world],
            state.qvel[world],
            DEFAULT_POSE,
        )
        mujoco.mj_forward(flat.model, data)
        seen = state.obs["privileged_state"][world]
        up = data.sensor("world_up").data
        for at, value in (
            (0, data.sensor("linvel").data),
            (3, data.sensor("gyro").data),
            (6, -up),
            (9, np.zeros(12)),
            (48, data.sensor("gyro").data),
            (51, 9.81 * up),
            (54, -up),
            (57, data.sensor("linvel").data),
            (60, data.sensor("world_angvel").data),
            (87, data.actuator_force),
            (99, [data.sensor(f"{leg}_contact").data[0] > 0 for leg in LEGS]),
            (103, np.concatenate([data.sensor(f"{leg}_vel").data for leg in LEGS])),
        ):
            assert np.allclose(seen[at : at + len(value)], value, atol=1e-5), at
        assert np.array_equal(seen[45:48], state.command[world]) and not seen[33:45].any()


def test_foot_positions_in_closed_form(flat):
    rng, data = np.random.default_rng(1), mujoco.MjData(flat.model)
    low, high = flat.model.jnt_range[1:].T
    for _ in range(5):
        data.qpos[3], data.qpos[7:] = 1.0, rng.uniform(low, high)
        mujoco.mj_kinematics(flat.model, data)
        feet = np.stack([data.site(f"{leg}_foot").xpos for leg in LEGS]) - data.qpos[:3]
        assert np.allclose(robot.foot_positions(jnp.asarray(data.qpos[7:])), feet, atol=1e-6)


def test_quaternion_and_rotation_agree_with_mujoco():
    angles, turn, quat = (0.3, -0.7, 2.1), np.zeros(9), np.array([1.0, 0, 0, 0])
    for axis, angle in zip(
        np.eye(3)[::-1], angles[::-1], strict=True
    ):  # Rz(yaw) Ry(pitch) Rx(roll)
        one, product = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(one, axis, angle)
        mujoco.mju_mulQuat(product, quat, one)
        quat = product
    mujoco.mju_quat2Mat(turn, quat)
    assert np.allclose(robot.quaternion(*map(jnp.asarray, angles)), quat, atol=1e-6)
    assert np.allclose(robot.rotation(jnp.asarray(3 * quat)), turn.reshape(3, 3), atol=1e-6)


# --- Episodes -------------------------------------------------------------------------------------
def assert_fresh(env, state, world):
    """Every number of the episode is at its start, and what is seen belongs to the new episode."""
    for name in (
        "last_action",
        "air_time",
        "swing_peak",
        "warmstart",
        "returns",
        "length",
        "clock",
    ):
        assert not getattr(state, name)[world].any(), name
    assert state.qpos[world, 2] == pytest.approx(0.278) and np.allclose(
        state.qpos[world, 7:], DEFAULT_POSE
    )
    seen = state.obs["privileged_state"][world]
    assert (
        np.array_equal(seen[45:48], state.command[world])
        and not seen[33:45].any()
        and not seen[9:33].any()
    )
    assert np.array_equal(seen[99:103], state.contact[world]) and not seen[115:119].any()
    turn = np.array(robot.rotation(state.qpos[world, 3:7]))
    assert np.allclose(seen[54:57], -turn[2], atol=1e-6)
    assert not np.allclose(state.final_obs["privileged_state"][world], seen)


def test_time_out_is_told_apart_and_the_last_observation_kept(flat):
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (6, 4, 12)).astype(np.float32)
    states = [flat.reset_batch(keys(4), stagger=True)]
    assert states[0].clock.tolist() == [0, 1, 3, 4]
    rewards, ended = np.zeros((6, 4)), np.zeros((6, 4), bool)
    for t in range(6):
        states.append(flat.step_batch(states[-1], actions[t]))
        rewards[t], ended[t] = states[-1].reward, states[-1].truncated
    assert ended.T.tolist() == [[t == last for t in range(6)] for last in (5, 4, 2, 1)]
    for world, last in enumerate((5, 4, 2, 1)):
        state, before = numpy(states[last + 1]), numpy(states[last])
        assert not state.terminated[world] and state.episode_length[world] == last + 1
        assert state.episode_return[world] == pytest.approx(
            rewards[: last + 1, world].sum(), rel=1e-5
        )
        assert_fresh(flat, state, world)
        data = replay(
            flat, before, actions[last][world], world
        )  # final_obs is of the state before the reset
        final = state.final_obs["privileged_state"][world]
        assert np.allclose(final[75:87], data.qvel[6:], atol=1e-2)
        assert np.array_equal(final[33:45], actions[last][world])
        for other in set(range(4)) - {w for w, at in enumerate((5, 4, 2, 1)) if at == last}:
            assert all(
                np.array_equal(state.final_obs[k][other], state.obs[k][other]) for k in state.obs
            )


def test_fall_ends_the_episode_without_time_out(flat):
    state = flat.reset_batch(keys(2))
    state = flat.step_batch(state, jnp.full((2, 12), 0.1))
    over = state.qpos.at[0, 3:7].set(jnp.array([0.0, 1.0, 0.0, 0.0]))  # on its back
    before, state = state, numpy(flat.step_batch(state._replace(qpos=over), jnp.zeros((2, 12))))
    assert state.terminated.tolist() == [True, False] and not state.truncated.any()
    assert (
        state.metrics["reward/termination"].tolist() == [-1.0, 0.0] and state.episode_length[0] == 2
    )
    assert state.final_obs["privileged_state"][0, 56] > 0.9  # gravity points to its back
    assert_fresh(flat, state, 0)
    assert state.length[1] == 2 and not np.array_equal(state.qpos[0, :7], before.qpos[0, :7])


@pytest.mark.parametrize("speed", [np.nan, 5e3])
def test_diverged_world_is_restarted_alone(flat, speed):
    start = flat.step_batch(flat.reset_batch(keys(3)), jnp.zeros((3, 12)))
    broken = start._replace(qvel=start.qvel.at[1, 8].set(speed))
    state, whole = (numpy(flat.step_batch(s, jnp.zeros((3, 12)))) for s in (broken, start))
    assert state.metrics["nan"].tolist() == [0, 1, 0] and state.truncated.tolist() == [
        False,
        True,
        False,
    ]
    assert not state.terminated.any() and state.reward[1] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.array_equal(
        state.final_obs["state"][1], start.obs["state"][1]
    )  # the last that was sound
    assert_fresh(flat, state, 1)
    for world in (0, 2):
        assert all(
            np.array_equal(a[world], b[world])
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True)
        )


def test_the_same_keys_give_the_same_run(flat):
    def run():
        state = flat.reset_batch(keys(2, 7))
        for _ in range(8):
            state = flat.step_batch(state, jnp.full((2, 12), 0.2))
        return numpy(state)

    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (run(), run())), strict=True)
    )


def test_starts_are_spread_as_published(flat):
    state = numpy(flat.reset_batch(keys(500, 3)))
    assert np.abs(state.qpos[:, :2]).max() <= 0.5 and np.abs(
        state.qpos[:, :2]
    ).mean() == pytest.approx(0.25, abs=0.02)
    yaw = 2 * np.arctan2(state.qpos[:, 6], state.qpos[:, 3])
    assert np.abs(np.exp(1j * yaw).mean()) < 0.1  # all directions
    assert np.abs(state.qvel[:, :6]).max() <= 0.5 and not state.qvel[:, 6:].any()
    for axis, largest in enumerate((1.5, 0.8, 1.2)):
        size = np.abs(state.command[:, axis])
        assert size.max() <= largest and size.mean() == pytest.approx(largest / 2, rel=0.1)
    assert state.command_timer.mean() == pytest.approx(250, rel=0.15)  # 5 s


def test_commands_change_as_published(flat):
    def later(key, timer):
        return flat._next_command(Draws(key, 16), jnp.array([9.0, 9.0, 9.0]), timer)

    command, timer = (np.array(x) for x in jax.vmap(later, (0, None))(keys(4000), 0))
    assert (command == 9).mean(0) == pytest.approx([0.5] * 3, abs=0.03)  # kept with probability 1/2
    assert (command == 0).mean(0) == pytest.approx(
        [0.05, 0.375, 0.25], abs=0.03
    )  # the other half, times 1 - b
    new = np.where((command == 9) | (command == 0), np.nan, command)
    assert np.nanmax(np.abs(new), 0) == pytest.approx([1.5, 0.8, 1.2], rel=0.02)
    assert timer.mean() == pytest.approx(250, rel=0.06) and timer.std() == pytest.approx(
        250, rel=0.1
    )
    command, timer = later(jax.random.key(0), 3)
    assert command.tolist() == [9, 9, 9] and timer == 3


def test_noise_has_the_published_ranges():
    env = Go1Env("Go1JoystickFlat", EnvConfig(noise_level=2.0), "mujoco-c", threads=1)
    noise = np.array(jax.vmap(lambda key: env._noise(Draws(key, 40)))(keys(2000)))
    scale = 2.0 * np.repeat([0.1, 0.2, 0.05, 0.03, 1.5], [3, 3, 3, 12, 12])
    assert (np.abs(noise) <= scale).all() and np.abs(noise).max(0) == pytest.approx(scale, rel=0.02)
    assert noise.mean(0) == pytest.approx(np.zeros(33), abs=0.06 * scale.max())
    state = env.reset(jax.random.key(0))
    seen = np.array(state.obs["privileged_state"])
    clean = np.concatenate([seen[57:60], seen[48:51], seen[54:57], seen[63:87]])
    assert 0 < np.abs(seen[:33] - clean).max() and (np.abs(seen[:33] - clean) <= scale + 1e-6).all()


# --- Randomisation, pushes, latency ---------------------------------------------------------------
def test_randomisation_changes_what_it_says_and_nothing_else(varied):
    state = varied.reset_batch(keys(40, 1))
    models, nominal = varied.physics.models_for(state.dr), varied.physics.model
    names = [name for name in dir(nominal) if isinstance(getattr(nominal, name), np.ndarray)]
    changed = {
        n
        for n in names
        if any(not np.array_equal(getattr(m, n), getattr(nominal, n)) for m in models)
    }
    assert changed == {
        "geom_friction",
        "dof_frictionloss",
        "dof_armature",
        "dof_damping",
        "body_ipos",
        "body_mass",
        "qpos0",
        "actuator_gainprm",
        "actuator_biasprm",
    }

    def ratio(name, *index):
        values = np.stack([getattr(model, name)[index] for model in models])
        return values / getattr(nominal, name)[index]

    def spans(values, low, high):
        width = high - low
        assert (
            low - 1e-6 <= values.min() < low + 0.2 * width
            and high - 0.2 * width < values.max() <= high + 1e-6
        )

    spans(np.stack([m.geom_friction[0, 0] for m in models]), 0.4, 1.0)
    spans(ratio("dof_frictionloss", slice(6, None)), 0.9, 1.1)
    spans(ratio("dof_armature", slice(6, None)), 1.0, 1.05)
    spans(np.stack([m.body_ipos[1] - nominal.body_ipos[1] for m in models]), -0.05, 0.05)
    spans(ratio("body_mass", slice(2, None)), 0.9, 1.1)
    spans(np.stack([m.body_mass[1] for m in models]) - 5.204, -1.0 - 0.52, 1.0 + 0.52)
    spans(np.stack([m.qpos0[7:] for m in models]), -0.05, 0.05)
    spans(ratio("actuator_gainprm", slice(None), 0), 0.9, 1.1)
    spans(ratio("dof_damping", slice(6, None)), 0.5, 1.5)
    for m in models:
        assert np.allclose(m.actuator_biasprm[:, 1], -m.actuator_gainprm[:, 0])
        assert np.allclose(m.geom_friction[1:], nominal.geom_friction[1:], rtol=1e-6)
        assert np.allclose(m.body_ipos[2:], nominal.body_ipos[2:], rtol=1e-6)
        assert np.allclose(m.qpos0[:7], nominal.qpos0[:7], rtol=1e-6)
        assert not (
            m.dof_damping[:6].any() or m.dof_armature[:6].any() or m.dof_frictionloss[:6].any()
        )


def test_constants_stay_for_the_run_and_none_are_drawn_by_default(varied, flat):
    state = varied.reset_batch(keys(4))
    over = state._replace(clock=jnp.full(4, 999, jnp.int32))
    after = varied.step_batch(over, jnp.zeros((4, 12)))
    assert after.truncated.all()
    assert all(np.array_equal(after.dr[name], state.dr[name]) for name in state.dr)
    assert varied.physics.models_for(after.dr) is varied.physics.models_for(state.dr)
    assert flat.reset_batch(keys(4)).dr == {} and len(flat.physics.models_for({})) == 1


def test_push_has_the_impulse_of_its_speed(varied):
    """Half a sine of height 0.5 m v / T over T: impulse m v / pi, in the drawn direction, after the wait."""
    push = jnp.array([0.0, 0.1, 0.2, 3.0, math.pi / 2])
    times = np.arange(0.0, 0.5, 0.001)
    force = np.array(jax.vmap(lambda t: varied.push_force(push.at[0].set(t)))(jnp.asarray(times)))
    assert force.sum(0) * 0.001 == pytest.approx([0.0, varied.mass * 3.0 / math.pi, 0.0], abs=0.01)
    assert (
        not force[times < 0.1].any()
        and not force[times > 0.3].any()
        and force[:, 1].max() == pytest.approx(0.5 * varied.mass * 3.0 / 0.2, rel=1e-3)
    )


def test_push_acts_on_the_trunk_and_is_seen_by_the_critic(varied):
    state = varied.reset_batch(keys(2))
    pushes = jnp.array(
        [[0.05, 0.0, 0.1, 10.0, 0.0], [0.0, 9.0, 0.1, 10.0, 0.0]]
    )  # world 0 in the middle of one
    start = jnp.tile(state.qvel[:1].at[:, :6].set(0.0), (2, 1))
    pose = jnp.tile(
        jnp.asarray(varied.model.key_qpos[0], jnp.float32).at[2].set(1.0), (2, 1)
    )  # in the air
    dr = jax.tree.map(lambda x: jnp.tile(x[:1], (2,) + (1,) * (x.ndim - 1)), state.dr)
    state = state._replace(push=pushes, qvel=start, qpos=pose, dr=dr, delay=jnp.zeros(2, jnp.int32))
    after = numpy(varied.step_batch(state, jnp.zeros((2, 12))))
    force = 0.5 * varied.mass * 10.0 / 0.1  # at the top of the sine
    assert after.obs["privileged_state"][:, 119:] == pytest.approx(
        np.array([[force, 0, 0, 1], [0, 0, 0, 0]]), rel=1e-4
    )
    mass = varied.physics.models_for(dr)[0].body_mass.sum()
    momentum = after.qvel[0, 0] - after.qvel[1, 0]
    assert momentum == pytest.approx(force * 0.02 / mass, rel=0.2)  # the legs lag behind the trunk
    assert after.push[0, 0] == pytest.approx(0.07) and after.push[1, 0] == pytest.approx(0.02)


def test_next_push_is_drawn_anew_with_its_wait(varied):
    over = jnp.array([0.11, 0.01, 0.11, 2.0, 1.0])  # ends within this step
    drawn = np.array(jax.vmap(lambda key: varied._next_push(Draws(key, 8), over))(keys(300)))
    assert not drawn[:, 0].any()
    for column, (low, high) in enumerate(
        ((0.0, 0.02), (0.05, 0.2), (0.0, 3.0), (0.0, 2 * math.pi)), start=1
    ):
        assert (
            low <= drawn[:, column].min()
            and drawn[:, column].max() <= high
            and np.ptp(drawn[:, column]) > 0.9 * (high - low)
        )


def test_latency_holds_the_old_target_for_so_many_physics_steps(varied):
    state = jax.tree.map(lambda x: x[0], varied.reset_batch(keys(1)))
    state = state._replace(last_action=jnp.full(12, 0.5), delay=jnp.int32(2))
    targets, _ = varied.targets(state, jnp.full(12, -3.0))
    assert np.allclose(
        targets - DEFAULT_POSE,
        np.repeat([0.25, 0.25, -0.5, -0.5, -0.5], 12).reshape(5, 12),
        atol=1e-6,
    )
    delays = np.array(varied.reset_batch(keys(200)).delay)
    assert set(delays) == {0, 1, 2, 3, 4, 5}


# --- Back ends ------------------------------------------------------------------------------------
def compare(back_end, reference, worlds, steps):
    """Greatest difference in positions, velocities, privileged observations, and of the rewards, over some steps."""
    state, other = back_end.reset_batch(keys(worlds, 1)), reference.reset_batch(keys(worlds, 1))
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, other)), strict=True)
    )
    rng, worst = np.random.default_rng(0), np.zeros(4)
    for _ in range(steps):
        actions = jnp.asarray(rng.uniform(-0.7, 0.7, (worlds, 12)), jnp.float32)
        state, other = back_end.step_batch(state, actions), reference.step_batch(other, actions)
        pairs = [(getattr(state, k), getattr(other, k)) for k in ("qpos", "qvel", "reward")]
        pairs.insert(2, (state.obs["privileged_state"], other.obs["privileged_state"]))
        worst = np.maximum(worst, [np.abs(np.array(a) - np.array(b)).max() for a, b in pairs])
    assert np.array_equal(state.contact, other.contact) and other.contact.any()
    return worst


def test_mjx_equals_c_step_for_step(varied):
    """With everything that can vary, six control steps, contacts included; one program for all of them."""
    env = Go1Env("Go1JoystickFlat", VARIED, "mjx-jax")
    worst = compare(env, varied, worlds=3, steps=6)
    assert (worst < [1e-4, 5e-3, 5e-3, 1e-5]).all(), worst
    assert env._step._cache_size() == 1  # State's types are the same after reset and after step


@pytest.mark.slow
def test_mjx_warp_equals_c_step_for_step(varied):
    pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')
    worst = compare(Go1Env("Go1JoystickFlat", VARIED, "mjx-warp"), varied, worlds=4, steps=6)
    assert (worst < [1e-4, 5e-3, 5e-3, 1e-5]).all(), worst


def test_a_step_in_c_can_stand_in_a_jitted_scan(varied):
    """Training calls the C library back from its compiled program; step by step it is the same."""
    start, actions = varied.reset_batch(keys(4)), jnp.full((4, 12), 0.3)

    def step(state, _):
        return varied.step_batch(state, actions), None

    scanned, _ = jax.jit(lambda state: jax.lax.scan(step, state, None, 3))(start)
    state = start
    for _ in range(3):
        state = varied.step_batch(state, actions)
    assert not np.array_equal(state.qpos, start.qpos)
    for ours, theirs in zip(*map(jax.tree.leaves, (scanned, state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_left_out_of_the_simulated_model_changes_no_bit(flat):
    """Shapes that are only drawn, and the search for islands, cost time; the robot moves the same."""
    state = flat.step_batch(flat.reset_batch(keys(4)), jnp.full((4, 12), 0.3))
    targets, force = flat._targets(state, jnp.full((4, 12), -0.4))
    given = state.qpos, state.qvel, state.warmstart, targets, force, {}
    whole = Go1Env("Go1JoystickFlat", EnvConfig(**STILL), "mujoco-c", threads=1).physics
    lean, whole.model = whole.model, flat.model
    whole.model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
    assert whole.model.ngeom == 34 and lean.ngeom == 5
    for ours, theirs in zip(flat.physics.run(*given), whole.run(*given), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_warning_of_the_c_library_is_counted(flat):
    """A target that is no number is its one warning, without divergence, that can be provoked here.

    It stops the clock of that robot alone, as full contacts would; one that diverges is not counted.
    """
    state = flat.step_batch(flat.reset_batch(keys(3)), jnp.zeros((3, 12)))
    targets, force = flat._targets(state, jnp.zeros((3, 12)))
    given = state.qpos, state.qvel.at[2, 8].set(1e11), state.warmstart
    assert not flat.physics.run(*given, targets, force, {})[-1].any()
    *_, overflow = flat.physics.run(*given, targets.at[1, 2].set(jnp.nan), force, {})
    assert overflow.tolist() == [False, True, False]


@pytest.mark.slow
def test_contacts_that_do_not_fit_are_counted_in_warp():
    """Room for the contacts of one robot, four, where two stand on the floor."""
    pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')
    found = []
    for room in (2, 1):
        env = Go1Env("Go1JoystickFlat", EnvConfig(warp_worlds=room, **STILL), "mjx-warp")
        state = env.reset_batch(keys(2))
        qpos = state.qpos.at[:, 2].set(0.24).at[:, 3:7].set(jnp.eye(4)[0])
        state = env.step_batch(state._replace(qpos=qpos), jnp.zeros((2, 12)))
        found.append(float(state.metrics["overflow"].sum()))
    assert found[0] == 0 and found[1] > 0


def test_c_lives_on_the_cpu_and_serves_several_threads(varied):
    """Whatever the default device is; two callers at once get what one after the other would."""
    with varied._device():
        assert jax.config.jax_default_device.platform == "cpu"
    states = [varied.reset_batch(keys(8, seed)) for seed in (1, 2)]
    actions = jnp.full((8, 12), 0.2)
    alone = [varied.step_batch(state, actions) for state in states]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda state: varied.step_batch(state, actions), states * 4))
    for ours, theirs in zip(together, alone * 4, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert np.array_equal(a, b)


def test_action_rate_is_the_speed_of_the_targets(flat):
    state = flat.reset_batch(keys(2))
    actions = jnp.zeros((2, 12)).at[0, :6].set(0.2)
    after = flat.step_batch(state, actions)
    assert after.metrics["action_rate"] == pytest.approx([0.1 * 0.5 / 0.02, 0.0])


def test_threads_do_not_change_the_result(varied):
    one = Go1Env("Go1JoystickFlat", VARIED, "mujoco-c", threads=1)
    assert not compare(one, varied, worlds=4, steps=2).any()


def test_linear_velocity_can_be_left_out(varied):
    state = varied.reset_batch(keys(1))
    assert varied.obs_dim == 45 and state.obs["privileged_state"].shape == (1, 123)
    assert np.array_equal(state.obs["state"], state.obs["privileged_state"][:, 3:48])
    assert (
        varied.spec["state_layout"][0] == ["gyro", 3]
        and sum(n for _, n in varied.spec["state_layout"]) == 45
    )


# --- The other tasks ------------------------------------------------------------------------------
def test_rough_terrain_carries_the_robot_and_ends_at_its_edge():
    env = Go1Env("Go1JoystickRough", EnvConfig(iterations=10, **STILL), "mujoco-c", threads=1)
    state = env.reset_batch(keys(4))
    assert np.allclose(state.qpos[:, 2], 0.35) and not state.contact.any()
    state = state._replace(qvel=jnp.zeros((4, 18)))
    for _ in range(40):
        state = env.step_batch(state, jnp.zeros((4, 12)))
    assert state.contact.sum() >= 12 and (np.abs(state.qpos[:, 2] - 0.285) < 0.03).all()
    assert not state.metrics["nan"].any()
    state = env.step_batch(state._replace(qpos=state.qpos.at[0, 0].set(9.51)), jnp.zeros((4, 12)))
    assert state.truncated.tolist() == [True, False, False, False] and not state.terminated.any()
    assert (jnp.abs(state.qpos[:, :2]) < 1.0).all()


def scripted(command):
    """Action (12,) that holds the trunk at the commanded height, roll and pitch: inverse kinematics of the four legs,
    3 cm higher, since the servos give way under the robot's weight."""
    height, roll, pitch = (float(x) for x in command)
    turn = np.array(robot.rotation(robot.quaternion(*map(jnp.asarray, (roll, pitch, 0.0)))))
    feet = np.array(robot.foot_positions(POSE))
    feet[:, 2] = robot.FOOT_RADIUS - height - 0.03
    x, y, z = (feet @ turn - robot.HIP).T
    side = robot.SIDE * robot.ABDUCTION
    below = np.sqrt(y**2 + z**2 - side**2)
    calf = -np.arccos(np.clip((x**2 + below**2) / (2 * 0.213**2) - 1, -1, 1))
    joints = np.stack(
        [np.arctan2(y, -z) - np.arctan2(side, below), np.arctan2(-x, below) - calf / 2, calf], 1
    ).ravel()
    return np.clip((joints - DEFAULT_POSE) / 0.5, -1, 1)


def test_stand_can_be_solved_and_is_not_solved_by_doing_nothing():
    env = Go1Env("Go1Stand", EnvConfig(**STILL), "mujoco-c", threads=1)
    assert env.episode_length == 200 and set(env.task.rewards) <= {k[7:] for k in env.metric_names}
    returns = {}
    for name in ("scripted", "nothing"):
        state, run = env.reset_batch(keys(16)), np.zeros(16, bool)
        actions = np.stack(
            [scripted(c) if name == "scripted" else np.zeros(12) for c in np.array(state.command)]
        )
        score = np.zeros(16)
        for _ in range(200):
            state = env.step_batch(state, actions.astype(np.float32))
            ended = np.array(state.terminated | state.truncated) & ~run
            score, run = np.where(ended, state.episode_return, score), run | ended
        returns[name] = score.mean()
    assert returns["scripted"] > 5.5 and returns["nothing"] < 4.0, returns  # of 8


def test_stand_rewards_are_of_its_own_quantities():
    """Trunk 2 cm below and 0.1 rad nose down of the command, moving; by hand."""
    env = Go1Env("Go1Stand", EnvConfig(**STILL), "mujoco-c", threads=1)
    m = {
        "torque": jnp.zeros(12),
        "world_up": jnp.array([-math.sin(0.1), 0.0, math.cos(0.1)]),
        "world_linvel": jnp.array([0.3, -0.4, 9.0]),
        "world_angvel": jnp.array([9.0, 9.0, 0.5]),
        "gyro": jnp.ones(3),
        "linvel": jnp.array([0.6, 0.8, 0.0]),
    }
    state = env.reset(jax.random.key(0))._replace(command=jnp.array([0.25, 0.0, 0.0]))
    qpos = state.qpos.at[2].set(0.23)
    terms = env._terms(
        state, jnp.zeros(12), qpos, state.qvel, m, jnp.array(False), None, None, None
    )
    tilt = math.exp(-(math.sin(0.1) ** 2 + (1 - math.cos(0.1)) ** 2) / 0.02)
    expected = {
        "height": math.exp(-((2 / 3) ** 2)),
        "tilt": tilt,
        "lin_vel_xy": 0.25,
        "ang_vel_z": 0.25,
        "termination": 0.0,
        "action_rate": 0.0,
        "energy": 0.0,
    }
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected, rel=1e-4)
    errors = {k: float(v) for k, v in env._errors(state.command, m, qpos).items()}
    assert errors == pytest.approx(
        {"lin_vel_error": 1.0, "yaw_vel_error": 1.0, "height_error": 0.02, "tilt_error": 0.1},
        rel=1e-3,
    )


# --- Errors, images, Playground -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sim_dt": 0.003}, "does not divide ctrl_dt"),
        ({"episode_length": 0}, "episode_length must be at least 1"),
        ({"kp": 0.0}, "kp must be positive"),
        ({"push_speed": (3.0, 1.0)}, "push_speed must be a range"),
        ({"push_duration": (0.0, 1.0)}, "push_duration must be positive"),
        ({"action_latency": (0.0, 0.03)}, "action_latency is at most ctrl_dt"),
        ({"noise_level": -1.0}, "must not be negative"),
    ],
)
def test_configuration_that_cannot_be_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        EnvConfig(**options)
    assert "\n" not in str(error.value)


def test_a_task_or_back_end_that_does_not_exist_is_one_line():
    for arguments, message in (
        (("Go1Fly",), "no task is called Go1Fly"),
        (("Go1Stand", "mjx"), "no back end is called mjx"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            go1.make(*arguments)
        assert "\n" not in str(error.value)


def test_images_show_the_robot(flat, monkeypatch):
    renderers = {name: check.ask(name) for name in ("egl", "warp-renderer")}
    if not renderers["egl"].works:
        pytest.skip("MuJoCo Warp's renderer compiles for minutes; sudo apt-get install libegl1")
    monkeypatch.setattr(check, "ask", renderers.get)
    qpos = np.array(flat.reset_batch(keys(2)).qpos)
    images = flat.render(qpos, (72, 96))
    assert images.shape == (2, 72, 96, 3) and images.dtype == np.uint8 and images.std() > 10
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(flat.render(qpos[:1], (72, 96)), images[:1])
    none = {name: check.Result(False, f"no {name}") for name in renderers}
    monkeypatch.setattr(check, "ask", none.get)
    with pytest.raises(
        RuntimeError, match="no image can be drawn here: EGL: no egl; MuJoCo"
    ) as error:
        Renderer(flat.model, 64, 64)
    assert "\n" not in str(error.value)


def has_playground() -> bool:
    try:
        import mujoco_playground  # noqa: F401
    except ImportError:
        return False
    return True


needs_playground = pytest.mark.skipif(
    not has_playground() or "GO1_PLAYGROUND_ASSETS" not in os.environ,
    reason="pip install playground==0.2.0, with MuJoCo Menagerie where it looks, and set GO1_PLAYGROUND_ASSETS=1",
)


@pytest.mark.slow
@needs_playground
def test_reward_terms_equal_those_of_playground():
    """Same states and actions: all sixteen terms, the reward, and the observation but for last action and contact."""
    from mujoco_playground import registry

    overrides = {"impl": "jax", "noise_config.level": 0.0}
    theirs, ours = (
        registry.load("Go1JoystickFlatTerrain", config_overrides=overrides),
        Go1Env("Go1JoystickFlat", EnvConfig(**STILL)),
    )
    for name in (
        "body_mass",
        "body_inertia",
        "body_ipos",
        "body_iquat",
        "body_pos",
        "jnt_range",
        "dof_damping",
        "dof_armature",
        "dof_frictionloss",
        "actuator_gainprm",
        "actuator_biasprm",
        "actuator_forcerange",
        "actuator_ctrlrange",
        "body_invweight0",
        "dof_invweight0",
    ):
        assert np.allclose(getattr(theirs.mj_model, name), getattr(ours.model, name), rtol=1e-6), (
            name
        )
    their_step = jax.jit(theirs.step)
    a, b = jax.jit(theirs.reset)(jax.random.PRNGKey(3)), ours.reset_batch(keys(1))
    a.info["steps_until_next_cmd"] = jnp.int32(10**6)
    timer, none = jnp.full(1, 10**6, jnp.int32), jnp.zeros((1, 4), bool)
    b = b._replace(command=a.info["command"][None], command_timer=timer, contact=none)
    rng = np.random.default_rng(0)
    for step in range(20):
        data = a.data
        warmstart = data.qacc_warmstart[None]
        b = b._replace(qpos=data.qpos[None], qvel=data.qvel[None], warmstart=warmstart)
        action = jnp.asarray(rng.uniform(-1, 1, 12) * min(step / 20, 0.8), jnp.float32)
        a, b = their_step(a, action), ours.step_batch(b, action[None])
        for name in ours.task.rewards:
            assert float(b.metrics[f"reward/{name}"][0]) == pytest.approx(
                float(a.metrics[f"reward/{name}"]), rel=1e-3, abs=1e-4
            ), name
        assert float(b.reward[0]) == pytest.approx(float(a.reward), rel=1e-3, abs=1e-5)
        same = np.r_[0:33, 45:99, 103:123]
        assert np.allclose(
            b.final_obs["privileged_state"][0, same],
            a.obs["privileged_state"][same],
            rtol=1e-3,
            atol=1e-3,
        )
