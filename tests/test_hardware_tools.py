"""calibrate.py and latency.py, on emulated servos: what they measure, what they refuse, and what they leave alone."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from hardware import calibrate, latency
from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, encode
from hardware.policy import PolicyError
from hardware.so101 import GRIPPER, JOINTS, ArmFault, Calibration

MIDDLE = (2300, 1700, 2450, 4000, 100, 1640)  # of the shafts: two are near their encoder's end


class Rig:
    def __init__(self, ids=range(1, 7), share=1.0, middle=MIDDLE, **options):
        self.clock = VirtualClock()
        self.servos = EmulatedBus(ids, self.clock, **options)
        self.bus = Bus(EmulatedTransport(self.servos, self.clock), self.clock)
        self.person = calibrate.EmulatedPerson(self.servos, self.clock, middle, share)
        self.sleep = self.clock.sleep

    def __getitem__(self, id):
        return self.servos.servos[id]

    def calibrate(self):
        return calibrate.calibrate(self.bus, self.person, self.sleep)

    @property
    def eeprom_writes(self):
        return [dict(servo.eeprom_writes) for servo in self.servos.servos.values()]


def lines(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300)  # fmt: skip


# --- calibrate.py -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("old_offset", [0, 777, -2047])
def test_offsets_and_ranges_are_those_of_the_joints_whatever_the_motors_held(old_offset):
    rig = Rig(power_up_torque=True)
    for servo in rig.servos.servos.values():
        servo._set("homing_offset", old_offset, servo.eeprom)
    rig.servos.power_cycle()
    calibration, remarks = rig.calibrate()
    assert remarks == [] and not any(rig.eeprom_writes) and not rig.servos.written("goal_position")
    for at, (name, joint) in enumerate(calibration.joints.items()):
        assert joint.id == at + 1 and joint.drive_mode == 0
        # present = encoder - offset, modulo a turn: the middle reads 2047
        assert (MIDDLE[at] - joint.homing_offset) % 4096 == 2047
        if name == "wrist_roll":
            assert (joint.range_min, joint.range_max) == (0, 4095)
        else:
            half = calibrate.EXPECTED[name] * 4096 / 360 / 2
            assert joint.range_min == pytest.approx(2047 - half, abs=2)
            assert joint.range_max == pytest.approx(2047 + half, abs=2)
            assert calibration.zero[at] == pytest.approx(2047, abs=1) or name == "gripper"
    assert rig.servos.writes[0][1:] == (0xFE, REGISTERS["torque_enable"][0], b"\x00")
    changes = calibrate.put(rig.bus, calibration, rig.sleep)
    assert {change[1] for change in changes} == {"homing_offset", "min_position", "max_position"}
    assert all(
        set(writes.values()) == {1} for writes in rig.eeprom_writes
    )  # nothing more than once
    rig.person.place(MIDDLE)
    assert [round(servo.position) for servo in rig.servos.servos.values()] == [2047] * 6
    assert calibrate.put(rig.bus, calibration, rig.sleep) == []
    assert all(set(writes.values()) == {1} for writes in rig.eeprom_writes)


def test_an_offset_that_does_not_fit_is_a_step_off():
    """Shaft at 4095: 4095 - 2047 = 2048 does not fit in the register's 11 bits."""
    calibration, _ = Rig(middle=(4095, *MIDDLE[1:])).calibrate()
    assert calibration.joints["shoulder_pan"].homing_offset == 2047


def test_a_joint_that_was_hardly_moved_is_refused():
    with pytest.raises(
        ValueError, match="shoulder_pan moved by 88 degrees of 220: move it from stop to stop"
    ):
        Rig(share=0.4).calibrate()


def test_an_unusual_range_is_pointed_out():
    _, remarks = Rig(share=0.85).calibrate()
    assert remarks[0] == "shoulder_pan moved by 187 degrees; the model's joint moves by 220"


