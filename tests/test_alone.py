"""Each file of algos/ copied alone into an empty folder: with `make_envs` replaced it trains.

The environments are those of tests/strangers.py, written from envs/__init__.py's page. What is imported is neither the
repository nor an installed `envs`: the copy's own process cannot find either.
"""

import ast
import csv
import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

POINTS = """size = args.image_size
return stranger.Point(args.num_envs, image_size=size), stranger.Point(args.eval_envs, seed=7, image_size=size)"""
JAX = "return stranger.jax_point(), stranger.jax_point()"
# algorithm -> what make_envs does, the command line
CASES = {
    "squint_sac": (
        "from_page = stranger.Point(args.eval_envs, seed=7, image_size=16)\n"
        "return stranger.Point(args.num_envs, image_size=16), {'': from_page}",
        "--device cpu --num-envs 4 --eval-envs 4 --eval-episodes 4 --total-timesteps 120 --eval-freq 60 --log-freq 20 "
        "--learning-starts 40 --num-updates 4 --batch-size 8 --buffer-size 400 --critic-hidden 16 --actor-hidden 16",
    ),
    "drqv2": (
        POINTS,
        "--device cpu --eval-envs 4 --eval-episodes 4 --total-timesteps 120 --eval-freq 60 --log-freq 20 "
        "--learning-starts 40 --random-steps 40 --batch-size 8 --buffer-size 400 --hidden 16",
    ),
    "sac_pixels": (
        POINTS,
        "--device cpu --eval-envs 4 --eval-episodes 4 --total-timesteps 120 --eval-freq 60 --log-freq 20 "
        "--learning-starts 40 --batch-size 8 --buffer-size 400 --hidden 16",
    ),
    "sapo_rewarped": (
        "return stranger.Slope(args.num_envs), stranger.Slope(args.eval_episodes, seed=7)",
        "--device cpu --num-envs 4 --eval-episodes 4 --horizon 4 --total-timesteps 64 --eval-freq 32 "
        "--num-minibatches 2",
    ),
    "bc_chunk": (
        "return stranger.Point(args.eval_envs, seed=7, end_on_success=True)",
        "--device cpu --demos demos.hdf5 --eval-envs 4 --eval-episodes 4 --steps 20 --eval-freq 10 --log-freq 5 "
        "--batch-size 8 --dim 16 --chunk 4 --execute 2",
    ),
    "resfit": (
        "return stranger.Point(args.num_envs, end_on_success=True), "
        "stranger.Point(args.eval_envs, seed=7, end_on_success=True)",
        "--device cpu --demos demos.hdf5 --base base.pt2 --num-envs 4 --eval-envs 4 --eval-episodes 4 "
        "--total-timesteps 120 --eval-freq 60 --log-freq 20 --learning-starts 40 --critic-warmup 4 --batch-size 8 "
        "--buffer-size 400 --hidden 16 --heads 3",
    ),
    "ppo_mjx_go1": (
        JAX,
        "--num-envs 4 --eval-episodes 4 --total-timesteps 128 --eval-freq 64 --log-freq 32 --unroll-length 8 "
        "--num-minibatches 2 --hidden 16",
    ),
    "distill_go1": (
        JAX,
        "--teacher teacher.npz --num-envs 4 --eval-episodes 4 --total-timesteps 128 --eval-freq 64 --log-freq 32 "
        "--unroll-length 8",
    ),
}  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))

