"""The table of faults by operation: that of the page is the command's, and no row breaks the promise."""

import re
from collections import Counter

import pytest
from conftest import ROOT

from hardware import faults
from hardware.torque import LAST_RESORT

PAGE = (ROOT / "docs/hardware.md").read_text()
LINES = PAGE[PAGE.index(faults.BEGIN) : PAGE.index(faults.END)].splitlines()[3:]
TABLE = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in LINES]
PAIRS = [(fault.name, op) for fault in faults.FAULTS for op in fault.operations]
EVERY = 12  # one row in so many is run again here; `python -m hardware.faults` runs them all


def test_the_table_of_the_page_is_that_of_the_command():
    there = [(cells[0], op) for cells in TABLE for op in cells[1].split(", ")]
    assert sorted(there) == sorted(PAIRS) and len(PAIRS) >= 60
    for row in faults.rows(every=EVERY):
        assert not faults.bad(row), row
        (cells,) = [
            c for c in TABLE if c[0] == row.fault.name and row.operation in c[1].split(", ")
        ]
        name, happened, torque, status, message = row.outcome
        assert cells[2:5] == [happened, torque, status] and cells[6] == message.replace("|", "\\|")
        if row.seconds is not None:
            times = [float(time) for time in cells[5].split(" to ")]
            assert times[0] <= round(row.seconds, 2) <= times[-1]


def test_every_row_of_the_page_has_a_sentence_a_status_and_a_known_torque():
    for name, _, happened, torque, status, _, message in TABLE:
        said, true = torque.split("; ")
        assert status.isdigit() and said in (
            "off",
            "off when last read",
            "none given",
            "unknown, said so",
        )
        assert true == "none on" or said == "unknown, said so", "what is said to be off is off"
        if status != "0":
            assert re.match("(error: |watchdog: |the calibration of DATE )", message), name
            assert message.count("error:") <= 1
        assert (LAST_RESORT in message) == (said == "unknown, said so")
        assert (
            "motor changed" not in happened
            or happened.endswith("no motor changed")
            or ("id" in message)
        ), "all motors or none, or it is said which"


def test_torque_is_unknown_only_where_nothing_reaches_a_servo():
    cannot = ("silent", "unplugged", "cable comes off", "no request reaches", "another baud rate")
    for name, operations, _, torque, *_ in TABLE:
        if torque.startswith("unknown"):
            assert any(words in name for words in cannot) and " s" not in name[-4:], (
                name,
                operations,
            )


def test_every_operation_has_its_faults():
    count = Counter(op for fault in faults.FAULTS for op in fault.operations)
    assert set(count) == {*faults.ALL, "calibrate", "assign ids"} and min(count.values()) >= 7


@pytest.mark.parametrize(
    "change",
    [dict(exit=0), dict(message="off"), dict(said="off", on=["gripper"]), dict(fastest=1.2)],
)
def test_a_row_that_breaks_the_promise_is_found(change):
    fault = faults.Fault("x")
    good = dict(
        happened="stopped",
        said="off",
        on=[],
        exit=1,
        seconds=0.1,
        message="error: y; torque is off",
    )
    assert not faults.bad(faults.Row(fault, "run", **good))
    assert faults.bad(faults.Row(fault, "run", **good | change))
