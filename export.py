"""Write a trained drafter as the EAGLE checkpoint that a server loads beside the policy.

    python export.py --model runs/demo/policy --out runs/export

writes runs/export/sglang and runs/export/vllm (config.json and model.safetensors; embedding and head the server takes
from the policy), and prints the two commands that serve them. For a drafter with a draft vocabulary, SGLang gets its
token ids in sglang/token_map.pt; vLLM drafts from the whole vocabulary. For stock transformers nothing has to be
exported: the folder of a policy that tlt.py has trained is complete, see custom_generate/generate.py.

Names, shapes and settings follow the loaders in SGLang 0.5.23 (models/llama_eagle.py, qwen2_eagle.py) and vLLM 0.32
(models/llama_eagle.py, which vLLM names Eagle + architecture; Qwen2 runs there as a Llama with biases on q, k, v).
vLLM has served Llama policies on a CPU (make vllm-check); Qwen2 was not tried there, and SGLang was not started. A test
computes the servers' layer from the exported files, for both kinds.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from drafter import Drafter, mlp_width
from parts.cli import UserError, flag, parse_flags, run
from parts.engine.model_loading import load_model
from parts.files import find_folder, replacing, save_weights, write_atomically

ARCHITECTURES = {
    "sglang": {"llama": "LlamaForCausalLMEagle", "qwen2": "Qwen2ForCausalLMEagle"},
    "vllm": {"llama": "LlamaForCausalLM", "qwen2": "LlamaForCausalLM"},
}
TOKEN_MAP = "token_map.pt"
NOT_OF_ONE_LAYER = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window", "dtype")


def export(drafter: Drafter, folder, server: str) -> None:
    """Write folder/config.json and folder/model.safetensors for "sglang" or "vllm".

    Raises UserError for kinds of policies that the server has no EAGLE layer for.
    """
    folder = Path(folder)
    config = drafter.policy.config
    kind = config.model_type
    if kind not in ARCHITECTURES[server]:
        raise UserError(f"{server} serves EAGLE drafters of {', '.join(ARCHITECTURES[server])} policies, not of {kind}")
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_ONE_LAYER}
    settings["architectures"] = [ARCHITECTURES[server][kind]]
    settings["num_hidden_layers"] = 1
    settings["intermediate_size"] = mlp_width(drafter.layer)
    settings["torch_dtype"] = str(drafter.fc.weight.dtype).removeprefix("torch.")
    weights = {name.replace("layer.", "layers.0.", 1): w.cpu() for name, w in drafter.plain_weights().items()}
    if server == "sglang":  # its fc has a bias, which would stay random; vLLM's has none, and refuses it
        weights["fc.bias"] = torch.zeros_like(weights["fc.weight"][:, 0])
        if drafter.draft_vocab is not None:
            with replacing(folder / TOKEN_MAP) as part:  # a list of ids, as its --speculative-token-map wants it
                torch.save(drafter.draft_vocab.tolist(), part)
    elif kind == "qwen2":
        settings.update(model_type="llama", attention_bias=False, qkv_bias=True)
    save_weights(weights, folder, "model.safetensors")
    # last: without it no server takes the folder for a model
    write_atomically(folder / "config.json", json.dumps(settings, indent=1))


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    model: str = flag("runs/demo/policy", "the policy's folder")
    drafter: str = flag("", "folder of the drafter; empty: the policy's subfolder drafter/")
    out: str = flag("runs/export", "folder for sglang/ and vllm/")


SERVE = """wrote {out}/sglang and {out}/vllm; as the draft model of {model}:
  python -m sglang.launch_server --model {model} --speculative-algorithm EAGLE \\
    --speculative-draft-model-path {out}/sglang --speculative-num-steps 5 \\
    --speculative-eagle-topk 1 --speculative-num-draft-tokens 6{token_map}
  vllm serve {model} --speculative-config '{{"method": "eagle", "model": "{out}/vllm", "num_speculative_tokens": 5}}'"""


def main() -> None:
    """Export the drafter for all servers."""
    command = parse_flags(Command, __doc__)
    model, _ = load_model(command.model)
    drafter = Drafter(model)
    drafter.load(command.drafter or Path(find_folder(command.model)) / "drafter")
    for server in ARCHITECTURES:
        export(drafter, Path(command.out) / server, server)
    token_map = (
        "" if drafter.draft_vocab is None else f" \\\n    --speculative-token-map {command.out}/sglang/{TOKEN_MAP}"
    )
    print(SERVE.format(out=command.out, model=command.model, token_map=token_map))


if __name__ == "__main__":
    run(main)
