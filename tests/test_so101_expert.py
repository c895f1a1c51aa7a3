"""The scripted controllers solve every SO-101 task: the test that tasks, success tests and grasp physics are right."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp")
from envs import so101  # noqa: E402
from envs.so101.expert import Arm, Expert, run  # noqa: E402


def make(env_id, num_envs, seed=1, **options):
    return so101.make(
        env_id, num_envs, "cpu", seed=seed, **{"images": False, "stagger": False, **options}
    )


@pytest.mark.parametrize("env_id", so101.TASKS)
def test_solved_with_randomisation(env_id):
    env = make(env_id, 100)
    solved = run(env)
    env.close()
    assert int(env.nan_resets) == 0
    assert int(solved.sum()) >= 90  # 380 of 400 on the hardest, StackCan


def test_inverse_kinematics_inverts_mujoco():
    """Joints drawn at random are found again from the place that MuJoCo gives them, with their own tilt and roll."""
    import mujoco

    env = make("SO101ReachCube-v1", 1)
    arm, data = Arm(env.mjm, env.device), mujoco.MjData(env.mjm)
    generator = torch.Generator().manual_seed(0)
    start = env.start_pose[:5].expand(20, 5)
    joints = start + 0.4 * (torch.rand(20, 5, generator=generator) - 0.5)
    joints[:, 3] -= 0.3  # well inside the wrist's limit
    tool = torch.tensor((0.01, 0.002, -0.09)).expand(20, 3)
    places = []
    for q in joints:
        data.qpos[:5] = q.numpy()
        mujoco.mj_kinematics(env.mjm, data)
        body = data.body("gripper")
        places.append(body.xpos + body.xmat.reshape(3, 3) @ tool[0].numpy())
    places = torch.tensor(np.stack(places), dtype=torch.float32)
    assert torch.allclose(arm.place_of(joints, tool), places, atol=1e-5)
    tilt = math.pi / 2 - joints[:, 1:4].sum(1)
    found, miss = arm.inverse(places, tool, tilt, joints[:, 4], start)
    assert miss.max() < 1e-4
    assert (found - joints).abs().max() < 2e-3


def test_actions_are_deterministic_and_in_range():
    runs = []
    for _ in range(2):
        env = make("SO101StackCube-v1", 4, seed=5)
        expert, actions = Expert(env), []
        for _ in range(20):
            actions.append(expert.act())
            env.step(actions[-1])
        runs.append(torch.stack(actions))
    assert torch.equal(*runs)
    assert runs[0].shape == (20, 4, 6) and runs[0].abs().max() <= 1.0


def test_new_episodes_of_single_worlds():
    """With staggered clocks, environments begin their episodes one by one and each first whole episode is solved."""
    env = make("SO101LiftCube-v1", 10, stagger=True)
    expert = Expert(env)
    solved = whole = 0
    for _ in range(2 * env.max_episode_steps):
        _, _, _, truncations, info = env.step(expert.act())
        complete = truncations & (info["episode"]["length"] == env.max_episode_steps)
        whole += int(complete.sum())
        solved += int((complete & info["episode"]["success_at_end"]).sum())
        expert.reset(truncations)
        assert (expert.phase[truncations] == 0).all()
    assert whole >= 10
    assert solved >= whole - 1


def test_both_engines_grasp_alike():
    """MuJoCo's C library and MuJoCo Warp: lifts are solved in both, and a standing grasp is felt alike."""
    envs = {engine: make("SO101LiftCube-v1", 4, engine=engine) for engine in ("mujoco", "warp")}
    assert all(run(env).all() for env in envs.values())
    for env in envs.values():
        env.reset(seed=1)
    c, warp = envs["mujoco"], envs["warp"]
    expert = Expert(c)
    for _ in range(c.max_episode_steps - 5):
        c.step(expert.act())
    warp.physics.set_state(torch.arange(4), c.qpos, c.qvel)
    for name in ("qpos", "target", "old_target"):
        getattr(warp, name).copy_(getattr(c, name))
    for env in envs.values():
        env.step(torch.zeros(4, 6))
    assert c.facts()["grasped"].all() and warp.facts()["grasped"].all()
    for name in ("fixed_item", "jaw_item"):
        ours, theirs = (env.contact[:, env._sensor[name] + 1 :][:, :3] for env in (c, warp))
        sizes = ours.norm(dim=1), theirs.norm(dim=1)
        assert (sizes[0] > 5.0).all()
        assert ((sizes[0] - sizes[1]).abs() < 0.2 * sizes[0]).all()
        # How much of a squeeze friction carries sideways is not determined, so directions may differ a little.
        assert ((ours * theirs).sum(1) > 0.8 * sizes[0] * sizes[1]).all()


def test_a_held_cube_stays_where_it_is():
    """20 N on 3 g: the fingers sink in by less than 2.5 mm (mean 1.5), and the cube does not creep out of the hand."""
    import mujoco

    env = make("SO101LiftCube-v1", 32)
    expert, in_hand = Expert(env), []
    for _ in range(env.max_episode_steps - 1):
        env.step(expert.act())
        origins, rotations = expert.arm.forward(env.qpos[:, :5])
        in_hand.append(
            torch.einsum("nji,nj->ni", rotations[:, 4], env.pose("item")[0] - origins[:, 4])
        )
    held = env.facts()["grasped"]
    assert held.sum() >= 30
    moved = (in_hand[-1] - in_hand[-11]).norm(dim=1)[held]  # over one second
    assert moved.mean() < 0.5e-3
    data, depths = mujoco.MjData(env.mjm), []
    for world in held.nonzero().squeeze(1).tolist():
        model = env.physics.models[world]
        data.qpos[:] = env.qpos[world].numpy()
        mujoco.mj_fwdPosition(model, data)
        item = model.geom("item").id
        depths.append(
            -min(contact.dist for contact in data.contact[: data.ncon] if item in contact.geom)
        )
    assert max(depths) < 2.5e-3 and sum(depths) / len(depths) < 1.5e-3
