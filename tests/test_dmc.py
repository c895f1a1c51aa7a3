"""DeepMind Control: the published tasks, rewards and discounts against dm_control itself, renderers, exact resume."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("dm_control", reason='needs DeepMind Control: pip install -e ".[dmc]"')
import dm_env  # noqa: E402

from envs import check, dmc  # noqa: E402

os.environ.setdefault("MUJOCO_GL", "egl")  # before anything here imports dm_control
EGL = check.ask("egl").works
egl = pytest.mark.skipif(
    not EGL, reason="no OpenGL by EGL: sudo apt-get install libegl1 libgl1-mesa-dri"
)
if not EGL:
    os.environ["MUJOCO_GL"] = "disabled"
from envs.dmc import processes, worker  # noqa: E402

OPTIONS = dict(image_size=32, action_repeat=2, camera=None, renderer="warp", fast_render=False, camera_jitter=0.0,
               colour_jitter=0.0)  # fmt: skip


def task(env_id="cartpole_swingup", seed=1, **options):
    """A task alone, begun; its views are what there is to draw, so it needs no renderer."""
    one = worker.Task(env_id, **OPTIONS | options)
    one.seed([seed, 0])
    one.begin()
    return one


def make(env_id="cartpole_swingup", n=2, **options):
    return dmc.make(env_id, n, "cpu", **({"seed": 1, "image_size": 24, "renderer": "warp", "workers": 0,
                                          "samples_per_pixel": 1} | options))  # fmt: skip


def actions(n, size, seed=0):
    return torch.rand(n, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def end_soon(env, steps=1):
    """The environments' time is up after so many steps."""
    for group in env.groups:
        for one in group.group.tasks:
            one.clock = one.limit - steps


# ---------------------------------------------------------------------------------------------------- one task -------
@pytest.mark.parametrize("env_id", dmc.EASY + dmc.MEDIUM + dmc.HARD)
def test_published_tasks_load_and_step(env_id):
    one = task(env_id)
    view = one.view()
    reward, discount, terminated, truncated, sane = one.step(np.zeros(len(one.low), np.float32))
    assert (
        np.isfinite(reward)
        and 0 <= reward <= 2
        and discount == 1
        and sane
        and not terminated
        and not truncated
    )
    assert one.limit == (125 if env_id == "reach_duplo" else 500)
    camera = one.describe()["cameras"][one.camera]
    assert one.camera == (2 if env_id.startswith("quadruped") else 0)
    assert env_id != "reach_duplo" or camera == "front_close"
    things = sum(map(len, worker.slots(one.model)))
    assert view.shape == (things * 19 + 12 + 6 * one.model.nlight,) and np.isfinite(view).all()


def test_ids():
    known = worker.known_tasks()
    assert known["cup_catch"] == known["ball_in_cup_catch"] == ("ball_in_cup", "catch")
    assert known["humanoid_CMU_run"] == ("humanoid_CMU", "run") and known["point_mass_easy"] == (
        "point_mass",
        "easy",
    )
    assert (
        known["reach_duplo"] == ("manipulation", "reach_duplo_features")
        and "lqr_lqr_2_1" not in known
    )
    with pytest.raises(
        ValueError, match="unknown DeepMind Control task 'walker_wlak'; did you mean walker_walk"
    ):
        task("walker_wlak")


@pytest.mark.parametrize("env_id", ["cheetah_run", "reach_duplo"])
def test_rewards_and_states_are_those_of_dm_control(env_id):
    """The same random state and actions through dm_control alone, frame by frame, actions scaled by hand."""
    from dm_control import manipulation, suite

    one = task(env_id, action_repeat=4)
    random = np.random.RandomState()
    worker._set_random_state(random, one.at_start["physics"])
    if env_id == "reach_duplo":
        env = manipulation.load("reach_duplo_features", seed=random)
    else:
        env = suite.load(*env_id.split("_"), task_kwargs={"random": random})
    env.reset()
    low, high = env.action_spec().minimum, env.action_spec().maximum
    for t in range(5):
        action = actions(1, len(low), t)[0].numpy()
        reward = one.step(action)[0]
        scaled = low + (high - low) * (action.astype(np.float64) + 1) / 2
        assert reward == pytest.approx(sum(env.step(scaled).reward for _ in range(4)), abs=1e-12)
        assert np.allclose(one.env.physics.get_state(), env.physics.get_state(), atol=1e-12)


