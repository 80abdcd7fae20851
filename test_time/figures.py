"""The pictures of `python -m test_time report`: one function each, which draws on the axis that it is given.

    tokens, flops    right against cost, all strategies
    speed            right against seconds, plain and with the drafter   (rows of `speed`, if they are there)
    noise            by difficulty, with a good and a noisy verifier
    best             the best strategy by difficulty and budget
    revisions        16 revisions: sequential against parallel           (with a revision policy)
    large            the small model with search against a larger one    (with a larger one)

`draw` writes each into a file of its own.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from parts.running.pictures import pyplot
from test_time.optimal import BINS, best_within
from test_time.results import GREEDY, LARGE, Key, Results
from test_time.trials import RATIOS

# name in the legend -> search, pick
LINES = {
    "best-of-N": ("parallel", "max"),
    "weighted": ("parallel", "weighted"),
    "majority": ("parallel", "majority"),
    "beam": ("beam", "weighted"),
    "lookahead": ("lookahead", "weighted"),
    "DVTS": ("dvts", "weighted"),
}


def draw(results: Results, path: Path, speed_rows: Path) -> list[Path]:
    """Each picture into STEM-NAME.png beside the file `path` -> the pictures. speed_rows: the file that `speed` wrote,
    or would have written.
    """
    panels: dict[str, Callable] = {
        "tokens": partial(accuracy_panel, results=results, unit="tokens"),
        "flops": partial(accuracy_panel, results=results, unit="flops"),
        "noise": partial(noise_panel, results=results),
        "best": partial(best_panel, results=results),
    }
    timed = read_speed(speed_rows)
    if timed:
        panels["speed"] = partial(speed_panel, results=results, rows=timed)
    if Key("revise 1", 16, "chains") in results.right:
        panels["revisions"] = partial(revision_panel, results=results)
    if LARGE.search in results.weights:
        panels["large"] = partial(large_panel, results=results)
    written = []
    for name, panel in panels.items():
        figure, axis = pyplot().subplots(figsize=(8, 5))
        panel(axis)
        figure.tight_layout()
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=100)
        pyplot().close(figure)
    return written


def read_speed(path: Path) -> list[dict]:
    """The rows of `speed`; none if it has not run."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    axis.legend(fontsize=9)


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
    axis.legend()


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
    axis.legend()


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
            axis.text(x, b, text, ha="center", va="center", fontsize=9)
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
    """16 attempts of the revision policy, from 16 chains of one to one chain of 16."""
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
    axis.legend()


def large_panel(axis, results: Results) -> None:
    """A large model, greedy, and the small one with search at equal FLOPs."""
    axis.plot(results.by_bin(results.right[LARGE]), "k*-", label="large model, greedy")
    for version, ratio, samples, right in results.matched():
        style = "o-" if version == "v1" else "o:"
        label = f"small, {version}, R = {ratio} ({samples:.0f} samples)"
        axis.plot(results.by_bin(right), style, label=label)
    label_difficulty(axis, "small model with search, FLOPs-matched")
    axis.legend()
