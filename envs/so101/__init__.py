"""The SO-101 task set on MuJoCo: eight manipulation tasks seen through a wrist camera, thousands at once.

`make("SO101ReachCube-v1", num_envs, device, seed=...)` returns a batched environment whose tensors live on `device`:
physics and images come from pip packages alone (no Vulkan, no OpenGL, no display). On an NVIDIA GPU, MuJoCo Warp
steps and ray-traces all environments on the device; on a CPU, MuJoCo's C library steps them in threads and MuJoCo
Warp's renderer draws them (`engine="auto"` picks; `benchmarks/throughput.py` has the figures behind the choice).

Tasks: Reach, Lift, Place and Stack, each with a cube or a can; sizes, spawn region, rewards, success tests and
randomisation follow Squint (arXiv 2602.21203), with these changes, each for a defect of the published set:
  1. Place: the item must be inside the bin's *rotated* footprint and rest on its floor (published: an axis-aligned test
     that ignores height), and success is worth one point more than anything before it (published: the same 9 points).
  2. Controller targets keep inside the joint limits and near the joints (published: they wind up beyond them).
  3. The first frame of an episode is drawn from the new episode's camera pose (published: from the old one's).
  4. The servos have the torque of real ones, 3 N m (published: 100 N m), 1.5 N m at the gripper; see `so101.xml`.
  5. Randomisation is drawn per environment and per episode (published: sizes, friction, lights and field of view once
     per process; the camera's pose at every step).
  6. A spawn that never overlaps: rejection sampling with enough candidates, the farthest apart if all fail
     (published: silently the middle of the region).
  7. Robot links float against gravity, as published; the arm does not collide with itself (published: it does).
  8. Reach: the goal stays above the item when that is pushed (published: above where it stood at first).
  9. Lifted: off the table in whatever orientation (published: higher than an upright item at rest).
 10. Grasped: the fingers' forces on the item oppose each other (published: a test against axes along the fingers).
 11. Both objects of a stack share one friction; torsional friction of contacts is ours.
Rewards and success tests agree with the authors' on the same states but for 1 and 8 to 10 (tests/test_so101.py).
Angles are radians, lengths metres, forces newtons; the world frame is the robot's base, x forward, y left, z up.
"""

try:
    import mujoco  # noqa: F401
    import mujoco_warp  # noqa: F401
    import warp
except ImportError as error:
    raise ImportError(
        f'SO-101 tasks need MuJoCo and MuJoCo Warp: pip install -e ".[so101]"  ({error})'
    ) from None

warp.config.log_level = warp.LOG_WARNING  # no line for every kernel that is loaded

from envs.so101.env import SO101Env, make  # noqa: E402
from envs.so101.episodes import Randomization  # noqa: E402
from envs.so101.scene import build_model  # noqa: E402
from envs.so101.tasks import (  # noqa: E402
    ACCELERATION_LIMIT,
    ACTION_SCALE,
    BIN_DENSITY,
    BIN_THICKNESS,
    CONTROL_HZ,
    DENSITY,
    HORIZON,
    JOINT_MARGIN,
    JOINTS,
    SPAWN_CENTRE,
    SPAWN_HALF,
    START_POSE,
    SUBSTEPS,
    TASKS,
    TRACKING_ERROR,
    VELOCITY_LIMIT,
    Task,
)

__all__ = [
    "ACCELERATION_LIMIT",
    "ACTION_SCALE",
    "BIN_DENSITY",
    "BIN_THICKNESS",
    "CONTROL_HZ",
    "DENSITY",
    "HORIZON",
    "JOINT_MARGIN",
    "JOINTS",
    "SPAWN_CENTRE",
    "SPAWN_HALF",
    "START_POSE",
    "SUBSTEPS",
    "TASKS",
    "TRACKING_ERROR",
    "VELOCITY_LIMIT",
    "Randomization",
    "SO101Env",
    "Task",
    "build_model",
    "make",
]