class Script:
    """Stands in for a task: one (reward, discount, last) a frame, or a physics that diverges."""

    def __init__(self, frames):
        self.frames = list(frames)

    def step(self, _):
        frame = self.frames.pop(0)
        if frame is None:
            raise worker.PhysicsError("diverged")
        reward, discount, last = frame
        return dm_env.TimeStep(
            dm_env.StepType.LAST if last else dm_env.StepType.MID, reward, discount, {}
        )


@pytest.mark.parametrize(("frames", "expected"), [
    # reward is the sum of each frame's times the discounts before it; the discount is their product
    ([(1.0, 0.5, False), (2.0, 0.8, False), (4.0, 1.0, False)], (1 + 0.5 * 2 + 0.4 * 4, 0.4, False, False, True)),
    ([(1.0, 1.0, False), (2.0, 0.0, True)], (3.0, 0.0, True, False, True)),  # a true end stays one, and ends the repeat
    ([(1.0, 1.0, False), (2.0, 1.0, True)], (3.0, 1.0, False, True, True)),  # the time limit
    ([(1.0, 0.9, True)], (1.0, 0.9, False, True, True)),  # ends with the value of what follows, discounted
    ([(1.0, 1.0, False), None], (0.0, 1.0, False, True, False)),  # diverged: no reward, not a true end
])  # fmt: skip
def test_discounts_inside_the_action_repeat(frames, expected):
    one = task(action_repeat=3)
    one.env = Script(frames)
    assert one.step(np.zeros(1, np.float32)) == pytest.approx(expected)
    assert not one.env.frames


def test_an_episode_lasts_as_long_as_it_should():
    one = task("pendulum_swingup", action_repeat=8)
    ends = []
    for _ in range(one.limit):
        ends.append(one.step(np.zeros(1, np.float32))[2:4])
    assert ends == [(False, False)] * 124 + [(False, True)]  # 1000 frames of 8


def test_saved_episodes_are_lived_again_exactly():
    """The state at any moment, physics and what is drawn, follows from the random state at the start and the actions.

    finger and reacher write targets into the model; the manipulation tasks are compiled anew for every episode.
    """
    for env_id in ("finger_turn_hard", "reacher_hard", "reach_duplo"):
        one = task(env_id, camera_jitter=0.1, colour_jitter=0.2)
        other = task(env_id, seed=2, camera_jitter=0.1, colour_jitter=0.2)
        steps = [actions(1, len(one.low), t)[0].numpy() for t in range(9)]
        for action in steps[:3]:
            one.step(action)
        one.begin()
        for action in steps[3:6]:
            one.step(action)
        assert not np.array_equal(one.view(), other.view())
        other.load(one.save())
        for action in steps[6:]:
            assert np.array_equal(one.view(), other.view()) and one.step(action) == other.step(
                action
            )
            assert np.array_equal(one.env.physics.get_state(), other.env.physics.get_state())
        one.begin(), other.begin()
        assert np.array_equal(one.view(), other.view())


@egl
@pytest.mark.parametrize("env_id", [name for names in worker.LOCOMOTION.values() for name in names])
def test_locomotion_is_seen_by_the_walker_and_lived_again_exactly(env_id):
    """The second world of one task, in another that began elsewhere. Mazes fail here: they shuffle by themselves."""
    one, other = (task(env_id, seed, renderer="egl") for seed in (1, 2))
    one.begin()
    steps = [actions(1, len(one.low), t)[0].numpy() for t in range(4)]
    for action in steps[:2]:
        one.step(action)
    other.load(one.save())
    for action in steps[2:]:
        assert np.array_equal(one.view(), other.view()) and one.step(action) == other.step(action)
    one.begin(), other.begin()
    assert np.array_equal(one.env.physics.get_state(), other.env.physics.get_state())
    assert one.describe()["cameras"][one.camera] == "walker/egocentric" and one.view().std() > 2
    assert one.frames == (1500 if env_id == "rodent_run_gaps" else 1000)


