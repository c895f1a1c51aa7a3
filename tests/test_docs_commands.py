"""Every command of README and docs names a program that exists, and flags that it has.

Only read, not run.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what a page quotes from the past, or generates
PAGES = [page for page in PAGES if page.name not in ("log.md", "commands.md")]
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
OURS = {"algos", "scripts", "benchmarks", "hardware", "envs", "tests"}


def commands(page: Path) -> list[str]:
    """The lines of its ```bash blocks, continued lines joined, comments left out."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            parts = [line] if "$(" in line else re.split(r"&&|;|\|", line)
            found += [part.strip() for part in parts if part.strip()]
    return found


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


def program_of(words: list[str]) -> Path | None:
    """The file of ours that a command runs; None where it is another's."""
    for position, word in enumerate(words[:-1]):
        if word == "-m":
            module = words[position + 1]
            if module.split(".")[0] in OURS:
                path = ROOT / module.replace(".", "/")
                return (
                    path / "__main__.py"
                    if (path / "__main__.py").exists()
                    else path.with_suffix(".py")
                )
            return None
    for word in words:
        if word.endswith(".py") and word.split("/")[0] in OURS:
            return ROOT / word
    return None


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
