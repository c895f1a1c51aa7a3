"""The README's moving picture: films of trained policies side by side.

    python scripts/picture_trained.py ARM.mp4 DOG.mp4 CLAY.mp4

Each film is one that an algorithm or scripts/picture_go1.py wrote. Its middle square is shown, `--seconds` of it from
the start, again from the start where it is shorter. Output: docs/images/trained.gif.
"""

from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    films: tyro.conf.Positional[tuple[Path, ...]]
    size: int = 240
    """pixels a side of each film"""
    seconds: float = 6.0
    """length of the picture"""
    fps: float = 12.5
    """its frames per second"""
    out: Path = ROOT / "docs/images/trained.gif"


def frames(path: Path, args: Args) -> list[Image.Image]:
    """The film's middle square at the picture's rate and size."""
    reader = imageio.get_reader(path)
    film, rate = list(reader), reader.get_meta_data()["fps"]
    chosen = []
    for number in range(round(args.seconds * args.fps)):
        image = Image.fromarray(film[round(number * rate / args.fps) % len(film)])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        chosen.append(square.resize((args.size, args.size), Image.Resampling.LANCZOS))
    return chosen


def main(args: Args):
    columns = [frames(path, args) for path in args.films]
    rows = [
        Image.fromarray(np.concatenate([np.asarray(image) for image in row], 1))
        for row in zip(*columns, strict=True)
    ]
    # one palette for all frames, so that still parts stay still and the file small
    palette = rows[0].quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small = [row.quantize(palette=palette, dither=Image.Dither.NONE) for row in rows]
    small[0].save(
        args.out,
        save_all=True,
        append_images=small[1:],
        duration=round(1000 / args.fps),
        loop=0,
        optimize=True,
    )
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
