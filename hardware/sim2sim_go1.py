"""A trained walking policy on another simulated Go1: the last test that a computer can make before a robot.

    python hardware/sim2sim_go1.py --policy runs/NAME/best.npz --out FOLDER     a sweep: table, CSV and video
    python hardware/sim2sim_go1.py --policy runs/NAME/best.npz --viewer         a window; the arrow keys give commands

The policy is a checkpoint of `algos/ppo_mjx_go1.py` or `algos/distill_go1.py`, which NumPy runs, or the ONNX file
of `hardware/export_go1.py`. Neither needs JAX, and nothing here imports it. The robot is `envs/go1/go1.xml` in C
MuJoCo, but driven as the real one is, and not as in training:

    50 Hz    observation -> policy -> joint targets                (the policy's own rate)
    500 Hz   torque = kp (target - angle) - kd velocity, within the motors' limits, from measured angles
    500 Hz   physics (training: 250 Hz, with the gains inside the physics)

and it is driven with what training did not have: delays on both ways, other gains, masses, friction, noise, motors that
are weaker than they should be, joints whose zero is off. Each condition of the sweep is tried with every command. It
passes if the robot never falls and its mean velocity, from the second second on, is as commanded to within the
tolerances.

No motor is ever addressed: docs/sim2sim_go1.md says why. Angles are radians, lengths metres, times seconds.
"""

import csv
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

XML = Path(__file__).resolve().parent.parent / "envs/go1/go1.xml"
LAYOUT = [["linear_velocity", 3], ["gyro", 3], ["gravity", 3], ["joint_position", 12], ["joint_velocity", 12],
          ["last_action", 12], ["command", 3]]  # fmt: skip
NOISE = np.repeat([0.1, 0.2, 0.05, 0.03, 1.5], (3, 3, 3, 12, 12))  # training's, uniform, at noise 1
MIN_OBS_STD = 1e-2  # of the policy's normalisation, as in training
TRUNK, FLOOR = 1, 0  # body and geom
UPRIGHT, LOW = (
    math.cos(math.radians(60)),
    0.12,
)  # tilted further, or the trunk lower than this: it fell
SETTLE = 1.0  # s after which velocities count
START = 0.05  # rad by which joints are off at a trial's start
COMMANDS = {  # m/s forward, m/s to the left, rad/s to the left
    "stand": (0.0, 0.0, 0.0), "walk": (0.5, 0.0, 0.0), "fast": (1.0, 0.0, 0.0), "back": (-0.5, 0.0, 0.0),
    "aside": (0.0, 0.4, 0.0), "turn": (0.0, 0.0, 0.8), "curve": (0.8, 0.0, -0.6),
}  # fmt: skip


class Sim2SimError(Exception):
    """What cannot be done, and what to do about it; one sentence."""


