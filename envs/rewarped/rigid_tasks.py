"""AntRun: a four-legged ant with eight hinges learns to run.

Sizes of actions, noise, observations, reward and length are the published ones (SAPO, Xing et al. 2025, arXiv
2412.12089). The published simulation has joint coordinates and an armature; ours has stiff hinges: see rigid.py.
"""

import math

import torch

from envs.rewarped.base import DifferentiableEnv
from envs.rewarped.rigid import Body, Hinge, Rigid, Sphere, about, multiply, rotate

DENSITY, TORSO, LEG = 1000.0, 0.25, 0.08  # kg/m^3; radii, metres
REACH, THIGH, SHIN = 0.2 * math.sqrt(2), 0.2 * math.sqrt(2), 0.4 * math.sqrt(2)  # torso to hip, hip to knee, to foot
YAW = tuple(math.radians(45 + 90 * i) for i in range(4))  # of the legs
KNEE = (0.0, 0.0, -1.0)  # axis about which a positive angle bends the shin down; the leg is along x


def capsule(length: float, radius: float) -> tuple[float, float, float]:
    """Mass, and moments of inertia along and across the axis, of a cylinder with two half balls."""
    rod, ball = DENSITY * math.pi * radius**2 * length, DENSITY * 4 / 3 * math.pi * radius**3
    along = rod * radius**2 / 2 + ball * 0.4 * radius**2
    across = rod * (length**2 / 12 + radius**2 / 4)
    return rod + ball, along, across + ball * (0.4 * radius**2 + length**2 / 4 + 3 / 8 * length * radius)


def ant() -> tuple[list[Body], list[Hinge], list[Sphere]]:
    """Torso, then four thighs, then four shins; hinges in the order hip, knee of each leg."""
    ball, (stub, along, across) = DENSITY * 4 / 3 * math.pi * TORSO**3, capsule(REACH, LEG)
    away = REACH / 2  # the torso is a ball with four stubs, which point along the legs, 45 degrees between the axes
    up = 0.4 * ball * TORSO**2 + 4 * (across + stub * away**2)
    flat = 0.4 * ball * TORSO**2 + 4 * ((along + across) / 2 + stub * away**2 / 2)
    bodies = [Body(ball + 4 * stub, (flat, up, flat))]
    for length in (THIGH, SHIN):
        mass, along, across = capsule(length, LEG)
        bodies += [Body(mass, (along, across, across))] * 4
    hinges, spheres = [], [Sphere(0, (0.0, 0.0, 0.0), TORSO)]
    for i, yaw in enumerate(YAW):
        out, turn = (math.cos(yaw), -math.sin(yaw)), (0.0, math.sin(yaw / 2), 0.0, math.cos(yaw / 2))
        hinges.append(Hinge(0, 1 + i, (REACH * out[0], 0.0, REACH * out[1]), (-THIGH / 2, 0.0, 0.0), (0.0, 1.0, 0.0),
                            turn, math.radians(-40), math.radians(40)))  # fmt: skip
        hinges.append(Hinge(1 + i, 5 + i, (THIGH / 2, 0.0, 0.0), (-SHIN / 2, 0.0, 0.0), KNEE,
                            low=math.radians(30), high=math.radians(100)))  # fmt: skip
        spheres += [Sphere(5 + i, (side * SHIN / 2, 0.0, 0.0), LEG) for side in (-1, 1)]
    return bodies, hinges, spheres


