"""How wide the MLP of a drafter's layer is.

The layer is of the policy's own class and, beside a real language model, of its size. Beside a tiny policy so small a
layer cannot do in one step what the policy does in 28, and a larger one costs next to nothing, so its MLP gets at least
FEWEST units. With base/ (64 wide, an MLP of 144), 75 s of training on one core: the likeliest token is right in 93.7 %
instead of 92.4 %, and 5.79 tokens come out of a round instead of 5.50 (k = 8; measured with 576 units).

A file of a narrower drafter can be read: the units that it lacks begin without effect.
"""

import copy

import torch

FEWEST = 512
PARTS = ("gate_proj", "up_proj", "down_proj")


def width_of(layer) -> int | None:
    """Inner width of a decoder layer's MLP; None where it is not of the usual kind, as in mixtures of experts."""
    mlp = getattr(layer, "mlp", None)
    if not all(isinstance(getattr(mlp, part, None), torch.nn.Linear) for part in PARTS):
        return None
    return mlp.down_proj.in_features


def widened(layer, config):
    """The decoder layer, made anew if its MLP is too narrow. config: the policy's."""
    width = width_of(layer)
    if width is None or width >= FEWEST or width != getattr(config, "intermediate_size", None):
        return layer
    config = copy.deepcopy(config)
    config.intermediate_size = FEWEST
    layer = type(layer)(config, layer_idx=0)
    layer.register_load_state_dict_pre_hook(fill_up)
    return layer


def fill_up(layer, weights: dict, prefix: str, *_) -> None:
    """Called by load_state_dict: add the units that the weights of a narrower MLP lack.

    They keep the layer's own, random weights, but for those towards the output, which are 0: so what the layer computes
    is what it computed when it was written, and the further units can still learn.
    """
    for name, own in layer.state_dict().items():
        part = weights.get(prefix + name)
        is_down = name == "mlp.down_proj.weight"
        axis = 1 if is_down else 0  # of the units
        grows = name.startswith("mlp.") and part is not None and part.ndim == own.ndim
        if not grows or part.shape[axis] >= own.shape[axis]:
            continue
        if part.ndim == 2 and part.shape[1 - axis] != own.shape[1 - axis]:
            continue  # of another policy: load_state_dict will say so
        whole = torch.zeros_like(own) if is_down else own.clone()
        whole.narrow(axis, 0, part.shape[axis]).copy_(part)
        weights[prefix + name] = whole
