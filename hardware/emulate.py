"""A whole SO-101 that is not there: emulated servos in front of the driver, a rendered camera, a scene that answers.

`EmulatedArm` puts the servos of `hardware/emulator.py` into an episode of `envs/so101`, under one virtual clock: the
arm of the scene stands where the servos' shafts stand, objects obey MuJoCo, the camera draws the scene as a frame of
640 x 480, and the environment's own rule says whether the task was solved. Bytes go through `hardware/feetech.py` and
images through `hardware/camera.py`, exactly as with the real arm.

    python -m hardware.emulate --checkpoint runs/NAME/best.pt --latency-periods 0 1 2 --out NAME.csv

measures a policy in closed loop over 64 episodes, beside the simulator's own rate on the same episodes. This is the
only module of `hardware/` that imports a simulator.

What is emulated and what is not: the servos' controllers, torque limits, protections and wire, the arm's weight and
what it touches as loads on them, and if asked for the play of their gears; no flexibility. Servos and scene meet every
2 ms: the scene's joints are led to where the shafts stand, and the torque of their contacts loads the shafts in the
next step. The frame is drawn with one ray a pixel, without lens, blur or noise.
"""

import csv
import json
import math
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hardware.camera import Camera, CameraError, RenderSource, aligned_cameras, frame_around
from hardware.deployment import Refused, check_policy, emulated_episode
from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock
from hardware.feetech import STEPS
from hardware.policy import load_policy
from hardware.so101 import Calibration

EVAL_SEED = 10_000  # of the episodes that algos/ evaluate on
SCENE_STEP = 0.002  # s, a fifth of the training's: what is touched and what pushes meet once a step
STALL_TORQUE = 3.0  # N m, of the servos in envs/so101/so101.xml


class EmulationError(Exception):
    """An emulation that cannot be built; one sentence."""


def _so101():
    try:
        from envs import so101
    except ImportError as error:
        raise EmulationError(f"the emulated arm needs the simulator: {error}") from None
    return so101


# ------------------------------------------------------------------------------------------------------------ scene ---
def episodes(env_id: str, count: int, seed: int = EVAL_SEED, randomize: bool = True) -> list[dict]:
    """The saved states of `count` single environments at their start: those that training's evaluation begins with."""
    so101 = _so101()
    try:
        env = so101.make(
            env_id, count, seed=seed, stagger=False, images=False, domain_randomization=randomize
        )
    except ValueError as error:
        raise EmulationError(str(error)) from None
    env.reset(seed=seed)
    saved = env.state_dict()
    env.close()

    def one(value, i):
        if isinstance(value, dict):
            return {key: one(part, i) for key, part in value.items()}
        return value[i : i + 1] if getattr(value, "ndim", 0) and len(value) == count else value

    states = [{key: value if key == "generator" else one(value, i) for key, value in saved.items()}
              for i in range(count)]  # fmt: skip
    return [state | {"num_envs": 1} for state in states]


