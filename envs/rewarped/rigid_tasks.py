"""AntRun: a four-legged ant with eight hinges learns to run. HandReorient: a hand with sixteen
turns a cube.

The published tasks (SAPO, Xing et al. 2025, arXiv 2412.12089), compared with their authors'
package, `rewarped` 1.3.3, in tests/test_rewarped_original.py. Each class numbers its differences.
"""

import math

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.rigid import Body, Box, Hinge, Rigid, Sphere, Springs, about, multiply, rotate


class Articulated(DifferentiableEnv):
    """A task on `Rigid`. State: p, q, v, w of the free body, angles, rates, the last actions, and
    what a task adds."""

    STATE = ("p", "q", "v", "w", "angles", "rates")

    def vector(self, *numbers: float) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device, dtype=self.dtype)

    def moved(self, state, torques: torch.Tensor) -> dict[str, torch.Tensor]:
        """The simulation's part of the state a step later."""
        found = self.sim.step(*[state[name] for name in self.STATE], torques)
        return dict(zip(self.STATE, found, strict=True))


# ------------------------------------------------------------------------------------------------- AntRun ------------
DENSITY, LIGHT = 1000.0, 5.0  # of the capsules and of the torso's ball, kg/m^3
TORSO, LEG = 0.25, 0.08  # radii, metres
HALF = 0.2 * math.sqrt(2)  # length of a stub and of a thigh; a shin is twice as long
ARMATURE = 0.005  # kg m^2, of a link about each axis, and of the motor at a hinge
CORNERS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # of the legs: x ahead, y to the left, z up
# A contact with the ground has the mean of the ant's and the ground's constants.
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
    """Torso, then a thigh and a shin for each leg. At angle 0 all frames are the torso's, and the
    legs are straight."""
    ball, (stub, along, across) = LIGHT * 4 / 3 * math.pi * TORSO**3, capsule(HALF, LEG)
    # The torso is a ball with four stubs, which point along the legs, 45 degrees between the axes.
    up = 0.4 * ball * TORSO**2 + 4 * (across + stub * HALF**2 / 4)
    flat = 0.4 * ball * TORSO**2 + 4 * ((along + across) / 2 + stub * HALF**2 / 8)
    bodies, hinges = [Body(ball + 4 * stub, (flat, flat, up))], []
    spheres = [Sphere(0, (0.0, 0.0, 0.0), TORSO)]
    for leg, (x, y) in enumerate(CORNERS):
        reach = (0.2 * x, 0.2 * y, 0.0)  # from the torso to the hip, and on to the knee
        spheres.append(Sphere(0, reach, LEG))  # of the stub; its other end is inside the ball
        for link, length in ((1 + 2 * leg, HALF), (2 + 2 * leg, 2 * HALF)):
            mass, along, across = capsule(length, LEG)
            mixed, skew = (along + across) / 2 + ARMATURE, x * y * (along - across) / 2
            rows = ((mixed, skew, 0.0), (skew, mixed, 0.0), (0.0, 0.0, across + ARMATURE))
            end = tuple(length / HALF * v for v in reach)
            bodies.append(Body(mass, rows, tuple(v / 2 for v in end)))
            spheres += [Sphere(link, (0.0, 0.0, 0.0), LEG), Sphere(link, end, LEG)]
        turn, bend = math.radians(40), (math.radians(30), math.radians(100))
        # The second and the third knee bend by negative angles.
        low, high = bend if leg in (0, 3) else (-bend[1], -bend[0])
        knee = (-x * y * math.sqrt(0.5), math.sqrt(0.5), 0.0)
        hinges.append(Hinge(0, reach, (0.0, 0.0, 1.0), low=-turn, high=turn, armature=ARMATURE))
        hinges.append(Hinge(1 + 2 * leg, reach, knee, low=low, high=high, armature=ARMATURE))
    return bodies, hinges, spheres