def test_a_joint_that_passes_its_encoders_end_is_refused():
    rig = Rig()
    rig.person.ask = lambda text, ask=rig.person.ask: (
        ask(text),
        rig.person.place((3700, *MIDDLE[1:])),
    )
    rig.person.half[0] = 1900
    with pytest.raises(ValueError, match="shoulder_pan has passed the end of its encoder's turn"):
        rig.calibrate()


def test_a_range_next_to_the_encoders_end_is_refused():
    with pytest.raises(ValueError, match="wrist_flex comes within 10 degrees of its encoder's end"):
        calibrate.judge(
            [0] * 6,
            np.array([800, 900, 900, 60, 0, 1300]),
            np.array([3300, 3200, 3100, 2200, 4095, 2800]),
        )


def test_a_motor_that_falls_silent_meanwhile_is_named():
    rig = Rig()
    rig.clock.at(1.0, lambda: rig.servos.mute(3))
    with pytest.raises(ArmFault, match="no answer from elbow_flex"):
        rig.calibrate()
    assert not any(rig.eeprom_writes)


def test_an_arm_that_is_moved_while_it_is_written_to_gets_its_old_values_back():
    rig = Rig()
    calibration, _ = rig.calibrate()
    rig[2]._set("homing_offset", 55, rig[2].eeprom)
    rig.servos.power_cycle()

    def jolt(seconds):
        rig.clock.sleep(seconds)
        rig[6].encoder += 30

    with pytest.raises(
        ArmFault, match="gripper reads .* with its new offset, not .* Was the arm moved"
    ) as error:
        calibrate.put(rig.bus, calibration, jolt)
    assert error.value.__notes__ == ["all servos have their old values"]
    assert rig[2].get("homing_offset") == 55 and rig[6].get("max_position") == 4095


# --- Whole or undone --------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """SIGKILL: nothing is undone."""


def cut_off(tmp_path, at):
    """A calibrated arm, and a calibration of it that ends after `at` waits without another byte."""
    rig, journal = Rig(), tmp_path / "unfinished.json"
    calibration, _ = rig.calibrate()
    calibrate.put(rig.bus, calibration, rig.sleep)
    old = [bytes(rig[id].eeprom) for id in range(1, 7)]
    joints = {name: vars(joint) | dict(range_min=joint.range_min + 5, homing_offset=joint.homing_offset - 20)
              for name, joint in calibration.joints.items()}  # fmt: skip
    left, begun = iter(range(at + 1)), []

    def sleep(seconds):
        rig.sleep(seconds)
        begun.append(journal.exists())
        if begun[-1] and next(left, None) == at:
            rig.bus.transport.write = lambda data: (_ for _ in ()).throw(Killed)
            raise Killed

    with pytest.raises(Killed):
        calibrate.put(rig.bus, Calibration.from_dict(joints), sleep, journal)
    rig.bus = Bus(EmulatedTransport(rig.servos, rig.clock), rig.clock)
    return rig, journal, old


@pytest.mark.parametrize("at", [0, 1, 2, 7, 17])
def test_a_calibration_that_was_cut_off_is_put_back_at_the_next_start(tmp_path, at):
    rig, journal, old = cut_off(tmp_path, at)
    assert [bytes(rig[id].eeprom) for id in range(1, 7)] != old and journal.exists()
    said = calibrate.settle(rig.bus, journal, rig.sleep)
    assert [bytes(rig[id].eeprom) for id in range(1, 7)] == old
    assert "was cut off, and servo" in said and said.endswith("all servos have their old values")
    assert not journal.exists() and calibrate.settle(rig.bus, journal, rig.sleep) is None