class Scene:
    """One environment of `envs/so101` whose arm is led by hand; everything else obeys the simulation."""

    def __init__(
        self, env_id: str, cameras: tuple[str, ...] = ("wrist",), size: int = 240, samples: int = 1
    ):
        import mujoco

        self.mujoco = mujoco
        try:
            self.env = _so101().make(env_id, 1, stagger=False, domain_randomization=False, render_size=size,
                                     samples_per_pixel=samples, cameras=cameras)  # fmt: skip
        except ValueError as error:
            raise EmulationError(str(error)) from None
        self.past: deque[tuple[float, np.ndarray]] = deque(maxlen=1000)
        self.begin(self.env.state_dict(), 0.0)

    def begin(self, state: dict, now: float) -> None:
        """Starts an episode (see `episodes`) at `now` seconds of the clock."""
        self.env.load_state_dict(state)
        self.model = self.env.physics.models[0]
        self.model.opt.timestep = SCENE_STEP
        # led by hand: no motors, nothing that brakes
        self.model.dof_damping[:6] = self.model.dof_frictionloss[:6] = 0.0
        self.model.actuator_gainprm[:6], self.model.actuator_biasprm[:6] = 0.0, 0.0
        self.data = self.mujoco.MjData(self.model)
        self.data.qpos[:] = self.env.physics.state[0, 1 : 1 + self.model.nq]
        self.mujoco.mj_forward(self.model, self.data)
        self.past.clear()
        self.past.append((now, self.data.qpos.copy()))

    def follow(self, joints: np.ndarray, now: float) -> None:
        """One step of the simulation, at whose end the arm's joints are at `joints`, radians."""
        before = self.data.qpos[:6].copy()
        self.data.qvel[:6] = speed = (joints - before) / SCENE_STEP
        self.mujoco.mj_step(self.model, self.data)
        self.data.qpos[:6], self.data.qvel[:6] = joints, speed
        self.past.append((now, self.data.qpos.copy()))

    def weight(self) -> np.ndarray:
        """Torque of gravity on the six joints, N m, as of the last step. (The simulated arm itself floats.)"""
        return -self.data.qfrc_gravcomp[:6]

    def resistance(self) -> np.ndarray:
        """Torque on the six joints, N m, of all that the arm touches, itself included, as of the last step."""
        first = int(
            self.mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS
        )  # before it: limits, dry friction
        forces = np.where(self.data.efc_type >= first, self.data.efc_force, 0.0)
        torque = np.zeros(self.model.nv)
        if len(forces):
            self.mujoco.mj_mulJacTVec(self.model, self.data, torque, forces)
        return torque[:6]

    def _place(self, qpos: np.ndarray) -> None:
        import torch

        self.env.qpos[0] = torch.from_numpy(qpos.astype(np.float32))
        self.env._kinematics()

    def images(self, at: float) -> dict[str, np.ndarray]:
        """What each camera showed at a time of the clock: {name: uint8 (size, size, 3)}."""
        qpos = next(
            (qpos for when, qpos in reversed(self.past) if when <= at + 1e-9), self.past[0][1]
        )
        self._place(qpos)
        rgb = self.env.scene.draw()[0].numpy()
        return {name: rgb[..., 3 * i : 3 * i + 3].copy() for i, name in enumerate(self.env.cameras)}

    def success(self, target: np.ndarray) -> bool:
        """Whether the task's own test holds now; `target`: the last command, which some tasks ask about."""
        import torch

        self.mujoco.mj_forward(self.model, self.data)
        self.env.qvel[0] = torch.from_numpy(self.data.qvel.astype(np.float32))
        self.env.contact[0] = torch.from_numpy(self.data.sensordata.astype(np.float32))
        self.env.target[0] = torch.from_numpy(np.asarray(target, np.float32))
        self._place(self.data.qpos)
        return bool(self.env.reward()[1][0])

    def view(self, size: int = 480, camera: str = "person") -> np.ndarray:
        """An image for people, uint8 (size, size, 3)."""
        self._place(self.data.qpos)
        return self.env.render((0,), size, camera)[0]

    def close(self) -> None:
        self.env.close()


class StartView:
    """The start pose as one camera sees it, nothing randomised, the item 23 cm in front of the base."""

    def __init__(self, spec: dict, camera: str = "wrist", size: int = 240):
        self.camera, self.scene = camera, Scene(spec["env_id"], (camera,), size, 4)
        self.qpos = self.scene.data.qpos.copy()
        item = self.scene.env._q["item"]
        self.qpos[:6] = spec["start_pose"]
        self.qpos[item : item + 2], self.qpos[item + 3 : item + 7] = (0.23, 0.0), (1, 0, 0, 0)

    def draw(self, values: dict) -> np.ndarray:
        """uint8 (size, size, 3) by a camera with these `pos`, `quat_wxyz` and `fovy_degrees`."""
        import torch

        env = self.scene.env
        at = env.mjm.camera(self.camera).id
        for field, key in (
            ("cam_pos", "pos"),
            ("cam_quat", "quat_wxyz"),
            ("cam_fovy", "fovy_degrees"),
        ):
            env.fields[field][:, at] = torch.tensor(values[key], dtype=torch.float32)
        self.scene._place(self.qpos)
        return env.scene.draw()[0].numpy().copy()


def task_spec(env_id: str, cameras: tuple[str, ...] = ("wrist",)) -> dict:
    """What the environment says of itself now."""
    scene = Scene(env_id, cameras, 16)
    scene.close()
    return json.loads(json.dumps(scene.env.spec))


# -------------------------------------------------------------------------------------------------------------- arm ---
class ScenicClock(VirtualClock):
    """Virtual time that lets the servos and the scene go on with it, in the simulation's steps."""

    def __init__(self):
        super().__init__()
        self.each_step = None
        self.steps = 0

    def sleep(self, seconds: float) -> None:
        end = self.time + max(seconds, 0.0)
        while self.each_step is not None and (self.steps + 1) * SCENE_STEP <= end + 1e-9:
            self.steps += 1
            self.time = max(self.time, self.steps * SCENE_STEP)
            self.each_step(self.time)
        self.time = max(self.time, end)


# Encoder of each shaft where the joint is at its simulated zero: horns are screwed on as they come.
ZERO = (2300, 1700, 2450, 1900, 2100, 1640)
GRIPPER_JOINT, GRIPPER_SHAFT = (
    (-10.0, 120.0),
    (-62.5, 64.62),
)  # degrees, closed and open; the other shafts turn 1 : 1


