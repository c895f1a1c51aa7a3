"""A trained policy for the robot: from a checkpoint (torch), or from an exported file (ONNX or NumPy, without torch).

    policy = load_policy("runs/NAME/best.pt")    # or NAME.onnx, or NAME.npz: see hardware/export.py
    policy.reset()                               # at the start of every episode
    image = policy.preprocess(frame)             # uint8 (H, W, 3), any size -> (1, h, h, 3), as in training
    action = policy.act({"rgb": image, "state": state})    # NumPy in, NumPy out: (1, A) in [-1, 1]

Every policy has `spec`, the robot that it was trained for: joints, limits, control rate, action scale, cameras, layout
of the state (see `envs/__init__.py`). Nothing here imports a simulator. A checkpoint names its algorithm, and the class
`Policy` of `algos/<algorithm>.py` rebuilds it.
"""

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

ALGOS = Path(__file__).resolve().parent.parent / "algos"
FORMAT = 2  # of exported files; raised when older readers would go wrong
PREPROCESS = "middle square, area mean in float32, rounded half to even"


class PolicyError(Exception):
    """A policy that cannot be loaded, or is asked for something that it cannot do; one sentence."""


def load_policy(path: str | Path, device: str = "cpu"):
    """The policy in a file: a checkpoint (.pt), or an export (.onnx, .npz). Raises PolicyError in one line."""
    path = Path(path)
    if not path.is_file():
        raise PolicyError(f"there is no policy {path}")
    kinds = {".pt": TorchPolicy, ".onnx": OnnxPolicy, ".npz": NumpyPolicy}
    if path.suffix not in kinds:
        raise PolicyError(f"{path}: a policy is a checkpoint (.pt) or an export (.onnx, .npz)")
    return kinds[path.suffix](path, device)


