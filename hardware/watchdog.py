"""A process that has the last word over the arm's motors.

Servos of this kind hold their last goal for as long as they have power; nothing in them notices that the host is gone.
So a second process shares the open port and listens. When
    the heartbeat stops for `timeout` seconds,
    the controlling program ends in whatever way (SIGKILL: its end of a pipe closes),
    a stop key is pressed (space, q, Esc), or the keyboard's input ends,
    or the watchdog itself is told to end (SIGTERM, SIGHUP)
it takes the bus for itself, and the arm holds where it is, becomes weak, and is let go. The program's own writes are
refused from then on, and torque-off is repeated until the program is gone, since a goal that was already under way
would switch torque on again. There is no way back: a new start needs a new watchdog.

The watchdog owns the keyboard; other keys come to the program by `key`. A power switch within reach is still the only
real emergency stop: no program can stop a servo that no longer listens.

    port = SerialTransport("/dev/ttyACM0")
    with Watchdog(port, keyboard=0) as dog:
        bus = Bus(dog.transport)
        dog.beat()          # from here on one is expected every `timeout` seconds: before torque goes on
        while ...:
            dog.beat()      # raises BusError(kind="stopped") with the reason
"""

import argparse
import contextlib
import fcntl
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hardware.feetech import PORT_ERRORS, REGISTERS, Bus, BusError, decode, encode

STOP_KEYS = " qQ\x1b"
BEAT, REST, RELEASE = b".", b"-", b"Q"  # what the program sends; the end of the pipe says the rest
REPEAT = 0.1  # s between torque-offs while the program is still there


# --- The ladder -------------------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """Servos whose torque reads 0, that do not answer, and that still read on; and what the port said, if it failed."""

    off: list[int]
    silent: list[int]
    on: list[int]
    port: str = ""

    def sentence(self) -> str:
        """For the operator."""
        if self.port:
            return f"{self.port} Torque-off could not be sent: switch the power off"
        text = [f"torque is off on the servos {' '.join(map(str, self.off))}"] if self.off else []
        if self.silent:
            text.append(f"no answer from {' '.join(map(str, self.silent))} (torque-off was sent)")
        if self.on:
            text.append(f"still on: {' '.join(map(str, self.on))}")
        return "; ".join(text) + (": switch the power off" if self.silent or self.on else "")


def let_go(bus: Bus, ids: Iterable[int], hold: float = 0.3, low: float = 1.0, low_torque: int = 150,
           sleep: Callable[[float], None] = time.sleep, hurry: Callable[[], bool] = lambda: False) -> Outcome:
    """Hold where the arm is, `hold` s; weak, `low` s at `low_torque` per mille; torque off, read back. Never raises.

    A step that fails does not keep the next one from being tried, and all but the first are broadcasts: they reach
    servos that are silent or have error bits. Only servos whose torque is on and that report no error are given a
    goal, since a goal switches torque on. hurry: asked during the waits; True skips to torque-off.
    """
    ids = list(ids)
    with contextlib.suppress(BusError):
        first = REGISTERS["torque_enable"][0]
        states = bus.sync_read(ids, first, REGISTERS["present_position"][0] + 2 - first)
        present = {id: encode("goal_position", decode("present_position", s.data, first)) for id, s in states.items()
                   if s.data[0] == 1 and not s.error}  # fmt: skip
        if present:
            bus.sync_write(REGISTERS["goal_position"][0], present)
        if present or len(states) < len(ids) or any(s.data[0] for s in states.values()):
            _wait(hold, sleep, hurry)
            with contextlib.suppress(BusError):
                bus.broadcast_write(REGISTERS["torque_limit"][0], encode("torque_limit", low_torque))
            _wait(low, sleep, hurry)
    return torque_off(bus, ids, sleep)


def _wait(seconds: float, sleep: Callable[[float], None], hurry: Callable[[], bool]) -> None:
    for _ in range(max(1, round(seconds / 0.05))):
        if hurry():
            return
        sleep(seconds / max(1, round(seconds / 0.05)))


