"""Tetrahedra with muscles: rest, free fall, momentum, the ground; gradients against differences; SoftJumper."""

import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402
from envs.rewarped.fem import FEM  # noqa: E402
from envs.rewarped.fem_tasks import table  # noqa: E402

D = torch.float64


def body(n=2, **options):
    """Two environments of the smallest table, in float64."""
    rest, tets = table((3, 2), (1, 1), 0.3)
    options = dict(dt=1 / 4800, substeps=4, mu=1000.0, lam=1000.0, damping=1.0, dtype=D) | options
    return FEM(n, rest, tets, **options), rest, tets


def scene(n=2, seed=0):
    """x, v and activation of environments that are deformed, on the move and partly in the ground."""
    g, (_, rest, tets) = torch.Generator().manual_seed(seed), body()
    x = (
        rest
        + 0.01 * torch.randn(n, *rest.shape, generator=g, dtype=D)
        - torch.tensor((0.0, 0.03, 0.0))
    )
    v = torch.randn(n, *rest.shape, generator=g, dtype=D)
    activation = 0.3 * torch.randn(n, len(tets), generator=g, dtype=D)
    return [x, v, activation]


def run(sim, tensors, steps, seed=1):
    g, (x, v, activation) = torch.Generator().manual_seed(seed), tensors
    for _ in range(steps):
        x, v = sim.step(x, v, activation)
    return sum((t * torch.randn(t.shape, generator=g, dtype=D).to(t.dtype)).sum() for t in (x, v))


def gradient(sim, tensors, steps):
    leaves = [t.clone().requires_grad_() for t in tensors]
    run(sim, leaves, steps).backward()
    return [leaf.grad for leaf in leaves]


def test_it_rests_and_falls_freely():
    sim, rest, tets = body(substeps=20)
    x = (rest + torch.tensor((0.0, 1.0, 0.0))).expand(2, -1, -1)
    y, w = sim.step(x, torch.zeros_like(x), torch.zeros(2, len(tets), dtype=D))
    t, dt = 20 / 4800, 1 / 4800
    assert w.allclose(torch.tensor((0.0, -9.81 * t, 0.0), dtype=D).expand_as(w), atol=1e-9)
    assert (y - x)[..., 1].allclose(torch.tensor(-9.81 / 2 * t * (t + dt), dtype=D), atol=1e-9)


def test_internal_forces_keep_momentum_and_muscles_move_the_body():
    sim, _, tets = body(gravity=0.0)
    x, v, activation = scene()
    x, mass = x + torch.tensor((0.0, 1.0, 0.0)), sim.mass[:, None]  # off the ground
    y, w = sim.step(x, v, activation)
    assert (mass * w).sum(1).allclose((mass * v).sum(1), atol=1e-10)
    spin = [(mass * torch.cross(p, q, dim=-1)).sum(1) for p, q in ((x, v), (y, w))]
    assert (spin[0] - spin[1]).norm() < 0.02 * spin[
        0
    ].norm()  # damping is by the rate of F, which a turn has too
    _, idle = sim.step(x, v, torch.zeros_like(activation))
    assert (w - idle).abs().max() > 0.01


def test_it_stands_on_the_ground_and_a_shove_is_braked():
    sim, rest, tets = body(substeps=400)
    rest = rest + torch.tensor((0.0, 0.05, 0.0))  # a vertex' radius
    x = rest.expand(2, -1, -1).clone()
    v = torch.zeros_like(x)
    v[1, :, 0] = 1.0
    for _ in range(8):
        x, v = sim.step(x, v, torch.zeros(2, len(tets), dtype=D))
    assert x.isfinite().all() and x[..., 1].min() > 0.0 and (x[0] - rest).abs().max() < 0.1
    assert abs(v[1, :, 0].mean()) < 0.5


