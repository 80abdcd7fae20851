"""The time of a round of a model of a given shape on this device, implementation by implementation; for `bench gpu`.

Weights are random, since time does not depend on them. Nor does the time of a round depend on which draft tokens are
accepted (the shapes of rounds are rounded up, see cuda_graphs.py), so the tokens of a round are computed from a stated
acceptance, ACCEPTANCE.

    modules         the model's own modules, one kernel after the other
    fused layers    fused_layers.FusedLayer
    fused sampler   and sampling.CompiledSampler
    graphs          and rounds replayed, cuda_graphs.GraphPool
"""

import statistics
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.aging import tokens_per_round
from bench.harness import Watch, fixed
from drafter import Drafter, EagleProposer
from parts.engine import sampling as sampler
from parts.engine.interfaces import Group
from parts.engine.sampling import Sampling, sequence_seed
from parts.training.drafter_data import TokenCounts
from rollout import Engine

WAYS = ("modules", "fused layers", "fused sampler", "graphs")
ACCEPTANCE = [0.8, 0.75, 0.7, *[0.65] * 5]  # share of accepted draft tokens by depth

SHAPES = {  # hidden size, layers, heads, key/value heads, width of the MLP, vocabulary, whether embeddings are tied
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "tiny": (64, 24, 4, 2, 128, 1000, True),  # as many layers as the 0.5B's, so that its operators can be counted
}


def random_model(shape: str, device: str, dtype: torch.dtype):
    """Return a model of that shape for the engine, made on the device itself."""
    hidden, layers, heads, kv_heads, inner, vocab, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="slots")
    return model.eval().requires_grad_(False)


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: each is a kernel or more on a GPU. Views are not counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func._schema.returns
        is_view = bool(made) and made[0].alias_info is not None and not made[0].alias_info.is_write
        self.count += not is_view
        return out


class Subject(NamedTuple):
    """A model in an engine, ready to be timed."""

    engine: Engine
    groups: list[Group]
    sampling: Sampling

    def roll_out(self, k: int) -> Watch:
        """Roll out with k draft tokens -> the reports of the rounds."""
        watch = Watch(fixed(k))
        list(self.engine.generate(self.groups, self.sampling, watch))
        return watch


def subject_of(model, batch: int, prompt: int, tokens: int) -> Subject:
    """Return an engine with `batch` responses of so many tokens to prompts of `prompt` random tokens."""
    torch.manual_seed(1)
    drafter = Drafter(model)
    drafter.draft_vocab = TokenCounts(model.config.vocab_size).choose()
    stop = {-1}  # nothing ends early
    proposers = {"eagle": EagleProposer(drafter)}
    engine = Engine(model, stop, batch, prompt + tokens, proposers=proposers, frozen=True, bucketed=True)
    generator = torch.Generator().manual_seed(2)
    groups = []
    for i in range(batch):
        ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=generator).tolist()
        groups.append(Group(i, ids, [sequence_seed(0, i)]))
    return Subject(engine, groups, Sampling(max_new=tokens))


def time_rounds(subject: Subject, k: int) -> dict:
    """Return the milliseconds of a round (the median, after a rollout that does not count) and a sequence's tokens."""
    subject.roll_out(k)
    seconds = [report.seconds for report in subject.roll_out(k).reports]
    late = seconds[len(seconds) // 4 :]  # the first rounds catch up
    return {"ms": statistics.median(late) * 1e3, "tokens": tokens_per_round(ACCEPTANCE[:k])}


def time_ways(model, batches: tuple[int, ...], ks: tuple[int, ...], prompt: int, tokens: int, ways) -> list[dict]:
    """Return a row for each batch size, draft length and way."""
    rows = []
    own_sampler = sampler.compiled_sample.function
    for batch in batches:
        subject = subject_of(model, batch, prompt, tokens)
        engine = subject.engine
        fused_layers, graphs = engine.fused_layers, engine.graphs
        for k in ks:
            for way in ways:
                place = WAYS.index(way)
                engine.fused_layers = fused_layers if place >= 1 else None
                sampler.compiled_sample.function = own_sampler if place >= 2 else sampler.sample_at_once
                engine.graphs = graphs if place >= 3 else None
                row = {"batch": batch, "k": k, "way": way, "fused": fused_layers is not None}
                rows.append({**row, **time_rounds(subject, k)})
                if place >= 2:
                    own_sampler = sampler.compiled_sample.function  # it was compiled at its first call
    sampler.compiled_sample.function = own_sampler
    return rows


def operators() -> dict[str, dict[int, float]]:
    """Return the operators of a round by way and draft length, on a CPU: their number depends on layers, not on widths.
    Bookkeeping is included; the operators of prompts and of finished responses are shared by all rounds.
    """
    subject = subject_of(random_model("tiny", "cpu", torch.float32), 1, 4, 24)
    fused_layers = subject.engine.fused_layers
    counts: dict[str, dict[int, float]] = {}
    for way in ("modules", "fused layers"):
        subject.engine.fused_layers = fused_layers if way == "fused layers" else None
        counts[way] = {}
        for k in (0, 4):
            subject.roll_out(k)  # reads the weights
            with Operators() as counter:
                subject.roll_out(k)
            counts[way][k] = counter.count / subject.engine.stats.rounds
    return counts
