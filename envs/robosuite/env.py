"""robosuite's tasks: Lift, PickPlaceCan and NutAssemblySquare, on which residual RL was published, and any other id.

    env = make("robosuite/PickPlaceCan", num_envs=4, device="cpu", seed=1)

A Panda arm is moved by its operational-space controller at 20 Hz: action (N, 7) in [-1, 1], six changes of the
gripper's pose (5 cm and 0.5 rad at most, in the frame of the arm's base) and the gripper's command, -1 open, 1 closed.
Behind the contract of `envs/__init__.py`:
    state        each arm's eef_pos 3, eef_quat 4 (x, y, z, w) and gripper_qpos: 9 numbers for one Panda
    privileged   the same and robosuite's object-state: positions and quaternions of the objects
    rgb          the cameras side by side on channels; `agentview` and the wrist's, as in the paper
    rewards      sparse: 1 in a state of success, else 0
robosuite needs mujoco below 3.9 and numpy below 2, so it lives in an environment of its own: `make robosuite`.

On a CPU, pictures cost more than physics: the visual meshes have 357,000 vertices and the default shadow map 4096^2
texels. So this module draws with a renderer of its own, without shadows, reflections and multisampling; `look` chooses:
    plain       the visual meshes, drawn as said: the default
    full        robosuite's own settings: shadows, reflections, four samples a pixel
    collision   only what collides: several times faster still, and a picture of its own
(OpenGL by `MUJOCO_GL`, egl unless that is set to osmesa; docs/envs/robosuite.md has the figures.)

Worlds draw their episodes from seeds of their own (`episode_seed`). Several worlds are shared out over `workers`
processes; each world is stepped by one process alone, so an episode does not depend on their number.
The two-armed tasks of DexMimicGen go by their ids where the user has installed that package, which no package index
has; `env_kwargs` hands robosuite what they need, and a demonstration file's env_args has it.

Shapes: `N` worlds, `S` state, `P` privileged, `A` action dims. Nothing of robosuite is imported before `make` runs.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import multiprocessing
import os
import signal
from typing import Any, Literal

import numpy as np
import torch

INSTALL = "robosuite is not installed here; it needs an environment of its own: make robosuite"
CAMERAS = ("agentview", "robot0_eye_in_hand")
HORIZONS = {"Lift": 100, "PickPlaceCan": 200, "NutAssemblySquare": 300}  # of the paper; other tasks: 400
# Of the DexMimicGen package; listed here for a clear answer where it is missing.
DEXMIMICGEN = (
    "TwoArmThreading", "TwoArmThreePieceAssembly", "TwoArmTransport", "TwoArmLiftTray", "TwoArmBoxCleanup",
    "TwoArmDrawerCleanup", "TwoArmPouring", "TwoArmCoffee", "TwoArmCanSortRandom",
)  # fmt: skip
CONTROL_HZ = 20
STATE_PARTS = ("eef_pos", "eef_quat", "gripper_qpos")


def episode_seed(seed: int, world: int, episode: int) -> int:
    """Seed of one episode of one world: far apart for neighbours, the same on every machine."""
    return int(np.random.SeedSequence((seed, world, episode)).generate_state(1)[0])


def make(env_id: str, num_envs: int, device: str | torch.device = "cpu", **options) -> "RobosuiteEnv":
    """The robosuite task `env_id` ("robosuite/" and robosuite's name); options as in `RobosuiteEnv`.

    Raises ImportError where robosuite or DexMimicGen is missing, ValueError for an unknown id or option, RuntimeError
    where no picture can be drawn or a process died; each one line that says what would do.
    """
    return RobosuiteEnv(env_id, num_envs, device, **options)


# ---------------------------------------------------------------------------------------------- one world, in numpy --
def _import(name: str):
    """robosuite, quietly, once the task `name` is among its tasks."""
    if importlib.util.find_spec("robosuite") is None:
        raise ImportError(INSTALL)
    if os.environ.get("MUJOCO_GL") not in ("egl", "osmesa"):
        os.environ["MUJOCO_GL"] = "egl"
    if os.environ["MUJOCO_GL"] == "osmesa":
        os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        # Its import prints advice on files that nobody needs here.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            robosuite = importlib.import_module("robosuite")
            if name in DEXMIMICGEN and importlib.util.find_spec("dexmimicgen") is not None:
                importlib.import_module("dexmimicgen")
    except Exception as error:
        raise ImportError(f"robosuite cannot be imported ({str(error).splitlines()[0]}): make robosuite") from None
    if name not in robosuite.ALL_ENVIRONMENTS:
        if name in DEXMIMICGEN:
            raise ImportError(
                f"{name} is a task of DexMimicGen, which is not installed; no package index has it: install it from "
                "its authors' repository, with robosuite 1.5"
            )
        raise ValueError(f"robosuite has no task {name!r}; it has {', '.join(sorted(robosuite.ALL_ENVIRONMENTS))}")
    return robosuite


class _Painter:
    """Draws cameras of one model with `mujoco.Renderer`'s parts, set so that a CPU can afford it; see `look` above."""

    def __init__(self, model, size: int, look: str):
        import mujoco

        quality = model.vis.quality
        if look != "full":
            # The context reads these when it is made; the buffer is no larger than the picture.
            quality.shadowsize, quality.offsamples = 0, 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self.mujoco, self.model, self.size = mujoco, model, size
        try:
            self.gl = mujoco.GLContext(size, size)
            self.gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:
            install = {"osmesa": "libosmesa6"}.get(os.environ["MUJOCO_GL"], "libegl1 libgl1-mesa-dri")
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(f"no picture can be drawn here ({said}): sudo apt-get install {install}") from None
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene = mujoco.MjvScene(model, maxgeom=2000)
        self.option, self.camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.option.geomgroup[0], self.option.geomgroup[1] = look == "collision", look != "collision"
        if look != "full":
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.buffer = np.zeros((size, size, 3), np.uint8)
        self.area = mujoco.MjrRect(0, 0, size, size)

    def draw(self, data, camera: str) -> np.ndarray:
        """The view of `camera`, uint8 (size, size, 3), first row on top."""
        mujoco = self.mujoco
        self.gl.make_current()
        self.camera.fixedcamid = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, data, self.option, None, self.camera, everything, self.scene)
        mujoco.mjr_render(self.area, self.scene, self.context)
        mujoco.mjr_readPixels(self.buffer, None, self.area, self.context)
        return self.buffer[::-1].copy()

    def close(self) -> None:
        self.context.free()
        self.gl.free()


