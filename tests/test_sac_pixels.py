"""SAC from pixels: golden numbers, who learns from which loss, augmentations, and runs end to end."""

import copy
import csv
import math
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sac_pixels as sp
import torch
import torch.nn as nn
import torch.nn.functional as F
from fake_env import FakeEnv
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.utils._pytree import tree_map

SCRIPT = Path(sp.__file__)
GOLDEN = Path(__file__).parent / "golden/sac_pixels.npz"
SHAPES = dict(channels=3, state=3, action=2)
PATTERNS = ("separate", "critic", "autoencoder")
TINY = dict(
    device="cpu",
    amp=False,
    compile=False,
    image_size=16,
    margin=2,
    frame_stack=2,
    action_repeat=1,
    encoder_strides=(2, 1),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> sp.Args:
    """A small run on the CPU, for FakeEnv."""
    values = TINY | dict(
        env_id="Fake",
        num_envs=4,
        encoder_channels=4,
        feature_dim=8,
        hidden=16,
        batch_size=8,
        buffer_size=400,
        learning_starts=40,
        update_every=4,
        total_timesteps=120,
        eval_freq=60,
        log_freq=20,
        eval_episodes=8,
        eval_envs=4,
        copies=1,
        capture_video=False,
    )
    return sp.Args(**values | changes)


def make_fakes(args):
    size = args.render_size
    eval_env = FakeEnv(args.eval_envs, seed=1, size=size, stagger=False)
    if args.evaluate:
        return None, eval_env
    return FakeEnv(args.num_envs, seed=args.seed, size=size), eval_env


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(sp, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_batch(args, b=8) -> dict:
    size = args.render_size
    images = torch.randint(0, 256, (2, b, size, size, 6), dtype=torch.uint8)
    obs, next_obs = (dict(rgb=rgb, state=torch.randn(b, 3)) for rgb in images)
    actions = torch.rand(b, 2) * 2 - 1
    discounts = torch.full((b,), 0.9)
    rewards = torch.randn(b)
    return dict(obs=obs, next_obs=next_obs, actions=actions, rewards=rewards, discounts=discounts)


def learning_parts(**changes):
    torch.manual_seed(3)
    args = arguments(**changes)
    agent = sp.Agent(args, SHAPES)
    return agent, sp.make_optimizers(agent, args), a_batch(args), args


@contextmanager
def drawing(**numbers):
    """randn_like or rand_like give these numbers instead."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in numbers.items():
            patch.setattr(torch, name, lambda like, value=value, **options: value)
        yield


def snapshot(agent) -> dict:
    return copy.deepcopy(agent.state_dict())


def differences(before: dict, after: dict) -> set[str]:
    """Parts of the agent, to the depth of two names, of which any bit has changed."""
    assert before.keys() == after.keys()
    return {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k], after[k])}


# --- Golden numbers -------------------------------------------------------------------------------
def golden_args(preset) -> sp.Args:
    small = TINY | dict(encoder_channels=2, feature_dim=5, hidden=8, batch_size=4)
    if preset == "separate":
        rates = dict(lr=3e-4, alpha_lr=3e-4, alpha=1.0, tau=0.005, encoder_tau=0.005)
        small |= dict(augmentation="none", copies=1, policy_frequency=1)
        return sp.Args(encoder="separate", **rates, **small)
    return sp.Args(**sp.tuned("walker_walk", "cuda", preset) | small)


def golden_agent(golden, args) -> sp.Agent:
    """Its weights are the pool's numbers, in the order of their names."""
    agent, state, used = sp.Agent(args, SHAPES), {}, 0
    for name, value in sorted(agent.state_dict().items()):
        state[name] = golden["pool"][used : used + value.numel()].view(value.shape)
        used += value.numel()
    agent.load_state_dict(state)
    return agent


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(tensors.items())])


def gradients(agent, loss, *parts) -> torch.Tensor:
    agent.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in agent.named_parameters():
        if name.split(".")[0] in parts and parameter.grad is not None:
            found[name] = parameter.grad
    return flat(found)


@pytest.mark.parametrize("preset", ["drq", "sac_ae", "separate"])
def test_losses_gradients_and_weights_are_those_of_before(preset):
    """Inputs and outputs of f2f0a1a's functions. `separate`: its preset "sac". Names follow today's.

    Only its `views` was made to draw two random numbers an image, as today's does, and not four.
    The weights after an update amplify rounding: Adam divides by the gradient's size.
    """
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    args = golden_args(preset)
    size = args.render_size
    obs, next_obs = (
        dict(rgb=golden[f"{name}_rgb"][:, :size, :size], state=golden[f"{name}_state"])
        for name in ("obs", "next")
    )
    rest = {name: golden[name] for name in ("actions", "rewards", "discounts")}
    batch = dict(obs=obs, next_obs=next_obs, **rest)
    if args.augmentation != "none":
        out = sp.augment(obs["rgb"][:2], args, golden["draw"])
        assert torch.equal(out, golden[f"augment_{preset}"])

    agent = golden_agent(golden, args)
    torch.manual_seed(5)
    seen = sp.views(batch, args)
    noise = golden["noise"]
    with drawing(randn_like=noise[: 4 * args.copies]):
        loss, features, _ = sp.critic_loss(agent, seen, args)
    losses = [loss.detach()]
    close = dict(rtol=1e-6, atol=1e-6)
    found = gradients(agent, loss, "encoder", "critic")
    torch.testing.assert_close(found, golden[f"critic_{preset}"], **close)
    with drawing(randn_like=noise[:4]):
        loss, metrics = sp.actor_loss(agent, seen, features)
    losses += [metrics["loss/actor"], metrics["loss/alpha"]]
    found = gradients(agent, loss, "actor", "actor_encoder", "log_alpha")
    torch.testing.assert_close(found, golden[f"actor_{preset}"], **close)
    if agent.decoder:
        with drawing(rand_like=golden["dither"] / 256):
            loss, metrics = sp.autoencoder_loss(agent, seen["obs"]["rgb"][:4])
        losses += [metrics["loss/reconstruction"], loss.detach()]
        found = gradients(agent, loss, "encoder", "critic", "decoder")
        torch.testing.assert_close(found, golden[f"autoencoder_{preset}"], **close)
    torch.testing.assert_close(torch.stack(losses), golden[f"losses_{preset}"], **close)

    agent = golden_agent(golden, args)
    torch.manual_seed(7)
    learn = sp.make_update(agent, sp.make_optimizers(agent, args), args)
    learn([batch] * args.policy_frequency)
    after = golden[f"after_{preset}"]
    torch.testing.assert_close(flat(agent.state_dict()), after, rtol=1e-6, atol=1e-6)


