"""DrQ-v2: storage against a diary of episodes, losses against references, runs from end to end."""

import copy
import csv
import importlib.util
import itertools
import math
import random
import re
import shutil
import signal
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
GOLDEN = Path(__file__).parent / "golden/drqv2.npz"
SHAPES = dict(channels=3, state=3, action=2)
STD = torch.tensor(0.5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> dq.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(
        env_id="Fake",
        device="cpu",
        amp=False,
        compile=False,
        cudagraphs=False,
        num_envs=4,
        image_size=16,
        batch_size=16,
        buffer_size=400,
        learning_starts=40,
        random_steps=40,
        total_timesteps=120,
        eval_freq=60,
        log_freq=20,
        eval_episodes=8,
        eval_envs=4,
        hidden=16,
        encoder_channels=4,
        encoder_strides=(2, 2),
        feature_dim=8,
        pad=2,
        frame_stack=2,
        update_every=4,
        std_steps=100,
        lr=1e-3,
        actor_lr=5e-4,
        capture_video=False,
    )
    return dq.Args(**values | changes)


def make_fakes(args):
    eval_env = FakeEnv(args.eval_envs, seed=1, size=args.image_size, stagger=False)
    if args.evaluate:
        return None, eval_env
    return FakeEnv(args.num_envs, seed=args.seed, size=args.image_size, stagger=False), eval_env


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(dq, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def watch(monkeypatch, owner, name) -> list:
    """Calls of a method from now on, as (arguments without self, result)."""
    calls, method = [], getattr(owner, name)

    def watched(self, *given):
        result = method(self, *given)
        calls.append((given, result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


def table(path) -> list[dict]:
    return list(csv.DictReader(Path(path).open()))


def differences(before: dict, after: dict) -> set[str]:
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


# --- Golden numbers -------------------------------------------------------------------------------
TODAY = {".policy.": ".heads.0.", ".q1.": ".heads.0.", ".q2.": ".heads.1."}  # names of weights


def golden(group: str) -> dict:
    values = {}
    with np.load(GOLDEN) as file:
        for name in file.files:
            if name.startswith(group + "/"):
                key = name.removeprefix(group + "/")
                for before, today in TODAY.items():
                    key = key.replace(before, today)
                values[key] = torch.from_numpy(file[name])
    return values


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def golden_agent() -> tuple:
    """Agent, batch and arguments with which the numbers were made."""
    args = arguments(image_size=12, hidden=12, encoder_strides=(2, 1), feature_dim=6, tau=0.25)
    agent = dq.Agent(args, dict(channels=3, state=2, action=2))
    agent.load_state_dict(golden("before"))
    batch = golden("batch") | dict(obs=golden("obs"), next_obs=golden("next_obs"))
    return agent, batch, args


def test_losses_gradients_and_metrics_are_those_of_f2f0a1a():
    """Made at commit f2f0a1a, with its random numbers drawn in today's order."""
    agent, batch, args = golden_agent()
    values = np.load(GOLDEN)
    torch.manual_seed(13)
    loss, features, metrics = dq.critic_loss(agent, batch, torch.tensor(0.4), args)
    loss.backward()
    close(loss.detach(), torch.from_numpy(values["critic_loss"]))
    close(features, torch.from_numpy(values["features"]))
    for name, gradient in golden("critic_gradient").items():
        close(agent.get_parameter(name).grad, gradient)
    agent.zero_grad()
    agent.critic.requires_grad_(False)
    loss, more = dq.actor_loss(agent, batch, features, torch.tensor(0.4), args)
    loss.backward()
    close(loss.detach(), torch.from_numpy(values["actor_loss"]))
    for name, gradient in golden("actor_gradient").items():
        close(agent.get_parameter(name).grad, gradient)
    expected = golden("metrics")
    del expected["train/batch_reward"]
    close(metrics | more, expected)


def test_weights_after_an_update_are_those_of_f2f0a1a():
    agent, batch, args = golden_agent()
    one_update = dq.make_update(agent, dq.make_optimizers(agent, args), args)
    torch.manual_seed(13)
    one_update(batch, torch.tensor(0.4))
    assert differences(golden("before"), agent.state_dict()) == {
        "encoder",
        "critic",
        "target",
        "actor",
    }
    close(dict(agent.state_dict()), golden("after"))


def test_shifts_are_those_of_f2f0a1a():
    torch.manual_seed(17)
    shifted = dq.random_shift(golden("obs")["rgb"], 2)
    assert torch.equal(shifted, torch.from_numpy(np.load(GOLDEN)["shifted"]))


def test_samples_are_those_of_f2f0a1a():
    """40 steps of two environments in a ring of 24 slots."""
    given, obs, final_obs = golden("replay"), golden("replay.obs"), golden("replay.final_obs")
    replay = a_replay({k: v[0] for k, v in obs.items()}, 24, stack=2, n_step=3, gamma=0.9)
    for t in range(40):
        step = [given[k][t] for k in ("actions", "rewards", "discounts", "dones")]
        final = {k: v[t] for k, v in final_obs.items()}
        following = {k: v[t + 1] for k, v in obs.items()}
        replay.add(*step, final, following)
    torch.manual_seed(11)
    batch = replay.sample(32)
    close(batch.pop("obs"), golden("sample.obs"))
    close(batch.pop("next_obs"), golden("sample.next_obs"))
    close(batch, golden("sample"))
    close(replay.observe(replay.head), golden("present"))


# --- Replay ---------------------------------------------------------------------------------------
def a_replay(obs: dict, slots: int, stack=1, n_step=1, gamma=0.5, actions=2) -> dq.Replay:
    n = len(obs["rgb"])
    args = arguments(buffer_size=slots * n, frame_stack=stack, gamma=gamma)
    return dq.Replay(obs, torch.zeros(n, actions), args, n_step)


def numbered(numbers) -> dict:
    """Observations (N, ...) whose pixels and state are a number each."""
    level = torch.tensor(numbers)
    rgb = level.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 2, 2, 3)
    return {"rgb": rgb, "state": level.float()[:, None]}


def play(script: list[list[tuple]], slots: int, stack=1, n_step=1, gamma=0.5) -> tuple:
    """Store a script: for each environment a list of (reward, discount, ends).

    -> replay, its diary of episodes by environment. Environment e numbers its observations from
    1000 e on: in state and action, and modulo 256 as the image.
    """
    fresh = [itertools.count(1000 * e) for e in range(len(script))]
    diary = [[dict(obs=[next(count)], rewards=[], discounts=[])] for count in fresh]
    first = numbered([episodes[0]["obs"][0] for episodes in diary])
    replay = a_replay(first, slots, stack, n_step, gamma, actions=1)
    for steps in zip(*script, strict=True):
        acted = [float(episodes[-1]["obs"][-1]) for episodes in diary]
        finals, following = [], []
        for (reward, discount, ends), episodes, count in zip(steps, diary, fresh, strict=True):
            episodes[-1]["rewards"].append(reward)
            episodes[-1]["discounts"].append(discount)
            episodes[-1]["obs"].append(next(count))
            finals.append(episodes[-1]["obs"][-1])
            if ends:
                episodes.append(dict(obs=[next(count)], rewards=[], discounts=[]))
            following.append(episodes[-1]["obs"][-1])
        rewards, discounts, ends = (torch.tensor(values) for values in zip(*steps, strict=True))
        actions = torch.tensor(acted)[:, None]
        replay.add(actions, rewards, discounts, ends, numbered(finals), numbered(following))
    return replay, diary


def transition(batch: dict, i: int) -> tuple:
    """(state, action, stack, rewards, discount, next stack, next state) of row i."""
    obs, next_obs = batch["obs"], batch["next_obs"]
    return (
        int(obs["state"][i, 0]),
        int(batch["actions"][i, 0]),
        tuple(obs["rgb"][i, 0, 1, ::3].tolist()),
        float(batch["rewards"][i]),
        float(batch["discounts"][i]),
        tuple(next_obs["rgb"][i, 0, 1, ::3].tolist()),
        int(next_obs["state"][i, 0]),
    )


def from_diary(diary, stack, n_step, gamma=0.5) -> dict[int, tuple]:
    """Every transition worked out from the episodes: number of its observation -> transition."""

    def stacked(episode, at):
        return tuple(episode["obs"][max(0, at - back)] % 256 for back in reversed(range(stack)))

    expected = {}
    for episode in itertools.chain(*diary):
        for i, number in enumerate(episode["obs"][:-1]):
            rewards, discount, j = 0.0, 1.0, i
            while j < min(i + n_step, len(episode["rewards"])):
                rewards += discount * episode["rewards"][j]
                discount *= gamma * episode["discounts"][j]
                j += 1
            stacks = stacked(episode, i), stacked(episode, j)
            later = episode["obs"][j]
            expected[number] = (number, number, stacks[0], rewards, discount, stacks[1], later)
    return expected


def test_n_step_targets_by_hand():
    """Gamma 1/2, n 3: four steps that terminate, then three that are cut off, then three more."""
    script = [(1.0, 1.0, False), (2.0, 1.0, False), (4.0, 0.5, False), (8.0, 0.0, True)]
    script += [(16.0, 1.0, False), (32.0, 1.0, False), (64.0, 1.0, True)]
    script += [(1.0, 1.0, False)] * 3
    replay, _ = play([script], slots=40, stack=3, n_step=3)
    batch = replay.sample(4000)
    seen = {transition(batch, i) for i in range(4000)}
    assert seen == {
        # number, action, stack, rewards, discount, next stack, next number; 0 to 4, 5 to 8, 9 on
        (0, 0, (0, 0, 0), 1 + 2 / 2 + 4 / 4, 1 / 16, (1, 2, 3), 3),  # the third discount is 1/2
        (1, 1, (0, 0, 1), 2 + 4 / 2 + 8 / 8, 0.0, (2, 3, 4), 4),  # and 8 comes after it too
        (2, 2, (0, 1, 2), 4 + 8 / 4, 0.0, (2, 3, 4), 4),  # two steps, terminated
        (3, 3, (1, 2, 3), 8, 0.0, (2, 3, 4), 4),
        (5, 5, (5, 5, 5), 16 + 32 / 2 + 64 / 4, 1 / 8, (6, 7, 8), 8),  # cut off: bootstrapped
        (6, 6, (5, 5, 6), 32 + 64 / 2, 1 / 4, (6, 7, 8), 8),
        (7, 7, (5, 6, 7), 64, 1 / 2, (6, 7, 8), 8),
        (9, 9, (9, 9, 9), 1 + 1 / 2 + 1 / 4, 1 / 8, (10, 11, 12), 12),  # 10, 11: not complete yet
    }


@pytest.mark.parametrize("n_step, stack", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 2)])
@pytest.mark.parametrize("steps, slots", [(9, 40), (33, 40), (45, 24), (70, 16), (200, 19)])
@pytest.mark.parametrize("longest", [3, 30])
def test_every_sample_is_in_the_diary(steps, slots, n_step, stack, longest):
    """Two environments, episodes of random lengths, a ring that wraps up to a dozen times."""
    draw, script = random.Random(steps + slots), []
    for _ in range(2):
        ends = [draw.randrange(longest) == 0 for _ in range(steps)]
        discounts = [draw.choice([0.0, 1.0] if end else [1.0, 0.5]) for end in ends]
        rewards = [float(draw.randrange(9)) for _ in ends]
        script.append(list(zip(rewards, discounts, ends, strict=True)))
    script[0][0] = (1.0, 1.0, True)  # an episode of one step
    replay, diary = play(script, slots, stack, n_step)
    expected, batch = from_diary(diary, stack, n_step), replay.sample(1500)
    samples = [transition(batch, i) for i in range(1500)]
    assert all(sample == expected[sample[0]] for sample in samples)
    for e, episodes in enumerate(diary):
        stream = [number for episode in episodes for number in episode["obs"]]  # a slot each
        oldest, newest = max(0, len(stream) - slots + stack), len(stream) - 1 - n_step
        complete = {number for number in stream[oldest : newest + 1] if number in expected}
        seen = {sample[0] for sample in samples if sample[0] // 1000 == e}
        step_back = set(stream[oldest - 1 : oldest])  # from a final observation
        assert complete <= seen <= complete | step_back


@pytest.mark.parametrize("slots, stored", [(200, 130 - 2), (60, 60 - 3 - 2 - 2)])
def test_sampling_is_uniform_and_reaches_all_that_is_stored(slots, stored):
    """In a ring that is not full yet, and in one that wrapped."""
    steps = [(0.0, 1.0, t % 25 == 24) for t in range(130)]
    replay, _ = play([steps, steps], slots, stack=2, n_step=3)
    torch.manual_seed(0)
    seen = replay.sample(40_000)["actions"][:, 0].int()
    counts = seen.unique(return_counts=True)[1].double()
    assert abs(len(counts) / 2 - stored) <= 1
    expected = 40_000 / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < len(counts) + 4 * math.sqrt(2 * len(counts))


@pytest.mark.parametrize("steps, seen", [(2, [0, 1, 2]), (3, [4, 4, 4]), (4, [4, 4, 5])])
def test_present_observation_is_stacked_within_its_episode(steps, seen):
    script = [(0.0, 1.0, False), (0.0, 1.0, False), (0.0, 1.0, True), (0.0, 1.0, False)]
    replay, _ = play([script[:steps]], 40, stack=3)
    present = replay.observe(replay.head)
    assert present["rgb"][0, 0, 0, ::3].tolist() == seen
    assert present["state"].tolist() == [[float(seen[-1])]]


@pytest.mark.parametrize("steps", [5, 60])
def test_replay_is_saved_and_loaded_exactly(steps):
    script = [[(float(t), 1.0, t % 7 == 6) for t in range(steps)]]
    script += [[(float(t), 1.0, t % 5 == 4) for t in range(steps)]]
    replay, _ = play(script, 30, stack=2, n_step=2)
    other, _ = play([script[0][:1], script[1][:1]], 30, stack=2, n_step=2)
    other.load_state_dict(replay.state_dict())
    samples = []
    for one in (replay, other):
        torch.manual_seed(0)
        samples.append(one.sample(50))
    torch.testing.assert_close(*samples, atol=0, rtol=0)
    presents = [one.observe(one.head) for one in (replay, other)]
    torch.testing.assert_close(*presents, atol=0, rtol=0)


def test_each_frame_is_stored_once():
    replay = a_replay(FakeEnv(2, size=84).obs, 100, stack=3)
    frames = replay.data["rgb"]
    assert frames.shape == (200, 84, 84, 3) and frames.dtype == torch.uint8
    others = [value[0].nbytes for name, value in replay.data.items() if name != "rgb"]
    assert sum(others) < 64, "beside 21,168 bytes of the frame; stacks of three take 63,504"


def test_a_buffer_larger_than_the_memory_is_refused_at_once(fake):
    with pytest.raises(ValueError, match=r"^the replay buffer needs \d+\.\d GiB of \d+\.\d: lower"):
        dq.train(arguments(name="run", buffer_size=10**12))
    assert not Path("runs").exists(), "what is refused leaves no folder"


# --- Random shift ---------------------------------------------------------------------------------
def shifted_by(monkeypatch, rgb, offsets, pad):
    """random_shift with chosen offsets (B, 2) from 0 to 2 pad: down, right."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *args, **options: offsets[..., None])
        return dq.random_shift(rgb, pad)


def test_shift_is_a_crop_of_the_image_with_repeated_edges(monkeypatch):
    rgb = torch.randint(0, 256, (9, 12, 12, 9), dtype=torch.uint8)
    offsets = torch.cat([torch.randint(0, 9, (7, 2)), torch.tensor([[0, 8], [4, 4]])])
    shifted = shifted_by(monkeypatch, rgb, offsets, 4)
    assert shifted.shape == rgb.shape and shifted.dtype == torch.uint8
    for image, (down, right), result in zip(rgb, offsets.tolist(), shifted, strict=True):
        padded = np.pad(image.numpy(), ((4, 4), (4, 4), (0, 0)), mode="edge")
        assert np.array_equal(result.numpy(), padded[down : down + 12, right : right + 12])
    assert torch.equal(shifted[-1], rgb[-1])
    assert torch.equal(dq.random_shift(rgb, 0), rgb)


def test_shift_equals_the_published_interpolation(monkeypatch):
    """The paper's way: pad, then sample bilinearly on a grid that is moved by whole pixels."""
    size, pad = 84, 4
    rgb = torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8)
    offsets = torch.randint(0, 2 * pad + 1, (16, 2))
    padded = F.pad(rgb.permute(0, 3, 1, 2).float(), (pad,) * 4, "replicate")
    wide = size + 2 * pad
    centres = torch.linspace(-1 + 1 / wide, 1 - 1 / wide, wide)[:size]
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
    grid = grid + offsets.flip(-1)[:, None, None] * 2 / wide
    published = F.grid_sample(padded, grid, padding_mode="zeros", align_corners=False)
    shifted = shifted_by(monkeypatch, rgb, offsets, pad)
    difference = (shifted.permute(0, 3, 1, 2).float() - published).abs()
    assert difference.max() < 0.004 and difference.mean() < 2e-4


def test_shifts_are_uniform_within_their_bounds():
    row = torch.arange(12, dtype=torch.uint8)
    rgb = torch.stack([row[:, None].expand(12, 12), row[None].expand(12, 12)], -1)
    torch.manual_seed(0)
    shifted = dq.random_shift(rgb.expand(20_000, 12, 12, 2), 4)
    corner = shifted[:, 6, 6].long() - 2  # 0 to 8 down and right
    counts = torch.bincount(corner[:, 0] * 9 + corner[:, 1], minlength=81).double()
    expected = 20_000 / 81
    assert len(counts) == 81
    assert ((counts - expected) ** 2 / expected).sum() < 117  # 80 degrees of freedom, p = 0.004


# --- Networks -------------------------------------------------------------------------------------
def test_parameter_counts_and_initial_weights_are_the_published_ones():
    agent = dq.Agent(dq.Args(device="cpu"), dict(channels=3, state=0, action=6))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    trunk = 39_200 * 50 + 50 + 2 * 50
    head = 57_344 + 1024 + 1_048_576 + 1024 + 1024 + 1
    assert count(agent.encoder) == 30_368
    assert count(agent.critic.trunk) == trunk
    assert count(agent.critic) == trunk + 2 * head
    assert count(agent.actor) == trunk + 51 * 1024 + 1025 * 1024 + 1025 * 6
    assert not any(parameter.requires_grad for parameter in agent.target.parameters())
    for module in agent.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            weight = module.weight.detach().flatten(1)
            rows, columns = weight.shape
            square = weight @ weight.T if rows <= columns else weight.T @ weight
            gain = 2.0 if isinstance(module, torch.nn.Conv2d) else 1.0
            torch.testing.assert_close(square, gain * torch.eye(len(square)), atol=1e-4, rtol=0)
            assert not module.bias.any()


def test_encoder_sees_every_frame_and_takes_images_as_they_are_stored():
    encoder = dq.Encoder(9, arguments(image_size=21, encoder_strides=(2, 1), frame_stack=3))
    rgb = torch.randint(0, 256, (2, 21, 21, 9), dtype=torch.uint8)
    reference = encoder.convs((rgb.float() / 255 - 0.5).permute(0, 3, 1, 2).contiguous())
    features = encoder(rgb)
    assert features.shape == (2, encoder.features) and encoder.features == 8 * 8 * 4
    torch.testing.assert_close(features.view(2, 8, 8, 4).permute(0, 3, 1, 2), reference)


def test_the_last_layer_is_not_in_bfloat16():
    """There a batch at Q = 80 has a value or two: 80, 80.5."""
    args = arguments()
    agent = dq.Agent(args, SHAPES)
    torch.nn.init.constant_(agent.critic.heads[0][-1].bias, 80.0)
    features, state = torch.randn(64, agent.encoder.features), torch.randn(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        q = agent.critic(features, state, torch.rand(64, 2))[0]
    assert q.dtype == torch.float32 and len(q.unique()) > 50


# --- Noise ----------------------------------------------------------------------------------------
def test_noise_falls_linearly_and_stays():
    args = arguments(std_start=1.0, std_end=0.1, std_steps=100)
    stds = [round(float(dq.noise_std(args, t)), 6) for t in (0, 10, 50, 99, 100, 5000)]
    assert stds == [1, 0.91, 0.55, 0.109, 0.1, 0.1]


def test_noise_is_clipped_only_where_the_paper_says(monkeypatch):
    noise = torch.tensor([[-9.0, -0.1, 0.0, 0.1, 9.0]])
    monkeypatch.setattr(torch, "randn_like", lambda mean: noise)
    in_losses = dq.noisy_actions(torch.zeros(1, 5), STD, 0.3)
    torch.testing.assert_close(in_losses, torch.tensor([[-0.3, -0.05, 0.0, 0.05, 0.3]]))
    acting = dq.noisy_actions(torch.zeros(1, 5), STD)  # by the bounds of the action alone
    expected = torch.tensor([[-1.0, -0.05, 0.0, 0.05, 1.0]])
    torch.testing.assert_close(acting, expected, atol=2e-6, rtol=0)


def test_a_clamped_action_keeps_its_gradient(monkeypatch):
    mean = torch.tensor([[-1.0, 0.2, 0.99]], requires_grad=True)
    noise = torch.tensor([[-0.2, 0.0, 0.2]])
    monkeypatch.setattr(torch, "randn_like", lambda mean: noise)
    actions = dq.noisy_actions(mean, 1.0, 0.3)
    assert actions.abs().max() < 1
    actions.sum().backward()
    assert mean.grad.tolist() == [[1.0, 1.0, 1.0]]


# --- Updates --------------------------------------------------------------------------------------
def learning_parts(**changes):
    """An agent, and a buffer with 30 steps of four fake environments."""
    args = arguments(**changes)
    env = FakeEnv(args.num_envs, size=args.image_size)
    torch.manual_seed(3)
    agent = dq.Agent(args, SHAPES).to(args.device)
    obs = {name: value.to(args.device) for name, value in env.obs.items()}
    still = torch.zeros((args.num_envs, 2), device=args.device)
    replay = dq.Replay(obs, still, args, args.n_step)
    for _ in range(30):
        actions = torch.rand((args.num_envs, 2), generator=env.generator) * 2 - 1
        obs, rewards, terminations, truncations, info = env.step(actions)
        step = actions, rewards, 1.0 - terminations.float(), truncations
        on_device = [value.to(args.device) for value in step]
        replay.add(*on_device, info["final_obs"], obs)
    return agent, replay, args


def has_gradient(agent) -> set[str]:
    named = agent.named_parameters()
    return {k.split(".")[0] for k, p in named if p.grad is not None and p.grad.any()}


def test_gradients_reach_exactly_the_right_parameters():
    agent, replay, args = learning_parts()
    batch = replay.sample(16)
    loss, features, metrics = dq.critic_loss(agent, batch, STD, args)
    loss.backward()
    assert has_gradient(agent) == {"encoder", "critic"}
    for part in (agent.encoder, agent.critic):
        assert all(parameter.grad.any() for parameter in part.parameters())
    assert not features.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    agent.zero_grad()
    agent.critic.requires_grad_(False)
    dq.actor_loss(agent, batch, features, STD, args)[0].backward()
    assert has_gradient(agent) == {"actor"}
    assert all(parameter.grad.any() for parameter in agent.actor.parameters())


def test_update_equals_its_formulas_written_out(monkeypatch):
    """Separate passes, an optimiser for each part, no clever order: the same weights afterwards."""
    agent, replay, args = learning_parts()
    other, batch = copy.deepcopy(agent), replay.sample(16)
    shifts = [torch.randint(5, (16, 2, 1)) for _ in range(2)]  # of next_obs, of obs
    noises = [torch.randn(16, 2) for _ in range(2)]  # of the target's action, of the actor's
    drawn = [list(shifts), list(noises)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *given, **options: drawn[0].pop(0))
        patch.setattr(torch, "randn_like", lambda mean: drawn[1].pop(0))
        dq.make_update(agent, dq.make_optimizers(agent, args), args)(batch, STD)

    def encode(rgb, offsets):
        images = []
        for image, (down, right) in zip(rgb, offsets[..., 0].tolist(), strict=True):
            padded = F.pad(image.permute(2, 0, 1).float()[None], (2,) * 4, "replicate")
            images.append(padded[0, :, down : down + 16, right : right + 16])
        x = other.encoder.convs(torch.stack(images) / 255 - 0.5)
        return x.permute(0, 2, 3, 1).reshape(16, -1)

    def heads(critic, h, state, actions):
        x = torch.cat([critic.trunk(h), state, actions], -1)
        return critic.heads[0](x)[:, 0], critic.heads[1](x)[:, 0]

    with torch.no_grad():
        h = encode(batch["next_obs"]["rgb"], shifts[0])
        state = batch["next_obs"]["state"]
        actions = other.mean(h, state) + (0.5 * noises[0]).clamp(-0.3, 0.3)
        q = torch.minimum(*heads(other.target, h, state, actions.clamp(-1, 1)))
        y = batch["rewards"] + batch["discounts"] * q
    state = batch["obs"]["state"]
    h = encode(batch["obs"]["rgb"], shifts[1])
    q1, q2 = heads(other.critic, h, state, batch["actions"])
    (F.mse_loss(q1, y) + F.mse_loss(q2, y)).backward()
    torch.optim.Adam(other.encoder.parameters(), args.lr).step()
    torch.optim.Adam(other.critic.parameters(), args.lr).step()
    # the actor: the new critic, the features from before the encoder's step
    h = h.detach()
    other.actor.zero_grad()
    actions = other.mean(h, state) + (0.5 * noises[1]).clamp(-0.3, 0.3)
    (-torch.minimum(*heads(other.critic, h, state, actions)).mean()).backward()
    torch.optim.Adam(other.actor.parameters(), args.actor_lr).step()
    for target, source in zip(other.target.parameters(), other.critic.parameters(), strict=True):
        target.data = (1 - args.tau) * target.data + args.tau * source.data
    for name, value in agent.state_dict().items():
        expected = other.state_dict()[name]
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4, msg=name)
    assert all(parameter.requires_grad for parameter in agent.critic.parameters())


def test_amp_without_bfloat16_units_warns(monkeypatch, capsys):
    agent, replay, args = learning_parts(amp=True)
    texts = {"cpuinfo": "flags: avx512f avx512_bf16"}
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: texts[path.name])
    dq.make_update(agent, dq.make_optimizers(agent, args), args)
    assert not capsys.readouterr().err
    texts["cpuinfo"] = "flags: avx2"
    dq.make_update(agent, dq.make_optimizers(agent, args), args)
    assert capsys.readouterr().err == "--amp is slow on this device: use --no-amp\n"


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_large_blocks_are_not_faulted_in_anew():
    code = """if True:
        import resource, torch, drqv2
        drqv2.keep_memory()
        pages = []
        for _ in range(21):
            torch.ones(2**24)  # 16,384 pages
            pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(pages[20] - pages[0])
    """
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=SCRIPT.parent, text=True, capture_output=True)
    # a small object that lands in a freed block moves the next one on, seen once; without keep_memory 20 times
    assert int(result.stdout) < 4 * 16_384, result.stderr


