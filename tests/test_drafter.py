"""The drafter: alignment, packing, what its training must not touch, and its buffer."""

import itertools
import random

import pytest
import torch
from conftest import caught, tiny
from helpers import (
    SAMPLINGS,
    accepted_per_round,
    by_name,
    check_identity,
    filled_buffer,
    fixed,
    groups_of,
    make_drafter,
    make_engine,
    responses_of,
    shape_of,
    tokens_of,
    trained_drafter,
)

import drafter as drafter_module
import drafter as mlp
from drafter import Drafter, DrafterTrainer, EagleProposer, drafter_loss, fit
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, Response, Sequence, Strategy
from parts.engine.sampling import Sampling
from parts.training.drafter_data import FeatureBuffer, SequenceFeatures, pack
from rollout import Engine

# ---------------------------------------------------------------- alignment and packing


def sequences(responses) -> list[SequenceFeatures]:
    return [SequenceFeatures(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses]


def trained_pass(drafter: Drafter, batch, mask=drafter_module.block_mask):
    """What training computes: guessed features (N, D)."""
    angles = drafter.angles(batch.positions)
    return drafter(batch.ids, batch.features, angles, mask(batch.owner, batch.positions, 2, batch.features.dtype))[0]


class GraphRecorder:
    """In place of accept.Coupled.guess: greedy guesses; keeps the drafter's logits."""

    def __init__(self):
        self.first = None  # (B, 1, V), of depth 0

    def __call__(self, depth, logits, words):
        if depth == 0:
            self.first = logits
        return logits.argmax(-1)


def engine_in_the_middle(model, drafter, rows) -> tuple[Engine, EagleProposer]:
    """An engine whose slots hold these responses and their features."""
    engine = make_engine(model, drafter)
    learned = engine.proposers["eagle"]
    learned.reserve(engine, 10, 120)
    learned.begin()
    for i, r in enumerate(rows):
        engine.tokens[i, : len(r.prompt) + len(r.tokens)] = torch.tensor(r.prompt + r.tokens)
        engine.hidden[i, : len(r.hidden)] = r.hidden
    return engine, learned


def check_alignment(packer):
    """What the training pass computes for entry t is what the engine computes there, on ragged prompts, whatever the
    gaps that it catches up in.
    """
    model = tiny()
    drafter = make_drafter(model)
    rng = random.Random(0)
    rows = [r for r in responses_of(model) if len(r.tokens) > 4][:10]
    engine, learned = engine_in_the_middle(model, drafter, rows)
    batch = packer(sequences(rows))
    grown = [1] * len(rows)  # tokens of each response that are there
    checked = 0
    with torch.no_grad():
        trained = trained_pass(drafter, batch)
        for _ in range(6):
            engine.running = [Sequence(Group(0, r.prompt, []), 0, r.tokens[:n]) for r, n in zip(rows, grown)]
            engine.lens[: len(rows)] = torch.tensor([row.length for row in engine.running])
            guess = GraphRecorder()
            learned.propose(engine, shape_of(engine.running, 3, learned.missing(engine.running)), guess)
            for i, row in enumerate(engine.running):
                t = row.length - 1  # the newest entry with a true feature
                if 0 <= t < int((batch.owner == i).sum()):
                    wanted = learned.SHARPEN * drafter.policy.head(trained[batch.owner == i][t])
                    assert torch.allclose(wanted, guess.first[i, 0], atol=1e-4), (i, t)
                    checked += 1
            grown = [min(len(r.tokens), n + rng.randint(1, 5)) for r, n in zip(rows, grown)]
    assert checked > 20


def test_training_pass_equals_inference_pass_and_a_shift_is_caught():
    check_alignment(pack)

    def shifted(rows):  # the classic bug: (x_t, h_t)
        return pack(rows)._replace(ids=torch.cat([row.ids[:-2] for row in rows])[None])

    caught(check_alignment, shifted)


def test_catching_up_in_pieces_is_the_same(monkeypatch):
    monkeypatch.setattr(EagleProposer, "PIECE", 3)
    check_alignment(pack)


def check_packing(mask):
    model = tiny()
    drafter = make_drafter(model)
    rows = sequences(responses_of(model)[:5])
    with torch.no_grad():
        together = trained_pass(drafter, pack(rows), mask)
        alone = [trained_pass(drafter, pack([row]), mask) for row in rows]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    check_packing(drafter_module.block_mask)

    def causal_without_blocks(owner, positions, groups, dtype):
        return torch.full((len(owner),) * 2, -torch.inf).triu(1).repeat(groups, 1)[None, None]

    def not_causal(owner, positions, groups, dtype):
        return torch.zeros(len(owner) * groups, len(owner))[None, None]

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
    assert batch.owner.tolist() == [0] * 5 + [1] * 5
    # entry t guesses token t + 2; tokens from 3 (or 1) on are the response
    assert batch.counted.tolist() == [False, True, True, True, True] + [True] * 5


# ---------------------------------------------------------------- training


def copies(module) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in module.state_dict().items()}


