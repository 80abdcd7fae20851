"""The GPU path, as far as a machine without a GPU can tell: faked memory, faked GPUs, errors that are made up."""

from dataclasses import replace

import pytest
import torch
from conftest import LEARN, caught, here, rows_of, tiny
from helpers import filled_buffer, make_drafter, responses_of
from safetensors.torch import load_file
from test_tlt import make_spot, team_of_one
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import drafter
import rollout
import spot
import tlt
import train_grpo
from base.pretrain import make_tokenizer
from drafter import Drafter, DrafterTrainer, drafter_loss
from parts.engine.model_loading import cast_weights
from parts.running import checkpoints
from parts.running.timers import WorkerTimer
from parts.training.drafter_data import FeatureBuffer, SequenceFeatures, pack
from parts.training.layouts import ReplicatedLayout
from rollout import Engine
from spot import SpotTrainer, allocate_moments, step_bytes, train_until

# ---------------------------------------------------------------- random numbers


def host_state(make, device: str) -> torch.Tensor:
    """Of the host's random numbers, after a drafter was made for a policy on that device."""
    policy = tiny().to(device)
    torch.manual_seed(1)
    make(policy)
    return torch.get_rng_state()


def check_drawn_on_the_host(make):
    """For a policy on another device as many of them are drawn as for one on the host."""
    assert torch.equal(host_state(make, "cpu"), host_state(make, "meta"))


def test_a_drafter_begins_alike_on_every_device(monkeypatch):
    monkeypatch.setattr(drafter, "scale_of", lambda embedding: 1.0)  # without numbers there is no size
    check_drawn_on_the_host(Drafter)

    def drawn_there(policy):
        torch.nn.init.normal_(torch.empty(4, 4, device=policy.device))

    caught(check_drawn_on_the_host, drawn_there)


def check_guesses_are_chosen_on_the_host(monkeypatch, loss):
    """Which features are guessed ones, in a batch, does not depend on the device's random numbers."""
    model = tiny()
    batch = pack(
        [SequenceFeatures(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses_of(model)]
    )
    devices = []
    right = torch.rand

    def noted(*shape, device=None, **settings):
        devices.append(device)
        return right(*shape, device=device, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", noted)
        loss(make_drafter(model), batch)
    assert devices == [None]


def test_the_entries_that_see_guesses_are_chosen_on_the_host(monkeypatch):
    check_guesses_are_chosen_on_the_host(monkeypatch, drafter_loss)

    def chosen_there(drafter, batch):
        return torch.rand(batch.ids.shape, device=batch.ids.device)

    caught(check_guesses_are_chosen_on_the_host, monkeypatch, chosen_there)


# ---------------------------------------------------------------- the copy that generates


def bfloat16_run(able, out, monkeypatch):
    """A run whose responses come from a bfloat16 copy, with a drafter -> its train_grpo.Training, at the end."""
    trainings = []
    right = train_grpo.Training.finish

    def kept(self):
        trainings.append(self)
        return right(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Training, "finish", kept)
        patch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.1)
        flags = (*LEARN, "--steps", 2, "--workers", 1, "--eval-every", 0, "--strategy", 4)
        here(tlt.main, able, out, *flags, "--warm-start", 0.1, "--actor-dtype", "bfloat16")
    return trainings[0]


def check_copy_follows(training):
    """After the last update it is the policy, rounded; drafts were made in bfloat16 and learned in float32."""
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert {p.dtype for p in training.actor.parameters()} == {torch.bfloat16}
    assert training.engine.model is training.actor
    assert all(torch.equal(a, p.bfloat16()) for a, p in zip(training.actor.parameters(), training.model.parameters()))
    assert not any(a.requires_grad for a in training.actor.parameters())
    spot_ = training.worker.spot
    assert (spot_.served.fc.weight.dtype, spot_.learner.fc.weight.dtype) == (torch.bfloat16, torch.float32)
    first, last = (row for row in training.journal.metrics if "eval" not in row)
    assert last["speculation"]["share"] > 0
    assert first["drafter"]["steps"] > 0
    assert first["grad_norm"] > 0


def test_a_bfloat16_copy_generates_and_follows_the_policy(able, tmp_path, monkeypatch):
    training = bfloat16_run(able, tmp_path, monkeypatch)
    check_copy_follows(training)
    for p in training.model.parameters():
        p.data.mul_(1.01)
    caught(check_copy_follows, training)  # an update that the copy does not follow
    training.worker.layout.refresh(training.actor, training.model)
    check_copy_follows(training)


@pytest.mark.parametrize(
    "name, device, dtype",
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda:1", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda:1", torch.float32),
    ],
)
def test_what_generates_is_the_policy_itself_only_in_float32(name, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # there is no other
    model = tiny()
    learner, actor = ReplicatedLayout(name).place(model, device)
    assert learner is model
    assert actor.dtype == dtype
    assert (actor is model) == (dtype == torch.float32)


# ---------------------------------------------------------------- weights in files


def check_tied_weights_are_written_once(out, monkeypatch):
    """Also where each name's weight is a copy, as it comes from a GPU or from several workers."""
    model = tiny(tie_word_embeddings=True)
    whole = checkpoints.get_model_state_dict

    def copied(model, options):
        return {name: w.clone() for name, w in whole(model, options=options).items()}

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "get_model_state_dict", copied)
        checkpoints.save(out, 1, model, torch.optim.AdamW(model.parameters()), make_tokenizer(), [])
    folder = out / "checkpoint-000001"
    written = load_file(folder / "model.safetensors")
    assert sum(w.numel() for w in written.values()) == sum(p.numel() for p in model.parameters())
    again = type(model).from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_tied_weights_are_written_once(tmp_path, monkeypatch):
    check_tied_weights_are_written_once(tmp_path, monkeypatch)
    monkeypatch.setattr(checkpoints, "under_one_name", lambda model, weights: weights)
    caught(check_tied_weights_are_written_once, tmp_path, monkeypatch)


