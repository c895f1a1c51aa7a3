"""`python -m envs.maniskill`: steps a task with random actions, prints its speed, optionally saves its images."""

import argparse
import time
from pathlib import Path

import torch

from envs.maniskill import make


def main() -> None:
    """`python -m envs.maniskill`: steps a task with random actions, prints its speed, optionally saves its images."""
    parser = argparse.ArgumentParser(
        description="Steps a ManiSkill task with random actions and prints its speed."
    )
    parser.add_argument("--env-id", default="PickCube-v1")
    parser.add_argument("--num-envs", type=int, default=1)
    parser.add_argument(
        "--num-workers", type=int, help="processes on the CPU, 0 is this one (default: one a core)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--render-size", type=int, default=128)
    parser.add_argument(
        "--full-visuals", action="store_true", help="draw robots by their own meshes"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", metavar="FOLDER", help="write one PNG a camera there")
    args = parser.parse_args()
    start = time.perf_counter()
    light = False if args.full_visuals else None
    env = make(
        args.env_id,
        args.num_envs,
        args.device,
        seed=1,
        render_size=args.render_size,
        light_visuals=light,
        num_workers=args.num_workers,
        stagger=False,
    )
    built = time.perf_counter() - start
    if args.save:
        import imageio.v3 as iio

        for camera in ("third", *env.spec["cameras"]):
            path = (
                Path(args.save)
                / f"maniskill_{args.env_id}_{camera}{'_full' if args.full_visuals else ''}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            iio.imwrite(path, env.render((0,), 256, camera)[0])
    actions = torch.rand(args.steps + 5, env.num_envs, env.action_dim, device=env.device) * 2 - 1
    for action in actions[:5]:
        env.step(action)
    start, used = time.perf_counter(), time.process_time()
    for action in actions[5:]:
        obs = env.step(action)[0]
    float(obs["state"].sum())  # waits for the device
    wall, used = time.perf_counter() - start, time.process_time() - used
    steps = args.steps * env.num_envs
    print(
        f"{args.env_id} on {env.spec['sim_backend']}, {env.num_envs} environments, image {env.image_shape}, "
        f"light_visuals={env.spec['light_visuals']}: built in {built:.1f} s, {steps / wall:.0f} env steps/s, "
        f"{1e3 * used / steps:.1f} CPU ms a step in this process"
    )
    env.close()


if __name__ == "__main__":
    main()
