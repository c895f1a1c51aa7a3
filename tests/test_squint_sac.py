"""Squint SAC: formulas against references, storage by hand, whole runs on a tiny environment."""

import colorsys
import copy
import csv
import math
import shutil
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import squint_sac as sq
import torch
from conftest import ROOT
from fake_env import FakeEnv
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

SHAPES = dict(channels=3, state=3, privileged=0, action=2)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> sq.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(env_id="Fake", device="cpu", amp=False, compile=False, cudagraphs=False)
    values |= dict(num_envs=4, eval_envs=4, eval_episodes=8, render_size=16, capture_video=False)
    values |= dict(total_timesteps=120, eval_freq=60, log_freq=20, learning_starts=40)
    values |= dict(num_updates=4, batch_size=16, buffer_size=400)
    values |= dict(actor_hidden=16, critic_hidden=16, num_atoms=11)
    return sq.Args(**values | changes)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder. -> what to set the environment's class in"""
    kind = {"train": FakeEnv, "evaluate": FakeEnv}

    def make_envs(args):
        options = dict(size=args.render_size, asymmetric=args.asymmetric, cameras=len(args.cameras))
        evals = {}
        for suffix in ("", "_nodr"):
            evals[suffix] = kind["evaluate"](args.eval_envs, seed=1, stagger=False, **options)
        if args.evaluate:
            return None, evals
        return kind["train"](args.num_envs, seed=args.seed, **options), evals

    monkeypatch.setattr(sq, "make_envs", make_envs)
    monkeypatch.chdir(tmp_path)
    return kind


def table(path) -> list[dict]:
    return list(csv.DictReader(Path(path).open()))


def agent_of(run: str, file: str = "checkpoint.pt") -> dict:
    return sq.load(f"runs/{run}/{file}")["agent"]


def differences(before: dict, after: dict) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --- Golden numbers -------------------------------------------------------------------------------
def golden_weight(name: str, shape) -> torch.Tensor:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    scale = 0.3 / max(1, int(np.prod(shape[1:]))) ** 0.25
    return torch.from_numpy((scale * random.standard_normal(shape)).astype(np.float32))


def summary(values: torch.Tensor) -> torch.Tensor:
    """Sum, norm and the first twelve numbers."""
    flat = values.detach().double().flatten()
    return torch.cat([torch.stack([flat.sum(), flat.norm()]), flat[:12]]).float()


def test_losses_gradients_projection_and_polyak_equal_the_golden_numbers():
    """Those of commit f2f0a1a, from the same weights, batch and noise, under today's names."""
    file = np.load(ROOT / "tests/golden/squint_sac.npz")
    golden = {name: torch.from_numpy(file[name]) for name in file.files}
    changes = dict(asymmetric=True, v_min=-3.0, v_max=3.0, tau=0.25, alpha=0.3)
    args = arguments(**changes)
    agent = sq.Agent(args, SHAPES | dict(privileged=2))
    for name, parameter in agent.named_parameters():
        if name != "log_alpha":
            parameter.data.copy_(golden_weight(name, parameter.shape))
    batch = {key: golden[key] for key in ("rgb", "next_rgb", "state", "next_state")}
    batch |= {key: golden[key] for key in ("actions", "rewards")}
    for prefix in ("", "next_"):
        both = [golden[prefix + "state"], golden[prefix + "privileged"]]
        batch[prefix + "critic_state"] = torch.cat(both, -1)

    found = {}
    loss, features, metrics = sq.critic_loss(agent, batch, golden["critic_noise"], args)
    loss.backward()
    for name, parameter in agent.named_parameters():
        if parameter.grad is not None:
            found[f"critic_gradient/{name}"] = summary(parameter.grad)
    agent.zero_grad()
    loss, actor_metrics = sq.actor_loss(agent, batch, features, golden["actor_noise"], args)
    loss.backward()
    for name, parameter in agent.actor.named_parameters():
        found[f"actor_gradient/actor.{name}"] = summary(parameter.grad)
    for name, value in (metrics | actor_metrics).items():
        found[f"metric/{name}"] = value
    moved = golden["rewards"][:, None] + args.gamma * agent.support
    found["projected"] = sq.project_distribution(golden["probs"], moved, agent.support)
    sq.follow(agent.target.parameters(), agent.critic.parameters(), args.tau)
    for name, parameter in agent.target.named_parameters():
        found[f"polyak/target.{name}"] = summary(parameter)

    outputs = {name for name in golden if "/" in name or name == "projected"}
    assert found.keys() == outputs - {"metric/train/q_max"}
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], atol=1e-6, rtol=1e-5, msg=name)


