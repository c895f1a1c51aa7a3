"""robosuite's tasks and their experts. Most tests need robosuite, which has an environment of its own:

    make robosuite && .venv-robosuite/bin/python -m pytest tests/test_robosuite.py

What is ours alone (bookkeeping of episodes, rotations, pins) is tested everywhere, with a stand-in for robosuite.
"""

import importlib.machinery
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import robosuite
from envs.robosuite import expert as scripted

ROOT = Path(__file__).resolve().parents[1]
installed = importlib.util.find_spec("robosuite") is not None
needs_robosuite = pytest.mark.skipif(
    not installed, reason="robosuite is not installed: make robosuite"
)
TASKS = [f"robosuite/{name}" for name in scripted.PHASES]


def make(env_id="robosuite/Lift", num_envs=1, **options):
    return robosuite.make(
        env_id, num_envs, **{"seed": 1, "images": False, "stagger": False, **options}
    )


# --- the environment's pins -------------------------------------------------------------------------------------------
def test_requirements_are_pinned_and_fit_the_project():
    lines = (ROOT / "requirements-robosuite.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    version = {
        name: tuple(int(x) for x in re.findall(r"\d+", text)[:2]) for name, text in pins.items()
    }
    assert (3, 3) <= version["mujoco"] < (3, 9) and version["numpy"] < (2, 0)
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, pinned in (text.split("==") for text in core):
        if name != "numpy":
            assert pins[name] == pinned, f"{name} differs from the project's own pin"
    assert not any("mimicgen" in name for name in pins), (
        "the index's package of this name is not the one that is meant"
    )


