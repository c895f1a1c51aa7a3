"""Scripted controllers for the eight SO-101 tasks: proof that each task can be solved, and a source of demonstrations.

`Expert(env).act()` returns actions (N, 6) for all environments of an `envs.so101` environment. It reads the true state
(poses, sizes, contacts), never images, and acts through the same interface as a policy: changes of the joint
targets in [-1, 1].

How it works: an episode is a fixed row of phases (hover, descend, close, ...; `PHASES` below).
A phase names a point of the gripper (the "tool"), the place in the world where it belongs, and what the jaw does.
Inverse kinematics turns place and tool into arm joints, which are approached along a straight line in joint space;
the next phase begins when the tool is there or the phase's time is up. Two choices are made once an episode:
  heading: which sides of the item the fingers meet: a cube's faces, and not where a support stands in the way;
  tilts: how far the gripper leans outwards, 0 = pointing straight down, when it picks and when it puts: every place in
    reach, the way through them short enough for the episode, and no more change than that needs, since an item turns
    with the gripper that holds it.
With tilt and roll given, the joints pan, lift, elbow and wrist have one solution for a place (x, y, z), found by damped
Newton steps on the arm's forward kinematics; lift + elbow + wrist = pi/2 - tilt, since the three axes are parallel.

Success rates of all tasks:     python -m envs.so101.expert --episodes 100
Videos, one of each task:       python -m envs.so101.expert --video videos
N: environments, P: phases of a task, K: tilts tried. Angles are radians, lengths metres.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from envs import so101
from envs.so101.rotations import quat_to_mat

# The fingers, in the gripper's frame: fingers point along -z, the jaw opens towards +x.
FIXED_FACE = -0.002  # x of the fixed finger's inner face
FINGERTIPS, TIP_END = (
    -0.094,
    -0.105,
)  # z of the middle of the fingers' gripping ends, and of their lowest point
FINGER_HALF_WIDTH, FINGER_THICKNESS = 0.0105, 0.008
# Beyond the item and the clearance, seen along the opening direction: the fixed finger, its root, the open jaw.
FINGER_REACH, ROOT_REACH, JAW_REACH = 0.012, 0.020, 0.024
CLEARANCE = 0.006  # between the fixed finger and the item, before the jaw closes and after it opens
HOLD = 0.1  # radians by which the gripper's target lies inside the item: enough for all of the servo's torque
RELEASE = 0.15  # radians by which the jaw opens less to let go than to grasp: inside a bin there is little room

TILTS = tuple(0.05 * k for k in range(22))
BUDGET = 36.0  # control steps of motion, without waiting and grasping, that leave time to finish an episode


@dataclass(frozen=True)
class Phase:
    """One leg of an episode: where the tool belongs (a name of `Expert._places`), what the jaw does, when to go on."""

    place: str
    jaw: Literal["open", "close", "hold", "release", "shut"]
    steps: int  # control steps after which the next phase begins in any case
    until: Literal["there", "grasped", "time"] = "there"
    tolerance: float = 0.006  # distance of the tool from its place that counts as "there", metres
    put: bool = False  # whether the tilt for putting holds, rather than that for picking


PICK = (
    Phase("above_item", "open", 18, tolerance=0.010),
    Phase("at_item", "open", 8, tolerance=0.005),
    Phase("at_item", "close", 8, "grasped"),
)
PUT = (
    Phase("raised", "hold", 6, tolerance=0.025),
    Phase("above_goal", "hold", 16, tolerance=0.015, put=True),
    Phase("at_goal", "hold", 7, tolerance=0.004, put=True),
    Phase("beside_goal", "release", 3, "time", put=True),
    Phase("retreat", "release", so101.HORIZON, "time", put=True),
)
PHASES = {
    "reach": (Phase("over_item", "shut", so101.HORIZON, "time"),),
    "lift": (*PICK, Phase("home", "hold", so101.HORIZON, "time")),
    "place": (*PICK, *PUT),
    "stack": (*PICK, *PUT),
}


# -------------------------------------------------------------------------------------------------------- kinematics --
class Arm:
    """Forward and inverse kinematics of the five arm joints, batched, from the frames of the MuJoCo model."""

    def __init__(self, mjm, device: torch.device):
        bodies = [
            mjm.body(name).id for name in ("shoulder", "upper_arm", "lower_arm", "wrist", "gripper")
        ]
        if (mjm.jnt_axis[:5] != (0, 0, 1)).any() or mjm.jnt_pos[:5].any():
            raise ValueError(
                "the arm's joints must turn about the z axes of their bodies, through the origins"
            )
        tensor = lambda array: torch.tensor(array, dtype=torch.float32, device=device)  # noqa: E731
        self.offset = tensor(mjm.body_pos[bodies])  # (5, 3), in the parent's frame
        self.turn = quat_to_mat(tensor(mjm.body_quat[bodies]))  # (5, 3, 3)
        self.low, self.high = tensor(mjm.jnt_range[:5, 0]), tensor(mjm.jnt_range[:5, 1])

    def forward(self, q: torch.Tensor):
        """Joints (N, 5) -> origins (N, 5, 3) and rotations (N, 5, 3, 3) of the links; the last is the gripper."""
        cos, sin, zero, one = q.cos(), q.sin(), torch.zeros_like(q), torch.ones_like(q)
        about_z = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), -1).view(
            *q.shape, 3, 3
        )
        origin, rotation = (
            q.new_zeros(len(q), 3),
            torch.eye(3, device=q.device).expand(len(q), 3, 3),
        )
        origins, rotations = [], []
        for joint in range(5):
            origin = origin + rotation @ self.offset[joint]
            rotation = rotation @ self.turn[joint] @ about_z[:, joint]
            origins.append(origin), rotations.append(rotation)
        return torch.stack(origins, 1), torch.stack(rotations, 1)

    def place_of(self, q: torch.Tensor, tool: torch.Tensor) -> torch.Tensor:
        """Place in the world (N, 3) of the point `tool` (N, 3) of the gripper's frame."""
        origins, rotations = self.forward(q)
        return origins[:, 4] + torch.einsum("nij,nj->ni", rotations[:, 4], tool)

    def inverse(self, place, tool, tilt, roll, start, iterations: int = 12):
        """Joints (N, 5) that bring `tool` (N, 3) to `place` (N, 3) with the given tilt and roll (N,).

        Searches from `start` (N, 5). Returns joints within their limits and the distance (N,) that remains, metres.
        """
        q = torch.cat((start[:, :4], roll[:, None]), 1)
        damping = 1e-5 * torch.eye(4, device=q.device)
        pitch = q.new_tensor((0.0, 0.1, 0.1, 0.1)).expand(len(q), 1, 4)
        for _ in range(iterations):
            origins, rotations = self.forward(q)
            reached = origins[:, 4] + torch.einsum("nij,nj->ni", rotations[:, 4], tool)
            arms = reached[:, None] - origins[:, :4]
            jacobian = torch.linalg.cross(rotations[:, :4, :, 2], arms, dim=-1)  # (N, 4 joints, 3)
            lean = 0.1 * (
                math.pi / 2 - tilt - q[:, 1:4].sum(1)
            )  # 0.1 m: an angle's weight against a distance
            rows = torch.cat((jacobian.transpose(1, 2), pitch), 1)  # (N, 4 equations, 4 joints)
            error = torch.cat((place - reached, lean[:, None]), 1)[..., None]
            normal = rows.transpose(1, 2) @ rows + damping
            change = torch.linalg.solve_ex(normal, rows.transpose(1, 2) @ error)[0].squeeze(-1)
            q = torch.cat((q[:, :4] + change.clamp(-0.4, 0.4), q[:, 4:]), 1)
            q = torch.clamp(q, self.low, self.high)
        return q, (self.place_of(q, tool) - place).norm(dim=1)


