"""Demonstrations: human-like errors, recording, robomimic's layout, and the reader's answers to wrong files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py", reason='h5py is not installed: pip install -e ".[resfit]"')
from fake_env import FakeEnv  # noqa: E402

from envs import demos  # noqa: E402
from envs.demos import reading  # noqa: E402
from envs.demos.__main__ import Args, main  # noqa: E402
from envs.demos.human import SMOOTH  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


class DotExpert:
    """Moves the fake environment's dot to the middle; counts its steps as the phases of a real expert would."""

    def __init__(self, env, fails: bool = False):
        self.env, self.fails = env, fails
        self.phase = self.clock = torch.zeros(env.num_envs, dtype=torch.int64)
        self.resets = []

    def reset(self, worlds=None):
        self.resets.append(worlds)
        mask = torch.ones(self.env.num_envs, dtype=torch.bool) if worlds is None else worlds
        self.clock = torch.where(mask, 0, self.clock)

    def act(self):
        self.clock = self.clock + 1
        away = self.env.place.sign() + 0.01
        return (away if self.fails else -self.env.place / 0.3).clamp(-1, 1)


def dots(num_envs=3, **options):
    env = FakeEnv(num_envs, seed=0, size=8, stagger=False, asymmetric=True, cameras=2)
    return env, DotExpert(env, **options)


def recorded(path, episodes=7, **options):
    env, expert = dots()
    about = {"env_name": "Fake", "type": 2, "env_kwargs": {"camera_names": ["w", "a"]}}
    return demos.record(
        env, expert, path, episodes, env_args=about, cameras=("w", "a"), progress=False, **options
    )  # fmt: skip


# --- recording --------------------------------------------------------------------------------------------------------
def test_what_is_recorded_is_what_happened(tmp_path):
    """The transitions of environment 0's first episode against the same episode stepped by hand."""
    tally = recorded(tmp_path / "f.hdf5")
    assert tally["kept"] == 7 == tally["succeeded"] and tally["steps"] == 70 and tally["tried"] == 7
    env, expert = dots()
    obs, expected = env.reset(0), []
    for _ in range(10):
        actions = expert.act()
        following, _, _, _, info = env.step(actions)
        expected.append((obs, actions, info))
        obs = following
    one = demos.read(tmp_path / "f.hdf5")[0]
    assert len(one["actions"]) == 10 and one["dones"][-1]
    for t, (before, actions, info) in enumerate(expected):
        assert np.array_equal(one["actions"][t], actions[0].numpy())
        assert one["success"][t] == bool(info["success"][0]) and one["rewards"][t] == float(
            info["success"][0]
        )
        for key in ("rgb", "state", "privileged"):
            assert np.array_equal(one["obs"][key][t], before[key][0].numpy())
    for key in (
        "rgb",
        "state",
        "privileged",
    ):  # the true next observation, not the next episode's first
        assert np.array_equal(one["final_obs"][key], expected[-1][2]["final_obs"][key][0].numpy())
    assert one["obs"]["rgb"].dtype == np.uint8 and one["obs"]["rgb"].shape == (10, 8, 8, 6)


def test_layout_is_robomimics(tmp_path):
    recorded(tmp_path / "f.hdf5", 20)
    with h5py.File(tmp_path / "f.hdf5") as file:
        assert file["data"].attrs["total"] == 200 and len(file["data"]) == 20
        about = json.loads(file["data"].attrs["env_args"])
        assert {"env_name", "type", "env_kwargs", "recorded"} <= set(about) and about["recorded"][
            "kept"
        ] == 20
        for i in range(20):
            demo = file[f"data/demo_{i}"]
            assert demo.attrs["num_samples"] == 10 and demo.attrs["success"]
            assert {"actions", "rewards", "dones", "obs", "next_obs"} <= set(demo)
            assert (
                set(demo["obs"])
                == set(demo["next_obs"])
                == {"w_image", "a_image", "state", "privileged"}
            )
            # One step's next observation is the next step's observation; images are stored by camera.
            assert np.array_equal(demo["obs/privileged"][1:], demo["next_obs/privileged"][:-1])
            assert (
                demo["obs/w_image"].shape == (10, 8, 8, 3) and demo["obs/w_image"].dtype == np.uint8
            )
            assert np.array_equal(
                demo["dones"][()] > 0, (demo["success"][()] > 0) | (np.arange(10) == 9)
            )
        train, valid = (set(file[f"mask/{k}"][()]) for k in ("train", "valid"))
        assert len(valid) == 2 and not train & valid and len(train | valid) == 20


