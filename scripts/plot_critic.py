"""What a critic of algos/squint_sac.py expects: each head's return distribution in one episode.

    python scripts/plot_critic.py --checkpoint runs/NAME/best.pt     # writes runs/NAME/best_critic.png

The checkpoint's own task is played for one episode by its deterministic policy, in an environment with
fixed seeds. One panel shows the distribution over the whole of it, with its mean and the return
that followed; the other one each head's distribution at the start, in the middle and at the end.
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
def play(policy, agent, env, args) -> tuple[torch.Tensor, torch.Tensor]:
    """One episode of environment 0. -> probabilities (T, K, Z) of the actions taken, rewards (T,)"""
    obs = env.reset(seed=squint_sac.EVAL_SEED)
    steps, rewards = [], []
    for _ in range(env.max_episode_steps):
        actions = policy.act(obs)
        seen = squint_sac.observe(obs, replace(args, jitter=False))
        features = agent.encoder(seen["rgb"])
        logits = agent.critic(features, seen["critic_state"], actions)
        steps.append(logits.softmax(-1)[:, 0].cpu())
        obs, reward, terminations, truncations, _ = env.step(actions)
        rewards.append(reward[0].cpu())
        if (terminations | truncations)[0]:
            break
    return torch.stack(steps), torch.stack(rewards)


def draw(probs: torch.Tensor, rewards: torch.Tensor, support: torch.Tensor, gamma: float, path):
    """Left: the mean of the heads over time, and the return that followed. Right: three moments."""
    figure = Figure((12, 4), layout="constrained")
    over_time, moments = figure.subplots(1, 2)
    seen = probs.mean((0, 1)) > 1e-4
    low, high = support[seen].min(), support[seen].max()
    mean = probs.mean(1)  # (T, Z)
    times = torch.arange(len(mean))
    mesh = over_time.pcolormesh(times, support, mean.T, cmap="Blues", shading="nearest")
    figure.colorbar(mesh, label="probability")
    over_time.plot(times, mean @ support, color="C1", label="expected")
    followed, total = [], float(mean[-1] @ support)  # after the end: what the critic expects there
    for reward in reversed(rewards.tolist()):
        total = reward + gamma * total
        followed.insert(0, total)
    over_time.plot(times, followed, color="k", linestyle="--", label="followed")
    over_time.set(title="return from each step on", xlabel="step of the episode", ylabel="return")
    over_time.set_ylim(low, max(high, *followed))
    over_time.legend(loc="lower right")
    for i, (name, at) in enumerate({"start": 0, "middle": len(probs) // 2, "end": -1}.items()):
        for head, style in enumerate(("-", "--")[: probs.shape[1]]):
            label = f"{name}, head {head}, mean {float(probs[at, head] @ support):.1f}"
            moments.plot(support, probs[at, head], style, color=f"C{i}", label=label)
    moments.set(title="distributions of the heads", xlabel="return", ylabel="probability")
    moments.set_xlim(low, high + 0.6 * (high - low))  # room for the legend
    moments.legend(fontsize="small")
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
    probs, rewards = play(policy, agent, eval_envs[""], trained)
    for env in eval_envs.values():
        env.close()
    source = Path(args.checkpoint)
    path = args.out or source.with_name(f"{source.stem}_critic.png")
    draw(probs, rewards, agent.support.cpu(), trained.gamma, path)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
