"""A student of a Go1 policy: the same walk without the body's velocity, which no sensor measures.

Dataset aggregation (Ross et al., "A Reduction of Imitation Learning to No-Regret Online Learning",
arXiv 1011.0686) with a network as the expert, as in teacher and student for legged robots (Lee et
al., arXiv 2010.11251): the student acts, the teacher, which sees more, says what it would have done
at the states that the student came to, and the student is regressed on that.

    loss       E[KL(teacher(.|o) || student(.|o'))], both Gaussians before the tanh, in closed form
               o' the student's observation, o the teacher's, at states that the student visited

Differences from the papers:
 1. Only the last rollout is learned from; nothing is aggregated. The student acts from the first
    step on, by samples of its own policy, and the teacher never does.
 2. The student has no history of observations. It begins as the teacher without the inputs that it
    lacks, and keeps the teacher's statistics.
 3. The teacher's critic is handed on untouched: the student's checkpoint is one of ppo_mjx_go1.py,
    which evaluates it, films it, or trains it on by reward.

Commands, from the repository's root:
    train          python algos/distill_go1.py --teacher runs/NAME/best.npz
    resume         python algos/distill_go1.py --resume runs/STUDENT    (exactly)
    evaluate       python algos/ppo_mjx_go1.py --evaluate --checkpoint runs/STUDENT/best.npz
    smallest run   the first with a teacher of Go1Stand and --total-timesteps 100000

Expected result: walking, one seed: the teacher has 29.5 of 40 and 0.09 m/s of error, the student
29.6 and 0.12 after 1.5 million transitions (ten minutes on one busy core). Go1Stand: 7.3 and 7.2
after 76,800. docs/algos/distill_go1.md.

Shapes: N environments, T steps of a rollout, E epochs, M minibatches, b = N T / M transitions of a
minibatch, A actions, F entries of an observation, K iterations in one call of the program.
"""

# --- Imports --------------------------------------------------------------------------------------
import csv
import inspect
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

ALGO = "distill_go1"
START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
VIDEO_SECONDS = 10
MIN_STD = 1e-3  # of the policy's Gaussian
MIN_OBS_STD = 1e-2  # of an observation's entry


# --- Args -----------------------------------------------------------------------------------------
Backend = Literal["mjx-jax", "mjx-warp", "mujoco-c"]


# same in: ppo_mjx_go1, distill_go1
def default_backend() -> Backend:
    """The fastest here: on a CPU MuJoCo's C library, else MJX."""
    return "mujoco-c" if jax.default_backend() == "cpu" else "mjx-jax"


@dataclass
class Args:
    # run
    teacher: str = ""  # checkpoint (.npz) of ppo_mjx_go1.py
    env_id: str = "Go1JoystickFlat"  # by default the teacher's, as are the randomisation and noise
    seed: int = 1  # of exploration, minibatches and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 1_500_000  # environment transitions
    eval_freq: int = 500_000  # transitions between evaluations, each of which saves a checkpoint
    eval_episodes: int = 64  # of an evaluation, with the same seeds every time, in C MuJoCo
    log_freq: int = 50_000  # transitions of one call of the program, after which a row is logged
    resume: str | None = None  # run folder to continue, exactly, with all its arguments
    track: bool = False  # log to Weights & Biases too

    # environment
    backend: Backend = field(default_factory=default_backend)  # mjx-jax, mjx-warp, mujoco-c
    num_envs: int = 512  # parallel environments
    threads: int | None = None  # of MuJoCo's C library; None: all cores

    # algorithm
    unroll_length: int = 20  # T, steps of every environment in an iteration
    num_minibatches: int = 4  # M, of an epoch
    update_epochs: int = 5  # E, passes over the data of an iteration
    learning_rate: float = 3e-4  # Adam's
    max_grad_norm: float = 1.0  # of the gradient


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def need(holds, message: str):
    """Raises ValueError with the message unless something holds."""
    if not holds:
        raise ValueError(message)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def check_numbers(args: Args):
    """Raises ValueError for a number that means nothing: every count, rate and share has bounds."""
    may_be_0 = "seed camera atoms pad margin learning_starts random_steps std_steps"
    may_be_0 += " critic_warmup critic_epochs num_critics"
    shares = "gamma gae_lambda tau encoder_tau target_decay ema decay average dropout offline"
    for name, value in asdict(args).items():
        flag, usual = "--" + name.replace("_", "-"), type(getattr(Args, name, None))
        kinds = (usual, int) if usual is float else (usual,)
        fits = usual is type(None) or type(value) in kinds
        need(fits, f"{flag} must be of type {usual.__name__}, not {value!r}")
        if type(value) is int:
            need(value > 0 or name in may_be_0.split() and value == 0, f"{flag} must be at least 1")
        elif type(value) is float:
            low = -1e9 if name in ("v_min", "v_max") else 0
            high = 1 if name in shares.split() else 1e9
            need(low <= value <= high, f"{flag} must be from {low:g} to {high:g}, not {value}")


