"""The Go1's tasks: their settings, the state of an environment, and every reward term."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.go1.robot import DEFAULT_POSE

SIGMA = 0.25  # width of the tracking terms
FOOT_HEIGHT = 0.1  # m, of a swing
SOFT_LIMIT = 0.95  # share of the joint range
POSE_WEIGHT = np.array([1.0, 1.0, 0.1] * 4, np.float32)
# probability that an axis of a new command is not zero
COMMAND_KEPT = np.array([0.9, 0.25, 0.5], np.float32)
# commands="balanced": probability that a new command is zero, or turns and does nothing else. What
# the published rule draws and keeps comes on top: each then fills a tenth of the time.
STANDS, TURNS = 0.06, 0.06
# Go1Stand: low and high of height, roll, pitch
STAND_COMMAND = np.array([[0.20, -0.2, -0.25], [0.30, 0.2, 0.25]], np.float32)
# Uniform noise on the policy's observation at noise level 1: velocity, gyro, gravity, joint positions
# and joint velocities
NOISE = np.repeat(np.array([0.1, 0.2, 0.05, 0.03, 1.5], np.float32), (3, 3, 3, 12, 12))

VELOCITY_REWARDS = dict(
    tracking_lin_vel=1.0,
    tracking_ang_vel=0.5,
    lin_vel_z=-0.5,
    ang_vel_xy=-0.05,
    orientation=-5.0,
    dof_pos_limits=-1.0,
    pose=0.5,
    termination=-1.0,
    stand_still=-1.0,
    torques=-2e-4,
    action_rate=-0.01,
    energy=-1e-3,
    feet_clearance=-2.0,
    feet_height=-0.2,
    feet_slip=-0.1,
    feet_air_time=0.1,
)
STAND_REWARDS = dict(
    height=1.0,
    tilt=1.0,
    lin_vel_xy=-0.5,
    ang_vel_z=-0.2,
    termination=-1.0,
    action_rate=-0.01,
    energy=-1e-3,
)


@dataclass(frozen=True)
class Task:
    """What one id stands for."""

    rewards: dict  # term -> scale
    rough: bool = False
    stand: bool = False  # the command is (height, roll, pitch), not a velocity
    height: float = 0.278  # of the trunk at an episode's start
    speed: float = 0.5  # largest component of the trunk's velocity (m/s, rad/s) there
    tilt: float = 0.0  # largest roll and pitch there
    joints: float = 0.0  # largest deviation of a joint from the default pose there
    episode_length: int = 1000


TASKS = {
    "Go1JoystickFlat": Task(VELOCITY_REWARDS),
    "Go1JoystickRough": Task(VELOCITY_REWARDS, rough=True, height=0.35),
    "Go1Stand": Task(
        STAND_REWARDS, stand=True, height=0.3, speed=0.2, tilt=0.1, joints=0.2, episode_length=200
    ),
}


@dataclass(frozen=True)
class EnvConfig:
    """Everything that can be set; the defaults are the published task without randomisation."""

    ctrl_dt: float = 0.02  # seconds between actions
    sim_dt: float = 0.004  # seconds of a physics step; divides ctrl_dt
    episode_length: int | None = None  # actions before the time-out; None: the task's own
    action_scale: float = 0.5  # rad of joint target per unit of action, around the default pose
    kp: float = 35.0  # N m / rad, position gain of every joint
    kd: float = 0.5  # N m s / rad, damping of every joint
    iterations: int | None = None  # of the solver; None: 1 on mjx-*, 100 (converged) on mujoco-c
    ls_iterations: int | None = None  # of its line search; None: 5 on mjx-*, 50 on mujoco-c
    noise_level: float = 1.0  # factor on the noise of the policy's observation; 0: none
    linvel: bool = True  # "state" with the body's velocity, which no sensor has (48 or 45 numbers)
    # of the joystick tasks; balanced: a tenth of the time stands, a tenth turns on the spot
    commands: Literal["published", "balanced"] = "published"
    command_range: tuple[float, float, float] = (1.5, 0.8, 1.2)  # m/s, m/s, rad/s at most
    command_time: float = 5.0  # s between commands, mean of an exponential distribution
    pushes: bool = False  # push the trunk now and then
    push_wait: tuple[float, float] = (1.0, 3.0)  # s between pushes
    push_duration: tuple[float, float] = (0.05, 0.2)  # s
    push_speed: tuple[float, float] = (0.0, 3.0)  # m/s; the impulse is mass x speed / pi
    domain_randomization: bool = False  # friction, masses, ... of each environment, for the run
    kp_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's gain, as above
    kd_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on its damping, as above
    action_latency: tuple[float, float] = (0.0, 0.0)  # s until a target acts, at most ctrl_dt
    warp_worlds: int = 8192  # mjx-warp: contacts are allocated for so many environments in all

    def __post_init__(self):
        def need(holds: bool, text: str):
            if not holds:
                raise ValueError(f"EnvConfig: {text}")

        steps = self.ctrl_dt / self.sim_dt if self.sim_dt > 0 else 0.0
        whole = steps >= 1 and abs(steps - round(steps)) < 1e-6
        need(whole, f"sim_dt {self.sim_dt} does not divide ctrl_dt")
        for name in ("episode_length", "iterations", "ls_iterations", "warp_worlds"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"{name} must be at least 1")
        for name in ("action_scale", "kp", "kd", "command_time"):
            need(getattr(self, name) > 0, f"{name} must be positive")
        low = min(self.noise_level, *self.command_range)
        need(low >= 0, "noise_level and command_range must not be negative")
        known = self.commands in ("published", "balanced")
        need(known, f"commands must be published or balanced, not {self.commands}")
        ranges = ("push_wait", "push_duration", "push_speed", "kp_factor", "kd_factor")
        for name in (*ranges, "action_latency"):
            low, high = getattr(self, name)
            need(0 <= low <= high, f"{name} must be a range (low, high) with 0 <= low <= high")
        need(self.push_duration[0] > 0, "push_duration must be positive")
        late = self.action_latency[1]
        need(late <= self.ctrl_dt + 1e-9, f"action_latency is at most ctrl_dt, {self.ctrl_dt} s")

    @property
    def substeps(self) -> int:
        return round(self.ctrl_dt / self.sim_dt)


class State(NamedTuple):
    """One environment, or N with a leading axis. The first half is carried, the second is reported."""

    qpos: jax.Array  # (19,) trunk position, quaternion (w x y z), joints
    qvel: jax.Array  # (18,) trunk velocity (world), angular velocity (trunk's frame), joints
    warmstart: jax.Array  # (18,) acceleration of the last physics step: the solver begins there
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
    dr: dict[str, jax.Array]  # this environment's physical constants; empty without randomisation
    obs: dict[str, jax.Array]  # "state" (48,) or (45,), "privileged_state" (123,)
    reward: jax.Array  # ()
    terminated: jax.Array  # () bool, the robot fell
    truncated: jax.Array  # () bool, ended otherwise: time-out, edge of the terrain, divergence
    final_obs: dict[str, jax.Array]  # what the step led to, before any reset; obs without one
    metrics: dict[str, jax.Array]  # each reward term with its scale; errors; nan
    episode_return: jax.Array  # () of the episode that this step belongs to; final where it ended
    episode_length: jax.Array  # () int32


# --- Commands -------------------------------------------------------------------------------------
# Both -> (3,). draw(low, high, *shape): uniform numbers, each used once.
def first_command(draw, task: Task, config: EnvConfig):
    """At an episode's start: each component is uniform."""
    new = _uniform_command(draw, task, config)
    return new if _as_published(task, config) else _stand_or_turn(draw, new, new)