def test_the_commands_put_back_what_was_cut_off_or_say_it(tmp_path, capsys):
    rig, journal, old = cut_off(tmp_path, 3)
    bench = rig.bus, rig.person, rig.sleep
    read = calibrate.Args(read=str(tmp_path / "now.json"), emulate=True)
    calibrate.main(read, bench, journal)
    assert (
        "note: a calibration of servos 1, 2, 3, 4, 5, 6 was cut off on" in capsys.readouterr().out
    )
    assert journal.exists()
    rig.servos.disconnect(4)
    write = calibrate.Args(write=str(tmp_path / "now.json"), emulate=True)
    with pytest.raises(BusError, match="servo 4 does not answer") as error:
        calibrate.main(write, bench, journal)
    assert "was cut off on" in error.value.__notes__[0] and journal.exists()
    rig.servos.disconnect(4, False)
    calibrate.main(write, bench, journal)
    assert "all servos have their old values" in capsys.readouterr().out and not journal.exists()


def test_a_value_of_which_half_was_written_is_put_back_and_another_arm_is_left_alone(tmp_path):
    rig, journal, old = cut_off(tmp_path, 3)
    _, changes = calibrate.unfinished(journal)
    id, name, before, after = next(c for c in changes if c[1] == "min_position")
    address = REGISTERS[name][0]
    for into in (rig[id].eeprom, rig[id].registers):
        into[address] = encode(name, after)[0]
        into[address + 1] = encode(name, before)[1]
    kept = journal.read_text()
    assert "old values" in calibrate.settle(rig.bus, journal, rig.sleep)
    assert [bytes(rig[id].eeprom) for id in range(1, 7)] == old
    journal.write_text(kept)
    rig[id]._set(name, 777, rig[id].eeprom), rig.servos.power_cycle()
    there = [bytes(servo.eeprom) for servo in rig.servos.servos.values()]
    with pytest.raises(
        ArmFault, match="of another arm, or servo . was written to since. .* delete"
    ):
        calibrate.settle(rig.bus, journal, rig.sleep)
    assert there == [bytes(servo.eeprom) for servo in rig.servos.servos.values()]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"time": 1, "changes": [[1, "id", 1, 2]]}', '{"changes": []}', "\x00",
     '{"time": 1, "changes": [[1, "homing_offset", 0, 1e9]]}', '{"time": 1, "changes": [["1", "homing_offset", 0, 1]]}',
     '{"time": 1, "changes": [[1, "homing_offset", 0, 4000]]}'],
)  # fmt: skip
def test_a_damaged_note_of_what_was_cut_off_gets_one_line(tmp_path, content):
    rig, journal = Rig(), tmp_path / "unfinished.json"
    journal.write_text(content)
    with pytest.raises(ValueError, match="unfinished.json is damaged: compare with --check"):
        calibrate.settle(rig.bus, journal, rig.sleep)
    assert not any(rig.eeprom_writes)


def test_without_a_note_nothing_is_written(tmp_path):
    rig = Rig()
    calibration, _ = rig.calibrate()
    with pytest.raises(ValueError, match="cannot be written .* so nothing goes into the motors"):
        calibrate.put(rig.bus, calibration, rig.sleep, rig_file(tmp_path) / "unfinished.json")
    assert not any(rig.eeprom_writes)


