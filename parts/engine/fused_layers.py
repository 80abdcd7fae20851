"""Decoder layers of the Llama kind for inference, faster than the modules they stand for, with the same numbers.

    JoinedLinear    several linear layers that read the same input, as one matrix product
    PackedLinear    the same on a CPU for weights that do not fit its caches, in the blocks that oneDNN multiplies best
    FusedLayer      a whole decoder layer with one of the two, and without the modules' overhead

Whether a layer can be fused is not looked up in a list but tried on random input (`fuse`).

Legend: B sequences, T new tokens per sequence, D model width, w head width.
"""

import copy

import torch
from torch.nn import functional as F

from parts.devices import has_bfloat16_arithmetic, is_gpu
from parts.engine.kv_cache import CacheWindow, KVCache, attention_inputs, kv_heads, signed_angles, slot_attention

FUSE_BELOW = 100_000_000  # weights; in larger models the overhead does not show, unless they are packed
PACK_FROM = 1 << 18  # weights; smaller matrices stay in a core's cache, where packed ones are slower

Weights = list[tuple[torch.Tensor, torch.Tensor | None]]  # (weight (out, in), bias (out,) or None) of each linear layer


# ---------------------------------------------------------------- linear layers


class JoinedLinear:
    """Linear layers that read the same input, as one: x (..., in) -> (..., out of all of them together).

    The weights are copied into one buffer that never moves, since a CUDA graph remembers its address. With `share` the
    layers' own weights become parts of that buffer: no second copy, and nothing to copy when they change.
    """

    def __init__(self, parts: Weights, share: bool = False):
        weights = [weight.detach() for weight, _ in parts]
        biases = [bias for _, bias in parts]
        self.parts = parts
        self.bias: torch.Tensor | None = None
        with torch.inference_mode(False):  # weights that learn may come to lie in the buffers
            if len(parts) == 1:  # nothing to join
                self.weight, self.bias = weights[0], biases[0]
            else:
                self.weight = torch.cat(weights)
                if any(bias is not None for bias in biases):
                    self.bias = torch.cat([bias_or_zeros(*part) for part in parts])
        if share:
            become_parts_of(self.weight, [weight for weight, _ in parts])
            if all(bias is not None for bias in biases):
                become_parts_of(self.bias, biases)

    def read_weights(self) -> None:
        """Copy the layers' weights as they are now."""
        copy_into(self.weight, [weight for weight, _ in self.parts])
        if self.bias is not None:
            copy_into(self.bias, [bias_or_zeros(*part) for part in self.parts])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same on a CPU, with a second copy of the weights in the blocks that oneDNN multiplies best.

    The usual product lays out the weights at every call. Its time over that of the packed one, for SmolLM2-135M's
    layers and head on an AMD EPYC: 1.3 to 2.2 with one row, 2 to 4 with two, 1.8 to 4 with 5 to 8, 1.2 to 1.7 with 160.
    The packed weights are used whatever the number of rows, so that a row's numbers do not depend on it more than they
    must.
    """

    def __init__(self, parts: Weights, packed: torch.Tensor):
        self.parts = parts
        self.packed = packed  # in oneDNN's layout
        has_bias = any(bias is not None for _, bias in parts)
        self.bias = torch.cat([bias_or_zeros(*part) for part in parts]) if has_bias else None

    @classmethod
    def of(cls, parts: Weights) -> "PackedLinear | None":
        """Return the layers packed; None where oneDNN cannot."""
        packed = pack(torch.cat([weight for weight, _ in parts]))
        return None if packed is None else cls(parts, packed)

    def read_weights(self) -> None:
        """Pack the layers' weights as they are now."""
        self.packed = pack(torch.cat([weight for weight, _ in self.parts]))
        if self.bias is not None:
            self.bias = torch.cat([bias_or_zeros(*part) for part in self.parts])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def as_one_linear(parts: Weights, share: bool = False, pack: bool = True) -> JoinedLinear | PackedLinear:
    """Return the linear layers as one: joined, or packed where that is faster and possible, unless pack is False."""
    large = sum(weight.numel() for weight, _ in parts) >= PACK_FROM
    packed = PackedLinear.of(parts) if pack and large else None
    return packed or JoinedLinear(parts, share)


