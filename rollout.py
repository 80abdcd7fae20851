"""The rollout engine: many sequences through one Hugging Face causal LM, fast, reproducible token by token.

One round feeds every live row its newest token `cur` (not in the cache yet) and samples the next one:

    slots = lens[:, None] + arange(T)            where row b's new keys and values go          (B, T)
    mask  = arange(view) <= slots                what they see: view = max(lens) + T           (B, 1, T, view)
    y     = argmax(logits / temperature + g)     g = Gumbel noise, see below                   (B, T)
    lens += 1

Coupled sampling. g[v] = G(seed of the sequence, index of the token, v) is a counter-based hash, not a generator's state. argmax(logits + g) is an
exact sample of softmax(logits) (the Gumbel-max trick), and it depends on nothing but the sequence: not on the batch it ran in, the slot, the worker, or
what ran before. The same seed gives the same rollout on 1 or 8 workers. (Up to ties: fp32 kernels round differently at different batch
shapes, which parts two runs at about one token in a million. That is a change of sample, never of distribution.)

Continuous batching. Rows that end leave at once: the last live row moves into the hole, so the live rows stay contiguous and a round costs what
its live rows cost. Free slots are refilled from an iterator of groups; a group's prompt is prefilled once and its keys and values are copied to its samples.

The model is the stock Hugging Face module. Two small things make it fast: a cache with one length per row (`SlotCache`), and an attention
function that folds grouped query heads into query rows instead of copying keys and values (`slot_attention`).

Legend: B live rows, T new tokens per row, V vocabulary, D model width, G samples per prompt.
Left out: paged memory (a slot holds a whole sequence), prefix sharing between prompts, prefill in chunks, beam search.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass, replace

import torch
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


def sample(logits, sampling, seeds, index):
    """Tokens (B, T) and their log-probabilities (B, T) under softmax(logits / temperature). logits (B, T, V) of any float type.

    top-k and top-p narrow what may be drawn, not the log-probability: that is what the trainer recomputes.
    """
    logits = logits.float()
    if sampling.temperature > 0:
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
    if sampling.temperature > 0:
        allowed = allowed + gumbel(seeds, index, logits.shape[-1])
    y = allowed.argmax(-1)
    return y, logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)


# ---------------------------------------------------------------- cache and attention


class SlotCache(Cache):
    """Keys and values of all layers in one static tensor (layers, 2, slots, kv heads, length, head width); each row has its own length.

    Before a forward, `place` says where the new tokens go; rejected or stale entries beyond a row's length are never seen (the mask) and
    are overwritten later, so going back is free: only the row's length changes.
    """

    def __init__(self, config, slots, length, dtype, device):
        self.layers = []  # the base class asks
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.groups = config.num_attention_heads // self.heads  # query heads per key head
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.data = torch.zeros(config.num_hidden_layers, 2, slots, self.heads, length, width, dtype=dtype, device=device)
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


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from a folder or the hub. Raises UserError naming what is missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="slots")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load a model from {name!r} (`make base` makes base/): {str(error).splitlines()[0]}") from error
    check_supported(model)
    return model.to(device).eval(), tokenizer


def check_supported(model):
    """Refuse models whose cache is not plain attention, or whose logits are not lm_head(last hidden state). Raises UserError.

    Layer types are read from the config; the rest is not listed but tried: five tokens through the engine's path and through the model's own.
    """
    config, name = model.config, type(model).__name__
    odd = sorted({*(getattr(config, "layer_types", None) or [])} - {"full_attention"})
    if odd or getattr(config, "sliding_window", None):
        raise UserError(f"{name}: its cache is not plain attention ({', '.join(odd) or 'sliding_window'}); "
                        "Llama, Qwen2, Qwen3, Mistral without a window and the like work")
    try:
        with torch.inference_mode():
            ids = torch.arange(1, 6, device=model.device)[None] % config.vocab_size
            cache = SlotCache(config, 1, 8, model.dtype, model.device)
            parts = [forward(model, cache, slice(0, 1), ids[:, i:j], torch.tensor([i], device=ids.device), j)[1] for i, j in ((0, 3), (3, 5))]
            gap = (torch.cat(parts, 1) - model(input_ids=ids, use_cache=False).logits).abs().max().item()
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        raise UserError(f"{name}: the engine cannot run it ({type(error).__name__}: {error})") from error
    if gap > (1e-3 if model.dtype == torch.float32 else 0.5):
        raise UserError(f"{name}: the engine's logits differ from the model's own by {gap:.2g}, so it is not supported")


def forward(model, cache, rows, ids, lens, view):
    """Feed ids (B, T) to the rows (a slice), whose first lens (B,) cache entries are valid -> hidden (B, T, D), logits (B, T, V)."""
    slots = lens[:, None] + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
    hidden_from = torch.arange(view, device=ids.device) > slots[..., None]  # (B, T, view)
    mask = torch.zeros(hidden_from.shape, dtype=cache.data.dtype, device=ids.device).masked_fill_(hidden_from, -torch.inf)
    mask = mask.repeat(1, cache.groups, 1)[:, None]  # (B, 1, groups * T, view): made once for all layers
    cache.place(rows, slots, view)
    hidden = model.get_decoder()(input_ids=ids, position_ids=slots, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden, model.get_output_embeddings()(hidden)


# ---------------------------------------------------------------- the engine


@dataclass
class Group:
    """A prompt and the seeds of the samples wanted from it. index: the caller's name for it."""
    index: int
    prompt: list
    seeds: list


