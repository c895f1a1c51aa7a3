"""Draw that the differentiable simulations obey physics: five experiments, each against what must hold.

    python scripts/physics_rewarped.py                      all; under a minute on a CPU, once the kernels are compiled
    python scripts/physics_rewarped.py --show elastic rigid

    transfers    a spinning elastic body, alone: mass, momentum and angular momentum of the grid stay what they were
    elastic      a block falls and bounces: energy goes from one form to another and its sum does not grow
    fluid        a column collapses and settles level
    plasticine   sheared to and fro it holds below its yield stress and flows above; a block stands, or slumps
    rigid        free fall, a pendulum and a ball that slides to rest, against closed forms
Output: docs/images/rewarped/physics_<name>.png. tests/test_rewarped_physics.py asserts what the images show.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from envs.rewarped import mpm
from envs.rewarped.rigid import Body, Box, Hinge, Rigid, Sphere, Springs

ROOT = Path(__file__).resolve().parent.parent
D, LIMIT = torch.float64, 120_000  # LIMIT: bytes of a file


@dataclass
class Args:
    show: tuple[Literal["transfers", "elastic", "fluid", "plasticine", "rigid"], ...] = (
        "transfers",
        "elastic",
        "fluid",
        "plasticine",
        "rigid",
    )
    """which experiments"""
    out: Path = ROOT / "docs/images/rewarped"
    """folder for the images"""


def lattice(counts: tuple[int, int, int], spacing: float) -> torch.Tensor:
    """Points (P, 3) of a block that stands on y = 0 with its middle at x = z = 0."""
    x, y, z = (torch.arange(n, dtype=D) + 0.5 for n in counts)
    return torch.cartesian_prod(x - counts[0] / 2, y, z - counts[2] / 2) * spacing


def block(counts, spacing: float, centre, dtype=torch.float32) -> mpm.Particles:
    """Particles (1, P, ...) at rest in a block; `centre` is the middle of its bottom."""
    return mpm.at_rest((lattice(counts, spacing) + torch.tensor(centre, dtype=D))[None].to(dtype))


# --- Experiments: each returns its curves, and images of particles (P, 3) ------------------------------------------
def transfers(steps: int = 200) -> dict:
    """Relative changes (steps, 4) of mass and momentum of the grid, momentum and angular momentum of the particles.

    float64; the body's parts move at random, it spins and is deformed.
    """
    sim = mpm.MPM(
        1,
        216,
        material="elastic",
        grid=24,
        dt=2e-4,
        substeps=1,
        young=1000.0,
        poisson=0.3,
        gravity=0.0,
        dtype=D,
    )
    p, g = block((6, 6, 6), 1 / 48, (0.5, 0.45, 0.5), D), torch.Generator().manual_seed(0)
    spin = torch.tensor((3.0, 8.0, -2.0), dtype=D).expand_as(p.x)
    v = torch.cross(spin, p.x - p.x.mean(1, keepdim=True), dim=-1) + torch.tensor(
        (0.5, -0.3, 0.4), dtype=D
    )
    p = p._replace(
        v=v + 0.2 * torch.randn(v.shape, generator=g, dtype=D),
        C=2 * torch.randn(p.C.shape, generator=g, dtype=D),
    )

    def angular(
        p,
    ):  # x cross v, and of the APIC particles the antisymmetric part of C D with D = dx^2 / 4
        B = p.C * sim.dx**2 / 4
        own = torch.stack(
            (B[..., 2, 1] - B[..., 1, 2], B[..., 0, 2] - B[..., 2, 0], B[..., 1, 0] - B[..., 0, 1]),
            -1,
        )
        return (torch.cross(p.x, p.v, dim=-1) + own).sum(1)[0]

    images, kept = [p.x[0].numpy()], []
    first, turning = p.v.sum(1)[0], angular(p)
    for _ in range(steps):
        p = sim.step(p)
        mass, moved = (mpm.wp.to_torch(a) for a in sim.spaces[0].grids[0][:2])  # of the nodes
        kept.append(
            (
                abs(float(mass.sum()) / 216 - 1),
                float((moved.sum((0, 1, 2, 3)) - first).norm() / first.norm()),
                float((p.v.sum(1)[0] - first).norm() / first.norm()),
                float((angular(p) - turning).norm() / turning.norm()),
            )
        )
    strain = (p.F - torch.eye(3, dtype=D)).norm(dim=(-2, -1)).mean()
    return {
        "images": [*images, p.x[0].numpy()],
        "kept": np.array(kept),
        "strain": float(strain),
    }


def elastic(steps: int = 60) -> dict:
    """Energies a particle (steps + 1, 3: of height, motion, deformation), heights of the middle, and images."""
    sim = mpm.MPM(
        1,
        216,
        material="elastic",
        grid=16,
        dt=5e-4,
        substeps=20,
        young=2000.0,
        poisson=0.3,
        gravity=-10.0,
    )
    floor = 3 / 16
    p = block((6, 6, 6), 1 / 32, (0.5, floor + 0.15, 0.5))
    energies, heights, images = [], [], []
    for step in range(steps + 1):
        J = torch.linalg.det(p.F)
        stored = (
            sim.mu / 2 * (p.F.square().sum((-2, -1)) - 3 - 2 * J.log()) + sim.lam / 2 * J.log() ** 2
        )
        moving = 0.5 * p.v.square().sum(-1) + 0.5 * p.C.square().sum((-2, -1)) * sim.dx**2 / 4
        energies.append([float(e.mean()) for e in (10.0 * (p.x[..., 1] - floor), moving, stored)])
        heights.append(float(p.x[..., 1].mean()) - floor)
        if step in (0, 19, steps * 35 // 60):
            images.append(p.x[0].numpy())
        p = sim.step(p)
    return {
        "images": images,
        "energies": np.array(energies),
        "heights": np.array(heights),
        "floor": floor,
        "seconds": sim.dt * sim.substeps,
    }


def fluid(steps: int = 80) -> dict:
    """Mean heights of the left and the right half over the floor (steps + 1, 2), the volume's share that is left."""
    sim = mpm.MPM(
        1,
        360,
        material="fluid",
        grid=12,
        dt=2e-3,
        substeps=20,
        young=1e5,
        poisson=0.3,
        density=1000.0,
    )
    p, floor = (
        block((6, 12, 5), 1 / 24, (0.375, 3 / 12, 0.5)),
        2 / 12,
    )  # the last layer of nodes that is floor
    levels, volume, images, speed = [], [], [], []
    for step in range(steps + 1):
        x, y = p.x[0, :, 0], p.x[0, :, 1] - floor
        levels.append(
            [float(y[side].mean()) if side.any() else 0.0 for side in (x < 0.5, x >= 0.5)]
        )
        volume.append(float(p.F[..., 0, 0].mean()))
        speed.append(float(p.v.norm(dim=-1).mean()))
        if step in (0, steps // 16, steps):
            images.append(p.x[0].numpy())
        p = sim.step(p)
        p = p._replace(v=p.v * 0.93)  # a little drag, or it would slosh for long
    return {
        "images": images,
        "levels": np.array(levels),
        "volume": np.array(volume),
        "speed": np.array(speed),
        "floor": floor,
        "seconds": sim.dt * sim.substeps,
    }


def plasticine(steps: int = 40) -> dict:
    """A particle sheared to and fro: imposed and kept strain (M,), yield strain. Blocks: heights (steps + 1, 2)."""
    sim = mpm.MPM(
        1,
        1,
        material="plasticine",
        grid=16,
        dt=1e-3,
        substeps=1,
        young=1000.0,
        poisson=0.3,
        yield_stress=20.0,
        gravity=0.0,
        dtype=D,
    )
    rate, limit = (
        torch.diag(torch.tensor((1.0, -1.0, 0.0), dtype=D)),
        sim.limit / math.sqrt(2),
    )  # of one component
    p, imposed, kept, total = mpm.at_rest(torch.full((1, 1, 3), 0.5, dtype=D)), [0.0], [0.0], 0.0
    for part, share in (
        (1, 0.8),
        (-1, 0.8),
        (1, 2.5),
        (-1, 4.0),
        (1, 4.0),
    ):  # of the limit; the first two stay below
        for _ in range(40):
            change = part * share * limit / 40
            # F <- (I + dt C) F adds exactly `change` to the first log strain, and takes it from the second.
            grow = torch.diag_embed((change * rate.diagonal()).exp() - 1) / sim.dt
            p = sim.step(p._replace(C=grow[None, None], x=torch.full((1, 1, 3), 0.5, dtype=D)))
            total += change
            e = p.F[0, 0].diagonal().log()  # no turn: F stays diagonal
            imposed.append(total)
            kept.append(float(e[0] - e.mean()))
    heights, images = [], []
    for yield_stress in (20.0, 0.4):  # its weight is a pressure of up to 1.9
        sim = mpm.MPM(
            1,
            216,
            material="plasticine",
            grid=16,
            dt=5e-4,
            substeps=20,
            young=5000.0,
            poisson=0.3,
            yield_stress=yield_stress,
            gravity=-10.0,
            ground_friction=500.0,
        )
        p, height = block((6, 6, 6), 1 / 32, (0.5, 3 / 16, 0.5)), []
        if not images:
            images.append(p.x[0].numpy())
        for _ in range(steps):
            height.append(float(p.x[..., 1].max() - 3 / 16))
            p = sim.step(p)
        heights.append([*height, float(p.x[..., 1].max() - 3 / 16)])
        images.append(p.x[0].numpy())
    return {
        "imposed": np.array(imposed),
        "kept": np.array(kept),
        "limit": limit,
        "images": images,
        "heights": np.array(heights).T,
        "floor": 3 / 16,
        "seconds": sim.dt * sim.substeps,
    }


def rigid() -> dict:
    """(t, simulated, closed form) of a body's height, a pendulum's angle and a sliding ball's way; float64."""

    def rest():
        q = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=D)
        return [torch.zeros(1, 3, dtype=D), q, *(torch.zeros(1, n, dtype=D) for n in (3, 3, 1, 1))]

    def follow(sim, state, watch, seconds, step):
        """Number `watch` of the state, flattened, at times 0, step, 2 step, ..."""
        part, entry = watch
        found, idle = [float(state[part].flatten()[entry])], torch.zeros(1, 1, dtype=D)
        times = np.arange(0, seconds + step / 2, step)
        for _ in times[1:]:
            state = sim.step(*state, idle)
            found.append(float(state[part].flatten()[entry]))
        return times, np.array(found)

    always = dict(gravity=(0.0, -9.8, 0.0), ground=False, graph=True, dtype=D)
    tumbling = Body(2.0, (1.0, 2.0, 3.0))
    free = Rigid(1, [tumbling], [], [], dt=1e-4, substeps=200, updates=50, **always)
    state = rest()
    state[2], state[3] = (torch.tensor([v], dtype=D) for v in ((0.0, 1.0, 0.0), (1.0, 2.0, 0.5)))
    t, height = follow(free, state, (0, 1), 0.5, 0.02)
    fall = (t, height, t - 4.9 * t**2)

    mass, inertia, length, start = 2.0, 0.1, 0.5, 0.05
    bob = Body(mass, (inertia, 0.01, inertia), (0.0, -length, 0.0))
    hinge = Hinge(-1, (0.0,) * 3, (0.0, 0.0, 1.0))
    swing = Rigid(1, [tumbling, bob], [hinge], [], dt=1 / 4800, substeps=96, **always)
    state = rest()
    state[4] = torch.full((1, 1), start, dtype=D)
    t, angles = follow(swing, state, (4, 0), 4.0, 0.02)
    rate = math.sqrt(mass * 9.8 * length / (inertia + mass * length**2))
    pendulum = (t, angles, start * np.cos(t * rate))

    # A ball that does not roll, since its inertia is large, on a fixed box; v^2 / 2 mu g is where it stops.
    speed, friction = 2.0, 0.5
    plate = Rigid(
        1,
        [Body(1.0, (1e9,) * 3)],
        [],
        [Sphere(0, (0.0,) * 3, 0.2)],
        dt=1 / 960,
        substeps=24,
        boxes=(Box(-1, (5.0, 0.5, 5.0), (0.0, -0.5, 0.0)),),
        springs=Springs(contact_ke=1e4, contact_kd=60.0, contact_kf=1e6, friction=friction),
        **always,
    )
    state = rest()
    state[0], state[2] = (
        torch.tensor([v], dtype=D) for v in ((0.0, 0.2 - 9.8e-4, 0.0), (speed, 0.0, 0.0))
    )
    t, way = follow(plate, state, (0, 0), 0.6, 0.025)
    until = np.minimum(t, speed / (friction * 9.8))
    return {
        "fall": fall,
        "pendulum": pendulum,
        "slide": (t, way, speed * until - friction * 4.9 * until**2),
    }


