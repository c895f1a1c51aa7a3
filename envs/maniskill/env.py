"""ManiSkill 3 tasks by their own ids, behind the environment contract of this repository.

    env = make("PickCube-v1", num_envs=16, device="cuda", seed=1)

Episodes follow ManiSkill's own vector environment with `ignore_terminations=True`: success never ends an episode, a
world that reaches the time limit is reset in the same step, and the observation before that is reported as `final_obs`.
Pictures are all of the task's sensor cameras stacked on channels; the state is the task's `agent` and `extra` entries
flattened in their own order, which is what ManiSkill's `FlattenRGBDObservationWrapper` gives; rewards are ManiSkill's
`normalized_dense` ones.

Two ways to simulate, chosen by `device` (or `sim_backend`) and never swapped silently:

- `physx_cuda`: all worlds in one batched simulation on the GPU. Needs NVIDIA's Vulkan driver.
- `physx_cpu`: SAPIEN simulates one world at a time, so the worlds are shared out over worker processes (`num_workers`);
  a single world runs in this process. Pictures come from a Vulkan driver in software, Mesa's lavapipe 25 or newer:
  `python scripts/install_software_vulkan.py` unpacks one that this module finds by itself.

Worlds draw their episodes from seeds of their own (`episode_seed`), so on the CPU an episode depends on the seed, the
world and the episode's number alone, neither on the number of workers nor on what the learner draws.

Shapes: `N` worlds, `H = W = render_size`, `C` = 3 x cameras, `A` action dims. Nothing of ManiSkill is imported before
`make` is called.
"""

import argparse
import ctypes
import difflib
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

GPU_STAGGER_GROUPS = 5  # a partial reset on the GPU renders every world once more: 5 a period cost 10 % more pictures


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device,
    *,
    seed: int,
    render_size: int = 128,
    asymmetric: bool = False,
    stagger: bool = True,
    control_mode: str = "pd_joint_delta_pos",
    reward_mode: str = "normalized_dense",
    max_episode_steps: int | None = None,
    shader: str = "minimal",
    sim_backend: str = "auto",
    render_backend: str = "auto",
    light_visuals: bool | None = None,
    num_workers: int | None = None,
    video_size: int = 256,
    **task_kwargs: Any,
) -> "ManiSkillEnv":
    """Builds `num_envs` worlds of the ManiSkill task `env_id`.

    Args:
        env_id: ManiSkill's own id, such as `PickCube-v1`.
        device: where observations and rewards live; with `sim_backend="auto"` a CUDA device also means GPU simulation.
        seed: of the first episodes (see `episode_seed`).
        render_size: pixels on each side of every sensor camera.
        asymmetric: adds `obs["privileged"]`, the task's full `state` observation, for a critic.
        stagger: the first episodes start at different clock readings, so that worlds do not reset in lockstep.
        control_mode, reward_mode: ManiSkill's names; the action is mapped from [-1, 1] if the mode's own range differs.
        max_episode_steps: time limit in steps; None takes the task's registered one.
        shader: ManiSkill's shader pack of the sensor cameras.
        sim_backend: `auto`, `physx_cuda` or `physx_cpu` (the latter also with a CUDA `device`, where results are sent).
        render_backend: `auto` is the simulating GPU, and on the CPU the first Vulkan device (`pci:0`).
        light_visuals: draws robots by their collision shapes, which for the Panda have 56 times fewer vertices.
            Changes the robot's look, so results are not comparable with pictures drawn without it. None: on for
            `physx_cpu`, off for `physx_cuda`.
        num_workers: processes for `physx_cpu`; None is 0 (this process) for one world, else one a core, at most one a
            world.
        video_size: pixels on each side of the pictures behind `render`.
        task_kwargs: handed to the task, for instance `robot_uids="so100"`.

    Raises:
        ImportError: mani_skill is not installed.
        ValueError: unknown id, control mode or reward mode, or a task that does not fit (no camera, no time limit).
        RuntimeError: no usable Vulkan driver, missing assets, or the simulation could not start.
    """
    for package in ("mani_skill", "sapien"):
        if find_spec(package) is None:
            raise ImportError(f'{env_id} needs {package}, which is not installed: run `pip install -e ".[maniskill]"`')
    device = torch.device(device)
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if sim_backend == "auto":
        sim_backend = "physx_cuda" if device.type == "cuda" else "physx_cpu"
    if sim_backend not in ("physx_cpu", "physx_cuda"):
        raise ValueError(f"sim_backend must be auto, physx_cpu or physx_cuda, got {sim_backend!r}")
    on_gpu = sim_backend == "physx_cuda"
    if on_gpu and (device.type != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"sim_backend physx_cuda needs a CUDA device that torch can use, got device={str(device)!r}")
    index = "" if device.index is None else f":{device.index}"
    if render_backend == "auto":
        render_backend = f"sapien_cuda{index}" if on_gpu else "pci:0"
    options = dict(
        env_id=env_id,
        render_size=render_size,
        asymmetric=asymmetric,
        control_mode=control_mode,
        reward_mode=reward_mode,
        max_episode_steps=max_episode_steps,
        shader=shader,
        sim_backend=f"physx_cuda{index}" if on_gpu else "physx_cpu",
        render_backend=render_backend,
        light_visuals=(not on_gpu) if light_visuals is None else light_visuals,
        video_size=video_size,
        task_kwargs=task_kwargs,
    )
    if on_gpu:
        worlds: _Batch | _CpuWorlds | _Workers = _Batch(options, num_envs)
    else:
        if num_workers is None:
            num_workers = 0 if num_envs == 1 else min(num_envs, len(os.sched_getaffinity(0)))
        workers = min(num_workers, num_envs)
        worlds = _Workers(options, num_envs, workers) if workers else _CpuWorlds(options, num_envs)
    return ManiSkillEnv(worlds, env_id, num_envs, device, seed, stagger, GPU_STAGGER_GROUPS if on_gpu else num_envs)


