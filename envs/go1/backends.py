"""From joint targets to the next state, for N robots at once: MJX, or MuJoCo's C library.

Both are pure functions of arrays and can stand in a jitted scan:

    simulate(qpos, qvel, warmstart, targets, force, dr) -> qpos, qvel, warmstart, sensors, overflow

targets (N, substeps, 12), force (N, 3) on the trunk, dr the constants of each robot; the sensors are
those of the last physics step. overflow (N,) bool: contacts or constraints were left out, for want
of room.
"""

import copy
import os
import queue

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np

from envs.go1.robot import CONSTANTS, TRUNK

BACKENDS = ("mjx-jax", "mjx-warp", "mujoco-c")
MODELS_KEPT = 8  # sets of randomised models in memory
STOPS_BELOW = 1e10  # MuJoCo's limit: a number above it counts as diverged


def make_physics(backend: str, model: mujoco.MjModel, task, config, threads: int | None):
    """The physics of a back end. model: without shapes that are only drawn. threads: of mujoco-c."""
    if backend == "mujoco-c":
        return PhysicsInC(model, config, threads or os.cpu_count())
    return PhysicsInJax(backend.removeprefix("mjx-"), model, task, config)


class PhysicsInJax:
    """MuJoCo XLA, or MuJoCo Warp behind the same functions.

    What MJX needs besides the carried state is a constant from which every step starts.
    """

    def __init__(self, impl: str, model: mujoco.MjModel, task, config):
        from mujoco import mjx  # seconds to import; the C library does without

        self.mjx, self.left_out_kinds = mjx, 0
        self.model, self.mjx_model = model, mjx.put_model(model, impl=impl)
        sizes = {}
        if impl == "warp":
            from mujoco.mjx.third_party.mujoco_warp import OverflowType

            # few solver iterations are meant; what did not fit is counted instead of printed
            self.mjx_model = self.mjx_model.tree_replace({"opt._impl.warn_overflow": 0})
            solver = OverflowType.ITERATIONS | OverflowType.LS_ITERATIONS
            self.left_out_kinds = int(OverflowType.ALL) & ~int(solver)
            # flat: no more is possible, four contacts, 16 rows for them and 12 each for friction and
            # limits. Rough: contacts are of all robots together, rows of one
            per_env, rows = (8, 12 + 48) if task.rough else (4, 40)
            sizes = dict(naconmax=per_env * config.warp_worlds, njmax=rows)
        self.data = mjx.make_data(model, impl=impl, **sizes)

    def left_out(self, data) -> jax.Array:
        """Whether contacts or constraints did not fit. () bool; MuJoCo XLA has room for all."""
        if not self.left_out_kinds:
            return jnp.zeros((), bool)
        return (data._impl.overflow & self.left_out_kinds).any()

    def fields(self, dr: dict) -> dict:
        """The model's fields, under MuJoCo's names, that the constants of one robot change."""
        fields = {}
        for constant, value in dr.items():
            for name, index, sign in CONSTANTS[constant]:
                nominal = jnp.asarray(getattr(self.model, name), jnp.float32)
                fields[name] = nominal.at[index].set(sign * value)
        return fields

    def simulate(self, qpos, qvel, warmstart, targets, force, dr) -> tuple:
        return jax.vmap(self.one)(qpos, qvel, warmstart, targets, force, dr)

    def one(self, qpos, qvel, warmstart, targets, force, dr) -> tuple:
        """One robot."""
        model = self.mjx_model.replace(**self.fields(dr))
        applied = self.data.xfrc_applied.at[TRUNK, :3].set(force)
        constant = self.data.replace(xfrc_applied=applied)

        def physics(carry, target):
            qpos, qvel, warmstart, _, overflow = carry
            data = constant.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=target)
            data = self.mjx.step(model, data)
            overflow = overflow | self.left_out(data)
            return (data.qpos, data.qvel, data.qacc_warmstart, data.sensordata, overflow), None

        nothing = jnp.zeros(self.model.nsensordata), jnp.zeros((), bool)
        carry = (qpos, qvel, warmstart, *nothing)
        with jax.default_matmul_precision("highest"):  # TF32 is too coarse for physics
            carry, _ = jax.lax.scan(physics, carry, targets)
        return carry


