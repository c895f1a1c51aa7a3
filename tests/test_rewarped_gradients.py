"""Gradients of whole windows of all six tasks, from actions through physics to rewards and observations."""

import functools

import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402

D = torch.float64
TASKS = tuple(rewarped.tasks())


def make(env_id, n=2, dtype=D, **options):
    options = dict(size="small", dtype=dtype, seed=1, graph=False) | options
    env = rewarped.make(env_id, n, "cpu", **options)
    if env_id == "HandReorient":
        env.FALLEN = 9.0  # the cube slides off the hand, and is followed
    return env


@functools.cache
def scene(env_id):
    """A saved state in contact, of two environments, and 32 actions to go on with."""
    env, g = make(env_id), torch.Generator().manual_seed(0)
    actions = torch.rand(44, 2, env.action_dim, generator=g, dtype=D) - 0.5
    if env_id == "AntRun":
        actions[..., 1::2] += 0.25  # on its legs, or it falls and begins anew
    if env_id == "RollingFlat":  # down to the block, and then a little into it
        actions[:12, :, 1], actions[12:, :, 1] = -1.0, actions[12:, :, 1] - 0.2
    with torch.no_grad():
        for action in actions[:12]:
            env.step(action)
    return env.state_dict(), list(actions[12:])


def window(env, state, actions, seen=1.0):
    """All rewards of a window and, `seen` times, its last observation, as one number."""
    env.state, env.clock[:], total = dict(state), 0, 0
    env.detach()
    for action in actions:
        obs, rewards, terminations, truncations, _ = env.step(action)
        assert not (terminations | truncations).any()
        total = total + rewards.sum()
    return total + seen * sum(value.sum() for value in obs.values())


def gradient(env, state, actions, **options):
    leaves = [action.clone().requires_grad_() for action in actions]
    return torch.stack(
        torch.autograd.grad(window(env, state, leaves, **options), leaves)
    )  # (T, N, A)


# 32 steps are a window of the published algorithm. The tasks on particles take the longest.
@pytest.mark.parametrize(
    "env_id, steps",
    [
        *((task, 4) for task in TASKS),
        *((task, 32) for task in TASKS if task not in ("RollingFlat", "HandFlip")),
        *(pytest.param(task, 32, marks=pytest.mark.slow) for task in ("RollingFlat", "HandFlip")),
    ],
)
def test_a_window_against_central_differences(env_id, steps):
    saved, actions = scene(env_id)
    env, actions = make(env_id), actions[:steps]
    env.load_state_dict(saved)
    grad, g = gradient(env, saved["state"], actions), torch.Generator().manual_seed(2)
    d, errors = torch.randn(grad.shape, generator=g, dtype=D), []
    d = d / d.norm() + 2 * grad / grad.norm()
    for eps in (1e-6, 1e-7, 1e-8):  # the last where a branch is near
        with torch.no_grad():
            up, down = (
                window(
                    env, saved["state"], [a + s * eps * e for a, e in zip(actions, d, strict=True)]
                )
                for s in (1, -1)
            )
        errors.append(abs(float((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
    assert min(errors) < 1e-6, errors
    # Every action matters, unless its joint stops at a limit.
    assert (grad.norm(dim=2) > 0).all()
    if steps == 4:  # and not by the joints in the observation alone: what they push is in reach
        assert (gradient(env, saved["state"], actions, seen=0.0).norm(dim=(0, 2)) > 1e-6).all()


@pytest.mark.parametrize("env_id", TASKS)
def test_the_same_in_float32_from_graphs_without_checkpoints_and_alone(env_id):
    saved, actions = scene(env_id)
    state, actions = saved["state"], actions[:3]
    exact = gradient(make(env_id), state, actions)
    single = gradient(
        make(env_id, dtype=torch.float32),
        {k: v.float() for k, v in state.items()},
        [a.float() for a in actions],
    )
    assert (single - exact).norm() < 1e-3 * exact.norm()
    for options in (dict(graph=True), dict(checkpoint=False), dict(graph=True, checkpoint=False)):
        assert torch.equal(gradient(make(env_id, **options), state, actions), exact), options
    alone = make(env_id, 1)
    for n in range(2):
        one = gradient(
            alone, {k: v[n : n + 1] for k, v in state.items()}, [a[n : n + 1] for a in actions]
        )
        assert one[:, 0].allclose(exact[:, n], rtol=1e-12, atol=1e-14)
