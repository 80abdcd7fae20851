"""Merge a LoRA adapter in peft's format into its model: the result is an ordinary Hugging Face folder, with the adapter
again in adapter/.

python -m base.merge --model runs/smollm2 --adapter base/searcher --out runs/searcher
"""

import json
from dataclasses import dataclass
from pathlib import Path

from parts.cli import UserError, flag, parse_flags, reason, run
from parts.engine.model_loading import load_model
from parts.running import checkpoints
from parts.training import lora


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    model: str = flag("runs/smollm2", "the model that the adapter was trained for: a folder or a hub name")
    adapter: str = flag("base/searcher", "folder of the adapter")
    out: str = flag("runs/searcher", "folder for the merged model")


def rank_of(adapter: str) -> int:
    """Return the rank of the adapter in a folder. Raises UserError."""
    try:
        return int(json.loads((Path(adapter) / lora.SETTINGS).read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--adapter {adapter}: no adapter in peft's format there: {reason(error)}") from error


def main() -> None:
    """Load both, and write the merged model."""
    command = parse_flags(Command, __doc__)
    rank = rank_of(command.adapter)
    model, tokenizer = load_model(command.model)
    lora.add(model, rank, seed=0)
    lora.load(Path(command.adapter), model)
    weights = checkpoints.whole_weights(model)
    card = Path(command.adapter) / "README.md"

    def fill(folder: Path) -> None:
        checkpoints.save_policy(folder, model, tokenizer, weights)
        if card.exists():
            (folder / "README.md").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")

    checkpoints.save_folder(Path(command.out), fill)
    print(f"{command.out}: {command.model} with the adapter {command.adapter}")


if __name__ == "__main__":
    run(main)
