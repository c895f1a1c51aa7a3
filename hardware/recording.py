"""Recordings of a deployment: every tick in ticks.jsonl, a video, the settings in run.json; and playing one again."""

import base64
import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.camera import Frame
from hardware.deployment import Deployment, Refused, check_policy
from hardware.so101 import State


class Recorder:
    """Every tick as a line of ticks.jsonl, written at once, and a video of what the cameras and the policy saw."""

    def __init__(
        self,
        folder: str | Path,
        facts: dict,
        fps: float,
        person: Callable[[], np.ndarray] | None = None,
    ):
        self.folder, self.fps, self.person, self.video = Path(folder), fps, person, None
        if (self.folder / "run.json").exists():
            raise Refused(f"{folder} has a recording already: choose another --record")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1))
            self.ticks = (self.folder / "ticks.jsonl").open(
                "w", buffering=1
            )  # line by line: a crash loses one
        except OSError as error:
            raise Refused(f"{folder} cannot be written: {error.strerror}") from None

    def add(self, record: dict) -> None:
        """One tick, as `Deployment.run` hands it out."""
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
        line |= {
            "state": state,
            "rgb": {"shape": rgb.shape, "bytes": base64.b64encode(rgb.tobytes()).decode()},
        }
        self.ticks.write(json.dumps(line) + "\n")
        self._film(record)

    def _film(self, record: dict, side: int = 320) -> None:
        import imageio.v2 as imageio

        views = [self.person()] if self.person else []
        for i, frame in enumerate(record["frames"].values()):
            views += [frame.rgb, record["rgb"][0, ..., 3 * i : 3 * i + 3]]
        if self.video is None:
            self.video = imageio.get_writer(
                self.folder / "video.mp4", fps=self.fps, macro_block_size=1
            )
        self.video.append_data(np.concatenate([fit(view, side) for view in views], 1))

    def close(self, summary: dict) -> None:
        """Ends the files; the summary becomes the last line of ticks.jsonl."""
        with contextlib.suppress(OSError):
            self.ticks.write(json.dumps({"end": summary}) + "\n")
            self.ticks.close()
            if self.video is not None:
                self.video.close()


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

    def read(self, budget: float | None = None) -> State:
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

    hold = low_torque = stop = start


class ReplayCamera:
    """Shows a recording's images, as they were after preprocessing: once more leaves them as they are."""

    def __init__(self, ticks: list[dict], index: int):
        self.index, self.ticks = index, iter(ticks)

    def wait(self):
        return None

    def latest(self):
        rgb = next(self.ticks)["rgb"]
        rgb = np.frombuffer(base64.b64decode(rgb["bytes"]), np.uint8).reshape(rgb["shape"])[0]
        return Frame(rgb[..., 3 * self.index : 3 * self.index + 3], 0.0, 0)


def replay(policy, recording: Recording) -> list[str]:
    """Differences between a recording's commands and those that its observations give again; [] if bit-identical.

    Raises Refused if the policy is not the recording's.
    """
    facts = recording.facts
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
        cameras = {name: ReplayCamera(ticks, i) for i, name in enumerate(policy.spec["cameras"])}
        again = Deployment(policy, ReplayArm(ticks), cameras, limits, lambda: now[0], sleep, latency=facts["latency"],
                           scale=facts["scale"], dry=facts["dry"], each_tick=compare)  # fmt: skip
        again.state = "hold"
        again.target, again.velocity = (
            np.array(ticks[0][f"{key}_before"]) for key in ("target", "velocity")
        )
        again.run(len(ticks))
    return differences
