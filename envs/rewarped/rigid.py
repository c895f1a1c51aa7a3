"""Batched, differentiable articulated rigid bodies in Warp: stiff joints, penalty contact with the ground and boxes.

Every body keeps its own position, orientation and velocities; a hinge is a stiff spring and damper between two bodies.
(Joint coordinates would need no such springs, but a mass matrix, whose adjoint wants every factor of every substep.
Here each kernel touches one joint, one contact or one body, and its adjoint is exact.) One substep:

    joints     a thread a hinge: holds its two anchors and its two axes together; about the axis: motor, damping, limits
    contacts   a thread a sphere fixed to a body: ground at y = 0 by a spring, a damper and Coulomb friction
    touches    a thread a sphere and a box on another body: the same along the normal of the box's signed distance
    integrate  a thread a body: v <- v + dt (f / m + g), w by Euler's equations, then position and orientation

A quaternion is (x, y, z, w); positions, velocities and angular velocities are the world's. Gradients: see substeps.py.
A capsule is a row of spheres. Shapes: N environments, B bodies, J hinges, K contact spheres, M boxes, S substeps.
"""

import functools
import types
from dataclasses import dataclass

import numpy as np
import torch
import warp as wp

from envs.rewarped.substeps import Substeps


# ------------------------------------------------------------------------------------------------------- kernels -----
@functools.cache
def kernels(real) -> types.SimpleNamespace:
    """The kernels for the scalar type `real`, each precision in a module of its own."""
    name = f"rewarped_rigid_{real.__name__}"
    kernel, func = (
        functools.partial(wp.kernel, module=name),
        functools.partial(wp.func, module=name),
    )
    vec3, quat = wp.types.vector(3, real), wp.types.quaternion(real)
    vectors, quats, scalars2 = (wp.array(dtype=t, ndim=2) for t in (vec3, quat, real))
    points, scalars, ints = (wp.array(dtype=t, ndim=1) for t in (vec3, real, wp.int32))

    @func
    def hinge_angle(a: vec3, reference_a: vec3, reference_b: vec3):
        """Angle about a from one reference, at right angles to it, to the other."""
        return wp.atan2(
            wp.dot(wp.cross(reference_a, reference_b), a), wp.dot(reference_a, reference_b)
        )

    @kernel
    def joints(
        p: vectors,
        q: quats,
        v: vectors,
        w: vectors,
        motor: scalars2,
        parent: ints,
        child: ints,
        anchor_a: points,
        anchor_b: points,
        axis_a: points,
        axis_b: points,
        reference_a: points,
        reference_b: points,
        low: scalars,
        high: scalars,
        ke: real,
        kd: real,
        align: real,
        align_d: real,
        limit: real,
        limit_d: real,
        damping: real,
        f: vectors,
        t: vectors,
    ):
        n, j = wp.tid()
        a, b = parent[j], child[j]
        ra, rb = wp.quat_rotate(q[n, a], anchor_a[j]), wp.quat_rotate(q[n, b], anchor_b[j])
        apart = p[n, b] + rb - p[n, a] - ra
        moving = v[n, b] + wp.cross(w[n, b], rb) - v[n, a] - wp.cross(w[n, a], ra)
        force = -(apart * ke + moving * kd)
        za, zb = wp.quat_rotate(q[n, a], axis_a[j]), wp.quat_rotate(q[n, b], axis_b[j])
        turning = w[n, b] - w[n, a]
        rate = wp.dot(turning, za)
        angle = hinge_angle(
            za, wp.quat_rotate(q[n, a], reference_a[j]), wp.quat_rotate(q[n, b], reference_b[j])
        )
        inside = wp.clamp(angle, low[j], high[j])
        about = motor[n, j] - damping * rate + limit * (inside - angle)
        if angle != inside:
            about = about - limit_d * rate
        torque = wp.cross(zb, za) * align - (turning - za * rate) * align_d + za * about
        wp.atomic_add(f, n, b, force)
        wp.atomic_add(f, n, a, -force)
        wp.atomic_add(t, n, b, wp.cross(rb, force) + torque)
        wp.atomic_add(t, n, a, -(wp.cross(ra, force) + torque))

    @func
    def penalty(depth: real, normal: vec3, u: vec3, ke: real, kd: real, kf: real, friction: real):
        """Force at a contact of this depth, on the body whose velocity relative to the other one is u there."""
        un = wp.dot(u, normal)
        press = ke * depth - kd * wp.min(un, real(0.0))  # damped on the way in alone
        slide = u - normal * un
        speed = wp.sqrt(wp.dot(slide, slide) + real(1e-12))
        return normal * press - slide * wp.min(kf, friction * press / speed)

    @kernel
    def contacts(
        p: vectors,
        q: quats,
        v: vectors,
        w: vectors,
        body: ints,
        offset: points,
        radius: scalars,
        ke: real,
        kd: real,
        kf: real,
        friction: real,
        f: vectors,
        t: vectors,
    ):
        n, k = wp.tid()
        b, zero = body[k], real(0.0)
        arm = wp.quat_rotate(q[n, b], offset[k]) - vec3(
            zero, radius[k], zero
        )  # to the sphere's lowest point
        height = p[n, b][1] + arm[1]
        if height < zero:
            u = v[n, b] + wp.cross(w[n, b], arm)
            force = penalty(-height, vec3(zero, real(1.0), zero), u, ke, kd, kf, friction)
            wp.atomic_add(f, n, b, force)
            wp.atomic_add(t, n, b, wp.cross(arm, force))

    @func
    def box_distance(half: vec3, x: vec3):
        """Signed distance of x to a box with these half extents, in the box's frame."""
        far = vec3(wp.abs(x[0]), wp.abs(x[1]), wp.abs(x[2])) - half
        most, zero = wp.max(far[0], wp.max(far[1], far[2])), real(0.0)
        away = most
        if most > zero:
            away = wp.length(vec3(wp.max(far[0], zero), wp.max(far[1], zero), wp.max(far[2], zero)))
        return away

    @func
    def box_normal(half: vec3, x: vec3):
        """Its gradient: the unit normal, inside that of the nearest face."""
        far = vec3(wp.abs(x[0]), wp.abs(x[1]), wp.abs(x[2])) - half
        most, zero = wp.max(far[0], wp.max(far[1], far[2])), real(0.0)
        side = vec3(
            wp.where(far[0] == most, wp.sign(x[0]), zero),
            wp.where(far[1] == most, wp.sign(x[1]), zero),
            wp.where(far[2] == most, wp.sign(x[2]), zero),
        )
        if most > zero:
            side = vec3(
                wp.sign(x[0]) * wp.max(far[0], zero),
                wp.sign(x[1]) * wp.max(far[1], zero),
                wp.sign(x[2]) * wp.max(far[2], zero),
            )
        return wp.normalize(side)

    @kernel
    def touches(
        p: vectors,
        q: quats,
        v: vectors,
        w: vectors,
        body: ints,
        offset: points,
        radius: scalars,
        box_body: ints,
        box_half: points,
        ke: real,
        kd: real,
        kf: real,
        friction: real,
        f: vectors,
        t: vectors,
    ):
        n, k, m = wp.tid()
        a, b = body[k], box_body[m]
        centre = p[n, a] + wp.quat_rotate(q[n, a], offset[k])
        local = wp.quat_rotate_inv(q[n, b], centre - p[n, b])
        depth = radius[k] - box_distance(box_half[m], local)
        if depth > real(0.0) and a != b:
            normal = wp.quat_rotate(q[n, b], box_normal(box_half[m], local))
            at = centre - normal * radius[k]  # the sphere's deepest point
            ra, rb = at - p[n, a], at - p[n, b]
            u = v[n, a] + wp.cross(w[n, a], ra) - v[n, b] - wp.cross(w[n, b], rb)
            force = penalty(depth, normal, u, ke, kd, kf, friction)
            wp.atomic_add(f, n, a, force)
            wp.atomic_add(f, n, b, -force)
            wp.atomic_add(t, n, a, wp.cross(ra, force))
            wp.atomic_add(t, n, b, -wp.cross(rb, force))

    @kernel
    def integrate(
        p: vectors,
        q: quats,
        v: vectors,
        w: vectors,
        f: vectors,
        t: vectors,
        mass: scalars,
        inertia: points,
        free: scalars,
        dt: real,
        gravity: real,
        p_next: vectors,
        q_next: quats,
        v_next: vectors,
        w_next: vectors,
    ):
        """Inertia: principal moments, in the axes of the body. Free: 1, or 0 of a body that stays where it is."""
        n, b = wp.tid()
        qb, moments, zero = q[n, b], inertia[b], real(0.0)
        vb = (v[n, b] + (f[n, b] / mass[b] + vec3(zero, gravity, zero)) * dt) * free[b]
        local, push = wp.quat_rotate_inv(qb, w[n, b]), wp.quat_rotate_inv(qb, t[n, b])
        gyro = push - wp.cross(local, wp.cw_mul(moments, local))
        wb = (w[n, b] + wp.quat_rotate(qb, wp.cw_div(gyro, moments)) * dt) * free[b]
        spin = quat(wb[0] * dt / real(2.0), wb[1] * dt / real(2.0), wb[2] * dt / real(2.0), zero)
        v_next[n, b] = vb
        w_next[n, b] = wb
        p_next[n, b] = p[n, b] + vb * dt
        q_next[n, b] = wp.normalize(qb + spin * qb)

    return types.SimpleNamespace(
        vec3=vec3, quat=quat, joints=joints, contacts=contacts, touches=touches, integrate=integrate
    )


