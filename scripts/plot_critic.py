"""What a critic of algos/squint_sac.py expects: each head's return distribution in one episode.

    python scripts/plot_critic.py --checkpoint runs/NAME/best.pt     # writes runs/NAME/best_critic.png

The checkpoint's own task is played for one episode by its deterministic policy, in an environment with
fixed seeds; three panels show the start, the middle and the end of it, with each head's mean.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
import squint_sac  # noqa: E402  (algos/ is a folder of files to run; the line above finds it)


@dataclass
class Args:
    checkpoint: str  # file with weights of squint_sac
    out: Path | None = None  # image to write; None: beside the checkpoint
    device: str = "cpu"  # where networks and simulation run


@torch.no_grad()
def play(policy, agent, env, args) -> list[torch.Tensor]:
    """One episode of environment 0. -> at each step, the probabilities (K, Z) of the action taken"""
    obs = env.reset(seed=squint_sac.EVAL_SEED)
    steps = []
    for _ in range(env.max_episode_steps):
        actions = policy.act(obs)
        seen = squint_sac.observe(obs, replace(args, jitter=False))
        features = agent.encoder(seen["rgb"])
        logits = agent.critic(features, seen["critic_state"], actions)
        steps.append(logits.softmax(-1)[:, 0].cpu())
        obs, _, terminations, truncations, _ = env.step(actions)
        if (terminations | truncations)[0]:
            break
    return steps


def draw(steps: list[torch.Tensor], support: torch.Tensor, path: Path):
    """Three panels: the start, the middle and the end of the episode."""
    figure = Figure((12, 3), layout="tight")
    moments = {"start": 0, "middle": len(steps) // 2, "end": -1}
    for axis, (name, at) in zip(figure.subplots(1, 3), moments.items(), strict=True):
        for head, probs in enumerate(steps[at]):
            mean = float(probs @ support)
            axis.plot(support, probs, color=f"C{head}", label=f"head {head}, mean {mean:.2f}")
            axis.axvline(mean, color=f"C{head}", linestyle="--", linewidth=1)
        axis.set(title=f"{name} of the episode", xlabel="return", ylabel="probability")
        axis.legend()
    figure.savefig(path, dpi=120)


def main(args: Args) -> Path:
    """Raises ValueError or FileNotFoundError for a file that is no checkpoint of squint_sac."""
    checkpoint = squint_sac.load(args.checkpoint)
    trained = squint_sac.Args(**checkpoint["args"])
    changes = dict(device=args.device, evaluate=True, num_envs=1, eval_envs=1)
    trained = replace(trained, **changes)
    _, eval_envs = squint_sac.make_envs(trained)
    agent = squint_sac.Agent(trained, checkpoint["shapes"])
    agent.load_state_dict(checkpoint["agent"])
    policy = squint_sac.Policy(checkpoint, args.device)
    steps = play(policy, agent, eval_envs[""], trained)
    for env in eval_envs.values():
        env.close()
    source = Path(args.checkpoint)
    path = args.out or source.with_name(f"{source.stem}_critic.png")
    draw(steps, agent.support.cpu(), path)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
