"""bc_chunk: losses against golden numbers, chunks by hand, the exported program, runs on a dot."""

import csv
import json
import signal
from pathlib import Path

import bc_chunk as bc
import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_env import FakeEnv

h5py = pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
GOLDEN = ROOT / "tests/golden/bc_chunk.npz"
SHAPES = dict(cameras=0, action=2, state=5)
BOTH = pytest.mark.parametrize("loss", ["act", "flow"])


def arguments(**changes) -> bc.Args:
    """A small run on the CPU, for FakeEnv."""
    values = dict(env_id="Fake", device="cpu", demos="state.hdf5", steps=8, eval_freq=4, log_freq=2)
    values |= dict(eval_episodes=8, eval_envs=4, chunk=4, execute=3, dim=8, batch_size=16)
    values |= dict(lr=1e-3, image_size=16, cameras=("a", "b"), capture_video=False)
    return bc.Args(**values | changes)


def make_fake(args, seed=1):
    pixels = args.obs == "pixels"
    return FakeEnv(args.eval_envs, seed=seed, cameras=2, asymmetric=not pixels, stagger=False)


def policy(**changes) -> bc.Policy:
    """An untrained one, its zero biases drawn at random so that they hide nothing."""
    args = arguments(**changes)
    shapes = SHAPES if args.obs == "state" else dict(cameras=2, action=2, state=3)
    torch.manual_seed(3)
    net = bc.ChunkPolicy(shapes, args)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    content = dict(algo="bc_chunk", args=bc.asdict(args), shapes=shapes, spec={})
    return bc.Policy(content | dict(agent=net.state_dict()))


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory):
    """Twelve demonstrations of a dot that goes straight to the middle, as state and as pixels."""
    folder = tmp_path_factory.mktemp("demos")
    for obs in ("state", "pixels"):
        env = make_fake(arguments(obs=obs, eval_envs=12))
        seen, steps = env.reset(seed=5), []
        for _ in range(8):
            actions = (-env.place / 0.3).clamp(-1, 1) * 0.7
            following, *_, info = env.step(actions)
            steps.append((seen, actions, info["success"]))
            seen = following
        with h5py.File(folder / f"{obs}.hdf5", "w") as file:
            for i in range(12):
                group = file.create_group(f"data/demo_{i}")
                group["actions"] = np.stack([actions[i] for _, actions, _ in steps])
                group["success"] = np.stack([success[i] for *_, success in steps])
                rows = {k: np.stack([obs[k][i] for obs, *_ in steps]) for k in seen}
                if "rgb" in rows:
                    rows["a_image"], rows["b_image"] = np.split(rows.pop("rgb"), 2, -1)
                for key, values in rows.items():
                    group[f"obs/{key}"] = values
            file["mask/valid"] = np.array([b"demo_3", b"demo_11"])
    return folder


@pytest.fixture
def fake(monkeypatch, tmp_path, demo_files):
    """Train on FakeEnv, with runs/ and the demonstrations in a temporary folder."""
    monkeypatch.setattr(bc, "make_envs", make_fake)
    monkeypatch.chdir(tmp_path)
    for path in demo_files.iterdir():
        Path(path.name).symlink_to(path)


@pytest.fixture
def quick(fake, monkeypatch):
    """`fake` without the exported program, which takes seconds."""
    monkeypatch.setattr(bc, "export", lambda *_: None)


