import random

import pytest
import torch
from conftest import cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import (AttentionInterface, AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, MistralConfig, Olmo2Config, Phi3Config, Qwen2Config,
                          Qwen3Config, Qwen3NextConfig, SmolLM3Config)

import rollout
from rollout import Engine, Group, Sampling, check_supported, gumbel, noise_for, sample, sequence_seed
from tasks import UserError

FAMILIES = {"llama": (LlamaConfig, {}), "qwen2": (Qwen2Config, {}), "qwen3": (Qwen3Config, {"head_dim": 16}), "mistral": (MistralConfig, {"sliding_window": None}),
            "phi3": (Phi3Config, {}), "olmo2": (Olmo2Config, {})}


def groups_of(n, rng, longest=20, samples=4):
    return [Group(i, [rng.randrange(2, 118) for _ in range(rng.randint(1, longest))], [sequence_seed(0, i, k) for k in range(rng.randint(1, samples))])
            for i in range(n)]


def seed_tensor(seeds):
    seeds = torch.tensor(seeds)
    return torch.stack([seeds, seeds >> 32], 1).int()


def run_engine(model, groups, sampling, slots=10, context=100, stop=(1,), **kwargs):
    found = {(r.group, r.sample): r for r in Engine(model, stop, slots, context, **kwargs).generate(groups, sampling)}
    assert set(found) == {(g.index, k) for g in groups for k in range(len(g.seeds))}
    return found


def check_against_full_forward(model, groups, sampling, slots=10):
    """Every token and log-probability equals what one ordinary forward over the whole sequence gives: slots, refills and moves leave no trace."""
    for (g, k), r in run_engine(model, groups, sampling, slots, keep_hidden=True).items():
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).last_hidden_state
            logits = model.lm_head(hidden[:, len(r.prompt) - 1:])
        seeds = seed_tensor([next(x for x in groups if x.index == g).seeds[k]])
        y, logp = sample(logits, sampling, noise_for(sampling, seeds, torch.arange(len(r.tokens))[None], 118))
        assert y[0].tolist() == r.tokens, (g, k)
        assert torch.allclose(logp[0], r.logprobs, atol=1e-4) and torch.allclose(hidden[0], r.hidden, atol=1e-3)
        assert r.stopped == (r.tokens[-1] == 1) and 1 not in r.tokens[:-1] and (r.stopped or len(r.tokens) == sampling.max_new)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [Sampling(max_new=40), Sampling(temperature=0, max_new=20), Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new=30)])
def test_engine_equals_full_forward(family, sampling):
    model = tiny(FAMILIES[family][0], **FAMILIES[family][1])
    check_supported(model)
    check_against_full_forward(model, groups_of(9, random.Random(1)), sampling)


@cases(15)
@given(st.integers(0, 10**6), st.integers(4, 16), st.integers(1, 30))
def test_engine_equals_full_forward_on_random_shapes(seed, slots, max_new):
    check_against_full_forward(tiny(), groups_of(6, random.Random(seed)), Sampling(max_new=max_new), slots)


@pytest.mark.parametrize("broken", ["positions off by one", "rows moved without their cache", "mask sees one entry too many", "prompt not copied"])
def test_broken_engines_are_caught(broken, monkeypatch):
    if broken == "positions off by one":
        whole = rollout.forward
        monkeypatch.setattr(rollout, "forward", lambda m, c, r, ids, lens, view, *rest, **kw: whole(m, c, r, ids, lens + 1, view + 1, *rest, **kw))
    elif broken == "rows moved without their cache":
        move = rollout.SlotCache.move
        monkeypatch.setattr(rollout.SlotCache, "move", lambda self, a, b, n: move(self, a, b, n) if b.stop - b.start > 1 else None)
    elif broken == "prompt not copied":
        move = rollout.SlotCache.move
        monkeypatch.setattr(rollout.SlotCache, "move", lambda self, a, b, n: move(self, a, b, n) if b.stop - b.start == 1 else None)
    else:
        attention = rollout.slot_attention

        def leaky(module, q, k, v, mask, **kw):
            return attention(module, q, k, v, None if mask is None else torch.zeros_like(mask), **kw)
        monkeypatch.setattr(rollout, "slot_attention", leaky)  # where the fused layers look it up, and where the modules do
        monkeypatch.setitem(AttentionInterface._global_mapping, "slots", leaky)
    caught(check_against_full_forward, tiny(), groups_of(9, random.Random(1)), Sampling(max_new=40))