# --- C51 and the policy's density -----------------------------------------------------------------
def brute_force(probs, moved, support):
    """Atom by atom, in double precision."""
    atoms = support.double().tolist()
    width = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    out = torch.zeros(probs.shape, dtype=torch.float64)
    for k, b, j in np.ndindex(*probs.shape):
        place = min(max(float(moved[b, j]), atoms[0]), atoms[-1])
        for i, atom in enumerate(atoms):
            out[k, b, i] += float(probs[k, b, j]) * max(0.0, 1 - abs(place - atom) / width)
    return out


@pytest.mark.parametrize("atoms, low, high", [(101, -20.0, 20.0), (11, -1.0, 1.0), (2, 0.0, 1.0)])
def test_projection_equals_brute_force(atoms, low, high):
    support = torch.linspace(low, high, atoms)
    probs = torch.rand(2, 6, atoms).softmax(-1)
    rewards = (torch.rand(6, 1) * 2 - 1) * 1.5 * high
    moved = rewards + torch.tensor([0.9, 0.0, 1.0] * 2)[:, None] * support
    projected = sq.project_distribution(probs, moved, support)
    expected = brute_force(probs, moved, support)
    torch.testing.assert_close(projected.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(projected.sum(-1), torch.ones(2, 6))


def test_projection_keeps_exact_atoms_and_both_ends():
    support = torch.arange(5.0)
    probs = torch.full((1, 7, 5), 0.2)
    moved = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 99.0, -99.0])[:, None].expand(7, 5)
    projected = sq.project_distribution(probs, moved, support)
    torch.testing.assert_close(projected[0], torch.eye(5)[[0, 1, 2, 3, 4, 4, 0]])


def test_nan_in_a_target_stays_in_its_row():
    """It reaches the NaN check as a loss; it never becomes an index."""
    support, probs = torch.linspace(-1, 1, 5), torch.full((2, 2, 5), 0.2)
    moved = torch.stack([support, support * math.nan])
    projected = sq.project_distribution(probs, moved, support)
    torch.testing.assert_close(projected[:, 0], probs[:, 0])
    assert projected[:, 1].isnan().any()


def test_log_probability_is_that_of_a_squashed_gaussian():
    actor = sq.Actor(3, 2, sq.Args(actor_hidden=16))
    features, state = torch.randn(32, 1024), torch.randn(32, 3)
    noise = torch.randn(32, 2) * 2
    actions, log_probs = sq.sample_actions(actor, features, state, noise)
    mean, log_std = actor(features, state)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    reference = TransformedDistribution(normal, TanhTransform(cache_size=1))
    same = reference.transforms[0](mean + log_std.exp() * noise)  # its cache spares the atanh
    torch.testing.assert_close(actions, same)
    torch.testing.assert_close(log_probs, reference.log_prob(same), atol=1e-4, rtol=1e-4)


def test_log_std_is_bounded():
    actor = sq.Actor(3, 2, sq.Args(actor_hidden=16))
    for bias, bound in ((-100.0, -5.0), (100.0, 2.0)):
        actor.log_std.bias.data.fill_(bias)
        log_std = actor(torch.randn(8, 1024), torch.randn(8, 3))[1]
        torch.testing.assert_close(log_std, torch.full((8, 2), bound))


# --- Images ---------------------------------------------------------------------------------------
def test_squint_is_the_rounded_area_mean():
    rgb = torch.randint(0, 256, (3, 32, 32, 6), dtype=torch.uint8)
    mean = rgb.double().reshape(3, 16, 2, 16, 2, 6).mean((2, 4))
    small = sq.squint(rgb, 16)
    assert small.dtype == torch.uint8 and small.shape == (3, 16, 16, 6)
    assert (small.double() - mean).abs().max() <= 0.5
    assert abs(float((small.double() - mean).mean())) < 0.02, "truncation would give -0.4"
    assert sq.squint(rgb, 32) is rgb


