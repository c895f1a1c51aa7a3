"""Policies in files: checkpoints by their algorithm, exports without torch, the same actions from all of them."""

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import squint_sac
import torch
import torch.nn as nn
from conftest import ROOT
from fake_checkpoint import SPEC, checkpoint, write_checkpoint
from fake_env import FakeEnv

from hardware import export, policy, so101
from hardware.export import Args, ExportError
from hardware.policy import NumpyPolicy, OnnxPolicy, PolicyError, TorchPolicy, load_policy

needs_onnx = pytest.mark.skipif(
    any(
        __import__("importlib.util").util.find_spec(name) is None
        for name in ("onnx", "onnxscript", "onnxruntime")
    ),
    reason='needs ONNX: pip install -e ".[export]"',
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of two cameras, and both of its exports."""
    pytest.importorskip("onnxscript", reason='needs ONNX: pip install -e ".[export]"')
    folder = tmp_path_factory.mktemp("exports")
    cameras = {
        "wrist": SPEC["cameras"]["wrist"],
        "third": SPEC["cameras"]["wrist"] | {"mount": "world"},
    }
    spec = {"cameras": cameras, "render_size": 32}
    path = write_checkpoint(folder / "best.pt", spec=spec, cameras=("wrist", "third"))
    differences = export.export(Args(str(path), start_view=False))
    assert set(differences) == {str(folder / "best.onnx"), str(folder / "best.npz")}
    assert all(difference <= 1e-5 for difference in differences.values())
    return folder


def observations(count, seed=0, cameras=2):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        frames = [draw.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(cameras)]
        yield frames, draw.normal(0, 1, (1, 12)).astype(np.float32)


# --- From a checkpoint ------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_rebuilt_by_its_algorithm(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt", seed=3)
    loaded, own = load_policy(path), squint_sac.Policy(path)
    assert isinstance(loaded, TorchPolicy) and loaded.spec == SPEC and loaded.algo == "squint_sac"
    for frames, state in observations(3, cameras=1):
        rgb = loaded.preprocess(frames[0])
        np.testing.assert_array_equal(rgb, own.preprocess(frames[0]).numpy())
        expected = own.act({"rgb": torch.from_numpy(rgb), "state": torch.from_numpy(state)}).numpy()
        np.testing.assert_array_equal(loaded.act({"rgb": rgb, "state": state}), expected)
        np.testing.assert_array_equal(loaded.view, rgb)
    assert (
        load_policy(path).digest
        == loaded.digest
        != load_policy(write_checkpoint(tmp_path / "b.pt", 4)).digest
    )


def test_no_simulator_is_imported_to_load_and_run_a_policy(tmp_path):
    write_checkpoint(tmp_path / "best.pt")
    code = (
        "import sys, numpy as np; from hardware.policy import load_policy; p = load_policy(sys.argv[1]); "
        "p.act({'rgb': p.preprocess(np.zeros((48, 64, 3), np.uint8)), 'state': np.zeros((1, 12), 'f4')}); "
        "bad = {'mujoco', 'warp', 'mujoco_warp', 'sapien', 'envs.so101'} & set(sys.modules); "
        "sys.exit(', '.join(bad) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "best.pt"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_files_that_are_no_policy(tmp_path):
    def refused(name, message, content=None):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(PolicyError, match=message) as error:
            load_policy(tmp_path / name)
        assert "\n" not in str(error.value)

    refused("none.pt", "there is no policy")
    refused("best.txt", r"a policy is a checkpoint \(.pt\) or an export", b"x")
    refused("damaged.pt", "cannot be read as a checkpoint", b"x")
    refused("other.pt", "is not a checkpoint of algos/", {"weights": torch.zeros(1)})
    refused("unknown.pt", "names the algorithm 'no_such'", {"algo": "no_such", "spec": {}})
    refused("path.pt", "names the algorithm", {"algo": "../hardware/policy", "spec": {}})
    short = checkpoint()
    short["agent"].pop("averaged.actor.mean.bias")
    refused("short.pt", "does not fit algos/squint_sac.py of this version", short)
    refused("damaged.onnx", "cannot be read as ONNX|needs ONNX Runtime", b"x")
    refused("damaged.npz", "cannot be read as a NumPy export", b"PK\x03\x04 and then nothing")
    np.savez(tmp_path / "foreign.npz", weights=np.zeros(3))
    refused("foreign.npz", "was not written by hardware/export.py")
    np.savez(tmp_path / "future.npz", meta=json.dumps({"format": 99}), program="[]")
    refused("future.npz", "has format 99, this version reads 2")
    np.savez(
        tmp_path / "cut.npz", meta=json.dumps({"format": 2, "preprocess": "nearest"}), program="[]"
    )
    refused("cut.npz", "images prepared by 'nearest'")


# --- Exports ----------------------------------------------------------------------------------------------------------
@needs_onnx
def test_exports_act_as_the_checkpoint_does_over_an_episode(exported):
    policies = [load_policy(exported / name) for name in ("best.pt", "best.onnx", "best.npz")]
    assert [type(p) for p in policies] == [TorchPolicy, OnnxPolicy, NumpyPolicy]
    for _ in range(2):  # the second time after a reset
        [p.reset() for p in policies]
        for frames, state in observations(4):
            rgb = [np.concatenate([p.preprocess(frame) for frame in frames], -1) for p in policies]
            np.testing.assert_array_equal(rgb[0], rgb[1])
            np.testing.assert_array_equal(rgb[0], rgb[2])
            actions = [p.act({"rgb": rgb[0], "state": state}) for p in policies]
            np.testing.assert_array_equal(policies[0].view, policies[1].view)
            assert policies[1].view.shape == (1, 16, 16, 6)
            np.testing.assert_allclose(actions[1], actions[0], atol=1e-5, rtol=0)
            np.testing.assert_allclose(actions[2], actions[0], atol=1e-5, rtol=0)
            assert np.abs(actions[0]).max() > 0.01, (
                "an action that is always 0 would compare equal too"
            )


@needs_onnx
@pytest.mark.parametrize("name", ["best.onnx", "best.npz"])
def test_any_batch_size(exported, name):
    p, source = load_policy(exported / name), TorchPolicy(exported / "best.pt")
    draw = np.random.default_rng(0)
    for batch in (1, 2, 5):
        rgb = draw.integers(0, 256, (batch, 16, 16, 6), dtype=np.uint8)
        state = draw.normal(size=(batch, 12)).astype(np.float32)
        [one.reset() for one in (p, source)]
        actions = p.act({"rgb": rgb, "state": state})
        assert actions.shape == (batch, 6)
        np.testing.assert_allclose(
            actions, source.act({"rgb": rgb, "state": state}), atol=1e-5, rtol=0
        )


@needs_onnx
@pytest.mark.parametrize("name", ["best.onnx", "best.npz"])
def test_the_description_travels_in_the_file(exported, name):
    p = load_policy(exported / name)
    assert p.spec == TorchPolicy(exported / "best.pt").spec and p.spec["control_hz"] == 10.0
    assert p.spec["state_layout"] == ["joint_position"] * 6 + ["joint_target"] * 6
    meta = p.meta
    assert meta["checkpoint"] == {
        "name": "best.pt",
        "digest": policy.file_digest(exported / "best.pt"),
    }
    assert meta["preprocess"] == policy.PREPROCESS and meta["inputs"] == ["rgb", "state"]
    assert meta["image_size"] == 16
    assert meta["maps"]["gripper"] == dict(
        servo_degrees=[-62.5, 64.62], joint_degrees=[-10.0, 120.0]
    )
    assert (
        meta["maps"]["gains"] == dict(p=so101.SETTINGS["p"], i=0, d=so101.SETTINGS["d"])
        and meta["commit"]
    )


@needs_onnx
def test_exports_run_where_torch_cannot_be_imported(exported):
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np; from hardware.policy import load_policy\n"
        "for path in sys.argv[1:]:\n"
        "    p = load_policy(path)\n"
        "    p.act({'rgb': np.concatenate([p.preprocess(np.zeros((48, 64, 3), 'u1'))] * 2, -1),"
        " 'state': np.zeros((1, 12))})\n"
    )
    files = [exported / "best.onnx", exported / "best.npz"]
    run = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    code = "import sys; sys.modules['torch'] = None; from hardware.policy import load_policy; load_policy(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, exported / "best.pt"], cwd=ROOT, capture_output=True, text=True
    )
    assert "needs torch; an exported policy does not" in run.stderr


def test_numpy_steps_equal_torch_for_every_layer_that_is_known():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(12, 20), nn.LayerNorm(20), nn.SiLU(), nn.Linear(20, 20), nn.ELU(), nn.Linear(20, 20), nn.ReLU(),
        nn.Linear(20, 6), nn.Tanh(),
    )  # fmt: skip
    convolutions = nn.Sequential(
        nn.Conv2d(3, 5, 4, 2), nn.ReLU(), nn.Conv2d(5, 4, (3, 2)), nn.Tanh()
    )
    state, rgb = torch.randn(7, 12) * 3, torch.randn(2, 3, 16, 16)
    for net, register, x in ((layers, "state", state), (convolutions, "rgb", rgb)):
        weights = {}
        steps = export.sequential(net, register, weights, "net")
        with torch.no_grad():
            np.testing.assert_allclose(
                policy.run_program(steps, weights, {register: x.numpy()}), net(x), atol=2e-6
            )


def test_a_policy_of_the_state_alone_exports_as_steps(tmp_path):
    torch.manual_seed(0)
    net = SimpleNamespace(actor=nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)))
    spec = {"state_layout": ["x"] * 4, "cameras": {}, "joint_names": ["a", "b"]}
    source = SimpleNamespace(
        net=net, spec=spec, algo="mlp", path=tmp_path / "best.pt", digest="0" * 16
    )
    network, names = export.torch_network(source)
    assert names == ("state",)
    export.write_numpy(
        tmp_path / "mlp.npz", *export.numpy_program(source), export.describe(source, names, None)
    )
    loaded = load_policy(tmp_path / "mlp.npz")
    assert export.largest_difference(source, network, names, loaded) < 1e-6
    state = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(
        loaded.act({"state": state}), export.torch_action(network, {"state": state}), atol=1e-6
    )


def test_what_cannot_be_exported_says_so(tmp_path):
    with pytest.raises(ExportError, match="NumPy does not know the layer GELU"):
        export.sequential(nn.Sequential(nn.GELU()), "state", {}, "actor")
    with pytest.raises(ExportError, match="NumPy does not know the layer Conv2d"):
        export.sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "rgb", {}, "convs")
    with pytest.raises(ExportError, match="neither Squint's networks nor"):
        export.torch_network(SimpleNamespace(net=nn.Identity(), algo="other"))
    with pytest.raises(PolicyError, match="there is no policy"):
        export.export(Args(str(tmp_path / "none.pt")))


def test_a_file_that_differs_from_the_checkpoint_is_not_written(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "best.pt")
    right = export.numpy_program

    def wrong(source):
        steps, weights = right(source)
        weights["trunk.9.bias"] = weights["trunk.9.bias"] + np.float32(1e-3)
        return steps, weights

    args = Args(str(path), format="numpy", start_view=False)
    monkeypatch.setattr(export, "numpy_program", wrong)
    with pytest.raises(ExportError, match="best.npz differs from the checkpoint by"):
        export.export(args)
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]
    monkeypatch.setattr(export, "numpy_program", right)
    assert list(export.export(replace(args, out=str(tmp_path / "new/policy")))) == [
        str(tmp_path / "new/policy.npz")
    ]


def test_the_start_view_is_the_simulators_image(tmp_path):
    pytest.importorskip("mujoco_warp", reason='needs the simulator: pip install -e ".[so101]"')
    path = write_checkpoint(tmp_path / "best.pt")
    export.export(Args(str(path), format="numpy"))
    png = base64.b64decode(load_policy(tmp_path / "best.npz").meta["start_view"])
    view = np.asarray(imageio.imread(io.BytesIO(png)))
    assert view.shape == (240, 240, 3)
    red = view[..., 0].astype(int) > view[..., 1] + 60
    assert 1000 < red.sum() < 4000, "the cube is in sight"


def test_the_command_prints_differences_and_times(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt")
    words = ["--checkpoint", str(path), "--format", "numpy", "--no-start-view", "--repeats", "3"]
    run = subprocess.run(
        [sys.executable, "-m", "hardware.export", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "differs from the checkpoint by" in run.stdout and "us on one thread" in run.stdout
    table = run.stdout.splitlines()[-2:]
    assert (
        table[0].startswith("torch ")
        and table[1].startswith("NumPy ")
        and len(table[1].split()) == 5
    )
    run = subprocess.run([sys.executable, "-m", "hardware.export", "--checkpoint", "none.pt"], cwd=ROOT,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 2 and run.stderr == "error: there is no policy none.pt\n"


def test_a_policy_trained_on_another_environment_keeps_its_spec(tmp_path):
    """Nothing in the loader is about one robot: that is for the deployer to check."""
    path = write_checkpoint(tmp_path / "best.pt", spec=FakeEnv().spec | {"robot": "dot"})
    assert load_policy(path).spec["robot"] == "dot"
