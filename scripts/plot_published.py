"""Our curves beside the authors', over frames: docs/images/published__<algo>__<task>.png.

    python scripts/plot_published.py              every published curve of docs/published, and what we have of it
    python scripts/plot_published.py --out DIR    into another folder

Published: docs/published/<algo>.csv, one row a frame count with lowest, quartiles, median and highest of the authors'
seeds. Ours: docs/results/<algo>/<task>__<hardware>__s<seed>.csv, whose `global_step` counts agent steps. A step is
`--action-repeat` frames: 2 unless the command in the .json beside the file says otherwise.
"""

import argparse
import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's; the authors' are grey


def published(path: Path) -> dict[str, dict[str, list[float]]]:
    """Task -> column -> values, in the order of frames."""
    tasks = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            columns = tasks.setdefault(row.pop("task"), {name: [] for name in row})
            for name, value in row.items():
                columns[name].append(float(value))
    return tasks


def frames_a_step(path: Path) -> int:
    """What the run's command says, beside its CSV file; 2, as published, where it says nothing."""
    facts = path.with_suffix(".json")
    command = json.loads(facts.read_text())["command"] if facts.exists() else ""
    given = re.search(r"--action-repeat[ =](\d+)", command)
    return int(given[1]) if given else 2


def ours(folder: Path, task: str) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Hardware -> one (frames, returns) a seed."""
    groups = {}
    for path in sorted(folder.glob(f"{task}__*__s*.csv")):
        hardware, repeat = path.stem.split("__")[1], frames_a_step(path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        frames = [repeat * float(row["global_step"]) for row in rows]
        returns = [float(row["eval/return"]) for row in rows]
        groups.setdefault(hardware, []).append((frames, returns))
    return groups


def draw(task: str, curve: dict[str, list[float]], groups: dict, path: Path) -> None:
    """The authors' band and median in grey, a thin line for each seed of ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    frames, seeds = curve["frame"], int(curve["seeds"][0])
    band = dict(color="0.5", linewidth=0)
    axes.fill_between(frames, curve["lowest"], curve["highest"], alpha=0.2, **band)
    axes.fill_between(frames, curve["lower_quartile"], curve["upper_quartile"], alpha=0.35, **band)
    label = f"authors: median, quartiles and range of {seeds} seeds"
    axes.plot(frames, curve["median"], color="0.25", linewidth=2, label=label)
    for colour, (hardware, runs) in zip(COLOURS, groups.items(), strict=False):
        for number, (x, y) in enumerate(runs):
            count = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            name = f"here, {hardware}: {count}" if number == 0 else None
            axes.plot(x, y, color=colour, linewidth=1.2, marker=".", markersize=4, label=name)
    longest = max((max(x) for runs in groups.values() for x, _ in runs), default=0)
    axes.set(xlim=(0, max(100_000, longest)), ylim=(0, 1000), title=task)
    axes.set(xlabel="frames (two an agent step)", ylabel="return")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder of images")
    out = parser.parse_args().out
    for source in sorted((ROOT / "docs/published").glob("*.csv")):
        for task, curve in published(source).items():
            groups = ours(ROOT / "docs/results" / source.stem, task)
            path = out / f"published__{source.stem}__{task}.png"
            draw(task, curve, groups, path)
            found = ", ".join(f"{len(runs)} of {hardware}" for hardware, runs in groups.items())
            print(f"{path}: seeds of ours: {found or 'none yet'}")


if __name__ == "__main__":
    main()