@pytest.mark.skipif(installed, reason="robosuite is installed here")
def test_without_robosuite_there_is_one_clear_line():
    with pytest.raises(ImportError, match="environment of its own: make robosuite"):
        make()
    done = subprocess.run(
        [sys.executable, "-m", "envs.robosuite.expert"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        done.returncode == 1 and "make robosuite" in done.stderr and "Traceback" not in done.stderr
    )


# --- a stand-in for robosuite -----------------------------------------------------------------------------------------
class FakeTask:
    """A point that moves by the action; success beyond 1; `bad` makes the physics of its next step diverge."""

    made = []

    def __init__(self, name, seed=None, robots="Panda", **options):
        self.rng, self.robots, self.options, self.bad = (
            np.random.default_rng(seed),
            robots,
            options,
            False,
        )
        self.action_spec = (-np.ones(7), np.ones(7))
        self._observables = {"cube_pos": types.SimpleNamespace(modality="object")}
        data = types.SimpleNamespace(
            _data=types.SimpleNamespace(qpos=np.zeros(3), qvel=np.zeros(3), time=1.0)
        )
        model = types.SimpleNamespace(_model=types.SimpleNamespace(ncam=0))
        self.sim = types.SimpleNamespace(data=data, model=model)
        FakeTask.made.append(self)

    def _obs(self):
        return {
            "robot0_eef_pos": self.place.copy(), "robot0_gripper_qpos": np.zeros(2), "robot0_eef_quat": np.arange(4.0),
            "robot0_joint_pos": np.zeros(7), "cube_pos": 2 * self.place, "object-state": 2 * self.place,
        }  # fmt: skip

    def reset(self):
        self.place = self.rng.uniform(-0.1, 0.1, 3)
        return self._obs()

    def step(self, action):
        self.place = self.place + 0.1 * action[:3]
        self.sim.data._data.qpos[0] = np.nan if self.bad else 0.0
        self.bad = False
        return self._obs(), 0.0, False, {}

    def _check_success(self):
        return self.place[0] > 1.0

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("robosuite")
    module.__spec__ = importlib.machinery.ModuleSpec("robosuite", None)
    module.make, module.ALL_ENVIRONMENTS = FakeTask, {"Lift", "Wipe", "TwoArmLift"}
    monkeypatch.setitem(sys.modules, "robosuite", module)
    monkeypatch.setattr(FakeTask, "made", [])


def test_contract_of_the_environment(fake):
    env = make(num_envs=2, workers=0, asymmetric=True, max_episode_steps=4)
    assert (env.action_dim, env.state_dim, env.privileged_dim, env.control_hz) == (7, 9, 12, 20.0)
    assert env.layout["state"] == [
        ("robot0_eef_pos", 3),
        ("robot0_eef_quat", 4),
        ("robot0_gripper_qpos", 2),
    ]
    first = env.obs
    assert torch.equal(first["privileged"][:, :9], first["state"])
    assert torch.allclose(env.fact("cube_pos"), 2 * first["state"][:, :3])
    assert not torch.equal(first["state"][0], first["state"][1]), (
        "each environment has episodes of its own"
    )
    push = torch.zeros(2, 7)
    push[0, 0] = 7.0  # clamped to 1
    for t in range(4):
        before = env.obs
        obs, rewards, terminations, truncations, info = env.step(push)
        assert torch.allclose(info["final_obs"]["state"][0, 0], before["state"][0, 0] + 0.1)
        assert truncations.tolist() == [t == 3] * 2 and not terminations.any() and not rewards.any()
    assert torch.equal(info["episode"]["length"], torch.tensor([4, 4])) and env.clock.tolist() == [
        0,
        0,
    ]
    assert not torch.allclose(obs["state"], info["final_obs"]["state"]) and torch.equal(
        obs["state"], env.obs["state"]
    )
    assert torch.equal(env.reset(1)["state"], first["state"])
    with pytest.raises(KeyError, match="has no Can_pos; it has robot0_eef_pos"):
        env.fact("Can_pos")


def test_success_is_rewarded_and_ends_nothing(fake):
    env = make(workers=0, max_episode_steps=20)
    push = torch.zeros(1, 7)
    push[0, 0] = 1.0
    total = 0.0
    for t in range(20):
        _, rewards, terminations, truncations, info = env.step(push)
        assert (
            bool(info["success"]) == bool(rewards > 0)
            and not terminations.any()
            and truncations.item() == (t == 19)
        )
        total += rewards.item()
    assert total == info["episode"]["return"].item() > 5
    assert info["episode"]["success_once"].all() and info["episode"]["success_at_end"].all()


def test_success_ends_an_episode_where_it_is_asked_to(fake):
    """At a time-out too it is the success that counts; an environment that failed there is truncated."""
    env = make(num_envs=3, workers=0, max_episode_steps=13, end_on_success=True)
    push, ends = torch.zeros(3, 7), []
    push[0, 0], push[1, 0] = 1.0, 0.5
    for task, start in zip(FakeTask.made, (0.0, 0.38, 0.0), strict=True):
        task.place[:] = start  # beyond 1 after 11 steps, after 13, never
    for t in range(13):
        _, rewards, terminations, truncations, info = env.step(push)
        over = (terminations | truncations).nonzero()[:, 0].tolist()
        ends += [(t, i, bool(terminations[i]), bool(truncations[i])) for i in over]
        assert torch.equal(terminations, info["success"]) and torch.equal(terminations, rewards > 0)
    assert ends == [(10, 0, True, False), (12, 1, True, False), (12, 2, False, True)]
    assert info["episode"]["length"].tolist() == [2, 13, 13] and env.clock.tolist() == [2, 0, 0]


def test_staggered_and_restarted_worlds(fake):
    env = make(num_envs=4, workers=0, stagger=True, max_episode_steps=8)
    assert env.clock.tolist() == [0, 2, 4, 6]
    before = env.obs["state"].clone()
    obs = env.restart(torch.tensor([False, True, False, False]))
    assert env.clock.tolist() == [0, 0, 4, 6]
    assert torch.equal(obs["state"][0], before[0]) and not torch.equal(obs["state"][1], before[1])


def test_a_diverged_world_is_restarted_alone(fake):
    env = make(num_envs=2, workers=0)
    env.step(torch.ones(2, 7))
    before = env.obs["state"].clone()
    FakeTask.made[1].bad = True
    obs, rewards, _, truncations, info = env.step(torch.ones(2, 7))
    assert (
        truncations.tolist() == [False, True]
        and int(env.nan_resets) == 1
        and torch.isfinite(obs["state"]).all()
    )
    assert torch.equal(info["final_obs"]["state"][1], before[1]) and env.clock.tolist() == [2, 0]


def test_saved_state_continues_exactly(fake, tmp_path):
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(40, 3, 7, generator=generator) * 2 - 1
    one = make(num_envs=3, workers=0, stagger=True, max_episode_steps=12)
    for a in actions[:17]:
        one.step(a)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    two = make(num_envs=3, workers=0, seed=5, max_episode_steps=12)
    two.step(actions[0])
    two.load_state_dict(saved)
    assert torch.equal(one.obs["state"], two.obs["state"])
    for a in actions[17:]:
        (x, *_, i), (y, *_, j) = one.step(a), two.step(a)
        assert torch.equal(x["state"], y["state"]) and torch.equal(
            i["episode"]["length"], j["episode"]["length"]
        )
    with pytest.raises(ValueError, match="has num_envs 3, this one has 1"):
        make(workers=0).load_state_dict(saved)


@pytest.mark.parametrize(
    "env_id, options, error, line",
    [
        ("robosuite/Dance", {}, ValueError, "robosuite has no task 'Dance'; it has Lift"),
        ("robosuite/TwoArmBoxCleanup", {}, ImportError, "DexMimicGen, which is not installed"),
        ("robosuite/Lift", {"look": "pretty"}, ValueError, "look must be"),
        ("robosuite/Lift", {"num_envs": 0}, ValueError, "num_envs must be at least 1"),
        (
            "robosuite/Lift",
            {"images": True, "cameras": ("top",)},
            ValueError,
            "Lift has no camera top",
        ),
    ],
)
def test_impossible_wishes_get_one_clear_line(fake, env_id, options, error, line):
    with pytest.raises(error, match=re.escape(line)) as caught:
        make(env_id, **options)
    assert "\n" not in str(caught.value)


def test_robots_of_a_task(fake):
    assert make("robosuite/TwoArmLift").env_args["env_kwargs"]["robots"] == ["Panda", "Panda"]
    env = make("robosuite/Wipe", env_kwargs={"robots": "Sawyer"})
    assert FakeTask.made[-1].robots == "Sawyer" and env.max_episode_steps == 400
    with pytest.raises(
        ValueError, match="no scripted expert for robosuite/Wipe; there are for Lift"
    ):
        scripted.Expert(env)


def test_seeds_of_episodes_differ():
    seeds = {robosuite.episode_seed(s, w, e) for s in range(4) for w in range(8) for e in range(8)}
    assert len(seeds) == 256 and robosuite.episode_seed(1, 2, 3) == robosuite.episode_seed(1, 2, 3)


# --- rotations of the experts -----------------------------------------------------------------------------------------
def test_rotations_against_the_exponential_map():
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(
        torch.randn(50, 3, generator=generator, dtype=torch.float64), dim=1
    )
    angle = torch.rand(50, 1, generator=generator, dtype=torch.float64) * 3.0
    quat = torch.cat((axis * (angle / 2).sin(), (angle / 2).cos()), 1)
    zero = torch.zeros(50, dtype=torch.float64)
    x, y, z = (axis * angle).unbind(1)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), 1).view(-1, 3, 3)
    expected = torch.linalg.matrix_exp(skew)
    assert torch.allclose(scripted.matrix(quat), expected)
    assert torch.allclose(scripted.rotation_vector(expected), axis * angle, atol=1e-7)
    assert not scripted.rotation_vector(torch.eye(3)[None]).any()