# --- Who learns from which loss -------------------------------------------------------------------
CRITIC = {"encoder.convs", "critic.trunk", "critic.heads"}
ACTOR = {"actor.trunk", "actor.heads", "log_alpha"}
DRAWN = {"encoder.convs", "critic.trunk", "decoder.linear", "decoder.convs"}


@pytest.mark.parametrize("encoder", PATTERNS)
def test_each_loss_reaches_exactly_its_parameters(encoder):
    agent, optimizers, batch, args = learning_parts(encoder=encoder)
    start = snapshot(agent)
    loss, features, _ = sp.critic_loss(agent, batch, args)
    sp.descend(loss, optimizers["q_optimizer"])
    before = snapshot(agent)
    assert differences(start, before) == CRITIC

    if encoder == "autoencoder":
        loss, _ = sp.autoencoder_loss(agent, batch["obs"]["rgb"])
        sp.descend(loss, optimizers["autoencoder_optimizer"])
        assert differences(before, snapshot(agent)) == DRAWN
        before = snapshot(agent)

    agent.zero_grad()
    own = {"actor_encoder.convs"} if encoder == "separate" else set()
    loss, _ = sp.actor_loss(agent, batch, features)
    loss.backward()
    assert agent.encoder.convs[0].weight.grad is None
    sp.descend(sp.actor_loss(agent, batch, features)[0], optimizers["actor_optimizer"])
    assert differences(before, snapshot(agent)) == ACTOR | own


def test_the_reconstruction_alone_can_train_the_convolutions():
    agent, optimizers, batch, args = learning_parts(encoder="reconstruction")
    start = snapshot(agent)
    loss, _, _ = sp.critic_loss(agent, batch, args)
    sp.descend(loss, optimizers["q_optimizer"])
    middle = snapshot(agent)
    assert differences(start, middle) == CRITIC - {"encoder.convs"}
    loss, _ = sp.autoencoder_loss(agent, batch["obs"]["rgb"])
    sp.descend(loss, optimizers["autoencoder_optimizer"])
    assert differences(middle, snapshot(agent)) == DRAWN


@pytest.mark.parametrize("encoder", PATTERNS)
def test_an_update_changes_everything_and_the_target_by_its_shares(encoder):
    agent, optimizers, batch, args = learning_parts(encoder=encoder, encoder_tau=0.5, tau=0.25)
    start = snapshot(agent)
    metrics = sp.make_update(agent, optimizers, args)([batch, batch])
    after = snapshot(agent)
    everything = {k.split(".")[0] for k in start}
    assert {k.split(".")[0] for k in differences(start, after)} == everything
    sources = {"target_encoder.": "encoder.", "target.": "critic."}
    for name, value in after.items():
        for target, source in sources.items():
            if name.startswith(target):
                share = 0.25 if ".heads." in name else 0.5
                moved = start[name].lerp(after[source + name.removeprefix(target)], share)
                torch.testing.assert_close(value, moved)
    assert not any(value.requires_grad for value in metrics.values())
    assert all(p.requires_grad for p in agent.critic.parameters()), "the critic learns again"


# --- Losses by hand -------------------------------------------------------------------------------
def squashed(mean, log_std, noise):
    """Actions and log-probabilities by torch's distributions."""
    normal = Independent(Normal(mean, log_std.exp()), 1)
    policy = TransformedDistribution(normal, TanhTransform(cache_size=1))
    actions = policy.transforms[0](mean + log_std.exp() * noise)  # cached: atanh loses nothing
    return actions, policy.log_prob(actions)


def test_log_probability_is_that_of_a_squashed_gaussian():
    agent, _, _, _ = learning_parts()
    features, state = torch.randn(64, agent.encoder.features), torch.randn(64, 3)
    noise = torch.randn(64, 2) * 2
    expected = squashed(*agent.gaussian(features, state), noise)
    with drawing(randn_like=noise):
        found = sp.sample_actions(agent, features, state)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("bias, bound", [(-100.0, -10.0), (100.0, 2.0)])
def test_log_std_stays_within_its_bounds(bias, bound):
    agent, _, _, _ = learning_parts()
    last = agent.actor.heads[0][-1]
    last.bias.data[2:] = bias
    features = torch.randn(64, agent.encoder.features)
    _, log_std = agent.gaussian(features, torch.randn(64, 3))
    torch.testing.assert_close(log_std, torch.full((64, 2), bound))


