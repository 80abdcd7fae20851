"""The key/value cache, the attention over it, and how many sequences fit the memory.

A static cache with one length per sequence. A forward feeds T new tokens to each of B sequences; the keys and values of
sequence b go behind its lens[b] valid entries:

    positions = lens[:, None] + arange(T)                  where the new entries go        (B, T)
    mask      = arange(kv_len) <= positions[..., None]     what each new token may see     (B, T, kv_len)

Rejecting draft tokens costs nothing: only the length of the sequence changes. Entries beyond it are hidden by the mask
and are overwritten later.

Legend: B sequences, T new tokens per sequence, w head width, S = kv_len cache entries that take part, `groups` query
heads per key/value head.
Left out: paged memory (a slot holds a whole sequence), sliding windows, linear attention.
"""

import math
import mmap
import sys
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, Cache

from parts.cli import UserError

FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # kinds of rotary angles that depend on the position alone


def kv_heads(config) -> int:
    """Return the number of key/value heads of a model."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def zeros_when_touched(shape: tuple[int, ...], dtype: torch.dtype, device) -> torch.Tensor:
    """Return `torch.zeros`. On a CPU a page of memory is taken when it is first written, so a slot takes what its
    sequence needs, not what the longest one could need.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS") or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the tensor keeps it alive
    return torch.frombuffer(pages, dtype=dtype).view(shape)


# ---------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of all layers in one tensor (layers, 2, slots, kv heads, max_len, w); one length per slot.

    The lengths are the engine's. A forward reads and writes the cache through a `CacheWindow`.
    """

    def __init__(self, config, slots: int, max_len: int, dtype, device, layers: int | None = None):
        self.heads = kv_heads(config)
        self.groups = config.num_attention_heads // self.heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (layers or config.num_hidden_layers, 2, slots, self.heads, max_len, width)
        self.data = zeros_when_touched(shape, dtype, device)
        # views of each layer, made once because at batch 1 the time to make them shows: keys, values, both flattened
        self.views = [(k, v, k.flatten(0, 2), v.flatten(0, 2)) for k, v in self.data]
        self.minus_inf = torch.tensor(-torch.inf, dtype=dtype, device=device)  # the two values of a mask
        self.zero = torch.tensor(0.0, dtype=dtype, device=device)
        # 0, 1, 2 ...: positions, slots or columns (a short cache has fewer positions than a round may have columns)
        self.numbers = torch.arange(max(slots, max_len + 16), device=device)
        first = torch.arange(slots * self.heads, device=device) * max_len
        self.first = first.view(slots, self.heads, 1)  # index of each slot's and head's first entry in the flat views
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None  # (max_len, w) each: angles of all positions

    @property
    def max_len(self) -> int:
        """Return how many entries a slot holds."""
        return self.data.shape[4]

    def angles(self, rotary, positions: torch.Tensor):
        """Return `signed_angles` of positions (B, T), looked up in a table: that takes 5 us, and the module 60. Angles
        that depend on more than the position (on the length of the longest sequence) are left to the module.
        """
        if getattr(rotary, "rope_type", None) not in FIXED_ANGLES:
            return signed_angles(rotary(self.zero, positions))
        if self.table is None:
            cos, sin = signed_angles(rotary(self.zero, self.numbers[None, : self.max_len]))
            self.table = cos[0, 0].contiguous(), sin[0, 0].contiguous()
        return tuple(F.embedding(positions, part)[:, None] for part in self.table)

    def copy(self, source: int, targets: slice, length: int) -> None:
        """Copy the first `length` entries of slot `source` to the slots `targets`, which may include it."""
        self.data[:, :, targets, :, :length] = self.data[:, :, source, None, :, :length].clone()

    def move_entries(self, slots, sources, targets) -> None:
        """In each of the slots (B,), copy the entry at position sources (B,) to position targets (B,)."""
        self.data[:, :, slots, :, targets] = self.data[:, :, slots, :, sources]


class CacheWindow(Cache):
    """The part of a KVCache that one forward works on. To the model's modules it is their `past_key_values`.

    slots: those that take part, B of them; entries (B * heads * T,): where the new ones go in the cache's flat views;
    kv_len: how many entries of each slot are read.
    """

    def __init__(self, cache: KVCache, slots: slice, entries: torch.Tensor, kv_len: int):
        self.layers = []  # the base class reads it
        self.cache = cache
        self.slots = slots
        self.entries = entries
        self.kv_len = kv_len

    def update(self, key, value, layer, *args, **kwargs):
        """Write key and value (B, heads, T, w) of a layer -> the keys and values to attend to, (B, heads, S, w)."""
        keys, values, flat_keys, flat_values = self.cache.views[layer]
        flat_keys.index_copy_(0, self.entries, key.flatten(0, 2))
        flat_values.index_copy_(0, self.entries, value.flatten(0, 2))
        return keys[self.slots, :, : self.kv_len], values[self.slots, :, : self.kv_len]

    def get_seq_length(self, layer=0):
        """Return 0: transformers asks, but positions are always given."""
        return 0

    def columns(self, count: int) -> list["CacheWindow"]:
        """Return a window for each of the `count` = T new entries alone."""
        batch = self.slots.stop - self.slots.start
        by_column = self.entries.view(batch, -1, count).movedim(-1, 0).flatten(1)  # (T, B * heads)
        return [CacheWindow(self.cache, self.slots, entries, self.kv_len) for entries in by_column]


# ---------------------------------------------------------------- attention


class TreeShape(NamedTuple):
    """The shape of new entries that are not a chain (acceptance.py)."""

    depth: torch.Tensor  # (T,) how far each stands behind the valid entries of its sequence
    sees: torch.Tensor  # (T, T) bool: which of the new entries it may see


class AttentionInputs(NamedTuple):
    """Where new tokens stand, what they may see, and where their keys and values go."""

    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, 1, groups * T, S) additive, folded as `slot_attention` wants it, once for all layers
    window: CacheWindow


def attention_inputs(
    cache: KVCache, slots: slice, lens: torch.Tensor, kv_len: int, columns: int, tree: TreeShape | None = None
) -> AttentionInputs:
    """Return the inputs of a forward of T = `columns` new tokens for each of the B slots.

    lens (B,): valid entries of each; kv_len: cache entries that any of the new tokens sees.
    """
    kv_len = min(kv_len, cache.max_len)
    # When a drafter catches up over gaps of unequal length, the padding of a sequence may reach beyond its slot. The
    # last entry of a slot belongs to no token, so it can take that.
    entries = (lens[:, None] + cache.numbers[:columns]).clamp(max=cache.max_len - 1)  # (B, T)
    everywhere = cache.numbers[:kv_len]
    if tree is None:
        positions = entries
        hidden = everywhere > positions[..., None]  # (B, T, S)
    else:
        positions = lens[:, None] + tree.depth  # (B, T)
        new = everywhere - lens[:, None]  # (B, S): the number of the new token whose entry this is; negative: old
        sees = tree.sees[:, new.clamp(0, columns - 1)].transpose(0, 1)  # (B, T, S)
        hidden = ~((new < 0)[:, None] | (sees & (new < columns)[:, None]))
    mask = torch.where(hidden, cache.minus_inf, cache.zero)
    flat = (cache.first[slots] + entries[:, None]).flatten()  # (B * heads * T,)
    window = CacheWindow(cache, slots, flat, kv_len)
    return AttentionInputs(positions, mask.repeat(1, cache.groups, 1)[:, None], window)


def slot_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """The one attention function of this project: query (B, heads, T, w), key and value (B, kv heads, S, w)
    -> (B, T, heads, w), None.

    With a mask (the engine), query heads that share a key head are folded into query rows, (B, kv heads, groups * T,
    w), so that keys and values are not copied; the mask (B, 1, groups * T, S) is folded alike. Without one (training)
    it is plain causal attention over right-padded rows. Raises UserError for soft-capped and sink attention.
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


