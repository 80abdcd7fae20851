"""The engine against ordinary forwards of the model, its independence of slots and batches, its limits, and
generate.py.
"""

import random
import re
from functools import partial

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import (
    FAMILIES,
    SAMPLINGS,
    RandomPlans,
    by_name,
    fixed,
    groups_of,
    make_engine,
    tiny_of,
    tokens_of,
    trained_drafter,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, SmolLM3Config

import generate
import rollout
from base.pretrain import make_tokenizer
from drafter import Drafter
from parts.cli import UserError, run
from parts.engine import acceptance, fused_layers, kv_cache
from parts.engine.acceptance import Ratio, Tree
from parts.engine.fused_layers import fuse_model
from parts.engine.interfaces import Group, RoundTrace, Strategy
from parts.engine.kv_cache import KVCache
from parts.engine.model_loading import check_supported, load_model
from parts.engine.sampling import Sampling, sample, split_seeds
from rollout import Engine


def run_engine(model, groups, sampling, slots=10, context=100, stop=(1,), **settings) -> dict:
    """Return (group, sample) -> response, one for every seed of every group."""
    responses = by_name(Engine(model, stop, slots, context, **settings).generate(groups, sampling))
    assert set(responses) == {(g.key, k) for g in groups for k in range(len(g.seeds))}
    return responses


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}


def check_angles(rope: str, shift: int = 0) -> None:
    """Angles that are looked up equal bit for bit those that the module computes. shift: of the module's positions."""
    model = tiny(rope_parameters=ROPES[rope])
    cache = KVCache(model.config, 2, 100, torch.float32, "cpu")
    positions = torch.randint(0, 90, (2, 5))
    looked_up = cache.angles(model.model.rotary_emb, positions)
    computed = kv_cache.signed_angles(model.model.rotary_emb(cache.zero, positions + shift))
    assert (cache.table is None) == (rope == "dynamic")
    assert all(torch.equal(a, b) for a, b in zip(looked_up, computed))


@pytest.mark.parametrize("rope", ROPES)
def test_angles_in_the_table_equal_computed_ones(rope):
    check_angles(rope)
    caught(check_angles, rope, shift=1)


def check_against_full_forward(model, groups, sampling, slots=10):
    """Every token and log-probability equals what one ordinary forward over the whole sequence gives, whatever slots,
    refills and moves the sequence has seen.
    """
    seeds = {(g.key, k): seed for g in groups for k, seed in enumerate(g.seeds)}
    for name, r in run_engine(model, groups, sampling, slots, keep_hidden=True).items():
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).last_hidden_state
            logits = model.lm_head(hidden[:, len(r.prompt) - 1 :])
        split = split_seeds(torch.tensor([seeds[name]])).expand(len(r.tokens), 2)
        y, logp = sample(logits[0], sampling, split, torch.arange(len(r.tokens)))
        assert y.tolist() == r.tokens, name
        assert torch.allclose(logp, r.logprobs, atol=1e-4)
        assert torch.allclose(hidden[0], r.hidden, atol=1e-3)
        assert r.stopped == (r.tokens[-1] == 1)
        assert 1 not in r.tokens[:-1]
        assert r.stopped or len(r.tokens) == sampling.max_new


LONGER_SAMPLINGS = [
    Sampling(max_new=40),
    Sampling(temperature=0.0, max_new=20),
    Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new=30),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", LONGER_SAMPLINGS)
def test_engine_equals_full_forward(family, sampling):
    model = tiny_of(family)
    check_supported(model)
    check_against_full_forward(model, groups_of(9, random.Random(1)), sampling)


@cases(15)
@given(st.integers(0, 10**6), st.integers(4, 16), st.integers(1, 30), st.integers(1, 80))
def test_engine_equals_full_forward_on_random_shapes(seed, slots, max_new, prefill_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "PREFILL_TOKENS", prefill_tokens)
        check_against_full_forward(tiny(), groups_of(6, random.Random(seed)), Sampling(max_new=max_new), slots)


