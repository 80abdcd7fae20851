"""Ways to draft against plain rollout of the same engine: the same prompts, seeds and (but for `ratio 4`) tokens.

Workloads:

    one     8 responses, one after the other
    tail    8 sequences, until the last is finished: what is left at the end of a rollout
    bulk    full slots, short responses
    mixed   --responses, at their natural lengths, in --slots

Modes: plain; chains of fixed length; a chain with siblings; n-grams; the textbook accept rule, whose tokens are others
of the same distribution; and the two strategies that choose from what they measure, which continue to learn from turn
to turn. A first turn does not count: memory is touched, strategies try their plans.

Ratio: goodput over plain on the last workload. With --json FILE also a picture beside the file.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.harness import (
    DrafterSettings,
    Policy,
    Result,
    batch_groups,
    fixed,
    load_policy,
    make_engine,
    picture,
    take_turns,
    tokens_per_round,
)
from parts.cli import flag
from parts.engine.acceptance import Ratio, Tree
from parts.engine.interfaces import Group, Stats, Strategy
from parts.engine.sampling import Sampling
from rollout import Engine
from strategy import BegMab, Goodput, plans_for

WORKLOADS = ("one", "tail", "bulk", "mixed")
COLUMNS = {"workload": "", "mode": "", "tokens_per_second": ".0f", "ratio": ".2f", "tokens_per_round": ".2f"}
COLUMNS |= {"draft_share": ".0%", "rounds": ""}


@dataclass(frozen=True)
class Config(DrafterSettings):
    rounds: int = flag(3, "turns of each party")
    workloads: tuple[str, ...] = flag(WORKLOADS, "which workloads", WORKLOADS)
    slots: int = flag(64, "sequences at once, of bulk and mixed")
    responses: int = flag(128, "how many, of bulk and mixed")


Ways = dict[str, tuple[Engine, Strategy]]  # by mode


def compare(ways: Ways, groups: list[Group], sampling: Sampling, rounds: int, title: str) -> list[dict]:
    """Return a row for each mode, of which the first is plain decoding."""
    last: dict[str, Stats] = {}  # of the last rollout of each mode

    def roll_out(mode: str) -> int:
        engine, strategy = ways[mode]
        tokens = sum(len(response.tokens) for response in engine.generate(groups, sampling, strategy))
        last[mode] = engine.stats
        return tokens

    for mode in ways:
        roll_out(mode)  # the turn that does not count
    speeds = take_turns({mode: partial(roll_out, mode) for mode in ways}, rounds, title)
    plain = next(iter(speeds.values()))
    rows = []
    for mode, speed in speeds.items():
        stats = last[mode]
        row = {"mode": mode, "tokens_per_second": speed, "ratio": speed / plain}
        row["tokens_per_round"] = tokens_per_round(stats)
        row["draft_share"] = stats.draft_seconds / stats.seconds
        rows.append({**row, "rounds": stats.rounds, "tokens": stats.tokens})
    return rows


def ways_of(policy: Policy, slots: int, groups: list[Group], config: Config) -> Ways:
    """Return all modes."""
    strategies = {"plain": fixed(0)}
    for k in (1, 2, 4, 6, 8, 12):
        strategies[f"chain {k}"] = fixed(k)
    strategies["tree 4x2"] = fixed(4)
    strategies["n-gram 4"] = fixed(4, "ngram")
    strategies["ratio 4"] = fixed(4)
    strategies["beg-mab"] = BegMab(plans_for(["eagle", "ngram"]))
    strategies["goodput"] = Goodput(plans_for(["eagle", "ngram"]))
    coupled = make_engine(policy, slots, groups, config.max_new)
    rules = {"tree 4x2": partial(Tree, width=2), "ratio 4": Ratio}
    ways = {mode: (coupled, strategy) for mode, strategy in strategies.items()}
    for mode, rule in rules.items():
        ways[mode] = (make_engine(policy, slots, groups, config.max_new, rule=rule), strategies[mode])
    return ways


def measure(config: Config) -> Result:
    """Return a row for each workload and mode."""
    policy = load_policy(config)
    rows = []
    for workload in config.workloads:
        batch, slots = {"one": (1, 1), "tail": (8, 8)}.get(workload, (config.responses, config.slots))
        groups = batch_groups(policy.tokenizer, batch, config.seed)
        sampling = Sampling(max_new=48 if workload == "bulk" else config.max_new)
        compared = compare(ways_of(policy, slots, groups, config), groups, sampling, config.rounds, workload)
        rows += [{"workload": workload, **row} for row in compared]
    if config.json:
        draw(rows, config.workloads, Path(config.json).with_suffix(".png"))
    return Result(rows[-1]["ratio"], rows, policy.model.device.type)  # goodput is the last mode


def draw(rows: list[dict], workloads: tuple[str, ...], path: Path) -> None:
    """Draw a bar for each mode and workload."""
    width = 0.8 / len(workloads)
    modes = list(dict.fromkeys(row["mode"] for row in rows if row["mode"] != "plain"))
    with picture(path, ["rollout speed over plain decoding, same tokens"]) as (axis,):
        for i, workload in enumerate(workloads):
            ratios = [row["ratio"] for row in rows if row["workload"] == workload and row["mode"] != "plain"]
            axis.bar([x + i * width for x in range(len(modes))], ratios, width, align="edge", label=workload)
        axis.axhline(1, color="0.3", lw=1)
        axis.set(xticks=[x + 0.4 for x in range(len(modes))], xticklabels=modes)
