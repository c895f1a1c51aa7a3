"""The project keeps its promises: packaging, commands, the check, the shape of every algorithm's file, the results."""

import ast
import importlib
import importlib.util
import io
import json
import os
import re
import stat
import subprocess
import sys
import tokenize
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import plot_results
import pytest
import reproduce
from conftest import ROOT

from envs import check

ALGOS = sorted((ROOT / "algos").glob("*.py"))
REQUIRED = (
    "Imports",
    "Args",
    "make_envs",
    "Networks",
    "Update functions",
    "evaluate",
    "save / load",
    "train",
)
SECTIONS = (*REQUIRED[:4], "Storage", *REQUIRED[4:7], "Policy", "train")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Distribution names whose module is called otherwise.
MODULES = {"imageio-ffmpeg": "imageio_ffmpeg", "mujoco-warp": "mujoco_warp", "warp-lang": "warp"}

each_algo = pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)


# `make test ARGS=…` hands its own variables down; a make that a test starts must not see them.
OWN_MAKE = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKEOVERRIDES",
    "MAKELEVEL",
    "ARGS",
    "EXTRAS",
    "PYTHON",
    "TASK",
    "VENV",
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OWN_MAKE}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- Packaging --------------------------------------------------------------------------------------------------------
def requirement(text: str) -> tuple[str, str]:
    """Return (name, version) of `name==version`, the only form that the project uses."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][A-Za-z0-9.]*)", text)
    assert match, f"pyproject.toml: {text!r} is not pinned as name==version"
    return match[1], match[2]


def test_every_dependency_is_pinned_once():
    versions = {}
    groups = [PROJECT["dependencies"]] + [
        packages for extra, packages in EXTRAS.items() if extra != "all"
    ]
    for name, version in (requirement(text) for packages in groups for text in packages):
        assert versions.setdefault(name, version) == version, f"{name} has two pins"
    assert versions["mujoco"] == versions["mujoco-warp"], "mujoco and mujoco-warp move together"
    assert versions.get("mujoco-mjx", versions["mujoco"]) == versions["mujoco"], (
        "mujoco and mujoco-mjx move together"
    )


def test_the_extra_all_is_the_sum_of_the_others():
    (text,) = EXTRAS["all"]
    match = re.fullmatch(r"cleanrobot\[([\w,-]+)\]", text)
    assert match and set(match[1].split(",")) == set(EXTRAS) - {"all"}


def test_installed_pins_are_read_from_the_metadata():
    pins = check.pins()
    assert ("numpy", dict(requirement(text) for text in PROJECT["dependencies"])["numpy"]) in pins[
        ""
    ]
    assert [name for name, _ in pins["so101"]] == [requirement(text)[0] for text in EXTRAS["so101"]]
    assert "all" not in pins


def test_commands_of_the_readme_are_targets_of_the_makefile():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)[^`]*`", text, re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"train", "test", "check"} <= named <= targets
    extras = {extra for group in re.findall(r"EXTRAS=([\w,]+)", text) for extra in group.split(",")}
    assert extras <= set(EXTRAS)


def test_make_installs_first_and_only_when_something_changed(tmp_path):
    """Dry runs: a missing environment is built, one whose stamp is newer than pyproject.toml is taken as it is."""
    fresh = run("make", "--dry-run", "test", f"VENV={tmp_path / 'none'}").stdout
    extras = "so101,dmc,go1,resfit,hardware,export,test"
    assert (
        "-m venv" in fresh
        and f'pip install --editable ".[{extras}]"' in fresh
        and "-m pytest" in fresh
    )
    (tmp_path / f".installed-{extras.replace(',', '-')}").touch()
    built = run("make", "--dry-run", "train", f"VENV={tmp_path}", "ARGS=--seed 3").stdout
    assert (
        built.strip()
        == f"{tmp_path}/bin/python algos/squint_sac.py --env-id SO101ReachCube-v1 --seed 3"
    )


def test_make_names_the_python_that_it_needs(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    result = run("make", "setup", f"VENV={tmp_path / 'none'}", f"PYTHON={old}")
    assert result.returncode != 0 and "needs Python 3.11 or newer" in result.stderr


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert any(line.split("<")[0].strip() == "make test" for line in lines)
    assert run("bash", "-n", ".ci/run").returncode == 0


def test_links_between_documents_lead_somewhere():
    broken = []
    for document in plot_results.documents(ROOT):
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if (
                not re.match(r"https?:|mailto:|#", target)
                and not (document.parent / target.split("#")[0]).exists()
            ):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken


# --- envs.check -------------------------------------------------------------------------------------------------------
def test_check_reports_and_the_embedded_default_runs():
    result = run(sys.executable, "-m", "envs.check")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in (
        "torch",
        "mujoco",
        "warp",
        "Simulators",
        "Renderers",
        "ManiSkill 3",
        "Vulkan",
        "OpenGL by EGL",
    ):
        assert word in result.stdout
    lines = result.stdout.splitlines()
    for line, following in zip(lines, lines[1:], strict=False):
        if line.startswith("  no "):
            assert "install" in following or "driver" in following, (
                f"no way out is named below: {line}"
            )


def test_check_fails_only_where_the_embedded_default_cannot_run(monkeypatch, capsys):
    def all_work_but(broken: str):
        return lambda key: check.Result(key != broken, "as the test says")

    monkeypatch.setattr(sys, "argv", ["check"])
    monkeypatch.setattr(check, "ask", all_work_but("maniskill"))
    assert check.main() == 0
    assert "[maniskill]" in capsys.readouterr().out
    monkeypatch.setattr(check, "ask", all_work_but("warp-renderer"))
    assert check.main() == 1
    assert "The embedded default cannot run here: MuJoCo Warp failed" in capsys.readouterr().out


def test_check_survives_a_probe_that_dies():
    result = check.ask("no such probe")
    assert (
        not result.works and "status 2" in result.detail and "no probe is called" in result.detail
    )


def test_check_refuses_a_wrong_picture():
    import numpy as np

    with pytest.raises(RuntimeError, match="the image is wrong"):
        check._expect_red_box(np.zeros((8, 8, 3)))


# --- The shape of an algorithm's file ---------------------------------------------------------------------------------
def test_there_is_an_algorithm():
    assert ALGOS


# How much there is to read: tokens of code in the file, without docstrings and comments. To be read in one
# sitting, not to be reached by packing: the layout is ruff's, at 100 columns, and a line may average 11 tokens.
TOKENS = {
    "squint_sac": 7860, "drqv2": 7370, "sac_pixels": 8145, "sapo_rewarped": 6480, "ppo_mjx_go1": 7345, "resfit": 9430,
    "bc_chunk": 6620, "distill_go1": 4195,
}  # fmt: skip
TOKENS_A_LINE, LONGEST, LONGEST_TRAIN, COLUMNS = 11.05, 60, 90, 100
COUNTED = {
    tokenize.NAME,
    tokenize.OP,
    tokenize.NUMBER,
    tokenize.STRING,
    getattr(tokenize, "FSTRING_START", -1),
}


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(text: str) -> list[int]:
    """Numbers of the lines that hold code: not blank, not only a comment, not part of a docstring."""
    strings = docstring_lines(ast.parse(text))
    lines = enumerate(text.splitlines(), 1)
    return [
        n
        for n, line in lines
        if line.strip() and not line.strip().startswith("#") and n not in strings
    ]


def tokens(text: str) -> int:
    """Names, operators, numbers and strings on the lines that hold code."""
    lines = set(code_lines(text))
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type in COUNTED and token.start[0] in lines for token in found)


def test_tokens_are_counted_as_they_should_be():
    text = '"""Doc."""\n# no\nx = f(1)  # yes\n\n\ndef g():\n    """Doc\n    string."""\n    return "a"\n'
    assert code_lines(text) == [3, 6, 9]
    assert tokens(text) == 6 + 5 + 2


@each_algo
def test_file_can_be_read_in_one_sitting(path: Path):
    text = path.read_text()
    lines = code_lines(text)
    assert tokens(text) <= TOKENS[path.stem], "too long: look for what does not belong"
    assert tokens(text) / len(lines) <= TOKENS_A_LINE, "too dense: one idea a line"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = sum(node.lineno <= n <= node.end_lineno for n in lines)
            limit = LONGEST_TRAIN if node.name == "train" else LONGEST
            assert length <= limit, f"{node.name} has {length} lines of code, {limit} are the limit"
    wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"lines {wide} are longer than {COLUMNS} columns"


@each_algo
def test_file_is_laid_out_by_ruff(path: Path):
    checked = run(sys.executable, "-m", "ruff", "format", "--check", str(path))
    assert checked.returncode == 0, f"ruff format {path.relative_to(ROOT)}"


@each_algo
def test_file_is_documented_and_tested(path: Path):
    assert (ROOT / "docs/algos" / f"{path.stem}.md").exists(), (
        "the algorithm has no page in docs/algos"
    )
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), "the algorithm has no test"
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("Differences from", "python algos/", "Expected result", "Shapes"):
        assert word in docstring, f"the docstring says nothing under {word!r}"


@each_algo
def test_no_file_runs_code_that_it_reads(path: Path):
    """No pickle, no torch.load that would run one, no import by a name out of a file."""
    text = path.read_text()
    assert not re.search(r"\bpickle\b|weights_only=False|allow_pickle=True", text)
    assert text.count("torch.load(") == text.count("weights_only=True")


@each_algo
def test_track_and_counts_of_0_are_refused_in_one_line(path: Path, monkeypatch, tmp_path):
    if path.stem in ("ppo_mjx_go1", "distill_go1"):
        pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    module = importlib.import_module(f"algos.{path.stem}")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^--track needs Weights & Biases: pip install wandb$"):
        module.open_run(module.Args(track=True))
    inputs = {
        "distill_go1": dict(teacher="a"),
        "resfit": dict(demos="a", base="b"),
        "bc_chunk": dict(demos="a"),
    }
    count = "eval_envs" if path.stem == "bc_chunk" else "num_envs"
    with pytest.raises(ValueError, match=f"^--{count.replace('_', '-')}.* must be at least 1$"):
        module.check(module.Args(**{count: 0}, **inputs.get(path.stem, {})))


@each_algo
def test_sections_stand_in_the_common_order(path: Path):
    found = re.findall(r"^# --- (.+?) -+$", path.read_text(), re.MULTILINE)
    assert set(found) <= set(SECTIONS), "a banner has a name that the other files do not use"
    assert found == [name for name in SECTIONS if name in found], (
        "sections are out of order or repeated"
    )
    assert set(REQUIRED) <= set(found), "a section is missing"


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "relative imports need a package; the file is to be copied alone"
            )
            found.add(node.module.split(".")[0])
    return found


@each_algo
def test_file_stands_alone(path: Path):
    """It imports what pyproject.toml declares; this project only inside make_envs; other algorithms never."""
    declared = {requirement(text)[0] for extra in [PROJECT["dependencies"], *EXTRAS.values()] for text in extra
                if not text.startswith("cleanrobot[")}  # fmt: skip
    allowed = {MODULES.get(name, name) for name in declared} | sys.stdlib_module_names
    tree = ast.parse(path.read_text())
    simulator = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "make_envs"
    ]
    rest = [node for node in tree.body if node not in simulator]
    outside = imports(ast.Module(rest, []))
    assert outside <= allowed, (
        f"neither declared in pyproject.toml nor allowed: {sorted(outside - allowed)}"
    )
    assert imports(simulator[0]) <= allowed | {"envs"}
    assert "import_module" not in path.read_text() or path.stem == "resfit", (
        "only a --base named by hand is imported"
    )
    assert sum(path.read_text().count(word) for word in ("find_spec", "execv", ".venv")) == 0


def blocks_meant_to_be_the_same(text: str) -> list[tuple[list[str], str, str]]:
    """Return (names of the other files, name, source) of each definition directly below a `# same in: a.py, b.py`."""
    lines = text.splitlines()
    found = []
    definitions = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    starts = {
        min([node.lineno, *(part.lineno for part in node.decorator_list)]): node
        for node in definitions
    }
    for number, line in enumerate(lines, start=1):
        if match := re.fullmatch(r"# same in: (.+)", line):
            assert number + 1 in starts, (
                f"line {number}: `# same in:` does not stand directly above a definition"
            )
            node = starts[number + 1]
            source = "\n".join(lines[number : node.end_lineno])
            found.append(([name.strip() for name in match[1].split(",")], node.name, source))
    return found


def test_blocks_meant_to_be_the_same_are():
    blocks = {path.stem: blocks_meant_to_be_the_same(path.read_text()) for path in ALGOS}
    for path_name, found in blocks.items():
        for others, name, source in found:
            for other in others:
                assert other in blocks, (
                    f"{path_name}: {name} is said to be the same in {other}, which does not exist"
                )
                twins = [
                    twin
                    for names, twin_name, twin in blocks[other]
                    if twin_name == name and path_name in names
                ]
                assert twins == [source], f"{name} differs between {path_name} and {other}"


def test_the_comparison_of_blocks_finds_what_it_should():
    text = "import os\n\n\n# same in: b.py, c.py\n@decorated\ndef f(x):\n    return x\n\n\ndef g():\n    pass\n"
    assert blocks_meant_to_be_the_same(text) == [
        (["b.py", "c.py"], "f", "@decorated\ndef f(x):\n    return x")
    ]


# --- Results ----------------------------------------------------------------------------------------------------------
def test_results_have_the_required_columns_and_commands():
    runs, _ = plot_results.read_results(
        ROOT / "docs/results"
    )  # raises where a file is not as it should be
    for algo in {run.algo for run in runs}:
        assert (ROOT / "algos" / f"{algo}.py").exists()
        commands = (ROOT / "docs/results" / algo / "commands.md").read_text()
        for task, hardware in {(run.task, run.hardware) for run in runs if run.algo == algo}:
            assert task in commands and hardware in commands, (
                f"commands.md says nothing of {task} on {hardware}"
            )


def marked(page: Path) -> list[tuple[str, str]]:
    """(algorithm, pattern of tasks) of every table and figure marker of a page."""
    found = re.findall(r"^<!-- (?:table|figures):(\S+) -->", page.read_text(), re.MULTILINE)
    return [(name.partition("/")[0], name.partition("/")[2] or "*") for name in found]


def test_matrix_files_and_pages_hold_together():
    """Every result is a cell's, with a record of its command and commit; a cell feeds the pages that show it."""
    cells, _ = reproduce.read_matrix(ROOT / "benchmarks/matrix.toml")
    expected = {cell.result(ROOT, seed): cell for cell in cells for seed in cell.seeds}
    there = {
        path
        for path in (ROOT / "docs/results").glob("*/*__s*.csv")
        if path.parent.name != "throughput"
    }
    assert there <= set(expected), (
        f"no cell of the matrix: {sorted(path.name for path in there - set(expected))}"
    )
    for path in there:
        record = json.loads(path.with_suffix(".json").read_text())
        assert (
            record["command"]
            and record["commit"]
            and record["ended"] in ("done", "interrupted", "failed")
        )
    shown = {page: marked(page) for page in plot_results.documents(ROOT)}
    for cell in cells:
        by_marker = {
            str(page.relative_to(ROOT)) for page, markers in shown.items()
            if any(algo == cell.algo and fnmatch(cell.task, pattern) for algo, pattern in markers)
        }  # fmt: skip
        assert set(cell.feeds) == by_marker, f"{cell.name} is shown by {sorted(by_marker)}"
        assert (ROOT / cell.program).exists() or cell.closed
        assert all((ROOT / code).exists() for code in cell.code)


