"""What several test files need: model families, groups of prompts, engines with drafters."""

import random

import torch
from conftest import tiny
from transformers import LlamaConfig, MistralConfig, Olmo2Config, Phi3Config, Qwen2Config, Qwen3Config

from drafter import Drafter, LearnedDrafts, Trainer
from features import FeatureBuffer
from interfaces import Draft, Group, Response, Strategy
from ngram import NGramDrafts
from rollout import Engine
from sampling import Sampling, sequence_seed

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
}
SAMPLINGS = [
    Sampling(max_new=30),
    Sampling(temperature=0.0, max_new=30),
    Sampling(temperature=0.8, top_p=0.9, top_k=40, max_new=30),
]


def tiny_of(family: str):
    """A tiny random model of that family."""
    config_class, changes = FAMILIES[family]
    return tiny(config_class, **changes)


def groups_of(n: int, rng: random.Random, longest: int = 20, samples: int = 4) -> list[Group]:
    """Groups of random prompts, of 1 to `samples` samples."""
    groups = []
    for i in range(n):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(1, longest))]
        groups.append(Group(i, prompt, [sequence_seed(0, i, k) for k in range(rng.randint(1, samples))]))
    return groups


def by_name(responses) -> dict[tuple, Response]:
    """(group, sample) -> response."""
    return {(r.group, r.sample): r for r in responses}


def tokens_of(responses) -> dict[tuple, list[int]]:
    """(group, sample) -> tokens."""
    return {(r.group, r.sample): r.tokens for r in responses}


def make_drafter(model) -> Drafter:
    torch.manual_seed(1)
    return Drafter(model)


def make_engine(model, drafter: Drafter | None = None, slots: int = 10, context: int = 100, **settings) -> Engine:
    """An engine with both kinds of drafters."""
    drafters = {"learned": LearnedDrafts(drafter or make_drafter(model)), "ngram": NGramDrafts()}
    return Engine(model, {1}, slots, context, drafters=drafters, **settings)


def fixed(kind: str, k: int) -> Strategy:
    return Strategy(Draft(kind, k))


class Changing(Strategy):
    """Kind and length change at random every round; often it is off."""

    def __init__(self, seed: int, longest: int = 8):
        super().__init__()
        self.rng = random.Random(seed)
        self.lengths = [k for k in (0, 0, 1, 2, 3, 5, 8) if k <= longest]

    def choose(self, live):
        return Draft(self.rng.choice(["learned", "ngram"]), self.rng.choice(self.lengths))


def responses_of(model, n: int = 8) -> list[Response]:
    """Responses with their hidden states."""
    return list(make_engine(model, keep_hidden=True).generate(groups_of(n, random.Random(4)), SAMPLINGS[0]))


def trained_drafter(model, steps: int = 150) -> Drafter:
    """One that has learned a little."""
    buffer = FeatureBuffer()
    drafter = make_drafter(model)
    for r in make_engine(model).generate(groups_of(30, random.Random(5)), SAMPLINGS[0]):
        buffer.add(r)
    trainer = Trainer(drafter, tokens=256)
    for _ in range(steps):
        trainer.step(buffer)
    return drafter


def accepted_per_round(model, drafter: Drafter, k: int = 4) -> float:
    """Tokens per row and speculative round."""
    engine = make_engine(model, drafter)
    list(engine.generate(groups_of(40, random.Random(1)), SAMPLINGS[0], fixed("learned", k)))
    return engine.stats.spec_tokens / engine.stats.spec_row_rounds
