"""Emulated STS3215 servos on a serial bus: bytes in, bytes out, and a clock that a test may own.

Written from the protocol's facts, not measured on a servo. What is modelled, all of it readable through registers:
    bytes       parser with resynchronisation, wire time, return delay, response level, replies of a sync read in the
                order of the list, baud rates, collisions of two servos with one id
    registers   sign and magnitude, factory values, read-only ones, EEPROM with its lock and a count of its writes,
                homing offset (present = encoder - offset), torque_enable = 128 (here is the middle), values at power-up
    motion      a goal is limited to [min_position, max_position] and switches torque on; acceleration and speed limit
                (registers 41, 46), P and D on the position, duty limited by torque_limit (48), a DC motor with
                back-EMF, friction, an outside load, a blockage; in mode 0 only
    protection  temperature, current, overload, voltage: error bits, and the motor weakened or off as 19 says

What nobody here could look up on a servo is an option of `EmulatedBus`, so that tests can try both answers: torque and
goal at power-up, whether a silent servo stops the ones behind it in a sync read, whether errors go away by themselves,
whether the goal reads back as it was limited, the sign of the current, whether a reading stays within a turn. Play of
the gears (others measured about 1 degree), an adapter's latency timer and a share of lost replies are options too. Not
modelled: noise of the encoder, modes 1 to 3, I, the least starting force, a request that runs into a reply on the line.

    clock = VirtualClock()
    bus = Bus(EmulatedTransport(EmulatedBus(range(1, 7), clock), clock), clock)

As a process behind a pseudo-terminal, faults as JSON lines on its input (`serve`):
    python -m hardware.emulator --link /tmp/so101
"""

import argparse
import contextlib
import heapq
import itertools
import json
import math
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

from hardware import feetech as ft
from hardware.feetech import REGISTERS, BusError

TICK = 0.001  # s, of a servo's own loop
NO_LOAD_SPEED = (
    3160.0  # steps/s without friction; with it 3097: others measured 45 to 46 turns a minute
)
RISE_TIME = 0.01  # s, of motor, gears and a light link from standstill to 63 % of the speed
DUTY_PER_STEP = (
    1 / 1600
)  # of duty for each step of error and unit of P: full duty at 100 steps with P = 16
DAMPING = 0.3 / 32  # of D: share of back-EMF that D adds
STALL_CURRENT, IDLE_CURRENT = 2.4, 0.1  # A
FRICTION = 0.02  # of the stall torque
HEATING = 2.5  # K/s when stalled at full duty
COOLING_TIME = 200.0  # s
READ_ONLY = {*range(5), *range(56, 71)}
VOLTAGE, ENCODER, HEAT, CURRENT, OVERLOAD = 0x01, 0x02, 0x04, 0x08, 0x20
FACTORY = dict(firmware=9 << 8 | 3, model=777, return_delay=250, response_level=1, max_position=4095,
               max_temperature=70, max_voltage=80, min_voltage=40, max_torque=1000, unload_mask=44, led_mask=47, p=32,
               d=32, min_start_force=16, dead_zone_up=1, dead_zone_down=1, protection_current=500,
               angular_resolution=1, protective_torque=20, protection_time=200, overload_torque=80,
               over_current_time=200)  # fmt: skip
OBEYED = ("torque_enable", "mode", "torque_limit", "unload_mask", "protective_torque", "goal_position", "goal_speed",
          "acceleration", "max_acceleration", "dead_zone_up", "dead_zone_down", "p", "d", "homing_offset", "phase",
          "min_position", "max_position", "min_voltage", "max_voltage", "max_temperature", "protection_current",
          "over_current_time", "overload_torque", "protection_time")  # fmt: skip
TORQUE, GOAL, OFFSET = (
    REGISTERS[name][0] for name in ("torque_enable", "goal_position", "homing_offset")
)


class VirtualClock:
    """Time that passes only in `sleep`."""

    def __init__(self, start: float = 0.0):
        self.time = start
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._number = itertools.count()

    def now(self) -> float:
        return self.time

    __call__ = now

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Calls when `sleep` gets there: a fault in the middle of something."""
        heapq.heappush(self._events, (when, next(self._number), call))

    def sleep(self, seconds: float) -> None:
        end = self.time + max(seconds, 0.0)
        while self._events and self._events[0][0] <= end:
            when, _, call = heapq.heappop(self._events)
            self.time = max(self.time, when)
            call()
        self.time = max(self.time, end)


class RealClock:
    """The computer's, with the same methods."""

    now = __call__ = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(max(seconds, 0.0))


def signed(value: int, bit: int) -> int:
    """Sign and magnitude as a register holds them; a magnitude that is too large stops at the largest."""
    top = (1 << bit) - 1
    return ft.encode_sign_magnitude(max(-top, min(top, value)), bit)


