"""Rebuild every figure and table of the docs from the CSV files of docs/results.

    python scripts/plot_results.py            write the figures, fill in the tables
    python scripts/plot_results.py --check    write nothing; exit with 1 where a table is not what the files give

Input:
    docs/results/<algo>/<task>__<hardware>__s<seed>.csv      one run, one row per evaluation. Columns: global_step,
        wall_time (s since the command started), train_time (s, without set-up and evaluation), then
        eval/success_rate (0 to 1; eval/ci_low and eval/ci_high beside it) or eval/return, and whatever else there is
    docs/results/throughput/<name>__<hardware>.csv           one row per measured thing, columns of its own choosing
    benchmarks/matrix.toml                                   how many seeds each of them is to have
Output:
    docs/images/<algo>__<task>.png    each seed thin, their mean thick; over environment steps and over minutes
    in every .md file, what stands between these markers:
        <!-- table:ALGO --> … <!-- /table -->               one line per task and hardware, over seeds
        <!-- table:ALGO/PATTERN --> … <!-- /table -->       only the tasks that match, such as SO101*
        <!-- table:throughput/NAME --> … <!-- /table -->    every hardware's rows
        <!-- table:guard --> … <!-- /table -->             of each run of resfit, how far below its base it was
        <!-- figures:ALGO --> … <!-- /figures -->           the curves; ALGO/PATTERN works here too
        <!-- table:headlines --> … <!-- /table -->          of each cell with `headline`, its last score over all seeds
    A marker whose files are not there yet says "Not yet measured."
"""

import argparse
import csv
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TIME_COLUMNS = ("global_step", "wall_time", "train_time")
METRICS = {"eval/success_rate": "success rate", "eval/return": "return"}
GOAL = 0.9  # the success rate whose first crossing the tables report
NOT_YET = "_Not yet measured._"
SINGLE = "† One seed: a single run, no headline."
# Okabe and Ito's colours, told apart by colour-blind readers as well.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#999999",
)


