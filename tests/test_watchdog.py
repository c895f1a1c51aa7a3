"""The watchdog: its ladder in virtual time, and the process itself behind a pseudo-terminal.

The tests with processes wait for what must come to pass, and assert nothing about how fast it does.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from hardware.emulator import EmulatedBus, EmulatedTransport, PtyServer, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, SerialTransport, encode

pytest.importorskip("termios", reason="the watchdog needs Linux or macOS")
from hardware.torque import Outcome, let_go, torque_off  # noqa: E402
from hardware.watchdog import Watchdog  # noqa: E402

IDS = range(1, 7)
GOAL = REGISTERS["goal_position"][0]
SOON = 30.0  # s, until which a process may take its time


# --- The ladder, in virtual time --------------------------------------------------------------------------------------
def holding(**options):
    """An arm that is on its way: torque on, goals 400 steps ahead."""
    clock = VirtualClock()
    servos = EmulatedBus(IDS, clock, **options)
    bus = Bus(EmulatedTransport(servos, clock), clock)
    bus.sync_write(
        41,
        {
            id: b"\0" + encode("goal_position", 2448) + b"\0\0" + encode("goal_speed", 500)
            for id in IDS
        },
    )
    clock.sleep(0.3)
    servos.writes.clear()
    return bus, servos, clock


def names(writes):
    """The registers that were written, in order, with what the first of the written servos got."""
    known = {address: name for name, (address, _) in REGISTERS.items()}
    return [known[address] for _, _, address, _ in writes]


def test_hold_then_weak_then_off():
    bus, servos, clock = holding()
    before, marks = servos.servos[1].position, []
    clock.at(clock() + 0.25, lambda: marks.append(("hold", servos.servos[1].position)))
    clock.at(clock() + 0.8, lambda: marks.append(("weak", servos.servos[1].get("torque_limit"))))
    begin = clock()
    outcome = let_go(bus, IDS, hold=0.3, weak=1.0, weak_torque=150, sleep=clock.sleep)
    assert (
        outcome == Outcome(list(IDS), [], [])
        and outcome.sentence() == "torque is off, read back from every servo"
    )
    assert marks == [("hold", pytest.approx(before, abs=25)), ("weak", 150)], (
        "far from the goal at 2448"
    )
    assert names(servos.writes) == ["goal_position"] * 6 + ["torque_limit", "torque_enable"]
    assert servos.writes[-2][1] == servos.writes[-1][1] == 254, "broadcasts reach everyone"
    assert 1.3 <= clock() - begin <= 1.4
    assert not any(servo.torque for servo in servos.servos.values())


def test_an_arm_that_is_off_is_not_switched_on():
    """A goal would do that."""
    bus, servos, clock = holding()
    bus.broadcast_torque_off()
    servos.writes.clear()
    begin = clock()
    assert let_go(bus, IDS, sleep=clock.sleep).off == list(IDS)
    assert names(servos.writes) == ["torque_enable"] and clock() - begin < 0.1


TROUBLES = {
    "muted": (lambda s: s.mute(3), [3]),
    "first one muted": (lambda s: s.mute(1), [1]),
    "all muted": (lambda s: [s.mute(id) for id in IDS], list(IDS)),
    "hot": (lambda s: s.heat(3, 90.0), []),
    "overloaded": (lambda s: s.error(3, 0x20), []),
    "all errors on all": (lambda s: [s.error(id, 0x3F) for id in IDS], []),
    "blocked": (lambda s: s.block(3), []),
    "corrupt": (lambda s: s.corrupt(4), []),
    "replies late": (lambda s: s.delay(3, 0.02, 3), []),
    "replies lost": (lambda s: s.drop(3, 5), []),
    "first request lost": (lambda s: s.lose(1), []),
    "power of one lost for a moment": (lambda s: s.power_cycle(3), []),
    "one bad, one muted, one hot": (lambda s: (s.error(2, 0x20), s.mute(3), s.heat(4, 90.0)), [3]),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_torque_off_reaches_every_motor_whatever_one_of_them_has(trouble, blocks):
    begin, silent = TROUBLES[trouble]
    bus, servos, clock = holding(absent_blocks=blocks)
    begin(servos)
    faulted = {id for id, servo in servos.servos.items() if servo.error}
    outcome = let_go(bus, IDS, sleep=clock.sleep)
    assert not any(servo.torque for servo in servos.servos.values())
    assert outcome.silent == silent and sorted(outcome.off + silent) == list(IDS) and not outcome.on
    assert ("switch the power off" in outcome.sentence()) == bool(silent)
    assert not faulted & {id for _, id, _, _ in servos.written("goal_position")}, (
        "no goal for a servo with errors"
    )
    off = servos.written("torque_enable")[0][0]
    assert not servos.written("goal_position", since=off)


def test_a_servo_that_does_not_hear_is_named():
    bus, servos, clock = holding()
    servos.disconnect(5)
    outcome = let_go(bus, IDS, sleep=clock.sleep)
    assert outcome == Outcome([1, 2, 3, 4, 6], [5], []) and servos.servos[5].torque
    assert outcome.sentence().endswith(
        "torque-off was sent to servo 5, but no answer came: switch the power off, nothing else lets go"
    )


def test_a_lost_torque_off_is_repeated():
    bus, servos, clock = holding()
    servos.lose(1)
    assert torque_off(bus, IDS, sleep=clock.sleep).off == list(IDS)
    assert servos.written("torque_enable"), "the one that arrived"
    stubborn = Outcome([1, 3, 4, 5, 6], [], [2])
    servos.servos[2].write = lambda address, data: None
    servos.servos[2].registers[40] = 1
    assert torque_off(bus, IDS, sleep=clock.sleep) == stubborn
    assert "torque is still on on servo 2: switch the power off" in stubborn.sentence()


def test_a_port_that_is_gone_is_said_and_not_raised():
    for when in (0.0, 0.001, 0.2, 0.8, 1.31):
        bus, servos, clock = holding()
        clock.at(clock() + when, servos.unplug)
        begin = clock()
        clock.sleep(0.0)
        outcome = let_go(bus, IDS, sleep=clock.sleep)
        if when < 1.31:
            assert "torque-off could not be sent: switch the power off" in outcome.sentence()
        assert clock() - begin < 2.0


def test_a_second_press_hurries():
    bus, servos, clock = holding()
    begin = clock()
    assert let_go(bus, IDS, sleep=clock.sleep, hurry=lambda: clock() > begin + 0.1).off == list(IDS)
    assert clock() - begin < 0.3


# --- The process ------------------------------------------------------------------------------------------------------
def wait_for(condition, what):
    """Polls until the condition holds."""
    end = time.monotonic() + SOON
    while not (result := condition()):
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.05)
    return result


@pytest.fixture
def server():
    pytest.importorskip("serial", reason='needs pyserial: pip install -e ".[hardware]"')
    with PtyServer() as server:
        yield server


def dog(transport, **options):
    return Watchdog(
        transport,
        **(dict(timeout=SOON, returns=1.0, hold=0.05, weak=0.1, bus_timeout=0.1) | options),
    )


def raise_goals(transport, goal=2600):
    bus = Bus(transport, timeout=1.0)
    for id in IDS:
        bus.write(id, GOAL, encode("goal_position", goal))
    return bus


def all_off(server):
    return all(not servo["torque"] for servo in server.state().values())


def test_a_calm_end_makes_sure_that_torque_is_off(server):
    port = SerialTransport(server.port)
    with dog(port) as watchdog:
        bus = raise_goals(watchdog.transport)
        watchdog.beat()
        assert bus.read(1, *REGISTERS["torque_enable"]).data == b"\x01"
    assert (
        watchdog.outcome == Outcome(list(IDS), [], [])
        and watchdog.reason is None
        and all_off(server)
    )
    assert server.state()[1]["torque_limit"] == 1000, "no ladder was needed"
    with pytest.raises(BusError, match="stopped by the watchdog"):
        bus.ping(1)
    port.close()


def ways_to_stop():
    """name -> (what happens, given the write end of the keys and the watchdog; the reason that is reported)."""
    return {
        "stop key": (lambda keys, _: os.write(keys, b" "), "a stop key was pressed"),
        "escape": (lambda keys, _: os.write(keys, b"\x1b"), "a stop key was pressed"),
        "keys end": (lambda keys, _: os.close(keys), "the keyboard's input has ended"),
        "heartbeat": (lambda keys, watchdog: watchdog.beat(), "no heartbeat for 0.3 s"),
        "told to end": (
            lambda keys, watchdog: watchdog._process.send_signal(signal.SIGTERM),
            "was told to end",
        ),
    }


@pytest.mark.parametrize("way", ways_to_stop())
def test_reasons_to_stop(server, way, capfd):
    """The arm is let go, and the program's writes are refused; once with a servo muted and one in overload."""
    happens, reason = ways_to_stop()[way]
    read, keys = os.pipe()
    port = SerialTransport(server.port)
    with dog(port, keyboard=read, timeout=0.3 if way == "heartbeat" else SOON) as watchdog:
        bus = raise_goals(watchdog.transport)
        silent = [3] if way == "stop key" else []
        if silent:
            server.do("mute", 3)
            server.do("error", 2, 0x20)
        happens(keys, watchdog)
        wait_for(lambda: all_off(server), "torque off")
        for call in (watchdog.beat, lambda: bus.sync_read(IDS, 56, 2), lambda: raise_goals(watchdog.transport),
                     bus.broadcast_torque_off, lambda: watchdog.transport.read(1, 0.0)):  # fmt: skip
            with pytest.raises(BusError, match=f"stopped by the watchdog: .*{reason}") as caught:
                call()
            assert caught.value.kind == "stopped"
        off = server.ask(get="written", args=["torque_enable"])["writes"][0][0]
        assert not server.ask(get="written", args=["goal_position", off])["writes"]
    assert reason in watchdog.reason and watchdog.outcome == Outcome(
        [id for id in IDS if id not in silent], silent, []
    )
    assert all_off(server) and server.state()[1]["torque_limit"] == 150
    said = capfd.readouterr().err
    assert reason in said and ("torque" in said) == bool(silent), (
        "how it ended is said by the program, and by it alone"
    )
    end = watchdog.outcome.sentence()
    assert (
        "torque-off was sent to servo 3, but no answer came: switch the power off" in end
    ) == bool(silent)
    port.close()


