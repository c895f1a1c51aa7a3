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

A port that has gone away is opened again when it comes back, and torque is taken off then; servos that do not answer
are told again and again, until their cable is mended or a minute is over. A program that hangs is
ended once torque is off, so that it has an exit status. Each watches the other: the watchdog says when it last looked
round, and a program that sees it frozen stops the arm itself. Only one of them says how it ended: the program, unless
it is gone or hangs.

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
from collections.abc import Iterable
from pathlib import Path

from hardware.feetech import PORT_ERRORS, Bus, BusError, SerialTransport
from hardware.torque import HOLD, WEAK, WEAK_TORQUE, Outcome, let_go, torque_off

STOP_KEYS = " qQ\x1b"
# What the program sends: a heartbeat; that all is well; that it says how it ended. The end of the pipe says the rest
BEAT, RELEASE, TELLS = b".", b"Q", b"T"
REPEAT = 0.1  # s between torque-offs while the program is still there, and between two looks round
TELL = 2.0  # s after torque-off, until which the program may say how it ended
HANGS = 10.0  # s after torque-off, until which a program may notice that it has lost the arm
RETURN = 60.0  # s that a port, or a servo's answer, may take to come back
FROZEN = 4.0  # heartbeat time-outs, and at least a second, without a look round: then the watchdog is frozen


# --- The program's side -----------------------------------------------------------------------------------------------
class Guarded:
    """A transport that refuses once the watchdog has taken the bus."""

    def __init__(self, transport, dog: "Watchdog"):
        self.inner, self.dog = transport, dog
        self.port = getattr(transport, "port", "the port")

    def write(self, data: bytes) -> None:
        with self.dog.lock():  # the watchdog takes the bus between packets, not inside one
            self.dog.check()
            self.dog.alive()
            self.inner.write(data)

    def read(self, n: int, timeout: float) -> bytes:
        self.dog.check()
        try:
            return self.inner.read(n, timeout)
        except BusError:
            self.dog.check()  # two who read at once disturb each other
            raise

    def flush_input(self) -> None:
        self.dog.check()
        self.inner.flush_input()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


TAKEN, LOOKED = (
    0,
    1,
)  # shared numbers: whether the watchdog has taken the bus, and when it last looked round
SHARED = 16  # bytes


