"""Batched, differentiable MLS-MPM in Warp: elastic solids, plasticine and fluid, pushed about by kinematic colliders.

One substep takes every environment's particles through four kernels (and `mark`, which lists the touched nodes). A
particle carries position x, velocity v, the affine part C of its velocity field (APIC) and its deformation gradient F:

    stress_*  F <- (I + dt C) F, return to the yield surface, Kirchhoff stress tau(F);   A = C - 4 dt / (rho dx^2) tau
    p2g       particle to grid, quadratic B-splines w:   m_i = sum_p w,   (mv)_i = sum_p w (v + A (x_i - x_p))
    grid      v_i = (mv)_i / m_i + dt g, then colliders in reach, then the walls; only of nodes that particles touch
    g2p       grid to particle:   v = sum_i w v_i,   C = 4 / dx^2 sum_i w v_i (x_i - x_p)^T,   x <- x + dt v

Every particle has mass 1. Volume and mass of a particle cancel: colliders are kinematic (they push, and are not pushed
back), so that only stress over density matters. Sources: MLS-MPM, Hu et al. 2018; APIC, Jiang et al. 2015; kinematic
colliders, PlasticineLab, Huang et al. 2021.

Gradients. Warp derives an adjoint of each kernel; `_Workspace` launches them by hand, last substep first. The
grids of all substeps would fill the memory long before the particles do. With `checkpoint` only the state at the start
of a step is kept: the backward pass runs the step again to have the particles of each substep, and from these rebuilds
the one grid that all substeps share just before its adjoint is needed. Without it every substep of the window keeps its
own. The docs (docs/envs/rewarped.md) explain the traps that the comments below only name.

`kernels(wp.float32)` and `kernels(wp.float64)` are built from the same source; the tests differentiate the latter.
Shapes: N environments, P particles, S substeps, B colliders, G grid nodes an axis. y is up; the domain is [0, 1]^3.
"""

import functools
import types
from typing import NamedTuple

import torch
import warp as wp

from envs.rewarped.substeps import Launcher, Spaces, all_finite, need_values, own_gradient

MATERIALS = ("elastic", "plasticine", "fluid")
CAPSULE, BOX = (
    0,
    1,
)  # kinds of colliders; size is (half length along local y, radius, -) and (half extents)
WALL = 3  # layers of nodes at each side of the domain that belong to its walls


