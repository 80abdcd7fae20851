"""Deployment: the policy's folder in stock transformers, and the drafter in servers."""

import json
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, caught, rows_of, run_in_process, tiny
from helpers import tiny_of, trained_drafter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import export as export_module
import tlt
import train_grpo
from base.pretrain import make_tokenizer
from custom_generate import generate as custom_generate
from drafter import Drafter, EagleProposer
from export import export
from parts.cli import UserError
from parts.engine import model_loading
from parts.engine.interfaces import DraftPlan, Group, Strategy
from parts.engine.model_loading import load_model, stop_tokens
from parts.engine.sampling import Sampling
from rollout import Engine
from train_grpo import Config, Training, Worker

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """For each family, the folder of a policy with a drafter that has learned a little."""
    result = {}
    for family in FAMILIES:
        policy = tiny_of(family)
        drafter = trained_drafter(policy)
        folder = tmp_path_factory.mktemp(family)
        policy.config._attn_implementation = "sdpa"
        policy.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        drafter.save(folder / "drafter")
        result[family] = folder
    return result


def load(folder):
    """Load a policy as a user of stock transformers does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def batch(seed, size=3):
    """Return prompts of 1 to 12 tokens, padded on the left to the longest."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(size):
        prompts.append(torch.tensor([rng.randrange(4, 118) for _ in range(rng.randint(1, 12))]))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    return {"input_ids": pad(prompts), "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts])}


def check_greedy(folder, decode, lengths=(6,)):
    """decode(model, **inputs and settings) returns the tokens of plain `generate` at all these draft lengths."""
    model = load(folder)
    for seed in range(4):
        inputs = {**batch(seed), "do_sample": False, "max_new_tokens": 25}
        plain = model.generate(**inputs)
        for k in lengths:
            assert torch.equal(decode(model, **inputs, draft_length=k), plain), (seed, k)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_decode_with_the_drafter(family, folders):
    """As a user calls it, through model.generate."""

    def decode(model, **inputs):
        return model.generate(**inputs, custom_generate=str(ROOT), trust_remote_code=True)

    check_greedy(folders[family], decode, lengths=(0, 1, 4, 7))


@pytest.mark.parametrize("broken", ["cache not cropped", "last token dropped"])
def test_broken_decoding_is_caught(broken, folders, monkeypatch):
    check_greedy(folders["llama"], custom_generate.generate)
    if broken == "cache not cropped":
        monkeypatch.setattr(custom_generate, "crop", lambda cache, length: None)
    else:
        right = custom_generate.respond
        monkeypatch.setattr(custom_generate, "respond", lambda *args: right(*args)[:-1] + [0])
    with pytest.raises((AssertionError, RuntimeError)):  # tensors may also have lengths that do not fit
        check_greedy(folders["llama"], custom_generate.generate)


def test_samples_depend_on_the_seed_alone_and_follow_the_policy(folders):
    model = load(folders["llama"])
    prompt = torch.tensor([[5, 9, 30]])
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "max_new_tokens": 12}
    outputs = []
    for k in (0, 3, 6):
        torch.manual_seed(3)
        outputs.append(custom_generate.generate(model, prompt.expand(20, -1), draft_length=k, **settings))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    first = custom_generate.generate(model, prompt.expand(2000, -1), do_sample=True, max_new_tokens=1, top_k=0)[:, -1]
    wanted = model(prompt).logits[0, -1].softmax(-1)
    assert (torch.bincount(first, minlength=118) / 2000 - wanted).abs().max() < 0.04


@pytest.mark.parametrize("draft_vocab", [None, torch.arange(1, 118, 2).int()], ids=["all ids", "some ids"])
def test_draft_tokens_are_those_of_the_engine(draft_vocab, folders, tmp_path):
    """A round drafts the same tokens here and in the engine, so acceptance is the same."""
    folder = shutil.copytree(folders["llama"], tmp_path / "policy")
    restricted = Drafter(load(folder))
    restricted.load(folder / "drafter")
    restricted.draft_vocab = draft_vocab
    restricted.save(folder / "drafter")
    model = load(folder)
    forwards = []
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(1))
    prompt = [5, 9, 30, 44]
    settings = {"do_sample": False, "max_new_tokens": 40, "draft_length": 4}
    tokens = custom_generate.generate(model, torch.tensor([prompt]), **settings)[0, 4:].tolist()
    policy, _ = load_model(str(folder))
    drafter = Drafter(policy)
    drafter.load(folder / "drafter")
    assert draft_vocab is None or torch.equal(drafter.draft_vocab, draft_vocab)
    engine = Engine(policy, {1}, 1, 60, proposers={"eagle": EagleProposer(drafter)})
    strategy = Strategy(DraftPlan("eagle", 4))
    (response,) = engine.generate([Group(0, prompt, [0])], Sampling(0.0, max_new=40), strategy)
    assert tokens == response.tokens
    assert response.rounds < len(tokens)  # some draft tokens were accepted
    assert abs(len(forwards) - 1 - response.rounds) <= 1  # the last round here is shorter


