"""ResFiT: today's numbers against those of f2f0a1a, queue and relabelling by hand, and runs on a tiny task."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import resfit as rf
import torch
import torch.nn as nn
from fake_env import FakeEnv

h5py = pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- A tiny task: the dot of fake_env, a base that is too slow, demonstrations that are not --------
class Slow(nn.Module):
    """The next 4 actions: to the middle, at a third of the pace that is needed."""

    def forward(self, state, rgb=None):
        chunk = (-state[:, None, :2]).expand(-1, 4, -1)
        if rgb is not None:
            chunk = chunk + 0.01 * rgb.float().mean((1, 2, 3))[:, None, None] / 255
        return chunk * torch.tensor([0.3, 0.2, 0.1, 0.05])[None, :, None]


def export(module, example, path, **about):
    dynamic = tuple({0: torch.export.Dim("n", min=1)} for _ in example)
    program = torch.export.export(module, example, dynamic_shapes=dynamic)
    extra = {"base.json": json.dumps(about)} if about else {}
    torch.export.save(program, path, extra_files=extra)


def record(path, episodes=12):
    """Demonstrations of various lengths, in robomimic's layout; every third fails."""
    env = FakeEnv(1, seed=5, stagger=False, asymmetric=True)
    with h5py.File(path, "w") as file:
        for i in range(episodes):
            rows, obs = [], env.reset()
            for _ in range(6):
                action = (-obs["privileged"] * (3 if i % 3 else -1)).clamp(-1, 1)
                following, *_, info = env.step(action)
                rows.append((obs, action, bool(info["success"])))
                obs = following
            group = file.create_group(f"data/demo_{i}")
            group["actions"] = torch.cat([row[1] for row in rows])
            group["rewards"] = np.array([row[2] for row in rows], np.float32)
            for key, name in (
                ("state", "state"),
                ("privileged", "privileged"),
                ("rgb", "wrist_image"),
            ):
                group[f"obs/{name}"] = torch.cat([row[0][key] for row in rows])


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with base.pt2, base_pixels.pt2 and demos.hdf5."""
    folder = tmp_path_factory.mktemp("resfit")
    state, rgb = torch.zeros(2, 5), torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    export(Slow(), (state,), folder / "base.pt2", env_id="Fake", obs="state", execute=3)
    export(Slow(), (state[:, :3], rgb), folder / "base_pixels.pt2", env_id="Fake", obs="pixels")
    record(folder / "demos.hdf5")
    return folder


def make_fakes(args):
    options = dict(stagger=False, asymmetric=args.obs == "state")
    eval_env = FakeEnv(args.eval_envs, seed=1, **options)
    return (None if args.evaluate else FakeEnv(args.num_envs, seed=args.seed, **options)), eval_env


@pytest.fixture
def fake(monkeypatch, tmp_path, files):
    """Train on the dot, with runs/ in a temporary folder."""
    monkeypatch.setattr(rf, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return files


def arguments(folder=Path(), **changes) -> rf.Args:
    """A small run on the CPU."""
    pixels = changes.get("obs") == "pixels"
    values = dict(
        env_id="Fake", device="cpu", demos=str(folder / "demos.hdf5"), num_envs=3, total_timesteps=120, eval_freq=60,
        base=str(folder / ("base_pixels.pt2" if pixels else "base.pt2")), log_freq=30, eval_episodes=8, eval_envs=4,
        hidden=8, batch_size=16, buffer_size=600, learning_starts=30, critic_warmup=3, utd=0.5, heads=4, lr=1e-3,
        policy_frequency=2, actor_lr=1e-3, encoder_dim=8, image_size=16, capture_video=False,
    )  # fmt: skip
    return rf.Args(**values | changes)


# --- The same numbers as before -----------------------------------------------------------------
RENAMED = {"normalize.": "", "tokens.": ""}
CASES = {"published": {}, "pixels": dict(obs="pixels")}


def golden(name: str) -> dict:
    """Entries of golden/resfit.npz that begin with `name`/, as tensors, in nested dicts."""
    found = {}
    with np.load(Path(__file__).parent / "golden/resfit.npz") as file:
        for key in file.files:
            top, *path, last = key.split("/")
            if top != name:
                continue
            part = found
            for word in path:
                part = part.setdefault(word, {})
            array = file[key]
            part[last] = list(array) if last == "names" else torch.from_numpy(array)
    return found


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def golden_agent(saved: dict, args: rf.Args) -> rf.Agent:
    shapes = {key: list(value.shape[1:]) for key, value in saved["batch"]["obs"].items()}
    agent = rf.Agent(shapes | {"actions": [2]}, args)
    state, at = agent.state_dict(), 0
    for name in saved["names"]:
        for before, after in RENAMED.items():
            name = name.replace(before, after)
        size = state[name].numel()
        state[name].copy_(saved["weights"][at : at + size].view_as(state[name]))
        at += size
    assert at == len(saved["weights"])
    return agent


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_actions_are_those_of_f2f0a1a(case, monkeypatch):
    def choose(agent, obs, noise, heads):
        return rf.choose(agent, obs, noise)

    compare_with_golden(case, choose, monkeypatch, **CASES[case])


def compare_with_golden(case: str, choose, monkeypatch, **changes):
    """golden/resfit.npz: made by f2f0a1a's critic_loss, actor_loss, propose, select and update.

    There the residual was let through by a factor, 0.6, and its square had a weight, 0.7.
    """
    saved, close = golden(case), dict(atol=1e-6, rtol=1e-6)
    small = dict(hidden=4, heads=3, encoder_dim=4, limit=(0.3, 0.1), noise=0.3, tau=0.25)
    args = arguments(**small | changes)
    monkeypatch.setattr(rf, "NOISE_CLIP", 0.2)
    monkeypatch.setattr(rf, "PAD", 1)
    agent, draws = golden_agent(saved, args), saved["draws"]
    for actor in (agent.actor, agent.actor_target):
        full = actor.forward
        actor.forward = lambda x, base, full=full: 0.6 * full(x, base)
    batch = dict(saved["batch"])
    obs = batch.pop("obs")
    batch |= obs | {"next_" + key: value for key, value in batch.pop("next_obs").items()}
    batch |= {"noise": draws["noise"], "heads": draws["heads"]}
    if "rgb" in batch:
        batch["rgb"] = rf.random_shift(batch["rgb"], draws["shift"])
        batch["next_rgb"] = rf.random_shift(batch["next_rgb"], draws["next_shift"])
    loss, x, metrics = rf.critic_loss(agent, batch, args)
    torch.testing.assert_close(loss, saved["qf_loss"], **close)
    torch.testing.assert_close(x, saved["features"], **close)
    torch.testing.assert_close(metrics["train/q"], saved["q"], **close)
    torch.testing.assert_close(metrics["train/target"], saved["target"], **close)
    if "qf_grads" in saved:
        values = agent.critic_optimizer.param_groups[0]["params"]
        gradients = flat(torch.autograd.grad(loss, values))
        torch.testing.assert_close(gradients, saved["qf_grads"], **close)
    loss, metrics = rf.actor_loss(agent, batch, x)
    loss = loss + 0.7 * (agent.actor(x, batch["base"]) / agent.actor.limit / 0.6).square().mean()
    torch.testing.assert_close(loss, saved["actor_loss"], **close)
    torch.testing.assert_close(metrics["train/residual"], 0.6 * saved["residual"], **close)
    gradients = flat(torch.autograd.grad(loss, list(agent.actor.parameters())))
    torch.testing.assert_close(gradients, saved["actor_grads"], **close)

    if "rgb" in obs:
        obs["rgb"] = rf.random_shift(obs["rgb"], draws["shift"])
    noise = args.noise * draws["noise"]
    actions = choose(agent, obs, noise, draws["heads"])
    torch.testing.assert_close(actions, saved["actions"], **close)
    if "updated" in saved:
        rf.update(agent, batch, True, args)
        state = agent.state_dict()
        names = [name.replace("normalize.", "") for name in saved["names"]]
        updated = flat(state[name] for name in names)
        torch.testing.assert_close(updated, saved["updated"], atol=1e-5, rtol=1e-5)


def test_n_step_sums_are_those_of_f2f0a1a():
    """golden/resfit.npz: what f2f0a1a's Replay sampled of 50 steps of three environments."""
    saved = golden("n_step")
    replay = rf.Replay(64, 3, arguments(n_step=3, gamma=0.9))
    for t in range(50):
        rewards, dones = saved["rewards"][t], saved["dones"][t]
        step = {"state": torch.full((3, 1), t), "actions": torch.zeros(3, 1), "rewards": rewards}
        replay.add(step | {"discounts": (~dones).float()})
    at = torch.arange(47).repeat_interleave(3)
    env = torch.arange(3).repeat(47)
    batch = replay.transitions(at, env)
    torch.testing.assert_close(batch["rewards"], saved["sums"][at, env], atol=1e-6, rtol=1e-6)
    wanted = saved["discounts_out"][at, env]
    torch.testing.assert_close(batch["discounts"], wanted, atol=1e-6, rtol=1e-6)
    through = wanted > 0
    assert torch.equal(batch["next_state"][through, 0], at[through] + 3)


