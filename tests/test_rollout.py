"""The engine against ordinary forwards, its independence of slots and batches, and its limits."""

import random

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import FAMILIES, by_name, groups_of, tiny_of, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, SmolLM3Config

import generate
import rollout
from drafter import Drafter
from parts.cli import UserError
from parts.engine import acceptance as accept
from parts.engine import kv_cache as modeling
from parts.engine.interfaces import Group
from parts.engine.kv_cache import KVCache
from parts.engine.model_loading import check_supported, load_model
from parts.engine.sampling import Sampling, sample, split_seeds
from rollout import Engine


def run_engine(model, groups, sampling, slots=10, context=100, stop=(1,), **settings) -> dict:
    responses = by_name(Engine(model, stop, slots, context, **settings).generate(groups, sampling))
    assert set(responses) == {(g.key, k) for g in groups for k in range(len(g.seeds))}
    return responses


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}


def check_angles(rope: str, moved: int = 0) -> None:
    """Angles that are looked up are bit for bit those that the module computes."""
    model = tiny(rope_parameters=ROPES[rope])
    cache = KVCache(model.config, 2, 100, torch.float32, "cpu")
    positions = torch.randint(0, 90, (2, 5))
    looked_up = cache.angles(model.model.rotary_emb, positions)
    computed = modeling.signed(model.model.rotary_emb(cache.never, positions + moved))
    assert (cache.table is None) == (rope == "dynamic")
    assert all(torch.equal(a, b) for a, b in zip(looked_up, computed))


@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_looked_up(rope):
    check_angles(rope)
    caught(check_angles, rope, moved=1)


def check_against_full_forward(model, groups, sampling, slots=10):
    """Every token and log-probability equals what one ordinary forward over the whole sequence gives: slots, refills
    and moves leave no trace.
    """
    seeds = {(g.key, k): seed for g in groups for k, seed in enumerate(g.seeds)}
    for name, r in run_engine(model, groups, sampling, slots, keep_hidden=True).items():
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).last_hidden_state
            logits = model.lm_head(hidden[:, len(r.prompt) - 1 :])
        words = split_seeds(torch.tensor([seeds[name]])).expand(len(r.tokens), 2)
        y, logp = sample(logits[0], sampling, words, torch.arange(len(r.tokens)))
        assert y.tolist() == r.tokens, name
        assert torch.allclose(logp, r.logprobs, atol=1e-4)
        assert torch.allclose(hidden[0], r.hidden, atol=1e-3)
        assert r.stopped == (r.tokens[-1] == 1)
        assert 1 not in r.tokens[:-1]
        assert r.stopped or len(r.tokens) == sampling.max_new


ORDINARY = [
    Sampling(max_new=40),
    Sampling(temperature=0.0, max_new=20),
    Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new=30),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", ORDINARY)
def test_engine_equals_full_forward(family, sampling):
    model = tiny_of(family)
    check_supported(model)
    check_against_full_forward(model, groups_of(9, random.Random(1)), sampling)


@cases(15)
@given(st.integers(0, 10**6), st.integers(4, 16), st.integers(1, 30))
def test_engine_equals_full_forward_on_random_shapes(seed, slots, max_new):
    check_against_full_forward(tiny(), groups_of(6, random.Random(seed)), Sampling(max_new=max_new), slots)


# ---------------------------------------------------------------- broken engines


def shift_positions(monkeypatch):
    right = rollout.forward

    def shifted(model, cache, rows, ids, lens, view, *rest):
        return right(model, cache, rows, ids, lens + 1, view + 1, *rest)

    monkeypatch.setattr(rollout, "forward", shifted)


def move_rows_without_their_cache(monkeypatch):
    right = KVCache.move

    def move(self, source, target, length):
        if target.stop - target.start > 1:
            right(self, source, target, length)

    monkeypatch.setattr(KVCache, "move", move)


def do_not_copy_the_prompt(monkeypatch):
    right = KVCache.move

    def move(self, source, target, length):
        if target.stop - target.start == 1:
            right(self, source, target, length)

    monkeypatch.setattr(KVCache, "move", move)


def see_what_is_hidden(monkeypatch):
    right = modeling.slot_attention

    def leaky(module, q, k, v, mask, **rest):
        return right(module, q, k, v, None if mask is None else torch.zeros_like(mask), **rest)

    # where the fused layers look it up, and where the modules do
    monkeypatch.setattr(modeling, "slot_attention", leaky)
    monkeypatch.setitem(AttentionInterface._global_mapping, "slots", leaky)


@pytest.mark.parametrize(
    "harm", [shift_positions, move_rows_without_their_cache, do_not_copy_the_prompt, see_what_is_hidden]
)
def test_broken_engines_are_caught(harm, monkeypatch):
    harm(monkeypatch)
    caught(check_against_full_forward, tiny(), groups_of(9, random.Random(1)), Sampling(max_new=40))


# ---------------------------------------------------------------- fused layers