# --- Distributional critics -----------------------------------------------------------------------
def test_a_distribution_is_projected_as_by_hand():
    """Atoms 0, 1, 2, 3, 4, each row's distribution moved, cut off at the ends and shared."""
    args = arguments(atoms=5, v_min=0.0, v_max=4.0)
    even = torch.full((5,), 0.2)
    probabilities = torch.stack([even, even, even, torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])])
    rewards, discounts = torch.tensor([1.0, 0.25, 9.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.5])
    expected = [
        [0.0, 1.0, 0.0, 0.0, 0.0],  # an end: the reward alone
        [0.15, 0.2, 0.2, 0.2, 0.25],  # 0.25, 1.25, 2.25, 3.25 and 4 (cut off)
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.5, 0.5, 0.0, 0.0],  # 1 and 2
    ]
    found = dq.project(probabilities, rewards, discounts, args)
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close((found @ torch.arange(5.0))[3], torch.tensor(0.5 + 0.5 * 2.0))


def test_values_are_means_of_the_distributions():
    args = arguments(atoms=3, v_min=-2.0, v_max=4.0)  # atoms -2, 1, 4
    outputs = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 4, 3)
    torch.testing.assert_close(dq.values(outputs, args), torch.full((2, 4), 0.25))
    assert torch.equal(dq.values(outputs[..., :1], arguments()), outputs[..., 0])


