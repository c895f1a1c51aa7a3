"""The SO-101 task set: geometry and physics against closed forms, episodes, randomisation, exact resume."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

mujoco = pytest.importorskip("mujoco", reason='needs MuJoCo: pip install -e ".[so101]"')
pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')
import mujoco_warp as mjw  # noqa: E402

from envs import so101  # noqa: E402
from envs.so101 import render  # noqa: E402


def actions(n, seed=0):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(env_id="SO101ReachCube-v1", n=2, **options):
    return so101.make(
        env_id, n, "cpu", **({"seed": 0, "stagger": False, "samples_per_pixel": 1} | options)
    )


def put(env, name, xyz, world=0):
    """Moves a free object of one environment and updates poses."""
    adr = env._q[name]
    env.qpos[world, adr : adr + 3] = torch.tensor(xyz)
    env.qpos[world, adr + 3 : adr + 7] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    env._kinematics()


def test_eight_tasks():
    assert set(so101.TASKS) == {
        f"SO101{v}{o}-v1" for v in ("Reach", "Lift", "Place", "Stack") for o in ("Cube", "Can")
    }


@pytest.mark.parametrize("env_id", list(so101.TASKS))
def test_contract(env_id):
    env = make(env_id, 3, asymmetric=True, cameras=("wrist", "third"))
    obs, rewards, terminations, truncations, info = env.step(actions(3))
    assert (
        env.image_shape == (16, 16, 6)
        and obs["rgb"].shape == (3, 16, 16, 6)
        and obs["rgb"].dtype == torch.uint8
    )
    assert obs["state"].shape == (3, env.state_dim) and obs["privileged"].shape == (
        3,
        env.privileged_dim,
    )
    assert (
        rewards.shape == (3,)
        and rewards.isfinite().all()
        and not terminations.any()
        and not truncations.any()
    )
    assert info["success"].dtype == torch.bool and set(info["final_obs"]) == set(obs)
    assert all(torch.equal(info["final_obs"][k], obs[k]) for k in obs)
    assert 0 < obs["rgb"].float().mean() < 255
    assert (
        env.spec["joint_names"] == list(so101.JOINTS)
        and len(env.spec["state_layout"]) == env.state_dim
    )


def test_cube_lands_on_the_expected_pixels():
    """A pinhole camera with vertical field of view f that looks along -z maps a point (x, y, z) of its frame to
    the pixel column (1 + x / (-z tan(f/2))) size / 2, and to the row with y negated.
    """
    size = 64
    env = make(n=1, render_size=size, cameras=("third",), domain_randomization=False)
    camera = env.mjm.camera("third")
    turn = np.zeros(9)
    mujoco.mju_quat2Mat(turn, camera.quat)
    for place in ((0.30, 0.0, 0.0125), (0.25, -0.08, 0.0125), (0.35, 0.07, 0.2)):
        put(env, "item", place)
        x, y, z = turn.reshape(3, 3).T @ (np.array(place) - camera.pos)
        scale = -z * math.tan(math.radians(60.0) / 2)
        column, row = (1 + x / scale) * size / 2, (1 - y / scale) * size / 2
        rgb = env.scene.draw()[0].float()
        red = (
            (rgb[..., 0] > 60)
            & (rgb[..., 1] < 0.4 * rgb[..., 0])
            & (rgb[..., 2] < 0.4 * rgb[..., 0])
        )
        rows, columns = torch.nonzero(red, as_tuple=True)
        assert abs((columns.float().mean() + 0.5).item() - column) < 1.0
        assert abs((rows.float().mean() + 0.5).item() - row) < 1.0
        # A face of edge a at distance d covers (size a / (2 d tan(f/2)))^2 pixels; a turned cube shows more of them.
        face = (size * 0.025 / (2 * scale)) ** 2
        assert face * 0.8 < len(rows) < face * 2.4


def test_samples_per_pixel_is_the_area_mean_of_a_finer_picture():
    coarse = make(n=2, render_size=16, samples_per_pixel=16)
    fine = make(n=2, render_size=64, samples_per_pixel=1)
    mean = fine.obs["rgb"].double().unflatten(1, (16, 4)).unflatten(3, (16, 4)).mean((2, 4))
    assert torch.equal(fine.qpos, coarse.qpos)
    assert (coarse.obs["rgb"].double() - mean).abs().max() <= 0.51


def test_joint_frames_reach_where_the_published_arm_reaches():
    """At zero angles the upper arm stands upright and the forearm points forward: heights and reaches of the chain."""
    env = make(n=1)
    env.qpos[:, :6] = 0
    env._kinematics()
    body = lambda name: env.scene.xpos[0, env.mjm.body(name).id].tolist()  # noqa: E731
    assert body("upper_arm") == pytest.approx([0.0388 + 0.0304, -0.0183, 0.0624 + 0.0542], abs=1e-3)
    assert body("lower_arm") == pytest.approx([0.0692 + 0.028, -0.0183, 0.1166 + 0.11257], abs=1e-3)
    assert body("wrist") == pytest.approx([0.0972 + 0.1349, -0.0183, 0.2292 + 0.0052], abs=1e-3)


def test_servos_have_the_torque_of_real_ones():
    env = make(n=1)
    assert (env.mjm.actuator_forcerange[:5] == [-3.0, 3.0]).all()
    assert (env.mjm.actuator_forcerange[5] == [-1.5, 1.5]).all()
    assert env.mjm.jnt_range[5, 1] == pytest.approx(2.0944, abs=1e-3)


def test_targets_do_not_wind_up_beyond_the_limits():
    env = make(n=2, images=False)
    up = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0])  # away from the table
    for _ in range(48):
        env.step(up.expand(2, 6))
    most = torch.where(
        up > 0, env.joint_high - so101.JOINT_MARGIN, env.joint_low + so101.JOINT_MARGIN
    )
    assert torch.allclose(env.target, most.expand(2, 6), atol=1e-6)
    before = env.target.clone()
    env.step(-up.expand(2, 6))
    assert torch.allclose(env.target, before - up * env.action_scale, atol=1e-6)


def test_targets_do_not_wind_up_in_front_of_an_obstacle():
    env = make(n=4, images=False, domain_randomization=False)
    down = torch.zeros(4, 6)
    down[:, 1] = 1.0
    for _ in range(14):
        env.step(down)
    assert env.facts()["table"].all()  # the arm stands on it
    ahead = env.target[:, 1] - env.qpos[:, 1]
    free = 14 * env.action_scale[1] - (env.qpos[:, 1] - env.first_qpos[:, 1])
    assert (
        (free > 0.5).all()
        and (ahead < so101.TRACKING_ERROR[1] + 0.05).all()
        and (ahead > 0.25).all()
    )


@pytest.mark.parametrize("env_id", ["SO101PlaceCan-v1", "SO101StackCube-v1"])
def test_randomised_models_agree_with_mujocos_own_constants(env_id):
    """Sizes and masses are written with the constants that MuJoCo derives from them; mj_setConst derives them anew."""
    env = make(env_id, 4, engine="mujoco")
    for model in env.physics.models:
        names = ("body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0")
        mine = {name: np.array(getattr(model, name)) for name in names}
        mujoco.mj_setConst(model, mujoco.MjData(model))
        bodies = [model.body(name).id for name in ("item", "support")]
        dofs = slice(6, 18)
        for name in names:
            rows = bodies if name.startswith("body") else dofs
            np.testing.assert_allclose(
                mine[name][rows], np.array(getattr(model, name))[rows], rtol=2e-4, err_msg=name
            )


def test_inertia_of_the_bin_by_quadrature():
    env = make("SO101PlaceCube-v1", 1)
    body, m = env.mjm.body("support").id, env.physics.models[0]
    points, masses = [], []
    for part in ("floor", "x+", "x-", "y+", "y-"):
        geom = m.geom("support" + part)
        grid = [np.linspace(-1, 1, 41)[1::2] * half for half in geom.size]  # 20 midpoints an axis
        xyz = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3) + geom.pos
        points.append(xyz)
        masses.append(np.full(len(xyz), so101.BIN_DENSITY * 8 * geom.size.prod() / len(xyz)))
    xyz, mass = np.concatenate(points), np.concatenate(masses)
    factor = m.body_mass[body] / mass.sum()
    assert 0.8 <= factor <= 1.2
    assert np.abs(mass @ xyz / mass.sum()).max() < 1e-6  # the frame is the centre of mass
    square = (xyz**2 * (mass * factor)[:, None]).sum(0)
    np.testing.assert_allclose(m.body_inertia[body], square.sum() - square, rtol=5e-3)


@pytest.mark.parametrize(
    "env_id", ["SO101LiftCube-v1", "SO101PlaceCan-v1", "SO101StackCube-v1", "SO101StackCan-v1"]
)
def test_objects_rest_where_they_spawn(env_id):
    env = make(env_id, 300, images=False)
    before, first_tcp = {name: env.pose(name)[0].clone() for name in env._q}, env.tcp.clone()
    away = torch.zeros(300, 6)
    away[:, 1] = -1.0  # the arm lifts off, so that it cannot touch them
    for _ in range(15):
        env.step(away)
    clear = torch.ones(300, dtype=torch.bool)  # tall cans can stand where the gripper starts
    for name in before:
        clear &= (before[name] - first_tcp)[:, :2].norm(dim=1) > 0.11
    for name, place in before.items():
        assert (env.pose(name)[0] - place)[clear].norm(dim=1).max() < 1e-3, name
    facts = env.facts()
    assert (
        clear.sum() > 10 and not facts["touching"][clear].any() and not facts["lifted"][clear].any()
    )


@pytest.mark.parametrize(
    "env_id, apart",  # metres: the largest radii, as published, and 1 cm around each
    [
        ("SO101PlaceCube-v1", 0.014 + math.hypot(0.045, 0.055) + 0.02),
        ("SO101PlaceCan-v1", 0.019 + math.hypot(0.045, 0.055) + 0.02),
        ("SO101StackCube-v1", 0.014 + 0.0175 + 0.02),
        ("SO101StackCan-v1", 0.014 + 0.019 + 0.02),
    ],
)
def test_spawn_region_and_distance(env_id, apart):
    env = make(env_id, 500, images=False)
    item, support = env.pose("item")[0], env.pose("support")[0]
    for xyz in (item, support):
        assert (
            (xyz[:, 0] >= 0.2).all() and (xyz[:, 0] <= 0.4).all() and (xyz[:, 1].abs() <= 0.1).all()
        )
    gap = (item - support)[:, :2].norm(dim=1)
    assert (gap >= apart - 1e-5).all()
    assert (gap <= apart + 0.02).any() and gap.max() > 0.15  # near and far both occur


def test_same_seed_same_episode_and_reset_repeats_it():
    one, two = make(n=4, seed=5), make(n=4, seed=5)
    first = [t.clone() for t in (one.qpos, one.obs["rgb"], one.obs["state"])]
    for i in range(55):
        a = actions(4, i)
        obs_one, reward_one, *_ = one.step(a)
        obs_two, reward_two, *_ = two.step(a)
    assert torch.equal(reward_one, reward_two) and all(
        torch.equal(obs_one[k], obs_two[k]) for k in obs_one
    )
    obs = one.reset(seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(first, (one.qpos, obs["rgb"], obs["state"]), strict=True)
    )
    assert not torch.equal(make(n=4, seed=6).qpos, first[0])


def test_clocks_are_staggered_and_the_final_observation_is_kept():
    env = make(n=50, stagger=True, seed=1)
    assert sorted(env.clock.tolist()) == list(range(50))
    lengths = []
    for i in range(60):
        previous = env.obs
        obs, rewards, _, truncations, info = env.step(actions(50, i))
        assert truncations.sum() == 1
        done = truncations.nonzero().item()
        lengths.append(info["episode"]["length"][done].item())
        assert not torch.equal(info["final_obs"]["state"][done], obs["state"][done])
        assert (
            obs["state"][done, 6:] - env.start_pose
        ).abs().max() < 0.1  # the new episode's targets
        others = torch.arange(50) != done
        assert torch.equal(info["final_obs"]["rgb"][others], obs["rgb"][others])
        assert previous is not obs
    assert lengths[0] == 1 and lengths[49] == 50 and set(lengths[50:]) == {50}


def test_first_frame_is_drawn_from_the_new_episodes_camera():
    """The same state drawn again by the full scene gives the same first frame as the small scene that drew it."""
    env = make(n=50, stagger=True)
    assert env.small is not None
    obs, _, _, truncations, _ = env.step(actions(50))
    done = truncations.nonzero().item()
    env._kinematics()
    assert torch.equal(env.scene.draw()[done], obs["rgb"][done])


def test_return_and_success_are_those_of_the_episode():
    env, total = make(n=2, images=False), torch.zeros(2)
    for i in range(50):
        _, rewards, _, truncations, info = env.step(actions(2, i))
        total += rewards
    assert truncations.all() and torch.allclose(info["episode"]["return"], total, atol=1e-5)
    assert (info["episode"]["length"] == 50).all()
    assert (env.returns == 0).all()


def test_randomisation_varies_and_one_switch_turns_it_off():
    on, off = make(n=64, images=False), make(n=64, images=False, domain_randomization=False)
    for name in (
        "geom_size",
        "geom_rgba",
        "geom_friction",
        "body_mass",
        "actuator_gainprm",
        "cam_pos",
        "cam_quat",
        "cam_fovy",
        "light_ambient",
        "light_diffuse",
        "light_dir",
    ):
        assert on.fields[name].std(0).max() > 1e-7, name
        assert off.fields[name].std(0).max() < 1e-6, name
    assert on.item_half.min() >= 0.011 and on.item_half.max() <= 0.014
    assert len(on.delay.unique()) > 1 and (off.delay == 0).all()
    assert (on.fields["cam_fovy"] - on.nominal["cam_fovy"])[
        :, env_camera(on, "wrist")
    ].abs().max() <= 1.0
    noise = on.obs["state"][:, :6] - on.qpos[:, :6]
    assert 0.06 < noise.std() < 0.12 and torch.equal(off.obs["state"][:, :6], off.qpos[:, :6])


def env_camera(env, name):
    return env.mjm.camera(name).id


def test_action_delay_holds_the_old_target():
    ranges = so101.Randomization(action_delay=(0.1, 0.1))
    late = make(n=1, randomization=ranges, images=False)
    none = make(n=1, randomization=so101.Randomization(action_delay=(0.0, 0.0)), images=False)
    move = torch.zeros(1, 6)
    move[:, 0] = 1.0
    starts = [env.qpos[0, 0].item() for env in (late, none)]
    for env in (late, none):
        env.step(move)
    assert (
        abs(late.qpos[0, 0].item() - starts[0]) < 0.01 < 0.03 < none.qpos[0, 0].item() - starts[1]
    )


@pytest.mark.parametrize("env_id", so101.TASKS)
def test_rewards_and_success_are_the_authors(env_id):
    """The same states as the authors' own code saw (tests/golden/make_so101_rewards.py, their commit a5c3083)."""
    golden = np.load(Path(__file__).with_name("golden") / "so101_rewards.npz")
    kept = {
        key.removeprefix(env_id + "/"): torch.from_numpy(golden[key])
        for key in golden.files
        if key.startswith(env_id)
    }
    env = make(env_id, len(kept["reward"]), images=False)
    for name in ("qpos", "qvel", "target", "item_half", "support_half", "support_z"):
        getattr(env, name).copy_(kept[name])
    env.contact.zero_()
    for i, name in enumerate(("fixed_item", "jaw_item", "hand_table", "hand_support")):
        if name in env._sensor:
            env.contact[:, env._sensor[name] + 1 :][:, :3] = kept["contact"][:, i]
    env._kinematics()
    best = {"reach": 4, "lift": 3, "place": 10, "stack": 9}[env.task.verb]
    reward, success = env.reward()
    theirs, succeeded = kept["reward"], kept["success"]
    assert success.sum() >= 5
    same = torch.ones_like(success)
    if env.task.verb == "place":  # ours must rest on the floor, and is worth a point more
        same = success == succeeded
        assert not (success & ~succeeded).any()
        theirs = theirs + success.float()
    torch.testing.assert_close(reward[same] * best, theirs[same], rtol=0, atol=2e-5)
    assert torch.equal(success[same], succeeded[same]) and same.float().mean() > 0.8


