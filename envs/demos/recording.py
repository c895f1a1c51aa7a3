"""Records episodes of an expert in a file of robomimic's layout."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from envs.demos import lerobot
from envs.demos.reading import import_h5py

VALID = 0.1  # share of the demonstrations that mask/valid names


def _file_obs(
    obs: Mapping[str, torch.Tensor], cameras: Sequence[str], state_parts=()
) -> dict[str, np.ndarray]:
    """Observations of the contract under the names of the file: images by camera, the rest as it is.

    `state_parts`: names and sizes of what "state" consists of, where the file is to have robomimic's own names; what
    "privileged" has beyond the state is then "object".
    """
    arrays = {key: value.cpu().numpy() for key, value in obs.items()}
    found = {}
    if "rgb" in arrays:
        rgb = arrays.pop("rgb")
        found = {f"{camera}_image": rgb[..., 3 * k : 3 * k + 3] for k, camera in enumerate(cameras)}
    if not state_parts:
        return found | arrays
    begin = 0
    for name, size in state_parts:
        found[name] = arrays["state"][:, begin : begin + size]
        begin += size
    return found | {"object": arrays["privileged"][:, begin:]}


class _File:
    """A file of demonstrations that appears under its name when it is complete (`finish`)."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.file = import_h5py().File(self.temporary, "w")
        self.data = self.file.create_group("data")
        self.count = self.total = 0

    def add(self, demo: dict[str, Any], success: bool) -> None:
        group = self.data.create_group(f"demo_{self.count}")
        for key in ("actions", "rewards", "dones", "success"):
            group[key] = demo[key]
        for part in ("obs", "next_obs"):
            for key, value in demo[part].items():
                packed = {
                    "compression": "gzip",
                    "compression_opts": 1,
                    "chunks": (1, *value.shape[1:]),
                }
                group.create_dataset(
                    f"{part}/{key}", data=value, **packed if value.dtype == np.uint8 else {}
                )
        group.attrs["num_samples"], group.attrs["success"] = len(demo["actions"]), bool(success)
        self.count, self.total = self.count + 1, self.total + len(demo["actions"])

    def finish(self, env_args: dict, seed: int) -> None:
        self.data.attrs["total"], self.data.attrs["env_args"] = self.total, json.dumps(env_args)
        names = np.array([f"demo_{i}".encode() for i in range(self.count)])
        order = np.random.default_rng(seed).permutation(self.count)
        valid = round(VALID * self.count) if self.count > 1 else 0
        self.file["mask/valid"], self.file["mask/train"] = (
            names[np.sort(order[:valid])],
            names[np.sort(order[valid:])],
        )
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def convert(
    folder: str | Path, path: str | Path, env_id: str, size: int = 84, seed: int = 0
) -> dict[str, Any]:
    """Brings a LeRobotDataset to the layout that algos/ read: one file, images of `size` pixels on each side.

    Actions beyond [-1, 1] are brought there, each dimension by its own least and largest value over the dataset, which
    env_args keep as `action_low` and `action_high`: a policy's action a means low + (a + 1) / 2 (high - low). The file
    appears when it is complete. Returns {"kept", "steps"}. Raises ValueError, ImportError.
    """
    info = lerobot.read_info(folder)
    names = [
        key.removeprefix(lerobot.IMAGES).replace(".", "_") for key in lerobot.camera_keys(info)
    ]
    low, high = np.inf, -np.inf
    for demo in lerobot.episodes(folder, images=False):
        low = np.minimum(low, demo["actions"].min(0))
        high = np.maximum(high, demo["actions"].max(0))
    if np.abs(low).max() <= 1 and np.abs(high).max() <= 1:
        low, high = -np.ones_like(low), np.ones_like(high)
    spread = np.where(high > low, high - low, 1)
    out = _File(Path(path))
    try:
        for demo in lerobot.episodes(folder, size):
            obs = {"state": demo["obs"]["state"]}
            for k, name in enumerate(names):
                obs[f"{name}_image"] = demo["obs"]["rgb"][..., 3 * k : 3 * k + 3]
            actions = 2 * (demo["actions"] - low) / spread - 1
            rows = {"obs": obs, "next_obs": {}, "actions": actions.astype(np.float32)}
            rows |= {"rewards": demo["rewards"], "dones": demo["dones"].astype(np.uint8)}
            rows["success"] = demo["success"].astype(np.uint8)
            out.add(rows, bool(demo["success"].any()))
        about = {
            "env_name": env_id,
            "env_id": env_id,
            "type": 2,
            "env_kwargs": {"camera_names": names},
        }
        about |= {
            "action_low": low.tolist(),
            "action_high": high.tolist(),
            "robot": info.get("robot_type"),
        }
        out.finish(about, seed)
    except BaseException:
        out.discard()
        raise
    return {"kept": out.count, "steps": out.total}


