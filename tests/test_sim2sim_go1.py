"""A walking policy on another Go1: the same robot as in training where nothing differs, and what differs where it does.

The policies have random weights, or none: zero actions stand in the default pose.
"""

import ast
import csv
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("mujoco", reason='needs MuJoCo: pip install -e ".[go1]"')
from hardware import export_go1
from hardware import sim2sim_go1 as sim
from hardware.emulator import VirtualClock
from hardware.sim2sim_go1 import COMMANDS, Condition, Go1, Policy, Sim2SimError, Trial, judge, trial

SCRIPT = ROOT / "hardware/sim2sim_go1.py"
JOINTS = [
    f"{leg}_{joint}" for leg in ("FR", "FL", "RR", "RL") for joint in ("hip", "thigh", "calf")
]
SPEC = {
    "task": "Go1JoystickFlat",
    "joints": JOINTS,
    "control_hz": 50.0,
    "kp": 35.0,
    "kd": 0.5,
    "action_scale": 0.5,
    "default_pose": [0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2,
    "torque_limits": [23.7, 23.7, 35.55] * 4,
    "joint_limits": [[-0.863, 0.863], [-0.686, 4.501], [-2.818, -0.888]] * 4,
    "state_layout": sim.LAYOUT,
}


def write_policy(path: Path, scale: float = 0.1, hidden=(16, 8), spec=None, least=0.5) -> Path:
    """A checkpoint as algos/ppo_mjx_go1.py writes it, with random weights; scale 0: zero actions."""
    spec = SPEC | (spec or {})
    size = sum(n for _, n in spec["state_layout"])
    rng, widths = np.random.default_rng(0), (size, *hidden, 24)
    mean, var = rng.normal(0, 0.3, size), rng.uniform(least, 2, size) ** 2
    content = {"stats/state/mean": mean, "stats/state/var": var}
    for i, (n, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        last = scale if i == len(hidden) else 1.0
        content[f"params/actor/layers/{i}/kernel"] = last * rng.normal(0, n**-0.5, (n, m))
        content[f"params/actor/layers/{i}/bias"] = last * rng.normal(0, 0.1, m)
    meta = {
        "algo": "ppo_mjx_go1",
        "spec": spec,
        "shapes": {"action": 12},
        "args": {"hidden": list(hidden)},
    }
    np.savez(
        path,
        meta=json.dumps(meta),
        **{name: value.astype(np.float32) for name, value in content.items()},
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def policy(folder):
    return Policy(write_policy(folder / "random.npz"))


@pytest.fixture(scope="module")
def standing(folder):
    return Policy(write_policy(folder / "zero.npz", scale=0.0))


# --- The robot of training ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def training():
    """envs/go1 in C MuJoCo without noise, one robot, and its first state."""
    jax = pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    from envs import go1

    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    env = go1.make("Go1JoystickFlat", "mujoco-c", threads=1, noise_level=0.0)
    yield env, env.reset_batch(jax.random.split(jax.random.key(3), 1))
    jax.config.update("jax_disable_most_optimizations", False)


def test_with_nothing_different_it_is_the_robot_of_training(policy, training):
    """Closed loop for a second at training's rates: observations to 1e-3, joint angles to 1e-4, actions to 1e-4."""
    env, state = training
    robot = Go1(env.spec, physics_hz=250, motor_hz=250)
    robot.reset(np.asarray(state.qpos[0]), np.asarray(state.qvel[0]))
    np.testing.assert_allclose(robot.observe(state.command[0]), state.obs["state"][0], atol=1e-5)
    used = 0.0
    for _ in range(50):
        theirs = policy.act(np.asarray(state.obs["state"][0]))
        mine = policy.act(robot.observe(state.command[0]))
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
        state = env.step_batch(state, theirs[None])
        robot.act(mine)
        used = max(used, np.abs(robot.torque / robot.limit).max())
        np.testing.assert_allclose(robot.data.qpos[7:], state.qpos[0, 7:], atol=1e-4)
        np.testing.assert_allclose(
            robot.observe(state.command[0]), state.obs["state"][0], atol=1e-3
        )
    assert 0.1 < used < 1.0, "the limits, which are applied a little differently, played no part"
    assert np.abs(state.obs["state"][0, 36:48]).max() > 0.05 and not state.terminated[0]


def test_a_single_step_from_the_same_state_is_the_same(training):
    """From 20 states on training's way, one step each: nothing can accumulate, and it agrees to float32."""
    env, state = training
    robot, rng = Go1(env.spec, physics_hz=250, motor_hz=250), np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-0.4, 0.4, 12).astype(np.float32)
        robot.reset(np.asarray(state.qpos[0]), np.asarray(state.qvel[0]))
        robot.data.qacc_warmstart[:] = state.warmstart[0]
        robot.target = robot.pose + np.float32(0.5) * np.asarray(state.last_action[0], float)
        robot.act(action)
        state = env.step_batch(state, action[None])
        np.testing.assert_allclose(
            robot.observe(state.command[0]), state.obs["state"][0], atol=2e-5, rtol=2e-5
        )


def test_the_numbers_are_those_of_training(training):
    env, _ = training
    from envs.go1.robot import DEFAULT_POSE
    from envs.go1.task import NOISE

    np.testing.assert_array_equal(sim.NOISE.astype(np.float32), NOISE)
    assert sim.LAYOUT == env.spec["state_layout"] and Go1(env.spec).model.opt.timestep == 0.002
    for key in ("joints", "control_hz", "kp", "kd", "action_scale", "torque_limits"):
        assert SPEC[key] == env.spec[key]
    robot = Go1(env.spec)
    np.testing.assert_allclose(np.stack((robot.low, robot.high), 1), env.spec["joint_limits"])
    np.testing.assert_allclose(robot.pose, DEFAULT_POSE)
    for name, value in (
        ("body_mass", env.model.body_mass),
        ("body_inertia", env.model.body_inertia),
        ("dof_armature", env.model.dof_armature),
        ("geom_friction", env.model.geom_friction),
        ("dof_frictionloss", env.model.dof_frictionloss),
    ):
        np.testing.assert_array_equal(getattr(robot.model, name), value)


# --- Motors, delays, differences ------------------------------------------------------------------
def test_the_motors_own_loop():
    """torque = kp (target - angle) - kd velocity at 500 Hz, from measured angles, and never above the limit."""
    robot = Go1(SPEC, Condition(kp=0.8, kd=2.0, torque=0.5))
    robot.reset(robot.data.qpos, np.r_[np.zeros(6), np.linspace(-2, 2, 12)])
    torques, step = [], robot.mujoco.mj_step
    expected = []

    class Spy:
        def __getattr__(self, name, real=robot.mujoco):
            return getattr(real, name)

        def mj_step(self, model, data, n):
            error = robot.target - data.qpos[7:]
            expected.append(np.clip(28.0 * error - 1.0 * data.qvel[6:], -robot.limit, robot.limit))
            step(model, data, n)
            torques.append(data.qfrc_actuator[6:].copy())

    robot.mujoco = Spy()
    robot.act(np.r_[np.ones(6), np.zeros(6)])
    assert len(torques) == 10, "ten periods of the motors for one of the policy"
    np.testing.assert_allclose(torques, expected, atol=1e-12)
    np.testing.assert_allclose(robot.limit[:3], [11.85, 11.85, 17.775])
    assert (np.abs(expected[0]) == robot.limit).any(), "the limit was reached"
    assert (
        robot.model.actuator_forcerange[2, 1] == robot.limit[2]
        and not robot.model.dof_damping[6:].any()
    )


def test_targets_stay_within_the_joints_range():
    robot = Go1(SPEC | {"action_scale": 2.0})
    robot.act(np.ones(12))
    np.testing.assert_allclose(robot.target[:3], [0.863, 2.9, -0.888])


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.020, 0.046])
def test_commands_arrive_after_the_delay(delay):
    robot, changes = Go1(SPEC, Condition(actuator_delay=delay)), []
    measure = robot._measure
    robot._measure = lambda: changes.append(robot.target[0]) or measure()
    for action in (0.2, 0.4, 0.6, 0.0):
        robot.act(np.full(12, action))
    late = round(delay * 500)
    sent = np.repeat([0.1 + 0.5 * a for a in (0.2, 0.4, 0.6, 0.0)], 10)
    np.testing.assert_allclose(changes, np.r_[np.full(late, 0.1), sent][:40], atol=1e-6)


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.030])
def test_measurements_are_as_old_as_they_should_be(delay):
    robot, seen = Go1(SPEC, Condition(observation_delay=delay)), []
    measure = robot._measure
    robot._measure = lambda: seen.append(measure()) or seen[-1]
    first, late = robot.observe((0, 0, 0))[:33], round(delay * 500)
    for n in range(1, 6):
        robot.act(np.full(12, 0.3))
        old = 10 * n - late
        expected = first if old <= 0 else seen[old - 1]
        np.testing.assert_allclose(robot.observe((1, 2, 3))[:33], expected, atol=1e-6)
    np.testing.assert_allclose(robot.observe((1, 2, 3))[33:], [0.3] * 12 + [1, 2, 3], atol=1e-6)


