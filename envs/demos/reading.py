"""Reads demonstrations in robomimic's layout, ours or robomimic's own."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.demos import lerobot
from envs.demos.lerobot import is_lerobot

# Of env_kwargs: what makes a task of robosuite another one, and is not set by the environment itself.
BUILDS = (
    "robots",
    "controller_configs",
    "env_configuration",
    "gripper_types",
    "base_types",
    "initialization_noise",
)
CONTROL_HZ = 20  # of envs/robosuite
INSTALL = 'demonstrations need h5py: pip install -e ".[resfit]"'


def import_h5py():
    try:
        import h5py
    except ImportError:
        raise ImportError(INSTALL) from None
    return h5py


def _contract_keys(available: Sequence[str], cameras: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which observations of a file make up "rgb", "state" and "privileged"; see `read`."""
    images = [f"{c}_image" for c in cameras if f"{c}_image" in available]
    images += sorted(k for k in available if k.endswith("_image") and k not in images)
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    matches = [
        re.fullmatch(rf"(robot\d+_(?:right_|left_)?)({'|'.join(parts)})", k) for k in available
    ]
    arms = [m[0] for m in sorted(filter(None, matches), key=lambda m: (m[1], parts.index(m[2])))]
    state = ["state"] if "state" in available else arms
    objects = [k for k in ("object", "object-state") if k in available][:1]
    privileged = (
        ["privileged"] if "privileged" in available else [*arms, *objects] if objects else []
    )
    found = {"rgb": images, "state": state, "privileged": privileged}
    return {name: tuple(keys) for name, keys in found.items() if keys}


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, list[str], dict]]:
    """A file of demonstrations, the names of its demonstrations in their order, and its env_args."""
    h5py, path = import_h5py(), Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; `python -m envs.demos --help` says how to record one"
        )
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ValueError(
            f"{path} is not an HDF5 file (or was cut off while it was copied)"
        ) from None
    with file:
        if not isinstance(file.get("data"), h5py.Group):
            raise ValueError(
                f"{path} has no group 'data', so these are no demonstrations in robomimic's layout"
            )
        number = lambda name: int(name.rsplit("_", 1)[1])  # noqa: E731
        names = sorted((k for k in file["data"] if re.fullmatch(r"demo_\d+", k)), key=number)
        if not names:
            raise ValueError(f"{path} holds no demonstrations: there is no data/demo_0")
        try:
            env_args = json.loads(file["data"].attrs.get("env_args", "{}"))
        except ValueError:
            raise ValueError(f"{path}: the attribute env_args of data is not JSON") from None
        yield file, names, env_args


def env_args(path: str | Path) -> dict[str, Any]:
    """What the file says of its environment: env_name, type, env_kwargs; ours also env_id, spec and recorded."""
    with _open(path) as (_, _, found):
        return found


def fit(
    path: str | Path, env_id: str, cameras: Sequence[str] = (), image_size: int = 0
) -> dict[str, Any]:
    """Options for `envs.make` with which an environment is the one of the demonstrations.

    For a task of robosuite these are the env_kwargs of the file's env_args: robots, controllers and the like, without
    what is about images. Raises ValueError, one line, where the file is of another task, or where `cameras` (of images,
    `image_size` on each side) are not in it. A file that does not name its task fits all.
    """
    with _open(path) as (file, names, about):
        named = about.get("env_id") or about.get("env_name") or env_id
        task, wanted = named.rsplit("/", 1)[-1], env_id.rsplit("/", 1)[-1]
        if task != wanted:
            raise ValueError(f"{path} has demonstrations of {named}, not of {env_id}")
        obs = file["data"][names[0]].get("obs", {})
        for camera in cameras:
            if f"{camera}_image" not in obs:
                there = [key.removesuffix("_image") for key in obs if key.endswith("_image")]
                raise ValueError(
                    f"{path} has no camera {camera}; it has {', '.join(there) or 'none'}"
                )
            sides = obs[f"{camera}_image"].shape[1:3]
            if tuple(sides) != (image_size, image_size):
                raise ValueError(
                    f"{path} has images of {sides[0]} x {sides[1]}, the run wants {image_size} x {image_size}"
                )
    if not env_id.startswith("robosuite/"):
        return {}
    kwargs = about.get("env_kwargs") or {}
    kept = {k: v for k, v in kwargs.items() if k in BUILDS}
    frequency = kwargs.get("control_freq", CONTROL_HZ)
    if frequency != CONTROL_HZ:
        raise ValueError(f"{path} was recorded at {frequency} Hz, the environment has {CONTROL_HZ}")
    return {"env_kwargs": kept} if kept else {}


