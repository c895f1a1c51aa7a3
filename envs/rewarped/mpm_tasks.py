"""RollingFlat, FluidMove and HandFlip: particles that a robot flattens, carries and folds.

Sizes of actions, materials, noise, observations, rewards and lengths are the published ones (SAPO, Xing et al. 2025,
arXiv 2412.12089). What is not published, or not ours to take, is ours and said in each class. `size="small"` is the
same task through the same code on a coarser grid, with fewer and larger substeps, so that two CPU cores can learn it.

Time is the material's own: a step of RollingFlat and HandFlip is 2 ms under a gravity of 90, one of FluidMove 20 ms
under 9.8.
"""

import math

import torch

from envs.rewarped import mpm
from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.kinematics import Joint, Shape, Tree, turn_to


def lattice(counts: tuple[int, int, int], spacing: float) -> torch.Tensor:
    """Points (P, 3) of a block that stands on y = 0 with its middle at x = z = 0."""
    x, y, z = (torch.arange(n, dtype=torch.float64) + 0.5 for n in counts)
    points = torch.cartesian_prod(x - counts[0] / 2, y, z - counts[2] / 2)
    return points * spacing


def spread(total: int, wanted: int) -> torch.Tensor:
    """Indices (wanted,) spread evenly over range(total): always the same particles are observed."""
    return torch.div(torch.arange(wanted) * total, wanted, rounding_mode="floor")


