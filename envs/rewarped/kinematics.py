"""Forward kinematics of colliders in torch: joint positions and speeds -> where each collider is and how it moves.

A `Tree` is a list of joints, each with one degree of freedom, and of shapes fixed to their links. It is evaluated for
all environments and substeps at once, joints of one depth together, and torch differentiates it; Warp sees only its
result.
"""

from dataclasses import dataclass

import numpy as np
import torch

from envs.rewarped.mpm import Poses


@dataclass(frozen=True)
class Joint:
    """One degree of freedom: its link turns about, or slides along, `axis` at `offset` in the parent's frame."""

    name: str
    parent: int  # index of the parent's joint; -1: the world
    kind: str  # "hinge" | "slide"
    offset: tuple[float, float, float]
    axis: tuple[float, float, float]
    low: float
    high: float


@dataclass(frozen=True)
class Shape:
    """A collider fixed to the link of joint number `link`; `turn` is a rotation matrix, rows first."""

    link: int
    kind: int  # mpm.CAPSULE | mpm.BOX
    size: tuple[float, ...]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[tuple[float, float, float], ...] = (
        (1.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0),
    )


def skew(axis: torch.Tensor) -> torch.Tensor:
    """Matrices (..., 3, 3) of the cross products with vectors (..., 3)."""
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))


def turn_to(direction) -> tuple[tuple[float, float, float], ...]:
    """Rotation matrix that takes the y axis (a capsule's) to `direction`, by the shortest way."""
    d = np.asarray(direction, float) / np.linalg.norm(direction)
    cross, cos = np.cross((0.0, 1.0, 0.0), d), d[1]
    if cos < -1 + 1e-9:
        return ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    K = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return tuple(tuple(row) for row in np.eye(3) + K + K @ K / (1 + cos))


class Tree:
    """Kinematic tree of J joints and B shapes; parents come before their children."""

    def __init__(self, joints: list[Joint], shapes: list[Shape], device="cpu", dtype=torch.float32):
        def new(rows):
            return torch.tensor(rows, device=device, dtype=dtype)

        def whole(rows):
            return torch.tensor(rows, device=device, dtype=torch.int64)

        self.joints, self.shapes = joints, shapes
        self.low, self.high = (
            new([joint.low for joint in joints]),
            new([joint.high for joint in joints]),
        )
        depth = []
        for i, joint in enumerate(joints):
            if joint.parent >= i:
                raise ValueError(f"joint {joint.name}: its parent must come before it")
            depth.append(0 if joint.parent < 0 else depth[joint.parent] + 1)
        self.levels = []  # of joints at the same depth: indices, their parents' rows in the growing list, constants
        row = {-1: 0}
        for level in range(max(depth) + 1):
            index = [i for i in range(len(joints)) if depth[i] == level]
            hinge = new([float(joints[i].kind == "hinge") for i in index])
            axis = new([joints[i].axis for i in index])
            self.levels.append(
                (
                    whole(index),
                    whole([row[joints[i].parent] for i in index]),
                    new([joints[i].offset for i in index]),
                    hinge,
                    axis,
                    skew(axis),
                )
            )
            row |= {i: len(row) + k for k, i in enumerate(index)}
        self.links = whole([row[shape.link] for shape in shapes])
        self.offset, self.turn = (
            new([shape.offset for shape in shapes]),
            new([shape.turn for shape in shapes]),
        )

    def __call__(self, q: torch.Tensor, qd: torch.Tensor) -> Poses:
        """Poses (..., B, ...) of the shapes at joint positions and speeds (..., J)."""
        lead, eye = q.shape[:-1], torch.eye(3, dtype=q.dtype, device=q.device)
        R, p = eye.expand(*lead, 1, 3, 3), q.new_zeros(*lead, 1, 3)
        v, w = torch.zeros_like(p), torch.zeros_like(p)
        for index, parents, offset, hinge, axis, K in self.levels:
            Rp, pp, vp, wp = (
                R[..., parents, :, :],
                p[..., parents, :],
                v[..., parents, :],
                w[..., parents, :],
            )
            qi, qdi = q[..., index, None], qd[..., index, None]
            slide, turn = (1 - hinge)[:, None] * axis, hinge[:, None] * axis
            away = (Rp @ (offset + slide * qi)[..., None])[..., 0]
            angle = (qi * hinge[:, None])[..., None]
            R = torch.cat((R, Rp @ (eye + angle.sin() * K + (1 - angle.cos()) * (K @ K))), -3)
            p = torch.cat((p, pp + away), -2)
            v = torch.cat(
                (v, vp + torch.cross(wp, away, dim=-1) + (Rp @ (slide * qdi)[..., None])[..., 0]),
                -2,
            )
            w = torch.cat((w, wp + (Rp @ (turn * qdi)[..., None])[..., 0]), -2)
        R, p, v, w = (
            R[..., self.links, :, :],
            p[..., self.links, :],
            v[..., self.links, :],
            w[..., self.links, :],
        )
        arm = (R @ self.offset[..., None])[..., 0]
        return Poses(p + arm, R @ self.turn, v + torch.cross(w, arm, dim=-1), w)
