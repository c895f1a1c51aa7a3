"""PPO on the MJX Go1: formulas by hand and against references, runs end to end on a tiny environment."""

import csv
import math
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

needs = dict(reason='needs JAX: pip install -e ".[go1]"')
jax = pytest.importorskip("jax", **needs)
pytest.importorskip("optax", **needs)
nnx = pytest.importorskip("flax.nnx", **needs)
ppo = pytest.importorskip("ppo_mjx_go1")
FakeEnv = pytest.importorskip("fake_env_jax").FakeEnv
jnp = jax.numpy

SCRIPT = Path(ppo.__file__)
SHAPES = dict(state=6, privileged_state=7, action=2)
N, T = 16, 5
CALL = 2 * N * T  # transitions of one call of the program
# Half the compile time; and what was compiled once is not compiled again in later runs of the tests.
SETTINGS = dict(
    jax_disable_most_optimizations=True,
    jax_persistent_cache_min_compile_time_secs=0.2,
    jax_compilation_cache_dir=str(Path(__file__).parent.parent / ".pytest_cache/jax"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def arguments(**changes) -> ppo.Args:
    """A small run on FakeEnv: four calls of two iterations, an evaluation after every second call."""
    values = dict(
        env_id="FakeJoystick",
        backend="mjx-jax",
        num_envs=N,
        unroll_length=T,
        num_minibatches=4,
        update_epochs=2,
        hidden=(16, 16),
        total_timesteps=4 * CALL,
        eval_freq=2 * CALL,
        log_freq=CALL,
        eval_episodes=4,
        capture_video=False,
        learning_rate=1e-3,
        gamma=0.9,
    )
    return ppo.Args(**values | changes)


def make_fakes(args):
    return FakeEnv(args.linvel), FakeEnv(args.linvel)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(ppo, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arrays(path) -> dict:
    return ppo.load(path)["arrays"]


def assert_equal(ours: dict, theirs: dict, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **tolerance)


# --- Golden numbers -------------------------------------------------------------------------------
GOLDEN = dict(np.load(Path(__file__).parent / "golden/ppo_mjx_go1.npz"))
GOLDEN_SHAPES = dict(state=6, privileged_state=9, action=2)


def golden(prefix: str) -> dict:
    """The golden numbers below a prefix, as nested dicts; numbers as keys where layers are counted."""
    tree = {}
    for name, value in GOLDEN.items():
        if name.startswith(prefix + "/"):
            node = tree
            *folders, last = name.removeprefix(prefix + "/").split("/")
            for folder in folders:
                node = node.setdefault(int(folder) if folder.isdigit() else folder, {})
            node[last] = value
    return tree


def golden_learner(prefix: str, args) -> tuple:
    """Networks and statistics of the golden numbers -> model, learner, with fresh Adam moments."""
    model, learner = ppo.new_learner(GOLDEN_SHAPES, args)
    found = {"arrays": {n.removeprefix(f"{prefix}/"): v for n, v in GOLDEN.items()}}
    params = ppo.restored(learner.params, "params", found)
    if f"{prefix}/stats/state/mean" in GOLDEN:
        learner = learner._replace(stats=ppo.restored(learner.stats, "stats", found))
    return model, learner._replace(params=params)


def test_advantages_equal_the_golden_ones():
    """Made with `gae` of commit f2f0a1a, as were all numbers of this section with their functions."""
    given = golden("gae/in")
    advantages, returns = ppo.gae(**given, gamma=0.97, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, GOLDEN["gae/out/advantages"], atol=1e-6)
    np.testing.assert_allclose(returns, GOLDEN["gae/out/returns"], atol=1e-6)


def test_statistics_equal_the_golden_ones():
    before = ppo.Stats(**golden("stats/before"))
    after = ppo.merge_stats(before, jnp.asarray(GOLDEN["stats/x"]))
    assert_equal(after._asdict(), golden("stats/after"), rtol=1e-6)
    scaled = ppo.normalize({"state": before}, {"state": GOLDEN["stats/x"]})
    np.testing.assert_allclose(scaled["state"], GOLDEN["stats/normalized"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", ["state", "constant"])
def test_loss_and_gradient_equal_the_golden_ones(std):
    prefix, args = f"loss/{std}", arguments(std=std, ent_coef=0.03)
    model, learner = golden_learner(prefix, args)
    loss = partial(ppo.ppo_loss, model=model, args=args)
    loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
    noise = GOLDEN[f"{prefix}/noise"]
    (value, metrics), grads = loss(learner.params, golden(f"{prefix}/mb"), noise)
    np.testing.assert_allclose(value, GOLDEN[f"{prefix}/loss"], rtol=1e-6)
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric, GOLDEN[f"{prefix}/metrics/{name}"], rtol=1e-6, atol=1e-6)
    expected = {n: v for n, v in GOLDEN.items() if n.startswith(f"{prefix}/grads/")}
    found = {f"{prefix}/{name}": value for name, value in ppo.named(grads=grads).items()}
    assert_equal(found, expected, atol=1e-6)


def golden_updates(target_kl):
    """All updates of an iteration that random numbers do not touch: one minibatch, no entropy bonus."""
    args = arguments(num_minibatches=1, ent_coef=0.0, target_kl=target_kl)
    model, learner = golden_learner("learn/learner", args)
    batch = jax.tree.map(jnp.asarray, golden("learn/batch"))
    return jax.jit(partial(ppo.learn, model=model, args=args))(learner, batch, jax.random.key(0))


def test_an_iteration_of_updates_equals_the_golden_one():
    """The sums are taken in another order, which Adam amplifies where a gradient is nearly 0."""
    learner, metrics = golden_updates(None)
    expected = {n.removeprefix("learn/after/"): v for n, v in GOLDEN.items() if "learn/after" in n}
    found = ppo.named(params=learner.params, stats=learner.stats)
    assert_equal(found, expected, rtol=1e-5, atol=2e-6)
    for name, metric in metrics.items():
        if name != "train/entropy":  # a sample
            said = GOLDEN[f"learn/metrics/{name}"]
            np.testing.assert_allclose(metric, said, rtol=1e-5, atol=1e-6, err_msg=name)


def test_learning_rates_equal_the_golden_ones():
    """Of a second step whose divergence is 2.2, 1.8, 1, 1/1.8 and 1/2.2 times the target."""
    targets, rates = GOLDEN["learn/targets"], GOLDEN["learn/rates"]
    for target, rate in zip(targets, rates, strict=True):
        found = ppo.adapted(1e-3, jnp.float32(targets[2]), target)
        assert float(found) == pytest.approx(rate, rel=1e-6)
    learner, _ = golden_updates(float(targets[0]))
    assert float(learner.learning_rate) == pytest.approx(rates[0], rel=1e-6)


# --- Advantages -----------------------------------------------------------------------------------
def test_advantages_equal_the_sum_of_their_definition():
    """Each advantage as the explicit sum over the rest of its episode, in double precision."""
    rng = np.random.default_rng(0)
    ends = rng.choice(3, (9, 7), p=(0.6, 0.2, 0.2))
    falls, timeouts = (ends == 1) * 1.0, (ends == 2) * 1.0
    rewards, values, next_values = rng.normal(size=(3, 9, 7))
    next_values[:-1] = np.where(ends[:-1] == 0, values[1:], next_values[:-1])  # as in a rollout
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        weight = 1.0
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if falls[k, n] else 0.97 * next_values[k, n]
            expected[t, n] += weight * (rewards[k, n] + bootstrap - values[k, n])
            if ends[k, n]:
                break
            weight *= 0.97 * 0.9
    given = map(jnp.asarray, (rewards, falls, timeouts, values, next_values))
    advantages, returns = ppo.gae(*given, 0.97, 0.9)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values, atol=1e-5)


def test_a_fall_and_a_timeout_differ_by_the_bootstrap():
    """By hand: reward 1, V = 2, V(s') = 10, discount 1/2, two steps of which the first may end."""
    one, end = jnp.ones((2, 1)), jnp.array([[1.0], [0.0]])

    def advantages(falls, timeouts):
        return ppo.gae(one, falls, timeouts, 2 * one, 10 * one, 0.5, 1.0)[0].ravel().tolist()

    assert advantages(end, 0 * one) == [-1.0, 4.0]  # 1 - 2; 1 + 5 - 2
    assert advantages(0 * one, end) == [4.0, 4.0]  # 1 + 5 - 2: the next episode's 4 stays out
    assert advantages(0 * one, 0 * one) == [6.0, 4.0]  # 4 + 4 / 2


# --- Statistics and densities ---------------------------------------------------------------------
def test_statistics_equal_those_of_all_data():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3.0, 5.0, (k, 4, 3)).astype(np.float32) for k in (2, 7, 1)]
    parts.append(np.full((3, 4, 3), 1e3, np.float32))
    stats = ppo.Stats(jnp.zeros(()), jnp.zeros(3), jnp.ones(3))
    for part in parts:
        stats = ppo.merge_stats(stats, jnp.asarray(part))
    everything = np.concatenate([part.reshape(-1, 3) for part in parts]).astype(np.float64)
    assert stats.count == len(everything)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, everything.var(0), rtol=1e-5)


