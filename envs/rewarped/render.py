"""Images for people, by Matplotlib. Needs no display.

Particles, and the surfaces of colliders and bodies sampled as points, are dots of one scatter plot, which sorts them by
depth; so what is in front hides what is behind. y is up; in plot order the axes are z, x, y.
"""

import math

import numpy as np
import torch

from envs.rewarped import mpm

LIGHT = np.array((0.35, 0.85, -0.4)) / np.linalg.norm((0.35, 0.85, -0.4))
ORANGE, BLUE = np.array((0.95, 0.55, 0.15)), np.array((0.25, 0.45, 0.75))


def capsule(half: float, radius: float, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of a capsule's surface and their normals, (M, 3) each, about `gap` apart; its axis is y."""
    turns = np.arange(0, 2 * np.pi, gap / radius)
    caps = np.arange(0, np.pi / 2, gap / radius)
    rings = [(1.0, 0.0, y) for y in np.arange(-half, half + gap / 2, gap)]
    rings += [(np.cos(a), side * np.sin(a), side * half) for a in caps for side in (-1, 1)]
    normals = np.array([(r * np.cos(t), n, r * np.sin(t)) for r, n, _ in rings for t in turns])
    shift = np.array([(0.0, y, 0.0) for _, _, y in rings for _ in turns])
    return normals * radius + shift, normals


def box(half, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """The same of a box with half extents `half`."""
    points, normals = [], []
    for axis in range(3):
        u, v = (i for i in range(3) if i != axis)
        grid = [np.linspace(-half[i], half[i], max(2, round(2 * half[i] / gap))) for i in (u, v)]
        a, b = (g.ravel() for g in np.meshgrid(*grid))
        for side in (-1, 1):
            p, n = np.zeros((len(a), 3)), np.zeros((len(a), 3))
            p[:, axis], p[:, u], p[:, v], n[:, axis] = side * half[axis], a, b, side
            points.append(p)
            normals.append(n)
    return np.concatenate(points), np.concatenate(normals)


def shade(colour: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Colours (M, 3) of a surface in the light."""
    return colour * (0.45 + 0.55 * np.clip(normals @ LIGHT, 0, 1))[:, None]


def stage(size: int, low, high, floor: float):
    """An empty image: canvas and axes of the region from low to high (3,), with a floor of tiles.

    The tiles stay where they are while the region follows a body, so that one sees it move.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=size / 4)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((-0.1, -0.1, 1.2, 1.2), projection="3d", computed_zorder=False)
    axes.view_init(elev=24, azim=-58)
    axes.set_axis_off()
    axes.set(xlim=(low[2], high[2]), ylim=(low[0], high[0]), zlim=(low[1], high[1]))
    axes.set_box_aspect((high[2] - low[2], high[0] - low[0], high[1] - low[1]), zoom=1.2)
    side = (high[0] - low[0]) / 4
    edges = []
    for axis in (2, 0):
        inner = side * np.arange(np.ceil(low[axis] / side), np.ceil(high[axis] / side))
        edges.append(np.unique((low[axis], *inner, high[axis])))
    a, b = np.meshgrid(*edges)
    odd = (np.floor(a[:-1, :-1] / side + 1e-6) + np.floor(b[:-1, :-1] / side + 1e-6)) % 2
    colours = np.repeat(np.where(odd, 0.84, 0.92)[..., None], 3, -1)
    options = dict(rstride=1, cstride=1, shade=False, linewidth=0, antialiased=False, zorder=0)
    axes.plot_surface(a, b, np.full(a.shape, floor), facecolors=colours, **options)
    return canvas, axes


def dots(axes, x: np.ndarray, colours: np.ndarray, width) -> None:
    """Points (M, 3) as dots; width in points of 1/72 inch, of an image 4 inches wide."""
    axes.scatter(
        x[:, 2],
        x[:, 0],
        x[:, 1],
        c=colours,
        s=np.square(width),
        linewidths=0,
        depthshade=False,
        zorder=2,
    )


def pixels(canvas) -> np.ndarray:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(env, world: int = 0, size: int = 256) -> np.ndarray:
    """An image of one environment of a task on particles, uint8 (size, size, 3)."""
    from matplotlib import colormaps

    low, high, gap = (0.1, env.floor - 0.02, 0.1), (0.9, env.floor + 0.56, 0.9), 0.008
    canvas, axes = stage(
        size, low, high, env.floor - 0.5 / env.s["grid"]
    )  # where particles come to rest
    x = env.state["x"][world].detach().cpu().numpy()
    span = np.ptp(x[:, 1]) + 0.02
    points, colours = (
        [x],
        [colormaps["viridis"](0.15 + 0.8 * (x[:, 1] - x[:, 1].min()) / span)[:, :3]],
    )
    widths = [np.full(len(x), 260 * (0.35 / env.s["grid"]))]
    for kind, extent, position, rotation in env.shapes(world):
        surface, normals = capsule(*extent[:2], gap) if kind == mpm.CAPSULE else box(extent, gap)
        surface, normals = surface @ rotation.T + position, normals @ rotation.T
        if env.HOLLOW:  # walls that one looks through: their edges alone
            keep = (np.abs(np.abs(surface - position) - np.array(extent)) < 1e-4).sum(1) >= 2
            surface, normals = surface[keep], normals[keep]
        points.append(surface)
        colours.append(shade(ORANGE, normals))
        widths.append(np.full(len(surface), 1.2 if env.HOLLOW else 4.0))
    if "target" in env.state:
        points.append(env.state["target"][world].cpu().numpy()[None])
        colours.append(np.array([[0.9, 0.0, 0.0]]))
        widths.append(np.full(1, 9.0))
    dots(axes, np.concatenate(points), np.concatenate(colours), np.concatenate(widths))
    return pixels(canvas)


def draw_body(env, world: int = 0, size: int = 256) -> np.ndarray:
    """An image of one environment's body of tetrahedra, uint8 (size, size, 3), 3.8 units wide."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    x = env.state["x"][world].detach().cpu().numpy()
    faces = (
        env.tets[:, [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]].reshape(-1, 3).numpy()
    )  # seen from outside
    _, first, count = np.unique(np.sort(faces, 1), axis=0, return_index=True, return_counts=True)
    low, high = x.mean(0) - 1.9, x.mean(0) + 1.9
    low[1], high[1] = -0.05, 2.75
    canvas, axes = stage(size, low, high, 0.0)
    skin = Poly3DCollection(
        x[faces[first[count == 1]]][..., [2, 0, 1]],
        facecolors="tab:green",
        edgecolors="0.2",
        linewidths=0.3,
        shade=True,
        zorder=2,
    )
    axes.add_collection3d(skin)
    return pixels(canvas)


def draw_solids(size: int, low, high, floor: float, solids) -> np.ndarray:
    """An image of solids, each of them points (M, 3) of its surface, normals, colours, position and quaternion."""
    import torch

    from envs.rewarped.rigid import rotate

    canvas, axes = stage(size, low, high, floor)
    points, colours = [], []
    for surface, normals, colour, p, q in solids:
        x, n = (rotate(q.expand(len(a), 4), torch.as_tensor(a).to(q)) for a in (surface, normals))
        points.append((x + p).numpy())
        colours.append(shade(colour, n.numpy()))
    x = np.concatenate(points)
    dots(axes, x, np.concatenate(colours), np.full(len(x), 4.0))
    return pixels(canvas)


def frames(env, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, 3) and quaternions (B, 4) of an environment's rigid bodies."""
    state = [env.state[name][world : world + 1].detach() for name in ("p", "q", "angles")]
    return tuple(t[0].cpu() for t in env.sim.frames(*state))


def rod(a, b, radius: float, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Surface points and normals of a capsule from a to b."""
    from envs.rewarped.kinematics import turn_to

    a, b = np.array(a), np.array(b)
    turn, middle = np.array(turn_to(b - a)), (a + b) / 2
    surface, normals = capsule(float(np.linalg.norm(b - a)) / 2, radius, spacing)
    return surface @ turn.T + middle, normals @ turn.T


def draw_ant(env, world: int, size: int) -> np.ndarray:
    """An image of one ant, 2.6 m wide: a ball and the capsules between the spheres of its links."""
    p, q = frames(env, world)
    low, high = p[0].numpy() - 1.3, p[0].numpy() + 1.3
    low[1], high[1] = -0.05, 1.8
    ball, *rest = env.sim.spheres
    solids = [(*capsule(0.0, ball.radius, 0.025), BLUE, p[0], q[0])]
    for start, end in zip(rest, rest[1:], strict=False):
        if start.body == end.body:
            surface = rod(start.offset, end.offset, end.radius, 0.02)
            solids.append((*surface, ORANGE, p[end.body], q[end.body]))
    return draw_solids(size, low, high, 0.0, solids)


def draw_hand(env, world: int, size: int, side: float) -> np.ndarray:
    """An image of one hand with its cube, 0.32 m wide; beside it a cube that is turned as the goal is."""
    from envs.rewarped.rigid import about, multiply, rotate

    p, q = frames(env, world)
    lie = about(p.new_tensor((1.0, 0.0, 0.0)), p.new_tensor(-math.pi / 2))  # images have y up
    p, q = rotate(lie.expand_as(q), p), multiply(lie.expand_as(q), q)
    goal = multiply(lie, env.state["goal"][world].detach().cpu().to(p.dtype))
    palm = (torch.zeros(3, dtype=p.dtype), lie)
    solids = []
    for body, a, b, radius in env.capsules:
        place = palm if body < 0 else (p[body], q[body])
        colour = np.array((0.35, 0.37, 0.42)) if body < 0 else ORANGE
        solids.append((*rod(a, b, radius, 0.0026), colour, *place))
    surface, normals = box((side / 2,) * 3, 0.0022)
    face = (np.abs(surface) > side / 2 - 1e-6).sum(
        1
    ) == 1  # not on an edge, which is of two colours
    surface, normals = surface[face], normals[face]
    paint = np.array(
        ((0.85, 0.2, 0.2), (0.2, 0.65, 0.3), (0.2, 0.4, 0.85))
    )  # of the faces across x, y, z
    colours = paint[np.abs(normals).argmax(1)]
    colours = np.where(
        normals.sum(1, keepdims=True) < 0, 0.45 * colours + 0.55, colours
    )  # the opposite ones paler
    solids.append((surface, normals, colours, p[0], q[0]))
    away = p.new_tensor((0.13, 0.66, 0.0))
    solids.append((0.6 * surface, normals, colours, away, goal))
    return draw_solids(size, (-0.16, 0.42, -0.06), (0.18, 0.72, 0.2), 0.44, solids)
