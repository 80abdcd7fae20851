"""Which models run, and why the others are refused: tiny models of many families, loaded as a user loads them.

The trial must distinguish rounding from errors, also in a model that amplifies rounding as trained models do.
"""

import json
import random
import re

import pytest
import torch
import transformers
from conftest import TINY_SHAPE, tiny
from helpers import fixed, groups_of, make_engine, tokens_of
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

import generate
from base.pretrain import make_tokenizer
from parts.cli import UserError, run
from parts.engine import forward as forward_module
from parts.engine import fused_layers, parity
from parts.engine.forward import forward, head_of, logit_scale
from parts.engine.fused_layers import fuse_model
from parts.engine.kv_cache import KVCache, attention_inputs, slot_attention
from parts.engine.model_loading import cast_weights, check_supported, load_model
from parts.engine.parity import CLEAR, matches_own_code
from parts.engine.sampling import Sampling
from rollout import Engine

# ---------------------------------------------------------------- families

FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
OLD_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ACCEPTED = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 8.0, **MULTIPLIERS}),
    "granite, scaled embedding": ("Granite", {"embedding_multiplier": 12.0, "attention_multiplier": 8**-0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.0625}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "phi": ("Phi", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "nemotron": ("Nemotron", {}),
    "helium": ("Helium", {"head_dim": 8}),
    "ernie": ("Ernie4_5", {"head_dim": 16}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 16}),
    "arcee": ("Arcee", {}),
    "persimmon": ("Persimmon", {"num_key_value_heads": None}),
    "diffllama": ("DiffLlama", {}),
    "qwen2 experts": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3 experts": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "mixtral": ("Mixtral", LOCAL_EXPERTS),
    "phi experts": ("Phimoe", LOCAL_EXPERTS),
    "olmo experts": ("Olmoe", EXPERTS),
    "granite experts": ("GraniteMoe", {**LOCAL_EXPERTS, "logits_scaling": 6.0}),
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
REFUSED = {
    "mistral with a window": ("Mistral", {"sliding_window": 64}, "sliding_window 64.; for texts .* set it to null"),
    "cohere2": ("Cohere2", {}, "sliding_attention"),
    "gemma2": ("Gemma2", {"head_dim": 16}, "sliding_attention"),
    "gemma2, full attention": ("Gemma2", {"head_dim": 16, **FULL}, "soft-capped"),
    "gemma2, capped logits": ("Gemma2", {"head_dim": 16, **FULL, "attn_logit_softcapping": None}, "logits differ"),
    "gemma3": ("Gemma3Text", {"head_dim": 16}, "sliding_attention"),
    "gemma3, full attention": ("Gemma3Text", {"head_dim": 16, **FULL}, "different rotary angles"),
    "olmo3": ("Olmo3", {}, "sliding_attention"),
    "gpt-oss": ("GptOss", {"head_dim": 8, **LOCAL_EXPERTS}, "sliding_attention"),
    "gpt-oss, full attention": ("GptOss", {"head_dim": 8, **LOCAL_EXPERTS, **FULL}, "sink"),
    "qwen3-next": ("Qwen3Next", {"head_dim": 16, **EXPERTS}, "linear_attention"),
    "mamba": ("Mamba", {}, "linear_attention"),
    "llama4": ("Llama4Text", {"head_dim": 16, "num_local_experts": 2}, "chunked_attention"),
    "phi3, long": ("Phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}, "longrope"),
    "deepseek-v3": ("DeepseekV3", {**LATENT, **ROUTED, "num_key_value_heads": 4}, "kv_lora_rank 16"),
    "gpt2": ("GPT2", OLD_NAMES, "no embed_tokens and no layers and no rotary_emb"),
    "gpt-neox": ("GPTNeoX", {}, "no embed_tokens, which a drafter borrows"),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "no rotary_emb, which a drafter borrows"),
    "xglm": ("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, "no rotary_emb"),
    "codegen": ("CodeGen", {**OLD_NAMES, "rotary_dim": 8}, "no embed_tokens"),
    "exaone4": ("Exaone4", {}, "sliding_attention"),
    "minicpm3": ("MiniCPM3", LATENT, "kv_lora_rank 16"),
    "jamba": ("Jamba", {"num_experts": 2}, "linear_attention"),
    "minimax": ("MiniMax", LOCAL_EXPERTS, "linear_attention"),
    "recurrentgemma": ("RecurrentGemma", {}, "linear_attention|sliding_window"),
    "nemotron-h": ("NemotronH", {}, "linear_attention"),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "no embed_tokens"),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "no embed_tokens"),
    "falcon": ("Falcon", {}, "a list of its own"),
    "gpt-j": ("GPTJ", {**OLD_NAMES, "rotary_dim": 8}, "a list of its own"),
}
# more ids than the tokenizer has: in a few families AutoTokenizer adds tokens to it
SHAPE = {**TINY_SHAPE, "vocab_size": 128}


