"""The Go1's policy as ONNX and deploy.yaml: from these and raw signals alone, step for step the JAX policy."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from hardware import export_go1 as export
from hardware import sim2sim_go1 as sim
from hardware.export_go1 import MOTORS, Args, Controller, ExportError

jax = pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
mujoco = pytest.importorskip("mujoco", reason='needs MuJoCo: pip install -e ".[go1]"')
pytest.importorskip("onnx", reason='needs onnx: pip install -e ".[export]"')
ort = pytest.importorskip("onnxruntime", reason='needs it: pip install -e ".[export]"')
yaml = pytest.importorskip("yaml")
nnx = pytest.importorskip("flax.nnx")
ppo = pytest.importorskip("ppo_mjx_go1")
go1 = pytest.importorskip("envs.go1")
RANGE = (1.5, 0.8, 1.2)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the compile time; and what was compiled once is not compiled again in later runs."""
    settings = dict(
        jax_disable_most_optimizations=True,
        jax_persistent_cache_min_compile_time_secs=0.2,
        jax_compilation_cache_dir=str(ROOT / ".pytest_cache/jax"),
    )
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def write_policy(path: Path, env, scale: float = 1.0) -> Path:
    """A checkpoint with random weights for this environment; scale: of the last layer's."""
    shapes = dict(state=env.obs_dim, privileged_state=env.privileged_dim, action=env.action_dim)
    args = ppo.Args(hidden=(32, 16), std="constant", head_scale=scale, linvel=False, seed=4)
    _, learner = ppo.new_learner(shapes, args)
    rng = np.random.default_rng(0)
    for name in ("state", "privileged_state"):
        mean, var = rng.normal(0, 0.2, shapes[name]), rng.uniform(0.5, 2, shapes[name])
        learner.stats[name] = ppo.Stats(np.float32(9), np.float32(mean), np.float32(var))
    arrays = ppo.named(params=learner.params, stats=learner.stats)
    ppo.save(
        path, dict(algo="ppo_mjx_go1", args=asdict(args), shapes=shapes, spec=env.spec), arrays
    )
    return path


@pytest.fixture(scope="module")
def env():
    """The robot's own observation, without noise; a new command five times a second."""
    seen = dict(linvel=False, noise_level=0.0, command_time=0.2, command_range=RANGE)
    return go1.make("Go1JoystickFlat", "mujoco-c", 1, **seen)


@pytest.fixture(scope="module")
def policy(env, tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "best.npz", env)


@pytest.fixture(scope="module")
def folder(policy) -> Path:
    out = policy.parent / "walk"
    worst = export.export(Args(str(policy), str(out), RANGE, seconds=1.0))
    assert worst < 1e-5
    return out


def jax_policy(path: Path):
    """The networks of ppo_mjx_go1.py in JAX: observation (F,) -> mean action (12,)."""
    checkpoint = ppo.load(path)
    model, learner = ppo.new_learner(checkpoint["shapes"], ppo.Args(**checkpoint["args"]))
    params, stats = (ppo.restored(getattr(learner, k), k, checkpoint) for k in ("params", "stats"))
    net = nnx.merge(model, params)
    act = jax.jit(lambda obs: jax.numpy.tanh(net.policy(ppo.normalize(stats, obs))[0]))
    return lambda state: np.asarray(act(state.obs))[0]


class Sensors:
    """What a robot's computer reads, of a robot in C MuJoCo that is put where the task's robot is."""

    def __init__(self, env):
        self.model, self.data, self.substeps = (
            env.model,
            mujoco.MjData(env.model),
            env.config.substeps,
        )
        self.gyro = env.model.sensor("gyro").adr[0] + np.arange(3)

    def place(self, state):
        self.data.qpos, self.data.qvel = np.asarray(state.qpos[0]), np.asarray(state.qvel[0])
        self.data.qacc_warmstart = np.asarray(state.warmstart[0])

    def step(self, targets):
        self.data.ctrl = targets
        mujoco.mj_step(self.model, self.data, self.substeps)

    def read(self, state) -> dict:
        return dict(
            gyroscope=self.data.sensordata[self.gyro],
            quaternion=self.data.xquat[1],
            q=self.data.qpos[7:],
            dq=self.data.qvel[6:],
            command=np.asarray(state.command[0]),
        )


