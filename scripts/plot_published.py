"""Our curves beside the authors': docs/images/published__drqv2__<task>.png, published__squint_sac.png.

    python scripts/plot_published.py              every published curve of docs/published, and what we have of it
    python scripts/plot_published.py --out DIR    into another folder

Published: docs/published/<algo>.csv, one row a count of frames or transitions with lowest, quartiles, median and
highest of the authors' seeds. Ours: docs/results/<algo>/<task>__<hardware>__s<seed>.csv. DrQ-v2's `global_step` counts
agent steps of `--action-repeat` frames: 2 unless the command in the .json beside the file says otherwise. Squint's
counts transitions, as theirs does; its figure has one panel a task.
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
    """Hardware -> one (frames, returns) a seed; of Squint (transitions, success)."""
    groups = {}
    squint = folder.name == "squint_sac"
    score = "eval/success_rate" if squint else "eval/return"
    for path in sorted(folder.glob(f"{task}__*__s*.csv")):
        hardware, repeat = path.stem.split("__")[1], 1 if squint else frames_a_step(path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        frames = [repeat * float(row["global_step"]) for row in rows]
        returns = [float(row[score]) for row in rows]
        groups.setdefault(hardware, []).append((frames, returns))
    return groups


def draw(axes, task: str, curve: dict[str, list[float]], groups: dict) -> None:
    """The authors' band and median in grey, a thin line for each seed of ours."""
    x, seeds = curve.get("frame") or curve["transition"], int(curve["seeds"][0])
    band = dict(color="0.5", linewidth=0)
    axes.fill_between(x, curve["lowest"], curve["highest"], alpha=0.2, **band)
    axes.fill_between(x, curve["lower_quartile"], curve["upper_quartile"], alpha=0.35, **band)
    label = f"authors: median, quartiles and range of {seeds} seeds"
    axes.plot(x, curve["median"], color="0.25", linewidth=2, label=label)
    for colour, (hardware, runs) in zip(COLOURS, groups.items(), strict=False):
        for number, (x, y) in enumerate(runs):
            count = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            name = f"here, {hardware}: {count}" if number == 0 else None
            axes.plot(x, y, color=colour, linewidth=1.2, marker=".", markersize=4, label=name)
    axes.set_title(task)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)


def figures(algo: str, curves: dict, out: Path) -> None:
    """One file a task of returns over frames, or one for all tasks of success over transitions."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    groups = {task: ours(ROOT / "docs/results" / algo, task) for task in curves}
    out.mkdir(parents=True, exist_ok=True)
    for task, found in groups.items():
        seeds = ", ".join(f"{len(runs)} of {hardware}" for hardware, runs in found.items())
        print(f"{algo} {task}: seeds of ours: {seeds or 'none yet'}")
    if algo == "squint_sac":
        figure = Figure((12, 6), layout="constrained")
        panels = figure.subplots(2, 4, sharex=True, sharey=True)
        for axes, task in zip(panels.T.flat, curves, strict=True):  # cubes above, cans below
            draw(axes, task, curves[task], groups[task])
        panels[0, 0].set(xlim=(0, 1_000_000), ylim=(-0.02, 1.02))
        panels[0, 0].xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        labels[1:] = [label.split(":")[0] + ": each seed" for label in labels[1:]]
        figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=2)
        figure.supxlabel("transitions")
        figure.supylabel("success at the end of an episode")
        figure.savefig(out / f"published__{algo}.png", dpi=110)
        return
    for task, curve in curves.items():
        figure = Figure((6.4, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes, task, curve, groups[task])
        longest = max((max(x) for runs in groups[task].values() for x, _ in runs), default=0)
        axes.set(xlim=(0, max(100_000, longest)), ylim=(0, 1000))
        axes.set(xlabel="frames (two an agent step)", ylabel="return")
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(out / f"published__{algo}__{task}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder of images")
    out = parser.parse_args().out
    for source in sorted((ROOT / "docs/published").glob("*.csv")):
        figures(source.stem, published(source), out)


if __name__ == "__main__":
    main()
