"""Draw the images of the Go1 tasks that the docs show.

    python scripts/picture_go1.py                                       tasks.png
    python scripts/picture_go1.py --policy runs/<name>/best.npz         the film of a walk, and its plots
    python scripts/picture_go1.py --stand runs/<name>/best.npz          stand.png too

Output, under docs/images/go1:
    tasks.png        the robot at an episode's start, standing, on rough terrain
    walk.mp4         the policy in MuJoCo's C library, told one velocity after another: COMMANDS below. Seen from
                     above, what it is told in blue, what it does in orange: an arrow for the velocity, the
                     circle being 1 m/s; an arc for the turning of one second
    walk.gif         the same, small
    walk.png         a film strip of the first second of the trot
    walk_plot.png    commanded and measured velocities of that walk, and which feet stood on the floor
    stand.png        Go1Stand: where a policy holds the trunk, by command
Drawn by OpenGL (EGL) where that works, else by MuJoCo Warp. Noise is on as in training, randomisation is off.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from envs import go1

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import ppo_mjx_go1 as ppo  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

# entries of privileged_state: forward and sideways velocity, turning rate, free of noise
MEASURED = (57, 58, 50)
# what it is told, for how many seconds: forward and sideways velocity in m/s, turning rate in rad/s
COMMANDS = (
    ("forward", 3.0, (1.0, 0.0, 0.0)),
    ("to the left", 3.0, (0.0, 0.4, 0.0)),
    ("stand", 2.0, (0.0, 0.0, 0.0)),
    ("turn left on the spot", 3.0, (0.0, 0.0, 0.8)),
    ("turn right on the spot", 3.0, (0.0, 0.0, -0.8)),
    ("stand", 2.0, (0.0, 0.0, 0.0)),
)
TOLD, DOES = (31, 119, 180), (255, 127, 14)  # colours
DIAL = 50  # pixels for 1 m/s
POSES = (
    (0.30, 0.0, 0.0),
    (0.21, 0.0, 0.0),
    (0.26, 0.2, 0.0),
    (0.26, 0.0, 0.25),
)  # height in m, roll, pitch in rad


@dataclass
class Args:
    policy: Path | None = None
    """weights of a policy for Go1JoystickFlat"""
    stand: Path | None = None
    """weights of a policy for Go1Stand"""
    out: Path = ROOT / "docs/images/go1"
    """folder for the images"""


def row(images: list[np.ndarray], texts: list[str], columns: int) -> Image.Image:
    """Pictures side by side, each with a line of text below."""
    (high, wide), foot = images[0].shape[:2], 16
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (wide + 4) - 4, lines * (high + foot)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, (image, text) in enumerate(zip(images, texts, strict=True)):
        at = k % columns * (wide + 4), k // columns * (high + foot)
        sheet.paste(Image.fromarray(image), at)
        draw.text((at[0] + 2, at[1] + high + 1), text, fill="black", font=font)
    return sheet


def plot_walk(command, measured, contact, hz: float, path: Path):
    """Commanded against measured velocity (T, 3), and when each foot (T, 4) stood on the floor."""
    figure = Figure((10, 8), layout="tight")  # without pyplot: no window, no global state
    seconds = np.arange(len(command)) / hz
    axes = figure.subplots(4, 1, sharex=True)
    for i, name in enumerate(("forward, m/s", "to the left, m/s", "turning left, rad/s")):
        axes[i].plot(seconds, measured[:, i], color="C1", linewidth=1, label="measured")
        axes[i].plot(seconds, command[:, i], color="C0", label="commanded")
        axes[i].set_ylabel(name)
    axes[0].legend(loc="upper right")
    for foot in range(4):
        low, high = foot - 0.4, foot + 0.4
        on, color = contact[:, foot], f"C{foot}"
        axes[3].fill_between(seconds, low, high, where=on, step="post", color=color)
    ticks = dict(yticks=range(4), yticklabels=["FR", "FL", "RR", "RL"])
    axes[3].set(xlabel="seconds", ylabel="feet on the floor", **ticks)
    figure.savefig(path, dpi=100)


def hold(env: go1.Go1Env, state, seconds: float, act, command=None) -> tuple:
    """Some seconds under one command -> the last state and what was at each step: qpos, command, velocity, contact."""
    trace = []
    for _ in range(round(seconds * env.control_hz)):
        if command is not None:
            told = jnp.asarray(command, jnp.float32)
            timer = jnp.full_like(state.command_timer, 10**6)
            seen = {
                k: state.obs[k].at[:, at].set(told)
                for k, at in (("state", slice(-3, None)), ("privileged_state", slice(45, 48)))
            }
            state = state._replace(command=told[None], command_timer=timer, obs=seen)
        truth = np.asarray(state.obs["privileged_state"][0])[list(MEASURED)]
        trace.append(
            (
                np.asarray(state.qpos[0]),
                np.asarray(state.command[0]),
                truth,
                np.asarray(state.contact[0]),
            )
        )
        state = env.step_batch(state, act(state.obs))
    return state, trace


def still(env: go1.Go1Env, seed: int):
    """One robot at rest in the middle, looking along x."""
    state = env.reset_batch(jax.random.split(jax.random.key(seed), 1))
    pose = jnp.asarray([[0.0, 0.0, env.task.height, 1.0, 0.0, 0.0, 0.0]])
    return state._replace(qpos=state.qpos.at[:, :7].set(pose), qvel=jnp.zeros_like(state.qvel))


def tasks(args: Args) -> None:
    images, texts = [], []
    for task, seconds, text in (
        ("Go1JoystickFlat", 0.0, "an episode's start"),
        ("Go1JoystickFlat", 2.0, "zero action: the default pose"),
        ("Go1JoystickRough", 2.0, "Go1JoystickRough"),
    ):
        env = go1.make(task, "mujoco-c", noise_level=0.0)
        state, _ = hold(env, still(env, 0), seconds, lambda obs: np.zeros((1, 12), np.float32))
        images.append(env.render(state.qpos, (240, 320))[0])
        texts.append(text)
    row(images, texts, 3).quantize(256).save(args.out / "tasks.png", optimize=True)


def smooth(velocity: np.ndarray, steps: int = 20) -> np.ndarray:
    """Means (T, 3) over the last `steps`, about one stride: within one the velocity swings."""
    before = np.repeat(velocity[:1], steps - 1, 0)
    sums = np.cumsum(np.concatenate([np.zeros((1, 3)), before, velocity]), 0)
    return (sums[steps:] - sums[:-steps]) / steps


def draw_velocity(draw: ImageDraw.ImageDraw, centre, velocity, color, width: int, radius: int):
    """From above, nose up: a line for the velocity in the plane, an arc for a second's turning."""
    x, y = centre
    forward, left, turning = velocity
    tip = x - DIAL * left, y - DIAL * forward
    draw.line([centre, tip], fill=color, width=width)
    draw.circle(tip, width, fill=color)
    nose = 270.0  # PIL's degrees go clockwise from the right
    ends = sorted((nose, nose - np.degrees(turning)))
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.arc(box, *ends, fill=color, width=5)


