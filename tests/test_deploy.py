"""From a policy to the arm's motors: states, deadlines, faults, recordings, refusals, and every way out of a run.

Most of it runs the real driver against emulated servos in virtual time. The scene is there where images matter.
"""

import csv
import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_checkpoint import SPEC, write_checkpoint

from hardware import deploy_so101 as deploy
from hardware import deployment, export
from hardware import policy as hardware_policy
from hardware.camera import ArraySource, Camera, CameraError, frame_around
from hardware.deploy_so101 import (
    Args,
    Deployment,
    Fault,
    Interrupted,
    Recorder,
    Recording,
    Refused,
    check_policy,
)
from hardware.emulate import calibrate, joints_of, place, recorded_calibration, shafts
from hardware.emulator import EmulatedBus, EmulatedTransport, PtyServer, VirtualClock
from hardware.feetech import REGISTERS, Bus, BusError, SerialTransport
from hardware.governor import Limits
from hardware.policy import PolicyError, TorchPolicy, area_mean, load_policy, middle_square
from hardware.so101 import JOINTS, SO101, ArmFault, Calibration, write_eeprom

LIMITS = Limits.from_spec(SPEC)
CALIBRATION = Calibration.from_dict(recorded_calibration(SPEC))
START = np.array(SPEC["start_pose"])
SCRIPT = ROOT / "hardware/deploy_so101.py"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakePolicy:
    """Answers with the actions given, then with zeros; `seconds` of virtual time each. Keeps what it saw."""

    def __init__(self, actions=(), clock=None, seconds=0.0, **spec):
        self.spec, self.digest, self.algo, self.path = {**SPEC, **spec}, "0" * 16, "fake", "fake.pt"
        self.actions, self.clock, self.seconds, self.seen, self.resets = (
            list(actions),
            clock,
            seconds,
            [],
            0,
        )

    def reset(self):
        self.resets += 1

    def preprocess(self, frame):
        return area_mean(middle_square(frame)[None], 16)

    def act(self, obs):
        self.seen.append(obs)
        if self.seconds:
            self.clock.sleep(self.seconds)
        action = self.actions.pop(0) if self.actions else np.zeros(6)
        return np.broadcast_to(np.asarray(action, np.float32), (1, 6))


def picture(value=100):
    return frame_around(np.full((16, 16, 3), value, np.uint8))


class Rig:
    """The driver, emulated servos and a camera that shows one image, in virtual time."""

    def __init__(self, policy=None, joints=START, source=None, **options):
        self.clock = VirtualClock()
        self.servos = EmulatedBus(range(1, 7), self.clock)
        calibrate(self.servos, recorded_calibration(SPEC))
        place(self.servos, joints)
        self.policy = policy or FakePolicy()
        self.policy.clock = self.clock
        self.bus = Bus(EmulatedTransport(self.servos, self.clock), self.clock)
        self.arm = SO101(self.bus, CALIBRATION, LIMITS, self.clock, self.clock.sleep)
        camera = Camera(
            source or ArraySource([picture()], clock=self.clock),
            self.clock,
            threaded=False,
            name="wrist",
        )
        self.ticks = []
        options = {"each_tick": self.ticks.append} | options
        self.deployment = Deployment(self.policy, self.arm, {"wrist": camera}, LIMITS, self.clock, self.clock.sleep,
                                     **options)  # fmt: skip

    def joints(self):
        self.servos.advance()
        return joints_of([servo.encoder for servo in self.servos.servos.values()])

    def torques(self):
        return [servo.torque for servo in self.servos.servos.values()]

    def goals_since(self, when):
        return self.servos.written("goal_position", when)


# --- States and ticks -------------------------------------------------------------------------------------------------
def test_from_power_up_to_torque_off():
    """A folded arm is taken to the start pose and runs; nothing moves before torque, and it ends without torque."""
    folded = np.array([0.3, -1.2, 1.1, 0.7, 0.2, 0.1])
    rig = Rig(FakePolicy([[0.5, 0, 0, 0, 0, 0]] * 3), joints=folded)
    d = rig.deployment
    with d:
        assert d.state == "idle" and not any(rig.torques())
        d.start()
        assert (
            d.state == "hold" and all(rig.torques()) and np.abs(rig.joints() - folded).max() < 0.01
        )
        began, before = rig.clock(), rig.joints()
        d.move(SPEC["start_pose"])
        assert np.abs(rig.joints() - START).max() < 0.03
        mean_speed = np.abs(START - before).max() / (rig.clock() - began)
        assert 0.2 < mean_speed < 0.5
        d.run(5)
        assert d.state == "hold" and d.policy.resets == 1 and len(rig.ticks) == 5
        np.testing.assert_allclose(d.target, START + [0.15, 0, 0, 0, 0, 0], atol=1e-3)
        assert abs(rig.joints()[0] - d.target[0]) < 0.02
        d.move(d.home)
        assert np.abs(rig.joints() - folded).max() < 0.03
    assert d.state == "stop" and not any(rig.torques()) and d.torque == dict.fromkeys(JOINTS, "off")


def test_on_the_way_to_a_pose_no_joint_is_faster_than_it_should_be():
    rig = Rig(joints=np.array([0.5, -0.5, 0.5, 0.5, 0.5, 0.5]))
    targets = []
    write, rig.arm.write = rig.arm.write, lambda target: (targets.append(target), write(target))
    with rig.deployment as d:
        d.start()
        d.move(START)
    speeds = np.abs(np.diff(targets, axis=0)) / 0.1
    assert 0.45 < speeds.max() <= deployment.MOVE_SPEED * 1.001


def test_stop_is_final_and_no_goal_follows_it():
    rig = Rig()
    d = rig.deployment
    with pytest.raises(Fault, match="run cannot follow idle"):
        d.run(1)
    d.start(), d.run(2), d.stop("enough"), d.stop()
    stopped = rig.clock()
    for call in (d.start, lambda: d.run(1), lambda: d.move(START)):
        with pytest.raises(Fault, match=r"cannot follow stop \(enough\); start anew"):
            call()
    with pytest.raises(ArmFault):
        rig.arm.write(START)
    assert not rig.goals_since(stopped) and not any(rig.torques())


