"""Speculative against plain decoding of the same engine, token by token.

Draft tokens must not change a response: every mode of drafting, at three ways to sample, is compared with plain
decoding of the same prompts and seeds. Where the tokens are the same, their log-probabilities are compared, too.

    chain k         the EAGLE drafter, k draft tokens a round
    tree 4x2        4 draft tokens with a sibling each (acceptance.Tree)
    n-gram 4        draft tokens without a model
    changing        method and length drawn anew for each round
    changing tree   the same, with siblings

Ratio: share of identical responses over all modes.
"""

import random
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from bench.harness import (
    DrafterSettings,
    Result,
    batch_groups,
    by_name,
    fixed,
    load_policy,
    make_engine,
    same_tokens,
    tokens_per_round,
)
from parts.cli import flag
from parts.engine.acceptance import Coupled, Tree
from parts.engine.interfaces import DraftPlan, Group, Sequence, Strategy
from parts.engine.model_loading import ACTOR_DTYPES
from parts.engine.sampling import Sampling

COLUMNS = dict.fromkeys(("sampling", "mode", "responses", "identical"), "")
COLUMNS |= {"largest_logprob_gap": ".1e", "tokens_per_round": ".2f"}


@dataclass(frozen=True)
class Config(DrafterSettings):
    """Settings of this table."""

    actor_dtype: str = flag("float32", "weights; in bfloat16 verifying rounds otherwise than decoding", ACTOR_DTYPES)
    responses: int = flag(1024, "responses at temperature 1; the other ways to sample have counts of their own")


class Changing(Strategy):
    """Method and length at random."""

    def __init__(self, seed: int):
        super().__init__()
        self.rng = random.Random(seed)

    def choose(self, running: list[Sequence]) -> DraftPlan:
        return DraftPlan(self.rng.choice(["eagle", "ngram"]), self.rng.choice([0, 1, 2, 4, 8]))


def modes_of(seed: int) -> dict[str, Strategy]:
    """Return all modes. Those named `tree` need an engine with siblings."""
    modes = {f"chain {k}": fixed(k) for k in range(1, 9)}
    modes["tree 4x2"] = fixed(4)
    modes["n-gram 4"] = fixed(4, "ngram")
    return {**modes, "changing": Changing(seed), "changing tree": Changing(seed)}


def workloads_of(config: Config, tokenizer) -> dict[str, tuple[Sampling, list[Group]]]:
    """Return the three ways to sample, with what is sampled so."""
    limit = config.max_new
    greedy = batch_groups(tokenizer, 1024, config.seed)
    greedy = [replace(group, seeds=group.seeds[:1]) for group in greedy]  # all samples of a prompt would be the same
    sampled = batch_groups(tokenizer, config.responses, config.seed)
    return {
        "temperature 1": (Sampling(max_new=limit), sampled),
        "temperature 0": (Sampling(0.0, max_new=limit), greedy),
        "top-p 0.9": (Sampling(top_p=0.9, max_new=limit), batch_groups(tokenizer, 256, config.seed)),
    }


def measure(config: Config) -> Result:
    """Return a row for each way to sample and mode."""
    policy = load_policy(config)
    workloads = workloads_of(config, policy.tokenizer)
    groups = [group for _, groups in workloads.values() for group in groups]
    rules = {"coupled": Coupled, "tree": partial(Tree, width=2)}
    engines = {name: make_engine(policy, 64, groups, config.max_new, rule=rule) for name, rule in rules.items()}
    rows = []
    for title, (sampling, groups) in workloads.items():
        plain = by_name(engines["coupled"].generate(groups, sampling))
        for mode, strategy in tqdm(modes_of(config.seed).items(), desc=title):
            engine = engines["tree" if "tree" in mode else "coupled"]
            responses = by_name(engine.generate(groups, sampling, strategy))
            same = same_tokens(responses, plain)
            gaps = [(responses[name].logprobs - plain[name].logprobs).abs().max().item() for name in same]
            row = {"sampling": title, "mode": mode, "responses": len(plain), "identical": len(same)}
            row["largest_logprob_gap"] = max(gaps, default=0.0)
            row["tokens_per_round"] = tokens_per_round(engine.stats)
            rows.append(row)
    identical = sum(row["identical"] for row in rows)
    return Result(identical / sum(row["responses"] for row in rows), rows, policy.model.device.type)
