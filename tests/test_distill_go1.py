"""A student of a Go1 policy: its loss by hand, runs end to end on a tiny environment."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
distill = pytest.importorskip("distill_go1")
ppo = pytest.importorskip("ppo_mjx_go1")
nnx = pytest.importorskip("flax.nnx")
FakeEnv = pytest.importorskip("fake_env_jax").FakeEnv
jnp = jax.numpy

SCRIPT = Path(distill.__file__)
TEACHER = dict(state=6, privileged_state=7, action=2)
N, T = 16, 5
CALL = 2 * N * T  # transitions of one call of the program


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the compile time; and what was compiled once is not compiled again in later runs."""
    settings = dict(
        jax_disable_most_optimizations=True,
        jax_persistent_cache_min_compile_time_secs=0.2,
        jax_compilation_cache_dir=str(Path(__file__).parent.parent / ".pytest_cache/jax"),
    )
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def write_teacher(path: Path, std: str = "state", seed: int = 3):
    """A random teacher that has seen observations of many sizes, in a file of ppo_mjx_go1."""
    args = ppo.Args(env_id="FakeJoystick", backend="mjx-jax", hidden=(16, 16), std=std, seed=seed)
    _, learner = ppo.new_learner(TEACHER, args)
    rng = np.random.default_rng(seed)
    arrays = ppo.named(params=learner.params, stats=learner.stats)
    for name in ("stats/state/mean", "stats/state/var"):
        arrays[name] = rng.uniform(0.1, 1, 6).astype(np.float32)
    meta = dict(algo="ppo_mjx_go1", args=ppo.asdict(args), shapes=TEACHER, spec=FakeEnv.spec)
    ppo.save(path, meta, arrays)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "best.npz"
    write_teacher(path)
    return str(path)


def arguments(teacher: str, **changes) -> distill.Args:
    """A small run on FakeEnv: four calls of two iterations, an evaluation after every second call."""
    values = dict(
        teacher=teacher,
        env_id="FakeJoystick",
        backend="mjx-jax",
        num_envs=N,
        unroll_length=T,
        update_epochs=2,
        total_timesteps=4 * CALL,
        eval_freq=2 * CALL,
        log_freq=CALL,
        eval_episodes=4,
    )
    return distill.Args(**values | changes)