def test_what_the_policy_sees():
    """Joint readings and targets in training's order and units; the image as training prepares it."""
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    policy = FakePolicy([[1, 0, 0, 0, 0, -1]])
    rig = Rig(policy, source=lambda: frame_around(square))
    with rig.deployment as d:
        d.start(), d.run(2)
    first, second = policy.seen
    np.testing.assert_array_equal(first["rgb"][0], square)
    assert first["state"].dtype == np.float32 and first["state"].shape == (1, 12)
    np.testing.assert_allclose(first["state"][0, :6], START, atol=0.003)
    np.testing.assert_allclose(
        second["state"][0, 6:] - first["state"][0, 6:], [0.1, 0, 0, 0, 0, -0.2], atol=1e-6
    )
    followed = (second["state"] - first["state"])[0, [0, 5]] / [0.1, -0.2]
    assert (followed > 0.3).all() and (followed < 1.0).all(), "the joints are on their way"


def test_ticks_keep_absolute_deadlines():
    rig = Rig(FakePolicy(seconds=0.03))
    with rig.deployment as d:
        d.start(), d.run(10)
    times = np.array([tick["time"] for tick in rig.ticks])
    np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-6)
    assert all(0.03 <= tick["sent"] - tick["time"] < 0.05 for tick in rig.ticks)


def test_one_late_tick_is_not_made_up_for_and_three_stop_the_arm():
    policy = FakePolicy()
    slow = iter([0.0, 0.25, 0.0, 0.0, 0.0])
    rig = Rig(policy)
    policy.act = lambda obs, act=policy.act: (rig.clock.sleep(next(slow)), act(obs))[1]
    with rig.deployment as d:
        d.start(), d.run(5)
    phases = (np.array([tick["time"] for tick in rig.ticks]) - rig.ticks[0]["time"]) / 0.1
    np.testing.assert_allclose(phases, [0, 1, 4, 5, 6], atol=0.1)
    rig = Rig(FakePolicy(seconds=0.25))
    with (
        pytest.raises(Fault, match="3 ticks in a row came too late"),
        rig.deployment as d,
    ):
        d.start(), d.run(10)
    assert not any(rig.torques())


def test_a_pause_on_the_way_to_a_pose_is_not_caught_up_in_a_burst():
    rig = Rig(joints=START + np.array([0.5, 0, 0, 0, 0, 0]))
    begun = []
    write = rig.arm.write

    def slow(target):
        begun.append(rig.clock())
        write(target)
        if len(begun) == 5:
            rig.clock.sleep(0.7)

    rig.arm.write = slow
    with rig.deployment as d:
        d.start(), d.move(START)
    gaps = np.diff(begun)
    assert (
        gaps.min() > 0.09
        and gaps.max() > 0.7
        and np.allclose(np.round(gaps, 3) % 0.1 % 0.1, 0, atol=0.101)
    )


@pytest.mark.parametrize("late", [2, 3])
def test_two_late_images_hold_and_three_stop(late):
    """66 ms cost a quarter of the success: docs/hardware.md."""
    rig = Rig(FakePolicy([[0.5] * 6] * 20))
    camera, count = rig.deployment.cameras["wrist"], iter(range(99))
    latest = camera.latest

    def old():
        frame = latest()
        when = frame.time - 0.06 * (5 <= next(count) < 5 + late)
        return frame.__class__(frame.rgb, when, frame.index)

    camera.latest = old
    if late == 3:
        with pytest.raises(CameraError, match="60 ms old, 3 times in a row"), rig.deployment as d:
            d.start(), d.run(12)
        assert not any(rig.torques())
    else:
        with rig.deployment as d:
            d.start(), d.run(12)
        assert [i for i, tick in enumerate(rig.ticks) if not tick["asked"].any()] == [4, 5]


def test_nothing_is_imported_because_a_file_names_it(tmp_path, monkeypatch):
    """Not even another file of algos/."""
    for name in ("resfit", "os", "../evil", 3):
        torch.save({"algo": name, "spec": SPEC}, tmp_path / "best.pt")
        monkeypatch.setattr(hardware_policy.importlib.util, "module_from_spec", lambda spec: 1 / 0)
        with pytest.raises(PolicyError, match="names the algorithm"):
            load_policy(tmp_path / "best.pt")


@pytest.mark.parametrize("periods", [0, 1, 3])
def test_latency_holds_every_action_back_by_whole_periods(periods):
    actions = [[0.1 * (i + 1), 0, 0, 0, 0, 0] for i in range(6)]
    rig = Rig(FakePolicy(actions), latency=periods)
    with rig.deployment as d:
        d.start(), d.run(6)
    asked = [round(float(tick["asked"][0]), 6) for tick in rig.ticks]
    assert asked == [0.0] * periods + [round(0.1 * (i + 1), 6) for i in range(6 - periods)]


def test_scale_makes_every_step_smaller():
    rig = Rig(FakePolicy([[1] * 6] * 2), scale=0.25)
    with rig.deployment as d:
        d.start(), d.run(2)
        np.testing.assert_allclose(
            d.target - rig.ticks[0]["target_before"], [0.05] * 3 + [0.05, 0.05, 0.1], atol=1e-9
        )


