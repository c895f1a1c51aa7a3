"""SAPO: returns, targets and entropy against long forms and hand values, gradients, presets, runs on a tiny world."""

import copy
import csv
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import sapo_rewarped as sr
import torch
from fake_env_diff import PointMass

SCRIPT = Path(sr.__file__)
CPU = torch.device("cpu")
SHAPES = dict(state=4, points=0, action=2, plan=0)
OFF = dict(entropy_in_return=False, entropy_in_value=False, autotune=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(algo="sapo", **changes) -> sr.Args:
    """A small run on the CPU, for PointMass, whose `env_id` lists its options."""
    values = dict(algo=algo, env_id="Fake", device="cpu", num_envs=4, eval_episodes=4, horizon=8,
                  total_timesteps=96, eval_freq=64, critic_epochs=2, actor_units=(16,), critic_units=(16,),
                  capture_video=False)
    return sr.Args(**values | sr.PRESETS[algo] | changes)


def make_fakes(args, device):
    options = dict(points="points" in args.env_id, bouncy="bouncy" in args.env_id, horizon=20)
    nan = (5, 30) if "nan" in args.env_id else ()
    return (PointMass(args.num_envs, seed=args.seed, nan=nan, **options),
            PointMass(args.eval_episodes, seed=sr.EVAL_SEED, **options))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on PointMass, with runs/ in a temporary folder."""
    monkeypatch.setattr(sr, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_agent(args, points=0, seed=0) -> sr.Agent:
    torch.manual_seed(seed)
    return sr.Agent(args, SHAPES | dict(points=points), CPU)


def play(agent, env, args, seed=0) -> tuple[dict, sr.Probe]:
    probe = sr.Probe(CPU)
    window, _ = sr.rollout(agent, env, env._observe(env.state), args, generator(seed), probe)
    return window, probe


def random_window(seed=0, steps=7, worlds=50):
    """rewards, values, terminations, truncations (T, N); values are 0 after a true end, as bootstrap makes them."""
    g = generator(seed)
    rewards, values = (torch.randn((steps, worlds), generator=g, dtype=torch.float64) for _ in range(2))
    draw = torch.rand((steps, worlds), generator=g)
    terminations, truncations = draw < 0.15, (draw > 0.1) & (draw < 0.3)  # some are both
    return rewards, values * ~terminations, terminations, truncations


def segments(dones) -> list[tuple[int, int, int]]:
    """(world, first step, number of steps) of every segment of a window."""
    found = []
    for n in range(dones.shape[1]):
        first = 0
        for t in range(len(dones)):
            if dones[t, n] or t == len(dones) - 1:
                found.append((n, first, t + 1 - first))
                first = t + 1
    return found


# --- Returns and targets ----------------------------------------------------------------------------------------------
def test_td_lambda_by_hand():
    """gamma 0.5, lambda 0.5; worlds: no end, true end after step 1, time-out after step 0."""
    rewards = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    values = torch.tensor([[4.0, 4.0, 4.0], [6.0, 0.0, 6.0], [8.0, 8.0, 8.0]])
    dones = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
    targets = sr.td_lambda(rewards, values, dones, 0.5, 0.5)
    # last step: 3 + 0.5 x 8 = 7. Before it: 2 + 0.5 (0.5 x 6 + 0.5 x 7) = 5.25; with the end: 2 + 0.5 x 0 = 2.
    # first: 1 + 0.5 (0.5 x 4 + 0.5 x 5.25) = 3.3125; 1 + 0.5 (0.5 x 4 + 0.5 x 2) = 2.5; time-out: 1 + 0.5 x 4 = 3.
    assert targets.tolist() == [[3.3125, 2.5, 3.0], [5.25, 2.0, 5.25], [7.0, 7.0, 7.0]]


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95, 1.0])
def test_td_lambda_is_the_long_form(lam, gamma=0.9):
    """The weighted sum of all n-step returns up to the segment's end, step by step."""
    rewards, values, terminations, truncations = random_window()
    dones = terminations | truncations
    expected = torch.zeros_like(rewards)
    for n, first, length in segments(dones):
        for t in range(first, first + length):
            left = first + length - t
            n_step = [sum(gamma**k * rewards[t + k, n] for k in range(m)) + gamma**m * values[t + m - 1, n]
                      for m in range(1, left + 1)]
            weights = [(1 - lam) * lam ** (m - 1) for m in range(1, left)] + [lam ** (left - 1)]
            assert math.isclose(sum(weights), 1)
            expected[t, n] = sum(w * g for w, g in zip(weights, n_step, strict=True))
    torch.testing.assert_close(sr.td_lambda(rewards, values, dones, gamma, lam), expected)


def test_objective_adds_the_segments_up(gamma=0.9):
    rewards, values, terminations, truncations = random_window(1)
    dones, total = terminations | truncations, 0.0
    for n, first, length in segments(dones):
        total += sum(gamma**k * rewards[first + k, n] for k in range(length))
        total += gamma**length * values[first + length - 1, n]
    assert len(segments(dones)) > 80
    torch.testing.assert_close(sr.objective(rewards, values, dones, gamma), total / rewards.numel())


def test_value_follows_time_outs_and_the_window_but_no_true_end():
    agent = new_agent(arguments())
    state = torch.randn((3, 4, 4), generator=generator())
    no = torch.zeros((3, 4), dtype=torch.bool)
    terminations, truncations = no.clone(), no.clone()
    terminations[2, 1] = terminations[0, 2] = truncations[1, 3] = truncations[0, 2] = True
    window = dict(next_obs={"state": state}, rewards=torch.zeros(3, 4),
                  terminations=terminations, truncations=truncations)
    values = agent.critic({"state": state}).mean(0)
    expected = torch.zeros(3, 4)
    for t, n in [(2, 0), (2, 2), (2, 3), (1, 3)]:  # world 2 ended truly and by time at once: true counts
        expected[t, n] = values[t, n]
    torch.testing.assert_close(sr.bootstrap(agent.critic, window), expected)
    assert sr.bootstrap(None, window).abs().sum() == 0


def test_parity_takes_the_state_before_the_step_except_after_a_time_out():
    args = arguments(horizon=3)
    agent = new_agent(args)
    right, early = (play(agent, PointMass(4, horizon=2), replace(args, parity=p))[0] for p in (False, True))
    for t, place in enumerate(("obs", "next_obs", "obs")):  # all worlds' time is out after the second step
        assert torch.equal(early["next_obs"]["state"][t], right[place]["state"][t])
    assert not torch.equal(right["obs"]["state"], right["next_obs"]["state"]) and right["truncations"][1].all()


def test_critic_targets_take_the_smallest_value_and_the_soft_reward():
    args = arguments(horizon=6, gamma=0.9)
    agent = new_agent(args)
    agent.log_alpha.data.fill_(math.log(0.3))
    window, _ = play(agent, PointMass(4, horizon=4), args)
    assert window["truncations"].any() and window["entropies"].abs().min() > 0
    both = agent.critic(window["next_obs"])
    assert (both[0] != both[1]).all()
    values = both.amin(0) * ~window["terminations"]
    rewards = window["rewards"] + 0.3 * (window["entropies"] + 1) / 2  # |H| = 2 / 2
    dones = window["terminations"] | window["truncations"]
    expected = sr.td_lambda(rewards, values, dones, 0.9, 0.95)
    torch.testing.assert_close(sr.critic_targets(agent, window, args), expected.detach())
    hard = sr.td_lambda(window["rewards"], values, dones, 0.9, 0.95)
    torch.testing.assert_close(sr.critic_targets(agent, window, replace(args, entropy_in_value=False)), hard.detach())
    window["terminations"][2, 1] = window["dones"][2, 1] = True  # after a true end there is nothing but the reward
    assert values[2, 1].abs() > 0.01
    torch.testing.assert_close(sr.critic_targets(agent, window, args)[2, 1], rewards[2, 1].detach())


def test_a_window_teaches_the_actor_then_alpha_then_the_critics_then_the_statistics(monkeypatch):
    """The critics' targets are of the new temperature and of the values as they were before the window."""
    args, seen = arguments(), []
    agent = new_agent(args)
    before = copy.deepcopy(agent.state_dict())

    def watched(name, plain, *given):
        seen.append((name, {key.split(".")[0] for key in differences(before, agent.state_dict())}))
        return plain(*given)

    for name in ("update_actor", "update_alpha", "critic_targets", "update_critic"):
        monkeypatch.setattr(sr, name, partial(watched, name, getattr(sr, name)))
    window, _ = play(agent, PointMass(4), args)
    sr.learn(agent, window, args, generator())
    new = {"actor", "log_alpha"}
    assert seen == [("update_actor", set()), ("update_alpha", {"actor"}), ("critic_targets", new),
                    ("update_critic", new)]
    assert {key.split(".")[0] for key in differences(before, agent.state_dict())} == new | {"critic", "norm"}


# --- Entropy ----------------------------------------------------------------------------------------------------------
def test_entropy_is_normalised_to_0_at_its_target_and_1_opposite():
    """Eight actions: |H| = 4; the last one is a uniform policy."""
    window = dict(rewards=torch.full((3,), 7.0), entropies=torch.tensor([-4.0, 4.0, 8 * math.log(2)]))
    agent = sr.Agent(arguments(), SHAPES | dict(action=8), CPU)
    soft = sr.soft_rewards(agent, window, arguments())
    torch.testing.assert_close(soft - 7, torch.tensor([0.0, 1.0, (1 + 2 * math.log(2)) / 2]))
    agent.log_alpha.data.fill_(math.log(0.5))
    torch.testing.assert_close(sr.soft_rewards(agent, window, arguments(normalize_entropy=False)) - 7,
                               window["entropies"] / 2)


def test_actions_and_entropy_estimate_are_those_of_a_squashed_normal():
    g = generator()
    mean, log_std, noise = (torch.randn(shape, generator=g, dtype=torch.float64)
                            for shape in ((5, 3), (5, 3), (2, 5, 3)))
    actions, entropies = sr.sample_actions(mean, log_std, noise)
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise[0]))
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), [torch.distributions.TanhTransform()])
    other = torch.tanh(mean + log_std.exp() * noise[1])
    torch.testing.assert_close(entropies, -squashed.log_prob(other).sum(-1))
    far = sr.sample_actions(torch.full((1, 1), 40.0), torch.zeros(1, 1), torch.zeros(2, 1, 1))[1]
    # -log pi = log std + log sqrt(2 pi) + 2 (log 2 - 40 - softplus(-80)): no infinity where tanh is 1
    assert float(far) == pytest.approx(0.5 * math.log(2 * math.pi) + 2 * (math.log(2) - 40))


