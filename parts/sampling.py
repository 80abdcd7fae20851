"""Coupled sampling: a token is a function of its logits and of its place in its sequence, and of nothing else.

    y = argmax(logits / temperature + g)            g[v] = G(seed of the sequence, index of the token, v): Gumbel noise

argmax(logits + g) is an exact sample of softmax(logits) (the Gumbel-max trick). The noise is a counter-based hash,
not the state of a generator. So a token does not depend on the batch it was made in, the slot, the worker, or what
ran before.

Whoever draws with the SAME noise from SIMILAR logits mostly draws the same token. That is how the drafter guesses
samples, not only likely tokens, at any temperature; and it is why a guess can be verified by an equality test.

Up to ties: fp32 kernels round differently at different shapes, which parts two runs at about one token in a million.
That is a change of sample, never of distribution.

Legend: B rows, T tokens per row, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch

from parts.common import UserError, flag, flag_name


def sequence_seed(*parts) -> int:
    """A 63-bit seed from numbers and strings, e.g. (run seed, RL step, prompt, sample). The same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_words(seeds: torch.Tensor) -> torch.Tensor:
    """Seeds (B,) int64 as two 32-bit words each, (B, 2) int32, as `gumbel` wants them."""
    return torch.stack([seeds, seeds >> 32], 1).int()  # .int() keeps the low 32 bits


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of int32 (C. Wellons' lowbias32).

    int32 products wrap; `& mask` turns the arithmetic shift into a logical one.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel(seeds: torch.Tensor, index: torch.Tensor, vocab: int) -> torch.Tensor:
    """Gumbel noise of token `index` of each sequence. seeds (B, 2) int32, index (B, T) int -> (B, T, V) float32."""
    key = mix(index.int() * 0x1E3779B9 + seeds[:, :1])  # (B, T)
    v = torch.arange(vocab, dtype=torch.int32, device=seeds.device)
    second = key * 0x5851F42D + seeds[:, 1:]  # (B, T)
    bits = mix(mix(key[..., None] + v) ^ second[..., None])  # (B, T, V)
    # u in (0, 1): tiny u, which makes the LARGE noise that wins, keeps 31 bits of resolution; 1 - u would have only 24
    u = (((bits >> 1) & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    temperature: float = flag(1.0, "0 is greedy")
    top_k: int = flag(0, "draw from the k likeliest tokens only; 0: all")
    top_p: float = flag(1.0, "draw from the smallest set of tokens that holds this share of the probability; 1: all")
    max_new: int = flag(512, "tokens per response at most, the stop token included")

    def __post_init__(self):
        """Raises UserError."""
        rules = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "max_new": self.max_new >= 1,
        }
        for name, good in rules.items():
            if not good:
                raise UserError(
                    f"{flag_name(name)} {getattr(self, name)}: makes no sense; "
                    "temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_new >= 1"
                )


def narrow(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits / temperature, the same with what top-k and top-p forbid at -inf), float32. All shapes (..., V)."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    allowed = logits
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        allowed = allowed.masked_fill(allowed < kth, -torch.inf)
    if sampling.top_p < 1:
        sorted_logits, order = allowed.sort(dim=-1, descending=True, stable=True)
        p = sorted_logits.softmax(-1)
        drop = p.cumsum(-1) - p >= sampling.top_p  # keep the smallest set that reaches top_p: always at least one
        allowed = allowed.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits, allowed


def noise_for(sampling: Sampling, seeds, index, vocab: int, stream: int = 0) -> torch.Tensor:
    """Gumbel noise (B, T, V), or a zero () when greedy. Streams are independent: the ratio rule needs three."""
    if sampling.temperature == 0:
        return torch.zeros((), device=seeds.device)
    return gumbel(seeds, index + (stream << 20), vocab)


def logprob_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[y]: logits (..., V), y (...) -> (...).

    Give it the logits before top-k and top-p: they narrow what may be drawn; the trainer scores without them.
    """
    return logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sample(logits: torch.Tensor, sampling: Sampling, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T) and their log-probabilities (B, T). logits (B, T, V) of any float type, noise from `noise_for`."""
    scaled, allowed = narrow(logits, sampling)
    y = (allowed + noise).argmax(-1)
    return y, logprob_of(scaled, y)