def file_digest(path: str | Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256: enough to tell one policy from another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- preprocessing ---
def area_mean(rgb: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, C) -> uint8 (N, size, size, C), bit for bit what training's area mean gives.

    The windows are those of torch's "area" interpolation, [i H / size] down to [(i + 1) H / size] up, which overlap
    where H is not a multiple. Sums of integers are exact; then come the same two divisions in float32, and rint.
    """
    n, h, w, channels = rgb.shape
    if h == w == size:
        return rgb
    if min(h, w) < size:
        raise PolicyError(f"the policy sees {size} x {size} pixels, the image has only {w} x {h}")
    i = np.arange(size)
    (top, bottom), (left, right) = ((i * m // size, -(-(i + 1) * m // size)) for m in (h, w))
    # reduceat adds from each index up to the next: every second sum is a window, and the last runs to the edge
    rows = np.add.reduceat(rgb, np.stack((top, bottom), 1).ravel()[:-1], axis=1, dtype=np.uint32)[
        :, ::2
    ]
    sums = np.add.reduceat(rows, np.stack((left, right), 1).ravel()[:-1], axis=2)[:, :, ::2]
    mean = sums.astype(np.float32) / (bottom - top).astype(np.float32)[:, None, None]
    return np.rint(mean / (right - left).astype(np.float32)[:, None]).astype(np.uint8)


def middle_square(frame: np.ndarray) -> np.ndarray:
    """The middle square of an image (H, W, C)."""
    side = min(frame.shape[:2])
    top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
    return frame[top : top + side, left : left + side]


ALGORITHMS = ("squint_sac", "drqv2", "sac_pixels")  # of algos/: those whose policies see by cameras


# ------------------------------------------------------------------------------------------------- from checkpoints ---
def algorithm(name: str):
    """The module `algos/<name>.py`, which is no package. Raises PolicyError where there is none."""
    if name not in ALGORITHMS:  # no module is imported because a file names it
        known = ", ".join(ALGORITHMS)
        raise PolicyError(
            f"the checkpoint names the algorithm {name!r}; the arm runs those of {known}"
        )
    path = ALGOS / f"{name}.py"
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, ImportError):
            raise PolicyError(
                f"algos/{name}.py needs {error.name}: run `pip install -e .`"
            ) from None
        raise
    return module


class TorchPolicy:
    """A checkpoint's own `Policy`, with NumPy going in and coming out."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        try:
            import torch
        except ImportError:
            raise PolicyError(
                f"{path} needs torch; an exported policy does not: see hardware/export.py"
            ) from None
        try:
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True
            )  # runs no code from the file
        except Exception:  # torch names many kinds of damage; the reader needs one line
            raise PolicyError(
                f"{path} cannot be read as a checkpoint: it is damaged or another kind of file"
            ) from None
        if not isinstance(checkpoint, dict) or "algo" not in checkpoint or "spec" not in checkpoint:
            raise PolicyError(
                f"{path} is not a checkpoint of algos/: it names no algorithm or no robot"
            )
        self.algo, self.spec = checkpoint["algo"], checkpoint["spec"]
        try:
            self.net = algorithm(self.algo).Policy(checkpoint, device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PolicyError(
                f"{path} does not fit algos/{self.algo}.py of this version: {reason}"
            ) from None
        if not hasattr(self.net, "preprocess"):
            raise PolicyError(f"{path}: the policy of {self.algo} does not take a camera's image")
        self.path, self.digest, self.view = Path(path), file_digest(path), None

    def reset(self) -> None:
        """Call at the start of every episode: a policy may remember the one before."""
        if hasattr(self.net, "reset"):
            self.net.reset()

    def preprocess(self, frame: np.ndarray) -> np.ndarray:
        """A camera's frame, uint8 (H, W, 3) of any size -> its middle square, area mean: uint8 (1, h, h, 3)."""
        return self.net.preprocess(frame).cpu().numpy()

    def act(self, obs: dict) -> np.ndarray:
        """obs "rgb" uint8 (N, h, h, C), cameras on channels, "state" (N, S) -> actions (N, A) in [-1, 1]."""
        self.view = area_mean(np.asarray(obs["rgb"]), self.net.args.image_size)
        return self.net.act({**obs, "rgb": self.view}).cpu().numpy()


# ----------------------------------------------------------------------------------------------------- from exports ---
class ExportedPolicy:
    """What ONNX and NumPy exports share: the description, the images. `run` is the network."""

    def __init__(self, path: str | Path, meta: str | None):
        try:
            meta = json.loads(meta or "")
        except ValueError:
            raise PolicyError(
                f"{path} was not written by hardware/export.py: it has no description"
            ) from None
        if meta.get("format") != FORMAT:
            raise PolicyError(
                f"{path} has format {meta.get('format')}, this version reads {FORMAT}: export it again"
            )
        if meta["preprocess"] != PREPROCESS:
            raise PolicyError(
                f"{path} wants images prepared by {meta['preprocess']!r}, which is unknown here"
            )
        self.path, self.digest, self.meta = Path(path), file_digest(path), meta
        self.algo, self.spec = meta["algo"], meta["spec"]
        self.image_size, self.view = meta["image_size"], None  # image_size: None without a camera

    def run(self, inputs: dict) -> np.ndarray:
        """The network itself; each file format has its own."""
        raise NotImplementedError

    def reset(self) -> None:
        """Nothing to forget: an export acts on the present observation alone."""

    def preprocess(self, frame: np.ndarray) -> np.ndarray:
        """A camera's frame, uint8 (H, W, 3) of any size -> its middle square, area mean: uint8 (1, h, h, 3)."""
        return area_mean(middle_square(frame)[None], self.image_size)

    def act(self, obs: dict) -> np.ndarray:
        """obs "rgb" uint8 (N, h, h, C), cameras on channels, "state" (N, S) -> actions (N, A) in [-1, 1]."""
        inputs = {"state": np.asarray(obs["state"], np.float32)}
        if self.image_size is not None:
            self.view = inputs["rgb"] = area_mean(np.asarray(obs["rgb"]), self.image_size)
        return self.run(inputs)


class OnnxPolicy(ExportedPolicy):
    """An exported policy in ONNX Runtime, one thread on the processor; torch is not needed."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        try:
            import onnxruntime
        except ImportError:
            raise PolicyError(
                f"{path} needs ONNX Runtime: pip install onnxruntime; or export to .npz"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class
            raise PolicyError(
                f"{path} cannot be read as ONNX: {str(error).splitlines()[0]}"
            ) from None
        super().__init__(path, self.session.get_modelmeta().custom_metadata_map.get("cleanrobot"))

    def run(self, inputs: dict) -> np.ndarray:
        return self.session.run(None, inputs)[0]


class NumpyPolicy(ExportedPolicy):
    """An exported policy in NumPy alone."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise PolicyError(f"{path} cannot be read as a NumPy export: {error}") from None
        super().__init__(path, str(content.pop("meta", "")))
        self.program, self.weights = json.loads(str(content.pop("program"))), content

    def run(self, inputs: dict) -> np.ndarray:
        return run_program(self.program, self.weights, inputs)


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """(N, C, H, W) with weight (O, C, k, k), no padding -> (N, O, H', W')."""
    patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[
        :, :, ::stride, ::stride
    ]
    return (np.tensordot(patches, weight, ((1, 4, 5), (1, 2, 3))) + bias).transpose(0, 3, 1, 2)


def _normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(eps)) * weight
        + bias
    )


OPERATIONS = {
    "pixels": lambda x: (
        x.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.5)
    ),
    "conv": _convolve,
    "linear": lambda x, weight, bias: x @ weight + bias,
    "norm": _normalise,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "tanh": np.tanh,
    "silu": lambda x: x / (np.float32(1) + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, np.float32(0)))),
    "flatten": lambda x: x.reshape(len(x), -1),
    "concat": lambda *parts: np.concatenate(parts, -1),
}


def run_program(
    program: list[dict], weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """A network as a list of steps {op, in, out, weights, and the operation's own numbers}; the last one's result."""
    values = dict(inputs)
    for step in program:
        numbers = {
            key: value for key, value in step.items() if key not in ("op", "in", "out", "weights")
        }
        arguments = [values[name] for name in step["in"]] + [
            weights[name] for name in step.get("weights", ())
        ]
        values[step["out"]] = OPERATIONS[step["op"]](*arguments, **numbers)
    return values[program[-1]["out"]]
