"""The arm on emulated servos: calibration against lerobot's formulas, start, ticks, faults, stop."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from hardware import emulator, so101
from hardware.emulator import EmulatedBus, EmulatedTransport, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError
from hardware.governor import Limits
from hardware.so101 import (
    GRIPPER,
    JOINTS,
    SO101,
    ArmFault,
    Calibration,
    JointCalibration,
    differences,
    write_eeprom,
)

SPEC = dict(
    joint_names=list(JOINTS), joint_low=[-1.92, -1.745, -1.69, -1.658, -2.744, -0.1745],
    joint_high=[1.92, 1.745, 1.69, 1.658, 2.841, 2.0944], action_scale=[0.1] * 5 + [0.2], control_hz=10.0,
)  # fmt: skip
HALF = (1251, 1138, 1102, 1081, 0, 735)  # raw, half of the recorded ranges
POSE = (2100, 1500, 2500, 2047, 1300, 2400)  # present positions of the joints when a test begins


def calibration(**changes) -> Calibration:
    joints = {}
    for i, name in enumerate(JOINTS):
        low, high = (0, 4095) if name == "wrist_roll" else (2047 - HALF[i], 2047 + HALF[i])
        joints[name] = dict(
            id=i + 1, drive_mode=0, homing_offset=150 * i - 300, range_min=low, range_max=high
        )
        joints[name] |= changes.get(name, {})
    return Calibration.from_dict(joints)


class Rig:
    """An arm, its servos and their clock."""

    def __init__(self, pose=POSE, started=True, calibrated=True, retries=2, **options):
        self.clock = VirtualClock()
        self.servos = EmulatedBus(range(1, 7), self.clock, **options)
        self.calibration = calibration()
        for id, registers in self.calibration.eeprom().items() if calibrated else ():
            for name, value in registers.items():
                self[id]._set(name, value, self[id].eeprom)
        self.servos.power_cycle()
        for id, position in enumerate(pose, start=1):
            self[id].position = position
        self.transport = EmulatedTransport(self.servos, self.clock)
        self.bus = Bus(self.transport, self.clock, retries=retries)
        self.arm = SO101(
            self.bus, self.calibration, Limits.from_spec(SPEC), self.clock, self.clock.sleep
        )
        if started:
            self.arm.start()

    def __getitem__(self, id):
        return self.servos.servos[id]

    @property
    def positions(self):
        self.servos.advance()
        return np.array([servo.position for servo in self.servos.servos.values()])

    @property
    def torques(self):
        return [
            servo.registers[REGISTERS["torque_enable"][0]] for servo in self.servos.servos.values()
        ]

    def drive(self, joint, radians, seconds=1.0):
        """Sends one joint somewhere at 10 Hz, at the governor's speed; returns the last state."""
        at = JOINTS.index(joint)
        target = self.arm.read().position
        for _ in range(round(10 * seconds)):
            left = radians - target[at]
            target[at] += np.clip(left, *(np.array([-0.1, 0.1]) * self.arm.limits.velocity[at]))
            self.arm.write(target)
            self.clock.sleep(0.1)
            state = self.arm.read()
        return state


# --- Calibration ------------------------------------------------------------------------------------------------------
def lerobots_degrees(joint: JointCalibration, raw):
    """As lerobot turns raw counts into degrees: from the middle of the range, 4095 steps a turn, limited to nothing."""
    return (raw - (joint.range_min + joint.range_max) / 2) * 360 / 4095


def lerobots_raw(joint: JointCalibration, degrees):
    """And back, rounding towards zero."""
    return int(degrees * 4095 / 360 + (joint.range_min + joint.range_max) / 2)


def test_angles_are_lerobots_degrees():
    random, raw = np.random.default_rng(0), np.arange(4096)
    for _ in range(20):
        low, high = np.sort(random.choice(4096, 2, replace=False)).tolist()
        one = calibration(elbow_flex=dict(range_min=low, range_max=high))
        angles = one.to_radians("elbow_flex", raw)
        np.testing.assert_allclose(
            angles, np.radians(lerobots_degrees(one.joints["elbow_flex"], raw)), atol=1e-12
        )
        assert (one.to_raw("elbow_flex", angles) == raw).all()
        for angle in random.uniform(-3, 3, 50):
            theirs = lerobots_raw(one.joints["elbow_flex"], math.degrees(angle))
            assert abs(one.to_raw("elbow_flex", angle) - theirs) <= 1


def test_the_jaw_has_a_map_of_its_own():
    """-62.5 and 64.62 degrees of the servo are -10 and 120 degrees of the simulated joint; between them a line."""
    one, joint = calibration(), calibration().joints["gripper"]
    for servo, simulated in ((-62.5, -10.0), (64.62, 120.0), ((-62.5 + 64.62) / 2, 55.0)):
        raw = servo * 4095 / 360 + (joint.range_min + joint.range_max) / 2
        assert math.degrees(one.to_radians("gripper", raw)) == pytest.approx(simulated, abs=1e-9)
        assert abs(one.to_raw("gripper", math.radians(simulated)) - raw) <= 0.5
    # 130 degrees of the joint for 127.12 of the servo
    assert one.slope[GRIPPER] / one.slope[0] == pytest.approx(130 / 127.12)


