"""Speculative against plain decoding of the same engine, token by token.

Drafts must not change a token: every mode of drafting, at three ways to sample, is compared with plain decoding of the
same prompts and seeds. Where the tokens are the same, their log-probabilities are compared, too.

    chain k         the learned drafter, k drafts a round
    tree 4x2        4 drafts with a sibling each (accept.Tree)
    n-gram 4        drafts without a model
    changing        kind and length drawn anew for each round
    changing tree   the same, with siblings

Ratio: share of identical responses over all modes.
"""

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.harness import DrafterSettings, Result, drafted_engine, groups_for, load_policy, room, threads_flag
from parts.cli import check_at_least, flag
from parts.engine.acceptance import Tree
from parts.engine.interfaces import DraftPlan, Group, Response, Sequence, Strategy
from parts.engine.model_loading import ACTOR_DTYPES
from parts.engine.sampling import Sampling
from rollout import Engine

SLOTS = 64


@dataclass(frozen=True)
class Config(DrafterSettings):
    """Settings of this table."""

    actor_dtype: str = flag("float32", "weights; in bfloat16 checking rounds otherwise than decoding", ACTOR_DTYPES)
    threads: int = threads_flag()
    responses: int = flag(1024, "responses at temperature 1; the other ways to sample have counts of their own")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "threads", "max_new", "responses")


class Changing(Strategy):
    """Kind and length at random."""

    def __init__(self, seed: int):
        super().__init__()
        self.rng = random.Random(seed)

    def choose(self, running: list[Sequence]) -> DraftPlan:
        """As Strategy.choose."""
        return DraftPlan(self.rng.choice(["eagle", "ngram"]), self.rng.choice([0, 1, 2, 4, 8]))


class Mode(NamedTuple):
    """A way to draft."""

    name: str
    engine: Engine
    strategy: Strategy


class Workload(NamedTuple):
    """A way to sample, and what is sampled so."""

    title: str
    sampling: Sampling
    groups: list[Group]


def modes_of(coupled: Engine, tree: Engine, seed: int) -> list[Mode]:
    """All modes. tree: an engine whose drafts have siblings."""
    modes = [Mode(f"chain {k}", coupled, Strategy(DraftPlan("eagle", k))) for k in range(1, 9)]
    modes.append(Mode("tree 4x2", tree, Strategy(DraftPlan("eagle", 4))))
    modes.append(Mode("n-gram 4", coupled, Strategy(DraftPlan("ngram", 4))))
    modes.append(Mode("changing", coupled, Changing(seed)))
    modes.append(Mode("changing tree", tree, Changing(seed)))
    return modes


def workloads_of(config: Config, tokenizer) -> list[Workload]:
    """The three ways to sample."""
    limit = config.max_new
    greedy = groups_for(tokenizer, 1024, config.seed)
    greedy = [replace(group, seeds=group.seeds[:1]) for group in greedy]  # all samples of a prompt would be the same
    return [
        Workload("temperature 1", Sampling(max_new=limit), groups_for(tokenizer, config.responses, config.seed)),
        Workload("temperature 0", Sampling(0.0, max_new=limit), greedy),
        Workload("top-p 0.9", Sampling(top_p=0.9, max_new=limit), groups_for(tokenizer, 256, config.seed)),
    ]


def compare(plain: dict[tuple, Response], mode: Mode, workload: Workload) -> dict:
    """A row: the mode against plain decoding. plain: (group, sample) -> response."""
    identical = 0
    gap = 0.0
    mode.engine.reserve(room(workload.groups, workload.sampling.max_new))
    for response in mode.engine.generate(workload.groups, workload.sampling, mode.strategy):
        other = plain[response.group, response.sample]
        if response.tokens == other.tokens:
            identical += 1
            gap = max(gap, (response.logprobs - other.logprobs).abs().max().item())
    stats = mode.engine.stats
    return {
        "sampling": workload.title,
        "mode": mode.name,
        "responses": len(plain),
        "identical": identical,
        "largest_logprob_gap": gap,
        "tokens_per_round": stats.spec_tokens / max(1, stats.spec_sequence_rounds),
    }


def measure(config: Config) -> Result:
    """One row for each way to sample and mode."""
    torch.set_num_threads(config.threads)
    policy = load_policy(config)
    coupled = drafted_engine(policy, SLOTS)
    tree = drafted_engine(policy, SLOTS, partial(Tree, width=2))
    modes = modes_of(coupled, tree, config.seed)
    rows = []
    for workload in workloads_of(config, policy.tokenizer):
        coupled.reserve(room(workload.groups, config.max_new))
        responses = coupled.generate(workload.groups, workload.sampling)
        plain = {(response.group, response.sample): response for response in responses}
        rows += [compare(plain, mode, workload) for mode in tqdm(modes, desc=workload.title)]
    identical = sum(row["identical"] for row in rows)
    return Result(identical / sum(row["responses"] for row in rows), rows, policy.model.device.type)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'sampling':>14} {'mode':>13} {'identical':>14} {'log-prob gap':>13} {'tokens per round':>17}"]
    for row in rows:
        share = f"{row['identical']:7d}/{row['responses']:<6d}"
        gap = f"{row['largest_logprob_gap']:13.1e}"
        lines.append(f"{row['sampling']:>14} {row['mode']:>13} {share} {gap} {row['tokens_per_round']:17.2f}")
    return "\n".join(lines)
