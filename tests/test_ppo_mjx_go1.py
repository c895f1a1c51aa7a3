"""PPO on the MJX Go1: its formulas against references and by hand, its runs end to end on a tiny environment."""

import csv
import math
import os
import subprocess
import sys
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


# Half the compile time, and nothing is compiled twice, in later runs of the tests neither
SETTINGS = dict(jax_disable_most_optimizations=True, jax_persistent_cache_min_compile_time_secs=0.2,
                jax_compilation_cache_dir=str(Path(__file__).parent.parent / ".pytest_cache/jax"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name, value in SETTINGS.items():
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


# --- An iteration's updates -------------------------------------------------------------------------------------------
def test_every_world_is_in_one_minibatch_and_every_stratum_in_all():
    seen = [np.asarray(ppo.shuffled({"id": jnp.arange(24)}, jax.random.key(k), 4)["id"]) for k in range(3)]
    for share in seen:
        assert share.shape == (4, 6) and sorted(share.ravel()) == list(range(24))
        for minibatch_ids in share:
            assert sorted(minibatch_ids // 4) == list(range(6))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])


def test_shuffle_and_noise_depend_on_the_world_not_on_its_neighbours():
    key, ids = jax.random.key(0), jnp.arange(24)
    whole, half = ppo.shuffled({"id": ids}, key, 4)["id"], ppo.shuffled({"id": ids[12:]}, key, 4)["id"]
    assert np.array_equal(whole[:, 3:], half)
    assert np.array_equal(ppo.world_noise(key, ids, (2,))[12:], ppo.world_noise(key, ids[12:], (2,)))


def test_mirrored_twice_is_the_same_and_once_is_by_hand():
    mirror = {"state": (np.arange(6), np.array([1.0, -1.0] * 3)), "privileged_state": (np.arange(61), np.ones(61)),
              "action": (np.array([1, 0]), np.array([-1.0, 1.0]))}
    _, batch, last, _ = random_batch()
    batch = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch) | {"last": last, "id": jnp.arange(N)}
    once = ppo.mirrored(batch, mirror, 100)
    np.testing.assert_array_equal(once["raw"], np.asarray(batch["raw"])[..., [1, 0]] * [-1, 1])
    np.testing.assert_array_equal(once["std"], np.asarray(batch["std"])[..., [1, 0]])
    np.testing.assert_array_equal(once["obs"]["state"], np.asarray(batch["obs"]["state"]) * ([1, -1] * 3))
    np.testing.assert_array_equal(once["last"]["state"], last["state"] * ([1, -1] * 3))
    assert once["id"][0] == 100 and once["rewards"] is batch["rewards"]
    mirror["action"] = (np.array([1, 0]), np.array([-1.0, -1.0]))
    twice = ppo.mirrored(ppo.mirrored(batch, mirror, 100), mirror, -100)
    close(twice, batch)


@pytest.fixture(scope="module")
def learn_once(quick_compilation):
    """`learn` compiled for small runs with each of these changes -> learner before, learner after, metrics."""
    def run(learner=None, **changes):
        args, (fresh, batch, last, model) = arguments(**changes), random_batch()
        learner = learner or fresh
        updates = jax.jit(partial(ppo.learn, model=model, args=args, mirror=FakeEnv().mirror))
        return learner, *updates(learner, batch, last, jax.random.key(3), jnp.arange(N))

    return run


def test_updates_are_adams_on_the_gradient_of_the_loss(learn_once):
    """One minibatch, one epoch: the first Adam step moves every weight by the learning rate against its gradient."""
    changes = dict(num_minibatches=1, update_epochs=1, learning_rate=1e-3)
    before, after, metrics = learn_once(**changes)
    _, batch, last, model = random_batch()
    args, mb = arguments(**changes), minibatch(before, batch, last)
    order = np.asarray(ppo.shuffled({"id": jnp.arange(N)}, jax.random.key(0), 1)["id"][0])
    assert sorted(order) == list(range(N))
    noise = ppo.world_noise(jax.random.fold_in(jax.random.key(3), 0), jnp.arange(N), (T, 2))
    (loss, told), grads = jax.jit(jax.value_and_grad(partial(ppo.ppo_loss, model=model, args=args), has_aux=True))(
        before.params, minibatch(before, batch, last), noise)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    scale = min(1.0, args.max_grad_norm / norm)

    def moves(old, new, grad):
        expected = np.asarray(old) - 1e-3 * np.asarray(grad * scale) / (np.abs(grad * scale) + 1e-8)
        large = np.abs(grad * scale) > 1e-5  # below, the order of summation decides
        np.testing.assert_allclose(np.asarray(new)[large], expected[large], atol=2e-6)

    jax.tree.map(moves, before.params, after.params, grads)
    assert float(metrics["loss/value"]) == pytest.approx(float(told["loss/value"]), rel=1e-5)
    assert float(metrics["train/kl"]) == pytest.approx(0, abs=1e-6)
    seen = np.asarray(batch["obs"]["state"]).reshape(-1, 6)
    assert after.stats["state"].count == 100 + N * T
    expected = (100 * np.asarray(before.stats["state"].mean) + seen.sum(0)) / (100 + N * T)
    np.testing.assert_allclose(after.stats["state"].mean, expected, rtol=1e-4)
    assert mb["advantages"].shape == (N, T)


def test_the_first_rollout_only_fills_the_statistics(learn_once):
    fresh = ppo.new_learner(0, SHAPES, arguments())
    before, after, _ = learn_once(learner=fresh)
    close(after.params, before.params, atol=0)
    close(after.opt_state, before.opt_state, atol=0)
    assert after.stats["state"].count == N * T and float(jnp.abs(after.stats["state"].mean).max()) > 0


def test_adaptive_rate_follows_the_divergence(learn_once):
    start, steps = 1e-3, 2 * 4
    assert float(learn_once(target_kl=1e3)[1].learning_rate) == pytest.approx(1e-2), "at its upper bound"
    assert float(learn_once(target_kl=1e-9)[1].learning_rate) == pytest.approx(max(1e-5, start / 1.5 ** (steps - 1)))
    assert float(learn_once()[1].learning_rate) == pytest.approx(start)


def test_a_mirrored_world_learns_mirrored(learn_once):
    """With symmetry, data and its mirror image give the same gradient; the updates see twice the worlds."""
    before, after, metrics = learn_once(symmetry=True, num_minibatches=1, update_epochs=1)
    alone = learn_once(num_minibatches=1, update_epochs=1)[2]
    assert float(metrics["loss/value"]) != float(alone["loss/value"])
    assert float(metrics["train/kl"]) == pytest.approx(0, abs=1e-6), "of the data as it was, not of its mirror image"
    _, batch, last, model = random_batch()
    args, mirror = arguments(symmetry=True, num_minibatches=1, update_epochs=1), FakeEnv().mirror
    flat = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch) | {"last": last, "id": jnp.arange(N)}
    twin = ppo.mirrored(flat, mirror, 0)
    twin_last = twin.pop("last")
    twin.pop("id")
    twin = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), twin)
    same, _ = jax.jit(partial(ppo.learn, model=model, args=args, mirror=mirror))(
        before, twin, twin_last, jax.random.key(3), jnp.arange(N))
    for ours, theirs in zip(jax.tree.leaves(after.params), jax.tree.leaves(same.params), strict=True):
        # the entropy's own noise differs for the two halves, all else is a sum in another order
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) < 1e-4) > 0.9


