"""The plain engine against what Hugging Face has: same model, prompts, temperature, limit, cores.

    engine          rollout.Engine without draft tokens
    generate        model.generate, all prompts at once, padded on the left
    continuous      model.generate_batch, its continuous batching; from batch 2 on
    prompt lookup   model.generate with prompt_lookup_num_tokens; at batch 1, where it works
    with drafter    model.generate with our drafter (custom_generate/), if the model has one; at batch 1

A batch is `batch` responses, 16 to a prompt; batch 1 is eight prompts one after the other.
Ratio: tokens per second at the last batch size, the engine's over those of the fastest of the next three. `with
drafter` is not among them: it is ours, too.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.harness import Policy, Result, Settings, batch_groups, load, make_engine, own_drafter, take_turns
from custom_generate.generate import generate
from parts.cli import flag
from parts.engine.interfaces import Group
from parts.engine.model_loading import cast_weights
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import find_folder

RIVALS = ("generate", "continuous", "prompt lookup")
COLUMNS = {"batch": "", **dict.fromkeys(("engine", *RIVALS, "with drafter"), ".0f"), "ratio": ".2f"}


@dataclass(frozen=True)
class Config(Settings):
    rounds: int = flag(3, "turns of each party")
    batches: tuple[int, ...] = flag((1, 8, 32, 128), "responses at once")


def load_stock(config: Settings, policy: Policy) -> torch.nn.Module:
    """Return the same model with Hugging Face's own attention."""
    stock = AutoModelForCausalLM.from_pretrained(find_folder(config.model), dtype=torch.float32)
    return cast_weights(stock, policy.model.dtype).to(policy.model.device).eval()


class Contest:
    """The parties at one batch size. Each is a method that takes one turn and returns the number of its tokens."""

    def __init__(self, config: Settings, policy: Policy, stock: torch.nn.Module, batch: int, groups: list[Group]):
        """groups: the prompts; each turn has samples of its own."""
        self.policy = policy
        self.stock = stock
        self.batch = batch
        self.groups = groups
        self.seed = config.seed
        self.has_drafter = own_drafter(config.model) is not None
        self.max_new = config.max_new
        self.turn = 0
        self.our_engine = make_engine(policy._replace(drafter=None), batch, groups, config.max_new)
        self.prompts: list[list[int]] = []  # one for each response
        for group in groups:
            self.prompts += [group.prompt] * len(group.seeds)
        self.settings = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": config.max_new,
            "eos_token_id": sorted(policy.stop),
            "pad_token_id": policy.tokenizer.pad_token_id,
        }

    def parties(self) -> dict:
        """Return name -> turn. The engine is first: it counts the turns."""
        parties = {"engine": self.engine, "generate": self.generate}
        if self.batch > 1:
            return {**parties, "continuous": self.continuous}
        parties["prompt lookup"] = partial(self.generate, prompt_lookup_num_tokens=4)
        if self.has_drafter:
            parties["with drafter"] = partial(self.generate, partial(generate, self.stock))
        return parties

    def engine(self) -> int:
        """Take the engine's turn."""
        self.turn += 1
        groups = []
        for i, group in enumerate(self.groups):
            seeds = [sequence_seed((self.seed, self.batch, self.turn), i, k) for k in range(len(group.seeds))]
            groups.append(Group(i, group.prompt, seeds))
        responses = self.our_engine.generate(groups, Sampling(max_new=self.max_new))
        return sum(len(response.tokens) for response in responses)

    def generate(self, decode=None, **more) -> int:
        """Take the turn of `generate`, or of `decode` in its place, with further settings."""
        decode = decode or self.stock.generate
        torch.manual_seed(self.seed + 1000 * self.batch + self.turn)
        parts = [self.prompts] if self.batch > 1 else [[prompt] for prompt in self.prompts]
        tokens = 0
        for part in parts:
            padded = self.policy.tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
            padded = padded.to(self.stock.device)
            with torch.inference_mode():
                out = decode(**padded, **self.settings, **more)
            tokens += self.count(out[:, padded["input_ids"].shape[1] :])
        return tokens

    def count(self, out: torch.Tensor) -> int:
        """Return the tokens of the responses (B, T), stop tokens included; the rest is padding."""
        stop = torch.tensor(sorted(self.policy.stop), device=out.device)
        ended = torch.isin(out, stop).cumsum(1)  # (B, T): stop tokens so far
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum())

    def continuous(self) -> int:
        """Take the turn of continuous batching."""
        settings = GenerationConfig(**{**self.settings, "eos_token_id": max(self.policy.stop)})
        with torch.no_grad():  # it works in a thread of its own, and cannot run in inference_mode
            out = self.stock.generate_batch(inputs=self.prompts, generation_config=settings, progress_bar=False)
        return sum(len(response.generated_tokens) for response in out.values())

    def row(self, rounds: int, without: tuple[str, ...] = ()) -> dict:
        """Take turns -> tokens per second of each party, and the ratio. without: parties to leave out."""
        parties = {name: party for name, party in self.parties().items() if name not in without}
        speeds = take_turns(parties, rounds, f"batch {self.batch}")
        best = max(speeds[name] for name in RIVALS if name in speeds)
        return {"batch": self.batch, **speeds, "ratio": speeds["engine"] / best}


def measure(config: Config) -> Result:
    """Return a row for each batch size."""
    policy = load(config)
    stock = load_stock(config, policy)
    rows = []
    for batch in config.batches:
        groups = batch_groups(policy.tokenizer, batch, config.seed)
        rows.append(Contest(config, policy, stock, batch, groups).row(config.rounds))
    return Result(rows[-1]["ratio"], rows, policy.model.device.type)