def test_transitions_of_exposed_episodes_come_four_times_as_often_and_first():
    """One environment of eight is exposed: half of a batch; four of eight: all of it."""
    for exposed, share in ((1, 0.5), (4, 1.0)):
        replay = rf.Replay(50, 8, arguments(n_step=3))
        mask = torch.arange(8) < exposed
        for t in range(60):
            step = {"state": torch.arange(8.0)[:, None], "actions": torch.full((8, 1), t)}
            replay.add(step | dict(rewards=torch.zeros(8), discounts=torch.ones(8), exposed=mask))
        torch.manual_seed(0)
        batch = replay.sample(1600)
        env, at = batch["state"][:, 0], batch["actions"][:, 0]
        seen = env < exposed
        assert seen.float().mean().item() == pytest.approx(share, abs=0.05)
        assert (seen.int().diff() <= 0).all()
        assert len(env.unique()) == (8 if share < 1 else 4)
        assert sorted(at.unique().tolist()) == list(range(10, 57))


def test_demonstrations_are_relabelled_as_by_f2f0a1a(tmp_path):
    """golden/resfit.npz: f2f0a1a's store_demos, a base of 4 actions of which 3 are executed."""
    saved, first = golden("relabel"), 0
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for i, length in enumerate(saved["lengths"].tolist()):
            group, rows = file.create_group(f"data/demo_{i}"), slice(first, first + length)
            group["obs/state"] = saved["states"][rows]
            group["actions"] = saved["actions"][rows]
            group["rewards"] = np.arange(length) == length - 1
            first += length
    weight = saved["weight"]
    base = rf.ChunkQueue(lambda state: (state @ weight).tanh().view(-1, 4, 2), 3)
    shapes = {
        key: list(saved[name].shape[1:])
        for key, name in (("state", "states"), ("actions", "actions"))
    }
    replay = rf.store_demos(arguments(tmp_path), base, shapes)
    assert len(replay) == first + 3  # padded by n_step
    torch.testing.assert_close(replay.data["state"][:first, 0], saved["states"])
    for key in ("actions", "base", "rewards", "discounts"):
        torch.testing.assert_close(replay.data[key][:first, 0], saved[key], atol=1e-6, rtol=1e-6)


