"""SAPO: golden numbers, hand values, gradients, presets, and runs on a tiny differentiable task."""

import csv
import math
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sapo_rewarped as sr
import torch
from fake_env_diff import PointMass

SCRIPT = Path(sr.__file__)
GOLDEN = Path(__file__).parent / "golden/sapo_rewarped.npz"
SHAPES = dict(state=(4,), action=2)
POINTS = SHAPES | dict(points=(5, 3))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(algo="sapo", **changes) -> sr.Args:
    """A small run on the CPU, for PointMass, whose `env_id` lists its options."""
    small = dict(
        algo=algo,
        env_id="Fake",
        device="cpu",
        num_envs=4,
        eval_episodes=4,
        horizon=8,
        total_timesteps=96,
        eval_freq=64,
        critic_epochs=2,
        actor_units=(16,),
        critic_units=(16,),
        capture_video=False,
    )
    return sr.Args(**sr.tuned(algo, "Fake", "full") | small | changes)


def make_fakes(args):
    options = dict(points="points" in args.env_id)
    nan = (5, 30) if "nan" in args.env_id else ()
    env = PointMass(args.num_envs, seed=args.seed, nan=nan, **options)
    return env, PointMass(args.eval_episodes, seed=sr.EVAL_SEED, **options)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on PointMass, with runs/ in a temporary folder."""
    monkeypatch.setattr(sr, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_agent(args, shapes=SHAPES) -> sr.Agent:
    torch.manual_seed(0)
    return sr.Agent(args, shapes)


def play(agent, env, args, seed=0) -> dict:
    torch.manual_seed(seed)
    return sr.rollout(agent, env, env._observe(env.state), args)[0]


def learn(agent, window, args) -> dict:
    return sr.learn(agent, sr.make_optimizers(agent, args), window, args)


def differences(a: dict, b: dict) -> list[str]:
    """Names of the tensors that only one has, or that are not equal bit for bit."""
    names = a.keys() | b.keys()
    return [
        name
        for name in names
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(name: str, file: str = "checkpoint") -> dict:
    return sr.load(f"runs/{name}/{file}.pt")["agent"]


# --- Golden numbers -------------------------------------------------------------------------------
def renamed(name: str) -> str:
    return name.replace("critic.0.", "critic.").replace("target.0.", "target.")


def golden_weights(stored: dict) -> dict:
    """The weights of that file; its statistics were mean and variance instead of sums."""
    found = {renamed(name): value for name, value in stored.items()}
    mean, var, count = (found.pop(f"norm.{name}") for name in ("mean", "var", "count"))
    sums = {"norm.total": mean * count, "norm.squares": (var + mean.square()) * count}
    return found | sums | {"norm.count": count}


@pytest.mark.parametrize("algo", ["sapo", "shac", "apg"])
def test_losses_gradients_and_targets_are_those_of_f2f0a1a(algo, monkeypatch):
    """On the same weights, noise, minibatches and window, with time limits, true ends and a NaN."""
    with np.load(GOLDEN) as file:
        everything = {name: torch.from_numpy(file[name]) for name in file.files}
    noise, order = everything["noise"], everything["order"]
    if algo != "sapo":
        noise, order = everything[f"{algo}/noise"], everything[f"{algo}/order"]

    def golden(folder: str) -> dict:
        start = f"{algo}/{folder}/"
        return {k.removeprefix(start): v for k, v in everything.items() if k.startswith(start)}

    def same(value, expected):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)

    args = arguments(algo, gamma=0.97, critic_units=(12,), target_decay=0.4 * (algo == "shac"))
    agent = sr.Agent(args, SHAPES)
    agent.load_state_dict(golden_weights(golden("before")))
    optimizers = sr.make_optimizers(agent, args)
    env = PointMass(4, horizon=5, wall=1.6, nan=(3,))
    env.state = torch.tensor(
        [
            [0.3, -0.2, 0.1, 0.4],
            [-0.6, 0.5, 0.0, 0.3],
            [1.0, 0.9, 1.2, 1.5],
            [0.2, 0.8, -0.5, 0.1],
        ]
    )
    env.clock = torch.tensor([0, 1, 0, 3])
    draws, orders = iter(noise), iter(order)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: next(draws))
    monkeypatch.setattr(torch, "randperm", lambda *length, **options: next(orders))

    window = play(agent, env, args)
    for name in ("rewards", "entropies", "terminations", "truncations", "dones"):
        same(window[name], everything[f"{algo}/{name}"])
    metrics = sr.update_actor(agent, optimizers["actor_optimizer"], window, args)
    same(metrics["loss/actor"], everything[f"{algo}/actor_loss"])
    same(metrics["train/actor_grad"], everything[f"{algo}/actor_norm"])
    grads = golden("actor_grad")
    for name, parameter in agent.actor.named_parameters():
        same(parameter.grad, grads[name])
    metrics = sr.update_alpha(agent, optimizers["alpha_optimizer"], window["entropies"], args)
    if algo == "sapo":
        same(agent.log_alpha.grad, everything["sapo/alpha_grad"])
        # alpha |H| (h - H) is its own derivative in log alpha; the gradient kept is clipped at 0.5
        assert metrics["loss/alpha"].clamp(-0.5, 0.5) == pytest.approx(
            float(agent.log_alpha.grad), abs=1e-5
        )
    if algo != "apg":
        targets = sr.critic_targets(agent, window, args)
        same(targets, everything[f"{algo}/targets"])
        obs = {name: value.detach().flatten(0, 1) for name, value in window["obs"].items()}
        loss = sr.critic_loss(agent.critic, obs, targets.flatten())
        same(loss.detach(), everything[f"{algo}/critic_loss"])
        names, parameters = zip(*agent.critic.named_parameters(), strict=True)
        found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, grad in golden("critic_grad").items():
            same(found[name.removeprefix("0.")], grad)
        metrics = sr.update_critic(agent, optimizers["critic_optimizer"], window, targets, args)
        for name, value in golden("metrics").items():
            same(metrics[name.replace(".", "/")], value)
    agent.norm.update(window["state"])
    after = golden_weights(golden("after"))
    assert after.keys() == agent.state_dict().keys()
    for name, value in agent.state_dict().items():
        same(value, after[name])


# --- Returns and targets --------------------------------------------------------------------------
def random_window(seed=0, steps=7, envs=50):
    """rewards, values, dones (T, N); values are 0 after a true end, as bootstrap makes them."""
    g = generator(seed)
    rewards = torch.randn((steps, envs), generator=g, dtype=torch.float64)
    values = torch.randn((steps, envs), generator=g, dtype=torch.float64)
    draw = torch.rand((steps, envs), generator=g)
    return rewards, values * (draw >= 0.15), draw < 0.3


def segments(dones) -> list[tuple[int, int, int]]:
    """(environment, first step, number of steps) of every segment of a window."""
    found = []
    for n in range(dones.shape[1]):
        first = 0
        for t in range(len(dones)):
            if dones[t, n] or t == len(dones) - 1:
                found.append((n, first, t + 1 - first))
                first = t + 1
    return found


def test_td_lambda_by_hand():
    """gamma 0.5, lambda 0.5; environments: no end, true end after step 1, time limit after 0."""
    rewards = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    values = torch.tensor([[4.0, 4.0, 4.0], [6.0, 0.0, 6.0], [8.0, 8.0, 8.0]])
    dones = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
    targets = sr.td_lambda(rewards, values, dones, 0.5, 0.5)
    # last step: 3 + 0.5 x 8 = 7
    # before it: 2 + 0.5 (0.5 x 6 + 0.5 x 7) = 5.25; with the end: 2 + 0.5 x 0 = 2
    # first: 1 + 0.5 (0.5 x 4 + 0.5 x 5.25) = 3.3125; 1 + 0.5 (0.5 x 4 + 0.5 x 2) = 2.5; 1 + 0.5 x 4 = 3
    assert targets.tolist() == [[3.3125, 2.5, 3.0], [5.25, 2.0, 5.25], [7.0, 7.0, 7.0]]


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_td_lambda_is_the_weighted_sum_of_n_step_returns(lam, gamma=0.9):
    rewards, values, dones = random_window()
    expected = torch.zeros_like(rewards)
    for n, first, length in segments(dones):
        for t in range(first, first + length):
            left = first + length - t
            total, so_far = 0.0, 0.0
            for m in range(1, left + 1):
                so_far += gamma ** (m - 1) * rewards[t + m - 1, n]
                weight = lam ** (m - 1) if m == left else (1 - lam) * lam ** (m - 1)
                total += weight * (so_far + gamma**m * values[t + m - 1, n])
            expected[t, n] = total
    torch.testing.assert_close(sr.td_lambda(rewards, values, dones, gamma, lam), expected)


def test_objective_adds_the_segments_up(gamma=0.9):
    rewards, values, dones = random_window(1)
    total = 0.0
    for n, first, length in segments(dones):
        for k in range(length):
            total += gamma**k * rewards[first + k, n]
        total += gamma**length * values[first + length - 1, n]
    assert len(segments(dones)) > 80
    objective = sr.objective(rewards, values, dones, gamma)
    torch.testing.assert_close(objective, total / rewards.numel())


def test_value_follows_time_limits_and_the_window_but_no_true_end():
    agent = new_agent(arguments())
    obs = {"state": torch.randn((3, 4, 4), generator=generator())}
    terminations = torch.zeros((3, 4), dtype=torch.bool)
    truncations = terminations.clone()
    terminations[2, 1] = terminations[0, 2] = True
    truncations[1, 3] = truncations[0, 2] = (
        True  # environment 2 ends both ways: the true end counts
    )
    rewards = torch.zeros(3, 4)
    window = dict(next_obs=obs, rewards=rewards, terminations=terminations, truncations=truncations)
    values = sr.state_values(agent.critic, obs).mean(0)
    expected = torch.zeros(3, 4)
    for t, n in [(2, 0), (2, 2), (2, 3), (1, 3)]:
        expected[t, n] = values[t, n]
    torch.testing.assert_close(sr.bootstrap(agent.critic, window), expected)
    assert sr.bootstrap(None, window).abs().sum() == 0


def test_critic_targets_take_the_smallest_value_and_the_soft_reward():
    args = arguments(horizon=6, gamma=0.9)
    agent = new_agent(args)
    agent.log_alpha.data.fill_(math.log(0.3))
    window = play(agent, PointMass(4, horizon=4), args)
    both = sr.state_values(agent.critic, window["next_obs"]).detach()
    assert (both[0] != both[1]).all() and window["truncations"].any()
    soft = window["rewards"] + 0.3 * (window["entropies"] + 1) / 2  # |H| = 2 / 2
    for rewards, changes in ((soft, {}), (window["rewards"], dict(entropy_in_value=False))):
        expected = sr.td_lambda(rewards, both.amin(0), window["dones"], 0.9, 0.95)
        found = sr.critic_targets(agent, window, replace(args, **changes))
        torch.testing.assert_close(found, expected.detach())
    window["terminations"][2, 1] = window["dones"][2, 1] = True  # nothing but the reward follows
    window["next_obs"]["state"].data[2, 1] = torch.nan
    torch.testing.assert_close(sr.critic_targets(agent, window, args)[2, 1], soft[2, 1].detach())


def test_a_window_teaches_actor_then_alpha_then_critics_then_statistics(monkeypatch):
    """The critics' targets are of the new temperature and of values from before the window."""
    args, seen = arguments(), []
    agent = new_agent(args)
    before = deepcopy(agent.state_dict())

    def changed() -> set[str]:
        return {name.split(".")[0] for name in differences(before, agent.state_dict())}

    def watch(name: str):
        plain = getattr(sr, name)

        def watched(*given):
            seen.append((name, changed()))
            return plain(*given)

        monkeypatch.setattr(sr, name, watched)

    for name in ("update_actor", "update_alpha", "critic_targets", "update_critic"):
        watch(name)
    learn(agent, play(agent, PointMass(4), args), args)
    new = {"actor", "log_alpha"}
    assert seen[:2] == [("update_actor", set()), ("update_alpha", {"actor"})]
    assert seen[2:] == [("critic_targets", new), ("update_critic", new)]
    assert changed() == new | {"critic", "norm"}