def test_all_joints_at_once_are_each_joint_by_itself():
    one, random = calibration(), np.random.default_rng(1)
    raw = random.integers(0, 4096, (50, 6))
    angles = one.angles(raw)
    for at, name in enumerate(JOINTS):
        np.testing.assert_array_equal(angles[:, at], one.to_radians(name, raw[:, at]))
    inside = np.clip(raw, one.low, one.high)
    np.testing.assert_array_equal(one.goals(one.angles(inside)), inside)


def test_goals_stay_within_the_recorded_ranges_and_ten_degrees_from_the_encoders_ends():
    one = calibration()
    for radians in (-1e6, 1e6):
        goals = one.goals(np.full(6, radians))
        for at, name in enumerate(JOINTS):
            joint = one.joints[name]
            assert joint.range_min <= goals[at] <= joint.range_max
            assert min(goals[at], 4095 - goals[at]) * 360 / 4096 >= 10.0
    # so nothing that the simulated joints may do is near the ends, though wrist_roll's range is the whole turn
    limits = Limits.from_spec(SPEC)
    for end in (limits.low, limits.high):
        assert abs(one.goals(end) - one.zero - end / one.slope)[4] <= 0.5


def test_the_file_is_lerobots(tmp_path):
    text = json.dumps({
        name: {"id": i + 1, "drive_mode": 0, "homing_offset": -20 * i, "range_min": 700 + i, "range_max": 3400}
        for i, name in enumerate(JOINTS)
    }, indent=4)  # fmt: skip
    path = tmp_path / "a" / "arm.json"
    path.parent.mkdir()
    path.write_text(text)
    one = Calibration.from_json(path)
    assert one.joints["wrist_flex"] == JointCalibration(4, 0, -60, 703, 3400)
    one.to_json(tmp_path / "b" / "arm.json")
    assert (tmp_path / "b" / "arm.json").read_text() == text
    assert [file.name for file in (tmp_path / "b").iterdir()] == [
        "arm.json"
    ]  # no temporary file is left
    # the order of joints in a file does not matter
    path.write_text(json.dumps(dict(reversed(json.loads(text).items()))))
    assert (
        Calibration.from_json(path).hash == one.hash != calibration().hash and len(one.hash) == 16
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it has no joints"),
        (dict(gripper=None), "the joints must be"),
        (dict(tail=dict(id=7)), "the joints must be"),
        (dict(gripper=dict(id=6)), "gripper must have exactly"),
        (
            dict(gripper=dict(id=5, drive_mode=0, homing_offset=0, range_min=1, range_max=2)),
            "has id 5",
        ),
        (
            dict(gripper=dict(id=6, drive_mode=1, homing_offset=0, range_min=1, range_max=2)),
            "drive_mode 1",
        ),
        (
            dict(gripper=dict(id=6, drive_mode=0, homing_offset=2048, range_min=1, range_max=2)),
            "out of range",
        ),
        (
            dict(gripper=dict(id=6, drive_mode=0, homing_offset=0, range_min=9, range_max=9)),
            "out of range",
        ),
        (
            dict(gripper=dict(id=6, drive_mode=0, homing_offset=0, range_min=1.5, range_max=9)),
            "whole numbers",
        ),
    ],
)
def test_a_file_that_cannot_be_gets_one_line(tmp_path, change, message):
    path = tmp_path / "arm.json"
    if isinstance(change, dict):
        calibration().to_json(path)
        content = json.loads(path.read_text()) | change
        change = json.dumps({name: joint for name, joint in content.items() if joint is not None})
    path.write_text(change)
    with pytest.raises(ValueError, match=message) as error:
        Calibration.from_json(path)
    assert "\n" not in str(error.value) and "arm.json" in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no calibration nowhere.json: make one"):
        Calibration.from_json("nowhere.json")


# --- Registers that are kept ------------------------------------------------------------------------------------------
def test_only_what_differs_is_written_and_the_lock_is_closed_again():
    rig = Rig(started=False)
    wanted = {1: dict(p=16, d=32, phase=lambda old: old & ~0x10), 2: dict(homing_offset=-77)}
    before = rig[2].get("homing_offset")
    assert write_eeprom(rig.bus, wanted, rig.clock.sleep) == [
        (1, "p", 32, 16),
        (2, "homing_offset", before, -77),
    ]
    assert dict(rig[1].eeprom_writes) == {21: 1} and dict(rig[2].eeprom_writes) == {31: 1, 32: 1}
    assert not rig[3].eeprom_writes and all(rig[id].get("lock") == 1 for id in range(1, 7))
    assert write_eeprom(rig.bus, wanted, rig.clock.sleep) == []
    rig.servos.power_cycle()
    assert rig[1].get("p") == 16 and rig[2].get("homing_offset") == -77  # kept without power


def test_a_setting_that_is_not_kept_is_an_error():
    rig = Rig(started=False)
    rig[1].write = lambda address, data: None
    with pytest.raises(BusError, match="servo 1 does not keep p = 16: it still has 32"):
        write_eeprom(rig.bus, {1: dict(p=16)}, rig.clock.sleep)


def test_differences_names_what_is_and_what_should_be():
    assert differences({1: dict(p=32, d=32)}, {1: dict(p=16, d=32)}) == [(1, "p", 32, 16)]


