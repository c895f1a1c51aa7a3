"""Batched, differentiable tetrahedra with muscles in Warp: neo-Hookean elasticity, penalty contact with the ground.

One substep takes every environment's vertices through two kernels:

    forces     a thread a tetrahedron: F = D_s D_m^-1 from its vertices, first Piola-Kirchhoff stress
               P = mu (1 - 1 / (tr F^T F + 1)) F + lam (J - alpha + a) dJ/dF + damping (dF/dt + dJ/dt dJ/dF),
               alpha = 1 + 3 mu / 4 lam, and -V P D_m^-T to its vertices. The activation a shifts the volume at rest:
               that is the muscle
    integrate  a thread a vertex: ground below y = radius by a spring, a damper on the way in and Coulomb friction;
               v <- v + dt (f / m + g), then x <- x + dt v

The stress is the stable neo-Hookean of Smith et al. 2018, which needs no logarithm and survives inversion. Gradients:
see substeps.py.
Shapes: N environments, V vertices, T tetrahedra, S substeps.
"""

import functools
import types

import torch
import warp as wp

from envs.rewarped.substeps import Substeps


# ------------------------------------------------------------------------------------------------------- kernels -----
@functools.cache
def kernels(real) -> types.SimpleNamespace:
    """The kernels for the scalar type `real`, each precision in a module of its own."""
    name = f"rewarped_fem_{real.__name__}"
    kernel = functools.partial(wp.kernel, module=name)
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    scalars, vectors, scalars2 = (
        wp.array(dtype=t, ndim=n) for t, n in ((real, 1), (vec3, 2), (real, 2))
    )
    matrices, ints = wp.array(dtype=mat33, ndim=1), wp.array(dtype=wp.int32, ndim=2)

    @kernel
    def forces(
        x: vectors,
        v: vectors,
        activation: scalars2,
        tets: ints,
        inv_rest: matrices,
        volume: scalars,
        mu: real,
        lam: real,
        damping: real,
        relative: real,
        f: vectors,
    ):
        n, t = wp.tid()
        a, b, c, d, inv = tets[t, 0], tets[t, 1], tets[t, 2], tets[t, 3], inv_rest[t]
        F = wp.matrix_from_cols(x[n, b] - x[n, a], x[n, c] - x[n, a], x[n, d] - x[n, a]) @ inv
        rate = wp.matrix_from_cols(v[n, b] - v[n, a], v[n, c] - v[n, a], v[n, d] - v[n, a]) @ inv
        F0 = F @ vec3(real(1.0), real(0.0), real(0.0))
        F1 = F @ vec3(real(0.0), real(1.0), real(0.0))
        F2 = F @ vec3(real(0.0), real(0.0), real(1.0))
        grad_J = wp.matrix_from_cols(wp.cross(F1, F2), wp.cross(F2, F0), wp.cross(F0, F1))
        alpha = real(1.0) + real(0.75) * mu / lam
        P = F * (mu * (real(1.0) - real(1.0) / (wp.ddot(F, F) + real(1.0))))
        # dJ/dt, of which the part from the first corner's velocity may be left out
        seen = wp.matrix_from_cols(
            v[n, b] - v[n, a] * relative, v[n, c] - v[n, a] * relative, v[n, d] - v[n, a] * relative
        )
        swelling = wp.ddot(grad_J, seen @ inv)
        pressure = lam * (wp.determinant(F) - alpha + activation[n, t]) + damping * swelling
        P = P + grad_J * pressure + rate * damping
        H = P @ wp.transpose(inv) * (-volume[t])
        fb = H @ vec3(real(1.0), real(0.0), real(0.0))
        fc = H @ vec3(real(0.0), real(1.0), real(0.0))
        fd = H @ vec3(real(0.0), real(0.0), real(1.0))
        wp.atomic_add(f, n, a, -(fb + fc + fd))
        wp.atomic_add(f, n, b, fb)
        wp.atomic_add(f, n, c, fc)
        wp.atomic_add(f, n, d, fd)

    @kernel
    def integrate(
        x: vectors,
        v: vectors,
        f: vectors,
        mass: scalars,
        dt: real,
        gravity: real,
        radius: real,
        ke: real,
        kd: real,
        kf: real,
        friction: real,
        x_next: vectors,
        v_next: vectors,
    ):
        n, i = wp.tid()
        xp, vp, zero = x[n, i], v[n, i], real(0.0)
        depth = wp.max(radius - xp[1], zero)
        inside = wp.where(depth > zero, real(1.0), zero)
        press = ke * depth - kd * wp.min(vp[1], zero) * inside
        slide = vec3(vp[0], zero, vp[2])
        speed = wp.sqrt(wp.dot(slide, slide) + real(1e-12))
        drag = wp.min(kf * inside, friction * press / speed)
        force = f[n, i] + vec3(zero, press, zero) - slide * drag
        new = vp + (force / mass[i] + vec3(zero, gravity, zero)) * dt
        v_next[n, i] = new
        x_next[n, i] = xp + new * dt

    return types.SimpleNamespace(vec3=vec3, mat33=mat33, forces=forces, integrate=integrate)