def test_success_tests():
    env = make("SO101PlaceCube-v1", 1, domain_randomization=False, images=False)
    put(env, "support", (0.3, 0.0, env.support_z[0].item()))
    inside = so101.BIN_THICKNESS + env.item_half[0, 2].item()
    yaw = env._q["support"]
    for angle, x, y, z, expected in (
        (0.0, 0.0, 0.0, inside, True),
        (0.0, 0.045, 0.0, inside, False),  # over the wall: the bin is 80 mm wide
        (0.0, 0.0, 0.045, inside, True),  # ... but 100 mm long
        (math.pi / 2, 0.045, 0.0, inside, True),  # turned by 90 degrees, the long side lies along x
        (math.pi / 2, 0.0, 0.045, inside, False),
        (0.0, 0.0, 0.0, inside + 0.03, False),  # hovering over the floor
    ):
        put(env, "item", (0.3 + x, y, z))
        env.qpos[0, yaw + 3], env.qpos[0, yaw + 6] = math.cos(angle / 2), math.sin(angle / 2)
        env.qvel.zero_(), env.contact.zero_()
        reward, success = env.reward()
        assert bool(success[0]) is expected, (angle, x, y, z)
        assert (
            reward.item() == 1.0
        ) is expected  # success is worth strictly more than anything before it