# --- Base, buffer and collector -----------------------------------------------------------------
class Counting:
    """A program whose chunks tell when they were asked for: action i of query j is (j, i) / 100."""

    queries = 0

    def __call__(self, state):
        self.queries += 1
        i = torch.arange(4) / 100
        row = torch.stack([torch.full_like(i, self.queries / 100), i], -1)
        return row.expand(len(state), -1, -1)


def test_queue_asks_at_chunk_ends_and_after_resets_and_nowhere_else():
    queue, obs = rf.ChunkQueue(Counting(), 3), {"state": torch.zeros(2, 4)}
    queue.reset(torch.tensor([True, True]))
    seen = [(queue.act(obs) * 100).round().int().tolist() for _ in range(4)]
    assert seen == [[[1, 0]] * 2, [[1, 1]] * 2, [[1, 2]] * 2, [[2, 0]] * 2]  # three of the four
    queue.reset(torch.tensor([False, True]))
    assert (queue.act(obs) * 100).round().int().tolist() == [[2, 1], [3, 0]]
    queue.reset(torch.ones(5, dtype=torch.bool))  # another number of environments
    assert queue.act({"state": torch.zeros(5, 4)}).shape == (5, 2)


def test_a_ring_that_wraps_never_tears_an_episode():
    small, large = rf.Replay(23, 2, arguments()), rf.Replay(400, 2, arguments())
    draw = torch.Generator().manual_seed(0)
    for t in range(300):
        rewards, ends = torch.rand(2, generator=draw), torch.rand(2, generator=draw) < 0.2
        number = torch.full((2, 1), float(t))
        step = dict(state=number, actions=number, rewards=rewards, discounts=(~ends).float())
        for replay in (small, large):
            replay.add(step)
    torch.manual_seed(0)
    batch = small.sample(500)
    at = batch["actions"][:, 0].long()
    assert at.min() == 300 - 23 and at.max() == 300 - 3 - 1
    both = [large.transitions(at, torch.full_like(at, env)) for env in (0, 1)]
    env = (batch["rewards"] != both[0]["rewards"]).long()
    for key in ("rewards", "discounts"):
        wanted = torch.where(env == 0, both[0][key], both[1][key])
        torch.testing.assert_close(batch[key], wanted, atol=0, rtol=0)
    assert torch.equal(batch["next_state"][:, 0], at + 3.0)


def collector(args: rf.Args, agent=None, global_step=0):
    env = FakeEnv(args.num_envs, seed=1, stagger=False, asymmetric=True)
    executed, step = [], env.step

    def spy(actions):
        executed.append(actions.clone())
        return step(actions)

    env.step = spy
    agent = agent or rf.Agent({"state": [5], "actions": [2]}, args)
    progress = rf.fresh_progress() | {"global_step": global_step}
    return rf.Collector(args, env, rf.ChunkQueue(Slow(), 3), agent, progress), executed


