"""Where environments on the CPU live: stepped in turn in one process, or shared out over several."""

import multiprocessing
import os
import signal
import traceback
from typing import Any

import numpy as np
import torch

from envs.maniskill.simulation import Batch
from envs.maniskill.trees import stack


class CpuBatches:
    """Several one-environment batches stepped in turn, with stacked NumPy arrays in and out."""

    def __init__(self, options: dict, num_envs: int):
        self.batches = [Batch(options, 1) for _ in range(num_envs)]

    def describe(self) -> dict:
        return self.batches[0].describe()

    def reset(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        return stack([batch.reset(seeds[i : i + 1]) for i, batch in enumerate(self.batches)])

    def step(
        self, actions: "torch.Tensor | np.ndarray", ends: np.ndarray, seeds: np.ndarray
    ) -> dict:
        """As `Batch.step`, in numpy."""
        actions = actions.cpu() if isinstance(actions, torch.Tensor) else torch.from_numpy(actions)
        rows = [slice(i, i + 1) for i in range(len(self.batches))]
        outs = [
            b.step(actions[r], ends[r], seeds[r]) for b, r in zip(self.batches, rows, strict=True)
        ]
        final_obs = None
        if any(out["final_obs"] is not None for out in outs):
            final_obs = stack(
                [out["obs"] if out["final_obs"] is None else out["final_obs"] for out in outs]
            )
        return dict(
            obs=stack([out["obs"] for out in outs]),
            final_obs=final_obs,
            rewards=np.concatenate([out["rewards"].numpy() for out in outs]),
            success=np.concatenate([out["success"].numpy() for out in outs]),
            bad=np.concatenate([out["bad"] for out in outs]),
        )

    def set_clock(self, clock: np.ndarray) -> None:
        for i, batch in enumerate(self.batches):
            batch.set_clock(clock[i : i + 1])

    def render(self, numbers: np.ndarray, camera: str) -> np.ndarray:
        return np.concatenate(
            [self.batches[i].render(np.zeros(1, np.int64), camera) for i in numbers]
        )

    def get_state(self) -> list[dict]:
        return [batch.get_state() for batch in self.batches]

    def set_state(
        self, states: list[dict], seeds: np.ndarray, clock: np.ndarray
    ) -> dict[str, np.ndarray]:
        return stack(
            [
                b.set_state(states[i], seeds[i : i + 1], clock[i : i + 1])
                for i, b in enumerate(self.batches)
            ]
        )

    def close(self) -> None:
        for batch in self.batches:
            batch.close()


class Workers:
    """`CpuBatches` in several processes, each with a block of the environments; every call is answered by all of them.

    Processes are spawned: a forked child would inherit the parent's Vulkan and torch threads in an unusable state.
    """

    def __init__(self, options: dict, num_envs: int, num_workers: int):
        context = multiprocessing.get_context("spawn")
        self.blocks = [
            slice(int(b[0]), int(b[-1]) + 1)
            for b in np.array_split(np.arange(num_envs), num_workers)
        ]
        self.num_envs = num_envs
        self.pipes, self.processes = [], []
        for block in self.blocks:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, options, block.stop - block.start), daemon=True
            )
            process.start()
            theirs.close()  # so that a dead worker reads as the end of its pipe
            self.pipes.append(ours)
            self.processes.append(process)
        try:
            for worker in range(num_workers):
                self._receive(worker)
        except BaseException:
            self.close()
            raise

    def _receive(self, worker: int) -> Any:
        try:
            problem, value = self.pipes[worker].recv()
        except (EOFError, ConnectionError):
            process = self.processes[worker]
            process.join(timeout=5)
            raise RuntimeError(
                f"ManiSkill worker {worker} of {len(self.pipes)} died (exit code {process.exitcode}); "
                "with -9 the machine ran out of memory: use fewer environments or workers"
            ) from None
        if problem is None:
            return value
        kind, message, details = problem
        known = {"ImportError": ImportError, "ValueError": ValueError}
        error = known.get(kind, RuntimeError)(
            message if kind in (*known, "RuntimeError") else f"{kind}: {message}"
        )
        error.add_note(f"in ManiSkill worker {worker}:\n{details}")
        raise error

    def _call(self, method: str, *arguments: list) -> list:
        """Sends `method` to every worker, with its entry of each list in `arguments`, and collects the answers."""
        for worker, pipe in enumerate(self.pipes):
            try:
                pipe.send((method, [a[worker] for a in arguments]))
            except (BrokenPipeError, ConnectionError):
                self._receive(worker)
                raise
        return [self._receive(worker) for worker in range(len(self.pipes))]

    def _split(self, array: Any) -> list:
        return [array[block] for block in self.blocks]

    def describe(self) -> dict:
        self.pipes[0].send(("describe", []))
        return self._receive(0)

    def reset(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        return stack(self._call("reset", self._split(seeds)))

    def step(self, actions: torch.Tensor, ends: np.ndarray, seeds: np.ndarray) -> dict:
        actions = actions.cpu().numpy()
        outs = self._call("step", self._split(actions), self._split(ends), self._split(seeds))
        final_obs = None
        if any(out["final_obs"] is not None for out in outs):
            final_obs = stack(
                [out["obs"] if out["final_obs"] is None else out["final_obs"] for out in outs]
            )
        joined = {
            key: np.concatenate([out[key] for out in outs]) for key in ("rewards", "success", "bad")
        }
        return dict(obs=stack([out["obs"] for out in outs]), final_obs=final_obs, **joined)

    def set_clock(self, clock: np.ndarray) -> None:
        self._call("set_clock", self._split(clock))

    def render(self, numbers: np.ndarray, camera: str) -> np.ndarray:
        images = []
        for number in np.arange(self.num_envs)[numbers]:
            worker = next(
                w for w, block in enumerate(self.blocks) if block.start <= number < block.stop
            )
            self.pipes[worker].send(
                ("render", [np.array([number - self.blocks[worker].start]), camera])
            )
            images.append(self._receive(worker))
        return np.concatenate(images)

    def get_state(self) -> list[dict]:
        return [state for states in self._call("get_state") for state in states]

    def set_state(
        self, states: list[dict], seeds: np.ndarray, clock: np.ndarray
    ) -> dict[str, np.ndarray]:
        return stack(
            self._call("set_state", self._split(states), self._split(seeds), self._split(clock))
        )

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                pipe.send(("close", []))
            except (BrokenPipeError, ConnectionError):
                continue  # that worker is gone already
            finally:
                process.join(timeout=10)
                if process.is_alive():
                    process.terminate()
                    process.join()
                pipe.close()
        self.pipes, self.processes = [], []


def _serve(pipe: Any, options: dict, num_envs: int) -> None:
    """A worker process: builds its environments, then answers `(method, arguments)` until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(1)
    os.environ.setdefault(
        "LP_NUM_THREADS", "1"
    )  # one drawing thread a worker: the workers are the parallelism
    batches, method = None, None
    while method != "close":
        try:
            if batches is None:
                method, answer = "build", None
                batches = CpuBatches(options, num_envs)
            else:
                method, arguments = pipe.recv()
                answer = getattr(batches, method)(*arguments)
            pipe.send((None, answer))
        except (EOFError, ConnectionError):
            return  # the parent is gone
        except Exception as error:
            pipe.send(((type(error).__name__, str(error), traceback.format_exc()), None))
            if batches is None:
                return
