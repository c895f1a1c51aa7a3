"""Cut a checkpoint of squint_sac.py or sapo_rewarped.py down to what acts: a policy to take away.

    python scripts/slim_policy.py runs/NAME/checkpoint.pt policies/TASK.pt

It evaluates, deploys and exports like best.pt. Of Squint the critic stays behind, and with it --checkpoint to train on.
The weights of checkpoint.pt are the last ones, whose evaluation is the run's result; those of best.pt the best ones.
"""

import sys
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import sapo_rewarped  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)
import squint_sac  # noqa: E402

ACTING = {
    squint_sac: "averaged.",
    sapo_rewarped: "",
}  # how the names of the weights that stay begin


def main(checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    """Write the policy of a checkpoint.

    checkpoint: checkpoint.pt or best.pt of a run
    out: file to write
    """
    for module, prefix in ACTING.items():
        try:
            whole = module.load(checkpoint)
        except ValueError as error:
            reason = error
            continue
        slim = {key: whole[key] for key in ("algo", "args", "shapes", "spec", "progress")}
        agent = whole["agent"].items()
        slim["agent"] = {name: value.clone() for name, value in agent if name.startswith(prefix)}
        torch.save(slim, out)
        module.Policy(out)  # it loads
        return
    sys.exit(f"error: neither squint_sac's nor sapo_rewarped's: {reason}")


if __name__ == "__main__":
    tyro.cli(main)
