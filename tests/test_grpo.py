"""GRPO's sums: masks, denominators, advantages, losses, micro-batches, the update. The loop is in test_loop.py."""

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st

import train_grpo
from parts.engine.interfaces import Group, Response
from parts.engine.sampling import Sampling, sequence_seed
from parts.training import micro_batches as batches
from parts.training.layouts import trainable_parameters
from parts.training.micro_batches import TrainingSample, micro_batches
from rollout import Engine
from tasks import Grade
from train_grpo import Config, Worker, advantages, policy_loss, token_logprobs, token_scores, token_weights, update

CONFIG = Config(prompts=4, samples=6, max_new=30, micro_tokens=200, device="cpu")


def make_responses(model, temperature=1.0, prompts=4, samples=6):
    """Graded at random."""
    rng = random.Random(0)
    groups = []
    for i in range(prompts):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(2, 9))]
        groups.append(Group(("train", i), prompt, [sequence_seed(i, k) for k in range(samples)]))
    sampling = Sampling(temperature=temperature, max_new=30)
    responses = sorted(Engine(model, {1}, 24, 64).generate(groups, sampling), key=lambda r: (r.group, r.sample))
    for r in responses:
        r.grade = Grade(rng.random() < 0.4, True)
    return responses


def rewards_of(responses, samples=6):
    return torch.tensor([float(r.grade.strict) for r in responses]).view(-1, samples)


def advantage_of(responses, loss="grpo") -> list[float]:
    return advantages(rewards_of(responses), loss).flatten().tolist()


class Rank(Worker):
    """One of several workers; keeps the gradients that it would add to the others'."""

    def __init__(self, config, rank, size):
        super().__init__(config)
        self.rank = rank
        self.size = size
        self.gradients = []

    def all_reduce(self, tensors):
        self.gradients = [t.clone() for t in tensors]


def norm_of(tensors) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


class Frozen:
    """An optimizer that only notes the norms of the gradients that it gets."""

    param_groups = [{}]

    def __init__(self, model):
        self.model = model
        self.norms = []

    def step(self):
        self.norms.append(norm_of(p.grad for p in trainable_parameters(self.model)))

    def zero_grad(self):
        self.model.zero_grad()


def gradient(model, responses, config=CONFIG, size=1, reference=None):
    """The gradient that `update` hands to the optimizer, with `size` workers played one after the other."""
    total = None
    for rank in range(size):
        worker = Rank(config, rank, size)
        advantage = advantage_of(responses, config.loss)
        stats = update(model, reference, Frozen(model), responses, advantage, 0, config, worker)
        total = worker.gradients if total is None else [a + b for a, b in zip(total, worker.gradients)]
    return total, stats


def close(a, b, tolerance=1e-5) -> bool:
    scale = max(x.abs().max() for x in a)
    return all(torch.allclose(x, y, atol=tolerance * scale) for x, y in zip(a, b))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------- masks, log-probabilities, temperature


def check_scoring(model, scorer, sampled_at=1.0, scored_at=1.0):
    responses = make_responses(model, sampled_at)
    assert any(r.stopped for r in responses)
    assert len({len(r.tokens) for r in responses}) >= 3
    logp = scorer(model, responses, scored_at)
    behaviour = torch.cat([r.logprobs for r in responses])
    assert logp.shape == behaviour.shape  # one for every token, the stop token included
    assert torch.allclose(logp, behaviour, atol=1e-4)


def test_rollout_logprobs_equal_recomputed_ones():
    model = tiny()
    check_scoring(model, token_logprobs)
    check_scoring(model, token_logprobs, 0.7, 0.7)
    caught(check_scoring, model, token_logprobs, 0.7, 1.0)  # another temperature in scoring

    def shifted(model, responses, temperature):
        return token_logprobs(model, [replace(r, prompt=r.prompt[1:]) for r in responses], temperature)

    caught(check_scoring, model, shifted)


def check_stop_token_learns(model, scorer):
    """d/dbias of sum log softmax = counts - sum of probabilities: only right if every stop token is in."""
    responses = [r for r in make_responses(model) if r.stopped][:2]
    bias = torch.zeros(118, requires_grad=True)
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    scorer(model, responses, 1.0).sum().backward()
    hook.remove()
    wanted = torch.zeros(118)
    for r in responses:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).logits[0, len(r.prompt) - 1 :]
        wanted += torch.bincount(torch.tensor(r.tokens), minlength=118) - logits.softmax(-1).sum(0)
    assert torch.allclose(bias.grad, wanted, atol=1e-3)


