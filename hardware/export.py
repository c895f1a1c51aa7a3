"""A trained policy in a file that runs without torch: ONNX, and NumPy for machines without ONNX Runtime.

    python -m hardware.export --checkpoint runs/NAME/best.pt      # writes runs/NAME/best.onnx and best.npz

Both files hold the network and its description (`meta`, JSON): algorithm, `spec` of the robot (joints, limits, control
rate, action scale, cameras, layout of the state), how images are prepared, the maps between servos and joints, the
servos' gains, the digest of the checkpoint, and an image of the start view for `hardware/align_camera.py`. The
deployer refuses a file whose description does not fit the robot.

The outputs are compared with the checkpoint's own policy before anything is written, to 1e-5; then the time of one
action is measured on one thread of this machine.
"""

import base64
import io
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hardware.policy import FORMAT, PREPROCESS, NumpyPolicy, OnnxPolicy, PolicyError, TorchPolicy

TOLERANCE = 1e-5
ONNX_DOMAIN_KEY = "cleanrobot"


class ExportError(Exception):
    """A policy that cannot be exported; one sentence."""


@dataclass
class Args:
    checkpoint: str  # file to export
    out: str | None = (
        None  # where to write, without ending; None: beside the checkpoint, with its name
    )
    format: Literal["both", "onnx", "numpy"] = "both"
    start_view: bool = (
        True  # put the simulator's image of the start pose into the description (SO-101)
    )
    repeats: int = 200  # actions timed for the table


# ------------------------------------------------------------------------------------------------------ the network ---
def sequential(module, register: str, weights: dict, name: str) -> list[dict]:
    """The steps (see `policy.run_program`) of an nn.Sequential of known layers, from `register` to itself."""
    import torch.nn as nn

    plain = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu"}
    steps = []

    def step(op: str, keys=(), **numbers) -> None:
        steps.append({"op": op, "in": [register], "out": register, "weights": list(keys)} | numbers)

    def keep(key: str, tensor) -> str:
        weights[key] = np.ascontiguousarray(tensor.detach().cpu().numpy(), np.float32)
        return key

    for i, layer in enumerate(module):
        at = f"{name}.{i}"
        if type(layer) in plain:
            step(plain[type(layer)])
        elif isinstance(layer, nn.ELU) and layer.alpha == 1:
            step("elu")
        elif isinstance(layer, nn.Linear) and layer.bias is not None:
            step("linear", (keep(f"{at}.weight", layer.weight.T), keep(f"{at}.bias", layer.bias)))
        elif (
            isinstance(layer, nn.LayerNorm)
            and layer.bias is not None
            and len(layer.normalized_shape) == 1
        ):
            step(
                "norm",
                (keep(f"{at}.weight", layer.weight), keep(f"{at}.bias", layer.bias)),
                eps=layer.eps,
            )
        elif (isinstance(layer, nn.Conv2d) and layer.padding == (0, 0) and layer.dilation == (1, 1)
              and layer.groups == 1 and layer.bias is not None and len(set(layer.stride)) == 1):  # fmt: skip
            step(
                "conv",
                (keep(f"{at}.weight", layer.weight), keep(f"{at}.bias", layer.bias)),
                stride=layer.stride[0],
            )
        else:
            raise ExportError(
                f"NumPy does not know the layer {layer} of {name}: export with --format onnx"
            )
    return steps


def numpy_program(policy: TorchPolicy) -> tuple[list[dict], dict[str, np.ndarray]]:
    """(steps, weights) of a policy. Raises ExportError for a network that has other layers."""
    import torch.nn as nn

    net, weights = policy.net, {}
    if hasattr(net, "encoder"):
        projection = net.actor.projection
        steps = [{"op": "pixels", "in": ["rgb"], "out": "rgb"}, *sequential(net.encoder.convs, "rgb", weights, "convs"),
                 {"op": "flatten", "in": ["rgb"], "out": "rgb"},
                 *sequential(projection.rgb, "rgb", weights, "rgb"),
                 *sequential(projection.state, "state", weights, "state"),
                 {"op": "concat", "in": ["rgb", "state"], "out": "x"},
                 *sequential([*net.actor.trunk, net.actor.mean, nn.Tanh()], "x", weights, "trunk")]  # fmt: skip
        return steps, weights
    return sequential([*net.actor, nn.Tanh()], "state", weights, "actor"), weights


