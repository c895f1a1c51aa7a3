"""A tiny environment with the contract of envs/so101: a dot in a small picture, to be moved to the middle."""

import numpy as np
import torch


class FakeEnv:
    """N worlds of 10 steps. The state is noise, so only the picture tells where the dot is; actions (N, 2) move it."""

    action_dim, state_dim, max_episode_steps, control_hz = 2, 3, 10, 10.0

    def __init__(
        self, num_envs=4, *, seed=0, size=16, stagger=True, asymmetric=False, cameras=1, horizon=10
    ):
        self.env_id, self.num_envs, self.device, self.size = (
            "Fake",
            num_envs,
            torch.device("cpu"),
            size,
        )
        self.image_shape, self.privileged_dim = (size, size, 3 * cameras), 2 if asymmetric else 0
        self.max_episode_steps = horizon
        self.spec = {"joint_names": ["x", "y"], "control_hz": 10.0}
        self.nan_resets = torch.zeros((), dtype=torch.int64)
        self.generator, self.steps = torch.Generator().manual_seed(seed), 0
        self.obs = self.reset()
        if stagger:
            self.clock = torch.arange(num_envs) % horizon

    def _begin(self, where):
        place = torch.rand((self.num_envs, 2), generator=self.generator) * 2 - 1
        self.place = torch.where(where[:, None], place, self.place)
        self.clock = torch.where(where, 0, self.clock)
        self.length = torch.where(where, 0, self.length)
        self.returns, self.once = torch.where(where, 0.0, self.returns), self.once & ~where

    def reset(self, seed=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        n = self.num_envs
        self.place, self.clock, self.length = (
            torch.zeros(n, 2),
            torch.zeros(n, dtype=int),
            torch.zeros(n, dtype=int),
        )
        self.returns, self.once = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        self._begin(torch.ones(n, dtype=torch.bool))
        self.obs = self._observe()
        return self.obs

    def _observe(self):
        axis = torch.linspace(-1, 1, self.size)
        dx, dy = axis - self.place[:, :1], axis - self.place[:, 1:]
        glow = torch.exp(-8 * (dx.square()[:, None, :] + dy.square()[:, :, None]))  # (N, H, W)
        rgb = (glow[..., None] * torch.tensor([250.0, 120.0, 30.0])).to(torch.uint8)
        noise = torch.rand((self.num_envs, 3), generator=self.generator)
        obs = {"rgb": rgb.repeat(1, 1, 1, self.image_shape[2] // 3), "state": noise}
        return obs | ({"privileged": self.place.clone()} if self.privileged_dim else {})

    def step_begin(self, actions):
        self.actions = actions

    def step_end(self):
        return self.step(self.actions)

    def step(self, actions):
        self.steps += 1
        self.place = (self.place + 0.3 * actions.clamp(-1, 1)).clamp(-1, 1)
        self.clock, self.length = self.clock + 1, self.length + 1
        distance = self.place.norm(dim=-1)
        rewards, success = 1 - distance.clamp(max=1), distance < 0.3
        self.returns, self.once = self.returns + rewards, self.once | success
        truncations, final_obs = self.clock >= self.max_episode_steps, self._observe()
        episode = {"return": self.returns.clone(), "length": self.length.clone(), "success_once": self.once.clone(),
                   "success_at_end": success}  # fmt: skip
        self._begin(truncations)
        first = self._observe()
        pick = {k: truncations.view(-1, *[1] * (v.ndim - 1)) for k, v in first.items()}
        self.obs = {k: torch.where(pick[k], first[k], final_obs[k]) for k in first}
        info = {"final_obs": final_obs, "success": success, "episode": episode}
        return self.obs, rewards, torch.zeros_like(truncations), truncations, info

    def render(self, which=(0,), size=256, camera="third"):
        return np.zeros((len(which), size, size, 3), np.uint8)

    def state_dict(self):
        names = ("place", "clock", "length", "returns", "once", "obs")
        return {k: getattr(self, k) for k in names} | {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        for k, v in state.items():
            if k == "generator":
                self.generator.set_state(v)
            else:
                setattr(self, k, v)

    def close(self):
        pass