class ResultsError(Exception):
    """A results file or a marker that cannot be used; the message names it and says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """One training run: its names, and each column as a float64 array of one entry per evaluation."""

    algo: str
    task: str
    hardware: str
    seed: int
    columns: dict[str, np.ndarray]

    @property
    def metric(self) -> str:
        """The column that is drawn: the success rate where there is one, else the return."""
        return next(name for name in METRICS if name in self.columns)


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and the rows of a CSV file. Raises ResultsError where a row is ragged or there is none."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        header = [name.strip() for name in reader.fieldnames or []]
    if not rows:
        raise ResultsError(
            f"{path}: has no rows; remove the file or copy the run's evaluations into it"
        )
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ResultsError(
                f"{path}, line {number}: has not the {len(header)} columns of the header"
            )
    return header, [dict(zip(header, row.values(), strict=True)) for row in rows]


def read_run(path: Path) -> Run:
    """Read one run. Raises ResultsError where the name, a column or a number is not as the docstring above says."""
    task, hardware, seed = (path.stem.split("__") + ["", ""])[:3]
    if path.stem != f"{task}__{hardware}__{seed}" or not (
        task and hardware and re.fullmatch(r"s\d+", seed)
    ):
        raise ResultsError(f"{path}: the name must be <task>__<hardware>__s<seed>.csv")
    header, rows = read_rows(path)
    missing = [name for name in TIME_COLUMNS if name not in header]
    if missing or not any(name in header for name in METRICS):
        wanted = missing or ["eval/success_rate or eval/return"]
        raise ResultsError(f"{path}: lacks the column {', '.join(wanted)}")
    columns = {}
    for name in header:
        try:
            columns[name] = np.array([float(row[name]) if row[name] else math.nan for row in rows])
        except ValueError as error:
            raise ResultsError(f"{path}, column {name}: {error}") from None
    if (np.diff(columns["global_step"]) <= 0).any():
        raise ResultsError(
            f"{path}: global_step does not rise from row to row; one file holds one run"
        )
    run = Run(path.parent.name, task, hardware, int(seed[1:]), columns)
    for name in (*TIME_COLUMNS, run.metric):
        if not np.isfinite(columns[name]).all():
            raise ResultsError(f"{path}: the column {name} has an empty or non-finite entry")
    if (columns["train_time"] > columns["wall_time"]).any():
        raise ResultsError(f"{path}: train_time is above wall_time, of which it is a part")
    return run


def read_results(results: Path) -> tuple[list[Run], dict[str, list[tuple[str, Path]]]]:
    """Return all runs, and for each throughput table its (hardware, file) pairs."""
    runs, throughput = [], {}
    for path in sorted(results.glob("*/*.csv")):
        if path.parent.name != "throughput":
            runs.append(read_run(path))
            continue
        name, _, hardware = path.stem.partition("__")
        if not hardware:
            raise ResultsError(f"{path}: the name must be <name>__<hardware>.csv")
        throughput.setdefault(name, []).append((hardware, path))
    return sorted(runs, key=lambda run: (run.algo, run.task, run.hardware, run.seed)), throughput


def grouped(
    runs: list[Run], key: Callable[[Run], tuple[str, ...]]
) -> dict[tuple[str, ...], list[Run]]:
    """Return the runs by `key`, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def mean_curve(runs: list[Run], x_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, y), the mean over runs of linearly interpolated curves where all of them have values.

    x is the union of the runs' own evaluation points inside the range that they share; both arrays have its length.
    """
    low = max(run.columns[x_name][0] for run in runs)
    high = min(run.columns[x_name][-1] for run in runs)
    points = np.unique(np.concatenate([run.columns[x_name] for run in runs]))
    x = points[(points >= low) & (points <= high)]
    y = [np.interp(x, run.columns[x_name], run.columns[run.metric]) for run in runs]
    return x, np.mean(y, axis=0)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the runs of one task (all of the same algorithm) into a PNG of two panels."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # a file is written: no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    panels = (
        (axes[0], "global_step", 1.0, "environment steps"),
        (axes[1], "wall_time", 60.0, "minutes, set-up included"),
    )
    for index, ((hardware,), group) in enumerate(
        grouped(runs, lambda run: (run.hardware,)).items()
    ):
        colour = COLOURS[index % len(COLOURS)]
        label = f"{hardware}, {len(group)} seed{'s' if len(group) > 1 else ''}"
        for axis, x_name, unit, _ in panels:
            for run in group:
                x = run.columns[x_name] / unit
                axis.plot(x, run.columns[run.metric], color=colour, linewidth=0.8, alpha=0.45)
                if len(group) == 1 and {"eval/ci_low", "eval/ci_high"} <= run.columns.keys():
                    low, high = run.columns["eval/ci_low"], run.columns["eval/ci_high"]
                    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            x, y = mean_curve(group, x_name)
            axis.plot(x / unit, y, color=colour, linewidth=2.0, label=label)
    metric = runs[0].metric
    for axis, _, _, title in panels:
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(METRICS[metric])
    if metric == "eval/success_rate":
        axes[0].set_ylim(-0.02, 1.02)
    axes[0].xaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"
    )
    if len(axes[1].get_legend_handles_labels()[0]) > 7:  # thin lines are seeds, not in the legend
        figure.set_size_inches(11, 3.2)
        handles = axes[1].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, fontsize=8, loc="outside right center")
    else:
        axes[1].legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(f"{runs[0].algo}: {runs[0].task}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table; every column but the first is aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


whole = "{:,.0f}".format


def minutes(seconds: float) -> str:
    """Return a time in seconds as minutes with one decimal."""
    return f"{seconds / 60:.1f}"


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Return 'mean ± standard deviation' (of the sample, n − 1); of a single value no deviation."""
    text = form(float(np.mean(values)))
    return text if len(values) == 1 else f"{text} ± {form(float(np.std(values, ddof=1)))}"


def first_crossing(run: Run, column: str) -> float | None:
    """Return `column` at the first evaluation whose success rate is at least GOAL, or None."""
    above = np.flatnonzero(run.columns[run.metric] >= GOAL)
    return float(run.columns[column][above[0]]) if len(above) else None


def crossings(runs: list[Run], column: str, form: Callable[[float], str]) -> str:
    """Return the mean of `column` at the first crossing, or how many seeds got there where not all did."""
    reached = [value for run in runs if (value := first_crossing(run, column)) is not None]
    if not reached:
        return "not reached"
    return spread(reached, form) + (
        "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)})"
    )


def read_cells(root: Path) -> list[dict]:
    """Return the entries of the matrix; none where there is no matrix."""
    path = root / "benchmarks/matrix.toml"
    if not path.exists():
        return []
    return tomllib.loads(path.read_text(encoding="utf-8")).get("cell", [])


def key_of(cell: dict) -> tuple[str, str, str]:
    """Return (algo, task, hardware) as they stand in the names of the cell's files."""
    hardware = "-".join(filter(None, [cell.get("hardware", "cpu2"), cell.get("variant", "")]))
    return cell["algo"], cell["task"], hardware


def planned_seeds(root: Path) -> dict[tuple[str, str, str], int]:
    """Return how many seeds the matrix plans for each (algo, task, hardware); nothing where there is no matrix."""
    return {key_of(cell): len(cell["seeds"]) for cell in read_cells(root)}


