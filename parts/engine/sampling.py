"""Coupled sampling: a token depends on its logits and on its place in its sequence, and on nothing else.

    y = argmax(logits / temperature + g)            g[v] = G(seed of the sequence, index of the token, v): Gumbel noise

argmax(logits + g) is an exact sample of softmax(logits) (the Gumbel-max trick). The noise is a counter-based hash,
not the state of a generator. So a token does not depend on the batch it was made in, the slot, the worker, or what
ran before.

Two models that sample with the SAME noise from SIMILAR logits mostly sample the same token. So the drafter predicts the
policy's sample, not only its likeliest token, at any temperature; and a draft token can be verified by an equality
test.

Up to ties: fp32 kernels round differently at different shapes, which parts two runs at about one token in a million.
That is a change of sample, never of distribution.

With V = 50,000 to 150,000 the noise is expensive: some 35 elementwise steps for every logit, each a pass over memory if
the tensors are large. So one function, `sample`, makes noise, token and log-probability of a few positions at a time:
on a CPU in chunks that stay in a core's cache, on a GPU in one compiled kernel. No tensor of the size (positions, V) is
kept.

Legend: P positions, B sequences, T tokens per sequence, V vocabulary, N token ids that are sampled from: all V, or a
drafter's draft vocabulary.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parts.cli import UserError, flag, flag_name, reason
from parts.devices import is_gpu

SHARED_NOISE = 1 << 17  # up to so many logits, the noise of a round is made once and shared by drafter and policy
CHUNK = 150_000  # logits processed at once on a CPU: three such tensors fit the 2 MB cache of a core


def sequence_seed(*parts) -> int:
    """Return a 63-bit seed made of numbers and strings, e.g. (run seed, RL step, prompt, sample). The same on every
    machine.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def split_seeds(seeds: torch.Tensor) -> torch.Tensor:
    """Split seeds (B,) int64 into two 32-bit halves each, (B, 2) int32, as `gumbel_noise` takes them."""
    return torch.stack([seeds, seeds >> 32], 1).int()  # .int() keeps the low 32 bits