# --- Servo ------------------------------------------------------------------------------------------------------------
class Servo:
    """One servo: 128 registers and the motor behind them.

    encoder: angle of the shaft in steps, unbounded, before the homing offset. velocity: steps/s.
    load: outside torque as a share of the stall torque, that pushes towards larger positions if positive; or a
    function of the servo that returns it. blocked: the shaft cannot turn.
    """

    def __init__(self, id: int, position: float, options: "EmulatedBus"):
        self.options = options
        self.eeprom = bytearray(ft.EEPROM_END)
        self._seen: object = None
        self._goal = 0  # as limited
        self.eeprom_writes: Counter[int] = Counter()  # address -> how often its cell was written
        self.encoder, self.velocity = float(position), 0.0
        self.slack = 0.0  # steps that the shaft is ahead of the gears, within half their play
        self.load: float | Callable[[Servo], float] = 0.0
        self.blocked = self.silent = self.deaf = False
        self.temperature, self.current, self.duty, self.forced_errors = options.ambient, 0.0, 0.0, 0
        for name, value in FACTORY.items():
            self._set(name, value, self.eeprom)
        self._set("id", id, self.eeprom)
        self.power_up()

    def power_up(self) -> None:
        """Everything that is not EEPROM is at its first value, as after the plug was pulled."""
        self.registers = bytearray(self.eeprom) + bytearray(128 - ft.EEPROM_END)
        self.errors, self.overloaded, self.over_current = (
            0,
            0.0,
            0.0,
        )  # bits; seconds above the limits
        self.setpoint, self.setpoint_velocity, self.held = None, 0.0, None
        self.velocity = self.duty = self.wanted = 0.0  # wanted: the duty before limits
        for name, value in dict(lock=1, torque_limit=self.get("max_torque"), max_speed=254, max_acceleration=254,
                                torque_enable=int(self.options.power_up_torque)).items():  # fmt: skip
            self._set(name, value)
        goal = self.options.power_up_goal
        self._set("goal_position", round(self._present()) if goal is None else goal)
        self._refresh()

    # Registers
    def get(self, name: str) -> int:
        """A register's value by name."""
        return ft.decode(name, bytes(self.registers), 0)

    def _set(self, name: str, value: int, into: bytearray | None = None) -> None:
        address, size = REGISTERS[name]
        (self.registers if into is None else into)[address : address + size] = ft.encode(
            name, value
        )

    @property
    def id(self) -> int:
        return self.registers[5]

    @property
    def position(self) -> float:
        """What present_position would read now, without rounding: within a turn, unless phase asks for several."""
        self.options.advance()
        return self._present()

    def _present(self) -> float:
        s = self._settings()
        if s["phase"] & 0x10:
            return self.encoder - s["homing_offset"]
        if self.options.readings_wrap:
            return (self.encoder - s["homing_offset"]) % ft.STEPS
        return self.encoder % ft.STEPS - s["homing_offset"]

    @position.setter
    def position(self, value: float) -> None:
        self.options.advance()
        self.encoder, self.velocity, self.setpoint = value + self.get("homing_offset"), 0.0, None
        self._refresh()

    @property
    def torque(self) -> bool:
        """Whether the motor is to be driven."""
        return self.registers[TORQUE] == 1

    def write(self, address: int, data: bytes) -> None:
        """What a write instruction does."""
        for at, value in enumerate(data, start=address):
            if at >= 128 or at in READ_ONLY:
                continue
            if at == TORQUE and value == 128:
                # "Here is the middle": the offset takes the present angle to 2048.
                offset = max(-2047, round(self.encoder) % ft.STEPS - 2048)
                self.write(REGISTERS["homing_offset"][0], ft.encode("homing_offset", offset))
                continue
            self.registers[at] = value
            if at < ft.EEPROM_END and not self.get("lock"):
                self.eeprom[at] = value
                self.eeprom_writes[at] += 1
        if address <= OFFSET + 1 and OFFSET < address + len(data):
            self.setpoint = None
        if address <= GOAL + 1 and GOAL < address + len(data):
            self._goal = self.limited(self.get("goal_position"))
            if self.options.goal_reads_back_limited:
                self._set("goal_position", self._goal)
            self.registers[TORQUE] = 1  # also after a torque-off
        self._refresh()

    def limited(self, goal: int) -> int:
        """The goal, or the nearer edge of [min_position, max_position], also counted over the turn's end."""
        low, high = self._settings()["min_position"], self._settings()["max_position"]
        if low == high == 0 or low <= goal <= high:
            return goal
        return low if (low - goal) % ft.STEPS <= (goal - high) % ft.STEPS else high

    def _refresh(self) -> None:
        """Writes what is measured into the registers."""
        position, current = round(self._present()), round(self.current / ft.CURRENT_UNIT)
        if self.options.readings_wrap and not self._settings()["phase"] & 0x10:
            position %= ft.STEPS
        position = signed(position, 15)
        current = signed(current, 15) if self.options.signed_current else abs(current)
        moving = abs(self.velocity) > 1 or self.setpoint_velocity != 0
        struct.pack_into(
            "<HHHBBBBB", self.registers, 56, position, signed(round(self.velocity), 15),
            signed(round(1000 * self.duty), 10), max(0, min(255, round(10 * self.options.voltage_now))),
            max(0, min(255, round(self.temperature))), self.held is not None, self.error, moving,
        )  # fmt: skip
        struct.pack_into("<H", self.registers, 69, current)

    @property
    def error(self) -> int:
        """The bits that ride on every reply."""
        return self.errors | self.forced_errors

    # Motor
    @property
    def at_rest(self) -> bool:
        """Nothing but cooling will happen until the next write."""
        still = (
            not self.velocity
            and not self.wanted
            and not callable(self.load)
            and abs(self.load) <= FRICTION
        )
        return still and (not self.torque or self.setpoint == self._goal and not self.error)

    def _settings(self) -> dict[str, int]:
        """The registers that the motor obeys, decoded anew when one has changed."""
        seen = bytes(self.registers[:56]), self.registers[85]
        if seen != self._seen:
            self._seen, self._decoded = seen, {name: self.get(name) for name in OBEYED}
        return self._decoded

    def step(self, dt: float) -> None:
        """Moves the motor by dt (one tick, or more if at rest)."""
        s, volts = self._settings(), self.options.voltage_now / self.options.nominal_voltage
        driven = s["torque_enable"] == 1 and s["mode"] == 0
        if not driven:
            self.setpoint, self.setpoint_velocity, self.wanted = None, 0.0, 0.0
        else:
            self.wanted = self._wanted_duty(s, dt)
        limit, unload = min(s["torque_limit"], 1000) / 1000, self.error & s["unload_mask"]
        if unload & OVERLOAD:
            limit = min(limit, s["protective_torque"] / 100)
        if unload & ~OVERLOAD:
            driven, limit = False, 0.0
        self.duty = max(-limit, min(limit, self.wanted))
        self._turn(dt, volts, driven)
        self._protect(s, dt)

    def _wanted_duty(self, s: dict[str, int], dt: float) -> float:
        """Position loop: the setpoint runs to the goal within speed and acceleration, P and D follow it."""
        present = self._present()
        if self.setpoint is None:  # torque has just come on
            self.setpoint, self.setpoint_velocity = present, 0.0
            self._goal = self.limited(s["goal_position"])
        distance, top = self._goal - self.setpoint, abs(s["goal_speed"])
        acceleration = 100 * min(s["acceleration"], s["max_acceleration"])
        if not top:
            self.setpoint, self.setpoint_velocity = float(self._goal), 0.0
        else:
            if (
                acceleration
            ):  # no faster than it can brake until the goal, from where it is after this tick
                half = acceleration * dt / 2
                top = min(top, math.sqrt(half**2 + 2 * acceleration * abs(distance)) - half)
            change = math.copysign(top, distance) - self.setpoint_velocity
            if acceleration:
                change = max(-acceleration * dt, min(acceleration * dt, change))
            self.setpoint_velocity += change
            if abs(distance) <= max(self.setpoint_velocity * math.copysign(dt, distance), 1e-9):
                self.setpoint, self.setpoint_velocity = float(self._goal), 0.0
            else:
                self.setpoint += self.setpoint_velocity * dt
        error = self.setpoint - present
        if (
            abs(error) <= s["dead_zone_up" if error > 0 else "dead_zone_down"]
            and not self.setpoint_velocity
        ):
            error = 0.0
        damping = DAMPING * s["d"] * (self.setpoint_velocity - self.velocity) / NO_LOAD_SPEED
        return error * s["p"] * DUTY_PER_STEP + damping

    def _turn(self, dt: float, volts: float, driven: bool) -> None:
        """DC motor: torque, as a share of the stall torque, is duty x volts - speed / no-load speed - what resists."""
        push = self.duty * volts + (self.load(self) if callable(self.load) else self.load)
        if self.blocked or not self.velocity and abs(push) <= FRICTION:
            self.velocity = 0.0
        else:
            # Implicit in the speed, so that any dt is stable. The gears brake a motor that is off, but less.
            before, gain, brake = (
                self.velocity,
                NO_LOAD_SPEED * dt / RISE_TIME,
                1.0 if driven else 0.2,
            )
            free = before + gain * (push - math.copysign(FRICTION, before or push))
            self.velocity = free / (1 + gain * brake / NO_LOAD_SPEED)
            if before * self.velocity < 0 and abs(push) <= FRICTION or abs(self.velocity) < 1e-3:
                self.velocity = 0.0  # friction stops it, but does not turn it round
            self._drive(self.velocity * dt, push - self.duty * volts)
        self.current = (
            STALL_CURRENT * (self.duty * volts - self.velocity / NO_LOAD_SPEED) if driven else 0.0
        )

    def _drive(self, steps: float, load: float) -> None:
        """The gears turn by so many steps; the shaft follows once their play is taken up, at once where a load does."""
        half = self.options.backlash / 2
        if not half:
            self.encoder += steps
            return
        gears = self.encoder - self.slack + steps
        if abs(load) > FRICTION:
            self.encoder = gears + math.copysign(half, load)
        else:
            self.encoder = max(gears - half, min(gears + half, self.encoder))
        self.slack = self.encoder - gears

    def _protect(self, s: dict[str, int], dt: float) -> None:
        """Temperature, and the four protections: bits of `errors`."""
        final = self.options.ambient + COOLING_TIME * HEATING * (self.current / STALL_CURRENT) ** 2
        self.temperature = final + (self.temperature - final) * math.exp(-dt / COOLING_TIME)
        lasting = self.options.errors_latch
        bits = self.errors if lasting else self.errors & (CURRENT | OVERLOAD)
        if not s["min_voltage"] <= round(10 * self.options.voltage_now) <= s["max_voltage"]:
            bits |= VOLTAGE
        if self.temperature > s["max_temperature"]:
            bits |= HEAT
        above = abs(self.current) > s["protection_current"] * ft.CURRENT_UNIT
        self.over_current = self.over_current + dt if above else 0.0
        if self.over_current > s["over_current_time"] / 100:
            bits |= CURRENT
        elif not lasting and not self.torque:
            bits &= ~CURRENT
        if bits & OVERLOAD:
            # Weakened until no more is asked for than is given.
            if not lasting and abs(self.wanted) <= s["protective_torque"] / 100:
                bits &= ~OVERLOAD
        else:
            self.overloaded = (
                self.overloaded + dt if abs(self.duty) > s["overload_torque"] / 100 else 0.0
            )
            if self.overloaded > s["protection_time"] / 100:
                bits, self.overloaded = bits | OVERLOAD, 0.0
        self.errors = bits