def family(name: str):
    """Return a tiny random model of that family, as transformers makes it."""
    kind, changes = (ACCEPTED | REFUSED)[name][:2]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model.eval()


def saved(model, folder) -> str:
    """Save a model with the tiny tokenizer -> its folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def refusal(name: str) -> str:
    """Return the error of `load_model`, which must be one line that names the folder."""
    with pytest.raises(UserError) as error:
        load_model(name)
    text = str(error.value)
    assert text.startswith(f"--model {name}: ")
    assert "\n" not in text
    return text


def check_logprobs(model) -> None:
    """Each log-probability equals the one that the model's own code computes over the whole sequence."""
    for r in Engine(model, {1}, 4, 60).generate(groups_of(2, random.Random(1), samples=2), Sampling(max_new=10)):
        ids = torch.tensor([r.prompt + r.tokens])
        with torch.no_grad():
            own = model(input_ids=ids[:, :-1]).logits[0, len(r.prompt) - 1 :].log_softmax(-1)
        own = own.gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
        assert torch.allclose(own, r.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ACCEPTED)
def test_families_that_run(name, tmp_path):
    """Plain decoding has the model's own log-probabilities, speculative decoding the same tokens."""
    model, _ = load_model(saved(family(name), tmp_path))
    assert 0 < matches_own_code(model, None)[1] < CLEAR
    check_logprobs(model)
    engine = make_engine(model, slots=4, context=60)
    groups = groups_of(2, random.Random(1), samples=2)
    plain = tokens_of(engine.generate(groups, Sampling(max_new=10)))
    assert tokens_of(engine.generate(groups, Sampling(max_new=10), fixed("eagle", 3))) == plain


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_do_not_run_are_refused_with_the_reason(name, tmp_path):
    assert re.search(REFUSED[name][2], refusal(saved(family(name), tmp_path)))


def test_logits_are_scaled_as_the_model_scales_them():
    for name, factor in (("granite", 1 / 8), ("cohere", 0.0625), ("granite experts", 1 / 6), ("llama", 1)):
        model = family(name)
        assert logit_scale(model.config) == factor
        ids = torch.arange(2, 9)[None]
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state
            assert torch.allclose(head_of(model)(hidden), model(input_ids=ids).logits)


def test_fused_layers_that_leave_out_the_embedding_s_factor_are_not_used():
    """The layers of this Granite compute what Llama's do; only its embedding is scaled, which no layer shows."""
    model = family("granite, scaled embedding")
    model.set_attn_implementation("slots")
    layers = fuse_model(model)
    assert layers is not None
    assert not matches_own_code(model, layers)[0]
    assert Engine(model, {1}, 2, 30).fused_layers is None


# ---------------------------------------------------------------- rounding and errors


def like_trained():
    """Return a deep, sharp model, one of whose channels holds 1000 at every token, as in trained models. It amplifies
    rounding a thousand times more than `tiny` does.
    """
    model = tiny(LlamaConfig, num_hidden_layers=28)
    big = 1000.0
    level = big / model.config.hidden_size**0.5  # what a norm divides by; its weights compensate it
    torch.manual_seed(10)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 7] = big
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(1.5 * level)
                norm.weight[7] = 1
            layer.self_attn.q_proj.weight.mul_(2)
        model.model.norm.weight.fill_(level)
        model.model.norm.weight[7] = 0
    return model


MODELS = {"plain": tiny, "like trained": like_trained}


@torch.inference_mode()
def absolute_gap(model) -> float:
    """Return the largest absolute difference of logits on the tokens 1 to 5."""
    ids = torch.arange(1, 6)[None]
    cache = KVCache(model.config, 1, 8, model.dtype, model.device)
    first = forward(model, cache, slice(0, 1), ids[:, :3], torch.tensor([0]), 3)
    second = forward(model, cache, slice(0, 1), ids[:, 3:], torch.tensor([3]), 5)
    logits = head_of(model)(torch.cat([first, second], 1))
    return (logits - model(input_ids=ids, use_cache=False).logits).abs().max().item()


def test_a_model_that_amplifies_rounding_runs(monkeypatch):
    model = like_trained()
    assert absolute_gap(model) > 1e-3
    check_supported(model)
    layers = fuse_model(model)
    assert layers is not None
    assert matches_own_code(model, layers)[0]
    assert matches_own_code(cast_weights(like_trained(), torch.bfloat16), None)[0]
    # float64 makes the difference
    monkeypatch.setattr(parity, "CLEAR_IN_FLOAT64", -1)
    with pytest.raises(UserError, match="logits differ"):
        check_supported(model)