def test_distributional_critics_learn_a_known_return(monkeypatch):
    """Ends everywhere: labels are the rewards' own atoms, from the critic with the smaller mean."""
    agent, replay, args = learning_parts(atoms=11, v_min=-2.0, v_max=2.0, lr=5e-3)
    batch = replay.sample(64) | dict(discounts=torch.zeros(64))
    batch["rewards"] = batch["actions"][:, 0].round()
    one_update = dq.make_update(agent, dq.make_optimizers(agent, args), args)
    errors = []
    for _ in range(150):
        metrics = one_update(batch, STD)
        errors.append(float(metrics["loss/qf"]))
    assert errors[-1] < 0.5 * errors[0]
    features = agent.encoder(batch["obs"]["rgb"])
    outputs = agent.critic(features, batch["obs"]["state"], batch["actions"])
    assert outputs.shape == (2, 64, 11)
    error = (dq.values(outputs, args).mean(0) - batch["rewards"]).abs().mean()
    assert error < 0.3


def test_the_smaller_distribution_is_the_target(monkeypatch):
    agent, replay, args = learning_parts(atoms=5, v_min=0.0, v_max=4.0)
    batch, labels = replay.sample(16), []
    wanted = torch.randn(2, 16, 5)
    monkeypatch.setattr(agent.target, "forward", lambda *given: wanted)
    project = dq.project
    monkeypatch.setattr(dq, "project", lambda p, *rest: labels.append(p) or project(p, *rest))
    dq.critic_loss(agent, batch, STD, args)
    means = wanted.softmax(-1) @ torch.arange(5.0)
    for i in range(16):
        smaller = wanted[means[:, i].argmin(), i].softmax(-1)
        torch.testing.assert_close(labels[0][i], smaller)


