"""SAC from pixels: who learns from which loss, against a plain SAC, augmentations, and runs end to end."""

import copy
import csv
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import sac_pixels as sp
import torch
import torch.nn as nn
import torch.nn.functional as F
from fake_env import FakeEnv
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

SCRIPT = Path(sp.__file__)
CPU = torch.device("cpu")
SHAPES = dict(channels=3, state=3, action=2)
PATTERNS = ("separate", "critic", "autoencoder")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(**changes) -> sp.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(env_id="Fake", device="cpu", amp=False, compile=False, cudagraphs=False, num_envs=4, image_size=16,
                  margin=2, frame_stack=2, action_repeat=1, encoder_strides=(2, 1), encoder_channels=4, feature_dim=8,
                  hidden=16, batch_size=8, buffer_size=400, learning_starts=40, update_every=4, total_timesteps=120,
                  eval_freq=60, log_freq=20, eval_episodes=8, eval_envs=4, target_augs=1, online_augs=1,
                  capture_video=False)  # fmt: skip
    return sp.Args(**values | changes)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_fakes(args, device):
    size = args.render_size
    env = None if args.evaluate else FakeEnv(args.num_envs, seed=args.seed, size=size)
    return env, FakeEnv(args.eval_envs, seed=1, size=size, stagger=False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Train on FakeEnv, with runs/ in a temporary folder."""
    monkeypatch.setattr(sp, "make_envs", make_fakes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learning_parts(**changes):
    args = arguments(**changes)
    env = FakeEnv(args.num_envs, size=args.render_size)
    torch.manual_seed(3)
    agent = sp.Agent(args, SHAPES, CPU)
    replay = sp.Replay(env.obs, 2, args.buffer_size // 4, args.frame_stack, args.n_step, args.gamma, CPU)
    for _ in range(30):
        actions = torch.rand((args.num_envs, 2), generator=env.generator) * 2 - 1
        obs, rewards, terminations, truncations, info = env.step(actions)
        replay.add(actions, rewards, (~terminations).float(), truncations, info["final_obs"], obs)
    return agent, replay, args


def differences(before: dict, after: dict) -> set[str]:
    """Parts of the agent, to the depth of two names, in which any parameter has changed by any bit."""
    assert before.keys() == after.keys()
    return {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k], after[k])}


def snapshot(agent) -> dict:
    return copy.deepcopy(agent.state_dict())


# --- Who learns from which loss ---------------------------------------------------------------------------------------
CRITIC = {"critic.encoder", "critic.projection", "critic.heads"}


@pytest.mark.parametrize("augmentation", ["none", "shift"])
@pytest.mark.parametrize("encoder", PATTERNS)
def test_each_loss_reaches_exactly_its_parameters(encoder, augmentation):
    agent, replay, args = learning_parts(encoder=encoder, augmentation=augmentation)
    batch, start = sp.views(replay.sample(8, generator()), args, generator(1)), snapshot(agent)

    loss, features, _ = sp.critic_loss(agent, batch, torch.randn(8, 2), args)
    sp.descend(loss, agent.optimizers["q"])
    after_critic = snapshot(agent)
    assert differences(start, after_critic) == CRITIC

    before = after_critic
    if encoder == "autoencoder":
        rgb = batch["obs"]["rgb"]
        sp.descend(sp.autoencoder_loss(agent, rgb, torch.rand(rgb.shape), args)[0], agent.optimizers["autoencoder"])
        before = snapshot(agent)
        assert differences(after_critic, before) == {"critic.encoder", "critic.projection", "decoder.linear",
                                                     "decoder.convs"}  # fmt: skip
    agent.zero_grad()
    loss, _ = sp.actor_loss(agent, batch, features, torch.randn(8, 2), args)
    loss.backward()
    own = {"actor.encoder"} if encoder == "separate" else set()
    reached = {".".join(k.split(".")[:2]) for k, v in agent.named_parameters() if v.grad is not None and v.grad.any()}
    # the critic's heads and bottleneck pass the gradient on to the action; only the actor's optimiser steps
    assert reached == {"actor.projection", "actor.head", "log_alpha", "critic.heads", "critic.projection"} | own
    sp.descend(sp.actor_loss(agent, batch, features, torch.randn(8, 2), args)[0], agent.optimizers["actor"],
               agent.optimizers["alpha"])  # fmt: skip
    assert differences(before, snapshot(agent)) == {"actor.projection", "actor.head", "log_alpha"} | own


def test_without_the_critic_s_gradient_only_the_picture_trains_the_convolutions():
    agent, replay, args = learning_parts(encoder="autoencoder", critic_gradient=False, augmentation="none")
    batch, start = sp.views(replay.sample(8, generator()), args, generator(1)), snapshot(agent)
    sp.descend(sp.critic_loss(agent, batch, torch.randn(8, 2), args)[0], agent.optimizers["q"])
    middle = snapshot(agent)
    assert differences(start, middle) == {"critic.projection", "critic.heads"}
    rgb = batch["obs"]["rgb"]
    sp.descend(sp.autoencoder_loss(agent, rgb, torch.rand(rgb.shape), args)[0], agent.optimizers["autoencoder"])
    assert "critic.encoder" in differences(middle, snapshot(agent))


@pytest.mark.parametrize("encoder", PATTERNS)
def test_a_block_changes_everything_once_and_the_target_by_its_shares(encoder):
    agent, replay, args = learning_parts(encoder=encoder, encoder_tau=0.5, tau=0.25)
    start = snapshot(agent)
    metrics = sp.update_block(agent, replay, args, generator())
    after = snapshot(agent)
    assert {k.split(".")[0] for k in differences(start, after)} == {k.split(".")[0] for k in start}
    for k, v in after.items():
        if k.startswith("target."):
            share = 0.25 if "heads" in k else 0.5
            torch.testing.assert_close(v, start[k].lerp(after[k.replace("target.", "critic.")], share))
    assert not any(v.requires_grad for v in metrics.values())
    assert all(p.requires_grad for p in agent.critic.parameters()), "the critic learns again after the actor's update"


# --- Against references -----------------------------------------------------------------------------------------------
class PlainSAC:
    """Textbook SAC for the same networks, with torch's distributions and ordinary Adam: one critic loss a picture."""

    def __init__(self, agent, args):
        self.agent, self.args = agent, args
        self.q = torch.optim.Adam(agent.critic.parameters(), args.q_lr)
        self.pi = torch.optim.Adam(agent.actor.parameters(), args.policy_lr)
        self.alpha = torch.optim.Adam([agent.log_alpha], args.alpha_lr, betas=(args.alpha_beta, 0.999))

    def features(self, encoder, rgb):
        x = encoder.convs(rgb.permute(0, 3, 1, 2).float() / 255)
        return x.permute(0, 2, 3, 1).reshape(len(rgb), -1)

    def act(self, rgb, state, noise):
        encoder = self.agent.critic.encoder if self.agent.actor.encoder is None else self.agent.actor.encoder
        h = self.features(encoder, rgb)
        h = h.detach() if self.agent.actor.encoder is None else h
        out = self.agent.actor.head(torch.cat([self.agent.actor.projection(h), state], 1))
        mean, log_std = out.split(out.shape[1] // 2, 1)
        log_std = -10 + 0.5 * (2 - -10) * (log_std.tanh() + 1)
        normal = Independent(Normal(mean, log_std.exp()), 1)
        policy = TransformedDistribution(normal, TanhTransform(cache_size=1))
        actions = policy.transforms[0](mean + log_std.exp() * noise)  # fills the cache: atanh loses nothing
        return actions, policy.log_prob(actions)

    def value(self, critic, h, state, actions):
        x = torch.cat([critic.projection(h), state, actions], 1)
        return [head(x).squeeze(1) for head in critic.heads]

    def update(self, batches, noises, actor_noise):
        agent, args = self.agent, self.args
        for batch, noise in zip(batches, noises, strict=True):
            obs, after = batch["obs"], batch["next_obs"]
            with torch.no_grad():
                actions, log_probs = self.act(after["rgb"], after["state"], noise)
                h = self.features(agent.target.encoder, after["rgb"])
                q1, q2 = self.value(agent.target, h, after["state"], actions)
                y = batch["rewards"] + batch["discounts"] * (torch.min(q1, q2) - agent.log_alpha.exp() * log_probs)
            h = self.features(agent.critic.encoder, obs["rgb"])
            q1, q2 = self.value(agent.critic, h, obs["state"], batch["actions"])
            self.q.zero_grad()
            (F.mse_loss(q1, y) + F.mse_loss(q2, y)).backward()
            before_step = h.detach()
            old = copy.deepcopy(agent.critic.encoder)  # the actor's features are those from before the step
            self.q.step()
        kept = agent.critic.encoder
        agent.critic.encoder = old
        actions, log_probs = self.act(obs["rgb"], obs["state"], actor_noise)
        agent.critic.encoder = kept
        q1, q2 = self.value(agent.critic, before_step, obs["state"], actions)
        self.pi.zero_grad()
        (agent.log_alpha.exp().detach() * log_probs - torch.min(q1, q2)).mean().backward()
        self.pi.step()
        self.alpha.zero_grad()
        (agent.log_alpha.exp() * (-log_probs.detach() + actions.shape[1])).mean().backward()
        self.alpha.step()
        for part, tau in (("encoder", args.encoder_tau), ("projection", args.encoder_tau), ("heads", args.tau)):
            for t, s in zip(getattr(agent.target, part).parameters(), getattr(agent.critic, part).parameters(),
                            strict=True):  # fmt: skip
                t.data.mul_(1 - tau).add_(tau * s.data)


@pytest.mark.parametrize("encoder", ["separate", "critic"])
def test_one_copy_without_augmentation_is_plain_sac(encoder):
    agent, replay, args = learning_parts(encoder=encoder, augmentation="none", encoder_tau=0.05, alpha_beta=0.5,
                                         target_augs=2, online_augs=2)  # fmt: skip
    reference, mine, random = PlainSAC(copy.deepcopy(agent), args), generator(5), generator(5)
    for _ in range(3):
        sp.update_block(agent, replay, args, mine)
        batches, noises = [], []
        for _ in range(args.policy_frequency):
            batches.append(replay.sample(8, random))
            torch.rand((2, 8, 4), generator=random)  # what an augmentation would have used
            noises.append(torch.randn((8, 2), generator=random))
        reference.update(batches, noises, torch.randn((8, 2), generator=random))
    expected = reference.agent.state_dict()
    for k, v in agent.state_dict().items():
        torch.testing.assert_close(v, expected[k], atol=3e-5, rtol=1e-4)


def test_copies_average_targets_and_add_losses():
    """K = 3 targets and M = 2 losses worked out one copy at a time."""
    agent, replay, args = learning_parts(target_augs=3, online_augs=2)
    batch = sp.views(replay.sample(8, generator()), args, generator(1))
    assert len(batch["obs"]["rgb"]) == 16 and len(batch["next_obs"]["rgb"]) == 24 and len(batch["rewards"]) == 8
    noise = torch.randn(24, 2)
    loss, features, metrics = sp.critic_loss(agent, batch, noise, args)
    state, next_state, alpha, y = batch["obs"]["state"], batch["next_obs"]["state"], args.alpha, 0
    with torch.no_grad():
        for k in range(3):
            rgb = batch["next_obs"]["rgb"][8 * k : 8 * k + 8]
            actions, log_probs = sp.sample_actions(agent.actor, agent.policy_features(rgb), next_state,
                                                   noise[8 * k : 8 * k + 8])  # fmt: skip
            q1, q2 = agent.target(agent.target.encoder(rgb), next_state, actions)
            y = y + (batch["rewards"] + batch["discounts"] * (torch.min(q1, q2) - alpha * log_probs)) / 3
        expected = 0
        for m in range(2):
            h = agent.critic.encoder(batch["obs"]["rgb"][8 * m : 8 * m + 8])
            for q in agent.critic(h, state, batch["actions"]):
                expected = expected + F.mse_loss(q, y)
            if m == 0:
                torch.testing.assert_close(features, h)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(metrics["train/target"], y.mean())


def test_log_probability_is_that_of_a_squashed_gaussian():
    torch.manual_seed(0)
    args = arguments()
    actor = sp.Actor(SHAPES, args)
    features, state = torch.randn(64, actor.projection[0].in_features), torch.randn(64, 3)
    noise = torch.randn(64, 2) * 2
    mean, log_std = actor(features, state)
    assert log_std.min() >= -10 and log_std.max() <= 2
    actions, log_probs = sp.sample_actions(actor, features, state, noise)
    policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=1))
    same = policy.transforms[0](mean + log_std.exp() * noise)
    torch.testing.assert_close(actions, same)
    torch.testing.assert_close(log_probs, policy.log_prob(same), atol=1e-3, rtol=1e-4)