def shafts(joints) -> np.ndarray:
    """Encoder steps, unbounded, of joint angles in radians."""
    turned = np.array(joints, float)
    (low, high), (first, last) = np.radians(GRIPPER_JOINT), np.radians(GRIPPER_SHAFT)
    turned[5] = first + (turned[5] - low) * (last - first) / (high - low)
    return np.array(ZERO) + turned * STEPS / (2 * math.pi)


def joints_of(encoders) -> np.ndarray:
    """The opposite of `shafts`."""
    turned = (np.asarray(encoders, float) - ZERO) * 2 * math.pi / STEPS
    (low, high), (first, last) = np.radians(GRIPPER_JOINT), np.radians(GRIPPER_SHAFT)
    turned[5] = low + (turned[5] - first) * (high - low) / (last - first)
    return turned


def recorded_calibration(spec: dict) -> dict:
    """What a careful person would have recorded of this arm, in lerobot's format: see `hardware/calibrate.py`."""
    low, high = shafts(spec["joint_low"]), shafts(spec["joint_high"])
    entries = {}
    for i, name in enumerate(spec["joint_names"]):
        offset = ZERO[i] - 2047  # at zero, the middle of the range, it then reads 2047
        ends = {"wrist_roll": (0, 4095), "gripper": (2047 - 735, 2047 + 735)}.get(
            name, (round(low[i]) - offset, round(high[i]) - offset))  # fmt: skip
        entries[name] = dict(
            id=i + 1, drive_mode=0, homing_offset=offset, range_min=ends[0], range_max=ends[1]
        )
    return entries


def calibrate(servos: EmulatedBus, entries: dict) -> None:
    """Puts a calibration into the servos' EEPROM, as `hardware/calibrate.py` does over the bus, and restarts them."""
    for entry in entries.values():
        servo = servos.servos[entry["id"]]
        for register, key in (("homing_offset", "homing_offset"), ("min_position", "range_min"),
                              ("max_position", "range_max")):  # fmt: skip
            servo._set(register, entry[key], servo.eeprom)
        servo.power_up()


def place(servos: EmulatedBus, joints) -> None:
    """Puts the arm somewhere by hand."""
    for servo, encoder in zip(servos.servos.values(), shafts(joints), strict=True):
        servo.encoder, servo.velocity = float(encoder), 0.0
        servo._refresh()


class EmulatedArm:
    """Servos, camera and scene under one clock; `clock` and `transport` are what the driver gets.

    spec            of the policy: task, cameras, joint limits
    frame_size      pixels a side that the cameras draw; a frame shows them enlarged to 480, in 640 x 480
    samples         rays a pixel
    camera_delay    seconds that images are old when they arrive, which nobody is told
    gravity         the arm's weight loads the servos while torque is on; an arm without torque stays where it was put
    options         of EmulatedBus
    """

    def __init__(self, spec: dict, *, frame_size: int = 240, samples: int = 1, camera_delay: float = 0.0,
                 gravity: bool = True, **options):  # fmt: skip
        self.spec, self.gravity, self.camera_delay = spec, gravity, camera_delay
        self.clock = ScenicClock()
        self.servos = EmulatedBus(range(1, 7), self.clock, **options)
        self.transport = EmulatedTransport(self.servos, self.clock)
        self.scene = Scene(spec["env_id"], tuple(spec["cameras"]), frame_size, samples)
        self.joints_at = None  # time of the images below, drawn once for all cameras
        calibrate(self.servos, self.calibration())
        place(self.servos, spec["start_pose"])
        self.clock.each_step = self._step

    def joints(self) -> np.ndarray:
        """Where the joints truly are, radians, (6,)."""
        return joints_of([servo.encoder for servo in self.servos.servos.values()])

    def calibration(self) -> dict:
        """Its calibration file's content."""
        return recorded_calibration(self.spec)

    # Time
    def begin(self, state: dict) -> np.ndarray:
        """Power off and on, a new scene (see `episodes`), the arm at its first pose, which is returned."""
        self.scene.begin(state, self.clock())
        self.servos.power_cycle()
        self.joints_at = None
        first = self.scene.data.qpos[:6].copy()
        place(self.servos, first)
        return first

    def _step(self, now: float) -> None:
        self.servos.advance()
        self.scene.follow(self.joints(), now)
        torques = self.scene.resistance() + self.gravity * self.scene.weight()
        for servo, torque in zip(self.servos.servos.values(), torques, strict=True):
            servo.load = float(torque) / STALL_TORQUE if servo.torque else 0.0

    # Cameras
    def cameras(self, **options) -> dict[str, Camera]:
        """A camera for each of the policy's, to be read on demand; options as of Camera."""
        cameras = {}
        for name in self.spec["cameras"]:
            source = RenderSource(
                lambda at, name=name: self.frame(name, at), self.clock, self.camera_delay
            )
            cameras[name] = Camera(source, self.clock, threaded=False, name=name, **options)
        return cameras

    def frame(self, name: str, at: float) -> np.ndarray:
        """What a camera sees at a time of the clock, 480 x 640."""
        if self.joints_at != at:
            self.squares, self.joints_at = self.scene.images(at), at
        return frame_around(self.squares[name])


