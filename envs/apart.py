"""A worker that acts in a process of its own: its steps come from there through a bounded queue, orders go there.

    apart = Apart(open_worker, arguments, Path("journal.pkl"), record=True, size=64, news=weights)
    apart.collect(wait=True, scale=0.5)      # -> steps in apart.left, for the owner to take out

`open_worker(*arguments)` is called in that process; both must be picklable. The worker that it returns has
    now                        what the owner needs before the first step
    step(**order) -> dict      done again and again by the latest order, until the queue is full or the owner is gone
    state_dict() -> dict       told when asked for
An error there, or the death of the process, is raised here as a ChildProcessError of one line. With `record`, steps
that arrive are also written to a file until `forget`, so that an owner that was killed finds them again in `left`.
Everything travels as bytes: tensors by themselves would be shared memory, which goes with the process that made it.
"""

import contextlib
import multiprocessing
import pickle
import queue as queues
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

PERIOD = 0.5  # seconds between orders


def _work(open_worker: Callable, arguments: tuple, orders, results) -> None:
    """The worker's process."""
    parent = multiprocessing.parent_process()

    def put(**message) -> None:
        while parent.is_alive():  # waits where the queue is full
            with contextlib.suppress(queues.Full):
                return results.put(pickle.dumps(message), timeout=1.0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's, which keeps what is there
    try:
        worker = open_worker(*arguments)
        put(first=worker.now)
        order, news = {}, {}
        while parent.is_alive():
            while not orders.empty():
                word = pickle.loads(orders.get())
                if word is None:
                    put(state=worker.state_dict())
                else:
                    order, news = word
            put(step=worker.step(**order, **news))
            news = {}
    except Exception:  # whatever it is: the owner stops with it
        put(error=traceback.format_exc().strip().splitlines()[-1])


class Apart:
    """The owner's side. `left` holds the steps that have arrived and were not taken out yet, the oldest first.

    Args:
        journal: the file for steps that arrive. What an earlier owner wrote there is in `left` at first.
        record: whether to write to it.
        size: steps that may wait in the queue; the worker waits where it is full.
        news: called when an order goes, at most twice a second: what the worker is told once with it, such as weights.
    """

    def __init__(
        self, open_worker: Callable, arguments: tuple, journal: Path, record: bool, size: int,
        news: Callable[[], dict],
    ):  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.orders, self.results = context.Queue(), context.Queue(size)
        self.news, self.journal, self.record, self.sent, self.left = news, journal, record, 0.0, []
        self.process = context.Process(
            target=_work, args=(open_worker, arguments, self.orders, self.results), daemon=True
        )
        self.process.start()
        self.now = self._next()["first"]
        if journal.exists():
            with journal.open("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
                while True:  # the last one may have been cut off
                    self.left.append(pickle.load(file))

    def _next(self) -> dict:
        """What comes next from the process; a step is written down first."""
        while True:
            try:
                message = self.results.get(timeout=0.5)
                break
            except queues.Empty:
                if not self.process.is_alive():
                    raise ChildProcessError(f"the actor's process died, status {self.process.exitcode}") from None
        found = pickle.loads(message)
        if "error" in found:
            raise ChildProcessError(f"the actor's process failed: {found['error']}")
        if "step" in found:
            self.left.append(found["step"])
            if self.record:
                with self.journal.open("ab") as file:
                    pickle.dump(found["step"], file)
        return found

    def collect(self, wait: bool, **order) -> None:
        """Puts the steps that have arrived, sixteen at most, into `left`; with `wait` at least one."""
        if time.monotonic() - self.sent > PERIOD:
            self.orders.put(pickle.dumps((order, self.news())))
            self.sent = time.monotonic()
        while wait and not self.left or len(self.left) < 16 and not self.results.empty():
            self._next()

    def state_dict(self) -> dict:
        """The worker's state; the steps before it are put into `left`."""
        self.orders.put(pickle.dumps(None))
        while "state" not in (found := self._next()):
            pass
        return found["state"]

    def drain(self) -> None:
        """Puts what still waits in the queue into `left`, where the process is to stop or has died."""
        with contextlib.suppress(ChildProcessError):
            while not self.results.empty():
                self._next()

    def forget(self) -> None:
        """The steps so far are kept elsewhere: empties the journal."""
        self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        self.process.terminate()
