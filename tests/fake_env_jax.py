"""A tiny environment with the contract of envs/go1_mjx.py: a point in the plane is to be where the command says."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class State(NamedTuple):
    qpos: jax.Array  # (2,)
    qvel: jax.Array  # (2,)
    command: jax.Array  # (3,), of which the point sees two
    contact: jax.Array  # (4,)
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
    """Episodes of 20 steps; to leave the circle of radius 2 ends one. "state" is velocity, position, command: (6,)."""

    action_dim, privileged_dim, episode_length, control_hz = 2, 61, 20, 50.0

    def __init__(self, backend="mjx-jax", no_linvel=False):
        self.backend, self.obs_dim, self.task = backend, 4 if no_linvel else 6, SimpleNamespace(stand=False)
        flip = np.tile(np.array([1.0, -1.0], np.float32), 3)
        self.mirror = {"state": (np.arange(self.obs_dim), flip[:self.obs_dim]), "action": (np.arange(2), flip[:2]),
                       "privileged_state": (np.arange(61), np.append(flip, np.ones(55, np.float32)))}
        self.spec = {"joints": ["x", "y"], "control_hz": 50.0}
        self._step = jax.jit(jax.vmap(self.step))
        self.steps = 0  # calls of step_batch from outside a program

    def _begin(self, key):
        key, *subs = jax.random.split(key, 3)
        return key, jax.random.uniform(subs[0], (2,), minval=-1.0), jax.random.uniform(subs[1], (3,), minval=-1.0)

    def _observe(self, qpos, qvel, command):
        seen = jnp.concatenate([qvel, qpos, command[:2]])
        return {"state": seen[6 - self.obs_dim:], "privileged_state": jnp.concatenate([seen, jnp.zeros(55)])}

    def reset(self, key, clock=0):
        key = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        key, qpos, command = self._begin(key)
        obs, zero, no = self._observe(qpos, jnp.zeros(2), command), jnp.zeros(()), jnp.zeros((), bool)
        metrics = {k: zero for k in ("reward/near", "lin_vel_error", "yaw_vel_error", "nan")}
        return State(qpos, jnp.zeros(2), command, jnp.zeros(4, bool), jnp.asarray(clock, jnp.int32),
                     jnp.zeros((), jnp.int32), zero, key, obs, zero, no, no, obs, metrics, zero,
                     jnp.zeros((), jnp.int32))

    def step(self, state, action):
        qvel = 0.3 * jnp.clip(action, -1, 1)
        qpos = state.qpos + qvel
        distance = jnp.linalg.norm(qpos - state.command[:2])
        reward = jnp.exp(-2 * distance**2)
        terminated = jnp.linalg.norm(qpos) > 2.0
        truncated = (state.clock + 1 >= self.episode_length) & ~terminated
        done, length, returns = terminated | truncated, state.length + 1, state.returns + reward
        key, start, command = self._begin(state.key)

        def pick(first, going):
            return jax.tree.map(lambda a, b: jnp.where(done, a, b), first, going)

        final_obs = self._observe(qpos, qvel, state.command)
        metrics = {"reward/near": reward, "lin_vel_error": distance, "yaw_vel_error": distance, "nan": jnp.zeros(())}
        return State(
            pick(start, qpos), pick(jnp.zeros(2), qvel), pick(command, state.command), qpos[:1].repeat(4) > 0,
            pick(0, state.clock + 1), pick(0, length), pick(0.0, returns), key,
            pick(self._observe(start, jnp.zeros(2), command), final_obs), reward, terminated, truncated, final_obs,
            metrics, returns, length)

    def reset_batch(self, keys, stagger=False):
        return jax.jit(jax.vmap(self.reset))(keys)

    def step_batch(self, state, actions):
        self.steps += 1
        return self._step(state, actions)

    def render(self, qpos, size=(32, 32)):
        return np.zeros((len(qpos), *size, 3), np.uint8)
