"""ManiSkill 3 tasks by their own ids, behind the environment contract of this repository.

    env = make("PickCube-v1", num_envs=16, device="cuda", seed=1)

Episodes follow ManiSkill's own vector environment with `ignore_terminations=True`: success never ends an episode, a
world that reaches the time limit is reset in the same step, and the observation before that is reported as `final_obs`.
Pictures are all of the task's sensor cameras stacked on channels; the state is the task's `agent` and `extra` entries
flattened in their own order, which is what ManiSkill's `FlattenRGBDObservationWrapper` gives; rewards are ManiSkill's
`normalized_dense` ones.

Two ways to simulate, chosen by `device` (or `sim_backend`) and never swapped silently:

- `physx_cuda`: all worlds in one batched simulation on the GPU. Needs NVIDIA's Vulkan driver.
- `physx_cpu`: SAPIEN simulates one world at a time, so the worlds are shared out over worker processes (`num_workers`);
  a single world runs in this process. Pictures come from a Vulkan driver in software, Mesa's lavapipe 25 or newer:
  `python scripts/install_software_vulkan.py` unpacks one that this module finds by itself.

Worlds draw their episodes from seeds of their own (`episode_seed`), so on the CPU an episode depends on the seed, the
world and the episode's number alone, neither on the number of workers nor on what the learner draws.

Shapes: `N` worlds, `H = W = render_size`, `C` = 3 x cameras, `A` action dims. Nothing of ManiSkill is imported before
`make` is called.
"""

from envs.maniskill.env import ManiSkillEnv, episode_seed, make
from envs.maniskill.vulkan import use_software_vulkan, vulkan_cache

__all__ = ["ManiSkillEnv", "episode_seed", "make", "use_software_vulkan", "vulkan_cache"]
