"""The adapter on docs/algos/resfit.md, with lerobot's own ACTPolicy and its processors."""

import re
import sys

import pytest
import resfit as rf
import torch
from conftest import ROOT

INSTALL = "pip install lerobot==0.4.4, in an environment of its own (it needs torch below 2.11)"
A, S, K, SIZE = 2, 3, 6, 32


def adapter(folder):
    """lerobot_base.py: the page's code."""
    page = (ROOT / "docs/algos/resfit.md").read_text()
    (code,) = re.findall(r"```python\n(# lerobot_base.py.*?)```", page, re.DOTALL)
    (folder / "lerobot_base.py").write_text(code)
    return code


def test_the_adapter_has_twenty_lines_and_compiles(tmp_path):
    code = adapter(tmp_path)
    compile(code, "lerobot_base.py", "exec")
    lines = [
        line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= 25


@pytest.fixture
def pretrained(tmp_path):
    """A small untrained ACTPolicy, saved as lerobot saves one, with statistics that its processors need."""
    pytest.importorskip("lerobot.policies.act.modeling_act", reason=INSTALL)
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    images = PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE))
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (S,)),
            "observation.images.wrist": images,
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
        chunk_size=K, n_action_steps=3, dim_model=32, n_heads=4, dim_feedforward=32, n_encoder_layers=1,
        use_vae=False, pretrained_backbone_weights=None, device="cpu",
    )  # fmt: skip
    policy = ACTPolicy(config)
    stats = {
        "observation.state": {"mean": torch.full((S,), 2.0), "std": torch.full((S,), 3.0)},
        "observation.images.wrist": {
            "mean": torch.full((3, 1, 1), 0.4),
            "std": torch.full((3, 1, 1), 0.2),
        },
        "action": {"mean": torch.tensor([0.5, -0.5]), "std": torch.tensor([0.1, 0.2])},
    }
    processors = make_pre_post_processors(config, dataset_stats=stats)
    for part in (policy, *processors):
        part.save_pretrained(tmp_path / "act")
    return tmp_path, policy, stats


def test_lerobots_act_is_a_base_whose_rows_are_reset_alone(pretrained, monkeypatch):
    folder, policy, stats = pretrained
    adapter(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("LEROBOT_POLICY", "act")
    sys.modules.pop("lerobot_base", None)
    base = rf.open_base(rf.Args(base="lerobot_base:make", device="cpu", obs="pixels"), A)
    torch.manual_seed(1)
    obs = [
        {
            "state": torch.randn(2, S),
            "rgb": torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8),
        }
        for _ in range(5)
    ]

    def by_hand(seen):
        """lerobot's network, normalised and unnormalised here."""
        rgb = seen["rgb"].permute(0, 3, 1, 2) / 255
        batch = {"observation.state": (seen["state"] - 2) / (3 + 1e-8)}
        batch["observation.images.wrist"] = (rgb - 0.4) / (0.2 + 1e-8)
        chunk = policy.predict_action_chunk(batch)
        return chunk * stats["action"]["std"] + stats["action"]["mean"]

    base.reset(torch.tensor([True, True]))
    acted = [base.act(obs[0]), base.act(obs[1])]
    base.reset(torch.tensor([False, True]))
    acted += [base.act(obs[2]), base.act(obs[3])]
    first, second, third = by_hand(obs[0]), by_hand(obs[2]), by_hand(obs[3])
    wanted = [
        first[:, 0],
        first[:, 1],
        torch.stack([first[0, 2], second[1, 0]]),  # the second row began anew
        torch.stack([third[0, 0], second[1, 1]]),  # the first one's three actions are over
    ]
    for action, expected in zip(acted, wanted, strict=True):
        torch.testing.assert_close(action, expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)
