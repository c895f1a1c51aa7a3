"""Cameras: the newest frame, how old it is, and whether it may be trusted.

A `Camera` wraps a *source*: anything that can be called and returns one picture, uint8 (H, W, 3), red first. The
sources here are a USB camera with its automatics locked (`OpenCVSource`), a file (`FileSource`), pictures in memory
(`ArraySource`), and pictures drawn on demand with a known delay (`RenderSource`). The clock is injected, so that tests
and the emulated arm run in virtual time.

Nothing is done to a picture here but a turn by quarters: cutting out the square and taking the area mean belongs to the
policy (`hardware/policy.py`), which does it exactly as training does.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, FPS = 640, 480, 30.0
DARK = 2.0  # mean brightness, of 255, below which a picture counts as black
SETTLE = 30  # frames that exposure and white balance get to settle before they are locked
CAMERA_FILE = (
    Path(__file__).resolve().parent.parent / "envs" / "so101_cameras.json"
)  # see aligned_cameras
VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm")


class CameraError(Exception):
    """A camera that cannot be used, or a frame that must not be; one sentence that says why and what to do."""


@dataclass(frozen=True)
class Frame:
    """A picture, uint8 (H, W, 3); `time`, in seconds of the camera's clock, when it arrived; `index`, from 0."""

    rgb: np.ndarray
    time: float
    index: int


class Camera:
    """The newest frame of a source. `latest` raises CameraError for one that a policy must not act on.

    size            (height, width) that every frame must have; None: that of the first one
    max_age         seconds after which the newest frame is too old
    threaded        read in a thread of its own, so that a slow source costs age and no waiting; False: read on demand
    need_colour     refuse pictures without any colour: a monochrome or infrared camera
    frozen_after    seconds without the smallest change after which a picture counts as frozen; None: never. A real
                    sensor is never without noise, a renderer may well be
    """

    def __init__(
        self, source: Callable[[], np.ndarray | None], clock: Callable[[], float] = time.monotonic, *,
        size: tuple[int, int] | None = None, max_age: float = 0.2, threaded: bool = True, need_colour: bool = False,
        frozen_after: float | None = None, name: str = "camera",
    ):  # fmt: skip
        self.source, self.clock, self.size, self.max_age, self.name = (
            source,
            clock,
            size,
            max_age,
            name,
        )
        self.need_colour, self.frozen_after = need_colour, frozen_after
        self.frame, self.problem, self.changed, self.checked = None, None, None, -1
        self.arrival, self.closing, self.thread = threading.Condition(), False, None
        if threaded:
            self.thread = threading.Thread(target=self._read_on, name=f"{name} reader", daemon=True)
            self.thread.start()

    def _read(self) -> bool:
        """Takes one picture from the source. False once there will be no more."""
        try:
            rgb, problem = self.source(), None
            if rgb is None:
                problem = "gave no frame: is it still plugged in?"
        except CameraError as error:
            rgb, problem = None, str(error)
        except (
            Exception
        ) as error:  # whatever a driver raises, the arm must be stopped in an orderly way
            rgb, problem = None, f"failed: {type(error).__name__}: {error}"
        with self.arrival:
            now = self.clock()
            if problem:
                self.problem = problem
            else:
                last = self.frame
                if last is None or self.frozen_after is None or not np.array_equal(rgb, last.rgb):
                    self.changed = now
                self.frame = Frame(rgb, now, 0 if last is None else last.index + 1)
            self.arrival.notify_all()
        return not problem

    def _read_on(self) -> None:
        while not self.closing and self._read():
            time.sleep(
                0.001
            )  # a source that never waits must not take the processor from the control loop

    def wait(self, timeout: float = 5.0) -> Frame:
        """The first usable frame; waits for it up to `timeout` real seconds. Raises CameraError as `latest` does."""
        if self.thread is not None:
            with self.arrival:
                self.arrival.wait_for(
                    lambda: self.frame is not None or self.problem is not None, timeout
                )
        return self.latest()

    def latest(self) -> Frame:
        """The newest frame. Raises CameraError if there is none, or if it is too old, misshapen, black, frozen ..."""
        if self.thread is None:
            self._read()
        with self.arrival:
            frame, problem, changed = self.frame, self.problem, self.changed
        if problem:
            raise CameraError(f"{self.name}: {problem}")
        if frame is None:
            raise CameraError(f"{self.name}: has given no frame yet: is another program using it?")
        if self.closing:
            raise CameraError(f"{self.name}: is closed")
        now = self.clock()
        if now - frame.time > self.max_age:
            age = f"{1000 * (now - frame.time):.0f} ms"
            raise CameraError(
                f"{self.name}: the newest frame is {age} old, more than {1000 * self.max_age:.0f} ms"
            )
        if self.frozen_after is not None and now - changed > self.frozen_after:
            raise CameraError(
                f"{self.name}: the picture is frozen: no pixel has changed for {now - changed:.1f} s"
            )
        if frame.index != self.checked:
            self._check(frame.rgb)
            self.checked = frame.index
        return frame

    def _check(self, rgb: np.ndarray) -> None:
        if (
            not isinstance(rgb, np.ndarray)
            or rgb.dtype != np.uint8
            or rgb.ndim != 3
            or rgb.shape[2] != 3
        ):
            kind = f"{rgb.dtype} {rgb.shape}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
            raise CameraError(f"{self.name}: a frame must be uint8 (height, width, 3), not {kind}")
        if self.size is None:
            self.size = rgb.shape[:2]
        if rgb.shape[:2] != tuple(self.size):
            got, want = ("{1} x {0}".format(*shape) for shape in (rgb.shape, self.size))
            raise CameraError(f"{self.name}: the frame is {got} pixels, expected {want}")
        thin = rgb[::4, ::4]  # brightness and colour of one pixel in 16 say enough
        if thin.mean() < DARK:
            raise CameraError(f"{self.name}: the picture is black: lens cap, exposure or cable?")
        if self.need_colour and (thin.max(2) - thin.min(2)).max() == 0:
            raise CameraError(
                f"{self.name}: the picture has no colour, but the policy was trained on colours"
            )

    def close(self) -> None:
        """Stops reading and closes the source; may be called twice."""
        self.closing = True
        if self.thread is not None:
            self.thread.join(
                1.0
            )  # a driver that hangs in a read does not hold up the end: the thread is a daemon
        close = getattr(self.source, "close", None)
        if close is not None and not (self.thread and self.thread.is_alive()):
            close()