# ---------------------------------------------------------------- drafter training that runs out of memory


def little_memory(monkeypatch, most: int) -> list[int]:
    """A machine on which a batch of more than `most` entries does not fit -> sizes that were tried."""
    tried = []

    def small(learner, batch, *rest, **settings):
        tried.append(batch.ids.shape[1])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("no room")
        return drafter_loss(learner, batch, *rest, **settings)

    for module in (drafter, spot):
        monkeypatch.setattr(module, "drafter_loss", small)
    return tried


def spot_with_long_rows(tokens: int = 1200) -> SpotTrainer:
    """Its responses are that long."""
    rows = []
    for r in responses_of(tiny())[:6]:
        times = -(-tokens // len(r.hidden))
        hidden = r.hidden.repeat(times, 1)[:tokens]
        rows.append(replace(r, tokens=(r.tokens * tokens)[: tokens + 1 - len(r.prompt)], hidden=hidden))
    spot_ = make_spot()
    spot_.buffer = filled_buffer(rows)
    return spot_


def check_trains_in_little_memory(monkeypatch, capsys):
    """It goes on with what fits, says so once each time, and learns."""
    spot_ = spot_with_long_rows()
    before = [p.clone() for p in spot_.learner.parameters()]
    with monkeypatch.context() as patch:
        tried = little_memory(patch, 300)
        for _ in range(8):
            spot_.step()
    failed = [size for size in tried if size > 300]
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory in drafter training" in line]
    assert spot_.fits
    assert len(said) == len(failed) >= 2
    assert spot_.steps == spot_.trainer.steps == spot_.steps_since_average == 8 - len(failed) >= 4
    assert sorted(tried, reverse=True)[: len(failed)] == tried[: len(failed)]  # the rest fits
    assert not any(torch.equal(a, b) for a, b in zip(before, spot_.learner.parameters()) if a.ndim > 1)


def test_drafter_training_goes_on_with_what_fits_the_memory(monkeypatch, capsys):
    check_trains_in_little_memory(monkeypatch, capsys)
    right = FeatureBuffer.pack

    def long_rows_uncut(self, tokens, rng):
        return right(self, 512, rng)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureBuffer, "pack", long_rows_uncut)
        caught(check_trains_in_little_memory, monkeypatch, capsys)
    monkeypatch.setattr(SpotTrainer, "cut_finer", lambda self: None)
    caught(check_trains_in_little_memory, monkeypatch, capsys)