def check(args: Args):
    """Raises ValueError, one line, for a choice that would fail late, silently or unreadably."""
    check_numbers(args)
    need(args.teacher, "--teacher FILE is missing")
    size = args.num_envs * args.unroll_length
    whole = size % args.num_minibatches == 0
    need(whole, "--num-envs x --unroll-length must be a multiple of --num-minibatches")


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def cli(argv: list[str], defaults: Args) -> Args:
    """The command line; with -h the arguments by group, with these defaults, and the end."""
    if "-h" not in argv and "--help" not in argv:
        return tyro.cli(Args, args=argv, default=defaults)
    print(f"{__doc__.splitlines()[0]}\nusage: python {sys.argv[0]} [--NAME VALUE or --[no-]SWITCH]")
    for line in inspect.getsource(Args).splitlines()[2:]:
        code, _, comment = line.strip().partition("# ")
        name, _, kind = code.partition(": ")
        if name in Args.__dataclass_fields__:
            choices = kind[7 : kind.index("]") + 1] if kind.startswith("Literal") else ""
            flag, value = "--" + name.replace("_", "-"), getattr(defaults, name)
            print(f"  {flag:24}{value!s:18} {comment} {choices}")
        elif comment:
            print(f"\n{comment}")
    sys.exit(0)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The task is the teacher's by default; on --resume all is the run's."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    defaults = Args()
    if given.teacher:
        defaults.env_id = load(given.teacher)["args"]["env_id"]
    return cli(argv, defaults)


# same in: ppo_mjx_go1, distill_go1
def resumed_args(run: str, argv: list[str]) -> Args:
    """The arguments of a run; only its length, tracking and threads may be given again.

    Raises ValueError that names the first argument that differs.
    """
    found = load(Path(run) / "checkpoint.npz")["args"]
    own = {name: value for name, value in found.items() if name in Args.__dataclass_fields__}
    saved = replace(Args(**own), resume=run)
    args = cli(argv, saved)
    for name, value in asdict(args).items():
        flag = "--" + name.replace("_", "-")
        free = name in ("total_timesteps", "track", "threads")
        same = value == getattr(saved, name)
        need(free or same, f"{flag} cannot change on --resume of {run}")
    return args


# --- make_envs ------------------------------------------------------------------------------------
def make_envs(args: Args) -> tuple:
    """-> training environment, evaluation environment in C MuJoCo, with all the teacher's settings.

    Whatever keeps the contract for JAX in envs/__init__.py can stand here, if privileged_state
    begins with what the teacher sees, and that ends with what the student sees.
    """
    try:
        from envs import go1
    except ImportError as error:
        raise ValueError(f"make_envs needs envs.go1: pip install -e .[go1]  ({error})") from error
    taught = load(args.teacher)["args"]
    need(taught["linvel"], f"{args.teacher} lacks the velocity itself: nothing to teach")
    known = taught.keys() & go1.EnvConfig.__dataclass_fields__
    options = {name: taught[name] for name in known}
    options |= dict(linvel=False, warp_worlds=args.num_envs)
    env = go1.make(args.env_id, args.backend, args.threads, **options)
    judged = ("noise_level", "linvel", "action_latency", "pushes")  # all else is for training
    options = {name: options[name] for name in judged}
    return env, go1.make(args.env_id, "mujoco-c", args.threads, **options)