# --- Start ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("absent_blocks", [False, True])
@pytest.mark.parametrize("goal_reads_back_limited", [False, True])
@pytest.mark.parametrize("power_up_goal", [0, None, 4000])
@pytest.mark.parametrize("power_up_torque", [False, True])
def test_the_start_never_moves_the_arm(
    power_up_torque, power_up_goal, goal_reads_back_limited, absent_blocks
):
    rig = Rig(started=False, power_up_torque=power_up_torque, power_up_goal=power_up_goal,
              goal_reads_back_limited=goal_reads_back_limited, absent_blocks=absent_blocks)  # fmt: skip
    assert rig.torques == [int(power_up_torque)] * 6
    state = rig.arm.start()
    rig.clock.sleep(1.0)
    assert np.abs(rig.positions - POSE).max() <= 1.0
    assert rig.torques == [1] * 6 and rig.arm.state == "hold"
    np.testing.assert_array_equal(state.raw, POSE)
    np.testing.assert_allclose(state.position, rig.calibration.angles(POSE))
    # what the log of all bytes says: torque off first; the only goals are where the joints stand
    first = rig.servos.writes[0]
    assert first[1:] == (0xFE, REGISTERS["torque_enable"][0], b"\x00")
    goals = {
        id: int.from_bytes(data[1:3], "little")
        for _, id, _, data in rig.servos.written("goal_position")
    }
    assert goals == dict(enumerate(POSE, start=1)) and len(rig.servos.written("goal_position")) == 6
    # weak before anything can pull, strong only at the end
    limits = [
        data
        for _, id, address, data in rig.servos.written("torque_limit")
        if id == 1 and address == 48
    ]
    assert [int.from_bytes(data, "little") for data in limits] == [400, 700]
    assert rig[6].get("torque_limit") == 500 and rig.servos.written("torque_limit")[0][
        0
    ] < goals_time(rig)


def goals_time(rig):
    return rig.servos.written("goal_position")[0][0]


def test_settings_are_written_at_the_first_start_only():
    rig = Rig(started=False)
    rig.arm.start()
    assert (1, "p", 32, 16) in rig.arm.changed and (6, "overload_torque", 80, 25) in rig.arm.changed
    assert (1, "max_torque", 1000, 300) in rig.arm.changed
    counts = [dict(rig[id].eeprom_writes) for id in range(1, 7)]
    assert all(set(count.values()) == {1} for count in counts)
    rig.arm.stop()
    again = SO101(rig.bus, rig.calibration, rig.arm.limits, rig.clock, rig.clock.sleep)
    again.start()
    assert again.changed == [] and counts == [dict(rig[id].eeprom_writes) for id in range(1, 7)]


def spoil(rig, what):
    if what == "missing":
        rig.servos.disconnect(3)
        rig.servos.disconnect(6)
    elif what == "wrong baud":
        rig.servos.wrong_baud(500_000)
    elif what == "duplicate":
        rig.servos.duplicate(2)
    elif what == "model":
        rig[4].registers[3:5] = rig[4].eeprom[3:5] = b"\x01\x02"
    elif what == "other arm":
        rig[2]._set("homing_offset", 5)
    elif what == "outside":
        rig[2].position = 800
    elif what == "next to the end":
        rig[5].position = 60
    elif what == "hot":
        rig.servos.heat(1, 52.0)
    elif what == "error":
        rig.servos.error(5, 0x02)
    elif what == "moving":
        rig[2].load = 0.05  # it sinks
    elif what == "unplugged":
        rig.servos.unplug()