def test_a_constant_entry_is_not_blown_up():
    stats = {"state": ppo.Stats(jnp.float32(9), jnp.array([5.0, 0.0]), jnp.array([0.0, 4.0]))}
    scaled = ppo.normalize(stats, {"state": jnp.array([5.02, 1.0])})
    assert scaled["state"].tolist() == pytest.approx([2.0, 0.5], 1e-4)


def test_densities_are_those_of_a_squashed_gaussian():
    rng = np.random.default_rng(0)
    loc, raw, other = rng.normal(size=(3, 32, 3))
    std, wide = rng.uniform(0.2, 2, (2, 32, 3))
    normal = Independent(Normal(torch.tensor(loc), torch.tensor(std)), 1)
    reference = TransformedDistribution(normal, TanhTransform(cache_size=1))
    actions = reference.transforms[0](torch.tensor(raw))  # fills the cache: atanh loses nothing
    found = ppo.log_prob(*map(jnp.asarray, (loc, std, raw)))
    np.testing.assert_allclose(found, reference.log_prob(actions), rtol=1e-4)
    target = Independent(Normal(torch.tensor(other), torch.tensor(wide)), 1)
    found = ppo.gaussian_kl(*map(jnp.asarray, (loc, std, other, wide)))
    np.testing.assert_allclose(found, kl_divergence(normal, target), rtol=1e-5)