def check_prefill_parts(lengths, tokens):
    """Each prompt once, in the order of length, and no part above the limit that could be divided."""
    parts = rollout.prefill_parts([Group(i, [2] * length, [i]) for i, length in enumerate(lengths)], tokens)
    found = [len(group.prompt) for part in parts for group in part]
    assert found == sorted(lengths) and len({group.key for part in parts for group in part}) == len(lengths)
    for part in parts:
        assert len(part) == 1 or len(part) * len(part[-1].prompt) <= tokens
    for part, following in zip(parts, parts[1:]):
        assert (len(part) + 1) * len(following[0].prompt) > tokens


@cases(100)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 300))
def test_prompts_of_similar_length_are_prefilled_together(lengths, tokens):
    check_prefill_parts(lengths, tokens)


def test_prefilling_all_prompts_at_once_is_caught(monkeypatch):
    monkeypatch.setattr(rollout, "prefill_parts", lambda batch, tokens: [batch])
    caught(check_prefill_parts, [5, 40, 5, 40], 50)


# ---------------------------------------------------------------- broken engines


def shift_positions(monkeypatch):
    right = rollout.forward

    def shifted(model, cache, slots, ids, lens, kv_len, *rest):
        return right(model, cache, slots, ids, lens + 1, kv_len + 1, *rest)

    monkeypatch.setattr(rollout, "forward", shifted)


def move_sequences_without_their_cache(monkeypatch):
    right = KVCache.copy

    def copy(self, source, targets, length):
        if targets.stop - targets.start > 1:
            right(self, source, targets, length)

    monkeypatch.setattr(KVCache, "copy", copy)


def do_not_copy_the_prompt(monkeypatch):
    right = KVCache.copy

    def copy(self, source, targets, length):
        if targets.stop - targets.start == 1:
            right(self, source, targets, length)

    monkeypatch.setattr(KVCache, "copy", copy)


def attend_to_masked_entries(monkeypatch):
    right = kv_cache.slot_attention

    def leaky(module, q, k, v, mask, **rest):
        return right(module, q, k, v, None if mask is None else torch.zeros_like(mask), **rest)

    # where the fused layers look it up, and where the modules do
    monkeypatch.setattr(fused_layers, "slot_attention", leaky)
    monkeypatch.setitem(AttentionInterface._global_mapping, "slots", leaky)


@pytest.mark.parametrize(
    "harm", [shift_positions, move_sequences_without_their_cache, do_not_copy_the_prompt, attend_to_masked_entries]
)
def test_broken_engines_are_caught(harm, monkeypatch):
    harm(monkeypatch)
    caught(check_against_full_forward, tiny(), groups_of(9, random.Random(1)), Sampling(max_new=40))


# ---------------------------------------------------------------- fused layers


@pytest.mark.parametrize(
    "family, fuses",
    [("llama", True), ("qwen2", True), ("mistral", True), ("qwen3", False), ("olmo2", False), ("phi3", False)],
)
def test_fused_layers_are_used_only_where_they_compute_the_same(family, fuses):
    model = tiny_of(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)  # as after training, not ones and zeros
    assert (fuse_model(model) is not None) == fuses
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


def test_fused_layers_are_not_used_when_a_later_layer_is_of_another_kind():
    model = tiny(SmolLM3Config, num_hidden_layers=4)  # its fourth layer has no rotary positions
    assert fuse_model(model) is not None
    assert Engine(model, {1}, 2, 30).fused_layers is None
    check_supported(model)
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


# ---------------------------------------------------------------- independence


def check_batch_independence(model):
    """Groups that run alone, in 3 slots, have the tokens of groups that run together, in another order, in 24 slots."""
    groups = groups_of(8, random.Random(2), samples=3)
    alone = {}
    for group in groups:
        alone.update(tokens_of(run_engine(model, [group], Sampling(max_new=25), slots=3).values()))
    assert alone == tokens_of(run_engine(model, groups[::-1], Sampling(max_new=25), slots=24).values())


