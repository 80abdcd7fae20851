"""The losses, token by token, against the formulas of their papers and the numbers of TRL; truncated importance
sampling, the penalty for overlong responses, learning rate schedules. Whole updates are in test_grpo.py, the selection
of groups in test_dynamic.py.
"""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import caught, tiny
from test_grpo import CONFIG, NormRecorder, advantage_of, close, equal, gradient, make_responses
from test_micro_batches import GatheringWorker
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import train_grpo
from parts.engine.interfaces import Response
from parts.training.layouts import ReplicatedLayout
from parts.training.losses import lr_factor, overlong_penalty, set_lr
from parts.training.micro_batches import TrainingSample
from parts.training.update_stats import UpdateStats, summarise_update
from train_grpo import Config, Worker, token_weights, update

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")

# ---------------------------------------------------------------- one micro-batch, token by token


@dataclass
class Case:
    """Log-probabilities of the tokens of some responses, a vector for each response, and the responses' advantages."""

    logp: list[torch.Tensor]
    old: list[torch.Tensor]
    rollout: list[torch.Tensor]
    reference: list[torch.Tensor]
    advantage: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(x) for x in self.logp]


def random_case(seed: int) -> Case:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (int(torch.randint(1, 7, (1,), generator=rng)),), generator=rng).tolist()

    def near(parts, distance: float) -> list[torch.Tensor]:
        return [x + distance * torch.randn(len(x), generator=rng) for x in parts]

    logp = [-3 * torch.rand(n, generator=rng) for n in lengths]
    old = near(logp, 0.3)
    advantage = torch.randn(len(lengths), generator=rng).tolist()
    return Case(logp, old, near(old, 0.6), near(logp, 0.3), advantage)


def by_the_code(case: Case, config: Config, monkeypatch) -> tuple[float, torch.Tensor, UpdateStats]:
    """Return loss, its gradient for each token (N,), and figures, of train_grpo.add_gradient in a later update."""
    weights = token_weights(case.lengths, config.loss, config.max_new)
    batch = []
    for i, n in enumerate(case.lengths):
        response = Response(0, i, [1], [2] * n, case.rollout[i], True)
        old = case.old[i] if config.tis_cap > 0 else None
        batch.append(TrainingSample(response, case.advantage[i], weights[i], old))
    leaf = torch.cat(case.logp).requires_grad_()
    reference = "a reference" if config.kl else None
    stats = UpdateStats()
    with monkeypatch.context() as patch:
        scores = {None: (leaf, torch.ones(len(leaf))), "a reference": (torch.cat(case.reference), None)}
        patch.setattr(ReplicatedLayout, "token_scores", lambda self, model, *args: scores[model])
        train_grpo.add_gradient(None, reference, batch, False, config, Worker(config), stats)
    stats = stats.read()
    return stats.loss, leaf.grad, stats


def by_formula(case: Case, config: Config) -> tuple[float, torch.Tensor]:
    """Return loss and gradient by the papers' formulas, one response after the other."""
    leaves = [x.clone().requires_grad_() for x in case.logp]
    low, high = 1 - config.clip_low, 1 + config.clip_high
    n = len(leaves)
    total = torch.zeros(())
    for i, logp in enumerate(leaves):
        old = case.old[i] if config.tis_cap > 0 else case.rollout[i]
        a = case.advantage[i]
        ratio = torch.exp(logp - old)
        if config.loss == "gspo":  # equations 5 and 7: one ratio, whose gradient reaches the tokens through the mean
            s = torch.exp((logp - old).sum() / len(logp))
            s = s.expand(len(logp))
            if config.tis_cap > 0:  # each token has its own weight: equation 14, GSPO-token
                s = s.detach() * torch.exp(logp) / torch.exp(logp).detach()
            objective = torch.minimum(s * a, s.clamp(low, high) * a)
        elif config.loss == "cispo":  # equations 4 and 5
            objective = ratio.clamp(low, high).detach() * a * logp
        else:
            objective = torch.stack([min(r * a, r.clamp(low, high) * a) for r in ratio])
        if config.tis_cap > 0:
            objective = objective * torch.exp(old - case.rollout[i]).clamp(max=config.tis_cap)
        d = case.reference[i] - logp
        objective = objective - config.kl * (torch.exp(d) - d - 1)
        if config.loss in ("grpo", "gspo"):
            total = total + objective.mean() / n
        elif config.loss == "dr_grpo":
            total = total + objective.sum() / (n * config.max_new)
        else:
            total = total + objective.sum() / sum(case.lengths)
    (-total).backward()
    return -total.item(), torch.cat([x.grad for x in leaves])


