"""Measure what only a GPU can tell: the worthiest first, within the minutes given.

    python benchmarks/gpu.py --minutes 10      on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --list            the steps, their time limits and how each stands
    python benchmarks/gpu.py --only 'go1-*'    some of them
    python benchmarks/gpu.py --dry-run         without a GPU: nothing is measured, see below

A step is one command of this repository, run as a process of its own with a time limit: a check (the
captured and compiled updates against the plain ones, MJX against MuJoCo's C library, Warp on the GPU
against Warp on the CPU), a benchmark, or a shortened learning run. After each step three things are
written to --out: <step>.json (command, commit, GPU, driver, versions, seconds, how it ended, every
figure), <step>.log, and results.csv, one line a figure over all steps.

Call it again and it goes on. What is done stays done unless --again. What the end of the minutes
stopped is measured once more, but a learning run resumes from where it saved. What failed, or reached
the time limit of its step, is tried again with --retry. A step that fails leaves its reason, and the
next one begins. Ctrl-C ends the step and the session, and all that was measured is kept.

--dry-run prints each step's command, lets the script in question read its arguments, and runs those
steps that have a tiny form for a CPU. It measures nothing: its records go to <out>/dry-run and say so.

Without the network: scripts/gather_wheels.py, on a machine with one, says how.
"""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import reproduce
import tyro

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("step", "ended", "seconds", "figure", "value", "unit", "remark")
GRACE = 20.0  # seconds that a step gets to save after Ctrl-C, before it is killed
LEAST = 20.0  # a step is not begun with less time than this
AT_LIMIT = "stopped at its limit"
NO_JAX = "JAX sees no GPU: install its plugin as docs/install.md says, then --retry"
MACHINE = """
import json, torch, warp
facts = {"torch": torch.__version__, "warp CUDA devices": warp.get_cuda_device_count()}
facts["torch CUDA devices"] = torch.cuda.device_count()
try:
    import jax
    facts["jax devices"] = ", ".join(str(device) for device in jax.devices())
except Exception as error:
    facts["jax devices"] = f"none: {error}".splitlines()[0]
print(json.dumps(facts))
"""


@dataclass
class Args:
    minutes: float = 10.0
    """time for everything together"""
    only: tuple[str, ...] = ()
    """steps by name, with * if you like; empty: all"""
    again: bool = False
    """run what is done once more"""
    retry: bool = False
    """run what failed once more"""
    list: bool = False
    """print the steps and end"""
    dry_run: bool = False
    """measure nothing: check every command, run the tiny ones on the CPU"""
    out: Path = ROOT / "runs/gpu"
    """folder of the records"""

    def check(self) -> None:
        """Raises ValueError at the first choice that cannot work. (In __post_init__ tyro would reword it.)"""
        if not 0 < self.minutes < 1e5:
            raise ValueError("--minutes must be above 0")
        for pattern in self.only:
            if not any(fnmatch(step.name, pattern) for step in STEPS):
                raise ValueError(f"no step is called {pattern}; --list names them")


# --- The steps, in order of worth ---------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One command: a script with its words, or `-m pytest`, or `-c code`."""

    name: str
    what: str
    words: str
    limit: float  # minutes after which it is stopped; what it has written until then counts
    kind: str = "benchmark"  # benchmark: writes a CSV; learning: a run; tests; machine
    tiny: str = ""  # words for a CPU in a dry run; empty: not run there

    @property
    def jax(self) -> bool:
        """Whether JAX computes it: where that sees no GPU it would take the CPU and say nothing."""
        return "go1" in self.words

    @property
    def command(self) -> list[str]:
        return ["-c", MACHINE] if self.kind == "machine" else shlex.split(self.words)


def learns(name: str, what: str, words: str, limit: float, tiny: str = "") -> Step:
    """A learning run; `tiny` comes after its words and overrules them. NAME begins a dry run's name."""
    whole = f"{words} --no-capture-video --name gpu__{name}"
    tiny = f"{words} --no-capture-video {tiny} --name NAME__{name}" if tiny else ""
    return Step(name, what, whole, limit, "learning", tiny)


