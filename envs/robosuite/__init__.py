"""robosuite's tasks: Lift, PickPlaceCan and NutAssemblySquare, on which residual RL was published, and any other id.

    env = make("robosuite/PickPlaceCan", num_envs=4, device="cpu", seed=1)

A Panda arm is moved by its operational-space controller at 20 Hz: action (N, 7) in [-1, 1], six changes of the
gripper's pose (5 cm and 0.5 rad at most, in the frame of the arm's base) and the gripper's command, -1 open, 1 closed.
Behind the contract of `envs/__init__.py`:
    state        each arm's eef_pos 3, eef_quat 4 (x, y, z, w) and gripper_qpos: 9 numbers for one Panda
    privileged   the same and robosuite's object-state: positions and quaternions of the objects
    rgb          the cameras side by side on channels; `agentview` and the wrist's, as in the paper
    rewards      sparse: 1 in a state of success, else 0
robosuite needs mujoco below 3.9 and numpy below 2, so it lives in an environment of its own: `make robosuite`.

On a CPU, images cost more than physics: the visual meshes have 357,000 vertices and the default shadow map 4096^2
texels. So this module draws with a renderer of its own, without shadows, reflections and multisampling; `look` chooses:
    plain       the visual meshes, drawn as said: the default
    full        robosuite's own settings: shadows, reflections, four samples a pixel
    collision   only what collides: several times faster still, and an image of its own
(OpenGL by `MUJOCO_GL`, egl unless that is set to osmesa; docs/envs/robosuite.md has the figures.)

Every environment draws its episodes from seeds of its own (`episode_seed`). Several are shared out over `workers`
processes; each is stepped by one process alone, so an episode does not depend on their number.
The two-armed tasks of DexMimicGen go by their ids where the user has installed that package, which no package index
has; `env_kwargs` hands robosuite what they need, and a demonstration file's env_args has it.

Shapes: `N` environments, `S` state, `P` privileged, `A` action dims. robosuite is imported when `make` runs.
"""

from envs.robosuite.env import HORIZONS, RobosuiteEnv, episode_seed, make
from envs.robosuite.simulation import CAMERAS, CONTROL_HZ, DEXMIMICGEN, STATE_PARTS

__all__ = [
    "CAMERAS",
    "CONTROL_HZ",
    "DEXMIMICGEN",
    "HORIZONS",
    "STATE_PARTS",
    "RobosuiteEnv",
    "episode_seed",
    "make",
]
