"""The differentiable particles: free fall, colliders, gradients against differences, the tasks on them."""

import math

import pytest
import torch

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
from envs import rewarped  # noqa: E402
from envs.rewarped import mpm  # noqa: E402
from envs.rewarped.kinematics import Joint, Shape, Tree, turn_to  # noqa: E402

D = torch.float64
COLLIDERS = [(mpm.CAPSULE, (0.1, 0.06)), (mpm.BOX, (0.05, 0.04, 0.06))]
each_material = pytest.mark.parametrize("material", mpm.MATERIALS)


def simulation(material, n=2, particles=27, colliders=True, **options):
    """A simulation in float64 that is small, stiff and in contact."""
    options = (
        dict(
            grid=16,
            dt=2e-4,
            substeps=3,
            young=1000.0,
            poisson=0.3,
            yield_stress=20.0,
            gravity=-10.0,
            friction=0.5,
            ground_friction=0.3,
            dtype=D,
            colliders=COLLIDERS if colliders else (),
        )
        | options
    )
    return mpm.MPM(n, particles, material=material, **options)


def scene(material, n=2, particles=27, substeps=3, seed=1):
    """Deformed particles on the move, and colliders in their midst: all tensors that a step depends on."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=D)

    x = torch.rand(n, particles, 3, generator=g, dtype=D) * 0.2 + torch.tensor(
        (0.25, 0.17, 0.25), dtype=D
    )
    F = torch.eye(3, dtype=D) + 0.05 * randn(n, particles, 3, 3)
    if material == "fluid":  # its F is diag(J, 1, 1)
        J = F[..., 0, 0]
        F = torch.diag_embed(torch.stack((J, torch.ones_like(J), torch.ones_like(J)), -1))
    base = torch.tensor([[0.3, 0.45, 0.35], [0.5, 0.3, 0.35]], dtype=D).expand(substeps, n, 2, 3)
    turn = torch.linalg.qr(torch.eye(3, dtype=D) + 0.2 * randn(substeps, n, 2, 3, 3)).Q
    return [
        x,
        randn(n, particles, 3),
        3 * randn(n, particles, 3, 3),
        F,
        base + 0.02 * randn(substeps, n, 2, 3),
        turn,
        randn(substeps, n, 2, 3),
        randn(substeps, n, 2, 3),
    ]


def run(sim, tensors, steps, weights):
    """A number that depends on everything after `steps` steps."""
    particles, poses = mpm.Particles(*tensors[:4]), mpm.Poses(*tensors[4:]) if sim.kinds else None
    for _ in range(steps):
        particles = sim.step(particles, poses)
    return sum((a * b).sum() for a, b in zip(particles, weights, strict=True))


def weights_like(tensors, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=g, dtype=D).to(t.dtype) for t in tensors[:4]]


def gradient(sim, tensors, steps, weights=None):
    leaves = [t.clone().requires_grad_() for t in tensors[: 8 if sim.kinds else 4]]
    run(sim, leaves, steps, weights or weights_like(tensors)).backward()
    sim.detach()
    return [leaf.grad for leaf in leaves]


# --- Particles (tests/test_rewarped_physics.py has more) --------------------------------------------------------------
def test_free_fall():
    sim = simulation("elastic", colliders=False, substeps=50)
    start = mpm.at_rest(scene("elastic")[0] + torch.tensor((0.0, 0.2, 0.0), dtype=D))
    end, t = sim.step(start), 50 * 2e-4
    assert end.v[..., 1].allclose(torch.tensor(-10.0 * t, dtype=D), rtol=1e-9)
    # The velocity is updated before the position: half a substep more than g t^2 / 2.
    assert (end.x - start.x)[..., 1].allclose(
        torch.tensor(-5.0 * t * (t + 2e-4), dtype=D), rtol=1e-8
    )


def block(counts, spacing, bottom, centre=0.5, dtype=D):
    """Points (1, P, 3) of a block with this bottom."""
    x, y, z = (torch.arange(n, dtype=D) + 0.5 for n in counts)
    points = torch.cartesian_prod(x - counts[0] / 2, y, z - counts[2] / 2) * spacing
    return (points + torch.tensor((centre, bottom, centre)))[None].to(dtype)


def test_a_collider_carries_along_what_it_touches_and_friction_is_coulombs():
    """A box moves sideways under a block: without friction it slides away below it, with much it takes it along."""
    speeds = []
    for friction in (0.0, 5.0):
        sim = mpm.MPM(
            1,
            64,
            material="elastic",
            grid=16,
            dt=2e-4,
            substeps=40,
            young=2000.0,
            poisson=0.3,
            gravity=-10.0,
            friction=friction,
            colliders=[(mpm.BOX, (0.2, 0.1, 0.2))],
        )
        p = mpm.at_rest(block((4, 4, 4), 1 / 32, 0.475, dtype=torch.float32))
        for step in range(6):
            k = (
                (torch.arange(40) + 40 * step)[:, None, None, None]
                * sim.dt
                * torch.tensor((0.5, 0.0, 0.0))
            )
            vel = torch.tensor((0.5, 0.0, 0.0)).expand(40, 1, 1, 3)
            eye = torch.eye(3).expand(40, 1, 1, 3, 3)
            p = sim.step(
                p, mpm.Poses(k + torch.tensor((0.45, 0.36, 0.5)), eye, vel, torch.zeros_like(vel))
            )
        assert abs(p.v[..., 1].mean()) < 0.15, "the box holds it up"
        speeds.append(float(p.v[..., 0].mean()))
    assert abs(speeds[0]) < 0.02 and 0.3 < speeds[1] < 0.55


# --- Gradients --------------------------------------------------------------------------------------------------------
@each_material
@pytest.mark.parametrize("steps", [1, 4], ids=["one step", "a window of steps, each a checkpoint"])
def test_gradients_against_central_differences(material, steps):
    """In contact with two colliders and, by its friction, the floor; every input, float64."""
    tensors, weights = scene(material), weights_like(scene(material))
    sim = simulation(material)
    grads, g = gradient(sim, tensors, steps), torch.Generator().manual_seed(5)
    for i, grad in enumerate(grads):
        d = torch.randn(tensors[i].shape, generator=g, dtype=D)
        if material == "fluid" and i == 3:
            d[..., 1:], d[..., 1:, :] = 0, 0
        # A direction with a good part along the gradient, so that the difference is not only rounding.
        d = d / d.norm() + (2 * grad / grad.norm() if grad.norm() > 0 else 0)
        errors = []
        for eps in (1e-5, 1e-6, 1e-7):  # rounding differs between processors
            with torch.no_grad():
                up, down = (
                    run(
                        sim,
                        [*tensors[:i], tensors[i] + s * eps * d, *tensors[i + 1 :]],
                        steps,
                        weights,
                    )
                    for s in (1, -1)
                )
            found, expected = (grad * d).sum(), (up - down) / (2 * eps)
            errors.append(float(abs(found - expected) / abs(expected)))
        assert min(errors) < 1e-6, (i, errors)
        assert grad.norm() > 0


@each_material
def test_float32_adjoint_agrees_with_float64(material):
    tensors, exact = scene(material), None
    for dtype in (D, torch.float32):
        grads = gradient(simulation(material, dtype=dtype), [t.to(dtype) for t in tensors], 2)
        exact = exact or grads
    for a, b in zip(grads, exact, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


@each_material
def test_checkpointing_and_graphs_change_nothing(material):
    tensors, weights = scene(material), weights_like(scene(material))
    plain, values = None, []
    for options in (
        dict(checkpoint=False),
        dict(),
        dict(graph=True),
        dict(checkpoint=False, graph=True),
    ):
        sim = simulation(material, **options)
        for _ in range(2):  # the second time from replayed graphs
            grads = gradient(sim, tensors, 3, weights)
        plain = plain or grads
        values.append(float(run(sim, tensors, 3, weights)))
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True)), options
    assert len(set(values)) == 1


@each_material
def test_one_environment_is_the_same_in_a_batch(material):
    tensors, weights = scene(material, n=3), weights_like(scene(material, n=3))
    batch = gradient(simulation(material, n=3), tensors, 2, weights)
    for n in range(3):
        own = [t[n : n + 1] if i < 4 else t[:, n : n + 1] for i, t in enumerate(tensors)]
        alone = gradient(simulation(material, n=1), own, 2, [w[n : n + 1] for w in weights])
        for i, (a, b) in enumerate(zip(alone, batch, strict=True)):
            assert torch.equal(a, b[n : n + 1] if i < 4 else b[:, n : n + 1])


@pytest.mark.parametrize(
    "sigma", [(1.0, 1.0, 1.0), (1.1, 1.1, 0.9), (1.2, 1.0, 1.0), (1.0, 1.0, 1.0 + 1e-9)]
)
@pytest.mark.parametrize("stress", [5.0, 1e6], ids=["flows", "elastic"])
def test_gradient_at_equal_singular_values(sigma, stress):
    """Where svd's own adjoint divides by zero. One particle, F turned, and C such that F itself is the trial."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=D)).Q for _ in range(2))
    U, V = U * torch.linalg.det(U), V * torch.linalg.det(V)
    F = (U @ torch.diag(torch.tensor(sigma, dtype=D)) @ V.T)[None, None]
    sim = simulation(
        "plasticine",
        n=1,
        particles=1,
        colliders=False,
        substeps=1,
        yield_stress=stress,
        gravity=0.0,
    )
    x = torch.full((1, 1, 3), 0.53, dtype=D)
    tensors = [x, torch.zeros_like(x), torch.zeros_like(F), F]
    weights = [torch.randn(t.shape, generator=g, dtype=D) for t in tensors]
    grad = gradient(sim, tensors, 1, weights)[3]
    assert grad.isfinite().all()
    if stress > 100 or sigma != (
        1.0,
        1.0,
        1.0,
    ):  # at F = I the yield surface is far: elastic there too
        for k in range(9):
            d = torch.zeros(9, dtype=D)
            d[k] = 1e-6
            d = d.view(1, 1, 3, 3)
            up, down = (run(sim, [*tensors[:3], F + s * d], 1, weights) for s in (1, -1))
            assert abs(float(grad.flatten()[k]) - float(up - down) / 2e-6) < 1e-6 * float(
                grad.norm()
            )


