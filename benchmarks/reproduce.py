"""Run the cells of benchmarks/matrix.toml that have no result yet, side by side; collect what they measure.

    make reproduce                                              everything that is missing, one run after another
    make reproduce ARGS="--only sapo_rewarped/AntRun --jobs 2"  one task, two runs side by side
    make reproduce ARGS=--list                                  done, running, missing, stale, failed; hours to go
    make reproduce ARGS="--launcher slurm --jobs 64"            on a cluster, through submitit

A *cell* is an algorithm, a task, settings and seeds; a *run* is one seed of it. A run trains in
`runs/`. After each of its evaluations docs/results/<algo>/<task>__<hardware>__s<seed>.csv is
brought up to date; the .json beside it keeps command, commit, versions and how the run ended. Each
run that ends rewrites its cell's section of commands.md.

Stop it whenever you like: Ctrl-C lets the runs save, and the next call resumes each one exactly. A
run that fails leaves its reason and does not stop the others; `--retry` tries it again. What is
done is not done again unless `--again`. A result whose code has changed since is listed as stale,
and stays until `--stale` runs it anew.
"""

import ast
import fcntl
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "jax",
    "numpy",
    "mujoco",
    "mujoco-warp",
    "warp-lang",
    "dm-control",
    "stable-baselines3",
)
STOP = threading.Event()  # Ctrl-C: runs save and end, no new one begins
POLL = 0.5  # seconds between two looks at a run


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """cells by name, with * if you like: `sapo_rewarped/AntRun*`, `*@quiet`; empty: all"""
    seeds: tuple[int, ...] = ()
    """of them only these seeds; empty: all of the cell's"""
    jobs: int = 1
    """runs side by side; each uses as many threads as its cell says"""
    again: bool = False
    """run what is done once more"""
    stale: bool = False
    """run what is done once more if its code has changed since"""
    retry: bool = False
    """run what failed once more, from its last checkpoint where it has one"""
    list: bool = False
    """print the state of all cells and end"""
    launcher: Literal["here", "local", "slurm", "debug"] = "here"
    """here: child processes of this one; the others hand runs to submitit, `slurm` to a cluster's queue"""
    slurm: tuple[str, ...] = ()
    """more of submitit's parameters: `slurm_partition=gpu slurm_gres=gpu:1`"""
    root: Path = ROOT
    """the repository; runs and results go below it"""


# --- The matrix ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """One entry of matrix.toml."""

    algo: str  # folder of docs/results
    task: str  # in the file's name: without slashes
    seeds: tuple[int, ...]
    args: tuple[str, ...]  # of the command, without --seed and --name
    script: str = ""  # empty: algos/<algo>.py
    variant: str = ""  # after the hardware: cpu2-<variant>
    hardware: str = "cpu2"
    minutes: float = 0.0  # that one run is expected to take
    threads: int = 1
    feeds: tuple[str, ...] = ()  # pages whose table or figure shows it
    inputs: tuple[str, ...] = ()  # files that an [[input]] makes
    code: tuple[str, ...] = ()  # folders of envs/ that it runs, besides the script
    again: tuple[str, ...] = ()  # arguments that --resume needs once more
    headline: str = ""  # what its score is, in the README's table; of three seeds or more
    closed: str = ""  # why it cannot be run any more: its code has left, or it was stopped by hand

    @property
    def name(self) -> str:
        return f"{self.algo}/{self.task}" + (f"@{self.variant}" if self.variant else "")

    @property
    def program(self) -> str:
        return self.script or f"algos/{self.algo}.py"

    def stem(self, seed: int) -> str:
        label = self.hardware + (f"-{self.variant}" if self.variant else "")
        return f"{self.task}__{label}__s{seed}"

    def result(self, root: Path, seed: int) -> Path:
        return root / "docs/results" / self.algo / f"{self.stem(seed)}.csv"

    def run(self, root: Path, seed: int) -> Path:
        return root / "runs" / f"{self.algo}__{self.stem(seed)}"