# --- Runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(quick_compilation, tmp_path_factory):
    """Two runs of the same length, through one program and step by step."""
    folder = tmp_path_factory.mktemp("runs")
    before, make = Path.cwd(), ppo.make_envs
    ppo.make_envs = make_fakes
    os.chdir(folder)
    results = {backend: ppo.train(arguments(name=backend, backend=backend)) for backend in ("mjx-jax", "mujoco-c")}
    os.chdir(before)
    ppo.make_envs = make
    return folder, results


def weights(path) -> dict:
    return ppo.load_file(path)["weights"]


def test_one_program_and_step_by_step_compute_the_same(runs):
    folder, results = runs
    close(*(weights(folder / f"runs/{backend}/last.npz") for backend in results), rtol=2e-3, atol=2e-4)
    for backend, result in results.items():
        rows, evals = table(folder / f"runs/{backend}/metrics.csv"), table(folder / f"runs/{backend}/eval.csv")
        assert [int(row["global_step"]) for row in rows] == [k * N * T for k in (2, 4, 6, 8)]
        assert list(evals[0]) == ["global_step", "wall_time", "train_time", *(f"eval/{k}" for k in (
            "return", "return_std", "ci_low", "ci_high", "lin_vel_error", "yaw_vel_error", "fall_rate", "length"))]
        assert [int(row["global_step"]) for row in evals] == [4 * N * T, 8 * N * T]
        assert float(evals[-1]["eval/return"]) == pytest.approx(result["eval/return"])
        for row in rows:
            assert float(row["train_time"]) <= float(row["wall_time"])
            assert float(row["train/reward"]) == pytest.approx(float(row["train/reward/near"]), rel=1e-5)
            assert 0 < float(row["train/reward"]) < 1 and float(row["train/learning_rate"]) == pytest.approx(1e-3)
        assert sum(float(row["train/episodes"]) for row in rows) >= N * T * 8 / 20 - N
        kept = [path.name for path in (folder / f"runs/{backend}/checkpoints").iterdir()]
        assert kept == [str(8 * N * T)], "the newest checkpoint stays, and no temporary one"
    assert "time/learning" in table(folder / "runs/mujoco-c/metrics.csv")[0]


