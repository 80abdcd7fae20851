"""The update's forward: log-probabilities of the responses' tokens and the policy's entropy at each, without holding
all their logits in memory.

With a vocabulary of 150,000 token ids, the logits of 4,096 tokens are 2.5 GB, and cross entropy and its gradient hold
several tensors of that size at once. So head and loss go through the tokens in slices. The logits of a slice are freed
when its log-probabilities are computed; the backward computes them once more. A small vocabulary fits one slice: there
nothing is cut, and nothing is computed twice.

Legend: B sequences, T positions, N tokens of responses, D model width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from parts.cli import UserError
from parts.engine.forward import head_of
from parts.engine.interfaces import Response

SLICE = 1 << 24  # logits in memory at once: 64 MB in float32


def sliced_logprobs(
    head: Callable, vocab: int, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """head: hidden (n, D) -> logits (n, V); hidden (N, D), targets (N,) -> log-probabilities of the targets under
    softmax(logits / temperature), and the entropy of that distribution in nats, without a gradient: both (N,).
    """

    def of_slice(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = (head(hidden).float() / temperature).log_softmax(-1)  # (n, V)
        logp = -F.nll_loss(every, targets, reduction="none")
        with torch.no_grad():  # last: when the backward recomputes the slice, it stops before this
            entropy = -(every.exp() * every).sum(-1)
        return logp, entropy

    rows = max(1, SLICE // vocab)
    if len(hidden) <= rows:
        return of_slice(hidden, targets)
    slices = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(of_slice, *pair, use_reentrant=False) for pair in slices]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def logprobs_at(model, ids, picked, targets, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T), picked (B, T) bool, N of them true; targets (N,): the tokens behind the picked positions
    -> their log-probabilities and the entropies there, both (N,).
    """
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return sliced_logprobs(head_of(model), model.config.vocab_size, hidden[picked], targets, temperature)


def token_scores(
    model, responses: list[Response], temperature: float, logprobs_at=logprobs_at
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every response token under softmax(logits / temperature), and the entropy there,
    both concatenated, (N,).

    Right padding under a causal mask needs no attention mask; only the response's positions go through the head.
    logprobs_at: with FSDP another one, see fsdp.py.
    """
    longest = max(len(r.prompt) + len(r.tokens) for r in responses) - 1
    ids = torch.zeros(len(responses), longest, dtype=torch.long)
    picked = torch.zeros(len(responses), longest, dtype=torch.bool)
    for i, r in enumerate(responses):
        row = (r.prompt + r.tokens)[:-1]
        ids[i, : len(row)] = torch.tensor(row)
        # the position before a token predicts it, the stop token included
        picked[i, len(r.prompt) - 1 : len(row)] = True
    targets = torch.tensor([t for r in responses for t in r.tokens])
    device = model.device
    return logprobs_at(model, ids.to(device), picked.to(device), targets.to(device), temperature)


def token_logprobs(model, responses: list[Response], temperature: float) -> torch.Tensor:
    """Return the log-probabilities of `token_scores` alone."""
    return token_scores(model, responses, temperature)[0]


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


def autocast(device: str, bf16: bool) -> torch.autocast:
    """Return the context of the trainer's forwards: bfloat16 on GPUs, and where it is asked for."""
    # without its cache: there the gradients of several uses of a weight would be summed in bfloat16
    enabled = bf16 or device != "cpu"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, cache_enabled=False)