def test_zero_residual_is_the_base_bit_for_bit():
    args = arguments(noise=0.0)
    acting, _ = collector(args, global_step=args.learning_starts)
    steps = [acting.step() for _ in range(25)]
    env = FakeEnv(3, seed=1, stagger=False, asymmetric=True)
    base, obs = rf.ChunkQueue(Slow(), 3), env.reset(args.seed)
    base.reset(torch.ones(3, dtype=torch.bool))
    for step in steps:  # by hand: the base alone, in the same episodes
        actions = base.act(rf.observe(obs, args))
        assert torch.equal(step["actions"], actions) and torch.equal(step["base"], actions)
        obs, _, _, truncations, _ = env.step(actions)
        base.reset(truncations)
    assert torch.equal(acting.env.place, env.place)


@pytest.mark.parametrize("warm", [True, False])
def test_no_noise_passes_the_bound_and_what_is_stored_was_executed(warm):
    args = arguments(limit=(0.2, 0.0), noise=30.0, warmup_noise=7.0)
    agent = rf.Agent({"state": [5], "actions": [2]}, args)
    nn.init.normal_(agent.actor.policy[-1].weight, std=50.0)
    acting, executed = collector(args, agent, 0 if warm else args.learning_starts)
    largest = 0.0
    for _ in range(60):
        step = acting.step()
        moved = (step["actions"] - step["base"]).abs()
        assert torch.equal(step["actions"], executed[-1])
        assert moved[:, 0].max() <= 0.2 + 1e-6 and moved[:, 1].max() == 0
        largest = max(largest, float(moved[:, 0].max()))
    assert largest > 0.19


# --- The guard ----------------------------------------------------------------------------------
def guarded(successes, num_envs=1, bar=0.5, **changes) -> tuple[rf.Collector, list]:
    """A collector whose episodes last one step; `successes` is what becomes of the exposed ones, the base's succeed."""
    args = arguments(num_envs=num_envs, **changes)
    acting, _ = collector(args)
    acting.progress |= {"bar": bar, "credit": 0.0}
    acting.exposed[:] = False
    exposures, outcomes = [], iter(successes)

    def step(actions):
        ends = torch.ones(num_envs, dtype=torch.bool)
        success = torch.tensor([bool(next(outcomes)) if x else True for x in acting.exposed])
        exposures.append(acting.exposed.tolist())
        return acting.env.obs, None, ends, ~ends, {"success": success}

    acting.env.step = step
    return acting, exposures


def test_the_account_by_hand():
    """delta 1/4, p0+ 1/2, B 1: two episodes pay for one, which fails; a success pays for many."""
    outcomes = [False, True, True, False, False, False]
    acting, exposures = guarded(outcomes, allowance=0.25, credit=1.0)
    credits = []
    for _ in range(10):
        acting.step()
        credits.append(acting.progress["credit"])
    assert credits == [0.25, 0, 0.25, 0, 0.5, 0.5, 0.25, 0, 0.25, 0]
    assert [row[0] for row in exposures] == [i in (2, 4, 5, 6, 7, 8) for i in range(10)]


@pytest.mark.parametrize("num_envs", [1, 5])
def test_the_promise_of_the_account_holds_for_any_outcomes(num_envs):
    """After n episodes sum(p0+ - X) <= delta n; between two moments delta k + B + N - 1."""
    draw = np.random.default_rng(0)
    outcomes = np.concatenate(
        [np.zeros(50), np.ones(300), np.zeros(100), draw.integers(0, 2, 9999)]
    )
    acting, exposures = guarded(outcomes, num_envs, 0.6, allowance=0.07, credit=3.0)
    for _ in range(1500):
        acting.step()
    exposed = np.array(exposures).ravel()
    losses = np.zeros(len(exposed))
    losses[exposed] = 0.6 - outcomes[: exposed.sum()]
    sums = np.concatenate([[0.0], losses.cumsum()])
    n = np.arange(len(sums))
    assert (sums <= 0.07 * n + 1e-9).all()
    slack = sums - 0.07 * n
    largest = (slack - np.minimum.accumulate(slack)).max()
    assert 1.5 < largest <= 3.0 + num_envs - 1
    assert exposed[-500:].mean() > 0.05


def test_the_account_is_that_of_the_simulation():
    benchmark = pytest.importorskip("guard")
    rule = benchmark.Account(np.full(benchmark.REPEATS, 0.6), 3.0, None)
    outcomes = np.random.default_rng(1).integers(0, 2, 999)
    acting, exposures = guarded(outcomes, 1, 0.6, allowance=benchmark.DELTA, credit=3.0)
    played, used = [False], 0  # the collector's first episode began before there was a bar
    for _ in range(200):
        chosen = bool(rule.choose()[0])
        played.append(chosen)
        rule.see(np.full(benchmark.REPEATS, chosen), np.full(benchmark.REPEATS, outcomes[used]))
        used += chosen
    for _ in range(201):
        acting.step()
    assert [row[0] for row in exposures] == played and used > 10
    for successes in (0, 30, 128, 256):
        bound = rf.upper_bound(successes / 256, 256)
        assert bound == pytest.approx(benchmark.upper_bound(successes, 256), abs=1e-6)


