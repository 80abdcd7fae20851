"""What the drafter learns from, and which token ids it may draft.

Data. Finished responses with the policy's hidden states, which the rollout computed anyway. Entry t of a sequence pairs
the token x_{t+1} and the feature h_t with the target h_{t+1} (drafter.py says why). Several sequences are packed into
one row: positions restart, and each entry knows its sequence, so that a block-diagonal mask keeps them apart.

Draft vocabulary (FR-Spec, arXiv 2502.14856). With V = 50,000 to 150,000 the LM head is nearly all that a draft step
reads: 28 M weights of SmolLM2-135M's head beside 4 M of the drafter. But a policy that writes about one kind of problem
uses few token ids. So the drafter's logits are made with the head's rows of N token ids, chosen anew before each rollout
from what the policy wrote lately. An id that is left out is never drafted; the policy still samples it, and the draft
token there is rejected. No token changes.

Legend: N entries of a packed batch, or token ids of the draft vocabulary; L tokens of a sequence, D model width, V
vocabulary.
"""

import math
import random
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from parts.engine.interfaces import Response


class Features(NamedTuple):
    """A sequence in the buffer."""

    ids: torch.Tensor  # (L,) prompt and response
    hidden: torch.Tensor  # (L-1, D) h_t of all positions but the last
    start: int  # where the response begins
    rollout: int = 0  # number of the rollout that made it


class Packed(NamedTuple):
    """Several sequences in one row. Entry t of each holds x_{t+1}, h_t and the target h_{t+1}, for t = 0 .. L-3: the
    last feature has nothing to predict.
    """

    ids: torch.Tensor  # (1, N)
    features: torch.Tensor  # (1, N, D)
    targets: torch.Tensor  # (1, N, D)
    positions: torch.Tensor  # (1, N)
    owner: torch.Tensor  # (N,) which sequence an entry belongs to
    counted: torch.Tensor  # (N,) bool: does it guess a token of the response?


class FeatureBuffer:
    """Finished responses with their features, bounded by bytes: the oldest leave first."""

    MAX_STRETCH = 2048  # tokens of a sequence that are learned at once: more would not fit the memory

    def __init__(self, limit: int = 256 << 20):
        self.limit = limit  # bytes
        self.rows: deque[Features] = deque()
        self.bytes = 0
        self.rollout = 0

    def begin(self, rollout: int) -> None:
        """A new rollout begins. Of the last one's rows the longest quarter stays, older ones go: the first to finish
        are short, and a drafter trained on them alone would forget the tail, which is where it is needed.
        """
        last = [row for row in self.rows if row.rollout == self.rollout]
        lengths = sorted(len(row.ids) for row in last)
        bar = lengths[len(lengths) * 3 // 4] if lengths else 0
        self.rows = deque(row for row in last if len(row.ids) >= bar)
        self.bytes = sum(row.hidden.nbytes for row in self.rows)
        self.rollout = rollout

    def add(self, response: Response) -> None:
        """Keep a response that has its hidden states."""
        if len(response.hidden) < 2:
            return  # one feature has no next one to predict
        ids = torch.tensor(response.prompt + response.tokens)
        self.rows.append(Features(ids, response.hidden, len(response.prompt), self.rollout))
        self.bytes += response.hidden.nbytes
        while self.bytes > self.limit and len(self.rows) > 1:
            self.bytes -= self.rows.popleft().hidden.nbytes

    def hold_out(self, tokens: int = 2048) -> list[Features]:
        """Take out every eighth row, together at most so many tokens: to be tried on, not learned from."""
        taken = []
        kept: deque[Features] = deque()
        for i, row in enumerate(self.rows):
            if i % 8 == 7 and sum(len(other.ids) for other in taken) + len(row.ids) <= tokens:
                taken.append(row)
            else:
                kept.append(row)
        self.rows = kept
        return taken

    def pack(self, tokens: int, rng: random.Random) -> Packed:
        """Random sequences, together about `tokens` long, and at most five times that. Of very long ones a random
        stretch.
        """
        picked = []
        total = 0
        while total < tokens:
            row = self.rows[rng.randrange(len(self.rows))]
            picked.append(self.stretch(row, min(self.MAX_STRETCH, 4 * tokens), rng))
            total += len(picked[-1].ids)
        return pack(picked)

    def stretch(self, row: Features, longest: int, rng: random.Random) -> Features:
        """At most so many tokens of it, not in the prompt alone, where nothing is learned."""
        latest = len(row.ids) - longest
        if latest <= 0:
            return row
        first = rng.randint(min(latest, max(0, row.start - longest // 2)), latest)
        end = first + longest
        return Features(row.ids[first:end], row.hidden[first : end - 1], max(0, row.start - first), row.rollout)


def pack(rows: list[Features]) -> Packed:
    """One packed batch of these sequences."""
    lengths = torch.tensor([len(row.ids) - 2 for row in rows])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    starts = torch.tensor([row.start for row in rows]).repeat_interleave(lengths)
    return Packed(
        ids=torch.cat([row.ids[1:-1] for row in rows])[None],
        features=torch.cat([row.hidden[:-1] for row in rows])[None],
        targets=torch.cat([row.hidden[1:] for row in rows])[None],
        positions=positions[None],
        owner=torch.arange(len(rows)).repeat_interleave(lengths),
        counted=positions >= starts - 2,  # entry t guesses token t+2
    )


def block_mask(owner, positions, groups: int, dtype) -> torch.Tensor:
    """Additive mask (1, 1, groups * N, N): an entry sees the earlier entries of its own sequence. Folded for
    `slot_attention`.
    """
    seen = (owner[:, None] == owner) & (positions[0][:, None] >= positions[0])
    mask = torch.zeros(seen.shape, dtype=dtype, device=owner.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(groups, 1)[None, None]


def scale_of(embedding: torch.Tensor) -> float:
    """What brings embeddings (V, D) to the size of features: a power of two, by which weights are multiplied without
    rounding.

    SmolLM2's embeddings are 0.1 and its features 2; unscaled, the drafter hardly hears what was written last, and takes
    a third more steps to learn as much.
    """
    size = embedding.detach().float().pow(2).mean().sqrt().item()
    return 2.0 ** -round(math.log2(size)) if size > 0 else 1.0


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