# ------------------------------------------------------------------------------------------------------- kernels -----
@functools.cache
def kernels(real) -> types.SimpleNamespace:
    """The kernels for the scalar type `real`, each precision in a module of its own, so that only one is compiled.

    Loops over the 27 nodes around a particle are unrolled: a dynamic loop that changes a local variable has a silently
    wrong adjoint. Loops that only pick an index, such as the one for the next collider, may be dynamic.
    """
    name = f"rewarped_mpm_{real.__name__}"
    kernel, func = (
        functools.partial(wp.kernel, module=name),
        functools.partial(wp.func, module=name),
    )
    plain = functools.partial(kernel, enable_backward=False)  # with no adjoint, or one by hand
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    vectors, matrices = wp.array(dtype=vec3, ndim=2), wp.array(dtype=mat33, ndim=2)
    grid_scalars, grid_vectors = wp.array(dtype=real, ndim=4), wp.array(dtype=vec3, ndim=4)
    ints, grid_ints = wp.array(dtype=wp.int32, ndim=1), wp.array(dtype=wp.int32, ndim=4)
    sizes = wp.array(dtype=vec3, ndim=1)

    @func
    def eye():
        return wp.identity(n=3, dtype=real)

    # ---- constitutive models -----------------------------------------------------------------------------------------
    @kernel
    def stress_elastic(
        F: matrices,
        C: matrices,
        dt: real,
        mu: real,
        lam: real,
        limit: real,
        scale: real,
        F_next: matrices,
        A: matrices,
    ):
        """Neo-Hookean: tau = mu (F F^T - I) + lam log(J) I."""
        n, p = wp.tid()
        Fp = (eye() + C[n, p] * dt) @ F[n, p]
        pressure = lam * wp.log(wp.max(wp.determinant(Fp), real(0.05)))
        tau = (Fp @ wp.transpose(Fp) - eye()) * mu + eye() * pressure
        F_next[n, p] = Fp
        A[n, p] = C[n, p] - tau * scale

    @kernel
    def stress_fluid(
        F: matrices,
        C: matrices,
        dt: real,
        mu: real,
        lam: real,
        limit: real,
        scale: real,
        F_next: matrices,
        A: matrices,
    ):
        """Weakly compressible: tau = lam J (J - 1) I. A fluid forgets its shape, so F = diag(J, 1, 1)."""
        n, p = wp.tid()
        J = F[n, p][0, 0] * wp.determinant(eye() + C[n, p] * dt)
        one, zero = real(1.0), real(0.0)
        F_next[n, p] = mat33(J, zero, zero, zero, one, zero, zero, zero, one)
        A[n, p] = C[n, p] - eye() * (lam * J * (J - one) * scale)

    @func
    def log_strain(sigma: vec3):
        return vec3(wp.log(sigma[0]), wp.log(sigma[1]), wp.log(sigma[2]))

    @func
    def shrink(strain: vec3, limit: real):
        """Mean of the log strains, their deviator's direction, and the factor that brings its length to the limit."""
        mean = (strain[0] + strain[1] + strain[2]) / real(3.0)
        deviator = strain - vec3(mean, mean, mean)
        length = wp.length(deviator)
        factor = real(1.0)
        direction = vec3(real(0.0), real(0.0), real(0.0))  # stays 0 inside the yield surface
        if length > limit:
            factor = limit / length
            direction = deviator / length
        return mean, factor, direction

    @func
    def sinh_ratio(x: real, s: real):
        """sinh(s x / 2) / sinh(x / 2), also at x = 0."""
        if wp.abs(x) < real(1e-3):
            return s * (real(1.0) + (s * s - real(1.0)) * x * x / real(24.0))
        return wp.sinh(s * x / real(2.0)) / wp.sinh(x / real(2.0))

    @func
    def x_over_sinh(x: real):
        """x / sinh(x), also at x = 0."""
        if wp.abs(x) < real(1e-3):
            return real(1.0) - x * x / real(6.0)
        return x / wp.sinh(x)

    @func
    def adj_hencky(
        U: mat33,
        sigma: vec3,
        V: mat33,
        mu: real,
        lam: real,
        limit: real,
        adj_plastic: mat33,
        adj_tau: mat33,
    ):
        """The adjoint of return and stress by hand, because that of svd3 divides by differences of singular values and
        is silently wrong where two are equal: at F = I, where every episode begins.

        They are isotropic functions of F: with dF = U P V^T, the diagonal of P changes the singular values and the
        rest turns U and V. What multiplies the turns are divided differences, (g_j - g_i) / (sigma_j - sigma_i) of the
        new singular values g, and 2 mu s (e_j - e_i) / (sigma_j^2 - sigma_i^2); written with x = e_j - e_i both are
        smooth functions of x that have a value at x = 0.
        """
        strain = log_strain(sigma)
        mean, s, direction = shrink(strain, limit)
        center = vec3(mean, mean, mean)
        new = center + (strain - center) * s
        W = wp.transpose(U) @ adj_plastic @ V
        T = wp.transpose(U) @ adj_tau @ U
        trace = lam * wp.trace(T)
        adj_new = vec3(
            wp.exp(new[0]) * W[0, 0] + mu * real(2.0) * T[0, 0] + trace,
            wp.exp(new[1]) * W[1, 1] + mu * real(2.0) * T[1, 1] + trace,
            wp.exp(new[2]) * W[2, 2] + mu * real(2.0) * T[2, 2] + trace,
        )
        share = (real(1.0) - s) * (adj_new[0] + adj_new[1] + adj_new[2]) / real(3.0)
        adj_strain = (
            adj_new * s + vec3(share, share, share) - direction * (s * wp.dot(direction, adj_new))
        )
        P = wp.diag(
            vec3(adj_strain[0] / sigma[0], adj_strain[1] / sigma[1], adj_strain[2] / sigma[2])
        )
        root = vec3(wp.sqrt(sigma[0]), wp.sqrt(sigma[1]), wp.sqrt(sigma[2]))
        grown = vec3(wp.exp(new[0]), wp.exp(new[1]), wp.exp(new[2]))
        for i in range(3):
            for j in range(3):
                if i < j:
                    x = strain[j] - strain[i]
                    middle = root[i] * root[j]
                    a = wp.sqrt(grown[i] * grown[j]) / middle * sinh_ratio(x, s)
                    b = (grown[i] + grown[j]) / (sigma[i] + sigma[j])
                    c = mu * s * x_over_sinh(x) / (middle * middle) * (T[i, j] + T[j, i])
                    even, odd = (a + b) / real(2.0), (a - b) / real(2.0)
                    P[i, j] = even * W[i, j] + odd * W[j, i] + c * sigma[j]
                    P[j, i] = even * W[j, i] + odd * W[i, j] + c * sigma[i]
        return U @ P @ wp.transpose(V)

    @plain
    def stress_plasticine(
        F: matrices,
        C: matrices,
        dt: real,
        mu: real,
        lam: real,
        limit: real,
        scale: real,
        F_next: matrices,
        A: matrices,
        left: matrices,
        right: matrices,
        stretch: vectors,
    ):
        """Log strains e = log sigma of F = U diag(sigma) V^T, kept for the adjoint; yield at |dev e| = limit.

        Outside, dev e shrinks to the limit (von Mises, volume kept). tau = U diag(2 mu e + lam tr e) U^T.
        """
        n, p = wp.tid()
        plastic = (eye() + C[n, p] * dt) @ F[n, p]
        U, sigma, V = wp.svd3(plastic)
        least = real(0.05)  # away from zero
        sigma = vec3(wp.max(sigma[0], least), wp.max(sigma[1], least), wp.max(sigma[2], least))
        left[n, p] = U
        right[n, p] = V
        stretch[n, p] = sigma
        strain = log_strain(sigma)
        mean, factor, direction = shrink(strain, limit)
        center = vec3(mean, mean, mean)
        strain = center + (strain - center) * factor
        tau = U @ wp.diag(strain * (mu * real(2.0)) + center * (lam * real(3.0))) @ wp.transpose(U)
        if factor < real(1.0):
            grown = vec3(wp.exp(strain[0]), wp.exp(strain[1]), wp.exp(strain[2]))
            plastic = U @ wp.diag(grown) @ wp.transpose(V)
        F_next[n, p] = plastic
        A[n, p] = C[n, p] - tau * scale

    @plain
    def adj_stress_plasticine(
        F: matrices,
        C: matrices,
        dt: real,
        mu: real,
        lam: real,
        limit: real,
        scale: real,
        left: matrices,
        right: matrices,
        stretch: vectors,
        adj_F_next: matrices,
        adj_A: matrices,
        adj_F: matrices,
        adj_C: matrices,
    ):
        n, p = wp.tid()
        U, V, sigma, adj_Ap = left[n, p], right[n, p], stretch[n, p], adj_A[n, p]
        adj = adj_hencky(U, sigma, V, mu, lam, limit, adj_F_next[n, p], adj_Ap * (-scale))
        adj_F[n, p] = adj_F[n, p] + wp.transpose(eye() + C[n, p] * dt) @ adj
        adj_C[n, p] = adj_C[n, p] + adj_Ap + adj @ wp.transpose(F[n, p]) * dt

    # ---- transfers ---------------------------------------------------------------------------------------------------
    @func
    def corner(x: real, inv_dx: real, G: int):
        """First of the three nodes around x on an axis, kept inside the grid whatever x is (NaN included)."""
        return wp.clamp(int(x * inv_dx - real(0.5)), 0, G - 3)

    @func
    def spline(f: real):
        """Quadratic B-spline weights of three nodes, f: distance from the first in cells, 0.5 to 1.5."""
        return vec3(
            real(0.5) * (real(1.5) - f) * (real(1.5) - f),
            real(0.75) - (f - real(1.0)) * (f - real(1.0)),
            real(0.5) * (f - real(0.5)) * (f - real(0.5)),
        )

    @func
    def slope(f: real):
        """Derivatives of `spline`."""
        return vec3(f - real(1.5), real(2.0) - f * real(2.0), f - real(0.5))

    plain = functools.partial(
        wp.kernel, module=name, enable_backward=False
    )  # with no adjoint, or one by hand

    @plain
    def clear(nodes: ints, count: ints, m: grid_scalars, mv: grid_vectors, gv: grid_vectors):
        """Zeros where the grid has been used; most of it is empty."""
        t = wp.tid()
        if t < count[0]:
            G, node = m.shape[1], nodes[t]
            i, j, k, n = node // (G * G) % G, node // G % G, node % G, node // (G * G * G)
            m[n, i, j, k] = real(0.0)
            mv[n, i, j, k] = vec3()
            gv[n, i, j, k] = vec3()

    @plain
    def unsee(nodes: ints, count: ints, seen: grid_ints):
        """`seen` as it was before `mark`."""
        t = wp.tid()
        if t < count[0]:
            G, node = seen.shape[1], nodes[t]
            seen[node // (G * G * G), node // (G * G) % G, node // G % G, node % G] = 0

    @plain
    def mark(x: vectors, inv_dx: real, seen: grid_ints, nodes: ints, count: ints):
        """Lists the nodes that particles touch, each once; most of the grid is empty."""
        n, p = wp.tid()
        xp, G = x[n, p], seen.shape[1]
        bx, by, bz = corner(xp[0], inv_dx, G), corner(xp[1], inv_dx, G), corner(xp[2], inv_dx, G)
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    if wp.atomic_max(seen, n, bx + i, by + j, bz + k, 1) == 0:
                        nodes[wp.atomic_add(count, 0, 1)] = (
                            ((n * G + bx + i) * G + by + j) * G + bz + k
                        )

    @plain
    def p2g(
        x: vectors,
        v: vectors,
        A: matrices,
        dx: real,
        inv_dx: real,
        grid_m: grid_scalars,
        grid_mv: grid_vectors,
    ):
        n, p = wp.tid()
        xp, vp, Ap, G = x[n, p], v[n, p], A[n, p], grid_m.shape[1]
        bx, by, bz = corner(xp[0], inv_dx, G), corner(xp[1], inv_dx, G), corner(xp[2], inv_dx, G)
        wx = spline(xp[0] * inv_dx - real(bx))
        wy = spline(xp[1] * inv_dx - real(by))
        wz = spline(xp[2] * inv_dx - real(bz))
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    ix, iy, iz = bx + i, by + j, bz + k
                    w = wx[i] * wy[j] * wz[k]
                    offset = vec3(real(ix), real(iy), real(iz)) * dx - xp
                    wp.atomic_add(grid_m, n, ix, iy, iz, w)
                    wp.atomic_add(grid_mv, n, ix, iy, iz, (vp + Ap @ offset) * w)

    @plain
    def adj_p2g(
        x: vectors,
        v: vectors,
        A: matrices,
        dx: real,
        inv_dx: real,
        adj_m: grid_scalars,
        adj_mv: grid_vectors,
        adj_x: vectors,
        adj_v: vectors,
        adj_A: matrices,
    ):
        """With o = x_i - x, of the weights m + mv . (v + A o); adj_A alone is not added to."""
        n, p = wp.tid()
        xp, vp, Ap, G = x[n, p], v[n, p], A[n, p], adj_m.shape[1]
        bx, by, bz = corner(xp[0], inv_dx, G), corner(xp[1], inv_dx, G), corner(xp[2], inv_dx, G)
        fx, fy, fz = xp[0] * inv_dx - real(bx), xp[1] * inv_dx - real(by), xp[2] * inv_dx - real(bz)
        wx, wy, wz = spline(fx), spline(fy), spline(fz)
        sx, sy, sz = slope(fx), slope(fy), slope(fz)
        to_v, to_A, to_f = vec3(), mat33(), vec3()
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    ix, iy, iz = bx + i, by + j, bz + k
                    offset = vec3(real(ix), real(iy), real(iz)) * dx - xp
                    momentum = adj_mv[n, ix, iy, iz]
                    share = adj_m[n, ix, iy, iz] + wp.dot(momentum, vp + Ap @ offset)
                    weighed = momentum * (wx[i] * wy[j] * wz[k])
                    to_v += weighed
                    to_A += wp.outer(weighed, offset)
                    to_f += (
                        vec3(sx[i] * wy[j] * wz[k], wx[i] * sy[j] * wz[k], wx[i] * wy[j] * sz[k])
                        * share
                    )
        adj_x[n, p] = adj_x[n, p] + to_f * inv_dx - wp.transpose(Ap) @ to_v
        adj_v[n, p] = adj_v[n, p] + to_v
        adj_A[n, p] = to_A

    @plain
    def g2p(
        x: vectors,
        grid_v: grid_vectors,
        dx: real,
        inv_dx: real,
        dt: real,
        x_next: vectors,
        v_next: vectors,
        C_next: matrices,
    ):
        n, p = wp.tid()
        xp, G = x[n, p], grid_v.shape[1]
        bx, by, bz = corner(xp[0], inv_dx, G), corner(xp[1], inv_dx, G), corner(xp[2], inv_dx, G)
        wx = spline(xp[0] * inv_dx - real(bx))
        wy = spline(xp[1] * inv_dx - real(by))
        wz = spline(xp[2] * inv_dx - real(bz))
        vp = vec3()
        Bp = mat33()
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    ix, iy, iz = bx + i, by + j, bz + k
                    vi = grid_v[n, ix, iy, iz] * (wx[i] * wy[j] * wz[k])
                    vp += vi
                    Bp += wp.outer(vi, vec3(real(ix), real(iy), real(iz)) * dx - xp)
        v_next[n, p] = vp
        C_next[n, p] = Bp * (real(4.0) * inv_dx * inv_dx)
        least = real(0.5) * dx  # half a cell inside the domain
        most = real(1.0) - least
        moved = xp + vp * dt
        x_next[n, p] = vec3(
            wp.clamp(moved[0], least, most),
            wp.clamp(moved[1], least, most),
            wp.clamp(moved[2], least, most),
        )

    @plain
    def adj_g2p(
        x: vectors,
        grid_v: grid_vectors,
        dx: real,
        inv_dx: real,
        dt: real,
        x_next: vectors,
        v_next: vectors,
        adj_x_next: vectors,
        adj_v_next: vectors,
        adj_C_next: matrices,
        adj_x: vectors,
        adj_grid_v: grid_vectors,
    ):
        """With o = x_i - x, a node's velocity goes into v and B by its weight: B is linear in o."""
        n, p = wp.tid()
        xp, moved, G = x[n, p], x_next[n, p], grid_v.shape[1]
        adj_moved, least = adj_x_next[n, p], real(0.5) * dx
        for k in range(3):  # one that the domain's border holds passes nothing on
            if moved[k] <= least or moved[k] >= real(1.0) - least:
                adj_moved[k] = real(0.0)
        adj_v = adj_v_next[n, p] + adj_moved * dt
        adj_B = adj_C_next[n, p] * (real(4.0) * inv_dx * inv_dx)
        bx, by, bz = corner(xp[0], inv_dx, G), corner(xp[1], inv_dx, G), corner(xp[2], inv_dx, G)
        fx, fy, fz = xp[0] * inv_dx - real(bx), xp[1] * inv_dx - real(by), xp[2] * inv_dx - real(bz)
        wx, wy, wz = spline(fx), spline(fy), spline(fz)
        sx, sy, sz = slope(fx), slope(fy), slope(fz)
        to_f = vec3()
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    ix, iy, iz = bx + i, by + j, bz + k
                    offset = vec3(real(ix), real(iy), real(iz)) * dx - xp
                    adj_vi = adj_v + adj_B @ offset
                    share = wp.dot(grid_v[n, ix, iy, iz], adj_vi)
                    wp.atomic_add(adj_grid_v, n, ix, iy, iz, adj_vi * (wx[i] * wy[j] * wz[k]))
                    to_f += (
                        vec3(sx[i] * wy[j] * wz[k], wx[i] * sy[j] * wz[k], wx[i] * wy[j] * sz[k])
                        * share
                    )
        to_x = adj_moved + to_f * inv_dx - wp.transpose(adj_B) @ v_next[n, p]
        adj_x[n, p] = adj_x[n, p] + to_x

    # ---- colliders and walls -----------------------------------------------------------------------------------------
    @func
    def capsule(size: vec3, x: vec3):
        """Vector from the axis of a capsule to x."""
        return x - vec3(real(0.0), wp.clamp(x[1], -size[0], size[0]), real(0.0))

    @func
    def distance(kind: int, size: vec3, x: vec3):
        """Signed distance of x to the surface of a collider, in its own frame."""
        away = real(0.0)
        if kind == 0:
            away = wp.length(capsule(size, x)) - size[1]
        else:
            q = vec3(wp.abs(x[0]), wp.abs(x[1]), wp.abs(x[2])) - size
            most = wp.max(q[0], wp.max(q[1], q[2]))
            if most < real(0.0):
                away = most
            else:
                away = wp.length(
                    vec3(wp.max(q[0], real(0.0)), wp.max(q[1], real(0.0)), wp.max(q[2], real(0.0)))
                )
        return away

    @func
    def outward(kind: int, size: vec3, x: vec3):
        """The gradient of `distance`: unit normal at x."""
        normal = vec3()
        if kind == 0:
            normal = wp.normalize(capsule(size, x))
        else:
            q = vec3(wp.abs(x[0]), wp.abs(x[1]), wp.abs(x[2])) - size
            most = wp.max(q[0], wp.max(q[1], q[2]))
            zero = real(0.0)
            if most < zero:  # inside: the nearest face's
                normal = vec3(
                    wp.where(q[0] == most, wp.sign(x[0]), zero),
                    wp.where(q[1] == most, wp.sign(x[1]), zero),
                    wp.where(q[2] == most, wp.sign(x[2]), zero),
                )
            else:
                normal = wp.normalize(
                    vec3(
                        wp.sign(x[0]) * wp.max(q[0], zero),
                        wp.sign(x[1]) * wp.max(q[1], zero),
                        wp.sign(x[2]) * wp.max(q[2], zero),
                    )
                )
        return normal

    @func
    def rub(u: vec3, normal: vec3, friction: real):
        """Velocity u of an impact, relative to the surface: no part into it, the rest slowed by Coulomb friction."""
        un = wp.dot(u, normal)
        ut = u - normal * un
        speed = wp.sqrt(wp.dot(ut, ut) + real(1e-12))
        return ut * wp.max(real(1.0) + friction * un / speed, real(0.0))

    @func
    def following(
        first: int,
        x: vec3,
        n: int,
        colliders: int,
        kinds: ints,
        size: sizes,
        pos: vectors,
        rot: matrices,
    ):
        """The next collider of environment n, from `first` on, that reaches x: influence above 0.1. Or `colliders`."""
        found = int(colliders)  # noqa: UP018  (to Warp a literal is a constant)
        for b in range(first, colliders):
            if found == colliders:
                away = distance(kinds[b], size[b], wp.transpose(rot[n, b]) @ (x - pos[n, b]))
                if real(666.0) * away < real(2.302585093):
                    found = b
        return found

    @wp.func_grad(following)
    def adj_following(
        first: int,
        x: vec3,
        n: int,
        colliders: int,
        kinds: ints,
        size: sizes,
        pos: vectors,
        rot: matrices,
        adj_ret: int,
    ):
        """An index has no gradient."""

    @func
    def push(
        v: vec3,
        x: vec3,
        kind: int,
        size: vec3,
        pos: vec3,
        rot: mat33,
        vel: vec3,
        omega: vec3,
        friction: real,
    ):
        """Velocity at x after a collider has had its say: fully inside it, fading within 3.5 mm outside."""
        local = wp.transpose(rot) @ (x - pos)
        influence = wp.min(wp.exp(real(-666.0) * distance(kind, size, local)), real(1.0))
        normal = rot @ outward(kind, size, local)
        v_body = vel + wp.cross(omega, x - pos)
        u = v - v_body
        if wp.dot(u, normal) < real(0.0):
            u = u * (real(1.0) - influence) + rub(u, normal, friction) * influence
        return v_body + u

    @func
    def walls(v: vec3, i: int, j: int, k: int, G: int, friction: real):
        """Walls of the domain: sides and top let slide; the floor (y) has friction, 99 and more: nothing slides."""
        zero = real(0.0)
        vx, vy, vz = v[0], v[1], v[2]
        if (i < 3 and vx < zero) or (i > G - 3 and vx > zero):
            vx = zero
        if (k < 3 and vz < zero) or (k > G - 3 and vz > zero):
            vz = zero
        if j > G - 3 and vy > zero:
            vy = zero
        u = vec3(vx, vy, vz)
        if j < 3 and vy < zero:
            if friction >= real(99.0):
                u = vec3(zero, zero, zero)
            else:
                u = rub(u, vec3(zero, real(1.0), zero), friction)
        return u

    @kernel
    def grid(
        nodes: ints,
        count: ints,
        grid_m: grid_scalars,
        grid_mv: grid_vectors,
        dx: real,
        dt: real,
        gravity: real,
        friction: real,
        ground: real,
        colliders: int,
        kinds: ints,
        size: sizes,
        pos: vectors,
        rot: matrices,
        vel: vectors,
        omega: vectors,
        grid_v: grid_vectors,
    ):
        """Momentum to velocity, gravity, colliders in reach, walls. Poses (N, B) are those of this substep."""
        t = wp.tid()
        G = grid_m.shape[1]
        node = int(0)  # noqa: UP018
        if t < count[0]:
            node = nodes[t]
        i, j, k, n = node // (G * G) % G, node // G % G, node % G, node // (G * G * G)
        m = grid_m[n, i, j, k]
        if t < count[0] and m > real(1e-12):
            v = grid_mv[n, i, j, k] / m + vec3(real(0.0), gravity * dt, real(0.0))
            x = vec3(real(i), real(j), real(k)) * dx
            first = int(0)  # noqa: UP018
            for _ in range(4):  # one after the other, in their order; unrolled
                b = following(first, x, n, colliders, kinds, size, pos, rot)
                if b < colliders:
                    v = push(
                        v,
                        x,
                        kinds[b],
                        size[b],
                        pos[n, b],
                        rot[n, b],
                        vel[n, b],
                        omega[n, b],
                        friction,
                    )
                first = b + 1
            grid_v[n, i, j, k] = walls(v, i, j, k, G, ground)

    found = {k: v for k, v in locals().items() if isinstance(v, wp.Kernel)}
    return types.SimpleNamespace(vec3=vec3, mat33=mat33, **found)


# ------------------------------------------------------------------------------------------------- states and poses --
class Particles(NamedTuple):
    """State of all particles."""

    x: torch.Tensor  # (N, P, 3) positions
    v: torch.Tensor  # (N, P, 3) velocities
    C: torch.Tensor  # (N, P, 3, 3) affine velocity
    F: torch.Tensor  # (N, P, 3, 3) deformation gradient; of a fluid diag(J, 1, 1)


class Poses(NamedTuple):
    """Motion of all colliders: where each is at the start of each substep, and how it moves during it."""

    pos: torch.Tensor  # (S, N, B, 3) centres
    rot: torch.Tensor  # (S, N, B, 3, 3) rotation matrices, collider to world
    vel: torch.Tensor  # (S, N, B, 3) velocities of the centres, per unit of the material's time
    omega: torch.Tensor  # (S, N, B, 3) angular velocities, likewise


def at_rest(x: torch.Tensor) -> Particles:
    """Particles (N, P, 3) that stand still and are undeformed."""
    F = torch.eye(3, dtype=x.dtype, device=x.device).expand(*x.shape, 3).contiguous()
    return Particles(x, torch.zeros_like(x), torch.zeros_like(F), F)


class _Workspace(Launcher):
    """Arrays of one step: particles of each substep, poses, grids (one, or one a substep), and adjoints of all."""

    def __init__(self, sim: "MPM", grids: int):
        N, P, S, G, B = (
            sim.num_envs,
            sim.num_particles,
            sim.substeps,
            sim.grid,
            max(len(sim.kinds), 1),
        )
        super().__init__(S, sim.device, sim.graph)
        self.sim, self.serial = sim, 0
        self.shared = grids == 1 and S > 1

        def new(*shape):
            return torch.zeros(shape, dtype=sim.dtype, device=sim.device)

        shapes = ((N, P, 3), (N, P, 3), (N, P, 3, 3), (N, P, 3, 3))
        self.particles, self.adj_particles = (
            Particles(*(new(S + 1, *shape) for shape in shapes)) for _ in range(2)
        )
        shapes = ((S, N, B, 3), (S, N, B, 3, 3), (S, N, B, 3), (S, N, B, 3))
        self.poses, self.adj_poses = (Poses(*(new(*shape) for shape in shapes)) for _ in range(2))
        self.poses.rot[:] = torch.eye(3, dtype=sim.dtype)

        def wrap(tensor):
            return wp.from_torch(
                tensor, dtype={3: sim.k.vec3, 4: sim.k.mat33}[tensor.dim()], requires_grad=False
            )

        def split(tensors):  # one list of warp arrays a substep
            return [
                type(tensors)(*(wrap(tensor[s]) for tensor in tensors))
                for s in range(len(tensors[0]))
            ]

        self.w, self.adj_w = split(self.particles), split(self.adj_particles)
        self.p, self.adj_p = split(self.poses), split(self.adj_poses)

        def arrays(
            count,
        ):  # what a substep computes on its way: mass, momentum, velocity of nodes
            make = functools.partial(wp.zeros, device=str(sim.device))
            return [
                (
                    make((N, G, G, G), dtype=sim.real),
                    make((N, G, G, G), dtype=sim.k.vec3),
                    make((N, G, G, G), dtype=sim.k.vec3),
                )
                for _ in range(count)
            ]

        self.grids, self.adj_grid = arrays(grids), arrays(1)[0]
        affine = functools.partial(wp.zeros, (N, P), dtype=sim.k.mat33, device=str(sim.device))
        self.A, self.adj_A = [affine() for _ in range(S)], affine()
        # What the stress of plasticine leaves for its adjoint: U, V and sigma of F.
        stretches = functools.partial(wp.zeros, (N, P), dtype=sim.k.vec3, device=str(sim.device))
        self.svd = [()] * S
        if sim.material == "plasticine":
            self.svd = [(affine(), affine(), stretches()) for _ in range(S)]
        ints = functools.partial(wp.zeros, dtype=wp.int32, device=str(sim.device))
        self.seen, self.touched = (
            ints((N, G, G, G)),
            [(ints(N * G**3), ints(1)) for _ in range(grids)],
        )
        # The host may ask for the number of touched nodes where that costs nothing: not on a GPU, nor inside a graph.
        self.ask = sim.device.type == "cpu" and not sim.graph
        self.launches = [self._launches(s) for s in range(S)]

    # A launch is (kernel, dim, inputs, outputs, adjoints of inputs, adjoints of outputs); scalars have no adjoint.
    def _launches(self, s: int) -> list[tuple]:
        """The four launches of substep s; that of the grid has dim None: the number of touched nodes."""
        sim, k = self.sim, self.sim.k
        N, P = sim.num_envs, sim.num_particles
        (x, v, C, F), (x1, v1, C1, F1), pose = self.w[s], self.w[s + 1], self.p[s]
        (ax, av, aC, aF), (ax1, av1, aC1, aF1), adj_pose = (
            self.adj_w[s],
            self.adj_w[s + 1],
            self.adj_p[s],
        )
        A, (m, mv, gv) = self.A[s], self.grids[s % len(self.grids)]
        touched = self.touched[s % len(self.grids)]
        aA, (am, amv, agv) = self.adj_A, self.adj_grid
        material = [sim.dt, sim.mu, sim.lam, sim.limit, sim.scale]
        world = [sim.dx, sim.dt, sim.gravity, sim.friction, sim.ground_friction, len(sim.kinds)]
        shapes = [
            sim.kinds_,
            sim.sizes_,
        ]  # without an adjoint; were they their own, it would be added to them
        spacing = [sim.dx, 1.0 / sim.dx]
        adj_stress = [aF, aC, *material], [aF1, aA]
        if self.svd[s]:
            by_hand = [F, C, *material, *self.svd[s], aF1, aA], [aF, aC]
            adj_stress = [(k.adj_stress_plasticine, (N, P), *by_hand)]
        adj_p2g = [x, v, A, *spacing, am, amv], [ax, av, aA]
        adj_g2p = [x, gv, *spacing, sim.dt, x1, v1, ax1, av1, aC1], [ax, agv]
        return [
            (sim.stress, (N, P), [F, C, *material], [F1, A, *self.svd[s]], *adj_stress),
            (k.p2g, (N, P), [x, v, A, *spacing], [m, mv], (k.adj_p2g, (N, P), *adj_p2g)),
            (
                k.grid,
                None,
                [*touched, m, mv, *world, *shapes, *pose],
                [gv],
                [None, None, am, amv, *world, None, None, *adj_pose],
                [agv],
            ),
            (
                k.g2p,
                (N, P),
                [x, gv, *spacing, sim.dt],
                [x1, v1, C1],
                (k.adj_g2p, (N, P), *adj_g2p),
            ),
        ]

    def sized(self, launch: tuple, s: int) -> tuple:
        """The launch, with a dimension where it has none: that of the grid."""
        kernel, dim, *rest = launch
        if dim is None:
            nodes, count = self.touched[s % len(self.grids)]
            dim = int(count.numpy()[0]) if self.ask else len(nodes)
        return kernel, dim, *rest

    def on_touched(self, kernel, s: int, *arrays) -> None:
        """Launch a kernel without adjoint on the nodes that substep s touches, or touched before."""
        inputs = [*self.touched[s % len(self.grids)], *arrays]
        self.launch(self.sized((kernel, None, inputs, []), s))

    def forward_substep(self, s: int, rebuild: bool = False) -> None:
        """Substep s; to `rebuild` only its grid."""
        sim, touched = self.sim, self.touched[s % len(self.grids)]
        self.on_touched(sim.k.clear, s, *self.grids[s % len(self.grids)])
        touched[1].zero_()
        mark = [self.w[s].x, 1.0 / sim.dx, self.seen, *touched]
        self.launch((sim.k.mark, (sim.num_envs, sim.num_particles), mark, []))
        self.on_touched(sim.k.unsee, s, self.seen)
        for launch in self.launches[s][1:3] if rebuild else self.launches[s]:
            self.launch(self.sized(launch, s))

    def backward_substep(self, s: int) -> None:
        """Adjoint of substep s. A grid that all substeps share is first built again, in place of that of s + 1."""
        if self.shared:
            self.forward_substep(s, rebuild=True)
        for launch in reversed(self.launches[s]):
            self.launch(self.sized(launch, s), adjoint=True)
        self.on_touched(self.sim.k.clear, s, *self.adj_grid)

    def forward(self, particles: Particles, poses: Poses | None) -> Particles:
        """Particles after a step, views into the workspace."""
        for own, given in zip(self.particles, particles, strict=True):
            own[0].copy_(given)
        if poses is not None:
            for own, given in zip(self.poses, poses, strict=True):
                own.copy_(given)
        self.run("forward_all")
        return Particles(*(tensor[-1] for tensor in self.particles))

    def backward(self, adj: tuple[torch.Tensor, ...]) -> tuple[Particles, Poses]:
        """Adjoints of the particles before the step and of the poses, from those of the particles after it."""
        for tensor in (*self.adj_particles, *self.adj_poses):
            tensor.zero_()
        for own, given in zip(self.adj_particles, adj, strict=True):
            own[-1].copy_(given)
        self.run("backward_all")
        return Particles(*(tensor[0] for tensor in self.adj_particles)), self.adj_poses


# ------------------------------------------------------------------------------------------------- the bridge --------
class _Step(torch.autograd.Function):
    """One step of the simulation, as torch sees it: (particles, poses) -> particles."""

    @staticmethod
    def forward(ctx, sim, space, *tensors):
        particles, poses = (
            Particles(*tensors[:4]),
            Poses(*tensors[4:]) if len(tensors) > 4 else None,
        )
        ctx.sim, ctx.space, ctx.serial = sim, space, space.serial
        if sim.checkpoint:
            ctx.save_for_backward(*tensors)
        ctx.has_poses = poses is not None
        return tuple(tensor.clone() for tensor in space.forward(particles, poses))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *adj):
        sim, space = ctx.sim, ctx.space
        if sim.checkpoint:
            saved = ctx.saved_tensors
            space.forward(Particles(*saved[:4]), Poses(*saved[4:]) if ctx.has_poses else None)
        else:
            need_values(space, ctx.serial)
        adj_particles, adj_poses = space.backward(adj)
        found = list(adj_particles)
        if ctx.has_poses:
            found += adj_poses
        # poses are (S, N, ...): their environments come second
        by_env = [*adj_particles, *(pose.movedim(1, 0) for pose in found[4:])]
        finite = all_finite(by_env)
        sim.bad_gradients += (~finite).sum()
        kept = [own_gradient(finite, adjoint) for adjoint in by_env]
        return None, None, *kept[:4], *(pose.movedim(0, 1) for pose in kept[4:])


