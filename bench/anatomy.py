"""What a round of a model of a given shape takes on this device, way by way. `bench gpu` prints it.

Random weights: time does not depend on what they say. A drafter's guesses do, so they come from an oracle that is
right as often as stated, while the drafter's own work is done for its cost.

    modules         the model's own modules, one kernel after the other
    fused layers    modeling.FusedLayer
    fused sampler   and sampling.Compiled
    graphs          and rounds replayed, graphs.Graphs
"""

import functools
import statistics
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from drafter import Drafter, EagleProposer
from parts.engine import sampling as sampler
from parts.engine.cuda_graphs import GraphPool
from parts.engine.interfaces import DraftPlan, Group, RoundReport, Strategy
from parts.engine.sampling import Sampling, sequence_seed
from parts.training.drafter_data import TokenCounts
from rollout import Engine

WAYS = ("modules", "fused layers", "fused sampler", "graphs")
ACCEPTANCE = (0.8, 0.75, 0.7, 0.65)  # of a guess, given that those before it were right; the last holds for all deeper

SHAPES = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 24,  # as many as the 0.5B's, so that its operators can be counted
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, device: str, dtype: torch.dtype):
    """A model of that shape for the engine, made on the device itself. Its logits are near 0, so that its tokens follow
    from the noise alone: rounding, which is another in each way, parts no response from what the oracle knows.
    """
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="slots")
    model.eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(1e-3)
    return model


class Oracle(EagleProposer):
    """A learned drafter's work, and guesses that are right with the stated chance. It knows what comes from a rollout
    that was made before.
    """

    def __init__(self, drafter: Drafter, acceptance: tuple[float, ...]):
        super().__init__(drafter)
        self.acceptance = acceptance
        self.responses: dict[tuple, list[int]] = {}  # (group, sample) -> tokens
        self.known: torch.Tensor | None = None  # (slots, room): what comes
        self.luck: torch.Tensor | None = None  # (slots, room), uniform
        self.engine: Engine | None = None

    def reserve(self, engine, slots, room):
        """As Drafts.reserve."""
        super().reserve(engine, slots, room)
        self.engine = engine
        self.known = torch.zeros(slots, room, dtype=torch.long, device=engine.lens.device)
        generator = torch.Generator().manual_seed(0)
        self.luck = torch.rand(slots, room, generator=generator).to(engine.lens.device)

    def admit(self, rows):
        """As Drafts.admit."""
        super().admit(rows)
        for slot in range(rows.start, rows.stop):
            row = self.engine.running[slot]
            whole = row.group.prompt + self.responses.get((row.group.key, row.sample), [])
            self.known[slot, : len(whole)] = torch.tensor(whole)

    def move(self, source, target):
        """As Drafts.move."""
        super().move(source, target)
        self.known[target] = self.known[source]

    def propose(self, engine, shape, guess):
        """As Drafts.propose."""
        drafts = super().propose(engine, shape, guess)  # (B, k)
        k = shape.plan.k
        places = engine.lens[: shape.batch_size, None] + 1 + torch.arange(k, device=drafts.device)
        places = places.clamp(max=self.known.shape[1] - 1)
        right = self.known[: shape.batch_size].gather(1, places)
        chances = (self.acceptance + self.acceptance[-1:] * k)[:k]
        # columns written one by one: a tensor made of a list is a copy from the host, which no graph can hold
        hit = torch.cat(
            [self.luck[: shape.batch_size].gather(1, places[:, i : i + 1]) < c for i, c in enumerate(chances)], 1
        )
        return torch.where(hit, right, (right + 1) % engine.model.config.vocab_size)


class Timed(Strategy):
    """A fixed draft length; keeps the seconds and the tokens of each round."""

    def __init__(self, k: int):
        super().__init__(DraftPlan("eagle", k) if k else DraftPlan())
        self.seconds: list[float] = []
        self.tokens: list[float] = []  # per row

    def observe(self, report: RoundReport) -> None:
        """As Strategy.observe."""
        self.seconds.append(report.seconds)
        self.tokens.append((report.batch_size + sum(report.accepted)) / report.batch_size)


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: each is a kernel or more on a GPU. Views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func._schema.returns
        is_view = bool(made) and made[0].alias_info is not None and not made[0].alias_info.is_write
        self.count += not is_view
        return out