def test_a_termination_cuts_the_value_and_a_time_limit_does_not():
    agent, replay, args = learning_parts()
    batch = replay.sample(16)
    target = dq.critic_loss(agent, batch, STD, args)[2]["train/target"]
    batch["discounts"] = torch.zeros(16)
    ended = dq.critic_loss(agent, batch, STD, args)[2]["train/target"]
    torch.testing.assert_close(ended, batch["rewards"].mean())
    assert ended != target


def weights_after_five_updates(**changes) -> dict:
    agent, replay, args = learning_parts(**changes)
    one_update = dq.make_update(agent, dq.make_optimizers(agent, args), args)
    torch.manual_seed(1)
    for _ in range(5):
        metrics = one_update(replay.sample(16), STD.to(args.device))
    assert metrics["loss/qf"] > 0
    return agent.state_dict()


has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
inductor = pytest.param(
    "inductor",
    marks=[pytest.mark.slow, pytest.mark.skipif(not has_compiler, reason="needs g++")],
)


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_compiled_route_equals_the_plain_one(monkeypatch, backend):
    """aot_eager: the traced graphs, run without code generation."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    torch.compiler.reset()
    plain = weights_after_five_updates()
    with torch._inductor.config.patch(fallback_random=True):  # the same numbers
        compiled = weights_after_five_updates(compile=True)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_learns_as_the_plain_route():
    """The captured update draws other random numbers; what it optimises is the same."""
    losses = []
    for cudagraphs in (False, True):
        agent, replay, args = learning_parts(device="cuda", cudagraphs=cudagraphs)
        one_update = dq.make_update(agent, dq.make_optimizers(agent, args), args)
        batch = replay.sample(256)
        metrics = [one_update(batch, STD.cuda())["loss/qf"] for _ in range(200)]
        losses.append(float(torch.stack(metrics[-50:]).mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


# --- Runs -----------------------------------------------------------------------------------------
def test_a_short_run_from_end_to_end(fake):
    args = arguments(capture_video=True, name="run")
    result = dq.train(args)
    run = Path("runs/run")
    files = {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt", "videos"}
    assert {file.name for file in run.iterdir()} == files
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    rows = table(run / "eval.csv")
    assert list(rows[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    metrics = table(run / "metrics.csv")
    assert [row["global_step"] for row in metrics] == ["60", "80", "100", "120"]
    assert all(math.isfinite(float(value)) for row in metrics for value in row.values())
    torch.manual_seed(args.seed)
    start = dq.Agent(args, SHAPES).state_dict()
    trained = dq.load(run / "checkpoint.pt")["agent"]
    assert differences(start, trained) == {"encoder", "actor", "critic", "target"}


def test_a_row_averages_the_episodes_that_ended_and_the_updates():
    returns, successes = torch.tensor([2.0, math.nan, 5.0]), torch.tensor([True, True, False])
    info = dict(episode={"return": returns, "success_at_end": successes})
    sums = dq.episode_sums(info, torch.tensor([True, False, True]))
    assert sums.tolist() == [2.0, 7.0, 1.0]
    losses = [{"loss/qf": torch.tensor(1.0)}, {"loss/qf": torch.tensor(4.0)}]
    metrics = dq.training_metrics(FakeEnv(3), sums, losses)
    assert metrics == {
        "train/episodes": 2.0,
        "train/nan_resets": 0,
        "train/return": 3.5,
        "train/success_at_end": 0.5,
        "loss/qf": 2.5,
    }


class Ending(FakeEnv):
    """A task that says discount 1 at a termination and 0.5 elsewhere, and knows no success."""

    has_success = False

    def step(self, actions):
        obs, rewards, _, ends, info = super().step(actions)
        info["discount"] = torch.where(ends, 1.0, 0.5)
        return obs, rewards, ends, torch.zeros_like(ends), info


def test_true_ends_and_discounts_reach_the_buffer(fake, monkeypatch):
    kept = watch(monkeypatch, dq.Replay, "add")
    monkeypatch.setattr(dq, "make_envs", lambda args: (Ending(4), Ending(4)))
    result = dq.train(arguments(name="run"))
    for (_, _, discounts, dones, _, _), _ in kept:
        assert torch.equal(discounts, torch.where(dones, 0.0, 0.5))
    assert any(given[3].any() for given, _ in kept)
    assert "eval/success_rate" not in result and "eval/return" in result


def test_the_buffer_gets_what_the_environment_gave(fake, monkeypatch):
    """The true next observation as the one after the step, and the next episode's to go on from."""
    steps = watch(monkeypatch, FakeEnv, "step")
    kept = watch(monkeypatch, dq.Replay, "add")
    dq.train(arguments(name="run", total_timesteps=60))
    for ((acted,), result), (given, _) in zip(steps, kept, strict=False):  # then: the evaluation
        actions, stored, _, dones, final_obs, next_obs = given
        obs, rewards, _, ends, info = result
        assert torch.equal(actions, acted)
        assert torch.equal(stored, rewards) and torch.equal(dones, ends)
        assert final_obs is info["final_obs"] and next_obs is obs
    assert any(given[3].any() for given, _ in kept), "an episode ended"


