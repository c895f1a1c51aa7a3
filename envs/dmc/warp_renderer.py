"""Draws DeepMind Control tasks with MuJoCo Warp's batch renderer: any number of environments in one launch, no OpenGL.

The environments are simulated elsewhere (`worker.py`) and tell at every step where things are. So this needs no
physics: `drawing` makes a model that only has things to look at, a body-less copy of the task's own, in which sites
and tendons, which the renderer does not draw, are geoms as well. Textures, materials, sky box, lights and shadows are
the task's. Against OpenGL there are no mirrors, no haze, no skins and nothing half transparent: what is less than
half opaque is left out, the rest is opaque. benchmarks/throughput_pixels.py and scripts/picture_dmc.py compare them.
"""

import math

import numpy as np
import torch

try:
    import mujoco
    import mujoco_warp as mjw
    import warp as wp
except ImportError as error:
    raise ImportError(
        f"renderer 'warp' needs MuJoCo Warp: pip install -e \".[so101]\"  ({error})"
    ) from None

SLOT = (
    3 + 9 + 3 + 4
)  # floats that describe a drawn thing, as worker.py sends them: position, rotation, size, colour
wp.config.log_level = wp.LOG_WARNING  # no line for every kernel that is loaded
MATERIAL = ("emission", "specular", "shininess", "reflectance", "texuniform", "texrepeat")
LIGHT = (
    "type",
    "castshadow",
    "active",
    "attenuation",
    "cutoff",
    "exponent",
    "ambient",
    "diffuse",
    "specular",
)
MESH = ("vert", "normal", "texcoord", "face", "facenormal", "facetexcoord")


def drawing(model: mujoco.MjModel, slots: tuple) -> mujoco.MjModel:
    """The model that is drawn in place of `model`: a geom for each of `worker.slots`, one camera, its lights.

    Raises ValueError for what the renderer has no counterpart of.
    """
    geoms, sites, tendons = slots
    if (model.geom_type[geoms] == mujoco.mjtGeom.mjGEOM_HFIELD).any():
        raise ValueError(
            "renderer 'warp' cannot draw a terrain that changes with every episode: use egl or osmesa"
        )
    spec = mujoco.MjSpec()
    for i in range(model.ntex):  # of the right size; their pixels are copied below
        spec.add_texture(name=f"t{i}", type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
                         width=int(model.tex_width[i]), height=int(model.tex_height[i]),
                         nchannel=int(model.tex_nchannel[i]))  # fmt: skip
    for i in range(model.nmat):
        material = spec.add_material(name=f"m{i}")
        if (texture := model.mat_texid[i, mujoco.mjtTextureRole.mjTEXROLE_RGB]) >= 0:
            textures = list(material.textures)
            textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"t{texture}"
            material.textures = textures
    for i in range(model.nmesh):
        part = {name: getattr(model, f"mesh_{name}")[getattr(model, f"mesh_{name}adr")[i] :]
                [: getattr(model, f"mesh_{name}num")[i]] for name in ("vert", "face")}  # fmt: skip
        spec.add_mesh(name=f"g{i}", uservert=part["vert"].ravel(), userface=part["face"].ravel())
    world, kinds = spec.worldbody, mujoco.mjtGeom
    shapes = [(model.geom_type[g], model.geom_dataid[g], model.geom_matid[g]) for g in geoms]
    shapes += [(model.site_type[s], -1, model.site_matid[s]) for s in sites]
    shapes += [(kinds.mjGEOM_CAPSULE, -1, model.tendon_matid[t]) for t, _ in tendons]
    for kind, data, material in shapes:
        more = {"material": f"m{material}"} if material >= 0 else {}
        if kind == kinds.mjGEOM_MESH:
            more["meshname"] = f"g{data}"
        world.add_geom(type=kind, size=(0.1, 0.1, 0.1), contype=0, conaffinity=0, **more)
    for _ in range(model.nlight):
        world.add_light()
    world.add_camera(name="view")
    # A model without any joint is nothing that MuJoCo Warp expects.
    spec.worldbody.add_body(
        pos=(0, 0, -100), mass=1, inertia=(1, 1, 1), explicitinertial=True
    ).add_freejoint()
    drawn = spec.compile()
    for prefix, names in (("mat", MATERIAL), ("light", LIGHT)):
        for name in names:
            getattr(drawn, f"{prefix}_{name}")[:] = getattr(model, f"{prefix}_{name}")
    # OpenGL lights the corners of planes, far away from any highlight; per pixel there would be one.
    flat = [m for kind, _, m in shapes if kind == kinds.mjGEOM_PLANE and m >= 0]
    drawn.mat_specular[flat] = 0
    drawn.tex_type[:], drawn.tex_data[:] = model.tex_type, model.tex_data
    _copy_meshes(model, drawn)
    drawn.vis.headlight.active = model.vis.headlight.active
    for name in ("ambient", "diffuse", "specular"):
        getattr(drawn.vis.headlight, name)[:] = getattr(model.vis.headlight, name)
    drawn.stat.extent = model.stat.extent
    drawn.vis.map.znear, drawn.vis.map.zfar = model.vis.map.znear, model.vis.map.zfar
    return drawn