class PhysicsInC:
    """MuJoCo's C library in threads, called back from a compiled program or, faster, from Python.

    Callers may be several threads: each gets workers of its own.
    """

    def __init__(self, model: mujoco.MjModel, config, threads: int):
        # it would silently restart a robot whose physics diverges; the environment is to see it
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        # one robot is one island: looking for more costs 4 % and changes no bit
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
        self.model, self.config, self.threads = model, config, threads
        self.idle = queue.SimpleQueue()  # threads with their memory, for a caller
        self.models_of = {}

    def simulate(self, qpos, qvel, warmstart, targets, force, dr) -> tuple:
        """Inside a compiled program."""
        results = []
        for size in (19, 18, 18, self.model.nsensordata):
            results.append(jax.ShapeDtypeStruct((len(qpos), size), jnp.float32))
        results.append(jax.ShapeDtypeStruct((len(qpos),), bool))
        given = (qpos, qvel, warmstart, targets, force, dr)
        return jax.pure_callback(self.run, tuple(results), *given)

    def run(self, qpos, qvel, warmstart, targets, force, dr) -> tuple[np.ndarray, ...]:
        """With arrays: NumPy's, or JAX's on the CPU."""
        n, substeps = len(qpos), self.config.substeps
        start = np.zeros((n, 1 + 19 + 18))
        start[:, 1:20], start[:, 20:] = qpos, qvel
        control, spec = np.asarray(targets, np.float64), int(mujoco.mjtState.mjSTATE_CTRL)
        if self.config.pushes:
            applied = np.zeros((n, substeps, self.model.nbody, 6))
            applied[:, :, TRUNK, :3] = np.asarray(force)[:, None]
            control = np.concatenate([control, applied.reshape(n, substeps, -1)], axis=2)
            spec |= int(mujoco.mjtState.mjSTATE_XFRC_APPLIED)
        try:
            workers = self.idle.get_nowait()
        except queue.Empty:
            pool = mujoco.rollout.Rollout(nthread=self.threads if self.threads > 1 else 0)
            workers = pool, [mujoco.MjData(self.model) for _ in range(self.threads)]
        pool, data = workers
        states, sensors = pool.rollout(
            self.models_for(dr),
            data,
            start,
            control,
            control_spec=spec,
            initial_warmstart=np.asarray(warmstart, np.float64),
        )
        self.idle.put(workers)
        new_qvel = states[:, -1, 20:]
        before = states[:, -2, 20:] if substeps > 1 else start[:, 20:]
        acceleration = (new_qvel - before) / self.config.sim_dt
        moved = (states[:, -1, 1:20], new_qvel, acceleration, sensors[:, -1])
        return *(np.asarray(x, np.float32) for x in moved), self.left_out(states)

    def left_out(self, states) -> np.ndarray:
        """Whether contacts or constraints did not fit. (N,) bool.

        `rollout` stops a robot's clock, states[..., 0], at the first warning. One whose numbers are
        still sound did not diverge: it ran out of memory (or a target was no number). The library's
        own counters begin anew with each robot.
        """
        stopped = states[:, -1, 0] < (self.config.substeps - 0.5) * self.config.sim_dt
        return stopped & (np.abs(states[:, -1]) < STOPS_BELOW).all(1)

    def models_for(self, dr: dict) -> list[mujoco.MjModel]:
        """One model for all robots, or one for each where they vary, built once for a set of them."""
        dr = {name: np.asarray(value) for name, value in dr.items()}
        if not dr:
            return [self.model]
        known = tuple(value.tobytes() for value in dr.values())
        if known not in self.models_of:
            if len(self.models_of) == MODELS_KEPT:
                self.models_of.clear()
            models = [copy.copy(self.model) for _ in next(iter(dr.values()))]
            for constant, values in dr.items():
                for name, index, sign in CONSTANTS[constant]:
                    for model, value in zip(models, values, strict=True):
                        getattr(model, name)[index] = sign * value
            self.models_of[known] = models
        return self.models_of[known]
