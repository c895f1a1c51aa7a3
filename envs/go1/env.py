"""The Go1 environment: reset, step, observations, commands, pushes, randomisation.

All functions of one robot are pure; `reset_batch` and `step_batch` vectorise them. Where the package's
docstring numbers a difference from Playground's task, the code says `# differs (n)`.
"""

import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np

from envs.go1 import robot
from envs.go1 import task as terms
from envs.go1.backends import BACKENDS, make_physics
from envs.go1.render import Renderer
from envs.go1.robot import DEFAULT_POSE, TRUNK
from envs.go1.task import NOISE, TASKS, EnvConfig, State

TOO_FAST = 1e3  # m/s or rad/s: beyond it, or not finite, the physics has diverged
TERRAIN_MARGIN = 0.5  # m from the edge at which an episode ends


class Draws:
    """Uniform numbers from one call of the generator: a call for each would be most of the program."""

    def __init__(self, key, size: int):
        self.left = jax.random.uniform(key, (size,))

    def __call__(self, low, high, *shape):
        n = math.prod(shape)
        taken, self.left = self.left[:n].reshape(shape), self.left[n:]
        return low + taken * (high - low)


class Go1Env:
    """One task on one back end, for any number of robots. It keeps envs/__init__.py's contract for JAX."""

    action_dim, privileged_dim = 12, 123

    def __init__(
        self,
        env_id: str,
        config: EnvConfig | None = None,
        backend: str = "mjx-jax",
        threads: int | None = None,
    ):
        """threads: of mujoco-c; None: all cores. Raises ValueError, in one line, for a name unknown."""
        if env_id not in TASKS:
            raise ValueError(f"no task is called {env_id}; there are {', '.join(TASKS)}")
        if backend not in BACKENDS:
            raise ValueError(f"no back end is called {backend}; there are {', '.join(BACKENDS)}")
        self.name, self.task, self.backend = env_id, TASKS[env_id], backend
        self.config = c = config or EnvConfig()
        few, few_of_line_search = (100, 50) if backend == "mujoco-c" else (1, 5)
        iterations = c.iterations or few, c.ls_iterations or few_of_line_search
        self.model = robot.build_model(c, self.task.rough, *iterations)
        simulated = robot.build_model(c, self.task.rough, *iterations, drawn=False)
        self.physics = make_physics(backend, simulated, self.task, c, threads)
        self.episode_length = c.episode_length or self.task.episode_length
        self.control_hz = 1.0 / c.ctrl_dt
        self.obs_dim = 48 if c.linvel else 45
        self.mass = float(self.model.body_subtreemass[TRUNK])
        limits = self.model.jnt_range[1:].astype(np.float32)
        self.soft_lower, self.soft_upper = terms.SOFT_LIMIT * limits.T
        self._sensors = robot.sensors_at(self.model)
        self._renderer = None
        self._reset, self._step = jax.jit(jax.vmap(self.reset)), jax.jit(self._step_all)
        self._targets, self._finish = (jax.jit(jax.vmap(f)) for f in (self.targets, self.finish))

    # --- many robots ------------------------------------------------------------------------------
    def reset_batch(self, keys: jax.Array, stagger: bool = False) -> State:
        """N robots from N keys. stagger: spread the clocks over an episode, so that ends are spread."""
        with self._device():
            clocks = np.arange(len(keys)) * self.episode_length // len(keys) * stagger
            return self._reset(keys, clocks.astype(np.int32))

    def step_batch(self, state: State, actions: jax.Array) -> State:
        """actions (N, 12) in [-1, 1] -> the next State. Pure on every back end.

        In C and outside a compiled program no callback is needed, which JAX could not cache.
        """
        traced = isinstance(state.qpos, jax.core.Tracer) or isinstance(actions, jax.core.Tracer)
        if traced or self.backend != "mujoco-c":
            return self._step(state, actions)
        with self._device():
            targets, force = self._targets(state, actions)
            carried = state.qpos, state.qvel, state.warmstart
            moved = self.physics.run(*carried, targets, force, state.dr)
            return self._finish(state, actions, *moved)

    def _device(self):
        """mujoco-c lives on the CPU, whatever else the machine has."""
        if self.backend != "mujoco-c":
            return nullcontext()
        return jax.default_device(jax.devices("cpu")[0])

    def _step_all(self, state: State, actions: jax.Array) -> State:
        targets, force = jax.vmap(self.targets)(state, actions)
        carried = state.qpos, state.qvel, state.warmstart
        moved = self.physics.simulate(*carried, targets, force, state.dr)
        return jax.vmap(self.finish)(state, actions, *moved)

    # --- one robot --------------------------------------------------------------------------------
    def reset(self, key: jax.Array, clock: jax.Array | int = 0) -> State:
        """An episode's start. clock > 0: it times out so many steps earlier (staggering)."""
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key, sub = jax.random.split(jax.random.key_data(key) if typed else key)
        draw = Draws(sub, 256)
        dr = self._draw_constants(draw)
        carried, measured = self._begin(draw, dr)
        carried["clock"] = jnp.asarray(clock, jnp.int32)
        obs = self._observe(carried, measured, jnp.zeros(3), self._noise(draw))
        no, zero = jnp.zeros((), bool), jnp.zeros(())
        state = State(
            **carried,
            key=key,
            dr=dr,
            obs=obs,
            reward=zero,
            terminated=no,
            truncated=no,
            final_obs=obs,
            metrics=dict.fromkeys(self.metric_names, zero),
            episode_return=zero,
            episode_length=jnp.zeros((), jnp.int32),
        )
        return jax.tree.map(_strong, state)

    def targets(self, state: State, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Joint targets (substeps, 12) and the force (3,) on the trunk for the step to come."""
        new = DEFAULT_POSE + self.config.action_scale * jnp.clip(action, -1.0, 1.0)
        old = DEFAULT_POSE + self.config.action_scale * state.last_action
        late = jnp.arange(self.config.substeps)[:, None] < state.delay
        return jnp.where(late, old, new), self.push_force(state.push)

    def push_force(self, push: jax.Array) -> jax.Array:
        """Force (3,) now: half a sine over the push, whose impulse is mass x speed / pi."""
        if not self.config.pushes:
            return jnp.zeros(3)
        since, wait, duration, speed, direction = push
        t = since - wait
        size = 0.5 * jnp.sin(math.pi * t / duration) * self.mass * speed / duration
        size = jnp.where((t >= 0) & (t < duration), size, 0.0)
        return size * jnp.stack([jnp.cos(direction), jnp.sin(direction), jnp.zeros(())])

    def finish(self, state: State, action, qpos, qvel, warmstart, sensors, overflow) -> State:
        """What follows the physics: reward, end of the episode, next command and push, reset."""
        c = self.config
        key, sub = jax.random.split(state.key)
        draw = Draws(sub, 128)
        action = jnp.clip(action, -1.0, 1.0)
        slow = (jnp.abs(qvel) < TOO_FAST).all()
        sane = slow & jnp.isfinite(qpos).all() & jnp.isfinite(sensors).all()  # differs (4)
        m = {name: sensors[index] for name, index in self._sensors.items()}
        m["contact"] = m["contact"] > 0
        first_contact = (state.air_time > 0) & (m["contact"] | state.contact)
        air_time = state.air_time + c.ctrl_dt
        swing_peak = jnp.maximum(state.swing_peak, m["feet_pos"][:, 2])
        force = self.push_force(state.push)

        fallen = (m["up"][2] < 0.0) & sane
        feet = first_contact, air_time, swing_peak
        unscaled = self._terms(state, action, qpos, qvel, m, fallen, *feet)
        scaled = {name: scale * unscaled[name] for name, scale in self.task.rewards.items()}
        reward = jnp.where(sane, jnp.clip(sum(scaled.values()) * c.ctrl_dt, 0.0, 1e4), 0.0)
        metrics = {f"reward/{name}": value for name, value in scaled.items()}
        metrics |= self._errors(state.command, m, qpos)
        moved = jnp.abs(action - state.last_action).mean()
        metrics["action_rate"] = moved * c.action_scale / c.ctrl_dt  # rad/s of the joint targets
        metrics = {name: jnp.where(sane, value, 0.0) for name, value in metrics.items()}
        metrics["nan"] = 1.0 - sane
        metrics["overflow"] = overflow.astype(jnp.float32)

        clock, length, returns = state.clock + 1, state.length + 1, state.returns + reward
        over = (clock >= self.episode_length) | self._off_terrain(qpos) | ~sane
        truncated = over & ~fallen  # differs (3)
        done = fallen | truncated
        command, timer = self._next_command(draw, state.command, state.command_timer - 1)
        carried = dict(
            qpos=qpos,
            qvel=qvel,
            warmstart=warmstart,
            command=command,
            command_timer=timer,
            last_action=action,
            air_time=air_time,
            swing_peak=swing_peak,
            contact=m["contact"],
            push=self._next_push(draw, state.push),
            delay=state.delay,
            clock=clock,
            length=length,
            returns=returns,
        )
        noise = self._noise(draw)
        final_obs = self._observe(carried, m, force, noise)  # differs (2)
        final_obs = jax.tree.map(lambda new, old: jnp.where(sane, new, old), final_obs, state.obs)
        for name in ("air_time", "swing_peak"):
            carried[name] = carried[name] * ~m["contact"]
        fresh, at_start = self._begin(draw, state.dr)  # differs (1)
        carried = {name: jnp.where(done, fresh[name], value) for name, value in carried.items()}
        first_obs = self._observe(fresh, at_start, jnp.zeros(3), noise)
        obs = jax.tree.map(lambda a, b: jnp.where(done, a, b), first_obs, final_obs)
        state = State(
            **carried,
            key=key,
            dr=state.dr,
            obs=obs,
            reward=reward,
            terminated=fallen,
            truncated=truncated,
            final_obs=final_obs,
            metrics=metrics,
            episode_return=returns,
            episode_length=length,
        )
        return jax.tree.map(_strong, state)

    # --- reward and ends --------------------------------------------------------------------------
    @property
    def metric_names(self) -> list[str]:
        names = [f"reward/{name}" for name in self.task.rewards]
        names += ["lin_vel_error", "yaw_vel_error", "action_rate"]
        if self.task.stand:
            names += ["height_error", "tilt_error"]
        return [*names, "nan", "overflow"]

    def _terms(self, state, action, qpos, qvel, m, fallen, first_contact, air_time, swing_peak):
        """Every term of the task, unscaled. m: what the sensors read."""
        q, qd, command = qpos[7:], qvel[6:], state.command
        common = {
            "termination": terms.termination(fallen),
            "action_rate": terms.action_rate(action, state.last_action),
            "energy": terms.energy(qd, m["torque"]),
        }
        if self.task.stand:
            return common | {
                "height": terms.stand_height(command, qpos[2]),
                "tilt": terms.stand_tilt(command, -m["world_up"]),
                "lin_vel_xy": jnp.sum(m["world_linvel"][:2] ** 2),
                "ang_vel_z": m["world_angvel"][2] ** 2,
            }
        return common | {
            "tracking_lin_vel": terms.tracking_lin_vel(command, m["linvel"]),
            "tracking_ang_vel": terms.tracking_ang_vel(command, m["gyro"]),
            "lin_vel_z": terms.lin_vel_z(m["world_linvel"]),
            "ang_vel_xy": terms.ang_vel_xy(m["world_angvel"]),
            "orientation": terms.orientation(m["up"]),
            "dof_pos_limits": terms.dof_pos_limits(q, self.soft_lower, self.soft_upper),
            "pose": terms.pose(q),
            "stand_still": terms.stand_still(command, q),
            "torques": terms.torques(m["torque"]),
            "feet_clearance": terms.feet_clearance(m["feet_pos"], m["feet_vel"]),
            "feet_height": terms.feet_height(swing_peak, first_contact, command),
            "feet_slip": terms.feet_slip(m["feet_vel"], m["contact"], command),
            "feet_air_time": terms.feet_air_time(air_time, first_contact, command),
        }

    def _errors(self, command, m, qpos) -> dict[str, jax.Array]:
        """Distance of the measured from the commanded velocity: m/s in the plane, rad/s about z."""
        wanted = jnp.zeros(3) if self.task.stand else command
        errors = {
            "lin_vel_error": jnp.linalg.norm(wanted[:2] - m["linvel"][:2]),
            "yaw_vel_error": jnp.abs(wanted[2] - m["gyro"][2]),
        }
        if self.task.stand:
            errors["height_error"] = jnp.abs(qpos[2] - command[0])
            cosine = jnp.sum(-m["world_up"] * terms.stand_gravity(command))
            errors["tilt_error"] = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
        return errors

    def _off_terrain(self, qpos):
        edge = robot.TERRAIN_HALF - TERRAIN_MARGIN
        return (jnp.abs(qpos[:2]) > edge).any() & self.task.rough  # differs (6)

    # --- commands and pushes ----------------------------------------------------------------------
    def _draw_command_time(self, draw):
        seconds = -self.config.command_time * jnp.log1p(-draw(0.0, 1.0))
        return jnp.round(seconds / self.config.ctrl_dt).astype(jnp.int32)

    def _next_command(self, draw, command, timer):
        """At 0 the next command, and the time until the one after it."""
        new = terms.next_command(draw, command, self.task, self.config)
        due = timer <= 0
        next_timer = jnp.where(due, self._draw_command_time(draw), timer)
        return jnp.where(due, new, command), next_timer

    def _draw_push(self, draw):
        c = self.config
        if not c.pushes:
            return jnp.zeros(5)
        ranges = [c.push_wait, c.push_duration, c.push_speed, (0.0, 2 * math.pi)]
        low, high = np.array(ranges, np.float32).T
        return jnp.concatenate([jnp.zeros(1), draw(low, high, 4)])

    def _next_push(self, draw, push):
        if not self.config.pushes:
            return push
        later = push.at[0].add(self.config.ctrl_dt)
        over = later[0] >= push[1] + push[2]
        return jnp.where(over, self._draw_push(draw), later)  # differs (5)

    # --- start and observation --------------------------------------------------------------------
    def _begin(self, draw, dr) -> tuple[dict, dict]:
        """What an episode starts from: the carried fields, and what the sensors read."""
        t = self.task
        xy, velocity = draw(-0.5, 0.5, 2), draw(-t.speed, t.speed, 6)
        yaw = draw(-math.pi, math.pi)
        roll, pitch = draw(-t.tilt, t.tilt, 2)
        joints = DEFAULT_POSE + draw(-t.joints, t.joints, 12)
        quat = robot.quaternion(roll, pitch, yaw)
        qpos = jnp.concatenate([xy, jnp.full(1, t.height), quat, joints])
        delay = draw(*self.config.action_latency) / self.config.sim_dt
        measured = self._measure_at_start(qpos, velocity, dr)
        carried = dict(
            qpos=qpos,
            qvel=jnp.concatenate([velocity, jnp.zeros(12)]),
            warmstart=jnp.zeros(18),
            command=terms.first_command(draw, self.task, self.config),
            command_timer=self._draw_command_time(draw),
            last_action=jnp.zeros(12),
            air_time=jnp.zeros(4),
            swing_peak=jnp.zeros(4),
            contact=measured["contact"],
            push=self._draw_push(draw),
            delay=jnp.round(delay).astype(jnp.int32),
            clock=jnp.zeros((), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            returns=jnp.zeros(()),
        )
        return carried, measured

    def _measure_at_start(self, qpos, velocity, dr) -> dict[str, jax.Array]:
        """What the sensors read there, in closed form.  # differs (7)"""
        turn = robot.rotation(qpos[3:7])
        linear, angular = velocity[:3], velocity[3:]  # of the trunk's origin; in the trunk's frame
        at_imu = turn.T @ linear + jnp.cross(angular, robot.IMU)
        joints = qpos[7:]
        arms = robot.foot_positions(joints - dr["qpos0"] if "qpos0" in dr else joints) @ turn.T
        feet_pos = qpos[:3] + arms
        floor = 0.0 if self.task.rough else robot.FOOT_RADIUS
        return dict(
            gyro=angular,
            linvel=at_imu,
            accelerometer=robot.GRAVITY * turn[2],
            up=turn[:, 2],
            world_up=turn[2],
            world_linvel=turn @ at_imu,
            world_angvel=turn @ angular,
            feet_pos=feet_pos,
            feet_vel=linear + jnp.cross(turn @ angular, arms),
            torque=jnp.zeros(12),
            contact=feet_pos[:, 2] < floor,
        )

    def _noise(self, draw):
        return draw(-1.0, 1.0, len(NOISE)) * NOISE * self.config.noise_level

    def _observe(self, carried, m, force, noise) -> dict[str, jax.Array]:
        """ "privileged_state" (123,) begins with the 48 noisy numbers of which "state" is the end."""
        q, qd = carried["qpos"][7:] - DEFAULT_POSE, carried["qvel"][6:]
        gravity = -m["world_up"]
        noisy = jnp.concatenate([m["linvel"], m["gyro"], gravity, q, qd]) + noise
        pushed = (force != 0).any(keepdims=True)
        parts = [
            noisy,
            carried["last_action"],
            carried["command"],
            m["gyro"],
            m["accelerometer"],
            gravity,
            m["linvel"],
            m["world_angvel"],
            q,
            qd,
            m["torque"],
            carried["contact"].astype(jnp.float32),
            m["feet_vel"].ravel(),
            carried["air_time"],
            force,
            pushed.astype(jnp.float32),
        ]
        privileged = jnp.concatenate(parts)
        return {"state": privileged[48 - self.obs_dim : 48], "privileged_state": privileged}

    # --- randomisation ----------------------------------------------------------------------------
    def _draw_constants(self, draw) -> dict[str, jax.Array]:
        """This robot's physical constants: those that vary, and no others."""
        c, dr = self.config, {}
        if c.domain_randomization:
            nominal = self.model
            dr["friction"] = draw(0.4, 1.0)
            dr["frictionloss"] = _single(nominal.dof_frictionloss[6:]) * draw(0.9, 1.1, 12)
            dr["armature"] = _single(nominal.dof_armature[6:]) * draw(1.0, 1.05, 12)
            dr["com"] = _single(nominal.body_ipos[TRUNK]) + draw(-0.05, 0.05, 3)
            mass = _single(nominal.body_mass[1:]) * draw(0.9, 1.1, 13)
            dr["mass"] = mass.at[0].add(draw(-1.0, 1.0))
            dr["qpos0"] = draw(-0.05, 0.05, 12)
        if c.kp_factor != (1.0, 1.0):
            dr["kp"] = c.kp * draw(*c.kp_factor, 12)
        if c.kd_factor != (1.0, 1.0):
            dr["kd"] = c.kd * draw(*c.kd_factor, 12)
        return dr

    # --- for people and robots --------------------------------------------------------------------
    def render(self, qpos, size: tuple[int, int] = (360, 480)) -> np.ndarray:
        """qpos (T, 19) -> uint8 (T, height, width, 3); size: (height, width)."""
        height, width = size
        if self._renderer is None or self._renderer.size != (width, height):
            self._renderer = Renderer(self.model, width, height)
        return np.stack([self._renderer.draw(moment) for moment in np.asarray(qpos)])

    @property
    def spec(self) -> dict:
        """What a robot needs to run a policy, as plain values."""
        layout = [
            ["linear_velocity", 3],
            ["gyro", 3],
            ["gravity", 3],
            ["joint_position", 12],
            ["joint_velocity", 12],
            ["last_action", 12],
            ["command", 3],
        ]
        return {
            "task": self.name,
            "joints": list(robot.JOINTS),
            "control_hz": self.control_hz,
            "kp": self.config.kp,
            "kd": self.config.kd,
            "default_pose": DEFAULT_POSE.tolist(),
            "action_scale": self.config.action_scale,
            "joint_limits": self.model.jnt_range[1:].tolist(),
            "torque_limits": self.model.actuator_forcerange[:, 1].tolist(),
            "state_layout": layout if self.config.linvel else layout[1:],
        }


def _single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _strong(x):
    """Without JAX's weak type, for which a second call would compile again."""
    return jax.lax.convert_element_type(x, jnp.asarray(x).dtype)
