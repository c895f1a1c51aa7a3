"""What the Go1 is told: how often to stand and to turn on the spot, against sums done by hand."""

import itertools

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
pytest.importorskip("mujoco.mjx", reason='needs MJX: pip install -e ".[go1]"')
import jax.numpy as jnp  # noqa: E402

from envs import go1  # noqa: E402
from envs.go1 import task as terms  # noqa: E402
from envs.go1.env import Draws  # noqa: E402
from envs.go1.task import STANDS, TASKS, TURNS, EnvConfig  # noqa: E402

WALK, FIRST = TASKS["Go1JoystickFlat"], jnp.array([9.0, 9.0, 9.0])
STAND, TURN = (False, False, False), (False, False, True)  # which axes are not zero
AXES = list(itertools.product((False, True), repeat=3))


@pytest.fixture(scope="module")
def balanced():
    return go1.make("Go1JoystickFlat", "mujoco-c", 1, commands="balanced")


def test_the_published_commands_are_what_they_were():
    """The numbers of the version before there was a choice, to the bit. Not jitted: nothing is fused."""
    # fmt: off
    first = [[1.343000888824463, 0.7657278180122375, -0.4025004506111145],
             [-0.18410253524780273, 0.054004669189453125, -0.12979602813720703],
             [0.4223731756210327, 0.6409631371498108, -0.647918164730072]]
    later = [[9.0, 0.0, -0.4025004506111145], [-0.18410253524780273, 0.0, 9.0],
             [0.4223731756210327, 9.0, -0.647918164730072]]
    # fmt: on
    for seed in range(3):
        key, config = jax.random.PRNGKey(seed), EnvConfig()
        begun = terms.first_command(Draws(key, 16), WALK, config)
        np.testing.assert_array_equal(begun, np.float32(first[seed]))
        changed = terms.next_command(Draws(key, 16), FIRST, WALK, config)
        np.testing.assert_array_equal(changed, np.float32(later[seed]))


def chances(stands: float, turns: float) -> tuple[np.ndarray, np.ndarray]:
    """Of which axes are not zero: at the start (8,), and after a change, from each of them (8, 8).

    Published: all at the start; later each axis stays with probability 1/2, else it is not zero with
    probability 0.9, 0.25, 0.5.
    """
    start, change = np.zeros(8), np.ones((8, 8))
    start[AXES.index((True, True, True))] = 1.0
    for i, old in enumerate(AXES):
        for j, new in enumerate(AXES):
            for axis, kept in enumerate((0.9, 0.25, 0.5)):
                drawn = kept if new[axis] else 1.0 - kept
                change[i, j] *= 0.5 * (old[axis] == new[axis]) + 0.5 * drawn
    special = np.zeros(8)
    special[AXES.index(STAND)], special[AXES.index(TURN)] = stands, turns
    rest = 1.0 - stands - turns
    return rest * start + special, rest * change + special


def expected(stands: float, turns: float) -> dict:
    """Shares of an episode of 1,000 steps, a change in each with probability 1 / 250."""
    now, change = chances(stands, turns)
    time, changes = np.zeros(8), np.zeros((8, 8))
    for _ in range(1000):
        time += now / 1000
        changes += now[:, None] * change
        now = now + (now @ change - now) / 250
    stand, turn = AXES.index(STAND), AXES.index(TURN)
    begin = changes[stand, turn] / changes.sum()
    return {"stands": time[stand], "turns": time[turn], "from rest to turning": begin}


def drawn(env, robots: int = 4000) -> dict:
    """The same shares, of what the environment draws."""

    def first(key):
        draw = Draws(key, 16)
        return terms.first_command(draw, env.task, env.config), env._draw_command_time(draw)

    def step(carried, key):
        command, timer = carried
        keys = jax.random.split(key, robots)
        later = jax.vmap(lambda k, c, t: env._next_command(Draws(k, 16), c, t - 1))
        new, new_timer = later(keys, command, timer)
        was, now = command != 0, new != 0
        resting, turning = ~was.any(1), (now == jnp.array(TURN)).all(1)
        changed = timer <= 1
        sums = (
            resting.sum(),
            (was == jnp.array(TURN)).all(1).sum(),
            (changed & resting & turning).sum(),
            changed.sum(),
        )
        return (new, new_timer), sums

    keys = jax.random.split(jax.random.PRNGKey(1), 1000)
    start = jax.vmap(first)(jax.random.split(jax.random.PRNGKey(2), robots))
    _, sums = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys))(start, keys)
    stands, turns, begun, changes = (int(x.sum()) for x in sums)
    time = 1000 * robots
    return {"stands": stands / time, "turns": turns / time, "from rest to turning": begun / changes}


