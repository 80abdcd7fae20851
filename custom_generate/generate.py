"""Speculative decoding with the trained drafter for stock transformers; this file needs nothing else of the project.

    model = AutoModelForCausalLM.from_pretrained("runs/demo/policy")
    model.generate(**inputs, max_new_tokens=200, custom_generate="runs/demo/policy", trust_remote_code=True)

The folder that the model came from holds the drafter (drafter/drafter.safetensors). trust_remote_code is what transformers asks for before it runs this file.

A round, for one sequence whose cache holds x_0 .. x_{n-1} (cur = x_n is the newest token, h the policy's last hidden states):

    drafter   reads (x_{t+1}, h_t) of all new t < n, then goes on alone for k guesses                            drafter.py has the why
    policy    reads [cur, d_1 .. d_k], takes its own token y at each of the k + 1 positions
    accept    d_1 .. d_a as long as they equal y; emit y_1 .. y_{a+1}; crop the cache

Greedy: the tokens of plain `generate`, to rounding. Sampled: y = argmax(warped logits + Gumbel noise), the noise of a position drawn once, from torch's seed: the
same seed gives the same tokens at any draft_length (0: plain decoding), of the same distribution as plain `generate`, which draws others.

Left out: batched rounds (rows go one after the other: speculation pays at batch 1), beams, other logits processors, streaming.
"""

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import cached_file


def drafter_of(model):
    """(fc weight (D, 2D), decoder layer) of the drafter in the model's folder; read once."""
    if not hasattr(model, "_drafter"):
        path = cached_file(model.name_or_path, "drafter/drafter.safetensors")
        weights = {name: w.to(model.device, model.dtype) for name, w in load_file(path).items()}
        layer = type(model.get_decoder().layers[0])(model.config, 0)
        if hasattr(layer, "input_layernorm"):
            layer.input_layernorm = torch.nn.Identity()  # as in EAGLE
        layer.load_state_dict({name.removeprefix("layer."): w for name, w in weights.items() if name != "fc.weight"})
        model._drafter = weights["fc.weight"], layer.to(model.device, model.dtype).eval()
    return model._drafter


def shorten(cache, length):
    """Forget what a cache holds beyond `length` entries."""
    if (extra := cache.get_seq_length() - length) > 0:
        cache.crop(-extra)


def respond(model, prompt, limit, stops, pick, k):
    """A response to the prompt (1, L) -> list of token ids, at most `limit`. pick(logits (T, V), index of the first) -> tokens (T,)."""
    decoder, head, (fc, layer) = model.get_decoder(), model.get_output_embeddings(), drafter_of(model)
    cache, own, have = DynamicCache(config=model.config), DynamicCache(), 0  # the policy's and the drafter's; entries of the latter made from true features
    ids, made = prompt, []
    features = decoder(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state if prompt.shape[1] > 1 else None  # of have .. n-1

    def guess(tokens, features, first):
        """The drafter on entries first, first + 1, ...: tokens (1, T), features (1, T, D) -> guessed features (1, T, D)."""
        shorten(own, first)
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        mask = torch.full((tokens.shape[1], first + tokens.shape[1]), torch.finfo(fc.dtype).min, dtype=fc.dtype, device=tokens.device).triu(first + 1)
        x = torch.cat([decoder.embed_tokens(tokens), features], -1) @ fc.T
        return layer(x, attention_mask=mask[None, None], position_ids=positions, past_key_values=own, use_cache=True, position_embeddings=decoder.rotary_emb(x, positions))

    while True:
        n, drafts = ids.shape[1] - 1, []
        if features is not None:
            for i in range(min(k, limit - len(made) - 1)):
                feature = guess(drafts[-1], feature, n + i - 1) if i else guess(ids[:, have + 1:], features, have)[:, -1:]
                drafts.append(pick(head(feature)[0], len(made) + i)[None])
        hidden = decoder(input_ids=torch.cat([ids[:, -1:], *drafts], 1), past_key_values=cache, use_cache=True).last_hidden_state
        y = pick(head(hidden)[0], len(made))  # (k + 1,)
        right = (y[:-1] == torch.cat(drafts, 1)[0]).long().cumprod(0).sum().item() if drafts else 0
        new = y[:right + 1].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
        made += new[:end]
        if made[-1] in stops or len(made) >= limit:
            return made
        ids, have = torch.cat([ids, y[None, :right + 1]], 1), n
        features = hidden[:, :right + 1]
        shorten(cache, n + right + 1)


KNOWN = {"do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version"}


@torch.inference_mode()
def generate(model, inputs=None, generation_config=None, input_ids=None, attention_mask=None, draft_length=6, **kwargs):
    """As model.generate. draft_length: tokens guessed in a round. -> ids (B, prompt + new), padded on the right."""
    config, rest = model._prepare_generation_config(generation_config, **kwargs)  # as `generate` does: what is not given comes from the model's, then from the defaults
    usual, prompts = config._get_default_generation_params(), inputs if inputs is not None else input_ids
    others = {**rest, **{name: value for name, value in config.to_dict().items() if name not in KNOWN and name[0] != "_" and value != usual.get(name)}}
    if unused := [name for name, value in others.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(unused)}: not supported with this custom_generate")
    stops = {*(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])}
    limit = config.max_new_tokens or max(1, (config.max_length or 20) - prompts.shape[1])
    wanted = ((TemperatureLogitsWarper, config.temperature, 1.0), (TopKLogitsWarper, config.top_k, 0), (TopPLogitsWarper, config.top_p, 1.0))
    warpers = [warper(value) for warper, value, off in wanted if value not in (None, off)]
    rows, seeds = [], torch.randint(2**62, (len(prompts),)).tolist()
    for i, prompt in enumerate(prompts):
        source, noise = torch.Generator().manual_seed(seeds[i]), []

        def pick(logits, first):
            if not config.do_sample:
                return logits.argmax(-1)
            while len(noise) < first + len(logits):  # drawn in the order of the positions, however they are grouped
                noise.append(-(-torch.rand(logits.shape[-1], generator=source).log()).log())
            for warp in warpers:
                logits = warp(None, logits)
            return (logits.float() + torch.stack(noise[first:first + len(logits)]).to(logits.device)).argmax(-1)

        prompt = prompt if attention_mask is None else prompt[attention_mask[i].bool()]
        rows.append(torch.tensor(respond(model, prompt[None], limit, stops, pick, draft_length), device=prompts.device))
    pad = config.pad_token_id if config.pad_token_id is not None else min(stops - {None}, default=0)
    return torch.cat([prompts, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)], 1)
