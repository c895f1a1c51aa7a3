"""Cameras: every frame that must not be acted on is refused; pictures are prepared bit for bit as in training."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import squint_sac
import torch

from hardware import align_camera
from hardware import policy as hardware_policy
from hardware.camera import (
    ArraySource,
    Camera,
    CameraError,
    FileSource,
    OpenCVSource,
    RenderSource,
    aligned_cameras,
    frame_around,
)
from hardware.emulator import VirtualClock
from hardware.policy import area_mean, middle_square


def picture(value=100, height=48, width=64):
    """A picture with some colour."""
    rgb = np.full((height, width, 3), value, np.uint8)
    rgb[0, 0] = 0, 0, 255
    return rgb


def on_demand(source, clock=None, **options):
    return Camera(source, clock or VirtualClock(), threaded=False, **options)


# --- Frames -----------------------------------------------------------------------------------------------------------
def test_the_newest_frame_with_its_time_and_number():
    clock, shown = VirtualClock(5.0), iter((picture(10), picture(20)))
    camera = on_demand(lambda: next(shown), clock)
    first = camera.latest()
    clock.sleep(0.1)
    second = camera.latest()
    assert (first.time, first.index, second.time, second.index) == (5.0, 0, 5.1, 1)
    assert first.rgb.mean() < second.rgb.mean()


def test_a_frame_that_is_too_old_is_refused_and_age_counts_from_arrival():
    clock, release = VirtualClock(), threading.Semaphore(1)

    def source():
        assert release.acquire(timeout=20)
        return picture()

    camera = Camera(source, clock, max_age=0.2)
    assert camera.wait(20).index == 0
    clock.sleep(0.2)
    assert camera.latest().index == 0
    clock.sleep(0.05)
    with pytest.raises(CameraError, match="the newest frame is 250 ms old, more than 200 ms"):
        camera.latest()
    release.release()
    deadline = time.monotonic() + 20
    while camera.frame.index == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert camera.latest().time == 0.25
    release.release(10_000)
    camera.close()
    assert not camera.thread.is_alive()
    with pytest.raises(CameraError, match="is closed"):
        camera.latest()


def test_a_threaded_camera_that_gives_nothing_says_so():
    hang = threading.Event()
    camera = Camera(lambda: hang.wait(20), name="wrist")
    with pytest.raises(CameraError, match="wrist: has given no frame yet"):
        camera.wait(0.05)
    hang.set()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: None, "gave no frame: is it still plugged in"),
        (
            lambda: (_ for _ in ()).throw(CameraError("camera 0 gave no frame")),
            "camera 0 gave no frame",
        ),
        (lambda: [][0], "failed: IndexError: list index out of range"),
        (lambda: np.zeros((48, 64, 3), np.uint8), "the picture is black"),
        (
            lambda: np.zeros((48, 64), np.uint8),
            r"must be uint8 \(height, width, 3\), not uint8 \(48, 64\)",
        ),
        (lambda: np.zeros((48, 64, 3)), "not float64"),
        (lambda: "frame", "not str"),
    ],
)
def test_frames_that_are_none_are_refused(broken, message, threaded):
    camera = Camera(broken, VirtualClock(), threaded=threaded)
    with pytest.raises(CameraError, match=message):
        camera.wait(20)
    camera.close()


def test_a_source_that_fails_later_stays_failed():
    answers = iter((picture(), None, picture()))
    camera = on_demand(lambda: next(answers))
    camera.latest()
    for _ in range(2):
        with pytest.raises(CameraError, match="gave no frame"):
            camera.latest()


def test_the_size_is_that_expected_or_that_of_the_first_frame():
    with pytest.raises(CameraError, match="the frame is 64 x 48 pixels, expected 640 x 480"):
        on_demand(picture, size=(480, 640)).latest()
    shapes = iter(((48, 64), (48, 64), (64, 48)))
    camera = on_demand(lambda: picture(100, *next(shapes)))
    camera.latest(), camera.latest()
    with pytest.raises(CameraError, match="the frame is 48 x 64 pixels, expected 64 x 48"):
        camera.latest()


def test_a_picture_without_colour_is_refused_where_colour_is_needed():
    grey = np.full((48, 64, 3), 90, np.uint8)
    assert on_demand(lambda: grey).latest().rgb is grey
    with pytest.raises(CameraError, match="no colour"):
        on_demand(lambda: grey, need_colour=True).latest()
    on_demand(picture, need_colour=True).latest()


def test_a_frozen_picture_is_refused_and_a_single_changed_pixel_is_not_frozen():
    clock, rgb = VirtualClock(), picture()
    camera = on_demand(lambda: rgb.copy(), clock, frozen_after=0.5)
    for _ in range(6):
        camera.latest()
        clock.sleep(0.1)
    with pytest.raises(CameraError, match="frozen: no pixel has changed for 0.6 s"):
        camera.latest()
    rgb[3, 3, 1] += 1
    camera.latest()


# --- Sources ----------------------------------------------------------------------------------------------------------
def test_pictures_in_memory_follow_the_clock():
    clock, frames = VirtualClock(), [picture(v) for v in (10, 20, 30)]
    once, loop = ArraySource(frames, 10, clock), ArraySource(frames, 10, clock, loop=True)
    shown = []
    for _ in range(5):
        shown.append((int(once()[5, 5, 0]), int(loop()[5, 5, 0])))
        clock.sleep(0.1)
    assert shown == [(10, 10), (20, 20), (30, 30), (30, 10), (30, 20)]
    with pytest.raises(CameraError, match="no picture"):
        ArraySource([])


def test_a_file_is_a_picture_or_a_video_at_its_own_rate(tmp_path):
    imageio.imwrite(tmp_path / "still.png", picture(77))
    assert (FileSource(tmp_path / "still.png")() == picture(77)).all()
    imageio.mimwrite(
        tmp_path / "film.mp4", [picture(v) for v in (30, 120, 210)], fps=5, macro_block_size=1
    )
    clock = VirtualClock()
    film = FileSource(tmp_path / "film.mp4", clock=clock)
    for value in (30, 120, 210, 30):
        assert abs(float(film().mean()) - value) < 12
        clock.sleep(0.2)
    with pytest.raises(CameraError, match="there is no picture or video"):
        FileSource(tmp_path / "none.mp4")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(CameraError, match="cannot be read as a picture or a video"):
        FileSource(tmp_path / "text.png")


def test_a_rendered_picture_is_late_by_the_delay_and_nobody_is_told():
    clock = VirtualClock(3.0)
    camera = on_demand(RenderSource(lambda at: picture(round(40 * at)), clock, 0.5), clock)
    frame = camera.latest()
    assert frame.rgb[5, 5, 0] == 100 and frame.time == 3.0


class FakeCapture:
    """A camera behind OpenCV's interface; `refuses` names properties that it will not set."""

    def __init__(self, refuses=(), size=(640, 480), opens=True, frames=10_000):
        self.refuses, self.size, self.opens, self.frames, self.log = (
            refuses,
            size,
            opens,
            frames,
            [],
        )
        self.values = {"EXPOSURE": 157.0, "WB_TEMPERATURE": 4600.0, "FOCUS": 30.0}

    def isOpened(self):  # noqa: N802
        return self.opens

    def getBackendName(self):  # noqa: N802
        return "V4L2"

    def set(self, prop, value):
        self.log.append((prop, value))
        if prop not in self.refuses:
            self.values[prop] = value
        return prop not in self.refuses

    def get(self, prop):
        sizes = {"FRAME_WIDTH": self.size[0], "FRAME_HEIGHT": self.size[1]}
        return sizes.get(prop, self.values.get(prop, 0.0))

    def read(self):
        self.log.append(("read", None))
        self.frames -= 1
        bgr = np.zeros((self.size[1], self.size[0], 3), np.uint8)
        bgr[..., 2] = 200  # red
        bgr[:10] = 255
        return (True, bgr) if self.frames >= 0 else (False, None)

    def release(self):
        self.log.append(("release", None))