class _World:
    """One robosuite environment. Answers are dicts of numpy arrays: "state", "privileged", "rgb", "success", "sane"."""

    def __init__(self, name: str, kwargs: dict, cameras, size: int, look: str, pictures: bool):
        robosuite = _import(name)
        self.cameras, self.size, self.look, self.pictures = cameras, size, look, pictures
        errors = io.StringIO()
        try:
            with contextlib.redirect_stdout(errors):
                # Seed 0: what is drawn with the model (the size of Lift's cube) is the same in all worlds, always.
                self.env = robosuite.make(
                    name, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, renderer="mujoco",
                    hard_reset=False, ignore_done=True, control_freq=CONTROL_HZ, seed=0, **kwargs,
                )  # fmt: skip
        except (TypeError, AssertionError, ValueError, KeyError) as error:
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ValueError(f"robosuite cannot make {name} with {kwargs}: {said}") from None
        low, high = self.env.action_spec
        if (low != -1).any() or (high != 1).any():
            raise ValueError(f"the actions of {name} are not in [-1, 1], but from {low} to {high}")
        self.painters: dict[tuple, _Painter] = {}
        obs = self.env.reset()
        parts = [k for k in obs if k.startswith("robot") and k.endswith(STATE_PARTS) and not k.endswith("-state")]
        self.state_keys = sorted(parts, key=lambda k: (k[: k.index(_part(k))], STATE_PARTS.index(_part(k))))
        # Names and sizes of what makes up state and object-state, in their order.
        active = [k for k, o in self.env._observables.items() if o.modality == "object" and k in obs]
        model = self.env.sim.model._model
        known = [model.camera(i).name for i in range(model.ncam)]
        if set(cameras) - set(known):
            raise ValueError(f"{name} has no camera {', '.join(set(cameras) - set(known))}; it has {', '.join(known)}")
        self.facts = {
            "action_dim": len(low), "state": [(k, obs[k].size) for k in self.state_keys],
            "objects": [(k, int(np.size(obs[k]))) for k in active],
        }  # fmt: skip

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        # The samplers of placements share this generator, so it is set anew, not replaced.
        self.env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        return self._answer(self.env.reset(), True)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        obs, _, _, _ = self.env.step(action)
        # MuJoCo answers a diverging world by resetting it, clock included.
        data = self.env.sim.data._data
        sane = bool(np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all() and data.time > 0)
        return self._answer(obs, sane)

    def _answer(self, obs: dict, sane: bool) -> dict[str, np.ndarray]:
        state = np.concatenate([obs[k] for k in self.state_keys])
        privileged = np.concatenate((state, obs.get("object-state", ())))
        answer = {"state": state.astype(np.float32), "privileged": privileged.astype(np.float32)}
        if self.pictures:
            answer["rgb"] = np.concatenate([self.picture(c, self.size, self.look) for c in self.cameras], -1)
        return answer | {"success": np.bool_(self.env._check_success()), "sane": np.bool_(sane)}

    def picture(self, camera: str, size: int, look: str) -> np.ndarray:
        key = (size, look)
        if key not in self.painters:
            self.painters[key] = _Painter(self.env.sim.model._model, size, look)
        return self.painters[key].draw(self.env.sim.data._data, camera)

    def close(self) -> None:
        for painter in self.painters.values():
            painter.close()
        self.painters.clear()
        self.env.close()


