"""Makes tests/golden/originals_NAME.npz from the authors' own code, which is imported from a folder and not in here.

    git clone https://github.com/facebookresearch/drqv2        MIT, c0c650b
    git clone https://github.com/denisyarats/drq               MIT, dd040f1
    git clone https://github.com/MishaLaskin/rad               18d079e
    git clone https://github.com/denisyarats/pytorch_sac_ae    MIT, 7fa560e
    python tests/golden/originals_make.py drqv2 drqv2; ... drq drq; ... rad rad; ... rad_translate rad;
        ... sac_ae pytorch_sac_ae

Torch and NumPy suffice, and for drq kornia 0.3.1 (`pip install --no-deps`, on PYTHONPATH). What else their files import
at the top (gym, hydra, matplotlib, skimage ...) is replaced by an empty module. Every output is their functions' own;
here stand only the inputs (originals_recipe.py), the names and the calls.
"""

import importlib
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import originals_recipe as recipe

SOLUTION = namedtuple("Solution", "solution lu")
SIZES = dict(drqv2=84, drq=84, rad=84, rad_translate=108, sac_ae=84)
FEATURES = dict(rad_translate=64)  # scripts/cheetah_test.sh


# --- Their modules ----------------------------------------------------------------------------------------------------
class Anything(type(sys)):
    """A module, and a logger, that has every name and does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name in ("Wrapper", "Dataset") else Anything(name)

    def __call__(self, *args, **options):
        return None


def stub(*names):
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # missing, or it does not load here (OpenGL): a stand-in serves for both
            for end in range(1, name.count(".") + 2):
                part = ".".join(name.split(".")[:end])
                sys.modules.setdefault(part, Anything(part))


class Log:
    """Their logger: keeps the numbers."""

    def __init__(self):
        self.values = {}

    def log(self, name, value, step):
        self.values[name] = torch.as_tensor(value).item()

    def __getattr__(self, name):
        return lambda *args: None


# --- Their names ------------------------------------------------------------------------------------------------------
def named(agent, name: str) -> dict:
    """Our name -> their parameter, of everything that learns or follows."""
    found = {}

    def add(ours, module):
        for kind, value in module.named_parameters():
            found[f"{ours}.{kind}"] = value

    if name == "drqv2":
        add("encoder.convs", agent.encoder.convnet)
        add("actor.trunk", agent.actor.trunk)
        add("actor.heads.0", agent.actor.policy)
        for ours, critic in (("critic", agent.critic), ("target", agent.critic_target)):
            add(f"{ours}.trunk", critic.trunk)
            add(f"{ours}.heads.0", critic.Q1)
            add(f"{ours}.heads.1", critic.Q2)
        return found
    sides = dict(actor=agent.actor, critic=agent.critic, target=agent.critic_target)
    for ours, side in sides.items():
        encoder = side.encoder
        head = encoder.head if name == "drq" else (encoder.fc, encoder.ln)
        add(f"{ours}.trunk.0", head[0])
        add(f"{ours}.trunk.1", head[1])
        mlps = [side.trunk] if ours == "actor" else [side.Q1, side.Q2]
        for i, mlp in enumerate(mlps):
            add(f"{ours}.heads.{i}", mlp if name == "drq" or ours == "actor" else mlp.trunk)
    for i, conv in enumerate(agent.critic.encoder.convs):
        assert agent.actor.encoder.convs[i].weight is conv.weight
        add(f"encoder.convs.{2 * i}", conv)
        add(f"target_encoder.convs.{2 * i}", agent.critic_target.encoder.convs[i])
    if name == "sac_ae":
        add("decoder.linear", agent.decoder.fc)
        for i, conv in enumerate(agent.decoder.deconvs):
            add(f"decoder.convs.{2 * i + 1}", conv)
    return found


def make_agent(name: str):
    """Their agent with the values of their scripts, and the recipe's weights."""
    size = SIZES[name]
    obs_shape, action_shape = (recipe.CHANNELS, size, size), (recipe.ACTIONS,)
    if name == "drqv2":
        module = importlib.import_module("drqv2")
        agent = module.DrQV2Agent(
            obs_shape, action_shape, "cpu", 1e-4, 50, 1024, 0.01, 2000, 2, "linear(1.0,0.1,500000)", 0.3, True
        )  # fmt: skip
    elif name == "drq":
        module = importlib.import_module("drq")
        module.hydra.utils = types.SimpleNamespace(instantiate=lambda make: make())
        encoder = lambda: module.Encoder(obs_shape, 50)  # noqa: E731
        critic = lambda: module.Critic(encoder, action_shape, 1024, 2)  # noqa: E731
        actor = lambda: module.Actor(encoder, action_shape, 1024, 2, [-10, 2])  # noqa: E731
        agent = module.DRQAgent(
            obs_shape, action_shape, [-1, 1], "cpu", encoder, critic, actor, 0.99, 0.1, 1e-3, 2, 0.01, 2, recipe.BATCH
        )  # fmt: skip
    else:
        options = dict(
            hidden_dim=1024, init_temperature=0.1, alpha_lr=1e-4, alpha_beta=0.5, critic_tau=0.01,
            encoder_tau=0.05, encoder_feature_dim=FEATURES.get(name, 50),
        )  # fmt: skip
        if name == "sac_ae":
            module = importlib.import_module("sac_ae")
            options |= dict(decoder_latent_lambda=1e-6, decoder_weight_lambda=1e-7)
            agent = module.SacAeAgent(obs_shape, action_shape, "cpu", **options)
        else:
            module = importlib.import_module("curl_sac")
            augs = "translate" if name == "rad_translate" else "crop"
            if name == "rad_translate":  # scripts/cheetah_test.sh
                options |= dict(actor_lr=2e-4, critic_lr=2e-4)
            agent = module.RadSacAgent(obs_shape, action_shape, "cpu", data_augs=augs, **options)
    parameters = named(agent, name)
    values = recipe.weights({key: tuple(value.shape) for key, value in parameters.items()})
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(torch.from_numpy(values[key]))
    return agent, parameters


