"""LeRobotDataset folders (v2.1 and v3.0: parquet and mp4), read with pyarrow and imageio; lerobot is not needed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

INSTALL = "a LeRobotDataset needs pyarrow: pip install pyarrow"
IMAGES = "observation.images."


def is_lerobot(path: str | Path) -> bool:
    """Whether the path is the folder of a LeRobotDataset."""
    return (Path(path) / "meta/info.json").is_file()


def import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(INSTALL) from None
    return pyarrow.parquet


def read_info(folder: str | Path) -> dict:
    """meta/info.json. Raises ValueError for a version that is not known."""
    info = json.loads((Path(folder) / "meta/info.json").read_text())
    version = info.get("codebase_version", "")
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise ValueError(f"{folder} is a LeRobotDataset {version}; v2.0, v2.1 and v3.0 are read")
    return info


def episodes(folder: str | Path, size: int | None = None, images: bool = True) -> Iterator[dict]:
    """The episodes of a dataset, one at a time, as `demos.read` gives them.

    "state" is observation.state, "rgb" the cameras in the alphabet's order, each cropped to its middle square and
    brought to `size` pixels (None: as it is). Success is next.success, else a reward of 1; where a dataset has neither,
    each episode is taken for a demonstration that succeeds in its last step. Actions are those of the file, in its
    units. Raises ValueError, ImportError.
    """
    folder = Path(folder)
    info = read_info(folder)
    cameras = camera_keys(info) if images else []
    for place in places(folder, info):
        table = read_table(folder / place["data"])
        number = np.asarray(table["episode_index"])
        rows = np.flatnonzero(number == place["episode"])
        if len(rows) == 0:
            raise ValueError(f"{folder / place['data']} has no episode {place['episode']}")
        obs = {"state": column(table, "observation.state", rows)}
        frames = []
        for key in cameras:
            if info["features"][key]["dtype"] == "video":
                found = read_video(
                    folder / place[key], place[key + "/begin"], len(rows), info["fps"]
                )
            else:
                found = [decode(table[key][row]) for row in rows]
            frames.append(np.stack([square(frame, size) for frame in found]))
        if frames:
            obs["rgb"] = np.concatenate(frames, -1)
        success = np.arange(len(rows)) == len(rows) - 1
        rewards = success.astype(np.float32)
        if "next.reward" in table:
            rewards = column(table, "next.reward", rows).ravel()
            success = rewards >= 1 - 1e-6
        if "next.success" in table:
            success = column(table, "next.success", rows).ravel() > 0
        dones = np.arange(len(rows)) == len(rows) - 1
        yield {
            "obs": obs, "final_obs": None, "actions": column(table, "action", rows), "rewards": rewards,
            "dones": dones, "success": success, "name": f"demo_{place['episode']}",
        }  # fmt: skip


def camera_keys(info: dict) -> list[str]:
    """Features that are images, in the alphabet's order."""
    return sorted(k for k, v in info["features"].items() if v["dtype"] in ("video", "image"))


def places(folder: Path, info: dict) -> Iterator[dict]:
    """Where each episode is: {"episode", "data", and for each video its file and the second at which it begins}."""
    videos = [k for k, v in info["features"].items() if v["dtype"] == "video"]
    if not info["codebase_version"].startswith("v3"):
        for episode in range(info["total_episodes"]):
            names = {"episode_index": episode, "episode_chunk": episode // info["chunks_size"]}
            place = {"episode": episode, "data": info["data_path"].format(**names)}
            for key in videos:
                place |= {
                    key: info["video_path"].format(video_key=key, **names),
                    key + "/begin": 0.0,
                }
            yield place
        return
    for path in sorted((folder / "meta/episodes").rglob("*.parquet")):
        table = read_table(path)
        for row, episode in enumerate(table["episode_index"]):

            def file(template: str, part: str, table=table, row=row, **names) -> str:
                names |= {k: table[f"{part}/{k}"][row] for k in ("chunk_index", "file_index")}
                return template.format(**names)

            place = {"episode": episode, "data": file(info["data_path"], "data")}
            for key in videos:
                place[key] = file(info["video_path"], f"videos/{key}", video_key=key)
                place[key + "/begin"] = table[f"videos/{key}/from_timestamp"][row]
            yield place


_latest: tuple = (None, None)  # the table read last: in v3.0 one file holds many episodes


def read_table(path: Path) -> dict:
    """Columns of a parquet file, as lists."""
    global _latest
    if _latest[0] != path:
        if not path.is_file():
            raise ValueError(f"{path} is missing: the dataset was not downloaded whole")
        _latest = path, import_parquet().read_table(path).to_pydict()
    return _latest[1]


def column(table: dict, key: str, rows: np.ndarray) -> np.ndarray:
    """Numbers of some rows, (T, numbers) float32."""
    if key not in table:
        raise ValueError(f"the dataset has no {key}; it has {', '.join(table)}")
    return np.array([table[key][row] for row in rows], np.float32).reshape(len(rows), -1)


def read_video(path: Path, begin: float, count: int, fps: float) -> list[np.ndarray]:
    """`count` frames of an mp4 from the second `begin` on, uint8 (H, W, 3)."""
    import imageio.v2 as imageio

    first, frames = round(begin * fps), []
    with imageio.get_reader(path, "ffmpeg") as reader:
        for number, frame in enumerate(reader):
            if number >= first:
                frames.append(np.asarray(frame))
            if len(frames) == count:
                return frames
    raise ValueError(f"{path} has {len(frames)} of {count} frames from second {begin:g} on")


def decode(image: dict) -> np.ndarray:
    """A PNG inside a parquet file."""
    import imageio.v2 as imageio

    return np.asarray(imageio.imread(image["bytes"]))[..., :3]


def square(frame: np.ndarray, size: int | None) -> np.ndarray:
    """The middle square of an image, its pixels averaged to `size` on each side."""
    import torch

    if size is None:
        return frame
    side = min(frame.shape[:2])
    top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
    middle = torch.from_numpy(frame[top : top + side, left : left + side].copy())
    small = torch.nn.functional.interpolate(
        middle.permute(2, 0, 1)[None].float(), (size, size), mode="area"
    )
    return small[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
