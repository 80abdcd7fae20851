"""Speculative decoding with the trained drafter for stock transformers; this file needs nothing else of the project.

    model = AutoModelForCausalLM.from_pretrained("runs/demo/policy")
    model.generate(**inputs, max_new_tokens=200, custom_generate="runs/demo/policy", trust_remote_code=True)

The folder that the model came from holds the drafter (drafter/drafter.safetensors). trust_remote_code is what
transformers asks for before it runs this file.

A round, for one sequence whose cache holds x_0 .. x_{n-1} (cur = x_n is the newest token, h the policy's last hidden
states):

    drafter   reads (x_{t+1}, h_t) of all new t < n, then goes on alone for k guesses            drafter.py has the why
    policy    reads [cur, d_1 .. d_k], takes its own token y at each of the k + 1 positions
    accept    d_1 .. d_a as long as they equal y; emit y_1 .. y_{a+1}; crop the cache

Greedy: the tokens of plain `generate`, to rounding. Sampled: y = argmax(warped logits + Gumbel noise), the noise of a
position drawn once, from torch's seed: the same seed gives the same tokens at any draft_length (0: plain decoding),
of the same distribution as plain `generate`, which draws others.

Left out: batched rounds (rows go one after the other: speculation pays at batch 1), beams, other logits processors,
streaming.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import cached_file

DRAFTERS = WeakKeyDictionary()  # model -> its drafter, read once
SHARPEN = 1.2  # guesses are drawn as if the drafter's logits were so much larger: then more of them are right


def drafter_of(model):
    """Of the drafter in the model's folder: fc weight (D, 2D), decoder layer, and the ids (N,) that it may guess or
    None: all.
    """
    if model not in DRAFTERS:
        path = cached_file(model.name_or_path, "drafter/drafter.safetensors")
        weights = load_file(path)
        words = weights.pop("words", None)
        if words is not None:
            words = words.to(model.device).long()
        weights = {name: w.to(model.device, model.dtype) for name, w in weights.items()}
        fc = weights.pop("fc.weight")
        config = copy.deepcopy(model.config)
        if "layer.mlp.down_proj.weight" in weights:  # a tiny policy's drafter has a wider MLP
            config.intermediate_size = weights["layer.mlp.down_proj.weight"].shape[1]
        layer = type(model.get_decoder().layers[0])(config, 0)
        if hasattr(layer, "input_layernorm"):
            layer.input_layernorm = torch.nn.Identity()  # as in EAGLE
        layer.load_state_dict({name.removeprefix("layer."): w for name, w in weights.items()})
        DRAFTERS[model] = fc, layer.to(model.device, model.dtype).eval(), words
    return DRAFTERS[model]


def logit_factor(model) -> float:
    """What the head's output is multiplied by: Granite divides by a number, Cohere multiplies by one."""
    divisor = getattr(model.config, "logits_scaling", None)
    return 1 / divisor if divisor else getattr(model.config, "logit_scale", None) or 1.0


SHARPEN = 1.2  # guesses are drawn as if from logits so much larger, which makes more of them right


def shorten(cache, length: int) -> None:
    """Forget what a cache holds beyond `length` entries."""
    extra = cache.get_seq_length() - length
    if extra > 0:
        cache.crop(-extra)


