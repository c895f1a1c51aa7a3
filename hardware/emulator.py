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
whether the goal reads back as it was limited, the sign of the current. Not modelled: backlash, noise of the encoder,
modes 1 to 3, a request that runs into a reply on the line.

    clock = VirtualClock()
    bus = Bus(EmulatedTransport(EmulatedBus(range(1, 7), clock), clock), clock)

As a process behind a pseudo-terminal, faults as JSON lines on its input (`serve`):
    python -m hardware.emulator --link /tmp/so101
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

from hardware import feetech as ft
from hardware.feetech import REGISTERS, BusError

TICK = 0.001  # s, of a servo's own loop
NO_LOAD_SPEED = 3100.0  # steps/s at the nominal voltage: 45 to 46 turns a minute were measured by others
RISE_TIME = 0.01  # s, of motor, gears and a light link from standstill to 63 % of the speed
DUTY_PER_STEP = 1 / 1600  # of duty for each step of error and unit of P: full duty at 100 steps with P = 16
DAMPING = 0.3 / 32  # of D: share of back-EMF that D adds
STALL_CURRENT, IDLE_CURRENT = 2.4, 0.1  # A
FRICTION = 0.02  # of the stall torque
HEATING = 4.0  # K/s when stalled at full duty
COOLING_TIME = 200.0  # s
READ_ONLY = {*range(5), *range(56, 71)}
VOLTAGE, ENCODER, HEAT, CURRENT, OVERLOAD = 0x01, 0x02, 0x04, 0x08, 0x20
FACTORY = dict(firmware=9 << 8 | 3, model=777, return_delay=250, response_level=1, max_position=4095,
               max_temperature=70, max_voltage=80, min_voltage=40, max_torque=1000, unload_mask=44, led_mask=47, p=32,
               d=32, min_start_force=16, dead_zone_up=1, dead_zone_down=1, protection_current=500,
               angular_resolution=1, protective_torque=20, protection_time=200, overload_torque=80,
               over_current_time=200)  # fmt: skip
TORQUE, GOAL = REGISTERS["torque_enable"][0], REGISTERS["goal_position"][0]


class VirtualClock:
    """Time that passes only in `sleep`."""

    def __init__(self, start: float = 0.0):
        self.time = start

    def now(self) -> float:
        return self.time

    __call__ = now

    def sleep(self, seconds: float) -> None:
        self.time += max(seconds, 0.0)


