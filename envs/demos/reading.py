"""Demonstrations: scripted experts made human, recorded in robomimic's HDF5 layout, and a reader for it.

    python -m envs.demos --env-id SO101PlaceCube-v1 --episodes 200 --noise 0.1
    python -m envs.demos --env-id SO101LiftCube-v1 --obs pixels --cameras wrist third --render-size 84 --out lift.hdf5
    python -m envs.demos --env-id robosuite/PickPlaceCan --episodes 50        (docs/envs/robosuite.md: its environment)
    python -m envs.demos --show lift.hdf5                                     what a file holds, ours or robomimic's

The expert knows the true state and never errs by itself. `Human` makes it err, by what people do with a leader arm:
  noise   smooth disturbances of each action (an autoregressive process, 0.8 of it left after a step); the strength of
          an episode is `noise` times a factor from [0.5, 1.5], in units of the largest action
  pause   at each step this chance to stop for 2 to 8 steps
  slow    each episode at a pace of its own: actions times a factor from [1 - slow, 1]
What is stored is what was executed. By default only episodes that end in success are kept, as robomimic's files have
it; how many were tried stands in the file.

Layout of a file (T steps of an episode; all as robomimic has it but `success` and the attributes in brackets):
    data                      attributes total, env_args (JSON: env_name, type, env_kwargs [, env_id, spec, recorded])
    data/demo_0               attributes num_samples [, success]
        actions (T, A)  rewards (T,)  dones (T,)  success (T,)
        obs/state, obs/privileged, obs/<camera>_image ...    (T, ...)    before the action; pictures uint8 (T, H, W, 3)
                                                             (robosuite: robot0_eef_pos ... and object, as robomimic)
        next_obs/...                                         (T, ...)    the true next one, also at the end
    mask/train, mask/valid    names of demonstrations
A reward is 1 in every step that leads to a success, else 0; done is 1 there and in the last step.

For programs: `read(path)` gives a list of demonstrations, see there; `record(env, expert, path, ...)` writes them.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

INSTALL = 'demonstrations need h5py: pip install -e ".[resfit]"'
SMOOTH = 0.8  # of a disturbance is left after one step
PAUSE_STEPS = (2, 8)
VALID = 0.1  # share of the demonstrations that mask/valid names


def _h5py():
    try:
        import h5py
    except ImportError:
        raise ImportError(INSTALL) from None
    return h5py


# ------------------------------------------------------------------------------------------------- human-like errors --
class Human:
    """An expert with noise, pauses and a pace of its own in each episode; the module's docstring says how.

    `expert` has `reset(worlds)` and `act()`, and optionally the tensors `phase` and `clock`, which stand still in a
    pause, and `absolute`: indices of actions that are commands rather than changes (a gripper's "open"). Those get no
    noise and no pace, and a pause repeats them; all other actions are 0 in a pause.
    """

    def __init__(self, expert, env, *, noise: float = 0.0, pause: float = 0.0, slow: float = 0.0, seed: int = 0):
        if noise < 0 or not 0 <= pause < 1 or not 0 <= slow < 1:
            raise ValueError(f"noise must be at least 0, pause and slow in [0, 1); got {noise}, {pause} and {slow}")
        self.expert, self.noise, self.pause, self.slow = expert, noise, pause, slow
        self.generator = torch.Generator().manual_seed(seed)
        n, a = env.num_envs, env.action_dim
        self.change = torch.ones(a, dtype=torch.bool)
        self.change[list(getattr(expert, "absolute", ()))] = False
        self.disturbance, self.last = torch.zeros(n, a), torch.zeros(n, a)
        self.strength, self.pace = torch.zeros(n, 1), torch.ones(n, 1)
        self.left = torch.zeros(n, dtype=torch.int64)  # steps of a pause that are left
        self.reset()

    def reset(self, worlds: torch.Tensor | None = None) -> None:
        """Begins new episodes in `worlds`, a mask (N,) (None: in all)."""
        mask = torch.ones_like(self.left, dtype=torch.bool) if worlds is None else worlds.cpu()
        if not mask.any():
            return
        self.expert.reset(worlds)
        rand = lambda: torch.rand(len(mask), 1, generator=self.generator)  # noqa: E731
        column = mask[:, None]
        self.strength = torch.where(column, self.noise * (0.5 + rand()), self.strength)
        self.pace = torch.where(column, 1 - self.slow * rand(), self.pace)
        self.disturbance, self.last = (torch.where(column, 0.0, x) for x in (self.disturbance, self.last))
        self.left = torch.where(mask, 0, self.left)

    def act(self) -> torch.Tensor:
        """Actions (N, A) in [-1, 1] for the present states."""
        n = len(self.left)
        begins = (torch.rand(n, generator=self.generator) < self.pause) & (self.left == 0)
        steps = torch.randint(PAUSE_STEPS[0], PAUSE_STEPS[1] + 1, (n,), generator=self.generator)
        self.left = torch.where(begins, steps, self.left)
        paused = self.left > 0
        self.left = (self.left - 1).clamp_min(0)
        before = {name: getattr(self.expert, name).clone() for name in ("phase", "clock") if hasattr(self.expert, name)}
        actions = self.expert.act().cpu()
        for name, value in before.items():
            now = getattr(self.expert, name)
            setattr(self.expert, name, torch.where(paused.to(now.device), value, now))
        fresh = torch.randn(actions.shape, generator=self.generator)
        self.disturbance = SMOOTH * self.disturbance + (1 - SMOOTH**2) ** 0.5 * fresh
        moving = actions * self.pace + self.strength * self.disturbance
        actions = torch.where(self.change, moving, actions)
        still = torch.where(self.change, 0.0, self.last)
        self.last = torch.where(paused[:, None], still, actions).clamp(-1, 1)
        return self.last


# --------------------------------------------------------------------------------------------------------- recording --
def _file_obs(obs: Mapping[str, torch.Tensor], cameras: Sequence[str], state_parts=()) -> dict[str, np.ndarray]:
    """Observations of the contract under the names of the file: pictures by camera, the rest as it is.

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
        self.file = _h5py().File(self.temporary, "w")
        self.data = self.file.create_group("data")
        self.count = self.total = 0

    def add(self, demo: dict[str, Any], success: bool) -> None:
        group = self.data.create_group(f"demo_{self.count}")
        for key in ("actions", "rewards", "dones", "success"):
            group[key] = demo[key]
        for part in ("obs", "next_obs"):
            for key, value in demo[part].items():
                packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, *value.shape[1:])}
                group.create_dataset(f"{part}/{key}", data=value, **packed if value.dtype == np.uint8 else {})
        group.attrs["num_samples"], group.attrs["success"] = len(demo["actions"]), bool(success)
        self.count, self.total = self.count + 1, self.total + len(demo["actions"])

    def finish(self, env_args: dict, seed: int) -> None:
        self.data.attrs["total"], self.data.attrs["env_args"] = self.total, json.dumps(env_args)
        names = np.array([f"demo_{i}".encode() for i in range(self.count)])
        order = np.random.default_rng(seed).permutation(self.count)
        valid = round(VALID * self.count) if self.count > 1 else 0
        self.file["mask/valid"], self.file["mask/train"] = names[np.sort(order[:valid])], names[np.sort(order[valid:])]
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


