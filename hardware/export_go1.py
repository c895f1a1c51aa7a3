"""A walking policy as the two files that programs for Unitree's robots read: ONNX and deploy.yaml.

    python -m hardware.export_go1 --policy runs/NAME/best.npz --out walk

writes walk/exported/policy.onnx and walk/params/deploy.yaml, the layout of Unitree's unitree_rl_lab.
The network takes "obs" (1, F) and gives "actions" (1, 12), float32; the normalisation is inside. The
YAML says the rest: which motor each joint is, gains, pose at action 0, scale and limits of the
targets, and of what parts the observation is made, in order.

Before the files take their place, the simulated robot of hardware/sim2sim_go1.py walks, and
`Controller`, which knows nothing but the two files and what a robot measures, must act as the
checkpoint does at every step.

Conventions of deploy.yaml: `stiffness` and `damping` are in the motors' order, everything else in
the policy's; `joint_ids_map[i]` is the motor of the policy's joint i; a part of the observation is
clipped, then scaled, and one with a history has its oldest values first; joint target =
clip(scale action + offset).
"""

import json
import os
import shutil
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.export import git_revision
from hardware.policy import file_digest
from hardware.sim2sim_go1 import TRUNK, Go1, Policy, Sim2SimError

TOLERANCE = (
    1e-4  # of actions in [-1, 1]: sums in another order made 1.0e-5 with a policy that walks
)
LEGS = ("FR", "FL", "RR", "RL")
MOTORS = [f"{leg}_{joint}" for leg in LEGS for joint in ("hip", "thigh", "calf")]  # Unitree's SDK
TERMS = {  # part of the observation -> its name in deploy.yaml
    "gyro": "base_ang_vel",
    "gravity": "projected_gravity",
    "joint_position": "joint_pos_rel",
    "joint_velocity": "joint_vel_rel",
    "last_action": "last_action",
    "command": "velocity_commands",
}
AXES = ("lin_vel_x", "lin_vel_y", "ang_vel_z")


class ExportError(Exception):
    """A policy that cannot be exported, or files that cannot be run; one sentence."""


@dataclass
class Args:
    policy: str  # checkpoint of algos/ppo_mjx_go1.py or algos/distill_go1.py (.npz)
    out: str  # folder for exported/policy.onnx and params/deploy.yaml
    command_range: tuple[float, float, float] = (
        1.5,
        0.8,
        1.2,
    )  # largest forward, sideways, turning
    seconds: float = 4.0  # of the walk by which the files are checked


# --- The two files --------------------------------------------------------------------------------
def numbers(values) -> list[float]:
    """The shortest decimals that are these float32 numbers."""
    return [float(str(x)) for x in np.float32(values)]


def deployment(spec: dict, command_range) -> dict:
    """deploy.yaml as a dict. spec: a policy's description of its robot."""
    joints, parts = spec["joints"], spec["state_layout"]
    unknown = [name for name, _ in parts if name not in TERMS]
    if unknown:
        raise ExportError(
            f"the policy sees {', '.join(unknown)}, which no sensor of the robot measures: train it with --no-linvel, "
            "or teach a student (algos/distill_go1.py)"
        )
    if sorted(joints) != sorted(MOTORS):
        raise ExportError(
            f"the policy's joints are {', '.join(joints)}; a Go1 has {', '.join(MOTORS)}"
        )
    observations = {}
    for name, size in parts:
        params = {"command_name": "base_velocity"} if name == "command" else {}
        one = dict(params=params, clip=None, scale=[1.0] * size, history_length=1)
        observations[TERMS[name]] = one
    pose = numbers(spec["default_pose"])
    action = dict(
        clip=[numbers(limits) for limits in spec["joint_limits"]],
        joint_names=[".*"],
        scale=numbers([spec["action_scale"]] * len(joints)),
        offset=pose,
        joint_ids=None,
    )
    ranges = {axis: [-most, most] for axis, most in zip(AXES, command_range, strict=True)}
    return dict(
        joint_ids_map=[MOTORS.index(joint) for joint in joints],
        step_dt=1 / spec["control_hz"],
        stiffness=numbers([spec["kp"]] * len(MOTORS)),
        damping=numbers([spec["kd"]] * len(MOTORS)),
        default_joint_pos=pose,
        commands={"base_velocity": {"ranges": ranges | {"heading": None}}},
        actions={"JointPositionAction": action},
        observations=observations,
    )