@pytest.mark.parametrize("backend", ["mjx-jax", "mujoco-c"])
def test_a_resumed_run_is_the_same_run(fake, runs, backend):
    folder, _ = runs
    args = arguments(name="half", backend=backend, total_timesteps=4 * N * T)
    ppo.train(args)
    with open("runs/half/metrics.csv", "a") as file:  # the run went on a little before it was interrupted
        file.write(",".join(["999999"] + ["0"] * (len(table("runs/half/metrics.csv")[0]) - 1)) + "\n")
    resumed = ppo.train(replace(args, resume="runs/half", total_timesteps=8 * N * T))
    assert resumed["global_step"] == 8 * N * T
    whole = folder / f"runs/{backend}"
    for name in ("last.npz", "best.npz"):
        ours, theirs = weights(f"runs/half/{name}"), weights(whole / name)
        for k in theirs:
            np.testing.assert_array_equal(ours[k], theirs[k], err_msg=k)
    clocks = ("wall_time", "train_time", "time/sps", "time/learning", "time/simulation")
    for name in ("metrics.csv", "eval.csv"):
        rows = [[{k: v for k, v in row.items() if k not in clocks} for row in table(path / name)]
                for path in (Path("runs/half"), whole)]
        assert rows[0] == rows[1]


def test_seeds_at_once_are_those_seeds_alone(fake, runs):
    folder, results = runs
    both = ppo.train(arguments(name="both", num_seeds=2, seed=0))
    for name in ("last_s0.npz", "last_s1.npz", "best_s1.npz", "eval_s0.csv", "metrics_s1.csv"):
        assert Path("runs/both", name).exists()
    close(weights("runs/both/last_s1.npz"), weights(folder / "runs/mjx-jax/last.npz"), rtol=2e-3, atol=2e-4)
    assert both["eval/return_s1"] == pytest.approx(results["mjx-jax"]["eval/return"], rel=1e-2)
    assert not np.allclose(weights("runs/both/last_s0.npz")["params/actor/layers/0/kernel"],
                           weights("runs/both/last_s1.npz")["params/actor/layers/0/kernel"])
    assert ppo.load_file("runs/both/last_s1.npz")["args"]["seed"] == 1