@torch.no_grad()
def record(
    env,
    expert,
    path: str | Path,
    episodes: int,
    *,
    env_args: dict,
    seed: int = 0,
    cameras: Sequence[str] = (),
    keep: Literal["successes", "all"] = "successes",
    tries: int | None = None,
    tail: int = 10,
    progress: bool = True,
) -> dict[str, Any]:
    """Records `episodes` demonstrations of `expert` (a `Human`, or any with `reset(where)`, `act()`) in `env`.

    Args:
        env: of the contract of `envs/__init__.py`, made with `stagger=False`; it is reset with `seed`.
        cameras: names of the cameras on the channels of "rgb", in their order.
        keep: only episodes that are a success at their end, or all. Episodes in which physics diverged are left out.
        tries: give up after so many episodes; None: ten times as many as wanted.
        tail: where the environment has `restart(where)`, an episode ends this many steps after success came to stay.
    Returns {"kept", "tried", "succeeded", "steps", "seconds"}, which the file holds as well (in env_args, "recorded").
    Ctrl-C finishes the file with what there is, then raises KeyboardInterrupt. Raises ValueError when `tries` are used
    up and nothing was kept; with less than what was wanted, the file is written and "kept" says so.
    """
    if episodes < 1:
        raise ValueError(f"the number of episodes must be at least 1, not {episodes}")
    tries = tries or 10 * episodes
    began = time.monotonic()
    out = _File(Path(path))
    tally = {"kept": 0, "tried": 0, "succeeded": 0, "steps": 0, "seconds": 0.0}

    def finish() -> None:
        tally.update(steps=out.total, seconds=round(time.monotonic() - began, 1))
        out.finish(env_args | {"recorded": env_args.get("recorded", {}) | tally}, seed)

    try:
        with tqdm(total=episodes, unit="demo", disable=not progress, dynamic_ncols=True) as bar:
            for demo, success in _episodes(env, expert, seed, cameras, tail):
                tally["tried"] += 1
                tally["succeeded"] += success
                if success or keep == "all":
                    out.add(demo, success)
                    tally["kept"] += 1
                    bar.update()
                bar.set_postfix_str(f"success {tally['succeeded']} of {tally['tried']}")
                if tally["kept"] == episodes or tally["tried"] >= tries:
                    break
        if tally["kept"] == 0:
            raise ValueError(
                f"none of {tally['tried']} episodes was a success: use less noise, or --keep all"
            )
        finish()
    except KeyboardInterrupt:
        if tally["kept"]:
            finish()
        else:
            out.discard()
        raise
    except BaseException:
        out.discard()
        raise
    return tally


def _episodes(
    env, expert, seed: int, cameras: Sequence[str], tail: int
) -> Iterator[tuple[dict, bool]]:
    """Endless episodes as dicts of arrays with leading dimension T, and whether each is a success at its end."""
    n, parts = env.num_envs, getattr(env, "layout", {}).get("state", ())
    steps: list[dict] = []  # of all environments; row 0 is step number `first`
    start, first, held = np.zeros(n, int), 0, np.zeros(n, int)
    obs = _file_obs(env.reset(seed), cameras, parts)
    expert.reset()
    while True:
        actions = expert.act()
        following, _, terminations, truncations, info = env.step(actions)
        success = info["success"].cpu().numpy().astype(bool)
        final = _file_obs(info["final_obs"], cameras, parts)
        steps.append(
            {"obs": obs, "next_obs": final, "actions": actions.cpu().numpy(), "success": success}
        )
        ends = (terminations | truncations).cpu().numpy().astype(bool)
        length = first + len(steps) - start
        diverged = truncations.cpu().numpy() & (length < env.max_episode_steps) & ~success
        held = np.where(success, held + 1, 0)
        enough = ~ends & (held > tail) if hasattr(env, "restart") else np.zeros(n, bool)
        for i in np.flatnonzero((ends | enough) & ~diverged):
            yield _episode(steps[start[i] - first :], i), bool(success[i])
        ends = ends | enough
        if enough.any():
            following = env.restart(torch.from_numpy(enough))
        start, held = np.where(ends, first + len(steps), start), np.where(ends, 0, held)
        expert.reset(torch.from_numpy(ends).to(env.device))
        steps, first = steps[start.min() - first :], start.min()
        obs = _file_obs(following, cameras, parts)


def _episode(steps: list[dict], number: int) -> dict[str, Any]:
    success = np.array([s["success"][number] for s in steps])
    dones = success.copy()
    dones[-1] = True
    parts = {
        p: {k: np.stack([s[p][k][number] for s in steps]) for k in steps[0][p]}
        for p in ("obs", "next_obs")
    }
    return parts | {
        "actions": np.stack([s["actions"][number] for s in steps]).astype(np.float32),
        "rewards": success.astype(np.float32), "dones": dones.astype(np.uint8), "success": success.astype(np.uint8),
    }  # fmt: skip
