"""Rewards and success tests of the eight tasks.

What differs from the published ones is numbered in the docstring of the package. Here `env` is an SO101Env and `f` its
`facts`: what the tests ask about the present state, each (N,) or (N, 3).
"""

import torch

from envs.so101.tasks import BIN_THICKNESS


def force(env, sensor: str, contact: torch.Tensor | None = None) -> torch.Tensor:
    """Size (N,) of the net contact force of a sensor, newtons."""
    adr = env._sensor[sensor] + 1
    return (env.contact if contact is None else contact)[:, adr : adr + 3].norm(dim=1)


def facts(env) -> dict[str, torch.Tensor]:
    """What rewards, success tests and scripted controllers ask about the present state; each (N,) or (N, 3)."""
    fixed, jaw = force(env, "fixed_item"), force(env, "jaw_item")
    # Squeezed from both sides: the two forces on the item point against each other.
    pushes = [env.contact[:, env._sensor[name] + 1 :][:, :3] for name in ("fixed_item", "jaw_item")]
    opposed = (pushes[0] * pushes[1]).sum(1) <= 0.35 * fixed * jaw
    item, turn = env.pose("item")
    low, high = env.joint_low[5], env.joint_high[5]
    found = {
        "tcp": env.tcp, "item": item, "item_up": _half_height(env, turn),
        "touching": (fixed >= 0.01) | (jaw >= 0.01), "grasped": (fixed >= 0.5) & (jaw >= 0.5) & opposed,
        "table": force(env, "hand_table") >= 0.01, "static": (env.qvel[:, :5].abs() <= 0.15).all(1),
        "openness": ((env.qpos[:, 5] - low) / (high - low)).clamp(0, 1),
    }  # fmt: skip
    found["lifted"] = item[:, 2] >= found["item_up"] + 0.001
    if env.task.support:
        found["support_touch"] = force(env, "hand_support") >= 0.01
    return found


def _half_height(env, turn: torch.Tensor) -> torch.Tensor:
    """Height (N,) of the item's centre when it rests on something in its present orientation `turn` (N, 3, 3)."""
    up = turn[:, 2].abs()  # |world z| in the item's frame
    if env.task.item == "cube":
        return (up * env.item_half).sum(1)
    return (
        up[:, 2] * env.item_half[:, 2]
        + (1 - up[:, 2] ** 2).clamp_min(0).sqrt() * env.item_half[:, 0]
    )


def _reach(env, f):
    above = f["item"] + torch.stack((*[torch.zeros_like(f["item_up"])] * 2, f["item_up"] + 0.02), 1)
    distance = (f["tcp"] - above).norm(dim=1)
    closed = 1 - f["openness"]
    success = (distance <= 0.02) & f["static"] & (f["openness"] < 0.1)
    reward = (1 - torch.tanh(5 * distance)) + closed + (distance <= 0.02).float()
    reward = torch.where(success, 4.0, reward)
    return (reward - 3.0 * f["table"] - 1.0 * f["touching"]) / 4.0, success


def _lift(env, f):
    distance = (f["tcp"] - f["item"]).norm(dim=1)
    to_rest = (env.target[:, :5] - env.start_pose[:5]).norm(dim=1)
    grasped = f["grasped"].float()
    reward = (1 - torch.tanh(5 * distance)) + grasped + grasped * torch.exp(-2 * to_rest)
    success = f["lifted"] & f["grasped"] & (to_rest < 0.2)
    return (reward - 3.0 * f["table"] - 1.0 * ~f["lifted"]) / 3.0, success


def _progress(f, goal, near, clearance):
    """Common shape of Place and Stack (N,): how near the item is to its goal, and to the height over it, then on it."""
    height = torch.where(near, goal[:, 2], goal[:, 2] + clearance)
    distance = (goal - f["item"]).norm(dim=1)
    return 2 - torch.tanh(5 * distance) - torch.tanh(10 * (height - f["item"][:, 2]).abs())


def _calm(speeds):
    """1 at rest, falling with the norm of speeds (N, ...)."""
    return 1 - torch.tanh(10 * speeds.norm(dim=1))


def _place(env, f):
    bin_xyz, turn = env.pose("support")
    local = torch.einsum("nij,ni->nj", turn, f["item"] - bin_xyz)  # item in the bin's frame
    floor = BIN_THICKNESS - env.support_z
    inside = (local[:, :2].abs() < env.support_half[:, :2]).all(1)
    resting = (local[:, 2] - floor - f["item_up"]).abs() < 0.008
    goal = bin_xyz + turn[:, :, 2] * (floor + f["item_up"])[:, None]
    near = (f["item"] - bin_xyz)[:, :2].norm(dim=1) <= env.support_half[:, :2].norm(dim=1)
    progress = _progress(f, goal, near, env.support_half[:, 2] + 0.03)
    reach = 2 * (1 - torch.tanh(5 * (f["tcp"] - f["item"]).norm(dim=1)))
    reward = torch.where(f["grasped"], 3 + progress, reach)
    letting_go = (~f["touching"]).float() + f["openness"] + _calm(env.qvel[:, :5])
    reward = torch.where(inside & f["lifted"], 4 + progress + letting_go, reward)
    success = inside & resting & ~f["touching"] & ~f["support_touch"] & f["static"]
    reward = torch.where(success, 10.0, reward)
    low = ~f["lifted"] & ~inside
    return (reward - 6.0 * f["table"] - 3.0 * f["support_touch"] - 1.0 * low) / 10.0, success


def _stack(env, f):
    below, _ = env.pose("support")
    goal = below.clone()
    goal[:, 2] += env.support_half[:, 2] + f["item_up"]
    offset = f["item"] - goal
    flat = offset[:, :2].norm(dim=1)
    on = (flat <= 0.02) & (offset[:, 2].abs() <= 0.01)
    speed = env.qvel[:, env._v["item"] :][:, :3]
    still = speed.norm(dim=1) <= 0.02
    progress = _progress(f, goal, flat <= 0.04, 0.03)
    reach = 2 * (1 - torch.tanh(5 * (f["tcp"] - f["item"]).norm(dim=1)))
    reward = torch.where(f["grasped"], 3 + progress, reach)
    reward = torch.where(on & f["touching"], 4 + progress + f["openness"], reward)
    rest = (_calm(speed) + _calm(env.qvel[:, :5])) / 2
    reward = torch.where(on & ~f["touching"], 7 + rest, reward)
    success = on & still & ~f["touching"] & f["static"]
    reward = torch.where(success, 9.0, reward)
    return (reward - 6.0 * f["table"] - 1.0 * ~f["lifted"]) / 9.0, success


REWARDS = {"reach": _reach, "lift": _lift, "place": _place, "stack": _stack}


def reward(env) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward (N,), divided by the task's best, and success (N,) of the present state."""
    return REWARDS[env.task.verb](env, facts(env))
