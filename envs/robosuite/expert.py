"""Scripted controllers for robosuite's Lift, PickPlaceCan and NutAssemblySquare, through the same actions as a policy.

`Expert(env).act()` returns actions (N, 7) for all environments of an `envs.robosuite` environment. It reads the true
poses of gripper and objects, never images. An episode is a fixed row of phases; each names where the gripper belongs
(a place and a turn about the vertical), what the gripper does, and when the next phase begins. The gripper always
points straight down; changes of its pose are proportional to what is missing, at most the largest action.

What makes the square nut work: the fingers close across its handle, so their opening direction is that of the nut's own
y axis; of the two turns that do this and the four that bring a square onto a square peg, the pair is chosen that keeps
the wrist nearest to its middle; and the place over the peg is reached by where the *nut* is, not the gripper.

Success rates of all tasks:     python -m envs.robosuite.expert --episodes 20
N: environments. Angles are radians, lengths metres, quaternions x, y, z, w as robosuite has them.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from envs import robosuite

STEP, TURN = 0.05, 0.5  # metres and radians of a change at |action| = 1
GAIN, TURN_GAIN = (
    1.6,
    1.2,
)  # of what is missing, asked for in one step; the controller covers a part of it
HANDLE = (
    0.054  # metres from the square nut's centre to the middle of its handle, along the nut's x axis
)
PEG = (0.23, 0.10)  # of the square nut
TABLE_TOP, PEG_TOP = 0.82, 0.95
CAN_BIN = (
    0.155,
    0.35,
)  # in the can's compartment, whose middle lies at the edge of the arm's reach
BIN_FLOOR = 0.8
CALM = 0.006  # metres a step: slow enough to count as being there
NEAR = 0.012  # metres beside the item: fingers that are farther off stay above it
FOREVER = 10_000


@dataclass(frozen=True)
class Phase:
    """One leg of an episode: where the gripper belongs (a name of `Expert._goal`), what it does, when to go on."""

    place: str
    gripper: Literal["open", "close"]
    steps: int  # control steps after which the next phase begins in any case
    until: Literal["there", "time"] = "there"
    tolerance: float = 0.01  # distance from the place that counts as "there", metres
    angle: float = 0.1  # and turn, radians


PHASES = {
    "Lift": (
        Phase("above_item", "open", 40, tolerance=0.015),
        Phase("at_item", "open", 25, tolerance=0.006),
        Phase("at_item", "close", 8, "time"),
        Phase("raised", "close", FOREVER, "time"),
    ),
    "PickPlaceCan": (
        Phase("above_item", "open", 60, tolerance=0.015),
        Phase("at_item", "open", 25, tolerance=0.006),
        Phase("at_item", "close", 8, "time"),
        Phase("raised", "close", 25, tolerance=0.03, angle=9.0),
        Phase("above_goal", "close", 90, tolerance=0.025, angle=9.0),
        Phase("at_goal", "close", 25, tolerance=0.02, angle=9.0),
        Phase("at_goal", "open", 6, "time"),
        Phase("retreat", "open", FOREVER, "time"),
    ),
    "NutAssemblySquare": (
        Phase("above_item", "open", 70, tolerance=0.012, angle=0.06),
        Phase("at_item", "open", 30, tolerance=0.005, angle=0.04),
        Phase("at_item", "close", 9, "time"),
        Phase("raised", "close", 30, tolerance=0.02, angle=9.0),
        Phase("above_goal", "close", 90, tolerance=0.004, angle=0.03),
        Phase("at_goal", "close", 25, tolerance=0.008, angle=9.0),
        Phase("at_goal", "open", 6, "time"),
        Phase("retreat", "open", FOREVER, "time"),
    ),
}
ITEMS = {"Lift": "cube", "PickPlaceCan": "Can", "NutAssemblySquare": "SquareNut"}


# --------------------------------------------------------------------------------------------------------- rotations --
def matrix(quat: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (N, 3, 3) of unit quaternions (N, 4), x, y, z, w."""
    x, y, z, w = quat.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).view(-1, 3, 3)


def rotation_vector(turn: torch.Tensor) -> torch.Tensor:
    """Axis times angle (N, 3) of rotation matrices (N, 3, 3); exact below half a turn."""
    twice_sin = torch.stack((
        turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0], turn[:, 1, 0] - turn[:, 0, 1],
    ), -1)  # fmt: skip
    sin = twice_sin.norm(dim=-1, keepdim=True) / 2
    angle = torch.atan2(sin, (turn.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) - 1) / 2)
    return twice_sin / 2 * torch.where(sin > 1e-6, angle / sin.clamp_min(1e-6), 1.0)


def pointing_down(turn: torch.Tensor) -> torch.Tensor:
    """Rotation (N, 3, 3) of a gripper that points down, its fingers opening at `turn` (N,) from the world's y axis."""
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    return torch.stack((cos, sin, zero, sin, -cos, zero, zero, zero, zero - 1), -1).view(-1, 3, 3)


