"""The driver of the bus: its bytes against those of the vendor's, every fault in every operation, late replies."""

import random
import sys
from collections import deque

import pytest

from hardware import feetech as ft
from hardware.emulator import EmulatedBus, EmulatedTransport, PtyServer, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, SerialTransport, decode, encode

IDS = range(1, 7)
GOAL, TORQUE, SCRATCH = (
    REGISTERS[name] for name in ("goal_position", "torque_enable", "goal_time")
)


def emulated(ids=IDS, retries=2, **options):
    """(bus, emulated bus, clock) in virtual time."""
    clock = VirtualClock()
    servos = EmulatedBus(ids, clock, **options)
    return Bus(EmulatedTransport(servos, clock), clock, retries=retries), servos, clock


class Recorder:
    """A transport that keeps what is written and answers with given bytes."""

    def __init__(self, *answers: bytes):
        self.sent, self.answers, self.calls = [], list(answers), []

    def write(self, data):
        self.sent.append(data)
        self.calls.append("write")

    def read(self, n, timeout):
        answer = self.answers.pop(0) if self.answers else b""
        if len(answer) > n:
            self.answers.insert(0, answer[n:])
        return answer[:n]

    def flush_input(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


# --- Bytes ------------------------------------------------------------------------------------------------------------
# What the vendor's own software sends, and what the memory table says of broadcasts.
GOLDEN = {
    "ping": (lambda bus: bus.ping(1), "ff ff 01 02 01 fb"),
    "read": (lambda bus: bus.read(1, 56, 2), "ff ff 01 04 02 38 02 be"),
    "write": (lambda bus: bus.write(1, 42, encode("goal_position", 2048)), "ff ff 01 05 03 2a 00 08 c4"),
    "sync_read": (lambda bus: bus.sync_read(IDS, 56, 2), "ff ff fe 0a 82 38 02 01 02 03 04 05 06 26"),
    "sync_write": (lambda bus: bus.sync_write(42, {id: encode("goal_position", 2048) for id in IDS}),
                   "ff ff fe 16 83 2a 02 01 00 08 02 00 08 03 00 08 04 00 08 05 00 08 06 00 08 f7"),
    "torque off": (lambda bus: bus.broadcast_torque_off(), "ff ff fe 04 03 28 00 d2"),
    "action": (lambda bus: bus.action(), "ff ff fe 02 05 fa"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    call, expected = GOLDEN[name]
    transport = Recorder()
    bus = Bus(transport, retries=0)
    if name in ("ping", "read", "write"):
        with pytest.raises(BusError, match="servo 1 does not answer"):
            call(bus)
    else:
        call(bus)
    assert [data.hex(" ") for data in transport.sent] == [expected]
    assert transport.calls == ["flush", "write"], "what came before the request is forgotten first"


def test_a_reply_is_read_as_the_protocol_says():
    # Model of an STS3215 from servo 3 with overload: ff ff 03 04 20 09 03, and ~(03 + 04 + 20 + 09 + 03) = cc
    status = Bus(Recorder(bytes.fromhex("ffff0304200903cc"))).read(3, *REGISTERS["model"])
    assert (status.id, status.error, decode("model", status.data)) == (3, 0x20, 777)
    assert ft.describe_errors(status.error) == "overload"


def test_reg_write_waits_for_action():
    bus, servos, _ = emulated()
    bus.reg_write(2, SCRATCH[0], b"\x07\x00")
    assert (
        servos.servos[2].get("goal_time") == 0
        and bus.read(2, *REGISTERS["reg_write_flag"]).data == b"\x01"
    )
    bus.action()
    assert (
        servos.servos[2].get("goal_time") == 7
        and bus.read(2, *REGISTERS["reg_write_flag"]).data == b"\x00"
    )


@pytest.mark.parametrize("bit", [10, 11, 15])
def test_sign_magnitude_there_and_back(bit):
    top = (1 << bit) - 1
    for value in range(-top, top + 1):
        word = ft.encode_sign_magnitude(value, bit)
        assert word == (value if value >= 0 else (1 << bit) - value)
        assert ft.decode_sign_magnitude(word, bit) == value
    assert ft.decode_sign_magnitude(1 << bit, bit) == 0  # minus zero
    for value in (top + 1, -top - 1):
        with pytest.raises(ValueError, match="does not fit"):
            ft.encode_sign_magnitude(value, bit)


def test_registers_by_name():
    assert encode("homing_offset", -20) == b"\x14\x08"  # sign in bit 11: 0x0814
    assert (
        encode("goal_position", -1) == b"\x01\x80" and encode("present_load", -1000) == b"\xe8\x07"
    )
    assert decode("present_speed", b"\x64\x80") == -100
    block = bytes([0x10, 0x0C, 0x00, 0x00, 0xF4, 0x05, 74, 31, 0, 0, 1, 0, 0, 100, 0])
    names = (
        "present_position",
        "present_load",
        "present_voltage",
        "present_temperature",
        "present_current",
    )
    assert [decode(name, block, 56) for name in names] == [0x0C10, -0x1F4, 74, 31, 100]
    for name, value in (
        ("id", 256),
        ("id", -1),
        ("goal_position", 40_000),
        ("homing_offset", 2048),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            encode(name, value)
    with pytest.raises(ValueError, match="is not among these 2 bytes"):
        decode("present_load", b"\x00\x00", 56)
    spans = sorted(REGISTERS.values())
    assert all(a + n <= b for (a, n), (b, _) in zip(spans, spans[1:], strict=False)), (
        "registers overlap"
    )


def test_error_bits_in_words():
    assert ft.describe_errors(0) == "no error"
    assert ft.describe_errors(0x24) == "too hot, overload" and "0x80" in ft.describe_errors(0x81)
    status = ft.Status(4, 0x04, b"", 0.0)
    with pytest.raises(BusError, match="servo 4 reports: too hot") as caught:
        ft.check(status)
    assert (caught.value.kind, caught.value.ids) == ("status", (4,))
    assert ft.check(ft.Status(4, 0, b"", 0.0)).id == 4


def test_requests_that_may_switch_torque_on_are_told_from_others():
    clock = VirtualClock()
    servos = EmulatedBus([1], clock)
    bus, servo = Bus(EmulatedTransport(servos, clock), clock), servos.servos[1]
    size = {name: size for name, (_, size) in REGISTERS.items()}
    for name in (
        "torque_enable",
        "acceleration",
        "goal_position",
        "goal_speed",
        "lock",
        "max_torque",
    ):
        for value in (0, 1):
            for write in (
                lambda at, data: bus.sync_write(at, {1: data}),
                bus.broadcast_write,
                lambda at, data: bus.write(1, at, data),
                lambda at, data: (bus.reg_write(1, at, data), bus.action()),
            ):
                servo.registers[40], bus.limp = 0, {1}
                write(REGISTERS[name][0], value.to_bytes(size[name], "little"))
                assert not (servo.torque and bus.limp), (name, value)
    bus.limp = {1}
    bus.sync_write(41, {1: bytes(7)})
    assert not bus.limp, "acceleration, goal and speed in one"
    for call in (bus.broadcast_torque_off, lambda: bus.sync_write(40, {1: b"\0"})):
        bus.limp = {1}
        call()
        bus.ping(1), bus.read(1, 40, 4), bus.sync_read([1], 40, 4)
        assert bus.limp == {1}


def test_no_broken_byte_passes():
    """Whatever single byte of a reply is wrong, no reply of the right length comes out."""
    whole = ft.packet(3, 0, bytes(range(15)))
    assert ft.frames(whole) == ([(3, 0, bytes(range(15)))], 0)
    for at in range(len(whole)):
        for value in set(range(256)) - {whole[at]}:
            broken = whole[:at] + bytes((value,)) + whole[at + 1 :]
            assert not [data for _, _, data in ft.frames(broken)[0] if len(data) == 15]
    for end in range(len(whole)):
        assert ft.frames(whole[:end]) == ([], end)


def test_packets_among_noise_are_found():
    draw = random.Random(0)
    for _ in range(300):
        packets = [ft.packet(draw.randrange(254), draw.randrange(64), draw.randbytes(draw.randrange(20)))
                   for _ in range(4)]  # fmt: skip
        stream = b"\x00\xff".join(packets) + b"\xff\xff\x01"
        found, rest = ft.frames(stream)
        assert [ft.packet(*one) for one in found] == packets and rest == 3 * 2 + 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bus: bus.sync_read([], 56, 2), "cannot read"),
        (lambda bus: bus.sync_read([1, 1], 56, 2), "cannot read"),
        (lambda bus: bus.read(1, 120, 9), "cannot read"),
        (lambda bus: bus.ping(255), "id 255 is not one of"),
        (lambda bus: bus.write(ft.BROADCAST, 40, b"\0"), "nobody confirms a broadcast"),
        (lambda bus: bus.sync_write(42, {1: b"\0\0", 2: b"\0"}), "all need as many"),
        (lambda bus: bus.sync_write(42, {}), "all need as many"),
    ],
)
def test_misuse_is_refused_before_a_byte_is_sent(call, message):
    transport = Recorder()
    with pytest.raises(ValueError, match=message):
        call(Bus(transport))
    assert not transport.sent


# --- Every fault in every operation -----------------------------------------------------------------------------------
# Each does its work on servo 3, or on all six, and returns what the test can compare.
OPERATIONS = {
    "ping": lambda bus: bus.ping(3).id,
    "read": lambda bus: bus.read(3, *REGISTERS["model"]).data,
    "write": lambda bus: bus.write(3, SCRATCH[0], b"\x05\x00").id,
    "reg_write": lambda bus: bus.reg_write(3, SCRATCH[0], b"\x05\x00").id,
    "sync_read": lambda bus: {
        id: status.data for id, status in bus.sync_read(IDS, *REGISTERS["id"]).items()
    },
    "scan": lambda bus: bus.scan(IDS),
    "sync_write": lambda bus: bus.sync_write(SCRATCH[0], {id: b"\x05\x00" for id in IDS}),
    "broadcast_write": lambda bus: bus.broadcast_write(SCRATCH[0], b"\x05\x00"),
    "broadcast_torque_off": lambda bus: bus.broadcast_torque_off(),
    "action": lambda bus: bus.action(),
}
FAULTLESS = {"ping": 3, "read": b"\x09\x03", "write": 3, "reg_write": 3, "sync_read": {id: bytes((id,)) for id in IDS},
             "scan": list(IDS)}  # fmt: skip
ANSWERED = ("ping", "read", "write", "reg_write")
# fault -> (how it begins, how it ends, what the answered operations end as: None for the faultless result)
FAULTS = {
    "one wrong checksum": (lambda s: s.corrupt(), lambda s: None, None),
    "wrong checksums": (lambda s: s.corrupt(1000), lambda s: s.corrupt(-s._corrupt), "corrupt"),
    "one reply lost": (lambda s: s.drop(3), lambda s: None, None),
    "replies lost": (lambda s: s.drop(3, 1000), lambda s: s._drop.clear(), "timeout"),
    "one request lost": (lambda s: s.lose(), lambda s: None, None),
    "requests lost": (lambda s: s.lose(1000), lambda s: s.lose(-s._lose), "timeout"),
    "one reply late": (lambda s: s.delay(3, 0.015), lambda s: None, None),
    "replies late": (lambda s: s.delay(3, 0.045, 1000), lambda s: s._delay.clear(), "timeout"),
    "a zero byte in front": (lambda s: s.noise(b"\x00"), lambda s: None, None),
    "half a header in front": (lambda s: s.noise(b"\xff"), lambda s: None, None),
    "a header in front": (lambda s: s.noise(b"\xff\xff"), lambda s: None, None),
    "half a packet in front": (lambda s: s.noise(b"\xff\xff\x03\x04\x00"), lambda s: None, None),
    "another servo's reply in front": (
        lambda s: s.noise(ft.packet(9, 0, b"\x01\x02")),
        lambda s: None,
        None,
    ),
    "much noise in front": (
        lambda s: s.noise(random.Random(3).randbytes(200)),
        lambda s: None,
        None,
    ),
    "muted": (lambda s: s.mute(3), lambda s: s.mute(3, False), "timeout"),
    "disconnected": (lambda s: s.disconnect(3), lambda s: s.disconnect(3, False), "timeout"),
    "too hot": (lambda s: s.heat(3, 75.0), lambda s: s.heat(3, 30.0), None),
    "blocked": (lambda s: s.block(3), lambda s: s.block(3, False), None),
    "power lost for a moment": (lambda s: s.power_cycle(3), lambda s: None, None),
    "wrong baud rate": (
        lambda s: s.wrong_baud(id=3),
        lambda s: s.wrong_baud(1_000_000, 3),
        "timeout",
    ),
    "two with one id, at once": (
        lambda s: s.duplicate(3, skew=3e-5),
        lambda s: s.twins.clear(),
        "corrupt",
    ),
    "unplugged": (lambda s: s.unplug(), lambda s: s.unplug(False), "port"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_fault_in_every_operation(operation, fault):
    begin, end, kind = FAULTS[fault]
    bus, servos, clock = emulated()
    bus.write(3, SCRATCH[0], b"\x00\x00")
    begin(servos)
    before, (answered, kind) = clock(), (operation in ANSWERED, kind)
    try:
        result = OPERATIONS[operation](bus)
    except BusError as error:
        assert error.kind == kind and (answered or kind == "port"), str(error)
        assert error.ids == ((3,) if kind != "port" else ()) and "\n" not in str(error)
        result = error
    else:
        assert not (answered and kind) and kind != "port", "the fault went unnoticed"
        if answered:
            assert result == FAULTLESS[operation]
        elif operation == "sync_read":
            missing = {None: set(), "corrupt": {3} if "id" in fault else set(IDS)}.get(kind, {3})
            missing = set(IDS) if fault == "requests lost" else missing
            # A late reply of one servo keeps the bytes behind it waiting too: order is kept.
            missing = {3, 4, 5, 6} if fault == "replies late" else missing
            assert result.keys() == set(IDS) - missing
            assert all(result[id] == FAULTLESS[operation][id] for id in result)
    asked = len(IDS) if operation == "scan" else 1 + bus.retries
    assert clock() - before <= 2 * (asked + 1) * bus.timeout + 0.01, "took too long"
    # Afterwards everything is as before.
    end(servos)
    clock.sleep(0.2)
    assert bus.write(3, SCRATCH[0], b"\x09\x00").id == 3 and servos.servos[3].get("goal_time") == 9
    assert bus.read(3, *SCRATCH).data == b"\x09\x00"
    assert bus.sync_read(IDS, *REGISTERS["id"]).keys() == set(IDS)
    again = OPERATIONS[operation](bus)
    assert again == FAULTLESS.get(operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unplugging_in_the_middle(operation):
    """At each moment of an operation: it ends with the port's error or, if it was over by then, as usual."""
    ends = set()
    for step in range(60):
        bus, servos, clock = emulated()
        servos.drop(3, 2)
        clock.at(step * 1e-3, servos.unplug)
        try:
            OPERATIONS[operation](bus)
            ends.add("over")
        except BusError as error:
            assert error.kind == "port"
            ends.add("port")
        assert clock() <= 0.1
        clock.sleep(0.1)
        with pytest.raises(BusError, match="is the adapter still plugged in"):
            bus.broadcast_torque_off()
    # Without an answer to come, nothing is waited for.
    assert ends == ({"over", "port"} if operation in FAULTLESS else {"over"})


@pytest.mark.parametrize("bit", ft.ERROR_BITS)
@pytest.mark.parametrize("operation", ["ping", "read", "write", "reg_write", "sync_read"])
def test_error_bits_surface_in_the_same_call(operation, bit):
    bus, servos, _ = emulated()
    call = {
        "ping": lambda: bus.ping(3),
        "read": lambda: bus.read(3, 56, 15),
        "write": lambda: bus.write(3, SCRATCH[0], b"\0\0"),
        "reg_write": lambda: bus.reg_write(3, SCRATCH[0], b"\0\0"),
        "sync_read": lambda: bus.sync_read(IDS, 56, 15)[3],
    }[operation]
    assert call().error == 0
    servos.error(3, bit)
    assert call().error == bit
    assert bus.sync_read(IDS, 56, 15)[2].error == 0
    servos.error(3, 0)
    assert call().error == 0


def test_statistics_count_what_happened():
    bus, servos, _ = emulated()
    bus.read(1, 56, 2)
    assert bus.statistics == dict(requests=1, retries=0, timeouts=0, corrupt=0)
    servos.corrupt()
    servos.drop(1)  # the second of the two attempts: corrupt is used up by then
    servos._drop[1] = 0
    bus.read(1, 56, 2)
    assert bus.statistics == dict(requests=3, retries=1, timeouts=0, corrupt=1)
    servos.drop(1)
    bus.read(1, 56, 2)
    assert bus.statistics == dict(requests=5, retries=2, timeouts=1, corrupt=1)


def test_the_time_of_a_status_is_that_of_the_request_that_was_answered():
    bus, servos, clock = emulated()
    clock.sleep(5.0)
    assert bus.read(1, 56, 2).time == 5.0
    servos.drop(1)
    before = clock()
    assert bus.read(1, 56, 2).time == pytest.approx(before + bus.timeout)


def test_a_budget_is_shared_by_all_attempts():
    bus, servos, clock = emulated(retries=2)
    servos.mute(3)
    before = clock()
    assert 3 not in bus.sync_read(IDS, 56, 15, budget=0.016)
    assert clock() - before <= 0.0161 and bus.statistics["requests"] == 3
    with pytest.raises(BusError, match="servo 3 does not answer"):
        bus.read(3, 56, 2, budget=0.001)
    assert bus.statistics["requests"] == 6


@pytest.mark.parametrize("absent_blocks", [False, True])
@pytest.mark.parametrize("absent", [{1}, {3}, {6}, {2, 5}])
def test_absent_servos_do_not_hide_the_others(absent, absent_blocks):
    """Whether or not the servos behind a silent one wait for it for ever."""
    bus, _, _ = emulated([id for id in IDS if id not in absent], absent_blocks=absent_blocks)
    for _ in range(20):
        assert bus.sync_read(IDS, 56, 15).keys() == set(IDS) - absent
    assert bus.scan(IDS) == [id for id in IDS if id not in absent]


def test_two_servos_with_one_id():
    """One after the other: a ping notices. At once, with different content: garbled. Equal in every bit: unnoticed."""
    bus, servos, _ = emulated()
    servos.duplicate(3, skew=0.002)
    with pytest.raises(BusError, match="do two servos have it") as caught:
        bus.ping(3)
    assert (caught.value.kind, caught.value.ids) == ("corrupt", (3,))
    bus, servos, _ = emulated()
    servos.duplicate(3, position=1111.0)
    with pytest.raises(BusError, match="two servos with this id"):
        bus.read(3, *REGISTERS["present_position"])
    assert bus.ping(3).id == 3 and bus.scan(IDS) == list(IDS)


# --- Late replies -----------------------------------------------------------------------------------------------------
def restless(seed: int, forgetful: bool, writes: bool) -> int:
    """Reads (or writes) a register that holds the number of the call, with replies that come late or never at random.

    Returns how many calls ended well but with an answer that belonged to another call. forgetful: a driver that does
    not keep in mind which replies may still come.
    """
    draw = random.Random(seed)
    bus, servos, clock = emulated()
    if forgetful:
        bus._late = {id: deque(maxlen=0) for id in range(255)}
    wrong = good = 0
    for number in range(1200):
        for id in draw.sample(list(IDS), 2):
            if draw.random() < 0.25:
                servos.delay(id, draw.uniform(0.0, 0.06))
            if draw.random() < 0.05:
                servos.drop(id)
        if writes and draw.random() < 0.3:
            servos.lose()
        value = number.to_bytes(2, "little")
        id = draw.choice(IDS)
        try:
            if writes:
                bus.write(id, SCRATCH[0], value)
                got = {id: bytes(servos.servos[id].registers[SCRATCH[0] : sum(SCRATCH)])}
            else:
                for servo in (
                    servos.servos.values()
                ):  # what is true now: an older reply holds an older number
                    servo.registers[SCRATCH[0] : sum(SCRATCH)] = value
                answers = (
                    bus.sync_read(IDS, *SCRATCH)
                    if draw.random() < 0.5
                    else {id: bus.read(id, *SCRATCH)}
                )
                got = {id: status.data for id, status in answers.items()}
        except BusError:
            got = {}
        wrong += any(data != value for data in got.values())
        good += bool(got)
        clock.sleep(draw.choice((0.0, 0.0, 0.002, 0.02)))
    assert good > 400
    return wrong


@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_a_late_reply_is_never_used(writes):
    assert sum(restless(seed, False, writes) for seed in range(3)) == 0


@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_without_its_memory_the_driver_would_use_late_replies(writes):
    """The test above can fail: it does for a driver that only forgets old input before each request."""
    assert restless(0, True, writes) > 0


def test_a_line_that_has_become_slow_does_not_lag():
    """Every reply comes after the time-out: nothing is returned at all, rather than what was true a cycle ago."""
    bus, servos, clock = emulated()
    servos.delay(3, 0.012, 100_000)
    for number in range(200):
        for servo in servos.servos.values():
            servo.registers[SCRATCH[0]] = number
        clock.sleep(0.1)
        assert all(status.data[0] == number for status in bus.sync_read(IDS, *SCRATCH).values())


# --- Real ports -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    pytest.importorskip("serial", reason='needs pyserial: pip install -e ".[hardware]"')
    pytest.importorskip("termios", reason="needs pseudo-terminals: Linux or macOS")
    with PtyServer() as server:
        yield server


def test_over_a_port_of_the_system(server):
    transport = SerialTransport(server.port)
    bus = Bus(transport, timeout=2.0)
    try:
        assert bus.scan(range(1, 4)) == [1, 2, 3]
        bus.write(2, GOAL[0], encode("goal_position", 2048))
        statuses = bus.sync_read(IDS, 56, 15)
        assert statuses.keys() == set(IDS) and decode("present_voltage", statuses[1].data, 56) == 74
        server.do("corrupt", 1)
        assert (
            bus.read(5, *REGISTERS["model"]).data == b"\x09\x03" and bus.statistics["corrupt"] == 1
        )
        bus.broadcast_torque_off()
        assert bus.read(2, *TORQUE).data == b"\x00"
        with pytest.raises(BusError, match="in use by another program: close it first"):
            SerialTransport(server.port)
    finally:
        transport.close()


def test_wrong_baud_rate_of_a_port(server):
    transport = SerialTransport(server.port, 500_000)
    with pytest.raises(BusError, match="servo 1 does not answer") as caught:
        Bus(transport, timeout=0.2, retries=0).ping(1)
    assert caught.value.kind == "timeout"
    transport.close()


def test_unplugging_a_port():
    """Every method of a port that is gone ends with one sentence; nothing hangs, nothing else is raised."""
    pytest.importorskip("serial", reason='needs pyserial: pip install -e ".[hardware]"')
    with PtyServer() as server:
        port = server.port
        transport = SerialTransport(port)
        bus = Bus(transport, timeout=2.0)
        assert bus.read(1, *REGISTERS["id"]).data == b"\x01"
        server.do("unplug")
        for name, operation in OPERATIONS.items():
            with pytest.raises(
                BusError, match=f"{port} failed .* is the adapter still plugged in"
            ) as caught:
                operation(bus)
            assert caught.value.kind == "port", name
        for call in (
            lambda: transport.read(1, 1.0),
            lambda: transport.write(b"x"),
            transport.flush_input,
        ):
            with pytest.raises(BusError, match="still plugged in"):
                call()
        transport.close()
        transport.close()
        with pytest.raises(BusError, match=f"there is no port {port}"):
            SerialTransport(port)
        server.do("unplug", False)
        transport = SerialTransport(server.port)
        assert Bus(transport, timeout=2.0).read(1, *REGISTERS["id"]).data == b"\x01"
        transport.close()


def test_without_pyserial(monkeypatch):
    monkeypatch.setitem(sys.modules, "serial", None)
    with pytest.raises(BusError, match=r"pip install -e \"\.\[hardware\]\""):
        SerialTransport("/dev/null")


def test_what_is_no_serial_port(tmp_path):
    pytest.importorskip("serial", reason='needs pyserial: pip install -e ".[hardware]"')
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BusError, match=f"cannot open {file}"):
        SerialTransport(str(file))
