"""Rules that decide which episodes a residual may play, against learners that try to ruin the robot.

    python benchmarks/guard.py                    table and figure of docs/algos/resfit.md, half a minute
    python benchmarks/guard.py --credit 20

No robot and no network: an episode succeeds with probability p0 = 0.5 if the base plays it, and with whatever the
learner chooses, 0 to 0.95, if the residual does. What a rule may cost is the *loss*, p0 minus the success of what was
played. The rules:
    always   no guard: the residual plays every episode, as it does behind a critic that approves of it
    alarm    base and residual by turns; a betting test on their pairs; the base alone for 200 episodes when it rings
    window   a share of min(1, delta / (p0+ - L)), L a lower bound of the residual's last 100 episodes
    account  the rule of algos/resfit.py, equation 6
Output: docs/results/resfit/guard/outcomes.csv, one row a rule and learner, and docs/images/resfit_guard.png.
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
P0, DELTA, ALPHA = 0.5, 0.05, 0.05
MEASURED = 256  # episodes of the base, once, for the bound p0+
EPISODES, REPEATS = 3_000, 200
WINDOW = 100
REST = 200  # episodes of the base alone after an alarm


def upper_bound(successes: int, trials: int) -> float:
    """Clopper and Pearson's one-sided bound: above the true chance with probability 1 - ALPHA."""
    low, high = successes / trials, 1.0
    for _ in range(40):
        p = (low + high) / 2
        tail = 0.0
        for k in range(successes + 1):
            tail += math.comb(trials, k) * p**k * (1 - p) ** (trials - k)
        low, high = (p, high) if tail > ALPHA else (low, p)
    return high


# --- Learners: chance of success (R,), from how often each has played and from what the rule shows -
def ruins(played, rule):
    return np.zeros(REPEATS)


def equals(played, rule):
    return np.full(REPEATS, P0)


def charms(played, rule):
    """The critic is sure of it, and it costs thirty points."""
    return np.full(REPEATS, P0 - 0.3)


def helps_late(played, rule):
    return 0.95 * np.clip((played - 100) / 200, 0, 1)


def helps_then_ruins(played, rule):
    return np.where(played < 500, 0.95, 0.0)


def erodes(played, rule):
    return np.maximum(0, P0 + 0.2 - played / 2_000)


def games_the_rule(played, rule):
    """Earns until the account is full, then spends all of it: it sees what the rule sees."""
    full, empty = rule.credit >= rule.limit - 1, rule.credit < rule.bar
    rule.spends = np.where(full, True, np.where(empty, False, getattr(rule, "spends", full)))
    return np.where(rule.spends, 0.0, 0.95)


LEARNERS = (ruins, equals, charms, helps_late, helps_then_ruins, erodes, games_the_rule)


# --- Rules: `choose` says who plays with the residual (R,), `see` takes what came of it -----------
class Always:
    """The state that all rules show: `credit` and `bar` of equation 6, for the learner that games it."""

    def __init__(self, bar: np.ndarray, limit: float, rng):
        self.bar, self.limit, self.rng = bar, limit, rng
        self.credit = np.zeros(REPEATS)

    def choose(self):
        return np.ones(REPEATS, bool)

    def see(self, exposed, success):
        self.credit = np.clip(self.credit + DELTA - exposed * (self.bar - success), 0, self.limit)


class Account(Always):
    """Equation 6: an episode earns delta, one with the residual costs p0+ and brings back its success."""

    def choose(self):
        self.credit = np.minimum(self.credit + DELTA, self.limit)
        exposed = self.credit >= self.bar
        self.credit = self.credit - exposed * self.bar
        return exposed

    def see(self, exposed, success):
        self.credit = self.credit + exposed * success


class Window(Always):
    """delta over the largest gap that the last episodes of the residual leave possible."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.last, self.count = np.zeros((WINDOW, REPEATS)), np.zeros(REPEATS, int)

    def choose(self):
        n = np.maximum(np.minimum(self.count, WINDOW), 1)
        low = self.last.sum(0) / n - np.sqrt(math.log(1 / ALPHA) / (2 * n))  # Hoeffding
        gap = self.bar - np.clip(low, 0, 1)
        return self.rng.random(REPEATS) < DELTA / np.maximum(gap, DELTA)

    def see(self, exposed, success):
        super().see(exposed, success)
        at = np.flatnonzero(exposed)
        self.last[self.count[at] % WINDOW, at] = success[at]
        self.count += exposed


class Alarm(Always):
    """Wealth, averaged over bets, on pairs of residual and base, against a gap of at most delta."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.bets = np.linspace(0.05, 0.95, 10)[:, None] * 0.9 / (1 + DELTA)
        self.wealth = np.ones((10, REPEATS))
        self.turn = self.rest = np.zeros(REPEATS, int)
        self.first = np.zeros(REPEATS)

    def choose(self):
        self.exposed = (self.turn == 0) & (self.rest == 0)
        return self.exposed

    def see(self, exposed, success):
        super().see(exposed, success)
        self.first = np.where(exposed, success, self.first)
        pair = (self.rest == 0) & ~exposed
        x = np.where(pair, self.first - success, -DELTA)
        self.wealth = self.wealth * (1 - self.bets * (x + DELTA))
        rings = self.wealth.mean(0) >= 1 / ALPHA
        self.wealth = np.where(rings, 1.0, self.wealth)
        self.rest = np.where(rings, REST, np.maximum(self.rest - 1, 0))
        self.turn = np.where(self.rest > 0, 0, 1 - self.turn)


