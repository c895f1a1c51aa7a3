"""Batched, differentiable tetrahedra with muscles in Warp: neo-Hookean elasticity, penalty contact with the ground.

One substep takes every world's vertices through two kernels:

    forces     a thread a tetrahedron: F = D_s D_m^-1 from its vertices, first Piola-Kirchhoff stress
               P = mu (1 - 1 / (tr F^T F + 1)) F + lam (J - alpha + a) dJ/dF + damping dF/dt,  alpha = 1 + 3 mu / 4 lam,
               and -V P D_m^-T to its vertices. The activation a shifts the volume at rest: that is the muscle
    integrate  a thread a vertex: ground at y = 0 by a spring, a damper and Coulomb friction; v <- v + dt (f / m + g),
               then x <- x + dt v

The stress is the stable neo-Hookean of Smith et al. 2018, which needs no logarithm and survives inversion. Gradients as
in mpm.py: only the state at the start of a step is kept; the backward pass runs the step again, keeping the vertices of
each substep, and launches the adjoints of both kernels by hand, last substep first.
Shapes: N worlds, V vertices, T tetrahedra, S substeps.
"""

import functools
import types

import torch

try:
    import warp as wp
except ImportError as error:
    raise ImportError(f'the rewarped tasks need Warp: pip install -e ".[so101]"  ({error})') from None

wp.config.log_level = wp.LOG_WARNING  # no line for every kernel that is loaded


# ------------------------------------------------------------------------------------------------------- kernels -----
@functools.cache
def kernels(real) -> types.SimpleNamespace:
    """The kernels for the scalar type `real`, each precision in a module of its own."""
    name = f"rewarped_fem_{real.__name__}"
    kernel = functools.partial(wp.kernel, module=name)
    vec3, mat33 = wp.types.vector(3, real), wp.types.matrix((3, 3), real)
    scalars, vectors, scalars2 = (wp.array(dtype=t, ndim=n) for t, n in ((real, 1), (vec3, 2), (real, 2)))
    matrices, ints = wp.array(dtype=mat33, ndim=1), wp.array(dtype=wp.int32, ndim=2)

    @kernel
    def forces(x: vectors, v: vectors, activation: scalars2, size: scalars, tets: ints, inv_rest: matrices,
               volume: scalars, mu: real, lam: real, damping: real, f: vectors):  # fmt: skip
        n, t = wp.tid()
        a, b, c, d, s = tets[t, 0], tets[t, 1], tets[t, 2], tets[t, 3], size[n]
        inv = inv_rest[t] / s
        F = wp.matrix_from_cols(x[n, b] - x[n, a], x[n, c] - x[n, a], x[n, d] - x[n, a]) @ inv
        rate = wp.matrix_from_cols(v[n, b] - v[n, a], v[n, c] - v[n, a], v[n, d] - v[n, a]) @ inv
        F0 = F @ vec3(real(1.0), real(0.0), real(0.0))
        F1 = F @ vec3(real(0.0), real(1.0), real(0.0))
        F2 = F @ vec3(real(0.0), real(0.0), real(1.0))
        grad_J = wp.matrix_from_cols(wp.cross(F1, F2), wp.cross(F2, F0), wp.cross(F0, F1))
        alpha = real(1.0) + real(0.75) * mu / lam
        P = F * (mu * (real(1.0) - real(1.0) / (wp.ddot(F, F) + real(1.0))))
        P = P + grad_J * (lam * (wp.determinant(F) - alpha + activation[n, t])) + rate * damping
        H = P @ wp.transpose(inv) * (-volume[t] * s * s * s)
        fb = H @ vec3(real(1.0), real(0.0), real(0.0))
        fc = H @ vec3(real(0.0), real(1.0), real(0.0))
        fd = H @ vec3(real(0.0), real(0.0), real(1.0))
        wp.atomic_add(f, n, a, -(fb + fc + fd))
        wp.atomic_add(f, n, b, fb)
        wp.atomic_add(f, n, c, fc)
        wp.atomic_add(f, n, d, fd)

    @kernel
    def integrate(x: vectors, v: vectors, f: vectors, size: scalars, mass: scalars, dt: real, gravity: real, ke: real,
                  kd: real, kf: real, friction: real, x_next: vectors, v_next: vectors):  # fmt: skip
        n, i = wp.tid()
        xp, vp, s, zero = x[n, i], v[n, i], size[n], real(0.0)
        depth = wp.max(-xp[1], zero)
        inside = wp.where(xp[1] < zero, real(1.0), zero)
        press = wp.max(ke * depth - kd * vp[1] * inside, zero)
        slide = vec3(vp[0], zero, vp[2])
        speed = wp.sqrt(wp.dot(slide, slide) + real(1e-12))
        drag = wp.min(kf * inside, friction * press / speed)
        force = f[n, i] + vec3(zero, press, zero) - slide * drag
        new = vp + (force / (mass[i] * s * s * s) + vec3(zero, gravity, zero)) * dt
        v_next[n, i] = new
        x_next[n, i] = xp + new * dt

    return types.SimpleNamespace(vec3=vec3, mat33=mat33, forces=forces, integrate=integrate)


