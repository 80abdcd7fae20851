"""The GPU path as far as it can be tested without a GPU: with simulated memory, and simulated errors."""

from dataclasses import replace

import pytest
import torch
from conftest import LEARN, caught, rows_of, run_in_process, tiny
from helpers import filled_buffer, make_drafter, responses_of
from safetensors.torch import load_file
from test_tlt import make_spot_trainer, single_worker
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
    """Return the state of the host's random numbers after make(policy on that device)."""
    policy = tiny().to(device)
    torch.manual_seed(1)
    make(policy)
    return torch.get_rng_state()


def check_drawn_on_the_host(make):
    """For a policy on another device as many of the host's random numbers are drawn as for one on the host."""
    assert torch.equal(host_state(make, "cpu"), host_state(make, "meta"))


def test_new_drafters_are_the_same_on_every_device(monkeypatch):
    monkeypatch.setattr(drafter, "embedding_scale", lambda embedding: 1.0)  # on "meta" there are no numbers to measure
    check_drawn_on_the_host(Drafter)

    def drawn_on_the_device(policy):
        torch.nn.init.normal_(torch.empty(4, 4, device=policy.device))

    caught(check_drawn_on_the_host, drawn_on_the_device)


def check_chosen_on_the_host(monkeypatch, loss):
    """The entries of a batch that see predicted features do not depend on the device's random numbers."""
    model = tiny()
    batch = pack(
        [SequenceFeatures(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses_of(model)]
    )
    devices = []
    right = torch.rand

    def recorded(*shape, device=None, **settings):
        devices.append(device)
        return right(*shape, device=device, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", recorded)
        loss(make_drafter(model), batch)
    assert devices == [None]


def test_entries_that_see_predicted_features_are_chosen_on_the_host(monkeypatch):
    check_chosen_on_the_host(monkeypatch, drafter_loss)

    def chosen_on_the_device(drafter, batch):
        return torch.rand(batch.ids.shape, device=batch.ids.device)

    caught(check_chosen_on_the_host, monkeypatch, chosen_on_the_device)


# ---------------------------------------------------------------- the actor


def bfloat16_run(chain_policy, out, monkeypatch):
    """Make a run with a bfloat16 actor and a drafter -> its train_grpo.Training at the end."""
    trainings = []
    right = train_grpo.Training.finish

    def finish(self):
        trainings.append(self)
        return right(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Training, "finish", finish)
        patch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.02)
        flags = (*LEARN, "--steps", 2, "--workers", 1, "--eval-every", 0, "--strategy", 4)
        run_in_process(tlt.main, chain_policy, out, *flags, "--warm-start", 0.1, "--actor-dtype", "bfloat16")
    return trainings[0]


def check_actor_follows(training):
    """After the last update the actor is the policy, rounded; the drafter drafts in bfloat16 and learns in float32."""
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert {p.dtype for p in training.actor.parameters()} == {torch.bfloat16}
    assert training.engine.model is training.actor
    assert all(torch.equal(a, p.bfloat16()) for a, p in zip(training.actor.parameters(), training.model.parameters()))
    assert not any(a.requires_grad for a in training.actor.parameters())
    spot_trainer = training.worker.spot_trainer
    assert spot_trainer.served.fc.weight.dtype == torch.bfloat16
    assert spot_trainer.learner.fc.weight.dtype == torch.float32
    first, last = (row for row in training.report.metrics if "eval" not in row)
    assert last["speculation"]["share"] > 0
    assert first["drafter"]["steps"] > 0
    assert first["grad_norm"] > 0


def test_a_bfloat16_actor_follows_the_policy(chain_policy, tmp_path, monkeypatch):
    training = bfloat16_run(chain_policy, tmp_path, monkeypatch)
    check_actor_follows(training)
    for p in training.model.parameters():
        p.data.mul_(1.01)
    caught(check_actor_follows, training)  # an update that the actor does not follow
    training.worker.layout.refresh_actor(training.actor, training.model)
    check_actor_follows(training)


@pytest.mark.parametrize(
    "name, device, dtype",
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda:1", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda:1", torch.float32),
    ],
)
def test_the_actor_is_the_policy_itself_only_in_float32(name, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # there is no other device
    model = tiny()
    learner, actor = ReplicatedLayout(name).place(model, device)
    assert learner is model
    assert actor.dtype == dtype
    assert (actor is model) == (dtype == torch.float32)


# ---------------------------------------------------------------- weights in files


def check_tied_weights_are_written_once(out, monkeypatch):
    """Also if the weight of each name is a tensor of its own, as they come from a GPU or from several workers."""
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
    """Let batches of more than `most` entries run out of memory -> the sizes that are tried."""
    tried = []

    def limited(learner, batch, *rest, **settings):
        tried.append(batch.ids.shape[1])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("simulated")
        return drafter_loss(learner, batch, *rest, **settings)

    for module in (drafter, spot):
        monkeypatch.setattr(module, "drafter_loss", limited)
    return tried


def spot_trainer_with(tokens: int = 1200) -> SpotTrainer:
    """Return a spot trainer whose buffer holds responses of that length."""
    responses = []
    for r in responses_of(tiny())[:6]:
        times = -(-tokens // len(r.hidden))
        hidden = r.hidden.repeat(times, 1)[:tokens]
        responses.append(replace(r, tokens=(r.tokens * tokens)[: tokens + 1 - len(r.prompt)], hidden=hidden))
    spot_trainer = make_spot_trainer()
    spot_trainer.buffer = filled_buffer(responses)
    return spot_trainer


def check_trains_in_little_memory(monkeypatch, capsys):
    """It continues with batches that fit, prints a line each time, and learns."""
    spot_trainer = spot_trainer_with()
    before = [p.clone() for p in spot_trainer.learner.parameters()]
    with monkeypatch.context() as patch:
        tried = little_memory(patch, 300)
        for _ in range(8):
            spot_trainer.step()
    failed = [size for size in tried if size > 300]
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory in drafter training" in line]
    assert spot_trainer.fits
    assert len(lines) == len(failed) >= 2
    assert spot_trainer.steps == spot_trainer.trainer.steps == spot_trainer.steps_since_average == 8 - len(failed) >= 4
    assert sorted(tried, reverse=True)[: len(failed)] == tried[: len(failed)]  # the rest fits
    assert not any(torch.equal(a, b) for a, b in zip(before, spot_trainer.learner.parameters()) if a.ndim > 1)


def test_drafter_training_continues_with_batches_that_fit_the_memory(monkeypatch, capsys):
    check_trains_in_little_memory(monkeypatch, capsys)
    right = FeatureBuffer.pack

    def pack_whole_sequences(self, tokens, rng):
        return right(self, 512, rng)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureBuffer, "pack", pack_whole_sequences)
        caught(check_trains_in_little_memory, monkeypatch, capsys)
    monkeypatch.setattr(SpotTrainer, "shrink_batches", lambda self: None)
    caught(check_trains_in_little_memory, monkeypatch, capsys)


def check_ends_where_nothing_fits(monkeypatch, capsys):
    """After a few tries the worker only waits; its drafter has not changed, and has no weight in the average."""
    spot_trainer = spot_trainer_with()
    before = [p.clone() for p in spot_trainer.learner.parameters()]
    asked = []

    def over() -> bool:
        asked.append(len(asked))
        assert len(asked) < 50
        return len(asked) == 20

    timer = WorkerTimer()
    with monkeypatch.context() as patch:
        tried = little_memory(patch, 20)
        patch.setattr(spot.time, "sleep", lambda seconds: None)
        patch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.05)
        train_until(over, timer, spot_trainer)
        spot_trainer.warm_start(0.05, timer, lambda tensors: None)  # ends at once
    assert len(tried) == 4
    assert not spot_trainer.can_train
    assert spot_trainer.average(lambda tensors: None) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, spot_trainer.learner.parameters()))
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(lines) == 4
    assert "it ends here" in lines[-1]