@pytest.mark.parametrize(
    "family, fuses",
    [("llama", True), ("qwen2", True), ("mistral", True), ("qwen3", False), ("olmo2", False), ("phi3", False)],
)
def test_fused_layers_are_used_only_where_they_agree(family, fuses):
    model = tiny_of(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)  # trained values, not the initial ones and zeros
    assert (modeling.fuse_model(model) is not None) == fuses
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


def test_fused_layers_are_not_used_when_a_later_layer_is_of_another_kind():
    model = tiny(SmolLM3Config, num_hidden_layers=4)  # its fourth layer has no rotary positions
    assert modeling.fuse_model(model) is not None
    assert Engine(model, {1}, 2, 30).fused_layers is None
    check_supported(model)
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


# ---------------------------------------------------------------- independence


def check_batch_independence(model):
    groups = groups_of(8, random.Random(2), samples=3)
    alone = {}
    for group in groups:
        alone.update(tokens_of(run_engine(model, [group], Sampling(max_new=25), slots=3).values()))
    assert alone == tokens_of(run_engine(model, groups[::-1], Sampling(max_new=25), slots=24).values())


def test_tokens_do_not_depend_on_slot_batch_or_order(monkeypatch):
    check_batch_independence(tiny())
    right = accept.shared_noise

    def by_slot(sampling, seeds, index, vocab):
        return right(sampling, seeds * 0 + torch.arange(len(seeds))[:, None].int(), index, vocab)

    monkeypatch.setattr(accept, "shared_noise", by_slot)
    caught(check_batch_independence, tiny())


def test_greedy_equals_hugging_face_generate():
    model = tiny()
    prompt = [5, 9, 33]
    ours = run_engine(model, [Group(0, prompt, [1])], Sampling(temperature=0.0, max_new=30))[0, 0].tokens
    model.set_attn_implementation("sdpa")
    inputs = {"attention_mask": torch.ones(1, 3), "eos_token_id": 1, "pad_token_id": 0}
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, **inputs)
    assert theirs[0, 3:].tolist() == ours


# ---------------------------------------------------------------- refusals and limits


@pytest.mark.parametrize(
    "group, words",
    [
        (Group(3, [], [1]), "prompt 3 is empty"),
        (Group(3, [5] * 90, [1]), "exceeds the context"),
        (Group(3, [5], [1] * 9), "does not fit 4 slots"),
    ],
)
def test_limits_are_named(group, words):
    engine = Engine(tiny(), {1}, 4, 100)
    with pytest.raises(UserError, match=words):
        list(engine.generate([group], Sampling(max_new=20)))
    assert list(engine.generate([], Sampling())) == []


def test_a_context_beyond_the_model_is_named():
    with pytest.raises(UserError, match="context of 256"):
        Engine(tiny(), {1}, 4, 300)


def test_slots_are_those_that_memory_holds(monkeypatch, capsys):
    """On a machine with little memory: fewer slots, said once, the same tokens; with less than a sequence's worth, an
    error that names the sizes.
    """
    model = tiny()
    groups = groups_of(6, random.Random(0))

    def tokens() -> dict:
        return tokens_of(Engine(model, {1}, 30, 60).generate(groups, Sampling(max_new=20)))

    wanted = tokens()
    monkeypatch.setattr(rollout, "free_memory", lambda device: 1_700_000)
    slots = Engine(model, {1}, 30, 60).slots
    assert slots in range(8, 30)
    assert f"memory holds {slots} rows" in capsys.readouterr().err
    assert tokens() == wanted
    assert Engine(model, {1}, 30, 60, reserve_bytes=200_000).slots < slots
    monkeypatch.setattr(rollout, "free_memory", lambda device: 10_000)
    for reserved, mend in ((0, "are free.: lower --max-new"), (1000, "for the update.: lower --micro-tokens or")):
        with pytest.raises(UserError, match=mend):
            Engine(model, {1}, 30, 60, reserve_bytes=reserved)


# ---------------------------------------------------------------- command line


def lines_of(monkeypatch, capsys, *argv) -> list[str]:
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, argv)])
    generate.main()
    return capsys.readouterr().out.splitlines()


def test_the_command_line_streams_what_the_engine_makes(model_folder, tmp_path, capsys, monkeypatch):
    prompt = "3,7,8=29<think>"
    flags = ["--model", model_folder, "--prompt", prompt, "--samples", 3, "--max-new", 20]
    lines = lines_of(monkeypatch, capsys, *flags)
    assert len(lines) == len(set(lines)) == 3
    assert all(line.startswith(prompt) for line in lines)
    Drafter(load_model(str(model_folder))[0]).save(tmp_path / "drafter")
    assert lines_of(monkeypatch, capsys, *flags, "--drafter", tmp_path / "drafter", "--k", 3) == lines


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--samples", "0"], "--samples 0"),
        (["--samples", "-1"], "--samples -1"),
        (["--k", "0"], "--k 0"),
        (["--k", "99"], "--k 99"),
        (["--prompt", ""], "--prompt"),
        (["--temperature", "-1"], "--temperature -1"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, words, model_folder, monkeypatch, capsys):
    with pytest.raises(UserError, match=words):
        lines_of(monkeypatch, capsys, "--model", model_folder, "--prompt", "3,7,8=29<think>", *argv)
