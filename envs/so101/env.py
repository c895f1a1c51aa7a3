"""The SO-101 task set on MuJoCo: eight manipulation tasks seen through a wrist camera, thousands of worlds at once.

`make("SO101ReachCube-v1", num_envs, device, seed=...)` returns a batched environment whose tensors live on `device`:
physics and pictures come from pip packages alone (no Vulkan, no OpenGL, no display). On an NVIDIA GPU, MuJoCo Warp
steps and ray-traces all worlds on the device; on a CPU, MuJoCo's C library steps them in threads and MuJoCo Warp's
renderer draws them (`engine="auto"` picks; `benchmarks/throughput.py` has the figures behind the choice).

Tasks: Reach, Lift, Place and Stack, each with a cube or a can; sizes, spawn region, rewards, success tests and
randomisation follow Squint (arXiv 2602.21203), with these changes, each for a defect of the published set:
  1. Place: the item must be inside the bin's *rotated* footprint and rest on its floor (published: an axis-aligned test
     that ignores height), and success is worth one point more than anything before it (published: the same 9 points).
  2. Controller targets keep inside the joint limits and near the joints (published: they wind up beyond them).
  3. The first frame of an episode is drawn from the new episode's camera pose (published: from the old one's).
  4. The servos have the torque of real ones, 3 N m (published: 100 N m), 1.5 N m at the gripper; see `so101.xml`.
  5. Randomisation is drawn per world and per episode (published: sizes, friction, lights and field of view once per
     process; the camera's pose at every step).
  6. A spawn that never overlaps: rejection sampling with enough candidates, the farthest apart if all fail
     (published: silently the middle of the region).
  7. Robot links float against gravity, as published; the arm does not collide with itself (published: it does).
Angles are radians, lengths metres, forces newtons; the world frame is the robot's base, x forward, y left, z up.
"""

import copy
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

try:
    import mujoco
    import mujoco.rollout
    import mujoco_warp as mjw
    import warp as wp
except ImportError as error:
    raise ImportError(f'SO-101 tasks need MuJoCo and MuJoCo Warp: pip install -e ".[so101]"  ({error})') from None

wp.config.log_level = wp.LOG_WARNING  # no line for every kernel that is loaded

# --------------------------------------------------------------------------------------------------------- constants --
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
START_POSE = (0.0, 0.0, 0.0, math.pi / 2, -math.pi / 2, math.pi / 3)
ACTION_SCALE = (0.1, 0.1, 0.1, 0.1, 0.1, 0.2)  # radians per control step at |action| = 1
CONTROL_HZ, SUBSTEPS, HORIZON = 10.0, 10, 50
# What a robot keeps its targets to; `step` does the same, so that a policy sees in training what it will see there.
VELOCITY_LIMIT = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)  # rad/s, of a target: what |action| = 1 asks for
ACCELERATION_LIMIT = (10.0, 10.0, 10.0, 10.0, 10.0, 20.0)  # rad/s^2: full speed after one control step; stops are free
TRACKING_ERROR = (0.35, 0.35, 0.35, 0.35, 0.35, 0.6)  # radians from target to joint: stays near a blocked arm
JOINT_MARGIN = 0.02  # radians that targets keep from the joint limits
SPAWN_CENTRE, SPAWN_HALF = (0.30, 0.0), 0.10
DENSITY = 200.0  # kg/m^3
BIN_THICKNESS = 0.005
FINGER_FRICTION = 2.0  # averaged with the item's, as PhysX combines them
RED, BLUE, WHITE = (0.85, 0.07, 0.07), (0.08, 0.20, 0.80), (0.92, 0.92, 0.92)
RANDOM_TRIES = 64
CAMERA_FILE = Path(__file__).with_name("so101_cameras.json")  # of your arm: hardware/align_camera.py writes it, if ever


@dataclass(frozen=True)
class Task:
    """What one id stands for: the verb, the shape of the item, and what it goes onto or into."""

    verb: str
    item: str  # "cube" | "can"
    support: str | None = None  # None | "bin" | "large_cube" | "can"


TASKS = {
    f"SO101{verb}{thing}-v1": Task(
        verb=verb.lower(),
        item="cube" if verb == "Stack" else thing.lower(),
        support={"Place": "bin", "Stack": {"Cube": "large_cube", "Can": "can"}[thing]}.get(verb),
    )
    for verb in ("Reach", "Lift", "Place", "Stack")
    for thing in ("Cube", "Can")
}


@dataclass(frozen=True)
class Randomization:
    """Ranges of the domain randomisation, drawn uniformly per world at each episode's start unless a line says else.

    `Randomization().off()` collapses every range to its middle and every noise to zero; the spawn pose of the objects
    and the 0.02 rad of noise on the start pose belong to the task and stay.
    """

    cube_size: tuple[float, float] = (0.022, 0.028)
    """Edge of the cube, metres."""
    large_cube_size: tuple[float, float] = (0.025, 0.035)
    """Edge of the cube that is stacked upon, metres."""
    can_diameter: tuple[float, float] = (0.028, 0.038)
    """Diameter of the can, metres."""
    can_height: tuple[float, float] = (0.050, 0.070)
    """Height of the can, metres."""
    bin_length: tuple[float, float] = (0.090, 0.110)
    """Bin, between the centres of opposite walls along its y axis, metres."""
    bin_width: tuple[float, float] = (0.070, 0.090)
    """Bin, between the centres of opposite walls along its x axis, metres."""
    bin_wall: tuple[float, float] = (0.024, 0.036)
    """Height of the bin's walls, metres."""
    mass_factor: tuple[float, float] = (0.8, 1.2)
    """Factor on the objects' mass (density 200 kg/m^3)."""
    friction: tuple[float, float] = (0.1, 0.5)
    """Sliding friction of item and support."""
    gripper_stiffness: tuple[float, float] = (0.5, 2.0)
    """Factor on the gripper servo's position gain (1 = nominal when off)."""
    gripper_damping: tuple[float, float] = (0.5, 2.0)
    """Factor on the gripper servo's velocity gain (1 = nominal when off)."""
    arm_stiffness: tuple[float, float] = (0.9, 1.1)
    """Factor on the arm servos' position gains."""
    action_delay: tuple[float, float] = (0.0, 0.03)
    """Seconds before a new target reaches the servos, in steps of the simulation (10 ms)."""
    joint_noise: float = math.radians(5.0)
    """Standard deviation of the noise on the joint readings that the policy sees, radians, at every step."""
    ambient: tuple[float, float] = (0.2, 0.5)
    """Ambient light, per colour channel."""
    diffuse: tuple[float, float] = (0.4, 0.6)
    """Strength of each of the two directional lights."""
    light_tilt: float = 0.2
    """Largest change of each component of a light's direction."""
    colour: float = 0.08
    """Largest change of each colour channel of objects, plastic and servos."""
    camera_position: float = 0.002
    """Largest shift of the wrist camera along each axis, metres."""
    camera_rotation: float = math.radians(1.0)
    """Largest rotation of the wrist camera about each axis, radians."""
    camera_fovy: float = 1.0
    """Largest change of the wrist camera's vertical field of view, degrees."""
    third_position: float = 0.025
    """As `camera_position`, for the third-person camera."""
    third_rotation: float = math.radians(1.0)
    """As `camera_rotation`, for the third-person camera."""
    third_fovy: float = 5.0
    """As `camera_fovy`, for the third-person camera."""

    def off(self) -> "Randomization":
        """The same object with every range at its middle (factors 1, delay 0) and every noise 0."""
        fixed = {"gripper_stiffness": 1.0, "gripper_damping": 1.0, "action_delay": 0.0}
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            middle = fixed.get(field.name, sum(value) / 2) if isinstance(value, tuple) else None
            values[field.name] = 0.0 if middle is None else (middle, middle)
        return Randomization(**values)


