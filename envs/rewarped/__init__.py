"""Parallel differentiable simulations in Warp, and the tasks of SAPO (Xing et al., arXiv 2412.12089).

`make(env_id, num_envs, device, ...)` returns N environments of one task. They keep the differentiable
contract of envs/__init__.py: observations and rewards are ordinary torch tensors with gradients.

    mpm.py                       particles and grid: kernels, checkpointing, the bridge to torch
    kinematics.py                where colliders are and how they move, in torch
    mpm_tasks.py                 RollingFlat, FluidMove, HandFlip
    fem.py, rigid.py             tetrahedra with muscles; articulated rigid bodies
    substeps.py                  launches and graphs of all simulations; the bridge to torch for these two
    fem_tasks.py, rigid_tasks.py SoftJumper; AntRun, HandReorient
    base.py                      episodes, resets, NaN, saved states
    render.py                    images for people
"""

import torch


def tasks() -> dict[str, type]:
    """Name -> class of every task that is here."""
    from envs.rewarped import (
        fem_tasks,
        mpm_tasks,
        rigid_tasks,
    )  # Warp is loaded when a task is made

    found = (
        mpm_tasks.RollingFlat,
        mpm_tasks.FluidMove,
        mpm_tasks.HandFlip,
        fem_tasks.SoftJumper,
        rigid_tasks.AntRun,
        rigid_tasks.HandReorient,
    )
    return {task.__name__: task for task in found}


def make(env_id: str, num_envs: int, device: str | torch.device = "cpu", **options):
    """The task `env_id` with `num_envs` environments on `device`. Options, for all tasks:

    seed=0             of the episodes
    reward="default"   or "paper": the published reward, where the default mends it
    size="full"        as published, or "small": for two CPU cores
    window=32          most steps between two calls of `detach` (a bound only without `checkpoint`)
    checkpoint=True    keep one state a step and compute the rest again in the backward pass
    graph=None         replay captured graphs of a step, forward and backward; None: where that is faster
    dtype              torch.float32, or float64 for tests of gradients
    stagger=False      spread the clocks, so that environments do not reset in lockstep
    Raises ValueError for an unknown id or an impossible option, in one line.
    """
    known = tasks()
    if env_id not in known:
        raise ValueError(f"{env_id!r} is unknown: there are {', '.join(known)}")
    return known[env_id](env_id, num_envs, device, **options)