def test_an_environment_that_blew_up_has_no_gradient_and_harms_no_other():
    tensors, weights = scene("elastic"), weights_like(scene("elastic"))
    sim = simulation("elastic")
    healthy = gradient(sim, tensors, 1, weights)
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0, 0] = torch.nan
    grads = gradient(sim, tensors, 1, [w.clone() for w in weights])
    assert int(sim.bad_gradients) == 1
    for i, (a, b) in enumerate(zip(grads, healthy, strict=True)):
        dead, other = (a[0], a[1]) if i < 4 else (a[:, 0], a[:, 1])
        assert (dead == 0).all() and torch.equal(other, b[1] if i < 4 else b[:, 1])


def test_late_backward_is_refused():
    sim, tensors = simulation("fluid", checkpoint=False, window=2), scene("fluid")
    leaves = [t.clone().requires_grad_() for t in tensors]
    late = run(sim, leaves, 1, weights_like(tensors))
    sim.detach()
    run(sim, leaves, 1, weights_like(tensors))
    with pytest.raises(RuntimeError, match="after detach"):
        late.backward()
    with pytest.raises(RuntimeError, match="window=2"):
        run(sim, leaves, 2, weights_like(tensors))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(material="honey"), "known are"),
        (dict(grid=8), "at least 9"),
        (dict(dt=0.0), "above 0"),
        (dict(poisson=0.5), "between"),
        (dict(substeps=0), "at least 1"),
    ],
)
def test_impossible_simulations_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        simulation(**(dict(material="elastic") | options))
    assert "\n" not in str(error.value)


