"""The emulated servos: registers, motion, protections and the line, against closed forms and published facts."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

from hardware import emulator, feetech
from hardware.emulator import EmulatedBus, EmulatedTransport, PtyServer, RealClock, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, decode, encode

IDS = range(1, 7)


def emulated(ids=IDS, **options):
    clock = VirtualClock()
    servos = EmulatedBus(ids, clock, **options)
    return Bus(EmulatedTransport(servos, clock), clock), servos, clock


def one(**options):
    """One servo, the functions that write and read its registers by name, and the rest."""
    bus, servos, clock = emulated([1], **options)

    def put(**values):
        for name, value in values.items():
            bus.write(1, REGISTERS[name][0], encode(name, value))

    def get(name):
        return decode(name, bus.read(1, *REGISTERS[name]).data)

    return servos.servos[1], put, get, bus, servos, clock


# --- Clock ------------------------------------------------------------------------------------------------------------
def test_virtual_time_passes_only_when_slept_and_keeps_appointments():
    clock, seen = VirtualClock(), []
    for when in (3.0, 1.0, 1.0, 9.0):
        clock.at(when, lambda: seen.append(clock.now()))
    clock.sleep(-1.0)
    assert clock() == 0.0 and not seen
    clock.sleep(5.0)
    assert clock() == 5.0 and seen == [1.0, 1.0, 3.0]
    assert RealClock.now() <= RealClock()()


# --- Registers --------------------------------------------------------------------------------------------------------
def test_factory_values():
    servo, _, get, *_ = one()
    for name, value in dict(model=777, id=1, baud_code=0, return_delay=250, min_position=0, max_position=4095, p=32,
                            d=32, i=0, homing_offset=0, mode=0, phase=0, unload_mask=44, led_mask=47, torque_enable=0,
                            protection_current=500, max_torque=1000, torque_limit=1000, present_position=2048,
                            present_voltage=74, present_temperature=25, moving=0, status=0).items():  # fmt: skip
        assert get(name) == value, name
    assert servo.position == 2048


def test_read_only_registers_do_not_change():
    servo, _, get, bus, *_ = one()
    before = bytes(servo.registers)
    for address in (0, 1, 3, 4, *range(56, 71)):
        bus.write(1, address, b"\x7b")
    assert bytes(servo.registers) == before and not servo.eeprom_writes


def test_eeprom_is_kept_only_if_unlocked_and_every_write_is_counted():
    servo, put, get, _, servos, _ = one()
    put(p=16)
    assert get("p") == 16 and not servo.eeprom_writes
    servos.power_cycle()
    assert get("p") == 32, "written while locked: gone with the power"
    put(lock=0, p=16, homing_offset=-20, max_torque=500)
    assert servo.eeprom_writes == {21: 1, 31: 1, 32: 1, 16: 1, 17: 1}
    put(p=16)
    assert servo.eeprom_writes[21] == 2, "the same value wears it out too"
    servos.power_cycle(1)
    assert get("p") == 16 and get("homing_offset") == -20 and get("lock") == 1
    assert get("torque_limit") == 500, "copied from max_torque at power-up"


@pytest.mark.parametrize("torque", [False, True])
@pytest.mark.parametrize("goal", [300, None])
def test_power_up_both_ways(torque, goal):
    servo, _, get, _, _, clock = one(power_up_torque=torque, power_up_goal=goal, position=1500.0)
    assert get("torque_enable") == torque and get("goal_position") == (goal or 1500)
    clock.sleep(2.0)
    assert get("present_position") == (pytest.approx(goal, abs=2) if goal and torque else 1500)


def test_present_is_encoder_less_offset():
    servo, put, get, *_ = one(position=2500.0)
    put(homing_offset=452)
    assert get("present_position") == 2048
    put(homing_offset=-452)
    assert get("present_position") == 2952
    servo.position = 10.0
    put(homing_offset=0)
    assert servo.encoder == 10 - 452 and get("present_position") == 10 - 452 + 4096, "within a turn"
    put(phase=0x10)
    assert get("present_position") == 10 - 452, "or over several, then with a sign"
    servo.encoder = 4095.7
    put(phase=0)
    assert get("present_position") == 0, "4096 is 0"


@pytest.mark.parametrize("encoder", [0.0, 1.0, 1000.0, 2048.0, 4095.0])
def test_torque_enable_128_makes_this_the_middle(encoder):
    _, put, get, *_ = one(position=encoder)
    put(torque_enable=128)
    assert get("present_position") == pytest.approx(
        2048, abs=1 if encoder == 0.0 else 0
    )  # -2048 has no offset
    assert get("homing_offset") == max(-2047, encoder - 2048) and get("torque_enable") == 0


@pytest.mark.parametrize(
    ("goal", "limited"),
    [
        (2000, 2000),
        (500, 700),
        (3500, 3400),
        (600, 700),
        (0, 3400),
        (10, 700),
        (4000, 3400),
        (-50, 3400),
    ],
)
def test_a_goal_is_limited_to_the_nearer_edge_over_the_turns_end_too(goal, limited):
    """With [700, 3400]: from 0 it is 700 up to the one edge and 4096 - 3400 = 696 down to the other."""
    for shown in (True, False):
        servo, put, get, _, _, clock = one(goal_reads_back_limited=shown)
        put(min_position=700, max_position=3400, goal_position=goal)
        assert get("goal_position") == (limited if shown else goal)
        clock.sleep(2.0)
        assert servo.position == pytest.approx(limited, abs=2)


def test_a_goal_switches_torque_on_again_and_a_stale_one_jumps():
    servo, put, get, bus, servos, clock = one()
    put(goal_position=2500)
    assert get("torque_enable") == 1
    clock.sleep(1.0)
    bus.broadcast_torque_off()
    assert get("torque_enable") == 0
    servo.position = 2000.0  # moved by hand
    clock.sleep(1.0)
    assert servo.position == 2000.0
    put(torque_enable=1)
    clock.sleep(1.0)
    assert servo.position == pytest.approx(2500, abs=2), "to the goal of before"
    bus.broadcast_torque_off()
    put(goal_position=1800)
    clock.sleep(1.0)
    assert get("torque_enable") == 1 and servo.position == pytest.approx(1800, abs=2)


def test_writes_are_kept_as_they_were_addressed():
    bus, servos, clock = emulated()
    servos.disconnect(2)
    clock.sleep(1.0)
    bus.sync_write(41, {1: bytes(7), 2: b"\1\2\3\4\5\6\7"})
    bus.broadcast_torque_off()
    bus.reg_write(3, 42, b"\0\x08")
    bus.action()
    clock.sleep(1.0)
    assert [(id, address, data) for _, id, address, data in servos.writes] == [
        (1, 41, bytes(7)), (2, 41, b"\1\2\3\4\5\6\7"), (254, 40, b"\0"), (3, 42, b"\0\x08")]  # fmt: skip
    assert len(servos.written("goal_position")) == 3 and len(servos.written("torque_enable")) == 1
    assert not servos.written("goal_position", since=clock()) and not servos.written(
        "present_position"
    )


# --- The line ---------------------------------------------------------------------------------------------------------
def test_wire_time_is_ten_bits_a_byte():
    """At 1 Mbit/s: the request of a sync read has 14 bytes, 0.14 ms; six replies 48 bytes for 2 registers, 0.48 ms, or
    126 bytes for 15, 1.26 ms; and the return delay before each.
    """
    for delay, size, expected in ((0, 2, 0.62e-3), (0, 15, 1.40e-3), (250, 2, 3.62e-3)):
        bus, servos, clock = emulated()
        for servo in servos.servos.values():
            servo.registers[7] = delay
        bus.sync_read(IDS, 56, size)
        assert clock() == pytest.approx(expected, abs=2e-5)
    bus, servos, clock = emulated(wire_time=False)
    bus.sync_read(IDS, 56, 15)
    assert clock() == pytest.approx(0.0, abs=1e-5)
    _, servos, clock = emulated()
    servos.feed(bytes.fromhex("fffffe1683 2a02 010008 020008 030008 040008 050008 060008 f7"))
    assert servos._line_free == pytest.approx(0.26e-3)


def test_replies_come_byte_by_byte():
    _, servos, clock = emulated()
    servos.servos[1].registers[7] = 0
    servos.feed(feetech.packet(1, feetech.PING))
    assert (
        servos.take(10) == b""
        and servos.ready_at() == pytest.approx(70e-6)
        and servos.ready_at(7) is None
    )
    clock.sleep(81e-6)
    assert servos.take(10) == b"\xff\xff" and servos.take(10) == b""
    clock.sleep(1.0)
    assert servos.take(3) == b"\x01\x02\x00" and servos.take(10) == b"\xfc"


def test_requests_are_found_again_after_rubbish():
    for rubbish in (
        b"\x00",
        b"\xff",
        b"\xff\xff\xff",
        b"\xff\xff\x01\x02\x01\x00",
        b"\xff\xff\x01\x00\x01",
    ):
        _, servos, clock = emulated()
        servos.feed(rubbish + feetech.packet(4, feetech.PING))
        clock.sleep(0.01)
        assert servos.take(99) == feetech.packet(4, 0), rubbish
    # The beginning of a long packet swallows what follows at once, but is forgotten after a pause.
    _, servos, clock = emulated()
    for answer in (b"", feetech.packet(4, 0)):
        servos.feed(b"\xff\xff\x01\x40\x03" * (answer == b"") + feetech.packet(4, feetech.PING))
        clock.sleep(0.1)
        assert servos.take(99) == answer
    for part in feetech.packet(5, feetech.PING):
        servos.feed(bytes((part,)))
    clock.sleep(0.01)
    assert servos.take(99) == feetech.packet(5, 0), "byte by byte is the same"


def test_who_answers_what():
    bus, servos, clock = emulated()

    def answers(request):
        servos.feed(request)
        clock.sleep(0.1)
        return [(id, data) for id, _, data in feetech.frames(servos.take(999))[0]]

    assert answers(feetech.packet(254, feetech.PING)) == [(id, b"") for id in IDS]
    assert answers(feetech.packet(9, feetech.PING)) == []
    assert answers(feetech.packet(254, feetech.READ, b"\x05\x01")) == []
    assert answers(feetech.packet(254, feetech.SYNC_READ, b"\x05\x01\x06\x02")) == [
        (6, b"\x06"),
        (2, b"\x02"),
    ]
    assert answers(feetech.packet(254, feetech.SYNC_WRITE, b"\x2c\x02\x01\x05")) == [], (
        "a byte is missing: ignored"
    )
    assert not servos.writes
    assert answers(feetech.packet(2, 0x06)) == [], "factory reset is not obeyed"
    assert answers(feetech.packet(2, feetech.WRITE, b"\x08\x00")) == [], (
        "level 0: writes are not confirmed any more"
    )
    assert (
        answers(feetech.packet(2, feetech.WRITE, b"\x2c\x01")) == []
        and servos.servos[2].registers[44] == 1
    )
    assert answers(feetech.packet(2, feetech.READ, b"\x2c\x01")) == [(2, b"\x01")]
    bus.write(3, 5, b"\x0b")
    assert [id for id, _ in answers(feetech.packet(254, feetech.PING))] == [1, 2, 4, 5, 6, 11], (
        "an id is a register"
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_a_silent_servo_in_a_sync_read_both_ways(blocks):
    _, servos, clock = emulated(absent_blocks=blocks)
    servos.mute(3)
    servos.feed(feetech.packet(254, feetech.SYNC_READ, bytes((5, 1, *IDS))))
    clock.sleep(0.1)
    found = [id for id, _, _ in feetech.frames(servos.take(999))[0]]
    assert found == ([1, 2] if blocks else [1, 2, 4, 5, 6])


def test_other_baud_rates_are_not_understood():
    bus, servos, _ = emulated()
    bus.write(4, 6, b"\x01")
    with pytest.raises(BusError, match="servo 4 does not answer"):
        bus.ping(4)
    servos.baud = 500_000
    assert bus.ping(4).id == 4 and bus.scan(IDS) == [4]


def test_two_levels_on_one_line():
    assert emulator.collide(b"\xff\x0f", b"\xf0\xff", 0) == b"\xf0\x0f"
    assert emulator.collide(b"\x01\x02", b"\x03", 4) == b"\x01\x02\x03"
    assert emulator.collide(b"\xff\xff", b"\xff\xff", 1) == b"\xff\xff\xff"


# --- Motion -----------------------------------------------------------------------------------------------------------
def test_speed_limit_is_held():
    """978 steps/s are 1.5 rad/s: after one second the shaft has gone 978 steps, less the lag of the position loop."""
    servo, put, get, _, _, clock = one(position=500.0)
    put(p=16, goal_speed=978, goal_position=3500)
    clock.sleep(0.5)
    first, begin = servo.position, clock()
    clock.sleep(1.0)
    assert get("present_speed") == pytest.approx(978, abs=2) and get("moving") == 1
    assert servo.position - first == pytest.approx(978 * (clock() - begin), abs=2)
    clock.sleep(3.0)
    assert (
        servo.position == pytest.approx(3500, abs=3)
        and get("moving") == 0
        and get("present_speed") == 0
    )


def test_acceleration_limit_gives_a_trapezoid():
    """10 x 100 steps/s^2 up to 500 steps/s: 0.5 s up, 0.5 s down, 250 steps of 1000 in them, 1 s between: 2.5 s."""
    servo, put, get, _, servos, clock = one(position=1000.0)
    put(acceleration=10, goal_speed=500, goal_position=2000)
    begin, seen = clock(), []
    while clock() - begin < 3.0:
        seen.append((servo.position, servo.setpoint_velocity, servo.velocity))
        clock.sleep(0.01)
    positions, aims, speeds = zip(*seen, strict=True)
    half, whole = (
        0.01 * next(i for i, p in enumerate(positions) if p >= at) for at in (1500, 1995)
    )
    assert half == pytest.approx(1.25, abs=0.05) and whole == pytest.approx(2.5, abs=0.1)
    assert (
        max(aims) == 500
        and max(abs(b - a) for a, b in zip(aims, aims[1:], strict=False)) <= 10 + 1e-6
    )
    assert max(speeds) == pytest.approx(500, rel=0.05) and max(positions) < 2003


def test_top_speed_follows_voltage_and_torque_limit():
    for volts, limit, share in ((7.4, 1000, 1.0), (5.0, 1000, 5.0 / 7.4), (7.4, 500, 0.5)):
        servo, put, get, _, servos, clock = one(position=0.0, voltage=volts, resistance=0.0)
        put(torque_limit=limit, goal_position=4000)
        clock.sleep(0.5)
        expected = emulator.NO_LOAD_SPEED * (share - emulator.FRICTION)
        assert (
            get("present_speed") == pytest.approx(expected, abs=2) and get("present_load") == limit
        )


def test_error_under_load_is_that_of_a_proportional_controller():
    """At rest the duty carries the load: error x P / 1600 = load, give or take the friction."""
    for gain, load in ((16, 0.25), (32, 0.25), (16, -0.4)):
        servo, put, get, _, servos, clock = one(position=2048.0, resistance=0.0)
        servo.load = load
        put(p=gain, goal_position=2048)
        clock.sleep(3.0)
        sag, slack = load * 1600 / gain, emulator.FRICTION * 1600 / gain
        assert servo.position - 2048 == pytest.approx(sag, abs=slack + 1) and servo.velocity == 0
        assert get("present_load") == pytest.approx(-1000 * load, abs=1000 * emulator.FRICTION + 2)
        assert get("present_current") == pytest.approx(
            abs(load) * 2.4 / 0.0065, abs=0.02 * 2.4 / 0.0065 + 2
        )


@pytest.mark.parametrize("signed", [False, True])
def test_sign_of_the_current_both_ways(signed):
    servo, put, get, *_, clock = one(signed_current=signed)
    put(goal_position=2048)
    servo.load = 0.3
    clock.sleep(1.0)
    current = get("present_current")
    assert abs(current) > 50 and (current < 0) == signed
    assert get("present_load") < 0


def test_weak_motor_sags_and_an_unpowered_one_falls():
    servo, put, get, bus, _, clock = one()
    servo.load = -0.3
    put(goal_position=2048)
    clock.sleep(1.0)
    assert servo.position > 2000
    put(torque_limit=150)
    clock.sleep(0.5)
    sagging = servo.position
    assert sagging < 2000
    bus.broadcast_torque_off()
    clock.sleep(0.2)
    get("present_position")
    assert sagging - servo.position > 300


def test_a_load_may_depend_on_the_angle():
    servo, put, get, _, servos, clock = one()
    servo.load = lambda s: (
        -0.3 * math.sin((s.position - 2048) / feetech.STEPS * 2 * math.pi)
    )  # a pendulum, let go
    servo.position = 2500.0
    for _ in range(60):
        clock.sleep(0.1)
        servos.advance()
    assert servo.position == pytest.approx(2048, abs=60) and servo.velocity == 0


def test_other_modes_do_not_drive():
    servo, put, get, *_, clock = one()
    put(mode=1, goal_position=3000, goal_speed=500)
    clock.sleep(1.0)
    assert get("present_position") == 2048 and get("present_current") == 0


def test_asking_often_changes_nothing():
    """The same motion, asked about at the end or every 0.7 ms; and rest in one go or in ticks."""
    ends = []
    for pause in (0.0007, 1.2):
        clock = VirtualClock()
        servos = EmulatedBus([1], clock)
        servo = servos.servos[1]
        servo.load = -0.2
        servo.write(
            41, b"\x14" + encode("goal_position", 2600) + b"\0\0" + encode("goal_speed", 700)
        )
        while clock() < 1.2:
            clock.sleep(min(pause, 1.2 - clock()))
            servos.advance()
        ends.append((servo.encoder, servo.velocity, servo.temperature, servo.duty))
    assert ends[0] == ends[1]
    temperatures = []
    for ticks in (1, 5000):
        servos = EmulatedBus([1], VirtualClock())
        servos.heat(1, 60.0)
        for _ in range(5000 // ticks):
            servos._step([servos.servos[1]], ticks)
        temperatures.append(servos.servos[1].temperature)
    assert (
        temperatures[0]
        == pytest.approx(temperatures[1])
        == pytest.approx(25 + 35 * math.exp(-5 / 200))
    )


def test_at_rest_is_left_by_whatever_moves_it():
    bus, servos, clock = emulated([1])
    servo = servos.servos[1]
    bus.write(1, 42, encode("goal_position", 2500))
    clock.sleep(2.0)
    servos.advance()
    assert servo.at_rest
    servo.position = 2300.0  # pushed
    clock.sleep(1.0)
    servos.advance()
    assert servo.position == pytest.approx(2500, abs=2)
    servo.load = 0.3
    clock.sleep(1.0)
    servos.advance()
    assert servo.position > 2510
    servo.load = 0.0
    clock.sleep(1.0)
    bus.write(1, REGISTERS["homing_offset"][0], encode("homing_offset", 100))
    clock.sleep(1.0)
    servos.advance()
    assert servo.position == pytest.approx(2500, abs=3) and servo.encoder == pytest.approx(
        2600, abs=3
    )


# --- Protections ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("latch", [False, True])
def test_overload_weakens_the_motor_after_its_time(latch):
    """Duty above overload_torque (80 %) for protection_time (200 x 10 ms): bit 0x20 and protective_torque (20 %)."""
    servo, put, get, bus, servos, clock = one(errors_latch=latch)
    put(p=16)
    servos.block(1)
    put(goal_position=2600)
    clock.sleep(1.9)
    assert bus.ping(1).error == 0 and get("present_load") == 1000 and get("present_current") > 300
    clock.sleep(0.2)
    assert bus.ping(1).error == 0x20 and get("present_load") == 200 and get("status") == 0x20
    clock.sleep(10.0)
    assert bus.ping(1).error == 0x20
    put(goal_position=2048)  # nothing more is asked for
    clock.sleep(0.1)
    assert bus.ping(1).error == (0x20 if latch else 0)
    servos.power_cycle(1)
    assert bus.ping(1).error == 0


@pytest.mark.parametrize("latch", [False, True])
def test_too_hot_lets_go_and_cools(latch):
    servo, put, get, bus, servos, clock = one(errors_latch=latch)
    servo.load = -0.3
    put(goal_position=2048)
    clock.sleep(1.0)
    servos.heat(1, 71.0)
    assert bus.ping(1).error == 0x04 and get("present_temperature") == 71
    clock.sleep(0.1)
    assert servo.duty == 0 and abs(get("present_position") - 2048) > 200, (
        "it falls, with torque_enable still 1"
    )
    assert get("torque_enable") == 1
    servo.load = 0.0
    clock.sleep(1.0)
    fallen = servo.position
    assert fallen < 1850
    clock.sleep(60.0)
    assert bus.ping(1).error == (0x04 if latch else 0)
    assert servo.position == pytest.approx(fallen if latch else 2048, abs=4)


def test_unload_mask_decides_what_an_error_does():
    servo, put, get, bus, servos, clock = one()
    put(unload_mask=0, goal_position=2048)
    servo.load = -0.3
    servos.heat(1, 80.0)
    clock.sleep(1.0)
    assert bus.ping(1).error == 0x04 and servo.position > 2000


def test_over_current_switches_off_until_torque_off():
    """Stalled: 2.4 A less the drop of the supply; above 250 x 6.5 mA = 1.6 A for 200 x 10 ms: bit 0x08."""
    servo, put, get, bus, servos, clock = one()
    put(p=16, overload_torque=100, protection_current=250)
    servos.block(1)
    put(goal_position=3000)
    clock.sleep(1.9)
    assert bus.ping(1).error == 0 and get("present_current") > 330
    clock.sleep(0.2)
    assert bus.ping(1).error == 0x08 and get("present_current") == 0
    clock.sleep(5.0)
    assert bus.ping(1).error == 0x08
    bus.broadcast_torque_off()
    clock.sleep(0.1)
    assert bus.ping(1).error == 0


def test_voltage():
    servo, put, get, bus, servos, clock = one(resistance=0.5)
    assert get("present_voltage") == 74 - round(10 * 0.5 * 0.1)
    for volts, error in ((3.5, 1), (7.4, 0), (8.8, 1)):
        servos.voltage = volts
        clock.sleep(0.01)
        assert bus.ping(1).error == error
    servos.voltage = 7.4
    servos.block(1)
    put(p=16, goal_position=3000)
    clock.sleep(0.1)
    drop = 0.5 * (
        2.4 / (1 + 0.5 * 2.4 / 7.4) + 0.1
    )  # I = 2.4 (7.4 - 0.5 I) / 7.4, and the idle current
    assert get("present_voltage") == pytest.approx(74 - 10 * drop, abs=1)


def test_holding_something_heats_a_gripper_in_half_a_minute():
    """Others measured 50 degrees after 30 to 60 s of holding a light object."""
    servo, put, get, _, servos, clock = one()
    servos.block(1)
    put(p=16, goal_position=2048 + 50)  # half the duty
    clock.sleep(45.0)
    assert 45 < get("present_temperature") < 60


# --- As a process -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    pytest.importorskip("termios", reason="needs pseudo-terminals: Linux or macOS")
    with PtyServer(ids=[1, 2], power_up_torque=True, power_up_goal=None) as server:
        yield server


def test_commands_of_the_process(server):
    assert server.state().keys() == {1, 2} and server.state()[1]["torque"] == 1
    server.do("heat", 2, 90.0)
    assert server.state()[2]["error"] == 0x04
    server.do("noise", b"\x01\x02")
    assert (
        server.ask(set="load", id=1, value=0.5)
        == server.ask(set="voltage", value=3.0)
        == {"ok": True}
    )
    assert server.ask(get="written", args=["goal_position"]) == {"writes": []}
    for command in ({"do": "explode"}, {"do": "mute", "args": [99]}, {"do": "mute"}, {"what": 1}):
        with pytest.raises(ValueError):
            server.ask(**command)
    assert server.state().keys() == {1, 2}, "a wrong command does not end it"


def test_command_line_of_the_process(tmp_path):
    pytest.importorskip("termios", reason="needs pseudo-terminals: Linux or macOS")
    link = tmp_path / "so101"
    command = [sys.executable, "-m", "hardware.emulator", "--link", str(link), "--ids", "7"]
    result = subprocess.run(
        command, input='{"get": "state"}\nnonsense\n', text=True, capture_output=True, cwd=ROOT
    )
    first, state, error = map(json.loads, result.stdout.splitlines())
    assert (
        first == {"port": str(link)}
        and state["7"]["position"] == 2048
        and "JSONDecodeError" in error["error"]
    )
    assert result.returncode == 0 and not link.exists() and not link.is_symlink()
    result = subprocess.run(
        [*command, "--options", '{"speed": 9}'], text=True, capture_output=True, cwd=ROOT
    )
    assert result.returncode == 1 and "speed" in result.stderr and result.stderr.count("\n") == 1


# --- Options of the line and the gears --------------------------------------------------------------------------------
def moved_to(servos, clock, goal):
    servos.servos[1].write(
        41, b"\0" + encode("goal_position", goal) + b"\0\0" + encode("goal_speed", 400)
    )
    clock.sleep(2.0)
    servos.advance()
    return servos.servos[1]


def test_gears_with_play_leave_the_shaft_behind_on_the_way_back():
    """A load takes the play up at once; without one the gears turn about 1 degree before the shaft does."""
    clock = VirtualClock()
    servos = EmulatedBus([1], clock, backlash=11.4)
    servo = moved_to(servos, clock, 2200)
    assert abs(servo.position - 2200) < 12 and servo.slack == pytest.approx(-5.7, abs=0.1)
    gears = servo.encoder - servo.slack
    servo = moved_to(servos, clock, 2195)
    assert abs(servo.encoder - servo.slack - gears) > 5 or servo.slack > -5.7
    servo = moved_to(servos, clock, 2000)
    assert servo.slack == pytest.approx(5.7, abs=0.1), "taken up on the other side"
    servo.load = -0.1
    clock.sleep(0.5)
    servos.advance()
    assert servo.slack == pytest.approx(-5.7, abs=0.1)


def test_readings_may_leave_the_turn():
    clock = VirtualClock()
    servos = EmulatedBus([1], clock, readings_wrap=False)
    servo = servos.servos[1]
    servo._set("homing_offset", 500, servo.eeprom), servo.power_up()
    bus = Bus(EmulatedTransport(servos, clock), clock)
    for encoder, reads in ((100, -400), (4000, 3500)):
        servo.encoder = float(encoder)
        assert decode("present_position", bus.read(1, 56, 2).data) == reads
    servo._set("homing_offset", -500, servo.eeprom), servo.power_up()
    assert decode("present_position", bus.read(1, 56, 2).data) == 4500


def test_a_share_of_the_replies_is_lost_and_an_adapter_may_be_slow():
    clock = VirtualClock()
    servos = EmulatedBus([1], clock, loss=0.1)
    bus = Bus(EmulatedTransport(servos, clock), clock, retries=0)
    answered = sum(bool(bus.sync_read([1], 56, 2)) for _ in range(500))
    assert 420 < answered < 480
    servos = EmulatedBus([1], clock, usb_latency=0.016)
    bus = Bus(EmulatedTransport(servos, clock), clock)
    assert 0.016 < bus.round_trip(1) < 0.018
    servos.mute(1)
    assert bus.round_trip(1) is None