# ------------------------------------------------------------------------------------------------- the MuJoCo model --
def _look_at(eye, target) -> np.ndarray:
    """Quaternion (w, x, y, z) of a MuJoCo camera (looks along -z, x to the right) at `eye` towards `target`."""
    back = np.asarray(eye, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    right /= np.linalg.norm(right)
    return _mat_to_quat(np.stack([right, np.cross(back, right), back], axis=1))


def _mat_to_quat(mat: np.ndarray) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(mat).ravel())
    return quat


def _wrist_camera() -> tuple[np.ndarray, np.ndarray]:
    """Position and quaternion of the wrist camera in the gripper's frame.

    Published as xyz and three angles (-90, 91, -35.31) degrees of a frame that looks along +x with z up. The order of
    the angles that makes the camera look down along the fingers, tilted 35 degrees towards them, is Ry Rz Rx.
    """
    roll, pitch, yaw = np.radians((-90.0, 91.0, -35.31))
    rx = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    ry = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    rz = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    forward, left, up = (ry @ rz @ rx).T
    return np.array((-0.0049, 0.0498, -0.0591)), _mat_to_quat(np.stack([-left, up, -forward], axis=1))


def _add_upstream_meshes(spec: "mujoco.MjSpec", asset_dir: str) -> None:
    """Replaces the drawn shapes of the arm by the meshes of a SO-ARM100 checkout; what collides stays ours.

    `asset_dir` is its `Simulation/SO101` folder: `so101_new_calib.xml` names the meshes and their places.
    """
    path = Path(asset_dir).expanduser() / "so101_new_calib.xml"
    if not path.is_file():
        raise FileNotFoundError(f"asset_dir: {path} does not exist; give SO-ARM100's folder Simulation/SO101")
    upstream = mujoco.MjSpec.from_file(str(path))
    mesh_dir = path.parent / (upstream.meshdir or "")
    colours = {m.name: m.rgba for m in upstream.materials}
    for geom in list(spec.geoms):
        if geom.group == 2:
            geom.group = 5
    names = {"moving_jaw_so101_v1": "jaw"}
    for body in upstream.bodies:
        ours = spec.body(names.get(body.name, body.name))
        for geom in body.geoms:
            if ours is None or geom.type != mujoco.mjtGeom.mjGEOM_MESH or geom.classname.name == "collision":
                continue
            if spec.mesh(geom.meshname) is None:
                file = upstream.mesh(geom.meshname).file
                spec.add_mesh(name=geom.meshname, file=str((mesh_dir / file).resolve()))
            ours.add_geom(
                type=mujoco.mjtGeom.mjGEOM_MESH, meshname=geom.meshname, pos=geom.pos, quat=geom.quat, group=2,
                contype=0, conaffinity=0, mass=0, rgba=colours.get(geom.material, geom.rgba),
            )  # fmt: skip


def build_model(task: Task, asset_dir: str | None = None) -> "mujoco.MjModel":
    """Arm, table, cameras, the task's objects at their middle sizes, and the contact sensors that rewards read.

    Raises FileNotFoundError when `asset_dir` has no upstream model.
    """
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("so101.xml")))
    cameras = {camera.name: camera for camera in spec.cameras}
    cameras["wrist"].pos, cameras["wrist"].quat = _wrist_camera()
    for name, eye, target in (
        ("third", (0.6, 0.3, 0.3), (0.3, 0.0, 0.05)),
        ("person", (0.66, -0.46, 0.36), (0.2, 0.0, 0.08)),
    ):
        cameras[name].pos, cameras[name].quat = eye, _look_at(eye, target)
    for name, values in (json.loads(CAMERA_FILE.read_text()) if CAMERA_FILE.exists() else {}).items():
        cameras[name].pos, cameras[name].quat = values["pos"], values["quat_wxyz"]
        cameras[name].fovy = values["fovy_degrees"]
    if asset_dir is not None:
        _add_upstream_meshes(spec, asset_dir)

    def add_object(name: str, shape: str, colour) -> None:
        body = spec.worldbody.add_body(name=name, pos=(*SPAWN_CENTRE, 0.1))
        body.add_freejoint(name=name)
        parts = {"bin": ("floor", "x+", "x-", "y+", "y-")}.get(shape, ("",))
        for part in parts:
            kind = mujoco.mjtGeom.mjGEOM_CYLINDER if shape == "can" else mujoco.mjtGeom.mjGEOM_BOX
            body.add_geom(
                name=name + part, type=kind, size=(0.02, 0.02, 0.02), rgba=(*colour, 1), group=2,
                contype=2, conaffinity=3, condim=4, friction=(0.3, 0.005, 0.0001), priority=1, mass=0.01,
                solref=(0.02, 1), solimp=(0.99, 0.9995, 0.001, 0.5, 2),
            )  # fmt: skip

    found_and_force = sum(1 << int(getattr(mujoco.mjtConDataField, f"mjCONDATA_{k}")) for k in ("FOUND", "FORCE"))

    def add_contact_sensor(name: str, **objects) -> None:
        spec.add_sensor(
            name=name, type=mujoco.mjtSensor.mjSENS_CONTACT,
            intprm=(found_and_force, 3, 1),  # of all matching contacts, summed (3), in the world frame
            **objects,
        )  # fmt: skip

    add_object("item", task.item, RED if task.item == "cube" else BLUE)
    if task.support is not None:
        add_object("support", task.support, WHITE if task.support == "bin" else BLUE)
    body, subtree, geom = (getattr(mujoco.mjtObj, f"mjOBJ_{k}") for k in ("BODY", "XBODY", "GEOM"))
    add_contact_sensor("fixed_item", objtype=body, objname="gripper", reftype=body, refname="item")
    add_contact_sensor("jaw_item", objtype=body, objname="jaw", reftype=body, refname="item")
    add_contact_sensor("robot_table", objtype=subtree, objname="base", reftype=geom, refname="table")
    if task.support is not None:
        add_contact_sensor("robot_support", objtype=subtree, objname="base", reftype=body, refname="support")
    model = spec.compile()
    # The compiler notes that the bin's plates sit at their body's origin, and MuJoCo would then never read the
    # positions that each episode gives them.
    model.geom_sameframe[:] = 0
    return model


