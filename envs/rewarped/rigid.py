"""Batched, differentiable articulated rigid bodies in Warp: joint coordinates, penalty contact.

Body 0 is free; hinge j carries body 1 + j and hangs from an earlier body or from the world. The
state of a step is p, q, v, w of the free body's centre of mass and angles and rates of the hinges.
Generalised velocities are the twist of the free body, then the rates: D = 6 + J. A twist (w, u) has
as u the velocity of what is, at that moment, at the origin o, the place of the free body when the
step begins: then a hinge's axis s at x moves what hangs on it by (s, x cross s). One substep:

    root       a thread an environment: pose and twist of the free body, and of the world
    links      a thread a hinge, level by level: pose and twist of its body, the acceleration that
               velocities alone make, its torque: motor, damping, springs at the limits
    contacts   a thread a sphere fixed to a body: ground at y = 0 by a spring, a damper on the way in
               and Coulomb friction
    touches    a thread a sphere and a box on another body: the same along the normal of the box's
               signed distance
    wrenches   a thread a body: forces on it less those that its own acceleration needs, to all
               coordinates that move it
    solve      a thread a row of the inverse mass matrix: accelerations
    advance    a thread a coordinate: velocities, then positions

The mass matrix is that of the beginning of a step, as in the published simulation, which computes
it once a step: root, links and `weigh`, a thread a body and a coordinate, then a batched inverse in
torch. For what moves while it
holds that is wrong: a body in flight feels m t v x g of its weight as a torque after the time t.
`updates` computes it more often.

A quaternion is (x, y, z, w); velocities and angular velocities are the world's. Gradients: see
substeps.py. A capsule is a row of spheres. Shapes: N environments, B bodies, J hinges, D
coordinates, K contact spheres, M boxes, S substeps.
"""

import functools
import types
from dataclasses import dataclass

import torch
import warp as wp

from envs.rewarped.substeps import Substeps

DEPTH = 4  # most hinges between a body and the root of its tree