def torque_off(bus: Bus, ids: Iterable[int], sleep: Callable[[float], None] = time.sleep, rounds: int = 3) -> Outcome:
    """Broadcasts torque-off and reads it back, up to `rounds` times until all servos have answered 0. Never raises."""
    ids = list(ids)
    outcome = Outcome([], ids, [])
    for _ in range(rounds):
        try:
            bus.broadcast_torque_off()
            answers = bus.sync_read(ids, *REGISTERS["torque_enable"])
        except BusError as error:
            outcome.port = f"{error}."
        else:
            on = [id for id, status in answers.items() if status.data[0]]
            outcome = Outcome([id for id in answers if id not in on], [id for id in ids if id not in answers], on)
            if not on and not outcome.silent:
                break
        sleep(0.02)
    return outcome


# --- The program's side -----------------------------------------------------------------------------------------------
class Guarded:
    """A transport that refuses once the watchdog has taken the bus."""

    def __init__(self, transport, dog: "Watchdog"):
        self.inner, self.dog = transport, dog
        self.port = getattr(transport, "port", "the port")

    def write(self, data: bytes) -> None:
        with self.dog.lock():  # the watchdog takes the bus between packets, not inside one
            self.dog.check()
            self.inner.write(data)

    def read(self, n: int, timeout: float) -> bytes:
        self.dog.check()
        return self.inner.read(n, timeout)

    def flush_input(self) -> None:
        self.dog.check()
        self.inner.flush_input()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