def test_temperature_rises_when_entropy_is_low():
    for bias, rises in ((-3.0, True), (3.0, False)):  # log std near -10, or near 2
        agent, replay, args = learning_parts()
        agent.actor.head[-1].weight.data.zero_()
        agent.actor.head[-1].bias.data.copy_(torch.tensor([0.0, 0.0, bias, bias]) if rises else torch.zeros(4))
        if not rises:
            agent.actor.head[-1].bias.data[2:] = math.atanh(2 / 3)  # log std 0: the entropy is above -2
        before = agent.log_alpha.item()
        sp.update_block(agent, replay, args, generator())
        assert (agent.log_alpha.item() > before) == rises


def test_fixed_alpha_stays():
    agent, replay, args = learning_parts(autotune=False, alpha=0.2)
    sp.update_block(agent, replay, args, generator())
    assert agent.log_alpha.exp().item() == pytest.approx(0.2)


# --- Autoencoder ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoder_type", ["dmc", "impala"])
@pytest.mark.parametrize("size", [16, 21, 32, 48, 84, 85])
def test_decoder_mirrors_the_encoder(encoder_type, size):
    args = arguments(image_size=size, encoder_type=encoder_type, encoder_strides=(2, 1, 1, 1))
    encoder = sp.Encoder(9, args)
    rgb = torch.randint(0, 256, (2, size, size, 9), dtype=torch.uint8, generator=generator())
    assert encoder(rgb).shape == (2, encoder.features)
    decoder = sp.Decoder(encoder, args)
    assert decoder(torch.zeros(2, args.feature_dim)).shape == rgb.shape
    kinds = [type(layer) for layer in decoder.convs]
    assert kinds == [nn.ReLU, nn.ConvTranspose2d] * len(encoder.steps)