ROUTES = "tests/test_squint_sac.py tests/test_drqv2.py tests/test_sac_pixels.py -k cuda_graph"
MJX = "tests/test_go1_mjx.py -k 'mjx_equals_c or mjx_warp_equals_c'"
GO1 = "algos/ppo_mjx_go1.py --env-id Go1JoystickFlat --total-timesteps 40000000"
GO1 += " --eval-freq 10000000 --eval-episodes 32"
STEPS = (
    Step("machine", "what torch, Warp and JAX see", "", 1, "machine"),
    Step(
        "graph-tests",
        "captured and compiled updates equal the plain ones: Squint, DrQ-v2, SAC",
        f"-m pytest -q {ROUTES}",
        3,
        "tests",
    ),
    Step(
        "squint-updates",
        "critic updates a second: plain, bfloat16, compiled, captured",
        "benchmarks/throughput.py --parts learning --seconds 3 --device cuda",
        2,
    ),
    learns(
        "squint-reach",
        "Squint at the published sizes on the easiest task",
        "algos/squint_sac.py --env-id SO101ReachCube-v1 --device cuda --total-timesteps 160000"
        " --eval-freq 20000",
        3,
    ),
    Step(
        "go1-simulation",
        "control steps a second: MJX in JAX and in Warp",
        "benchmarks/throughput_go1.py --backends mjx-jax mjx-warp --num-envs 1024 8192"
        " --parts environment --seconds 3",
        2.5,
    ),
    Step("go1-tests", "MJX on the GPU equals MuJoCo's C library", f"-m pytest -q -m '' {MJX}", 2, "tests"),
    Step(
        "squint-simulation",
        "physics, images, environment and the whole of Squint",
        "benchmarks/throughput.py --parts environment training physics images --seconds 2 --device cuda",
        2.5,
        tiny="benchmarks/throughput.py --parts environment --seconds 0.01 --blocks 1 --num-envs 2"
        " --device cpu",
    ),
    learns("go1-walk", "PPO, MJX in JAX: 40 of the 200 million steps", f"{GO1} --backend mjx-jax", 4),
    Step(
        "cuda-tests",
        "images, physics and gradients in Warp: the GPU against the CPU",
        "-m pytest -q tests/test_cuda.py",
        3,
        "tests",
    ),
    Step(
        "pixels-updates",
        "updates a second of DrQ-v2 and SAC, by route",
        "benchmarks/throughput_pixels.py --parts learning --sizes published --seconds 2 --device cuda",
        4,
    ),
    Step(
        "go1-training",
        "acting, simulation and learning together, and learning alone",
        "benchmarks/throughput_go1.py --backends mjx-jax mjx-warp --parts training learning --seconds 3",
        3,
    ),
    Step(
        "pixels-simulation",
        "DeepMind Control: physics, each renderer, the whole of DrQ-v2",
        "benchmarks/throughput_pixels.py --parts pictures environment training --seconds 2 --device cuda",
        4,
        tiny="benchmarks/throughput_pixels.py --env-id dot_reach --parts training --seconds 0.1"
        " --blocks 1 --processes 1 --device cpu",
    ),
    Step(
        "rewarped",
        "differentiable simulation at full size: forward, and with backward",
        "benchmarks/throughput_rewarped.py --task AntRun RollingFlat HandFlip --size full --device cuda"
        " --num-envs 16 64 --repeats 2 --no-plain",
        4,
    ),
    learns(
        "sapo-ant",
        "SAPO on AntRun at full size",
        "algos/sapo_rewarped.py --env-id AntRun --device cuda --size full --total-timesteps 500000"
        " --eval-freq 100000",
        5,
    ),
    learns("drqv2-dot", "DrQ-v2 on dot_reach", "algos/drqv2.py --env-id dot_reach --device cuda", 3,
           "--device cpu --total-timesteps 64 --learning-starts 32 --eval-freq 64 --eval-episodes 2"
           " --eval-envs 2"),
    learns("sac-dot", "SAC on dot_reach", "algos/sac_pixels.py --env-id dot_reach --device cuda", 3),
    learns("go1-walk-warp", "PPO, MJX in Warp: 40 million steps", f"{GO1} --backend mjx-warp", 4),
    learns(
        "squint-lift",
        "Squint on the task that needs a grasp",
        "algos/squint_sac.py --env-id SO101LiftCube-v1 --device cuda --total-timesteps 500000"
        " --eval-freq 50000",
        8,
    ),
)  # fmt: skip


