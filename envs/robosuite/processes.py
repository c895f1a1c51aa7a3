"""Where environments live: in this process, or shared out over several."""

import multiprocessing
import os
import signal
from typing import Any

from envs.robosuite.simulation import Simulation


class Group:
    """Some environments in this process. Arguments and answers are lists, one entry an environment."""

    def __init__(self, openings: list[tuple]):
        self.simulations = []
        try:
            for opening in openings:
                self.simulations.append(Simulation(*opening))
        except BaseException:
            self.close()
            raise

    def facts(self) -> dict:
        return self.simulations[0].facts

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        return {i: getattr(self.simulations[i], method)(*args) for i, args in arguments.items()}

    def close(self) -> None:
        for simulation in self.simulations:
            simulation.close()


def _serve(pipe, openings: list[tuple]) -> None:
    """The loop of a process: questions are (method, arguments), answers (True, value) or (False, kind, line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    group = None
    while True:
        try:
            method, arguments = ("open", None) if group is None else pipe.recv()
        except EOFError:
            break
        try:
            if method == "open":
                group = Group(openings)
            pipe.send((True, group.facts() if method == "open" else group.call(method, arguments)))
        except Exception as error:
            pipe.send((False, type(error).__name__, next(iter(str(error).splitlines()), "")))
            if group is None:
                break
    os._exit(0)  # a driver may crash while the interpreter shuts down; all answers have been given


class Process:
    """`Group` in a process of its own."""

    def __init__(self, openings: list[tuple]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, openings), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, arguments: dict[int, tuple]) -> None:
        try:
            self.pipe.send((method, arguments))
        except OSError:
            self._died()

    def receive(self):
        try:
            fine, *answer = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
        if not fine:
            kind, line = answer
            raise {"ValueError": ValueError, "ImportError": ImportError}.get(kind, RuntimeError)(
                line or kind
            )
        return answer[0]

    def _died(self):
        self.process.join(5)
        status = self.process.exitcode
        hint = "; out of memory? use fewer --num-envs" if status == -signal.SIGKILL else ""
        raise RuntimeError(
            f"a process of robosuite environments has ended with status {status}{hint}"
        ) from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