@pytest.fixture
def opencv(monkeypatch):
    """Installs a FakeCapture in place of OpenCV."""

    def install(capture):
        names = ("FOURCC", "FRAME_WIDTH", "FRAME_HEIGHT", "FPS", "BUFFERSIZE", "AUTO_EXPOSURE", "AUTO_WB", "AUTOFOCUS",
                 "EXPOSURE", "WB_TEMPERATURE", "FOCUS")  # fmt: skip
        fake = SimpleNamespace(VideoCapture=lambda *_: capture, VideoWriter_fourcc=lambda *letters: "".join(letters),
                               CAP_V4L2=200, CAP_ANY=0, **{f"CAP_PROP_{name}": name for name in names})  # fmt: skip
        monkeypatch.setitem(sys.modules, "cv2", fake)
        return capture

    return install


def test_a_usb_camera_settles_first_and_is_locked_then(opencv):
    capture = opencv(FakeCapture())
    source = OpenCVSource("0", settle=3)
    assert (
        source.device == 0
        and capture.values["FOURCC"] == "MJPG"
        and capture.values["BUFFERSIZE"] == 1
    )
    reads = [i for i, (what, _) in enumerate(capture.log) if what == "read"]
    assert len(reads) == 3
    switches = {("AUTO_EXPOSURE", 1): 3, ("AUTO_WB", 0): 1, ("AUTOFOCUS", 0): 1}
    for (name, manual), auto in switches.items():
        assert (
            capture.log.index((name, auto)) < reads[0]
            and capture.log.index((name, manual)) > reads[-1]
        )
    assert ("EXPOSURE", 157.0) in capture.log, "what the automatic found is kept"
    assert source.settings["exposure"] == dict(locked=True, value=157.0)
    rgb = source()
    assert rgb.shape == (480, 640, 3) and rgb[100, 100].tolist() == [200, 0, 0], "red comes first"
    turned = OpenCVSource(0, turn=1, settle=0)()
    assert turned.shape == (640, 480, 3) and turned[100, 0].tolist() == [255, 255, 255]


