"""The draft vocabulary: how it is chosen, learned from and saved; the warm start; a drafter that is resumed."""

import math
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
from parts.training import drafter_data
from parts.training.drafter_data import FeatureBuffer, PackedBatch, TokenCounts
from spot import SpotTrainer
from tlt import TLTConfig


def counts_of(responses: list[list[int]], vocab: int = 100, always=(2, 97)) -> TokenCounts:
    """Return the counts of the tokens of these responses."""
    counts = TokenCounts(vocab, always)
    for tokens in responses:
        counts.add(tokens)
    return counts


def check_choice(responses: list[list[int]], size: int, choose=TokenCounts.choose):
    """The ids are sorted and differ, the stop tokens are among them, and no other id was written more often."""
    counts = counts_of(responses)
    chosen = choose(counts, size)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, chosen.unique())
    assert len(chosen) == size
    assert {2, 97} <= set(chosen.tolist())
    others = set(range(100)) - set(chosen.tolist())
    fewest = min(counts.counts[i].item() for i in chosen.tolist() if i not in (2, 97))
    assert all(counts.counts[i] <= fewest for i in others)


@cases(30)
@given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=8), st.integers(3, 90))
def test_the_ids_that_were_written_most_are_chosen(responses, size):
    check_choice(responses, size)


def test_a_choice_without_stop_tokens_or_by_id_is_caught():
    responses = [[5, 5, 5, 60, 60, 61], [61, 61, 9]]
    check_choice(responses, 5)

    def without_stop_tokens(counts, size):
        counts.always = []
        return TokenCounts.choose(counts, size)

    for wrong in (without_stop_tokens, lambda counts, size: torch.arange(size).int()):
        caught(check_choice, responses, 5, choose=wrong)


def test_a_small_vocabulary_is_used_whole_and_a_large_one_by_what_is_written(monkeypatch):
    counts = counts_of([[5, 5, 60]])
    assert counts.choose() is None
    assert counts.choose(100) is None
    monkeypatch.setattr(drafter_data, "WHOLE_VOCAB_UP_TO", 10)
    monkeypatch.setattr(drafter_data, "MIN_DRAFT_VOCAB", 4)
    assert len(counts.choose()) == 4
    counts.add(list(range(10, 40)) * 3)
    assert len(counts.choose()) in range(28, 36)  # 95 % of what was written


def check_few_sizes():
    """The size of the draft vocabulary seldom changes from rollout to rollout: a new size ends all recorded rounds."""
    rng = random.Random(0)
    sizes = set()
    for spread in range(2000, 18_000, 800):
        counts = TokenCounts(30_000)
        counts.add([rng.randrange(spread) for _ in range(20_000)])
        sizes.add(len(counts.choose()))
    assert len(sizes) > 1
    assert all(size % 4096 == 0 for size in sizes)


def test_the_draft_vocabulary_has_few_sizes(monkeypatch):
    check_few_sizes()
    monkeypatch.setattr(drafter_data, "MIN_DRAFT_VOCAB", 4000)
    caught(check_few_sizes)


def test_earlier_counts_fade():
    counts = counts_of([[7] * 10])
    for _ in range(6):
        counts.fade()
    counts.add([8])
    assert 8 in counts.choose(3).tolist()
    assert 7 not in counts.choose(3).tolist()


# ---------------------------------------------------------------- learning with a draft vocabulary


def batch_of(model) -> PackedBatch:
    """Return a batch of features of responses."""
    buffer = FeatureBuffer()
    counts = TokenCounts(118)
    groups = groups_of(6, random.Random(1))
    collect(make_engine(model, keep_hidden=True), groups, Sampling(max_new=20), buffer, counts)
    assert counts.counts.sum() == sum(len(sequence.ids) - sequence.start for sequence in buffer.sequences)
    return buffer.pack(200, random.Random(0))


def check_loss(change):
    """The loss is the cross-entropy of the policy's distribution, renormalised over the draft vocabulary. change: what
    becomes of the ids before the drafter gets them.
    """
    model = tiny()
    drafter = make_drafter(model)
    ids = torch.arange(0, 118, 3)
    drafter.draft_vocab = change(ids).int()
    batch = batch_of(model)
    with torch.no_grad():
        loss, _ = drafter_loss(drafter, batch, feature_weight=0.0, own=0.0)
        wanted = model.lm_head(batch.targets[0][batch.learned])[:, ids].softmax(-1)
        mask = block_mask(batch.sequence_ids, batch.positions, 2, torch.float32)
        predicted = drafter(batch.ids, batch.features, drafter.angles(batch.positions), mask)[0][batch.learned]
        logits = model.lm_head(predicted)[:, ids]
    assert torch.isclose(loss, -(wanted * logits.log_softmax(-1)).sum(-1).mean(), atol=1e-5)


def test_training_renormalises_over_the_draft_vocabulary():
    check_loss(lambda ids: ids)
    caught(check_loss, lambda ids: (ids + 1) % 118)


def test_the_draft_vocabulary_is_saved_with_the_drafter(tmp_path):
    drafter = make_drafter(tiny())
    drafter.save(tmp_path)
    other = Drafter(tiny())
    other.draft_vocab = torch.tensor([3]).int()
    other.load(tmp_path)
    assert other.draft_vocab is None
    drafter.draft_vocab = torch.tensor([1, 5, 80]).int()
    drafter.save(tmp_path)
    other.load(tmp_path)
    assert other.draft_vocab.tolist() == [1, 5, 80]


def test_wide_drafters_have_a_lower_learning_rate():
    assert scaled_lr(64) == scaled_lr(128) == 3e-3
    assert scaled_lr(512) == pytest.approx(3e-3 / 4)
    assert DrafterTrainer(make_drafter(tiny())).lr == 3e-3