def test_alpha_moves_towards_the_target_entropy():
    """The loss is alpha |H| (h - H); its gradient in log alpha is itself. Clipped at 0.5, AdamW then makes one step."""
    for mean_entropy, direction in ((0.5, -1), (-5.0, 1)):  # six actions: H = -3
        agent, args = sr.Agent(arguments(alpha=0.2), SHAPES | dict(action=6), CPU), arguments(max_grad_norm=0.0)
        agent.optimizers["alpha"].param_groups[0]["lr"] = 2.0
        metrics = sr.update_alpha(agent, torch.full((3, 4), mean_entropy), args)
        assert float(agent.log_alpha.grad) == pytest.approx(0.2 * 3 * (mean_entropy + 3))
        assert (agent.log_alpha.item() - math.log(0.2)) * direction > 1 and float(metrics["train/alpha"]) != 0.2
    agent, args = new_agent(arguments()), arguments(autotune=False)
    sr.update_alpha(agent, torch.full((3, 4), 0.5), args)
    assert float(agent.log_alpha.detach()) == 0


# --- Gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, dict(parity=True), dict(algo="shac"), dict(algo="apg")], ids=str)
def test_gradient_of_the_loss_against_finite_differences(changes, eps=1e-6):
    """Through policy, world, reset, entropy and terminal value at once, in float64."""
    args = arguments(horizon=5, **changes)
    agent = new_agent(args).double()

    def loss():
        window, _ = play(agent, PointMass(3, horizon=3, dtype=torch.float64), replace(args, num_envs=3))
        values, rewards = sr.bootstrap(agent.target or agent.critic, window), window["rewards"]
        if args.entropy_in_return:
            rewards = sr.soft_rewards(agent, window, args)
        return -sr.objective(rewards, values, window["terminations"] | window["truncations"], 0.9)

    parameters = dict(agent.actor.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(loss(), parameters.values()), strict=True))
    for name, p in parameters.items():
        i = int(grads[name].abs().argmax())
        flat, values = p.data.view(-1), []
        for shift in (eps, -2 * eps):
            flat[i] += shift
            values.append(float(loss()))
        flat[i] += eps
        assert float(grads[name].view(-1)[i]) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5), name


