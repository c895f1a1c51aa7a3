"""Settings that must precede torch, and the paths that tests share."""

import os
import signal
import sys
from pathlib import Path

import pytest

# Several tests start processes of their own; with one thread each they do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Plots are written to files: no display is needed, nor looked for.
os.environ.setdefault("MPLBACKEND", "Agg")
# A test never talks to Weights & Biases, whatever the user's shell says.
os.environ["WANDB_MODE"] = "disabled"

ROOT = Path(__file__).resolve().parent.parent
# Files of algos/ and scripts/ are not packages; tests import them by name.
for folder in ("algos", "scripts", "benchmarks", "tests"):
    sys.path.insert(0, str(ROOT / folder))


@pytest.fixture(autouse=True)
def ctrl_c_is_pythons_own():
    """A run that ends by an exception, as at a NaN, leaves its handler behind; the next test must not find it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