def test_a_gripper_that_points_down():
    turn = torch.tensor([0.0, 0.7, -2.0])
    down = scripted.pointing_down(turn)
    assert torch.allclose(down @ down.transpose(1, 2), torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(down), torch.ones(3)) and (down[:, 2, 2] == -1).all()
    # From turn 0 to `turn` is a rotation about the vertical by `turn`.
    spin = scripted.rotation_vector(down @ down[:1].transpose(1, 2).expand(3, 3, 3))
    assert torch.allclose(spin, torch.stack((0 * turn, 0 * turn, turn), 1), atol=1e-6)
    wrapped = scripted.wrap(torch.tensor([3.5, -0.9, 0.9]), math.pi / 2)
    assert torch.allclose(
        wrapped, torch.tensor([3.5 - math.pi, -0.9 + math.pi / 2, 0.9 - math.pi / 2])
    )


def test_turns_for_the_square_nut():
    """For any turn of the nut: fingers across the handle, nut square to the peg, handle not away from the arm."""
    item = torch.linspace(-math.pi, math.pi, 181)
    quat = torch.stack((0 * item, 0 * item, (item / 2).sin(), (item / 2).cos()), 1)
    facts = {"SquareNut_quat": quat, "SquareNut_pos": torch.zeros(181, 3)}
    env = types.SimpleNamespace(
        env_id="robosuite/NutAssemblySquare", num_envs=181, fact=facts.__getitem__
    )
    expert = scripted.Expert(env)
    assert scripted.wrap(expert.grasp - item, math.pi).abs().max() < 1e-5
    nut = item + expert.final - expert.grasp
    assert scripted.wrap(nut, math.pi / 2).abs().max() < 1e-5
    assert (
        (nut.cos() < 0.5).all()
        and expert.grasp.abs().max() <= 1.6
        and expert.final.abs().max() <= 1.6
    )