def test_gradients_reach_what_they_should():
    args = arguments()
    agent, env = new_agent(args, points=5), PointMass(4, points=True)
    window, probe = play(agent, env, args)
    before = copy.deepcopy(agent.state_dict())
    sr.update_actor(agent, window, args)
    moved = {k.split(".")[0] for k in differences(before, agent.state_dict())}
    assert moved == {"actor"} and all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.actor.parameters())  # its encoder too
    assert len(probe.grads) == args.horizon and env.detached == 1
    agent.actor.zero_grad(set_to_none=True)
    sr.update_critic(agent, window, sr.critic_targets(agent, window, args), args, generator())
    assert all(p.grad is None for p in agent.actor.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.critic.parameters())  # both heads and the encoder


def test_actor_learns_from_the_value_alone():
    """Rewards that are constant leave the terminal value and the entropy as the only teachers."""
    for changes, learns in ((dict(num_critics=2), True), (dict(num_critics=0), False)):
        args = arguments(**OFF, **changes)
        agent, env = new_agent(args), PointMass(4)
        window, _ = play(agent, env, args)
        window["rewards"] = window["rewards"].detach().requires_grad_() * 0 + sum(
            p.sum() * 0 for p in agent.actor.parameters())
        sr.update_actor(agent, window, args)
        assert any(p.grad.abs().sum() > 0 for p in agent.actor.parameters()) == learns


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_the_clipped_norm_includes_encoders(max_norm):
    args = arguments(max_grad_norm=max_norm)
    agent = new_agent(args, points=5)
    window, _ = play(agent, PointMass(4, points=True), args)
    window["rewards"] = window["rewards"] * 1000
    norm = sr.update_actor(agent, window, args)["train/actor_grad"]
    clipped = torch.stack([p.grad.norm() for p in agent.actor.parameters()]).norm()
    assert norm > 5 and float(clipped) == pytest.approx(0.5 if max_norm else float(norm), rel=1e-4)
    targets = 1000 * torch.randn((args.horizon, args.num_envs), generator=generator())
    norm = sr.update_critic(agent, window, targets, args, generator())["train/critic_grad"]
    last = torch.stack([p.grad.norm() for p in agent.critic.parameters()]).norm()
    assert norm > 5 and (float(last) == pytest.approx(0.5, rel=1e-4) if max_norm else last > 5)


def action_gradients(env, args, agent) -> torch.Tensor:
    """d J_i / d a (T, N, A), each world's return by itself."""
    window, probe = play(agent, env, args)
    dones = window["terminations"] | window["truncations"]
    sr.objective(window["rewards"], torch.zeros_like(window["rewards"]), dones, 1.0).backward()
    return torch.stack(probe.grads[::-1]) * window["rewards"].numel()


def test_a_reset_does_not_cut_the_other_worlds_gradients():
    """World 1 has the same gradients when world 0's episode ends amid the window, and 0's own end with the episode."""
    args = arguments("apg", horizon=6, num_envs=2)
    agent = new_agent(args)
    with_reset, without = PointMass(2), PointMass(2)
    with_reset.clock = torch.tensor([17, 0])  # of 20: world 0 ends with the third step
    cut, whole = action_gradients(with_reset, args, agent), action_gradients(without, args, agent)
    assert torch.equal(cut[:, 1], whole[:, 1]) and (cut[:, 1].norm(dim=-1) > 0).all()
    assert (cut[0, 0] != whole[0, 0]).any()
    # of world 0, step 2 still sees its own reward and nothing of the next episode
    state = with_reset._observe(with_reset.state)
    assert state["state"].shape == (2, 4)
    short = action_gradients(PointMass(2), replace(args, horizon=3), agent)
    torch.testing.assert_close(cut[:3, 0], short[:, 0])


def test_a_world_that_meets_nan_is_left_out_and_counted():
    args = arguments(horizon=6, num_envs=2)
    agent, env = new_agent(args), PointMass(2, nan=(4,))
    window, probe = play(agent, env, args)
    assert window["nan"].sum() == 1 and window["terminations"][3, 0] and window["rewards"][3, 0] == 0
    assert all(v.isfinite().all() for v in (window["rewards"], window["next_obs"]["state"]))
    healthy, reference = play(agent, PointMass(2), args)[0], sr.Probe(CPU)
    torch.testing.assert_close(window["rewards"][:, 1], healthy["rewards"][:, 1])
    metrics = sr.learn(agent, window, args, generator()) | probe.metrics()
    assert all(torch.as_tensor(v).isfinite().all() for v in metrics.values())
    assert all(v.isfinite().all() for v in agent.state_dict().values()) and not reference.grads


def test_an_absurd_observation_is_a_lost_world():
    """Beyond 1e6, in any part of the observation: no reward, no value, and no gradient of that world."""
    seen = {"state": torch.tensor([[9e5, 0.0], [0.0, -2e6], [math.nan, 0.0], [1.0, 1.0]]),
            "points": torch.tensor([[[0.0]], [[0.0]], [[0.0]], [[math.inf]]])}
    assert sr.broken(seen).tolist() == [False, True, True, True]
    args = arguments("apg", horizon=3, num_envs=2)
    agent, env = new_agent(args), PointMass(2, wall=1e9)
    env.state[0, 0] = 2e6
    window, probe = play(agent, env, args)
    assert window["terminations"][:, 0].all() and not window["terminations"][:, 1].any() and not window["nan"].any()
    assert (window["rewards"][:, 0] == 0).all() and (window["next_obs"]["state"][:, 0] == 0).all()
    sr.update_actor(agent, window, args)
    grads = torch.stack(probe.grads)
    assert (grads[:, 0] == 0).all() and (grads[:, 1].norm(dim=-1) > 0).all()