def seeds_of(group: list[Run], planned: dict[tuple[str, str, str], int]) -> str:
    """Return the number of seeds: of how many if some are missing; a single one is marked."""
    first = group[0]
    wanted = planned.get((first.algo, first.task, first.hardware), len(group))
    text = f"{len(group)} of {wanted}" if wanted > len(group) else str(len(group))
    return text if len(group) > 1 else f"{text} †"


def results_table(runs: list[Run], planned: dict[tuple[str, str, str], int]) -> str:
    """Return the table of one algorithm: a line per task and hardware, mean ± standard deviation over seeds."""
    if not runs:
        return NOT_YET
    of_success = any(run.metric == "eval/success_rate" for run in runs)
    of_return = any(run.metric == "eval/return" for run in runs)
    measure = "success" if not of_return else "return" if not of_success else "success or return"
    header = [
        "task",
        "hardware",
        "seeds",
        "steps",
        f"last {measure}",
        f"best {measure}",
        "minutes",
        "training only",
    ]
    if of_success:
        header += [f"steps to {GOAL:.0%}", f"minutes to {GOAL:.0%}"]
    rows = []
    for (task, hardware), group in grouped(runs, lambda run: (run.task, run.hardware)).items():
        metric = group[0].metric
        value = "{:.1%}".format if metric == "eval/success_rate" else "{:,.1f}".format
        row = [
            task,
            hardware,
            seeds_of(group, planned),
            spread([run.columns["global_step"][-1] for run in group], whole),
            spread([run.columns[metric][-1] for run in group], value),
            spread([run.columns[metric].max() for run in group], value),
            spread([run.columns["wall_time"][-1] for run in group], minutes),
            spread([run.columns["train_time"][-1] for run in group], minutes),
        ]
        if metric == "eval/success_rate":
            row += [crossings(group, "global_step", whole), crossings(group, "wall_time", minutes)]
        elif of_success:
            row += ["", ""]
        rows.append(row)
    text = markdown(header, rows)
    return f"{text}\n\n{SINGLE}" if any(row[2].endswith("†") for row in rows) else text


def headlines_table(runs: list[Run], root: Path) -> str:
    """Return the README's table: a line for each cell of the matrix with `headline`, what its score is.

    Raises ResultsError for a headline of fewer than three seeds, or one of which some are missing.
    """
    rows = []
    for cell in read_cells(root):
        if "headline" not in cell:
            continue
        name = f"{cell['algo']} on {cell['task']}"
        group = [run for run in runs if key_of(cell) == (run.algo, run.task, run.hardware)]
        if len(group) < 3 or len(group) < len(cell["seeds"]):
            raise ResultsError(
                f"{name}: a headline is the mean of at least three seeds, not {len(group)}"
            )
        metric = group[0].metric
        value = "{:.1%}".format if metric == "eval/success_rate" else "{:,.1f}".format
        rows.append(
            [
                f"[`{cell['algo']}.py`](algos/{cell['algo']}.py)",
                cell["task"],
                f"{spread([run.columns[metric][-1] for run in group], value)} {cell['headline']}",
                spread([run.columns["wall_time"][-1] for run in group], minutes),
                f"[page](docs/algos/{cell['algo']}.md)",
            ]
        )
    return markdown(["algorithm", "task", "score", "minutes", "more"], rows)


def guard_table(runs: list[Run]) -> str:
    """Return how far below its base each run of resfit was: a line per run that says what it deployed.

    By chance a hundred episodes of the base itself fall below the threshold once in forty: two
    deviations of their mean below the base.
    """
    header = ["task", "hardware", "seed", "base", "residual at its lowest", "deployed from step"]
    header += ["lowest deployed", "lowest hundred in training", "evaluations with it below chance"]
    header += ["end"]
    rows = []
    for run in runs:
        if "eval/deploys" not in run.columns:
            continue
        success, residual = run.columns["eval/success_rate"], run.columns["eval/residual"]
        rolling, deploys = run.columns["train/rolling_success"], run.columns["eval/deploys"] > 0
        base = success[0]
        below = rolling < base - 2 * math.sqrt(base * (1 - base) / 100)
        first = whole(run.columns["global_step"][deploys.argmax()]) if deploys.any() else "never"
        cells = [f"{base:.1%}", f"{residual.min():.1%}", first]
        cells += [f"{success.min():.1%}", f"{run.columns['train/lowest'].min():.0%}"]
        cells += [f"{below.sum()} of {len(below) - 1}", f"{success[-1]:.1%}"]
        rows.append([run.task, run.hardware, str(run.seed), *cells])
    return markdown(header, rows) if rows else NOT_YET


