"""Recordings of a deployment: every tick in ticks.jsonl, a video, the settings in run.json; and playing one again."""

import base64
import contextlib
import dataclasses
import json
import logging
import math
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.camera import Frame
from hardware.deployment import Deployment, Refused, check_policy
from hardware.so101 import State

QUEUE = 64  # ticks that may wait to be written
SIDE = 320  # pixels of each view in the video


class Recorder:
    """Every tick as a line of ticks.jsonl, and a video of what the cameras and the policy saw.

    Files are written, and images encoded, in a thread of their own; what is slow about its start happens here, before
    torque. When a file can no longer be written, the recording ends with a sentence (`problem`), what
    there is of it can be used, and the control loop goes on.

    person: draws one more view, in the caller's thread. live: a full queue loses ticks instead of waiting.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: dict,
        fps: float,
        person: Callable[[], np.ndarray] | None = None,
        live: bool = False,
    ):
        self.folder, self.fps, self.person, self.live = Path(folder), fps, person, live
        self.problem: str | None = None
        self.lost, self.filmed = 0, False
        if (self.folder / "run.json").exists():
            raise Refused(f"{folder} has a recording already: choose another --record")
        views = bool(person) + 2 * len(facts["spec"]["cameras"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1))
            # line by line: a crash loses one
            self.ticks = (self.folder / "ticks.jsonl").open("w", buffering=1)
            self.video = self._open_video(views) if views else None
        except OSError as error:
            raise Refused(f"{folder} cannot be written: {error.strerror}") from None
        self.queue: queue.Queue = queue.Queue(QUEUE)
        self.thread = threading.Thread(target=self._write_on, name="recorder", daemon=True)
        self.thread.start()

    def _open_video(self, views: int):
        import imageio_ffmpeg

        logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
        # In fragments: whatever there is of the file can be played, also after a crash or on a full disk.
        fragments = ["-movflags", "frag_keyframe+empty_moov", "-g", str(max(1, round(self.fps)))]
        fragments += ["-preset", "veryfast"]  # the processor is the control loop's
        video = imageio_ffmpeg.write_frames(
            str(self.folder / "video.mp4"),
            (views * SIDE, SIDE),
            fps=self.fps,
            codec="libx264",  # named, so that nothing is tried out
            macro_block_size=1,
            ffmpeg_log_level="quiet",
            output_params=fragments,
        )
        video.send(None)  # starts the encoder
        return video

    def add(self, record: dict) -> None:
        """One tick, as `Deployment.run` hands it out. Returns at once, or if not live as soon as there is room."""
        views = [self.person()] if self.person else []
        try:
            self.queue.put((record, views), block=not self.live)
        except queue.Full:
            self.lost += 1

    def _write_on(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.problem:
                continue
            try:
                self._write(*item)
            except Exception as error:  # the disk is full, the encoder has died: the arm goes on
                reason = getattr(error, "strerror", None) or type(error).__name__
                self.problem = f"the recording ended at tick {item[0]['tick']}: {reason}"
                print(self.problem, file=sys.stderr, flush=True)
                self._end()

    def _write(self, record: dict, views: list[np.ndarray]) -> None:
        state = {
            field.name: plain(getattr(record["state"], field.name))
            for field in dataclasses.fields(State)
        }
        rgb = record["rgb"]
        line = {
            key: plain(value)
            for key, value in record.items()
            if key not in ("state", "rgb", "frames")
        }
        line["state"] = state
        line["rgb"] = {"shape": rgb.shape, "bytes": base64.b64encode(rgb.tobytes()).decode()}
        self.ticks.write(json.dumps(line) + "\n")
        for i, frame in enumerate(record["frames"].values()):
            views += [frame.rgb, record["rgb"][0, ..., 3 * i : 3 * i + 3]]
        if self.video is not None and views:
            film = np.concatenate([fit(view, SIDE) for view in views], 1)
            self.video.send(np.ascontiguousarray(film))
            self.filmed = True

    def _end(self) -> None:
        for file in (self.ticks, self.video):
            with contextlib.suppress(Exception):
                file.close()
        if not self.filmed:
            (self.folder / "video.mp4").unlink(missing_ok=True)

    def close(self, summary: dict) -> None:
        """Ends the files; the summary becomes the last line of ticks.jsonl."""
        with contextlib.suppress(queue.Full):  # an encoder that hangs does not hold up the end
            self.queue.put(None, timeout=10)
            self.thread.join(60)
        if self.lost and not self.problem:
            self.problem = (
                f"the recording lacks {self.lost} ticks: the computer was too slow to write them"
            )
            print(self.problem, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            self.ticks.write(json.dumps({"end": summary | {"recording": self.problem}}) + "\n")
        self._end()


def plain(value):
    """For JSON: arrays as lists, of floats that read back to the same bits."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Any image as (side, side, 3), nearest pixels, its middle square."""
    edge = min(image.shape[:2])
    top, left = (image.shape[0] - edge) // 2, (image.shape[1] - edge) // 2
    at = np.arange(side) * edge // side
    return image[top + at][:, left + at]