REFUSALS = {
    "missing": r"no answer from elbow_flex \(id 3\), gripper \(id 6\): check power",
    "wrong baud": r"no answer from shoulder_pan \(id 1\), .*gripper \(id 6\)",
    "duplicate": "two servos",
    "model": r"wrist_flex \(id 4\) is a servo of model 513; this driver knows STS3215 \(777\)",
    "other arm": "shoulder_lift holds homing_offset = 5, the calibration says -150.*--write",
    "outside": "shoulder_lift stands at 800, outside of 909 to 3185",
    "next to the end": "wrist_roll stands at 60, outside of 114 to 3981",
    "hot": "shoulder_pan has 52 degrees",
    "error": "wrist_roll reports: encoder fault",
    "moving": "shoulder_lift is moving: hold the arm still",
    "unplugged": "still plugged in",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_start_is_refused_before_any_goal_is_sent(what):
    rig = Rig(started=False, power_up_torque=True)
    spoil(rig, what)
    with pytest.raises(ArmFault, match=REFUSALS[what]) as fault:
        rig.arm.start()
    assert "\n" not in str(fault.value)
    assert not rig.servos.written("goal_position") and rig.arm.state == "stopped"
    if what == "unplugged":
        return
    heard = [
        torque
        for torque, servo in zip(rig.torques, rig.servos.servos.values(), strict=True)
        if not servo.deaf
    ]
    assert what == "wrong baud" or heard == [0] * len(heard)
    with pytest.raises(ArmFault):
        rig.arm.write(np.zeros(6))
    with pytest.raises(ArmFault, match="make a new SO101"):
        rig.arm.start()
    rig.arm.stop()
    assert not rig.servos.written("goal_position")


def test_a_goal_that_the_servo_has_not_taken_lets_go_again():
    rig = Rig(started=False)
    rig[3].limited = lambda goal: 2222
    with pytest.raises(
        ArmFault, match=r"elbow_flex \(id 3\) has not taken its goal: .* reads 2222, not 2500"
    ):
        rig.arm.start()
    assert rig.torques == [0] * 6 and set(rig.arm.torque.values()) == {"off"}


def test_an_arm_that_sinks_when_torque_comes_on_is_let_go():
    rig = Rig(started=False)
    # too heavy for the weak torque of the start; it is held by hand until torque is on
    rig[2].load = lambda servo: -0.6 if servo.torque else 0.0
    with pytest.raises(
        ArmFault, match="shoulder_lift moved by .* degrees when torque came on: support the arm"
    ):
        rig.arm.start()
    assert rig.torques == [0] * 6


def test_an_interrupted_start_lets_go():
    rig = Rig(started=False)

    def interrupt(seconds):
        if rig.servos.written("goal_position"):
            raise KeyboardInterrupt
        rig.clock.sleep(seconds)

    rig.arm.sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.arm.start()
    assert rig.torques == [0] * 6 and rig.arm.state == "stopped"


def test_what_a_person_should_know_is_a_warning():
    rig = Rig(started=False)
    rig[3].registers[1] = rig[3].eeprom[1] = 4
    short = calibration(shoulder_pan=dict(range_min=1447, range_max=2647))
    rig[1]._set("min_position", 1447), rig[1]._set("max_position", 2647)
    arm = SO101(rig.bus, short, rig.arm.limits, rig.clock, rig.clock.sleep)
    arm.identify()
    assert not rig.servos.writes  # it only reads
    assert "differ in firmware" in arm.warnings[0]
    assert (
        "shoulder_pan: the policy may go 56 degrees farther than the range that was recorded"
        in arm.warnings[1]
    )


# --- One tick ---------------------------------------------------------------------------------------------------------
def test_a_tick_is_one_read_of_31_bytes_and_one_write_of_7():
    rig, sent = Rig(), []
    rig.transport.write = lambda data, write=rig.transport.write: (sent.append(data), write(data))
    state = rig.arm.read()
    rig.arm.write(state.position)
    assert len(sent) == 2
    assert sent[0] == bytes.fromhex("ff ff fe 0a 82 28 1f 01 02 03 04 05 06 19".replace(" ", ""))
    head, body = sent[1][:7], sent[1][7:-1]
    assert (
        head == bytes((0xFF, 0xFF, 0xFE, 4 + 6 * 8, 0x83, 41, 7))
        and sent[1][-1] == ~sum(sent[1][2:-1]) & 0xFF
    )
    for at in range(6):
        id, acceleration, goal, seconds, speed = (
            int.from_bytes(body[8 * at :][a:b], "little")
            for a, b in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 8))
        )
        assert (id, goal, seconds) == (at + 1, POSE[at], 0)
        # 1.5 rad/s of the arm's joints is 978 steps/s; the jaw is allowed 3 rad/s at 1.0227 rad of the joint per rad
        assert speed == (978 if at < 5 else math.ceil(3.0 * 4095 / (2 * math.pi) / (130 / 127.12)))
        assert acceleration == 254  # 4 x 10 rad/s^2 would be 261: the register's largest


def test_the_servos_own_speed_limit_holds_whatever_is_sent():
    rig = Rig()
    target = rig.arm.read().position.copy()
    target[[0, 5]] += (1.2, -1.2)
    rig.arm.write(target)  # no governor has cut this into steps
    fastest = np.zeros(6)
    for _ in range(200):
        rig.clock.sleep(0.005)
        rig.servos.advance()
        fastest = np.maximum(fastest, [abs(servo.velocity) for servo in rig.servos.servos.values()])
    wall = rig.arm.wall_speed
    assert 0.9 * wall[0] < fastest[0] < 1.05 * wall[0] and fastest[5] < 1.05 * wall[5]


def test_slow_limits_make_a_slow_wall():
    rig = Rig(started=False)
    slow = Limits.from_spec(SPEC | dict(velocity_limit=[0.001] * 6, acceleration_limit=[0.5] * 6))
    arm = SO101(rig.bus, rig.calibration, slow, rig.clock, rig.clock.sleep)
    assert (arm.wall_speed >= 1).all() and (arm.wall_speed <= 2).all()  # 0 would be no limit at all
    assert (arm.wall_acceleration[:5] == math.ceil(2.0 * 4095 / (2 * math.pi) / 100)).all()


def test_readings_are_in_units():
    rig = Rig(voltage=7.4)
    state = rig.drive("shoulder_pan", 0.6, 0.5)
    speed = state.velocity[0]
    assert 0.7 < speed < 1.3 and abs(state.velocity[1]) < 0.01
    assert state.position[0] > rig.calibration.to_radians("shoulder_pan", POSE[0]) + 0.3
    assert (state.voltage > 7).all() and (abs(state.temperature - 25) <= 1).all()
    assert 0 < abs(state.current[0]) < 1.0 and 0 < abs(state.load[0]) <= 0.7
    assert (
        (state.errors == 0).all()
        and (state.age == 0).all()
        and abs(state.time - rig.clock()) < 0.01
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_goals_that_are_no_angles_are_refused(bad):
    rig = Rig()
    goals = len(rig.servos.written("goal_position"))
    with pytest.raises(ArmFault, match="six finite angles"):
        rig.arm.write([0, 0, 0, bad, 0, 0])
    with pytest.raises(ArmFault, match="six finite angles"):
        rig.arm.write([0, 0])
    assert len(rig.servos.written("goal_position")) == goals


# --- Faults -----------------------------------------------------------------------------------------------------------
def latched(rig):
    """A fault stays: no goal goes out, but letting go works."""
    before = len(rig.servos.written("goal_position"))
    with pytest.raises(ArmFault):
        rig.arm.write(np.zeros(6))
    assert len(rig.servos.written("goal_position")) == before
    return set(rig.arm.stop().values())


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x04, 0x08, 0x20])
def test_an_error_bit_stops_in_the_same_cycle(bit):
    rig = Rig()
    rig.arm.read()
    rig.servos.error(4, bit)
    with pytest.raises(ArmFault, match="wrist_flex reports: ") as fault:
        rig.arm.read()
    assert fault.value.kind == "error" and fault.value.joints == ("wrist_flex",)
    assert latched(rig) == {"off"} and rig.torques == [0] * 6


