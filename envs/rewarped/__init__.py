"""Parallel differentiable simulations in Warp, and the tasks of SAPO (Xing et al. 2025, arXiv 2412.12089) on them.

`make(env_id, num_envs, device, seed=..., size="full")` returns N worlds of one task, whose observations and rewards are
ordinary differentiable torch tensors:

Attributes   env_id, num_envs (N), device, obs_dims (name -> shape), action_dim (A), max_episode_steps, control_hz (in
             the simulation's own time), nan_resets
obs          dict: "state" (N, S); where there are particles or vertices also "points" (N, P, 3)
reset(seed)  -> obs. With a seed, always the same episodes
step(a)      actions (N, A) in [-1, 1] -> obs, rewards (N,), terminations (N,), truncations (N,), info
             obs and rewards are differentiable with respect to every action since the last `detach()`. A world whose
             episode ends begins the next one in the same step, which cuts its own gradient and nobody else's:
             info["final_obs"] is the observation before, with its gradient; the observation returned has none.
             info["episode"]: return and length (N,), valid where an episode ended. info["nan"] (N,): worlds that blew
             up; they restart alone, truncated, with reward 0 and no gradient, and are counted in `nan_resets`
detach()     begins a window: the gradient ends here, and the memory of older steps is free again
state_dict, load_state_dict (exact), render(world, size) -> uint8 (size, size, 3), close

    mpm.py                       particles and grid: kernels, checkpointing, the bridge to torch
    kinematics.py                where colliders are and how they move, in torch
    mpm_tasks.py                 RollingFlat, FluidMove, HandFlip
    fem.py, rigid.py             tetrahedra with muscles; articulated rigid bodies
    substeps.py                  the bridge to torch for both
    fem_tasks.py, rigid_tasks.py SoftJumper; AntRun, HandReorient
    base.py                      episodes, resets, NaN, saved states
    render.py                    pictures for people
"""

import torch


def tasks() -> dict[str, type]:
    """Name -> class of every task that is here."""
    from envs.rewarped import fem_tasks, mpm_tasks, rigid_tasks  # Warp is loaded when a task is made

    found = (mpm_tasks.RollingFlat, mpm_tasks.FluidMove, mpm_tasks.HandFlip, fem_tasks.SoftJumper,
             rigid_tasks.AntRun, rigid_tasks.HandReorient)  # fmt: skip
    return {task.__name__: task for task in found}


def make(env_id: str, num_envs: int, device: str | torch.device = "cpu", **options):
    """The task `env_id` with `num_envs` worlds on `device`. Options, for all tasks:

    seed=0             of the episodes
    reward="default"   or "paper": the published reward, where the default mends it
    size="full"        as published, or "small": for two CPU cores
    window=32          most steps between two calls of `detach` (a bound only without `checkpoint`)
    checkpoint=True    keep one state a step and compute the rest again in the backward pass
    graph=None         replay captured graphs of a step, forward and backward; None: where that is faster
    dtype              torch.float32, or float64 for tests of gradients
    stagger=False      spread the clocks, so that worlds do not reset in lockstep
    Raises ValueError for an unknown id or an impossible option, in one line.
    """
    known = tasks()
    if env_id not in known:
        raise ValueError(f"{env_id!r} is unknown: there are {', '.join(known)}")
    return known[env_id](env_id, num_envs, device, **options)
