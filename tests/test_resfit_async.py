"""scripts/resfit_async.py: actor and learner apart, on test_resfit's tiny task."""

import pickle
from types import SimpleNamespace

import pytest
import resfit as rf
import resfit_async as ra
import torch

pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
from test_resfit import again, arguments, fake, files, make_fakes  # noqa: E402, F401


def test_actor_and_learner_apart(fake):  # noqa: F811
    out = ra.train(arguments(fake, name="a", allowance=0.9, save_buffer=True))
    checkpoint = rf.load("runs/a/checkpoint.pt")
    assert checkpoint["replay"]["head"] * 3 == out["global_step"] >= 120
    assert out["updates"] == 45
    data = checkpoint["replay"]["data"]
    moved = (data["actions"] != data["base"]).any(-1)[11:]
    assert moved.any()  # the process acts by the learner's weights
    head = checkpoint["replay"]["head"]
    out = ra.train(again(fake, "a", "--total-timesteps", "180"))
    assert out["global_step"] >= 180
    data = rf.load("runs/a/checkpoint.pt")["replay"]["data"]
    assert (data["discounts"][head - 1] == 0).all()  # new episodes began, so the old ones ended


def make_broken(args):
    """Broken in the actor's process, at its 20th step."""
    env, eval_env = make_fakes(args)
    if env is not None:
        env.state_dict = None
        step = env.step

        def broken(actions):
            if env.steps == 20:
                raise RuntimeError("the arm is unplugged")
            return step(actions)

        env.step = broken
    return env, eval_env


def test_what_a_dead_actor_recorded_is_kept(fake, monkeypatch):  # noqa: F811
    monkeypatch.setattr(rf, "make_envs", make_broken)
    with pytest.raises(SystemExit, match="interrupted at step 60: continue with --resume runs/a"):
        ra.train(arguments(fake, name="a", save_buffer=True))
    assert rf.load("runs/a/checkpoint.pt")["replay"]["head"] == 20


def make_stillborn(args):
    if not args.evaluate:
        raise RuntimeError("there is no arm")
    return make_fakes(args)


def test_an_actor_that_never_acts_is_one_line(fake, monkeypatch):  # noqa: F811
    monkeypatch.setattr(rf, "make_envs", make_stillborn)
    with pytest.raises(
        ValueError, match="^the process that acts has ended: its error stands above$"
    ):
        ra.train(arguments(fake, name="a"))


def test_the_files_own_make_envs_reaches_the_process(monkeypatch):
    """It is found by its name there, and here another function has that name meanwhile."""
    sent = []

    def make_process(target, args, daemon):
        return SimpleNamespace(start=lambda: sent.append(pickle.dumps((target, *args[:2]))))

    pipe = SimpleNamespace(close=lambda: None)
    context = SimpleNamespace(Pipe=lambda duplex: (None, pipe), Process=make_process)
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda kind: context)

    def train(args):
        rf.Collector(args, ra.Elsewhere(None), None, torch.nn.Module(), {}).start()

    monkeypatch.setattr(rf, "train", train)
    args = rf.Args()
    ra.train(args)
    assert pickle.loads(sent[0]) == (ra.act, rf.make_envs, args)