def test_tokens_do_not_depend_on_slot_batch_or_order(monkeypatch):
    check_batch_independence(tiny())
    right = acceptance.shared_noise

    def noise_by_slot(sampling, seeds, index, vocab):
        return right(sampling, seeds * 0 + torch.arange(len(seeds))[:, None].int(), index, vocab)

    monkeypatch.setattr(acceptance, "shared_noise", noise_by_slot)
    caught(check_batch_independence, tiny())


def test_greedy_equals_hugging_face_generate():
    model = tiny()
    prompt = [5, 9, 33]
    ours = run_engine(model, [Group(0, prompt, [1])], Sampling(temperature=0.0, max_new=30))[0, 0].tokens
    model.set_attn_implementation("sdpa")
    inputs = {"attention_mask": torch.ones(1, 3), "eos_token_id": 1, "pad_token_id": 0}
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, **inputs)
    assert theirs[0, 3:].tolist() == ours


# ---------------------------------------------------------------- what on_round is called with


def check_traces(strategy: Strategy, rule=acceptance.Coupled, sampling: Sampling = SAMPLINGS[0]) -> int:
    """The rounds of a sequence give its response; what was emitted begins with the accepted draft tokens, and ends with
    a token that the policy sampled itself. Return the number of tokens beyond one per round.
    """
    model = tiny()
    engine = make_engine(model, trained_drafter(model), rule=rule)
    traces: dict[tuple, list[RoundTrace]] = {}

    def on_round(trace: RoundTrace) -> None:
        sequence = trace.sequence
        assert sequence.tokens[-len(trace.emitted) :] == trace.emitted
        traces.setdefault((sequence.group.key, sequence.sample), []).append(trace)

    responses = by_name(engine.generate(groups_of(12, random.Random(1)), sampling, strategy, on_round))
    assert traces.keys() == responses.keys()
    beyond_one = 0
    for name, r in responses.items():
        rounds = traces[name]
        assert len(rounds) == r.rounds
        assert [token for trace in rounds for token in trace.emitted] == r.tokens
        for trace in rounds:
            n = len(trace.emitted) - 1
            beyond_one += n
            if not trace.drafts:  # a plain round, or a tree
                assert n == 0 or rule is not acceptance.Coupled
                continue
            assert n <= len(trace.drafts)
            assert trace.drafts[:n] == trace.emitted[:n]
            # the last round may end inside the accepted tokens
            rejected = n < len(trace.drafts) and trace is not rounds[-1]
            assert not rejected or trace.drafts[n] != trace.emitted[n]
        if rule is acceptance.Coupled:
            assert sum(len(trace.drafts) for trace in rounds) == r.draft_tokens
    assert beyond_one == engine.stats.tokens - sum(r.rounds for r in responses.values())
    return beyond_one


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("strategy", [partial(fixed, "eagle", 4), partial(fixed, "ngram", 3), partial(RandomPlans, 1)])
def test_traces_of_rounds_give_the_responses(strategy, sampling):
    assert check_traces(strategy(), sampling=sampling) > 0


def test_traces_of_plain_rounds_and_of_trees_have_no_draft_tokens():
    assert check_traces(fixed("eagle", 0)) == 0
    assert check_traces(fixed("eagle", 4), partial(Tree, width=2)) > 0
    assert check_traces(fixed("eagle", 4), Ratio) > 0


def another_sequence_s_drafts(accepted, new_tokens, drafts):
    return accepted, new_tokens, drafts[::-1]


def drafts_shifted_by_one(accepted, new_tokens, drafts):
    return accepted, new_tokens, [tokens[1:] + tokens[:1] for tokens in drafts]