@pytest.mark.parametrize("family, kind", [("llama", True), ("qwen2", True), ("mistral", True), ("qwen3", False), ("olmo2", False), ("phi3", False)])
def test_fused_layers_are_used_only_where_they_agree(family, kind):
    model = tiny(FAMILIES[family][0], **FAMILIES[family][1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(torch.randn_like(p) * 0.3)  # trained values, not the initial ones and zeros
    assert (rollout.fuse_model(model) is not None) == kind
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


def test_fused_layers_are_not_used_when_a_later_layer_is_of_another_kind():
    model = tiny(SmolLM3Config, num_hidden_layers=4)  # its fourth layer has no rotary positions
    assert rollout.fuse_model(model) is not None and not Engine(model, {1}, 2, 30).fusable
    check_supported(model)
    check_against_full_forward(model, groups_of(5, random.Random(1)), Sampling(max_new=20))


def check_batch_independence(model):
    groups = groups_of(8, random.Random(2), samples=3)
    alone = {key: r.tokens for g in groups for key, r in run_engine(model, [g], Sampling(max_new=25), slots=3).items()}
    together = {key: r.tokens for key, r in run_engine(model, groups[::-1], Sampling(max_new=25), slots=24).items()}
    assert alone == together


def test_tokens_do_not_depend_on_slot_batch_or_order(monkeypatch):
    check_batch_independence(tiny())
    by_sequence = rollout.gumbel
    monkeypatch.setattr(rollout, "gumbel", lambda seeds, index, vocab: by_sequence(seeds * 0 + torch.arange(len(seeds))[:, None].int(), index, vocab))
    caught(check_batch_independence, tiny())  # noise keyed by slot


def test_greedy_equals_hugging_face_generate():
    model, prompt = tiny(), [5, 9, 33]
    mine = run_engine(model, [Group(0, prompt, [1])], Sampling(temperature=0, max_new=30))[0, 0].tokens
    model.set_attn_implementation("sdpa")
    theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3), do_sample=False, max_new_tokens=30, eos_token_id=1, pad_token_id=0)
    assert theirs[0, 3:].tolist() == mine


