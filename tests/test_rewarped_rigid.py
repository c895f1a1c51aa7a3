"""Articulated rigid bodies: free fall, spin, hinges, contact against closed forms; gradients;
AntRun, HandReorient."""

import math

import imageio
import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402
from envs.rewarped.rigid import Body, Box, Hinge, Rigid, Sphere, Springs, about, multiply, rotate  # noqa: E402

D = torch.float64
ALOFT = Body(1.0, (1.0, 1.0, 1.0))  # a free body that has nothing to do


def quiet(n, j=1):
    """State and motor torques: the free body at the origin, all at rest."""
    q = torch.zeros(n, 4, dtype=D)
    q[:, 3] = 1
    still, idle = torch.zeros(n, 3, dtype=D), torch.zeros(n, j, dtype=D)
    return [still, q, still, still, idle, idle, idle]


def random_turn(g, angle=1.0):
    axis = torch.nn.functional.normalize(torch.randn(3, generator=g, dtype=D), dim=0)
    return about(axis, torch.tensor(angle, dtype=D))


def test_quaternions():
    x, y, z = torch.eye(3, dtype=D)
    turn = about(z, torch.tensor(math.pi / 2, dtype=D))
    assert rotate(turn, x).allclose(y)
    assert rotate(multiply(about(x, torch.tensor(math.pi / 2, dtype=D)), turn), x).allclose(z)


def test_free_fall_and_spin():
    """Height after t; a body that spins about a principal axis keeps on, any other keeps its
    angular momentum."""
    moments, dt = torch.tensor((1.0, 2.0, 3.0), dtype=D), 1e-4
    body = Body(2.0, (1.0, 2.0, 3.0))
    sim = Rigid(2, [body], [], [], dt=dt, substeps=1000, updates=1000, dtype=D)
    state = quiet(2)
    q, w = state[1], torch.tensor([[0.0, 3.0, 0.0], [1.0, 2.0, 0.5]], dtype=D)
    state[3] = w
    p1, q1, v1, w1, *_ = sim.step(*state)
    t = 0.1
    assert v1[:, 1].allclose(torch.tensor(-9.81 * t, dtype=D))
    # Velocities at a fixed origin: what spins while it flies is off by dt v w a substep.
    assert (p1[:, 1] + 9.81 / 2 * t * (t + dt)).abs().max() < 1e-6
    assert w1[0].allclose(w[0])
    # The angle of a spin by increments of dt w / 2, normalised, is off by (dt w)^3 / 12 each.
    spun = about(torch.tensor((0.0, 1.0, 0.0), dtype=D), torch.tensor(3.0 * t, dtype=D))
    assert q1[0].allclose(spun, atol=1e-7)

    def momentum(q, w):
        return rotate(q, moments * rotate(q * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), w))

    assert (momentum(q1[1], w1[1]) - momentum(q[1], w[1])).norm() < 1e-3
    assert (w1[1] - w[1]).norm() > 0.1


def test_while_a_mass_matrix_holds_weight_turns_what_flies():
    """By m t v x g after the time t, as in the published simulation; it vanishes with more
    updates."""
    state, turned = quiet(1), []
    state[2] = torch.tensor([[2.0, 0.0, 0.0]], dtype=D)
    for updates in (1, 50):
        sim = Rigid(1, [ALOFT], [], [], dt=1e-3, substeps=50, updates=updates, dtype=D)
        turned.append(float(sim.step(*state)[3][0, 2]))
    assert turned[0] == pytest.approx(-2.0 * 9.81 * 0.05**2 / 2, rel=0.05)
    assert abs(turned[1]) < 0.03 * abs(turned[0])


def test_a_motor_against_the_parallel_axis_theorem():
    """A rod on a hinge in the world: angular acceleration torque / (I + m l^2 + armature)."""
    mass, across, length = 2.0, 0.1, 0.5
    rod = Body(mass, (0.01, across, across), (length, 0.0, 0.0))
    hinge = Hinge(-1, (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), armature=0.2)
    still = (0.0, 0.0, 0.0)
    sim = Rigid(1, [ALOFT, rod], [hinge], [], dt=1e-3, substeps=100, gravity=still, dtype=D)
    state = quiet(1)
    state[6] = torch.full((1, 1), 3.0, dtype=D)
    *_, angle, rate = sim.step(*state)
    acceleration, t = 3.0 / (across + mass * length**2 + 0.2), 0.1
    assert float(rate) == pytest.approx(acceleration * t, rel=1e-9)
    assert float(angle) == pytest.approx(acceleration * t * (t + 1e-3) / 2, rel=1e-9)