def test_published_sizes():
    encoder = sp.Encoder(9, sp.Args(env_id="x"))
    assert encoder.features == 32 * 35 * 35 and sum(p.numel() for p in encoder.parameters()) == 30_368
    impala = sp.Encoder(9, sp.Args(env_id="x", encoder_type="impala"))
    widths = [layer.out_channels for layer in impala.convs if isinstance(layer, nn.Conv2d)]
    assert widths == [16, 32, 32] and impala.features == 32 * 11 * 11
    assert sum(isinstance(layer, sp.Residual) for layer in impala.convs) == 6


def test_reconstruction_loss_by_hand():
    agent, _, args = learning_parts(encoder="autoencoder", decoder_lambda=0.5)
    rgb = torch.tensor([0, 7, 8, 255], dtype=torch.uint8).repeat(4).view(1, 1, 16, 1).expand(2, 16, 16, 6)
    dither = torch.full(rgb.shape, 0.5)
    loss, metrics = sp.autoencoder_loss(agent, rgb, dither, args)
    z = agent.critic.projection(agent.critic.encoder(rgb))
    levels = torch.tensor([0.0, 0, 1, 31]).repeat(4).view(1, 1, 16, 1)
    error = (agent.decoder(z) - ((levels + 0.5) / 32 - 0.5)).square().mean()
    penalty = (z**2).sum(1).mean() / 2
    torch.testing.assert_close(metrics["loss/reconstruction"], error.detach())
    torch.testing.assert_close(loss, error + 0.5 * penalty)


def test_only_the_decoder_decays_and_the_encoder_has_two_adams():
    agent, _, args = learning_parts(encoder="autoencoder", decoder_decay=0.1)
    seen, decoder = agent.optimizers["autoencoder"].param_groups
    assert (seen["weight_decay"], decoder["weight_decay"]) == (0, 0.1)
    assert {id(p) for p in decoder["params"]} == {id(p) for p in agent.decoder.parameters()}
    both = {id(p) for p in seen["params"]}
    assert both == {id(p) for part in (agent.critic.encoder, agent.critic.projection) for p in part.parameters()}
    assert both < {id(p) for group in agent.optimizers["q"].param_groups for p in group["params"]}


