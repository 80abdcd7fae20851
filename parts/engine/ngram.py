"""A drafter without parameters: what followed the longest recent suffix, in this response or in its siblings.

The last n tokens of a response are looked up in everything that was written to the same prompt. If they occurred
before, what came next is drafted again; else the last n - 1 are looked up, and so on. The draft tokens are verified
like any others. The paper calls this the model-free drafter.
"""

from collections.abc import Hashable

import torch

from parts.devices import send
from parts.engine.interfaces import Proposer, Sequence


class NgramProposer(Proposer):
    """Drafts by suffix lookup. n: longest suffix that is looked up."""

    def __init__(self, n: int = 4):
        self.n = n
        # prompt -> suffix -> (the text that it occurs in, where that continues)
        self.tables: dict[tuple, dict[tuple, tuple[list[int], int]]] = {}
        self.entered: dict[tuple[Hashable, int], int] = {}  # (group, sample) -> how many of its tokens are in the table

    def load_weights(self) -> bool:
        """Forget the prompts of the last rollout."""
        self.tables = {}
        self.entered = {}
        return False

    def propose(self, engine, shape, draft_token) -> torch.Tensor:
        """Return (B, k) draft tokens; where nothing matches they are 0."""
        k = shape.plan.k
        drafts = [self.continuation(sequence, k) for sequence in engine.running]
        drafts += [[]] * (shape.batch_size - len(drafts))
        padded = [tokens + [0] * (k - len(tokens)) for tokens in drafts]
        return send(torch.tensor(padded), engine.lens.device)

    def continuation(self, sequence: Sequence, k: int) -> list[int]:
        """Return what followed the sequence's longest suffix that has occurred before: at most k tokens."""
        table = self.enter(sequence)
        for m in range(min(self.n, len(sequence.tokens)), 0, -1):
            match = table.get(tuple(sequence.tokens[-m:]))
            if match:
                text, end = match
                return text[end : end + k]
        return []

    def enter(self, sequence: Sequence) -> dict:
        """Enter the sequence's new tokens into its prompt's table, and return the table. The newest occurrence wins."""
        table = self.tables.setdefault(tuple(sequence.group.prompt), {})
        tokens = sequence.tokens
        name = (sequence.group.key, sequence.sample)
        for end in range(self.entered.get(name, 1), len(tokens)):
            for m in range(1, min(self.n, end) + 1):
                table[tuple(tokens[end - m : end])] = (tokens, end)
        self.entered[name] = max(1, len(tokens))
        return table
