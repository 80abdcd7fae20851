"""The statistics of "compute-optimal": which strategy is best for which difficulty and budget, and is it really better?

Data: for each strategy an array over Q questions of right (0 or 1), and one of cost (tokens or FLOPs).

    in each bin of difficulty the best of    mean right - price * mean cost       (a Lagrange multiplier)
    at the lowest price that keeps           sum over bins of share * mean cost <= budget

So hard questions may cost more than easy ones: the budget is kept on average.

The choice is made on one half of the questions (a fold) and reported on the other. Otherwise the best of many
strategies would look better than it is.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np

BINS = 5
PerStrategy = Mapping[Hashable, np.ndarray]  # strategy -> array (Q,)


class Optimal(NamedTuple):
    """The result of the compute-optimal choice."""

    right: np.ndarray  # (Q,)
    cost: np.ndarray  # (Q,)
    chosen: dict[tuple[int, int], Hashable]  # (fold, bin) -> strategy


def quintiles(easiness) -> np.ndarray:
    """Return the fifth that each question is in: easiness (Q,) -> (Q,) int, 0 (easiest) to 4 (hardest), of equal size;
    ties in the order of the questions.
    """
    rank = np.empty(len(easiness), int)
    rank[np.argsort(-np.asarray(easiness), kind="stable")] = np.arange(len(easiness))
    return rank * BINS // len(easiness)


def best_within(right: PerStrategy, cost: PerStrategy, questions: np.ndarray, budget: float) -> Hashable | None:
    """Return the strategy that is right most often, of equal ones the cheapest, of those whose mean cost over the
    questions (Q,) bool is within the budget. None: all are too expensive, or there is no question.
    """
    if not questions.any():
        return None
    mean_cost = {k: cost[k][questions].mean() for k in right}
    affordable = [k for k in right if mean_cost[k] <= budget]
    return max(affordable, key=lambda k: (right[k][questions].mean(), -mean_cost[k]), default=None)


def allocate(right: PerStrategy, cost: PerStrategy, questions: np.ndarray, bins: np.ndarray, budget: float):
    """Return {bin: strategy}, right most often at a mean cost over the questions (Q,) bool that is within the budget,
    see above. bins (Q,) int. None: not even the cheapest strategies are within the budget, or a bin is empty.
    """
    names = list(right)
    labels = sorted(set(bins))
    members = [questions & (bins == b) for b in labels]
    if not all(some.any() for some in members):
        return None
    right_table = np.array([right[k] for k in names])  # (strategies, Q)
    cost_table = np.array([cost[k] for k in names])
    r = np.array([right_table[:, some].mean(1) for some in members])  # (bins, strategies)
    c = np.array([cost_table[:, some].mean(1) for some in members])
    share = np.array([some.sum() for some in members]) / questions.sum()
    for price in np.geomspace(1e-6, 1e3, 500) / budget:
        best = (r - price * c).argmax(1)  # (bins,)
        if share @ c[range(len(c)), best] <= budget:
            return {b: names[i] for b, i in zip(labels, best)}
    return None


def choose(right, cost, bins, known, budget: float, probe_cost, question) -> tuple[dict[int, Hashable], bool] | None:
    """Choose a strategy for each bin on the rows `known` (Q,) bool -> ({bin: strategy}, whether the bins are used).

    The bins are used if they beat the best single strategy (which needs no prediction) by three standard errors: they
    are the best of many choices, so they look better than they are. None: the budget buys nothing. The other arguments
    are those of `compute_optimal`.
    """
    single = best_within(right, cost, known, budget)
    if single is None:
        return None
    by_bin = allocate(right, {k: c + probe_cost for k, c in cost.items()}, known, bins, budget)
    if by_bin and beats(by_bin, single, right, bins, known, question):
        return by_bin, True
    return dict.fromkeys(set(bins), single), False


def compute_optimal(right, cost, bins, folds, budget: float, probe_cost=0.0, question=None) -> Optimal | None:
    """Choose strategies for bins on one fold, and report them on the other. None where the budget buys nothing.

    right, cost: PerStrategy. bins, folds (Q,) int. probe_cost: cost of predicting the bin, a number or (Q,), paid where
    the bins are used. question (Q,): the question of each row, see `interval`; None: each row is a question.
    """
    if question is None:
        question = np.arange(len(bins))
    outcome = np.zeros(len(bins))
    paid = np.zeros(len(bins))
    chosen = {}
    for fold in (0, 1):
        found = choose(right, cost, bins, folds != fold, budget, probe_cost, question)
        if found is None:
            return None
        by_bin, predicted = found
        for b, k in by_bin.items():
            here = (bins == b) & (folds == fold)
            outcome[here] = right[k][here]
            paid[here] = (cost[k] + probe_cost * predicted)[here]
            chosen[fold, b] = k
    return Optimal(outcome, paid, chosen)


def beats(by_bin: dict, single: Hashable, right: PerStrategy, bins, known, question) -> bool:
    """Return whether strategies by bin beat a single one by three standard errors, on the rows `known` (Q,) bool."""
    gain = np.zeros(len(bins))
    for b, k in by_bin.items():
        gain = gain + (right[k] - right[single]) * (bins == b)
    number = np.unique(question[known], return_inverse=True)[1]
    gain = np.bincount(number, gain[known])  # by question
    return bool(gain.sum() > 3 * gain.std() * len(gain) ** 0.5)


def interval(x: np.ndarray, question: np.ndarray, draws: int = 1000) -> float:
    """Return half the width of the 95 % bootstrap interval of a mean over rows x (R,). question (R,) int from 0: the
    question of each row. All rows of a question are drawn together, since they are not independent.
    """
    rng = np.random.default_rng(0)
    total = np.bincount(question, x)
    count = np.bincount(question)
    drawn = rng.integers(0, len(count), (draws, len(count)))
    return 1.96 * np.std(total[drawn].sum(1) / count[drawn].sum(1))


def matched_samples(m: float, r: float, backward: float = 3.0) -> float:
    """Return how many samples of a small model cost as much, training included, as one of an m times larger model. r:
    tokens inferred per token of training. backward: 3 as in the paper's first version (6 N D for training against
    2 N D), 1.5 as in the conference version.
    """
    return m + backward * (m - 1) / r