def test_one_action_that_is_no_number_holds_and_the_second_stops():
    rig = Rig(FakePolicy([[np.nan] * 6, [0] * 6, [np.inf, 0, 0, 0, 0, 0]]))
    with (
        pytest.raises(Fault, match="no number, for the second time, at tick 2"),
        rig.deployment as d,
    ):
        d.start(), d.run(9)
    assert [tick["rules"] for tick in rig.ticks] == [("finite",), ()] and not any(rig.torques())
    np.testing.assert_allclose(rig.joints(), START, atol=0.005)
    rig = Rig(FakePolicy([[np.nan] * 6]))
    with rig.deployment as d:
        d.start(), d.run(3)
    with pytest.raises(Fault, match="no number once; the arm held"):
        d.check_whole()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((1, 5)), r"the shape \(1, 5\)"), (np.zeros(6), r"the shape \(6,\)"), ("left", "ValueError"),
        (None, "shape"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_action_is_a_fault(answer, message):
    rig = Rig()
    rig.policy.act = lambda obs: answer
    with pytest.raises(Fault, match=message), rig.deployment as d:
        d.start(), d.run(3)
    assert not any(rig.torques()) and not rig.ticks


def test_the_heart_beats_all_the_time():
    beats = []
    rig = Rig(
        joints=START + 0.3 * np.array([1, 1, 1, -1, 1, 1]), beat=lambda: beats.append(rig.clock())
    )
    with rig.deployment as d:
        d.start()
        began = rig.clock()
        d.move(START), d.run(5), d.stay(0.5)
        ended = rig.clock()
    inside = [began, *(beat for beat in beats if began <= beat <= ended), ended]
    assert np.diff(inside).max() < 0.1, "the watchdog's time-out is 0.25 s"


# --- Faults -----------------------------------------------------------------------------------------------------------
def test_a_blocked_joint_on_the_way_to_the_start_pose_is_a_fault():
    rig = Rig(joints=START + np.array([0.9, 0, 0, 0, 0, 0]))
    rig.servos.block(1)
    with pytest.raises((Fault, ArmFault), match="shoulder_pan"), rig.deployment as d:
        d.start(), d.move(START)
    assert not any(rig.torques())


def test_a_camera_that_fails_stops_the_arm_step_by_step():
    shots = iter([picture()] * 6)
    rig = Rig(source=lambda: next(shots, None))
    with pytest.raises(CameraError, match="wrist: gave no frame"), rig.deployment as d:
        d.start(), d.run(50)
    failed = rig.ticks[-1]["sent"] + 0.1
    limits = rig.servos.written("torque_limit", failed)
    offs = rig.servos.written("torque_enable", failed)
    assert len(rig.ticks) == 5 and limits[0][0] < offs[0][0], "weak first, then off"
    assert (
        offs[0][0] - limits[0][0] >= 0.99
        and not rig.goals_since(limits[0][0])
        and not any(rig.torques())
    )


def test_a_hot_servo_is_let_go_after_holding_and_an_overloaded_one_at_once():
    hot, overloaded = (lambda servos: servos.heat(3, 66)), (lambda servos: servos.error(3, 0x20))
    for fault, message, gentle in ((hot, "too hot", True), (overloaded, "overload", False)):
        rig = Rig()
        rig.deployment.each_tick = lambda tick, rig=rig, fault=fault: (
            fault(rig.servos) if tick["tick"] == 2 else None
        )
        with pytest.raises(ArmFault, match=f"elbow_flex.*{message}"), rig.deployment as d:
            d.start()
            began = rig.clock()
            d.run(50)
        assert (rig.clock() - began > 1.3) == gentle and not any(rig.torques())


def test_unplugging_in_a_run_ends_within_a_second_of_virtual_time():
    rig = Rig()
    unplugged = []

    def pull(record):
        if record["tick"] == 3:
            rig.servos.unplug()
            unplugged.append(rig.clock())

    rig.deployment.each_tick = pull
    with pytest.raises((BusError, ArmFault), match="still plugged in"), rig.deployment as d:
        d.start(), d.run(50)
    assert rig.clock() - unplugged[0] < 1.0
    assert (
        d.state == "stop"
        and d.torque == dict.fromkeys(JOINTS, "silent")
        and "switch the power off" in d.ending()
    )


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, SystemExit, KeyboardInterrupt])
def test_any_exception_of_the_policy_lets_go(kind):
    """One that would end the program with status 0, too."""
    rig = Rig()

    def act(obs):
        raise kind("division by zero")

    rig.policy.act = act
    with pytest.raises(Fault, match=f"policy failed at tick 0: {kind.__name__}: division by zero"):
        with rig.deployment as d:
            d.start(), d.run(5)
    assert not any(rig.torques()) and "division by zero" in d.problem
    assert not rig.goals_since(rig.servos.written("torque_enable", 1.5)[-1][0])


def test_a_beat_that_fails_stops():
    def beat():
        if rig.ticks:
            raise BusError("stopped by the watchdog: a stop key was pressed", kind="stopped")

    rig = Rig(beat=beat)
    with pytest.raises(BusError, match="stop key"), rig.deployment as d:
        d.start(), d.run(5)
    assert len(rig.ticks) == 1 and not any(rig.torques())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_at_a_heartbeat_and_does_not_interrupt_the_stop(number):
    before = signal.getsignal(number)
    with deploy.Signals() as asked:
        rig = Rig(beat=asked.check)
        rig.deployment.each_tick = lambda record: (
            signal.raise_signal(number) if record["tick"] == 2 else None
        )
        write, twice = rig.bus.broadcast_write, lambda *a: (signal.raise_signal(number), write(*a))
        rig.deployment.each_tick = lambda record: (
            signal.raise_signal(number) if record["tick"] == 2 else None,
            setattr(rig.bus, "broadcast_write", twice) if record["tick"] == 2 else None,
        )
        with pytest.raises(Interrupted, match=number.name) as error, rig.deployment as d:
            d.start(), d.run(9)
    assert (
        error.value.status == 128 + number
        and not any(rig.torques())
        and signal.getsignal(number) is before
    )
    weak, off = (rig.servos.written(name)[-1][0] for name in ("torque_limit", "torque_enable"))
    assert off - weak > 0.9, "the whole way down"


# --- First use, dry runs ----------------------------------------------------------------------------------------------
def test_step_by_step_asks_before_every_tick_and_time_stands_still_meanwhile():
    asked = []

    def confirm(record):
        assert not rig.goals_since(record["time"]), "asked before anything is sent"
        asked.append(record["tick"])
        return None if len(asked) % 10 else len(asked) < 40

    rig = Rig(FakePolicy([[1, 0, 0, 0, 0, 0]] * 9), confirm=confirm)
    with pytest.raises(Interrupted, match="by the operator"), rig.deployment as d:
        d.start(), d.run(50)
    assert sorted(set(asked)) == [0, 1, 2, 3] and len(rig.ticks) == 3 and not any(rig.torques())


def test_the_arm_is_watched_while_a_person_is_asked():
    """Heat and overload that come while nobody presses Enter stop the arm within a tick."""
    for fault, message in (
        ("heat", "too hot"),
        ("error", "overload"),
        ("power_cycle", "forgotten"),
    ):
        rig = Rig(confirm=lambda record: None)
        words = {"heat": (2, 80), "error": (2, 0x20), "power_cycle": (2,)}[fault]
        rig.clock.at(
            20.0, lambda fault=fault, words=words, rig=rig: getattr(rig.servos, fault)(*words)
        )
        with pytest.raises(ArmFault, match=message), rig.deployment as d:
            d.start()
            d.run(5)
        off = next(w[0] for w in rig.servos.written("torque_enable", 19.9))
        assert not any(rig.torques()) and off < 21.5


