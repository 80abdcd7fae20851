"""The update's forward: log-probabilities of the responses' tokens and the policy's entropy at each, without holding
all their logits in memory.

With a vocabulary of 150,000 token ids, the logits of 4,096 tokens are 2.5 GB, and cross entropy and its gradient hold
several tensors of that size at once. So head and loss go through the tokens in slices. The logits of a slice are freed
when its log-probabilities are computed; the backward computes them once more. A small vocabulary fits one slice: there
nothing is cut, and nothing is computed twice.

A head that does not learn, as with LoRA, needs no second computation. The gradient of log p(y) to the hidden state is
a vector of D numbers that is known as soon as the probabilities are, and it is kept instead (`FrozenHead`):

    d log p(y) / d h = (W_y - sum over v of p_v W_v) / temperature

The samples of a group have the same prompt. Where prompts are long, a micro-batch computes each different prompt once,
and its responses attend to that prompt's keys and values, as in a rollout. Autograd sums what flows back into them, so
log-probabilities and gradients are those of whole sequences, to rounding.

    whole sequences    B (P + T) tokens        prompts once    U P + B T tokens

Legend: B sequences, T positions, N tokens of responses, D model width, V vocabulary; U different prompts of at most P
tokens.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from parts.cli import UserError
from parts.devices import send
from parts.engine.forward import head_of
from parts.engine.interfaces import Response
from parts.engine.kv_cache import kv_heads

SLICE = 1 << 24  # logits in memory at once: 64 MB in float32
WORTH_SHARING = 0.125  # share of a micro-batch's tokens that must be saved: below it, two forwards cost more than one


def all_logprobs(head: Callable, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probabilities (n, V) of all tokens, in float32. hidden (n, D)."""
    logits = head(hidden).float()
    if temperature != 1:  # a pass over all logits
        logits = logits / temperature
    return logits.log_softmax(-1)


class FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies of a head that does not learn: see the equation above."""

    @staticmethod
    def forward(context, hidden, targets, head: torch.nn.Linear, temperature: float, rows: int):
        """hidden (N, D), targets (N,); rows: tokens in a slice -> both (N,)."""
        logps = []
        entropies = []
        slopes = []  # d logp / d hidden, (n, D) each
        for h, target in zip(hidden.split(rows), targets.split(rows)):
            every = all_logprobs(head, h, temperature)  # (n, V)
            p = every.exp()
            logps.append(every.gather(1, target[:, None])[:, 0])
            entropies.append(-(p * every).sum(-1))
            mean = p.to(torch.result_type(h, head.weight)) @ head.weight  # (n, D)
            slopes.append((head.weight[target] - mean) / temperature)
        context.save_for_backward(torch.cat(slopes))
        entropy = torch.cat(entropies)
        context.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    def backward(context, gradient, _):
        (slopes,) = context.saved_tensors
        return gradient[:, None] * slopes, None, None, None, None


def sliced_logprobs(
    head: Callable, vocab: int, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """head: hidden (n, D) -> logits (n, V); hidden (N, D), targets (N,) -> log-probabilities of the targets under
    softmax(logits / temperature), and the entropy of that distribution in nats, without a gradient: both (N,).
    """

    def of_slice(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = all_logprobs(head, hidden, temperature)  # (n, V)
        logp = -F.nll_loss(every, targets, reduction="none")
        with torch.no_grad():  # last: when the backward recomputes the slice, it stops before this
            entropy = -(every.exp() * every).sum(-1)
        return logp, entropy

    rows = max(1, SLICE // vocab)
    if type(head) is torch.nn.Linear and not head.weight.requires_grad and hidden.requires_grad:
        return FrozenHead.apply(hidden, targets, head, temperature, rows)
    if len(hidden) <= rows:
        return of_slice(hidden, targets)
    slices = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(of_slice, *pair, use_reentrant=False) for pair in slices]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def logprobs_at(model, ids, picked, targets, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T); picked (N,): numbers of positions, counted through all rows; targets (N,): the tokens behind them
    -> their log-probabilities and the entropies there, both (N,).
    """
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.flatten(0, 1)[picked]  # (N, D)
    return sliced_logprobs(head_of(model), model.config.vocab_size, hidden, targets, temperature)