def test_evaluation_repeats_and_leaves_training_alone(fake, runs):
    folder, results = runs
    ppo.train(arguments(name="often", eval_freq=2 * N * T))
    close(weights("runs/often/last.npz"), weights(folder / "runs/mjx-jax/last.npz"), atol=0)
    again = [ppo.train(arguments(evaluate=True, checkpoint=str(folder / "runs/mjx-jax/last.npz"), name=name))
             for name in "ab"]
    assert again[0]["eval/return"] == again[1]["eval/return"] == pytest.approx(results["mjx-jax"]["eval/return"])


def test_evaluation_counts_the_first_episode_of_each_world():
    """A policy that walks off: every episode is a fall, its length and return as a loop over worlds finds them."""
    env, args = FakeEnv("mujoco-c"), arguments(eval_episodes=5)
    policy = type("Off", (), {"act": lambda self, obs: np.ones((5, 2), np.float32)})()
    metrics, trace = ppo.evaluate(policy, env, args)
    state = env.reset_batch(jax.random.split(jax.random.key(ppo.EVAL_SEED), 5))
    lengths, returns, errors = np.zeros(5), np.zeros(5), np.zeros(5)
    for world in range(5):
        place, command = np.asarray(state.qpos[world]), np.asarray(state.command[world, :2])
        while np.linalg.norm(place) <= 2:
            place, lengths[world] = place + 0.3, lengths[world] + 1
            returns[world] += np.exp(-2 * np.sum((place - command) ** 2))
            errors[world] += np.linalg.norm(place - command)
    assert metrics["eval/fall_rate"] == 1 and metrics["eval/length"] == pytest.approx(lengths.mean())
    assert metrics["eval/return"] == pytest.approx(returns.mean(), rel=1e-4)
    assert metrics["eval/lin_vel_error"] == pytest.approx(errors.sum() / lengths.sum(), rel=1e-4)
    half = 1.96 * returns.std(ddof=1) / math.sqrt(5)
    assert metrics["eval/ci_high"] - metrics["eval/return"] == pytest.approx(half, rel=1e-4)
    assert len(trace) == lengths[0]


def test_the_point_learns_to_go_where_it_is_told(fake):
    """Of 20, less what the way there costs."""
    ppo.train(arguments(name="learns", num_envs=64, unroll_length=10, update_epochs=4, std="constant", init_std=0.5,
                        head_scale=0.01, learning_rate=3e-3, total_timesteps=20_480, eval_freq=10**9, log_freq=5120,
                        eval_episodes=64))  # fmt: skip
    rows = table("runs/learns/eval.csv")
    assert float(rows[-1]["eval/return"]) > 16, rows


def test_checkpoint_starts_from_weights_alone(fake, runs):
    folder, _ = runs
    result = ppo.train(arguments(name="second", backend="mujoco-c", total_timesteps=2 * N * T,
                                 checkpoint=str(folder / "runs/mjx-jax/last.npz")))
    assert result["global_step"] == 2 * N * T
    first, second = weights(folder / "runs/mjx-jax/last.npz"), weights("runs/second/last.npz")
    assert second["stats/state/count"] == first["stats/state/count"] + 2 * N * T
    key = "params/actor/layers/0/kernel"
    assert 0 < np.abs(first[key] - second[key]).max() < 2 * 8 * 2e-3, "Adam starts afresh and moves by its rate"


def test_video_and_plot_are_written(fake, runs):
    folder, _ = runs
    checkpoint = str(folder / "runs/mjx-jax/last.npz")
    ppo.train(arguments(evaluate=True, checkpoint=checkpoint, name="film", capture_video=True))
    assert Path("runs/film/videos/evaluate.mp4").stat().st_size > 0
    assert Path("runs/film/videos/evaluate.png").read_bytes().startswith(b"\x89PNG")


