"""`make` and the batched robosuite environment: episodes, steps, saved states."""

from typing import Any, Literal

import numpy as np
import torch

from envs import usable_cpus
from envs.robosuite.processes import Group, Process
from envs.robosuite.simulation import CAMERAS, CONTROL_HZ, import_robosuite

HORIZONS = {
    "Lift": 100,
    "PickPlaceCan": 200,
    "NutAssemblySquare": 300,
}  # of the paper; other tasks: 400


def episode_seed(seed: int, number: int, episode: int) -> int:
    """Seed of one episode of one environment: far apart for neighbours, the same on every machine."""
    return int(np.random.SeedSequence((seed, number, episode)).generate_state(1)[0])


class RobosuiteEnv:
    """A batch of robosuite environments; the contract is in `envs/__init__.py`.

    Args:
        env_id: "robosuite/" and a name that robosuite knows.
        render_size, cameras, look: pixels on each side of an image, which cameras, and how they are drawn.
        asymmetric: adds obs["privileged"]. images: False leaves obs["rgb"] out.
        stagger: first episodes start at different clock readings, so that environments do not end in lockstep.
        max_episode_steps: None: the paper's (Lift 100, PickPlaceCan 200, NutAssemblySquare 300), others 400.
        workers: processes; None: one for each core, at most one an environment; 0, and None with one environment: none,
            everything happens in this process.
        env_kwargs: for robosuite.make, such as robots and controller_configs; None: one Panda, two for a TwoArm task.
        end_on_success: an episode also terminates at its first success.
    """

    control_hz, has_success = float(CONTROL_HZ), True

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        render_size: int = 84,
        cameras: tuple[str, ...] = CAMERAS,
        look: Literal["plain", "full", "collision"] = "plain",
        images: bool = True,
        asymmetric: bool = False,
        stagger: bool = False,
        max_episode_steps: int | None = None,
        workers: int | None = None,
        env_kwargs: dict | None = None,
        end_on_success: bool = False,
    ):
        name = env_id.removeprefix("robosuite/")
        if num_envs < 1 or render_size < 4:
            raise ValueError(
                f"num_envs must be at least 1, render_size at least 4; got {num_envs} and {render_size}"
            )
        if look not in ("plain", "full", "collision"):
            raise ValueError(f"look must be 'plain', 'full' or 'collision', not {look!r}")
        if images and not cameras:
            raise ValueError("images need at least one camera")
        self.env_id, self.num_envs, self.device = (
            f"robosuite/{name}",
            num_envs,
            torch.device(device),
        )
        self.cameras, self.render_size, self.look, self.images = (
            tuple(cameras),
            render_size,
            look,
            images,
        )
        self.asymmetric, self.stagger, self.seed, self.end_on_success = (
            asymmetric,
            stagger,
            seed,
            end_on_success,
        )
        self.max_episode_steps = max_episode_steps or HORIZONS.get(name, 400)
        self.image_shape = (render_size, render_size, 3 * len(self.cameras))
        kwargs = {"robots": ["Panda", "Panda"] if name.startswith("TwoArm") else "Panda"} | (
            env_kwargs or {}
        )
        self.env_args = {  # as robomimic names an environment
            "env_name": name, "type": 1,
            "env_kwargs": kwargs | {"control_freq": CONTROL_HZ} | (
                {"camera_names": list(self.cameras), "camera_heights": render_size, "camera_widths": render_size}
                if images else {}
            ),
        }  # fmt: skip
        if workers is None:
            workers = 0 if num_envs == 1 else min(num_envs, usable_cpus())
        opening = (name, kwargs, self.cameras if images else (), render_size, look, images)
        self._shares = np.array_split(np.arange(num_envs), max(1, min(workers, num_envs)))
        self._groups = []
        try:
            if workers:
                import_robosuite(name)  # what is missing is said here, not by every process
                self._groups = [Process([opening] * len(share)) for share in self._shares]
                facts = [group.receive() for group in self._groups][0]
            else:
                self._groups = [Group([opening] * num_envs)]
                facts = self._groups[0].facts()
        except BaseException:
            self.close()
            raise
        self._workers = workers
        self.action_dim = facts["action_dim"]
        # What state and privileged are made of: names in robosuite's observations and sizes.
        self.layout = {"state": facts["state"], "privileged": facts["state"] + facts["objects"]}
        self.state_dim = sum(size for _, size in self.layout["state"])
        self._privileged_dim = sum(size for _, size in self.layout["privileged"])
        self.privileged_dim = self._privileged_dim if asymmetric else 0

        n = num_envs
        self.clock, self.started, self.episode = (np.zeros(n, np.int64) for _ in range(3))
        self.returns, self.success_once = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=self.device)
        self._actions: list[list[np.ndarray]] = [
            [] for _ in range(n)
        ]  # of the running episodes, for `state_dict`
        self._last: list[dict[str, np.ndarray]] = []
        self.reset(seed)
        if stagger:
            self.clock[:] = self.started[:] = np.arange(n) * self.max_episode_steps // n

    @property
    def spec(self) -> dict:
        """What a robot needs to run a policy of this environment; JSON-able."""
        return {
            "env_id": self.env_id, "robot": self.env_args["env_kwargs"]["robots"], "control_hz": self.control_hz,
            "action_semantics": "operational space: change of the gripper's pose, then the gripper's command",
            "state_layout": [k for k, size in self.layout["state"] for _ in range(size)],
            "cameras": list(self.cameras) if self.images else [], "render_size": self.render_size, "look": self.look,
            "max_episode_steps": self.max_episode_steps,
        }  # fmt: skip

    # ---- the simulations -------------------------------------------------------------------------------------------
    def _call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        """Calls `method` of the environments that `arguments` names; all processes at once."""
        if not self._workers:
            return self._groups[0].call(method, arguments)
        asked = []
        for group, share in zip(self._groups, self._shares, strict=True):
            mine = {k: arguments[i] for k, i in enumerate(share) if i in arguments}
            if mine:
                group.ask(method, mine)
                asked.append((group, share))
        return {
            int(share[k]): answer for group, share in asked for k, answer in group.receive().items()
        }

    def _begin(self, numbers) -> None:
        """Begins the next episode of `numbers`."""
        for i, answer in self._call(
            "reset",
            {int(i): (episode_seed(self.seed, int(i), int(self.episode[i])),) for i in numbers},
        ).items():
            self._last[i], self._actions[i] = answer, []
        self.episode[numbers] += 1
        self.clock[numbers] = self.started[numbers] = 0
        self.returns[numbers], self.success_once[numbers] = 0.0, False

    def _obs(self, answers: list[dict]) -> dict[str, torch.Tensor]:
        keys = ["state"] + ["privileged"] * self.asymmetric + ["rgb"] * self.images
        return {
            k: torch.from_numpy(np.stack([a[k] for a in answers])).to(self.device) for k in keys
        }

    def fact(self, name: str) -> torch.Tensor:
        """One of the true quantities in `layout["privileged"]`, (N, size), such as "Can_pos"; for experts."""
        begin = 0
        for key, size in self.layout["privileged"]:
            if key == name:
                return torch.from_numpy(
                    np.stack([a["privileged"][begin : begin + size] for a in self._last])
                )
            begin += size
        raise KeyError(
            f"{self.env_id} has no {name}; it has {', '.join(k for k, _ in self.layout['privileged'])}"
        )

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Starts a new episode in every environment, all clocks at 0. With a seed, always the same episodes."""
        if seed is not None:
            self.seed = seed
            self.episode[:] = 0
        self._last = self._last or [{}] * self.num_envs
        self._begin(np.arange(self.num_envs))
        self.obs = self._obs(self._last)
        return self.obs

    def restart(self, where: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ends the episodes of `where`, a mask (N,), and begins their next ones; returns all observations."""
        self._begin(np.flatnonzero(where.cpu().numpy()))
        self.obs = self._obs(self._last)
        return self.obs

    def step(self, actions: torch.Tensor):
        """Actions (N, A) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        moves = actions.detach().cpu().to(torch.float64).clamp(-1.0, 1.0).nan_to_num(0.0).numpy()
        answers = self._call("step", {i: (moves[i],) for i in range(self.num_envs)})
        sane = np.array([bool(answers[i]["sane"]) for i in range(self.num_envs)])
        for i in range(self.num_envs):
            self._actions[i].append(moves[i])
            if sane[i]:  # what diverged has no next state and keeps its last observation
                self._last[i] = answers[i]
        success = torch.tensor([bool(a["success"]) for a in self._last]) & torch.from_numpy(sane)
        rewards = success.float()
        self.clock += 1
        self.nan_resets += int((~sane).sum())
        terminations = success if self.end_on_success else torch.zeros_like(success)
        ends = (self.clock >= self.max_episode_steps) | ~sane | terminations.numpy()
        self.returns += rewards
        self.success_once |= success
        episode = {
            "return": self.returns.clone(), "length": torch.from_numpy(self.clock - self.started),
            "success_once": self.success_once.clone(), "success_at_end": success,
        }  # fmt: skip
        episode = {k: v.to(self.device) for k, v in episode.items()}
        final_obs = self._obs(self._last)
        numbers = np.flatnonzero(ends)
        if len(numbers):
            self._begin(numbers)
            self.obs = self._obs(self._last)
        else:
            self.obs = final_obs
        terminations, truncations = (
            x.to(self.device) for x in (terminations, torch.from_numpy(ends) & ~terminations)
        )
        info = {"final_obs": final_obs, "success": success.to(self.device), "episode": episode}
        return self.obs, rewards.to(self.device), terminations, truncations, info

    # ---- for people, and for resuming --------------------------------------------------------------------------------
    def render(self, which=(0,), size: int = 256, camera: str = "frontview") -> np.ndarray:
        """Images for people, uint8 (len(which), size, size, 3), with shadows and reflections."""
        images = self._call("image", {int(i): (camera, size, "full") for i in which})
        return np.stack([images[int(i)] for i in which])

    def state_dict(self) -> dict:
        """What the future depends on: the seeds of the episodes and the actions so far."""
        return {
            "env_id": self.env_id, "num_envs": self.num_envs, "seed": self.seed, "episode": torch.tensor(self.episode),
            "clock": torch.tensor(self.clock), "started": torch.tensor(self.started), "returns": self.returns.clone(),
            "success_once": self.success_once.clone(), "nan_resets": self.nan_resets.clone(),
            "actions": [torch.tensor(np.array(a).reshape(-1, self.action_dim)) for a in self._actions],
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, by playing the running episodes again: seconds, not more.

        Raises ValueError on another set-up.
        """
        for name in ("env_id", "num_envs"):
            if saved[name] != getattr(self, name):
                raise ValueError(
                    f"saved environment has {name} {saved[name]!r}, this one has {getattr(self, name)!r}"
                )
        self.seed = saved["seed"]
        self.episode[:] = saved["episode"].numpy() - 1
        self._begin(np.arange(self.num_envs))
        self._actions = [list(a.numpy().copy()) for a in saved["actions"]]
        for t in range(max(len(a) for a in self._actions)):
            moves = {i: (a[t],) for i, a in enumerate(self._actions) if t < len(a)}
            for i, answer in self._call("step", moves).items():
                self._last[i] = answer
        self.clock[:], self.started[:] = saved["clock"].numpy(), saved["started"].numpy()
        self.returns.copy_(saved["returns"]), self.success_once.copy_(saved["success_once"])
        self.nan_resets.copy_(saved["nan_resets"])
        self.obs = self._obs(self._last)

    def close(self) -> None:
        """Ends the processes, frees the renderers."""
        for group in self._groups:
            group.close()
        self._groups = []


make = RobosuiteEnv  # so that the options have their names
