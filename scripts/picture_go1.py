"""Draw the images of the Go1 tasks that the docs show.

    python scripts/picture_go1.py                                       tasks.png
    python scripts/picture_go1.py --policy runs/<name>/best.npz         walk.gif, walk.png, walk_plot.png too
    python scripts/picture_go1.py --stand runs/<name>/best.npz          stand.png too

Output, under docs/images/go1:
    tasks.png        the robot at an episode's start, standing, on rough terrain
    walk.gif         the policy in MuJoCo's C library, told one velocity after another: COMMANDS below
    walk.png         a film strip of the first second of the trot
    walk_plot.png    commanded and measured velocities of that walk, and which feet stood on the floor
    stand.png        Go1Stand: where a policy holds the trunk, by command
Drawn by OpenGL (EGL) where that works, else by MuJoCo Warp. Noise is on as in training, randomisation is off.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

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
# seconds, then forward and sideways velocity in m/s and turning rate in rad/s
COMMANDS = (
    (2.5, 1.0, 0.0, 0.0),
    (2.0, 0.6, 0.0, 1.0),
    (2.0, 0.0, 0.5, 0.0),
    (2.0, -0.7, 0.0, 0.0),
    (1.5, 0, 0, 0),
)
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


def walk(args: Args) -> None:
    policy, env = ppo.Policy(args.policy), go1.make("Go1JoystickFlat", "mujoco-c")
    state, trace = still(env, 0), []
    for seconds, *command in COMMANDS:
        state, part = hold(env, state, seconds, policy.act, command)
        trace += part
    qpos, *told = (np.stack(column) for column in zip(*trace, strict=True))
    plot_walk(*told, env.control_hz, args.out / "walk_plot.png")
    film = [
        Image.fromarray(frame).quantize(48, dither=Image.Dither.NONE)
        for frame in env.render(qpos[::4], (180, 240))
    ]
    film[0].save(
        args.out / "walk.gif",
        save_all=True,
        append_images=film[1:],
        duration=80,
        loop=0,
        optimize=True,
    )
    moments = range(
        75, 75 + 8 * 3, 3
    )  # at full speed, 0.06 s apart: one stride of about 0.4 s, and a little more
    strip = row(
        list(env.render(qpos[moments], (150, 200))), [f"{(t - 75) / 50:.2f} s" for t in moments], 4
    )
    strip.quantize(256).save(args.out / "walk.png", optimize=True)
    stops = np.cumsum([round(seconds * env.control_hz) for seconds, *_ in COMMANDS])
    for stop, (_, *command) in zip(stops, COMMANDS, strict=True):
        print(
            f"command {command}: mean of the last second {told[1][stop - 50 : stop].mean(0).round(2).tolist()}"
        )


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
