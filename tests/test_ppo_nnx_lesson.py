"""The update on the page for readers of Flax NNX is the update of algos/ppo_mjx_go1.py.

python tests/test_ppo_nnx_lesson.py     what each costs: the table of docs/algos/ppo_mjx_go1_nnx.md
"""

import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))  # as conftest.py does: this file is a command too
jax = pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
nnx = pytest.importorskip("flax.nnx")
ppo = pytest.importorskip("ppo_mjx_go1")
PAGE = ROOT / "docs/algos/ppo_mjx_go1_nnx.md"


def lesson(**changes) -> dict:
    """What the page's only Python block defines, with other arguments if so wished."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    said = "args = Args()  #"
    assert block.count(said) == 1
    names = {}
    exec(block.replace(said, f"args = Args(**{changes})  #"), names)
    return names


def rollout(page: dict, num_envs: int, steps: int) -> tuple[dict, dict]:
    """A rollout (T, N, ...) of random numbers as `learn` takes it, and the statistics of its networks' inputs."""
    rng = np.random.default_rng(0)
    shapes, args = page["shapes"], page["args"]
    draw = lambda *shape: np.float32(rng.normal(size=(steps, num_envs, *shape)))  # noqa: E731
    stats, obs = {}, {}
    for name in ("state", "privileged_state"):
        mean, var = rng.normal(size=shapes[name]), rng.uniform(0.5, 2, shapes[name])
        stats[name] = ppo.Stats(np.float32(100), np.float32(mean), np.float32(var))
        obs[name] = draw(shapes[name])
    model, learner = ppo.new_learner(shapes, args)
    loc, std = nnx.merge(model, learner.params).policy(ppo.normalize(stats, obs))
    raw = np.asarray(loc + std * draw(shapes["action"]))
    log_probs = np.asarray(ppo.log_prob(loc, std, raw)) + 0.1 * draw()
    no = np.zeros((steps, num_envs), np.float32)
    batch = dict(obs=obs, raw=raw, loc=np.asarray(loc), std=np.asarray(std), log_probs=log_probs)
    batch |= dict(values=draw(), next_values=draw(), rewards=draw())
    return batch | dict(terminations=no, truncations=no), stats


def prepared(batch: dict, stats: dict, key, args) -> tuple:
    """What `learn` makes of a rollout before its updates: data (N, T, ...), order of environments, noise."""
    ends, values = (
        [batch[name] for name in names]
        for names in (("terminations", "truncations"), ("values", "next_values"))
    )
    advantages, returns = ppo.gae(batch["rewards"], *ends, *values, args.gamma, args.gae_lambda)
    obs = ppo.normalize(stats, batch["obs"])
    data = batch | dict(obs=obs, advantages=advantages, returns=returns)
    data = jax.tree.map(lambda x: x.swapaxes(0, 1), data)
    num_envs, steps, actions = data["raw"].shape
    order_key, noise_key = jax.random.split(key)
    epochs = jax.random.split(order_key, args.update_epochs)
    orders = np.stack([jax.random.permutation(epoch, num_envs) for epoch in epochs])
    orders = orders.reshape(args.update_epochs * args.num_minibatches, -1)
    keys = jax.random.split(noise_key, len(orders))
    shape = (orders.shape[1], steps, actions)
    return data, orders, [jax.random.normal(noise_key, shape) for noise_key in keys]


def begin(page: dict, stats: dict):
    """The networks without weights, and the learner, of the fast update: the page's weights."""
    model, learner = ppo.new_learner(page["shapes"], page["args"])
    return model, learner._replace(stats=stats)


def test_the_page_updates_as_the_algorithm_does():
    """Two epochs of four minibatches: the same order, the same noise, all weights to a millionth."""
    page = lesson(num_minibatches=4, update_epochs=2, hidden=(32, 32))
    batch, stats = rollout(page, num_envs=16, steps=20)
    key = jax.random.key(3)
    model, learner = begin(page, stats)
    before = ppo.named(params=learner.params)
    learner, _ = jax.jit(partial(ppo.learn, model=model, args=page["args"]))(learner, batch, key)
    fast = ppo.named(params=learner.params)

    page["update"](page["net"], page["optimizer"], *prepared(batch, stats, key, page["args"]))
    ours = ppo.named(params=nnx.as_pure(nnx.state(page["net"])))
    assert ours.keys() == fast.keys()
    for name, weights in fast.items():
        np.testing.assert_allclose(ours[name], weights, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(weights - before[name]).max() > 1e-4, f"{name} did not learn"


def costs(title: str, num_envs: int, rounds: int = 7, **changes):
    """Print CPU-seconds of one iteration's updates, each way in turn: the least of `rounds`."""
    page = lesson(num_minibatches=4, update_epochs=5, **changes)
    batch, stats = rollout(page, num_envs, steps=20)
    key = jax.random.key(3)
    model, learner = begin(page, stats)
    learn = jax.jit(partial(ppo.learn, model=model, args=page["args"]))
    data, orders, noises = prepared(batch, stats, key, page["args"])
    step = nnx.cached_partial(page["train_step"], page["net"], page["optimizer"])

    def cached():
        for indices, noise in zip(orders, noises, strict=True):
            mb = {}
            for name, x in data.items():
                mb[name] = jax.tree.map(lambda y, indices=indices: y[indices], x)
            step(mb, noise)

    ways = {
        "one compiled scan": lambda: learn(learner, batch, key)[0].params,
        "the page": lambda: page["update"](page["net"], page["optimizer"], data, orders, noises),
        "the page with nnx.cached_partial": cached,
    }
    spent = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round compiles
        for name, way in ways.items():
            begun = time.process_time()
            jax.block_until_ready((way(), nnx.state(page["net"])))
            spent[name].append(time.process_time() - begun)
    least = {name: min(times[1:]) for name, times in spent.items()}
    for name, seconds in least.items():
        cost, ratio = 1000 * seconds / len(orders), seconds / least["one compiled scan"]
        print(f"{title:18} {name:34} {cost:7.2f} CPU-ms an update, ratio {ratio:5.2f}")


if __name__ == "__main__":
    costs("hardly any numbers", 16, hidden=(16,))
    costs("on a CPU", 512, hidden=(256, 128, 64))