RUNNER = """
import os, runpy, shutil, sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("envs", "hardware", "algos"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def keep_first(source, target, replace=os.replace):
    replace(source, target)
    first = "first" + os.path.splitext(target)[1]
    if "checkpoint" in str(target) and not os.path.exists(first):
        shutil.copy(target, first)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, ".")
os.replace = keep_first  # how every file saves
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def replace_make_envs(text: str, body: str) -> str:
    """The file with another body of `make_envs`: what a reader would type."""
    node = next(
        n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "make_envs"
    )
    lines = text.splitlines()
    head = [lines[node.lineno - 1], "    import stranger", ""]
    new = [*head, *("    " + line for line in body.splitlines())]
    return "\n".join(lines[: node.lineno - 1] + new + lines[node.end_lineno :]) + "\n"


def execute(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", RUNNER, *words], cwd=folder, env=environment | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def write_demos(path: Path):
    """Demonstrations of strangers.Point in robomimic's layout: straight to the middle."""
    h5py = pytest.importorskip("h5py", reason='needs h5py: pip install -e ".[resfit]"')
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(12):
            place, states, actions = random.uniform(-1, 1, 2), [], []
            for _ in range(8):
                action = np.clip(-place / 0.3, -1, 1)
                states.append(place)
                actions.append(action)
                place = np.clip(place + 0.3 * action, -1, 1)
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.float32(actions)
            group["obs/state"] = np.float32(states)
            group["success"] = np.linalg.norm(np.add(states, 0.3 * np.array(actions)), axis=1) < 0.3


def write_base(path: Path):
    """A program of torch.export that goes to the middle, half as fast as it could: two actions a chunk."""
    import torch

    class Half(torch.nn.Module):
        def forward(self, state):
            return (-1.5 * state).clamp(-1, 1)[:, None].repeat(1, 2, 1)

    sizes = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(torch.export.export(Half(), (torch.zeros(4, 2),), dynamic_shapes=sizes), path)


def write_teacher(path: Path):
    """An untrained policy of ppo_mjx_go1.py for strangers.jax_point."""
    import ppo_mjx_go1 as ppo
    import strangers

    env = strangers.jax_point()
    shapes = dict(state=env.obs_dim, privileged_state=env.privileged_dim, action=env.action_dim)
    args = ppo.Args(env_id="Point", hidden=(16,))
    _, learner = ppo.new_learner(shapes, args)
    meta = dict(algo=ppo.ALGO, args=asdict(args), shapes=shapes, spec={}, progress={}, csv_sizes={})
    ppo.save(path, meta, ppo.named(params=learner.params, stats=learner.stats))


def weights(path: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, whatever the format."""
    if path.suffix == ".npz":
        return {
            key: value
            for key, value in np.load(path, allow_pickle=False).items()
            if value.dtype.kind == "f"
        }
    import torch

    return {
        key: value.float().numpy()
        for key, value in torch.load(path, weights_only=True)["agent"].items()
    }


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def copy_alone(name: str, folder: Path) -> list[str]:
    """The file, the stranger's environment and what the algorithm reads, in `folder`. -> the command line"""
    body, words = CASES[name]
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/strangers.py", folder / "stranger.py")
    (folder / f"{name}.py").write_text(
        replace_make_envs((ROOT / f"algos/{name}.py").read_text(), body)
    )
    for file, write in (
        ("demos.hdf5", write_demos),
        ("base.pt2", write_base),
        ("teacher.npz", write_teacher),
    ):
        if file in words:
            write(folder / file)
    return words.split()


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_file_trains_alone(name, tmp_path):
    if name in ("ppo_mjx_go1", "distill_go1"):
        pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    words = copy_alone(name, tmp_path)
    script = f"{name}.py"
    film = [] if name == "distill_go1" else ["--no-capture-video"]
    done = execute(tmp_path, script, *words, "--name", "run", *film)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/run"
    assert len(rows(run / "eval.csv")) >= 2, "two evaluations"
    last = next(run.glob("checkpoint.*"))
    assert next(run.glob("best.*")).exists()
    first, trained = weights(tmp_path / f"first{last.suffix}"), weights(last)
    assert first.keys() == trained.keys()
    assert any(not np.array_equal(first[key], trained[key]) for key in first), (
        "parameters have changed"
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_the_project_make_envs_says_what_to_install(name, monkeypatch):
    if name in ("ppo_mjx_go1", "distill_go1"):
        pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "envs", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install -e"):
        module.make_envs(module.Args())