def test_jitter_differs_by_sample_and_camera_and_keeps_the_mean():
    rgb = torch.tensor([200, 90, 40], dtype=torch.uint8).repeat(64, 8, 8, 2)
    rgb[:, :4] //= 2
    out = sq.color_jitter(rgb)
    assert out.dtype == torch.uint8 and out.shape == rgb.shape
    assert len(torch.unique(out[:, -1, 0], dim=0)) > 60, "each sample has its own draw"
    assert not torch.equal(out[..., :3], out[..., 3:]), "each camera has its own draw"
    mean = sq.color_jitter(rgb.repeat(20, 1, 1, 1)).float().mean(0)
    assert (mean - rgb[0].float()).abs().max() < 12, "on average the colours stay"


def test_jitter_leaves_black_black_and_greys_grey():
    grey = torch.randint(0, 256, (16, 8, 8, 1), dtype=torch.uint8).repeat(1, 1, 1, 3)
    out = sq.color_jitter(grey).int()
    assert (out.amax(-1) - out.amin(-1)).max() <= 1
    assert sq.color_jitter(torch.zeros(4, 8, 8, 3, dtype=torch.uint8)).max() == 0


@pytest.mark.parametrize("draw, turn", [(0.0, -0.05), (0.999999, 0.05)])
def test_hue_turns_by_at_most_18_degrees(monkeypatch, draw, turn):
    """With brightness, contrast and saturation untouched, the hue draw alone turns the colours."""
    draws = torch.full((4, 1, 1, 1, 1, 1), 0.5)
    draws[3] = draw
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    out = sq.color_jitter(torch.tensor([150, 100, 100], dtype=torch.uint8).repeat(1, 4, 4, 1))
    hue = colorsys.rgb_to_hsv(*(out[0, 0, 0].double() / 255).tolist())[0]
    assert (hue + 0.5) % 1 - 0.5 == pytest.approx(turn, abs=0.012)


# --- Networks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("width", [16, 32])
def test_encoder_gives_32_features_for_each_of_its_width(size, width):
    rgb = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    assert sq.Encoder(3, size, width)(rgb).shape == (2, 32 * width)


def test_parameter_counts_are_the_published_ones():
    shapes = dict(channels=3, state=12, privileged=0, action=6)
    agent = sq.Agent(sq.Args(device="cpu"), shapes)
    expected = {"encoder": 34_400, "actor": 269_986, "critic": 1_536_096}
    for name, count in expected.items():
        assert sum(p.numel() for p in getattr(agent, name).parameters()) == count