@pytest.mark.parametrize("delta", [False, True])
def test_first_weights(delta):
    torch.manual_seed(0)
    agent = sp.Agent(arguments(delta_orthogonal=delta, encoder="autoencoder"), SHAPES, CPU)
    for layer in agent.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            w = layer.weight.detach()
            assert not layer.bias.any()
            if delta:
                middle = w[..., 1, 1].clone()
                assert torch.equal(w.abs().sum(), middle.abs().sum()), "all but the middle is zero"
                flat = middle
            else:
                flat = w.flatten(1)
            flat = flat if flat.shape[0] <= flat.shape[1] else flat.T
            torch.testing.assert_close(flat @ flat.T, 2 * torch.eye(len(flat)), atol=1e-4, rtol=0)
    first = agent.critic.heads[0][0].weight.detach()
    torch.testing.assert_close(first.T @ first, torch.eye(first.shape[1]), atol=1e-4, rtol=0)
    for k, v in agent.target.state_dict().items():
        assert torch.equal(v, agent.critic.state_dict()[k])


# --- Augmentations ----------------------------------------------------------------------------------------------------
def pictures(n, size, frames=2):
    """Frames of one picture are equal, so that what treats them differently is seen."""
    rgb = torch.randint(1, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator())
    return rgb.repeat(1, 1, 1, frames)


def offsets(out, canvas):
    """Where each small picture stands in its large one; exactly one place each."""
    size, places = out.shape[1], []
    for small, large in zip(out, canvas, strict=True):
        span = range(large.shape[0] - size + 1)
        found = [(y, x) for y in span for x in span if torch.equal(large[y : y + size, x : x + size], small)]
        assert len(found) == 1
        places += found
    return places


def test_shift_is_a_crop_of_the_picture_with_repeated_edges():
    args, rgb = arguments(augmentation="shift", margin=2), pictures(400, 16)
    out = sp.augment(rgb, torch.rand((400, 4), generator=generator(1)), args)
    padded = F.pad(rgb.permute(0, 3, 1, 2).float(), [2] * 4, "replicate").permute(0, 2, 3, 1).to(torch.uint8)
    places = offsets(out, padded)
    counts = np.bincount([5 * y + x for y, x in places], minlength=25)
    assert out.shape == rgb.shape and out.dtype == torch.uint8
    chi_square = float(((counts - 16) ** 2 / 16).sum())
    assert chi_square < 51.2, "24 degrees of freedom, p = 0.001"
    edges = torch.tensor([[0.0] * 4, [1 - 2**-24] * 4])
    assert offsets(sp.augment(rgb[:2], edges, args), padded[:2]) == [(0, 0), (4, 4)]


def test_crop_is_uniform_and_its_middle_is_seen_in_evaluation():
    args = arguments(augmentation="crop", margin=4)
    assert args.render_size == 20
    rgb = pictures(400, 20)
    out = sp.augment(rgb, torch.rand((400, 4), generator=generator(1)), args)
    counts = np.bincount([5 * y + x for y, x in offsets(out, rgb)], minlength=25)
    assert out.shape == (400, 16, 16, 6) and float(((counts - 16) ** 2 / 16).sum()) < 51.2
    assert torch.equal(sp.center(rgb, args), rgb[:, 2:18, 2:18])


def test_translate_shows_the_whole_picture_on_black_at_one_place_for_both_observations():
    args = arguments(augmentation="translate", margin=4, target_augs=2, online_augs=3)
    assert args.render_size == 12
    rgb = pictures(8, 12)
    batch = dict(obs={"rgb": rgb}, next_obs={"rgb": rgb}, actions=torch.zeros(8, 2))
    out = sp.views(batch, args, generator(2))
    places = offsets(rgb.repeat(3, 1, 1, 1), out["obs"]["rgb"])
    assert len(set(places)) > 5 and all(0 <= i <= 4 for place in places for i in place)
    assert out["obs"]["rgb"].sum() == 3 * rgb.sum(), "the rest is black"
    assert places[:16] == offsets(rgb.repeat(2, 1, 1, 1), out["next_obs"]["rgb"]), "o and o' are moved alike"
    assert places[:8] != places[8:16], "copies are not"
    assert torch.equal(sp.center(rgb, args)[:, 2:14, 2:14], rgb)


@pytest.mark.parametrize("augmentation", ["shift", "crop", "cutout", "color_jitter"])
def test_both_observations_and_all_copies_are_augmented_independently(augmentation):
    args = arguments(augmentation=augmentation, target_augs=2, online_augs=2)
    rgb = pictures(8, args.render_size)
    batch = dict(obs={"rgb": rgb}, next_obs={"rgb": rgb}, actions=torch.zeros(8, 2))
    out = sp.views(batch, args, generator(2))
    copies = [*out["obs"]["rgb"].chunk(2), *out["next_obs"]["rgb"].chunk(2)]
    for i, a in enumerate(copies):
        assert all(sum(map(torch.equal, a, b)) < 4 for b in copies[:i])


def test_cutout_is_a_black_box_of_the_published_size_anywhere():
    args, rgb = arguments(augmentation="cutout", image_size=84), pictures(300, 84)
    out = sp.augment(rgb, torch.rand((300, 4), generator=generator(1)), args)
    black = (out == 0).all(-1)
    assert torch.equal(torch.where(black[..., None], rgb, out), rgb), "the rest is untouched"
    rows, columns = black.any(2), black.any(1)
    for box in (rows, columns):
        side = box.sum(1)
        assert side.min() >= 10 and side.max() <= 30 and len(side.unique()) > 15
        assert box[:, :5].any() and box[:, -5:].any(), "it reaches every edge"
    assert torch.equal(black, rows[:, :, None] & columns[:, None]), "it is a rectangle"


