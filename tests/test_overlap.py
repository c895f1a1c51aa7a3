"""--overlap of the two algorithms that have it: updates while the environments step."""

import pytest
import test_drqv2
import test_sac_pixels
from fake_env import FakeEnv

each = pytest.mark.parametrize("tests, algo", [(test_drqv2, test_drqv2.dq), (test_sac_pixels, test_sac_pixels.sp)],
                               ids=["drqv2", "sac_pixels"])  # fmt: skip


@each
def test_overlap_updates_while_the_environments_step(tests, algo, monkeypatch, tmp_path):
    """As often as without it, from the next step on, between its two halves and without its transition."""
    monkeypatch.setattr(algo, "make_envs", tests.make_fakes)
    monkeypatch.chdir(tmp_path)
    log = []

    def watch(owner, name, letter):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (log.append(letter), call(*given))[1])

    watch(FakeEnv, "step_begin", "<")
    watch(FakeEnv, "step_end", ">")
    watch(algo.Learner, "run", "u")
    watch(algo.Replay, "add", "s")
    runs = []
    for overlap in (False, True):
        log.clear()
        algo.train(tests.arguments(name=f"overlap_{overlap}", overlap=overlap))
        runs.append("".join(log))
    plain, ours = runs
    assert set(plain) == set("us") and plain.count("u") == ours.count("u") > 2 and plain.count("s") == ours.count("s")
    head, tail = ours[: ours.index("u") + 1], ours[ours.index("u") + 1 :]
    assert set(head[:-1]) == {"s"} and tail == "<u>s" * (len(tail) // 4) and len(tail) > 4


@each
def test_overlap_is_refused_where_nothing_can_run_meanwhile(tests, algo):
    for task in ("dot_reach", "SO101ReachCube-v1"):
        with pytest.raises(ValueError, match="^--overlap is for DeepMind Control's tasks$"):
            algo.parse_args(["--env-id", task, "--device", "cpu", "--overlap"]).check()
