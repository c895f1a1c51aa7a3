"""PPO on the MJX Go1: its formulas against references and by hand, its runs end to end on a tiny environment."""

import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

needs = dict(reason='needs JAX: pip install -e ".[go1]"')
for name in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(name, **needs)
jax = pytest.importorskip("jax", **needs)
jnp, nnx, ppo = jax.numpy, pytest.importorskip("flax.nnx"), pytest.importorskip("ppo_mjx_go1")
FakeEnv = pytest.importorskip("fake_env_jax").FakeEnv

SCRIPT = Path(ppo.__file__)
SHAPES = dict(state=6, privileged_state=61, action=2)
N, T = 16, 5


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Half the compile time, and nothing is compiled twice."""
    names = dict(jax_disable_most_optimizations=True, jax_persistent_cache_min_compile_time_secs=0.2,
                 jax_compilation_cache_dir=str(tmp_path_factory.mktemp("compiled")))
    before = {name: jax.config.values[name] for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def arguments(**changes) -> ppo.Args:
    """A small run for FakeEnv."""
    values = dict(env_id="FakeJoystick", backend="mjx-jax", num_envs=N, unroll_length=T, num_minibatches=4, devices=1,
                  update_epochs=2, hidden=(16, 16), total_timesteps=8 * N * T, eval_freq=4 * N * T, log_freq=2 * N * T,
                  eval_episodes=4, capture_video=False, compile_cache="", learning_rate=1e-3, gamma=0.9)
    return ppo.Args(**values | changes)


def make_fakes(args):
    return FakeEnv(args.backend, args.no_linvel), FakeEnv("mujoco-c", args.no_linvel)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(ppo, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def random_batch(seed=0, n=N, t=T) -> tuple[ppo.Learner, dict, nnx.GraphDef]:
    """A learner whose statistics are not trivial, and a rollout (T, N, ...) that its policy may have produced."""
    args, rng = arguments(), np.random.default_rng(seed)
    model, learner = ppo.structure(SHAPES, args), ppo.new_learner(seed, SHAPES, args)
    stats = {k: ppo.Stats(jnp.float32(100), jnp.asarray(rng.normal(size=SHAPES[k]), jnp.float32),
                          jnp.asarray(rng.uniform(0.5, 2, SHAPES[k]), jnp.float32)) for k in ppo.OBS}
    learner = learner._replace(stats=stats)
    obs, last = ({k: rng.normal(size=(*lead, SHAPES[k])).astype(np.float32) for k in ppo.OBS}
                 for lead in ((t, n), (n,)))
    choices = [ppo.act(learner, {k: v[i] for k, v in obs.items()}, jax.random.key(i), jnp.arange(n), model)[1]
               for i in range(t)]
    ends = rng.choice(3, (t, n), p=(0.7, 0.15, 0.15))
    batch = jax.tree.map(lambda *x: jnp.stack(x), *choices) | dict(
        rewards=rng.normal(size=(t, n)).astype(np.float32), terminations=np.float32(ends == 1),
        truncations=np.float32(ends == 2), next_values=rng.normal(size=(t, n)).astype(np.float32))
    return learner, batch, last, model


# --- Advantages -------------------------------------------------------------------------------------------------------
def numbers(seed=0, t=9, n=7):
    rng = np.random.default_rng(seed)
    ends = rng.choice(3, (t, n), p=(0.6, 0.2, 0.2))
    rewards, values, next_values = rng.normal(size=(3, t, n))
    next_values[:-1] = np.where(ends[:-1] == 0, values[1:], next_values[:-1])  # as in a rollout
    return rewards, (ends == 1) * 1.0, (ends == 2) * 1.0, values, next_values


def test_advantages_equal_the_sum_of_their_definition():
    """Each advantage as the explicit sum over the rest of its episode, in double precision."""
    rewards, falls, timeouts, values, next_values = numbers()
    gamma, lam, expected = 0.97, 0.9, np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        weight = 1.0
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if falls[k, n] else gamma * next_values[k, n]
            expected[t, n] += weight * (rewards[k, n] + bootstrap - values[k, n])
            if falls[k, n] or timeouts[k, n]:
                break
            weight *= gamma * lam
    advantages, returns = ppo.gae(*map(jnp.asarray, (rewards, falls, timeouts, values, next_values)), gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values, atol=1e-5)


def test_a_fall_and_a_timeout_differ_by_the_bootstrap():
    """By hand: reward 1, V = 2, V(s') = 10, discount 1/2."""
    one = jnp.ones((2, 1))
    end = jnp.array([[1.0], [0.0]])
    given = one, 2 * one, 10 * one
    fall, _ = ppo.gae(given[0], end, 0 * one, given[1], given[2], 0.5, 1.0)
    timeout, _ = ppo.gae(given[0], 0 * one, end, given[1], given[2], 0.5, 1.0)
    neither, _ = ppo.gae(given[0], 0 * one, 0 * one, given[1], given[2], 0.5, 1.0)
    assert fall.ravel().tolist() == [-1.0, 4.0]  # 1 - 2; 1 + 5 - 2
    assert timeout.ravel().tolist() == [4.0, 4.0]  # 1 + 5 - 2, and the next episode's 4 stays out
    assert neither.ravel().tolist() == [6.0, 4.0]  # 4 + 4 / 2


def test_brax_advantages_equal_a_loop():
    rewards, falls, timeouts, values, next_values = numbers(1)
    gamma, lam, t, n = 0.97, 0.95, *rewards.shape
    targets, expected = np.zeros((t + 1, n)), np.zeros((t, n))
    targets[t], extra = next_values[-1], np.zeros(n)
    for i in reversed(range(t)):
        live, on = 1 - timeouts[i], 1 - falls[i]
        extra = live * (rewards[i] + gamma * on * next_values[i] - values[i]) + gamma * lam * on * live * extra
        targets[i] = values[i] + extra
        expected[i] = live * (rewards[i] + gamma * on * targets[i + 1] - values[i])
    found = ppo.gae_brax(*map(jnp.asarray, (rewards, falls, timeouts, values, next_values)), gamma, lam)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], targets[:t], atol=1e-5)
    assert (np.asarray(found[0])[timeouts == 1] == 0).all(), "a step that times out teaches nothing"


