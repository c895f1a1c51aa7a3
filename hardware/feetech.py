"""Driver for the half-duplex serial bus of Feetech's STS and SMS servos, the ones of the SO-101.

A packet is FF FF, id, length, instruction (in a reply: error bits), parameters, checksum, with
length = parameters + 2 and checksum = ~(sum of everything behind FF FF) & FF; numbers are little-endian, and signed
ones are sign and magnitude, not two's complement.

What a caller may rely on:
 1. Every failure is a `BusError` with one sentence; no exception of the port's library comes through.
 2. A reply is used only if id, length and checksum are exactly those that the request calls for.
 3. A reply that comes too late is never taken for the answer to a later request. Packets carry no number, so the
    length serves as one: as long as an answer may still be on its way, the next read asks for a few bytes more than
    it needs, and a write, whose answer has no length to vary, follows such a read. This relies on adapters keeping
    bytes in order, and on a reply being at most `LATE` requests late.
 4. The error bits of every reply are in its `Status`, in the same call.
 5. A call asks 1 + retries times and waits `timeout` for each, or an equal share of its `budget`; twice that where a
    write follows a lost answer. `ping` listens for one more.

    bus = Bus(SerialTransport("/dev/ttyACM0"))
    status = bus.sync_read(range(1, 7), *REGISTERS["present_position"])
    {id: decode("present_position", s.data) for id, s in status.items()}
"""

import errno
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

try:
    import termios

    PORT_ERRORS: tuple[type[Exception], ...] = (
        OSError,
        termios.error,
    )  # termios.error is not an OSError
except ImportError:  # Windows
    PORT_ERRORS = (OSError,)

BROADCAST = 0xFE
PING, READ, WRITE, REG_WRITE, ACTION, SYNC_READ, SYNC_WRITE = (
    0x01,
    0x02,
    0x03,
    0x04,
    0x05,
    0x82,
    0x83,
)
BAUD_RATES = (
    1_000_000,
    500_000,
    250_000,
    128_000,
    115_200,
)  # by code; the tables disagree about higher codes
STEPS = 4096  # of the encoder, a turn
CURRENT_UNIT = 0.0065  # A a step of present_current and protection_current
LATE = 8  # unanswered requests that a servo may still answer (3. above)

# name -> (address, size in bytes), STS3215
REGISTERS: dict[str, tuple[int, int]] = {
    "firmware": (0, 2), "model": (3, 2), "id": (5, 1), "baud_code": (6, 1), "return_delay": (7, 1),
    "response_level": (8, 1), "min_position": (9, 2), "max_position": (11, 2), "max_temperature": (13, 1),
    "max_voltage": (14, 1), "min_voltage": (15, 1), "max_torque": (16, 2), "phase": (18, 1), "unload_mask": (19, 1),
    "led_mask": (20, 1), "p": (21, 1), "d": (22, 1), "i": (23, 1), "min_start_force": (24, 2), "dead_zone_up": (26, 1),
    "dead_zone_down": (27, 1), "protection_current": (28, 2), "angular_resolution": (30, 1), "homing_offset": (31, 2),
    "mode": (33, 1), "protective_torque": (34, 1), "protection_time": (35, 1), "overload_torque": (36, 1),
    "over_current_time": (38, 1),
    # from here on lost at power-off
    "torque_enable": (40, 1), "acceleration": (41, 1), "goal_position": (42, 2), "goal_time": (44, 2),
    "goal_speed": (46, 2), "torque_limit": (48, 2), "lock": (55, 1), "present_position": (56, 2),
    "present_speed": (58, 2), "present_load": (60, 2), "present_voltage": (62, 1), "present_temperature": (63, 1),
    "reg_write_flag": (64, 1), "status": (65, 1), "moving": (66, 1), "present_current": (69, 2),
    "max_speed": (84, 1), "max_acceleration": (85, 1),
}  # fmt: skip
EEPROM_END = 40  # registers below are kept without power, and wear out
SIGN_BITS = {"homing_offset": 11, "goal_position": 15, "goal_speed": 15, "present_position": 15, "present_speed": 15,
             "present_load": 10, "present_current": 15}  # fmt: skip