def read_matrix(path: Path) -> tuple[list[Cell], dict[str, str]]:
    """-> cells; {input file: the command that makes it}. Raises ValueError that names a wrong entry."""
    content = tomllib.loads(path.read_text())
    cells = []
    for number, entry in enumerate(content.get("cell", []), start=1):
        words = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        for name in ("args", "again"):
            words[name] = tuple(shlex.split(entry.get(name, "")))
        try:
            cells.append(Cell(**words))
        except TypeError as error:
            raise ValueError(f"{path.name}, cell {number}: {error}") from error
    names = [cell.result(path.parent, seed) for cell in cells for seed in cell.seeds]
    if twice := {name.name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name}: two cells write {', '.join(sorted(twice))}")
    return cells, {entry["file"]: entry["command"] for entry in content.get("input", [])}


# --- State --------------------------------------------------------------------------------------
def record_path(cell: Cell, seed: int, root: Path) -> Path:
    return cell.result(root, seed).with_suffix(".json")


def read_record(cell: Cell, seed: int, root: Path) -> dict:
    path = record_path(cell, seed, root)
    return json.loads(path.read_text()) if path.exists() else {}


def write_whole(path: Path, content: str | bytes):
    """Write under another name, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def git(root: Path, *words: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no such commit."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def bare(source: str | None) -> str:
    """Source without comments, docstrings and layout: what changes in it may change a result."""
    tree = ast.parse(source or "")
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                body[0].value.value = ""
    return ast.dump(tree)


def changed_since(cell: Cell, commit: str, root: Path) -> str | None:
    """The first file that the cell runs whose code differs from that commit's; None where all are the same."""
    paths = git(root, "diff", "--name-only", commit, "--", cell.program, *cell.code)
    if paths is None:
        return f"commit {commit} is unknown here"
    for path in paths.split():
        if path.endswith(".py") and (root / path).exists():
            if bare(git(root, "show", f"{commit}:{path}")) == bare((root / path).read_text()):
                continue
        if path.endswith((".py", ".xml")):
            return path
    return None


def last_step(path: Path) -> int:
    """global_step of the last whole row of a CSV file; 0 where there is none."""
    if not path.exists():
        return 0
    for line in reversed(path.read_bytes().splitlines()):
        first = line.partition(b",")[0]
        if first.isdigit():
            return int(first)
    return 0


def lock(run: Path):
    """The run's lock as an open file, or None where another process has it.

    A run's process inherits the file: the lock outlives a runner that is killed, and not its run.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_name(f".{run.name}.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def alive(cell: Cell, seed: int, root: Path) -> bool:
    """Whether a process is busy with the run."""
    file = lock(cell.run(root, seed))
    if file:
        file.close()
    return file is None


def state(cell: Cell, seed: int, root: Path) -> tuple[str, str]:
    """-> (done, stale, running, failed, begun or missing; why)"""
    if alive(cell, seed, root):
        return "running", f"step {last_step(cell.run(root, seed) / 'metrics.csv'):,}"
    record = read_record(cell, seed, root)
    if record.get("ended") == "done" and cell.result(root, seed).exists():
        changed = changed_since(cell, record["commit"], root)
        return (
            ("stale", f"{changed}, since {record['commit'][:7]}")
            if changed
            else ("done", record["commit"][:7])
        )
    if record.get("ended") == "failed":
        return "failed", record["reason"]
    if cell.run(root, seed).exists():
        return "begun", f"step {last_step(cell.run(root, seed) / 'eval.csv'):,}"
    return "missing", ""


# --- One run ------------------------------------------------------------------------------------
def command_of(cell: Cell, seed: int, root: Path) -> list[str]:
    """The command that begins the run."""
    name = cell.run(root, seed).name
    return [cell.program, *cell.args, "--seed", str(seed), "--name", name]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Processor, cores that this process may use, memory, GPU."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = ", " + subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        gpu = ""
    return f"{model}, {cores} cores, {memory:.0f} GiB{gpu}"


def set_aside(run: Path):
    """Move a run that cannot be continued out of the way; nothing is deleted."""
    if run.exists():
        run.rename(run.with_name(f"{run.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))


def prepare(cell: Cell, seed: int, root: Path) -> list[str]:
    """The command to start: the run's own, or `--resume` where it was begun with the same settings."""
    run, begin = cell.run(root, seed), command_of(cell, seed, root)
    begun = run / "reproduce.json"
    saved = any((run / f"checkpoint.{end}").exists() for end in ("pt", "npz"))
    commit = git(root, "rev-parse", "HEAD") or "unknown"
    first = json.loads(begun.read_text()) if begun.exists() else {}
    if saved and first.get("command") == begin and "ended" not in first:
        if first["commit"] != commit and changed_since(cell, first["commit"], root):
            first["resumed_at"] = [*first.get("resumed_at", []), commit]
            write_whole(begun, json.dumps(first))
        return [cell.program, "--resume", str(run.relative_to(root)), *cell.again]
    set_aside(run)
    run.mkdir(parents=True)
    dirty = bool(git(root, "status", "--porcelain", "--", cell.program, *cell.code))
    write_whole(begun, json.dumps({"command": begin, "commit": commit, "uncommitted": dirty}))
    return begin


