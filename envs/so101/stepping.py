"""Physics: two steppers, MuJoCo's C library in threads on a CPU and MuJoCo Warp on a GPU (or a CPU)."""

import copy
import warnings

import mujoco
import mujoco.rollout
import mujoco_warp as mjw
import numpy as np
import torch
import warp as wp

from envs.so101.render import Scene
from envs.so101.tasks import HORIZON, SUBSTEPS

# MuJoCo Warp leaves out contacts and constraints for which it has no memory. They are counted here, in place of
# its line for each substep. A solver that used up its iterations is another matter; of that it goes on printing.
SOLVER = int(mjw.OverflowType.ITERATIONS | mjw.OverflowType.LS_ITERATIONS)
LEFT_OUT = wp.constant(int(mjw.OverflowType.ALL) & ~SOLVER)
RARE = 1e-3  # share of the environment steps in which something may be left out


@wp.kernel
def _select_ctrl(
    substep: int,
    delay: wp.array[int],
    last_target: wp.array2d[float],
    target: wp.array2d[float],
    ctrl: wp.array2d[float],
):
    """The servos' command at a substep: the last target until the delay has passed, then the present one."""
    env, joint = wp.tid()
    if substep < delay[env]:
        ctrl[env, joint] = last_target[env, joint]
    else:
        ctrl[env, joint] = target[env, joint]


@wp.kernel
def _count_left_out(overflow: wp.array[int], left_out: wp.array[int]):
    """left_out: in how many environment steps, and of which kinds (bits). Clears MuJoCo Warp's own bits."""
    env = wp.tid()
    kinds = overflow[env] & LEFT_OUT
    if kinds != 0:
        wp.atomic_add(left_out, 0, 1)
        wp.atomic_or(left_out, 1, kinds)
    overflow[env] = 0