# ------------------------------------------------------------------------------------------------------- measuring ----
@dataclass
class Args:
    checkpoint: str  # trained by algos/, with SO-101 as its robot
    latency_periods: tuple[int, ...] = (
        0,
        1,
        2,
    )  # control periods between an observation and its command
    camera_delay: float = 0.0  # s that images are late, besides
    gravity: bool = True  # the arm's weight loads the servos
    backlash: float = 0.0  # degrees of play in every gear; others measured about 1
    frame_size: int = 240  # pixels a side that the camera draws, one ray each; the training's own size: as in training
    simulator: bool = True  # measure the simulator on the same episodes too
    episodes: int = 64  # of those that the evaluation in training uses
    out: str | None = None  # CSV file to write, or to add rows to


COLUMNS = ("policy", "where", "frame", "latency_periods", "camera_delay_ms", "gravity", "episodes", "success_rate",
           "ci_low", "ci_high", "success_once", "rules_fired")  # fmt: skip


def interval(successes: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson 1927, eq. 1)."""
    z, p = 1.96, successes / count
    middle, half = (
        p + z * z / (2 * count),
        z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)),
    )
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def simulator_success(policy, count: int, noise: bool) -> tuple[np.ndarray, np.ndarray]:
    """The simulator's own loop over the same episodes: success (count,) at the end, and at any time.

    noise: on the joint readings, as the evaluation in training has it.
    """
    so101, spec, net = _so101(), policy.spec, policy.net
    ranges = so101.Randomization() if noise else replace(so101.Randomization(), joint_noise=0.0)
    env = so101.make(
        spec["env_id"],
        count,
        randomization=ranges,
        render_size=spec["render_size"],
        samples_per_pixel=net.args.samples_per_pixel,
        cameras=tuple(spec["cameras"]),
    )
    obs, once = env.reset(seed=EVAL_SEED), np.zeros(count, bool)
    for _ in range(env.max_episode_steps):
        obs, _, _, _, info = env.step(net.act(obs))
        once |= info["success"].numpy()
    env.close()
    return info["success"].numpy(), once


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(1)
    policy = load_policy(args.checkpoint)
    limits, steps = (
        check_policy(policy, measured=aligned_cameras()),
        int(policy.spec["max_episode_steps"]),
    )
    size = policy.spec["render_size"]
    file = Path(args.checkpoint)  # a run's folder tells policies apart, elsewhere the file does
    named = file.parent.name if file.stem in ("best", "checkpoint", "last") else file.stem
    common = dict(policy=named, episodes=args.episodes)

    def add(success, once, **row) -> None:
        low, high = interval(int(np.sum(success)), args.episodes)
        row = (
            common
            | row
            | dict(
                success_rate=np.mean(success), ci_low=low, ci_high=high, success_once=np.mean(once)
            )
        )
        row = {
            key: f"{row[key]:.4f}" if isinstance(row[key], float) else row[key] for key in COLUMNS
        }
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.out:
            new = not Path(args.out).exists()
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)

    for noise in (True, False) if args.simulator else ():
        add(*simulator_success(policy, args.episodes, noise), where="simulator" + ", noise" * noise,
            frame=size, latency_periods=0, camera_delay_ms=0, gravity=False, rules_fired="")  # fmt: skip
    scenes = episodes(policy.spec["env_id"], args.episodes)
    samples = policy.net.args.samples_per_pixel if args.frame_size == size else 1
    rig = EmulatedArm(policy.spec, frame_size=args.frame_size, samples=samples, camera_delay=args.camera_delay,
                      gravity=args.gravity, backlash=args.backlash * STEPS / 360)  # fmt: skip
    calibration = Calibration.from_dict(rig.calibration())
    for latency in args.latency_periods:
        results, fired = [], {}
        for scene in scenes:
            results.append(
                emulated_episode(rig, scene, policy, limits, calibration, steps, latency=latency)
            )
            fired |= {
                rule: fired.get(rule, 0) + count for rule, count in results[-1]["rules"].items()
            }
        add([r["success"] for r in results], [r["success_once"] for r in results], where="emulated arm",
            frame=args.frame_size, latency_periods=latency, camera_delay_ms=round(1000 * args.camera_delay),
            gravity=args.gravity, rules_fired=" ".join(f"{rule} {count}" for rule, count in fired.items()))  # fmt: skip


if __name__ == "__main__":
    import tyro

    from hardware.policy import PolicyError

    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (EmulationError, PolicyError, Refused, CameraError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
