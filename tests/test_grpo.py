"""The mathematics of GRPO: masks, denominators, advantages, losses, and the update.

Micro-batches are in test_micro_batches.py, the losses' formulas in test_losses.py, the training loop in test_loop.py.
"""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import caught, tiny
from helpers import token_logprobs

import train_grpo
from parts.engine.interfaces import Group
from parts.engine.sampling import Sampling, sequence_seed
from parts.training.layouts import ReplicatedLayout, trainable_parameters
from parts.training.logprobs import token_scores
from parts.training.micro_batches import TrainingSample
from rollout import Engine
from tasks import Grade
from train_grpo import Config, Worker, advantages, mini_batches, policy_loss, token_weights, update

CONFIG = Config(prompts=4, samples=6, max_new=30, micro_tokens=200, device="cpu")


def make_responses(model, temperature=1.0, prompts=4, samples=6):
    """Return responses of the model to random prompts, graded at random."""
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


class SimulatedWorker(Worker):
    """One of several workers that are simulated one after the other. It keeps the gradients that it would send."""

    def __init__(self, config, rank, world_size):
        self.rank = rank
        self.world_size = world_size
        super().__init__(config)
        self.gradients = []

    def all_reduce(self, tensors):
        self.gradients = [t.clone() for t in tensors]


def norm_of(tensors) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


class NormRecorder:
    """An optimizer that changes no weight, and records the norms of the gradients that it gets."""

    param_groups = [{}]

    def __init__(self, model):
        self.model = model
        self.norms = []

    def step(self):
        self.norms.append(norm_of(p.grad for p in trainable_parameters(self.model)))

    def zero_grad(self):
        self.model.zero_grad()


def gradient(model, responses, config=CONFIG, workers=1, reference=None):
    """Return the gradient that `update` hands to the optimizer, and the last worker's figures. Several workers are
    simulated one after the other.
    """
    total = None
    for rank in range(workers):
        worker = SimulatedWorker(config, rank, workers)
        advantage = advantage_of(responses, config.loss)
        stats = update(model, reference, NormRecorder(model), responses, advantage, 0, config, worker)
        total = worker.gradients if total is None else [a + b for a, b in zip(total, worker.gradients)]
    return total, stats


def close(a, b, tolerance=1e-5) -> bool:
    """Return whether two gradients agree up to this share of the first one's largest number."""
    scale = max(x.abs().max() for x in a)
    return all(torch.allclose(x, y, atol=tolerance * scale) for x, y in zip(a, b))


def equal(a, b) -> bool:
    """Return whether two lists of tensors are equal bit by bit."""
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
    """The gradient of sum log softmax by a bias of the logits is the tokens' counts less the sum of the probabilities.
    That holds only if every stop token is counted.
    """
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


def test_the_stop_token_gets_a_gradient():
    model = tiny()
    check_stop_token_learns(model, token_logprobs)

    def masked_by_pad(model, responses, temperature):  # what `ids != pad` does where the stop token is the pad token
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
    for workers, tokens in ((1, 60), (2, 200), (3, 90)):
        parts, _ = gradient(model, responses, replace(config, micro_tokens=tokens), workers)
        assert close(whole, parts)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_the_gradient_does_not_depend_on_micro_batches_or_workers(loss, monkeypatch):
    check_partition_invariance(loss)
    right = train_grpo.add_gradient

    def with_denominators_of_the_micro_batch(model, reference, batch, *rest):
        for x, weight in zip(batch, token_weights([len(x.response.tokens) for x in batch], loss, 30)):
            x.weight = weight
        return right(model, reference, batch, *rest)

    monkeypatch.setattr(train_grpo, "add_gradient", with_denominators_of_the_micro_batch)
    caught(check_partition_invariance, loss)


def logprobs_by_hand(model, r, temperature) -> torch.Tensor:
    """Return the log-probabilities of one response's tokens, (N,), computed without other responses or padding."""
    ids = torch.tensor([r.prompt + r.tokens])
    logits = model(input_ids=ids[:, :-1]).logits[0, len(r.prompt) - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(r.prompt) :, None])[:, 0]


def gradient_by_hand(model, reference, responses, config) -> list[torch.Tensor]:
    """Return the gradient computed one response after the other, also of those without an advantage. Where rho = 1, its
    gradient is that of log p.
    """
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
        r.grade = Grade(True, True)  # a zero-variance group, which counts in the denominators
    gradients, stats = gradient(model, responses, config, reference=reference if kl else None)
    assert close(gradients, gradient_by_hand(model, reference, responses, config), 1e-4)
    assert stats["gap_max"] < 1e-4


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_the_gradient_equals_one_by_hand(loss, kl, monkeypatch):
    check_gradient_by_hand(loss, kl)

    def at_temperature_one(self, model, responses, temperature):
        return token_scores(model, responses, 1.0)

    monkeypatch.setattr(ReplicatedLayout, "token_scores", at_temperature_one)
    caught(check_gradient_by_hand, loss, kl)


