"""How drafts are verified. A rule is passed to the engine: `Engine(..., rule=Ratio)`.

Coupled the default: accept a draft if it is what the policy itself samples there, see rollout.py.

Ratio   the textbook rule (Leviathan et al. 2211.17192): accept a draft d ~ q with chance min(1, p(d) / q(d)), else draw
        from max(p - q, 0). The distribution is the policy's; the tokens are not those of plain decoding, so it cannot
        be checked token by token. It accepts about as much. Kept for comparison.

Tree    each draft has width - 1 siblings, the next best tokens of the drafter under the same noise: leaves beside the
        chain. If the policy leaves the chain for a sibling, that sibling is accepted too, and its keys and values move
        into the chain's place. Tokens are those of plain decoding. Slower than the chain at every batch size measured.

The last two keep logits and noise of all columns in whole (B, T, V) tensors: they are for study, at small vocabularies.

Left out: deeper trees than chain-and-siblings.
"""

import functools
from typing import NamedTuple

import torch

from parts.cli import UserError
from parts.engine.interfaces import MAX_DRAFTS
from parts.engine.kv_cache import Tree as TreeShape
from parts.engine.sampling import (
    Sampling,
    all_words,
    logprob_of,
    narrow,
    noise_for,
    sample,
    sample_columns,
    shared_noise,
)

# ---------------------------------------------------------------- coupled, the default


class Verdict(NamedTuple):
    """What the policy says of a round."""

    tokens: torch.Tensor  # (B, k+1) its own samples; the first accepted + 1 of a row count
    logprobs: torch.Tensor  # (B, k+1) of them
    hidden: torch.Tensor  # (B, k+1, D) its hidden states where they were sampled
    accepted: torch.Tensor  # (B,)


