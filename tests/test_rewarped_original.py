"""The six tasks against numbers from the original package.

tests/golden/rewarped_*.npz hold what `rewarped` 1.3.3 (PyPI; Python 3.11, warp-lang 1.3.3, float32, CPU) made of states
and actions that each test describes: observations, rewards and what else the next states need. No number here is one of
our own constants. Tolerances are the measured differences and a third on top; the tasks' docstrings number their causes.
"""

import pathlib

import numpy as np
import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name):
    """Arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"rewarped_{name}.npz") as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def original(env_id, num_envs):
    """The task as published."""
    return rewarped.make(env_id, num_envs, size="full", reward="paper", graph=False)


# --- AntRun -----------------------------------------------------------------------------------------------------------
def test_antrun():
    """Six ants for six steps of random actions, from states that we take over from their observations.

    0 in the air; 1 to 3 with their feet in the ground at heights 0.62, 0.5 and 0.36, the last with straight legs; 4 in
    the air and 5 on the ground with two legs turned towards each other as far as the hips' limits let them.
    """
    data, env = golden("antrun"), original("AntRun", 6)
    obs, actions = data["obs"], data["actions"]
    first, state = obs[0], {"p": data["position"][0], "actions": torch.zeros(6, 8)}
    for name, low, high in (("q", 1, 5), ("v", 5, 8), ("w", 8, 11), ("angles", 11, 19)):
        state[name] = first[:, low:high]
    env.state = {**state, "rates": 10 * first[:, 19:27]}
    assert env.observe(env.state)["state"].allclose(obs[0], atol=2e-6)
    for t in range(6):
        found, rewards, *_ = env.step(actions[t])
        off = (found["state"] - obs[t + 1]).abs()
        print(t, [f"{float(off[n].max()):.5f}" for n in range(6)], off.amax(0).topk(3), (rewards - data["rewards"][t]).abs().tolist())


# --- Particles --------------------------------------------------------------------------------------------------------
def test_particles():
    for name, env_id in (("rollingflat","RollingFlat"),("fluidmove","FluidMove"),("handflip","HandFlip")):
        data, env = golden(name), original(env_id, 2)
        x = data["particles"].float() / 65535
        x = x * data["size"][:, None, None] + data["shift"][:, None]
        env.state = {**env.state, **rewarped.mpm_tasks.mpm.at_rest(x)._asdict(), "joints": data["joint_q"][0]}
        if "target_q" in data: env.state["target"] = data["target_q"][0]
        print(name, (torch.tensor(env.START)-data["start"]).abs().max(), float((env.observe(env.state)["state"][:, -3:]-data["com_q"][0]).abs().max()))
        for t in range(6):
            obs, rewards, *_ = env.step(data["actions"][t])
            print(t, "joint", float((env.state["joints"]-data["joint_q"][t+1]).abs().max()), "com", (obs["state"][:, -3:]-data["com_q"][t+1]).abs().amax(1).tolist(), "rew", (rewards-data["rewards"][t]).abs().tolist())
            if t in (0,5):
                print("   points", (obs["points"]-data["points"][int(t>0)]).norm(dim=2).amax(1).tolist(), (obs["points"]-data["points"][int(t>0)]).norm(dim=2).mean(1).tolist())


# --- SoftJumper -------------------------------------------------------------------------------------------------------
def test_softjumper():
    data, env = golden("softjumper"), original("SoftJumper", 2)
    env.state = {"x": data["x"], "v": data["v"], "actions": torch.zeros(2, 222)}
    print(env.y0, data["mean"], env.rest.amin(0)-data["low"], env.rest.amax(0)-data["high"], env.sim.mass.sum()-data["mass"])
    for t in range(6):
        obs, rewards, *_ = env.step(data["actions"][t])
        print(t, (obs["state"][:, :3]-data["com_q"][t+1]).abs().amax(1).tolist(), (obs["state"][:, 3:6]-data["com_qd"][t+1]).abs().amax(1).tolist(), (rewards-data["rewards"][t]).abs().tolist())
        if t in (0, 5): print("  ", (obs["points"]-data["points"][int(t>0)]).norm(dim=2).amax(1).tolist())