def test_where_nothing_fits_drafter_training_ends_and_the_run_continues(chain_policy, tmp_path, monkeypatch, capsys):
    check_ends_where_nothing_fits(monkeypatch, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(SpotTrainer, "MIN_BATCH_TOKENS", 0)
        caught(check_ends_where_nothing_fits, monkeypatch, capsys)
    little_memory(monkeypatch, 20)
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.1)
    capsys.readouterr()
    flags = (*LEARN, "--steps", 4, "--workers", 1, "--eval-every", 0, "--warm-start", 5)
    run_in_process(tlt.main, chain_policy, tmp_path, *flags)
    assert [row["drafter"]["steps"] for row in rows_of(tmp_path)] == [0] * 4
    assert capsys.readouterr().out.count("out of memory in drafter training") == 4


def check_counts_by_halves(monkeypatch, most: int, fits: bool):
    """Evaluation on held-out sequences: those that do not fit together are evaluated by halves, with the same result.
    fits: whether one of them fits alone.
    """
    spot_trainer = spot_trainer_with(100)
    held_out = list(spot_trainer.buffer.sequences)
    wanted = torch.zeros(2)
    if fits:
        batch = pack(held_out)
        count = len(batch.learned)
        wanted = torch.tensor([drafter_loss(spot_trainer.learner, batch, own=0.0)[1].item() * count, count])
    with monkeypatch.context() as patch:
        tried = little_memory(patch, most)
        got = spot_trainer.count_right(held_out)
    assert max(tried) > most
    assert torch.allclose(got, wanted, atol=1e-3)