@egl
def test_a_walker_that_falls_into_a_gap_has_truly_ended():
    one = task("rodent_run_gaps", renderer="egl", image_size=8)
    one.env.task._terminate_at_height = 10.0  # everything is below that
    reward, discount, terminated, truncated, sane = one.step(np.zeros(38, np.float32))
    assert (discount, terminated, truncated, sane) == (0.0, True, False, True)


def test_locomotion_without_opengl_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "disabled")
    with pytest.raises(ValueError, match="^rodent_run_gaps needs OpenGL: renderer egl or osmesa$"):
        task("rodent_run_gaps")


@pytest.mark.parametrize(
    ("cores", "n", "workers", "count"),
    [(1, 1, None, 0), (2, 1, None, 1), (1, 2, None, 2), (2, 1, 0, 0)],
)
def test_an_environment_gets_a_process_where_there_is_a_core_for_it(
    monkeypatch, cores, n, workers, count
):
    from envs.dmc import env

    monkeypatch.setattr(env, "usable_cpus", lambda: cores)
    known = SimpleNamespace(num_envs=n, renderer="warp")
    assert env.DMCEnv._processes(known, workers) == count


def test_jitter_changes_pictures_and_nothing_else():
    plain, moved = task("walker_walk"), task("walker_walk", camera_jitter=0.1, colour_jitter=0.3)
    rows = slice(-12 - 6 * plain.model.nlight, -6 * plain.model.nlight)  # the camera's pose
    extent, views = plain.model.stat.extent, []
    for _ in range(20):
        shift = moved.view()[rows][:3] - plain.view()[rows][:3]
        turn = moved.view()[rows][3:].reshape(3, 3) @ plain.view()[rows][3:].reshape(3, 3).T
        angle = np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))
        assert np.abs(shift).max() <= 0.1 * extent + 1e-5 and 0 < angle <= 0.1 * 3**0.5 + 1e-3
        views.append(moved.view())
        assert np.array_equal(plain.env.physics.get_state(), moved.env.physics.get_state())
        plain.begin(), moved.begin()
    assert len({view[-100:].tobytes() for view in views}) == 20
    assert not np.array_equal(plain.model.mat_rgba, moved.model.mat_rgba)
    assert np.array_equal(plain.model.mat_rgba[:, 3], moved.model.mat_rgba[:, 3])


def test_cameras_by_name_and_number():
    assert task("walker_walk", camera="back").camera == task("walker_walk", camera=1).camera == 1
    assert task("walker_walk", camera="1").camera == 1
    for wrong in ("front", 2, -1):
        with pytest.raises(
            ValueError, match=f"walker_walk has no camera {wrong!r}; 0 to 1 are side, back"
        ):
            task("walker_walk", camera=wrong)


def test_versions_that_do_not_work_together_are_told():
    worker.check_versions({"dm-control": "1.0.50", "mujoco": "3.17.0"})
    worker.check_versions({"dm-control": "1.0.51", "mujoco": "4.0.1"})  # not ours to judge
    with pytest.raises(
        ImportError,
        match=r"works with mujoco 3\.17\.0, and mujoco 4\.0\.0 is installed: pip install",
    ):
        worker.check_versions({"dm-control": "1.0.50", "mujoco": "4.0.0"})


# ----------------------------------------------------------------------------------------------- the environment -----
def test_contract():
    env = make("cheetah_run", 3, frame_stack=2)
    obs, rewards, terminations, truncations, info = env.step(actions(3, 6))
    assert (
        env.image_shape == (24, 24, 6)
        and obs["rgb"].shape == (3, 24, 24, 6)
        and obs["rgb"].dtype == torch.uint8
    )
    assert (
        obs["state"].shape == (3, env.state_dim) == (3, 0)
        and env.action_dim == 6
        and not env.has_success
    )
    assert rewards.dtype == torch.float32 and not terminations.any() and not truncations.any()
    assert (
        info["discount"].tolist() == [1, 1, 1]
        and not info["success"].any()
        and int(env.nan_resets) == 0
    )
    assert torch.equal(info["final_obs"]["rgb"], obs["rgb"]) and 0 < obs["rgb"].float().mean() < 255
    assert (
        env.max_episode_steps == 500
        and env.control_hz == pytest.approx(50)
        and env.action_repeat == 2
    )
    assert env.spec["renderer"] == "warp" and env.spec["camera"] == "side"
    env.close()