def test_stack_success_needs_height_and_release():
    env = make("SO101StackCube-v1", 1, domain_randomization=False, images=False)
    put(env, "support", (0.3, 0.0, 0.015))
    for dx, dz, touch, expected in (
        (0, 0, 0, True),
        (0.03, 0, 0, False),
        (0, 0.02, 0, False),
        (0, 0, 1.0, False),
    ):
        put(env, "item", (0.3 + dx, 0.0, 0.03 + 0.0125 + dz))
        env.qvel.zero_(), env.contact.zero_()
        env.contact[0, env._sensor["jaw_item"] + 1] = touch
        assert bool(env.reward()[1][0]) is expected


def test_a_diverged_world_restarts_alone():
    env = make(n=4, engine="mujoco")
    env.step(actions(4))
    env.physics.state[2, 1 + 3] = np.nan
    obs, rewards, _, truncations, info = env.step(actions(4))
    assert truncations.tolist() == [False, False, True, False] and int(env.nan_resets) == 1
    assert rewards[2] == 0 and rewards.isfinite().all()
    assert torch.equal(env.qpos[2], env.first_qpos[2]) and all(
        v.float().isfinite().all() for v in obs.values()
    )
    for i in range(3):
        env.step(actions(4, i))
    assert int(env.nan_resets) == 1 and env.qpos.isfinite().all()