# --- Random numbers ---------------------------------------------------------------------------------------------------
class Given:
    """In place of a function of torch that draws: hands out these tensors, one a call."""

    def __init__(self, *values):
        self.values = [torch.from_numpy(value) for value in values]

    def __call__(self, *args, **options):
        return self.values.pop(0).clone()


def give_noise(*seeds):
    given = Given(*(recipe.noise(seed) for seed in seeds))
    torch.randn_like = given
    torch.distributions.normal._standard_normal = given
    if "utils" in sys.modules:
        sys.modules["utils"]._standard_normal = given


# --- What is written down ---------------------------------------------------------------------------------------------
def changes(parameters, before) -> dict:
    """Of the weights that moved."""
    found = {key: (value.detach() - before[key]).numpy() for key, value in parameters.items()}
    return {key: value for key, value in found.items() if value.any()}


def copies(parameters) -> dict:
    return {key: value.detach().clone() for key, value in parameters.items()}


def keep(out, stage, tensors):
    out[f"{stage}_names"] = np.array(sorted(tensors))
    out[stage] = recipe.summary(tensors)


def with_gradients(out, stage, parameters, optimizers, step):
    """`step` descends once: the gradients that its optimizers saw are written down."""
    gradients = {}

    def look(optimizer, *_):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for key, value in parameters.items():
            if id(value) in mine and value.grad is not None:
                gradients[key] = value.grad.numpy().copy()

    handles = [optimizer.register_step_pre_hook(look) for optimizer in optimizers]
    step()
    for handle in handles:
        handle.remove()
    keep(out, f"{stage}_gradients", gradients)


