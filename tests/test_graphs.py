"""Rounds in few shapes, and their recordings: the tokens stay the same, shapes hold all that a round depends on, and
recordings are dropped when a tensor that they read has moved.

There is no GPU here. `FakeRecorder` stands for CUDA graphs: to replay a round it calls the recorded function again
while the engine's list of running sequences is hidden, so a round fails that reads anything of the host beside its
shape; and it compares the addresses of all tensors with those at the recording.
"""

import random
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import (
    FAMILIES,
    SAMPLINGS,
    RandomPlans,
    by_name,
    check_equal,
    fixed,
    groups_of,
    make_drafter,
    make_engine,
    tiny_of,
    tokens_of,
    trained_drafter,
)
from hypothesis import example, given
from hypothesis import strategies as st

from drafter import refilled
from parts.engine import cuda_graphs
from parts.engine.acceptance import Tree
from parts.engine.cuda_graphs import GraphPool, RoundShape, bucketed_shape
from parts.engine.fused_layers import FusedLayer, JoinedLinear, PackedLinear, as_one_linear, can_pack
from parts.engine.interfaces import DraftPlan, Strategy
from parts.engine.kv_cache import attention_inputs
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from strategy import Goodput, plans_for


def addresses(engine: Engine) -> list:
    """Return the addresses of all tensors that a round of the engine reads or writes."""
    proposer = engine.proposers["eagle"]
    tensors = [engine.lens, engine.start, engine.seeds, engine.tokens, engine.logprobs, engine.hidden, engine.stop]
    tensors += [engine.cache.data, engine.running_count, proposer.cache.data]
    tensors += [proposer.fc, proposer.head_weight, proposer.head_bias, proposer.draft_vocab]
    layers = list(engine.fused_layers or ())
    if proposer.fused_layer:
        layers.append(proposer.fused_layer)
    for layer in layers:
        tensors += [linear.weight for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class FakeRecorder:
    """Stands for cuda_graphs.GraphRecorder."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.recordings = 0
        self.replays = 0

    def __call__(self, function):
        self.recordings += 1
        recorded = addresses(self.engine)

        def replay():
            assert addresses(self.engine) == recorded, "a tensor has moved"
            self.replays += 1
            running, self.engine.running = self.engine.running, None
            try:
                return function()
            finally:
                self.engine.running = running

        return replay


def recording_engine(model, drafter=None, slots: int = 10, **settings) -> tuple[Engine, FakeRecorder]:
    """Return an engine whose rounds are recorded, and its recorder."""
    engine = make_engine(model, drafter, slots, bucketed=True, **settings)
    recorder = FakeRecorder(engine)
    engine.graphs = GraphPool(engine.compute_round, recorder)
    return engine, recorder


STRATEGIES = {
    "plain": partial(fixed, "eagle", 0),
    "chain 1": partial(fixed, "eagle", 1),
    "chain 4": partial(fixed, "eagle", 4),
    "chain 12": partial(fixed, "eagle", 12),
    "ngram": partial(fixed, "ngram", 3),
    "random plans": partial(RandomPlans, 1),
}


def check_bucketed(strategy, sampling, model, groups=None, slots: int = 10, **settings) -> FakeRecorder:
    """Tokens, log-probabilities, hidden states, and accepted draft tokens by depth, are those of rounds of exact size.
    Return the recorder.
    """
    drafter = trained_drafter(model)
    groups = groups or groups_of(14, random.Random(1))
    exact = make_engine(model, drafter, slots, **settings)
    engine, recorder = recording_engine(model, drafter, slots, **settings)
    wanted = by_name(exact.generate(groups, sampling, strategy()))
    check_equal(by_name(engine.generate(groups, sampling, strategy())), wanted)
    assert engine.stats.accepted == exact.stats.accepted
    return recorder


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bucketed_rounds_make_the_same_tokens(strategy, sampling, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "KV_STEP", 16)  # so that there are several values of kv_len
    recorder = check_bucketed(STRATEGIES[strategy], sampling, tiny())
    assert recorder.replays > 10 or strategy in ("ngram", "random plans")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_bucketed_rounds(family):
    check_bucketed(partial(RandomPlans, 2), SAMPLINGS[0], tiny_of(family))


def test_trees_in_bucketed_rounds():
    check_bucketed(partial(fixed, "eagle", 3), SAMPLINGS[0], tiny(), rule=partial(Tree, width=2))


@cases(6)
@example(0, 8, 1, 0)  # prompts of one token: there is no feature yet
@given(st.integers(0, 2**32), st.integers(1, 13), st.integers(1, 40), st.integers(0, 3))
def test_random_shapes_of_bucketed_rounds(seed, slots, longest, step):
    rng = random.Random(seed)
    groups = groups_of(rng.randint(1, 20), rng, longest, min(4, slots))
    before = cuda_graphs.KV_STEP
    cuda_graphs.KV_STEP = (8, 16, 32, 128)[step]
    try:
        check_bucketed(partial(RandomPlans, seed), SAMPLINGS[0], tiny(), groups, slots)
    finally:
        cuda_graphs.KV_STEP = before


def test_columns_sampled_in_pieces_keep_all_sequences_in_bucketed_rounds(monkeypatch):
    """Which sequences drop out depends on the contents of tensors, which a recording cannot follow."""
    model = tiny()
    engine, recorder = recording_engine(model, trained_drafter(model))
    exact = make_engine(model, trained_drafter(model))
    engine.max_logits = exact.max_logits = 2 * 118
    groups = groups_of(10, random.Random(1))
    wanted = by_name(exact.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
    assert recorder.replays > 10


# ---------------------------------------------------------------- broken variants


def without(field: str):
    """Return `bucketed_shape` with a mistake: of shapes that differ in this field only, the first stands for all."""
    first: dict[RoundShape, RoundShape] = {}

    def key(shape: RoundShape, slots: int, max_len: int) -> RoundShape:
        shape = bucketed_shape(shape, slots, max_len)
        return first.setdefault(shape._replace(**{field: None}), shape)

    return key


@pytest.mark.parametrize("field", ["batch_size", "kv_len", "catch_up_len", "plan"])
def test_a_shape_that_lacks_a_field_is_caught(field, monkeypatch):
    """Batches shrink, kv_len grows, catch-ups follow the plans: without any of the fields, some round goes wrong."""
    monkeypatch.setattr(cuda_graphs, "KV_STEP", 16)
    check = partial(check_bucketed, partial(RandomPlans, 6), SAMPLINGS[0], tiny(), groups_of(60, random.Random(2)))
    check()
    monkeypatch.setattr("rollout.bucketed_shape", without(field))
    with pytest.raises((AssertionError, RuntimeError, IndexError, TypeError)):
        check()


def check_twice() -> None:
    """Drafting and verifying twice before the commit gives the responses of doing it once, although in between random
    numbers are written into free slots and beyond the ends of sequences.
    """
    model = tiny()
    groups = groups_of(14, random.Random(1))
    once = make_engine(model, trained_drafter(model), bucketed=True)
    twice = make_engine(model, trained_drafter(model), bucketed=True)

    def again(shape):
        Engine.draft_and_verify(twice, shape)
        noise = torch.Generator().manual_seed(0)
        n = len(twice.running)
        for cache, lens in ((twice.cache, twice.lens), (twice.proposers["eagle"].cache, twice.lens - 1)):
            for slot in range(twice.slots):
                end = int(lens[slot]) if slot < n else 0
                beyond = cache.data[:, :, slot, :, max(0, end) :]
                beyond.copy_(100 * torch.randn(beyond.shape, generator=noise))
        if n < twice.slots:
            twice.tokens[n:] = torch.randint(0, 118, twice.tokens[n:].shape, generator=noise)
            twice.hidden[n:] = 100 * torch.randn(twice.hidden[n:].shape, generator=noise)
            twice.lens[n:] = torch.randint(0, 80, twice.lens[n:].shape, generator=noise)
        return Engine.draft_and_verify(twice, shape)

    twice.draft_and_verify = again
    wanted = by_name(once.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(twice.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)


def test_free_slots_and_entries_beyond_the_ends_change_nothing(monkeypatch):
    check_twice()

    def leaky(*args):
        inputs = attention_inputs(*args)
        mask = torch.cat([inputs.mask[..., :1], inputs.mask[..., :-1]], -1)  # what sees an entry sees the next one
        return inputs._replace(mask=mask)

    monkeypatch.setattr("parts.engine.forward.attention_inputs", leaky)
    caught(check_twice)


def test_lengths_of_free_slots_stay(monkeypatch):
    """Free slots take part in rounds, but their lengths must not grow."""
    monkeypatch.setattr(cuda_graphs, "KV_STEP", 16)

    @torch.inference_mode()
    def check() -> None:
        engine = make_engine(tiny(), slots=16, bucketed=True)
        next(engine.generate(groups_of(5, random.Random(1)), SAMPLINGS[0], fixed("eagle", 2)))
        before = engine.lens.clone()
        shape = engine.plan_round(SAMPLINGS[0], Strategy())
        assert shape.batch_size > len(engine.running)
        engine.running_count.fill_(len(engine.running))
        engine.compute_round(shape)
        assert engine.lens[len(engine.running) :].equal(before[len(engine.running) :])

    check()

    def all_slots_run(self, shape):
        self.running_count.fill_(self.slots)
        return compute_round(self, shape)

    compute_round = Engine.compute_round
    monkeypatch.setattr(Engine, "compute_round", all_slots_run)
    caught(check)


# ---------------------------------------------------------------- tensors that move


def check_after_moves(engine: Engine, recorder: FakeRecorder, model) -> None:
    """Policy and drafter learn, the draft vocabulary changes, a longer context is reserved: no recording reads a tensor
    that has moved, and the tokens are those of a new engine.
    """
    drafter = engine.proposers["eagle"].drafter
    groups = groups_of(12, random.Random(3))
    torch.manual_seed(0)
    for draft_vocab, context in ((None, 60), (torch.arange(0, 118, 2).int(), 60), (torch.arange(0, 118, 3).int(), 90)):
        with torch.no_grad():
            for p in (*model.parameters(), *drafter.parameters()):
                p.add_(torch.randn_like(p) * 0.02)
        drafter.draft_vocab = draft_vocab
        engine.reserve(context)
        fresh = make_engine(model, drafter, context=context)
        wanted = by_name(fresh.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
        check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
        assert engine.stats.accepted == fresh.stats.accepted
    assert recorder.replays > 30


def test_recordings_are_dropped_when_a_tensor_moves(monkeypatch):
    model = tiny()
    check_after_moves(*recording_engine(model, make_drafter(model), context=50), model)
    monkeypatch.setattr(GraphPool, "clear", lambda self: None)
    caught(check_after_moves, *recording_engine(model, make_drafter(model), context=50), model)


def check_new_stop_tokens(engine: Engine, recorder: FakeRecorder) -> None:
    """Recorded rounds use the stop tokens that were set last."""
    groups = groups_of(12, random.Random(3))
    for stops in ({1}, {1, 2, 3, 4}, {5, -1, 1000}, set()):
        engine.set_stop_tokens(stops)
        exact = make_engine(tiny())
        exact.set_stop_tokens(stops)
        wanted = tokens_of(exact.generate(groups, SAMPLINGS[0]))
        assert tokens_of(engine.generate(groups, SAMPLINGS[0])) == wanted
    assert recorder.replays > 30


def test_recorded_rounds_use_new_stop_tokens(monkeypatch):
    check_new_stop_tokens(*recording_engine(tiny()))

    def at_another_address(self, tokens):
        set_stop_tokens(self, tokens)
        self.stop = self.stop.clone()

    set_stop_tokens = Engine.set_stop_tokens
    engine, recorder = recording_engine(tiny())
    monkeypatch.setattr(Engine, "set_stop_tokens", at_another_address)
    caught(check_new_stop_tokens, engine, recorder)


@torch.inference_mode()
def test_a_head_s_bias_keeps_its_address_in_the_proposer():
    model = tiny()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(118))
    proposer = make_engine(model).proposers["eagle"]
    assert proposer.load_weights()
    address = proposer.head.bias.data_ptr()
    model.lm_head.bias.mul_(2)
    assert not proposer.load_weights()
    assert proposer.head.bias.data_ptr() == address
    assert torch.allclose(proposer.head.bias, model.lm_head.bias * proposer.SHARPEN)


def test_refilled_buffers_keep_their_address_as_long_as_the_shape_stays():
    first, second = torch.randn(5, 3), torch.randn(5, 3)
    assert refilled(None, first) is first
    assert refilled(first, second) is first
    assert first.equal(second)
    larger = torch.randn(30, 3)
    assert refilled(first, larger) is larger
    assert refilled(first, None) is None


def check_joined_weights(read_weights) -> None:
    """Joined weights and biases follow those of the layers, at the address that they had."""
    rng = random.Random(0)
    for _ in range(30):
        layers = [torch.nn.Linear(3, rng.randint(1, 5), bias=rng.random() < 0.6) for _ in range(rng.randint(1, 4))]
        joined = JoinedLinear([(layer.weight, layer.bias) for layer in layers])
        x = torch.randn(2, 3)
        with torch.no_grad():
            buffers = [tensor.data_ptr() for tensor in (joined.weight, joined.bias) if tensor is not None]
            for p in (p for layer in layers for p in layer.parameters()):
                p.normal_()
            read_weights(joined)
            assert [t.data_ptr() for t in (joined.weight, joined.bias) if t is not None] == buffers
            assert torch.allclose(joined(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-6)


def check_packed_weights(read_weights, dtype: torch.dtype) -> None:
    """Packed layers give the modules' numbers at every number of rows, also after the weights have changed."""
    torch.manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for sizes, inputs, bias in (((40, 24), 32, True), ((8,), 48, False), ((64,), 16, True)):
        modules = [torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype) for outputs in sizes]
        packed = PackedLinear.of([(module.weight, module.bias) for module in modules])
        for rows in (1, 2, 3, 7, 160):
            with torch.no_grad():
                for module in modules:
                    module.weight.add_(0.1)
                read_weights(packed)
                x = torch.randn(2, rows, inputs, dtype=dtype)
                assert torch.allclose(packed(x), torch.cat([module(x) for module in modules], -1), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_modules_numbers(dtype):
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip("this CPU has no bfloat16 arithmetic")
    check_packed_weights(PackedLinear.read_weights, dtype)
    caught(check_packed_weights, lambda packed: None, dtype)


def test_small_matrices_are_joined_and_large_ones_packed():
    kinds = []
    for inputs in (16, 1024):
        module = torch.nn.Linear(inputs, 512)
        kinds.append(type(as_one_linear([(module.weight, module.bias)])))
    assert kinds == [JoinedLinear, PackedLinear]


def test_joined_weights_are_read_again_in_place():
    check_joined_weights(JoinedLinear.read_weights)

    def at_another_address(joined):
        joined.weight = torch.cat([weight.detach() for weight, _ in joined.parts])
        JoinedLinear.read_weights(joined)

    caught(check_joined_weights, lambda joined: None)
    caught(check_joined_weights, at_another_address)


def layers_of(model, share: bool) -> list[FusedLayer]:
    """Return the fused layers of a model, as `fuse` makes them on a GPU (share) or on a CPU."""
    return [FusedLayer(layer, model.config, share=share) for layer in model.model.layers]


def check_shared(model, share: bool) -> None:
    """The layers' own weights are parts of the joined ones, which follow a step of the optimizer without a copy."""
    layers = layers_of(model, share)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ids = torch.arange(2, 20)[None]
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    attention = model.model.layers[0].self_attn
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert layers[0].qkv.weight.equal(joined)
    assert layers[0].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shared_weights_need_no_second_copy(family):
    check_shared(tiny_of(family), True)
    caught(check_shared, tiny_of(family), False)


def test_a_model_with_shared_weights_is_saved_and_rolls_out_as_before(tmp_path):
    model = tiny()
    groups = groups_of(6, random.Random(1))
    wanted = by_name(make_engine(model, keep_hidden=True).generate(groups, SAMPLINGS[0]))
    engine = make_engine(model, keep_hidden=True)
    engine.fused_layers = layers_of(model, share=True)
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0])), wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="slots", dtype=torch.float32)
    for name, p in again.named_parameters():
        assert p.equal(model.get_parameter(name)), name