# ------------------------------------------------------------------------------------------------- the bridge --------
class _Step(torch.autograd.Function):
    """One step: (x, v, activation, size) -> (x, v). The size of a body has no gradient."""

    @staticmethod
    def forward(ctx, sim, x, v, activation, size):
        ctx.sim = sim
        ctx.save_for_backward(x, v, activation, size)
        sim.forward(x, v, activation, size)
        return sim.x[-1].clone(), sim.v[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, adj_x, adj_v):
        sim = ctx.sim
        sim.forward(*ctx.saved_tensors)
        found = sim.backward(adj_x, adj_v)
        finite = functools.reduce(torch.logical_and, (t.isfinite().flatten(1).all(1) for t in found))
        sim.bad_gradients += (~finite).sum()  # of a world that has blown up: zero
        return None, *(torch.where(finite.view(-1, *[1] * (t.dim() - 1)), t, 0.0) for t in found), None


class FEM:
    """N worlds of one body of tetrahedra.

    rest (V, 3), tets (T, 4)    the body; a positive volume each
    dt, substeps                a step is substeps * dt
    mu, lam, damping, density   of the material
    ke, kd, kf, friction        of the ground: spring, damper, viscous limit of friction, and its coefficient
    Raises ValueError in one line for a choice that cannot work.
    """

    def __init__(self, num_envs: int, rest: torch.Tensor, tets: torch.Tensor, *, dt: float, substeps: int, mu: float,
                 lam: float, damping: float, density: float = 1.0, gravity: float = -9.8, ke: float = 2e3,
                 kd: float = 0.1, kf: float = 10.0, friction: float = 0.7, device="cpu", dtype=torch.float32,
                 graph: bool = False):  # fmt: skip
        wp.init()
        rest = rest.double()
        edges = torch.stack([rest[tets[:, k]] - rest[tets[:, 0]] for k in (1, 2, 3)], -1)
        volume = torch.linalg.det(edges) / 6
        for wrong, message in (
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}: float32 or float64"),
            (min(num_envs, substeps) < 1, "worlds and substeps: at least 1"),
            (min(dt, mu, lam, density) <= 0, "dt, mu, lam and density must be above 0"),
            (bool((volume <= 0).any()), f"{int((volume <= 0).sum())} tetrahedra have no positive volume"),
        ):
            if wrong:
                raise ValueError(message)
        mass = torch.zeros(len(rest), dtype=torch.float64)
        mass.index_add_(0, tets.flatten(), (density * volume / 4).repeat_interleave(4))
        self.num_envs, self.substeps, self.dt, self.graph = num_envs, substeps, dt, graph
        self.device, self.dtype = torch.device(device), dtype
        self.real = wp.float32 if dtype == torch.float32 else wp.float64
        self.k, self.mass = kernels(self.real), mass
        self.material, self.world = [mu, lam, damping], [dt, gravity, ke, kd, kf, friction]
        N, V, T, S = num_envs, len(rest), len(tets), substeps
        self.dims = (N, V), (N, T)

        def new(*shape):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.x, self.v, self.adj_x, self.adj_v = (new(S + 1, N, V, 3) for _ in range(4))
        self.activation, self.adj_activation, self.size = new(N, T), new(N, T), new(N)
        inverse = torch.linalg.inv(edges).to(self.device, dtype).contiguous()
        self.keep = [tets.int().contiguous().to(self.device), inverse, volume.to(self.device, dtype),
                     mass.to(self.device, dtype), new(N, V, 3), new(N, V, 3)]  # fmt: skip
        wrap = functools.partial(wp.from_torch, requires_grad=False)
        vec3 = self.k.vec3
        self.w = [[wrap(t[s], dtype=vec3) for t in (self.x, self.v, self.adj_x, self.adj_v)] for s in range(S + 1)]
        self.tets_, self.inv_ = wrap(self.keep[0]), wrap(self.keep[1], dtype=self.k.mat33)
        self.volume_, self.mass_ = wrap(self.keep[2]), wrap(self.keep[3])
        self.f_, self.adj_f_ = (wrap(t, dtype=vec3) for t in self.keep[4:])
        self.activation_, self.adj_activation_, self.size_ = (
            wrap(t) for t in (self.activation, self.adj_activation, self.size)
        )  # fmt: skip
        self.graphs, self.bad_gradients = {}, torch.zeros((), dtype=torch.int64, device=self.device)
        wp.load_module(self.k.forces.module, device=str(self.device))  # before any capture, which cannot compile

    def _launches(self, s: int) -> list[tuple]:
        """(kernel, dim, inputs, outputs, adjoints of inputs, of outputs) of both kernels of substep s."""
        (x, v, ax, av), (x1, v1, ax1, av1), (vertices, tets) = self.w[s], self.w[s + 1], self.dims
        body = [self.tets_, self.inv_, self.volume_, *self.material]
        return [
            (self.k.forces, tets, [x, v, self.activation_, self.size_, *body], [self.f_],
             [ax, av, self.adj_activation_, None, None, None, None, *self.material], [self.adj_f_]),
            (self.k.integrate, vertices, [x, v, self.f_, self.size_, self.mass_, *self.world], [x1, v1],
             [ax, av, self.adj_f_, None, None, *self.world], [ax1, av1]),
        ]  # fmt: skip

    def _forward_all(self) -> None:
        for s in range(self.substeps):
            self.f_.zero_()
            for kernel, dim, inputs, outputs, _, _ in self._launches(s):
                wp.launch(kernel, dim, inputs, outputs, device=str(self.device), record_tape=False)

    def _backward_all(self) -> None:
        for s in reversed(range(self.substeps)):
            forces, integrate = self._launches(s)
            self.f_.zero_()
            self.adj_f_.zero_()
            wp.launch(*forces[:4], device=str(self.device), record_tape=False)  # f of this substep again
            for kernel, dim, inputs, outputs, adj_inputs, adj_outputs in (integrate, forces):
                wp.launch(kernel, dim, inputs, outputs, adj_inputs, adj_outputs, adjoint=True,
                          device=str(self.device), record_tape=False)  # fmt: skip

    def _run(self, name: str) -> None:
        """Runs a method, as a captured graph where that is wanted."""
        stream = wp.stream_from_torch(torch.cuda.current_stream(self.device)) if self.device.type == "cuda" else None
        with wp.ScopedStream(stream):
            if not self.graph:
                return getattr(self, name)()
            if name not in self.graphs:
                with wp.ScopedCapture(device=str(self.device), force_module_load=False) as capture:
                    getattr(self, name)()
                self.graphs[name] = capture.graph
            wp.capture_launch(self.graphs[name], stream=stream)

    def forward(self, x, v, activation, size) -> None:
        """Fills self.x and self.v (S + 1, N, V, 3)."""
        self.x[0].copy_(x)
        self.v[0].copy_(v)
        self.activation.copy_(activation)
        self.size.copy_(size)
        self._run("_forward_all")

    def backward(self, adj_x, adj_v):
        """Adjoints of x, v and activation of the step that self.x and self.v hold."""
        for tensor in (self.adj_x, self.adj_v, self.adj_activation):
            tensor.zero_()
        self.adj_x[-1].copy_(adj_x)
        self.adj_v[-1].copy_(adj_v)
        self._run("_backward_all")
        return self.adj_x[0].clone(), self.adj_v[0].clone(), self.adj_activation.clone()

    def step(self, x, v, activation, size):
        """x and v (N, V, 3) a step later, for activations (N, T) and sizes (N,) of the bodies; differentiable."""
        return _Step.apply(self, x, v, activation, size)