# --- Bus --------------------------------------------------------------------------------------------------------------
class EmulatedBus:
    """The line and its servos.

    servos: id -> Servo; `position` is that of now, everything else as of the last request or `advance`.
    writes: (time, id as addressed, address, data) of every write that reached the line, whether or not a servo took it.
    voltage: of the supply, V; it drops by `resistance` times the current of all motors.
    """

    def __init__(
        self,
        ids: Iterable[int] = range(1, 7),
        clock: Callable[[], float] | None = None,
        *,
        position: float = 2048.0,
        power_up_torque: bool = False,
        power_up_goal: int | None = 0,
        absent_blocks: bool = False,
        errors_latch: bool = False,
        goal_reads_back_limited: bool = True,
        signed_current: bool = False,
        readings_wrap: bool = True,
        backlash: float = 0.0,
        usb_latency: float = 0.0,
        loss: float = 0.0,
        wire_time: bool = True,
        voltage: float = 7.4,
        nominal_voltage: float = 7.4,
        resistance: float = 0.02,
        ambient: float = 25.0,
    ):
        """power_up_goal: what goal_position holds at first; None: the present position. position: of all shafts.
        readings_wrap: a position stays within 0 to 4095; if not, it is encoder - offset, below 0 and above 4095 too.
        backlash: steps of play; 1 degree are 11.4. usb_latency: s that the adapter keeps replies. loss: share of the
        replies that get lost at random.
        """
        self.clock = clock or VirtualClock()
        self.power_up_torque, self.power_up_goal, self.absent_blocks = (
            power_up_torque,
            power_up_goal,
            absent_blocks,
        )
        self.errors_latch, self.goal_reads_back_limited = errors_latch, goal_reads_back_limited
        self.signed_current, self.wire_time = signed_current, wire_time
        self.readings_wrap, self.backlash = readings_wrap, backlash
        self.usb_latency, self.loss, self.random = usb_latency, loss, random.Random(0)
        self.voltage = self.voltage_now = voltage
        self.nominal_voltage, self.resistance, self.ambient = nominal_voltage, resistance, ambient
        self.baud = 1_000_000  # that the host talks at
        self.servos = {id: Servo(id, position, self) for id in ids}
        self.twins: list[
            tuple[Servo, float]
        ] = []  # further servos with an id that is taken; how much later they reply
        self.writes: list[tuple[float, int, int, bytes]] = []
        self.plugged = True
        self._ticks = round(self.clock() / TICK)
        self._input, self._input_time = b"", 0.0
        self._line_free = 0.0  # when the host's last byte is over
        self._output: deque[tuple[float, bytes]] = (
            deque()
        )  # (time of the first byte's end, bytes), in order
        self._held: dict[int, tuple[int, bytes]] = {}  # what reg_write left
        self._corrupt = self._lose = 0
        self._drop: Counter[int] = Counter()
        self._delay: dict[int, list[float]] = {}
        self._noise = b""

    # Faults
    def corrupt(self, n: int = 1) -> None:
        """The next n replies have a wrong checksum."""
        self._corrupt += n

    def drop(self, id: int, n: int = 1) -> None:
        """The next n replies of this servo are lost."""
        self._drop[id] += n

    def lose(self, n: int = 1) -> None:
        """The next n requests do not reach any servo."""
        self._lose += n

    def delay(self, id: int, seconds: float, n: int = 1) -> None:
        """The next n replies of this servo come that much later, and with them all that is behind them."""
        self._delay.setdefault(id, []).extend([seconds] * n)

    def noise(self, data: bytes) -> None:
        """These bytes stand in front of the next reply."""
        self._noise += bytes(data)

    def mute(self, id: int, on: bool = True) -> None:
        """The servo obeys but does not reply."""
        self.servos[id].silent = on

    def disconnect(self, id: int, on: bool = True) -> None:
        """The servo neither hears nor replies, and goes on with what it was doing."""
        self.servos[id].deaf = on

    def heat(self, id: int, celsius: float) -> None:
        """Sets the temperature; it goes on from there."""
        self.advance()
        self.servos[id].temperature = celsius
        self.servos[id]._protect(self.servos[id]._settings(), 0.0)

    def error(self, id: int, bits: int) -> None:
        """These error bits are set until error(id, 0)."""
        self.servos[id].forced_errors = bits

    def block(self, id: int, on: bool = True) -> None:
        """The shaft cannot turn any more."""
        self.advance()
        self.servos[id].blocked = on

    def unplug(self, on: bool = True) -> None:
        """The adapter is gone: every call of the transport fails. The servos keep their power."""
        self.advance()
        self.plugged = not on
        self._output.clear()
        self._input = b""

    def wrong_baud(self, baud: int | None = 500_000, id: int | None = None) -> None:
        """One servo, or all, now talk at another rate than the host."""
        for servo in [self.servos[id]] if id is not None else self.servos.values():
            servo.registers[6] = servo.eeprom[6] = ft.BAUD_RATES.index(baud)

    def duplicate(self, id: int, position: float | None = None, skew: float = 0.0) -> "Servo":
        """A second servo with this id, whose replies begin `skew` seconds after the first one's."""
        twin = Servo(id, self.servos[id].encoder if position is None else position, self)
        self.twins.append((twin, skew))
        return twin

    def power_cycle(self, id: int | None = None) -> None:
        """Power goes and comes back, for one servo or all."""
        self.advance()
        for servo in [self.servos[id]] if id is not None else self._all():
            servo.power_up()

    # Time
    def advance(self, until: float | None = None) -> None:
        """Lets the servos' time pass up to `until`, or the clock's."""
        ticks = int((self.clock() if until is None else until) / TICK + 1e-6)
        servos = self._all()
        while self._ticks < ticks:
            n = ticks - self._ticks if all(servo.at_rest for servo in servos) else 1
            begin, self._ticks = (
                self._ticks,
                ticks,
            )  # a load that asks for the position does not get here again
            self._step(servos, n)
            self._ticks = begin + n

    def _step(self, servos: list[Servo], ticks: int) -> None:
        drawn = sum(abs(servo.current) for servo in servos) + IDLE_CURRENT * len(servos)
        self.voltage_now = self.voltage - self.resistance * drawn
        for servo in servos:
            servo.step(ticks * TICK)

    def _all(self) -> list[Servo]:
        return [*self.servos.values(), *(twin for twin, _ in self.twins)]

    def written(self, name: str, since: float = 0.0) -> list[tuple[float, int, int, bytes]]:
        """The writes since a time that touched any byte of this register."""
        first, size = REGISTERS[name]
        return [
            w
            for w in self.writes
            if w[0] >= since and w[2] < first + size and first < w[2] + len(w[3])
        ]

    # Bytes
    @property
    def _byte_time(self) -> float:
        return 10 / self.baud if self.wire_time else 0.0

    def feed(self, data: bytes) -> None:
        """Bytes from the host, beginning now or when its last ones are over."""
        now = self.clock()
        if self._input and now - self._input_time > 0.02:
            self._input = b""  # the rest of a broken request: servos forget it after a pause
        start = max(now, self._line_free)
        self._line_free = start + len(data) * self._byte_time
        self._input += data
        self._input_time = now
        at = 0
        while (at := self._input.find(b"\xff\xff", at)) >= 0:
            if at + 4 > len(self._input):
                break
            length = self._input[at + 3]
            body, end = self._input[at + 2 : at + 3 + length], at + 4 + length
            if self._input[at + 2] == 0xFF or length < 2:
                at += 1
            elif end > len(self._input):
                break
            elif ft.checksum(body) != self._input[end - 1]:
                at += 1
            else:
                self._execute(self._line_free - (len(self._input) - end) * self._byte_time, body)
                self._input, at = self._input[end:], 0
        self._input = self._input[at:] if at >= 0 else self._input[-1:]

    def take(self, n: int) -> bytes:
        """Up to n bytes that have reached the host by now."""
        now, taken = self.clock() + 1e-9, b""
        while self._output and len(taken) < n and self._output[0][0] <= now:
            first, data = self._output.popleft()
            step = self._byte_time
            ready = len(data) if not step else min(len(data), 1 + int((now - first) / step))
            ready = min(ready, n - len(taken))
            taken += data[:ready]
            if ready < len(data):
                self._output.appendleft((first + ready * step, data[ready:]))
                break
        return taken

    def ready_at(self, n: int = 1) -> float | None:
        """When n bytes will have come; None if fewer are on their way."""
        for first, data in self._output:
            if len(data) >= n:
                return first + (n - 1) * self._byte_time
            n -= len(data)
        return None

    def discard(self) -> None:
        """The host forgets what has come by now."""
        while self.take(1 << 16):
            pass

    def _hear(self, id: int) -> list[tuple[Servo, float]]:
        """Servos that take a request to this id, each with how much later it replies."""
        code = ft.BAUD_RATES.index(self.baud) if self.baud in ft.BAUD_RATES else None
        everyone = [*((servo, 0.0) for servo in self.servos.values()), *self.twins]
        return [(servo, skew) for servo, skew in everyone
                if not servo.deaf and servo.registers[6] == code and id in (servo.id, ft.BROADCAST)]  # fmt: skip

    def _execute(self, when: float, body: bytes) -> None:
        """Carries out a request whose last byte came at `when`."""
        self.advance(when)
        if self._lose:
            self._lose -= 1
            return
        id, instruction, parameters = body[0], body[2], body[3:]
        broadcast = id == ft.BROADCAST
        self._talked = when  # end of the last reply
        if instruction == ft.PING:
            for one in sorted({servo.id for servo, _ in self._hear(id)}):
                self._reply(one, lambda servo: b"", read=True)
        elif instruction == ft.READ and len(parameters) == 2 and not broadcast:
            self._reply(
                id, lambda servo: bytes(servo.registers[parameters[0] : sum(parameters)]), read=True
            )
        elif instruction in (ft.WRITE, ft.REG_WRITE) and len(parameters) >= 2:
            address, data = parameters[0], parameters[1:]
            if instruction == ft.WRITE:
                self.writes.append((when, id, address, data))
            heard = self._hear(id)
            for servo, _ in heard:
                if instruction == ft.WRITE:
                    servo.write(address, data)
                else:
                    servo.held = address, data
            if (
                not broadcast
            ):  # at the baud rate and with the id of before, if it is these that were written
                self._reply(id, lambda servo: b"", read=False, heard=heard)
        elif instruction == ft.ACTION:
            for servo, _ in self._hear(id):
                if servo.held:
                    self.writes.append((when, servo.id, *servo.held))
                    servo.write(*servo.held)
                    servo.held = None
            if not broadcast:
                self._reply(id, lambda servo: b"", read=False)
        elif instruction == ft.SYNC_READ and len(parameters) >= 2 and broadcast:
            address, size = parameters[:2]
            for one in parameters[2:]:
                spoke = self._reply(
                    one, lambda servo: bytes(servo.registers[address : address + size]), read=True
                )
                if not spoke and self.absent_blocks:
                    break
        elif instruction == ft.SYNC_WRITE and len(parameters) >= 2 and broadcast:
            address, size = parameters[:2]
            entries = parameters[2:]
            if size and len(entries) % (1 + size) == 0:
                for i in range(0, len(entries), 1 + size):
                    one, data = entries[i], entries[i + 1 : i + 1 + size]
                    self.writes.append((when, one, address, data))
                    for servo, _ in self._hear(one):
                        servo.write(address, data)

    def _reply(
        self, id: int, data: Callable[[Servo], bytes], read: bool, heard: list | None = None
    ) -> bool:
        """Puts the servo's status packet on the line; False if it says nothing."""
        voices = [(servo, skew) for servo, skew in (self._hear(id) if heard is None else heard)
                  if not servo.silent and (read or servo.get("response_level"))]  # fmt: skip
        if not voices:
            return False
        first = self._talked + (voices[0][0].get("return_delay") * 2e-6 if self.wire_time else 0.0)
        message, begin = b"", first
        for servo, skew in voices:
            servo._refresh()
            one = ft.packet(id, servo.error, data(servo))
            message = collide(message, one, round(skew * self.baud / 10)) if message else one
        self._talked = first + len(message) * self._byte_time
        if self._corrupt:
            self._corrupt -= 1
            message = message[:-1] + bytes((message[-1] ^ 0x55,))
        if self._drop[id] > 0 or self.random.random() < self.loss:
            self._drop[id] = max(self._drop[id] - 1, 0)
            return True  # lost on the way to the host: the other servos have heard it
        if self._noise:
            message, self._noise = self._noise + message, b""
        if self._delay.get(id):
            begin += self._delay[id].pop(0)
        begin += self.usb_latency
        if self._output:  # bytes keep their order
            last, before = self._output[-1]
            begin = max(begin, last + (len(before) - 1) * self._byte_time)
        self._output.append((begin + self._byte_time, message))
        return True


