"""drqv2.py and sac_pixels.py against the authors' own code: the published sizes, the same weights, images and noise.

tests/golden/originals_make.py ran their classes and wrote down losses, gradients, what steps of their optimizers
change, actions and where augmentation puts an image; originals_recipe.py makes the inputs from seeds.
"""

from pathlib import Path

import drqv2 as dq
import numpy as np
import pytest
import sac_pixels as sp
import torch
from golden import originals_recipe as recipe

GOLDEN = Path(__file__).parent / "golden"
SHAPES = dict(channels=3, state=0, action=recipe.ACTIONS)
SAC = ("drq", "rad", "rad_translate", "sac_ae")
NOTHING = torch.zeros(recipe.BATCH, 0)  # a state of no dimensions


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name: str) -> dict:
    return dict(np.load(GOLDEN / f"originals_{name}.npz"))


def args_of(name: str):
    """The preset as a user gets it; but on this CPU, in float32."""
    here = dict(device="cpu", amp=False, compile=False, batch_size=recipe.BATCH)
    if name == "drqv2":
        return dq.Args(**dq.tuned("cheetah_run", "cuda") | here, cudagraphs=False)
    task = "cheetah_run" if name == "rad_translate" else "walker_walk"
    return sp.Args(**sp.tuned(task, "cuda", name) | here)


# --- Between their order of an image's features and ours --------------------------------------------------------------
def swapped(name: str, value, agent, to_theirs: bool):
    """Features of the convolutions are channels, rows, columns with them, and rows, columns, channels with us."""
    channels = agent.encoder.convs[-2].out_channels
    side = round((agent.encoder.features / channels) ** 0.5)
    order = (side, side, channels) if to_theirs else (channels, side, side)
    move = (-1, 0, 1) if to_theirs else (1, 2, 0)
    if name.endswith("trunk.0.weight"):
        value = value.unflatten(1, order)
        return value.permute(0, *(1 + i % 3 for i in move)).flatten(1)
    if name.startswith("decoder.linear"):
        rest = range(3, value.dim() + 2)
        return value.unflatten(0, order).permute(*(i % 3 for i in move), *rest).flatten(0, 2)
    return value


def fresh_agent(module, args):
    agent = module.Agent(args, SHAPES)
    state = dict(agent.named_parameters())
    state.pop("log_alpha", None)
    shapes = {key: swapped(key, value, agent, True).shape for key, value in state.items()}
    values = recipe.weights({key: tuple(shape) for key, shape in shapes.items()})
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(swapped(key, torch.from_numpy(values[key]), agent, False))
    return agent


def compare(agent, expected: dict, stage: str, found: dict, tolerance: float):
    """`found`, by name, with what was written down of theirs: norms, and numbers as shares of a tensor's largest."""
    found = {key: swapped(key, value.detach(), agent, True) for key, value in found.items()}
    assert sorted(found) == expected[f"{stage}_names"].tolist()
    result = recipe.summary({key: value.numpy() for key, value in found.items()})
    theirs = expected[stage].astype(float)
    scale = np.abs(theirs[:, 1:]).max(1, keepdims=True)
    np.testing.assert_allclose(result[:, 0], theirs[:, 0], rtol=tolerance, err_msg=stage)
    distance = np.abs(result - theirs)[:, 1:]
    assert (distance <= tolerance * scale).all(), f"{stage}: {(distance / scale).max()}"


def weights_of(agent) -> dict:
    return {key: value.detach().clone() for key, value in agent.named_parameters()}


def changes(agent, before: dict) -> dict:
    moved = {key: value - before[key] for key, value in weights_of(agent).items()}
    return {key: value for key, value in moved.items() if value.any()}


def learner_gradients(agent, optimizer) -> dict:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = agent.named_parameters()
    return {key: p.grad for key, p in found if id(p) in mine and p.grad is not None}


# --- The recipe's numbers ---------------------------------------------------------------------------------------------
def stack(seed: int, size: int) -> torch.Tensor:
    """uint8 (B, H, W, 9)."""
    return torch.from_numpy(recipe.images(seed, size)).permute(0, 2, 3, 1)