MODELS = {777: "STS3215"}
ERROR_BITS = {0x01: "voltage out of range", 0x02: "encoder fault", 0x04: "too hot", 0x08: "over-current",
              0x10: "angle fault", 0x20: "overload"}  # fmt: skip


class BusError(Exception):
    """Port or protocol failed. kind: port, timeout (no answer), corrupt (no usable one), status (error bits set),
    stopped (the watchdog has taken the bus). ids: the servos concerned, if known."""

    def __init__(self, message: str, ids: Iterable[int] = (), kind: str = "port"):
        super().__init__(message)
        self.ids, self.kind = tuple(ids), kind


@dataclass(frozen=True)
class Status:
    """A servo's reply. error: bits of ERROR_BITS. time: when the request went out; `data` is not older than that."""

    id: int
    error: int
    data: bytes
    time: float


# --- Numbers ----------------------------------------------------------------------------------------------------------
def encode_sign_magnitude(value: int, bit: int) -> int:
    """The magnitude in the bits below `bit`, the sign in it. Raises ValueError where the magnitude does not fit."""
    if abs(value) >= 1 << bit:
        raise ValueError(f"{value} does not fit in sign and {bit} bits of magnitude")
    return abs(value) | (value < 0) << bit


def decode_sign_magnitude(word: int, bit: int) -> int:
    """The opposite of `encode_sign_magnitude`; bits above the sign are ignored."""
    magnitude = word & (1 << bit) - 1
    return -magnitude if word >> bit & 1 else magnitude


def encode(name: str, value: int) -> bytes:
    """The bytes of a register of this name. Raises ValueError where the value does not fit."""
    size = REGISTERS[name][1]
    word = encode_sign_magnitude(value, SIGN_BITS[name]) if name in SIGN_BITS else value
    if not 0 <= word < 1 << 8 * size:
        raise ValueError(f"{name}: {value} does not fit in {size} byte{'s' * (size > 1)}")
    return word.to_bytes(size, "little")


def decode(name: str, data: bytes, start: int | None = None) -> int:
    """The value of the register of this name; start: address of data[0], where data is not that register alone."""
    address, size = REGISTERS[name]
    offset = 0 if start is None else address - start
    if offset < 0 or offset + size > len(data):
        raise ValueError(f"{name} (address {address}) is not among these {len(data)} bytes")
    word = int.from_bytes(data[offset : offset + size], "little")
    return decode_sign_magnitude(word, SIGN_BITS[name]) if name in SIGN_BITS else word


def describe_errors(error: int) -> str:
    """The set bits in words: "too hot, overload"; "no error" for 0."""
    names = [text for bit, text in ERROR_BITS.items() if error & bit]
    unknown = error & ~sum(ERROR_BITS)
    return ", ".join(names + [f"unknown bits {unknown:#04x}"] * bool(unknown)) or "no error"


def check(status: Status) -> Status:
    """Returns the status, or raises BusError(kind="status") if any of its error bits is set."""
    if status.error:
        raise BusError(
            f"servo {status.id} reports: {describe_errors(status.error)}", [status.id], "status"
        )
    return status


# --- Packets ----------------------------------------------------------------------------------------------------------
def checksum(body: bytes) -> int:
    """Of everything between FF FF and the checksum itself."""
    return ~sum(body) & 0xFF


def packet(id: int, instruction: int, parameters: bytes = b"") -> bytes:
    """An instruction; with the error bits in place of the instruction, a reply."""
    if not 0 <= id <= BROADCAST:
        raise ValueError(f"id {id} is not one of 0 to 253, or {BROADCAST} for all")
    body = bytes((id, len(parameters) + 2, instruction)) + parameters
    return b"\xff\xff" + body + bytes((checksum(body),))


