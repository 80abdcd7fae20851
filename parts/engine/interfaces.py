"""What the parts of the rollout promise each other: what goes in and out, what a strategy is, what a drafter is.

    Group -> Engine -> Response          rollout.py
    Strategy.choose(rows) -> Draft       how far to draft the next round; strategy.py has those that learn
    Drafts.propose(k) -> (B, k)          the guesses themselves; drafter.py and ngram.py have the two kinds
    RoundReport -> Strategy.observe      what came of it

Legend: B live rows, k draft length, V vocabulary, D model width.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MAX_DRAFTS = 16  # drafts of a row in a round, at most


# ---------------------------------------------------------------- what goes in and what comes out


@dataclass
class Group:
    """A prompt and the seeds of the samples wanted from it."""

    key: Hashable  # the caller's name for it, e.g. ("train", 17)
    prompt: list[int]
    seeds: list[int]
    begun: int = 0  # tokens at the prompt's end that belong to the response: noise and max_new go on behind them


@dataclass
class Response:
    """A finished sample of a group."""

    group: Hashable  # the group's key
    sample: int  # which of the group's seeds
    prompt: list[int]
    tokens: list[int]  # with the stop token, if one came
    logprobs: torch.Tensor  # (len(tokens),) float32, cpu: under the policy that made them, at the sampling temperature
    stopped: bool  # False: cut at max_new
    hidden: torch.Tensor | None = None  # (len(prompt) + len(tokens) - 1, D), cpu: h_t of all positions but the last
    grade: object = None  # a tasks.Grade, filled in by whoever grades
    rounds: int = 0  # that it took; each cost the policy one token and the drafts
    drafts: int = 0  # that were verified for it, siblings too


@dataclass
class Row:
    """The host's view of a live row."""

    group: Group
    sample: int
    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    drafts: int = 0

    @property
    def length(self) -> int:
        """Valid cache entries: all tokens but the newest."""
        return len(self.group.prompt) + len(self.tokens) - 1


@dataclass
class Stats:
    """What a rollout took."""

    rounds: int = 0
    spec_rounds: int = 0  # rounds with drafts
    tokens: int = 0
    spec_row_rounds: int = 0  # rows, summed over speculative rounds
    spec_tokens: int = 0  # tokens that came of speculative rounds
    spec_drafts: int = 0  # k, summed over the rows of speculative rounds
    seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)  # by depth: guesses that were reached
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)  # by depth: guesses that were right


def describe_stats(s: Stats) -> str:
    """One line about a rollout."""
    text = f"{s.rounds} rounds, {s.tokens} tokens, {s.tokens / max(1e-9, s.seconds):.0f} tokens/s, "
    if s.spec_row_rounds:
        depths = " ".join(f"{right / tried:.2f}" for right, tried in zip(s.accepted, s.drafted) if tried)
        text += f"{s.spec_tokens / s.spec_row_rounds:.2f} tokens per row and speculative round "
        text += f"({s.spec_rounds / s.rounds:.0%} of rounds), acceptance by depth {depths}, "
    return text + f"draft {s.draft_seconds:.2f} s, verify {s.verify_seconds:.2f} s"


# ---------------------------------------------------------------- what a strategy and a drafter are


@dataclass(frozen=True)
class Draft:
    """How to draft one round. kind: a key of Engine.drafters; k: draft length, 0 is plain decoding."""

    kind: str = ""
    k: int = 0


class RoundReport(NamedTuple):
    """What came of a round, for the strategy."""

    rows: int
    draft: Draft
    seconds: float
    tried: list[int]  # k numbers, by depth: rows whose guess at that depth was reached
    right: list[int]  # k numbers, by depth: rows whose guess at that depth was accepted
    first: bool = False  # it took longer than the next ones like it will (parts/graphs.py)


class Strategy:
    """How far to draft. This one always drafts alike (by default not at all); strategy.py has those that learn.

    A strategy can change the time that a rollout takes, never a token of it.
    """

    def __init__(self, draft: Draft | None = None):
        self.draft = draft or Draft()

    def begin(self, changed: Iterable[str]) -> None:
        """A rollout begins, and the drafters of these kinds are not what they were."""

    def choose(self, live: list[Row]) -> Draft:
        """How to draft the next round of these rows."""
        return self.draft

    def observe(self, report: RoundReport) -> None:
        """What came of it."""


class Drafts:
    """What the engine (a rollout.Engine) asks of a drafter: drafter.LearnedDrafts, ngram.NGramDrafts.

    Rows are numbers of slots.
    """

    needs_hidden = False  # whether it reads the policy's hidden states
    asks_host = True  # whether `propose` looks at more than its shape and tensors, so that no graph can replay it

    def begin(self) -> bool:
        """A rollout begins: whatever was copied from weights is copied anew -> whether it lies elsewhere now."""
        return False

    def reserve(self, engine, slots: int, room: int) -> None:
        """Make room for so many rows of so many tokens."""

    def admit(self, rows: slice) -> None:
        """New responses begin in these rows."""

    def move(self, source: int, target: int) -> None:
        """The response in row `source` goes on in row `target`."""

    def missing(self, live: list[Row]) -> int:
        """How many entries `propose` has to catch up with, in the row that is furthest behind; from now on none."""
        return 0

    def propose(self, engine, shape, guess: Callable) -> torch.Tensor:
        """k guesses for each row, (B, k). shape: a graphs.Shape.

        guess(depth, logits (B, 1, V)) -> (B, 1) draws from a drafter's logits; one that has none need not call it.
        """
        raise NotImplementedError