# --- Networks -------------------------------------------------------------------------------------
def policy(arrays: dict, obs) -> tuple:
    """obs (..., F) -> mean and deviation (..., A) of the Gaussian before the tanh.

    arrays: a checkpoint's, by name. They are those of `ActorCritic` in ppo_mjx_go1.py.
    """
    deviation = jnp.maximum(jnp.sqrt(arrays["stats/state/var"]), MIN_OBS_STD)
    x = (obs - arrays["stats/state/mean"]) / deviation
    layers = sum(name.startswith("params/actor/") for name in arrays) // 2
    for i in range(layers):
        layer = f"params/actor/layers/{i}"
        x = x @ arrays[f"{layer}/kernel"] + arrays[f"{layer}/bias"]
        if i < layers - 1:
            x = jax.nn.swish(x)
    if "params/scale" in arrays:
        loc, scale = x, jnp.broadcast_to(arrays["params/scale"], x.shape)
    else:
        loc, scale = jnp.split(x, 2, -1)
    return loc, jax.nn.softplus(scale) + MIN_STD


def begin_student(teacher: dict, size: int) -> tuple[dict, dict]:
    """What the student learns, what it keeps: the teacher's arrays for its last `size` inputs."""
    params, kept = {}, {}
    for name, array in teacher.items():
        if name in ("stats/state/mean", "stats/state/var", "params/actor/layers/0/kernel"):
            array = array[-size:]
        learned = name.startswith("params/actor/") or name == "params/scale"
        (params if learned else kept)[name] = jnp.asarray(array)
    return params, kept