def read(
    path: str | Path,
    obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    filter: str | None = None,
    *,
    limit: int | None = None,
    until_success: bool = False,
) -> list[dict[str, Any]]:
    """Demonstrations of a file in robomimic's layout, ours or robomimic's own, in their order.

    Each is a dict of NumPy arrays, T steps long:
        "obs"        {"rgb" uint8 (T, H, W, 3 x cameras), "state" float32 (T, S), "privileged" float32 (T, P)}
        "final_obs"  the same without T: the observation after the last action; None where the file does not tell
        "actions"    float32 (T, A)         "rewards" float32 (T,)
        "dones"      bool (T,)              "success" bool (T,): rewards of 1, where the file has no such entry
        "name"       "demo_0", ...

    Args:
        obs_keys: which observations. None: those of the contract that the file has. "rgb" are all images, cameras in
            the order of the file's env_args, else of the alphabet, stacked on channels; "state" and "privileged" are
            the entries of these names or, in robomimic's files, the arms' eef_pos, eef_quat and gripper_qpos, and
            those with the objects' state. A list takes some of these, or entries by their own names; what is not named
            is not read. A mapping makes others: {"state": ("robot0_joint_pos", "robot0_gripper_qpos")}.
        filter: a list of the file's group `mask` ("train", "valid", ...); None: all demonstrations.
        limit: so many at most, the first ones.
        until_success: cut each after its first success (done is 1 there); those without one stay whole.

    Raises FileNotFoundError, ValueError (one line: what is wrong with the file or the request), ImportError.
    """
    if is_lerobot(path):
        return _read_lerobot(path, obs_keys, limit, until_success)
    with _open(path) as (file, names, about):
        if filter is not None:
            masks = {k: [n.decode() if isinstance(n, bytes) else str(n) for n in v[()]]
                     for k, v in file.get("mask", {}).items()}  # fmt: skip
            if filter not in masks:
                raise ValueError(
                    f"{path} has no filter {filter!r}; there are: {', '.join(masks) or 'none'}"
                )
            wanted = set(masks[filter])
            names = [n for n in names if n in wanted]
            if not names:
                raise ValueError(
                    f"{path}: the filter {filter!r} names no demonstration of the file"
                )
        group = file["data"][names[0]]
        if "actions" not in group:
            raise ValueError(f"{path}: data/{names[0]} has no actions")
        if "obs" not in group or not len(group["obs"]):
            raise ValueError(
                f"{path} has actions but no observations; robomimic's dataset_states_to_obs.py adds them to such a file"
            )
        available = list(group["obs"])
        contract = _contract_keys(
            available, (about.get("env_kwargs") or {}).get("camera_names") or ()
        )
        if obs_keys is None:
            keys = contract
        elif isinstance(obs_keys, Mapping):
            keys = {
                name: (parts,) if isinstance(parts, str) else tuple(parts)
                for name, parts in obs_keys.items()
            }
        else:
            obs_keys = (obs_keys,) if isinstance(obs_keys, str) else obs_keys
            keys = {name: contract.get(name, (name,)) for name in obs_keys}
        missing = sorted({part for parts in keys.values() for part in parts} - set(available))
        if missing or not keys:
            named = ", ".join(missing) or "that is known"
            raise ValueError(f"{path} has no observation {named}; it has {', '.join(available)}")
        return [
            _read_one(path, file["data"][name], name, keys, until_success) for name in names[:limit]
        ]


def _read_lerobot(path, obs_keys, limit: int | None, until_success: bool) -> list[dict[str, Any]]:
    """What `read` gives of a LeRobotDataset."""
    keys = ("state", "rgb") if obs_keys is None else tuple(obs_keys)
    if not set(keys) <= {"state", "rgb"}:
        raise ValueError(f"{path} is a LeRobotDataset: state and rgb can be read, not {keys}")
    found = []
    for demo in lerobot.episodes(path, images="rgb" in keys):
        if len(found) == limit:
            break
        demo["obs"] = {key: demo["obs"][key] for key in keys if key in demo["obs"]}
        found.append(_cut(demo) if until_success else demo)
    return found