def test_weights_start_orthogonal_and_different_in_each_head():
    agent = sq.Agent(arguments(), SHAPES)
    first, second = (head[3].weight for head in agent.critic.heads)
    torch.testing.assert_close(first @ first.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not torch.equal(first, second)
    kernel = agent.encoder.convs[0].weight.flatten(1)
    torch.testing.assert_close(kernel @ kernel.T, 2 * torch.eye(32), atol=1e-5, rtol=0)
    assert not agent.actor.mean.bias.any()


# --- Replay ---------------------------------------------------------------------------------------
def counted_replay(steps: int) -> sq.Replay:
    """Five rows of two environments; the reward of step t is t, plus 0.5 in the second one."""
    replay = sq.Replay(dict(rewards=torch.zeros(2), rgb=torch.zeros(2, 4, dtype=torch.uint8)), 5)
    for t in range(steps):
        rgb = torch.tensor([[t], [100 + t]], dtype=torch.uint8).expand(2, 4)
        replay.add(dict(rewards=torch.tensor([t, t + 0.5]), rgb=rgb))
    return replay


@pytest.mark.parametrize("steps, kept", [(3, range(3)), (5, range(5)), (12, range(7, 12))])
def test_samples_are_uniform_over_what_is_kept(steps, kept):
    replay = counted_replay(steps)
    assert len(replay) == 2 * len(kept)
    batch = replay.sample(50, 200)
    assert batch["rgb"].shape == (50, 200, 4)
    rewards, counts = batch["rewards"].unique(return_counts=True)
    assert rewards.tolist() == sorted([float(t) for t in kept] + [t + 0.5 for t in kept])
    expected = 10_000 / len(replay)
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 29.6  # p = 0.001 at 10 degrees of freedom
    number = batch["rewards"].floor() + 100 * (batch["rewards"] % 1 > 0)
    assert (batch["rgb"] == number[..., None]).all(), "the values of a sample belong together"


def test_next_observations_are_the_true_ones(fake):
    """At an episode's end that is final_obs, not the first observation of the next episode."""
    sq.train(arguments(name="run", save_buffer=True, jitter=False))
    checkpoint = sq.load("runs/run/checkpoint.pt")
    replay, rows = checkpoint["replay"], 120 // 4
    assert replay["added"] == rows
    env = FakeEnv(4, seed=1)
    env.step(torch.zeros(4, 2))
    for t in range(rows):
        assert torch.equal(replay["state"][t], env.obs["state"])
        final_obs = env.step(replay["actions"][t])[4]["final_obs"]
        assert torch.equal(replay["next_state"][t], final_obs["state"])
        assert torch.equal(replay["next_rgb"][t], final_obs["rgb"])
    assert torch.equal(checkpoint["obs"]["rgb"], env.obs["rgb"])


# --- Updates --------------------------------------------------------------------------------------
def learning_parts(**changes):
    """-> agent, batches (F, B), args"""
    args = arguments(**changes)
    env = FakeEnv(args.num_envs, asymmetric=args.asymmetric)
    torch.manual_seed(3)
    agent = sq.Agent(args, sq.shapes_of(env))
    obs = sq.observe(env.obs, args)
    still = torch.zeros(args.num_envs, 2)
    replay = sq.Replay(sq.transition(obs, obs, still, still[:, 0]), 40)
    for _ in range(30):
        actions = torch.rand_like(still) * 2 - 1
        next_obs, rewards, _, _, info = env.step(actions)
        final_obs = sq.observe(info["final_obs"], args)
        replay.add(sq.transition(obs, final_obs, actions, rewards))
        obs = sq.observe(next_obs, args)
    return agent, replay.sample(args.policy_frequency, args.batch_size), args


def part(batches: dict, i: int = 0) -> dict:
    return {key: value[i] for key, value in batches.items()}


def test_who_learns_from_which_loss():
    agent, batches, args = learning_parts(policy_frequency=1)
    before = copy.deepcopy(agent.state_dict())
    loss, features, metrics = sq.critic_loss(agent, part(batches), torch.randn(32, 2), args)
    sq.descend(loss, agent.q_optimizer)
    middle = copy.deepcopy(agent.state_dict())
    assert differences(before, middle) == {"encoder", "critic", "log_alpha"}
    metrics |= sq.update_block(agent, batches, args)
    assert differences(middle, agent.state_dict()) == {
        "encoder", "critic", "log_alpha", "target", "actor", "averaged"
    }  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


def test_fixed_alpha_stays():
    agent, batches, args = learning_parts(autotune=False, alpha=0.2)
    sq.update_block(agent, batches, args)
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("deviation, rises", [(-5.0, True), (0.0, False)])
def test_temperature_rises_when_entropy_is_low(deviation, rises):
    agent, batches, args = learning_parts()
    agent.actor.log_std.weight.data.zero_()
    agent.actor.log_std.bias.data.fill_(deviation)  # tanh squashes it into [-5, 2]
    sq.update_block(agent, batches, args)
    assert (agent.log_alpha.item() > 0) == rises


def test_critic_sees_privileged_state_and_the_actor_does_not():
    agent, batches, args = learning_parts(asymmetric=True)
    env = FakeEnv(4, asymmetric=True)
    seen = sq.observe(env.obs, args)
    assert torch.equal(seen["critic_state"], torch.cat([env.obs["state"], env.place], -1))
    assert torch.equal(seen["state"], env.obs["state"])
    assert batches["next_critic_state"].shape[-1] == 5 and batches["state"].shape[-1] == 3
    assert sq.update_block(agent, batches, args)["loss/qf"].isfinite()


def test_block_equals_its_steps_written_out():
    """With a plain Adam for each of the three learning rates."""
    rates = dict(q_lr=3e-4, policy_lr=1e-3, alpha_lr=1e-2)
    agent, batches, args = learning_parts(**rates)
    other = copy.deepcopy(agent)
    torch.manual_seed(5)
    sq.update_block(agent, batches, args)
    torch.manual_seed(5)
    q_parameters = [*other.critic.parameters(), *other.encoder.parameters()]
    q_adam = torch.optim.Adam(q_parameters, 3e-4)
    alpha_adam = torch.optim.Adam([other.log_alpha], 1e-2)
    actor_adam = torch.optim.Adam(other.actor.parameters(), 1e-3)
    for i in range(4):
        q_adam.zero_grad()
        alpha_adam.zero_grad()
        loss, features, _ = sq.critic_loss(other, part(batches, i), torch.randn(32, 2), args)
        loss.backward()
        q_adam.step()
        alpha_adam.step()
        pairs = zip(other.target.parameters(), other.critic.parameters(), strict=True)
        for target, source in pairs:
            target.data.mul_(1 - args.tau).add_(args.tau * source.data)
    actor_adam.zero_grad()
    sq.actor_loss(other, part(batches, 3), features, torch.randn(16, 2), args)[0].backward()
    actor_adam.step()
    other.averaged.encoder.load_state_dict(other.encoder.state_dict())  # without --ema the latest
    other.averaged.actor.load_state_dict(other.actor.state_dict())
    for name, value in agent.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=2e-6, rtol=1e-5)