# --- Pictures --------------------------------------------------------------------------------------------------------
def side_view(axes, x: np.ndarray, reach, floor: float | None, title: str) -> None:
    """Particles (P, 3) seen along z, as far as `reach`: left, right, bottom."""
    order, (left, right, bottom) = np.argsort(x[:, 2]), reach
    axes.scatter(x[order, 0], x[order, 1], c=x[order, 2], s=9, cmap="viridis", linewidths=0)
    if floor is not None:
        axes.axhspan(-1, floor, color="0.85")
    axes.set(
        xlim=(left, right),
        ylim=(bottom, bottom + right - left),
        aspect="equal",
        xticks=[],
        yticks=[],
    )
    axes.set_title(title, fontsize=9)


def draw(name: str, found: dict, path: Path) -> None:
    """The experiment's image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = found.get("images", [])
    plots = {"transfers": 1, "elastic": 1, "fluid": 1, "plasticine": 2, "rigid": 3}[name]
    figure, axes = plt.subplots(
        1,
        len(shown) + plots,
        figsize=(2.2 * len(shown) + 3.4 * plots, 2.5),
        dpi=90,
        width_ratios=[2.2] * len(shown) + [3.4] * plots,
        layout="constrained",
    )
    axes = np.atleast_1d(axes)
    last = axes[-1]
    titles = {
        "transfers": ("start", "200 substeps later"),
        "elastic": ("start", "at the floor", "back up"),
        "fluid": ("start", "on its way", "at rest"),
        "plasticine": ("start", "yield stress 20", "yield stress 0.4"),
    }.get(name, ())
    reach = {"transfers": (0.4, 0.62, 0.4), "fluid": (0.12, 0.88, 0.12)}.get(
        name, (0.25, 0.75, 0.15)
    )
    for axis, x, title in zip(axes, shown, titles, strict=False):
        side_view(axis, x, reach, found.get("floor"), title)
    if name == "transfers":
        for column, label in zip(
            found["kept"].T,
            ("mass on the grid", "momentum on the grid", "momentum", "angular momentum"),
            strict=True,
        ):
            last.semilogy(np.maximum(column, 1e-17), label=label, linewidth=1)
        last.set(xlabel="substep", ylim=(1e-17, 1e-9), title="relative change, float64")
    elif name == "elastic":
        t = np.arange(len(found["energies"])) * found["seconds"]
        last.stackplot(
            t, found["energies"].T, labels=("height", "motion", "deformation"), alpha=0.8
        )
        last.axhline(found["energies"][0].sum(), color="black", linestyle=":", linewidth=1)
        last.set(xlabel="s", title="energy a particle; dotted: at the start")
    elif name == "fluid":
        t = np.arange(len(found["levels"])) * found["seconds"]
        for column, label in zip(found["levels"].T, ("left half", "right half"), strict=True):
            last.plot(t, column, label=label)
        last.set(xlabel="s", title="mean height over the floor")
    elif name == "plasticine":
        loop, last = axes[-2:]
        loop.plot(found["imposed"] / found["limit"], found["kept"] / found["limit"], linewidth=1)
        for side in (-1, 1):
            loop.axhline(side, color="black", linestyle=":", linewidth=1)
        loop.set(xlabel="imposed strain", title="elastic strain, in units of yield")
        t = np.arange(len(found["heights"])) * found["seconds"]
        for column, label in zip(
            found["heights"].T, ("yield stress 20", "yield stress 0.4"), strict=True
        ):
            last.plot(t, column, label=label)
        last.set(xlabel="s", title="height of a block", ylim=(0, None))
    else:
        titles = ("thrown body: height, m", "pendulum: angle, rad", "sliding ball: way, m")
        for axis, (t, simulated, exact), title in zip(axes, found.values(), titles, strict=True):
            axis.plot(t, exact, color="0.6", linewidth=4, label="closed form")
            axis.plot(t, simulated, color="tab:red", linewidth=1, label="simulated")
            axis.set(xlabel="s", title=title)
    for axis in axes[len(shown) :]:
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
        axis.tick_params(labelsize=8)
    last.legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(args: Args) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.show:
        path = args.out / f"physics_{name}.png"
        draw(name, globals()[name](), path)
        print(f"{path}  {path.stat().st_size} bytes")
        if path.stat().st_size > LIMIT:
            print(f"{path} has more than {LIMIT} bytes", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
