"""An "algorithm" for tests of benchmarks/reproduce.py: a random walk with checkpoints, exact resume and Ctrl-C.

It keeps the machinery of algos/: --seed, --name, --resume, runs/<name>/{args.json, eval.csv, checkpoint.pt}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np


def main(words):
    options = dict(zip(words[::2], words[1::2], strict=True))
    run = Path(options.get("--resume") or Path("runs") / options["--name"])
    saved = run / "checkpoint.pt"
    if "--resume" in options:
        state = json.loads(saved.read_text())
        (run / "eval.csv").write_text(state["rows"])
    else:
        seed, total = int(options["--seed"]), int(options["--steps"])
        state = dict(step=0, seed=seed, total=total, value=0.0, rows="", fail=options.get("--fail"))
        state["rows"] = "global_step,wall_time,train_time,eval/return\n"
        run.mkdir(parents=True, exist_ok=True)
    settings = {"total_timesteps": state["total"], "command": " ".join(words)}
    (run / "args.json").write_text(json.dumps(settings))
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))

    def save():
        saved.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(saved.with_suffix(".tmp"), saved)

    save()
    while state["step"] < state["total"] and not asked:
        if state["fail"] == str(state["step"]):
            print("error: qf is not finite at step 3", file=sys.stderr)
            return 1
        random = np.random.default_rng([state["seed"], state["step"]])
        state["value"] += random.normal()
        state["step"] += 1
        row = f"{state['step']},{state['step']}.0,0.0,{state['value']!r}\n"
        with (run / "eval.csv").open("a") as file:
            file.write(state["rows"] + row if file.tell() == 0 else row)
        state["rows"] = (run / "eval.csv").read_text()
        if (
            state["step"] % 3 == 0 or asked
        ):  # as after a real evaluation; rows between are forgotten on resume
            save()
        time.sleep(float(os.environ.get("TOY_PAUSE", "0.02")))
    if asked:
        save()
        return 1
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