def _part(key: str) -> str:
    return next(p for p in STATE_PARTS if key.endswith(p))


# --------------------------------------------------------------------------------------------- where the worlds live --
class _Worlds:
    """Some worlds in this process. Arguments and answers are lists, one entry a world."""

    def __init__(self, openings: list[tuple]):
        self.worlds = []
        try:
            for opening in openings:
                self.worlds.append(_World(*opening))
        except BaseException:
            self.close()
            raise

    def facts(self) -> dict:
        return self.worlds[0].facts

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        return {i: getattr(self.worlds[i], method)(*args) for i, args in arguments.items()}

    def close(self) -> None:
        for world in self.worlds:
            world.close()


def _serve(pipe, openings: list[tuple]) -> None:
    """The loop of a process: questions are (method, arguments), answers (True, value) or (False, kind, line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    worlds = None
    while True:
        try:
            method, arguments = ("open", None) if worlds is None else pipe.recv()
        except EOFError:
            break
        try:
            if method == "open":
                worlds = _Worlds(openings)
            pipe.send((True, worlds.facts() if method == "open" else worlds.call(method, arguments)))
        except Exception as error:
            pipe.send((False, type(error).__name__, next(iter(str(error).splitlines()), "")))
            if worlds is None:
                break
    os._exit(0)  # a driver may crash while the interpreter shuts down; all answers have been given


class _Process:
    """`_Worlds` in a process of its own."""

    def __init__(self, openings: list[tuple]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, openings), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, arguments: dict[int, tuple]) -> None:
        try:
            self.pipe.send((method, arguments))
        except OSError:
            self._died()

    def receive(self):
        try:
            fine, *answer = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
        if not fine:
            kind, line = answer
            raise {"ValueError": ValueError, "ImportError": ImportError}.get(kind, RuntimeError)(line or kind)
        return answer[0]

    def _died(self):
        self.process.join(5)
        status = self.process.exitcode
        hint = "; out of memory? use fewer --num-envs" if status == -signal.SIGKILL else ""
        raise RuntimeError(f"a process of robosuite worlds has ended with status {status}{hint}") from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


# ---------------------------------------------------------------------------------------------------- environment ----
class RobosuiteEnv:
    """A batch of robosuite worlds; the contract that every environment module here shares (see `envs/__init__.py`).

    Args:
        env_id: "robosuite/" and a name that robosuite knows.
        render_size, cameras, look: pixels on each side of a picture, which cameras, and how they are drawn.
        asymmetric: adds obs["privileged"]. pictures: False leaves obs["rgb"] out.
        stagger: first episodes start at different clock readings, so that worlds do not end in lockstep.
        max_episode_steps: None: the paper's (Lift 100, PickPlaceCan 200, NutAssemblySquare 300), others 400.
        workers: processes; None: one for each core, no more than worlds; 0, and None with one world: this process.
        env_kwargs: for robosuite.make, such as robots and controller_configs; None: one Panda, two for a TwoArm task.
        end_on_success: an episode also terminates at its first success.
    """

    control_hz, has_success = float(CONTROL_HZ), True

    def __init__(
        self, env_id: str, num_envs: int, device: str | torch.device = "cpu", *, seed: int = 0, render_size: int = 84,
        cameras: tuple[str, ...] = CAMERAS, look: Literal["plain", "full", "collision"] = "plain",
        pictures: bool = True, asymmetric: bool = False, stagger: bool = True, max_episode_steps: int | None = None,
        workers: int | None = None, env_kwargs: dict | None = None, end_on_success: bool = False,
    ):  # fmt: skip
        name = env_id.removeprefix("robosuite/")
        if num_envs < 1 or render_size < 4:
            raise ValueError(f"num_envs must be at least 1, render_size at least 4; got {num_envs} and {render_size}")
        if look not in ("plain", "full", "collision"):
            raise ValueError(f"look must be 'plain', 'full' or 'collision', not {look!r}")
        if pictures and not cameras:
            raise ValueError("pictures need at least one camera")
        self.env_id, self.num_envs, self.device = f"robosuite/{name}", num_envs, torch.device(device)
        self.cameras, self.render_size, self.look, self.pictures = tuple(cameras), render_size, look, pictures
        self.asymmetric, self.stagger, self.seed, self.end_on_success = asymmetric, stagger, seed, end_on_success
        self.max_episode_steps = max_episode_steps or HORIZONS.get(name, 400)
        self.image_shape = (render_size, render_size, 3 * len(self.cameras))
        kwargs = {"robots": ["Panda", "Panda"] if name.startswith("TwoArm") else "Panda"} | (env_kwargs or {})
        self.env_args = {  # as robomimic names an environment
            "env_name": name, "type": 1,
            "env_kwargs": kwargs | {"control_freq": CONTROL_HZ} | (
                {"camera_names": list(self.cameras), "camera_heights": render_size, "camera_widths": render_size}
                if pictures else {}
            ),
        }  # fmt: skip
        if workers is None:
            workers = 0 if num_envs == 1 else min(num_envs, os.cpu_count() or 1)
        opening = (name, kwargs, self.cameras if pictures else (), render_size, look, pictures)
        self._shares = np.array_split(np.arange(num_envs), max(1, min(workers, num_envs)))
        self._groups = []
        try:
            if workers:
                _import(name)  # what is missing is said here, not by every process
                self._groups = [_Process([opening] * len(share)) for share in self._shares]
                facts = [group.receive() for group in self._groups][0]
            else:
                self._groups = [_Worlds([opening] * num_envs)]
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
        self._actions: list[list[np.ndarray]] = [[] for _ in range(n)]  # of the running episodes, for `state_dict`
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
            "cameras": list(self.cameras) if self.pictures else [], "render_size": self.render_size, "look": self.look,
            "max_episode_steps": self.max_episode_steps,
        }  # fmt: skip

    # ---- worlds ------------------------------------------------------------------------------------------------------
    def _call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        """Calls `method` of the worlds that `arguments` names; all processes at once."""
        if not self._workers:
            return self._groups[0].call(method, arguments)
        asked = []
        for group, share in zip(self._groups, self._shares, strict=True):
            mine = {k: arguments[i] for k, i in enumerate(share) if i in arguments}
            if mine:
                group.ask(method, mine)
                asked.append((group, share))
        return {int(share[k]): answer for group, share in asked for k, answer in group.receive().items()}

    def _begin(self, worlds) -> None:
        """Begins the next episode of `worlds`."""
        for i, answer in self._call(
            "reset", {int(i): (episode_seed(self.seed, int(i), int(self.episode[i])),) for i in worlds}
        ).items():
            self._last[i], self._actions[i] = answer, []
        self.episode[worlds] += 1
        self.clock[worlds] = self.started[worlds] = 0
        self.returns[worlds], self.success_once[worlds] = 0.0, False

    def _obs(self, answers: list[dict]) -> dict[str, torch.Tensor]:
        keys = ["state"] + ["privileged"] * self.asymmetric + ["rgb"] * self.pictures
        return {k: torch.from_numpy(np.stack([a[k] for a in answers])).to(self.device) for k in keys}

    def fact(self, name: str) -> torch.Tensor:
        """One of the true quantities in `layout["privileged"]`, (N, size), such as "Can_pos"; for experts."""
        begin = 0
        for key, size in self.layout["privileged"]:
            if key == name:
                return torch.from_numpy(np.stack([a["privileged"][begin : begin + size] for a in self._last]))
            begin += size
        raise KeyError(f"{self.env_id} has no {name}; it has {', '.join(k for k, _ in self.layout['privileged'])}")

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def reset(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Starts a new episode in every world, all clocks at 0. With a seed, always the same episodes."""
        if seed is not None:
            self.seed = seed
            self.episode[:] = 0
        self._last = self._last or [{}] * self.num_envs
        self._begin(np.arange(self.num_envs))
        self.obs = self._obs(self._last)
        return self.obs

    def restart(self, worlds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ends the episodes of `worlds`, a mask (N,), and begins their next ones; returns all observations."""
        self._begin(np.flatnonzero(worlds.cpu().numpy()))
        self.obs = self._obs(self._last)
        return self.obs

    def step(self, actions: torch.Tensor):
        """Actions (N, A) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        moves = actions.detach().cpu().to(torch.float64).clamp(-1.0, 1.0).nan_to_num(0.0).numpy()
        answers = self._call("step", {i: (moves[i],) for i in range(self.num_envs)})
        sane = np.array([bool(answers[i]["sane"]) for i in range(self.num_envs)])
        for i in range(self.num_envs):
            self._actions[i].append(moves[i])
            if sane[i]:  # a diverged world has no next state: it keeps its last observation
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
        worlds = np.flatnonzero(ends)
        if len(worlds):
            self._begin(worlds)
            self.obs = self._obs(self._last)
        else:
            self.obs = final_obs
        terminations, truncations = (x.to(self.device) for x in (terminations, torch.from_numpy(ends) & ~terminations))
        info = {"final_obs": final_obs, "success": success.to(self.device), "episode": episode}
        return self.obs, rewards.to(self.device), terminations, truncations, info

    # ---- for people, and for resuming --------------------------------------------------------------------------------
    def render(self, worlds=(0,), size: int = 256, camera: str = "frontview") -> np.ndarray:
        """Pictures for people, uint8 (len(worlds), size, size, 3), with shadows and reflections."""
        pictures = self._call("picture", {int(i): (camera, size, "full") for i in worlds})
        return np.stack([pictures[int(i)] for i in worlds])

    def state_dict(self) -> dict:
        """What the future of every world depends on: the seeds of the episodes and the actions so far."""
        return {
            "env_id": self.env_id, "num_envs": self.num_envs, "seed": self.seed, "episode": self.episode.copy(),
            "clock": self.clock.copy(), "started": self.started.copy(), "returns": self.returns.clone(),
            "success_once": self.success_once.clone(), "nan_resets": self.nan_resets.clone(),
            "actions": [np.array(a).reshape(-1, self.action_dim) for a in self._actions],
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, by playing the running episodes again: seconds, not more.

        Raises ValueError on another set-up.
        """
        for name in ("env_id", "num_envs"):
            if saved[name] != getattr(self, name):
                raise ValueError(f"saved environment has {name} {saved[name]!r}, this one has {getattr(self, name)!r}")
        self.seed = saved["seed"]
        self.episode[:] = saved["episode"] - 1
        self._begin(np.arange(self.num_envs))
        self._actions = [list(a) for a in saved["actions"]]
        for t in range(max(len(a) for a in self._actions)):
            moves = {i: (a[t],) for i, a in enumerate(self._actions) if t < len(a)}
            for i, answer in self._call("step", moves).items():
                self._last[i] = answer
        self.clock[:], self.started[:] = saved["clock"], saved["started"]
        self.returns.copy_(saved["returns"]), self.success_once.copy_(saved["success_once"])
        self.nan_resets.copy_(saved["nan_resets"])
        self.obs = self._obs(self._last)

    def close(self) -> None:
        """Ends the processes, frees the renderers."""
        for group in self._groups:
            group.close()
        self._groups = []