@pytest.mark.parametrize(("buffer", "kind"), [("CONTACTS", "NARROWPHASE"), ("CONSTRAINTS", "NEFC")])
def test_contacts_that_do_not_fit_stop_a_run_in_one_line(buffer, kind, monkeypatch, capfd):
    monkeypatch.setattr(render, buffer, 4)
    env = make("SO101LiftCube-v1", 4, engine="warp", images=False)
    down = torch.zeros(4, 6)
    down[:, 1] = 1.0
    with pytest.raises(ValueError, match=f"left out .*{kind}.*raise CONTACTS and CONS") as error:
        for _ in range(so101.HORIZON):
            env.step(down)
    assert "\n" not in str(error.value) and "overflow" not in capfd.readouterr().out


def test_a_rare_contact_that_does_not_fit_is_reported_once():
    """Two of 4 x 500 environment steps; solver iterations, which MuJoCo Warp prints of by itself, do not count."""
    env = make("SO101LiftCube-v1", 4, engine="warp", images=False)
    nefc, solver = int(mjw.OverflowType.NEFC), int(mjw.OverflowType.ITERATIONS)
    for bits in ([nefc, 0, nefc, solver], [solver] * 4):
        env.scene.d.overflow.assign(bits)
        env.step(torch.zeros(4, 6))
        assert not env.scene.d.overflow.numpy().any()
    env.physics.steps = 500
    with pytest.warns(UserWarning, match="in 2 of 2000 environment steps .NEFC.: it has memory"):
        env.physics.check_left_out()
    with warnings.catch_warnings(action="error"):
        env.physics.check_left_out()  # nothing new
    env.physics.steps = 499
    env.physics.t_left_out[0] += 1
    with pytest.raises(ValueError, match="in 3 of 1996"):
        env.physics.check_left_out()


