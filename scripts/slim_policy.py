"""Cut a checkpoint of squint_sac.py down to what acts: a policy to take away, of half a megabyte.

    python scripts/slim_policy.py runs/NAME/checkpoint.pt policies/TASK.pt

It evaluates, deploys and exports like best.pt. The critic, and with it --checkpoint to train on, stays behind. Of
checkpoint.pt the weights are the last ones, whose evaluation is the run's result; of best.pt they are the best ones.
"""

import sys
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import squint_sac  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)


def main(checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    """Write the policy of a checkpoint.

    checkpoint: checkpoint.pt or best.pt of a run
    out: file to write
    """
    whole = squint_sac.load(checkpoint)
    slim = {key: whole[key] for key in ("algo", "args", "shapes", "spec", "progress")}
    slim["agent"] = {
        name: value.clone()
        for name, value in whole["agent"].items()
        if name.startswith("averaged.")
    }
    torch.save(slim, out)
    squint_sac.Policy(out)  # it loads


if __name__ == "__main__":
    tyro.cli(main)