def collide(one: bytes, other: bytes, offset: int) -> bytes:
    """Two replies on one line, the second `offset` bytes later: where both talk, a low level wins."""
    length = max(len(one), offset + len(other))
    both = bytearray(b"\xff" * length)
    for start, message in ((0, one), (offset, other)):
        for i, byte in enumerate(message, start):
            both[i] &= byte
    talking = [i < len(one) or offset <= i < offset + len(other) for i in range(length)]
    return bytes(byte for byte, heard in zip(both, talking, strict=True) if heard)


# --- Transport --------------------------------------------------------------------------------------------------------
class EmulatedTransport:
    """A serial port at whose other end the emulated bus is; waiting lets the clock go on."""

    port = "the emulated port"

    def __init__(self, bus: EmulatedBus, clock: VirtualClock | RealClock, baud: int = 1_000_000):
        self.bus, self.clock = bus, clock
        bus.baud = baud

    def _check(self) -> None:
        if not self.bus.plugged:
            raise BusError(f"{self.port} failed: is the adapter still plugged in and powered?")

    def write(self, data: bytes) -> None:
        self._check()
        self.bus.feed(data)

    def read(self, n: int, timeout: float) -> bytes:
        """Up to n bytes, fewer only when `timeout` seconds of the clock are over."""
        self._check()
        deadline = self.clock() + timeout
        data = self.bus.take(n)
        while len(data) < n and (left := deadline - self.clock()) > 0:
            ready = self.bus.ready_at(n - len(data))
            self.clock.sleep(left if ready is None else min(left, max(ready - self.clock(), 1e-6)))
            self._check()
            data += self.bus.take(n - len(data))
        return data

    def flush_input(self) -> None:
        self._check()
        self.bus.discard()

    def close(self) -> None:
        pass


