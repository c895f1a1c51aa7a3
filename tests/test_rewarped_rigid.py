"""Articulated rigid bodies: free fall, spin, hinges, contact against closed forms; gradients; AntRun, HandReorient."""

import math

import imageio
import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402
from envs.rewarped.rigid import Body, Box, Hinge, Rigid, Sphere, Springs, about, multiply, rotate  # noqa: E402

D = torch.float64


def quiet(n, b):
    """Bodies at the origin, at rest."""
    q = torch.zeros(n, b, 4, dtype=D)
    q[..., 3] = 1
    return [
        torch.zeros(n, b, 3, dtype=D),
        q,
        torch.zeros(n, b, 3, dtype=D),
        torch.zeros(n, b, 3, dtype=D),
    ]


def test_quaternions():
    x, y, z = torch.eye(3, dtype=D)
    turn = about(z, torch.tensor(math.pi / 2, dtype=D))
    assert rotate(turn, x).allclose(y)
    assert rotate(multiply(about(x, torch.tensor(math.pi / 2, dtype=D)), turn), x).allclose(z)


def test_free_fall_and_spin():
    """Height after t; a body that spins about a principal axis keeps on, any other keeps its angular momentum."""
    moments, dt = torch.tensor((1.0, 2.0, 3.0), dtype=D), 1e-4
    sim = Rigid(2, [Body(2.0, (1.0, 2.0, 3.0))], [], [], dt=dt, substeps=1000, dtype=D)
    p, q, v, w = quiet(2, 1)
    w[0, 0, 1], w[1, 0] = 3.0, torch.tensor((1.0, 2.0, 0.5), dtype=D)
    p1, q1, v1, w1 = sim.step(p, q, v, w, torch.zeros(2, 1, dtype=D))
    t = 0.1
    assert (
        v1[..., 1].allclose(torch.tensor(-9.8 * t, dtype=D))
        and (p1[..., 1] + 4.9 * t * (t + dt)).abs().max() < 1e-9
    )
    assert w1[0, 0].allclose(w[0, 0])
    # The angle of a spin by increments of dt w / 2, normalised, is off by (dt w)^3 / 12 each.
    assert q1[0, 0].allclose(
        about(torch.tensor((0.0, 1.0, 0.0), dtype=D), torch.tensor(3.0 * t, dtype=D)), atol=1e-7
    )

    def momentum(q, w):
        return rotate(q, moments * rotate(q * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), w))

    assert (momentum(q1[1], w1[1]) - momentum(q[1], w[1])).norm() < 1e-3
    assert (w1[1] - w[1]).norm() > 0.1


def test_a_motor_against_the_parallel_axis_theorem():
    """A rod on a very heavy body: angular acceleration torque / (I + m l^2), joint held together."""
    mass, across, length = 2.0, 0.1, 0.5
    free = Springs(damping=0.0)
    sim = Rigid(
        1,
        [Body(1e9, (1e9,) * 3), Body(mass, (0.01, across, across))],
        [Hinge(0, 1, (0.0, 0.0, 0.0), (-length, 0.0, 0.0), (0.0, 0.0, 1.0))],
        [],
        dt=1 / 4800,
        substeps=480,
        springs=free,
        gravity=0.0,
        dtype=D,
    )
    p, q, v, w = quiet(1, 2)
    p[0, 1, 0] = length
    p, q, v, w = sim.step(p, q, v, w, torch.full((1, 1), 3.0, dtype=D))
    acceleration, t = 3.0 / (across + mass * length**2), 0.1
    angle, rate = sim.angles(q, w)
    assert abs(float(rate) - acceleration * t) < 0.01 * acceleration * t
    assert abs(float(angle) - acceleration * t * t / 2) < 0.02 * acceleration * t * t / 2
    held = p[0, 1] - rotate(q[0, 1], torch.tensor((length, 0.0, 0.0), dtype=D)) - p[0, 0]
    assert held.norm() < 1e-4


