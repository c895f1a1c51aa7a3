"""What the actor of a SAPO run sees: its loss around the present weights, and the gradients through the simulation.

    python scripts/landscape_rewarped.py --checkpoint runs/NAME/best.pt

Draws the actor's loss on one window, without and with entropy, along three random directions of its weights, each
tensor's step as long as the tensor (Li et al. 2018); the window starts at the evaluation's first states and has the
same noise everywhere. Prints for that window the seconds that the simulation took, forward and backward, and the norms
of each environment's gradient of its own return in its actions.
Output: landscape.png beside the checkpoint, or --out.
"""

import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import sapo_rewarped as sr  # noqa: E402  (algos/ is a folder of files to run, not a package)


@dataclass
class Args:
    checkpoint: Path
    """checkpoint.pt or best.pt of a run"""
    out: Path | None = None
    """file to draw; None: landscape.png beside the checkpoint"""
    points: int = 41
    """windows along a direction"""
    seed: int = 1
    """of the directions"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """of networks and simulation"""


class Probe:
    """An environment whose steps are timed and whose actions' gradients are kept.

    Its backward pass runs from the moment at which the gradient of a step's rewards or observation is known to the
    one at which that of the step's actions is.
    """

    def __init__(self, env):
        self.env, self.forward, self.backward = env, 0.0, 0.0
        self.since, self.grads = None, []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def now(self) -> float:
        if self.env.device.type == "cuda":
            torch.cuda.synchronize(self.env.device)
        return time.perf_counter()

    def starts(self, grad):
        if self.since is None:
            self.since = self.now()

    def ends(self, grad):
        self.backward += self.now() - self.since
        self.since = None
        self.grads.append(grad)

    def step(self, actions):
        actions = (
            actions.clone()
        )  # before the hook of sapo_rewarped, which zeroes what is not finite
        begin = self.now()
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        self.forward += self.now() - begin
        if actions.requires_grad:
            actions.register_hook(self.ends)
            for output in (rewards, *info["final_obs"].values()):
                output.register_hook(self.starts)
        return obs, rewards, terminations, truncations, info

    def metrics(self) -> dict:
        """Of the norms (N,) over time and actions of each environment's gradient of its own return."""
        grads = torch.stack(self.grads)  # (T, N, A)
        finite = grads.isfinite().all(-1, keepdim=True)
        kept = torch.where(finite, grads, 0.0)
        norms = kept.square().sum((0, 2)).sqrt() * finite.numel()  # the loss is a mean over N T
        return {
            "simulation, forward, s": self.forward,
            "simulation, backward, s": self.backward,
            "gradient norm, median": float(norms.median()),
            "gradient norm, largest": float(norms.max()),
            "share above ten medians": float((norms > 10 * norms.median()).float().mean()),
            "share not finite": float((~finite).float().mean()),
        }


def losses(agent, env, args: sr.Args) -> list[torch.Tensor]:
    """The actor's loss -J on one window, with the rewards alone and with entropy."""
    torch.manual_seed(sr.EVAL_SEED)
    window, _ = sr.rollout(agent, env, env.reset(seed=sr.EVAL_SEED), args)
    values = sr.bootstrap(agent.target or agent.critic, window)
    found = []
    for rewards in (window["rewards"], sr.soft_rewards(agent, window)):
        found.append(-sr.objective(rewards, values, window["dones"], args.gamma))
    return found


@torch.no_grad()
def landscape(agent, env, args: sr.Args, points: int, seed: int) -> tuple[list, torch.Tensor]:
    """-> reach (points,) in norms of the weights, losses (3 directions, points, 2)."""
    draw = torch.Generator().manual_seed(seed)
    center = copy.deepcopy(agent.actor.state_dict())
    reach, lines = torch.linspace(-1, 1, points).tolist(), []
    for _ in range(3):
        direction = {}
        for name, value in center.items():
            noise = torch.randn(value.shape, generator=draw).to(value)
            direction[name] = noise * value.norm() / noise.norm()
        line = []
        for r in reach:
            agent.actor.load_state_dict({k: v + r * direction[k] for k, v in center.items()})
            line.append(torch.stack(losses(agent, env, args)).cpu())
        lines.append(torch.stack(line))
    agent.actor.load_state_dict(center)
    return reach, torch.stack(lines)


def main(args: Args) -> dict:
    """Draws and prints. -> what is printed."""
    saved = sr.Args(**sr.load(args.checkpoint)["args"])
    like = replace(saved, device=args.device, evaluate=True)
    agent, env = sr.Policy(args.checkpoint, args.device), sr.make_envs(like)[1]
    probe = Probe(env)
    plain, soft = losses(agent, probe, like)
    (soft if like.entropy_in_return else plain).backward()
    metrics = probe.metrics()
    for name, value in metrics.items():
        print(f"{name:24} {value:.4g}")

    reach, lines = landscape(agent, env, like, args.points, args.seed)
    env.close()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for i, title in enumerate(("rewards alone", "with entropy")):
        axes[i].plot(reach, lines[:, :, i].T)
        axes[i].set(title=f"loss, {title}", xlabel="reach, in norms of the weights")
    path = args.out or args.checkpoint.parent / "landscape.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