# --- Behind a pseudo-terminal -----------------------------------------------------------------------------------------
FAULTS = ("corrupt", "drop", "lose", "delay", "noise", "mute", "disconnect", "heat", "error", "block", "unplug",
          "wrong_baud", "duplicate", "power_cycle")  # fmt: skip


class Pty:
    """The master's side of a pseudo-terminal whose slave is the port that a driver opens."""

    def __init__(self, link: str | None):
        import tty

        self.link = link
        # The slave stays open here too: without any client a read of the master would fail.
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.name = os.ttyname(self.slave)
        if link:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(self.name, link)

    def baud(self) -> int:
        """The rate that the client has set, which a pseudo-terminal itself does not care about."""
        import fcntl

        try:  # TCGETS2, Linux: also rates that termios has no name for
            return struct.unpack_from("I", fcntl.ioctl(self.slave, 0x802C542A, bytes(44)), 40)[0]
        except OSError:
            return 1_000_000

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)
        if self.link:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.link)


def serve(bus: EmulatedBus, link: str | None = None, commands: int = 0, replies: int = 1) -> None:
    """Serves `bus`, which has a RealClock, behind a pseudo-terminal until `commands` ends.

    Prints {"port": name}. Then one JSON object a line on the descriptor `commands`, and one on `replies` for each:
        {"do": "mute", "args": [3]}   a fault, by the name of the method
        {"get": "state"}              id -> position, torque, goal, error and whether anything moves
        {"get": "written", "args": ["goal_position"]}   writes to a register: [time, id, address, hexadecimal data]
        {"set": "load", "id": 3, "value": 0.2}          an attribute of a servo, or without id of the bus
    """
    port, pending = Pty(link), b""

    def answer(line: bytes) -> dict:
        nonlocal port
        command = json.loads(line)
        arguments = command.get("args", [])
        if command.get("get") == "state":
            bus.advance()
            return {id: dict(position=servo.position, torque=servo.registers[TORQUE], goal=servo.get("goal_position"),
                             torque_limit=servo.get("torque_limit"), error=servo.error, velocity=servo.velocity)
                    for id, servo in bus.servos.items()}  # fmt: skip
        if command.get("get") == "written":
            return dict(writes=[[*write[:3], write[3].hex()] for write in bus.written(*arguments)])
        if "set" in command:
            setattr(
                bus.servos[command["id"]] if "id" in command else bus,
                command["set"],
                command["value"],
            )
            return dict(ok=True)
        if command["do"] not in FAULTS:
            raise ValueError(f"faults are {', '.join(FAULTS)}")
        getattr(bus, command["do"])(
            *(bytes.fromhex(a) if isinstance(a, str) else a for a in arguments)
        )
        if bus.plugged and not port:
            port = Pty(link)
        elif not bus.plugged and port:
            port.close()
            port = None
        return dict(ok=True, port=link or port and port.name)

    def say(what: dict) -> None:
        os.write(replies, (json.dumps(what) + "\n").encode())

    say(dict(port=link or port.name))
    try:
        while True:
            ready = bus.ready_at()
            wait = 0.05 if ready is None else max(0.0, min(0.05, ready - bus.clock()))
            heard, _, _ = select.select([commands, *([port.master] if port else [])], [], [], wait)
            if port and port.master in heard:
                bus.baud = port.baud()
                with contextlib.suppress(OSError):
                    bus.feed(os.read(port.master, 4096))
            bus.advance()
            if port and (data := bus.take(4096)):
                with contextlib.suppress(OSError):  # nobody reads: lost, as on a real line
                    os.write(port.master, data)
            if commands in heard:
                if not (more := os.read(commands, 4096)):
                    return
                *lines, pending = (pending + more).split(b"\n")
                for line in filter(None, lines):
                    try:
                        say(answer(line))
                    except (ValueError, KeyError, TypeError, AttributeError) as error:
                        say(dict(error=f"{type(error).__name__}: {error}"))
    finally:
        if port:
            port.close()