def test_values_given_for_the_lock_are_set(opencv):
    capture = opencv(FakeCapture())
    OpenCVSource(0, exposure=90, white_balance=5000, focus=12, settle=2)
    assert (
        capture.values["EXPOSURE"],
        capture.values["WB_TEMPERATURE"],
        capture.values["FOCUS"],
    ) == (90, 5000, 12)
    assert ("AUTO_EXPOSURE", 3) not in capture.log


@pytest.mark.parametrize(
    ("prop", "name"), [("AUTO_EXPOSURE", "exposure"), ("AUTO_WB", "white balance")]
)
def test_a_camera_that_does_not_lock_is_refused_unless_accepted(opencv, prop, name):
    capture = opencv(FakeCapture(refuses=(prop,)))
    with pytest.raises(CameraError, match=f"does not lock its {name}.*--allow-auto"):
        OpenCVSource(0, settle=1)
    assert capture.log[-1][0] == "release"
    opencv(FakeCapture(refuses=(prop,)))
    assert not OpenCVSource(0, settle=1, allow_auto=True).settings[name]["locked"]


def test_a_camera_without_autofocus_is_fine_unless_a_focus_was_asked_for(opencv):
    opencv(FakeCapture(refuses=("AUTOFOCUS",)))
    OpenCVSource(0, settle=1)
    with pytest.raises(CameraError, match="focus"):
        OpenCVSource(0, settle=1, focus=10)


def test_a_usb_camera_that_is_not_what_was_asked_for(opencv):
    opencv(FakeCapture(size=(1280, 720)))
    with pytest.raises(CameraError, match="gives 1280 x 720 pixels, not 640 x 480"):
        OpenCVSource(0)
    opencv(FakeCapture(opens=False))
    with pytest.raises(CameraError, match="cannot be opened"):
        OpenCVSource("/dev/video7")
    opencv(FakeCapture(frames=3))
    source = OpenCVSource(0, settle=3)
    with pytest.raises(CameraError, match="gave no frame"):
        source()


def test_the_real_opencv_has_every_property_that_is_used():
    cv2 = pytest.importorskip("cv2", reason='needs OpenCV: pip install -e ".[hardware]"')
    with pytest.raises(CameraError, match="cannot be opened"):
        OpenCVSource("/no/such/camera")
    assert all(
        hasattr(cv2, f"CAP_PROP_{name}")
        for name in ("AUTO_EXPOSURE", "AUTO_WB", "WB_TEMPERATURE", "AUTOFOCUS")
    )