# --- Kinematics -------------------------------------------------------------------------------------------------------
def test_a_tree_against_closed_forms():
    """A slider that carries a double pendulum; speeds against differences of positions."""
    joints = [
        Joint("s", -1, "slide", (0.1, 0.2, 0.3), (1.0, 0.0, 0.0), -1, 1),
        Joint("a", 0, "hinge", (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), -3, 3),
        Joint("b", 1, "hinge", (0.5, 0.0, 0.0), (0.0, 0.0, 1.0), -3, 3),
    ]
    shapes = [Shape(2, mpm.CAPSULE, (0.1, 0.02), (0.25, 0.0, 0.0), turn_to((1.0, 0.0, 0.0)))]
    tree = Tree(joints, shapes, dtype=D)
    q, qd = torch.tensor([0.2, 0.7, -0.4], dtype=D), torch.tensor([0.3, -0.5, 1.1], dtype=D)
    pose = tree(q, qd)
    x = 0.1 + 0.2 + 0.5 * math.cos(0.7) + 0.25 * math.cos(0.3)
    y = 0.2 + 0.5 * math.sin(0.7) + 0.25 * math.sin(0.3)
    assert pose.pos[0].allclose(torch.tensor([x, y, 0.3], dtype=D), rtol=1e-12)
    axis = pose.rot[0] @ torch.tensor([0.0, 1.0, 0.0], dtype=D)
    assert axis.allclose(torch.tensor([math.cos(0.3), math.sin(0.3), 0.0], dtype=D), atol=1e-12)
    ahead, behind = (tree(q + s * 1e-6 * qd, qd).pos for s in (1, -1))
    assert pose.vel.allclose((ahead - behind) / 2e-6, atol=1e-9)
    assert pose.omega[0].allclose(torch.tensor([0.0, 0.0, -0.5 + 1.1], dtype=D))


