"""The scripts beside SAPO, on a point mass: the library's PPO and SAC, trajectory optimisation, the loss landscape."""

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import baselines_rewarped as br
import landscape_rewarped as lr
import pytest
import sapo_rewarped as sr
import torch
import trajopt_rewarped as tr
from conftest import ROOT
from fake_env_diff import PointMass

library = pytest.mark.skipif(
    importlib.util.find_spec("stable_baselines3") is None, reason=br.INSTALL
)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Every task is PointMass, with few environments and steps."""

    def tuned(algo, env_id, size):
        return dict(
            num_envs=4,
            horizon=8,
            eval_episodes=4,
            eval_freq=64,
            total_timesteps=160,
            actor_units=(16,),
            critic_units=(16,),
        )

    def make(args):
        points = "points" in args.env_id
        env = PointMass(args.num_envs, seed=args.seed, points=points)
        return env, PointMass(args.eval_episodes, points=points)

    monkeypatch.setattr(sr, "tuned", tuned)
    monkeypatch.setattr(sr, "make_envs", make)
    monkeypatch.chdir(tmp_path)


def rows(name) -> list[dict]:
    with open(f"runs/{name}/eval.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_random_and_still_are_the_same_at_both_ends(fake):
    for algo in ("random", "still"):
        br.train(br.Args(algo=algo, env_id="Fake", name=algo))
        assert [row["global_step"] for row in rows(algo)] == ["0", "160"]
    assert list(rows("still")[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    env, total = PointMass(4), 0.0
    env.reset(seed=sr.EVAL_SEED)
    for _ in range(20):
        total = total + env.step(torch.zeros(4, 2))[1]
    still = {float(row["eval/return"]) for row in rows("still")}
    assert len(still) == 1 and still.pop() == pytest.approx(float(total.mean()), rel=1e-5)
    assert rows("random")[0]["eval/return"] != rows("still")[0]["eval/return"]
    with pytest.raises(ValueError, match="^runs/still exists: choose another --name$"):
        br.train(br.Args(algo="still", env_id="Fake", name="still"))


@library
def test_environments_report_time_outs_with_the_last_observation():
    env = PointMass(3, horizon=2, points=True)
    envs, reference = br.make_vec_env(env), PointMass(3, horizon=2, points=True)
    obs = envs.reset()
    reference.reset()
    assert envs.observation_space.contains({name: value[0] for name, value in obs.items()})
    for t in range(2):
        actions = torch.full((3, 2), 0.5)
        obs, rewards, dones, infos = envs.step(actions.numpy())
        expected = reference.step(actions)
        assert torch.equal(torch.as_tensor(rewards), expected[1]) and dones.all() == (t == 1)
        assert torch.equal(torch.as_tensor(obs["points"]), expected[0]["points"])
    for i, info in enumerate(infos):
        assert info["TimeLimit.truncated"]
        last = torch.as_tensor(info["terminal_observation"]["state"])
        assert torch.equal(last, expected[-1]["final_obs"]["state"][i])


@library
@pytest.mark.parametrize("algo", ["ppo", "sac"])
@pytest.mark.parametrize("env_id", ["Fake", "Fake points"])
def test_the_library_trains_and_is_evaluated_as_often_as_sapo(fake, algo, env_id):
    result = br.train(br.Args(algo=algo, env_id=env_id, name="run"))
    table = rows("run")
    assert [row["global_step"] for row in table] == ["64", "128", "160"]
    assert float(table[-1]["eval/return"]) == result["eval/return"]
    assert all(float(row["train_time"]) <= float(row["wall_time"]) for row in table)


def test_a_missing_library_is_one_line(tmp_path):
    if importlib.util.find_spec("stable_baselines3"):
        pytest.skip("stable-baselines3 is installed: there is nothing missing to report")
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/baselines_rewarped.py"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert (
        result.returncode == 1 and result.stderr.strip().splitlines()[-1] == f"error: {br.INSTALL}"
    )
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


# --- Trajectory optimisation ----------------------------------------------------------------------
def test_trajopt_is_adam_on_the_actions(fake):
    """Three iterations against a plan optimised by hand: evaluation's starts, undiscounted, whole episodes."""
    result = tr.train(tr.Args(env_id="Fake", iterations=3, lr=0.05, name="plan", device="cpu"))
    torch.manual_seed(1)
    plan = torch.nn.Parameter(torch.zeros(20, 4, 2).uniform_(-1, 1))
    adam, returns = torch.optim.Adam([plan], 0.05, betas=(0.7, 0.95)), []
    for _ in range(4):
        env, total = PointMass(4), 0.0
        env.reset(seed=sr.EVAL_SEED)
        for t in range(20):
            total = total + env.step(plan[t])[1].sum()
        returns.append(float(total.detach()) / 4)
        if len(returns) == 4:
            break
        adam.zero_grad()
        (-total / 80).backward()
        adam.step()
        plan.data.clamp_(-1, 1)
    torch.testing.assert_close(torch.load("runs/plan/plan.pt")["plan"], plan.data)
    found = rows("plan")
    assert [float(row["eval/return"]) for row in found] == pytest.approx(returns, rel=1e-5)
    assert returns == sorted(returns) and result["global_step"] == 3 * 80
    with pytest.raises(ValueError, match="^runs/plan exists: choose another --name$"):
        tr.train(tr.Args(env_id="Fake", name="plan", device="cpu"))


