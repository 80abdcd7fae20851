"""One forward of a Hugging Face causal LM in the engine: token ids to hidden states, hidden states to logits.

The model is the stock module. It runs over the engine's cache (kv_cache.py), either with its own layers or with fused
ones (fused_layers.py). Which models can run is found out when they are loaded (model_loading.py, parity.py).
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from parts.engine.fused_layers import PACK_FROM, Linear, can_pack, norm_of, weights_of
from parts.engine.kv_cache import SlotCache, attend


def forward(model, cache: SlotCache, rows: slice, ids, lens, view: int, tree=None, fused_layers=None) -> torch.Tensor:
    """Feed ids (B, T) to the rows, whose first lens (B,) cache entries are valid -> last hidden states (B, T, D).

    `head_of(model)` makes logits of them. fused_layers: from `fuse`; None: the model's own modules.
    """
    positions, mask = attend(cache, rows, lens, view, ids.shape[1], tree)
    decoder = model.get_decoder()
    if fused_layers is None:
        out = decoder(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.last_hidden_state
    x = decoder.embed_tokens(ids)
    angles = cache.angles(decoder.rotary_emb, positions)
    for i, layer in enumerate(fused_layers):
        x = layer(x, mask, cache, angles, i)
    if hasattr(decoder.norm, "variance_epsilon"):
        return F.rms_norm(x, x.shape[-1:], *norm_of(decoder.norm))
    return decoder.norm(x)


def logit_scale(config) -> float:
    """What the logits of a model are multiplied by: Granite divides by a number, Cohere multiplies by one."""
    if getattr(config, "logits_scaling", None):
        return 1 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


def head_of(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Last hidden states (..., D) -> logits (..., V), through the model's own modules."""
    return scaled(model.get_output_embeddings(), logit_scale(model.config))


def scaled(head, factor: float):
    """The head, its logits multiplied."""
    return head if factor == 1 else lambda hidden: head(hidden) * factor


@torch.inference_mode()
def fast_head(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states (..., D) -> logits (..., V), with the weights as they are now."""
    head = model.get_output_embeddings()
    if head.weight.numel() < PACK_FROM or not can_pack(head.weight):
        return head_of(model)
    packed_head = Linear(weights_of(head), pack=True)
    return head_of(model) if packed_head.packed is None else scaled(packed_head, logit_scale(model.config))
