"""ManiSkill 3 tasks by their own ids, behind the environment contract of this repository.

    env = make("PickCube-v1", num_envs=16, device="cuda", seed=1)

Episodes follow ManiSkill's own vector environment with `ignore_terminations=True`: success never ends an episode, an
environment that reaches the time limit is reset in the same step, and the observation before that is `final_obs`.
Images are all of the task's sensor cameras stacked on channels; the state is the task's `agent` and `extra` entries
flattened in their own order, which is what ManiSkill's `FlattenRGBDObservationWrapper` gives; rewards are ManiSkill's
`normalized_dense` ones.

Two ways to simulate, chosen by `device` (or `sim_backend`) and never swapped silently:

- `physx_cuda`: all environments in one batched simulation on the GPU. Needs NVIDIA's Vulkan driver.
- `physx_cpu`: SAPIEN simulates one environment at a time, so they are shared out over processes (`num_workers`); a
  single one runs in this process. Images come from a Vulkan driver in software, Mesa's lavapipe 25 or newer:
  `python scripts/install_software_vulkan.py` unpacks one that this package finds by itself.

Every environment draws its episodes from seeds of its own (`episode_seed`), so on the CPU an episode depends on the
seed, the environment and the episode's number alone, neither on the number of workers nor on what the learner draws.

Shapes: `N` environments, `H = W = render_size`, `C` = 3 x cameras, `A` action dims. ManiSkill is imported when
`make` runs.
"""

from envs.maniskill.env import ManiSkillEnv, episode_seed, make
from envs.maniskill.vulkan import use_software_vulkan, vulkan_cache

__all__ = ["ManiSkillEnv", "episode_seed", "make", "use_software_vulkan", "vulkan_cache"]
