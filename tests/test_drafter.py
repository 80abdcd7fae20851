"""The drafter: alignment of training and inference, packed batches, what its training must not touch, its entries for
prompts, its file, and the buffer that it learns from.
"""

import itertools
import math
import random

import pytest
import torch
from conftest import caught, tiny
from helpers import (
    SAMPLINGS,
    by_name,
    check_identity,
    filled_buffer,
    fixed,
    groups_of,
    make_drafter,
    make_engine,
    responses_of,
    round_shape,
    tokens_of,
    tokens_per_round,
    trained_drafter,
)

import drafter as drafter_module
from drafter import MIN_MLP_WIDTH, Drafter, DrafterTrainer, EagleProposer, drafter_loss, fit, mlp_width
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, Response, Sequence, Strategy
from parts.engine.sampling import Sampling
from parts.files import save_weights
from parts.training.drafter_data import FeatureBuffer, SequenceFeatures, pack
from rollout import Engine

# ---------------------------------------------------------------- alignment and packing


def features_of(responses) -> list[SequenceFeatures]:
    """Return the responses as the buffer holds them."""
    return [SequenceFeatures(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses]


def training_pass(drafter: Drafter, batch, mask=drafter_module.block_mask):
    """Return what training computes: predicted features (N, D)."""
    angles = drafter.angles(batch.positions)
    additive = mask(batch.sequence_ids, batch.positions, 2, batch.features.dtype)
    return drafter(batch.ids, batch.features, angles, additive)[0]


class GreedyDrafts:
    """In place of Coupled.draft_token: drafts the likeliest tokens, and keeps the drafter's logits of depth 0."""

    def __init__(self):
        self.logits = None  # (B, 1, V)

    def __call__(self, depth, logits, token_ids):
        if depth == 0:
            self.logits = logits
        return logits.argmax(-1)


def engine_with(model, drafter, responses) -> tuple[Engine, EagleProposer]:
    """Return an engine whose slots hold these responses and their features, and its proposer, which has no entries."""
    engine = make_engine(model, drafter)
    proposer = engine.proposers["eagle"]
    proposer.reserve(engine, 10, 120)
    proposer.load_weights()
    for i, r in enumerate(responses):
        engine.tokens[i, : len(r.prompt) + len(r.tokens)] = torch.tensor(r.prompt + r.tokens)
        engine.hidden[i, : len(r.hidden)] = r.hidden
    return engine, proposer


def read_prompts(engine: Engine, proposer: EagleProposer, responses) -> None:
    """Let the proposer compute the entries of all prompts, as the engine does when it admits them."""
    slots = slice(0, len(responses))
    longest = max(len(r.prompt) for r in responses) - 1
    proposer.read_prompts(slots, engine.tokens[slots, : longest + 1], engine.hidden[slots, :longest])
    for i, r in enumerate(responses):
        proposer.copy(i, slice(i, i + 1), len(r.prompt) - 1)


@torch.no_grad()
def check_alignment(packer, begin=lambda engine, proposer, responses: None):
    """What the training pass computes for entry t is what the engine computes there, for ragged prompts, whatever the
    lengths of the catch-ups. begin: called before the first round; else the catch-ups begin with the prompts.
    """
    model = tiny()
    drafter = make_drafter(model)
    rng = random.Random(0)
    responses = [r for r in responses_of(model) if len(r.tokens) > 4][:10]
    engine, proposer = engine_with(model, drafter, responses)
    begin(engine, proposer, responses)
    batch = packer(features_of(responses))
    trained = training_pass(drafter, batch)
    lengths = [1] * len(responses)  # of the responses so far
    checked = 0
    for _ in range(6):
        running = [Sequence(Group(0, r.prompt, []), 0, r.tokens[:n]) for r, n in zip(responses, lengths)]
        engine.running = running
        engine.lens[: len(running)] = torch.tensor([sequence.length for sequence in running])
        drafts = GreedyDrafts()
        proposer.propose(engine, round_shape(running, 3, proposer.catch_up_len(running)), drafts)
        proposer.caught_up(running)
        for i, sequence in enumerate(running):
            t = sequence.length - 1  # the newest entry with a true feature
            if 0 <= t < int((batch.sequence_ids == i).sum()):
                wanted = proposer.SHARPEN * drafter.policy.head(trained[batch.sequence_ids == i][t])
                assert torch.allclose(wanted, drafts.logits[i, 0], atol=1e-4), (i, t)
                checked += 1
        lengths = [min(len(r.tokens), n + rng.randint(1, 5)) for r, n in zip(responses, lengths)]
    assert checked > 20


def shifted_pack(sequences):
    """The classic mistake: entries (x_t, h_t)."""
    return pack(sequences)._replace(ids=torch.cat([sequence.ids[:-2] for sequence in sequences])[None])


def read_prompts_shifted(engine, proposer, responses):
    """The same mistake in the entries of prompts."""
    engine.tokens = engine.tokens.roll(1, 1)
    read_prompts(engine, proposer, responses)
    engine.tokens = engine.tokens.roll(-1, 1)


def test_training_pass_equals_inference_pass_and_a_shift_is_caught():
    check_alignment(pack)
    check_alignment(pack, read_prompts)
    caught(check_alignment, shifted_pack)
    caught(check_alignment, pack, read_prompts_shifted)


def test_entries_computed_in_pieces_are_the_same(monkeypatch):
    monkeypatch.setattr(EagleProposer, "PIECE", 3)
    check_alignment(pack)
    check_alignment(pack, read_prompts)


def check_packing(mask):
    """Sequences that are packed together give the predictions that each gives alone."""
    model = tiny()
    drafter = make_drafter(model)
    sequences = features_of(responses_of(model)[:5])
    with torch.no_grad():
        together = training_pass(drafter, pack(sequences), mask)
        alone = [training_pass(drafter, pack([sequence]), mask) for sequence in sequences]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    check_packing(drafter_module.block_mask)

    def causal_without_blocks(sequence_ids, positions, groups, dtype):
        return torch.full((len(sequence_ids),) * 2, -torch.inf).triu(1).repeat(groups, 1)[None, None]

    def not_causal(sequence_ids, positions, groups, dtype):
        return torch.zeros(len(sequence_ids) * groups, len(sequence_ids))[None, None]

    caught(check_packing, causal_without_blocks)
    caught(check_packing, not_causal)


def test_targets_are_the_next_feature_and_only_responses_count():
    x = torch.arange(10, 17)
    h = torch.arange(6.0)[:, None]
    batch = pack([SequenceFeatures(x, h, 3), SequenceFeatures(x, h, 1)])
    assert batch.ids[0, :5].tolist() == [11, 12, 13, 14, 15]
    assert batch.features[0, :5, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.targets[0, :5, 0].tolist() == [1, 2, 3, 4, 5]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4] * 2
    assert batch.sequence_ids.tolist() == [0] * 5 + [1] * 5
    # entry t predicts token t + 2; tokens from 3 (or 1) on are the response
    assert batch.learned.tolist() == list(range(1, 10))


# ---------------------------------------------------------------- training


def copies(module) -> dict[str, torch.Tensor]:
    """Return copies of a module's weights."""
    return {name: w.clone() for name, w in module.state_dict().items()}


def check_policy_untouched(step):
    """After three training steps the policy has the same bits and no gradients, and the drafter has other weights."""
    model = tiny()
    buffer = filled_buffer(responses_of(model))
    drafter = make_drafter(model)
    policy_before = copies(model)
    drafter_before = copies(drafter)
    trainer = DrafterTrainer(drafter, tokens=128)
    for _ in range(3):
        step(trainer, buffer)
    assert all(torch.equal(w, policy_before[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(w, drafter_before[name]) for name, w in drafter.state_dict().items())
    assert not {id(p) for p in drafter.parameters()} & {id(p) for p in model.parameters()}


def test_drafter_steps_leave_the_policy_bit_identical(monkeypatch):
    check_policy_untouched(DrafterTrainer.step)

    def with_gradients_for_the_head(trainer, buffer):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "no_grad", torch.enable_grad)
            loss, _ = drafter_loss(trainer.drafter, buffer.pack(128, trainer.rng))
        loss.backward()
        DrafterTrainer.step(trainer, buffer)

    caught(check_policy_untouched, with_gradients_for_the_head)


def test_the_drafter_s_head_is_the_live_policy_s():
    model = tiny()
    drafter = make_drafter(model)
    h = torch.randn(1, 1, 32)
    drafter.draft_vocab = torch.tensor([3, 5]).int()
    before = h @ drafter.head_weights()[0].T
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.allclose(h @ drafter.head_weights()[0].T, 2 * before)


def test_training_raises_acceptance():
    model = tiny()
    assert tokens_per_round(model, trained_drafter(model)) > tokens_per_round(model, make_drafter(model)) + 0.1


def copy_no_entries(monkeypatch):
    def copy(self, source, targets, length):
        self.read_lens[targets] = [min(length, self.read_lens[source])] * (targets.stop - targets.start)

    monkeypatch.setattr(EagleProposer, "copy", copy)


def compute_no_prompt_entries(monkeypatch):
    def read_prompts(self, slots, tokens, hidden):
        self.read_lens[slots] = [hidden.shape[1]] * len(tokens)

    monkeypatch.setattr(EagleProposer, "read_prompts", read_prompts)


def never_catch_up(monkeypatch):
    monkeypatch.setattr(EagleProposer, "catch_up_len", lambda self, running: 1)


@pytest.mark.parametrize("harm", [copy_no_entries, compute_no_prompt_entries, never_catch_up])
def test_missing_entries_lower_acceptance_and_change_no_token(harm, monkeypatch):
    model = tiny()
    drafter = trained_drafter(model)
    good = tokens_per_round(model, drafter, groups=120)
    harm(monkeypatch)
    check_identity(fixed("eagle", 4), model=model, drafter=drafter)
    assert tokens_per_round(model, drafter, groups=120) < good


def test_fit_reports_loss_and_agreement():
    model = tiny()
    trainer = DrafterTrainer(make_drafter(model), tokens=64)
    loss, agreement = fit(trainer, filled_buffer(responses_of(model)), 0.3, progress=False)
    assert trainer.steps > 0
    assert loss > 0
    assert 0 <= agreement <= 1


def test_the_running_average_is_published():
    model = tiny()
    buffer = filled_buffer(responses_of(model))
    trainer = DrafterTrainer(make_drafter(model), tokens=64)
    served = Drafter(model)
    mean = [p.detach().clone() for p in trainer.drafter.parameters()]
    for n in range(1, 6):
        trainer.step(buffer)
        keep = n / (n + 10)
        mean = [keep * m + (1 - keep) * p for m, p in zip(mean, trainer.drafter.parameters())]
    trainer.publish(served)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mean, served.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(served.parameters(), trainer.drafter.parameters()))


def test_a_float32_drafter_learns_beside_a_bfloat16_policy(tmp_path):
    """As on a GPU: the policy and the drafter in the engine are bfloat16, the learner and its average float32."""
    model = tiny().bfloat16()
    learner = Drafter(model, torch.float32)
    served = Drafter(model)
    engine = Engine(model, {1}, 10, 100, proposers={"eagle": EagleProposer(served)})
    buffer = FeatureBuffer()
    trainer = DrafterTrainer(learner, tokens=64)
    for r in engine.generate(groups_of(4, random.Random(1)), SAMPLINGS[0], fixed("eagle", 3)):
        buffer.add(r)
    before = learner.fc.weight.detach().clone()
    for _ in range(3):
        assert trainer.step(buffer)[0] > 0
    trainer.publish(served)
    assert {p.dtype for p in learner.parameters()} == {torch.float32}
    assert not torch.equal(before, learner.fc.weight)
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16}
    assert torch.allclose(served.fc.weight.float(), trainer.average[0], atol=1e-2)
    served.save(tmp_path)
    learner.load(tmp_path)
    list(engine.generate(groups_of(4, random.Random(2)), SAMPLINGS[0], fixed("eagle", 3)))


