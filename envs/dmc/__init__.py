"""The DeepMind Control Suite from pixels: several tasks at once, in processes or in one batch, with action repeat.

`make("walker_walk", num_envs, device, seed=...)` returns a batched environment with the contract of
`envs/__init__.py`. Ids are `domain_task` of the control suite (`cup_catch` is `ball_in_cup_catch`) and the
manipulation tasks (`reach_duplo`, seen by the camera `front_close`). What is as published with DrQ-v2: camera 0
(quadrupeds: 2), rewards of the repeated frames summed, each times the product of the discounts before it, actions
scaled to [-1, 1]. What is not:
  1. A true end (`discount` 0) is a termination (published: turned into 1). Time limits are truncations.
  2. The discount of a step is the product of those of its frames; info["discount"] hands it to the learner.
  3. An environment whose physics diverges is restarted alone.

Who draws (`renderer`):
  egl      OpenGL on the GPU, or by software where there is none (packages libegl1 and libgl1-mesa-dri)
  osmesa   OpenGL by software (package libosmesa6)
  warp     MuJoCo Warp's ray tracer draws all environments in one batch on `device`; pip packages alone, a similar image
  auto     MUJOCO_GL if that is set, else the first of egl, osmesa and warp that works here; the choice is printed
Physics always runs in MuJoCo's C library on the CPU (`worker.py`): in this process for one environment, else
in `workers` processes.
"""

from envs.dmc.env import EASY, HARD, MEDIUM, DMCEnv, make
from envs.dmc.processes import RENDERERS, choose_renderer

__all__ = ["EASY", "HARD", "MEDIUM", "RENDERERS", "DMCEnv", "choose_renderer", "make"]