# --- Update functions -----------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def optimizer(args: Args) -> optax.GradientTransformation:
    """Adam after clipping the joint gradient; the learning rate, which varies, is applied later."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam())


# same in: ppo_mjx_go1, distill_go1
def gaussian_kl(old_loc, old_std, loc, std):
    """KL(old || new) (...) of diagonal Gaussians; a tanh, the same for both, does not change it."""
    ratio = (jnp.square(old_std) + jnp.square(old_loc - loc)) / (2 * jnp.square(std))
    return (jnp.log(std / old_std) + ratio - 0.5).sum(-1)


def distill_loss(params: dict, mb: dict, kept: dict):
    """KL(teacher || student) of a minibatch with leaves (b, ...), and metrics."""
    loc, std = policy(params | kept, mb["obs"])
    kl = gaussian_kl(mb["teacher_loc"], mb["teacher_std"], loc, std).mean()
    return kl, {"loss/distill": kl, "train/std": std.mean()}


def learn(params: dict, opt_state, batch: dict, key, kept: dict, args: Args) -> tuple:
    """All updates from a rollout with leaves (T N, ...) -> params, opt_state, mean metrics."""

    def minibatch(carry, indices):
        params, opt_state = carry
        mb = jax.tree.map(lambda x: x[indices], batch)
        grads, metrics = jax.grad(distill_loss, has_aux=True)(params, mb, kept)
        steps, opt_state = optimizer(args).update(grads, opt_state)
        params = jax.tree.map(lambda p, step: p - args.learning_rate * step, params, steps)
        return (params, opt_state), metrics

    epochs = jax.random.split(key, args.update_epochs)
    size = len(batch["obs"])
    orders = jax.vmap(lambda epoch: jax.random.permutation(epoch, size))(epochs)  # (E, T N)
    indices = orders.reshape(args.update_epochs * args.num_minibatches, -1)  # (E M, b)
    (params, opt_state), metrics = jax.lax.scan(minibatch, (params, opt_state), indices)
    return params, opt_state, jax.tree.map(jnp.mean, metrics)


def iterate(learner, state, first, env, teacher: dict, kept: dict, args: Args, iterations: int):
    """Many iterations: rollout, then updates -> learner, state, metrics (K,).

    learner: params and opt_state. teacher: its arrays.
    Random numbers follow from the seed and the iteration's number (`first`, ...): none are saved.
    """
    sees = len(teacher["stats/state/mean"])

    def iteration(carry, number):
        (params, opt_state), state = carry
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        act_key, learn_key = jax.random.split(key)

        def step(state, key):
            obs = state.obs["state"]
            loc, std = policy(params | kept, obs)
            actions = jnp.tanh(loc + std * jax.random.normal(key, loc.shape))  # differs (1)
            teacher_loc, teacher_std = policy(teacher, state.obs["privileged_state"][:, :sees])
            transition = dict(obs=obs, teacher_loc=teacher_loc, teacher_std=teacher_std)
            state = env.step_batch(state, actions)
            outcome = {"train/reward": state.reward, "train/falls": state.terminated}
            return state, (transition, outcome)

        keys = jax.random.split(act_key, args.unroll_length)
        state, (batch, outcomes) = jax.lax.scan(step, state, keys)
        batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        params, opt_state, metrics = learn(params, opt_state, batch, learn_key, kept, args)
        metrics |= jax.tree.map(jnp.mean, outcomes)
        return ((params, opt_state), state), metrics

    (learner, state), log = jax.lax.scan(
        iteration, (learner, state), first + jnp.arange(iterations)
    )
    return learner, state, log


# --- evaluate -------------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def evaluate(act, env, episodes: int, seed: int = EVAL_SEED) -> tuple[dict, list]:
    """Whole episodes with fixed seeds, one environment for each; act: obs -> actions.

    -> metrics; qpos of the first environment's first seconds
    """
    state = env.reset_batch(jax.random.split(jax.random.PRNGKey(seed), episodes))
    running = np.ones(episodes, bool)
    returns, lengths, falls = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    sums, film = {}, []
    for _ in range(env.episode_length):
        if running[0] and len(film) < VIDEO_SECONDS * env.control_hz:
            film.append(np.asarray(state.qpos[0]))
        state = env.step_batch(state, act(state.obs))
        for name, value in state.metrics.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(value)[running].sum()
        fallen = np.asarray(state.terminated)
        ended = running & (fallen | np.asarray(state.truncated))  # each environment counts once
        returns[ended] = np.asarray(state.episode_return)[ended]
        lengths[ended] = np.asarray(state.episode_length)[ended]
        falls[ended] = fallen[ended]
        running &= ~ended
        if not running.any():
            break
    mean, deviation = returns.mean(), returns.std(ddof=min(1, episodes - 1))
    half = 1.96 * deviation / math.sqrt(episodes)  # 95% confidence interval of the mean
    results = {
        "eval/return": mean,
        "eval/return_std": deviation,
        "eval/ci_low": mean - half,
        "eval/ci_high": mean + half,
        "eval/length": lengths.mean(),
        "eval/fall_rate": falls.mean(),
    }
    results |= {f"eval/{name}": value / lengths.sum() for name, value in sums.items()}
    return {name: float(value) for name, value in results.items()}, film


# --- save / load ----------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def named(**parts) -> dict[str, np.ndarray]:
    """Every array of some trees under a name that says where it stands."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        arrays[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
    return arrays


