"""RollingFlat, FluidMove and HandFlip: particles that a robot flattens, carries and folds.

The published tasks (SAPO, Xing et al. 2025, arXiv 2412.12089), compared with their authors'
package, `rewarped` 1.3.3, in tests/test_rewarped_original.py. Each class numbers its differences;
these are all three's:
1. Random numbers are our own, and not rounded to three digits: in the block, the water and the disk
   of `full` the particles lie elsewhere, and as evenly.
2. A joint stops at its limit with a gradient that knows it (see `MPMEnv.physics`).
3. Colliders move with their velocity; the original takes the difference of two poses, which is the
   same but for a turn within a substep. At a node the first four colliders in reach act, there all
   of them.
4. Plasticine yields where its strain reaches the yield strain; there 1e-5 before.
5. `small` is the same task through the same code on a coarser grid, with fewer and larger substeps,
   its particles in a lattice, so that two CPU cores can learn it.

Time is the material's own: a step of RollingFlat and HandFlip is 2 ms under a gravity of 90, one of
FluidMove 20 ms under 9.8.
"""

import math

import torch

from envs.rewarped import mpm
from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.kinematics import Joint, Shape, Tree, turn_to


def block(size, counts: tuple[int, int, int], even: bool) -> torch.Tensor:
    """Points (P, 3) in a box of this size around the origin: a lattice, or as many random ones,
    always the same."""
    if even:
        x, y, z = ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5 for n in counts)
        places = torch.cartesian_prod(x, y, z)
    else:
        g = torch.Generator().manual_seed(0)
        places = torch.rand(math.prod(counts), 3, generator=g, dtype=torch.float64) - 0.5
    return places * torch.tensor(size, dtype=torch.float64)


