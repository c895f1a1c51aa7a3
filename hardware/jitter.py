"""How evenly the control loop ticks beside a busy core: the deployer's own loop, in real time.

    python -m hardware.jitter
    python -m hardware.jitter --out docs/results/hardware/jitter/loop__cpu2.csv

The arm is emulated servos in the same process, with the line's time; computing them costs the loop about 3 % of a core,
which a real arm does not. The policy is a network of NumPy that takes about a millisecond, and everything is recorded.
A row: the rate, how many processes keep a core busy meanwhile, and of the time from one tick to the next how far it is
from the period: half of the ticks, 95 % and 99 % of them, and the worst, in milliseconds; ticks that were left out
because they came too late; reads that lacked a servo.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

from hardware import deployment, emulate, faults, so101
from hardware.camera import ArraySource, Camera
from hardware.emulator import EmulatedBus, EmulatedTransport, RealClock
from hardware.feetech import Bus
from hardware.recording import Recorder
from hardware.so101 import SO101, Calibration, arm_limits

COLUMNS = (
    "hz",
    "busy",
    "ticks",
    "median_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "left_out",
    "incomplete_reads",
)


def burn() -> None:
    """Keeps a core busy."""
    while True:
        sum(range(10_000))


class Network(faults.Policy):
    """Swings the joints, and multiplies matrices for about a millisecond."""

    weights = np.random.default_rng(0).standard_normal((512, 512), np.float32)

    def act(self, obs: dict) -> np.ndarray:
        x = np.resize(obs["rgb"].astype(np.float32), (8, 512))
        for _ in range(4):
            x = np.tanh(x @ self.weights / 512)
        return super().act(obs)


def measure(hz: float, seconds: float, folder: Path) -> dict:
    """One row, but for the number of busy processes."""
    spec = faults.SPEC | dict(control_hz=hz, action_scale=[1.0 / hz] * 5 + [2.0 / hz])
    calibration = Calibration.from_dict(emulate.recorded_calibration(spec))
    policy, limits, times = Network(spec), arm_limits(spec), []
    clock = RealClock()
    servos = EmulatedBus(range(1, 7), clock)
    emulate.calibrate(servos, emulate.recorded_calibration(spec))
    emulate.place(servos, spec["start_pose"])
    bus = Bus(EmulatedTransport(servos, clock), clock, timeout=0.03)
    with contextlib.ExitStack() as stack:
        arm = SO101(bus, calibration, limits)
        image = faults.Rig().image
        camera = Camera(ArraySource([image]), threaded=False, name="wrist")
        recorder = Recorder(folder, {"spec": spec}, hz, live=True)
        stack.callback(lambda: recorder.close({}))

        def each(record: dict) -> None:
            times.append(record["time"])
            recorder.add(record)

        loop = deployment.Deployment(
            policy, arm, {"wrist": camera}, limits, time.monotonic, time.sleep, each_tick=each
        )
        with loop:
            loop.start()
            loop.run(round(seconds * hz))
    gaps = np.diff(times) * hz
    away = 1000 / hz * np.abs(gaps - np.maximum(1, np.rint(gaps)))
    missed = sum(missing for _, missing in arm._reads)
    row = dict(hz=f"{hz:g}", ticks=len(times), left_out=int((np.rint(gaps) - 1).clip(0).sum()))
    row |= {name: f"{np.quantile(away, share):.2f}" for name, share in (
        ("median_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99), ("max_ms", 1.0))}  # fmt: skip
    return row | dict(incomplete_reads=missed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of every row (%(default)s)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="processes beside it")
    parser.add_argument("--hz", type=float, nargs="+", default=[10.0, 30.0, 50.0])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    import tempfile

    # Late ticks and lost reads are what is measured here: they do not end it.
    deployment.LATE_TICKS = so101.MISSES = so101.UNTAKEN = 10**9
    so101.MISS_WINDOW = 10**9
    rows = []
    for busy in args.busy:
        others = [multiprocessing.Process(target=burn, daemon=True) for _ in range(busy)]
        for other in others:
            other.start()
        for hz in args.hz:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(hz, args.seconds, Path(folder) / "film") | dict(busy=busy)
            rows.append({name: row[name] for name in COLUMNS})
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        for other in others:
            other.kill()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, load average {load:.1f}", file=sys.stderr)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