def test_bounds_are_clopper_and_pearsons():
    """Values that have a closed form: none of n succeed, or all do."""
    assert rf.upper_bound(0.0, 64) == pytest.approx(1 - 0.05 ** (1 / 64))
    assert 1 - rf.upper_bound(0.0, 64) == pytest.approx(0.05 ** (1 / 64))
    assert rf.upper_bound(1.0, 64) == pytest.approx(1.0)
    assert rf.upper_bound(0.5, 20) == pytest.approx(0.69805, abs=1e-4)  # binomial(20, p) <= 10


def test_exposed_episodes_alone_have_noise():
    acting, _ = collector(arguments(num_envs=8, allowance=0.3, credit=9.0))
    steps = [acting.step() for _ in range(60)]
    for step in steps:
        moved = (step["actions"] != step["base"]).any(-1)
        assert torch.equal(moved, step["exposed"])
    exposed = torch.stack([step["exposed"] for step in steps]).float().view(6, 10, 8)
    assert ((exposed.mean(1) == 0) | (exposed.mean(1) == 1)).all() and 0 < exposed.mean() < 1


def test_a_guarded_run_deploys_the_base_until_the_bound_says_otherwise(fake, monkeypatch):
    """The base solves 64 of 256, p0+ is 0.30; 20 of 64 are not enough for p1-, 30 of 64 are."""
    rates, evaluate, seen = iter([0.25, 0.3125, 0.46875]), rf.evaluate, []

    def rated(policy, env, episodes, video):
        seen.append((policy.deploys, episodes))
        return evaluate(policy, env, episodes, video) | {"eval/success_rate": next(rates)}

    monkeypatch.setattr(rf, "evaluate", rated)
    out = rf.train(arguments(fake, name="a", allowance=0.05, eval_episodes=64, eval_envs=64))
    assert seen == [(False, 256), (True, 64), (True, 64)]
    assert out["bar"] == pytest.approx(0.2986, abs=1e-3)
    table = rows("runs/a/eval.csv")
    assert [float(row["eval/success_rate"]) for row in table] == [0.25, 0.25, 0.46875]
    assert [float(row["eval/residual"]) for row in table] == [0.25, 0.3125, 0.46875]
    assert [row["eval/deploys"] for row in table] == ["0", "0", "1"]
    policy = rf.Policy("runs/a/best.pt", base=str(fake / "base.pt2"))
    assert policy.deploys
    policy.deploys, env = False, FakeEnv(4, asymmetric=True)
    policy.reset(torch.ones(4, dtype=torch.bool))
    base = rf.ChunkQueue(Slow(), 3)
    base.reset(torch.ones(4, dtype=torch.bool))
    assert torch.equal(policy.act(env.obs), base.act(rf.observe(env.obs, policy.args)))


def test_the_target_bootstraps_what_an_exposed_episode_executes():
    """The critics prefer the base's action by far, and the target takes the residual's all the same."""
    args = arguments(noise=0.0, limit=(1.0,))
    agent = rf.Agent({"state": [5], "actions": [2]}, args)
    nn.init.constant_(agent.actor_target.policy[-1].bias, 9.0)
    agent.critics_target.forward = lambda x, actions, heads: -actions.sum(-1).expand(2, -1)
    batch = dict(next_state=torch.zeros(3, 5), next_base=torch.full((3, 2), -1.0), heads=None)
    batch |= dict(noise=torch.zeros(3, 2), rewards=torch.zeros(3))
    batch |= dict(discounts=torch.ones(3), state=torch.zeros(3, 5), actions=torch.zeros(3, 2))
    _, _, metrics = rf.critic_loss(agent, batch, args)
    torch.testing.assert_close(metrics["train/target"], torch.tensor(0.0), atol=1e-4, rtol=0)


def test_shift_moves_images(monkeypatch):
    monkeypatch.setattr(rf, "PAD", 2)
    draw = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (3, 12, 12, 6), dtype=torch.uint8, generator=draw)
    offsets = torch.tensor([[0, 0], [2, 2], [4, 1]])
    shifted = rf.random_shift(rgb, offsets)
    for i, (dy, dx) in enumerate(offsets.tolist()):
        padded = np.pad(rgb[i].numpy(), ((2, 2), (2, 2), (0, 0)), mode="edge")
        assert np.array_equal(shifted[i].numpy(), padded[dy : dy + 12, dx : dx + 12])


