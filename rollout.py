"""The rollout engine: many sequences through one Hugging Face causal LM, fast, reproducible token by token, and speculative.

One round feeds every live row its newest token `cur` (not in the cache yet) and k drafts behind it, and samples the policy's own token at each:

    ids   = [cur, d1 .. dk]                                                               (B, T),  T = k + 1
    slots = lens[:, None] + arange(T)            where row b's new keys and values go     (B, T)
    mask  = arange(view) <= slots                what they see: view = max(lens) + T      (B, 1, T, view)
    y     = argmax(logits / temperature + g)     g = Gumbel noise, see below              (B, T)
    accepted = (y[:, :k] == ids[:, 1:]).cumprod(1).sum(1)                                 (B,)
    emit y[:, :accepted + 1];  lens += accepted + 1      THIS is the rollback: rejected slots are overwritten later

k = 0 is plain decoding: the same code.

Coupled sampling. g[v] = G(seed of the sequence, index of the token, v) is a counter-based hash, not a generator's state. argmax(logits + g) is an
exact sample of softmax(logits) (the Gumbel-max trick), and it depends on nothing but the sequence: not on the batch it ran in, the slot, the worker, or
what ran before. Drafters sample with the SAME noise on THEIR logits, so a drafter that knows the policy's distribution guesses its sample, at any temperature.
Every emitted token is the policy's own sample: no drafter, tree or strategy can bias it, and the same seed gives the same rollout with speculation on or off,
on 1 or 8 workers. (Up to ties: fp32 kernels round differently at different shapes, which parts two runs at about one token in a million. That is
a change of sample, never of distribution.) `verify_ratio` is the textbook alternative (Leviathan et al. 2211.17192), for comparison.

Trees. With width w each draft has w - 1 siblings, the next best tokens of the drafter under the same noise: leaves beside the chain. If the policy leaves the
chain for a sibling, that sibling is accepted too, and its keys and values move into the chain's place.

Continuous batching. Rows that end leave at once: the last live row moves into the hole, so the live rows stay contiguous and a round costs what
its live rows cost. Free slots are refilled from an iterator of groups; a group's prompt is prefilled once and its keys and values are copied to its samples.

The model is the stock Hugging Face module. Three small things make it fast: a cache with one length per row (`SlotCache`), an attention
function that folds grouped query heads into query rows instead of copying keys and values (`slot_attention`), and for small models of the
Llama kind layers without the modules' overhead (`FusedLayer`).

Legend: B live rows, T new tokens per row, k draft length, V vocabulary, D model width, G samples per prompt.
Left out: paged memory (a slot holds a whole sequence), prefix sharing between prompts, prefill in chunks, beam search, deeper trees than chain-and-siblings.
"""

import argparse
import copy
import functools
import hashlib
import sys
import time
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.utils import logging

from tasks import UserError

# ---------------------------------------------------------------- sampling


