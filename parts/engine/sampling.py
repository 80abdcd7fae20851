"""Coupled sampling: a token is a function of its logits and of its place in its sequence, and of nothing else.

    y = argmax(logits / temperature + g)            g[v] = G(seed of the sequence, index of the token, v): Gumbel noise

argmax(logits + g) is an exact sample of softmax(logits) (the Gumbel-max trick). The noise is a counter-based hash,
not the state of a generator. So a token does not depend on the batch it was made in, the slot, the worker, or what
ran before.

Whoever draws with the SAME noise from SIMILAR logits mostly draws the same token. That is how the drafter guesses
samples, not only likely tokens, at any temperature; and it is why a guess can be verified by an equality test.

Up to ties: fp32 kernels round differently at different shapes, which parts two runs at about one token in a million.
That is a change of sample, never of distribution.

With V = 50,000 to 150,000 the noise is dear: some 35 elementwise steps for every logit, each a pass over memory if the
tensors are large. So one function, `sample`, makes noise, token and log-probability of a few positions at a time: on a
CPU in pieces that stay in a core's cache, on a GPU in one compiled kernel. Nothing of the size (positions, V) is kept.

Legend: P positions, B rows, T tokens per row, V vocabulary, N words that are drawn from: all V, or a drafter's choice.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parts.cli import UserError, flag, flag_name, reason

SHARED = 1 << 17  # noise of so many logits is made once in a round
IN_CACHE = 150_000  # logits that are worked on at once on a CPU: three such tensors fit the 2 MB next to a core


def sequence_seed(*parts) -> int:
    """A 63-bit seed from numbers and strings, e.g. (run seed, RL step, prompt, sample). The same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_words(seeds: torch.Tensor) -> torch.Tensor:
    """Seeds (B,) int64 as two 32-bit words each, (B, 2) int32, as `gumbel` wants them."""
    return torch.stack([seeds, seeds >> 32], 1).int()  # .int() keeps the low 32 bits


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of int32 (C. Wellons' lowbias32), in place.

    int32 products wrap; the masks turn the arithmetic shifts into logical ones.
    """
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def gumbel(seeds: torch.Tensor, index: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of token `index` of each sequence. It belongs to a word's id: who draws from few of the words finds
    the noise that they have among all.

    seeds (..., 2) int32, index (...) int, words (N,) int32: ids -> (..., N) float32.
    """
    key = mix(index.int() * 0x1E3779B9 + seeds[..., 0])
    second = key * 0x5851F42D + seeds[..., 1]
    bits = mix(key[..., None] + words)  # (..., N)
    bits ^= second[..., None]
    mix(bits)
    # u in (0, 1): tiny u, which makes the LARGE noise that wins, keeps 31 bits of resolution; 1 - u would have only 24
    bits >>= 1
    bits &= 0x7FFFFFFF
    u = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


@functools.cache
def all_words(vocab: int, device: torch.device) -> torch.Tensor:
    """The ids 0 .. V-1, (V,) int32. Kept for good: recorded rounds look there."""
    return torch.arange(vocab, dtype=torch.int32, device=device)


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


def noise_for(sampling: Sampling, seeds, index, words: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Gumbel noise of all columns of a round in one tensor, or a zero () when greedy.

    seeds (B, 2), index (B, T), words (N,) -> (B, T, N). Streams are independent: the ratio rule needs three.
    """
    if sampling.temperature == 0:
        return torch.zeros((), device=seeds.device)
    return gumbel(seeds[:, None], index + (stream << 20), words)


def shared_noise(sampling: Sampling, seeds, index, vocab: int) -> torch.Tensor | None:
    """`noise_for`, once for drafter and policy, if the vocabulary is small; None: each makes what it needs."""
    if sampling.temperature == 0 or index.numel() * vocab > SHARED:
        return None
    return noise_for(sampling, seeds, index, all_words(vocab, seeds.device))


def logprob_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[y]: logits (..., V), y (...) -> (...).

    Give it the logits before top-k and top-p: they narrow what may be drawn; the trainer scores without them.
    """
    return logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)


def draw(logits, sampling: Sampling, seeds, index, words, noise=None, scored=True) -> tuple:
    """`sample`, of all positions at once. Returns columns of the logits, not ids."""
    scaled, allowed = narrow(logits, sampling)
    if noise is None and sampling.temperature:
        noise = gumbel(seeds, index, words)
    if noise is not None:
        allowed = allowed + noise
    column = allowed.max(-1).indices
    return column, logprob_of(scaled, column) if scored else None


class Compiled:
    """`draw` as one kernel for GPUs. Where compiling fails, the plain function does it, after one line on stderr."""

    def __init__(self, function: Callable):
        self.plain = function
        self.function: Callable | None = None  # compiled at the first call

    def __call__(self, *args):
        """As the function."""
        if self.function is None:
            from torch._inductor import config  # seconds: only where it is used

            config.compile_threads = 1  # for a few kernels no worker needs 32 processes beside it
            self.function = torch.compile(self.plain, dynamic=True)
        try:
            return self.function(*args)
        except Exception as error:  # no compiler, an old card ...: each has its own type; some come at a new shape
            if self.function is self.plain or isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"sampling is not compiled, and slower for it: {reason(error)}", file=sys.stderr)
            self.function = self.plain
            return self.plain(*args)


compiled_draw = Compiled(draw)


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    seeds: torch.Tensor,
    index: torch.Tensor,
    words: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    scored: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and their log-probabilities, both (P,). The one sampler: plain decoding, verification and drafting use it.

    logits (P, N) of any float type; seeds (P, 2) and index (P,): whose noise, and which; words (N,) int32: the ids that
    the logits belong to, None: all; noise (P, N): if it is made already; scored: with log-probabilities, else None.
    """
    ids = all_words(logits.shape[1], logits.device) if words is None else words
    if noise is None and logits.is_cuda and not sampling.top_k and sampling.top_p == 1:
        column, logprob = compiled_draw(logits, sampling, seeds, index, ids, None, scored)
    elif noise is None and not logits.is_cuda and logits.numel() > IN_CACHE:
        column, logprob = draw_in_cache(logits, sampling, seeds, index, ids, scored)
    else:
        column, logprob = draw(logits, sampling, seeds, index, ids, noise, scored)
    return column if words is None else words[column].long(), logprob


def draw_in_cache(logits, sampling: Sampling, seeds, index, words, scored: bool) -> tuple:
    """`draw`, a few positions after the other."""
    count = len(logits)
    column = torch.empty(count, dtype=torch.long)
    logprob = torch.empty(count) if scored else None
    step = max(1, IN_CACHE // logits.shape[1])
    for first in range(0, count, step):
        part = slice(first, first + step)
        column[part], score = draw(logits[part], sampling, seeds[part], index[part], words, None, scored)
        if scored:
            logprob[part] = score
    return column, logprob


def sample_columns(logits, sampling: Sampling, seeds, index, noise=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` for rows of several tokens: logits (B, T, V), seeds (B, 2), index (B, T), noise (B, T, V) or None
    -> tokens and log-probabilities, both (B, T).
    """
    if noise is not None:
        return draw(logits, sampling, seeds, index, None, noise)
    column_seeds = seeds[:, None].expand(*index.shape, 2).flatten(0, 1)
    y, logprob = sample(logits.flatten(0, 1), sampling, column_seeds, index.flatten())
    return y.view(index.shape), logprob.view(index.shape)