# --- Records ------------------------------------------------------------------------------------
def nvidia() -> dict[str, str]:
    """Name and driver of the GPU, or nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(("gpu", "driver", "gpu_memory"), lines[0].split(", "), strict=False))


def facts() -> dict:
    """What every record says of the machine and the code."""
    commit = reproduce.git(ROOT, "rev-parse", "HEAD") or "unknown"
    changed = bool(reproduce.git(ROOT, "status", "--porcelain", "--untracked-files=no"))
    found = {"commit": commit, "uncommitted_changes": changed, "hardware": reproduce.hardware()}
    return found | nvidia() | {"versions": reproduce.versions()}


def read(folder: Path, step: Step) -> dict:
    """The step's record; empty where there is none or half of one."""
    try:
        return json.loads((folder / f"{step.name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_table(folder: Path):
    """results.csv anew from all records: a line a figure, or the reason why there is none."""
    lines = []
    for step in STEPS:
        record = read(folder, step)
        if not record:
            continue
        head = {"step": step.name, "ended": record["ended"], "seconds": record.get("seconds", "")}
        figures = record.get("figures") or [{"remark": record.get("reason", "")}]
        lines += [head | figure for figure in figures]
    with (folder / "results.csv.tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(folder / "results.csv.tmp", folder / "results.csv")


def rows_of(path: Path) -> list[dict]:
    """The rows of a CSV file; none where there is no file. A row that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def figures_of(step: Step, table: Path, log: str) -> list[dict]:
    """What a step's output says, as rows of results.csv."""
    if step.kind == "machine":
        told = [line for line in log.splitlines() if line.startswith("{")]
        return [dict(figure=k, value=v) for k, v in json.loads(told[-1]).items()] if told else []
    if step.kind == "tests":
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", log)
        return [dict(figure=word, value=int(number), unit="tests") for number, word in counts]
    if step.kind == "learning":
        rows = rows_of(run_of(step) / "eval.csv")
        if not rows:
            return []
        key = "eval/success_rate" if "eval/success_rate" in rows[0] else "eval/return"
        last, best = rows[-1], max(rows, key=lambda row: float(row[key]))
        at = f"step {last['global_step']}, {float(last['wall_time']):.0f} s since the start"
        return [
            dict(figure=f"last {key}", value=last[key], remark=at),
            dict(figure=f"best {key}", value=best[key], remark=f"step {best['global_step']}"),
        ]
    found = []
    for row in rows_of(table):
        rate = row.get("per_second") or row.get("env_steps_per_second")
        labels = ("part", "task", "what", "at", "environments")
        name = ", ".join(row[label] for label in labels if row.get(label))
        remark = "; ".join(filter(None, (row.get("remark"), row.get("range"))))
        if not name.startswith("machine"):
            unit = row.get("unit", "environment steps") + "/s" if rate else ""
            found.append(dict(figure=name, value=rate or "", unit=unit, remark=remark))
    return found


# --- One step -----------------------------------------------------------------------------------
def stop(child: subprocess.Popen):
    """Ctrl-C for the step, so that a run saves; whatever is left of it after GRACE seconds is killed."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def command_of(step: Step, folder: Path, record: dict, again: bool) -> list[str]:
    """What is started: the step's command with the place of its CSV, or a learning run's resumption.

    A run that cannot go on, or is not to, is moved aside.
    """
    if step.kind == "benchmark":
        return [*step.command, "--out", str(folder / f"{step.name}.csv")]
    run = run_of(step)
    if step.kind == "learning" and run.exists():
        saved = any((run / f"checkpoint.{end}").exists() for end in ("pt", "npz"))
        if saved and not again and record.get("command_given") == step.words:
            return [step.command[0], "--resume", str(run.relative_to(ROOT))]
        reproduce.set_aside(run)
    return step.command


def run_of(step: Step) -> Path:
    """The folder that a learning run writes."""
    return ROOT / "runs" / step.words.rpartition("--name ")[2] if step.words else ROOT / "runs"


def run_step(step: Step, command: list[str], seconds: float, folder: Path) -> dict:
    """Run a step for so many seconds at most. -> its record: how it ended and every figure that it left

    Raises KeyboardInterrupt after the step has been stopped, with the record as its argument.
    """
    log, begun = folder / f"{step.name}.log", time.time()
    shown = ["python", *("..." if word == MACHINE else word for word in command)]
    record = {"step": step.name, "what": step.what, "command": shlex.join(shown)}
    record |= {"began": time.strftime("%Y-%m-%d %H:%M:%S")}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    # JAX's programs take a minute to compile, and several steps need the same ones
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax-cache"))
    interrupted = False
    (folder / f"{step.name}.csv").unlink(missing_ok=True)  # of an earlier attempt
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(seconds)
            ended = "done" if child.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            stop(child)
            ended = AT_LIMIT if seconds >= 60 * step.limit else "out of time"
        except KeyboardInterrupt:
            stop(child)
            ended, interrupted = "interrupted", True
    record |= {"ended": ended, "seconds": round(time.time() - begun, 1)}
    if ended == "failed":
        record["reason"] = reproduce.reason_of(child.returncode, log)
    try:
        text = log.read_text(errors="replace")
        record["figures"] = figures_of(step, folder / f"{step.name}.csv", text)
    except (ValueError, KeyError) as error:
        record |= {"ended": "failed", "reason": f"its output cannot be read: {error!r}"}
    if step.kind == "tests" and ended == "done":
        counts = {figure["figure"]: figure["value"] for figure in record["figures"]}
        if not counts.get("passed"):
            record |= {"ended": "failed", "reason": "no test ran: all were skipped"}
    if interrupted:
        raise KeyboardInterrupt(record)
    return record


# --- The session --------------------------------------------------------------------------------
def jax_sees_a_gpu(folder: Path) -> bool:
    """What this session's first step found out."""
    figures = read(folder, STEPS[0]).get("figures", [])
    return any(f["figure"] == "jax devices" and "cuda" in f["value"] for f in figures)


def due(step: Step, record: dict, args: Args) -> bool:
    """Whether the step is to be run."""
    if step.kind == "machine":
        return True
    if record.get("ended") in ("done", AT_LIMIT):
        more = args.retry and record["ended"] == AT_LIMIT
        return args.again or more or record.get("command_given") != step.words
    return record.get("ended") != "failed" or args.retry or args.again


def keep(folder: Path, step: Step, record: dict):
    """Write the record, then the table of all."""
    text = json.dumps(record | {"command_given": step.words}, indent=1) + "\n"
    reproduce.write_whole(folder / f"{step.name}.json", text)
    write_table(folder)


def tell(step: Step, record: dict):
    """A step's outcome and figures, for whoever looks on."""
    print(f"{step.name}: {record['ended']} {record.get('reason', '')}".rstrip(), flush=True)
    for figure in record.get("figures", []):
        value, unit = figure.get("value", ""), figure.get("unit", "")
        print(f"    {figure['figure']}: {value} {unit} {figure.get('remark', '')}".rstrip())


def session(args: Args, steps: list[Step]) -> int:
    """Run what is due until the time is over. -> exit status: 1 where a step failed"""
    if not nvidia():
        raise ValueError("no NVIDIA GPU here (nvidia-smi names none); --dry-run works without one")
    # stopping the last step takes its time too
    steps = [STEPS[0], *(step for step in steps if step is not STEPS[0])]
    end, common, failed = time.time() + 60 * args.minutes - GRACE, facts(), 0
    for step in steps:
        left = end - time.time()
        if not due(step, read(args.out, step), args):
            print(f"{step.name}: kept, {read(args.out, step)['ended']}")
            continue
        if left < LEAST:
            print(f"{step.name}: no time left; call again, or give --minutes more")
            continue
        seconds = min(60 * step.limit, left)
        print(f"{step.name}: {step.what}, {seconds:.0f} s at most", flush=True)
        earlier = read(args.out, step)
        again = args.again or earlier.get("ended") == "failed"
        try:
            if step.jax and not jax_sees_a_gpu(args.out):
                raise ValueError(NO_JAX)
            record = run_step(step, command_of(step, args.out, earlier, again), seconds, args.out)
        except ValueError as error:
            record = {"step": step.name, "ended": "failed", "reason": str(error), "seconds": 0.0}
        except KeyboardInterrupt as interrupt:
            keep(args.out, step, common | interrupt.args[0])
            print(f"\n{step.name}: interrupted; all records are in {args.out}")
            return 130
        keep(args.out, step, common | record)
        tell(step, record)
        failed += record["ended"] == "failed"
    print(f"{args.out / 'results.csv'}: {len(rows_of(args.out / 'results.csv'))} figures")
    return int(failed > 0)


def understood(words: list[str]) -> str:
    """Why a script would refuse these arguments, or nothing."""
    if words[0] == "-m":
        files = [word for word in words if word.endswith(".py")]
        missing = [name for name in files if not (ROOT / name).exists()]
        return f"{missing[0]} does not exist" if missing else ""
    path = ROOT / words[0]
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
        parse = getattr(module, "parse_args", lambda words: tyro.cli(module.Args, args=words))
        parse(words[1:])
    except (ImportError, ValueError) as error:
        return str(error).splitlines()[0]
    except SystemExit:
        return "its arguments are refused, see above"
    return ""


def dry_run(args: Args, steps: list[Step], scratch: str) -> int:
    """Check every command, run the tiny ones. -> exit status: 1 where one would fail"""
    folder, failed = args.out / "dry-run", 0
    folder.mkdir(parents=True, exist_ok=True)
    common = facts() | {"dry_run": "nothing was measured"}
    for step in steps:
        print(f"{step.name}: {step.what}, {step.limit:g} min at most")
        print("    python " + (step.words or "-c '...'"))
        why = "" if step.kind == "machine" else understood(step.command)
        record = {"ended": "failed", "reason": why} if why else {"ended": "arguments read, not run"}
        if step.kind == "machine" or (step.tiny and not why):
            tiny = step
            if step.tiny:
                tiny = replace(step, words=step.tiny.replace("NAME", Path(scratch).name))
            try:
                command = command_of(tiny, folder, {}, again=True)
                record = run_step(tiny, command, 60 * args.minutes, folder)
            except KeyboardInterrupt:
                print("interrupted")
                return 130
            finally:
                for run in (ROOT / "runs").glob(f"{Path(scratch).name}__*"):
                    shutil.rmtree(run)
            record |= {"ended": "ran tiny on the CPU"} if record["ended"] == "done" else {}
        keep(folder, step, common | record)
        print(f"    {record['ended']} {record.get('reason', '')}".rstrip(), flush=True)
        failed += record["ended"] not in ("arguments read, not run", "ran tiny on the CPU")
    print(f"dry run: {len(steps)} steps, {failed} would fail; records in {folder}")
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    """-> exit status. Raises ValueError for arguments that do not fit."""
    plain = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n\n")[0], config=plain)
    args.check()
    args = replace(args, out=args.out.resolve())
    chosen = args.only or ("*",)
    steps = [step for step in STEPS if any(fnmatch(step.name, pattern) for pattern in chosen)]
    if args.list:
        for step in steps:
            ended = read(args.out, step).get("ended", "not run")
            print(f"{step.name:<18} {step.limit:>4g} min  {ended:<12} {step.what}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        (ROOT / "runs").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="gpu-dry-run-") as scratch:
            return dry_run(args, steps, Path(scratch).name)
    return session(args, steps)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