# --- Entropy --------------------------------------------------------------------------------------
def test_entropy_is_normalised_to_0_at_its_target_and_1_opposite():
    """Eight actions: |H| = 4; the last one is a uniform policy."""
    entropies = torch.tensor([-4.0, 4.0, 8 * math.log(2)])
    window = dict(rewards=torch.full((3,), 7.0), entropies=entropies)
    agent = sr.Agent(arguments(), SHAPES | dict(action=8))
    expected = torch.tensor([0.0, 1.0, (1 + 2 * math.log(2)) / 2])
    torch.testing.assert_close(sr.soft_rewards(agent, window) - 7, expected)
    agent.log_alpha.data.fill_(math.log(0.5))
    torch.testing.assert_close(sr.soft_rewards(agent, window) - 7, expected / 2)


def test_actions_and_entropy_estimate_are_those_of_a_squashed_normal():
    g = generator()
    mean = torch.randn((5, 3), generator=g, dtype=torch.float64)
    log_std = torch.randn((5, 3), generator=g, dtype=torch.float64)
    noise = torch.randn((2, 5, 3), generator=g, dtype=torch.float64)
    actions, entropies = sr.sample_actions(mean, log_std, noise)
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise[0]))
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TanhTransform()
    squashed = torch.distributions.TransformedDistribution(normal, [tanh])
    other = torch.tanh(mean + log_std.exp() * noise[1])
    torch.testing.assert_close(entropies, -squashed.log_prob(other).sum(-1))
    far = sr.sample_actions(torch.full((1, 1), 40.0), torch.zeros(1, 1), torch.zeros(2, 1, 1))[1]
    # -log pi = log std + log sqrt(2 pi) + 2 (log 2 - 40 - softplus(-80)): finite where tanh is 1
    assert float(far) == pytest.approx(0.5 * math.log(2 * math.pi) + 2 * (math.log(2) - 40))