def test_trajopt_has_the_published_settings():
    args = tr.parse_args(["--env-id", "HandFlip", "--device", "cpu"])
    assert (args.iterations, args.first, args.lr) == (50, "zeros", 1e-2)
    args = tr.parse_args(["--env-id", "HandReorient", "--iterations", "3", "--device", "cpu"])
    assert (args.iterations, args.first, args.lr) == (3, "uniform", 0.1)


# --- Loss landscape and gradients -----------------------------------------------------------------
def test_the_landscape_is_drawn_through_the_present_weights(fake):
    sr.train(
        sr.Args(
            env_id="Fake", name="run", device="cpu", capture_video=False, **sr.tuned("", "", "")
        )
    )
    path = Path("runs/run/checkpoint.pt")
    metrics = lr.main(lr.Args(path, points=3, device="cpu"))
    assert Path("runs/run/landscape.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["gradient norm, median"] > 0 and metrics["share not finite"] == 0
    args, agent = sr.Args(**sr.load(path)["args"]), sr.Policy(path)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    reach, lines = lr.landscape(agent, PointMass(4), args, 3, seed=1)
    assert reach == [-1, 0, 1] and lines.shape == (3, 3, 2)
    assert torch.equal(lines[0, 1], lines[2, 1]) and not torch.equal(lines[0, 0], lines[2, 0])
    with torch.no_grad():
        torch.testing.assert_close(lines[0, 1], torch.stack(lr.losses(agent, PointMass(4), args)))
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_norms_of_environments_and_outliers_by_hand():
    probe = lr.Probe(PointMass(5))
    grads = torch.zeros(2, 5, 2)  # two steps, five environments
    grads[0, :, 0], grads[1, :, 1] = 0.3, 0.4
    grads[:, 4] *= 30
    probe.grads = list(grads)
    norms = [probe.metrics()[f"gradient norm, {name}"] for name in ("median", "largest")]
    assert norms == pytest.approx([5.0, 150.0])  # 0.5 x N T
    assert probe.metrics()["share above ten medians"] == pytest.approx(0.2)
    probe.grads[0][0] = math.nan
    assert probe.metrics()["share not finite"] == pytest.approx(0.1)


def test_time_in_the_simulation_is_measured_both_ways(monkeypatch):
    clock = iter(range(1, 1000))
    monkeypatch.setattr(lr.Probe, "now", lambda self: next(clock))
    probe = lr.Probe(PointMass(4))
    agent = SimpleNamespace(weight=torch.ones((), requires_grad=True))
    for _ in range(3):
        rewards = probe.step(agent.weight * torch.ones(4, 2))[1]
    assert probe.forward == 3  # one tick between each two readings
    rewards.sum().backward()
    assert probe.backward == 3 and len(probe.grads) == 3