def test_masses_friction_noise_zeros_and_the_velocitys_estimate():
    plain, other = Go1(SPEC), Go1(SPEC, Condition(mass=1.2, payload=2.0, friction=0.3))
    total = plain.model.body_mass.sum()
    assert abs(other.model.body_mass.sum() - (1.2 * total + 2.0)) < 1e-9 and 12 < total < 14
    np.testing.assert_allclose(other.model.body_inertia[5], 1.2 * plain.model.body_inertia[5])
    assert (
        other.model.geom_friction[0, 0] == 0.3
        and other.model.body_subtreemass[0] > 1.2 * total + 1.9
    )

    noisy = Go1(SPEC, Condition(noise=2.0))
    off = np.array([noisy.observe((0, 0, 0))[:33] - noisy.past[0] for _ in range(400)])
    largest = np.abs(off).max(0)
    assert (largest <= 2 * sim.NOISE + 1e-6).all() and (largest > 1.9 * sim.NOISE).all()

    shifted = Go1(SPEC, Condition(zero=0.05), seed=4)
    assert 0.03 < np.abs(shifted.offset).max() <= 0.05 and np.ptp(shifted.offset) > 0.03
    np.testing.assert_allclose(shifted.observe((0, 0, 0))[9:21], shifted.offset, atol=1e-6)
    for _ in range(100):
        shifted.act(np.zeros(12)), plain.act(np.zeros(12))
    moved = shifted.data.qpos[7:] - plain.data.qpos[7:]
    assert np.corrcoef(moved, -shifted.offset)[0, 1] > 0.8, "it stands where it believes zero to be"

    slow, state = Go1(SPEC, Condition(velocity=0.5)), np.r_[0.6, -0.2, 0.1, np.zeros(15)]
    slow.reset(slow.data.qpos, state)
    np.testing.assert_allclose(slow.observe((0, 0, 0))[:3], 0.5 * state[:3], atol=1e-6)
    np.testing.assert_allclose(slow.velocity[:2], state[:2], atol=1e-9)