def wrong_positions(monkeypatch):
    def shifted(cache, slots, lens, *rest):
        inputs = attention_inputs(cache, slots, lens, *rest)
        return inputs._replace(positions=inputs.positions + (lens > 0).long()[:, None])

    monkeypatch.setattr(forward_module, "attention_inputs", shifted)


def one_entry_too_many(monkeypatch):
    def leaky(*args):
        inputs = attention_inputs(*args)
        mask = torch.cat([inputs.mask[..., :1], inputs.mask[..., :-1]], -1)  # what sees an entry sees the next one
        return inputs._replace(mask=mask)

    monkeypatch.setattr(forward_module, "attention_inputs", leaky)


def wrong_scaling(monkeypatch):
    def scaled(module, query, key, value, mask, scaling=None, **rest):
        return slot_attention(module, query, key, value, mask, scaling=1.1 * scaling, **rest)

    monkeypatch.setattr(fused_layers, "slot_attention", scaled)  # where the fused layers look it up
    monkeypatch.setitem(AttentionInterface._global_mapping, "slots", scaled)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("harm", [wrong_positions, one_entry_too_many, wrong_scaling])
def test_broken_engines_are_refused(harm, model, monkeypatch):
    model = MODELS[model]()
    layers = fuse_model(model)
    check_supported(model)
    harm(monkeypatch)
    with pytest.raises(UserError, match="logits differ"):
        check_supported(model)
    assert not matches_own_code(model, layers)[0]
    assert not matches_own_code(cast_weights(model, torch.bfloat16), None)[0]


@pytest.mark.parametrize("model", MODELS)
def test_wrong_fused_layers_are_found_where_the_modules_are_right(model, monkeypatch):
    model = MODELS[model]()
    layers = fuse_model(model)

    def scaled(*args, scaling):
        return slot_attention(*args, scaling=1.1 * scaling)

    monkeypatch.setattr(fused_layers, "slot_attention", scaled)
    assert matches_own_code(model, None)[0]
    assert not matches_own_code(model, layers)[0]


def test_the_trial_does_not_change_the_model():
    for name in ("llama", "mixtral"):
        model = family(name)
        model.set_attn_implementation("slots")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        settings = model.config.to_dict()
        matches_own_code(cast_weights(model, torch.bfloat16), None)
        assert model.config.to_dict() == settings
        assert model.config._attn_implementation == "slots"
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert all(value.equal(before[key].to(value.dtype)) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- damaged folders


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def fewer_layers(folder, weights):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))


def more_layers(folder, weights):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def other_shape(folder, weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(50, 32)


def not_a_number(folder, weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan


def infinite(folder, weights):
    weights["model.embed_tokens.weight"][90, 4] = torch.inf
    weights["model.embed_tokens.weight"][91, 4] = -torch.inf


def more_tokens(folder, weights):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)


DAMAGE = {
    fewer_layers: "lack model.layers.2.input_layernorm.weight and 17 more, which config.json asks for",
    more_layers: "hold model.layers.1.input_layernorm.weight and 8 more, which config.json has no use for",
    other_shape: r"weight model.layers.1.mlp.up_proj.weight has the shape .50, 32., config.json asks for .48, 32.",
    not_a_number: "weight model.layers.1.mlp.up_proj.weight holds nan or inf",
    infinite: "weight model.embed_tokens.weight holds nan or inf",
    more_tokens: "its tokenizer makes 'two' number 119, but the model's vocab_size is 118",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_folders_are_refused(damage, tmp_path, capfd):
    name = saved(tiny(LlamaConfig), tmp_path)
    weights = weights_of(tmp_path)
    damage(tmp_path, weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert re.search(DAMAGE[damage], refusal(name))
    out, err = capfd.readouterr()
    assert out + err == ""  # transformers prints no table


def test_tied_heads_and_the_buffers_of_old_files_are_no_damage(tmp_path):
    """A file need not hold a head that is tied to the embedding, and may hold rotary angles, as old files do."""
    load_model(saved(tiny(LlamaConfig, tie_word_embeddings=True), tmp_path))
    weights = weights_of(tmp_path)
    assert "lm_head.weight" not in weights
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(str(tmp_path))


@pytest.mark.parametrize("flags", [["--model", "FOLDER"], ["--model", "base", "--prompt", "Hello"]])
def test_a_refusal_is_one_line_and_status_2(flags, tmp_path, monkeypatch, capfd):
    folder = saved(family("falcon"), tmp_path)
    flags = [folder if flag == "FOLDER" else flag for flag in ["--prompt", "3,7,8=29<think>", *flags]]
    monkeypatch.setattr("sys.argv", ["generate.py", *flags])
    with pytest.raises(SystemExit) as end:
        run(generate.main)
    assert end.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("generate.py: ")
    assert err.count("\n") == 1
