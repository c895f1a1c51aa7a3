"""ResFiT: queue and relabelling against stepping the base, targets by hand, the bound, and runs on a tiny task."""

import copy
import csv
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import resfit as rf
import torch

pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
from envs import demos as demo_files  # noqa: E402

SCRIPT = Path(rf.__file__)
CPU = torch.device("cpu")
SHAPES = dict(cameras=0, action=2, state=4)


class Dots:
    """N dots in the plane, to be moved into the middle: state (x, y), privileged the same with noise; 8 steps each."""

    action_dim, state_dim, privileged_dim, max_episode_steps, control_hz = 2, 2, 2, 8, 10.0
    spec = {"env_id": "Dots"}

    def __init__(self, num_envs=4, seed=0, pixels=False, horizon=8, easy=False):
        self.num_envs, self.device, self.max_episode_steps, self.easy = num_envs, CPU, horizon, easy
        self.pixels, self.image_shape = pixels, (16, 16, 6)
        self.privileged_dim = 0 if pixels else 2
        self.nan_resets, self.generator = torch.zeros((), dtype=torch.int64), torch.Generator()
        self.executed = []
        self.reset(seed)

    def reset(self, seed=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.place, self.clock = torch.zeros(self.num_envs, 2), torch.zeros(self.num_envs, dtype=torch.int64)
        return self._begin(torch.ones(self.num_envs, dtype=torch.bool))

    def _begin(self, where):
        fresh = torch.rand((self.num_envs, 2), generator=self.generator) * 2 - 1
        self.place = torch.where(where[:, None], fresh, self.place)
        self.clock = torch.where(where, 0, self.clock)
        return self._observe()

    def _observe(self):
        obs = {"state": self.place.clone()}
        if self.pixels:
            axis = torch.linspace(-1, 1, 16)
            near = torch.exp(-4 * ((axis - self.place[:, :1]).square()[:, None] +
                                   (axis - self.place[:, 1:]).square()[:, :, None]))
            return obs | {"rgb": (250 * near[..., None]).to(torch.uint8).expand(-1, -1, -1, 6).contiguous()}
        return obs | {"privileged": self.place * 2}

    def step(self, actions):
        self.executed.append(actions.clone())
        assert not actions.abs().max() > 1
        self.place, self.clock = (self.place + 0.3 * actions).clamp(-1, 1), self.clock + 1
        success = self.place.norm(dim=1) < (0.5 if self.easy else 0.25)
        truncations = (self.clock >= self.max_episode_steps) & ~success
        final, length = self._observe(), self.clock
        obs = self._begin(success | truncations)
        episode = {"return": success.float(), "length": length, "success_once": success, "success_at_end": success}
        return obs, success.float(), success, truncations, dict(final_obs=final, success=success, episode=episode)

    def render(self, worlds=(0,), size=256, camera="third"):
        return np.zeros((len(worlds), size, size, 3), np.uint8)

    def state_dict(self):
        return dict(place=self.place, clock=self.clock, generator=self.generator.get_state())

    def load_state_dict(self, state):
        self.place, self.clock = state["place"], state["clock"]
        self.generator.set_state(state["generator"])

    def close(self):
        pass


class Expert:
    """Goes to the middle, not quite straight."""

    def __init__(self, env, noise=0.3):
        self.env, self.noise, self.generator = env, noise, torch.Generator().manual_seed(0)

    def reset(self, worlds=None):
        pass

    def act(self):
        noise = self.noise * torch.randn(self.env.num_envs, 2, generator=self.generator)
        return (-self.env.place / 0.3 * 0.6 + noise).clamp(-1, 1)


class Counting:
    """A base whose chunks tell when they were asked for: action i of the j-th query is (j, i) / 100, less the state."""

    def __init__(self, chunk=4):
        self.chunk, self.queries, self.resets = chunk, 0, []

    def reset(self, worlds):
        self.resets.append(worlds.tolist())

    def predict_chunk(self, obs, generator):
        self.queries += 1
        i = torch.arange(self.chunk) / 100
        row = torch.stack([torch.full_like(i, self.queries / 100), i], -1)
        return row.expand(len(obs["state"]), -1, -1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    for pixels in (False, True):
        env = Dots(5, pixels=pixels)
        demo_files.record(env, Expert(env), folder / f"{'pixels' if pixels else 'state'}.hdf5", 20, progress=False,
                          cameras=("a", "b"), env_args={"env_name": "Dots", "env_kwargs": {"camera_names": ["a", "b"]}})
    return folder


def arguments(folder=Path(), **changes) -> rf.Args:
    """A small run on the CPU, for Dots."""
    pixels = changes.get("obs") == "pixels"
    values = dict(env_id="Dots", device="cpu", demos=str(folder / f"{'pixels' if pixels else 'state'}.hdf5"),
                  num_envs=3, total_timesteps=120, eval_freq=60, log_freq=30, eval_episodes=8, eval_envs=4, chunk=4,
                  execute=4, base_dim=8, bc_steps=8, bc_eval_freq=4, bc_batch_size=16, hidden=8, batch_size=16,
                  buffer_size=600, learning_starts=30, critic_warmup=3, utd=0.5, heads=4, policy_frequency=2, lr=1e-3,
                  actor_lr=1e-3, encoder_dim=8, image_size=16, pad=1, cameras=("a", "b"), capture_video=False)
    return rf.Args(**values | changes)


def make_dots(args, device):
    pixels = args.obs == "pixels"
    return (None if args.evaluate else Dots(args.num_envs, args.seed, pixels)), Dots(args.eval_envs, 1, pixels)


def make_broken_dots(args, device):
    """Broken in the actor's process alone."""
    env, eval_env = make_dots(args, device)
    if multiprocessing.parent_process():
        def step(actions):
            raise RuntimeError("the arm is unplugged")
        env.step = step
    return env, eval_env


@pytest.fixture
def dots(monkeypatch, tmp_path, demo_file):
    """Train on Dots, with runs/ in a temporary folder."""
    monkeypatch.setattr(rf, "make_envs", make_dots)
    monkeypatch.chdir(tmp_path)
    return demo_file


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def obs_of(numbers) -> dict:
    return {"state": torch.tensor(numbers, dtype=torch.float32)[:, None]}


# --- Queue ------------------------------------------------------------------------------------------------------------
def test_queue_asks_at_chunk_ends_and_after_resets_and_nowhere_else():
    base = Counting(4)
    queue = rf.Queue(base, 2, arguments(chunk=4, execute=3), 2, CPU)
    obs = {"state": torch.zeros(2, 2)}
    seen = [(queue.act(obs)["base"] * 100).round().int().tolist() for _ in range(4)]
    assert seen == [[[1, 0]] * 2, [[1, 1]] * 2, [[1, 2]] * 2, [[2, 0]] * 2]  # three of the four are executed
    queue.reset(torch.tensor([False, True]))  # time-out or success in world 1
    answer = queue.act(obs)
    assert (answer["base"] * 100).round().int().tolist() == [[2, 1], [3, 0]]
    assert answer["phase"].flatten().tolist() == pytest.approx([1 / 3, 0])
    assert base.resets == [[True, True], [False, True]]


def test_peek_takes_nothing_and_sees_the_old_queue():
    queue = rf.Queue(Counting(4), 2, arguments(), 2, CPU)
    obs = {"state": torch.zeros(2, 2)}
    queue.act(obs)
    before = copy.deepcopy(queue.state_dict())
    assert (queue.peek(obs)["base"] * 100).round().int().tolist() == [[1, 1]] * 2
    torch.testing.assert_close(queue.state_dict(), before, atol=0, rtol=0)
    assert (queue.act(obs)["base"] * 100).round().int().tolist() == [[1, 1]] * 2


def test_a_black_box_with_act_keeps_its_own_memory_when_peeked_at():
    class Memory:
        def __init__(self):
            self.count = torch.zeros(2)

        def reset(self, worlds):
            self.count = torch.where(worlds, 0.0, self.count)

        def act(self, obs):
            self.count = self.count + 1
            return torch.stack([self.count, self.count], -1) / 100

    queue = rf.Queue(Memory(), 2, arguments(), 2, CPU)
    obs = {"state": torch.zeros(2, 2)}
    assert queue.act(obs)["base"][:, 0].tolist() == pytest.approx([0.01, 0.01])
    assert queue.peek(obs)["base"][:, 0].tolist() == pytest.approx([0.02, 0.02])
    queue.reset(torch.tensor([True, False]))
    assert queue.act(obs)["base"][:, 0].tolist() == pytest.approx([0.01, 0.02])


def collect(steps, base, args, env, agent=None, warm=False, scale=1.0):
    """A collector's steps, as the buffer gets them."""
    torch.manual_seed(0)
    agent = agent or rf.Agent(args, SHAPES, CPU)
    collector = rf.Collector(args, env, base, agent, CPU)
    first = collector.now
    return first, [collector.step(warm, scale) for _ in range(steps)]


def test_the_base_action_of_every_stored_state_is_the_one_that_was_due_there():
    """Chunks of 4, of which 3 are executed, time-outs after 5 steps: a final state has the old queue's next action."""
    first, steps = collect(30, Counting(4), arguments(execute=3), Dots(3, horizon=5), warm=True)
    before, age = first, torch.zeros(3)
    for step in steps:
        assert before["phase"].flatten().tolist() == pytest.approx((age / 3).tolist())
        due = (age + 1) % 3
        assert step["final_obs"]["phase"].flatten().tolist() == pytest.approx((due / 3).tolist())
        assert torch.equal(step["final_obs"]["base"][due > 0, 0], before["base"][due > 0, 0])  # the same chunk's
        age = torch.where(step["dones"], 0.0, due)
        assert step["next_obs"]["phase"].flatten().tolist() == pytest.approx((age / 3).tolist())
        before = step["next_obs"]
    assert sum(int(step["dones"].sum()) for step in steps) > 10


@pytest.mark.parametrize("base_kind", ["act", "flow"])
def test_zero_residual_is_the_base_bit_for_bit(base_kind):
    args = arguments(noise=0.0, base=base_kind, execute=3)
    torch.manual_seed(1)
    base = rf.ChunkPolicy(SHAPES, args).eval()
    env, alone = Dots(3, seed=args.seed), Dots(3, seed=args.seed)
    _, steps = collect(40, base, args, env)
    queue = rf.Queue(base, 3, args, 2, CPU)  # by hand: the base alone, in the same episodes
    obs = alone.reset(args.seed)
    for step in steps:
        actions = queue.act(obs)["base"]
        obs, _, terminations, truncations, _ = alone.step(actions)
        queue.reset(terminations | truncations)
        assert torch.equal(step["actions"], actions)
    assert torch.equal(env.place, alone.place)


# --- Demonstrations ---------------------------------------------------------------------------------------------------
def test_demonstrations_are_relabelled_as_stepping_the_base_through_each_would(dots):
    args = arguments(dots, execute=3)
    demos, valid = rf.read_demos(args)
    assert len(demos) == 18 and len(valid) == 2
    torch.manual_seed(0)
    base = rf.ChunkPolicy(SHAPES, args).eval()
    replay, slot = rf.store_demos(demos, base, args, CPU), 0
    for demo in demos:
        queue = rf.Queue(base, 1, args, 2, CPU)  # begins anew with each
        length = len(demo["actions"])
        for t in range(length + 1):
            row = {k: torch.from_numpy(demo["obs"][k][t] if t < length else demo["final_obs"][k])[None]
                   for k in demo["obs"]}
            label = queue.act(row)
            torch.testing.assert_close(replay.data["base"][slot], label["base"], atol=1e-6, rtol=1e-5)
            assert torch.equal(replay.data["phase"][slot], label["phase"])
            assert torch.equal(replay.data["state"][slot], rf.observe(row)["state"])
            if t < length:
                assert torch.equal(replay.data["actions"][slot, 0], torch.from_numpy(demo["actions"][t]))
                assert float(replay.data["rewards"][slot]) == float(t == length - 1)
                assert float(replay.data["discounts"][slot]) == float(t < length - 1)
            assert bool(replay.data["last"][slot]) == (t == length)
            slot += 1


def test_demonstrations_stop_at_the_first_success_and_failures_are_left_out(tmp_path):
    import h5py

    with h5py.File(tmp_path / "state.hdf5", "w") as file:
        for i, success in enumerate(([0, 0, 1, 1], [0, 0, 0], [0, 1])):
            group, n = file.create_group(f"data/demo_{i}"), len(success)
            group["actions"], group["rewards"] = np.zeros((n, 2)), np.array(success, float)
            group["dones"] = np.arange(n) == n - 1
            group["obs/state"] = np.arange(2 * n, dtype=float).reshape(n, 2)
            group["obs/privileged"] = np.zeros((n, 2))
    demos, valid = rf.read_demos(arguments(tmp_path))
    assert [len(demo["actions"]) for demo in demos] == [3, 2] and valid == []
    assert demos[0]["final_obs"]["state"].tolist() == [6, 7] and demos[1]["final_obs"] is None
    replay = rf.store_demos(demos, None, arguments(tmp_path), CPU)
    assert replay.data["rewards"][:7, 0].tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert replay.data["last"][:7, 0].tolist() == [False, False, False, True, False, False, True]


def test_chunks_for_cloning_end_with_the_episode_and_failures_weigh_nothing(dots):
    args = arguments(dots)
    demos, _ = rf.read_demos(args)
    replay = rf.store_demos(demos, None, args, CPU)
    batch = replay.sample_chunks(200, 4, generator())
    by_state = {tuple(np.round(demo["obs"]["state"][t], 5)): (demo, t)
                for demo in demos for t in range(len(demo["actions"]))}
    for state, actions, weights in zip(batch["obs"]["state"], batch["actions"], batch["weights"], strict=True):
        demo, t = by_state[tuple(np.round(state[2:].numpy(), 5))]
        left = min(4, len(demo["actions"]) - t)
        assert weights.tolist() == [1.0] * left + [0.0] * (4 - left)
        assert np.array_equal(actions[:left].numpy(), demo["actions"][t : t + left])
    replay.data["good"][:] = False
    assert replay.sample_chunks(50, 4, generator())["weights"].sum() == 0


# --- Replay -----------------------------------------------------------------------------------------------------------
def play(script, slots=40, n_step=3):
    """One world; script: (reward, discount, ends). Observations are numbered, actions are the number of theirs."""
    count = itertools.count()
    replay = rf.Replay(obs_of([next(count)]), 1, slots, n_step, 0.5, CPU)
    for reward, discount, ends in script:
        present = float(replay.data["state"][replay.head[0] % slots, 0, 0])
        final = obs_of([next(count)])
        following = obs_of([next(count)]) if ends else final
        replay.add(torch.tensor([[present]]), torch.tensor([reward]), torch.tensor([discount]), torch.tensor([ends]),
                   torch.tensor([reward > 4]), final, following)
    return replay


def test_n_step_returns_by_hand():
    script = [(1.0, 1.0, False), (2.0, 1.0, False), (4.0, 1.0, False), (8.0, 0.0, True),  # observations 0 to 4
              (16.0, 1.0, False), (2.0, 1.0, True), *[(1.0, 1.0, False)] * 3]  # fmt: skip
    replay = play(script)
    batch = replay.sample(2000, generator())
    seen = {(float(batch["obs"]["state"][i]), float(batch["actions"][i]), float(batch["rewards"][i]),
             float(batch["discounts"][i]), float(batch["next_obs"]["state"][i])) for i in range(2000)}
    assert seen == {(0, 0, 1 + 2 / 2 + 4 / 4, 1 / 8, 3), (1, 1, 2 + 4 / 2 + 8 / 4, 0, 4), (2, 2, 4 + 8 / 2, 0, 4),
                    (3, 3, 8, 0, 4), (5, 5, 16 + 2 / 2, 1 / 4, 7), (6, 6, 2, 1 / 2, 7), (8, 8, 1.75, 1 / 8, 11)}
    assert replay.data["good"][:11, 0].tolist() == [True] * 4 + [False] * 7  # the first episode ended in success


def test_a_ring_that_wraps_never_tears_an_episode():
    script = [(float(t % 7), 0.0 if t % 11 == 10 else 1.0, t % 5 == 4 or t % 11 == 10) for t in range(300)]
    replay, whole = play(script, slots=23), play(script, slots=1000)
    expected = {}
    batch = whole.sample(20_000, generator())
    for i in range(20_000):
        expected[float(batch["actions"][i])] = tuple(float(batch[k][i]) for k in ("rewards", "discounts")) + (
            float(batch["next_obs"]["state"][i]),)
    batch = replay.sample(500, generator(1))
    for i in range(500):
        got = tuple(float(batch[k][i]) for k in ("rewards", "discounts")) + (float(batch["next_obs"]["state"][i]),)
        assert expected[float(batch["actions"][i])] == got


# --- Losses -----------------------------------------------------------------------------------------------------------
def agent_and_batch(size=6, **changes):
    torch.manual_seed(0)
    args = arguments(limit=(0.3, 0.1), **changes)
    agent = rf.Agent(args, SHAPES, CPU)
    draw = generator(3)
    rand = lambda *shape: torch.rand(shape, generator=draw) * 2 - 1  # noqa: E731
    with torch.no_grad():
        agent.actor.policy[-1].weight.copy_(rand(2, 8)), agent.actor_target.policy[-1].weight.copy_(rand(2, 8))
    side = lambda: dict(state=rand(size, 4), base=rand(size, 2), phase=torch.zeros(size, 1))  # noqa: E731
    batch = dict(obs=side(), next_obs=side(), actions=rand(size, 2), rewards=rand(size),
                 discounts=torch.full((size,), 0.9))
    return args, agent, batch


def head(agent_critics, k, x, actions):
    """Head k of the critics, written out with ordinary layers."""
    y = torch.cat([x, actions], -1)
    for i in range(3):
        y = y @ agent_critics.weights[i][k] + agent_critics.biases[i][k]
        if i < 2:
            y = torch.relu(torch.nn.functional.layer_norm(y, y.shape[-1:]) * agent_critics.gains[i][k]
                           + agent_critics.shifts[i][k])
    return y[:, 0]


def test_target_is_the_smaller_of_the_drawn_pair_at_the_bounded_action():
    args, agent, batch = agent_and_batch(noise=0.5, noise_clip=0.2)
    chance = rf.draw_chance(args, 6, 2, generator())
    chance["heads"] = torch.tensor([2, 0])
    after, base = batch["next_obs"]["state"], batch["next_obs"]["base"]
    limit = torch.tensor([0.3, 0.1])
    noise = (0.5 * chance["noise"]).clamp(-0.2, 0.2)
    residual = torch.minimum(torch.maximum(agent.actor_target(after, base) + noise, -limit), limit)
    action = (base + residual).clamp(-1, 1)
    pair = [head(agent.critics_target, k, after, action) for k in (2, 0)]
    y = batch["rewards"] + 0.9 * torch.minimum(*pair)
    errors = [(head(agent.critics, k, batch["obs"]["state"], batch["actions"]) - y).square().mean() for k in range(4)]
    loss, _, metrics = rf.critic_loss(agent, batch, chance, 1.0, args)
    torch.testing.assert_close(loss, sum(errors) / 4)
    torch.testing.assert_close(metrics["train/target"], y.mean())


def test_actor_loss_is_minus_the_mean_of_all_heads_and_the_trust_penalty():
    args, agent, batch = agent_and_batch(trust=0.7)
    x, base = batch["obs"]["state"], batch["obs"]["base"]
    residual = agent.actor(x, base)
    q = torch.stack([head(agent.critics, k, x, (base + 0.5 * residual).clamp(-1, 1)) for k in range(4)])
    penalty = 0.7 * (residual / torch.tensor([0.3, 0.1])).square().mean()
    loss, _ = rf.actor_loss(agent, batch, x, 0.5, args)
    torch.testing.assert_close(loss, penalty - q.mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in agent.actor.parameters())


@pytest.mark.parametrize("gate", ["agree", "min"])
def test_gate_by_hand(gate):
    args, agent, batch = agent_and_batch(gate=gate, kappa=0.3, caution=0.8, margin=0.01)
    x, base = batch["obs"]["state"], batch["obs"]["base"]
    proposal = (base + 0.1).clamp(-1, 1)
    new, old = (torch.stack([head(agent.critics_target, k, x, a) for k in range(4)]) for a in (proposal, base))
    if gate == "agree":
        gain = (new - old).mean(0) - (0.3 + 0.8 * 0.25) * (new - old).std(0)  # three quarters are let through
    else:
        gain = torch.minimum(new[1], new[3]) - torch.minimum(old[1], old[3])
    actions, took = rf.select(agent, x, base, proposal, 0.75, args, torch.tensor([1, 3]))
    assert torch.equal(took, gain > 0.01)
    assert torch.equal(actions, torch.where(took[:, None], proposal, base))


def test_targets_move_and_only_the_actor_waits():
    args, agent, batch = agent_and_batch(tau=0.25)
    chance = rf.draw_chance(args, 6, 2, generator())
    actor, target = copy.deepcopy(agent.actor.state_dict()), copy.deepcopy(agent.critics_target.state_dict())
    rf.update(agent, batch, chance, 1.0, False, args)
    torch.testing.assert_close(agent.actor.state_dict(), actor, atol=0, rtol=0)
    for k, v in agent.critics.state_dict().items():
        torch.testing.assert_close(agent.critics_target.state_dict()[k], 0.75 * target[k] + 0.25 * v)
    rf.update(agent, batch, chance, 1.0, True, args)
    assert not torch.equal(agent.actor.policy[0].weight, actor["policy.0.weight"])


# --- The bound --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("gate", ["none", "agree"])
def test_no_noise_passes_the_bound_and_what_is_stored_was_executed(warm, gate):
    args = arguments(limit=(0.2, 0.05), freeze_gripper=True, noise=30.0, warmup_noise=7.0, gate=gate, margin=-1e9)
    agent = rf.Agent(args, SHAPES, CPU)
    torch.nn.init.normal_(agent.actor.policy[-1].weight, std=50.0)
    env = Dots(3, seed=args.seed)
    first, steps = collect(60, Counting(4), args, env, agent, warm)
    before, largest = first, 0.0
    for step, executed in zip(steps, env.executed, strict=True):
        moved = (step["actions"] - before["base"]).abs()
        assert torch.equal(step["actions"], executed)
        assert moved[:, 0].max() <= 0.2 + 1e-6 and torch.equal(step["actions"][:, 1], before["base"][:, 1])
        before, largest = step["next_obs"], max(largest, float(moved[:, 0].max()))
    assert largest > 0.19


def test_time_outs_bootstrap_unless_told_otherwise():
    for bootstrap in (True, False):
        _, steps = collect(40, Counting(4), arguments(bootstrap_on_timeout=bootstrap), Dots(3, horizon=5), warm=True)
        ended = torch.cat([step["dones"] for step in steps])
        success = torch.cat([step["success"] for step in steps])
        discounts = torch.cat([step["discounts"] for step in steps])
        assert (ended & ~success).any()
        assert torch.equal(discounts, (~(success if bootstrap else ended)).float())


def test_so101_episodes_end_at_success_without_pictures():
    pytest.importorskip("mujoco_warp", reason='the SO-101 needs MuJoCo Warp: pip install -e ".[so101]"')
    args = rf.Args(env_id="SO101ReachCube-v1", device="cpu", num_envs=2, eval_envs=1)
    env, eval_env = rf.make_envs(args, CPU)
    obs = env.reset(seed=0)
    assert rf.observe(obs)["state"].shape == (2, 59) and "rgb" not in obs
    env.reward = lambda: (torch.zeros(2), torch.tensor([False, True]))
    before = env.clock.copy()
    _, _, terminations, truncations, info = env.step(torch.zeros(2, 6))
    assert terminations.tolist() == [False, True] and not truncations.any()
    assert (env.clock - before).tolist() == [1, 0] and info["episode"]["success_at_end"].tolist() == [False, True]
    env.close(), eval_env.close()


# --- Networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, cameras", [(16, 1), (84, 2), (48, 3)])
def test_pictures_of_any_size_and_number(size, cameras):
    args = arguments(image_size=size, obs="pixels")
    shapes = dict(cameras=cameras, action=2, state=4)
    agent = rf.Agent(args, shapes, CPU)
    obs = dict(rgb=torch.randint(0, 256, (2, size, size, 3 * cameras), dtype=torch.uint8), state=torch.zeros(2, 4),
               phase=torch.zeros(2, 1))
    x = agent.encoder(obs)
    assert agent.encoder.tokens.place.shape[0] == {16: 1, 84: 81, 48: 25}[size] * cameras
    assert agent.critics(x, torch.zeros(2, 2)).shape == (4, 2) and agent.actor(x, torch.zeros(2, 2)).shape == (2, 2)
    assert rf.ChunkPolicy(shapes, args).eval().predict_chunk(obs, generator()).shape == (2, 4, 2)


def test_shift_moves_pictures_and_nothing_else():
    rgb = torch.randint(0, 256, (3, 12, 12, 6), dtype=torch.uint8, generator=generator())
    obs = dict(rgb=rgb, state=torch.ones(3, 2))
    offsets = torch.tensor([[0, 0], [2, 2], [4, 1]])
    shifted = rf.random_shift(obs, offsets, 2)
    for i, (dy, dx) in enumerate(offsets.tolist()):
        padded = np.pad(rgb[i].numpy(), ((2, 2), (2, 2), (0, 0)), mode="edge")
        assert np.array_equal(shifted["rgb"][i].numpy(), padded[dy : dy + 12, dx : dx + 12])
    assert shifted["state"] is obs["state"] and "rgb" not in rf.random_shift({"state": rgb}, offsets, 2)


def test_flow_learns_two_modes_where_regression_takes_their_middle():
    """Actions are +-0.8, whatever the state: the flow draws one of them, the regression finds nothing better than 0."""
    torch.manual_seed(0)
    draw, sizes = generator(), {}
    for kind in ("act", "flow"):
        policy = rf.ChunkPolicy(SHAPES, arguments(base=kind, base_dim=16)).train()
        optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
        for _ in range(300):
            sign = (torch.rand(64, 1, 1, generator=draw) < 0.5).float() * 2 - 1
            batch = dict(obs={"state": torch.zeros(64, 4)}, actions=0.8 * sign.expand(64, 4, 2),
                         weights=torch.ones(64, 4))
            loss = rf.clone_loss(policy, batch, draw)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        chunk = policy.eval().predict_chunk({"state": torch.zeros(200, 4)}, draw)
        sizes[kind] = (chunk.abs() - 0.8).abs().mean(), float((chunk[:, 0, 0] > 0).float().mean())
    assert sizes["flow"][0] < 0.25 and 0.2 < sizes["flow"][1] < 0.8
    assert sizes["act"][1] in (0.0, 1.0)


# --- Runs -------------------------------------------------------------------------------------------------------------
def weights(path) -> dict:
    file = rf.load_file(path)
    return {"base": file["base"], "agent": file["agent"]}


def test_a_run_writes_what_the_page_says_and_the_base_stays_frozen(dots):
    out = rf.train(arguments(dots, name="a", save_buffer=True, capture_video=True))
    run = Path(out["run"])
    assert {"args.json", "base.pt", "clone.csv", "metrics.csv", "eval.csv", "best.pt", "checkpoint.pt"} <= {
        p.name for p in run.iterdir()}
    rows = list(csv.DictReader((run / "eval.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [0, 60, 120]
    assert float(rows[0]["eval/success_rate"]) == float(rows[0]["train/base_success"])  # a zero residual is the base
    assert [int(row["bc_step"]) for row in csv.DictReader((run / "clone.csv").open())] == [4, 8]
    torch.testing.assert_close(weights(run / "base.pt")["base"], weights(run / "checkpoint.pt")["base"], atol=0, rtol=0)
    policy = rf.Policy(run / "checkpoint.pt")
    policy.reset(5)
    assert policy.act(Dots(5).reset(0)).shape == (5, 2)
    assert list((run / "videos").glob("*.mp4"))


def go_on(*names: str):
    """A row after the last checkpoint, as a run writes it that is interrupted a little later."""
    for path in (Path("runs/part") / name for name in names):
        path.write_text(path.read_text() + "999999" + "," * path.read_text().partition("\n")[0].count(",") + "\n")


def steps(name: str) -> list[list[str]]:
    return [[row[0] for row in csv.reader(open(f"runs/{run}/{name}"))] for run in ("whole", "part")]


@pytest.mark.parametrize("changes", [{}, dict(gate="agree", anchor=0.25, ramp_steps=20, fallback=0.01),
                                     dict(mode="filtered-bc"), dict(base="flow", obs="pixels", bc_steps=4)],
                         ids=["plain", "guards", "filtered-bc", "pixels"])
def test_resume_continues_the_residual_exactly(dots, changes):
    rf.train(arguments(dots, name="whole", save_buffer=True, **changes))
    rf.train(arguments(dots, name="part", save_buffer=True, total_timesteps=60, **changes))
    go_on("eval.csv", "metrics.csv")
    rf.train(arguments(dots, name="part", save_buffer=True, resume="runs/part", **changes))
    torch.testing.assert_close(weights("runs/whole/checkpoint.pt"), weights("runs/part/checkpoint.pt"), atol=0, rtol=0)
    ends = [list(csv.reader(open(f"runs/{name}/eval.csv")))[-1] for name in ("whole", "part")]
    assert ends[0][:1] + ends[0][3:] == ends[1][:1] + ends[1][3:]  # all but the two times
    for name in ("eval.csv", "metrics.csv"):
        whole, part = steps(name)
        assert part == whole


def test_step_sizes_fall_over_the_last_share_of_the_run_also_when_resumed(dots):
    rf.train(arguments(dots, name="a", anneal=0.5, save_buffer=True, learning_starts=60))
    rf.train(arguments(dots, name="a", anneal=0.5, save_buffer=True, learning_starts=60, resume="runs/a",
                       total_timesteps=180))
    optimizers = rf.load_file("runs/a/checkpoint.pt")["learner"]["optimizers"].values()
    for group in (group for optimizer in optimizers for group in optimizer["param_groups"]):
        assert group["lr"] == pytest.approx(1e-3 * (1 - 177 / 180) / 0.5)  # the last updates begin at step 177


def test_resume_continues_the_cloning_exactly(dots):
    rf.train(arguments(dots, name="whole", bc_steps=8))
    rf.train(arguments(dots, name="part", bc_steps=4, bc_only=True))
    go_on("clone.csv")
    rf.train(arguments(dots, name="part", bc_steps=8, resume="runs/part"))
    assert steps("clone.csv")[1] == ["bc_step", "4", "8"]
    torch.testing.assert_close(weights("runs/whole/checkpoint.pt"), weights("runs/part/checkpoint.pt"), atol=0, rtol=0)


@pytest.mark.parametrize("mode", ["rlpd", "ibrl", "filtered-bc", "ppo-residual"])
def test_every_mode_runs_on_the_same_base(dots, mode):
    rf.train(arguments(dots, name="base", bc_only=True))
    out = rf.train(arguments(dots, name=mode, mode=mode, base_from="runs/base/base.pt", ppo_rollout=30))
    assert 0 <= out["eval/success_rate"] <= 1
    after = weights(f"runs/{mode}/checkpoint.pt")["base"]
    same = after is not None and all(torch.equal(v, weights("runs/base/base.pt")["base"][k]) for k, v in after.items())
    assert same == (mode in ("ibrl", "ppo-residual"))  # rlpd has no base, filtered-bc trains it


def test_ppo_advantages_and_ratio_by_hand(dots):
    """One step of two worlds each, one of which ends: advantage = r + gamma d V(final) - V; a first ratio of 1."""
    args = arguments(dots, mode="ppo-residual", ppo_rollout=4, limit=(0.3,), lr=0.0, actor_lr=0.0)
    torch.manual_seed(0)
    agent = rf.Agent(args, SHAPES, CPU)
    learner = rf.OnPolicy(agent, None, None, None, args, generator())
    _, steps = collect(2, Counting(4), args, Dots(2), agent)
    for step in steps:
        learner.add(step)
    value = [agent.critics(agent.encoder(part), part["base"]).mean(0).detach() for step in steps
             for part in (step["log"]["obs"], step["final_obs"])]
    delta = [steps[i]["rewards"] + 0.99 * steps[i]["discounts"] * value[2 * i + 1] - value[2 * i] for i in (0, 1)]
    first = delta[0] + 0.99 * 0.95 * (~steps[0]["dones"]) * delta[1]
    returns = torch.cat([first + value[0], delta[1] + value[2]])
    learner.run(2, 1.0, False, 1)
    metrics = learner.read()
    assert metrics["train/q"] == pytest.approx(float(returns.mean()), abs=1e-5)
    assert metrics["loss/actor"] == pytest.approx(0.0, abs=1e-5)  # ratio 1, advantages of mean 0
    assert not learner.steps


def test_a_person_can_end_episodes(dots, tmp_path):
    (tmp_path / "person.py").write_text(
        "def word(obs):\n    far = float(obs['state'].norm())\n    return None if 0.4 < far < 1.2 else far < 1\n")
    args = arguments(dots, judge="person:word")
    _, steps = collect(40, Counting(4), args, Dots(1, horizon=50), warm=True)
    for step in steps:
        far = float(step["final_obs"]["state"][0, 2:].norm())
        assert bool(step["dones"]) == (not 0.4 < far < 1.2)
        assert float(step["rewards"]) == float(far <= 0.4)
        assert float(step["discounts"]) == float(0.4 < far < 1.2)


# --- Actor and learner apart ------------------------------------------------------------------------------------------
def test_async_run_and_resume(dots):
    out = rf.train(arguments(dots, name="a", async_=True, save_buffer=True))
    assert out["global_step"] >= 120 and not Path("runs/a/journal.pkl").exists()
    file = rf.load_file("runs/a/checkpoint.pt")
    assert int(file["replay"]["head"].sum()) >= out["global_step"]
    again = rf.train(arguments(dots, name="a", async_=True, save_buffer=True, resume="runs/a", total_timesteps=180))
    assert again["global_step"] >= 180


def test_a_dead_actor_stops_the_run_with_its_error_and_nothing_recorded_is_lost(dots, monkeypatch):
    taken, before = [0], rf.Learner.run

    def run(self, transitions, *rest):
        taken[0] += transitions
        if taken[0] > 60:
            for child in multiprocessing.active_children():
                child.kill()
        return before(self, transitions, *rest)

    monkeypatch.setattr(rf.Learner, "run", run)
    with pytest.raises(ChildProcessError, match="the actor's process died, status -9"):
        rf.train(arguments(dots, name="a", async_=True, save_buffer=True, total_timesteps=100_000, eval_freq=50_000,
                           buffer_size=300_000))
    file = rf.load_file("runs/a/checkpoint.pt")
    assert file["now"]["global_step"] > 60
    assert int(file["replay"]["head"].sum()) >= file["now"]["global_step"]
    monkeypatch.setattr(rf.Learner, "run", before)
    step = file["now"]["global_step"] + 30
    again = rf.train(arguments(dots, name="a", async_=True, save_buffer=True, total_timesteps=step, eval_freq=50_000,
                               buffer_size=300_000, resume="runs/a"))
    assert again["global_step"] >= step


def test_an_error_in_the_actors_process_is_told(dots, monkeypatch):
    monkeypatch.setattr(rf, "make_envs", make_broken_dots)
    with pytest.raises(ChildProcessError, match="the actor's process failed: RuntimeError: the arm is unplugged"):
        rf.train(arguments(dots, name="a", async_=True))


def test_a_killed_learner_finds_its_steps_in_the_journal(dots, monkeypatch):
    calls, before = [0], rf.Learner.run

    def run(self, *rest):
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("killed")
        return before(self, *rest)

    monkeypatch.setattr(rf.Learner, "run", run)
    changes = dict(name="a", async_=True, save_buffer=True, eval_freq=10_000, total_timesteps=450, buffer_size=6000)
    with pytest.raises(RuntimeError, match="killed"):
        rf.train(arguments(dots, **changes))
    before_kill, recorded = rf.load_file("runs/a/checkpoint.pt")["now"]["global_step"], 0
    with open("runs/a/journal.pkl", "rb") as file:
        while file.peek(1):
            recorded += len(pickle.load(file)["rewards"])
    monkeypatch.setattr(rf.Learner, "run", before)
    seen, take = [], rf.Learner.add
    monkeypatch.setattr(rf.Learner, "add", lambda self, step: (seen.append(len(step["rewards"])), take(self, step)))
    out = rf.train(arguments(dots, resume="runs/a", **changes))
    assert recorded >= 30 and before_kill + sum(seen) == out["global_step"] >= 450
    whole = rf.load_file("runs/a/checkpoint.pt")["replay"]
    assert int(whole["head"].sum()) >= out["global_step"]


def test_any_callable_can_be_the_base(dots, tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, env): self.env = env\n    def reset(self, worlds): pass\n"
        "    def act(self, obs): return -obs['state'].clamp(-1, 1)\n")
    out = rf.train(arguments(dots, name="a", base_policy="mine:Mine", demos="", offline=0.0))
    assert out["base_success"] > 0.9
    assert not (Path(out["run"]) / "clone.csv").exists()


def test_only_evaluation_repeats_the_last_numbers(dots):
    out = rf.train(arguments(dots, name="a"))
    again = rf.train(arguments(dots, name="b", evaluate=True, checkpoint="runs/a/checkpoint.pt"))
    assert out["eval/success_rate"] == again["eval/success_rate"]


@pytest.mark.parametrize("changes, message", [
    (dict(demos="", offline=0.5), "give --demos FILE"), (dict(limit=(0.1,) * 3), "--limit has 3 numbers"),
    (dict(execute=9), "--execute must be"), (dict(offline=0.6, anchor=0.5), "together they must leave"),
    (dict(base_policy="nowhere:Nothing"), "must be module:callable"), (dict(heads=1), "--heads must be at least 2"),
    (dict(base_from="runs/none.pt"), "there is no checkpoint"), (dict(evaluate=True), "--evaluate needs"),
    (dict(num_envs=0, chunk=0), "^--num-envs, --chunk must be at least 1$"), (dict(device="tpu"), "cpu or cuda"),
    (dict(mode="filtered-bc", base_policy="a:b"), "^--mode filtered-bc clones: it needs --demos, and a base of ours$"),
])
def test_mistakes_are_named_in_one_line(dots, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        rf.train(arguments(dots, name="a", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, field", [(dict(num_envs=4), "num_envs"), (dict(buffer_size=5_000), "buffer_size")])
def test_a_run_is_not_continued_with_another_buffer_or_other_environments(dots, changes, field):
    rf.train(arguments(dots, name="a", save_buffer=True, total_timesteps=60))
    before = {file: file.read_bytes() for file in Path("runs/a").iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}: it has .*, this run"):
        rf.train(arguments(dots, save_buffer=True, resume="runs/a", **changes))
    assert before == {file: file.read_bytes() for file in Path("runs/a").iterdir() if file.is_file()}


def test_a_run_of_an_older_file_is_evaluated_but_not_continued(dots):
    out = rf.train(arguments(dots, name="a", save_buffer=True, total_timesteps=60))
    checkpoint = rf.load_file("runs/a/checkpoint.pt")
    del checkpoint["learner"]["until"]
    rf.save(Path("runs/a/checkpoint.pt"), checkpoint)
    with pytest.raises(ValueError, match="^runs/a was written by an older resfit.py: --evaluate still takes it"):
        rf.train(arguments(dots, save_buffer=True, resume="runs/a"))
    again = rf.train(arguments(dots, name="b", evaluate=True, checkpoint="runs/a/checkpoint.pt"))
    assert out["eval/success_rate"] == again["eval/success_rate"]


def test_a_nan_stops_the_run_and_is_named(dots, monkeypatch):
    before = rf.critic_loss
    monkeypatch.setattr(rf, "critic_loss", lambda *a: (before(*a)[0] * float("nan"), *before(*a)[1:]))
    with pytest.raises(FloatingPointError, match="is not finite at step .*last good checkpoint"):
        rf.train(arguments(dots, name="a"))


def test_help_shows_the_defaults_of_mode_and_device():
    args = rf.parse_args(["--device", "cpu", "--mode", "rlpd", "--demos", "x"])
    assert args.noise == 0.1 and args.hidden == rf.TUNED[("*", "cpu", "*", "*")]["hidden"]
    ours, published = (rf.parse_args(["--device", "cpu", "--demos", "x", "--recipe", r]) for r in ("ours", "published"))
    assert published.gate == "none" and published.warmup_noise == 0.2 and published.offline == 0.5
    assert all(getattr(ours, k) == v for k, v in rf.GUARDS.items())


def test_a_wrong_command_line_gives_one_line(tmp_path):
    """An unknown task is named before anything else is asked for, and no folder is made."""
    pytest.importorskip("mujoco_warp", reason='the SO-101 needs MuJoCo Warp: pip install -e ".[so101]"')
    command = [sys.executable, SCRIPT, "--device", "cpu", "--env-id", "Nonsense"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "unknown SO-101 task 'Nonsense'" in result.stderr and not (tmp_path / "runs").exists()


def test_args_are_json(dots):
    rf.train(arguments(dots, name="a", total_timesteps=60))
    assert json.loads(Path("runs/a/args.json").read_text())["mode"] == "resfit"