def shown(images) -> np.ndarray:
    """Back to their order."""
    return images.permute(0, 3, 1, 2).numpy()


def a_batch(size: int, copies: int) -> dict:
    """Images as the augmentation left them, copies one after the other."""
    seeds = ((1, 3), (2, 4))
    obs, next_obs = (
        dict(
            rgb=torch.cat([stack(s, size) for s in pair[:copies]]), state=NOTHING.repeat(copies, 1)
        )
        for pair in seeds
    )
    actions, rewards, discounts = map(torch.from_numpy, recipe.steps())
    return dict(obs=obs, next_obs=next_obs, actions=actions, rewards=rewards, discounts=discounts)


def noise(*seeds) -> torch.Tensor:
    return torch.cat([torch.from_numpy(recipe.noise(seed)) for seed in seeds])


def give(monkeypatch, name: str, value):
    monkeypatch.setattr(torch, name, lambda like, **options: value)


GRADIENT = 1e-4
# Adam divides by the gradient's size, and so enlarges rounding where that is next to nothing; and log alpha moves by
# 2e-4, of which float32 has a thousandth.
CHANGE = 3e-3


# --- SAC: DrQ, RAD with both augmentations, SAC+AE --------------------------------------------------------------------
@pytest.mark.parametrize("name", SAC)
def test_the_critic_learns_as_theirs_and_its_target_follows(monkeypatch, name):
    expected, args = golden(name), args_of(name)
    agent = fresh_agent(sp, args)
    optimizers, before = sp.make_optimizers(agent, args), weights_of(agent)
    batch = a_batch(args.image_size, args.copies)
    for first, seeds in ((True, (21, 22)), (False, (23, 24))):
        give(monkeypatch, "randn_like", noise(*seeds[: args.copies]))
        loss, _, _ = sp.critic_loss(agent, batch, args)
        sp.descend(loss, optimizers["q_optimizer"])
        if first:
            assert loss.item() == pytest.approx(float(expected["critic_loss"]), rel=1e-5)
            gradients = learner_gradients(agent, optimizers["q_optimizer"])
            compare(agent, expected, "critic_gradients", gradients, GRADIENT)
            target = {key: value for key, value in before.items() if "target" in key}
            learned = weights_of(agent)
            sp.target_update(agent, args)
            followed = {
                key: value for key, value in changes(agent, before).items() if key in target
            }
            compare(agent, expected, "target_change", followed, CHANGE)
            agent.load_state_dict(learned | target)
    compare(agent, expected, "critic_change", changes(agent, before), CHANGE)


@pytest.mark.parametrize("name", SAC)
def test_actor_and_temperature_learn_as_theirs(monkeypatch, name):
    expected, args = golden(name), args_of(name)
    agent = fresh_agent(sp, args)
    optimizer, before = sp.make_optimizers(agent, args)["actor_optimizer"], weights_of(agent)
    agent.critic.requires_grad_(False)
    batch = a_batch(args.image_size, 1)
    with torch.no_grad():
        features = agent.encoder(batch["obs"]["rgb"])
    for first, seed in ((True, 25), (False, 26)):
        give(monkeypatch, "randn_like", noise(seed))
        loss, metrics = sp.actor_loss(agent, batch, features)
        sp.descend(loss, optimizer)
        if first:
            for ours, theirs in (("loss/actor", "actor_loss"), ("loss/alpha", "alpha_loss")):
                assert metrics[ours].item() == pytest.approx(float(expected[theirs]), rel=1e-5)
            gradients = learner_gradients(agent, optimizer)
            compare(agent, expected, "actor_gradients", gradients, GRADIENT)
    compare(agent, expected, "actor_change", changes(agent, before), CHANGE)


