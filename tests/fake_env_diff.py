"""Tiny differentiable environments in torch, with the contract of envs/rewarped: a point mass, with traps on demand."""

import numpy as np
import torch


class PointMass:
    """N points in a plane are pushed to the middle. state (N, 4): position and velocity; actions (N, 2) accelerate.

    reward = 1 - |x|^2 - 0.01 |a|^2. `points` adds a cloud of 5 particles around the position; `bouncy` adds a ripple to
    the reward, over which a gradient's sign changes every few centimetres; an environment beyond `wall` terminates;
    `nan` has the numbers of steps at which environment 0 meets NaN, since the start.
    """

    action_dim, control_hz, dt = 2, 20.0, 0.1

    def __init__(
        self,
        num_envs=4,
        device="cpu",
        *,
        seed=0,
        horizon=20,
        points=False,
        bouncy=False,
        wall=3.0,
        nan=(),
        stagger=False,
        dtype=torch.float32,
    ):
        self.env_id, self.num_envs, self.max_episode_steps = "Fake", num_envs, horizon
        self.device = torch.device(device)
        self.obs_dims = {"state": (4,)} | ({"points": (5, 3)} if points else {})
        self.points, self.bouncy, self.wall, self.nan, self.dtype = points, bouncy, wall, nan, dtype
        self.generator, self.total, self.detached = torch.Generator().manual_seed(seed), 0, 0
        self.nan_resets = torch.zeros((), dtype=torch.int64)
        self.reset()
        if stagger:
            self.clock = torch.arange(num_envs) * horizon // num_envs

    def _fresh(self):
        return torch.cat(
            [
                torch.rand((self.num_envs, 2), generator=self.generator, dtype=self.dtype) * 2 - 1,
                torch.zeros((self.num_envs, 2), dtype=self.dtype),
            ],
            -1,
        )

    def _observe(self, state):
        offsets = torch.tensor(
            [[0, 0, 0], [0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]], dtype=self.dtype
        )
        cloud = torch.cat([state[:, :2], torch.zeros_like(state[:, :1])], -1)[:, None] + offsets
        return {"state": state} | ({"points": cloud} if self.points else {})

    def reset(self, seed=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.state, self.clock = self._fresh(), torch.zeros(self.num_envs, dtype=torch.int64)
        self.returns = torch.zeros(self.num_envs, dtype=self.dtype)
        return self._observe(self.state)

    def detach(self):
        self.state, self.detached = self.state.detach(), self.detached + 1

    def step(self, actions):
        x, v = self.state.chunk(2, -1)
        a = actions.clamp(-1, 1)
        v = 0.95 * v + 2 * self.dt * a
        x = x + self.dt * v
        rewards = 1 - x.square().sum(-1) - 0.01 * a.square().sum(-1)
        if self.bouncy:
            rewards = rewards + 0.2 * torch.sin(60 * x).sum(-1)
        state, self.total, self.clock = torch.cat([x, v], -1), self.total + 1, self.clock + 1
        met = torch.zeros(self.num_envs, dtype=torch.bool)
        met[0] = self.total in self.nan
        self.nan_resets += met.sum()
        state, rewards = (
            torch.where(met[:, None], torch.nan, state),
            torch.where(met, torch.nan, rewards),
        )
        self.returns = self.returns + rewards.detach().nan_to_num()
        terminations, truncations = (
            x.detach().norm(dim=-1) > self.wall,
            (self.clock >= self.max_episode_steps) | met,
        )
        done = terminations | truncations
        info = {
            "final_obs": self._observe(state),
            "nan": met,
            "episode": {"return": self.returns, "length": self.clock},
        }
        fresh = self._fresh()
        self.state = torch.where(done[:, None], fresh, state)  # the others keep their graph
        self.clock, self.returns = (
            torch.where(done, 0, self.clock),
            torch.where(done, 0.0, self.returns),
        )
        return self._observe(self.state), rewards, terminations, truncations, info

    def render(self, world=0, size=64):
        image = np.zeros((size, size, 3), np.uint8)
        x, y = ((self.state[world, :2].detach().clamp(-1, 1) + 1) / 2 * (size - 1)).long().tolist()
        image[y, x] = 255
        return image

    def state_dict(self):
        return dict(
            state=self.state.detach(),
            clock=self.clock,
            returns=self.returns,
            total=self.total,
            generator=self.generator.get_state(),
            nan_resets=self.nan_resets.clone(),
        )

    def load_state_dict(self, state):
        self.state, self.clock, self.returns = state["state"], state["clock"], state["returns"]
        self.total, self.nan_resets = state["total"], state["nan_resets"].clone()
        self.generator.set_state(state["generator"])

    def close(self):
        pass
