"""`python -m test_time report`: tables and pictures from the rows of a sweep.

Tables are printed, pictures are written beside --json, and the choices for --strategy auto to --model/choice.json.

    tokens, flops    right against cost, all strategies
    best             the best strategy by difficulty and budget
    noise            by difficulty, with a good and a noisy verifier     (with --verifier-noise)
    speed            right against seconds, plain and with the drafter   (if `speed` has written its rows)
    revisions        sequential against parallel revisions               (with a revision policy)
    large            the small model with search against a larger one    (with a larger one)
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from parts.cli import UserError
from parts.running.pictures import pyplot, save_picture
from test_time.config import Config, writable_folder
from test_time.optimal import BINS, best_within
from test_time.results import CHOICE_FILE, GREEDY, LARGE, Key, Results, write_choices
from test_time.sweep import SHARED_WITH_SPEED, chain_lengths


def report(config: Config) -> None:
    """Print all tables, and write the pictures and choice.json. Raises UserError."""
    folder = writable_folder(config.model)
    results = Results(config.json)
    swept = results.settings["model"]
    if Path(swept) != Path(config.model):
        raise UserError(f"--model {config.model}: the rows in {config.json} are of --model {swept}")
    if results.left_out:
        names = ", ".join(f"{key.search} {key.n} {key.pick}" for key in results.left_out)
        print(f"left out, since there are not rows of all questions: {names}")
    print_strategies(results)
    print_gains(results)
    for unit in ("tokens", "flops"):
        print_budgets(results, unit)
    print_savings(results)
    write_choices(results, folder)
    print_difficulty(results)
    if results.has_revisions:
        print_revisions(results)
    if results.times_larger:
        print_large(results)
    pictures = draw(results, Path(config.json))
    print(f"wrote {', '.join(map(str, pictures))} and {config.model}/{CHOICE_FILE}")


# ---------------------------------------------------------------- tables


def numbers(values, style: str = "6.3f") -> str:
    """Return numbers in columns of equal width."""
    return "  ".join(f"{x:{style}}" for x in values)


def print_strategies(results: Results) -> None:
    """Print for every strategy and pick: right, tokens, FLOPs."""
    print(f"{results.question.max() + 1} questions, {len(results.folds)} rows for each strategy")
    print(f"{'strategy':>24} {'pick':>9} {'right':>7} {'+-':>6} {'tokens':>8} {'MFLOPs':>8}")
    for key in sorted(results.right):
        right = results.right[key]
        line = f"{f'{key.search} {key.n}':>24} {key.pick:>9} {right.mean():7.3f} {results.interval(right):6.3f}"
        print(f"{line} {results.cost['tokens'][key].mean():8.0f} {results.cost['flops'][key].mean() / 1e6:8.0f}")


def print_gains(results: Results) -> None:
    """Print the strategies that take half to all of the tokens of N samples: how much more often each is right than one
    sample, and than the majority of N. "best": of all strategies within the budget, chosen on the other half of the
    questions.
    """
    n = results.compared
    tokens = {key: cost.mean() for key, cost in results.cost["tokens"].items()}
    one, majority = Key("parallel", 1, "majority"), Key("parallel", n, "majority")
    budget = 1.01 * tokens[majority]
    print(f"\n{tokens[majority] / 2:.0f} to {budget:.0f} tokens ({n} samples): how much more often right than")
    print(f"{'':>34} {'right':>7} {'tokens':>7} {'one sample':>17} {f'the majority of {n}':>19}")

    def line(name: str, right: np.ndarray, cost: float) -> None:
        gains = ""
        for other in (one, majority):
            gain = right - results.right[other]
            gains += f"  {gain.mean():+.3f} +- {results.interval(gain):.3f}"
        print(f"{name:>34} {right.mean():7.3f} {cost:7.0f} {gains}")

    for key in sorted(results.choices("tokens")[0]):
        if budget / 2 <= tokens[key] <= budget:
            line(f"{key.search} {key.n} {key.pick}", results.right[key], tokens[key])
    best = results.optimal("tokens", budget, None)
    line("best, chosen on the other half", best.right, best.cost.mean())


def print_budgets(results: Results, unit: str) -> None:
    """Print the best single strategy, and what the choice by difficulty adds, at equal budget."""
    print(f"\nthe best single strategy and the compute-optimal choice, at equal budget in {unit}")
    print(f"{'budget':>10} {'single':>8} {'by predicted difficulty':>26} {'by known difficulty':>26}")
    for budget in results.budgets(unit):
        single = results.optimal(unit, budget, None)
        if not single:
            continue
        line = f"{budget:10.3g} {single.right.mean():8.3f}"
        for difficulty in ("predicted", "known"):
            right = results.optimal(unit, budget, difficulty).right
            gain = right.mean() - single.right.mean()
            line += f" {right.mean():8.3f} ({gain:+.3f} +- {results.interval(right - single.right):.3f})"
        print(line)


def print_savings(results: Results) -> None:
    """Print how many tokens best-of-N needs for the accuracy of the compute-optimal choice."""
    print("\nbest-of-N's tokens / those of the compute-optimal choice (predicted difficulty), for the same accuracy;")
    print("in brackets: for an accuracy that is lower and higher by half the 95 % interval")
    for accuracy, tokens, needed in results.savings():
        ratio, low, high = (best_of_n / tokens for best_of_n in needed)
        print(f"{accuracy:8.3f} {needed[0]:8.0f} / {tokens:.0f} = {ratio:.1f}   ({low:.1f} to {high:.1f})")


def print_difficulty(results: Results) -> None:
    """Print strategies with an equal number of attempts by difficulty, and the effect of a noisy verifier on them."""
    n = results.compared
    print(f"\nN = {n}, right by difficulty (fifths by pass@1 in 16 other attempts)")
    by_majority = [Key("parallel", 1, "majority"), Key("parallel", n, "majority"), Key("parallel", n, "max")]
    names = ["parallel", "beam"] if results.has_steps else ["parallel"]
    names += ["noisy parallel", "noisy beam"] if results.has_noise else []
    weighted = [Key(name, n, "weighted") for name in names]
    for key in by_majority + weighted:
        print(f"{f'{key.search} {key.n} {key.pick}':>28}  {numbers(results.by_bin(results.right[key]))}")
    if results.has_noise:
        lead = results.right[weighted[-2]] - results.right[weighted[-1]]
        print(f"{'noisy: parallel - beam, +-':>28}  {numbers(results.by_bin(lead))}")
        print(f"{'':>28}  {numbers(results.by_bin(lead, results.interval))}")


def print_revisions(results: Results) -> None:
    """Print whether revisions improve attempts, and sequential against parallel at an equal number of attempts."""
    n = results.compared
    chains = results.attempts(Key(f"revise {n}", n, "weighted"))  # (Q, n)
    print(f"\nrevisions, pass@1 by attempt: {numbers(chains.mean(0))}")
    alone = results.attempts(Key("revise 1", n, "weighted")).mean()
    control = results.attempts(Key("refit parallel", n, "majority")).mean()
    before_tuning = results.attempts(Key("parallel", n, "majority")).mean()
    print(
        f"controls: the same policy without earlier attempts in the prompt {alone:.3f}, "
        f"tuned without them {control:.3f}, before tuning {before_tuning:.3f}"
    )
    was_right = chains[:, :-1] == 1
    revised = chains[:, 1:]
    to_wrong = 1 - revised[was_right].mean()
    print(f"right attempts revised to wrong {to_wrong:.1%}, wrong ones to right {revised[~was_right].mean():.1%}")
    for length in chain_lengths(n):
        keys = [Key(f"revise {length}", n, how) for how in ("chains", "weighted", "majority")]
        cells = "  ".join(f"{key.pick} {results.right[key].mean():.3f}" for key in keys)
        by_bin = numbers(results.by_bin(results.right[keys[0]]))
        print(f"{f'chains of {length}':>14}: {cells}   by difficulty {by_bin}")


def print_large(results: Results) -> None:
    """Print the small model with search against a larger one without, at equal FLOPs."""
    large = results.right[LARGE]
    by_bin = numbers(results.by_bin(large))
    print(f"\na model {results.times_larger:.1f} times larger, greedy: {large.mean():.3f}, by difficulty {by_bin}")
    print("the small model with compute-optimal search (predicted difficulty) at equal FLOPs, minus the large one:")
    for version, ratio, samples, small in results.matched():
        gain = small - large  # (Q,)
        cells = numbers(results.by_bin(gain), "+.3f")
        print(f"{version:>6} R = {ratio:<5} {samples:6.1f} samples   all {gain.mean():+.3f}   by difficulty  {cells}")
        cells = numbers(results.by_bin(gain, results.interval))
        print(f"{'':>29} 95 % +- {results.interval(gain):.3f} {'':>16} {cells}")


# ---------------------------------------------------------------- pictures


def draw(results: Results, path: Path) -> list[Path]:
    """Write each picture to STEM-NAME.png beside the file of the rows -> the pictures."""
    accuracy = {unit: partial(draw_accuracy, unit=unit) for unit in ("tokens", "flops")}
    panels = {**accuracy, "best": draw_best}
    if results.has_noise:
        panels["noise"] = draw_noise
    speed_rows = speed_rows_of(results, path)
    if speed_rows:
        panels["speed"] = partial(draw_speed, rows=speed_rows)
    if results.has_revisions:
        panels["revisions"] = draw_revisions
    if results.times_larger:
        panels["large"] = draw_large
    written = []
    for name, panel in panels.items():
        figure, axis = pyplot().subplots(figsize=(8, 5))
        panel(axis, results)
        if name != "best":
            axis.legend(fontsize=9 if name in accuracy else None)
        figure.tight_layout()
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        save_picture(figure, written[-1])
    return written


def speed_rows_of(results: Results, path: Path) -> list[dict]:
    """Return the rows of `speed`, if there are any of the same policy."""
    speed_rows = path.with_suffix(".speed.jsonl")
    if not speed_rows.exists():
        return []
    rows = [json.loads(line) for line in speed_rows.read_text().splitlines()]
    return [row for row in rows if all(row.get(name) == results.settings[name] for name in SHARED_WITH_SPEED)]


# name in the legend -> search, pick
LINES = {
    "best-of-N": ("parallel", "max"),
    "weighted": ("parallel", "weighted"),
    "majority": ("parallel", "majority"),
    "beam": ("beam", "weighted"),
    "lookahead": ("lookahead", "weighted"),
    "DVTS": ("dvts", "weighted"),
}


def draw_accuracy(axis, results: Results, unit: str) -> None:
    """Draw all strategies, the ceiling, and the compute-optimal choice. unit: tokens or flops."""
    cost = results.cost[unit]
    for name, line in LINES.items():
        keys = [key for key in results.right if (key.search, key.pick) == line]
        points = sorted((cost[key].mean(), results.right[key].mean()) for key in keys)
        if points:  # it was swept
            axis.plot(*zip(*points), "o-", ms=3, label=name)
    keys = [key for key in results.right if (key.search, key.pick) == LINES["majority"]]
    points = sorted((cost[key].mean(), results.attempts(key).max(1).mean()) for key in keys)
    axis.plot(*zip(*points), ":", color="0.6", label="any of N right (ceiling)")
    axis.plot(cost[GREEDY].mean(), results.right[GREEDY].mean(), "k*", label="greedy")
    for difficulty, style in (("predicted", "k-"), ("known", "k:")):
        choices = [results.optimal(unit, budget, difficulty) for budget in results.budgets(unit)]
        points = [(choice.cost.mean(), choice.right.mean()) for choice in choices if choice]
        axis.plot(*zip(*points), style, label=f"compute-optimal, {difficulty} difficulty")
    names = {"tokens": "tokens emitted for a question", "flops": "FLOPs for a question"}
    axis.set(xscale="log", xlabel=names[unit], ylabel="right")


def draw_speed(axis, results: Results, rows: list[dict]) -> None:
    """Draw seconds per question, plain (white) and with the drafter."""
    for row in rows:
        keys = [Key(row["search"], row["n"], pick) for pick in ("chains", "weighted", "majority")]
        known = [results.right[key].mean() for key in keys if key in results.right]
        if not known:
            continue  # `speed` has timed a strategy that was not swept
        right = known[0]
        (line,) = axis.plot([row["plain"], row["speculative"]], [right, right], "-")
        color = line.get_color()
        axis.plot(row["plain"], right, "o", mfc="w", color=color)
        axis.plot(row["speculative"], right, "o", color=color, label=f"{row['search']}, N = {row['n']}")
    title = "one question at a time: plain (white), with the drafter"
    axis.set(title=title, xlabel="seconds for a question", ylabel="right")


BY_DIFFICULTY = {"xlabel": "difficulty (fifths; 5: hardest)", "xticks": range(BINS), "xticklabels": range(1, BINS + 1)}


def draw_noise(axis, results: Results) -> None:
    """Draw the effect of noise on the verifier's scores, at an equal number of attempts."""
    for noise, style, end in (("", "o-", ""), ("noisy ", "o--", ", noisy verifier")):
        for name, search in (("weighted", "parallel"), ("beam", "beam")):
            right = results.right[Key(noise + search, results.compared, "weighted")]
            axis.plot(results.by_bin(right), style, label=name + end)
    axis.set(
        title=f"N = {results.compared}; noise inverts {results.settings['noise']:.0%} of the scores", **BY_DIFFICULTY
    )


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
    """Draw n attempts of the revision policy, from n chains of one to one chain of n."""
    n = results.compared
    lengths = chain_lengths(n)
    by_length = [results.by_bin(results.right[Key(f"revise {length}", n, "chains")]) for length in lengths]
    for b, rights in enumerate(zip(*by_length)):
        axis.plot(lengths, rights, "o-", label=f"difficulty {b + 1}")
    ticks = [f"{length}:{n // length}" for length in lengths]
    axis.set(xscale="log", xticks=lengths, xticklabels=ticks, xlabel="sequential : parallel")
    axis.set(title=f"{n} attempts of the revision policy")


def draw_large(axis, results: Results) -> None:
    """Draw a large model, greedy, and the small one with search at equal FLOPs."""
    axis.plot(results.by_bin(results.right[LARGE]), "k*-", label="large model, greedy")
    for version, ratio, samples, right in results.matched():
        style = "o-" if version == "v1" else "o:"
        axis.plot(results.by_bin(right), style, label=f"small, {version}, R = {ratio} ({samples:.0f} samples)")
    axis.set(title="small model with search, FLOPs-matched", **BY_DIFFICULTY)