def test_samples_without_an_advantage_count_in_the_denominators(monkeypatch):
    check_gradient_by_hand("grpo", 0.0)

    def without_them(samples, config):
        minibatches = mini_batches(samples, config)
        for minibatch in minibatches:
            weights = token_weights([len(x.response.tokens) for x in minibatch], "grpo", 30)
            for x, weight in zip(minibatch, weights):
                x.weight = weight
        return minibatches

    monkeypatch.setattr(train_grpo, "mini_batches", without_them)
    caught(check_gradient_by_hand, "grpo", 0.0)


def names(samples) -> list[tuple]:
    """Return (group, sample) of each training sample's response."""
    return [(x.response.group, x.response.sample) for x in samples]


def check_every_group_in_every_mini_batch(cut):
    responses = make_responses(tiny())
    samples = [TrainingSample(r, 1.0) for r in responses]
    minibatches = cut(samples, replace(CONFIG, minibatches=3))
    assert len(minibatches) == 3
    everything = [x for minibatch in minibatches for x in minibatch]
    assert sorted(names(everything)) == [(r.group, r.sample) for r in responses]
    for minibatch in minibatches:
        assert {x.response.group for x in minibatch} == {r.group for r in responses}


def test_every_mini_batch_holds_samples_of_every_group():
    check_every_group_in_every_mini_batch(mini_batches)

    def one_after_the_other(samples, config):
        size = len(samples) // config.minibatches
        return [samples[i * size : (i + 1) * size] for i in range(config.minibatches)]

    caught(check_every_group_in_every_mini_batch, one_after_the_other)


def test_with_a_kl_penalty_no_sample_is_left_out():
    samples = [TrainingSample(r, 0.0) for r in make_responses(tiny())]
    assert mini_batches(samples, CONFIG) == [[]]
    assert len(mini_batches(samples, replace(CONFIG, kl=0.1))[0]) == len(samples)


# ---------------------------------------------------------------- which policy is the old one


