"""SoftJumper: a soft table with muscles that jumps forward.

Sizes of actions, material, noise, observations, rewards and length are the published ones (SAPO, Xing et al. 2025,
arXiv 2412.12089). `size="small"` is the same body of fewer and larger cells.
"""

import itertools

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.fem import FEM

# The six tetrahedra around the diagonal of a cube (6, 4, 3), one for each order of the axes: the corners that a walk
# along the edges in that order passes.
ORDERS = tuple(itertools.permutations(range(3)))
AROUND = torch.stack(
    [torch.cat((torch.zeros(1, 3), torch.eye(3)[list(order)].cumsum(0))) for order in ORDERS]
).long()
FILL = torch.tensor(
    [[(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)]]
)  # makes a corner of the rim convex


def table(
    top: tuple[int, int], leg: tuple[int, int], edge: float, rim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices (V, 3) and tetrahedra (T, 4) of a table that stands on y = 0 with its middle at x = z = 0.

    top: cells along x and z of the slab, one cell thick; leg: cells of a leg's side and of its height; rim: the slab's
    border rises outwards by a cell, and two of its corners, opposite ones, are filled.
    """
    (nx, nz), (side, height) = top, leg
    slab = list(itertools.product(range(nx), range(nz)))
    corners = itertools.product(
        (range(side), range(nx - side, nx)), (range(side), range(nz - side, nz))
    )
    cells = [(i, height, k) for i, k in slab]
    cells += [(i, j, k) for xs, zs in corners for i in xs for j in range(height) for k in zs]
    cells += [(i, height + 1, k) for i, k in slab if rim and (i in (0, nx - 1) or k in (0, nz - 1))]
    points = []
    for i, j, k in cells:
        ways = torch.tensor(
            (1 if 2 * i >= nx else -1, 1, 1 if 2 * k >= nz else -1)
        )  # outwards: both halves alike
        tets, outer = AROUND, [0] * (i in (0, nx - 1)) + [2] * (k in (0, nz - 1))
        if j > height:  # below the height y = x, or y = z, or the larger of both, counted outwards
            tets = tets[
                [any(order.index(axis) < order.index(1) for axis in outer) for order in ORDERS]
            ]
            if len(outer) == 2 and (i == 0) == (k == 0):
                tets = torch.cat((tets, FILL))
        points.append(torch.tensor((i, j, k)) + (ways < 0) + ways * tets)
    lattice, tets = torch.cat(points).reshape(-1, 3).unique(dim=0, return_inverse=True)
    vertices, tets = (
        (lattice - torch.tensor((nx / 2, 0.0, nz / 2), dtype=torch.float64)) * edge,
        tets.reshape(-1, 4),
    )
    sides = vertices[tets[:, 1:]] - vertices[tets[:, :1]]
    inside_out = (
        torch.linalg.det(sides) < 0
    )  # two vertices change places, so that every volume is positive
    return vertices, torch.where(inside_out[:, None], tets[:, [0, 2, 1, 3]], tets)


class SoftJumper(DifferentiableEnv):
    """A table of muscles jumps along x.

    Actions: activations x 0.3, each of two tetrahedra. Observation: centre of mass 3 and its velocity 3, times 0.1, the
    last actions; points: all vertices, times 0.1. Reward, of the centre of mass times 0.1 as well:
    10 v_x + 30 (y - y0) - 0.001 |a|^2, with y0 its height at the episode's start. "paper" and "default" are the same.
    Ours: how the published outline (7 x 7 cells of 0.354, legs of one cell three high, a rim; 204 vertices, 444
    tetrahedra) is divided into tetrahedra, and the smaller body of `small`.
    """

    SIZES = {
        "full": dict(
            top=(7, 7), leg=(1, 3), edge=0.354, rim=True, dt=1 / 4800, substeps=80, steps=300
        ),
        "small": dict(
            top=(4, 3), leg=(1, 2), edge=0.45, rim=False, dt=1 / 2400, substeps=40, steps=100
        ),
    }
    SCALE, VIEW, START = (
        0.3,
        0.1,
        0.2,
    )  # of an activation; of lengths in observation and reward; height of the feet

    def setup(self) -> None:
        s = self.s = self.SIZES[self.size]
        rest, tets = table(s["top"], s["leg"], s["edge"], s["rim"])
        self.sim = FEM(
            self.num_envs,
            rest,
            tets,
            dt=s["dt"],
            substeps=s["substeps"],
            mu=1000.0,
            lam=1000.0,
            damping=1.0,
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
        )
        self.tets, self.rest = tets, rest.to(self.device, self.dtype)
        self.share = (self.sim.mass / self.sim.mass.sum()).to(self.device, self.dtype)[
            :, None
        ]  # of the mass
        self.action_dim, self.max_episode_steps = len(tets) // 2, s["steps"]
        self.control_hz = 1 / (s["dt"] * s["substeps"])
        self.muscle = (torch.arange(len(tets)) // 2).to(
            self.device
        )  # number of the action that drives a tetrahedron
        self.obs_dims = {"state": (6 + self.action_dim,), "points": tuple(rest.shape)}

    def fresh(self):
        scale = self.uniform(0.9, 1.1)
        low, high = (-0.8, self.START, -0.8), (0.8, self.START + 0.4, 0.8)
        x = self.rest * scale[:, None, None] + self.uniform(low, high, 1, 3)
        idle = torch.zeros(self.num_envs, self.action_dim, device=self.device, dtype=self.dtype)
        return {
            "x": x,
            "v": torch.zeros_like(x),
            "scale": scale,
            "actions": idle,
            "y0": self.centre(x)[:, 1],
        }

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """Mean (N, 3) of a quantity of the vertices by mass."""
        return (x * self.share).sum(1)

    def physics(self, state, actions):
        x, v = self.sim.step(
            state["x"], state["v"], self.SCALE * actions[:, self.muscle], state["scale"]
        )
        return {**state, "x": x, "v": v, "actions": actions}

    def observe(self, state):
        body = (
            self.VIEW * self.centre(state["x"]),
            self.VIEW * self.centre(state["v"]),
            state["actions"],
        )
        return {"state": torch.cat(body, 1), "points": self.VIEW * state["x"]}

    def reward(self, state, actions):
        speed, height = self.centre(state["v"])[:, 0], self.centre(state["x"])[:, 1] - state["y0"]
        rewards = self.VIEW * (10 * speed + 30 * height) - 1e-3 * actions.square().sum(1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        return render.draw_body(self, world, size)
