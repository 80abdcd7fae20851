"""The figure of `python -m test_time report`: one function a panel. Each draws on the axis that it is given.

    accuracy_panel    right against tokens or FLOPs, all strategies            (two panels, one legend: legend_panel)
    speed_panel       right against seconds, plain and with the drafter        (rows of `speed`, if they are there)
    noise_panel       by difficulty, with a good and a noisy verifier
    best_panel        the best strategy by difficulty and budget
    revision_panel    16 revisions: sequential against parallel
    large_panel       the small model with search against a larger one

`draw` puts them all in one picture.
"""

import json
from pathlib import Path

import numpy as np

from report import pyplot
from test_time.optimal import BINS, best_within
from test_time.results import GREEDY, LARGE, Key, Results
from test_time.trials import RATIOS

SMALL = 7  # font size of the legends

# name in the legend -> search, pick
LINES = {
    "best-of-N": ("parallel", "max"),
    "weighted": ("parallel", "weighted"),
    "majority": ("parallel", "majority"),
    "beam": ("beam", "weighted"),
    "lookahead": ("lookahead", "weighted"),
    "DVTS": ("dvts", "weighted"),
}


def draw(results: Results, path: Path, speed_rows: Path) -> None:
    """All panels in one picture. speed_rows: the file that `speed` wrote, or would have written."""
    figure, axes = pyplot().subplots(2, 4, figsize=(21, 9))
    accuracy_panel(axes[0, 0], results, "tokens")
    accuracy_panel(axes[0, 1], results, "flops")
    speed_panel(axes[0, 2], results, read_speed(speed_rows))
    noise_panel(axes[0, 3], results)
    best_panel(axes[1, 0], results)
    revision_panel(axes[1, 1], results)
    large_panel(axes[1, 2], results)
    legend_panel(axes[1, 3], axes[0, 0])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def read_speed(path: Path) -> list[dict]:
    """The rows of `speed`; none if it has not run."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_legend(axis) -> None:
    """A legend, if there is anything to tell."""
    if axis.lines:
        axis.legend(fontsize=SMALL)


def label_difficulty(axis, title: str) -> None:
    """The x axis shows fifths of the questions."""
    axis.set(
        title=title,
        xlabel="difficulty (fifths; 5: hardest)",
        xticks=range(BINS),
        xticklabels=range(1, BINS + 1),
    )


# ---------------------------------------------------------------- right against cost


def accuracy_panel(axis, results: Results, unit: str) -> None:
    """All strategies, the ceiling, and compute-optimal choice. unit: tokens or flops."""
    cost = results.cost[unit]
    for name, (search, pick) in LINES.items():
        keys = [key for key in results.right if (key.search, key.pick) == (search, pick)]
        points = sorted((cost[key].mean(), results.right[key].mean()) for key in keys)
        axis.plot(*zip(*points), "o-", ms=3, label=name)
    keys = [key for key in results.right if (key.search, key.pick) == ("parallel", "majority")]
    points = sorted((cost[key].mean(), results.attempts[key].max(1).mean()) for key in keys)
    axis.plot(*zip(*points), ":", color="0.6", label="any of N right (ceiling)")
    axis.plot(cost[GREEDY].mean(), results.right[GREEDY].mean(), "k*", label="greedy")
    for difficulty, style in (("predicted", "k-"), ("known", "k:")):
        choices = [results.optimal(unit, budget, difficulty) for budget in results.budgets(unit, 12)]
        bought = [choice for choice in choices if choice]
        costs = [choice.cost.mean() for choice in bought]
        rights = [choice.right.mean() for choice in bought]
        axis.plot(costs, rights, style, label=f"compute-optimal, {difficulty} difficulty")
    names = {"tokens": "tokens emitted for a question", "flops": "FLOPs for a question"}
    axis.set(xscale="log", xlabel=names[unit], ylabel="right")


def legend_panel(axis, other) -> None:
    """The legend of an accuracy panel, on an axis of its own."""
    axis.axis("off")
    axis.legend(*other.get_legend_handles_labels(), title="first two panels", loc="center")


def speed_panel(axis, results: Results, rows: list[dict]) -> None:
    """Seconds for a question: plain (white) and with the drafter."""
    for row in rows:
        keys = [Key(row["search"], row["n"], pick) for pick in ("chains", "weighted", "majority")]
        right = next(results.right[key].mean() for key in keys if key in results.right)
        (line,) = axis.plot([row["plain"], row["speculative"]], [right, right], "-")
        color = line.get_color()
        axis.plot(row["plain"], right, "o", mfc="w", color=color)
        axis.plot(row["speculative"], right, "o", color=color, label=f"{row['search']}, N = {row['n']}")
    axis.set(
        title="one question at a time: plain (white), with the drafter",
        xlabel="seconds for a question",
        ylabel="right",
    )
    small_legend(axis)


# ---------------------------------------------------------------- by difficulty


def noise_panel(axis, results: Results) -> None:
    """N = 16: what noise on the verifier's scores does."""
    for name, search, style in (
        ("weighted", "parallel", "o-"),
        ("beam", "beam", "o-"),
        ("weighted, noisy verifier", "noisy parallel", "o--"),
        ("beam, noisy verifier", "noisy beam", "o--"),
    ):
        axis.plot(results.by_bin(results.right[Key(search, 16, "weighted")]), style, label=name)
    label_difficulty(axis, f"N = 16; noise inverts {results.settings['noise']:.0%} of the scores")
    small_legend(axis)


