"""What is taken along: the policy's folder for stock transformers, the drafter for servers."""

import json
import random

import pytest
import torch
from conftest import caught, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import drafter as drafter_module
import tlt
from custom_generate import generate as stock_side
from drafter import Drafter, FeatureBuffer, LearnedDrafts, Trainer, export
from pretrain import make_tokenizer
from rollout import Draft, Engine, Group, Sampling, load_model
from tasks import UserError
from test_drafter import responses_of
from test_tlt import ROOT, here

KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def deployed(kind, folder, **changes):
    """A policy's folder with a drafter that has learned a little."""
    policy = tiny(KINDS[kind], **changes)
    torch.manual_seed(0)
    drafter = Drafter(policy)
    trainer, buffer = Trainer(drafter, tokens=64), FeatureBuffer()
    for response in responses_of(policy):
        buffer.add(response)
    for _ in range(40):
        trainer.step(buffer)
    policy.config._attn_implementation = "sdpa"
    policy.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    drafter.save(folder / "drafter")
    return policy, drafter


def batch(seed, rows=3):
    rng = random.Random(seed)
    rows = [[rng.randrange(4, 118) for _ in range(rng.randint(1, 12))] for _ in range(rows)]
    longest = max(map(len, rows))
    pad = lambda value, row: [value] * (longest - len(row))
    return {"input_ids": torch.tensor([pad(0, r) + r for r in rows]), "attention_mask": torch.tensor([pad(0, r) + [1] * len(r) for r in rows])}


def check_greedy(folder, make):
    """make(model, **inputs and settings): the tokens of plain `generate`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for seed in range(4):
        inputs = {**batch(seed), "do_sample": False, "max_new_tokens": 25}
        plain, made = model.generate(**inputs), make(model, **inputs)
        assert made.shape == plain.shape and torch.equal(made, plain), seed


@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_decode_with_the_drafter(kind, tmp_path):
    """Through transformers' own door."""
    deployed(kind, tmp_path)
    for k in (0, 1, 4, 7):
        check_greedy(tmp_path, lambda model, **inputs: model.generate(**inputs, custom_generate=str(ROOT), trust_remote_code=True, draft_length=k))


@pytest.mark.parametrize("broken", ["cache not cropped", "last token dropped"])
def test_broken_decoding_is_caught(broken, tmp_path, monkeypatch):
    deployed("llama", tmp_path)
    check_greedy(tmp_path, stock_side.generate)
    if broken == "cache not cropped":
        monkeypatch.setattr(stock_side, "shorten", lambda cache, length: None)
    else:
        monkeypatch.setattr(stock_side, "respond", lambda *args, inner=stock_side.respond: inner(*args)[:-1] + [0])
    with pytest.raises((AssertionError, RuntimeError)):  # lengths may also cease to fit
        check_greedy(tmp_path, stock_side.generate)