@torch.no_grad()
def record(
    env, expert, path: str | Path, episodes: int, *, env_args: dict, seed: int = 0, cameras: Sequence[str] = (),
    keep: Literal["successes", "all"] = "successes", tries: int | None = None, tail: int = 10, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Records `episodes` demonstrations of `expert` (a `Human`, or any with `reset(worlds)`, `act()`) in `env`.

    Args:
        env: of the contract of `envs/__init__.py`, made with `stagger=False`; it is reset with `seed`.
        cameras: names of the cameras on the channels of "rgb", in their order.
        keep: only episodes that are a success at their end, or all. Episodes in which physics diverged are left out.
        tries: give up after so many episodes; None: ten times as many as wanted.
        tail: where the environment has `restart(worlds)`, an episode ends this many steps after success came to stay.
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
            raise ValueError(f"none of {tally['tried']} episodes was a success: use less noise, or --keep all")
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


def _episodes(env, expert, seed: int, cameras: Sequence[str], tail: int) -> Iterator[tuple[dict, bool]]:
    """Endless episodes as dicts of arrays with leading dimension T, and whether each is a success at its end."""
    n, parts = env.num_envs, getattr(env, "layout", {}).get("state", ())
    steps: list[dict] = []  # of all worlds; row 0 is step number `first`
    start, first, held = np.zeros(n, int), 0, np.zeros(n, int)
    obs = _file_obs(env.reset(seed), cameras, parts)
    expert.reset()
    while True:
        actions = expert.act()
        following, _, terminations, truncations, info = env.step(actions)
        success = info["success"].cpu().numpy().astype(bool)
        final = _file_obs(info["final_obs"], cameras, parts)
        steps.append({"obs": obs, "next_obs": final, "actions": actions.cpu().numpy(), "success": success})
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


def _episode(steps: list[dict], world: int) -> dict[str, Any]:
    success = np.array([s["success"][world] for s in steps])
    dones = success.copy()
    dones[-1] = True
    parts = {p: {k: np.stack([s[p][k][world] for s in steps]) for k in steps[0][p]} for p in ("obs", "next_obs")}
    return parts | {
        "actions": np.stack([s["actions"][world] for s in steps]).astype(np.float32),
        "rewards": success.astype(np.float32), "dones": dones.astype(np.uint8), "success": success.astype(np.uint8),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- reading --
def _contract_keys(available: Sequence[str], cameras: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which observations of a file make up "rgb", "state" and "privileged"; see `read`."""
    images = [f"{c}_image" for c in cameras if f"{c}_image" in available]
    images += sorted(k for k in available if k.endswith("_image") and k not in images)
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    matches = [re.fullmatch(rf"(robot\d+_(?:right_|left_)?)({'|'.join(parts)})", k) for k in available]
    arms = [m[0] for m in sorted(filter(None, matches), key=lambda m: (m[1], parts.index(m[2])))]
    state = ["state"] if "state" in available else arms
    objects = [k for k in ("object", "object-state") if k in available][:1]
    privileged = ["privileged"] if "privileged" in available else [*arms, *objects] if objects else []
    found = {"rgb": images, "state": state, "privileged": privileged}
    return {name: tuple(keys) for name, keys in found.items() if keys}


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, list[str], dict]]:
    """A file of demonstrations, the names of its demonstrations in their order, and its env_args."""
    h5py, path = _h5py(), Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `python -m envs.demos --help` says how to record one")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ValueError(f"{path} is not an HDF5 file (or was cut off while it was copied)") from None
    with file:
        if not isinstance(file.get("data"), h5py.Group):
            raise ValueError(f"{path} has no group 'data', so these are no demonstrations in robomimic's layout")
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


def read(
    path: str | Path, obs_keys: Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    filter: str | None = None, *, limit: int | None = None, until_success: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Demonstrations of a file in robomimic's layout, ours or robomimic's own, in their order.

    Each is a dict of numpy arrays, T steps long:
        "obs"        {"rgb" uint8 (T, H, W, 3 x cameras), "state" float32 (T, S), "privileged" float32 (T, P)}
        "final_obs"  the same without T: the observation after the last action; None where the file does not tell
        "actions"    float32 (T, A)         "rewards" float32 (T,)
        "dones"      bool (T,)              "success" bool (T,): rewards of 1, where the file has no such entry
        "name"       "demo_0", ...

    Args:
        obs_keys: which observations. None: those of the contract that the file has. "rgb" are all pictures, cameras in
            the order of the file's env_args, else of the alphabet, stacked on channels; "state" and "privileged" are
            the entries of these names or, in robomimic's files, the arms' eef_pos, eef_quat and gripper_qpos, and
            those with the objects' state. A list takes some of these, or entries by their own names; what is not named
            is not read. A mapping makes others: {"state": ("robot0_joint_pos", "robot0_gripper_qpos")}.
        filter: a list of the file's group `mask` ("train", "valid", ...); None: all demonstrations.
        limit: so many at most, the first ones.
        until_success: cut each after its first success (done is 1 there); those without one stay whole.

    Raises FileNotFoundError, ValueError (one line: what is wrong with the file or the request), ImportError.
    """
    with _open(path) as (file, names, about):
        if filter is not None:
            masks = {k: [n.decode() if isinstance(n, bytes) else str(n) for n in v[()]]
                     for k, v in file.get("mask", {}).items()}  # fmt: skip
            if filter not in masks:
                raise ValueError(f"{path} has no filter {filter!r}; there are: {', '.join(masks) or 'none'}")
            wanted = set(masks[filter])
            names = [n for n in names if n in wanted]
            if not names:
                raise ValueError(f"{path}: the filter {filter!r} names no demonstration of the file")
        group = file["data"][names[0]]
        if "actions" not in group:
            raise ValueError(f"{path}: data/{names[0]} has no actions")
        if "obs" not in group or not len(group["obs"]):
            raise ValueError(
                f"{path} has actions but no observations; robomimic's dataset_states_to_obs.py adds them to such a file"
            )
        available = list(group["obs"])
        contract = _contract_keys(available, (about.get("env_kwargs") or {}).get("camera_names") or ())
        if obs_keys is None:
            keys = contract
        elif isinstance(obs_keys, Mapping):
            keys = {name: (parts,) if isinstance(parts, str) else tuple(parts) for name, parts in obs_keys.items()}
        else:
            obs_keys = (obs_keys,) if isinstance(obs_keys, str) else obs_keys
            keys = {name: contract.get(name, (name,)) for name in obs_keys}
        missing = sorted({part for parts in keys.values() for part in parts} - set(available))
        if missing or not keys:
            named = ", ".join(missing) or "that is known"
            raise ValueError(f"{path} has no observation {named}; it has {', '.join(available)}")
        return [_read_one(path, file["data"][name], name, keys, until_success) for name in names[:limit]]


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
    train, valid = ([demo for demo in found if (demo["name"] in names) == which] for which in (False, True))
    if not train:
        raise ValueError(f"{path} has no successful demonstration to train on: record more")
    return train, valid


def _read_one(path, group, name: str, keys: dict[str, tuple[str, ...]], until_success: bool) -> dict[str, Any]:
    try:
        actions = group["actions"][()].astype(np.float32)
        length = len(actions)
        rewards = group["rewards"][()].astype(np.float32) if "rewards" in group else np.zeros(length, np.float32)
        success = group["success"][()].astype(bool) if "success" in group else rewards >= 1 - 1e-6
        dones = group["dones"][()].astype(bool) if "dones" in group else np.arange(length) == length - 1
        obs = {k: _join([group["obs"][part][()] for part in parts]) for k, parts in keys.items()}
        final = None
        if "next_obs" in group:
            final = {k: _join([group["next_obs"][part][-1:] for part in parts])[0] for k, parts in keys.items()}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: data/{name} cannot be read ({str(error).splitlines()[0]})") from None
    lengths = {len(x) for x in (rewards, success, dones, *obs.values())}
    if length == 0 or lengths != {length}:
        raise ValueError(f"{path}: data/{name} has {length} actions, but other entries are {sorted(lengths)} long")
    if until_success and success[:-1].any():
        end = int(success.argmax()) + 1
        final = {k: v[end] for k, v in obs.items()}
        obs = {k: v[:end] for k, v in obs.items()}
        actions, rewards, success, dones = actions[:end], rewards[:end], success[:end], dones[:end].copy()
        dones[-1] = True
    return {"obs": obs, "final_obs": final, "actions": actions, "rewards": rewards, "dones": dones, "success": success,
            "name": name}  # fmt: skip


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side on channels; anything else flattened to (T, numbers), side by side, float32."""
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
        lines += [f"filters      {', '.join(f'{k} ({len(v)})' for k, v in file.get('mask', {}).items()) or 'none'}"]
        lines += [f"actions      {group['actions'].shape[1:]}"]
        for key, value in group.get("obs", {}).items():
            lines.append(f"obs          {key} {value.dtype} {value.shape[1:]}")
        if not len(group.get("obs", {})):
            lines.append("obs          none: robomimic's dataset_states_to_obs.py adds them")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ command line --
@dataclass
class Args:
    """Records demonstrations of a scripted expert with human-like errors, or shows what a file holds."""

    env_id: str = "SO101PlaceCube-v1"
    """A task of envs/so101, or `robosuite/` and one of envs/robosuite."""
    episodes: int = 200
    """Demonstrations to record."""
    noise: float = 0.1
    """Standard deviation of the smooth noise on the actions, in units of the largest action; 0: none."""
    pause: float = 0.02
    """Chance of a pause at each step."""
    slow: float = 0.2
    """Largest share of the expert's speed that an episode gives up."""
    keep: Literal["successes", "all"] = "successes"
    """Which episodes to store; with `all`, the attribute `success` of each tells."""
    out: Path | None = None
    """File to write; None: runs/demos/ and a name made of the above."""
    overwrite: bool = False
    """Whether an existing file may be replaced (once the new one is complete)."""
    obs: Literal["state", "pixels"] = "state"
    """`pixels` stores pictures as well; state and privileged state are always stored."""
    cameras: tuple[str, ...] = ()
    """Cameras of the pictures; none: the environment's own choice."""
    render_size: int = 84
    """Pixels on each side of a picture."""
    domain_randomization: bool = True
    """SO-101: randomised looks, sizes, friction, gains, delays and joint noise."""
    num_envs: int = 0
    """Worlds at once; 0: 50 of the SO-101 (fewer for fewer episodes), 1 of robosuite."""
    tries: int | None = None
    """Give up after so many episodes; None: ten times as many as wanted."""
    seed: int = 0
    """Seed of starts, randomisation and errors: the same seed and settings, the same demonstrations."""
    show: Path | None = None
    """Record nothing; describe this file."""


def make(args: Args) -> tuple[Any, Any, dict, tuple[str, ...]]:
    """Environment, expert with human-like errors, env_args for the file and the cameras' names, as `args` say."""
    pixels = args.obs == "pixels"
    if args.env_id.startswith("robosuite/"):
        from envs import robosuite
        from envs.robosuite.expert import Expert

        options = {"render_size": args.render_size} | ({"cameras": args.cameras} if args.cameras else {})
        env = robosuite.make(
            args.env_id, args.num_envs or 1, "cpu", seed=args.seed, pictures=pixels, asymmetric=True, stagger=False,
            **options,
        )  # fmt: skip
        expert, about = Expert(env), env.env_args
    else:
        from envs import so101
        from envs.so101.expert import Expert

        options = {"domain_randomization": args.domain_randomization}
        cameras = args.cameras or ("wrist",)
        if pixels:
            options |= {"render_size": args.render_size, "cameras": cameras, "samples_per_pixel": 1}
        worlds = args.num_envs or min(50, args.episodes)
        env = so101.make(
            args.env_id, worlds, "cpu", seed=args.seed, asymmetric=True, stagger=False, pictures=pixels, **options
        )
        expert = Expert(env)
        # robomimic's types are 1 for robosuite, 2 for gym; it only asks when it runs a policy itself.
        kwargs = options | ({"camera_names": list(cameras)} if pixels else {})
        about = {"env_name": args.env_id, "type": 2, "env_kwargs": kwargs}
    errors = {"noise": args.noise, "pause": args.pause, "slow": args.slow, "seed": args.seed}
    about = {**about, "env_id": args.env_id, "spec": env.spec, "recorded": {**errors, "keep": args.keep}}
    return env, Human(expert, env, **errors), about, tuple(env.cameras) if pixels else ()


def main(args: Args) -> None:
    """The command line of this module."""
    if args.show is not None:
        print(describe(args.show))
        return
    if args.episodes < 1:
        raise ValueError(f"the number of episodes must be at least 1, not {args.episodes}")
    _h5py()
    pixels = f"__{args.render_size}px" if args.obs == "pixels" else ""
    name = f"{args.env_id.replace('/', '_')}__noise{args.noise:g}{pixels}__{args.episodes}__s{args.seed}.hdf5"
    out = (args.out or Path("runs/demos") / name).expanduser()
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; name another file with --out, or add --overwrite")
    env, human, about, cameras = make(args)
    inode = lambda: out.stat().st_ino if out.exists() else None  # noqa: E731
    before = inode()
    # A request to end is treated as Ctrl-C is: the file is finished with what there is.
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tally = record(
            env, human, out, args.episodes, env_args=about, seed=args.seed, cameras=cameras, keep=args.keep,
            tries=args.tries,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; {f'what was recorded is in {out}' if inode() != before else 'nothing was kept yet'}")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, usual)
        env.close()
    print(
        f"{out}: {tally['kept']} demonstrations, {tally['steps']} steps in {tally['seconds']:.0f} s; "
        f"success in {tally['succeeded']} of {tally['tried']} episodes"
    )
    if tally["kept"] < args.episodes:
        sys.exit(f"only {tally['kept']} of {args.episodes} in {tally['tried']} episodes; --tries allows more")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        sys.exit(f"envs.demos: {error}")
