"""An expert made human: noise, pauses and a pace of its own in each episode."""

import torch

SMOOTH = 0.8  # of a disturbance is left after one step
PAUSE_STEPS = (2, 8)


class Human:
    """An expert with noise, pauses and a pace of its own in each episode; the module's docstring says how.

    `expert` has `reset(where)` and `act()`, and optionally the tensors `phase` and `clock`, which stand still in a
    pause, and `absolute`: indices of actions that are commands rather than changes (a gripper's "open"). Those get no
    noise and no pace, and a pause repeats them; all other actions are 0 in a pause.
    """

    def __init__(
        self,
        expert,
        env,
        *,
        noise: float = 0.0,
        pause: float = 0.0,
        slow: float = 0.0,
        seed: int = 0,
    ):
        if noise < 0 or not 0 <= pause < 1 or not 0 <= slow < 1:
            raise ValueError(
                f"noise must be at least 0, pause and slow in [0, 1); got {noise}, {pause} and {slow}"
            )
        self.expert, self.noise, self.pause, self.slow = expert, noise, pause, slow
        self.generator = torch.Generator().manual_seed(seed)
        n, a = env.num_envs, env.action_dim
        self.change = torch.ones(a, dtype=torch.bool)
        self.change[list(getattr(expert, "absolute", ()))] = False
        self.disturbance, self.last = torch.zeros(n, a), torch.zeros(n, a)
        self.strength, self.pace = torch.zeros(n, 1), torch.ones(n, 1)
        self.left = torch.zeros(n, dtype=torch.int64)  # steps of a pause that are left
        self.reset()

    def reset(self, where: torch.Tensor | None = None) -> None:
        """Begins new episodes in `where`, a mask (N,) (None: in all)."""
        mask = torch.ones_like(self.left, dtype=torch.bool) if where is None else where.cpu()
        if not mask.any():
            return
        self.expert.reset(where)
        rand = lambda: torch.rand(len(mask), 1, generator=self.generator)  # noqa: E731
        column = mask[:, None]
        self.strength = torch.where(column, self.noise * (0.5 + rand()), self.strength)
        self.pace = torch.where(column, 1 - self.slow * rand(), self.pace)
        self.disturbance, self.last = (
            torch.where(column, 0.0, x) for x in (self.disturbance, self.last)
        )
        self.left = torch.where(mask, 0, self.left)

    def act(self) -> torch.Tensor:
        """Actions (N, A) in [-1, 1] for the present states."""
        n = len(self.left)
        begins = (torch.rand(n, generator=self.generator) < self.pause) & (self.left == 0)
        steps = torch.randint(PAUSE_STEPS[0], PAUSE_STEPS[1] + 1, (n,), generator=self.generator)
        self.left = torch.where(begins, steps, self.left)
        paused = self.left > 0
        self.left = (self.left - 1).clamp_min(0)
        before = {
            name: getattr(self.expert, name).clone()
            for name in ("phase", "clock")
            if hasattr(self.expert, name)
        }
        actions = self.expert.act().cpu()
        for name, value in before.items():
            now = getattr(self.expert, name)
            setattr(self.expert, name, torch.where(paused.to(now.device), value, now))
        fresh = torch.randn(actions.shape, generator=self.generator)
        self.disturbance = SMOOTH * self.disturbance + (1 - SMOOTH**2) ** 0.5 * fresh
        moving = actions * self.pace + self.strength * self.disturbance
        actions = torch.where(self.change, moving, actions)
        still = torch.where(self.change, 0.0, self.last)
        self.last = torch.where(paused[:, None], still, actions).clamp(-1, 1)
        return self.last