def test_the_autoencoder_learns_as_theirs(monkeypatch):
    expected, args = golden("sac_ae"), args_of("sac_ae")
    agent = fresh_agent(sp, args)
    optimizer, before = sp.make_optimizers(agent, args)["autoencoder_optimizer"], weights_of(agent)
    give(monkeypatch, "rand_like", torch.from_numpy(recipe.dither(84)).permute(0, 2, 3, 1))
    for first in (True, False):
        loss, _ = sp.autoencoder_loss(agent, stack(1, 84))
        sp.descend(loss, optimizer)
        if first:
            assert loss.item() == pytest.approx(float(expected["decoder_loss"]), rel=1e-5)
            gradients = learner_gradients(agent, optimizer)
            compare(agent, expected, "decoder_gradients", gradients, GRADIENT)
    compare(agent, expected, "decoder_change", changes(agent, before), CHANGE)


@pytest.mark.parametrize("name", SAC)
def test_mean_actions_are_theirs(name):
    expected, args = golden(name), args_of(name)
    agent = fresh_agent(sp, args)
    with torch.no_grad():
        mean, _ = agent.gaussian(agent.policy_features(stack(1, args.image_size)), NOTHING)
    np.testing.assert_allclose(mean.tanh(), expected["mean_actions"], rtol=1e-4, atol=1e-6)


# --- Augmentations ----------------------------------------------------------------------------------------------------
def at(corners, places: int) -> torch.Tensor:
    """Draws in [0, 1) that choose these of so many places."""
    return (torch.from_numpy(corners.astype(np.float32)) + 0.5) / places


def test_drqs_shift_is_theirs_but_for_interpolation():
    """Kornia's crop reads up to 0.07 pixels beside the place that it drew: difference 7."""
    expected, args = golden("drq"), args_of("drq")
    moved = sp.augment(stack(5, 84), args, at(expected["corners"], 9))
    distance = np.abs(shown(moved)[:, 0, ::6].astype(float) - expected["rows"]).mean()
    assert distance < 2
    for beside in (-1, 1):
        wrong = sp.augment(stack(5, 84), args, at(expected["corners"] + [0, beside], 9))
        assert np.abs(shown(wrong)[:, 0, ::6].astype(float) - expected["rows"]).mean() > 10


@pytest.mark.parametrize("name", ["rad", "rad_translate"])
def test_rads_images_are_theirs_in_learning_and_evaluation(name):
    expected, args = golden(name), args_of(name)
    assert args.render_size == dict(rad=100, rad_translate=108)[name]
    places = args.margin + 1
    for seed, image, corners in ((5, "obs", "corners"), (6, "next_obs", "next_corners")):
        corner = expected[corners]
        if name == "rad_translate":  # our window moves, their image does
            corner = args.margin - corner
        drawn = stack(seed, args.render_size)[expected["samples"]]
        moved = sp.augment(drawn, args, at(corner, places))
        assert recipe.digest(shown(moved)) == expected[image]
    middle = sp.augment(stack(5, args.render_size), args)
    assert recipe.digest(shown(middle)) == expected["evaluation"]


@pytest.mark.parametrize("name", ["rad", "rad_translate"])
def test_rads_images_are_theirs_in_acting(monkeypatch, tmp_path, name):
    """What `train` shows the actor, of frames that are the recipe's."""
    expected, args = golden(name), args_of(name)
    seen, images = [], stack(5, args.render_size)

    class Shown(Exception):
        pass

    class Env:
        image_shape, state_dim, action_dim = (args.render_size, args.render_size, 9), 0, 3
        spec, nan_resets = {}, 0

        def step(self, actions):
            obs = dict(rgb=images, state=NOTHING)
            end = torch.zeros(recipe.BATCH, dtype=torch.bool)
            episode = {key: torch.zeros(recipe.BATCH) for key in sp.EPISODE}
            info = dict(final_obs=obs, episode=episode)
            return obs, torch.zeros(recipe.BATCH), end, end, info

    def features(agent, rgb):
        seen.append(rgb)
        raise Shown

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sp, "make_envs", lambda args: (Env(), None))
    monkeypatch.setattr(sp, "make_update", lambda *parts: lambda batches: {})
    monkeypatch.setattr(sp.Agent, "policy_features", features)
    small = dict(num_envs=recipe.BATCH, frame_stack=1, hidden=8, learning_starts=recipe.BATCH)
    with pytest.raises(Shown):
        sp.train(sp.replace(args, **small, buffer_size=64, encoder_channels=1))
    assert recipe.digest(shown(seen[0])) == expected["acting"]


