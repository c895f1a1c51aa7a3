"""Draw the images of the DeepMind Control tasks that the docs show, and measure how much the renderers differ.

    python scripts/picture_dmc.py                                    all published tasks
    python scripts/picture_dmc.py --tasks walker_walk reach_duplo    only these, and no images are written
    python scripts/picture_dmc.py --no-measure                       the images alone

Every renderer that works here draws the same states (same seed, same random actions), 84 pixels a side. The reference
is OpenGL by EGL with its defaults, which is what the published results were learned from. Printed for each task: mean
absolute difference to it over all pixels and states, of 255, and beside it that of the reference to itself a step
later, as a measure of what a difference means.

Output, PNGs of at most 60 kB under docs/images/dmc:
    renderers.png    the same moment of some tasks by each renderer
    tasks.png        every published task, as the policy sees it
    jitter.png       first frames of episodes with camera_jitter, and with colour_jitter too
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from envs import check, dmc

ROOT = Path(__file__).resolve().parent.parent
SIZE, GAP, LABEL = 84, 4, 14  # pixels
STATES, APART = 8, 4  # states that are compared, and steps between them
SHOWN = (
    "walker_walk",
    "cartpole_swingup",
    "cup_catch",
    "reacher_easy",
    "quadruped_walk",
    "reach_duplo",
)
LIMIT = 60_000  # bytes


@dataclass
class Args:
    tasks: tuple[str, ...] = dmc.EASY + dmc.MEDIUM + dmc.HARD
    """which tasks to measure; the images are written when all are"""
    measure: bool = True
    """compare the renderers for every task"""
    out: Path = ROOT / "docs/images/dmc"
    """folder for the pictures"""
    seed: int = 3
    """seed of the episodes and of the actions"""


def ways() -> dict[str, dict]:
    """Name -> options of every way to draw that works here; the reference is the first.

    Raises RuntimeError where the reference does not work.
    """
    if not check.ask("egl").works:
        raise RuntimeError(f"the reference is OpenGL by EGL: {check.PROBES['egl'].install}")
    found = {"egl": dict(renderer="egl")}
    if check.ask("osmesa").works:
        found["osmesa"] = dict(renderer="osmesa")
    return found | {"warp, 4 rays": dict(renderer="warp"), "warp, 1 ray": dict(renderer="warp", samples_per_pixel=1),
                    "egl, fast_render": dict(renderer="egl", fast_render=True)}  # fmt: skip


def states(env_id: str, seed: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of STATES states of random episodes, uint8 (STATES, 84, 84, 3), and those one step later."""
    env = dmc.make(env_id, 1, "cpu", seed=seed, image_size=SIZE, workers=1, **options)
    generator, pairs = torch.Generator().manual_seed(seed), []
    for step in range(STATES * APART):
        before = env.obs["rgb"][0].numpy()
        env.step(torch.rand(1, env.action_dim, generator=generator) * 2 - 1)
        if step % APART == APART - 1:
            pairs.append((before, env.obs["rgb"][0].numpy()))
    env.close()
    return tuple(np.stack(side) for side in zip(*pairs, strict=True))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a.astype(np.int16) - b).mean())


def grid(
    rows: list[list[np.ndarray]], above: list[str], below: list[str] | None = None
) -> Image.Image:
    """Pictures in rows, with `above` over the columns and `below` under each row's."""
    head, foot = LABEL * bool(above), LABEL * bool(below)
    high = SIZE + GAP + foot
    picture = Image.new(
        "RGB", (len(rows[0]) * (SIZE + GAP) - GAP, head + len(rows) * high - GAP), "white"
    )
    draw, font, labels = ImageDraw.Draw(picture), ImageFont.load_default(10), iter(below or ())
    for k, text in enumerate(above):
        draw.text((k * (SIZE + GAP) + 1, 1), text, fill="black", font=font)
    for j, row in enumerate(rows):
        for k, rgb in enumerate(row):
            picture.paste(Image.fromarray(rgb), (k * (SIZE + GAP), head + j * high))
            if below:
                draw.text(
                    (k * (SIZE + GAP) + 1, head + j * high + SIZE),
                    next(labels),
                    fill="black",
                    font=font,
                )
    return picture


def write(picture: Image.Image, path: Path) -> None:
    """Writes a PNG of at most 256 colours, rare ones among them. Raises RuntimeError where it is above LIMIT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    if path.stat().st_size > LIMIT:
        raise RuntimeError(
            f"{path} has {path.stat().st_size} bytes, above {LIMIT}: show less or shrink it"
        )
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main(args: Args) -> None:
    """Measures and draws what `args` names. Raises RuntimeError or ValueError in one line."""
    options, seen = ways(), {}
    if args.measure:
        print(
            f"{'task':<26}"
            + "".join(f"{name:>18}" for name in list(options)[1:])
            + f"{'a step later':>18}"
        )
    for env_id in args.tasks:
        wanted = list(options) if args.measure or env_id in SHOWN else ["egl"]
        drawn = {name: states(env_id, args.seed, **options[name]) for name in wanted}
        seen[env_id] = {name: pictures[STATES // 2] for name, (pictures, _) in drawn.items()}
        if args.measure:
            reference, later = drawn["egl"]
            values = [difference(drawn[name][0], reference) for name in wanted[1:]] + [
                difference(later, reference)
            ]
            print(f"{env_id:<26}" + "".join(f"{value:>18.1f}" for value in values), flush=True)
    if set(args.tasks) != set(Args.tasks):
        return
    write(
        grid([list(seen[name].values()) for name in SHOWN], list(options)),
        args.out / "renderers.png",
    )
    names = list(Args.tasks) + [""] * (-len(Args.tasks) % 8)
    cells = [
        seen[name]["egl"] if name else np.full((SIZE, SIZE, 3), 255, np.uint8) for name in names
    ]
    rows = [cells[k : k + 8] for k in range(0, len(cells), 8)]
    short = [
        name.replace("cartpole", "cart").replace("_", " ").replace("swingup", "sw.")
        for name in names
    ]
    write(grid(rows, [], short), args.out / "tasks.png")
    rows = []
    for how in (dict(camera_jitter=0.05), dict(camera_jitter=0.05, colour_jitter=0.2)):
        env = dmc.make(
            "walker_walk",
            6,
            "cpu",
            seed=args.seed,
            image_size=SIZE,
            renderer="egl",
            workers=1,
            **how,
        )
        rows.append(list(env.obs["rgb"].numpy()))
        env.close()
    write(
        grid(rows, ["above: camera_jitter 0.05", "", "below: colour_jitter 0.2 too"]),
        args.out / "jitter.png",
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