def test_copies_average_targets_and_add_losses():
    """K = 3 targets and losses worked out one copy at a time."""
    agent, _, batch, args = learning_parts(copies=3, alpha=0.2)
    seen = sp.views(batch, args)
    assert len(seen["obs"]["rgb"]) == len(seen["next_obs"]["rgb"]) == 24
    noise = torch.randn(24, 2)
    with drawing(randn_like=noise):
        loss, features, metrics = sp.critic_loss(agent, seen, args)
    state, next_state, y = batch["obs"]["state"], batch["next_obs"]["state"], 0
    parts = [slice(8 * k, 8 * k + 8) for k in range(3)]
    with torch.no_grad():
        for part in parts:
            rgb = seen["next_obs"]["rgb"][part]
            gaussian = agent.gaussian(agent.encoder(rgb), next_state)
            actions, log_probs = squashed(*gaussian, noise[part])
            q1, q2 = agent.target(agent.target_encoder(rgb), next_state, actions)[..., 0]
            value = torch.min(q1, q2) - 0.2 * log_probs
            y = y + (batch["rewards"] + batch["discounts"] * value) / 3
        expected = 0
        for part in parts:
            h = agent.encoder(seen["obs"]["rgb"][part])
            for q in agent.critic(h, state, batch["actions"])[..., 0]:
                expected = expected + F.mse_loss(q, y)
        h = agent.encoder(seen["obs"]["rgb"][:8])
    torch.testing.assert_close(features, h)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["train/target"], y.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("log_std, rises", [(-10.0, True), (0.0, False)])
def test_temperature_rises_when_entropy_is_low(log_std, rises):
    """Two actions with a mean of 0: the entropy is near -17, or above -2."""
    agent, optimizers, batch, args = learning_parts(lr=0.0)
    last = agent.actor.heads[0][-1]
    last.weight.data.zero_()
    last.bias.data[2:] = math.atanh(max((log_std + 4) / 6, -0.999))
    before = agent.log_alpha.item()
    sp.make_update(agent, optimizers, args)([batch, batch])
    assert (agent.log_alpha.item() > before) == rises


# --- Networks and autoencoder ---------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 21, 32, 48, 84, 85])
def test_decoder_mirrors_the_encoder(size):
    args = arguments(image_size=size, encoder_strides=(2, 1, 1, 1))
    encoder = sp.Encoder(9, args)
    decoder = sp.Decoder(encoder, args)
    rgb = torch.zeros(2, size, size, 9, dtype=torch.uint8)
    assert encoder(rgb).shape == (2, encoder.features)
    assert decoder(torch.zeros(2, 8)).shape == rgb.shape


def test_published_sizes():
    encoder = sp.Encoder(9, sp.Args())
    assert encoder.features == 32 * 35 * 35
    assert sum(p.numel() for p in encoder.parameters()) == 30_368


def test_reconstruction_loss_by_hand(monkeypatch):
    monkeypatch.setattr(sp, "DECODER_PENALTY", 0.5)
    agent, _, _, args = learning_parts(encoder="autoencoder")
    row = torch.tensor([0, 7, 8, 255], dtype=torch.uint8).repeat(4)
    rgb = row.view(1, 1, 16, 1).expand(2, 16, 16, 6)
    with drawing(rand_like=torch.full(rgb.shape, 0.5)):
        loss, metrics = sp.autoencoder_loss(agent, rgb)
    z = agent.critic.trunk(agent.encoder(rgb))
    levels = torch.tensor([0.0, 0, 1, 31]).repeat(4).view(1, 1, 16, 1)
    error = (agent.decoder(z) - ((levels + 0.5) / 32 - 0.5)).square().mean()
    torch.testing.assert_close(metrics["loss/reconstruction"], error.detach())
    torch.testing.assert_close(loss, error + 0.5 * (z**2).sum(1).mean() / 2)


def test_only_the_decoder_decays_and_the_convolutions_have_two_adams():
    agent, optimizers, _, _ = learning_parts(encoder="autoencoder")
    seen, decoder = optimizers["autoencoder_optimizer"].param_groups
    assert (seen["weight_decay"], decoder["weight_decay"]) == (0, 1e-7)
    assert set(decoder["params"]) == set(agent.decoder.parameters())
    both = {*agent.encoder.parameters(), *agent.critic.trunk.parameters()}
    assert set(seen["params"]) == both
    (q,) = optimizers["q_optimizer"].param_groups
    assert both < set(q["params"])


@pytest.mark.parametrize("delta", [False, True])
def test_first_weights_are_orthogonal_and_the_target_is_the_critic(delta):
    agent, _, _, _ = learning_parts(encoder="autoencoder", delta_orthogonal=delta)
    for layer in agent.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight = layer.weight.detach()
            if delta and weight.ndim == 4:
                assert weight.count_nonzero() == weight[:, :, 1, 1].count_nonzero()
                weight = weight[:, :, 1, 1]
            weight = weight.flatten(1)
            if weight.shape[0] > weight.shape[1]:
                weight = weight.T
            square = 1.0 if isinstance(layer, nn.Linear) else 2.0
            expected = square * torch.eye(len(weight))
            torch.testing.assert_close(weight @ weight.T, expected, atol=1e-4, rtol=0)
            assert not layer.bias.any()
    for name, value in agent.target.state_dict().items():
        assert torch.equal(value, agent.critic.state_dict()[name])


# --- Augmentations --------------------------------------------------------------------------------
def images(n, size):
    """Stacks of two equal frames, so that what treats them differently is seen."""
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(1, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)
    return rgb.repeat(1, 1, 1, 2)


