"""ResFiT with actor and learner apart: the environments step in a process of their own, and wait for no update.

    python scripts/resfit_async.py --env-id SO101ReachCube-v1 --demos reach.hdf5 --base runs/base/base.pt2

All arguments are those of algos/resfit.py, which it runs with another collector. The process acts by the learner's
weights, which lie in shared memory, and runs ahead as far as its steps fit in a pipe; where that is full, it waits. The
learner makes the updates that are owed and takes the next step. If the process ends, its error is printed, and the run
saves what there is, as after Ctrl-C. Resume such a run by this script too: it begins new episodes, and the guard's
account begins at 0. It is not deterministic.
"""

import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import resfit as rf  # noqa: E402  (a file to run, not a package: the line above lets this script import it)


class Elsewhere:
    """In place of the training environment, which the process has; a base that asks sees the one of evaluation."""

    nan_resets = 0
    process = None

    def __init__(self, eval_env):
        self.eval_env = eval_env

    def __getattr__(self, name):
        return getattr(self.eval_env, name)

    def close(self):
        if self.process:
            self.process.terminate()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


class Apart:
    """In place of the collector: its steps come from the process, which begins with the first."""

    def __init__(self, make, args: rf.Args, env: Elsewhere, base, agent: rf.Agent, progress: dict):
        self.make, self.args, self.env = make, args, env
        self.agent, self.progress = agent, progress
        self.following = None

    def step(self) -> dict:
        if self.following is None:
            self.start()
            self.following = self.receive()
            rf.need(self.following, "the process that acts has ended: its error stands above")
        taken, self.following = self.following, self.receive()
        if self.following is None:  # it has ended: `taken` is the last, and the run saves
            signal.raise_signal(signal.SIGINT)
        return taken

    def start(self):
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, sender = context.Pipe(duplex=False)
        inputs = (self.make, self.args, self.agent.share_memory(), dict(self.progress), sender)
        self.env.process = context.Process(target=act, args=inputs, daemon=True)
        with patch.object(rf, "make_envs", self.make):  # a function travels by its name
            self.env.process.start()
        sender.close()  # so that the pipe ends with the process

    def receive(self) -> dict | None:
        """The next step, None if there will be none."""
        try:
            arrays = self.pipe.recv()
        except EOFError:
            return None
        return {key: torch.from_numpy(value).to(self.args.device) for key, value in arrays.items()}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass


class Replay(rf.Replay):
    """On a resumed run the actor begins new episodes, so the last step ends the old ones."""

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        if self.head:
            self.data["discounts"][(self.head - 1) % self.slots] = 0


def act(make, args: rf.Args, agent: rf.Agent, progress: dict, sender):
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's
    torch.set_num_threads(1)
    env, eval_env = make(args)
    eval_env.close()
    collector = rf.Collector(args, env, rf.open_base(args, env), agent, progress)
    while True:
        taken = collector.step()
        progress["global_step"] += args.num_envs
        sender.send({key: value.cpu().numpy() for key, value in taken.items()})


def train(args: rf.Args) -> dict:
    """resfit.train, with the actor apart."""
    make = rf.make_envs

    def make_evaluation(args: rf.Args) -> tuple:
        _, eval_env = make(replace(args, evaluate=True))
        return Elsewhere(eval_env), eval_env

    parts = dict(make_envs=make_evaluation, Collector=partial(Apart, make), Replay=Replay)
    with patch.multiple(rf, **parts):
        return rf.train(args)


if __name__ == "__main__":
    try:
        train(rf.parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