def test_other_keys_reach_the_program(server):
    read, keys = os.pipe()
    port = SerialTransport(server.port)
    with dog(port, keyboard=read) as watchdog:
        assert watchdog.key() is None
        os.write(keys, b"y\nn")
        assert [wait_for(watchdog.key, "a key") for _ in range(3)] == ["y", "\n", "n"]
        watchdog.beat()
    port.close()


def test_a_terminal_gives_single_keys_and_is_put_back(server):
    import termios

    master, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    port = SerialTransport(server.port)
    with dog(port, keyboard=terminal) as watchdog:
        assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO)
        os.write(master, b"y")  # no newline
        assert wait_for(watchdog.key, "a key") == "y"
        os.write(master, b"q")
        wait_for(lambda: watchdog._listen() and watchdog.reason, "the stop")
    assert termios.tcgetattr(terminal) == before and watchdog.outcome.off == list(IDS)
    port.close()


def test_an_exception_goes_down_the_ladder(server):
    port = SerialTransport(server.port)
    with pytest.raises(ZeroDivisionError), dog(port) as watchdog:
        raise_goals(watchdog.transport)
        1 / 0  # noqa: B018
    assert watchdog.reason == "the controlling program has ended" and all_off(server)
    assert server.state()[1]["torque_limit"] == 150
    port.close()