def check_formula(config: Config, monkeypatch):
    for seed in range(20):
        case = random_case(seed)
        loss, grads, _ = by_the_code(case, config, monkeypatch)
        wanted, wanted_grads = by_formula(case, config)
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert torch.allclose(grads, wanted_grads, atol=1e-5)


def broken_sum(logp, old, lengths):
    """A sum over the response, not divided by its length."""
    return logp - torch.cat([part.sum().expand(len(part)) for part in (logp - old).split(lengths)])


def broken_mean(logp, old, lengths):
    """A mean over the micro-batch instead of the response."""
    return logp - (logp - old).mean()


def clip_with_gradient(logp, old, reference, advantage, weight, config):
    _, clipped = train_grpo.clip_ratio(logp, old, config)
    return -(weight * clipped * advantage * logp).sum()


def clip_without_gradient(logp, old, reference, advantage, weight, config):
    """Clipped tokens get no gradient, as in grpo."""
    ratio, clipped = train_grpo.clip_ratio(logp, old, config)
    return -(weight * clipped.detach() * (ratio == clipped) * advantage * logp).sum()


@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_the_papers(loss, cap, kl, monkeypatch):
    config = replace(CONFIG, loss=loss, clip_low=0.1, clip_high=0.2, tis_cap=cap, kl=kl)
    check_formula(config, monkeypatch)
    broken = {
        "gspo": [("sequence_old_logprobs", broken_sum), ("sequence_old_logprobs", broken_mean)],
        "cispo": [("policy_loss", clip_with_gradient), ("policy_loss", clip_without_gradient)],
    }.get(loss, [])
    if cap:
        broken.append(("truncated_importance", lambda gap, cap: gap.exp()))
        broken.append(("truncated_importance", lambda gap, cap: (-gap).exp().clamp(max=cap)))
        broken.append(("truncated_importance", lambda gap, cap: gap.exp().clamp(1 / cap, cap)))
    for name, variant in broken:
        with monkeypatch.context() as patch:
            patch.setattr(train_grpo, name, variant)
            caught(check_formula, config, patch)


# ---------------------------------------------------------------- TRL


def table_case() -> Case:
    """Return a case made without a random generator, so that other libraries can be given the same numbers."""
    lengths = [3, 7, 5, 1]

    def shifts(a: int, b: int, size: float) -> list[torch.Tensor]:
        return [torch.tensor([((a * t + b * i) % 7 - 3) * size for t in range(n)]) for i, n in enumerate(lengths)]

    logp = [torch.tensor([-((5 * t + 3 * i + 1) % 13) / 6 - 0.05 for t in range(n)]) for i, n in enumerate(lengths)]
    old = [x + shift + 0.08 * (i - 1) for i, (x, shift) in enumerate(zip(logp, shifts(3, 2, 0.15)))]
    rollout = [x + shift for x, shift in zip(old, shifts(2, 5, 0.3))]
    reference = [x + shift for x, shift in zip(logp, shifts(4, 1, 0.2))]
    return Case(logp, old, rollout, reference, [1.5, -0.5, -1.0, 0.25])


