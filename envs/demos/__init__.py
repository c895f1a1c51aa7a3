"""Demonstrations: scripted experts made human, recorded in robomimic's HDF5 layout, and a reader for it.

    python -m envs.demos --env-id SO101PlaceCube-v1 --episodes 200 --noise 0.1
    python -m envs.demos --env-id SO101LiftCube-v1 --obs pixels --cameras wrist third --render-size 84 --out lift.hdf5
    python -m envs.demos --env-id robosuite/PickPlaceCan --episodes 50        (docs/envs/robosuite.md: its environment)
    python -m envs.demos --from-lerobot FOLDER --env-id MyArm --out arm.hdf5  a LeRobotDataset, brought to this layout
    python -m envs.demos --show lift.hdf5                                     what a file holds, ours or robomimic's

The expert knows the true state and never errs by itself. `Human` makes it err, by what people do with a leader arm:
  noise   smooth disturbances of each action (an autoregressive process, 0.8 of it left after a step); the strength of
          an episode is `noise` times a factor from [0.5, 1.5], in units of the largest action
  pause   at each step, with this probability, a stop of 2 to 8 steps
  slow    each episode at a pace of its own: actions times a factor from [1 - slow, 1]
What is stored is what was executed. By default only episodes that end in success are kept, as robomimic's files have
it; how many were tried stands in the file.

Layout of a file (T steps of an episode; all as robomimic has it but `success` and the attributes in brackets):
    data                      attributes total, env_args (JSON: env_name, type, env_kwargs [, env_id, spec, recorded])
    data/demo_0               attributes num_samples [, success]
        actions (T, A)  rewards (T,)  dones (T,)  success (T,)
        obs/state, obs/privileged, obs/<camera>_image ...    (T, ...)    before the action; images uint8 (T, H, W, 3)
                                                             (robosuite: robot0_eef_pos ... and object, as robomimic)
        next_obs/...                                         (T, ...)    the true next one, also at the end
    mask/train, mask/valid    names of demonstrations
A reward is 1 in every step that leads to a success, else 0; done is 1 there and in the last step.

For programs: `read(path)` gives a list of demonstrations, see there; `record(env, expert, path, ...)` writes them.
"""

from envs.demos.human import Human
from envs.demos.reading import describe, env_args, fit, read, read_successes
from envs.demos.recording import convert, record

__all__ = ["Human", "convert", "describe", "env_args", "fit", "read", "read_successes", "record"]
