"""ManiSkill behind the contract. Most tests need mani_skill and a Vulkan driver; skipped, they say how to get them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import maniskill
from envs.maniskill import processes
from envs.maniskill.patches import patches

ROOT = Path(__file__).resolve().parents[1]
INSTALL = 'mani_skill is not installed: pip install -e ".[maniskill]"'
installed = importlib.util.find_spec("mani_skill") is not None
needs_maniskill = pytest.mark.skipif(not installed, reason=INSTALL)
SMALL = dict(seed=1, render_size=32, video_size=64)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def load_install_script():
    spec = importlib.util.spec_from_file_location(
        "install_vulkan", ROOT / "scripts" / "install_software_vulkan.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vulkan():
    """Skips unless SAPIEN's renderer starts; asked in another process, which a broken driver may crash."""
    if not installed:
        pytest.skip(INSTALL)
    probe = "from envs.maniskill.vulkan import *; use_software_vulkan(); import sapien as s; check_vulkan(s, 'pci:0')"
    done = run_python(probe)
    if done.returncode != 0:
        pytest.skip(
            f"no Vulkan driver: python scripts/install_software_vulkan.py ({done.stderr.strip()[-200:]})"
        )


@pytest.fixture(scope="module")
def env(vulkan):
    env = maniskill.make(
        "PickCube-v1", 2, "cpu", num_workers=0, asymmetric=True, stagger=False, **SMALL
    )
    yield env
    env.close()


def actions(env, steps: int, seed: int = 0) -> torch.Tensor:
    return (
        torch.rand(
            steps, env.num_envs, env.action_dim, generator=torch.Generator().manual_seed(seed)
        )
        * 2
        - 1
    )


