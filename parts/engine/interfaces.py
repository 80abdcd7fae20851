"""The data types of a rollout: what goes in, what comes out, and what a strategy and a drafter must offer.

    Group -> Engine -> Response                   rollout.py
    Strategy.choose(running) -> DraftPlan         how far to draft in the next round; strategy.py has those that learn
    Proposer.propose(...) -> (B, k)               the draft tokens; EagleProposer (drafter.py), NgramProposer (ngram.py)
    RoundReport -> Strategy.observe               what the round accepted, and how long it took

Legend: B running sequences, k draft length, V vocabulary, D model width.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MAX_DRAFT_LEN = 16  # draft tokens of a sequence in one round, at most


# ---------------------------------------------------------------- what goes in and what comes out


@dataclass
class Group:
    """A prompt and the seeds of the samples wanted from it."""

    key: Hashable  # the caller's name for it, e.g. ("train", 17)
    prompt: list[int]
    seeds: list[int]
    # tokens at the end of the prompt that already belong to the response: noise and max_new continue behind them
    response_prefix_len: int = 0
    problem: object = None  # the tasks.Problem that the prompt asks, for the caller; the engine does not look at it


@dataclass
class Response:
    """A finished sample of a group."""

    group: Hashable  # the group's key
    sample: int  # index into the group's seeds
    prompt: list[int]
    tokens: list[int]  # with the stop token, if one was sampled
    logprobs: torch.Tensor  # (len(tokens),) float32, cpu: under the policy that made them, at the sampling temperature
    stopped: bool  # False: cut at max_new
    hidden: torch.Tensor | None = None  # (len(prompt) + len(tokens) - 1, D), cpu: h_t of all positions but the last
    problem: object = None  # the group's
    grade: object = None  # a tasks.Grade, set by the caller that grades
    rounds: int = 0  # rounds that it took
    draft_tokens: int = 0  # draft tokens that were verified for it, k in a round


@dataclass
class Sequence:
    """What the host knows of a running sequence."""

    group: Group
    sample: int
    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    draft_tokens: int = 0

    @property
    def length(self) -> int:
        """Number of valid cache entries: all tokens but the newest have one."""
        return len(self.group.prompt) + len(self.tokens) - 1


class RoundTrace(NamedTuple):
    """One sequence's part of a round, for callers that want to show it."""

    sequence: Sequence  # with the new tokens
    drafts: list[int]  # the k draft tokens that were verified; [] in a plain round, and where a tree was verified
    emitted: list[int]  # the new tokens: the accepted draft tokens, then one token that the policy sampled itself


@dataclass
class Stats:
    """Totals of one rollout."""

    rounds: int = 0
    spec_rounds: int = 0  # rounds with draft tokens
    tokens: int = 0
    spec_sequence_rounds: int = 0  # running sequences, summed over the speculative rounds
    spec_tokens: int = 0  # tokens emitted by speculative rounds
    spec_drafts: int = 0  # k, summed over the sequences of speculative rounds
    seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT_LEN)  # by depth: draft tokens reached
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT_LEN)  # by depth: draft tokens accepted


def describe_stats(s: Stats) -> str:
    """Return one line about a rollout."""
    text = f"{s.rounds} rounds, {s.tokens} tokens, {s.tokens / max(1e-9, s.seconds):.0f} tokens/s, "
    if s.spec_sequence_rounds:
        depths = " ".join(f"{accepted / drafted:.2f}" for accepted, drafted in zip(s.accepted, s.drafted) if drafted)
        text += f"{s.spec_tokens / s.spec_sequence_rounds:.2f} tokens per sequence and speculative round "
        text += f"({s.spec_rounds / s.rounds:.0%} of rounds), acceptance by depth {depths}, "
    return text + f"draft {s.draft_seconds:.2f} s, verify {s.verify_seconds:.2f} s"


# ---------------------------------------------------------------- strategies


@dataclass(frozen=True)
class DraftPlan:
    """How to draft in one round."""

    method: str = ""  # a key of Engine.proposers, e.g. "eagle" or "ngram"
    k: int = 0  # draft length; 0: plain decoding


class RoundReport(NamedTuple):
    """What a round did, for the strategy."""

    batch_size: int
    plan: DraftPlan
    seconds: float
    drafted: list[int]  # k numbers, by depth: sequences whose draft token at that depth was reached
    accepted: list[int]  # k numbers, by depth: sequences whose draft token at that depth was accepted
    warmup: bool = False  # it took longer than later rounds of its shape will (cuda_graphs.py)


class Strategy:
    """Chooses how far to draft. This one always uses the same plan (by default plain decoding).

    A strategy can change the time that a rollout takes, but never a token of it.
    """

    def __init__(self, plan: DraftPlan | None = None):
        self.plan = plan or DraftPlan()

    def drafters_changed(self, methods: Iterable[str]) -> None:
        """A rollout begins, and the drafters of these methods have other weights than before."""

    def choose(self, running: list[Sequence]) -> DraftPlan:
        """Return the plan for the next round of these sequences."""
        return self.plan

    def observe(self, report: RoundReport) -> None:
        """Learn from a finished round."""


# ---------------------------------------------------------------- drafters


class Proposer:
    """What the engine (rollout.Engine) asks of a drafter. Slots are numbers of the engine's slots."""

    needs_hidden = False  # whether it reads the policy's hidden states
    needs_host = True  # whether `propose` reads more than its shape and device tensors: then no graph can replay it

    def load_weights(self) -> bool:
        """A rollout begins: copy anew whatever is copied from weights. Return whether any copy has a new address."""
        return False

    def reserve(self, engine, slots: int, max_len: int) -> None:
        """Allocate for so many sequences of so many tokens."""

    def read_prompts(self, slots: slice, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Prompts were prefilled in these slots: tokens (n, L + 1), the policy's hidden states (n, L, D) of the first
        L.
        """

    def copy(self, source: int, targets: slice, length: int) -> None:
        """Copy the first `length` entries of slot `source` to the slots `targets`."""

    def catch_up_len(self, running: list[Sequence]) -> int:
        """Return how many entries `propose` must compute first, for the sequence that is furthest behind."""
        return 0

    def caught_up(self, running: list[Sequence]) -> None:
        """A round that drafted with this proposer has run: all entries up to the sequences' lengths are computed."""

    def propose(self, engine, shape, draft_token: Callable) -> torch.Tensor:
        """Return k draft tokens for each sequence, (B, k). shape: a cuda_graphs.RoundShape.

        draft_token(depth, logits (B, 1, N), token_ids (N,) or None) -> (B, 1) samples from the drafter's logits; a
        proposer without logits need not call it.
        """
        raise NotImplementedError
