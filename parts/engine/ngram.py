"""Drafts without parameters: what followed the longest recent suffix, in this response or in its siblings.

The last n tokens of a response are looked up in all that was written to the same prompt; if they occurred before, what
came next is guessed again; else the last n - 1, and so on. The guesses are verified like any others.
"""

from collections.abc import Hashable

import torch

from parts.engine.interfaces import Drafts, Row


class NGramDrafts(Drafts):
    """n: longest suffix that is looked up."""

    def __init__(self, n: int = 4):
        self.n = n
        # prompt -> suffix -> (the text that it occurs in, where that goes on)
        self.tables: dict[tuple, dict[tuple, tuple[list[int], int]]] = {}
        self.entered: dict[tuple[Hashable, int], int] = {}  # (group, sample) -> how many of its tokens are in the table

    def begin(self) -> bool:
        """Forget the last rollout's prompts."""
        self.tables = {}
        self.entered = {}
        return False

    def propose(self, engine, shape, guess) -> torch.Tensor:
        """As Drafts.propose. Where nothing matches, the guesses are 0."""
        k = shape.draft.k
        drafts = [self.continuation(row, k) for row in engine.live]
        drafts += [[]] * (shape.rows - len(drafts))
        padded = [tokens + [0] * (k - len(tokens)) for tokens in drafts]
        return torch.tensor(padded, device=engine.lens.device)  # (B, k)

    def continuation(self, row: Row, k: int) -> list[int]:
        """What followed the row's longest suffix that has occurred before: at most k tokens."""
        table = self.learn(row)
        for m in range(min(self.n, len(row.tokens)), 0, -1):
            match = table.get(tuple(row.tokens[-m:]))
            if match:
                text, end = match
                return text[end : end + k]
        return []

    def learn(self, row: Row) -> dict:
        """Enter the row's new tokens in its prompt's table, which is returned. The newest occurrence wins."""
        table = self.tables.setdefault(tuple(row.group.prompt), {})
        tokens = row.tokens
        name = (row.group.key, row.sample)
        for end in range(self.entered.get(name, 1), len(tokens)):
            for m in range(1, min(self.n, end) + 1):
                table[tuple(tokens[end - m : end])] = (tokens, end)
        self.entered[name] = max(1, len(tokens))
        return table
