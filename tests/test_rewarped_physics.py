"""What the images of scripts/physics_rewarped.py show: momentum, energy, fluid, plasticity, closed forms."""

import numpy as np
import pytest

pytest.importorskip("warp", reason='needs Warp: pip install -e ".[rewarped]"')
import physics_rewarped as physics  # noqa: E402


def test_transfers_keep_mass_momentum_and_angular_momentum():
    found = physics.transfers(100)
    assert found["strain"] > 0.01, "stress is at work, too"
    assert found["kept"].shape == (100, 4) and found["kept"].max() < 1e-12


def test_an_elastic_block_bounces_without_gaining_energy():
    found = physics.elastic(40)
    total, heights = found["energies"].sum(1), found["heights"]
    assert (
        total.max() < 1.01 * total[0]
        and (np.diff(total) < 0.01 * total[0]).all()
        and total.min() > 0
    )
    # Free fall from 0.15 to the floor takes 17 of these steps.
    lowest = int(heights[:30].argmin())
    assert 15 < lowest < 23 and found["energies"][lowest, 2] > 0.1 * total[lowest], (
        "the fall deforms it"
    )
    assert heights[lowest:].max() > heights[lowest] + 0.3 * 0.15, "it does not bounce"
    assert total[:15].std() < 1e-3 * total[0], "nothing is lost in the air"


def test_a_fluid_settles_level():
    """A column over the left half ends as a layer of which both halves have the same depth."""
    found = physics.fluid(80)
    (left, right), start = found["levels"][-1], found["levels"][0]
    assert (
        start[0] > 0.3 and start[1] == 0 and abs(left - right) < 0.05 * left and 0.02 < left < 0.07
    )
    x = found["images"][-1]
    tops = [
        np.quantile(x[(x[:, 0] > a) & (x[:, 0] <= a + 0.15), 1], 0.9)
        for a in (0.2, 0.35, 0.5, 0.65)
    ]
    assert np.ptp(tops) < 0.5 * (np.mean(tops) - found["floor"]), "the surface is not level"
    assert found["speed"][-1] < 0.02 < found["speed"].max() and abs(found["volume"][-1] - 1) < 0.02


def test_plasticine_holds_below_yield_and_flows_above():
    """Increments of strain add up to the yield strain and no further, both ways; a block stands or slumps."""
    found, expected = physics.plasticine(40), [0.0]
    for change in np.diff(found["imposed"]):
        expected.append(float(np.clip(expected[-1] + change, -found["limit"], found["limit"])))
    assert np.abs(found["kept"] - expected).max() < 1e-9 * found["limit"]
    assert abs(found["kept"][80]) < 1e-9 * found["limit"], (
        "loaded below yield and unloaded: nothing stays"
    )
    assert (
        found["kept"].max() > 0.999 * found["limit"] and found["imposed"].max() > 2 * found["limit"]
    )
    strong, weak = found["heights"][-1] / found["heights"][0]
    assert strong > 0.95 and weak < 0.5


def test_a_fall_a_pendulum_and_friction_against_closed_forms():
    found = physics.rigid()
    for name, tolerance in (
        ("fall", 5e-4),
        ("pendulum", 2e-2),
        ("slide", 1e-2),
    ):  # of the largest value
        _, simulated, exact = found[name]
        assert np.abs(simulated - exact).max() < tolerance * np.abs(exact).max(), name
    t, angles, _ = found["pendulum"]
    crossings = t[1:][np.diff(np.sign(angles)) != 0]
    assert len(crossings) == 5 and abs(np.abs(angles[-80:]).max() / angles[0] - 1) < 0.01, (
        "it swings on, without loss"
    )


def test_the_images_are_drawn(tmp_path, capsys):
    found = dict(t=np.arange(3.0), a=np.arange(3.0), b=np.arange(3.0))
    physics.draw(
        "rigid",
        {name: tuple(found.values()) for name in ("fall", "pendulum", "slide")},
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (
        physics.main(physics.Args(("rigid",), tmp_path)) == 0
        and "physics_rigid.png" in capsys.readouterr().out
    )