def offsets(out, canvas):
    """Where each small image stands in its large one; exactly one place each."""
    size, places = out.shape[1], []
    for small, large in zip(out, canvas, strict=True):
        span = range(large.shape[0] - size + 1)
        found = [(y, x) for y in span for x in span
                 if torch.equal(large[y : y + size, x : x + size], small)]  # fmt: skip
        assert len(found) == 1
        places += found
    return places


def assert_uniform(places):
    """400 places among 25: chi-square with 24 degrees of freedom, p = 0.001."""
    counts = np.bincount([5 * y + x for y, x in places], minlength=25)
    assert float(((counts - 16) ** 2 / 16).sum()) < 51.2


def test_shift_is_a_crop_of_the_image_with_repeated_edges():
    torch.manual_seed(1)
    args, rgb = arguments(augmentation="shift"), images(400, 16)
    padded = F.pad(rgb.permute(0, 3, 1, 2).float(), [2] * 4, "replicate")
    padded = padded.permute(0, 2, 3, 1).to(torch.uint8)
    out = sp.augment(rgb, args, torch.rand(400, 2))
    assert out.shape == rgb.shape and out.dtype == torch.uint8
    assert_uniform(offsets(out, padded))
    least_and_most = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    out = sp.augment(rgb[:2], args, least_and_most)
    assert offsets(out, padded[:2]) == [(0, 0), (4, 4)]
    assert torch.equal(sp.augment(rgb, args), rgb)


def test_crop_is_uniform_and_its_middle_is_seen_in_evaluation():
    torch.manual_seed(1)
    args, rgb = arguments(augmentation="crop", margin=4), images(400, 20)
    assert args.render_size == 20
    out = sp.augment(rgb, args, torch.rand(400, 2))
    assert out.shape == (400, 16, 16, 6)
    assert_uniform(offsets(out, rgb))
    assert torch.equal(sp.augment(rgb, args), rgb[:, 2:18, 2:18])


def both_observations(rgb, args) -> tuple:
    batch = dict(obs={"rgb": rgb}, next_obs={"rgb": rgb}, rewards=torch.zeros(len(rgb)))
    out = sp.views(batch, args)
    return out["obs"]["rgb"], out["next_obs"]["rgb"]


def test_translate_shows_the_middle_on_black_at_one_place_for_both_observations():
    args = arguments(augmentation="translate", margin=4, copies=3)
    assert args.render_size == 16
    rgb = images(8, 16)
    middle = rgb[:, 2:14, 2:14]
    obs, next_obs = both_observations(rgb, args)
    places = offsets(middle.repeat(3, 1, 1, 1), obs)
    assert len(set(places)) > 5 and set(sum(places, ())) == {0, 1, 2, 3, 4}
    assert obs.sum() == 3 * middle.sum(), "the rest is black"
    assert places == offsets(middle.repeat(3, 1, 1, 1), next_obs), "o and o' are moved alike"
    assert places[:8] != places[8:16], "copies are not"
    evaluated = sp.augment(rgb, args)
    assert torch.equal(evaluated[:, 2:14, 2:14], middle) and evaluated.sum() == middle.sum()


@pytest.mark.parametrize("augmentation", ["shift", "crop"])
def test_both_observations_and_all_copies_are_augmented_independently(augmentation):
    torch.manual_seed(1)
    args = arguments(augmentation=augmentation, margin=4, copies=2)
    obs, next_obs = both_observations(images(8, args.render_size), args)
    copies = [*obs.chunk(2), *next_obs.chunk(2)]
    for i, a in enumerate(copies):
        assert all(sum(map(torch.equal, a, b)) < 4 for b in copies[:i])


def test_without_augmentation_nothing_changes():
    args, rgb = arguments(augmentation="none"), images(8, 16)
    obs, next_obs = both_observations(rgb, args)
    assert torch.equal(obs, rgb) and torch.equal(next_obs, rgb)
    assert sp.augment(rgb, args) is rgb


# --- Compiled and plain ---------------------------------------------------------------------------
def after_updates(encoder, **route) -> dict:
    agent, _, batch, args = learning_parts(encoder=encoder, copies=2)
    args = replace(args, **route)
    agent.to(args.device)
    batch = tree_map(lambda tensor: tensor.to(args.device), batch)
    learn = sp.make_update(agent, sp.make_optimizers(agent, args), args)
    torch.manual_seed(7)
    for _ in range(6):
        learn([batch, batch])
    return {name: value.cpu() for name, value in agent.state_dict().items()}


COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
WITH_COMPILER = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler"),
]


