"""One ManiSkill environment object, made to fit the contract: actions, observations, resets, states, description."""

import difflib
import re
import warnings
from typing import Any

import numpy as np
import torch

from envs.maniskill.patches import patches
from envs.maniskill.trees import layout, map_tree, plain
from envs.maniskill.vulkan import check_vulkan, use_software_vulkan


class Batch:
    """One ManiSkill environment object: `n` environments on the GPU, or one environment on the CPU (`n` = 1)."""

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
            check_vulkan(sapien, options["render_backend"])
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
            kwargs["reconfiguration_freq"] = (
                0  # single environments of a batch cannot be rebuilt, only reset
            )
        try:
            with patches(self.cpu, options["light_visuals"]):
                self.base = gymnasium.make(
                    options["env_id"], **{**kwargs, **options["task_kwargs"]}
                ).unwrapped
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
            hint = (
                ""
                if self.cpu
                else "; GPU simulation needs NVIDIA's Vulkan driver and SAPIEN's PhysX GPU library"
            )
            raise RuntimeError(
                f"ManiSkill could not start {options['env_id']}: {reason}{hint}"
            ) from error
        self.base.get_sensor_params = (
            dict  # camera matrices, computed at each step and part of no observation here
        )
        cameras = self.base.get_obs()["sensor_data"]
        self._cameras = [name for name, data in cameras.items() if "rgb" in data]
        if not self._cameras:
            raise ValueError(
                f"{options['env_id']} has no sensor camera, so there is nothing to learn from pixels"
            )
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
            raise ValueError(
                f"{env_id}: control mode {mode!r} has unbounded actions; choose one with limits"
            )
        splits = (
            [(name, s.shape[0]) for name, s in spaces.items()] if hasattr(space, "spaces") else None
        )
        return (
            torch.from_numpy(low).to(self.base.device),
            torch.from_numpy(high).to(self.base.device),
            splits,
        )

    def describe(self) -> dict:
        """What `ManiSkillEnv.spec` holds; plain JSON values, joint limits in rad (or m), None where there is none."""
        base, raw = self.base, self.base.get_obs()
        agents = getattr(base.agent, "agents_dict", None) or {"": base.agent}
        joints = [
            (name, joint.name)
            for name, agent in agents.items()
            for joint in agent.robot.active_joints
        ]
        limits = np.concatenate(
            [agent.robot.get_qlimits()[0].cpu().numpy() for agent in agents.values()]
        )
        controllers = {}
        for name, agent in agents.items():
            parts = getattr(agent.controller, "controllers", None) or {"all": agent.controller}
            for part, controller in parts.items():
                config = controller.config
                controllers[f"{name}/{part}".strip("/")] = dict(
                    kind=type(controller).__name__,
                    joints=[joint.name for joint in controller.joints],
                    lower=plain(getattr(config, "lower", None)),
                    upper=plain(getattr(config, "upper", None)),
                    use_delta=bool(getattr(config, "use_delta", False)),
                )
        state = {key: value for key, value in raw.items() if not key.startswith("sensor_")}
        sensors = {
            name: dict(
                width=sensor.camera.get_width(),
                height=sensor.camera.get_height(),
                fov_y=plain(float(np.ravel(sensor.camera._render_cameras[0].fovy)[0])),
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
            joint_low=plain(limits[:, 0]),
            joint_high=plain(limits[:, 1]),
            state_dim=self._obs["state"].shape[1],
            state_layout=layout(state),
            privileged_dim=self._obs["privileged"].shape[1] if self.options["asymmetric"] else 0,
            image_shape=list(self._obs["rgb"].shape[1:]),
            cameras=sensors,
        )

    # ----- observations -----

    def _observe(self, raw: dict, info: dict) -> dict[str, torch.Tensor]:
        """The contract's observation from ManiSkill's; copies the images, whose memory the renderer uses again."""
        images = [raw["sensor_data"][name]["rgb"] for name in self._cameras]
        rgb = torch.cat(images, dim=-1) if len(images) > 1 else images[0] * 1
        obs = dict(
            rgb=rgb, state=self._flat({k: v for k, v in raw.items() if not k.startswith("sensor_")})
        )
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
        return self._common.flatten_state_dict(
            tree, use_torch=True, device=self.base.device
        ).float()

    # ----- simulation -----

    @torch.no_grad()
    def reset(self, seeds: np.ndarray) -> dict[str, torch.Tensor]:
        """Resets all environments; on the GPU a task draws from the first seed, or from each where it knows how to."""
        with patches(self.cpu, self.options["light_visuals"], self.base.reconfiguration_freq != 0):
            raw, info = self.base.reset(seed=[int(s) for s in seeds])
        self._obs = self._observe(raw, info)
        return self._obs

    def _reset_some(
        self, numbers: np.ndarray, seeds: np.ndarray, broken: bool
    ) -> dict[str, torch.Tensor]:
        """Resets some environments to their seeds -> the observation of all. A broken one on the CPU is rebuilt."""
        base = self.base
        if self.n == 1:
            rebuild = self.cpu and (broken or base.reconfiguration_freq != 0)
            with patches(self.cpu, self.options["light_visuals"], rebuild):
                raw, info = base.reset(
                    seed=int(seeds[0]), options=dict(reconfigure=broken and self.cpu)
                )
        else:
            # a seed given to a partial reset would seed every environment anew, so the generators are set here instead
            chosen = [int(s) for s in seeds[numbers]]
            base._batched_episode_rng[numbers] = [np.random.RandomState(s) for s in chosen]
            base._episode_rng = np.random.RandomState(chosen[0])
            with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
                torch.manual_seed(chosen[0])
                raw, info = base.reset(
                    options=dict(env_idx=torch.from_numpy(numbers).to(base.device))
                )
        return self._observe(raw, info)

    @torch.no_grad()
    def step(
        self, actions: "torch.Tensor | np.ndarray", ends: np.ndarray, seeds: np.ndarray
    ) -> dict:
        """One step, then the reset of the environments in `ends` and of those with non-finite physics.

        Args:
            actions (n, A), ends (n,) bool: whose time is up with this step, seeds (n,) of the next episodes.

        Returns:
            `obs`, `final_obs` (None where none was reset), `rewards` float32 (n,), `success` bool (n,), and `bad`
            (n,) bool on the host: reading it is the one wait for the GPU here, right after ManiSkill's own wait for its
            images.
        """
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.base.device).clamp(
            -1.0, 1.0
        )
        actions = self._low + (actions + 1.0) * 0.5 * (self._high - self._low)
        given: Any = actions
        if self._splits is not None:
            parts = actions.split([size for _, size in self._splits], dim=1)
            given = {name: part for (name, _), part in zip(self._splits, parts, strict=True)}
        raw, rewards, _, _, info = self.base.step(given)
        obs = self._observe(raw, info)
        rewards = rewards.float().reshape(self.n)
        success = (
            info["success"].bool().reshape(self.n)
            if "success" in info
            else torch.zeros_like(rewards).bool()
        )
        finite = torch.isfinite(rewards)
        for key in ("state", "privileged"):
            if key in obs:
                finite = finite & torch.isfinite(obs[key]).all(dim=1)
        bad = (~finite).cpu().numpy()
        final_obs = None
        if bad.any():
            for key, value in obs.items():
                value[torch.from_numpy(bad).to(value.device)] = self._obs[key][
                    torch.from_numpy(bad).to(value.device)
                ]
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
    def render(self, numbers: np.ndarray, camera: str) -> np.ndarray:
        """Images uint8 (len(numbers), h, w, 3) of the task's own camera for people, or a sensor's last image."""
        if camera != "third":
            start = 3 * self._cameras.index(camera)
            images = self._obs["rgb"][..., start : start + 3]
        else:
            names = list(self.base._human_render_cameras)
            if not names:
                raise ValueError(
                    f"{self.options['env_id']} has no camera for people; use one of {self._cameras}"
                )
            images = self.base.render_rgb_array(names[0])
        return images[torch.from_numpy(numbers)].cpu().numpy()

    def get_state(self) -> dict:
        """ManiSkill's state dict as NumPy arrays."""
        return map_tree(
            self.base.get_state_dict(), lambda tensor: tensor.detach().cpu().numpy().copy()
        )

    @torch.no_grad()
    def set_state(
        self, state: dict, seeds: np.ndarray, clock: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """Resets to the episodes' seeds, then sets bodies, joints and controllers; returns the observation."""
        self.reset(seeds)
        state = map_tree(state, lambda array: torch.tensor(array, device=self.base.device))
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


def _check_task(options: dict) -> int:
    """Raises one line for what can be known before the simulation is built; returns the time limit in steps."""
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS

    env_id, reward = options["env_id"], options["reward_mode"]
    if env_id not in REGISTERED_ENVS:
        near = difflib.get_close_matches(env_id, REGISTERED_ENVS, n=3, cutoff=0.4)
        raise ValueError(
            f"ManiSkill has no task {env_id!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    task = REGISTERED_ENVS[env_id]
    modes = [m for m in task.cls.SUPPORTED_REWARD_MODES if _rewards_defined(task.cls, BaseEnv, m)]
    if reward not in modes:
        raise ValueError(
            f"{env_id} has no reward mode {reward!r}; choose one of: {', '.join(modes)}"
        )
    for asset in task.asset_download_ids or []:
        grouped = asset in assets.DATA_GROUPS
        parts = (
            assets.expand_data_group_into_individual_data_source_ids(asset) if grouped else [asset]
        )
        if not all(assets.is_data_source_downloaded(part) for part in parts):
            # ManiSkill would ask on the terminal, which hangs where nobody answers
            raise RuntimeError(
                f"{env_id} needs assets: run `python -m mani_skill.utils.download_asset {asset}`"
            )
    limit = options["max_episode_steps"] or task.max_episode_steps
    if limit is None:
        raise ValueError(f"{env_id} has no time limit of its own: give max_episode_steps")
    return int(limit)


def _rewards_defined(task: type, base: type, mode: str) -> bool:
    """Whether the task computes that reward itself (`dense` modes) or inherits a working one."""
    name = {
        "dense": "compute_dense_reward",
        "normalized_dense": "compute_normalized_dense_reward",
    }.get(mode)
    return name is None or getattr(task, name) is not getattr(base, name)