# --- Tasks ------------------------------------------------------------------------------------------------------------
def make(env_id, n=2, **options):
    return rewarped.make(
        env_id, n, "cpu", **({"seed": 0, "size": "small", "graph": False} | options)
    )


def actions(env, seed=0):
    return (
        torch.rand(env.num_envs, env.action_dim, generator=torch.Generator().manual_seed(seed)) * 2
        - 1
    )


@pytest.mark.parametrize("env_id", ["RollingFlat", "FluidMove", "HandFlip"])
def test_contract(env_id):
    env = make(env_id, 3)
    action = actions(env).requires_grad_()
    obs, rewards, terminations, truncations, info = env.step(action)
    assert {name: tuple(v.shape[1:]) for name, v in obs.items()} == env.obs_dims
    assert rewards.shape == (3,) and rewards.isfinite().all() and rewards.dtype == torch.float32
    assert not (terminations | truncations | info["nan"]).any()
    (rewards.sum() + obs["state"].sum()).backward()
    assert (
        action.grad.isfinite().all() and (action.grad != 0).any(1).all()
    )  # a joint at its limit has none
    image = env.render(0, size=48)
    assert image.shape == (48, 48, 3) and image.dtype.name == "uint8" and image.std() > 5


def test_a_reset_cuts_its_own_gradient_and_nobody_elses():
    """Environment 0 is reset within the window: what 1 earns later depends on its first action as if nothing was."""
    grads = []
    for ends in (False, True):
        env = make("FluidMove", seed=3)
        env.clock[0] = env.max_episode_steps - 3 if ends else 0
        acts, rewards = [], []
        for k in range(5):
            acts.append(actions(env, k).requires_grad_())
            obs, r, _, truncations, info = env.step(acts[-1])
            rewards.append(r)
            assert bool(truncations[0]) == (ends and k == 2) and not truncations[1]
            if truncations[
                0
            ]:  # the last observation has a gradient, that of the new episode has none
                last = torch.autograd.grad(
                    info["final_obs"]["state"][0].sum(), acts[-1], retain_graph=True
                )[0]
                new = torch.autograd.grad(
                    obs["state"][0].sum(), acts[-1], retain_graph=True, allow_unused=True
                )[0]
                assert (last[0] != 0).any() and (new is None or (new[0] == 0).all())
                assert not info["final_obs"]["state"][0].equal(obs["state"][0])
                assert info["episode"]["length"][0] == env.max_episode_steps
        grads.append(torch.stack(torch.autograd.grad(rewards[-1].sum(), acts)))
    free, cut = grads
    assert torch.equal(free[:, 1], cut[:, 1]) and (free[:, 1].norm(dim=-1) > 0).all()
    assert (
        (free[:3, 0].norm(dim=-1) > 0).all()
        and (cut[:3, 0] == 0).all()
        and (cut[3:, 0].norm(dim=-1) > 0).all()
    )


def test_the_box_holds_the_water():
    """Lifted and moved for 30 steps; a wall that leaks would have lost most of it by then."""
    env = make("FluidMove", 1)
    with torch.no_grad():
        for k in range(30):
            env.step(torch.tensor([[0.5, 0.5, -0.5]]) if k < 15 else torch.zeros(1, 3))
    box, inner = env.state["joints"], torch.tensor(env.s["box"]) / 2
    out = (env.state["x"] - box[:, None]).abs() - inner
    assert (out[..., [0, 2]] < env.sim.dx).all()
    assert (env.state["x"][..., 1] > box[:, 1] - inner[1] - env.sim.dx).all()