def test_tables_in_the_docs_are_those_of_the_results():
    stale = [str(document.relative_to(ROOT)) for document in plot_results.stale_documents(ROOT)]
    assert not stale, "run make figures"


def write_run(
    root: Path,
    name: str,
    rows: list[tuple],
    header="global_step,wall_time,train_time,eval/success_rate",
):
    path = root / "docs/results/algo" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_plot_results_fills_tables_and_draws(tmp_path):
    write_run(
        tmp_path,
        "Task-v1__cpu2__s1.csv",
        [(0, 60, 0, 0.0), (100, 120, 30, 0.9), (200, 180, 60, 1.0)],
    )
    write_run(
        tmp_path,
        "Task-v1__cpu2__s2.csv",
        [(0, 60, 0, 0.0), (100, 120, 30, 0.8), (200, 180, 60, 0.8)],
    )
    (tmp_path / "docs/results/throughput").mkdir()
    (tmp_path / "docs/results/throughput/sim__cpu2.csv").write_text(
        "what,per_second\nphysics,12345.6\nrender,0.5\n"
    )
    page = tmp_path / "docs/page.md"
    page.write_text(
        "<!-- table:algo -->\nold\n<!-- /table -->\n<!-- table:throughput/sim -->\n<!-- /table -->\n"
        "<!-- table:other -->\n<!-- /table -->\n<!-- figures:algo/Task* -->\n<!-- /figures -->\n"
    )
    script = str(ROOT / "scripts/plot_results.py")
    assert run(sys.executable, script, "--root", str(tmp_path), "--check").returncode == 1
    result = run(sys.executable, script, "--root", str(tmp_path))
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    # Last success 1.0 and 0.8: mean 0.9, deviation sqrt(2) / 10. Only the first seed crosses 90 %, at 100 steps, 2 min.
    success, crossed = "90.0% ± 14.1% | 90.0% ± 14.1%", "100 (1 of 2) | 2.0 (1 of 2)"
    assert (
        f"| Task-v1 | cpu2 | 2 | 200 ± 0 | {success} | 3.0 ± 0.0 | 1.0 ± 0.0 | {crossed} |" in text
    )
    assert "old" not in text
    assert "| physics | 12,346 | cpu2 |" in text and "| render | 0.5 | cpu2 |" in text
    assert text.count("_Not yet measured._") == 1
    assert "![algo on Task-v1](../docs/images/algo__Task-v1.png)" in text
    assert (tmp_path / "docs/images/algo__Task-v1.png").read_bytes().startswith(b"\x89PNG")
    assert run(sys.executable, script, "--root", str(tmp_path), "--check").returncode == 0