@functools.cache
def compiled_once():
    """The compiled sampler, one for all ways and models."""
    return torch.compile(sampler.sample_at_once, dynamic=True)


class Subject(NamedTuple):
    """A model in an engine, ready to be timed."""

    engine: Engine
    groups: list[Group]
    sampling: Sampling
    graphs: GraphPool | None


def subject_of(model, rows: int, prompt: int, tokens: int, record=None) -> Subject:
    """An engine with `rows` responses of so many tokens to prompts of `prompt` random tokens. record: as Graphs; None:
    its own on a GPU, and no recordings on a CPU.
    """
    torch.manual_seed(1)
    drafter = Drafter(model)
    drafter.words = TokenCounts(model.config.vocab_size).choose()
    oracle = Oracle(drafter, ACCEPTANCE)
    stop = {-1}  # nothing ends early
    engine = Engine(model, stop, rows, prompt + tokens, proposers={"eagle": oracle}, frozen=True, bucketed=True)
    generator = torch.Generator().manual_seed(2)
    groups = []
    for i in range(rows):
        ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=generator).tolist()
        groups.append(Group(i, ids, [sequence_seed(0, i)]))
    sampling = Sampling(max_new=tokens)
    oracle.responses = {(r.group, r.sample): r.tokens for r in engine.generate(groups, sampling)}
    graphs = GraphPool(engine.compute_round, record) if record else engine.graphs
    return Subject(engine, groups, sampling, graphs)


def set_way(subject: Subject, way: str, fused_layers) -> None:
    """From now on the engine computes this way. fused_layers: the engine's own."""
    place = WAYS.index(way)
    subject.engine.fused_layers = fused_layers if place >= 1 else None
    sampler.compiled_sample.function = compiled_once() if place >= 2 else sampler.sample_at_once
    subject.engine.graphs = subject.graphs if place >= 3 else None


def time_rounds(subject: Subject, k: int) -> dict:
    """-> milliseconds of a round (the median, after a rollout that does not count) and tokens per row of it."""
    for _ in range(2):
        strategy = Timed(k)
        list(subject.engine.generate(subject.groups, subject.sampling, strategy))
    late = len(strategy.seconds) // 4  # the first rounds catch up
    ms = statistics.median(strategy.seconds[late:]) * 1e3
    return {"ms": ms, "tokens": statistics.mean(strategy.tokens[late:])}


def count_operators(subject: Subject, k: int) -> float:
    """Operators of a round, bookkeeping included; prompts and the ends of responses are in it, shared by all rounds."""
    with Operators() as counter:
        list(subject.engine.generate(subject.groups, subject.sampling, Timed(k)))
    return counter.count / subject.engine.stats.rounds


def anatomy(model, rows_of: tuple[int, ...], ks: tuple[int, ...], prompt: int, tokens: int, ways) -> list[dict]:
    """A row for each number of rows, draft length and way: milliseconds, tokens per row and round; whether there are
    fused layers.
    """
    result = []
    own = sampler.compiled_sample.function
    for rows in rows_of:
        subject = subject_of(model, rows, prompt, tokens)
        fused_layers = subject.engine.fused_layers
        for k in ks:
            for way in ways:
                set_way(subject, way, fused_layers)
                row = {"rows": rows, "k": k, "way": way, "fused": fused_layers is not None}
                result.append({**row, **time_rounds(subject, k)})
        subject.engine.fused_layers = fused_layers
    sampler.compiled_sample.function = own
    return result


def operators() -> dict[str, dict[int, float]]:
    """Operators of a round by way and draft length, on a CPU: their number depends on layers, not on widths."""
    model = random_model("tiny", "cpu", torch.float32)
    subject = subject_of(model, 1, 4, 24)
    fused_layers = subject.engine.fused_layers
    counts: dict[str, dict[int, float]] = {}
    for way in ("modules", "fused layers"):
        subject.engine.fused_layers = fused_layers if way == "fused layers" else None
        counts[way] = {k: count_operators(subject, k) for k in (0, 4)}
    return counts