def episode_seed(seed: int, world: int, episode: int) -> int:
    """Seed in [0, 2^31) of a world's `episode`-th episode after `reset(seed)`; independent streams by hashing."""
    return int(np.random.SeedSequence((seed, world, episode)).generate_state(1)[0] >> 1)


class ManiSkillEnv:
    """`N` worlds with their clocks, episode statistics and seeds. Made by `make`, which documents the choices.

    Attributes:
        action_dim, state_dim, privileged_dim: sizes `A`, of `obs["state"]` and of `obs["privileged"]` (0 if not asked).
        image_shape: `(H, W, C)` of `obs["rgb"]`.
        max_episode_steps, control_hz: the time limit in steps and the control rate in Hz.
        spec: what a deployment needs to know, as plain JSON values.
        nan_resets: int64 tensor, worlds reset so far because their physics became non-finite.
    """

    def __init__(
        self,
        worlds: "_Batch | _CpuWorlds | _Workers",
        env_id: str,
        num_envs: int,
        device: torch.device,
        seed: int,
        stagger: bool,
        stagger_groups: int,
    ):
        self.env_id, self.num_envs, self.device = env_id, num_envs, device
        self._worlds, self._on_gpu = worlds, isinstance(worlds, _Batch)
        self.spec = worlds.describe()
        self.action_dim: int = self.spec["action_dim"]
        self.state_dim: int = self.spec["state_dim"]
        self.privileged_dim: int = self.spec["privileged_dim"]
        self.image_shape: tuple[int, int, int] = tuple(self.spec["image_shape"])
        self.max_episode_steps: int = self.spec["max_episode_steps"]
        self.control_hz: float = self.spec["control_hz"]
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=device)
        # per world: `_episode`, the current episode's number since reset(seed); `_clock`, steps since it began, kept on
        # the host so that its end is known without waiting for the GPU; `_seeds`, `_next_seeds`, of it and the next one
        self.reset(seed)
        if stagger:
            groups = min(stagger_groups, num_envs)
            self._clock = np.arange(num_envs) % groups * self.max_episode_steps // groups
            worlds.set_clock(self._clock)

    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Starts a new episode in every world, all clocks at 0.

        Args:
            seed: given, the episodes of that seed from the first on; None, each world's next episode.

        Returns:
            `rgb` uint8 (N, H, W, C), `state` float32 (N, state_dim), and if asymmetric `privileged`
            float32 (N, privileged_dim).
        """
        if seed is None:
            self._episode = self._episode + 1
        else:
            self._seed, self._episode = seed, np.zeros(self.num_envs, np.int64)
        self._draw_seeds()
        self._clock = np.zeros(self.num_envs, np.int64)
        self._returns = torch.zeros(self.num_envs, device=self.device)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._success_once = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self._to_device(self._worlds.reset(self._seeds))

    def _draw_seeds(self) -> None:
        """Fills the seeds of every world's current and next episode."""
        numbers = [(i, int(episode)) for i, episode in enumerate(self._episode)]
        self._seeds = np.array([episode_seed(self._seed, i, k) for i, k in numbers])
        self._next_seeds = np.array([episode_seed(self._seed, i, k + 1) for i, k in numbers])

    def step(self, actions: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """One control step in every world, and the automatic reset of those whose episode ends with it.

        Args:
            actions: (N, A), clipped to [-1, 1].

        Returns:
            obs, rewards (N,) float32, terminations (N,) bool (all False), truncations (N,) bool, and info with
            `final_obs` (full batch, the observation before any reset; the very tensors of obs where no world ended),
            `success` (N,) bool of the state before any reset, and `episode` = `return`, `length`, `success_once`,
            `success_at_end`, each (N,) and valid where truncated.

        Raises ValueError for actions of another shape or not finite.

        A world with a non-finite state or reward is reset and truncated with reward 0 and success False; its
        `final_obs` is its last finite observation.
        """
        if tuple(actions.shape) != (self.num_envs, self.action_dim):
            raise ValueError(f"actions must have shape {(self.num_envs, self.action_dim)}, got {tuple(actions.shape)}")
        if not self._on_gpu:  # on the GPU the question would wait for the device; worlds that break are reset below
            healthy = torch.isfinite(actions).all(dim=1)
            if not healthy.all():
                raise ValueError(f"the actions of worlds {torch.nonzero(~healthy).flatten().tolist()} are not finite")
        self._clock = self._clock + 1
        ends = self._clock >= self.max_episode_steps
        out = self._worlds.step(actions.detach().float(), ends, self._next_seeds)
        obs = self._to_device(out["obs"])
        final_obs = obs if out["final_obs"] is None else self._to_device(out["final_obs"])
        rewards, success = self._tensor(out["rewards"]), self._tensor(out["success"])
        done = ends | out["bad"]
        truncations = torch.from_numpy(done).to(self.device)

        self._returns = self._returns + rewards
        self._lengths = self._lengths + 1
        self._success_once = self._success_once | success
        episode = dict(length=self._lengths, success_once=self._success_once, success_at_end=success)
        episode["return"] = self._returns
        if done.any():
            ended = np.flatnonzero(done)
            self._episode[ended] += 1
            self._seeds[ended] = self._next_seeds[ended]
            for i in ended:
                self._next_seeds[i] = episode_seed(self._seed, int(i), int(self._episode[i]) + 1)
            self._clock[ended] = 0
            self._returns = torch.where(truncations, 0.0, self._returns)
            self._lengths = torch.where(truncations, 0, self._lengths)
            self._success_once = self._success_once & ~truncations
        if out["bad"].any():
            self.nan_resets = self.nan_resets + int(out["bad"].sum())
        info = dict(final_obs=final_obs, success=success, episode=episode)
        return obs, rewards, torch.zeros_like(truncations), truncations, info

    def render(self, worlds: tuple[int, ...] = (0,), size: int = 256, camera: str = "third") -> np.ndarray:
        """Pictures for people, uint8 (len(worlds), size, size, 3).

        Args:
            camera: `third` is the task's own camera for people (drawn at `video_size` and resized to `size`); any other
                name is one of the sensor cameras, whose last picture is enlarged pixel by pixel.
        """
        names = list(self.spec["cameras"])
        if camera != "third" and camera not in names:
            raise ValueError(f"{self.env_id} has no camera {camera!r}; choose one of: third, {', '.join(names)}")
        pictures = torch.from_numpy(self._worlds.render(np.asarray(worlds, np.int64), camera)).permute(0, 3, 1, 2)
        if pictures.shape[-1] != size:
            smooth = dict(mode="bilinear", antialias=True) if camera == "third" else dict(mode="nearest")
            pictures = torch.nn.functional.interpolate(pictures.float(), (size, size), **smooth).round().clamp(0, 255)
        return pictures.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()

    def state_dict(self) -> dict:
        """Everything this module counts, and ManiSkill's `get_state_dict` of the worlds.

        A resumed run is close, not equal bit for bit: PhysX keeps contact and warm-start caches that ManiSkill does not
        export, so flags read from contacts (`is_grasped`) are False until the next step.
        """
        return dict(
            seed=self._seed,
            episode=torch.tensor(self._episode),
            clock=torch.tensor(self._clock),
            seeds=torch.tensor(self._seeds),
            returns=self._returns.cpu(),
            lengths=self._lengths.cpu(),
            success_once=self._success_once.cpu(),
            nan_resets=self.nan_resets.cpu(),
            worlds=_map_tree(self._worlds.get_state(), torch.from_numpy),
        )

    def load_state_dict(self, state: dict) -> dict[str, torch.Tensor]:
        """Restores `state_dict()` and returns the current observation.

        Each world is first reset to its episode's seed, which brings back what a task draws once an episode, then its
        bodies and joints are set. On the GPU a task's own tensors that are no body (drawn for several worlds in one
        partial reset) are those of a full reset instead.
        """
        if len(state["clock"]) != self.num_envs:
            raise ValueError(f"the state holds {len(state['clock'])} worlds, this environment has {self.num_envs}")
        self._seed = state["seed"]
        self._episode = state["episode"].numpy().copy()
        self._draw_seeds()
        self._clock = state["clock"].numpy().copy()
        self._returns = state["returns"].to(self.device)
        self._lengths = state["lengths"].to(self.device)
        self._success_once = state["success_once"].to(self.device)
        self.nan_resets = state["nan_resets"].to(self.device)
        worlds = _map_tree(state["worlds"], lambda tensor: tensor.numpy())
        return self._to_device(self._worlds.set_state(worlds, state["seeds"].numpy(), self._clock))

    def close(self) -> None:
        """Ends the simulation and its worker processes."""
        self._worlds.close()

    def _tensor(self, value: "np.ndarray | torch.Tensor") -> torch.Tensor:
        return (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).to(self.device)

    def _to_device(self, obs: dict) -> dict[str, torch.Tensor]:
        return {key: self._tensor(value) for key, value in obs.items()}


class _Batch:
    """One ManiSkill environment object: `n` worlds on the GPU, or one world on the CPU (`n` = 1)."""

    def __init__(self, options: dict, num_envs: int):
        self.options, self.n = options, num_envs
        self.cpu = options["sim_backend"] == "physx_cpu"
        if self.cpu:
            use_software_vulkan()
        with warnings.catch_warnings():
            # SAPIEN warns where it uses the Vulkan loader of its own wheel, which works
            warnings.filterwarnings("ignore", message="Failed to find system libvulkan")
            import gymnasium
            import mani_skill
            import mani_skill.envs  # registers the tasks
            import sapien
            from mani_skill.envs.utils.observations import parse_obs_mode_to_struct
            from mani_skill.utils import common
        self._common, self._state_mode = common, parse_obs_mode_to_struct("state_dict")
        self._version = mani_skill.__version__
        self.max_episode_steps = _check_task(options)
        if self.cpu:
            _check_vulkan(sapien, options["render_backend"])
        size, video = options["render_size"], options["video_size"]
        kwargs = dict(
            num_envs=num_envs,
            obs_mode="rgb",
            control_mode=options["control_mode"],
            reward_mode=options["reward_mode"],
            render_mode="rgb_array",
            sim_backend=options["sim_backend"],
            render_backend=options["render_backend"],
            sensor_configs=dict(width=size, height=size, shader_pack=options["shader"]),
            human_render_camera_configs=dict(width=video, height=video),
        )
        if not self.cpu:
            kwargs["reconfiguration_freq"] = 0  # single worlds of a batch cannot be rebuilt, only reset
        try:
            with _patches(self.cpu, options["light_visuals"]):
                self.base = gymnasium.make(options["env_id"], **{**kwargs, **options["task_kwargs"]}).unwrapped
        except AssertionError as error:
            refusal = re.fullmatch(r"(.*) not in supported modes: \[(.*)\]", str(error))
            if refusal is None:
                raise
            mode, others = refusal.group(1), refusal.group(2).replace("'", "")
            raise ValueError(
                f"{options['env_id']}'s robot has no control mode {mode!r}; choose one of: {others}"
            ) from None
        except (RuntimeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "" if self.cpu else "; GPU simulation needs NVIDIA's Vulkan driver and SAPIEN's PhysX GPU library"
            raise RuntimeError(f"ManiSkill could not start {options['env_id']}: {reason}{hint}") from error
        self.base.get_sensor_params = dict  # camera matrices, computed at each step and part of no observation here
        cameras = self.base.get_obs()["sensor_data"]
        self._cameras = [name for name, data in cameras.items() if "rgb" in data]
        if not self._cameras:
            raise ValueError(f"{options['env_id']} has no sensor camera, so there is nothing to learn from pixels")
        self._low, self._high, self._splits = self._action_range()
        self._obs = self.reset(np.arange(num_envs))

    # ----- description -----

    def _action_range(self) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, int]] | None]:
        """Bounds (A,) of ManiSkill's own action, and for several robots their names and sizes in stacking order."""
        space = self.base.single_action_space
        spaces = dict(space.spaces) if hasattr(space, "spaces") else {"": space}
        low = np.concatenate([s.low for s in spaces.values()]).astype(np.float32)
        high = np.concatenate([s.high for s in spaces.values()]).astype(np.float32)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            mode, env_id = self.options["control_mode"], self.options["env_id"]
            raise ValueError(f"{env_id}: control mode {mode!r} has unbounded actions; choose one with limits")
        splits = [(name, s.shape[0]) for name, s in spaces.items()] if hasattr(space, "spaces") else None
        return torch.from_numpy(low).to(self.base.device), torch.from_numpy(high).to(self.base.device), splits

    def describe(self) -> dict:
        """What `ManiSkillEnv.spec` holds; plain JSON values, joint limits in rad (or m), None where there is none."""
        base, raw = self.base, self.base.get_obs()
        agents = getattr(base.agent, "agents_dict", None) or {"": base.agent}
        joints = [(name, joint.name) for name, agent in agents.items() for joint in agent.robot.active_joints]
        limits = np.concatenate([agent.robot.get_qlimits()[0].cpu().numpy() for agent in agents.values()])
        controllers = {}
        for name, agent in agents.items():
            parts = getattr(agent.controller, "controllers", None) or {"all": agent.controller}
            for part, controller in parts.items():
                config = controller.config
                controllers[f"{name}/{part}".strip("/")] = dict(
                    kind=type(controller).__name__,
                    joints=[joint.name for joint in controller.joints],
                    lower=_plain(getattr(config, "lower", None)),
                    upper=_plain(getattr(config, "upper", None)),
                    use_delta=bool(getattr(config, "use_delta", False)),
                )
        state = {key: value for key, value in raw.items() if not key.startswith("sensor_")}
        sensors = {
            name: dict(
                width=sensor.camera.get_width(),
                height=sensor.camera.get_height(),
                fov_y=_plain(float(np.ravel(sensor.camera._render_cameras[0].fovy)[0])),
            )
            for name, sensor in base._sensors.items()
            if name in self._cameras
        }
        return dict(
            simulator="maniskill",
            mani_skill=self._version,
            env_id=self.options["env_id"],
            robot=list(agents)[0] if "" not in agents else base.agent.uid,
            sim_backend=self.options["sim_backend"].split(":")[0],
            light_visuals=self.options["light_visuals"],
            reward_mode=self.options["reward_mode"],
            control_mode=self.options["control_mode"],
            control_hz=float(base.control_freq),
            max_episode_steps=self.max_episode_steps,
            has_success="success" in base.get_info(),
            action_dim=len(self._low),
            action_low=self._low.tolist(),
            action_high=self._high.tolist(),
            controllers=controllers,
            joint_names=[f"{name}/{joint}".strip("/") for name, joint in joints],
            joint_low=_plain(limits[:, 0]),
            joint_high=_plain(limits[:, 1]),
            state_dim=self._obs["state"].shape[1],
            state_layout=_layout(state),
            privileged_dim=self._obs["privileged"].shape[1] if self.options["asymmetric"] else 0,
            image_shape=list(self._obs["rgb"].shape[1:]),
            cameras=sensors,
        )

    # ----- observations -----

    def _observe(self, raw: dict, info: dict) -> dict[str, torch.Tensor]:
        """The contract's observation from ManiSkill's; copies the pictures, whose memory the renderer uses again."""
        pictures = [raw["sensor_data"][name]["rgb"] for name in self._cameras]
        rgb = torch.cat(pictures, dim=-1) if len(pictures) > 1 else pictures[0] * 1
        obs = dict(rgb=rgb, state=self._flat({k: v for k, v in raw.items() if not k.startswith("sensor_")}))
        if self.options["asymmetric"]:
            # tasks add what a policy may not see where the observation mode is a `state` one
            base, mode, struct = self.base, self.base._obs_mode, self.base.obs_mode_struct
            base._obs_mode, base.obs_mode_struct = "state_dict", self._state_mode
            try:
                obs["privileged"] = self._flat(base._get_obs_state_dict(info))
            finally:
                base._obs_mode, base.obs_mode_struct = mode, struct
        return obs

    def _flat(self, tree: dict) -> torch.Tensor:
        return self._common.flatten_state_dict(tree, use_torch=True, device=self.base.device).float()

    # ----- simulation -----

    @torch.no_grad()
    def reset(self, seeds: np.ndarray) -> dict[str, torch.Tensor]:
        """Resets all worlds; on the GPU a task draws from the first seed, and per world where it knows how to."""
        with _patches(self.cpu, self.options["light_visuals"], self.base.reconfiguration_freq != 0):
            raw, info = self.base.reset(seed=[int(s) for s in seeds])
        self._obs = self._observe(raw, info)
        return self._obs

    def _reset_some(self, worlds: np.ndarray, seeds: np.ndarray, broken: bool) -> dict[str, torch.Tensor]:
        """Resets the given worlds to their seeds and returns the observation of all. A broken CPU world is rebuilt."""
        base = self.base
        if self.n == 1:
            rebuild = self.cpu and (broken or base.reconfiguration_freq != 0)
            with _patches(self.cpu, self.options["light_visuals"], rebuild):
                raw, info = base.reset(seed=int(seeds[0]), options=dict(reconfigure=broken and self.cpu))
        else:
            # a seed given to a partial reset would seed every world anew, so the generators are set here instead
            chosen = [int(s) for s in seeds[worlds]]
            base._batched_episode_rng[worlds] = [np.random.RandomState(s) for s in chosen]
            base._episode_rng = np.random.RandomState(chosen[0])
            with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
                torch.manual_seed(chosen[0])
                raw, info = base.reset(options=dict(env_idx=torch.from_numpy(worlds).to(base.device)))
        return self._observe(raw, info)

    @torch.no_grad()
    def step(self, actions: "torch.Tensor | np.ndarray", ends: np.ndarray, seeds: np.ndarray) -> dict:
        """One step, then the reset of the worlds in `ends` and of those with non-finite physics.

        Args:
            actions (n, A), ends (n,) bool: worlds whose time is up with this step, seeds (n,) of the next episodes.

        Returns:
            `obs`, `final_obs` (None where no world was reset), `rewards` float32 (n,), `success` bool (n,), and `bad`
            (n,) bool on the host: reading it is the one wait for the GPU here, right after ManiSkill's own wait for its
            pictures.
        """
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.base.device).clamp(-1.0, 1.0)
        actions = self._low + (actions + 1.0) * 0.5 * (self._high - self._low)
        given: Any = actions
        if self._splits is not None:
            parts = actions.split([size for _, size in self._splits], dim=1)
            given = {name: part for (name, _), part in zip(self._splits, parts, strict=True)}
        raw, rewards, _, _, info = self.base.step(given)
        obs = self._observe(raw, info)
        rewards = rewards.float().reshape(self.n)
        success = info["success"].bool().reshape(self.n) if "success" in info else torch.zeros_like(rewards).bool()
        finite = torch.isfinite(rewards)
        for key in ("state", "privileged"):
            if key in obs:
                finite = finite & torch.isfinite(obs[key]).all(dim=1)
        bad = (~finite).cpu().numpy()
        final_obs = None
        if bad.any():
            for key, value in obs.items():
                value[torch.from_numpy(bad).to(value.device)] = self._obs[key][torch.from_numpy(bad).to(value.device)]
            rewards, success = torch.where(finite, rewards, 0.0), success & finite
        if (ends | bad).any():
            final_obs = obs
            obs = self._reset_some(np.flatnonzero(ends | bad), seeds, bool(bad.any()))
        self._obs = obs
        return dict(obs=obs, final_obs=final_obs, rewards=rewards, success=success, bad=bad)

    def set_clock(self, clock: np.ndarray) -> None:
        """Tells ManiSkill how many steps of the current episode have passed, for tasks that read it."""
        self.base._elapsed_steps[:] = torch.from_numpy(clock).to(self.base._elapsed_steps)

    @torch.no_grad()
    def render(self, worlds: np.ndarray, camera: str) -> np.ndarray:
        """Pictures uint8 (len(worlds), h, w, 3) of the task's own camera for people, or a sensor's last picture."""
        if camera != "third":
            start = 3 * self._cameras.index(camera)
            pictures = self._obs["rgb"][..., start : start + 3]
        else:
            names = list(self.base._human_render_cameras)
            if not names:
                raise ValueError(f"{self.options['env_id']} has no camera for people; use one of {self._cameras}")
            pictures = self.base.render_rgb_array(names[0])
        return pictures[torch.from_numpy(worlds)].cpu().numpy()

    def get_state(self) -> dict:
        """ManiSkill's state dict as numpy arrays."""
        return _map_tree(self.base.get_state_dict(), lambda tensor: tensor.detach().cpu().numpy().copy())

    @torch.no_grad()
    def set_state(self, state: dict, seeds: np.ndarray, clock: np.ndarray) -> dict[str, torch.Tensor]:
        """Resets to the episodes' seeds, then sets bodies, joints and controllers; returns the observation."""
        self.reset(seeds)
        state = _map_tree(state, lambda array: torch.tensor(array, device=self.base.device))
        controller = state.pop("controller", None)
        self.base.set_state_dict(state)
        if controller is not None:
            self.base.agent.set_controller_state(controller)
        self.set_clock(clock)
        info = self.base.get_info()
        self._obs = self._observe(self.base.get_obs(info), info)
        return self._obs

    def close(self) -> None:
        self.base.close()


