"""Our plain engine against what Hugging Face has: same model, prompts, temperature, limit, cores.

    engine          rollout.Engine without drafts
    generate        model.generate, all prompts at once, padded on the left
    continuous      model.generate_batch, its continuous batching; from batch 2 on
    prompt lookup   model.generate with prompt_lookup_num_tokens; at batch 1, where it works
    with drafter    model.generate with our drafter (custom_generate/), if the model has one; at batch 1

A batch is `batch` responses, 16 to a prompt; batch 1 is eight prompts one after the other.
Ratio: tokens per second at the last batch size, the engine's over those of the fastest of the next three. The party
`with drafter` is not among them: it is ours, too.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.harness import Result, Settings, groups_for, load, room, rounds_flag, take_turns, threads_flag
from custom_generate.generate import generate
from parts.cli import check_at_least, flag
from parts.engine.interfaces import Group
from parts.engine.model_loading import cast_weights, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import find_folder
from rollout import Engine

RIVALS = ("generate", "continuous", "prompt lookup")
PARTIES = ("engine", *RIVALS, "with drafter")


@dataclass(frozen=True)
class Config(Settings):
    """Settings of this table."""

    rounds: int = rounds_flag()
    threads: int = threads_flag()
    batches: tuple[int, ...] = flag((1, 8, 32, 128), "responses at once")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rounds", "threads", "max_new")


class Models(NamedTuple):
    """The same policy for both sides."""

    ours: torch.nn.Module
    stock: torch.nn.Module
    tokenizer: object
    stop: set[int]
    has_drafter: bool


def load_models(config: Settings) -> Models:
    """Raises UserError."""
    folder = find_folder(config.model)
    ours, tokenizer = load(config)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = cast_weights(stock, ours.dtype).to(ours.device).eval()
    return Models(ours, stock, tokenizer, stop_tokens(ours, tokenizer), (Path(folder) / "drafter").exists())


class Contest:
    """The parties at one batch size. Each is a method that makes one turn and returns the number of its tokens."""

    def __init__(self, config: Config, models: Models, batch: int, turns_before: int):
        """turns_before: of smaller batches; each turn has samples of its own."""
        self.config = config
        self.models = models
        self.batch = batch
        self.turn = turns_before
        self.our_engine = Engine(models.ours, models.stop, slots=batch)
        self.groups: list[Group] = []
        self.prompts: list[list[int]] = []  # one for each response
        self.use(groups_for(models.tokenizer, batch, 0))
        self.settings = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": config.max_new,
            "eos_token_id": sorted(models.stop),
            "pad_token_id": models.tokenizer.pad_token_id,
        }

    def use(self, groups: list[Group]) -> None:
        """These are the prompts."""
        self.groups = groups
        self.prompts = []
        for group in groups:
            self.prompts += [group.prompt] * len(group.seeds)

    def parties(self) -> dict:
        """Name -> turn. The engine is first: it counts the turns."""
        parties = {"engine": self.engine, "generate": self.generate}
        if self.batch > 1:
            parties["continuous"] = self.continuous
            return parties
        parties["prompt lookup"] = partial(self.generate, prompt_lookup_num_tokens=4)
        if self.models.has_drafter:
            parties["with drafter"] = partial(self.generate, partial(generate, self.models.stock))
        return parties

    def engine(self) -> int:
        """Ours."""
        self.turn += 1
        groups = []
        for i, group in enumerate(self.groups):
            seeds = [sequence_seed((self.config.seed, self.turn), i, k) for k in range(len(group.seeds))]
            groups.append(Group(i, group.prompt, seeds))
        self.our_engine.reserve(room(groups, self.config.max_new))
        responses = self.our_engine.generate(groups, Sampling(max_new=self.config.max_new))
        return sum(len(response.tokens) for response in responses)

    def generate(self, decode=None, **more) -> int:
        """Theirs, as one batch. decode: stands in for `generate`; more: settings of it."""
        decode = decode or self.models.stock.generate
        torch.manual_seed(self.config.seed + self.turn)
        parts = [self.prompts] if self.batch > 1 else [[prompt] for prompt in self.prompts]
        tokens = 0
        for part in parts:
            padded = self.models.tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
            padded = padded.to(self.models.stock.device)
            with torch.inference_mode():
                out = decode(**padded, **self.settings, **more)
            tokens += self.count(out[:, padded["input_ids"].shape[1] :])
        return tokens

    def count(self, out: torch.Tensor) -> int:
        """Tokens of the responses (B, T) up to and with their stop tokens; the rest is padding."""
        stop = torch.tensor(sorted(self.models.stop), device=out.device)
        ended = torch.isin(out, stop).cumsum(1)  # (B, T): stop tokens so far
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum())

    def continuous(self) -> int:
        """Theirs, with continuous batching."""
        settings = GenerationConfig(**{**self.settings, "eos_token_id": max(self.models.stop)})
        with torch.no_grad():  # it works in a thread of its own, and does not stand inference_mode
            out = self.models.stock.generate_batch(inputs=self.prompts, generation_config=settings, progress_bar=False)
        return sum(len(response.generated_tokens) for response in out.values())


def measure(config: Config) -> Result:
    """One row for each batch size."""
    torch.set_num_threads(config.threads)
    models = load_models(config)
    rows = []
    for i, batch in enumerate(config.batches):
        contest = Contest(config, models, batch, turns_before=i * config.rounds)
        speeds = take_turns(contest.parties(), config.rounds, f"batch {batch}")
        row = {"batch": batch}
        for name, speed in speeds.items():
            row[name] = speed.tokens_per_second
        row["ratio"] = row["engine"] / max(row[name] for name in RIVALS if name in row)
        rows.append(row)
    return Result(rows[-1]["ratio"], rows, models.ours.device.type)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    head = " ".join(f"{name:>14}" for name in PARTIES)
    lines = ["tokens per second", f"{'batch':>6} {head} {'ratio':>6}"]
    for row in rows:
        cells = " ".join(f"{row[name]:14.0f}" if name in row else " " * 14 for name in PARTIES)
        lines.append(f"{row['batch']:6d} {cells} {row['ratio']:6.2f}")
    return "\n".join(lines)