# --- Preparing pictures as training does ------------------------------------------------------------------------------
def pictures(count, seed=0):
    """Sizes, channels and contents of many kinds: noise, blocks that fall on ties, gradients."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        size, n, channels = int(draw.integers(10, 65)), 0, int(draw.choice([3, 6, 9]))
        n = int(draw.integers(size, 500))
        rgb = draw.integers(0, 256, (1, n, n, channels), dtype=np.uint8)
        if i % 3 == 1:
            rgb = rgb[:, ::7, ::7].repeat(7, 1).repeat(7, 2)[:, :n, :n]
        elif i % 3 == 2:
            rgb = np.minimum(np.add.outer(np.arange(n), np.arange(n)) // 3, 255).astype(np.uint8)[
                None, ..., None
            ]
            rgb = rgb.repeat(channels, -1)
        yield np.ascontiguousarray(rgb), size


def test_the_area_mean_in_numpy_equals_that_of_training_bit_for_bit():
    for rgb, size in pictures(120):
        expected = squint_sac.squint(torch.from_numpy(rgb), size).numpy()
        np.testing.assert_array_equal(
            area_mean(rgb, size), expected, err_msg=f"{rgb.shape} to {size}"
        )


def test_the_area_mean_by_hand():
    rgb = np.array([[10, 11, 200, 201], [11, 12, 201, 204]], np.uint8).repeat(2, 0)[None, ..., None]
    assert area_mean(rgb, 2)[0, ..., 0].tolist() == [[10, 200], [12, 202]], (
        "10.5, 200.5, 11.5, 202.5, halves to even"
    )
    with pytest.raises(
        hardware_policy.PolicyError, match="sees 16 x 16 pixels, the image has only 4 x 4"
    ):
        area_mean(rgb, 16)


def test_the_middle_square():
    wide = np.arange(6 * 10 * 3).reshape(6, 10, 3)
    assert (middle_square(wide) == wide[:, 2:8]).all() and (
        middle_square(wide[:, :5]) == wide[:5, :5]
    ).all()


@pytest.mark.parametrize("side", [16, 48, 96])
def test_a_picture_enlarged_by_a_fake_camera_comes_back_as_it_was(side):
    square = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    frame = frame_around(square)
    assert frame.shape == (480, 640, 3)
    np.testing.assert_array_equal(area_mean(middle_square(frame)[None], side)[0], square)
    with pytest.raises(CameraError, match="do not enlarge evenly"):
        frame_around(np.zeros((50, 50, 3), np.uint8))


# --- Aligning the simulated camera ------------------------------------------------------------------------------------
VALUES = {"mount": "gripper", "pos": [0.01, 0.02, 0.03], "quat_wxyz": [0.5, 0.5, 0.5, 0.5], "fovy_degrees": 71.0,
          "quarter_turns": 0}  # fmt: skip


def matrix(quat):
    """Columns: where a rotation takes x, y and z."""
    w, x, y, z = quat
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])  # fmt: skip


def test_keys_move_the_camera_along_its_own_axes():
    # This rotation takes x to y, y to z and z to x: right is y, up is z, and it looks along -x.
    for key, axis, sign in (
        ("d", 1, 1),
        ("a", 1, -1),
        ("w", 2, 1),
        ("s", 2, -1),
        ("f", 0, 1),
        ("r", 0, -1),
    ):
        moved = np.array(align_camera.press(VALUES, key)["pos"]) - VALUES["pos"]
        np.testing.assert_allclose(moved, sign * 0.001 * np.eye(3)[axis], atol=1e-15, err_msg=key)


def test_keys_turn_the_camera_about_its_own_axes():
    for key, axis, sign in (
        ("i", 0, 1),
        ("k", 0, -1),
        ("j", 1, 1),
        ("l", 1, -1),
        ("u", 2, 1),
        ("o", 2, -1),
    ):
        turned = matrix(VALUES["quat_wxyz"]).T @ matrix(
            align_camera.press(VALUES, key)["quat_wxyz"]
        )
        angle = sign * np.radians(0.5)
        first, second = np.delete(np.arange(3), axis)
        assert (
            abs(turned[axis, axis] - 1) < 1e-12
            and abs(turned[first, first] - np.cos(angle)) < 1e-12
        )
        assert abs(turned[second, first] * (-1 if axis == 1 else 1) - np.sin(angle)) < 1e-12, key


def test_opposite_keys_undo_each_other_and_other_keys_do_nothing():
    for there, *back in ("ad", "ws", "rf", "jl", "ik", "uo", "-+", "tttt"):
        values = once = align_camera.press(VALUES, there)
        assert once != VALUES
        for key in back:
            values = align_camera.press(values, key)
        for key in ("pos", "quat_wxyz", "fovy_degrees", "quarter_turns"):
            np.testing.assert_allclose(values[key], VALUES[key], atol=1e-12)
    assert align_camera.press(VALUES, "x") == VALUES
    narrow = VALUES
    for _ in range(300):
        narrow = align_camera.press(narrow, "+")
    assert narrow["fovy_degrees"] == 20.0


def test_the_panel_shows_real_simulated_and_both():
    real, simulated = picture(200, 480, 640), np.full((240, 240, 3), 100, np.uint8)
    view = align_camera.panel(real, simulated, 0.25)
    side = align_camera.SIDE
    assert view.shape == (side, 3 * side, 3)
    assert (
        view[100, 100, 0] == 200
        and view[100, side + 100, 0] == 100
        and view[100, 2 * side + 100, 0] == 175
    )
    upright = np.zeros((480, 480, 3), np.uint8)
    upright[:, :240] = 255
    assert align_camera.panel(np.rot90(upright, -1), simulated, 0, 1)[300, 20, 0] == 255


def test_the_file_keeps_the_values_of_other_cameras(tmp_path):
    path = tmp_path / "cameras.json"
    assert aligned_cameras(path) == {}
    align_camera.write_values(path, "wrist", VALUES)
    align_camera.write_values(path, "third", VALUES | {"fovy_degrees": 60.0})
    assert aligned_cameras(path) == {"wrist": VALUES, "third": VALUES | {"fovy_degrees": 60.0}}
    assert [file.name for file in tmp_path.iterdir()] == ["cameras.json"]


@pytest.mark.parametrize(
    "content", ["no json", "[]", '{"wrist": 3}', json.dumps({"wrist": VALUES | {"pos": [1, 2]}}),
                json.dumps({"wrist": VALUES | {"quarter_turns": 5}}),
                json.dumps({"wrist": VALUES | {"fovy_degrees": float("nan")}})],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "cameras.json").write_text(content)
    with pytest.raises(CameraError, match="is damaged: remove it and align again"):
        aligned_cameras(tmp_path / "cameras.json")


def test_a_camera_that_was_moved_is_found_again_and_training_sees_by_it(tmp_path, monkeypatch):
    """A "photo" by a camera that is off by some keys; the same keys bring the simulated one there, to the pixel."""
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    from envs.so101 import scene
    from hardware import emulate

    spec, keys = emulate.task_spec("SO101ReachCube-v1"), "dddddwwwjjjuuu---"
    there = {**spec["cameras"]["wrist"], "quarter_turns": 0}
    for key in keys:
        there = align_camera.press(there, key)
    photo = emulate.StartView(spec).draw(there)
    imageio.imwrite(tmp_path / "photo.png", frame_around(photo))
    options = dict(image=str(tmp_path / "photo.png"), file=str(tmp_path / "cameras.json"))
    side = align_camera.SIDE

    def shown(**more):
        align_camera.main(align_camera.Args(**options, out=str(tmp_path / "panel.png"), **more))
        panel = np.asarray(imageio.imread(tmp_path / "panel.png")).astype(int)
        return panel[:, :side] - panel[:, side : 2 * side]

    assert (np.abs(shown()) > 40).mean() > 0.02 and not (tmp_path / "cameras.json").exists()
    assert not shown(keys=keys, write=True).any()
    assert not shown().any(), "the next time it starts from what was written"
    monkeypatch.setattr(scene, "CAMERA_FILE", tmp_path / "cameras.json")
    trained = emulate.task_spec("SO101ReachCube-v1")["cameras"]["wrist"]
    np.testing.assert_allclose(trained["pos"], there["pos"], atol=1e-9)
    np.testing.assert_allclose(trained["quat_wxyz"], there["quat_wxyz"], atol=1e-9)
    assert trained["fovy_degrees"] == there["fovy_degrees"] == 72.5
