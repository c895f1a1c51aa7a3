"""`python -m envs.demos`: records demonstrations of a scripted expert, or shows what a file holds."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from envs.demos.human import Human
from envs.demos.lerobot import is_lerobot
from envs.demos.reading import describe, import_h5py
from envs.demos.recording import convert, record


@dataclass
class Args:
    """Records demonstrations of a scripted expert with human-like errors, or shows what a file holds."""

    env_id: str = "SO101PlaceCube-v1"
    """A task of envs/so101, or `robosuite/` and one of envs/robosuite."""
    episodes: int = 200
    """Demonstrations to record."""
    noise: float = 0.1
    """Standard deviation of the smooth noise on the actions, in units of the largest action; 0: none."""
    pause: float = 0.02
    """Probability of a pause at each step."""
    slow: float = 0.2
    """Largest share of the expert's speed that an episode gives up."""
    keep: Literal["successes", "all"] = "successes"
    """Which episodes to store; with `all`, the attribute `success` of each tells."""
    out: Path | None = None
    """File to write; None: runs/demos/ and a name made of the above."""
    overwrite: bool = False
    """Whether an existing file may be replaced (once the new one is complete)."""
    obs: Literal["state", "pixels"] = "state"
    """`pixels` stores images as well; state and privileged state are always stored."""
    cameras: tuple[str, ...] = ()
    """Cameras of the images; none: the environment's own choice."""
    render_size: int = 84
    """Pixels on each side of an image."""
    domain_randomization: bool = True
    """SO-101: randomised looks, sizes, friction, gains, delays and joint noise."""
    num_envs: int = 0
    """Environments at once; 0: 50 of the SO-101 (fewer for fewer episodes), 1 of robosuite."""
    tries: int | None = None
    """Give up after so many episodes; None: ten times as many as wanted."""
    seed: int = 0
    """Seed of starts, randomisation and errors: the same seed and settings, the same demonstrations."""
    from_lerobot: Path | None = None
    """Record nothing; bring this LeRobotDataset folder to robomimic's layout, in --out, as the task --env-id."""
    show: Path | None = None
    """Record nothing; describe this file."""


def make(args: Args) -> tuple[Any, Any, dict, tuple[str, ...]]:
    """Environment, expert with human-like errors, env_args for the file and the cameras' names, as `args` say."""
    pixels = args.obs == "pixels"
    if args.env_id.startswith("robosuite/"):
        from envs import robosuite
        from envs.robosuite.expert import Expert

        options = {"render_size": args.render_size} | (
            {"cameras": args.cameras} if args.cameras else {}
        )
        env = robosuite.make(
            args.env_id, args.num_envs or 1, "cpu", seed=args.seed, images=pixels, asymmetric=True, stagger=False,
            **options,
        )  # fmt: skip
        expert, about = Expert(env), env.env_args
    else:
        from envs import so101
        from envs.so101.expert import Expert

        options = {"domain_randomization": args.domain_randomization}
        cameras = args.cameras or ("wrist",)
        if pixels:
            options |= {"render_size": args.render_size, "cameras": cameras, "samples_per_pixel": 1}
        num_envs = args.num_envs or min(50, args.episodes)
        env = so101.make(
            args.env_id,
            num_envs,
            "cpu",
            seed=args.seed,
            asymmetric=True,
            stagger=False,
            images=pixels,
            **options,
        )
        expert = Expert(env)
        # robomimic's types are 1 for robosuite, 2 for gym; it only asks when it runs a policy itself.
        kwargs = options | ({"camera_names": list(cameras)} if pixels else {})
        about = {"env_name": args.env_id, "type": 2, "env_kwargs": kwargs}
    errors = {"noise": args.noise, "pause": args.pause, "slow": args.slow, "seed": args.seed}
    about = {
        **about,
        "env_id": args.env_id,
        "spec": env.spec,
        "recorded": {**errors, "keep": args.keep},
    }
    return env, Human(expert, env, **errors), about, tuple(env.cameras) if pixels else ()


def main(args: Args) -> None:
    """The command line of this module."""
    if args.show is not None:
        print(describe(args.show))
        return
    if args.episodes < 1:
        raise ValueError(f"the number of episodes must be at least 1, not {args.episodes}")
    import_h5py()
    pixels = f"__{args.render_size}px" if args.obs == "pixels" else ""
    name = f"{args.env_id.replace('/', '_')}__noise{args.noise:g}{pixels}__{args.episodes}__s{args.seed}.hdf5"
    out = (args.out or Path("runs/demos") / name).expanduser()
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; name another file with --out, or add --overwrite")
    if args.from_lerobot is not None:
        if not is_lerobot(args.from_lerobot):
            raise ValueError(
                f"{args.from_lerobot} is no LeRobotDataset: there is no meta/info.json"
            )
        tally = convert(args.from_lerobot, out, args.env_id, args.render_size, args.seed)
        print(f"{out}: {tally['kept']} demonstrations, {tally['steps']} steps")
        return
    env, human, about, cameras = make(args)
    inode = lambda: out.stat().st_ino if out.exists() else None  # noqa: E731
    before = inode()
    # A request to end is treated as Ctrl-C is: the file is finished with what there is.
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tally = record(
            env, human, out, args.episodes, env_args=about, seed=args.seed, cameras=cameras, keep=args.keep,
            tries=args.tries,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(
            f"interrupted; {f'what was recorded is in {out}' if inode() != before else 'nothing was kept yet'}"
        )
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, usual)
        env.close()
    print(
        f"{out}: {tally['kept']} demonstrations, {tally['steps']} steps in {tally['seconds']:.0f} s; "
        f"success in {tally['succeeded']} of {tally['tried']} episodes"
    )
    if tally["kept"] < args.episodes:
        sys.exit(
            f"only {tally['kept']} of {args.episodes} in {tally['tried']} episodes; --tries allows more"
        )


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        sys.exit(f"envs.demos: {error}")