def test_heat_is_first_a_warning_and_then_a_fault():
    rig = Rig()
    rig.servos.heat(6, 61.0)
    rig.arm.read(), rig.arm.read()
    assert rig.arm.warnings == ["gripper is getting hot: 60 degrees; it stops at 65"]
    rig.servos.heat(6, 66.0)
    with pytest.raises(ArmFault, match="gripper has 66 degrees: too hot") as fault:
        rig.arm.read()
    assert fault.value.kind == "heat" and latched(rig) == {"off"}


def test_a_blocked_joint_is_a_stall_after_a_while():
    rig = Rig()
    rig.servos.block(2)
    begin = rig.clock()
    with pytest.raises(
        ArmFault, match="shoulder_lift is stalled: .* A, .* degrees from its goal"
    ) as fault:
        rig.drive("shoulder_lift", 0.5, 3.0)
    assert 1.0 < rig.clock() - begin < 1.6 and fault.value.kind == "stall"
    assert rig[2].get("torque_limit") == 400, "weaker before off"
    assert not rig[2].error  # before the servo's own protection weakens it
    assert latched(rig) == {"off"}


def test_a_short_hindrance_is_none():
    rig = Rig()
    rig.servos.block(2)
    rig.clock.at(rig.clock() + 0.35, lambda: rig.servos.block(2, False))
    state = rig.drive("shoulder_lift", -0.4, 2.0)
    assert abs(state.position[1] + 0.4) < 0.05


def test_a_jaw_that_holds_something_is_weakened_and_not_a_fault():
    """Something stands in the way of a closing jaw; it keeps its grip, with less torque, and lets go again."""
    rig = Rig()
    start = rig.arm.read().position[GRIPPER]

    def block(on):
        rig.servos.block(6, on)

    block(True)
    rig.drive("gripper", start - 0.5, 4.0)
    assert rig[6].get("torque_limit") == 240 and not rig[6].error
    assert 0.1 < abs(rig[6].duty) <= 0.24
    rig.drive("gripper", start - 0.5, 6.0)
    assert not rig[6].error and rig[6].temperature < 40
    block(False)
    state = rig.drive("gripper", start + 0.3, 2.0)
    assert rig[6].get("torque_limit") == 500
    assert abs(state.position[GRIPPER] - start - 0.3) < 0.05


def test_a_jump_of_a_reading_is_a_fault():
    rig = Rig()
    rig.arm.read()
    rig.clock.sleep(0.1)
    rig.servos.advance()
    rig[3].encoder += 350  # 31 degrees at once
    with pytest.raises(ArmFault, match="elbow_flex jumped by 31 degrees") as fault:
        rig.arm.read()
    assert fault.value.kind == "jump" and latched(rig) == {"off"}


def test_an_angle_next_to_the_encoders_end_is_a_fault_before_it_wraps():
    rig = Rig(pose=(2100, 1500, 2500, 2047, 200, 2400))
    rig[5].load = -0.9  # someone turns the wrist, slowly and against its torque
    with pytest.raises(ArmFault, match="wrist_roll reads .* next to the encoder's end") as fault:
        for _ in range(200):
            rig.clock.sleep(0.002)
            rig.arm.read()
    assert fault.value.kind == "wrap" and 0 < rig[5].position < 57 and latched(rig) == {"off"}


@pytest.mark.parametrize("absent_blocks", [False, True])
def test_single_misses_are_bridged_and_three_in_a_row_are_a_fault(absent_blocks):
    rig = Rig(retries=0, absent_blocks=absent_blocks)
    first = rig.arm.read()
    for _ in range(2):
        rig.clock.sleep(0.1)
        rig.servos.drop(4)
        state = rig.arm.read()
        assert state.age[3] >= 0.09 and state.position[3] == first.position[3] and state.age[0] == 0
    rig.clock.sleep(0.1)
    state = rig.arm.read()
    assert (state.age == 0).all()
    rig.clock.sleep(10)
    rig.servos.mute(4)
    with pytest.raises(
        ArmFault, match="no complete answer 3 times in a row, last not from .*wrist_flex"
    ) as fault:
        for _ in range(3):
            rig.clock.sleep(0.1)
            rig.arm.read()
    assert fault.value.kind == "bus" and rig.torques == [1] * 6
    torques = rig.arm.stop()
    assert (
        rig.torques == [0] * 6
        and torques["wrist_flex"] == "silent"
        and torques["shoulder_pan"] == "off"
    )


