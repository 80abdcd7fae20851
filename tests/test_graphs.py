"""Rounds in few shapes, and their recordings: the tokens stay the same, shapes hold all that a round depends on, and
recordings are dropped when a tensor that they read has moved.

There is no GPU here. `FakeRecorder` stands for CUDA graphs: to replay a round it calls the recorded function again
while the engine's list of running sequences is hidden, so a round fails that reads anything of the host beside its
shape; and it compares the addresses of all tensors with those at the recording.
"""

import random
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

from parts.engine import cuda_graphs
from parts.engine.acceptance import Tree
from parts.engine.cuda_graphs import GraphPool, RoundShape, bucketed_shape
from parts.engine.fused_layers import JoinedLinear, fuse
from parts.engine.interfaces import DraftPlan
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from strategy import Goodput, plans_for


def addresses(engine: Engine) -> list:
    """Where everything lies that a round of the engine reads or writes."""
    learned = engine.proposers["eagle"]
    tensors = [engine.lens, engine.start, engine.seeds, engine.tokens, engine.logprobs, engine.hidden, engine.stop]
    tensors += [engine.cache.data, engine.running_count, learned.cache.data]
    tensors += [learned.fc, learned.rows, learned.bias, learned.words]
    for layer in engine.fused_layers or ():
        tensors += [linear.weight for linear in layer.projections]
    if learned.fused_layer:
        tensors += [linear.weight for linear in learned.fused_layer.projections]
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class Tape:
    """In place of graphs.Recorder."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.count = 0
        self.plays = 0

    def __call__(self, function):
        self.count += 1
        where = addresses(self.engine)

        def play():
            assert addresses(self.engine) == where, "something has moved"
            self.plays += 1
            rows, self.engine.running = self.engine.running, None
            try:
                return function()
            finally:
                self.engine.running = rows

        return play


def taped(model, drafter=None, slots: int = 10, **settings) -> tuple[Engine, Tape]:
    """An engine whose rounds are recorded."""
    engine = make_engine(model, drafter, slots, bucketed=True, **settings)
    tape = Tape(engine)
    engine.graphs = GraphPool(engine.compute_round, tape)
    return engine, tape


STRATEGIES = {
    "plain": partial(fixed, "eagle", 0),
    "chain 1": partial(fixed, "eagle", 1),
    "chain 4": partial(fixed, "eagle", 4),
    "chain 12": partial(fixed, "eagle", 12),
    "ngram": partial(fixed, "ngram", 3),
    "changing": partial(Changing, 1),
}


def check_bucketed(strategy, sampling, model, groups=None, slots: int = 10, **settings) -> Tape:
    """Tokens, log-probabilities, features, and how far each guess was right, are those of rounds of exact size."""
    drafter = trained_drafter(model)
    groups = groups or groups_of(14, random.Random(1))
    exact = make_engine(model, drafter, slots, **settings)
    engine, tape = taped(model, drafter, slots, **settings)
    wanted = by_name(exact.generate(groups, sampling, strategy()))
    check_equal(by_name(engine.generate(groups, sampling, strategy())), wanted)
    assert engine.stats.accepted == exact.stats.accepted
    return tape


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounded_rounds_make_the_same_tokens(strategy, sampling, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "STEP", 16)  # so that views differ
    tape = check_bucketed(STRATEGIES[strategy], sampling, tiny())
    assert tape.plays > 10 or strategy in ("ngram", "changing")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_rounded_rounds(family):
    check_bucketed(partial(Changing, 2), SAMPLINGS[0], tiny_of(family))


def test_trees_in_rounded_rounds():
    check_bucketed(partial(fixed, "eagle", 3), SAMPLINGS[0], tiny(), rule=partial(Tree, width=2))


@cases(6)
@example(0, 8, 1, 0)  # prompts of one token: nothing has a true feature yet
@given(st.integers(0, 2**32), st.integers(1, 13), st.integers(1, 40), st.integers(0, 3))
def test_random_shapes_of_rounded_rounds(seed, slots, longest, step):
    rng = random.Random(seed)
    groups = groups_of(rng.randint(1, 20), rng, longest, min(4, slots))
    before = cuda_graphs.STEP
    cuda_graphs.STEP = (8, 16, 32, 128)[step]
    try:
        check_bucketed(partial(Changing, seed), SAMPLINGS[0], tiny(), groups, slots)
    finally:
        cuda_graphs.STEP = before


def test_columns_in_pieces_do_not_drop_rows_in_rounded_rounds(monkeypatch):
    """Who drops out depends on what is in tensors, which a recording cannot follow."""
    model = tiny()
    engine, tape = taped(model, trained_drafter(model))
    exact = make_engine(model, trained_drafter(model))
    engine.max_logits = exact.max_logits = 2 * 118
    groups = groups_of(10, random.Random(1))
    wanted = by_name(exact.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
    assert tape.plays > 10


# ---------------------------------------------------------------- what would break it


def without(field: str):
    """`rounded`, but of two shapes that differ in this field only, the first is taken for both."""
    first: dict[RoundShape, RoundShape] = {}

    def key(shape: RoundShape, slots: int, room: int) -> RoundShape:
        shape = bucketed_shape(shape, slots, room)
        return first.setdefault(shape._replace(**{field: None}), shape)

    return key


@pytest.mark.parametrize("field", ["rows", "view", "gap", "draft"])
def test_a_key_that_lacks_something_is_caught(field, monkeypatch):
    """Rows shrink, views grow, gaps follow the draft length: whatever is left out, some round is not as it should."""
    monkeypatch.setattr(cuda_graphs, "STEP", 16)
    check = partial(check_bucketed, partial(Changing, 3), SAMPLINGS[0], tiny(), groups_of(30, random.Random(2)))
    check()
    monkeypatch.setattr("rollout.rounded", without(field))
    with pytest.raises((AssertionError, RuntimeError, IndexError, TypeError)):
        check()


def check_twice() -> None:
    """Guesses and checks done twice, with what free slots and ends hold in between, then committed: as if done once."""
    model = tiny()
    groups = groups_of(14, random.Random(1))
    once = make_engine(model, trained_drafter(model), bucketed=True)
    twice = make_engine(model, trained_drafter(model), bucketed=True)

    def again(shape):
        Engine.draft_and_verify(twice, shape)
        noise = torch.Generator().manual_seed(0)
        n = len(twice.running)
        for cache, lens in ((twice.cache, twice.lens), (twice.proposers["eagle"].cache, twice.lens - 1)):
            for row in range(twice.slots):
                end = int(lens[row]) if row < n else 0
                beyond = cache.data[:, :, row, :, max(0, end) :]
                beyond.copy_(100 * torch.randn(beyond.shape, generator=noise))
        if n < twice.slots:
            twice.tokens[n:] = torch.randint(0, 118, twice.tokens[n:].shape, generator=noise)
            twice.hidden[n:] = 100 * torch.randn(twice.hidden[n:].shape, generator=noise)
            twice.lens[n:] = torch.randint(0, 80, twice.lens[n:].shape, generator=noise)
        return Engine.draft_and_verify(twice, shape)

    twice.draft_and_verify = again
    wanted = by_name(once.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(twice.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)


def test_what_stands_in_free_slots_and_beyond_ends_changes_nothing(monkeypatch):
    check_twice()
    right = modeling.attention_inputs

    def leaky(*args):
        positions, mask = right(*args)
        return positions, torch.cat([mask[..., :1], mask[..., :-1]], -1)  # who sees an entry sees the next

    monkeypatch.setattr(modeling, "attend", leaky)
    caught(check_twice)


def test_free_slots_stay_where_they_are(monkeypatch):
    """They take part in rounds, and their lengths must not grow with them."""
    monkeypatch.setattr(cuda_graphs, "STEP", 16)

    @torch.inference_mode()
    def check() -> None:
        engine = make_engine(tiny(), slots=16, bucketed=True)
        next(engine.generate(groups_of(5, random.Random(1)), SAMPLINGS[0], fixed("eagle", 2)))
        before = engine.lens.clone()
        shape = engine.shape_of(DraftPlan(), SAMPLINGS[0])
        assert shape.batch_size > len(engine.running)
        engine.running_count.fill_(len(engine.running))
        engine.compute_round(shape)
        assert engine.lens[len(engine.running) :].equal(before[len(engine.running) :])

    check()

    def everybody_lives(self, shape):
        self.running_count.fill_(self.slots)
        return compute(self, shape)

    compute = Engine.compute
    monkeypatch.setattr(Engine, "compute", everybody_lives)
    caught(check)


# ---------------------------------------------------------------- weights that move


def check_after_moves(engine: Engine, tape: Tape, model) -> None:
    """Policy and drafter learn, words are chosen anew, a longer context is reserved: recordings never play on what was
    there before, and the tokens are those of a new engine.
    """
    learned = engine.proposers["eagle"].drafter
    groups = groups_of(12, random.Random(3))
    torch.manual_seed(0)
    for words, context in ((None, 60), (torch.arange(0, 118, 2).int(), 60), (torch.arange(0, 118, 3).int(), 90)):
        with torch.no_grad():
            for p in (*model.parameters(), *learned.parameters()):
                p.add_(torch.randn_like(p) * 0.02)
        learned.words = words
        engine.reserve(context)
        fresh = make_engine(model, learned, context=context)
        wanted = by_name(fresh.generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
        check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
        assert engine.stats.accepted == fresh.stats.accepted
    assert tape.plays > 30


def test_recordings_end_when_something_moves(monkeypatch):
    model = tiny()
    check_after_moves(*taped(model, make_drafter(model), context=50), model)
    monkeypatch.setattr(GraphPool, "forget", lambda self: None)
    caught(check_after_moves, *taped(model, make_drafter(model), context=50), model)


def check_other_stops(engine: Engine, tape: Tape) -> None:
    """Recorded rounds end where they are told to end now."""
    groups = groups_of(12, random.Random(3))
    for stops in ({1}, {1, 2, 3, 4}, {5, -1, 1000}, set()):
        engine.set_stop_tokens(stops)
        exact = make_engine(tiny())
        exact.set_stop_tokens(stops)
        wanted = tokens_of(exact.generate(groups, SAMPLINGS[0]))
        assert tokens_of(engine.generate(groups, SAMPLINGS[0])) == wanted
    assert tape.plays > 30


def test_recorded_rounds_end_at_other_tokens_when_told_so(monkeypatch):
    check_other_stops(*taped(tiny()))

    def elsewhere(self, tokens):
        set_stop_tokens(self, tokens)
        self.stop = self.stop.clone()

    set_stop_tokens = Engine.set_stop_tokens
    engine, tape = taped(tiny())
    monkeypatch.setattr(Engine, "set_stop_tokens", elsewhere)
    caught(check_other_stops, engine, tape)


def test_a_drafter_of_a_head_with_bias_stays_where_it_is():
    model = tiny()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(118))
    learned = make_engine(model).proposers["eagle"]
    assert learned.begin()
    where = learned.head.bias.data_ptr()
    with torch.no_grad():
        model.lm_head.bias.mul_(2)
    assert not learned.begin()
    assert learned.head.bias.data_ptr() == where
    assert torch.allclose(learned.head.bias, model.lm_head.bias * learned.SHARPEN)


def test_what_is_filled_anew_stays_where_it_is():
    rng = random.Random(0)
    for _ in range(30):
        parts = [torch.randn(rng.randint(1, 5), 3) for _ in range(rng.randint(1, 4))]
        joined = refilled(None, *parts)
        newer = [torch.randn_like(part) for part in parts]
        again = refilled(joined, *newer)
        assert again is joined
        assert again.equal(torch.cat(newer))
        assert refilled(joined, torch.randn(30, 3)) is not joined


def check_lent(model, lend) -> None:
    """The layers' own weights are parts of the joined ones: an optimizer's step is seen at once, without a copy."""
    layers = fuse_model(model)
    for layer in layers:
        lend(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ids = torch.arange(2, 20)[None]
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    attention = model.model.layers[0].self_attn
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert layers[0].qkv.weight.equal(joined)
    assert layers[0].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lent_weights_need_no_second_copy(family):
    check_lent(tiny_of(family), lambda layer: layer.lend())
    caught(check_lent, tiny_of(family), lambda layer: None)


def test_a_lent_model_is_saved_and_rolls_out_as_before(tmp_path):
    model = tiny()
    groups = groups_of(6, random.Random(1))
    wanted = by_name(make_engine(model, keep_hidden=True).generate(groups, SAMPLINGS[0]))
    engine = make_engine(model, keep_hidden=True)
    for layer in engine.fused_layers:
        layer.lend()
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0])), wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="slots", dtype=torch.float32)
    for name, p in again.named_parameters():
        assert p.equal(model.get_parameter(name)), name


def test_one_weight_alone_is_not_copied():
    linear = torch.nn.Linear(4, 5)
    assert Linear([(linear.weight, linear.bias)]).weight.data_ptr() == linear.weight.data_ptr()


# ---------------------------------------------------------------- how many, and when it fails


@cases(200)
@given(st.integers(1, 256), st.integers(1, 40_000), st.integers(0, 400), st.integers(0, 12))
def test_a_rounded_shape_holds_the_round(rows, view, gap, k):
    shape = RoundShape(rows, view, gap, DraftPlan("eagle", k), Sampling())
    slots, room = 256, view + random.Random(gap).randrange(300)
    key = bucketed_shape(shape, slots, room)
    assert rows <= key.rows <= slots
    assert shape.kv_len <= key.view <= room
    assert key.view <= max(shape.kv_len + 128, 1.15 * shape.kv_len)
    assert key.gap >= gap
    assert (key.gap > 0) == (gap > 0)
    assert bucketed_shape(key, slots, room) == key


def test_views_are_of_lengths_that_attention_takes_without_a_copy():
    for context in (50, 51, 130, 200):
        room = make_engine(tiny(), context=context).tokens.shape[1]
        for view in range(1, room + 1):
            assert bucketed_shape(RoundShape(1, view, 0, DraftPlan(), Sampling()), 10, room).view % 8 == 0


def check_first_rounds_are_told() -> None:
    """A shape's first round, and the one that is recorded, are not what its rounds will take."""
    model = tiny()
    engine, tape = taped(model, trained_drafter(model))
    strategy = fixed("eagle", 4)
    reports = []
    strategy.observe = reports.append
    list(engine.generate(groups_of(14, random.Random(1)), SAMPLINGS[0], strategy))
    assert sum(report.warmup for report in reports) == len(engine.graphs.seen) + tape.count
    assert tape.plays > tape.count > 0