# transformers has no mask function for this name, so the engine's masks, and None, reach the attention as they are
AttentionInterface.register("slots", slot_attention)
# cuDNN would make a plan for every number of keys and values, 30 ms each, and that number grows with every round
torch.backends.cuda.enable_cudnn_sdp(False)


def signed_angles(angles):
    """Rotary cosines and sines (B, T, w) -> both (B, 1, T, w), the sines of the first half negative.

    A rotation is then x * cos + roll(x, w / 2) * sin.
    """
    cos, sin = angles
    low, high = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-low, high], -1)[:, None]


# ---------------------------------------------------------------- memory


def slot_bytes(config, max_len: int, columns: int, dtype: torch.dtype, drafters: int, keep_hidden: bool) -> int:
    """Return the memory that a slot of max_len tokens takes: keys and values of the policy and of drafters, features if
    they are kept, and its part of the masks of a round of `columns` tokens.
    """
    cache = KVCache(config, 1, max_len, dtype, "meta", config.num_hidden_layers + drafters)
    features = keep_hidden * config.hidden_size * dtype.itemsize
    # of policy and drafter, each as `attention_inputs` makes it: what is hidden, then the mask before and after folding
    masks = (1 + (drafters > 0)) * columns * (1 + (1 + cache.groups) * dtype.itemsize)
    return cache.data.nbytes + max_len * (features + masks)


def sequences_that_fit(wanted: int, max_len: int, slot_bytes: int, free: float, reserved: float) -> int:
    """Return how many sequences of max_len tokens fit: as many as wanted, or as four fifths of the free bytes hold,
    less the reserved ones. Prints a line if they are fewer than wanted. Raises UserError if not one fits.
    """
    fits = int((free * 0.8 - reserved) / slot_bytes)
    sizes = f"{slot_bytes / 1e9:.3f} GB each, {free / 1e9:.1f} GB are free"
    if fits < 1 and reserved:
        taken = f"{reserved / 1e9:.1f} GB are for the update"
        raise UserError(f"no sequence of {max_len} tokens fits ({sizes}, {taken}): lower --micro-tokens or --max-new")
    if fits < 1:
        raise UserError(f"no sequence of {max_len} tokens fits ({sizes}): lower --max-new")
    if fits < wanted:
        print(f"memory holds {fits} sequences of {max_len} tokens, not {wanted} ({sizes})", file=sys.stderr)
    return min(wanted, fits)