# --- Statistics and densities -----------------------------------------------------------------------------------------
def test_statistics_equal_those_of_all_data():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3.0, 5.0, (k, 4, 3)).astype(np.float32) for k in (2, 7, 1)]
    parts += [np.full((3, 4, 3), 1e3, np.float32)]
    stats = ppo.Stats(jnp.zeros(()), jnp.zeros(3), jnp.ones(3))
    for part in parts:
        stats = ppo.merge_stats(stats, jnp.asarray(part))
    everything = np.concatenate([part.reshape(-1, 3) for part in parts]).astype(np.float64)
    assert stats.count == len(everything)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, everything.var(0), rtol=1e-5)


def test_a_constant_entry_is_not_blown_up():
    stats = {"state": ppo.Stats(jnp.float32(9), jnp.array([5.0, 0.0]), jnp.array([0.0, 4.0]))}
    assert ppo.normalize(stats, {"state": jnp.array([5.02, 1.0])})["state"].tolist() == pytest.approx([2.0, 0.5], 1e-4)


def test_log_probability_is_that_of_a_squashed_gaussian():
    rng = np.random.default_rng(0)
    loc, raw = rng.normal(size=(2, 32, 3)) * 2
    std = rng.uniform(0.1, 2, (32, 3))
    normal = Independent(Normal(torch.tensor(loc), torch.tensor(std)), 1)
    reference = TransformedDistribution(normal, TanhTransform(cache_size=1))
    actions = reference.transforms[0](torch.tensor(raw))  # fills the cache, so that atanh loses nothing
    np.testing.assert_allclose(ppo.log_prob(*map(jnp.asarray, (loc, std, raw))), reference.log_prob(actions), rtol=1e-4)


def test_log_determinant_holds_where_tanh_is_flat():
    raw = np.array([-60.0, -5.0, 0.0, 3.0, 60.0])
    expected = -2 * np.logaddexp(raw, -raw) + 2 * math.log(2)  # log(1 - tanh^2) = -2 log cosh
    np.testing.assert_allclose(ppo.log_det(jnp.asarray(raw)), expected, rtol=1e-5, atol=1e-6)


def test_divergence_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    (loc, other), (std, wide) = rng.normal(size=(2, 8, 3)), rng.uniform(0.2, 2, (2, 8, 3))
    p, q = (Independent(Normal(torch.tensor(m), torch.tensor(s)), 1) for m, s in ((loc, std), (other, wide)))
    found = ppo.gaussian_kl(*map(jnp.asarray, (loc, std, other, wide)))
    np.testing.assert_allclose(found, kl_divergence(p, q), rtol=1e-5)


# --- Networks and loss ------------------------------------------------------------------------------------------------
def test_networks_have_the_published_size_and_start():
    args = replace(arguments(), hidden=(512, 256, 128))
    shapes = dict(state=48, privileged_state=123, action=12)
    learner = ppo.new_learner(0, shapes, args)
    assert sum(x.size for x in jax.tree.leaves(learner.params)) == 420_249
    seen = {k: np.random.default_rng(0).normal(size=(64, shapes[k])).astype(np.float32) for k in ppo.OBS}
    loc, std = nnx.merge(ppo.structure(shapes, args), learner.params).policy(seen)
    assert loc.shape == std.shape == (64, 12) and 0.5 < float(std.mean()) < 0.9
    small = replace(args, head_scale=0.01, init_std=0.25)
    for kind in ("state", "constant"):
        chosen = replace(small, std=kind)
        net = nnx.merge(ppo.structure(shapes, chosen), ppo.new_learner(0, shapes, chosen).params)
        loc, std = net.policy(seen)
        assert float(jnp.abs(loc).max()) < 0.1 and np.allclose(std, 0.25, atol=0.02)
        assert float(jnp.abs(net.value(seen)).max()) < 0.1


