"""scripts/baselines_resfit.py: the queue, kept successes, the residual's environment, IBRL's parts, and short runs."""

import csv
import importlib.util
import subprocess
import sys

import baselines_resfit as br
import bc_chunk as bc
import numpy as np
import pytest
import resfit as rf
import torch
from conftest import ROOT
from fake_env import FakeEnv
from test_bc_chunk import arguments, content_of, demo_files, make_fake, policy  # noqa: F401

pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
import test_resfit as tr  # noqa: E402
from test_resfit import files  # noqa: E402, F401

missing = importlib.util.find_spec("stable_baselines3") is None
library = pytest.mark.skipif(missing, reason=br.INSTALL)


@pytest.fixture(scope="session")
def bases(tmp_path_factory, demo_files):  # noqa: F811
    """An untrained base of FakeEnv as checkpoint and as program."""
    folder = tmp_path_factory.mktemp("bases")
    bc.save(folder / "best.pt", content_of(policy(demos=str(demo_files / "state.hdf5"))))
    bc.export(folder / "best.pt", folder / "base.pt2")
    return folder


@pytest.fixture
def fake(monkeypatch, tmp_path, bases, demo_files):  # noqa: F811
    """Train on FakeEnv in a temporary folder that has base and demonstrations."""
    monkeypatch.setattr(bc, "make_envs", make_fake)
    monkeypatch.chdir(tmp_path)
    for path in (bases / "best.pt", bases / "base.pt2", demo_files / "state.hdf5"):
        (tmp_path / path.name).symlink_to(path)


def options(**changes) -> br.Args:
    values = dict(name="run", num_envs=4, total_timesteps=64, eval_freq=32, rollout=32)
    return br.Args(**values | dict(eval_episodes=4, eval_envs=4) | changes)