class AntRun(Articulated):
    """Run along x.

    Actions: torques of the hinges, 200 N m at -1. Observation (37): height, orientation 4, velocity
    3, angular velocity 3, hinges 8, their rates 8 times 0.1, up 1, heading 1, last actions 8.
    Reward: v_x + 0.1 up + heading + (height - 0.27), with up the torso's vertical axis along the
    world's and heading its x axis along the world's. The episode ends below a height of 0.27.
    Nothing is mended: "paper" and "default" are the same.

    Differences from the original (rewarped 1.3.3):
    1. It looks for contacts once a step, within 5 cm: what falls faster than 3 m/s sinks in first.
    2. It also looks for contacts between the ant's links, and finds none unless two legs cross,
       which the hips' limits prevent. Ours does not look.
    3. Random numbers are our own.
    4. `small` is 200 steps long.
    """

    LOWEST, TORQUE, START = 0.27, -200.0, 0.75
    UPRIGHT = (-math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5))  # the torso's z axis along the world's y
    ANGLES = (0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0)

    def setup(self) -> None:
        self.sim = Rigid(
            self.num_envs,
            *ant(),
            dt=1 / 960,
            substeps=16,
            springs=ANT,
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
            checkpoint=self.checkpoint,
            window=self.window,
        )
        self.action_dim, self.control_hz = 8, 60.0
        self.max_episode_steps = {"full": 1000, "small": 200}[self.size]
        self.obs_dims = {"state": (37,)}

    def fresh(self):
        p = self.vector(0, self.START, 0) + self.uniform(-0.1, 0.1, 3)
        axis = torch.nn.functional.normalize(self.uniform(-1, 1, 3), dim=-1)
        q = about(axis, self.uniform(-math.radians(7.5), math.radians(7.5)))
        angles = self.vector(*self.ANGLES) + self.uniform(-0.2, 0.2, 8)
        v, w, rates = (self.uniform(-0.25, 0.25, n) for n in (3, 3, 8))
        return {
            "p": p,
            "q": multiply(q, self.vector(*self.UPRIGHT).expand_as(q)),
            "v": v,
            "w": w,
            "angles": angles,
            "rates": rates,
            "actions": torch.zeros(self.num_envs, 8, device=self.device, dtype=self.dtype),
        }

    def physics(self, state, actions):
        return {**self.moved(state, self.TORQUE * actions), "actions": actions}

    def posture(self, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Height, up and heading (N, 1)."""
        x, y, z, w = state["q"].split(1, 1)
        up, heading = 2 * (y * z - w * x), 1 - 2 * (y * y + z * z)
        return state["p"][:, 1:2], up, heading

    def observe(self, state):
        height, up, heading = self.posture(state)
        body = (height, state["q"], state["v"], state["w"], state["angles"], 0.1 * state["rates"])
        return {"state": torch.cat((*body, up, heading, state["actions"]), 1)}

    def reward(self, state, actions):
        height, up, heading = self.posture(state)
        rewards = state["v"][:, 0] + (0.1 * up + heading + height - self.LOWEST)[:, 0]
        return rewards, height[:, 0].detach() < self.LOWEST

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        return render.draw_ant(self, world, size)


# ------------------------------------------------------------------------------------------------- HandReorient ------
# The Allegro hand's published joints, in its own frame: the palm looks along x, the fingers point
# along z. Of each link in a finger: axis of its joint, limits, way to the next joint or to the tip,
# radius, mass, height of its centre of mass and inertia (xx, yy, zz, xy, xz, yz in 1e-6 kg m^2).
FINGER = (
    (
        (0.0, 0.0, 1.0),
        (-0.47, 0.47),
        (0.0, 0.0, 0.0164),
        0.011,
        0.0119,
        0.0,
        (1.0, 0.6, 1.0, 0.0, 0.0, 0.0),
    ),
    (
        (0.0, 1.0, 0.0),
        (-0.196, 1.61),
        (0.0, 0.0, 0.054),
        0.011,
        0.065,
        0.0,
        (79.6, 24.7, 79.6, 17.2, 8.8, 24.1),
    ),
    (
        (0.0, 1.0, 0.0),
        (-0.174, 1.709),
        (0.0, 0.0, 0.0384),
        0.011,
        0.0355,
        0.0,
        (26.4, 13.5, 26.4, 6.7, 4.8, 9.4),
    ),
    (
        (0.0, 1.0, 0.0),
        (-0.227, 1.618),
        (0.0, 0.0, 0.0267),
        0.012,
        0.0432,
        0.0208,
        (30.6, 29.5, 6.6, 1.3, 1.3, 1.8),
    ),
)
THUMB = (
    (
        (-1.0, 0.0, 0.0),
        (0.263, 1.396),
        (-0.027, 0.005, 0.0399),
        0.012,
        0.0176,
        0.0,
        (18.9, 14.3, 18.9, 7.2, 5.4, 6.8),
    ),
    (
        (0.0, 0.0, 1.0),
        (-0.105, 1.163),
        (0.0, 0.0, 0.0177),
        0.011,
        0.0119,
        0.0,
        (4.2, 4.5, 4.2, 1.0, 1.6, 1.4),
    ),
    (
        (0.0, 1.0, 0.0),
        (-0.189, 1.644),
        (0.0, 0.0, 0.0514),
        0.011,
        0.038,
        0.0,
        (43.0, 14.4, 43.0, 9.6, 5.1, 13.4),
    ),
    (
        (0.0, 1.0, 0.0),
        (-0.162, 1.719),
        (0.0, 0.0, 0.0423),
        0.012,
        0.0724,
        0.0196,
        (95.0, 76.8, 34.9, 8.0, 5.2, 11.3),
    ),
)
SPLAY = math.sin(math.radians(2.5))  # half of the angle between a finger and the one beside it
SIDEWAYS = math.sqrt(1 - SPLAY**2)
# Thumb, then the fingers from the one farthest from it: links, place on the palm, turn of the first
# link's frame in the palm's.
FINGERS = (
    (THUMB, (-0.0182, 0.019333, -0.045987), (-0.521334, -0.521334, -0.477714, 0.477714)),
    (FINGER, (0.0, -0.0435, -0.001542), (SPLAY, 0.0, 0.0, SIDEWAYS)),
    (FINGER, (0.0, 0.0, 0.0007), (0.0, 0.0, 0.0, 1.0)),
    (FINGER, (0.0, 0.0435, -0.001542), (-SPLAY, 0.0, 0.0, SIDEWAYS)),
)
PALM = [((-0.0069, y, -0.085), (-0.0069, y, -0.013), 0.018) for y in (-0.042, -0.014, 0.014, 0.042)]
MOUNT, LIE = (0.0, 0.0, 0.5), (0.522998, -0.522998, 0.475892, 0.475892)  # of the palm: it looks up
ROTOR = 1e-3  # kg m^2, of the motor at a joint
SIDE, CUBE_DENSITY = 0.065, 3641.33 / 2  # of the cube: m, kg/m^3


def allegro() -> tuple[list[Body], list[Hinge], list[tuple]]:
    """The cube, then thumb and fingers; hinges; capsules (body, ends, radius), -1 the palm."""
    mass = CUBE_DENSITY * SIDE**3
    bodies, hinges = [Body(mass, (mass * SIDE**2 / 6,) * 3)], []
    lie, capsules = torch.tensor(LIE, dtype=torch.float64), []
    mount = torch.tensor(MOUNT, dtype=torch.float64)

    def placed(x) -> tuple:
        return tuple((mount + rotate(lie, torch.tensor(x, dtype=torch.float64))).tolist())

    for a, b, radius in PALM:
        capsules.append((-1, placed(a), placed(b), radius))
    for links, where, turn in FINGERS:
        parent, anchor = -1, placed(where)
        turn = tuple(multiply(lie, torch.tensor(turn, dtype=torch.float64)).tolist())
        for axis, (low, high), way, radius, mass, height, moments in links:
            xx, yy, zz, xy, xz, yz = (1e-6 * moment for moment in moments)
            rows = ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))
            hinges.append(Hinge(parent, anchor, axis, turn, low, high, ROTOR))
            parent, anchor, turn = len(bodies), way, (0.0, 0.0, 0.0, 1.0)
            bodies.append(Body(mass, rows, (0.0, 0.0, height)))
            capsules.append((parent, (0.0, 0.0, 0.0), way, radius))
    return bodies, hinges, capsules


def row(capsule: tuple, gap: float = 0.019) -> list[Sphere]:
    """A capsule's spheres, at most `gap` apart."""
    body, a, b, radius = capsule
    count = math.ceil(math.dist(a, b) / gap)
    return [
        Sphere(body, tuple(x + (y - x) * i / count for x, y in zip(a, b, strict=True)), radius)
        for i in range(count + 1)
    ]


class HandReorient(Articulated):
    """Turn a cube in the hand to a given orientation, then to the next one.

    Actions: torques of the joints, 2 N m at 1. Observation (72): joints 16 from -1 to 1 within
    their limits, their rates 16 times 0.2, the cube's position 3, orientation 4, velocity 3 and
    angular velocity 3 times 0.2, the goal's position 3 and orientation 4, the turn from goal to
    cube 4, last actions 16; z is up. Reward, with d the cube's distance to the goal's position,
    theta the angle of the turn, 2 asin(min(|its vector part|, 1 - 1e-3)), and S(x) = sigmoid(x /
    1e-3):
        -10 d + 1 / (theta + 0.1) - 2e-4 |a|^2 + 250 S(S(0.1 - theta) - 1)
    so that the bonus is 125 up to 0.09 rad and gone at 0.095. Below theta = 0.1 the next goal is
    drawn: the reward still is for the old one, the observation has the new one. The episode ends at
    d = 0.24. Nothing is mended: "paper" and "default" are the same.

    Differences from the original (rewarped 1.3.3):
    1. Shapes of the hand: capsules on its joints, rows of spheres, that touch the cube and not each
       other. There they are boxes and balls, which also touch each other; a box on a box makes up
       to 24 contacts with an algorithm of its own.
    2. Random numbers are our own.
    3. There links and joints are numbered differently, and the mass matrix takes, by the joint's
       number, the inertia of another link: a fault, not copied.
    4. `small` has 150 steps of 32 substeps, and less damping at the limits, which would be unstable
       there.
    """

    SIZES = {
        "full": dict(dt=1 / 7680, substeps=64, steps=600, limit_d=10.0),
        "small": dict(dt=1 / 3840, substeps=32, steps=150, limit_d=3.0),
    }
    TORQUE, FALLEN, NEAR, BONUS = 2.0, 0.24, 0.1, 250.0
    CUBE, GOAL = (0.0, -0.1, 0.6), (0.0, -0.1, 0.56)  # where the cube starts and where it shall be

    def setup(self) -> None:
        s, (bodies, hinges, self.capsules) = self.SIZES[self.size], allegro()
        self.sim = Rigid(
            self.num_envs,
            bodies,
            hinges,
            [sphere for capsule in self.capsules for sphere in row(capsule)],
            dt=s["dt"],
            substeps=s["substeps"],
            ground=False,
            boxes=(Box(0, (SIDE / 2,) * 3),),
            springs=Springs(
                limit=100.0,
                limit_d=s["limit_d"],
                contact_ke=500.0,
                contact_kd=100.0,
                contact_kf=100.0,
                friction=0.5,
            ),
            gravity=(0.0, 0.0, -9.81),
            device=self.device,
            dtype=self.dtype,
            graph=self.graph,
            checkpoint=self.checkpoint,
            window=self.window,
        )
        self.action_dim, self.max_episode_steps = 16, s["steps"]
        self.control_hz = 1 / (s["dt"] * s["substeps"])
        self.obs_dims = {"state": (72,)}
        self.goal_position = self.vector(*self.GOAL)
        self.low = self.vector(*[hinge.low for hinge in hinges])
        self.high = self.vector(*[hinge.high for hinge in hinges])

    def orientation(self) -> torch.Tensor:
        """Quaternions (N, 4) of turns about y, then about x, each by any angle: as published, not
        equally likely."""
        angles = self.uniform(-math.pi, math.pi, 2)
        first = about(self.vector(0, 1, 0), angles[:, 1])
        return multiply(about(self.vector(1, 0, 0), angles[:, 0]), first)

    def fresh(self):
        still = torch.zeros(self.num_envs, 3, device=self.device, dtype=self.dtype)
        idle = torch.zeros(self.num_envs, 16, device=self.device, dtype=self.dtype)
        goal = self.orientation()
        return {
            "p": self.vector(*self.CUBE) + self.uniform(-0.01, 0.01, 3),
            "q": self.orientation(),
            "v": still,
            "w": still,
            "angles": 0.2 * self.uniform(self.low.tolist(), self.high.tolist(), 16),
            "rates": idle,
            "actions": idle,
            "goal": goal,
            "aim": goal,
        }

    def off(self, state, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The turn from a goal to the cube (N, 4), and its angle (N,)."""
        turn = multiply(state["q"], goal * self.vector(-1, -1, -1, 1))
        sine = (turn[:, :3].square().sum(1) + 1e-12).sqrt()
        return turn, 2 * sine.clamp_max(1 - 1e-3).asin()

    def physics(self, state, actions):
        new = {**self.moved(state, self.TORQUE * actions), "actions": actions, "aim": state["goal"]}
        reached, goal = self.off(new, state["goal"])[1].detach() <= self.NEAR, state["goal"]
        if reached.any():
            goal = torch.where(reached[:, None], self.orientation(), goal)
        return {**new, "goal": goal}

    def observe(self, state):
        angles = (2 * state["angles"] - self.high - self.low) / (self.high - self.low)
        cube = (state["p"], state["q"], state["v"], 0.2 * state["w"])
        goal = (self.goal_position.expand(self.num_envs, 3), state["goal"])
        turn = self.off(state, state["goal"])[0]
        parts = (angles, 0.2 * state["rates"], *cube, *goal, turn, state["actions"])
        return {"state": torch.cat(parts, 1)}

    def reward(self, state, actions):
        away = ((state["p"] - self.goal_position).square().sum(1) + 1e-12).sqrt()
        theta = self.off(state, state["aim"])[1]
        rewards = -10 * away + 1 / (theta + 0.1) - 2e-4 * actions.square().sum(1)
        near = torch.sigmoid((self.NEAR - theta) / 1e-3)
        rewards = rewards + self.BONUS * torch.sigmoid((near - 1) / 1e-3)
        return rewards, away.detach() >= self.FALLEN

    def render(self, world: int = 0, size: int = 256):
        """An image for people, uint8 (size, size, 3); the goal's orientation is that of the cube on
        the left."""
        from envs.rewarped import render

        return render.draw_hand(self, world, size, SIDE)
