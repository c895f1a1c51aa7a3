"""One DeepMind Control task, its images through OpenGL, and the process that runs some of them for `env.py`.

Nothing here needs torch, so that a process of it starts in a second or two. `env.py` has the environment itself.

An episode is a function of the random state at its start and of the actions since: that is all that `Task.save` keeps,
and `Task.load` lives it again without drawing, which is exact.
"""

import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
from multiprocessing.connection import Connection

# dm-control asks for "mujoco>=...", so pip may bring a MuJoCo that it has never seen.
TESTED = {"dm-control": "1.0.50", "mujoco": "3.17.0"}


def check_versions(installed: dict[str, str]) -> None:
    """Raises ImportError, in one line, for a pair of versions that does not work together."""
    if installed["dm-control"] == TESTED["dm-control"] and installed["mujoco"] != TESTED["mujoco"]:
        raise ImportError(
            f"dm-control {installed['dm-control']} works with mujoco {TESTED['mujoco']}, and mujoco "
            f'{installed["mujoco"]} is installed: pip install -e ".[dmc]"'
        )


# Without a choice of backend MuJoCo would look for a window, and abort where there is none.
os.environ.setdefault("MUJOCO_GL", "egl")
try:
    check_versions({name: importlib.metadata.version(name) for name in TESTED})
    import mujoco
    import numpy as np
    from absl import logging
    from dm_control import manipulation, suite
    from dm_control.mujoco import Camera
    from dm_control.rl.control import PhysicsError
except importlib.metadata.PackageNotFoundError as error:
    raise ImportError(f'DeepMind Control needs {error.name}: pip install -e ".[dmc]"') from None
except (ImportError, AttributeError) as error:
    if "dm-control" in str(error):
        raise
    raise ImportError(
        f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here ({' '.join(str(error).split())}): "
        "`python -m envs.check` says what to install; renderer 'warp' needs no OpenGL"
    ) from None

# module of dm_control.locomotion.examples -> its tasks whose episodes follow from the random state. Mazes and what
# shuffles things are left out: they keep random states of their own, which nobody can save.
LOCOMOTION = {
    "basic_rodent_2020": ("rodent_escape_bowl", "rodent_run_gaps"),
    "basic_cmu_2019": ("cmu_humanoid_go_to_target", "cmu_humanoid_run_gaps", "cmu_humanoid_run_walls"),
}  # fmt: skip
VISIBLE = 3  # groups 0, 1 and 2 of geoms, sites and tendons are drawn
FOR_PEOPLE = 256  # pixels a side that `fast_render` still leaves room for
SLOT = 3 + 9 + 3 + 4  # floats that describe a drawn thing: position, rotation, size, colour


# ------------------------------------------------------------------------------------------------------ the tasks ----
def known_tasks() -> dict[str, tuple[str, str]]:
    """Env id -> (domain, task) of the control suite, ("manipulation", name), or (module, name) of LOCOMOTION."""
    # lqr draws its model at random when it is loaded and knows no time limit: nothing to be learned from pixels.
    known = {
        f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS if domain != "lqr"
    }
    known |= {
        f"cup_{task}": (domain, task) for domain, task in suite.ALL_TASKS if domain == "ball_in_cup"
    }
    for name in manipulation.get_environments_by_tag("features"):
        known[name.removesuffix("_features")] = ("manipulation", name)
    for module, names in LOCOMOTION.items():
        known |= {name: (module, name) for name in names}
    return known


def _load(env_id: str, random: np.random.RandomState):
    """The task as DeepMind's packages make it. Raises ValueError for an unknown id, with the ids nearest to it."""
    known = known_tasks()
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=5, cutoff=0.5) or [
            "walker_walk",
            "cartpole_swingup",
        ]
        raise ValueError(
            f"unknown DeepMind Control task {env_id!r}; did you mean {', '.join(near)}?"
        )
    domain, task = known[env_id]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # nobody here can heed what their models warn about
    try:
        if domain == "manipulation":
            return manipulation.load(task, seed=random)
        if domain in LOCOMOTION:
            if os.environ["MUJOCO_GL"] == "disabled":  # they draw a first image of their own
                raise ValueError(f"{env_id} needs OpenGL: renderer egl or osmesa")
            examples = importlib.import_module(f"dm_control.locomotion.examples.{domain}")
            env = getattr(examples, task)(random_state=random)
            for observable in env.task.observables.values():  # its own images would be drawn too
                observable.enabled = False
            return env
        return suite.load(domain, task, task_kwargs={"random": random}, visualize_reward=False)
    finally:
        logging.set_verbosity(verbosity)