def test_keys_of_the_step_by_step_mode(capsys):
    record = {"tick": 4, "asked": np.array([1.0, 0, 0, 0, 0, -0.5])}

    def answers(*keys):
        keys = [None, *keys]
        ask = deploy.asker(lambda: keys.pop(0), np.array(SPEC["action_scale"]))
        assert ask(record) is None, "no key yet"
        return [ask(record) for _ in range(2)]

    assert answers("\n", "y") == [True, True] and answers("x", "\n")[0] is False
    assert answers("c") == [True, True], "c: the second time nobody is asked"
    text = capsys.readouterr().out
    assert "tick 4: shoulder_pan +5.7, " in text and "gripper -5.7 degrees" in text


def test_a_dry_run_writes_not_one_byte_to_a_register():
    rig = Rig(FakePolicy([[1] * 6] * 5), dry=True)
    with rig.deployment as d:
        d.start(), d.move(START), d.run(5)
    assert rig.servos.writes == [] and not any(rig.torques())
    np.testing.assert_allclose(
        rig.ticks[-1]["target"] - START, [0.5, 0.5, 0.5, 0.0672, 0.5, 1.0], atol=1e-3
    )
    assert "nothing was written" in d.ending()


# --- What must fit ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"robot": "go1"}, "was trained for go1, not for an SO-101"),
        (
            {"joint_names": [*SPEC["joint_names"][1:], "shoulder_pan"]},
            "the policy's joints are shoulder_lift",
        ),
        (
            {"state_layout": ["joint_position"] * 6 + ["joint_velocity"] * 6},
            "not six joint positions and six targets",
        ),
        ({"action_semantics": "joint torques"}, "the policy's actions mean 'joint torques'"),
        ({"action_scale": [0.1] * 5}, "action_scale must be six positive numbers"),
        (
            {"action_scale": [0.1, 0.1, 0.1, 0.1, 0.1, -0.2]},
            "action_scale must be six positive numbers",
        ),
        ({"action_scale": [0.3] * 6}, "may ask for 3.00 rad/s, more than the 2.5"),
        ({"control_hz": 100.0}, "trained at 100 Hz"),
        ({"control_hz": 30.0}, "may ask for 6.00 rad/s"),
        ({"start_pose": [0, 0, 0, 0, 0, 3.0]}, "start pose .* is outside"),
        ({"cameras": {}}, "without a camera"),
        ({"velocity_limit": [1.0] * 5}, "velocity must be 6 finite numbers"),
        (
            {"velocity_limit": [1e9] * 6},
            r"velocity_limit of shoulder_pan is 1e\+09; the arm allows 2.5",
        ),
        ({"joint_low": [-100.0] * 6}, "joint_low of shoulder_pan is 100; the arm allows 1.92"),
        ({"tracking_error": [np.inf] * 6}, "tracking_error must be 6 finite numbers"),
        ({"acceleration_limit": [1e4] * 6}, "acceleration_limit of shoulder_pan is 10000"),
        ({"joint_margin": np.nan}, "a margin of nan leaves no room"),
        ({"start_pose": [np.nan] * 6}, "start pose .* is outside"),
        ({"start_pose": "home"}, "could not convert"),
        ({"control_hz": np.nan}, "trained at nan Hz"),
        ({"max_episode_steps": 10**9}, "episodes have 1000000000 steps"),
        ({"env_id": "../../home/x"}, "is no name of one"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_the_reason(spec, message):
    with pytest.raises(Refused, match=message) as error:
        check_policy(FakePolicy(**spec))
    assert "\n" not in str(error.value)


def test_the_cameras_must_be_those_of_the_policy():
    assert isinstance(check_policy(FakePolicy(), ("wrist",)), Limits)
    with pytest.raises(Refused, match="the policy sees by wrist; given is third"):
        check_policy(FakePolicy(), ("third",))
    aligned = {"wrist": SPEC["cameras"]["wrist"] | {"quarter_turns": 2}}
    check_policy(FakePolicy(), ("wrist",), aligned)
    moved = {"wrist": aligned["wrist"] | {"fovy_degrees": 64.0}}
    with pytest.raises(
        Refused,
        match="another wrist camera than this arm has: fovy_degrees 71.0, aligned here 64.0",
    ):
        check_policy(FakePolicy(), ("wrist",), moved)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("0",), {"wrist": "0"}), (("wrist=/dev/video2",), {"wrist": "/dev/video2"}),
        ((), "given is none"), (("a", "b"), "name each camera: --camera wrist=DEVICE"),
        (("third=0",), "given is third"), (("wrist=0", "wrist=1"), "given is wrist, wrist"),
    ],
)  # fmt: skip
def test_names_of_cameras(words, names):
    args = Args("x.pt", camera=words)
    if isinstance(names, dict):
        assert deploy.named_cameras(args, FakePolicy()) == names
    else:
        with pytest.raises(Refused, match=names):
            deploy.named_cameras(args, FakePolicy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --port and --camera, or --emulate"),
        ({"port": "/dev/x"}, "--calibration is missing"),
        ({"port": "/dev/x", "calibration": "arm.json"}, "--camera is missing"),
        ({"emulate": True, "port": "/dev/x"}, "--emulate brings its own"),
        ({"emulate": True, "scale": 1.5}, "--scale must be"),
        ({"emulate": True, "episodes": 0}, "--episodes and --steps"),
        ({"emulate": True, "latency_periods": -1}, "--latency-periods"),
        ({"replay": "x", "emulate": True}, "--replay takes a recording alone"),
        ({"hold": True, "emulate": True}, "--hold needs the arm"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(Refused, match=message) as error:
        Args("x.pt", **options).check()
    assert "\n" not in str(error.value)


# --- Recordings -------------------------------------------------------------------------------------------------------
def recorded(tmp_path, policy, steps=6, **options):
    """A run of a checkpoint's policy, recorded."""
    folder = tmp_path / "recording"
    args = Args(str(policy.path), latency_periods=options.get("latency", 0))
    facts = deploy.facts_of(args, policy, scale=options.get("scale", 1.0))
    recorder = Recorder(folder, facts, 10.0)
    frames = np.random.default_rng(1).integers(0, 256, (99, 480, 640, 3), dtype=np.uint8)
    rig = Rig(policy, each_tick=recorder.add, **options)
    rig.deployment.cameras["wrist"].source = ArraySource(frames, 10, rig.clock)
    with rig.deployment as d:
        d.start(), d.run(steps)
        d.run(2)
    recorder.close({"torque": d.torque})
    return folder


@pytest.fixture
def policy(tmp_path):
    return TorchPolicy(write_checkpoint(tmp_path / "best.pt"))


@pytest.mark.parametrize("options", [{}, {"latency": 2, "scale": 0.5}])
def test_a_recording_gives_the_same_commands_bit_by_bit(tmp_path, policy, options):
    folder = recorded(tmp_path, policy, **options)
    recording = Recording.load(folder)
    assert len(recording.ticks) == 8 and {tick["episode"] for tick in recording.ticks} == {0, 1}
    assert deploy.replay(policy, recording) == []
    tick = recording.ticks[3]
    assert set(tick) >= {
        "time",
        "state",
        "rgb",
        "action",
        "asked",
        "target",
        "rules",
        "frame_age",
        "sent",
        "late",
    }
    assert set(tick["state"]) >= {"position", "current", "temperature", "voltage", "errors", "raw"}
    video = imageio.get_reader(folder / "video.mp4")
    assert video.count_frames() == 8 and video.get_data(0).shape == (320, 640, 3)
    video.close()


def test_a_replay_finds_a_changed_bit(tmp_path, policy):
    folder = recorded(tmp_path, policy)
    for key, change in (("target", 1e-15), ("action", 1e-7)):
        recording = Recording.load(folder)
        recording.ticks[4][key][2] += change
        found = deploy.replay(policy, recording)
        assert len(found) == 1 and found[0].startswith(f"episode 0, tick 4: {key} is ")
    recording = Recording.load(folder)
    recording.ticks[2]["state"]["position"][1] += 0.05
    assert any("tick 2: action" in line for line in deploy.replay(policy, recording))


def test_a_replay_needs_the_same_policy(tmp_path, policy):
    folder = recorded(tmp_path, policy)
    other = TorchPolicy(write_checkpoint(tmp_path / "other.pt", seed=7))
    with pytest.raises(Refused, match="was made with another policy"):
        deploy.replay(other, Recording.load(folder))


def test_recordings_that_are_none_or_cut_off(tmp_path, policy):
    with pytest.raises(Refused, match="is no recording"):
        Recording.load(tmp_path)
    folder = recorded(tmp_path, policy)
    with pytest.raises(Refused, match="has a recording already"):
        Recorder(folder, {}, 10.0)
    lines = (folder / "ticks.jsonl").read_text().splitlines()
    (folder / "ticks.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:100])
    cut = Recording.load(folder)
    assert len(cut.ticks) == 4 and deploy.replay(policy, cut) == [], (
        "a crash leaves a recording that can be used"
    )
    (folder / "ticks.jsonl").write_text(lines[0][:50] + "\n" + lines[1])
    with pytest.raises(Refused, match="line 1, is damaged"):
        Recording.load(folder)
    (folder / "ticks.jsonl").write_text("")
    with pytest.raises(Refused, match="has no tick"):
        Recording.load(folder)


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path, policy, capsys):
    recorder = Recorder(tmp_path / "film", deploy.facts_of(Args("x.pt"), policy), 10.0, live=True)
    rig = Rig(policy, each_tick=recorder.add)
    write, lines = recorder.ticks.write, []

    def full(line):
        lines.append(line)
        if len(lines) > 12:
            raise OSError(28, "No space left on device")
        return write(line)

    recorder.ticks = SimpleNamespace(write=full, close=recorder.ticks.close)
    with rig.deployment as d:
        d.start(), d.run(20)
    recorder.close({})
    assert recorder.problem == "the recording ended at tick 12: No space left on device"
    assert recorder.problem in capsys.readouterr().err and d.torque == dict.fromkeys(JOINTS, "off")
    assert len(Recording.load(tmp_path / "film").ticks) == 12
    video = imageio.get_reader(tmp_path / "film/video.mp4")
    assert video.count_frames() == 12
    video.close()


def test_a_film_that_was_cut_off_can_be_played(tmp_path, policy):
    folder = recorded(tmp_path, policy, steps=40)
    whole = (folder / "video.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    video = imageio.get_reader(folder / "cut.mp4")
    assert 10 <= video.count_frames() < 42
    video.close()


def test_an_encoder_that_hangs_costs_ticks_of_the_film_and_no_time(tmp_path, policy):
    recorder = Recorder(tmp_path / "film", deploy.facts_of(Args("x.pt"), policy), 10.0, live=True)
    go, write = threading.Event(), recorder._write
    recorder._write = lambda *item: (go.wait(60), write(*item))
    rig = Rig(policy, each_tick=recorder.add)
    with rig.deployment as d:
        d.start(), d.run(80)
    assert recorder.lost == 80 - 64 - 1, "one is in the thread, 64 wait"
    go.set()
    recorder.close({})
    assert "lacks 15 ticks" in recorder.problem


def test_what_was_seen_before_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "SEEN", tmp_path / "runs/seen.json")
    assert "policy arm" not in deploy.seen()
    deploy.remember("policy arm"), deploy.remember("other arm")
    assert {"policy arm", "other arm"} == set(deploy.seen())
    for damaged in ("damaged", "[1]", '"policy arm"'):
        (tmp_path / "runs/seen.json").write_text(damaged)
        assert deploy.seen() == {}
    deploy.remember("policy arm")
    assert "policy arm" in deploy.seen()


# --- The emulated arm in its scene ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scene():
    """The emulated arm, its camera as in training, and four episodes."""
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    from hardware import emulate

    spec = emulate.task_spec("SO101ReachCube-v1")
    rig = emulate.EmulatedArm(spec, frame_size=16, samples=4)
    yield SimpleNamespace(spec=spec, rig=rig, states=emulate.episodes(spec["env_id"], 4, seed=5))
    rig.scene.close()


def test_shafts_and_joints():
    low, high = np.array(SPEC["joint_low"]), np.array(SPEC["joint_high"])
    for joints in (low, high, START, np.zeros(6)):
        np.testing.assert_allclose(joints_of(shafts(joints)), joints, atol=1e-12)
        raw = np.round(
            shafts(joints)
            - [entry["homing_offset"] for entry in recorded_calibration(SPEC).values()]
        )
        np.testing.assert_allclose(CALIBRATION.angles(raw), joints, atol=0.005)
        assert (raw > 0).all() and (raw < 4095).all()


def test_a_simulated_frame_through_a_camera_is_the_picture_of_training(scene):
    """What the policy of a deployment gets equals, bit for bit, what `env.reset` gives in training."""
    from envs import so101

    env = so101.make("SO101ReachCube-v1", 4, seed=5, stagger=False)
    expected = env.reset(seed=5)["rgb"].numpy()
    env.close()
    policy, seen = FakePolicy(), []
    policy.spec = scene.spec
    for state in scene.states:
        keep = lambda record: seen.append(record["rgb"])  # noqa: E731
        deploy.emulated_episode(scene.rig, state, policy, LIMITS, CALIBRATION, 1, each_tick=keep)
    assert len({rgb.tobytes() for rgb in seen}) == 4
    for rgb, image_of_training, state in zip(seen, expected, scene.states, strict=True):
        scene.rig.scene.begin(state, scene.rig.clock())
        exact = policy.preprocess(frame_around(scene.rig.scene.images(scene.rig.clock())["wrist"]))
        np.testing.assert_array_equal(exact[0], image_of_training)
        # the driven arm stands where its encoder's steps allow, at most half a step away: a pixel's edge may move
        assert (np.abs(rgb[0].astype(int) - image_of_training) <= 8).mean() > 0.95


def test_a_finer_simulated_frame_equals_training_at_that_size_too():
    """Rendered at 128, area mean to 16: training's own function against the deployed one on an enlarged frame."""
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    import squint_sac

    from envs import so101

    env = so101.make(
        "SO101LiftCan-v1", 2, seed=3, stagger=False, render_size=128, samples_per_pixel=1
    )
    rgb = env.reset(seed=3)["rgb"]
    env.close()
    trained = squint_sac.squint(rgb, 16).numpy()
    for i in range(2):
        frame = frame_around(rgb[i].numpy(), 640, 800)
        np.testing.assert_array_equal(FakePolicy().preprocess(frame)[0], trained[i])


def test_the_scene_follows_the_emulated_servos(scene):
    """The camera shows where the shafts are, a delayed one where they were; success is the environment's own."""
    rig = scene.rig
    first = rig.begin(scene.states[0])
    np.testing.assert_allclose(rig.joints(), first, atol=1e-9)
    rig.clock.sleep(0.2)
    before = rig.frame("wrist", rig.clock())
    place(rig.servos, first + 0.4)
    rig.clock.sleep(0.05)
    np.testing.assert_allclose(rig.scene.data.qpos[:6], first + 0.4, atol=1e-6)
    now, past = rig.frame("wrist", rig.clock()), rig.frame("wrist", rig.clock() - 0.05)
    assert (now != before).mean() > 0.02 and (past == before).all()
    assert not rig.scene.success(first)
    assert rig.scene.view(64).shape == (64, 64, 3)


def test_success_is_that_of_the_environment(scene):
    """A pose that solves the task, found by the scripted controller, is a success here as well."""
    from envs import so101
    from envs.so101.expert import Expert

    env = so101.make(
        "SO101ReachCube-v1", 1, seed=2, stagger=False, domain_randomization=False, images=False
    )
    state, expert = env.state_dict(), Expert(env)
    for _ in range(49):
        solved = env.step(expert.act())[-1]["success"]
    joints, target = env.qpos[0, :6].double().numpy(), env.target[0].numpy()
    env.close()
    assert solved
    rig = scene.rig
    rig.begin(state)
    assert not rig.scene.success(target)
    place(rig.servos, joints)
    rig.clock.sleep(0.05)
    assert rig.scene.success(target)


def test_the_emulated_arm_lifts_a_cube_which_pushes_back():
    """The scripted controller's actions, through the bus; without the contact's torque the jaw closes through it."""
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    from envs import so101
    from envs.so101.expert import Expert
    from hardware import emulate
    from hardware.deployment import emulated_episode

    env = so101.make(
        "SO101LiftCube-v1", 1, seed=2, stagger=False, domain_randomization=False, images=False
    )
    state, expert, actions = env.state_dict(), Expert(env), []
    for _ in range(49):
        action = expert.act()
        actions.append(action[0].numpy())
        env.step(action)
    env.close()
    spec = emulate.task_spec("SO101LiftCube-v1")
    rig, jaw = emulate.EmulatedArm(spec, frame_size=16, samples=4), {}
    calibration = Calibration.from_dict(rig.calibration())
    for name, resistance in dict(solid=rig.scene.resistance, ghost=lambda: np.zeros(6)).items():
        rig.scene.resistance = resistance
        policy = FakePolicy(actions, **spec)
        result = emulated_episode(rig, state, policy, Limits.from_spec(spec), calibration, 50)
        assert result["success"] or name == "ghost"
        jaw[name] = rig.joints()[5]
    rig.scene.close()
    assert jaw["solid"] > jaw["ghost"] + 0.05  # rad, about 4 mm at the fingertips


# --- The command ------------------------------------------------------------------------------------------------------
def command(*words, cwd=ROOT):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=600)  # fmt: skip


def test_the_emulated_command_records_and_replays(tmp_path):
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    checkpoint, folder = write_checkpoint(tmp_path / "best.pt"), tmp_path / "film"
    run = command(
        "--checkpoint",
        checkpoint,
        "--emulate",
        "--steps",
        3,
        "--record",
        folder,
        "--frame-size",
        48,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == {"success_rate": 0.0, "episodes": 1, "recording": str(folder)}
    video = imageio.get_reader(folder / "video.mp4")
    assert video.count_frames() == 3 and video.get_data(0).shape == (320, 960, 3)
    video.close()
    assert deploy.main(Args(str(checkpoint), replay=str(folder))) == {
        "replayed_ticks": 3,
        "identical": True,
    }
    with pytest.raises(Refused, match="choose another --record"):
        Recorder(folder, {}, 10.0)


def test_what_is_missing_is_named_before_anything_moves(tmp_path):
    checkpoint, calibration = write_checkpoint(tmp_path / "best.pt"), tmp_path / "arm.json"
    CALIBRATION.to_json(calibration)
    imageio.imwrite(tmp_path / "still.png", picture())
    real = dict(
        port="/dev/no-such-port",
        calibration=str(calibration),
        camera=(str(tmp_path / "still.png"),),
    )
    for options, message in (
        (real | {"camera": ("none.png",)}, "there is no picture or video none.png"),
        (real | {"calibration": "none.json"}, "there is no calibration none.json"),
        (real | {"keyboard": False, "step": "yes"}, "--step needs the keyboard"),
        (real, "there is no port /dev/no-such-port"),
        (dict(replay=str(tmp_path)), "is no recording"),
    ):
        with pytest.raises(Refused, match=message) as error:
            deploy.main(Args(str(checkpoint), **options))
        assert "\n" not in str(error.value)


def test_the_recorder_and_its_encoder_are_there_before_torque(tmp_path, monkeypatch):
    (tmp_path / "best.npz").write_bytes(exported())
    CALIBRATION.to_json(tmp_path / "arm.json")
    imageio.imwrite(tmp_path / "still.png", picture())

    class Full:
        def __init__(self, *_, **options):
            assert options["live"], "its queue never holds up the control loop"
            raise Refused("the disk is full")

    monkeypatch.setattr(deploy, "Recorder", Full)
    with PtyServer() as server:
        args = Args(str(tmp_path / "best.npz"), server.port, str(tmp_path / "arm.json"),
                    (str(tmp_path / "still.png"),), keyboard=False, step="no")  # fmt: skip
        with pytest.raises(Refused, match="the disk is full"):
            deploy.main(args)
        assert server.ask(get="written", args=["torque_enable"])["writes"] == []


def test_an_error_is_one_line_with_its_status(tmp_path):
    run = command("--checkpoint", "none.pt", "--emulate", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (2, "error: there is no policy none.pt\n")


# --- A port, a process, a watchdog ------------------------------------------------------------------------------------
@functools.cache
def exported() -> bytes:
    """A policy for NumPy alone."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "best.pt")
        export.export(export.Args(str(checkpoint), format="numpy", start_view=False))
        return (Path(folder) / "best.npz").read_bytes()


class Live:
    """The command as a process, at emulated servos behind a pseudo-terminal. No simulator can be imported, and torch
    only in a first run."""

    def __init__(self, folder, server, *words, first=False, code=""):
        """first: as in the first run of a policy on an arm, with a keyboard on `keys`."""
        checkpoint, calibration = folder / "best.pt", folder / "arm.json"
        if first:
            write_checkpoint(checkpoint)
        else:  # an export starts faster: no torch
            checkpoint = folder / "best.npz"
            checkpoint.write_bytes(exported())
        CALIBRATION.to_json(calibration)
        imageio.imwrite(folder / "still.png", picture())
        transport = SerialTransport(server.port)
        write_eeprom(Bus(transport, timeout=0.5), CALIBRATION.eeprom())
        transport.close()
        for servo, encoder in enumerate(shafts(START), start=1):
            server.ask(set="encoder", id=servo, value=encoder)
        # Generous with time: a busy computer must not look like a fault.
        absent = ["mujoco", "warp", "mujoco_warp", *([] if first else ["torch"])]
        more, hang = code, folder / "hang"
        code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
                f"import fake_absence; fake_absence.of({absent})\n"
                "from hardware import deploy_so101 as d, deployment, so101\n"
                "d.BUS_TIMEOUT, d.HEARTBEAT, d.RETURN = 1.0, 20.0, 2.0\n"
                "deployment.LATE_TICKS, so101.BUDGET = 10**6, 30.0\n"
                f"{more}sys.argv, hang = sys.argv[:-1], sys.argv[-1]\nsys.exit(d.command())")  # fmt: skip
        arguments = ["--checkpoint", checkpoint, "--port", server.port, "--calibration", calibration, "--camera",
                     folder / "still.png", "--record", folder / "log", *words]  # fmt: skip
        arguments += [] if first else ["--no-keyboard", "--scale", "1", "--step", "no"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments), str(hang)], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.ticks = folder / "log/ticks.jsonl"

    def press(self, key):
        self.process.stdin.write(key)
        self.process.stdin.flush()

    def wait_for_ticks(self, count=3):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.ticks.exists() and len(self.ticks.read_text().splitlines()) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"no ticks: {self.process.communicate(timeout=10)}")

    def end(self):
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def settle(server):
    """The servos' torques once nothing is said on the bus any more."""
    deadline, states = time.monotonic() + 60, server.state()
    while any(s["torque"] for s in states.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
        states = server.state()
    return [s["torque"] for s in states.values()]


def last_goal_and_stop(server):
    """When the last byte went to a goal register, and when torque was first switched off after it had been on."""
    goals, torques = (
        server.ask(get="written", args=[name])["writes"]
        for name in ("goal_position", "torque_enable")
    )
    on = max(write[0] for write in torques if write[3] != "00")
    return max(goal[0] for goal in goals), min(
        write[0] for write in torques if write[0] > on and write[3] == "00"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_in_a_run_ends_with_torque_off(tmp_path, number, status):
    with PtyServer() as server:
        live = Live(tmp_path, server, "--steps", "500")
        live.wait_for_ticks()
        assert all(s["torque"] for s in server.state().values())
        live.process.send_signal(number)
        code, _, err = live.end()
        assert settle(server) == [0] * 6, err
        assert code == status, err
        if number != signal.SIGKILL:
            assert f"stopped by {signal.Signals(number).name}; torque is off" in err
        goal, stop = last_goal_and_stop(server)
        assert goal < stop, "no byte goes to a goal register once torque is off"
    assert deploy.Recording.load(tmp_path / "log").ticks


def test_a_whole_run_over_a_port_and_a_fault_in_another(tmp_path):
    """The first ends with status 0 and is remembered; in the second a servo reports a fault."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    with PtyServer() as server:
        code, out, err = Live(tmp_path / "one", server, "--steps", "5").end()
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["episodes"] == 1 and settle(server) == [0] * 6
        assert len(json.loads((tmp_path / "one/runs/hardware/seen.json").read_text())) == 1
        last = (tmp_path / "one/log/ticks.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["end"] == {
            "problem": None,
            "torque": dict.fromkeys(JOINTS, "off"),
            "recording": None,
        }
        live = Live(tmp_path / "two", server, "--steps", "500")
        live.wait_for_ticks()
        server.do("error", 4, 0x20)
        code, _, err = live.end()
        assert code == 1 and settle(server) == [0] * 6
        assert "wrist_flex reports: overload" in err and "; torque is off" in err
        assert not (tmp_path / "two/runs").exists()


def test_a_dry_run_over_a_port_writes_nothing(tmp_path):
    """It says what it would do; goals and torque stay as they are."""
    with PtyServer() as server:
        code, out, err = Live(tmp_path, server, "--steps", "3", "--dry-run").end()
        assert code == 0, err
        for register in (
            "torque_enable",
            "torque_limit",
            "acceleration",
            "goal_position",
            "goal_speed",
        ):
            assert server.ask(get="written", args=[register])["writes"] == []
    assert out.count("would go to shoulder_pan ") == 3 and "tick 2: " in out


def test_the_first_run_asks_before_every_step_and_a_stop_key_stops_it(tmp_path):
    with PtyServer() as server:
        live = Live(tmp_path, server, "--steps", "500", first=True)
        for count in (1, 2, 3):
            live.press("\n")
            live.wait_for_ticks(count)
        live.press("q")
        code, out, err = live.end()
        assert code == 1 and settle(server) == [0] * 6
    assert "stopped by the watchdog: a stop key was pressed" in err and err.splitlines()[
        -1
    ].endswith("; torque is off, read back from every servo")
    assert (
        "the first run of this policy on this arm: at scale 0.25 and asks before every tick" in out
    )
    assert out.count("Enter: do it") in (3, 4), "the key may come before the fourth question"
    recording = deploy.Recording.load(tmp_path / "log")
    assert len(recording.ticks) == 3 and recording.facts["scale"] == 0.25
    assert all(np.abs(tick["asked"]).max() <= 0.25 for tick in recording.ticks)


def test_a_port_that_comes_back_in_a_run_has_its_torque_taken_off(tmp_path):
    """The last line says so, and it is true."""
    with PtyServer(link=str(tmp_path / "port")) as server:
        live = Live(tmp_path, server, "--steps", "500")
        live.wait_for_ticks()
        server.do("unplug")
        time.sleep(1.0)
        server.do("unplug", False)
        code, _, err = live.end()
        assert code == 1 and settle(server) == [0] * 6
        assert err.splitlines()[-1].endswith("; torque is off, read back from every servo"), err


def test_a_policy_that_hangs_ends_with_torque_off_and_a_status(tmp_path):
    """The watchdog takes torque off, and ends the program."""
    with PtyServer() as server:
        code = (
            "\nimport time; from hardware.policy import NumpyPolicy as P\n"
            "act, d.HEARTBEAT = P.act, 3.0\n"
            "P.act = lambda self, obs: "
            "(time.sleep(1000) if d.Path(hang).exists() else 0, act(self, obs))[1]\n"
        )
        live = Live(tmp_path, server, "--steps", "500", code=code)
        live.wait_for_ticks()
        (tmp_path / "hang").touch()
        code, _, err = live.end()
        assert code == -signal.SIGKILL and settle(server) == [0] * 6
        assert "no heartbeat for 3 s" in err and "the program hangs: it is ended" in err
        assert "torque is off, read back from every servo" in err and "Traceback" not in err
    assert not (tmp_path / "runs/hardware/seen.json").exists()


def test_exports_run_the_arm_where_torch_cannot_be_imported(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    export.export(export.Args(str(checkpoint), format="numpy", start_view=False))
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tests')\n"
        "from hardware import deploy_so101 as d; from hardware.policy import load_policy\n"
        "policy = load_policy(sys.argv[1]); limits = d.check_policy(policy, ('wrist',)); print(limits.margin)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "best.npz"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rig = Rig(load_policy(tmp_path / "best.npz"))
    with rig.deployment as d:
        d.start(), d.run(3)
    assert len(rig.ticks) == 3


# --- Results ----------------------------------------------------------------------------------------------------------
def results():
    with (ROOT / "docs/results/hardware/emulated/so101__cpu2.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_page_is_that_of_the_results():
    def percent(row, *names):
        return " – ".join(f"{100 * float(row[name]):.1f}" for name in names) + " %"

    lines = ["| " + " | ".join((
        row["policy"], row["where"], row["latency_periods"], f"{row['camera_delay_ms']} ms",
        percent(row, "success_rate"), percent(row, "ci_low", "ci_high"), percent(row, "success_once"),
    )) + " |" for row in results()]  # fmt: skip
    assert len(lines) >= 20 and "\n".join(lines) in (ROOT / "docs/hardware.md").read_text(), (
        "\n".join(lines)
    )


def test_a_policy_on_the_emulated_arm_is_within_five_points_of_the_simulator():
    """Of the measurements kept in docs/results: each policy of a task together, 64 episodes each, no latency."""
    rows = [
        row for row in results() if (row["latency_periods"], row["camera_delay_ms"]) == ("0", "0")
    ]
    assert {row["policy"].split("_")[0] for row in rows} == {"reach", "lift", "place"}
    for task in ("reach", "lift", "place"):
        rates = {}
        for row in rows:
            if row["policy"].startswith(task):
                assert row["episodes"] == "64"
                rates.setdefault(row["where"], []).append(float(row["success_rate"]))
        emulated, trained = rates["emulated arm"], rates["simulator, noise"]
        assert len(emulated) == len(trained)
        assert abs(np.mean(emulated) - np.mean(trained)) <= 0.05


@pytest.mark.parametrize("page", ["hardware.md", "sim2sim_go1.md"])
def test_every_test_that_a_page_names_is_there(page):
    """In full, or its beginning before an ellipsis, which must leave no doubt."""
    text = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    there, missing = set(re.findall(r"^def (test_\w+)", text, re.M)), []
    named = re.findall(r"`(?:(test_\w+)\.py::)?(test_\w+)(…?)`", (ROOT / "docs" / page).read_text())
    for _, name, cut in named:
        found = {name} & there if not cut else {full for full in there if full.startswith(name)}
        missing += [name] * (len(found) != 1)
    assert len(named) > 5 and not missing


def test_registers_of_the_start_up_are_known():
    assert {"goal_position", "torque_enable", "torque_limit"} <= set(REGISTERS)
