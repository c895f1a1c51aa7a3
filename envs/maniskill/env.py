"""`make` and the batched ManiSkill environment: clocks, seeds, episode statistics, saved states."""

from importlib.util import find_spec

import numpy as np
import torch

from envs import usable_cpus
from envs.maniskill.processes import CpuBatches, Workers
from envs.maniskill.simulation import Batch
from envs.maniskill.trees import map_tree

# A partial reset on the GPU renders every environment once more: 5 a period cost 10 % more images.
GPU_STAGGER_GROUPS = 5


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    render_size: int = 128,
    asymmetric: bool = False,
    stagger: bool = False,
    control_mode: str = "pd_joint_delta_pos",
    reward_mode: str = "normalized_dense",
    max_episode_steps: int | None = None,
    shader: str = "minimal",
    sim_backend: str = "auto",
    render_backend: str = "auto",
    light_visuals: bool | None = None,
    num_workers: int | None = None,
    video_size: int = 256,
    task_options: dict | None = None,
) -> "ManiSkillEnv":
    """Builds `num_envs` environments of the ManiSkill task `env_id`.

    Args:
        env_id: ManiSkill's own id, such as `PickCube-v1`.
        device: where observations and rewards live; with `sim_backend="auto"` a CUDA device also means GPU simulation.
        seed: of the first episodes (see `episode_seed`).
        render_size: pixels on each side of every sensor camera.
        asymmetric: adds `obs["privileged"]`, the task's full `state` observation, for a critic.
        stagger: the first episodes start at different clock readings, so that environments do not reset in lockstep.
        control_mode, reward_mode: ManiSkill's names; the action is mapped from [-1, 1] if the mode's own range differs.
        max_episode_steps: time limit in steps; None takes the task's registered one.
        shader: ManiSkill's shader pack of the sensor cameras.
        sim_backend: `auto`, `physx_cuda` or `physx_cpu` (the latter also with a CUDA `device`, where results are sent).
        render_backend: `auto` is the simulating GPU, and on the CPU the first Vulkan device (`pci:0`).
        light_visuals: draws robots by their collision shapes, which for the Panda have 56 times fewer vertices.
            Changes the robot's look, so results are not comparable with images drawn without it. None: on for
            `physx_cpu`, off for `physx_cuda`.
        num_workers: processes for `physx_cpu`; None is 0 (this process) for one environment, else one a core, at most
            one an environment.
        video_size: pixels on each side of the images behind `render`.
        task_options: handed to the task, for instance `dict(robot_uids="so100")`.

    Raises:
        ImportError: mani_skill is not installed.
        ValueError: unknown id, control mode or reward mode, or a task that does not fit (no camera, no time limit).
        RuntimeError: no usable Vulkan driver, missing assets, or the simulation could not start.
    """
    for package in ("mani_skill", "sapien"):
        if find_spec(package) is None:
            raise ImportError(
                f'{env_id} needs {package}, which is not installed: run `pip install -e ".[maniskill]"`'
            )
    device = torch.device(device)
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if sim_backend == "auto":
        sim_backend = "physx_cuda" if device.type == "cuda" else "physx_cpu"
    if sim_backend not in ("physx_cpu", "physx_cuda"):
        raise ValueError(f"sim_backend must be auto, physx_cpu or physx_cuda, got {sim_backend!r}")
    on_gpu = sim_backend == "physx_cuda"
    if on_gpu and (device.type != "cuda" or not torch.cuda.is_available()):
        raise ValueError(
            f"sim_backend physx_cuda needs a CUDA device that torch can use, got device={str(device)!r}"
        )
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
        task_kwargs=task_options or {},
    )
    if on_gpu:
        simulation: Batch | CpuBatches | Workers = Batch(options, num_envs)
    else:
        if num_workers is None:
            num_workers = 0 if num_envs == 1 else min(num_envs, usable_cpus())
        workers = min(num_workers, num_envs)
        simulation = (
            Workers(options, num_envs, workers) if workers else CpuBatches(options, num_envs)
        )
    return ManiSkillEnv(
        simulation,
        env_id,
        num_envs,
        device,
        seed,
        stagger,
        GPU_STAGGER_GROUPS if on_gpu else num_envs,
    )