def test_jitter_is_the_same_for_all_frames_of_a_stack_and_other_for_each_sample():
    args = arguments(augmentation="color_jitter")
    rgb = torch.tensor([200, 90, 40], dtype=torch.uint8).repeat(64, 8, 8, 2)
    out = sp.augment(rgb, torch.rand((64, 4), generator=generator(1)), args)
    assert out.dtype == torch.uint8 and torch.equal(out[..., :3], out[..., 3:])
    assert len(out[:, 0, 0].unique(dim=0)) > 60
    still = sp.augment(rgb, torch.full((64, 4), 0.5), args)
    assert (still.int() - rgb.int()).abs().max() <= 1, "the middle of all ranges changes nothing"
    grey = torch.full((64, 8, 8, 6), 100, dtype=torch.uint8)
    out = sp.augment(grey, torch.rand((64, 4), generator=generator(1)), args).int()
    assert (out - out[..., :1]).abs().max() <= 1, "greys stay grey"
    assert out.min() >= 59 and out.max() <= 141, "brightness within 40 %"


def test_without_augmentation_nothing_changes():
    args, rgb = arguments(augmentation="none", target_augs=2, online_augs=2), pictures(8, 16)
    batch = dict(obs={"rgb": rgb}, next_obs={"rgb": rgb}, actions=torch.zeros(8, 2))
    out = sp.views(batch, args, generator())
    assert args.copies == (1, 1) and torch.equal(out["obs"]["rgb"], rgb) and torch.equal(out["next_obs"]["rgb"], rgb)
    assert sp.center(rgb, args) is rgb


# --- Fast and plain ---------------------------------------------------------------------------------------------------
def compare_with_plain(device, encoder, **fast):
    """Blocks by the plain and by the fast route from the same start. -> weights of each"""
    weights = []
    for options in ({}, fast):
        agent, replay, args = learning_parts(encoder=encoder, target_augs=2, online_augs=2)
        args = replace(args, device=str(device), **options)
        moved = sp.Agent(args, SHAPES, device)
        moved.load_state_dict(agent.state_dict())
        state = replay.state_dict()
        obs = {"rgb": torch.zeros(4, 16, 16, 3, dtype=torch.uint8), "state": torch.zeros(4, 3)}
        replay = sp.Replay(obs, 2, 100, args.frame_stack, args.n_step, args.gamma, device)
        replay.load_state_dict(state)
        learner = sp.Learner(moved, replay, args, torch.Generator(device).manual_seed(7))
        for _ in range(12):
            learner.run()
        assert learner.read().keys() >= {"loss/qf", "loss/actor"} and learner.read() == {}
        weights.append({k: v.cpu() for k, v in moved.state_dict().items()})
    return weights