def rows(path: str) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- Losses and networks --------------------------------------------------------------------------
@BOTH
def test_loss_gradients_and_chunks_are_those_of_commit_f2f0a1a(loss):
    """Weights, batch, loss, gradients and chunks of `resfit.py` there, which did the cloning then.

    In units of the actions' deviation, which has no effect while mean and deviation are 0 and 1.
    """
    obs = "pixels"
    with np.load(GOLDEN) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    prefix = f"{obs}/{loss}/"
    golden = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    args = arguments(obs=obs, loss=loss, dim=4, dropout=0.0)
    net = bc.ChunkPolicy(dict(cameras=2, action=2, state=golden["mean"].numel()), args)
    torch.nn.utils.vector_to_parameters(golden["weights"], net.parameters())
    net.normalize.mean.copy_(golden["mean"])
    net.normalize.std.copy_(golden["std"])
    seen = {k.removeprefix("obs/"): v for k, v in golden.items() if k.startswith("obs/")}
    torch.manual_seed(7)
    value = bc.clone_loss(net, seen | dict(actions=golden["actions"], weights=golden["mask"]))
    value.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    torch.manual_seed(8)
    chunk = net.eval()(**seen)
    torch.testing.assert_close(value, golden["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients, golden["grads"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunk, golden["chunk"].clamp(-1, 1), atol=1e-6, rtol=1e-5)


def test_flow_learns_two_modes_where_regression_takes_their_middle():
    """Actions are +-0.8, whatever the state: regression finds nothing better than one value."""
    sizes = {}
    for loss in ("act", "flow"):
        net = policy(loss=loss, dim=16, dropout=0.0).net
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(300):
            sign = (torch.rand(64, 1, 1) < 0.5).float() * 2 - 1
            batch = dict(state=torch.zeros(64, 5), actions=0.8 * sign.expand(64, 4, 2))
            bc.update(net, optimizer, batch | dict(weights=torch.ones(64, 4)))
        chunk = net.eval()(torch.zeros(200, 5))
        error = float((chunk.detach().abs() - 0.8).abs().mean())
        sizes[loss] = error, float((chunk[:, 0, 0] > 0).float().mean())
    assert sizes["flow"][0] < 0.25 and 0.2 < sizes["flow"][1] < 0.8
    assert sizes["act"][1] in (0.0, 1.0)


def test_actions_are_normalised_and_come_back():
    """A loss in units of the deviation; a constant dimension is divided by 0.1."""
    args = arguments(dim=4)
    net, rows = bc.ChunkPolicy(SHAPES, args), torch.rand(500, 2) * torch.tensor([0.2, 0.0]) + 0.5
    net.scale.fit(rows, 0.1)
    scaled = net.scale(rows)
    assert scaled[:, 1].abs().max() < 1e-5 and net.scale.std[1] == 0.1
    torch.testing.assert_close(net.scale.inverse(scaled), rows)
    batch = dict(state=torch.zeros(3, 5), weights=torch.ones(3, 4))
    batch["actions"] = torch.full((3, 4, 2), 0.7)
    nn = net.net.layers[-1]
    nn.weight.data.zero_()
    nn.bias.data.zero_()
    wanted = ((0.7 - net.scale.mean) / net.scale.std).abs().mean()
    torch.testing.assert_close(bc.clone_loss(net, batch), wanted)
    torch.testing.assert_close(net.eval()(batch["state"])[0, 0], net.scale.mean)


def test_a_state_alone_goes_through_a_perceptron():
    kinds = [bc.ChunkPolicy(SHAPES | dict(cameras=n), arguments()).net for n in (0, 2)]
    assert [type(net) for net in kinds] == [bc.Perceptron, bc.Transformer]


def test_images_of_a_batch_are_shifted_together_by_at_most_four_pixels():
    rgb = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    padded = np.pad(rgb.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    windows = {}
    for dy in range(9):
        for dx in range(9):
            windows[padded[:, dy : dy + 12, dx : dx + 12].tobytes()] = dy, dx
    torch.manual_seed(0)
    seen = {windows[bc.shift_images(rgb).numpy().tobytes()] for _ in range(300)}
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(9))


def test_training_shifts_images_and_validation_does_not(monkeypatch):
    seen = []
    monkeypatch.setattr(bc, "shift_images", lambda rgb: seen.append(len(rgb)) or rgb)
    acting = policy(obs="pixels")
    batch = dict(make_fake(arguments(obs="pixels")).obs)
    batch |= dict(actions=torch.zeros(4, 4, 2), weights=torch.ones(4, 4))
    bc.clone_loss(acting.net, batch)
    assert not seen
    bc.update(acting.net, torch.optim.SGD(acting.net.parameters(), 0.1), batch)
    assert seen == [4]


def test_weights_are_averaged_quickly_at_first():
    """By hand: after updates 1, 2, ... the share of the newest weights is 9/10, 9/11, ... at least 1 - keep."""
    average, net = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.weight.data.fill_(100.0)
    wanted = 100.0
    for step in range(1, 41):
        net.weight.data.fill_(float(step))
        bc.average_weights(average, net, step, 0.75)
        share = max(0.25, 9 / (step + 9))
        wanted = (1 - share) * wanted + share * step
        assert average.weight.item() == pytest.approx(wanted, rel=1e-5)


def test_the_learning_rate_falls_as_half_a_cosine(quick, monkeypatch):
    seen, update = [], bc.update

    def note(net, optimizer, batch):
        seen.append(optimizer.param_groups[0]["lr"])
        return update(net, optimizer, batch)

    monkeypatch.setattr(bc, "update", note)
    bc.train(arguments(name="a", lr=0.1))
    assert seen == pytest.approx([0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(8)])


def test_places_of_the_images():
    assert bc.Tokens(2, 4, 84).place.shape == (2 * 81, 4)


# --- Chunks and queue -----------------------------------------------------------------------------
def test_chunks_end_with_their_demonstration():
    demos = []
    for first, length in ((0, 2), (10, 3)):
        numbers = first + np.arange(length, dtype=np.float32)[:, None]
        demos.append(dict(state=numbers, actions=numbers / 100))
    chunks = bc.Chunks(demos, arguments(chunk=3))
    batch, starts = chunks.sample(200), set()
    for state, actions, weights in zip(
        batch["state"], batch["actions"], batch["weights"], strict=True
    ):
        start = int(state)
        left = min(3, (2 if start < 10 else 13) - start)
        assert weights.tolist() == [1.0] * left + [0.0] * (3 - left)
        expected = [(start + i) / 100 for i in range(left)]
        assert actions[:left, 0].tolist() == pytest.approx(expected)
        starts.add(start)
    assert starts == {0, 1, 10, 11, 12}


def test_policy_asks_again_when_the_executed_actions_are_done():
    acting = policy(execute=3)
    asked = []

    def net(state):
        asked.append(float(state[0, 0]))
        return asked[-1] + torch.arange(4.0)[None, :, None].expand(2, 4, 2) / 10

    acting.net = net
    seen = []
    for step in range(5):
        obs = dict(privileged=np.full((2, 2), step, np.float32), state=np.zeros((2, 3), np.float32))
        seen.append(float(acting.act(obs)[1, 1]))
        if step == 3:
            acting.reset()
    assert asked == [0, 3, 4]
    assert seen == pytest.approx([0.0, 0.1, 0.2, 3.0, 4.0])


def test_temporal_ensemble_by_hand():
    """ACT: the oldest plan has weight 1, those after it exp(-m), exp(-2 m), ..."""
    acting = policy(ensemble=0.5)
    acting.net = lambda state: state[:, :1, None] + torch.arange(4.0)[:, None].expand(4, 2) / 10
    seen = []
    for step in range(6):
        obs = dict(privileged=torch.full((3, 2), step), state=torch.zeros(3, 3))
        seen.append(float(acting.act(obs)[2, 1]))
    wanted = []
    for step in range(6):
        plans = range(max(0, step - 3), step + 1)  # when each was made
        weights = np.exp(-0.5 * np.arange(len(plans)))
        wanted.append(np.average([made + (step - made) / 10 for made in plans], weights=weights))
    assert seen == pytest.approx(wanted)
    acting.reset()
    assert float(acting.act(obs)[0, 0]) == 5


def test_true_state_is_for_state_policies_only():
    obs = dict(state=torch.ones(1, 1), privileged=torch.zeros(1, 2), rgb=torch.ones(1, 1))
    assert bc.observe(obs, pixels=False)["state"].tolist() == [[0, 0, 1]]
    assert bc.observe(obs, pixels=True).keys() == {"state", "rgb"}
    assert bc.observe(obs, pixels=True)["state"].tolist() == [[1]]


# --- The exported program -------------------------------------------------------------------------
@pytest.mark.parametrize(("obs", "loss"), [("pixels", "act"), ("state", "flow")])
def test_the_exported_program_is_the_policy(tmp_path, obs, loss):
    acting = policy(obs=obs, loss=loss)
    bc.save(tmp_path / "best.pt", content_of(acting))
    bc.export(tmp_path / "best.pt", tmp_path / "base.pt2")
    files = {"base.json": ""}
    program = torch.export.load(tmp_path / "base.pt2", extra_files=files).module()
    for n in (1, 2, 7):
        seen = bc.observe(make_fake(arguments(obs=obs, eval_envs=n), seed=n).obs, obs == "pixels")
        torch.manual_seed(n)
        expected = acting.net(**seen)
        torch.manual_seed(n)
        torch.testing.assert_close(program(*seen.values()), expected, atol=1e-6, rtol=0)
        assert expected.shape == (n, 4, 2) and expected.abs().max() <= 1
    about = dict(algo="bc_chunk", env_id="Fake", obs=obs, execute=3, image_size=16)
    about |= dict(cameras=["a", "b"], state_dim=5 if obs == "state" else 3, action_dim=2)
    assert json.loads(files["base.json"]) == about


def content_of(acting: bc.Policy) -> dict:
    about = dict(algo="bc_chunk", args=bc.asdict(acting.args), shapes=acting.shapes, spec={})
    return about | dict(agent=acting.net.state_dict())


# --- Runs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("obs", ["state", "pixels"])
def test_a_run_writes_what_the_page_says(fake, obs):
    args = arguments(name="a", obs=obs, demos=f"{obs}.hdf5", capture_video=True)
    result = bc.train(args)
    run = Path("runs/a")
    assert result["run"] == str(run) and json.loads((run / "args.json").read_text())["obs"] == obs
    evaluations, metrics = rows(run / "eval.csv"), rows(run / "metrics.csv")
    assert [row["global_step"] for row in evaluations] == ["4", "8"]
    assert [row["global_step"] for row in metrics] == ["2", "4", "6", "8"]
    clock = ["global_step", "wall_time", "train_time"]
    assert list(metrics[0]) == [*clock, "loss/clone", "time/ups"]
    found = ["success_rate", "length"]
    assert list(evaluations[0]) == [*clock, *[f"eval/{name}" for name in found], "loss/valid"]
    assert [path.name for path in (run / "videos").iterdir()] == ["update_8.mp4"]
    acting = bc.Policy(run / "best.pt")
    assert acting.act(make_fake(args).reset(0)).shape == (4, 2)
    assert (run / "base.pt2").exists()
    again = bc.train(bc.parse_args(["--evaluate", "--checkpoint", "runs/a/checkpoint.pt"]))
    assert again["eval/success_rate"] == result["eval/success_rate"]


def test_cloning_learns_the_fake_task(quick):
    result = bc.train(arguments(name="a", steps=300, eval_freq=150, lr=5e-3, dim=16, dropout=0.0))
    losses = [float(row["loss/valid"]) for row in rows("runs/a/eval.csv")]
    args = arguments()
    untrained = bc.evaluate(policy(), make_fake(args), args)
    assert result["eval/success_rate"] >= untrained["eval/success_rate"] + 0.5
    assert losses[-1] < 0.2


def stop_before(monkeypatch, number: int):
    """The power goes before that update."""
    update, count = bc.update, []

    def stop(*parts):
        count.append(1)
        if len(count) == number:
            raise RuntimeError("no power")
        return update(*parts)

    monkeypatch.setattr(bc, "update", stop)


def test_a_run_that_ended_goes_on(quick):
    bc.train(arguments(name="a", steps=4))
    bc.train(bc.parse_args(["--resume", "runs/a", "--steps", "8"]))
    assert [row["global_step"] for row in rows("runs/a/eval.csv")] == ["4", "8"]


@BOTH
def test_resume_is_exact(quick, loss, monkeypatch):
    """Also in the order of minibatches, the flow's noise and dropout; a later row is cut off."""
    bc.train(arguments(name="whole", loss=loss, dropout=0.3))
    first = bc.load("runs/whole/checkpoint.pt")["agent"]["net.layers.6.weight"]
    with monkeypatch.context() as patch:
        stop_before(patch, 5)
        with pytest.raises(RuntimeError, match="no power"):
            bc.train(arguments(name="part", loss=loss, dropout=0.3))
    middle = bc.load("runs/part/checkpoint.pt")["agent"]["net.layers.6.weight"]
    for name in ("eval", "metrics"):
        with open(f"runs/part/{name}.csv", "a") as file:
            file.write("999999\n")
    bc.train(bc.parse_args(["--resume", "runs/part"]))
    whole, part = (bc.load(f"runs/{name}/checkpoint.pt") for name in ("whole", "part"))
    for key in ("agent", "net", "optimizer", "random"):
        torch.testing.assert_close(part[key], whole[key], atol=0, rtol=0)
    assert not torch.equal(first, middle)
    for name in ("eval", "metrics"):
        tables = []
        for run in ("whole", "part"):
            table = rows(f"runs/{run}/{name}.csv")
            tables.append([{k: v for k, v in row.items() if "time" not in k} for row in table])
        assert tables[0] == tables[1]


def test_a_run_is_marked_before_its_first_update(quick, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        with pytest.raises(RuntimeError, match="no power"):
            bc.train(arguments(name="part"))
    assert bc.load("runs/part/checkpoint.pt")["progress"]["global_step"] == 0
    bc.train(bc.parse_args(["--resume", "runs/part"]))
    bc.train(arguments(name="whole"))
    weights = [bc.load(f"runs/{name}/checkpoint.pt")["agent"] for name in ("whole", "part")]
    torch.testing.assert_close(*weights, atol=0, rtol=0)


def test_ctrl_c_saves_when_the_step_is_whole(quick, monkeypatch):
    bc.train(arguments(name="whole"))
    handler = signal.getsignal(signal.SIGINT)
    update, count = bc.update, []

    def update_and_interrupt(*parts):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return update(*parts)

    monkeypatch.setattr(bc, "update", update_and_interrupt)
    with pytest.raises(
        SystemExit, match="^interrupted at update 3: continue with --resume runs/part$"
    ):
        bc.train(arguments(name="part"))
    assert signal.getsignal(signal.SIGINT) is handler
    bc.train(bc.parse_args(["--resume", "runs/part"]))
    weights = [bc.load(f"runs/{name}/checkpoint.pt")["agent"] for name in ("whole", "part")]
    torch.testing.assert_close(*weights, atol=0, rtol=0)


def test_best_is_the_best(fake, monkeypatch):
    success = iter([0.2, 0.8, 0.4])
    losses = iter([0.1, 0.3, 0.2])

    def evaluate(*_):
        return {"eval/success_rate": next(success), "loss/valid": next(losses)}

    monkeypatch.setattr(bc, "evaluate", evaluate)
    bc.train(arguments(name="a", steps=6, eval_freq=2))
    assert bc.load("runs/a/valid.pt")["progress"]["global_step"] == 2
    best, last = bc.load("runs/a/best.pt"), bc.load("runs/a/checkpoint.pt")
    assert best["progress"]["global_step"] == 4 and best["progress"]["best"] == 0.8
    assert last["progress"]["global_step"] == 6 and last["progress"]["best"] == 0.8
    state = torch.ones(3, 5)
    exported = torch.export.load("runs/a/base.pt2").module()(state)
    torch.testing.assert_close(exported, bc.Policy("runs/a/best.pt").net(state), atol=1e-6, rtol=0)
    assert not torch.allclose(exported, bc.Policy("runs/a/checkpoint.pt").net(state), atol=1e-6)


def test_evaluation_repeats_itself_and_leaves_the_random_state_alone():
    acting, args = policy(loss="flow"), arguments(eval_episodes=40, eval_envs=20)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = bc.evaluate(acting, make_fake(args), args)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert bc.evaluate(acting, make_fake(args, seed=7), args) == first


def test_evaluation_counts_each_environment_once():
    """Environment i ends after i + 1 steps and succeeds if i is odd, then lives on unseen."""

    class Uneven(FakeEnv):
        def step(self, actions):
            obs, rewards, _, _, info = super().step(actions)
            self.counts = getattr(self, "counts", torch.zeros(4, dtype=int)) + 1
            ends = self.counts % (torch.arange(4) + 1) == 0
            episode = dict(success_at_end=torch.arange(4) % 2 == 1, length=self.counts)
            return obs, rewards, ends, ~ends & False, info | dict(episode=episode)

    args = arguments(eval_episodes=4)
    result = bc.evaluate(policy(), Uneven(4, asymmetric=True, stagger=False), args)
    assert result["eval/success_rate"] == 0.5 and result["eval/length"] == 2.5


# --- What is refused ------------------------------------------------------------------------------
def test_resume_refuses_what_it_cannot_honour(quick):
    bc.train(arguments(name="a", steps=2))
    message = "^--lr cannot change on --resume of runs/a$"
    with pytest.raises(ValueError, match=message):
        bc.parse_args(["--resume", "runs/a", "--lr", "0.5"])
    with pytest.raises(ValueError, match="^--device must stay cpu"):
        bc.parse_args(["--resume", "runs/a", "--device", "cuda"])
    with pytest.raises(ValueError, match="^runs/a exists: continue it with --resume runs/a"):
        bc.train(arguments(name="a"))
    with pytest.raises(FileNotFoundError, match="^there is no checkpoint runs/b/checkpoint.pt$"):
        bc.parse_args(["--resume", "runs/b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(demos=""), "give --demos FILE"),
        (dict(evaluate=True), "--evaluate needs --checkpoint FILE"),
        (dict(execute=5), "--execute must be from 1 to --chunk"),
        (dict(dim=6), "--dim must be a multiple of 4"),
        (dict(eval_episodes=7), "--eval-episodes must be a multiple of --eval-envs"),
        (dict(demos="none.hdf5"), "none.hdf5 holds no demonstrations"),
        (dict(obs="pixels", demos="pixels.hdf5", cameras=("a",)), "pixels.hdf5 has .*16, 3.* 6"),
    ],
)
def test_what_cannot_work_is_one_line(fake, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bc.train(arguments(**changes))


def test_nan_is_named(fake, monkeypatch):
    def update(net, *_):
        net.net.layers[0].bias.data[0] = torch.nan
        return {"loss/clone": torch.zeros(())}

    monkeypatch.setattr(bc, "update", update)
    message = (
        "^net.layers.0.bias is not finite at update 2; last good checkpoint: runs/a/checkpoint.pt$"
    )
    with pytest.raises(FloatingPointError, match=message):
        bc.train(arguments(name="a"))
    assert bc.load("runs/a/checkpoint.pt")["net"]["net.layers.0.bias"].isfinite().all()


def test_checkpoints_are_data(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (dict(algo="other"), dict(algo="bc_chunk", spec=Path("x"))):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is no checkpoint|is not bc_chunk's"):
            bc.load(path)


def test_defaults_are_those_of_task_and_device():
    args = bc.parse_args(["--env-id", "SO101ReachCube-v1", "--device", "cpu", "--lr", "1"])
    assert (args.steps, args.eval_freq, args.dim, args.lr) == (1_500, 500, 64, 1)
    args = bc.parse_args(["--env-id", "Other", "--device", "cuda"])
    assert (args.steps, args.dim, args.dropout, args.chunk) == (50_000, 256, 0.1, 20)