def test_the_stop_token_gets_its_gradient():
    model = tiny()
    check_stop_token_learns(model, token_logprobs)

    def masked_by_pad(model, responses, temperature):  # what `ids != pad` does when pad and stop token are the same
        without_stop = []
        for r in responses:
            without_stop.append(replace(r, tokens=[t for t in r.tokens if t != 1]))
        return token_logprobs(model, without_stop, temperature)

    caught(check_stop_token_learns, model, masked_by_pad)


# ---------------------------------------------------------------- denominators


def check_partition_invariance(loss):
    model = tiny()
    config = replace(CONFIG, loss=loss)
    responses = make_responses(model)
    whole, _ = gradient(model, responses, replace(config, micro_tokens=10_000))
    for size, tokens in ((1, 60), (2, 200), (3, 90)):
        parts, _ = gradient(model, responses, replace(config, micro_tokens=tokens), size)
        assert close(whole, parts)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_gradient_does_not_depend_on_micro_batches_or_workers(loss, monkeypatch):
    check_partition_invariance(loss)
    right = train_grpo.accumulate

    def local(model, reference, batches, *rest):  # denominators of the micro-batch instead of the whole
        for batch in batches:
            for x, weight in zip(batch, token_weights([len(x.response.tokens) for x in batch], loss, 30)):
                x.weight = weight
        return right(model, reference, batches, *rest)

    monkeypatch.setattr(train_grpo, "accumulate", local)
    caught(check_partition_invariance, loss)


def logprobs_by_hand(model, r, temperature) -> torch.Tensor:
    """Of one response's tokens, (N,): alone, without padding."""
    ids = torch.tensor([r.prompt + r.tokens])
    logits = model(input_ids=ids[:, :-1]).logits[0, len(r.prompt) - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(r.prompt) :, None])[:, 0]


def gradient_by_hand(model, reference, responses, config) -> list[torch.Tensor]:
    """One response after the other, those without an advantage too. Where rho = 1 its gradient is that of log p."""
    tokens = sum(len(r.tokens) for r in responses)
    total = torch.zeros(())
    for r, advantage in zip(responses, advantage_of(responses, config.loss)):
        weights = {
            "grpo": 1 / (len(responses) * len(r.tokens)),
            "dr_grpo": 1 / (len(responses) * config.max_new),
            "dapo": 1 / tokens,
            "gspo": 1 / (len(responses) * len(r.tokens)),
            "cispo": 1 / tokens,
        }
        logp = logprobs_by_hand(model, r, config.temperature)
        d = logprobs_by_hand(reference, r, config.temperature).detach() - logp
        penalty = config.kl * (d.exp() - d - 1)
        total = total + weights[config.loss] * (penalty - advantage * logp).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return list(gradients)


def check_gradient_by_hand(loss, kl):
    model = tiny()
    reference = tiny()
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.02)
    config = replace(CONFIG, loss=loss, kl=kl, temperature=0.7)
    responses = make_responses(model, config.temperature)
    for r in responses[:6]:
        r.grade = Grade(True, True)  # a group without advantages: it counts in the denominators
    gradients, stats = gradient(model, responses, config, reference=reference if kl else None)
    assert close(gradients, gradient_by_hand(model, reference, responses, config), 1e-4)
    assert stats["gap_max"] < 1e-4


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_gradient_equals_one_by_hand(loss, kl, monkeypatch):
    check_gradient_by_hand(loss, kl)

    def at_temperature_one(model, responses, temperature, *rest):
        return token_scores(model, responses, 1.0, *rest)

    monkeypatch.setattr(train_grpo, "token_scores", at_temperature_one)
    caught(check_gradient_by_hand, loss, kl)


def test_what_has_no_advantage_counts_in_the_denominators(monkeypatch):
    check_gradient_by_hand("grpo", 0.0)
    right = train_grpo.gradients

    def of_the_useful_alone(model, reference, optimizer, examples, *rest):
        for x, weight in zip(examples, token_weights([len(x.response.tokens) for x in examples], "grpo", 30)):
            x.weight = weight
        return right(model, reference, optimizer, examples, *rest)

    monkeypatch.setattr(train_grpo, "gradients", of_the_useful_alone)
    caught(check_gradient_by_hand, "grpo", 0.0)


def names(examples) -> list[tuple]:
    """Which responses they are."""
    return [(x.response.group, x.response.sample) for x in examples]


def contents(shares) -> list[tuple]:
    """(worker, names) of every micro-batch."""
    return [(rank, names(batch)) for rank, share in enumerate(shares) for batch in share]


def check_content_order(cut):
    examples = [TrainingSample(r, 1.0) for r in make_responses(tiny())]
    shuffled = random.Random(3).sample(examples, len(examples))
    shares = cut(examples, 150, 2)
    assert contents(shares) == contents(cut(shuffled, 150, 2))
    every_batch = [batch for share in shares for batch in share]
    everything = [x for batch in every_batch for x in batch]
    assert sorted(names(everything)) == names(examples)
    for batch in every_batch:
        assert len(batch) == 1 or len(batch) * max(x.length for x in batch) <= 150