class InHalves(FakeEnv):
    """An environment that may draw while the networks learn. `order`: what happened."""

    order: list = []

    def step_begin(self, actions):
        InHalves.order.append("begin")
        self.begun = actions

    def step_end(self):
        InHalves.order.append("end")
        return FakeEnv.step(self, self.begun)


def test_updates_come_between_the_halves_of_a_step_and_change_nothing(fake, monkeypatch):
    dq.train(arguments(name="whole", **LONG))
    sample = dq.Replay.sample
    with monkeypatch.context() as patch:
        patch.setattr(
            dq.Replay, "sample", lambda *given: InHalves.order.append("update") or sample(*given)
        )
        envs = [InHalves(4, seed=1, size=16, stagger=False) for _ in range(2)]
        patch.setattr(dq, "make_envs", lambda args: envs)
        InHalves.order.clear()
        dq.train(arguments(name="halves", **LONG))
    same_runs("whole", "halves")
    assert InHalves.order == ["begin", "end"] * 10 + ["begin", "update", "end"] * 30


def test_noise_follows_its_schedule_in_acting_and_learning(fake, monkeypatch):
    """Unclipped while acting; clipped and of that step's size in the updates after it."""
    calls, noisy = [], dq.noisy_actions

    def watched(mean, std, clip=math.inf):
        calls.append((float(std), clip))
        return noisy(mean, std, clip)

    monkeypatch.setattr(dq, "noisy_actions", watched)
    args = arguments(std_steps=80, std_clip=0.2)
    dq.train(args)
    acting = [std for std, clip in calls if clip == math.inf]
    assert acting == [float(dq.noise_std(args, t)) for t in range(40, 120, 4)]
    learning = [std for std, clip in calls if clip == 0.2]  # of target and actor in each update
    assert learning[::2] == learning[1::2]
    assert learning[::2] == [float(dq.noise_std(args, t)) for t in range(40, 120, 4)]
    assert len(calls) == len(acting) + len(learning)