# ----- without mani_skill -----


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(maniskill.env, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        maniskill.make("PickCube-v1", 1, "cpu", seed=1)
    assert 'pip install -e ".[maniskill]"' in str(error.value) and "\n" not in str(error.value)


def test_importing_the_module_imports_no_simulator():
    done = run_python(
        "import sys; from envs import maniskill; print([m for m in sys.modules if 'sapien' in m])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_gpu_simulation_needs_a_cuda_device(monkeypatch):
    monkeypatch.setattr(maniskill.env, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        maniskill.make("PickCube-v1", 1, "cpu", seed=1, sim_backend="physx_cuda")


def test_episode_seeds_repeat_and_differ():
    seeds = {maniskill.episode_seed(s, w, e) for s in range(4) for w in range(8) for e in range(8)}
    assert len(seeds) == 4 * 8 * 8 and all(0 <= s < 2**31 for s in seeds)
    assert maniskill.episode_seed(3, 2, 1) == maniskill.episode_seed(3, 2, 1)


def test_driver_cache_is_used_only_where_no_driver_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.setenv("CLEANROBOT_VULKAN_DIR", str(tmp_path))
    assert not maniskill.use_software_vulkan()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libvulkan_lvp.so").write_bytes(b"")
    (tmp_path / "lvp_icd.json").write_text("{}")
    monkeypatch.setenv("VK_ICD_FILENAMES", "/users/own.json")
    assert (
        not maniskill.use_software_vulkan() and os.environ["VK_ICD_FILENAMES"] == "/users/own.json"
    )
    monkeypatch.delenv("VK_ICD_FILENAMES")
    assert maniskill.use_software_vulkan() and os.environ["VK_ICD_FILENAMES"] == str(
        tmp_path / "lvp_icd.json"
    )
    monkeypatch.delenv("VK_ICD_FILENAMES")


def test_install_script_says_what_to_do_elsewhere(tmp_path):
    (tmp_path / "os-release").write_text(
        'ID=ubuntu\nVERSION_CODENAME=noble\nPRETTY_NAME="Ubuntu 24.04 LTS"\n'
    )
    with pytest.raises(SystemExit, match="Ubuntu 24.04 LTS.*apt-get install mesa-vulkan-drivers"):
        load_install_script().check_system(tmp_path / "os-release")


def test_install_script_and_module_agree_on_the_folder(monkeypatch):
    monkeypatch.delenv("CLEANROBOT_VULKAN_DIR", raising=False)
    assert load_install_script().DEFAULT_DIR == maniskill.vulkan_cache()


# ----- with a stand-in for ManiSkill's simulation -----


class FakeBatch:
    """One number that the first action moves; its first value is the seed's. NaN where an action is 1."""

    def __init__(self, options, num_envs):
        self.value = np.zeros(1)

    def describe(self):
        return dict(action_dim=2, state_dim=1, privileged_dim=0, image_shape=[4, 4, 3], max_episode_steps=5,
                    control_hz=20.0, cameras={"base_camera": {}})  # fmt: skip

    def _obs(self):
        rgb = torch.full((1, 4, 4, 3), int(abs(self.value[0]) * 100) % 256, dtype=torch.uint8)
        return dict(rgb=rgb, state=torch.tensor(self.value[None], dtype=torch.float32))

    def reset(self, seeds):
        self.value = np.random.RandomState(int(seeds[0])).rand(1)
        return self._obs()

    def step(self, actions, ends, seeds):
        bad, last = np.array([bool(actions[0, 0] == 1)]), self._obs()
        self.value = self.value + actions[0, :1].numpy()
        obs = last if bad[0] else self._obs()
        final_obs = obs if ends[0] or bad[0] else None
        rewards = obs["state"][:, 0] * float(~bad[0])
        if final_obs is not None:
            obs = self.reset(seeds)
        return dict(obs=obs, final_obs=final_obs, rewards=rewards, success=rewards > 0.8, bad=bad)

    def set_clock(self, clock):
        pass

    def get_state(self):
        return {"actors": {"cube": self.value.copy()}}

    def set_state(self, state, seeds, clock):
        self.value = state["actors"]["cube"].copy()
        return self._obs()

    def close(self):
        pass


def fake_env(monkeypatch, num_envs=3, **options):
    monkeypatch.setattr(maniskill.env, "find_spec", lambda name: True)
    monkeypatch.setattr(processes, "Batch", FakeBatch)
    return maniskill.make("PickCube-v1", num_envs, "cpu", num_workers=0, **options)


def test_a_state_from_a_file_continues_bit_for_bit(monkeypatch, tmp_path):
    """All of our own bookkeeping; what ManiSkill itself can continue is tested below, with it."""
    env = fake_env(monkeypatch, seed=3, stagger=True)
    plan = torch.rand(30, 3, 2, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    for actions in plan[:12]:
        env.step(actions)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    other = fake_env(monkeypatch, seed=99)
    other.load_state_dict(saved)
    for actions in plan[12:]:
        ours, theirs = env.step(actions), other.step(actions)
        assert torch.equal(ours[0]["state"], theirs[0]["state"])
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[3], theirs[3])
        assert all(
            torch.equal(value, theirs[4]["episode"][k]) for k, value in ours[4]["episode"].items()
        )
    with pytest.raises(ValueError, match="the state is of 3 environments, here are 2"):
        fake_env(monkeypatch, 2).load_state_dict(saved)


def test_what_breaks_is_reset_alone(monkeypatch):
    env = fake_env(monkeypatch, seed=3)
    before, actions = env.reset(3), torch.zeros(3, 2)
    actions[1, 0] = 1.0
    obs, rewards, _, truncations, info = env.step(actions)
    assert (
        truncations.tolist() == [False, True, False]
        and int(env.nan_resets) == 1
        and rewards[1] == 0
    )
    assert torch.equal(info["final_obs"]["state"][1], before["state"][1])
    assert not torch.equal(obs["state"][1], before["state"][1])


# ----- with mani_skill -----


@needs_maniskill
def test_missing_driver_is_one_line(tmp_path):
    code = "from envs import maniskill\nmaniskill.make('PickCube-v1', 1, 'cpu', seed=1)"
    done = run_python(
        code, CLEANROBOT_VULKAN_DIR=str(tmp_path), VK_ICD_FILENAMES=str(tmp_path / "none.json")
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("RuntimeError: no Vulkan driver")
        and "scripts/install_software_vulkan.py" in last
    )


def test_wrong_choices_are_one_line(vulkan):
    for kwargs, message in (
        (dict(env_id="PickCub-v1"), "no task 'PickCub-v1'; did you mean PickCube-v1"),
        (
            dict(env_id="PickCube-v1", control_mode="telepathy"),
            "no control mode 'telepathy'; choose one of: pd_joint",
        ),
        (
            dict(env_id="UnitreeG1Stand-v1"),
            "no reward mode 'normalized_dense'; choose one of: sparse",
        ),
        (dict(env_id="PickSingleYCB-v1"), "download_asset ycb"),
    ):
        with pytest.raises((ValueError, RuntimeError)) as error:
            maniskill.make(num_envs=1, device="cpu", seed=1, **kwargs)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_contract(env):
    assert (env.action_dim, env.state_dim, env.privileged_dim, env.image_shape) == (
        8,
        29,
        42,
        (32, 32, 3),
    )
    assert (env.max_episode_steps, env.control_hz) == (50, 20.0)
    assert json.loads(json.dumps(env.spec)) == env.spec
    assert sum(size for _, size in env.spec["state_layout"]) == env.state_dim
    for obs in (env.reset(5), env.step(actions(env, 1)[0])[0]):
        assert (
            obs["rgb"].shape == (2, 32, 32, 3)
            and obs["rgb"].dtype == torch.uint8
            and obs["rgb"].float().std() > 10
        )
        assert obs["state"].shape == (2, 29) and obs["state"].dtype == torch.float32
        assert obs["privileged"].shape == (2, 42) and obs["privileged"].dtype == torch.float32
    picture = env.render((1, 0), size=48)
    assert picture.shape == (2, 48, 48, 3) and picture.dtype == np.uint8 and picture.std() > 10
    np.testing.assert_array_equal(env.render((0,), 32, "base_camera")[0], obs["rgb"][0].numpy())
    with pytest.raises(ValueError, match="no camera 'elbow'; choose one of: third, base_camera"):
        env.render(camera="elbow")
    with pytest.raises(ValueError, match=r"shape \(2, 8\)"):
        env.step(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"environments \[1\] are not finite"):
        env.step(torch.tensor([[0.0] * 8, [float("nan")] * 8]))


def test_an_episode_ends_by_time_and_is_reported(env):
    first = env.reset(5)
    total = torch.zeros(2)
    for step, action in enumerate(actions(env, 50)):
        obs, rewards, terminations, truncations, info = env.step(action)
        total += rewards
        assert not terminations.any() and truncations.all() == (step == 49) == truncations.any()
        if step < 49:
            assert info["final_obs"]["rgb"] is obs["rgb"]
    assert info["episode"]["length"].tolist() == [50, 50]
    torch.testing.assert_close(info["episode"]["return"], total)
    assert info["final_obs"]["rgb"].shape == obs["rgb"].shape
    assert (
        info["final_obs"]["state"] - obs["state"]
    ).abs().max() > 0.1  # the arm jumped back to its start
    second = env.step(torch.zeros(2, 8))
    assert second[4]["episode"]["length"].tolist() == [1, 1]
    again = env.reset(5)
    assert all(torch.equal(again[key], first[key]) for key in first)
    following = env.reset()
    assert all(
        torch.equal(following[key], obs[key]) for key in first
    )  # the episode after seed 5's first
    assert not torch.equal(first["rgb"][0], first["rgb"][1])


def test_same_as_maniskills_own_wrappers(env):
    """Rewards, states and the observation before a reset equal those of ManiSkill's vector and flatten wrappers."""
    import gymnasium
    from mani_skill.utils.wrappers.flatten import FlattenRGBDObservationWrapper
    from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv

    size = dict(width=32, height=32, shader_pack="minimal")
    with patches(cpu=True, light_visuals=True):
        inner = gymnasium.make(
            "PickCube-v1",
            num_envs=1,
            obs_mode="rgb",
            control_mode="pd_joint_delta_pos",
            reward_mode="normalized_dense",
            sim_backend="physx_cpu",
            render_backend="pci:0",
            sensor_configs=size,
        )
    reference = ManiSkillVectorEnv(
        FlattenRGBDObservationWrapper(inner, depth=False), ignore_terminations=True
    )
    obs = env.reset(9)
    theirs, _ = reference.reset(seed=maniskill.episode_seed(9, 0, 0))
    for step, action in enumerate(actions(env, 50, seed=3)):
        torch.testing.assert_close(obs["state"][:1], theirs["state"].float())
        assert torch.equal(obs["rgb"][:1], theirs["rgb"])
        obs, rewards, _, truncations, info = env.step(action)
        theirs, their_rewards, _, their_truncations, their_info = reference.step(action[:1].clone())
        torch.testing.assert_close(rewards[:1], their_rewards.float())
        assert bool(truncations[0]) == bool(their_truncations[0]) == (step == 49)
    torch.testing.assert_close(
        info["final_obs"]["state"][:1], their_info["final_observation"]["state"].float()
    )
    assert torch.equal(info["final_obs"]["rgb"][:1], their_info["final_observation"]["rgb"])
    assert bool(info["success"][0]) == bool(their_info["final_info"]["success"][0])
    reference.close()


def test_privileged_is_the_tasks_state_observation(env):
    """It begins with what the policy has too, and holds the cube's pose; the policy's state holds no part of it."""
    obs = env.reset(4)
    base = env._simulation.batches[0].base
    cube, goal = base.cube.pose.raw_pose[0], base.goal_site.pose.p[0]
    assert torch.equal(obs["privileged"][0, :29], obs["state"][0])
    torch.testing.assert_close(obs["privileged"][0, 29:36], cube)
    torch.testing.assert_close(obs["privileged"][0, 39:42], goal - cube[:3])
    assert not any("obj" in name for name, _ in env.spec["state_layout"])


def test_partial_reset_gives_the_seeds_episode(env):
    """The reset that the GPU's batch uses for some of its environments, taken here by a batch of one."""
    batch = env._simulation.batches[0]
    expected = batch.reset(np.array([123]))
    batch.reset(np.array([5]))
    batch.n = 2
    try:
        obs = batch._reset_some(np.array([0]), np.array([123, 9]), broken=False)
    finally:
        batch.n = 1
    assert all(torch.equal(obs[key], expected[key]) for key in expected)


def test_broken_physics_resets_that_world_alone(env):
    before = env.reset(2)
    count = int(env.nan_resets)
    env._simulation.batches[1].base.agent.robot.set_qpos(torch.full((1, 9), float("nan")))
    obs, rewards, terminations, truncations, info = env.step(torch.zeros(2, 8))
    assert (
        truncations.tolist() == [False, True]
        and not terminations.any()
        and int(env.nan_resets) == count + 1
    )
    assert all(torch.isfinite(obs[key].float()).all() for key in obs)
    assert float(rewards[1]) == 0.0 and torch.equal(
        info["final_obs"]["state"][1], before["state"][1]
    )
    later = [env.step(torch.zeros(2, 8)) for _ in range(3)]
    assert all(torch.isfinite(out[0]["state"]).all() and not out[3].any() for out in later)


def test_state_dict_resumes(env, tmp_path):
    """Close within an episode (contact caches are not exported), and equal from the next episode on."""
    env.reset(7)
    plan = actions(env, 70, seed=1)
    for action in plan[:20]:
        env.step(action)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    expected = [env.step(action) for action in plan[20:]]
    env.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step, action in enumerate(plan[20:]):
        out = env.step(action)
        exact = step >= 29
        torch.testing.assert_close(
            out[0]["state"], expected[step][0]["state"], atol=0 if exact else 1e-3, rtol=0
        )
        assert torch.equal(out[3], expected[step][3])
        torch.testing.assert_close(
            out[4]["episode"]["return"], expected[step][4]["episode"]["return"]
        )


def test_workers_give_the_same_worlds_as_one_process(env):
    workers = maniskill.make(
        "PickCube-v1", 2, "cpu", num_workers=2, asymmetric=True, stagger=True, **SMALL
    )
    try:
        # staggered: the second environment's first episode began half-way through its clock
        plan = actions(env, 50, seed=2)
        ends = [workers.step(action)[3].tolist() for action in plan]
        assert [i for i, end in enumerate(ends) if end[1]] == [24] and [
            i for i, end in enumerate(ends) if end[0]
        ] == [49]
        ours, theirs = env.reset(6), workers.reset(6)
        for action in plan:
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            ours, rewards, _, ended, info = env.step(action)
            theirs, their_rewards, _, their_ended, their_info = workers.step(action)
            assert torch.equal(rewards, their_rewards) and torch.equal(ended, their_ended)
        assert ended.all() and torch.equal(info["final_obs"]["rgb"], their_info["final_obs"]["rgb"])
        np.testing.assert_array_equal(env.render((1,), 64), workers.render((1,), 64))
        with pytest.raises(ValueError, match="no camera"):
            workers.render(camera="elbow")
        workers._simulation.processes[1].kill()
        with pytest.raises(RuntimeError, match=r"worker 1 of 2 died \(exit code -9\)"):
            workers.step(plan[0])
    finally:
        workers.close()


def test_exact_patches_draw_what_maniskill_draws(vulkan):
    """Without `light_visuals` the patches change no pixel by more than one level."""
    code = """
import numpy as np, torch, gymnasium, sys
from envs import maniskill
maniskill.use_software_vulkan()
import mani_skill.envs
import mani_skill.envs.utils.system.backend as backend
from envs.maniskill.patches import patches
kwargs = dict(num_envs=1, obs_mode="rgb", control_mode="pd_joint_delta_pos", sim_backend="physx_cpu",
              render_backend="pci:0", sensor_configs=dict(width=64, height=64, shader_pack="minimal"))
with patches(cpu=True, light_visuals=False):
    ours = gymnasium.make("PickCube-v1", **kwargs)
parse = backend.parse_backend_device_id
backend.parse_backend_device_id = lambda name: (name, None) if name.startswith("pci:") else parse(name)
stock = gymnasium.make("PickCube-v1", **kwargs)
a, b = (e.reset(seed=3)[0]["sensor_data"]["base_camera"]["rgb"].int() for e in (ours, stock))
print("difference", int((a - b).abs().max()), "pixels", int(((a - b) != 0).any(-1).sum()))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    assert (
        int(words[words.index("difference") + 1]) <= 1
        and int(words[words.index("pixels") + 1]) <= 8
    )


def test_several_cameras_and_several_robots(vulkan):
    env = maniskill.make("TwoRobotPickCube-v1", 1, "cpu", **SMALL)
    assert (
        env.image_shape == (32, 32, 3 * len(env.spec["cameras"])) and len(env.spec["cameras"]) == 3
    )
    assert env.action_dim == 16 and env.max_episode_steps == 100
    obs = env.step(torch.zeros(1, 16))[0]
    np.testing.assert_array_equal(
        env.render((0,), 32, list(env.spec["cameras"])[1])[0], obs["rgb"][0, ..., 3:6].numpy()
    )
    env.close()