# same in: ppo_mjx_go1, distill_go1
def save(path: Path, meta: dict, arrays: dict[str, np.ndarray]):
    """One .npz. Written under a temporary name: an interrupted save leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
    os.replace(temporary, path)


# same in: ppo_mjx_go1, distill_go1
def load(path: str | Path) -> dict:
    """A checkpoint: what its meta holds (algo, args, shapes, spec, ...), and "arrays" by name.

    Runs no code of the file. Raises FileNotFoundError, or ValueError if it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
    except Exception as error:  # NumPy names many kinds of damage; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = meta.get("algo") in ("ppo_mjx_go1", "distill_go1")  # each can begin with the other's
    need(ours, f"{path} is neither ppo_mjx_go1's nor distill_go1's")
    weights = [array for name, array in arrays.items() if name.startswith("params/")]
    finite = all(np.isfinite(array).all() for array in weights)
    need(finite, f"{path} has weights that are not finite")
    for name, value in meta["args"].items():
        meta["args"][name] = tuple(value) if isinstance(value, list) else value
    return meta | {"arrays": arrays}


# same in: ppo_mjx_go1, distill_go1
def restored(tree, name: str, checkpoint: dict):
    """The part `name` of a checkpoint in the form of `tree`. Raises ValueError naming a misfit."""

    def leaf(path, old):
        full = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/")
        new = checkpoint["arrays"].get(full)
        fits = new is not None and new.shape == old.shape
        need(fits, f"the checkpoint differs in {full}: this run has {old.shape}")
        return jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(leaf, tree)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
class Interrupt:
    """Ctrl-C sets `asked`: the loop finishes its step and saves. A second one ends it at once."""

    def __init__(self):
        self.asked = False
        self.earlier = signal.signal(signal.SIGINT, self)

    def __call__(self, number, frame):
        self.asked = True
        self.restore()

    def restore(self):
        signal.signal(signal.SIGINT, self.earlier)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def write_row(path: Path, row: dict, track: bool):
    """Append to a CSV file, whose first row names the columns; `track`: to Weights & Biases too."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(row.keys())
        writer.writerow(row.values())
    if track:
        import wandb

        wandb.log(row, step=row["global_step"])


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def csv_sizes(run: Path) -> dict[str, int]:
    """Bytes of each CSV file of the run: what a checkpoint has not seen is cut off on --resume."""
    return {path.name: path.stat().st_size for path in run.glob("*.csv")}


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def cut_back(run: Path, sizes: dict[str, int]):
    """Shorten each CSV file to its size at the checkpoint; a later one is emptied."""
    for path in run.glob("*.csv"):
        os.truncate(path, sizes.get(path.name, 0))


# --- train ----------------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def open_run(args: Args) -> Path:
    """The run's folder, made or found. Raises ValueError if another run has the name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = args.name or f"{args.env_id}__{Path(__file__).stem}__s{args.seed}__{stamp}"
    run = Path(args.resume or f"runs/{name}")
    taken = (run / "checkpoint.npz").exists() and not args.resume
    need(not taken, f"{run} exists: continue it with --resume {run}, or choose another --name")
    inside = args.resume or run.resolve().parent == Path("runs").resolve()
    need(inside, "--name must be the name of a folder in runs/, not a path")
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    if args.track:
        try:
            import wandb

            known = dict(id=run.name, name=run.name, resume="allow", config=asdict(args))
            wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), **known)
        except ModuleNotFoundError as error:
            raise ValueError("--track needs Weights & Biases: pip install wandb") from error
        except wandb.Error as error:
            raise ValueError(f"--track: {error}") from error
    return run


# same in: ppo_mjx_go1, distill_go1
def check_finite(params, row: dict, global_step: int, run: Path):
    """Raises FloatingPointError that names the first weight or metric that is not finite."""
    for name, value in (named(params=params) | row).items():
        if not np.isfinite(value).all():
            said = f"{name} is not finite at step {global_step}"
            raise FloatingPointError(f"{said}; last good checkpoint: {run}/checkpoint.npz")


