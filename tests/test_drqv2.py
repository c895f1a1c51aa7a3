"""DrQ-v2: storage against a diary of episodes, losses against references, runs end to end on a tiny environment."""

import copy
import csv
import itertools
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import drqv2 as dq
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_env import FakeEnv

SCRIPT = Path(dq.__file__)
CPU = torch.device("cpu")
SHAPES = dict(channels=3, state=3, action=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> dq.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(env_id="Fake", device="cpu", amp=False, compile=False, cudagraphs=False, num_envs=4, image_size=16,
                  batch_size=16, buffer_size=400, learning_starts=40, random_steps=40, total_timesteps=120,
                  eval_freq=60, log_freq=20, eval_episodes=8, eval_envs=4, hidden=16, encoder_channels=4,
                  encoder_strides=(2, 2), feature_dim=8, pad=2, frame_stack=2, update_every=4, std_steps=100, lr=1e-3,
                  actor_lr=5e-4, capture_video=False)
    return dq.Args(**values | changes)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_fakes(args, device):
    env = None if args.evaluate else FakeEnv(args.num_envs, seed=args.seed, size=args.image_size, stagger=False)
    return env, FakeEnv(args.eval_envs, seed=1, size=args.image_size, stagger=False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(dq, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Replay -----------------------------------------------------------------------------------------------------------
def numbered(numbers) -> dict:
    """Observations (N, ...) whose pixels and state are a number each."""
    level = torch.tensor(numbers)
    return {"rgb": level.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 2, 2, 3), "state": level.float()[:, None]}


def play(script: list[list[tuple]], slots: int, stack=1, n_step=1, gamma=0.5) -> tuple[dq.Replay, list[list[dict]]]:
    """Store scripted worlds: for each a list of (reward, discount, ends) -> replay, its diary of episodes by world.

    World w numbers its observations from 1000 w on: in state and action, and modulo 256 as the picture.
    """
    fresh = [itertools.count(1000 * w) for w in range(len(script))]
    diary = [[dict(obs=[next(count)], rewards=[], discounts=[])] for count in fresh]
    replay = dq.Replay(numbered([d[0]["obs"][0] for d in diary]), 1, slots, stack, n_step, gamma, CPU)
    for steps in zip(*script, strict=True):
        acted = [float(d[-1]["obs"][-1]) for d in diary]
        finals, nexts = [], []
        for (reward, discount, ends), world, count in zip(steps, diary, fresh, strict=True):
            world[-1]["rewards"].append(reward)
            world[-1]["discounts"].append(discount)
            world[-1]["obs"].append(next(count))
            finals.append(world[-1]["obs"][-1])
            if ends:
                world.append(dict(obs=[next(count)], rewards=[], discounts=[]))
            nexts.append(world[-1]["obs"][-1])
        rewards, discounts, ends = (torch.tensor(v) for v in zip(*steps, strict=True))
        replay.add(torch.tensor(acted)[:, None], rewards, discounts, ends, numbered(finals), numbered(nexts))
    return replay, diary


def transition(batch: dict, i: int) -> tuple:
    """(state, action, stack, rewards, discount, next stack, next state) of row i."""
    stacks = [batch[k]["rgb"][i, 0, 1, ::3].tolist() for k in ("obs", "next_obs")]
    states = [int(batch[k]["state"][i, 0]) for k in ("obs", "next_obs")]
    return (states[0], int(batch["actions"][i, 0]), tuple(stacks[0]), float(batch["rewards"][i]),
            float(batch["discounts"][i]), tuple(stacks[1]), states[1])


def from_diary(diary, stack, n_step, gamma=0.5) -> dict[int, tuple]:
    """What every transition should be, worked out from the episodes: number of its observation -> transition"""
    expected = {}
    for episode in (episode for world in diary for episode in world):
        for i, number in enumerate(episode["obs"][:-1]):
            rewards, discount, j = 0.0, 1.0, i
            while j < min(i + n_step, len(episode["rewards"])):
                rewards += discount * episode["rewards"][j]
                discount *= gamma * episode["discounts"][j]
                j += 1
            stacks = [tuple(episode["obs"][max(0, at - back)] % 256 for back in reversed(range(stack)))
                      for at in (i, j)]
            expected[number] = (number, number, stacks[0], rewards, discount, stacks[1], episode["obs"][j])
    return expected


def test_n_step_targets_by_hand():
    """One world, gamma 1/2, n 3: four steps that terminate, then three that are cut off, then three more."""
    script = [(1.0, 1.0, False), (2.0, 1.0, False), (4.0, 0.5, False), (8.0, 0.0, True),
              (16.0, 1.0, False), (32.0, 1.0, False), (64.0, 1.0, True),
              (1.0, 1.0, False), (1.0, 1.0, False), (1.0, 1.0, False)]  # fmt: skip
    replay, _ = play([script], slots=40, stack=3, n_step=3)
    batch = replay.sample(4000, generator())
    seen = {transition(batch, i) for i in range(4000)}
    assert seen == {
        # number, action, stack, rewards, discount, next stack, next number. Observations 0 to 4, then 5 to 8, then 9 on
        (0, 0, (0, 0, 0), 1 + 2 / 2 + 4 / 4, 1 / 16, (1, 2, 3), 3),  # the third discount, 1/2, halves 1/8
        (1, 1, (0, 0, 1), 2 + 4 / 2 + 8 / 8, 0.0, (2, 3, 4), 4),  # 8 comes after it too; then the end
        (2, 2, (0, 1, 2), 4 + 8 / 4, 0.0, (2, 3, 4), 4),  # two steps, terminated
        (3, 3, (1, 2, 3), 8, 0.0, (2, 3, 4), 4),
        (5, 5, (5, 5, 5), 16 + 32 / 2 + 64 / 4, 1 / 8, (6, 7, 8), 8),  # cut off: the final observation counts
        (6, 6, (5, 5, 6), 32 + 64 / 2, 1 / 4, (6, 7, 8), 8),
        (7, 7, (5, 6, 7), 64, 1 / 2, (6, 7, 8), 8),
        (9, 9, (9, 9, 9), 1 + 1 / 2 + 1 / 4, 1 / 8, (10, 11, 12), 12),  # its two successors are not complete yet
    }


@pytest.mark.parametrize("n_step, stack", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 2)])
@pytest.mark.parametrize("steps, slots", [(9, 40), (33, 40), (45, 24), (70, 16), (200, 19)])
@pytest.mark.parametrize("longest", [3, 30])
def test_every_sample_is_in_the_diary(steps, slots, n_step, stack, longest):
    """Two worlds, episodes of random lengths, a ring that wraps up to a dozen times; nothing is torn or mixed."""
    draw, script = random.Random(steps + slots), []
    for _ in range(2):
        ends = [draw.randrange(longest) == 0 for _ in range(steps)]
        script.append([(float(draw.randrange(9)), draw.choice([0.0, 1.0] if end else [1.0, 0.5]), end) for end in ends])
    script[0][0] = (1.0, 1.0, True)  # an episode of one step
    replay, diary = play(script, slots, stack, n_step)
    expected, batch = from_diary(diary, stack, n_step), replay.sample(1500, generator(1))
    samples = [transition(batch, i) for i in range(1500)]
    assert all(sample == expected[sample[0]] for sample in samples)
    for w, world in enumerate(diary):
        stream = [number for episode in world for number in episode["obs"]]  # one slot each; the last one is `head`
        oldest, newest = max(0, len(stream) - slots + stack), len(stream) - 1 - n_step
        complete = {number for number in stream[oldest : newest + 1] if number in expected}
        seen = {sample[0] for sample in samples if sample[0] // 1000 == w}
        assert complete <= seen <= complete | set(stream[oldest - 1 : oldest])  # the step back from a final observation


def test_sampling_is_uniform_and_reaches_all_that_is_stored():
    ends = [(0.0, 1.0, t % 25 == 24) for t in range(130)]
    for slots in (200, 60):  # not yet full, and wrapped
        replay, diary = play([ends, ends], slots, stack=2, n_step=3)
        counts = replay.sample(40_000, generator())["actions"][:, 0].int().unique(return_counts=True)[1].double()
        finals = sum(len(episode["obs"]) > 1 for episode in diary[0]) - 1
        stored = {200: 130 - 2, 60: 60 - 3 - 2 - 2}[slots]
        assert abs(len(counts) / 2 - stored) <= 1 and finals
        expected = 40_000 / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 4 * math.sqrt(2 * len(counts))


def test_present_observation_is_stacked_within_its_episode():
    script = [(0.0, 1.0, False)] * 2 + [(0.0, 1.0, True)] + [(0.0, 1.0, False)]
    replay, _ = play([script], 40, stack=3)
    assert replay.present()["rgb"][0, 0, 0].tolist() == [4, 4, 4, 4, 4, 4, 5, 5, 5]
    assert replay.present()["state"].tolist() == [[5.0]]
    replay, _ = play([script[:3]], 40, stack=3)
    assert replay.present()["rgb"][0, 0, 0, ::3].tolist() == [4, 4, 4]
    replay, _ = play([script[:2]], 40, stack=3)
    assert replay.present()["rgb"][0, 0, 0, ::3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("steps", [5, 60])
def test_replay_is_saved_and_loaded_exactly(steps):
    script = [[(float(t), 1.0, t % 7 == 6) for t in range(steps)], [(float(t), 1.0, t % 5 == 4) for t in range(steps)]]
    replay, _ = play(script, 30, stack=2, n_step=2)
    other, _ = play([world[:1] for world in script], 30, stack=2, n_step=2)
    state = replay.state_dict()
    assert len(state["rgb"]) == min(30, steps + steps // 5 + 1), "unused slots are not saved"
    other.load_state_dict(state)
    torch.testing.assert_close(other.sample(50, generator()), replay.sample(50, generator()), atol=0, rtol=0)
    torch.testing.assert_close(other.present(), replay.present(), atol=0, rtol=0)


def test_each_frame_is_stored_once():
    replay = dq.Replay(FakeEnv(2, size=84).obs, 2, 100, 3, 3, 0.99, CPU)
    assert replay.data["rgb"].shape == (100, 2, 84, 84, 3) and replay.data["rgb"].dtype == torch.uint8
    others = sum(v[0, 0].numel() * v.element_size() for k, v in replay.data.items() if k != "rgb")
    assert others < 64, "bytes a slot beside 21,168 of the frame; stacks of three would take 63,504"


def test_a_buffer_larger_than_the_memory_is_refused_at_once():
    with pytest.raises(ValueError, match=r"^the replay buffer needs \d+\.\d GiB, cpu has \d+\.\d: lower --buffer-size"):
        dq.Replay(FakeEnv(1).obs, 2, 10**12, 3, 3, 0.99, CPU)


# --- Random shift -----------------------------------------------------------------------------------------------------
def test_shift_is_a_crop_of_the_picture_with_repeated_edges():
    rgb = torch.randint(0, 256, (5, 12, 12, 9), dtype=torch.uint8, generator=generator())
    offsets = torch.randint(0, 9, (10, 2), generator=generator(1))
    shifted = dq.random_shift(rgb, offsets, 4)
    assert shifted.shape == (10, 12, 12, 9) and shifted.dtype == torch.uint8
    for i, (dy, dx) in enumerate(offsets.tolist()):  # two copies of five pictures; all channels move together
        padded = np.pad(rgb[i % 5].numpy(), ((4, 4), (4, 4), (0, 0)), mode="edge")
        assert np.array_equal(shifted[i].numpy(), padded[dy : dy + 12, dx : dx + 12])
    assert torch.equal(dq.random_shift(rgb, torch.full((5, 2), 4), 4), rgb)
    assert torch.equal(dq.random_shift(rgb, torch.zeros(5, 2, dtype=torch.int64), 0), rgb)


def test_shift_equals_the_published_interpolation():
    """The paper's way: pad, then sample bilinearly on a grid that is moved by whole pixels."""
    size, pad = 84, 4
    rgb = torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8, generator=generator())
    offsets = torch.randint(0, 2 * pad + 1, (16, 2), generator=generator(1))
    padded = F.pad(rgb.permute(0, 3, 1, 2).float(), (pad,) * 4, "replicate")
    wide = size + 2 * pad
    centres = torch.linspace(-1 + 1 / wide, 1 - 1 / wide, wide)[:size]
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1) + offsets.flip(-1)[:, None, None] * 2 / wide
    published = F.grid_sample(padded, grid, padding_mode="zeros", align_corners=False)
    difference = (dq.random_shift(rgb, offsets, pad).permute(0, 3, 1, 2).float() - published).abs()
    assert difference.max() < 0.004 and difference.mean() < 2e-4


def test_shifts_are_uniform_within_their_bounds_and_independent():
    noise = dq.draw_noise(arguments(pad=4), 20_000, 2, generator())
    counts = torch.zeros(9, 9, dtype=torch.float64)
    for dy, dx in noise["shift"].tolist():
        counts[dy, dx] += 1  # an offset out of bounds would raise
    expected = 20_000 / 81
    assert ((counts - expected) ** 2 / expected).sum() < 117  # chi square, 80 dof, p = 0.004
    assert not torch.equal(noise["shift"], noise["next_shift"])
    noise = dq.draw_noise(arguments(target_augs=3, online_augs=2), 10, 2, generator())
    assert [noise[k].shape for k in noise] == [(20, 2), (30, 2), (30, 2), (10, 2)]


# --- Networks ---------------------------------------------------------------------------------------------------------
def test_parameter_counts_and_initial_weights_are_the_published_ones():
    agent = dq.Agent(dq.Args(device="cpu", cudagraphs=False), dict(channels=3, state=0, action=6), CPU)
    count = {k: sum(p.numel() for p in module.parameters()) for k, module in (
        ("encoder", agent.encoder), ("trunk", agent.critic.trunk), ("actor", agent.actor), ("critic", agent.critic))}
    trunk = 39_200 * 50 + 50 + 2 * 50
    head = [57_344 + 1024, 1_048_576 + 1024, 1024 + 1]
    assert count == {"encoder": 30_368, "trunk": trunk, "critic": trunk + 2 * sum(head),
                     "actor": trunk + 51 * 1024 + 1025 * 1024 + 1025 * 6}
    assert not any(p.requires_grad for p in agent.target.parameters())
    for module in agent.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            weight = module.weight.detach().flatten(1)
            rows, columns = weight.shape
            square = weight @ weight.T if rows <= columns else weight.T @ weight
            gain = 2.0 if isinstance(module, torch.nn.Conv2d) else 1.0
            torch.testing.assert_close(square, gain * torch.eye(len(square)), atol=1e-4, rtol=0)
            assert not module.bias.any()


def test_encoder_sees_every_frame_and_takes_pictures_as_they_are_stored():
    args = arguments(image_size=21, encoder_strides=(2, 1), frame_stack=3)
    encoder = dq.Encoder(9, args)
    rgb = torch.randint(0, 256, (2, 21, 21, 9), dtype=torch.uint8, generator=generator())
    reference = encoder.convs((rgb.float() / 255 - 0.5).permute(0, 3, 1, 2).contiguous())
    features = encoder(rgb)
    assert features.shape == (2, args.map_size**2 * 4)
    torch.testing.assert_close(features.view(2, args.map_size, args.map_size, 4).permute(0, 3, 1, 2), reference)


# --- Noise ------------------------------------------------------------------------------------------------------------
def test_noise_falls_linearly_and_stays():
    args = arguments(std_start=1.0, std_end=0.1, std_steps=100)
    assert [round(dq.noise_std(args, t), 6) for t in (0, 10, 50, 99, 100, 5000)] == [1, 0.91, 0.55, 0.109, 0.1, 0.1]


def test_noise_is_clipped_only_where_the_paper_says():
    noise = torch.tensor([[-9.0, -0.1, 0.0, 0.1, 9.0]])
    for std in (0.5, torch.tensor(0.5)):
        actions = dq.noisy_actions(torch.zeros(1, 5), std, noise, 0.3)
        torch.testing.assert_close(actions, torch.tensor([[-0.3, -0.05, 0.0, 0.05, 0.3]]))
        actions = dq.noisy_actions(torch.zeros(1, 5), std, noise)  # while acting: by the bounds of the action alone
        torch.testing.assert_close(actions, torch.tensor([[-1.0, -0.05, 0.0, 0.05, 1.0]]), atol=2e-6, rtol=0)


def test_a_clamped_action_keeps_its_gradient():
    mean = torch.tensor([[-1.0, 0.2, 0.99]], requires_grad=True)
    actions = dq.noisy_actions(mean, 1.0, torch.tensor([[-0.2, 0.0, 0.2]]), 0.3)
    assert actions.abs().max() < 1
    actions.sum().backward()
    assert mean.grad.tolist() == [[1.0, 1.0, 1.0]]


# --- Updates ----------------------------------------------------------------------------------------------------------
def learning_parts(device=CPU, **changes):
    """An agent, and a buffer with 30 steps of four fake worlds."""
    args = arguments(device=str(device), **changes)
    env = FakeEnv(args.num_envs, size=args.image_size)
    torch.manual_seed(3)
    agent = dq.Agent(args, SHAPES, device)
    replay = dq.Replay(env.obs, 2, args.buffer_size // 4, args.frame_stack, args.n_step, args.gamma,
                       args.buffer_device or device)
    for _ in range(30):
        actions = torch.rand((args.num_envs, 2), generator=env.generator) * 2 - 1
        obs, rewards, terminations, truncations, info = env.step(actions)
        replay.add(actions, rewards, 1.0 - terminations.float(), terminations | truncations, info["final_obs"], obs)
    return agent, replay, args


def differences(before: dict, after: dict) -> set[str]:
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


def has_gradient(agent) -> set[str]:
    return {k.split(".")[0] for k, p in agent.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_reach_exactly_the_right_parameters():
    agent, replay, args = learning_parts()
    batch, noise, std = replay.sample(16, generator()), dq.draw_noise(args, 16, 2, generator()), torch.tensor(0.5)
    loss, features, metrics = dq.critic_loss(agent, batch, noise, std, args)
    loss.backward()
    assert has_gradient(agent) == {"encoder", "critic"}
    assert all(p.grad.any() for part in (agent.encoder, agent.critic) for p in part.parameters())
    assert not features.requires_grad and not any(v.requires_grad for v in metrics.values())
    agent.zero_grad()
    agent.critic.requires_grad_(False)
    dq.actor_loss(agent, batch, features, noise, std, args)[0].backward()
    assert has_gradient(agent) == {"actor"}
    assert all(p.grad.any() for p in agent.actor.parameters())


def test_an_update_changes_each_part_once():
    agent, replay, args = learning_parts(tau=0.25)
    before = copy.deepcopy(agent.state_dict())
    batch, noise = replay.sample(16, generator()), dq.draw_noise(args, 16, 2, generator())
    metrics = dq.update(agent, batch, noise, torch.tensor(0.5), args)
    after = agent.state_dict()
    assert differences(before, after) == {"encoder", "critic", "target", "actor"}
    assert all(p.requires_grad for p in agent.critic.parameters()), "frozen for the actor's step alone"
    for k, v in agent.target.state_dict().items():  # at every update, towards the new critic
        torch.testing.assert_close(v, before[f"target.{k}"].lerp(after[f"critic.{k}"], 0.25))
    assert {"loss/qf", "loss/actor", "train/q", "train/target"} <= set(metrics)


@pytest.mark.parametrize("k, m", [(1, 1), (2, 2), (3, 1)])
def test_update_equals_its_formulas_written_out(k, m):
    """Separate passes, separate optimisers, no clever order: the same weights afterwards."""
    agent, replay, args = learning_parts(target_augs=k, online_augs=m)
    other = copy.deepcopy(agent)
    batch, noise = replay.sample(16, generator()), dq.draw_noise(args, 16, 2, generator())
    std = 0.37
    dq.update(agent, batch, noise, torch.tensor(std), args)

    def shifted(rgb, offsets):
        return torch.stack([F.pad(picture.permute(2, 0, 1).float()[None], (2,) * 4, "replicate")[0, :, y : y + 16,
                            x : x + 16] for picture, (y, x) in zip(rgb, offsets.tolist(), strict=True)]) / 255 - 0.5

    def encode(x):
        return other.encoder.convs(x).permute(0, 2, 3, 1).reshape(len(x), -1)

    def heads(critic, h, s, a):
        x = torch.cat([critic.trunk.layers(h), s, a], -1)
        return critic.q1(x)[:, 0], critic.q2(x)[:, 0]

    with torch.no_grad():
        values = []
        for i in range(k):
            rows = slice(16 * i, 16 * i + 16)
            h, s = encode(shifted(batch["next_obs"]["rgb"], noise["next_shift"][rows])), batch["next_obs"]["state"]
            a = other.actor(h, s) + (std * noise["next_action"][rows]).clamp(-0.3, 0.3)
            values.append(torch.minimum(*heads(other.target, h, s, a.clamp(-1, 1))))
        y = batch["rewards"] + batch["discounts"] * sum(values) / k
    adam = {part: torch.optim.Adam(getattr(other, part).parameters(), rate)
            for part, rate in (("encoder", args.lr), ("critic", args.lr), ("actor", args.actor_lr))}
    loss, state, first = 0.0, batch["obs"]["state"], None
    for i in range(m):
        h = encode(shifted(batch["obs"]["rgb"], noise["shift"][16 * i : 16 * i + 16]))
        first = h.detach() if first is None else first
        q1, q2 = heads(other.critic, h, state, batch["actions"])
        loss = loss + F.mse_loss(q1, y) + F.mse_loss(q2, y)
    loss.backward()
    adam["encoder"].step()
    adam["critic"].step()
    # the actor: the new critic, the features from before the encoder's step
    a = other.actor(first, state) + (std * noise["action"]).clamp(-0.3, 0.3)
    other.actor.zero_grad()
    (-torch.minimum(*heads(other.critic, first, state, a)).mean()).backward()
    adam["actor"].step()
    for target, source in zip(other.target.parameters(), other.critic.parameters(), strict=True):
        target.data = (1 - args.tau) * target.data + args.tau * source.data
    for name, value in agent.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=2e-5, rtol=1e-4, msg=name)


def test_a_termination_cuts_the_value_and_a_time_limit_does_not():
    agent, replay, args = learning_parts()
    batch, noise = replay.sample(16, generator()), dq.draw_noise(args, 16, 2, generator())
    target = dq.critic_loss(agent, batch, noise, torch.tensor(0.5), args)[2]["train/target"]
    batch["discounts"] = torch.zeros(16)
    ended = dq.critic_loss(agent, batch, noise, torch.tensor(0.5), args)[2]["train/target"]
    torch.testing.assert_close(ended, batch["rewards"].mean())
    assert ended != target


def test_updates_are_owed_by_transitions():
    agent, replay, args = learning_parts(update_every=3)
    learner, calls = dq.Learner(agent, replay, args, generator(), generator(1)), []
    learner.step = lambda: calls.append(len(calls))
    for expected in (1, 2, 4, 5, 6, 8):
        learner.run(4, 0.5)
        assert len(calls) == expected


def compare_with_plain(device, buffer_device="", **fast):
    """Five updates by the plain and by the fast route from the same start. -> weights of each"""
    weights = []
    for options in ({}, fast):
        agent, replay, args = learning_parts(device, buffer_device=buffer_device, **options)
        learner = dq.Learner(agent, replay, args, torch.Generator(device).manual_seed(1),
                             torch.Generator(replay.device).manual_seed(2))
        for _ in range(5):
            learner.run(args.update_every, 0.5)
        assert learner.read()["loss/qf"] > 0 and not learner.read()
        weights.append({k: v.clone() for k, v in agent.state_dict().items()})
    return weights


@pytest.mark.parametrize("backend", [
    "aot_eager",  # the traced graphs, run without code generation
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler: g++")]),
])  # fmt: skip
def test_compiled_route_equals_the_plain_one(monkeypatch, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    plain, fast = compare_with_plain(CPU, compile=True)
    for k, v in plain.items():
        torch.testing.assert_close(fast[k], v, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("buffer_device", ["", "cpu"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_equals_the_plain_route(compiled, buffer_device):
    plain, fast = compare_with_plain(torch.device("cuda"), cudagraphs=True, compile=compiled,
                                     buffer_device=buffer_device)
    for k, v in plain.items():
        torch.testing.assert_close(fast[k], v, atol=1e-4, rtol=1e-3)


def test_batches_from_a_buffer_on_another_device_arrive_in_place(monkeypatch):
    """Played on one machine: the same batches as without the hand-over, in tensors that stay where they are."""
    agent, replay, args = learning_parts()
    direct = dq.Learner(agent, replay, args, generator(), generator(1))
    staged = dq.Learner(agent, replay, args, generator(), generator(1))
    staged.remote = True
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    batches = [(direct.sample(), copy.deepcopy(staged.sample())) for _ in range(3)]
    for expected, found in batches:
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert staged.sample() is staged.inbox


# --- Runs -------------------------------------------------------------------------------------------------------------
def table(path) -> list[dict]:
    return list(csv.DictReader(Path(path).open()))


def test_a_short_run_from_end_to_end(fake):
    args = arguments(capture_video=True, name="run")
    result = dq.train(args)
    run = fake / "runs/run"
    assert {f.name for f in run.iterdir()} >= {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt"}
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    rows = table(run / "eval.csv")
    assert list(rows[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    row = {k: float(v) for k, v in rows[-1].items()}
    half = 1.96 * row["eval/return_std"] / math.sqrt(8)
    assert row["eval/ci_high"] - row["eval/return"] == pytest.approx(half)
    assert row["eval/return"] - row["eval/ci_low"] == pytest.approx(half) and half > 0
    metrics = table(run / "metrics.csv")
    assert all(math.isfinite(float(v)) for row in metrics for v in row.values())
    assert [int(row["time/frames"]) for row in metrics] == [int(row["global_step"]) for row in metrics]
    torch.manual_seed(args.seed)
    start = dq.Agent(args, SHAPES, CPU).state_dict()
    assert differences(start, dq.load_file(run / "checkpoint.pt")["agent"]) == {"encoder", "actor", "critic", "target"}
    assert not list(run.glob("*.tmp"))


def test_true_ends_and_discounts_reach_the_buffer(fake, monkeypatch):
    """A task that says discount 1 at a termination, and 0.5 elsewhere; FakeEnv itself knows only time limits."""
    class Ending(FakeEnv):
        action_repeat, has_success = 4, False

        def step(self, actions):
            obs, rewards, _, ends, info = super().step(actions)
            info["discount"] = torch.where(ends, 1.0, 0.5)
            return obs, rewards, ends, torch.zeros_like(ends), info

    kept = []
    add = dq.Replay.add
    monkeypatch.setattr(dq.Replay, "add", lambda self, *given: (kept.append(given), add(self, *given))[1])
    monkeypatch.setattr(dq, "make_envs", lambda args, device: (Ending(4, stagger=False), Ending(4, stagger=False)))
    result = dq.train(arguments(name="run"))
    for _, _, discounts, dones, _, _ in kept:
        assert torch.equal(discounts, torch.where(dones, 0.0, 0.5))
    assert any(dones.any() for _, _, _, dones, _, _ in kept)
    assert "eval/success_rate" not in result and "eval/return" in result
    assert table("runs/run/metrics.csv")[-1]["time/frames"] == "480"


def test_the_buffer_gets_what_the_environment_gave(fake, monkeypatch):
    """The observation before an automatic reset as the one after the step, and the one after it to go on from."""
    given, kept = [], []
    step, add = FakeEnv.step, dq.Replay.add
    monkeypatch.setattr(FakeEnv, "step", lambda self, a: (given.append((a, step(self, a))), given[-1][1])[1])
    monkeypatch.setattr(dq.Replay, "add", lambda self, *values: (kept.append(values), add(self, *values))[1])
    dq.train(arguments(name="run", total_timesteps=60))
    given = given[:len(kept)]  # then comes the evaluation
    for (acted, (obs, rewards, _, ends, info)), values in zip(given, kept, strict=True):
        actions, stored, _, dones, final_obs, next_obs = values
        assert torch.equal(actions, acted) and torch.equal(stored, rewards) and torch.equal(dones, ends)
        assert final_obs is info["final_obs"] and next_obs is obs
    assert any(not torch.equal(values[4]["rgb"], values[5]["rgb"]) for values in kept), "an episode ended"


def test_noise_follows_its_schedule_in_acting_and_learning(fake, monkeypatch):
    """Unclipped and by the step while acting, clipped and of the same size in the updates after that step."""
    calls, noisy = [], dq.noisy_actions
    monkeypatch.setattr(dq, "noisy_actions", lambda mean, std, noise, clip=None: (
        calls.append((float(std), clip)), noisy(mean, std, noise, clip))[1])
    args = arguments(name="run", std_steps=80, std_clip=0.2)
    dq.train(args)
    acting = [std for std, clip in calls if clip is None]
    assert acting == [dq.noise_std(args, t) for t in range(40, 120, 4)] and acting[0] == 0.55
    assert acting[-1] == pytest.approx(0.1)
    learning = [(round(dq.noise_std(args, t), 6), 0.2) for t in range(36, 120, 4)]  # of target and actor in each update
    assert [(round(std, 6), clip) for std, clip in calls if clip] == [call for call in learning for _ in range(2)]
    assert [float(row["train/std"]) for row in table("runs/run/metrics.csv")] == [
        dq.noise_std(args, t - 4) for t in range(40, 121, 20)]


def test_the_first_actions_are_uniform_and_the_next_ones_noisy(fake, monkeypatch):
    seen = []
    step = FakeEnv.step
    monkeypatch.setattr(FakeEnv, "step", lambda self, a: (seen.append(a.clone()), step(self, a))[1])
    dq.train(arguments(name="run", total_timesteps=200, random_steps=160, learning_starts=1_000, buffer_size=2_000,
                       eval_freq=1_000, std_start=0.05, std_end=0.05))
    first, then = torch.stack(seen[:40]), torch.stack(seen[40:50])
    assert first.std() == pytest.approx(1 / math.sqrt(3), abs=0.06) and first.abs().max() <= 1
    assert 0.02 < (then - then.mean((0, 1))).std() < 0.25, "close around the untrained mean"


def test_two_equal_runs_are_equal(fake):
    for name in "ab":
        dq.train(arguments(name=name))
    a, b = (dq.load_file(f"runs/{name}/checkpoint.pt")["agent"] for name in "ab")
    assert not differences(a, b)


@pytest.mark.parametrize("changes", [
    dict(n_step=3, frame_stack=3), dict(n_step=1, target_augs=2, online_augs=2, update_every=3),
    dict(num_envs=1, update_every=2, overlap=True),
], ids=lambda changes: "-".join(changes))  # fmt: skip
def test_resume_continues_exactly(fake, changes):
    """2N steps equal N steps and then N more, bit for bit, with --save-buffer on the CPU; the buffer wraps."""
    args = arguments(name="whole", save_buffer=True, total_timesteps=160, eval_freq=80, buffer_size=120, **changes)
    dq.train(args)
    half = replace(args, name="half")
    dq.train(replace(half, total_timesteps=80))
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was interrupted
        path.write_text(path.read_text() + "999999" + "," * path.read_text().partition("\n")[0].count(",") + "\n")
    dq.train(replace(half, resume="runs/half"))
    whole, resumed = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "half"))
    assert not differences(whole["agent"], resumed["agent"])
    for key in ("random", "replay", "obs", *dq.OPTIMIZERS):
        torch.testing.assert_close(whole[key], resumed[key], atol=0, rtol=0)
    assert resumed["now"]["global_step"] == 160 and whole["now"]["owed"] == resumed["now"]["owed"]
    rows = [table(f"runs/{name}/eval.csv") for name in ("whole", "half")]
    assert [[row[k] for k in row if "time" not in k] for row in rows[0]] == [
        [row[k] for k in row if "time" not in k] for row in rows[1]]


def test_resume_without_buffer_says_so(fake, capsys):
    dq.train(arguments(name="run", total_timesteps=80))
    dq.train(replace(arguments(name="run"), resume="runs/run", total_timesteps=160))
    assert "no replay buffer was saved" in capsys.readouterr().out
    assert [row["global_step"] for row in table("runs/run/eval.csv")] == ["60", "80", "120", "160"]


def test_checkpoint_starts_from_weights_alone(fake):
    dq.train(arguments(name="first", total_timesteps=80))
    result = dq.train(arguments(name="second", checkpoint="runs/first/checkpoint.pt", total_timesteps=60))
    assert result["global_step"] == 60
    first, second = (dq.load_file(f"runs/{name}/checkpoint.pt") for name in ("first", "second"))
    steps = [c["critic_optimizer"]["state"][0]["step"] for c in (first, second)]
    assert steps[1] < steps[0]


def test_evaluation_repeats_and_leaves_training_alone(fake):
    dq.train(arguments(name="often", eval_freq=20))
    dq.train(arguments(name="seldom"))
    often, seldom = (dq.load_file(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    results = [dq.train(arguments(evaluate=True, checkpoint="runs/often/checkpoint.pt", name=name)) for name in "ab"]
    assert results[0]["eval/return"] == results[1]["eval/return"]
    assert float(table("runs/often/eval.csv")[-1]["eval/return"]) == results[0]["eval/return"]


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_policy_from_the_file_acts_on_what_the_buffer_would_show(fake, frame_stack):
    args = arguments(name="run", frame_stack=frame_stack)
    dq.train(args)
    before = torch.get_rng_state()
    policy = dq.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = dq.Agent(args, SHAPES, CPU)
    agent.load_state_dict(dq.load_file("runs/run/best.pt")["agent"])
    env = FakeEnv(5, stagger=False)
    replay = dq.Replay(env.obs, 2, 40, frame_stack, 1, 0.9, CPU)
    for _ in range(4):
        present = replay.present()
        actions = policy.act(env.obs)
        torch.testing.assert_close(actions, agent.actor(agent.encoder(present["rgb"]), present["state"]))
        obs, rewards, terminations, truncations, info = env.step(actions)
        replay.add(actions.detach(), rewards, rewards, truncations, info["final_obs"], obs)
    policy.reset()
    assert policy.act({k: v.numpy() for k, v in env.obs.items()}).shape == (5, 2)
    assert policy.spec == env.spec


def test_preprocess_crops_the_middle(fake):
    dq.train(arguments(name="run", total_timesteps=60))
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[:, :80] = frame[:, 560:] = 255  # outside the middle square
    frame[:240, 80:320] = (10, 20, 30)
    seen = dq.Policy("runs/run/best.pt").preprocess(frame)
    assert seen.shape == (1, 16, 16, 3) and seen.dtype == torch.uint8 and seen.max() == 30
    assert seen[0, :8, :8].reshape(-1, 3).unique(dim=0).tolist() == [[10, 20, 30]] and seen[0, 8:].max() == 0


def test_stops_at_nan_and_names_the_tensor(fake):
    dq.train(arguments(name="run", total_timesteps=60))
    checkpoint = dq.load_file("runs/run/checkpoint.pt")
    checkpoint["agent"]["actor.policy.4.weight"][0, 0] = math.nan
    dq.save(Path("broken.pt"), checkpoint)
    with pytest.raises(FloatingPointError, match=r"^\S+ is not finite at step \d+; last good checkpoint: none yet$"):
        dq.train(arguments(name="other", checkpoint="broken.pt"))
    agent = dq.Agent(arguments(), SHAPES, CPU)
    agent.critic.q1[2].bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="critic.q1.2.bias is not finite at step 5; last .*checkpoint.pt"):
        dq.check_finite(agent, {}, 5, Path("runs/run/checkpoint.pt"))


@pytest.mark.parametrize("changes, field", [
    (dict(hidden=32), "hidden"), (dict(env_id="Other"), "env_id"), (dict(frame_stack=1), "frame_stack"),
    (dict(encoder_strides=(2, 1)), "encoder_strides"), (dict(feature_dim=9), "feature_dim"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(fake, changes, field):
    dq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}: it has .*, this run"):
        dq.train(arguments(name="other", checkpoint="runs/run/best.pt", **changes))


@pytest.mark.parametrize("changes, field", [
    (dict(buffer_size=800), "buffer_size: it has 400, this run 800"), (dict(num_envs=2), "num_envs: it has 4"),
    (dict(device="cuda", cudagraphs=False), "device: it has cpu, this run cuda"),
])  # fmt: skip
def test_a_run_cannot_be_continued_with_another_buffer_or_other_environments(fake, changes, field):
    """And its folder stays as it was."""
    args = arguments(name="run", save_buffer=True, total_timesteps=60)
    dq.train(args)
    before = {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}
    checkpoint = dq.load_file("runs/run/checkpoint.pt")
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}"):
        dq.check_fits(checkpoint, replace(args, resume="runs/run", **changes), SHAPES)
    if "device" not in changes:
        with pytest.raises(ValueError, match="the checkpoint differs in"):
            dq.train(replace(args, resume="runs/run", total_timesteps=80, **changes))
    assert before == {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}
    dq.check_fits(checkpoint | {"replay": None}, replace(args, resume="runs/run", buffer_size=800), SHAPES)


def test_a_run_that_is_refused_leaves_no_folder(fake):
    with pytest.raises(ValueError, match="the replay buffer needs"):
        dq.train(arguments(name="run", buffer_size=10**12))
    assert not Path("runs/run").exists()


def test_a_checkpoint_names_the_renderer_that_auto_led_to(fake, monkeypatch):
    """So that another machine draws the same way or says that it cannot."""
    monkeypatch.setattr(FakeEnv, "__init__", lambda self, *args, make=FakeEnv.__init__, **options: (
        make(self, *args, **options), setattr(self, "spec", self.spec | {"renderer": "warp"}))[0])
    dq.train(arguments(name="run", total_timesteps=60))
    assert dq.load_file("runs/run/best.pt")["args"]["renderer"] == "warp"
    assert dq.parse_args(["--checkpoint", "runs/run/best.pt", "--device", "cpu"]).renderer == "warp"


def test_existing_runs_are_not_overwritten(fake):
    dq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        dq.train(arguments(name="run"))


def test_dot_reach_runs(monkeypatch, tmp_path):
    """The real environment, with the defaults of a CPU, for ten updates."""
    monkeypatch.chdir(tmp_path)
    argv = ["--env-id", "dot_reach", "--device", "cpu", "--total-timesteps", "160", "--learning-starts", "80",
            "--eval-freq", "160", "--log-freq", "80", "--name", "run", "--no-capture-video"]
    result = dq.train(dq.parse_args(argv))
    assert -40 < result["eval/return"] < -2 and 0 <= result["eval/success_rate"] <= 1


# --- Command line -----------------------------------------------------------------------------------------------------
PUBLISHED = {
    "cartpole_balance": dict(total_timesteps=550_000, std_steps=100_000, n_step=3, batch_size=256, lr=1e-4,
                             actor_lr=1e-4, feature_dim=50, buffer_size=1_000_000),
    "walker_walk": dict(total_timesteps=550_000, std_steps=100_000, n_step=1, batch_size=512),
    "walker_run": dict(total_timesteps=1_550_000, std_steps=500_000, n_step=1, batch_size=512),
    "reach_duplo": dict(total_timesteps=1_550_000, std_steps=500_000, n_step=3, buffer_size=1_000_000),
    "quadruped_run": dict(total_timesteps=1_550_000, std_steps=500_000, n_step=3, buffer_size=100_000),
    "humanoid_walk": dict(total_timesteps=15_050_000, std_steps=2_000_000, lr=8e-5, actor_lr=8e-5,
                          feature_dim=100),
}


@pytest.mark.parametrize("env_id", PUBLISHED)
def test_published_settings_of_a_task_are_its_defaults(env_id):
    """Frames of the paper are halved: an agent's step is two of them."""
    defaults = dq.Args(**dict(env_id=env_id) | dq.tuned_defaults(env_id, "cuda"))
    everywhere = dict(image_size=84, action_repeat=2, frame_stack=3, gamma=0.99, tau=0.01, update_every=2, hidden=1024,
                      learning_starts=2_000, random_steps=2_000, std_start=1.0, std_end=0.1, std_clip=0.3, pad=4,
                      encoder_channels=32, encoder_strides=(2, 1, 1, 1), target_augs=1, online_augs=1, num_envs=1)
    for key, value in (everywhere | PUBLISHED[env_id]).items():
        assert getattr(defaults, key) == value, key


@pytest.mark.parametrize("env_id", ["dot_reach", "walker_walk", "humanoid_run"])
def test_help_shows_each_task_its_defaults(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        dq.parse_args(["--env-id", env_id, "--device", "cpu", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and env_id in text
    tuned = dq.tuned_defaults(env_id, "cpu")
    assert f"(default: {tuned['total_timesteps']})" in text and f"(default: {tuned['std_steps']})" in text
    args = dq.parse_args(["--env-id", env_id, "--device", "cpu"])
    for key, value in tuned.items():
        assert getattr(args, key) == value
    args.check()


def test_arguments_of_a_run_come_from_its_checkpoint(fake):
    dq.train(arguments(name="run", total_timesteps=60, gamma=0.8))
    args = dq.parse_args(["--resume", "runs/run", "--total-timesteps", "90", "--device", "cpu"])
    assert (args.gamma, args.total_timesteps, args.name, args.encoder_strides) == (0.8, 90, "run", (2, 2))
    args = dq.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt", "--device", "cpu"])
    assert (args.evaluate, args.env_id, args.name, args.gamma) == (True, "Fake", "", 0.8)


@pytest.mark.parametrize("changes, words", [
    (dict(evaluate=True), "--evaluate needs --checkpoint"),
    (dict(cudagraphs=True), "--cudagraphs needs --device cuda"),
    (dict(image_size=6), "--image-size is too small"),
    (dict(n_step=0, num_envs=0, eval_envs=0), "--eval-envs, --num-envs, --n-step must be at least 1"),
    (dict(eval_episodes=0, batch_size=0, log_freq=0), "--eval-episodes, --log-freq, --batch-size must be"),
    (dict(encoder_strides=(2, 0)), "--encoder-strides must be at least 1"),
    (dict(device="tpu"), "--device must be cpu or cuda"),
    (dict(pad=-1), "--pad must not be negative"),
    (dict(learning_starts=8), "--learning-starts must be at least"),
    (dict(buffer_size=30), "--buffer-size must be at least"),
    (dict(eval_episodes=7), "multiple of --eval-envs"),
    (dict(resume="a", checkpoint="b"), "give only one"),
])  # fmt: skip
def test_choices_that_cannot_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        arguments(**changes).check()


@pytest.mark.parametrize("options, words", [
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--checkpoint", str(SCRIPT)], "cannot be read as a checkpoint"),
    (["--env-id", "nothing"], "nothing"),
    (["--env-id", "dot_reach", "--buffer-size", "10"], "--buffer-size must be at least"),
    (["--env-id", "dot_reach", "--image-size", "7"], "--image-size is too small for --encoder-strides"),
])  # fmt: skip
def test_bad_input_is_one_line(options, words, fake, monkeypatch):
    monkeypatch.undo()  # the real environments
    monkeypatch.chdir(fake)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        dq.train(dq.parse_args(["--device", "cpu", *options]))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_the_command_line_prints_an_error_without_a_traceback(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", "--evaluate"], cwd=tmp_path, text=True,
                            capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "--evaluate needs --checkpoint" in line
