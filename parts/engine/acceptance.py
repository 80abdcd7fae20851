"""How draft tokens are verified. A rule is passed to the engine: `Engine(..., rule=Ratio)`.

Coupled (the default)   accept a draft token if it is the token that the policy itself samples there, see rollout.py

Ratio   the textbook rule (Leviathan et al., arXiv 2211.17192): accept a draft token d ~ q with probability
        min(1, p(d) / q(d)), else sample from max(p - q, 0). The distribution is the policy's, but the tokens are not
        those of plain decoding, so they cannot be checked one by one. It accepts about as much. Kept for comparison.

Tree    each draft token has width - 1 siblings, the next best tokens of the drafter under the same noise: leaves beside
        the chain. If the policy leaves the chain for a sibling, the sibling is accepted too, and its keys and values
        move into the place of the chain's. Tokens are those of plain decoding. Slower than the chain at every batch
        size measured.

The last two keep logits and noise of all columns in whole (B, T, V) tensors: they are for study, at small vocabularies.

Legend: B running sequences, k draft length, T tokens that the policy reads (k + 1 in a chain), V vocabulary, D model
width, N token ids of the draft vocabulary.
Left out: deeper trees than a chain with siblings.
"""

import functools
from typing import NamedTuple

import torch

from parts.cli import UserError
from parts.engine.interfaces import MAX_DRAFT_LEN
from parts.engine.kv_cache import TreeShape
from parts.engine.sampling import (
    Sampling,
    all_token_ids,
    logprob_of,
    noise_for,
    sample,
    sample_columns,
    scale_and_filter,
    shared_noise,
)

# ---------------------------------------------------------------- coupled, the default


class Verification(NamedTuple):
    """What the policy samples in a round, and how much of the draft it accepts."""

    tokens: torch.Tensor  # (B, k+1) its own samples; the first accepted + 1 of each sequence count
    logprobs: torch.Tensor  # (B, k+1) of them
    hidden: torch.Tensor  # (B, k+1, D) its hidden states where they were sampled
    accepted: torch.Tensor  # (B,) draft tokens


