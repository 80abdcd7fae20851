"""Speculative decoding with the trained drafter for stock transformers. This file needs nothing else of the project.

    model = AutoModelForCausalLM.from_pretrained("runs/demo/policy")
    model.generate(**inputs, max_new_tokens=200, custom_generate="runs/demo/policy", trust_remote_code=True)

The folder that the model came from holds the drafter (drafter/drafter.safetensors). transformers asks for
trust_remote_code before it runs this file.

A round of one sequence, whose cache holds x_0 .. x_{n-1} (cur = x_n is the newest token, h the policy's last hidden
states):

    drafter   reads (x_{t+1}, h_t) of all new t < n, then continues alone for k draft tokens     drafter.py says why
    policy    reads [cur, d_1 .. d_k] and samples its own token y at each of the k + 1 positions
    accept    d_1 .. d_a as long as they equal y; emit y_1 .. y_{a+1}; crop the cache

Greedy decoding gives the tokens of plain `generate`, up to rounding. Sampling takes y = argmax(warped logits + Gumbel
noise), where the noise of a position is drawn once, from torch's seed: the same seed gives the same tokens at any
draft_length (0: plain decoding). They have the distribution of plain `generate`, but are other samples of it.

Legend: B sequences, T tokens, L tokens of a prompt, k draft length, D model width, V vocabulary, N token ids of the
draft vocabulary.
Left out: batched rounds (sequences are decoded one after the other: speculation pays at batch 1), beams, other logits
processors, streaming.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import cached_file

DRAFTERS = WeakKeyDictionary()  # model -> the weights of its drafter, read once
# draft tokens are sampled as if the drafter's logits were larger by this factor, so that more are accepted
SHARPEN = 1.2


def drafter_of(model):
    """Return the drafter in the model's folder: fc weight (D, 2D), decoder layer, and the draft vocabulary, ids (N,);
    None: all ids.
    """
    if model not in DRAFTERS:
        path = cached_file(model.name_or_path, "drafter/drafter.safetensors")
        weights = load_file(path)
        draft_vocab = weights.pop("draft_vocab", None)
        if draft_vocab is not None:
            draft_vocab = draft_vocab.to(model.device).long()
        weights = {name: w.to(model.device, model.dtype) for name, w in weights.items()}
        fc = weights.pop("fc.weight")
        config = copy.deepcopy(model.config)
        if "layer.mlp.down_proj.weight" in weights:  # the drafter of a tiny policy has a wider MLP
            config.intermediate_size = weights["layer.mlp.down_proj.weight"].shape[1]
        layer = type(model.get_decoder().layers[0])(config, 0)
        if hasattr(layer, "input_layernorm"):
            layer.input_layernorm = torch.nn.Identity()  # as in EAGLE
        layer.load_state_dict({name.removeprefix("layer."): w for name, w in weights.items()})
        DRAFTERS[model] = fc, layer.to(model.device, model.dtype).eval(), draft_vocab
    return DRAFTERS[model]


def logit_scale(model) -> float:
    """Return what the head's output is multiplied by: Granite divides it by a number, Cohere multiplies it by one."""
    divisor = getattr(model.config, "logits_scaling", None)
    return 1 / divisor if divisor else getattr(model.config, "logit_scale", None) or 1.0


def crop(cache, length: int) -> None:
    """Drop the entries of a cache beyond the first `length`."""
    extra = cache.get_seq_length() - length
    if extra > 0:
        cache.crop(-extra)