def hash_int32(x: torch.Tensor) -> torch.Tensor:
    """Hash int32 numbers in place by a bijection (C. Wellons' lowbias32).

    int32 products wrap; the masks turn the arithmetic shifts into logical ones.
    """
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def gumbel_noise(seeds: torch.Tensor, index: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of token `index` of each sequence: seeds (..., 2) int32, index (...) int, token_ids (N,) int32
    -> (..., N) float32.

    The noise belongs to a token id: sampling from a few ids finds the noise that they have among all.
    """
    key = hash_int32(index.int() * 0x1E3779B9 + seeds[..., 0])
    second = key * 0x5851F42D + seeds[..., 1]
    bits = hash_int32(key[..., None] + token_ids)  # (..., N)
    bits ^= second[..., None]
    hash_int32(bits)
    # u in (0, 1): tiny u, which makes the LARGE noise that wins, keeps 31 bits of resolution; 1 - u would have only 24
    bits >>= 1
    bits &= 0x7FFFFFFF
    u = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


@functools.cache
def all_token_ids(vocab: int, device: torch.device) -> torch.Tensor:
    """Return the ids 0 .. V-1, (V,) int32. They are kept for good, since recorded rounds read them at their address."""
    return torch.arange(vocab, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    temperature: float = flag(1.0, "0 is greedy")
    top_k: int = flag(0, "sample from the k likeliest tokens only; 0: all")
    top_p: float = flag(1.0, "sample from the smallest set of tokens that holds this share of the probability; 1: all")
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


def scale_and_filter(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (..., V) -> logits / temperature, and the same with what top-k and top-p exclude at -inf, both float32."""
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


def noise_for(sampling: Sampling, seeds, index, token_ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Gumbel noise of all columns of a round in one tensor: seeds (B, 2), index (B, T), token_ids (N,) -> (B, T, N); a
    zero () at temperature 0. Streams are independent of each other: the ratio rule needs three.
    """
    if sampling.temperature == 0:
        return torch.zeros((), device=seeds.device)
    return gumbel_noise(seeds[:, None], index + (stream << 20), token_ids)


def shared_noise(sampling: Sampling, seeds, index, vocab: int) -> torch.Tensor | None:
    """`noise_for` the whole vocabulary, made once for drafter and policy if that is small; None: each makes its own."""
    if sampling.temperature == 0 or index.numel() * vocab > SHARED_NOISE:
        return None
    return noise_for(sampling, seeds, index, all_token_ids(vocab, seeds.device))


def logprob_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[y]: logits (..., V), y (...) -> (...).

    Give it the logits before top-k and top-p: these restrict what may be sampled, and the trainer scores without them.
    """
    return logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sample_at_once(logits, sampling: Sampling, seeds, index, token_ids, noise=None, with_logprobs=True) -> tuple:
    """As `sample`, all positions at once, but returning columns of the logits instead of token ids."""
    scaled, allowed = scale_and_filter(logits, sampling)
    if noise is None and sampling.temperature:
        noise = gumbel_noise(seeds, index, token_ids)
    if noise is not None:
        allowed = allowed + noise
    column = allowed.max(-1).indices
    return column, logprob_of(scaled, column) if with_logprobs else None


class CompiledSampler:
    """`sample_at_once` as one compiled kernel for GPUs. Where compiling fails, one line says so on stderr, and the
    plain function is used.
    """

    def __init__(self, function: Callable):
        self.plain = function
        self.function: Callable | None = None  # compiled at the first call

    def __call__(self, *args):
        """Call the compiled function."""
        if self.function is None:
            from torch import _dynamo, _inductor  # seconds: only where it is used

            _inductor.config.compile_threads = 1  # for a few kernels no worker needs 32 processes beside it
            _dynamo.config.fail_on_recompile_limit_hit = True  # else it is no longer compiled, and nobody is told
            self.function = torch.compile(self.plain, dynamic=True)
        try:
            return self.function(*args)
        except Exception as error:  # no compiler, an old card ...: each has its own type; some come at a new shape
            if self.function is self.plain or isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"sampling is not compiled, and slower for it: {reason(error)}", file=sys.stderr)
            self.function = self.plain
            return self.plain(*args)


compiled_sample = CompiledSampler(sample_at_once)


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    seeds: torch.Tensor,
    index: torch.Tensor,
    token_ids: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    with_logprobs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample tokens -> token ids and their log-probabilities, both (P,). Plain decoding, verification and drafting all
    use this function.

    logits (P, N) of any float type; seeds (P, 2) and index (P,): the sequence and the number of the token in it;
    token_ids (N,) int32: the ids that the logits belong to, None: all; noise (P, N): if it is made already;
    with_logprobs: False returns None in their place.
    """
    ids = all_token_ids(logits.shape[1], logits.device) if token_ids is None else token_ids
    on_gpu = is_gpu(logits.device)
    if noise is None and on_gpu and not sampling.top_k and sampling.top_p == 1:
        column, logprob = compiled_sample(logits, sampling, seeds, index, ids, None, with_logprobs)
    elif noise is None and not on_gpu and logits.numel() > CHUNK:
        column, logprob = sample_in_chunks(logits, sampling, seeds, index, ids, with_logprobs)
    else:
        column, logprob = sample_at_once(logits, sampling, seeds, index, ids, noise, with_logprobs)
    return column if token_ids is None else token_ids[column].long(), logprob


def sample_in_chunks(logits, sampling: Sampling, seeds, index, token_ids, with_logprobs: bool) -> tuple:
    """As `sample_at_once`, a few positions at a time."""
    count = len(logits)
    column = torch.empty(count, dtype=torch.long)
    logprob = torch.empty(count) if with_logprobs else None
    step = max(1, CHUNK // logits.shape[1])
    for first in range(0, count, step):
        part = slice(first, first + step)
        column[part], score = sample_at_once(
            logits[part], sampling, seeds[part], index[part], token_ids, None, with_logprobs
        )
        if with_logprobs:
            logprob[part] = score
    return column, logprob


def sample_columns(logits, sampling: Sampling, seeds, index, noise=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` for several tokens per sequence: logits (B, T, V), seeds (B, 2), index (B, T), noise (B, T, V) or None
    -> tokens and log-probabilities, both (B, T).
    """
    if noise is not None:
        return sample_at_once(logits, sampling, seeds, index, None, noise)
    column_seeds = seeds[:, None].expand(*index.shape, 2).flatten(0, 1)
    y, logprob = sample(logits.flatten(0, 1), sampling, column_seeds, index.flatten())
    return y.view(index.shape), logprob.view(index.shape)
