"""LoRA (Hu et al., arXiv 2106.09685): the policy's weights stay as they are, and small matrices added to them learn.

    y = W x + (alpha / r) B A x          W (out, in) frozen;  A (r, in) random, B (out, r) zero at first;  alpha = 2 r

The layers are those of the package peft, put into the model in place, so that it stays the class that it was. The
actor that generates is a copy of the model whose weights are W + (alpha / r) B A, refreshed after every update: the
engine knows nothing of adapters, and its rounds take as long as without them. (x.weight of such a layer is W alone, so
code that needs what the layer computes must not read it.)

A checkpoint holds the adapter in peft's format; out/policy is an ordinary folder with merged weights, and
out/policy/adapter the adapter again, for `PeftModel.from_pretrained`.

Left out: adapters of embeddings and heads, dropout, DoRA, other places than all linear layers.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from parts.cli import UserError, reason

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # the files of peft's format
PREFIX = "base_model.model."  # of the names in them


def linear_names(model) -> list[str]:
    """Return the names of the linear layers of the decoder's layers: q_proj, up_proj ..."""
    layers = model.get_decoder().layers.named_modules()
    return sorted({name.split(".")[-1] for name, module in layers if isinstance(module, torch.nn.Linear)})


def add(model, rank: int, seed: int) -> None:
    """Freeze the model and add adapters to its linear layers. The same seed gives the same adapters on all workers."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: only where it is used

    torch.manual_seed(seed)
    targets = linear_names(model)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)


def layers_of(model) -> dict[str, torch.nn.Module]:
    """Return the layers that have an adapter, by the names of the layers that they replace; {} without adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merged(layer) -> torch.Tensor:
    """Return W + (alpha / r) B A, (out, in), in W's type."""
    return layer.base_layer.weight + layer.get_delta_weight("default")


def merge_into(actor, model) -> None:
    """Copy the merged weights into the actor."""
    for name, layer in layers_of(model).items():
        actor.get_submodule(name).weight.data.copy_(merged(layer))


def merged_weights(model) -> dict[str, torch.Tensor]:
    """Return all weights, merged, by their names in a model without adapters, on the host."""
    adapted = layers_of(model)
    weights = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        layer = adapted.get(plain.rpartition(".")[0])
        whole = merged(layer) if layer is not None and plain.endswith(".weight") else tensor
        weights[plain] = whole.detach().cpu()
    return weights


# ---------------------------------------------------------------- files


def adapter_weights(model) -> dict[str, torch.nn.Parameter]:
    """Return the adapters' matrices by their names in peft's files."""
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return {PREFIX + name.replace(".default.", "."): p for name, p in named.items()}


def save(folder: Path, model) -> None:
    """Write the adapter into the folder."""
    folder.mkdir(exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    rank = len(next(p for name, p in weights.items() if "lora_A" in name))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name_or_path, "r": rank}
    names = sorted({name.split(".")[-1] for name in layers_of(model)})
    settings |= {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "target_modules": names}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


@torch.no_grad()
def load(folder: Path, model) -> None:
    """Fill the model's adapters from a folder. Raises UserError."""
    try:
        weights = load_file(folder / WEIGHTS)
        wanted = adapter_weights(model)
        if weights.keys() != wanted.keys():
            raise UserError("it is of other layers")
        for name, p in wanted.items():
            p.copy_(weights[name])
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        raise UserError(f"cannot load an adapter for this policy from {folder}: {reason(error)}") from error
