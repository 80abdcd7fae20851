"""One forward of a Hugging Face causal LM in the engine: token ids to hidden states, hidden states to logits.

The model is the stock module. It runs over the engine's cache (kv_cache.py), either with its own layers or with fused
ones (fused_layers.py). Which models can run is found out when they are loaded (model_loading.py, parity.py).

Legend: B sequences, T new tokens per sequence, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from parts.engine.fused_layers import as_one_linear, can_pack, norm_of
from parts.engine.kv_cache import KVCache, attention_inputs


def forward(model, cache: KVCache, slots: slice, ids, lens, kv_len: int, tree=None, fused_layers=None) -> torch.Tensor:
    """Feed ids (B, T) to the slots, whose first lens (B,) cache entries are valid -> last hidden states (B, T, D).

    `head_of(model)` turns them into logits. fused_layers: from `fuse`; None: the model's own modules.
    """
    positions, mask, window = attention_inputs(cache, slots, lens, kv_len, ids.shape[1], tree)
    decoder = model.get_decoder()
    if fused_layers is None:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return decoder(**inputs, past_key_values=window, use_cache=True).last_hidden_state
    x = decoder.embed_tokens(ids)
    angles = cache.angles(decoder.rotary_emb, positions)
    for i, layer in enumerate(fused_layers):
        x = layer(x, mask, window, angles, i)
    if hasattr(decoder.norm, "variance_epsilon"):
        return F.rms_norm(x, x.shape[-1:], *norm_of(decoder.norm))
    return decoder.norm(x)


def logit_scale(config) -> float:
    """Return what a model multiplies its logits by: Granite divides them by a number, Cohere multiplies by one."""
    if getattr(config, "logits_scaling", None):
        return 1 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


def head_of(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the LM head: last hidden states (..., D) -> logits (..., V), through the model's own module."""
    return scaled(model.get_output_embeddings(), logit_scale(model.config))


def scaled(head, factor: float):
    """Return the head with its logits multiplied by the factor."""
    return head if factor == 1 else lambda hidden: head(hidden) * factor


@torch.inference_mode()
def fast_head(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `head_of` with the weights as they are now, packed where that is faster."""
    head = model.get_output_embeddings()
    if not can_pack(head.weight):
        return head_of(model)
    return scaled(as_one_linear([(head.weight, head.bias)]), logit_scale(model.config))