@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_against_central_differences(steps):
    tensors, (sim, *_) = scene(), body()
    grads, g = gradient(sim, tensors, steps), torch.Generator().manual_seed(3)
    for i, grad in enumerate(grads):
        d = torch.randn(tensors[i].shape, generator=g, dtype=D)
        d, errors = d / d.norm() + 2 * grad / grad.norm(), []
        for eps in (1e-6, 1e-7):
            with torch.no_grad():
                up, down = (
                    run(sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], steps)
                    for s in (1, -1)
                )
            errors.append(float(abs((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
        assert min(errors) < 1e-6, (i, errors)


def test_float32_agrees_graphs_change_nothing_and_environments_are_independent():
    tensors = scene()
    exact = gradient(body()[0], tensors, 2)
    single = gradient(body(dtype=torch.float32)[0], [t.float() for t in tensors], 2)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(single, exact, strict=True))
    graphs = body(graph=True)[0]
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(gradient(graphs, tensors, 2), exact, strict=True)
        )
    sim = body(n=1)[0]
    one = sim.step(*[t[:1].clone().requires_grad_() for t in tensors])
    both = body()[0].step(*tensors)
    assert all(torch.equal(a, b[:1]) for a, b in zip(one, both, strict=True))


def test_impossible_bodies_are_named_in_one_line():
    rest, tets = table((3, 2), (1, 1), 0.3)
    for options, some, message in (
        (dict(dt=0.0), tets, "above 0"),
        ({}, tets[:, [1, 0, 2, 3]], "positive volume"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            FEM(
                1, rest, some, **(dict(dt=1e-3, substeps=1, mu=1.0, lam=1.0, damping=0.0) | options)
            )
        assert "\n" not in str(error.value)


def faces(tets):
    """Triangles of a mesh, each by its three sorted vertices, and how many tetrahedra have it."""
    return (
        tets[:, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]]
        .reshape(-1, 3)
        .sort(1)
        .values.unique(dim=0, return_counts=True)
    )


@pytest.mark.parametrize(
    "top, leg, slab, volume",
    [
        ((3, 2), (1, 1), 1, 6 + 4),
        ((4, 3), (1, 2), 1, 12 + 8),
        ((4, 4), (2, 1), 1, 16 + 16),
        ((7, 7), (1, 3), 2, 98 + 12),
    ],
)
def test_tables_are_whole_and_have_the_volume_of_their_cells(top, leg, slab, volume):
    rest, tets = table(top, leg, 0.5, slab)
    sides = rest[tets[:, 1:]] - rest[tets[:, :1]]
    volumes = torch.linalg.det(sides) / 6
    assert (volumes > 0).all() and volumes.sum().item() == pytest.approx(0.5**3 * volume)
    found, count = faces(tets)
    assert set(count.tolist()) == {1, 2}  # neighbours share whole faces, no three of them the same
    edges = found[count == 1][:, [[0, 1], [0, 2], [1, 2]]].reshape(-1, 2)
    assert (edges.unique(dim=0, return_counts=True)[1] % 2 == 0).all()  # the surface is closed
    assert rest.min(0).values.tolist() == [-top[0] / 4, 0.0, -top[1] / 4]
    assert rest.max(0).values.tolist() == [top[0] / 4, 0.5 * (leg[1] + slab), top[1] / 4]


# --- SoftJumper -------------------------------------------------------------------------------------------------------
def make(n=2, **options):
    return rewarped.make(
        "SoftJumper", n, "cpu", **({"seed": 0, "size": "small", "graph": False} | options)
    )


def test_softjumper_step_reward_and_gradient():
    env = make()
    a = (
        torch.rand(2, env.action_dim, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ).requires_grad_()
    obs, rewards, terminations, truncations, info = env.step(a)
    assert {name: tuple(v.shape[1:]) for name, v in obs.items()} == env.obs_dims
    assert obs["state"][:, 6:].equal(a) and not (terminations | truncations | info["nan"]).any()
    assert torch.autograd.grad(rewards.sum(), a)[0].isfinite().all()
    assert env.render(0, 48).shape == (48, 48, 3)


def test_a_reset_cuts_its_own_gradient_and_nobody_elses():
    grads = []
    for ends in (False, True):
        env = make(seed=4)
        env.clock[0] = env.max_episode_steps - 2 if ends else 0
        acts, rewards = [], []
        for k in range(4):
            g = torch.Generator().manual_seed(k)
            acts.append((torch.rand(2, env.action_dim, generator=g) * 2 - 1).requires_grad_())
            rewards.append(env.step(acts[-1])[1])
        grads.append(torch.stack(torch.autograd.grad(rewards[-1].sum(), acts)))
    free, cut = grads
    assert torch.equal(free[:, 1], cut[:, 1]) and (free[:, 1].norm(dim=-1) > 0).all()
    assert (cut[:2, 0] == 0).all() and (cut[2:, 0].norm(dim=-1) > 0).all()