def test_two_links_on_a_free_body_keep_momentum():
    """Motors turn them against each other; nothing moves the whole."""
    g = torch.Generator().manual_seed(0)
    bodies = [Body(3.0, (0.2, 0.3, 0.25)), Body(1.0, (0.02, 0.1, 0.1), (0.3, 0.0, 0.0))]
    bodies.append(
        Body(0.5, ((0.05, 0.01, 0.0), (0.01, 0.06, 0.0), (0.0, 0.0, 0.07)), (0.2, 0.1, 0.0))
    )
    hinges = [
        Hinge(0, (0.2, 0.1, 0.0), (0.0, 0.6, 0.8)),
        Hinge(1, (0.5, 0.0, 0.0), (0.8, 0.0, 0.6)),
    ]
    options = dict(dt=1e-4, substeps=200, updates=200, gravity=(0.0, 0.0, 0.0), dtype=D)
    sim, state = Rigid(1, bodies, hinges, [], **options), quiet(1, 2)
    state[1] = random_turn(g)[None]
    state[2], state[3] = (torch.randn(1, 3, generator=g, dtype=D) for _ in range(2))
    state[4], state[5], state[6] = (torch.randn(1, 2, generator=g, dtype=D) for _ in range(3))

    mass = torch.tensor([body.mass for body in bodies], dtype=D)
    com = torch.tensor([body.com for body in bodies], dtype=D)
    inertia = torch.stack([sim.matrix(body.inertia) for body in bodies])

    def momenta(p, q, v, w, angles, rates):
        """By differences of the frames' positions: independent of the mass matrix."""

        def middles(s):
            spin = torch.cat((w * s / 2, torch.ones(1, 1, dtype=D)), 1)
            turned = torch.nn.functional.normalize(multiply(spin, q), dim=1)
            x, turns = sim.frames(p + s * v, turned, angles + s * rates)
            return x + rotate(turns, com.expand(1, -1, 3)), turns

        (a, _), (b, _), (c, turns) = middles(-1e-6), middles(1e-6), middles(0.0)
        speed, spins = (b - a) / 2e-6, [w[0]]
        for j, hinge in enumerate(hinges):
            spins.append(spins[hinge.parent] + rotate(turns[0, 1 + j], sim.axes[j]) * rates[0, j])
        push = mass[:, None] * speed[0]
        own = rotate(turns[0] * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), torch.stack(spins))
        own = rotate(turns[0], (inertia @ own[..., None])[..., 0])
        return push.sum(0), (own + torch.cross(c[0], push, dim=1)).sum(0)

    before, after = momenta(*state[:6]), momenta(*sim.step(*state))
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() < 1e-3 * one.norm()


def test_without_checkpoints_a_window_that_is_over_has_no_gradient():
    """Its arrays may have been used again; and a window has as many steps as were asked for."""
    env = rewarped.make("AntRun", 1, size="small", checkpoint=False, window=2)
    action = torch.zeros(1, 8, requires_grad=True)
    reward = env.step(action)[1].sum()
    env.detach()
    env.step(action)
    with pytest.raises(RuntimeError, match="after detach"):
        reward.backward()
    env.step(action)
    with pytest.raises(RuntimeError, match="more than window=2"):
        env.step(action)


def test_limits_hold_and_a_ball_rests_in_the_ground():
    """At rest a ball of mass m sinks by m g / k."""
    ball = [Sphere(0, (0.0, 0.0, 0.0), 0.2)]
    springs = Springs(contact_kd=40.0)
    options = dict(dt=1 / 960, substeps=4000, dtype=D)
    sim = Rigid(1, [Body(1.0, (0.1,) * 3)], [], ball, springs=springs, **options)
    state = quiet(1)
    state[0] = torch.tensor([[0.0, 0.21, 0.0]], dtype=D)
    p, _, v, *_ = sim.step(*state)
    assert abs(float(p[0, 1]) - (0.2 - 9.81 / 4e3)) < 1e-4 and v.norm() < 1e-2
    hinge = Hinge(-1, (0.0,) * 3, (0.0, 1.0, 0.0), high=0.3)
    limited = Rigid(1, [ALOFT, Body(1.0, (0.1,) * 3)], [hinge], [], **options)
    state = quiet(1)
    state[6] = torch.full((1, 1), 20.0, dtype=D)
    *_, angle, _ = limited.step(*state)
    assert abs(float(angle) - (0.3 + 20.0 / 1e3)) < 1e-3  # the limit is a spring of 1000 N m / rad


