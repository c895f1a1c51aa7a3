"""From joint targets to the next state, for N robots at once: MJX, or MuJoCo's C library.

Both are pure functions of arrays and can stand in a jitted scan:

    simulate(qpos, qvel, warmstart, targets, force, dr) -> qpos, qvel, warmstart, sensors

targets (N, substeps, 12), force (N, 3) on the trunk, dr the constants of each robot; the sensors are
those of the last physics step.
"""

import copy
import os

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np
from mujoco import mjx

from envs.go1.robot import CONSTANTS, TRUNK

BACKENDS = ("mjx-jax", "mjx-warp", "mujoco-c")


def make_physics(backend: str, model: mujoco.MjModel, task, config, threads: int | None):
    """The physics of a back end. threads: of mujoco-c; None: all cores."""
    if backend == "mujoco-c":
        return PhysicsInC(model, config, threads or os.cpu_count())
    return PhysicsInJax(backend.removeprefix("mjx-"), model, task, config)


class PhysicsInJax:
    """MuJoCo XLA, or MuJoCo Warp behind the same functions.

    What MJX needs besides the carried state is a constant from which every step starts.
    """

    def __init__(self, impl: str, model: mujoco.MjModel, task, config):
        self.model, self.mjx_model = model, mjx.put_model(model, impl=impl)
        sizes = {}
        if impl == "warp":
            # few solver iterations are meant: no line printed for each step that uses them up
            self.mjx_model = self.mjx_model.tree_replace({"opt._impl.warn_overflow": 0})
            per_env, rows = (8, 12 + 48) if task.rough else (4, 40)
            sizes = dict(naconmax=per_env * config.warp_worlds, njmax=rows)
        self.data = mjx.make_data(model, impl=impl, **sizes)

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
            qpos, qvel, warmstart, _ = carry
            data = constant.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=target)
            data = mjx.step(model, data)
            return (data.qpos, data.qvel, data.qacc_warmstart, data.sensordata), None

        carry = (qpos, qvel, warmstart, jnp.zeros(self.model.nsensordata))
        with jax.default_matmul_precision("highest"):  # TF32 is too coarse for physics
            carry, _ = jax.lax.scan(physics, carry, targets)
        return carry


class PhysicsInC:
    """MuJoCo's C library in threads, called back from the compiled program."""

    def __init__(self, model: mujoco.MjModel, config, threads: int):
        # it would silently restart a robot whose physics diverges; the environment is to see it
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.model, self.config = model, config
        self.rollout = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.data = [mujoco.MjData(model) for _ in range(threads)]
        self.models, self.models_of = [model], {}

    def simulate(self, qpos, qvel, warmstart, targets, force, dr) -> tuple:
        results = []
        for size in (19, 18, 18, self.model.nsensordata):
            results.append(jax.ShapeDtypeStruct((len(qpos), size), jnp.float32))
        given = (qpos, qvel, warmstart, targets, force, dr)
        return jax.pure_callback(self.called_back, tuple(results), *given)

    def called_back(self, qpos, qvel, warmstart, targets, force, dr) -> tuple[np.ndarray, ...]:
        n, substeps = len(qpos), self.config.substeps
        start = np.zeros((n, 1 + 19 + 18))
        start[:, 1:20], start[:, 20:] = qpos, qvel
        control, spec = np.asarray(targets, np.float64), int(mujoco.mjtState.mjSTATE_CTRL)
        if self.config.pushes:
            applied = np.zeros((n, substeps, self.model.nbody, 6))
            applied[:, :, TRUNK, :3] = np.asarray(force)[:, None]
            control = np.concatenate([control, applied.reshape(n, substeps, -1)], axis=2)
            spec |= int(mujoco.mjtState.mjSTATE_XFRC_APPLIED)
        states, sensors = self.rollout.rollout(
            self.models_for(dr),
            self.data,
            start,
            control,
            control_spec=spec,
            initial_warmstart=np.asarray(warmstart, np.float64),
        )
        new_qvel = states[:, -1, 20:]
        before = states[:, -2, 20:] if substeps > 1 else start[:, 20:]
        acceleration = (new_qvel - before) / self.config.sim_dt
        moved = (states[:, -1, 1:20], new_qvel, acceleration, sensors[:, -1])
        return tuple(np.asarray(x, np.float32) for x in moved)

    def models_for(self, dr: dict) -> list[mujoco.MjModel]:
        """One model for all robots, or one for each where they vary, built anew for other constants."""
        dr = {name: np.array(value) for name, value in dr.items()}  # copies: they outlive the call
        known = self.models_of.keys() == dr.keys()
        if known and all(np.array_equal(dr[name], self.models_of[name]) for name in dr):
            return self.models
        self.models = [copy.copy(self.model) for _ in next(iter(dr.values()))]
        for constant, values in dr.items():
            for name, index, sign in CONSTANTS[constant]:
                for model, value in zip(self.models, values, strict=True):
                    getattr(model, name)[index] = sign * value
        self.models_of = dr
        return self.models
