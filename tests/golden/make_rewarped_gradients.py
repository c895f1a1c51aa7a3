"""Makes tests/golden/rewarped_gradients.npz: the gradient of the original AntRun, and its own finite differences.

    original/bin/python tests/golden/make_rewarped_gradients.py

in the environment of scripts/play_original.py (`rewarped` 1.3.3, warp-lang 1.3.3, a CPU). Eight ants from the
original's first states, the actions of policies/AntRun.pt held fixed, and the sum of the rewards over 4, 8 and 16
steps: its gradient in the actions by the package's backward pass, and central differences of its forward pass along
five directions of unit length in each ant's actions, that gradient's own and four random ones. Two widths of the
differences tell where a foot touches down in between, so that the sum is not smooth.

The package's gradient is not that slope: between two substeps the bodies' poses are written twice, by `eval_fk` at the
end of one and by `eval_rigid_fk` at the start of the next, and on the way back both are handed the poses' gradient.
`mended` is the gradient with `eval_fk` left out of the tape, which changes nothing on the way forward.

    obs (8, 37), position (8, 3)   the first states
    actions (16, 8, 8)             steps, ants, joints
    rewards (16, 8)
    T/gradient (T, 8, 8)           by the package, for T = 4, 8, 16
    T/mended (T, 8, 8)
    T/directions (5, T, 8, 8)
    T/slopes (2, 5, 8)             along them, at the two widths
"""

import sys
from pathlib import Path

import numpy as np
import rewarped.warp.integrator_featherstone as featherstone
import torch
import warp as wp
from rewarped.envs.dflex.ant import Ant

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "algos"))
from sapo_rewarped import Policy  # noqa: E402  (algos/ is a folder of files to run)

ANTS, HORIZONS, WIDTHS = 8, (4, 8, 16), (2e-3, 1e-3)
OPTIONS = dict(
    no_env_offset=True, device="cpu", use_graph_capture=False, render=False, early_termination=False
)


class Windows:
    """Windows of the original environment that begin in its first states."""

    def __init__(self, with_gradient: bool):
        torch.manual_seed(0)
        self.env = Ant(num_envs=ANTS, no_grad=not with_gradient, **OPTIONS)
        self.env.reset()
        self.first = self.env.get_checkpoint(detach=True)
        self.last_actions = self.env.actions.detach().clone()
        self.begin()

    def begin(self) -> torch.Tensor:
        """-> observations (8, 37)"""
        copies = {
            part: {k: v.clone() for k, v in values.items()} for part, values in self.first.items()
        }
        self.env.clear_grad(copies)
        self.env.actions = self.last_actions.clone()
        self.env.progress_buf.zero_()
        return self.env.initialize_trajectory()

    def rewards(self, actions) -> torch.Tensor:
        """Actions (T, 8, 8) -> rewards (T, 8)."""
        self.begin()
        return torch.stack([self.env.step(action)[1] for action in actions])


def mend():
    """Leaves `eval_fk` out of every tape from now on."""
    original = featherstone.eval_fk

    def untaped(*inputs):
        tape, wp.context.runtime.tape = wp.context.runtime.tape, None
        original(*inputs)
        wp.context.runtime.tape = tape

    featherstone.eval_fk = untaped


def main():
    torch.set_num_threads(1)
    smooth, policy = Windows(with_gradient=True), Policy(ROOT / "policies/AntRun.pt")
    obs, actions = smooth.begin(), []
    kept = dict(obs=obs.detach().numpy().copy())
    kept["position"] = smooth.first["state"]["joint_q"].view(ANTS, -1)[:, :3].numpy()
    for _ in range(max(HORIZONS)):
        actions.append(policy.act({"state": obs.detach()}))
        obs = smooth.env.step(actions[-1])[0]
    actions = torch.stack(actions)
    kept["actions"] = actions.numpy()
    kept["rewards"] = smooth.rewards(actions).detach().numpy()
    plain = Windows(with_gradient=False)
    generator = torch.Generator().manual_seed(1)
    for T in HORIZONS:
        leaves = actions[:T].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(smooth.rewards(leaves).sum(), leaves)
        random = torch.randn((4, *gradient.shape), generator=generator)
        directions = torch.cat([gradient[None], random])
        directions = directions / directions.norm(dim=(1, 3), keepdim=True)
        slopes = np.zeros((len(WIDTHS), len(directions), ANTS))
        for w, width in enumerate(WIDTHS):
            for d, direction in enumerate(directions):
                sums = [
                    plain.rewards(actions[:T] + side * width * direction).double().sum(0)
                    for side in (1, -1)
                ]
                slopes[w, d] = (sums[0] - sums[1]).numpy() / (2 * width)
        kept |= {
            f"{T}/gradient": gradient.numpy(),
            f"{T}/directions": directions.numpy(),
            f"{T}/slopes": slopes,
        }
        along = (gradient * directions).sum((1, 3)).numpy()
        agree = np.abs(slopes[0] - slopes[1]) < 0.02 * (1 + np.abs(slopes[1]))
        print(
            T,
            "smooth",
            agree.mean(),
            "off there",
            np.abs(along - slopes[1])[agree].max(),
            "of",
            np.abs(slopes[1]).max(),
        )
    mend()
    for T in HORIZONS:
        leaves = actions[:T].clone().requires_grad_()
        kept[f"{T}/mended"] = torch.autograd.grad(smooth.rewards(leaves).sum(), leaves)[0].numpy()
    np.savez_compressed(ROOT / "tests/golden/rewarped_gradients.npz", **kept)


if __name__ == "__main__":
    main()