def test_the_average_is_that_of_all_blocks():
    """After three blocks: 0.9^3 of the first weights, and 0.1 x 0.9^age of those after each block."""
    agent, batches, args = learning_parts(ema=0.9)
    weights = [agent.actor.mean.weight.detach().clone()]
    for _ in range(3):
        sq.update_block(agent, batches, args)
        weights.append(agent.actor.mean.weight.detach().clone())
    expected = 0.9**3 * weights[0] + 0.1 * (0.81 * weights[1] + 0.9 * weights[2] + weights[3])
    torch.testing.assert_close(agent.averaged.actor.mean.weight, expected)
    convs = [agent.averaged.encoder.convs[0].weight, agent.encoder.convs[0].weight]
    assert not torch.equal(*convs), "the encoder is averaged, too"


@pytest.mark.parametrize(
    "decay, shares", [(0.0, (1, 1, 1)), (0.5, (1, 0.8, 0.2)), (1.0, (0.8, 0.4, 0.1))]
)
def test_learning_rates_fall_to_0_at_the_end_of_the_run(decay, shares):
    agent, _, args = learning_parts(decay=decay, total_timesteps=100, q_lr=1e-3, alpha_lr=2e-3)
    for step, share in zip((20, 60, 90), shares, strict=True):
        sq.set_learning_rates(agent, args, step)
        rates = [group["lr"].item() for group in agent.q_optimizer.param_groups]
        assert rates == pytest.approx([share * 1e-3, share * 2e-3])
        rate = agent.actor_optimizer.param_groups[0]["lr"].item()
        assert rate == pytest.approx(share * args.policy_lr)


def test_no_weight_moves_when_the_rates_are_0():
    agent, batches, args = learning_parts(decay=0.5, total_timesteps=100)
    sq.set_learning_rates(agent, args, 100)
    before = [p.detach().clone() for p in agent.parameters() if p.requires_grad]
    sq.update_block(agent, batches, args)
    after = [p for p in agent.parameters() if p.requires_grad]
    assert all(map(torch.equal, before, after)) and len(after) > 40


def trained_by(device: str, **fast) -> dict:
    """Weights after six blocks."""
    agent, batches, args = learning_parts()
    agent = sq.Agent(replace(args, device=device), SHAPES)
    torch.manual_seed(3)
    agent.load_state_dict(sq.Agent(args, SHAPES).state_dict())
    batches = {key: value.to(device) for key, value in batches.items()}
    update = sq.make_update(agent, replace(args, device=device, **fast))
    torch.manual_seed(7)
    for _ in range(6):
        assert update(batches).keys() >= {"loss/qf", "loss/actor"}
    return {name: value.cpu() for name, value in agent.state_dict().items()}


# aot_eager runs the traced graphs without code generation
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])]
)
def test_compiled_losses_equal_the_plain_ones(monkeypatch, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    plain, fast = trained_by("cpu"), trained_by("cpu", compile=True)
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, atol=2e-5, rtol=1e-4)


@CUDA
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_equals_the_plain_route(compiled):
    plain, fast = trained_by("cuda"), trained_by("cuda", cudagraphs=True, compile=compiled)
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, atol=1e-3, rtol=1e-2)


