"""What a user sees who types or holds something wrong: runs each command and keeps what it says last.

python scripts/bad_inputs.py            print the table
python scripts/bad_inputs.py --write    into docs/bad_input.md; exit with 1 where a traceback is seen
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
DRQ = "algos/drqv2.py --env-id dot_reach --device cpu"
TINY = "--learning-starts 200 --total-timesteps 200 --eval-freq 200 --eval-episodes 4 --eval-envs 4 --no-capture-video"
EVALUATE = f"{DRQ} --evaluate --eval-episodes 4 --eval-envs 4 --checkpoint"

# (kind, [(what is wrong, command from the repository's root), ...]); FILES stands for a folder of prepared files
CASES = [
    (
        "An id",
        [
            ("no task at all", "algos/squint_sac.py --env-id SO101FlyCube-v1 --device cpu"),
            ("another simulator's task", "algos/squint_sac.py --env-id walker_walk --device cpu"),
            (
                "another simulator's task",
                "algos/sapo_rewarped.py --env-id PickCube-v1 --device cpu",
            ),
            ("another simulator's task", "algos/ppo_mjx_go1.py --env-id AntRun"),
            ("a misspelt suite task", "algos/drqv2.py --env-id walker_wak --device cpu"),
        ],
    ),
    (
        "A number outside its meaning",
        [
            ("a discount above 1", f"{DRQ} --gamma 5"),
            ("not a number", "algos/squint_sac.py --device cpu --v-min nan"),
            ("a range upside down", "algos/squint_sac.py --device cpu --v-min 3 --v-max 2"),
            ("a negative count", f"{DRQ} --batch-size -1"),
            ("no environments", "algos/ppo_mjx_go1.py --env-id Go1Stand --num-envs 0"),
            (
                "a negative rate",
                "algos/sapo_rewarped.py --env-id AntRun --device cpu --actor-lr -1",
            ),
            ("a word for a number", f"{DRQ} --seed many"),
            (
                "a division that is not whole",
                "algos/ppo_mjx_go1.py --num-envs 100 --num-minibatches 32",
            ),
            ("an image too small for its network", f"{DRQ} --image-size 7"),
        ],
    ),
    (
        "A flag",
        [
            ("a misspelt flag", f"{DRQ} --batchsize 3"),
            ("no CUDA here", "algos/drqv2.py --env-id dot_reach --device cuda"),
            ("--evaluate alone", f"{DRQ} --evaluate"),
            ("no demonstrations", "algos/bc_chunk.py --device cpu"),
            ("no teacher", "algos/distill_go1.py"),
            (
                "--track without Weights & Biases or a key",
                f"{DRQ} {TINY} --track --name tracked",
            ),
        ],
    ),
    (
        "What cannot be written",
        [
            ("a name that leaves runs/", f"{DRQ} {TINY} --name ../elsewhere"),
            ("a name that is too long", f"{DRQ} {TINY} --name " + "x" * 300),
            ("a name that is taken", f"{DRQ} {TINY} --name taken"),
        ],
    ),
    (
        "A checkpoint",
        [
            ("none", f"{EVALUATE} FILES/nothing.pt"),
            ("another kind of file", f"{EVALUATE} README.md"),
            ("cut short", f"{EVALUATE} FILES/short.pt"),
            (
                "of another algorithm",
                "algos/squint_sac.py --device cpu --evaluate --checkpoint FILES/good.pt",
            ),
            ("edited: an argument that there is not", f"{EVALUATE} FILES/argument.pt"),
            ("edited: a size that its weights have not", f"{EVALUATE} FILES/size.pt"),
            ("edited: without its weights", f"{EVALUATE} FILES/weightless.pt"),
            ("weights that are NaN", f"{EVALUATE} FILES/nan.pt"),
            ("a pickle that runs code", f"{EVALUATE} FILES/pickle.pt"),
            ("a run that is none", f"{DRQ} --resume FILES/nothing"),
            ("an argument changed on resume", "algos/drqv2.py --resume runs/taken --gamma 0.5"),
            ("the walk's, NaN", "algos/ppo_mjx_go1.py --evaluate --checkpoint FILES/nan.npz"),
            ("the walk's, another file", "algos/ppo_mjx_go1.py --evaluate --checkpoint README.md"),
        ],
    ),
    (
        "On the way to a robot",
        [
            ("a policy that there is not", "-m hardware.emulate --checkpoint FILES/nothing.pt"),
            (
                "an export of another kind of file",
                "-m hardware.export --checkpoint README.md --out FILES/out",
            ),
            (
                "the walk's export of another kind of file",
                "-m hardware.export_go1 --policy README.md --out FILES/out",
            ),
        ],
    ),
    (
        "Results",
        [
            ("a torn CSV", "scripts/plot_results.py --root FILES/torn"),
            (
                "a matrix entry with a misspelt key",
                "benchmarks/reproduce.py --root FILES --list",
            ),
        ],
    ),
]

HEAD = """# What is said when something is wrong

