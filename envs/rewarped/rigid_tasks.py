"""AntRun: a four-legged ant with eight hinges learns to run. HandReorient: a hand with sixteen turns a cube.

Sizes of actions, noise, observations, rewards and lengths are the published ones (SAPO, Xing et al. 2025, arXiv
2412.12089). The published simulation has joint coordinates; ours has stiff hinges: see rigid.py.
"""

import math

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.rigid import Body, Box, Hinge, Rigid, Sphere, Springs, about, multiply, rotate

# ------------------------------------------------------------------------------------------------- AntRun ------------
DENSITY, LIGHT = 1000.0, 5.0  # of the capsules and of the torso's ball, kg/m^3
TORSO, LEG = 0.25, 0.08  # radii, metres
REACH, THIGH, SHIN = (
    0.2 * math.sqrt(2),
    0.2 * math.sqrt(2),
    0.4 * math.sqrt(2),
)  # torso to hip, hip to knee, to foot
YAW = tuple(math.radians(45 + 90 * i) for i in range(4))  # of the legs
ARMATURE = 0.005  # kg m^2, of a link about each axis, and of the motor at a hinge
KNEE = (0.0, 0.0, -1.0)  # axis about which a positive angle bends the shin down; the leg is along x
# Directions of the published joints, hip and knee of each leg: those of the second and the third knee bend upwards.
WAYS = (1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0)
# The published torso's frame has z up and y to the left, ours y up.
UPRIGHT = (-math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5))
# A contact with the ground has the mean of the ant's and the ground's constants, as published.
ANT = Springs(
    contact_ke=(4e3 + 1e5) / 2,
    contact_kd=(1e3 + 1e3) / 2,
    contact_kf=(3e2 + 1e3) / 2,
    friction=(0.75 + 0.5) / 2,
)


def capsule(length: float, radius: float) -> tuple[float, float, float]:
    """Mass, and moments of inertia along and across the axis, of a cylinder with two half balls."""
    rod, ball = DENSITY * math.pi * radius**2 * length, DENSITY * 4 / 3 * math.pi * radius**3
    along = rod * radius**2 / 2 + ball * 0.4 * radius**2
    across = rod * (length**2 / 12 + radius**2 / 4)
    return (
        rod + ball,
        along,
        across + ball * (0.4 * radius**2 + length**2 / 4 + 3 / 8 * length * radius),
    )


def ant() -> tuple[list[Body], list[Hinge], list[Sphere]]:
    """Torso, then four thighs, then four shins; hinges in the order hip, knee of each leg."""
    ball, (stub, along, across) = LIGHT * 4 / 3 * math.pi * TORSO**3, capsule(REACH, LEG)
    # The torso is a ball with four stubs, which point along the legs, 45 degrees between the axes.
    away = REACH / 2
    up = 0.4 * ball * TORSO**2 + 4 * (across + stub * away**2)
    flat = 0.4 * ball * TORSO**2 + 4 * ((along + across) / 2 + stub * away**2 / 2)
    bodies = [Body(ball + 4 * stub, (flat, up, flat))]
    for length, axis in ((THIGH, 1), (SHIN, 2)):  # of the hinge, in the link's frame
        mass, along, across = capsule(length, LEG)
        moments = [along + ARMATURE, across + ARMATURE, across + ARMATURE]
        moments[axis] += ARMATURE
        bodies += [Body(mass, tuple(moments))] * 4
    hinges, spheres = [], [Sphere(0, (0.0, 0.0, 0.0), TORSO)]
    for i, yaw in enumerate(YAW):
        out = (math.cos(yaw), -math.sin(yaw))
        turn = (0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2))
        hip = (REACH * out[0], 0.0, REACH * out[1])
        up, limit = (0.0, 1.0, 0.0), math.radians(40)
        hinges.append(Hinge(0, 1 + i, hip, (-THIGH / 2, 0.0, 0.0), up, turn, -limit, limit))
        knee, low, high = (THIGH / 2, 0.0, 0.0), math.radians(30), math.radians(100)
        ends = (knee, (-SHIN / 2, 0.0, 0.0))
        hinges.append(Hinge(1 + i, 5 + i, *ends, KNEE, low=low, high=high))
        spheres.append(Sphere(0, hip, LEG))  # of the stub; its other end is inside the ball
        for link, length in ((1 + i, THIGH), (5 + i, SHIN)):
            spheres += [Sphere(link, (side * length / 2, 0.0, 0.0), LEG) for side in (-1, 1)]
    return bodies, hinges, spheres