def test_limits_hold_and_a_ball_rests_in_the_ground():
    """At rest a ball of mass m sinks by m g / k."""
    sim = Rigid(
        1,
        [Body(1.0, (0.1,) * 3)],
        [],
        [Sphere(0, (0.0, 0.0, 0.0), 0.2)],
        dt=1 / 960,
        substeps=2000,
        dtype=D,
        springs=Springs(contact_kd=40.0),
    )
    p, q, v, w = quiet(1, 1)
    p[..., 1] = 0.25
    p, _, v, _ = sim.step(p, q, v, w, torch.zeros(1, 1, dtype=D))
    assert abs(float(p[0, 0, 1]) - (0.2 - 9.8 / 4e3)) < 1e-5 and v.norm() < 1e-3
    limited = Rigid(
        1,
        [Body(1e9, (1e9,) * 3), Body(1.0, (0.1,) * 3)],
        [Hinge(0, 1, (0.0,) * 3, (0.0,) * 3, (0.0, 1.0, 0.0), high=0.3)],
        [],
        dt=1 / 960,
        substeps=2000,
        gravity=0.0,
        dtype=D,
    )
    _, q, _, w = limited.step(*quiet(1, 2), torch.full((1, 1), 20.0, dtype=D))
    assert (
        abs(float(limited.angles(q, w)[0]) - (0.3 + 20.0 / 1e3)) < 1e-3
    )  # the limit is a spring of 1000 N m / rad


def plate(**options):
    """A ball of 1 kg and radius 0.2 above a fixed plate whose top is at y = 0."""
    options = dict(dt=1 / 960, substeps=960, dtype=D, ground=False) | options
    return Rigid(
        1,
        [Body(1.0, (1.0, 1.0, 1.0), fixed=True), Body(1.0, (1e9,) * 3)],
        [],
        [Sphere(1, (0.0,) * 3, 0.2)],
        boxes=(Box(0, (5.0, 0.5, 5.0)),),
        **options,
    )


def test_a_ball_on_a_box_sinks_by_its_weight_and_is_braked_by_coulombs_friction():
    """A ball that cannot turn slides v^2 / (2 mu g); what is fixed stays, whatever presses on it."""
    sim = plate(springs=Springs(contact_ke=1e4, contact_kd=60.0, contact_kf=1e6, friction=0.5))
    p, q, v, w = quiet(1, 2)
    p[0, 0, 1], p[0, 1, 1] = -0.5, 0.2 - 9.8e-4
    idle = torch.zeros(1, 1, dtype=D)
    still = sim.step(p, q, v, w, idle)
    assert (still[0] - p).norm() < 1e-9 and still[2].norm() < 1e-9
    v[0, 1, 0] = 2.0
    slid, _, v1, _ = sim.step(p, q, v, w, idle)
    assert abs(float(slid[0, 1, 0]) - 4 / (2 * 0.5 * 9.8)) < 0.005 and v1.norm() < 0.02
    assert slid[0, 0].equal(p[0, 0])


everywhere = pytest.mark.parametrize(
    "at",
    [(0.45, 0.1, 0.05), (0.4, 0.3, 0.05), (0.4, 0.3, -0.15), (0.25, 0.1, 0.0)],
    ids=["face", "edge", "corner", "inside"],
)


