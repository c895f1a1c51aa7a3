"""Squint SAC: its formulas against references, its storage by hand, its runs end to end on a tiny environment."""

import copy
import csv
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import squint_sac as sq
import torch
import torch.multiprocessing as mp
import torch.nn as nn
from fake_env import FakeEnv
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

SCRIPT = Path(sq.__file__)
CPU = torch.device("cpu")
SHAPES = dict(channels=3, state=3, privileged=0, action=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> sq.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(env_id="Fake", device="cpu", amp=False, compile=False, cudagraphs=False, num_envs=4, render_size=16,
                  num_updates=4, batch_size=16, buffer_size=400, learning_starts=40, total_timesteps=120, eval_freq=60,
                  log_freq=20, eval_episodes=8, eval_envs=4, actor_hidden=16, critic_hidden=16, num_atoms=11,
                  capture_video=False)
    return sq.Args(**values | changes)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_fakes(args, device, rank=0):
    size = dict(size=args.render_size, asymmetric=args.asymmetric, cameras=len(args.cameras))
    env = None if args.evaluate else FakeEnv(args.num_envs, seed=args.seed + 1000 * rank, **size)
    evals = {key: FakeEnv(args.eval_envs, seed=1, stagger=False, **size) for key in ("", "_nodr")}
    return env, {} if rank else evals


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(sq, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- C51 and the policy's density -------------------------------------------------------------------------------------
def brute_force(probs, rewards, discounts, support):
    """Atom by atom, in double precision on the host."""
    z, out = support.double().tolist(), torch.zeros(probs.shape, dtype=torch.float64)
    step = (z[-1] - z[0]) / (len(z) - 1)
    for k in range(probs.shape[0]):
        for b in range(probs.shape[1]):
            for j, p in enumerate(probs[k, b].double().tolist()):
                moved = min(max(float(rewards[b]) + float(discounts[b]) * z[j], z[0]), z[-1])
                for i, atom in enumerate(z):
                    out[k, b, i] += p * max(0.0, 1 - abs(moved - atom) / step)
    return out


@pytest.mark.parametrize("atoms, low, high", [(101, -20.0, 20.0), (11, -1.0, 1.0), (2, 0.0, 1.0)])
def test_projection_equals_brute_force(atoms, low, high):
    support = torch.linspace(low, high, atoms)
    probs = torch.rand((2, 12, atoms), generator=generator()).softmax(-1)
    rewards = (torch.rand(12, generator=generator(1)) * 2 - 1) * 1.5 * high
    discounts = torch.tensor([0.9, 0.9, 0.0, 1.0] * 3)
    projected = sq.project_distribution(probs, rewards, discounts, support)
    torch.testing.assert_close(projected.double(), brute_force(probs, rewards, discounts, support), atol=2e-5, rtol=0)
    torch.testing.assert_close(projected.sum(-1), torch.ones(2, 12))


def test_projection_keeps_the_mean_inside_the_support():
    support = torch.linspace(-20, 20, 101)
    probs = torch.rand((2, 50, 101), generator=generator()).softmax(-1)
    rewards = torch.rand(50, generator=generator(1))
    discounts = torch.full((50,), 0.9)
    mean = (sq.project_distribution(probs, rewards, discounts, support) * support).sum(-1)
    torch.testing.assert_close(mean, rewards + 0.9 * (probs * support).sum(-1), atol=1e-4, rtol=0)


def test_projection_clips_at_both_ends_and_keeps_exact_atoms():
    support, one = torch.linspace(-20, 20, 101), torch.ones(1)
    probs = torch.rand((1, 1, 101), generator=generator()).softmax(-1)
    above = sq.project_distribution(probs, 100 * one, one, support)
    below = sq.project_distribution(probs, -100 * one, one, support)
    assert above[0, 0, -1] == pytest.approx(1, abs=1e-6) and below[0, 0, 0] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(sq.project_distribution(probs, 0 * one, one, support), probs, atol=1e-5, rtol=0)
    integers = torch.arange(5.0)  # every place is exact here, also the two ends
    for atom in range(5):
        terminal = sq.project_distribution(torch.full((1, 1, 5), 0.2), integers[atom].view(1), 0 * one, integers)
        torch.testing.assert_close(terminal[0, 0], torch.eye(5)[atom])


def test_log_probability_is_that_of_a_squashed_gaussian():
    torch.manual_seed(0)
    actor, features, obs = sq.Actor(3, 2, 16), torch.randn(32, 1024), {"state": torch.randn(32, 3)}
    noise = torch.randn(32, 2) * 2
    actions, log_probs = sq.sample_actions(actor, features, obs, noise)
    mean, log_std = actor(features, obs)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    reference = TransformedDistribution(normal, TanhTransform(cache_size=1))
    raw = mean + log_std.exp() * noise
    same = reference.transforms[0](raw)  # fills the cache, so that atanh loses nothing
    torch.testing.assert_close(actions, same)
    torch.testing.assert_close(log_probs, reference.log_prob(same), atol=1e-4, rtol=1e-4)


# --- Pictures ---------------------------------------------------------------------------------------------------------
def test_squint_is_the_rounded_area_mean():
    rgb = torch.randint(0, 256, (3, 32, 32, 6), dtype=torch.uint8, generator=generator())
    mean = rgb.double().reshape(3, 16, 2, 16, 2, 6).mean((2, 4))
    small = sq.squint(rgb, 16)
    assert small.dtype == torch.uint8 and small.shape == (3, 16, 16, 6)
    assert (small.double() - mean).abs().max() <= 0.5
    assert abs(float((small.double() - mean).mean())) < 0.02, "truncation would give -0.4"
    assert sq.squint(rgb, 32) is rgb


def test_jitter_differs_by_sample_and_camera_and_stays_in_bounds():
    rgb = torch.tensor([200, 90, 40], dtype=torch.uint8).repeat(64, 8, 8, 2)
    rgb[:, :4] //= 2
    out = sq.color_jitter(rgb, generator())
    assert out.dtype == torch.uint8 and out.shape == rgb.shape
    assert torch.equal(out, sq.color_jitter(rgb, generator())), "the same generator gives the same jitter"
    assert len(torch.unique(out[:, -1, 0], dim=0)) > 60, "each sample has its own draw"
    assert not torch.equal(out[..., :3], out[..., 3:]), "each camera has its own draw"
    # brightness and contrast of 0.3 around a mean luma of 86: nothing leaves this range
    assert out[:, -1, 0, 0].float().sub(200).abs().max() < 200 * 0.3 * 1.3 + 0.3 * 130 + 60
    mean = sq.color_jitter(rgb.repeat(20, 1, 1, 1), generator(1)).float().mean(0)
    assert (mean - rgb[0].float()).abs().max() < 12, "on average the colours stay"


def test_jitter_leaves_black_black_and_greys_grey():
    grey = torch.randint(0, 256, (16, 8, 8, 1), dtype=torch.uint8, generator=generator()).repeat(1, 1, 1, 3)
    out = sq.color_jitter(grey, generator()).int()
    assert (out.amax(-1) - out.amin(-1)).max() <= 1
    assert sq.color_jitter(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), generator()).max() == 0


def test_hue_turns_red_towards_green_by_at_most_18_degrees(monkeypatch):
    """With brightness, contrast and saturation untouched, the hue draw alone turns the colour wheel."""
    import colorsys

    for value in (0.0, 0.999999):  # draws of -0.05 and 0.05 of a turn
        draw = torch.full((4, 1, 1, 1, 1, 1), 0.5)
        draw[3] = value
        monkeypatch.setattr(torch, "rand", lambda *_, draw=draw, **__: draw)
        out = sq.color_jitter(torch.tensor([150, 100, 100], dtype=torch.uint8).repeat(1, 4, 4, 1), generator())
        hue = colorsys.rgb_to_hsv(*(out[0, 0, 0].double() / 255).tolist())[0]
        assert (hue + 0.5) % 1 - 0.5 == pytest.approx(math.copysign(0.05, value - 0.5), abs=0.012)


# --- Networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 32, 64])
def test_encoder_gives_1024_features(size):
    assert sq.Encoder(3, size)(torch.zeros(2, size, size, 3, dtype=torch.uint8)).shape == (2, 1024)


def test_one_encoder_takes_every_size_of_the_schedules():
    encoder = sq.Encoder(3, 16)
    for size in range(10, 65, 2):
        assert encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape == (1, 1024)


def test_parameter_counts_are_the_published_ones():
    args = sq.Args(device="cpu", cudagraphs=False)
    agent = sq.Agent(args, dict(channels=3, state=12, privileged=0, action=6), CPU)
    count = {k: sum(p.numel() for p in getattr(agent, k).parameters()) for k in ("encoder", "actor", "critic")}
    assert count == {"encoder": 34_400, "actor": 269_986, "critic": 1_536_096}


def test_batched_heads_equal_separate_modules():
    torch.manual_seed(0)
    heads, x = sq.Heads(3, [7, 8, 8, 5]), torch.randn(4, 7)
    for parameter in [*heads.biases, *heads.norm_weights, *heads.norm_biases]:
        nn.init.normal_(parameter)
    out = heads(x.expand(3, -1, -1))
    for k in range(3):
        y = x
        for i, (inputs, width) in enumerate([(7, 8), (8, 8), (8, 5)]):
            linear = nn.Linear(inputs, width)
            linear.weight.data, linear.bias.data = heads.weights[i][k].T, heads.biases[i][k, 0]
            y = linear(y)
            if i < 2:
                norm = nn.LayerNorm(width)
                norm.weight.data, norm.bias.data = heads.norm_weights[i][k, 0], heads.norm_biases[i][k, 0]
                y = norm(y).relu()
        torch.testing.assert_close(out[k], y)
    assert not torch.equal(heads.weights[0][0], heads.weights[0][1]), "each head starts from its own weights"


# --- Replay -----------------------------------------------------------------------------------------------------------
def counted_replay(rows=12, steps=40, ends=((2, 3, 4, 7, 11), (5, 9)), **changes):
    """Two worlds; the picture of observation t is filled with t, a final one with 100 + t, rewards are t + 1.

    `ends`: vector steps at which each world's episode ended. -> replay, and the dones (steps, 2)
    """
    args = arguments(num_envs=2, buffer_size=2 * rows, learning_starts=8, gamma=0.5, **changes)

    def obs(t):
        level = torch.full((2, 16, 16, 3), t, dtype=torch.uint8)
        return {"rgb": level, "state": torch.tensor([[t, 0.0, 0.0], [t, 1.0, 0.0]])}

    replay = sq.Replay(obs(0), 2, 3, args)
    dones = torch.zeros((steps, 2), dtype=torch.bool)
    for world, times in enumerate(ends):
        dones[list(times), world] = True
    for t in range(steps):
        final = {k: torch.where(dones[t].view(-1, *[1] * (v.ndim - 1)), v + 100 - 1, v)
                 for k, v in obs(t + 1).items()}  # 100 + t where the episode ended
        replay.add(torch.full((2, 2), float(t)), torch.full((2,), t + 1.0), dones[t], dones[t], final, obs(t + 1))
    return replay, dones


def all_samples(replay, count=4000, seed=0):
    batch = replay.sample(count, 16, generator(seed))
    t, world = batch["actions"][:, 0].int(), batch["obs"]["state"][:, 1].int()
    return batch, t, world


@pytest.mark.parametrize("steps", [9, 11, 12, 30, 40])
def test_next_observation_across_wrap_and_episode_ends(steps):
    ends = ([t for t in range(steps) if t % 3 == 2], [t for t in range(steps) if t % 4 == 1])
    replay, dones = counted_replay(steps=steps, ends=ends)
    batch, t, world = all_samples(replay)
    assert batch["obs"]["rgb"][:, 0, 0, 0].int().equal(t) and batch["obs"]["state"][:, 0].int().equal(t)
    expected = torch.where(dones[t, world], 100 + t, t + 1)
    assert batch["next_obs"]["rgb"][:, 3, 5, 1].int().equal(expected.int())
    assert batch["next_obs"]["state"][:, 0].int().equal(expected.int())
    assert batch["rewards"].equal(t + 1.0) and (batch["discounts"] == 0.5).all() and batch["live"].all()
    oldest = max(0, steps - 11)  # one of the 12 rows is the present observation
    seen = {(int(a), int(b)) for a, b in zip(t, world, strict=True)}
    assert seen == {(a, b) for a in range(oldest, steps) for b in range(2)}


def test_overwritten_final_observation_is_not_learned_from():
    replay, dones = counted_replay(steps=30, ends=(range(30), []))  # every step ends: far more ends than slots
    batch, t, world = all_samples(replay)
    lost = batch["live"] == 0
    assert lost.any() and (world[lost] == 0).all()
    good = (batch["live"] == 1) & (world == 0)
    assert batch["next_obs"]["rgb"][good, 0, 0, 0].int().equal((100 + t[good]).int())


@pytest.mark.parametrize("rule, discount_at_end", [("always", 0.5), ("never", 0.0), ("on_truncation", 0.0)])
def test_bootstrap_rules(rule, discount_at_end):
    replay, dones = counted_replay(steps=10, ends=((2, 5), (4,)), bootstrap_at_done=rule)
    batch, t, world = all_samples(replay)  # counted_replay terminates where it ends
    assert (batch["discounts"][dones[t, world]] == discount_at_end).all()
    assert (batch["discounts"][~dones[t, world]] == 0.5).all()


def test_truncation_keeps_the_bootstrap():
    replay, dones = counted_replay(steps=10, ends=((2, 5), (4,)), bootstrap_at_done="on_truncation")
    replay.data["terminations"].zero_()  # the same ends, by time
    assert (all_samples(replay)[0]["discounts"] == 0.5).all()


def test_n_step_by_hand():
    replay, dones = counted_replay(steps=30, ends=((20, 24), (26,)), n_step=3)
    batch, t, world = all_samples(replay)
    assert t.max() == 27, "steps whose three rewards are not stored yet are left out"
    for i in range(300):
        rewards, discount, k = 0.0, 1.0, int(t[i])
        for _ in range(3):
            rewards, discount = rewards + discount * (k + 1), discount * 0.5
            ended, k = bool(dones[k, world[i]]), k + 1
            if ended:
                break
        assert batch["rewards"][i] == rewards and batch["discounts"][i] == discount
        assert int(batch["next_obs"]["rgb"][i, 0, 0, 0]) == (100 + k - 1 if ended else k)


def test_frame_stack_repeats_the_first_picture_of_an_episode():
    replay, dones = counted_replay(steps=30, ends=((20, 24), (26,)), frame_stack=3)
    batch, t, world = all_samples(replay)
    assert batch["obs"]["rgb"].shape[-1] == 9
    for i in range(300):
        now, w = int(t[i]), int(world[i])
        first = max([0] + [e + 1 for e in range(now) if dones[e, w]])
        stack = [max(first, now - 2), max(first, now - 1), now]
        assert batch["obs"]["rgb"][i, 0, 0, ::3].tolist() == stack
        after = 100 + now if dones[now, w] else now + 1
        assert batch["next_obs"]["rgb"][i, 0, 0, ::3].tolist() == [max(first, now - 1), now, after]
    head = replay.present(16)["rgb"][:, 0, 0, ::3].tolist()
    assert head == [[28, 29, 30], [28, 29, 30]]


def test_sampling_is_uniform():
    replay, _ = counted_replay(steps=30)
    _, t, world = all_samples(replay, count=44_000)
    counts = torch.bincount((t - 19) * 2 + world, minlength=22).double()  # 11 rows of 2 worlds, 2000 expected of each
    assert len(counts) == 22 and ((counts - 2000).square() / 2000).sum() < 41.4  # chi square, 21 dof, p = 0.005


def test_turnover_scales_updates_with_the_fill():
    args, calls = arguments(utd_mode="turnover", num_updates=8), []
    replay = sq.Replay(FakeEnv(4).obs, 2, 10, args)
    learner = sq.Learner(None, replay, args, generator())
    learner.block = lambda: calls.append(replay.size)
    for size in range(1, replay.rows):
        replay.size = size
        learner.run(16)
    assert len(calls) == int(sum(size / (replay.rows - 1) for size in range(1, replay.rows)) * 2 + 1e-6)


# --- Updates ----------------------------------------------------------------------------------------------------------
def learning_parts(**changes):
    args = arguments(**changes)
    env = FakeEnv(args.num_envs, asymmetric=args.asymmetric)
    torch.manual_seed(3)
    agent = sq.Agent(args, SHAPES | dict(privileged=env.privileged_dim), CPU)
    replay = sq.Replay(env.obs, 2, 10, args)
    for _ in range(30):
        actions = torch.rand((args.num_envs, 2), generator=env.generator) * 2 - 1
        obs, rewards, terminations, truncations, info = env.step(actions)
        replay.add(actions, rewards, terminations, truncations, info["final_obs"], obs)
    return agent, replay, args


def differences(before: dict, after: dict) -> set[str]:
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


def test_who_learns_from_which_loss():
    agent, replay, args = learning_parts()
    before = copy.deepcopy(agent.state_dict())
    batch = replay.sample(16, 16, generator())
    features, metrics = sq.critic_update(agent, batch, torch.randn(32, 2), args)
    middle = copy.deepcopy(agent.state_dict())
    assert differences(before, middle) == {"encoder", "critic", "log_alpha"}
    sq.actor_update(agent, batch["obs"], features, torch.randn(16, 2), args)
    after = copy.deepcopy(agent.state_dict())
    assert differences(middle, after) == {"actor"}, "the encoder learns from the critic alone"
    sq.target_update(agent, 0.25)
    for k, v in agent.target.state_dict().items():
        torch.testing.assert_close(v, before[f"target.{k}"].lerp(after[f"critic.{k}"], 0.25))
    assert not any(v.requires_grad for v in metrics.values())


def test_fixed_alpha_stays():
    agent, replay, args = learning_parts(autotune=False, alpha=0.2)
    sq.Learner(agent, replay, args, generator()).run(16)
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


def test_temperature_rises_when_entropy_is_low():
    for deviation, rises in ((-5.0, True), (0.0, False)):
        agent, replay, args = learning_parts()
        agent.actor.log_std.weight.data.zero_()
        agent.actor.log_std.bias.data.fill_(deviation)  # tanh squashes it into [-5, 2]
        sq.critic_update(agent, replay.sample(16, 16, generator()), torch.randn(32, 2), args)
        assert (agent.log_alpha.item() > 0) == rises


def test_critic_sees_privileged_state_and_the_actor_does_not():
    agent, replay, args = learning_parts(asymmetric=True)
    batch = replay.sample(16, 16, generator())
    features, obs, noise = torch.zeros(16, 1024), batch["obs"], torch.zeros(16, 2)
    other = obs | {"privileged": obs["privileged"] + 1}
    assert not torch.equal(agent.critic(features, obs, noise), agent.critic(features, other, noise))
    assert torch.equal(agent.actor(features, obs)[0], agent.actor(features, other)[0])


def test_an_overwritten_row_has_no_weight():
    agent, replay, args = learning_parts()
    batch, noise = replay.sample(16, 16, generator()), torch.randn((32, 2), generator=generator())
    batch["live"][:8] = 0
    loss = sq.critic_loss(agent, batch, noise, args)[2]["loss/qf"]
    batch["rewards"][:8] += 5
    assert torch.equal(sq.critic_loss(agent, batch, noise, args)[2]["loss/qf"], loss)


def test_block_equals_its_steps_written_out():
    agent, replay, args = learning_parts()
    other, random = copy.deepcopy(agent), generator(5)
    sq.Learner(agent, replay, args, generator(5)).run(16)
    adam = {"q": [*other.critic.parameters(), *other.encoder.parameters()], "pi": other.actor.parameters(),
            "alpha": [other.log_alpha]}
    adam = {k: torch.optim.Adam(v, 3e-4) for k, v in adam.items()}
    for _ in range(args.policy_frequency):
        batch = replay.sample(16, 16, random)
        loss, features, _ = sq.critic_loss(other, batch, torch.randn((32, 2), generator=random), args)
        for k in ("q", "alpha"):
            adam[k].zero_grad()
        loss.backward()
        adam["q"].step()
        adam["alpha"].step()
        for target, source in zip(other.target.parameters(), other.critic.parameters(), strict=True):
            target.data.mul_(1 - args.tau).add_(args.tau * source.data)
    loss = sq.actor_loss(other, batch["obs"], features, torch.randn((16, 2), generator=random), args)[0]
    adam["pi"].zero_grad()
    loss.backward()
    adam["pi"].step()
    for k, v in agent.state_dict().items():
        torch.testing.assert_close(v, other.state_dict()[k], atol=2e-6, rtol=1e-5)


def compare_with_plain(device, **fast):
    """Three blocks by the plain and by the fast route from the same start. -> weights of each"""
    weights = []
    for options in ({}, fast):
        agent, replay, args = learning_parts()
        agent = sq.Agent(args, SHAPES, device)
        torch.manual_seed(3)
        agent.load_state_dict(sq.Agent(args, SHAPES, CPU).state_dict())
        for name in ("data", "final"):
            setattr(replay, name, {k: v.to(device) for k, v in getattr(replay, name).items()})
        replay.ends, replay.worlds, replay.cursor = (x.to(device) for x in (replay.ends, replay.worlds, replay.cursor))
        for k, v in options.items():
            setattr(args, k, v)
        learner = sq.Learner(agent, replay, args, torch.Generator(device).manual_seed(7))
        for _ in range(6):
            learner.run(16)
        assert learner.read().keys() >= {"loss/qf", "loss/actor"} and learner.read() == {}
        weights.append({k: v.cpu() for k, v in agent.state_dict().items()})
    return weights


@pytest.mark.parametrize("backend", [
    "aot_eager",  # the traced graphs, run without code generation
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")]),
])  # fmt: skip
def test_compiled_route_equals_the_plain_one(monkeypatch, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    plain, fast = compare_with_plain(CPU, compile=True)
    for k in plain:
        torch.testing.assert_close(fast[k], plain[k], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_equals_the_plain_route(compiled):
    plain, fast = compare_with_plain(torch.device("cuda"), cudagraphs=True, compile=compiled)
    for k in plain:
        torch.testing.assert_close(fast[k], plain[k], atol=1e-3, rtol=1e-2)


# --- Squint schedules -------------------------------------------------------------------------------------------------
def test_sizes_of_the_schedules():
    linear = arguments(squint="linear", render_size=32, total_timesteps=100)
    assert [sq.next_size(linear, 16, t, []) for t in (0, 24, 25, 50, 99, 100)] == [16, 16, 20, 24, 28, 32]
    adaptive = arguments(squint="adaptive", render_size=32)
    assert sq.next_size(adaptive, 16, 0, [0.1, 0.2, 0.3, 0.4]) == 16
    assert sq.next_size(adaptive, 16, 0, [0.4, 0.4, 0.41, 0.4]) == 20
    assert sq.next_size(adaptive, 32, 0, [0.4, 0.4, 0.41, 0.4]) == 32
    assert sq.next_size(arguments(), 16, 0, [0.0] * 9) == 16


# --- Runs -------------------------------------------------------------------------------------------------------------
def table(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_a_short_run_from_end_to_end(fake):
    args = arguments(capture_video=True, plot_critic=True, name="run")
    result = sq.train(args)
    run = fake / "runs/run"
    assert {f.name for f in run.iterdir()} >= {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt"}
    assert len(list((run / "videos").glob("*.mp4"))) == 2 and list(run.glob("critic_*.png"))
    rows = table(run / "eval.csv")
    assert list(rows[0])[:4] == ["global_step", "wall_time", "train_time", "eval/success_rate"]
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    assert 0 <= float(rows[0]["eval/ci_low"]) <= float(rows[0]["eval/success_rate"]) <= float(rows[0]["eval/ci_high"])
    assert all(math.isfinite(float(v)) for row in table(run / "metrics.csv") for v in row.values())
    torch.manual_seed(args.seed)
    start = sq.Agent(args, SHAPES, CPU).state_dict()
    assert differences(start, sq.load_file(run / "checkpoint.pt")["agent"]) == {
        "encoder", "actor", "critic", "target", "log_alpha"}
    assert not list(run.glob("*.tmp"))


def test_two_equal_runs_are_equal(fake):
    for name in "ab":
        sq.train(arguments(name=name))
    a, b = (sq.load_file(f"runs/{name}/checkpoint.pt")["agent"] for name in "ab")
    assert not differences(a, b)


@pytest.mark.parametrize("changes", [
    dict(squint="linear", render_size=24, image_size_max=24, frame_stack=2),
    dict(n_step=3, utd_mode="turnover", bootstrap_at_done="never"),
    dict(asymmetric=True, cameras=("wrist", "third"), jitter=False),
    dict(overlap=True),
], ids=lambda changes: "-".join(changes))  # fmt: skip
def test_resume_continues_exactly(fake, changes):
    """2N steps equal N steps and then N more, bit for bit, with --save-buffer on the CPU."""
    args = arguments(name="whole", save_buffer=True, total_timesteps=160, eval_freq=80, buffer_size=120, **changes)
    sq.train(args)
    schedule = dict(total_timesteps=160)  # linear squint depends on the length of the run
    half = replace(args, name="half")
    full_length, sq_next = schedule["total_timesteps"], sq.next_size
    try:
        sq.next_size = lambda a, *rest: sq_next(replace(a, total_timesteps=full_length), *rest)
        sq.train(replace(half, total_timesteps=80))
    finally:
        sq.next_size = sq_next
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was interrupted
        path.write_text(path.read_text() + "999999" + "," * path.read_text().partition("\n")[0].count(",") + "\n")
    sq.train(replace(half, resume="runs/half"))
    whole, resumed = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "half"))
    assert not differences(whole["agent"], resumed["agent"])
    for key in ("random", "q_optimizer", "actor_optimizer", "alpha_optimizer", "replay"):
        torch.testing.assert_close(whole[key], resumed[key], atol=0, rtol=0)
    assert whole["now"]["size"] == resumed["now"]["size"] and resumed["now"]["global_step"] == 160
    rows = [table(Path(f"runs/{name}/eval.csv")) for name in ("whole", "half")]
    assert [[row[k] for k in row if "time" not in k] for row in rows[0]] == [
        [row[k] for k in row if "time" not in k] for row in rows[1]]


def test_resume_without_buffer_says_so(fake, capsys):
    sq.train(arguments(name="run", total_timesteps=80))
    sq.train(replace(arguments(name="run"), resume="runs/run", total_timesteps=160))
    assert "buffer was saved" in capsys.readouterr().out
    assert [row["global_step"] for row in table(Path("runs/run/eval.csv"))] == ["60", "80", "120", "160"]


def test_checkpoint_starts_from_weights_alone(fake):
    sq.train(arguments(name="first", total_timesteps=80))
    result = sq.train(arguments(name="second", checkpoint="runs/first/checkpoint.pt", total_timesteps=60))
    assert result["global_step"] == 60
    first, second = (sq.load_file(f"runs/{name}/args.json".replace("args.json", "checkpoint.pt"))
                     for name in ("first", "second"))
    assert second["alpha_optimizer"]["state"][0]["step"] < first["alpha_optimizer"]["state"][0]["step"]


def test_adaptive_size_is_kept_in_the_checkpoint(fake, monkeypatch):
    monkeypatch.setattr(sq, "next_size", lambda args, size, step, history: min(size + 4, 24) if history else size)
    sq.train(arguments(name="run", squint="adaptive", render_size=24, image_size_max=24))
    checkpoint = sq.load_file("runs/run/checkpoint.pt")
    assert checkpoint["now"]["size"] == 24
    assert sq.Policy(checkpoint).preprocess(np.zeros((48, 64, 3), np.uint8)).shape == (1, 24, 24, 3)


def test_evaluation_repeats_and_leaves_training_alone(fake):
    sq.train(arguments(name="often", eval_freq=20))
    sq.train(arguments(name="seldom"))
    often, seldom = (sq.load_file(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    results = [sq.train(arguments(evaluate=True, checkpoint="runs/often/checkpoint.pt", name=name)) for name in "ab"]
    assert results[0]["eval/return"] == results[1]["eval/return"]
    last = table(Path("runs/often/eval.csv"))[-1]
    assert float(last["eval/return"]) == results[0]["eval/return"]


def test_interval_is_wilsons():
    """Its ends are the rates p at which the measured one lies 1.96 standard deviations, sqrt(p (1 - p) / n), away."""
    args, view = arguments(eval_episodes=200, eval_envs=100), torch.zeros(100, 16, 16, 3, dtype=torch.uint8)
    still = SimpleNamespace(reset=lambda: None, act=lambda obs: torch.zeros(100, 2), view=view)
    metrics, _ = sq.evaluate(still, FakeEnv(100, stagger=False), args, False, None)
    rate = metrics["eval/success_rate"]
    assert 0 < metrics["eval/ci_low"] < rate < metrics["eval/ci_high"] < 1
    for end in (metrics["eval/ci_low"], metrics["eval/ci_high"]):
        assert abs(end - rate) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 200))


@pytest.mark.parametrize("frame_stack", [1, 2])
def test_policy_from_the_file_equals_the_actor(fake, frame_stack):
    args = arguments(name="run", frame_stack=frame_stack)
    sq.train(args)
    before = torch.get_rng_state()
    policy = sq.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = sq.Agent(args, SHAPES, CPU)
    agent.load_state_dict(sq.load_file("runs/run/best.pt")["agent"])
    env, past = FakeEnv(5), None
    for _ in range(3):
        obs, _, _, _, _ = env.step(torch.ones(5, 2))
        now = [past if past is not None else obs["rgb"], obs["rgb"]][-frame_stack:]
        past = obs["rgb"]
        expected = torch.tanh(agent.actor(agent.encoder(torch.cat(now, -1)), obs)[0])
        torch.testing.assert_close(policy.act(obs), expected)
        numpy_obs = {k: v.numpy() for k, v in obs.items()}
    policy.reset()
    assert policy.act(numpy_obs).shape == (5, 2)
    assert policy.spec == env.spec


def test_preprocess_crops_the_middle_and_squints(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[:, :80] = frame[:, 560:] = 255  # outside the middle square
    frame[:240, 80:320] = (10, 20, 30)
    seen = sq.Policy("runs/run/best.pt").preprocess(frame)
    assert seen.shape == (1, 16, 16, 3) and seen.dtype == torch.uint8 and seen.max() == 30
    assert seen[0, :8, :8].reshape(-1, 3).unique(dim=0).tolist() == [[10, 20, 30]] and seen[0, 8:].max() == 0


def test_stops_at_nan_and_names_the_tensor(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    checkpoint = sq.load_file("runs/run/checkpoint.pt")
    checkpoint["agent"]["actor.mean.weight"][0, 0] = math.nan
    sq.save(Path("broken.pt"), checkpoint)
    with pytest.raises(FloatingPointError, match=r"^\S+ is not finite at step \d+; last good checkpoint: none yet$"):
        sq.train(arguments(name="other", checkpoint="broken.pt"))
    agent = sq.Agent(arguments(), SHAPES, CPU)
    agent.critic.heads.biases[1].data[0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="critic.heads.biases.1 is not finite at step 5; last .*checkpoint.pt"):
        sq.check_finite(agent, {}, 5, Path("runs/run/checkpoint.pt"))


@pytest.mark.parametrize("changes, field", [
    (dict(num_atoms=21), "num_atoms"), (dict(env_id="Other"), "env_id"), (dict(critic_hidden=32), "critic_hidden"),
    (dict(asymmetric=True), "asymmetric"), (dict(cameras=("wrist", "third")), "cameras"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(fake, changes, field):
    sq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}: it has .*, this run"):
        sq.train(arguments(name="other", checkpoint="runs/run/best.pt", **changes))


@pytest.mark.parametrize("changes, field", [
    (dict(buffer_size=800), "buffer_size: it has .*, this run 800"), (dict(num_envs=2), "num_envs: it has 4"),
    (dict(device="cuda", cudagraphs=False), "device: it has cpu, this run cuda"),
])  # fmt: skip
def test_a_run_cannot_be_continued_with_another_buffer_or_other_environments(fake, changes, field):
    """And its folder stays as it was."""
    args = arguments(name="run", save_buffer=True, total_timesteps=60)
    sq.train(args)
    before = {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}
    checkpoint = sq.load_file("runs/run/checkpoint.pt")
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}"):
        sq.check_fits(checkpoint, replace(args, resume="runs/run", **changes), checkpoint["shapes"])
    if "device" not in changes:
        with pytest.raises(ValueError, match="the checkpoint differs in"):
            sq.train(replace(args, resume="runs/run", total_timesteps=80, **changes))
    assert before == {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}


def test_existing_runs_are_not_overwritten(fake):
    sq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sq.train(arguments(name="run"))


# --- Several processes ------------------------------------------------------------------------------------------------
def in_process(rank, folder, port):
    """One of two processes: one update each on its half of a batch, then a short run."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sq.make_envs = make_fakes
    args = arguments(name="two", total_timesteps=160, eval_freq=160)
    sq.start_processes(args)
    agent, replay, _ = learning_parts()
    batch, noise = torch.load("batch.pt")
    half = {k: v.chunk(2)[rank] if torch.is_tensor(v) else {n: x.chunk(2)[rank] for n, x in v.items()}
            for k, v in batch.items()}
    mine = torch.cat([part.chunk(2)[rank] for part in noise.chunk(2)])
    features, _ = sq.critic_update(agent, half, mine, args)
    sq.actor_update(agent, half["obs"], features, noise[:16].chunk(2)[rank], args)
    torch.save(agent.state_dict(), f"update{rank}.pt")
    keep = sq.Learner.run

    def run(self, size):
        keep(self, size)
        torch.save(self.agent.state_dict(), f"trained{rank}.pt")

    sq.Learner.run = run
    sq.train(args)
    sq.dist.barrier()  # the other process is still saving
    sq.train(replace(args, resume="runs/two", total_timesteps=240))
    sq.dist.destroy_process_group()


def test_two_processes_learn_as_one(tmp_path):
    agent, replay, args = learning_parts()
    batch, noise = replay.sample(16, 16, generator()), torch.randn((32, 2), generator=generator(1))
    torch.save((batch, noise), tmp_path / "batch.pt")
    with __import__("socket").socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    mp.start_processes(in_process, (str(tmp_path), port), nprocs=2, start_method="spawn")
    features, _ = sq.critic_update(agent, batch, noise, args)
    sq.actor_update(agent, batch["obs"], features, noise[:16], args)
    updates, trained = ([torch.load(tmp_path / f"{what}{rank}.pt") for rank in range(2)]
                        for what in ("update", "trained"))
    assert not differences(*updates) and not differences(*trained)
    for k, v in agent.state_dict().items():
        torch.testing.assert_close(updates[0][k], v, atol=2e-6, rtol=1e-5)
    assert sq.load_file(tmp_path / "runs/two/checkpoint.pt")["now"]["global_step"] == 240


# --- Command line -----------------------------------------------------------------------------------------------------
def test_help_shows_each_task_its_defaults(capsys):
    so101 = pytest.importorskip("envs.so101", reason="needs the extra so101")
    for env_id in [*so101.TASKS, "PickCube-v1"]:
        with pytest.raises(SystemExit) as stop:
            sq.parse_args(["--env-id", env_id, "--device", "cpu", "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and env_id in text and "target_network" in text.replace("-", "_")
        assert f"(default: {sq.tuned_defaults(env_id, 'cpu')['num_envs']})" in text
        args = sq.parse_args(["--env-id", env_id, "--device", "cpu"])
        for key, value in sq.tuned_defaults(env_id, "cpu").items():
            assert getattr(args, key) == value


def test_published_values_are_the_defaults():
    args = sq.Args(device="cpu", cudagraphs=False)
    published = dict(num_envs=1024, num_updates=256, batch_size=512, buffer_size=1_000_000, learning_starts=5_000,
                     total_timesteps=1_500_000, render_size=128, image_size=16, gamma=0.9, tau=0.01, num_q=2, alpha=1.0,
                     policy_frequency=4, num_atoms=101, v_min=-20, v_max=20, policy_lr=3e-4, q_lr=3e-4, alpha_lr=3e-4,
                     squint="fixed", n_step=1, frame_stack=1, asymmetric=False, bootstrap_at_done="always")
    assert {k: getattr(args, k) for k in published} == published


def test_arguments_of_a_run_come_from_its_checkpoint(fake):
    sq.train(arguments(name="run", total_timesteps=60, gamma=0.8))
    args = sq.parse_args(["--resume", "runs/run", "--total-timesteps", "90", "--device", "cpu"])
    assert (args.gamma, args.total_timesteps, args.name, args.num_atoms) == (0.8, 90, "run", 11)
    args = sq.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt", "--device", "cpu"])
    assert (args.evaluate, args.env_id, args.name, args.gamma) == (True, "Fake", "", 0.8)


@pytest.mark.parametrize("options, words", [
    (["--env-id", "SO101JuggleCube-v1"], "SO101JuggleCube-v1"),
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--checkpoint", str(SCRIPT)], "cannot be read as a checkpoint"),
    (["--evaluate"], "--evaluate needs --checkpoint"),
    (["--num-updates", "10"], "multiple of --policy-frequency"),
    (["--cudagraphs"], "--cudagraphs needs --device cuda"),
    (["--image-size", "32", "--render-size", "16"], "--render-size must not be below"),
    (["--v-min", "3", "--v-max", "2"], "--v-min must be below --v-max"),
])  # fmt: skip
def test_bad_input_is_one_line(options, words, tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", *options], cwd=tmp_path, text=True,
                            capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert words in line