def may_switch_on(request: bytes) -> bool:
    """Whether a servo may have torque after this request: it writes to a goal, or other than 0 to torque_enable."""
    instruction, address = request[4], request[5]
    if instruction == ACTION:
        return True
    if instruction not in (WRITE, REG_WRITE, SYNC_WRITE):
        return False
    first, last = REGISTERS["torque_enable"][0], sum(REGISTERS["goal_position"])
    size = request[6] if instruction == SYNC_WRITE else len(request) - 7
    values = request[8:-1:2] if instruction == SYNC_WRITE else request[6:-1]
    off = (address, size) == (first, 1) and not any(values)
    return address < last and address + size > first and not off


def frames(buffer: bytes) -> tuple[list[tuple[int, int, bytes]], int]:
    """The valid packets in `buffer`, (id, error bits, data) each, and the number of bytes that belong to none."""
    found, at, rest = [], 0, len(buffer)
    while (at := buffer.find(b"\xff\xff", at)) >= 0 and at + 6 <= len(buffer):
        end = at + 4 + buffer[at + 3]
        body = buffer[at + 2 : end - 1]
        if len(body) >= 3 and end <= len(buffer) and checksum(body) == buffer[end - 1]:
            found.append((body[0], body[2], body[3:]))
            rest -= end - at
            at = end
        else:
            at += 1
    return found, rest


# --- Port -------------------------------------------------------------------------------------------------------------
class SerialTransport:
    """A serial port. A transport of another kind has the same five methods and raises BusError as this one does."""

    def __init__(self, port: str, baud: int = 1_000_000):
        try:
            import serial
        except ImportError:
            raise BusError('pyserial is not installed: pip install -e ".[hardware]"') from None
        self.port = port
        try:
            # Reads return after a millisecond: changing pyserial's time-out for each read would set up the port anew.
            self.serial = serial.Serial(
                port, baud, timeout=0.001, write_timeout=0.1, exclusive=True
            )
        except (*PORT_ERRORS, ValueError) as error:
            raise BusError(self._cannot_open(error)) from None

    def _cannot_open(self, error: Exception) -> str:
        number, text = getattr(error, "errno", None), str(error)
        if number == errno.ENOENT or "could not open port" in text and "FileNotFound" in text:
            from serial.tools.list_ports import comports

            here = ", ".join(sorted(port.device for port in comports())) or "none"
            return f"there is no port {self.port}: is the adapter plugged in? Ports found: {here}"
        if number == errno.EACCES:
            return f"no permission to open {self.port}: add yourself to its group (sudo usermod -aG dialout $USER)"
        if number in (errno.EAGAIN, errno.EBUSY):
            return f"{self.port} is in use by another program: close it first"
        return f"cannot open {self.port}: {text}"

    def _failed(self, error: Exception) -> BusError:
        text = error.args[-1] if error.args else type(error).__name__
        return BusError(
            f"{self.port} failed ({text}): is the adapter still plugged in and powered?"
        )

    def write(self, data: bytes) -> None:
        """Hands all bytes to the port."""
        try:
            self.serial.write(data)
        except PORT_ERRORS as error:
            raise self._failed(error) from None

    def read(self, n: int, timeout: float) -> bytes:
        """Up to n bytes; fewer only when `timeout` seconds are over."""
        deadline, data = time.monotonic() + timeout, b""
        try:
            while True:
                data += self.serial.read(n - len(data))
                if len(data) >= n or time.monotonic() >= deadline:
                    return data
        except PORT_ERRORS as error:
            raise self._failed(error) from None

    def flush_input(self) -> None:
        """Forgets what has arrived."""
        try:
            self.serial.reset_input_buffer()
        except PORT_ERRORS as error:
            raise self._failed(error) from None

    def fileno(self) -> int:
        """The port's file descriptor, for the watchdog."""
        return self.serial.fileno()

    def close(self) -> None:
        """Closes the port; a port that is gone already is closed too."""
        try:
            self.serial.close()
        except PORT_ERRORS:
            pass