# ------------------------------------------------------------------------------------------------------- kernels -----
@functools.cache
def kernels(real) -> types.SimpleNamespace:
    """The kernels for the scalar type `real`, each precision in a module of its own."""
    name = f"rewarped_rigid_{real.__name__}"
    kernel, func = (
        functools.partial(wp.kernel, module=name),
        functools.partial(wp.func, module=name),
    )
    vec3, quat, mat33 = (
        wp.types.vector(3, real),
        wp.types.quaternion(real),
        wp.types.matrix((3, 3), real),
    )
    vectors, frames, scalars2 = (wp.array(dtype=t, ndim=2) for t in (vec3, mat33, real))
    points, turns, matrices, scalars, ints = (
        wp.array(dtype=t, ndim=1) for t in (vec3, quat, mat33, real, wp.int32)
    )
    ints2, scalars3 = wp.array(dtype=wp.int32, ndim=2), wp.array(dtype=real, ndim=3)

    @kernel
    def root(
        r: points,
        q: turns,
        w: points,
        u: points,
        origin: points,
        X: vectors,
        R: frames,
        W: vectors,
        U: vectors,
    ):
        n = wp.tid()
        world = X.shape[1] - 1
        X[n, 0] = r[n]
        R[n, 0] = wp.quat_to_matrix(q[n])
        W[n, 0] = w[n]
        U[n, 0] = u[n]
        X[n, world] = -origin[n]
        R[n, world] = wp.identity(n=3, dtype=real)

    @kernel
    def links(
        angle: scalars2,
        rate: scalars2,
        motor: scalars2,
        level: ints,
        parent: ints,
        anchor: points,
        turn: turns,
        axis: points,
        low: scalars,
        high: scalars,
        limit: real,
        limit_d: real,
        damping: real,
        X: vectors,
        R: frames,
        W: vectors,
        U: vectors,
        BW: vectors,
        BU: vectors,
        way: vectors,
        moment: vectors,
        force: scalars2,
    ):
        n, i = wp.tid()
        j = level[i]
        a, b, speed = parent[j], j + 1, rate[n, j]
        x = X[n, a] + R[n, a] @ anchor[j]
        rot = R[n, a] @ wp.quat_to_matrix(turn[j] * wp.quat_from_axis_angle(axis[j], angle[n, j]))
        s = rot @ axis[j]
        m = wp.cross(x, s)
        w, u = W[n, a] + s * speed, U[n, a] + m * speed
        X[n, b] = x
        R[n, b] = rot
        W[n, b] = w
        U[n, b] = u
        BW[n, b] = BW[n, a] + wp.cross(w, s) * speed
        BU[n, b] = BU[n, a] + (wp.cross(w, m) + wp.cross(u, s)) * speed
        way[n, j] = s
        moment[n, j] = m
        inside = wp.clamp(angle[n, j], low[j], high[j])
        torque = motor[n, j] - damping * speed + limit * (inside - angle[n, j])
        if angle[n, j] != inside:
            torque = torque - limit_d * speed
        wp.atomic_add(force, n, 6 + j, torque)

    @func
    def penalty(depth: real, normal: vec3, u: vec3, ke: real, kd: real, kf: real, friction: real):
        """Force at a contact of this depth, on the body whose velocity relative to the other one is
        u there."""
        un = wp.dot(u, normal)
        press = ke * depth - kd * wp.min(un, real(0.0))  # damped on the way in alone
        slide = u - normal * un
        speed = wp.sqrt(wp.dot(slide, slide) + real(1e-12))
        return normal * press - slide * wp.min(kf, friction * press / speed)

    @kernel
    def contacts(
        origin: points,
        body: ints,
        offset: points,
        radius: scalars,
        ke: real,
        kd: real,
        kf: real,
        friction: real,
        X: vectors,
        R: frames,
        W: vectors,
        U: vectors,
        f: vectors,
        t: vectors,
    ):
        n, k = wp.tid()
        b, zero = body[k], real(0.0)
        x = X[n, b] + R[n, b] @ offset[k] - vec3(zero, radius[k], zero)  # its lowest
        height = x[1] + origin[n][1]
        if height < zero:
            u = U[n, b] + wp.cross(W[n, b], x)
            force = penalty(-height, vec3(zero, real(1.0), zero), u, ke, kd, kf, friction)
            wp.atomic_add(f, n, b, force)
            wp.atomic_add(t, n, b, wp.cross(x, force))

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
        body: ints,
        offset: points,
        radius: scalars,
        box_body: ints,
        box_place: points,
        box_half: points,
        ke: real,
        kd: real,
        kf: real,
        friction: real,
        X: vectors,
        R: frames,
        W: vectors,
        U: vectors,
        f: vectors,
        t: vectors,
    ):
        n, k, m = wp.tid()
        a, b = body[k], box_body[m]
        centre = X[n, a] + R[n, a] @ offset[k]
        local = wp.transpose(R[n, b]) @ (centre - X[n, b]) - box_place[m]
        depth = radius[k] - box_distance(box_half[m], local)
        if depth > real(0.0) and a != b:
            normal = R[n, b] @ box_normal(box_half[m], local)
            x = centre - normal * radius[k]  # the sphere's deepest point
            u = U[n, a] + wp.cross(W[n, a], x) - U[n, b] - wp.cross(W[n, b], x)
            force = penalty(depth, normal, u, ke, kd, kf, friction)
            torque = wp.cross(x, force)
            wp.atomic_add(f, n, a, force)
            wp.atomic_add(t, n, a, torque)
            wp.atomic_add(f, n, b, -force)
            wp.atomic_add(t, n, b, -torque)

    @kernel
    def wrenches(
        mass: scalars,
        com: points,
        inertia: matrices,
        rooted: ints,
        carriers: ints2,
        gravity: vec3,
        X: vectors,
        R: frames,
        W: vectors,
        U: vectors,
        BW: vectors,
        BU: vectors,
        way: vectors,
        moment: vectors,
        f: vectors,
        t: vectors,
        force: scalars2,
    ):
        n, b = wp.tid()
        rot, w, bw = R[n, b], W[n, b], BW[n, b]
        c = X[n, b] + rot @ com[b]
        back = wp.transpose(rot)
        spin = rot @ (inertia[b] @ (back @ w))
        turning = rot @ (inertia[b] @ (back @ bw)) + wp.cross(w, spin)
        speeding = BU[n, b] + wp.cross(bw, c) + wp.cross(w, U[n, b] + wp.cross(w, c)) - gravity
        push = f[n, b] - speeding * mass[b]
        twist = t[n, b] - turning - wp.cross(c, speeding * mass[b])
        if rooted[b] == 1:
            for i in range(3):
                wp.atomic_add(force, n, i, twist[i])
                wp.atomic_add(force, n, 3 + i, push[i])
        for k in range(DEPTH):
            j = carriers[b, k]
            if j >= 0:
                share = wp.dot(way[n, j], twist) + wp.dot(moment[n, j], push)
                wp.atomic_add(force, n, 6 + j, share)

    @kernel
    def weigh(
        carriers: ints2,
        rooted: ints,
        weighed: ints,
        mass: scalars,
        com: points,
        inertia: matrices,
        X: vectors,
        R: frames,
        way: vectors,
        moment: vectors,
        matrix: scalars3,
    ):
        """One column of the mass matrix, as far as one body makes it: the momentum that the body
        has at a unit of this coordinate, to all coordinates that move it."""
        n, b, slot = wp.tid()
        one, zero = real(1.0), real(0.0)
        column = int(-1)  # noqa: UP018  (to Warp a literal is a constant)
        w = vec3()
        u = vec3()
        if slot < 6:
            if rooted[b] == 1:
                column = slot
            w = vec3(
                wp.where(slot == 0, one, zero),
                wp.where(slot == 1, one, zero),
                wp.where(slot == 2, one, zero),
            )
            u = vec3(
                wp.where(slot == 3, one, zero),
                wp.where(slot == 4, one, zero),
                wp.where(slot == 5, one, zero),
            )
        else:
            own = carriers[b, slot - 6]
            if own >= 0:
                column = 6 + own
                w = way[n, own]
                u = moment[n, own]
        if column >= 0:
            a = weighed[b]
            rot = R[n, a]
            c = X[n, a] + rot @ com[a]
            push = (u + wp.cross(w, c)) * mass[a]
            twist = rot @ (inertia[a] @ (wp.transpose(rot) @ w)) + wp.cross(c, push)
            if rooted[b] == 1:
                for i in range(3):
                    wp.atomic_add(matrix, n, i, column, twist[i])
                    wp.atomic_add(matrix, n, 3 + i, column, push[i])
            for k in range(DEPTH):
                j = carriers[b, k]
                if j >= 0:
                    share = wp.dot(way[n, j], twist) + wp.dot(moment[n, j], push)
                    wp.atomic_add(matrix, n, 6 + j, column, share)

    @functools.partial(wp.kernel, module=name, enable_backward=False)
    def solve(inverse: scalars3, force: scalars2, change: scalars2):
        n, i = wp.tid()
        total = real(0.0)
        for k in range(force.shape[1]):
            total += inverse[n, i, k] * force[n, k]
        change[n, i] = total

    @functools.partial(wp.kernel, module=name, enable_backward=False)
    def adj_solve(
        inverse: scalars3,
        change: scalars2,
        adj_change: scalars2,
        adj_force: scalars2,
        adj_matrix: scalars3,
    ):
        """The adjoint of `solve`, by hand, in terms of the matrix: with change = M^-1 force, it is
        l = M^-1 adj_change for the force and -l change^T for M."""
        n, i = wp.tid()
        total = real(0.0)
        for k in range(change.shape[1]):
            total += inverse[n, k, i] * adj_change[n, k]
        adj_force[n, i] = total
        for k in range(change.shape[1]):
            adj_matrix[n, i, k] = adj_matrix[n, i, k] - total * change[n, k]

    @kernel
    def advance(
        r: points,
        q: turns,
        w: points,
        u: points,
        angle: scalars2,
        rate: scalars2,
        change: scalars2,
        dt: real,
        r_next: points,
        q_next: turns,
        w_next: points,
        u_next: points,
        angle_next: scalars2,
        rate_next: scalars2,
    ):
        n, i = wp.tid()
        if i == 0:
            wn = w[n] + vec3(change[n, 0], change[n, 1], change[n, 2]) * dt
            un = u[n] + vec3(change[n, 3], change[n, 4], change[n, 5]) * dt
            half = dt / real(2.0)
            w_next[n] = wn
            u_next[n] = un
            r_next[n] = r[n] + (un + wp.cross(wn, r[n])) * dt
            spin = quat(wn[0] * half, wn[1] * half, wn[2] * half, real(0.0))
            q_next[n] = wp.normalize(q[n] + spin * q[n])
        else:
            speed = rate[n, i - 1] + change[n, 5 + i] * dt
            rate_next[n, i - 1] = speed
            angle_next[n, i - 1] = angle[n, i - 1] + speed * dt

    found = {k: v for k, v in locals().items() if isinstance(v, wp.Kernel)}
    return types.SimpleNamespace(vec3=vec3, quat=quat, mat33=mat33, **found)


