"""Every command of README and docs names a program that exists, and flags that it has.

Only read, not run: scripts/walk.py runs them.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
from walk import PAGES, Walk, commands, program_of

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {
    "cd",
    "cp",
    "export",
    "for",
    "done",
    "source",
    "pip",
    "git",
    "rm",
    "ls",
    "uv",
    "sudo",
    "apt-get",
}


def arguments_of(source: str) -> set[str]:
    """Flags of a program: fields of its dataclasses called Args, and what argparse is told."""
    flags = set(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            names = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            for name in names:
                flags |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
        if isinstance(node, ast.FunctionDef):  # tyro.cli(main)
            flags |= {
                f"--{part.arg.replace('_', '-')}" for part in node.args.args + node.args.kwonlyargs
            }
    return flags | {"--help"}


ALL = sorted({(str(page.relative_to(ROOT)), text) for page in PAGES for text in commands(page)})


@pytest.mark.parametrize(("page", "text"), ALL, ids=[f"{page}: {text[:60]}" for page, text in ALL])
def test_a_documented_command_can_be_typed(page, text):
    words = [word for word in shlex.split(text) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if not words or words[0] in OTHERS or words[0].startswith(("$", ".venv/bin/pip")):
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in words[1:] if re.fullmatch(r"[a-z]+", word))
        return
    program = program_of(words)
    if program is None:
        return
    assert program.exists(), f"{page}: there is no {program.relative_to(ROOT)}"
    known = arguments_of(program.read_text())
    flags = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    given = {
        f"--{flag.lstrip('-').split('.')[-1]}" for flag in flags
    }  # of a nested argument the last part
    assert given <= known, f"{page}: {program.name} has no {', '.join(sorted(given - known))}"


def test_a_walked_command_has_the_smallest_budget_and_a_run_for_its_placeholder(tmp_path):
    for task, name in (("SO101ReachCube-v1", "old"), ("SO101LiftCube-v1", "new")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "args.json").write_text(f'{{"env_id": "{task}"}}')
    walk = Walk(tmp_path, limit=1)
    walk.runs = [("algos/squint_sac.py", tmp_path / "runs" / name) for name in ("old", "new")]
    program = "algos/squint_sac.py"
    words = f"python {program} --resume runs/<name>".split()
    assert walk.filled(words, program)[-3:] == ["runs/new", "--total-timesteps", "3840"]
    words = f"python {program} --checkpoint runs/<name>/best.pt --env-id SO101ReachCube-v1".split()
    assert walk.filled(words, program)[3] == "runs/old/best.pt", "the newest of the command's task"
    words = f"python {program} --cameras wrist third --total-timesteps 9 --track".split()
    shortened = walk.filled(words, program)
    assert shortened[2:6] == ["--cameras", "wrist", "third", "--track"] and "9" not in shortened
    with pytest.raises(LookupError, match="no run of algos/drqv2.py"):
        walk.filled("python algos/drqv2.py --resume runs/<name>".split(), "algos/drqv2.py")


def test_a_failure_of_a_walked_command_is_its_last_line(tmp_path):
    failure, _ = Walk(tmp_path, limit=60).run("python -c 'import sys; print(1); sys.exit(\"why\")'")
    assert failure == "why"
    assert Walk(tmp_path, limit=60).run("python -c 'print(1)'")[0] == ""