def episode_seed(seed: int, number: int, episode: int) -> int:
    """Seed in [0, 2^31) of an environment's `episode`-th episode after `reset(seed)`; hashed, so streams differ."""
    return int(np.random.SeedSequence((seed, number, episode)).generate_state(1)[0] >> 1)


class ManiSkillEnv:
    """`N` environments with their clocks, episode statistics and seeds. Made by `make`, which documents the choices.

    Attributes:
        action_dim, state_dim, privileged_dim: sizes `A`, of `obs["state"]` and of `obs["privileged"]` (0 if not asked).
        image_shape: `(H, W, C)` of `obs["rgb"]`.
        max_episode_steps, control_hz: the time limit in steps and the control rate in Hz.
        spec: what a deployment needs to know, as plain JSON values.
        nan_resets: int64 tensor, environments reset so far because their physics became non-finite.
    """

    def __init__(
        self,
        simulation: Batch | CpuBatches | Workers,
        env_id: str,
        num_envs: int,
        device: torch.device,
        seed: int,
        stagger: bool,
        stagger_groups: int,
    ):
        self.env_id, self.num_envs, self.device = env_id, num_envs, device
        self._simulation, self._on_gpu = simulation, isinstance(simulation, Batch)
        self.spec = simulation.describe()
        self.action_dim: int = self.spec["action_dim"]
        self.state_dim: int = self.spec["state_dim"]
        self.privileged_dim: int = self.spec["privileged_dim"]
        self.image_shape: tuple[int, int, int] = tuple(self.spec["image_shape"])
        self.max_episode_steps: int = self.spec["max_episode_steps"]
        self.control_hz: float = self.spec["control_hz"]
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=device)
        # per environment: `_episode`, the current episode's number since reset(seed); `_clock`, steps since it began,
        # kept on the host so that its end is known without waiting for the GPU; `_seeds`, `_next_seeds`, of it and of
        # the next one
        self.reset(seed)
        if stagger:
            groups = min(stagger_groups, num_envs)
            self._clock = np.arange(num_envs) % groups * self.max_episode_steps // groups
            simulation.set_clock(self._clock)

    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Starts a new episode in every environment, all clocks at 0.

        Args:
            seed: given, the episodes of that seed from the first on; None, each environment's next episode.

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
        return self._to_device(self._simulation.reset(self._seeds))

    def _draw_seeds(self) -> None:
        """Fills the seeds of every environment's current and next episode."""
        numbers = [(i, int(episode)) for i, episode in enumerate(self._episode)]
        self._seeds = np.array([episode_seed(self._seed, i, k) for i, k in numbers])
        self._next_seeds = np.array([episode_seed(self._seed, i, k + 1) for i, k in numbers])

    def step(
        self, actions: torch.Tensor
    ) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
        """One control step in every environment, and the automatic reset of those whose episode ends with it.

        Args:
            actions: (N, A), clipped to [-1, 1].

        Returns:
            obs, rewards (N,) float32, terminations (N,) bool (all False), truncations (N,) bool, and info with
            `final_obs` (full batch, the observation before any reset; the very tensors of obs where none ended),
            `success` (N,) bool of the state before any reset, and `episode` = `return`, `length`, `success_once`,
            `success_at_end`, each (N,) and valid where truncated.

        Raises ValueError for actions of another shape or not finite.

        An environment with a non-finite state or reward is reset and truncated with reward 0 and success False; its
        `final_obs` is its last finite observation.
        """
        if tuple(actions.shape) != (self.num_envs, self.action_dim):
            raise ValueError(
                f"actions must have shape {(self.num_envs, self.action_dim)}, got {tuple(actions.shape)}"
            )
        if (
            not self._on_gpu
        ):  # on the GPU the question would wait for the device; what breaks is reset below
            healthy = torch.isfinite(actions).all(dim=1)
            if not healthy.all():
                broken = torch.nonzero(~healthy).flatten().tolist()
                raise ValueError(f"the actions of environments {broken} are not finite")
        self._clock = self._clock + 1
        ends = self._clock >= self.max_episode_steps
        out = self._simulation.step(actions.detach().float(), ends, self._next_seeds)
        obs = self._to_device(out["obs"])
        final_obs = obs if out["final_obs"] is None else self._to_device(out["final_obs"])
        rewards, success = self._tensor(out["rewards"]), self._tensor(out["success"])
        done = ends | out["bad"]
        truncations = torch.from_numpy(done).to(self.device)

        self._returns = self._returns + rewards
        self._lengths = self._lengths + 1
        self._success_once = self._success_once | success
        episode = dict(
            length=self._lengths, success_once=self._success_once, success_at_end=success
        )
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

    def render(
        self, which: tuple[int, ...] = (0,), size: int = 256, camera: str = "third"
    ) -> np.ndarray:
        """Images for people, uint8 (len(which), size, size, 3).

        Args:
            camera: `third` is the task's own camera for people (drawn at `video_size` and resized to `size`); any other
                name is one of the sensor cameras, whose last image is enlarged pixel by pixel.
        """
        names = list(self.spec["cameras"])
        if camera != "third" and camera not in names:
            raise ValueError(
                f"{self.env_id} has no camera {camera!r}; choose one of: third, {', '.join(names)}"
            )
        images = torch.from_numpy(
            self._simulation.render(np.asarray(which, np.int64), camera)
        ).permute(0, 3, 1, 2)
        if images.shape[-1] != size:
            smooth = (
                dict(mode="bilinear", antialias=True) if camera == "third" else dict(mode="nearest")
            )
            images = (
                torch.nn.functional.interpolate(images.float(), (size, size), **smooth)
                .round()
                .clamp(0, 255)
            )
        return images.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()

    def state_dict(self) -> dict:
        """Everything this module counts, and ManiSkill's `get_state_dict` of the environments.

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
            simulation=map_tree(self._simulation.get_state(), torch.from_numpy),
        )

    def load_state_dict(self, state: dict) -> dict[str, torch.Tensor]:
        """Restores `state_dict()` and returns the current observation.

        Each environment is first reset to its episode's seed, which brings back what a task draws once an episode, then
        its bodies and joints are set. On the GPU a task's own tensors that are no body (drawn for several environments
        in one partial reset) are those of a full reset instead.
        """
        if len(state["clock"]) != self.num_envs:
            raise ValueError(
                f"the state is of {len(state['clock'])} environments, here are {self.num_envs}"
            )
        self._seed = state["seed"]
        self._episode = state["episode"].numpy().copy()
        self._draw_seeds()
        self._clock = state["clock"].numpy().copy()
        self._returns = state["returns"].to(self.device, copy=True)
        self._lengths = state["lengths"].to(self.device, copy=True)
        self._success_once = state["success_once"].to(self.device, copy=True)
        self.nan_resets = state["nan_resets"].to(self.device, copy=True)
        states = map_tree(state["simulation"], lambda tensor: tensor.numpy())
        return self._to_device(
            self._simulation.set_state(states, state["seeds"].numpy(), self._clock)
        )

    def close(self) -> None:
        """Ends the simulation and its worker processes."""
        self._simulation.close()

    def _tensor(self, value: "np.ndarray | torch.Tensor") -> torch.Tensor:
        return (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).to(self.device)

    def _to_device(self, obs: dict) -> dict[str, torch.Tensor]:
        return {key: self._tensor(value) for key, value in obs.items()}