def test_episodes_end_and_begin_anew():
    env = make("reacher_easy", 2, frame_stack=2)
    end_soon(env, 3)
    total = torch.zeros(2)
    for t in range(3):
        last = env.obs["rgb"]
        obs, rewards, terminations, truncations, info = env.step(actions(2, 2, t))
        total += rewards
        assert truncations.tolist() == [t == 2] * 2 and not terminations.any()
    assert torch.allclose(info["episode"]["return"], total) and info["episode"][
        "length"
    ].tolist() == [3, 3]
    rgb = obs["rgb"]
    assert torch.equal(rgb[..., :3], rgb[..., 3:])  # the first frame, repeated
    assert torch.equal(
        info["final_obs"]["rgb"][..., :3], last[..., 3:]
    )  # while the last observation goes on
    assert not torch.equal(info["final_obs"]["rgb"], rgb)
    *_, info = env.step(actions(2, 2))
    assert info["episode"]["length"].tolist() == [1, 1]
    first = env.reset(5)["rgb"]
    assert torch.equal(env.reset(5)["rgb"], first) and not torch.equal(env.reset(6)["rgb"], first)
    assert not torch.equal(first[0], first[1])
    env.close()


def test_a_world_that_diverges_is_restarted_alone():
    env = make(n=2)
    before = env.obs["rgb"]
    broken = env.groups[0].group.tasks[1]
    env.step(actions(2, 1))
    before, whole = env.obs["rgb"], broken.env
    broken.env = SimpleNamespace(step=Script([None]).step, reset=whole.reset, physics=whole.physics)
    obs, rewards, terminations, truncations, info = env.step(actions(2, 1))
    assert truncations.tolist() == [False, True] and not terminations.any() and rewards[1] == 0
    assert int(env.nan_resets) == 1 and torch.equal(info["final_obs"]["rgb"][1], before[1])
    assert torch.equal(info["final_obs"]["rgb"][0], obs["rgb"][0]) and not torch.equal(
        obs["rgb"][1], before[1]
    )
    env.close()


def test_a_true_end_is_a_termination_and_hands_its_discount_on():
    env = make(n=3)
    for _ in range(10):
        env.step(torch.ones(3, 1))  # away from where an episode begins
    first, begun = env.obs["rgb"][0].clone(), []
    for k, frames in (
        (0, [(1.0, 1.0, False), (2.0, 0.0, True)]),
        (1, [(1.0, 0.5, False), (2.0, 0.5, False)]),
    ):
        one = env.groups[0].group.tasks[k]
        whole, begin = one.env, one.begin
        one.env = SimpleNamespace(
            step=Script(frames).step, reset=whole.reset, physics=whole.physics
        )
        one.begin = lambda *_, k=k, begin=begin: (begun.append(k), begin())[1]
    obs, rewards, terminations, truncations, info = env.step(actions(3, 1))
    assert terminations.tolist() == [True, False, False] and not truncations.any() and begun == [0]
    assert info["discount"].tolist() == [0.0, 0.25, 1.0] and rewards[:2].tolist() == [3.0, 2.0]
    assert torch.equal(info["final_obs"]["rgb"][0], first) and not torch.equal(obs["rgb"][0], first)
    assert info["episode"]["length"].tolist() == [11] * 3 and int(env.nan_resets) == 0
    env.close()


def test_actions_of_another_shape_are_refused():
    env = make("cheetah_run", 2)
    with pytest.raises(ValueError, match=r"actions must be \(2, 6\), not \(1, 6\)"):
        env.step(actions(1, 6))
    env.close()


