"""How a Hugging Face causal LM runs in the engine: its cache, its attention, faster layers, and loading with a check.

The model is the stock module. Three small things make it serve many rows of different lengths, and fast:

    SlotCache        a static cache with one length per row: going back is free, since only the length changes
    slot_attention   folds grouped query heads into query rows, so that keys and values need not be copied
    FusedLayer       for small models of the Llama kind: joined projections, without the modules' overhead

One forward feeds row b the T tokens ids[b], whose keys and values go behind the lens[b] entries that are valid:

    slots = lens[:, None] + arange(T)            where the new entries go          (B, T)
    mask  = arange(view) <= slots[..., None]     what they see, view = max(lens)+T (B, T, view)

Which models? Those whose cache is plain attention and whose logits are lm_head(last hidden state). The list is not
kept in code: five tokens are tried through the engine's path and through the model's own, and a model that differs is
refused.

Legend: B rows, T new tokens per row, D model width, w head width, `groups` query heads per key head.
Left out: paged memory (a slot holds a whole sequence), sliding windows, linear attention.
"""

import copy
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.utils import logging

from parts.common import UserError, find_folder, reason

FUSE_BELOW = 100_000_000  # weights; in larger models the overhead does not show, and a second copy of the weights would

logging.disable_progress_bar()  # "Loading weights" for each of N workers says nothing


def kv_heads(config) -> int:
    """Key-value heads of a model."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


# ---------------------------------------------------------------- cache and attention


class SlotCache(Cache):
    """Keys and values of all layers in one tensor (layers, 2, slots, kv heads, length, w); each row has its own length.

    Before a forward, `place` says where the new tokens go. Entries beyond a row's length are never seen (the mask hides
    them) and are overwritten later.
    """

    def __init__(self, config, slots: int, length: int, dtype, device, layers: int | None = None):
        self.layers = []  # the base class asks
        self.heads = kv_heads(config)
        self.groups = config.num_attention_heads // self.heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (layers or config.num_hidden_layers, 2, slots, self.heads, length, width)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        # views of each layer, made once, because at batch 1 making them shows: keys, values, and both flattened
        self.views = [(k, v, k.flatten(0, 2), v.flatten(0, 2)) for k, v in self.data]
        self.rows = slice(0, 0)  # these three: see `place`
        self.view = 0
        self.flat = torch.zeros(0, dtype=torch.long)

    @property
    def length(self) -> int:
        """Entries that a slot holds."""
        return self.data.shape[4]

    def place(self, rows: slice, slots: torch.Tensor, view: int) -> None:
        """rows: those that take part; slots (B, T): positions of the new tokens; view: how many entries anyone sees."""
        self.rows = rows
        self.view = view
        head = torch.arange(rows.start * self.heads, rows.stop * self.heads, device=slots.device)
        head = head.view(-1, self.heads, 1)  # (B, heads, 1)
        self.flat = (head * self.length + slots[:, None]).flatten()  # (B * heads * T,) into (slots * heads * length)

    def update(self, key, value, layer, *args, **kwargs):
        """key, value (B, heads, T, w) -> all that the rows may look at, (B, heads, view, w)."""
        keys, values, keys_flat, values_flat = self.views[layer]
        keys_flat.index_copy_(0, self.flat, key.flatten(0, 2))
        values_flat.index_copy_(0, self.flat, value.flatten(0, 2))
        return keys[self.rows, :, : self.view], values[self.rows, :, : self.view]

    def get_seq_length(self, layer=0):
        """Asked by transformers; positions are always given."""
        return 0

    def move(self, source: int, target: slice, length: int) -> None:
        """Copy the first `length` entries of row `source` to the rows `target`, which may include it."""
        self.data[:, :, target, :, :length] = self.data[:, :, source, None, :, :length].clone()

    def relocate(self, rows, source, target) -> None:
        """In each of the rows (B,), copy the entry at position source (B,) to position target (B,)."""
        self.data[:, :, rows, :, target] = self.data[:, :, rows, :, source]


def slot_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """The one attention function of this project. query (B, heads, T, w), key and value (B, kv heads, S, w)
    -> (B, T, heads, w), None.

    With a mask (the engine): heads that share a key fold into query rows, (B, kv heads, groups * T, w), so nothing is
    copied; the mask (B, 1, groups * T, S) is folded alike. Without one (training): plain causal attention over
    right-padded rows. Raises UserError for soft-capped and sink attention.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__}: soft-capped or sink attention is not supported")
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if mask is None:
        if groups > 1:
            key = key.repeat_interleave(groups, 1)
            value = value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)
    else:
        folded = query.reshape(batch, key.shape[1], groups * length, width)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(batch, heads, length, -1)
    return out.transpose(1, 2), None


AttentionInterface.register(
    "slots", slot_attention
)  # a name without a mask function: our masks, or None, pass untouched