@everywhere
def test_the_force_on_a_box_is_that_on_the_ball(at):
    """Away from the nearest point of the box; linear and angular momentum are kept."""
    bodies = [Body(1.0, (0.1, 0.2, 0.3)), Body(2.0, (0.2, 0.1, 0.1))]
    options = dict(dt=1e-5, substeps=1, gravity=0.0, ground=False, dtype=D)
    sim = Rigid(
        1,
        bodies,
        [],
        [Sphere(0, (0.05, 0.1, 0.0), 0.2)],
        boxes=(Box(1, (0.3, 0.2, 0.1)),),
        springs=Springs(contact_ke=100.0, contact_kd=1.0, contact_kf=1.0),
        **options,
    )
    g, (p, q, v, w), idle = (
        torch.Generator().manual_seed(0),
        quiet(1, 2),
        torch.zeros(1, 1, dtype=D),
    )
    axis = torch.nn.functional.normalize(torch.randn(3, generator=g, dtype=D), dim=0)
    q[0, 1] = about(axis, torch.tensor(1.0, dtype=D))
    at, half = torch.tensor(at, dtype=D), torch.tensor((0.3, 0.2, 0.1), dtype=D)
    p[0, 1] = torch.randn(3, generator=g, dtype=D)
    p[0, 0] = p[0, 1] + rotate(q[0, 1], at) - torch.tensor((0.05, 0.1, 0.0), dtype=D)
    out = at - torch.maximum(torch.minimum(at, half), -half)
    # Inside, the face across x is the nearest, 0.05 away.
    away, distance = (
        (out / out.norm(), out.norm()) if out.norm() > 0 else (torch.eye(3, dtype=D)[0], -0.05)
    )
    _, _, v1, _ = sim.step(p, q, v, w, idle)
    assert (v1[0, 0] / 1e-5).allclose(100.0 * (0.2 - distance) * rotate(q[0, 1], away), rtol=1e-9)
    v, w = (torch.randn(1, 2, 3, generator=g, dtype=D) for _ in range(2))
    _, _, v1, w1 = sim.step(p, q, v, w, idle)
    _, _, v2, w2 = Rigid(1, bodies, [], [], **options).step(
        p, q, v, w, idle
    )  # the same without contact
    mass, inertia = (
        torch.tensor([getattr(b, name) for b in bodies], dtype=D) for name in ("mass", "inertia")
    )
    push = mass[:, None] * (v1 - v2)[0]
    assert push.sum(0).norm() < 1e-12 < 1e-6 < push.norm()
    turn = rotate(
        q[0], inertia * rotate(q[0] * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), (w1 - w2)[0])
    )
    assert (torch.cross(p[0], push, dim=-1) + turn).sum(0).norm() < 1e-12


