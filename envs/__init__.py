"""Environments: one folder a simulator, one contract for all, and `make`, which goes by the id.

An algorithm of `algos/` is one file that is copied alone. What its `make_envs` has to return is on
this page, whole: any object that keeps one of the three contracts below can stand there, whatever
simulates it. tests/strangers.py has one small environment for each.

== Torch: squint_sac, drqv2, sac_pixels, resfit, bc_chunk ==

    env = make(env_id, num_envs, device, *, seed=0, stagger=False, **options)

N environments step together. All tensors live on `device`. A new environment has been reset with
its seed, so `step` may come first. With `stagger=True` the first episodes have different lengths,
so that environments do not end in lockstep.

num_envs, action_dim       int: N, A
max_episode_steps          int: steps after which an episode is cut off
state_dim                  int: S, 0 if there is none
image_shape                (H, W, C), 3 channels a camera; only where there are images
privileged_dim             int: P; 0 unless the environment was asked for privileged observations
control_hz                 float: steps a second of the robot's time, for videos
nan_resets                 int tensor (): environments restarted because their physics was not finite
spec                       what a robot needs to run a policy (joints, limits, rates, cameras, layout
                           of the state): a dict of JSON values and nothing else; {} will do
has_success                optional bool: False if the task knows no success, only a return

obs                  dict: "rgb" uint8 (N, H, W, C); "state" float32 (N, S), also if S is 0;
                     "privileged" float32 (N, P) for a critic, never for a policy, if P is not 0.
                     Tensors handed out are not written to again
reset(seed=None)     -> obs. New episodes everywhere, all clocks at 0; with a seed the same ones
step(actions)        actions float32 (N, A) in [-1, 1] -> obs, rewards (N,) float32, terminations
                     (N,) bool, truncations (N,) bool, info. Time limits and restarted physics are
                     truncations. An environment whose episode ends begins the next one in the same
                     step: `obs` is that one's first observation
    info["final_obs"]    obs: the true next observation of every environment, ended or not
    info["episode"]      dict of (N,), valid where an episode ended: "return", "length",
                         "success_once", "success_at_end" (False where a task knows no success)
    info["success"]      (N,) bool, of the state just reached. Success ends an episode only with
                         the option `end_on_success=True`, which resfit and bc_chunk ask for; it
                         is then a termination
    info["discount"]     optional (N,): factor in [0, 1] of all later rewards; 1 if it is missing
step_begin(actions), step_end()
                     optional: the two halves of `step`. An environment that has them may work in
                     other processes between the two; drqv2 updates its networks there
render(which=(0,), size=256)
                     -> images for people, uint8 NumPy (len(which), size, size, 3)
state_dict()         -> everything that the future depends on, random state included, as nested
                     dicts and lists of tensors and plain values: `torch.load(weights_only=True)`
                     must read it back. No NumPy, no pickle
load_state_dict(d)   continues from there, bit for bit on a CPU; ValueError if `d` does not fit
close()              may be called twice

== Torch, differentiable: sapo_rewarped ==

As above, with these differences. There are no images: `obs_dims` (dict of shapes) replaces
`state_dim` and `image_shape`; obs has "state" (N, S) and, for particles or vertices, "points"
(N, P, 3). obs and rewards carry gradients with respect to all actions since the last `detach()`.
The end of an episode cuts the gradient of that environment and of no other: info["final_obs"] has
the gradient, the first observation of the next episode has none. info["nan"] (N,) bool:
environments whose physics was not finite; they restart alone, truncated, with reward 0 and no
gradient. An environment made with `stagger=True` spreads its clocks at every reset. `spec`,
`privileged_dim`, info["success"] and the successes of info["episode"] are not needed.

detach()             begins a window: gradients end here
render(world=0, size=256)
                     -> uint8 NumPy (size, size, 3)

== JAX: ppo_mjx_go1, distill_go1 ==

action_dim, control_hz, spec    as above
episode_length                  int: steps after which an episode is cut off
obs_dim, privileged_dim         int: lengths of obs["state"], which the policy sees, and of
                                obs["privileged_state"], the critic's
reset_batch(keys, stagger=False)
                     keys uint32 (N, 2) -> state. With stagger, clocks are spread over the episode
step_batch(state, actions)
                     actions (N, A) -> state. Pure: it can stand in a jitted scan. An environment
                     whose episode ends begins the next one in the same step, with a key of its own
state                a NamedTuple or struct of arrays (N, ...) with at least
    obs, final_obs   dicts of the two observations: to act on, and the true next one
    reward, terminated, truncated
                     (N,) of the step that led here
    metrics          dict of (N,) of that step; their means are logged
    episode_return, episode_length
                     (N,), valid where an episode ended in that step
    qpos             what `render` takes
render(qpos, size=(height, width))
                     qpos (T, ...) of one environment at T times -> uint8 NumPy (T, height, width, 3)
"""