def torch_network(policy: TorchPolicy):
    """(module, names of its inputs): what `policy.act` computes once the image has its size."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, rgb, state):
            mean, _ = self.net.actor(self.net.encoder(rgb), state)
            return torch.tanh(mean)

    class StateNetwork(Network):
        def forward(self, state):
            return torch.tanh(self.net.actor(state))

    net = policy.net
    if hasattr(net, "encoder") and hasattr(net, "actor") and hasattr(net.actor, "projection"):
        return Network(net).eval(), ("rgb", "state")
    if isinstance(getattr(net, "actor", None), torch.nn.Sequential):
        return StateNetwork(net).eval(), ("state",)
    raise ExportError(
        f"a policy of {policy.algo} has neither Squint's networks nor an `actor` that is an nn.Sequential on the state"
    )


def example(
    policy: TorchPolicy, names: tuple[str, ...], batch: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random inputs of the network: images over all bytes, states of a few radians."""
    draw, spec = np.random.default_rng(seed), policy.spec
    inputs = {"state": draw.normal(0, 1.5, (batch, len(spec["state_layout"]))).astype(np.float32)}
    if "rgb" in names:
        size, channels = policy.net.args.image_size, 3 * len(spec["cameras"])
        inputs["rgb"] = draw.integers(0, 256, (batch, size, size, channels), dtype=np.uint8)
    return inputs


def torch_action(network, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The module's own answer."""
    import torch

    names = [name for name in ("rgb", "state") if name in inputs]
    with torch.no_grad():
        return network(*(torch.from_numpy(inputs[name]) for name in names)).numpy()


# ------------------------------------------------------------------------------------------------------ description ---
def git_revision() -> str:
    """The commit of this checkout, with + where files differ from it; unknown outside one."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude", "*"], cwd=root, text=True,
                             capture_output=True, timeout=10)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def start_view(spec: dict) -> str:
    """The simulator's image of the start pose, a PNG in base64. Raises ExportError where there is no simulator."""
    import imageio.v2 as imageio

    from hardware.emulate import EmulationError, StartView

    camera = next(iter(spec["cameras"]))
    try:
        image = StartView(spec, camera).draw(spec["cameras"][camera])
    except EmulationError as error:
        raise ExportError(f"{error}; or leave the start view out with --no-start-view") from None
    buffer = io.BytesIO()
    imageio.imwrite(buffer, image, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def servo_maps() -> dict:
    """How angles become the servos' positions (hardware/so101.py does it), and the gains that they are set to."""
    from hardware import so101

    gripper = dict(servo_degrees=so101.GRIPPER_SERVO, joint_degrees=so101.GRIPPER_JOINT)
    joints = "degrees = (present_position - middle of the recorded range) * 360 / 4095"
    return {
        "joints": joints,
        "gripper": gripper,
        "gains": {key: so101.SETTINGS[key] for key in ("p", "i", "d")},
    }


def describe(policy: TorchPolicy, names: tuple[str, ...], view: str | None) -> dict:
    """The description that travels in the file."""
    image_size = policy.net.args.image_size if "rgb" in names else None
    return {
        "format": FORMAT, "algo": policy.algo, "spec": policy.spec, "inputs": list(names),
        "image_size": image_size, "preprocess": PREPROCESS,
        "maps": servo_maps() if policy.spec.get("robot") == "so101" else {},
        "checkpoint": {"name": policy.path.name, "digest": policy.digest},
        "commit": git_revision(), "start_view": view,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- writing ---
def write_onnx(path: Path, network, inputs: dict[str, np.ndarray], meta: dict) -> None:
    """The module as ONNX, any batch size, its weights inside the file."""
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it and names it badly)
    except ImportError as error:
        raise ExportError(f'writing ONNX needs {error.name}: pip install -e ".[export]"') from None
    names = [name for name in ("rgb", "state") if name in inputs]
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it reports every package that is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, tuple(torch.from_numpy(inputs[name]) for name in names), dynamo=True, verbose=False,
            input_names=names, output_names=["action"],
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in names),
        )  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, {ONNX_DOMAIN_KEY: json.dumps(meta)})
    path.write_bytes(model.SerializeToString())