def wrap(angle: torch.Tensor, period: float = 2 * math.pi) -> torch.Tensor:
    """The angle nearest to 0 among those that differ by multiples of `period`."""
    return angle - period * (angle / period).round()


# -------------------------------------------------------------------------------------------------------- controller --
class Expert:
    """Solves the task of a robosuite environment; see the module's docstring.

    Call `reset(where)` after each step that may have ended episodes, and `act()` before the next one.
    """

    absolute = (6,)  # the gripper's action is a command, not a change

    def __init__(self, env: robosuite.RobosuiteEnv):
        self.task = env.env_id.removeprefix("robosuite/")
        if self.task not in PHASES:
            raise ValueError(
                f"there is no scripted expert for {env.env_id}; there are for {', '.join(PHASES)}"
            )
        self.env, self.phases, self.item = env, PHASES[self.task], ITEMS[self.task]
        n = env.num_envs
        self.phase, self.clock = (torch.zeros(n, dtype=torch.int64) for _ in range(2))
        self.grasp, self.final = (
            torch.zeros(n),
            torch.zeros(n),
        )  # turns of the gripper to pick and to put
        self.spot = torch.zeros(n, 3)  # where the item is picked
        self.last = torch.zeros(n, 3)  # where the gripper was a step ago
        self.steps = torch.tensor([p.steps for p in self.phases])
        self.tolerance = torch.tensor([p.tolerance for p in self.phases])
        self.angle = torch.tensor([p.angle for p in self.phases])
        self.reset()

    def reset(self, where: torch.Tensor | None = None) -> None:
        """Begins new episodes in `where`, a mask (N,) (None: in all)."""
        mask = torch.ones_like(self.phase, dtype=torch.bool) if where is None else where.cpu()
        self.phase, self.clock = (torch.where(mask, 0, x) for x in (self.phase, self.clock))
        self.spot = torch.where(mask[:, None], self._hold(), self.spot)
        grasp, final = self._turns()
        self.grasp, self.final = (
            torch.where(mask, grasp, self.grasp),
            torch.where(mask, final, self.final),
        )

    def act(self) -> torch.Tensor:
        """Actions (N, 7) for the present state; moves each environment on to its next phase where that is due."""
        gripper = self.env.fact("robot0_eef_pos")
        turned = matrix(self.env.fact("robot0_eef_quat"))
        place, turn = self._goal(gripper)
        missing = rotation_vector(pointing_down(turn) @ turned.transpose(1, 2))
        there = (place - gripper).norm(dim=1) < self.tolerance[self.phase]
        there &= missing.norm(dim=1) < self.angle[self.phase]
        there &= (gripper - self.last).norm(dim=1) < CALM  # else it would shoot past the place
        self.last = gripper
        waits = torch.tensor([p.until == "time" for p in self.phases])[self.phase]
        done = (there & ~waits) | (self.clock >= self.steps[self.phase])
        done &= self.phase < len(self.phases) - 1
        self.phase = self.phase + done
        self.clock = torch.where(done, 1, self.clock + 1)

        place, turn = self._goal(gripper)
        missing = rotation_vector(pointing_down(turn) @ turned.transpose(1, 2))
        move = GAIN * (place - gripper) / STEP
        move = move / move.abs().amax(1, keepdim=True).clamp_min(
            1.0
        )  # straight, as fast as the slowest axis allows
        spin = (TURN_GAIN * missing / TURN).clamp(-1, 1)
        closed = torch.tensor([1.0 if p.gripper == "close" else -1.0 for p in self.phases])[
            self.phase
        ]
        return torch.cat((move, spin, closed[:, None]), 1)

    def _item(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Place (N, 3) and turn about the vertical (N,) of the item."""
        turn = matrix(self.env.fact(f"{self.item}_quat"))
        return self.env.fact(f"{self.item}_pos"), torch.atan2(turn[:, 1, 0], turn[:, 0, 0])

    def _hold(self) -> torch.Tensor:
        """Where the gripper belongs (N, 3) to pick the item."""
        item, yaw = self._item()
        if self.task == "NutAssemblySquare":
            return item + HANDLE * torch.stack((yaw.cos(), yaw.sin(), torch.zeros_like(yaw)), 1)
        # A can is held above its middle: the fingers stay clear of the bin's floor.
        return item + item.new_tensor((0.0, 0.0, 0.02 if self.task == "PickPlaceCan" else 0.0))

    def _turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns (N,) of the gripper to pick the item and to put it; 0 is how each episode begins."""
        _, item = self._item()
        if self.task == "PickPlaceCan":
            return torch.zeros_like(item), torch.zeros_like(item)
        if self.task == "Lift":
            side = wrap(item, math.pi / 2)
            return side, side
        grasps = torch.stack((wrap(item), wrap(item + math.pi)), 1)[:, :, None]  # (N, 2, 1)
        quarter = math.pi / 2 * torch.arange(-2, 2)
        finals = grasps + wrap(-item, math.pi / 2)[:, None, None] + quarter  # (N, 2, 4)
        # A handle that points away from the arm would be out of its reach over the peg.
        away = (item[:, None, None] + finals - grasps).cos() > 0.5
        cost = torch.maximum(finals.abs(), grasps.abs()) + 0.01 * finals.abs() + 10.0 * away
        best = cost.flatten(1).argmin(1, keepdim=True)
        grasps = grasps.expand_as(finals)
        return grasps.flatten(1).gather(1, best).squeeze(1), finals.flatten(1).gather(
            1, best
        ).squeeze(1)

    def _goal(self, gripper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the gripper belongs in each environment's present phase: place (N, 3) and turn (N,)."""
        item, at = self._item()[0], self._hold()
        height = lambda place, z: torch.cat((place[:, :2], torch.full_like(place[:, 2:], z)), 1)  # noqa: E731
        raise_to = {"Lift": TABLE_TOP + 0.12, "PickPlaceCan": 1.02, "NutAssemblySquare": 1.02}[
            self.task
        ]
        goal = gripper
        if self.task == "PickPlaceCan":
            goal = gripper + item.new_tensor((*CAN_BIN, 0.0)) - item
        elif self.task == "NutAssemblySquare":
            goal = gripper + item.new_tensor((*PEG, 0.0)) - item
        hang = gripper[:, 2] - item[:, 2]  # the gripper over the item that it holds
        low = {"PickPlaceCan": BIN_FLOOR + 0.09, "NutAssemblySquare": TABLE_TOP + 0.08}.get(
            self.task, 0.0
        )
        over = {"PickPlaceCan": BIN_FLOOR + 0.17, "NutAssemblySquare": PEG_TOP + 0.05}.get(
            self.task, 0.0
        )
        aside = (at - gripper)[:, :2].norm(dim=1) > NEAR
        open_at = at + at.new_tensor((0.0, 0.0, 0.05)) * (aside & (self.phase < 2))[:, None]
        places = {
            "above_item": (at + at.new_tensor((0.0, 0.0, 0.07)), self.grasp), "at_item": (open_at, self.grasp),
            "raised": (height(self.spot, raise_to), self.grasp),
            "above_goal": (torch.cat((goal[:, :2], (over + hang)[:, None]), 1), self.final),
            "at_goal": (torch.cat((goal[:, :2], (low + hang)[:, None]), 1), self.final),
            "retreat": (height(gripper, 1.1), self.final),
        }  # fmt: skip
        all_places = torch.stack([places[p.place][0] for p in self.phases])
        all_turns = torch.stack([places[p.place][1] for p in self.phases])
        rows = torch.arange(len(self.phase))
        return all_places[self.phase, rows], all_turns[self.phase, rows]


# ------------------------------------------------------------------------------------------------------ command line --
def run(env: robosuite.RobosuiteEnv, expert, episodes: int) -> list[int]:
    """Steps until the first success of each of `episodes` episodes; 0 for those without one."""
    env.reset(env.seed)
    expert.reset()
    found: list[int] = []
    while len(found) < episodes:
        _, _, _, truncations, info = env.step(expert.act())
        ends = info["success"] | truncations
        for i in torch.nonzero(ends).flatten().tolist():
            found.append(int(info["episode"]["length"][i]) if info["success"][i] else 0)
        early = (ends & ~truncations).cpu()
        if early.any():
            env.restart(early)
        expert.reset(ends)
    return found[:episodes]


@dataclass
class Args:
    """Prints a table of success rates."""

    episodes: int = 20
    """Episodes a task."""
    seed: int = 1
    """Seed of the episodes."""
    tasks: tuple[str, ...] = tuple(f"robosuite/{name}" for name in PHASES)
    """Environment ids."""
    num_envs: int = 1
    """Environments at once."""


def main(args: Args) -> None:
    """The command line of this module."""
    print("| task | success | mean steps to success | CPU ms a step |\n|---|---:|---:|---:|")
    for task in args.tasks:
        env = robosuite.make(
            task, args.num_envs, "cpu", seed=args.seed, images=False, stagger=False
        )
        expert = Expert(env)
        begin = time.process_time()
        found = run(env, expert, args.episodes)
        steps = sum(k or env.max_episode_steps for k in found)
        solved = [k for k in found if k]
        mean = f"{sum(solved) / len(solved):.0f}" if solved else "-"
        # (Of this process: with several environments, physics runs in others.)
        cost = f"{1000 * (time.process_time() - begin) / steps:.0f}" if args.num_envs == 1 else "-"
        print(f"| `{task}` | {len(solved)} / {len(found)} | {mean} | {cost} |", flush=True)
        env.close()


if __name__ == "__main__":
    import sys

    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"envs.robosuite.expert: {error}")