class PtyServer:
    """Emulated servos in a process of their own, behind `port`: what a real driver opens.

    with PtyServer(power_up_torque=True) as server:
        bus = Bus(SerialTransport(server.port))
        server.do("mute", 3)
    """

    def __init__(self, link: str | None = None, ids: Iterable[int] = range(1, 7), **options):
        words = [
            "-m",
            "hardware.emulator",
            "--ids",
            *map(str, ids),
            "--options",
            json.dumps(options),
        ]
        self.process = subprocess.Popen(
            [sys.executable, *words, *(["--link", link] if link else [])], cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.port = self._answer()["port"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the emulator's process has ended with status {self.process.wait()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def ask(self, **command) -> dict:
        """A command of `serve`, and its answer."""
        self.process.stdin.write(json.dumps(command) + "\n")
        return self._answer()

    def do(self, fault: str, *arguments) -> None:
        """A fault of `EmulatedBus` by name."""
        self.port = self.ask(
            do=fault, args=[a.hex() if isinstance(a, bytes) else a for a in arguments]
        )["port"]

    def state(self) -> dict[int, dict]:
        """What `serve` says of each servo."""
        return {int(id): facts for id, facts in self.ask(get="state").items()}

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def __enter__(self) -> "PtyServer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def main() -> None:
    about = ("Emulated STS3215 servos behind a pseudo-terminal. Type faults as JSON lines: "
             '{"do": "mute", "args": [3]}, {"get": "state"}; Ctrl-D ends it.')  # fmt: skip
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--link", help="path of a symbolic link to the port, to have a name that does not change"
    )
    parser.add_argument(
        "--ids", type=int, nargs="+", default=list(range(1, 7)), help="ids of the servos"
    )
    parser.add_argument(
        "--options", default="{}", help='options of EmulatedBus as JSON: {"power_up_torque": true}'
    )
    args = parser.parse_args()
    try:
        bus = EmulatedBus(args.ids, RealClock(), **json.loads(args.options))
    except (TypeError, ValueError) as error:
        sys.exit(f"--options {args.options}: {error}")
    with contextlib.suppress(KeyboardInterrupt):
        serve(bus, args.link)


if __name__ == "__main__":
    main()