def captioned(frame: np.ndarray, what: str, told, does) -> Image.Image:
    """A frame (360, 480, 3) with what the robot is told and what it does, in numbers and from above."""
    high, wide = frame.shape[:2]
    image = Image.new("RGB", (wide, high + 64), "white")
    image.paste(Image.fromarray(frame))
    draw, centre = ImageDraw.Draw(image), (wide - 75, 75)
    draw.circle(centre, DIAL, fill="white", outline="gray")
    draw_velocity(draw, centre, told, TOLD, 8, DIAL + 16)
    draw_velocity(draw, centre, does, DOES, 4, DIAL + 8)
    draw.text((8, high + 20), what, fill="black", font=ImageFont.load_default(20))
    rows = (
        (("", "forward m/s", "left m/s", "turning rad/s"), "black", 2, 11),
        (("told", *(f"{value:5.2f}" for value in np.round(told, 2) + 0.0)), TOLD, 17, 17),
        (("does", *(f"{value:5.2f}" for value in np.round(does, 2) + 0.0)), DOES, 39, 17),
    )  # + 0.0: no minus zero
    for words, color, below, size in rows:
        for left, word in zip((232, 282, 354, 408), words, strict=True):
            at, font = (left, high + below), ImageFont.load_default(size)
            draw.text(at, word, fill=color, font=font)
    return image


def film(env: go1.Go1Env, qpos, names, command, measured, out: Path) -> None:
    """walk.mp4 at half the control rate, and walk.gif with half of its frames at half the size."""
    shown = slice(None, None, 2)
    rows = zip(
        env.render(qpos[shown], (360, 480)),
        names[shown],
        command[shown],
        smooth(measured)[shown],
        strict=True,
    )
    frames = [captioned(*row) for row in rows]
    rate = round(env.control_hz / 2)
    imageio.mimwrite(
        out / "walk.mp4", [np.asarray(f) for f in frames], fps=rate, macro_block_size=1
    )
    octree = Image.Quantize.FASTOCTREE  # the default loses the colours of thin lines
    small = [
        f.resize((320, 283)).quantize(64, octree, dither=Image.Dither.NONE) for f in frames[::2]
    ]
    rest = dict(append_images=small[1:], duration=2000 // rate, loop=0, optimize=True)
    small[0].save(out / "walk.gif", save_all=True, **rest)


def walk(args: Args) -> None:
    policy, env = ppo.Policy(args.policy), go1.make("Go1JoystickFlat", "mujoco-c")
    state, trace, names = still(env, 0), [], []
    for name, seconds, command in COMMANDS:
        state, part = hold(env, state, seconds, policy.act, command)
        trace += part
        names += [name] * len(part)
        reached = np.mean([step[2] for step in part[-50:]], 0).round(2).tolist()
        print(f"{name} {command}: mean of the last second {reached}")
    qpos, *told = (np.stack(column) for column in zip(*trace, strict=True))
    plot_walk(*told, env.control_hz, args.out / "walk_plot.png")
    film(env, qpos, names, *told[:2], args.out)
    moments = range(75, 75 + 8 * 3, 3)  # 0.06 s apart: one stride of about 0.4 s, and a little more
    texts = [f"{(t - 75) / 50:.2f} s" for t in moments]
    strip = row(list(env.render(qpos[moments], (150, 200))), texts, 4)
    strip.quantize(256).save(args.out / "walk.png", optimize=True)


def stand(args: Args) -> None:
    policy, env = ppo.Policy(args.stand), go1.make("Go1Stand", "mujoco-c", episode_length=10**6)
    images, texts = [], []
    for pose in POSES:
        state, trace = hold(env, still(env, 0), 3.0, policy.act, pose)
        images.append(env.render(trace[-1][0][None], (180, 240))[0])
        texts.append(
            f"{pose[0]:.2f} m, roll {pose[1]:.2f}, pitch {pose[2]:.2f}; is {trace[-1][0][2]:.3f} m"
        )
    row(images, texts, 4).quantize(256).save(args.out / "stand.png", optimize=True)


def main(args: Args) -> None:
    """Draws what `args` asks for. Raises ValueError, FileNotFoundError or RuntimeError in one line."""
    args.out.mkdir(parents=True, exist_ok=True)
    tasks(args)
    if args.policy:
        walk(args)
    if args.stand:
        stand(args)
    for path in sorted(args.out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
