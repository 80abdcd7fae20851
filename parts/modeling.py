"""How a Hugging Face causal LM runs in the engine: its cache, its attention, and faster layers.

The model is the stock module. Three small things make it serve many rows of different lengths, and fast:

    SlotCache        a static cache with one length per row: going back is free, since only the length changes
    slot_attention   folds grouped query heads into query rows, so that keys and values need not be copied
    FusedLayer       for layers of the Llama kind: joined projections, without the modules' overhead

One forward feeds row b the T tokens ids[b], whose keys and values go behind the lens[b] entries that are valid:

    slots = lens[:, None] + arange(T)            where the new entries go          (B, T)
    mask  = arange(view) <= slots[..., None]     what they see, view = max(lens)+T (B, T, view)

Which models can is found out when they are loaded (loading.py).

Legend: B rows, T new tokens per row, D model width, w head width, `groups` query heads per key head.
Left out: paged memory (a slot holds a whole sequence), sliding windows, linear attention.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, Cache

from parts.common import UserError

FUSE_BELOW = 100_000_000  # weights; in larger models the overhead does not show: on a CPU they are packed instead
PACK_FROM = 1_000_000  # weights of a head
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # kinds of rotary angles that depend on the position alone


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
        self.never = torch.tensor(-torch.inf, dtype=dtype, device=device)  # what a mask adds
        self.always = torch.tensor(0.0, dtype=dtype, device=device)
        # of places, rows and columns (of a short slot there are more columns than places)
        self.numbers = torch.arange(max(slots, length + 16), device=device)
        first = torch.arange(slots * self.heads, device=device) * length
        self.first = first.view(slots, self.heads, 1)  # of each slot and head, in the flattened views
        self.rows = slice(0, 0)  # these three: see `place`
        self.view = 0
        self.flat = torch.zeros(0, dtype=torch.long)
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None  # (length, w) each: angles of all positions

    @property
    def length(self) -> int:
        """Entries that a slot holds."""
        return self.data.shape[4]

    def place(self, rows: slice, slots: torch.Tensor, view: int) -> None:
        """rows: those that take part; slots (B, T): positions of the new tokens; view: how many entries anyone sees."""
        self.rows = rows
        self.view = view
        self.flat = (self.first[rows] + slots[:, None]).flatten()  # (B * heads * T,) into (slots * heads * length)

    def update(self, key, value, layer, *args, **kwargs):
        """key, value (B, heads, T, w) -> all that the rows may look at, (B, heads, view, w)."""
        keys, values, keys_flat, values_flat = self.views[layer]
        keys_flat.index_copy_(0, self.flat, key.flatten(0, 2))
        values_flat.index_copy_(0, self.flat, value.flatten(0, 2))
        return keys[self.rows, :, : self.view], values[self.rows, :, : self.view]

    def get_seq_length(self, layer=0):
        """Asked by transformers; positions are always given."""
        return 0

    def angles(self, rotary, positions: torch.Tensor):
        """`signed` angles of positions (B, T): a look into a table takes 5 us, the module 60. What depends on more than
        the position (how long the longest sequence is) is left to the module.
        """
        if getattr(rotary, "rope_type", None) not in FIXED_ANGLES:
            return signed(rotary(self.never, positions))
        if self.table is None:
            cos, sin = signed(rotary(self.never, self.numbers[None, : self.length]))
            self.table = cos[0, 0].contiguous(), sin[0, 0].contiguous()
        return tuple(F.embedding(positions, part)[:, None] for part in self.table)

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


# a name without a mask function: our masks, or None, pass untouched
AttentionInterface.register("slots", slot_attention)
# cuDNN would make a plan for every number of keys and values, 30 ms each, and that number grows with every round
torch.backends.cuda.enable_cudnn_sdp(False)


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
    slots = (lens[:, None] + cache.numbers[:columns]).clamp(max=cache.length - 1)  # (B, T)
    place = cache.numbers[:view]
    if tree is None:
        positions = slots
        unseen = place > slots[..., None]  # (B, T, view)
    else:
        positions = lens[:, None] + tree.depth  # (B, T)
        new = place - lens[:, None]  # (B, view): which of the new entries stands there; below 0: an old one
        sees = tree.sees[:, new.clamp(0, columns - 1)].transpose(0, 1)  # (B, T, view)
        unseen = ~((new < 0)[:, None] | (sees & (new < columns)[:, None]))
    mask = torch.where(unseen, cache.never, cache.always)
    cache.place(rows, slots, view)
    return positions, mask.repeat(1, cache.groups, 1)[:, None]


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


# ---------------------------------------------------------------- layers without overhead


class Linear:
    """Linear layers that read the same input, as one: x (..., in) -> (..., out of all of them together).

    In a small model, and on a GPU, the weights are joined, which saves calls. In a large one on a CPU they are laid out
    anew, in the blocks that oneDNN multiplies best (`pack`): for 4 to 128 rows, which is what drafts and batches feed,
    that takes a third less time than the usual product, which lays out the weights at every call. One to three rows
    only read the weights, and many rows hide it, so there the layers' own weights are used. The price is a second copy.
    """

    FEWEST, MOST = 4, 128  # rows for which the packed weights are used

    def __init__(self, parts: list[tuple], pack: bool = False):
        """parts: (weight (out, in), bias (out,) or None) of each layer, see `weights_of`."""
        self.own = parts
        self.pack = pack
        self.packed: torch.Tensor | None = None  # in oneDNN's layout
        self.weight: torch.Tensor | None = None  # (out of all, in); None: packed, and each layer's own
        self.bias: torch.Tensor | None = None  # (out of all,)
        self.read()

    def read(self) -> None:
        """Take the layers' weights as they are now. What was joined before stays where it is, and is filled anew."""
        weights, biases = zip(*self.own)
        if any(bias is not None for bias in biases):
            self.bias = refilled(self.bias, *(torch.zeros_like(w[:, 0]) if b is None else b for w, b in self.own))
        if self.pack and can_pack(weights[0]):
            self.packed = packed(torch.cat(weights))
        self.weight = refilled(self.weight, *weights) if self.packed is None else None

    def lend(self) -> None:
        """From now on the layers' own weights are parts of the joined ones: no second copy, nothing to fill anew."""
        for kind, joined in enumerate((self.weight, self.bias)):
            parts = [part[kind] for part in self.own]
            if joined is None or any(part is None for part in parts):
                continue
            for part, piece in zip(parts, joined.split([len(part) for part in parts])):
                part.data = piece

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None and self.FEWEST <= x.numel() // x.shape[-1] <= self.MOST:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        outputs = [F.linear(x, weight, bias) for weight, bias in self.own]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def refilled(old: torch.Tensor | None, *parts: torch.Tensor) -> torch.Tensor:
    """The parts, joined, where `old` is if that has their shape, so that its address stays. One part alone is returned
    as it is unless there is an old one to fill. What has been lent is full already.
    """
    first = parts[0]
    rows = sum(len(part) for part in parts)
    if old is None or old.shape != (rows, *first.shape[1:]):
        with torch.inference_mode(False):  # weights that learn may come to lie in it
            return first.detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])
    start = 0
    for part in parts:
        if part.data_ptr() != old[start:].data_ptr():
            old[start : start + len(part)] = part
        start += len(part)
    return old