@dataclass
class Response:
    group: int      # Group.index
    sample: int     # which of the group's seeds
    prompt: list
    tokens: list    # with the stop token, if one came
    logprobs: torch.Tensor  # (len(tokens),) float32, cpu: log-probability under the behaviour policy at the sampling temperature
    stopped: bool   # False: cut at max_new
    hidden: torch.Tensor = None  # (len(tokens), D) last hidden state that each token was sampled from, if asked for
    grade: object = None     # tasks.Grade, filled in by whoever grades


class Engine:
    """Generates responses for groups. slots: rows that run at once; context: longest prompt + response (see `reserve`).

    stats counts rounds, tokens, rows (summed over rounds) and seconds of the last `generate`.
    """

    def __init__(self, model, stop_tokens, slots=64, context=64, keep_hidden=False):
        self.model, self.slots, self.keep_hidden, self.context = model, slots, keep_hidden, 0
        self.stop = torch.tensor(sorted(stop_tokens), device=model.device)
        self.reserve(context)

    def reserve(self, context):
        """Make room for sequences of `context` tokens, prompt and response together. Call it between rollouts. Raises UserError."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or context
        if context > limit:
            raise UserError(f"prompt + response of {context} tokens is longer than the model's context of {limit}: lower --max-new or shorten the prompt")
        if context <= self.context:
            return
        self.context, config, slots, device = context, self.model.config, self.slots, self.model.device
        self.cache = SlotCache(config, slots, context, self.model.dtype, device)
        self.lens = torch.zeros(slots, dtype=torch.long, device=device)      # valid cache entries of each row
        self.cur = torch.zeros(slots, dtype=torch.long, device=device)       # newest token, not in the cache yet
        self.made = torch.zeros(slots, dtype=torch.long, device=device)      # tokens generated
        self.seeds = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(slots, context, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, context, device=device)
        self.hidden = torch.zeros(slots, context, config.hidden_size, dtype=self.model.dtype, device=device) if self.keep_hidden else None

    def state(self):
        """Everything that belongs to a row, besides its cache: what moves when a row moves."""
        return [x for x in (self.lens, self.cur, self.made, self.seeds, self.tokens, self.logprobs, self.hidden) if x is not None]

    @torch.inference_mode()
    def generate(self, groups, sampling, on_token=None):
        """Yields a Response as each one ends. groups: an iterable of Group, asked for the next one only when its rows fit.

        on_token(group index, sample, token), if given, hears every token as it is made (for streaming).
        """
        groups, waiting, live = iter(groups), None, []  # live: [group, sample, length of the prompt part in the cache] per row
        self.stats = dict(rounds=0, tokens=0, rows=0, seconds=0.0)
        started = time.perf_counter()
        while True:
            batch = []
            while groups is not None:  # take all groups that fit
                waiting = waiting or next(groups, None)
                if waiting is None:
                    groups = None
                    break
                self.check(waiting, sampling)
                if len(live) + sum(len(g.seeds) for g in batch) + len(waiting.seeds) > self.slots:
                    break
                batch.append(waiting)
                waiting = None
            if batch:
                self.admit(batch, live)
            if not live:
                self.stats["seconds"] = time.perf_counter() - started
                return
            y, done = self.round(len(live), max(g_len for *_, g_len in live) + 1, sampling)
            for row in live:
                row[2] += 1
            if on_token:
                for (group, k, _), token in zip(live, y.tolist()):
                    on_token(group.index, k, token)
            for row in [i for i, d in enumerate(done.tolist()) if d][::-1]:  # from the back: the last row fills the hole
                yield self.take(row, live)

    def check(self, group, sampling):
        need = len(group.prompt) + sampling.max_new
        if not group.prompt:
            raise UserError(f"prompt {group.index} is empty: a policy needs at least one token to start from")
        if need > self.context:
            raise UserError(f"prompt {group.index} has {len(group.prompt)} tokens; with max_new {sampling.max_new} it exceeds the context of {self.context}")
        if len(group.seeds) > self.slots:
            raise UserError(f"a group of {len(group.seeds)} samples does not fit {self.slots} slots: raise --slots")

    def admit(self, batch, live):
        """Prefill prompt[:-1] of each group once, in the rows behind the live ones, then give every sample its copy. cur = prompt[-1]."""
        first, device = len(live), self.lens.device
        longest = max(len(g.prompt) for g in batch) - 1
        if longest:
            ids = torch.tensor([g.prompt[:-1] + [0] * (longest + 1 - len(g.prompt)) for g in batch], device=device)
            forward(self.model, self.cache, slice(first, first + len(batch)), ids, torch.zeros(len(batch), dtype=torch.long, device=device), longest)
        ends = [first]
        for g in batch:
            ends.append(ends[-1] + len(g.seeds))
            live += [[g, k, len(g.prompt) - 1] for k in range(len(g.seeds))]
        for i in reversed(range(len(batch))):  # group i sits in row first + i: spread from the back, so that no prompt is overwritten early
            self.cache.move(first + i, slice(ends[i], ends[i + 1]), len(batch[i].prompt) - 1)
        rows = slice(first, ends[-1])
        new = live[first:]
        self.lens[rows] = torch.tensor([n for _, _, n in new], device=device)
        self.cur[rows] = torch.tensor([g.prompt[-1] for g, _, _ in new], device=device)
        self.made[rows] = 0
        seeds = torch.tensor([g.seeds[k] for g, k, _ in new], device=device)
        self.seeds[rows] = torch.stack([seeds, seeds >> 32], 1).int()  # .int() keeps the low 32 bits

    def round(self, n, view, sampling):
        """One token for each of the n live rows -> tokens (n,), done (n,)."""
        rows = slice(0, n)
        hidden, logits = forward(self.model, self.cache, rows, self.cur[rows, None], self.lens[rows], view)
        y, logprob = sample(logits, sampling, self.seeds[rows], self.made[rows, None])
        at = self.made[rows, None]
        self.tokens[rows].scatter_(1, at, y)
        self.logprobs[rows].scatter_(1, at, logprob)
        if self.keep_hidden:
            self.hidden[rows].scatter_(1, at[..., None].expand_as(hidden), hidden)
        y = y[:, 0]
        self.cur[rows] = y
        self.lens[rows] += 1
        self.made[rows] += 1
        self.stats["rounds"] += 1
        self.stats["tokens"] += n
        self.stats["rows"] += n
        return y, torch.isin(y, self.stop) | (self.made[rows] >= sampling.max_new)

    def take(self, row, live):
        """The finished response in `row`; the last live row moves into its slot."""
        group, k, length = live[row]
        made = length - len(group.prompt) + 1
        tokens = self.tokens[row, :made]
        response = Response(group.index, k, group.prompt, tokens.tolist(), self.logprobs[row, :made].cpu().clone(),
                            bool(torch.isin(tokens[-1], self.stop)), self.hidden[row, :made].cpu().clone() if self.keep_hidden else None)
        last = len(live) - 1
        if row != last:
            self.cache.move(last, slice(row, row + 1), live[last][2])
            for x in self.state():
                x[row] = x[last]
            live[row] = live[last]
        live.pop()
        return response


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
    for name, kind in Sampling.__annotations__.items():
        flags.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(Sampling, name))
    args = flags.parse_args()
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__annotations__})
    model, tokenizer = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer.encode(args.prompt, add_special_tokens=False)
    engine = Engine(model, stop_tokens(model, tokenizer), slots=max(1, args.samples), context=len(ids) + sampling.max_new)
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
    others = [r for r in engine.generate([group], sampling, stream) if r.sample]
    print()
    for r in sorted(others, key=lambda r: r.sample):
        print(args.prompt + tokenizer.decode(r.tokens, skip_special_tokens=True))
    s = engine.stats
    print(f"[{s['tokens']} tokens, {s['tokens'] / s['seconds']:.0f} tokens/s]", file=sys.stderr)


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