def test_failures_are_left_out_or_kept(tmp_path):
    env, expert = dots(fails=True)
    with pytest.raises(ValueError, match="none of 12 episodes was a success"):
        demos.record(env, expert, tmp_path / "f.hdf5", 5, env_args={}, tries=12, progress=False)
    assert list(tmp_path.iterdir()) == [], "a recording that failed leaves nothing behind"
    env, expert = dots(fails=True)
    tally = demos.record(
        env, expert, tmp_path / "f.hdf5", 5, env_args={}, keep="all", progress=False
    )
    assert tally["kept"] == 5 and tally["succeeded"] == 0
    assert not any(d["success"].any() for d in demos.read(tmp_path / "f.hdf5"))


def test_episodes_end_early_where_the_environment_can(tmp_path):
    """With `restart`, an episode ends `tail` steps after success came to stay."""
    env, expert = dots(2)

    def restart(worlds):
        env._begin(worlds)
        env.obs = env._observe()
        return env.obs

    env.restart = restart
    demos.record(env, expert, tmp_path / "f.hdf5", 6, env_args={}, tail=2, progress=False)
    for demo in demos.read(tmp_path / "f.hdf5"):
        first = int(demo["success"].argmax())
        assert len(demo["actions"]) == min(first + 3, 10) and demo["success"][first:].all()


def test_a_diverged_episode_is_left_out(tmp_path):
    env, expert = dots(1)
    step, count = env.step, [0]

    def diverging(actions):
        obs, rewards, terminations, truncations, info = step(actions)
        count[0] += 1
        if count[0] == 4:  # the environment is put back alone: an early truncation without success
            env._begin(torch.ones(1, dtype=torch.bool))
            info["success"] = torch.zeros(1, dtype=torch.bool)
            return env._observe(), rewards, terminations, torch.ones(1, dtype=torch.bool), info
        return obs, rewards, terminations, truncations, info

    env.step = diverging
    tally = demos.record(
        env, expert, tmp_path / "f.hdf5", 2, env_args={}, keep="all", progress=False
    )
    assert tally["tried"] == 2 and {len(d["actions"]) for d in demos.read(tmp_path / "f.hdf5")} == {
        10
    }


