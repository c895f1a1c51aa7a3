"""`envs.make`: the id finds the simulator, and what cannot be is said in one line."""

import os

import pytest

import envs


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("dot_reach", "dot-reach"),
        ("SO101ReachCube-v1", "SO-101"),
        ("robosuite/Lift", "robosuite"),
        ("PickCube-v1", "ManiSkill"),
        ("cup_catch", "DeepMind Control"),
        ("AntRun", "differentiable simulation"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, env_id, name):
    monkeypatch.setattr(envs, "find_spec", lambda package: None)
    package, install = next(row[3:] for row in envs.SIMULATORS if row[1] == name)
    with pytest.raises(ValueError) as error:
        envs.make(env_id, 1)
    assert str(error.value) == f"{env_id} ({name}) needs {package}: {install}"


def test_an_unknown_option_is_named_with_those_that_there_are():
    pytest.importorskip("dm_control", reason='needs DeepMind Control: pip install -e ".[dmc]"')
    with pytest.raises(ValueError) as error:
        envs.make("walker_walk", 1, seed=3, asymmetric=True, samples_per_pixel=4, render_size=16)
    line = str(error.value)
    assert line.startswith(
        "walker_walk (DeepMind Control) has no option asymmetric, render_size; it has seed, stagger, image_size, "
    )
    assert "\n" not in line and "samples_per_pixel" in line and "self" not in line


def test_options_that_are_none_count_as_not_given():
    env = envs.make("dot_reach", 2, seed=3, image_size=8, asymmetric=None, camera=None)
    assert env.num_envs == 2 and env.image_shape == (8, 8, 3)
    with pytest.raises(
        ValueError, match=r"dot_reach \(dot-reach\) has no option pictures; it has .*images"
    ):
        envs.make("dot_reach", 2, pictures=False)


@pytest.mark.parametrize("module", ["dot_reach", "so101", "dmc", "maniskill", "robosuite"])
def test_every_simulator_lists_its_options_and_begins_together(module):
    """Defaults are the contract's: seed 0, and no spread of the first episodes unless it is asked for."""
    import importlib
    import inspect

    make = pytest.importorskip(f"envs.{module}", exc_type=ImportError).make
    assert {"seed", "stagger"} <= set(envs.options_of(make))
    parameters = inspect.signature(make).parameters
    assert (parameters["seed"].default, parameters["stagger"].default) == (0, False)
    assert importlib.import_module(f"envs.{module}").__doc__


def test_cpus_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert envs.usable_cpus() == 3