# ------------------------------------------------------------------------------------------------- the simulation ----
@dataclass(frozen=True)
class Body:
    """A rigid body whose frame is at its centre of mass, along its principal axes."""

    mass: float
    inertia: tuple[float, float, float]
    fixed: bool = False  # stays where it is put


@dataclass(frozen=True)
class Hinge:
    """Holds two bodies together at a point, free about an axis."""

    parent: int
    child: int
    anchor_a: tuple[float, float, float]  # in the parent's frame
    anchor_b: tuple[float, float, float]  # in the child's frame
    axis: tuple[float, float, float]  # a unit vector, in the parent's frame
    turn: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        1.0,
    )  # of the child's frame in the parent's at angle 0
    low: float = -3.0
    high: float = 3.0


@dataclass(frozen=True)
class Sphere:
    """Touches the ground, and boxes on other bodies."""

    body: int
    offset: tuple[float, float, float]
    radius: float


@dataclass(frozen=True)
class Box:
    """Touches spheres on other bodies; its middle and axes are its body's."""

    body: int
    half: tuple[float, float, float]


@dataclass(frozen=True)
class Springs:
    """Stiffness (ke, align, limit) and damping of joints, and of a sphere's contact; N, m, rad, s."""

    ke: float = 1e6
    kd: float = 1e3
    align: float = 8e3
    align_d: float = 4.0
    limit: float = 1e3
    limit_d: float = 10.0
    damping: float = 1.0
    contact_ke: float = 4e3
    contact_kd: float = 1e3
    contact_kf: float = 3e2
    friction: float = 0.75