def throughput_table(files: list[tuple[str, Path]]) -> str:
    """Return every row of every hardware's file, with the hardware as a column; columns are the files' union."""
    if not files:
        return NOT_YET
    columns: list[str] = []
    rows: list[dict[str, str]] = []
    for hardware, path in files:
        header, body = read_rows(path)
        columns += [name for name in header if name not in columns]
        rows += [{**row, "": hardware} for row in body]
    return markdown(
        [*columns, "hardware"],
        [[number(row.get(name, "")) for name in [*columns, ""]] for row in rows],
    )


def number(text: str) -> str:
    """Return a number with thousands set apart and no more than four significant digits; other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text.strip().replace("|", "\\|")
    if not math.isfinite(value):
        return text
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


# ---------------------------------------------------------------------------------------------------------------------
# Filling in the docs
# ---------------------------------------------------------------------------------------------------------------------
def figure_path(algo: str, task: str) -> Path:
    """Return where the figure of one task stands, relative to the repository."""
    return Path("docs/images") / f"{algo}__{task}.png"


def fill(
    text: str,
    document: Path,
    root: Path,
    runs: list[Run],
    throughput: dict[str, list[tuple[str, Path]]],
) -> str:
    """Return the document's text with what stands between its markers rebuilt.

    Raises ResultsError where a marker is opened and not closed.
    """

    planned = planned_seeds(root)

    def chosen(name: str) -> list[Run]:
        algo, _, pattern = name.partition("/")
        return [run for run in runs if run.algo == algo and fnmatch(run.task, pattern or "*")]

    def table(name: str) -> str:
        if name.startswith("throughput/"):
            return throughput_table(throughput.get(name.removeprefix("throughput/"), []))
        if name == "headlines":
            return headlines_table(runs, root)
        if name == "guard":
            return guard_table([run for run in runs if run.algo == "resfit"])
        return results_table(chosen(name), planned)

    def figures(name: str) -> str:
        pairs = grouped(chosen(name), lambda run: (run.algo, run.task))
        up = "../" * (len(document.relative_to(root).parts) - 1)
        links = (
            f"![{algo} on {task}]({up}{figure_path(algo, task).as_posix()})" for algo, task in pairs
        )
        return "\n\n".join(links) or NOT_YET

    for word, build in (("table", table), ("figures", figures)):
        # At a line's start only, so that a page can mention a marker inside its text.
        opened = re.findall(rf"^<!-- {word}:\S+ -->", text, re.MULTILINE)
        pattern = re.compile(
            rf"^(<!-- {word}:(\S+) -->)\n.*?^(<!-- /{word} -->)", re.MULTILINE | re.DOTALL
        )
        blocks = list(pattern.finditer(text))
        if len(blocks) != len(opened) or any(
            f"<!-- {word}:" in block[0][len(block[1]) :] for block in blocks
        ):
            raise ResultsError(
                f"{document}: a marker <!-- {word}:… --> has no <!-- /{word} --> on a line of its own"
            )
        text = pattern.sub(
            lambda block, build=build: f"{block[1]}\n\n{build(block[2])}\n\n{block[3]}", text
        )
    return text


def documents(root: Path) -> list[Path]:
    """Return the markdown files that may hold markers."""
    return sorted(root.glob("*.md")) + sorted((root / "docs").rglob("*.md"))


def stale_documents(root: Path) -> dict[Path, str]:
    """Return {document: its new text} for the documents that the results files would change."""
    runs, throughput = read_results(root / "docs/results")
    stale = {}
    for document in documents(root):
        old = document.read_text(encoding="utf-8")
        new = fill(old, document, root, runs, throughput)
        if new != old:
            stale[document] = new
    return stale


def main() -> int:
    """Parse the command line and do it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the repository (default: this one)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where a table is out of date",
    )
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    try:
        stale = stale_documents(root)
        if arguments.check:
            for document in stale:
                print(
                    f"{document.relative_to(root)} is not what docs/results gives: run make figures",
                    file=sys.stderr,
                )
            return 1 if stale else 0
        runs, _ = read_results(root / "docs/results")
        for (algo, task), group in grouped(runs, lambda run: (run.algo, run.task)).items():
            metrics = {run.metric for run in group}
            if len(metrics) > 1:
                raise ResultsError(
                    f"docs/results/{algo}/{task}__*.csv: some hold {' and some '.join(sorted(metrics))}"
                )
            draw(group, root / figure_path(algo, task))
            print(f"wrote {figure_path(algo, task)}")
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    for document, text in stale.items():
        document.write_text(text, encoding="utf-8")
        print(f"wrote the tables of {document.relative_to(root)}")
    print(f"{len(runs)} runs read, {len(stale)} documents changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
