"""Where environments live: in this process, or shared out over several."""

import multiprocessing
import os
import signal
from typing import Any

from envs.robosuite.simulation import World


class Worlds:
    """Some worlds in this process. Arguments and answers are lists, one entry a world."""

    def __init__(self, openings: list[tuple]):
        self.worlds = []
        try:
            for opening in openings:
                self.worlds.append(World(*opening))
        except BaseException:
            self.close()
            raise

    def facts(self) -> dict:
        return self.worlds[0].facts

    def call(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        return {i: getattr(self.worlds[i], method)(*args) for i, args in arguments.items()}

    def close(self) -> None:
        for world in self.worlds:
            world.close()


def _serve(pipe, openings: list[tuple]) -> None:
    """The loop of a process: questions are (method, arguments), answers (True, value) or (False, kind, line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    worlds = None
    while True:
        try:
            method, arguments = ("open", None) if worlds is None else pipe.recv()
        except EOFError:
            break
        try:
            if method == "open":
                worlds = Worlds(openings)
            pipe.send((True, worlds.facts() if method == "open" else worlds.call(method, arguments)))
        except Exception as error:
            pipe.send((False, type(error).__name__, next(iter(str(error).splitlines()), "")))
            if worlds is None:
                break
    os._exit(0)  # a driver may crash while the interpreter shuts down; all answers have been given


class Process:
    """`Worlds` in a process of its own."""

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
            raise {"ValueError": ValueError, "ImportError": ImportError}.get(kind, RuntimeError)(line or kind)
        return answer[0]

    def _died(self):
        self.process.join(5)
        status = self.process.exitcode
        hint = "; out of memory? use fewer --num-envs" if status == -signal.SIGKILL else ""
        raise RuntimeError(f"a process of robosuite worlds has ended with status {status}{hint}") from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