class Watchdog:
    """Starts the process on entering; leaving lets go of the motors and waits until it has ended.

    Leaving by an exception, or after a stop, goes down the whole ladder; leaving otherwise only makes sure that torque
    is off. `outcome` then says for which servos that was read back; None: the watchdog has died or was frozen.
    """

    def __init__(
        self,
        transport,
        ids: Iterable[int] = range(1, 7),
        timeout: float = 0.25,
        keyboard: int | None = None,
        hold: float = HOLD,
        weak: float = WEAK,
        weak_torque: int = WEAK_TORQUE,
        bus_timeout: float = 0.05,
        hangs: float = HANGS,
        returns: float = RETURN,
    ):
        """transport: an open port with a file descriptor. timeout: seconds between two beats; it counts from the first
        one. keyboard: descriptor of the keys, 0 for the terminal; None: no keys. hold, weak, weak_torque: see `let_go`.
        bus_timeout: seconds that the watchdog waits for servos. hangs: seconds after torque-off, until which a program
        without heartbeat is left alone. returns: seconds that a port or an answer may take to come back.
        """
        self.inner, self.ids, self.keyboard = transport, list(ids), keyboard
        self.timeout, self.frozen_after = timeout, max(1.0, FROZEN * timeout)
        self.facts = dict(
            path=getattr(transport, "port", None), ids=self.ids, keyboard=keyboard, timeout=timeout,
            bus_timeout=bus_timeout, hangs=hangs, returns=returns, program=os.getpid(),
            ladder=dict(hold=hold, weak=weak, weak_torque=weak_torque),
        )  # fmt: skip
        self.patience = 30 + returns
        self.reason: str | None = None
        self.outcome: Outcome | None = None
        self._keys: list[str] = []
        self._ready = self._dead = self._frozen = self._beating = False
        self._text, self._terminal, self._process = b"", None, None

    def __enter__(self) -> "Watchdog":
        if not hasattr(self.inner, "fileno"):
            raise BusError(
                "the watchdog needs a port with a file descriptor, which another process can share"
            )
        self._shared = tempfile.TemporaryFile()
        self._shared.write(bytes(SHARED))
        self._shared.flush()
        self._memory = memoryview(mmap.mmap(self._shared.fileno(), SHARED)).cast("d")
        theirs, self._beats = os.pipe()
        self._reports, report = os.pipe()
        os.set_blocking(self._beats, False)
        os.set_blocking(self._reports, False)
        if self.keyboard is not None and os.isatty(self.keyboard):
            self._terminal = termios.tcgetattr(self.keyboard)  # the watchdog sets and resets it too
        facts = self.facts | dict(
            port=self.inner.fileno(), beats=theirs, reports=report, shared=self._shared.fileno()
        )
        descriptors = [facts[name] for name in ("port", "beats", "reports", "shared")]
        if self.keyboard is not None:
            descriptors.append(self.keyboard)
        try:
            # A session of its own: Ctrl-C and a closed terminal reach the program, not the watchdog.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hardware.watchdog", json.dumps(facts)],
                start_new_session=True,
                pass_fds=descriptors,
                cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.DEVNULL if self.keyboard != 0 else None,
            )
        finally:
            os.close(theirs)
            os.close(report)
        deadline = time.monotonic() + 30
        while not self._listen() and time.monotonic() < deadline:
            select.select([self._reports], [], [], 0.1)
        if not self._ready:
            self._end()
            raise BusError(
                "the watchdog's process did not start: see its message above", kind="watchdog"
            )
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
        deadline = time.monotonic() + self.frozen_after
        while True:
            try:
                fcntl.lockf(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise BusError(
                        "the watchdog does not give the bus back: stopping", kind="watchdog"
                    ) from None
                time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def check(self) -> None:
        """Raises BusError(kind="stopped") once the watchdog has taken the bus."""
        if self._memory[TAKEN] and not self._is_frozen():
            self._listen()
            raise BusError(
                f"stopped by the watchdog: {self.reason or 'it has taken the bus'}", kind="stopped"
            )

    def _is_frozen(self) -> bool:
        """Whether the process has not looked round for too long. It stays so: the program has the bus then."""
        if self._process and self.outcome is None and self._process.poll() is None:
            self._frozen |= time.monotonic() - self._memory[LOOKED] > self.frozen_after
        return self._frozen

    def beat(self) -> None:
        """Says that the program is alive and in control. Raises BusError if it is not in control any more, or if the
        watchdog has died or is frozen; then the program has the bus and must stop the arm itself."""
        self._listen()
        self.check()
        if self._dead:
            raise BusError("the watchdog's process has died: stopping", kind="watchdog")
        if self._is_frozen():
            raise BusError(
                f"the watchdog is frozen, for {self.frozen_after:g} s: stopping", kind="watchdog"
            )
        self._beating = True
        self.alive()

    def alive(self) -> None:
        """A heartbeat, once there has been one: whoever writes to the bus is alive."""
        if self._beating:
            self._tell(BEAT)

    def key(self) -> str | None:
        """The next key that was pressed, stop keys excepted; None if there is none."""
        self._listen()
        return self._keys.pop(0) if self._keys else None

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(
            BlockingIOError, BrokenPipeError
        ):  # full: beats enough; broken: seen at the next one
            os.write(self._beats, what)

    def close(self, release: bool = True) -> None:
        """Ends the watchdog, and closes the port, so that one that has gone away can come back under its name.

        release: nothing has gone wrong, so it only makes sure that torque is off.
        """
        if not self._process:
            return
        self._tell(RELEASE if release and not self.reason else TELLS)
        os.close(self._beats)
        self.inner.close()
        if self._frozen:  # the program has let go itself, and the process would never end
            self._process.kill()
        before = None
        with contextlib.suppress(ValueError):  # not in the main thread
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
        deadline = time.monotonic() + self.patience
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:  # do not wait for the port any longer
                self._process.terminate()
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if self._process.poll() is None:  # it is not killed: it may be all that still stops the arm
            print(
                "the watchdog has not ended: check the arm, switch the power off", file=sys.stderr
            )
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

    clock = staticmethod(time.monotonic)

    def __init__(self, port: int, beats: int, reports: int, shared: int, keyboard: int | None, path: str | None,
                 ids: list[int], timeout: float, bus_timeout: float, hangs: float, returns: float, program: int,
                 ladder: dict):  # fmt: skip
        self.beats, self.reports, self.shared, self.keyboard = beats, reports, shared, keyboard
        self.ids, self.timeout, self.hangs, self.ladder = ids, timeout, hangs, ladder
        self.port, self.path, self.returns, self.program = port, path, returns, program
        self.bus = Bus(Descriptor(port), timeout=bus_timeout)
        self.memory = memoryview(mmap.mmap(shared, SHARED)).cast("d")
        self.taken = False
        self.deadline: float | None = None
        self.reason: str | None = None
        self.gone = self.released = self.hurried = self.told_to_end = False
        self.silent = False  # the program says itself how it ended

    def report(self, **what) -> None:
        with contextlib.suppress(OSError):
            os.write(self.reports, (json.dumps(what) + "\n").encode())

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"watchdog: {text}", file=sys.stderr, flush=True)

    def open_again(self):
        """The port, if it is there again. Raises BusError."""
        return SerialTransport(self.path)

    def look(self) -> None:
        """Tells the program that this process is awake."""
        self.memory[LOOKED] = time.monotonic()
        self.memory[TAKEN] = float(self.taken)

    def listen(self, seconds: float) -> None:
        """Waits for what comes first: a beat, a key, a signal, the time. Sets reason, gone, released, hurried."""
        self.look()
        end = time.monotonic() + seconds
        if self.deadline is not None:
            end = min(end, self.deadline)
        sources = [self.wakeup]
        if not self.gone:
            sources.append(self.beats)
        if self.keyboard is not None:
            sources.append(self.keyboard)
        heard, _, _ = select.select(sources, [], [], max(0.0, end - time.monotonic()))
        if self.wakeup in heard:
            os.read(self.wakeup, 64)
            self.told_to_end = bool(self.reason) or self.released
            self.reason = self.reason or "the watchdog was told to end"
        if self.beats in heard:
            data = os.read(self.beats, 1 << 16)
            self.gone = not data
            self.released = self.released or RELEASE in data
            self.silent = self.silent or RELEASE in data or TELLS in data
            if data:
                self.deadline = time.monotonic() + self.timeout
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
            self.reason = (
                self.reason
                or "the keyboard's input has ended (start in a terminal, or without the keyboard)"
            )
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
        for number in (signal.SIGINT, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        terminal = self.keyboard if self.keyboard is not None and os.isatty(self.keyboard) else None
        if terminal is not None:
            before = termios.tcgetattr(terminal)
            tty.setcbreak(terminal)  # keys come one by one; Ctrl-C is still a signal
        self.look()
        self.report(ready=True)
        try:
            while not self.reason and not self.released:
                self.listen(REPEAT)
            if self.reason:
                self.stop()
            else:
                self.take()
                self.report(outcome=vars(self.off()))
        finally:
            if terminal is not None:  # also when the program was killed
                with contextlib.suppress(termios.error, OSError):
                    termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def take(self) -> None:
        """From now on the program's writes are refused. One that is being written may end first."""
        self.taken, self.deadline = True, None
        self.look()
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(self.shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.002)
            else:
                fcntl.lockf(self.shared, fcntl.LOCK_UN)
                return

    def sleep(self, seconds: float) -> None:
        """Listens meanwhile."""
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0 and not self.hurried:
            self.listen(min(left, REPEAT))

    def go_down(self) -> Outcome:
        """Takes the bus and lets go of the arm."""
        self.report(stop=self.reason)
        self.take()
        self.say(f"{self.reason}: the arm holds, becomes weak, and is let go")
        outcome = let_go(
            self.bus, self.ids, **self.ladder, sleep=self.sleep, hurry=lambda: self.hurried
        )
        outcome = self.back(outcome)
        self.report(outcome=vars(outcome))
        return outcome

    def stop(self) -> None:
        outcome = self.go_down()
        now = time.monotonic()
        tell, end = now + TELL, now + self.hangs
        while not self.gone:  # a goal that the program had already handed over may arrive late
            self.listen(REPEAT)
            with contextlib.suppress(BusError):
                self.bus.broadcast_torque_off()
            if time.monotonic() > tell and not self.silent:
                self.say(outcome.sentence())
                self.silent = True
            if time.monotonic() > end and not self.gone and os.getppid() == self.program:
                self.say("the program hangs: it is ended")
                os.kill(self.program, signal.SIGKILL)
                end += self.hangs
        if outcome.known:
            outcome = self.off()
        if not self.silent:
            self.say(outcome.sentence())

    def off(self) -> Outcome:
        """Torque off, also over a port or a cable that comes back."""
        return self.back(torque_off(self.bus, self.ids, self.sleep))

    def back(self, outcome: Outcome) -> Outcome:
        """If the port has failed, opens it again as soon as it is there. Tells servos until all have answered."""
        if outcome.known:
            return outcome
        if gone := bool(outcome.port and self.path):
            what, cure = f"{self.path} is gone, and torque may be on", "plug it in again"
            with contextlib.suppress(OSError):
                os.close(self.port)  # else the port would come back under another name
        else:
            who = ", ".join(map(str, outcome.silent + outcome.on))
            what, cure = f"servo {who} does not obey, and torque may be on", "mend the cable"
        self.say(f"{what}: switch the power off, or {cure}")
        end = self.clock() + self.returns
        while not outcome.known and self.clock() < end and not self.told_to_end:
            self.hurried = False
            self.listen(REPEAT)
            try:
                if gone:
                    self.bus.transport = self.open_again()
            except BusError:
                continue
            outcome = torque_off(self.bus, self.ids, self.sleep)
            if gone := bool(outcome.port and self.path):
                with contextlib.suppress(OSError):
                    self.bus.close()
        return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The process behind hardware.watchdog.Watchdog, which starts it."
    )
    parser.add_argument("facts", help="what it needs to know, as JSON")
    Watch(**json.loads(parser.parse_args().facts)).run()


if __name__ == "__main__":
    main()