class Watchdog:
    """Starts the process on entering; leaving lets go of the motors and waits until it has ended.

    Leaving by an exception, or after a stop, goes down the whole ladder; leaving otherwise only makes sure that torque
    is off. `outcome` then says for which servos that was read back.
    """

    def __init__(self, transport, ids: Iterable[int] = range(1, 7), timeout: float = 0.25, keyboard: int | None = None,
                 hold: float = 0.3, low: float = 1.0, low_torque: int = 150, bus_timeout: float = 0.05):
        """transport: an open port with a file descriptor. timeout: seconds between two beats; it counts from the first
        one. keyboard: descriptor of the keys, 0 for the terminal; None: no keys. hold, low, low_torque: see `let_go`.
        bus_timeout: seconds that the watchdog waits for servos.
        """
        self.inner, self.ids, self.timeout, self.keyboard = transport, list(ids), timeout, keyboard
        self.ladder = dict(hold=hold, low=low, low_torque=low_torque)
        self.bus_timeout = bus_timeout
        self.reason: str | None = None
        self.outcome: Outcome | None = None
        self._keys: list[str] = []
        self._ready = self._dead = False
        self._text, self._terminal, self._process = b"", None, None

    def __enter__(self) -> "Watchdog":
        if not hasattr(self.inner, "fileno"):
            raise BusError("the watchdog needs a port with a file descriptor, which another process can share")
        self._shared = tempfile.TemporaryFile()
        self._shared.write(b"\0")
        self._shared.flush()
        self._flag = mmap.mmap(self._shared.fileno(), 1)
        theirs, self._beats = os.pipe()
        self._reports, report = os.pipe()
        os.set_blocking(self._beats, False)
        os.set_blocking(self._reports, False)
        if self.keyboard is not None and os.isatty(self.keyboard):
            self._terminal = termios.tcgetattr(self.keyboard)
            tty.setcbreak(self.keyboard)  # keys come one by one; Ctrl-C is still a signal
        facts = dict(port=self.inner.fileno(), beats=theirs, reports=report, shared=self._shared.fileno(),
                     keyboard=self.keyboard, ids=self.ids, timeout=self.timeout, bus_timeout=self.bus_timeout,
                     ladder=self.ladder)  # fmt: skip
        descriptors = [facts[name] for name in ("port", "beats", "reports", "shared")]
        try:
            # A session of its own: Ctrl-C and a closed terminal reach the program, not the watchdog.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hardware.watchdog", json.dumps(facts)], start_new_session=True,
                pass_fds=[*descriptors, *([self.keyboard] if self.keyboard is not None else [])],
                cwd=Path(__file__).resolve().parent.parent, stdin=subprocess.DEVNULL if self.keyboard != 0 else None,
            )  # fmt: skip
        finally:
            os.close(theirs)
            os.close(report)
        deadline = time.monotonic() + 30
        while not self._listen() and time.monotonic() < deadline:
            select.select([self._reports], [], [], 0.1)
        if not self._ready:
            self._end()
            raise BusError("the watchdog's process did not start: see its message above", kind="watchdog")
        self.transport = Guarded(self.inner, self)
        return self

    def _listen(self) -> bool:
        """Takes the watchdog's reports; True as soon as it is ready or has ended."""
        if not self._process:
            return True
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reports, 4096):
                self._text += data
            self._dead = True
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            what = json.loads(line)
            self._ready |= "ready" in what
            self.reason = self.reason or what.get("stop")
            self._keys += what.get("key", "")
            if "outcome" in what:
                self.outcome = Outcome(**what["outcome"])
        return self._ready or self._dead

    @contextlib.contextmanager
    def lock(self):
        """Held by whichever process is writing to the bus."""
        fcntl.lockf(self._shared, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def check(self) -> None:
        """Raises BusError(kind="stopped") once the watchdog has taken the bus."""
        if self._flag[0]:
            self._listen()
            raise BusError(f"stopped by the watchdog: {self.reason or 'it has taken the bus'}", kind="stopped")

    def beat(self) -> None:
        """Says that the program is alive and in control. Raises BusError if it is not in control any more."""
        self._listen()
        self.check()
        if self._dead:
            raise BusError("the watchdog's process has died: stopping", kind="watchdog")
        self._tell(BEAT)

    def rest(self) -> None:
        """No heartbeat is expected until the next `beat`: for times when torque is off."""
        self._tell(REST)

    def key(self) -> str | None:
        """The next key that was pressed, stop keys excepted; None if there is none."""
        self._listen()
        return self._keys.pop(0) if self._keys else None

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full: beats enough; broken: seen at the next one
            os.write(self._beats, what)

    def close(self, release: bool = True) -> None:
        """Ends the watchdog. release: nothing has gone wrong, so it only makes sure that torque is off."""
        if not self._process:
            return
        if release and not self.reason:
            self._tell(RELEASE)
        os.close(self._beats)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:  # it is not killed: it may be all that still stops the arm
            print("the watchdog has not ended: check the arm, switch the power off", file=sys.stderr)
        self._listen()
        self._end()

    def _end(self) -> None:
        if self._terminal:
            termios.tcsetattr(self.keyboard, termios.TCSADRAIN, self._terminal)
        os.close(self._reports)
        self._process = None

    def __exit__(self, kind, *_) -> None:
        self.close(release=kind is None)


# --- The watchdog's side ----------------------------------------------------------------------------------------------
class Descriptor:
    """Transport over a file descriptor that another process has opened and set up."""

    def __init__(self, fd: int):
        self.fd = fd

    def _failed(self, error: Exception) -> BusError:
        return BusError(f"The port failed ({error.args[-1]})")

    def write(self, data: bytes) -> None:
        try:
            while data:
                if not select.select([], [self.fd], [], 0.5)[1]:
                    raise BusError("The port takes no bytes")
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self.fd, data) :]
        except PORT_ERRORS as error:
            raise self._failed(error) from None

    def read(self, n: int, timeout: float) -> bytes:
        deadline, data = time.monotonic() + timeout, b""
        try:
            while len(data) < n and (left := deadline - time.monotonic()) > 0:
                if select.select([self.fd], [], [], left)[0]:
                    with contextlib.suppress(BlockingIOError):
                        more = os.read(self.fd, n - len(data))
                        if not more:
                            raise BusError("The port is gone")
                        data += more
        except PORT_ERRORS as error:
            raise self._failed(error) from None
        return data

    def flush_input(self) -> None:
        try:
            termios.tcflush(self.fd, termios.TCIFLUSH)
        except PORT_ERRORS as error:
            raise self._failed(error) from None

    def close(self) -> None:
        os.close(self.fd)