# ---------------------------------------------------------------- the warm start


def slices_of_warm_start(monkeypatch, agreements: list[float], seconds: float) -> int:
    """Return how many slices of training the warm start makes if evaluations give these agreements."""
    spot = SpotTrainer(tiny(), TLTConfig(out="nowhere", model="base/chain/refit"), 0, {1})
    spot.buffer = FeatureBuffer()
    engine = make_engine(tiny(), keep_hidden=True)
    collect(engine, groups_of(12, random.Random(2)), Sampling(max_new=20), spot.buffer, TokenCounts(118))
    before = {id(sequence.ids) for sequence in spot.buffer.sequences}
    averages = []
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.01)
    monkeypatch.setattr(SpotTrainer, "average", lambda self, all_reduce: averages.append(time.time()) or 1)
    results = iter(agreements)
    right = SpotTrainer.agreement

    def agreement(self, held_out, all_reduce):
        assert held_out
        learned = {id(sequence.ids) for sequence in self.buffer.sequences}
        assert not {id(sequence.ids) for sequence in held_out} & learned
        assert 0 <= right(self, held_out, all_reduce) <= 1
        return next(results)

    monkeypatch.setattr(SpotTrainer, "agreement", agreement)
    spot.warm_start(seconds, WorkerTimer(), lambda tensors: None)
    assert spot.warm_seconds_left == 120 - seconds
    assert {id(sequence.ids) for sequence in spot.buffer.sequences} == before
    assert spot.trainer.steps >= len(averages)
    return len(averages)


def test_the_warm_start_ends_when_the_drafter_is_good(monkeypatch):
    assert slices_of_warm_start(monkeypatch, [0.1, 0.5, 0.85, 0.9], 1.0) == 3


def test_the_warm_start_ends_with_its_seconds(monkeypatch):
    assert slices_of_warm_start(monkeypatch, [0.0] * 20, 0.05) == 5


def parts_of_warm_start(monkeypatch, agreements: list[float], steps_left: int = 100) -> list[float]:
    """Return the seconds of each part of a warm start of 120 s; one after each rollout of 20 s. agreements: behind each
    part.
    """
    spot = SpotTrainer(tiny(), TLTConfig(out="nowhere", model="base/chain/refit"), 0, {1})
    scripted = iter(agreements)
    monkeypatch.setattr("spot.train_until", lambda *args: None)
    spot.average = lambda all_reduce: 0  # no steps: each part ends at once
    spot.agreement = lambda *args: next(scripted)
    parts = []
    while spot.needs_warm_start:
        parts.append(spot.warm_start_seconds(20.0, steps_left))
        spot.warm_start(parts[-1], WorkerTimer(), lambda tensors: None)
        steps_left -= 1
    return parts


def test_the_warm_start_comes_in_parts_until_the_drafter_is_good(monkeypatch):
    assert parts_of_warm_start(monkeypatch, [0.3, 0.5, 0.6, 0.7]) == [30.0] * 4
    assert parts_of_warm_start(monkeypatch, [0.3, 0.85]) == [30.0] * 2
    assert parts_of_warm_start(monkeypatch, [0.3] * 2, steps_left=3) == [20.0, 10.0, 0.0]


# ---------------------------------------------------------------- resume


def check_a_young_drafter_stays_young(save, tmp_path):
    """A drafter that started from random weights keeps its learning rate after a resume, until it has made all its
    first steps.
    """
    config = TLTConfig(out="nowhere", model="base/chain/refit")
    spot = SpotTrainer(tiny(), config, 0, {1})
    engine = make_engine(tiny(), keep_hidden=True)
    collect(engine, groups_of(12, random.Random(2)), Sampling(max_new=20), spot.buffer, TokenCounts(118))
    spot.step()
    (tmp_path / "drafter").mkdir(parents=True)
    spot.save(tmp_path / "drafter")
    save(spot, tmp_path / "drafter")
    again = SpotTrainer(tiny(), config, 0, {1}, checkpoint=tmp_path)
    again.buffer = spot.buffer
    again.step()
    assert again.trainer.lr == spot.trainer.lr == scaled_lr(32, SpotTrainer.FROM_SCRATCH_LR)
    again.trainer.steps = SpotTrainer.FROM_SCRATCH_STEPS - 1
    again.step()
    assert again.trainer.lr == scaled_lr(32, SpotTrainer.FOLLOW_LR)


def test_a_young_drafter_stays_young_after_a_resume(tmp_path):
    check_a_young_drafter_stays_young(SpotTrainer.save_progress, tmp_path / "right")
    caught(check_a_young_drafter_stays_young, lambda spot, folder: None, tmp_path / "broken")


def test_steps_with_nan_are_not_counted(capsys):
    spot = SpotTrainer(tiny(), TLTConfig(out="nowhere", model="base/chain/refit"), 0, {1})
    spot.trainer.step = lambda buffer: (math.nan, math.nan)
    for _ in range(3):
        spot.step()
    assert spot.take_stats() == (0, 0.0)
    assert spot.recent_agreement == 0.0
    assert capsys.readouterr().out.count("was not finite") == 1


def test_an_old_checkpoint_and_a_finished_drafter_are_not_young(tmp_path):
    """Neither has the file that says so."""
    spot = SpotTrainer(tiny(), TLTConfig(out="nowhere", model="base/chain/refit"), 0, {1})
    spot.save(tmp_path / "drafter")
    assert not SpotTrainer(tiny(), TLTConfig(out="nowhere"), 0, {1}, checkpoint=tmp_path).from_scratch