class MPMEnv(DifferentiableEnv):
    """A robot of colliders that follows joint targets exactly, and one material. See
    DifferentiableEnv.

    SIZES      per size: grid, dt, substeps, steps of an episode, particles observed, and what the task needs
    MATERIAL   arguments of mpm.MPM
    SCALE      (A,) change of each joint in a step at |action| = 1
    START      (A,) joints at the start of an episode; set by `tree` where it depends on the size
    State: x, v, C, F of the particles, joints (N, A), and what a task adds.
    """

    SIZES: dict[str, dict]
    MATERIAL: dict
    SCALE: tuple[float, ...]
    START: tuple[float, ...]
    GRAPH_ON_CPU = False  # without a graph the host knows how many nodes are touched, and leaves out the empty ones
    HOLLOW = False  # draw only the edges of colliders

    def tree(self) -> Tree:
        """The robot; this and the next two are each task's own."""
        raise NotImplementedError

    def spawn(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Positions of particles (N, P, 3) at the start of an episode, and the task's own part of
        the state."""
        raise NotImplementedError

    def body(self) -> torch.Tensor:
        """Particles (P, 3) before noise."""
        raise NotImplementedError

    def setup(self) -> None:
        s = self.s = self.SIZES[self.size]
        self.floor, self.max_episode_steps = mpm.WALL / s["grid"], s["steps"]
        self.robot, self.particles0 = self.tree(), self.body().to(self.device, self.dtype)
        self.sim = mpm.MPM(
            self.num_envs,
            len(self.particles0),
            grid=s["grid"],
            dt=s["dt"],
            substeps=s["substeps"],
            colliders=[(shape.kind, shape.size) for shape in self.robot.shapes],
            device=self.device,
            dtype=self.dtype,
            checkpoint=self.checkpoint,
            window=self.window,
            graph=self.graph,
            **self.MATERIAL,
        )
        self.action_dim, self.control_hz = len(self.SCALE), 1 / (s["dt"] * s["substeps"])
        self.scale = torch.tensor(self.SCALE, device=self.device, dtype=self.dtype)
        self.phase = (torch.arange(s["substeps"], device=self.device) / s["substeps"]).to(
            self.dtype
        )[:, None, None]
        # Always the same particles are observed: every tenth of 2592, say.
        every = len(self.particles0) // s["observed"]
        self.observed = every * torch.arange(s["observed"], device=self.device)
        # Tensors of the state that a fresh episode has in common with every other.
        state = self.observe(self.fresh())
        self.obs_dims = {name: tuple(value.shape[1:]) for name, value in state.items()}

    def fresh(self) -> dict[str, torch.Tensor]:
        x, extra = self.spawn()
        start = torch.tensor(self.START, device=self.device, dtype=self.dtype)
        joints = start.repeat(self.num_envs, 1)
        return {**mpm.at_rest(x)._asdict(), "joints": joints, **extra}

    def physics(self, state, actions):
        q = state["joints"]
        # differs (2): the room that is left depends on q. The original detaches q here: then a
        # joint that stops at its limit passes on a gradient that is not there, 1 % of that of four
        # steps of HandFlip.
        move = torch.minimum(
            torch.maximum(actions * self.scale, self.robot.low - q), self.robot.high - q
        )
        path = q + move * self.phase  # (S, N, A): joints at the start of each substep
        speed = (move / (self.sim.dt * self.sim.substeps)).expand_as(path)
        particles = self.sim.step(
            mpm.Particles(*(state[k] for k in "xvCF")), self.robot(path, speed)
        )
        return {**state, **particles._asdict(), "joints": q + move}

    def observe(self, state):
        points = state["x"][:, self.observed]
        low_dim = (state["joints"], *self.goal(state), points.mean(1))
        return {"state": torch.cat(low_dim, 1), "points": points}

    def goal(self, state) -> tuple[torch.Tensor, ...]:
        """What the observation "state" holds between joints and the mean of the points."""
        return ()

    def shapes(self, world: int):
        """(kind, size, position, rotation) of each collider of an environment, for drawing."""
        with torch.no_grad():
            poses = self.robot(
                self.state["joints"][world], torch.zeros_like(self.state["joints"][world])
            )
        return [
            (shape.kind, shape.size, p.cpu().numpy(), R.cpu().numpy())
            for shape, p, R in zip(self.robot.shapes, poses.pos, poses.rot, strict=True)
        ]

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        return render.draw(self, world, size)


class RollingFlat(MPMEnv):
    """Flatten a block of plasticine with a rolling pin that moves along x and y and turns about y.

    Observation: joints 3, mean of the points 3; points. Reward, with h a point's height and d its
    mean over a reference:
        paper     (1 / (1 + d))^2, doubled where d <= 0.33; minus the variance of h;   d = mean(h) / 0.125
        default   the same, but h counts from the floor and d = mean(h) / 0.0625, and the doubling comes smoothly,
                  as 1 + sigmoid((0.33 - d) / 0.05)
    As published, h counts from the bottom of the grid, three cells below the floor, so that d stays
    above 0.5 and the doubling is out of reach. As published too: the pin turns about an axis half a
    metre beside its middle, its lowest is a radius above the floor, and the noise of a block's size
    moves it, since it is about the origin.
    """

    SIZES = {
        "full": dict(
            grid=48,
            dt=5e-5,
            substeps=40,
            steps=300,
            observed=250,
            counts=(18, 8, 18),
            radius=0.03,
        ),
        "small": dict(
            grid=24,
            dt=2e-4,
            substeps=10,
            steps=100,
            observed=64,
            counts=(9, 4, 9),
            radius=0.045,
        ),
    }
    MATERIAL = dict(
        material="plasticine",
        young=5000.0,
        poisson=0.2,
        yield_stress=50.0,
        gravity=-90.0,
        friction=0.9,
        ground_friction=500.0,
    )
    SCALE = (0.01, 0.01, math.pi / 60)
    HEIGHT, LENGTH = 0.125, 0.4  # of the block, of the pin

    def tree(self):
        radius = self.s["radius"]
        side, low, turn = 4 * radius, self.floor + 2 * radius, 0.66 * math.pi
        self.START = (0.5, low + 0.66 * 0.25, 0.0)
        joints = [
            Joint("x", -1, "slide", (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), side, 1 - side),
            Joint("y", 0, "slide", (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), low, low + 0.25),
            Joint("yaw", 1, "hinge", (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), -turn, turn),
        ]
        middle, along = (0.0, 0.0, 0.5), turn_to((0.0, 0.0, 1.0))
        pin, handles = (self.LENGTH / 2, radius), (0.75 * self.LENGTH, 0.4 * radius)
        shapes = [Shape(2, mpm.CAPSULE, size, middle, along) for size in (pin, handles)]
        return Tree(joints, shapes, self.device, self.dtype)

    def body(self):
        middle = torch.tensor((0.5, self.floor + 0.7 * self.HEIGHT, 0.5), dtype=torch.float64)
        return block((0.3, self.HEIGHT, 0.3), self.s["counts"], self.size == "small") + middle

    def spawn(self):
        scale = self.uniform(0.9, 1.1, 1, 1)
        return (
            self.particles0 + self.uniform((-0.1, 0.0, -0.1), (0.1, 0.05, 0.1), 1, 3)
        ) * scale, {}

    def reward(self, state, actions):
        h = state["x"][:, self.observed, 1]
        if self.reward_name == "paper":
            d = h.mean(1) / self.HEIGHT
            bonus = 1.0 + (d <= 0.33).to(d.dtype)
        else:
            d = (h.mean(1) - self.floor).clamp_min(0) / 0.0625
            bonus = 1.0 + torch.sigmoid((0.33 - d) / 0.05)
        rewards = (1 / (1 + d)) ** 2 * bonus - h.var(1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)


class FluidMove(MPMEnv):
    """Carry water in an open box to a target without spilling.

    Observation: joints 3, target 3, mean of the points 3; points. Reward, with d the distance of
    the box to the target, x a point in the box's frame, and b half extents of the box's outer faces
    (above, half a wall more than the rim):
        0.1 (1 / (1 + d^2))^2, doubled where d <= 0.02; minus the mean over points of
        max over axes of sigmoid((|x| - b) / T)
        paper     T = 1e-5: a step function, which has no usable gradient
        default   T = 0.005, half a particle's spacing; the doubling comes smoothly, as 1 + sigmoid((0.02 - d) / 0.01)
    As published, the box starts a centimetre below its lowest place: its first step lifts it.
    6. `small` has a larger box, with walls three cells thick: a particle feels nodes up to 1.5
       cells away, and in a thinner wall those beyond its middle, where the nearest face is the
       outer one, would let it through.
    """

    HOLLOW = True
    SIZES = {
        "full": dict(
            grid=48,
            dt=5e-4,
            substeps=40,
            steps=300,
            observed=250,
            counts=(16, 9, 20),
            box=(0.18, 0.16, 0.22),
            wall=0.05,
            water=(0.16, 0.094, 0.2),
            start=(0.5, 0.15, 0.5),
            low=(0.18, 0.16, 0.22),
            high=(0.82, 0.84, 0.78),
        ),
        "small": dict(
            grid=24,
            dt=2e-3,
            substeps=10,
            steps=100,
            observed=64,
            counts=(7, 5, 7),
            box=(0.25, 0.22, 0.25),
            wall=0.125,
            water=(0.206, 0.147, 0.206),
            start=(0.5, 0.285, 0.5),
            low=(0.25, 0.285, 0.25),
            high=(0.75, 0.635, 0.75),
        ),
    }
    MATERIAL = dict(
        material="fluid",
        young=1e5,
        poisson=0.3,
        density=1000.0,
        gravity=-9.8,
        friction=0.5,
        ground_friction=0.0,
    )
    SCALE = (0.01, 0.01, 0.01)

    def tree(self):
        s = self.s
        (length, height, width), t, self.START = s["box"], s["wall"], s["start"]
        outer = (length / 2 + t, height / 2 + t / 2, width / 2 + t)
        self.outer = torch.tensor(outer, device=self.device, dtype=self.dtype)
        axes, joints = torch.eye(3).tolist(), []
        for i, name in enumerate("xyz"):
            nowhere, axis = (0.0, 0.0, 0.0), tuple(axes[i])
            joints.append(Joint(name, i - 1, "slide", nowhere, axis, s["low"][i], s["high"][i]))
        shapes = [((0.0, -(height + t) / 2, 0.0), (outer[0], t / 2, outer[2]))]  # the bottom
        for side in (-1, 1):  # walls and bottom overlap
            away = (side * (length + t) / 2, -t / 2, 0.0)
            shapes.append((away, (t / 2, (height + t) / 2, outer[2])))
        for side in (-1, 1):
            away = (0.0, -t / 2, side * (width + t) / 2)
            shapes.append((away, (outer[0], (height + t) / 2, t / 2)))
        walls = [Shape(2, mpm.BOX, size, away) for away, size in shapes]
        return Tree(joints, walls, self.device, self.dtype)

    def body(self):
        water = block(self.s["water"], self.s["counts"], self.size == "small")
        return water + torch.tensor(self.START, dtype=torch.float64)

    def spawn(self):
        x = self.particles0.expand(self.num_envs, -1, -1).clone()
        start = torch.tensor(self.START, device=self.device, dtype=self.dtype)
        return x, {"target": start + self.uniform((-0.2, 0.0, -0.2), (0.2, 0.3, 0.2), 3)}

    def goal(self, state):
        return (state["target"],)

    def reward(self, state, actions):
        d = torch.sqrt((state["joints"] - state["target"]).square().sum(1) + 1e-12)
        points = state["x"][:, self.observed]
        out = (points - state["joints"][:, None]).abs() - self.outer  # (N, P, 3)
        if self.reward_name == "paper":
            bonus, sharp = 1.0 + (d <= 0.02).to(d.dtype), 1e-5
        else:
            bonus, sharp = 1.0 + torch.sigmoid((0.02 - d) / 0.01), 0.005
        spilled = torch.sigmoid(out / sharp).amax(2).mean(1)
        rewards = 0.1 * (1 / (1 + d * d)) ** 2 * bonus - spilled
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)


# The Shadow hand's published joints, limits, bones and shapes, in metres and in a frame whose z is
# along the stretched fingers and whose y looks out of the back of the hand. Bone: number of the
# parent's joint, way from it, then (axis, limits, start) of its joint. Shapes: number of the joint,
# kind, size, middle, axis of a capsule.
ACROSS, BACK, ALONG = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
STILL = (0.0, 0.0, 0.0)
KNUCKLE, BEND = (-0.349, 0.349), (0.0, 1.571)
FIRST, SECOND = (0.0, 0.0, 0.045), (0.0, 0.0, 0.025)  # bones of a finger
LEAN = math.sqrt(0.5)  # the thumb points 45 degrees to the side
OUT = (LEAN, 0.0, LEAN)
SHADOW = (
    ("WRJ1", -1, STILL, BACK, (-0.489, 0.140), -0.165143),
    ("WRJ0", 0, (0.0, 0.0, 0.034), ACROSS, (-0.698, 0.489), -0.319733),
    ("FFJ3", 1, (0.033, 0.0, 0.095), BACK, KNUCKLE, 0.143405),
    ("FFJ2", 2, STILL, ACROSS, BEND, 0.320282),
    ("FFJ1", 3, FIRST, ACROSS, BEND, 0.712605),
    ("FFJ0", 4, SECOND, ACROSS, BEND, 0.670528),
    ("MFJ3", 1, (0.011, 0.0, 0.099), BACK, KNUCKLE, 0.000246),
    ("MFJ2", 6, STILL, ACROSS, BEND, 0.315266),
    ("MFJ1", 7, FIRST, ACROSS, BEND, 0.765980),
    ("MFJ0", 8, SECOND, ACROSS, BEND, 0.732316),
    ("RFJ3", 1, (-0.011, 0.0, 0.095), BACK, KNUCKLE, 0.000385),
    ("RFJ2", 10, STILL, ACROSS, BEND, 0.367435),
    ("RFJ1", 11, FIRST, ACROSS, BEND, 0.711952),
    ("RFJ0", 12, SECOND, ACROSS, BEND, 0.669945),
    ("LFJ4", 1, (-0.017, 0.0, 0.044), (0.570977, 0.0, 0.820966), (0.0, 0.785), 0.052544),
    ("LFJ3", 14, (-0.017, 0.0, 0.044), BACK, KNUCKLE, -0.136155),
    ("LFJ2", 15, STILL, ACROSS, BEND, 0.398720),
    ("LFJ1", 16, FIRST, ACROSS, BEND, 0.741557),
    ("LFJ0", 17, SECOND, ACROSS, BEND, 0.704096),
    ("THJ4", 1, (0.034, -0.009, 0.029), (-LEAN, 0.0, -LEAN), (-1.047, 1.047), 0.003674),
    ("THJ3", 19, STILL, (LEAN, 0.0, -LEAN), (0.0, 1.222), 0.550629),
    ("THJ2", 20, (0.038 * LEAN, 0.0, 0.038 * LEAN), (LEAN, 0.0, -LEAN), (-0.209, 0.209), -0.014515),
    ("THJ1", 21, STILL, BACK, (-0.524, 0.524), -0.001523),
    ("THJ0", 22, (0.032 * LEAN, 0.0, 0.032 * LEAN), BACK, (-1.571, 0.0), -0.789488),
)
PHALANGES = (((0.0175, 0.01), 0.0225), ((0.008475, 0.00805), 0.0125), ((0.008475, 0.00705), 0.012))
SHAPES = [
    (0, mpm.CAPSULE, (0.0025, 0.015), STILL, BACK),
    (1, mpm.BOX, (0.032, 0.0111, 0.049), (0.011, 0.0, 0.038), BACK),
    (1, mpm.BOX, (0.011, 0.0111, 0.025), (-0.032, 0.0, 0.014), BACK),
    (14, mpm.BOX, (0.0095, 0.0111, 0.025), (-0.0165, 0.0, 0.01), BACK),
]
for knuckle in (2, 6, 10, 15):
    for n, (size, middle) in enumerate(PHALANGES):
        SHAPES.append((knuckle + 1 + n, mpm.CAPSULE, size, (0.0, 0.0, middle), ALONG))
for link, size, middle in (
    (20, (0.0125, 0.013), 0.019),
    (22, (0.0105, 0.011), 0.016),
    (23, (0.00841, 0.00918), 0.013),
):
    SHAPES.append((link, mpm.CAPSULE, size, (LEAN * middle, 0.0, LEAN * middle), OUT))
SHAPES.sort(key=lambda shape: shape[0])  # colliders act in this order


def shadow_hand(wrist: tuple[float, float, float], enlarge: float, device, dtype) -> Tree:
    """A right hand of 24 joints, palm up (y), fingers along z, thumb towards -x."""

    def turned(vector, scale: float = 1.0):
        """By half a turn about z, from the hand's frame to the world's."""
        x, y, z = vector
        return (-scale * x, -scale * y, scale * z)

    joints, shapes = [], []
    for name, parent, way, axis, (low, high), _ in SHADOW:
        offset = wrist if parent < 0 else turned(way, enlarge)
        joints.append(Joint(name, parent, "hinge", offset, turned(axis), low, high))
    for link, kind, size, middle, along in SHAPES:
        size = tuple(enlarge * v for v in size)
        shapes.append(Shape(link, kind, size, turned(middle, enlarge), turn_to(turned(along))))
    return Tree(joints, shapes, device, dtype)


class HandFlip(MPMEnv):
    """Fold a disk of plasticine in the palm of a Shadow hand: bring each half onto the other.

    Observation: joints 24, mean of the points 3; points, of which the second half mirrors the first
    at the middle of the disk. Reward: clamp((d0 - d) / d0, -1, 1), with d the mean distance of a
    point to its mirror image.
        paper     d0 is the d after an episode's first step, whose reward is 0 by that
        default   d0 is the d before it, so that the first step counts as well
    6. `small` has a thicker disk.
    """

    SIZES = {
        "full": dict(
            grid=48, dt=5e-5, substeps=40, steps=300, observed=250, particles=2500, thick=0.006
        ),
        "small": dict(
            grid=24, dt=2e-4, substeps=10, steps=100, observed=64, particles=256, thick=0.03
        ),
    }
    MATERIAL = dict(
        material="plasticine",
        young=4000.0,
        poisson=0.2,
        yield_stress=130.0,
        gravity=-90.0,
        friction=0.5,
        ground_friction=500.0,
    )
    SCALE = (0.0264,) * 24
    START = tuple(joint[-1] for joint in SHADOW)
    RADIUS, WRIST, ENLARGE = 0.1, (0.5, 0.275, 0.3), 2.5
    MIDDLE = (0.5, 0.38, 0.6)  # of the disk

    def tree(self):
        return shadow_hand(self.WRIST, self.ENLARGE, self.device, self.dtype)

    def body(self):
        """Half a disk, sorted by the distance to its straight edge, then its mirror image in the
        same order."""
        count, layers = self.s["particles"] // 2, 2
        if self.size == "small":  # layers, evenly filled by the golden ratio
            i = torch.arange(count // layers, dtype=torch.float64).repeat(layers)
            share, turn = (i + 0.5) / (count // layers), i * (math.sqrt(5) - 1) / 2 % 1
            height = (torch.arange(layers).repeat_interleave(count // layers) + 0.5) / layers
        else:
            g = torch.Generator().manual_seed(0)
            share, turn, height = torch.rand(3, count, generator=g, dtype=torch.float64)
        radius, angle = self.RADIUS * share.sqrt(), math.pi * turn
        x, z = radius * angle.cos(), radius * angle.sin()
        half = torch.stack((x, (height - 0.5) * self.s["thick"], z), 1)[z.argsort()]
        disk = torch.cat((half, half * torch.tensor((1.0, 1.0, -1.0))))
        return disk + torch.tensor(self.MIDDLE, dtype=torch.float64)

    def spawn(self):
        scale = self.uniform(0.95, 1.05, 1, 1)
        x = (self.particles0 + self.uniform((-0.1, 0.0, -0.1), (0.1, 0.1, 0.1), 1, 3)) * scale
        begun = torch.zeros(self.num_envs, device=self.device, dtype=self.dtype)
        return x, {"d0": self.gap(x), "begun": begun}

    def gap(self, x: torch.Tensor) -> torch.Tensor:
        """Mean distance (N,) of the points of the first half to their mirror images."""
        first, second = x[:, self.observed].chunk(2, 1)
        return (first - second).square().sum(2).add(1e-12).sqrt().mean(1)

    def physics(self, state, actions):
        new = super().physics(state, actions)
        if self.reward_name == "paper":
            new["d0"] = torch.where(state["begun"] > 0, state["d0"], self.gap(new["x"]).detach())
        new["begun"] = torch.ones_like(state["begun"])
        return new

    def reward(self, state, actions):
        rewards = ((state["d0"] - self.gap(state["x"])) / state["d0"]).clamp(-1, 1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)