RULES = dict(always=Always, alarm=Alarm, window=Window, account=Account)


def simulate(rule_class, learner, limit: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """-> expected loss and whether the residual played, (EPISODES, REPEATS) each."""
    rng = np.random.default_rng(seed)
    measured = rng.binomial(MEASURED, P0, REPEATS)
    bounds = {count: upper_bound(int(count), MEASURED) for count in np.unique(measured)}
    rule = rule_class(np.array([bounds[count] for count in measured]), limit, rng)
    played = np.zeros(REPEATS, int)
    losses, exposures = [], []
    for _ in range(EPISODES):
        chance = learner(played, rule)  # before the rule decides: it may know all but the draw
        exposed = rule.choose()
        chance = np.where(exposed, chance, P0)
        rule.see(exposed, rng.random(REPEATS) < chance)
        played = played + exposed
        losses.append(P0 - chance)
        exposures.append(exposed)
    return np.array(losses), np.array(exposures)


def worst_window(losses: np.ndarray, length: int) -> np.ndarray:
    """Largest mean loss over that many episodes in a row, of each repetition."""
    sums = np.concatenate([np.zeros((1, REPEATS)), losses.cumsum(0)])
    return (sums[length:] - sums[:-length]).max(0) / length


def summary(losses: np.ndarray, exposures: np.ndarray) -> dict:
    """In points of success; means over the repetitions, and the worst of them."""
    return {
        "loss": 100 * losses.mean(),
        "loss_worst": 100 * losses.mean(0).max(),
        "window_100": 100 * worst_window(losses, 100).mean(),
        "window_100_worst": 100 * worst_window(losses, 100).max(),
        "window_1000": 100 * worst_window(losses, 1_000).mean(),
        "exposed": 100 * exposures.mean(),
        "exposed_at_end": 100 * exposures[-500:].mean(),
    }


def draw(curves: dict, path: Path):
    """Success over 100 episodes, one panel a learner, one line a rule; the mean of all repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(always="#d62728", alarm="#ff7f0e", window="#1f77b4", account="#2ca02c")
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.2), sharex=True, sharey=True)
    for axis, learner in zip(axes.flat, LEARNERS, strict=False):
        for rule in RULES:
            axis.plot(curves[rule, learner.__name__], color=colours[rule], lw=1.3, label=rule)
        axis.axhspan(P0 - DELTA, P0, color="0.85", lw=0)
        axis.set_title(learner.__name__.replace("_", " "), fontsize=10)
        axis.set_ylim(-0.02, 1)
    for axis in axes[:, 0]:
        axis.set_ylabel("success of 100 episodes")
    for axis in (*axes[1, :3], axes[0, 3]):
        axis.set_xlabel("episodes")
    axes[0, 3].tick_params(labelbottom=True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 3].axis("off")
    axes[1, 3].legend(handles, labels, loc="center", frameon=False)
    axes[1, 3].text(0.5, 0.15, "grey: the base,\nand delta below it", ha="center", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(limit: float, out: Path, image: Path):
    rows, curves = [], {}
    for name, rule in RULES.items():
        for learner in LEARNERS:
            losses, exposures = simulate(rule, learner, limit)
            row = dict(rule=name, learner=learner.__name__) | summary(losses, exposures)
            rows.append(row)
            kernel = np.ones(100) / 100
            curves[name, learner.__name__] = P0 - np.convolve(losses.mean(1), kernel, "valid")
            numbers = " ".join(f"{v:7.1f}" for v in row.values() if not isinstance(v, str))
            print(f"{name:8s} {learner.__name__:17s} {numbers}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(v if isinstance(v, str) else f"{v:.2f}" for v in row.values())
    draw(curves, image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--credit", type=float, default=10.0, help="B, most that can be saved up")
    parser.add_argument("--out", default=ROOT / "docs/results/resfit/guard/outcomes.csv", type=Path)
    parser.add_argument("--image", default=ROOT / "docs/images/resfit_guard.png", type=Path)
    given = parser.parse_args()
    main(given.credit, given.out, given.image)