# ---------------------------------------------------------------------------------------- physics: two steppers ------
# Fields of the MuJoCo model that differ between worlds: torch views of MuJoCo Warp's arrays, so that drawing and
# stepping see a write at once. The C stepper copies what it needs into its models (and `dof_M0`, which Warp lacks).
FIELDS = (
    "geom_size", "geom_pos", "geom_rgba", "geom_rbound", "geom_aabb", "geom_friction", "body_mass", "body_inertia",
    "body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_gainprm", "actuator_biasprm",
    "cam_pos", "cam_quat", "cam_fovy", "light_ambient", "light_diffuse", "light_dir",
)  # fmt: skip


@wp.kernel
def _select_ctrl(
    substep: int,
    delay: wp.array[int],
    last_target: wp.array2d[float],
    target: wp.array2d[float],
    ctrl: wp.array2d[float],
):
    """The servos' command at a substep: the last target until the world's delay has passed, then the present one."""
    world, joint = wp.tid()
    if substep < delay[world]:
        ctrl[world, joint] = last_target[world, joint]
    else:
        ctrl[world, joint] = target[world, joint]


class _CStepper:
    """MuJoCo's C library on the CPU: one model a world, threads over worlds, state kept in float64."""

    def __init__(self, mjm: "mujoco.MjModel", fields: dict[str, torch.Tensor], threads: int):
        self.n = len(fields["body_mass"])
        self.models = [_copy_model(mjm) for _ in range(self.n)]
        self.datas = [mujoco.MjData(self.models[0]) for _ in range(max(1, min(threads, self.n)))]
        self.pool = mujoco.rollout.Rollout(nthread=len(self.datas) if len(self.datas) > 1 else 0)
        self.nq, self.nv = mjm.nq, mjm.nv
        self.state = np.zeros((self.n, 1 + self.nq + self.nv))  # time, qpos, qvel
        self.out = np.zeros((self.n, SUBSTEPS, self.state.shape[1]))
        self.sensors = np.zeros((self.n, SUBSTEPS, mjm.nsensordata))
        self.seconds = SUBSTEPS * mjm.opt.timestep
        drawn_only = ("cam_", "light_", "geom_rgba")
        self.fields = {name: field.numpy() for name, field in fields.items() if not name.startswith(drawn_only)}
        self.substep = np.arange(SUBSTEPS)[None, :, None]

    def write_models(self, worlds: list[int]) -> None:
        for world in worlds:
            model = self.models[world]
            for name, values in self.fields.items():
                target = getattr(model, name)
                target[...] = values[world].reshape(target.shape)

    def set_state(self, idx, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        rows = idx.numpy() if isinstance(idx, torch.Tensor) else idx
        self.state[rows, 1 : 1 + self.nq] = qpos.numpy()
        self.state[rows, 1 + self.nq :] = qvel.numpy()

    def step(self, old: torch.Tensor, new: torch.Tensor, delay: torch.Tensor):
        """One control step of every world. Returns qpos, qvel, sensordata (float32) and a mask of the sane worlds."""
        late = self.substep < delay.numpy()[:, None, None]
        ctrl = np.where(late, old.numpy()[:, None], new.numpy()[:, None]).astype(np.float64)
        self.state[:, 0] = 0.0
        self.pool.rollout(
            self.models, self.datas, self.state, ctrl, nstep=SUBSTEPS, state=self.out, sensordata=self.sensors,
            skip_checks=True,
        )  # fmt: skip
        self.state[:] = self.out[:, -1]
        # MuJoCo answers a diverging world by resetting it, clock included.
        sane = np.isfinite(self.state).all(1) & (np.abs(self.state[:, 0] - self.seconds) < 1e-6)
        qpos = torch.from_numpy(self.state[:, 1 : 1 + self.nq].astype(np.float32))
        qvel = torch.from_numpy(self.state[:, 1 + self.nq :].astype(np.float32))
        return qpos, qvel, torch.from_numpy(self.sensors[:, -1].astype(np.float32)), torch.from_numpy(sane)

    def state_dict(self) -> dict:
        return {"state": self.state.copy()}

    def load_state_dict(self, saved: dict) -> None:
        self.state[:] = saved["state"]
        self.write_models(range(self.n))

    def close(self) -> None:
        self.pool.close()


def _copy_model(mjm: "mujoco.MjModel") -> "mujoco.MjModel":
    model = copy.copy(mjm)
    # The body tree of the mid-phase is not rebuilt when sizes change; these scenes are too small to need it.
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
    return model


class _WarpStepper:
    """MuJoCo Warp: all worlds on the device, one captured graph a control step."""

    def __init__(self, scene: "_Scene"):
        self.scene, self.n, self.nq, self.nv = scene, scene.n, scene.mjm.nq, scene.mjm.nv
        zeros = lambda dtype, *shape: wp.zeros(shape, dtype=dtype, device=scene.device)  # noqa: E731
        self.old, self.new = zeros(float, self.n, 6), zeros(float, self.n, 6)
        self.delay = zeros(int, self.n)
        self.t_old, self.t_new, self.t_delay = (wp.to_torch(a) for a in (self.old, self.new, self.delay))
        data = scene.d
        self.qpos, self.qvel, self.sensordata = (wp.to_torch(a) for a in (data.qpos, data.qvel, data.sensordata))
        self.warmstart = wp.to_torch(data.qacc_warmstart)
        self.graph = None

    def write_models(self, worlds: list[int]) -> None:
        """Nothing to do: the scene's fields are the model's own arrays."""

    def set_state(self, idx: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        self.qpos[idx], self.qvel[idx], self.warmstart[idx] = qpos, qvel, 0.0

    def _substeps(self) -> None:
        for substep in range(SUBSTEPS):
            inputs = [substep, self.delay, self.old, self.new]
            wp.launch(_select_ctrl, dim=(self.n, 6), inputs=inputs, outputs=[self.scene.d.ctrl])
            mjw.step(self.scene.m, self.scene.d)

    def step(self, old: torch.Tensor, new: torch.Tensor, delay: torch.Tensor):
        """See `_CStepper.step`."""
        self.t_old.copy_(old), self.t_new.copy_(new), self.t_delay.copy_(delay)
        self.graph = self.scene.run(self._substeps, self.graph)
        sane = torch.isfinite(self.qpos).all(1) & torch.isfinite(self.qvel).all(1) & (self.qvel.abs() < 1e3).all(1)
        return self.qpos.clone(), self.qvel.clone(), self.sensordata.clone(), sane

    def state_dict(self) -> dict:
        return {"qpos": self.qpos.clone(), "qvel": self.qvel.clone(), "warmstart": self.warmstart.clone()}

    def load_state_dict(self, saved: dict) -> None:
        self.qpos.copy_(saved["qpos"]), self.qvel.copy_(saved["qvel"]), self.warmstart.copy_(saved["warmstart"])

    def close(self) -> None:
        self.graph = None


# ------------------------------------------------------------------------------------------------------- pictures ----
class _Scene:
    """`n` worlds of one model in MuJoCo Warp: kinematics, camera poses and the batch renderer."""

    def __init__(self, mjm, n: int, device: str, cameras, size: int, samples: int, table: bool = False, fields=FIELDS):
        self.mjm, self.n, self.device, self.size, self.cameras = mjm, n, device, size, cameras
        self.per_axis = math.isqrt(samples)
        if self.per_axis**2 != samples or samples < 1:
            raise ValueError(f"--samples-per-pixel must be a square (1, 4, 9, 16, ...), not {samples}")
        # The renderer's own samples_per_pixel is quicker (see benchmarks/throughput.py), but it fixes the rays once for
        # all worlds, which rules out a field of view per world. So: a finer picture, averaged over blocks.
        fine = size * self.per_axis
        with wp.ScopedDevice(device):
            self.m = mjw.put_model(mjm, batch_sizes={name: n for name in fields})
            self.d = mjw.make_data(mjm, nworld=n, nconmax=48, njmax=240)
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
        packed = wp.to_torch(self.rc.rgb_data).view(torch.uint8)  # (n, cameras * fine^2 * 4) bytes b, g, r, a
        self.pixels = packed.view(n, len(cameras), fine, fine, 4)
        self.graphs = {}

    def run(self, launches, graph=None):
        """Runs Warp launches; returns what to pass as `graph` at the next call.

        The first call (None) launches plainly, which loads the kernels; the second (False) captures a graph; from then
        on the graph is replayed, on torch's current stream where the device is a GPU.
        """
        stream = wp.stream_from_torch(torch.cuda.current_stream(self.device)) if "cuda" in self.device else None
        with wp.ScopedDevice(self.device), wp.ScopedStream(stream, sync_enter=False):
            if graph is None:
                launches()
                return False
            if graph is False:
                side = wp.Stream(self.device) if stream else None  # CUDA's default stream cannot be captured
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
        """Pictures of the present poses: uint8 (n, size, size, 3 * cameras)."""
        self.graphs["r"] = self.run(self._render, self.graphs.get("r"))
        rgb, k = self.pixels[..., :3].flip(-1), self.per_axis  # stored as b, g, r
        if k > 1:  # the mean of k x k pixels, rounded; adding slices is several times faster than a reduction
            parts = [rgb[:, :, i::k, j::k].to(torch.int32) for i in range(k) for j in range(k)]
            rgb = ((sum(parts) + k * k // 2) // (k * k)).to(torch.uint8)
        return rgb.permute(0, 2, 3, 1, 4).reshape(self.n, self.size, self.size, -1).contiguous()


# ---------------------------------------------------------------------------------------------------- environment ----
def _uniform(generator, n: int, low_high, *shape) -> torch.Tensor:
    low, high = low_high
    return low + (high - low) * torch.rand(n, *shape, generator=generator, device=generator.device)


def _quat_to_mat(q: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4) in the order w, x, y, z."""
    w, x, y, z = q.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)


def _quat_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack((
        aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw,
    ), -1)  # fmt: skip


class SO101Env:
    """A batch of SO-101 worlds; the contract that every environment module here shares (see `envs/__init__.py`).

    Observations: `rgb` uint8 (N, render_size, render_size, 3 * cameras), robot and objects on black; `state` float32
    (N, 12): six joint positions (with noise under randomisation) and the six controller targets, radians; with
    `asymmetric` also `privileged` float32 (N, 47) for the critic.
    Actions: (N, 6) in [-1, 1], added to the controller targets times `ACTION_SCALE`.
    With `end_on_success` an episode also terminates at its first success.
    """

    action_dim, state_dim, max_episode_steps, control_hz = 6, 12, HORIZON, CONTROL_HZ

    def __init__(
        self, env_id: str, num_envs: int, device: str | torch.device = "cpu", *, seed: int = 0, render_size: int = 16,
        samples_per_pixel: int = 4, cameras: tuple[str, ...] = ("wrist",), domain_randomization: bool = True,
        randomization: Randomization | None = None, asymmetric: bool = False, stagger: bool = True,
        engine: str = "auto", asset_dir: str | None = None, threads: int | None = None, pictures: bool = True,
        end_on_success: bool = False,
    ):  # fmt: skip
        if env_id not in TASKS:
            raise ValueError(f"unknown SO-101 task {env_id!r}; known: {', '.join(TASKS)}")
        if num_envs < 1 or render_size < 4:
            raise ValueError(f"num_envs must be at least 1, render_size at least 4; got {num_envs} and {render_size}")
        if not cameras or set(cameras) - {"wrist", "third"}:
            raise ValueError(f"cameras must be one or more of 'wrist', 'third', not {cameras!r}")
        self.env_id, self.task, self.num_envs, self.device = env_id, TASKS[env_id], num_envs, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if engine == "auto":
            engine = "warp" if self.device.type == "cuda" else "mujoco"
        if engine not in ("warp", "mujoco") or (engine == "mujoco" and self.device.type != "cpu"):
            raise ValueError(f"engine {engine!r} cannot run on {self.device}: 'mujoco' is for the CPU, 'warp' for both")
        self.engine, self.cameras, self.asymmetric, self.stagger = engine, tuple(cameras), asymmetric, stagger
        self.pictures = pictures  # False: no rgb key; for tests, scripted controllers and policies of the true state
        self.end_on_success = end_on_success  # True: success terminates an episode, as sparse rewards want it
        dr = randomization or Randomization()
        self.dr = dr if domain_randomization else dr.off()
        self.render_size, self.samples_per_pixel = render_size, samples_per_pixel
        self.image_shape = (render_size, render_size, 3 * len(self.cameras))
        self.privileged_dim = 47 if asymmetric else 0

        self.mjm = build_model(self.task, asset_dir)
        warp_device = str(self.device)
        self.scene = _Scene(self.mjm, num_envs, warp_device, self.cameras, render_size, samples_per_pixel)
        m0 = torch.tensor(self.mjm.dof_M0, dtype=torch.float32, device=self.device).repeat(num_envs, 1)
        self.fields = {**self.scene.fields, "dof_M0": m0}
        self.nominal = {name: field[0].clone() for name, field in self.fields.items()}
        threads = threads or os.cpu_count() or 1
        self.physics = _WarpStepper(self.scene) if engine == "warp" else _CStepper(self.mjm, self.fields, threads)
        # Staggered worlds reset a few at a time: their first frames come from a small second scene.
        self.resets_at_once = -(-num_envs // HORIZON)
        self.small = None
        if stagger and pictures and 2 * self.resets_at_once <= num_envs:
            self.small = _Scene(
                self.mjm, self.resets_at_once, warp_device, self.cameras, render_size, samples_per_pixel
            )
        self._human = {}

        dev, m = self.device, self.mjm
        self._id = {"gripper": m.body("gripper").id, "item": m.geom("item").id}
        self._tips = [m.site("fixed_tip").id, m.site("moving_tip").id]
        free = ("item", "support") if self.task.support else ("item",)
        self._q = {name: m.joint(name).qposadr[0] for name in free}
        self._v = {name: m.joint(name).dofadr[0] for name in self._q}
        self._sensor = {m.sensor(i).name: int(m.sensor(i).adr[0]) for i in range(m.nsensor)}
        self.joint_low = torch.tensor(m.jnt_range[:6, 0], dtype=torch.float32, device=dev)
        self.joint_high = torch.tensor(m.jnt_range[:6, 1], dtype=torch.float32, device=dev)
        self.action_scale = torch.tensor(ACTION_SCALE, device=dev)
        self.start_pose = torch.tensor(START_POSE, device=dev)
        self.target_low, self.target_high = self.joint_low + JOINT_MARGIN, self.joint_high - JOINT_MARGIN
        self.tracking_error = torch.tensor(TRACKING_ERROR, device=dev)
        period = 1 / CONTROL_HZ
        self.most_move = torch.tensor([v * period for v in VELOCITY_LIMIT], device=dev)  # radians a control step
        self.most_gain = torch.tensor([a * period**2 for a in ACCELERATION_LIMIT], device=dev)  # more than the last one
        n = num_envs
        self.generator = torch.Generator(device=dev)
        self.target, self.old_target = (torch.zeros(n, 6, device=dev) for _ in range(2))
        self.delay = torch.zeros(n, dtype=torch.int32, device=dev)
        self.qpos, self.qvel = torch.zeros(n, m.nq, device=dev), torch.zeros(n, m.nv, device=dev)
        self.first_qpos = torch.zeros(n, m.nq, device=dev)
        self.contact = torch.zeros(n, m.nsensordata, device=dev)
        self.item_half = torch.zeros(n, 3, device=dev)  # half extents of the item: x, y (or radius twice), z
        self.support_half = torch.zeros(n, 3, device=dev)  # ... of the support; bin: inner x, inner y, wall height
        self.support_z = torch.zeros(n, device=dev)  # height of the support's frame over its underside
        self.friction, self.mass = torch.zeros(n, device=dev), torch.zeros(n, device=dev)
        self.returns = torch.zeros(n, device=dev)
        self.success_once = torch.zeros(n, dtype=torch.bool, device=dev)
        self.nan_resets = torch.zeros((), dtype=torch.int64, device=dev)
        self.clock = np.zeros(n, dtype=np.int64)  # steps taken in the running episode; on the host, so nothing waits
        self.started = np.zeros(n, dtype=np.int64)  # the clock value at which the running episode began
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
        """Starts a new episode in every world, all clocks at 0. With a seed, always the same episodes."""
        if seed is not None:
            self.generator.manual_seed(seed)
        everything = torch.arange(self.num_envs, device=self.device)
        self._begin(everything, list(range(self.num_envs)))
        self.clock[:] = np.arange(self.num_envs) * HORIZON // self.num_envs if _stagger else 0
        self.started[:] = self.clock
        self._kinematics()
        self.obs = self._observe(self._pictures())
        return self.obs

    def _begin(self, idx: torch.Tensor, worlds: list[int]) -> None:
        """Draws and writes a new episode for the worlds `idx` (M,) (`worlds`: the same numbers on the host)."""
        dr, gen, dev, m = self.dr, self.generator, self.device, len(worlds)
        rand = lambda bounds, *shape: _uniform(gen, m, bounds, *shape)  # noqa: E731
        sym = lambda width, *shape: _uniform(gen, m, (-width, width), *shape)  # noqa: E731
        f = {name: value.expand(m, *value.shape).clone() for name, value in self.nominal.items()}

        # Objects: sizes, mass, friction.
        friction, factor = rand(dr.friction), rand(dr.mass_factor)
        half = {"cube": rand(dr.cube_size, 1).expand(m, 3) / 2}
        radius, height = rand(dr.can_diameter) / 2, rand(dr.can_height) / 2
        half["can"] = torch.stack((radius, radius, height), 1)
        half["large_cube"] = rand(dr.large_cube_size, 1).expand(m, 3) / 2
        half["bin"] = torch.stack((rand(dr.bin_width) / 2, rand(dr.bin_length) / 2, rand(dr.bin_wall)), 1)
        mass, item_z = self._write_object(f, "item", self.task.item, half[self.task.item], factor, friction)
        self.item_half[idx] = half[self.task.item]
        if self.task.support:
            below = half[self.task.support]
            _, support_z = self._write_object(f, "support", self.task.support, below, factor, friction)
            self.support_half[idx], self.support_z[idx] = below, support_z
        self.friction[idx], self.mass[idx] = friction, mass
        for name in ("fixed_finger", "moving_finger"):
            f["geom_friction"][:, self.mjm.geom(name).id, 0] = (FINGER_FRICTION + friction) / 2

        # Servos and delay.
        gain = torch.cat((rand(dr.arm_stiffness, 5), rand(dr.gripper_stiffness, 1)), 1)
        f["actuator_gainprm"][:, :, 0] *= gain
        f["actuator_biasprm"][:, :, 1] *= gain
        f["actuator_biasprm"][:, 5, 2] *= rand(dr.gripper_damping)
        self.delay[idx] = (rand(dr.action_delay) / self.mjm.opt.timestep).round().int()

        # Lights, colours, cameras.
        f["light_ambient"][:, 0] = rand(dr.ambient, 3)
        f["light_diffuse"][:] = rand(dr.diffuse, 2, 1)
        tilted = f["light_dir"] + sym(dr.light_tilt, 2, 3)
        f["light_dir"][:] = tilted / tilted.norm(dim=-1, keepdim=True)
        robot, item, support = sym(dr.colour, 2, 3), sym(dr.colour, 3), sym(dr.colour, 3)
        rgba = f["geom_rgba"]
        rgba[..., :3] += torch.where((rgba[..., :1] < 0.5), robot[:, :1], robot[:, 1:])
        rgba[:, self._id["item"], :3] = self.nominal["geom_rgba"][self._id["item"], :3] + item
        if self.task.support:
            of_support = [g for g in range(self.mjm.ngeom) if self.mjm.geom(g).name.startswith("support")]
            rgba[:, of_support, :3] = self.nominal["geom_rgba"][of_support, :3] + support[:, None]
        rgba.clamp_(0.0, 1.0)
        for name, shift, turn, fovy in (
            ("wrist", dr.camera_position, dr.camera_rotation, dr.camera_fovy),
            ("third", dr.third_position, dr.third_rotation, dr.third_fovy),
        ):
            cam = self.mjm.camera(name).id
            f["cam_pos"][:, cam] += sym(shift, 3)
            small = torch.cat((torch.ones(m, 1, device=dev), sym(turn, 3) / 2), 1)
            turned = _quat_mul(f["cam_quat"][:, cam], small / small.norm(dim=1, keepdim=True))
            f["cam_quat"][:, cam] = turned
            f["cam_fovy"][:, cam] += sym(fovy)
        for name, value in f.items():
            self.fields[name][idx] = value
        self.physics.write_models(worlds)

        # Poses. The support stands anywhere in the region; the item where it does not touch it.
        qpos = torch.zeros(m, self.mjm.nq, device=dev)
        qpos[:, :6] = self.start_pose + 0.02 * torch.randn(m, 6, generator=gen, device=dev)
        qpos[:, :6] = torch.clamp(qpos[:, :6], self.joint_low, self.joint_high)
        centre = torch.tensor(SPAWN_CENTRE, device=dev)
        places = centre + _uniform(gen, m, (-SPAWN_HALF, SPAWN_HALF), RANDOM_TRIES, 2)
        yaws = _uniform(gen, m, (-math.pi, math.pi), 2)
        item_xy = places[:, 0]
        if self.task.support:
            support_xy = centre + _uniform(gen, m, (-SPAWN_HALF, SPAWN_HALF), 2)
            own, other = half[self.task.item], half[self.task.support]
            reach = own[:, :2].norm(dim=1) if self.task.item != "can" else own[:, 0]
            around = other[:, 0] if self.task.support == "can" else other[:, :2].norm(dim=1)
            gap = (places - support_xy[:, None]).norm(dim=-1) - (reach + around + 0.01)[:, None]
            first = torch.where(gap >= 0, torch.arange(RANDOM_TRIES, 0, -1, device=dev), gap.clamp(-0.9, 0)).argmax(1)
            item_xy = places.gather(1, first[:, None, None].expand(m, 1, 2)).squeeze(1)
            self._write_pose(qpos, "support", support_xy, support_z, yaws[:, 1])
        self._write_pose(qpos, "item", item_xy, item_z, yaws[:, 0])
        qvel = torch.zeros(m, self.mjm.nv, device=dev)
        self.physics.set_state(idx, qpos, qvel)
        self.qpos[idx], self.qvel[idx], self.contact[idx] = qpos, qvel, 0.0
        self.target[idx] = self.old_target[idx] = qpos[:, :6]
        self.first_qpos[idx] = qpos
        self.returns[idx], self.success_once[idx] = 0.0, False

    def _write_pose(self, qpos, name, xy, z, yaw) -> None:
        adr = self._q[name]
        qpos[:, adr : adr + 2], qpos[:, adr + 2] = xy, z
        qpos[:, adr + 3], qpos[:, adr + 6] = torch.cos(yaw / 2), torch.sin(yaw / 2)

    def _write_object(self, f, name, shape, half, factor, friction):
        """Writes sizes (M, 3), mass and friction of an object into the field rows `f`.

        Returns its mass (M,) in kg and the height (M,) of its frame over its underside in metres.

        Every object's frame sits at its centre of mass (a bin is five uniform plates).
        """
        body, dof = self.mjm.body(name).id, self._v[name]
        if shape == "bin":
            x, y, h = half.unbind(1)
            t = torch.full_like(x, BIN_THICKNESS / 2)
            sizes = torch.stack((
                torch.stack((x + t, y + t, t), 1), torch.stack((t, y + t, h / 2), 1), torch.stack((t, y + t, h / 2), 1),
                torch.stack((x + t, t, h / 2), 1), torch.stack((x + t, t, h / 2), 1),
            ), 1)  # fmt: skip
            o = torch.zeros_like(x)
            places = torch.stack((
                torch.stack((o, o, t), 1), torch.stack((x, o, h / 2), 1), torch.stack((-x, o, h / 2), 1),
                torch.stack((o, y, h / 2), 1), torch.stack((o, -y, h / 2), 1),
            ), 1)  # fmt: skip
            geoms = [self.mjm.geom(name + part).id for part in ("floor", "x+", "x-", "y+", "y-")]
        else:
            sizes, geoms = half[:, None], [self.mjm.geom(name).id]
            places = torch.zeros_like(sizes)
        extents = sizes
        if shape == "can":  # MuJoCo's cylinder: size = (radius, half height, unused)
            sizes = torch.stack((half[:, 0], half[:, 2], torch.zeros_like(half[:, 0])), 1)[:, None]
        volume = (math.pi * 2 if shape == "can" else 8) * extents.prod(-1)  # cylinder: pi r^2 * 2 (h/2)
        masses = DENSITY * volume * factor[:, None]
        square = extents**2
        if shape == "can":
            radial = (3 * square[..., 0] + 4 * square[..., 2]) / 12
            own = torch.stack((radial, radial, square[..., 0] / 2), -1)
        else:
            own = (square.sum(-1, keepdim=True) - square) / 3
        mass = masses.sum(1)
        com = (masses[..., None] * places).sum(1, keepdim=True) / mass[:, None, None]
        places = places - com
        inertia = (masses[..., None] * (own + (places**2).sum(-1, keepdim=True) - places**2)).sum(1)
        f["geom_size"][:, geoms], f["geom_pos"][:, geoms] = sizes, places
        f["geom_rbound"][:, geoms] = torch.where(
            torch.tensor(shape == "can", device=self.device), sizes[..., :2].norm(dim=-1), sizes.norm(dim=-1)
        )
        f["geom_aabb"][:, geoms] = torch.stack((torch.zeros_like(extents), extents), 2)
        f["geom_friction"][:, geoms, 0] = friction[:, None]
        f["body_mass"][:, body] = f["body_subtreemass"][:, body] = mass
        f["body_inertia"][:, body] = inertia
        turning = (1 / inertia).mean(1)
        f["body_invweight0"][:, body, 0], f["body_invweight0"][:, body, 1] = 1 / mass, turning
        f["dof_invweight0"][:, dof : dof + 3] = 1 / mass[:, None]
        f["dof_invweight0"][:, dof + 3 : dof + 6] = turning[:, None]
        f["dof_M0"][:, dof : dof + 6] = torch.cat((mass[:, None].expand(-1, 3), inertia), 1)
        return mass, com[:, 0, 2] if shape == "bin" else half[:, 2]

    # ---- one control step --------------------------------------------------------------------------------------------
    def step(self, actions: torch.Tensor):
        """Actions (N, 6) in [-1, 1]. Returns obs, rewards, terminations, truncations, info; see `envs/__init__.py`."""
        actions = actions.to(self.device, torch.float32).clamp(-1.0, 1.0).nan_to_num(0.0)
        following = self._next_target(actions)
        self.old_target.copy_(self.target)
        self.target.copy_(following)
        self.qpos, self.qvel, self.contact, sane = self.physics.step(self.old_target, self.target, self.delay)
        bad = ~sane
        self._restart_diverged(bad)
        self._kinematics()
        rewards, success = self.reward()
        rewards, success = rewards.masked_fill(bad, 0.0), success & sane

        self.clock += 1
        out, terminations = self.clock == HORIZON, torch.zeros_like(bad)
        if self.end_on_success:
            terminations, out = success, out | success.cpu().numpy()
        worlds = np.flatnonzero(out).tolist()
        truncations = torch.from_numpy(self.clock == HORIZON).to(self.device, non_blocking=True) | bad
        truncations &= ~terminations
        length = torch.from_numpy(self.clock - self.started).to(self.device, non_blocking=True)
        self.returns += rewards
        self.success_once |= success
        episode = {
            "return": self.returns.clone(), "length": length,
            "success_once": self.success_once.clone(), "success_at_end": success,
        }  # fmt: skip
        before = self._observe(self._pictures())
        final_obs = before
        if self.device.type == "cuda" or bad.any():  # a diverged world has no next state: keep its last observation
            final_obs = {k: torch.where(_like(bad, v), self.obs[k], v) for k, v in before.items()}
        self.returns.masked_fill_(bad, 0.0)
        self.success_once &= sane
        self.obs = self._restart(worlds, before) if worlds else before
        info = {"final_obs": final_obs, "success": success, "episode": episode}
        return self.obs, rewards, terminations, truncations, info

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
        """Puts worlds whose physics is no longer finite back to their episode's first pose; counts them."""
        if self.device.type == "cpu" and not bad.any():
            return
        self.nan_resets += bad.sum()
        mask = bad[:, None]
        self.qpos, self.qvel = torch.where(mask, self.first_qpos, self.qpos), self.qvel.masked_fill(mask, 0.0)
        self.contact = self.contact.masked_fill(mask, 0.0)
        for target in (self.target, self.old_target):
            target.copy_(torch.where(mask, self.first_qpos[:, :6], target))
        self.physics.set_state(slice(None), self.qpos, self.qvel)

    def _restart(self, worlds: list[int], obs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Begins the next episode of `worlds` and returns `obs` with their first observations in place."""
        idx = torch.tensor(worlds, device=self.device)
        self._begin(idx, worlds)
        self.clock[worlds] = self.started[worlds] = 0
        scene, rows = (self.small, slice(0, len(worlds))) if self.small is not None else (self.scene, idx)
        if scene is self.small and len(worlds) > scene.n:
            scene, rows = self.scene, idx
        if scene is self.small:
            for name, field in scene.fields.items():
                field[rows] = self.fields[name][idx]
            scene.qpos[rows] = self.qpos[idx]
        else:
            scene.qpos.copy_(self.qpos)
        scene.kinematics()
        rgb = scene.draw()[rows] if self.pictures else None
        first = self._observe(rgb, idx, scene.site_xpos[rows])
        return {key: value.index_copy(0, idx, first[key]) for key, value in obs.items()}

    def _kinematics(self) -> None:
        self.scene.qpos.copy_(self.qpos)
        self.scene.kinematics()

    def _pictures(self) -> torch.Tensor | None:
        return self.scene.draw() if self.pictures else None

    def _observe(self, rgb, idx=slice(None), site_xpos=None) -> dict[str, torch.Tensor]:
        """Observation of the worlds `idx`, given their pictures (and site positions, if not the scene's own)."""
        joints, target = self.qpos[idx, :6], self.target[idx]
        if self.dr.joint_noise > 0:
            noise = torch.randn(joints.shape, generator=self.generator, device=self.device)
            joints = joints + self.dr.joint_noise * noise
        obs = {"state": torch.cat((joints, target), 1)}
        if rgb is not None:
            obs["rgb"] = rgb
        if self.asymmetric:
            obs["privileged"] = self._privileged(idx, self.scene.site_xpos if site_xpos is None else site_xpos)
        return obs

    def _privileged(self, idx, site_xpos) -> torch.Tensor:
        """True state for a critic, (n, 47).

        Joints 6, joint speeds 6, tool 3, item pose 7 and velocity 6, support pose 7, half sizes 3 + 3, squashed contact
        forces (fixed finger, jaw, table, support) 4, friction 1, mass in units of 10 g 1.
        """
        qpos, qvel, contact = self.qpos[idx], self.qvel[idx], self.contact[idx]
        n, item, vel = len(qpos), self._q["item"], self._v["item"]
        support = qpos[:, self._q["support"] :][:, :7] if self.task.support else qpos.new_zeros(n, 7)
        forces = [self._force(name, contact).tanh() for name in ("fixed_item", "jaw_item", "robot_table")]
        on_support = self._force("robot_support", contact).tanh() if self.task.support else torch.zeros_like(forces[0])
        forces.append(on_support)
        return torch.cat((
            qpos[:, :6], qvel[:, :6], site_xpos[:, self._tips].mean(1), qpos[:, item : item + 7],
            qvel[:, vel : vel + 6], support, self.item_half[idx], self.support_half[idx], torch.stack(forces, 1),
            self.friction[idx, None], 100 * self.mass[idx, None],
        ), 1)  # fmt: skip

    # ---- rewards; what differs from the published ones is numbered in the docstring of the module --------------------
    @property
    def tcp(self) -> torch.Tensor:
        """Tool centre point (N, 3): the middle of the two finger tips, metres."""
        return self.scene.site_xpos[:, self._tips].mean(1)

    def pose(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Position (N, 3) and rotation matrix (N, 3, 3) of "item" or "support"."""
        adr = self._q[name]
        return self.qpos[:, adr : adr + 3], _quat_to_mat(self.qpos[:, adr + 3 : adr + 7])

    def _force(self, sensor: str, contact: torch.Tensor | None = None) -> torch.Tensor:
        """Size (N,) of the net contact force of a sensor, newtons."""
        adr = self._sensor[sensor] + 1
        return (self.contact if contact is None else contact)[:, adr : adr + 3].norm(dim=1)

    def facts(self) -> dict[str, torch.Tensor]:
        """What rewards, success tests and scripted controllers ask about the present state; each (N,) or (N, 3)."""
        fixed, jaw = self._force("fixed_item"), self._force("jaw_item")
        # Squeezed from both sides: the two forces on the item point against each other.
        pushes = [self.contact[:, self._sensor[name] + 1 :][:, :3] for name in ("fixed_item", "jaw_item")]
        opposed = (pushes[0] * pushes[1]).sum(1) <= 0.35 * fixed * jaw
        item, turn = self.pose("item")
        low, high = self.joint_low[5], self.joint_high[5]
        facts = {
            "tcp": self.tcp, "item": item, "item_up": self._half_height(turn),
            "touching": (fixed >= 0.01) | (jaw >= 0.01), "grasped": (fixed >= 0.5) & (jaw >= 0.5) & opposed,
            "table": self._force("robot_table") >= 0.01, "static": (self.qvel[:, :5].abs() <= 0.15).all(1),
            "openness": ((self.qpos[:, 5] - low) / (high - low)).clamp(0, 1),
        }  # fmt: skip
        facts["lifted"] = item[:, 2] >= facts["item_up"] + 0.001
        if self.task.support:
            facts["support_touch"] = self._force("robot_support") >= 0.01
        return facts

    def _half_height(self, turn: torch.Tensor) -> torch.Tensor:
        """Height (N,) of the item's centre when it rests on something in its present orientation `turn` (N, 3, 3)."""
        up = turn[:, 2].abs()  # |world z| in the item's frame
        if self.task.item == "cube":
            return (up * self.item_half).sum(1)
        return up[:, 2] * self.item_half[:, 2] + (1 - up[:, 2] ** 2).clamp_min(0).sqrt() * self.item_half[:, 0]

    def reward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward (N,), divided by the task's best, and success (N,) of the present state."""
        f = self.facts()
        return getattr(self, f"_reward_{self.task.verb}")(f)

    def _reward_reach(self, f):
        above = f["item"] + torch.stack((*[torch.zeros_like(f["item_up"])] * 2, f["item_up"] + 0.02), 1)
        distance = (f["tcp"] - above).norm(dim=1)
        closed = 1 - f["openness"]
        success = (distance <= 0.02) & f["static"] & (f["openness"] < 0.1)
        reward = (1 - torch.tanh(5 * distance)) + closed + (distance <= 0.02).float()
        reward = torch.where(success, 4.0, reward)
        return (reward - 3.0 * f["table"] - 1.0 * f["touching"]) / 4.0, success

    def _reward_lift(self, f):
        distance = (f["tcp"] - f["item"]).norm(dim=1)
        to_rest = (self.target[:, :5] - self.start_pose[:5]).norm(dim=1)
        grasped = f["grasped"].float()
        reward = (1 - torch.tanh(5 * distance)) + grasped + grasped * torch.exp(-2 * to_rest)
        success = f["lifted"] & f["grasped"] & (to_rest < 0.2)
        return (reward - 3.0 * f["table"] - 1.0 * ~f["lifted"]) / 3.0, success

    def _progress(self, f, goal, near, clearance):
        """Common shape of Place and Stack (N,): how near the item is to its goal, first over it, then down on it."""
        height = torch.where(near, goal[:, 2], goal[:, 2] + clearance)
        over = torch.cat((goal[:, :2], height[:, None]), 1)
        near_in_space = 1 - torch.tanh(5 * (over - f["item"]).norm(dim=1))
        return near_in_space + 1 - torch.tanh(10 * (height - f["item"][:, 2]).abs())

    def _reward_place(self, f):
        bin_xyz, turn = self.pose("support")
        local = torch.einsum("nij,ni->nj", turn, f["item"] - bin_xyz)  # item in the bin's frame
        floor = BIN_THICKNESS - self.support_z
        inside = (local[:, :2].abs() < self.support_half[:, :2]).all(1)
        resting = (local[:, 2] - floor - f["item_up"]).abs() < 0.008
        goal = bin_xyz + turn[:, :, 2] * (floor + f["item_up"])[:, None]
        near = (f["item"] - bin_xyz)[:, :2].norm(dim=1) <= self.support_half[:, :2].norm(dim=1)
        progress = self._progress(f, goal, near, self.support_half[:, 2] + 0.03)
        reach = 2 * (1 - torch.tanh(5 * (f["tcp"] - f["item"]).norm(dim=1)))
        calm = 1 - torch.tanh(10 * self.qvel[:, :5].norm(dim=1))
        reward = torch.where(f["grasped"], 3 + progress, reach)
        letting_go = (~f["touching"]).float() + f["openness"] + calm
        reward = torch.where(inside & f["lifted"], 4 + progress + letting_go, reward)
        success = inside & resting & ~f["touching"] & ~f["support_touch"] & f["static"]
        reward = torch.where(success, 10.0, reward)
        low = ~f["lifted"] & ~inside
        return (reward - 6.0 * f["table"] - 3.0 * f["support_touch"] - 1.0 * low) / 10.0, success

    def _reward_stack(self, f):
        below, _ = self.pose("support")
        goal = below.clone()
        goal[:, 2] += self.support_half[:, 2] + f["item_up"]
        offset = f["item"] - goal
        flat = offset[:, :2].norm(dim=1)
        on = (flat <= 0.02) & (offset[:, 2].abs() <= 0.01)
        still = self.qvel[:, self._v["item"] : self._v["item"] + 3].norm(dim=1) <= 0.02
        progress = self._progress(f, goal, flat <= 0.04, 0.03)
        reach = 2 * (1 - torch.tanh(5 * (f["tcp"] - f["item"]).norm(dim=1)))
        reward = torch.where(f["grasped"], 3 + progress, reach)
        reward = torch.where(on & f["touching"], 4 + progress + f["openness"], reward)
        reward = torch.where(on & ~f["touching"], 7 + 0.5 * (still.float() + f["static"].float()), reward)
        success = on & still & ~f["touching"] & f["static"]
        reward = torch.where(success, 9.0, reward)
        return (reward - 6.0 * f["table"] - 1.0 * ~f["lifted"]) / 9.0, success

    # ---- for people, and for resuming --------------------------------------------------------------------------------
    def render(self, worlds=(0,), size: int = 256, camera: str = "person") -> np.ndarray:
        """Pictures for people, uint8 (len(worlds), size, size, 3), with table, shadows and 2 x 2 samples a pixel.

        `camera` is "person", "third" or "wrist"; nothing of the environment's state changes.
        """
        worlds = list(worlds)
        key = (len(worlds), size, camera)
        if key not in self._human:
            self._human[key] = _Scene(self.mjm, len(worlds), str(self.device), (camera,), size, 4, table=True)
        scene = self._human[key]
        idx = torch.tensor(worlds, device=self.device)
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
        """Everything that the future of every world depends on; see `load_state_dict`."""
        return {
            "env_id": self.env_id, "num_envs": self.num_envs, "engine": self.engine,
            "physics": self.physics.state_dict(), "generator": self.generator.get_state(),
            "clock": self.clock.copy(), "started": self.started.copy(),
            "tensors": {name: getattr(self, name).clone() for name in self._TENSORS},
            "fields": {name: field.clone() for name, field in self.fields.items()},
            "obs": {name: value.clone() for name, value in self.obs.items()},
        }  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        """Continues where `state_dict` was taken, bit for bit on a CPU. Raises ValueError on another set-up."""
        for name in ("env_id", "num_envs", "engine"):
            if saved[name] != getattr(self, name):
                raise ValueError(f"saved environment has {name} {saved[name]!r}, this one has {getattr(self, name)!r}")
        for name, value in saved["fields"].items():
            self.fields[name].copy_(value)
        for name, value in saved["tensors"].items():
            getattr(self, name).copy_(value)
        self.physics.load_state_dict(saved["physics"])
        self.generator.set_state(saved["generator"].cpu())
        self.clock[:], self.started[:] = saved["clock"], saved["started"]
        self.obs = {name: value.to(self.device) for name, value in saved["obs"].items()}

    def close(self) -> None:
        """Stops the simulation's threads."""
        self.physics.close()


def _like(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (value.dim() - 1))


def make(env_id: str, num_envs: int, device: str | torch.device = "cpu", **options) -> SO101Env:
    """The SO-101 environment `env_id` with `num_envs` worlds on `device`; options as in `SO101Env`.

    Raises ValueError for an unknown id or an impossible option, in one line that says what would do.
    """
    return SO101Env(env_id, num_envs, device, **options)