def collect(cell: Cell, seed: int, root: Path):
    """Copy the run's evaluations to docs/results if there are new ones."""
    source, target = cell.run(root, seed) / "eval.csv", cell.result(root, seed)
    if source.exists():
        content = source.read_bytes()
        if content.endswith(b"\n") and (not target.exists() or target.read_bytes() != content):
            write_whole(target, content)


def reason_of(status: int, log: Path) -> str:
    """One line on why a run ended with this exit status."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
    return lines[-1].split("\r")[-1].strip() if lines else f"exit status {status}"


def run_to_end(cell: Cell, seed: int, root: Path) -> dict:
    """Run one seed in a child process until it ends, is interrupted or fails. -> its record

    Ctrl-C (STOP) is passed on once, so that the run saves. Results are collected while it runs, or
    at its end where a whole result of an earlier run stands in their place.
    """
    held = lock(cell.run(root, seed))
    if held is None:
        return {"ended": "failed", "reason": "another process is busy with it"}
    replaces = read_record(cell, seed, root).get("ended") == "done"
    command = prepare(cell, seed, root)
    run, threads = cell.run(root, seed), str(cell.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
    }
    if cell.threads == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    begun = json.loads((run / "reproduce.json").read_text())
    record = begun | {"command": shlex.join(["python", *begun["command"]]), "threads": cell.threads}
    record |= {
        "versions": versions(),
        "hardware": hardware(),
        "load_at_start": round(os.getloadavg()[0], 1),
    }
    told = False
    with (run / "reproduce.log").open("a") as log:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=root, env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[held.fileno()],
        )  # fmt: skip
        (run / "reproduce.pid").write_text(str(child.pid))
        while child.poll() is None:
            if STOP.is_set() and not told:
                child.send_signal(signal.SIGINT)
                told = True
            if not replaces:
                collect(cell, seed, root)
            STOP.wait(POLL) if not told else time.sleep(POLL)
    (run / "reproduce.pid").unlink()
    held.close()
    if child.returncode == 0:
        record |= {"ended": "done", "steps": last_step(run / "eval.csv")}
        write_whole(run / "reproduce.json", json.dumps(begun | {"ended": "done"}))
    elif told:
        record |= {"ended": "interrupted"}
    else:
        record |= {"ended": "failed", "reason": reason_of(child.returncode, run / "reproduce.log")}
    if record["ended"] == "done" or not replaces:
        collect(cell, seed, root)
        write_whole(record_path(cell, seed, root), json.dumps(record, indent=1) + "\n")
    return record


class Job:
    """A run for submitit: a job that is pre-empted or out of time is queued again, and resumes."""

    def __call__(self, cell: Cell, seed: int, root: Path) -> dict:
        return run_to_end(cell, seed, root)

    def checkpoint(self, cell: Cell, seed: int, root: Path):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(), cell, seed, root)


# --- Many runs ----------------------------------------------------------------------------------
def make_inputs(cells: list[Cell], commands: dict[str, str], root: Path):
    """Make the files that the cells read and that are not there yet. Raises ValueError where that fails."""
    for name in dict.fromkeys(name for cell in cells for name in cell.inputs):
        if (root / name).exists():
            continue
        if name not in commands:
            raise ValueError(f"matrix.toml has no [[input]] that makes {name}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        print(f"making {name}: {commands[name]}", flush=True)
        for command in commands[name].split(" && "):
            words = shlex.split(command)
            words[0] = sys.executable if words[0] == "python" else words[0]
            if subprocess.run(words, cwd=root).returncode:
                raise ValueError(f"{name} could not be made: {command}")


def write_commands(cell: Cell, root: Path):
    """Rewrite the cell's section of docs/results/<algo>/commands.md from the records of its seeds."""
    path = root / "docs/results" / cell.algo / "commands.md"
    records = {seed: read_record(cell, seed, root) for seed in cell.seeds}
    records = {seed: record for seed, record in records.items() if record.get("ended") == "done"}
    if not records:
        return
    title = f"## {cell.stem(0).removesuffix('__s0')}: seeds {', '.join(map(str, records))}"
    lines = [title, "", "```bash"]
    lines += [
        f"OMP_NUM_THREADS={record['threads']} {record['command']}" for record in records.values()
    ]
    lines += ["```", "", f'Again: `make reproduce ARGS="--only {cell.name} --again"`', ""]
    for key in ("commit", "versions", "hardware"):
        values = {}
        for seed, record in records.items():
            value = record.get(key, "unknown")
            value = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            values.setdefault(value[:9] if key == "commit" else value, []).append(str(seed))
        text = "; ".join(
            v if len(values) == 1 else f"{v} (seeds {', '.join(s)})" for v, s in values.items()
        )
        lines.append(f"- {key}: {text}")
    start, end = f"<!-- cell:{cell.stem(0)} -->", "<!-- /cell -->"
    block = "\n".join([start, *lines, end])
    text = (
        path.read_text() if path.exists() else f"# {cell.algo}: the commands behind the results\n"
    )
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    text = (
        pattern.sub(lambda _: block, text)
        if pattern.search(text)
        else f"{text.rstrip()}\n\n{block}\n"
    )
    write_whole(path, text)