def test_the_files_act_as_the_jax_policy_at_every_step_of_the_task(env, policy, folder):
    """Six seconds with falls and thirty commands: what the network says, and what the motors are told."""
    act, controller, robot = jax_policy(policy), Controller(folder), Sensors(env)
    state = env.reset_batch(jax.random.split(jax.random.PRNGKey(1), 1))
    robot.place(state)
    mujoco.mj_forward(env.model, robot.data)
    ends, commands, sizes = 0, set(), []
    for step in range(300):
        signals = robot.read(state)
        targets, expected = controller.act(signals), act(state)
        np.testing.assert_allclose(controller.action, expected, atol=1e-5, err_msg=f"step {step}")
        sizes.append(np.abs(expected).max())
        commands.add(tuple(signals["command"]))
        (wanted, *_), _ = env.targets(jax.tree.map(lambda x: x[0], state), expected)
        np.testing.assert_allclose(targets, wanted, atol=1e-5, err_msg=f"step {step}")
        robot.place(state)
        robot.step(wanted)
        state = env.step_batch(state, expected[None])
        if bool(state.terminated[0] | state.truncated[0]):
            ends += 1
            robot.place(state)
            mujoco.mj_forward(env.model, robot.data)
            controller.reset()
    assert ends > 0 and len(commands) > 10 and np.mean(sizes) > 0.1