class Tree(NamedTuple):
    """New entries that are not a chain (accept.py)."""

    depth: torch.Tensor  # (T,) how far each stands behind the row's valid entries
    sees: torch.Tensor  # (T, T) bool: which of the new entries it sees


def attend(cache: SlotCache, rows: slice, lens, view: int, columns: int, tree: Tree | None = None):
    """Where T = `columns` new entries go and what they see. Tells the cache, too.

    lens (B,): valid entries of each row; view: how many entries anyone sees.
    -> positions (B, T), additive mask (B, 1, groups * T, view), folded as slot_attention wants it, once for all layers.
    """
    view = min(view, cache.length)
    # when a drafter catches up over gaps of unequal length, a row's padding may reach beyond its slot; the slot's last
    # entry belongs to nobody
    slots = (lens[:, None] + torch.arange(columns, device=lens.device)).clamp(max=cache.length - 1)  # (B, T)
    place = torch.arange(view, device=lens.device)
    if tree is None:
        positions = slots
        unseen = place > slots[..., None]  # (B, T, view)
    else:
        positions = lens[:, None] + tree.depth  # (B, T)
        new = place - lens[:, None]  # (B, view): which of the new entries stands there; below 0: an old one
        sees = tree.sees[:, new.clamp(0, columns - 1)].transpose(0, 1)  # (B, T, view)
        unseen = ~((new < 0)[:, None] | (sees & (new < columns)[:, None]))
    mask = torch.zeros(unseen.shape, dtype=cache.data.dtype, device=lens.device).masked_fill_(unseen, -torch.inf)
    cache.place(rows, slots, view)
    return positions, mask.repeat(1, cache.groups, 1)[:, None]


def forward(model, cache: SlotCache, rows: slice, ids, lens, view: int, tree=None, fused_layers=None) -> torch.Tensor:
    """Feed ids (B, T) to the rows, whose first lens (B,) cache entries are valid -> last hidden states (B, T, D).

    `model.get_output_embeddings()` makes logits of them. fused_layers: from `fuse`; None: the model's own modules.
    """
    positions, mask = attend(cache, rows, lens, view, ids.shape[1], tree)
    decoder = model.get_decoder()
    if fused_layers is None:
        out = decoder(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.last_hidden_state
    x = decoder.embed_tokens(ids)
    angles = signed(decoder.rotary_emb(x, positions))
    for i, layer in enumerate(fused_layers):
        x = layer(x, mask, cache, angles, i)
    return decoder.norm(x)


# ---------------------------------------------------------------- layers without overhead


def joined(*linears):
    """(weight, bias or None) of several linear layers that read the same input, as one."""
    weight = torch.cat([x.weight for x in linears])
    if all(x.bias is None for x in linears):
        return weight, None
    return weight, torch.cat([torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in linears])


def norm_of(module):
    """(weight, epsilon) of an RMSNorm; None for the identity, which a drafter's layer has in front."""
    return None if isinstance(module, torch.nn.Identity) else (module.weight, module.variance_epsilon)


class FusedLayer:
    """A decoder layer of the Llama kind, for inference: the same numbers with joined projections and few operations."""

    def __init__(self, layer, config):
        attention = layer.self_attn
        self.module = attention
        self.heads = config.num_attention_heads
        self.kv_heads = kv_heads(config)
        self.width = attention.head_dim
        self.first_norm = norm_of(layer.input_layernorm)
        self.second_norm = norm_of(layer.post_attention_layernorm)
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = joined(attention.o_proj)
        self.up = joined(layer.mlp.gate_proj, layer.mlp.up_proj)
        self.down = joined(layer.mlp.down_proj)

    def __call__(self, x, mask, cache: SlotCache, angles, index: int):
        """x (B, T, D) -> (B, T, D). angles: see `signed`; index: the layer's place in the cache."""
        rotated_heads = self.heads + self.kv_heads  # queries and keys rotate together
        normed = F.rms_norm(x, x.shape[-1:], *self.first_norm) if self.first_norm else x
        qkv = F.linear(normed, *self.qkv).view(*x.shape[:2], rotated_heads + self.kv_heads, self.width)
        qkv = qkv.transpose(1, 2)  # (B, heads, T, w)
        qk = qkv[:, :rotated_heads]
        qk = qk * angles[0] + qk.roll(self.width // 2, -1) * angles[1]
        key, value = cache.update(qk[:, self.heads :], qkv[:, rotated_heads:], index)
        seen, _ = slot_attention(self.module, qk[:, : self.heads], key, value, mask, scaling=self.width**-0.5)
        x = x + F.linear(seen.reshape(*x.shape[:2], -1), *self.out)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], *self.second_norm), *self.up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, *self.down)


def signed(angles):
    """Rotary cosines and sines (B, T, w) -> both (B, 1, T, w), the sines of the first half negative.

    A rotation is then x * cos + roll(x, w / 2) * sin.
    """
    cos, sin = angles
    low, high = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-low, high], -1)[:, None]


