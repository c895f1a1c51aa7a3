"""Pictures for people, by Matplotlib: particles as dots coloured by height, colliders as surfaces. Needs no display."""

import numpy as np

from envs.rewarped import mpm

DOMAIN, ROUND = 0.06, 14  # of the domain's side that is cut off in a picture; points around a capsule


def capsule(half: float, radius: float) -> np.ndarray:
    """Points (rows, ROUND, 3) of a capsule's surface; its axis is y."""
    turn = np.linspace(0, 2 * np.pi, ROUND)
    cap = np.linspace(0, np.pi / 2, 5)
    rings = [(radius * np.sin(a), -half - radius * np.cos(a)) for a in cap]
    rings += [(radius * np.cos(a), half + radius * np.sin(a)) for a in cap]
    return np.array([[(r * np.cos(t), y, r * np.sin(t)) for t in turn] for r, y in rings])


def box(half) -> list[np.ndarray]:
    """The six faces of a box, each (2, 2, 3)."""
    faces = []
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        for side in (-1, 1):
            face = np.zeros((2, 2, 3))
            face[..., axis] = side * half[axis]
            face[..., others[0]], face[..., others[1]] = np.meshgrid((-half[others[0]], half[others[0]]),
                                                                     (-half[others[1]], half[others[1]]))  # fmt: skip
            faces.append(face)
    return faces


def stage(size: int, low, high, floor: float):
    """An empty picture: canvas and axes of the region from low to high (3,), in plot order z, x, y, with a floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=size / 4)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((-0.12, -0.12, 1.24, 1.24), projection="3d")
    axes.view_init(elev=22, azim=-62)
    axes.set_axis_off()
    axes.set(xlim=(low[2], high[2]), ylim=(low[0], high[0]), zlim=(low[1], high[1]))
    axes.set_box_aspect((high[2] - low[2], high[0] - low[0], high[1] - low[1]), zoom=1.25)
    a, b = np.meshgrid((low[2], high[2]), (low[0], high[0]))
    axes.plot_surface(a, b, np.full((2, 2), floor), color="0.88", shade=False)
    return canvas, axes


def pixels(canvas) -> np.ndarray:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_body(env, world: int = 0, size: int = 256) -> np.ndarray:
    """A picture of one world's body of tetrahedra, uint8 (size, size, 3), 6 units wide around it."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    x = env.state["x"][world].detach().cpu().numpy()
    faces = env.tets[:, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]].reshape(-1, 3).numpy()
    _, first, count = np.unique(np.sort(faces, 1), axis=0, return_index=True, return_counts=True)
    middle = x.mean(0)
    low, high = middle - 2, middle + 2
    low[1], high[1] = -0.1, 3.9
    canvas, axes = stage(size, low, high, 0.0)
    skin = Poly3DCollection(x[faces[first[count == 1]]][..., [2, 0, 1]], facecolors="tab:green", edgecolors="0.2",
                            linewidths=0.3, shade=True)  # fmt: skip
    axes.add_collection3d(skin)
    return pixels(canvas)


def draw(env, world: int = 0, size: int = 256) -> np.ndarray:
    """A picture of one world of a task on particles, uint8 (size, size, 3); y is up."""
    canvas, axes = stage(size, (DOMAIN,) * 3, (1 - DOMAIN,) * 3, env.floor)
    x = env.state["x"][world].detach().cpu().numpy()
    axes.scatter(x[:, 2], x[:, 0], x[:, 1], c=x[:, 1] - 0.3 * x[:, 2], s=36 * env.s["grid"] ** -0.6 * 4, linewidths=0,
                 cmap="viridis", depthshade=False)  # fmt: skip
    for kind, extent, position, rotation in env.shapes(world):
        faces = [capsule(extent[0], extent[1])] if kind == mpm.CAPSULE else box(extent)
        for face in faces:
            p = face @ rotation.T + position
            axes.plot_surface(p[..., 2], p[..., 0], p[..., 1], color="tab:orange", alpha=env.OPACITY, linewidth=0)
    goal = env.state.get("target")
    if goal is not None:
        p = goal[world].cpu().numpy()
        axes.scatter([p[2]], [p[0]], [p[1]], c="red", s=60, marker="x")
    return pixels(canvas)