def test_updates_come_at_their_rate(fake, monkeypatch):
    """One for every three transitions, four of which come at once."""
    samples = watch(monkeypatch, dq.Replay, "sample")
    dq.train(arguments(update_every=3, learning_starts=60))
    assert len(samples) == 120 // 3 - 60 // 3


def test_the_first_actions_are_uniform_and_the_next_ones_noisy(fake, monkeypatch):
    steps = watch(monkeypatch, FakeEnv, "step")
    never = dict(learning_starts=1_000, eval_freq=1_000)
    dq.train(
        arguments(total_timesteps=200, random_steps=160, std_start=0.05, std_end=0.05, **never)
    )
    acted = torch.stack([given[0] for given, _ in steps[:50]])
    first, then = acted[:40], acted[40:]
    assert first.std() == pytest.approx(1 / math.sqrt(3), abs=0.06) and first.abs().max() <= 1
    assert 0.02 < (then - then.mean((0, 1))).std() < 0.25, "close around the untrained mean"


def same_runs(one: str, other: str):
    """All that was saved but times is equal."""
    a, b = (dq.load(f"runs/{name}/checkpoint.pt") for name in (one, other))
    for key in ("agent", "critic_optimizer", "actor_optimizer", "random", "replay", "env"):
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)
    rows = [table(f"runs/{name}/eval.csv") for name in (one, other)]
    for row in rows[0] + rows[1]:
        del row["wall_time"], row["train_time"]
    assert rows[0] == rows[1] and len(rows[0]) == 2


LONG = dict(save_buffer=True, total_timesteps=160, eval_freq=80, buffer_size=120)  # it wraps


@pytest.mark.parametrize(
    "changes",
    [dict(n_step=3, frame_stack=3), dict(n_step=1, update_every=3), dict(num_envs=1)],
)
def test_resume_continues_exactly(fake, changes):
    """2N steps equal N steps and then N more, bit for bit, with --save-buffer on the CPU."""
    args = arguments(name="whole", **LONG | changes)
    dq.train(args)
    dq.train(replace(args, name="half", total_timesteps=80))
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was killed
        with path.open("a") as file:
            file.write("999999,1\r\n")
    dq.train(dq.parse_args(["--resume", "runs/half", "--total-timesteps", "160"]))
    same_runs("whole", "half")


