"""From attempts to one answer: score an attempt, let attempts vote, pick.

An attempt's score comes from the scores of its steps: the last one, the lowest, or the product (--aggregate).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from test_time.attempts import Attempt


class Vote(NamedTuple):
    """The answer that won, and the sum of its weights."""

    answer: str | None
    total: float


def score(attempt: Attempt, aggregate: str = "last") -> float:
    """Of an attempt, from the scores of its steps; 0 if it has none. aggregate: last, min or product."""
    if not attempt.scores:
        return 0.0
    if aggregate == "min":
        return min(attempt.scores)
    if aggregate == "product":
        return math.prod(attempt.scores)
    return attempt.scores[-1]


def vote(attempts: Sequence[Attempt], weights: Sequence[float]) -> Vote:
    """The answer with the largest sum of weights; the first one given wins ties. (None, 0): no attempt gives one."""
    totals: dict[str, float] = defaultdict(float)
    for attempt, weight in zip(attempts, weights):
        if attempt.answer is not None:
            totals[attempt.answer] += weight
    if not totals:
        return Vote(None, 0.0)
    winner = max(totals, key=totals.__getitem__)
    return Vote(winner, totals[winner])


def vote_of_chains(attempts: Sequence[Attempt], weights: Sequence[float]) -> str | None:
    """Each chain votes for its own weighted answer, with that answer's sum."""
    totals: dict[str | None, float] = defaultdict(float)
    for chain in sorted({attempt.tree for attempt in attempts}):
        members = [i for i, attempt in enumerate(attempts) if attempt.tree == chain]
        result = vote([attempts[i] for i in members], [weights[i] for i in members])
        totals[result.answer] += result.total
    return max(totals, key=totals.__getitem__, default=None)


def best(attempts: Sequence[Attempt], values: Sequence[float]) -> str | None:
    """The answer of the attempt with the largest value, of those that give an answer. The first one wins ties."""
    answering = [i for i, attempt in enumerate(attempts) if attempt.answer is not None]
    if not answering:
        return None
    return attempts[max(answering, key=values.__getitem__)].answer


def pick(attempts: Sequence[Attempt], how: str, aggregate: str = "last") -> str | None:
    """The answer to a question, from all attempts at it. how: max, outcome, weighted, majority or chains."""
    scores = [score(attempt, aggregate) for attempt in attempts]
    if how == "max":
        return best(attempts, scores)
    if how == "outcome":
        return best(attempts, [attempt.outcome for attempt in attempts])
    if how == "chains":
        return vote_of_chains(attempts, scores)
    return vote(attempts, scores if how == "weighted" else [1.0] * len(attempts)).answer