def check_policy_untouched(step):
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

    def careless(trainer, buffer):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "no_grad", torch.enable_grad)
            loss, _ = drafter_loss(trainer.drafter, buffer.pack(128, trainer.rng))
        loss.backward()  # gradients reach the borrowed head
        DrafterTrainer.step(trainer, buffer)

    caught(check_policy_untouched, careless)


def test_the_drafter_follows_the_live_policy_by_reference():
    model = tiny()
    drafter = make_drafter(model)
    h = torch.randn(1, 1, 32)
    drafter.words = torch.tensor([3, 5]).int()
    before = h @ drafter.head_weights()[0].T
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.allclose(h @ drafter.head_weights()[0].T, 2 * before)


def test_training_raises_acceptance():
    model = tiny()
    assert accepted_per_round(model, trained_drafter(model)) > accepted_per_round(model, make_drafter(model)) + 0.1


def forget_row_moves(monkeypatch):
    def move(self, source, target):
        self.true_entries[target] = self.true_entries[source]  # and its keys and values stay behind

    monkeypatch.setattr(EagleProposer, "move", move)


def believe_stale_features(monkeypatch):
    def admit(self, rows):
        self.true_entries[rows] = [30] * (rows.stop - rows.start)

    monkeypatch.setattr(EagleProposer, "admit", admit)


@pytest.mark.parametrize("harm", [forget_row_moves, believe_stale_features])
def test_broken_bookkeeping_costs_guesses_and_no_token(harm, monkeypatch):
    """It cannot harm the tokens, only the guesses: that is what lossless means."""
    model = tiny()
    drafter = trained_drafter(model)
    good = accepted_per_round(model, drafter)
    harm(monkeypatch)
    check_identity(fixed("eagle", 4), model=model, drafter=drafter)
    assert accepted_per_round(model, drafter) < good


def test_fit_reports_loss_and_agreement():
    model = tiny()
    trainer = DrafterTrainer(make_drafter(model), tokens=64)
    loss, agreement = fit(trainer, filled_buffer(responses_of(model)), 0.3, progress=False)
    assert trainer.steps > 0
    assert loss > 0
    assert 0 <= agreement <= 1


def test_what_is_published_is_the_running_average():
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
    """As on a GPU: the engine's policy and drafter in bfloat16, the learner and its average in float32."""
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


def test_a_drafter_of_another_shape_is_refused_with_the_reason(tmp_path):
    make_drafter(tiny()).save(tmp_path)
    with pytest.raises(UserError, match="drafter.safetensors.*size mismatch") as error:
        Drafter(tiny(hidden_size=64)).load(tmp_path)
    assert "\n" not in str(error.value)


def check_narrow_file(fill) -> None:
    """A drafter with a narrower MLP, filled into a wide layer, computes what it did, and can go on learning."""
    model = tiny()
    scale_and_filter = type(model.model.layers[0])(model.config, layer_idx=0)
    wide = mlp.widened(scale_and_filter, model.config)
    assert mlp.mlp_width(wide) == mlp.FEWEST > mlp.mlp_width(scale_and_filter)
    weights = {"layer." + name: w for name, w in scale_and_filter.state_dict().items()}
    fill(wide, weights, "layer.")
    wide.load_state_dict({name.removeprefix("layer."): w for name, w in weights.items()})
    x = torch.randn(3, model.config.hidden_size)
    assert torch.allclose(wide.mlp(x), scale_and_filter.mlp(x), atol=1e-6)
    wide.mlp(x).square().sum().backward()
    assert wide.mlp.down_proj.weight.grad[:, mlp.mlp_width(scale_and_filter) :].abs().sum() > 0


def test_a_narrower_drafter_is_filled_up():
    check_narrow_file(mlp.fill_up)

    def with_effect(layer, weights, prefix):
        """Mistake: the further units are random towards the output, too."""
        mlp.fill_up(layer, weights, prefix)
        name = prefix + "mlp.down_proj.weight"
        weights[name] = weights[name] + layer.mlp.down_proj.weight.detach()

    def dead(layer, weights, prefix):
        """Mistake: all of them are 0, so they never learn."""
        mlp.fill_up(layer, weights, prefix)
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            weights[prefix + name][48:] = 0

    caught(check_narrow_file, with_effect)
    caught(check_narrow_file, dead)


def test_a_file_of_a_narrower_drafter_can_be_loaded(tmp_path, monkeypatch):
    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "FEWEST", 0)
        before = make_drafter(model)
        before.save(tmp_path)
    after = Drafter(model)
    after.load(tmp_path)
    assert (mlp.mlp_width(before.layer), mlp.mlp_width(after.layer)) == (48, mlp.FEWEST)
    x = torch.randn(3, model.config.hidden_size)
    assert torch.allclose(after.layer.mlp(x), before.layer.mlp(x), atol=1e-6)