class Coupled:
    """The accept rule, made anew for each round: a draft is accepted if it is what the policy itself samples there."""

    def __init__(self, sampling: Sampling, seeds: torch.Tensor, index: torch.Tensor, vocab: int):
        """seeds (B, 2); index (B, k+1): which token of its response each column samples; vocab: V."""
        self.sampling = sampling
        self.seeds = seeds
        self.index = index
        self.vocab = vocab
        self.noise = shared_noise(sampling, seeds, index, vocab)  # (B, k+1, V), or None

    def guess(self, depth: int, logits: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        """The drafter's logits (B, 1, N) -> its guess (B, 1), drawn with the policy's own noise. words: as `sample`."""
        noise = self.noise[:, depth] if self.noise is not None and words is None else None
        y, _ = sample(logits[:, 0], self.sampling, self.seeds, self.index[:, depth], words, noise, scored=False)
        return y[:, None]

    def columns(self, cur: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, TreeShape | None]:
        """What the policy reads: cur (B, 1), drafts (B, k) -> ids (B, T), and their shape (None: a chain)."""
        return torch.cat([cur, drafts], 1), None

    def accept(self, engine, ids: torch.Tensor, hidden: torch.Tensor) -> Verdict:
        """engine: a rollout.Engine; ids (B, T), hidden (B, T, D).

        The head over V words and the noise are dear, so columns go through them in pieces, and a row whose guess was
        wrong in one piece is left out of the next: what it would say there counts for nothing.
        """
        step = max(1, engine.logits_at_once // (len(ids) * self.vocab))
        if step >= ids.shape[1]:
            tokens, logprobs = sample_columns(engine.head(hidden), self.sampling, self.seeds, self.index, self.noise)
        else:
            tokens, logprobs = self.sample_in_pieces(engine, ids, hidden, step)
        accepted = (tokens[:, :-1] == ids[:, 1:]).long().cumprod(1).sum(1)
        return Verdict(tokens, logprobs, hidden, accepted)

    def sample_in_pieces(self, engine, ids, hidden, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`step` columns at a time -> tokens and log-probabilities (B, T), 0 where a row has dropped out."""
        tokens = torch.zeros_like(ids)
        logprobs = torch.zeros(ids.shape, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        for first in range(0, ids.shape[1], step):
            part = slice(first, first + step)
            logits = engine.head(hidden[rows, part])
            y, logp = sample_columns(logits, self.sampling, self.seeds[rows], self.index[rows, part])
            tokens[rows, part] = y
            logprobs[rows, part] = logp
            drafts = ids[rows, 1 + first : 1 + first + step]  # one shorter in the last piece
            if engine.bucketed:  # who drops out must not depend on what is in the tensors: a graph replays sizes
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
    scaled, allowed = narrow(logits, sampling)
    p = allowed.softmax(-1)
    q = narrow(q_logits, sampling)[1].softmax(-1)
    chosen = drafts[..., None]
    all_ids = all_words(p.shape[-1], p.device)
    gumbel = noise_for(sampling, seeds, index[:, :-1], all_ids[:1], stream=2)
    u = torch.exp(-torch.exp(-gumbel))  # the Gumbel's own uniform; (B, k, 1)
    kept = u * q.gather(-1, chosen) < p[:, :-1].gather(-1, chosen)
    accepted = kept[..., 0].long().cumprod(1).sum(1)
    residual = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], 1)  # after the last draft nothing is subtracted
    y = (residual.log() + noise_for(sampling, seeds, index, all_ids)).argmax(-1)
    is_draft = torch.arange(drafts.shape[1], device=drafts.device) < accepted[:, None]
    y = torch.cat([torch.where(is_draft, drafts, y[:, :-1]), y[:, -1:]], 1)
    return y, logprob_of(scaled, y), accepted


class Ratio(Coupled):
    """Acceptance by probability ratio. Without a q (greedy sampling, n-gram drafts) equality decides, as always."""

    def __init__(self, sampling, seeds, index, vocab):
        super().__init__(sampling, seeds, index, vocab)
        self.q_logits: list[torch.Tensor] = []  # (B, 1, V) of each depth
        # drafts and residual must be drawn from different noise, or the emitted token does not follow p
        self.draft_noise = noise_for(sampling, seeds, index, all_words(vocab, seeds.device), stream=1)

    def guess(self, depth, logits, words=None):
        """As Coupled.guess, with noise of its own."""
        if words is not None:  # a word that the drafter does not know has no probability
            never = logits.new_full((*logits.shape[:2], self.vocab), -torch.inf)
            logits = never.index_copy(2, words.long(), logits)
        self.q_logits.append(logits)
        _, allowed = narrow(logits, self.sampling)
        return (allowed + at_depth(self.draft_noise, depth)).argmax(-1)

    def accept(self, engine, ids, hidden):
        """As Coupled.accept."""
        if not self.q_logits or self.sampling.temperature == 0:
            return super().accept(engine, ids, hidden)
        q_logits = torch.cat(self.q_logits, 1)
        logits = engine.head(hidden)
        y, logprobs, accepted = verify_ratio(logits, q_logits, ids[:, 1:], self.sampling, self.seeds, self.index)
        return Verdict(y, logprobs, hidden, accepted)


def at_depth(noise: torch.Tensor, depth: int) -> torch.Tensor:
    """The noise of one column, (B, 1, V); greedy sampling has none."""
    return noise[:, depth : depth + 1] if noise.ndim else noise


@functools.lru_cache
def caterpillar(k: int, width: int, device) -> TreeShape:
    """A chain of k drafts with width - 1 siblings each: T = 1 + k * width entries, cur and chain, then siblings."""
    chain = list(range(k + 1))
    siblings = [depth for depth in chain[1:] for _ in range(width - 1)]
    depth = torch.tensor(chain + siblings)
    columns = torch.arange(len(depth))
    above = (columns <= k) & (depth < depth[:, None])
    sees = above | (columns == columns[:, None])  # the chain above it, and itself
    return TreeShape(depth.to(device), sees.to(device))


class Tree(Coupled):
    """Chain and siblings. `partial(Tree, width=3)` gives each draft two siblings."""

    def __init__(self, sampling, seeds, index, vocab, width: int = 2):
        super().__init__(sampling, seeds, index, vocab)
        self.all_noise = self.noise
        if self.all_noise is None:
            self.all_noise = noise_for(sampling, seeds, index, all_words(vocab, seeds.device))
        self.width = width
        self.k = index.shape[1] - 1
        self.siblings: list[torch.Tensor] = []  # (B, 1, width - 1) of each depth
        self.shape: TreeShape | None = None
        if self.k * width > MAX_DRAFTS:
            raise UserError(f"draft length {self.k} x width {width}: 0 to {MAX_DRAFTS} drafts fit a round")

    def guess(self, depth, logits, words=None):
        """The best goes on in the chain, the next best are kept as its siblings."""
        _, allowed = narrow(logits, self.sampling)
        noise = at_depth(self.all_noise, depth)
        if words is not None and noise.ndim:
            noise = noise[..., words.long()]
        best = (allowed + noise).topk(self.width).indices  # (B, 1, width)
        if words is not None:
            best = words[best].long()
        self.siblings.append(best[..., 1:])
        return best[..., 0]

    def columns(self, cur, drafts):
        """cur (B, 1), drafts (B, k) -> ids (B, 1 + k * width): cur, chain, siblings by depth; and their shape."""
        if not self.siblings:  # a drafter without logits (n-grams) has no second best
            self.siblings = [drafts[:, i : i + 1, None].expand(-1, -1, self.width - 1) for i in range(self.k)]
        self.shape = caterpillar(self.k, self.width, cur.device)
        return torch.cat([cur, drafts, torch.cat(self.siblings, 1).flatten(1)], 1), self.shape

    def accept(self, engine, ids, hidden):
        """As Coupled.accept; did the policy leave the chain for a sibling?"""
        if self.shape is None:
            return super().accept(engine, ids, hidden)
        noise = self.all_noise[:, self.shape.depth] if self.all_noise.ndim else self.all_noise
        scaled, allowed = narrow(engine.head(hidden), self.sampling)
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
        engine.cache.relocate(rows, lens + path.gather(1, accepted[:, None])[:, 0], lens + accepted)
        hidden = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
        return Verdict(y.gather(1, path), logprobs.gather(1, path), hidden, accepted)