def test_log_determinant_holds_where_tanh_is_flat():
    raw = np.array([-60.0, -5.0, 0.0, 3.0, 60.0])
    expected = 2 * math.log(2) - 2 * np.logaddexp(raw, -raw)  # log(1 - tanh^2) = -2 log cosh
    np.testing.assert_allclose(ppo.log_det(jnp.asarray(raw)), expected, rtol=1e-5, atol=1e-6)


# --- Networks and loss ----------------------------------------------------------------------------
def test_networks_have_the_published_size_and_start():
    shapes = dict(state=48, privileged_state=123, action=12)
    model, learner = ppo.new_learner(shapes, replace(ppo.Args(), backend="mjx-jax"))
    assert sum(x.size for x in jax.tree.leaves(learner.params)) == 420_249
    rng = np.random.default_rng(0)
    seen = {name: rng.normal(size=(64, shapes[name])) for name in ("state", "privileged_state")}
    loc, std = nnx.merge(model, learner.params).policy(seen)
    assert loc.shape == std.shape == (64, 12) and 0.5 < float(std.mean()) < 0.9


@pytest.mark.parametrize("kind", ["state", "constant"])
def test_deviation_begins_as_asked_and_has_a_lower_bound(kind):
    args = arguments(std=kind, head_scale=0.01, init_std=0.25)
    model, learner = ppo.new_learner(SHAPES, args)
    seen = {"state": jnp.ones((3, 6)), "privileged_state": jnp.ones((3, 7))}
    net = nnx.merge(model, learner.params)
    loc, std = net.policy(seen)
    assert np.allclose(std, 0.25, atol=0.02) and np.abs(loc).max() < 0.1
    assert np.abs(net.value(seen)).max() < 0.1
    if kind == "state":
        net.actor.layers[-1].bias[...] = jnp.full(4, -100.0)
    else:
        net.scale[...] = jnp.full(2, -100.0)
    assert net.policy(seen)[1].tolist() == [[pytest.approx(1e-3)] * 2] * 3


def random_rollout(args, seed=0) -> tuple:
    """model, learner with lived-in statistics, and a rollout (T, N, ...) that its policy produced."""
    rng = np.random.default_rng(seed)
    model, learner = ppo.new_learner(SHAPES, args)
    stats, obs = {}, {}
    for name in learner.stats:
        mean, var = rng.normal(size=SHAPES[name]), rng.uniform(0.5, 2, SHAPES[name])
        stats[name] = ppo.Stats(*(jnp.asarray(x, jnp.float32) for x in (100, mean, var)))
        obs[name] = jnp.asarray(rng.normal(size=(T, N, SHAPES[name])), jnp.float32)
    learner = learner._replace(stats=stats)
    _, batch = ppo.act(learner, obs, jax.random.key(seed), model)
    ends = rng.choice(3, (T, N), p=(0.7, 0.15, 0.15))
    rewards, next_values = rng.normal(size=(2, T, N)).astype(np.float32)
    ends = dict(terminations=np.float32(ends == 1), truncations=np.float32(ends == 2))
    told = jax.tree.map(jnp.asarray, ends | dict(rewards=rewards, next_values=next_values))
    return model, learner, batch | told