def test_a_headline_is_the_mean_of_three_seeds(tmp_path):
    """A cell with `headline` is a line of the README's table; with two seeds of three there is none, but an error."""
    (tmp_path / "benchmarks").mkdir()
    cell = '[[cell]]\nalgo = "algo"\ntask = "T"\nseeds = [1, 2, 3]\nheadline = "success"\n'
    (tmp_path / "benchmarks/matrix.toml").write_text(cell)
    page = tmp_path / "README.md"
    page.write_text("<!-- table:headlines -->\n<!-- /table -->\n")
    for seed, success in ((1, 0.8), (2, 1.0)):
        write_run(tmp_path, f"T__cpu2__s{seed}.csv", [(9, 60, 1, success)])
    with pytest.raises(plot_results.ResultsError, match="mean of at least three seeds, not 2$"):
        plot_results.stale_documents(tmp_path)
    write_run(tmp_path, "T__cpu2__s3.csv", [(9, 120, 1, 0.9)])
    text = plot_results.stale_documents(tmp_path)[page]
    line = "| [`algo.py`](algos/algo.py) | T | 90.0% ± 10.0% success | 1.3 ± 0.6 |"
    assert line in text


def test_the_guards_table_tells_how_far_below_its_base_a_run_was(tmp_path):
    """A base of 50 %: a hundred of its own episodes are below 40 % once in forty."""
    header = "global_step,wall_time,train_time,eval/success_rate,eval/residual,eval/deploys"
    header += ",train/rolling_success,train/lowest"
    rows = [
        (0, 1, 0, 0.5, 0.5, 0, "nan", 1),
        (10, 2, 1, 0.5, 0.125, 0, 0.41, 0.41),
        (20, 3, 2, 0.75, 0.75, 1, 0.39, 0.38),
        (30, 4, 3, 0.625, 0.625, 1, 0.6, 0.38),
    ]
    guarded = plot_results.read_run(write_run(tmp_path, "T__cpu2__s1.csv", rows, header))
    plain = plot_results.read_run(write_run(tmp_path, "U__cpu2__s1.csv", [(0, 1, 0, 0.5)]))
    lines = plot_results.guard_table([guarded, plain]).splitlines()
    assert lines[2:] == ["| T | cpu2 | 1 | 50.0% | 12.5% | 20 | 50.0% | 38% | 1 of 3 | 62.5% |"]