class MPMEnv(DifferentiableEnv):
    """A robot of colliders that follows joint targets exactly, and one material. See DifferentiableEnv.

    SIZES      per size: grid, dt, substeps, steps of an episode, particles observed, and what the task needs
    MATERIAL   arguments of mpm.MPM
    SCALE      (A,) change of each joint in a step at |action| = 1
    State: x, v, C, F of the particles, joints (N, A), and what a task adds.
    """

    SIZES: dict[str, dict]
    MATERIAL: dict
    SCALE: tuple[float, ...]
    GRAPH_ON_CPU = False  # without a graph the host knows how many nodes are touched, and leaves out the empty ones
    HOLLOW = False  # draw only the edges of colliders

    def tree(self) -> Tree:
        """The robot; this and the next two are each task's own."""
        raise NotImplementedError

    def spawn(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Positions of particles (N, P, 3) at the start of an episode, and the task's own part of the state."""
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
        self.observed = self.observed_particles().to(self.device)
        # Tensors of the state that a fresh episode has in common with every other.
        state = self.observe(self.fresh())
        self.obs_dims = {name: tuple(value.shape[1:]) for name, value in state.items()}

    def observed_particles(self) -> torch.Tensor:
        """Indices of the particles in the observation "points"."""
        return spread(len(self.particles0), self.s["observed"])

    def fresh(self) -> dict[str, torch.Tensor]:
        x, extra = self.spawn()
        joints = torch.zeros(self.num_envs, self.action_dim, device=self.device, dtype=self.dtype)
        return {**mpm.at_rest(x)._asdict(), "joints": joints, **extra}

    def detach(self) -> None:
        self.sim.detach()
        super().detach()

    def physics(self, state, actions):
        q = state["joints"]
        # The room that is left depends on q. As published q is detached here: then a joint that stops at its limit
        # passes on a gradient that is not there, 1 % of that of four steps of HandFlip.
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
        low_dim = (state["joints"], *self.goal(state), state["x"].mean(1))
        return {"state": torch.cat(low_dim, 1), "points": state["x"][:, self.observed]}

    def goal(self, state) -> tuple[torch.Tensor, ...]:
        """What the observation "state" holds between joints and centre of mass."""
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

    Observation: joints 3, centre of mass 3; points. Reward, with h a particle's height and d its mean over a reference:
        paper     (1 / (1 + d))^2, doubled where d <= 0.33; minus the variance of h;   d = mean(h) / 0.125
        default   the same, but h counts from the floor and d = mean(h) / 0.0625, and the doubling comes smoothly,
                  as 1 + sigmoid((0.33 - d) / 0.05)
    As published, h counts from the bottom of the grid, three cells below the floor, so that d stays above 0.5 and the
    doubling is out of reach. Ours: the pin starts above the highest block that noise makes; its range.
    """

    SIZES = {
        "full": dict(
            grid=48,
            dt=5e-5,
            substeps=40,
            steps=300,
            observed=250,
            counts=(18, 8, 18),
            spacing=1 / 64,
            pin=(0.3, 0.03),
        ),
        "small": dict(
            grid=24,
            dt=2e-4,
            substeps=10,
            steps=100,
            observed=64,
            counts=(9, 4, 9),
            spacing=1 / 32,
            pin=(0.3, 0.045),
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

    def tree(self):
        length, radius = self.s["pin"]
        start = self.floor + 0.19 + radius
        lowest = self.floor + radius + 0.01 - start
        joints = [
            Joint("x", -1, "slide", (0.5, start, 0.5), (1.0, 0.0, 0.0), -0.3, 0.3),
            Joint("y", 0, "slide", (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), lowest, 0.2),
            Joint("yaw", 1, "hinge", (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), -math.pi, math.pi),
        ]
        pin = Shape(2, mpm.CAPSULE, (length / 2, radius), turn=turn_to((0.0, 0.0, 1.0)))
        return Tree(joints, [pin], self.device, self.dtype)

    def body(self):
        return lattice(self.s["counts"], self.s["spacing"])

    def spawn(self):
        scale = self.uniform(0.9, 1.1, 1, 1)
        where = self.uniform((0.4, self.floor, 0.4), (0.6, self.floor + 0.05, 0.6), 1, 3)
        return self.particles0 * scale + where, {}

    def reward(self, state, actions):
        h = state["x"][..., 1]
        if self.reward_name == "paper":
            d = h.mean(1) / 0.125
            bonus = 1.0 + (d <= 0.33).to(d.dtype)
        else:
            d = (h.mean(1) - self.floor).clamp_min(0) / 0.0625
            bonus = 1.0 + torch.sigmoid((0.33 - d) / 0.05)
        rewards = (1 / (1 + d)) ** 2 * bonus - h.var(1)
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)


class FluidMove(MPMEnv):
    """Carry water in an open box to a target without spilling.

    Observation: joints 3, target 3, centre of mass 3; points. Reward, with d the distance from centre of mass to
    target, x a particle in the box's frame and b half extents of the box:
        0.1 (1 / (1 + d^2))^2, doubled where d <= 0.02; minus the mean over particles of
        max over axes of sigmoid((|x| - b) / T)
        paper     T = 1e-5: a step function, which has no usable gradient
        default   T = 0.01, about a particle's spacing; the doubling comes smoothly, as 1 + sigmoid((0.02 - d) / 0.01)
    Ours: the box and how the water stands in it; the target is one for the water's centre of mass; b is what the box
    holds and 3 cm more. The box's walls are three cells thick: a particle feels nodes up to 1.5 cells away, and in a
    thinner wall those beyond its middle, where the nearest face is the outer one, would let it through.
    """

    MARGIN, HOLLOW = 0.03, True

    SIZES = {
        "full": dict(
            grid=48,
            dt=5e-4,
            substeps=40,
            steps=300,
            observed=250,
            counts=(16, 12, 15),
            spacing=1 / 80,
            inner=(0.11, 0.11, 0.105),
        ),
        "small": dict(
            grid=24,
            dt=2e-3,
            substeps=10,
            steps=100,
            observed=64,
            counts=(7, 5, 7),
            spacing=1 / 34,
            inner=(0.125, 0.11, 0.125),
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
        (a, h, b), t = self.s["inner"], 1.5 * 1 / self.s["grid"]  # half of a wall's thickness
        self.outer = torch.tensor((a, h, b), device=self.device, dtype=self.dtype) + self.MARGIN
        self.start = (0.5, self.floor + h + 0.05, 0.5)
        joints = [
            Joint("x", -1, "slide", self.start, (1.0, 0.0, 0.0), -0.25, 0.25),
            Joint("y", 0, "slide", (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), 0.0, 0.35),
            Joint("z", 1, "slide", (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), -0.25, 0.25),
        ]
        A, B = a + 2 * t, b + 2 * t
        walls = [
            ((0.0, -h - t, 0.0), (A, t, B))
        ]  # walls and bottom overlap: between them nothing gets out
        walls += [((side * (a + t), -t, 0.0), (t, h + t, B)) for side in (-1, 1)]
        walls += [((0.0, -t, side * (b + t)), (A, h + t, t)) for side in (-1, 1)]
        return Tree(
            joints,
            [Shape(2, mpm.BOX, size, offset) for offset, size in walls],
            self.device,
            self.dtype,
        )

    def body(self):
        inner = self.s["inner"][1]
        return (
            lattice(self.s["counts"], self.s["spacing"])
            + torch.tensor(self.start)
            - torch.tensor((0, inner, 0))
        )

    def spawn(self):
        x = self.particles0.expand(self.num_envs, -1, -1).clone()
        return x, {"target": x.mean(1) + self.uniform((-0.2, 0.0, -0.2), (0.2, 0.3, 0.2), 3)}

    def goal(self, state):
        return (state["target"],)

    def reward(self, state, actions):
        d = torch.sqrt((state["x"].mean(1) - state["target"]).square().sum(1) + 1e-12)
        box = state["joints"] + torch.tensor(self.start, device=self.device, dtype=self.dtype)
        out = (state["x"] - box[:, None]).abs() - self.outer  # (N, P, 3)
        if self.reward_name == "paper":
            bonus, sharp = 1.0 + (d <= 0.02).to(d.dtype), 1e-5
        else:
            bonus, sharp = 1.0 + torch.sigmoid((0.02 - d) / 0.01), 0.01
        spilled = torch.sigmoid(out / sharp).amax(2).mean(1)
        rewards = 0.1 * (1 / (1 + d * d)) ** 2 * bonus - spilled
        return rewards, torch.zeros_like(rewards, dtype=torch.bool)


def shadow_hand(wrist: tuple[float, float, float], enlarge: float, device, dtype) -> Tree:
    """A right hand of 24 joints from capsules and one box, palm up (y), fingers along z, thumb towards -x.

    Joints, their limits and the lengths of the bones are the published ones of the Shadow hand, enlarged; the shapes
    are ours, so that no mesh is needed.
    """
    across, along, up = (
        (-1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 0.0),
    )  # across: towards the thumb
    joints, shapes = [], []

    def at(a: float, b: float, c: float = 0.0):
        """Metres across, along and up, of the real hand, to a vector of the enlarged one."""
        return tuple(enlarge * v for v in (-a, c, b))

    def joint(name, parent, offset, axis, low, high):
        joints.append(Joint(name, parent, "hinge", offset, tuple(axis), low, high))
        return len(joints) - 1

    def bone(link, direction, length, radius):
        d = torch.tensor(direction) * enlarge * length / 2
        size = (enlarge * length / 2, enlarge * radius)
        shapes.append(Shape(link, mpm.CAPSULE, size, tuple(d.tolist()), turn_to(direction)))

    def finger(name, parent, offset, knuckle=(-0.349, 0.349)):
        link = joint(f"{name}J4", parent, offset, up, *knuckle)
        for number, length, reach in ((3, 0.045, 0.0), (2, 0.025, 0.045), (1, 0.026, 0.025)):
            link = joint(f"{name}J{number}", link, at(0.0, reach), across, 0.0, 1.571)
            bone(link, along, length, 0.009)

    link = joint("WRJ2", -1, wrist, up, -0.489, 0.140)
    palm = joint("WRJ1", link, at(0.0, 0.010), across, -0.698, 0.489)
    shapes.append(
        Shape(
            palm, mpm.BOX, tuple(enlarge * v for v in (0.042, 0.011, 0.045)), at(0.0, 0.079 - 0.034)
        )
    )
    finger("FF", palm, at(0.033, 0.095))
    finger("MF", palm, at(0.011, 0.099))
    finger("RF", palm, at(-0.011, 0.095))
    little = joint("LFJ5", palm, at(-0.033, 0.021), (-0.571, 0.0, 0.821), 0.0, 0.785)
    finger("LF", little, at(0.0, 0.066))
    out = (-math.sqrt(0.5), 0.0, math.sqrt(0.5))  # of the stretched thumb
    bend = (-math.sqrt(0.5), 0.0, -math.sqrt(0.5))  # turns `out` upwards, over the palm
    thumb = joint("THJ5", palm, at(0.034, 0.029, 0.009), out, -1.047, 1.047)
    thumb = joint("THJ4", thumb, (0.0, 0.0, 0.0), bend, 0.0, 1.222)
    bone(thumb, out, 0.038, 0.010)
    next_bone = tuple(enlarge * 0.038 * v for v in out)
    thumb = joint("THJ3", thumb, next_bone, bend, -0.209, 0.209)
    thumb = joint("THJ2", thumb, (0.0, 0.0, 0.0), (0.0, -1.0, 0.0), -0.524, 0.524)
    bone(thumb, out, 0.032, 0.010)
    thumb = joint(
        "THJ1", thumb, tuple(enlarge * 0.032 * v for v in out), (0.0, -1.0, 0.0), -1.571, 0.0
    )
    bone(thumb, out, 0.0275, 0.009)
    return Tree(joints, shapes, device, dtype)


class HandFlip(MPMEnv):
    """Fold a disk of plasticine in the palm of a Shadow hand: bring each half onto the other.

    Observation: joints 24, centre of mass 3; points, of which the second half mirrors the first at the middle of the
    disk. Reward: clamp((d0 - d) / d0, -1, 1), with d the mean distance of a point to its mirror image.
        paper     d0 is the d after an episode's first step, whose reward is 0 by that
        default   d0 is the d before it, so that the first step counts as well
    Ours: the hand's shapes (see `shadow_hand`) and how its palm and the disk lie; the disk's thickness.
    """

    SIZES = {
        "full": dict(
            grid=48, dt=5e-5, substeps=40, steps=300, observed=250, layers=5, layer=250, thick=0.02
        ),
        "small": dict(
            grid=24, dt=2e-4, substeps=10, steps=100, observed=64, layers=2, layer=64, thick=0.03
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
    RADIUS, WRIST, ENLARGE = 0.1, (0.5, 0.30, 0.26), 2.5

    def tree(self):
        return shadow_hand(self.WRIST, self.ENLARGE, self.device, self.dtype)

    def body(self):
        """Layers of half disks, evenly filled by the golden ratio, then their mirror images in the same order."""
        s = self.s
        i = torch.arange(s["layer"], dtype=torch.float64)
        radius, angle = (
            self.RADIUS * ((i + 0.5) / s["layer"]).sqrt(),
            math.pi * ((i * (math.sqrt(5) - 1) / 2) % 1),
        )
        x, z = radius * angle.cos(), radius * angle.sin()
        heights = (torch.arange(s["layers"]) + 0.5) / s["layers"] * s["thick"]
        half = torch.cat([torch.stack((x, torch.full_like(x, h), z), 1) for h in heights.tolist()])
        return torch.cat((half, half * torch.tensor((1.0, 1.0, -1.0))))

    def observed_particles(self):
        half = len(self.particles0) // 2
        first = spread(half, self.s["observed"] // 2)
        return torch.cat((first, first + half))

    def spawn(self):
        scale = self.uniform(0.95, 1.05, 1, 1)
        where = self.uniform((-0.1, 0.0, -0.1), (0.1, 0.1, 0.1), 1, 3)
        above = (
            self.WRIST[0],
            self.WRIST[1] + self.ENLARGE * 0.011 + 0.01,
            self.WRIST[2] + self.ENLARGE * 0.105,
        )
        x = (
            self.particles0 * scale
            + where
            + torch.tensor(above, device=self.device, dtype=self.dtype)
        )
        begun = torch.zeros(self.num_envs, device=self.device, dtype=self.dtype)
        return x, {"d0": self.gap(x), "begun": begun}

    def gap(self, x: torch.Tensor) -> torch.Tensor:
        """Mean distance (N,) of the observed particles of the first half to their mirror images."""
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