def test_too_many_single_misses_are_a_fault():
    rig = Rig(retries=0)
    with pytest.raises(ArmFault, match="no complete answer 3 times of"):
        for tick in range(50):
            rig.clock.sleep(0.1)
            if tick % 5 == 0:
                rig.servos.drop(2)
            rig.arm.read()
    assert rig.clock() < 3.0


def test_rare_misses_are_none():
    rig = Rig(retries=0)
    for tick in range(200):
        rig.clock.sleep(0.1)
        if tick % 40 == 0:
            rig.servos.drop(2)
        rig.arm.read()


@pytest.mark.parametrize("fault", ["corrupt", "drop", "late", "noise"])
def test_a_disturbed_reply_is_asked_for_again_in_the_same_cycle(fault):
    rig = Rig()
    faults = dict(corrupt=lambda: rig.servos.corrupt(1), drop=lambda: rig.servos.drop(3),
                  late=lambda: rig.servos.delay(3, 0.012), noise=lambda: rig.servos.noise(b"\xff\xff\x03"))  # fmt: skip
    target = rig.arm.read().position.copy()
    for _ in range(5):
        target[2] += 0.1
        rig.arm.write(target)
        rig.clock.sleep(0.1)
        faults[fault]()
        begin = rig.clock()
        state = rig.arm.read()
        assert (state.age == 0).all() and begin <= state.time and rig.clock() - begin < 0.03
        assert (
            abs(state.raw[2] - rig[3].position) < 30
        )  # it moves at 650 steps/s: not the last cycle's, 65 steps ago


def test_unplugging_is_a_fault_at_once_and_stopping_does_not_hang():
    rig = Rig()
    rig.clock.at(rig.clock() + 0.25, rig.servos.unplug)
    begin = rig.clock()
    with pytest.raises(ArmFault, match="still plugged in") as fault:
        rig.drive("shoulder_pan", 1.0, 2.0)
    assert fault.value.kind == "bus"
    assert rig.arm.stop() == dict.fromkeys(JOINTS, "silent")
    assert rig.clock() - begin < 1.0
    with pytest.raises(ArmFault):
        rig.arm.write(np.zeros(6))


def test_without_torque_the_arm_may_be_turned_by_hand():
    rig = Rig(started=False)
    rig.arm.read()
    rig[5].encoder += 1500
    rig[1].position = 30
    assert rig.arm.read().raw[0] == 30
    with pytest.raises(ArmFault, match="the arm is idle"):
        rig.arm.write(np.zeros(6))
    assert not rig.servos.writes


# --- What a servo forgets, supply, line -------------------------------------------------------------------------------
@pytest.mark.parametrize("torque", [False, True])
@pytest.mark.parametrize("moment", ["before the write", "after it"])
def test_a_servo_that_restarts_is_noticed_at_the_next_read(torque, moment):
    """Also if the goal of the same tick reaches it in between; until then it is weaker than in a run."""
    rig = Rig()
    target = rig.arm.read().position
    rig.arm.write(target)
    rig.arm.read()
    rig.servos.power_up_torque = torque
    if moment == "after it":
        rig.arm.write(target)
    rig.servos.power_cycle(2)
    assert rig[2].get("torque_limit") == 300 and rig[6].get("max_torque") == 230
    if moment == "before the write":
        rig.arm.write(target)
    rig.clock.sleep(0.1)
    with pytest.raises(ArmFault, match="shoulder_lift has forgotten what it was told") as fault:
        rig.arm.read()
    assert fault.value.kind == "restart" and latched(rig) == {"off"}


@pytest.mark.parametrize("volts", [7.4, 8.0])
def test_a_servo_that_restarts_is_too_weak_to_outrun_its_limit(volts):
    """With torque, no speed limit, and its old goal or 0 as the goal: a tick of a second, to give it time."""
    rig = Rig(voltage=volts)
    rig.arm.write(rig.arm.read().position)
    rig.servos.power_up_torque = True
    wall = rig.arm.wall_speed
    for goal in (0, 4000):
        rig.servos.power_up_goal = goal
        rig.servos.power_cycle()
        fastest = np.zeros(6)
        for _ in range(100):
            rig.clock.sleep(0.01)
            rig.servos.advance()
            fastest = np.maximum(fastest, [abs(rig[id].velocity) for id in range(1, 7)])
        assert (fastest > 0.5 * emulator.NO_LOAD_SPEED * so101.POWER_UP_TORQUE / 1000).all()
        assert (fastest < wall).all() and (fastest / 651.9 < so101.POWER_UP_SPEED).all()
    assert so101.POWER_UP_TORQUE.max() / 1000 * 4.8 < so101.POWER_UP_SPEED, "the sheet's motor"
    sent = np.minimum(so101.HOLD_TORQUE, so101.START_TORQUE) * 1000
    assert (so101.POWER_UP_TORQUE < sent).all(), "it gives itself away"


def test_a_servo_that_allows_no_more_than_its_kept_limit_is_refused():
    """Nobody here knows that servos take a torque limit above the one that they power up with."""
    rig = Rig(started=False)
    servo, limit = rig[3], so101.POWER_UP_TORQUE[2]
    write = servo.write

    def capped(address, data):
        write(address, data)
        servo._set("torque_limit", min(servo.get("torque_limit"), int(limit)))

    servo.write = capped
    with pytest.raises(
        ArmFault, match="elbow_flex .* has not taken its torque limit: .* reads 300"
    ):
        rig.arm.start()
    assert not rig.servos.written("goal_position") and not any(rig.torques)