# --- Runs -----------------------------------------------------------------------------------------
def test_a_short_run_from_end_to_end(fake):
    args = arguments(name="run", capture_video=True)
    result = sq.train(args)
    run = Path("runs/run")
    files = {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt", "videos"}
    assert {file.name for file in run.iterdir()} == files
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    rows = table(run / "eval.csv")
    first = ["global_step", "wall_time", "train_time", "eval/success_rate"]
    assert list(rows[0])[:4] == first and "eval/success_rate_nodr" in rows[0]
    second = [float(row["eval/success_rate_nodr"]) for row in rows]
    assert all(math.isnan(rate) for rate in second[:-1]) and 0 <= second[-1] <= 1
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    for row in table(run / "metrics.csv"):
        assert all(math.isfinite(float(value)) for value in row.values())
    torch.manual_seed(args.seed)
    start = sq.Agent(args, SHAPES).state_dict()
    learned = {"encoder", "actor", "averaged", "critic", "target", "log_alpha"}
    assert differences(start, agent_of("run")) == learned


def test_two_equal_runs_are_equal(fake):
    for name in "ab":
        sq.train(arguments(name=name))
    assert not differences(agent_of("a"), agent_of("b"))


class Interrupted(FakeEnv):
    """Ctrl-C arrives in the middle of a step."""

    at = 21

    def step(self, actions):
        if self.steps == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().step(actions)


def interrupted_run(fake, args: sq.Args):
    fake["train"] = Interrupted
    with pytest.raises(SystemExit, match="interrupted at step 84: continue with --resume runs/"):
        sq.train(args)
    fake["train"] = FakeEnv


@pytest.mark.parametrize("how", ["length", "interrupt"])
def test_resume_continues_exactly(fake, how):
    """2N steps equal N steps and then N more, bit for bit on the CPU, with --save-buffer."""
    changes = dict(save_buffer=True, asymmetric=True, cameras=("wrist", "third"), buffer_size=120)
    args = arguments(total_timesteps=160, eval_freq=80, **changes)
    sq.train(replace(args, name="whole"))
    half = replace(args, name="half")
    if how == "length":
        sq.train(replace(half, total_timesteps=80))
    else:
        interrupted_run(fake, half)
    for path in Path("runs/half").glob("*.csv"):  # rows that came after the checkpoint
        with path.open("a") as file:
            file.write("999,1,1\n")
    words = ["--resume", "runs/half", "--total-timesteps", "160"]
    sq.train(sq.parse_args(words))
    whole, resumed = (sq.load(f"runs/{name}/checkpoint.pt") for name in ("whole", "half"))
    for key in ("agent", "q_optimizer", "actor_optimizer", "random", "replay", "env", "obs"):
        torch.testing.assert_close(whole[key], resumed[key], atol=0, rtol=0)
    rows = []
    for name in ("whole", "half"):
        timed = table(f"runs/{name}/eval.csv")
        # the second variant, for whom a run that was to end at 80 has a value there
        left = ("time", "_nodr") if how == "length" else ("time",)
        rows.append([[r[key] for key in r if not any(x in key for x in left)] for r in timed])
    assert rows[0] == rows[1]


def test_a_run_killed_before_its_first_evaluation_can_be_continued(fake):
    class Killed(FakeEnv):
        def step(self, actions):
            if self.steps == 5:
                raise KeyboardInterrupt
            return super().step(actions)

    fake["train"] = Killed
    with pytest.raises(KeyboardInterrupt):
        sq.train(arguments(name="run"))
    fake["train"] = FakeEnv
    assert sq.train(sq.parse_args(["--resume", "runs/run"]))["global_step"] == 120
    sq.train(arguments(name="whole"))
    assert not differences(agent_of("run"), agent_of("whole"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_resume_holds_the_buffer_once(fake):
    """The checkpoint's pages, buffer included, are released when it has been read."""

    class Looking(FakeEnv):
        def step(self, actions):
            mapped.append("checkpoint.pt" in Path("/proc/self/maps").read_text())
            return super().step(actions)

    mapped = []
    sq.train(arguments(name="run", save_buffer=True))
    fake["train"] = Looking
    sq.train(sq.parse_args(["--resume", "runs/run", "--total-timesteps", "160"]))
    assert len(mapped) > 3 and not any(mapped[3:])


def test_resume_without_buffer_says_so(fake, capsys):
    sq.train(arguments(name="run", total_timesteps=80))
    sq.train(sq.parse_args(["--resume", "runs/run", "--total-timesteps", "160"]))
    assert "no replay buffer was saved" in capsys.readouterr().out
    steps = [row["global_step"] for row in table("runs/run/eval.csv")]
    assert steps == ["60", "80", "120", "160"]


def test_resume_refuses_what_it_cannot_honour(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    for words in (["--q-lr", "0.5"], ["--num-envs", "8"], ["--save-buffer"], ["--seed", "2"]):
        with pytest.raises(ValueError, match=f"^{words[0]} cannot change on --resume of runs/run"):
            sq.parse_args(["--resume", "runs/run", *words])
    with pytest.raises(ValueError, match="^--device must stay cpu"):
        sq.parse_args(["--resume", "runs/run", "--device", "cuda"])


def test_checkpoint_starts_from_weights_alone(fake):
    sq.train(arguments(name="first", total_timesteps=80))
    checkpoint = "runs/first/checkpoint.pt"
    changes = dict(learning_starts=60, buffer_size=60)  # no update before the end
    args = arguments(name="second", checkpoint=checkpoint, total_timesteps=56, **changes)
    assert sq.train(args)["global_step"] == 56
    assert not differences(agent_of("first"), agent_of("second"))
    assert sq.load("runs/second/checkpoint.pt")["q_optimizer"]["state"] == {}


def test_best_is_the_best(fake, monkeypatch):
    rates = iter([0.25, 0.5, 0.125])

    def evaluate_all(*_):
        return {"eval/success_rate": next(rates)}

    monkeypatch.setattr(sq, "evaluate_all", evaluate_all)
    sq.train(arguments(name="run", eval_freq=40))
    best = sq.load("runs/run/best.pt")["progress"]
    assert (best["global_step"], best["best"]) == (80, 0.5)
    assert differences(agent_of("run", "best.pt"), agent_of("run"))
    rates = iter([0.25])
    sq.train(sq.parse_args(["--resume", "runs/run", "--total-timesteps", "124"]))
    assert sq.load("runs/run/best.pt")["progress"]["global_step"] == 80, "resumed runs remember it"


def test_evaluation_repeats_and_leaves_training_alone(fake, capsys):
    sq.train(arguments(name="often", eval_freq=20))
    sq.train(arguments(name="seldom"))
    assert not differences(agent_of("often"), agent_of("seldom"))
    args = arguments(evaluate=True, checkpoint="runs/often/checkpoint.pt")
    first, second = sq.train(args), sq.train(args)
    assert first == second
    assert float(table("runs/often/eval.csv")[-1]["eval/return"]) == first["eval/return"]
    assert '"eval/success_rate"' in capsys.readouterr().out


def test_evaluation_has_neither_jitter_nor_noise(fake):
    """Even with both in training; FakeEnv draws from a generator of its own."""
    sq.train(arguments(name="run", total_timesteps=60))
    env = FakeEnv(4, stagger=False)

    class Watched(sq.Policy):
        def act(self, obs):
            assert obs is env.obs
            actions = super().act(obs)
            assert torch.equal(actions, super().act(obs))
            return actions

    before = torch.get_rng_state()
    sq.evaluate(Watched("runs/run/best.pt"), env, 8)
    assert torch.equal(torch.get_rng_state(), before) and env.steps == 20


def test_interval_is_wilsons():
    """Its ends are the rates p from which the measured one is 1.96 standard deviations away."""
    for rate, n in ((0.3, 200), (0.9, 64)):
        low, high = sq.wilson(rate, n)
        assert 0 < low < rate < high < 1
        for end in (low, high):
            assert abs(end - rate) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n))
    assert sq.wilson(1.0, 64)[1] == pytest.approx(1) and sq.wilson(0.0, 64)[0] == pytest.approx(0)


def test_policy_from_the_file_equals_the_actor(fake):
    args = arguments(name="run", ema=0.8)
    sq.train(args)
    before = torch.get_rng_state()
    policy = sq.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = sq.Agent(args, SHAPES)
    agent.load_state_dict(agent_of("run", "best.pt"))
    env = FakeEnv(5)
    obs = env.step(torch.ones(5, 2))[0]
    averaged = agent.averaged
    mean, _ = averaged.actor(averaged.encoder(obs["rgb"]), obs["state"])
    torch.testing.assert_close(policy.act(obs), torch.tanh(mean))
    raw, _ = agent.actor(agent.encoder(obs["rgb"]), obs["state"])
    assert not torch.allclose(raw, mean), "the average is what acts"
    numpy_obs = {key: value.numpy() for key, value in obs.items()}
    assert torch.equal(policy.act(numpy_obs), policy.act(obs))
    assert policy.spec == env.spec


def test_preprocess_crops_the_middle_and_squints(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[:, :80] = frame[:, 560:] = 255  # outside the middle square
    frame[:240, 80:320] = (10, 20, 30)
    seen = sq.Policy("runs/run/best.pt").preprocess(frame)
    assert seen.shape == (1, 16, 16, 3) and seen.dtype == torch.uint8 and seen.max() == 30
    assert (seen[0, :8, :8] == torch.tensor([10, 20, 30])).all() and seen[0, 8:].max() == 0


def test_stops_at_nan_and_names_it(fake):
    class Broken(FakeEnv):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, rewards * (math.nan if self.steps > 15 else 1), *rest

    fake["train"] = Broken
    message = r"^\S+ is not finite at step \d+; last good checkpoint: runs/run/checkpoint.pt$"
    with pytest.raises(FloatingPointError, match=message):
        sq.train(arguments(name="run"))
    assert all(value.isfinite().all() for value in agent_of("run").values())
    agent = sq.Agent(arguments(), SHAPES)
    agent.critic.heads[1][0].bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="critic.heads.1.0.bias is not finite at step 5"):
        sq.check_finite(agent, {}, 5, Path("runs/run"))


def test_existing_runs_are_not_overwritten(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sq.train(arguments(name="run"))


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_checkpoint_cannot_run_code(fake):
    torch.save(dict(algo="squint_sac", args={}, env=Code()), "crafted.pt")
    with pytest.raises(ValueError, match="crafted.pt is no checkpoint"):
        sq.load("crafted.pt")
    assert not Path("ran").exists()
    torch.save(dict(algo="drqv2"), "other.pt")
    with pytest.raises(ValueError, match="other.pt is not squint_sac's"):
        sq.load("other.pt")


# --- Command line ---------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["SO101ReachCube-v1", "SO101LiftCube-v1", "PickCube-v1"])
def test_help_shows_each_task_its_defaults(capsys, env_id):
    words = ["--env-id", env_id, "--device", "cpu"]
    values = sq.tuned(env_id, "cpu")
    with pytest.raises(SystemExit) as stop:
        sq.parse_args([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and env_id in text
    assert f"--num-envs {values['num_envs']} parallel" in text
    args = sq.parse_args(words)
    assert {key: getattr(args, key) for key in values} == values


def test_published_values_are_the_defaults():
    published = dict(num_envs=1024, num_updates=256, batch_size=512, buffer_size=1_000_000)
    published |= dict(learning_starts=5_000, total_timesteps=1_500_000, policy_frequency=4)
    published |= dict(render_size=128, image_size=16, gamma=0.9, tau=0.01, alpha=1.0)
    published |= dict(num_q=2, num_atoms=101, v_min=-20, v_max=20)
    published |= dict(policy_lr=3e-4, q_lr=3e-4, alpha_lr=3e-4, asymmetric=False)
    args = sq.Args()
    assert {key: getattr(args, key) for key in published} == published


def test_arguments_come_from_the_checkpoint(fake):
    sq.train(arguments(name="run", total_timesteps=60, gamma=0.8))
    args = sq.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt", "--device", "cpu"])
    found = (args.evaluate, args.env_id, args.name, args.gamma, args.num_atoms)
    assert found == (True, "Fake", "", 0.8, 11)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
        (["--checkpoint", sq.__file__], "is no checkpoint: damaged, or another kind of file"),
        (["--evaluate"], "--evaluate needs --checkpoint"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--num-updates", "10"], "multiple of --policy-frequency"),
        (["--eval-episodes", "65"], "multiple of --eval-envs"),
        (["--image-size", "32", "--render-size", "16"], "--render-size must not be below"),
        (["--v-min", "3", "--v-max", "2"], "--v-min must be below --v-max"),
        (["--buffer-size", "64"], "--buffer-size must not be below --learning-starts"),
    ],
)
def test_what_cannot_work_is_refused_by_name(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sq.check(sq.parse_args(["--device", "cpu", *words]))


def test_bad_input_is_one_line(tmp_path):
    command = [sys.executable, sq.__file__, "--device", "cpu", "--evaluate"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: --evaluate needs --checkpoint FILE\n"


def test_plot_critic_draws_an_episode(fake):
    import plot_critic

    sq.train(arguments(name="run", total_timesteps=60, asymmetric=True))
    path = plot_critic.main(plot_critic.Args("runs/run/best.pt"))
    assert path == Path("runs/run/best_critic.png") and path.read_bytes().startswith(b"\x89PNG")