@pytest.mark.parametrize("encoder, backend", [
    ("separate", "aot_eager"), ("autoencoder", "aot_eager"),  # the traced graphs, run without code generation
    pytest.param("autoencoder", "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")]),
])  # fmt: skip
def test_compiled_route_equals_the_plain_one(monkeypatch, encoder, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    plain, fast = compare_with_plain(CPU, encoder, compile=True)
    for k in plain:
        torch.testing.assert_close(fast[k], plain[k], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("encoder", PATTERNS)
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_equals_the_plain_route(compiled, encoder):
    plain, fast = compare_with_plain(torch.device("cuda"), encoder, cudagraphs=True, compile=compiled)
    for k in plain:
        torch.testing.assert_close(fast[k], plain[k], atol=1e-3, rtol=1e-2)


def test_updates_per_transition():
    agent, replay, args = learning_parts(update_every=3)
    learner, calls = sp.Learner(agent, replay, args, generator()), []
    learner.block = lambda: calls.append(1)
    for _ in range(30):  # 120 transitions, 40 critic updates in blocks of 2
        learner.run()
    assert len(calls) in (19, 20)


# --- Runs -------------------------------------------------------------------------------------------------------------
def table(path) -> list[dict]:
    return list(csv.DictReader(Path(path).open()))


def test_a_short_run_from_end_to_end(fake):
    args = arguments(capture_video=True, name="run", preset="sac_ae", encoder="autoencoder", augmentation="none")
    result = sp.train(args)
    run = fake / "runs/run"
    assert {f.name for f in run.iterdir()} >= {"args.json", "metrics.csv", "eval.csv", "checkpoint.pt", "best.pt"}
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    drawn = imageio.imread(run / "reconstructions/step_000000120.png")
    assert drawn.shape == (320, 8 * 160, 3) and drawn[160:].std() > 0, "eight pictures above their reconstructions"
    rows = table(run / "eval.csv")
    assert list(rows[0])[:4] == ["global_step", "wall_time", "train_time", "eval/return"]
    assert [row["global_step"] for row in rows] == ["60", "120"] and result["global_step"] == 120
    assert float(rows[0]["eval/ci_low"]) <= float(rows[0]["eval/return"]) <= float(rows[0]["eval/ci_high"])
    metrics = table(run / "metrics.csv")
    assert all(math.isfinite(float(v)) for row in metrics for v in row.values())
    assert metrics[-1]["time/frames"] == "120" and float(metrics[-1]["train/episodes"]) > 0
    assert not list(run.glob("*.tmp"))


def test_interval_is_that_of_a_mean(fake):
    args = arguments(eval_episodes=100, eval_envs=50)
    agent = sp.Agent(args, SHAPES, CPU)
    policy = sp.Policy(dict(args=sp.asdict(args), spec={}, shapes=SHAPES, agent=agent.state_dict()))
    env, returns = FakeEnv(50, stagger=False), []
    metrics, seen = sp.evaluate(policy, env, args, None)
    assert seen.shape == (8, 16, 16, 6)
    for seed in (sp.EVAL_SEED, sp.EVAL_SEED + 1):
        obs = env.reset(seed)
        policy.reset()
        total = torch.zeros(50)
        for _ in range(10):
            obs, rewards, _, _, _ = env.step(policy.act(obs))
            total += rewards
        returns += total.tolist()
    assert metrics["eval/return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["eval/return_std"] == pytest.approx(np.std(returns, ddof=1), rel=1e-4)
    half = (metrics["eval/ci_high"] - metrics["eval/ci_low"]) / 2
    assert half == pytest.approx(0.196 * np.std(returns, ddof=1), rel=1e-4)


@pytest.mark.parametrize("changes", [
    dict(encoder="separate", augmentation="color_jitter"),
    dict(encoder="critic", n_step=3, target_augs=2, augmentation="crop", encoder_type="impala"),
    dict(encoder="autoencoder", augmentation="translate", update_every=3, overlap=True),
], ids=lambda changes: changes["encoder"])  # fmt: skip
def test_resume_continues_exactly(fake, changes):
    """2N steps equal N steps and then N more, bit for bit, with --save-buffer on the CPU, over the buffer's wrap."""
    args = arguments(name="whole", save_buffer=True, total_timesteps=160, eval_freq=80, buffer_size=120, **changes)
    sp.train(args)
    half = replace(args, name="half")
    sp.train(replace(half, total_timesteps=80))
    for path in Path("runs/half").glob("*.csv"):  # the run went on a little before it was interrupted
        path.write_text(path.read_text() + "999999" + "," * path.read_text().partition("\n")[0].count(",") + "\n")
    sp.train(replace(half, resume="runs/half"))
    whole, resumed = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("whole", "half"))
    assert not differences(whole["agent"], resumed["agent"])
    for key in ("random", "optimizers", "replay", "obs"):
        torch.testing.assert_close(whole[key], resumed[key], atol=0, rtol=0)
    assert resumed["now"]["global_step"] == 160 and whole["now"]["owed"] == resumed["now"]["owed"]
    rows = [table(f"runs/{name}/eval.csv") for name in ("whole", "half")]
    assert [[row[k] for k in row if "time" not in k] for row in rows[0]] == [
        [row[k] for k in row if "time" not in k] for row in rows[1]]  # fmt: skip


def test_resume_without_buffer_says_so(fake, capsys):
    sp.train(arguments(name="run", total_timesteps=80))
    sp.train(replace(arguments(name="run"), resume="runs/run", total_timesteps=160))
    assert "buffer was saved" in capsys.readouterr().out
    assert [row["global_step"] for row in table("runs/run/eval.csv")] == ["60", "80", "120", "160"]


def test_checkpoint_starts_from_weights_alone(fake):
    sp.train(arguments(name="first", total_timesteps=80))
    result = sp.train(arguments(name="second", checkpoint="runs/first/checkpoint.pt", total_timesteps=60))
    assert result["global_step"] == 60
    first, second = (sp.load_file(f"runs/{name}/checkpoint.pt") for name in ("first", "second"))
    steps = [c["optimizers"]["alpha"]["state"][0]["step"] for c in (first, second)]
    assert steps[1] < steps[0]


def test_evaluation_repeats_and_leaves_training_alone(fake):
    sp.train(arguments(name="often", eval_freq=20))
    sp.train(arguments(name="seldom"))
    often, seldom = (sp.load_file(f"runs/{name}/checkpoint.pt") for name in ("often", "seldom"))
    assert not differences(often["agent"], seldom["agent"])
    results = [sp.train(arguments(evaluate=True, checkpoint="runs/often/checkpoint.pt", name=name)) for name in "ab"]
    assert results[0]["eval/return"] == results[1]["eval/return"]
    assert float(table("runs/often/eval.csv")[-1]["eval/return"]) == results[0]["eval/return"]


@pytest.mark.parametrize("encoder, augmentation", [("separate", "crop"), ("critic", "translate"), ("critic", "shift")])
def test_policy_from_the_file_equals_the_actor(fake, encoder, augmentation):
    args = arguments(name="run", encoder=encoder, augmentation=augmentation)
    sp.train(args)
    before = torch.get_rng_state()
    policy = sp.Policy("runs/run/best.pt")
    assert torch.equal(torch.get_rng_state(), before), "building a policy draws no random number"
    agent = sp.Agent(args, SHAPES, CPU)
    agent.load_state_dict(sp.load_file("runs/run/best.pt")["agent"])
    env, past = FakeEnv(5, size=args.render_size), None
    for _ in range(3):
        obs = env.step(torch.ones(5, 2))[0]
        stack = torch.cat([past if past is not None else obs["rgb"], obs["rgb"]], -1)
        past = obs["rgb"]
        with torch.no_grad():
            mean, _ = agent.actor(agent.policy_features(sp.center(stack, args)), obs["state"])
        torch.testing.assert_close(policy.act(obs), mean.tanh())
    policy.reset()
    assert policy.act({k: v.numpy() for k, v in obs.items()}).shape == (5, 2)
    assert policy.spec == env.spec
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[:, :80] = frame[:, 560:] = 255  # outside the middle square
    seen = policy.preprocess(frame)
    assert seen.shape == (1, args.render_size, args.render_size, 3) and seen.max() == 0


def test_a_true_end_is_not_bootstrapped(fake, monkeypatch):
    """Terminations reach the buffer as a discount of 0, time limits as 1, and the environment's own as it is."""

    class Ending(FakeEnv):
        def step(self, actions):
            obs, rewards, terminations, truncations, info = super().step(actions)
            terminations = truncations & (torch.arange(self.num_envs) % 2 == 0)
            return obs, rewards, terminations, truncations & ~terminations, info | {"discount": torch.full((4,), 0.75)}

    monkeypatch.setattr(sp, "make_envs", lambda args, device: (Ending(4), FakeEnv(4, stagger=False)))
    sp.train(arguments(name="run", save_buffer=True))
    data = sp.load_file("runs/run/checkpoint.pt")["replay"]
    ends = data["last"].roll(-1, 0)[:25]
    for world in range(4):
        steps = ~data["last"][:25, world]
        expected = torch.where(ends[:, world] & (world % 2 == 0), 0.0, 0.75)
        assert ends[:, world].any() and torch.equal(data["discounts"][:25, world][steps], expected[steps])


def test_the_loop_acts_by_the_policy_and_stores_what_the_environment_gave(fake, monkeypatch):
    """First uniform actions, then the policy's with fresh noise; the observation before an automatic reset is kept."""
    given, kept, acted = [], [], []
    step, add, sample = FakeEnv.step, sp.Replay.add, sp.sample_actions

    def sample_actions(actor, features, state, noise):
        actions, log_probs = sample(actor, features, state, noise)
        acted.append((noise, actions)) if len(noise) == 4 else None
        return actions, log_probs

    monkeypatch.setattr(FakeEnv, "step", lambda self, a: (given.append((a, step(self, a))), given[-1][1])[1])
    monkeypatch.setattr(sp.Replay, "add", lambda self, *values: (kept.append(values), add(self, *values))[1])
    monkeypatch.setattr(sp, "sample_actions", sample_actions)
    sp.train(arguments(name="run", total_timesteps=400, learning_starts=200, eval_freq=1_000, log_freq=1_000))
    given = given[1:101]  # after the one that begins, before the evaluation
    for (actions, (obs, rewards, _, ends, info)), values in zip(given, kept, strict=True):
        assert torch.equal(values[0], actions) and torch.equal(values[1], rewards) and torch.equal(values[3], ends)
        assert values[4] is info["final_obs"] and values[5] is obs
    assert any(not torch.equal(values[4]["rgb"], values[5]["rgb"]) for values in kept), "an episode ended"
    first = torch.stack([actions for actions, _ in given[:50]])
    assert first.std() == pytest.approx(1 / math.sqrt(3), abs=0.05) and first.abs().max() <= 1
    assert len(acted) == 50 and all(torch.equal(a, b) for (a, _), (_, b) in zip(given[50:], acted, strict=True))
    noise = torch.stack([noise for noise, _ in acted])
    assert noise.std() == pytest.approx(1, abs=0.1) and len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("changes, field", [
    (dict(buffer_size=800), "buffer_size: it has 400, this run 800"), (dict(num_envs=2), "num_envs: it has 4"),
    (dict(device="cuda"), "device: it has cpu, this run cuda"), (dict(preset="rad"), "preset: it has drq"),
])  # fmt: skip
def test_a_run_cannot_be_continued_as_another_one(fake, changes, field):
    """And its folder stays as it was."""
    args = arguments(name="run", save_buffer=True, total_timesteps=60)
    sp.train(args)
    before = {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}
    checkpoint = sp.load_file("runs/run/checkpoint.pt")
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}"):
        sp.check_fits(checkpoint, replace(args, resume="runs/run", **changes), SHAPES)
    if "device" not in changes:
        with pytest.raises(ValueError, match="the checkpoint differs in"):
            sp.train(replace(args, resume="runs/run", total_timesteps=80, **changes))
    assert before == {file: file.read_bytes() for file in Path("runs/run").iterdir() if file.is_file()}
    sp.check_fits(checkpoint | {"replay": None}, replace(args, resume="runs/run", buffer_size=800), SHAPES)


def test_a_run_that_is_refused_leaves_no_folder(fake):
    with pytest.raises(ValueError, match="the replay buffer needs"):
        sp.train(arguments(name="run", buffer_size=10**12))
    assert not Path("runs/run").exists()


def test_stops_at_nan_and_names_the_tensor(fake):
    sp.train(arguments(name="run", total_timesteps=60))
    checkpoint = sp.load_file("runs/run/checkpoint.pt")
    checkpoint["agent"]["actor.head.4.weight"][0, 0] = math.nan
    sp.save(Path("broken.pt"), checkpoint)
    with pytest.raises(FloatingPointError, match=r"^\S+ is not finite at step \d+; last good checkpoint: none yet$"):
        sp.train(arguments(name="other", checkpoint="broken.pt"))
    agent = sp.Agent(arguments(), SHAPES, CPU)
    agent.critic.heads[1][0].bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="critic.heads.1.0.bias is not finite at step 5; last .*checkpoint.pt"):
        sp.check_finite(agent, {}, 5, Path("runs/run/checkpoint.pt"))