def _copy_meshes(model: mujoco.MjModel, drawn: mujoco.MjModel) -> None:
    """The compiler turns a mesh into a frame of its own; these are to stand in the frames that the task's stand in."""
    for name in MESH if model.nmesh else ():
        ours, theirs = getattr(drawn, f"mesh_{name}"), getattr(model, f"mesh_{name}")
        if ours.shape != theirs.shape:
            raise ValueError(
                f"renderer 'warp' cannot draw meshes with textures (mesh_{name}): use egl or osmesa"
            )
        ours[:] = theirs


class Scene:
    """`n` environments that are drawn together from one camera each, `size` pixels a side."""

    def __init__(
        self,
        model: mujoco.MjModel,
        slots: tuple,
        camera: int,
        n: int,
        device,
        size: int,
        samples: int = 4,
    ):
        if math.isqrt(samples) ** 2 != samples or samples < 1:
            raise ValueError(
                f"samples_per_pixel must be a square (1, 4, 9, 16, ...), not {samples}"
            )
        self.n, self.size, self.device = n, size, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.mjm = drawing(model, slots)
        self.mjm.cam_fovy[0] = model.cam_fovy[camera]
        self.things, self.lights = self.mjm.ngeom, self.mjm.nlight
        self.name, self.graph = "cpu" if self.device.type == "cpu" else str(self.device), None
        with wp.ScopedDevice(self.name):
            self.m = mjw.put_model(self.mjm, batch_sizes={"geom_size": n, "geom_rgba": n})
            self.d = mjw.make_data(self.mjm, nworld=n, nconmax=1, njmax=1)
            self.rc = mjw.create_render_context(
                self.mjm, nworld=n, cam_res=(size, size), render_rgb=True, render_depth=False, use_shadows=True,
                render_skybox=bool((self.mjm.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX).any()),
                samples_per_pixel=math.isqrt(samples), shadow_light_fraction=0.0,
            )  # fmt: skip
        views = {
            "pos": self.d.geom_xpos,
            "mat": self.d.geom_xmat,
            "size": self.m.geom_size,
            "rgba": self.m.geom_rgba,
        }
        views |= {"cam_pos": self.d.cam_xpos, "cam_mat": self.d.cam_xmat}
        views |= (
            {"light_pos": self.d.light_xpos, "light_dir": self.d.light_xdir} if self.lights else {}
        )
        self.views = {
            name: wp.to_torch(array).view(n, -1, array.dtype._length_)
            for name, array in views.items()
        }
        self.pixels = (
            wp.to_torch(self.rc.rgb_data).view(torch.uint8).view(n, size, size, 4)
        )  # b, g, r, a

    def draw(self, things: np.ndarray) -> torch.Tensor:
        """Vectors of `Task.things` (k, ...) of any number of environments -> images uint8 (k, size, size, 3)."""
        things = torch.from_numpy(things).to(self.device)
        return torch.cat(
            [self._draw(things[k : k + self.n]) for k in range(0, len(things), self.n)]
        )

    def _draw(self, things: torch.Tensor) -> torch.Tensor:
        k, cut = len(things), self.things * SLOT
        slot = things[:, :cut].view(k, self.things, SLOT)
        rest = iter(things[:, cut:].split([3, 9, *[3 * self.lights] * 2], 1))
        for name, values in zip(
            ("pos", "mat", "size", "rgba"), slot.split([3, 9, 3, 4], 2), strict=True
        ):
            self.views[name][:k] = values
        alpha = self.views["rgba"][:k, :, 3]
        alpha.copy_(alpha >= 0.5)  # 0 is left out, anything else is opaque to the renderer
        for name, values in zip(
            ("cam_pos", "cam_mat", "light_pos", "light_dir"), rest, strict=True
        ):
            if name in self.views:
                self.views[name][:k] = values.view(k, -1, self.views[name].shape[2])
        self._run()
        return self.pixels[:k, ..., :3].flip(-1).contiguous()

    def _launch(self) -> None:
        mjw.refit_bvh(self.m, self.d, self.rc)
        mjw.render(self.m, self.d, self.rc)

    def _run(self) -> None:
        """Launches; on a GPU the second call captures a graph that the later ones replay, on torch's own stream."""
        if self.device.type == "cpu":
            with wp.ScopedDevice(self.name):
                self._launch()
            return
        stream = wp.stream_from_torch(torch.cuda.current_stream(self.device))
        with wp.ScopedDevice(self.name), wp.ScopedStream(stream, sync_enter=False):
            if self.graph is None:  # loads the kernels
                self._launch()
                self.graph = False
                return
            if self.graph is False:
                side = wp.Stream(self.name)  # CUDA's default stream cannot be captured
                with wp.ScopedStream(side), wp.ScopedCapture(self.name, stream=side) as capture:
                    self._launch()
                self.graph = capture.graph
            wp.capture_launch(self.graph, stream=stream)