def test_a_lost_write_is_sent_again_and_no_fault():
    rig = Rig()
    start = rig.arm.read().position[GRIPPER]
    rig.servos.block(6)
    lost = 0
    for tick in range(30):
        target = rig.arm.read().position.copy()
        target[GRIPPER] = start - 0.5
        if tick in (4, 9, 17):
            rig.servos.lose(1)
            lost += 1
        rig.arm.write(target)
        rig.clock.sleep(0.1)
    assert lost == 3 and rig[6].get("torque_limit") == 240 and rig.arm.fault is None


def test_a_joint_against_the_table_is_weaker_before_it_is_switched_off():
    """Its error is too small for a stall: it only gets warm, for a minute, in the emulator's thermal model."""
    rig = Rig()
    target = rig.arm.read().position.copy()
    rig.servos.block(2)
    rig.servos.heat(2, 56.0)
    target[1] += 0.085
    limits, begin = [], rig.clock()
    with pytest.raises(ArmFault, match="shoulder_lift has 65 degrees: too hot"):
        while rig.clock() < begin + 300:
            rig.arm.write(target)
            rig.clock.sleep(0.2)
            limits.append(rig[2].get("torque_limit"))
            rig.arm.read()
    assert limits[0] > 450 and limits[-1] == 400 and np.all(np.diff(limits) <= 0)
    assert len(set(limits)) > 2, "step by step"


def test_the_jaws_hold_torque_keeps_it_below_the_warning_for_good():
    """24 % of the stall torque: at rest in the thermal model below 60 degrees, and no overload of the servo's own."""
    share = so101.JAW_HOLD_TORQUE
    final = 25 + emulator.COOLING_TIME * emulator.HEATING * share**2
    assert final < so101.WARM and 100 * share < so101.GRIPPER_SETTINGS["overload_torque"]


@pytest.mark.parametrize("volts", [4.2, 9.0, 12.0])
def test_a_wrong_supply_is_refused(volts):
    rig = Rig(started=False, voltage=volts)
    for servo in rig.servos.servos.values():
        servo.write(19, b"\0")
        servo.options.errors_latch = False
    with pytest.raises(ArmFault, match="V, outside of 4.5 to 8.0 V|voltage out of range"):
        rig.arm.start()
    assert rig.torques == [0] * 6 and not rig.servos.written("goal_position")


def test_a_supply_that_sags_for_a_moment_is_none():
    rig = Rig()
    for tick in range(20):
        rig.servos.voltage = 4.3 if tick in (5, 6) else 7.4
        rig.clock.sleep(0.1)
        rig.arm.read()


@pytest.mark.parametrize(("hz", "loss"), [(10, 0.05), (30, 0.05), (50, 0.05)])
def test_lost_replies_are_asked_for_again_within_the_tick(hz, loss):
    """For 12 s at each rate; a read never takes more than its share of the period."""
    rig = Rig(loss=0.0)
    rig.servos.loss, rig.arm.period = loss, 1 / hz
    longest = 0.0
    for _ in range(12 * hz):
        begin = rig.clock()
        rig.arm.write(rig.arm.read().position)
        longest = max(longest, rig.clock() - begin)
        rig.clock.sleep(max(0.0, begin + 1 / hz - rig.clock()))
    assert longest < so101.BUDGET / hz + 0.001


def test_an_adapter_that_keeps_bytes_is_recognised():
    rig = Rig(started=False, usb_latency=0.016)
    rig.arm.start()
    assert "latency timer to 1 ms: echo 1 | sudo tee /sys/bus/usb-serial" in rig.arm.warnings[0]
    for _ in range(20):
        rig.arm.write(rig.arm.read().position)
        rig.clock.sleep(0.08)
    assert set(rig.arm.stop().values()) == {"off"}
    rig = Rig(started=False, usb_latency=0.016)
    rig.arm.period = 1 / 30
    with pytest.raises(ArmFault, match="latency timer .*too slow for 30 Hz"):
        rig.arm.start()


# --- All or nothing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [0, 1, 4, 9, 23])
def test_whatever_interrupts_the_writing_of_settings_puts_the_old_ones_back(at, error):
    rig = Rig(started=False)
    before = [bytes(rig[id].eeprom) for id in range(1, 7)]
    wanted = {
        id: dict(homing_offset=-7 * id, min_position=500 + id, max_position=3300)
        for id in range(1, 7)
    }
    left = iter(range(at + 1))

    def sleep(seconds):
        rig.clock.sleep(seconds)
        if next(left, None) == at:
            raise error("now")

    try:
        write_eeprom(rig.bus, wanted, sleep)
        raise AssertionError("it was not interrupted")
    except error as caught:
        assert caught.__notes__ == ["all servos have their old values"]
    assert before == [bytes(rig[id].eeprom) for id in range(1, 7)]
    assert all(rig[id].get("lock") == 1 for id in range(1, 7))