# --- Bus --------------------------------------------------------------------------------------------------------------
class Bus:
    """Requests and replies over a transport. Not for several threads at once."""

    def __init__(
        self,
        transport,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = 0.01,
        retries: int = 2,
    ):
        """timeout: seconds that one request is waited for; retries: further requests after a failed one."""
        self.transport, self.clock, self.timeout, self.retries = transport, clock, timeout, retries
        self.statistics = dict(requests=0, retries=0, timeouts=0, corrupt=0)
        # ids that have said that their torque is off, with nothing sent since that switches it on
        self.limp: set[int] = set()
        # id -> numbers of data bytes of the replies that may still be on their way
        self._late: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=LATE))

    # Reads
    def read(self, id: int, address: int, size: int, budget: float | None = None) -> Status:
        """The bytes of one servo's registers; see `sync_read`. Raises BusError if no valid reply comes."""
        found, garbled = self._read(READ, [id], address, size, budget)
        if id not in found:
            raise self._no_answer(id, garbled)
        return found[id]

    def sync_read(
        self, ids: Iterable[int], address: int, size: int, budget: float | None = None
    ) -> dict[int, Status]:
        """The same registers of several servos. Who has not answered after all retries is not in the result.

        budget: seconds in which everything, retries included, has to be over: each request waits for its share of it.
        None: each waits for the bus's time-out.
        """
        return self._read(SYNC_READ, list(ids), address, size, budget)[0]

    def _read(
        self, instruction: int, missing: list[int], address: int, size: int, budget: float | None
    ):
        if (
            not missing
            or size < 1
            or address < 0
            or address + size > 128
            or len(set(missing)) < len(missing)
        ):
            raise ValueError(f"cannot read {size} bytes at {address} of the servos {missing}")
        timeout = self.timeout if budget is None else budget / (1 + self.retries)
        found: dict[int, Status] = {}
        garbled = False
        for attempt in range(1 + self.retries):
            # A number of bytes that no reply on its way has.
            late = {length for id in missing for length in self._late[id]}
            asked = next((n for n in range(size, 128 - address + 1) if n not in late), size)
            if instruction == READ:
                request = packet(missing[0], READ, bytes((address, asked)))
            else:
                request = packet(BROADCAST, SYNC_READ, bytes((address, asked, *missing)))
            sent = self.clock()
            answers, broken = self._exchange(request, missing, asked, attempt > 0, timeout)
            garbled |= broken
            for id, (error, data) in answers.items():
                found[id] = Status(id, error, data[:size], sent)
            missing = [id for id in missing if id not in answers]
            if not missing:
                break
            # A servo may wait for the one before it in the list; the first that is missing goes to the end.
            missing = missing[1:] + missing[:1]
        return found, garbled

    # Writes and ping
    def ping(self, id: int) -> Status:
        """Asks whether a servo is there. Raises BusError if not, or if two servos answer to this id."""
        status = self._confirmed(packet(id, PING), id)
        if self.transport.read(1, self.timeout):
            self.statistics["corrupt"] += 1
            raise BusError(
                f"more than one answer to a ping of id {id}: do two servos have it?",
                [id],
                "corrupt",
            )
        return status

    def write(self, id: int, address: int, data: bytes) -> Status:
        """Writes registers of one servo and waits for its confirmation. Raises BusError if none comes."""
        return self._confirmed(packet(id, WRITE, bytes((address,)) + data), id)

    def reg_write(self, id: int, address: int, data: bytes) -> Status:
        """As `write`, but the servo waits for `action` before it does it."""
        return self._confirmed(packet(id, REG_WRITE, bytes((address,)) + data), id)

    def action(self) -> None:
        """Lets all servos carry out what `reg_write` gave them. Nobody confirms."""
        self._send(packet(BROADCAST, ACTION))

    def sync_write(self, address: int, values: Mapping[int, bytes]) -> None:
        """Writes the same registers of several servos, each its own bytes. Nobody confirms."""
        sizes = {len(data) for data in values.values()}
        if len(sizes) != 1 or BROADCAST in values:
            raise ValueError(
                f"sync_write: {len(values)} servos with {sorted(sizes)} bytes; all need as many"
            )
        body = b"".join(bytes((id,)) + data for id, data in values.items())
        self._send(packet(BROADCAST, SYNC_WRITE, bytes((address, *sizes)) + body))

    def broadcast_write(self, address: int, data: bytes) -> None:
        """Writes the same bytes to all servos, also those with error bits or without a voice. Nobody confirms."""
        self._send(packet(BROADCAST, WRITE, bytes((address,)) + data))

    def broadcast_torque_off(self) -> None:
        """Lets go of all motors. Nobody confirms: read torque_enable afterwards."""
        self.broadcast_write(REGISTERS["torque_enable"][0], b"\x00")

    def scan(self, ids: Iterable[int] = range(1, 21)) -> list[int]:
        """The ids that answer, each asked once."""
        found = []
        for id in ids:
            answers, garbled = self._exchange(packet(id, PING), [id], 0)
            if answers or garbled:
                found.append(id)
        return found

    def round_trip(self, id: int, patience: float = 0.1) -> float | None:
        """Seconds from a request to its answer, the shortest of five; None where no answer comes within `patience`."""
        times = []
        for _ in range(5):
            begin = self.clock()
            if self._exchange(packet(id, PING), [id], 0, timeout=patience)[0]:
                times.append(self.clock() - begin)
            elif not times:
                return None
        return min(times)

    def close(self) -> None:
        self.transport.close()

    def _confirmed(self, request: bytes, id: int) -> Status:
        """Sends until the servo's reply without data comes."""
        if id == BROADCAST:
            raise ValueError("nobody confirms a broadcast: use broadcast_write or sync_write")
        garbled = False
        for attempt in range(1 + self.retries):
            if 0 in self._late[id] and not self._drain(id):
                # A late confirmation could not be told from the one to come: send, but do not count on an answer.
                self._send(request, retry=attempt > 0)
                self._late[id].append(0)
                continue
            sent = self.clock()
            answers, broken = self._exchange(request, [id], 0, retry=attempt > 0)
            garbled |= broken
            if id in answers:
                return Status(id, answers[id][0], b"", sent)
        raise self._no_answer(id, garbled)

    def _drain(self, id: int) -> bool:
        """Reads something of unmistakable length: behind its reply nothing old can come."""
        address = REGISTERS["id"][0]
        size = next(n for n in range(1, LATE + 2) if n not in self._late[id])
        return (
            id
            in self._exchange(packet(id, READ, bytes((address, size))), [id], size, retry=True)[0]
        )

    # The line
    def _send(self, request: bytes, retry: bool = False) -> None:
        self.statistics["requests"] += 1
        self.statistics["retries"] += retry
        if may_switch_on(request):
            self.limp.clear()
        self.transport.flush_input()
        self.transport.write(request)

    def _exchange(
        self,
        request: bytes,
        ids: list[int],
        size: int,
        retry: bool = False,
        timeout: float | None = None,
    ):
        """One request: the replies that came in time, {id: (error, data)}, and whether there were unusable bytes."""
        deadline = self.clock() + (self.timeout if timeout is None else timeout)
        self._send(request, retry)
        buffer, found, rest = b"", {}, 0
        while len(found) < len(ids) and (left := deadline - self.clock()) > 0:
            need = (6 + size) * (len(ids) - len(found)) - rest
            data = self.transport.read(max(need, 1), left)
            if not data:
                break
            buffer += data
            packets, rest = frames(buffer)
            found = {
                id: (error, data) for id, error, data in packets if id in ids and len(data) == size
            }
        for id in ids:
            if id in found:
                self._late[
                    id
                ].clear()  # bytes keep their order: whatever was on its way has come before this reply
            else:
                self._late[id].append(size)
        if len(found) < len(ids):
            self.statistics["corrupt" if rest else "timeouts"] += 1
        return found, rest > 0

    def _no_answer(self, id: int, garbled: bool) -> BusError:
        if garbled:
            text = (
                f"servo {id}: what comes back is garbled: a bad cable, or two servos with this id?"
            )
            return BusError(text, [id], "corrupt")
        return BusError(
            f"servo {id} does not answer: check power, cable, id and baud rate", [id], "timeout"
        )