class Watch:
    """What the process does: waits for a reason to stop, then goes down the ladder."""

    def __init__(self, port: int, beats: int, reports: int, shared: int, keyboard: int | None, ids: list[int],
                 timeout: float, bus_timeout: float, ladder: dict):
        self.beats, self.reports, self.shared, self.keyboard = beats, reports, shared, keyboard
        self.ids, self.timeout, self.ladder = ids, timeout, ladder
        self.bus = Bus(Descriptor(port), timeout=bus_timeout)
        self.flag = mmap.mmap(shared, 1)
        self.deadline: float | None = None
        self.reason: str | None = None
        self.gone = self.released = self.hurried = False

    def report(self, **what) -> None:
        with contextlib.suppress(OSError):
            os.write(self.reports, (json.dumps(what) + "\n").encode())

    def listen(self, seconds: float) -> None:
        """Waits for what comes first: a beat, a key, a signal, the time. Sets reason, gone, released, hurried."""
        end = time.monotonic() + seconds
        if self.deadline is not None:
            end = min(end, self.deadline)
        sources = [self.wakeup] + [self.beats] * (not self.gone) + [self.keyboard] * (self.keyboard is not None)
        heard, _, _ = select.select(sources, [], [], max(0.0, end - time.monotonic()))
        if self.wakeup in heard:
            os.read(self.wakeup, 64)
            self.reason = self.reason or "the watchdog was told to end"
        if self.beats in heard:
            data = os.read(self.beats, 1 << 16)
            self.gone = not data
            self.released = self.released or RELEASE in data
            if data:
                self.deadline = None if data.endswith(REST) else time.monotonic() + self.timeout
            elif not self.released:
                self.reason = self.reason or "the controlling program has ended"
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline = None
            self.reason = self.reason or f"no heartbeat for {self.timeout:g} s"
        if self.keyboard in heard:
            self._keys()

    def _keys(self) -> None:
        try:
            keys = os.read(self.keyboard, 64).decode(errors="replace")
        except BlockingIOError:
            return
        except OSError:  # the terminal has gone
            keys = ""
        if not keys:
            self.keyboard = None
            self.reason = self.reason or "the keyboard's input has ended (start in a terminal, or without the keyboard)"
        stops = [key for key in keys if key in STOP_KEYS]
        self.hurried = self.hurried or bool(stops and self.reason)  # pressed again: at once
        if stops:
            self.reason = self.reason or "a stop key was pressed"
        elif keys:
            self.report(key=keys)

    def run(self) -> None:
        self.wakeup, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.report(ready=True)
        while not self.reason and not self.released:
            self.listen(3600.0)
        if self.reason:
            self.stop()
        else:
            self.take()
            self.finish(torque_off(self.bus, self.ids))

    def take(self) -> None:
        """From now on the program's writes are refused. One that is being written may end first."""
        self.flag[0] = 1
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(self.shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.002)
            else:
                fcntl.lockf(self.shared, fcntl.LOCK_UN)
                return

    def stop(self) -> None:
        self.report(stop=self.reason)
        self.take()
        say(f"{self.reason}: the arm holds, becomes weak, and is let go")

        def sleep(seconds: float) -> None:
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0 and not self.hurried:
                self.listen(left)

        self.deadline = None
        outcome = let_go(self.bus, self.ids, **self.ladder, sleep=sleep, hurry=lambda: self.hurried)
        self.finish(outcome)
        while not self.gone:  # a goal that the program had already handed over may arrive late
            self.listen(REPEAT)
            with contextlib.suppress(BusError):
                self.bus.broadcast_torque_off()
        torque_off(self.bus, self.ids, rounds=2)

    def finish(self, outcome: Outcome) -> None:
        self.report(outcome=vars(outcome))
        if self.reason or outcome.on or outcome.silent or outcome.port:
            say(outcome.sentence())


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"watchdog: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The process behind hardware.watchdog.Watchdog, which starts it.")
    parser.add_argument("facts", help="what it needs to know, as JSON")
    Watch(**json.loads(parser.parse_args().facts)).run()


if __name__ == "__main__":
    main()