@pytest.mark.parametrize("encoder, backend", [
    ("separate", "aot_eager"), ("autoencoder", "aot_eager"),  # traced, without code generation
    pytest.param("autoencoder", "inductor", marks=WITH_COMPILER),
])  # fmt: skip
def test_compiled_route_equals_the_plain_one(monkeypatch, encoder, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    torch.compiler.reset()
    plain = after_updates(encoder)
    with torch._inductor.config.patch(fallback_random=True):  # the same numbers
        compiled = after_updates(encoder, compile=True)
    torch.testing.assert_close(compiled, plain, atol=2e-5, rtol=1e-4)


def test_bfloat16_changes_losses_by_its_rounding_only():
    results = []
    for amp in (False, True):
        agent, optimizers, batch, args = learning_parts(encoder="autoencoder")
        learn = sp.make_update(agent, optimizers, replace(args, amp=amp))
        torch.manual_seed(7)
        results.append(learn([batch]))
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    plain, rounded = results
    torch.testing.assert_close(rounded, plain, atol=0.02, rtol=0.02)
    assert rounded["loss/qf"] != plain["loss/qf"]


@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_80_stay_apart_in_bfloat16(monkeypatch, compiled):
    """bfloat16 has 80 and 80.5: the last layers of critic and actor stay in float32."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f: compiler(f, backend="aot_eager", fullgraph=True)
    )
    torch.compiler.reset()
    agent, _, batch, args = learning_parts(hidden=64)
    for head in agent.critic.heads:
        head[-1].bias.data.fill_(80.0)
    found = []
    for amp in (False, True):
        values = torch.autocast("cpu", torch.bfloat16, enabled=amp)(q_values)
        values = torch.compile(values) if compiled else values
        found.append(values(agent, batch).detach())
    plain, rounded = found
    assert rounded.dtype == torch.float32 and len(rounded.unique()) == rounded.numel()
    torch.testing.assert_close(rounded, plain, atol=0.03, rtol=0)


def q_values(agent, batch):
    obs = batch["obs"]
    return agent.critic(agent.encoder(obs["rgb"]), obs["state"], batch["actions"])


@pytest.mark.parametrize("flags, warned", [
    ("flags\t: avx512f avx512_bf16", False), ("Features\t: asimd bf16", False), ("flags\t: avx2", True),
])  # fmt: skip
def test_bfloat16_without_units_for_it_is_warned_of(monkeypatch, capsys, flags, warned):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/cpuinfo")
    monkeypatch.setattr(Path, "read_text", lambda path: flags)
    for amp in (False, True):
        agent, optimizers, _, args = learning_parts(amp=amp)
        sp.make_update(agent, optimizers, args)
    message = "--amp is slow on this device: use --no-amp\n"
    assert capsys.readouterr().err == message * warned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("encoder", PATTERNS)
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_equals_the_plain_route(compiled, encoder):
    plain = after_updates(encoder, device="cuda")
    graph = after_updates(encoder, device="cuda", cudagraphs=True, compile=compiled)
    torch.testing.assert_close(graph, plain, atol=1e-3, rtol=1e-2)


# --- Runs -----------------------------------------------------------------------------------------
def table(path) -> list[dict]:
    return list(csv.DictReader(Path(path).open()))


def test_a_short_run_from_end_to_end(fake):
    args = arguments(name="run", encoder="autoencoder", augmentation="none", capture_video=True)
    result = sp.train(args)
    run = fake / "runs/run"
    files = {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt", "videos"}
    assert {file.name for file in run.iterdir()} == files
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    rows = table(run / "eval.csv")
    assert list(rows[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    metrics = table(run / "metrics.csv")
    assert all(math.isfinite(float(value)) for row in metrics for value in row.values())
    assert float(metrics[-1]["train/episodes"]) > 0
    torch.manual_seed(args.seed)
    first, last = sp.Agent(args, SHAPES), sp.load(run / "checkpoint.pt")["agent"]
    changed = differences(first.state_dict(), last)
    assert changed >= CRITIC | ACTOR | {"decoder.convs", "target.heads", "target_encoder.convs"}


def test_evaluation_scores_whole_episodes_of_mean_actions():
    args = arguments(eval_episodes=100, eval_envs=50)
    agent, env, returns = sp.Agent(args, SHAPES), FakeEnv(50, stagger=False), []
    content = dict(args=vars(args), shapes=SHAPES, spec={}, agent=agent.state_dict())
    policy, metrics = sp.Policy(content), sp.evaluate(content, env, args, Path("unused"))
    for seed in (sp.EVAL_SEED, sp.EVAL_SEED + 1):
        obs = env.reset(seed)
        policy.reset()
        total = torch.zeros(50)
        for _ in range(10):
            obs, rewards, _, _, _ = env.step(policy.act(obs))
            total += rewards
        returns += total.tolist()
    assert metrics["eval/return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["eval/return_std"] == pytest.approx(np.std(returns), rel=1e-4)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_state(one: str, other: str):
    """Bit for bit, but for what names the run or tells the time."""
    whole, resumed = (sp.load(f"runs/{name}/checkpoint.pt") for name in (one, other))
    assert whole.keys() == resumed.keys()
    for key in whole.keys() - {"args", "progress", "csv_sizes"}:
        assert same(whole[key], resumed[key]), key
    for key in ("global_step", "best"):
        assert whole["progress"][key] == resumed["progress"][key]
    rows = [table(f"runs/{name}/eval.csv") for name in (one, other)]
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in a if "time" not in k} == {k: b[k] for k in b if "time" not in k}


@pytest.mark.parametrize("changes", [
    dict(encoder="separate", augmentation="shift"),
    dict(encoder="critic", augmentation="crop", copies=2),
    dict(encoder="reconstruction", augmentation="translate", update_every=3),
], ids=lambda changes: changes["encoder"])  # fmt: skip
def test_resume_continues_exactly(fake, changes):
    """2N steps equal N and then N more, with --save-buffer on the CPU, over the buffer's wrap."""
    args = arguments(
        save_buffer=True, total_timesteps=160, eval_freq=80, buffer_size=120, **changes
    )
    sp.train(replace(args, name="whole"))
    sp.train(replace(args, name="half", total_timesteps=80))
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was killed
        with path.open("a") as file:
            file.write("999,later\n")
    sp.train(sp.parse_args(["--resume", "runs/half", "--total-timesteps", "160"]))
    assert_same_state("whole", "half")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_resume_holds_the_buffer_once(fake, monkeypatch):
    """The checkpoint's pages, buffer included, are released when it has been read."""
    load_run = sp.load_run

    def loaded(run, parts):
        progress = load_run(run, parts)
        assert "checkpoint.pt" not in Path("/proc/self/maps").read_text()
        assert parts["q_optimizer"].state, "there was something to keep"
        return progress

    sp.train(arguments(name="run", save_buffer=True))
    monkeypatch.setattr(sp, "load_run", loaded)
    sp.train(sp.parse_args(["--resume", "runs/run", "--total-timesteps", "124"]))


def test_memory_is_what_is_available_below_every_limit(tmp_path):
    """Linux's own files, made up: the machine's, then groups of versions 2 and 1."""

    def free(**files):
        for name, text in files.items():
            path = tmp_path / places[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return sp.free_memory(torch.device("cpu"), tmp_path)

    groups, new = "sys/fs/cgroup", "sys/fs/cgroup/job/step"
    places = dict(
        machine="proc/meminfo",
        own="proc/self/cgroup",
        top_limit=f"{groups}/memory.max",
        top_stat=f"{groups}/memory.stat",
        step_limit=f"{new}/memory.max",
        step_stat=f"{new}/memory.stat",
        old_limit=f"{groups}/memory/memory.limit_in_bytes",
        old_stat=f"{groups}/memory/memory.stat",
    )
    stat = "anon 100\nfile 500\nshmem 20\ninactive_anon 7\n"
    assert free() == math.inf, "not Linux"
    machine = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   4 kB\n"
    assert free(machine=machine, own="0::/\n") == 4096
    assert free(top_limit="max\n", top_stat=stat) == 4096
    assert free(top_limit="1000\n") == 1000 - 120, "files in the cache do not count"
    assert free(own="0::/job/step\n", step_limit="500\n", step_stat=stat) == 500 - 120
    old = "rss 7\ntotal_cache 9\ntotal_rss 100\ntotal_shmem 1\n"
    own = "8:pids:/\n4:memory:/docker/123\n0::/\n"
    assert free(own=own, old_limit="300\n", old_stat=old) == 300 - 101


def interrupt_at(monkeypatch, step: int):
    original = FakeEnv.step

    def interrupted(env, actions):
        if env.num_envs == 4 and env.steps == step:
            signal.raise_signal(signal.SIGINT)
        return original(env, actions)

    monkeypatch.setattr(FakeEnv, "step", interrupted)


def test_ctrl_c_saves_when_the_step_is_whole(fake, monkeypatch):
    args = arguments(save_buffer=True, log_freq=1_000, eval_envs=8)
    sp.train(replace(args, name="whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 18)  # one step begins the run, this is the 18th after it
        with pytest.raises(SystemExit, match="interrupted at step 72: continue with --resume"):
            sp.train(replace(args, name="half"))
    sp.train(sp.parse_args(["--resume", "runs/half"]))
    assert_same_state("whole", "half")


def test_a_run_that_never_evaluated_can_be_resumed(fake, monkeypatch):
    def killed(env, actions):
        if env.steps == 3:
            raise RuntimeError("killed")
        return step(env, actions)

    step = FakeEnv.step
    args = arguments(save_buffer=True)
    sp.train(replace(args, name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(FakeEnv, "step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            sp.train(replace(args, name="half"))
    sp.train(sp.parse_args(["--resume", "runs/half"]))
    assert_same_state("whole", "half")


def test_resume_without_buffer_first_fills_it(fake):
    sp.train(arguments(name="run", total_timesteps=80))
    agent = sp.load("runs/run/checkpoint.pt")["agent"]
    result = sp.train(sp.parse_args(["--resume", "runs/run", "--total-timesteps", "116"]))
    assert not differences(agent, sp.load("runs/run/checkpoint.pt")["agent"])
    assert result["global_step"] == 116
    sp.train(sp.parse_args(["--resume", "runs/run", "--total-timesteps", "200"]))
    assert differences(agent, sp.load("runs/run/checkpoint.pt")["agent"])


@pytest.mark.parametrize("words, message", [
    (["--lr", "0.5"], "--lr cannot change on --resume of runs/run"),
    (["--buffer-size", "800"], "--buffer-size cannot change on --resume"),
    (["--no-save-buffer"], "--save-buffer cannot change on --resume"),
    (["--encoder", "separate"], "--encoder cannot change on --resume"),
    (["--device", "cuda"], "--device must stay cpu"),
])  # fmt: skip
def test_resume_refuses_what_it_cannot_honour(fake, words, message):
    sp.train(arguments(name="run", total_timesteps=20, save_buffer=True))
    with pytest.raises(ValueError, match=message):
        sp.parse_args(["--resume", "runs/run", *words])
    args = sp.parse_args(["--resume", "runs/run", "--total-timesteps", "90", "--track"])
    assert (args.total_timesteps, args.track, args.hidden) == (90, True, 16)


def test_best_is_the_best(fake, monkeypatch):
    returns = iter([1.0, 3.0, 2.0])

    def scored(checkpoint, env, args, video):
        return {"eval/return": next(returns)}

    monkeypatch.setattr(sp, "evaluate", scored)
    sp.train(arguments(name="run", total_timesteps=180))
    assert sp.load("runs/run/best.pt")["progress"]["global_step"] == 120
    assert sp.load("runs/run/checkpoint.pt")["progress"]["best"] == 3.0


def test_evaluation_repeats_and_leaves_training_alone(fake):
    sp.train(arguments(name="often", eval_freq=20))
    sp.train(arguments(name="seldom"))
    often, seldom = (sp.load(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    words = ["--evaluate", "--checkpoint", "runs/often/checkpoint.pt"]
    results = [sp.train(sp.parse_args(words)) for _ in range(2)]
    assert results[0] == results[1]
    last = table("runs/often/eval.csv")[-1]
    assert float(last["eval/return"]) == results[0]["eval/return"]


@pytest.mark.parametrize("encoder, augmentation", [
    ("separate", "crop"), ("critic", "translate"), ("autoencoder", "shift"),
])  # fmt: skip
def test_policy_from_the_file_equals_the_actor(fake, encoder, augmentation):
    args = arguments(name="run", encoder=encoder, augmentation=augmentation)
    sp.train(args)
    before = torch.get_rng_state()
    policy = sp.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = sp.Agent(args, SHAPES)
    agent.load_state_dict(sp.load("runs/run/best.pt")["agent"])
    env = FakeEnv(5, size=args.render_size)
    past = None
    for _ in range(3):
        obs = env.step(torch.ones(5, 2))[0]
        stack = torch.cat([obs["rgb"] if past is None else past, obs["rgb"]], -1)
        past = obs["rgb"]
        with torch.no_grad():
            features = agent.policy_features(sp.augment(stack, args))
            mean, _ = agent.gaussian(features, obs["state"])
        torch.testing.assert_close(policy.act(obs), mean.tanh())
    policy.reset()
    assert not torch.equal(policy.act(obs), mean.tanh()), "the earlier images are forgotten"
    assert policy.spec == env.spec


def test_a_true_end_is_not_bootstrapped(fake, monkeypatch):
    """Terminations reach the buffer as a discount of 0, time limits as the environment's own."""

    class Ending(FakeEnv):
        def step(self, actions):
            obs, rewards, _, ends, info = super().step(actions)
            even = torch.arange(self.num_envs) % 2 == 0
            info["discount"] = torch.full((self.num_envs,), 0.75)
            return obs, rewards, ends & even, ends & ~even, info

    monkeypatch.setattr(sp, "make_envs", lambda args: (Ending(4), FakeEnv(4, stagger=False)))
    sp.train(arguments(name="run", save_buffer=True))
    data = sp.load("runs/run/checkpoint.pt")["replay"]
    discounts, age = (data[name].view(-1, 4)[:25] for name in ("discounts", "age"))
    for env in range(4):
        ages = age[:, env].tolist()
        ended = [
            i - 2 for i in range(2, 25) if ages[i] == 0
        ]  # before it lies the final observation
        assert ended and all(discounts[i, env] == (0.75 if env % 2 else 0) for i in ended)
        others = [i for i in range(23) if ages[i + 1] > 0 and i not in ended]
        assert all(discounts[i, env] == 0.75 for i in others)


def test_the_loop_acts_by_the_policy_and_stores_what_the_environment_gave(fake, monkeypatch):
    """First uniform actions, then the policy's, with new noise each time."""
    given, kept, acted = [], [], []
    step, add, sample = FakeEnv.step, sp.Replay.add, sp.sample_actions

    def watched_step(env, actions):
        given.append((actions, step(env, actions)))
        return given[-1][1]

    def watched_add(replay, *values):
        kept.append(values)
        add(replay, *values)

    def watched_sample(*given):
        actions, log_probs = sample(*given)
        if not torch.is_grad_enabled():
            acted.append(actions)
        return actions, log_probs

    monkeypatch.setattr(FakeEnv, "step", watched_step)
    monkeypatch.setattr(sp.Replay, "add", watched_add)
    monkeypatch.setattr(sp, "sample_actions", watched_sample)
    monkeypatch.setattr(sp, "make_update", lambda *parts: lambda batches: {})
    far = dict(eval_freq=1_000, log_freq=1_000)
    sp.train(arguments(name="run", total_timesteps=400, learning_starts=200, **far))
    given = given[1:101]  # after the one that begins, before the evaluation
    for (actions, (obs, rewards, _, ends, info)), values in zip(given, kept, strict=True):
        assert torch.equal(values[0], actions) and torch.equal(values[1], rewards)
        assert torch.equal(values[3], ends)
        assert values[4] is info["final_obs"] and values[5] is obs
    assert any(values[3].any() for values in kept), "an episode ended"
    first = torch.stack([actions for actions, _ in given[:50]])
    assert first.std() == pytest.approx(1 / math.sqrt(3), abs=0.05) and first.abs().max() <= 1
    assert len(acted) == 50
    assert all(torch.equal(a, b) for (a, _), b in zip(given[50:], acted, strict=True))
    then = torch.stack(acted)
    assert then.std() > 0.1 and len(then.unique()) == then.numel(), "new noise each time"


@pytest.mark.parametrize("changes, updates", [
    (dict(), 15), (dict(update_every=3), 20), (dict(policy_frequency=1), 30),
])  # fmt: skip
def test_updates_per_transition(fake, monkeypatch, changes, updates):
    """120 transitions with learning, one critic update after every fourth."""
    calls = []

    def counted(agent, optimizers, args):
        return lambda batches: calls.append(len(batches)) or {"loss/qf": torch.zeros(())}

    monkeypatch.setattr(sp, "make_update", counted)
    args = arguments(name="run", total_timesteps=160, **changes)
    sp.train(args)
    assert abs(len(calls) - updates) <= 1 and set(calls) == {args.policy_frequency}


def test_stops_at_nan_and_names_the_tensor(fake, monkeypatch):
    class Broken(FakeEnv):
        def step(self, actions):
            obs, rewards, terminations, truncations, info = super().step(actions)
            return obs, rewards * math.nan, terminations, truncations, info

    monkeypatch.setattr(sp, "make_envs", lambda args: (Broken(4), FakeEnv(4, stagger=False)))
    message = r"^\S+ is not finite at step 40; last good checkpoint: runs/run/checkpoint.pt$"
    with pytest.raises(FloatingPointError, match=message):
        sp.train(arguments(name="run"))
    agent, _, _, _ = learning_parts()
    agent.critic.heads[1][0].bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"^critic.heads.1.0.bias is not finite at step 5"):
        sp.check_finite(agent, {}, 5, Path("run"))


def test_existing_runs_are_not_overwritten(fake):
    sp.train(arguments(name="run", total_timesteps=20))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sp.train(arguments(name="run"))


# --- Command line ---------------------------------------------------------------------------------
def test_help_shows_each_task_device_and_preset_its_defaults(capsys):
    for env_id, device, preset in (
        ("dot_reach", "cpu", "drq"),
        ("cheetah_run", "cpu", "drq"),
        ("SO101ReachCube-v1", "cpu", "drq"),
        ("walker_walk", "cuda", "rad"),
        ("walker_walk", "cuda", "sac_ae"),
    ):
        command = ["--env-id", env_id, "--device", device, "--preset", preset]
        with pytest.raises(SystemExit) as stop:
            sp.parse_args([*command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and env_id in text
        args = sp.parse_args(command)
        for name, value in sp.tuned(env_id, device, preset).items():
            assert getattr(args, name) == value
            if type(value) in (int, str):
                assert f"--{name.replace('_', '-')} {value}" in text


def preset_args(env_id, preset, device="cuda") -> sp.Args:
    return sp.parse_args(["--env-id", env_id, "--device", device, "--preset", preset])


def test_presets_have_the_values_of_the_authors_scripts():
    """The defaults and scripts of the repositories that tests/golden/originals_make.py names; their losses are tested
    against the authors' own code in test_pixels_originals.py."""
    common = dict(image_size=84, frame_stack=3, gamma=0.99, hidden=1024, feature_dim=50,
                  policy_frequency=2, encoder_strides=(2, 1, 1, 1), encoder_channels=32, lr=1e-3,
                  alpha=0.1, tau=0.01, learning_starts=1_000, action_repeat=2, num_envs=1,
                  update_every=1, trunk_tanh=True, buffer_size=100_000)  # fmt: skip
    ae = common | dict(encoder_tau=0.05, alpha_lr=1e-4, alpha_beta=0.5, batch_size=128,
                       copies=1)  # fmt: skip
    rad = ae | dict(encoder="critic", trunk_tanh=False)
    published = {
        "drq": common | dict(encoder="critic", augmentation="shift", margin=4, copies=2,
                             batch_size=512, encoder_tau=0.01, alpha_lr=1e-3, alpha_beta=0.9),
        "rad": rad | dict(augmentation="crop", render_size=100),
        "rad_translate": rad | dict(augmentation="translate", image_size=108, render_size=108, margin=8),
        "sac_ae": ae | dict(encoder="autoencoder", augmentation="none", buffer_size=1_000_000),
    }  # fmt: skip
    for preset, values in published.items():
        args = preset_args("walker_walk", preset)
        assert {name: getattr(args, name) for name in values} == values
    assert sp.DECODER_PENALTY == 1e-6
    args = preset_args("cheetah_run", "rad_translate")  # scripts/cheetah_test.sh
    assert (args.lr, args.feature_dim, args.learning_starts, args.action_repeat) == (
        2e-4,
        64,
        10_000,
        4,
    )
    assert (preset_args("cheetah_run", "rad").lr, preset_args("cheetah_run", "drq").lr) == (
        2e-4,
        1e-3,
    )
    repeats = dict(cartpole_swingup=8, reacher_easy=4, cheetah_run=4, cup_catch=4, finger_spin=2)
    for env_id, repeat in repeats.items():
        args = preset_args(env_id, "drq")
        assert (args.action_repeat, args.total_timesteps * repeat) == (repeat, 500_000)


@pytest.mark.parametrize("env_id", ["cartpole_swingup", "dot_reach"])
@pytest.mark.parametrize(
    "preset, published", [("drq", 4 / 84), ("rad", 16 / 100), ("rad_translate", 8 / 108)]
)
def test_a_cpus_size_moves_images_by_the_published_share(env_id, preset, published):
    """To the pixel."""
    args = preset_args(env_id, preset, "cpu")
    assert abs(args.margin - published * args.render_size) < 0.51


@pytest.mark.parametrize("changes, words", [
    (dict(evaluate=True), "--evaluate and --checkpoint FILE go together"),
    (dict(eval_episodes=7), "multiple of --eval-envs"),
    (dict(num_envs=0), "--num-envs must be at least 1"),
    (dict(augmentation="translate", margin=20), "--margin must be"),
    (dict(learning_starts=0), "--learning-starts must be at least"),
    (dict(buffer_size=19), "--buffer-size must be at least"),
])  # fmt: skip
def test_arguments_that_cannot_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        sp.check(arguments(**changes))


@pytest.mark.parametrize("words, message", [
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--evaluate", "--checkpoint", str(SCRIPT)], "is no checkpoint: damaged"),
    (["--image-size", "12", "--encoder-strides", "2", "2", "2"], "--image-size is too small"),
    (["--buffer-size", str(10**12)], "the replay buffer needs"),
])  # fmt: skip
def test_bad_input_is_refused(fake, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sp.train(sp.parse_args(["--device", "cpu", *words]))


def test_an_error_is_one_line(tmp_path):
    words = [sys.executable, str(SCRIPT), "--device", "cpu", "--margin", "99"]
    result = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "--margin" in line and not (tmp_path / "runs").exists()