@pytest.mark.parametrize("change", [another_sequence_s_drafts, drafts_shifted_by_one])
def test_wrong_draft_tokens_in_traces_are_caught(change, monkeypatch):
    right = Engine.read_back
    monkeypatch.setattr(Engine, "read_back", lambda self, *args: change(*right(self, *args)))
    caught(check_traces, fixed("eagle", 4))


def own_token_left_out(sequence, drafts, emitted):
    return RoundTrace(sequence, drafts, emitted[:-1])


def accepted_tokens_left_out(sequence, drafts, emitted):
    return RoundTrace(sequence, drafts, emitted[-1:])


@pytest.mark.parametrize("change", [own_token_left_out, accepted_tokens_left_out])
def test_wrong_tokens_in_traces_are_caught(change, monkeypatch):
    monkeypatch.setattr(rollout, "RoundTrace", change)
    caught(check_traces, fixed("eagle", 4))


# ---------------------------------------------------------------- refusals and limits


@pytest.mark.parametrize(
    "group, message",
    [
        (Group(3, [], [1]), "prompt 3 is empty"),
        (Group(3, [5] * 90, [1]), "exceeds the context"),
        (Group(3, [5], [1] * 9), "does not fit 4 slots"),
    ],
)
def test_groups_beyond_the_limits_are_refused(group, message):
    engine = Engine(tiny(), {1}, 4, 100)
    with pytest.raises(UserError, match=message):
        list(engine.generate([group], Sampling(max_new=20)))
    assert list(engine.generate([], Sampling())) == []


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(UserError, match="context of 256"):
        Engine(tiny(), {1}, 4, 300)


def test_there_are_as_many_slots_as_the_memory_holds(monkeypatch, capsys):
    """Little memory: fewer slots, one line that says so, the same tokens. Less than a sequence needs: an error with the
    sizes.
    """
    model = tiny()
    groups = groups_of(6, random.Random(0))

    def tokens() -> dict:
        return tokens_of(Engine(model, {1}, 30, 60).generate(groups, Sampling(max_new=20)))

    wanted = tokens()
    monkeypatch.setattr(rollout, "free_memory", lambda device: 1_700_000)
    slots = Engine(model, {1}, 30, 60).slots
    assert slots in range(8, 30)
    assert f"memory holds {slots} sequences" in capsys.readouterr().err
    assert tokens() == wanted
    assert Engine(model, {1}, 30, 60, reserve_bytes=200_000).slots < slots
    monkeypatch.setattr(rollout, "free_memory", lambda device: 10_000)
    for reserved, advice in ((0, "are free.: lower --max-new"), (1000, "for the update.: lower --micro-tokens or")):
        with pytest.raises(UserError, match=advice):
            Engine(model, {1}, 30, 60, reserve_bytes=reserved)


# ---------------------------------------------------------------- command line

PROMPT = "3,7,8=29<think>"


def output_of(monkeypatch, capsys, *argv) -> str:
    """Return what generate.py prints with these flags."""
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, argv)])
    generate.main()
    return capsys.readouterr().out


def test_generate_prints_the_responses_and_a_drafter_does_not_change_them(model_folder, tmp_path, capsys, monkeypatch):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--samples", 3, "--max-new", 20]
    lines = output_of(monkeypatch, capsys, *flags).splitlines()
    assert len(lines) == len(set(lines)) == 3
    assert all(line.startswith(PROMPT) for line in lines)
    Drafter(load_model(str(model_folder))[0]).save(tmp_path / "drafter")
    drafted = output_of(monkeypatch, capsys, *flags, "--drafter", tmp_path / "drafter", "--k", 3)
    assert drafted.splitlines() == lines


@pytest.fixture
def drafter_folders(tmp_path):
    """The folders of a tiny Llama and of its drafter, which has learned a little."""
    model = tiny_of("llama")
    trained_drafter(model).save(tmp_path / "drafter")
    model.save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy", tmp_path / "drafter"


