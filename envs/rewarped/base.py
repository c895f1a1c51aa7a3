"""What the differentiable tasks have in common: episodes, resets that cut nobody else's gradient, NaN, saved states.

A task keeps the state of all environments in a dict of tensors (N, ...). A step makes a new dict out of it, by
ordinary differentiable torch, and never writes into an old one. A reset is a `torch.where` between the fresh and the
live state, which passes the gradient of every environment that goes on and stops that of those that begin anew.
"""

import torch

from envs.rewarped.substeps import all_finite

REWARDS, SIZES = ("default", "paper"), ("full", "small")


def like(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Mask (N,) with as many trailing axes as value (N, ...)."""
    return mask.view(-1, *[1] * (value.dim() - 1))


def choose(mask: torch.Tensor, new: dict, old: dict) -> dict:
    """Of each environment, `new` where the mask (N,) says so and else `old`."""
    return {name: torch.where(like(mask, value), new[name], value) for name, value in old.items()}


class DifferentiableEnv:
    """N environments of one task. A subclass sets the attributes below and says what its four methods return.

    action_dim, max_episode_steps, control_hz, obs_dims (name -> shape)
    fresh()                        -> state dict at the start of an episode, drawn from self.generator
    physics(state, actions)        -> state dict a control step later
    observe(state)                 -> dict of observations
    reward(state, actions)         -> rewards (N,), terminations (N,), of the state that a step led to
    """

    action_dim: int
    max_episode_steps: int
    control_hz: float
    obs_dims: dict[str, tuple[int, ...]]
    GRAPH_ON_CPU = True  # what graph=None means there

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device="cpu",
        *,
        seed: int = 0,
        reward: str = "default",
        size: str = "full",
        window: int = 32,
        graph: bool | None = None,
        checkpoint: bool = True,
        dtype: torch.dtype = torch.float32,
        stagger: bool = False,
    ):
        for wrong, message in (
            (reward not in REWARDS, f"reward {reward!r}: {' or '.join(REWARDS)}"),
            (size not in SIZES, f"size {size!r}: {' or '.join(SIZES)}"),
            (num_envs < 1, f"num_envs {num_envs}: at least 1"),
            (
                torch.device(device).type == "cuda" and not torch.cuda.is_available(),
                'no CUDA device: use "cpu"',
            ),
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
        ):
            if wrong:
                raise ValueError(message)
        self.env_id, self.num_envs, self.device, self.dtype = (
            env_id,
            num_envs,
            torch.device(device),
            dtype,
        )
        self.reward_name, self.size, self.window, self.graph, self.checkpoint = (
            reward,
            size,
            window,
            graph,
            checkpoint,
        )
        if graph is None:
            self.graph = self.device.type == "cuda" or self.GRAPH_ON_CPU
        self.stagger, self.generator = stagger, torch.Generator().manual_seed(seed)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=self.device)
        self.setup()
        self.reset()

    def setup(self) -> None:
        """Builds the simulation and sets the attributes; each family of tasks has its own."""
        raise NotImplementedError

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def uniform(self, low, high, *shape: int) -> torch.Tensor:
        """Random numbers (N, *shape), drawn on the CPU, so that a seed means the same episodes on every device."""
        draw = torch.rand(self.num_envs, *shape, generator=self.generator, dtype=torch.float64)
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        return (low + (high - low) * draw).to(self.device, self.dtype)

    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Begins new episodes in all environments, and a new window; with a seed, always the same ones."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.clock = torch.zeros(self.num_envs, dtype=torch.int64)  # on the CPU on every device
        if self.stagger:
            self.clock = torch.arange(self.num_envs) * self.max_episode_steps // self.num_envs
        self.started = self.clock.clone()
        self.returns = torch.zeros(self.num_envs, device=self.device, dtype=self.dtype)
        self.state = self.fresh()
        self.detach()
        return self.obs

    def detach(self) -> None:
        """Begins a window: what comes after has no gradient with respect to what came before."""
        self.sim.detach()
        self.state = {name: value.detach() for name, value in self.state.items()}
        self.obs = self.observe(self.state)

    def step(self, actions: torch.Tensor):
        """actions (N, A) in [-1, 1] -> obs, rewards, terminations, truncations, info; see the package's docstring."""
        if actions.shape != (self.num_envs, self.action_dim):
            raise ValueError(
                f"actions {tuple(actions.shape)}, expected {(self.num_envs, self.action_dim)}"
            )
        actions = actions.to(self.dtype).clamp(-1, 1)
        state = self.physics(self.state, actions)
        # An environment that has blown up goes back to the state before, detached: its reward is 0, its last
        # observation the one before, and no gradient passes.
        nan = ~all_finite([value.detach() for value in state.values()])
        if self.device.type == "cuda" or nan.any():
            state = choose(nan, {name: value.detach() for name, value in self.state.items()}, state)
        rewards, terminations = self.reward(state, actions)
        rewards, terminations = torch.where(nan, 0.0, rewards), terminations & ~nan
        self.nan_resets += nan.sum()
        self.clock += 1
        timeout = (self.clock >= self.max_episode_steps).to(self.device)
        truncations = (timeout | nan) & ~terminations
        done = terminations | truncations
        self.returns = self.returns + rewards.detach()
        length = (self.clock - self.started).to(self.device)
        final_obs = self.observe(state)
        info = {
            "final_obs": final_obs,
            "nan": nan,
            "episode": {"return": self.returns.clone(), "length": length},
        }
        obs = final_obs
        if done.any():
            fresh = self.fresh()
            state, obs = choose(done, fresh, state), choose(done, self.observe(fresh), final_obs)
            ended = done.cpu()
            self.clock[ended] = 0
            self.started[ended] = 0
            self.returns = self.returns.masked_fill(done, 0.0)
        self.state, self.obs = state, obs
        return obs, rewards, terminations, truncations, info

    # ---- for resuming ------------------------------------------------------------------------------------------------
    def settings(self) -> dict:
        """What must be the same where a state is taken and where it is loaded."""
        return dict(
            env_id=self.env_id,
            num_envs=self.num_envs,
            size=self.size,
            reward=self.reward_name,
            dtype=str(self.dtype),
        )

    def state_dict(self) -> dict:
        """Everything that the future of every environment depends on, as tensors and plain values."""
        return {
            "settings": self.settings(),
            "state": {name: value.detach().clone() for name, value in self.state.items()},
            "clock": self.clock.clone(),
            "started": self.started.clone(),
            "returns": self.returns.clone(),
            "nan_resets": self.nan_resets.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, in a new window. Raises ValueError on another set-up."""
        for name, value in self.settings().items():
            theirs = saved["settings"][name]
            if theirs != value:
                raise ValueError(f"the saved environment has {name} {theirs!r}, this one {value!r}")
        self.state = {name: value.to(self.device) for name, value in saved["state"].items()}
        self.clock, self.started = saved["clock"].clone(), saved["started"].clone()
        self.returns = saved["returns"].to(self.device)
        self.nan_resets = saved["nan_resets"].to(self.device, copy=True)
        self.generator.set_state(saved["generator"].cpu())
        self.detach()

    def close(self) -> None:
        """Nothing to stop; the other environments have it."""
