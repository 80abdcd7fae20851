"""Loading a Hugging Face causal LM and its tokenizer, and refusing, in one line, what cannot be right.

A folder is refused when its weights are not those that its config asks for, when one of them is not finite, or when its
tokenizer has token ids that the model has no embedding for.

Models run whose cache is plain attention with rotary positions and whose logits are head(last hidden state); see
docs/models.md. That list is not kept in code: a model is tried when it is loaded (parity.py), and one that differs is
refused.
"""

import re
from collections.abc import Iterable

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from parts.cli import UserError, reason
from parts.engine.parity import matches_own_code
from parts.files import find_folder

logging.disable_progress_bar()  # "Loading weights" for each of N workers says nothing


SEE = "docs/models.md lists what runs"


LOADING_ERRORS = (  # what loading files raises
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


# ---------------------------------------------------------------- loading


def load_tokenizer(name: str):
    """Return the tokenizer of a folder or a hub name. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(find_folder(name))
    except LOADING_ERRORS as error:
        raise UserError(f"--model {name}: cannot load its tokenizer: {reason(error)}") from error


def load_config(name: str):
    """Return the config of the model of that name. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(find_folder(name))
    except LOADING_ERRORS as error:
        raise UserError(f"--model {name}: cannot read its config.json: {reason(error)}") from error


def context_limit(config) -> int | None:
    """Return the largest number of tokens, prompt and response, that a model can read; None: no limit is known."""
    return getattr(config, "max_position_embeddings", None)


def too_long(tokens: int, limit: int) -> str:
    """Return the message for a prompt and response that do not fit the model."""
    sizes = f"prompt + response of {tokens} tokens is longer than the model's context of {limit}"
    return f"{sizes}: lower --max-new or shorten the prompt"


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Return (model, tokenizer) from a folder or a hub name. Raises UserError that says what is missing or not
    supported.
    """
    tokenizer = load_tokenizer(name)
    model, found = read_model(name, dtype)
    try:
        check_weights(model, found)
        check_vocabulary(model, tokenizer)
        check_supported(model)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from error
    return model.to(device).eval(), tokenizer


def read_model(name: str, dtype: torch.dtype):
    """Return the model, and what transformers reports of its weights (see check_weights). Raises UserError."""
    quantized = getattr(load_config(name), "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise UserError(
            f"--model {name}: its weights are quantized ({method}) and cannot be trained: take the original"
        )
    settings = {"dtype": dtype, "attn_implementation": "slots"}
    # `check_weights` reports wrong weights in one line instead of a table
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_pretrained(find_folder(name), **settings)
    except LOADING_ERRORS as error:
        if isinstance(error, KeyError) and error.args == ("slots",):
            error = UserError(f"its attention comes from a list of its own, which has no place for the engine's; {SEE}")
        raise UserError(f"--model {name}: cannot load it: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def check_weights(model, found: dict) -> None:
    """Raise UserError if the file's weights are not those that the config asks for, or if one is not finite.

    found: missing_keys, unexpected_keys, mismatched_keys of from_pretrained. Tied heads and the buffers of old files
    are not among them.
    """
    advice = "config.json and the weights must be of the same model"
    if found["missing_keys"]:
        raise UserError(f"its weights lack {listed(found['missing_keys'])}, which config.json asks for: {advice}")
    if found["unexpected_keys"]:
        raise UserError(
            f"its weights hold {listed(found['unexpected_keys'])}, which config.json has no use for: {advice}"
        )
    if found["mismatched_keys"]:
        weight, held, wanted = min(found["mismatched_keys"])
        raise UserError(f"weight {weight} has the shape {tuple(held)}, config.json asks for {tuple(wanted)}: {advice}")
    weight = find_not_finite(model.named_parameters())
    if weight:
        raise UserError(f"weight {weight} holds nan or inf: take an earlier checkpoint, or fetch the file anew")


def find_not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first weight that holds nan or inf; None if there is none. The host waits once, not once
    for each weight.
    """
    named = list(weights)
    if not named:
        return None
    sums = torch.stack([weight.sum(dtype=torch.float32) for _, weight in named])
    suspects = [pair for pair, good in zip(named, sums.isfinite().tolist()) if not good]
    broken = [name for name, weight in suspects if not weight.isfinite().all()]  # a sum may overflow
    return broken[0] if broken else None


def listed(names: Iterable[str]) -> str:
    """Return the first of the names, in the order of the layers, and how many more there are."""
    names = sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(5), name))
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_vocabulary(model, tokenizer) -> None:
    """Raise UserError if the tokenizer has token ids that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= known:
        raise UserError(
            f"its tokenizer makes {token!r} number {number}, but the model's vocab_size is {known}: "
            "take the model's own tokenizer, or resize the model's embeddings and train them"
        )


# ---------------------------------------------------------------- which models run


def check_supported(model) -> None:
    """Raise UserError for models that the engine cannot run, see the top of this file."""
    name = type(model).__name__
    why = unsupported_reason(model)
    if why:
        raise UserError(f"{name} is not supported: {why}; {SEE}")
    try:
        good, gap = matches_own_code(model, None)
    except Exception as error:  # a model's own code may fail in any way
        raise UserError(
            f"{name} is not supported: the engine cannot run it ({type(error).__name__}: {reason(error)}); {SEE}"
        ) from error
    if not good:
        raise UserError(
            f"{name} is not supported: the engine's logits differ from the model's own by {gap:.2g} of their standard "
            f"deviation; {SEE}"
        )


def unsupported_reason(model) -> str | None:
    """Return why a model cannot run, as far as its config or decoder shows it; None: nothing found. The trial finds the
    rest, but could not say why, or would not see it in twelve tokens.
    """
    config = model.config
    decoder = model.get_decoder()
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    kinds = {*(getattr(config, "layer_types", None) or [])}
    odd = sorted(kinds - {"full_attention"})
    missing = [name for name in ("embed_tokens", "layers", "rotary_emb") if not hasattr(decoder, name)]
    if kind in ("dynamic", "longrope"):
        return f"its rotary angles ({kind}) depend on the longest row of a batch, so a row would depend on its company"
    if odd:
        return f"its cache is not plain attention ({', '.join(odd)})"
    if getattr(config, "sliding_window", None) and not kinds:
        return (
            f"its cache is not plain attention (sliding_window {config.sliding_window}); "
            "for texts that are shorter than that, set it to null in config.json"
        )
    if getattr(config, "kv_lora_rank", None):
        return f"its keys and values are compressed (kv_lora_rank {config.kv_lora_rank}) and of unequal widths"
    if any(isinstance(value, dict) for value in rotary.values()):
        return f"its layers turn by different rotary angles ({', '.join(rotary)}), and a drafter has one layer"
    if missing:
        rotary = " (positions must be rotary, their angles made once for all layers)" if "rotary_emb" in missing else ""
        return f"its decoder has no {' and no '.join(missing)}, which a drafter borrows{rotary}"
    return None


# ---------------------------------------------------------------- what else is asked of a model


def stop_tokens(model, tokenizer) -> set[int]:
    """Return the ids that end a response: the tokenizer's eos, those of the generation config, and what ends a turn in
    a chat. Raises UserError if there are none.
    """
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id} | turn_end(tokenizer)
    ids -= {None}
    if not ids:
        raise UserError(f"{tokenizer.name_or_path} has no end-of-sequence token, so responses could not end")
    return ids


def turn_end(tokenizer) -> set[int]:
    """Return the special token that follows an answer in the tokenizer's chat template, if there is one. Base models
    have a template, too, but another eos, so they would continue after their <|im_end|>.
    """
    if not tokenizer.chat_template:
        return set()
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program, and may fail in any way; then the eos has to do
        return set()
    behind = tokenizer.encode(text.rpartition("Yes.")[2].strip(), add_special_tokens=False)[:1]
    return {token for token in behind if token in tokenizer.all_special_ids}


def deployed_sampling(model, stop: list[int], temperature: float, max_new: int) -> GenerationConfig:
    """Return the generation config with which the saved policy's `generate` samples, and stops, as it was trained.
    Other settings that the model came with (beams, min_p, suppressed tokens ...) are dropped.
    """
    before = model.generation_config
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new,
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=before.pad_token_id,
        bos_token_id=before.bos_token_id,
    )


ACTOR_DTYPES = ("auto", "bfloat16", "float32")


def actor_dtype(name: str, device: str) -> torch.dtype:
    """Return the type of the weights that generate. name: bfloat16, float32, or auto: bfloat16 on a GPU, float32 on a
    CPU.
    """
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return getattr(torch, name)


def cast_weights(model, dtype: torch.dtype):
    """Convert the model's weights to that type, in place.

    Not `model.to(dtype)`: that also rounds the buffers, and rotary frequencies rounded to 8 bits give wrong angles far
    from the start.
    """
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_actor(name: str, device: str, dtype: str):
    """As `load_model`, in the type that an actor has there. dtype: one of ACTOR_DTYPES. Raises UserError."""
    model, tokenizer = load_model(name, device)
    return cast_weights(model, actor_dtype(dtype, device)), tokenizer


def decode(tokens: list[int], tokenizer) -> str:
    """Return the text of token ids, special tokens included. A policy may have ids that its tokenizer does not know."""
    known = len(tokenizer)
    return tokenizer.decode([token for token in tokens if token < known], skip_special_tokens=False)