def test_servos_that_may_have_new_settings_are_named():
    rig = Rig(started=False)
    wanted = {id: dict(p=17) for id in range(1, 7)}

    def sleep(seconds):
        rig.clock.sleep(seconds)
        if rig[2].eeprom_writes:
            rig.servos.disconnect(2)

    with pytest.raises(BusError, match="servo 2 does not answer") as error:
        write_eeprom(rig.bus, wanted, sleep)
    assert error.value.__notes__[0].startswith(
        "old values read back from servos 1, 3, 4, 5, 6; servo 2 may have new ones"
    )
    assert [rig[id].get("p") for id in range(1, 7)] == [32, 17, 32, 32, 32, 32]


# --- Stop -------------------------------------------------------------------------------------------------------------
def test_a_gentle_stop_stays_where_it_is_and_is_weak_before_it_lets_go():
    rig = Rig()
    rig.drive("shoulder_pan", 1.0, 0.5)
    here, begin = rig.positions, rig.clock()
    assert rig.arm.stop(gently=True) == dict.fromkeys(JOINTS, "off")
    assert np.abs(rig.positions - here).max() < 60  # it was moving at 650 steps/s
    assert 1.3 < rig.clock() - begin < 1.5 and rig[1].get("torque_limit") == 150


def test_a_gentle_stop_gives_no_goal_to_a_servo_with_error_bits():
    rig = Rig()
    rig.servos.error(2, 0x20)
    before = len(rig.servos.written("goal_position"))
    rig.arm.stop(gently=True)
    assert [id for _, id, *_ in rig.servos.written("goal_position")[before:]] == [1, 3, 4, 5, 6]


STOP_FAULTS = {
    "none": lambda rig: None,
    "mute": lambda rig: rig.servos.mute(2),
    "two mute": lambda rig: (rig.servos.mute(1), rig.servos.mute(6)),
    "error bits": lambda rig: [rig.servos.error(id, 0x2C) for id in range(1, 7)],
    "hot": lambda rig: rig.servos.heat(2, 90.0),
    "corrupt": lambda rig: rig.servos.corrupt(4),
    "dropped": lambda rig: [rig.servos.drop(id, 5) for id in range(1, 7)],
    "late": lambda rig: rig.servos.delay(3, 0.05, 4),
    "noise": lambda rig: rig.servos.noise(b"\xff\xff\x01\x04"),
    "requests lost": lambda rig: rig.servos.lose(2),
    "blocked": lambda rig: rig.servos.block(1),
    "duplicate": lambda rig: rig.servos.duplicate(3),
    "moving": lambda rig: rig.arm.write(rig.arm.last.position + 0.3),
}


@pytest.mark.parametrize("fault", STOP_FAULTS)
def test_stop_lets_go_of_every_motor_and_sends_no_goal_after_it(fault):
    rig = Rig(absent_blocks=True)
    rig.drive("shoulder_pan", 0.5, 0.3)
    STOP_FAULTS[fault](rig)
    begin, wall = rig.clock(), len(rig.servos.written("goal_position"))
    torques = rig.arm.stop()
    assert rig.torques == [0] * 6 and rig.clock() - begin < 1.0
    mute = {"mute": ["shoulder_lift"], "two mute": ["shoulder_pan", "gripper"]}.get(fault, [])
    if fault != "duplicate":  # both twins let go, but their answers collide
        assert torques == {name: "silent" if name in mute else "off" for name in JOINTS}
    for call in (lambda: rig.arm.write(np.zeros(6)), rig.arm.start):
        with pytest.raises(ArmFault):
            call()
    rig.arm.read() if fault in ("none", "moving", "blocked") else None
    rig.clock.sleep(1.0)
    assert rig.arm.stop() == torques or fault == "duplicate"
    assert len(rig.servos.written("goal_position")) == wall and rig.torques == [0] * 6


def test_a_motor_that_does_not_let_go_is_named():
    rig = Rig()
    write = rig[4].write
    rig[4].write = lambda address, data: None if address == 40 else write(address, data)
    assert rig.arm.stop() == dict.fromkeys(JOINTS, "off") | {"wrist_flex": "on"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_happens_inside_leaving_lets_go(error):
    rig = Rig(started=False)
    with pytest.raises(error):
        with rig.arm as arm:
            arm.start()
            raise error
    assert rig.torques == [0] * 6 and arm.torque == dict.fromkeys(JOINTS, "off")


def test_a_second_interruption_does_not_keep_stop_from_letting_go():
    rig, calls = Rig(), []

    def interrupt(*arguments, sync_read=rig.bus.sync_read):
        calls.append(1)
        if len(calls) < 3:
            raise KeyboardInterrupt
        return sync_read(*arguments)

    rig.bus.sync_read = interrupt
    assert rig.arm.stop() == dict.fromkeys(JOINTS, "off")
    assert rig.torques == [0] * 6 and len(calls) > 2


# --- Imports ----------------------------------------------------------------------------------------------------------
def test_no_simulator_and_no_torch_is_needed():
    code = ("import sys, hardware.so101, hardware.governor, hardware.feetech; "
            "print({'mujoco', 'warp', 'torch', 'envs', 'cv2'} & set(sys.modules))")  # fmt: skip
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "set()"
    )


def test_limits_for_another_robot_are_refused():
    rig = Rig(started=False)
    with pytest.raises(ValueError, match="the limits are for a, b"):
        SO101(rig.bus, rig.calibration, Limits(*[np.ones(2)] * 5, 0.0, ("a", "b")))
    assert so101.JOINTS == JOINTS
