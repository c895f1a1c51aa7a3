"""Packages that are installed, but not for this process: for tests of what a robot's computer does without them."""

import sys


class _Absent:
    def __init__(self, names):
        self.names = set(names)

    def find_spec(self, name, *_):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def of(names: list[str]) -> None:
    """From now on these cannot be imported. (None in sys.modules is something else: other packages look there.)"""
    sys.meta_path.insert(0, _Absent(names))
