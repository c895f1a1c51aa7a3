"""How many operations a second the driver of the servos' bus does, against emulated servos behind a pseudo-terminal.

    python benchmarks/bus.py
    python benchmarks/bus.py --out docs/results/throughput/bus__cpu2.csv

Rows, the first of which is the baseline of the ratios:
    driver and emulator     both processes as fast as they go; the emulated line takes no time
    with the line's time    ten bits a byte at 1 Mbit/s and no return delay, as a real bus would need at least
    the line alone          what arithmetic says of that: an upper bound that no driver can exceed
    emulator in process     virtual time: operations a second of computing time, which is what the tests cost

A cycle is what the arm does every tick: 31 bytes of each servo read at once, 7 bytes written to each. A row is the
median of --blocks blocks, with the slowest and the fastest beside it. No servo was involved: a USB adapter adds a delay
of its own, about which these numbers say nothing.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hardware.emulator import EmulatedBus, EmulatedTransport, PtyServer, VirtualClock
from hardware.feetech import REGISTERS, Bus, SerialTransport, encode

IDS = range(1, 7)
RETURN_DELAY = REGISTERS["return_delay"][0]
COLUMNS = ("what", "operation", "per_second", "range", "ratio", "lost")
GOALS = {
    id: b"\xfe" + encode("goal_position", 2048) + b"\0\0" + encode("goal_speed", 978) for id in IDS
}


def operations(bus: Bus) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (what one operation does, bytes that it takes on the line)."""

    def cycle():
        answers = bus.sync_read(IDS, 40, 31)
        bus.sync_write(41, GOALS)
        return answers

    def sync_write():
        bus.sync_write(41, GOALS)
        bus.read(1, 55, 1)  # a sync write is not answered: without this only the queue would grow

    return {
        "cycle: read 31 bytes x 6, write 7 x 6": (cycle, 14 + 6 * 37 + 8 + 6 * 8),
        "sync read, 15 bytes x 6": (lambda: bus.sync_read(IDS, 56, 15), 14 + 6 * 21),
        "sync read, 2 bytes x 6": (lambda: bus.sync_read(IDS, 56, 2), 14 + 6 * 8),
        "sync write, 7 bytes x 6, read 1 byte": (sync_write, 8 + 6 * 8 + 8 + 7),
        "read, 15 bytes": (lambda: bus.read(1, 56, 15), 8 + 21),
        "write, 2 bytes": (lambda: bus.write(1, 44, b"\0\0"), 9 + 6),
    }


def speeds(work: Callable[[], object], seconds: float, blocks: int) -> tuple[list[float], int]:
    """Operations per second of each block, and how many sync reads lacked a servo."""
    values, lost = [], 0
    for _ in range(blocks):
        begin, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds / blocks:
            answer = work()
            lost += isinstance(answer, dict) and len(answer) < len(IDS)
            count += 1
        values.append(count / passed)
    return values, lost


class Table:
    """Rows as they come: printed at once, written to the file after each."""

    def __init__(self, out: Path | None):
        self.out, self.rows, self.baseline = out, [], None
        print(f"{'what':<24}{'operation':<40}{'per second':>11}{'ratio':>8}{'lost':>6}")

    def add(
        self, what: str, operation: str, values: list[float] | None = None, lost: int | str = ""
    ) -> None:
        row = dict.fromkeys(COLUMNS, "") | dict(what=what, operation=operation, lost=lost)
        if values:
            median = statistics.median(values)
            self.baseline = self.baseline or median
            spread = f"{min(values):,.4g} to {max(values):,.4g}" if len(values) > 1 else ""
            row |= dict(
                per_second=f"{median:.4g}", ratio=f"{median / self.baseline:.3g}", range=spread
            )
        self.rows.append(row)
        print(
            f"{what:<24}{operation:<40}{row['per_second']:>11}{row['ratio']:>8}{lost!s:>6}",
            flush=True,
        )
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="time measured for a row (%(default)s)"
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=5,
        help="parts that a row's time is divided into (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    if args.seconds <= 0 or args.blocks < 1:
        sys.exit("--seconds must be above 0, --blocks at least 1")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    table = Table(args.out)
    options = "".join(f" --{name} {value}" for name, value in vars(args).items()
                      if name != "out" and value != parser.get_default(name))  # fmt: skip
    table.add("machine", f"{platform.machine()}, {cores} cores, Python {platform.python_version()}")
    table.add("command", f"python benchmarks/bus.py{options}")
    for what, wire_time in (("driver and emulator", False), ("with the line's time", True)):
        with PtyServer(wire_time=wire_time) as server:
            transport = SerialTransport(server.port)
            bus = Bus(transport, timeout=0.5)
            for id in IDS:
                bus.write(id, RETURN_DELAY, b"\0")
            for name, (work, _) in operations(bus).items():
                work()
                table.add(what, name, *speeds(work, args.seconds, args.blocks))
            transport.close()
    for name, (_, size) in operations(None).items():
        table.add("the line alone", name, [1e6 / 10 / size])
    clock = VirtualClock()
    servos = EmulatedBus(IDS, clock, wire_time=False)
    bus = Bus(EmulatedTransport(servos, clock), clock)
    for name, (work, _) in operations(bus).items():
        table.add("emulator in process", name, *speeds(work, args.seconds, args.blocks))

    def tick() -> dict:
        clock.sleep(0.1)
        return operations(bus)["cycle: read 31 bytes x 6, write 7 x 6"][0]()

    for servo in servos.servos.values():
        servo.load = 0.2  # nothing is at rest
    table.add(
        "emulator in process",
        "cycle and 0.1 s of six loaded motors",
        *speeds(tick, args.seconds, args.blocks),
    )


if __name__ == "__main__":
    main()