def rows() -> list[dict]:
    with open("runs/run/eval.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_environment_has_a_queue_of_its_own():
    asked = []

    def predict(obs):
        asked.append(1)
        steps = torch.arange(4.0) / 10 + len(asked)
        return steps[None, :, None].expand(2, 4, 1)

    queue, seen = br.Queue(predict, 3), []
    for step in range(6):
        seen.append(queue.act({})[:, 0].tolist())
        if step == 1:
            queue.reset(torch.tensor([False, True]))
    first = [1.0, 1.1, 1.2, 3.0, 3.1, 3.2]  # its second chunk is the third that was asked for
    second = [1.0, 1.1, 2.0, 2.1, 2.2, 4.0]
    assert np.array(seen).T.tolist() == pytest.approx(np.array([first, second]), abs=1e-6)


def test_only_successful_episodes_are_kept():
    successes = br.Successes(2)
    for step in range(4):
        seen = {"state": torch.tensor([[step], [10 + step]])}
        final = {"state": seen["state"] + 1}
        ended = torch.tensor([step == 1, step == 2])
        success = torch.tensor([step == 1, False])
        successes.add(seen, torch.full((2, 1), step / 10), final, success, ended)
    (episode,) = successes.episodes
    assert episode["state"].tolist() == [[0], [1], [2]]
    assert episode["actions"].flatten().tolist() == pytest.approx([0, 0.1])
    assert [len(steps) for steps in successes.running] == [2, 1]


def test_filtered_bc_trains_and_writes_what_algos_write(fake):
    result = br.train(options(algo="filtered-bc", base="best.pt", demos="state.hdf5"))
    table = rows()
    assert [row["global_step"] for row in table] == ["0", "32", "64"]
    assert list(table[0])[:4] == ["global_step", "wall_time", "train_time", "eval/success_rate"]
    assert float(table[-1]["eval/success_rate"]) == result["eval/success_rate"]
    assert all(float(row["train_time"]) <= float(row["wall_time"]) for row in table)
    with pytest.raises(ValueError, match="^runs/run exists: choose another --name$"):
        br.train(options(algo="filtered-bc", base="best.pt", demos="state.hdf5"))


def test_filtered_bc_learns_from_its_own_successes(fake, monkeypatch):
    """Half of every batch is from them, once there are some."""
    sizes, update = [], bc.update

    def note(net, optimizer, batch):
        sizes.append(len(batch["actions"]))
        return update(net, optimizer, batch)

    class Easy(FakeEnv):
        def step(self, actions):
            obs, rewards, terminations, truncations, info = super().step(actions)
            return obs, rewards, terminations, truncations, info | {"success": truncations}

    drawn = []
    sample = bc.Chunks.sample

    def note_sample(self, size):
        drawn.append((len(self.ends), size))
        return sample(self, size)

    make = lambda args: Easy(args.eval_envs, cameras=2, asymmetric=True, stagger=False)  # noqa: E731
    monkeypatch.setattr(bc, "make_envs", make)
    monkeypatch.setattr(bc, "update", note)
    monkeypatch.setattr(bc.Chunks, "sample", note_sample)
    monkeypatch.setattr(br, "JOIN", 4)
    br.train(options(algo="filtered-bc", base="best.pt", demos="state.hdf5"))
    assert set(sizes) == {16} and drawn[0][1] == 16
    assert drawn[-1] == (4 * 10, 8) and drawn[-2][1] == 8  # one episode of each environment by then


@library
def test_the_library_sees_the_base_and_corrects_it_within_the_limit(fake):
    predict, about = br.read_base("base.pt2")
    env, reference = make_fake(arguments()), make_fake(arguments())
    queue = br.Queue(predict, about["execute"])
    worker = br.make_residual(env, br.Queue(predict, about["execute"]), False, 0.3, seed=5)
    obs, expected = worker.reset(), reference.reset(seed=5)
    assert worker.observation_space.contains({key: x[0] for key, x in obs.items()})
    for _ in range(12):
        base = queue.act(expected)
        assert np.array_equal(obs["base"], base.numpy())
        assert np.array_equal(obs["state"], bc.observe(expected, False)["state"].numpy())
        residual = np.full((4, 2), -2.0, np.float32)  # beyond the limit
        obs, rewards, dones, infos = worker.step(residual)
        expected, _, _, truncations, info = reference.step((base - 0.3).clamp(-1, 1))
        queue.reset(truncations)
        assert rewards.tolist() == info["success"].float().tolist()
        assert dones.tolist() == truncations.tolist() and infos == [{}] * 4


@library
def test_a_residual_by_ppo_begins_as_the_base_and_learns(fake, monkeypatch):
    obs, found = make_fake(arguments()).reset(seed=3), []

    def evaluate(acting, env, args):
        acting.reset()
        found.append(acting.act(obs))
        return {"eval/success_rate": 0.5}

    monkeypatch.setattr(bc, "evaluate", evaluate)
    result = br.train(options(algo="ppo-residual", base="base.pt2"))
    assert [row["global_step"] for row in rows()] == ["0", "32", "64"]
    assert result == {"eval/success_rate": 0.5, "run": "runs/run"}
    predict, about = br.read_base("base.pt2")
    base = br.Queue(predict, about["execute"]).act(obs)
    assert torch.equal(found[0], base)
    assert not torch.equal(found[-1], base) and (found[-1] - base).abs().max() <= 0.3 + 1e-6


# --- RLPD and IBRL ------------------------------------------------------------------------------
def test_ibrls_losses_gradients_and_actions_are_those_of_f2f0a1a(monkeypatch):
    with br.patch.multiple(rf, **br.IBRL):
        tr.compare_with_golden("ibrl", br.better, monkeypatch, limit=(1.0,))


def test_ibrl_keeps_demonstrations_in_one_buffer_with_the_rest():
    asked = []

    def draw(replay, demos, args):
        asked.append(args.offline)

    br.draw_from_both(range(30), range(10), rf.Args(), draw)
    assert asked == [0.25]


def test_a_base_that_rests_and_a_limit_of_1_leave_the_action_to_the_actor():
    base = br.Still(FakeEnv(5)).act({"state": torch.rand(5, 3)})
    residual, noise = 2 * torch.rand(5, 2) - 1, torch.randn(5, 2)
    limit = torch.ones(2)
    assert torch.equal(base, torch.zeros(5, 2))
    wanted = br.own_action(base, residual, noise, limit)
    assert torch.equal(rf.propose(base, residual, noise, limit), wanted)
    with pytest.raises(ValueError, match="^this base needs the environment"):
        br.Still(None)


@pytest.fixture
def tiny(monkeypatch, tmp_path, files):  # noqa: F811
    """test_resfit's tiny task. -> words of a short run, and of its base"""
    monkeypatch.setattr(rf, "make_envs", tr.make_fakes)
    monkeypatch.chdir(tmp_path)
    words = """--env-id Fake --device cpu --num-envs 3 --total-timesteps 120 --eval-freq 60 --log-freq 30 --heads 4
        --eval-episodes 8 --eval-envs 4 --hidden 8 --batch-size 16 --buffer-size 600 --learning-starts 30 --utd 0.5
        --lr 1e-3 --policy-frequency 2 --actor-lr 1e-3 --no-capture-video --save-buffer"""
    words = [*words.split(), "--demos", str(files / "demos.hdf5")]
    return words, ["--base", str(files / "base.pt2")]


@pytest.mark.parametrize("algo", ["rlpd", "ibrl"])
def test_an_actor_of_its_own_learns_is_resumed_exactly_and_is_not_taken_for_a_residual(tiny, algo):
    words, base = tiny
    base = base if algo == "ibrl" else []
    words = ["--algo", algo, *words, *base]
    assert br.main([*words, "--name", "whole"])["global_step"] == 120
    br.main([*words, "--name", "part", "--total-timesteps", "60"])
    br.main(["--algo", algo, "--resume", "runs/part", "--total-timesteps", "120", *base])
    with br.patch.multiple(rf, ALGO=algo):
        whole, part = (rf.load(f"runs/{name}/checkpoint.pt") for name in ("whole", "part"))
    for key in ("agent", "env", "collector", "replay", "critic_optimizer", "actor_optimizer"):
        torch.testing.assert_close(whole[key], part[key], atol=0, rtol=0)
    data = whole["replay"]["data"]
    moved = (data["actions"] - data["base"]).abs()
    warmup = moved[:10].max()  # random actions, or the base
    assert warmup > 0.9 if algo == "rlpd" else warmup == 0
    assert moved[11:].max() > 0
    out = br.main(["--algo", algo, "--evaluate", "--checkpoint", "runs/whole/best.pt", *base])
    assert out["eval/length"] > 0
    with pytest.raises(ValueError, match="^runs/whole/best.pt is not resfit's$"):
        rf.parse_args(["--evaluate", "--checkpoint", "runs/whole/best.pt"])
    assert rf.critic_loss is not br.larger_loss  # put back


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(algo="filtered-bc", base=""), "give --base FILE"),
        (dict(algo="filtered-bc", base="best.pt"), "filtered-bc needs --demos FILE"),
        (dict(algo="filtered-bc", base="best.pt", demos="x", limit=0.0), "--limit must be above 0"),
    ],
)
def test_what_cannot_work_is_one_line(fake, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        br.train(options(**changes))


@pytest.mark.skipif(not missing, reason="stable-baselines3 is installed: nothing is missing")
def test_a_missing_library_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "scripts/baselines_resfit.py", "--algo", "ppo-residual"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert (
        result.returncode == 1 and result.stderr.strip().splitlines()[-1] == f"error: {br.INSTALL}"
    )
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