def best_panel(axis, results: Results, budgets_shown: int = 6) -> None:
    """The best strategy for each difficulty and budget."""
    right, cost = results.choices("tokens")
    budgets = results.budgets("tokens", budgets_shown)
    grid = []  # difficulty, budget -> Key or None
    for b in range(BINS):
        here = results.bins["known"] == b
        grid.append([best_within(right, cost, here, budget) for budget in budgets])
    names = sorted({key.search + key.pick for line in grid for key in line if key})
    colours = np.full((BINS, len(budgets)), np.nan)
    for b, line in enumerate(grid):
        for x, key in enumerate(line):
            if key:
                colours[b, x] = names.index(key.search + key.pick)
            text = f"{key.search}\n{key.pick}\n{key.n}" if key else ""
            axis.text(x, b, text, ha="center", va="center", fontsize=6)
    axis.imshow(colours, aspect="auto", cmap="Pastel1")
    axis.set(
        title="best strategy",
        xlabel="tokens",
        xticks=range(len(budgets)),
        xticklabels=[f"{budget:.0f}" for budget in budgets],
        yticks=range(BINS),
        yticklabels=range(1, BINS + 1),
        ylabel="difficulty",
    )


def revision_panel(axis, results: Results) -> None:
    """16 attempts of the revision policy, from 16 chains of one to one chain of 16; empty without such a policy."""
    if Key("revise 1", 16, "chains") in results.right:
        by_length = [results.by_bin(results.right[Key(f"revise {length}", 16, "chains")]) for length in RATIOS]
        for b in range(BINS):
            axis.plot(RATIOS, [rights[b] for rights in by_length], "o-", label=f"difficulty {b + 1}")
    axis.set(
        xscale="log",
        xticks=RATIOS,
        xticklabels=[f"{length}:{16 // length}" for length in RATIOS],
        xlabel="sequential : parallel",
        title="16 attempts of the revision policy",
    )
    small_legend(axis)


def large_panel(axis, results: Results) -> None:
    """A large model, greedy, and the small one with search at equal FLOPs; empty without a large model."""
    if LARGE.search in results.weights:
        axis.plot(results.by_bin(results.right[LARGE]), "k*-", label="large model, greedy")
        for version, ratio, samples, right in results.matched():
            style = "o-" if version == "v1" else "o:"
            label = f"small, {version}, R = {ratio} ({samples:.0f} samples)"
            axis.plot(results.by_bin(right), style, label=label)
    label_difficulty(axis, "small model with search, FLOPs-matched")
    small_legend(axis)
