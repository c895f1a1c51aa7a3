"""The eight SO-101 tasks, and the numbers that belong to all of them: joints, limits, episodes, objects."""

import math
from dataclasses import dataclass

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
START_POSE = (0.0, 0.0, 0.0, math.pi / 2, -math.pi / 2, math.pi / 3)
ACTION_SCALE = (0.1, 0.1, 0.1, 0.1, 0.1, 0.2)  # radians per control step at |action| = 1
CONTROL_HZ, SUBSTEPS, HORIZON = 10.0, 10, 50
# What a robot keeps its targets to; `step` does the same, so that a policy sees in training what it will see there.
VELOCITY_LIMIT = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)  # rad/s, of a target: what |action| = 1 asks for
ACCELERATION_LIMIT = (
    10.0,
    10.0,
    10.0,
    10.0,
    10.0,
    20.0,
)  # rad/s^2: full speed after one control step; stops are free
TRACKING_ERROR = (
    0.35,
    0.35,
    0.35,
    0.35,
    0.35,
    0.6,
)  # radians from target to joint: stays near a blocked arm
JOINT_MARGIN = 0.02  # radians that targets keep from the joint limits
SPAWN_CENTRE, SPAWN_HALF = (0.30, 0.0), 0.10
DENSITY = 200.0  # kg/m^3, of item and stacked-upon objects
BIN_DENSITY = 1000.0  # kg/m^3, near printed plastic: the published bin has its simulator's default
BIN_THICKNESS = 0.005
FINGER_FRICTION, TABLE_FRICTION = 2.0, 0.3  # averaged with the item's, as PhysX combines them
SPAWN_GAP = 0.01  # metres around each object's radius that nothing else spawns in
RED, BLUE, WHITE = (0.85, 0.07, 0.07), (0.08, 0.20, 0.80), (0.92, 0.92, 0.92)
RANDOM_TRIES = 64


@dataclass(frozen=True)
class Task:
    """What one id stands for: the verb, the shape of the item, and what it goes onto or into."""

    verb: str
    item: str  # "cube" | "can"
    support: str | None = None  # None | "bin" | "large_cube" | "can"


TASKS = {
    f"SO101{verb}{thing}-v1": Task(
        verb=verb.lower(),
        item="cube" if verb == "Stack" else thing.lower(),
        support={"Place": "bin", "Stack": {"Cube": "large_cube", "Can": "can"}[thing]}.get(verb),
    )
    for verb in ("Reach", "Lift", "Place", "Stack")
    for thing in ("Cube", "Can")
}