import importlib
import os
from fnmatch import fnmatchcase
from importlib.util import find_spec
from inspect import Parameter, signature

# (pattern of ids, name, module here, package that it needs, how to install that); the first match counts
SIMULATORS = (
    ("dot_reach", "dot-reach", "dot_reach", "torch", "pip install -e ."),
    ("SO101*", "SO-101", "so101", "mujoco_warp", 'pip install -e ".[so101]"'),
    (
        "robosuite/*",
        "robosuite",
        "robosuite",
        "robosuite",
        "make robosuite, an environment of its own",
    ),
    ("*-v[0-9]*", "ManiSkill", "maniskill", "mani_skill", 'pip install -e ".[maniskill]"'),
    ("[a-z]*_[a-z]*", "DeepMind Control", "dmc", "dm_control", 'pip install -e ".[dmc]"'),
    *(
        (name, "differentiable simulation", "rewarped", "warp", 'pip install -e ".[rewarped]"')
        for name in "RollingFlat FluidMove HandFlip SoftJumper AntRun HandReorient".split()
    ),
)
KNOWN = (
    "SO101ReachCube-v1 and its like, dot_reach, domain_task (DeepMind Control), Name-v1 (ManiSkill), "
    "robosuite/Name, RollingFlat, FluidMove, HandFlip, SoftJumper, AntRun, HandReorient"
)


def make(env_id: str, num_envs: int, device="cpu", **options):
    """The environment `env_id` of whichever simulator has it. Options that are None count as not given.

    Raises ValueError, in one line that says what would do, for an unknown id, for an option that the simulator does not
    have, and where something is not installed.
    """
    if env_id.startswith("Go1"):
        raise ValueError(
            f"{env_id} is an environment in JAX, made by envs.go1.make: see algos/ppo_mjx_go1.py"
        )
    rows = [row[1:] for row in SIMULATORS if fnmatchcase(env_id, row[0])]
    if not rows:
        raise ValueError(f"no task is called {env_id}: there are {KNOWN}")
    name, module, package, install = rows[0]
    if not installed(package):
        raise ValueError(f"{env_id} ({name}) needs {package}: {install}")
    given = {option: value for option, value in options.items() if value is not None}
    try:
        simulator = importlib.import_module(f"envs.{module}")
        known = options_of(simulator.make)
        unknown = [option for option in given if known and option not in known]
        if unknown:
            raise ValueError(
                f"{env_id} ({name}) has no option {', '.join(unknown)}; it has {', '.join(known)}"
            )
        return simulator.make(env_id, num_envs, device, **given)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # the simulators' own messages, which say what to do
        raise ValueError(str(error)) from error
    except TypeError as error:  # of a `make` that does not list its options
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{env_id} ({name}): {error}") from error


def installed(package: str) -> bool:
    """Whether the top-level `package` can be found; nothing is imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # an import hook may say so
        return False


def options_of(make) -> list[str]:
    """Names that `make` takes beside env_id, num_envs and device; none where it takes any (**options)."""
    parameters = signature(make).parameters.values()
    if any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.name not in ("env_id", "num_envs", "device")
    ]


def usable_cpus() -> int:
    """CPUs that this process may run on, which in a container or under taskset are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
