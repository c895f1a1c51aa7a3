"""Brings the simulated wrist camera to where the real one is: their pictures side by side, and blended.

    python -m hardware.align_camera --camera 0                                   a window with the live camera
    python -m hardware.align_camera --image photo.png --out panel.png            one picture, no window
    python -m hardware.align_camera --camera 0 --view runs/NAME/best.onnx        without a simulator: only to compare

Put the arm into its start pose (`hardware/deploy_so101.py --hold`) and a cube on the table, 23 cm in front of the base.
The panel shows real, simulated, and both blended; keys move the simulated camera until the fingers and the cube
coincide:
    a d  w s  r f    left and right, up and down, forward and back, by 1 mm
    j l  i k  u o    turn left and right, up and down, roll, by half a degree
    - +              field of view, by half a degree
    [ ]              blend         t    turn the real picture by a quarter
    enter            write the values        q, Esc    leave without writing

The values go to `envs/so101_cameras.json`, which the simulator reads when a scene is built and the deployer before it
starts: a policy that was trained with another camera is refused. They are never pasted into source.
"""

import base64
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.camera import (
    CAMERA_FILE,
    Camera,
    CameraError,
    FileSource,
    OpenCVSource,
    aligned_cameras,
)
from hardware.policy import PolicyError, load_policy, middle_square

SIDE = 360  # pixels of each of the three pictures
STEP, TURN, ZOOM = 0.001, math.radians(0.5), 0.5  # metres, radians, degrees for a key
MOVES = {
    "a": (-1, 0, 0),
    "d": (1, 0, 0),
    "w": (0, 1, 0),
    "s": (0, -1, 0),
    "r": (0, 0, -1),
    "f": (0, 0, 1),
}
TURNS = {
    "j": (0, 1, 0),
    "l": (0, -1, 0),
    "i": (1, 0, 0),
    "k": (-1, 0, 0),
    "u": (0, 0, 1),
    "o": (0, 0, -1),
}
FOVY = (20.0, 140.0)  # degrees, the narrowest and widest that make sense


@dataclass
class Args:
    camera: str | None = None  # number or device of the real camera
    image: str | None = None  # a picture or video in its place
    name: str = "wrist"  # of the camera in the task
    view: str | None = None  # an exported policy whose start view stands in for the simulator
    checkpoint: str | None = (
        None  # a policy whose task and start pose to draw; None: SO101ReachCube-v1
    )
    file: str = str(CAMERA_FILE)  # of the values: read if there, and written
    out: str | None = None  # write the panel to this PNG and leave, without a window
    keys: str = ""  # keys to press before anything is shown
    write: bool = False  # with --out: write the values to the file as well
    allow_auto: bool = False  # accept a camera that does not lock its exposure or white balance

    checkpoint: str | None = (
        None  # a policy whose task, start pose and camera to draw; None: SO101ReachCube-v1
    )


def quaternion_product(a, b) -> np.ndarray:
    """Of two quaternions (w, x, y, z)."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return np.array((aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                     aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw))  # fmt: skip


def rotate(quat, vector) -> np.ndarray:
    """A vector in the frame of a unit quaternion (w, x, y, z), seen from outside."""
    w, axis = quat[0], np.asarray(quat[1:])
    t = 2 * np.cross(axis, vector)
    return np.asarray(vector) + w * t + np.cross(axis, t)


def press(values: dict, key: str) -> dict:
    """The camera's values after a key; those of a key that does nothing are the same. Moves are along its own axes.

    values: pos (metres, in the frame of `mount`), quat_wxyz (looks along -z, x right), fovy_degrees, quarter_turns.
    """
    values, quat = dict(values), np.asarray(values["quat_wxyz"], float)
    if key in MOVES:
        values["pos"] = (
            np.asarray(values["pos"]) + STEP * rotate(quat, np.array(MOVES[key], float))
        ).tolist()
    elif key in TURNS:
        small = np.array((math.cos(TURN / 2), *(math.sin(TURN / 2) * np.array(TURNS[key], float))))
        turned = quaternion_product(quat, small)
        values["quat_wxyz"] = (turned / np.linalg.norm(turned)).tolist()
    elif key in ("-", "+", "="):
        fovy = values["fovy_degrees"] + (ZOOM if key == "-" else -ZOOM)  # + brings things nearer
        values["fovy_degrees"] = min(max(fovy, FOVY[0]), FOVY[1])
    elif key == "t":
        values["quarter_turns"] = (values["quarter_turns"] + 1) % 4
    return values


def square(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The middle square of a picture, nearest pixels, (side, side, 3)."""
    middle = middle_square(picture)
    at = np.arange(side) * len(middle) // side
    return middle[at][:, at]


