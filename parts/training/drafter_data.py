"""What the drafter learns from, and which token ids it may draft.

Data. Finished responses with the policy's hidden states, which the rollout computed anyway. Entry t of a sequence pairs
the token x_{t+1} and the feature h_t with the target h_{t+1} (drafter.py says why). Several sequences are packed into
one row: positions restart, and each entry knows its sequence, so that a block-diagonal mask keeps them apart.

Draft vocabulary (FR-Spec, arXiv 2502.14856). With V = 50,000 to 150,000 the LM head is nearly all that a draft step
reads: 28 M weights of SmolLM2-135M's head beside 4 M of the drafter. But a policy that writes about one kind of problem
uses few token ids. So the drafter's logits are made with the head's rows of N token ids, chosen anew before each
rollout from what the policy wrote lately. An id that is left out is never drafted; the policy still samples it, and the
draft token there is rejected. No token changes.

Legend: N entries of a packed batch, or token ids of the draft vocabulary; L tokens of a sequence, D model width, V
vocabulary.
"""

import math
import random
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from parts.devices import send
from parts.engine.interfaces import Response


class SequenceFeatures(NamedTuple):
    """A finished sequence with its features."""

    ids: torch.Tensor  # (L,) prompt and response
    hidden: torch.Tensor  # (L-1, D) h_t of all positions but the last
    start: int  # where the response begins
    rollout: int = 0  # number of the rollout that made it


class PackedBatch(NamedTuple):
    """Several sequences in one row. Entry t of each holds x_{t+1}, h_t and the target h_{t+1}, for t = 0 .. L-3: the
    last feature has no next one to predict.
    """

    ids: torch.Tensor  # (1, N)
    features: torch.Tensor  # (1, N, D)
    targets: torch.Tensor  # (1, N, D)
    positions: torch.Tensor  # (1, N)
    sequence_ids: torch.Tensor  # (N,) which sequence an entry belongs to
    learned: torch.Tensor  # (M,) numbers of the entries that predict a token of the response

    def on(self, device) -> "PackedBatch":
        """Return the batch on the device."""
        return PackedBatch(*(send(tensor, device) for tensor in self))


# ---------------------------------------------------------------- features