def chosen(args: Args, cells: list[Cell]) -> list[tuple[Cell, int]]:
    """The runs that the command line names. Raises ValueError where a pattern names none."""
    for pattern in args.only:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell is called {pattern}; --list names them")
    wanted = [
        c for c in cells if not args.only or any(fnmatch(c.name, pattern) for pattern in args.only)
    ]
    return [
        (cell, seed)
        for cell in wanted
        for seed in cell.seeds
        if not args.seeds or seed in args.seeds
    ]


def to_do(args: Args, runs: list[tuple[Cell, int]]) -> list[tuple[Cell, int]]:
    """The chosen runs that are to be started."""
    wanted = {"missing", "begun"}
    wanted |= {"failed"} if args.retry else set()
    wanted |= {"done", "stale"} if args.again else {"stale"} if args.stale else set()
    found = []
    for cell, seed in runs:
        now, _ = state(cell, seed, args.root)
        if now in wanted and not cell.closed:
            found.append((cell, seed))
    return found


def hours(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.0f} min"


def table(runs: list[tuple[Cell, int]], jobs: int, root: Path) -> str:
    """A line a cell with the state of its seeds, then the sum."""
    lines, left, counts = [], 0.0, {}
    by_cell = {}
    for cell, seed in runs:
        by_cell.setdefault(cell, []).append((seed, *state(cell, seed, root)))
    for cell, seeds in by_cell.items():
        parts = []
        for now in ("done", "running", "begun", "missing", "stale", "failed"):
            these = [(seed, why) for seed, found, why in seeds if found == now]
            if not these:
                continue
            counts[now] = counts.get(now, 0) + len(these)
            why = f" ({these[0][1]})" if these[0][1] and now != "done" else ""
            parts.append(f"{now} {','.join(str(seed) for seed, _ in these)}{why}")
            if now in ("begun", "missing", "running") and not cell.closed:
                left += cell.minutes * len(these)
        note = f"  [closed: {cell.closed}]" if cell.closed else ""
        lines.append(f"{cell.name:<52} {hours(cell.minutes):>8} a run  {'; '.join(parts)}{note}")
    total = ", ".join(f"{number} {now}" for now, number in counts.items())
    lines.append(
        f"{len(runs)} runs: {total}; {hours(left / max(jobs, 1))} to go with --jobs {jobs}"
    )
    return "\n".join(lines)