`python scripts/bad_inputs.py --write` runs every command and writes this page; it fails where one ends in a traceback,
or as if nothing were wrong. Each ends with status 1 or 2 and one line. A full disk, a file in the place of `runs/`, and
Weights & Biases without a key are tried in `tests/test_bad_input.py`, for every file of `algos/`. What an arm's parts
can do wrong stands in [hardware](hardware.md).

"""


class Evil:
    def __reduce__(self):
        return print, ("code of the file has run",)


def prepare(files: Path):
    """Files that are wrong, made from a run of a few seconds."""
    runs(f"{DRQ} {TINY} --name taken", files)
    good = torch.load(files / "runs/taken/best.pt", weights_only=True)
    torch.save(good, files / "good.pt")
    (files / "short.pt").write_bytes((files / "good.pt").read_bytes()[:20_000])
    torch.save(good | {"args": good["args"] | {"colour": 3}}, files / "argument.pt")
    torch.save(good | {"args": good["args"] | {"hidden": 300}}, files / "size.pt")
    torch.save(
        {key: value for key, value in good.items() if key != "agent"}, files / "weightless.pt"
    )
    for value in good["agent"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    torch.save(good, files / "nan.pt")
    torch.save({"algo": "drqv2", "x": Evil()}, files / "pickle.pt")
    torn = files / "torn/docs/results/drqv2"
    torn.mkdir(parents=True)
    (torn / "T__cpu2__s1.csv").write_text(
        "global_step,wall_time,train_time,eval/return\n100,2.0,1.0,3.5\n200,3."
    )
    (files / "benchmarks").mkdir()
    (files / "benchmarks/matrix.toml").write_text(
        '[[cell]]\nalgo = "drqv2"\ntask = "T"\nseed = [1]\n'
    )
    meta = json.dumps(
        dict(algo="ppo_mjx_go1", args={}, shapes={}, spec={}, progress={}, csv_sizes={})
    )
    np.savez(
        files / "nan.npz",
        meta=np.array(meta),
        **{"params/actor/layers/0/kernel": np.full((3, 3), np.nan)},
    )


def runs(command: str, files: Path) -> tuple[int, str, bool]:
    """-> exit status, last line of what was said, whether a traceback was in it."""
    script, *words = command.replace("FILES", str(files)).split()
    if words and "README.md" in words:
        words[words.index("README.md")] = str(ROOT / "README.md")
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", WANDB_API_KEY="", COLUMNS="100"
    )
    program = script if script == "-m" else str(ROOT / script)
    command = [sys.executable, program, *words]
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(command, cwd=files, env=environment, **pipes)
    said = [line.strip(" │╭╮╰╯─") for line in (done.stdout + done.stderr).splitlines()]
    said = [line for line in said if line and not line.startswith(("For full helptext", "usage:"))]
    # tyro explains a flag below what it says is wrong with it
    wrong = [line for line in said if line.startswith(("Unrecognized", "Error parsing"))]
    return done.returncode, [*wrong, *said[-1:], ""][0], "Traceback" in done.stderr


def table(files: Path) -> tuple[str, int]:
    """-> the page's text, how many commands ended in a traceback or as if nothing were wrong."""
    bad, parts = 0, []
    for kind, cases in CASES:
        lines = [f"## {kind}", "", "| what is wrong | command | what is said |", "|---|---|---|"]
        for what, command in cases:
            code, said, trace = runs(command, files)
            wrong = trace or code == 0
            bad += wrong
            said = said.replace(str(files), "FILES").replace(str(ROOT), ".").replace("|", "\\|")
            shown = command.replace("x" * 300, "xxx…").replace(f" {TINY}", "")
            lines.append(f"| {what} | `{shown}` | {'**traceback** ' if wrong else ''}{said} |")
            print(lines[-1], flush=True)
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n", bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/bad_input.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        prepare(files)
        text, bad = table(files)
    if arguments.write:
        (ROOT / "docs/bad_input.md").write_text(HEAD + text)
    print(f"{bad} ended in a traceback, or as if nothing were wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