def test_a_ball_on_a_box_sinks_by_its_weight_and_is_braked_by_coulombs_friction():
    """A ball that cannot turn slides v^2 / (2 mu g)."""
    sim = Rigid(
        1,
        [Body(1.0, (1e9,) * 3)],
        [],
        [Sphere(0, (0.0,) * 3, 0.2)],
        boxes=(Box(-1, (5.0, 0.5, 5.0), (0.0, -0.5, 0.0)),),
        springs=Springs(contact_ke=1e4, contact_kd=60.0, contact_kf=1e6, friction=0.5),
        dt=1 / 960,
        substeps=960,
        ground=False,
        dtype=D,
    )
    state = quiet(1)
    state[0] = torch.tensor([[0.0, 0.2 - 9.81e-4, 0.0]], dtype=D)
    still = sim.step(*state)
    assert (still[0] - state[0]).norm() < 1e-9 and still[2].norm() < 1e-9
    state[2] = torch.tensor([[2.0, 0.0, 0.0]], dtype=D)
    p, _, v, *_ = sim.step(*state)
    assert abs(float(p[0, 0]) - 4 / (2 * 0.5 * 9.81)) < 0.005 and v.norm() < 0.02


everywhere = pytest.mark.parametrize(
    "at",
    [(0.45, 0.1, 0.05), (0.4, 0.3, 0.05), (0.4, 0.3, -0.15), (0.25, 0.1, 0.0)],
    ids=["face", "edge", "corner", "inside"],
)


def ball_and_box(at, **options):
    """A free ball at this place in the frame of a box that hangs on a hinge; state; turn of the
    box."""
    g, at = torch.Generator().manual_seed(0), torch.tensor(at, dtype=D)
    turn, place = random_turn(g), torch.randn(3, generator=g, dtype=D)
    hinge = Hinge(-1, tuple(place.tolist()), (0.0, 0.0, 1.0), tuple(turn.tolist()))
    sim = Rigid(
        1,
        [Body(1.0, (0.1, 0.2, 0.3)), Body(2.0, (0.2, 0.1, 0.1))],
        [hinge],
        [Sphere(0, (0.0, 0.0, 0.0), 0.2)],
        boxes=(Box(1, (0.3, 0.2, 0.1)),),
        springs=Springs(contact_ke=100.0, contact_kd=1.0, contact_kf=1.0),
        gravity=(0.0, 0.0, 0.0),
        ground=False,
        dtype=D,
        **options,
    )
    state = quiet(1)
    state[0] = (place + rotate(turn, at))[None]
    return sim, state, turn, at


@everywhere
def test_the_force_on_a_box_is_that_on_the_ball(at):
    """Away from the nearest point of the box; what it does to the hinge is its moment."""
    sim, state, turn, at = ball_and_box(at, dt=1e-5, substeps=1)
    half = torch.tensor((0.3, 0.2, 0.1), dtype=D)
    out = at - torch.maximum(torch.minimum(at, half), -half)
    # Inside, the face across x is the nearest, 0.05 away.
    away, distance = (
        (out / out.norm(), out.norm()) if out.norm() > 0 else (torch.eye(3, dtype=D)[0], -0.05)
    )
    _, _, v, _, _, rate = sim.step(*state)
    force = 100.0 * (0.2 - distance) * away  # in the box's frame
    assert (v[0] / 1e-5).allclose(rotate(turn, force), rtol=1e-9)
    moment = -torch.linalg.cross(at - 0.2 * away, force)[2]
    assert float(rate) / 1e-5 == pytest.approx(float(moment) / 0.1, rel=1e-6)


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


def check(sim, tensors, steps, sizes=(1e-6, 1e-7, 1e-5, 1e-8)):
    """The gradient of every input against central differences."""
    g = torch.Generator().manual_seed(4)
    for i, grad in enumerate(gradient(sim, tensors, steps)):
        d, errors = torch.randn(tensors[i].shape, generator=g, dtype=D), []
        d = d / d.norm() + 2 * grad / grad.norm()
        for eps in sizes:
            with torch.no_grad():
                up, down = (
                    run(sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], steps)
                    for s in (1, -1)
                )
            errors.append(float(abs((grad * d).sum() / ((up - down) / (2 * eps)) - 1)))
        assert min(errors) < 1e-6, (i, errors)


