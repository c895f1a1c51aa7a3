"""SoftJumper: a soft table with muscles that jumps forward.

The published task (SAPO, Xing et al. 2025, arXiv 2412.12089), compared with its authors' package,
`rewarped` 1.3.3, in tests/test_rewarped_original.py. `size="small"` is the same body of fewer and
larger cells.
"""

import itertools

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.fem import FEM

# The six tetrahedra around the diagonal of a cube (6, 4, 3), one for each order of the axes: the
# corners that a walk along the edges in that order passes.
ORDERS = tuple(itertools.permutations(range(3)))
AROUND = torch.stack(
    [torch.cat((torch.zeros(1, 3), torch.eye(3)[list(order)].cumsum(0))) for order in ORDERS]
).long()


def table(top: tuple[int, int], leg: tuple[int, int], edge: float, slab: int = 1):
    """Vertices (V, 3) and tetrahedra (T, 4) of a table that stands on y = 0 with its middle at x =
    z = 0.

    top: cells along x and z of the slab; leg: cells of a leg's side and of its height; slab: its
    thickness, 1 or 2, at 2 with vertices half way up its border and none inside.
    """
    (nx, nz), (side, height) = top, leg
    cells = [(i, height, k, slab) for i, k in itertools.product(range(nx), range(nz))]
    corners = itertools.product(
        (range(side), range(nx - side, nx)), (range(side), range(nz - side, nz))
    )
    cells += [(i, j, k, 1) for xs, zs in corners for i in xs for j in range(height) for k in zs]
    found = []
    for i, j, k, tall in cells:
        for order, tet in zip(ORDERS, AROUND, strict=True):
            tet = tet * torch.tensor((1, tall, 1)) + torch.tensor((i, j, k))
            step = order.index(1)  # its walk goes up from this vertex to the next
            x, _, z = tet[step].tolist()
            if tall == 2 and (x in (0, nx) or z in (0, nz)):  # cut in the middle of that edge
                lower, upper = tet.clone(), tet.clone()
                lower[step + 1, 1] -= 1
                upper[step, 1] += 1
                found += [lower, upper]
            else:
                found.append(tet)
    lattice, tets = torch.cat(found).unique(dim=0, return_inverse=True)
    middle = torch.tensor((nx / 2, 0.0, nz / 2), dtype=torch.float64)
    vertices, tets = (lattice - middle) * edge, tets.reshape(-1, 4)
    sides = vertices[tets[:, 1:]] - vertices[tets[:, :1]]
    inside_out = (
        torch.linalg.det(sides) < 0
    )  # two vertices change places, so that volumes are positive
    return vertices, torch.where(inside_out[:, None], tets[:, [0, 2, 1, 3]], tets)


class SoftJumper(DifferentiableEnv):
    """A table of muscles jumps along x.

    Actions: activations x 0.3, each of two tetrahedra. Observation: mean of the vertices 3 and of
    their velocities 3, times 0.1, the last actions; points: all vertices, times 0.1. Reward, with v
    and y of these means: 10 v_x + 30 (y - y0) - 0.001 |a|^2, with y0 the height of the body at its
    place before noise. The noise of its size leaves its shape at rest alone: a larger one starts
    stretched. "paper" and "default" are the same. As published, the damping of volume is relative
    to the world (see `FEM`).

    Differences from the original (rewarped 1.3.3):
    1. The mesh is ours: the same vertices and as many tetrahedra of the same volumes, but not all
       the same ones, and in another order, so that an action drives others.
    2. Random numbers are our own, and not rounded to three digits.
    3. `small` is a smaller body.
    """

    SIZES = {
        "full": dict(
            top=(7, 7), leg=(1, 3), slab=2, edge=0.3544281, dt=1 / 4800, substeps=80, steps=300
        ),
        "small": dict(
            top=(4, 3), leg=(1, 2), slab=1, edge=0.45, dt=1 / 2400, substeps=40, steps=100
        ),
    }
    SCALE, VIEW = 0.3, 0.1  # of an activation; of lengths in observation and reward
    PLACE = (0.080324, 0.207315, 0.019073)  # of the middle between its feet, before noise

    def setup(self) -> None:
        s = self.s = self.SIZES[self.size]
        rest, tets = table(s["top"], s["leg"], s["edge"], s["slab"])
        rest = rest + torch.tensor(self.PLACE, dtype=torch.float64)
        self.sim = FEM(
            self.num_envs,
            rest,
            tets,
            dt=s["dt"],
            substeps=s["substeps"],
            mu=1000.0,
            lam=1000.0,
            damping=1.0,
            relative=False,
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
            checkpoint=self.checkpoint,
            window=self.window,
        )
        self.tets, self.rest = tets, rest.to(self.device, self.dtype)
        self.y0 = float(rest[:, 1].mean())
        self.action_dim, self.max_episode_steps = len(tets) // 2, s["steps"]
        self.control_hz = 1 / (s["dt"] * s["substeps"])
        self.muscle = (torch.arange(len(tets)) // 2).to(
            self.device
        )  # number of the action that drives a tetrahedron
        self.obs_dims = {"state": (6 + self.action_dim,), "points": tuple(rest.shape)}

    def fresh(self):
        moved = self.rest + self.uniform((-0.8, 0.0, -0.8), (0.8, 0.4, 0.8), 1, 3)
        x = moved * self.uniform(0.9, 1.1, 1, 1)
        idle = torch.zeros(self.num_envs, self.action_dim, device=self.device, dtype=self.dtype)
        return {"x": x, "v": torch.zeros_like(x), "actions": idle}

    def physics(self, state, actions):
        x, v = self.sim.step(state["x"], state["v"], self.SCALE * actions[:, self.muscle])
        return {"x": x, "v": v, "actions": actions}

    def observe(self, state):
        place, speed = self.VIEW * state["x"].mean(1), self.VIEW * state["v"].mean(1)
        body = torch.cat((place, speed, state["actions"]), 1)
        return {"state": body, "points": self.VIEW * state["x"]}

    def reward(self, state, actions):
        speed, height = state["v"][..., 0].mean(1), state["x"][..., 1].mean(1) - self.y0
        rewards = self.VIEW * (10 * speed + 30 * height) - 1e-3 * actions.square().sum(1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        return render.draw_body(self, world, size)