class Guesser:
    """The drafter with its own cache. Entry t of it holds (x_{t+1}, h_t)."""

    def __init__(self, model):
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        self.fc, self.layer, self.words = drafter_of(model)
        self.factor = SHARPEN * logit_factor(model)
        self.vocab = len(head.weight)
        self.weight = head.weight if self.words is None else head.weight[self.words]
        self.bias = head.bias if self.words is None or head.bias is None else head.bias[self.words]
        self.cache = DynamicCache()
        self.true_entries = 0  # made from the policy's own features

    def forward(self, tokens, features, first: int):
        """Entries first, first + 1, ...: tokens (1, T), features (1, T, D) -> guessed features (1, T, D)."""
        shorten(self.cache, first)
        count = tokens.shape[1]
        positions = torch.arange(first, first + count, device=tokens.device)[None]
        never = torch.finfo(self.fc.dtype).min
        mask = torch.full((count, first + count), never, dtype=self.fc.dtype, device=tokens.device).triu(first + 1)
        x = torch.cat([self.decoder.embed_tokens(tokens), features], -1) @ self.fc.T
        return self.layer(
            x,
            attention_mask=mask[None, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            position_embeddings=self.decoder.rotary_emb(x, positions),
        )

    def logits(self, feature):
        """feature (1, 1, D) -> (1, V); what it may not guess has -inf."""
        logits = torch.nn.functional.linear(feature, self.weight, self.bias)[0] * self.factor
        if self.words is None:
            return logits
        return logits.new_full((1, self.vocab), -torch.inf).index_copy(1, self.words, logits)

    def propose(self, ids, features, k: int, pick, first: int) -> list:
        """k guesses, each (1, 1). ids (1, n+1); features (1, T, D): of the tokens since the last round."""
        n = ids.shape[1] - 1
        drafts = []
        if k:
            feature = self.forward(ids[:, self.true_entries + 1 :], features, self.true_entries)[:, -1:]
        for depth in range(k):
            drafts.append(pick(self.logits(feature), first + depth)[None])
            if depth + 1 < k:
                feature = self.forward(drafts[-1], feature, n + depth)
        self.true_entries = n
        return drafts


def respond(model, prompt, limit: int, stops: set, pick, k: int) -> list[int]:
    """A response to the prompt (1, L): at most `limit` ids. pick(logits (T, V), index of the first) -> tokens (T,)."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    factor = logit_factor(model)
    cache = DynamicCache(config=model.config)
    guesser = Guesser(model)
    ids = prompt
    response = []
    features = None  # (1, T, D), of the tokens since the last round
    if prompt.shape[1] > 1:
        features = decoder(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
    while True:
        n = ids.shape[1] - 1
        drafts = []
        if features is not None:
            length = min(k, limit - len(response) - 1)
            drafts = guesser.propose(ids, features, length, pick, len(response))
        new = torch.cat([ids[:, -1:], *drafts], 1)
        hidden = decoder(input_ids=new, past_key_values=cache, use_cache=True).last_hidden_state
        y = pick(head(hidden)[0] * factor, len(response))  # (k + 1,)
        accepted = (y[:-1] == new[0, 1:]).long().cumprod(0).sum().item()
        tokens = y[: accepted + 1].tolist()
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        response += tokens[:end]
        if response[-1] in stops or len(response) >= limit:
            return response
        ids = torch.cat([ids, y[None, : accepted + 1]], 1)
        features = hidden[:, : accepted + 1]
        shorten(cache, n + accepted + 1)


# ---------------------------------------------------------------- settings, as `generate` takes them

SUPPORTED = {
    "do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id",
    "bos_token_id", "use_cache", "transformers_version",
}  # fmt: skip


def check_settings(config, rest: dict) -> None:
    """Raises ValueError for what would be ignored."""
    usual = config._get_default_generation_params()
    others = dict(rest)
    for name, value in config.to_dict().items():
        if name not in SUPPORTED and name[0] != "_" and value != usual.get(name):
            others[name] = value
    unused = [name for name, value in others.items() if value is not None and value is not False]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not supported with this custom_generate")


class Picker:
    """Chooses a sequence's tokens from logits: greedily, or with Gumbel noise of its own."""

    def __init__(self, config, seed: int):
        self.config = config
        self.source = torch.Generator().manual_seed(seed)
        self.noise = []  # (V,) of each position: drawn in the order of the positions, however they are grouped
        self.warpers = []
        for warper, value, off in (
            (TemperatureLogitsWarper, config.temperature, 1.0),
            (TopKLogitsWarper, config.top_k, 0),
            (TopPLogitsWarper, config.top_p, 1.0),
        ):
            if value not in (None, off):
                self.warpers.append(warper(value))

    def __call__(self, logits, first: int):
        """logits (T, V) of positions first, first + 1, ... -> tokens (T,)."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        end = first + len(logits)
        while len(self.noise) < end:
            self.noise.append(-(-torch.rand(logits.shape[-1], generator=self.source).log()).log())
        for warp in self.warpers:
            logits = warp(None, logits)
        return (logits.float() + torch.stack(self.noise[first:end]).to(logits.device)).argmax(-1)


@torch.inference_mode()
def generate(model, inputs=None, generation_config=None, input_ids=None, attention_mask=None, draft_length=6, **kwargs):
    """As model.generate. draft_length: tokens guessed in a round. -> ids (B, prompt + new), padded on the right."""
    # as `generate` does: what is not given comes from the model's settings, then from the defaults
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    check_settings(config, rest)
    prompts = inputs if inputs is not None else input_ids
    stops = {*(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])}
    limit = config.max_new_tokens or max(1, (config.max_length or 20) - prompts.shape[1])
    rows = []
    for i, seed in enumerate(torch.randint(2**62, (len(prompts),)).tolist()):
        prompt = prompts[i] if attention_mask is None else prompts[i][attention_mask[i].bool()]
        response = respond(model, prompt[None], limit, stops, Picker(config, seed), draft_length)
        rows.append(torch.tensor(response, device=prompts.device))
    pad = config.pad_token_id if config.pad_token_id is not None else min(stops - {None}, default=0)
    responses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return torch.cat([prompts, responses], 1)