class _CpuWorlds:
    """Several one-world batches stepped in turn, with stacked numpy arrays in and out."""

    def __init__(self, options: dict, num_envs: int):
        self.batches = [_Batch(options, 1) for _ in range(num_envs)]

    def describe(self) -> dict:
        return self.batches[0].describe()

    def reset(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        return _stack([batch.reset(seeds[i : i + 1]) for i, batch in enumerate(self.batches)])

    def step(self, actions: "torch.Tensor | np.ndarray", ends: np.ndarray, seeds: np.ndarray) -> dict:
        """As `_Batch.step`, in numpy."""
        actions = actions.cpu() if isinstance(actions, torch.Tensor) else torch.from_numpy(actions)
        rows = [slice(i, i + 1) for i in range(len(self.batches))]
        outs = [b.step(actions[r], ends[r], seeds[r]) for b, r in zip(self.batches, rows, strict=True)]
        final_obs = None
        if any(out["final_obs"] is not None for out in outs):
            final_obs = _stack([out["obs"] if out["final_obs"] is None else out["final_obs"] for out in outs])
        return dict(
            obs=_stack([out["obs"] for out in outs]),
            final_obs=final_obs,
            rewards=np.concatenate([out["rewards"].numpy() for out in outs]),
            success=np.concatenate([out["success"].numpy() for out in outs]),
            bad=np.concatenate([out["bad"] for out in outs]),
        )

    def set_clock(self, clock: np.ndarray) -> None:
        for i, batch in enumerate(self.batches):
            batch.set_clock(clock[i : i + 1])

    def render(self, worlds: np.ndarray, camera: str) -> np.ndarray:
        return np.concatenate([self.batches[i].render(np.zeros(1, np.int64), camera) for i in worlds])

    def get_state(self) -> list[dict]:
        return [batch.get_state() for batch in self.batches]

    def set_state(self, states: list[dict], seeds: np.ndarray, clock: np.ndarray) -> dict[str, np.ndarray]:
        return _stack([b.set_state(states[i], seeds[i : i + 1], clock[i : i + 1]) for i, b in enumerate(self.batches)])

    def close(self) -> None:
        for batch in self.batches:
            batch.close()


class _Workers:
    """`_CpuWorlds` in several processes, each with a block of the worlds; every call is answered by all of them.

    Processes are spawned: a forked child would inherit the parent's Vulkan and torch threads in an unusable state.
    """

    def __init__(self, options: dict, num_envs: int, num_workers: int):
        context = multiprocessing.get_context("spawn")
        self.blocks = [slice(int(b[0]), int(b[-1]) + 1) for b in np.array_split(np.arange(num_envs), num_workers)]
        self.num_envs = num_envs
        self.pipes, self.processes = [], []
        for block in self.blocks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, options, block.stop - block.start), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as the end of its pipe
            self.pipes.append(ours)
            self.processes.append(process)
        try:
            for worker in range(num_workers):
                self._receive(worker)
        except BaseException:
            self.close()
            raise

    def _receive(self, worker: int) -> Any:
        try:
            problem, value = self.pipes[worker].recv()
        except (EOFError, ConnectionError):
            process = self.processes[worker]
            process.join(timeout=5)
            raise RuntimeError(
                f"ManiSkill worker {worker} of {len(self.pipes)} died (exit code {process.exitcode}); "
                "with -9 the machine ran out of memory: use fewer worlds or workers"
            ) from None
        if problem is None:
            return value
        kind, message, details = problem
        known = {"ImportError": ImportError, "ValueError": ValueError}
        error = known.get(kind, RuntimeError)(message if kind in (*known, "RuntimeError") else f"{kind}: {message}")
        error.add_note(f"in ManiSkill worker {worker}:\n{details}")
        raise error

    def _call(self, method: str, *arguments: list) -> list:
        """Sends `method` to every worker, with its entry of each list in `arguments`, and collects the answers."""
        for worker, pipe in enumerate(self.pipes):
            try:
                pipe.send((method, [a[worker] for a in arguments]))
            except (BrokenPipeError, ConnectionError):
                self._receive(worker)
                raise
        return [self._receive(worker) for worker in range(len(self.pipes))]

    def _split(self, array: Any) -> list:
        return [array[block] for block in self.blocks]

    def describe(self) -> dict:
        self.pipes[0].send(("describe", []))
        return self._receive(0)

    def reset(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        return _stack(self._call("reset", self._split(seeds)))

    def step(self, actions: torch.Tensor, ends: np.ndarray, seeds: np.ndarray) -> dict:
        actions = actions.cpu().numpy()
        outs = self._call("step", self._split(actions), self._split(ends), self._split(seeds))
        final_obs = None
        if any(out["final_obs"] is not None for out in outs):
            final_obs = _stack([out["obs"] if out["final_obs"] is None else out["final_obs"] for out in outs])
        joined = {key: np.concatenate([out[key] for out in outs]) for key in ("rewards", "success", "bad")}
        return dict(obs=_stack([out["obs"] for out in outs]), final_obs=final_obs, **joined)

    def set_clock(self, clock: np.ndarray) -> None:
        self._call("set_clock", self._split(clock))

    def render(self, worlds: np.ndarray, camera: str) -> np.ndarray:
        pictures = []
        for world in np.arange(self.num_envs)[worlds]:
            worker = next(w for w, block in enumerate(self.blocks) if block.start <= world < block.stop)
            self.pipes[worker].send(("render", [np.array([world - self.blocks[worker].start]), camera]))
            pictures.append(self._receive(worker))
        return np.concatenate(pictures)

    def get_state(self) -> list[dict]:
        return [state for states in self._call("get_state") for state in states]

    def set_state(self, states: list[dict], seeds: np.ndarray, clock: np.ndarray) -> dict[str, np.ndarray]:
        return _stack(self._call("set_state", self._split(states), self._split(seeds), self._split(clock)))

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                pipe.send(("close", []))
            except (BrokenPipeError, ConnectionError):
                continue  # that worker is gone already
            finally:
                process.join(timeout=10)
                if process.is_alive():
                    process.terminate()
                    process.join()
                pipe.close()
        self.pipes, self.processes = [], []


def _serve(pipe: Any, options: dict, num_envs: int) -> None:
    """A worker process: builds its worlds, then answers `(method, arguments)` until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(1)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # one drawing thread a worker: the workers are the parallelism
    worlds, method = None, None
    while method != "close":
        try:
            if worlds is None:
                method, answer = "build", None
                worlds = _CpuWorlds(options, num_envs)
            else:
                method, arguments = pipe.recv()
                answer = getattr(worlds, method)(*arguments)
            pipe.send((None, answer))
        except (EOFError, ConnectionError):
            return  # the parent is gone
        except Exception as error:
            pipe.send(((type(error).__name__, str(error), traceback.format_exc()), None))
            if worlds is None:
                return


# ----- checks and drivers -----


def vulkan_cache() -> Path:
    """The folder where `scripts/install_software_vulkan.py` unpacks its driver."""
    named = os.environ.get("CLEANROBOT_VULKAN_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "cleanrobot" / "vulkan"


def use_software_vulkan() -> bool:
    """Points this process's Vulkan at the unpacked software driver; True if it did.

    Does nothing where the user names a driver already (`VK_ICD_FILENAMES` or `VK_DRIVER_FILES`) or none was unpacked.
    Must run before Vulkan is first used in the process. The driver's own libraries that the system lacks are loaded
    here by their full path, since `LD_LIBRARY_PATH` is only read when a process starts.
    """
    folder = vulkan_cache()
    icd, driver = folder / "lvp_icd.json", folder / "lib" / "libvulkan_lvp.so"
    if os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES"):
        return False
    if not (icd.exists() and driver.exists()):
        return False
    os.environ["VK_ICD_FILENAMES"] = str(icd)
    waiting = [path for path in sorted(driver.parent.iterdir()) if path != driver]
    while not _loads(driver) and waiting:
        # a library loads once those it needs are loaded: go round until nothing more does
        left = [path for path in waiting if not _loads(path)]
        if len(left) == len(waiting):
            break
        waiting = left
    return True


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _check_vulkan(sapien: Any, render_backend: str) -> None:
    """Raises RuntimeError with one line unless SAPIEN can start its renderer on that device."""
    try:
        sapien.render.RenderSystem(sapien.Device(render_backend))
    except RuntimeError as error:
        raise RuntimeError(
            f"no Vulkan driver here that ManiSkill's renderer can use ({error}): run "
            "`python scripts/install_software_vulkan.py`, or name a driver file by VK_ICD_FILENAMES"
        ) from None


def _check_task(options: dict) -> int:
    """Raises one line for what can be known before the simulation is built; returns the time limit in steps."""
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS

    env_id, reward = options["env_id"], options["reward_mode"]
    if env_id not in REGISTERED_ENVS:
        near = difflib.get_close_matches(env_id, REGISTERED_ENVS, n=3, cutoff=0.4)
        raise ValueError(f"ManiSkill has no task {env_id!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    task = REGISTERED_ENVS[env_id]
    modes = [m for m in task.cls.SUPPORTED_REWARD_MODES if _rewards_defined(task.cls, BaseEnv, m)]
    if reward not in modes:
        raise ValueError(f"{env_id} has no reward mode {reward!r}; choose one of: {', '.join(modes)}")
    for asset in task.asset_download_ids or []:
        grouped = asset in assets.DATA_GROUPS
        parts = assets.expand_data_group_into_individual_data_source_ids(asset) if grouped else [asset]
        if not all(assets.is_data_source_downloaded(part) for part in parts):
            # ManiSkill would ask on the terminal, which hangs where nobody answers
            raise RuntimeError(f"{env_id} needs assets: run `python -m mani_skill.utils.download_asset {asset}`")
    limit = options["max_episode_steps"] or task.max_episode_steps
    if limit is None:
        raise ValueError(f"{env_id} has no time limit of its own: give max_episode_steps")
    return int(limit)


def _rewards_defined(task: type, base: type, mode: str) -> bool:
    """Whether the task computes that reward itself (`dense` modes) or inherits a working one."""
    name = {"dense": "compute_dense_reward", "normalized_dense": "compute_normalized_dense_reward"}.get(mode)
    return name is None or getattr(task, name) is not getattr(base, name)


# ----- patches of ManiSkill -----


@contextmanager
def _patches(cpu: bool, light_visuals: bool, active: bool = True) -> Iterator[None]:
    """Changes to ManiSkill while a scene is built, undone afterwards. None of them touches the physics.

    1. `parse_backend_device_id` splits a device's name at every colon, which breaks the documented `pci:0`.
    2. SAPIEN fills a reflection table (BRDF lookup) by a compute shader at each process's first picture, many seconds
       on a software driver. Only the light of an environment map reads it, so scenes without one get a tiny table.
    3. The ground is a plane cut into 20,000 triangles; two triangles with the same texture coordinates draw the same.
    4. With `light_visuals` (the one that changes pixels) robots are drawn by their collision shapes.

    Also, where a robot's files are missing, ManiSkill asks on the terminal whether to download them, and a process
    without one fails there obscurely; that question becomes an error.
    """
    if not active:
        yield
        return
    # by name: `mani_skill.utils` as an attribute is another package once `mani_skill.envs` is imported
    backend = import_module("mani_skill.envs.utils.system.backend")
    ground = import_module("mani_skill.utils.building.ground")
    download = import_module("mani_skill.utils.download_asset")
    from mani_skill.agents.base_agent import BaseAgent
    from mani_skill.sensors.camera import Camera
    from mani_skill.utils.building.articulation_builder import ArticulationBuilder

    with ExitStack() as undo:

        def swap(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        def refuse(question: str) -> bool:
            robot = re.match(r"Robot (\S+) has assets", question)
            name = robot.group(1) if robot else "ID"
            raise RuntimeError(f"files are missing, run `python -m mani_skill.utils.download_asset {name}`")

        swap(download, "prompt_yes_no", refuse)
        if cpu:
            parse, build_camera, build_ground = backend.parse_backend_device_id, Camera.__init__, ground.build_ground

            def parse_with_pci(name: str) -> Any:
                return (name, None) if name.startswith("pci:") else parse(name)

            def build_camera_with_table(self: Any, *args: Any, **kwargs: Any) -> None:
                build_camera(self, *args, **kwargs)
                _skip_reflection_table(self)

            def build_flat_ground(
                scene: Any,
                floor_width: int = 100,
                floor_length: int | None = None,
                xy_origin: tuple = (0, 0),
                altitude: float = 0,
                **kwargs: Any,
            ) -> Any:
                actor = build_ground(scene, 1, 1, xy_origin, altitude, **kwargs)
                square = kwargs.get("texture_square_len", 4)
                _flatten_ground(actor, floor_width, floor_length or floor_width, xy_origin, altitude, square)
                return actor

            swap(backend, "parse_backend_device_id", parse_with_pci)
            swap(Camera, "__init__", build_camera_with_table)
            for name, module in list(sys.modules.items()):
                if name.startswith("mani_skill.") and getattr(module, "build_ground", None) is build_ground:
                    swap(module, "build_ground", build_flat_ground)
        if light_visuals:
            load_robot, build = BaseAgent._load_articulation, ArticulationBuilder.build

            def build_light(self: Any, *args: Any, **kwargs: Any) -> Any:
                _lighten(self)
                return build(self, *args, **kwargs)

            def load_light_robot(self: Any, *args: Any, **kwargs: Any) -> Any:
                ArticulationBuilder.build = build_light
                try:
                    return load_robot(self, *args, **kwargs)
                finally:
                    ArticulationBuilder.build = build

            swap(BaseAgent, "_load_articulation", load_light_robot)
        yield


def _skip_reflection_table(camera: Any) -> None:
    """Gives a rasterising camera a tiny reflection table, unless its scene has an environment map that would use it."""
    import sapien

    if camera.config.shader_config.shader_pack.startswith("rt"):
        return
    if any(scene.render_system.cubemap is not None for scene in camera.camera.scene.sub_scenes):
        return
    # (scale, bias) = (1, 0): reflect the surface's own specular colour, at every angle and roughness
    table = np.tile(np.array([1, 0, 0, 0], np.float32), (2, 2, 1))
    for part in camera.camera._render_cameras:
        part.set_texture("BRDFLUT", sapien.render.RenderTexture(table, 2, "R32G32B32A32Sfloat", 1, "linear", "edge"))


def _flatten_ground(actor: Any, width: float, length: float, xy_origin: tuple, altitude: float, square: float) -> None:
    """Replaces a ground actor's picture by one rectangle, `length` x `width` m, with a texture tile each `square` m."""
    import sapien

    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * 0.5 * np.array([length, width])
    vertices = np.column_stack([corners + np.asarray(xy_origin), np.full(4, altitude)])
    for entity in actor._objs:
        old = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if old is None:
            continue
        shape = sapien.render.RenderShapeTriangleMesh(
            vertices=vertices.astype(np.float32),
            triangles=np.array([[0, 1, 2], [1, 3, 2]]),
            normals=np.tile(np.array([0, 0, 1], np.float32), (4, 1)),
            uvs=(corners / square + 0.5).astype(np.float32),
            material=old.render_shapes[0].material,
        )
        entity.remove_component(old)
        body = sapien.render.RenderBodyComponent()
        body.attach(shape)
        entity.add_component(body)


def _lighten(builder: Any) -> None:
    """Makes every link with a mesh picture and collision shapes look like the latter."""
    import sapien
    from sapien.wrapper.actor_builder import VisualShapeRecord

    grey = sapien.render.RenderMaterial(base_color=[0.85, 0.85, 0.87, 1.0], roughness=0.6, specular=0.3)
    for link in builder.link_builders:
        shapes = [record for record in link.collision_records if record.type != "plane"]
        if not shapes or all(record.type != "file" for record in link.visual_records):
            continue
        link.visual_records = [
            VisualShapeRecord(
                type="file" if "mesh" in record.type else record.type,
                filename=record.filename,
                scale=record.scale,
                radius=record.radius,
                length=record.length,
                pose=record.pose,
                material=grey,
            )
            for record in shapes
        ]


# ----- small helpers -----


def _stack(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins a list of observations (tensors on the CPU or arrays) along the worlds."""
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}


def _map_tree(tree: Any, function: Any) -> Any:
    """Applies a function to every leaf of nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: _map_tree(value, function) for key, value in tree.items()}
    return [_map_tree(value, function) for value in tree] if isinstance(tree, list) else function(tree)


def _layout(tree: dict, prefix: str = "") -> list[list]:
    """[name, size] of each entry of a nested observation, in the order of flattening."""
    rows: list[list] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _layout(value, f"{prefix}{key}/")
        else:
            rows.append([f"{prefix}{key}", int(math.prod(value.shape[1:]))])
    return rows


def _plain(value: Any) -> Any:
    """A JSON value of a number, array or list; None where it is not finite."""
    if value is None or isinstance(value, (str, bool)):
        return value
    value = np.asarray(value, np.float64)
    if value.ndim:
        return [_plain(v) for v in value]
    return float(value) if np.isfinite(value) else None


def main() -> None:
    """`python -m envs.maniskill`: steps a task with random actions, prints its speed, optionally saves its pictures."""
    parser = argparse.ArgumentParser(description="Steps a ManiSkill task with random actions and prints its speed.")
    parser.add_argument("--env-id", default="PickCube-v1")
    parser.add_argument("--num-envs", type=int, default=1)
    parser.add_argument("--num-workers", type=int, help="processes on the CPU, 0 is this one (default: one a core)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--render-size", type=int, default=128)
    parser.add_argument("--full-visuals", action="store_true", help="draw robots by their own meshes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", metavar="FOLDER", help="write one PNG a camera there")
    args = parser.parse_args()
    start = time.perf_counter()
    light = False if args.full_visuals else None
    env = make(
        args.env_id,
        args.num_envs,
        args.device,
        seed=1,
        render_size=args.render_size,
        light_visuals=light,
        num_workers=args.num_workers,
        stagger=False,
    )
    built = time.perf_counter() - start
    if args.save:
        import imageio.v3 as iio

        for camera in ("third", *env.spec["cameras"]):
            path = Path(args.save) / f"maniskill_{args.env_id}_{camera}{'_full' if args.full_visuals else ''}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            iio.imwrite(path, env.render((0,), 256, camera)[0])
    actions = torch.rand(args.steps + 5, env.num_envs, env.action_dim, device=env.device) * 2 - 1
    for action in actions[:5]:
        env.step(action)
    start, used = time.perf_counter(), time.process_time()
    for action in actions[5:]:
        obs = env.step(action)[0]
    float(obs["state"].sum())  # waits for the device
    wall, used = time.perf_counter() - start, time.process_time() - used
    steps = args.steps * env.num_envs
    print(
        f"{args.env_id} on {env.spec['sim_backend']}, {env.num_envs} worlds, image {env.image_shape}, "
        f"light_visuals={env.spec['light_visuals']}: built in {built:.1f} s, {steps / wall:.0f} env steps/s, "
        f"{1e3 * used / steps:.1f} CPU ms a step in this process"
    )
    env.close()


if __name__ == "__main__":
    main()