@pytest.mark.parametrize("entropy, direction", [(0.5, -1), (-5.0, 1)])
def test_alpha_moves_towards_the_target_entropy(entropy, direction):
    """The loss is alpha |H| (h - H); its gradient in log alpha is itself. Six actions: H = -3."""
    args = arguments(alpha=0.2, alpha_lr=2.0, max_grad_norm=0.0)
    agent = sr.Agent(args, SHAPES | dict(action=6))
    optimizer = sr.make_optimizers(agent, args)["alpha_optimizer"]
    entropies = torch.full((3, 4), entropy)
    metrics = sr.update_alpha(agent, optimizer, entropies, replace(args, autotune=False))
    assert agent.log_alpha.item() == pytest.approx(math.log(0.2))
    metrics = sr.update_alpha(agent, optimizer, entropies, args)
    assert float(agent.log_alpha.grad) == pytest.approx(0.2 * 3 * (entropy + 3))
    assert float(metrics["loss/alpha"]) == pytest.approx(0.2 * 3 * (entropy + 3))
    assert (agent.log_alpha.item() - math.log(0.2)) * direction > 1


# --- Gradients ------------------------------------------------------------------------------------
class Kept:
    """An environment that keeps the actions it was given, so that their gradients can be read."""

    def __init__(self, env):
        self.env, self.actions = env, []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, actions):
        actions.retain_grad()
        self.actions.append(actions)
        return self.env.step(actions)

    def gradients(self) -> torch.Tensor:
        """(T, N, A)"""
        return torch.stack([actions.grad for actions in self.actions])


def action_gradients(env, args, agent) -> torch.Tensor:
    """d J_i / d a (T, N, A), each environment's return by itself."""
    env = Kept(env)
    window = play(agent, env, args)
    values = torch.zeros_like(window["rewards"])
    sr.objective(window["rewards"], values, window["dones"], 1.0).backward()
    return env.gradients() * window["rewards"].numel()