def without_marks(shown: str) -> str:
    """Return the text with the rejected draft tokens and all marks left out, and without the stop token's text."""
    accepted_and_own = re.sub(r"\{[^{}]*\}", "", shown)
    return re.sub(r"[\[\]]|<eos>|<pad>", "", accepted_and_own)


def check_show(policy, drafter, monkeypatch, capsys) -> None:
    """--show prints the rounds between marks, without colours; the text is that of plain generate.py. Its table counts
    the rounds.
    """
    seen = set()
    for seed in range(5):
        flags = ["--model", policy, "--prompt", PROMPT, "--max-new", 40, "--seed", seed]
        (plain,) = output_of(monkeypatch, capsys, *flags).splitlines()
        shown, *table = output_of(monkeypatch, capsys, *flags, "--drafter", drafter, "--k", 4, "--show").splitlines()
        assert "\x1b" not in shown
        assert without_marks(shown) == plain
        seen |= set(shown) & set("[]{}")
        # every round ends with a token of the policy's own, so no two accepted parts touch; rejected parts end rounds
        assert "][" not in shown
        assert "}{" not in shown
        assert table[0].split() == ["tokens", "in", "a", "round", "rounds"]
        counts = [line.split()[:2] for line in table[1:-1]]
        tokens = sum(int(size) * int(rounds) for size, rounds in counts)
        rounds = sum(int(rounds) for _, rounds in counts)
        assert table[-1] == f"{tokens} tokens in {rounds} rounds: {tokens / rounds:.2f} tokens per round"
        assert rounds < tokens
    assert seen == set("[]{}")


def test_show_marks_accepted_and_rejected_draft_tokens(drafter_folders, monkeypatch, capsys):
    check_show(*drafter_folders, monkeypatch, capsys)
    right = generate.RoundMarks.marked

    def rejected_as_accepted(self, kind, before, tokens):
        return right(self, "accepted" if kind == "rejected" else kind, before, tokens)

    def own_left_out(self, kind, before, tokens):
        return right(self, kind, before, [] if kind == "own" else tokens)

    for wrong in (rejected_as_accepted, own_left_out):
        with monkeypatch.context() as patch:
            patch.setattr(generate.RoundMarks, "marked", wrong)
            caught(check_show, *drafter_folders, monkeypatch, capsys)


def test_show_uses_colours_in_a_terminal_that_has_them(drafter_folders, monkeypatch, capsys):
    policy, drafter = drafter_folders
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    flags = ["--model", policy, "--prompt", PROMPT, "--max-new", 40, "--drafter", drafter, "--k", 4, "--show"]
    coloured = output_of(monkeypatch, capsys, *flags).splitlines()[0]
    assert "\x1b[32m" in coloured
    assert "\x1b[9;31m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    marked = output_of(monkeypatch, capsys, *flags).splitlines()[0]
    for kind, (before, after) in generate.COLOURS.items():
        pattern = re.escape(before) + "([^\x1b]*)" + re.escape(after)
        open_mark, close_mark = generate.PLAIN_MARKS[kind]
        coloured = re.sub(pattern, lambda match, a=open_mark, b=close_mark: a + match[1] + b, coloured)
    assert coloured == marked


def test_show_without_a_drafter_is_refused_in_one_line(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", str(model_folder), "--prompt", PROMPT, "--show"])
    with pytest.raises(SystemExit) as end:
        run(generate.main)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("generate.py: --show ")
    assert "--drafter" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--samples", "0"], "--samples 0"),
        (["--samples", "-1"], "--samples -1"),
        (["--k", "0"], "--k 0"),
        (["--k", "99"], "--k 99"),
        (["--prompt", ""], "--prompt"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--show"], "--show"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(argv, message, model_folder, monkeypatch, capsys):
    with pytest.raises(UserError, match=message):
        output_of(monkeypatch, capsys, "--model", model_folder, "--prompt", PROMPT, *argv)
