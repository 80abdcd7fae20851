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

import sys
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, Cache

from parts.cli import UserError

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


def signed(angles):
    """Rotary cosines and sines (B, T, w) -> both (B, 1, T, w), the sines of the first half negative.

    A rotation is then x * cos + roll(x, w / 2) * sin.
    """
    cos, sin = angles
    low, high = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-low, high], -1)[:, None]


def rows_that_fit(wanted: int, room: int, row_bytes: int, free: float, reserved: float) -> int:
    """Rows of `room` tokens: as many as wanted, or as four fifths of the free bytes, less the reserved ones, hold. Says
    so if they are fewer. Raises UserError if there is no room for one.
    """
    fits = int((free * 0.8 - reserved) / row_bytes)
    sizes = f"{row_bytes / 1e9:.3f} GB each, {free / 1e9:.1f} GB are free"
    if fits < 1 and reserved:
        taken = f"{reserved / 1e9:.1f} GB are for the update"
        raise UserError(f"no row of {room} tokens fits ({sizes}, {taken}): lower --micro-tokens or --max-new")
    if fits < 1:
        raise UserError(f"no row of {room} tokens fits ({sizes}): lower --max-new")
    if fits < wanted:
        print(f"memory holds {fits} rows of {room} tokens, not {wanted} ({sizes})", file=sys.stderr)
    return min(wanted, fits)