# ------------------------------------------------------------------------------------------------- the simulation ----
class FEM:
    """N environments of one body of tetrahedra.

    rest (V, 3), tets (T, 4)    the body; a positive volume each
    dt, substeps                a step is substeps * dt
    mu, lam, damping, density   of the material
    relative                    of the damping of volume, to a tetrahedron's first corner; otherwise
                                to the world, so that a body in uniform motion deforms a little
    radius                      of a vertex, which touches the ground that far above it
    ke, kd, kf, friction        of the ground: spring, damper, viscous limit of friction, and its coefficient
    Raises ValueError in one line for a choice that cannot work.
    """

    def __init__(
        self,
        num_envs: int,
        rest: torch.Tensor,
        tets: torch.Tensor,
        *,
        dt: float,
        substeps: int,
        mu: float,
        lam: float,
        damping: float,
        density: float = 1.0,
        relative: bool = True,
        gravity: float = -9.81,
        radius: float = 0.05,
        ke: float = 2e3,
        kd: float = 0.1,
        kf: float = 10.0,
        friction: float = 0.7,
        device="cpu",
        dtype=torch.float32,
        graph: bool = False,
        checkpoint: bool = True,
        window: int = 32,
    ):
        rest = rest.double()
        edges = torch.stack([rest[tets[:, k]] - rest[tets[:, 0]] for k in (1, 2, 3)], -1)
        volume = torch.linalg.det(edges) / 6
        for wrong, message in (
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
            (min(num_envs, substeps) < 1, "environments and substeps: at least 1"),
            (min(dt, mu, lam, density) <= 0, "dt, mu, lam and density must be above 0"),
            (
                bool((volume <= 0).any()),
                f"{int((volume <= 0).sum())} tetrahedra have no positive volume",
            ),
        ):
            if wrong:
                raise ValueError(message)
        self.mass = torch.zeros(len(rest), dtype=torch.float64)
        self.mass.index_add_(0, tets.flatten(), (density * volume / 4).repeat_interleave(4))
        self.substeps, N, V, T = substeps, num_envs, len(rest), len(tets)
        real = wp.float32 if dtype == torch.float32 else wp.float64
        k, where = kernels(real), str(torch.device(device))
        wp.load_module(k.forces.module, device=where)  # before any capture, which cannot compile
        array = functools.partial(wp.array, device=where)
        inverse = array(torch.linalg.inv(edges).numpy(), dtype=k.mat33)
        corners, volumes = array(tets.numpy(), dtype=wp.int32), array(volume.numpy(), dtype=real)
        masses = array(self.mass.numpy(), dtype=real)
        world = [dt, gravity, radius, ke, kd, kf, friction]

        def launches(state, inputs, scratch, following, adjoint):
            (x, v), (activation,), (f,) = state, inputs, scratch
            body = [corners, inverse, volumes, mu, lam, damping, float(relative)]
            return [
                (k.forces, (N, T), [x, v, activation, *body], [f]),
                (k.integrate, (N, V), [x, v, f, masses, *world], following),
            ]

        vertices = ((N, V), k.vec3)
        self.steps = Substeps(
            [vertices, vertices],
            [((N, T), real)],
            [vertices],
            launches,
            substeps=substeps,
            device=device,
            dtype=dtype,
            graph=graph,
            checkpoint=checkpoint,
            window=window,
        )

    def detach(self) -> None:
        """Begins a window."""
        self.steps.detach()

    def step(self, x, v, activation):
        """x and v (N, V, 3) a step later, for activations (N, T); differentiable."""
        return self.steps.step(x, v, activation)