def minibatch(learner, batch, args) -> dict:
    """The rollout as `learn` would hand it to the loss: normalised, with advantages."""
    given = [batch[name] for name in ("rewards", "terminations", "truncations")]
    values = batch["values"], batch["next_values"]
    advantages, returns = ppo.gae(*given, *values, args.gamma, args.gae_lambda)
    obs = ppo.normalize(learner.stats, batch["obs"])
    return batch | dict(obs=obs, advantages=advantages, returns=returns)


def numpy_forward(params, x):
    layers = params["layers"]
    for i in range(len(layers)):
        x = x @ np.asarray(layers[i]["kernel"], np.float64) + np.asarray(layers[i]["bias"])
        if i < len(layers) - 1:
            x = x / (1 + np.exp(-x))
    return x


def numpy_loss(params, mb, noise, args):
    """The whole loss again, in double precision and written independently."""
    mb = jax.tree.map(lambda x: np.asarray(x, np.float64), mb)
    out = numpy_forward(params["actor"], mb["obs"]["state"])
    values = numpy_forward(params["critic"], mb["obs"]["privileged_state"])[..., 0]
    loc, std = out[..., :2], np.log1p(np.exp(out[..., 2:])) + 0.001

    def log_density(x):
        gauss = -((x - loc) ** 2) / (2 * std**2) - np.log(std * math.sqrt(2 * math.pi))
        return (gauss - np.log(1 - np.tanh(x) ** 2)).sum(-1)

    advantages = (mb["advantages"] - mb["advantages"].mean()) / mb["advantages"].std()
    ratio = np.exp(log_density(mb["raw"]) - mb["log_probs"])
    near = np.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    surrogate = np.minimum(ratio * advantages, near * advantages).mean()
    value_loss = 0.5 * ((values - mb["returns"]) ** 2).mean()
    squash = np.log(1 - np.tanh(loc + std * noise) ** 2).sum(-1)
    entropy = (np.log(std * math.sqrt(2 * math.pi * math.e)).sum(-1) + squash).mean()
    return -surrogate + args.vf_coef * value_loss - args.ent_coef * entropy


def test_loss_equals_an_independent_one():
    args = arguments(ent_coef=0.5, clip_coef=0.1, vf_coef=2.0)
    model, learner, batch = random_rollout(args)
    mb = minibatch(learner, batch, args)
    noise = np.random.default_rng(5).normal(size=(T, N, 2)).astype(np.float32)
    moved = jax.tree.map(
        lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), learner.params
    )
    loss, metrics = jax.jit(partial(ppo.ppo_loss, model=model, args=args))(moved, mb, noise)
    assert float(loss) == pytest.approx(numpy_loss(moved, mb, noise, args), rel=1e-4)
    assert 0 < metrics["train/clip_fraction"] < 1 and metrics["train/kl"] > 0


def test_the_first_ratio_is_one():
    args = arguments(clip_coef=1e-4)
    model, learner, batch = random_rollout(args)
    mb = minibatch(learner, batch, args)
    _, metrics = ppo.ppo_loss(learner.params, mb, jnp.zeros((T, N, 2)), model, args)
    assert metrics["train/clip_fraction"] == 0
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-5), "advantages are normalised"


# --- An iteration's updates -----------------------------------------------------------------------
def test_every_environment_is_used_once_in_every_epoch(monkeypatch):
    """Rewards are powers of 2, one for each environment: their sum tells how often each was used."""

    def only_count(learner, mb, noise, first, model, args):
        return learner, {"used": mb["rewards"][:, 0].sum(), "first": mb["rewards"][0, 0]}

    monkeypatch.setattr(ppo, "update", only_count)
    args = arguments()
    model, learner, batch = random_rollout(args)
    batch["rewards"] = jnp.tile(2.0 ** jnp.arange(N), (T, 1))
    orders = set()
    for seed in range(3):
        _, metrics = ppo.learn(learner, batch, jax.random.key(seed), model, args)
        assert float(metrics["used"]) * args.num_minibatches == 2.0**N - 1
        orders.add(float(metrics["first"]))
    assert len(orders) == 3, "every iteration has an order of its own"


def test_the_first_rollout_only_fills_the_statistics():
    args = arguments()
    model, _, batch = random_rollout(args)
    _, fresh = ppo.new_learner(SHAPES, args)
    learner, _ = jax.jit(partial(ppo.learn, model=model, args=args))(
        fresh, batch, jax.random.key(0)
    )
    before, after = (ppo.named(p=x.params, o=x.opt_state) for x in (fresh, learner))
    assert_equal(after, before, rtol=0)
    seen = np.asarray(batch["obs"]["state"]).reshape(-1, 6)
    assert learner.stats["state"].count == N * T
    np.testing.assert_allclose(learner.stats["state"].mean, seen.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("kl", "rate"),
    [
        (0.0, 1.5e-3),
        (0.0049, 1.5e-3),
        (0.0051, 1e-3),
        (0.01, 1e-3),
        (0.0199, 1e-3),
        (0.0201, 1e-3 / 1.5),
    ],
)
def test_learning_rate_stays_between_half_and_twice_the_target(kl, rate):
    assert float(ppo.adapted(1e-3, jnp.float32(kl), 0.01)) == pytest.approx(rate)