# --- with robosuite ---------------------------------------------------------------------------------------------------
@needs_robosuite
@pytest.mark.parametrize("env_id", TASKS)
def test_expert_solves_the_task(env_id):
    env = make(env_id)
    found = scripted.run(env, scripted.Expert(env), 3)
    env.close()
    assert all(found), f"steps until success (0: none): {found}"


@needs_robosuite
@pytest.mark.parametrize("env_id", ["robosuite/Lift", "robosuite/PickPlaceCan"])
def test_same_seed_same_episodes_whatever_was_before(env_id):
    """A soft reset forgets the episode before it, bit for bit; so playing an episode again is a way to resume."""
    env = make(env_id, asymmetric=True)
    actions = torch.rand(30, 1, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    runs = []
    for _ in range(2):
        env.reset(3)
        runs.append(torch.stack([env.step(a)[0]["privileged"] for a in actions]))
    assert torch.equal(*runs)
    saved = env.state_dict()
    other = make(env_id, asymmetric=True, seed=9)
    other.step(actions[0])
    other.load_state_dict(saved)
    for a in actions[:5]:
        assert torch.equal(env.step(a)[0]["privileged"], other.step(a)[0]["privileged"])
    env.close(), other.close()


@needs_robosuite
def test_processes_give_the_same_worlds_and_a_dead_one_is_told():
    actions = torch.rand(4, 2, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here, there = make(num_envs=2, workers=0), make(num_envs=2, workers=2)
    assert torch.equal(here.obs["state"], there.obs["state"])
    for a in actions:
        assert torch.equal(here.step(a)[0]["state"], there.step(a)[0]["state"])
    os.kill(there._groups[1].process.pid, signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match="a process of robosuite environments has ended with status -9"
    ):
        for a in actions:
            there.step(a)
    here.close(), there.close()


@needs_robosuite
@pytest.mark.parametrize("look", ["plain", "collision"])
def test_pictures_show_the_scene_and_what_moves(look):
    try:
        env = make("robosuite/Lift", images=True, look=look, render_size=48)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert env.obs["rgb"].shape == (1, 48, 48, 6) and env.obs["rgb"].dtype == torch.uint8
    first = env.obs["rgb"].float()
    assert all(first[..., 3 * k : 3 * k + 3].std() > 10 for k in range(2)), "an empty picture"
    for _ in range(5):
        env.step(torch.tensor([[0.0, 1.0, 0, 0, 0, 0, 1.0]]))
    moved = (env.obs["rgb"].float() - first).abs().amax(-1)
    assert 0.01 < (moved > 20).float().mean() < 1.0
    # Upright: the table fills the lower half of the view from the front, and the arm hangs in from above.
    picture = env.render(size=96)
    assert picture.shape == (1, 96, 96, 3) and picture.std() > 10
    env.close()


@needs_robosuite
def test_other_tasks_by_their_ids():
    env = make("robosuite/TwoArmLift", asymmetric=True)
    assert env.action_dim == 14 and env.state_dim == 18
    names = [name for name, _ in env.layout["state"]]
    assert names == [f"robot{r}_{part}" for r in (0, 1) for part in robosuite.STATE_PARTS]
    env.step(torch.zeros(1, 14))
    env.close()
    with pytest.raises(ImportError, match="DexMimicGen, which is not installed"):
        make("robosuite/TwoArmCoffee")
    with pytest.raises(ValueError, match="robosuite cannot make Lift with"):
        make("robosuite/Lift", env_kwargs={"robots": "Nobody"})


@needs_robosuite
def test_demonstrations_have_robomimics_names(tmp_path):
    demos = pytest.importorskip("envs.demos")
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: make robosuite")
    out = tmp_path / "lift.hdf5"
    done = subprocess.run(
        [sys.executable, "-m", "envs.demos", "--env-id", "robosuite/Lift", "--episodes", "2", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with h5py.File(out) as file:
        assert set(file["data/demo_0/obs"]) == {
            "robot0_eef_pos",
            "robot0_eef_quat",
            "robot0_gripper_qpos",
            "object",
        }
    for demo in demos.read(out):
        first = int(demo["success"].argmax())
        assert demo["success"][first:].all() and len(demo["actions"]) <= first + 11, (
            "it ends soon after success"
        )
        assert demo["obs"]["state"].shape[1] == 9 and demo["obs"]["privileged"].shape[1] == 19
        assert set(np.unique(demo["actions"][:, 6])) <= {-1.0, 1.0}
    about = demos.env_args(out)
    assert (
        about["env_name"] == "Lift"
        and about["type"] == 1
        and about["env_kwargs"]["robots"] == "Panda"
    )
