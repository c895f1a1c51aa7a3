"""Dot-reach: the smallest task that has to be solved from pixels, thousands of environments at once in plain torch.

`make("dot_reach", num_envs, device, seed=...)` returns a batched environment with the contract of `envs/__init__.py`.
A red disk (the agent) is to be moved onto a green one (the goal); where the two overlap the image is yellow. Both
begin at uniformly random places of a square arena. An action is a velocity, the reward is minus the distance, and an
episode ends by its time limit after 25 steps, which is a truncation. The state is empty: only the image tells.

    python -m envs.dot_reach        measures the returns of the oracle and of random actions anew

Why minus the distance, and not one minus it cut off at zero: a reward that is flat far from the goal leaves a policy
that has driven itself into a corner there.
"""

import torch

# ------------------------------------------------------------------------------------------------------- the task ----
HORIZON, CONTROL_HZ = 25, 10.0  # frames of an episode; the rate matters to videos only
SPEED, RADIUS, NEAR = (
    0.15,
    0.16,
    0.2,
)  # per frame at |action| = 1; of both disks; distance that counts as success
START = 0.8  # goal and agent begin in [-START, START]^2, wholly in the image, which shows the arena [-1, 1]^2
# Mean returns over a million episodes, as `python -m envs.dot_reach` prints them. No policy beats the oracle: each
# coordinate's distance shrinks as fast as it can, independently of the other.
ORACLE_RETURN, RANDOM_RETURN, STILL_RETURN = -2.031, -22.064, -20.861


def oracle(env: "DotReach") -> torch.Tensor:
    """The best actions (N, 2) for the present states: straight at the goal, each coordinate as fast as it goes."""
    return ((env.goal - env.agent) / (SPEED * env.action_repeat)).clamp(-1, 1)


def reference_returns(episodes: int = 1_000_000, seed: int = 0, device="cpu") -> dict[str, float]:
    """Mean return of the oracle, of uniformly random actions and of standing still, over the same first states."""
    generator, means = torch.Generator(device).manual_seed(seed), {}
    env = DotReach("dot_reach", episodes, device, seed=seed, image_size=4, images=False)
    for name, act in {
        "oracle": lambda: oracle(env),
        "random": lambda: torch.rand(episodes, 2, generator=generator, device=device) * 2 - 1,
        "still": lambda: torch.zeros(episodes, 2, device=device),
    }.items():
        env.reset(seed)
        means[name] = sum(env.step(act())[1].double().mean().item() for _ in range(HORIZON))
    return means