class MPM(Spaces):
    """N environments of P particles of one material.

    material         "elastic", "plasticine" or "fluid"
    grid             nodes an axis; the spacing is 1 / grid and three layers at each side are wall
    dt, substeps     of the material's own time; a step is substeps * dt
    young, poisson   of the material; density only scales the stress
    yield_stress     of plasticine, in units of `young`
    friction         of colliders, ground_friction of the floor (99 and more: nothing slides)
    colliders        a list of (kind, size), see CAPSULE and BOX; their motion comes with each step as `Poses`
    checkpoint       keep the first state of each step only, and compute the rest again in the backward pass
    window           without `checkpoint`: most steps between two calls of `detach`
    graph            replay captured graphs (a step's kernels become one launch)
    Raises ValueError in one line for a choice that cannot work.
    """

    def __init__(
        self,
        num_envs: int,
        num_particles: int,
        *,
        material: str,
        grid: int = 48,
        dt: float,
        substeps: int,
        young: float,
        poisson: float,
        density: float = 1.0,
        yield_stress: float = 0.0,
        gravity: float = -9.8,
        friction: float = 0.5,
        ground_friction: float = 0.0,
        colliders=(),
        device="cpu",
        dtype=torch.float32,
        checkpoint: bool = True,
        window: int = 32,
        graph: bool = False,
    ):
        for wrong, message in (
            (material not in MATERIALS, f"material {material!r}: known are {', '.join(MATERIALS)}"),
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
            (
                grid < 2 * WALL + 3,
                f"grid {grid}: at least {2 * WALL + 3} nodes, since {WALL} at each side are wall",
            ),
            (
                min(num_envs, num_particles, substeps, window) < 1,
                "environments, particles, substeps, window: at least 1",
            ),
            (dt <= 0 or young <= 0 or density <= 0, "dt, young and density must be above 0"),
            (not -1 < poisson < 0.5, f"poisson {poisson}: between -1 and 0.5"),
        ):
            if wrong:
                raise ValueError(message)
        self.num_envs, self.num_particles, self.grid, self.substeps = (
            num_envs,
            num_particles,
            grid,
            substeps,
        )
        self.device, self.dtype = torch.device(device), dtype
        super().__init__(device, checkpoint, window)
        self.graph = graph
        self.dx, self.dt, self.gravity = 1.0 / grid, dt, gravity
        self.friction, self.ground_friction = friction, ground_friction
        self.mu, self.lam = (
            young / (2 * (1 + poisson)),
            young * poisson / ((1 + poisson) * (1 - 2 * poisson)),
        )
        self.limit = yield_stress / (2 * self.mu)  # of the deviator of the log strain
        self.scale = 4 * dt / (density * self.dx**2)
        self.real = wp.float32 if dtype == torch.float32 else wp.float64
        self.k = kernels(self.real)
        self.material, self.stress = material, getattr(self.k, f"stress_{material}")
        self.kinds = [kind for kind, _ in colliders]
        padded = [(*size, 0.0, 0.0, 0.0)[:3] for _, size in colliders]
        self.kinds_ = wp.array(self.kinds or [0], dtype=wp.int32, device=str(self.device))
        self.sizes_ = wp.array(
            padded or [(0.0, 0.0, 0.0)], dtype=self.k.vec3, device=str(self.device)
        )
        wp.load_module(
            self.stress.module, device=str(self.device)
        )  # before any capture, which cannot compile

    def new_workspace(self) -> _Workspace:
        return _Workspace(self, 1 if self.checkpoint else self.substeps)

    def step(self, particles: Particles, poses: Poses | None = None) -> Particles:
        """Particles a step later; differentiable with respect to particles and poses."""
        if (poses is None) != (not self.kinds):
            raise ValueError(
                f"{len(self.kinds)} colliders, but poses {'are missing' if poses is None else 'given'}"
            )
        tensors = (*particles, *(poses or ()))
        return Particles(*_Step.apply(self, self.workspace(tensors), *tensors))