# ---------------------------------------------------------------------------------------------------------- sources ---
class OpenCVSource:
    """A USB camera through OpenCV, its exposure, white balance and focus fixed so that colours mean one thing.

    Automatics may first settle for 30 frames on what stands before the camera; then they are switched off, and what
    they found stays. Give `exposure` (the driver's unit), `white_balance` (kelvin) or `focus` to fix them to a value.
    A camera that refuses to lock exposure or white balance raises CameraError unless `allow_auto`; without autofocus
    there is nothing to lock. `settings` tells what the driver answered.

    turn    quarter turns, counter-clockwise, that bring the picture upright: 0, 1, 2 or 3
    """

    def __init__(
        self, device: int | str = 0, width: int = WIDTH, height: int = HEIGHT, fps: float = FPS, *, turn: int = 0,
        exposure: float | None = None, white_balance: float | None = None, focus: float | None = None,
        allow_auto: bool = False, settle: int = SETTLE,
    ):  # fmt: skip
        try:
            import cv2
        except ImportError:
            raise CameraError('a camera needs OpenCV: pip install -e ".[hardware]"') from None
        device = int(device) if str(device).isdigit() else device
        self.device, self.turn, self.settings = device, turn, {}
        v4l2 = (
            hasattr(cv2, "CAP_V4L2")
            and Path("/dev").exists()
            and Path("/sys/class/video4linux").exists()
        )
        self.capture = cv2.VideoCapture(device, cv2.CAP_V4L2 if v4l2 else cv2.CAP_ANY)
        if not self.capture.isOpened():
            raise CameraError(
                f"camera {device} cannot be opened: list them with `ls /dev/video*`; may you read it?"
            )
        try:
            self._set_up(
                cv2, width, height, fps, exposure, white_balance, focus, allow_auto, settle
            )
        except CameraError:
            self.close()
            raise

    def _set_up(
        self, cv2, width, height, fps, exposure, white_balance, focus, allow_auto, settle
    ) -> None:
        ask, tell = self.capture.get, self.capture.set
        tell(
            cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*"MJPG")
        )  # raw pictures of two cameras fill one USB 2 bus
        (
            tell(cv2.CAP_PROP_FRAME_WIDTH, width),
            tell(cv2.CAP_PROP_FRAME_HEIGHT, height),
            tell(cv2.CAP_PROP_FPS, fps),
        )
        tell(cv2.CAP_PROP_BUFFERSIZE, 1)  # an old frame is worth less than none
        got = int(ask(cv2.CAP_PROP_FRAME_WIDTH)), int(ask(cv2.CAP_PROP_FRAME_HEIGHT))
        if got != (width, height):
            raise CameraError(
                f"camera {self.device} gives {got[0]} x {got[1]} pixels, not {width} x {height}"
            )
        manual, auto = (1, 3) if self.capture.getBackendName() == "V4L2" else (0.25, 0.75)
        tell(cv2.CAP_PROP_AUTO_EXPOSURE, auto if exposure is None else manual)
        tell(cv2.CAP_PROP_AUTO_WB, 1 if white_balance is None else 0)
        tell(cv2.CAP_PROP_AUTOFOCUS, 1 if focus is None else 0)
        for _ in range(settle):
            self()
        for name, switch, off, prop, value in (
            ("exposure", cv2.CAP_PROP_AUTO_EXPOSURE, manual, cv2.CAP_PROP_EXPOSURE, exposure),
            ("white balance", cv2.CAP_PROP_AUTO_WB, 0, cv2.CAP_PROP_WB_TEMPERATURE, white_balance),
            ("focus", cv2.CAP_PROP_AUTOFOCUS, 0, cv2.CAP_PROP_FOCUS, focus),
        ):
            found = ask(prop)  # what the automatic chose, before it is switched off
            locked = bool(tell(switch, off)) and ask(switch) == off
            if locked and (value is not None or name == "exposure"):
                locked = bool(tell(prop, found if value is None else value)) or value is None
            self.settings[name] = dict(locked=locked, value=ask(prop))
            if not locked and not allow_auto and (name != "focus" or value is not None):
                raise CameraError(
                    f"camera {self.device} does not lock its {name}: colours would drift away from those of training. "
                    "Take another camera, or accept it with --allow-auto"
                )

    def __call__(self) -> np.ndarray:
        ok, bgr = self.capture.read()
        if not ok or bgr is None:
            raise CameraError(f"camera {self.device} gave no frame: is it still plugged in?")
        return np.ascontiguousarray(np.rot90(bgr[..., ::-1], self.turn))

    def close(self) -> None:
        self.capture.release()


