"""The batched SO-101 environment: episodes, control steps, observations, saved states."""

import numpy as np
import torch

from envs import usable_cpus
from envs.so101 import episodes, rewards
from envs.so101.episodes import Randomization
from envs.so101.render import Scene
from envs.so101.rotations import quat_to_mat
from envs.so101.scene import build_model
from envs.so101.stepping import CStepper, WarpStepper
from envs.so101.tasks import (
    ACCELERATION_LIMIT,
    ACTION_SCALE,
    CONTROL_HZ,
    HORIZON,
    JOINT_MARGIN,
    JOINTS,
    START_POSE,
    TASKS,
    TRACKING_ERROR,
    VELOCITY_LIMIT,
)


class SO101Env:
    """A batch of SO-101 environments; the contract is in `envs/__init__.py`.

    Observations: `rgb` uint8 (N, render_size, render_size, 3 * cameras), robot and objects on black; `state` float32
    (N, 12): six joint positions (with noise under randomisation) and the six controller targets, radians; with
    `asymmetric` also `privileged` float32 (N, 47) for the critic.
    Actions: (N, 6) in [-1, 1], added to the controller targets times `ACTION_SCALE`.
    With `end_on_success` an episode also terminates at its first success.
    """

    action_dim, state_dim, max_episode_steps, control_hz = 6, 12, HORIZON, CONTROL_HZ

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        render_size: int = 16,
        samples_per_pixel: int = 4,
        cameras: tuple[str, ...] = ("wrist",),
        domain_randomization: bool = True,
        randomization: Randomization | None = None,
        asymmetric: bool = False,
        stagger: bool = False,
        engine: str = "auto",
        asset_dir: str | None = None,
        threads: int | None = None,
        images: bool = True,
        end_on_success: bool = False,
    ):
        if env_id not in TASKS:
            raise ValueError(f"unknown SO-101 task {env_id!r}; known: {', '.join(TASKS)}")
        if num_envs < 1 or render_size < 4:
            raise ValueError(
                f"num_envs must be at least 1, render_size at least 4; got {num_envs} and {render_size}"
            )
        if not cameras or set(cameras) - {"wrist", "third"}:
            raise ValueError(f"cameras must be one or more of 'wrist', 'third', not {cameras!r}")
        self.env_id, self.task, self.num_envs, self.device = (
            env_id,
            TASKS[env_id],
            num_envs,
            torch.device(device),
        )
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if engine == "auto":
            engine = "warp" if self.device.type == "cuda" else "mujoco"
        if engine not in ("warp", "mujoco") or (engine == "mujoco" and self.device.type != "cpu"):
            raise ValueError(
                f"engine {engine!r} cannot run on {self.device}: 'mujoco' is for the CPU, 'warp' for both"
            )
        self.engine, self.cameras, self.asymmetric, self.stagger = (
            engine,
            tuple(cameras),
            asymmetric,
            stagger,
        )
        self.images = images  # False: no rgb key; for tests, scripted controllers and policies of the true state
        self.end_on_success = (
            end_on_success  # True: success terminates an episode, as sparse rewards want it
        )
        dr = randomization or Randomization()
        self.dr = dr if domain_randomization else dr.off()
        self.render_size, self.samples_per_pixel = render_size, samples_per_pixel
        self.image_shape = (render_size, render_size, 3 * len(self.cameras))
        self.privileged_dim = 47 if asymmetric else 0

        self.mjm = build_model(self.task, asset_dir)
        warp_device = str(self.device)
        self.scene = Scene(
            self.mjm, num_envs, warp_device, self.cameras, render_size, samples_per_pixel
        )
        m0 = torch.tensor(self.mjm.dof_M0, dtype=torch.float32, device=self.device).repeat(
            num_envs, 1
        )
        self.fields = {**self.scene.fields, "dof_M0": m0}
        self.nominal = {name: field[0].clone() for name, field in self.fields.items()}
        if engine == "warp":
            self.physics = WarpStepper(self.scene)
        else:
            self.physics = CStepper(self.mjm, self.fields, threads or usable_cpus())
        # Staggered environments reset a few at a time: their first frames come from a small second scene.
        self.resets_at_once = -(-num_envs // HORIZON)
        self.small = None
        if stagger and images and 2 * self.resets_at_once <= num_envs:
            self.small = Scene(
                self.mjm,
                self.resets_at_once,
                warp_device,
                self.cameras,
                render_size,
                samples_per_pixel,
            )
        self._human = {}

        dev, m = self.device, self.mjm
        self._tips = [m.site("fixed_tip").id, m.site("moving_tip").id]
        free = ("item", "support") if self.task.support else ("item",)
        self._q = {name: m.joint(name).qposadr[0] for name in free}
        self._v = {name: m.joint(name).dofadr[0] for name in self._q}
        self._sensor = {m.sensor(i).name: int(m.sensor(i).adr[0]) for i in range(m.nsensor)}
        self.joint_low = torch.tensor(m.jnt_range[:6, 0], dtype=torch.float32, device=dev)
        self.joint_high = torch.tensor(m.jnt_range[:6, 1], dtype=torch.float32, device=dev)
        self.action_scale = torch.tensor(ACTION_SCALE, device=dev)
        self.start_pose = torch.tensor(START_POSE, device=dev)
        self.target_low, self.target_high = (
            self.joint_low + JOINT_MARGIN,
            self.joint_high - JOINT_MARGIN,
        )
        self.tracking_error = torch.tensor(TRACKING_ERROR, device=dev)
        period = 1 / CONTROL_HZ
        self.most_move = torch.tensor(
            [v * period for v in VELOCITY_LIMIT], device=dev
        )  # radians a control step
        self.most_gain = torch.tensor(
            [a * period**2 for a in ACCELERATION_LIMIT], device=dev
        )  # more than the last one
        n = num_envs
        self.generator = torch.Generator(device=dev)
        self.target, self.old_target = (torch.zeros(n, 6, device=dev) for _ in range(2))
        self.delay = torch.zeros(n, dtype=torch.int32, device=dev)
        self.qpos, self.qvel = torch.zeros(n, m.nq, device=dev), torch.zeros(n, m.nv, device=dev)
        self.first_qpos = torch.zeros(n, m.nq, device=dev)
        self.contact = torch.zeros(n, m.nsensordata, device=dev)
        self.item_half = torch.zeros(
            n, 3, device=dev
        )  # half extents of the item: x, y (or radius twice), z
        self.support_half = torch.zeros(
            n, 3, device=dev
        )  # ... of the support; bin: inner x, inner y, wall height
        self.support_z = torch.zeros(
            n, device=dev
        )  # height of the support's frame over its underside
        self.friction, self.mass = torch.zeros(n, device=dev), torch.zeros(n, device=dev)
        self.returns = torch.zeros(n, device=dev)
        self.success_once = torch.zeros(n, dtype=torch.bool, device=dev)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=dev)
        self.clock = np.zeros(
            n, dtype=np.int64
        )  # steps taken in the running episode; on the host, so nothing waits
        self.started = np.zeros(
            n, dtype=np.int64
        )  # the clock value at which the running episode began
        self.obs = self.reset(seed, _stagger=stagger)

    # ---- description -------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> dict:
        """What a robot needs to run a policy of this environment; JSON-able. Angles in radians, lengths in metres."""
        cams = {}
        for name in self.cameras:
            cam = self.mjm.camera(name)
            cams[name] = {
                "mount": self.mjm.body(int(self.mjm.cam_bodyid[cam.id])).name, "pos": cam.pos.tolist(),
                "quat_wxyz": cam.quat.tolist(), "fovy_degrees": float(self.mjm.cam_fovy[cam.id]),
            }  # fmt: skip
        return {
            "env_id": self.env_id, "robot": "so101", "joint_names": list(JOINTS),
            "joint_low": self.mjm.jnt_range[:6, 0].tolist(), "joint_high": self.mjm.jnt_range[:6, 1].tolist(),
            "start_pose": list(START_POSE), "action_scale": list(ACTION_SCALE),
            "action_semantics": "target += action * action_scale, within the limits",
            "velocity_limit": list(VELOCITY_LIMIT), "acceleration_limit": list(ACCELERATION_LIMIT),
            "tracking_error": list(TRACKING_ERROR), "joint_margin": JOINT_MARGIN,
            "control_hz": CONTROL_HZ, "state_layout": ["joint_position"] * 6 + ["joint_target"] * 6,
            "cameras": cams, "background": "black", "render_size": self.render_size,
            "max_episode_steps": HORIZON,
        }  # fmt: skip

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def reset(self, seed: int | None = None, _stagger: bool = False) -> dict[str, torch.Tensor]:
        """Starts a new episode in every environment, all clocks at 0. With a seed, always the same episodes."""
        if seed is not None:
            self.generator.manual_seed(seed)
        everything = torch.arange(self.num_envs, device=self.device)
        episodes.begin(self, everything, list(range(self.num_envs)))
        self.clock[:] = np.arange(self.num_envs) * HORIZON // self.num_envs if _stagger else 0
        self.started[:] = self.clock
        self._kinematics()
        self.obs = self._observe(self._images())
        return self.obs

    # ---- one control step --------------------------------------------------------------------------------------------
    def step(self, actions: torch.Tensor):
        """Actions (N, 6) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        actions = actions.to(self.device, torch.float32).clamp(-1.0, 1.0).nan_to_num(0.0)
        following = self._next_target(actions)
        self.old_target.copy_(self.target)
        self.target.copy_(following)
        self.qpos, self.qvel, self.contact, sane = self.physics.step(
            self.old_target, self.target, self.delay
        )
        bad = ~sane
        self._restart_diverged(bad)
        self._kinematics()
        reward, success = self.reward()
        reward, success = reward.masked_fill(bad, 0.0), success & sane

        self.clock += 1
        out, terminations = self.clock == HORIZON, torch.zeros_like(bad)
        if self.end_on_success:
            terminations, out = success, out | success.cpu().numpy()
        numbers = np.flatnonzero(out).tolist()
        truncations = (
            torch.from_numpy(self.clock == HORIZON).to(self.device, non_blocking=True) | bad
        )
        truncations &= ~terminations
        length = torch.from_numpy(self.clock - self.started).to(self.device, non_blocking=True)
        self.returns += reward
        self.success_once |= success
        episode = {
            "return": self.returns.clone(), "length": length,
            "success_once": self.success_once.clone(), "success_at_end": success,
        }  # fmt: skip
        before = self._observe(self._images())
        final_obs = before
        if (
            self.device.type == "cuda" or bad.any()
        ):  # what diverged has no next state: keep its last observation
            final_obs = {k: torch.where(_like(bad, v), self.obs[k], v) for k, v in before.items()}
        self.returns.masked_fill_(bad, 0.0)
        self.success_once &= sane
        self.obs = self._restart(numbers, before) if numbers else before
        info = {"final_obs": final_obs, "success": success, "episode": episode}
        return self.obs, reward, terminations, truncations, info

    def _next_target(self, actions: torch.Tensor) -> torch.Tensor:
        """Targets (N, 6) after `actions`, by the rules that `hardware/governor.py` applies on the robot."""
        joints, last = self.qpos[:, :6], self.target - self.old_target
        goal = self.target + actions * self.action_scale
        goal = torch.clamp(goal, joints - self.tracking_error, joints + self.tracking_error)
        goal = torch.clamp(goal, self.target_low, self.target_high)
        down = torch.maximum(last.clamp(max=0) - self.most_gain, -self.most_move)
        up = torch.minimum(last.clamp(min=0) + self.most_gain, self.most_move)
        return torch.clamp(goal, self.target + down, self.target + up)

    def _restart_diverged(self, bad: torch.Tensor) -> None:
        """Puts environments whose physics is no longer finite back to their episode's first pose; counts them."""
        if self.device.type == "cpu" and not bad.any():
            return
        self.nan_resets += bad.sum()
        mask = bad[:, None]
        self.qpos, self.qvel = (
            torch.where(mask, self.first_qpos, self.qpos),
            self.qvel.masked_fill(mask, 0.0),
        )
        self.contact = self.contact.masked_fill(mask, 0.0)
        for target in (self.target, self.old_target):
            target.copy_(torch.where(mask, self.first_qpos[:, :6], target))
        self.physics.set_state(slice(None), self.qpos, self.qvel)

    def _restart(self, numbers: list[int], obs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Begins the next episode of `numbers` and returns `obs` with their first observations in place."""
        idx = torch.tensor(numbers, device=self.device)
        episodes.begin(self, idx, numbers)
        self.clock[numbers] = self.started[numbers] = 0
        scene, rows = (
            (self.small, slice(0, len(numbers))) if self.small is not None else (self.scene, idx)
        )
        if scene is self.small and len(numbers) > scene.n:
            scene, rows = self.scene, idx
        if scene is self.small:
            for name, field in scene.fields.items():
                field[rows] = self.fields[name][idx]
            scene.qpos[rows] = self.qpos[idx]
        else:
            scene.qpos.copy_(self.qpos)
        scene.kinematics()
        rgb = scene.draw()[rows] if self.images else None
        first = self._observe(rgb, idx, scene.site_xpos[rows])
        return {key: value.index_copy(0, idx, first[key]) for key, value in obs.items()}

    def _kinematics(self) -> None:
        self.scene.qpos.copy_(self.qpos)
        self.scene.kinematics()

    def _images(self) -> torch.Tensor | None:
        return self.scene.draw() if self.images else None

    def _observe(self, rgb, idx=slice(None), site_xpos=None) -> dict[str, torch.Tensor]:
        """Observation of the environments `idx`, given their images (and site positions, if not the scene's own)."""
        joints, target = self.qpos[idx, :6], self.target[idx]
        if self.dr.joint_noise > 0:
            noise = torch.randn(joints.shape, generator=self.generator, device=self.device)
            joints = joints + self.dr.joint_noise * noise
        obs = {"state": torch.cat((joints, target), 1)}
        if rgb is not None:
            obs["rgb"] = rgb
        if self.asymmetric:
            obs["privileged"] = self._privileged(
                idx, self.scene.site_xpos if site_xpos is None else site_xpos
            )
        return obs

    def _privileged(self, idx, site_xpos) -> torch.Tensor:
        """True state for a critic, (n, 47).

        Joints 6, joint speeds 6, tool 3, item pose 7 and velocity 6, support pose 7, half sizes 3 + 3, squashed contact
        forces (fixed finger, jaw, table, support) 4, friction 1, mass in units of 10 g 1.
        """
        qpos, qvel, contact = self.qpos[idx], self.qvel[idx], self.contact[idx]
        n, item, vel = len(qpos), self._q["item"], self._v["item"]
        support = (
            qpos[:, self._q["support"] :][:, :7] if self.task.support else qpos.new_zeros(n, 7)
        )
        forces = [
            rewards.force(self, name, contact).tanh()
            for name in ("fixed_item", "jaw_item", "hand_table")
        ]
        if self.task.support:
            forces.append(rewards.force(self, "hand_support", contact).tanh())
        else:
            forces.append(torch.zeros_like(forces[0]))
        return torch.cat((
            qpos[:, :6], qvel[:, :6], site_xpos[:, self._tips].mean(1), qpos[:, item : item + 7],
            qvel[:, vel : vel + 6], support, self.item_half[idx], self.support_half[idx], torch.stack(forces, 1),
            self.friction[idx, None], 100 * self.mass[idx, None],
        ), 1)  # fmt: skip

    # ---- the present state -----------------------------------------------------------------------------------------
    @property
    def tcp(self) -> torch.Tensor:
        """Tool centre point (N, 3): the middle of the two finger tips, metres."""
        return self.scene.site_xpos[:, self._tips].mean(1)

    def pose(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Position (N, 3) and rotation matrix (N, 3, 3) of "item" or "support"."""
        adr = self._q[name]
        return self.qpos[:, adr : adr + 3], quat_to_mat(self.qpos[:, adr + 3 : adr + 7])

    def facts(self) -> dict[str, torch.Tensor]:
        """What rewards, success tests and scripted controllers ask about the present state; each (N,) or (N, 3)."""
        return rewards.facts(self)

    def reward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward (N,), divided by the task's best, and success (N,) of the present state."""
        return rewards.reward(self)

    # ---- for people, and for resuming --------------------------------------------------------------------------------
    def render(self, which=(0,), size: int = 256, camera: str = "person") -> np.ndarray:
        """Images for people, uint8 (len(which), size, size, 3), with table, shadows and 2 x 2 samples a pixel.

        `camera` is "person", "third" or "wrist"; nothing of the environment's state changes.
        """
        which = list(which)
        key = (len(which), size, camera)
        if key not in self._human:
            self._human[key] = Scene(
                self.mjm, len(which), str(self.device), (camera,), size, 4, table=True
            )
        scene = self._human[key]
        idx = torch.tensor(which, device=self.device)
        for name, field in scene.fields.items():
            field.copy_(self.fields[name][idx])
        scene.qpos.copy_(self.qpos[idx])
        scene.kinematics()
        return scene.draw().cpu().numpy()

    _TENSORS = (
        "target", "old_target", "delay", "qpos", "qvel", "contact", "item_half", "support_half", "support_z",
        "friction", "mass", "returns", "success_once", "nan_resets", "first_qpos",
    )  # fmt: skip

    def state_dict(self) -> dict:
        """Everything that the future depends on; see `load_state_dict`."""
        return {
            "env_id": self.env_id, "num_envs": self.num_envs, "engine": self.engine,
            "physics": self.physics.state_dict(), "generator": self.generator.get_state(),
            "clock": torch.tensor(self.clock), "started": torch.tensor(self.started),
            "tensors": {name: getattr(self, name).clone() for name in self._TENSORS},
            "fields": {name: field.clone() for name, field in self.fields.items()},
            "obs": {name: value.clone() for name, value in self.obs.items()},
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, bit for bit on a CPU. Raises ValueError on another set-up."""
        for name in ("env_id", "num_envs", "engine"):
            if saved[name] != getattr(self, name):
                raise ValueError(
                    f"saved environment has {name} {saved[name]!r}, this one has {getattr(self, name)!r}"
                )
        for name, value in saved["fields"].items():
            self.fields[name].copy_(value)
        for name, value in saved["tensors"].items():
            getattr(self, name).copy_(value)
        self.physics.load_state_dict(saved["physics"])
        self.generator.set_state(saved["generator"].cpu())
        self.clock[:], self.started[:] = saved["clock"].numpy(), saved["started"].numpy()
        self.obs = {name: value.to(self.device, copy=True) for name, value in saved["obs"].items()}

    def close(self) -> None:
        """Stops the simulation's threads."""
        self.physics.close()


def _like(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (value.dim() - 1))


make = SO101Env  # so that the options have their names
