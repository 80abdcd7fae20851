"""Rollout time with 1 to 64 workers of one core (or GPU) each, predicted by a small simulation.

Measured here, with one worker: how long a round takes by batch size, how many tokens a row gets in it, plain and
speculative, and how long the responses are. The simulation then deals the same responses, in groups of 16, to more
workers, as tlt.py does: a worker takes the next group when its rows fit, and a round takes as long as its live rows
make it. Workers beyond the number of groups have nothing to do.

Ratio: plain over speculative rollout with 64 workers.
Left out: what the Board, the network and the memory bandwidth of shared hosts cost.
"""

import heapq
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.harness import (
    DrafterSettings,
    Result,
    Watch,
    drafted_engine,
    groups_for,
    load_policy,
    room,
    threads_flag,
)
from parts.cli import check_at_least, flag
from parts.engine.interfaces import Group, Strategy
from parts.engine.sampling import Sampling
from rollout import Engine
from strategy import Goodput, batch_bucket, plans_for
from tlt import fair_share

WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Config(DrafterSettings):
    """Settings of this table."""

    threads: int = threads_flag()
    slots: int = flag(64, "rows of a worker at once")
    responses: int = flag(1024, "how many")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "threads", "max_new", "slots", "responses")


class RoundTime(NamedTuple):
    """What a round of some batch size comes to, on average."""

    seconds: float
    tokens: float  # that a row gets in it


class Rollout(NamedTuple):
    """A measured rollout."""

    seconds: float
    round_times: dict[int, RoundTime]  # by bucket of batch sizes
    lengths: list[list[int]]  # of the responses, by group


# ---------------------------------------------------------------- measuring


def roll_out(engine: Engine, groups: list[Group], sampling: Sampling, strategy: Strategy) -> Rollout:
    """One rollout of the groups, whose keys are 0, 1, 2 ..."""
    watch = Watch(strategy)
    lengths: list[list[int]] = [[] for _ in groups]
    for response in engine.generate(groups, sampling, watch):
        lengths[response.group].append(len(response.tokens))
    round_times = {}
    for size, totals in watch.totals.items():
        round_times[size] = RoundTime(totals.seconds / totals.rounds, totals.tokens / totals.rows)
    return Rollout(engine.stats.seconds, round_times, lengths)


def with_gaps_filled(round_times: dict[int, RoundTime], slots: int) -> dict[int, RoundTime]:
    """All buckets up to that of `slots`; one that was not measured takes after the nearest that was."""
    filled = {}
    for size in range(1, batch_bucket(slots) + 1):
        nearest = min(round_times, key=lambda known: abs(known - size))  # noqa: B023 (used at once)
        filled[size] = round_times[nearest]
    return filled


# ---------------------------------------------------------------- predicting


def simulate(lengths: list[list[int]], workers: int, slots: int, round_times: dict[int, RoundTime]) -> list[float]:
    """When each worker is done with a rollout, in seconds.

    lengths: of the responses of each group; round_times: by bucket of batch sizes.
    """
    queue = list(reversed(lengths))  # the next group is the last
    max_running = fair_share([len(group) for group in lengths], workers, slots)
    ends = []
    clocks: list[tuple[float, int, list[float]]] = [(0.0, worker, []) for worker in range(workers)]  # a heap
    while clocks:
        now, worker, rows = heapq.heappop(clocks)  # the worker whose round ends first; rows: tokens that are missing
        while queue and len(rows) + len(queue[-1]) <= max_running:
            rows = rows + [float(length) for length in queue.pop()]
        if not rows:
            ends.append(now)
            continue
        seconds, tokens = round_times[batch_bucket(len(rows))]
        missing = [length - tokens for length in rows if length > tokens]
        heapq.heappush(clocks, (now + seconds, worker, missing))
    return ends


def predict(rollouts: dict[str, Rollout], workers: int, slots: int) -> dict:
    """The row for so many workers. rollouts: plain and speculative."""
    ends = {}
    for name, rollout in rollouts.items():
        round_times = with_gaps_filled(rollout.round_times, slots)
        ends[name] = simulate(rollouts["speculative"].lengths, workers, slots, round_times)
    plain = max(ends["plain"])
    speculative = max(ends["speculative"])
    return {
        "workers": workers,
        "plain": plain,
        "speculative": speculative,
        "ratio": plain / speculative,
        "idle": 1 - statistics.mean(ends["speculative"]) / speculative,
    }


# ---------------------------------------------------------------- the table


def measure(config: Config) -> Result:
    """One row for each number of workers."""
    torch.set_num_threads(config.threads)
    policy = load_policy(config)
    engine = drafted_engine(policy, config.slots)
    groups = groups_for(policy.tokenizer, config.responses, config.seed, "train")
    engine.reserve(room(groups, config.max_new))
    sampling = Sampling(max_new=config.max_new)
    strategies = {"plain": Strategy(), "speculative": Goodput(plans_for(["eagle"]))}
    rollouts = {}
    for _ in range(2):  # the first turn does not count
        for name, strategy in strategies.items():
            rollouts[name] = roll_out(engine, groups, sampling, strategy)
    rows = [predict(rollouts, workers, config.slots) for workers in WORKERS]
    seconds = ", ".join(f"{name} {rollout.seconds:.1f} s" for name, rollout in rollouts.items())
    remarks = f"{config.responses} responses; measured with one worker: {seconds}"
    return Result(rows[-1]["ratio"], rows, policy.model.device.type, remarks)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = ["predicted seconds of a rollout"]
    lines.append(f"{'workers':>7} {'plain':>7} {'speculative':>12} {'ratio':>6} {'idle, speculative':>18}")
    for row in rows:
        seconds = f"{row['plain']:7.1f} {row['speculative']:12.1f}"
        lines.append(f"{row['workers']:7d} {seconds} {row['ratio']:6.2f} {row['idle']:18.0%}")
    return "\n".join(lines)