def panel(real: np.ndarray, simulated: np.ndarray, blend: float, turns: int = 0) -> np.ndarray:
    """Real, simulated, and `blend` of the simulated over the real: uint8 (SIDE, 3 SIDE, 3)."""
    left, middle = square(np.rot90(real, turns)), square(simulated)
    both = np.rint((1 - blend) * left + blend * middle).astype(np.uint8)
    return np.concatenate((left, middle, both), 1)


def write_values(path: str | Path, name: str, values: dict) -> None:
    """Puts the values of one camera into the file, and leaves those of others. Never leaves half a file behind."""
    path = Path(path)
    content = json.loads(path.read_text()) if path.exists() else {}
    content[name] = values
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------ views ---
class SimulatedView:
    """The simulator's picture of the start pose for any values; drawn anew only when they have changed."""

    def __init__(self, spec: dict, name: str):
        from hardware.emulate import StartView

        self.view, self.values, self.picture = StartView(spec, name), None, None

    def __call__(self, values: dict) -> np.ndarray:
        if values != self.values:
            self.values, self.picture = dict(values), self.view.draw(values)
        return self.picture


class StoredView:
    """The start view that was exported with a policy; keys that move the camera cannot move it."""

    def __init__(self, path: str):
        import imageio.v2 as imageio

        view = getattr(load_policy(path), "meta", {}).get("start_view")
        if view is None:
            raise PolicyError(
                f"{path} holds no start view: export it with one (see hardware/export.py)"
            )
        self.picture = np.asarray(imageio.imread(io.BytesIO(base64.b64decode(view))))[..., :3]

    def __call__(self, values: dict) -> np.ndarray:
        return self.picture


def begin(args: Args) -> tuple[dict, object]:
    """The values to start from, and what draws the simulated picture. Values: aligned before, or as in training."""
    if args.view or args.checkpoint:
        spec = load_policy(args.view or args.checkpoint).spec
    else:
        from hardware.emulate import task_spec

        spec = task_spec("SO101ReachCube-v1", (args.name,))
    if args.name not in spec["cameras"]:
        raise PolicyError(
            f"the task has no camera {args.name!r}; it has {', '.join(spec['cameras'])}"
        )
    values = aligned_cameras(args.file).get(args.name) or {
        **spec["cameras"][args.name],
        "quarter_turns": 0,
    }
    return values, StoredView(args.view) if args.view else SimulatedView(spec, args.name)


def main(args: Args) -> None:
    if bool(args.image) == bool(args.camera):
        raise CameraError("give --camera or --image")
    values, simulated = begin(args)
    for key in args.keys:
        values = press(values, key)
    source = (
        FileSource(args.image)
        if args.image
        else OpenCVSource(args.camera, allow_auto=args.allow_auto)
    )
    camera = Camera(source, threaded=not args.image, name=args.name)
    try:
        camera.wait()
        if args.out:
            import imageio.v2 as imageio

            imageio.imwrite(
                args.out,
                panel(camera.latest().rgb, simulated(values), 0.5, values["quarter_turns"]),
            )
            if args.write:
                write_values(args.file, args.name, values)
            print(json.dumps({args.name: values}))
        else:
            window(args, camera, simulated, values)
    finally:
        camera.close()


def window(args: Args, camera: Camera, simulated, values: dict) -> None:
    """Shows the panel and takes keys until enter, q or Esc."""
    import cv2

    blend, title = 0.5, f"{args.name} camera: real | simulated | both"
    try:
        cv2.namedWindow(title)
    except cv2.error:
        raise CameraError(
            "no window can be opened here: use --out, or a computer with a screen"
        ) from None
    while True:
        picture = panel(camera.latest().rgb, simulated(values), blend, values["quarter_turns"])
        cv2.imshow(title, picture[..., ::-1])
        key = chr(cv2.waitKey(30) & 0xFF)
        blend = min(max(blend + {"[": -0.1, "]": 0.1}.get(key, 0), 0), 1)
        if key in ("q", "\x1b"):
            print("left without writing")
            break
        if key in ("\r", "\n"):
            write_values(args.file, args.name, values)
            print(f"written to {args.file}: {json.dumps({args.name: values})}")
            break
        values = press(values, key)
    cv2.destroyAllWindows()


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (CameraError, PolicyError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