def weights_of(*linears) -> list[tuple]:
    """(weight, bias) of linear modules, as Linear wants them."""
    return [(x.weight, x.bias) for x in linears]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout for weights of this type, on this device."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight (out, in) in oneDNN's layout; None where it does not pay (fewer outputs than inputs), or does not
    exist.
    """
    if weight.shape[0] <= weight.shape[1] or not can_pack(weight):
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return None


def norm_of(module):
    """(weight, epsilon) of an RMSNorm; None for the identity, which a drafter's layer has in front."""
    return None if isinstance(module, torch.nn.Identity) else (module.weight, module.variance_epsilon)


class FusedLayer:
    """A decoder layer of the Llama kind, for inference: the same numbers with joined projections and few operations."""

    def __init__(self, layer, config, pack: bool = False):
        attention = layer.self_attn
        self.module = attention
        self.heads = config.num_attention_heads
        self.kv_heads = kv_heads(config)
        self.width = attention.head_dim
        self.first_norm = norm_of(layer.input_layernorm)
        self.second_norm = norm_of(layer.post_attention_layernorm)
        self.qkv = Linear(weights_of(attention.q_proj, attention.k_proj, attention.v_proj), pack)
        self.out = Linear(weights_of(attention.o_proj), pack)
        self.up = Linear(weights_of(layer.mlp.gate_proj, layer.mlp.up_proj), pack)
        self.down = Linear(weights_of(layer.mlp.down_proj), pack)
        self.projections = (self.qkv, self.out, self.up, self.down)

    def read(self) -> None:
        """Take the layer's weights as they are now."""
        for projection in self.projections:
            projection.read()

    def lend(self) -> None:
        """See Linear.lend."""
        for projection in self.projections:
            projection.lend()

    def __call__(self, x, mask, cache: SlotCache, angles, index: int):
        """x (B, T, D) -> (B, T, D). angles: see `signed`; index: the layer's place in the cache."""
        rotated_heads = self.heads + self.kv_heads  # queries and keys rotate together
        normed = F.rms_norm(x, x.shape[-1:], *self.first_norm) if self.first_norm else x
        qkv = self.qkv(normed).view(*x.shape[:2], rotated_heads + self.kv_heads, self.width)
        qkv = qkv.transpose(1, 2)  # (B, heads, T, w)
        qk = qkv[:, :rotated_heads]
        qk = torch.addcmul(qk * angles[0], qk.roll(self.width // 2, -1), angles[1])
        key, value = cache.update(qk[:, self.heads :], qkv[:, rotated_heads:], index)
        seen, _ = slot_attention(self.module, qk[:, : self.heads], key, value, mask, scaling=self.width**-0.5)
        x = x + self.out(seen.reshape(*x.shape[:2], -1))
        gate, up = self.up(F.rms_norm(x, x.shape[-1:], *self.second_norm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def signed(angles):
    """Rotary cosines and sines (B, T, w) -> both (B, 1, T, w), the sines of the first half negative.

    A rotation is then x * cos + roll(x, w / 2) * sin.
    """
    cos, sin = angles
    low, high = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-low, high], -1)[:, None]


@torch.inference_mode()
def fuse(layers, config, rotary) -> list[FusedLayer] | None:
    """FusedLayers with the weights as they are now, or None where the modules should run: on a CPU in large models that
    cannot be packed, and in layers of another kind, which is not looked up but tried, on random input.

    On a GPU, where every kernel less counts, the joined weights are lent to the modules: a second copy of a large model
    would not fit.
    """
    some_weight = next(layers[0].parameters())
    device = some_weight.device
    large = sum(p.numel() for layer in layers for p in layer.parameters()) > FUSE_BELOW
    if large and device.type == "cpu" and not can_pack(some_weight):
        return None
    layer = copy.deepcopy(layers[0]).float()  # in float32 another activation function shows
    x = torch.randn(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    cache = SlotCache(config, 2, 4, x.dtype, device, layers=1)
    positions, mask = attend(cache, slice(0, 2), torch.zeros(2, dtype=torch.long, device=device), 3, 3)
    try:
        angles = rotary(x, positions)
        own = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=angles)
        fused = FusedLayer(layer, config, large)(x, mask, cache, signed(angles), 0)
    except (AttributeError, TypeError, RuntimeError):
        return None
    if not torch.allclose(own, fused, atol=1e-4):
        return None
    fused_layers = []
    for layer in layers:
        fused_layers.append(FusedLayer(layer, config, large))
        if device.type == "cuda":
            fused_layers[-1].lend()
    return fused_layers


def fuse_model(model) -> list[FusedLayer] | None:
    """`fuse` for all of a model's layers."""
    decoder = model.get_decoder()
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return None
    return fuse(decoder.layers, model.config, decoder.rotary_emb)


@torch.inference_mode()
def fast_head(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states (..., D) -> logits (..., V), with the weights as they are now."""
    head = model.get_output_embeddings()
    if head.weight.numel() < PACK_FROM or not can_pack(head.weight):
        return head_of(model)
    packed_head = Linear(weights_of(head), pack=True)
    return head_of(model) if packed_head.packed is None else scaled(packed_head, logit_scale(model.config))
