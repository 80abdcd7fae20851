"""Decoder layers of the Llama kind for inference, faster than the modules they stand for, with the same numbers.

    JoinedLinear    several linear layers that read the same input, as one matrix product (small models, and GPUs)
    PackedLinear    the same on a CPU for large weights, laid out in the blocks that oneDNN multiplies best
    FusedLayer      a whole decoder layer with one of the two, and without the modules' overhead

Whether a layer can be fused is not looked up in a list but tried on random input (`fuse`).

Legend: B sequences, T new tokens per sequence, D model width, w head width.
"""

import copy

import torch
from torch.nn import functional as F

from parts.engine.kv_cache import SlotCache, attend, kv_heads, signed, slot_attention

FUSE_BELOW = 100_000_000  # weights; in larger models the overhead does not show: on a CPU they are packed instead


PACK_FROM = 1_000_000  # weights of a head


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