def test_a_gradient_that_is_not_finite_is_zeroed_for_its_world_alone():
    probe = sr.Probe(CPU)
    weight = torch.ones((), requires_grad=True)
    actions = weight * torch.ones(2, 3)
    rewards = (actions - torch.tensor([[1.0], [0.0]])).square().sum(-1).sqrt()  # its slope at 0 is infinite: NaN
    probe.watch(actions, rewards)
    rewards.sum().backward()
    assert float(weight.grad) == pytest.approx(math.sqrt(3))
    metrics = probe.metrics()
    assert float(metrics["train/grad_nan"]) == 0.5 and float(metrics["train/grad_world_max"]) == pytest.approx(2.0)


def test_norms_of_worlds_and_outliers_by_hand():
    probe = sr.Probe(CPU)
    grads = torch.zeros(2, 5, 2)  # two steps, five worlds
    grads[0, :, 0], grads[1, :, 1] = 0.3, 0.4
    grads[:, 4] *= 30
    probe.grads = list(grads)
    metrics = {k: float(v) for k, v in probe.metrics().items()}
    assert metrics == pytest.approx({"train/grad_world_median": 5.0, "train/grad_world_max": 150.0,
                                     "train/grad_outliers": 0.2, "train/grad_nan": 0.0})  # 0.5 x N T


def test_time_in_the_simulation_is_measured_both_ways(monkeypatch):
    args = arguments("apg", horizon=3)
    agent, env, clock = new_agent(args), PointMass(4), iter(range(1, 1000))
    monkeypatch.setattr(sr.Probe, "now", lambda self: next(clock))
    window, probe = play(agent, env, args)
    assert probe.forward == 3  # one tick between each two readings
    sr.update_actor(agent, window, args)
    assert probe.backward == 3


# --- Presets ----------------------------------------------------------------------------------------------------------
def written_out(env, agent, args, noise) -> torch.Tensor:
    """SHAC's loss as its paper has it, world by world, on plain normals with their tanh."""
    state, discount, total = env.state, torch.ones(env.num_envs), 0.0
    for t in range(args.horizon):
        x = (state - agent.norm.mean.float()) / (agent.norm.var.float() + 1e-5).sqrt()
        actions = torch.tanh(agent.actor.net({"state": x})[0] + agent.actor.log_std.exp() * noise[t])
        obs, rewards, terminations, truncations, info = env.step(actions)
        total = total + (discount * rewards).sum()
        discount, state = discount * args.gamma, obs["state"]
        done = terminations | truncations | torch.tensor(t == args.horizon - 1)
        last = info["final_obs"]["state"]
        x = (last - agent.norm.mean.float()) / (agent.norm.var.float() + 1e-5).sqrt()
        value = agent.target({"state": x})[0] * ~terminations
        total = total + torch.where(done, discount * value, 0.0).sum()
        discount = torch.where(done, 1.0, discount)
    return -total / (env.num_envs * args.horizon)