def rig_file(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def test_ids_are_given_one_by_one():
    """Six new motors, all with id 1, of which only the one that is asked for is connected."""
    rig = Rig(ids=range(1, 7))
    motors = list(rig.servos.servos.values())
    for servo in motors:
        servo.registers[5] = servo.eeprom[5] = 1

    class Hands:
        turn = iter(range(6))

        def ask(self, text):
            if text.startswith("Turn"):
                motors[self.now].encoder += 900
                return
            self.now = next(self.turn)
            assert JOINTS[5 - self.now] in text
            for at, servo in enumerate(motors):
                servo.deaf = at != self.now

    said = []
    calibrate.assign_ids(rig.bus, Hands(), rig.sleep, said.append)
    assert [servo.id for servo in motors] == [6, 5, 4, 3, 2, 1] and said[
        0
    ] == "gripper: id 6, was 1"
    assert said[-1] == "shoulder_pan: id 1, as before" and not motors[-1].eeprom_writes
    rig.servos.power_cycle()
    assert [servo.id for servo in motors] == [6, 5, 4, 3, 2, 1] and all(
        servo.get("lock") == 1 for servo in motors
    )


def test_two_motors_with_one_id_are_found_before_one_is_written():
    """Equal in every bit of their answers, until a hand turns one of them."""
    rig = Rig(ids=[1])
    twin = rig.servos.duplicate(1)
    rig.person.ask = lambda text: (
        setattr(rig[1], "encoder", rig[1].encoder + 700) if text.startswith("Turn") else None
    )
    with pytest.raises(ArmFault, match="two motors answer to id 1") as error:
        calibrate.assign_ids(rig.bus, rig.person, rig.sleep)
    assert (rig[1].id, twin.id) == (1, 1) and not rig[1].eeprom_writes and not twin.eeprom_writes
    assert error.value.__notes__[0] == "ids that are given: none"


def test_a_motor_that_nobody_turns_is_not_written():
    rig = Rig(ids=[1])
    rig.person.ask = lambda text: None
    with pytest.raises(ArmFault, match="was not turned: is it that of gripper"):
        calibrate.assign_ids(rig.bus, rig.person, rig.sleep)
    assert not rig[1].eeprom_writes


def test_a_jaw_that_cannot_close_as_far_as_the_models_is_told():
    """A range of 2030 to 3230 maps to 0 to 108 degrees; the model's is -10 to 120."""
    low, high = (
        np.array([800, 900, 900, 966, 0, 2030]),
        np.array([3299, 3200, 3100, 3100, 4095, 3230]),
    )
    _, remarks = calibrate.judge([0] * 6, low, high)
    assert any(
        "the jaw goes from 0 to 108 degrees; the model's goes from -10 to 120" in r for r in remarks
    )


def test_a_motor_that_restarts_with_torque_while_the_arm_is_moved_is_noticed():
    rig = Rig()
    rig.servos.power_up_torque = True
    rig.clock.at(1.0, lambda: rig.servos.power_cycle(4))
    with pytest.raises(ArmFault, match="wrist_flex has torque again"):
        rig.calibrate()


@pytest.mark.parametrize(
    ("connected", "message"), [((), "no motor answers"), ((2, 5), "motors 2, 5 answer")]
)
def test_ids_are_not_given_unless_one_motor_answers(connected, message):
    rig = Rig()
    for id in range(1, 7):
        rig[id].deaf = id not in connected
    rig.person.ask = lambda text: None
    with pytest.raises(ArmFault, match=message):
        calibrate.assign_ids(rig.bus, rig.person, rig.sleep)
    assert not any(rig.eeprom_writes)


def test_an_id_that_is_not_kept_is_an_error():
    rig = Rig(ids=[1])
    rig[1].write = lambda address, data: None
    with pytest.raises(BusError, match="servo 6 does not answer"):
        calibrate.set_id(rig.bus, 1, 6, rig.sleep)


def test_the_command_calibrates_checks_and_writes(tmp_path):
    file = tmp_path / "arm.json"
    made = lines("hardware/calibrate.py", "--emulate", "--out", file)
    assert made.returncode == 0 and "the motors have it" in made.stdout, made.stderr
    assert set(json.loads(file.read_text())) == set(JOINTS)
    assert Calibration.from_json(file).joints["shoulder_pan"].range_max == 3299
    with pytest.raises(ValueError, match="arm.json exists: choose another name, or move it away"):
        calibrate.main(calibrate.Args(emulate=True, out=str(file)))
    other = lines(
        "hardware/calibrate.py", "--emulate", "--check", file
    )  # a new emulated arm has other values
    assert other.returncode == 2 and "16 values differ: --write puts" in other.stderr
    assert "gripper: max_position is 4095 in the motor, 2770 in the file" in other.stdout


def test_the_other_commands_do_what_they_say(tmp_path, capsys, monkeypatch):
    rig, file = Rig(), tmp_path / "arm.json"
    monkeypatch.setattr(calibrate, "emulated", lambda: (rig.bus, rig.person, rig.sleep))
    calibration, _ = rig.calibrate()
    calibration.to_json(file)
    calibrate.main(calibrate.Args(emulate=True, write=str(file)))
    assert "shoulder_pan: homing_offset 0 -> 253" in capsys.readouterr().out
    calibrate.main(calibrate.Args(emulate=True, write=str(file)))
    assert capsys.readouterr().out.strip() == f"the motors have {file} already"
    calibrate.main(calibrate.Args(emulate=True, check=str(file)))
    assert capsys.readouterr().out.strip() == f"the motors have {file}"
    calibrate.main(calibrate.Args(emulate=True, read=str(tmp_path / "back.json")))
    assert (tmp_path / "back.json").read_text() == file.read_text()
    # the file cannot be written, but the motors have it already
    rig.person.moves = None
    with pytest.raises(ValueError, match="cannot be written .* save it with --read"):
        calibrate.main(calibrate.Args(emulate=True, out=str(file / "below.json")))


def test_the_motors_are_handed_over_with_the_torque_that_other_programs_expect(capsys):
    rig = Rig()
    for servo in rig.servos.servos.values():
        servo._set("max_torque", 230 if servo.id == 6 else 300, servo.eeprom)
        servo.power_up()
    calibrate.main(calibrate.Args(hand_over=True, emulate=True), (rig.bus, rig.person, rig.sleep))
    assert "gripper: powers up with 50 % of its torque, was 23 %" in capsys.readouterr().out
    rig.servos.power_cycle()
    assert [rig[id].get("torque_limit") for id in range(1, 7)] == [1000] * 5 + [500]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            dict(emulate=True),
            "give one of --out, --check, --write, --read, --hand-over and --assign-ids",
        ),
        (dict(out="a", assign_ids=True, emulate=True), "give one of"),
        (dict(out="a"), "give --port, or --emulate"),
        (dict(port="/dev/nothing", assign_ids=True), "there is no port /dev/nothing"),
        (dict(check="nothing.json", emulate=True), "there is no calibration nothing.json"),
    ],
)
def test_wrong_words_to_calibrate_get_one_line(words, message):
    with pytest.raises((ValueError, OSError, BusError), match=message) as error:
        calibrate.main(calibrate.Args(**words))
    assert "\n" not in str(error.value)


