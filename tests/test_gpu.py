"""The command for a GPU: what it lists exists, a dry run ends well on a CPU, and no step takes another with it."""

import csv
import json
import time

import gpu
import pytest
from conftest import ROOT


def say(code: str) -> str:
    """Words of a step that runs this code."""
    return f"-c '{code}'"


MACHINE = gpu.Step("machine", "says what it sees", "", 1, "machine")


@pytest.fixture
def session(monkeypatch, tmp_path):
    """Runs a session over steps made up by the test, on a machine that seems to have a GPU."""
    monkeypatch.setattr(gpu, "nvidia", lambda: {"gpu": "A GPU", "driver": "1.2"})
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "MACHINE", 'print(\'{"jax devices": "cpu:0"}\')')

    def run(*steps: gpu.Step, **options) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(gpu, "STEPS", (MACHINE, *steps))
        args = gpu.Args(out=tmp_path, **options)
        args.check()
        status = gpu.session(args, list(steps))
        return status, {step.name: gpu.read(tmp_path, step) for step in steps}

    return run


def test_a_dry_run_checks_every_command_on_a_cpu(tmp_path, capsys):
    """Every script reads its own arguments; three steps are run for real, at a tiny size."""
    status = gpu.main(["--dry-run", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 0, told
    records = [gpu.read(tmp_path / "dry-run", step) for step in gpu.STEPS]
    assert {record["ended"] for record in records} == {
        "arguments read, not run",
        "ran tiny on the CPU",
    }
    assert all(record["dry_run"] and len(record["commit"]) == 40 for record in records)
    ran = [record for record in records if record["ended"] == "ran tiny on the CPU"]
    assert len(ran) == 4 and all(record["figures"] for record in ran)
    assert not list(tmp_path.glob("*.json")), "a dry run left what looks like a measurement"


def test_names_and_files_of_the_steps():
    names = [step.name for step in gpu.STEPS]
    assert len(set(names)) == len(names)
    for step in gpu.STEPS:
        for word in step.command:
            assert not word.endswith(".py") or (ROOT / word).exists(), f"{step.name}: {word}"
    assert (
        sum(step.limit for step in gpu.STEPS[:5]) < 12
    )  # the worthiest fit ten minutes, or nearly


def test_an_argument_that_a_script_does_not_know_is_found():
    assert gpu.understood(["benchmarks/throughput_rewarped.py", "--num-envs", "many"])
    assert gpu.understood(["-m", "pytest", "tests/test_nothing.py"]) == (
        "tests/test_nothing.py does not exist"
    )
    assert gpu.understood(["benchmarks/throughput_rewarped.py", "--num-envs", "4"]) == ""


def test_a_failure_is_recorded_and_the_next_step_begins(session, tmp_path, capsys):
    bad = gpu.Step("bad", "fails", say('raise SystemExit("no memory left")'), 1, "tests")
    good = gpu.Step("good", "works", say('print("3 passed in 1s")'), 1, "tests")
    skipped = gpu.Step("skipped", "skips", say('print("2 skipped in 1s")'), 1, "tests")
    status, records = session(bad, good, skipped)
    assert status == 1 and "Traceback" not in capsys.readouterr().err
    assert records["bad"]["ended"] == "failed" and records["bad"]["reason"] == "no memory left"
    assert records["good"]["ended"] == "done"
    assert records["good"]["figures"] == [dict(figure="passed", value=3, unit="tests")]
    assert records["skipped"]["reason"] == "no test ran: all were skipped"
    assert records["good"]["gpu"] == "A GPU" and "torch" in records["good"]["versions"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))[1:]
    assert [(row["step"], row["ended"]) for row in rows][:2] == [
        ("bad", "failed"),
        ("good", "done"),
    ]
    assert rows[0]["remark"] == "no memory left" and rows[1]["value"] == "3"


def test_the_clock_stops_a_step_and_what_it_wrote_counts(session, tmp_path):
    """The table that a benchmark had written until then, its last line cut off."""
    code = (
        "import sys, time, pathlib;"
        'pathlib.Path(sys.argv[-1]).write_text("part,what,at,unit,per_second,range,remark\\n'
        'images,16 px,8 environments,images,12.5,12 to 13,\\nimages,64");'
        "print(1, flush=True); time.sleep(60)"
    )
    slow = gpu.Step("slow", "takes long", say(code), 2 / 60)
    begun = time.monotonic()
    status, records = session(slow)
    assert time.monotonic() - begun < 40 and status == 0
    assert records["slow"]["ended"] == gpu.AT_LIMIT
    (figure,) = records["slow"]["figures"]
    assert figure["figure"] == "images, 16 px, 8 environments" and figure["value"] == "12.5"
    assert figure["unit"] == "images/s"


def test_what_is_done_is_kept_and_what_failed_waits_for_retry(session, tmp_path):
    mark = tmp_path / "count"
    code = f'open("{mark}", "a").write("x"); print("1 passed")'
    done = gpu.Step("one", "counts", say(code), 1, "tests")
    for options, count in ((dict(), 1), (dict(), 1), (dict(again=True), 2)):
        session(done, **options)
        assert len(mark.read_text()) == count
    session(gpu.Step("one", "counts", say(code + "; 1"), 1, "tests"))  # another command
    assert len(mark.read_text()) == 3
    failing = gpu.Step("one", "counts", say(code + "; exit(1)"), 1, "tests")
    for options, count in ((dict(), 4), (dict(), 4), (dict(retry=True), 5)):
        session(failing, **options)
        assert len(mark.read_text()) == count


def test_what_the_end_of_the_minutes_stopped_is_run_again(session, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    step = gpu.Step("slow", "takes long", say("import time; time.sleep(60)"), 1, "tests")
    assert session(step, minutes=3 / 60)[1]["slow"]["ended"] == "out of time"
    args = gpu.Args()
    assert gpu.due(step, {"ended": "out of time"}, args)
    kept = {"ended": gpu.AT_LIMIT, "command_given": step.words}
    assert not gpu.due(step, kept, args) and gpu.due(step, kept, gpu.Args(retry=True))


def test_jax_on_the_cpu_is_no_measurement_of_a_gpu(session, monkeypatch):
    step = gpu.Step("walk", "needs JAX", say('print("1 passed"); "go1"'), 1, "tests")
    status, records = session(step)
    assert status == 1 and records["walk"]["reason"] == gpu.NO_JAX
    monkeypatch.setattr(gpu, "MACHINE", 'print(\'{"jax devices": "cuda:0"}\')')
    assert session(step, retry=True)[1]["walk"]["ended"] == "done"


def test_no_time_left_begins_nothing(session, capsys):
    step = gpu.Step("late", "comes late", say('print("1 passed")'), 1, "tests")
    status, records = session(step, minutes=0.001)
    assert status == 0 and records["late"] == {} and "no time left" in capsys.readouterr().out


def test_a_learning_run_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    step = gpu.learns("x", "learns", "algos/drqv2.py", 1)
    record, run = {"command_given": step.words}, tmp_path / "runs/gpu__x"
    assert gpu.command_of(step, tmp_path, {}, False)[-2:] == ["--name", "gpu__x"]
    run.mkdir(parents=True)
    (run / "checkpoint.pt").touch()
    resumed = ["algos/drqv2.py", "--resume", "runs/gpu__x"]
    assert gpu.command_of(step, tmp_path, record, False) == resumed
    (run / "eval.csv").write_text("global_step,wall_time,eval/return\n0,1,-9.5\n64,3,-2.5\n9")
    last, best = gpu.figures_of(step, tmp_path / "none", "")
    assert last == dict(
        figure="last eval/return", value="-2.5", remark="step 64, 3 s since the start"
    )
    assert gpu.command_of(step, tmp_path, record, True) == step.command  # again: from the start
    assert not run.exists() and len(list(run.parent.glob("gpu__x.old-*"))) == 1


def test_bad_arguments_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "nvidia", dict)
    for words, line in (
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--only", "nothing"], "no step is called nothing; --list names them"),
        (["--out", str(tmp_path)], "no NVIDIA GPU here"),
    ):
        with pytest.raises(ValueError, match=line):
            gpu.main(words)
    (tmp_path / "machine.json").write_text("{")  # half a record is none
    assert gpu.main(["--list", "--out", str(tmp_path)]) == 0
    assert json.dumps("not run")[1:-1] in capsys.readouterr().out
