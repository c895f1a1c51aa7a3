"""Checkpoints of untrained policies for an SO-101, for tests of what is done with checkpoints."""

import math
from pathlib import Path

import squint_sac
import torch

SPEC = {
    "env_id": "SO101ReachCube-v1", "robot": "so101",
    "joint_names": ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"],
    "joint_low": [-1.919862, -1.745329, -1.69, -1.658063, -2.743847, -0.174533],
    "joint_high": [1.919862, 1.745329, 1.69, 1.658063, 2.841206, 2.094395],
    "start_pose": [0.0, 0.0, 0.0, math.pi / 2, -math.pi / 2, math.pi / 3],
    "action_scale": [0.1, 0.1, 0.1, 0.1, 0.1, 0.2],
    "action_semantics": "target += action * action_scale, clamped to the joint limits", "control_hz": 10.0,
    "state_layout": ["joint_position"] * 6 + ["joint_target"] * 6,
    "cameras": {"wrist": {"mount": "gripper", "pos": [-0.0049, 0.0498, -0.0591],
                          "quat_wxyz": [0.9528636909007898, -0.3032732004993513, 0.008315515453105616,
                                        0.0026466251252380865], "fovy_degrees": 71.0}},
    "background": "black", "render_size": 16, "max_episode_steps": 50,
}  # fmt: skip


def checkpoint(seed: int = 0, spec: dict | None = None, **changes) -> dict:
    """What squint_sac saves, its weights drawn at random; `changes` of its arguments."""
    spec = {**SPEC, **(spec or {})}
    options = dict(device="cpu", num_envs=4, actor_hidden=32, critic_hidden=16, num_atoms=11)
    options |= dict(amp=False, compile=False, cudagraphs=False, render_size=spec["render_size"])
    options |= changes
    args = squint_sac.Args(**options)
    shapes = dict(channels=3 * len(spec["cameras"]), state=len(spec["state_layout"]), privileged=0)
    shapes |= dict(action=len(spec["action_scale"]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent = squint_sac.Agent(args, shapes)
        for parameter in agent.actor.parameters():  # zero biases would hide mistakes with them
            parameter.data += 0.05 * torch.randn_like(parameter)
        agent.averaged.actor.load_state_dict(agent.actor.state_dict())
    return squint_sac.weights(agent, args, spec, {"global_step": 0})


def write_checkpoint(path: Path, seed: int = 0, spec: dict | None = None, **changes) -> Path:
    """`checkpoint` in a file."""
    squint_sac.save(path, checkpoint(seed, spec, **changes))
    return path