def write_numpy(path: Path, steps: list[dict], weights: dict[str, np.ndarray], meta: dict) -> None:
    """Steps and weights in one .npz; see `policy.run_program`."""
    with path.open("wb") as file:
        np.savez(file, meta=json.dumps(meta), program=json.dumps(steps), **weights)


def largest_difference(policy: TorchPolicy, network, names: tuple[str, ...], exported) -> float:
    """Over batches of 1, 2 and 7, and over images all black and all white: |exported - torch|, at most."""
    worst = 0.0
    for seed, batch in enumerate((1, 2, 7, 64)):
        inputs = example(policy, names, batch, seed)
        variants = [inputs]
        if "rgb" in inputs:
            variants += [inputs | {"rgb": np.full_like(inputs["rgb"], level)} for level in (0, 255)]
        for variant in variants:
            difference = np.abs(exported.run(variant) - torch_action(network, variant)).max()
            worst = max(worst, float(difference))
    return worst


def export(args: Args) -> dict[str, float]:
    """Writes the files of `args` and returns {path: largest difference}. Raises ExportError or PolicyError."""
    source = TorchPolicy(args.checkpoint) if Path(args.checkpoint).is_file() else None
    if source is None:
        raise PolicyError(f"there is no policy {args.checkpoint}")
    network, names = torch_network(source)
    view = (
        start_view(source.spec) if args.start_view and source.spec.get("robot") == "so101" else None
    )
    meta = describe(source, names, view)
    stem = Path(args.out) if args.out else Path(args.checkpoint).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    differences = {}
    for suffix, kind in ((".onnx", OnnxPolicy), (".npz", NumpyPolicy)):
        if {".onnx": "numpy", ".npz": "onnx"}[suffix] == args.format:
            continue
        path = stem.with_name(stem.name + suffix)
        unchecked = path.with_name(f".unchecked-{path.name}")
        try:
            if kind is OnnxPolicy:
                write_onnx(unchecked, network, example(source, names, 2), meta)
            else:
                write_numpy(unchecked, *numpy_program(source), meta)
            difference = largest_difference(source, network, names, kind(unchecked))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{path.name} differs from the checkpoint by {difference:.1e}, more than {TOLERANCE}"
                )
            os.replace(unchecked, path)
        finally:
            unchecked.unlink(missing_ok=True)
        differences[str(path)] = difference
    return differences


# ---------------------------------------------------------------------------------------------------------- latency ---
def latency_table(policies: dict[str, object], repeats: int) -> str:
    """Microseconds for one image and one action, batch 1: a frame of 640 x 480, then `act` on what comes of it."""
    lines = [
        f"{'us on one thread':24}{'preprocess: min':>16}{'median':>8}{'act: min':>16}{'median':>8}"
    ]
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    for name, policy in policies.items():
        cameras = len(policy.spec["cameras"])
        obs = {"state": np.zeros((1, len(policy.spec["state_layout"])), np.float32)}

        def prepare(policy=policy, cameras=cameras):
            return np.concatenate([policy.preprocess(frame)] * cameras, -1)

        columns = []
        for pixels, call in (
            (True, prepare),
            (False, lambda policy=policy, obs=obs: policy.act(obs)),
        ):
            if pixels and not cameras:
                columns.append(f"{'-':>24}")
                continue
            obs |= {"rgb": prepare()} if cameras else {}
            times = []
            for _ in range(repeats + 5):
                begin = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - begin))
            columns.append(f"{min(times[5:]):>16.0f}{np.median(times[5:]):>8.0f}")
        lines.append(f"{name:24}{''.join(columns)}")
    return "\n".join(lines)


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(1)
    differences = export(args)
    policies = {"torch": TorchPolicy(args.checkpoint)}
    for path, difference in differences.items():
        kind = OnnxPolicy if path.endswith(".onnx") else NumpyPolicy
        policies[{OnnxPolicy: "ONNX Runtime", NumpyPolicy: "NumPy"}[kind]] = kind(path)
        print(
            f"{path}: {os.path.getsize(path) / 1e6:.2f} MB, differs from the checkpoint by {difference:.1e} at most"
        )
    print(latency_table(policies, args.repeats))


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ExportError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