def next_command(draw, command, task: Task, config: EnvConfig):
    """Later: each axis keeps its value with probability 1/2, else it is drawn anew, or zero."""
    uniform = _uniform_command(draw, task, config)
    if task.stand:
        return uniform
    new = uniform * (draw(0.0, 1.0, 3) < COMMAND_KEPT)
    new = jnp.where(draw(0.0, 1.0, 3) < 0.5, command, new)
    return new if _as_published(task, config) else _stand_or_turn(draw, uniform, new)


def _as_published(task: Task, config: EnvConfig) -> bool:
    return task.stand or config.commands == "published"


def _uniform_command(draw, task: Task, config: EnvConfig):
    largest = np.array(config.command_range, np.float32)
    low, high = STAND_COMMAND if task.stand else (-largest, largest)
    return draw(low, high, 3)


def _stand_or_turn(draw, uniform, otherwise):
    """Zero, or the turning rate of `uniform` alone, or `otherwise`."""
    kind = draw(0.0, 1.0)
    turn = uniform * np.array([0, 0, 1], np.float32)
    special = jnp.where(kind < STANDS, 0.0, turn)
    return jnp.where(kind < STANDS + TURNS, special, otherwise)


# --- Reward terms ---------------------------------------------------------------------------------
# Each of one environment, unscaled. q, qd (12,) joints; velocities (3,) of the IMU; feet (4, ...).
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
    speed = jnp.sqrt(jnp.linalg.norm(feet_vel[:, :2], axis=1))
    return jnp.sum(jnp.abs(feet_pos[:, 2] - FOOT_HEIGHT) * speed)


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
    """Go1Stand: gravity (3,) in the body's frame at the commanded roll and pitch, Ry(pitch) Rx(roll)."""
    roll, pitch = command[1], command[2]
    y, z = jnp.cos(pitch) * jnp.sin(roll), jnp.cos(pitch) * jnp.cos(roll)
    return jnp.stack([jnp.sin(pitch), -y, -z])


def stand_tilt(command, gravity):
    return jnp.exp(-jnp.sum((gravity - stand_gravity(command)) ** 2) / 0.02)