def token_scores(model, responses: list[Response], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every response token under softmax(logits / temperature), and the entropy there,
    both concatenated, (N,).
    """
    if can_share_prompts(model) and worth_sharing(responses):
        hidden = hidden_with_prompts_once(model, responses)
        targets = send(torch.tensor([t for r in responses for t in r.tokens]), hidden.device)
        return sliced_logprobs(head_of(model), model.config.vocab_size, hidden, targets, temperature)
    return whole_token_scores(model, responses, temperature)


def whole_token_scores(
    model, responses: list[Response], temperature: float, logprobs_at=logprobs_at
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_scores`, with each response behind its own copy of the prompt.

    Right padding under a causal mask needs no attention mask; only the response's positions go through the head.
    logprobs_at: with FSDP another one, see fsdp.py.
    """
    longest = max(len(r.prompt) + len(r.tokens) for r in responses) - 1
    ids = torch.zeros(len(responses), longest, dtype=torch.long)
    picked = []
    for i, r in enumerate(responses):
        row = (r.prompt + r.tokens)[:-1]
        ids[i, : len(row)] = torch.tensor(row)
        # the position before a token predicts it, the stop token included
        picked.append(torch.arange(len(r.prompt) - 1, len(row)) + i * longest)
    targets = torch.tensor([t for r in responses for t in r.tokens])
    inputs = [send(tensor, model.device) for tensor in (ids, torch.cat(picked), targets)]
    return logprobs_at(model, *inputs, temperature)


# ---------------------------------------------------------------- each prompt once


def worth_sharing(responses: list[Response], names: list | None = None) -> bool:
    """Return whether enough of these tokens are prompts that repeat. names: of their prompts, where equal prompts have
    been given equal names; None: the prompts are compared here.
    """
    names = names or [tuple(r.prompt) for r in responses]
    once = dict(zip(names, [len(r.prompt) for r in responses]))
    saved = sum(len(r.prompt) for r in responses) - sum(once.values())
    return saved >= WORTH_SHARING * sum(len(r.prompt) + len(r.tokens) for r in responses)


def can_share_prompts(model) -> bool:
    """Return whether a prompt can be computed once: transformers' checkpointed layers take no cache."""
    return not model.is_activation_checkpointing


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids with zeros behind them, and where they are real: both (len(rows), longest), on the
    host.
    """
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.long)
    ids[real] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids, real


def mask_behind_prompts(in_prompt: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """Return what each of `count` = T response tokens may see: its own prompt, and the response up to itself.

    in_prompt: (B, P) -> (B, 1, groups * T, P + T) bool, folded as `kv_cache.slot_attention` wants it.
    """
    causal = torch.ones(count, count, dtype=torch.bool, device=in_prompt.device).tril()
    before = in_prompt[:, None].expand(-1, count, -1)  # (B, T, P)
    sees = torch.cat([before, causal.expand(len(in_prompt), -1, -1)], 2)
    return sees.repeat(1, groups, 1)[:, None]


def hidden_with_prompts_once(model, responses: list[Response]) -> torch.Tensor:
    """Return the hidden states that predict the responses' tokens, (N, D): each different prompt is computed once."""
    device = model.device
    decoder = model.get_decoder()
    prompts = [list(prompt) for prompt in dict.fromkeys(tuple(r.prompt) for r in responses)]
    number = {tuple(prompt): i for i, prompt in enumerate(prompts)}
    prompt_of = send(torch.tensor([number[tuple(r.prompt)] for r in responses]), device)  # (B,)
    ids, in_prompt = [send(part, device) for part in padded(prompts)]  # (U, P) both
    cache = DynamicCache()
    hidden = decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state  # (U, P, D)
    lengths = in_prompt.sum(1)  # (U,)
    groups = model.config.num_attention_heads // kv_heads(model.config)
    first = hidden[torch.arange(len(prompts), device=device), lengths - 1][prompt_of]  # (B, D) predicts the first token
    behind, real = padded([r.tokens[:-1] for r in responses])  # (B, T) both; the last token predicts none
    if not real.shape[1]:
        return first
    shared = DynamicCache()
    for i, layer in enumerate(cache.layers):
        shared.update(layer.keys[prompt_of], layer.values[prompt_of], i)  # (B, heads, P, head size)
    hidden = decoder(
        input_ids=send(behind, device),
        attention_mask=mask_behind_prompts(in_prompt[prompt_of], behind.shape[1], groups),
        position_ids=lengths[prompt_of, None] + torch.arange(behind.shape[1], device=device),  # (B, T)
        past_key_values=shared,
        use_cache=True,
    ).last_hidden_state  # (B, T, D)
    # the host knows where the real ones are, so the device need not be asked how many there are
    picked = torch.cat([torch.ones_like(real[:, :1]), real], 1).flatten().nonzero()[:, 0]  # (N,) of B (1 + T)
    return torch.cat([first[:, None], hidden], 1).flatten(0, 1)[send(picked, device)]


def checkpoint_layers(model) -> None:
    """From now on a forward in `update_mode` keeps only the inputs of each layer, and the backward runs each layer once
    more: less memory, more time, the same gradients. Raises UserError.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient-checkpointing: {type(model).__name__} has no such layers")
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # hooks on the embedding that only the other kind of checkpoint needs


NOISE = ("dropout", "pdrop", "jitter")  # parts of the names of settings that add noise in training mode


@contextlib.contextmanager
def update_mode(model) -> Iterator[None]:
    """Inside, the model is ready for an update: its forward is the one that generates, without dropout or other noise.

    GRPO needs the probabilities of the policy that sampled, so the model stays in evaluation mode. transformers
    checkpoints a layer only if the layer itself is in training mode. So with gradient checkpointing that flag is set,
    on the layers alone and not on the modules inside them; noise that a layer itself would add is set to 0.
    """
    layers = model.get_decoder().layers if model.is_activation_checkpointing else ()
    for layer in layers:
        layer.training = True
        for name, value in list(vars(layer).items()):
            if isinstance(value, float) and any(part in name for part in NOISE):
                setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def noise_settings(config) -> dict[str, float]:
    """Return the settings of a model's config that would add noise in training mode: dropout and router jitter."""
    noisy = {name: value for name, value in config.to_dict().items() if any(part in name for part in NOISE)}
    return {name: value for name, value in sorted(noisy.items()) if isinstance(value, float) and value}


def activations_per_token(config, inner: int | None = None) -> int:
    """Return how many numbers a decoder layer keeps of a token for its backward: those of OLMo 2; Llama's are 10 and 4.

    inner: width of the MLP, if it is not the config's.
    """
    inner = inner or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    attention = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
    return 13 * max(config.hidden_size, attention) + 4 * inner


def forward_bytes(model, tokens: int) -> int:
    """Return the memory that forward and backward of so many tokens take beside weights and gradients: activations as
    in float32 (in bfloat16 they are two thirds), bfloat16 copies of weights, logits of a slice, gradients of the head.
    """
    config = model.config
    vocab, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    layer = activations_per_token(config)
    weights = sum(p.numel() for p in model.parameters())
    kept = layers * layer
    if model.is_activation_checkpointing:
        kept = layers * width
        weights //= layers
    kept += 2 * layer  # in the backward: what one layer computes again, and gradients on their way
    logits = 5 * min(SLICE, tokens * vocab)  # with their gradients
    return 4 * (tokens * kept + logits + 2 * vocab * width) + 2 * weights


def computes_in_bfloat16(device: str, bf16: bool) -> bool:
    """Return whether the trainer's forwards are in bfloat16: on GPUs, and where it is asked for."""
    return bf16 or device != "cpu"


def autocast(device: str, bf16: bool) -> torch.autocast:
    """Return the context of the trainer's forwards."""
    # without its cache: there the gradients of several uses of a weight would be summed in bfloat16
    enabled = computes_in_bfloat16(device, bf16)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, cache_enabled=False)