def check_ends_where_nothing_fits(monkeypatch, capsys):
    """A few tries, then it waits; nothing has changed, and the others' drafters count alone."""
    spot_ = spot_with_long_rows()
    before = [p.clone() for p in spot_.learner.parameters()]
    looks = []

    def over() -> bool:
        looks.append(len(looks))
        assert len(looks) < 50
        return len(looks) == 20

    timer = WorkerTimer()
    with monkeypatch.context() as patch:
        tried = little_memory(patch, 20)
        patch.setattr(spot.time, "sleep", lambda seconds: None)
        train_until(over, timer, spot_)
        spot_.warm_start(0.05, timer, lambda tensors: None)  # ends at once
    assert len(tried) == 4
    assert not spot_.learns
    assert spot_.average(lambda tensors: None) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, spot_.learner.parameters()))
    assert "it ends here" in capsys.readouterr().out.splitlines()[-1]


def test_where_nothing_fits_drafter_training_ends_and_the_run_goes_on(able, tmp_path, monkeypatch, capsys):
    check_ends_where_nothing_fits(monkeypatch, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(SpotTrainer, "FEWEST_TOKENS", 0)
        caught(check_ends_where_nothing_fits, monkeypatch, capsys)
    little_memory(monkeypatch, 20)
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.1)
    capsys.readouterr()
    here(tlt.main, able, tmp_path, *LEARN, "--steps", 1, "--workers", 1, "--eval-every", 0, "--warm-start", 5)
    assert rows_of(tmp_path)[-1]["drafter"]["steps"] == 0
    assert capsys.readouterr().out.count("out of memory in drafter training") == 4


def check_counts_right_by_halves(monkeypatch, most: int, rows: bool):
    """Trying on held-out rows: what does not fit at once is tried by halves, and counts the same. rows: whether any of
    them fits.
    """
    spot_ = spot_with_long_rows(100)
    held_out = list(spot_.buffer.sequences)
    wanted = torch.zeros(2)
    if rows:
        batch = pack(held_out)
        count = batch.counted.sum()
        wanted = torch.stack([drafter_loss(spot_.learner, batch, own=0.0)[1] * count, count])
    with monkeypatch.context() as patch:
        tried = little_memory(patch, most)
        got = spot_.count_right(held_out)
    assert max(tried) > most
    assert torch.allclose(got, wanted, atol=1e-3)


def test_trying_on_held_out_rows_goes_on_with_what_fits_the_memory(monkeypatch):
    check_counts_right_by_halves(monkeypatch, 220, True)
    check_counts_right_by_halves(monkeypatch, 20, False)  # nothing fits
    right = SpotTrainer.count_right

    def last_row_left_out(self, rows):
        return right(self, rows[: max(1, len(rows) - 1)])

    monkeypatch.setattr(SpotTrainer, "count_right", last_row_left_out)
    caught(check_counts_right_by_halves, monkeypatch, 220, True)


