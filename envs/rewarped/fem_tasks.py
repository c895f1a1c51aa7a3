"""SoftJumper: a soft table with muscles that jumps forward.

Sizes of actions, material, noise, observations, rewards and length are the published ones (SAPO, Xing et al. 2025,
arXiv 2412.12089). `size="small"` is the same body of fewer and larger cells.
"""

import itertools

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.fem import FEM

# The six tetrahedra around the diagonal of a cube, one for each order of the axes.
PATHS = tuple(itertools.permutations(range(3)))


def table(top: tuple[int, int], leg: tuple[int, int], edge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices (V, 3) and tetrahedra (T, 4) of a table that stands on y = 0 with its middle at x = z = 0.

    top: cells along x and z of the slab, one cell thick; leg: cells of a leg's side and of its height.
    """
    (nx, nz), (side, height) = top, leg
    cells = [(i, height, k) for i in range(nx) for k in range(nz)]
    corners = itertools.product((range(side), range(nx - side, nx)), (range(side), range(nz - side, nz)))
    cells += [(i, j, k) for xs, zs in corners for i in xs for j in range(height) for k in zs]
    index, tets = {}, []
    for cell in cells:
        for number, path in enumerate(PATHS):
            corner, walk = list(cell), []
            for axis in (*path, None):
                walk.append(index.setdefault(tuple(corner), len(index)))
                if axis is not None:
                    corner[axis] += 1
            odd = number in (1, 2, 5)  # odd permutations: two vertices change places, so that the volume is positive
            tets.append([walk[0], walk[2], walk[1], walk[3]] if odd else walk)
    vertices = torch.tensor(list(index), dtype=torch.float64) - torch.tensor((nx / 2, 0.0, nz / 2))
    return vertices * edge, torch.tensor(tets)


class SoftJumper(DifferentiableEnv):
    """A table of muscles jumps along x.

    Actions: activations x 0.3, each of two tetrahedra. Observation: centre of mass 3 and its velocity 3, times 0.1, the
    last actions; points: all vertices, times 0.1. Reward, of the centre of mass times 0.1 as well:
    10 v_x + 30 (y - y0) - 0.001 |a|^2, with y0 its height at the episode's start. "paper" and "default" are the same.
    Ours: the mesh (444 tetrahedra and 222 actions as published, 184 vertices where the published one has 204).
    """

    SIZES = {
        "full": dict(top=(7, 6), leg=(2, 2), edge=0.25, dt=1 / 4800, substeps=80, steps=300),
        "small": dict(top=(4, 3), leg=(1, 2), edge=0.45, dt=1 / 2400, substeps=40, steps=100),
    }
    SCALE, VIEW = 0.3, 0.1

    def setup(self) -> None:
        s = self.s = self.SIZES[self.size]
        rest, tets = table(s["top"], s["leg"], s["edge"])
        self.sim = FEM(self.num_envs, rest, tets, dt=s["dt"], substeps=s["substeps"], mu=1000.0, lam=1000.0,
                       damping=1.0, device=self.device, dtype=self.dtype, graph=self.graph)  # fmt: skip
        self.tets, self.rest = tets, rest.to(self.device, self.dtype)
        self.share = (self.sim.mass / self.sim.mass.sum()).to(self.device, self.dtype)[:, None]  # of the mass
        self.action_dim, self.max_episode_steps = len(tets) // 2, s["steps"]
        self.control_hz = 1 / (s["dt"] * s["substeps"])
        self.muscle = (torch.arange(len(tets)) // 2).to(self.device)  # number of the action that drives a tetrahedron
        self.obs_dims = {"state": (6 + self.action_dim,), "points": tuple(rest.shape)}

    def fresh(self):
        scale = self.uniform(0.9, 1.1)
        x = self.rest * scale[:, None, None] + self.uniform((-0.8, 0.0, -0.8), (0.8, 0.4, 0.8), 1, 3)
        idle = torch.zeros(self.num_envs, self.action_dim, device=self.device, dtype=self.dtype)
        return {"x": x, "v": torch.zeros_like(x), "scale": scale, "actions": idle, "y0": self.centre(x)[:, 1]}

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """Mean (N, 3) of a quantity of the vertices by mass."""
        return (x * self.share).sum(1)

    def physics(self, state, actions):
        x, v = self.sim.step(state["x"], state["v"], self.SCALE * actions[:, self.muscle], state["scale"])
        return {**state, "x": x, "v": v, "actions": actions}

    def observe(self, state):
        body = (self.VIEW * self.centre(state["x"]), self.VIEW * self.centre(state["v"]), state["actions"])
        return {"state": torch.cat(body, 1), "points": self.VIEW * state["x"]}

    def reward(self, state, actions):
        speed, height = self.centre(state["v"])[:, 0], self.centre(state["x"])[:, 1] - state["y0"]
        rewards = self.VIEW * (10 * speed + 30 * height) - 1e-3 * actions.square().sum(1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def render(self, world: int = 0, size: int = 256):
        """A picture for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        return render.draw_body(self, world, size)
