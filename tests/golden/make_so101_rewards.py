"""Makes tests/golden/so101_rewards.npz with the rewards and success tests of Squint's authors.

    git clone https://github.com/aalmuzairee/squint && python tests/golden/make_so101_rewards.py squint

States are random and drawn from this project's environments; the authors' `evaluate` and `compute_dense_reward` see
them through stand-ins for their simulator, which need not be installed. Made at their commit a5c3083.
"""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from envs import so101  # noqa: E402

N = 96  # states a task
FORCES = ("fixed_item", "jaw_item", "hand_table", "hand_support")


class Anything:
    """A name of a library that is not here: a base class, a decorator, a constant."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, thing=None, *args, **kwargs):
        return thing

    def __iter__(self):
        return iter(())


class Finder:
    """Answers for every package that the authors import beside torch and NumPy."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mani_skill", "sapien", "dacite", "transforms3d", "gymnasium"):
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__all__ = []
        module.__getattr__ = lambda name: type(name, (Anything,), {})
        return module

    def exec_module(self, module):
        pass


def angle_between(a, b):
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    return torch.arccos(cosine.clamp(-1, 1))


def states(env) -> dict[str, torch.Tensor]:
    """Random states, half of them near success: generalised positions and speeds, targets and contact forces."""
    g = torch.Generator().manual_seed(7)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=g)  # noqa: E731
    env.qpos[:, :6] += uniform(-0.3, 0.3, N, 6)
    env.qpos[:, 5] = torch.where(uniform(0, 1, N) < 0.5, uniform(-0.17, 0.0, N), uniform(0, 2, N))
    env.target[:, :5] = env.start_pose[:5] + uniform(-0.15, 0.15, N, 5)
    still = uniform(0, 1, N, 1) < 0.6
    env.qvel[:] = uniform(-0.4, 0.4, N, env.mjm.nv) * torch.where(still, 0.02, 1.0)
    env._kinematics()
    near = uniform(0, 1, N) < 0.5
    noise = uniform(-0.015, 0.015, N, 3)
    at, up = env._q["item"], env.item_half[:, 2]
    goal = env.tcp.clone()
    if env.task.verb == "reach":
        goal[:, 2] -= up + 0.02
    if env.task.support:
        seat = env.qpos[:, env._q["support"] :]
        seat[:, 3], seat[:, 4:7] = (
            1.0,
            0.0,
        )  # unturned: theirs tests an upright box, ours a turned one
        goal = seat[:, :3].clone()
        inside = env.task.support == "bin"
        goal[:, 2] = up + (so101.BIN_THICKNESS if inside else 2 * env.support_half[:, 2])
        noise[:, 2] = 0.3 * noise[:, 2].abs()  # nothing lies within the floor
        noise[:, :2] *= 2.0
    env.qpos[:, at : at + 3] = torch.where(near[:, None], goal + noise, env.qpos[:, at : at + 3])
    squeeze = uniform(0.6, 2.0, N, 1) * torch.tensor([[1.0, 0.2, 0.0]])
    touch = uniform(0, 1, N)
    contact = dict.fromkeys(FORCES)
    contact["fixed_item"] = torch.where((touch < 0.4)[:, None], squeeze, 0.0)
    contact["jaw_item"] = torch.where((touch < 0.3)[:, None], -squeeze, 0.0)
    contact["hand_table"] = torch.where(uniform(0, 1, N, 1) < 0.2, torch.ones(N, 3), 0.0)
    contact["hand_support"] = torch.where(uniform(0, 1, N, 1) < 0.2, torch.ones(N, 3), 0.0)
    return contact