class RealClock:
    """The computer's, with the same methods."""

    now = __call__ = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(max(seconds, 0.0))


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
        self.registers = bytearray(128)
        self.eeprom_writes: Counter[int] = Counter()  # address -> how often its cell was written
        self.encoder, self.velocity = float(position), 0.0
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
        self.errors, self.overloaded, self.over_current = 0, 0.0, 0.0  # bits; seconds above the limits
        self.setpoint, self.setpoint_velocity, self.held = None, 0.0, None
        self.velocity = self.duty = 0.0
        for name, value in dict(lock=1, torque_limit=self.get("max_torque"), max_speed=254, max_acceleration=254,
                                torque_enable=int(self.options.power_up_torque)).items():  # fmt: skip
            self._set(name, value)
        goal = self.options.power_up_goal
        self._set("goal_position", round(self.position) if goal is None else goal)
        self._refresh()

    # Registers
    def get(self, name: str) -> int:
        """A register's value by name."""
        return ft.decode(name, bytes(self.registers), 0)

    def _set(self, name: str, value: int, into: bytearray | None = None) -> None:
        address, size = REGISTERS[name]
        (self.registers if into is None else into)[address : address + size] = ft.encode(name, value)

    @property
    def id(self) -> int:
        return self.registers[5]

    @property
    def position(self) -> float:
        """What present_position would read without rounding: within a turn, unless phase asks for several."""
        position = self.encoder - self.get("homing_offset")
        return position if self.get("phase") & 0x10 else position % ft.STEPS

    @position.setter
    def position(self, value: float) -> None:
        self.encoder, self.velocity = value + self.get("homing_offset"), 0.0
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
                offset = (round(self.encoder) - 2048 + 2048) % ft.STEPS - 2048
                self.write(REGISTERS["homing_offset"][0], ft.encode("homing_offset", max(-2047, min(2047, offset))))
                continue
            self.registers[at] = value
            if at < ft.EEPROM_END and not self.get("lock"):
                self.eeprom[at] = value
                self.eeprom_writes[at] += 1
        if address <= GOAL + 1 and GOAL < address + len(data):
            goal = self.limited(self.get("goal_position"))
            self._goal = goal
            if self.options.goal_reads_back_limited:
                self._set("goal_position", goal)
            self.registers[TORQUE] = 1  # also after a torque-off
        self._refresh()

    def limited(self, goal: int) -> int:
        """The goal, or the nearer edge of [min_position, max_position], also counted over the turn's end."""
        low, high = self.get("min_position"), self.get("max_position")
        if low == high == 0 or low <= goal <= high:
            return goal
        return low if (low - goal) % ft.STEPS <= (goal - high) % ft.STEPS else high

    def _refresh(self) -> None:
        """Writes what is measured into the registers."""
        position = round(self.position)
        position = max(-32767, min(32767, position)) if self.get("phase") & 0x10 else position % ft.STEPS
        current = round(abs(self.current) / ft.CURRENT_UNIT)
        if self.options.signed_current and self.current < 0:
            current = -current
        for name, value in (
            ("present_position", position),
            ("present_speed", round(self.velocity)),
            ("present_load", round(1000 * self.duty)),
            ("present_voltage", max(0, min(255, round(10 * self.options.voltage_now)))),
            ("present_temperature", max(0, min(255, round(self.temperature)))),
            ("present_current", current),
            ("moving", int(abs(self.velocity) > 1 or abs(self.setpoint_velocity) > 0)),
            ("status", self.error),
        ):
            self._set(name, value)

    @property
    def error(self) -> int:
        """The bits that ride on every reply."""
        return self.errors | self.forced_errors

    # Motor
    @property
    def at_rest(self) -> bool:
        """Nothing but cooling will happen until the next write."""
        return not (self.torque or self.velocity or callable(self.load) or abs(self.load) > FRICTION)

    def step(self, dt: float) -> None:
        """Moves the motor by dt (one tick, or more if at rest)."""
        volts = self.options.voltage_now / self.options.nominal_voltage
        driven = self.torque and self.get("mode") == 0
        if not driven:
            self.setpoint, self.setpoint_velocity, wanted = None, 0.0, 0.0
        else:
            wanted = self._wanted_duty(dt)
        mask = self.get("unload_mask")
        limit = min(self.get("torque_limit"), 1000) / 1000
        if self.error & mask & OVERLOAD:
            limit = min(limit, self.get("protective_torque") / 100)
        if self.error & mask & ~OVERLOAD:
            driven, limit = False, 0.0
        self.duty = max(-limit, min(limit, wanted))
        self._turn(dt, volts, driven)
        self._protect(dt, wanted)

    def _wanted_duty(self, dt: float) -> float:
        """Position loop: the setpoint runs to the goal within speed and acceleration, P and D follow it."""
        present = self.position
        if self.setpoint is None:  # torque has just come on
            self.setpoint, self.setpoint_velocity = present, 0.0
            self._goal = self.limited(self.get("goal_position"))
        top, acceleration = abs(self.get("goal_speed")), min(self.get("acceleration"), self.get("max_acceleration"))
        distance = self._goal - self.setpoint
        if not top:
            self.setpoint, self.setpoint_velocity = float(self._goal), 0.0
        else:
            rate = min(top, (2 * 100 * acceleration * abs(distance)) ** 0.5) if acceleration else top
            aim = rate if distance > 0 else -rate
            change = aim - self.setpoint_velocity
            if acceleration:
                change = max(-100 * acceleration * dt, min(100 * acceleration * dt, change))
            self.setpoint_velocity += change
            if abs(distance) <= max(abs(self.setpoint_velocity) * dt, 1e-9):
                self.setpoint, self.setpoint_velocity = float(self._goal), 0.0
            else:
                self.setpoint += self.setpoint_velocity * dt
        error = self.setpoint - present
        zone = self.get("dead_zone_up") if error > 0 else self.get("dead_zone_down")
        if abs(error) <= zone and not self.setpoint_velocity:
            error = 0.0
        damping = DAMPING * self.get("d") * (self.setpoint_velocity - self.velocity) / NO_LOAD_SPEED
        return error * self.get("p") * DUTY_PER_STEP + damping

    def _turn(self, dt: float, volts: float, driven: bool) -> None:
        """DC motor: torque, as a share of the stall torque, is duty x volts - speed / no-load speed - what resists."""
        load = self.load(self) if callable(self.load) else self.load
        if self.blocked:
            self.velocity = 0.0
        else:
            push = self.duty * volts + load
            friction = max(-FRICTION, min(FRICTION, push)) if not self.velocity else FRICTION
            if self.velocity:
                friction = friction if self.velocity > 0 else -friction
            gain = NO_LOAD_SPEED * dt / RISE_TIME
            # Implicit in the speed, so that any dt is stable. A motor that is off brakes a little: gears.
            brake = 1.0 if driven else 0.2
            velocity = (self.velocity + gain * (push - friction)) / (1 + gain * brake / NO_LOAD_SPEED)
            if self.velocity and velocity * self.velocity <= 0 and abs(push) <= FRICTION:
                velocity = 0.0
            self.velocity = velocity if abs(velocity) > 1e-3 else 0.0
            self.encoder += self.velocity * dt
        self.current = STALL_CURRENT * (self.duty * volts - self.velocity / NO_LOAD_SPEED) if driven else 0.0

    def _protect(self, dt: float, wanted: float) -> None:
        """Temperature and the four protections."""
        ambient = self.options.ambient
        heat = HEATING * (self.current / STALL_CURRENT) ** 2
        rest = ambient + heat * COOLING_TIME  # where it would end
        self.temperature = rest + (self.temperature - rest) * 2.718281828459045 ** (-dt / COOLING_TIME)
        voltage = 10 * self.options.voltage_now
        now = 0
        if not self.get("min_voltage") <= round(voltage) <= self.get("max_voltage"):
            now |= VOLTAGE
        if self.temperature > self.get("max_temperature"):
            now |= HEAT
        above = abs(self.current) > self.get("protection_current") * ft.CURRENT_UNIT
        self.over_current = self.over_current + dt if above else 0.0
        if self.over_current > self.get("over_current_time") / 100 > 0:
            self.errors |= CURRENT
        tripped = self.errors & OVERLOAD
        share = self.get("protective_torque" if tripped else "overload_torque") / 100
        above = abs(wanted if tripped else self.duty) > share
        self.overloaded = self.overloaded + dt if above else 0.0
        if tripped and not above and not self.options.errors_latch:
            self.errors &= ~OVERLOAD  # what is asked for no longer exceeds what is given
        elif self.overloaded > self.get("protection_time") / 100 > 0:
            self.errors |= OVERLOAD
        if self.errors & CURRENT and not self.torque and not self.options.errors_latch:
            self.errors &= ~CURRENT
        if not self.options.errors_latch:
            self.errors &= ~(VOLTAGE | HEAT)
        self.errors |= now


