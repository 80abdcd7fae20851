"""The pictures of `python -m test_time report`: one function each, which draws on the axis that it is given.

    tokens, flops    right against cost, all strategies
    noise            by difficulty, with a good and a noisy verifier
    best             the best strategy by difficulty and budget
    speed            right against seconds, plain and with the drafter   (if `speed` has written its rows)
    revisions        16 revisions: sequential against parallel           (with a revision policy)
    large            the small model with search against a larger one    (with a larger one)
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from parts.running.pictures import pyplot
from test_time.optimal import BINS, best_within
from test_time.results import GREEDY, LARGE, Key, Results
from test_time.sweep import CHAIN_LENGTHS

# name in the legend -> search, pick
LINES = {
    "best-of-N": ("parallel", "max"),
    "weighted": ("parallel", "weighted"),
    "majority": ("parallel", "majority"),
    "beam": ("beam", "weighted"),
    "lookahead": ("lookahead", "weighted"),
    "DVTS": ("dvts", "weighted"),
}


def draw(results: Results, path: Path) -> list[Path]:
    """Write each picture to STEM-NAME.png beside the file of the rows -> the pictures."""
    panels = {
        "tokens": partial(draw_accuracy, unit="tokens"),
        "flops": partial(draw_accuracy, unit="flops"),
        "noise": draw_noise,
        "best": draw_best,
    }
    speed_rows = path.with_suffix(".speed.jsonl")
    if speed_rows.exists():
        panels["speed"] = partial(draw_speed, rows=[json.loads(line) for line in speed_rows.read_text().splitlines()])
    if results.has_revisions:
        panels["revisions"] = draw_revisions
    if results.times_larger:
        panels["large"] = draw_large
    written = []
    for name, panel in panels.items():
        figure, axis = pyplot().subplots(figsize=(8, 5))
        panel(axis, results)
        if axis.get_legend_handles_labels()[0] and not axis.get_legend():
            axis.legend()
        figure.tight_layout()
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=100)
        pyplot().close(figure)
    return written


# ---------------------------------------------------------------- right against cost


def draw_accuracy(axis, results: Results, unit: str) -> None:
    """Draw all strategies, the ceiling, and the compute-optimal choice. unit: tokens or flops."""
    cost = results.cost[unit]
    for name, line in LINES.items():
        keys = [key for key in results.right if (key.search, key.pick) == line]
        points = sorted((cost[key].mean(), results.right[key].mean()) for key in keys)
        axis.plot(*zip(*points), "o-", ms=3, label=name)
    keys = [key for key in results.right if (key.search, key.pick) == LINES["majority"]]
    points = sorted((cost[key].mean(), results.attempts[key].max(1).mean()) for key in keys)
    axis.plot(*zip(*points), ":", color="0.6", label="any of N right (ceiling)")
    axis.plot(cost[GREEDY].mean(), results.right[GREEDY].mean(), "k*", label="greedy")
    for difficulty, style in (("predicted", "k-"), ("known", "k:")):
        choices = [results.optimal(unit, budget, difficulty) for budget in results.budgets(unit)]
        points = [(choice.cost.mean(), choice.right.mean()) for choice in choices if choice]
        axis.plot(*zip(*points), style, label=f"compute-optimal, {difficulty} difficulty")
    names = {"tokens": "tokens emitted for a question", "flops": "FLOPs for a question"}
    axis.set(xscale="log", xlabel=names[unit], ylabel="right")
    axis.legend(fontsize=9)


def draw_speed(axis, results: Results, rows: list[dict]) -> None:
    """Draw seconds per question, plain (white) and with the drafter."""
    for row in rows:
        keys = [Key(row["search"], row["n"], pick) for pick in ("chains", "weighted", "majority")]
        right = next(results.right[key].mean() for key in keys if key in results.right)
        (line,) = axis.plot([row["plain"], row["speculative"]], [right, right], "-")
        color = line.get_color()
        axis.plot(row["plain"], right, "o", mfc="w", color=color)
        axis.plot(row["speculative"], right, "o", color=color, label=f"{row['search']}, N = {row['n']}")
    title = "one question at a time: plain (white), with the drafter"
    axis.set(title=title, xlabel="seconds for a question", ylabel="right")


# ---------------------------------------------------------------- by difficulty


def label_difficulty(axis, title: str) -> None:
    """Label the x axis with fifths of the questions."""
    label = "difficulty (fifths; 5: hardest)"
    axis.set(title=title, xlabel=label, xticks=range(BINS), xticklabels=range(1, BINS + 1))


def draw_noise(axis, results: Results) -> None:
    """Draw the effect of noise on the verifier's scores, at N = 16."""
    for name, search, style in (
        ("weighted", "parallel", "o-"),
        ("beam", "beam", "o-"),
        ("weighted, noisy verifier", "noisy parallel", "o--"),
        ("beam, noisy verifier", "noisy beam", "o--"),
    ):
        axis.plot(results.by_bin(results.right[Key(search, 16, "weighted")]), style, label=name)
    label_difficulty(axis, f"N = 16; noise inverts {results.settings['noise']:.0%} of the scores")


def draw_best(axis, results: Results) -> None:
    """Draw the best strategy for each difficulty and budget."""
    right, cost = results.choices("tokens")
    budgets = results.budgets("tokens", 6)
    cells = {}  # (difficulty, index of the budget) -> Key
    for b in range(BINS):
        for x, budget in enumerate(budgets):
            key = best_within(right, cost, results.bins["known"] == b, budget)
            if key:
                cells[b, x] = key
                axis.text(x, b, f"{key.search}\n{key.pick}\n{key.n}", ha="center", va="center", fontsize=9)
    names = sorted({key.search + key.pick for key in cells.values()})
    colours = np.full((BINS, len(budgets)), np.nan)
    for place, key in cells.items():
        colours[place] = names.index(key.search + key.pick)
    axis.imshow(colours, aspect="auto", cmap="Pastel1")
    axis.set(title="best strategy", xlabel="tokens", ylabel="difficulty")
    axis.set(xticks=range(len(budgets)), xticklabels=[f"{budget:.0f}" for budget in budgets])
    axis.set(yticks=range(BINS), yticklabels=range(1, BINS + 1))


def draw_revisions(axis, results: Results) -> None:
    """Draw 16 attempts of the revision policy, from 16 chains of one to one chain of 16."""
    by_length = [results.by_bin(results.right[Key(f"revise {length}", 16, "chains")]) for length in CHAIN_LENGTHS]
    for b, rights in enumerate(zip(*by_length)):
        axis.plot(CHAIN_LENGTHS, rights, "o-", label=f"difficulty {b + 1}")
    ticks = [f"{length}:{16 // length}" for length in CHAIN_LENGTHS]
    axis.set(xscale="log", xticks=CHAIN_LENGTHS, xticklabels=ticks, xlabel="sequential : parallel")
    axis.set(title="16 attempts of the revision policy")


def draw_large(axis, results: Results) -> None:
    """Draw a large model, greedy, and the small one with search at equal FLOPs."""
    axis.plot(results.by_bin(results.right[LARGE]), "k*-", label="large model, greedy")
    for version, ratio, samples, right in results.matched():
        style = "o-" if version == "v1" else "o:"
        axis.plot(results.by_bin(right), style, label=f"small, {version}, R = {ratio} ({samples:.0f} samples)")
    label_difficulty(axis, "small model with search, FLOPs-matched")
