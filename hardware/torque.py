"""The one way of taking torque off: hold, grow weak, let go, and read back what became of it.

The arm's own stop, the watchdog, calibration and the assignment of ids all come here. Nothing in this file raises.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hardware.feetech import REGISTERS, Bus, BusError, decode, encode

HOLD, WEAK = 0.3, 1.0  # s on the way down: stands where it is; sinks instead of dropping
WEAK_TORQUE = 150  # per mille of the stall torque
# Servos have no time-out of their own: without a line they hold their last goal for as long as they have power.
KNOWN = "torque is off, read back from every servo"
LAST_RESORT = "switch the power off, nothing else lets go"


@dataclass
class Outcome:
    """Servos whose torque reads 0, that do not answer, and that read on; `port`: what it said, if it failed.
    before: of the silent ones those that said earlier that it is off, with no goal sent since."""

    off: list[int]
    silent: list[int]
    on: list[int]
    port: str = ""
    before: list[int] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether every servo has answered that its torque is off."""
        return not self.silent and not self.on

    def sentence(self, names: dict[int, str] | None = None) -> str:
        """For the operator; names: of the ids."""

        def listed(ids: list[int]) -> str:
            return ", ".join((names or {}).get(id, f"servo {id}") for id in ids)

        if self.known:
            return KNOWN
        unsure = [id for id in self.silent if id not in self.before]
        if self.port and unsure and not self.off and not self.on:
            return f"torque-off could not be sent: {LAST_RESORT}"
        text = [f"torque is off on {listed(self.off)}"] if self.off else []
        if self.before:
            who = listed(self.before) if self.off or unsure or self.on else "every servo"
            text.append(f"torque was read as off on {who} before the answers ended, no goal since")
        if unsure:
            text.append(f"torque-off was sent to {listed(unsure)}, but no answer came")
        if self.on:
            text.append(f"torque is still on on {listed(self.on)}")
        return "; ".join(text) + (f": {LAST_RESORT}" if unsure or self.on else "")


def torque_off(
    bus: Bus, ids: Iterable[int], sleep: Callable[[float], None] = time.sleep, rounds: int = 5
) -> Outcome:
    """Broadcasts torque-off and reads it back, up to `rounds` times until every servo has answered 0.

    Whatever goes wrong with one servo, or with one way of telling it, the others are told. Ctrl-C waits.
    """
    address, size = REGISTERS["torque_enable"]
    ids, found, port = list(ids), {}, ""

    def attempt(call, *arguments):
        nonlocal port
        try:
            return call(*arguments)
        except BusError as error:
            port = str(error)
        except (Exception, KeyboardInterrupt):  # the next one is told all the same
            pass

    for number in range(rounds):
        port = ""
        attempt(bus.broadcast_torque_off)
        left = [id for id in ids if found.get(id) != "off"]
        for id in left if number else ():
            attempt(bus.sync_write, address, {id: b"\x00"})
        answers = attempt(bus.sync_read, left, address, size) or {}
        for id, status in answers.items():
            found[id] = "on" if status.data[0] else "off"
        if all(found.get(id) == "off" for id in ids):
            break
        attempt(sleep, 0.01)

    def those(state: str) -> list[int]:
        return [id for id in ids if found.get(id, "silent") == state]

    silent = those("silent")
    before = [id for id in silent if id in bus.limp]
    bus.limp |= set(those("off"))
    return Outcome(those("off"), silent, those("on"), port, before)


def let_go(
    bus: Bus,
    ids: Iterable[int],
    hold: float = HOLD,
    weak: float = WEAK,
    weak_torque: int = WEAK_TORQUE,
    sleep: Callable[[float], None] = time.sleep,
    hurry: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Holds where the arm is for `hold` s, is weak for `weak` s, and takes torque off.

    A step that fails does not keep the next one from being tried. All but the first are broadcasts: they reach servos
    that are silent or report errors. Only servos whose torque is on and that report no error are given a goal, since a
    goal switches torque on. hurry: asked during the waits; True goes straight to torque-off.
    """
    ids = list(ids)
    with contextlib.suppress(Exception):
        first = REGISTERS["torque_enable"][0]
        states = bus.sync_read(ids, first, REGISTERS["present_position"][0] + 2 - first)
        present = {}
        for id, status in states.items():
            if status.data[0] == 1 and not status.error:
                position = decode("present_position", status.data, first)
                present[id] = encode("goal_position", position)
        if present:
            bus.sync_write(REGISTERS["goal_position"][0], present)
        if present or len(states) < len(ids) or any(s.data[0] for s in states.values()):
            _wait(hold, sleep, hurry)
            limit = encode("torque_limit", weak_torque)
            with contextlib.suppress(BusError):
                bus.broadcast_write(REGISTERS["torque_limit"][0], limit)
            _wait(weak, sleep, hurry)
    return torque_off(bus, ids, sleep)


def _wait(seconds: float, sleep: Callable[[float], None], hurry: Callable[[], bool]) -> None:
    steps = max(1, round(seconds / 0.05))
    for _ in range(steps):
        if hurry():
            return
        sleep(seconds / steps)
