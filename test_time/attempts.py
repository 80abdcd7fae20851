"""What a search handles: attempts at a question, requests to continue them, the answer picked from them, and the costs.

    Attempt   finished or partial
    Request   "continue these attempts"; they share one prefix, which the engine prefills once
    pick      the answer to the question, from all attempts at it
    Ledger    tokens, verified steps and seconds of one question; ModelSizes turns them into FLOPs

Nothing here runs a model: strategies.py decides what is requested, solver.py runs it and fills in the ledger.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from parts.engine.interfaces import Response


@dataclass(frozen=True)
class Attempt:
    """An attempt at a question, finished or partial."""

    seed: int
    tokens: tuple[int, ...] = ()  # so far
    scores: tuple[float, ...] = ()  # of its steps, by the process verifier
    outcome: float = 0.0  # by the outcome verifier
    done: bool = False
    answer: str | None = None  # when done; None: it gives no answer
    earlier: tuple[tuple[int, ...], ...] = ()  # tokens of the earlier attempts that the prompt shows
    tree: int = 0  # the tree or chain that it belongs to


@dataclass(frozen=True)
class Request:
    """A search's request for one continuation of each of these attempts, which share one prefix."""

    attempts: list[Attempt]
    step: bool = False  # only to the end of the next step
    greedy: bool = False


# A search yields lists of Requests. For each it is sent the continued attempts, in order. It returns its attempts.
Search = Generator[list[Request], list[list[Attempt]], list[Attempt]]
SeedFunction = Callable[[Hashable], int]  # k -> the seed of attempt k: all randomness of a search
SearchStrategy = Callable[[SeedFunction], Search]  # a strategy with its settings bound: `partial(parallel, n=8)`


def shown_in_prompt(attempts: Iterable[Sequence[int]], separator: Sequence[int]) -> list[int]:
    """Return the tokens that show finished attempts in a prompt: each without its last token (the stop
    token, unless the limit has cut it), then the separator.
    """
    shown: list[int] = []
    for tokens in attempts:
        shown += [*tokens[:-1], *separator]
    return shown


def score(attempt: Attempt, aggregate: str = "last") -> float:
    """Return an attempt's score, made from those of its steps; 0 if it has none. aggregate: last, min or product."""
    if not attempt.scores:
        return 0.0
    return {"last": attempt.scores[-1], "min": min(attempt.scores), "product": math.prod(attempt.scores)}[aggregate]


def vote(answers: Sequence[str | None], weights: Sequence[float]) -> tuple[str | None, float]:
    """Return (the answer with the largest sum of weights, that sum). The first one given wins ties; None counts as no
    answer, and (None, 0) is returned if there is no other.
    """
    totals: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights):
        if answer is not None:
            totals[answer] += weight
    winner = max(totals, key=totals.__getitem__, default=None)
    return winner, totals.get(winner, 0.0)


def pick(attempts: Sequence[Attempt], how: str, aggregate: str = "last") -> str | None:
    """Return the answer to a question, from all attempts at it. how: max, outcome, weighted, majority or chains."""
    answers = [attempt.answer for attempt in attempts]
    scores = [score(attempt, aggregate) for attempt in attempts]
    if how in ("max", "outcome"):
        values = scores if how == "max" else [attempt.outcome for attempt in attempts]
        answering = [i for i, answer in enumerate(answers) if answer is not None]
        return answers[max(answering, key=values.__getitem__)] if answering else None
    if how == "chains":
        votes = []
        for chain in sorted({attempt.tree for attempt in attempts}):
            members = [i for i, attempt in enumerate(attempts) if attempt.tree == chain]
            votes.append(vote([answers[i] for i in members], [scores[i] for i in members]))
        answers, scores = zip(*votes)
    return vote(answers, [1.0] * len(attempts) if how == "majority" else scores)[0]


class ModelSizes(NamedTuple):
    """The number of weights that a token (of the verifier: a step) is multiplied with."""

    policy: int  # without its head
    head: int  # for tokens that are sampled or verified; to prefill a prompt takes no logits
    drafter: int  # without a head
    draft_head: int  # the rows of the policy's head that belong to the draft vocabulary
    verifier: int


@dataclass
class Ledger:
    """What a question has cost."""

    prefill: int = 0  # policy tokens
    decode: int = 0  # policy tokens emitted
    rejected: int = 0  # policy tokens spent on rejected draft tokens
    drafter: int = 0  # drafter tokens: those it reads and those it drafts
    drafted: int = 0  # draft tokens
    verifier: int = 0  # steps
    seconds: float = 0.0

    def charge(self, response: Response, steps: int) -> None:
        """Add a response, and the steps of it that were verified. Prompts are shared, and added by group."""
        self.decode += len(response.tokens)
        self.rejected += response.rounds + response.draft_tokens - len(response.tokens)
        if response.draft_tokens:
            self.drafter += response.draft_tokens + len(response.tokens)
            self.drafted += response.draft_tokens
        self.verifier += steps

    def flops(self, sizes: ModelSizes) -> float:
        """Return 2 x weights x tokens."""
        sampled = self.decode + self.rejected
        policy = sizes.policy * (self.prefill + sampled) + sizes.head * sampled
        drafter = sizes.drafter * self.drafter + sizes.draft_head * self.drafted
        return 2.0 * (policy + drafter + sizes.verifier * self.verifier)

    def without_speculation(self) -> "Ledger":
        """Return what the same tokens cost in plain decoding. (Seconds are those that it took.)"""
        return replace(self, rejected=0, drafter=0, drafted=0)

    def __add__(self, other: "Ledger") -> "Ledger":
        """Return the costs of both."""
        return Ledger(*[mine + theirs for mine, theirs in zip(astuple(self), astuple(other))])