# --- DrQ-v2 -----------------------------------------------------------------------------------------------------------
def without_augmentation(monkeypatch):
    """drqv2's losses augment: here images pass as they are."""
    name = "random_shift" if hasattr(dq, "random_shift") else "augment"
    monkeypatch.setattr(dq, name, lambda rgb, *others: rgb)


def drqv2_std(args):
    return dq.noise_std(args, 1_000)


def test_drqv2_learns_as_theirs(monkeypatch):
    expected, args = golden("drqv2"), args_of("drqv2")
    without_augmentation(monkeypatch)
    agent = fresh_agent(dq, args)
    optimizers, before = dq.make_optimizers(agent, args), weights_of(agent)
    batch, std = a_batch(84, 1), drqv2_std(args)
    for first, seed in ((True, 21), (False, 23)):
        give(monkeypatch, "randn_like", noise(seed))
        loss, _, _ = dq.critic_loss(agent, batch, std, args)
        dq.descend(loss, optimizers["critic_optimizer"])
        if first:
            assert loss.item() == pytest.approx(float(expected["critic_loss"]), rel=1e-5)
            gradients = learner_gradients(agent, optimizers["critic_optimizer"])
            compare(agent, expected, "critic_gradients", gradients, GRADIENT)
    compare(agent, expected, "critic_change", changes(agent, before), CHANGE)

    agent = fresh_agent(dq, args)
    optimizer = dq.make_optimizers(agent, args)["actor_optimizer"]
    agent.critic.requires_grad_(False)
    with torch.no_grad():
        features = agent.encoder(batch["obs"]["rgb"])
    for first, seed in ((True, 25), (False, 26)):
        give(monkeypatch, "randn_like", noise(seed))
        loss, _ = dq.actor_loss(agent, batch, features, std, args)
        dq.descend(loss, optimizer)
        if first:
            assert loss.item() == pytest.approx(float(expected["actor_loss"]), rel=1e-5)
            gradients = learner_gradients(agent, optimizer)
            compare(agent, expected, "actor_gradients", gradients, GRADIENT)
    compare(agent, expected, "actor_change", changes(agent, before), CHANGE)


def test_a_whole_update_of_drqv2_is_theirs(monkeypatch):
    """In their order: critic and encoder, the actor on the features from before, the target."""
    expected, args = golden("drqv2"), args_of("drqv2")
    without_augmentation(monkeypatch)
    agent = fresh_agent(dq, args)
    before, numbers = weights_of(agent), [noise(21), noise(25)]
    monkeypatch.setattr(torch, "randn_like", lambda like: numbers.pop(0))
    dq.make_update(agent, dq.make_optimizers(agent, args), args)(a_batch(84, 1), drqv2_std(args))
    compare(agent, expected, "update_change", changes(agent, before), CHANGE)


def test_mean_actions_of_drqv2_are_theirs():
    expected, args = golden("drqv2"), args_of("drqv2")
    agent = fresh_agent(dq, args)
    with torch.no_grad():
        mean = agent.mean(agent.encoder(stack(1, 84)), NOTHING)
    np.testing.assert_allclose(mean, expected["mean_actions"], rtol=1e-4, atol=1e-6)


def test_drqv2s_shift_is_theirs(monkeypatch):
    """Theirs, rounded to whole levels, is ours: it interpolates by less than 0.003 of one."""
    expected = golden("drqv2")
    assert expected["distance_to_whole_pixels"] < 0.003
    corners = torch.from_numpy(expected["corners"])[..., None]
    monkeypatch.setattr(torch, "randint", lambda *args, **options: corners)
    moved = dq.random_shift(stack(5, 84), 4)
    assert recipe.digest(shown(moved)) == expected["obs"]