class Task:
    """One task with action repeat. A view of it is an image, or with the renderer "warp" what there is to draw."""

    def __init__(
        self,
        env_id: str,
        *,
        image_size: int,
        action_repeat: int,
        camera: int | str | None,
        renderer: str,
        fast_render: bool,
        camera_jitter: float,
        colour_jitter: float,
    ):
        self.random, self.jitter_random = np.random.RandomState(0), np.random.RandomState(0)
        self.env, self.env_id, self.size, self.repeat = (
            _load(env_id, self.random),
            env_id,
            image_size,
            action_repeat,
        )
        self.renderer, self.fast = renderer, fast_render
        self.camera_jitter, self.colour_jitter = camera_jitter, colour_jitter
        spec = self.env.action_spec()
        self.low, self.high = (
            np.broadcast_to(spec.minimum, spec.shape),
            np.broadcast_to(spec.maximum, spec.shape),
        )
        self.frames = self._frames()
        self.limit, self.clock = -(-self.frames // action_repeat), 0
        self.model, self.cameras = None, {}
        self.camera = self._camera_id(camera)
        self.actions, self.at_start = [], {}

    def _frames(self) -> int:
        """Control steps of an episode, by counting as dm-control does: its limit may be 1000.0000000001."""
        limit = getattr(self.env, "_step_limit", None)
        if limit is None:  # manipulation and locomotion stop by the simulated time
            limit = self.env._time_limit / self.env.control_timestep()
        return int(np.ceil(limit - 1e-6))

    def _camera_id(self, camera: int | str | None) -> int:
        """Number of the camera; None is the published choice. Raises ValueError for one that the model has not."""
        model = self.env.physics.model.ptr
        names = [model.camera(i).name for i in range(model.ncam)]
        if camera is None:
            if "walker/egocentric" in names:
                return names.index("walker/egocentric")
            if not hasattr(self.env, "_step_limit"):
                return names.index("front_close")
            return 2 if self.env_id.startswith("quadruped") else 0
        if isinstance(camera, str) and camera.lstrip("-").isdigit():
            camera = int(camera)
        if camera in names:
            return names.index(camera)
        if not isinstance(camera, int) or not 0 <= camera < model.ncam:
            raise ValueError(
                f"{self.env_id} has no camera {camera!r}; 0 to {len(names) - 1} are {', '.join(names)}"
            )
        return camera

    def describe(self) -> dict:
        """What `env.py` needs to know, as plain values; with the renderer "warp" the compiled model too."""
        model = self.env.physics.model.ptr
        return {
            "action_dim": len(self.low), "frames": self.frames, "limit": self.limit, "camera": self.camera,
            "cameras": [model.camera(i).name for i in range(model.ncam)],
            "action_low": self.low.tolist(), "action_high": self.high.tolist(),
            "control_hz": 1 / (self.env.control_timestep() * self.repeat),
            "drawn": (model, slots(model)) if self.renderer == "warp" else None,
        }  # fmt: skip

    # ---- episodes ----------------------------------------------------------------------------------------------------
    def seed(self, words: list[int]) -> None:
        """From here on always the same episodes; images vary by a stream of their own."""
        physics, images = np.random.SeedSequence(words).spawn(2)
        self.random.seed(physics.generate_state(4))
        self.jitter_random.seed(images.generate_state(4))

    def begin(self, clock: int = 0) -> None:
        """A new episode; `clock` agent steps of its time are taken to have passed."""
        self.at_start = {
            "physics": _random_state(self.random),
            "jitter": _random_state(self.jitter_random),
        }
        self.actions, self.clock = [], clock
        self._start()

    def _start(self) -> None:
        self.env.reset()
        model = self.env.physics.model.ptr
        if self.model is not model:  # the first episode, or a task that is compiled anew for each
            self.model, self.cameras = model, {}
            self.colours = {name: getattr(model, name).copy() for name in ("mat_rgba", "geom_rgba")}
            room = model.vis.global_  # of the frame buffer; before the first image
            room.offwidth, room.offheight = (
                max(room.offwidth, self.size),
                max(room.offheight, self.size),
            )
            if self.fast:
                _make_cheap(model, self.size)
        draw = self.jitter_random.uniform
        self.shift = draw(-1, 1, 3) * self.camera_jitter * model.stat.extent
        self.turn = np.zeros(9)
        angles, quat = draw(-1, 1, 3) * self.camera_jitter, np.zeros(4)
        mujoco.mju_euler2Quat(quat, angles, "xyz")
        mujoco.mju_quat2Mat(self.turn, quat)
        if self.colour_jitter:
            for (
                name,
                nominal,
            ) in self.colours.items():  # alpha is left alone: tasks hide targets by it
                tint = draw(-1, 1, (len(nominal), 3)) * self.colour_jitter
                if name == "geom_rgba":  # where a geom has its material's colour, it keeps it
                    tint[(nominal == [0.5, 0.5, 0.5, 1]).all(1) & (model.geom_matid >= 0)] = 0
                getattr(model, name)[:, :3] = np.clip(nominal[:, :3] + tint, 0, 1)

    def step(self, action: np.ndarray) -> tuple[float, float, bool, bool, bool]:
        """Action (A,) in [-1, 1]. Returns reward, discount, whether it is a true end, one by time, and sane physics."""
        self.actions.append(action)
        scaled = self.low + 0.5 * (action.astype(np.float64) + 1) * (self.high - self.low)
        reward, discount, terminated, last = 0.0, 1.0, False, False
        self.clock += 1
        try:
            for _ in range(self.repeat):
                time_step = self.env.step(scaled)
                reward += discount * (time_step.reward or 0.0)
                discount *= time_step.discount  # a discount of 0 stays 0: a true end
                last = time_step.last()
                if last:
                    terminated = time_step.discount == 0
                    break
        except PhysicsError:
            return 0.0, 1.0, False, True, False
        return (
            reward,
            discount,
            terminated,
            not terminated and (last or self.clock >= self.limit),
            True,
        )

    def save(self) -> dict:
        """The running episode: random states at its start, and the actions since."""
        actions = np.array(self.actions, np.float32).reshape(-1, len(self.low))
        return {"at_start": self.at_start, "actions": actions, "clock": self.clock}

    def load(self, saved: dict) -> None:
        """Lives the saved episode again, without drawing, to where it was saved."""
        _set_random_state(self.random, saved["at_start"]["physics"])
        _set_random_state(self.jitter_random, saved["at_start"]["jitter"])
        self.begin(saved["clock"] - len(saved["actions"]))
        for action in saved["actions"]:
            self.step(action)

    # ---- views -------------------------------------------------------------------------------------------------------
    def view(self) -> np.ndarray:
        """uint8 (size, size, 3); with the renderer "warp" a float32 vector for `env.py`'s scene."""
        return self.things() if self.renderer == "warp" else self.image(self.size, self.camera)

    def image(self, size: int, camera: int) -> np.ndarray:
        """uint8 (size, size, 3) by OpenGL. The episode's camera jitter applies to the policy's camera.

        Raises ValueError for a size above that of the frame buffer.
        """
        room = self.env.physics.model.ptr.vis.global_
        if size > (most := min(room.offwidth, room.offheight)):
            raise ValueError(
                f"an image of {size} pixels a side is too large here: OpenGL has room for {most}"
            )
        key = (size, camera)
        if key not in self.cameras:
            self.cameras[key] = Camera(self.env.physics, height=size, width=size, camera_id=camera)
        data = self.env.physics.data.ptr
        place, turn = data.cam_xpos[camera].copy(), data.cam_xmat[camera].copy()
        if camera == self.camera:
            data.cam_xpos[camera], data.cam_xmat[camera] = self._camera_pose()
        rgb = self.cameras[key].render().copy()
        data.cam_xpos[camera], data.cam_xmat[camera] = place, turn
        return rgb

    def _camera_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (9,) of the policy's camera in the world, jitter included."""
        data = self.env.physics.data.ptr
        turned = data.cam_xmat[self.camera].reshape(3, 3) @ self.turn.reshape(3, 3)
        return data.cam_xpos[self.camera] + self.shift, turned.ravel()

    def things(self, camera: int | None = None) -> np.ndarray:
        """What a renderer has to know of this moment: SLOT floats a thing (see `slots`), then camera and lights."""
        model, data = self.model, self.env.physics.data.ptr
        geoms, sites, tendons = slots(model)
        grey = np.array([0.5, 0.5, 0.5, 1.0])  # stands for "the material's colour"
        parts = []
        for ids, kind in ((geoms, "geom"), (sites, "site")):
            rgba, material = (
                getattr(model, f"{kind}_rgba")[ids],
                getattr(model, f"{kind}_matid")[ids],
            )
            if model.nmat:
                of_material = (material >= 0) & (rgba == grey).all(1)
                rgba = np.where(of_material[:, None], model.mat_rgba[np.maximum(material, 0)], rgba)
            place, turn = getattr(data, f"{kind}_xpos")[ids], getattr(data, f"{kind}_xmat")[ids]
            parts.append(
                np.concatenate((place, turn, getattr(model, f"{kind}_size")[ids], rgba), 1)
            )
        parts.append(np.array([_segment(model, data, t, k) for t, k in tendons]).reshape(-1, SLOT))
        if camera is None or camera == self.camera:
            pose = self._camera_pose()
        else:
            pose = data.cam_xpos[camera], data.cam_xmat[camera]
        rest = (*pose, data.light_xpos.ravel(), data.light_xdir.ravel())
        return np.concatenate((np.concatenate(parts).ravel(), *rest)).astype(np.float32)


def _random_state(random: np.random.RandomState) -> dict:
    """The generator's state, as an array and plain values."""
    _, key, position, has_gauss, gauss = random.get_state()
    return {
        "key": key.astype(np.int64),
        "position": position,
        "has_gauss": has_gauss,
        "gauss": gauss,
    }


def _set_random_state(random: np.random.RandomState, state: dict) -> None:
    """Continue from `_random_state`."""
    key = state["key"].astype(np.uint32)
    random.set_state(("MT19937", key, state["position"], state["has_gauss"], state["gauss"]))


def slots(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """What is drawn, in the order of `Task.things`: numbers of geoms, of sites, and (tendon, piece) of tendons."""
    geoms, sites = (
        np.flatnonzero(group < VISIBLE) for group in (model.geom_group, model.site_group)
    )
    at = model.tendon_adr
    spatial = [t for t in range(model.ntendon) if model.tendon_group[t] < VISIBLE
               and model.wrap_type[at[t]] != mujoco.mjtWrap.mjWRAP_JOINT]  # fmt: skip
    return geoms, sites, [(t, k) for t in spatial for k in range(model.tendon_num[t] - 1)]


def _segment(model, data, tendon: int, piece: int) -> np.ndarray:
    """One straight piece of a tendon as a capsule (SLOT,); invisible where the tendon has fewer pieces."""
    slot, at = np.zeros(SLOT), data.ten_wrapadr[tendon] + piece
    if piece + 1 < data.ten_wrapnum[tendon]:
        points = data.wrap_xpos.reshape(-1, 3)[at : at + 2]
        along, quat = points[1] - points[0], np.zeros(4)
        mujoco.mju_quatZ2Vec(quat, along)
        mujoco.mju_quat2Mat(slot[3:12], quat)
        slot[:3], slot[12:14] = (
            points.mean(0),
            (model.tendon_width[tendon], np.linalg.norm(along) / 2),
        )
        material = model.tendon_matid[tendon]
        plain = material < 0 or (model.tendon_rgba[tendon] != [0.5, 0.5, 0.5, 1]).any()
        slot[15:] = model.tendon_rgba[tendon] if plain else model.mat_rgba[material]
    return slot


def _make_cheap(model: mujoco.MjModel, size: int) -> None:
    """No shadows, no multisampling, no mirrors, a frame buffer no larger than needed. Before the first image."""
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    model.vis.quality.offsamples = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = max(size, FOR_PEOPLE)


# -------------------------------------------------------------------------------------------------- a few of them ----
class Group:
    """Some tasks in one place, and the requests that `env.py` has for them; here or behind a pipe."""

    def __init__(self, env_id: str, numbers: list[int], options: dict):
        self.numbers = numbers  # of these tasks among all of the environment's
        self.tasks = [Task(env_id, **options) for _ in numbers]

    def describe(self) -> dict:
        return self.tasks[0].describe()

    def reset(self, seed: int | None, clocks: list[int]) -> list[np.ndarray]:
        """New episodes; with a seed always the same. Returns the first views."""
        for task, number, clock in zip(self.tasks, self.numbers, clocks, strict=True):
            if seed is not None:
                task.seed([seed, number])
            task.begin(clock)
        return [task.view() for task in self.tasks]

    def step(self, actions: np.ndarray) -> list[tuple]:
        """Actions (n, A). Returns of each task (view, outcome of `Task.step`, first view of the next episode)."""
        results = []
        for task, action in zip(self.tasks, actions, strict=True):
            outcome = task.step(action)
            _, _, terminated, truncated, sane = outcome
            view, first = task.view() if sane else None, None
            if terminated or truncated:
                task.begin()
                first = task.view()
            results.append((view, outcome, first))
        return results

    def save(self) -> list[dict]:
        return [task.save() for task in self.tasks]

    def load(self, saved: list[dict]) -> None:
        for task, state in zip(self.tasks, saved, strict=True):
            task.load(state)

    def views(self, times: int = 1) -> list[np.ndarray]:
        """The present views, drawn anew, several times over: for measuring."""
        for _ in range(times):
            drawn = [task.view() for task in self.tasks]
        return drawn

    def image(self, number: int, size: int, camera: int) -> np.ndarray:
        """An image for people of the task that has this number; with the renderer "warp" what there is to draw."""
        task = self.tasks[self.numbers.index(number)]
        return task.things(camera) if task.renderer == "warp" else task.image(size, camera)


def serve(pipe: Connection) -> None:
    """Answers requests (name, arguments) by (True, result) or (False, kind of error, its line), until the pipe ends."""
    group = None
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, ConnectionError):  # the other side has gone
            return
        try:
            if name == "open":
                group, result = Group(*arguments), None
            else:
                result = getattr(group, name)(*arguments)
            answer = (True, result)
        except Exception as error:  # told there, in one line
            answer = (False, type(error).__name__, " ".join(str(error).split()))
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's, which saves, then closes the pipe
    serve(Connection(int(sys.argv[1])))