# ----------------------------------------------------------------------------------------------------------- policy --
class Policy:
    """An exported policy: `act` maps an observation (F,) to an action (12,) in [-1, 1]. `spec` describes the robot."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise Sim2SimError(f"there is no policy {path}")
        readers = {".npz": self._numpy, ".onnx": self._onnx}
        if self.path.suffix not in readers:
            raise Sim2SimError(
                f"{path}: a policy is a checkpoint of ppo_mjx_go1 (.npz) or its export (.onnx)"
            )
        self.spec = readers[self.path.suffix]()
        self._check()

    def _numpy(self) -> dict:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                self.mean, var = file["stats/state/mean"], file["stats/state/var"]
                layers = []
                for i in range(len(meta["args"]["hidden"]) + 1):
                    layer = f"params/actor/layers/{i}"
                    layers.append((file[f"{layer}/kernel"], file[f"{layer}/bias"]))
            spec, actions = meta["spec"], meta["shapes"]["action"]
        except Exception:  # NumPy and JSON name many kinds of damage; the reader needs one line
            text = f"{self.path} cannot be read as a checkpoint of algos/ppo_mjx_go1.py"
            raise Sim2SimError(text) from None
        kernel, bias = layers[-1]
        layers[-1] = (kernel[:, :actions], bias[:actions])  # the rest is the actions' deviation
        self.layers, self.std = layers, np.maximum(np.sqrt(var), MIN_OBS_STD)
        self.run, self.size = self._forward, len(self.mean)
        return spec

    def _forward(self, x: np.ndarray) -> np.ndarray:
        x = (x - self.mean) / self.std
        for kernel, bias in self.layers[:-1]:
            x = x @ kernel + bias
            x = x * (0.5 + 0.5 * np.tanh(0.5 * x))  # swish, without an exponential that overflows
        kernel, bias = self.layers[-1]
        return np.tanh(x @ kernel + bias)

    def _onnx(self) -> dict:
        try:
            import onnxruntime
        except ImportError:
            text = f'{self.path} needs ONNX Runtime: pip install -e ".[export]"; or give the .npz'
            raise Sim2SimError(text) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
            meta = session.get_modelmeta().custom_metadata_map
            spec = json.loads(meta["cleanrobot"])["spec"]
            self.size = session.get_inputs()[0].shape[1]
        except Exception:  # its exceptions share no base class
            raise Sim2SimError(f"{self.path} was not written by hardware/export_go1.py") from None
        self.run = lambda x: session.run(None, {"obs": x[None].astype(np.float32)})[0][0]
        return spec

    def _check(self) -> None:
        spec, task = self.spec, self.spec.get("task", "?")
        if not task.startswith("Go1Joystick") or "state_layout" not in spec:
            raise Sim2SimError(
                f"the policy was trained on {task}; this tests walking: Go1JoystickFlat or -Rough"
            )
        layout = [list(part) for part in spec["state_layout"]]
        self.blind = layout == LAYOUT[1:]
        if layout != LAYOUT[self.blind :] or self.size != 48 - 3 * self.blind:
            raise Sim2SimError(
                "the policy's observation is laid out as none of this version: train or export it again"
            )

    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs (48,) as of LAYOUT; a policy without the body's velocity gets the last 45. -> (12,) float32"""
        return np.asarray(self.run(obs[3 * self.blind :].astype(np.float32)), np.float32)


