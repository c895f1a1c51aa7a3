"""Articulated rigid bodies: free fall, spin, hinges and contact against closed forms; gradients; AntRun."""

import math

import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[so101]"')
from envs import rewarped  # noqa: E402
from envs.rewarped.rigid import Body, Hinge, Rigid, Sphere, Springs, about, multiply, rotate  # noqa: E402

D = torch.float64


def quiet(n, b):
    """Bodies at the origin, at rest."""
    q = torch.zeros(n, b, 4, dtype=D)
    q[..., 3] = 1
    return [torch.zeros(n, b, 3, dtype=D), q, torch.zeros(n, b, 3, dtype=D), torch.zeros(n, b, 3, dtype=D)]


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
    assert v1[..., 1].allclose(torch.tensor(-9.8 * t, dtype=D)) and (p1[..., 1] + 4.9 * t * (t + dt)).abs().max() < 1e-9
    assert w1[0, 0].allclose(w[0, 0])
    # The angle of a spin by increments of dt w / 2, normalised, is off by (dt w)^3 / 12 each.
    assert q1[0, 0].allclose(about(torch.tensor((0.0, 1.0, 0.0), dtype=D), torch.tensor(3.0 * t, dtype=D)), atol=1e-7)

    def momentum(q, w):
        return rotate(q, moments * rotate(q * torch.tensor((-1.0, -1.0, -1.0, 1.0), dtype=D), w))

    assert (momentum(q1[1], w1[1]) - momentum(q[1], w[1])).norm() < 1e-3
    assert (w1[1] - w[1]).norm() > 0.1


def test_a_motor_against_the_parallel_axis_theorem():
    """A rod on a very heavy body: angular acceleration torque / (I + m l^2), joint held together."""
    mass, across, length = 2.0, 0.1, 0.5
    free = Springs(damping=0.0)
    sim = Rigid(1, [Body(1e9, (1e9,) * 3), Body(mass, (0.01, across, across))],
                [Hinge(0, 1, (0.0, 0.0, 0.0), (-length, 0.0, 0.0), (0.0, 0.0, 1.0))], [], dt=1 / 4800, substeps=480,
                springs=free, gravity=0.0, dtype=D)  # fmt: skip
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
    sim = Rigid(1, [Body(1.0, (0.1,) * 3)], [], [Sphere(0, (0.0, 0.0, 0.0), 0.2)], dt=1 / 960, substeps=2000, dtype=D,
                springs=Springs(ground_kd=40.0))  # fmt: skip
    p, q, v, w = quiet(1, 1)
    p[..., 1] = 0.25
    p, _, v, _ = sim.step(p, q, v, w, torch.zeros(1, 1, dtype=D))
    assert abs(float(p[0, 0, 1]) - (0.2 - 9.8 / 4e3)) < 1e-5 and v.norm() < 1e-3
    limited = Rigid(1, [Body(1e9, (1e9,) * 3), Body(1.0, (0.1,) * 3)],
                    [Hinge(0, 1, (0.0,) * 3, (0.0,) * 3, (0.0, 1.0, 0.0), high=0.3)], [], dt=1 / 960, substeps=2000,
                    gravity=0.0, dtype=D)  # fmt: skip
    _, q, _, w = limited.step(*quiet(1, 2), torch.full((1, 1), 20.0, dtype=D))
    assert abs(float(limited.angles(q, w)[0]) - (0.3 + 20.0 / 1e3)) < 1e-3  # the limit is a spring of 1000 N m / rad


def ant(dtype=D, **options):
    return rewarped.make("AntRun", 2, "cpu", **({"seed": 1, "size": "small", "graph": False, "dtype": dtype} | options))


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


@pytest.mark.parametrize("low, steps", [(0.5, 1), (0.5, 3), (2.0, 3)], ids=["contact", "window in contact", "in air"])
def test_gradients_against_central_differences(low, steps):
    env = ant()
    sim, tensors, g = env.sim, scene(env, low), torch.Generator().manual_seed(4)
    assert ((scene(env, low)[0][..., 1] < 0.3).any()) == (low < 1), "in contact, or not"
    for i, grad in enumerate(gradient(sim, tensors, steps)):
        d = torch.randn(tensors[i].shape, generator=g, dtype=D)
        d, errors = d / d.norm() + 2 * grad / grad.norm(), []
        for eps in (1e-6, 1e-7, 1e-5 if i == 4 else 1e-8):
            with torch.no_grad():
                up, down = (run(sim, [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]], steps)
                            for s in (1, -1))  # fmt: skip
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
        assert all(torch.equal(a, b) for a, b in zip(gradient(graphs, tensors, 2), exact, strict=True))


def test_antrun_begins_and_stays_in_one_piece():
    env = ant(torch.float32)
    angles, rates = env.sim.angles(env.state["q"], env.state["w"])
    assert ((angles - torch.tensor((0.0, 1.0) * 4)).abs() <= 0.2001).all() and (rates.abs() <= 0.2501).all()
    for part in range(2):
        for h in env.sim.hinges:  # both bodies of a hinge agree where its anchor is, and how it moves
            ends = []
            for b, anchor in ((h.parent, h.anchor_a), (h.child, h.anchor_b)):
                arm = rotate(env.state["q"][:, b], torch.tensor(anchor))
                ends.append((env.state["p"][:, b] + arm,
                             env.state["v"][:, b] + torch.cross(env.state["w"][:, b], arm, dim=-1)))  # fmt: skip
            assert (ends[0][0] - ends[1][0]).norm(dim=-1).max() < 0.01 and (ends[0][1] - ends[1][1]).norm() < 0.2
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
            if falls and k == 2:  # between steps, world 0 is put down so low that it terminates
                env.state = {**env.state, "p": env.state["p"] - torch.tensor([[[0.0, 0.6, 0.0]], [[0.0] * 3]])}
            _, r, terminations, _, _ = env.step(acts[-1])
            assert terminations.tolist() == [falls and k == 2, False]
            rewards.append(r)
        grads.append(torch.stack(torch.autograd.grad(rewards[-1].sum(), acts)))
    assert torch.equal(grads[0][:, 1], grads[1][:, 1]) and (grads[0][:, 1].norm(dim=-1) > 0).all()
    assert (grads[1][:3, 0] == 0).all() and (grads[1][3:, 0].norm(dim=-1) > 0).all()


# --- The scripts ------------------------------------------------------------------------------------------------------
def test_pictures_and_throughput_are_written_and_wrong_choices_named(tmp_path, monkeypatch, capsys):
    import picture_rewarped
    from conftest import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import throughput_rewarped

    out = tmp_path / "pictures"
    assert picture_rewarped.main(picture_rewarped.Args(tasks=("AntRun",), size="small", steps=2, out=out)) == 0
    assert (out / "AntRun.png").read_bytes().startswith(b"\x89PNG")
    table = throughput_rewarped.Args("AntRun", "small", (1,), 1, 1, out=tmp_path / "table.csv")
    assert throughput_rewarped.main(table) == 0
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith("task,what,worlds,env_steps_per_second")
    assert [line.startswith('"AntRun, small",forward') for line in lines[-3:]] == [False, True, True]
    capsys.readouterr()
    assert picture_rewarped.main(picture_rewarped.Args(tasks=("AntWalk",))) == 2
    assert throughput_rewarped.main(throughput_rewarped.Args("AntWalk")) == 2
    assert throughput_rewarped.main(throughput_rewarped.Args(window=0)) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "--tasks", "--task AntWalk", "--num-envs, --window, --repeats"]  # fmt: skip