# GRPOTrainer._compute_loss of TRL 1.16.0 on the same numbers: the loss, the norm of its gradient, and the sum of
# (number of the token * its gradient). Its gspo is importance_sampling_level="sequence"; its cispo has no lower clip,
# and epsilon_high there is the upper one itself: 1.3.
TRL = {
    "grpo": ({}, (-0.0188885, 0.1988493, 1.8972730)),
    "dr_grpo": ({"clip_high": 0.3, "kl": 0.1, "max_new": 10}, (0.1047332, 0.0768741, 1.3182513)),
    "dapo": ({"clip_high": 0.28}, (0.2560529, 0.1943922, 3.3419694)),
    "gspo": ({"clip_low": 0.05, "clip_high": 0.05}, (-0.0652094, 0.0581841, 0.2406086)),
    "cispo": ({"clip_low": 1.0, "clip_high": 0.3}, (-0.2905081, 0.2343669, 4.4206781)),
    "dapo, corrected": ({"clip_high": 0.28, "kl": 0.1, "tis_cap": 2.0}, (0.1479829, 0.2173037, 3.1737646)),
}


def check_trl(name: str, monkeypatch):
    changes, wanted = TRL[name]
    case = table_case()
    config = replace(CONFIG, loss=name.partition(",")[0], **changes)
    if not config.tis_cap > 0:
        case.rollout = case.old
    loss, grads, _ = by_the_code(case, config, monkeypatch)
    moment = sum(i * x for i, x in enumerate(grads.tolist()))
    assert (loss, grads.norm().item(), moment) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trl(name, monkeypatch):
    check_trl(name, monkeypatch)
    right = train_grpo.clip_ratio

    def symmetric(logp, old, config):
        return right(logp, old, replace(config, clip_low=0.4, clip_high=0.4))

    monkeypatch.setattr(train_grpo, "clip_ratio", symmetric)
    caught(check_trl, name, monkeypatch)


# ---------------------------------------------------------------- when the losses differ


def check_first_updates_agree(loss, other):
    """With one update per rollout, the two losses have the same gradient."""
    model = tiny()
    responses = make_responses(model)
    ours, _ = gradient(model, responses, replace(CONFIG, loss=loss))
    theirs, _ = gradient(model, responses, replace(CONFIG, loss=other))
    assert equal(ours, theirs) if loss == "gspo" else close(ours, theirs)


def test_with_one_update_per_rollout_gspo_is_grpo_and_cispo_is_dapo():
    check_first_updates_agree("gspo", "grpo")
    check_first_updates_agree("cispo", "dapo")
    caught(check_first_updates_agree, "gspo", "dapo")
    caught(check_first_updates_agree, "cispo", "grpo")


def test_gspo_and_cispo_differ_from_grpo_and_dapo_in_later_updates(monkeypatch):
    case = random_case(3)
    for loss, other in (("gspo", "grpo"), ("cispo", "dapo")):
        config = replace(CONFIG, loss=loss)
        grads = [by_the_code(case, c, monkeypatch)[1] for c in (config, replace(config, loss=other))]
        assert not close(grads[:1], grads[1:], 1e-2)


# ---------------------------------------------------------------- truncated importance sampling


def add_noise(responses, size: float = 0.5) -> torch.Tensor:
    """Add noise to the rollout's log-probabilities, as rounding does -> the noise of all tokens, (N,)."""
    rng = torch.Generator().manual_seed(1)
    noise = []
    for r in responses:
        noise.append(size * torch.randn(len(r.tokens), generator=rng))
        r.logprobs = r.logprobs - noise[-1]
    return torch.cat(noise)