def as_yaml(tree: dict, indent: str = "") -> str:
    """Dicts as blocks, all else as JSON, which is YAML too."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:\n{as_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)


def metadata(policy: Policy, described: dict) -> dict[str, str]:
    """What travels in the ONNX file: our description, and the names that mjlab's exports use."""
    spec, listed = policy.spec, lambda values: ",".join(str(value) for value in values)
    return {
        "cleanrobot": json.dumps({"spec": spec}),  # as in hardware/export.py
        "checkpoint": f"{policy.path.name} {file_digest(policy.path)}",
        "commit": git_revision(),
        "run_path": policy.path.resolve().parent.name,
        "joint_names": listed(spec["joints"]),
        "joint_stiffness": listed(described["stiffness"]),
        "joint_damping": listed(described["damping"]),
        "default_joint_pos": listed(described["default_joint_pos"]),
        "command_names": listed(described["commands"]),
        "observation_names": listed(described["observations"]),
        "action_scale": listed(described["actions"]["JointPositionAction"]["scale"]),
    }


def write_onnx(path: Path, policy: Policy, meta: dict[str, str]):
    """ "obs" (1, F) -> "actions" (1, 12). The batch is fixed: controllers in C++ take the shape as it stands."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper, save
    except ImportError as error:
        raise ExportError('writing ONNX needs onnx: pip install -e ".[export]"') from error
    constants, nodes = {"mean": policy.mean, "std": policy.std}, []

    def node(kind: str, *inputs: str, out: str | None = None) -> str:
        out = out or f"x{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [out]))
        return out

    x = node("Div", node("Sub", "obs", "mean"), "std")
    for i, (kernel, bias) in enumerate(policy.layers):
        constants |= {f"kernel{i}": kernel, f"bias{i}": bias}
        x = node("Gemm", x, f"kernel{i}", f"bias{i}")
        if i < len(policy.layers) - 1:
            x = node("Mul", x, node("Sigmoid", x))
    node("Tanh", x, out="actions")
    obs = helper.make_tensor_value_info("obs", TensorProto.FLOAT, [1, policy.size])
    actions = helper.make_tensor_value_info("actions", TensorProto.FLOAT, [1, len(MOTORS)])
    tensors = [
        numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "policy", [obs], [actions], tensors)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    helper.set_model_props(model, meta)
    checker.check_model(model)
    save(model, str(path))


# --- What a robot's program does with them --------------------------------------------------------
class Controller:
    """The two files in a folder, run as unitree_rl_lab's controller runs them: signals in, joint targets out.

    signals: gyroscope (3,) rad/s and quaternion (4,) w x y z of the IMU, q and dq (12,) of the motors in their own
    order, command (3,).
    """

    def __init__(self, folder: str | Path):
        try:
            import onnxruntime
            import yaml
        except ImportError as error:
            raise ExportError(f'{error.name} is missing: pip install -e ".[export]"') from error
        network, text = Path(folder, "exported/policy.onnx"), Path(folder, "params/deploy.yaml")
        for path in (network, text):
            if not path.is_file():
                raise ExportError(f"there is no {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        processor = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(network), options, providers=processor)
        self.cfg = yaml.safe_load(text.read_text())
        self.motor_of = np.array(self.cfg["joint_ids_map"])
        self.pose = np.float32(self.cfg["default_joint_pos"])
        self.reset()

    def reset(self):
        """Before every walk."""
        self.action = np.zeros(len(self.motor_of), np.float32)
        self.past = {}

    def measure(self, signals: dict) -> dict[str, np.ndarray]:
        """Every part that an observation can be made of, before clip and scale."""
        w, x, y, z = np.asarray(signals["quaternion"], float)
        down = -np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])
        ranges = self.cfg["commands"]["base_velocity"]["ranges"]
        low, high = np.array([ranges[axis] for axis in AXES]).T
        return {
            "base_ang_vel": signals["gyroscope"],
            "projected_gravity": down,
            "joint_pos_rel": np.asarray(signals["q"])[self.motor_of] - self.pose,
            "joint_vel_rel": np.asarray(signals["dq"])[self.motor_of],
            "last_action": self.action,
            "velocity_commands": np.clip(signals["command"], low, high),
        }

    def observe(self, signals: dict) -> np.ndarray:
        """The network's input (1, F)."""
        measured, parts = self.measure(signals), []
        for name, term in self.cfg["observations"].items():
            value = np.float32(measured[name])
            length = term["history_length"]
            past = self.past.setdefault(name, deque([value] * length, maxlen=length))
            past.append(value)
            for old in past:
                clipped = old if term["clip"] is None else np.clip(old, *term["clip"])
                parts.append(clipped * np.float32(term["scale"]))
        return np.concatenate(parts)[None].astype(np.float32)

    def act(self, signals: dict) -> np.ndarray:
        """Joint targets (12,), rad, in the motors' order. `action` is what the network said."""
        self.action = self.session.run(["actions"], {"obs": self.observe(signals)})[0][0]
        term = self.cfg["actions"]["JointPositionAction"]
        targets = self.action * np.float32(term["scale"]) + np.float32(term["offset"])
        if term["clip"] is not None:
            targets = np.clip(targets, *np.float32(term["clip"]).T)
        of_motor = np.empty_like(targets)
        of_motor[self.motor_of] = targets
        return of_motor