def numpy_forward(params, x):
    layers = params["layers"]
    for i in range(len(layers)):
        x = x @ np.asarray(layers[i]["kernel"], np.float64) + np.asarray(layers[i]["bias"])
        x = x / (1 + np.exp(-x)) if i < len(layers) - 1 else x
    return x


def numpy_loss(params, mb, noise, args):
    """The whole loss again, in double precision and written independently."""
    mb = jax.tree.map(lambda x: np.asarray(x, np.float64), mb)
    out, values = numpy_forward(params["actor"], mb["obs"]["state"]), numpy_forward(
        params["critic"], mb["obs"]["privileged_state"])[..., 0]
    loc, std = out[..., :2], np.log1p(np.exp(out[..., 2:])) + 0.001

    def log_density(x):
        gauss = -((x - loc) ** 2) / (2 * std**2) - np.log(std * math.sqrt(2 * math.pi))
        return (gauss - np.log(1 - np.tanh(x) ** 2)).sum(-1)

    advantages, returns = mb["advantages"], mb["returns"]
    if args.gae == "brax":
        advantages, returns = np.zeros_like(values), np.zeros_like(values)
        last = numpy_forward(params["critic"], mb["last"]["privileged_state"])[..., 0]
        for b in range(len(values)):
            following, target, extra = last[b], last[b], 0.0
            for t in reversed(range(values.shape[1])):
                live, on = 1 - mb["truncations"][b, t], 1 - mb["terminations"][b, t]
                delta = live * (mb["rewards"][b, t] + args.gamma * on * following - values[b, t])
                advantages[b, t] = live * (mb["rewards"][b, t] + args.gamma * on * target - values[b, t])
                extra = delta + args.gamma * args.gae_lambda * on * live * extra
                following, target = values[b, t], values[b, t] + extra
                returns[b, t] = target
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = np.exp(log_density(mb["raw"]) - mb["log_probs"])
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef) * advantages)
    error = (values - returns) ** 2
    if args.clip_vloss:
        near = np.clip(values, mb["values"] - args.clip_coef, mb["values"] + args.clip_coef)
        error = np.maximum(error, (near - returns) ** 2)
    fresh = loc + std * np.asarray(noise, np.float64)
    gauss = np.log(std * math.sqrt(2 * math.pi * math.e)).sum(-1)
    entropy = (gauss + np.log(1 - np.tanh(fresh) ** 2).sum(-1)).mean()
    return -surrogate.mean() + args.vf_coef * 0.5 * error.mean() - args.ent_coef * entropy


def minibatch(learner, batch, last):
    """The rollout as `learn` would hand it to the loss: (N, T, ...), normalised, with advantages."""
    advantages, returns = ppo.gae(*(batch[k] for k in (
        "rewards", "terminations", "truncations", "values", "next_values")), 0.9, 0.95)
    mb = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch | dict(advantages=advantages, returns=returns))
    return mb | {"obs": ppo.normalize(learner.stats, mb["obs"]), "last": ppo.normalize(learner.stats, last)}


@pytest.mark.parametrize("changes", [
    {}, dict(clip_vloss=True, norm_adv=False, ent_coef=0.5), dict(gae="brax", clip_coef=0.05, vf_coef=2.0),
], ids=["published", "clipped values", "brax"])  # fmt: skip
def test_loss_equals_an_independent_one(changes):
    args, (learner, batch, last, model) = arguments(**changes), random_batch()
    mb, noise = minibatch(learner, batch, last), np.random.default_rng(5).normal(size=(N, T, 2)).astype(np.float32)
    moved = jax.tree.map(lambda p: p + np.float32(0.1) * np.sin(np.arange(p.size)).reshape(p.shape), learner.params)
    loss, metrics = jax.jit(partial(ppo.ppo_loss, model=model, args=args))(moved, mb, noise)
    assert float(loss) == pytest.approx(numpy_loss(moved, mb, noise, args), rel=1e-4)
    assert 0 < metrics["train/clip_fraction"] < 1 and metrics["train/kl"] > 0


def test_the_first_ratio_is_one():
    args, (learner, batch, last, model) = arguments(clip_coef=1e-5), random_batch()
    mb = minibatch(learner, batch, last)
    loc, std = nnx.merge(model, learner.params).policy(mb["obs"])
    np.testing.assert_allclose(ppo.log_prob(loc, std, mb["raw"]), mb["log_probs"], atol=1e-5)
    _, metrics = ppo.ppo_loss(learner.params, mb, jnp.zeros((N, T, 2)), model, args)
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["loss/policy"] == pytest.approx(0, abs=1e-5), "minus the mean of normalised advantages"
