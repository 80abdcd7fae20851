"""`python -m test_time report`: tables and figures from the rows of a sweep.

Tables are printed, figures are written beside --json, and the choices for --strategy auto to --model/choice.json.
"""

from pathlib import Path

from test_time.config import Config, writable_folder
from test_time.figures import draw
from test_time.results import CHOICE_FILE, LARGE, Key, Results, write_choices
from test_time.sweep import CHAIN_LENGTHS


def report(config: Config) -> None:
    """Print all tables, and write the figures and choice.json. Raises UserError."""
    folder = writable_folder(config.model)
    results = Results(config.json)
    print_strategies(results)
    for unit in ("tokens", "flops"):
        print_budgets(results, unit)
    write_choices(results, folder)
    print_difficulty(results)
    if results.has_revisions:
        print_revisions(results)
    if results.times_larger:
        print_large(results)
    pictures = draw(results, Path(config.json))
    print(f"wrote {', '.join(map(str, pictures))} and {config.model}/{CHOICE_FILE}")


def numbers(values, style: str = "6.3f") -> str:
    """Return numbers in columns of equal width."""
    return "  ".join(f"{x:{style}}" for x in values)


def print_strategies(results: Results) -> None:
    """Print for every strategy and pick: right, tokens, FLOPs."""
    print(f"{results.question.max() + 1} questions, {len(results.folds)} rows for each strategy")
    print(f"{'strategy':>24} {'pick':>9} {'right':>7} {'+-':>6} {'tokens':>8} {'MFLOPs':>8}")
    for key in sorted(results.right):
        right = results.right[key]
        tokens = results.cost["tokens"][key].mean()
        mflops = results.cost["flops"][key].mean() / 1e6
        name = f"{key.search} {key.n}"
        print(
            f"{name:>24} {key.pick:>9} {right.mean():7.3f} {results.interval(right):6.3f} {tokens:8.0f} {mflops:8.0f}"
        )


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


def print_difficulty(results: Results) -> None:
    """Print N = 16 by difficulty, and the effect of a noisy verifier on it."""
    print("\nN = 16, right by difficulty (fifths by pass@1 in 16 other attempts)")
    for key in (
        Key("parallel", 1, "majority"),
        Key("parallel", 16, "majority"),
        Key("parallel", 16, "max"),
        Key("parallel", 16, "weighted"),
        Key("beam", 16, "weighted"),
        Key("noisy parallel", 16, "weighted"),
        Key("noisy beam", 16, "weighted"),
    ):
        name = f"{key.search} {key.n} {key.pick}"
        print(f"{name:>28}  {numbers(results.by_bin(results.right[key]))}")
    lead = results.right[Key("noisy parallel", 16, "weighted")] - results.right[Key("noisy beam", 16, "weighted")]
    print(f"{'noisy: parallel - beam, +-':>28}  {numbers(results.by_bin(lead))}")
    print(f"{'':>28}  {numbers(results.by_bin(lead, results.interval))}")


def print_revisions(results: Results) -> None:
    """Print whether revisions improve attempts, and sequential against parallel at 16 attempts."""
    chains = results.attempts[Key("revise 16", 16, "weighted")]  # (Q, 16)
    print(f"\nrevisions, pass@1 by attempt: {numbers(chains.mean(0))}")
    alone = results.attempts[Key("revise 1", 16, "weighted")].mean()
    control = results.attempts[Key("refit parallel", 16, "majority")].mean()
    before_tuning = results.attempts[Key("parallel", 16, "majority")].mean()
    print(
        f"controls: the same policy without earlier attempts in the prompt {alone:.3f}, "
        f"tuned without them {control:.3f}, before tuning {before_tuning:.3f}"
    )
    before = chains[:, :-1]
    after = chains[:, 1:]
    to_wrong = 1 - after[before == 1].mean()
    to_right = after[before == 0].mean()
    print(f"right attempts revised to wrong {to_wrong:.1%}, wrong ones to right {to_right:.1%}")
    for length in CHAIN_LENGTHS:
        keys = [Key(f"revise {length}", 16, how) for how in ("chains", "weighted", "majority")]
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