def make_fakes(args):
    return FakeEnv(linvel=False), FakeEnv(linvel=False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(distill, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arrays(path) -> dict:
    return distill.load(path)["arrays"]


# --- Formulas -------------------------------------------------------------------------------------
@pytest.mark.parametrize("std", ["state", "constant"])
def test_policy_is_that_of_the_teachers_network(std, tmp_path):
    write_teacher(tmp_path / "teacher.npz", std)
    checkpoint = ppo.load(tmp_path / "teacher.npz")
    model, learner = ppo.new_learner(TEACHER, ppo.Args(**checkpoint["args"]))
    params, stats = (ppo.restored(getattr(learner, k), k, checkpoint) for k in ("params", "stats"))
    obs = {k: np.random.default_rng(0).normal(size=(5, TEACHER[k])) for k in stats}
    expected = nnx.merge(model, params).policy(ppo.normalize(stats, obs))
    found = distill.policy(checkpoint["arrays"], obs["state"])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    assert found[0].shape == found[1].shape == (5, 2)


def test_a_student_begins_as_its_teacher_without_the_first_inputs(teacher):
    """Where those inputs are at their mean, the two agree."""
    given = arrays(teacher)
    params, kept = distill.begin_student(given, 4)
    obs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    obs[:, :2] = given["stats/state/mean"][:2]
    for found, expected in zip(
        distill.policy(params | kept, obs[:, 2:]), distill.policy(given, obs), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert params["params/actor/layers/0/kernel"].shape == (4, 16)
    assert all(name.startswith(("params/critic/", "stats/")) for name in kept)


def test_loss_is_the_divergence_by_hand(teacher):
    """One number: KL(N(0, 1) || N(m, s)) = log s + (1 + m^2) / (2 s^2) - 1/2."""
    params, kept = distill.begin_student(arrays(teacher), 4)
    obs = jnp.zeros((1, 4))
    mean, std = (np.asarray(x, np.float64) for x in distill.policy(params | kept, obs))
    mb = dict(obs=obs, teacher_loc=jnp.zeros((1, 2)), teacher_std=jnp.ones((1, 2)))
    loss, metrics = distill.distill_loss(params, mb, kept)
    expected = (np.log(std) + (1 + mean**2) / (2 * std**2) - 0.5).sum()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss/distill"]) == float(loss)


# --- Runs -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(quick_compilation, teacher, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "make_envs", make_fakes)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        result = distill.train(arguments(teacher, name="whole"))
        run = Path("runs/whole").resolve()
    assert result["global_step"] == 4 * CALL
    return run


def assert_same_run(ours: Path, theirs: Path):
    """Bit for bit: all that learns, all environments, and every row but its clocks."""
    clocks = ("wall_time", "train_time", "time/sps")
    for name in ("checkpoint.npz", "best.npz"):
        mine, other = arrays(ours / name), arrays(theirs / name)
        assert mine.keys() == other.keys()
        for key in other:
            np.testing.assert_array_equal(mine[key], other[key], err_msg=key)
    for name in ("metrics.csv", "eval.csv"):
        mine, other = table(ours / name), table(theirs / name)
        for row in (*mine, *other):
            for clock in clocks:
                row.pop(clock, None)
        assert mine == other


def test_a_run_learns_evaluates_and_saves(whole, teacher):
    assert [int(row["global_step"]) for row in table(whole / "eval.csv")] == [2 * CALL, 4 * CALL]
    before, after = arrays(teacher), arrays(whole / "checkpoint.npz")
    for name, start in before.items():
        changed = not np.array_equal(
            after[name], start[-len(after[name]) :] if start.ndim else start
        )
        assert changed == name.startswith("params/actor/"), name


def test_a_student_comes_closer_to_its_teacher(fake, teacher):
    """It does not see the velocity, on which a random teacher depends."""
    args = arguments(teacher, name="long", learning_rate=3e-3, total_timesteps=20 * CALL)
    distill.train(args)
    told = [float(row["loss/distill"]) for row in table("runs/long/metrics.csv")]
    assert told[-1] < 0.5 * told[0], told


def test_a_resumed_run_is_the_same_run(fake, whole, teacher):
    distill.train(arguments(teacher, name="half", total_timesteps=2 * CALL))
    args = distill.parse_args(["--resume", "runs/half", "--total-timesteps", str(4 * CALL)])
    distill.train(args)
    assert_same_run(Path("runs/half"), whole)
    with pytest.raises(ValueError, match="^--learning-rate cannot change on --resume of runs/half"):
        distill.parse_args(["--resume", "runs/half", "--learning-rate", "0.5"])


def test_ctrl_c_saves_and_the_run_goes_on(fake, whole, teacher, monkeypatch):
    steps = []

    def count():
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)

    class Interrupting(FakeEnv):
        def step_batch(self, state, actions):
            jax.debug.callback(count)
            return super().step_batch(state, actions)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume runs/stopped"):
        patch.setattr(distill, "make_envs", lambda args: (Interrupting(False), FakeEnv(False)))
        distill.train(arguments(teacher, name="stopped"))
    assert distill.load("runs/stopped/checkpoint.npz")["progress"]["global_step"] == CALL
    distill.train(distill.parse_args(["--resume", "runs/stopped"]))
    assert_same_run(Path("runs/stopped"), whole)


def test_best_is_the_best(fake, teacher, monkeypatch):
    returns = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(distill, "evaluate", lambda *_: ({"eval/return": next(returns)}, []))
    distill.train(arguments(teacher, name="best", eval_freq=CALL, total_timesteps=3 * CALL))
    assert distill.load("runs/best/best.npz")["progress"]["global_step"] == 2 * CALL


def test_stops_at_nan_and_names_the_weight(fake, teacher):
    with pytest.raises(FloatingPointError, match=rf"^\S+ is not finite at step {CALL}; last good"):
        distill.train(arguments(teacher, name="nan", learning_rate=1e9))


def test_a_teacher_that_is_not_finite_is_refused(fake, teacher):
    meta = ppo.load(teacher)
    broken = meta.pop("arrays")
    broken["params/actor/layers/0/bias"][:] = np.nan
    ppo.save(Path("broken.npz"), meta, broken)
    with pytest.raises(ValueError, match="^broken.npz has weights that are not finite$"):
        distill.train(arguments("broken.npz", name="nan"))


# --- The student's file ---------------------------------------------------------------------------
def test_a_students_file_is_one_of_ppo(fake, whole, teacher, monkeypatch):
    """ppo_mjx_go1 evaluates it to the same return, and trains it on."""
    best = str(whole / "checkpoint.npz")
    monkeypatch.setattr(ppo, "make_envs", lambda args: (FakeEnv(False), FakeEnv(args.linvel)))
    args = ppo.parse_args(["--evaluate", "--checkpoint", best, "--no-capture-video"])
    assert not args.linvel and args.hidden == (16, 16) and args.eval_episodes == 4
    result, _ = ppo.evaluate(ppo.Policy(best).act, FakeEnv(False), args.eval_episodes)
    assert result["eval/return"] == pytest.approx(
        float(table(whole / "eval.csv")[-1]["eval/return"]), rel=1e-4
    )
    words = ["--checkpoint", best, "--total-timesteps", str(CALL), "--no-capture-video"]
    ppo.train(ppo.parse_args([*words, "--backend", "mjx-jax", "--name", "on"]))
    assert arrays("runs/on/checkpoint.npz")["stats/state/mean"].shape == (4,)


# --- Command line ---------------------------------------------------------------------------------
def test_the_task_is_the_teachers(teacher):
    assert distill.parse_args(["--teacher", teacher]).env_id == "FakeJoystick"
    args = distill.parse_args(["--teacher", teacher, "--env-id", "Go1JoystickRough"])
    assert args.env_id == "Go1JoystickRough"


def test_a_teacher_of_another_robot_is_refused(fake, teacher):
    meta = ppo.load(teacher)
    meta["shapes"] = meta["shapes"] | {"action": 3}
    ppo.save(Path("other.npz"), meta, meta.pop("arrays"))
    with pytest.raises(ValueError, match="^other.npz comes from another robot"):
        distill.train(arguments("other.npz"))
    assert not Path("runs").exists()


def test_a_teacher_that_lacks_the_velocity_itself_is_refused(whole):
    """Its inputs are not where a sighted teacher's are: it would be shown others, and teach nonsense."""
    pytest.importorskip("mujoco", reason='needs MuJoCo: pip install -e ".[go1]"')
    student = str(whole / "best.npz")
    with pytest.raises(ValueError, match="best.npz lacks the velocity itself: nothing to teach$"):
        distill.make_envs(arguments(student))


def test_the_task_has_all_the_teachers_settings(teacher, tmp_path):
    """All to which the teacher's run was set; the evaluation's are those of ppo_mjx_go1.py."""
    pytest.importorskip("mujoco", reason='needs MuJoCo: pip install -e ".[go1]"')
    meta = ppo.load(teacher)
    set_so = dict(noise_level=0.25, action_latency=[0.0, 0.01], pushes=True, kp_factor=[0.8, 1.2])
    meta["args"] = meta["args"] | set_so | dict(command_time=2.5)
    ppo.save(tmp_path / "set.npz", meta, meta.pop("arrays"))
    args = arguments(str(tmp_path / "set.npz"), env_id="Go1JoystickFlat", backend="mujoco-c")
    env, eval_env = distill.make_envs(args)
    for config in (env.config, eval_env.config):
        assert (config.noise_level, config.action_latency) == (0.25, (0.0, 0.01))
        assert config.pushes and not config.linvel
    assert env.config.domain_randomization and env.config.kp_factor == (0.8, 1.2)
    assert not eval_env.config.domain_randomization and eval_env.config.kp_factor == (1.0, 1.0)
    assert (env.config.command_time, eval_env.config.command_time) == (2.5, 5.0)


def test_the_command_prints_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 1 and result.stderr == "error: --teacher FILE is missing\n"