def sequence_seed(*parts):
    """A 63-bit seed from numbers and strings, e.g. (run seed, RL step, prompt index, sample index). Stable across machines."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def mix(x):
    """A bijective hash of int32 (C. Wellons' lowbias32). int32 products wrap; `& mask` turns the arithmetic shift into a logical one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel(seeds, index, vocab):
    """Gumbel noise of token `index` of each sequence. seeds (B, 2) int32, index (B, T) int -> (B, T, vocab) float32."""
    key = mix(index.int() * 0x1E3779B9 + seeds[:, :1])  # (B, T)
    v = torch.arange(vocab, dtype=torch.int32, device=seeds.device)
    bits = mix(mix(key[..., None] + v) ^ (key * 0x5851F42D + seeds[:, 1:])[..., None])  # (B, T, V)
    # u in (0, 1): tiny u, which makes the LARGE noise that wins, keeps 31 bits of resolution; 1 - u would have only 24
    u = (((bits >> 1) & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy. top_k 0 and top_p 1 are off. max_new: tokens per response, the stop token included."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new: int = 512

    def __post_init__(self):
        for name, good in (("temperature", self.temperature >= 0), ("top_k", self.top_k >= 0), ("top_p", 0 < self.top_p <= 1),
                           ("max_new", self.max_new >= 1)):
            if not good:
                raise UserError(f"{name} = {getattr(self, name)} makes no sense: temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_new >= 1")


def narrow(logits, sampling):
    """(logits / temperature, the same with what top-k and top-p forbid at -inf), float32, shape as logits (..., V)."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    allowed = logits
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        allowed = allowed.masked_fill(allowed < kth, -torch.inf)
    if sampling.top_p < 1:
        sorted_logits, order = allowed.sort(dim=-1, descending=True, stable=True)
        p = sorted_logits.softmax(-1)
        drop = p.cumsum(-1) - p >= sampling.top_p  # keep the smallest set that reaches top_p: always at least one
        allowed = allowed.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits, allowed


def noise_for(sampling, seeds, index, vocab, stream=0):
    """Gumbel noise (B, T, V), or 0 when greedy. Streams are independent of each other: ratio verification needs three."""
    return gumbel(seeds, index + (stream << 20), vocab) if sampling.temperature > 0 else torch.zeros((), device=seeds.device)


def logprob_of(logits, y):
    """log softmax(logits)[y]. Of the logits before top-k and top-p: they narrow what may be drawn; the trainer scores without them."""
    return logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sample(logits, sampling, noise):
    """Tokens (B, T) and their log-probabilities (B, T). logits (B, T, V) of any float type, noise from `noise_for`."""
    scaled, allowed = narrow(logits, sampling)
    y = (allowed + noise).argmax(-1)
    return y, logprob_of(scaled, y)


def verify_ratio(logits, q_logits, drafts, sampling, seeds, index):
    """Speculative sampling by probability ratio: accept draft d with chance min(1, p(d) / q(d)), else draw from max(p - q, 0).

    logits (B, k+1, V) of the policy, q_logits (B, k, V) that the drafts (B, k) were sampled from, index (B, k+1).
    -> tokens y (B, k+1), log-probabilities, accepted (B,): y[:, :accepted + 1] count, as with coupled verification.
    The distribution is the policy's; the tokens are not those of plain decoding.
    """
    scaled, allowed = narrow(logits, sampling)
    p, q = allowed.softmax(-1), narrow(q_logits, sampling)[1].softmax(-1)
    chosen = drafts[..., None]
    u = torch.exp(-torch.exp(-noise_for(sampling, seeds, index[:, :-1], 1, stream=2)))  # the Gumbel's own uniform; (B, k, 1)
    accepted = (u * q.gather(-1, chosen) < p[:, :-1].gather(-1, chosen))[..., 0].long().cumprod(1).sum(1)
    residual = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], 1)  # after the last draft there is nothing to subtract
    y = (residual.log() + noise_for(sampling, seeds, index, p.shape[-1])).argmax(-1)
    kept = torch.arange(drafts.shape[1], device=drafts.device) < accepted[:, None]
    y = torch.cat([torch.where(kept, drafts, y[:, :-1]), y[:, -1:]], 1)
    return y, logprob_of(scaled, y), accepted


# ---------------------------------------------------------------- cache and attention


def kv_heads(config):
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


class SlotCache(Cache):
    """Keys and values of all layers in one static tensor (layers, 2, slots, kv heads, length, head width); each row has its own length.

    Before a forward, `place` says where the new tokens go; rejected or stale entries beyond a row's length are never seen (the mask) and
    are overwritten later, so going back is free: only the row's length changes.
    """

    def __init__(self, config, slots, length, dtype, device, layers=None):
        self.layers = []  # the base class asks
        self.heads = kv_heads(config)
        self.groups = config.num_attention_heads // self.heads  # query heads per key head
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.data = torch.zeros(layers or config.num_hidden_layers, 2, slots, self.heads, length, width, dtype=dtype, device=device)
        self.pairs = [(k, v, k.flatten(0, 2), v.flatten(0, 2)) for k, v in self.data]  # views, made once: at batch 1 their making shows

    def place(self, rows, slots, view):
        """rows: the slice of rows that take part; slots (B, T): positions of the new tokens; view: how far anyone looks."""
        self.rows, self.view = rows, view
        head = torch.arange(rows.start * self.heads, rows.stop * self.heads, device=slots.device).view(-1, self.heads, 1)
        self.flat = (head * self.data.shape[4] + slots[:, None]).flatten()  # (B * heads * T,) into (slots * heads * length)

    def update(self, key, value, layer, *args, **kwargs):
        """key, value (B, heads, T, width) -> all that the rows may look at, (B, heads, view, width)."""
        k, v, k_flat, v_flat = self.pairs[layer]
        k_flat.index_copy_(0, self.flat, key.flatten(0, 2))
        v_flat.index_copy_(0, self.flat, value.flatten(0, 2))
        return k[self.rows, :, :self.view], v[self.rows, :, :self.view]

    def get_seq_length(self, layer=0):
        return 0  # positions are always given

    def move(self, source, target, length):
        """Copy the first `length` entries of row `source` to the rows `target` (a slice)."""
        self.data[:, :, target, :, :length] = self.data[:, :, source, None, :, :length].clone()  # a row may be among its own targets

    def relocate(self, rows, source, target):
        """In each of the rows (B,), copy the entry at position source (B,) to position target (B,)."""
        self.data[:, :, rows, :, target] = self.data[:, :, rows, :, source]


def slot_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """query (B, heads, T, w), key and value (B, kv heads, S, w) -> (B, T, heads, w). The one attention function of this project.

    With a mask (the engine): heads that share a key fold into query rows, (B, kv heads, heads/kv * T, w), so nothing is copied;
    the mask (B, 1, heads/kv * T, S) is folded alike.
    Without one (training): plain causal attention over right-padded rows.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__}: soft-capped or sink attention is not supported")
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if mask is None:
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)
    else:
        folded = query.reshape(batch, key.shape[1], groups * length, width)
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(batch, heads, length, -1)
    return out.transpose(1, 2), None


logging.disable_progress_bar()  # "Loading weights" for each of N workers says nothing
AttentionInterface.register("slots", slot_attention)  # a name without a mask function: transformers passes our masks, or None, untouched


class FusedLayer:
    """A decoder layer of the Llama kind, for inference: the same numbers with joined projections and none of the module's overhead."""

    def __init__(self, layer, config):
        attention, mlp = layer.self_attn, layer.mlp

        def join(*linears):
            biases = [torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in linears]
            return torch.cat([x.weight for x in linears]), torch.cat(biases) if any(x.bias is not None for x in linears) else None

        self.qkv, self.out = join(attention.q_proj, attention.k_proj, attention.v_proj), join(attention.o_proj)
        self.up, self.down = join(mlp.gate_proj, mlp.up_proj), join(mlp.down_proj)
        self.norms = [None if isinstance(n, torch.nn.Identity) else (n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.module, self.heads = attention, (config.num_attention_heads, kv_heads(config), attention.head_dim)

    def __call__(self, x, mask, cache, angles, index):
        """x (B, T, D) -> (B, T, D). angles: see `signed`; index: the layer's place in the cache."""
        F, (h, kv, w) = torch.nn.functional, self.heads
        normed = F.rms_norm(x, x.shape[-1:], *self.norms[0]) if self.norms[0] else x  # a drafter's layer has no first norm
        qkv = F.linear(normed, *self.qkv).view(*x.shape[:2], h + 2 * kv, w).transpose(1, 2)  # (B, heads, T, w)
        turn, value = qkv[:, :h + kv], qkv[:, h + kv:]
        turn = turn * angles[0] + turn.roll(w // 2, -1) * angles[1]  # queries and keys rotate together
        key, value = cache.update(turn[:, h:], value, index)
        seen, _ = slot_attention(self.module, turn[:, :h], key, value, mask, scaling=w ** -0.5)
        x = x + F.linear(seen.reshape(*x.shape[:2], -1), *self.out)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], *self.norms[1]), *self.up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, *self.down)


def signed(angles):
    """Rotary cosines and sines (B, T, w) -> the same as (B, 1, T, w), the sines of the first half negative: a rotation is then x cos + roll(x, w / 2) sin."""
    cos, sin = angles
    low, high = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-low, high], -1)[:, None]


