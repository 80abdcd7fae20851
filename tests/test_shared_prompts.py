"""In the update, the prompt of a group's samples is computed once: log-probabilities and gradients stay the same."""

import random

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import FAMILIES, tiny_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from parts.engine.interfaces import Response
from parts.training import logprobs
from parts.training.logprobs import checkpoint_layers, token_scores, whole_token_scores


def random_responses(seed: int, shortest_prompt: int = 20) -> list[Response]:
    """Return responses of three groups of unequal prompts, of 1 to 30 tokens, in random order."""
    rng = random.Random(seed)
    responses = []
    for group in range(3):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(shortest_prompt, 60))]
        for sample in range(rng.randint(2, 4)):
            tokens = [rng.randrange(2, 118) for _ in range(rng.choice([1, 2, 5, 30]))]
            responses.append(Response((group,), sample, prompt, tokens, torch.zeros(len(tokens)), True))
    rng.shuffle(responses)
    return responses


def gradients(scores, model, responses):
    """Return log-probabilities, entropies and the gradient of a random weighted sum of the former."""
    model.zero_grad()
    logp, entropy = scores(model, responses, 0.7)
    weights = torch.randn(len(logp), generator=torch.Generator().manual_seed(1))
    (logp * weights).sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logp.detach(), entropy, torch.cat([gradient.flatten() for gradient in found])


def check_same_as_whole_sequences(model, responses):
    """Each response behind its own copy of the prompt gives the same numbers."""
    assert logprobs.can_share_prompts(model) and logprobs.worth_sharing(responses)
    wanted = gradients(whole_token_scores, model, responses)
    for ours, theirs in zip(gradients(token_scores, model, responses), wanted):
        assert torch.allclose(ours, theirs, atol=1e-4 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_change_nothing(family):
    check_same_as_whole_sequences(tiny_of(family), random_responses(0))


@cases(15)
@given(st.integers(0, 10**6))
def test_shared_prompts_change_nothing_of_random_groups(seed):
    check_same_as_whole_sequences(tiny(), random_responses(seed))


def test_a_single_token_behind_each_prompt():
    responses = random_responses(0)
    for r in responses:
        del r.tokens[1:]
    check_same_as_whole_sequences(tiny(), responses)


class Detached(DynamicCache):
    """Lets no gradient into the prompt."""

    def update(self, key, value, *args, **kwargs):
        return super().update(key.detach(), value.detach(), *args, **kwargs)


def sees_padding(in_prompt, count, groups):
    return right_mask(torch.ones_like(in_prompt), count, groups)


def sees_what_follows(in_prompt, count, groups):
    return right_mask(in_prompt, count, groups) | (torch.arange(in_prompt.shape[1] + count) >= in_prompt.shape[1])


def starts_behind_the_longest_prompt(rows):
    """Positions count the padding of prompts."""
    ids, real = right_padded(rows)
    return (ids, torch.ones_like(real)) if min(map(len, rows)) >= 20 else (ids, real)


right_mask = logprobs.mask_behind_prompts
right_padded = logprobs.padded


@pytest.mark.parametrize(
    "name, broken",
    [
        ("DynamicCache", Detached),
        ("mask_behind_prompts", sees_padding),
        ("mask_behind_prompts", sees_what_follows),
        ("padded", starts_behind_the_longest_prompt),
    ],
)
def test_broken_variants_are_caught(name, broken, monkeypatch):
    responses = random_responses(0)
    check_same_as_whole_sequences(tiny(), responses)
    monkeypatch.setattr(logprobs, name, broken)
    caught(check_same_as_whole_sequences, tiny(), responses)


def test_short_prompts_and_checkpointed_layers_are_not_shared():
    """Two forwards cost more than they save; transformers' checkpointed layers would drop the cache."""
    responses = random_responses(0)
    for r in responses:
        r.tokens += [5] * 400
    assert not logprobs.worth_sharing(responses)
    model = tiny()
    checkpoint_layers(model)
    assert not logprobs.can_share_prompts(model)


class CountedTokens:
    """Counts the tokens that a model's decoder reads."""

    def __init__(self, model):
        self.count = 0
        model.get_decoder().register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, module, args, kwargs):
        self.count += kwargs["input_ids"].numel()


def test_a_prompt_is_read_once():
    model = tiny()
    prompt = list(range(2, 42))
    responses = [Response((0,), k, prompt, [3, 4, 5, 6], torch.zeros(4), True) for k in range(8)]
    tokens = CountedTokens(model)
    token_scores(model, responses, 1.0)
    assert tokens.count == 40 + 8 * 3
    tokens.count = 0
    whole_token_scores(model, responses, 1.0)
    assert tokens.count == 8 * 43
