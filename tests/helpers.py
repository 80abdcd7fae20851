"""What several test files need: model families, groups of prompts, engines with drafters, and the check that
speculation changes no token.
"""

import functools
import random

import torch
from conftest import tiny
from transformers import LlamaConfig, MistralConfig, Olmo2Config, Phi3Config, Qwen2Config, Qwen3Config

from drafter import Drafter, DrafterTrainer, EagleProposer
from parts.engine.acceptance import Coupled
from parts.engine.cuda_graphs import RoundShape
from parts.engine.interfaces import DraftPlan, Group, Response, Sequence, Strategy
from parts.engine.ngram import NgramProposer
from parts.engine.sampling import Sampling, sequence_seed
from parts.training.drafter_data import FeatureBuffer
from parts.training.logprobs import token_scores
from rollout import Engine

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
    """Return a tiny random model of that family."""
    config_class, changes = FAMILIES[family]
    return tiny(config_class, **changes)


def groups_of(n: int, rng: random.Random, longest: int = 20, samples: int = 4) -> list[Group]:
    """Return n groups of random prompts, with 1 to `samples` samples each."""
    groups = []
    for i in range(n):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(1, longest))]
        groups.append(Group(i, prompt, [sequence_seed(0, i, k) for k in range(rng.randint(1, samples))]))
    return groups


def token_logprobs(model, responses: list[Response], temperature: float) -> torch.Tensor:
    """Return the log-probabilities of `token_scores` alone, (N,)."""
    return token_scores(model, responses, temperature)[0]


def by_name(responses) -> dict[tuple, Response]:
    """Return (group, sample) -> response."""
    return {(r.group, r.sample): r for r in responses}


def tokens_of(responses) -> dict[tuple, list[int]]:
    """Return (group, sample) -> tokens."""
    return {(r.group, r.sample): r.tokens for r in responses}


def make_drafter(model) -> Drafter:
    """Return an untrained drafter, always with the same weights."""
    torch.manual_seed(1)
    return Drafter(model)


def make_engine(model, drafter: Drafter | None = None, slots: int = 10, context: int = 100, **settings) -> Engine:
    """Return an engine with both kinds of proposers. drafter: None: an untrained one."""
    proposers = {"eagle": EagleProposer(drafter or make_drafter(model)), "ngram": NgramProposer()}
    return Engine(model, {1}, slots, context, proposers=proposers, **settings)


def fixed(method: str, k: int) -> Strategy:
    """Return the strategy that always drafts k tokens with this method."""
    return Strategy(DraftPlan(method, k))


class RandomPlans(Strategy):
    """Chooses a random method and draft length each round; often it does not draft."""

    def __init__(self, seed: int, longest: int = 8):
        super().__init__()
        self.rng = random.Random(seed)
        self.lengths = [k for k in (0, 0, 1, 2, 3, 5, 8) if k <= longest]

    def choose(self, running):
        return DraftPlan(self.rng.choice(["eagle", "ngram"]), self.rng.choice(self.lengths))


def responses_of(model, n: int = 8) -> list[Response]:
    """Return responses to n groups, with their hidden states."""
    return list(make_engine(model, keep_hidden=True).generate(groups_of(n, random.Random(4)), SAMPLINGS[0]))


def filled_buffer(responses) -> FeatureBuffer:
    """Return a buffer that holds these responses."""
    buffer = FeatureBuffer()
    for r in responses:
        buffer.add(r)
    return buffer


@functools.cache
def trained_weights(family: str) -> dict[str, torch.Tensor]:
    """Return the weights of a drafter that has learned a little from the tiny model of that family."""
    model = tiny_of(family)
    drafter = make_drafter(model)
    buffer = filled_buffer(make_engine(model).generate(groups_of(30, random.Random(5)), SAMPLINGS[0]))
    trainer = DrafterTrainer(drafter, tokens=256)
    for _ in range(150):
        trainer.step(buffer)
    return drafter.state_dict()


def trained_drafter(model) -> Drafter:
    """Return a drafter that has learned a little from this model, which must be one of `tiny_of`. Each family's drafter
    is trained once, and copied.
    """
    drafter = Drafter(model)
    drafter.load_state_dict(trained_weights(model.config.model_type))
    return drafter


def tokens_per_round(model, drafter: Drafter, k: int = 4, groups: int = 40) -> float:
    """Return the tokens per sequence and speculative round."""
    engine = make_engine(model, drafter)
    list(engine.generate(groups_of(groups, random.Random(1)), SAMPLINGS[0], fixed("eagle", k)))
    return engine.stats.spec_tokens / engine.stats.spec_sequence_rounds


def round_shape(running: list[Sequence], k: int, catch_up_len: int = 0) -> RoundShape:
    """Return the exact shape of a round of these sequences that drafts k tokens."""
    kv_len = max(sequence.length for sequence in running) + k + 1
    return RoundShape(len(running), kv_len, catch_up_len, DraftPlan("eagle", k), SAMPLINGS[0])


# ---------------------------------------------------------------- what speculation must not change


def check_equal(responses: dict[tuple, Response], plain: dict[tuple, Response]) -> None:
    """Tokens equal those of plain decoding, log-probabilities to 1e-4, hidden states to 1e-3."""
    assert responses.keys() == plain.keys()
    for name, r in responses.items():
        assert r.tokens == plain[name].tokens, name
        assert r.stopped == plain[name].stopped, name
        assert torch.allclose(r.logprobs, plain[name].logprobs, atol=1e-4), name
        assert torch.allclose(r.hidden, plain[name].hidden, atol=1e-3), name


def check_identity(
    strategy: Strategy,
    sampling: Sampling = SAMPLINGS[0],
    rule=Coupled,
    model=None,
    drafter: Drafter | None = None,
    groups: list[Group] | None = None,
    slots: int = 10,
    stop=(1,),
) -> None:
    """An engine decodes plainly, then speculatively. With refilled slots, moved sequences and prompts of all lengths,
    all responses are equal.
    """
    engine = make_engine(model or tiny(), drafter, slots, rule=rule)
    engine.set_stop_tokens(stop)
    groups = groups or groups_of(12, random.Random(1))
    plain = by_name(engine.generate(groups, sampling))
    check_equal(by_name(engine.generate(groups, sampling, strategy)), plain)
