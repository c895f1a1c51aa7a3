"""The Unitree Go1 in JAX: walking on command, thousands of robots in one compiled program.

Tasks `Go1JoystickFlat` and `Go1JoystickRough` follow MuJoCo Playground's Go1 joystick task (arXiv
2502.08844): timing, gains, observations, noise, commands, all sixteen reward terms and randomisation
have its numbers. `Go1Stand` is a small task of ours: stand up from a drop and hold the trunk at a
commanded height, roll and pitch.

    env = make("Go1JoystickFlat", "mjx-jax", domain_randomization=True)   # options: those of EnvConfig
    state = env.reset_batch(jax.random.split(jax.random.PRNGKey(0), 64))  # State, leading axis N
    state = env.step_batch(state, actions)                                # actions (N, 12) in [-1, 1]

It keeps the contract for JAX of envs/__init__.py, on each of three back ends (backends.py):
    mjx-jax   MuJoCo XLA: CPU, GPU, TPU
    mjx-warp  the same through MuJoCo Warp: made for NVIDIA GPUs, on a CPU for tests only
    mujoco-c  MuJoCo's C library in threads: the fastest on a CPU; converged. What evaluation uses

    robot.py     the model: go1.xml, terrain, kinematics in closed form, what randomisation varies
    task.py      tasks, settings, the state, every reward term
    env.py       reset, step, observations, commands, pushes
    backends.py  from joint targets to the next state
    render.py    images for people

Differences from Playground's task, each for a reason:
 1. The state that is carried is slim: positions, velocities, the solver's warm start and the task's
    numbers. The next episode is drawn anew, at no cost, whenever one ends. (Playground's training
    wrapper restores each environment's first state; commands, last action, air time and swing height
    survive the fall.)
 2. The observation shows the action just taken, the command that the next reward is about and, for
    the critic, the feet that touch the floor now (there: the action and the contacts of the step
    before, and for one step the old command), at an episode's first step too.
 3. A fall and a time-out are told apart; the observation before the reset is kept in `final_obs`.
 4. An environment whose physics diverges is restarted alone, as a time-out, without reward, and
    counted in metrics["nan"].
 5. Pushes are drawn anew each time, the wait included.
 6. The rough terrain is ours (value noise, 5 cm high); to leave it is a time-out. There one walks off
    its edge.
 7. The first observation of an episode is computed in closed form; its accelerometer reads as at
    rest, torques are 0.
 8. commands="balanced", which training uses, has more commands to stand and to turn on the spot.

Contacts or constraints that do not fit into a back end's memory are counted in metrics["overflow"];
ppo_mjx_go1 stops where that is more than one step of a thousand. metrics["action_rate"] is the mean
speed of the joint targets, rad/s.

Angles are radians, lengths metres, forces newtons, times seconds; x forward, y left, z up; legs FR,
FL, RR, RL.
"""

try:
    from envs.go1.env import Go1Env
    from envs.go1.task import TASKS, EnvConfig, State
except ImportError as error:
    message = f'Go1 tasks need JAX, MuJoCo and MJX: pip install -e ".[go1]"  ({error})'
    raise ImportError(message) from None

__all__ = ["TASKS", "EnvConfig", "Go1Env", "State", "make"]


def make(env_id: str, backend: str = "mjx-jax", threads: int | None = None, **options) -> Go1Env:
    """The environment `env_id`; options are EnvConfig's. threads: of mujoco-c; None: all cores.

    Raises ValueError, in one line, where something cannot be.
    """
    return Go1Env(env_id, EnvConfig(**options), backend, threads)
