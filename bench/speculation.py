"""Ways to draft against plain rollout of the same engine: the same prompts, seeds and (but for `ratio 4`) tokens.

Workloads:

    one     8 responses, one after the other
    tail    8 rows, until the last is done: what is left at the end of a rollout
    bulk    full slots, short responses
    mixed   --responses, at their natural lengths, in --slots

Modes: plain; chains of fixed length; a chain with siblings; n-grams; the textbook accept rule, whose tokens are others
of the same distribution; and the two strategies that choose by what they measure, which go on learning from turn to
turn. A first turn does not count: memory is touched, strategies look around.

Ratio: goodput over plain on the last workload. With --json FILE also a picture beside the file.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.harness import (
    DrafterSettings,
    Policy,
    Result,
    Speed,
    drafted_engine,
    groups_for,
    load_policy,
    room,
    rounds_flag,
    take_turns,
    threads_flag,
)
from parts.cli import UserError, check_at_least, flag
from parts.engine.acceptance import Ratio, Tree
from parts.engine.interfaces import DraftPlan, Group, Stats, Strategy
from parts.engine.sampling import Sampling
from parts.running.pictures import pyplot
from rollout import Engine
from strategy import BegMab, Goodput, plans_for

CHAINS = (1, 2, 4, 6, 8, 12)
WORKLOADS = ("one", "tail", "bulk", "mixed")


@dataclass(frozen=True)
class Config(DrafterSettings):
    """Settings of this table."""

    rounds: int = rounds_flag()
    threads: int = threads_flag()
    workloads: tuple[str, ...] = flag(WORKLOADS, "which workloads", WORKLOADS)
    slots: int = flag(64, "rows at once, of bulk and mixed")
    responses: int = flag(128, "how many, of bulk and mixed")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rounds", "threads", "max_new", "slots", "responses")


@dataclass(frozen=True)
class Workload:
    """What is rolled out."""

    name: str
    batch: int  # responses; of one row at a time eight, see groups_for
    slots: int
    max_new: int


def workload_named(name: str, config: Config) -> Workload:
    """See above. Raises UserError."""
    workloads = [
        Workload("one", 1, 1, config.max_new),
        Workload("tail", 8, 8, config.max_new),
        Workload("bulk", config.responses, config.slots, 48),
        Workload("mixed", config.responses, config.slots, config.max_new),
    ]
    for workload in workloads:
        if workload.name == name:
            return workload
    raise UserError(f"--workloads {name}: {', '.join(WORKLOADS)}")


class Rollout:
    """A party: the same groups, drafted in one way. Called, it rolls them out and returns the number of tokens."""

    def __init__(self, engine: Engine, strategy: Strategy, groups: list[Group], sampling: Sampling):
        self.engine = engine
        self.strategy = strategy
        self.groups = groups
        self.sampling = sampling
        self.stats = Stats()  # of the last rollout

    def __call__(self) -> int:
        responses = self.engine.generate(self.groups, self.sampling, self.strategy)
        tokens = sum(len(response.tokens) for response in responses)
        self.stats = self.engine.stats
        return tokens


def parties_of(policy: Policy, workload: Workload, config: Config) -> dict[str, Rollout]:
    """Mode -> party."""
    groups = groups_for(policy.tokenizer, workload.batch, config.seed)
    sampling = Sampling(max_new=workload.max_new)
    rules = {"tree 4x2": partial(Tree, width=2), "ratio 4": Ratio}
    coupled = drafted_engine(policy, workload.slots)
    engines = {mode: drafted_engine(policy, workload.slots, rule) for mode, rule in rules.items()}
    for engine in (coupled, *engines.values()):
        engine.reserve(room(groups, config.max_new))

    strategies = {"plain": Strategy()}
    for k in CHAINS:
        strategies[f"chain {k}"] = Strategy(DraftPlan("eagle", k))
    strategies["tree 4x2"] = Strategy(DraftPlan("eagle", 4))
    strategies["n-gram 4"] = Strategy(DraftPlan("ngram", 4))
    strategies["ratio 4"] = Strategy(DraftPlan("eagle", 4))
    strategies["beg-mab"] = BegMab(plans_for(["eagle", "ngram"]))
    strategies["goodput"] = Goodput(plans_for(["eagle", "ngram"]))

    parties = {}
    for mode, strategy in strategies.items():
        parties[mode] = Rollout(engines.get(mode, coupled), strategy, groups, sampling)
    return parties


def row_of(workload: Workload, mode: str, speed: Speed, plain: Speed, stats: Stats) -> dict:
    """plain: how plain rollout did; stats: of the party's last turn."""
    return {
        "workload": workload.name,
        "mode": mode,
        "tokens_per_second": speed.tokens_per_second,
        "ratio": speed.tokens_per_second / plain.tokens_per_second,
        "tokens_per_round": stats.spec_tokens / max(1, stats.spec_sequence_rounds),
        "draft_share": stats.draft_seconds / stats.seconds,
        "rounds": stats.rounds,
        "tokens": speed.tokens,
    }


def measure(config: Config) -> Result:
    """One row for each workload and mode."""
    torch.set_num_threads(config.threads)
    policy = load_policy(config)
    rows = []
    for name in config.workloads:
        workload = workload_named(name, config)
        parties = parties_of(policy, workload, config)
        for party in parties.values():
            party()  # the turn that does not count
        speeds = take_turns(parties, config.rounds, name)
        for mode, speed in speeds.items():
            rows.append(row_of(workload, mode, speed, speeds["plain"], parties[mode].stats))
    if config.json:
        draw(rows, config.workloads, Path(config.json).with_suffix(".png"))
    return Result(rows[-1]["ratio"], rows, policy.model.device.type)  # goodput is the last mode


def table(rows: list[dict]) -> str:
    """The rows as text."""
    head = f"{'tok/s':>7} {'ratio':>6} {'tokens per round':>17} {'drafting':>9} {'rounds':>7}"
    lines = [f"{'workload':>8} {'mode':>9} {head}"]
    for row in rows:
        speed = f"{row['tokens_per_second']:7.0f} {row['ratio']:6.2f} {row['tokens_per_round']:17.2f}"
        cost = f"{row['draft_share']:9.0%} {row['rounds']:7d}"
        lines.append(f"{row['workload']:>8} {row['mode']:>9} {speed} {cost}")
    return "\n".join(lines)


def draw(rows: list[dict], workloads: tuple[str, ...], path: Path) -> None:
    """A bar for each mode and workload."""
    figure, axis = pyplot().subplots(figsize=(11, 3.6))
    width = 0.8 / len(workloads)
    modes = list(dict.fromkeys(row["mode"] for row in rows if row["mode"] != "plain"))
    for i, workload in enumerate(workloads):
        ratios = [row["ratio"] for row in rows if row["workload"] == workload and row["mode"] != "plain"]
        axis.bar([x + i * width for x in range(len(modes))], ratios, width, align="edge", label=workload)
    axis.axhline(1, color="0.3", lw=1)
    axis.set(title="rollout speed over plain decoding, same tokens")
    axis.set(xticks=[x + 0.4 for x in range(len(modes))], xticklabels=modes)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