def test_a_watchdog_that_dies_is_noticed(server):
    port = SerialTransport(server.port)
    with dog(port) as watchdog:
        bus = raise_goals(watchdog.transport)
        watchdog._process.kill()
        watchdog._process.wait()
        with pytest.raises(BusError, match="the watchdog's process has died") as caught:
            watchdog.beat()
        assert caught.value.kind == "watchdog"
        bus.broadcast_torque_off()  # the program still has the bus
        assert torque_off(bus, IDS).off == list(IDS)
    port.close()


def test_a_port_that_goes_away(server, capfd):
    read, keys = os.pipe()
    port = SerialTransport(server.port)
    with dog(port, keyboard=read) as watchdog:
        server.do("unplug")
        os.write(keys, b"q")
        wait_for(lambda: watchdog._listen() and watchdog.outcome, "the outcome")
    assert "torque-off could not be sent: switch the power off" in watchdog.outcome.sentence()
    assert "switch the power off" in capfd.readouterr().err
    port.close()


def test_a_port_that_comes_back_finds_its_torque_taken_off(tmp_path, capfd):
    """The adapter goes, the program ends, the adapter is plugged in again under its name."""
    with PtyServer(link=str(tmp_path / "arm")) as server:
        port = SerialTransport(server.port)
        with pytest.raises(ZeroDivisionError), dog(port, returns=SOON) as watchdog:
            raise_goals(watchdog.transport)
            server.do("unplug")
            assert not all_off(server)
            threading.Timer(0.5, lambda: server.do("unplug", False)).start()
            1 / 0  # noqa: B018
        assert watchdog.outcome == Outcome(list(IDS), [], []) and all_off(server)
        assert "is gone, and torque may be on" in capfd.readouterr().err


def test_a_cable_that_comes_back_finds_its_torque_taken_off(server, capfd):
    port = SerialTransport(server.port)
    with dog(port, returns=SOON) as watchdog:
        raise_goals(watchdog.transport)
        server.do("disconnect", 4)
        os.kill(watchdog._process.pid, signal.SIGTERM)
        said, what = [], "servo 4 does not obey, and torque may be on"
        wait_for(lambda: said.append(capfd.readouterr().err) or what in "".join(said), "a sentence")
        assert [id for id, servo in server.state().items() if servo["torque"]] == [4]
        server.do("disconnect", 4, False)
    assert watchdog.outcome == Outcome(list(IDS), [], []) and all_off(server)
    port.close()