class DraftModel:
    """The drafter at work on one sequence, with its own cache. Entry t of the cache holds (x_{t+1}, h_t)."""

    def __init__(self, model):
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        self.fc, self.layer, self.draft_vocab = drafter_of(model)
        self.factor = SHARPEN * logit_scale(model)
        self.vocab = len(head.weight)
        ids = slice(None) if self.draft_vocab is None else self.draft_vocab
        self.weight = head.weight[ids]
        self.bias = None if head.bias is None else head.bias[ids]
        self.cache = DynamicCache()
        self.read_len = 0  # entries that were computed from the policy's own features

    def forward(self, tokens, features, first: int):
        """Compute entries first, first + 1, ...: tokens (1, T), features (1, T, D) -> predicted features (1, T, D)."""
        crop(self.cache, first)
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
        """feature (1, 1, D) -> logits (1, V), -inf outside of the draft vocabulary."""
        logits = torch.nn.functional.linear(feature, self.weight, self.bias)[0] * self.factor
        if self.draft_vocab is None:
            return logits
        return logits.new_full((1, self.vocab), -torch.inf).index_copy(1, self.draft_vocab, logits)

    def propose(self, ids, features, k: int, pick, index: int) -> list:
        """Return k draft tokens, each (1, 1). ids (1, n+1); features (1, T, D): of the tokens since the last round;
        pick: see `respond`; index: the number of the next token in its response.
        """
        n = ids.shape[1] - 1
        drafts = []
        if k:
            feature = self.forward(ids[:, self.read_len + 1 :], features, self.read_len)[:, -1:]
        for depth in range(k):
            drafts.append(pick(self.logits(feature), index + depth)[None])
            if depth + 1 < k:
                feature = self.forward(drafts[-1], feature, n + depth)
        self.read_len = n
        return drafts


def respond(model, prompt, limit: int, stops: set, pick, k: int) -> list[int]:
    """Return a response of at most `limit` ids to the prompt (1, L). pick: a TokenPicker."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    factor = logit_scale(model)
    cache = DynamicCache(config=model.config)
    draft_model = DraftModel(model)
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
            drafts = draft_model.propose(ids, features, length, pick, len(response))
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
        crop(cache, n + accepted + 1)


# ---------------------------------------------------------------- settings, as `generate` takes them

SUPPORTED = {
    "do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id",
    "bos_token_id", "use_cache", "transformers_version",
}  # fmt: skip


def check_settings(config, rest: dict) -> None:
    """Raise ValueError for settings that would be ignored."""
    usual = config._get_default_generation_params()
    others = dict(rest)
    for name, value in config.to_dict().items():
        if name not in SUPPORTED and name[0] != "_" and value != usual.get(name):
            others[name] = value
    unused = [name for name, value in others.items() if value is not None and value is not False]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not supported with this custom_generate")


class TokenPicker:
    """Chooses the tokens of a sequence from logits: greedily, or with Gumbel noise of its own."""

    def __init__(self, config, seed: int):
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = []  # (V,) of each position, drawn in their order, however they are grouped into rounds
        self.warpers = []
        for warper, value, off in (
            (TemperatureLogitsWarper, config.temperature, 1.0),
            (TopKLogitsWarper, config.top_k, 0),
            (TopPLogitsWarper, config.top_p, 1.0),
        ):
            if value not in (None, off):
                self.warpers.append(warper(value))

    def __call__(self, logits, index: int):
        """logits (T, V) of the tokens index, index + 1, ... of the response -> tokens (T,)."""
        if not self.config.do_sample:
            return logits.argmax(-1)
        end = index + len(logits)
        while len(self.noise) < end:
            self.noise.append(-(-torch.rand(logits.shape[-1], generator=self.generator).log()).log())
        for warp in self.warpers:
            logits = warp(None, logits)
        return (logits.float() + torch.stack(self.noise[index:end]).to(logits.device)).argmax(-1)


@torch.inference_mode()
def generate(model, inputs=None, generation_config=None, input_ids=None, attention_mask=None, draft_length=6, **kwargs):
    """As model.generate; draft_length: draft tokens of a round. Return ids (B, prompt + new), padded on the right."""
    # as in `generate`, settings that are not given come from the model's settings, then from the defaults
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    check_settings(config, rest)
    prompts = inputs if inputs is not None else input_ids
    stops = {*(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])}
    limit = config.max_new_tokens or max(1, (config.max_length or 20) - prompts.shape[1])
    responses = []
    for i, seed in enumerate(torch.randint(2**62, (len(prompts),)).tolist()):
        prompt = prompts[i] if attention_mask is None else prompts[i][attention_mask[i].bool()]
        response = respond(model, prompt[None], limit, stops, TokenPicker(config, seed), draft_length)
        responses.append(torch.tensor(response, device=prompts.device))
    pad = config.pad_token_id if config.pad_token_id is not None else min(stops - {None}, default=0)
    padded = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=pad)
    return torch.cat([prompts, padded], 1)