# --- Demonstrations -----------------------------------------------------------------------------
def write(path, successes, **obs):
    with h5py.File(path, "w") as file:
        for i, success in enumerate(successes):
            group = file.create_group(f"data/demo_{i}")
            group["actions"] = np.zeros((len(success), 2))
            group["rewards"] = np.array(success, float)
            for key, size in obs.items():
                group[f"obs/{key}"] = np.full((len(success), size), float(len(key)))
        file["mask/valid"] = np.array([b"demo_2"])


def test_demonstrations_stop_at_the_first_success_and_failures_are_left_out(tmp_path):
    write(tmp_path / "a.hdf5", ([0, 0, 1, 1], [0, 0, 0], [0, 1]), state=3, privileged=2)
    train, valid = rf.read_demos(str(tmp_path / "a.hdf5"), ())
    assert [len(demo["actions"]) for demo in train] == [3]
    assert [len(demo["actions"]) for demo in valid] == [2]
    assert train[0]["state"].tolist() == [[10, 10, 5, 5, 5]] * 3  # the true state in front
    write(tmp_path / "b.hdf5", ([0, 0],), state=3)
    with pytest.raises(ValueError, match="no successful demonstration"):
        rf.read_demos(str(tmp_path / "b.hdf5"), ())
    with pytest.raises(ValueError, match="no demonstrations in robomimic's layout"):
        rf.read_demos(str(tmp_path / "none.hdf5"), ())


def test_robomimics_own_names(tmp_path):
    names = dict(
        object=2, robot0_gripper_qpos=2, robot0_eef_pos=3, robot0_eef_quat=4, robot0_eef_vel=3
    )
    write(tmp_path / "can.hdf5", ([0, 1],), **names)
    state = rf.read_demos(str(tmp_path / "can.hdf5"), ())[0][0]["state"][0].tolist()
    arm = [14.0] * 3 + [15.0] * 4 + [19.0] * 2
    assert state == [*arm, 6.0, 6.0, *arm]


# --- Programs -----------------------------------------------------------------------------------
def test_a_program_of_layers_gives_the_same_for_any_number_of_rows(tmp_path):
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(
                8, 4, 16, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.embed, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
            self.register_buffer("queries", torch.randn(4, 8))

        def forward(self, state):
            n = state.shape[0]
            x = self.embed(state)[:, None] + self.queries.expand(n, -1, -1)
            return self.out(self.layer(x) + 0 * torch.randn(n, 4, 8))

    torch.manual_seed(0)
    base, path = Base().eval(), str(tmp_path / "base.pt2")
    with torch.no_grad():
        export(base, (torch.zeros(2, 5),), path)
    for n in (1, 2, 7):
        queue, state = rf.open_base(arguments(base=path)), torch.randn(n, 5)
        queue.reset(torch.ones(n, dtype=torch.bool))
        wanted = base(state).clamp(-1, 1)
        for i in range(4):  # all of the chunk: nothing says how many
            torch.testing.assert_close(queue.act({"state": state}), wanted[:, i])


# --- Runs ---------------------------------------------------------------------------------------
def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a: dict, b: dict):
    """Whether two checkpoints are equal, bit for bit, times aside."""
    assert a.keys() == b.keys()
    optimizers = ("critic_optimizer", "actor_optimizer")
    for key in ("agent", "queue", "env", "collector", "replay", "random", *optimizers):
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)
    for key in a["progress"].keys() - {"wall_time", "train_time"}:
        assert a["progress"][key] == b["progress"][key], key


def test_a_run_trains_evaluates_and_writes_what_the_page_says(fake):
    out = rf.train(arguments(fake, name="a", save_buffer=True, capture_video=True))
    run = Path(out["run"])
    written = {path.name for path in run.iterdir()}
    assert written == {"args.json", "metrics.csv", "eval.csv", "best.pt", "checkpoint.pt", "videos"}
    assert [int(row["global_step"]) for row in rows(run / "eval.csv")] == [0, 60, 120]
    assert [int(row["global_step"]) for row in rows(run / "metrics.csv")] == [60, 90, 120]
    checkpoint = rf.load(run / "checkpoint.pt")
    assert checkpoint["base"] == hashlib.sha256((fake / "base.pt2").read_bytes()).hexdigest()
    assert checkpoint["progress"]["updates"] == 45
    torch.manual_seed(1)
    actor = rf.Agent({"state": [5], "actions": [2]}, arguments()).actor
    for name, fresh in actor.state_dict().items():
        trained = checkpoint["agent"]["actor." + name]
        assert name == "limit" or not torch.equal(trained, fresh), name
    policy = rf.Policy(run / "checkpoint.pt", base=str(fake / "base.pt2"))
    for n in (1, 5):
        policy.reset(torch.ones(n, dtype=torch.bool))
        assert policy.act(FakeEnv(n, asymmetric=True).obs).shape == (n, 2)
    assert list((run / "videos").glob("step_000000120.mp4"))


