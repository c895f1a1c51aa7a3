"""Print how far AntRun's gradient is from the slopes of the original's forward pass: ours, and the original's own.

    python scripts/gradient_rewarped.py

Reads tests/golden/rewarped_gradients.npz. A line for each number of steps: the directions along which the sum of the
rewards is smooth, the errors over them as shares of the slopes (root mean squares), and for the least and the most of
the eight ants the cosine of the original's gradient with ours and its norm over that of ours.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_rewarped_original import antrun_window, golden  # noqa: E402


def size(x) -> float:
    return float(x.square().mean().sqrt())


for horizon in (4, 8, 16):
    data = golden("gradients")
    ours, smooth, _ = antrun_window(data, horizon)
    slopes, directions = data[f"{horizon}/slopes"][1], data[f"{horizon}/directions"]
    theirs = data[f"{horizon}/gradient"]
    errors = [
        size(((gradient * directions).sum((1, 3)) - slopes)[smooth]) / size(slopes[smooth])
        for gradient in (ours, theirs)
    ]
    cosines = torch.cosine_similarity(
        ours.movedim(1, 0).flatten(1), theirs.movedim(1, 0).flatten(1)
    )
    norms = theirs.norm(dim=(0, 2)) / ours.norm(dim=(0, 2))
    print(
        f"{horizon:2} steps, {int(smooth.sum())} directions: off by {errors[0]:.1%}, the original by {errors[1]:.1%};"
        f" cosine {cosines.min():.2f} to {cosines.max():.2f}, norm {norms.min():.2f} to {norms.max():.2f}"
    )