def test_first_rounds_are_told(monkeypatch):
    check_first_rounds_are_told()
    right = GraphPool.run

    def not_told(self, shape):
        out = right(self, shape)
        self.first = False
        return out

    monkeypatch.setattr(GraphPool, "run", not_told)
    caught(check_first_rounds_are_told)


def test_few_shapes_in_a_rollout():
    """256 responses of up to 200 tokens with goodput, in 64 slots; as many shapes as the strategy tries lengths."""
    model = tiny()
    engine, tape = taped(model, trained_drafter(model), slots=64, context=240)
    engine.set_stop_tokens({1, 2, 3})
    groups = groups_of(16, random.Random(1), samples=1)
    for group in groups:
        group.seeds[:] = [sequence_seed(0, group.key, k) for k in range(16)]
    list(engine.generate(groups, Sampling(max_new=200), Goodput(plans_for(["eagle"]))))
    assert engine.stats.rounds > 40
    assert len(engine.graphs.replays) <= 40
    assert tape.count <= 40


def test_the_recording_that_was_not_used_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    graphs = GraphPool(lambda shape: shape, lambda function: function)
    shapes = [RoundShape(1, view, 0, DraftPlan(), Sampling()) for view in (1, 2, 3)]
    for shape in (*shapes, shapes[0], shapes[1], shapes[0], shapes[2]):
        assert graphs.run(shape) == shape
    assert list(graphs.replays) == [shapes[0], shapes[2]]


def test_a_recording_that_fails_costs_a_line_and_no_token(capsys):
    model = tiny()
    engine, _ = taped(model, trained_drafter(model))

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be reported")

    engine.graphs = GraphPool(engine.compute_round, fails)
    groups = groups_of(10, random.Random(1))
    wanted = by_name(make_engine(model, trained_drafter(model)).generate(groups, SAMPLINGS[0], fixed("eagle", 4)))
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0], fixed("eagle", 4))), wanted)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "slower for it: operation not permitted" in lines[0]