@everywhere
def test_gradients_of_a_touch_against_central_differences(at):
    """A ball in each region of a box's distance, both bodies turned and on the move."""
    sim = Rigid(
        1,
        [Body(1.0, (0.1, 0.2, 0.3)), Body(2.0, (0.2, 0.1, 0.1))],
        [],
        [Sphere(0, (0.05, 0.1, 0.0), 0.2)],
        boxes=(Box(1, (0.3, 0.2, 0.1)),),
        dt=1e-3,
        substeps=5,
        ground=False,
        dtype=D,
        springs=Springs(contact_ke=100.0, contact_kd=1.0, contact_kf=1.0),
    )
    g, (p, q, v, w) = torch.Generator().manual_seed(0), quiet(1, 2)
    q = torch.nn.functional.normalize(torch.randn(1, 2, 4, generator=g, dtype=D), dim=-1)
    v, w = (0.1 * torch.randn(1, 2, 3, generator=g, dtype=D) for _ in range(2))
    p[0, 1] = torch.randn(3, generator=g, dtype=D)
    centre = p[0, 1] + rotate(q[0, 1], torch.tensor(at, dtype=D))
    p[0, 0] = centre - rotate(q[0, 0], torch.tensor((0.05, 0.1, 0.0), dtype=D))
    tensors = [p, q, v, w, torch.zeros(1, 1, dtype=D)]
    for i, grad in enumerate(gradient(sim, tensors, 2)[:4]):
        d, errors = torch.randn(grad.shape, generator=g, dtype=D), []
        d = d / d.norm() + 2 * grad / grad.norm()
        for eps in (1e-5, 1e-6, 1e-7):
            with torch.no_grad():
                up, down = (
                    run(sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], 2)
                    for s in (1, -1)
                )
            errors.append(float(abs((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
        assert min(errors) < 1e-6, (i, errors)


def ant(dtype=D, n=2, **options):
    return rewarped.make(
        "AntRun",
        n,
        "cpu",
        **({"seed": 1, "size": "small", "graph": False, "dtype": dtype} | options),
    )


def scene(env, low=0.5):
    """Two ants on the move with their feet in the ground."""
    env.reset(3)
    g, state = torch.Generator().manual_seed(0), env.state
    p = state["p"] - torch.tensor((0.0, 0.75 - low, 0.0), dtype=D)
    v, w = (0.3 * torch.randn(state[k].shape, generator=g, dtype=D) for k in "vw")
    return [p, state["q"], v, w, 100 * torch.randn(2, 8, generator=g, dtype=D)]


def run(sim, tensors, steps):
    *state, motor = tensors
    for _ in range(steps):
        state = sim.step(*state, motor)
    g = torch.Generator().manual_seed(7)
    return sum((t * torch.randn(t.shape, generator=g, dtype=D).to(t.dtype)).sum() for t in state)


def gradient(sim, tensors, steps):
    leaves = [t.clone().requires_grad_() for t in tensors]
    run(sim, leaves, steps).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "low, steps", [(0.5, 1), (0.5, 3), (2.0, 3)], ids=["contact", "window in contact", "in air"]
)
def test_gradients_against_central_differences(low, steps):
    env = ant()
    sim, tensors, g = env.sim, scene(env, low), torch.Generator().manual_seed(4)
    assert ((scene(env, low)[0][..., 1] < 0.3).any()) == (low < 1), "in contact, or not"
    for i, grad in enumerate(gradient(sim, tensors, steps)):
        d = torch.randn(tensors[i].shape, generator=g, dtype=D)
        d, errors = d / d.norm() + 2 * grad / grad.norm(), []
        for eps in (1e-6, 1e-7, 1e-5 if i == 4 else 1e-8):
            with torch.no_grad():
                up, down = (
                    run(sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], steps)
                    for s in (1, -1)
                )
            errors.append(float(abs((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
        assert min(errors) < 1e-6, (i, errors)


def test_float32_agrees_and_graphs_change_nothing():
    env = ant()
    tensors = scene(env)
    exact = gradient(env.sim, tensors, 2)
    single = gradient(ant(torch.float32).sim, [t.float() for t in tensors], 2)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(single, exact, strict=True))
    graphs = ant(graph=True).sim
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(gradient(graphs, tensors, 2), exact, strict=True)
        )


def test_antrun_begins_and_stays_in_one_piece():
    env = ant(torch.float32)
    angles, rates = env.sim.angles(env.state["q"], env.state["w"])
    assert ((angles - torch.tensor((0.0, 1.0) * 4)).abs() <= 0.2001).all() and (
        rates.abs() <= 0.2501
    ).all()
    for part in range(2):
        for (
            h
        ) in env.sim.hinges:  # both bodies of a hinge agree where its anchor is, and how it moves
            ends = []
            for b, anchor in ((h.parent, h.anchor_a), (h.child, h.anchor_b)):
                arm = rotate(env.state["q"][:, b], torch.tensor(anchor))
                ends.append(
                    (
                        env.state["p"][:, b] + arm,
                        env.state["v"][:, b] + torch.cross(env.state["w"][:, b], arm, dim=-1),
                    )
                )
            assert (ends[0][0] - ends[1][0]).norm(dim=-1).max() < 0.01 and (
                ends[0][1] - ends[1][1]
            ).norm() < 0.2
        with torch.no_grad():
            for k in range(20):
                obs, _, terminations, _, info = env.step(torch.zeros(2, 8))
                assert not info["nan"].any() and not (part == 0 and k < 8 and terminations.any())
    assert obs["state"].shape == (2, 37) and int(env.nan_resets) == 0


def test_antrun_reward_termination_and_gradient():
    env = ant(torch.float32)
    a = torch.full((2, 8), 0.1, requires_grad=True)
    obs, rewards, _, _, _ = env.step(a)
    o = obs["state"]
    assert rewards.allclose(o[:, 5] + 0.1 * o[:, 27] + o[:, 28] + o[:, 0] - 0.27, atol=1e-5)
    assert (torch.autograd.grad(rewards.sum(), a)[0].norm(dim=1) > 0).all()
    env.state = {**env.state, "p": env.state["p"] - torch.tensor([[[0.0, 0.6, 0.0]], [[0.0] * 3]])}
    _, _, terminations, truncations, info = env.step(a)
    assert terminations.tolist() == [True, False] and not truncations.any()
    assert info["final_obs"]["state"][0, 0] < 0.27 and env.obs["state"][0, 0] > 0.6
    assert env.render(0, 48).shape == (48, 48, 3)


def test_a_fall_cuts_its_own_gradient_and_nobody_elses():
    grads = []
    for falls in (False, True):
        env = ant(torch.float32)
        acts, rewards = [], []
        for k in range(5):
            acts.append(torch.full((2, 8), 0.1 * k - 0.2).requires_grad_())
            if (
                falls and k == 2
            ):  # between steps, environment 0 is put down so low that it terminates
                env.state = {
                    **env.state,
                    "p": env.state["p"] - torch.tensor([[[0.0, 0.6, 0.0]], [[0.0] * 3]]),
                }
            _, r, terminations, _, _ = env.step(acts[-1])
            assert terminations.tolist() == [falls and k == 2, False]
            rewards.append(r)
        grads.append(torch.stack(torch.autograd.grad(rewards[-1].sum(), acts)))
    assert torch.equal(grads[0][:, 1], grads[1][:, 1]) and (grads[0][:, 1].norm(dim=-1) > 0).all()
    assert (grads[1][:3, 0] == 0).all() and (grads[1][3:, 0].norm(dim=-1) > 0).all()


# --- HandReorient -----------------------------------------------------------------------------------------------------
def hand(dtype=torch.float32, n=2, **options):
    options = {"seed": 1, "size": "small", "graph": False, "dtype": dtype} | options
    return rewarped.make("HandReorient", n, "cpu", **options)


@pytest.fixture(scope="module")
def grip():
    """A hand and what a step depends on, float64: the cube has come to rest between fingers, then all of it moves."""
    env, g = hand(D), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(40):
            env.step(torch.full((2, 16), 0.05, dtype=D))
    p, q, v, w = (env.state[name] for name in "pqvw")
    v, w = (t + s * torch.randn(t.shape, generator=g, dtype=D) for t, s in ((v, 0.02), (w, 0.5)))
    v[:, 0] = w[:, 0] = 0
    return env, [p, q, v, w, torch.randn(2, 16, generator=g, dtype=D)]


def test_the_cube_is_in_contact(grip):
    env, (p, q, *_) = grip
    depths = []
    for s in env.sim.spheres:
        x = (
            p[:, s.body]
            + rotate(q[:, s.body], torch.tensor(s.offset, dtype=D).expand(2, 3))
            - p[:, env.cube]
        )
        x = (
            rotate(q[:, env.cube] * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), x).abs()
            - 0.065 / 2
        )
        depths.append(s.radius - x.clamp_min(0).norm(dim=1))
    depths = torch.stack(depths)
    bodies = {env.sim.spheres[k].body for k in (depths[:, 0] > 0).nonzero()[:, 0].tolist()}
    assert ((depths > 0).sum(0) > 4).all() and 0 in bodies and len(bodies) > 2, (
        "palm and fingers hold the cube"
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_the_hand_against_central_differences(grip, steps):
    env, tensors = grip
    g = torch.Generator().manual_seed(4)
    for i, grad in enumerate(gradient(env.sim, tensors, steps)):
        d = torch.randn(tensors[i].shape, generator=g, dtype=D)
        d, errors = d / d.norm() + 2 * grad / grad.norm(), []
        for eps in (1e-6, 1e-7, 1e-5 if i == 4 else 1e-8):
            with torch.no_grad():
                up, down = (
                    run(env.sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], steps)
                    for s in (1, -1)
                )
            errors.append(float(abs((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
        assert min(errors) < 1e-6, (i, errors)


def test_the_hand_in_float32_from_graphs_and_alone(grip):
    env, tensors = grip
    exact = gradient(env.sim, tensors, 2)
    single = gradient(hand().sim, [t.float() for t in tensors], 2)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(single, exact, strict=True))
    graphs = hand(D, graph=True).sim
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(gradient(graphs, tensors, 2), exact, strict=True)
        )
    alone = hand(D, 1).sim
    for n in range(2):
        one = [t[n : n + 1] for t in tensors]
        assert all(
            torch.equal(a[0], b[n])
            for a, b in zip(alone.step(*one), env.sim.step(*tensors), strict=True)
        )


def test_hinges_hold_where_bodies_are_placed():
    """Both bodies of a hinge agree where its anchor is and how it moves; angles and rates are those that were given."""
    env, g = hand(D), torch.Generator().manual_seed(0)
    p, q, v, w, angles, rates = (
        torch.randn(2, k, generator=g, dtype=D) for k in (3, 4, 3, 3, 16, 16)
    )
    q = torch.nn.functional.normalize(q, dim=1)
    state = env.sim.place(p, q, v, w, angles, rates)
    assert all(
        torch.equal(state[name][:, 0], t) for name, t in zip("pqvw", (p, q, v, w), strict=True)
    )
    for h in env.sim.hinges:
        ends = []
        for b, anchor in ((h.parent, h.anchor_a), (h.child, h.anchor_b)):
            arm = rotate(state["q"][:, b], torch.tensor(anchor, dtype=D))
            ends.append(
                torch.cat(
                    (
                        state["p"][:, b] + arm,
                        state["v"][:, b] + torch.cross(state["w"][:, b], arm, dim=-1),
                    ),
                    1,
                )
            )
        assert ends[0].allclose(ends[1], atol=1e-12)
    found, speeds = env.sim.angles(state["q"], state["w"])
    assert found.allclose(
        torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
    ) and speeds.allclose(rates)


@pytest.mark.parametrize("make", [ant, hand])
def test_a_saved_state_has_the_same_future(make):
    """With goals that are reached and episodes that end: the random numbers are those of the saved generator."""
    env, twin = make(torch.float32, seed=3), make(torch.float32, seed=4)
    a = torch.full((2, env.action_dim), 0.2)
    env.step(a)
    if make is hand:
        env.state["goal"] = env.state["q"][:, env.cube].clone()
    env.clock[1] = env.max_episode_steps - 1
    twin.load_state_dict(env.state_dict())
    for _ in range(2):
        one, other = env.step(a), twin.step(a)
        assert torch.equal(one[0]["state"], other[0]["state"]) and torch.equal(one[1], other[1])
    assert env.clock.tolist() == twin.clock.tolist() == [3, 1]


def test_impossible_trees_are_named_in_one_line():
    bodies, hinge = [Body(1.0, (1.0,) * 3)] * 3, ((0.0,) * 3, (0.0,) * 3, (1.0, 0.0, 0.0))
    for pairs in (((1, 2), (0, 1)), ((0, 1), (0, 1)), ((0, 1), (1, 0)), ((0, 3),)):
        with pytest.raises(ValueError, match="hinges: each body has one") as error:
            Rigid(1, bodies, [Hinge(a, b, *hinge) for a, b in pairs], [], dt=1e-3, substeps=1)
        assert "\n" not in str(error.value)


def test_hand_sizes_and_start():
    env = hand(size="full")
    assert (
        env.obs_dims == {"state": (72,)} and env.action_dim == 16 and env.max_episode_steps == 600
    )
    assert env.control_hz == 120.0 and env.sim.substeps == 64
    angles, rates = env.sim.angles(env.state["q"], env.state["w"])
    low, high = (torch.tensor([getattr(h, k) for h in env.sim.hinges]) for k in ("low", "high"))
    assert (angles > low).all() and (angles < high).all() and (rates == 0).all()
    assert env.obs["state"][:, :16].allclose(angles)
    start = env.state["p"][:, env.cube] - env.goal_position - torch.tensor((0.0, 0.04, 0.0))
    assert (start.abs() <= 0.01).all() and env.state["q"][:, env.cube].norm(dim=1).allclose(
        torch.ones(2)
    )
    assert not env.state["q"][0, env.cube].allclose(env.state["q"][1, env.cube])
    tips = env.state["p"][
        :, [4, 8, 12, 16]
    ]  # above the palm, and the thumb beside the index finger
    assert (
        (tips[..., 1] > 0.03).all()
        and (tips[:, 0, 2] > tips[:, 1, 2]).all()
        and (tips[:, 3, 2] > 0.04).all()
    )


def test_hand_reward_goals_and_falls():
    env = hand(n=3)
    about_y = about(torch.tensor((0.0, 1.0, 0.0)), torch.tensor(0.05))
    near = multiply(about_y, env.state["q"][0, env.cube])  # 0 is within 0.1 of its goal, 2 falls
    goal = torch.stack((near, *env.state["goal"][1:]))
    p = env.state["p"].clone()
    p[2, env.cube] += torch.tensor((0.0, -0.3, 0.0))
    env.state = {**env.state, "goal": goal, "p": p}
    a = torch.full((3, 16), 0.2, requires_grad=True)
    obs, rewards, terminations, truncations, info = env.step(a)
    last = info["final_obs"]["state"]
    d = (last[:, 32:35] - last[:, 45:48]).norm(dim=1)
    assert torch.equal(last[:, 45:48], env.goal_position.expand(3, 3)) and last[:, 56:].equal(a)
    conjugate = goal * torch.tensor((-1.0, -1.0, -1.0, 1.0))
    theta = 2 * multiply(last[:, 35:39], conjugate)[:, 3].abs().clamp_max(1).acos()
    assert theta[0] < 0.1 < theta[1:].min()
    bonus = 250 * torch.sigmoid((0.1 - theta) / 1e-3)
    assert rewards.allclose(
        -10 * d + 1 / (theta + 0.1) - 2e-4 * 16 * 0.04 + bonus, rtol=1e-3, atol=1e-3
    )
    assert rewards[0] > 200 and rewards[1] < 11
    # The goal that was reached is followed by another, which the observation shows; the others stay.
    assert torch.equal(last[1, 48:52], goal[1]) and not last[0, 48:52].allclose(goal[0], atol=0.1)
    assert last[:, 52:56].allclose(
        multiply(last[:, 35:39], last[:, 48:52] * torch.tensor((-1.0, -1.0, -1.0, 1.0)))
    )
    assert terminations.tolist() == [False, False, True] and d[2] > 0.24 and not truncations.any()
    assert (
        torch.autograd.grad(rewards.sum(), a)[0].norm(dim=1).gt(0).all()
        and env.render(0, 48).std() > 5
    )


def test_a_fallen_cube_and_a_nan_cut_their_own_gradient_alone():
    grads = []
    for trouble in ("", "falls", "nan"):
        env, acts = hand(seed=2), []
        for k in range(4):
            acts.append(torch.full((2, 16), 0.3 * k - 0.4).requires_grad_())
            if trouble and k == 1:
                name, change = (
                    ("p", -1.0) if trouble == "falls" else ("w", 1e30)
                )  # its square is no float
                shift = torch.zeros(2, 18, 3)
                shift[0, env.cube, 1] = change
                env.state = {**env.state, name: env.state[name] + shift}
            obs, rewards, terminations, truncations, info = env.step(acts[-1])
            assert terminations.tolist() == [trouble == "falls" and k == 1, False]
            assert (
                truncations.tolist() == info["nan"].tolist() == [trouble == "nan" and k == 1, False]
            )
            assert all(
                t.isfinite().all() for t in (obs["state"], rewards, info["final_obs"]["state"])
            )
        assert int(env.nan_resets) == (trouble == "nan")
        grads.append(torch.stack(torch.autograd.grad(rewards.sum() + obs["state"].sum(), acts)))
    for free, cut in ((grads[0], grads[1]), (grads[0], grads[2])):
        assert torch.equal(free[:, 1], cut[:, 1]) and (free.norm(dim=-1) > 0).all()
        assert (
            (cut[:2, 0] == 0).all() and (cut[2:, 0].norm(dim=-1) > 0).all() and cut.isfinite().all()
        )


# --- The scripts ------------------------------------------------------------------------------------------------------
def test_images_and_throughput_are_written_and_wrong_choices_named(tmp_path, monkeypatch, capsys):
    import picture_rewarped
    from conftest import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import throughput_rewarped

    out = tmp_path / "images"
    image = picture_rewarped.Args(
        tasks=("AntRun",), size="small", steps=2, out=out, video=tmp_path / "films"
    )
    assert picture_rewarped.main(image) == 0
    assert (out / "AntRun.png").read_bytes().startswith(b"\x89PNG")
    film = imageio.mimread(tmp_path / "films/AntRun.mp4")
    assert len(film) == 3 and film[0].shape == (320, 320, 3) and film[0].std() > 5
    table = throughput_rewarped.Args(("AntRun",), "small", (1,), 1, 1, out=tmp_path / "table.csv")
    assert throughput_rewarped.main(table) == 0
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith("task,what,worlds,env_steps_per_second")
    assert [line.startswith('"AntRun, small",forward') for line in lines[-3:]] == [
        False,
        True,
        True,
    ]
    capsys.readouterr()
    assert picture_rewarped.main(picture_rewarped.Args(tasks=("AntWalk",))) == 2
    assert throughput_rewarped.main(throughput_rewarped.Args(("AntWalk",))) == 2
    assert throughput_rewarped.main(throughput_rewarped.Args(window=0)) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "--tasks",
        "--task AntWalk",
        "--num-envs, --window, --repeats",
    ]