def signals_of(robot: Go1, command) -> dict:
    """What the sensors of the simulated robot say, as a real one's would."""
    data = robot.data
    names = [robot.model.joint(i).name for i in range(1, robot.model.njnt)]
    order = [names.index(motor) for motor in MOTORS]
    return dict(
        gyroscope=data.sensordata[robot.sensor["gyro"]],
        quaternion=data.xquat[TRUNK],
        q=data.qpos[7:][order],
        dq=data.qvel[6:][order],
        command=command,
    )


def largest_difference(policy: Policy, folder: Path, command_range, seconds: float) -> float:
    """Of the actions, over a walk whose commands change twice a second: |files - checkpoint|, at most."""
    robot, controller, rng = Go1(policy.spec), Controller(folder), np.random.default_rng(0)
    hz, worst, command = round(policy.spec["control_hz"]), 0.0, np.zeros(3, np.float32)
    for tick in range(round(seconds * hz)):
        if tick % (hz // 2) == 0:
            command = np.float32(rng.uniform(-1, 1, 3) * command_range)
        action = policy.act(robot.observe(command))
        controller.act(signals_of(robot, command))
        worst = max(worst, float(np.abs(controller.action - action).max()))
        robot.act(action)
        if robot.fallen:
            robot.reset()
            controller.reset()
    return worst


# --- Command --------------------------------------------------------------------------------------
def export(args: Args) -> float:
    """Writes the files of `args`. -> the largest difference. Raises ExportError or Sim2SimError."""
    policy = Policy(args.policy)
    if policy.path.suffix != ".npz":
        raise ExportError(f"{policy.path} is an export already: --policy wants a checkpoint (.npz)")
    described = deployment(policy.spec, args.command_range)
    unchecked = Path(args.out) / ".unchecked"
    files = ("exported/policy.onnx", "params/deploy.yaml")
    try:
        for name in files:
            (unchecked / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(args.out) / name).parent.mkdir(exist_ok=True)
        write_onnx(unchecked / files[0], policy, metadata(policy, described))
        (unchecked / files[1]).write_text(as_yaml(described))
        worst = largest_difference(policy, unchecked, args.command_range, args.seconds)
        if not worst <= TOLERANCE:
            raise ExportError(f"the files act otherwise than {policy.path}: by {worst:.1e}")
        for name in files:
            os.replace(unchecked / name, Path(args.out) / name)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return worst


def command() -> int:
    """The command line. -> exit status."""
    import tyro

    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    try:
        worst = export(args)
    except (ExportError, Sim2SimError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = f"{args.seconds:g} s of walking, actions differ by {worst:.1e} at most"
    print(f"{args.out}/exported/policy.onnx, {args.out}/params/deploy.yaml: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(command())