def test_draft_logits_are_sharpened_as_in_the_engine():
    """custom_generate is independent of the project, so it has a copy of the factor."""
    assert custom_generate.SHARPEN == EagleProposer.SHARPEN
    source = (ROOT / "custom_generate/generate.py").read_text()
    assert len(re.findall(r"^SHARPEN = ", source, re.MULTILINE)) == 1
    modules = re.findall(r"^\s*(?:import|from) ([\w.]+)", source, re.MULTILINE)
    assert {module.partition(".")[0] for module in modules} == {
        "copy",
        "weakref",
        "torch",
        "safetensors",
        "transformers",
    }


def test_settings_that_are_not_supported_are_refused(folders):
    model = load(folders["llama"])
    unsupported = {
        "num_beams": 2,
        "streamer": object(),
        "repetition_penalty": 1.3,
        "num_return_sequences": 2,
        "min_new_tokens": 5,
        "return_dict_in_generate": True,
    }
    for name, value in unsupported.items():
        with pytest.raises(ValueError, match=name):
            custom_generate.generate(model, torch.tensor([[5]]), **{name: value})


def test_missing_settings_are_filled_in_as_generate_does(folders):
    """Settings that a GenerationConfig leaves open come from the model's (the stop token), then from the defaults
    (top_k is 50).
    """
    model = load(folders["llama"])
    prompt = torch.tensor([[5, 9, 30]])
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=8)[0, 3:].tolist()
    model.generation_config.eos_token_id = greedy[4]
    settings = GenerationConfig(max_new_tokens=30)
    assert torch.equal(model.generate(prompt, settings), custom_generate.generate(model, prompt, settings))
    hot = {"do_sample": True, "max_new_tokens": 1, "temperature": 5.0}
    sampled = custom_generate.generate(model, prompt.expand(500, -1), **hot)[:, -1]
    assert len(set(sampled.tolist())) <= 50


# ---------------------------------------------------------------- where responses end


def chat_tokenizer(template: str):
    """Return the tiny tokenizer with the two tokens of ChatML and a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def check_turn_ends_stop(stop):
    """The token that ends a turn in the chat template is a stop token, too, beside the eos of a base model."""
    model = tiny()
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop(model, tokenizer) == {tokenizer.eos_token_id, end}
    for other in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}", None):
        assert stop(model, chat_tokenizer(other)) == {tokenizer.eos_token_id}


def test_the_end_of_a_turn_ends_a_response(monkeypatch):
    check_turn_ends_stop(stop_tokens)
    monkeypatch.setattr(model_loading, "turn_end", lambda tokenizer: set())
    caught(check_turn_ends_stop, stop_tokens)


def greedy(engine) -> list[int]:
    """Return the greedy response to a prompt."""
    (response,) = engine.generate([Group(0, [5, 9, 30], [0])], Sampling(0.0, max_new=40))
    return response.tokens


def check_saved_policy_stops(folder, tokenizer) -> None:
    """Stock `generate` of the saved folder ends a response where the engine did: at the end of the turn."""
    model = tiny(LlamaConfig, vocab_size=128)
    token = greedy(Engine(model, {1}, 1, 50))[5]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # the sixth token of the response becomes the end of the turn
        model.lm_head.weight[[token, end]] = model.lm_head.weight[[end, token]]
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    config = Config(model=str(folder / "start"), out=str(folder / "run"), device="cpu", max_new=40)
    training = Training(config, Worker(config))
    training.engine.reserve(50)
    tokens = greedy(training.engine)
    assert tokens.index(end) == len(tokens) - 1 <= 5
    training.finish()
    saved = load(folder / "run/policy")
    assert saved.generate(torch.tensor([[5, 9, 30]]), do_sample=False)[0, 3:].tolist() == tokens


def test_the_saved_policy_stops_where_the_engine_did(tmp_path, monkeypatch):
    check_saved_policy_stops(tmp_path / "good", chat_tokenizer(CHATML))
    right = train_grpo.deployed_sampling
    monkeypatch.setattr(train_grpo, "deployed_sampling", lambda model, stop, *rest: right(model, stop[:1], *rest))
    caught(check_saved_policy_stops, tmp_path / "broken", chat_tokenizer(CHATML))


def test_a_single_stop_token_is_saved_as_a_number(model_folder, tmp_path):
    config = Config(model=str(model_folder), out=str(tmp_path), device="cpu")
    assert Training(config, Worker(config)).model.generation_config.eos_token_id == 1


# ---------------------------------------------------------------- servers


class Server:
    """What the EAGLE layers of SGLang and vLLM compute, written out: fc, then a Llama layer without its first norm, and
    no norm after it.

    All weights have to be used, under the names that the loaders want.
    """

    def __init__(self, folder):
        self.weights = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())

    def use(self, name):
        return self.weights.pop(name)

    def linear(self, x, name, biased=False):
        bias = self.use(name + ".bias") if biased else None
        return torch.nn.functional.linear(x, self.use(name + ".weight"), bias)

    def attention(self, x, policy):
        config = self.config
        biased = config.get("qkv_bias", config.get("attention_bias", config["model_type"] == "qwen2"))
        heads = {
            "q": config["num_attention_heads"],
            "k": config["num_key_value_heads"],
            "v": config["num_key_value_heads"],
        }
        parts = {}
        for name, count in heads.items():
            part = self.linear(x, f"layers.0.self_attn.{name}_proj", biased)
            parts[name] = part.view(1, x.shape[1], count, -1).transpose(1, 2)
        angles = policy.get_decoder().rotary_emb(x, torch.arange(x.shape[1])[None])
        q, k = apply_rotary_pos_emb(parts["q"], parts["k"], *angles)
        attend = torch.nn.functional.scaled_dot_product_attention
        seen = attend(q, k, parts["v"], is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.linear(seen, "layers.0.self_attn.o_proj", config.get("attention_bias", False))

    def run(self, policy, tokens, features):
        has_bias = self.config["architectures"][0].endswith("ForCausalLMEagle")
        x = self.linear(torch.cat([policy.get_input_embeddings()(tokens), features], -1), "fc", has_bias)
        x = x + self.attention(x, policy)
        norm = self.use("layers.0.post_attention_layernorm.weight")
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], norm, self.config["rms_norm_eps"])
        gate = torch.nn.functional.silu(self.linear(normed, "layers.0.mlp.gate_proj"))
        x = x + self.linear(gate * self.linear(normed, "layers.0.mlp.up_proj"), "layers.0.mlp.down_proj")
        assert not self.weights, self.weights.keys()
        return x


def check_export(policy, drafter, folder, server):
    """From the exported files, the server's layer computes what the drafter computes."""
    with torch.no_grad():
        export(drafter, folder, server)
        tokens = torch.randint(4, 118, (1, 9))
        features = torch.randn(1, 9, 32)
        own = drafter(tokens, features, drafter.angles(torch.arange(9)[None]), None)
        assert torch.allclose(own, Server(folder).run(policy, tokens, features), atol=1e-4)