def check_distribution(temperature_of_truth=1.0, index_of=lambda i: i):
    """20,000 samples of 6 tokens against softmax; and tokens of one sequence are independent of each other."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    seeds = seed_tensor([sequence_seed("chi", i) for i in range(10_000)])
    y, _ = sample(logits.expand(10_000, 2, 6), Sampling(), noise_for(Sampling(), seeds, index_of(torch.arange(2)).expand(10_000, 2), 6))
    p = (logits / temperature_of_truth).softmax(-1).double()
    for column in y.T:
        counts = torch.bincount(column, minlength=6)
        assert ((counts - 10_000 * p) ** 2 / (10_000 * p)).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001
    joint = torch.bincount(y[:, 0] * 6 + y[:, 1], minlength=36)
    expected = 10_000 * (p[:, None] * p).flatten()
    assert ((joint - expected) ** 2 / expected).sum() < 66.6  # 35 degrees of freedom, p = 0.001


def test_samples_follow_the_softmax_and_broken_noise_is_caught(monkeypatch):
    check_distribution()
    caught(check_distribution, temperature_of_truth=0.9)
    caught(check_distribution, index_of=lambda i: i * 0)  # the same noise at each position


def test_noise_is_a_function_of_its_key_alone():
    seeds = seed_tensor([sequence_seed("a", i) for i in range(50)])
    g = gumbel(seeds, torch.arange(20).expand(50, 20), 300)
    assert torch.equal(g[7:9, 3:4], gumbel(seeds[7:9], torch.full((2, 1), 3), 300))
    assert torch.isfinite(g).all() and len(g.unique()) > 0.99 * g.numel()
    assert abs(g.mean() - 0.5772) < 0.01 and abs(g.var() - 1.6449) < 0.02  # Gumbel: Euler's constant, pi^2 / 6
    flat = g.flatten(0, 1).double()
    assert abs(torch.corrcoef(flat[:100]).triu(1)).max() < 0.35  # 300 values each: 6 sigma


def test_top_k_top_p_and_temperature_narrow_what_is_drawn():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(2000, 1, 4)
    seeds = seed_tensor([sequence_seed(i) for i in range(2000)])
    drawn = lambda **kw: set(sample(logits, Sampling(**kw), noise_for(Sampling(**kw), seeds, torch.zeros(2000, 1).long(), 4))[0].flatten().tolist())
    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {0, 1} and drawn(top_p=0.65) == {0, 1} and drawn(top_p=0.6) == {0}
    assert drawn(top_p=1e-6) == {0} == drawn(temperature=0) == drawn(top_k=1)
    y, logp = sample(logits[:1], Sampling(temperature=0.5), torch.zeros(()))
    assert torch.isclose(logp[0, 0], (logits[0, 0] / 0.5).log_softmax(-1)[y[0, 0]])
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(max_new=0)):
        with pytest.raises(UserError):
            Sampling(**bad)


@pytest.mark.parametrize("config", [MistralConfig(sliding_window=64), Gemma2Config(), Qwen3NextConfig(), CohereConfig()])
def test_unsupported_models_are_refused(config):
    for name, value in dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48).items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.pad_token_id = 0
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="slots").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    with pytest.raises(UserError, match="plain attention|cannot run|differ"):
        check_supported(model)


def test_limits_are_named():
    model = tiny()
    with pytest.raises(UserError, match="context of 256"):
        Engine(model, {1}, 4, 300)
    for group, words in ((Group(3, [], [1]), "prompt 3 is empty"), (Group(3, [5] * 90, [1]), "exceeds the context"), (Group(3, [5], [1] * 9), "does not fit 4 slots")):
        with pytest.raises(UserError, match=words):
            list(Engine(model, {1}, 4, 100).generate([group], Sampling(max_new=20)))
    assert list(Engine(model, {1}, 4, 100).generate([], Sampling())) == []


def test_command_line_streams_what_the_engine_makes(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rollout.py", "--model", str(model_folder), "--prompt", "3,7,8=29<think>", "--samples", "3", "--max-new", "20"])
    rollout.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("3,7,8=29<think>") for line in lines) and len(set(lines)) == 3
    from drafter import Drafter
    Drafter(rollout.load_model(str(model_folder))[0]).save(tmp_path / "drafter")
    monkeypatch.setattr("sys.argv", ["rollout.py", "--model", str(model_folder), "--prompt", "3,7,8=29<think>", "--samples", "3", "--max-new", "20",
                                     "--drafter", str(tmp_path / "drafter"), "--k", "3"])
    rollout.main()
    assert capsys.readouterr().out.splitlines() == lines


def test_slots_are_those_that_memory_holds(monkeypatch, capsys):
    """On a machine with little memory: fewer slots, said once, the same tokens; with less than a sequence's worth, an error that names the sizes."""
    model, groups = tiny(), groups_of(6, random.Random(0))
    tokens = lambda slots: {(r.group, r.sample): r.tokens for r in Engine(model, {1}, slots, 60).generate(groups, Sampling(max_new=20))}
    wanted = tokens(30)
    monkeypatch.setattr(rollout, "free_memory", lambda device: 800_000)
    assert Engine(model, {1}, 30, 60).slots in range(8, 30) and "slots it is" in capsys.readouterr().err
    assert tokens(30) == wanted
    assert Engine(model, {1}, 30, 60, spare=200_000).slots < Engine(model, {1}, 30, 60).slots
    monkeypatch.setattr(rollout, "free_memory", lambda device: 10_000)
    for spare, mend in ((0, "are free: lower --max-new"), (1000, "are for the update: lower --micro-tokens or --max-new")):
        with pytest.raises(UserError, match=mend):
            Engine(model, {1}, 30, 60, spare=spare)
