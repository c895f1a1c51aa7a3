"""Dot-reach: what the images show, the returns that it is measured against, episodes, exact resume."""

import pytest
import torch

from envs import dot_reach
from envs.dot_reach import HORIZON, NEAR, RADIUS, SPEED


def make(n=2, **options):
    return dot_reach.make("dot_reach", n, "cpu", **({"seed": 0} | options))


def actions(n, seed=0):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_contract():
    env = make(3, frame_stack=2, image_size=20)
    obs, rewards, terminations, truncations, info = env.step(actions(3))
    assert (
        env.image_shape == (20, 20, 6)
        and obs["rgb"].shape == (3, 20, 20, 6)
        and obs["rgb"].dtype == torch.uint8
    )
    assert obs["state"].shape == (3, env.state_dim) == (3, 0) and env.has_success
    assert rewards.shape == (3,) and not terminations.any() and not truncations.any()
    assert info["discount"].tolist() == [1, 1, 1] and set(info["final_obs"]) == set(obs)
    assert env.max_episode_steps == HORIZON and env.action_repeat == 1
    assert set(info["episode"]) == {"return", "length", "success_once", "success_at_end"}


def test_the_disks_are_where_agent_and_goal_are():
    """The centre of mass of a channel is the disk's centre, its sum the disk's area, whatever the size of a pixel."""
    for size in (32, 45):
        env = make(image_size=size)
        env.agent, env.goal = (
            torch.tensor([[0.5, -0.3], [-0.8, 0.0]]),
            torch.tensor([[-0.4, 0.61], [0.1, 0.77]]),
        )
        rgb = env._draw().double() / 255
        middle = (torch.arange(size) + 0.5) * 2 / size - 1
        for channel, place in ((0, env.agent), (1, env.goal)):
            cover = rgb[..., channel]
            x, y = (cover.sum(1) * middle).sum(1), (cover.sum(2) * -middle).sum(1)
            centre = torch.stack((x, y), 1) / cover.sum((1, 2))[:, None]
            assert (centre - place).abs().max() < 0.02 * 2 / size * 10
            area = cover.sum((1, 2)) * (2 / size) ** 2
            assert (area / (torch.pi * RADIUS**2) - 1).abs().max() < 0.03
        assert rgb[..., 2].max() == 0


def test_a_step_moves_and_pays_minus_the_distance():
    env = make(1)
    env.agent, env.goal = torch.tensor([[0.9, 0.0]]), torch.tensor([[0.5, 0.3]])
    _, rewards, *_, info = env.step(
        torch.tensor([[1.0, 2.0]])
    )  # stopped by the wall; actions are clamped
    assert torch.allclose(env.agent, torch.tensor([[1.0, SPEED]]))
    assert (
        rewards.item() == pytest.approx(-((0.5**2 + 0.15**2) ** 0.5)) and not info["success"].item()
    )
    env.agent, env.goal = torch.zeros(1, 2), torch.tensor([[NEAR - 0.01, 0.0]])
    assert env.step(torch.full((1, 2), float("nan")))[4]["success"].item()  # no number is no motion


def test_reference_returns_are_those_that_are_written_down():
    """With 20,000 episodes a mean is good to about 0.06 (oracle 0.01), a little above three standard errors."""
    means = dot_reach.reference_returns(20_000, seed=5)
    assert means["oracle"] == pytest.approx(dot_reach.ORACLE_RETURN, abs=0.04)
    assert means["random"] == pytest.approx(dot_reach.RANDOM_RETURN, abs=0.25)
    assert means["still"] == pytest.approx(dot_reach.STILL_RETURN, abs=0.25)


def test_nothing_beats_the_oracle():
    """Against the straight line at full speed, and against many random policies that move at the goal."""
    env = make(500)
    env.reset(3)
    best = sum(env.step(dot_reach.oracle(env))[1] for _ in range(HORIZON))
    for seed in range(3):
        env.reset(3)
        total = 0
        for t in range(HORIZON):
            away = env.goal - env.agent
            greedy = away / away.norm(dim=1, keepdim=True).clamp_min(SPEED)
            total = total + env.step(greedy + 0.2 * seed * actions(500, 100 * seed + t))[1]
        assert (total <= best + 1e-4).all()