def perpendicular(axis) -> np.ndarray:
    """A unit vector at right angles to `axis`."""
    other = np.eye(3)[np.argmin(np.abs(axis))]
    out = np.cross(axis, other)
    return out / np.linalg.norm(out)


class Rigid:
    """N environments of bodies, hinges, contact spheres and boxes.

    Hinges make a tree of the first body and others, parents before children; further bodies are free. With `ground`,
    spheres touch the plane y = 0.
    Raises ValueError in one line for a choice that cannot work.
    """

    def __init__(
        self,
        num_envs: int,
        bodies: list[Body],
        hinges: list[Hinge],
        spheres: list[Sphere],
        *,
        dt: float,
        substeps: int,
        boxes: tuple[Box, ...] = (),
        ground: bool = True,
        springs: Springs | None = None,
        gravity: float = -9.8,
        device="cpu",
        dtype=torch.float32,
        graph: bool = False,
    ):
        springs, reached = springs or Springs(), {0, *(h.child for h in hinges)}
        early = all(h.parent in {0, *(g.child for g in hinges[:j])} for j, h in enumerate(hinges))
        for wrong, message in (
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
            (
                min(num_envs, substeps, len(bodies)) < 1,
                "environments, substeps and bodies: at least 1",
            ),
            (
                not early
                or len(reached) <= len(hinges)
                or not all(0 <= b < len(bodies) for b in reached),
                "hinges: each body has one, after that of its parent; the first body has none",
            ),
            (
                dt <= 0 or any(min(b.mass, *b.inertia) <= 0 for b in bodies),
                "dt, masses and inertias must be above 0",
            ),
        ):
            if wrong:
                raise ValueError(message)
        self.bodies, self.hinges, self.spheres, self.substeps = bodies, hinges, spheres, substeps
        real = wp.float32 if dtype == torch.float32 else wp.float64
        k, where = kernels(real), str(torch.device(device))
        wp.load_module(k.joints.module, device=where)  # before any capture, which cannot compile
        N, B, J, K, M = num_envs, len(bodies), len(hinges), len(spheres), len(boxes)

        def array(rows, kind):
            return wp.array(
                list(rows) or [(0, 0, 0) if kind is k.vec3 else 0], dtype=kind, device=where
            )

        def in_child(h: Hinge, x):
            back = torch.tensor(
                (-h.turn[0], -h.turn[1], -h.turn[2], h.turn[3]), dtype=torch.float64
            )
            return tuple(rotate(back, torch.as_tensor(x, dtype=torch.float64)).tolist())

        axes, sides = (
            [h.axis for h in hinges],
            [tuple(perpendicular(h.axis).tolist()) for h in hinges],
        )
        new = functools.partial(torch.tensor, device=device, dtype=dtype)
        self.axes, self.sides = new(axes).view(-1, 3), new(sides).view(-1, 3)
        self.sides_child = new([in_child(h, x) for h, x in zip(hinges, sides, strict=True)]).view(
            -1, 3
        )
        index = functools.partial(torch.tensor, device=device, dtype=torch.int64)
        self.parents, self.children = (
            index([h.parent for h in hinges]),
            index([h.child for h in hinges]),
        )
        self.levels, depth, row = (
            [],
            {0: 0},
            {0: 0},
        )  # hinges whose child is equally far from the first body
        for h in hinges:
            depth[h.child] = depth[h.parent] + 1
        for level in range(1, max(depth.values()) + 1):
            own = [j for j, h in enumerate(hinges) if depth[h.child] == level]
            rows = [row[hinges[j].parent] for j in own]
            row |= {hinges[j].child: len(row) + i for i, j in enumerate(own)}
            kind = [
                new([getattr(hinges[j], name) for j in own])
                for name in ("axis", "anchor_a", "anchor_b", "turn")
            ]
            self.levels.append((index(own), index(rows), *kind))
        self.order = index([row[b] for b in sorted(row)])
        topology = [
            array((h.parent for h in hinges), wp.int32),
            array((h.child for h in hinges), wp.int32),
            array((h.anchor_a for h in hinges), k.vec3),
            array((h.anchor_b for h in hinges), k.vec3),
            array(axes, k.vec3),
            array((in_child(h, h.axis) for h in hinges), k.vec3),
            array(sides, k.vec3),
            array((in_child(h, x) for h, x in zip(hinges, sides, strict=True)), k.vec3),
            array((h.low for h in hinges), real),
            array((h.high for h in hinges), real),
        ]
        touch = [
            array((s.body for s in spheres), wp.int32),
            array((s.offset for s in spheres), k.vec3),
            array((s.radius for s in spheres), real),
        ]
        block = [array((b.body for b in boxes), wp.int32), array((b.half for b in boxes), k.vec3)]
        masses = [
            array((b.mass for b in bodies), real),
            array((b.inertia for b in bodies), k.vec3),
            array((float(not b.fixed) for b in bodies), real),
        ]
        s = springs
        hold = [s.ke, s.kd, s.align, s.align_d, s.limit, s.limit_d, s.damping]
        contact = [s.contact_ke, s.contact_kd, s.contact_kf, s.friction]

        def launches(state, inputs, scratch, following):
            found = [(k.joints, (N, J), [*state, *inputs, *topology, *hold], scratch)] if J else []
            found += (
                [(k.contacts, (N, K), [*state, *touch, *contact], scratch)] if K and ground else []
            )
            found += (
                [(k.touches, (N, K, M), [*state, *touch, *block, *contact], scratch)]
                if K and M
                else []
            )
            return [
                *found,
                (k.integrate, (N, B), [*state, *scratch, *masses, dt, gravity], following),
            ]

        vectors, quats = ((N, B), k.vec3), ((N, B), k.quat)
        self.steps = Substeps(
            [vectors, quats, vectors, vectors],
            [((N, max(J, 1)), real)],
            [vectors, vectors],
            launches,
            substeps=substeps,
            device=device,
            dtype=dtype,
            graph=graph,
        )

    def step(self, p, q, v, w, motor):
        """Positions, quaternions, velocities and angular velocities (N, B, ...) a step later; motor torques (N, J)."""
        return self.steps.step(p, q, v, w, motor)

    def place(self, p, q, v, w, angles, rates) -> dict[str, torch.Tensor]:
        """State "p", "q", "v", "w" (N, B, ...) in which all hinges hold.

        p, q, v, w (N, ...) of the first body; angles and rates (N, J) of the hinges. Bodies after those of
        the hinges' tree are left out.
        """
        p, q, v, w = (t[:, None] for t in (p, q, v, w))
        for own, rows, axis, a, b, turn in self.levels:
            qa, wa = q[:, rows], w[:, rows]
            qb = multiply(multiply(qa, about(axis, angles[:, own])), turn.expand_as(qa))
            wb = wa + rotate(qa, axis) * rates[:, own, None]
            a, b = rotate(qa, a), rotate(qb, b)
            speed = v[:, rows] + torch.cross(wa, a, dim=-1) - torch.cross(wb, b, dim=-1)
            p, q = torch.cat((p, p[:, rows] + a - b), 1), torch.cat((q, qb), 1)
            v, w = torch.cat((v, speed), 1), torch.cat((w, wb), 1)
        return {name: t[:, self.order] for name, t in zip("pqvw", (p, q, v, w), strict=True)}

    def angles(self, q: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles and rates (N, J) of the hinges."""
        qa, qb = q[:, self.parents], q[:, self.children]
        axis, side_a, side_b = (
            rotate(qa, self.axes),
            rotate(qa, self.sides),
            rotate(qb, self.sides_child),
        )
        sine = (torch.cross(side_a, side_b, dim=-1) * axis).sum(-1)
        return torch.atan2(sine, (side_a * side_b).sum(-1)), (
            (w[:, self.children] - w[:, self.parents]) * axis
        ).sum(-1)


# ------------------------------------------------------------------------------------------------- quaternions -------
def rotate(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Vectors x (..., 3), turned by quaternions q (..., 4)."""
    u, s = q[..., :3], q[..., 3:]
    cross = torch.cross(u, x.expand(*q.shape[:-1], 3), dim=-1)
    return x + 2 * (s * cross + torch.cross(u, cross, dim=-1))


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The turn b, then the turn a."""
    u, s, v, t = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    return torch.cat(
        (s * v + t * u + torch.cross(u, v, dim=-1), s * t - (u * v).sum(-1, keepdim=True)), -1
    )


def about(axis: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Quaternions of turns by angle (...) about unit vectors axis (..., 3)."""
    half = angle[..., None] / 2
    return torch.cat((axis * half.sin(), half.cos()), -1)