def test_mean_curve_interpolates_between_seeds(tmp_path):
    first = plot_results.read_run(
        write_run(tmp_path, "T__cpu2__s1.csv", [(0, 1, 0, 0.0), (10, 2, 1, 1.0)])
    )
    second = plot_results.read_run(
        write_run(tmp_path, "T__cpu2__s2.csv", [(5, 1, 0, 0.5), (15, 2, 1, 0.7)])
    )
    x, y = plot_results.mean_curve([first, second], "global_step")
    assert x.tolist() == [5, 10] and y == pytest.approx([0.5, 0.8])


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("T__cpu2.csv", [(0, 1, 0, 0)], {}, "the name must be"),
        (
            "T__cpu2__s1.csv",
            [(0, 1)],
            {"header": "global_step,wall_time"},
            "lacks the column train_time",
        ),
        (
            "T__cpu2__s1.csv",
            [(0, 1, 0)],
            {"header": "global_step,wall_time,train_time"},
            "lacks the column eval/",
        ),
        ("T__cpu2__s1.csv", [(0, 1, 0, "high")], {}, "eval/success_rate: could not convert"),
        ("T__cpu2__s1.csv", [(0, 1, 0, "nan")], {}, "empty or non-finite"),
        ("T__cpu2__s1.csv", [(5, 1, 0, 0), (5, 2, 0, 0)], {}, "does not rise"),
        ("T__cpu2__s1.csv", [(5, 1, 2, 0)], {}, "train_time is above wall_time"),
        ("T__cpu2__s1.csv", [(5, 1, 0)], {}, "line 2: has not the 4 columns"),
        ("T__cpu2__s1.csv", [], {}, "has no rows"),
    ],
)
def test_plot_results_says_what_is_wrong_with_a_file(tmp_path, name, rows, options, message):
    path = write_run(tmp_path, name, rows, **options)
    result = run(sys.executable, str(ROOT / "scripts/plot_results.py"), "--root", str(tmp_path))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        str(path) in result.stderr and message in result.stderr and result.stderr.count("\n") == 1
    )


def test_plot_results_says_which_marker_is_open(tmp_path):
    (tmp_path / "README.md").write_text(
        "<!-- table:algo -->\n<!-- table:other -->\n<!-- /table -->\n"
    )
    with pytest.raises(plot_results.ResultsError, match="README.md: a marker"):
        plot_results.stale_documents(tmp_path)