def test_one_weight_alone_is_not_copied():
    linear = torch.nn.Linear(4, 5)
    assert JoinedLinear([(linear.weight, linear.bias)]).weight.data_ptr() == linear.weight.data_ptr()


# ---------------------------------------------------------------- the number of recordings, and failures


@cases(200)
@given(st.integers(1, 256), st.integers(1, 40_000), st.integers(0, 400), st.integers(0, 12))
def test_a_bucketed_shape_holds_the_round(batch_size, kv_len, catch_up_len, k):
    shape = RoundShape(batch_size, kv_len, catch_up_len, DraftPlan("eagle", k), Sampling())
    slots, max_len = 256, kv_len + random.Random(catch_up_len).randrange(300)
    bucketed = bucketed_shape(shape, slots, max_len)
    assert batch_size <= bucketed.batch_size <= slots
    assert kv_len <= bucketed.kv_len <= max_len
    assert bucketed.kv_len <= max(kv_len + 128, 1.15 * kv_len)
    assert bucketed.catch_up_len >= catch_up_len
    assert (bucketed.catch_up_len > 0) == (catch_up_len > 0)
    assert bucketed_shape(bucketed, slots, max_len) == bucketed


def test_attention_takes_masks_of_every_kv_len_without_a_copy():
    """Their length is a multiple of 8."""
    for context in (50, 51, 130, 200):
        max_len = make_engine(tiny(), context=context).tokens.shape[1]
        for kv_len in range(1, max_len + 1):
            shape = RoundShape(1, kv_len, 0, DraftPlan(), Sampling())
            assert bucketed_shape(shape, 10, max_len).kv_len % 8 == 0