# ---------------------------------------------------------------- the buffer


def test_buffer_is_bounded_by_bytes():
    buffer = FeatureBuffer(limit=10_000)
    for r in responses_of(tiny()) * 3:
        buffer.add(r)
        assert buffer.bytes == sum(row.hidden.nbytes for row in buffer.sequences)
        assert buffer.bytes <= 10_000 or len(buffer.sequences) == 1


def check_remembers_the_tail(begin):
    """After a rollout of short and long responses and then one of short ones: this rollout's rows, and the longest of
    the last one's, with their numbers.
    """
    buffer = FeatureBuffer()
    for rollout, lengths in ((1, [90, 10, 30, 80]), (2, [5, 60, 7, 70]), (3, [4, 6])):
        begin(buffer, rollout)
        for n in lengths:
            buffer.add(Response(0, 0, [1], [2] * n, None, True, torch.zeros(n, 4)))
    assert [(row.rollout, len(row.ids)) for row in buffer.sequences] == [(2, 71), (3, 5), (3, 7)]
    assert buffer.bytes == (70 + 4 + 6) * 16


def test_the_buffer_keeps_long_responses_of_the_last_rollout():
    check_remembers_the_tail(FeatureBuffer.begin)

    def forgetful(buffer, rollout):
        buffer.sequences.clear()
        buffer.rollout = rollout
        buffer.bytes = 0

    def hoarding(buffer, rollout):
        buffer.rollout = rollout

    caught(check_remembers_the_tail, forgetful)
    caught(check_remembers_the_tail, hoarding)


@pytest.mark.parametrize("prompt", [3, 40, 290])
def test_of_long_rows_a_stretch_is_learned_that_holds_some_response(prompt, monkeypatch):
    monkeypatch.setattr(FeatureBuffer, "MAX_WINDOW", 50)
    buffer = FeatureBuffer()
    rng = random.Random(0)
    ids = list(range(300))
    hidden = torch.arange(299.0)[:, None].repeat(1, 4)
    buffer.add(Response(0, 0, ids[:prompt], ids[prompt:], None, True, hidden))
    for _ in range(50):
        batch = buffer.pack(40, rng)
        assert batch.ids.shape[1] == 48
        assert batch.counted.any()
        assert torch.equal(batch.ids[0], batch.features[0, :, 0].long() + 1)
        assert torch.equal(batch.targets, batch.features + 1)
        # entry t holds x_{t+1} and guesses x_{t+2}, which is of the response
        assert torch.equal(batch.counted, batch.ids[0] >= prompt - 1)


# ---------------------------------------------------------------- in the engine


class NowAndThen(Strategy):
    """Speculation starts again after long plain stretches."""

    def __init__(self):
        super().__init__()
        self.turns = itertools.count()

    def choose(self, running):
        return DraftPlan("eagle", 12 if next(self.turns) % 40 > 35 else 0)


def test_catching_up_stays_inside_the_slots():
    """Slots that the longest sequences fill to the last entry; the catching up of one row would reach beyond the slot
    of another, which needs none.
    """
    model = tiny()
    groups = groups_of(12, random.Random(1))
    longest = max(len(group.prompt) for group in groups)
    groups = [Group(g.key, g.prompt * (longest // len(g.prompt)), g.seeds) for g in groups]
    sampling = Sampling(max_new=60)
    context = max(len(group.prompt) for group in groups) + 60
    engine = Engine(model, {999}, 10, context, proposers={"eagle": EagleProposer(make_drafter(model))})
    plain = tokens_of(engine.generate(groups, sampling))
    assert tokens_of(engine.generate(groups, sampling, NowAndThen())) == plain


def test_responses_count_their_rounds_and_drafts():
    engine = make_engine(tiny())
    responses = by_name(engine.generate(groups_of(6, random.Random(1)), SAMPLINGS[0], fixed("eagle", 3)))
    assert all(r.drafts == 3 * r.rounds for r in responses.values())
    assert sum(r.rounds for r in responses.values()) == engine.stats.spec_sequence_rounds


def test_command_line_warm_starts(model_folder, tmp_path, monkeypatch, capsys):
    argv = ["--model", model_folder, "--out", tmp_path, "--prompts", 2, "--seconds", 0.5, "--max-new", 20]
    monkeypatch.setattr("sys.argv", ["drafter.py", *map(str, argv)])
    drafter_module.main()
    text = capsys.readouterr().out
    assert "before: " in text
    assert "after: " in text
    assert (tmp_path / "drafter.safetensors").exists()
    monkeypatch.setattr("sys.argv", ["drafter.py", *map(str, argv), "--start", str(tmp_path)])
    drafter_module.main()