@pytest.mark.parametrize("algo", ["sapo", "shac", "apg"])
def test_gradient_of_the_loss_against_finite_differences(algo, eps=1e-6):
    """Through policy, environment, reset, entropy and terminal value at once, in float64."""
    args = arguments(algo, horizon=5, num_envs=3, gamma=0.9)
    agent = new_agent(args).double()

    def loss():
        window = play(agent, PointMass(3, horizon=3, dtype=torch.float64), args)
        values, rewards = sr.bootstrap(agent.target or agent.critic, window), window["rewards"]
        if args.entropy_in_return:
            rewards = sr.soft_rewards(agent, window)
        return -sr.objective(rewards, values, window["dones"], 0.9)

    parameters = dict(agent.actor.named_parameters())
    grads = torch.autograd.grad(loss(), parameters.values())
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        i = int(grad.abs().argmax())
        flat, losses = parameter.data.view(-1), []
        for shift in (eps, -2 * eps):
            flat[i] += shift
            losses.append(float(loss().detach()))
        flat[i] += eps
        slope = (losses[0] - losses[1]) / (2 * eps)
        assert float(grad.view(-1)[i]) == pytest.approx(slope, rel=1e-5), name


def test_gradients_reach_what_they_should():
    args = arguments()
    agent, env = new_agent(args, POINTS), PointMass(4, points=True)
    optimizers = sr.make_optimizers(agent, args)
    window = play(agent, env, args)
    before = deepcopy(agent.state_dict())
    sr.update_actor(agent, optimizers["actor_optimizer"], window, args)
    moved = {name.split(".")[0] for name in differences(before, agent.state_dict())}
    assert moved == {"actor"} and env.detached == 1
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.actor.parameters())  # its encoder too
    agent.actor.zero_grad(set_to_none=True)
    targets = sr.critic_targets(agent, window, args)
    sr.update_critic(agent, optimizers["critic_optimizer"], window, targets, args)
    assert all(p.grad is None for p in agent.actor.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.critic.parameters())  # both heads and encoder


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_the_clipped_norm_includes_encoders(max_norm):
    args = arguments(max_grad_norm=max_norm)
    agent = new_agent(args, POINTS)
    optimizer = sr.make_optimizers(agent, args)["actor_optimizer"]
    window = play(agent, PointMass(4, points=True), args)
    window["rewards"] = window["rewards"] * 1000
    norm = float(sr.update_actor(agent, optimizer, window, args)["train/actor_grad"])
    clipped = torch.stack([p.grad.norm() for p in agent.actor.parameters()]).norm()
    assert norm > 5 and float(clipped) == pytest.approx(max_norm or norm, rel=1e-4)


def test_a_reset_does_not_cut_the_other_environments_gradients():
    """Environment 0's episode ends amid the window, and its gradients with it; 1 has the same."""
    args = arguments("apg", horizon=6, num_envs=2)
    agent = new_agent(args)
    with_reset = PointMass(2)
    with_reset.clock = torch.tensor([17, 0])  # of 20: environment 0 ends with the third step
    cut, whole = (
        action_gradients(with_reset, args, agent),
        action_gradients(PointMass(2), args, agent),
    )
    assert torch.equal(cut[:, 1], whole[:, 1]) and (cut[:, 1].norm(dim=-1) > 0).all()
    assert (cut[0, 0] != whole[0, 0]).any()
    short = action_gradients(PointMass(2), replace(args, horizon=3), agent)
    torch.testing.assert_close(cut[:3, 0], short[:, 0])


def test_an_environment_that_meets_nan_is_left_out_and_counted():
    args = arguments(horizon=6, num_envs=2)
    agent, env = new_agent(args), PointMass(2, nan=(4,))
    window = play(agent, env, args)
    assert env.nan_resets == 1 and window["terminations"][3, 0] and window["rewards"][3, 0] == 0
    healthy = play(agent, PointMass(2), args)
    torch.testing.assert_close(window["rewards"][:, 1], healthy["rewards"][:, 1])
    metrics = learn(agent, window, args)
    assert all(value.isfinite().all() for value in metrics.values())
    assert all(value.isfinite().all() for value in agent.state_dict().values())


def test_an_absurd_observation_is_a_lost_environment():
    """Beyond 1e6, in any part of the observation: no reward, no value, no gradient."""
    state = torch.tensor([[9e5, 0.0], [0.0, -2e6], [math.nan, 0.0], [1.0, 1.0]])
    points = torch.tensor([[[0.0]], [[0.0]], [[0.0]], [[math.inf]]])
    assert sr.absurd({"state": state, "points": points}).tolist() == [False, True, True, True]
    args = arguments("apg", horizon=3, num_envs=2)
    agent, env = new_agent(args), Kept(PointMass(2, wall=1e9))
    env.state[0, 0] = 2e6
    window = play(agent, env, args)
    assert window["terminations"].tolist() == [[True, False]] * 3
    assert (window["rewards"][:, 0] == 0).all()
    learn(agent, window, args)
    grads = env.gradients()
    assert (grads[:, 0] == 0).all() and (grads[:, 1].norm(dim=-1) > 0).all()


def test_a_gradient_that_is_not_finite_is_zeroed_for_its_environment_alone():
    class Steep(PointMass):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            still = torch.zeros(2, 2)
            still[1] = 1.0
            slope = (actions - actions.detach() + still).square().sum(-1).sqrt()  # at 0: NaN
            return obs, rewards.detach() + slope, *rest

    args = arguments("apg", num_envs=2, horizon=1)
    agent = new_agent(args)
    metrics = learn(agent, play(agent, Steep(2), args), args)
    assert 0 < metrics["train/actor_grad"] < math.inf