# --- Bus --------------------------------------------------------------------------------------------------------------
class EmulatedBus:
    """The line and its servos.

    servos: id -> Servo. writes: (time, id as addressed, address, data) of every write that reached the line, whether
    or not a servo took it. voltage: of the supply, V; it drops by `resistance` times the current of all motors.
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
        wire_time: bool = True,
        voltage: float = 7.4,
        nominal_voltage: float = 7.4,
        resistance: float = 0.02,
        ambient: float = 25.0,
    ):
        """power_up_goal: what goal_position holds at first; None: the present position. position: of all shafts."""
        self.clock = clock or VirtualClock()
        self.power_up_torque, self.power_up_goal, self.absent_blocks = power_up_torque, power_up_goal, absent_blocks
        self.errors_latch, self.goal_reads_back_limited = errors_latch, goal_reads_back_limited
        self.signed_current, self.wire_time = signed_current, wire_time
        self.voltage = self.voltage_now = voltage
        self.nominal_voltage, self.resistance, self.ambient = nominal_voltage, resistance, ambient
        self.baud = 1_000_000  # that the host talks at
        self.servos = {id: Servo(id, position, self) for id in ids}
        self.twins: list[tuple[Servo, float]] = []  # further servos with an id that is taken; how much later they reply
        self.writes: list[tuple[float, int, int, bytes]] = []
        self.plugged = True
        self._ticks = round(self.clock() / TICK)
        self._input, self._input_time = b"", 0.0
        self._line_free = 0.0  # when the host's last byte is over
        self._output: deque[tuple[float, bytes]] = deque()  # (time of the first byte's end, bytes), in order
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
        self.servos[id]._protect(0.0, 0.0)
        self.servos[id]._refresh()

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
            servo.registers[6] = ft.BAUD_RATES.index(baud)

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
            if all(servo.at_rest for servo in servos):
                self._step(servos, ticks - self._ticks)
                self._ticks = ticks
            else:
                self._step(servos, 1)
                self._ticks += 1

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
        return [w for w in self.writes if w[0] >= since and w[2] < first + size and first < w[2] + len(w[3])]

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
        for servo in self._all():
            servo._refresh()
        self._talked = when  # end of the last reply
        if instruction == ft.PING:
            for one in sorted({servo.id for servo, _ in self._hear(id)}):
                self._reply(one, lambda servo: b"", read=True)
        elif instruction == ft.READ and len(parameters) == 2 and not broadcast:
            self._reply(id, lambda servo: bytes(servo.registers[parameters[0] : sum(parameters)]), read=True)
        elif instruction in (ft.WRITE, ft.REG_WRITE) and len(parameters) >= 2:
            address, data = parameters[0], parameters[1:]
            if instruction == ft.WRITE:
                self.writes.append((when, id, address, data))
            heard = self._hear(id)
            for servo, _ in heard:
                if instruction == ft.WRITE:
                    servo.write(address, data)
                else:
                    servo.held, servo.registers[64] = (address, data), 1
            if not broadcast and heard:
                self._reply(heard[0][0].id, lambda servo: b"", read=False)
        elif instruction == ft.ACTION:
            for servo, _ in self._hear(id):
                if servo.held:
                    self.writes.append((when, servo.id, *servo.held))
                    servo.write(*servo.held)
                    servo.held, servo.registers[64] = None, 0
            if not broadcast:
                self._reply(id, lambda servo: b"", read=False)
        elif instruction == ft.SYNC_READ and len(parameters) >= 2 and broadcast:
            address, size = parameters[:2]
            for one in parameters[2:]:
                spoke = self._reply(one, lambda servo: bytes(servo.registers[address : address + size]), read=True)
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

    def _reply(self, id: int, data: Callable[[Servo], bytes], read: bool) -> bool:
        """Puts the servo's status packet on the line; False if it says nothing."""
        voices = [(servo, skew) for servo, skew in self._hear(id)
                  if not servo.silent and (read or servo.get("response_level"))]  # fmt: skip
        if not voices:
            return False
        first = self._talked + (voices[0][0].get("return_delay") * 2e-6 if self.wire_time else 0.0)
        message, begin = b"", first
        for servo, skew in voices:
            one = ft.packet(servo.id, servo.error, data(servo))
            message = collide(message, one, round(skew * self.baud / 10)) if message else one
        self._talked = first + len(message) * self._byte_time
        if self._corrupt:
            self._corrupt -= 1
            message = message[:-1] + bytes((message[-1] ^ 0x55,))
        if self._drop[id] > 0:
            self._drop[id] -= 1
            return True  # lost on the way to the host: the other servos have heard it
        if self._noise:
            message, self._noise = self._noise + message, b""
        if self._delay.get(id):
            begin += self._delay[id].pop(0)
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