def test_shares_of_the_published_commands():
    """Standing 1.4 %, turning on the spot 2.0 % of the time; 0.17 % of changes begin a turn from rest."""
    wanted = expected(0.0, 0.0)
    assert list(wanted.values()) == pytest.approx([0.0141, 0.0198, 0.0017], abs=5e-5)
    measured = drawn(go1.make("Go1JoystickFlat", "mujoco-c", 1))
    assert list(measured.values()) == pytest.approx(list(wanted.values()), abs=2e-3)


def test_shares_of_the_balanced_commands(balanced):
    """About a tenth each, and ten times as many turns from rest."""
    wanted = expected(STANDS, TURNS)
    assert list(wanted.values()) == pytest.approx([0.0973, 0.1012, 0.0161], abs=5e-5)
    measured = drawn(balanced)
    assert list(measured.values()) == pytest.approx(list(wanted.values()), abs=6e-3)


def test_what_is_neither_stand_nor_turn_is_as_published():
    """From one key both rules give the same command wherever the balanced one does nothing special."""
    keys = jax.random.split(jax.random.PRNGKey(0), 5000)
    both = []
    for commands in ("published", "balanced"):
        config = EnvConfig(commands=commands)
        both.append(
            jax.vmap(lambda k, c=config: terms.next_command(Draws(k, 16), FIRST, WALK, c))(keys)
        )
    published, new = map(np.asarray, both)
    stands = ~new.any(1)
    turns = (new[:, :2] == 0).all(1) & ~stands
    same = (published == new).all(1)
    assert same[~stands & ~turns].all() and (np.abs(new[turns, 2]) <= 9).all()
    assert (~same).mean() == pytest.approx(STANDS + TURNS, abs=0.015)
    size = np.abs(new[turns & ~same, 2])  # a new rate, uniform in +-1.2
    assert size.max() < 1.2 and size.mean() == pytest.approx(0.6, abs=0.06)


def test_episodes_begin_at_rest_now_and_then_and_a_run_goes_on_exactly(balanced):
    """Real steps in C: the state alone carries the commands, so what is saved continues to the bit."""
    state = balanced.reset_batch(jax.random.split(jax.random.PRNGKey(0), 512))
    command = np.asarray(state.command)
    assert (~command.any(1)).mean() == pytest.approx(STANDS, abs=0.03)
    assert np.array_equal(state.obs["state"][:, -3:], command)
    state = state._replace(command_timer=jnp.ones_like(state.command_timer))  # a change at once
    actions = jnp.zeros((512, 12))
    saved = jax.tree.map(np.array, state)
    for _ in range(3):
        state = balanced.step_batch(state, actions)
    again = jax.tree.map(jnp.asarray, saved)
    for _ in range(3):
        again = balanced.step_batch(again, actions)
    assert (np.asarray(state.command) != command).any(1).mean() > 0.5
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_height_of_go1stand_knows_no_such_choice():
    draws = [
        terms.first_command(
            Draws(jax.random.PRNGKey(3), 16), TASKS["Go1Stand"], EnvConfig(commands=c)
        )
        for c in ("published", "balanced")
    ]
    np.testing.assert_array_equal(*draws)


def test_an_unknown_choice_is_one_line():
    with pytest.raises(ValueError, match="commands must be published or balanced, not often"):
        EnvConfig(commands="often")


def test_the_film_shows_what_is_told_and_what_is_done():
    """The corner seen from above, nose up, 50 pixels for 1 m/s: blue told, orange done."""
    picture = pytest.importorskip("picture_go1", reason='needs plots: pip install -e ".[go1]"')
    velocity = np.zeros((30, 3))
    velocity[10:] = (1.0, 0.0, 0.4)  # the mean of the last 20 follows in 20 equal steps
    expected = np.clip((np.arange(30) - 9) / 20, 0, 1)[:, None] * velocity[-1]
    np.testing.assert_allclose(picture.smooth(velocity), expected, atol=1e-12)

    grey = np.full((360, 480, 3), 99, np.uint8)
    image = picture.captioned(grey, "turn", np.array([1.0, 0.0, 0.8]), np.array([0.0, 0.5, -0.8]))
    at = image.getpixel
    assert image.size == (480, 424) and at((200, 200)) == (99, 99, 99)
    assert at((405, 25)) == at((405, 45)) == picture.TOLD  # forward
    assert at((380, 75)) == at((395, 75)) == picture.DOES  # half a metre a second to the left
    x, y = np.sin(0.4), np.cos(0.4)  # the middle of 0.8 rad
    assert at((round(405 - 64 * x), round(75 - 64 * y))) == picture.TOLD  # to the left
    assert at((round(405 + 56 * x), round(75 - 56 * y))) == picture.DOES  # to the right
    assert at((round(405 + 64 * x), round(75 - 64 * y))) == (99, 99, 99)
