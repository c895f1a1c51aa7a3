"""The Unitree Go1 in JAX: walking on command, one world as a pure function, thousands by `jax.vmap`.

Tasks `Go1JoystickFlat` and `Go1JoystickRough` follow MuJoCo Playground's Go1 joystick task (arXiv 2502.08844): timing,
gains, observations, noise, commands, all sixteen reward terms and randomisation have its numbers. `Go1Stand` is a small
task of ours: stand up from a drop and hold the trunk at a commanded height, roll and pitch.

    env = Go1Env("Go1JoystickFlat", EnvConfig(), backend="mjx-jax")
    state = env.reset_batch(jax.random.split(jax.random.key(0), 64))      # State: a pytree, leading axis N
    state = env.step_batch(state, actions)                                # actions (N, 12) in [-1, 1]
    state.obs["state"], state.reward, state.terminated, state.truncated, state.final_obs["privileged_state"], ...

Three back ends behind the same reward, observation and reset functions:
    mjx-jax   MuJoCo XLA: CPU, GPU, TPU. `env.reset`, `env.step` are pure, of one world: jit, vmap and scan them
    mjx-warp  the same through MuJoCo Warp: made for NVIDIA GPUs, on a CPU for tests only
    mujoco-c  the C library in threads between two jitted functions; `step_batch` only. The fastest on a CPU, with a
              converged solver. What evaluation uses

Differences from Playground's task, each for a reason:
 1. The state that is carried is slim: positions, velocities, the solver's warm start and the task's numbers. The next
    episode is drawn anew, at no cost, whenever one ends. (Playground's training wrapper restores each world's first
    state; commands, last action, air time and swing height survive the fall.)
 2. The observation shows the action just taken and the command that the next reward is about (there: the action before
    it, and for one step the old command), at an episode's first step too.
 3. A fall and a time-out are told apart; the observation before the reset is kept in `final_obs`.
 4. A world whose physics diverges is restarted alone, as a time-out, without reward, and counted in metrics["nan"].
 5. Pushes are drawn anew each time, the wait included.
 6. The rough terrain is ours (value noise, 5 cm high); to leave it is a time-out. There one walks off its edge.
 7. The first observation of an episode is computed in closed form; its accelerometer reads as at rest, torques are 0.
Angles are radians, lengths metres, forces newtons, times seconds; x forward, y left, z up; legs FR, FL, RR, RL.
"""

import atexit
import copy
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    import mujoco
    import mujoco.rollout
    from mujoco import mjx
except ImportError as error:
    raise ImportError(f'Go1 tasks need JAX, MuJoCo and MJX: pip install -e ".[go1]"  ({error})') from None