def test_the_yaml_is_laid_out_as_unitrees(folder, env):
    """Names and their order as in the deploy.yaml that unitree_rl_lab ships for its G1."""
    cfg = yaml.safe_load((folder / "params/deploy.yaml").read_text())
    top = "joint_ids_map step_dt stiffness damping default_joint_pos commands actions observations"
    assert list(cfg) == top.split()
    terms = (
        "base_ang_vel projected_gravity joint_pos_rel joint_vel_rel last_action velocity_commands"
    )
    assert list(cfg["observations"]) == terms.split()
    for term in cfg["observations"].values():
        assert list(term) == ["params", "clip", "scale", "history_length"]
    action = cfg["actions"]["JointPositionAction"]
    assert list(action) == ["clip", "joint_names", "scale", "offset", "joint_ids"]
    assert action["joint_ids"] is None and action["joint_names"] == [".*"]
    assert cfg["joint_ids_map"] == list(range(12)) and cfg["step_dt"] == 0.02
    assert cfg["stiffness"] == [35.0] * 12 and cfg["damping"] == [0.5] * 12
    assert cfg["default_joint_pos"] == action["offset"] == [0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2
    assert cfg["commands"]["base_velocity"]["ranges"] == {
        "lin_vel_x": [-1.5, 1.5],
        "lin_vel_y": [-0.8, 0.8],
        "ang_vel_z": [-1.2, 1.2],
        "heading": None,
    }
    np.testing.assert_array_equal(np.float32(action["clip"]), np.float32(env.spec["joint_limits"]))


def test_the_commands_are_those_of_training():
    assert Args("", "").command_range == go1.EnvConfig().command_range


def test_the_network_has_the_shapes_and_names_that_controllers_in_c_take(folder):
    """A free batch size would reach them as -1."""
    session = ort.InferenceSession(str(folder / "exported/policy.onnx"))
    (obs,), (actions,) = session.get_inputs(), session.get_outputs()
    assert (obs.name, obs.shape, obs.type) == ("obs", [1, 45], "tensor(float)")
    assert (actions.name, actions.shape, actions.type) == ("actions", [1, 12], "tensor(float)")
    meta = session.get_modelmeta().custom_metadata_map
    assert meta["joint_names"].split(",") == MOTORS
    assert meta["joint_stiffness"] == ",".join(["35.0"] * 12)
    assert meta["observation_names"].startswith("base_ang_vel,projected_gravity,")
    assert json.loads(meta["cleanrobot"])["spec"]["task"] == "Go1JoystickFlat"


def test_the_second_simulation_takes_the_exported_network(policy, folder):
    ours, theirs = sim.Policy(policy), sim.Policy(folder / "exported/policy.onnx")
    obs = np.random.default_rng(0).normal(size=48)
    np.testing.assert_allclose(ours.act(obs), theirs.act(obs), atol=1e-5)


def rewritten(folder: Path, out: Path, change) -> Path:
    """A copy of the files with another deploy.yaml."""
    (out / "exported").mkdir(parents=True)
    (out / "params").mkdir()
    (out / "exported/policy.onnx").write_bytes((folder / "exported/policy.onnx").read_bytes())
    cfg = yaml.safe_load((folder / "params/deploy.yaml").read_text())
    change(cfg)
    (out / "params/deploy.yaml").write_text(export.as_yaml(cfg))
    return out


SIGNALS = dict(
    gyroscope=np.array([0.1, 0.2, 0.3]),
    quaternion=np.array([np.cos(0.2), np.sin(0.2), 0.0, 0.0]),  # rolled by 0.4 to the right
    q=np.array([0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2) + np.arange(12) / 100,
    dq=np.arange(12) / 10,
    command=np.array([9.0, -9.0, 0.5]),
)


def test_an_observation_by_hand(folder):
    """Roll 0.4: gravity (0, -sin 0.4, -cos 0.4) in the body. The command is cut to its range."""
    (obs,) = Controller(folder).observe(SIGNALS)
    gravity = [0, -np.sin(0.4), -np.cos(0.4)]
    parts = [0.1, 0.2, 0.3], gravity, np.arange(12) / 100, np.arange(12) / 10, np.zeros(12)
    expected = np.concatenate([*parts, [1.5, -0.8, 0.5]])
    np.testing.assert_allclose(obs, expected, atol=1e-6)


def test_scale_clip_and_history_by_hand(folder, tmp_path):
    """The oldest first, part by part, the first observation for what was before; clipped, then scaled."""

    def change(cfg):
        gyro = cfg["observations"]["base_ang_vel"]
        gyro.update(history_length=3, scale=[2.0, 2.0, 10.0], clip=[-0.25, 0.25])

    controller = Controller(rewritten(folder, tmp_path / "walk", change))
    seen = []
    for turn in (0.1, -0.2, 0.9, 0.2):
        seen = controller.observe(SIGNALS | dict(gyroscope=[turn, 0.0, turn]))[0, :9]
    np.testing.assert_allclose(seen, [-0.4, 0, -2, 0.5, 0, 2.5, 0.4, 0, 2], atol=1e-6)
    controller.reset()
    first = controller.observe(SIGNALS | dict(gyroscope=[0.1, 0.0, 0.1]))[0, :9]
    np.testing.assert_allclose(first, [0.2, 0, 1] * 3, atol=1e-6)


def test_unitrees_own_controller_says_the_same(folder, tmp_path):
    """Its observations and joint targets, from these files but for order, clip, scale and history.

    golden/deploy_go1.npz: random signals and actions, and what unitree_rl_lab's observation and action managers
    (C++, commit e72a072, compiled with yaml-cpp 0.7) made of them.
    """

    def change(cfg):
        for term in cfg["observations"].values():
            rising = [0.3 * (i + 1) for i in range(len(term["scale"]))]
            term.update(history_length=5, scale=rising, clip=[-0.7, 0.9])
        cfg["joint_ids_map"] = [3, 0, 9, 6, 4, 1, 10, 7, 5, 2, 11, 8]

    class Said:
        def run(self, names, inputs):
            seen.append(inputs["obs"][0])
            return [golden["action"][len(seen) - 1][None]]

    golden, seen = np.load(ROOT / "tests/golden/deploy_go1.npz"), []
    controller = Controller(rewritten(folder, tmp_path / "walk", change))
    controller.session = Said()
    for tick, expected in enumerate(golden["targets"]):
        targets = controller.act({name: golden[name][tick] for name in SIGNALS})
        np.testing.assert_allclose(seen[-1], golden["obs"][tick], atol=1e-6)
        np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_a_policy_with_joints_in_another_order_moves_the_same_motors(policy, folder, tmp_path):
    """Isaac's order: all hips, all thighs, all calves, left legs first."""
    legs = ("FL", "FR", "RL", "RR")
    joints = [f"{leg}_{joint}" for joint in ("hip", "thigh", "calf") for leg in legs]
    old = sim.Policy(policy)
    order = np.array([old.spec["joints"].index(joint) for joint in joints])
    inputs = np.concatenate([np.arange(6), *(6 + 12 * i + order for i in range(3)), [42, 43, 44]])
    (kernel, bias), *middle, (last, last_bias) = old.layers
    spec = old.spec | dict(joints=joints)
    for name in ("default_pose", "joint_limits"):
        spec[name] = [old.spec[name][i] for i in order]
    layers = [(kernel[inputs], bias), *middle, (last[:, order], last_bias[order])]
    mean, std = old.mean[inputs], old.std[inputs]
    new = SimpleNamespace(spec=spec, layers=layers, mean=mean, std=std, size=45, path=old.path)
    cfg = export.deployment(spec, RANGE)
    assert cfg["joint_ids_map"] == [3, 0, 9, 6, 4, 1, 10, 7, 5, 2, 11, 8]
    (tmp_path / "exported").mkdir()
    (tmp_path / "params").mkdir()
    export.write_onnx(tmp_path / "exported/policy.onnx", new, export.metadata(new, cfg))
    (tmp_path / "params/deploy.yaml").write_text(export.as_yaml(cfg))
    ours, theirs = Controller(folder), Controller(tmp_path)
    for _ in range(3):
        np.testing.assert_allclose(ours.act(SIGNALS), theirs.act(SIGNALS), atol=1e-6)
    assert not np.allclose(ours.action, theirs.action)


def test_targets_stay_within_the_joints_limits(folder, tmp_path):
    def change(cfg):
        cfg["actions"]["JointPositionAction"]["clip"] = [[-0.01, 0.01]] * 12

    controller = Controller(rewritten(folder, tmp_path / "walk", change))
    assert np.abs(controller.act(SIGNALS)).max() <= np.float32(0.01)


def test_files_that_act_otherwise_are_not_written(policy, tmp_path, monkeypatch):
    described = export.deployment

    def wrong(spec, command_range):
        cfg = described(spec, command_range)
        cfg["observations"]["joint_vel_rel"]["scale"] = [0.05] * 12
        return cfg

    monkeypatch.setattr(export, "deployment", wrong)
    with pytest.raises(ExportError, match="^the files act otherwise than .*best.npz: by "):
        export.export(Args(str(policy), str(tmp_path / "walk"), seconds=0.5))
    assert not [path for path in (tmp_path / "walk").rglob("*") if path.is_file()]


def test_what_cannot_be_exported_is_refused_in_one_line(folder, tmp_path):
    sighted = go1.make("Go1JoystickFlat", "mujoco-c", 1)
    write_policy(tmp_path / "sighted.npz", sighted)
    for given, reason in (
        (tmp_path / "sighted.npz", "the policy sees linear_velocity, which no sensor"),
        (folder / "exported/policy.onnx", "is an export already"),
        (tmp_path / "none.npz", "there is no policy"),
    ):
        words = [sys.executable, "-m", "hardware.export_go1", "--policy", str(given)]
        words += ["--out", str(tmp_path / "walk")]
        run = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
        assert run.returncode == 2 and reason in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "walk").exists()