def test_staggered_worlds_do_not_end_together():
    env = make(n=4, stagger=True)
    assert [one.clock for one in env.groups[0].group.tasks] == [0, 125, 250, 375]
    env.reset()
    assert [one.clock for one in env.groups[0].group.tasks] == [0] * 4
    env.close()


def test_resume_is_exact(tmp_path):
    env, other = (
        make("cartpole_swingup", 2, frame_stack=3),
        make("cartpole_swingup", 2, frame_stack=3, seed=77),
    )
    end_soon(env, 4)
    for t in range(7):  # into the second episode
        env.step(actions(2, 1, t))
    torch.save(env.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    other.load_state_dict(saved)
    end_soon(env, 3), end_soon(other, 3)
    for t in range(5):
        a, b = env.step(actions(2, 1, t)), other.step(actions(2, 1, t))
        assert (
            torch.equal(a[0]["rgb"], b[0]["rgb"])
            and torch.equal(a[1], b[1])
            and torch.equal(a[3], b[3])
        )
        assert torch.equal(a[4]["episode"]["return"], b[4]["episode"]["return"])
    with pytest.raises(ValueError, match="saved environment has num_envs 2, this one has 1"):
        make(n=1).load_state_dict(saved)
    env.close(), other.close()


def test_processes_give_what_one_process_gives_and_a_dead_one_is_told():
    here, there = make("pendulum_swingup", 3), make("pendulum_swingup", 3, workers=2)
    alone = make(
        "pendulum_swingup", 1, workers=2
    )  # as the evaluation's one environment beside several in training
    assert len(alone.groups) == 1
    alone.close()
    assert [len(share) for share in there.shares] == [1, 2]
    for t in range(3):
        a, b = here.step(actions(3, 1, t)), there.step(actions(3, 1, t))
        assert torch.equal(a[0]["rgb"], b[0]["rgb"]) and torch.equal(a[1], b[1])
    other = make("pendulum_swingup", 3)
    other.load_state_dict(there.state_dict())
    assert torch.equal(other.step(actions(3, 1))[0]["rgb"], there.step(actions(3, 1))[0]["rgb"])
    processes = [group.process for group in there.groups]
    for process in processes:
        process.send_signal(signal.SIGINT)  # Ctrl-C belongs to the parent
    assert torch.equal(other.step(actions(3, 1))[1], there.step(actions(3, 1))[1])
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError,
        match=r"the process of pendulum_swingup number 1, 2 has ended \(signal SIG",
    ):
        there.step(actions(3, 1))
    there.close()
    assert [process.poll() for process in processes] == [0, -signal.SIGKILL]
    here.close(), other.close()


def test_errors_cross_from_a_process_in_one_line():
    with pytest.raises(ValueError, match="^unknown DeepMind Control task 'walker'; did you mean"):
        make("walker", 2, workers=1)


@pytest.mark.parametrize(("options", "line"), [
    (dict(n=0), "num_envs must be at least 1"),
    (dict(workers=-1), "workers must not be negative; got -1"),
    (dict(frame_stack=0), "action_repeat and frame_stack"),
    (dict(renderer="vulkan"), "unknown renderer 'vulkan'; there are egl, osmesa, warp and auto"),
    (dict(fast_render=True), "fast_render is for OpenGL"),
    (dict(colour_jitter=2.0), "colour_jitter from 0 to 1"),
    (dict(samples_per_pixel=3), "must be a square"),
    (dict(env_id="quadruped_escape"), "cannot draw a terrain"),
])  # fmt: skip
def test_impossible_options_are_told_in_one_line(options, line):
    with pytest.raises(ValueError, match=line):
        make(**options)


# ------------------------------------------------------------------------------------------------------ renderers ----
def test_choice_of_renderer(monkeypatch, capsys):
    working = {"osmesa", "warp"}
    monkeypatch.setattr(
        processes, "_works", lambda name: check.Result(name in working, f"about {name}")
    )
    choose = dmc.choose_renderer.__wrapped__
    assert choose("auto") == "osmesa"
    assert capsys.readouterr().out == "renderer: osmesa (about osmesa); not egl: about egl\n"
    assert (
        choose("auto", cuda=True) == "osmesa"
        and "software, renderer 'warp' would" in capsys.readouterr().out
    )
    assert choose("warp", "osmesa") == "warp" and choose("auto", "osmesa") == "osmesa"
    with pytest.raises(
        RuntimeError, match=r"egl: about egl.*apt-get install libegl1 libgl1-mesa-dri, or use warp"
    ):
        choose("auto", "egl")  # what the user has set is taken at its word
    working.clear()
    with pytest.raises(RuntimeError, match="no image can be drawn here"):
        choose("auto")