def learning(name: str) -> dict:
    """Losses, gradients and what two steps change; each loss from the recipe's weights."""
    out, size = {}, SIZES[name]
    obs, next_obs, obs_aug, next_obs_aug = (
        torch.from_numpy(recipe.images(seed, size)).float() for seed in (1, 2, 3, 4)
    )
    if name.startswith("rad"):
        obs, next_obs = obs / 255.0, next_obs / 255.0  # as its buffer hands them out
    actions, rewards, discounts = map(torch.from_numpy, recipe.steps())
    rewards, discounts = rewards[:, None], discounts[:, None]
    not_done = (discounts > 0).float()

    def critic_step(agent, log, *seeds):
        give_noise(*seeds)
        if name == "drq":
            agent.update_critic(
                obs, obs_aug, actions, rewards, next_obs, next_obs_aug, not_done, log, 0
            )
        else:
            agent.update_critic(obs, actions, rewards, next_obs, not_done, log, 0)

    agent, parameters = make_agent(name)
    before, log = copies(parameters), Log()
    optimizers = [agent.critic_optimizer]
    with_gradients(out, "critic", parameters, optimizers, lambda: critic_step(agent, log, 21, 22))
    out["critic_loss"] = log.values["train_critic/loss"]
    critic_step(agent, log, 23, 24)
    keep(out, "critic_change", changes(parameters, before))

    agent, parameters = make_agent(name)
    before, log = copies(parameters), Log()
    give_noise(25)
    parameters["log_alpha"] = agent.log_alpha
    optimizers = [agent.actor_optimizer, agent.log_alpha_optimizer]
    with_gradients(
        out, "actor", parameters, optimizers, lambda: agent.update_actor_and_alpha(obs, log, 0)
    )
    out["actor_loss"] = log.values["train_actor/loss"]
    out["alpha_loss"] = log.values["train_alpha/loss"]
    before["log_alpha"] = torch.tensor(np.log(0.1))
    give_noise(26)
    agent.update_actor_and_alpha(obs, log, 0)
    keep(out, "actor_change", changes(parameters, before))

    agent, parameters = make_agent(name)
    before = copies(parameters)

    class Buffer:
        def sample(self, *_):
            batch = obs, actions, rewards, next_obs, not_done
            return batch + ((obs_aug, next_obs_aug) if name == "drq" else ())

        sample_rad = sample

    seeds = (21, 22, 25) if name == "drq" else (21, 25)
    give_noise(*seeds)
    torch.rand_like = Given(recipe.dither(size))
    agent.update(Buffer(), Log(), 0)
    moved = changes(parameters, before)
    keep(out, "target_change", {key: value for key, value in moved.items() if "target" in key})

    if name == "sac_ae":
        agent, parameters = make_agent(name)
        before, log = copies(parameters), Log()
        optimizers = [agent.encoder_optimizer, agent.decoder_optimizer]
        torch.rand_like = Given(recipe.dither(size), recipe.dither(size))
        with_gradients(
            out, "decoder", parameters, optimizers, lambda: agent.update_decoder(obs, obs, log, 0)
        )
        out["decoder_loss"] = log.values["train_ae/ae_loss"]
        agent.update_decoder(obs, obs, log, 0)
        keep(out, "decoder_change", changes(parameters, before))

    agent, _ = make_agent(name)
    act = agent.act if name == "drq" else agent.select_action
    out["mean_actions"] = np.stack([act(image.numpy()) for image in obs])
    return out


def learning_drqv2() -> dict:
    out = {}
    obs, next_obs = (torch.from_numpy(recipe.images(seed, 84)).float() for seed in (1, 2))
    actions, rewards, discounts = map(torch.from_numpy, recipe.steps())
    rewards, discounts = rewards[:, None], discounts[:, None]
    step = 1_000  # of the noise's schedule

    def critic_step(agent, seed):
        give_noise(seed)
        with torch.no_grad():
            next_features = agent.encoder(next_obs)
        features = agent.encoder(obs)
        metrics = agent.update_critic(features, actions, rewards, discounts, next_features, step)
        return metrics, features.detach()

    agent, parameters = make_agent("drqv2")
    before, kept = copies(parameters), []
    optimizers = [agent.critic_opt, agent.encoder_opt]
    with_gradients(
        out, "critic", parameters, optimizers, lambda: kept.append(critic_step(agent, 21))
    )
    out["critic_loss"] = kept[0][0]["critic_loss"]
    critic_step(agent, 23)
    keep(out, "critic_change", changes(parameters, before))

    agent, parameters = make_agent("drqv2")
    before = copies(parameters)
    with torch.no_grad():
        features = agent.encoder(obs)
    give_noise(25)
    with_gradients(
        out, "actor", parameters, [agent.actor_opt],
        lambda: kept.append(agent.update_actor(features, step)),
    )  # fmt: skip
    out["actor_loss"] = kept[-1]["actor_loss"]
    give_noise(26)
    agent.update_actor(features, step)
    keep(out, "actor_change", changes(parameters, before))

    agent, parameters = make_agent("drqv2")  # a whole update, without its augmentation
    before = copies(parameters)
    agent.aug = lambda images: images
    give_noise(21, 25)
    batch = obs, actions, rewards, discounts, next_obs
    agent.update(iter([batch]), step)
    keep(out, "update_change", changes(parameters, before))
    agent, _ = make_agent("drqv2")
    with torch.no_grad():
        out["mean_actions"] = np.stack([agent.act(image, step, True) for image in obs])
    return out