def train(args: Args) -> dict:
    """Train a student. -> metrics of the last evaluation, counters, and `run`, the folder.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at NaN.
    """
    check(args)
    taught = load(args.teacher)
    own = ("params/", "stats/")
    teacher = {name: x for name, x in taught["arrays"].items() if name.startswith(own)}
    env, eval_env = make_envs(args)
    shapes = taught["shapes"] | {"state": env.obs_dim}
    same = shapes["privileged_state"] == env.privileged_dim and shapes["action"] == env.action_dim
    need(same, f"{args.teacher} comes from another robot: its shapes are {taught['shapes']}")
    params, kept = begin_student(teacher, env.obs_dim)
    learner = params, optimizer(args).init(params)
    keys = jax.random.split(jax.random.PRNGKey(args.seed), args.num_envs)
    state = env.reset_batch(keys, stagger=True)
    progress = dict(iteration=0, global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    if args.resume:
        checkpoint = load(Path(args.resume) / "checkpoint.npz")
        params = {name: jnp.asarray(checkpoint["arrays"][name]) for name in params}
        learner = params, restored(learner[1], "opt_state", checkpoint)
        state = restored(state, "env", checkpoint)
        progress = checkpoint["progress"]
        cut_back(Path(args.resume), checkpoint["csv_sizes"])

    run = open_run(args)
    saved_args = taught["args"] | asdict(args) | {"linvel": False}  # as ppo_mjx_go1.py needs them
    meta = dict(algo=ALGO, args=saved_args, shapes=shapes, spec=env.spec)

    def save_as(name: str, **parts):
        now = dict(progress=progress, csv_sizes=csv_sizes(run))
        arrays = learner[0] | kept | named(**parts)
        save(run / name, meta | now, arrays)

    if not args.resume:
        save_as("checkpoint.npz", opt_state=learner[1], env=state)
    per_iteration = args.num_envs * args.unroll_length
    iterations = max(1, args.log_freq // per_iteration)
    per_call = iterations * per_iteration
    program = partial(
        iterate,
        env=env,
        teacher=teacher,
        kept=kept,
        args=args,
        iterations=iterations,
    )
    program = jax.jit(program).lower(learner, state, np.int32(0)).compile()
    act = jax.jit(lambda params, obs: jnp.tanh(policy(params | kept, obs["state"])[0]))

    results = {}
    born = START - progress["wall_time"]
    step = progress["global_step"]
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=1)
    interrupt = Interrupt()
    while progress["global_step"] < args.total_timesteps and not interrupt.asked:
        # act, step, store, update: many iterations in one call
        begun = time.perf_counter()
        learner, state, log = program(learner, state, np.int32(progress["iteration"]))
        row = {name: float(values.mean()) for name, values in log.items()}  # waits for the device
        seconds = time.perf_counter() - begun
        step = progress["global_step"] + per_call
        progress["iteration"] += iterations
        progress["global_step"] = step
        progress["train_time"] += seconds
        progress["wall_time"] = time.time() - born

        # log
        clock = {name: progress[name] for name in ("global_step", "wall_time", "train_time")}
        row["time/sps"] = per_call / seconds
        check_finite(learner[0], row, step, run)
        write_row(run / "metrics.csv", clock | row, args.track)
        bar.update(per_call)
        bar.set_postfix_str(f"divergence {row['loss/distill']:.4f}")

        # evaluate
        due = step % args.eval_freq < per_call or step >= args.total_timesteps
        if due:
            results, _ = evaluate(partial(act, learner[0]), eval_env, args.eval_episodes)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.write(f"{step} steps: return {results['eval/return']:.2f}")
            if results["eval/return"] > progress["best"]:
                progress["best"] = results["eval/return"]
                save_as("best.npz")

        # save
        if due or interrupt.asked:
            save_as("checkpoint.npz", opt_state=learner[1], env=state)
    bar.close()
    interrupt.restore()
    if interrupt.asked:
        sys.exit(f"interrupted at step {step}: continue with --resume {run}")
    return results | progress | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