def test_micro_batches_are_cut_by_content():
    check_content_order(micro_batches)

    def by_arrival(examples, tokens, workers):
        singles = [[x] for x in examples]
        return [singles[rank::workers] for rank in range(workers)]

    caught(check_content_order, by_arrival)
    assert micro_batches([], 100, 3) == [[], [], []]


def partitions(items: list):
    """All ways to cut a list into neighbours."""
    if not items:
        yield []
    for n in range(1, len(items) + 1):
        for rest in partitions(items[n:]):
            yield [items[:n], *rest]


def check_least_cost(cut, examples: list[TrainingSample], tokens: int):
    """No other way to cut them costs less."""

    def fits(batch) -> bool:
        return len(batch) == 1 or len(batch) * batch[0].length <= tokens

    def price(way) -> int:
        return sum(batches.cost(len(batch), batch[0].length, tokens) for batch in way)

    found = cut(examples, tokens)
    assert [x for batch in found for x in batch] == examples
    assert all(map(fits, found))
    assert price(found) == min(price(way) for way in partitions(examples) if all(map(fits, way)))


def as_full_as_can_be(examples: list[TrainingSample], tokens: int) -> list[list[TrainingSample]]:
    found = []
    for x in examples:
        if found and (len(found[-1]) + 1) * found[-1][0].length <= tokens:
            found[-1].append(x)
        else:
            found.append([x])
    return found


def of_lengths(lengths: list[int]) -> list[TrainingSample]:
    return [
        TrainingSample(Response(("train", 0), i, [7] * n, [], torch.zeros(0), True), 1.0) for i, n in enumerate(lengths)
    ]


@cases(60)
@given(st.lists(st.integers(1, 60), max_size=9), st.integers(1, 400))
def test_micro_batches_cost_least(lengths, tokens):
    check_least_cost(batches.cut, of_lengths(sorted(lengths, reverse=True)), tokens)


def test_full_micro_batches_are_not_the_cheapest():
    caught(check_least_cost, as_full_as_can_be, of_lengths([90, 60, 20, 20, 20, 20]), 400)


def test_every_mini_batch_holds_samples_of_every_group(monkeypatch):
    responses = make_responses(tiny())
    seen = []

    def look(model, reference, optimizer, examples, *rest):
        seen.append(examples)
        return train_grpo.UpdateStats()

    monkeypatch.setattr(train_grpo, "gradients", look)
    gradient(tiny(), responses, replace(CONFIG, minibatches=3, kl=0.1))  # with KL no group is left out
    assert len(seen) == 3
    everything = [x for batch in seen for x in batch]
    assert sorted(names(everything)) == [(r.group, r.sample) for r in responses]
    for batch in seen:
        assert {x.response.group for x in batch} == {r.group for r in responses}


# ---------------------------------------------------------------- advantages and losses


def check_flat_groups(function):
    rewards = torch.tensor([[0.1] * 7, [1.0] * 7, [0.0] * 7, [0, 1, 0, 0, 1, 0, 0]])
    a = function(rewards, "grpo")
    assert (a[:3] == 0).all()
    assert (a[3] != 0).all()


def test_groups_without_variance_contribute_exactly_zero():
    check_flat_groups(advantages)

    def by_formula_alone(rewards, loss):
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)

    caught(check_flat_groups, by_formula_alone)
    model = tiny()
    responses = make_responses(model)
    for r in responses[:6]:
        r.grade = Grade(True, True)
    with_flat, _ = gradient(model, responses)
    for r in responses[:6]:
        r.tokens = r.tokens[::-1]  # other tokens, same lengths: a flat group must not matter
    assert equal(with_flat, gradient(model, responses)[0])


def check_first_update(loss_function, monkeypatch):
    monkeypatch.setattr(train_grpo, "policy_loss", loss_function)
    model = tiny()
    grads, stats = gradient(model, make_responses(model))
    assert abs(stats["loss"]) < 1e-6
    assert stats["gap_max"] < 1e-4
    assert stats["clipped"] == 0
    assert max(g.abs().max() for g in grads) > 1e-4


def test_first_update_has_loss_zero_and_a_gradient(monkeypatch):
    check_first_update(policy_loss, monkeypatch)

    def ratio_without_gradient(logp, old, *rest):
        return policy_loss(logp * 0 + old, old, *rest)

    def ratio_not_one(logp, old, *rest):
        return policy_loss(logp, old * 0.9, *rest)

    caught(check_first_update, ratio_without_gradient, monkeypatch)
    caught(check_first_update, ratio_not_one, monkeypatch)


