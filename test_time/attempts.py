"""What a search handles: attempts at a question, its wishes for more of them, and the ledger of what the question cost.

    Attempt   whole, or only response_prefix_len
    Want      "continue these attempts"; they share one prefix, so the engine prefills it once
    Ledger    tokens, verified steps and seconds of one question; Sizes turns them into FLOPs

Nothing here computes: strategies.py says what is wanted, solver.py has it written and fills in the ledger.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parts.engine.interfaces import Response
from tasks import Problem


class Question(NamedTuple):
    """A problem, and the prompt that it is put to the policy with."""

    problem: Problem
    prompt: list[int]  # token ids; earlier attempts may stand at its end


@dataclass(frozen=True)
class Attempt:
    """An attempt at a question, whole or response_prefix_len."""

    seed: int
    tokens: tuple[int, ...] = ()  # so far
    scores: tuple[float, ...] = ()  # of its steps, by the process verifier
    outcome: float = 0.0  # by the outcome verifier
    done: bool = False
    answer: str | None = None  # when done; None: it gives none
    before: tuple[int, ...] = ()  # tokens between question and attempt: earlier attempts
    tree: int = 0  # the tree or chain that it belongs to


@dataclass(frozen=True)
class Want:
    """Continuations that a search asks for, one of each attempt. The attempts share one prefix."""

    attempts: list[Attempt]
    step: bool = False  # only to the end of the next step
    greedy: bool = False


# A search yields lists of Wants. For each Want it is sent the continued attempts, in order. It returns its attempts.
Search = Generator[list[Want], list[list[Attempt]], list[Attempt]]

# k -> the seed of attempt k: all randomness of a search
SeedOf = Callable[[Hashable], int]

# A strategy, its settings bound (`partial(parallel, n=8)`)
SearchStrategy = Callable[[SeedOf], Search]


def in_view(attempts: Iterable[Sequence[int]], again: Sequence[int]) -> tuple[int, ...]:
    """Token lists of whole attempts -> the tokens that show them in a prompt.

    Each loses its stop token; `again` follows it, the tokens that part attempts.
    """
    shown: list[int] = []
    for tokens in attempts:
        shown += tokens[:-1]
        shown += again
    return tuple(shown)


# ---------------------------------------------------------------- what it costs


class Sizes(NamedTuple):
    """Weights that a token (of the verifier: a step) is multiplied with."""

    policy: int
    drafter: int
    verifier: int


@dataclass
class Ledger:
    """What a question has cost, in tokens (verifier: in steps) and seconds."""

    prefill: int = 0
    decode: int = 0  # emitted
    rejected: int = 0  # policy tokens spent on drafts that were wrong
    drafter: int = 0
    verifier: int = 0
    seconds: float = 0.0

    def charge(self, response: Response, steps: int) -> None:
        """Enter a response and the steps of it that were verified. Its prefill is shared, and entered by group."""
        self.decode += len(response.tokens)
        self.rejected += response.rounds + response.drafts - len(response.tokens)
        if response.drafts:
            true_tokens = len(response.prompt) + len(response.tokens)  # that the drafter caught up with
            self.drafter += response.drafts + true_tokens
        self.verifier += steps

    def flops(self, sizes: Sizes) -> float:
        """2 x weights x tokens."""
        policy_tokens = self.prefill + self.decode + self.rejected
        return 2.0 * (sizes.policy * policy_tokens + sizes.drafter * self.drafter + sizes.verifier * self.verifier)

    def plus(self, other: "Ledger") -> "Ledger":
        """The costs of both."""
        return Ledger(
            prefill=self.prefill + other.prefill,
            decode=self.decode + other.decode,
            rejected=self.rejected + other.rejected,
            drafter=self.drafter + other.drafter,
            verifier=self.verifier + other.verifier,
            seconds=self.seconds + other.seconds,
        )