@egl
def test_renderers_draw_the_same_scene():
    """Mean difference over an image, of 255; the images of another moment, and of a hidden robot, differ by more."""
    from envs.dmc import warp_renderer

    limits = {"cartpole_swingup": 5, "walker_walk": 10, "cup_catch": 6, "reach_duplo": 9}
    for env_id, limit in limits.items():
        gl = task(env_id, renderer="egl", image_size=64)
        scene = warp_renderer.Scene(gl.model, worker.slots(gl.model), gl.camera, 1, "cpu", 64)
        picture, drawn = (
            gl.view().astype(float),
            scene.draw(gl.things()[None])[0].numpy().astype(float),
        )
        assert picture.shape == drawn.shape == (64, 64, 3) and picture.std() > 5
        assert np.abs(picture - drawn).mean() < limit
        # Shapes too, not only brightness: the images agree better as they stand than shifted by two pixels.
        shifted = np.abs(picture[:, 2:] - drawn[:, :-2]).mean()
        assert np.abs(picture[:, 2:] - drawn[:, 2:]).mean() < shifted


@egl
def test_fast_render_keeps_the_scene_and_drops_the_shadows():
    plain, fast = (
        task("walker_walk", renderer="egl"),
        task("walker_walk", renderer="egl", fast_render=True),
    )
    a, b = plain.view().astype(float), fast.view().astype(float)
    assert 0.5 < np.abs(a - b).mean() < 15
    assert fast.image(200, 0).shape == (200, 200, 3)
    with pytest.raises(
        ValueError, match="an image of 300 pixels a side is too large here: OpenGL has room for 256"
    ):
        fast.image(300, 0)
    assert task("pendulum_swingup", renderer="egl", image_size=700).view().shape == (
        700,
        700,
        3,
    )  # above MuJoCo's 480


@egl
def test_opengl_environments_here_and_in_a_process_agree():
    here = make("cartpole_balance", 1, renderer="egl", workers=0, fast_render=True)
    there = make("cartpole_balance", 1, renderer="egl", workers=1, fast_render=True)
    assert isinstance(here.groups[0], processes.Here) and isinstance(
        there.groups[0], processes.Process
    )
    a, b = here.step(actions(1, 1)), there.step(actions(1, 1))
    assert torch.equal(a[0]["rgb"], b[0]["rgb"]) and torch.equal(a[1], b[1])
    assert np.array_equal(here.render((0,), 100), there.render((0,), 100))
    here.close(), there.close()


def test_a_batch_is_drawn_as_its_worlds_alone():
    """Warp's scene has as many places as environments: fewer and more images than that are drawn as well."""
    from envs.dmc import warp_renderer

    tasks = [task("reacher_easy", seed=seed) for seed in range(5)]
    things = np.stack([one.view() for one in tasks])
    slots, model = worker.slots(tasks[0].model), tasks[0].model
    two, one = (warp_renderer.Scene(model, slots, 0, n, "cpu", 24, 1) for n in (2, 1))
    pictures = two.draw(things)
    assert pictures.shape == (5, 24, 24, 3) and len({p.numpy().tobytes() for p in pictures}) == 5
    for k in range(5):
        assert torch.equal(pictures[k], one.draw(things[k : k + 1])[0])


def test_pictures_for_people_from_any_camera():
    env = make("walker_walk", 2)
    side, back = env.render((1, 0), size=40), env.render((1, 0), size=40, camera="back")
    assert side.shape == (2, 40, 40, 3) and not np.array_equal(side, back)
    assert np.array_equal(
        env.render((1,), size=40, camera="third"), side[:1]
    )  # unknown elsewhere: the policy's own
    env.close()
