"""One robosuite environment, in NumPy: its observations, success, and cameras drawn by a renderer of its own."""

import contextlib
import importlib
import importlib.util
import io
import logging
import os

import numpy as np

INSTALL = "robosuite is not installed here; it needs an environment of its own: make robosuite"
CAMERAS = ("agentview", "robot0_eye_in_hand")
# Of the DexMimicGen package; listed here for a clear answer where it is missing.
DEXMIMICGEN = (
    "TwoArmThreading", "TwoArmThreePieceAssembly", "TwoArmTransport", "TwoArmLiftTray", "TwoArmBoxCleanup",
    "TwoArmDrawerCleanup", "TwoArmPouring", "TwoArmCoffee", "TwoArmCanSortRandom",
)  # fmt: skip
CONTROL_HZ = 20
STATE_PARTS = ("eef_pos", "eef_quat", "gripper_qpos")


def import_robosuite(name: str):
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
        raise ImportError(
            f"robosuite cannot be imported ({str(error).splitlines()[0]}): make robosuite"
        ) from None
    if name not in robosuite.ALL_ENVIRONMENTS:
        if name in DEXMIMICGEN:
            raise ImportError(
                f"{name} is a task of DexMimicGen, which is not installed; no package index has it: install it from "
                "its authors' repository, with robosuite 1.5"
            )
        raise ValueError(
            f"robosuite has no task {name!r}; it has {', '.join(sorted(robosuite.ALL_ENVIRONMENTS))}"
        )
    return robosuite


class Painter:
    """Draws cameras of one model with `mujoco.Renderer`'s parts, set so that a CPU can afford it; see `look` above."""

    def __init__(self, model, size: int, look: str):
        import mujoco

        quality = model.vis.quality
        if look != "full":
            # The context reads these when it is made; the buffer is no larger than the image.
            quality.shadowsize, quality.offsamples = 0, 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self.mujoco, self.model, self.size = mujoco, model, size
        try:
            self.gl = mujoco.GLContext(size, size)
            self.gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:
            install = {"osmesa": "libosmesa6"}.get(
                os.environ["MUJOCO_GL"], "libegl1 libgl1-mesa-dri"
            )
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(
                f"no image can be drawn here ({said}): sudo apt-get install {install}"
            ) from None
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene = mujoco.MjvScene(model, maxgeom=2000)
        self.option, self.camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.option.geomgroup[0], self.option.geomgroup[1] = (
            look == "collision",
            look != "collision",
        )
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
        mujoco.mjv_updateScene(
            self.model, data, self.option, None, self.camera, everything, self.scene
        )
        mujoco.mjr_render(self.area, self.scene, self.context)
        mujoco.mjr_readPixels(self.buffer, None, self.area, self.context)
        return self.buffer[::-1].copy()

    def close(self) -> None:
        self.context.free()
        self.gl.free()


class Simulation:
    """One robosuite environment. Answers are dicts of NumPy arrays: "state", "privileged", "rgb", "success", "sane"."""

    def __init__(self, name: str, kwargs: dict, cameras, size: int, look: str, images: bool):
        robosuite = import_robosuite(name)
        self.cameras, self.size, self.look, self.images = cameras, size, look, images
        errors = io.StringIO()
        try:
            with contextlib.redirect_stdout(errors):
                # Seed 0: what is drawn with the model (the size of Lift's cube) is the same everywhere, always.
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
        self.painters: dict[tuple, Painter] = {}
        obs = self.env.reset()
        parts = [
            k
            for k in obs
            if k.startswith("robot") and k.endswith(STATE_PARTS) and not k.endswith("-state")
        ]
        self.state_keys = sorted(
            parts, key=lambda k: (k[: k.index(_part(k))], STATE_PARTS.index(_part(k)))
        )
        # Names and sizes of what makes up state and object-state, in their order.
        active = [
            k for k, o in self.env._observables.items() if o.modality == "object" and k in obs
        ]
        model = self.env.sim.model._model
        known = [model.camera(i).name for i in range(model.ncam)]
        if set(cameras) - set(known):
            raise ValueError(
                f"{name} has no camera {', '.join(set(cameras) - set(known))}; it has {', '.join(known)}"
            )
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
        # MuJoCo answers diverging physics by a reset, clock included.
        data = self.env.sim.data._data
        sane = bool(np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all() and data.time > 0)
        return self._answer(obs, sane)

    def _answer(self, obs: dict, sane: bool) -> dict[str, np.ndarray]:
        state = np.concatenate([obs[k] for k in self.state_keys])
        privileged = np.concatenate((state, obs.get("object-state", ())))
        answer = {"state": state.astype(np.float32), "privileged": privileged.astype(np.float32)}
        if self.images:
            answer["rgb"] = np.concatenate(
                [self.image(c, self.size, self.look) for c in self.cameras], -1
            )
        return answer | {"success": np.bool_(self.env._check_success()), "sane": np.bool_(sane)}

    def image(self, camera: str, size: int, look: str) -> np.ndarray:
        key = (size, look)
        if key not in self.painters:
            self.painters[key] = Painter(self.env.sim.model._model, size, look)
        return self.painters[key].draw(self.env.sim.data._data, camera)

    def close(self) -> None:
        for painter in self.painters.values():
            painter.close()
        self.painters.clear()
        self.env.close()


def _part(key: str) -> str:
    return next(p for p in STATE_PARTS if key.endswith(p))
