"""The table of faults by operation: that of the page is the command's, and no row breaks the promise."""

import re
from collections import Counter

import pytest
from conftest import ROOT

from hardware import faults

PAGE = (ROOT / "docs/hardware.md").read_text()
LINES = PAGE[PAGE.index(faults.BEGIN) : PAGE.index(faults.END)].splitlines()[3:]
EVERY = 9  # one row in so many is run again here; `python -m hardware.faults` runs them all


def test_the_table_of_the_page_is_that_of_the_command():
    pairs = [(fault.name, op) for fault in faults.FAULTS for op in fault.operations]
    there = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in LINES]
    assert there == pairs and len(pairs) >= 60
    assert [row.line() for row in faults.rows(every=EVERY)] == LINES[::EVERY]


def test_every_row_of_the_page_has_a_sentence_a_status_and_a_known_torque():
    for line in LINES:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        _, operation, happened, torque, status, _, message = cells
        assert operation in faults.ALL + ("calibrate", "assign ids") and status.isdigit(), line
        said, true = torque.split("; ")
        assert said in ("off", "none given", "unknown, said so")
        assert true == "none on" or said == "unknown, said so", "what is said to be off is off"
        if status != "0":
            assert re.match("(error|watchdog): ", message) and message.count("error:") <= 1, line
        assert ("switch the power off" in message) == (said == "unknown, said so")


def test_every_operation_has_its_faults():
    count = Counter(op for fault in faults.FAULTS for op in fault.operations)
    assert set(count) == {*faults.ALL, "calibrate", "assign ids"} and min(count.values()) >= 7


@pytest.mark.parametrize(
    "change", [dict(exit=0), dict(message="off"), dict(said="off", on=["gripper"])]
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