def test_shac_is_its_paper():
    """Loss and gradient of the preset, written out anew; and one target step by hand."""
    args = arguments("shac", target_decay=0.4)
    agent = new_agent(args)
    agent.norm.update(torch.randn((50, 4), generator=generator(3)) * 2 + 1)
    for p in agent.target.parameters():
        p.data += 0.05
    g, noise = generator(0), []
    for _ in range(args.horizon):
        noise.append(torch.randn((2, 4, 2), generator=g)[0])
    expected = written_out(PointMass(4, horizon=5), agent, args, noise)
    grads = torch.autograd.grad(expected, list(agent.actor.parameters()))
    window, _ = play(agent, PointMass(4, horizon=5), args)
    metrics = sr.update_actor(agent, window, replace(args, max_grad_norm=0.0))
    torch.testing.assert_close(metrics["loss/actor"], expected.detach())
    for p, grad in zip(agent.actor.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    values = agent.target(window["next_obs"])[0] * ~window["terminations"]
    torch.testing.assert_close(sr.critic_targets(agent, window, args),
                               sr.td_lambda(window["rewards"], values, window["dones"], 0.99, 0.95).detach())
    before = [p.clone() for p in agent.target.parameters()]
    sr.update_critic(agent, window, sr.critic_targets(agent, window, args), args, generator())
    for old, new, online in zip(before, agent.target.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.4 * old + 0.6 * online)


def test_shac_is_sapo_with_its_switches_off(fake):
    """The same numbers, bit for bit; and one switch alone changes them."""
    sr.train(arguments("shac", name="shac"))
    off = dict(num_critics=1, target_decay=0.995, state_std=False, activation="elu", optimizer="adam")
    off |= dict(max_grad_norm=1.0)
    sr.train(arguments("sapo", name="off", **OFF, **off))
    sr.train(arguments("sapo", name="on", **OFF | dict(entropy_in_return=True), **off))
    shac, plain, soft = (sr.load_file(f"runs/{name}/checkpoint.pt") for name in ("shac", "off", "on"))
    assert not differences(shac["agent"], plain["agent"]) and differences(shac["agent"], soft["agent"])
    assert [row["eval/return"] for row in table("runs/shac/eval.csv")] == [
        row["eval/return"] for row in table("runs/off/eval.csv")]


def test_nothing_but_the_switches_asks_for_the_algorithm():
    """Outside Args and its defaults, `args.algo` only names the run's folder."""
    body = SCRIPT.read_text().split("# --- make_envs")[1]
    uses = [line.strip() for line in body.splitlines() if "algo" in line.replace("algos/", "")
            and "sapo_rewarped" not in line]
    assert all("tuned_defaults(args.algo" in use or use.startswith("#") or "--algo" in use for use in uses), uses


PUBLISHED = {
    ("sapo", "AntRun"): dict(num_envs=64, actor_units=(128, 64, 32), critic_units=(64, 64), total_timesteps=4_096_000),
    ("sapo", "HandReorient"): dict(num_envs=64, actor_units=(512, 256), total_timesteps=4_096_000),
    ("sapo", "RollingFlat"): dict(num_envs=32, total_timesteps=4_096_000, num_critics=2, activation="silu",
                                  optimizer="adamw", max_grad_norm=0.5, target_decay=0.0, critic_lr=5e-4),
    ("sapo", "SoftJumper"): dict(num_envs=32, total_timesteps=6_144_000),
    ("sapo", "HandFlip"): dict(num_envs=32, total_timesteps=6_144_000, critic_units=(256, 256)),
    ("shac", "AntRun"): dict(critic_lr=2e-3, target_decay=0.2, num_critics=1, state_std=False, activation="elu",
                             optimizer="adam", max_grad_norm=1.0, entropy_in_return=False),
    ("shac", "FluidMove"): dict(critic_lr=5e-4, target_decay=0.995, entropy_in_value=False, autotune=False),
    ("apg", "HandFlip"): dict(num_critics=0, entropy_in_return=False, state_std=False, gamma=0.99),
    ("trajopt", "RollingFlat"): dict(open_loop=True, actor_lr=1e-2, gamma=1.0, horizon=0, total_timesteps=96_000,
                                     plan_start="uniform", final_lr=None, max_grad_norm=0.0, optimizer="adam"),
    ("trajopt", "HandFlip"): dict(total_timesteps=480_000, plan_start="zeros", actor_lr=1e-2),
    ("trajopt", "AntRun"): dict(num_envs=64, total_timesteps=10 * 64 * 1000, actor_lr=1e-2),
    ("trajopt", "SoftJumper"): dict(num_envs=32, total_timesteps=10 * 32 * 300, actor_lr=1e-2),
    ("trajopt", "HandReorient"): dict(actor_lr=0.1, num_envs=64, total_timesteps=384_000),
}


@pytest.mark.parametrize("algo, env_id", PUBLISHED)
def test_published_settings_are_the_defaults_of_the_full_size(algo, env_id):
    defaults = sr.Args(**dict(algo=algo, env_id=env_id, device="cpu") | sr.tuned_defaults(algo, env_id, "full"))
    everywhere = dict(actor_lr=2e-3, critic_lr=5e-4, alpha_lr=5e-3, gae_lambda=0.95, critic_epochs=16, alpha=1.0,
                      num_minibatches=4, target_entropy_scale=0.5)
    everywhere |= {} if algo == "trajopt" else dict(horizon=32, gamma=0.99, final_lr=1e-5)
    for key, value in (everywhere | PUBLISHED[algo, env_id]).items():
        assert getattr(defaults, key) == value, key
    defaults.check()


@pytest.mark.parametrize("algo", sr.PRESETS)
def test_help_shows_each_preset_its_defaults(algo, capsys):
    with pytest.raises(SystemExit) as stop:
        sr.parse_args(["--algo", algo, "--env-id", "AntRun", "--size", "full", "--device", "cpu", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "AntRun" in text
    defaults = sr.tuned_defaults(algo, "AntRun", "full")
    assert f"(default: {defaults.get('total_timesteps', sr.Args.total_timesteps)})" in text
    args = sr.parse_args(["--algo", algo, "--env-id", "AntRun", "--device", "cpu"])
    assert args.size == "small" and args.algo == algo
    for key, value in sr.tuned_defaults(algo, "AntRun", "small").items():
        assert getattr(args, key) == value
    args.check()


def test_trajopt_is_adam_on_the_actions(fake):
    """Three iterations against a plan optimised by hand, from the evaluation's starts, undiscounted, whole episodes."""
    args = arguments("trajopt", total_timesteps=3 * 4 * 20, eval_freq=80, actor_lr=0.05, name="plan")
    sr.train(args)
    torch.manual_seed(args.seed)
    plan = torch.nn.Parameter(torch.zeros(20, 4, 2).uniform_(-1, 1))
    adam = torch.optim.Adam([plan], 0.05, betas=(0.7, 0.95))
    for _ in range(3):
        env, total = PointMass(4), 0.0
        env.reset(seed=sr.EVAL_SEED)
        for t in range(20):
            total = total + env.step(plan[t])[1].sum()
        adam.zero_grad()
        (-total / 80).backward()
        adam.step()
        plan.data.clamp_(-1, 1)
    learnt = sr.load_file("runs/plan/checkpoint.pt")["agent"]["actor.actions"]
    torch.testing.assert_close(learnt, plan.data)
    returns = [float(row["eval/return"]) for row in table("runs/plan/eval.csv")]
    assert returns == sorted(returns) and len(returns) == 3


# --- Parts ------------------------------------------------------------------------------------------------------------
def test_running_statistics_are_those_of_all_states():
    norm = sr.RunningNorm(3)
    batches = [torch.randn((4, 5, 3), generator=generator(i)) * (i + 1) + i for i in range(3)]
    for batch in batches:
        norm.update(batch)
    every = torch.cat([b.flatten(0, 1) for b in batches]).double()  # and one observation of mean 0 and variance 1
    assert float(norm.count) == 61
    mean = every.sum(0) / 61
    torch.testing.assert_close(norm.mean, mean)
    torch.testing.assert_close(norm.var, (every.square().sum(0) + 1) / 61 - mean.square())
    seen = norm({"state": every.float(), "points": torch.ones(2, 3)})
    assert seen["state"].mean().abs() < 0.1 and torch.equal(seen["points"], torch.ones(2, 3))


def test_a_window_is_normalised_by_the_statistics_from_before_it(fake):
    args = arguments(critic_epochs=1)
    agent, env = new_agent(args), PointMass(4)
    window, _ = play(agent, env, args)
    torch.testing.assert_close(window["obs"]["state"], window["state"] / math.sqrt(1 + 1e-5))
    sr.learn(agent, window, args, generator())
    assert float(agent.norm.count) == 1 + window["rewards"].numel()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pass_of_the_critic_sees_every_sample_once(shuffle, monkeypatch):
    args = arguments(shuffle=shuffle, critic_epochs=3)
    agent = new_agent(args)
    window, _ = play(agent, PointMass(4), args)
    seen, plain = [], sr.critic_loss
    monkeypatch.setattr(sr, "critic_loss", lambda c, obs, targets: (seen.append(targets), plain(c, obs, targets))[1])
    sr.update_critic(agent, window, torch.arange(32.0).view(8, 4), args, generator())
    passes = torch.stack(seen).view(3, 32)
    assert len(seen) == 12 and torch.equal(passes.sort(-1).values, torch.arange(32.0).expand(3, 32))
    assert torch.equal(passes[0], torch.arange(32.0)) != shuffle and torch.equal(passes[0], passes[1]) != shuffle


def test_critic_loss_is_the_mean_over_critics_with_one_target():
    args = arguments()
    agent, obs, targets = new_agent(args), {"state": torch.randn((6, 4), generator=generator())}, torch.arange(6.0)
    values = agent.critic(obs)
    expected = sum(((values[k] - targets) ** 2).mean() for k in range(2)) / 2
    torch.testing.assert_close(sr.critic_loss(agent.critic, obs, targets), expected)


def test_learning_rates_fall_along_a_line():
    args, agent = arguments(), new_agent(arguments())
    for share, rates in ((0.0, (2e-3, 5e-4)), (0.5, (1.005e-3, 2.55e-4)), (1.0, (1e-5, 1e-5)), (1.2, (1e-5, 1e-5))):
        sr.set_learning_rates(agent, args, share)
        now = [agent.optimizers[part].param_groups[0]["lr"] for part in ("actor", "critic", "alpha")]
        assert now == pytest.approx([*rates, 5e-3])
    sr.set_learning_rates(agent, replace(args, final_lr=None), 0.7)
    assert agent.optimizers["actor"].param_groups[0]["lr"] == 2e-3


@pytest.mark.parametrize("algo, gain", [("sapo", 1.0), ("shac", math.sqrt(2))])
def test_networks_are_the_published_ones(algo, gain):
    """Linear, LayerNorm, activation; a plain last layer; orthogonal weights, in the last layers too; no biases yet."""
    args = arguments(algo, actor_units=(20, 12), critic_units=(8,))
    agent, heads = new_agent(args, points=5), sr.PRESETS[algo].get("num_critics", 2)
    act = {"sapo": torch.nn.SiLU, "shac": torch.nn.ELU}[algo]
    for net, units, outputs, count in ((agent.actor.net, (20, 12), 2 * (1 + args.state_std), 1),
                                       (agent.critic[0], (8,), 1, heads)):
        pairs = [(3, 64), (64, 128), (128, 256), (256, 64), (4, 128)]
        pairs += count * [*zip((192, *units), units, strict=False), (units[-1], outputs)]
        layers = [layer for layer in net.modules() if not list(layer.children())]
        linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == pairs
        for i, layer in enumerate(layers):
            if isinstance(layer, torch.nn.Linear):
                rows = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
                torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), atol=1e-5, rtol=0)
                assert (layer.bias == 0).all()
                if layer.out_features != outputs:
                    assert isinstance(layers[i + 1], torch.nn.LayerNorm) and isinstance(layers[i + 2], act)
    obs = {"state": torch.randn((6, 4), generator=generator()), "points": torch.randn((6, 5, 3), generator=generator())}
    net = agent.actor.net  # particles one by one, then their mean
    each = torch.stack([net.each(obs["points"][:, k]) for k in range(5)]).mean(0)
    expected = net.heads[0](torch.cat([net.mean(each), net.low(obs["state"])], -1))
    torch.testing.assert_close(net(obs)[0], expected)


def test_the_deviation_is_the_states_own_and_within_its_limits():
    agent, state = new_agent(arguments()), {"state": torch.randn((6, 4), generator=generator())}
    free = agent.actor(state)[1]
    assert free.std(0).min() > 0.01, "it depends on the state"
    for shift, limit in ((50.0, 2.0), (-50.0, -5.0)):
        agent.actor.net.heads[0][-1].bias.data[2:] = shift  # after the two means
        assert (agent.actor(state)[1] == limit).all() and (agent.actor(state)[0].abs() < 10).all()
    assert (new_agent(arguments("shac")).actor(state)[1] == -1).all()


def test_the_order_of_particles_does_not_matter():
    args = arguments()
    agent = new_agent(args, points=5)
    obs = {"state": torch.zeros(2, 4), "points": torch.randn((2, 5, 3), generator=generator())}
    mixed = obs | {"points": obs["points"][:, [3, 0, 4, 1, 2]]}
    for net in (agent.actor.net, agent.critic):
        torch.testing.assert_close(net(obs), net(mixed), atol=1e-5, rtol=1e-5)
        assert (net(obs) != net(obs | {"points": obs["points"] + 1})).any()


# --- Runs -------------------------------------------------------------------------------------------------------------
def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def differences(a: dict, b: dict) -> list[str]:
    return [k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("algo, changes", [
    ("sapo", dict(env_id="Fake points")), ("shac", {}), ("trajopt", dict(total_timesteps=320, eval_freq=160)),
])  # fmt: skip
def test_resume_continues_exactly(fake, algo, changes):
    """2N steps equal N steps and then N more, bit for bit; the learning rate's line ends where it would have."""
    args = arguments(algo, name="whole", **dict(total_timesteps=128, eval_freq=64) | changes)
    sr.train(args)
    half, whole = replace(args, name="half"), args.total_timesteps

    class Stop(Exception):
        pass

    def stop_after_saving(path, content, save=sr.save):
        save(path, content)
        if path.name == "checkpoint.pt":
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sr, "save", stop_after_saving)
        with pytest.raises(Stop):
            sr.train(half)
    assert sr.load_file("runs/half/checkpoint.pt")["now"]["global_step"] == whole // 2
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was interrupted
        path.write_text(path.read_text() + "999999" + "," * path.read_text().partition("\n")[0].count(",") + "\n")
    sr.train(replace(half, resume="runs/half"))
    one, two = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "half"))
    assert not differences(one["agent"], two["agent"])
    for key in ("random", "obs", "optimizers", "env"):
        torch.testing.assert_close(one[key], two[key], atol=0, rtol=0) if key != "env" else None
    rows = [table(f"runs/{name}/{file}.csv") for file in ("eval", "metrics") for name in ("whole", "half")]
    same = [[[row[k] for k in row if "time" not in k] for row in one] for one in rows]
    assert same[0] == same[1] and same[2] == same[3] and len(same[0]) == 2