class AntRun(DifferentiableEnv):
    """Run along x.

    Actions: torques of the hinges, 200 N m at 1. Observation (37): height, orientation 4, velocity 3, angular velocity
    3, hinges 8, their rates 8 times 0.1, up 1, heading 1, last actions 8. Reward: v_x + 0.1 up + heading + (height -
    0.27), with up the torso's vertical axis along the world's and heading its x axis along the world's. The episode
    ends below a height of 0.27. Nothing is mended: "paper" and "default" are the same.
    Ours: hinges are springs of 1e6 N/m, there is no armature, limits of the hinges; `small` is 200 steps long.
    """

    LOWEST, TORQUE, START = 0.27, 200.0, 0.75

    def setup(self) -> None:
        self.sim = Rigid(self.num_envs, *ant(), dt=1 / 960, substeps=16, device=self.device, dtype=self.dtype,
                         graph=self.graph)  # fmt: skip
        self.action_dim, self.control_hz = 8, 60.0
        self.max_episode_steps = {"full": 1000, "small": 200}[self.size]
        self.obs_dims = {"state": (37,)}
        self.yaw = torch.tensor(YAW, device=self.device, dtype=self.dtype)

    def vector(self, *xyz: float) -> torch.Tensor:
        return torch.tensor(xyz, device=self.device, dtype=self.dtype)

    def place(self, p, q, angles, rates) -> dict[str, torch.Tensor]:
        """State of all bodies from the torso's pose (N, 3), (N, 4), at rest, and angles and rates (N, 8) of hinges."""
        hip, knee = angles[:, 0::2], angles[:, 1::2]  # (N, 4)
        x, up, bend = self.vector(1, 0, 0), self.vector(0, 1, 0), self.vector(*KNEE)
        stub = multiply(q[:, None], about(up, self.yaw).expand(self.num_envs, 4, 4))
        thigh = multiply(stub, about(up, hip))
        shin = multiply(thigh, about(bend, knee))
        at_hip = p[:, None] + rotate(stub, x) * REACH
        along, down = rotate(thigh, x), rotate(shin, x)
        w_thigh = rotate(stub, up) * rates[:, 0::2, None]
        w_shin = w_thigh + rotate(thigh, bend) * rates[:, 1::2, None]
        v_knee = torch.cross(w_thigh, along * THIGH, dim=-1)
        zero = torch.zeros_like(p)[:, None]
        return {
            "p": torch.cat((p[:, None], at_hip + along * THIGH / 2, at_hip + along * THIGH + down * SHIN / 2), 1),
            "q": torch.cat((q[:, None], thigh, shin), 1), "w": torch.cat((zero, w_thigh, w_shin), 1),
            "v": torch.cat((zero, v_knee / 2, v_knee + torch.cross(w_shin, down * SHIN / 2, dim=-1)), 1),
        }  # fmt: skip

    def fresh(self):
        p = self.vector(0, self.START, 0) + self.uniform(-0.1, 0.1, 3)
        axis = torch.nn.functional.normalize(self.uniform(-1, 1, 3), dim=-1)
        q = about(axis, self.uniform(-math.radians(7.5), math.radians(7.5)))
        angles = self.vector(*(0.0, 1.0) * 4) + self.uniform(-0.2, 0.2, 8)
        idle = torch.zeros(self.num_envs, 8, device=self.device, dtype=self.dtype)
        return {**self.place(p, q, angles, self.uniform(-0.25, 0.25, 8)), "actions": idle}

    def physics(self, state, actions):
        p, q, v, w = self.sim.step(state["p"], state["q"], state["v"], state["w"], self.TORQUE * actions)
        return {"p": p, "q": q, "v": v, "w": w, "actions": actions}

    def posture(self, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Height, up and heading (N, 1)."""
        q = state["q"][:, 0]
        up, ahead = rotate(q, self.vector(0, 1, 0)), rotate(q, self.vector(1, 0, 0))
        return state["p"][:, 0, 1:2], up[:, 1:2], ahead[:, :1]

    def observe(self, state):
        height, up, heading = self.posture(state)
        angles, rates = self.sim.angles(state["q"], state["w"])
        return {"state": torch.cat((height, state["q"][:, 0], state["v"][:, 0], state["w"][:, 0], angles, 0.1 * rates,
                                    up, heading, state["actions"]), 1)}  # fmt: skip

    def reward(self, state, actions):
        height, up, heading = self.posture(state)
        rewards = state["v"][:, 0, 0] + (0.1 * up + heading + height - self.LOWEST)[:, 0]
        return rewards, height[:, 0].detach() < self.LOWEST

    def render(self, world: int = 0, size: int = 256):
        """A picture for people, uint8 (size, size, 3)."""
        from envs.rewarped import render

        parts = [(THIGH, 1), (SHIN, 5)]
        return render.draw_rigid(self, world, size, TORSO, LEG, parts)