# --------------------------------------------------------------------------------------------------- environment ----
class DotReach:
    """A batch of dot-reach environments; the contract is in `envs/__init__.py`.

    Observations: `rgb` uint8 (N, image_size, image_size, 3 * frame_stack), newest frame last; `state` float32 (N, 0).
    Actions: (N, 2) in [-1, 1], right and up. Nothing waits for the device: masks instead of branches.
    """

    action_dim, state_dim, privileged_dim, control_hz, has_success = 2, 0, 0, CONTROL_HZ, True

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        stagger: bool = False,
        image_size: int = 32,
        action_repeat: int = 1,
        frame_stack: int = 1,
        camera: None = None,
        renderer: str = "auto",
        images: bool = True,
    ):
        if env_id != "dot_reach":
            raise ValueError(f"unknown task {env_id!r}; envs/dot_reach.py has one, 'dot_reach'")
        if num_envs < 1 or image_size < 4:
            raise ValueError(
                f"num_envs must be at least 1, image_size at least 4; got {num_envs} and {image_size}"
            )
        if action_repeat < 1 or frame_stack < 1:
            raise ValueError(
                f"action_repeat and frame_stack must be at least 1; got {action_repeat} and {frame_stack}"
            )
        if camera is not None or renderer != "auto":
            raise ValueError(
                "dot_reach has one view, drawn by torch: leave camera None and renderer 'auto'"
            )
        self.env_id, self.num_envs, self.device, self.images = (
            env_id,
            num_envs,
            torch.device(device),
            images,
        )
        self.image_size, self.action_repeat, self.frame_stack = (
            image_size,
            action_repeat,
            frame_stack,
        )
        self.image_shape = (image_size, image_size, 3 * frame_stack)
        self.max_episode_steps = -(-HORIZON // action_repeat)
        self.spec = {
            "env_id": env_id, "action_semantics": f"velocity (right, up), {SPEED} of the arena's half side a frame",
            "control_hz": CONTROL_HZ, "action_repeat": action_repeat, "state_layout": [], "image_size": image_size,
            "frame_stack": frame_stack, "max_episode_steps": self.max_episode_steps,
        }  # fmt: skip
        self.generator = torch.Generator(self.device)
        zeros = lambda *shape, **kind: torch.zeros(num_envs, *shape, device=self.device, **kind)  # noqa: E731
        self.agent, self.goal, self.returns = zeros(2), zeros(2), zeros()
        self.clock, self.length = (
            zeros(dtype=torch.int64),
            zeros(dtype=torch.int64),
        )  # agent steps: limit, this episode
        self.once = zeros(dtype=torch.bool)
        self.nan_resets = torch.zeros(
            (), dtype=torch.int64, device=self.device
        )  # nothing here can diverge
        self.obs = self.reset(seed)
        if stagger:
            self.clock = (
                torch.arange(num_envs, device=self.device) * self.max_episode_steps // num_envs
            )

    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Starts a new episode in every environment, all clocks at 0. With a seed, always the same episodes."""
        if seed is not None:
            self.generator.manual_seed(seed)
        everywhere = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        self._begin(everywhere)
        self.obs = {"rgb": self._stacked(self._draw(), everywhere), "state": self._no_state()}
        return self.obs

    def _begin(self, where: torch.Tensor) -> None:
        """New episodes in the environments of the mask `where` (N,). Draws for all: nothing waits for the mask."""
        places = (
            torch.rand(2, self.num_envs, 2, generator=self.generator, device=self.device)
            * 2
            * START
            - START
        )
        self.agent, self.goal = (torch.where(where[:, None], new, old)
                                 for new, old in zip(places, (self.agent, self.goal), strict=True))  # fmt: skip
        self.clock, self.length = (
            self.clock.masked_fill(where, 0),
            self.length.masked_fill(where, 0),
        )
        self.returns, self.once = self.returns.masked_fill(where, 0.0), self.once & ~where

    def _draw(self, size: int | None = None, numbers=slice(None)) -> torch.Tensor:
        """Images (N, size, size, 3) uint8 of the present state; a pixel has the share that the disk covers of it."""
        size = size or self.image_size
        if not self.images:
            return torch.zeros(self.num_envs, 0, 0, 3, dtype=torch.uint8, device=self.device)
        pixel = 2 / size
        axis = (torch.arange(size, device=self.device) + 0.5) * pixel - 1
        disks = torch.stack((self.agent[numbers], self.goal[numbers]), 1)  # (N, 2, 2)
        dx, dy = axis - disks[..., :1], -axis - disks[..., 1:]  # rows run downwards, y upwards
        away = (dx.square()[:, :, None, :] + dy.square()[:, :, :, None]).sqrt()  # (N, 2, H, W)
        cover = ((RADIUS - away) / pixel + 0.5).clamp(0, 1)
        rgb = torch.zeros(len(disks), size, size, 3, dtype=torch.uint8, device=self.device)
        rgb[..., :2] = (cover * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return rgb

    def _stacked(self, frame: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """`frame` (N, H, W, 3) behind the frames before it; where an episode begins (`first`), itself repeated."""
        if self.frame_stack == 1:
            return frame
        repeated = frame.repeat(1, 1, 1, self.frame_stack)
        if not hasattr(self, "obs"):
            return repeated
        return torch.where(
            first.view(-1, 1, 1, 1), repeated, torch.cat((self.obs["rgb"][..., 3:], frame), -1)
        )

    def _no_state(self) -> torch.Tensor:
        return torch.zeros(self.num_envs, 0, device=self.device)

    def step(self, actions: torch.Tensor):
        """Actions (N, 2) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        actions = actions.to(self.device, torch.float32).clamp(-1, 1).nan_to_num(0.0)
        rewards = torch.zeros(self.num_envs, device=self.device)
        for k in range(self.action_repeat):
            runs = self.clock * self.action_repeat + k < HORIZON  # a repeat ends with the episode
            self.agent = torch.where(
                runs[:, None], (self.agent + SPEED * actions).clamp(-1, 1), self.agent
            )
            distance = (self.agent - self.goal).norm(dim=1)
            rewards = rewards - distance * runs
        self.clock, self.length = self.clock + 1, self.length + 1
        success = distance < NEAR
        self.returns, self.once = self.returns + rewards, self.once | success
        truncations = self.clock >= self.max_episode_steps
        nowhere = torch.zeros_like(truncations)
        final_obs = {"rgb": self._stacked(self._draw(), nowhere), "state": self._no_state()}
        episode = {
            "return": self.returns,
            "length": self.length,
            "success_once": self.once,
            "success_at_end": success,
        }  # fmt: skip  (each of them is replaced below, never written to)
        self.obs = final_obs
        if self.device.type == "cuda" or truncations.any():
            self._begin(truncations)
            first = self._draw().repeat(1, 1, 1, self.frame_stack)
            rgb = torch.where(truncations.view(-1, 1, 1, 1), first, final_obs["rgb"])
            self.obs = {"rgb": rgb, "state": final_obs["state"]}
        info = {
            "final_obs": final_obs,
            "success": success,
            "episode": episode,
            "discount": torch.ones_like(rewards),
        }
        return self.obs, rewards, nowhere, truncations, info

    def render(self, which=(0,), size: int = 256, camera: str | None = None):
        """Images for people, uint8 (len(which), size, size, 3); `camera` is ignored, there is one view."""
        return self._draw(size, list(which)).cpu().numpy()

    _TENSORS = ("agent", "goal", "returns", "clock", "length", "once")

    def state_dict(self) -> dict:
        """Everything that the future depends on."""
        state = {name: getattr(self, name).clone() for name in self._TENSORS}
        obs = {name: value.clone() for name, value in self.obs.items()}
        shape = (self.num_envs, *self.image_shape, self.action_repeat)
        return state | {"obs": obs, "generator": self.generator.get_state(), "shape": shape}

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, bit for bit. Raises ValueError on another set-up."""
        shape = (self.num_envs, *self.image_shape, self.action_repeat)
        if tuple(saved["shape"]) != shape:
            names = "environments, height, width, channels, repeat"
            raise ValueError(f"saved ({names}): {tuple(saved['shape'])}; here: {shape}")
        for name in self._TENSORS:
            setattr(self, name, saved[name].to(self.device, copy=True))
        self.obs = {name: value.to(self.device, copy=True) for name, value in saved["obs"].items()}
        self.generator.set_state(saved["generator"].cpu())

    def close(self) -> None:
        """Nothing to stop."""


make = DotReach  # so that the options have their names


if __name__ == "__main__":
    for policy, mean in reference_returns().items():
        print(f"{policy:<8}{mean:8.3f}")
