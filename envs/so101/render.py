"""Kinematics and images of all environments at once, by MuJoCo Warp's batch renderer."""

import math

import mujoco_warp as mjw
import torch
import warp as wp

# Fields of the MuJoCo model that differ between environments: torch views of MuJoCo Warp's arrays, so that drawing and
# stepping see a write at once. The C stepper copies what it needs into its models (and `dof_M0`, which Warp lacks).
FIELDS = (
    "geom_size", "geom_pos", "geom_rgba", "geom_rbound", "geom_aabb", "geom_friction", "body_mass", "body_inertia",
    "body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_gainprm", "actuator_biasprm",
    "cam_pos", "cam_quat", "cam_fovy", "light_ambient", "light_diffuse", "light_dir",
)  # fmt: skip

# What MuJoCo Warp allocates for each environment. Random motion against the table and the items uses up to 9 on
# average (all environments share the contacts) and 54; stepping.py counts what does not fit.
CONTACTS, CONSTRAINTS = 48, 240


class Scene:
    """`n` environments of one model in MuJoCo Warp: kinematics, camera poses and the batch renderer."""

    def __init__(
        self,
        mjm,
        n: int,
        device: str,
        cameras,
        size: int,
        samples: int,
        table: bool = False,
        fields=FIELDS,
    ):
        self.mjm, self.n, self.device, self.size, self.cameras = mjm, n, device, size, cameras
        self.per_axis = math.isqrt(samples)
        if self.per_axis**2 != samples or samples < 1:
            raise ValueError(
                f"--samples-per-pixel must be a square (1, 4, 9, 16, ...), not {samples}"
            )
        # The renderer's own samples_per_pixel is quicker (see benchmarks/throughput.py), but it fixes the rays once for
        # all environments, which rules out a field of view per environment. So: a finer image, averaged over blocks.
        fine = size * self.per_axis
        with wp.ScopedDevice(device):
            self.m = mjw.put_model(mjm, batch_sizes={name: n for name in fields})
            self.d = mjw.make_data(mjm, nworld=n, nconmax=CONTACTS, njmax=CONSTRAINTS)
            self.rc = mjw.create_render_context(
                mjm, nworld=n, cam_res=(fine, fine), cam_active=list(cameras), render_rgb=True, render_depth=False,
                use_textures=False, use_shadows=table, use_precomputed_rays=False,
                enabled_geom_groups=[2, 3] if table else [2], enable_specular=False, enable_emission=False,
                background_color=(0.62, 0.66, 0.70, 1.0) if table else (0.0, 0.0, 0.0, 1.0),
            )  # fmt: skip
        self.fields = {name: wp.to_torch(getattr(self.m, name)) for name in fields}
        self.qpos, self.site_xpos, self.xmat, self.xpos = (
            wp.to_torch(a) for a in (self.d.qpos, self.d.site_xpos, self.d.xmat, self.d.xpos)
        )
        packed = wp.to_torch(self.rc.rgb_data).view(
            torch.uint8
        )  # (n, cameras * fine^2 * 4) bytes b, g, r, a
        self.pixels = packed.view(n, len(cameras), fine, fine, 4)
        self.graphs = {}

    def run(self, launches, graph=None):
        """Runs Warp launches; returns what to pass as `graph` at the next call.

        The first call (None) launches plainly, which loads the kernels; the second (False) captures a graph; from then
        on the graph is replayed, on torch's current stream where the device is a GPU.
        """
        stream = (
            wp.stream_from_torch(torch.cuda.current_stream(self.device))
            if "cuda" in self.device
            else None
        )
        with wp.ScopedDevice(self.device), wp.ScopedStream(stream, sync_enter=False):
            if graph is None:
                launches()
                return False
            if graph is False:
                side = (
                    wp.Stream(self.device) if stream else None
                )  # CUDA's default stream cannot be captured
                with wp.ScopedStream(side), wp.ScopedCapture(self.device, stream=side) as capture:
                    launches()
                graph = capture.graph
            wp.capture_launch(graph, stream=stream)
        return graph

    def _kinematics(self) -> None:
        mjw.kinematics(self.m, self.d)
        mjw.camlight(self.m, self.d)

    def _render(self) -> None:
        mjw.refit_bvh(self.m, self.d, self.rc)
        mjw.render(self.m, self.d, self.rc)

    def kinematics(self) -> None:
        """Body, site, camera and light poses of the present `qpos`."""
        self.graphs["k"] = self.run(self._kinematics, self.graphs.get("k"))

    def draw(self) -> torch.Tensor:
        """Images of the present poses: uint8 (n, size, size, 3 * cameras)."""
        self.graphs["r"] = self.run(self._render, self.graphs.get("r"))
        rgb, k = self.pixels[..., :3].flip(-1), self.per_axis  # stored as b, g, r
        if (
            k > 1
        ):  # the mean of k x k pixels, rounded; adding slices is several times faster than a reduction
            parts = [rgb[:, :, i::k, j::k].to(torch.int32) for i in range(k) for j in range(k)]
            rgb = ((sum(parts) + k * k // 2) // (k * k)).to(torch.uint8)
        return rgb.permute(0, 2, 3, 1, 4).reshape(self.n, self.size, self.size, -1).contiguous()