def test_save_and_load(tmp_path):
    model = tiny()
    drafter = make_drafter(model)
    drafter.save(tmp_path)
    torch.manual_seed(9)
    other = Drafter(model)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), other.parameters()))
    with pytest.raises(UserError, match="nowhere/drafter.safetensors"):
        other.load("nowhere")


def of_another_hidden_size(folder, monkeypatch):
    make_drafter(tiny(hidden_size=64)).save(folder)


def with_a_narrower_mlp(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(drafter_module, "MIN_MLP_WIDTH", 0)
        narrow = make_drafter(tiny())
    assert mlp_width(narrow.layer) == 48
    narrow.save(folder)


def with_an_unknown_tensor(folder, monkeypatch):
    save_weights({**make_drafter(tiny()).plain_weights(), "words": torch.tensor([1, 5])}, folder)


def without_a_weight(folder, monkeypatch):
    weights = make_drafter(tiny()).plain_weights()
    del weights["layer.mlp.up_proj.weight"]
    save_weights(weights, folder)


def damaged(folder, monkeypatch):
    (folder / "drafter.safetensors").write_bytes(b"no weights")


REFUSED_FILES = {
    of_another_hidden_size: "size mismatch",
    with_a_narrower_mlp: "size mismatch for layer.mlp.gate_proj.weight",
    with_an_unknown_tensor: "Unexpected key.*words",
    without_a_weight: "Missing key.*layer.mlp.up_proj.weight",
    damaged: "[Hh]eader",
}


@pytest.mark.parametrize("write", REFUSED_FILES, ids=lambda write: write.__name__)
def test_files_of_another_drafter_are_refused_in_one_line(write, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"drafter.safetensors.*{REFUSED_FILES[write]}") as error:
        Drafter(tiny()).load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_drafter_of_a_small_policy_has_a_wider_mlp():
    model = tiny()
    assert mlp_width(model.model.layers[0]) == 48
    assert mlp_width(make_drafter(model).layer) == MIN_MLP_WIDTH == 512
    wide = tiny(intermediate_size=600)
    assert mlp_width(make_drafter(wide).layer) == 600


# ---------------------------------------------------------------- the buffer


def test_the_buffer_is_bounded_by_bytes():
    buffer = FeatureBuffer(limit=10_000)
    for r in responses_of(tiny()) * 3:
        buffer.add(r)
        assert buffer.bytes == sum(sequence.hidden.nbytes for sequence in buffer.sequences)
        assert buffer.bytes <= 10_000 or len(buffer.sequences) == 1


def check_keeps_the_tail(begin):
    """After rollouts of short and long responses, the buffer holds the sequences of this rollout and the longest of the
    last one, with the numbers of their rollouts.
    """
    buffer = FeatureBuffer()
    for rollout, lengths in ((1, [90, 10, 30, 80]), (2, [5, 60, 7, 70]), (3, [4, 6])):
        begin(buffer, rollout)
        for n in lengths:
            buffer.add(Response(0, 0, [1], [2] * n, None, True, torch.zeros(n, 4)))
    assert [(sequence.rollout, len(sequence.ids)) for sequence in buffer.sequences] == [(2, 71), (3, 5), (3, 7)]
    assert buffer.bytes == (70 + 4 + 6) * 16


def test_the_buffer_keeps_long_responses_of_the_last_rollout():
    check_keeps_the_tail(FeatureBuffer.begin_rollout)

    def keep_nothing(buffer, rollout):
        buffer.sequences.clear()
        buffer.rollout = rollout
        buffer.bytes = 0

    def keep_everything(buffer, rollout):
        buffer.rollout = rollout

    caught(check_keeps_the_tail, keep_nothing)
    caught(check_keeps_the_tail, keep_everything)


@pytest.mark.parametrize("prompt", [3, 40, 290])
def test_windows_of_long_sequences_hold_some_of_the_response(prompt, monkeypatch):
    monkeypatch.setattr(FeatureBuffer, "MAX_WINDOW", 50)
    buffer = FeatureBuffer()
    rng = random.Random(0)
    ids = list(range(300))
    hidden = torch.arange(299.0)[:, None].repeat(1, 4)
    buffer.add(Response(0, 0, ids[:prompt], ids[prompt:], None, True, hidden))
    for _ in range(50):
        batch = buffer.pack(40, rng)
        assert batch.ids.shape[1] == 48
        assert len(batch.learned)
        assert torch.equal(batch.ids[0], batch.features[0, :, 0].long() + 1)
        assert torch.equal(batch.targets, batch.features + 1)
        # entry t holds x_{t+1} and predicts x_{t+2}, which belongs to the response
        assert torch.equal(batch.learned, (batch.ids[0] >= prompt - 1).nonzero()[:, 0])


# ---------------------------------------------------------------- entries of prompts, and catching up


class WatchedProposer(EagleProposer):
    """Notes how many prompts are read and how many entries are caught up with; asserts that asking changes nothing."""

    def __init__(self, drafter):
        super().__init__(drafter)
        self.catch_ups: list[int] = []  # of each speculative round
        self.prompts_read: list[int] = []  # at each admission

    def catch_up_len(self, running):
        before = list(self.read_lens)
        length = super().catch_up_len(running)
        assert super().catch_up_len(running) == length
        assert self.read_lens == before
        self.catch_ups.append(length)
        return length

    def read_prompts(self, slots, tokens, hidden):
        super().read_prompts(slots, tokens, hidden)
        self.prompts_read.append(len(tokens))


def watched_rollout(strategy: Strategy) -> tuple[Engine, WatchedProposer, list[Group]]:
    """Roll out groups that do not all fit the slots at once."""
    model = tiny()
    proposer = WatchedProposer(trained_drafter(model))
    engine = Engine(model, {1}, 6, 100, proposers={"eagle": proposer})
    groups = [group for group in groups_of(20, random.Random(1)) if len(group.prompt) > 1]
    list(engine.generate(groups, SAMPLINGS[0], strategy))
    assert len(proposer.catch_ups) == engine.stats.spec_rounds > 10
    return engine, proposer, groups


def check_catch_ups(k: int = 4) -> None:
    """If all rounds are speculative, each catches up with at most k + 1 entries, also where groups are admitted between
    rounds: prompts are read when they are admitted, once per group.
    """
    _, proposer, groups = watched_rollout(fixed("eagle", k))
    assert max(len(group.prompt) for group in groups) > 15
    assert all(1 <= length <= k + 1 for length in proposer.catch_ups)
    assert len(set(proposer.catch_ups)) > 1
    assert len(proposer.prompts_read) > 3  # most groups are admitted between rounds
    assert sum(proposer.prompts_read) == len(groups)


def forget_copied_entries(monkeypatch):
    right = EagleProposer.copy

    def copy(self, source, targets, length):
        right(self, source, targets, length)
        self.read_lens[targets] = [0] * (targets.stop - targets.start)

    monkeypatch.setattr(EagleProposer, "copy", copy)


def do_not_read_prompts(monkeypatch):
    monkeypatch.setattr(EagleProposer, "read_prompts", lambda self, slots, tokens, hidden: None)


def catch_up_with_prompts(monkeypatch):
    def read_prompts(self, slots, tokens, hidden):
        self.read_lens[slots] = [0] * len(tokens)

    monkeypatch.setattr(EagleProposer, "read_prompts", read_prompts)


def change_state_when_asked(monkeypatch):
    right = EagleProposer.catch_up_len

    def catch_up_len(self, running):
        length = right(self, running)
        self.caught_up(running)
        return length

    monkeypatch.setattr(EagleProposer, "catch_up_len", catch_up_len)


def read_prompts_once_per_sample(monkeypatch):
    right = Engine.admit

    def admit(self, batch, read_by):
        right(self, [Group(group.key, group.prompt, [seed]) for group in batch for seed in group.seeds], read_by)

    monkeypatch.setattr(Engine, "admit", admit)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_speculative_rounds_catch_up_with_at_most_k_plus_1_entries(k):
    check_catch_ups(k)


@pytest.mark.parametrize(
    "harm",
    [
        forget_copied_entries,
        do_not_read_prompts,
        catch_up_with_prompts,
        change_state_when_asked,
        read_prompts_once_per_sample,
    ],
)
def test_longer_catch_ups_and_repeated_reading_are_caught(harm, monkeypatch):
    harm(monkeypatch)
    caught(check_catch_ups)


@pytest.mark.parametrize("strategy, read", [(None, False), (fixed("eagle", 2), True)])
def test_without_a_strategy_the_drafter_reads_no_prompt(strategy, read):
    model = tiny()
    proposer = WatchedProposer(trained_drafter(model))
    engine = Engine(model, {1}, 6, 100, proposers={"eagle": proposer})
    list(engine.generate(groups_of(2, random.Random(1)), SAMPLINGS[0], strategy))
    assert bool(proposer.prompts_read) == read


class PlainStretches(Strategy):
    """Drafts 4 tokens in every sixth round, else none."""

    def __init__(self):
        super().__init__()
        self.turns = itertools.count()

    def choose(self, running):
        return DraftPlan("eagle", 4 if next(self.turns) % 6 == 5 else 0)


def test_after_plain_rounds_the_catch_up_is_as_long_as_they_were():
    """At most what the last speculative round emitted, 1 to 5 tokens, and one token for each of the 5 plain rounds."""
    engine, proposer, _ = watched_rollout(PlainStretches())
    assert engine.stats.spec_rounds < engine.stats.rounds / 4
    assert all(length <= 10 for length in proposer.catch_ups)
    assert max(proposer.catch_ups) > 5


def drafts_by_seed(model, groups: list[Group]) -> dict[int, list[list[int]]]:
    """Return the draft tokens of each sequence, by its seed, round by round."""
    engine = Engine(model, {1}, 6, 100, proposers={"eagle": EagleProposer(trained_drafter(model))})
    drafts: dict[int, list[list[int]]] = {}

    def on_round(trace):
        seed = trace.sequence.group.seeds[trace.sequence.sample]
        drafts.setdefault(seed, []).append(trace.drafts)

    list(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4), on_round))
    return drafts