def check_old_policy(workers: int, cap: float = 1.5):
    """The weights do not change, so p / p_old is 1 in all updates, whatever the rollout says. Each worker scores its
    own share.
    """
    model = tiny()
    responses = make_responses(model)
    useful = [r for r, a in zip(responses, advantage_of(responses)) if a]
    noise = add_noise(useful)
    config = replace(CONFIG, epochs=2, minibatches=3, tis_cap=cap, micro_tokens=90)
    figures = []
    for rank in range(workers):
        worker = GatheringWorker(config, rank, workers)
        update(model, None, NormRecorder(model), responses, advantage_of(responses), 0, config, worker)
        figures += worker.figures
    row = summarise_update(figures)
    assert row["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert row["gap_mean"] == pytest.approx(noise.abs().mean().item(), abs=1e-5)
    assert row["gap_max"] == pytest.approx(noise.abs().max().item(), abs=1e-4)
    assert row["capped"] == pytest.approx((noise > math.log(cap)).float().mean().item(), abs=1e-3)


@pytest.mark.parametrize("workers", [1, 2])
def test_with_the_correction_the_old_policy_is_the_trainers_in_all_updates(workers, monkeypatch):
    check_old_policy(workers)
    right = train_grpo.score_old_policy
    with monkeypatch.context() as patch:  # without scores, it is the rollout's from the second update on
        patch.setattr(train_grpo, "score_old_policy", lambda *args: None)
        caught(check_old_policy, workers)

    def first_mini_batch_only(model, minibatches, *rest):
        right(model, minibatches[:1], *rest)

    monkeypatch.setattr(train_grpo, "score_old_policy", first_mini_batch_only)
    caught(check_old_policy, workers)


def test_responses_are_scored_only_where_that_is_needed(monkeypatch):
    monkeypatch.setattr(train_grpo, "score_batch", lambda *args: pytest.fail("scored"))
    model = tiny()
    responses = make_responses(model)
    gradient(model, responses, replace(CONFIG, epochs=2, minibatches=2))
    gradient(model, responses, replace(CONFIG, tis_cap=2.0))  # with one update, its own forward gives the old policy


def check_corrected_gradient():
    """The weights of truncated importance sampling scale the gradient."""
    model = tiny()
    responses = make_responses(model)
    plain, _ = gradient(model, responses, replace(CONFIG, tis_cap=1e9))
    for r in responses:
        r.logprobs = r.logprobs - math.log(3)  # the rollout found each token a third as likely
    weighted, _ = gradient(model, responses, replace(CONFIG, tis_cap=1e9))
    assert close(weighted, [3 * g for g in plain])
    capped, stats = gradient(model, responses, replace(CONFIG, tis_cap=2.0))
    assert close(capped, [2 * g for g in plain])
    assert stats["capped"] == 1.0


def test_corrected_gradients_are_weighted_up_to_the_cap(monkeypatch):
    check_corrected_gradient()
    monkeypatch.setattr(train_grpo, "truncated_importance", lambda gap, cap: gap.exp())
    caught(check_corrected_gradient)


def check_default_cap():
    """Rollouts in bfloat16 are corrected unless that is switched off, others only where it is asked for."""

    def cap(**changes) -> float:
        return Worker(Config(device="cpu", **changes)).tis_cap

    assert cap() == 0.0
    assert cap(tis_cap=3.0) == 3.0
    assert cap(actor_dtype="bfloat16") == 2.0
    assert cap(actor_dtype="bfloat16", tis_cap=0.0) == 0.0
    assert cap(actor_dtype="bfloat16", tis_cap=3.0) == 3.0


def test_bfloat16_rollouts_are_corrected_by_default(monkeypatch):
    check_default_cap()
    right = Config.__init__

    def never(self, *args, **kwargs):
        right(self, *args, **{"tis_cap": 0.0, **kwargs})

    monkeypatch.setattr(Config, "__init__", never)
    caught(check_default_cap)


# ---------------------------------------------------------------- figures


def check_figures(monkeypatch):
    """The figures of two micro-batches together equal those of all their tokens at once."""
    config = replace(CONFIG, clip_low=0.1, clip_high=0.2)
    cases = [random_case(1), random_case(2)]
    parts = [by_the_code(case, config, monkeypatch)[2] for case in cases]
    ratio = torch.cat([torch.cat(case.logp) - torch.cat(case.rollout) for case in cases]).exp()
    row = summarise_update(parts)
    assert row["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert row["ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-5)
    assert row["clipped"] == pytest.approx(((ratio < 0.9) | (ratio > 1.2)).float().mean().item())
    assert row["entropy"] == pytest.approx(1.0)


def test_ratios_and_clipped_tokens_by_hand(monkeypatch):
    check_figures(monkeypatch)
    right = UpdateStats.add

    def with_means(self, loss, entropy, ratio, *rest):
        right(self, loss, entropy, ratio.mean().expand(len(ratio)), *rest)

    monkeypatch.setattr(UpdateStats, "add", with_means)
    caught(check_figures, monkeypatch)


def test_without_tokens_there_are_no_entropy_and_ratio():
    row = summarise_update([UpdateStats(), UpdateStats()])
    assert row["entropy"] is None
    assert row["ratio_mean"] is None
    assert row["loss"] == row["gap_mean"] == 0.0


# ---------------------------------------------------------------- the penalty for overlong responses


def check_penalty(function):
    """DAPO's equation 13, case by case."""
    rng = random.Random(0)
    for _ in range(200):
        max_new = rng.randint(2, 60)
        tokens = rng.randint(1, max_new)
        lengths = [rng.randint(1, max_new) for _ in range(6)]
        wanted = []
        for n in lengths:
            if n <= max_new - tokens:
                wanted.append(0.0)
            else:
                wanted.append(((max_new - tokens) - n) / tokens)
        got = function(torch.tensor(lengths).view(2, 3), max_new, tokens)
        assert torch.allclose(got.flatten(), torch.tensor(wanted), atol=1e-6)
    assert function(torch.tensor([60]), 60, 20).item() == -1
    assert not function(torch.arange(1, 61), 60, 0).any()


def test_overlong_responses_are_penalised_softly():
    check_penalty(overlong_penalty)
    caught(check_penalty, lambda lengths, max_new, tokens: -(lengths > max_new - tokens).float())
    caught(check_penalty, lambda lengths, max_new, tokens: (-lengths / max_new).clamp(-1, 0))


# ---------------------------------------------------------------- schedules

MAKERS = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def check_schedule(factor, name: str):
    """After the warm-up, the factor is that of transformers' own schedule."""
    for warmup, total in ((0, 10), (3, 20), (1, 2), (5, 6)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = MAKERS[name](optimizer, warmup, total)
        for done in range(1, total + 1):
            wanted = optimizer.param_groups[0]["lr"] if done > warmup else done / warmup
            assert factor(name, done, warmup, total) == pytest.approx(wanted, abs=1e-9)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", MAKERS)
def test_schedules_are_those_of_transformers(name):
    check_schedule(lr_factor, name)

    def without_warmup(name, done, warmup, total):
        return lr_factor(name, done, 0, total)

    caught(check_schedule, without_warmup, name)
    caught(check_schedule, lambda name, *rest: lr_factor("constant", *rest), name)


def test_the_constant_schedule_rises_over_the_warm_up_and_stays():
    for warmup in (0, 1, 3):
        assert [lr_factor("constant", done, warmup, 5) for done in range(1, 9)] == [
            min(1.0, done / max(1, warmup)) for done in range(1, 9)
        ]


def test_the_optimizer_gets_learning_rate_and_weight_decay():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=9.0, weight_decay=9.0)
    config = replace(CONFIG, lr=0.5, warmup=2, steps=5, epochs=2, schedule="linear", weight_decay=0.1)
    lrs = []
    for done in range(1, 11):
        set_lr(optimizer, done, config)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx([0.25, 0.5] + [0.5 * (8 - i) / 8 for i in range(8)])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