@pytest.mark.parametrize("changes, field", [
    (dict(env_id="Other"), "env_id"), (dict(encoder="separate"), "encoder"), (dict(hidden=32), "hidden"),
    (dict(frame_stack=3), "frame_stack"), (dict(encoder_type="impala"), "encoder_type"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(fake, changes, field):
    sp.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match=f"^the checkpoint differs in {field}: it has .*, this run"):
        sp.train(arguments(name="other", checkpoint="runs/run/best.pt", **changes))


def test_existing_runs_are_not_overwritten(fake):
    sp.train(arguments(name="run", total_timesteps=60))
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        sp.train(arguments(name="run"))


# --- Command line -----------------------------------------------------------------------------------------------------
def test_help_shows_each_task_device_and_preset_its_defaults(capsys):
    tasks = ["dot_reach", "walker_walk", "cartpole_swingup", "cheetah_run", "SO101ReachCube-v1"]
    presets = ["drq", "rad", "rad_translate", "sac", "sac_ae"]
    for env_id, preset, device in [*[(task, "drq", "cpu") for task in tasks], *[("walker_walk", p, "cuda")
                                   for p in presets]]:  # fmt: skip
        command = ["--env-id", env_id, "--device", device, "--preset", preset]
        with pytest.raises(SystemExit) as stop:
            sp.parse_args([*command, "--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        tuned = sp.tuned_defaults(env_id, device, preset)
        assert stop.value.code == 0 and env_id in text and "--update-every" in text
        args = sp.parse_args(command)
        for key, value in tuned.items():
            assert getattr(args, key) == value
            if type(value) in (int, str):
                assert f"(default: {value})" in text, key


def test_presets_are_as_published():
    common = dict(image_size=84, frame_stack=3, gamma=0.99, n_step=1, hidden=1024, feature_dim=50, policy_frequency=2,
                  encoder_strides=(2, 1, 1, 1), encoder_channels=32, policy_lr=1e-3, q_lr=1e-3, alpha=0.1, tau=0.01,
                  learning_starts=1_000, action_repeat=2, num_envs=1, update_every=1)  # fmt: skip
    ae = dict(encoder_tau=0.05, alpha_lr=1e-4, alpha_beta=0.5, batch_size=128, delta_orthogonal=True)
    published = {
        "drq": common | dict(encoder="critic", augmentation="shift", margin=4, target_augs=2, online_augs=2,
                             batch_size=512, encoder_tau=0.01, alpha_lr=1e-3, alpha_beta=0.9, buffer_size=100_000,
                             delta_orthogonal=False),
        "rad": common | ae | dict(encoder="critic", augmentation="crop", render_size=100, target_augs=1, online_augs=1,
                                  buffer_size=100_000),
        "rad_translate": common | ae | dict(augmentation="translate", render_size=100, image_size=108),
        "sac_ae": common | ae | dict(encoder="autoencoder", augmentation="none", decoder_lambda=1e-6,
                                     decoder_decay=1e-7, buffer_size=1_000_000),
    }  # fmt: skip
    for preset, values in published.items():
        args = sp.parse_args(["--env-id", "walker_walk", "--device", "cuda", "--preset", preset])
        assert {k: getattr(args, k) for k in values} == values
    for env_id, repeat in {"cartpole_swingup": 8, "reacher_easy": 4, "cheetah_run": 4, "cup_catch": 4,
                           "finger_spin": 2, "walker_walk": 2}.items():  # fmt: skip
        args = sp.parse_args(["--env-id", env_id, "--device", "cuda"])
        assert (args.action_repeat, args.total_timesteps * repeat) == (repeat, 500_000)


def test_arguments_of_a_run_come_from_its_checkpoint(fake):
    sp.train(arguments(name="run", total_timesteps=60, gamma=0.8))
    args = sp.parse_args(["--resume", "runs/run", "--total-timesteps", "90", "--device", "cpu"])
    assert (args.gamma, args.total_timesteps, args.name, args.hidden) == (0.8, 90, "run", 16)
    args = sp.parse_args(["--evaluate", "--checkpoint", "runs/run/best.pt", "--device", "cpu"])
    assert (args.evaluate, args.env_id, args.name, args.gamma) == (True, "Fake", "", 0.8)


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=0, hidden=0), "--hidden, --batch-size must be at least 1"),
    (dict(evaluate=True), "--evaluate needs --checkpoint"),
    (dict(critic_gradient=False), "needs --encoder autoencoder"),
    (dict(eval_episodes=7), "multiple of --eval-envs"),
    (dict(num_envs=0, eval_envs=0, eval_episodes=0), "--eval-episodes, --eval-envs, --num-envs must be at least 1"),
    (dict(encoder_strides=(2, 0)), "--encoder-strides must be at least 1"),
    (dict(device="tpu"), "--device must be cpu or cuda"),
    (dict(augmentation="translate", margin=20), "--margin must be"),
    (dict(learning_starts=0), "--learning-starts must cover"),
    (dict(buffer_size=40), "--buffer-size must exceed"),
    (dict(cudagraphs=True), "--cudagraphs needs --device cuda"),
    (dict(resume="a", checkpoint="b"), "give only one"),
])  # fmt: skip
def test_arguments_that_cannot_work_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        arguments(**changes).check()


@pytest.mark.parametrize("options, words", [
    (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    (["--checkpoint", str(SCRIPT)], "cannot be read as a checkpoint"),
    (["--image-size", "12", "--encoder-strides", "2", "2", "2"], "--image-size 12 is too small"),
])  # fmt: skip
def test_bad_input_is_refused(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        sp.train(sp.parse_args(["--device", "cpu", *options]))
    assert not (tmp_path / "runs").exists()


def test_an_error_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", "--env-id", "walker_fly"], cwd=tmp_path,
                            text=True, capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "walker_fly" in line and not (tmp_path / "runs").exists()
