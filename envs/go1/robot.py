"""The Go1's model and its closed-form kinematics, the terrain, and what randomisation varies."""

from pathlib import Path

import jax.numpy as jnp
import mujoco
import numpy as np

LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{joint}" for leg in LEGS for joint in ("hip", "thigh", "calf"))
# zero action; hips point outwards
DEFAULT_POSE = np.array([0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2, np.float32)
TRUNK, FLOOR = 1, 0  # body and geom ids
HIP = np.array([[x, y, 0] for x in (0.1881, -0.1881) for y in (-0.04675, 0.04675)], np.float32)
SIDE = np.array([-1.0, 1.0, -1.0, 1.0], np.float32)  # right legs are at -y
ABDUCTION, THIGH, CALF, FOOT_RADIUS = 0.08, 0.213, 0.213, 0.023
# in the trunk's frame; off-centre, so it feels turning
IMU = np.array([-0.01592, -0.06659, -0.00617], np.float32)
GRAVITY = 9.81
TERRAIN_HALF, TERRAIN_HEIGHT, TERRAIN_SIZE = 10.0, 0.05, 256  # metres, metres, points a side

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


def build_model(
    config, rough: bool, iterations: int, ls_iterations: int, drawn: bool = True
) -> mujoco.MjModel:
    """The compiled model; gains and time step are the configuration's. drawn: with what only looks."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("go1.xml")))
    if not drawn:
        for geom in [geom for geom in spec.geoms if not (geom.contype or geom.conaffinity)]:
            spec.delete(geom)
    if rough:
        spec.add_hfield(
            name="terrain",
            nrow=TERRAIN_SIZE,
            ncol=TERRAIN_SIZE,
            size=[TERRAIN_HALF, TERRAIN_HALF, TERRAIN_HEIGHT, 1.0],
            userdata=terrain_heights().ravel(),
        )
        floor = spec.geom("floor")
        floor.type = mujoco.mjtGeom.mjGEOM_HFIELD
        floor.hfieldname = "terrain"
        floor.friction[0] = 1.0
    model = spec.compile()
    model.opt.timestep = config.sim_dt
    model.opt.iterations, model.opt.ls_iterations = iterations, ls_iterations
    model.actuator_gainprm[:, 0] = config.kp
    model.actuator_biasprm[:, 1] = -config.kp
    model.dof_damping[6:] = config.kd
    return model


def terrain_heights(seed: int = 0) -> np.ndarray:
    """Heights (TERRAIN_SIZE, TERRAIN_SIZE) in [0, 1]: value noise of four octaves, 2.5 m to 0.3 m."""
    rng = np.random.default_rng(seed)
    total = np.zeros((TERRAIN_SIZE, TERRAIN_SIZE))
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


def sensors_at(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Name of each quantity that is measured -> its indices in MuJoCo's sensor data."""
    start = {model.sensor(i).name: int(model.sensor(i).adr[0]) for i in range(model.nsensor)}
    body = ("gyro", "linvel", "accelerometer", "up", "world_up", "world_linvel", "world_angvel")
    at = {name: start[name] + np.arange(3) for name in body}
    for what in ("pos", "vel"):
        feet = np.array([start[f"{leg}_{what}"] for leg in LEGS])
        at[f"feet_{what}"] = feet[:, None] + np.arange(3)
    at["contact"] = np.array([start[f"{leg}_contact"] for leg in LEGS])
    at["torque"] = np.array([start[f"{joint}_torque"] for joint in JOINTS])
    return at


def rotation(quat):
    """Rotation matrix (3, 3), body to world, of a quaternion (w, x, y, z) of any length."""
    w, x, y, z = quat / jnp.linalg.norm(quat)
    return jnp.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(roll, pitch, yaw):
    """Quaternion (w, x, y, z) of the rotation Rz(yaw) Ry(pitch) Rx(roll)."""
    cr, cp, cy = jnp.cos(roll / 2), jnp.cos(pitch / 2), jnp.cos(yaw / 2)
    sr, sp, sy = jnp.sin(roll / 2), jnp.sin(pitch / 2), jnp.sin(yaw / 2)
    w = cr * cp * cy + sr * sp * sy
    x = sr * cp * cy - cr * sp * sy
    y = cr * sp * cy + sr * cp * sy
    z = cr * cp * sy - sr * sp * cy
    return jnp.stack([w, x, y, z])


def foot_positions(joints):
    """Joints (12,) -> feet (4, 3) in the trunk's frame."""
    hip, thigh, calf = joints.reshape(4, 3).T
    x = -THIGH * jnp.sin(thigh) - CALF * jnp.sin(thigh + calf)
    z = -THIGH * jnp.cos(thigh) - CALF * jnp.cos(thigh + calf)
    y = SIDE * ABDUCTION
    sideways = y * jnp.cos(hip) - z * jnp.sin(hip)
    down = y * jnp.sin(hip) + z * jnp.cos(hip)
    return HIP + jnp.stack([x, sideways, down], axis=1)
