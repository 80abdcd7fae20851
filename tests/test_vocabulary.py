"""Which words a drafter may guess, how they are kept with it, and the warm start that ends when it pays."""

import random
import time

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import groups_of, make_drafter, make_engine
from hypothesis import given
from hypothesis import strategies as st

from drafter import Drafter, DrafterTrainer, block_mask, collect, drafter_loss, scaled_lr
from parts.engine.sampling import Sampling
from parts.running.timers import WorkerTimer
from parts.training import drafter_data as vocabulary
from parts.training.drafter_data import FeatureBuffer, PackedBatch, TokenCounts
from spot import SpotTrainer
from tlt import TLTConfig


def counts_of(responses: list[list[int]], vocab: int = 100, always=(2, 97)) -> TokenCounts:
    words = TokenCounts(vocab, always)
    for tokens in responses:
        words.add(tokens)
    return words


def check_choice(responses: list[list[int]], size: int, choose=TokenCounts.choose):
    """Sorted ids, each once; the stop tokens are there; nothing that is left out was written more often."""
    words = counts_of(responses)
    chosen = choose(words, size)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, chosen.unique())
    assert len(chosen) == size
    assert {2, 97} <= set(chosen.tolist())
    others = set(range(100)) - set(chosen.tolist())
    fewest = min(words.counts[i].item() for i in chosen.tolist() if i not in (2, 97))
    assert all(words.counts[i] <= fewest for i in others)


@cases(30)
@given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=8), st.integers(3, 90))
def test_the_words_are_those_that_are_written_most(responses, size):
    check_choice(responses, size)


def test_a_choice_without_stop_tokens_or_by_id_is_caught():
    responses = [[5, 5, 5, 60, 60, 61], [61, 61, 9]]
    check_choice(responses, 5)

    def without_stop(words, size):
        words.always = []
        return TokenCounts.choose(words, size)

    for wrong in (without_stop, lambda words, size: torch.arange(size).int()):
        caught(check_choice, responses, 5, choose=wrong)


def test_a_small_vocabulary_is_used_whole_and_a_large_one_by_what_is_written(monkeypatch):
    words = counts_of([[5, 5, 60]])
    assert words.choose() is None
    assert words.choose(100) is None
    monkeypatch.setattr(vocabulary, "ALL_UP_TO", 10)
    monkeypatch.setattr(vocabulary, "FEWEST", 4)
    assert len(words.choose()) == 4
    words.add(list(range(10, 40)) * 3)
    assert len(words.choose()) in range(28, 36)  # 95 % of what was written


def check_few_sizes():
    """From rollout to rollout the number of words hardly changes: another one ends all recorded rounds."""
    rng = random.Random(0)
    sizes = set()
    for spread in range(2000, 18_000, 800):
        words = TokenCounts(30_000)
        words.add([rng.randrange(spread) for _ in range(20_000)])
        sizes.add(len(words.choose()))
    assert len(sizes) > 1
    assert all(size % 4096 == 0 for size in sizes)


def test_few_sizes(monkeypatch):
    check_few_sizes()
    monkeypatch.setattr(vocabulary, "FEWEST", 4000)
    caught(check_few_sizes)


def test_what_was_written_before_fades():
    words = counts_of([[7] * 10])
    for _ in range(6):
        words.fade()
    words.add([8])
    assert 8 in words.choose(3).tolist()
    assert 7 not in words.choose(3).tolist()


# ---------------------------------------------------------------- learning from some words


def batch_of(model) -> PackedBatch:
    buffer = FeatureBuffer()
    words = TokenCounts(118)
    groups = groups_of(6, random.Random(1))
    collect(make_engine(model, keep_hidden=True), groups, Sampling(max_new=20), buffer, words)
    assert words.counts.sum() == sum(len(row.ids) - row.start for row in buffer.sequences)
    return buffer.pack(200, random.Random(0))


def check_loss(make_words):
    """Cross entropy of the policy's distribution renormalised over the words, computed the long way."""
    model = tiny()
    drafter = make_drafter(model)
    words = torch.arange(0, 118, 3)
    drafter.words = make_words(words).int()
    batch = batch_of(model)
    with torch.no_grad():
        loss, _ = drafter_loss(drafter, batch, feature_weight=0.0, own=0.0)
        wanted = model.lm_head(batch.targets[0][batch.counted])[:, words].softmax(-1)
        mask = block_mask(batch.owner, batch.positions, 2, torch.float32)
        guessed = drafter(batch.ids, batch.features, drafter.angles(batch.positions), mask)[0][batch.counted]
        logits = model.lm_head(guessed)[:, words]
    assert torch.isclose(loss, -(wanted * logits.log_softmax(-1)).sum(-1).mean(), atol=1e-5)


def test_training_renormalises_over_the_words_and_others_are_caught():
    check_loss(lambda words: words)
    caught(check_loss, lambda words: (words + 1) % 118)


def test_the_words_are_saved_with_the_drafter(tmp_path):
    drafter = make_drafter(tiny())
    drafter.save(tmp_path)
    other = Drafter(tiny())
    other.words = torch.tensor([3]).int()
    other.load(tmp_path)
    assert other.words is None
    drafter.words = torch.tensor([1, 5, 80]).int()
    drafter.save(tmp_path)
    other.load(tmp_path)
    assert other.words.tolist() == [1, 5, 80]


def test_wide_drafters_learn_more_slowly():
    assert scaled_lr(64) == scaled_lr(128) == 3e-3
    assert scaled_lr(512) == pytest.approx(3e-3 / 4)
    assert DrafterTrainer(make_drafter(tiny())).lr == 3e-3


# ---------------------------------------------------------------- the warm start


def warm(monkeypatch, agreements: list[float], seconds: float) -> int:
    """Slices of training that it makes, when trials give these agreements."""
    spot = SpotTrainer(tiny(), TLTConfig(out="nowhere", model="base/chain/refit"), 0, {1})
    spot.buffer = FeatureBuffer()
    batch_rows = FeatureBuffer()
    collect(
        make_engine(tiny(), keep_hidden=True),
        groups_of(12, random.Random(2)),
        Sampling(max_new=20),
        batch_rows,
        TokenCounts(118),
    )
    spot.buffer.sequences = batch_rows.rows
    rows = {id(row.ids) for row in spot.buffer.sequences}
    averages = []
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.01)
    monkeypatch.setattr(SpotTrainer, "average", lambda self, all_reduce: averages.append(time.time()) or 1)
    results = iter(agreements)
    right = SpotTrainer.agreement

    def agreement(self, held_out, all_reduce):
        assert held_out
        assert not {id(row.ids) for row in held_out} & {id(row.ids) for row in self.buffer.sequences}
        assert 0 <= right(self, held_out, all_reduce) <= 1
        return next(results)

    monkeypatch.setattr(SpotTrainer, "agreement", agreement)
    spot.warm_start(seconds, WorkerTimer(), lambda tensors: None)
    assert not spot.needs_warm_start
    assert {id(row.ids) for row in spot.buffer.sequences} == rows
    assert spot.trainer.steps >= len(averages)
    return len(averages)


def test_the_warm_start_ends_when_drafting_pays(monkeypatch):
    assert warm(monkeypatch, [0.1, 0.3, 0.5, 0.6], 1.0) == 3


def test_the_warm_start_ends_with_its_seconds(monkeypatch):
    assert warm(monkeypatch, [0.0] * 20, 0.05) == 5
