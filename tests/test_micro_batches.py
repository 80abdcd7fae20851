"""Micro-batches: they are cut by content, at the least cost, and an update that runs out of memory is done again."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_grpo import (
    CONFIG,
    NormRecorder,
    SimulatedWorker,
    advantage_of,
    close,
    gradient,
    make_responses,
    names,
)

import train_grpo
from parts.cli import UserError
from parts.engine.interfaces import Response
from parts.training import micro_batches
from parts.training.fsdp import FSDPLayout
from parts.training.layouts import ReplicatedLayout
from parts.training.logprobs import token_scores
from parts.training.micro_batches import MicroBatches, TrainingSample, batch_cost, partition, shares_of
from parts.training.update_stats import UpdateStats
from train_grpo import Worker, update

# ---------------------------------------------------------------- cut by content


def contents(shares) -> list[tuple]:
    """Return (worker, names) of every micro-batch."""
    return [(rank, names(batch)) for rank, share in enumerate(shares) for batch in share]


def check_cut_by_content(cut):
    samples = [TrainingSample(r, 1.0) for r in make_responses(tiny())]
    shuffled = random.Random(3).sample(samples, len(samples))
    shares = cut(samples, 150, 2)
    assert contents(shares) == contents(cut(shuffled, 150, 2))
    every_batch = [batch for share in shares for batch in share]
    everything = [x for batch in every_batch for x in batch]
    assert sorted(names(everything)) == names(samples)
    for batch in every_batch:
        assert len(batch) == 1 or len(batch) * max(x.length for x in batch) <= 150


def test_micro_batches_are_cut_by_content():
    check_cut_by_content(shares_of)

    def by_arrival(samples, tokens, workers):
        singles = [[x] for x in samples]
        return [singles[rank::workers] for rank in range(workers)]

    caught(check_cut_by_content, by_arrival)
    assert shares_of([], 100, 3) == [[], [], []]


# ---------------------------------------------------------------- the least cost


def all_partitions(items: list):
    """Yield all ways to cut a list into runs of neighbours."""
    if not items:
        yield []
    for n in range(1, len(items) + 1):
        for rest in all_partitions(items[n:]):
            yield [items[:n], *rest]


def check_least_cost(cut, samples: list[TrainingSample], tokens: int):
    """No other way to cut the samples costs less."""

    def fits(batch) -> bool:
        return len(batch) == 1 or len(batch) * batch[0].length <= tokens

    def cost(batches) -> int:
        return sum(batch_cost(len(batch), batch[0].length, tokens) for batch in batches)

    found = cut(samples, tokens)
    assert [x for batch in found for x in batch] == samples
    assert all(map(fits, found))
    assert cost(found) == min(cost(batches) for batches in all_partitions(samples) if all(map(fits, batches)))


def as_full_as_possible(samples: list[TrainingSample], tokens: int) -> list[list[TrainingSample]]:
    found = []
    for x in samples:
        if found and (len(found[-1]) + 1) * found[-1][0].length <= tokens:
            found[-1].append(x)
        else:
            found.append([x])
    return found


def samples_of_lengths(lengths: list[int]) -> list[TrainingSample]:
    samples = []
    for i, n in enumerate(lengths):
        samples.append(TrainingSample(Response(("train", 0), i, [7] * n, [], torch.zeros(0), True), 1.0))
    return samples


@cases(60)
@given(st.lists(st.integers(1, 60), max_size=9), st.integers(1, 400))
def test_micro_batches_cost_least(lengths, tokens):
    check_least_cost(partition, samples_of_lengths(sorted(lengths, reverse=True)), tokens)


def test_full_micro_batches_are_not_the_cheapest():
    caught(check_least_cost, as_full_as_possible, samples_of_lengths([90, 60, 20, 20, 20, 20]), 400)


# ---------------------------------------------------------------- out of memory


def limited(limit: int, sizes: list[int], counts=lambda: True):
    """Return a `token_scores` that runs out of memory above `limit` tokens; their number is appended to `sizes`.

    counts: whether a call is limited.
    """

    def token_scores_with_a_limit(self, model, responses, temperature):
        if counts():
            sizes.append(len(responses) * max(len(r.prompt) + len(r.tokens) for r in responses))
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError("no memory left")
        return token_scores(model, responses, temperature)

    return token_scores_with_a_limit


def check_out_of_memory(limit, monkeypatch, config=CONFIG, counts=lambda: True):
    """The gradient equals that of a machine with enough memory."""
    model = tiny()
    responses = make_responses(model)
    wanted, stats = gradient(model, responses, config)
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(ReplicatedLayout, "token_scores", limited(limit, sizes, counts))
        again, stats_again = gradient(model, responses, config)
    assert close(wanted, again)
    assert abs(stats["gap_max"] - stats_again["gap_max"]) < 1e-6
    assert max(sizes) > limit


def test_an_update_that_runs_out_of_memory_is_done_again_with_smaller_micro_batches(monkeypatch, capsys):
    check_out_of_memory(100, monkeypatch)
    assert "--micro-tokens 100" in capsys.readouterr().out
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self: None)  # gradients are never reset
    caught(check_out_of_memory, 100, monkeypatch)


def test_scoring_the_old_policy_is_done_again_with_smaller_micro_batches(monkeypatch):
    config = replace(CONFIG, tis_cap=2.0, epochs=2)
    check_out_of_memory(100, monkeypatch, config, lambda: not torch.is_grad_enabled())

    def without_retry(model, minibatches, optimizer, config, worker):
        for minibatch in minibatches:
            for batch in MicroBatches(minibatch, optimizer, worker):
                train_grpo.score_batch(model, batch, config, worker)

    monkeypatch.setattr(train_grpo, "score_old_policy", without_retry)
    with pytest.raises(torch.OutOfMemoryError):
        check_out_of_memory(100, monkeypatch, config, lambda: not torch.is_grad_enabled())


@pytest.mark.parametrize("checkpointing, advice", [(False, " or add --gradient-checkpointing"), (True, "")])
def test_a_single_response_that_does_not_fit_ends_the_run(checkpointing, advice, monkeypatch):
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    with pytest.raises(UserError, match=rf"single response of \d+ tokens: lower --max-new{advice}$"):
        check_out_of_memory(5, monkeypatch, config)


def check_a_layout_without_retries(can_retry: bool, monkeypatch):
    """Where a worker may not do its part again without the others (FSDP), the run ends."""
    monkeypatch.setattr(ReplicatedLayout, "can_retry", can_retry)
    ended = False
    try:
        check_out_of_memory(100, monkeypatch)
    except UserError as error:
        assert str(error).startswith("out of memory in the update: lower --micro-tokens 200")
        ended = True
    assert ended


def test_a_layout_that_cannot_retry_ends_the_run(monkeypatch):
    assert not FSDPLayout.can_retry
    check_a_layout_without_retries(False, monkeypatch)
    caught(check_a_layout_without_retries, True, monkeypatch)


def fail_in_the_third_micro_batch(calls: list[int]):
    """Return a `token_scores` that runs out of memory in its third call."""

    def token_scores_that_fails_once(self, model, responses, temperature):
        calls.append(len(responses))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")
        return token_scores(model, responses, temperature)

    return token_scores_that_fails_once


def check_late_out_of_memory(monkeypatch):
    """The third micro-batch does not fit: by then, two have added their gradients."""
    model = tiny()
    responses = make_responses(model)
    wanted, _ = gradient(model, responses)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(ReplicatedLayout, "token_scores", fail_in_the_third_micro_batch(calls))
        again, _ = gradient(model, responses)
    assert len(calls) > 6
    assert close(wanted, again)


def test_the_gradient_of_a_failed_try_is_dropped(monkeypatch):
    check_late_out_of_memory(monkeypatch)

    class NothingReset(MicroBatches):
        def __init__(self, samples, optimizer, worker):
            super().__init__(samples, SimpleNamespace(zero_grad=lambda: None), worker)

    monkeypatch.setattr(train_grpo, "MicroBatches", NothingReset)
    caught(check_late_out_of_memory, monkeypatch)


class GatheringWorker(SimulatedWorker):
    """Keeps the figures that it would send to the other workers."""

    def __init__(self, config, rank=0, world_size=1):
        super().__init__(config, rank, world_size)
        self.figures: list[UpdateStats] = []

    def gather(self, value):
        self.figures = value
        return [value]


def check_figures_of_a_failed_try(monkeypatch):
    """Every token counts once in the figures."""
    model = tiny()
    responses = make_responses(model)
    advantage = advantage_of(responses)
    figures = []
    for fails in (False, True):
        worker = GatheringWorker(CONFIG)
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(ReplicatedLayout, "token_scores", fail_in_the_third_micro_batch([]))
            update(model, None, NormRecorder(model), responses, advantage, 0, CONFIG, worker)
        figures += worker.figures
    whole, retried = figures
    useful = [len(r.tokens) for r, a in zip(responses, advantage) if a]
    assert whole.tokens == retried.tokens == retried.compared == sum(useful)
    for name in ("loss", "entropy", "ratio", "ratio_max", "clipped", "gap", "gap_max"):
        assert math.isclose(getattr(whole, name), getattr(retried, name), rel_tol=1e-4, abs_tol=1e-5), name


def test_the_figures_of_a_failed_try_are_dropped(monkeypatch):
    check_figures_of_a_failed_try(monkeypatch)
    kept = {}
    right = MicroBatches.__init__

    def with_figures_that_stay(self, *args):
        kept[id(self)] = UpdateStats()
        monkeypatch.setattr(micro_batches, "UpdateStats", lambda: kept[id(self)])
        right(self, *args)

    monkeypatch.setattr(MicroBatches, "__init__", with_figures_that_stay)
    caught(check_figures_of_a_failed_try, monkeypatch)


def check_next_update_fits(monkeypatch):
    model = tiny()
    responses = make_responses(model)
    worker = Worker(CONFIG)
    largest = []
    for _ in range(2):
        sizes = []
        with monkeypatch.context() as patch:
            patch.setattr(ReplicatedLayout, "token_scores", limited(100, sizes))
            update(model, None, NormRecorder(model), responses, advantage_of(responses), 0, CONFIG, worker)
        largest.append(max(sizes))
    first, second = largest
    assert first > 100
    assert second <= 100


def test_the_next_update_begins_with_the_size_that_fits(monkeypatch):
    check_next_update_fits(monkeypatch)

    class Forgetful(MicroBatches):
        def __init__(self, samples, optimizer, worker):
            worker.micro_batch_size.tokens = CONFIG.micro_tokens
            super().__init__(samples, optimizer, worker)

    monkeypatch.setattr(train_grpo, "MicroBatches", Forgetful)
    caught(check_next_update_fits, monkeypatch)


def check_only_memory_is_retried(retry, monkeypatch):
    """Other errors are not hidden."""

    def broken(self, *args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = tiny()
    responses = make_responses(model)
    with monkeypatch.context() as patch:
        patch.setattr(ReplicatedLayout, "token_scores", broken)
        patch.setattr(torch, "OutOfMemoryError", retry)
        seen = False
        try:
            gradient(model, responses)
        except RuntimeError:
            seen = True
        except UserError:
            pass
    assert seen


def test_other_errors_are_not_retried(monkeypatch):
    check_only_memory_is_retried(torch.OutOfMemoryError, monkeypatch)
    caught(check_only_memory_is_retried, RuntimeError, monkeypatch)


def test_other_workers_keep_their_micro_batches(monkeypatch):
    """Only the worker that ran out of memory cuts its share finer, and the sum over the workers stays the same."""
    model = tiny()
    responses = make_responses(model)
    wanted, _ = gradient(model, responses)
    total = None
    for rank in range(2):
        sizes = []
        worker = SimulatedWorker(CONFIG, rank, 2)
        with monkeypatch.context() as patch:
            patch.setattr(ReplicatedLayout, "token_scores", limited(10_000 if rank else 100, sizes))
            update(model, None, NormRecorder(model), responses, advantage_of(responses), 0, CONFIG, worker)
        assert worker.micro_batch_size.tokens == (200 if rank else 100)
        total = worker.gradients if total is None else [a + b for a, b in zip(total, worker.gradients)]
    assert close(wanted, total)
