"""scripts/baselines_rewarped.py: the worlds as the library sees them, and short runs of all four on a point mass."""

import csv
import importlib.util
import subprocess
import sys

import baselines_rewarped as br
import pytest
import sapo_rewarped as sr
import torch
from conftest import ROOT
from fake_env_diff import PointMass

library = pytest.mark.skipif(importlib.util.find_spec("stable_baselines3") is None, reason=br.INSTALL)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Every task is PointMass, with few worlds and steps."""
    def defaults(algo, env_id, size):
        return dict(num_envs=4, horizon=8, eval_episodes=4, eval_freq=64, total_timesteps=160, actor_units=(16,),
                    critic_units=(16,))

    def make(args, device):
        points = "points" in args.env_id
        return PointMass(args.num_envs, seed=args.seed, points=points), PointMass(args.eval_episodes, points=points)

    monkeypatch.setattr(sr, "tuned_defaults", defaults)
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
def test_worlds_report_time_outs_with_the_last_observation():
    env = PointMass(3, horizon=2, points=True)
    worlds, reference = br.make_worlds(env), PointMass(3, horizon=2, points=True)
    obs = worlds.reset()
    reference.reset()
    assert worlds.observation_space.contains({name: value[0] for name, value in obs.items()})
    for t in range(2):
        actions = torch.full((3, 2), 0.5)
        obs, rewards, dones, infos = worlds.step(actions.numpy())
        expected = reference.step(actions)
        assert torch.equal(torch.as_tensor(rewards), expected[1]) and dones.all() == (t == 1)
        assert torch.equal(torch.as_tensor(obs["points"]), expected[0]["points"])
    for world, info in enumerate(infos):
        assert info["TimeLimit.truncated"]
        last = torch.as_tensor(info["terminal_observation"]["state"])
        assert torch.equal(last, expected[-1]["final_obs"]["state"][world])


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
    result = subprocess.run([sys.executable, ROOT / "scripts/baselines_rewarped.py"], cwd=tmp_path, text=True,
                            capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1] == f"error: {br.INSTALL}"
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