def check_warmup_is_reported() -> None:
    """The first round of a shape, and the one that is recorded, are reported as warm-up."""
    model = tiny()
    engine, recorder = recording_engine(model, trained_drafter(model))
    strategy = fixed("eagle", 4)
    reports = []
    strategy.observe = reports.append
    list(engine.generate(groups_of(14, random.Random(1)), SAMPLINGS[0], strategy))
    assert sum(report.warmup for report in reports) == len(engine.graphs.seen) + recorder.recordings
    assert recorder.replays > recorder.recordings > 0


def test_warmup_is_reported(monkeypatch):
    check_warmup_is_reported()
    right = GraphPool.run

    def not_reported(self, shape, eager):
        outcome = right(self, shape, eager)
        self.warmup = False
        return outcome

    monkeypatch.setattr(GraphPool, "run", not_reported)
    caught(check_warmup_is_reported)


def test_few_shapes_in_a_rollout():
    """256 responses of up to 200 tokens with goodput, in 64 slots. There are about as many shapes as the strategy tries
    draft lengths.
    """
    model = tiny()
    engine, recorder = recording_engine(model, trained_drafter(model), slots=64, context=240)
    engine.set_stop_tokens({1, 2, 3})
    groups = groups_of(16, random.Random(1), samples=1)
    for group in groups:
        group.seeds[:] = [sequence_seed(0, group.key, k) for k in range(16)]
    list(engine.generate(groups, Sampling(max_new=200), Goodput(plans_for(["eagle"]))))
    assert engine.stats.rounds > 40
    assert len(engine.graphs.replays) <= 40
    assert recorder.recordings <= 40