def test_episodes_end_by_time_and_begin_anew():
    env = make(2)
    first = env.reset(7)["rgb"]
    total = torch.zeros(2)
    for t in range(HORIZON):
        before = env.goal.clone()
        obs, rewards, terminations, truncations, info = env.step(actions(2, t))
        total += rewards
        assert truncations.tolist() == [t == HORIZON - 1] * 2 and not terminations.any()
    assert torch.allclose(info["episode"]["return"], total) and info["episode"][
        "length"
    ].tolist() == [25, 25]
    assert torch.equal(info["episode"]["success_at_end"], info["success"])
    assert not torch.equal(env.goal, before) and not torch.equal(
        obs["rgb"], info["final_obs"]["rgb"]
    )
    assert torch.equal(obs["rgb"], env._draw()) and env.clock.tolist() == [0, 0]
    assert torch.equal(env.reset(7)["rgb"], first) and not torch.equal(env.reset(8)["rgb"], first)


def test_staggered_worlds_do_not_end_together():
    env = make(5, stagger=True)
    ends = torch.stack([env.step(actions(5))[3] for _ in range(HORIZON)])
    assert ends.sum(0).tolist() == [1] * 5 and ends.sum(1).max() == 1
    env.reset(0)
    assert env.clock.tolist() == [0] * 5


def test_frames_are_stacked_newest_last_and_never_across_episodes():
    env = make(2, frame_stack=3)
    rgb = env.reset(1)["rgb"]
    assert torch.equal(rgb, rgb[..., :3].repeat(1, 1, 1, 3))
    for t in range(HORIZON):
        last = rgb
        obs, *_, info = env.step(actions(2, t))
        rgb = obs["rgb"]
        assert torch.equal(info["final_obs"]["rgb"][..., :6], last[..., 3:])
    assert torch.equal(rgb, rgb[..., -3:].repeat(1, 1, 1, 3))


def test_action_repeat_is_the_same_task_in_fewer_steps():
    one, two = make(2), make(2, action_repeat=2)
    one.reset(4), two.reset(4)
    assert two.max_episode_steps == 13  # 12 of two frames, one of one
    for t in range(13):
        a = actions(2, t)
        rewards = sum(one.step(a)[1] for _ in range(2 if t < 12 else 1))
        _, twice, _, truncations, info = two.step(a)
        assert torch.allclose(rewards, twice, atol=1e-5)
    assert truncations.all() and info["episode"]["length"].tolist() == [13, 13]


def test_resume_is_exact(tmp_path):
    env, other = make(3, stagger=True, frame_stack=2), make(3, seed=99, frame_stack=2)
    for t in range(30):
        env.step(actions(3, t))
    torch.save(env.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    other.load_state_dict(saved)
    for t in range(40):
        a, b = env.step(actions(3, t)), other.step(actions(3, t))
        assert (
            torch.equal(a[0]["rgb"], b[0]["rgb"])
            and torch.equal(a[1], b[1])
            and torch.equal(a[3], b[3])
        )
        assert torch.equal(a[4]["episode"]["return"], b[4]["episode"]["return"])
    with pytest.raises(ValueError, match="here: "):
        make(2).load_state_dict(saved)


@pytest.mark.parametrize(("options", "line"), [
    (dict(env_id="dot"), "unknown task 'dot'"),
    (dict(n=0), "num_envs must be at least 1"),
    (dict(action_repeat=0), "action_repeat and frame_stack"),
    (dict(renderer="egl"), "drawn by torch"),
])  # fmt: skip
def test_impossible_options_are_told_in_one_line(options, line):
    options = {"env_id": "dot_reach", "n": 2} | options
    with pytest.raises(ValueError, match=line):
        dot_reach.make(options.pop("env_id"), options.pop("n"), "cpu", **options)


def test_pictures_for_people():
    assert make(3).render((0, 2), size=64).shape == (2, 64, 64, 3)