def test_a_student_learns_from_its_teacher(fake, runs):
    """It sees neither the velocity nor what the teacher's critic sees, and comes closer to its actions."""
    folder, _ = runs
    ppo.train(arguments(name="student", backend="mujoco-c", no_linvel=True, total_timesteps=40 * N * T,
                        distill=str(folder / "runs/mjx-jax/last.npz"), target_kl=None))
    told = [float(row["loss/distill"]) for row in table("runs/student/metrics.csv")]
    assert told[-1] < 0.4 * told[0]
    assert weights("runs/student/last.npz")["stats/state/mean"].shape == (4,)


# --- Policy and files -------------------------------------------------------------------------------------------------
def test_policy_from_the_file_equals_the_network(runs):
    folder, _ = runs
    path = folder / "runs/mjx-jax/last.npz"
    policy, args = ppo.Policy(path), arguments()
    learner = ppo.fill(ppo.new_learner(5, SHAPES, args), ppo.load_file(path))
    obs = {k: np.random.default_rng(0).normal(size=(7, SHAPES[k])).astype(np.float32) * 3 for k in ppo.OBS}
    loc, _ = nnx.merge(ppo.structure(SHAPES, args), learner.params).policy(ppo.normalize(learner.stats, obs))
    np.testing.assert_allclose(policy.act(obs), np.tanh(loc), atol=1e-5)
    assert policy.act({"state": obs["state"][0]}).shape == (2,) and policy.spec == FakeEnv().spec


def test_onnx_equals_the_policy(fake, runs):
    runtime = pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install -e ".[export]"')
    folder, _ = runs
    path = str(folder / "runs/mjx-jax/best.npz")
    ppo.train(arguments(checkpoint=path, export_onnx="policy.onnx"))
    session = runtime.InferenceSession("policy.onnx", providers=["CPUExecutionProvider"])
    obs = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"obs": obs})[0], ppo.Policy(path).act({"state": obs}), atol=1e-5)
    assert not Path("runs").exists(), "an export leaves no run behind"


def test_stops_at_nan_and_names_the_weight(fake, runs):
    folder, _ = runs
    broken = ppo.load_file(folder / "runs/mjx-jax/last.npz")
    broken["weights"]["params/actor/layers/0/bias"][:] = np.nan
    ppo.save_weights(Path("broken.npz"), broken)
    with pytest.raises(FloatingPointError, match=r"^\S+ is not finite at step 160; last good checkpoint: none yet$"):
        ppo.train(arguments(name="other", backend="mujoco-c", checkpoint="broken.npz"))
    assert not Path("runs/other/eval.csv").exists()


def test_files_that_do_not_fit_are_refused(fake, runs):
    folder, _ = runs
    good = str(folder / "runs/mjx-jax/last.npz")
    said = "^the checkpoint differs in params/actor/layers/0/bias: it has .16,., this run"
    with pytest.raises(ValueError, match=said):
        ppo.train(arguments(name="a", backend="mujoco-c", checkpoint=good, hidden=(8, 8)))
    with pytest.raises(ValueError, match="^the checkpoint differs in shapes"):
        ppo.train(arguments(name="b", checkpoint=good, no_linvel=True))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        ppo.train(arguments(name=str(folder / "runs/mjx-jax")))
    Path("text.npz").write_text("no weights")
    with pytest.raises(ValueError, match="^text.npz cannot be read as weights"):
        ppo.load_file("text.npz")
    before = (folder / "runs/mujoco-c/args.json").read_bytes()
    with pytest.raises(ValueError, match="does not fit this run, or is damaged"):
        ppo.train(arguments(resume=str(folder / "runs/mujoco-c"), backend="mujoco-c", hidden=(8, 8)))
    assert (folder / "runs/mujoco-c/args.json").read_bytes() == before, "what is refused changes nothing"


# --- Many devices -----------------------------------------------------------------------------------------------------
DEVICES = """
import sys, numpy as np
sys.path[:0] = {paths}
import jax
jax.config.update("jax_num_cpu_devices", 8)
for name, value in {settings}.items():
    jax.config.update(name, value)
import ppo_mjx_go1 as ppo, test_ppo_mjx_go1 as test
ppo.make_envs = test.make_fakes
for devices in (8, 1):
    args = test.arguments(name=str(devices), devices=devices, num_envs=32, target_kl=0.02, num_seeds=1,
                          total_timesteps=4 * 32 * 5, eval_freq=10**9, log_freq=32 * 5)
    ppo.train(args)
"""