class Coupled:
    """The accept rule of one round: a draft token is accepted if it is what the policy itself samples there."""

    def __init__(self, sampling: Sampling, seeds: torch.Tensor, index: torch.Tensor, vocab: int):
        """seeds (B, 2); index (B, k+1): the number in its response of the token that each column samples; vocab: V."""
        self.sampling = sampling
        self.seeds = seeds
        self.index = index
        self.vocab = vocab
        self.noise = shared_noise(sampling, seeds, index, vocab)  # (B, k+1, V), or None

    def draft_token(self, depth: int, logits: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Sample a draft token (B, 1) from the drafter's logits (B, 1, N), with the noise that the policy will use.

        token_ids: see `sample`.
        """
        noise = self.noise[:, depth] if self.noise is not None and token_ids is None else None
        index = self.index[:, depth]
        y, _ = sample(logits[:, 0], self.sampling, self.seeds, index, token_ids, noise, with_logprobs=False)
        return y[:, None]

    def verify_inputs(self, cur: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, TreeShape | None]:
        """Return what the policy reads: cur (B, 1), drafts (B, k) -> ids (B, T), and their shape (None: a chain)."""
        return torch.cat([cur, drafts], 1), None

    def verify(self, engine, ids: torch.Tensor, hidden: torch.Tensor) -> Verification:
        """Sample the policy's tokens and count accepted ones. engine: a rollout.Engine; ids (B, T), hidden (B, T, D).

        The head over V token ids and the noise are expensive, so columns go through them in pieces, and a sequence
        whose draft token was rejected in one piece is left out of the next: its later columns would not count.
        """
        step = max(1, engine.max_logits // (len(ids) * self.vocab))
        if step >= ids.shape[1]:
            tokens, logprobs = sample_columns(engine.head(hidden), self.sampling, self.seeds, self.index, self.noise)
        else:
            tokens, logprobs = self.sample_in_pieces(engine, ids, hidden, step)
        accepted = (tokens[:, :-1] == ids[:, 1:]).long().cumprod(1).sum(1)
        return Verification(tokens, logprobs, hidden, accepted)

    def sample_in_pieces(self, engine, ids, hidden, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample `step` columns at a time -> tokens and log-probabilities (B, T), 0 where a sequence was left out."""
        tokens = torch.zeros_like(ids)
        logprobs = torch.zeros(ids.shape, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)  # the sequences that still count
        for first in range(0, ids.shape[1], step):
            part = slice(first, first + step)
            logits = engine.head(hidden[rows, part])
            y, logp = sample_columns(logits, self.sampling, self.seeds[rows], self.index[rows, part])
            tokens[rows, part] = y
            logprobs[rows, part] = logp
            drafts = ids[rows, 1 + first : 1 + first + step]  # one shorter in the last piece
            if engine.bucketed:  # sizes must not depend on what the tensors hold: a graph replays them
                continue
            rows = rows[(y[:, : drafts.shape[1]] == drafts).all(1)]
            if not len(rows):
                break
        return tokens, logprobs


# ---------------------------------------------------------------- by probability ratio


def verify_ratio(logits, q_logits, drafts, sampling, seeds, index):
    """Speculative sampling by probability ratio.

    logits (B, k+1, V) of the policy, q_logits (B, k, V) that the drafts (B, k) were sampled from, index (B, k+1).
    -> tokens y (B, k+1), log-probabilities (B, k+1), accepted (B,): y[:, :accepted + 1] count.
    """
    scaled, allowed = scale_and_filter(logits, sampling)
    p = allowed.softmax(-1)
    q = scale_and_filter(q_logits, sampling)[1].softmax(-1)
    chosen = drafts[..., None]
    all_ids = all_token_ids(p.shape[-1], p.device)
    gumbel = noise_for(sampling, seeds, index[:, :-1], all_ids[:1], stream=2)
    u = torch.exp(-torch.exp(-gumbel))  # the uniform number that the Gumbel noise was made of; (B, k, 1)
    kept = u * q.gather(-1, chosen) < p[:, :-1].gather(-1, chosen)
    accepted = kept[..., 0].long().cumprod(1).sum(1)
    residual = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], 1)  # after the last draft nothing is subtracted
    y = (residual.log() + noise_for(sampling, seeds, index, all_ids)).argmax(-1)
    is_draft = torch.arange(drafts.shape[1], device=drafts.device) < accepted[:, None]
    y = torch.cat([torch.where(is_draft, drafts, y[:, :-1]), y[:, -1:]], 1)
    return y, logprob_of(scaled, y), accepted


class Ratio(Coupled):
    """Acceptance by probability ratio. Without a q (greedy sampling, n-gram drafts) equality decides, as in Coupled."""

    def __init__(self, sampling, seeds, index, vocab):
        super().__init__(sampling, seeds, index, vocab)
        self.q_logits: list[torch.Tensor] = []  # (B, 1, V) of each depth
        # drafts and residual must be sampled with different noise, or the emitted token does not follow p
        self.draft_noise = noise_for(sampling, seeds, index, all_token_ids(vocab, seeds.device), stream=1)

    def draft_token(self, depth, logits, token_ids=None):
        """Sample a draft token with noise of its own, and keep the logits for the ratio."""
        if token_ids is not None:  # ids outside the draft vocabulary have probability 0
            never = logits.new_full((*logits.shape[:2], self.vocab), -torch.inf)
            logits = never.index_copy(2, token_ids.long(), logits)
        self.q_logits.append(logits)
        _, allowed = scale_and_filter(logits, self.sampling)
        return (allowed + at_depth(self.draft_noise, depth)).argmax(-1)

    def verify(self, engine, ids, hidden):
        """Accept by `verify_ratio`."""
        if not self.q_logits or self.sampling.temperature == 0:
            return super().verify(engine, ids, hidden)
        q_logits = torch.cat(self.q_logits, 1)
        logits = engine.head(hidden)
        y, logprobs, accepted = verify_ratio(logits, q_logits, ids[:, 1:], self.sampling, self.seeds, self.index)
        return Verification(y, logprobs, hidden, accepted)


def at_depth(noise: torch.Tensor, depth: int) -> torch.Tensor:
    """Return the noise of one column, (B, 1, V); greedy sampling has none."""
    return noise[:, depth : depth + 1] if noise.ndim else noise


# ---------------------------------------------------------------- trees


