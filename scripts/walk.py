"""Run every command of README and docs once, each with the smallest budget, in a fresh clone.

    python scripts/walk.py                         all pages; not yet timed as a whole
    python scripts/walk.py --only docs/hardware.md
    python scripts/walk.py --list                  what would run, and what not, and why

A command that trains gets the numbers of SMALLEST; everything else is as the page has it. A placeholder such as
`runs/<name>` stands for the newest run that fits. The clone is of the last commit: what is not committed is not walked.
Prints one line a command: how it ended, seconds, and where it failed its last line. Exits with 1 if one failed.
"""

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what a page quotes from the past, or generates
PAGES = [page for page in PAGES if page.name not in ("log.md", "commands.md")]
OURS = {"algos", "scripts", "benchmarks", "hardware", "envs", "tests"}

FEW = "--eval-episodes 4 --eval-envs 4"
PIXELS = f"--total-timesteps 240 --learning-starts 120 --eval-freq 120 --log-freq 60 {FEW}"
GO1 = "--total-timesteps 20480 --eval-freq 10240 --log-freq 10240 --eval-episodes 2"
# program -> the flags of a training, of its continuation, of an evaluation
SMALLEST = {
    "algos/squint_sac.py": (
        f"--total-timesteps 2560 --learning-starts 640 --eval-freq 1280 {FEW}",
        "--total-timesteps 3840",
        FEW,
    ),
    "algos/drqv2.py": (f"{PIXELS} --random-steps 120", "--total-timesteps 360", FEW),
    "algos/sac_pixels.py": (f"{PIXELS} --buffer-size 2000", "--total-timesteps 360", FEW),
    "algos/ppo_mjx_go1.py": (GO1, "--total-timesteps 30720", "--eval-episodes 2"),
    "algos/distill_go1.py": (GO1, "--total-timesteps 30720", ""),
    "algos/sapo_rewarped.py": (
        "--total-timesteps 1024 --eval-freq 512 --eval-episodes 2",
        "--total-timesteps 1536",
        "--eval-episodes 2",
    ),
    "algos/resfit.py": (
        f"--total-timesteps 1600 --learning-starts 400 --critic-warmup 20 --eval-freq 800 {FEW}",
        "--total-timesteps 2400",
        FEW,
    ),
    "algos/bc_chunk.py": (f"--steps 20 --eval-freq 10 {FEW}", "--steps 40", FEW),
    "scripts/baselines_resfit.py": (f"--total-timesteps 1600 --eval-freq 800 {FEW}", "", ""),
    "envs/demos/__main__.py": ("--episodes 12 --overwrite", "", ""),
    "hardware/sim2sim_go1.py": ("--seconds 1 --repeats 1", "", ""),
    "scripts/trajopt_rewarped.py": ("--iterations 1", "", ""),
    "scripts/baselines_rewarped.py": ("--total-timesteps 1024", "", ""),
    "scripts/landscape_rewarped.py": ("--points 3", "", ""),
    "scripts/picture_rewarped.py": ("--size small --steps 5", "", ""),
    "envs/so101/expert.py": ("--episodes 4", "", ""),
}
NOT_WALKED = {
    r"^(cd|cp|export|for|do|done|source|git|rm|ls|uv|sudo|apt-get|\{|\$)": "the shell's, or a protocol's",
    r"pip install|^make setup|^make (lock|newest)(?!.*--list)|gather_wheels(?!.*--list)": "installs packages",
    r"^make (train|test)$|gpu.py --(minutes|dry-run)|^make reproduce(?!.*--list)|walk.py": "takes as long as it takes",
    r"benchmarks/(?!gpu)|bad_inputs|hardware.(faults|jitter)|physics_rewarped": "measures for minutes",
    r"NOISE|FOLDER|--device cuda|…": "needs what the reader fills in",
    r"/dev/tty|--camera 0": "needs the arm",
    r"--viewer": "needs a display",
    r"mjx-warp": "for a GPU",
    r"^python drqv2.py": "the same file as algos/drqv2.py",
}
# what a page calls a run -> the program whose newest run stands for it
PLACES = {
    "algos/distill_go1.py": "algos/ppo_mjx_go1.py",
    "hardware/sim2sim_go1.py": "algos/ppo_mjx_go1.py",
    "hardware/export_go1.py": "algos/distill_go1.py",
    "hardware/export.py": "algos/squint_sac.py",
    "hardware/deploy_so101.py": "algos/squint_sac.py",
    "scripts/plot_critic.py": "algos/squint_sac.py",
    "scripts/landscape_rewarped.py": "algos/sapo_rewarped.py",
    "scripts/picture_go1.py": "algos/ppo_mjx_go1.py",
}


@dataclass
class Args:
    only: tuple[str, ...] = ()  # pages, as docs/hardware.md; empty: all
    list: bool = False  # run nothing
    limit: int = 600  # seconds a command may take


