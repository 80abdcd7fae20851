"""Does the engine compute what the model's own code computes? Twelve tokens are run both ways when a model is loaded.

The engine reads them as it reads a rollout: a prompt, one token, some draft tokens. Trained models amplify rounding, so
a difference may be rounding or a mistake. Where it is not clearly rounding, both are computed again in float64:
rounding is then about 1e-13 of the spread of the logits, and a mistake stays as large as it was.
"""

from collections.abc import Callable, Iterable

import torch
from torch.overrides import TorchFunctionMode

from parts.engine.forward import forward, head_of
from parts.engine.fused_layers import FusedLayer
from parts.engine.kv_cache import KVCache

# ---------------------------------------------------------------- the trial

TRIAL = ((0, 6), (6, 7), (7, 12))  # what the engine reads at once: a prompt, one token, some draft tokens


# A gap up to this share of the logits' standard deviation is rounding. Measured: random tiny models 2e-6, SmolLM2-135M
# 3e-5; mistakes 1e-3 to 7
CLEAR = 5e-5


CLEAR_IN_FLOAT64 = 1e-8  # measured: rounding 2e-12, mistakes as above


WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64}


class InFloat64(TorchFunctionMode):
    """Inside this mode everything is computed in float64, whatever type the weights have and whatever type is asked
    for.

    Weights are converted when they are read, one at a time, so a large model needs no second copy.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*widened(args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def widened(value):
    """Return a tensor, a dtype, or a list or tuple of them in float64; anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in WIDER else value
    if isinstance(value, torch.dtype):
        return WIDER.get(value, value)
    return type(value)(map(widened, value)) if type(value) in (list, tuple) else value


def own_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Run the model's own code, with its own masks and attention, without a cache: ids (1, T) -> logits (1, T, V)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def engine_logits(model, ids: torch.Tensor, make_layers: Callable[[], Iterable | None]) -> torch.Tensor:
    """Run the engine's path over its cache: ids (1, T) -> logits (1, T, V). make_layers: returns the fused layers."""
    cache = KVCache(model.config, 1, ids.shape[1] + 4, model.dtype, ids.device)
    parts = []
    for start, end in TRIAL:
        lens = torch.tensor([start], device=ids.device)
        layers = make_layers()
        parts.append(forward(model, cache, slice(0, 1), ids[:, start:end], lens, end, fused_layers=layers))
    return head_of(model)(torch.cat(parts, 1))


def distance(ours: torch.Tensor, own: torch.Tensor) -> float:
    """Return the largest difference of logits (1, T, V), as a share of their standard deviation; inf if not finite."""
    if ours.equal(own):
        return 0.0
    gap = (ours - own).abs().max() / own.std()
    return gap.item() if gap.isfinite() else torch.inf


@torch.inference_mode()
def matches_own_code(model, fused_layers) -> tuple[bool, float]:
    """Return whether the engine's path gives the logits of the model's own code, and their `distance`, which was
    measured in float64 unless the model's own type made it clear.

    fused_layers: from `fuse`; None: the model's own modules.
    """
    vocab = model.config.vocab_size
    # ordinary tokens: special ones stand at the ends of a vocabulary, and models may treat them in a special way
    ids = torch.linspace(vocab // 8, vocab // 2, TRIAL[-1][1], device=model.device).long()[None]
    own = own_logits(model, ids)
    ours = engine_logits(model, ids, lambda: fused_layers)
    gap = distance(ours, own)
    if gap <= CLEAR and own.argmax(-1).equal(ours.argmax(-1)):
        return True, gap

    def layers_anew():
        """One at a time, and without packed weights, which exist in float32 only."""
        if fused_layers is not None:
            return (FusedLayer(layer, model.config, pack=False) for layer in model.get_decoder().layers)
        return None

    experts = getattr(model.config, "_experts_implementation", None)
    if experts:  # a mixture's product of all experts at once knows no float64
        model.set_experts_implementation("eager")
    try:
        with InFloat64():
            gap = distance(engine_logits(model, ids, layers_anew), own_logits(model, ids))
    finally:
        if experts:
            model.set_experts_implementation(experts)
    return gap <= CLEAR_IN_FLOAT64, gap