def theirs(modules, env, contact):
    """Their raw reward (N,) and success (N,) of the state of our environment."""
    verb = env.task.verb
    kind = getattr(modules[verb], verb.capitalize())
    pose = lambda name: SimpleNamespace(p=env.pose(name)[0])  # noqa: E731
    tcp = SimpleNamespace(p=env.tcp)
    limits = torch.stack((env.joint_low, env.joint_high), 1)[None]
    robot = SimpleNamespace(
        get_qvel=lambda: env.qvel[:, :6],
        get_qpos=lambda: env.qpos[:, :6],
        get_qlimits=lambda: limits,
    )
    agent = SimpleNamespace(
        robot=robot,
        tcp_pose=tcp,
        tcp_pos=env.tcp,
        controller=SimpleNamespace(_target_qpos=env.target),
    )
    # Frames in which our squeezing forces point along their opening directions.
    frame = torch.eye(4).repeat(N, 1, 1)
    frame[:, :3, 1] = torch.tensor([1.0, 0.0, 0.0])
    link = lambda name: SimpleNamespace(  # noqa: E731
        name=name, pose=SimpleNamespace(to_transformation_matrix=lambda: frame)
    )
    agent.finger1_link, agent.finger2_link = link("fixed"), link("jaw")
    item = SimpleNamespace(
        name="item", pose=pose("item"), linear_velocity=env.qvel[:, env._v["item"] :][:, :3]
    )
    table = SimpleNamespace(name="table")
    bodies = {"item": ("fixed_item", "jaw_item"), "table": ("hand_table",) * 2}
    bodies["support"] = ("hand_support",) * 2

    def forces(finger, thing):
        return contact[bodies[thing.name][finger.name == "jaw"]]

    agent.scene = SimpleNamespace(get_pairwise_contact_forces=forces)
    for name in ("is_touching", "is_grasping", "is_static"):
        setattr(agent, name, types.MethodType(getattr(modules["robot.so101"].SO101, name), agent))
    half = env.item_half[:, 2]
    scene = SimpleNamespace(
        agent=agent, item=item, itemA=item, item_half_sizes=half, itemA_half_sizes=half
    )
    scene.table_scene = SimpleNamespace(table=table)
    scene.rest_qpos = env.start_pose
    if verb == "reach":
        above = item.pose.p.clone()
        above[:, 2] += half + 0.02
        scene.goal_site = SimpleNamespace(pose=SimpleNamespace(p=above))
        scene.target_goal_thresh = 0.02
    if env.task.support:
        support = SimpleNamespace(name="support", pose=pose("support"))
        scene.bin = scene.itemB = support
        scene.itemB_half_sizes = env.support_half[:, 2]
        scene.bin_thickness = so101.BIN_THICKNESS
        x, y, wall = env.support_half.unbind(1)
        scene.bin_half_sizes_x, scene.bin_half_sizes_y = x, y
        scene.bin_dimensions = torch.stack((x, y, wall / 2), 1)
        scene.bin_radius = scene.bin_dimensions[:, :2].norm(dim=1)
    info = kind.evaluate(scene)
    return kind.compute_dense_reward(scene, None, None, info), info["success"]


def main(folder: str):
    sys.meta_path.insert(0, Finder())
    common = importlib.import_module("mani_skill.utils.common")
    common.compute_angle_between = angle_between
    sys.modules["mani_skill.utils"].common = common
    package = types.ModuleType("original")
    package.__path__ = [str(Path(folder) / "envs")]
    sys.modules["original"] = package
    names = ("robot.so101", "reach", "lift", "place", "stack")
    modules = {name: importlib.import_module(f"original.{name}") for name in names}
    kept = {}
    for env_id in so101.TASKS:
        env = so101.make(env_id, N, images=False, seed=3)
        contact = states(env)
        reward, success = theirs(modules, env, contact)
        kept |= {
            f"{env_id}/qpos": env.qpos,
            f"{env_id}/qvel": env.qvel,
            f"{env_id}/target": env.target,
            f"{env_id}/item_half": env.item_half,
            f"{env_id}/support_half": env.support_half,
            f"{env_id}/support_z": env.support_z,
            f"{env_id}/contact": torch.stack([contact[name] for name in FORCES], 1),
            f"{env_id}/reward": reward,
            f"{env_id}/success": success,
        }
        print(env_id, f"{int(success.sum())} of {N} succeed, reward {reward.mean():.2f}")
    np.savez_compressed(HERE / "so101_rewards.npz", **{k: v.numpy() for k, v in kept.items()})


if __name__ == "__main__":
    main(sys.argv[1])