def test_sampling_depends_on_the_seed_alone_and_follows_the_policy(tmp_path):
    deployed("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = torch.tensor([[5, 9, 30]])
    found = []
    for k in (0, 3, 6):
        torch.manual_seed(3)
        found.append(stock_side.generate(model, prompt.expand(20, -1), do_sample=True, temperature=0.9, top_k=30, top_p=0.95, max_new_tokens=12, draft_length=k))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    first = stock_side.generate(model, prompt.expand(2000, -1), do_sample=True, max_new_tokens=1, top_k=0)[:, -1]
    wanted = model(prompt).logits[0, -1].softmax(-1)
    assert (torch.bincount(first, minlength=118) / 2000 - wanted).abs().max() < 0.04


def test_guesses_are_those_of_the_engine(tmp_path):
    """A round's drafts here and in the engine are the same numbers: so acceptance carries over."""
    deployed("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rounds = []
    inner = model.get_decoder().forward
    model.get_decoder().forward = lambda *args, **kwargs: rounds.append(kwargs["input_ids"].shape[1]) or inner(*args, **kwargs)
    prompt = [5, 9, 30, 44]
    made = stock_side.generate(model, torch.tensor([prompt]), do_sample=False, max_new_tokens=40, draft_length=4)[0, 4:].tolist()
    policy, _ = load_model(str(tmp_path))
    drafter = Drafter(policy)
    drafter.load(tmp_path / "drafter")
    engine = Engine(policy, {1}, 1, 60, drafters={"learned": LearnedDrafts(drafter)})
    response, = engine.generate([Group(0, prompt, [0])], Sampling(0.0, max_new=40), lambda live: Draft("learned", 4))
    assert made == response.tokens and abs(len(rounds) - 1 - response.rounds) <= 1  # the last round here is shorter


def test_what_is_not_supported_is_named(tmp_path):
    deployed("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in (("num_beams", 2), ("streamer", object()), ("repetition_penalty", 1.3), ("num_return_sequences", 2), ("min_new_tokens", 5), ("return_dict_in_generate", True)):
        with pytest.raises(ValueError, match=name):
            stock_side.generate(model, torch.tensor([[5]]), **{name: value})


def test_settings_are_completed_as_generate_does(tmp_path):
    """What a GenerationConfig leaves open comes from the model's (the stop token), then from the defaults (top_k is 50)."""
    deployed("llama", tmp_path)
    model, prompt = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), torch.tensor([[5, 9, 30]])
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=8)[0, 3:].tolist()
    model.generation_config.eos_token_id = greedy[4]
    settings = GenerationConfig(max_new_tokens=30)
    assert torch.equal(model.generate(prompt, settings), stock_side.generate(model, prompt, settings))
    made = stock_side.generate(model, prompt.expand(500, -1), do_sample=True, max_new_tokens=1, temperature=5.0)[:, -1]
    assert len(set(made.tolist())) <= 50


# ---------------------------------------------------------------- servers


def served(folder, policy, tokens, features):
    """What SGLang's and vLLM's EAGLE layer computes, written out: fc, a Llama layer without its first norm, no norm behind; all weights are used, by their loaders' names."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    bias = config.get("qkv_bias", config.get("attention_bias", config["model_type"] == "qwen2"))
    bias_out = config.get("attention_bias", False)
    use = lambda name: weights.pop(name)
    linear = lambda x, name, biased=False: torch.nn.functional.linear(x, use(name + ".weight"), use(name + ".bias") if biased else None)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    split = lambda x, n: x.view(1, x.shape[1], n, -1).transpose(1, 2)
    at = "layers.0.self_attn."
    x = linear(torch.cat([policy.get_input_embeddings()(tokens), features], -1), "fc", "LlamaForCausalLMEagle" in config["architectures"] or "Qwen2ForCausalLMEagle" in config["architectures"])
    q, k, v = split(linear(x, at + "q_proj", bias), heads), split(linear(x, at + "k_proj", bias), kv), split(linear(x, at + "v_proj", bias), kv)
    q, k = apply_rotary_pos_emb(q, k, *policy.get_decoder().rotary_emb(x, torch.arange(x.shape[1])[None]))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    x = x + linear(seen, at + "o_proj", bias_out)
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], use("layers.0.post_attention_layernorm.weight"), config["rms_norm_eps"])
    x = x + linear(torch.nn.functional.silu(linear(normed, "layers.0.mlp.gate_proj")) * linear(normed, "layers.0.mlp.up_proj"), "layers.0.mlp.down_proj")
    assert not weights, weights.keys()
    return x


def check_export(policy, drafter, folder, server):
    with torch.no_grad():
        export(drafter, folder, server)
        tokens, features = torch.randint(4, 118, (1, 9)), torch.randn(1, 9, 32)
        own = drafter(tokens, features, drafter.angles(torch.arange(9)[None]), None)
        assert torch.allclose(own, served(folder, policy, tokens, features), atol=1e-4)


@pytest.mark.parametrize("server", ["sglang", "vllm"])
@pytest.mark.parametrize("kind, changes", [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})])
def test_servers_compute_what_we_compute(kind, changes, server, tmp_path, monkeypatch):
    policy = tiny(KINDS[kind], **changes)
    torch.manual_seed(0)
    drafter = Drafter(policy)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # norms and biases too
    check_export(policy, drafter, tmp_path, server)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and "layer_types" not in config and config["vocab_size"] == 118
    drafter.fc.weight = torch.nn.Parameter(drafter.fc.weight.flip(1))
    monkeypatch.setattr(drafter, "enter", lambda ids, features, inner=drafter.enter: inner(ids, features).flip(1))
    caught(check_export, policy, drafter, tmp_path, server)


def test_policies_that_no_server_has_a_layer_for_are_refused(tmp_path):
    with pytest.raises(UserError, match="qwen3"):
        export(Drafter(tiny(Qwen3Config)), tmp_path, "sglang")


def test_a_run_leaves_a_folder_that_is_complete(model_folder, tmp_path, monkeypatch, capsys):
    here(tlt.main, model_folder, tmp_path / "run", "--workers", 1, "--steps", 2)
    policy = tmp_path / "run" / "policy"
    card = (policy / "README.md").read_text()
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    last = [r for r in rows if "eval" in r][-1]
    assert f"| 2 | {last['eval']['pass@1']:.3f} |" in card and "2 GRPO steps" in card and "custom_generate" in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert model.generation_config.do_sample and model.generation_config.max_new_tokens == 24
    inputs = tokenizer("3,7,8=29<think>", return_tensors="pt")
    plain = model.generate(**inputs, do_sample=False)
    assert torch.equal(plain, model.generate(**inputs, do_sample=False, custom_generate=str(policy), trust_remote_code=True))
    monkeypatch.setattr("sys.argv", ["drafter.py", "export", "--model", str(policy), "--out", str(tmp_path / "served")])
    drafter_module.main()
    assert {p.parent.name for p in (tmp_path / "served").rglob("model.safetensors")} == {"sglang", "vllm"} and "vllm serve" in capsys.readouterr().out
