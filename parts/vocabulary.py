"""Which words a drafter may guess: those that the policy's own responses use most (FR-Spec, arXiv 2502.14856).

With V = 50,000 to 150,000 the head is nearly all that a draft step reads: 28 M weights of SmolLM2-135M's head, beside
4 M of the drafter. But a policy that writes about one kind of problem uses few of its words. So the drafter's logits
are made with the head's rows of N words, chosen anew before each rollout from what the policy wrote lately. A word
that is left out is never guessed; the policy still samples it, and the guess there is wrong. No token changes.

Legend: V vocabulary, N words of the drafter.
"""

from collections.abc import Iterable

import torch

ALL_UP_TO = 4096  # words: a vocabulary up to this size is used whole
COVER = 0.95  # of what was written: so much the words shall hold, if --draft-vocab does not say how many
FEWEST, MOST = 4096, 16_384  # words, chosen so


class WordCounts:
    """How often each word was written lately."""

    FADE = 0.5  # of the counts, in a rollout

    def __init__(self, vocab: int, always: Iterable[int] = ()):
        """always: words that are never left out, such as those that end a response."""
        self.counts = torch.zeros(vocab)
        self.always = sorted(always)

    def add(self, tokens: list[int]) -> None:
        """Count a response."""
        self.counts += torch.bincount(torch.tensor(tokens, dtype=torch.long), minlength=len(self.counts))

    def fade(self) -> None:
        """A rollout begins: what was written before counts half."""
        self.counts *= self.FADE

    def choose(self, size: int = 0) -> torch.Tensor | None:
        """The words for the next rollout: ids (N,) int32, sorted; None: all. size: N; 0: as many as are worth it.

        Among words that were never written the low ids come first: tokenizers number words by how common they are.
        """
        vocab = len(self.counts)
        if (size or ALL_UP_TO) >= vocab:
            return None
        counts = self.counts.clone()
        counts[self.always] = torch.inf
        order = counts.argsort(descending=True, stable=True)
        if not size:
            written = self.counts[order].cumsum(0)
            covering = int((written < COVER * written[-1]).sum()) + 1
            size = min(-(-covering // FEWEST) * FEWEST, MOST, vocab)  # few sizes: another one ends all recordings
        return order[: max(size, len(self.always))].sort().values.int()