# ------------------------------------------------------------------------------------------------- the simulation ----
@dataclass(frozen=True)
class Body:
    """A rigid body; its frame is at its centre of mass (the free body) or at its hinge."""

    mass: float
    inertia: tuple  # about the centre of mass: three principal moments, or three rows
    com: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Hinge:
    """Lets the body of the same place in the list, plus one, turn about an axis."""

    parent: int  # -1: the world
    anchor: tuple[float, float, float]  # in the parent's frame
    axis: tuple[float, float, float]  # a unit vector, in the child's frame
    turn: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        1.0,
    )  # of the child's frame at angle 0
    low: float = -1e3
    high: float = 1e3
    armature: float = 0.0  # inertia of the motor


@dataclass(frozen=True)
class Sphere:
    """Touches the ground, and boxes on other bodies."""

    body: int
    offset: tuple[float, float, float]
    radius: float


@dataclass(frozen=True)
class Box:
    """Touches spheres on other bodies; its axes are its body's."""

    body: int  # -1: the world
    half: tuple[float, float, float]
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Springs:
    """Stiffness and damping at a hinge's limits, damping everywhere, and a contact's constants; N,
    m, rad, s."""

    limit: float = 1e3
    limit_d: float = 10.0
    damping: float = 0.0
    contact_ke: float = 4e3
    contact_kd: float = 1e3
    contact_kf: float = 3e2
    friction: float = 0.75