def progress(
    busy: list[tuple[Cell, int]], waiting: list, jobs: int, begun: dict, root: Path
) -> str:
    """One line: step and time left of every busy run, then of all."""
    parts, left = [], sum(cell.minutes for cell, _ in waiting)
    for cell, seed in busy:
        run, passed = cell.run(root, seed), (time.time() - begun[cell, seed]) / 60
        settings = run / "args.json"
        total = json.loads(settings.read_text())["total_timesteps"] if settings.exists() else 0
        step = max(last_step(run / "metrics.csv"), last_step(run / "eval.csv"))
        first = begun.setdefault((cell, seed, "step"), step)
        share = (step - first) / max(total - first, 1)
        rest = passed * (1 - share) / share if share > 0 else max(cell.minutes - passed, 0)
        left += rest
        parts.append(f"{cell.name} s{seed} {step:,}/{total:,}, {hours(rest)} left")
    return " | ".join([*parts, f"{len(waiting)} waiting, {hours(left / jobs)} left"])


def run_all(args: Args, runs: list[tuple[Cell, int]]) -> list[dict]:
    """Start the runs, --jobs at a time, and wait for them. -> their records"""
    if args.launcher == "here":
        executor = ThreadPoolExecutor(args.jobs)
        job = run_to_end
    else:
        import submitit

        here = str(
            Path(__file__).resolve().parent
        )  # where a job on another machine finds this file
        paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        executor = submitit.AutoExecutor(args.root / "runs/submitit", cluster=args.launcher)
        slowest = max(cell.minutes for cell, _ in runs)
        cpus = max(cell.threads for cell, _ in runs)
        executor.update_parameters(timeout_min=int(3 * slowest) + 10, cpus_per_task=cpus)
        executor.update_parameters(
            name="cleanrobot", **dict(word.split("=", 1) for word in args.slurm)
        )
        job = Job()
    waiting, busy, records, begun, shown = list(runs), {}, [], {}, 0.0
    while busy or (waiting and not STOP.is_set()):
        while waiting and len(busy) < args.jobs and not STOP.is_set():
            cell, seed = waiting.pop(0)
            begun[cell, seed] = time.time()
            busy[cell, seed] = executor.submit(job, cell, seed, args.root)
        for (cell, seed), future in list(busy.items()):
            if STOP.is_set() and args.launcher != "here":
                future.cancel()
                records.append({"ended": "interrupted"})
                del busy[cell, seed]
            elif future.done():
                del busy[cell, seed]
                try:
                    record = future.result()
                except Exception as error:  # submitit's own: the job itself was lost
                    record = {"ended": "failed", "reason": str(error).strip().splitlines()[-1]}
                records.append(record)
                write_commands(cell, args.root)
                print(
                    f"\r\033[K{cell.name} s{seed}: {record['ended']} {record.get('reason', '')}",
                    flush=True,
                )
        if busy and time.time() - shown > (1 if sys.stdout.isatty() else 60):
            shown = time.time()
            line = progress(list(busy), waiting, args.jobs, begun, args.root)
            print(f"\r\033[K{line}", end="", flush=True) if sys.stdout.isatty() else print(
                line, flush=True
            )
        time.sleep(POLL)
    if args.launcher == "here":
        executor.shutdown()
    return records


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 where a run failed or was interrupted."""
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n\n")[0])
    args = replace(args, root=args.root.resolve())
    cells, inputs = read_matrix(args.root / "benchmarks/matrix.toml")
    runs = chosen(args, cells)
    if args.list:
        print(table(runs, args.jobs, args.root))
        return 0
    runs = to_do(args, runs)
    make_inputs([cell for cell, _ in runs], inputs, args.root)
    STOP.clear()
    earlier = {
        number: signal.signal(number, lambda *_: STOP.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        records = run_all(args, runs) if runs else []
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    print(table(chosen(args, cells), args.jobs, args.root))
    return int(any(record["ended"] != "done" for record in records))


if __name__ == "__main__":
    import reproduce  # under its own name: submitit hands its functions over by reference

    try:
        sys.exit(reproduce.main())
    except ValueError as error:
        sys.exit(f"error: {error}")