def bias_or_zeros(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the bias (out,) of a linear layer, zeros if it has none."""
    return torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()


@torch.no_grad()
def copy_into(buffer: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Copy the parts, one behind the other, into the buffer. A part that already lies there is left out."""
    for place, part in zip(buffer.split([len(part) for part in parts]), parts):
        if part.data_ptr() != place.data_ptr():
            place.copy_(part)


def become_parts_of(buffer: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Let parameters lie in the buffer, one behind the other; it holds their values already."""
    for place, part in zip(buffer.split([len(part) for part in parts]), parts):
        part.data = place


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether oneDNN has a faster layout for weights of this type, on this device."""
    fast = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16_arithmetic())
    return weight.device.type == "cpu" and fast and torch.backends.mkldnn.is_available()


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the weight (out, in) in oneDNN's layout; None where there is none."""
    if not can_pack(weight):
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return None


# ---------------------------------------------------------------- decoder layers


def norm_of(module):
    """Return (weight, epsilon) of an RMSNorm; None for the identity that a drafter's layer has in its place."""
    return None if isinstance(module, torch.nn.Identity) else (module.weight, module.variance_epsilon)


class FusedLayer:
    """A decoder layer of the Llama kind for inference: the same numbers, with joined projections and few operations.

    share, pack: see `as_one_linear`.
    """

    def __init__(self, layer, config, share: bool = False, pack: bool = True):
        attention = layer.self_attn
        self.module = attention
        self.heads = config.num_attention_heads
        self.kv_heads = kv_heads(config)
        self.width = attention.head_dim
        self.first_norm = norm_of(layer.input_layernorm)
        self.second_norm = norm_of(layer.post_attention_layernorm)

        def one_linear(*modules: torch.nn.Module) -> JoinedLinear | PackedLinear:
            return as_one_linear([(module.weight, module.bias) for module in modules], share, pack)

        self.qkv = one_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = one_linear(attention.o_proj)
        self.gate_up = one_linear(layer.mlp.gate_proj, layer.mlp.up_proj)
        self.down = one_linear(layer.mlp.down_proj)

    def read_weights(self) -> None:
        """Take the layer's weights as they are now."""
        for projection in (self.qkv, self.out, self.gate_up, self.down):
            projection.read_weights()

    def __call__(self, x, mask, window: CacheWindow, angles, index: int):
        """x (B, T, D) -> (B, T, D). angles: from `signed_angles`; index: the layer's place in the cache."""
        rotated_heads = self.heads + self.kv_heads  # queries and keys rotate together
        normed = F.rms_norm(x, x.shape[-1:], *self.first_norm) if self.first_norm else x
        qkv = self.qkv(normed).view(*x.shape[:2], rotated_heads + self.kv_heads, self.width)
        qkv = qkv.transpose(1, 2)  # (B, heads, T, w)
        qk = qkv[:, :rotated_heads]
        qk = torch.addcmul(qk * angles[0], qk.roll(self.width // 2, -1), angles[1])
        key, value = window.update(qk[:, self.heads :], qkv[:, rotated_heads:], index)
        seen, _ = slot_attention(self.module, qk[:, : self.heads], key, value, mask, scaling=self.width**-0.5)
        x = x + self.out(seen.reshape(*x.shape[:2], -1))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], *self.second_norm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@torch.inference_mode()
def fuse(layers, config, rotary) -> list[FusedLayer] | None:
    """Return FusedLayers with the weights as they are now; None where the modules should run: large models on a CPU
    that cannot be packed, and layers of another kind, which are found by trying one on random input.

    On a GPU, where every kernel less counts, the layers' own weights become parts of the joined ones: a second copy of
    a large model would not fit.
    """
    some_weight = next(layers[0].parameters())
    device = some_weight.device
    large = sum(p.numel() for layer in layers for p in layer.parameters()) > FUSE_BELOW
    if large and device.type == "cpu" and not can_pack(some_weight):
        return None
    layer = copy.deepcopy(layers[0]).float()  # in float32 another activation function shows
    x = torch.randn(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    cache = KVCache(config, 2, 4, x.dtype, device, layers=1)
    no_entries = torch.zeros(2, dtype=torch.long, device=device)
    positions, mask, window = attention_inputs(cache, slice(0, 2), no_entries, 3, 3)
    try:
        angles = rotary(x, positions)
        own = layer(x, attention_mask=mask, past_key_values=window, use_cache=True, position_embeddings=angles)
        fused = FusedLayer(layer, config)(x, mask, window, signed_angles(angles), 0)
    except (AttributeError, TypeError, RuntimeError):
        return None
    if not torch.allclose(own, fused, atol=1e-4):
        return None
    return [FusedLayer(layer, config, share=is_gpu(device)) for layer in layers]


def fuse_model(model) -> list[FusedLayer] | None:
    """Return `fuse` of all layers of a model."""
    decoder = model.get_decoder()
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return None
    return fuse(decoder.layers, model.config, decoder.rotary_emb)