# --- Presets --------------------------------------------------------------------------------------
def written_out(env, agent, args, noise) -> torch.Tensor:
    """SHAC's loss as its paper has it, environment by environment, on plain normals with tanh."""

    def normal(state):
        return {"state": agent.norm({"state": state})["state"]}

    state, discount, total = env.state, torch.ones(env.num_envs), 0.0
    for t in range(args.horizon):
        mean = agent.actor.net(normal(state))[0]
        actions = torch.tanh(mean + agent.actor.log_std.exp() * noise[t])
        obs, rewards, terminations, truncations, info = env.step(actions)
        total = total + (discount * rewards).sum()
        discount, state = discount * args.gamma, obs["state"]
        done = terminations | truncations | torch.tensor(t == args.horizon - 1)
        value = sr.state_values(agent.target, normal(info["final_obs"]["state"]))[0] * ~terminations
        total = total + torch.where(done, discount * value, 0.0).sum()
        discount = torch.where(done, 1.0, discount)
    return -total / (env.num_envs * args.horizon)


def test_shac_is_its_paper():
    """Loss and gradient of the preset, written out anew; and one target step by hand."""
    args = arguments("shac", target_decay=0.4, max_grad_norm=0.0)
    agent = new_agent(args)
    optimizers = sr.make_optimizers(agent, args)
    agent.norm.update(torch.randn((50, 4), generator=generator(3)) * 2 + 1)
    for parameter in agent.target.parameters():
        parameter.data += 0.05
    torch.manual_seed(0)
    noise = [torch.randn((2, 4, 2))[0] for _ in range(args.horizon)]
    expected = written_out(PointMass(4, horizon=5), agent, args, noise)
    grads = torch.autograd.grad(expected, list(agent.actor.parameters()))
    window = play(agent, PointMass(4, horizon=5), args)
    metrics = sr.update_actor(agent, optimizers["actor_optimizer"], window, args)
    torch.testing.assert_close(metrics["loss/actor"], expected.detach())
    for parameter, grad in zip(agent.actor.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    before = [p.clone() for p in agent.target.parameters()]
    targets = sr.critic_targets(agent, window, args)
    sr.update_critic(agent, optimizers["critic_optimizer"], window, targets, args)
    pairs = zip(before, agent.critic.parameters(), agent.target.parameters(), strict=True)
    for old, online, new in pairs:
        torch.testing.assert_close(new, 0.4 * old + 0.6 * online)


def test_nothing_but_the_switches_asks_for_the_algorithm():
    body = SCRIPT.read_text().split("# --- make_envs")[1]
    assert "args.algo" not in body


SAPO = dict(
    num_critics=2,
    activation="silu",
    weight_decay=0.01,
    max_grad_norm=0.5,
    target_decay=0.0,
    critic_lr=5e-4,
)
PUBLISHED = {
    ("sapo", "AntRun"): dict(num_envs=64, actor_units=(128, 64, 32), critic_units=(64, 64)),
    ("sapo", "HandReorient"): dict(num_envs=64, actor_units=(512, 256)),
    ("sapo", "RollingFlat"): SAPO | dict(num_envs=32, total_timesteps=4_096_000),
    ("sapo", "SoftJumper"): dict(num_envs=32, total_timesteps=6_144_000),
    ("sapo", "HandFlip"): dict(total_timesteps=6_144_000, critic_units=(256, 256)),
    ("shac", "AntRun"): dict(critic_lr=2e-3, target_decay=0.2, weight_decay=0.0),
    ("shac", "FluidMove"): dict(critic_lr=5e-4, target_decay=0.995, entropy_in_value=False),
    ("shac", "HandFlip"): dict(num_critics=1, state_std=False, activation="elu", max_grad_norm=1.0),
    ("apg", "HandFlip"): dict(num_critics=0, entropy_in_return=False, autotune=False),
}


@pytest.mark.parametrize("algo, env_id", PUBLISHED)
def test_published_settings_are_the_defaults_of_the_full_size(algo, env_id):
    words = ["--algo", algo, "--env-id", env_id, "--size", "full", "--device", "cpu"]
    args = asdict(sr.parse_args(words))
    everywhere = dict(
        actor_lr=2e-3,
        alpha_lr=5e-3,
        final_lr=1e-5,
        gamma=0.99,
        gae_lambda=0.95,
        horizon=32,
        critic_epochs=16,
        num_minibatches=4,
        alpha=1.0,
        target_entropy_scale=0.5,
    )
    for name, value in (everywhere | PUBLISHED[algo, env_id]).items():
        assert args[name] == value, name


@pytest.mark.parametrize("algo", ["sapo", "shac", "apg"])
def test_help_shows_each_preset_its_defaults(algo, capsys):
    words = ["--algo", algo, "--env-id", "AntRun", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        sr.parse_args([*words, "--help"])
    assert stop.value.code == 0 and "131072" in capsys.readouterr().out
    args = sr.parse_args([*words, "--alpha", "0.3"])
    small = sr.tuned(algo, "AntRun", "small") | dict(algo=algo, size="small", alpha=0.3)
    for name, value in small.items():
        assert getattr(args, name) == value, name


# --- Parts ----------------------------------------------------------------------------------------
def test_running_statistics_are_those_of_all_states():
    norm, batches = sr.RunningNorm(3), []
    for i in range(3):
        batches.append(torch.randn((4, 5, 3), generator=generator(i)) * (i + 1) + i)
        norm.update(batches[-1])
    norm.update(torch.full((2, 3), 1e7))  # absurd: left out
    every = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    mean = every.sum(0) / 61  # with one state of mean 0 and variance 1
    var = (every.square().sum(0) + 1) / 61 - mean.square()
    seen = norm({"state": every.float(), "points": torch.ones(2, 3)})
    expected = (every - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(seen["state"].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["points"], torch.ones(2, 3))


def test_a_window_is_normalised_by_the_statistics_from_before_it():
    args = arguments(critic_epochs=1)
    agent = new_agent(args)
    window = play(agent, PointMass(4), args)
    torch.testing.assert_close(window["obs"]["state"], window["state"] / math.sqrt(1 + 1e-5))
    learn(agent, window, args)
    assert float(agent.norm.count) == 1 + window["rewards"].numel()


def test_every_pass_of_the_critic_sees_every_sample_once(monkeypatch):
    args, seen = arguments(critic_epochs=3), []
    agent = new_agent(args)
    optimizer = sr.make_optimizers(agent, args)["critic_optimizer"]
    window, plain = play(agent, PointMass(4), args), sr.critic_loss

    def watched(critic, obs, targets):
        seen.append(targets)
        return plain(critic, obs, targets)

    monkeypatch.setattr(sr, "critic_loss", watched)
    sr.update_critic(agent, optimizer, window, torch.arange(32.0).view(8, 4), args)
    passes = torch.stack(seen).view(3, 32)
    assert len(seen) == 12 and not torch.equal(passes[0], passes[1])
    assert torch.equal(passes.sort(-1).values, torch.arange(32.0).expand(3, 32))


def test_learning_rates_fall_along_a_line():
    args = arguments()
    optimizers = sr.make_optimizers(new_agent(args), args)
    for share, rates in ((0.0, (2e-3, 5e-4)), (0.5, (1.005e-3, 2.55e-4)), (1.0, (1e-5, 1e-5))):
        sr.set_learning_rates(optimizers, args, share)
        found = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        assert (found["actor_optimizer"], found["critic_optimizer"]) == pytest.approx(rates)
        assert found["alpha_optimizer"] == 5e-3


def layers_of(net) -> list:
    return [layer for layer in net.modules() if not list(layer.children())]


@pytest.mark.parametrize("algo, gain", [("sapo", 1.0), ("shac", math.sqrt(2))])
def test_networks_are_the_published_ones(algo, gain):
    """Linear, LayerNorm, activation; a plain last layer; orthogonal weights and no biases yet."""
    args = arguments(algo, actor_units=(20, 12), critic_units=(8,))
    agent = new_agent(args, POINTS)
    activation = {"sapo": torch.nn.SiLU, "shac": torch.nn.ELU}[algo]
    outputs = 4 if algo == "sapo" else 2
    encoder = [(3, 64), (64, 128), (128, 256), (256, 64), (4, 128)]
    sizes = {
        agent.actor.net: encoder + [(192, 20), (20, 12), (12, outputs)],
        agent.critic: encoder + args.num_critics * [(192, 8), (8, 1)],
    }
    for net, expected in sizes.items():
        layers = layers_of(net)
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Linear)]
        assert [(layers[i].in_features, layers[i].out_features) for i in linear] == expected
        for i in linear:
            weight = layers[i].weight
            rows = weight if len(weight) <= weight.shape[1] else weight.T
            torch.testing.assert_close(
                rows @ rows.T, gain**2 * torch.eye(len(rows)), atol=1e-5, rtol=0
            )
            assert (layers[i].bias == 0).all()
            if len(weight) not in (1, outputs):
                assert isinstance(layers[i + 1], torch.nn.LayerNorm)
                assert isinstance(layers[i + 2], activation)


def test_particles_are_encoded_one_by_one_and_their_order_does_not_matter():
    agent = new_agent(arguments(), POINTS)
    state = torch.randn((6, 4), generator=generator())
    points = torch.randn((6, 5, 3), generator=generator())
    net = agent.actor.net
    each = torch.stack([net.each(points[:, k]) for k in range(5)]).mean(0)
    expected = net.heads[0](torch.cat([net.mean(each), net.low(state)], -1))
    torch.testing.assert_close(net({"state": state, "points": points})[0], expected)
    mixed = points[:, [3, 0, 4, 1, 2]]
    torch.testing.assert_close(net({"state": state, "points": mixed})[0], expected)


def test_the_deviation_is_the_states_own_and_within_its_bounds():
    agent = new_agent(arguments())
    state = {"state": torch.randn((6, 4), generator=generator())}
    assert agent.actor(state)[1].std(0).min() > 0.01, "it depends on the state"
    for shift, bound in ((50.0, 2.0), (-50.0, -5.0)):
        agent.actor.net.heads[0][-1].bias.data[2:] = shift  # after the two means
        mean, log_std = agent.actor(state)
        assert (log_std == bound).all() and (mean.abs() < 10).all()
    assert (new_agent(arguments("shac")).actor(state)[1] == -1).all()


# --- Runs -----------------------------------------------------------------------------------------
def interrupted_at(step: int, monkeypatch):
    """Ctrl-C arrives while the training environment takes this step."""

    class Interrupted(PointMass):
        def step(self, actions):
            if self.total == step:
                signal.raise_signal(signal.SIGINT)
            return super().step(actions)

    def make(args):
        env, eval_env = make_fakes(args)
        env.__class__ = Interrupted
        return env, eval_env

    monkeypatch.setattr(sr, "make_envs", make)


@pytest.mark.parametrize(
    "algo, env_id", [("sapo", "Fake points"), ("shac", "Fake"), ("apg", "Fake")]
)
def test_ctrl_c_saves_and_resume_continues_exactly(fake, algo, env_id, monkeypatch):
    """2N steps equal N steps and then N more, bit for bit, though the run went on for a while."""
    args = arguments(algo, env_id=env_id, name="whole", total_timesteps=128)
    handler = signal.getsignal(signal.SIGINT)
    sr.train(args)
    with monkeypatch.context() as patch:
        interrupted_at(20, patch)  # within the third window, which no evaluation follows
        with pytest.raises(
            SystemExit, match="^interrupted at step 96: continue with --resume runs/half$"
        ):
            sr.train(replace(args, name="half"))
    assert signal.getsignal(signal.SIGINT) == handler
    assert sr.load("runs/half/checkpoint.pt")["progress"]["global_step"] == 96
    for path in Path("runs/half").glob("*.csv"):
        path.write_bytes(path.read_bytes() + b"999999,1,1\r\n")
    sr.train(sr.parse_args(["--resume", "runs/half"]))
    one, two = sr.load("runs/whole/checkpoint.pt"), sr.load("runs/half/checkpoint.pt")
    for name in ("agent", "env", "obs", "random", "actor_optimizer", "alpha_optimizer"):
        torch.testing.assert_close(one[name], two[name], atol=0, rtol=0)
    for file in ("eval.csv", "metrics.csv"):
        rows = []
        for name in ("whole", "half"):
            found = table(f"runs/{name}/{file}")
            rows.append([{k: v for k, v in row.items() if "time" not in k} for row in found])
        assert rows[0] == rows[1] and len(rows[0]) >= 2


def test_a_run_that_dies_before_its_first_evaluation_can_be_continued(fake, monkeypatch):
    args = arguments(name="run")
    with monkeypatch.context() as patch:
        patch.setattr(sr, "rollout", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sr.train(args)
    assert sr.load("runs/run/checkpoint.pt")["progress"]["global_step"] == 0
    sr.train(sr.parse_args(["--resume", "runs/run"]))
    sr.train(replace(args, name="whole"))
    assert not differences(weights("run"), weights("whole"))


def test_resume_takes_the_runs_arguments_and_refuses_others_by_name(fake):
    sr.train(arguments("shac", name="run", total_timesteps=32, gamma=0.8))
    resume = ["--resume", "runs/run"]
    args = sr.parse_args([*resume, "--total-timesteps", "90", "--gamma", "0.8"])
    assert (args.gamma, args.total_timesteps, args.algo, args.name) == (0.8, 90, "shac", "run")
    refused = (["--gamma", "0.9"], ["--algo", "apg"], ["--critic-lr", "0.5"], ["--seed", "2"])
    for words in refused:
        with pytest.raises(ValueError, match=f"^{words[0]} cannot change on --resume of runs/run"):
            sr.parse_args([*resume, *words])
    with pytest.raises(ValueError, match="^--device must stay cpu"):
        sr.parse_args([*resume, "--device", "cuda"])


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(fake, monkeypatch):
    sr.train(arguments(name="run", total_timesteps=32))
    before = {path.name: path.read_bytes() for path in Path("runs/run").iterdir()}

    def refuse(self, state):
        raise ValueError("saved environment has reward_name 'default'")

    monkeypatch.setattr(PointMass, "load_state_dict", refuse)
    with pytest.raises(ValueError, match="reward_name"):
        sr.train(sr.parse_args(["--resume", "runs/run", "--total-timesteps", "64"]))
    assert {path.name: path.read_bytes() for path in Path("runs/run").iterdir()} == before


def test_existing_runs_are_not_overwritten(fake):
    sr.train(arguments(name="run", total_timesteps=32))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sr.train(arguments(name="run"))


def test_runs_with_one_seed_are_equal_and_seeds_differ(fake):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sr.train(arguments(name=name, seed=seed, total_timesteps=64))
    assert not differences(weights("a"), weights("b"))
    assert differences(weights("a"), weights("c"))


def score(act, envs=32) -> float:
    """Mean return of whole episodes on the evaluation's first states."""
    env = PointMass(envs, horizon=20)
    obs = env.reset(seed=sr.EVAL_SEED)
    with torch.no_grad():
        for _ in range(20):
            obs, *_, info = env.step(act(obs))
    return float(info["episode"]["return"].mean())


@pytest.mark.parametrize("algo", ["sapo", "shac", "apg"])
def test_a_point_learns_to_go_to_the_middle(fake, algo):
    """At least two thirds of the way from a random policy to 14, about what the best one gets."""
    draws = generator(5)
    random = score(lambda obs: torch.rand((32, 2), generator=draws) * 2 - 1)
    args = arguments(
        algo,
        name=algo,
        num_envs=16,
        horizon=16,
        total_timesteps=16 * 16 * 60,
        eval_freq=10**6,
        critic_epochs=4,
        actor_units=(32, 32),
        critic_units=(32, 32),
    )
    sr.train(args)
    learned = score(sr.Policy(f"runs/{algo}/checkpoint.pt").act)
    assert random < 2 and learned > random + 2 / 3 * (14 - random), (random, learned)
    rows = table(f"runs/{algo}/metrics.csv")
    assert len(rows) == 60 and float(rows[-1]["train/return"]) > float(rows[0]["train/return"])


def test_nan_resets_are_counted_over_the_run(fake):
    sr.train(arguments(env_id="Fake nan", name="run", total_timesteps=160))
    counts = [float(row["train/nan_resets"]) for row in table("runs/run/metrics.csv")]
    assert counts == [1, 1, 1, 2, 2]


def test_stops_at_nan_and_names_the_tensor(fake, monkeypatch):
    plain = sr.update_critic

    def spoil(agent, *given):
        metrics = plain(agent, *given)
        agent.critic.heads[1][1].bias.data[0] = math.inf
        return metrics

    monkeypatch.setattr(sr, "update_critic", spoil)
    words = r"^critic.heads.1.1.bias is not finite at step 32; last .*runs/run/checkpoint.pt$"
    with pytest.raises(FloatingPointError, match=words):
        sr.train(arguments(name="run"))
    assert sr.load("runs/run/checkpoint.pt")["progress"]["global_step"] == 0


def test_evaluation_repeats_and_leaves_training_alone(fake):
    sr.train(arguments(name="often", eval_freq=32, capture_video=True))
    sr.train(arguments(name="seldom", eval_freq=1000))
    assert not differences(weights("often"), weights("seldom"))
    assert len(list(Path("runs/often/videos").glob("*.mp4"))) == 3
    words = ["--evaluate", "--checkpoint", "runs/often/checkpoint.pt", "--capture-video"]
    results = [sr.train(sr.parse_args(words)) for _ in range(2)]
    last = table("runs/often/eval.csv")[-1]
    assert results[0] == results[1] and results[0]["eval/return"] == float(last["eval/return"])
    assert Path("runs/often/videos/evaluate.mp4").exists()


def test_best_is_the_best_and_no_later_one(fake, monkeypatch):
    returns = iter([1.0, 3.0, 2.0, 3.0])
    monkeypatch.setattr(sr, "evaluate", lambda *given: {"eval/return": next(returns)})
    sr.train(arguments(name="run", total_timesteps=128, eval_freq=32))
    best = sr.load("runs/run/best.pt")
    assert best["progress"]["global_step"] == 64 and best["progress"]["best"] == 3.0
    assert differences(best["agent"], weights("run"))


def test_each_environment_counts_once_in_an_evaluation():
    """Environment 1 terminates at once; the others stand still for six steps."""
    env = PointMass(3, horizon=6)

    def reset(seed):
        env.state = torch.zeros(3, 4)
        env.state[:, 0] = 0.5
        env.state[1] = torch.tensor([1.0, 0.0, 25.0, 0.0])
        env.clock, env.returns = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
        return env._observe(env.state)

    env.reset = reset
    still = SimpleNamespace(act=lambda obs: torch.zeros(3, 2))
    results = sr.evaluate(still, env, arguments(), Path("unused.mp4"))
    returns = torch.tensor([6 * 0.75, 1 - (1 + 0.1 * 0.95 * 25) ** 2, 6 * 0.75])
    half = 1.96 * float(returns.std()) / math.sqrt(3)
    assert results["eval/return"] == pytest.approx(float(returns.mean()), rel=1e-5)
    assert results["eval/return_std"] == pytest.approx(float(returns.std()), rel=1e-5)
    assert results["eval/ci_high"] - results["eval/return"] == pytest.approx(half, rel=1e-5)
    assert results["eval/return"] - results["eval/ci_low"] == pytest.approx(half, rel=1e-5)


def test_policy_from_the_file_takes_the_mean_action(fake):
    sr.train(arguments(name="run", env_id="Fake points", total_timesteps=64))
    before = torch.get_rng_state()
    policy = sr.Policy("runs/run/best.pt")
    obs = PointMass(7, points=True).reset()
    actions = policy.act(obs)
    assert torch.equal(torch.get_rng_state(), before), "no random number is drawn"
    agent = new_agent(arguments(), POINTS)
    agent.load_state_dict(weights("run", "best"))
    torch.testing.assert_close(actions, torch.tanh(agent.actor(agent.norm(obs))[0]))
    assert torch.equal(policy.act({name: value.numpy() for name, value in obs.items()}), actions)


# --- Command line ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, message",
    [
        (["--evaluate"], "--evaluate and --checkpoint"),
        (["--horizon", "0"], "--horizon must be at least 1"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--eval-freq", "0"], "--eval-freq must be at least 1"),
        (["--num-minibatches", "5"], "--num-minibatches must divide"),
        (["--alpha", "0"], "--alpha must be above 0"),
        (["--env-id", "nothing"], "nothing"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
        (["--checkpoint", str(SCRIPT)], "is no checkpoint"),
    ],
)
def test_choices_that_cannot_work_are_named_in_one_line(words, message, tmp_path, monkeypatch):
    pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        sr.train(sr.parse_args(["--device", "cpu", *words]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_environments_are_made_as_the_arguments_say(monkeypatch):
    """Training starts spread over the episode and with its own seed; the evaluation in step."""
    import envs

    made = []
    monkeypatch.setattr(envs, "make", lambda *args, **options: made.append((args, options)))
    args = arguments(seed=7, stagger=True, reward="paper", size="small", recompute=False)
    common = dict(reward="paper", size="small", checkpoint=False, window=8)
    sr.make_envs(args)
    assert made[0] == (("Fake", 4, "cpu"), dict(seed=sr.EVAL_SEED) | common)
    assert made[1] == (("Fake", 4, "cpu"), dict(seed=7, stagger=True) | common)
    assert sr.make_envs(replace(args, evaluate=True))[0] is None and len(made) == 3


def test_the_command_line_prints_an_error_without_a_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--evaluate"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: --evaluate and --checkpoint")