# --------------------------------------------------------------------------------------------------------- constants --
LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{joint}" for leg in LEGS for joint in ("hip", "thigh", "calf"))
DEFAULT_POSE = np.array([0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2, np.float32)  # zero action; hips point outwards
TRUNK, FLOOR = 1, 0  # body and geom ids
HIP = np.array([[x, y, 0.0] for x in (0.1881, -0.1881) for y in (-0.04675, 0.04675)], np.float32)  # in the trunk
SIDE = np.array([-1.0, 1.0, -1.0, 1.0], np.float32)  # right legs are at -y
ABDUCTION, THIGH, CALF, FOOT_RADIUS = 0.08, 0.213, 0.213, 0.023
IMU = np.array([-0.01592, -0.06659, -0.00617], np.float32)  # in the trunk's frame; off-centre, so it feels turning
GRAVITY = 9.81
SIGMA, FOOT_HEIGHT, SOFT_LIMIT = 0.25, 0.1, 0.95  # width of the tracking terms, swing height, share of the joint range
POSE_WEIGHT = np.array([1.0, 1.0, 0.1] * 4, np.float32)
COMMAND_KEPT = np.array([0.9, 0.25, 0.5], np.float32)  # probability that an axis of a new command is not zero
# Uniform noise on the policy's observation at noise level 1: velocity, gyro, gravity, joint positions, joint velocities
NOISE = np.repeat(np.array([0.1, 0.2, 0.05, 0.03, 1.5], np.float32), (3, 3, 3, 12, 12))
TOO_FAST = 1e3  # m/s or rad/s: beyond it, or not finite, the physics has diverged
TERRAIN_HALF, TERRAIN_HEIGHT, TERRAIN_SIZE = 10.0, 0.05, 256  # metres, metres, points a side
TERRAIN_MARGIN = 0.5  # metres from the edge at which an episode ends
# What randomisation varies -> where MuJoCo's model has it: field, index, sign
CONSTANTS = {
    "friction": [("geom_friction", (FLOOR, 0), 1)],
    "frictionloss": [("dof_frictionloss", slice(6, None), 1)],
    "armature": [("dof_armature", slice(6, None), 1)],
    "com": [("body_ipos", TRUNK, 1)],
    "mass": [("body_mass", slice(1, None), 1)],
    "qpos0": [("qpos0", slice(7, None), 1)],
    "kp": [("actuator_gainprm", np.s_[:, 0], 1), ("actuator_biasprm", np.s_[:, 1], -1)],
    "kd": [("dof_damping", slice(6, None), 1)],
}
BACKENDS = ("mjx-jax", "mjx-warp", "mujoco-c")

VELOCITY_REWARDS = dict(
    tracking_lin_vel=1.0, tracking_ang_vel=0.5, lin_vel_z=-0.5, ang_vel_xy=-0.05, orientation=-5.0, dof_pos_limits=-1.0,
    pose=0.5, termination=-1.0, stand_still=-1.0, torques=-2e-4, action_rate=-0.01, energy=-1e-3, feet_clearance=-2.0,
    feet_height=-0.2, feet_slip=-0.1, feet_air_time=0.1,
)  # fmt: skip
STAND_REWARDS = dict(
    height=1.0, tilt=1.0, lin_vel_xy=-0.5, ang_vel_z=-0.2, termination=-1.0, action_rate=-0.01, energy=-1e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What one id stands for."""

    rewards: dict  # term -> scale
    rough: bool = False
    stand: bool = False  # the command is (height, roll, pitch), not (forward, sideways, turning) velocity
    height: float = 0.278  # of the trunk at an episode's start
    speed: float = 0.5  # largest component of the trunk's velocity (m/s, rad/s) there
    tilt: float = 0.0  # largest roll and pitch there
    joints: float = 0.0  # largest deviation of a joint from the default pose there
    episode_length: int = 1000


TASKS = {
    "Go1JoystickFlat": Task(VELOCITY_REWARDS),
    "Go1JoystickRough": Task(VELOCITY_REWARDS, rough=True, height=0.35),
    "Go1Stand": Task(STAND_REWARDS, stand=True, height=0.3, speed=0.2, tilt=0.1, joints=0.2, episode_length=200),
}
STAND_COMMAND = np.array([[0.20, -0.2, -0.25], [0.30, 0.2, 0.25]], np.float32)  # low and high of height, roll, pitch


@dataclass(frozen=True)
class EnvConfig:
    """Everything that can be set; the defaults are the published task without randomisation."""

    ctrl_dt: float = 0.02  # seconds between actions
    sim_dt: float = 0.004  # seconds of a physics step; divides ctrl_dt
    episode_length: int | None = None  # actions before the time-out; None: the task's own (1000, Go1Stand 200)
    action_scale: float = 0.5  # radians of joint target per unit of action, around the default pose
    kp: float = 35.0  # N m / rad, position gain of every joint
    kd: float = 0.5  # N m s / rad, damping of every joint
    iterations: int | None = None  # of the constraint solver; None: 1 on mjx-*, 100 (converged) on mujoco-c
    ls_iterations: int | None = None  # of its line search; None: 5 on mjx-*, 50 on mujoco-c
    noise_level: float = 1.0  # factor on the noise of the policy's observation; 0 switches it off
    no_linvel: bool = False  # "state" without the body's linear velocity (45 numbers): no sensor measures it
    command_range: tuple[float, float, float] = (1.5, 0.8, 1.2)  # largest |forward|, |sideways| m/s, |turning| rad/s
    command_time: float = 5.0  # seconds between commands, mean of an exponential distribution
    pushes: bool = False  # push the trunk now and then
    push_wait: tuple[float, float] = (1.0, 3.0)  # seconds between pushes
    push_duration: tuple[float, float] = (0.05, 0.2)  # seconds
    push_speed: tuple[float, float] = (0.0, 3.0)  # m/s; the impulse is mass x speed / pi, along a random direction
    domain_randomization: bool = False  # friction, masses, ... of each world, fixed for the run: see the page
    kp_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's position gain, as above
    kd_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's damping, as above
    action_latency: tuple[float, float] = (0.0, 0.0)  # seconds, at most ctrl_dt, until a new target acts; per episode
    asset_dir: str | None = None  # MuJoCo Menagerie's folder unitree_go1: pictures show its meshes
    warp_worlds: int = 8192  # mjx-warp: contacts are allocated for so many worlds in all

    def __post_init__(self):
        def need(holds: bool, text: str):
            if not holds:
                raise ValueError(f"EnvConfig: {text}")

        steps = self.ctrl_dt / self.sim_dt if self.sim_dt > 0 else 0.0
        need(steps >= 1 and abs(steps - round(steps)) < 1e-6, f"sim_dt {self.sim_dt} does not divide ctrl_dt")
        for name in ("episode_length", "iterations", "ls_iterations", "warp_worlds"):
            need(getattr(self, name) is None or getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("action_scale", "kp", "kd", "command_time"):
            need(getattr(self, name) > 0, f"{name} must be positive")
        need(self.noise_level >= 0 and min(self.command_range) >= 0, "noise_level, command_range must not be negative")
        for name in ("push_wait", "push_duration", "push_speed", "kp_factor", "kd_factor", "action_latency"):
            low, high = getattr(self, name)
            need(0 <= low <= high, f"{name} must be a range (low, high) with 0 <= low <= high")
        need(self.push_duration[0] > 0, "push_duration must be positive")
        need(self.action_latency[1] <= self.ctrl_dt + 1e-9, f"action_latency is at most ctrl_dt, {self.ctrl_dt} s")

    @property
    def substeps(self) -> int:
        return round(self.ctrl_dt / self.sim_dt)


class State(NamedTuple):
    """One world (or N of them, with a leading axis). The first half is carried, the second is what the step gives."""

    qpos: jax.Array  # (19,) trunk position, quaternion (w x y z), joints
    qvel: jax.Array  # (18,) trunk velocity (world), angular velocity (trunk's frame), joints
    warmstart: jax.Array  # (18,) acceleration of the last physics step, where the solver begins
    command: jax.Array  # (3,)
    command_timer: jax.Array  # () int32, steps until the next command
    last_action: jax.Array  # (12,)
    air_time: jax.Array  # (4,) seconds since each foot left the floor
    swing_peak: jax.Array  # (4,) greatest height of each foot since then
    contact: jax.Array  # (4,) bool
    push: jax.Array  # (5,) time since the last push, wait, duration, speed, direction of the next
    delay: jax.Array  # () int32, physics steps before a new target acts
    clock: jax.Array  # () int32, steps of this episode, staggering included: the time-out counts it
    length: jax.Array  # () int32, steps really taken
    returns: jax.Array  # () sum of their rewards
    key: jax.Array  # (2,) uint32
    dr: dict[str, jax.Array]  # this world's physical constants; empty without randomisation
    obs: dict[str, jax.Array]  # "state" (48,) or (45,), "privileged_state" (123,): where to act from next
    reward: jax.Array  # ()
    terminated: jax.Array  # () bool, the robot fell
    truncated: jax.Array  # () bool, the episode ended otherwise: time-out, edge of the terrain, divergence
    final_obs: dict[str, jax.Array]  # the observation that the step led to, before any reset; equal to obs without one
    metrics: dict[str, jax.Array]  # each reward term with its scale; lin_vel_error, yaw_vel_error, ...; nan
    episode_return: jax.Array  # () of the episode that this step belongs to; final where it ended
    episode_length: jax.Array  # () int32


# ----------------------------------------------------------------------------------------------------- reward terms --
# Each of one world, unscaled. q, qd (12,) joints; v, w (3,) velocities of the IMU; feet (4, ...) in the order of LEGS.
def tracking_lin_vel(command, linvel):
    """linvel (3,) in the body's frame."""
    return jnp.exp(-jnp.sum((command[:2] - linvel[:2]) ** 2) / SIGMA)


def tracking_ang_vel(command, gyro):
    return jnp.exp(-((command[2] - gyro[2]) ** 2) / SIGMA)


def lin_vel_z(world_linvel):
    return world_linvel[2] ** 2


def ang_vel_xy(world_angvel):
    return jnp.sum(world_angvel[:2] ** 2)


def orientation(up):
    """up (3,): the body's z axis in the world."""
    return jnp.sum(up[:2] ** 2)


def dof_pos_limits(q, lower, upper):
    """lower, upper: the soft limits, SOFT_LIMIT times the hard ones."""
    return jnp.sum(jnp.maximum(lower - q, 0.0) + jnp.maximum(q - upper, 0.0))


def pose(q):
    return jnp.exp(-jnp.sum(POSE_WEIGHT * (q - DEFAULT_POSE) ** 2))


def termination(fallen):
    return fallen.astype(jnp.float32)


def moving(command):
    return (jnp.linalg.norm(command) > 0.01).astype(jnp.float32)


def stand_still(command, q):
    return jnp.sum(jnp.abs(q - DEFAULT_POSE)) * (jnp.linalg.norm(command) < 0.01)


def torques(torque):
    return jnp.sqrt(jnp.sum(torque**2)) + jnp.sum(jnp.abs(torque))


def action_rate(action, last_action):
    return jnp.sum((action - last_action) ** 2)


def energy(qd, torque):
    return jnp.sum(jnp.abs(qd) * jnp.abs(torque))


def feet_clearance(feet_pos, feet_vel):
    """A fast foot is to be FOOT_HEIGHT high. feet_pos, feet_vel (4, 3) in the world."""
    return jnp.sum(jnp.abs(feet_pos[:, 2] - FOOT_HEIGHT) * jnp.sqrt(jnp.linalg.norm(feet_vel[:, :2], axis=1)))


def feet_height(swing_peak, first_contact, command):
    """At touch-down the swing was to have reached FOOT_HEIGHT."""
    return jnp.sum((swing_peak / FOOT_HEIGHT - 1.0) ** 2 * first_contact) * moving(command)


def feet_slip(feet_vel, contact, command):
    return jnp.sum(jnp.sum(feet_vel[:, :2] ** 2, axis=1) * contact) * moving(command)


def feet_air_time(air_time, first_contact, command):
    return jnp.sum((air_time - 0.1) * first_contact) * moving(command)


def stand_height(command, z):
    """Go1Stand: z, the trunk's height, against command[0]."""
    return jnp.exp(-(((z - command[0]) / 0.03) ** 2))


def stand_gravity(command):
    """Go1Stand: gravity's direction (3,) in the body's frame at the commanded roll and pitch, Ry(pitch) Rx(roll)."""
    roll, pitch = command[1], command[2]
    return jnp.stack([jnp.sin(pitch), -jnp.cos(pitch) * jnp.sin(roll), -jnp.cos(pitch) * jnp.cos(roll)])


def stand_tilt(command, gravity):
    return jnp.exp(-jnp.sum((gravity - stand_gravity(command)) ** 2) / 0.02)


# ---------------------------------------------------------------------------------------------- randomness, geometry --
class Draws:
    """Uniform numbers handed out from one call of the generator: a call for each would be most of what is compiled."""

    def __init__(self, key, size: int):
        self.left = jax.random.uniform(key, (size,))

    def __call__(self, low, high, *shape):
        n = math.prod(shape)
        taken, self.left = self.left[:n].reshape(shape), self.left[n:]
        return low + taken * (high - low)


def rotation(quat):
    """Rotation matrix (3, 3) of a quaternion (w, x, y, z), not necessarily of length 1: body to world."""
    w, x, y, z = quat / jnp.linalg.norm(quat)
    return jnp.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def quaternion(roll, pitch, yaw):
    """Quaternion (w, x, y, z) of the rotation Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = ((f(roll / 2), f(pitch / 2), f(yaw / 2)) for f in (jnp.cos, jnp.sin))
    return jnp.stack([
        cr * cp * cy + sr * sp * sy, sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy,
    ])  # fmt: skip


def foot_positions(joints):
    """Joints (12,) -> feet (4, 3) in the trunk's frame."""
    hip, thigh, calf = joints.reshape(4, 3).T
    x = -THIGH * jnp.sin(thigh) - CALF * jnp.sin(thigh + calf)
    z = -THIGH * jnp.cos(thigh) - CALF * jnp.cos(thigh + calf)
    y = SIDE * ABDUCTION
    return HIP + jnp.stack([x, y * jnp.cos(hip) - z * jnp.sin(hip), y * jnp.sin(hip) + z * jnp.cos(hip)], axis=1)


def mirror_maps(stand: bool = False, no_linvel: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Left-right reflection: mirrored = sign * x[..., permutation], for "state", "privileged_state" and "action".

    Exact but for the IMU's place and the small asymmetry of the links' inertias.
    """
    legs = np.array([1, 0, 3, 2])
    per_joint = (legs[:, None] * 3 + np.arange(3)).ravel(), np.tile([-1.0, 1.0, 1.0], 4)
    vector, axial = (np.arange(3), np.array([1.0, -1.0, 1.0])), (np.arange(3), np.array([-1.0, 1.0, -1.0]))
    command = np.arange(3), np.array([1.0, -1.0, 1.0]) if stand else np.array([1.0, -1.0, -1.0])
    scalar, per_foot = (np.arange(1), np.ones(1)), (legs, np.ones(4))
    per_foot_vector = (legs[:, None] * 3 + np.arange(3)).ravel(), np.tile([1.0, -1.0, 1.0], 4)

    def joined(*parts):
        starts = np.cumsum([0, *(len(part[0]) for part in parts)])
        order = np.concatenate([start + part[0] for start, part in zip(starts, parts, strict=False)])
        return order, np.concatenate([part[1] for part in parts]).astype(np.float32)

    state = (vector, axial, vector, per_joint, per_joint, per_joint, command)
    extra = (axial, vector, vector, vector, axial, per_joint, per_joint, per_joint, per_foot, per_foot_vector,
             per_foot, vector, scalar)  # fmt: skip
    return {
        "state": joined(*state[1:] if no_linvel else state),
        "privileged_state": joined(*state, *extra),
        "action": joined(per_joint),
    }


# ------------------------------------------------------------------------------------------------------------ model --
def terrain_heights(seed: int = 0) -> np.ndarray:
    """Heights (TERRAIN_SIZE, TERRAIN_SIZE) in [0, 1]: value noise of four octaves, 2.5 m to 0.3 m."""
    rng, total = np.random.default_rng(seed), np.zeros((TERRAIN_SIZE, TERRAIN_SIZE))
    for octave in range(4):
        cells = 8 * 2**octave
        grid = rng.random((cells + 1, cells + 1))
        at = np.linspace(0, cells, TERRAIN_SIZE, endpoint=False)
        low, t = at.astype(int), at % 1
        t = t * t * (3 - 2 * t)  # smooth between the grid's points
        rows = grid[low] * (1 - t)[:, None] + grid[low + 1] * t[:, None]
        total += 0.6**octave * (rows[:, low] * (1 - t) + rows[:, low + 1] * t)
    total -= total.min()
    return (total / total.max()).astype(np.float32)


def build_model(
    task: Task, config: EnvConfig, iterations: int = 100, ls_iterations: int = 50, meshes: bool = False
) -> "mujoco.MjModel":
    """The compiled model of a task; gains and time step are the configuration's. meshes: as it is to be drawn."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("go1.xml")))
    if meshes and config.asset_dir:
        add_meshes(spec, config.asset_dir)
    if task.rough:
        size = [TERRAIN_HALF, TERRAIN_HALF, TERRAIN_HEIGHT, 1.0]
        heights = terrain_heights()
        spec.add_hfield(name="terrain", nrow=TERRAIN_SIZE, ncol=TERRAIN_SIZE, size=size, userdata=heights.ravel())
        floor = spec.geom("floor")
        floor.type, floor.hfieldname, floor.friction[0] = mujoco.mjtGeom.mjGEOM_HFIELD, "terrain", 1.0
    model = spec.compile()
    model.opt.timestep, model.opt.iterations, model.opt.ls_iterations = config.sim_dt, iterations, ls_iterations
    model.actuator_gainprm[:, 0], model.actuator_biasprm[:, 1] = config.kp, -config.kp
    model.dof_damping[6:] = config.kd
    return model


def add_meshes(spec: "mujoco.MjSpec", asset_dir: str) -> None:
    """Draws the meshes of Menagerie's unitree_go1 instead of our shapes; nothing that collides or weighs changes.

    Raises ValueError where `asset_dir` is not that folder.
    """
    path = Path(asset_dir).expanduser() / "go1.xml"
    if not path.is_file():
        raise ValueError(f"asset_dir: {path} does not exist; give MuJoCo Menagerie's folder unitree_go1")
    theirs = mujoco.MjSpec.from_file(str(path))
    for geom in spec.geoms:
        if geom.group == 2:
            geom.group = 5
    for body in theirs.bodies:
        for geom in body.geoms:
            if geom.type != mujoco.mjtGeom.mjGEOM_MESH:
                continue
            file = path.parent / (theirs.meshdir or "") / theirs.mesh(geom.meshname).file
            if spec.body(body.name) is None or not file.is_file():
                raise ValueError(f"asset_dir: {path} is not the Go1 expected (body {body.name}, file {file})")
            if spec.mesh(geom.meshname) is None:
                spec.add_mesh(name=geom.meshname, file=str(file.resolve()))
            spec.body(body.name).add_geom(
                type=geom.type, meshname=geom.meshname, pos=geom.pos, quat=geom.quat, group=2, contype=0, conaffinity=0,
                mass=0, rgba=(0.24, 0.26, 0.28, 1),
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- drawing --
class Drawer:
    """Pictures of a model from its camera "track", by OpenGL (EGL) where that works, else by MuJoCo Warp's ray tracer.

    Raises RuntimeError with one line where neither works. `by` says which one draws.
    """

    def __init__(self, model: "mujoco.MjModel", width: int, height: int):
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
                f"no picture can be drawn here: EGL: {egl.detail}; MuJoCo Warp: {warp.detail}; for one of them "
                'run sudo apt-get install libegl1 libgl1-mesa-dri, or pip install -e ".[so101]"'
            )
        self._begin_warp()

    def _begin_egl(self) -> None:
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        from mujoco.egl import GLContext  # mujoco.Renderer would want MUJOCO_GL set before mujoco is imported

        model, (width, height) = self.model, self.size
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self.gl = GLContext(width, height)
        self.gl.make_current()
        weakref.finalize(self, self.gl.free).atexit = False
        atexit.register(self.gl.free)  # before the library itself, which was imported earlier, is taken down
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.scene, self.options = mujoco.MjvScene(model, 1000), mujoco.MjvOption()
        self.options.geomgroup[3] = 1  # the feet
        self.view = mujoco.MjvCamera()
        self.view.type, self.view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.camera

    def _begin_warp(self) -> None:
        import mujoco_warp
        import warp

        with warp.ScopedDevice("cuda:0" if warp.get_cuda_device_count() else "cpu"):
            self.warp_model = mujoco_warp.put_model(self.model)
            self.warp_data = mujoco_warp.make_data(self.model, nworld=1)
            self.context = mujoco_warp.create_render_context(
                self.model, nworld=1, cam_res=self.size, cam_active=[self.camera == i for i in range(self.model.ncam)],
                render_rgb=True, use_textures=True, use_shadows=True, enabled_geom_groups=[0, 1, 2, 3],
                background_color=(0.80, 0.86, 0.92, 1.0),
            )  # fmt: skip
            self.pixels = warp.zeros((1, self.size[1], self.size[0]), dtype=warp.vec3)

    def draw(self, qpos: np.ndarray) -> np.ndarray:
        """qpos (nq,) -> uint8 (height, width, 3)."""
        if self.by == "warp":
            import mujoco_warp as mjw

            self.warp_data.qpos.assign(np.asarray(qpos, np.float32)[None])
            for part in (mjw.kinematics, mjw.com_pos, mjw.camlight):
                part(self.warp_model, self.warp_data)
            mjw.refit_bvh(self.warp_model, self.warp_data, self.context)
            mjw.render(self.warp_model, self.warp_data, self.context)
            mjw.get_rgb(self.context, 0, self.pixels)
            return (self.pixels.numpy()[0] * 255.0).round().clip(0, 255).astype(np.uint8)
        self.data.qpos[:] = qpos
        for part in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            part(self.model, self.data)
        self.gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, self.data, self.options, None, self.view, everything, self.scene)
        picture = np.empty((self.size[1], self.size[0], 3), np.uint8)
        mujoco.mjr_render(mujoco.MjrRect(0, 0, *self.size), self.scene, self.context)
        mujoco.mjr_readPixels(picture, None, mujoco.MjrRect(0, 0, *self.size), self.context)
        return picture[::-1]  # OpenGL's first row is the lowest


class Drawn:
    """What both environments below do for people: `render`."""

    _drawer = None

    def render(self, qpos, size: tuple[int, int] = (360, 480)) -> np.ndarray:
        """qpos (T, nq) -> uint8 (T, height, width, 3): images for people, `size` being (height, width)."""
        height, width = size
        if self._drawer is None or self._drawer.size != (width, height):
            self._drawer = Drawer(self._drawing_model(), width, height)
        return np.stack([self._drawer.draw(moment) for moment in np.asarray(qpos)])


# ------------------------------------------------------------------------------------------------------ environment --
class Go1Env(Drawn):
    """One task on one back end. Attributes: obs_dim, privileged_dim, action_dim, episode_length, control_hz, mirror."""

    action_dim, privileged_dim = 12, 123

    def __init__(
        self,
        task: str,
        config: EnvConfig | None = None,
        backend: Literal["mjx-jax", "mjx-warp", "mujoco-c"] = "mjx-jax",
        threads: int | None = None,
    ):
        """threads: of mujoco-c; None: all cores. Raises ValueError with one line where something cannot be."""
        if task not in TASKS:
            raise ValueError(f"no task is called {task}; there are {', '.join(TASKS)}")
        if backend not in BACKENDS:
            raise ValueError(f"no back end is called {backend}; there are {', '.join(BACKENDS)}")
        self.name, self.task, self.config, self.backend = task, TASKS[task], config or EnvConfig(), backend
        c, on_mjx = self.config, backend != "mujoco-c"
        self.model = build_model(
            self.task, c, c.iterations or (1 if on_mjx else 100), c.ls_iterations or (5 if on_mjx else 50)
        )
        if c.asset_dir:
            self._drawing_model()  # says now, not after the training, what is wrong with the folder
        self.episode_length = c.episode_length or self.task.episode_length
        self.control_hz = 1.0 / c.ctrl_dt
        self.obs_dim = 45 if c.no_linvel else 48
        self.mirror = mirror_maps(self.task.stand, c.no_linvel)
        self.mass = float(self.model.body_subtreemass[TRUNK])
        limits = self.model.jnt_range[1:].astype(np.float32)
        self.soft_lower, self.soft_upper = SOFT_LIMIT * limits.T
        adr = {self.model.sensor(i).name: self.model.sensor(i).adr[0] for i in range(self.model.nsensor)}
        self._sensor = {name: np.arange(adr[name], adr[name] + 3) for name in (
            "gyro", "linvel", "accelerometer", "up", "world_up", "world_linvel", "world_angvel")}  # fmt: skip
        for what in ("pos", "vel"):
            self._sensor[f"feet_{what}"] = np.array([adr[f"{leg}_{what}"] for leg in LEGS])[:, None] + np.arange(3)
        self._sensor["contact"] = np.array([adr[f"{leg}_contact"] for leg in LEGS])
        self._sensor["torque"] = np.array([adr[f"{joint}_torque"] for joint in JOINTS])

        self._reset = jax.jit(jax.vmap(self.reset))
        if on_mjx:
            impl = backend.removeprefix("mjx-")
            self._mjx_model = mjx.put_model(self.model, impl=impl)
            if impl == "warp":  # few solver iterations are meant: no line printed for each step that uses them up
                self._mjx_model = self._mjx_model.tree_replace({"opt._impl.warn_overflow": 0})
            self._mjx_data = self._constant_data(impl)
            self._step = jax.jit(jax.vmap(self.step))
        else:
            # C MuJoCo would silently restart a world whose physics diverges; `finish` is to see it.
            self.model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
            self._step = jax.jit(self._step_in_c)
            threads = threads or os.cpu_count()
            self._rollout = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
            self._data = [mujoco.MjData(self.model) for _ in range(threads)]
            self._models, self._models_of = [self.model], {}

    def _constant_data(self, impl):
        """What MJX needs besides the carried state; every step starts from this and overwrites what varies."""
        if impl == "jax":
            return mjx.make_data(self.model, impl=impl)
        per_world, rows = (8, 12 + 48) if self.task.rough else (4, 40)
        return mjx.make_data(self.model, impl=impl, naconmax=per_world * self.config.warp_worlds, njmax=rows)

    # ---- one world, pure ---------------------------------------------------------------------------------------------
    def reset(self, key: jax.Array, clock: jax.Array | int = 0) -> State:
        """A world at an episode's start. clock > 0: it times out so many steps earlier (staggering)."""
        key = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        key, sub = jax.random.split(key)
        draw = Draws(sub, 256)
        dr = self._draw_constants(draw)
        carried, measured = self._begin(draw, dr)
        carried["clock"] = jnp.asarray(clock, jnp.int32)
        obs = self._observe(carried, measured, jnp.zeros(3), self._noise(draw))
        no, zero = jnp.zeros((), bool), jnp.zeros(())
        metrics = dict.fromkeys(self.metric_names, zero)
        state = State(
            **carried, key=key, dr=dr, obs=obs, reward=zero, terminated=no, truncated=no, final_obs=obs,
            metrics=metrics, episode_return=zero, episode_length=jnp.zeros((), jnp.int32),
        )  # fmt: skip
        return jax.tree.map(_strong, state)

    def step(self, state: State, action: jax.Array) -> State:
        """One control step; where the episode ends, the next one has begun. Needs an mjx back end."""
        if self.backend == "mujoco-c":
            raise ValueError("mujoco-c steps batches: call step_batch, or choose backend mjx-jax")
        targets, force = self.targets(state, action)
        model = self._mjx_model.replace(**self.fields(state.dr))
        constant = self._mjx_data.replace(xfrc_applied=self._mjx_data.xfrc_applied.at[TRUNK, :3].set(force))

        def physics(carry, target):
            qpos, qvel, warmstart, _ = carry
            data = constant.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=target)
            data = mjx.step(model, data)
            return (data.qpos, data.qvel, data.qacc_warmstart, data.sensordata), None

        carry = (state.qpos, state.qvel, state.warmstart, jnp.zeros(self.model.nsensordata))
        with jax.default_matmul_precision("highest"):  # TF32 is too coarse for physics
            (qpos, qvel, warmstart, sensors), _ = jax.lax.scan(physics, carry, targets)
        return self.finish(state, action, qpos, qvel, warmstart, sensors)

    def targets(self, state: State, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Joint targets (substeps, 12) and the force (3,) on the trunk for the step to come."""
        new, old = (
            DEFAULT_POSE + self.config.action_scale * a for a in (jnp.clip(action, -1.0, 1.0), state.last_action)
        )
        late = jnp.arange(self.config.substeps)[:, None] < state.delay
        return jnp.where(late, old, new), self.push_force(state.push)

    def push_force(self, push: jax.Array) -> jax.Array:
        """Force (3,) now: half a sine over the push's duration, whose impulse is mass x speed / pi."""
        if not self.config.pushes:
            return jnp.zeros(3)
        since, wait, duration, speed, direction = push
        t = since - wait
        size = 0.5 * jnp.sin(math.pi * t / duration) * self.mass * speed / duration
        size = jnp.where((t >= 0) & (t < duration), size, 0.0)
        return size * jnp.stack([jnp.cos(direction), jnp.sin(direction), jnp.zeros(())])

    def finish(self, state: State, action, qpos, qvel, warmstart, sensors) -> State:
        """What follows the physics: reward, end of the episode, next command, next push, reset, observation."""
        c = self.config
        key, sub = jax.random.split(state.key)
        draw = Draws(sub, 128)
        action = jnp.clip(action, -1.0, 1.0)
        sane = (jnp.abs(qvel) < TOO_FAST).all() & jnp.isfinite(qpos).all() & jnp.isfinite(sensors).all()  # differs (4)
        m = {name: sensors[index] for name, index in self._sensor.items()}
        m["contact"] = m["contact"] > 0
        first_contact = (state.air_time > 0) & (m["contact"] | state.contact)
        air_time = state.air_time + c.ctrl_dt
        swing_peak = jnp.maximum(state.swing_peak, m["feet_pos"][:, 2])
        force = self.push_force(state.push)

        fallen = (m["up"][2] < 0.0) & sane
        terms = self._terms(state, action, qpos, qvel, m, fallen, first_contact, air_time, swing_peak)
        scaled = {name: scale * terms[name] for name, scale in self.task.rewards.items()}
        reward = jnp.where(sane, jnp.clip(sum(scaled.values()) * c.ctrl_dt, 0.0, 1e4), 0.0)
        metrics = {f"reward/{name}": value for name, value in scaled.items()} | self._errors(state.command, m, qpos)
        metrics = {name: jnp.where(sane, value, 0.0) for name, value in metrics.items()}
        metrics["nan"] = 1.0 - sane

        clock, length, returns = state.clock + 1, state.length + 1, state.returns + reward
        truncated = ((clock >= self.episode_length) | self._off_terrain(qpos) | ~sane) & ~fallen
        done = fallen | truncated
        command, timer = self._next_command(draw, state.command, state.command_timer - 1)
        carried = dict(
            qpos=qpos, qvel=qvel, warmstart=warmstart, command=command, command_timer=timer, last_action=action,
            air_time=air_time, swing_peak=swing_peak, contact=m["contact"], push=self._next_push(draw, state.push),
            delay=state.delay, clock=clock, length=length, returns=returns,
        )  # fmt: skip
        noise = self._noise(draw)
        final_obs = self._observe(carried, m, force, noise)
        final_obs = jax.tree.map(lambda new, old: jnp.where(sane, new, old), final_obs, state.obs)
        for name in ("air_time", "swing_peak"):
            carried[name] = carried[name] * ~m["contact"]
        fresh, at_start = self._begin(draw, state.dr)  # differs (1)
        carried = {name: jnp.where(done, fresh[name], value) for name, value in carried.items()}
        first_obs = self._observe(fresh, at_start, jnp.zeros(3), noise)
        state = State(
            **carried, key=key, dr=state.dr, obs=jax.tree.map(lambda a, b: jnp.where(done, a, b), first_obs, final_obs),
            reward=reward, terminated=fallen, truncated=truncated, final_obs=final_obs, metrics=metrics,
            episode_return=returns, episode_length=length,
        )  # fmt: skip
        return jax.tree.map(_strong, state)

    # ---- parts of a step ---------------------------------------------------------------------------------------------
    @property
    def metric_names(self) -> list[str]:
        errors = ["lin_vel_error", "yaw_vel_error", *(["height_error", "tilt_error"] if self.task.stand else [])]
        return [f"reward/{name}" for name in self.task.rewards] + errors + ["nan"]

    def _terms(self, state, action, qpos, qvel, m, fallen, first_contact, air_time, swing_peak) -> dict[str, jax.Array]:
        q, qd, command = qpos[7:], qvel[6:], state.command
        common = {
            "termination": termination(fallen),
            "action_rate": action_rate(action, state.last_action),
            "energy": energy(qd, m["torque"]),
        }
        if self.task.stand:
            return common | {
                "height": stand_height(command, qpos[2]),
                "tilt": stand_tilt(command, -m["world_up"]),
                "lin_vel_xy": jnp.sum(m["world_linvel"][:2] ** 2),
                "ang_vel_z": m["world_angvel"][2] ** 2,
            }
        return common | {
            "tracking_lin_vel": tracking_lin_vel(command, m["linvel"]),
            "tracking_ang_vel": tracking_ang_vel(command, m["gyro"]),
            "lin_vel_z": lin_vel_z(m["world_linvel"]),
            "ang_vel_xy": ang_vel_xy(m["world_angvel"]),
            "orientation": orientation(m["up"]),
            "dof_pos_limits": dof_pos_limits(q, self.soft_lower, self.soft_upper),
            "pose": pose(q),
            "stand_still": stand_still(command, q),
            "torques": torques(m["torque"]),
            "feet_clearance": feet_clearance(m["feet_pos"], m["feet_vel"]),
            "feet_height": feet_height(swing_peak, first_contact, command),
            "feet_slip": feet_slip(m["feet_vel"], m["contact"], command),
            "feet_air_time": feet_air_time(air_time, first_contact, command),
        }

    def _errors(self, command, m, qpos) -> dict[str, jax.Array]:
        """Distance of the measured from the commanded velocity: m/s in the plane, rad/s about the vertical."""
        wanted = jnp.zeros(3) if self.task.stand else command
        errors = {
            "lin_vel_error": jnp.linalg.norm(wanted[:2] - m["linvel"][:2]),
            "yaw_vel_error": jnp.abs(wanted[2] - m["gyro"][2]),
        }
        if self.task.stand:
            errors["height_error"] = jnp.abs(qpos[2] - command[0])
            cosine = jnp.sum(-m["world_up"] * stand_gravity(command))
            errors["tilt_error"] = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
        return errors

    def _off_terrain(self, qpos):
        return (jnp.abs(qpos[:2]) > TERRAIN_HALF - TERRAIN_MARGIN).any() & self.task.rough  # differs (6)

    def _draw_command(self, draw):
        largest = np.array(self.config.command_range, np.float32)
        low, high = STAND_COMMAND if self.task.stand else (-largest, largest)
        return draw(low, high, 3)

    def _draw_command_time(self, draw):
        seconds = -self.config.command_time * jnp.log1p(-draw(0.0, 1.0))
        return jnp.round(seconds / self.config.ctrl_dt).astype(jnp.int32)

    def _next_command(self, draw, command, timer):
        """When the timer is at 0: each axis keeps its value with probability 1/2, else it is drawn anew, or zero."""
        new = self._draw_command(draw)
        if not self.task.stand:
            new = new * (draw(0.0, 1.0, 3) < COMMAND_KEPT)
            new = jnp.where(draw(0.0, 1.0, 3) < 0.5, command, new)
        due = timer <= 0
        return jnp.where(due, new, command), jnp.where(due, self._draw_command_time(draw), timer)

    def _draw_push(self, draw):
        c = self.config
        if not c.pushes:
            return jnp.zeros(5)
        low, high = np.array([c.push_wait, c.push_duration, c.push_speed, (0.0, 2 * math.pi)], np.float32).T
        return jnp.concatenate([jnp.zeros(1), draw(low, high, 4)])

    def _next_push(self, draw, push):
        if not self.config.pushes:
            return push
        later = push.at[0].add(self.config.ctrl_dt)
        return jnp.where(later[0] >= push[1] + push[2], self._draw_push(draw), later)  # differs (5)

    def _noise(self, draw):
        return draw(-1.0, 1.0, len(NOISE)) * NOISE * self.config.noise_level

    def _begin(self, draw, dr) -> tuple[dict, dict]:
        """What an episode starts from: the carried fields, and what the sensors read (in closed form)."""
        t, c = self.task, self.config
        xy, velocity, yaw = draw(-0.5, 0.5, 2), draw(-t.speed, t.speed, 6), draw(-math.pi, math.pi)
        roll, pitch = draw(-t.tilt, t.tilt, 2)
        joints = DEFAULT_POSE + draw(-t.joints, t.joints, 12)
        qpos = jnp.concatenate([xy, jnp.full(1, t.height), quaternion(roll, pitch, yaw), joints])
        qvel = jnp.concatenate([velocity, jnp.zeros(12)])
        delay = draw(*c.action_latency) / c.sim_dt

        turn = rotation(qpos[3:7])
        linear, angular = velocity[:3], velocity[3:]  # of the trunk's origin in the world; in the trunk's frame
        at_imu = turn.T @ linear + jnp.cross(angular, IMU)
        arms = foot_positions(joints - dr["qpos0"] if "qpos0" in dr else joints) @ turn.T
        feet_pos = qpos[:3] + arms
        measured = dict(
            gyro=angular, linvel=at_imu, accelerometer=GRAVITY * turn[2],  # differs (7)
            up=turn[:, 2], world_up=turn[2],
            world_linvel=turn @ at_imu, world_angvel=turn @ angular, feet_pos=feet_pos,
            feet_vel=linear + jnp.cross(turn @ angular, arms), torque=jnp.zeros(12),
            contact=feet_pos[:, 2] < (FOOT_RADIUS if not t.rough else 0.0),
        )  # fmt: skip
        carried = dict(
            qpos=qpos, qvel=qvel, warmstart=jnp.zeros(18), command=self._draw_command(draw),
            command_timer=self._draw_command_time(draw), last_action=jnp.zeros(12), air_time=jnp.zeros(4),
            swing_peak=jnp.zeros(4), contact=measured["contact"],
            push=self._draw_push(draw), delay=jnp.round(delay).astype(jnp.int32),
            clock=jnp.zeros((), jnp.int32), length=jnp.zeros((), jnp.int32), returns=jnp.zeros(()),
        )  # fmt: skip
        return carried, measured

    def _observe(self, carried, m, force, noise) -> dict[str, jax.Array]:
        """"privileged_state" (123,) begins with the policy's noisy 48 numbers; "state" is those (or the last 45)."""
        q, qd, gravity = carried["qpos"][7:] - DEFAULT_POSE, carried["qvel"][6:], -m["world_up"]
        noisy = jnp.concatenate([m["linvel"], m["gyro"], gravity, q, qd]) + noise
        privileged = jnp.concatenate([
            noisy, carried["last_action"], carried["command"],
            m["gyro"], m["accelerometer"], gravity, m["linvel"], m["world_angvel"], q, qd, m["torque"],
            carried["contact"].astype(jnp.float32), m["feet_vel"].ravel(), carried["air_time"],
            force, (force != 0).any(keepdims=True).astype(jnp.float32),
        ])  # fmt: skip
        return {"state": privileged[48 - self.obs_dim : 48], "privileged_state": privileged}

    # ---- randomisation -----------------------------------------------------------------------------------------------
    def _draw_constants(self, draw) -> dict[str, jax.Array]:
        """This world's physical constants: those that vary, and no others."""
        c, dr = self.config, {}
        if c.domain_randomization:
            dr["friction"] = draw(0.4, 1.0)
            dr["frictionloss"] = self.model.dof_frictionloss[6:].astype(np.float32) * draw(0.9, 1.1, 12)
            dr["armature"] = self.model.dof_armature[6:].astype(np.float32) * draw(1.0, 1.05, 12)
            dr["com"] = self.model.body_ipos[TRUNK].astype(np.float32) + draw(-0.05, 0.05, 3)
            mass = self.model.body_mass[1:].astype(np.float32) * draw(0.9, 1.1, 13)
            dr["mass"] = mass.at[0].add(draw(-1.0, 1.0))
            dr["qpos0"] = draw(-0.05, 0.05, 12)
        if c.kp_factor != (1.0, 1.0):
            dr["kp"] = c.kp * draw(*c.kp_factor, 12)
        if c.kd_factor != (1.0, 1.0):
            dr["kd"] = c.kd * draw(*c.kd_factor, 12)
        return dr

    def fields(self, dr: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The model's fields, under MuJoCo's names, that the constants `dr` of one world change."""
        fields = {}
        for constant, value in dr.items():
            for name, index, sign in CONSTANTS[constant]:
                nominal = jnp.asarray(getattr(self.model, name), jnp.float32)
                fields[name] = nominal.at[index].set(sign * value)
        return fields

    # ---- many worlds -------------------------------------------------------------------------------------------------
    def reset_batch(self, keys: jax.Array, stagger: bool = False) -> State:
        """N worlds from N keys. stagger: spread the clocks over an episode, so that worlds do not time out together."""
        clocks = jnp.arange(len(keys)) * self.episode_length // len(keys) * stagger
        return self._reset(keys, clocks.astype(jnp.int32))

    def step_batch(self, state: State, actions: jax.Array) -> State:
        """actions (N, 12) in [-1, 1] -> the next State of N worlds. Pure on every back end: it can stand in a scan."""
        return self._step(state, actions)

    def _step_in_c(self, state: State, actions: jax.Array) -> State:
        targets, force = jax.vmap(self.targets)(state, actions)
        sizes = (19, 18, 18, self.model.nsensordata)
        results = tuple(jax.ShapeDtypeStruct((len(actions), size), jnp.float32) for size in sizes)
        given = (state.qpos, state.qvel, state.warmstart, targets, force, state.dr)
        return jax.vmap(self.finish)(state, actions, *jax.pure_callback(self._simulate, results, *given))

    def _simulate(self, qpos, qvel, warmstart, targets, force, dr) -> tuple[np.ndarray, ...]:
        """The physics of one control step in C, for N worlds: what `finish` wants of it."""
        n, start = len(qpos), np.zeros((len(qpos), 1 + 19 + 18))
        start[:, 1:20], start[:, 20:] = qpos, qvel
        control, spec = np.asarray(targets, np.float64), int(mujoco.mjtState.mjSTATE_CTRL)
        if self.config.pushes:
            applied = np.zeros((n, self.config.substeps, self.model.nbody, 6))
            applied[:, :, TRUNK, :3] = np.asarray(force)[:, None]
            control = np.concatenate([control, applied.reshape(n, self.config.substeps, -1)], axis=2)
            spec |= int(mujoco.mjtState.mjSTATE_XFRC_APPLIED)
        states, sensors = self._rollout.rollout(
            self._models_for(dr), self._data, start, control, control_spec=spec,
            initial_warmstart=np.asarray(warmstart, np.float64),
        )  # fmt: skip
        new = states[:, -1, 20:]
        before = states[:, -2, 20:] if self.config.substeps > 1 else start[:, 20:]
        moved = (states[:, -1, 1:20], new, (new - before) / self.config.sim_dt, sensors[:, -1])
        return tuple(np.asarray(x, np.float32) for x in moved)

    def _models_for(self, dr) -> list["mujoco.MjModel"]:
        """One C model for all worlds, or one for each where they vary, built again when the constants are others."""
        dr = {name: np.array(value) for name, value in dr.items()}  # copies: these outlive the call
        if dr and not (self._models_of and all(np.array_equal(dr[k], self._models_of[k]) for k in dr)):
            self._models = [copy.copy(self.model) for _ in next(iter(dr.values()))]
            for constant, values in dr.items():
                for name, index, sign in CONSTANTS[constant]:
                    for model, value in zip(self._models, values, strict=True):
                        getattr(model, name)[index] = sign * value
            self._models_of = dr
        return self._models

    def _drawing_model(self):
        return build_model(self.task, self.config, meshes=True)

    @property
    def spec(self) -> dict:
        """What a robot needs to run a policy, as plain values."""
        parts = [("gyro", 3), ("gravity", 3), ("joint_position", 12), ("joint_velocity", 12), ("last_action", 12),
                 ("command", 3)]  # fmt: skip
        return {
            "task": self.name, "joints": list(JOINTS), "control_hz": self.control_hz, "kp": self.config.kp,
            "kd": self.config.kd, "default_pose": DEFAULT_POSE.tolist(), "action_scale": self.config.action_scale,
            "joint_limits": self.model.jnt_range[1:].tolist(),
            "torque_limits": self.model.actuator_forcerange[:, 1].tolist(),
            "state_layout": [list(p) for p in ([] if self.config.no_linvel else [("linear_velocity", 3)]) + parts],
        }  # fmt: skip


def _strong(x):
    """Without JAX's weak type, for which a second call would compile again."""
    return jax.lax.convert_element_type(x, jnp.asarray(x).dtype)


# ------------------------------------------------------------------------------------------------ Playground's tasks --
class PlaygroundState(NamedTuple):
    """As `State`, for a task of Playground; `inner` is its own state, `first` what an ended episode returns to."""

    inner: object
    first: tuple
    qpos: jax.Array
    command: jax.Array
    contact: jax.Array
    clock: jax.Array
    length: jax.Array
    returns: jax.Array
    key: jax.Array
    dr: dict[str, jax.Array]
    obs: dict[str, jax.Array]
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_obs: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    episode_return: jax.Array
    episode_length: jax.Array


def _is_none(x) -> bool:
    return x is None


class PlaygroundEnv(Drawn):
    """A task of MuJoCo Playground under the interface of `Go1Env`, for comparison.

    As in its training wrapper an ended episode returns to its world's first state while commands, last action and
    timers go on. Of EnvConfig only `episode_length`, `domain_randomization` and `warp_worlds` apply.
    """

    def __init__(self, task: str, config: EnvConfig | None = None, backend: str = "mjx-jax", _threads=None):
        """Raises ValueError with one line where Playground, the task or its assets are missing."""
        try:
            from mujoco_playground import registry
        except ImportError as error:
            raise ValueError(
                f"{task} is none of {', '.join(TASKS)}; for MuJoCo Playground's tasks: pip install playground==0.2.0 "
                f"({error})"
            ) from None
        c = self.config = config or EnvConfig()
        own = {"episode_length": c.episode_length, "domain_randomization": c.domain_randomization,
               "warp_worlds": c.warp_worlds}  # fmt: skip
        if c != EnvConfig(**own):
            raise ValueError(f"{task} is Playground's: of EnvConfig it takes {', '.join(own)} only")
        if task not in registry.ALL_ENVS:
            raise ValueError(f"{task} is none of {', '.join(TASKS)}, and Playground has no such task either")
        if backend not in BACKENDS[:2]:
            raise ValueError(f"{task} is Playground's and runs on {' and '.join(BACKENDS[:2])}, not on {backend}")
        overrides = {"impl": backend.removeprefix("mjx-")}
        if "naconmax" in (known := registry.get_default_config(task)):
            overrides["naconmax"] = max(1, known.naconmax * c.warp_worlds // 8192)  # theirs are for 8192 worlds
        try:
            self.env = registry.load(task, config_overrides=overrides)
        except Exception as error:  # it clones MuJoCo Menagerie from the network and fails in many ways
            raise ValueError(f"Playground could not load {task}: {' '.join(str(error).split())}") from None
        self.name, self.backend, self.task, self.model = task, backend, Task({}), self.env.mj_model
        self.episode_length = c.episode_length or int(known.episode_length)
        self.control_hz, self.action_dim = 1.0 / self.env.dt, self.env.action_size
        sizes = self.env.observation_size
        sizes = sizes if isinstance(sizes, dict) else {"state": sizes}
        sizes = {name: size if isinstance(size, int) else math.prod(size) for name, size in sizes.items()}
        self.obs_dim, self.privileged_dim = sizes["state"], sizes.get("privileged_state", sizes["state"])
        self.joystick = task.startswith("Go1Joystick")
        self.mirror = mirror_maps() if self.joystick else None
        self.randomizer = registry.get_domain_randomizer(task) if c.domain_randomization else None
        if c.domain_randomization and self.randomizer is None:
            raise ValueError(f"Playground has no domain randomisation for {task}")
        self._reset, self._step = jax.jit(jax.vmap(self.reset)), jax.jit(jax.vmap(self.step))

    def _with_constants(self, dr, function, *arguments):
        """Calls a function of the environment with this world's physical constants in its model."""
        nominal = self.env._mjx_model
        leaves, structure = jax.tree.flatten(nominal, is_leaf=_is_none)
        for index, value in dr.items():
            leaves[int(index)] = value
        self.env._mjx_model = jax.tree.unflatten(structure, leaves)
        try:
            with jax.default_matmul_precision("highest"):
                return function(*arguments)
        finally:
            self.env._mjx_model = nominal

    def _draw_constants(self, key) -> dict[str, jax.Array]:
        if self.randomizer is None:
            return {}
        model, axes = self.randomizer(self.env._mjx_model, key[None])
        values, axes = (jax.tree.leaves(tree, is_leaf=_is_none) for tree in (model, axes))
        return {str(i): x[0] for i, (x, axis) in enumerate(zip(values, axes, strict=True)) if axis == 0}

    @staticmethod
    def _obs(obs) -> dict[str, jax.Array]:
        obs = obs if isinstance(obs, dict) else {"state": obs}
        return {"state": obs["state"], "privileged_state": obs.get("privileged_state", obs["state"])}

    def reset(self, key: jax.Array, clock: jax.Array | int = 0) -> PlaygroundState:
        key = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        key, k_dr, k_reset = jax.random.split(key, 3)
        dr = self._draw_constants(k_dr)
        inner = self._with_constants(dr, self.env.reset, k_reset)
        zero, none, no, obs = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), bool), self._obs(inner.obs)
        state = PlaygroundState(
            inner, (inner.data, inner.obs), inner.data.qpos, *self._shown(inner), jnp.asarray(clock, jnp.int32), none,
            zero, key, dr, obs, zero, no, no, obs, self._metrics(inner, obs, jnp.zeros(3), zero), zero, none,
        )  # fmt: skip
        return jax.tree.map(_strong, state)

    def step(self, state: PlaygroundState, action: jax.Array) -> PlaygroundState:
        command = self._shown(state.inner)[0]
        inner = self._with_constants(state.dr, self.env.step, state.inner, jnp.clip(action, -1.0, 1.0))
        sane = jnp.isfinite(inner.data.qpos).all() & (jnp.abs(inner.data.qvel) < TOO_FAST).all()
        final_obs = jax.tree.map(lambda new, old: jnp.where(sane, new, old), self._obs(inner.obs), state.obs)
        reward = jnp.where(sane, inner.reward, 0.0)
        fallen = (inner.done > 0) & sane
        clock, length, returns = state.clock + 1, state.length + 1, state.returns + reward
        truncated = ((clock >= self.episode_length) | ~sane) & ~fallen
        done = fallen | truncated
        metrics = self._metrics(inner, final_obs, command, 1.0 - sane)
        first = jax.tree.map(lambda a, b: jnp.where(done, a, b), state.first, (inner.data, inner.obs))
        inner = inner.replace(data=first[0], obs=first[1], done=jnp.zeros_like(inner.done))
        clock, length, kept = (jnp.where(done, 0, x) for x in (clock, length, returns))
        state = PlaygroundState(
            inner, state.first, inner.data.qpos, *self._shown(inner), clock, length, kept, state.key, state.dr,
            self._obs(inner.obs), reward, fallen, truncated, final_obs, metrics, returns, state.length + 1,
        )  # fmt: skip
        return jax.tree.map(_strong, state)

    def _shown(self, inner) -> tuple[jax.Array, jax.Array]:
        """Command (3,) and foot contacts (4,), where the task has them."""
        known = inner.info if self.joystick else {}
        return known.get("command", jnp.zeros(3)), known.get("last_contact", jnp.zeros(4, bool))

    def _metrics(self, inner, obs, command, bad) -> dict[str, jax.Array]:
        metrics = {name: jnp.where(bad > 0, 0.0, value) for name, value in inner.metrics.items()}
        truth = obs["privileged_state"][48:60] if self.joystick else jnp.zeros(12)
        return metrics | {
            "lin_vel_error": jnp.linalg.norm(command[:2] - truth[9:11]),
            "yaw_vel_error": jnp.abs(command[2] - truth[2]), "nan": bad,
        }  # fmt: skip

    def reset_batch(self, keys: jax.Array, stagger: bool = False) -> PlaygroundState:
        clocks = jnp.arange(len(keys)) * self.episode_length // len(keys) * stagger
        return self._reset(keys, clocks.astype(jnp.int32))

    def step_batch(self, state: PlaygroundState, actions: jax.Array) -> PlaygroundState:
        return self._step(state, actions)

    def _drawing_model(self):
        return self.model

    @property
    def spec(self) -> dict:
        return {"task": self.name, "control_hz": self.control_hz}


def make(env_id: str, backend: str = "mjx-jax", threads: int | None = None, **options):
    """A `Go1Env` for the tasks of this file, a `PlaygroundEnv` for Playground's. options: of EnvConfig."""
    return (Go1Env if env_id in TASKS else PlaygroundEnv)(env_id, EnvConfig(**options), backend, threads)