@functools.lru_cache
def chain_with_siblings(k: int, width: int, device) -> TreeShape:
    """Return the shape of a chain of k draft tokens with width - 1 siblings each: T = 1 + k * width entries, first cur
    and the chain, then the siblings.
    """
    chain = list(range(k + 1))
    siblings = [depth for depth in chain[1:] for _ in range(width - 1)]
    depth = torch.tensor(chain + siblings)
    columns = torch.arange(len(depth))
    above = (columns <= k) & (depth < depth[:, None])
    sees = above | (columns == columns[:, None])  # the chain above it, and itself
    return TreeShape(depth.to(device), sees.to(device))


class Tree(Coupled):
    """A chain with siblings. `partial(Tree, width=3)` gives each draft token two siblings."""

    def __init__(self, sampling, seeds, index, vocab, width: int = 2):
        super().__init__(sampling, seeds, index, vocab)
        self.all_noise = self.noise
        if self.all_noise is None:
            self.all_noise = noise_for(sampling, seeds, index, all_token_ids(vocab, seeds.device))
        self.width = width
        self.k = index.shape[1] - 1
        self.siblings: list[torch.Tensor] = []  # (B, 1, width - 1) of each depth
        self.shape: TreeShape | None = None
        if self.k * width > MAX_DRAFT_LEN:
            raise UserError(f"draft length {self.k} x width {width}: at most {MAX_DRAFT_LEN} draft tokens fit a round")

    def draft_token(self, depth, logits, token_ids=None):
        """Return the best token, which continues the chain; keep the next best as its siblings."""
        _, allowed = scale_and_filter(logits, self.sampling)
        noise = at_depth(self.all_noise, depth)
        if token_ids is not None and noise.ndim:
            noise = noise[..., token_ids.long()]
        best = (allowed + noise).topk(self.width).indices  # (B, 1, width)
        if token_ids is not None:
            best = token_ids[best].long()
        self.siblings.append(best[..., 1:])
        return best[..., 0]

    def verify_inputs(self, cur, drafts):
        """cur (B, 1), drafts (B, k) -> ids (B, 1 + k * width): cur, chain, siblings by depth; and their shape."""
        if not self.siblings:  # a proposer without logits (n-grams) has no second best
            self.siblings = [drafts[:, i : i + 1, None].expand(-1, -1, self.width - 1) for i in range(self.k)]
        self.shape = chain_with_siblings(self.k, self.width, cur.device)
        return torch.cat([cur, drafts, torch.cat(self.siblings, 1).flatten(1)], 1), self.shape

    def verify(self, engine, ids, hidden):
        """Verify the chain as Coupled does; where the policy leaves it for a sibling, accept that one, too."""
        if self.shape is None:
            return super().verify(engine, ids, hidden)
        noise = self.all_noise[:, self.shape.depth] if self.all_noise.ndim else self.all_noise
        scaled, allowed = scale_and_filter(engine.head(hidden), self.sampling)
        y = (allowed + noise).argmax(-1)  # (B, T)
        logprobs = logprob_of(scaled, y)
        accepted = (y[:, : self.k] == ids[:, 1 : self.k + 1]).long().cumprod(1).sum(1)

        rows = torch.arange(len(ids), device=ids.device)
        last = accepted.clamp(max=self.k - 1)  # the depth at which the chain may have been left
        siblings = torch.cat(self.siblings, 1)[rows, last]  # (B, width - 1)
        hits = (siblings == y.gather(1, accepted[:, None])) & (accepted < self.k)[:, None]
        hit = hits.any(1)
        leaf = self.k + 1 + last * (self.width - 1) + hits.long().argmax(1)  # the sibling's column
        accepted = accepted + hit

        steps = torch.arange(self.k + 1, device=ids.device)
        is_leaf = hit[:, None] & (steps == accepted[:, None])
        path = torch.where(is_leaf, leaf[:, None], steps)  # (B, k+1): columns of the accepted path
        lens = engine.lens[: len(ids)]
        engine.cache.move_entries(rows, lens + path.gather(1, accepted[:, None])[:, 0], lens + accepted)
        hidden = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
        return Verification(y.gather(1, path), logprobs.gather(1, path), hidden, accepted)