def check_moments_come_first(allocate):
    """They are there before the first step, and the first steps are what they were."""
    model = tiny()
    buffer = filled_buffer(responses_of(model))
    weights = []
    for early in (False, True):
        trainer = DrafterTrainer(make_drafter(model))
        if early:
            allocate(trainer.optimizer)
            assert len(trainer.optimizer.state) == len(list(trainer.drafter.parameters()))
        torch.manual_seed(0)
        for _ in range(3):
            trainer.step(buffer)
        weights.append([p.detach() for p in trainer.drafter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_adams_moments_are_there_before_memory_is_counted():
    check_moments_come_first(allocate_moments)
    caught(check_moments_come_first, lambda optimizer: None)

    def counted(optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()

    caught(check_moments_come_first, counted)
    assert make_spot().trainer.optimizer.state
    assert not make_spot(drafter="static", warm_start=0.0).trainer.optimizer.state


# ---------------------------------------------------------------- memory that is counted


def check_slots_grow_back(monkeypatch):
    """Where memory was short once, and is not when more room is needed."""
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "free_memory", lambda device: 1_300_000)
        engine = Engine(tiny(), {1}, 30, 60)
        assert engine.slots == engine.max_running < 30
        patch.setattr(rollout, "free_memory", lambda device: 1 << 30)
        engine.reserve(70)
        assert engine.slots == engine.max_running == 30


def test_slots_grow_back(monkeypatch):
    check_slots_grow_back(monkeypatch)
    right = Engine.affordable

    def never_more(self, room):
        self.slots_wanted = self.slots
        return right(self, room)

    monkeypatch.setattr(Engine, "affordable", never_more)
    caught(check_slots_grow_back, monkeypatch)


class Peak(TorchDispatchMode):
    """Notes the most bytes of tensors, made while it is on, that exist at once."""

    def __init__(self):
        super().__init__()
        self.running: dict[int, tuple] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.running = {place: entry for place, entry in self.running.items() if not entry[0].expired()}
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.running.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.running.values()))
        return out


SHAPES = [
    {},
    {"vocab_size": 3000},
    {"hidden_size": 64, "intermediate_size": 512},
    {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 8},
]


def check_step_is_counted(count):
    """What a micro-step holds at most is less than is counted, and not much less."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            model = cast_weights(tiny(**shape), dtype)
            learner = Drafter(model, torch.float32)
            for tokens in (64, 300):
                hidden = torch.randn(tokens + 1, model.config.hidden_size).to(model.dtype)
                batch = pack([SequenceFeatures(torch.zeros(tokens + 2, dtype=torch.long), hidden, 1)])
                with Peak() as peak:
                    loss, _ = drafter_loss(learner, batch)
                    torch.autograd.backward(loss, inputs=list(learner.parameters()))
                learner.zero_grad()
                counted = count(learner, tokens, model.config.vocab_size)
                assert peak.bytes <= counted <= 4 * peak.bytes, (shape, tokens)


def test_the_memory_of_a_micro_step_is_counted():
    check_step_is_counted(step_bytes)
    caught(check_step_is_counted, lambda learner, tokens, words: step_bytes(learner, tokens, 0))


def check_engine_leaves_room(monkeypatch):
    """To the update, or to a micro-step of the drafter, whichever needs more."""
    worker = team_of_one(monkeypatch)
    assert worker.engine(tiny(), {1}, 4, 1000).reserve_bytes == worker.spot.idle_bytes() > 1000
    assert worker.engine(tiny(), {1}, 4, 1 << 40).reserve_bytes == 1 << 40
    frozen = team_of_one(monkeypatch, drafter="static", warm_start=0.0)
    assert frozen.engine(tiny(), {1}, 4, 1000).reserve_bytes == 1000


def test_the_engine_leaves_room_for_drafter_training(monkeypatch):
    check_engine_leaves_room(monkeypatch)
    monkeypatch.setattr(tlt.TLTWorker, "idle_bytes", lambda self: 0)
    caught(check_engine_leaves_room, monkeypatch)


def check_warm_start_learns_what_was_written(monkeypatch):
    """Before the first rollout no word had been written."""
    spot_ = make_spot(draft_vocab=20)
    spot_.begin(1)
    responses = responses_of(tiny())
    for r in responses:
        spot_.buffer.add(r)
    spot_.count_tokens(responses)
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.01)
    spot_.warm_start(0.01, WorkerTimer(), lambda tensors: None)
    assert spot_.learner.words.equal(spot_.words.choose(20))
    assert spot_.served.words.equal(spot_.learner.words)


def test_the_warm_start_learns_the_words_that_were_written(monkeypatch):
    check_warm_start_learns_what_was_written(monkeypatch)
    right = SpotTrainer.choose_draft_vocab

    def before_rollouts_only(self):
        if self.needs_warm_start:
            right(self)

    monkeypatch.setattr(SpotTrainer, "choose_draft_vocab", before_rollouts_only)
    caught(check_warm_start_learns_what_was_written, monkeypatch)