def test_interrupted_recording_keeps_what_there_is(tmp_path):
    env, expert = dots(1)
    act, count = expert.act, [0]

    def interrupted():
        count[0] += 1
        if count[0] == 25:
            raise KeyboardInterrupt
        return act()

    expert.act = interrupted
    with pytest.raises(KeyboardInterrupt):
        demos.record(env, expert, tmp_path / "f.hdf5", 5, env_args={}, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["f.hdf5"] and len(
        demos.read(tmp_path / "f.hdf5")
    ) == 2


# --- human-like errors ------------------------------------------------------------------------------------------------
class Steady:
    """Always the same action; phases and clock go on at every call."""

    absolute = (1,)

    def __init__(self, n):
        self.phase = self.clock = torch.zeros(n, dtype=torch.int64)

    def reset(self, worlds=None):
        pass

    def act(self):
        self.clock = self.clock + 1
        return torch.tensor([[0.5, 1.0]]).repeat(len(self.clock), 1)


def humans(n=4000, **errors):
    return demos.Human(Steady(n), SimpleNamespace(num_envs=n, action_dim=2), **errors)


def test_noise_is_smooth_of_the_given_strength_and_spares_commands():
    human = humans(noise=0.1)
    human.disturbance = torch.randn(4000, 2)  # its stationary state
    first, second = human.act(), human.act()
    assert torch.equal(first[:, 1], torch.ones(4000)), "a command (the gripper's) is not disturbed"
    errors = torch.stack((first[:, 0] - 0.5, second[:, 0] - 0.5))
    # The strength is 0.1 times a factor uniform in [0.5, 1.5], whose mean square is 13/12.
    assert errors.std().item() == pytest.approx(0.1 * (13 / 12) ** 0.5, rel=0.05)
    assert torch.corrcoef(errors)[0, 1].item() == pytest.approx(SMOOTH, abs=0.03)
    assert (human.act().abs() <= 1).all()


def test_pauses_stand_still_and_stop_the_experts_clock():
    human = humans(pause=0.3)
    human.act()
    paused_steps = torch.zeros(4000)
    for _ in range(50):
        clock, last = human.expert.clock.clone(), human.last.clone()
        actions = human.act()
        still = actions[:, 0] == 0
        assert torch.equal(actions[still, 1], last[still, 1]), "a command is repeated"
        assert torch.equal(human.expert.clock, torch.where(still, clock, clock + 1))
        paused_steps += still
    # Each time: with probability 0.3 a pause, of 5 steps on average, else one free step.
    assert paused_steps.mean().item() / 50 == pytest.approx(0.3 * 5 / (0.3 * 5 + 0.7), abs=0.03)


def test_pace_is_an_episodes_own():
    human = humans(slow=0.5)
    first = human.act()[:, 0]
    assert torch.allclose(first, human.act()[:, 0])
    assert (
        0.25 <= first.min()
        and first.max() <= 0.5
        and first.mean().item() == pytest.approx(0.375, abs=0.01)
    )
    half = torch.arange(4000) < 2000
    human.reset(half)
    again = human.act()[:, 0]
    assert torch.allclose(again[2000:], first[2000:]) and not torch.allclose(
        again[:2000], first[:2000]
    )


def test_impossible_errors_are_refused():
    with pytest.raises(ValueError, match="noise must be at least 0"):
        humans(4, noise=-0.1)


# --- reading ----------------------------------------------------------------------------------------------------------
def robomimic_file(path, next_obs=True, observations=True):
    """A file as robomimic writes it: its own names, gzip-less, demonstrations in no order, filters by name."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = 22
        kwargs = {"camera_names": ["robot0_eye_in_hand", "agentview"], "robots": ["Panda"]}
        data.attrs["env_args"] = json.dumps(
            {"env_name": "PickPlaceCan", "type": 1, "env_kwargs": kwargs}
        )
        for name, length in (("demo_10", 6), ("demo_2", 7), ("demo_0", 9)):
            group = data.create_group(name)
            group.attrs["num_samples"], group.attrs["model_file"] = length, "<mujoco/>"
            group["actions"] = rng.uniform(-1, 1, (length, 7))  # float64, as theirs
            group["rewards"] = (np.arange(length) >= length - 2).astype(np.float64)
            group["dones"] = (np.arange(length) >= length - 2).astype(np.int64)
            group["states"] = rng.normal(size=(length, 71))
            for part in (["obs"] + ["next_obs"] * next_obs) * observations:
                shapes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 14,
                          "robot0_joint_pos": 7}  # fmt: skip
                for key, size in shapes.items():
                    group[f"{part}/{key}"] = rng.normal(size=(length, size))
                for k, camera in enumerate(("agentview", "robot0_eye_in_hand")):
                    group[f"{part}/{camera}_image"] = np.full(
                        (length, 6, 6, 3), 10 * k + length, np.uint8
                    )
        file["mask/train"], file["mask/20_percent"] = (
            np.array([b"demo_10", b"demo_0"]),
            np.array([b"demo_2"]),
        )
    return path


def test_robomimics_own_file_is_read(tmp_path):
    path = robomimic_file(tmp_path / "image.hdf5")
    found = demos.read(path)
    assert [d["name"] for d in found] == ["demo_0", "demo_2", "demo_10"], (
        "by number, not by the alphabet"
    )
    assert [len(d["actions"]) for d in found] == [9, 7, 6] and found[0][
        "actions"
    ].dtype == np.float32
    with h5py.File(path) as file:
        group = file["data/demo_2"]
        arm = [group[f"obs/robot0_{k}"][()] for k in ("eef_pos", "eef_quat", "gripper_qpos")]
        state = np.concatenate(arm, 1).astype(np.float32)
        assert np.array_equal(found[1]["obs"]["state"], state)
        privileged = np.concatenate([state, group["obs/object"][()].astype(np.float32)], 1)
        assert np.array_equal(found[1]["obs"]["privileged"], privileged)
        assert np.allclose(found[1]["final_obs"]["state"][:3], group["next_obs/robot0_eef_pos"][-1])
    # Cameras in the order of env_args: the wrist's first.
    assert found[1]["obs"]["rgb"].shape == (7, 6, 6, 6)
    assert (found[1]["obs"]["rgb"][..., :3] == 17).all() and (
        found[1]["obs"]["rgb"][..., 3:] == 7
    ).all()
    assert found[1]["success"].tolist() == [False] * 5 + [True] * 2
    assert demos.env_args(path)["env_name"] == "PickPlaceCan"
    assert "3 demonstrations, 22 steps (6 to 9 each)" in demos.describe(path)


def test_keys_filters_limits(tmp_path):
    path = robomimic_file(tmp_path / "image.hdf5", next_obs=False)
    assert [d["name"] for d in demos.read(path, filter="train")] == ["demo_0", "demo_10"]
    assert [d["name"] for d in demos.read(path, filter="20_percent")] == ["demo_2"]
    assert len(demos.read(path, limit=1)) == 1
    one = demos.read(path, ["state", "robot0_joint_pos"], limit=1)[0]
    assert {k: v.shape for k, v in one["obs"].items()} == {
        "state": (9, 9),
        "robot0_joint_pos": (9, 7),
    }
    assert one["final_obs"] is None, "the file has no next_obs, and nothing is made up"
    one = demos.read(
        path,
        {"state": ("robot0_gripper_qpos", "robot0_joint_pos"), "rgb": "agentview_image"},
        limit=1,
    )[0]
    assert one["obs"]["state"].shape == (9, 9) and one["obs"]["rgb"].shape == (9, 6, 6, 3)


def test_cut_after_the_first_success(tmp_path):
    path = robomimic_file(tmp_path / "image.hdf5")
    whole, cut = demos.read(path, ["state"])[0], demos.read(path, ["state"], until_success=True)[0]
    assert len(cut["actions"]) == 8 == len(cut["obs"]["state"]) and cut["success"].tolist() == [
        False
    ] * 7 + [True]
    assert (
        np.array_equal(cut["final_obs"]["state"], whole["obs"]["state"][8])
        and cut["dones"].tolist()[-1]
    )


def test_state_and_privileged_of_two_arms():
    keys = reading._contract_keys(
        ["robot1_eef_quat", "robot0_right_eef_pos", "robot0_left_eef_pos", "robot1_eef_pos", "object",
         "robot0_left_gripper_qpos", "frontview_image", "robot0_joint_pos"], ("frontview",),
    )  # fmt: skip
    arms = ("robot0_left_eef_pos", "robot0_left_gripper_qpos", "robot0_right_eef_pos", "robot1_eef_pos",
            "robot1_eef_quat")  # fmt: skip
    assert keys == {"rgb": ("frontview_image",), "state": arms, "privileged": (*arms, "object")}


def test_wrong_files_get_one_clear_line(tmp_path):
    def said(path, *arguments, **options) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            demos.read(path, *arguments, **options)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1")
    assert "is not an HDF5 file" in said(tmp_path / "text")
    assert "does not exist" in said(tmp_path / "none")
    with h5py.File(tmp_path / "other", "w") as file:
        file["x"] = np.zeros(3)
    assert "no group 'data'" in said(tmp_path / "other")
    with h5py.File(tmp_path / "empty", "w") as file:
        file.create_group("data")
    assert "holds no demonstrations" in said(tmp_path / "empty")
    assert "dataset_states_to_obs" in said(robomimic_file(tmp_path / "raw", observations=False))
    good = robomimic_file(tmp_path / "good")
    assert "no filter 'best'; there are: 20_percent, train" in said(good, filter="best")
    assert "no observation depth; it has agentview_image" in said(good, ["depth"])
    with h5py.File(good, "r+") as file:
        del file["data/demo_0/rewards"]
        file["data/demo_0/rewards"] = np.zeros(4)
    assert "demo_0 has 9 actions, but other entries are [4, 9] long" in said(good)
    whole = robomimic_file(tmp_path / "whole").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in said(tmp_path / "half")


# --- the command ------------------------------------------------------------------------------------------------------
def test_command_records_the_so101_and_is_the_same_twice(tmp_path, capsys):
    pytest.importorskip(
        "mujoco_warp", reason='MuJoCo Warp is not installed: pip install -e ".[so101]"'
    )
    files = [tmp_path / f"{k}.hdf5" for k in "ab"]
    for file in files:
        main(Args(
            env_id="SO101LiftCube-v1", episodes=5, noise=0.1, obs="pixels", render_size=16, cameras=("third", "wrist"),
            out=file,
        ))  # fmt: skip
    said = capsys.readouterr()
    assert f"{files[1]}: 5 demonstrations, 250 steps" in said.out and "demo/s" in said.err
    one, two = (demos.read(file) for file in files)
    assert one[0]["obs"]["rgb"].shape == (50, 16, 16, 6) and one[0]["obs"]["privileged"].shape == (
        50,
        47,
    )
    assert all(d["success"][-1] for d in one)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a["actions"], b["actions"]) and np.array_equal(
            a["obs"]["rgb"], b["obs"]["rgb"]
        )
    about = demos.env_args(files[0])
    assert about["env_id"] == "SO101LiftCube-v1" and about["recorded"]["noise"] == 0.1
    assert (
        about["env_kwargs"]["camera_names"] == ["third", "wrist"]
        and about["spec"]["control_hz"] == 10.0
    )
    before = files[0].read_bytes()
    with pytest.raises(ValueError, match="exists; name another file"):
        main(Args(out=files[0]))
    assert files[0].read_bytes() == before
    main(Args(show=files[0]))
    assert "SO101LiftCube-v1" in capsys.readouterr().out


def test_command_speaks_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(Args(show=tmp_path / "none"))
    done = subprocess.run(
        [sys.executable, "-m", "envs.demos", "--episodes", "0", "--out", str(tmp_path / "f")], cwd=ROOT,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and last == "envs.demos: the number of episodes must be at least 1, not 0"
    )
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_request_to_end_finishes_the_file(tmp_path):
    pytest.importorskip(
        "mujoco_warp", reason='MuJoCo Warp is not installed: pip install -e ".[so101]"'
    )
    out = tmp_path / "f.hdf5"
    process = subprocess.Popen(
        [sys.executable, "-m", "envs.demos", "--env-id", "SO101LiftCube-v1", "--episodes", "100000", "--num-envs", "2",
         "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    temporary = tmp_path / f".f.hdf5.{process.pid}.tmp"
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not (
        temporary.exists() and os.path.getsize(temporary) > 100_000
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "what was recorded is in" in output
    assert len(demos.read(out)) >= 1 and [p.name for p in tmp_path.iterdir()] == ["f.hdf5"]


# --- a file and a run fit ---------------------------------------------------------------------------------------------
def test_a_file_of_another_task_or_without_the_cameras_is_refused(tmp_path):
    recorded(tmp_path / "f.hdf5", 2)  # of "Fake", cameras w and a, 8 pixels
    assert demos.fit(tmp_path / "f.hdf5", "Fake", ("a", "w"), 8) == {}
    for options, message in (
        (("SO101LiftCube-v1",), "f.hdf5 has demonstrations of Fake, not of SO101LiftCube-v1"),
        (("Fake", ("x",), 8), "f.hdf5 has no camera x; it has a, w"),
        (("Fake", ("a",), 16), "f.hdf5 has images of 8 x 8, the run wants 16 x 16"),
    ):
        with pytest.raises(ValueError, match=message):
            demos.fit(tmp_path / "f.hdf5", *options)


def test_robosuite_is_built_as_the_file_says(tmp_path):
    path = robomimic_file(tmp_path / "image.hdf5")
    assert demos.fit(path, "robosuite/PickPlaceCan") == {"env_kwargs": {"robots": ["Panda"]}}
    with pytest.raises(ValueError, match="of PickPlaceCan, not of robosuite/Lift"):
        demos.fit(path, "robosuite/Lift")
    with h5py.File(path, "a") as file:
        about = json.loads(file["data"].attrs["env_args"])
        about["env_kwargs"]["control_freq"] = 10
        file["data"].attrs["env_args"] = json.dumps(about)
    with pytest.raises(ValueError, match="was recorded at 10 Hz, the environment has 20"):
        demos.fit(path, "robosuite/PickPlaceCan")


@pytest.mark.parametrize("algo", ["resfit", "bc_chunk"])
def test_both_algorithms_ask_whether_the_file_fits(tmp_path, algo):
    """Before an environment is built."""
    recorded(tmp_path / "f.hdf5", 2)
    module = __import__(algo)
    args = module.Args(env_id="SO101LiftCube-v1", demos=str(tmp_path / "f.hdf5"), device="cpu")
    with pytest.raises(ValueError, match="has demonstrations of Fake, not of SO101LiftCube-v1"):
        module.make_envs(args)


# --- LeRobotDataset ---------------------------------------------------------------------------------------------------
def lerobot_folder(folder, version):
    """Two episodes of 5 and 4 steps, joints in degrees, one camera of 32 x 48 whose frames tell their number."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    import imageio.v2 as imageio
    import pyarrow

    info = {
        "codebase_version": version,
        "fps": 10,
        "total_episodes": 2,
        "chunks_size": 1000,
        "robot_type": "so101",
    }
    wide = {"dtype": "video", "shape": [32, 48, 3]}
    info["features"] = {"action": {"dtype": "float32"}, "observation.images.front": wide}
    rows = {"episode_index": [0] * 5 + [1] * 4, "action": [[90.0 - i, 5.0] for i in range(9)]}
    rows["observation.state"] = [[float(i), 0.0, 1.0] for i in range(9)]
    key = "observation.images.front"

    def write(path, columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), path)

    def film(path, numbers):
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = [np.full((32, 48, 3), 20 * i + 20, np.uint8) for i in numbers]
        imageio.mimwrite(path, frames, fps=10, macro_block_size=1)

    if version == "v3.0":
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        write(folder / "data/chunk-000/file-000.parquet", rows)
        film(folder / f"videos/{key}/chunk-000/file-000.mp4", range(9))
        about = {"episode_index": [0, 1], f"videos/{key}/from_timestamp": [0.0, 0.5]}
        for part in ("data", f"videos/{key}"):
            about |= {f"{part}/chunk_index": [0, 0], f"{part}/file_index": [0, 0]}
        write(folder / "meta/episodes/chunk-000/file-000.parquet", about)
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = (
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        )
        for episode, part in enumerate((slice(0, 5), slice(5, 9))):
            columns = {name: values[part] for name, values in rows.items()}
            write(folder / f"data/chunk-000/episode_{episode:06d}.parquet", columns)
            film(folder / f"videos/chunk-000/{key}/episode_{episode:06d}.mp4", range(9)[part])
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_lerobot_dataset_is_read_and_converted(tmp_path, version):
    folder = lerobot_folder(tmp_path / "set", version)
    found = demos.read(folder)
    assert [len(demo["actions"]) for demo in found] == [5, 4]
    assert found[1]["obs"]["state"][:, 0].tolist() == [5, 6, 7, 8]
    assert found[0]["success"].tolist() == [False] * 4 + [True]
    assert found[1]["obs"]["rgb"].shape == (4, 32, 48, 3)
    brightness = found[1]["obs"]["rgb"].mean((1, 2, 3))
    assert brightness == pytest.approx([120, 140, 160, 180], abs=4), "an episode's own frames"
    out = tmp_path / "arm.hdf5"
    main(Args(env_id="MyArm", from_lerobot=folder, out=out, render_size=16))
    both = demos.read(out)
    assert both[0]["obs"]["rgb"].shape == (5, 16, 16, 3)
    assert both[0]["actions"][0].tolist() == [1.0, -1.0] and both[1]["actions"][-1, 0] == -1.0
    about = demos.env_args(out)
    assert about["action_low"] == [82.0, 5.0] and about["action_high"] == [90.0, 5.0]
    assert demos.fit(out, "MyArm", ("front",), 16) == {}
    resfit = __import__("resfit")
    train, valid = resfit.read_demos(str(out), ("front",))
    assert [len(demo["actions"]) for demo in train + valid] == [5, 4]


def test_a_lerobot_dataset_of_another_version_is_refused(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text('{"codebase_version": "v9"}')
    with pytest.raises(ValueError, match="is a LeRobotDataset v9; v2.0, v2.1 and v3.0 are read"):
        demos.read(tmp_path)
