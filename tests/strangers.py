"""Environments of a stranger, written from the three contracts of envs/__init__.py and from nothing else.

tests/test_alone.py puts this file beside a copied algorithm. Each task: move a point to the middle.
"""

import numpy as np
import torch


class Point:
    """The first contract. A point in the unit square; the image shows it, as far as 16 or more pixels can.

    `state_dim` numbers of the state are the place, then zeros. Without `image_size` there is no image.
    """

    action_dim, max_episode_steps, control_hz, spec = 2, 8, 10.0, {}

    def __init__(
        self, num_envs, device="cpu", seed=0, image_size=0, state_dim=2, end_on_success=False
    ):
        self.num_envs, self.device, self.state_dim = num_envs, torch.device(device), state_dim
        self.image_size, self.end_on_success, self.privileged_dim = image_size, end_on_success, 0
        if image_size:
            self.image_shape = (image_size, image_size, 3)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=device)
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.reset()

    def draw(self):
        return 2 * torch.rand(self.num_envs, 2, generator=self.random, device=self.device) - 1

    def reset(self, seed=None):
        if seed is not None:
            self.random.manual_seed(seed)
        self.place = self.draw()
        self.clock = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.returns = torch.zeros(self.num_envs, device=self.device)
        self.once = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self.look()

    def look(self):
        state = torch.zeros(self.num_envs, self.state_dim, device=self.device)
        state[:, :2] = self.place[:, : self.state_dim]
        obs = {"state": state}
        if self.image_size:
            axis = torch.linspace(-1, 1, self.image_size, device=self.device)
            near_x = (axis - self.place[:, :1]).abs() < 0.2
            near_y = (axis - self.place[:, 1:]).abs() < 0.2
            spot = near_y[:, :, None] & near_x[:, None, :]
            obs["rgb"] = (255 * spot[..., None].expand(-1, -1, -1, 3)).to(torch.uint8)
        return obs

    def step(self, actions):
        self.place = (self.place + 0.3 * actions).clamp(-1, 1)
        self.clock = self.clock + 1
        distance = self.place.norm(dim=-1)
        success = distance < 0.3
        rewards = 1 - distance
        self.returns = self.returns + rewards
        self.once = self.once | success
        terminations = success & self.end_on_success
        truncations = (self.clock >= self.max_episode_steps) & ~terminations
        done = terminations | truncations
        episode = {"return": self.returns, "length": self.clock}
        episode |= {"success_once": self.once, "success_at_end": success}
        info = {"final_obs": self.look(), "episode": episode, "success": success}
        self.place = torch.where(done[:, None], self.draw(), self.place)
        self.clock = torch.where(done, 0, self.clock)
        self.returns = torch.where(done, 0.0, self.returns)
        self.once = self.once & ~done
        return self.look(), rewards, terminations, truncations, info

    def render(self, which=(0,), size=256):
        return np.zeros((len(which), size, size, 3), np.uint8)

    def state_dict(self):
        names = ("place", "clock", "returns", "once")
        return {name: getattr(self, name) for name in names} | {"random": self.random.get_state()}

    def load_state_dict(self, state):
        for name in ("place", "clock", "returns", "once"):
            setattr(self, name, state[name])
        self.random.set_state(state["random"])

    def close(self):
        pass


class Slope:
    """The second contract: the same point, with gradients of rewards and observations."""

    action_dim, max_episode_steps, control_hz, obs_dims = 2, 8, 10.0, {"state": (2,)}

    def __init__(self, num_envs, device="cpu", seed=0):
        self.num_envs, self.device = num_envs, torch.device(device)
        self.nan_resets = torch.zeros((), dtype=torch.int64)
        self.random = torch.Generator().manual_seed(seed)
        self.reset()

    def draw(self):
        return 2 * torch.rand(self.num_envs, 2, generator=self.random) - 1

    def reset(self, seed=None):
        if seed is not None:
            self.random.manual_seed(seed)
        self.place = self.draw()
        self.clock = torch.zeros(self.num_envs, dtype=torch.int64)
        self.returns = torch.zeros(self.num_envs)
        return {"state": self.place}

    def detach(self):
        self.place = self.place.detach()

    def step(self, actions):
        self.place = self.place + 0.3 * actions
        self.clock = self.clock + 1
        rewards = 1 - self.place.square().sum(-1)
        self.returns = self.returns + rewards.detach()
        truncations = self.clock >= self.max_episode_steps
        never = torch.zeros_like(truncations)
        episode = {"return": self.returns, "length": self.clock}
        info = {"final_obs": {"state": self.place}, "episode": episode, "nan": never}
        self.place = torch.where(truncations[:, None], self.draw(), self.place)
        self.clock = torch.where(truncations, 0, self.clock)
        self.returns = torch.where(truncations, 0.0, self.returns)
        return {"state": self.place}, rewards, never, truncations, info

    def render(self, world=0, size=256):
        return np.zeros((size, size, 3), np.uint8)

    def state_dict(self):
        saved = {"place": self.place.detach(), "clock": self.clock, "returns": self.returns}
        return saved | {"random": self.random.get_state()}

    def load_state_dict(self, state):
        self.place, self.clock, self.returns = state["place"], state["clock"], state["returns"]
        self.random.set_state(state["random"])

    def close(self):
        pass


def jax_point():
    """The third contract. JAX is imported only here, since the other files have no need of it."""
    from typing import NamedTuple

    import jax
    import jax.numpy as jnp

    class State(NamedTuple):
        qpos: jax.Array
        clock: jax.Array
        returns: jax.Array
        key: jax.Array
        obs: dict
        final_obs: dict
        reward: jax.Array
        terminated: jax.Array
        truncated: jax.Array
        metrics: dict
        episode_return: jax.Array
        episode_length: jax.Array

    def look(qpos):
        return {"state": qpos, "privileged_state": jnp.concatenate([qpos, qpos])}

    def first(key):
        key, draw = jax.random.split(key)
        return key, jax.random.uniform(draw, (2,), minval=-1.0)

    class JaxPoint:
        action_dim, obs_dim, privileged_dim, episode_length = 2, 2, 4, 8
        control_hz, spec = 10.0, {}

        def reset(self, key, clock):
            key, qpos = first(key)
            zero, no, obs = jnp.zeros(()), jnp.zeros((), bool), look(qpos)
            metrics = {"reward/near": zero}
            length = jnp.zeros((), jnp.int32)
            return State(qpos, clock, zero, key, obs, obs, zero, no, no, metrics, zero, length)

        def step(self, state, action):
            qpos = jnp.clip(state.qpos + 0.3 * action, -1, 1)
            reward = 1 - jnp.linalg.norm(qpos)
            clock, returns = state.clock + 1, state.returns + reward
            done = clock >= self.episode_length
            key, fresh = first(state.key)
            start = jnp.where(done, fresh, qpos)
            return State(
                start, jnp.where(done, 0, clock), jnp.where(done, 0.0, returns), key, look(start), look(qpos),
                reward, jnp.zeros((), bool), done, {"reward/near": reward}, returns, clock,
            )  # fmt: skip

        def reset_batch(self, keys, stagger=False):
            number = len(keys)
            clocks = jnp.arange(number, dtype=jnp.int32) * self.episode_length // number
            return jax.vmap(self.reset)(keys, clocks if stagger else 0 * clocks)

        def step_batch(self, state, actions):
            return jax.vmap(self.step)(state, actions)

        def render(self, qpos, size=(32, 32)):
            return np.zeros((len(qpos), *size, 3), np.uint8)

    return JaxPoint()