class ArraySource:
    """Pictures in memory, (T, H, W, 3), shown at `fps` by the clock; the last one stays, or with `loop` they repeat."""

    def __init__(
        self,
        frames,
        fps: float = FPS,
        clock: Callable[[], float] = time.monotonic,
        *,
        loop: bool = False,
    ):
        self.frames, self.fps, self.clock, self.loop, self.start = frames, fps, clock, loop, None
        if not len(frames):
            raise CameraError("there is no picture to show")

    def __call__(self) -> np.ndarray:
        self.start = self.clock() if self.start is None else self.start
        shown = int((self.clock() - self.start) * self.fps + 1e-6)
        return self.frames[
            shown % len(self.frames) if self.loop else min(shown, len(self.frames) - 1)
        ]


class FileSource(ArraySource):
    """A picture, or a video played at `fps` by the clock (its own rate if None). Raises CameraError for any other."""

    def __init__(self, path: str | Path, fps: float | None = None, clock: Callable[[], float] = time.monotonic, *,
                 loop: bool = True):  # fmt: skip
        import imageio.v2 as imageio

        path = Path(path)
        if not path.is_file():
            raise CameraError(f"there is no picture or video {path}")
        try:
            if path.suffix.lower() in VIDEO:
                with imageio.get_reader(path) as reader:
                    fps = fps or reader.get_meta_data()["fps"]
                    frames = [np.asarray(frame) for frame in reader]
            else:
                frames = [np.asarray(imageio.imread(path))[..., :3]]
        except Exception as error:  # one of many readers, each with its own exceptions
            raise CameraError(f"{path} cannot be read as a picture or a video ({error})") from None
        super().__init__(frames, fps or FPS, clock, loop=loop)


class RenderSource:
    """Pictures drawn on demand: `render(time)` -> uint8 (H, W, 3) of the scene at that time of the clock.

    What it shows is `delay` seconds old, and as with a real camera nobody is told: `Frame.time` is the arrival.
    """

    def __init__(
        self, render: Callable[[float], np.ndarray], clock: Callable[[], float], delay: float = 0.0
    ):
        self.render, self.clock, self.delay = render, clock, delay

    def __call__(self) -> np.ndarray:
        return self.render(self.clock() - self.delay)


def aligned_cameras(path: str | Path = CAMERA_FILE) -> dict[str, dict]:
    """What `hardware/align_camera.py` has measured of this arm's cameras: {name: values}; {} where it never ran.

    values: mount, pos (metres, in its frame), quat_wxyz (looks along -z, x to the right), fovy_degrees, and
    quarter_turns, which bring the real picture upright. The simulator (envs/so101) builds its cameras from the same
    file. Raises CameraError where the file is not as it should be.
    """
    path, shapes = Path(path), {"pos": 3, "quat_wxyz": 4}
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for values in content.values():
            numbers = [*values["pos"], *values["quat_wxyz"], values["fovy_degrees"]]
            right = (
                all(len(values[key]) == length for key, length in shapes.items())
                and np.isfinite(numbers).all()
            )
            if (
                not right
                or not isinstance(values["mount"], str)
                or values["quarter_turns"] not in (0, 1, 2, 3)
            ):
                raise ValueError("wrong values")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CameraError(
            f"{path} is damaged: remove it and align again (hardware/align_camera.py)"
        ) from None
    return content


def frame_around(
    square: np.ndarray, height: int = HEIGHT, width: int = WIDTH, margin: int = 90
) -> np.ndarray:
    """A camera's frame whose middle square is `square`, enlarged by repeating pixels; the sides are grey `margin`.

    Raises CameraError unless the frame's shorter side is a multiple of the square's.
    """
    side = min(height, width)
    if square.shape[0] != square.shape[1] or side % square.shape[0]:
        raise CameraError(
            f"{square.shape[1]} x {square.shape[0]} pixels do not enlarge evenly to {side} x {side}"
        )
    times = side // square.shape[0]
    frame = np.full((height, width, 3), margin, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    frame[top : top + side, left : left + side] = square.repeat(times, 0).repeat(times, 1)
    return frame