def test_eight_devices_compute_what_one_does(tmp_path):
    script = DEVICES.format(paths=[str(SCRIPT.parent), str(Path(__file__).parent)], settings=SETTINGS)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    eight, one = (tmp_path / "runs" / name for name in ("8", "1"))
    close(weights(eight / "last.npz"), weights(one / "last.npz"), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(table(eight / "metrics.csv"), table(one / "metrics.csv"), strict=True):
        for k in ("train/return", "train/reward", "train/kl", "loss/value", "train/learning_rate", "train/episodes"):
            assert float(ours[k]) == pytest.approx(float(theirs[k]), rel=1e-2, abs=1e-5), k


# --- Command line -----------------------------------------------------------------------------------------------------
def test_help_shows_each_task_its_defaults(capsys):
    for env_id, backend, worlds in (("Go1JoystickRough", "mjx-jax", 8192), ("Go1JoystickFlat", "mujoco-c", 512),
                                    ("Go1Stand", "mjx-jax", 128)):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            ppo.parse_args(["--env-id", env_id, "--backend", backend, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        args = ppo.parse_args(["--env-id", env_id, "--backend", backend])
        assert args.env_id == env_id and args.backend == backend
        assert f"parallel worlds of each seed, over all devices (default: {worlds})" in text
        for key, value in ppo.tuned_defaults(env_id, backend).items():
            assert getattr(args, key) == value


def test_published_values_are_the_defaults():
    args = ppo.Args()
    published = dict(total_timesteps=200_000_000, num_envs=8192, unroll_length=20, num_minibatches=32, update_epochs=4,
                     learning_rate=3e-4, gamma=0.97, gae_lambda=0.95, clip_coef=0.3, vf_coef=0.5, ent_coef=0.01,
                     max_grad_norm=1.0, hidden=(512, 256, 128), std="state", clip_vloss=False, target_kl=None,
                     head_scale=1.0, norm_adv=True, symmetry=False, eval_episodes=128)
    assert {k: getattr(args, k) for k in published} == published
    assert ppo.tuned_defaults("Go1JoystickFlat", "mjx-jax") == ppo.tuned_defaults("Go1JoystickFlat", "mjx-warp") == {}


def test_arguments_of_a_run_come_from_its_files(runs):
    folder, _ = runs
    run = str(folder / "runs/mujoco-c")
    args = ppo.parse_args(["--resume", run, "--total-timesteps", "90"])
    assert (args.backend, args.hidden, args.total_timesteps, args.name) == ("mujoco-c", (16, 16), 90, "mujoco-c")
    args = ppo.parse_args(["--evaluate", "--checkpoint", f"{run}/best.npz"])
    assert args.evaluate and (args.env_id, args.name, args.gamma) == ("FakeJoystick", "", 0.9)
    assert args.kp_factor == (1, 1)


@pytest.mark.parametrize("options, words", [
    (["--env-id", "Go1Dance", "--backend", "mjx-jax"], "Go1Dance"),
    (["--resume", "nowhere"], "there is no nowhere/args.json"),
    (["--checkpoint", str(SCRIPT)], "cannot be read as weights"),
    (["--evaluate"], "--evaluate needs --checkpoint"),
    (["--num-envs", "100", "--num-minibatches", "32"], "--num-envs must be a multiple of --num-minibatches x devices"),
    (["--devices", "64", "--backend", "mjx-jax"], "there are only"),
], ids=lambda x: x[0] if isinstance(x, list) else "")  # fmt: skip
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ppo.train(ppo.parse_args(options))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists(), "nothing is left behind"


def test_the_command_prints_one_line(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--evaluate"], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 2 and result.stderr == "error: --evaluate needs --checkpoint FILE\n"