@pytest.mark.parametrize("engine", ["mujoco", "warp"])
def test_resume_is_exact(engine, tmp_path):
    n = 4
    one = make("SO101PlaceCan-v1", n, engine=engine, stagger=True, asymmetric=True)
    for i in range(8):
        one.step(actions(n, i))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    other = make("SO101PlaceCan-v1", n, engine=engine, stagger=True, asymmetric=True, seed=99)
    other.load_state_dict(saved)
    for i in range(20):
        obs, rewards, _, truncations, _ = one.step(actions(n, 100 + i))
        obs2, rewards2, _, truncations2, _ = other.step(actions(n, 100 + i))
        assert torch.equal(rewards, rewards2) and torch.equal(truncations, truncations2)
        assert all(torch.equal(obs[k], obs2[k]) for k in obs)


def test_the_two_engines_agree():
    """MuJoCo Warp computes in float32 with its own collision code: free motion agrees closely."""
    c, w = (make("SO101LiftCube-v1", 4, engine=e, images=False) for e in ("mujoco", "warp"))
    assert torch.equal(c.qpos, w.qpos)
    for i in range(10):
        a = actions(4, i) * torch.tensor([1.0, -0.2, -0.2, 1.0, 1.0, 1.0])
        c.step(a), w.step(a)
    assert (c.qpos[:, :6] - w.qpos[:, :6]).abs().max() < 5e-3
    assert (c.pose("item")[0] - w.pose("item")[0]).abs().max() < 2e-3
    assert torch.allclose(c.tcp, w.tcp, atol=3e-3)


