"""Images of the Go1 for people, from the model's camera "track"."""

import atexit
import os
import weakref

import mujoco
import numpy as np


class Renderer:
    """By OpenGL (EGL) where that works, else by MuJoCo Warp's ray tracer. `by` says which one draws.

    Raises RuntimeError, in one line, where neither works.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int):
        from envs import check  # asks in a process of its own: a broken driver may end it

        self.model, self.size, self.data = model, (width, height), mujoco.MjData(model)
        self.camera = max(mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track"), 0)
        egl = check.ask("egl")
        self.by = "egl" if egl.works else "warp"
        if egl.works:
            self._begin_egl()
            return
        warp = check.ask("warp-renderer")
        if not warp.works:
            raise RuntimeError(
                f"no image can be drawn here: EGL: {egl.detail}; MuJoCo Warp: {warp.detail}; for one "
                'of them run sudo apt-get install libegl1 libgl1-mesa-dri, or pip install -e ".[so101]"'
            )
        self._begin_warp()

    def _begin_egl(self):
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        # mujoco.Renderer would want MUJOCO_GL set before mujoco is imported
        from mujoco.egl import GLContext

        model, (width, height) = self.model, self.size
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self.gl = GLContext(width, height)
        self.gl.make_current()
        weakref.finalize(self, self.gl.free).atexit = False
        atexit.register(self.gl.free)  # before the library, imported earlier, is taken down
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.scene, self.options = mujoco.MjvScene(model, 1000), mujoco.MjvOption()
        self.options.geomgroup[3] = 1  # the feet
        self.view = mujoco.MjvCamera()
        self.view.type, self.view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.camera

    def _begin_warp(self):
        import mujoco_warp
        import warp

        with warp.ScopedDevice("cuda:0" if warp.get_cuda_device_count() else "cpu"):
            self.warp_model = mujoco_warp.put_model(self.model)
            self.warp_data = mujoco_warp.make_data(self.model, nworld=1)
            self.context = mujoco_warp.create_render_context(
                self.model,
                nworld=1,
                cam_res=self.size,
                cam_active=[self.camera == i for i in range(self.model.ncam)],
                render_rgb=True,
                use_textures=True,
                use_shadows=True,
                enabled_geom_groups=[0, 1, 2, 3],
                background_color=(0.80, 0.86, 0.92, 1.0),
            )
            self.pixels = warp.zeros((1, self.size[1], self.size[0]), dtype=warp.vec3)

    def draw(self, qpos: np.ndarray) -> np.ndarray:
        """qpos (nq,) -> uint8 (height, width, 3)."""
        return self._draw_egl(qpos) if self.by == "egl" else self._draw_warp(qpos)

    def _draw_warp(self, qpos: np.ndarray) -> np.ndarray:
        import mujoco_warp as mjw

        self.warp_data.qpos.assign(np.asarray(qpos, np.float32)[None])
        for part in (mjw.kinematics, mjw.com_pos, mjw.camlight):
            part(self.warp_model, self.warp_data)
        mjw.refit_bvh(self.warp_model, self.warp_data, self.context)
        mjw.render(self.warp_model, self.warp_data, self.context)
        mjw.get_rgb(self.context, 0, self.pixels)
        return (self.pixels.numpy()[0] * 255.0).round().clip(0, 255).astype(np.uint8)

    def _draw_egl(self, qpos: np.ndarray) -> np.ndarray:
        self.data.qpos[:] = qpos
        for part in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            part(self.model, self.data)
        self.gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        given = (self.model, self.data, self.options, None, self.view, everything, self.scene)
        mujoco.mjv_updateScene(*given)
        image = np.empty((self.size[1], self.size[0], 3), np.uint8)
        mujoco.mjr_render(mujoco.MjrRect(0, 0, *self.size), self.scene, self.context)
        mujoco.mjr_readPixels(image, None, mujoco.MjrRect(0, 0, *self.size), self.context)
        return image[::-1]  # OpenGL's first row is the lowest