def augmentation(name: str) -> dict:
    """Where it put the images, and a digest of every pixel."""
    out = {}
    if name == "drqv2":
        module, images = importlib.import_module("drqv2"), recipe.images(5, 84)
        torch.manual_seed(31)
        shift = torch.randint(0, 9, (recipe.BATCH, 1, 1, 2), dtype=torch.float32)
        torch.manual_seed(31)
        moved = module.RandomShiftsAug(4)(torch.from_numpy(images).float())
        out["corners"] = shift[:, 0, 0].flip(1).numpy().astype(int)  # row, column of 0 to 8
        out["distance_to_whole_pixels"] = (moved - moved.round()).abs().max().item()
        out["obs"] = recipe.digest(moved.round().numpy())
    if name == "drq":
        torch.solve = lambda b, a: SOLUTION(
            torch.linalg.solve(a, b), None
        )  # kornia's; torch has dropped it
        module, images = importlib.import_module("replay_buffer"), recipe.images(5, 84)
        buffer = module.ReplayBuffer((9, 84, 84), (3,), recipe.BATCH, 4, "cpu")
        torch.manual_seed(31)
        np.random.seed(31)
        moved = buffer.aug_trans(torch.from_numpy(images).float())
        crop = buffer.aug_trans[1]._params["src"][:, 0].numpy()  # column, row
        out["corners"] = crop[:, ::-1].astype(int)
        out["rows"] = (
            moved[:, 0, ::6].round().numpy().astype(np.uint8)
        )  # interpolated: see difference 7
    if name.startswith("rad"):
        utils, augs = importlib.import_module("utils"), importlib.import_module("data_augs")
        drawn, size = (108, 108) if name == "rad_translate" else (100, 84)  # train.py
        buffer = utils.ReplayBuffer(
            (9, drawn, drawn), (3,), recipe.BATCH, recipe.BATCH, "cpu", size, 100
        )
        images, next_images = recipe.images(5, drawn), recipe.images(6, drawn)
        for pair in zip(images, next_images, strict=True):
            buffer.add(pair[0], np.zeros(3), 0.0, pair[1], False)
        drawings, randint = [], np.random.randint

        def recorded(*args, **options):
            drawings.append(randint(*args, **options))
            return drawings[-1]

        np.random.seed(31)
        np.random.randint = recorded
        chosen = (
            dict(translate=augs.random_translate)
            if "translate" in name
            else dict(crop=augs.random_crop)
        )
        obs, _, _, next_obs, _ = buffer.sample_rad(chosen)
        np.random.randint = randint
        out["samples"] = drawings[0]
        pairs = (
            [np.stack(drawings[1:3], 1), np.stack(drawings[3:5], 1)]
            if name == "rad"
            else [np.stack(drawings[1:3], 1)] * 2
        )
        order = [1, 0] if name == "rad" else [0, 1]  # random_crop draws columns first
        out["corners"], out["next_corners"] = (pair[:, order] for pair in pairs)
        out["obs"] = recipe.digest((obs * 255).round().numpy())
        out["next_obs"] = recipe.digest((next_obs * 255).round().numpy())
        seen = []
        for image in images:
            if name == "rad":
                seen.append(utils.center_crop_image(image, 84))
            else:
                seen.append(utils.center_translate(utils.center_crop_image(image, 100), 108))
        out["evaluation"] = recipe.digest(np.stack(seen))
        agent, _ = make_agent(name)
        agent.actor = Actor(agent.actor)
        for image in images:
            agent.sample_action(image / 255.0)
        out["acting"] = recipe.digest(np.concatenate(agent.actor.seen))
    return out


class Actor:
    """Keeps what it is shown."""

    def __init__(self, actor):
        self.actor, self.seen = actor, []

    def __call__(self, obs, **options):
        give_noise(25)
        self.seen.append((obs * 255).round().numpy())
        mean = torch.zeros(1, 3)
        return mean, mean, None, None


def main(name: str, folder: str):
    sys.path.insert(0, folder)
    names = ("gym", "hydra", "omegaconf", "matplotlib.pyplot", "skimage.util.shape", "scipy.linalg")
    stub(*names, "TransformLayer")
    torch.set_num_threads(1)
    out = learning_drqv2() if name == "drqv2" else learning(name)
    out |= augmentation(name)
    for key, value in out.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float64:
            out[key] = value.astype(np.float32)
    path = Path(__file__).parent / f"originals_{name}.npz"
    np.savez_compressed(path, **out)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