def test_a_robot_on_the_table_is_felt_by_both_engines():
    for engine in ("mujoco", "warp"):
        env = make("SO101LiftCube-v1", 8, engine=engine, images=False)
        down = torch.zeros(8, 6)
        down[:, 1] = 1.0
        assert not env.facts()["table"].any()
        for _ in range(12):
            env.step(down)
        assert env.facts()["table"].float().mean() > 0.7, engine


def test_privileged_state_is_the_truth_and_the_policy_never_sees_it():
    env = make("SO101StackCan-v1", 3, asymmetric=True)
    assert torch.equal(env.obs["privileged"][:, :6], env.qpos[:, :6])
    assert torch.allclose(env.obs["privileged"][:, 15:18], env.pose("item")[0])
    assert env.obs["state"].shape[1] == 12 and "privileged" not in make("SO101StackCan-v1", 3).obs


def test_render_changes_nothing(tmp_path):
    env = make(n=3)
    before = env.state_dict()
    frames = env.render(which=(0, 2), size=64, camera="person")
    assert frames.shape == (2, 64, 64, 3) and frames.dtype == np.uint8 and frames.std() > 10
    after = env.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])


def test_upstream_meshes_replace_what_is_drawn(tmp_path):
    (tmp_path / "assets").mkdir()
    corners = np.array([[0, 0, 0], [0.05, 0, 0], [0, 0.05, 0], [0, 0, 0.05]], np.float32)
    faces = [(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)]
    record = np.zeros(4, np.dtype([("n", "<3f4"), ("v", "<9f4"), ("a", "<u2")]))
    record["v"] = [corners[list(f)].ravel() for f in faces]
    (tmp_path / "assets/part.stl").write_bytes(
        bytes(80) + np.uint32(4).tobytes() + record.tobytes()
    )
    (tmp_path / "so101_new_calib.xml").write_text(
        '<mujoco><compiler meshdir="assets"/><default><default class="visual"><geom type="mesh" contype="0"/></default>'
        '</default><asset><mesh file="part.stl"/></asset><worldbody><body name="base">'
        '<geom class="visual" type="mesh" mesh="part"/></body></worldbody></mujoco>'
    )
    ours, theirs = make(n=1), make(n=1, asset_dir=str(tmp_path))
    drawn = [g for g in range(theirs.mjm.ngeom) if theirs.mjm.geom_group[g] == 2]
    kinds = theirs.mjm.geom_type[drawn]
    assert (
        kinds == mujoco.mjtGeom.mjGEOM_MESH
    ).sum() == 1 and theirs.mjm.ngeom == ours.mjm.ngeom + 1
    with pytest.raises(FileNotFoundError, match="so101_new_calib.xml"):
        make(n=1, asset_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(env_id="SO101JuggleCube-v1"), "unknown SO-101 task"),
        (dict(n=0), "num_envs"),
        (dict(render_size=2), "render_size"),
        (dict(samples_per_pixel=3), "square"),
        (dict(cameras=("overhead",)), "cameras"),
        (dict(engine="bullet"), "engine"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)
