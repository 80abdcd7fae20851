"""Speculative against plain decoding of the same engine, token by token.

Draft tokens must not change a response: every mode of drafting, at three ways to sample, is compared with plain
decoding of the same prompts and seeds. Where the tokens are the same, their log-probabilities are compared, too. Where
they first differ at scores less than 0.001 apart, which is the rounding of float32 kernels of other shapes, that is
counted as a tie; any other difference is an error, and counted as wrong.

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

import torch
from tqdm import tqdm

from bench.harness import (
    DrafterSettings,
    Policy,
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
from parts.engine.acceptance import Tree
from parts.engine.interfaces import DraftPlan, Group, Response, Sequence, Strategy
from parts.engine.model_loading import ACTOR_DTYPES
from parts.engine.sampling import Sampling, all_token_ids, noise_for, split_seeds
from rollout import Engine

TIE = 1e-3  # of two scores
COLUMNS = dict.fromkeys(("sampling", "mode", "responses", "identical", "ties", "wrong"), "")
COLUMNS |= {"largest_logprob_gap": ".1e", "tokens_per_round": ".2f"}


@dataclass(frozen=True)
class Config(DrafterSettings):
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


@torch.no_grad()
def margin(policy: Policy, group: Group, ours: Response, theirs: list[int], sampling: Sampling) -> float:
    """Return how far apart the scores of two responses' tokens are where they first differ, by an ordinary forward."""
    place = next((i for i, (a, b) in enumerate(zip(ours.tokens, theirs)) if a != b), None)
    if place is None:
        return torch.inf  # one is just longer
    ids = torch.tensor([group.prompt + ours.tokens[:place]], device=policy.model.device)
    scores = policy.model(input_ids=ids, use_cache=False).logits[:, -1].float() / (sampling.temperature or 1)
    seeds = split_seeds(torch.tensor([group.seeds[ours.sample]], device=ids.device))
    token_ids = all_token_ids(scores.shape[1], ids.device)
    scores = scores + noise_for(sampling, seeds, torch.full_like(ids[:, :1], place), token_ids).view(-1, 1).T
    return (scores[0, ours.tokens[place]] - scores[0, theirs[place]]).abs().item()


def differences(policy: Policy, groups: list[Group], responses: dict, theirs: dict, sampling: Sampling) -> dict:
    """Count the responses that are identical, that differ after a tie, and that are wrong. theirs: name -> tokens."""
    counts = {"responses": len(responses), "identical": 0, "ties": 0, "wrong": 0}
    by_key = {group.key: group for group in groups}
    for name, response in responses.items():
        kind = "identical"
        if response.tokens != theirs[name]:
            gap = margin(policy, by_key[response.group], response, theirs[name], sampling)
            kind = "ties" if gap < TIE else "wrong"
        counts[kind] += 1
    return counts


def compare(
    policy: Policy, ways: dict[str, tuple[Engine, Strategy]], groups: list[Group], sampling: Sampling, title: str
) -> list[dict]:
    """Return a row for each way to draft, against plain decoding of the first engine."""
    plain = by_name(next(iter(ways.values()))[0].generate(groups, sampling))
    tokens = {name: response.tokens for name, response in plain.items()}
    rows = []
    for mode, (engine, strategy) in tqdm(ways.items(), desc=title, unit="mode"):
        responses = by_name(engine.generate(groups, sampling, strategy))
        same = same_tokens(responses, plain)
        gaps = [(responses[name].logprobs - plain[name].logprobs).abs().max().item() for name in same]
        row = {"mode": mode, **differences(policy, groups, responses, tokens, sampling)}
        row["largest_logprob_gap"] = max(gaps, default=0.0)
        rows.append({**row, "tokens_per_round": tokens_per_round(engine.stats)})
    return rows


def measure(config: Config) -> Result:
    """Return a row for each way to sample and mode."""
    policy = load_policy(config)
    workloads = workloads_of(config, policy.tokenizer)
    groups = [group for _, groups in workloads.values() for group in groups]
    coupled = make_engine(policy, 64, groups, config.max_new)
    tree = make_engine(policy, 64, groups, config.max_new, rule=partial(Tree, width=2))
    rows = []
    for title, (sampling, groups) in workloads.items():
        modes = modes_of(config.seed).items()
        ways = {mode: (tree if "tree" in mode else coupled, strategy) for mode, strategy in modes}
        compared = compare(policy, ways, groups, sampling, title)
        rows += [{"sampling": title, **row} for row in compared]
    identical = sum(row["identical"] for row in rows)
    return Result(identical / sum(row["responses"] for row in rows), rows, policy.model.device.type)
