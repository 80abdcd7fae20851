"""Peak memory of one update of 4,096 tokens, in a process of its own: `python -m bench.memory` prints a line of JSON.

8 responses of 412 random tokens to prompts of 100, in one micro-batch. What is counted is the memory that the update
takes beside weights, gradients and Adam's moments.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import now
from parts.cli import UserError, flag, parse_flags, run
from parts.devices import pick_device
from parts.engine.interfaces import Response
from parts.engine.model_loading import load_model
from parts.training import logprobs, lora
from parts.training.layouts import trainable_parameters
from train_grpo import Config, Worker, update


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    model: str = flag("runs/smollm2", "the policy: a folder or a hub name")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    whole: bool = flag(False, "all logits at once, not in slices")
    gradient_checkpointing: bool = flag(False, "as train_grpo.py's")
    lora_rank: int = flag(0, "as train_grpo.py's")


class Meter:
    """Memory on a device, in megabytes: in use when the meter is made, and at most since then."""

    def __init__(self, device: str):
        """Raises UserError where it cannot be measured."""
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
        self.before = peak_megabytes()

    def more(self) -> float:
        """Return how much more it was."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else peak_megabytes()
        return peak - self.before


def peak_megabytes() -> float:
    """Return the most memory that this process has had in use. Raises UserError where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UserError("memory is measured on Linux only") from error
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def responses_of(vocab: int) -> list[Response]:
    """Return random responses."""
    rng = random.Random(0)
    result = []
    for k in range(8):
        ids = [rng.randrange(3, vocab) for _ in range(512)]
        result.append(Response(("train", 0), k, ids[:100], ids[100:], torch.full((412,), -3.0), stopped=True))
    return result


def update_memory(model, device: str) -> dict:
    """Return the megabytes and seconds of an update, and the megabytes of gradients and moments beside it."""
    config = Config(device=device, prompts=1, samples=8, max_new=412, micro_tokens=4096)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # allocates Adam's moments
    responses = responses_of(model.config.vocab_size)
    meter = Meter(device)
    started = now()
    update(model, None, optimizer, responses, [1.0, -1.0] * 4, 0, config, Worker(config))
    kept = 12 * sum(p.numel() for p in parameters) / 2**20  # in float32
    return {"megabytes": meter.more(), "kept": kept, "seconds": now() - started}


def main() -> None:
    """Measure the update."""
    command = parse_flags(Command, __doc__)
    if command.whole:
        logprobs.SLICE = sys.maxsize
    device = pick_device(command.device)
    model, _ = load_model(command.model, device)
    if command.lora_rank:
        lora.add(model, command.lora_rank, seed=0)
    if command.gradient_checkpointing:
        logprobs.checkpoint_layers(model)
    print(json.dumps(update_memory(model, device)))


if __name__ == "__main__":
    run(main)
