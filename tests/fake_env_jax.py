"""A tiny environment with the contract for JAX: a point in the plane is to be where the command says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class State(NamedTuple):
    qpos: jax.Array  # (2,)
    qvel: jax.Array  # (2,)
    command: jax.Array  # (2,)
    clock: jax.Array
    length: jax.Array
    returns: jax.Array
    key: jax.Array
    obs: dict
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: dict
    metrics: dict
    episode_return: jax.Array
    episode_length: jax.Array


class FakeEnv:
    """Episodes of 20 steps; to leave the circle of radius 2 ends one.

    "state" is velocity, position, command (6,), without the velocity (4,) if that is hidden;
    "privileged_state" is all six and the clock.
    """

    action_dim, privileged_dim, episode_length, control_hz = 2, 7, 20, 50.0
    spec = {"joints": ["x", "y"], "control_hz": 50.0}

    def __init__(self, linvel: bool = True):
        self.obs_dim = 6 if linvel else 4
        self._reset, self._step = jax.jit(jax.vmap(self.reset)), jax.jit(jax.vmap(self.step))

    def begin(self, key):
        key, at_key, command_key = jax.random.split(key, 3)
        at = jax.random.uniform(at_key, (2,), minval=-1.0)
        return key, at, jax.random.uniform(command_key, (2,), minval=-1.0)

    def observe(self, qpos, qvel, command, clock):
        everything = jnp.concatenate([qvel, qpos, command, clock[None] / 20])
        return {"state": everything[6 - self.obs_dim : 6], "privileged_state": everything}

    def reset(self, key, clock):
        key, qpos, command = self.begin(key)
        still, zero, no = jnp.zeros(2), jnp.zeros(()), jnp.zeros((), bool)
        obs = self.observe(qpos, still, command, clock)
        metrics = {"distance": zero, "nan": zero}
        none = jnp.zeros((), jnp.int32)
        counters = (clock, none, zero, key)
        told = (obs, zero, no, no, obs, metrics, zero, none)
        return State(qpos, still, command, *counters, *told)

    def step(self, state, action):
        qvel = 0.3 * jnp.clip(action, -1, 1)
        qpos = state.qpos + qvel
        distance = jnp.linalg.norm(qpos - state.command)
        reward = jnp.exp(-2 * distance**2)
        clock, length, returns = state.clock + 1, state.length + 1, state.returns + reward
        terminated = jnp.linalg.norm(qpos) > 2.0
        truncated = (clock >= self.episode_length) & ~terminated
        done = terminated | truncated
        final_obs = self.observe(qpos, qvel, state.command, clock)
        key, start, command = self.begin(state.key)
        first = (start, jnp.zeros(2), command, clock * 0, length * 0, returns * 0)
        going = (qpos, qvel, state.command, clock, length, returns)
        now = jax.tree.map(lambda a, b: jnp.where(done, a, b), first, going)
        metrics = {"distance": distance, "nan": jnp.zeros(())}
        told = (reward, terminated, truncated, final_obs, metrics, returns, length)
        return State(*now, key, self.observe(*now[:4]), *told)

    def reset_batch(self, keys, stagger=False):
        clocks = jnp.arange(len(keys)) * self.episode_length // len(keys) * stagger
        return self._reset(keys, clocks.astype(jnp.int32))

    def step_batch(self, state, actions):
        return self._step(state, actions)

    def render(self, qpos, size=(32, 32)):
        return np.zeros((len(qpos), *size, 3), np.uint8)