def test_detach_begins_a_window():
    env = make("FluidMove", 1)
    first = actions(env).requires_grad_()
    env.step(first)
    env.detach()
    second = actions(env, 1).requires_grad_()
    reward = env.step(second)[1].sum()
    assert torch.autograd.grad(reward, first, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(reward, second)[0].norm() > 0


def test_nan_resets_one_environment_alone():
    grads = []
    for poisoned in (False, True):
        env = make("FluidMove", seed=2)
        before = actions(env).requires_grad_()
        env.step(before)
        if poisoned:
            v = env.state["v"].clone()
            v[0, 0, 0] = torch.nan
            env.state["v"] = v
        last = env.obs
        obs, rewards, terminations, truncations, info = env.step(actions(env, 1))
        if poisoned:
            assert (
                info["nan"].tolist() == [True, False] == truncations.tolist()
                and not terminations.any()
            )
            assert int(env.nan_resets) == 1 and rewards[0] == 0
            assert torch.equal(info["final_obs"]["state"][0], last["state"][0])
        assert all(value.isfinite().all() for value in obs.values())
        grads.append(
            torch.autograd.grad(rewards.sum() + info["final_obs"]["state"].sum(), before)[0]
        )
    assert torch.equal(grads[0][1], grads[1][1]) and (grads[1][0] == 0).all()


def test_the_same_seed_and_a_saved_state_give_the_same_future(tmp_path):
    env, twin = make("FluidMove", seed=7, stagger=True), make("FluidMove", seed=8, stagger=True)
    assert torch.equal(env.reset(5)["state"], twin.reset(5)["state"])
    env.step(actions(env))
    torch.save(env.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)  # tensors and plain values only
    env.clock[1] = saved["clock"][1] = (
        env.max_episode_steps - 1
    )  # the next step draws a new episode
    futures = []
    for one in (env, twin):
        if one is twin:
            one.load_state_dict(saved)
        with torch.no_grad():
            out = one.step(actions(one, 1))
        assert out[3].tolist() == [False, True]
        futures.append(torch.cat([out[0]["points"].flatten(), out[1]]))
    assert torch.equal(*futures)
    with pytest.raises(ValueError, match="num_envs"):
        make("FluidMove", 1).load_state_dict(saved)
    with pytest.raises(ValueError, match="dtype 'torch.float32', this one 'torch.float64'"):
        make("FluidMove", dtype=D).load_state_dict(saved)


def test_mended_rewards_by_hand():
    env = make("RollingFlat", 1)
    x = torch.zeros(1, env.sim.num_particles, 3)
    x[..., 1] = env.floor
    x[:, ::10, 1] += 0.02
    h = x[0, env.observed, 1] - env.floor
    d = float(h.mean()) / 0.0625
    bonus = 1 + 1 / (1 + math.exp(-(0.33 - d) / 0.05))
    expected = (1 / (1 + d)) ** 2 * bonus - float(h.var())
    assert float(env.reward({"x": x}, None)[0]) == pytest.approx(expected, rel=1e-4)
    flip = make("HandFlip", 1)
    state = flip.state
    assert float(flip.reward(state, None)[0]) == pytest.approx(0.0, abs=1e-6)
    folded = state["x"].clone()
    half = folded.shape[1] // 2
    folded[:, half:] = folded[:, :half]
    assert float(flip.reward({**state, "x": folded}, None)[0]) == pytest.approx(1.0, abs=1e-3)


def test_paper_spill_is_a_step_and_the_mended_one_has_a_gradient():
    slopes = []
    for reward in ("paper", "default"):
        env = make("FluidMove", 1, reward=reward)
        x = env.state["x"].clone()
        x[0, 0, 0] = env.state["joints"][0, 0] + env.outer[0] + 0.005  # one is out by 5 mm
        x.requires_grad_()
        far = {**env.state, "x": x, "target": env.state["target"] + 10.0}  # too far to matter
        slopes.append(float(torch.autograd.grad(env.reward(far, None)[0].sum(), x)[0][0, 0, 0]))
    assert abs(slopes[0]) < 1e-4 and slopes[1] < -0.05, slopes


def test_paper_flip_takes_its_first_distance_after_a_step():
    env = make("HandFlip", 1, reward="paper")
    env.state["x"] = env.state["x"] - torch.tensor((0.0, 0.09, 0.0))  # into the palm
    assert float(env.step(actions(env))[1]) == 0.0
    assert float(env.step(actions(env, 1))[1]) != 0.0


def test_ids_and_options_are_named_in_one_line():
    for call, message in (
        (lambda: rewarped.make("AntWalk", 1), "unknown: there are"),
        (lambda: make("FluidMove", 0), "at least 1"),
        (lambda: make("FluidMove", reward="best"), "default or paper"),
        (lambda: make("FluidMove", size="tiny"), "full or small"),
        (lambda: make("FluidMove").step(torch.zeros(2, 4)), "expected"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