@pytest.mark.parametrize("server", ["sglang", "vllm"])
@pytest.mark.parametrize("family, changes", [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})])
def test_servers_compute_what_the_drafter_computes(family, changes, server, tmp_path, monkeypatch):
    policy = tiny(FAMILIES[family], **changes)
    torch.manual_seed(0)
    drafter = Drafter(policy)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # norms and biases too
    drafter.draft_vocab = torch.tensor([1, 5, 90]).int()
    check_export(policy, drafter, tmp_path, server)
    if server == "sglang":
        assert torch.load(tmp_path / export_module.TOKEN_MAP, weights_only=True) == [1, 5, 90]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "layer_types" not in config
    assert config["vocab_size"] == 118
    right = drafter.forward

    def backwards(ids, features, angles, mask):
        return right(ids.flip(1), features.flip(1), angles, mask)

    def feature_before_embedding(ids, features, angles, mask):
        embeddings = drafter.policy.embed(ids) * drafter.embed_scale
        return drafter.run_layer(drafter.fc(torch.cat([features, embeddings], -1)), angles, mask)

    for harm in (backwards, feature_before_embedding):
        monkeypatch.setattr(drafter, "forward", harm)
        caught(check_export, policy, drafter, tmp_path, server)


def test_policies_without_an_eagle_layer_in_the_server_are_refused(tmp_path):
    with pytest.raises(UserError, match="qwen3"):
        export(Drafter(tiny(Qwen3Config)), tmp_path, "sglang")


def test_the_policy_of_a_run_can_be_deployed(model_folder, tmp_path, monkeypatch, capsys):
    run_in_process(tlt.main, model_folder, tmp_path / "run", "--workers", 1, "--steps", 2, "--strategy", 2)
    policy = tmp_path / "run" / "policy"
    card = (policy / "README.md").read_text()
    last = [row for row in rows_of(tmp_path / "run") if "eval" in row][-1]
    assert f"| 2 | {last['eval']['pass@1']:.3f} |" in card
    assert "2 GRPO steps" in card
    assert "custom_generate" in card
    model = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert model.generation_config.do_sample
    assert model.generation_config.max_new_tokens == 24
    inputs = tokenizer("3,7,8=29<think>", return_tensors="pt")
    plain = model.generate(**inputs, do_sample=False)
    speculative = {"custom_generate": str(policy), "trust_remote_code": True}
    assert torch.equal(plain, model.generate(**inputs, do_sample=False, **speculative))
    monkeypatch.setattr("sys.argv", ["export.py", "--model", str(policy), "--out", str(tmp_path / "served")])
    export_module.main()
    assert {path.parent.name for path in (tmp_path / "served").rglob("model.safetensors")} == {"sglang", "vllm"}
    assert "vllm serve" in capsys.readouterr().out