class Rigid:
    """N environments of a free body, hinges with the bodies that they carry, contact spheres and
    boxes.

    With `ground`, spheres touch the plane y = 0. updates: how often a step computes the mass
    matrix. Raises ValueError in one line for a choice that cannot work.
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
        gravity: tuple[float, float, float] = (0.0, -9.81, 0.0),
        updates: int = 1,
        device="cpu",
        dtype=torch.float32,
        graph: bool = False,
        checkpoint: bool = True,
        window: int = 32,
    ):
        carriers = [[]]  # of each body: the hinges between it and the root of its tree
        for j, hinge in enumerate(hinges):
            early = -1 <= hinge.parent <= j
            above = carriers[hinge.parent] if early and hinge.parent >= 0 else []
            carriers.append([*above, j])
            for wrong, message in (
                (not early, f"hinge {j}: its parent must come before its body"),
                (len(carriers[-1]) > DEPTH, f"hinge {j}: more than {DEPTH} in a row"),
            ):
                if wrong:
                    raise ValueError(message)
        inertias = torch.stack([self.matrix(body.inertia) for body in bodies])
        for wrong, message in (
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
            (min(num_envs, substeps, updates) < 1, "environments, substeps, updates: at least 1"),
            (len(bodies) != 1 + len(hinges), "bodies: a free one, then one for each hinge"),
            (substeps % updates != 0, f"substeps {substeps}: no multiple of updates {updates}"),
            (
                dt <= 0
                or min(body.mass for body in bodies) <= 0
                or float(torch.linalg.eigvalsh(inertias).min()) <= 0,
                "dt, masses and inertias must be above 0",
            ),
        ):
            if wrong:
                raise ValueError(message)
        self.bodies, self.hinges, self.spheres = bodies, hinges, spheres
        self.substeps, self.updates = substeps, updates
        real = wp.float32 if dtype == torch.float32 else wp.float64
        k, where = kernels(real), str(torch.device(device))
        wp.load_module(k.root.module, device=where)  # before any capture, which cannot compile
        N, B, J, K, M = num_envs, len(bodies), len(hinges), len(spheres), len(boxes)
        D = 6 + J

        new = functools.partial(torch.tensor, device=device, dtype=dtype)
        self.anchors = new([h.anchor for h in hinges]).view(-1, 3)
        self.axes = new([h.axis for h in hinges]).view(-1, 3)
        self.turns = new([h.turn for h in hinges]).view(-1, 4)
        self.armature = torch.diag(new([0.0] * 6 + [h.armature for h in hinges]))
        self.empty = torch.zeros(N, D, D, device=device, dtype=dtype)
        # Whether the free body moves them.
        rooted = [b == 0 or hinges[carriers[b][0]].parent == 0 for b in range(B)]

        def array(rows, kind):
            empty = (0,) * kind._length_ if hasattr(kind, "_length_") else 0
            return wp.array(list(rows) or [empty], dtype=kind, device=where)

        # Hinges equally far from their roots; rows of their parents where frames are listed level
        # by level.
        index = functools.partial(torch.tensor, device=device, dtype=torch.int64)
        levels, self.levels, row = [], [], {-1: 0, 0: 1}
        for level in range(1, 1 + max(len(c) for c in carriers)):
            own = [c[-1] for c in carriers[1:] if len(c) == level]
            self.levels.append((index(own), index([row[hinges[j].parent] for j in own])))
            row |= {1 + j: len(row) + i for i, j in enumerate(own)}
            levels.append(array(own, wp.int32))
        self.order = index([row[b] for b in range(B)])
        world = B  # a body that stands still, after all others
        tree = [
            array((h.parent if h.parent >= 0 else world for h in hinges), wp.int32),
            array((h.anchor for h in hinges), k.vec3),
            array((h.turn for h in hinges), k.quat),
            array((h.axis for h in hinges), k.vec3),
            array((h.low for h in hinges), real),
            array((h.high for h in hinges), real),
        ]
        touch = [
            array((s.body for s in spheres), wp.int32),
            array((s.offset for s in spheres), k.vec3),
            array((s.radius for s in spheres), real),
        ]
        block = [
            array((b.body if b.body >= 0 else world for b in boxes), wp.int32),
            array((b.place for b in boxes), k.vec3),
            array((b.half for b in boxes), k.vec3),
        ]
        heavy = [
            array((b.mass for b in bodies), real),
            array((b.com for b in bodies), k.vec3),
            wp.array(inertias.numpy(), dtype=k.mat33, device=where),
        ]
        roots = array((int(r) for r in rooted), wp.int32)
        padded = [(c + [-1] * DEPTH)[:DEPTH] for c in carriers]
        above = wp.array(padded, dtype=wp.int32, device=where)
        self.weighed = array(range(B), wp.int32)  # whose inertia each body has in the mass matrix
        s = springs or Springs()
        hold = [s.limit, s.limit_d, s.damping]
        contact = [s.contact_ke, s.contact_kd, s.contact_kf, s.friction]

        def placing(state, motor, origin, scratch):
            """Launches of root and links."""
            *free, angle, rate = state
            X, R, W, U, BW, BU, way, moment, force = scratch
            found = [(k.root, (N,), [*free, origin], [X, R, W, U])]
            for level in levels:
                own = [angle, rate, motor, level, *tree, *hold]
                found.append((k.links, (N, len(level)), own, scratch))
            return found

        def weighing(state, inputs, scratch, following, adjoint):
            origin, X, R, way, moment = inputs[-1], scratch[0], scratch[1], scratch[6], scratch[7]
            weight = [above, roots, self.weighed, *heavy, X, R, way, moment]
            last = (k.weigh, (N, B, 6 + DEPTH), weight, following)
            return [*placing(inputs[:6], inputs[6], origin, scratch), last]

        def launches(state, inputs, scratch, following, adjoint):
            motor, matrix, inverse, origin = inputs
            *placed, f, t, change = scratch
            X, R, W, U, BW, BU, way, moment, force = placed
            places, bias = [X, R, W, U], [BW, BU, way, moment]
            found = placing(state, motor, origin, placed)
            if K and ground:
                found.append((k.contacts, (N, K), [origin, *touch, *contact], [*places, f, t]))
            if K and M:
                found.append((k.touches, (N, K, M), [*touch, *block, *contact], [*places, f, t]))
            weight = [*heavy, roots, above, k.vec3(*gravity)]
            found.append((k.wrenches, (N, B), weight, [*places, *bias, f, t, force]))
            back = [inverse, change, adjoint(change)], [adjoint(force), adjoint(matrix)]
            by_hand = (k.adj_solve, (N, D), *back)
            found.append((k.solve, (N, D), [inverse, force], [change], by_hand))
            return [*found, (k.advance, (N, 1 + J), [*state, change, dt], following)]

        vector, hinge, each = ((N,), k.vec3), ((N, max(J, 1)), real), ((N, B + 1), k.vec3)
        square = ((N, D, D), real)
        state = [vector, ((N,), k.quat), vector, vector, hinge, hinge]
        placed = [each, ((N, B + 1), k.mat33), each, each, each, each]
        placed += [((N, max(J, 1)), k.vec3)] * 2 + [((N, D), real)]
        options = dict(device=device, dtype=dtype, graph=graph, checkpoint=checkpoint)
        options |= dict(window=window * updates)
        self.weighing = Substeps(
            [square], [*state, hinge, vector], placed, weighing, substeps=1, **options
        )
        self.steps = Substeps(
            state,
            [hinge, square, square, vector],
            [*placed, each, each, ((N, D), real)],
            launches,
            substeps=substeps // updates,
            **options,
        )

    @staticmethod
    def matrix(inertia) -> torch.Tensor:
        """Inertia (3, 3), float64, from principal moments or rows."""
        inertia = torch.as_tensor(inertia, dtype=torch.float64)
        return torch.diag(inertia) if inertia.dim() == 1 else inertia

    def step(self, p, q, v, w, angles, rates, motor):
        """State a step later: p, q, v, w (N, ...) of the free body, angles and rates (N, J); motor
        torques (N, J)."""
        for _ in range(self.updates):
            origin = p.detach()  # any will do: what comes out does not depend on it
            r = p - origin
            state = (r, q, w, v - torch.cross(w, r, dim=1), angles, rates)
            (matrix,) = self.weighing.step(self.empty, *state, motor, origin)
            inverse = torch.linalg.inv_ex(matrix.detach() + self.armature).inverse
            r, q, w, u, angles, rates = self.steps.step(*state, motor, matrix, inverse, origin)
            p, v = origin + r, u + torch.cross(w, r, dim=1)
        return p, q, v, w, angles, rates

    def detach(self) -> None:
        """Begins a window."""
        self.weighing.detach()
        self.steps.detach()

    def frames(self, p, q, angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (N, B, 3) and quaternions (N, B, 4) of all bodies' frames."""
        still = torch.zeros_like(q) + q.new_tensor((0.0, 0.0, 0.0, 1.0))
        places, turns = torch.stack((torch.zeros_like(p), p), 1), torch.stack((still, q), 1)
        bends = about(self.axes, angles[:, : len(self.axes)])
        bent = multiply(self.turns.expand_as(bends), bends)
        for own, rows in self.levels:  # hinges equally far from their roots, at once
            x, turn = places[:, rows], turns[:, rows]
            x = x + rotate(turn, self.anchors[own].expand_as(x))
            places = torch.cat((places, x), 1)
            turns = torch.cat((turns, multiply(turn, bent[:, own])), 1)
        return places[:, self.order], turns[:, self.order]


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