def commands(page: Path) -> list[str]:
    """The lines of its ```bash blocks in order, and after them `python ...` from between the text.

    Continued lines are joined, comments left out.
    """
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found, text = [], page.read_text()
    for language, block in blocks.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            parts = [line] if "$(" in line else re.split(r"&&|;|\|", line)
            found += [part.strip() for part in parts if part.strip()]
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )?python [^`]+)`", blocks.sub("", text))
    return found + [" ".join(command.split()) for command in inline]


def program_of(words: list[str]) -> Path | None:
    """The file of ours that a command runs; None where it is another's."""
    for position, word in enumerate(words[:-1]):
        if word == "-m":
            module = words[position + 1]
            if module.split(".")[0] not in OURS:
                return None
            path = ROOT / module.replace(".", "/")
            package = path / "__main__.py"
            return package if package.exists() else path.with_suffix(".py")
    for word in words:
        if word.endswith(".py") and word.split("/")[0] in OURS:
            return ROOT / word
    return None


def why_not(text: str) -> str:
    """The reason for which a command is not walked; empty: it is."""
    for pattern, reason in NOT_WALKED.items():
        if re.search(pattern, text):
            return reason
    task = re.search(r"--env-id (\S+)", text)
    if (
        task
        and not task[1].startswith("SO101")
        and task[1].endswith("-v1")
        and not find_spec("mani_skill")
    ):
        return "needs ManiSkill"
    if ("envs.maniskill" in text or "/maniskill" in text) and not find_spec("mani_skill"):
        return "needs ManiSkill"
    if "robosuite/" in text and not find_spec("robosuite"):
        return "needs robosuite"
    if "baselines_rewarped" in text and not find_spec("stable_baselines3"):
        return "needs stable-baselines3"
    return ""


def replaced(words: list[str], flags: str) -> list[str]:
    """The command with these flags in place of its own values for them."""
    new = shlex.split(flags)
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word in new
        if not skip:
            kept.append(word)
    return kept + new


class Walk:
    """One fresh clone, and which program made which run in it."""

    def __init__(self, clone: Path, limit: int):
        self.clone, self.limit = clone, limit
        self.runs = []  # (program, folder), the newest last

    def newest(self, program: str, task: str | None) -> str:
        """runs/NAME for a placeholder. Raises LookupError if no run fits."""
        for maker, folder in reversed(self.runs):
            given = json.loads((folder / "args.json").read_text())
            if maker == program and task in (None, given.get("env_id")):
                return f"runs/{folder.name}"
        raise LookupError(f"no run of {program} to stand for the placeholder")

    def filled(self, words: list[str], program: str) -> list[str]:
        """The words with runs for placeholders, and with the smallest budget."""
        maker = PLACES.get(program, program)
        task = words[words.index("--env-id") + 1] if "--env-id" in words else None
        if program in PLACES or "--resume" in words or "--evaluate" in words:
            task = None
        for i, word in enumerate(words):
            place = re.search(r"runs/(<\w+>|NAME|\$name)", word)
            if place:
                who = "algos/distill_go1.py" if place[1] == "<student>" else maker
                run = "runs/teacher" if place[1] == "$name" else self.newest(who, task)
                words[i] = word.replace(place[0], run)
        train, resume, evaluate = SMALLEST.get(program, ("", "", ""))
        flags = evaluate if "--evaluate" in words else resume if "--resume" in words else train
        if "--name" in words:  # another page may have walked the same command
            shutil.rmtree(
                self.clone / "runs" / words[words.index("--name") + 1], ignore_errors=True
            )
        return replaced(words, flags)

    def run(self, text: str) -> tuple[str, float]:
        """-> "" or the last line that it printed before it failed, and seconds."""
        begun = time.time()
        words = []
        for word in shlex.split(text):
            found = sorted(self.clone.glob(word)) if "*" in word else ()
            words += [str(path.relative_to(self.clone)) for path in found] or [word]
        words = words[
            next(i for i, word in enumerate(words) if "=" not in word or word.startswith("-")) :
        ]
        path = program_of(words)
        program = str(path.relative_to(ROOT)) if path else ""
        try:
            words = self.filled(words, program)
        except LookupError as error:
            return str(error), 0.0
        if words[0] == "timeout":
            words = words[words.index("python") :]
        if words[0] == "python":
            words[0] = sys.executable
        runs = self.clone / "runs"
        before = set(runs.glob("*/args.json")) if runs.exists() else set()
        environment = os.environ | {"PYTHONPATH": str(self.clone), "WANDB_MODE": "disabled"}
        process = subprocess.Popen(
            words,
            cwd=self.clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.communicate()
            return f"still running after {self.limit} s", time.time() - begun
        after = set(runs.glob("*/args.json")) if runs.exists() else set()
        self.runs += [(program, path.parent) for path in sorted(after - before)]
        lines = [line for line in said.splitlines() if line.strip()]
        failure = "" if process.returncode == 0 else (lines[-1] if lines else "no output")
        return failure, time.time() - begun


def main(args: Args) -> int:
    pages = [page for page in PAGES if not args.only or str(page.relative_to(ROOT)) in args.only]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "cleanrobot"
        if not args.list:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        walk, walked = Walk(clone, args.limit), {}
        for page in pages:
            print(page.relative_to(ROOT), flush=True)
            for text in commands(page):
                reason = why_not(text)
                if reason or args.list:
                    print(
                        f"  {'not walked: ' + reason if reason else 'would run':44} {text}",
                        flush=True,
                    )
                    continue
                if text not in walked or " --name " in text:
                    walked[text] = walk.run(text)
                failure, seconds = walked[text]
                failures += bool(failure)
                ended = f"{'failed' if failure else 'ok'} {seconds:5.0f} s"
                print(f"  {ended:44} {text}", flush=True)
                if failure:
                    print(f"      {failure}", flush=True)
    print(f"{failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