class CStepper:
    """MuJoCo's C library on the CPU: one model an environment, threads over environments, state kept in float64."""

    def __init__(self, mjm: mujoco.MjModel, fields: dict[str, torch.Tensor], threads: int):
        self.n = len(fields["body_mass"])
        self.models = [_copy_model(mjm) for _ in range(self.n)]
        self.datas = [mujoco.MjData(self.models[0]) for _ in range(max(1, min(threads, self.n)))]
        self.pool = mujoco.rollout.Rollout(nthread=len(self.datas) if len(self.datas) > 1 else 0)
        self.nq, self.nv = mjm.nq, mjm.nv
        self.state = np.zeros((self.n, 1 + self.nq + self.nv))  # time, qpos, qvel
        self.out = np.zeros((self.n, SUBSTEPS, self.state.shape[1]))
        self.sensors = np.zeros((self.n, SUBSTEPS, mjm.nsensordata))
        self.seconds = SUBSTEPS * mjm.opt.timestep
        drawn_only = ("cam_", "light_", "geom_rgba")
        self.fields = {
            name: field.numpy() for name, field in fields.items() if not name.startswith(drawn_only)
        }
        self.substep = np.arange(SUBSTEPS)[None, :, None]

    def write_models(self, numbers: list[int]) -> None:
        for number in numbers:
            model = self.models[number]
            for name, values in self.fields.items():
                target = getattr(model, name)
                target[...] = values[number].reshape(target.shape)

    def set_state(self, idx, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        rows = idx.numpy() if isinstance(idx, torch.Tensor) else idx
        self.state[rows, 1 : 1 + self.nq] = qpos.numpy()
        self.state[rows, 1 + self.nq :] = qvel.numpy()

    def step(self, old: torch.Tensor, new: torch.Tensor, delay: torch.Tensor):
        """One control step of every environment. Returns qpos, qvel, sensordata (float32) and which are sane."""
        late = self.substep < delay.numpy()[:, None, None]
        ctrl = np.where(late, old.numpy()[:, None], new.numpy()[:, None]).astype(np.float64)
        self.state[:, 0] = 0.0
        self.pool.rollout(
            self.models, self.datas, self.state, ctrl, nstep=SUBSTEPS, state=self.out, sensordata=self.sensors,
            skip_checks=True,
        )  # fmt: skip
        self.state[:] = self.out[:, -1]
        # MuJoCo answers diverging physics by a reset, clock included.
        sane = np.isfinite(self.state).all(1) & (np.abs(self.state[:, 0] - self.seconds) < 1e-6)
        qpos = torch.from_numpy(self.state[:, 1 : 1 + self.nq].astype(np.float32))
        qvel = torch.from_numpy(self.state[:, 1 + self.nq :].astype(np.float32))
        return (
            qpos,
            qvel,
            torch.from_numpy(self.sensors[:, -1].astype(np.float32)),
            torch.from_numpy(sane),
        )

    def state_dict(self) -> dict:
        return {"state": torch.tensor(self.state)}

    def load_state_dict(self, saved: dict) -> None:
        self.state[:] = saved["state"].numpy()
        self.write_models(range(self.n))

    def close(self) -> None:
        self.pool.close()


def _copy_model(mjm: mujoco.MjModel) -> mujoco.MjModel:
    model = copy.copy(mjm)
    # The body tree of the mid-phase is not rebuilt when sizes change; these scenes are too small to need it.
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
    return model


class WarpStepper:
    """MuJoCo Warp: all environments on the device, one captured graph a control step."""

    def __init__(self, scene: Scene):
        self.scene, self.n, self.nq, self.nv = scene, scene.n, scene.mjm.nq, scene.mjm.nv
        zeros = lambda dtype, *shape: wp.zeros(shape, dtype=dtype, device=scene.device)  # noqa: E731
        self.old, self.new = zeros(float, self.n, 6), zeros(float, self.n, 6)
        self.delay = zeros(int, self.n)
        self.t_old, self.t_new, self.t_delay = (
            wp.to_torch(a) for a in (self.old, self.new, self.delay)
        )
        data = scene.d
        self.qpos, self.qvel, self.sensordata = (
            wp.to_torch(a) for a in (data.qpos, data.qvel, data.sensordata)
        )
        self.warmstart = wp.to_torch(data.qacc_warmstart)
        self.graph = None
        scene.m.opt.warn_overflow = SOLVER
        self.left_out = zeros(int, 2)
        self.t_left_out = wp.to_torch(self.left_out)
        self.steps = self.reported = 0

    def write_models(self, numbers: list[int]) -> None:
        """Nothing to do: the scene's fields are the model's own arrays."""

    def set_state(self, idx: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        self.qpos[idx], self.qvel[idx], self.warmstart[idx] = qpos, qvel, 0.0

    def _substeps(self) -> None:
        for substep in range(SUBSTEPS):
            inputs = [substep, self.delay, self.old, self.new]
            wp.launch(_select_ctrl, dim=(self.n, 6), inputs=inputs, outputs=[self.scene.d.ctrl])
            mjw.step(self.scene.m, self.scene.d)
        wp.launch(_count_left_out, self.n, inputs=[self.scene.d.overflow, self.left_out])

    def check_left_out(self) -> None:
        """Warns of contacts and constraints that were left out; raises ValueError where that is not rare."""
        count, kinds = self.t_left_out.tolist()
        if count == self.reported:
            return
        self.reported = count
        steps, data = self.steps * self.n, self.scene.d
        names = ", ".join(kind.name for kind in mjw.OverflowType if kind & kinds)
        message = (
            f"MuJoCo Warp left out contacts or constraints in {count} of {steps} environment steps "
            f"({names}): it has memory for {data.naconmax // self.n} contacts and {data.njmax} "
            "constraints an environment; raise CONTACTS and CONSTRAINTS in envs/so101/render.py"
        )
        if count > RARE * steps:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)

    def step(self, old: torch.Tensor, new: torch.Tensor, delay: torch.Tensor):
        """See `CStepper.step`."""
        self.t_old.copy_(old), self.t_new.copy_(new), self.t_delay.copy_(delay)
        self.graph = self.scene.run(self._substeps, self.graph)
        self.steps += 1
        if self.steps % HORIZON == 0:  # seldom: the host waits for the device
            self.check_left_out()
        sane = (
            torch.isfinite(self.qpos).all(1)
            & torch.isfinite(self.qvel).all(1)
            & (self.qvel.abs() < 1e3).all(1)
        )
        return self.qpos.clone(), self.qvel.clone(), self.sensordata.clone(), sane

    def state_dict(self) -> dict:
        return {
            "qpos": self.qpos.clone(),
            "qvel": self.qvel.clone(),
            "warmstart": self.warmstart.clone(),
        }

    def load_state_dict(self, saved: dict) -> None:
        (
            self.qpos.copy_(saved["qpos"]),
            self.qvel.copy_(saved["qvel"]),
            self.warmstart.copy_(saved["warmstart"]),
        )

    def close(self) -> None:
        self.graph = None