def recorded_shapes(limit: int, seed: int) -> int:
    """Return how many shapes a rollout of 64 responses of up to `limit` tokens records, when most are short and the
    draft length varies around one that depends on the batch size.
    """
    rng = random.Random(seed)
    left = [min(limit, int(limit * 0.1 * rng.paretovariate(1.2))) for _ in range(64)]
    done = [0] * len(left)
    seen = Counter()
    while left:
        k = {7: 0, 6: 0, 5: 2, 4: 3, 3: 4, 2: 6, 1: 8}[len(left).bit_length()]
        if rng.random() < 0.04:
            k = max(0, k + rng.choice([-1, 1]))
        catch_up_len = rng.randint(1, k + 1) if k else 0
        shape = RoundShape(len(left), 200 + max(done) + k + 1, catch_up_len, DraftPlan("eagle", k), Sampling())
        seen[bucketed_shape(shape, 64, limit + 300)] += 1
        done = [n + rng.randint(1, k + 1) for n in done]
        running = [(n, wanted) for n, wanted in zip(done, left) if n < wanted]
        done = [n for n, _ in running]
        left = [wanted for _, wanted in running]
    return sum(count > 1 for count in seen.values())


def check_all_recordings_are_kept(limit: int) -> None:
    """The next rollout replays what this one has recorded."""
    assert max(recorded_shapes(limit, seed) for seed in range(3)) <= cuda_graphs.MAX_GRAPHS


def test_the_shapes_of_long_contexts_fit_the_pool(monkeypatch):
    check_all_recordings_are_kept(16_384)
    check_all_recordings_are_kept(32_768)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 64)
    caught(check_all_recordings_are_kept, 16_384)


def test_the_least_recently_used_recording_is_dropped(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs = GraphPool(lambda shape: shape, lambda function: function)
    shapes = [RoundShape(1, kv_len, 0, DraftPlan(), Sampling()) for kv_len in (1, 2, 3)]
    for shape in (*shapes, shapes[0], shapes[1], shapes[0], shapes[2]):
        assert graphs.run(shape) == shape
    assert list(graphs.replays) == [shapes[0], shapes[2]]


def test_a_recording_that_fails_prints_one_line_and_changes_no_token(capsys):
    model = tiny()
    engine, _ = recording_engine(model, trained_drafter(model))

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be reported")

    engine.graphs = GraphPool(engine.compute_round, fails)
    groups = groups_of(10, random.Random(1))
    wanted = by_name(make_engine(model, trained_drafter(model)).generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "slower for it: operation not permitted" in lines[0]