def test_torque_that_was_read_as_off_before_is_known():
    """The line is lost after torque-off: no goal has gone out since, so it is not unknown; after a goal it is."""
    bus, servos, clock = holding()
    assert torque_off(bus, IDS, sleep=clock.sleep).known and bus.limp == set(IDS)
    servos.disconnect(2)
    outcome = torque_off(bus, IDS, sleep=clock.sleep)
    assert outcome.before == [2] and not outcome.known
    assert outcome.sentence().endswith(
        "torque was read as off on servo 2 before the answers ended, no goal since"
    )
    servos.unplug()
    assert "off on every servo before" in torque_off(bus, IDS, sleep=clock.sleep).sentence()
    servos.unplug(False)
    bus.sync_write(GOAL, {1: encode("goal_position", 2000)})
    assert not bus.limp
    outcome = torque_off(bus, IDS, sleep=clock.sleep)
    assert outcome.silent == [2] and not outcome.before
    assert "switch the power off" in outcome.sentence()


def test_ctrl_c_ends_the_wait_for_a_port(server):
    before = signal.getsignal(signal.SIGINT)
    port = SerialTransport(server.port)
    with pytest.raises(ZeroDivisionError), dog(port, returns=10 * SOON) as watchdog:
        raise_goals(watchdog.transport)
        server.do("unplug")
        threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        1 / 0  # noqa: B018
    assert watchdog.outcome.port and signal.getsignal(signal.SIGINT) is before


def test_a_frozen_watchdog_is_noticed_and_the_program_keeps_the_bus(server):
    port = SerialTransport(server.port)
    with (
        pytest.raises(BusError, match="the watchdog is frozen"),
        dog(port, timeout=0.2) as watchdog,
    ):
        bus = raise_goals(watchdog.transport)
        watchdog._process.send_signal(signal.SIGSTOP)
        process = watchdog._process
        try:
            while True:
                time.sleep(0.02)
                watchdog.beat()
        finally:
            assert torque_off(bus, IDS).known
    assert watchdog.outcome is None and process.poll() == -signal.SIGKILL and all_off(server)


def test_a_program_that_hangs_is_ended_once_torque_is_off(server):
    program = start(server, 0.3, hang=True)
    assert program.wait(SOON) == -signal.SIGKILL and all_off(server)


def test_what_cannot_be_shared_is_refused():
    clock = VirtualClock()
    with pytest.raises(BusError, match="needs a port with a file descriptor"):
        dog(EmulatedTransport(EmulatedBus(IDS, clock), clock)).__enter__()


PROGRAM = """
import signal, sys, time
from hardware.feetech import *
from hardware.watchdog import Watchdog

# Both are ignored where nohup, or a script's &, started the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
port = SerialTransport(sys.argv[1])
with Watchdog(port, timeout=float(sys.argv[2]), hold=0.05, weak=0.1, bus_timeout=0.1, returns=1.0,
              hangs=0.5 if len(sys.argv) > 3 else 60) as dog:
    bus = Bus(dog.transport, timeout=1.0)
    dog.beat()
    for id in range(1, 7):
        bus.write(id, 42, encode("goal_position", 2600))
        dog.beat()
    print("moving", flush=True)
    if len(sys.argv) > 3:
        time.sleep(1000)
    try:
        while True:
            dog.beat()
            bus.sync_write(42, {id: encode("goal_position", 2600) for id in range(1, 7)})
            time.sleep(0.01)
    except BusError as error:
        print(error.kind, flush=True)
        sys.exit(3)
"""


def start(server, timeout, hang=False):
    command = [sys.executable, "-c", PROGRAM, server.port, str(timeout), *["hang"] * hang]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "moving\n"
    assert not all_off(server)
    return program


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_killed_program_leaves_no_torque(server, number):
    """By no matter which signal; by SIGKILL also with a servo that does not reply."""
    program = start(server, SOON)
    if number == signal.SIGKILL:
        server.do("mute", 4)
    program.send_signal(number)
    program.communicate(timeout=SOON)
    wait_for(lambda: all_off(server), "torque off")
    time.sleep(0.3)
    assert all_off(server)


def test_a_program_that_hangs_and_wakes_up_has_lost_the_arm(server):
    """Stopped between two writes, it cannot switch torque on again when it goes on."""
    program = start(server, 2.0)
    program.send_signal(signal.SIGSTOP)
    wait_for(lambda: all_off(server), "torque off")
    program.send_signal(signal.SIGCONT)
    assert program.communicate(timeout=SOON)[0] == "stopped\n" and program.returncode == 3
    assert all_off(server)
    off = server.ask(get="written", args=["torque_enable"])["writes"][0][0]
    assert not server.ask(get="written", args=["goal_position", off])["writes"]