class FeatureBuffer:
    """Finished sequences with their features, bounded by bytes: the oldest leave first. (The paper's data buffer.)"""

    MAX_WINDOW = 2048  # tokens of a sequence in a batch: more would not fit the memory

    def __init__(self, limit: int = 256 << 20):
        self.limit = limit  # bytes
        self.sequences: deque[SequenceFeatures] = deque()
        self.bytes = 0
        self.rollout = 0

    def begin_rollout(self, rollout: int, keep_all: bool = False) -> None:
        """A new rollout begins. Of the last one the longest quarter stays, older sequences go: the first to finish are
        short, and a drafter trained on them alone would forget the tail, which is where it is needed.

        keep_all: nothing goes. A drafter that started from random weights needs more data than a rollout has, and the
        policy changes less from step to step than such a drafter has to learn.
        """
        if keep_all:
            self.rollout = rollout
            return
        last = [sequence for sequence in self.sequences if sequence.rollout == self.rollout]
        lengths = sorted(len(sequence.ids) for sequence in last)
        shortest_kept = lengths[len(lengths) * 3 // 4] if lengths else 0
        self.sequences = deque(sequence for sequence in last if len(sequence.ids) >= shortest_kept)
        self.bytes = sum(sequence.hidden.nbytes for sequence in self.sequences)
        self.rollout = rollout

    def add(self, response: Response) -> None:
        """Add a response that has its hidden states."""
        if len(response.hidden) < 2:
            return  # one feature has no next one to predict
        ids = torch.tensor(response.prompt + response.tokens)
        self.sequences.append(SequenceFeatures(ids, response.hidden, len(response.prompt), self.rollout))
        self.bytes += response.hidden.nbytes
        while self.bytes > self.limit and len(self.sequences) > 1:
            self.bytes -= self.sequences.popleft().hidden.nbytes

    def hold_out(self, tokens: int = 2048) -> list[SequenceFeatures]:
        """Remove every eighth sequence of this rollout, together at most so many tokens, and return them for
        evaluation. Those of earlier rollouts have been learned from.
        """
        held_out = []
        kept: deque[SequenceFeatures] = deque()
        for i, sequence in enumerate(self.sequences):
            total = sum(len(other.ids) for other in held_out) + len(sequence.ids)
            if i % 8 == 7 and total <= tokens and sequence.rollout == self.rollout:
                held_out.append(sequence)
            else:
                kept.append(sequence)
        self.sequences = kept
        return held_out

    def pack(self, tokens: int, rng: random.Random) -> PackedBatch:
        """Return a batch of random sequences, together about `tokens` long and at most five times that. Of a very long
        sequence it takes a random window.
        """
        picked = []
        total = 0
        while total < tokens:
            sequence = self.sequences[rng.randrange(len(self.sequences))]
            picked.append(self.window(sequence, min(self.MAX_WINDOW, 4 * tokens), rng))
            total += len(picked[-1].ids)
        return pack(picked)

    def window(self, sequence: SequenceFeatures, longest: int, rng: random.Random) -> SequenceFeatures:
        """Return at most `longest` tokens of the sequence, not in the prompt alone, where nothing is learned."""
        latest = len(sequence.ids) - longest
        if latest <= 0:
            return sequence
        first = rng.randint(min(latest, max(0, sequence.start - longest // 2)), latest)
        end = first + longest
        start = max(0, sequence.start - first)
        return SequenceFeatures(sequence.ids[first:end], sequence.hidden[first : end - 1], start, sequence.rollout)


def pack(sequences: list[SequenceFeatures]) -> PackedBatch:
    """Pack the sequences into one row."""
    lengths = torch.tensor([len(sequence.ids) - 2 for sequence in sequences])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    starts = torch.tensor([sequence.start for sequence in sequences]).repeat_interleave(lengths)
    return PackedBatch(
        ids=torch.cat([sequence.ids[1:-1] for sequence in sequences])[None],
        features=torch.cat([sequence.hidden[:-1] for sequence in sequences])[None],
        targets=torch.cat([sequence.hidden[1:] for sequence in sequences])[None],
        positions=positions[None],
        sequence_ids=torch.arange(len(sequences)).repeat_interleave(lengths),
        learned=(positions >= starts - 2).nonzero()[:, 0],  # entry t predicts token t+2
    )


def block_mask(sequence_ids, positions, groups: int, dtype) -> torch.Tensor:
    """Return the additive mask (1, 1, groups * N, N) under which an entry sees the earlier entries of its own sequence,
    folded for `slot_attention`.
    """
    seen = (sequence_ids[:, None] == sequence_ids) & (positions[0][:, None] >= positions[0])
    mask = torch.zeros(seen.shape, dtype=dtype, device=sequence_ids.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(groups, 1)[None, None]


def embedding_scale(embedding: torch.Tensor) -> float:
    """Return the factor that brings embeddings (V, D) to the size of features: a power of two, so that multiplying
    weights by it does not round.

    SmolLM2's embeddings are 0.1 and its features 2; unscaled, the drafter hardly sees the last token, and takes a third
    more steps to learn as much.
    """
    size = embedding.detach().float().pow(2).mean().sqrt().item()
    return 2.0 ** -round(math.log2(size)) if size > 0 else 1.0


# ---------------------------------------------------------------- draft vocabulary

WHOLE_VOCAB_UP_TO = 4096  # token ids: a vocabulary up to this size is used whole
COVER = 0.95  # share of the written tokens that the draft vocabulary covers, if --draft-vocab does not set its size
MIN_DRAFT_VOCAB, MAX_DRAFT_VOCAB = 4096, 16_384  # its size, chosen so


class TokenCounts:
    """Counts how often each token id was written lately, and chooses the draft vocabulary."""

    FADE = 0.5  # of the counts, in a rollout

    def __init__(self, vocab: int, always: Iterable[int] = ()):
        """always: ids that are never left out, such as stop tokens."""
        self.counts = torch.zeros(vocab)
        self.always = sorted(always)

    def add(self, tokens: list[int]) -> None:
        """Count the tokens of a response."""
        self.counts += torch.bincount(torch.tensor(tokens, dtype=torch.long), minlength=len(self.counts))

    def fade(self) -> None:
        """A rollout begins: earlier tokens count half."""
        self.counts *= self.FADE

    def choose(self, size: int = 0) -> torch.Tensor | None:
        """Return the draft vocabulary for the next rollout: ids (N,) int32, sorted; None: all of them.

        size: N; 0: as many as it takes to cover COVER of the written tokens. Among ids that were never written the low
        ones come first: tokenizers number tokens by how common they are.
        """
        vocab = len(self.counts)
        if (size or WHOLE_VOCAB_UP_TO) >= vocab:
            return None
        counts = self.counts.clone()
        counts[self.always] = torch.inf
        order = counts.argsort(descending=True, stable=True)
        if not size:
            written = self.counts[order].cumsum(0)
            covering = int((written < COVER * written[-1]).sum()) + 1
            rounded_up = -(-covering // MIN_DRAFT_VOCAB) * MIN_DRAFT_VOCAB  # few sizes: a new one ends all recordings
            size = min(rounded_up, MAX_DRAFT_VOCAB, vocab)
        return order[: max(size, len(self.always))].sort().values.int()