@torch.inference_mode()
def fuse(layers, config, rotary):
    """FusedLayers with the weights as they are now, or None where the modules should run: in models of over 100M weights, where the overhead does not
    show and a second copy of the weights would, and in layers of another kind, which is not looked up but tried on random input."""
    if sum(p.numel() for layer in layers for p in layer.parameters()) > 100_000_000:
        return None
    layer, device = copy.deepcopy(layers[0]).float(), next(layers[0].parameters()).device  # in float32 another activation function shows
    x = torch.randn(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    cache = SlotCache(config, 2, 4, x.dtype, device, layers=1)
    positions, mask = attend(cache, slice(0, 2), torch.zeros(2, dtype=torch.long, device=device), 3, 3)
    angles = rotary(x, positions)
    try:
        own = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=angles)
        good = torch.allclose(own, FusedLayer(layer, config)(x, mask, cache, signed(angles), 0), atol=1e-4)
        return [FusedLayer(layer, config) for layer in layers] if good else None
    except (AttributeError, TypeError, RuntimeError):
        return None


def fuse_model(model):
    """`fuse` for all of a model's layers."""
    decoder = model.get_decoder()
    return fuse(decoder.layers, model.config, decoder.rotary_emb) if all(hasattr(decoder, x) for x in ("embed_tokens", "rotary_emb", "norm")) else None