def test_weights_and_advantages_of_the_variants():
    assert token_weights([2, 8], "grpo", 30) == [1 / 4, 1 / 16]
    assert token_weights([2, 8], "dr_grpo", 30) == [1 / 60, 1 / 60]
    assert token_weights([2, 8], "dapo", 30) == [1 / 10, 1 / 10]
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    assert torch.allclose(advantages(rewards, "dr_grpo"), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    assert torch.allclose(advantages(rewards, "grpo").std(1, correction=0), torch.tensor([1.0]), atol=1e-4)


@pytest.mark.parametrize(
    "ratio, advantage, clipped",
    [(1.4, 1, True), (1.25, 1, False), (0.7, 1, False), (0.7, -1, True), (0.85, -1, False), (1.4, -1, False)],
)
def test_clip_is_asymmetric_and_one_sided(ratio, advantage, clipped):
    config = replace(CONFIG, clip_low=0.2, clip_high=0.3)
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    policy_loss(logp, torch.zeros(1), None, torch.tensor([float(advantage)]), torch.ones(1), config).backward()
    assert (logp.grad.item() == 0) == clipped


def test_k3_is_an_unbiased_positive_estimate_of_the_kl():
    p = torch.tensor([0.7, 0.2, 0.1])
    q = torch.tensor([0.5, 0.25, 0.25])
    config = replace(CONFIG, kl=1.0)
    penalties = []
    for i in range(3):
        logp = p.log()[i : i + 1]
        penalties.append(policy_loss(logp, logp, q.log()[i : i + 1], torch.zeros(1), torch.ones(1), config))
    assert all(x > 0 for x in penalties)
    expected = sum(chance * x for chance, x in zip(p, penalties))
    assert torch.isclose(expected, (p * (p / q).log()).sum(), atol=1e-6)


def test_truncated_responses_are_maskable():
    model = tiny()
    responses = make_responses(model)
    truncated = [r for r in responses if not r.stopped]
    assert truncated
    config = replace(CONFIG, mask_truncated=True)
    masked, _ = gradient(model, responses, config)
    for r in truncated:
        r.tokens = r.tokens[::-1]
    assert equal(masked, gradient(model, responses, config)[0])
    for r in truncated:
        r.tokens = r.tokens[::-1]
    assert not close(masked, gradient(model, responses)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2, "minibatches": 3},
        {"kl": 0.1},
        {"bf16": True},
        {"loss": "dapo", "clip_high": 0.28},
        {"loss": "gspo", "epochs": 2, "tis_cap": 2.0},
        {"loss": "cispo", "epochs": 2, "clip_low": 1.0, "clip_high": 4.0},
    ],
)
def test_update_improves_the_likelihood_of_what_was_right(changes):
    model = tiny()
    config = replace(CONFIG, lr=3e-4, warmup=1, **changes)
    responses = make_responses(model)
    advantage = advantage_of(responses, config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)

    def score() -> float:
        return sum(a * token_logprobs(model, [r], 1.0).mean() for a, r in zip(advantage, responses)).item()

    before = score()
    reference = tiny() if config.kl else None
    stats = update(model, reference, optimizer, responses, advantage, 0, config, Worker(config))
    assert score() > before
    assert math.isfinite(stats["grad_norm"])
    if not config.bf16:
        assert stats["gap_max"] < 1e-4  # of the first update alone: in later ones the policy is another


def check_clip_statistics():
    """In the second epoch: the share of tokens whose ratio to the rollout's probability left the range."""
    model = tiny()
    config = replace(CONFIG, lr=3e-3, warmup=1, epochs=2, clip_low=0.1, clip_high=0.4)
    responses = make_responses(model)
    advantage = advantage_of(responses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    after_one = tiny()
    first = torch.optim.AdamW(after_one.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    update(after_one, None, first, responses, advantage, 0, replace(config, epochs=1), Worker(config))
    useful = [r for r, a in zip(responses, advantage) if a]
    with torch.no_grad():
        logp = token_logprobs(after_one, useful, 1.0)
    ratio = (logp - torch.cat([r.logprobs for r in useful])).exp()
    below = (ratio < 0.9).sum().item()
    above = (ratio > 1.4).sum().item()
    assert min(below, above) > 10
    stats = update(model, None, optimizer, responses, advantage, 0, config, Worker(config))
    # two epochs, the first unclipped; a ratio at the very edge may fall on either side
    assert stats["clipped"] * 2 * len(ratio) == pytest.approx(below + above, abs=1)


def test_clip_statistics_by_hand(monkeypatch):
    check_clip_statistics()

    def symmetric(logp, old, config):
        ratio = (logp - old).exp()
        return ratio, ratio.clamp(1 - config.clip_low, 1 + config.clip_low)

    monkeypatch.setattr(train_grpo, "clip_ratio", symmetric)
    caught(check_clip_statistics)