@torch.inference_mode()
def fuse(layers, config, rotary) -> list[FusedLayer] | None:
    """FusedLayers with the weights as they are now, or None where the modules should run: in large models, and in
    layers of another kind, which is not looked up but tried, on random input.
    """
    if sum(p.numel() for layer in layers for p in layer.parameters()) > FUSE_BELOW:
        return None
    layer = copy.deepcopy(layers[0]).float()  # in float32 another activation function shows
    device = next(layers[0].parameters()).device
    x = torch.randn(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    cache = SlotCache(config, 2, 4, x.dtype, device, layers=1)
    positions, mask = attend(cache, slice(0, 2), torch.zeros(2, dtype=torch.long, device=device), 3, 3)
    angles = rotary(x, positions)
    try:
        own = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=angles)
        fused = FusedLayer(layer, config)(x, mask, cache, signed(angles), 0)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return [FusedLayer(layer, config) for layer in layers] if torch.allclose(own, fused, atol=1e-4) else None


def fuse_model(model) -> list[FusedLayer] | None:
    """`fuse` for all of a model's layers."""
    decoder = model.get_decoder()
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return None
    return fuse(decoder.layers, model.config, decoder.rotary_emb)


# ---------------------------------------------------------------- loading and checking


@torch.inference_mode()
def agrees(model, fused_layers) -> tuple[bool, float]:
    """Whether five tokens through the engine's path give the logits of the model's own -> (bool, largest gap)."""
    ids = torch.arange(1, 6, device=model.device)[None] % model.config.vocab_size
    cache = SlotCache(model.config, 1, 8, model.dtype, model.device)
    parts = []
    for start, end in ((0, 3), (3, 5)):
        lens = torch.tensor([start], device=ids.device)
        parts.append(forward(model, cache, slice(0, 1), ids[:, start:end], lens, end, fused_layers=fused_layers))
    logits = model.get_output_embeddings()(torch.cat(parts, 1))
    gap = (logits - model(input_ids=ids, use_cache=False).logits).abs().max().item()
    return gap < (1e-3 if model.dtype == torch.float32 else 0.5), gap


def load_tokenizer(name: str):
    """The tokenizer of a folder or a hub name. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(find_folder(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {name}: cannot load its tokenizer: {reason(error)}") from error


def check_context(name: str, tokens: int) -> None:
    """Raises UserError if the model of that name has no room for a prompt and response of so many tokens."""
    try:
        limit = getattr(AutoConfig.from_pretrained(find_folder(name)), "max_position_embeddings", None)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {name}: cannot read its config.json: {reason(error)}") from error
    if limit and tokens > limit:
        raise UserError(too_long(tokens, limit))


def too_long(tokens: int, limit: int) -> str:
    """What to say when prompt and response do not fit the model."""
    sizes = f"prompt + response of {tokens} tokens is longer than the model's context of {limit}"
    return f"{sizes}: lower --max-new or shorten the prompt"


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer) from a folder or a hub name. Raises UserError naming what is missing or not supported."""
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(find_folder(name), dtype=dtype, attn_implementation="slots")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"--model {name}: cannot load it: {reason(error)}") from error
    check_supported(model)
    return model.to(device).eval(), tokenizer


def check_supported(model) -> None:
    """Refuse models whose cache is not plain attention, or whose logits are not lm_head(last hidden state).

    Layer types are read from the config; the rest is tried: five tokens through both paths. Raises UserError.
    """
    config = model.config
    name = type(model).__name__
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary in ("dynamic", "longrope"):
        raise UserError(
            f"{name}: its rotary angles ({rotary}) depend on the longest row of a batch, "
            "so a response would depend on its company"
        )
    odd = sorted({*(getattr(config, "layer_types", None) or [])} - {"full_attention"})
    if odd or getattr(config, "sliding_window", None):
        raise UserError(
            f"{name}: its cache is not plain attention ({', '.join(odd) or 'sliding_window'}); "
            "Llama, Qwen2, Qwen3, Mistral without a window and the like work"
        )
    try:
        good, gap = agrees(model, None)
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        raise UserError(f"{name}: the engine cannot run it ({type(error).__name__}: {error})") from error
    if not good:
        raise UserError(f"{name}: the engine's logits differ from the model's own by {gap:.2g}, so it is not supported")


def stop_tokens(model, tokenizer) -> set[int]:
    """Ids that end a response: the tokenizer's eos and what the generation config adds. Raises UserError if none."""
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    ids -= {None}
    if not ids:
        raise UserError(f"{tokenizer.name_or_path} has no end-of-sequence token, so responses could not end")
    return ids


def bfloat16(model):
    """The model with its weights in bfloat16, in place.

    Not `model.bfloat16()`: that rounds the buffers, too, and rotary frequencies rounded to 8 bits are other angles far
    from the start.
    """
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


def free_memory(device: torch.device) -> int | None:
    """Bytes of GPU memory that torch can still hand out; None on a CPU, where memory is taken as it is touched."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
