"""Particles and tetrahedra against the formulas written out anew: a substep in NumPy, an energy's slope by torch.

Tests of gradients and of conserved quantities would not see a shear modulus that is twice too large.
"""

import itertools

import numpy as np
import pytest
import test_rewarped as particles
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs.rewarped import mpm  # noqa: E402
from envs.rewarped.fem import FEM  # noqa: E402
from envs.rewarped.fem_tasks import table  # noqa: E402

D, DT, G, YOUNG, POISSON, YIELD = (
    torch.float64,
    2e-4,
    16,
    1000.0,
    0.3,
    20.0,
)  # those of particles.simulation
DX, MU, LAM = 1 / G, YOUNG / 2 / (1 + POISSON), YOUNG * POISSON / (1 + POISSON) / (1 - 2 * POISSON)
STENCIL = list(itertools.product(range(3), repeat=3))


def stress(material, F):
    """F after the return to the yield surface, and the Kirchhoff stress."""
    eye = np.eye(3)
    if material == "elastic":
        return F, MU * (F @ F.T - eye) + LAM * np.log(np.linalg.det(F)) * eye
    if material == "fluid":
        return F, LAM * F[0, 0] * (F[0, 0] - 1) * eye
    U, sigma, Vt = np.linalg.svd(F)
    e = np.log(sigma)
    mean, deviator = e.mean(), e - e.mean()
    e = mean + deviator * min(1, YIELD / (2 * MU) / np.linalg.norm(deviator))
    return U @ np.diag(np.exp(e)) @ Vt, U @ np.diag(2 * MU * e + LAM * e.sum()) @ U.T


def surface(kind, size, x):
    """Signed distance and outward normal in the collider's frame."""
    if kind == mpm.CAPSULE:
        away = x - np.array((0, np.clip(x[1], -size[0], size[0]), 0))
        return np.linalg.norm(away) - size[1], away / np.linalg.norm(away)
    q = np.abs(x) - size
    if q.max() < 0:
        return q.max(), np.sign(x) * (q == q.max())
    out = np.maximum(q, 0)
    return np.linalg.norm(out), np.sign(x) * out / np.linalg.norm(out)


def rubbed(u, normal, friction):
    """An impact's velocity relative to the surface after Coulomb's friction."""
    into, slide = u @ normal, u - (u @ normal) * normal
    return slide * max(0.0, 1 + friction * into / np.sqrt(slide @ slide + 1e-12))


def node(v, index, pose):
    """Velocity of a node after the colliders that reach it, in their order, and the walls."""
    x, (pos, rot, vel, omega), index = np.array(index) * DX, pose, np.array(index)
    for b, (kind, size) in enumerate(particles.COLLIDERS):
        distance, normal = surface(kind, np.array(size), rot[b].T @ (x - pos[b]))
        share, normal = min(np.exp(-666 * distance), 1), rot[b] @ normal
        body = vel[b] + np.cross(omega[b], x - pos[b])
        if share > 0.1 and (v - body) @ normal < 0:
            v = body + (1 - share) * (v - body) + share * rubbed(v - body, normal, 0.5)
    stopped = ((index < 3) & (v < 0)) | ((index > G - 3) & (v > 0))
    floor, stopped[1] = stopped[1] and index[1] < 3, stopped[1] and index[1] > G - 3
    v = np.where(stopped, 0, v)
    return rubbed(v, np.array((0.0, 1.0, 0.0)), 0.3) if floor else v


def substep(material, density, x, v, C, F, pose):
    """MLS-MPM with particles of volume 1 and mass `density`."""
    mass, momentum = np.zeros((G, G, G)), np.zeros((G, G, G, 3))
    after, weights = [], []
    for p in range(len(x)):
        if material == "fluid":
            trial = np.diag((F[p, 0, 0] * np.linalg.det(np.eye(3) + DT * C[p]), 1, 1))
        else:
            trial = (np.eye(3) + DT * C[p]) @ F[p]
        plastic, tau = stress(material, trial)
        after.append(plastic)
        base = (x[p] / DX - 0.5).astype(int)
        f = x[p] / DX - base
        w = np.array((0.5 * (1.5 - f) ** 2, 0.75 - (f - 1) ** 2, 0.5 * (f - 0.5) ** 2))
        weights.append(
            [
                (tuple(base + s), w[s[0], 0] * w[s[1], 1] * w[s[2], 2], (base + s) * DX - x[p])
                for s in STENCIL
            ]
        )
        for index, share, way in weights[p]:
            mass[index] += share * density
            momentum[index] += share * (density * (v[p] + C[p] @ way) - DT * 4 / DX**2 * tau @ way)
    speed = {
        index: node(momentum[index] / mass[index] + np.array((0, -10 * DT, 0)), index, pose)
        for index in zip(*map(list, np.nonzero(mass)), strict=True)
    }
    v = np.array([sum(share * speed[index] for index, share, _ in around) for around in weights])
    C = np.array(
        [
            sum(4 / DX**2 * share * np.outer(speed[index], way) for index, share, way in around)
            for around in weights
        ]
    )
    return x + DT * v, v, C, np.array(after)


@pytest.mark.parametrize("material", mpm.MATERIALS)
@pytest.mark.parametrize("density", [1.0, 3.0])
def test_substeps_are_the_formulas(material, density):
    """In contact with two colliders, that turn, and with the floor; the plasticine flows."""
    tensors = particles.scene(material)
    found = particles.simulation(material, density=density).step(
        mpm.Particles(*tensors[:4]), mpm.Poses(*tensors[4:])
    )
    for n in range(2):
        state = [t[n].numpy() for t in tensors[:4]]
        for s in range(3):
            state = substep(material, density, *state, [t[s, n].numpy() for t in tensors[4:]])
        for ours, theirs in zip(found, state, strict=True):
            assert np.abs(ours[n].numpy() - theirs).max() < 1e-11 * np.abs(theirs).max()


def test_forces_of_tetrahedra_are_the_slope_of_their_energy():
    """mu / 2 (tr F'F - 3) - mu / 2 log(tr F'F + 1) + lam / 2 (J - alpha + a)^2."""
    g, (rest, tets), mu, lam = (
        torch.Generator().manual_seed(0),
        table((3, 2), (1, 1), 0.3),
        700.0,
        1300.0,
    )
    sim = FEM(
        2, rest, tets, dt=1 / 4800, substeps=1, mu=mu, lam=lam, damping=0.0, gravity=0.0, dtype=D
    )
    activation = 0.3 * torch.randn(2, len(tets), generator=g, dtype=D)
    x = rest + 0.01 * torch.randn(2, *rest.shape, generator=g, dtype=D)
    x = (x + torch.tensor((0.0, 1.0, 0.0))).requires_grad_()
    edges, sides = ((t[..., tets[:, 1:], :] - t[..., tets[:, :1], :]).mT for t in (rest, x))
    F, volume = sides @ torch.linalg.inv(edges), torch.linalg.det(edges) / 6
    square, J, alpha = F.square().sum((-2, -1)), torch.linalg.det(F), 1 + mu / lam - mu / (4 * lam)
    energy = (
        mu / 2 * (square - 3 - torch.log(square + 1)) + lam / 2 * (J - alpha + activation).square()
    )
    expected = -torch.autograd.grad((volume * energy).sum(), x)[0]
    _, v = sim.step(x.detach(), torch.zeros_like(x), activation)
    forces = v * 4800 * sim.mass[:, None]
    assert expected.norm() > 1 and (forces - expected).norm() < 1e-11 * expected.norm()