# ------------------------------------------------------------------------------------------------------------ robot --
@dataclass(frozen=True)
class Condition:
    """How this robot differs from the one in training; the defaults: not at all."""

    actuator_delay: float = 0.0  # s from the policy's answer until the motors follow it
    observation_delay: float = 0.0  # s that measurements are old
    kp: float = 1.0  # factor on the stiffness
    kd: float = 1.0  # factor on the damping
    mass: float = 1.0  # factor on all masses and inertias
    payload: float = 0.0  # kg on the trunk's middle
    friction: float = 0.6  # of the floor; training 0.6, or 0.4 to 1.0 with randomisation
    noise: float = 0.0  # times training's noise on the observation
    torque: float = 1.0  # factor on the motors' limits
    zero: float = 0.0  # rad by which each joint's zero may be off, uniformly at random
    velocity: float = (
        1.0  # factor on the estimate of the body's velocity, which no sensor of a Go1 measures
    )

    def __post_init__(self):
        for name in ("kp", "mass", "friction", "torque"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("actuator_delay", "observation_delay", "kd", "noise", "zero"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")

    @property
    def label(self) -> str:
        """What differs from the defaults, in words; "nominal" for nothing."""
        words = []
        for f in fields(self):
            value, name = getattr(self, f.name), f.name.replace("_", " ")
            if value != f.default:
                words.append(
                    f"{name} {1000 * value:g} ms" if name.endswith("delay") else f"{name} {value:g}"
                )
        return ", ".join(words) or "nominal"


def sweep_conditions() -> list[Condition]:
    """One thing at a time, then together."""
    singles = {
        "actuator_delay": (0.002, 0.006, 0.010, 0.016, 0.020, 0.030, 0.040),
        "observation_delay": (0.004, 0.010, 0.020, 0.030),
        "kp": (0.7, 0.85, 1.15, 1.3), "kd": (0.5, 2.0), "mass": (0.8, 1.15, 1.3), "payload": (1.0, 3.0),
        "friction": (0.2, 0.3, 0.4, 1.0), "noise": (1.0, 2.0), "torque": (0.8, 0.6), "zero": (0.03, 0.06),
        "velocity": (0.8, 0.5, 0.0),
    }  # fmt: skip
    late = dict(actuator_delay=0.010, observation_delay=0.010)
    together = (
        late,
        late | dict(noise=1.0),
        late | dict(noise=1.0, kp=0.85, mass=1.15, friction=0.4, zero=0.03),
    )
    return [Condition(), *(Condition(**{name: value}) for name, values in singles.items() for value in values),
            *(Condition(**changes) for changes in together)]  # fmt: skip


class Go1:
    """The robot: physics, motors with their own loop, sensors, and the time that messages take both ways.

    physics_hz, motor_hz: rates; each divides the former, and the policy's divides motor_hz. Delays are whole periods of
    the motors' loop, the nearest ones.
    """

    def __init__(self, spec: dict, condition: Condition | None = None, seed: int = 0, physics_hz: int = 500,
                 motor_hz: int = 500):  # fmt: skip
        import mujoco

        self.mujoco, self.condition, self.rng = (
            mujoco,
            condition or Condition(),
            np.random.default_rng(seed),
        )
        c, control_hz = self.condition, spec["control_hz"]
        if (
            physics_hz % motor_hz
            or abs(motor_hz / control_hz - round(motor_hz / control_hz)) > 1e-6
        ):
            raise Sim2SimError(
                f"the rates must divide each other: physics {physics_hz}, motors {motor_hz}, policy {control_hz:g} Hz"
            )
        self.substeps, self.periods = physics_hz // motor_hz, round(motor_hz / control_hz)
        self.model = model = mujoco.MjModel.from_xml_path(str(XML))
        names = [model.joint(i).name for i in range(1, model.njnt)]
        if list(spec["joints"]) != names:
            raise Sim2SimError(
                f"the policy's joints are {', '.join(spec['joints'])}; the robot's {', '.join(names)}"
            )
        model.opt.timestep = 1 / physics_hz
        self.low, self.high = model.jnt_range[1:].T.copy()
        self.limit = c.torque * np.array(spec["torque_limits"])
        self.kp, self.kd = c.kp * spec["kp"], c.kd * spec["kd"]
        self.scale, self.pose = spec["action_scale"], np.array(spec["default_pose"], np.float32)
        # The file's actuators are position servos within the physics; here they are motors that take a torque.
        model.actuator_gainprm[:, 0], model.actuator_biasprm[:], model.actuator_ctrllimited[:] = (
            1.0,
            0.0,
            0,
        )
        model.actuator_forcerange[:] = np.stack((-self.limit, self.limit), 1)
        model.dof_damping[6:] = 0.0  # it is in the motors' loop
        model.geom_friction[FLOOR, 0] = c.friction
        model.body_mass[1:] *= c.mass
        model.body_inertia[1:] *= c.mass
        model.body_mass[TRUNK] += c.payload
        self.data = mujoco.MjData(model)
        mujoco.mj_setConst(model, self.data)
        address = {model.sensor(i).name: int(model.sensor(i).adr[0]) for i in range(model.nsensor)}
        self.sensor = {
            name: slice(address[name], address[name] + 3)
            for name in ("linvel", "gyro", "world_up", "up")
        }
        self.delay = round(c.observation_delay * motor_hz)
        self.lag = round(c.actuator_delay * motor_hz)
        self.reset()

    def reset(self, qpos=None, qvel=None) -> None:
        """At rest at the default pose and height, or in a given state. Draws the joints' zeros."""
        m, d = self.mujoco, self.data
        m.mj_resetDataKeyframe(self.model, d, 0)
        if qpos is not None:
            d.qpos[:], d.qvel[:] = qpos, qvel
        self.offset = self.rng.uniform(-1, 1, 12) * self.condition.zero
        m.mj_forward(self.model, d)
        self.target = self.pose.astype(float)
        self.coming: deque[tuple[int, np.ndarray]] = (
            deque()
        )  # (period in which it arrives, joint targets)
        self.period, self.last_action, self.torque = 0, np.zeros(12, np.float32), np.zeros(12)
        self.past = deque([self._measure()] * (self.delay + 1), maxlen=self.delay + 1)

    def _measure(self) -> np.ndarray:
        """(33,): velocity of the IMU, turning rate, gravity, joint angles from the default pose, joint velocities.

        Inertial sensors are those of the last physics step's beginning, as in training.
        """
        s, d = self.data.sensordata, self.data
        return np.concatenate((
            self.condition.velocity * s[self.sensor["linvel"]], s[self.sensor["gyro"]], -s[self.sensor["world_up"]],
            d.qpos[7:] + self.offset - self.pose, d.qvel[6:],
        ))  # fmt: skip

    def observe(self, command) -> np.ndarray:
        """What the policy sees now, (48,) float32, in the order of LAYOUT."""
        measured = self.past[0] + self.rng.uniform(-1, 1, len(NOISE)) * NOISE * self.condition.noise
        return np.concatenate((measured, self.last_action, command)).astype(np.float32)

    def act(self, action: np.ndarray) -> None:
        """Sends an action on its way and lets one control period pass."""
        self.last_action = np.clip(action, -1.0, 1.0).astype(np.float32)
        self.coming.append(
            (self.period + self.lag, self.pose + np.float32(self.scale) * self.last_action)
        )
        for _ in range(self.periods):
            while self.coming and self.coming[0][0] <= self.period:
                self.target = np.clip(self.coming.popleft()[1].astype(float), self.low, self.high)
            angle, speed = self.data.qpos[7:] + self.offset, self.data.qvel[6:]
            self.torque = np.clip(
                self.kp * (self.target - angle) - self.kd * speed, -self.limit, self.limit
            )
            self.data.ctrl[:] = self.torque
            self.mujoco.mj_step(self.model, self.data, self.substeps)
            self.period += 1
            self.past.append(self._measure())

    @property
    def velocity(self) -> np.ndarray:
        """What the command is compared with: forward, to the left (m/s, of the IMU), turning (rad/s); exact."""
        s = self.data.sensordata
        return np.array((*s[self.sensor["linvel"]][:2], s[self.sensor["gyro"]][2]))

    @property
    def fallen(self) -> bool:
        """Tilted, lying, or no longer finite."""
        upright = self.data.sensordata[self.sensor["up"]][2] > UPRIGHT and self.data.qpos[2] > LOW
        return not (upright and np.isfinite(self.data.qpos).all())


# ------------------------------------------------------------------------------------------------------------ trial --
@dataclass
class Trial:
    """What became of one command under one condition."""

    command: str
    wish: np.ndarray  # (3,)
    fell: float | None  # s, or None
    velocity: np.ndarray  # mean from SETTLE on, or until the fall: (3,)
    speed_error: float  # m/s between mean and command
    turn_error: float  # rad/s
    torque: float  # largest share of a motor's limit that was used
    path: np.ndarray = field(repr=False)  # qpos at every control period (T, 19)


def trial(
    policy: Policy, condition: Condition, command: str, seconds: float, seed: int = 0, **rates
) -> Trial:
    """Stands for half a second, then follows one command for `seconds`. The joints begin up to START off, at random."""
    robot = Go1(policy.spec, condition, seed, **rates)
    begin = robot.data.qpos.copy()
    begin[7:] += np.random.default_rng((seed, 1)).uniform(-START, START, 12)
    robot.reset(begin, np.zeros(18))
    wish, still = np.array(COMMANDS[command], np.float32), np.zeros(3, np.float32)
    hz, speeds, path, used, fell = policy.spec["control_hz"], [], [], 0.0, None
    wait = round(0.5 * hz)
    for tick in range(wait + round(seconds * hz)):
        robot.act(policy.act(robot.observe(wish if tick >= wait else still)))
        path.append(robot.data.qpos.copy())
        used = max(used, float((np.abs(robot.torque) / robot.limit).max()))
        if robot.fallen:
            fell = (tick + 1 - wait) / hz
            break
        if tick >= wait + SETTLE * hz:
            speeds.append(robot.velocity)
    mean = np.mean(speeds, 0) if speeds else np.zeros(3)
    error = mean - wish
    return Trial(
        command,
        wish,
        fell,
        mean,
        float(np.hypot(*error[:2])),
        abs(float(error[2])),
        used,
        np.array(path),
    )


COLUMNS = ("condition", *(f.name for f in fields(Condition)), "passed", "reason", "trials", "falls", "missed",
           "speed_error", "turn_error", "worst", "torque_share")  # fmt: skip


def judge(
    condition: Condition, trials: list[Trial], speed_tolerance: float, turn_tolerance: float
) -> dict:
    """A row of the table: passed or not, and why not. The errors are the worst of those that did not fall."""
    falls = [t for t in trials if t.fell is not None]
    standing = [t for t in trials if t.fell is None]
    badness = lambda t: max(t.speed_error / speed_tolerance, t.turn_error / turn_tolerance)  # noqa: E731
    worst = max(standing, key=badness, default=None)
    missed, reasons = [t for t in standing if badness(t) > 1], []
    if falls:
        words = [f"{t.command} after {t.fell:.1f} s" for t in falls[:3]] + ["…"] * (len(falls) > 3)
        reasons.append("fell: " + ", ".join(words))
    if missed:
        reasons.append(
            f"{worst.command}: {worst.speed_error:.2f} m/s and {worst.turn_error:.2f} rad/s off"
        )
    reason = "; ".join(reasons)
    return {
        "condition": condition.label, **asdict(condition), "passed": not reason, "reason": reason,
        "trials": len(trials), "falls": len(falls), "missed": len(missed),
        "speed_error": max((t.speed_error for t in standing), default=math.nan),
        "turn_error": max((t.turn_error for t in standing), default=math.nan),
        "worst": worst.command if worst else "", "torque_share": max(t.torque for t in trials),
    }  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """The table for people: of all trials, how many fell, how many stood but missed the command."""
    lines = ["| condition | result | trials | fell | missed | worst error, m/s | rad/s | motors used | reason |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        errors = (
            f"{row[key]:.2f}" if math.isfinite(row[key]) else "–"
            for key in ("speed_error", "turn_error")
        )
        lines.append(f"| {row['condition']} | {'pass' if row['passed'] else '**fail**'} | {row['trials']} | "
                     f"{row['falls']} | {row['missed']} | "
                     f"{' | '.join(errors)} | {100 * row['torque_share']:.0f} % | {row['reason']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def by_command(trials: list[Trial]) -> str:
    """The table of one condition's commands, for people: means over their trials."""
    lines = ["| command | forward, left m/s, turning rad/s | reached | fell |", "|---|---|---|---|"]
    for name in dict.fromkeys(t.command for t in trials):
        same = [t for t in trials if t.command == name]
        means = same[0].wish, np.mean([t.velocity for t in same], 0)
        wish, reached = (", ".join(f"{v:.2f}" for v in np.round(row, 2) + 0.0) for row in means)
        lines.append(
            f"| {name} | {wish} | {reached} | {sum(t.fell is not None for t in same)} of {len(same)} |"
        )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- looking --
class Camera:
    """Images of the robot by OpenGL without a screen (EGL)."""

    def __init__(self, model, width: int = 480, height: int = 360):
        from envs import check  # asks in a process of its own: a broken driver may end it

        egl = check.ask("egl")
        if not egl.works:
            raise Sim2SimError(
                f"no video can be drawn ({egl.detail}): sudo apt-get install libegl1 libgl1-mesa-dri, or --no-video"
            )
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        import mujoco
        from mujoco.egl import GLContext

        self.mujoco, self.model, self.data, self.size = (
            mujoco,
            model,
            mujoco.MjData(model),
            (width, height),
        )
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self.gl = GLContext(width, height)
        self.gl.make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.scene, self.options, self.view = (
            mujoco.MjvScene(model, 500),
            mujoco.MjvOption(),
            mujoco.MjvCamera(),
        )
        self.options.geomgroup[3] = 1  # the feet
        self.view.type, self.view.fixedcamid = (
            mujoco.mjtCamera.mjCAMERA_FIXED,
            model.camera("track").id,
        )

    def draw(self, qpos: np.ndarray, text: str = "") -> np.ndarray:
        """-> uint8 (height, width, 3)"""
        m, rectangle = self.mujoco, self.mujoco.MjrRect(0, 0, *self.size)
        self.data.qpos[:] = qpos
        for part in (m.mj_kinematics, m.mj_comPos, m.mj_camlight):
            part(self.model, self.data)
        m.mjv_updateScene(
            self.model,
            self.data,
            self.options,
            None,
            self.view,
            m.mjtCatBit.mjCAT_ALL.value,
            self.scene,
        )
        image = np.empty((self.size[1], self.size[0], 3), np.uint8)
        m.mjr_render(rectangle, self.scene, self.context)
        if text:
            m.mjr_overlay(
                m.mjtFont.mjFONT_NORMAL,
                m.mjtGridPos.mjGRID_TOPLEFT,
                rectangle,
                text,
                "",
                self.context,
            )
        m.mjr_readPixels(image, None, rectangle, self.context)
        return image[::-1]  # OpenGL's first row is the lowest

    def close(self) -> None:
        self.context.free()
        self.gl.free()


FILMED = (
    Condition(),
    Condition(actuator_delay=0.020),
    Condition(actuator_delay=0.040),
    Condition(friction=0.3),
)


def film(path: Path, policy: Policy, shown: list[tuple[str, np.ndarray]], fps: int = 25) -> None:
    """A video of walks (text, qpos (T, 19)), four beside one another; a shorter one stays at its end."""
    import imageio.v2 as imageio

    camera = Camera(Go1(policy.spec).model, 320, 240)
    every = max(1, round(policy.spec["control_hz"] / fps))
    writer = imageio.get_writer(
        path, fps=policy.spec["control_hz"] / every, macro_block_size=1, quality=4
    )
    try:
        for at in range(0, max(len(path) for _, path in shown), every):
            tiles = [camera.draw(path[min(at, len(path) - 1)], text) for text, path in shown]
            rows = [np.concatenate(tiles[i : i + 2], 1) for i in range(0, len(tiles), 2)]
            writer.append_data(np.concatenate(rows, 0))
    finally:
        writer.close()
        camera.close()


def viewer(policy: Policy, condition: Condition) -> None:
    """A window in real time. Arrow up, down: forward speed; left, right: turning; comma, period: sideways; space: stop;
    backspace: begin anew.
    """
    try:
        import mujoco.viewer
    except ImportError as error:
        raise Sim2SimError(f"--viewer needs MuJoCo's window: {error}") from None
    robot, command = Go1(policy.spec, condition), np.zeros(3, np.float32)
    keys = {
        265: (0, 0.1),
        264: (0, -0.1),
        263: (2, 0.2),
        262: (2, -0.2),
        ord(","): (1, 0.1),
        ord("."): (1, -0.1),
    }
    largest, again = np.array((1.5, 0.8, 1.2)), [False]

    def pressed(key: int) -> None:
        if key in keys:
            axis, change = keys[key]
            command[axis] = np.clip(command[axis] + change, -largest[axis], largest[axis])
        elif key == 32:
            command[:] = 0
        elif key == 259:
            again[0] = True
        print(
            f"forward {command[0]:+.1f} m/s, left {command[1]:+.1f} m/s, turning {command[2]:+.1f} rad/s",
            flush=True,
        )

    try:
        window = mujoco.viewer.launch_passive(robot.model, robot.data, key_callback=pressed)
    except Exception as error:  # what the window system answers has no common class
        text = (
            f"no window can be opened here ({error}); leave --viewer away for a table and a video"
        )
        raise Sim2SimError(text) from None
    with window:
        due = time.monotonic()
        while window.is_running():
            if again[0] or robot.fallen and robot.data.qpos[2] < LOW:
                robot.reset()
                again[0] = False
            robot.act(policy.act(robot.observe(command)))
            window.sync()
            due = max(due + 1 / policy.spec["control_hz"], time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))


# ---------------------------------------------------------------------------------------------------------- command --
@dataclass
class Args:
    policy: str  # checkpoint of algos/ppo_mjx_go1.py (.npz), or its export (.onnx)
    out: str | None = None  # folder for sweep.csv, sweep.md, walk.mp4; None: only print the table
    seconds: float = 5.0  # of each command
    repeats: int = 3  # of each command, with another start, other noise and other zeros
    speed_tolerance: float = 0.25  # m/s by which the mean velocity may be off
    turn_tolerance: float = 0.3  # rad/s, likewise
    seed: int = 0  # of starts, noise and zeros
    physics_hz: int = 500  # steps of the physics a second
    motor_hz: int = 500  # of the motors' loop
    video: bool = True  # with --out: a video of four conditions at 1 m/s
    viewer: bool = False  # a window instead of the sweep: arrows, comma, period, space, backspace
    condition: Condition = field(default_factory=Condition)  # with --viewer: the robot to drive


def main(args: Args) -> list[dict]:
    """The sweep's rows. Raises Sim2SimError."""
    if (
        args.seconds <= SETTLE
        or args.repeats < 1
        or min(args.speed_tolerance, args.turn_tolerance) <= 0
    ):
        raise Sim2SimError(
            f"--seconds must be above {SETTLE:g}, --repeats at least 1, tolerances positive"
        )
    try:
        import mujoco  # noqa: F401
    except ImportError:
        raise Sim2SimError(
            'MuJoCo is missing: pip install -e ".[go1]" (or just pip install mujoco)'
        ) from None
    policy = Policy(args.policy)
    rates = dict(physics_hz=args.physics_hz, motor_hz=args.motor_hz)
    Go1(policy.spec, **rates)  # says now what does not fit
    if args.viewer:
        viewer(policy, args.condition)
        return []
    rows, nominal, began = [], [], time.monotonic()
    for condition in sweep_conditions():
        trials = [trial(policy, condition, command, args.seconds, args.seed + i, **rates)
                  for command in COMMANDS for i in range(args.repeats)]  # fmt: skip
        nominal = nominal or trials  # the first condition
        rows.append(judge(condition, trials, args.speed_tolerance, args.turn_tolerance))
        verdict = "pass" if rows[-1]["passed"] else "FAIL"
        print(
            f"{verdict}  {rows[-1]['condition']}"
            + f": {rows[-1]['reason']}" * bool(rows[-1]["reason"]),
            flush=True,
        )
    print(
        f"{sum(row['passed'] for row in rows)} of {len(rows)} passed in {time.monotonic() - began:.0f} s"
    )
    if args.out:
        out = Path(args.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with (out / "sweep.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                for row in rows:
                    writer.writerow(
                        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                    )
            (out / "sweep.md").write_text(markdown(rows) + "\n" + by_command(nominal))
        except OSError as error:
            raise Sim2SimError(f"{out} cannot be written: {error.strerror}") from None
        if args.video:
            walks = [
                trial(policy, condition, "fast", args.seconds, args.seed, **rates)
                for condition in FILMED
            ]
            film(
                out / "walk.mp4",
                policy,
                [(f"{c.label}, 1 m/s", t.path) for c, t in zip(FILMED, walks, strict=True)],
            )
        print(f"wrote {out}/sweep.csv, sweep.md" + ", walk.mp4" * args.video)
    return rows


def command() -> int:
    """The command line. -> exit status: 0 even where conditions fail, which is what the table is for; 2 refused."""
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (Sim2SimError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