def check_drafts_of_groups(monkeypatch, harm=lambda patch: None) -> None:
    """The samples of a group get the draft tokens that each gets as a group of its own."""
    model = tiny()
    groups = groups_of(12, random.Random(1))
    alone = [Group((group.key, seed), group.prompt, [seed]) for group in groups for seed in group.seeds]
    wanted = drafts_by_seed(model, alone)
    with monkeypatch.context() as patch:
        harm(patch)
        assert drafts_by_seed(model, groups) == wanted


def copy_shifted_entries(monkeypatch):
    right = EagleProposer.copy

    def copy(self, source, targets, length):
        right(self, source, targets, length)
        entries = self.cache.data[:, :, targets, :, :length]
        entries.copy_(entries.roll(1, dims=4))

    monkeypatch.setattr(EagleProposer, "copy", copy)


def copy_the_entries_of_another_slot(monkeypatch):
    right = EagleProposer.copy

    def copy(self, source, targets, length):
        right(self, source, targets, length)
        self.cache.copy((source + 1) % len(self.read_lens), targets, length)

    monkeypatch.setattr(EagleProposer, "copy", copy)


def copy_one_entry_less(monkeypatch):
    right = EagleProposer.copy

    def copy(self, source, targets, length):
        right(self, source, targets, length)
        self.cache.data[:, :, targets, :, length // 2] = 0

    monkeypatch.setattr(EagleProposer, "copy", copy)


def read_shifted_prompts(monkeypatch):
    right = EagleProposer.read_prompts

    def read_prompts(self, slots, tokens, hidden):
        right(self, slots, tokens.roll(1, 1), hidden)

    monkeypatch.setattr(EagleProposer, "read_prompts", read_prompts)


def test_samples_of_a_group_draft_as_sequences_alone_do(monkeypatch):
    check_drafts_of_groups(monkeypatch)
    check_drafts_of_groups(monkeypatch, catch_up_with_prompts)  # slower, but the same entries
    wrong = [
        copy_no_entries,
        copy_shifted_entries,
        copy_the_entries_of_another_slot,
        copy_one_entry_less,
        compute_no_prompt_entries,
        read_shifted_prompts,
    ]
    for harm in wrong:
        caught(check_drafts_of_groups, monkeypatch, harm)


# ---------------------------------------------------------------- in the engine, and the command line


class LongPlainStretches(Strategy):
    """Drafts in 4 of 40 rounds, one after the other."""

    def __init__(self):
        super().__init__()
        self.turns = itertools.count()

    def choose(self, running):
        return DraftPlan("eagle", 12 if next(self.turns) % 40 > 35 else 0)


def test_catching_up_stays_inside_the_slots():
    """The longest sequences fill their slots to the last entry; the catch-up of one sequence would reach beyond the end
    of another one's slot, which needs none.
    """
    model = tiny()
    groups = groups_of(12, random.Random(1))
    longest = max(len(group.prompt) for group in groups)
    groups = [Group(g.key, g.prompt * (longest // len(g.prompt)), g.seeds) for g in groups]
    sampling = Sampling(max_new=60)
    context = max(len(group.prompt) for group in groups) + 60
    engine = Engine(model, {999}, 10, context, proposers={"eagle": EagleProposer(make_drafter(model))})
    plain = tokens_of(engine.generate(groups, sampling))
    assert tokens_of(engine.generate(groups, sampling, LongPlainStretches())) == plain


def test_responses_count_their_rounds_and_draft_tokens():
    engine = make_engine(tiny())
    responses = by_name(engine.generate(groups_of(6, random.Random(1)), SAMPLINGS[0], fixed("eagle", 3)))
    assert all(r.draft_tokens == 3 * r.rounds for r in responses.values())
    assert sum(r.rounds for r in responses.values()) == engine.stats.spec_sequence_rounds


def test_the_command_line_trains_a_drafter(model_folder, tmp_path, monkeypatch, capsys):
    argv = ["--model", model_folder, "--out", tmp_path, "--prompts", 2, "--seconds", 0.5, "--max-new", 20]
    monkeypatch.setattr("sys.argv", ["drafter.py", *map(str, argv)])
    drafter_module.main()
    text = capsys.readouterr().out
    assert "before: " in text
    assert "after: " in text
    assert (tmp_path / "drafter.safetensors").exists()
    monkeypatch.setattr("sys.argv", ["drafter.py", *map(str, argv), "--start", str(tmp_path)])
    drafter_module.main()


class ChecksNothing(DrafterTrainer):
    """A broken variant: its norm of the gradient is always finite."""

    def step(self, buffer):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drafter_module.math, "isfinite", lambda value: True)
            return super().step(buffer)


def check_a_bad_step_changes_nothing(trainer_class):
    """Features with nan in them reach neither weights, average nor Adam's moments; the next step is a normal one."""
    model = tiny()
    trainer = trainer_class(make_drafter(model), tokens=64)
    buffer = filled_buffer(responses_of(model))
    trainer.step(buffer)
    before = [x.clone() for x in [*trainer.drafter.parameters(), *trainer.average]]
    right = list(buffer.sequences)
    buffer.sequences.clear()
    buffer.sequences += [sequence._replace(hidden=sequence.hidden * math.nan) for sequence in right]
    loss, _ = trainer.step(buffer)
    assert math.isnan(loss)
    assert trainer.steps == 1
    assert all(map(torch.equal, before, [*trainer.drafter.parameters(), *trainer.average]))
    buffer.sequences.clear()
    buffer.sequences += right
    assert math.isfinite(trainer.step(buffer)[0])
    assert all(p.isfinite().all() for p in trainer.average)


def test_a_drafter_step_with_nan_changes_nothing():
    check_a_bad_step_changes_nothing(DrafterTrainer)
    caught(check_a_bad_step_changes_nothing, ChecksNothing)