def test_learning_rate_has_bounds():
    assert float(ppo.adapted(9e-3, jnp.float32(0), 0.01)) == pytest.approx(1e-2)
    assert float(ppo.adapted(1.1e-5, jnp.float32(1), 0.01)) == pytest.approx(1e-5)


# --- Runs -----------------------------------------------------------------------------------------
CLOCKS = ("wall_time", "train_time", "time/sps")


def without_clocks(path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in table(path)]


def assert_same_run(ours: Path, theirs: Path):
    """Bit for bit: all that learns, all environments, and every row but its clocks."""
    assert_equal(arrays(ours / "checkpoint.npz"), arrays(theirs / "checkpoint.npz"), rtol=0)
    assert_equal(arrays(ours / "best.npz"), arrays(theirs / "best.npz"), rtol=0)
    for name in ("metrics.csv", "eval.csv", "final.csv"):
        assert without_clocks(ours / name) == without_clocks(theirs / name)


@pytest.fixture(scope="module")
def whole(quick_compilation, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_envs", make_fakes)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        result = ppo.train(arguments(name="whole"))
        run = Path("runs/whole").resolve()
    assert result["global_step"] == 4 * CALL
    return run


def test_a_run_learns_evaluates_and_saves(whole):
    rows, evals = table(whole / "metrics.csv"), table(whole / "eval.csv")
    assert [int(row["global_step"]) for row in rows] == [CALL, 2 * CALL, 3 * CALL, 4 * CALL]
    assert [int(row["global_step"]) for row in evals] == [2 * CALL, 4 * CALL]
    assert list(evals[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    for row in rows:
        assert float(row["train_time"]) <= float(row["wall_time"])
        assert 0 < float(row["train/reward"]) < 1 and 0 < float(row["train/distance"])
        assert float(row["train/learning_rate"]) == pytest.approx(1e-3)
    assert sum(float(row["train/episodes"]) for row in rows) >= 4 * CALL / 20 - N
    checkpoint = ppo.load(whole / "checkpoint.npz")
    assert {"algo", "args", "shapes", "spec", "progress", "csv_sizes"} < checkpoint.keys()
    _, fresh = ppo.new_learner(SHAPES, arguments())
    for name, start in ppo.named(params=fresh.params).items():
        assert not np.array_equal(checkpoint["arrays"][name], start), name


def test_a_resumed_run_is_the_same_run(fake, whole):
    ppo.train(arguments(name="half", total_timesteps=2 * CALL))
    with open("runs/half/metrics.csv", "a") as file:
        file.write("999999" + 20 * ",0" + "\n")  # it went on a little before it was killed
    ppo.train(ppo.parse_args(["--resume", "runs/half", "--total-timesteps", str(4 * CALL)]))
    assert_same_run(Path("runs/half"), whole)


def test_a_run_that_was_killed_before_its_first_call_can_be_resumed(fake, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(
            ppo, "iterate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("killed"))
        )
        ppo.train(arguments(name="killed"))
    assert ppo.load("runs/killed/checkpoint.npz")["progress"]["global_step"] == 0
    ppo.train(ppo.parse_args(["--resume", "runs/killed"]))
    assert_same_run(Path("runs/killed"), whole)


def test_ctrl_c_saves_and_the_run_goes_on(fake, whole, monkeypatch):
    """The signal arrives in the midst of the first call, from inside the environment."""
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
        patch.setattr(ppo, "make_envs", lambda args: (Interrupting(), FakeEnv()))
        ppo.train(arguments(name="stopped"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ppo.load("runs/stopped/checkpoint.npz")["progress"]["global_step"] == CALL
    ppo.train(ppo.parse_args(["--resume", "runs/stopped"]))
    assert_same_run(Path("runs/stopped"), whole)


def test_best_is_the_best(fake, monkeypatch):
    """Returns rise, then fall: best.npz stays that of the second evaluation, after a resume too."""
    returns = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr(ppo, "evaluate", lambda *_: ({"eval/return": next(returns)}, []))
    monkeypatch.setattr(ppo, "evaluate_file", lambda *_: {})
    ppo.train(arguments(name="best", eval_freq=CALL, total_timesteps=3 * CALL))
    ppo.train(ppo.parse_args(["--resume", "runs/best", "--total-timesteps", str(4 * CALL)]))
    progress = ppo.load("runs/best/best.npz")["progress"]
    assert progress["global_step"] == 2 * CALL and progress["best"] == 3.0


def test_evaluation_repeats_and_leaves_training_alone(fake, whole):
    ppo.train(arguments(name="often", eval_freq=CALL))
    ours, theirs = (arrays(run / "checkpoint.npz") for run in (Path("runs/often"), whole))
    assert_equal(ours, theirs, rtol=0)
    checkpoint = str(whole / "checkpoint.npz")
    args = ppo.parse_args(["--evaluate", "--checkpoint", checkpoint, "--no-capture-video"])
    first, second = ppo.train(args), ppo.train(args)
    assert first == second and first.keys() <= table(whole / "final.csv")[0].keys()
    policy = ppo.Policy(checkpoint)
    beside, _ = ppo.evaluate(policy.act, FakeEnv(), 4)
    assert beside["eval/return"] == float(table(whole / "eval.csv")[-1]["eval/return"])


def test_what_is_reported_did_not_choose_the_best(whole):
    """final.csv is of best.npz on episodes of its own; the jerk is the third difference."""
    (row,) = table(whole / "final.csv")
    policy, seen = ppo.Policy(whole / "best.npz"), []

    def act(obs):
        seen.append(obs["state"])
        return policy.act(obs)

    chosen, _ = ppo.evaluate(act, FakeEnv(), 4)
    fresh, _ = ppo.evaluate(act, FakeEnv(), 16, ppo.FINAL_SEED)
    assert float(row["final/return"]) == fresh["eval/return"] != chosen["eval/return"]
    assert int(row["global_step"]) == 4 * CALL
    actions = np.stack([policy.act({"state": x}) for x in seen[-20:]])
    third = actions[3:] - 3 * actions[2:-1] + 3 * actions[1:-2] - actions[:-3]
    assert float(row["final/action_jerk"]) == pytest.approx(np.abs(third).mean() * 50**3, rel=1e-4)


def test_evaluation_counts_the_first_episode_of_each_environment():
    """A policy that walks off: every episode is a fall, as a loop over environments finds it."""
    env = FakeEnv()
    metrics, film = ppo.evaluate(lambda obs: np.ones((5, 2), np.float32), env, 5)
    state = env.reset_batch(jax.random.split(jax.random.key(ppo.EVAL_SEED), 5))
    lengths, returns, distances = np.zeros(5), np.zeros(5), np.zeros(5)
    for i in range(5):
        place, command = np.asarray(state.qpos[i]), np.asarray(state.command[i])
        while np.linalg.norm(place) <= 2:
            place, lengths[i] = place + 0.3, lengths[i] + 1
            returns[i] += np.exp(-2 * np.sum((place - command) ** 2))
            distances[i] += np.linalg.norm(place - command)
    assert metrics["eval/fall_rate"] == 1 and metrics["eval/length"] == lengths.mean()
    assert metrics["eval/return"] == pytest.approx(returns.mean(), rel=1e-4)
    assert metrics["eval/distance"] == pytest.approx(distances.sum() / lengths.sum(), rel=1e-4)
    half = 1.96 * returns.std(ddof=1) / math.sqrt(5)
    assert metrics["eval/ci_high"] - metrics["eval/return"] == pytest.approx(half, rel=1e-4)
    assert len(film) == lengths[0]


def test_the_point_learns_to_go_where_it_is_told(fake):
    """Of 20, less what the way there costs."""
    args = arguments(
        name="learns",
        num_envs=64,
        unroll_length=10,
        update_epochs=4,
        std="constant",
        init_std=0.5,
        head_scale=0.01,
        learning_rate=3e-3,
        total_timesteps=20_480,
        eval_freq=10**9,
        log_freq=5120,
        eval_episodes=64,
    )
    assert ppo.train(args)["eval/return"] > 16


def test_checkpoint_starts_from_its_networks_and_statistics(fake, whole):
    checkpoint = str(whole / "checkpoint.npz")
    ppo.train(arguments(name="second", total_timesteps=CALL, checkpoint=checkpoint))
    first, second = arrays(checkpoint), arrays("runs/second/checkpoint.npz")
    assert second["stats/state/count"] == first["stats/state/count"] + CALL
    key = "params/actor/layers/0/kernel"
    moved = np.abs(first[key] - second[key]).max()
    assert 0 < moved < 16 * 2e-3, "Adam starts afresh, and moves by its rate in each of 16 updates"


def test_a_video_is_written(fake, whole):
    ppo.train(arguments(evaluate=True, checkpoint=str(whole / "best.npz"), capture_video=True))
    assert (whole / "videos/evaluate.mp4").stat().st_size > 0


def test_contacts_that_do_not_fit_stop_a_run(fake, monkeypatch):
    """About one of 160 environment steps; with a bound of one in ten it is let pass, but logged."""

    class Full(FakeEnv):
        def step(self, state, action):
            full = (state.clock % 10 == 0) & (state.key[0] % 16 == 0)
            state = super().step(state, action)
            return state._replace(metrics=state.metrics | {"overflow": full.astype(jnp.float32)})

        def reset(self, key, clock):
            state = super().reset(key, clock)
            return state._replace(metrics=state.metrics | {"overflow": jnp.zeros(())})

    monkeypatch.setattr(ppo, "make_envs", lambda args: (Full(), FakeEnv()))
    said = rf"^step {CALL}: contacts lost in \d\.\d\d% of steps: allow more$"
    with pytest.raises(ValueError, match=said):
        ppo.train(arguments(name="full"))
    assert float(table("runs/full/metrics.csv")[0]["train/overflow"]) > ppo.MAX_OVERFLOW
    monkeypatch.setattr(ppo, "MAX_OVERFLOW", 0.1)
    ppo.train(arguments(name="room", total_timesteps=CALL))


# --- Physics outside XLA --------------------------------------------------------------------------
def test_an_iteration_in_threads_is_acting_stepping_and_learning(fake):
    """Against the same done in the plain: each share acts and steps with a key of its own."""
    args, env = arguments(backend="mujoco-c", target_kl=0.01, std="constant"), FakeEnv()
    model, learner, _ = random_rollout(args)
    keys = jax.random.split(jax.random.PRNGKey(0), N)
    shares = tuple(env.reset_batch(part, stagger=True) for part in np.split(keys, 2))
    run = ppo.in_threads(env, model, args, 1)
    ours, states, (means, sums) = run(learner, shares, np.int32(3))
    key = jax.random.fold_in(jax.random.key(args.seed), 3)
    *act_keys, learn_key = jax.random.split(key, 3)
    batches, rewards = [], []
    for share, act_key, found in zip(shares, act_keys, states, strict=True):
        steps = []
        for step_key in jax.random.split(act_key, T):
            actions, choice = ppo.act(learner, share.obs, step_key, model)
            share = env.step_batch(share, actions)
            steps.append(choice | ppo.outcome(learner, share, model))
            rewards.append(float(share.reward.mean()))
        np.testing.assert_allclose(found.qpos, share.qpos, atol=1e-5)
        batches.append(jax.tree.map(lambda *x: jnp.stack(x), *steps))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *batches)
    theirs, _ = ppo.learn(learner, batch, learn_key, model, args)
    assert_equal(ppo.named(p=ours.params), ppo.named(p=theirs.params), atol=1e-4)
    assert means["train/reward"].mean() == pytest.approx(np.mean(rewards), rel=1e-5)
    assert means["train/reward"].shape == (1, 2, T) and sums["train/episodes"].shape == (1, 2, T)


@pytest.fixture
def compiled(caplog):
    """-> how often a function was compiled, by any thread, or taken from the cache on disk."""
    before = jax.config.values["jax_log_compiles"]
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level("WARNING", logger="jax"):
        said = "Finished XLA compilation of jit({})".format
        yield lambda name: sum(said(name) in record.getMessage() for record in caplog.records)
    jax.config.update("jax_log_compiles", before)


def test_runs_in_threads_compile_once(fake, compiled):
    """None of the inputs changes its type, such as a weight of JAX's weak type after an update."""
    ppo.train(arguments(name="whole", backend="mujoco-c", std="constant", target_kl=0.01))
    parts = ("act", "learn", "<lambda>", "begin")
    assert {name: compiled(name) for name in parts} == dict.fromkeys(parts, 1)


def test_one_program_compiles_once(fake, compiled):
    ppo.train(arguments(name="once", total_timesteps=2 * CALL, std="constant"))
    assert compiled("iterate") == 1 and compiled("learn") == 0


def test_runs_in_threads_resume_exactly_and_save_on_ctrl_c(fake, monkeypatch):
    told = dict(backend="mujoco-c", std="constant", target_kl=0.01)
    ppo.train(arguments(name="whole", **told))
    calls = []

    class Interrupting(FakeEnv):
        def step_batch(self, state, actions):
            calls.append(1)
            if len(calls) == 7:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return super().step_batch(state, actions)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume runs/stopped"):
        patch.setattr(ppo, "make_envs", lambda args: (Interrupting(), FakeEnv()))
        ppo.train(arguments(name="stopped", **told))
    assert ppo.load("runs/stopped/checkpoint.npz")["progress"]["global_step"] == CALL
    ppo.train(ppo.parse_args(["--resume", "runs/stopped"]))
    assert_same_run(Path("runs/stopped"), Path("runs/whole"))


# --- Policy, files, command line ------------------------------------------------------------------
def test_policy_from_the_file_equals_the_network(whole):
    path = whole / "best.npz"
    policy, checkpoint = ppo.Policy(path), ppo.load(path)
    model, learner = ppo.new_learner(SHAPES, arguments())
    params, stats = (ppo.restored(getattr(learner, k), k, checkpoint) for k in ("params", "stats"))
    rng = np.random.default_rng(0)
    obs = {k: 3 * rng.normal(size=(7, SHAPES[k])) for k in ("state", "privileged_state")}
    loc, _ = nnx.merge(model, params).policy(ppo.normalize(stats, obs))
    np.testing.assert_allclose(policy.act(obs), np.tanh(loc), atol=1e-5)
    assert policy.act({"state": obs["state"][0]}).shape == (2,) and policy.spec == FakeEnv.spec


def test_files_that_do_not_fit_are_refused_and_change_nothing(fake, whole):
    best = str(whole / "best.npz")
    for changes, message in (
        (
            dict(hidden=(8, 8)),
            "^the checkpoint differs in params/actor/layers/0/bias: this run has",
        ),
        (dict(linvel=False), "^the checkpoint differs in params/actor/layers/0/kernel: this run"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo.train(arguments(name="a", checkpoint=best, **changes))
    assert not Path("runs").exists()
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/checkpoint.npz").touch()
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        ppo.train(arguments(name="taken"))
    assert [path.name for path in Path("runs").rglob("*")] == ["taken", "checkpoint.npz"]
    Path("text.npz").write_text("no weights")
    with pytest.raises(ValueError, match="^text.npz is no checkpoint"):
        ppo.load("text.npz")


def test_resume_refuses_what_it_cannot_honour(whole):
    run = str(whole)
    args = ppo.parse_args(["--resume", run, "--total-timesteps", "90", "--threads", "1"])
    assert (args.hidden, args.total_timesteps, args.threads) == ((16, 16), 90, 1)
    for words in (
        ["--gamma", "0.5"],
        ["--backend", "mujoco-c"],
        ["--hidden", "8"],
        ["--seed", "2"],
    ):
        with pytest.raises(ValueError, match=f"^{words[0]} cannot change on --resume of {run}"):
            ppo.parse_args(["--resume", run, *words])


def test_arguments_of_a_checkpoint_are_defaults(whole):
    args = ppo.parse_args(["--checkpoint", str(whole / "best.npz"), "--env-id", "Go1JoystickRough"])
    assert (args.env_id, args.name, args.gamma, args.hidden) == (
        "Go1JoystickRough",
        "",
        0.9,
        (16, 16),
    )


def test_help_shows_each_task_its_defaults(capsys):
    for env_id, backend, num_envs in (
        ("Go1JoystickRough", "mjx-jax", 8192),
        ("Go1JoystickFlat", "mujoco-c", 512),
        ("Go1Stand", "mjx-jax", 128),
    ):
        words = ["--env-id", env_id, "--backend", backend]
        with pytest.raises(SystemExit) as stop:
            ppo.parse_args([*words, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"--num-envs {num_envs} parallel environments" in text
        args = ppo.parse_args(words)
        for name, value in ppo.tuned(env_id, backend).items():
            assert getattr(args, name) == value


def test_published_values_are_the_defaults():
    published = dict(
        total_timesteps=200_000_000,
        num_envs=8192,
        unroll_length=20,
        num_minibatches=32,
        update_epochs=4,
        learning_rate=3e-4,
        gamma=0.97,
        gae_lambda=0.95,
        clip_coef=0.3,
        vf_coef=0.5,
        ent_coef=0.01,
        max_grad_norm=1.0,
        hidden=(512, 256, 128),
        std="state",
        target_kl=None,
        head_scale=1.0,
    )
    args = ppo.Args()
    assert {name: getattr(args, name) for name in published} == published
    for backend in ("mjx-jax", "mjx-warp"):
        assert ppo.tuned("Go1JoystickFlat", backend) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env-id", "Go1Dance", "--backend", "mjx-jax"], "Go1Dance"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere/checkpoint.npz"),
        (["--checkpoint", str(SCRIPT)], "is no checkpoint"),
        (["--evaluate"], "--evaluate needs --checkpoint"),
        (["--num-envs", "100", "--num-minibatches", "32"], "--num-envs must be a multiple of"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
    ],
)
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ppo.train(ppo.parse_args(options))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists(), "nothing is left behind"


def test_the_command_prints_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--evaluate"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 1
    assert result.stderr == "error: --evaluate needs --checkpoint FILE\n"