def _cut(demo: dict[str, Any]) -> dict[str, Any]:
    """A demonstration up to its first success, where it goes on after one."""
    success = demo["success"]
    if not success[:-1].any():
        return demo
    end = int(success.argmax()) + 1
    final = {k: v[end] for k, v in demo["obs"].items()}
    cut = demo | {"obs": {k: v[:end] for k, v in demo["obs"].items()}, "final_obs": final}
    cut |= {key: demo[key][:end].copy() for key in ("actions", "rewards", "success", "dones")}
    cut["dones"][-1] = True
    return cut


def read_successes(path: str | Path, obs_keys: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """What `read` gives of the demonstrations that succeed, each up to its first success: to train on, and to validate.

    Validation is the file's list `mask/valid` or, where it has none, every tenth of its demonstrations.
    """
    found = read(path, obs_keys, until_success=True)
    try:
        names = {demo["name"] for demo in read(path, ("state",), "valid")}
    except ValueError:
        names = {demo["name"] for demo in found[9::10]}
    found = [demo for demo in found if demo["success"].any()]
    train, valid = (
        [demo for demo in found if (demo["name"] in names) == which] for which in (False, True)
    )
    if not train:
        raise ValueError(f"{path} has no successful demonstration to train on: record more")
    return train, valid


def _read_one(
    path, group, name: str, keys: dict[str, tuple[str, ...]], until_success: bool
) -> dict[str, Any]:
    try:
        actions = group["actions"][()].astype(np.float32)
        length = len(actions)
        rewards = (
            group["rewards"][()].astype(np.float32)
            if "rewards" in group
            else np.zeros(length, np.float32)
        )
        success = group["success"][()].astype(bool) if "success" in group else rewards >= 1 - 1e-6
        dones = (
            group["dones"][()].astype(bool) if "dones" in group else np.arange(length) == length - 1
        )
        obs = {k: _join([group["obs"][part][()] for part in parts]) for k, parts in keys.items()}
        final = None
        if "next_obs" in group:
            final = {
                k: _join([group["next_obs"][part][-1:] for part in parts])[0]
                for k, parts in keys.items()
            }
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: data/{name} cannot be read ({str(error).splitlines()[0]})"
        ) from None
    lengths = {len(x) for x in (rewards, success, dones, *obs.values())}
    if length == 0 or lengths != {length}:
        raise ValueError(
            f"{path}: data/{name} has {length} actions, but other entries are {sorted(lengths)} long"
        )
    demo = {"obs": obs, "final_obs": final, "actions": actions, "rewards": rewards, "dones": dones,
            "success": success, "name": name}  # fmt: skip
    return _cut(demo) if until_success else demo


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Images side by side on channels; anything else flattened to (T, numbers), side by side, float32."""
    if parts[0].dtype == np.uint8 and parts[0].ndim == 4:
        return np.concatenate(parts, -1)
    return np.concatenate([p.reshape(len(p), -1).astype(np.float32) for p in parts], -1)


def describe(path: str | Path) -> str:
    """What a file holds, in a few lines for people."""
    with _open(path) as (file, names, about):
        lengths = np.array([len(file["data"][n]["actions"]) for n in names])
        group = file["data"][names[0]]
        lines = [
            f"{path}: {len(names)} demonstrations, {lengths.sum()} steps ({lengths.min()} to {lengths.max()} each), "
            f"{Path(path).stat().st_size / 1e6:.1f} MB",
            f"environment  {about.get('env_id') or about.get('env_name', 'not named')}",
        ]
        lines += [f"recorded     {about['recorded']}"] if "recorded" in about else []
        lines += [
            f"filters      {', '.join(f'{k} ({len(v)})' for k, v in file.get('mask', {}).items()) or 'none'}"
        ]
        lines += [f"actions      {group['actions'].shape[1:]}"]
        for key, value in group.get("obs", {}).items():
            lines.append(f"obs          {key} {value.dtype} {value.shape[1:]}")
        if not len(group.get("obs", {})):
            lines.append("obs          none: robomimic's dataset_states_to_obs.py adds them")
        return "\n".join(lines)