# -------------------------------------------------------------------------------------------------------- controller --
class Expert:
    """Solves the task of an `envs.so101` environment; see the module's docstring.

    Call `reset(truncations)` after each step that may have ended episodes, and `act()` before the next one.
    """

    def __init__(self, env: so101.SO101Env):
        self.env, self.phases, self.arm = env, PHASES[env.task.verb], Arm(env.mjm, env.device)
        n, dev = env.num_envs, env.device
        self.phase, self.clock = (torch.zeros(n, dtype=torch.int64, device=dev) for _ in range(2))
        self.tilts = torch.zeros(2, n, device=dev)  # to pick, to put
        self.heading, self.roll = torch.zeros(n, device=dev), torch.zeros(n, device=dev)
        self.origin, self.held = torch.zeros(n, 3, device=dev), torch.zeros(n, 3, device=dev)
        self.steps = torch.tensor([p.steps for p in self.phases], device=dev)
        self.tolerance = torch.tensor([p.tolerance for p in self.phases], device=dev)
        # The roll at which the jaw opens straight across the arm, to the right.
        opening = self.arm.forward(env.start_pose[None, :5])[1][0, 4, :, 0]
        self.across = env.start_pose[4] - (torch.atan2(opening[1], opening[0]) + math.pi / 2)
        self.reset()

    def reset(self, where: torch.Tensor | None = None) -> None:
        """Begins new episodes in `where`, a mask (N,) (None: in all): first phase, new choice of tilt and roll."""
        mask = torch.ones_like(self.phase, dtype=torch.bool) if where is None else where
        rows = mask.nonzero().squeeze(1)
        if len(rows) == 0:
            return
        self.phase[rows] = self.clock[rows] = 0
        self.origin = torch.where(mask[:, None], self.env.pose("item")[0], self.origin)
        self.heading = torch.where(mask, self._choose_heading(), self.heading)
        self.held = torch.where(
            mask[:, None], self._grip(torch.zeros_like(self.heading)), self.held
        )
        self.tilts[:, rows] = self._choose_tilts(rows)
        self.roll = self._roll(self.tilts[0])

    def act(self) -> torch.Tensor:
        """Actions (N, 6) for the present state; moves each environment on to its next phase where that is due."""
        env = self.env
        item, _ = env.pose("item")
        origins, rotations = self.arm.forward(env.qpos[:, :5])
        in_hand = torch.einsum("nji,nj->ni", rotations[:, 4], item - origins[:, 4])
        self.held = torch.where(self._is("jaw", "close", "hold")[:, None], in_hand, self.held)

        # Go on?
        place, tool = self._now()
        lean = math.pi / 2 - self._tilt() - env.qpos[:, 1:4].sum(1)
        turned = torch.maximum(lean.abs(), (self.roll - env.qpos[:, 4]).abs()) < 0.15
        near = (self.arm.place_of(env.qpos[:, :5], tool) - place).norm(dim=1) < self.tolerance[
            self.phase
        ]
        there = near & turned
        done = (self._is("until", "there") & there) | (
            self._is("until", "grasped") & env.facts()["grasped"]
        )
        done |= self.clock >= self.steps[self.phase]
        done &= self.phase < len(self.phases) - 1
        self.phase += done
        self.clock = torch.where(done, 1, self.clock + 1)

        # Arm: straight towards the goal in joint space, as fast as the slowest joint allows.
        place, tool = self._now()
        joints, _ = self.arm.inverse(place, tool, self._tilt(), self.roll, env.target[:, :5])
        joints = torch.where(self._is("place", "home")[:, None], env.start_pose[:5], joints)
        change = (joints - env.target[:, :5]) / env.action_scale[:5]
        arm = change / change.abs().amax(1, keepdim=True).clamp_min(1.0)

        # Jaw: open wide enough for the item, unless the phase says else.
        angle = (
            2 * env.item_half[:, 0] + 2 * CLEARANCE + 0.002
        ) / 0.075  # the jaw's tip moves 75 mm a radian
        angle = torch.where(self._is("jaw", "release"), angle - RELEASE, angle)
        angle = torch.where(self._is("jaw", "close"), env.joint_low[5], angle)
        angle = torch.where(self._is("jaw", "hold"), env.qpos[:, 5] - HOLD, angle)
        angle = torch.where(self._is("jaw", "shut"), 0.0, angle)
        jaw = ((angle - env.target[:, 5]) / env.action_scale[5]).clamp(-1.0, 1.0)
        return torch.cat((arm, jaw[:, None]), 1)

    def _tilt(self) -> torch.Tensor:
        """Tilt (N,) of each environment's present phase."""
        return torch.where(self._is("put", True), self.tilts[1], self.tilts[0])

    def _is(self, field: str, *values: str | bool) -> torch.Tensor:
        """Mask (N,) of the environments whose present phase has one of `values` in `field`."""
        return torch.tensor(
            [getattr(p, field) in values for p in self.phases], device=self.env.device
        )[self.phase]

    # ---- places ------------------------------------------------------------------------------------------------------
    def _grip(self, tilt: torch.Tensor | None = None) -> torch.Tensor:
        """The point (N, 3) of the gripper's frame where the middle of the item belongs before the jaw closes.

        As deep between the fingers as the table allows with `tilt` (N,) (None: the chosen one), at most at the tips'
        middle. Tall items are held near their upper end: the jaw opens in a wedge, too narrow for them further up.
        """
        env = self.env
        tilt = self.tilts[0] if tilt is None else tilt
        half = env.item_half
        x = FIXED_FACE + CLEARANCE + half[:, 0]
        # The lowest corner of each finger must stay above the table. Downwards, in the gripper's frame:
        # (-sin tilt sin heading, +-sin tilt cos heading, -cos tilt).
        lean = tilt.sin() * self.heading.sin()  # one finger is lower than the other
        side = FINGER_HALF_WIDTH * (tilt.sin() * self.heading.cos()).abs()
        lower = lean.abs() * (half[:, 0] + CLEARANCE + FINGER_THICKNESS)
        z = TIP_END + (half[:, 2] - side - lower) / tilt.cos()
        return torch.stack(
            (x, torch.zeros_like(x), z.clamp_max(FINGERTIPS) - (half[:, 2] - 0.014).clamp_min(0.0)),
            1,
        )

    def _places(
        self, grip: torch.Tensor | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name -> (place (N, 3) in the world, tool (N, 3) in the gripper's frame that belongs there)."""
        env, grip = self.env, self._grip() if grip is None else grip
        item, _ = env.pose("item")
        up = item.new_tensor((0.0, 0.0, 1.0))
        half = env.item_half[:, 2:]
        closed = item.new_tensor((0.004, 0.0, -0.096)).expand_as(
            item
        )  # middle of the tips with the jaw shut
        places = {
            "over_item": (item + (half + 0.02) * up, closed),
            "above_item": (
                item,
                grip - (half + 0.03) * up,
            ),  # backwards along the fingers, which needs less reach
            "at_item": (item, grip),
            "home": (item, grip),
        }
        if env.task.support:
            support, turn = env.pose("support")
            in_bin = env.task.support == "bin"
            floor = (
                so101.BIN_THICKNESS - env.support_z[:, None] if in_bin else env.support_half[:, 2:]
            )
            goal = support + (floor + half) * turn[:, :, 2]
            # Into a bin, cubes are dropped from 12 mm, which keeps the fingers off its walls and floor.
            drop = (0.012 if env.task.item == "cube" else 0.004) if in_bin else 0.002
            above = goal + ((env.support_half[:, 2:] if in_bin else 0.0) + 0.025) * up
            rise = (above - self.origin)[:, 2:].clamp_min(0.04)
            beside = self.held + item.new_tensor((CLEARANCE, 0.0, 0.0))
            if env.task.support == "can":  # cans are tall: come from above them
                places["above_item"] = (item, grip - (half + 0.06) * up)
            places |= {
                "raised": (self.origin, self.held - rise * up),  # backwards as well
                "above_goal": (above, self.held),
                "at_goal": (goal + drop * up, self.held),
                "beside_goal": (goal + drop * up, beside),
                "retreat": (goal + 0.03 * up, beside),
            }
        return places

    def _now(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Place and tool (N, 3) of each environment's present phase."""
        places = self._places()
        both = torch.stack([torch.stack(places[p.place]) for p in self.phases])  # (P, 2, N, 3)
        return both[self.phase, :, torch.arange(len(self.phase), device=both.device)].unbind(1)

    # ---- the choices of an episode -----------------------------------------------------------------------------------
    def _choose_heading(self) -> torch.Tensor:
        """Turn (N,) of the opening direction away from "across the arm, to the right", seen from above.

        Along a cube's sides, the fingers away from the support, turning as little as may be.
        """
        env = self.env
        item, turn = env.pose("item")
        right = torch.atan2(item[:, 1], item[:, 0]) - math.pi / 2
        if env.task.item == "cube":
            face = torch.atan2(turn[:, 1, 0], turn[:, 0, 0]) - right
            face = face - (face / (math.pi / 2)).round() * (
                math.pi / 2
            )  # the nearest side, in [-pi/4, pi/4]
            heading = face[:, None] + face.new_tensor((-math.pi / 2, 0.0, math.pi / 2))
        else:
            heading = item.new_tensor((-1.1, -0.8, -0.4, 0.0, 0.4, 0.8, 1.1)).expand(len(item), -1)
        roll = self.across + heading
        cost = heading.abs() + 100.0 * ((roll < env.joint_low[4]) | (roll > env.joint_high[4]))
        if env.task.support:
            # Seen from above, the open fingers sweep a rectangle about the item; how far is the support outside it?
            angle = right[:, None] + heading
            opening = torch.stack((angle.cos(), angle.sin()), -1)  # (N, candidates, 2)
            away = (env.pose("support")[0] - item)[:, None, :2]
            along, across = (
                (away * opening).sum(-1),
                away[..., 0] * opening[..., 1] - away[..., 1] * opening[..., 0],
            )
            reach = env.item_half[:, :1] + CLEARANCE
            # The fixed finger on the one side (beside a tall can its thicker root counts), the open jaw on the other.
            fixed = ROOT_REACH if env.task.support == "can" else FINGER_REACH
            beyond = torch.maximum(along - reach - JAW_REACH, -along - reach - fixed).clamp_min(0.0)
            outer = (
                env.support_half[:, 0]
                if env.task.support == "can"
                else env.support_half[:, :2].norm(dim=1)
            )
            gap = torch.hypot(beyond, (across.abs() - 0.012).clamp_min(0.0)) - outer[:, None]
            cost = cost + 600.0 * (0.004 - gap).clamp_min(0.0)
        return heading.gather(1, cost.argmin(1, keepdim=True)).squeeze(1)

    def _roll(self, tilt: torch.Tensor) -> torch.Tensor:
        """The wrist's roll (N,) that turns leaning fingers to the heading.

        They meet a side best where the angle between their normals is least: tan(roll) = cos(tilt) tan(heading).
        """
        return self.across + torch.atan2(tilt.cos() * self.heading.sin(), self.heading.cos())

    def _choose_tilts(self, rows: torch.Tensor) -> torch.Tensor:
        """Tilts (2, M) for picking and putting in the environments `rows` (M,): all in reach, the way there short."""
        env, m, k = self.env, len(rows), len(TILTS)
        start, ways = env.start_pose[:5].repeat(m, 1), []
        for put in (
            False,
            True,
        ):  # joints (M, K, places, 5) and what it costs to go through them (M, K)
            names = dict.fromkeys(
                p.place for p in self.phases if p.put == put and p.place != "home"
            )
            joints, missed = [], []
            for tilt in TILTS:
                tilt = torch.full_like(self.heading, tilt)
                places, roll = self._places(self._grip(tilt)), self._roll(tilt)[rows]
                for name in names:
                    place, tool = (x[rows] for x in places[name])
                    start[:, 0] = -torch.atan2(place[:, 1], place[:, 0])
                    found, miss = self.arm.inverse(place, tool, tilt[rows], roll, start)
                    joints.append(found), missed.append(miss)
            if names:
                joints = torch.stack(joints, 1).view(m, k, len(names), 5)
                missed = torch.stack(missed, 1).view(m, k, len(names)).amax(2)
                inner = self._steps(joints[:, :, 1:], joints[:, :, :-1]).sum(2) + 1e4 * (
                    missed - 0.002
                ).clamp_min(0.0)
                ways.append((joints, inner))
        tilts = self.heading.new_tensor(TILTS)
        joints, steps = ways[0]
        steps = steps + self._steps(joints[:, :, 0], env.qpos[rows, None, :5])
        # Leaning fingers grip with the corners of their tips, and in a bin they meet its walls: little tilt is better.
        if len(ways) == 1:
            return tilts[(steps + 50.0 * tilts).argmin(1)].expand(2, m)
        # Each pair of tilts (M, K to pick, K to put): coming too late costs most, then, where the item must stay level,
        # a change of tilt.
        between = self._steps(joints[:, :, None, -1], ways[1][0][:, None, :, 0])
        total = steps[:, :, None] + between + ways[1][1][:, None]
        change = (tilts[:, None] - tilts).abs()
        level, lean = (5.0, 10.0) if env.task.support == "bin" else (100.0, 0.0)
        late = 5.0 * (total - BUDGET).clamp_min(0.0)
        best = (
            (late + 0.2 * total + level * change + 20.0 * tilts[:, None] + lean * tilts)
            .flatten(1)
            .argmin(1)
        )
        return torch.stack((tilts[best // k], tilts[best % k]))

    def _steps(self, joints: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Control steps (...) from joints to other joints (..., 5) at full speed; the slowest joint sets the pace."""
        return ((joints - others)[..., :4] / self.env.action_scale[:4]).abs().amax(-1)


# ------------------------------------------------------------------------------------------------------ command line --
@torch.no_grad()
def run(env: so101.SO101Env, frames: list | None = None) -> torch.Tensor:
    """One episode in every environment, from a fresh `env.reset`; returns success at the end (N,).

    With a list as `frames`, appends an image for people of environment 0 before each step.
    """
    expert = Expert(env)
    for _ in range(env.max_episode_steps):
        if frames is not None:
            frames.append(env.render([0], size=256)[0])
        _, _, _, _, info = env.step(expert.act())
    return info["episode"]["success_at_end"]


@dataclass
class Args:
    """Prints a table of success rates, or writes videos."""

    episodes: int = 100
    """Episodes a task, each with its own seeded start."""
    seed: int = 1
    """Seed of the starts and of the randomisation."""
    tasks: tuple[str, ...] = tuple(so101.TASKS)
    """Environment ids."""
    device: str = "cpu"
    """Torch device."""
    video: Path | None = None
    """Folder for one mp4 of each task; no table is printed then."""


def main(args: Args) -> None:
    """The command line of this module."""
    if args.video is None:
        print("| task | success, randomised | success, not randomised |\n|---|---|---|")
    for task in args.tasks:
        if args.video is not None:
            import imageio

            env, frames = (
                so101.make(task, 1, args.device, seed=args.seed, images=False, stagger=False),
                [],
            )
            run(env, frames)
            args.video.mkdir(parents=True, exist_ok=True)
            imageio.mimsave(args.video / f"{task}.mp4", frames, fps=so101.CONTROL_HZ)
            continue
        cells = []
        for dr in (True, False):
            env = so101.make(
                task,
                args.episodes,
                args.device,
                seed=args.seed,
                domain_randomization=dr,
                images=False,
                stagger=False,
            )
            solved = run(env)
            cells.append(f"{int(solved.sum())} / {len(solved)}")
            env.close()
        print(f"| `{task}` | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