@torch.inference_mode()
def agrees(model, quick):
    """Whether five tokens through the engine's path (with or without fused layers) give the logits of the model's own -> (bool, largest gap)."""
    ids = torch.arange(1, 6, device=model.device)[None] % model.config.vocab_size
    cache = SlotCache(model.config, 1, 8, model.dtype, model.device)
    parts = [forward(model, cache, slice(0, 1), ids[:, i:j], torch.tensor([i], device=ids.device), j, quick=quick) for i, j in ((0, 3), (3, 5))]
    gap = (model.get_output_embeddings()(torch.cat(parts, 1)) - model(input_ids=ids, use_cache=False).logits).abs().max().item()
    return gap < (1e-3 if model.dtype == torch.float32 else 0.5), gap


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from a folder or the hub. Raises UserError naming what is missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="slots")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {name!r} (`make base` makes base/): {str(error).splitlines()[0]}") from error
    check_supported(model)
    return model.to(device).eval(), tokenizer


def check_supported(model):
    """Refuse models whose cache is not plain attention, or whose logits are not lm_head(last hidden state). Raises UserError.

    Layer types are read from the config; the rest is not listed but tried: five tokens through the engine's path and through the model's own.
    """
    config, name = model.config, type(model).__name__
    if (kind := (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")) in ("dynamic", "longrope"):
        raise UserError(f"{name}: its rotary angles ({kind}) depend on the longest row of a batch, so a response would depend on its company")
    odd = sorted({*(getattr(config, "layer_types", None) or [])} - {"full_attention"})
    if odd or getattr(config, "sliding_window", None):
        raise UserError(f"{name}: its cache is not plain attention ({', '.join(odd) or 'sliding_window'}); "
                        "Llama, Qwen2, Qwen3, Mistral without a window and the like work")
    try:
        good, gap = agrees(model, None)
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        raise UserError(f"{name}: the engine cannot run it ({type(error).__name__}: {error})") from error
    if not good:
        raise UserError(f"{name}: the engine's logits differ from the model's own by {gap:.2g}, so it is not supported")


def attend(cache, rows, lens, view, columns, tree=None):
    """Where T new entries go and what they see -> positions (B, T), additive mask (B, 1, groups * T, view). Tells the cache, too.

    tree: None for a chain, or (depth (T,), sees (T, T) bool): how deep each entry is, and which of the new entries it sees.
    """
    room = cache.data.shape[4]
    view = min(view, room)
    # a drafter's rows catch up over gaps of unequal length: what is padding in a row's T may reach beyond its slot, whose last entry is nobody's
    slots = (lens[:, None] + torch.arange(columns, device=lens.device)).clamp(max=room - 1)  # (B, T)
    place = torch.arange(view, device=lens.device)
    if tree is None:
        positions, unseen = slots, place > slots[..., None]  # (B, T, view)
    else:
        depth, sees = tree
        positions, new = lens[:, None] + depth, place - lens[:, None]  # (B, T), (B, view)
        unseen = ~((new < 0)[:, None] | (sees[:, new.clamp(0, columns - 1)].transpose(0, 1) & (new < columns)[:, None]))
    mask = torch.zeros(unseen.shape, dtype=cache.data.dtype, device=lens.device).masked_fill_(unseen, -torch.inf)
    cache.place(rows, slots, view)
    return positions, mask.repeat(1, cache.groups, 1)[:, None]  # folded as slot_attention wants it, once for all layers


def forward(model, cache, rows, ids, lens, view, tree=None, quick=None):
    """Feed ids (B, T) to the rows (a slice), whose first lens (B,) cache entries are valid -> last hidden states (B, T, D). `get_output_embeddings` makes logits of them.

    quick: from `fuse`, or None for the model's own modules.
    """
    positions, mask = attend(cache, rows, lens, view, ids.shape[1], tree)
    decoder = model.get_decoder()
    if quick:
        x = decoder.embed_tokens(ids)
        angles = signed(decoder.rotary_emb(x, positions))
        for i, layer in enumerate(quick):
            x = layer(x, mask, cache, angles, i)
        return decoder.norm(x)
    return decoder(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state


# ---------------------------------------------------------------- the engine


def free_memory(device):
    """Bytes of GPU memory that torch can still hand out; None on a CPU, where memory is taken only as it is touched."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


@dataclass
class Group:
    """A prompt and the seeds of the samples wanted from it. index: the caller's name for it. begun: how many tokens at the prompt's end are already part of
    the response; its noise and max_new go on where they stopped, so a response that is made in pieces is the same."""
    index: int
    prompt: list
    seeds: list
    begun: int = 0


@dataclass
class Response:
    group: int      # Group.index
    sample: int     # which of the group's seeds
    prompt: list
    tokens: list    # with the stop token, if one came
    logprobs: torch.Tensor  # (len(tokens),) float32, cpu: log-probability under the behaviour policy at the sampling temperature
    stopped: bool   # False: cut at max_new
    hidden: torch.Tensor = None  # (len(prompt) + len(tokens) - 1, D), cpu: last hidden state at every position but the last, if kept
    grade: object = None     # tasks.Grade, filled in by whoever grades
    rounds: int = 0          # that it took; each cost the policy one token and the drafts
    drafts: int = 0          # that were verified for it, siblings too


@dataclass(frozen=True)
class Draft:
    """A way to draft one round. kind: a key of Engine.drafters; k: draft length, 0 is plain decoding; width: 1 is a chain."""
    kind: str = ""
    k: int = 0
    width: int = 1


@dataclass
class Row:
    """The host's view of a live row."""
    group: Group
    sample: int
    tokens: list
    rounds: int = 0
    drafts: int = 0

    @property
    def length(self):
        """Valid cache entries: all but the newest token."""
        return len(self.group.prompt) + len(self.tokens) - 1


class Engine:
    """Generates responses for groups. slots: rows that run at once; context: longest prompt + response (see `reserve`).

    drafters: name -> drafter, for speculation (drafter.LearnedDrafts, drafter.NGramDrafts); verify: "coupled" or "ratio". frozen: neither the model's nor the
    drafters' weights will change, so they are read once and not at each `generate`.
    stats tells of the last `generate`: rounds, spec_rounds, spec_row_rounds and spec_drafts (rows, and k, summed over them), tokens, spec_tokens, drafted and accepted by depth, seconds in all, drafting, verifying.
    """

    LONGEST = 16  # drafts and siblings in a round, at most

    def __init__(self, model, stop_tokens, slots=64, context=64, keep_hidden=False, drafters=None, verify="coupled", frozen=False, spare=0):
        self.spare = spare  # bytes of memory to leave to others
        self.model, self.slots, self.context, self.verify, self.frozen, self.ready = model, slots, 0, verify, frozen, False
        self.most = slots  # rows at once; lower it, and a group that would make more waits
        self.drafters = drafters or {}
        self.keep_hidden = keep_hidden or any(d.needs_hidden for d in self.drafters.values())
        quick = fuse_model(model)
        self.fusable = bool(quick) and agrees(model, quick)[0]
        self.stop_at(stop_tokens)
        self.reserve(context)

    def stop_at(self, tokens):
        """From now on these tokens end a response. Call it between rollouts."""
        self.stop_set, self.stop = set(tokens), torch.tensor(sorted(tokens), device=self.model.device)

    def reserve(self, context):
        """Make room for sequences of `context` tokens, prompt and response together. Call it between rollouts. Raises UserError."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or context
        if context > limit:
            raise UserError(f"prompt + response of {context} tokens is longer than the model's context of {limit}: lower --max-new or shorten the prompt")
        if context <= self.context:
            return
        self.context, config, device = context, self.model.config, self.model.device
        room = context + self.LONGEST + 1  # rejected drafts may stand beyond the end
        self.cache = self.tokens = self.logprobs = self.hidden = None  # what was there makes room
        self.slots = slots = self.affordable(room)
        self.most = min(self.most, slots)
        self.cache = SlotCache(config, slots, room, self.model.dtype, device)
        self.lens = torch.zeros(slots, dtype=torch.long, device=device)   # valid cache entries of each row
        self.start = torch.zeros(slots, dtype=torch.long, device=device)  # where its response begins
        self.seeds = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(slots, room, dtype=torch.long, device=device)   # x_t; the newest, `cur`, stands at lens
        self.logprobs = torch.zeros(slots, room, device=device)                   # of x_t
        self.hidden = torch.zeros(slots, room, config.hidden_size, dtype=self.model.dtype, device=device) if self.keep_hidden else None  # h_t
        for drafter in self.drafters.values():
            drafter.reserve(self, slots, room)

    def affordable(self, room):
        """As many slots as asked for, or as four fifths of the free memory, less `spare`, hold: keys, values, features, and the logits of a round."""
        free = free_memory(self.model.device)
        if free is None:
            return self.slots
        config, dtype = self.model.config, self.model.dtype
        each = SlotCache(config, 1, room, dtype, "meta", config.num_hidden_layers + len(self.drafters)).data.nbytes + self.keep_hidden * room * config.hidden_size * dtype.itemsize
        each += (self.LONGEST + 1) * config.vocab_size * 4 * 4  # float32: logits, noise, their sum, hash
        fits = int((free * 0.8 - self.spare) / each)
        if fits < 1:
            raise UserError(f"a sequence of {room} tokens needs {each / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
                            + (f" and {self.spare / 1e9:.1f} GB are for the update: lower --micro-tokens or --max-new" if self.spare else ": lower --max-new"))
        if fits < self.slots:
            print(f"memory holds {fits} rows of {room} tokens, not {self.slots} ({each / 1e9:.3f} GB each, {free / 1e9:.1f} GB free): {fits} slots it is", file=sys.stderr)
        return min(self.slots, fits)

    @torch.inference_mode()
    def generate(self, groups, sampling, choose=None, on_token=None):
        """Yields a Response as each one ends. groups: an iterable of Group, asked for the next one only when its rows fit.

        choose(live rows) -> Draft, asked before each round; without it decoding is plain. If it has an `observe` (see strategy.py), that hears of each round.
        on_token(group index, sample, token), if given, hears every token as it is made (for streaming).
        """
        groups, waiting, size, self.live = iter(groups), None, 0, []
        self.stats = dict(rounds=0, spec_rounds=0, tokens=0, spec_row_rounds=0, spec_tokens=0, spec_drafts=0, seconds=0.0, draft_seconds=0.0,
                          verify_seconds=0.0, drafted=[0] * self.LONGEST, accepted=[0] * self.LONGEST)
        started, live, observe = time.perf_counter(), self.live, getattr(choose, "observe", None)
        if not (self.frozen and self.ready):
            self.quick, self.ready = fuse_model(self.model) if self.fusable else None, True  # the weights as they are now
            for drafter in self.drafters.values():
                drafter.begin()
        while True:
            batch, held = [], len(live)
            while not held or held + size <= self.most:  # a group is asked for only when one like the last would fit: other workers may have room for it
                waiting = waiting or next(groups, None)
                if waiting is None:
                    break
                self.check(waiting, sampling)
                size = len(waiting.seeds)
                if held and held + size > self.most:
                    break
                batch.append(waiting)
                held, waiting = held + size, None
            if batch:
                self.admit(batch)
            if not live:
                self.stats["seconds"] = time.perf_counter() - started
                return
            ended = self.round(choose(live) if choose else Draft(), sampling, on_token, observe)
            for i in reversed(ended):  # from the back: the last row fills the hole
                yield self.take(i)

    def check(self, group, sampling):
        need = len(group.prompt) - group.begun + sampling.max_new
        if not group.prompt:
            raise UserError(f"prompt {group.index} is empty: a policy needs at least one token to start from")
        if group.begun >= sampling.max_new:
            raise UserError(f"prompt {group.index}: the {group.begun} tokens that are there leave nothing of max_new {sampling.max_new}")
        if need > self.context:
            raise UserError(f"prompt {group.index} has {len(group.prompt) - group.begun} tokens; with max_new {sampling.max_new} it exceeds the context of {self.context}")
        if len(group.seeds) > self.slots:
            raise UserError(f"a group of {len(group.seeds)} samples does not fit {self.slots} slots: raise --slots, or lower --samples")

    def admit(self, batch):
        """Prefill prompt[:-1] of each group once, in the rows behind the live ones, then give every sample its copy. cur = prompt[-1]."""
        first, device = len(self.live), self.lens.device
        prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(g.prompt) for g in batch], batch_first=True).to(device)  # (n, longest)
        longest = prompts.shape[1] - 1
        if longest:
            hidden = forward(self.model, self.cache, slice(first, first + len(batch)), prompts[:, :-1],
                             torch.zeros(len(batch), dtype=torch.long, device=device), longest, quick=self.quick)
        ends = [first]
        for g in batch:
            ends.append(ends[-1] + len(g.seeds))
            self.live += [Row(g, k, []) for k in range(len(g.seeds))]
        for i in reversed(range(len(batch))):  # group i sits in row first + i: spread from the back, so that no prompt is overwritten early
            rows = slice(ends[i], ends[i + 1])
            self.cache.move(first + i, rows, len(batch[i].prompt) - 1)
            self.tokens[rows, :longest + 1] = prompts[i]
            if self.keep_hidden and longest:
                self.hidden[rows, :longest] = hidden[i]
        rows, new = slice(first, ends[-1]), self.live[first:]
        self.lens[rows] = torch.tensor([len(r.group.prompt) - 1 for r in new], device=device)
        self.start[rows] = self.lens[rows] + 1 - torch.tensor([r.group.begun for r in new], device=device)
        seeds = torch.tensor([r.group.seeds[r.sample] for r in new], device=device)
        self.seeds[rows] = torch.stack([seeds, seeds >> 32], 1).int()  # .int() keeps the low 32 bits
        for drafter in self.drafters.values():
            drafter.admit(rows)

    def round(self, draft, sampling, on_token=None, observe=None):
        """Draft, verify, accept for all live rows -> indices of the rows that ended."""
        n, k, width, live = len(self.live), draft.k, draft.width, self.live
        if not 0 <= k * width <= self.LONGEST:
            raise UserError(f"draft length {k} x width {width}: 0 to {self.LONGEST} drafts fit a round")
        # the ratio rule is for chains of sampled drafts that tell their q; everything else is verified by equality, which is always exact
        by_ratio = self.verify == "ratio" and k > 0 and width == 1 and sampling.temperature > 0 and self.drafters[draft.kind].samples
        rows, each = slice(0, n), torch.arange(n, device=self.lens.device)
        lens, steps = self.lens[rows], torch.arange(k + 1, device=self.lens.device)
        index = (lens + 1 - self.start[rows])[:, None] + steps  # which token of the response each column samples, (B, k+1)
        began = time.perf_counter()
        noise = noise_for(sampling, self.seeds[rows], index, self.model.config.vocab_size)  # once, for drafter and verifier
        ids, tree = self.tokens[each, lens][:, None], None
        if k:
            theirs = noise_for(sampling, self.seeds[rows], index, noise.shape[-1], stream=1) if by_ratio else noise
            drafts, q_logits = self.drafters[draft.kind].propose(self, n, k, width, theirs, sampling)  # (B, k, width), (B, k, V)
            ids = torch.cat([ids, drafts[..., 0], drafts[..., 1:].flatten(1)], 1)  # (B, 1 + k * width): cur, chain, siblings by depth
            tree = caterpillar(k, width, ids.device) if width > 1 else None
        drafted = time.perf_counter()
        hidden = forward(self.model, self.cache, rows, ids, lens, max(r.length for r in live) + ids.shape[1], tree, self.quick)
        logits = self.model.get_output_embeddings()(hidden)
        if by_ratio:
            y, logprob, accepted = verify_ratio(logits, q_logits, ids[:, 1:k + 1], sampling, self.seeds[rows], index)
        else:
            y, logprob = sample(logits, sampling, noise if tree is None or noise.ndim == 0 else noise[:, tree[0]])
            accepted = (y[:, :k] == ids[:, 1:k + 1]).long().cumprod(1).sum(1)
        if tree is not None:  # did the policy leave the chain for a sibling?
            hit = (drafts[each, accepted.clamp(max=k - 1), 1:] == y.gather(1, accepted[:, None])) & (accepted < k)[:, None]  # (B, width - 1)
            leaf = k + 1 + accepted.clamp(max=k - 1) * (width - 1) + hit.long().argmax(1)  # its column
            accepted = accepted + hit.any(1)
            path = torch.where(hit.any(1)[:, None] & (steps == accepted[:, None]), leaf[:, None], steps)  # (B, k+1) columns of the accepted path
            y, logprob, hidden = y.gather(1, path), logprob.gather(1, path), hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
            self.cache.relocate(each, lens + path.gather(1, accepted[:, None])[:, 0], lens + accepted)
        # a stop token or the length limit may come inside the accepted run
        is_stop = torch.isin(y, self.stop)
        before_stop = torch.where(is_stop, steps, k + 1).amin(1)
        emitted = torch.minimum(torch.minimum(accepted, before_stop) + 1, sampling.max_new - index[:, 0])  # (B,)
        at = lens[:, None] + steps
        self.tokens[rows].scatter_(1, at + 1, y)
        self.logprobs[rows].scatter_(1, at + 1, logprob)
        if self.keep_hidden:
            self.hidden[rows].scatter_(1, at[..., None].expand_as(hidden), hidden)
        self.lens[rows] += emitted
        host = torch.cat([emitted[:, None], accepted[:, None], y], 1).tolist()  # the round's one wait for the device
        ended, stats, emitted_now, reached = [], self.stats, 0, [0] * (k + 2)  # reached[j]: rows that had exactly j right guesses, then those with at least j
        for i, (row, (count, right, *new)) in enumerate(zip(live, host)):
            row.tokens += new[:count]
            row.rounds += 1
            row.drafts += k * width
            if new[count - 1] in self.stop_set or row.group.begun + len(row.tokens) >= sampling.max_new:
                ended.append(i)
            if on_token:
                for token in new[:count]:
                    on_token(row.group.index, row.sample, token)
            reached[right] += 1
            emitted_now += count
        for j in reversed(range(k + 1)):
            reached[j] += reached[j + 1]
        now = time.perf_counter()
        stats["rounds"] += 1
        stats["tokens"] += emitted_now
        if k:
            stats["spec_rounds"] += 1
            stats["spec_row_rounds"] += n
            stats["spec_tokens"] += emitted_now
            stats["spec_drafts"] += n * k
            for j in range(k):
                stats["drafted"][j] += reached[j]
                stats["accepted"][j] += reached[j + 1]
        stats["draft_seconds"] += drafted - began
        stats["verify_seconds"] += now - drafted
        if observe:
            observe(n, draft, now - began, reached[:k], reached[1:k + 1])
        return ended

    def take(self, i):
        """The finished response in row i; the last live row moves into its slot."""
        row, last = self.live[i], self.live.pop()
        end = row.length + 1
        response = Response(row.group.index, row.sample, row.group.prompt, row.tokens, self.logprobs[i, len(row.group.prompt):end].cpu().clone(),
                            row.tokens[-1] in self.stop_set, self.hidden[i, :end - 1].cpu().clone() if self.keep_hidden else None,
                            rounds=row.rounds, drafts=row.drafts)
        if last is not row:
            source, end = len(self.live), last.length + 1
            self.cache.move(source, slice(i, i + 1), end)
            for x in (self.lens, self.start, self.seeds):
                x[i] = x[source]
            for x in (self.tokens, self.logprobs, self.hidden):
                if x is not None:
                    x[i, :end] = x[source, :end]
            for drafter in self.drafters.values():
                drafter.move(source, i)
            self.live[i] = last
        return response


@functools.lru_cache
def caterpillar(k, width, device):
    """(depth (T,), sees (T, T)) of a chain of k drafts with width - 1 siblings each: T = 1 + k * width, in the order of `round`."""
    chain = list(range(k + 1))
    depth = torch.tensor(chain + [j for j in chain[1:] for _ in range(width - 1)])
    columns = torch.arange(len(depth))
    sees = (columns <= k) & (depth < depth[:, None]) | (columns == columns[:, None])  # the chain above it, and itself
    return depth.to(device), sees.to(device)


def report(stats):
    """One line about a rollout."""
    s, spec = stats, stats["spec_row_rounds"]
    depth = " ".join(f"{a / d:.2f}" for a, d in zip(s["accepted"], s["drafted"]) if d)
    return (f"{s['rounds']} rounds, {s['tokens']} tokens, {s['tokens'] / max(1e-9, s['seconds']):.0f} tokens/s, "
            + (f"{s['spec_tokens'] / spec:.2f} tokens per row and speculative round ({s['spec_rounds'] / s['rounds']:.0%} of rounds), "
               f"acceptance by depth {depth}, " if spec else "") + f"draft {s['draft_seconds']:.2f} s, verify {s['verify_seconds']:.2f} s")


def stop_tokens(model, tokenizer):
    """Ids that end a response: the tokenizer's eos and whatever the generation config adds."""
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    if ids == {None}:
        raise UserError(f"{tokenizer.name_or_path} has no end-of-sequence token, so responses could not end")
    return ids - {None}


# ---------------------------------------------------------------- command line


def main():
    flags = argparse.ArgumentParser(description="Generate from the command line, token by token.\n\n"
                                    'example: python rollout.py --model base --prompt "3,7,8=29<think>"',
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="base", help="a folder or a hub name")
    flags.add_argument("--prompt", required=True, help="the text as it is; no chat template is added")
    flags.add_argument("--samples", type=int, default=1)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--drafter", default="", help="folder of a drafter (see drafter.py): decode speculatively, the same tokens faster")
    flags.add_argument("--k", type=int, default=6, help="draft length with --drafter")
    for name, kind in Sampling.__annotations__.items():
        flags.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(Sampling, name))
    args = flags.parse_args()
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__annotations__})
    model, tokenizer = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer.encode(args.prompt, add_special_tokens=False)
    drafters, choose = {}, None
    if args.drafter:
        from drafter import Drafter, LearnedDrafts  # here, because drafter.py builds on this file
        drafter = Drafter(model)
        drafter.load(args.drafter)
        drafters, choose = {"learned": LearnedDrafts(drafter)}, lambda live: Draft("learned", args.k)
    engine = Engine(model, stop_tokens(model, tokenizer), slots=max(1, args.samples), context=len(ids) + sampling.max_new, drafters=drafters)
    group = Group(0, ids, [sequence_seed(args.seed, 0, 0, k) for k in range(args.samples)])

    shown = {}  # text is decoded again at each token: some tokens are parts of a character

    def stream(_, k, token):
        if k == 0:
            shown.setdefault("ids", []).append(token)
            text = tokenizer.decode(shown["ids"], skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                print(text[len(shown.get("text", "")):], end="", flush=True)
                shown["text"] = text

    print(args.prompt, end="")
    others = [r for r in engine.generate([group], sampling, choose, stream) if r.sample]
    print()
    for r in sorted(others, key=lambda r: r.sample):
        print(args.prompt + tokenizer.decode(r.tokens, skip_special_tokens=True))
    print(f"[{report(engine.stats)}]", file=sys.stderr)


def run(main):
    """Run a script's main: a UserError becomes one line and exit status 2, Ctrl-C one line and 130."""
    try:
        main()
    except UserError as error:
        sys.exit(print(f"{sys.argv[0].rpartition('/')[2]}: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped", file=sys.stderr) or 130)


if __name__ == "__main__":
    run(main)
