"""Which renderer works here, and where physics runs: in this process, or in processes of `worker.py`."""

import functools
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from envs import check

RENDERERS = ("egl", "osmesa", "warp")
INSTALL = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}


# ------------------------------------------------------------------------------------------------ choice of renderer --
@functools.cache
def _works(renderer: str) -> check.Result:
    """Tries a renderer out in a process of its own; a driver that crashes must not take this one along."""
    return check.ask({"warp": "warp-renderer"}.get(renderer, renderer))


@functools.cache
def choose_renderer(wish: str = "auto", set_by_user: str | None = None, cuda: bool = False) -> str:
    """The renderer that `wish` and the variable MUJOCO_GL (`set_by_user`) lead to; OpenGL is tried out before.

    With `cuda`, a driver that draws by software gets a remark: nothing falls from the GPU to the CPU unsaid.

    Raises ValueError for an unknown one, RuntimeError, with what to install, for one that does not work here.
    """
    if wish not in ("auto", *RENDERERS):
        raise ValueError(f"unknown renderer {wish!r}; there are {', '.join(RENDERERS)} and auto")
    if wish == "warp":  # which says itself what it lacks
        return wish
    if wish == "auto" and set_by_user in RENDERERS:
        wish = set_by_user
    tried = []
    for renderer in RENDERERS if wish == "auto" else (wish,):
        result = _works(renderer)
        if result.works:
            soft = cuda and ("llvmpipe" in result.detail or renderer == "osmesa")
            remarks = [f"; not {line}" for line in tried]
            if soft:
                remarks.append("; this is software, renderer 'warp' would draw on the GPU")
            if wish == "auto" or soft:
                print(f"renderer: {renderer} ({result.detail}){''.join(remarks)}")
            return renderer
        tried.append(f"{renderer}: {result.detail}")
    install = f"sudo apt-get install {INSTALL.get(wish, INSTALL['egl'])}"
    raise RuntimeError(f"no image can be drawn here ({'; '.join(tried)}): {install}, or use warp")


# --------------------------------------------------------------------------------------------- where physics runs ----
class Here:
    """A `Group` of worker.py in this process, asked as `Process` is; a GPU computes while it answers."""

    def __init__(self, *opening):
        from envs.dmc import worker

        self.group = worker.Group(*opening)

    def ask(self, name: str, *arguments) -> None:
        self.question = functools.partial(getattr(self.group, name), *arguments)

    def receive(self):
        return self.question()

    def close(self) -> None:
        self.group = None


class Process:
    """A `Group` of worker.py in a process of its own, which needs neither torch nor this program's main module."""

    def __init__(self, env_id: str, numbers: list[int], options: dict):
        self.name = f"the process of {env_id} number {', '.join(map(str, numbers))}"
        ours, theirs = socket.socketpair()
        backend = gl_backend(options["renderer"])
        # One thread each: the processes themselves are the parallelism.
        environment = {
            "OMP_NUM_THREADS": "1",
            "LP_NUM_THREADS": "1",
            **os.environ,
            "MUJOCO_GL": backend,
        }
        environment["PYOPENGL_PLATFORM"] = backend if backend in INSTALL else ""
        # By its path: as a module, its package and torch would be imported first. -P: without the folder on sys.path.
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, "-P", str(worker), str(theirs.fileno())]
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # (a session of its own: Ctrl-C is for us, who end it by closing the pipe)
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.ask("open", env_id, numbers, options)

    def ask(self, name: str, *arguments) -> None:
        try:
            self.pipe.send((name, arguments))
        except OSError:
            self._died()

    def receive(self):
        """Raises ChildProcessError where the process has died, and what it raised otherwise, in one line."""
        try:
            fine, *answer = self.pipe.recv()
        except (EOFError, OSError):
            self._died()
        if not fine:
            kind, line = answer
            raise {"ValueError": ValueError, "ImportError": ImportError}.get(kind, RuntimeError)(
                line
                if kind in ("ValueError", "ImportError", "RuntimeError")
                else f"{self.name}: {kind}: {line}"
            )
        return answer[0]

    def _died(self):
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        hint = "; out of memory? use fewer --num-envs" if status == -signal.SIGKILL else ""
        raise ChildProcessError(
            f"{self.name} has ended ({how}){hint}; what it said last stands above"
        ) from None

    def close(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def gl_backend(renderer: str) -> str:
    """Value of MUJOCO_GL for a renderer."""
    return "disabled" if renderer == "warp" else renderer