def test_runs_with_one_seed_are_equal_and_seeds_differ(fake):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sr.train(arguments(name=name, seed=seed, total_timesteps=64))
    a, b, c = (sr.load_file(f"runs/{name}/checkpoint.pt")["agent"] for name in "abc")
    assert not differences(a, b) and differences(a, c)


@pytest.mark.parametrize("algo", ["sapo", "shac", "apg"])
def test_a_point_learns_to_go_to_the_middle(fake, algo):
    """From a random policy's return, at least two thirds of the way to 14, about what the best policy gets."""
    def score(act):
        env = PointMass(32, horizon=20)
        env.reset(seed=sr.EVAL_SEED)
        with torch.no_grad():
            for _ in range(20):
                info = env.step(act(env._observe(env.state)))[-1]
        return float(info["episode"]["return"].mean())

    chance = generator(5)
    random = score(lambda obs: torch.rand((32, 2), generator=chance) * 2 - 1)
    args = arguments(algo, name=algo, num_envs=16, horizon=16, total_timesteps=16 * 16 * 60, eval_freq=10**6,
                     critic_epochs=4, actor_units=(32, 32), critic_units=(32, 32))
    sr.train(args)
    policy = sr.Policy(f"runs/{algo}/checkpoint.pt")
    learnt = score(policy.act)
    assert random < 2 and learnt > random + 2 / 3 * (14 - random), (random, learnt)
    rows = table(f"runs/{algo}/metrics.csv")
    rates = [float(row["train/actor_lr"]) for row in rows]  # a line that would reach 1e-5 after the last window
    assert rates == pytest.approx([2e-3 + (1e-5 - 2e-3) * k / 60 for k in range(60)])
    if algo == "sapo":
        assert len(rows) == 60 and float(rows[-1]["train/alpha"]) < 1 and float(rows[-1]["time/sim_backward"]) > 0
        assert {"train/entropy", "train/grad_world_median", "train/grad_world_max", "train/grad_outliers",
                "train/actor_grad", "train/critic_grad", "time/sim_forward", "loss/vf"} <= set(rows[0])