def test_a_keyboard_that_has_gone_gives_up(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    calibrate.Person().ask("Ready?")
    with pytest.raises(EOFError):
        calibrate.Person().ask("Ready?")


# --- latency.py -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delay", [0.0, 0.12])
def test_the_cameras_delay_is_found(delay):
    arm, camera, clock, sleep = latency.emulated(delay)
    clock.sleep(1.0)
    beats = []
    with arm:
        arm.start()
        found = latency.measure(
            arm, camera, clock, sleep, repeats=1, ticks=5, beat=lambda: beats.append(clock())
        )
    rows = {row["what"]: row for row in found.table()}
    assert found.unseen == 0 and rows["encoder to frame"]["n"] == 2
    # the delay, and half a frame interval of waiting for the exposure, give or take the other half
    assert abs(rows["encoder to frame"]["median_ms"] - 1000 * delay - 1000 / 60) <= 1000 / 60 + 3
    assert rows["frame interval"]["median_ms"] == pytest.approx(1000 / 30)
    # a read of 6 x 31 bytes: 14 + 6 x 37 bytes of 10 bits each
    assert rows["read"]["median_ms"] == pytest.approx(2.36, abs=0.05) and rows["read"]["n"] == 5
    assert 10 < rows["command to encoder"]["median_ms"] < 60
    assert max(np.diff(beats)) < 0.2  # a watchdog would be content
    assert arm.torque == dict.fromkeys(JOINTS, "off")


def test_only_the_jaw_moves_and_it_comes_back():
    arm, camera, clock, sleep = latency.emulated(0.05)
    clock.sleep(1.0)
    with arm:
        before = arm.start().position
        latency.measure(arm, None, clock, sleep, repeats=1, ticks=2)
        after = arm.read().position
    assert np.abs(after - before).max() < 0.02
    servo = camera.servo
    written = servo.options.written("goal_position")
    goals = {int.from_bytes(data[1:3], "little") for _, id, _, data in written if id == 6}
    assert max(goals) - min(goals) == pytest.approx(
        latency.STEP / arm.calibration.slope[GRIPPER], abs=1
    )


def test_a_camera_that_does_not_see_the_jaw_is_told_from_one_that_is_slow():
    arm, camera, clock, sleep = latency.emulated(0.05)
    clock.sleep(1.0)
    random = np.random.default_rng(0)
    camera._draw = lambda position: random.integers(0, 60, (480, 640, 3)).astype(
        np.uint8
    )  # noise, and no jaw
    with arm:
        arm.start()
        found = latency.measure(arm, camera, clock, sleep, repeats=1, ticks=2)
    assert found.unseen == 2 and "encoder to frame" not in found.samples


def test_a_jaw_that_cannot_move_is_a_fault_and_torque_goes_off():
    arm, camera, clock, sleep = latency.emulated(0.05)
    clock.sleep(1.0)
    with pytest.raises(ArmFault, match="the jaw has not gone where it was sent"):
        with arm:
            arm.start()
            camera.servo.blocked = True
            latency.measure(arm, None, clock, sleep, repeats=1, ticks=2)
    assert set(arm.torque.values()) == {"off"}


class NoPolicy:
    spec = {"cameras": {"wrist": {}}}

    def reset(self):
        self.seen = []

    def preprocess(self, frame):
        return frame[None, ::30, ::40]

    def act(self, obs):
        self.seen.append((obs["rgb"].shape, obs["state"].shape, obs["state"].dtype))
        return np.full((1, 6), 1.0)


def test_a_policys_time_is_measured_and_its_actions_are_not_carried_out():
    arm, camera, clock, sleep = latency.emulated(0.05)
    clock.sleep(1.0)
    with arm:
        arm.start()
        found = latency.Latency(arm, camera, clock, sleep)
        policy = NoPolicy()
        found.tick(policy, 5)
        assert np.abs(arm.read().position - found.target).max() < 0.02
    assert policy.seen == [((1, 16, 16, 3), (1, 12), np.dtype("float32"))] * 5
    median = {row["what"]: row["median_ms"] for row in found.table()}
    assert median["observation to command"] >= median["policy"] + median["picture"] > 0


def test_the_table_is_of_milliseconds():
    found = latency.Latency.__new__(latency.Latency)
    found.samples = {"read": [0.001, 0.002, 0.004]}
    assert found.table() == [
        dict(what="read", median_ms=2.0, p95_ms=pytest.approx(3.8), max_ms=4.0, n=3)
    ]


def test_blocks_are_means():
    rgb = np.zeros((40, 33, 3), np.uint8)
    rgb[:16, 16:32] = (30, 60, 90)
    np.testing.assert_allclose(latency.blocks(rgb), [[0, 60], [0, 0]])


def test_the_command_prints_and_stores(tmp_path):
    out = tmp_path / "deep" / "latency.jsonl"
    result = lines("hardware/latency.py", "--emulate", "--repeats", 1, "--ticks", 3, "--out", out)
    assert result.returncode == 0 and "encoder to frame" in result.stdout, result.stderr
    entry = json.loads(out.read_text())
    assert entry["arm"] == "emulated" and math.isfinite(entry["rows"][0]["median_ms"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(), "give --port, or --emulate"),
        (dict(port="x"), "--calibration is missing"),
        (dict(emulate=True, camera="0"), "brings its own"),
        (dict(emulate=True, repeats=0), "at least 1"),
        (dict(port="x", calibration="y", checkpoint="z"), "--checkpoint needs a camera"),
        (dict(emulate=True, checkpoint="nothing.pt"), "there is no policy nothing.pt"),
    ],
)
def test_wrong_words_to_latency_get_one_line(words, message):
    with pytest.raises((ValueError, PolicyError), match=message) as error:
        latency.main(latency.Args(**words))
    assert "\n" not in str(error.value)