@dataclass
class Recording:
    """What `Recorder` wrote: the settings, and the ticks as dicts."""

    facts: dict
    ticks: list[dict]

    @classmethod
    def load(cls, folder: str | Path) -> "Recording":
        """Raises Refused for what is no recording. A last line that was cut off is left out."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / "run.json").read_text())
            lines = (folder / "ticks.jsonl").read_text().splitlines()
        except (OSError, ValueError):
            raise Refused(f"{folder} is no recording: it needs run.json and ticks.jsonl") from None
        ticks = []
        for number, line in enumerate(lines):
            try:
                tick = json.loads(line)
            except ValueError:
                if number < len(lines) - 1:
                    raise Refused(f"{folder}/ticks.jsonl, line {number + 1}, is damaged") from None
                break
            ticks += [tick] if "end" not in tick else []
        if not ticks:
            raise Refused(f"{folder} has no tick of a run")
        return cls(facts, ticks)


class ReplayArm:
    """Answers with a recording's joint readings; remembers what is written."""

    def __init__(self, ticks: list[dict]):
        self.states, self.written = iter(ticks), []

    def read(self) -> State:
        state = next(self.states)["state"]
        return State(
            **{
                name: np.asarray(value) if isinstance(value, list) else value
                for name, value in state.items()
            }
        )

    def write(self, target) -> None:
        self.written.append(np.array(target))

    def start(self) -> None:
        pass

    def stop(self, gently: bool = False) -> dict[str, str]:
        return {}


class ReplayCamera:
    """Shows a recording's images, as they were after preprocessing: once more leaves them as they are."""

    def __init__(self, ticks: list[dict], index: int, clock: Callable[[], float]):
        self.index, self.ticks, self.clock = index, iter(ticks), clock

    def wait(self):
        return None

    def latest(self):
        tick = next(self.ticks)
        rgb = tick["rgb"]
        rgb = np.frombuffer(base64.b64decode(rgb["bytes"]), np.uint8).reshape(rgb["shape"])[0]
        return Frame(
            rgb[..., 3 * self.index : 3 * self.index + 3], self.clock() - tick["frame_age"], 0
        )


def replay(policy, recording: Recording) -> list[str]:
    """Differences between a recording's commands and those that its observations give again; [] if bit-identical.

    Raises Refused if the policy is not the recording's.
    """
    facts = recording.facts
    if not isinstance(facts, dict) or not {"policy", "latency", "scale", "dry"} <= set(facts):
        raise Refused("the recording's run.json is not one of a run")
    if facts["policy"]["digest"] != policy.digest:
        raise Refused(
            f"the recording was made with another policy, {facts['policy']['path']}: give that one"
        )
    limits, differences, now = check_policy(policy), [], [0.0]

    def compare(record: dict) -> None:
        tick = ticks[record["tick"]]
        for key in ("action", "asked", "target", "velocity", "rules"):
            if plain(record[key]) != tick[key]:
                where = f"episode {tick['episode']}, tick {tick['tick']}"
                differences.append(
                    f"{where}: {key} is {plain(record[key])}, in the recording {tick[key]}"
                )

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for episode in sorted({tick["episode"] for tick in recording.ticks}):
        ticks = [tick for tick in recording.ticks if tick["episode"] == episode]
        cameras = {
            name: ReplayCamera(ticks, i, lambda: now[0])
            for i, name in enumerate(policy.spec["cameras"])
        }
        again = Deployment(policy, ReplayArm(ticks), cameras, limits, lambda: now[0], sleep, latency=facts["latency"],
                           scale=facts["scale"], dry=facts["dry"], each_tick=compare,
                           frame_age=facts.get("frame_age", math.inf))  # fmt: skip
        again.state = "hold"
        again.target, again.velocity = (
            np.array(ticks[0][f"{key}_before"]) for key in ("target", "velocity")
        )
        again.run(len(ticks))
    return differences