def test_conditions_have_names_and_limits():
    assert Condition().label == "nominal"
    assert (
        Condition(actuator_delay=0.01, friction=0.3).label == "actuator delay 10 ms, friction 0.3"
    )
    conditions = sim.sweep_conditions()
    assert conditions[0] == Condition() and len({c.label for c in conditions}) == len(conditions)
    for name in ("actuator_delay", "observation_delay", "kp", "kd", "mass", "friction", "noise"):
        assert len({getattr(c, name) for c in conditions}) >= 3, name
    for wrong in ({"mass": 0.0}, {"friction": -1.0}, {"actuator_delay": -0.1}, {"noise": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Condition(**wrong)


# --- Trials and their verdict ---------------------------------------------------------------------
def test_a_robot_that_stands_stands_and_does_not_walk(standing):
    still, walk = (trial(standing, Condition(), command, 2.0) for command in ("stand", "walk"))
    assert (
        still.fell is None
        and still.speed_error < 0.02
        and still.turn_error < 0.02
        and len(still.path) == 125
    )
    assert walk.fell is None and 0.45 < walk.speed_error < 0.55
    assert judge(Condition(), [still], 0.25, 0.3)["passed"]
    row = judge(Condition(), [still, walk], 0.25, 0.3)
    assert not row["passed"] and row["reason"].startswith("walk: 0.5") and row["worst"] == "walk"


def test_motors_that_are_too_weak_let_it_fall(standing):
    fallen = trial(standing, Condition(torque=0.1, payload=5.0), "stand", 3.0)
    assert fallen.fell is not None and fallen.fell < 3.0 and len(fallen.path) < 175
    row = judge(Condition(torque=0.1), [fallen], 0.25, 0.3)
    assert (
        not row["passed"]
        and row["falls"] == 1
        and row["reason"] == f"fell: stand after {fallen.fell:.1f} s"
    )
    assert math.isnan(row["speed_error"])
    assert "| **fail** | 1 | 1 | 0 | – | – |" in sim.markdown([row])


def test_the_verdict_by_hand():
    def walked(command, velocity, fell=None):
        error = np.array(velocity) - COMMANDS[command]
        return Trial(
            command,
            np.array(COMMANDS[command]),
            fell,
            np.array(velocity),
            float(np.hypot(*error[:2])),
            abs(error[2]),
            0.5,
            np.zeros((1, 19)),
        )

    good = [walked("walk", (0.4, 0.1, 0.0)), walked("turn", (0.0, 0.0, 0.6))]
    row = judge(Condition(noise=1.0), good, 0.25, 0.3)
    assert row["passed"] and row["condition"] == "noise 1" and row["noise"] == 1.0
    assert (
        abs(row["speed_error"] - math.hypot(0.1, 0.1)) < 1e-9
        and abs(row["turn_error"] - 0.2) < 1e-9
    )
    assert not judge(Condition(), [*good, walked("turn", (0, 0, 0.45))], 0.25, 0.3)["passed"]
    bad = judge(
        Condition(), [*good, walked("fast", (1, 0, 0), 2.0), walked("turn", (0, 0, 0.4))], 0.25, 0.3
    )
    assert bad["reason"] == "fell: fast after 2.0 s; turn: 0.00 m/s and 0.40 rad/s off"
    assert (bad["trials"], bad["falls"], bad["missed"], bad["worst"]) == (4, 1, 1, "turn")
    assert "| turn | 0.00, 0.00, 0.80 | 0.00, 0.00, 0.60 | 0 of 1 |" in sim.by_command(good)


def test_the_same_seed_gives_the_same_trial(policy):
    starts = [trial(policy, Condition(), "stand", 1.1, seed).path[0, 7:] for seed in (1, 2)]
    assert 0.005 < np.abs(starts[0] - starts[1]).max() < 0.1
    condition = Condition(noise=1.0, zero=0.03)
    one, same, other = (trial(policy, condition, "walk", 1.5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.path, same.path)
    assert np.abs(one.path[-1] - other.path[-1]).max() > 1e-4


# --- Policies -------------------------------------------------------------------------------------
@pytest.mark.parametrize("blind", [False, True])
def test_policies_act_as_in_training_in_numpy_and_in_onnx(folder, blind):
    pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    ppo = pytest.importorskip("ppo_mjx_go1")
    pytest.importorskip("onnxruntime", reason='needs ONNX Runtime: pip install -e ".[export]"')
    pytest.importorskip("onnx", reason='needs ONNX: pip install -e ".[export]"')
    layout = sim.LAYOUT[blind:]
    file = write_policy(
        folder / f"blind{blind}.npz", scale=1.0, spec={"state_layout": layout}, least=0.0
    )
    theirs = ppo.Policy(file)
    numpy = Policy(file)
    meta = {"cleanrobot": json.dumps({"spec": numpy.spec})}
    export_go1.write_onnx(file.with_suffix(".onnx"), numpy, meta)
    onnx = Policy(file.with_suffix(".onnx"))
    assert numpy.spec == onnx.spec == theirs.spec and numpy.blind is onnx.blind is blind
    for obs in np.random.default_rng(1).normal(0, 2, (20, 48)).astype(np.float32):
        expected = theirs.act({"state": obs[3 * blind :]})
        np.testing.assert_allclose(numpy.act(obs), expected, atol=1e-6)
        np.testing.assert_allclose(onnx.act(obs), expected, atol=1e-5)


def test_neither_jax_nor_torch_is_needed(policy):
    code = (
        "import sys; sys.modules.update({name: None for name in ('jax', 'torch', 'mujoco.mjx')})\n"
        "from hardware import sim2sim_go1 as s\n"
        "print(s.trial(s.Policy(sys.argv[1]), s.Condition(), 'walk', 1.2).fell)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, policy.path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == "None\n", run.stderr


def test_no_motor_can_be_addressed():
    """It imports nothing that could talk to a robot."""
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= {
        "csv",
        "json",
        "math",
        "os",
        "sys",
        "time",
        "collections",
        "dataclasses",
        "pathlib",
        "numpy",
        "mujoco",
        "mujoco.egl",
        "mujoco.viewer",
        "onnx",
        "onnxruntime",
        "imageio.v2",
        "tyro",
        "envs",
    }, imported


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stand.npz", dict(spec={"task": "Go1Stand"}), "trained on Go1Stand; this tests walking"),
        (
            "order.npz",
            dict(spec={"state_layout": [["gyro", 3], *sim.LAYOUT[2:], ["gravity", 3]]}),
            "laid out as none",
        ),
        ("joints.npz", dict(spec={"joints": JOINTS[::-1]}), "the policy's joints are RL_calf"),
        ("rate.npz", dict(spec={"control_hz": 60.0}), "rates must divide each other"),
    ],
)
def test_policies_that_do_not_fit(folder, name, options, message):
    file = write_policy(folder / name, **options)
    with pytest.raises(Sim2SimError, match=message) as error:
        sim.main(sim.Args(str(file)))
    assert "\n" not in str(error.value)


def test_files_that_are_no_policies(folder):
    (folder / "broken.npz").write_bytes(b"PK nonsense")
    (folder / "broken.onnx").write_bytes(b"nonsense")
    np.savez(folder / "other.npz", a=np.zeros(3))
    for name, message in (
        ("none.npz", "there is no policy"),
        ("broken.npz", "cannot be read as a checkpoint"),
        ("other.npz", "cannot be read as a checkpoint"),
        ("broken.onnx", "was not written by"),
        ("policy.pt", "there is no policy"),
    ):
        if name == "broken.onnx":
            pytest.importorskip(
                "onnxruntime", reason='needs ONNX Runtime: pip install -e ".[export]"'
            )
        with pytest.raises(Sim2SimError, match=message):
            Policy(folder / name)
    (folder / "policy.pt").write_bytes(b"")
    with pytest.raises(Sim2SimError, match="a policy is a checkpoint"):
        Policy(folder / "policy.pt")


# --- The command ----------------------------------------------------------------------------------
def test_the_command_writes_table_and_video(folder, policy, standing, monkeypatch, capsys):
    import imageio.v2 as imageio

    from envs import check

    egl = check.ask("egl")
    monkeypatch.setattr(
        sim, "sweep_conditions", lambda: [Condition(), Condition(torque=0.1, payload=5.0)]
    )
    monkeypatch.setattr(sim, "FILMED", (Condition(), Condition(friction=0.3)))
    out = folder / "out"
    rows = sim.main(sim.Args(str(standing.path), str(out), seconds=1.1, repeats=1, video=egl.works))
    assert [row["falls"] for row in rows] == [0, 7] and "0 of 2 passed" in capsys.readouterr().out
    with (out / "sweep.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    assert [row["condition"] for row in saved] == ["nominal", "payload 5, torque 0.1"]
    assert saved[1]["passed"] == "False" and saved[0]["falls"] == "0" and saved[1]["payload"] == "5"
    text = (out / "sweep.md").read_text()
    assert (
        "| nominal | **fail** | 7 | 0 | 6 |" in text and "| stand | 0.00, 0.00, 0.00 | 0.00" in text
    )
    if not egl.works:
        pytest.skip(
            f"the video needs EGL: sudo apt-get install libegl1 libgl1-mesa-dri ({egl.detail})"
        )
    video = imageio.get_reader(out / "walk.mp4")
    image = video.get_data(10)
    assert image.shape == (240, 640, 3) and video.count_frames() == 40 and image.std() > 10
    video.close()


def test_what_cannot_be_done_is_one_line(folder, standing, monkeypatch):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--policy", "none.npz"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (2, "error: there is no policy none.npz\n")
    for options, message in (
        (dict(seconds=0.5), "--seconds must be above 1"),
        (dict(repeats=0), "--repeats at least 1"),
        (dict(motor_hz=300), "rates must divide"),
    ):
        with pytest.raises(Sim2SimError, match=message):
            sim.main(sim.Args(str(standing.path), **options))


def test_a_window_that_cannot_be_opened_is_one_line(standing, monkeypatch):
    viewer = pytest.importorskip("mujoco.viewer")

    def refuse(*_, **__):
        raise RuntimeError("no display")

    monkeypatch.setattr(viewer, "launch_passive", refuse)
    with pytest.raises(Sim2SimError, match="no window can be opened here .no display."):
        sim.viewer(standing, Condition())


def test_keys_drive_the_robot_in_the_window(policy, monkeypatch, capsys):
    """A window that is not there: keys become commands, the robot walks in real time, begins anew when it lies."""
    viewer = pytest.importorskip("mujoco.viewer")
    seen, waits = [], []

    class Window:
        def __init__(self, model, data, key_callback):
            self.data, self.key, self.left = (
                data,
                key_callback,
                [265, 265, 263, ord(","), None, 259, 32, None],
            )

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def is_running(self):
            if key := self.left[0] if self.left else None:
                self.key(key)
            self.left = self.left[1:]
            return bool(self.left)

        def sync(self):
            seen.append(self.data.time)

    commands = []
    act = policy.act
    monkeypatch.setattr(policy, "act", lambda obs: commands.append(obs[-3:].copy()) or act(obs))
    monkeypatch.setattr(viewer, "launch_passive", Window)
    clock = VirtualClock()
    sleep = lambda seconds: waits.append(seconds) or clock.sleep(seconds)  # noqa: E731
    monkeypatch.setattr(sim, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
    sim.viewer(policy, Condition())
    np.testing.assert_allclose(commands[3], [0.2, 0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(commands[-1], [0, 0, 0], atol=1e-6)
    assert seen[4] > seen[0] and seen[5] < seen[4], "backspace begins anew"
    np.testing.assert_allclose(waits, 0.02, atol=1e-9)
    assert "forward +0.2 m/s" in capsys.readouterr().out


# --- Results --------------------------------------------------------------------------------------
def test_the_table_of_the_page_is_that_of_the_results():
    with (ROOT / "docs/results/hardware/go1/sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["passed"] = row["passed"] == "True"
        row |= {key: float(row[key]) for key in ("speed_error", "turn_error", "torque_share")}
    page = (ROOT / "docs/sim2sim_go1.md").read_text()
    assert sim.markdown(rows) in page
    assert f"{sum(row['passed'] for row in rows)} of {len(rows)} conditions" in page
    assert [row["condition"] for row in rows] == [
        condition.label for condition in sim.sweep_conditions()
    ]


def test_the_page_says_what_each_condition_is():
    """Its table has a row for everything that is varied alone, with the values of the sweep."""
    page = (ROOT / "docs/sim2sim_go1.md").read_text()
    values, plain = {}, Condition()
    for condition in sim.sweep_conditions():
        changed = [
            f.name
            for f in fields(condition)
            if getattr(condition, f.name) != getattr(plain, f.name)
        ]
        if len(changed) == 1:
            values.setdefault(changed[0], []).append(getattr(condition, changed[0]))
    assert values.keys() == {f.name for f in fields(plain)}
    for name, tried in values.items():
        scale, unit = (1000, " ms") if name.endswith("delay") else (1, " rad" * (name == "zero"))
        told = ", ".join(f"{scale * value:g}" for value in tried) + unit
        assert f"| `{name}` | {told} |" in page, name
