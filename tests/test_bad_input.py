"""Bad input, by kind, to every file of algos/: one line that says what to do, and nothing on disk is lost.

What a single algorithm or simulator refuses is tested in its own file.
"""

import errno
import importlib
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
JAX = ("ppo_mjx_go1", "distill_go1")
# what a command needs to come as far as its numbers
INPUTS = {
    "distill_go1": dict(teacher="a"),
    "resfit": dict(demos="a", base="b"),
    "bc_chunk": dict(demos="a"),
}
each_algo = pytest.mark.parametrize("name", ALGOS)


def module_of(name: str):
    if name in JAX:
        pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    return importlib.import_module(f"algos.{name}")


@each_algo
def test_help_is_short_in_groups_and_names_every_argument(name, capsys, monkeypatch):
    algo = module_of(name)
    monkeypatch.setattr(sys, "argv", [f"algos/{name}.py"])
    with pytest.raises(SystemExit) as stop:
        algo.parse_args(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) < 60
    assert {"run", "algorithm"} <= set(lines)
    for field in fields(algo.Args):
        flag = "--" + field.name.replace("_", "-")
        found = [line for line in lines if line.split()[:1] == [flag]]
        assert len(found) == 1 and len(found[0]) > 46, f"{flag} is not explained"
    assert "no-no" not in text


@each_algo
def test_numbers_outside_their_meaning_are_named(name):
    algo = module_of(name)
    for field in fields(algo.Args):
        value = getattr(algo.Args(), field.name)
        flag = "--" + field.name.replace("_", "-")
        wrong = {int: [-1], float: [float("nan"), float("inf"), -2e9]}.get(type(value), [])
        if field.name in ("gamma", "gae_lambda", "tau", "ema", "average"):
            wrong = [*wrong, 5.0]
        if getattr(algo.Args, field.name, None) is not None:  # as in an edited checkpoint
            wrong = [*wrong, b"x"]
        for number in wrong:
            args = algo.Args(**INPUTS.get(name, {}) | {field.name: number})
            with pytest.raises(ValueError, match=f"^{flag} must be [^\n]+$"):
                algo.check_numbers(args)
    algo.check_numbers(algo.Args(**INPUTS.get(name, {})))


@each_algo
@pytest.mark.parametrize("wrong", ["../elsewhere", "a/b", "..", "/tmp/elsewhere"])
def test_a_run_stays_in_its_folder(name, wrong, monkeypatch, tmp_path):
    algo = module_of(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^--name must be the name of a folder in runs/"):
        algo.open_run(algo.Args(name=wrong))
    assert not list(tmp_path.iterdir())


@each_algo
def test_a_name_that_is_too_long_is_an_oserror_which_the_command_prints(
    name, monkeypatch, tmp_path
):
    algo = module_of(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as error:
        algo.open_run(algo.Args(name="x" * 300))
    assert error.value.errno == errno.ENAMETOOLONG
    assert "except (ValueError, OSError" in (ROOT / f"algos/{name}.py").read_text()


@each_algo
def test_a_file_where_the_folder_should_be_is_left_alone(name, monkeypatch, tmp_path):
    algo = module_of(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OSError):
        algo.open_run(algo.Args(name="run"))
    assert (tmp_path / "runs").read_text() == "mine"


@each_algo
def test_weights_and_biases_without_a_key_is_one_line(name, monkeypatch, tmp_path):
    algo = module_of(name)
    monkeypatch.chdir(tmp_path)

    class UsageError(Exception):  # as wandb's: a child of wandb.Error
        pass

    def refuse(**known):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    fake = types.SimpleNamespace(init=refuse, Error=UsageError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match="^--track: No API key configured"):
        algo.open_run(algo.Args(track=True, name="run"))


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, "algos")
import {name} as algo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from pathlib import Path
{save}
"""
SAVE_TORCH = "algo.save(Path({path!r}), dict(x=algo.torch.zeros(100_000)))"
SAVE_JAX = "algo.save(Path({path!r}), {{}}, dict(x=algo.np.zeros(100_000)))"


@each_algo
def test_a_full_disk_leaves_the_old_checkpoint(name, tmp_path):
    module_of(name)
    path = tmp_path / "checkpoint"
    path.write_text("old")
    save = (SAVE_JAX if name in JAX else SAVE_TORCH).format(path=str(path))
    command = [sys.executable, "-c", FULL_DISK.format(name=name, save=save)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode and path.read_text() == "old"
    assert "OSError" in result.stderr.splitlines()[-1], result.stderr[-500:]
