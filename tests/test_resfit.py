"""ResFiT: today's numbers against those of f2f0a1a, queue and relabelling by hand, and runs on a tiny task."""

import csv
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import resfit as rf
import torch
import torch.nn as nn
from conftest import ROOT
from fake_env import FakeEnv

h5py = pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
SHAPES = {"state": [4], "action": 2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- A tiny task: the dot of fake_env, a base that is too slow, demonstrations that are not --------
class Slow(nn.Module):
    """The next 4 actions: to the middle, at a third of the pace that is needed."""

    def forward(self, state, rgb=None):
        chunk = (-state[:, None, :2]).expand(-1, 4, -1)
        if rgb is not None:
            chunk = chunk + 0.01 * rgb.float().mean((1, 2, 3))[:, None, None] / 255
        return chunk * torch.tensor([0.3, 0.2, 0.1, 0.05])[None, :, None]


def export(module, example, path, **about):
    dynamic = tuple({0: torch.export.Dim("n", min=1)} for _ in example)
    program = torch.export.export(module, example, dynamic_shapes=dynamic)
    extra = {"base.json": json.dumps(about)} if about else {}
    torch.export.save(program, path, extra_files=extra)


def record(path, episodes=12):
    """Demonstrations of various lengths, in robomimic's layout; every third fails."""
    env = FakeEnv(1, seed=5, stagger=False, asymmetric=True)
    with h5py.File(path, "w") as file:
        for i in range(episodes):
            rows, obs = [], env.reset()
            for _ in range(6):
                action = (-obs["privileged"] * (3 if i % 3 else -1)).clamp(-1, 1)
                following, *_, info = env.step(action)
                rows.append((obs, action, bool(info["success"])))
                obs = following
            group = file.create_group(f"data/demo_{i}")
            group["actions"] = torch.cat([row[1] for row in rows])
            group["rewards"] = np.array([row[2] for row in rows], np.float32)
            for key, name in (("state", "state"), ("privileged", "privileged"), ("rgb", "wrist_image")):
                group[f"obs/{name}"] = torch.cat([row[0][key] for row in rows])


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with base.pt2, base_pixels.pt2 and demos.hdf5."""
    folder = tmp_path_factory.mktemp("resfit")
    state, rgb = torch.zeros(2, 5), torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    export(Slow(), (state,), folder / "base.pt2", env_id="Fake", obs="state", execute=3)
    export(Slow(), (state[:, :3], rgb), folder / "base_pixels.pt2", env_id="Fake", obs="pixels")
    record(folder / "demos.hdf5")
    return folder


def make_fakes(args):
    options = dict(stagger=False, asymmetric=args.obs == "state")
    eval_env = FakeEnv(args.eval_envs, seed=1, **options)
    return (None if args.evaluate else FakeEnv(args.num_envs, seed=args.seed, **options)), eval_env


@pytest.fixture
def fake(monkeypatch, tmp_path, files):
    """Train on the dot, with runs/ in a temporary folder."""
    monkeypatch.setattr(rf, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return files


def arguments(folder=Path(), **changes) -> rf.Args:
    """A small run on the CPU."""
    pixels = changes.get("obs") == "pixels"
    values = dict(
        env_id="Fake", device="cpu", demos=str(folder / "demos.hdf5"), num_envs=3, total_timesteps=120, eval_freq=60,
        base=str(folder / ("base_pixels.pt2" if pixels else "base.pt2")), log_freq=30, eval_episodes=8, eval_envs=4,
        hidden=8, batch_size=16, buffer_size=600, learning_starts=30, critic_warmup=3, utd=0.5, heads=4, lr=1e-3,
        policy_frequency=2, actor_lr=1e-3, encoder_dim=8, image_size=16, pad=1, capture_video=False,
    )  # fmt: skip
    return rf.Args(**values | changes)