def test_nan_resets_are_counted_over_the_run(fake):
    sr.train(arguments(env_id="Fake nan", name="run", total_timesteps=160))
    assert [row["train/nan_resets"] for row in table("runs/run/metrics.csv")] == ["1.0", "1.0", "1.0", "2.0", "2.0"]


def test_stops_at_nan_and_names_the_tensor(fake):
    sr.train(arguments(name="run", total_timesteps=32))
    checkpoint = sr.load_file("runs/run/checkpoint.pt")
    checkpoint["agent"]["critic.0.heads.0.1.weight"][0, 0] = math.nan
    sr.save(Path("broken.pt"), checkpoint)
    with pytest.raises(FloatingPointError, match=r"^\S+ is not finite at step 32; last good checkpoint: none yet$"):
        sr.train(arguments(name="other", checkpoint="broken.pt"))
    agent = new_agent(arguments())
    agent.critic[0].heads[1][1].bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="critic.0.heads.1.1.bias is not .* step 5; last .*checkpoint.pt"):
        sr.check_finite(agent, {}, 5, Path("runs/run/checkpoint.pt"))


def test_evaluation_repeats_and_leaves_training_alone(fake):
    sr.train(arguments(name="often", eval_freq=32, capture_video=True))
    sr.train(arguments(name="seldom", eval_freq=1000))
    often, seldom = (sr.load_file(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    assert len(list(Path("runs/often/videos").glob("*.mp4"))) == 3
    results = [sr.train(arguments(evaluate=True, checkpoint="runs/often/checkpoint.pt", name=name)) for name in "ab"]
    assert results[0]["eval/return"] == results[1]["eval/return"]
    assert float(table("runs/often/eval.csv")[-1]["eval/return"]) == results[0]["eval/return"]


def test_evaluation_counts_every_world_once():
    """A policy that stands still: the returns of the first episodes, whatever follows an early end."""
    env = PointMass(3, horizon=6, wall=1.2)
    env.reset = lambda seed=None: (setattr(env, "state", torch.tensor(
        [[0.5, 0, 0, 0], [1.0, 0, 2.5, 0], [0, 0, 0, 0]])), setattr(env, "clock", torch.zeros(3, dtype=int)),
        setattr(env, "returns", torch.zeros(3)), env._observe(env.state))[-1]

    class Still:
        def act(self, obs):
            return torch.zeros(3, 2)

        def reset(self):
            pass

    results = sr.evaluate(Still(), env, arguments(), None)
    ended = 1 - (1 + 0.1 * 0.95 * 2.5) ** 2  # one step, beyond the wall
    returns = torch.tensor([6 * 0.75, ended, 6.0])
    assert results["eval/return"] == pytest.approx(float(returns.mean()), rel=1e-5)
    half = 1.96 * float(returns.std()) / math.sqrt(3)
    assert results["eval/return_std"] == pytest.approx(float(returns.std()), rel=1e-5)
    assert (results["eval/ci_low"], results["eval/ci_high"]) == pytest.approx(
        (float(returns.mean()) - half, float(returns.mean()) + half), rel=1e-5)


def test_policy_from_the_file_acts_like_the_agent(fake):
    args = arguments(name="run", env_id="Fake points", total_timesteps=64)
    sr.train(args)
    before = torch.get_rng_state()
    policy = sr.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = new_agent(args, points=5)
    agent.load_state_dict(sr.load_file("runs/run/best.pt")["agent"])
    obs = PointMass(7, points=True).reset()
    torch.testing.assert_close(policy.act(obs), torch.tanh(agent.actor(agent.norm(obs))[0]))
    assert policy.act({k: v.numpy() for k, v in obs.items()}).shape == (7, 2)


def test_the_landscape_is_drawn_and_leaves_the_weights_alone(fake, monkeypatch):
    monkeypatch.setattr(sr, "plot_landscape", partial(sr.plot_landscape, points=5))
    sr.train(arguments(name="run", env_id="Fake bouncy", plot_landscape=True, total_timesteps=32))
    sr.train(arguments(name="plain", env_id="Fake bouncy", total_timesteps=32))
    drawn, plain = (sr.load_file(f"runs/{name}/checkpoint.pt")["agent"] for name in ("run", "plain"))
    assert not differences(drawn, plain)
    assert Path("runs/run/landscape.png").read_bytes().startswith(b"\x89PNG")
    sr.train(arguments(evaluate=True, checkpoint="runs/run/best.pt", name="again", env_id="Fake bouncy",
                       plot_landscape=True))
    assert Path("runs/again/landscape.png").exists()


def test_checkpoint_starts_from_weights_alone(fake):
    sr.train(arguments(name="first"))
    result = sr.train(arguments(name="second", checkpoint="runs/first/checkpoint.pt", total_timesteps=32))
    assert result["global_step"] == 32
    steps = [sr.load_file(f"runs/{name}/checkpoint.pt")["optimizers"]["actor"]["state"][0]["step"]
             for name in ("first", "second")]
    assert [float(s) for s in steps] == [3, 1]


@pytest.mark.parametrize("changes, field", [
    (dict(actor_units=(32,)), "actor_units"), (dict(env_id="Other"), "env_id"), (dict(num_critics=1), "num_critics"),
    (dict(env_id="Fake", activation="elu"), "activation"), (dict(state_std=False), "state_std"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(fake, changes, field):
    sr.train(arguments(name="run", total_timesteps=32))
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}: it has .*, this run"):
        sr.train(arguments(name="other", checkpoint="runs/run/best.pt", **changes))


def test_existing_runs_are_not_overwritten(fake):
    sr.train(arguments(name="run", total_timesteps=32))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sr.train(arguments(name="run"))


def test_parity_is_refused_with_particles(fake):
    with pytest.raises(ValueError, match="--parity is for tasks without particles"):
        sr.train(arguments(env_id="Fake points", parity=True))
    assert not Path("runs").exists()


# --- Command line -----------------------------------------------------------------------------------------------------
def test_arguments_of_a_run_come_from_its_checkpoint(fake):
    sr.train(arguments("shac", name="run", total_timesteps=32, gamma=0.8))
    args = sr.parse_args(["--resume", "runs/run", "--total-timesteps", "90", "--device", "cpu"])
    assert (args.gamma, args.total_timesteps, args.name, args.algo, args.actor_units) == (0.8, 90, "run", "shac", (16,))
    args = sr.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt", "--device", "cpu"])
    assert (args.evaluate, args.env_id, args.name, args.algo, args.gamma) == (True, "Fake", "", "shac", 0.8)


def test_another_algorithm_than_the_checkpoints_is_refused(fake):
    """Its switches come from the checkpoint: with another name they would be reported as what they are not."""
    sr.train(arguments("shac", name="run", total_timesteps=32))
    for source in (["--resume", "runs/run"], ["--checkpoint", "runs/run/best.pt"]):
        with pytest.raises(ValueError, match="^the checkpoint differs in algo: it has shac, this run apg$"):
            sr.parse_args([*source, "--algo", "apg", "--device", "cpu"])
        assert sr.parse_args([*source, "--algo", "shac", "--device", "cpu"]).algo == "shac"


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(fake, monkeypatch):
    sr.train(arguments(name="run", total_timesteps=32))
    before = {path.name: path.read_bytes() for path in Path("runs/run").iterdir()}

    def refuse(self, state):
        raise ValueError("saved environment has reward_name 'default'")

    monkeypatch.setattr(PointMass, "load_state_dict", refuse)
    with pytest.raises(ValueError, match="reward_name"):
        sr.train(arguments(resume="runs/run", reward="paper", total_timesteps=64))
    assert {path.name: path.read_bytes() for path in Path("runs/run").iterdir()} == before


@pytest.mark.parametrize("changes, words", [
    (dict(evaluate=True), "--evaluate needs --checkpoint"),
    (dict(resume="a", checkpoint="b"), "give only one"),
    (dict(horizon=0), "--horizon must be at least 1"),
    (dict(num_minibatches=5), "--num-minibatches must divide"),
    (dict(target_decay=1.0), "--target-decay in"),
    (dict(alpha=0.0), "--alpha and"),
    (dict(num_minibatches=0), "--num-minibatches must be at least 1"),
    (dict(eval_freq=0), "--eval-freq must be at least 1"),
    (dict(total_timesteps=0), "--total-timesteps must be at least 1"),
    (dict(critic_epochs=0), "--critic-epochs must be at least 1"),
    (dict(num_critics=-1), "--num-critics must not be negative"),
    (dict(actor_units=()), "--actor-units and --critic-units must name layers"),
    (dict(open_loop=True, horizon=-1), "--horizon must be at least 1"),
    (dict(device="gpu"), "--device gpu: cpu, cuda or cuda:N"),
])  # fmt: skip
def test_choices_that_cannot_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        arguments(**changes).check()


@pytest.mark.parametrize("options, words", [
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--checkpoint", str(SCRIPT)], "is no checkpoint of sapo_rewarped"),
    (["--env-id", "nothing"], "nothing"),
])  # fmt: skip
def test_bad_input_is_one_line(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        sr.train(sr.parse_args(["--device", "cpu", *options]))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_environments_are_made_as_the_arguments_say(monkeypatch):
    """Training worlds spread over the episode and with their own seed; those of the evaluation start together."""
    from types import SimpleNamespace

    from envs import rewarped

    made = []
    monkeypatch.setattr(rewarped, "make", lambda *args, **options: made.append((args, options)) or SimpleNamespace(
        max_episode_steps=100))
    args = arguments(seed=7, stagger=True, reward="paper", size="small", recompute=False)
    sr.make_envs(args, CPU)
    sr.make_envs(replace(args, horizon=0, open_loop=True, stagger=False), CPU)
    common = dict(reward="paper", size="small", checkpoint=False)
    evaluation = (("Fake", 4, CPU), dict(seed=sr.EVAL_SEED, window=8) | common)
    assert made[:2] == [evaluation, (("Fake", 4, CPU), dict(seed=7, window=8, stagger=True) | common)]
    assert made[3][1] == dict(seed=7, window=100, stagger=False) | common


def test_a_missing_simulator_is_one_line_with_the_command_that_installs_it(monkeypatch, tmp_path):
    from envs import rewarped

    def make(*args, **options):
        raise ImportError('the rewarped tasks need Warp: pip install -e ".[so101]"')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewarped, "make", make)
    with pytest.raises(ValueError, match=r'^AntRun: the rewarped tasks need Warp: pip install -e "\.\[so101\]"$'):
        sr.train(sr.parse_args(["--device", "cpu", "--env-id", "AntRun"]))
    assert not Path("runs").exists()


def test_the_command_line_prints_an_error_without_a_traceback(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", "--evaluate"], cwd=tmp_path, text=True,
                            capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "--evaluate needs --checkpoint" in line


def test_args_of_a_run_are_kept(fake):
    args = arguments(name="run", total_timesteps=32)
    run = Path(sr.train(args)["run"])
    assert sr.Args(**sr.load_file(run / "checkpoint.pt")["args"]) == args and asdict(args)["algo"] == "sapo"
    shutil.rmtree(run)