class AntRun(DifferentiableEnv):
    """Run along x.

    Actions: torques of the hinges, 200 N m at -1. Observation (37): height, orientation 4, velocity 3, angular velocity
    3, hinges 8, their rates 8 times 0.1, up 1, heading 1, last actions 8. Reward: v_x + 0.1 up + heading + (height -
    0.27), with up the torso's vertical axis along the world's and heading its x axis along the world's. The episode
    ends below a height of 0.27. Nothing is mended: "paper" and "default" are the same.

    Differences from the original (rewarped 1.3.3), compared in tests/test_rewarped_original.py:
    1. Hinges are springs of 1e6 N/m and the motors' armature is a rotor in each link; the original has joint
       coordinates with a mass matrix that it computes once a step, ours is that of every substep.
    2. The original looks for contacts once a step, within 5 cm: what falls faster than 3 m/s sinks in first.
    3. It also looks for contacts between the ant's links, and finds none unless two legs cross, which the hips' limits
       prevent. Ours does not look.
    4. `small` is 200 steps long.
    """

    LOWEST, TORQUE, START = 0.27, -200.0, 0.75

    def setup(self) -> None:
        self.sim = Rigid(
            self.num_envs,
            *ant(),
            dt=1 / 960,
            substeps=16,
            springs=ANT,
            gravity=-9.81,
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
        )
        self.action_dim, self.control_hz = 8, 60.0
        self.max_episode_steps = {"full": 1000, "small": 200}[self.size]
        self.obs_dims = {"state": (37,)}
        self.ways, self.upright = self.vector(*WAYS), self.vector(*UPRIGHT)

    def vector(self, *xyz: float) -> torch.Tensor:
        return torch.tensor(xyz, device=self.device, dtype=self.dtype)

    def fresh(self):
        p = self.vector(0, self.START, 0) + self.uniform(-0.1, 0.1, 3)
        axis = torch.nn.functional.normalize(self.uniform(-1, 1, 3), dim=-1)
        q = about(axis, self.uniform(-math.radians(7.5), math.radians(7.5)))
        angles = self.vector(*(0.0, 1.0) * 4) + self.uniform(-0.2, 0.2, 8)
        idle = torch.zeros(self.num_envs, 8, device=self.device, dtype=self.dtype)
        v, w, rates = (self.uniform(-0.25, 0.25, n) for n in (3, 3, 8))
        v = v + torch.cross(w, p, dim=-1)  # as published, what is drawn is the velocity at the origin
        return {**self.sim.place(p, q, v, w, angles, rates), "actions": idle}

    def physics(self, state, actions):
        bodies = [state[name] for name in "pqvw"]
        p, q, v, w = self.sim.step(*bodies, self.TORQUE * self.ways * actions)
        return {"p": p, "q": q, "v": v, "w": w, "actions": actions}

    def posture(self, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Height, up and heading (N, 1)."""
        q = state["q"][:, 0]
        up, ahead = rotate(q, self.vector(0, 1, 0)), rotate(q, self.vector(1, 0, 0))
        return state["p"][:, 0, 1:2], up[:, 1:2], ahead[:, :1]

    def observe(self, state):
        height, up, heading = self.posture(state)
        angles, rates = self.sim.angles(state["q"], state["w"])
        turn = multiply(state["q"][:, 0], self.upright.expand(self.num_envs, 4))
        body = (height, turn, state["v"][:, 0], state["w"][:, 0])
        hinges = (self.ways * angles, 0.1 * self.ways * rates)
        return {"state": torch.cat((*body, *hinges, up, heading, state["actions"]), 1)}

    def reward(self, state, actions):
        height, up, heading = self.posture(state)
        rewards = state["v"][:, 0, 0] + (0.1 * up + heading + height - self.LOWEST)[:, 0]
        return rewards, height[:, 0].detach() < self.LOWEST

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        parts = [(THIGH, 1), (SHIN, 5)]
        return render.draw_ant(self, world, size, TORSO, LEG, parts)


# ------------------------------------------------------------------------------------------------- HandReorient ------
# The Allegro hand's published joints, in its own frame: the palm looks along x, the fingers point along z. Of each link
# in a finger: axis of its joint, limits, way to the next joint or to the tip, radius, mass.
FINGER = (
    ((0.0, 0.0, 1.0), (-0.47, 0.47), (0.0, 0.0, 0.0164), 0.011, 0.0119),
    ((0.0, 1.0, 0.0), (-0.196, 1.61), (0.0, 0.0, 0.054), 0.011, 0.065),
    ((0.0, 1.0, 0.0), (-0.174, 1.709), (0.0, 0.0, 0.0384), 0.011, 0.0355),
    ((0.0, 1.0, 0.0), (-0.227, 1.618), (0.0, 0.0, 0.0267), 0.012, 0.0264),
)
THUMB = (
    ((-1.0, 0.0, 0.0), (0.263, 1.396), (-0.027, 0.005, 0.0399), 0.012, 0.0176),
    ((0.0, 0.0, 1.0), (-0.105, 1.163), (0.0, 0.0, 0.0177), 0.011, 0.0119),
    ((0.0, 1.0, 0.0), (-0.189, 1.644), (0.0, 0.0, 0.0514), 0.011, 0.038),
    ((0.0, 1.0, 0.0), (-0.162, 1.719), (0.0, 0.0, 0.0423), 0.012, 0.0388),
)
SPLAY = math.sin(
    math.radians(2.5)
)  # half of the angle between a finger and the one beside it, 5 degrees
FINGERS = (  # index, middle, ring, thumb: links, place on the palm, turn of the first link's frame in the palm's
    (FINGER, (0.0, 0.0435, -0.001542), (-SPLAY, 0.0, 0.0, math.sqrt(1 - SPLAY**2))),
    (FINGER, (0.0, 0.0, 0.0007), (0.0, 0.0, 0.0, 1.0)),
    (FINGER, (0.0, -0.0435, -0.001542), (SPLAY, 0.0, 0.0, math.sqrt(1 - SPLAY**2))),
    (THUMB, (-0.0182, 0.019333, -0.045987), (-0.521334, -0.521334, -0.477714, 0.477714)),
)
PALM = [((-0.0069, y, -0.085), (-0.0069, y, -0.013), 0.018) for y in (-0.042, -0.014, 0.014, 0.042)]
ROTOR = 1e-3  # kg m^2, of the motor at a joint
SIDE, CUBE_DENSITY = 0.065, 1820.7  # of the cube: m, kg/m^3


def allegro() -> tuple[list[Body], list[Hinge], list[tuple]]:
    """Palm, then the links of index, middle, ring finger and thumb; hinges; capsules (body, ends, radius).

    A link's frame is at the middle of its capsule, with the axes of its joint's frame.
    """
    bodies, hinges, capsules = (
        [Body(1.0, (1.0, 1.0, 1.0), fixed=True)],
        [],
        [(0, *ends) for ends in PALM],
    )
    for links, where, turn in FINGERS:
        parent, anchor = 0, where
        for axis, (low, high), way, radius, mass in links:
            half = tuple(x / 2 for x in way)
            across, along = (
                mass * (sum(x * x for x in way) / 12 + radius**2 / 4),
                mass * radius**2 / 2,
            )
            bodies.append(Body(mass, (ROTOR + across, ROTOR + across, ROTOR + along)))
            hinges.append(
                Hinge(
                    parent, len(bodies) - 1, anchor, tuple(-x for x in half), axis, turn, low, high
                )
            )
            capsules.append((len(bodies) - 1, tuple(-x for x in half), half, radius))
            parent, anchor, turn = len(bodies) - 1, half, (0.0, 0.0, 0.0, 1.0)
    # A hinge's axis is in its parent's frame, the published ones are in the child's, which its turn takes there.
    hinges = [
        Hinge(
            h.parent,
            h.child,
            h.anchor_a,
            h.anchor_b,
            tuple(rotate(torch.tensor(h.turn).double(), torch.tensor(h.axis).double()).tolist()),
            h.turn,
            h.low,
            h.high,
        )
        for h in hinges
    ]
    return bodies, hinges, capsules


def row(capsule: tuple, gap: float = 0.019) -> list[Sphere]:
    """A capsule's spheres, at most `gap` apart."""
    body, a, b, radius = capsule
    count = math.ceil(math.dist(a, b) / gap)
    return [
        Sphere(body, tuple(x + (y - x) * i / count for x, y in zip(a, b, strict=True)), radius)
        for i in range(count + 1)
    ]


class HandReorient(DifferentiableEnv):
    """Turn a cube in the hand to a given orientation, then to the next one.

    Actions: torques of the joints, 2 N m at 1. Observation (72): joints 16, their rates 16 times 0.2, the cube's
    position 3, orientation 4, velocity 3 and angular velocity 3 times 0.2, the goal's position 3 and orientation 4, the
    turn from goal to cube 4, last actions 16. Reward, with d the cube's distance to the goal's position and theta the
    angle of the turn, 2 asin(min(|its vector part|, 1 - 1e-3)):
        -10 d + 1 / (theta + 0.1) - 2e-4 |a|^2 + 250 sigmoid((0.1 - theta) / 1e-3)
    Below theta = 0.1 the next goal is drawn: the reward still is for the old one, the observation has the new one. The
    episode ends at d = 0.24. Nothing is mended: "paper" and "default" are the same.
    Ours: the shapes, capsules on the published joints that need no mesh and touch the cube alone; how the hand
    lies, and bends at the start; the goal's position, where a cube comes to rest; hinges are springs of 5e4 N/m, and
    the armature is a rotor in each link; of a contact's published damping and viscous friction each sphere has a third;
    `small` has 150 steps of 32 substeps.
    """

    SIZES = {
        "full": dict(dt=1 / 7680, substeps=64, steps=600),
        "small": dict(dt=1 / 3840, substeps=32, steps=150),
    }
    TORQUE, FALLEN, NEAR, BONUS = 2.0, 0.24, 0.1, 250.0
    BEND = (0.0, 0.35, 0.45, 0.45) * 3 + (0.9, 0.3, 0.3, 0.3)  # joints at the start, before noise
    LIE = (0.5, 0.5, 0.5, 0.5)  # the palm looks up (y), the fingers point along x
    GOAL = (-0.01, 0.045, 0.0)
    SPRINGS = Springs(
        ke=5e4,
        kd=10.0,
        align=500.0,
        align_d=1.0,
        limit=200.0,
        limit_d=0.0,
        damping=1.0,
        contact_ke=500.0,
        contact_kd=30.0,
        contact_kf=30.0,
        friction=0.5,
    )

    def setup(self) -> None:
        s, (bodies, hinges, self.capsules) = self.SIZES[self.size], allegro()
        mass, self.cube = CUBE_DENSITY * SIDE**3, len(bodies)
        bodies.append(Body(mass, (mass * SIDE**2 / 6,) * 3))
        spheres = [sphere for capsule in self.capsules for sphere in row(capsule)]
        self.sim = Rigid(
            self.num_envs,
            bodies,
            hinges,
            spheres,
            dt=s["dt"],
            substeps=s["substeps"],
            ground=False,
            boxes=(Box(self.cube, (SIDE / 2,) * 3),),
            springs=self.SPRINGS,
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
        )
        self.action_dim, self.control_hz, self.max_episode_steps = (
            16,
            1 / (s["dt"] * s["substeps"]),
            s["steps"],
        )
        self.obs_dims = {"state": (72,)}
        self.goal_position = self.vector(*self.GOAL)

    def vector(self, *numbers: float) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device, dtype=self.dtype)

    def orientation(self) -> torch.Tensor:
        """Quaternions (N, 4) of random turns, all equally likely (Shoemake 1992)."""
        u, a, b = (self.uniform((0.0,) * 3, (1.0, 2 * math.pi, 2 * math.pi), 3)).unbind(1)
        low, high = (1 - u).sqrt(), u.sqrt()
        return torch.stack((low * a.sin(), low * a.cos(), high * b.sin(), high * b.cos()), 1)

    def fresh(self):
        bend = self.vector(*self.BEND)
        anywhere = self.uniform(
            [h.low for h in self.sim.hinges], [h.high for h in self.sim.hinges], 16
        )
        angles = bend + 0.2 * (anywhere - bend)
        still, idle = (
            torch.zeros(self.num_envs, n, device=self.device, dtype=self.dtype) for n in (3, 16)
        )
        hand = self.sim.place(
            still, self.vector(*self.LIE).expand(self.num_envs, 4), still, still, angles, idle
        )
        above = self.goal_position + self.vector(0.0, 0.04, 0.0) + self.uniform(-0.01, 0.01, 3)
        cube, goal = (
            {"p": above, "q": self.orientation(), "v": still, "w": still},
            self.orientation(),
        )
        both = {name: torch.cat((hand[name], cube[name][:, None]), 1) for name in "pqvw"}
        return {**both, "actions": idle, "goal": goal, "aim": goal}

    def off(self, state, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The turn from a goal to the cube (N, 4), and its angle (N,)."""
        turn = multiply(state["q"][:, self.cube], goal * self.vector(-1, -1, -1, 1))
        sine = (turn[:, :3].square().sum(1) + 1e-12).sqrt()
        return turn, 2 * sine.clamp_max(1 - 1e-3).asin()

    def physics(self, state, actions):
        p, q, v, w = self.sim.step(
            state["p"], state["q"], state["v"], state["w"], self.TORQUE * actions
        )
        new, goal = (
            {"p": p, "q": q, "v": v, "w": w, "actions": actions, "aim": state["goal"]},
            state["goal"],
        )
        reached = self.off(new, goal)[1].detach() <= self.NEAR
        if reached.any():
            goal = torch.where(reached[:, None], self.orientation(), goal)
        return {**new, "goal": goal}

    def observe(self, state):
        angles, rates = self.sim.angles(state["q"], state["w"])
        p, q, v, w = (state[name][:, self.cube] for name in "pqvw")
        goal = self.goal_position.expand(self.num_envs, 3)
        return {
            "state": torch.cat(
                (
                    angles,
                    0.2 * rates,
                    p,
                    q,
                    v,
                    0.2 * w,
                    goal,
                    state["goal"],
                    self.off(state, state["goal"])[0],
                    state["actions"],
                ),
                1,
            )
        }

    def reward(self, state, actions):
        away = ((state["p"][:, self.cube] - self.goal_position).square().sum(1) + 1e-12).sqrt()
        theta = self.off(state, state["aim"])[1]
        rewards = -10 * away + 1 / (theta + 0.1) - 2e-4 * actions.square().sum(1)
        return rewards + self.BONUS * torch.sigmoid(
            (self.NEAR - theta) / 1e-3
        ), away.detach() >= self.FALLEN

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3); the goal's orientation is that of the cube on the left."""
        from envs.rewarped import render

        return render.draw_hand(self, world, size, SIDE)
