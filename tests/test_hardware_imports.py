"""No file of hardware/ imports one that imports it, at the top or inside a function."""

import ast

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "hardware").glob("*.py"))
NAMES = {file.stem for file in FILES}


def imports(source: str) -> set[str]:
    """Modules of hardware/ that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {name.split(".")[1] for name in found if name.startswith("hardware.")} & NAMES


def cycle(graph: dict[str, set[str]], path: list[str]) -> list[str] | None:
    """Modules that import each other in a circle, from the last of `path` on."""
    for following in sorted(graph[path[-1]]):
        if following in path:
            return [*path[path.index(following) :], following]
        if found := cycle(graph, [*path, following]):
            return found
    return None


def test_the_walk_sees_imports_inside_functions():
    graph = {
        "emulate": imports("def main():\n    from hardware import deploy_so101") | {"emulator"},
        "deploy_so101": imports("def run():\n    import hardware.emulate"),
        "emulator": set(),
    }
    assert cycle(graph, ["emulate"]) == ["emulate", "deploy_so101", "emulate"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_import_leads_back(name):
    graph = {file.stem: imports(file.read_text()) for file in FILES}
    found = cycle(graph, [name])
    assert found is None, " imports ".join(found)
