"""The batched DeepMind Control environment: episodes, steps, frame stacks, saved states."""

import os
import sys

import numpy as np
import torch

from envs import usable_cpus
from envs.dmc.processes import Here, Process, choose_renderer, gl_backend

# The published sets; medium and hard need more frames, see docs/envs/dmc.md.
EASY = (
    "cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup", "cup_catch", "finger_spin", "hopper_stand",
    "pendulum_swingup", "walker_stand", "walker_walk",
)  # fmt: skip
MEDIUM = (
    "acrobot_swingup", "cartpole_swingup_sparse", "cheetah_run", "finger_turn_easy", "finger_turn_hard", "hopper_hop",
    "quadruped_run", "quadruped_walk", "reach_duplo", "reacher_easy", "reacher_hard", "walker_run",
)  # fmt: skip
HARD = ("humanoid_stand", "humanoid_walk", "humanoid_run")


class DMCEnv:
    """A batch of DeepMind Control tasks; the contract that every environment module shares (see `envs/__init__.py`).

    Observations: `rgb` uint8 (N, image_size, image_size, 3 * frame_stack), newest frame last; `state` float32 (N, 0).
    Actions: (N, A) in [-1, 1]. A step is `action_repeat` frames; `max_episode_steps` counts steps. DeepMind's tasks
    have no notion of success (`has_success` is False): `success` is False and only there for the contract.
    camera: number or name. camera_jitter: at each episode's start the camera is moved along each axis by up to this
    share of the model's extent and turned by up to this many radians. colour_jitter: and each colour channel of each
    material by up to this much of 1. fast_render: OpenGL without shadows, multisampling and mirrors, which looks
    different. samples_per_pixel: rays of the renderer "warp". workers: most processes; 0 is none, None is one for each
    environment, and none for a single one where this process may use one core alone.
    """

    state_dim, privileged_dim, has_success = 0, 0, False

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        stagger: bool = False,
        image_size: int = 84,
        action_repeat: int = 2,
        frame_stack: int = 1,
        camera: int | str | None = None,
        renderer: str = "auto",
        fast_render: bool = False,
        samples_per_pixel: int = 4,
        workers: int | None = None,
        camera_jitter: float = 0.0,
        colour_jitter: float = 0.0,
    ):
        if num_envs < 1 or image_size < 4:
            raise ValueError(
                f"num_envs must be at least 1, image_size at least 4; got {num_envs} and {image_size}"
            )
        if action_repeat < 1 or frame_stack < 1:
            raise ValueError(
                f"action_repeat and frame_stack must be at least 1; got {action_repeat} and {frame_stack}"
            )
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative; got {workers}")
        if camera_jitter < 0 or not 0 <= colour_jitter <= 1:
            raise ValueError("camera_jitter must be at least 0, colour_jitter from 0 to 1")
        self.env_id, self.num_envs, self.device = env_id, num_envs, torch.device(device)
        self.image_size, self.action_repeat, self.frame_stack = (
            image_size,
            action_repeat,
            frame_stack,
        )
        self.renderer = choose_renderer(
            renderer, os.environ.get("MUJOCO_GL"), self.device.type == "cuda"
        )
        if fast_render and self.renderer == "warp":
            raise ValueError("fast_render is for OpenGL; leave it out with renderer 'warp'")
        self.image_shape = (image_size, image_size, 3 * frame_stack)
        options = dict(
            image_size=image_size, action_repeat=action_repeat, camera=camera, renderer=self.renderer,
            fast_render=fast_render, camera_jitter=camera_jitter, colour_jitter=colour_jitter,
        )  # fmt: skip
        self.groups, self.shares = [], _shares(num_envs, self._processes(workers))
        kind = Here if not self._processes(workers) else Process
        try:
            for share in self.shares:
                self.groups.append(kind(env_id, list(share), options))
            for group in self.groups:
                if kind is Process:
                    group.receive()
            self.groups[0].ask("describe")
            facts = self.groups[0].receive()
        except BaseException:
            self.close()
            raise
        self.action_dim, self.max_episode_steps = facts["action_dim"], facts["limit"]
        self.control_hz, self.camera = facts["control_hz"], facts["camera"]
        self.cameras, self.samples = facts["cameras"], samples_per_pixel
        self.drawn, self.scenes = facts["drawn"], {}
        self.spec = {
            "env_id": env_id, "action_semantics": "the actuators' range", "action_low": facts["action_low"],
            "action_high": facts["action_high"], "control_hz": self.control_hz, "action_repeat": action_repeat,
            "state_layout": [], "image_size": image_size, "frame_stack": frame_stack, "renderer": self.renderer,
            "fast_render": fast_render, "camera": self.cameras[self.camera] or self.camera,
            "max_episode_steps": self.max_episode_steps, "episode_frames": facts["frames"],
        }  # fmt: skip
        self.returns, self.length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=self.device)
        starts = [i * self.max_episode_steps // num_envs if stagger else 0 for i in range(num_envs)]
        self.obs = self.reset(seed, _clocks=starts)

    def _processes(self, workers: int | None) -> int:
        """How many processes. One where this process already has another OpenGL backend: it can have a single one."""
        if workers or (workers is None and max(self.num_envs, usable_cpus()) > 1):
            return min(workers or self.num_envs, self.num_envs)
        if "dm_control" not in sys.modules:
            os.environ["MUJOCO_GL"] = gl_backend(self.renderer)
        return int(self.renderer != "warp" and os.environ.get("MUJOCO_GL") != self.renderer)

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def _ask(self, name: str, arguments=lambda share: ()) -> None:
        for group, share in zip(self.groups, self.shares, strict=True):
            group.ask(name, *arguments(share))

    def _receive(self) -> list:
        """The answers to `_ask`: one for each environment, in order."""
        answers = [group.receive() for group in self.groups]
        return [one for answer in answers for one in answer or ()]

    def _all(self, name: str, arguments=lambda share: ()) -> list:
        self._ask(name, arguments)
        return self._receive()

    def _tensor(self, views: list[np.ndarray]) -> torch.Tensor:
        """Views of the environments -> images uint8 (n, H, W, 3) on the device."""
        views = np.stack(views)
        if self.renderer == "warp":
            return self._scene(self.num_envs, self.image_size, self.camera).draw(views)
        return torch.from_numpy(views).to(self.device)

    def _scene(self, n: int, size: int, camera: int):
        """What draws `n` environments at a time with MuJoCo Warp; made when it is first needed."""
        from envs.dmc import warp_renderer

        key = (n, size, camera)
        if key not in self.scenes:
            self.scenes[key] = warp_renderer.Scene(
                *self.drawn, camera, n, self.device, size, self.samples
            )
        return self.scenes[key]

    def _obs(self, rgb: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"rgb": rgb, "state": torch.zeros(len(rgb), 0, device=self.device)}

    def reset(
        self, seed: int | None = None, _clocks: list[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Starts a new episode in every environment, all clocks at 0. With a seed, always the same episodes."""
        clocks = _clocks or [0] * self.num_envs
        views = self._all("reset", lambda share: (seed, [clocks[i] for i in share]))
        self.returns[:], self.length[:] = 0, 0
        self.obs = self._obs(self._tensor(views).repeat(1, 1, 1, self.frame_stack))
        return self.obs

    def step(self, actions: torch.Tensor):
        """Actions (N, A) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        self.step_begin(actions)
        return self.step_end()

    def step_begin(self, actions: torch.Tensor) -> None:
        """The first half of `step`: the processes go to work, and the caller may compute until `step_end`."""
        if actions.shape != (self.num_envs, self.action_dim):
            raise ValueError(
                f"actions must be ({self.num_envs}, {self.action_dim}), not {tuple(actions.shape)}"
            )
        actions = actions.detach().to("cpu", torch.float32).clamp(-1, 1).nan_to_num(0.0).numpy()
        self._ask("step", lambda share: (actions[share.start : share.stop],))

    def step_end(self):
        """The second half of `step`; returns what `step` returns."""
        views, outcomes, firsts = zip(*self._receive(), strict=True)
        rewards, discounts, terminations, truncations, sane = np.array(outcomes, np.float64).T
        rewards, discounts = rewards.astype(np.float32), discounts.astype(np.float32)
        terminations, truncations = terminations.astype(bool), truncations.astype(bool)
        self.nan_resets += int(self.num_envs - sane.sum())
        self.returns, self.length = self.returns + rewards, self.length + 1

        begun = [i for i, first in enumerate(firsts) if first is not None]
        drawn = [i for i, view in enumerate(views) if view is not None]
        # One batch of images: the step's own, then those of the episodes that begin.
        frames = self._tensor([views[i] for i in drawn] + [firsts[i] for i in begun])
        rgb, begins = frames[: len(drawn)], frames[len(drawn) :]
        if (
            len(drawn) < self.num_envs
        ):  # a diverged environment has no next image: keep its last one
            last = self.obs["rgb"][..., -3:].clone()
            last[drawn] = rgb
            rgb = last
        if self.frame_stack > 1:
            rgb = torch.cat((self.obs["rgb"][..., 3:], rgb), -1)
        final_obs = self.obs = self._obs(rgb)
        episode = {
            "return": self._to_device(self.returns.astype(np.float32)), "length": self._to_device(self.length),
            "success_once": self._no(), "success_at_end": self._no(),
        }  # fmt: skip
        if begun:
            self.obs = self._obs(rgb.clone())
            self.obs["rgb"][begun] = begins.repeat(1, 1, 1, self.frame_stack)
            self.returns[begun], self.length[begun] = 0, 0
        info = {"final_obs": final_obs, "success": self._no(), "episode": episode,
                "discount": self._to_device(discounts)}  # fmt: skip
        return self.obs, *map(self._to_device, (rewards, terminations, truncations)), info

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, device=self.device)  # a copy: ours go on changing

    def _no(self) -> torch.Tensor:
        return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    # ---- for people, and for resuming --------------------------------------------------------------------------------
    def render(self, which=(0,), size: int = 240, camera: int | str | None = None) -> np.ndarray:
        """Images for people, uint8 (len(which), size, size, 3), from the policy's camera unless another is named."""
        known = camera in self.cameras or (
            isinstance(camera, int) and 0 <= camera < len(self.cameras)
        )
        number = (
            (self.cameras.index(camera) if camera in self.cameras else camera)
            if known
            else self.camera
        )
        owners = {
            i: group for group, share in zip(self.groups, self.shares, strict=True) for i in share
        }
        views = []
        for i in which:
            owners[i].ask("image", i, size, number)
            views.append(owners[i].receive())
        if self.renderer == "warp":
            return self._scene(1, size, number).draw(np.stack(views)).cpu().numpy()
        return np.stack(views)

    def state_dict(self) -> dict:
        """Everything that the future depends on: random states and actions of the running episodes."""
        return {
            "setup": self._setup(), "tasks": [_with_tensors(task) for task in self._all("save")],
            "returns": torch.tensor(self.returns), "length": torch.tensor(self.length),
            "nan_resets": self.nan_resets.clone(),
            "obs": {name: value.clone() for name, value in self.obs.items()},
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, exactly. Raises ValueError on another set-up."""
        for name, value in self._setup().items():
            if saved["setup"][name] != value:
                raise ValueError(
                    f"saved environment has {name} {saved['setup'][name]!r}, this one has {value!r}"
                )
        tasks = [_with_arrays(task) for task in saved["tasks"]]
        self._all("load", lambda share: (tasks[share.start : share.stop],))
        self.returns[:], self.length[:] = saved["returns"].numpy(), saved["length"].numpy()
        self.nan_resets = saved["nan_resets"].to(self.device, copy=True)
        self.obs = {name: value.to(self.device, copy=True) for name, value in saved["obs"].items()}

    def _setup(self) -> dict:
        return {"env_id": self.env_id, "num_envs": self.num_envs, "image_size": self.image_size,
                "frame_stack": self.frame_stack, "action_repeat": self.action_repeat}  # fmt: skip

    def close(self) -> None:
        """Ends the processes."""
        for group in self.groups:
            group.close()
        self.groups = []


def _with_tensors(value):
    """A saved task, which has NumPy arrays since `worker.py` knows no torch, with tensors in their places."""
    if isinstance(value, dict):
        return {name: _with_tensors(part) for name, part in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _with_arrays(value):
    """The opposite of `_with_tensors`."""
    if isinstance(value, dict):
        return {name: _with_arrays(part) for name, part in value.items()}
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


def _shares(num_envs: int, processes: int) -> list[range]:
    """Environments of each process, in order, as evenly as they go."""
    n = max(processes, 1)
    cuts = [k * num_envs // n for k in range(n + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


make = DMCEnv  # so that the options have their names