def test_ctrl_c_saves_and_the_run_goes_on_exactly(fake, monkeypatch):
    dq.train(arguments(name="whole", **LONG))
    before, step = signal.getsignal(signal.SIGINT), FakeEnv.step

    def interrupted(self, actions):
        if self.steps == 22:
            signal.raise_signal(signal.SIGINT)
        return step(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(FakeEnv, "step", interrupted)
        with pytest.raises(SystemExit, match="^interrupted at step 92: continue with --resume"):
            dq.train(arguments(name="half", **LONG))
    assert signal.getsignal(signal.SIGINT) == before
    dq.train(dq.parse_args(["--resume", "runs/half"]))
    same_runs("whole", "half")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resuming_holds_the_buffer_once(fake, monkeypatch):
    """Not a second time as a mapping of the checkpoint, which what an optimizer kept would hold."""
    dq.train(arguments(name="run", **LONG))
    maps, step = [], FakeEnv.step

    def watched(self, actions):
        maps.append(Path("/proc/self/maps").read_text())
        return step(self, actions)

    monkeypatch.setattr(FakeEnv, "step", watched)
    dq.train(dq.parse_args(["--resume", "runs/run", "--total-timesteps", "164"]))
    assert "checkpoint.pt" not in maps[0]


def test_a_run_that_dies_before_its_first_evaluation_can_go_on(fake, monkeypatch):
    dq.train(arguments(name="whole", **LONG))
    with monkeypatch.context() as patch:
        patch.setattr(FakeEnv, "step", lambda self, actions: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dq.train(arguments(name="half", **LONG))
    dq.train(dq.parse_args(["--resume", "runs/half"]))
    same_runs("whole", "half")


def test_without_a_saved_buffer_updates_wait_until_it_is_filled_again(fake, monkeypatch):
    dq.train(arguments(name="run", total_timesteps=80))
    first = dq.load("runs/run/checkpoint.pt")
    assert "replay" not in first and "env" not in first
    samples = watch(monkeypatch, dq.Replay, "sample")
    dq.train(dq.parse_args(["--resume", "runs/run", "--total-timesteps", "160"]))
    assert len(samples) == (160 - 80 - 40) // 4
    assert [row["global_step"] for row in table("runs/run/eval.csv")] == ["60", "80", "120", "160"]


def test_checkpoint_starts_from_weights_alone(fake):
    dq.train(arguments(name="first", total_timesteps=80))
    words = ["--checkpoint", "runs/first/checkpoint.pt", "--name", "second"]
    dq.train(dq.parse_args([*words, "--learning-starts", "1000"]))
    first, second = (dq.load(f"runs/{name}/checkpoint.pt") for name in ("first", "second"))
    assert not differences(first["agent"], second["agent"]), "no update happened"
    assert second["progress"]["global_step"] == 80
    assert second["args"]["name"] == "second" and second["args"]["hidden"] == 16


@pytest.mark.parametrize("option", ["--lr 0.5", "--num-envs 2", "--name other", "--no-save-buffer"])
def test_resume_refuses_what_it_cannot_honour(fake, option):
    dq.train(arguments(name="run", total_timesteps=60, save_buffer=True))
    flag = option.split()[0].replace("--no-", "--")
    with pytest.raises(ValueError, match=f"^{flag} cannot change on --resume of runs/run"):
        dq.parse_args(["--resume", "runs/run", *option.split()])


def test_a_device_of_another_kind_is_refused_on_resume(fake):
    dq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="^--device must stay cpu"):
        dq.parse_args(["--resume", "runs/run", "--device", "cuda"])


def test_existing_runs_are_not_overwritten(fake):
    dq.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        dq.train(arguments(name="run"))


def test_best_is_the_best_and_not_the_latest(fake, monkeypatch):
    returns = [1.0, 3.0, 2.0, 3.0]
    monkeypatch.setattr(dq, "evaluate", lambda *given: {"eval/return": returns.pop(0)})
    dq.train(arguments(name="run", total_timesteps=160, eval_freq=40))
    assert not returns
    best, latest = (dq.load(f"runs/run/{name}.pt") for name in ("best", "checkpoint"))
    assert (best["progress"]["global_step"], best["progress"]["best"]) == (80, 3.0)
    assert latest["progress"]["global_step"] == 160
    assert differences(best["agent"], latest["agent"])


def test_evaluation_repeats_and_leaves_training_alone(fake):
    dq.train(arguments(name="often", eval_freq=20))
    dq.train(arguments(name="seldom"))
    often, seldom = (dq.load(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    words = ["--evaluate", "--checkpoint", "runs/often/checkpoint.pt"]
    results = [dq.train(dq.parse_args(words)) for _ in range(2)]
    assert results[0] == results[1]
    last = float(table("runs/often/eval.csv")[-1]["eval/return"])
    assert results[0]["eval/return"] == last


def test_evaluation_scores_each_environment_once_with_mean_actions(fake, monkeypatch):
    """Returns worked out from a run of the environment with the actor's own actions."""
    args = arguments(eval_episodes=4)
    torch.manual_seed(0)
    agent = dq.Agent(args, SHAPES)
    content = dict(args=vars(args), shapes=SHAPES, spec={}, agent=agent.state_dict())
    results = dq.evaluate(content, FakeEnv(4, horizon=5), args, None)
    env, past, total = FakeEnv(4, horizon=5), None, torch.zeros(4)
    obs = env.reset(seed=dq.EVAL_SEED)
    for _ in range(5):
        stack = torch.cat([obs["rgb"] if past is None else past, obs["rgb"]], -1)
        past = obs["rgb"]
        with torch.no_grad():
            actions = agent.mean(agent.encoder(stack), obs["state"])
        obs, rewards, *_ = env.step(actions)
        total += rewards
    assert results["eval/return"] == pytest.approx(float(total.mean()), abs=1e-5)
    assert results["eval/return_std"] == pytest.approx(float(total.std(correction=0)), abs=1e-5)


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_policy_from_the_file_acts_on_what_the_buffer_would_show(fake, frame_stack):
    args = arguments(name="run", frame_stack=frame_stack)
    dq.train(args)
    before = torch.get_rng_state()
    policy = dq.Policy("runs/run/checkpoint.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = dq.Agent(args, SHAPES)
    agent.load_state_dict(dq.load("runs/run/checkpoint.pt")["agent"])
    env = FakeEnv(5, stagger=False)
    replay = a_replay(env.obs, 40, frame_stack)
    for _ in range(4):
        present = replay.observe(replay.head)
        actions = policy.act(env.obs)
        expected = agent.mean(agent.encoder(present["rgb"]), present["state"])
        torch.testing.assert_close(actions, expected.detach())
        obs, rewards, _, truncations, info = env.step(actions)
        replay.add(actions, rewards, rewards, truncations, info["final_obs"], obs)
    policy.reset()
    assert policy.act(env.obs).shape == (5, 2)
    assert policy.spec == env.spec


def test_stops_at_nan_and_names_the_tensor(fake, monkeypatch):
    step = FakeEnv.step

    def broken(self, actions):
        obs, rewards, *others = step(self, actions)
        return obs, rewards * (math.nan if self.steps > 15 else 1.0), *others

    monkeypatch.setattr(FakeEnv, "step", broken)
    match = r"^encoder\S+ is not finite at step \d+; last good checkpoint: runs/run/checkpoint.pt$"
    with pytest.raises(FloatingPointError, match=match):
        dq.train(arguments(name="run", eval_freq=40))
    saved = dq.load("runs/run/checkpoint.pt")
    assert saved["progress"]["global_step"] == 40
    assert all(value.isfinite().all() for value in saved["agent"].values())


def test_dot_reach_runs(monkeypatch, tmp_path):
    """The real environment, with the defaults of a CPU, for ten updates."""
    monkeypatch.chdir(tmp_path)
    words = "--env-id dot_reach --device cpu --total-timesteps 160 --learning-starts 80 --name run"
    words += " --eval-freq 160 --log-freq 80 --no-capture-video"
    result = dq.train(dq.parse_args(words.split()))
    assert -40 < result["eval/return"] < -2 and 0 <= result["eval/success_rate"] <= 1


# --- Command line ---------------------------------------------------------------------------------
PUBLISHED = {
    "cartpole_balance": dict(lr=1e-4, actor_lr=1e-4, feature_dim=50, buffer_size=1_000_000),
    "walker_walk": dict(n_step=1, batch_size=512),
    "walker_run": dict(total_timesteps=1_550_000, std_steps=500_000, n_step=1, batch_size=512),
    "finger_turn_hard": dict(total_timesteps=1_550_000, std_steps=500_000),
    "reacher_easy": dict(total_timesteps=1_550_000, std_steps=500_000),
    "quadruped_run": dict(total_timesteps=1_550_000, std_steps=500_000, buffer_size=100_000),
    "humanoid_walk": dict(
        total_timesteps=15_050_000, std_steps=2_000_000, lr=8e-5, feature_dim=100
    ),
}
EASY = dict(
    total_timesteps=550_000,
    std_steps=100_000,
    n_step=3,
    batch_size=256,
    image_size=84,
    action_repeat=2,
    frame_stack=3,
    gamma=0.99,
    tau=0.01,
    update_every=2,
    hidden=1024,
    learning_starts=2_000,
    random_steps=2_000,
    std_start=1.0,
    std_end=0.1,
    std_clip=0.3,
    pad=4,
    encoder_channels=32,
    encoder_strides=(2, 1, 1, 1),
    num_envs=1,
)


@pytest.mark.parametrize("env_id", PUBLISHED)
def test_published_settings_of_a_task_are_its_defaults(env_id):
    """Frames of the paper are halved: an agent's step is two of them."""
    values = dict(env_id=env_id) | dq.tuned(env_id, "cuda")
    defaults = dq.Args(**values)
    for name, value in (EASY | PUBLISHED[env_id]).items():
        assert getattr(defaults, name) == value, name


@pytest.mark.parametrize("env_id", ["dot_reach", "walker_walk", "humanoid_run"])
def test_help_shows_each_task_its_defaults(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        dq.parse_args(["--env-id", env_id, "--device", "cpu", "--help"])
    text = capsys.readouterr().out
    values = dq.tuned(env_id, "cpu")
    assert stop.value.code == 0 and env_id in text
    for name in ("total_timesteps", "std_steps"):
        assert re.search(rf"--{name.replace('_', '-')} +{values[name]} ", text)
    args = dq.parse_args(["--env-id", env_id, "--device", "cpu"])
    for name, value in values.items():
        assert getattr(args, name) == value
    dq.check(args)


def test_arguments_of_a_run_come_from_its_checkpoint(fake):
    dq.train(arguments(name="run", total_timesteps=60, gamma=0.8))
    args = dq.parse_args(["--resume", "runs/run", "--total-timesteps", "90"])
    assert (args.gamma, args.total_timesteps, args.encoder_strides) == (0.8, 90, (2, 2))
    dq.train(args)
    args = dq.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt"])
    assert (args.env_id, args.name, args.gamma, args.resume) == ("Fake", "", 0.8, None)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(evaluate=True), "--evaluate needs --checkpoint"),
        (dict(num_envs=0), "--num-envs must be at least 1"),
        (dict(n_step=0), "--n-step must be at least 1"),
        (dict(learning_starts=8), "--learning-starts must be at least"),
        (dict(buffer_size=27), "--buffer-size must be at least"),
        (dict(eval_episodes=7), "multiple of --eval-envs"),
        (dict(atoms=1), "--atoms must be 0 or at least 2"),
        (dict(atoms=51, v_min=9.0, v_max=9.0), "--v-max above --v-min"),
    ],
)
def test_choices_that_cannot_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        dq.check(arguments(**changes))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--resume nowhere", "there is no checkpoint nowhere"),
        (f"--checkpoint {SCRIPT}", "is no checkpoint"),
        ("--env-id nothing", "nothing"),
        ("--image-size 7", "--image-size is too small for --encoder-strides"),
    ],
)
def test_bad_input_is_one_line(options, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        dq.train(dq.parse_args(["--device", "cpu", *options.split()]))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_the_command_line_prints_an_error_without_a_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--evaluate"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "error: --evaluate needs --checkpoint FILE"


# --- The published curve --------------------------------------------------------------------------
def test_published_curves_are_drawn_beside_ours(tmp_path):
    path = SCRIPT.parents[1] / "scripts/plot_published.py"
    spec = importlib.util.spec_from_file_location("plot_published", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    curve = script.published(SCRIPT.parents[1] / "docs/published/drqv2.csv")["cartpole_balance"]
    at = curve["frame"].index(60_000)  # ten seeds: 963 974 980 982 987 989 991 992 993 995
    assert curve["seeds"][at] == 10 and 987 <= curve["median"][at] <= 989
    assert (round(curve["lowest"][at]), round(curve["highest"][at])) == (963, 995)
    (tmp_path / "cartpole_balance__cpu2__s1.csv").write_text("global_step,eval/return\n100,7.5\n")
    groups = script.ours(tmp_path, "cartpole_balance")
    assert groups == {"cpu2": [([200.0], [7.5])]}
    command = '{"command": "python algos/drqv2.py --action-repeat 4"}'
    (tmp_path / "cartpole_balance__cpu2__s1.json").write_text(command)
    groups = script.ours(tmp_path, "cartpole_balance")
    assert groups["cpu2"][0][0] == [400.0]
    script.figures("drqv2", {"cartpole_balance": curve}, tmp_path / "images")
    image = tmp_path / "images/published__drqv2__cartpole_balance.png"
    assert image.stat().st_size > 5_000