def again(folder: Path, run: str, *words: str) -> rf.Args:
    """--resume of a run on the true state."""
    base = str(folder / "base.pt2")
    return rf.parse_args(["--resume", f"runs/{run}", "--base", base, *words])


RUNS = ("whole", "part")
RESUMED = {
    "plain": {},
    "guarded": dict(allowance=0.2, credit=3.0),
    "pixels": dict(obs="pixels"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_ctrl_c_saves_and_resume_continues_exactly(fake, monkeypatch, kind):
    changes = dict(save_buffer=True, **RESUMED[kind])
    base = arguments(fake, **changes).base
    rf.train(arguments(fake, name="whole", **changes))
    step = FakeEnv.step

    def interrupted(env, actions):
        if env.num_envs == 3 and env.steps == 25:  # the training environment, at transition 78
            signal.raise_signal(signal.SIGINT)
        return step(env, actions)

    monkeypatch.setattr(FakeEnv, "step", interrupted)
    with pytest.raises(
        SystemExit, match="interrupted at step 78: continue with --resume runs/part"
    ):
        rf.train(arguments(fake, name="part", **changes))
    monkeypatch.setattr(FakeEnv, "step", step)
    for name in ("eval.csv", "metrics.csv"):  # as if the run had gone on unsaved
        Path(f"runs/part/{name}").open("a").write("999999\n")
    rf.train(rf.parse_args(["--resume", "runs/part", "--base", base]))
    same(rf.load("runs/whole/checkpoint.pt"), rf.load("runs/part/checkpoint.pt"))
    for name in ("eval.csv", "metrics.csv"):
        steps = [[row["global_step"] for row in rows(f"runs/{run}/{name}")] for run in RUNS]
        assert steps[0] == [step for step in steps[1] if step != "78"]  # a row where it stopped


def test_a_run_that_ended_goes_on_longer_as_if_it_had_never_stopped(fake):
    rf.train(arguments(fake, name="whole", save_buffer=True))
    rf.train(arguments(fake, name="part", save_buffer=True, total_timesteps=60))
    rf.train(again(fake, "part", "--total-timesteps", "120"))
    same(rf.load("runs/whole/checkpoint.pt"), rf.load("runs/part/checkpoint.pt"))


def test_without_the_buffer_a_run_goes_on_with_an_empty_one(fake, capsys):
    rf.train(arguments(fake, name="a", total_timesteps=60))
    assert "replay" not in rf.load("runs/a/checkpoint.pt")
    out = rf.train(again(fake, "a", "--total-timesteps", "120"))
    assert out["global_step"] == 120 and "it starts empty" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--tau", "0.1"),
        ("--num-envs", "4"),
        ("--demos", "x"),
        ("--recipe", "published"),
        ("--base", "x"),
    ],
)
def test_resume_refuses_what_it_cannot_honour(fake, flag, value):
    rf.train(arguments(fake, name="a", total_timesteps=60))
    with pytest.raises(ValueError, match=f"^{flag} cannot change on --resume of runs/a$"):
        rf.parse_args(["--resume", "runs/a", flag, value])


def test_a_program_that_has_changed_or_is_not_named_is_refused(fake, tmp_path):
    base = tmp_path / "own.pt2"
    base.write_bytes((fake / "base.pt2").read_bytes())
    rf.train(arguments(fake, name="a", base=str(base), total_timesteps=60))
    export(Slow(), (torch.ones(2, 5),), base)
    evaluate = ["--evaluate", "--checkpoint", "runs/a/best.pt"]
    for argv in (["--resume", "runs/a"], evaluate):
        for more in ([], ["--base", str(base)]):
            args = rf.parse_args([*argv, *more])
            with pytest.raises(ValueError, match="^(name the base|give --base again)"):
                rf.train(args)
    with pytest.raises(ValueError, match="^give --base again, the one of the run: .*own.pt2$"):
        rf.Policy("runs/a/best.pt")


def test_best_is_the_best(fake, monkeypatch):
    rates, evaluate = iter([0.2, 0.6, 0.4]), rf.evaluate

    def rated(*inputs):
        return evaluate(*inputs) | {"eval/success_rate": next(rates)}

    monkeypatch.setattr(rf, "evaluate", rated)
    rf.train(arguments(fake, name="a"))
    assert rf.load("runs/a/best.pt")["progress"]["global_step"] == 60
    assert rf.load("runs/a/checkpoint.pt")["progress"]["best"] == 0.6