@everywhere
def test_gradients_of_a_touch_against_central_differences(at):
    """A ball in each region of a box's distance, both bodies turned and on the move."""
    sim, state, _, _ = ball_and_box(at, dt=1e-3, substeps=5)
    g = torch.Generator().manual_seed(1)
    state[1] = random_turn(g)[None]
    state[2], state[3] = (0.1 * torch.randn(1, 3, generator=g, dtype=D) for _ in range(2))
    state[5] = 0.1 * torch.randn(1, 1, generator=g, dtype=D)
    check(sim, state, 2)


def ant(dtype=D, n=2, **options):
    options = {"seed": 1, "size": "small", "graph": False, "dtype": dtype} | options
    return rewarped.make("AntRun", n, "cpu", **options)


def scene(env, low=0.5):
    """Two ants on the move with their feet in the ground."""
    env.reset(3)
    g = torch.Generator().manual_seed(0)
    state = [env.state[name] for name in env.STATE]
    state[0] = state[0] - torch.tensor((0.0, 0.75 - low, 0.0), dtype=D)
    return [*state, 100 * torch.randn(2, 8, generator=g, dtype=D)]


@pytest.mark.parametrize(
    "low, steps", [(0.5, 1), (0.5, 3), (2.0, 3)], ids=["contact", "window in contact", "in air"]
)
def test_gradients_against_central_differences(low, steps):
    env = ant()
    tensors = scene(env, low)
    feet = env.sim.frames(tensors[0], tensors[1], tensors[4])[0][..., 1].min()
    assert low > 1 or feet < 0.5
    check(env.sim, tensors, steps)


def test_float32_agrees_and_graphs_change_nothing():
    env = ant()
    tensors = scene(env)
    exact = gradient(env.sim, tensors, 2)
    single = gradient(ant(torch.float32).sim, [t.float() for t in tensors], 2)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(single, exact, strict=True))
    graphs = ant(graph=True).sim
    for _ in range(2):
        again = gradient(graphs, tensors, 2)
        assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))


def test_antrun_reward_termination_and_gradient():
    env = ant(torch.float32)
    a = torch.full((2, 8), 0.1, requires_grad=True)
    obs, rewards, _, _, _ = env.step(a)
    assert obs["state"].shape == (2, 37)
    assert (torch.autograd.grad(rewards.sum(), a)[0].norm(dim=1) > 0).all()
    env.state = {**env.state, "p": env.state["p"] - torch.tensor([[0.0, 0.6, 0.0], [0.0] * 3])}
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
            if falls and k == 2:  # environment 0 is put down so low that it terminates
                lower = torch.tensor([[0.0, 0.6, 0.0], [0.0] * 3])
                env.state = {**env.state, "p": env.state["p"] - lower}
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
    """A hand and what a step depends on, float64: the cube has fallen onto it, then all of it
    moves."""
    env, g = hand(D), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            env.step(torch.full((2, 16), 0.02, dtype=D))
    state = [env.state[name] for name in env.STATE]
    state[2] = state[2] + 0.02 * torch.randn(2, 3, generator=g, dtype=D)
    state[3] = state[3] + 0.5 * torch.randn(2, 3, generator=g, dtype=D)
    return env, [*state, torch.randn(2, 16, generator=g, dtype=D)]


def test_the_cube_is_in_contact(grip):
    env, (p, q, _, _, angles, _, _) = grip
    places, turns = env.sim.frames(p, q, angles)
    back, depths = q * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), []
    for s in env.sim.spheres:
        x = torch.tensor(s.offset, dtype=D).expand(2, 3)
        x = places[:, s.body] + rotate(turns[:, s.body], x) if s.body >= 0 else x
        x = rotate(back, x - p).abs() - 0.065 / 2
        depths.append(s.radius - x.clamp_min(0).norm(dim=1))
    assert ((torch.stack(depths) > 0).sum(0) > 1).all(), "the hand holds the cube"


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_the_hand_against_central_differences(grip, steps):
    check(grip[0].sim, grip[1], steps)


def test_the_hand_in_float32_from_graphs_and_alone(grip):
    env, tensors = grip
    exact = gradient(env.sim, tensors, 2)
    single = gradient(hand().sim, [t.float() for t in tensors], 2)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(single, exact, strict=True))
    graphs = hand(D, graph=True).sim
    for _ in range(2):
        again = gradient(graphs, tensors, 2)
        assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))
    alone = hand(D, 1).sim
    for n in range(2):
        one, both = alone.step(*[t[n : n + 1] for t in tensors]), env.sim.step(*tensors)
        assert all(
            a[0].allclose(b[n], rtol=1e-12, atol=1e-13) for a, b in zip(one, both, strict=True)
        )