def old_policies(config, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Make an update of several mini-batches, with a noisy rollout and a learning rate that moves the weights.

    Return for each micro-batch, in order, log-probabilities (N,): the old ones that the loss got, those of the rollout,
    of the trainer now, and of the trainer before the first update.
    """
    model = tiny()
    responses = make_responses(model)
    rng = torch.Generator().manual_seed(1)
    for r in responses:
        r.logprobs = r.logprobs - 0.5 * torch.randn(len(r.tokens), generator=rng)
    before = tiny()
    seen = []

    def add_gradient(model, reference, batch, *rest):
        with torch.no_grad():
            start = token_logprobs(before, [x.response for x in batch], config.temperature)
        seen.append({"rollout": torch.cat([x.response.logprobs for x in batch]), "start": start})
        right_add_gradient(model, reference, batch, *rest)

    def loss(logp, old, *rest):
        seen[-1].update(old=old, now=logp.detach())
        return right_loss(logp, old, *rest)

    right_add_gradient = train_grpo.add_gradient
    right_loss = train_grpo.policy_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "add_gradient", add_gradient)
        patch.setattr(train_grpo, "policy_loss", loss)
        update(model, None, optimizer, responses, advantage_of(responses), 0, config, Worker(config))
    return seen


OLD_POLICIES = {"rollout", "start", "now"}


def check_old_policy(first_update: bool, cap: float, wanted: str, monkeypatch) -> None:
    """One cell of the table in `old_logprobs`: the old policy is `wanted`, and no other one."""
    config = replace(CONFIG, lr=1e-2, warmup=1, minibatches=2, tis_cap=cap, micro_tokens=10_000)
    first, later = old_policies(config, monkeypatch)
    seen = first if first_update else later
    others = OLD_POLICIES - {wanted}
    if first_update:
        others -= {"start", "now"}  # these are equal in the first update
    assert torch.allclose(seen["old"], seen[wanted], atol=1e-4)
    for other in others:
        assert (seen["old"] - seen[other]).abs().mean() > 0.01


CELLS = {
    "first update, no correction": (True, 0.0, "now"),
    "first update, corrected": (True, 2.0, "now"),
    "later updates, no correction": (False, 0.0, "rollout"),
    "later updates, corrected": (False, 2.0, "start"),
}


@pytest.mark.parametrize("cell", CELLS)
def test_the_old_policy_is_that_of_the_table(cell, monkeypatch):
    first_update, cap, wanted = CELLS[cell]
    check_old_policy(first_update, cap, wanted, monkeypatch)
    right = train_grpo.old_logprobs

    def of_the_rollout(batch, present, rollout, first):
        return rollout if first == first_update else right(batch, present, rollout, first)

    def of_the_present(batch, present, rollout, first):
        return present if first == first_update else right(batch, present, rollout, first)

    broken = of_the_present if wanted == "rollout" else of_the_rollout
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "old_logprobs", broken)
        caught(check_old_policy, first_update, cap, wanted, patch)
    if wanted == "start":
        monkeypatch.setattr(train_grpo, "old_logprobs", of_the_present)
        caught(check_old_policy, first_update, cap, wanted, monkeypatch)


# ---------------------------------------------------------------- advantages and losses


def check_zero_variance_groups(function):
    rewards = torch.tensor([[0.1] * 7, [1.0] * 7, [0.0] * 7, [0, 1, 0, 0, 1, 0, 0]])
    a = function(rewards, "grpo")
    assert (a[:3] == 0).all()
    assert (a[3] != 0).all()


def test_zero_variance_groups_contribute_exactly_zero():
    check_zero_variance_groups(advantages)

    def by_formula_alone(rewards, loss):
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)

    caught(check_zero_variance_groups, by_formula_alone)
    model = tiny()
    responses = make_responses(model)
    for r in responses[:6]:
        r.grade = Grade(True, True)
    before, _ = gradient(model, responses)
    for r in responses[:6]:
        r.tokens = r.tokens[::-1]  # other tokens of the same lengths: zero-variance groups must not matter
    assert equal(before, gradient(model, responses)[0])


def check_first_update(loss_function, monkeypatch):
    monkeypatch.setattr(train_grpo, "policy_loss", loss_function)
    model = tiny()
    grads, stats = gradient(model, make_responses(model))
    assert abs(stats["loss"]) < 1e-6
    assert stats["gap_max"] < 1e-4
    assert stats["clipped"] == 0
    assert max(g.abs().max() for g in grads) > 1e-4


def test_the_first_update_has_loss_zero_and_a_gradient(monkeypatch):
    check_first_update(policy_loss, monkeypatch)

    def ratio_without_gradient(logp, old, *rest):
        return policy_loss(logp * 0 + old, old, *rest)

    def ratio_not_one(logp, old, *rest):
        return policy_loss(logp, old * 0.9, *rest)

    caught(check_first_update, ratio_without_gradient, monkeypatch)
    caught(check_first_update, ratio_not_one, monkeypatch)


def test_weights_and_advantages_of_the_losses_by_hand():
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


def test_truncated_responses_can_be_masked():
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
def test_an_update_makes_rewarded_responses_more_likely(changes):
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
        assert stats["gap_max"] < 1e-4  # of the first update alone: later ones have another policy


def check_clip_statistics():
    """`clipped` is the share of tokens whose ratio left the range; here that happens in the second epoch."""
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
    # of two epochs the first clips nothing; a ratio at the edge of the range may fall on either side
    assert stats["clipped"] * 2 * len(ratio) == pytest.approx(below + above, abs=1)


def test_the_share_of_clipped_tokens_by_hand(monkeypatch):
    check_clip_statistics()

    def symmetric(logp, old, config):
        ratio = (logp - old).exp()
        return ratio, ratio.clamp(1 - config.clip_low, 1 + config.clip_low)

    monkeypatch.setattr(train_grpo, "clip_ratio", symmetric)
    caught(check_clip_statistics)


def check_a_step_without_variance_changes_nothing(**changes):
    """Adam's momentum from an earlier step would move the weights."""
    model = tiny()
    responses = make_responses(model)
    config = replace(CONFIG, lr=1e-2, warmup=1, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    worker = Worker(config)
    update(model, None, optimizer, responses, advantage_of(responses), 0, config, worker)
    before = [p.detach().clone() for p in model.parameters()]
    row = update(model, None, optimizer, responses, [0.0] * len(responses), 1, config, worker)
    assert row["grad_norm"] == 0
    assert all(map(torch.equal, before, model.parameters()))


def test_a_step_without_variance_changes_nothing(monkeypatch):
    check_a_step_without_variance_changes_nothing()
    check_a_step_without_variance_changes_nothing(epochs=2, minibatches=3)
    keep_all = train_grpo.mini_batches

    def never_empty(samples, config):
        return [batch or samples for batch in keep_all(samples, config)]

    monkeypatch.setattr(train_grpo, "mini_batches", never_empty)
    caught(check_a_step_without_variance_changes_nothing)


def test_prompts_depend_on_the_seed():
    """Seed 0 begins with the first problem; the others elsewhere, and each sees the same ones again."""

    def problems(seed: int) -> list:
        seen = []
        training = object.__new__(train_grpo.Training)
        training.config = replace(CONFIG, seed=seed)

        def generate(split, indices, samples, *names):
            seen.extend(indices)
            graded = [SimpleNamespace(grade=SimpleNamespace(reward=float(k % 2))) for k in range(samples)]
            return graded * len(indices)

        training.generate = generate
        training.sample(3)
        return seen

    assert problems(0) == [12, 13, 14, 15]
    assert problems(1) == problems(1)
    assert not set(problems(1)) & set(problems(0)) & set(problems(2))