def test_evaluation_has_no_noise_and_leaves_training_alone(fake):
    out = rf.train(arguments(fake, name="a", noise=5.0, limit=(1.0,)))
    base = str(fake / "base.pt2")
    words = ["--evaluate", "--checkpoint", "runs/a/checkpoint.pt", "--base", base]
    args = rf.parse_args([*words, "--no-capture-video"])
    again = rf.train(args)
    assert all(again[key] == out[key] for key in again)
    policy = rf.Policy("runs/a/checkpoint.pt", base=base)
    env = FakeEnv(8, asymmetric=True)
    torch.manual_seed(123)
    before, actions = torch.get_rng_state(), []
    rf.evaluate(policy, env, 8)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        policy.reset(torch.ones(8, dtype=torch.bool))
        actions.append(policy.act(env.obs))
    assert torch.equal(*actions)


def test_a_callable_can_be_the_base_and_is_never_named_by_a_file(fake, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mybase.py").write_text(
        "class Base:\n"
        "    def __init__(self, env): assert env.num_envs\n"
        "    def reset(self, mask): pass\n"
        "    def act(self, obs): return -obs['state'][:, :2].clamp(-1, 1)\n"
    )
    rf.train(arguments(fake, name="a", base="mybase:Base", total_timesteps=60))
    first = rows("runs/a/eval.csv")[0]
    assert float(first["eval/success_rate"]) == 1.0  # at first the base alone
    more = ["--total-timesteps", "90", "--resume", "runs/a"]
    evaluate = ["--evaluate", "--checkpoint", "runs/a/checkpoint.pt"]
    for argv in (more, evaluate):
        assert rf.train(rf.parse_args([*argv, "--base", "mybase:Base"]))
    checkpoint = rf.load("runs/a/checkpoint.pt")
    for name in ("this_would_be_imported:Base", "this_would_be_loaded.pt2"):
        checkpoint["args"]["base"] = checkpoint["base"] = name
        rf.save(Path("runs/a/checkpoint.pt"), checkpoint)
        for argv in (more, evaluate):
            with pytest.raises(ValueError, match="^(name the base: --base|give --base again)"):
                rf.train(rf.parse_args(argv))
        with pytest.raises(ValueError, match="^give --base again"):
            rf.Policy("runs/a/checkpoint.pt")


def test_a_nan_stops_the_run_and_is_named(fake, monkeypatch):
    step = FakeEnv.step

    def broken(env, actions):
        obs, rewards, *rest, info = step(env, actions)
        return obs, rewards, *rest, info | {"success": info["success"] * float("nan")}

    monkeypatch.setattr(FakeEnv, "step", broken)
    with pytest.raises(
        FloatingPointError, match="is not finite at step .*; last good checkpoint: runs/a/"
    ):
        rf.train(arguments(fake, name="a"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(demos=""), "^give --demos FILE, demonstrations in robomimic's layout$"),
        (dict(num_envs=0), "^--num-envs must be at least 1$"),
        (dict(base=""), "^name the base: --base FILE.pt2"),
        (dict(evaluate=True), "^--evaluate needs --checkpoint FILE$"),
        (dict(env_id="Other"), "^the base is for Fake, not Other$"),
        (dict(buffer_size=20), "^--learning-starts must be below --buffer-size"),
    ],
)
def test_mistakes_are_named_in_one_line(fake, changes, message):
    with pytest.raises(ValueError, match=message):
        rf.train(arguments(fake, name="a", **changes))


def test_defaults_are_those_of_recipe_and_device():
    guards = rf.TUNED["*", "*", "ours"]
    ours = rf.parse_args(["--device", "cpu", "--demos", "x"])
    assert all(getattr(ours, key) == value for key, value in guards.items())
    assert ours.hidden == 128 and ours.gamma == 0.95 and ours.total_timesteps == 48_000
    longer = rf.parse_args(["--device", "cpu", "--demos", "x", "--env-id", "SO101PlaceCube-v1"])
    assert longer.gamma == 0.97 and longer.limit == (0.1,) and longer.policy_frequency == 4
    published = rf.parse_args(["--device", "cpu", "--demos", "x", "--recipe", "published"])
    assert published.allowance == 1 and published.warmup_noise == 0.2 and published.offline == 0.5


def test_a_wrong_command_line_gives_one_line(tmp_path):
    command = [sys.executable, rf.__file__, "--device", "cpu", "--evaluate"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "error: --evaluate needs --checkpoint FILE\n"


def test_so101_episodes_end_at_success_without_images():
    pytest.importorskip(
        "mujoco_warp", reason='the SO-101 needs MuJoCo Warp: pip install -e ".[so101]"'
    )
    args = rf.Args(device="cpu", num_envs=2, eval_envs=1)
    env, eval_env = rf.make_envs(args)
    assert rf.observe(env.reset(seed=0), args)["state"].shape == (2, 59)
    env.reward = lambda: (torch.zeros(2), torch.tensor([False, True]))
    _, _, terminations, truncations, info = env.step(torch.zeros(2, 6))
    assert terminations.tolist() == [False, True] and not truncations.any()
    assert info["success"].tolist() == [False, True]
    env.close()
    eval_env.close()