@pytest.mark.parametrize("make", [ant, hand])
def test_a_saved_state_has_the_same_future(make):
    """With goals that are reached and episodes that end: the random numbers are those of the saved
    generator."""
    env, twin = make(torch.float32, seed=3), make(torch.float32, seed=4)
    a = torch.full((2, env.action_dim), 0.2)
    env.step(a)
    if make is hand:
        env.state["goal"] = env.state["q"].clone()
    env.clock[1] = env.max_episode_steps - 1
    twin.load_state_dict(env.state_dict())
    for _ in range(2):
        one, other = env.step(a), twin.step(a)
        assert torch.equal(one[0]["state"], other[0]["state"]) and torch.equal(one[1], other[1])
    assert env.clock.tolist() == twin.clock.tolist() == [3, 1]


def test_impossible_bodies_are_named_in_one_line():
    up, at = (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)
    chain = [Hinge(j, at, up) for j in range(5)]
    for bodies, hinges, message in (
        ([ALOFT] * 3, [Hinge(2, at, up), Hinge(0, at, up)], "before its body"),
        ([ALOFT] * 6, chain, "more than 4 in a row"),
        ([ALOFT] * 3, chain[:1], "one for each hinge"),
        ([Body(1.0, (1.0, 0.0, 1.0))], [], "above 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Rigid(1, bodies, hinges, [], dt=1e-3, substeps=1)
        assert "\n" not in str(error.value)


def test_hand_goals_and_falls():
    env = hand(n=3)
    near = multiply(about(torch.tensor((0.0, 1.0, 0.0)), torch.tensor(0.05)), env.state["q"][0])
    goal = torch.stack((near, *env.state["goal"][1:]))  # 0 is within 0.1 of its goal, 2 falls
    p = env.state["p"] - torch.tensor(((0.0,) * 3, (0.0,) * 3, (0.0, 0.0, 0.3)))
    env.state = {**env.state, "goal": goal, "p": p}
    a = torch.full((3, 16), 0.2, requires_grad=True)
    _, rewards, terminations, truncations, info = env.step(a)
    last = info["final_obs"]["state"]
    assert last[:, 56:].equal(a) and rewards[0] > 100 > 11 > rewards[1:].max()
    # The goal that was reached is followed by another, which the observation shows; the others
    # stay.
    assert torch.equal(last[1, 48:52], goal[1]) and not last[0, 48:52].allclose(goal[0], atol=0.1)
    back = last[:, 48:52] * torch.tensor((-1.0, -1.0, -1.0, 1.0))
    assert last[:, 52:56].allclose(multiply(last[:, 35:39], back))
    assert terminations.tolist() == [False, False, True] and not truncations.any()
    assert torch.autograd.grad(rewards.sum(), a)[0].isfinite().all()
    assert env.render(0, 48).std() > 5


def test_a_fallen_cube_and_a_nan_cut_their_own_gradient_alone():
    grads = []
    for trouble in ("", "falls", "nan"):
        env, acts = hand(seed=2), []
        for k in range(4):
            acts.append(torch.full((2, 16), 0.3 * k - 0.4).requires_grad_())
            if trouble and k == 1:
                # Its square is no float.
                name, change = ("p", -1.0) if trouble == "falls" else ("w", 1e30)
                shift = torch.zeros(2, 3)
                shift[0, 2] = change
                env.state = {**env.state, name: env.state[name] + shift}
            obs, rewards, terminations, truncations, info = env.step(acts[-1])
            assert terminations.tolist() == [trouble == "falls" and k == 1, False]
            nan = [trouble == "nan" and k == 1, False]
            assert truncations.tolist() == info["nan"].tolist() == nan
            assert all(
                t.isfinite().all() for t in (obs["state"], rewards, info["final_obs"]["state"])
            )
        assert int(env.nan_resets) == (trouble == "nan")
        grads.append(torch.stack(torch.autograd.grad(rewards.sum() + obs["state"].sum(), acts)))
    for free, cut in ((grads[0], grads[1]), (grads[0], grads[2])):
        assert torch.equal(free[:, 1], cut[:, 1]) and (free.norm(dim=-1) > 0).all()
        assert (cut[:2, 0] == 0).all() and (cut[2:, 0].norm(dim=-1) > 0).all()
        assert cut.isfinite().all()


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
    assert lines[0].startswith("task,what,environments,env_steps_per_second")
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