def test_evaluation_on_held_out_sequences_continues_with_what_fits_the_memory(monkeypatch):
    check_counts_by_halves(monkeypatch, 220, True)
    check_counts_by_halves(monkeypatch, 20, False)  # nothing fits
    right = SpotTrainer.count_right

    def last_one_left_out(self, sequences):
        return right(self, sequences[: max(1, len(sequences) - 1)])

    monkeypatch.setattr(SpotTrainer, "count_right", last_one_left_out)
    caught(check_counts_by_halves, monkeypatch, 220, True)


def check_moments_are_allocated(allocate):
    """The moments exist before the first step, and the first steps give the same weights as without."""
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


def test_adam_s_moments_are_allocated_before_memory_is_measured():
    check_moments_are_allocated(allocate_moments)
    caught(check_moments_are_allocated, lambda optimizer: None)

    def with_a_step_that_counts(optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()

    caught(check_moments_are_allocated, with_a_step_that_counts)
    assert make_spot_trainer().trainer.optimizer.state
    assert not make_spot_trainer(drafter="static", warm_start=0.0).trainer.optimizer.state


# ---------------------------------------------------------------- estimates of memory


def check_slots_grow_back(monkeypatch):
    """If there was little memory once, and there is more when a longer context is reserved, there are more slots."""
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

    def never_more(self, max_len):
        self.slots_wanted = self.slots
        return right(self, max_len)

    monkeypatch.setattr(Engine, "affordable", never_more)
    caught(check_slots_grow_back, monkeypatch)


class Peak(TorchDispatchMode):
    """Measures the largest number of bytes that exist at once, of tensors that are made while it is active."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive = {address: entry for address, entry in self.alive.items() if not entry[0].expired()}
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


SHAPES = [
    {},
    {"vocab_size": 3000},
    {"hidden_size": 64, "intermediate_size": 512},
    {"vocab_size": 3000, "hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 8},
]


def check_step_estimate(estimate):
    """A training step takes at most the estimated memory, and at least a quarter of it."""
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
                estimated = estimate(learner, tokens, model.config.vocab_size)
                assert peak.bytes <= estimated <= 4 * peak.bytes, (shape, tokens)


def test_the_memory_of_a_training_step_is_estimated():
    check_step_estimate(step_bytes)
    caught(check_step_estimate, lambda learner, tokens, vocab: step_bytes(learner, tokens, 0))


def check_engine_leaves_memory():
    """The engine leaves memory to the update or to a training step of the drafter, whichever needs more."""
    worker = single_worker()
    assert worker.make_engine(tiny(), {1}, 4, 1000, None).reserve_bytes == worker.spot_trainer.idle_bytes() > 1000
    assert worker.make_engine(tiny(), {1}, 4, 1 << 40, None).reserve_bytes == 1 << 40
    frozen = single_worker(drafter="static", warm_start=0.0)
    assert frozen.make_engine(tiny(), {1}, 4, 1000, None).reserve_bytes == 1000


def test_the_engine_leaves_memory_for_drafter_training(monkeypatch):
    check_engine_leaves_memory()
    monkeypatch.setattr(tlt.TLTWorker, "idle_bytes", lambda self: 0)
    caught(check_engine_leaves_memory)


def check_warm_start_chooses_the_draft_vocabulary(monkeypatch):
    """Before the first rollout no token had been written."""
    spot_trainer = make_spot_trainer(draft_vocab=20)
    spot_trainer.begin_rollout(1)
    responses = responses_of(tiny())
    for r in responses:
        spot_trainer.buffer.add(r)
    spot_trainer.count_tokens(responses)
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.01)
    spot_trainer.warm_start(0.01, WorkerTimer(), lambda tensors: None)
    assert spot_trainer.learner.draft_vocab.equal(spot_trainer.token_counts.choose(20))
    assert spot_trainer.served.draft_vocab.equal(spot_trainer.learner.draft_vocab)


def test_the_warm_start_uses_the_ids_of_the_first_rollout(monkeypatch):
    check_warm_start_chooses_the_draft_vocabulary(monkeypatch)
    right = SpotTrainer.choose_draft_vocab

    def before_rollouts_only(self):
        if not self.buffer.sequences:
            right(self)

    monkeypatch.setattr(SpotTrainer, "choose_draft_vocab", before_rollouts_only)
    caught(check_warm_start_chooses_the_draft_vocabulary, monkeypatch)
