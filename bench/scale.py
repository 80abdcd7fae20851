"""Rollout time with 1 to 64 workers of one core (or GPU) each, predicted by a small simulation.

Measured here, with one worker: the seconds of a round by batch size, the tokens that a sequence gets in it, plain and
speculative, and the lengths of the responses. The simulation then distributes the same responses, in groups of 16, over
more workers, as tlt.py does: a worker takes the next group when its sequences fit, and a round takes as long as its
batch size says. Workers beyond the number of groups have nothing to do.

Ratio: plain over speculative rollout with 64 workers.
Left out: the time of the Board and the network, and the memory bandwidth that workers of one host share.
"""

import heapq
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from bench.harness import DrafterSettings, Result, Watch, batch_groups, fixed, load_policy, make_engine
from parts.cli import flag
from parts.engine.interfaces import Group, RoundReport, Strategy
from parts.engine.sampling import Sampling
from rollout import Engine
from strategy import Goodput, batch_bucket, plans_for
from tlt import fair_share

WORKERS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = {"workers": "", "plain": ".1f", "speculative": ".1f", "ratio": ".2f", "idle": ".0%"}


@dataclass(frozen=True)
class Config(DrafterSettings):
    slots: int = flag(64, "sequences of a worker at once")
    responses: int = flag(1024, "how many")


class RoundTime(NamedTuple):
    """A round of some batch size, on average."""

    seconds: float
    tokens: float  # that a sequence gets in it


class Rollout(NamedTuple):
    """A measured rollout."""

    seconds: float
    round_times: dict[int, RoundTime]  # by bucket of batch sizes
    lengths: list[list[int]]  # of the responses, by group


# ---------------------------------------------------------------- measuring


def roll_out(engine: Engine, groups: list[Group], sampling: Sampling, strategy: Strategy) -> Rollout:
    """Roll out the groups, whose keys are 0, 1, 2 ..."""
    watch = Watch(strategy)
    lengths: list[list[int]] = [[] for _ in groups]
    for response in engine.generate(groups, sampling, watch):
        lengths[response.group].append(len(response.tokens))
    return Rollout(engine.stats.seconds, mean_round_times(watch.reports), lengths)


def mean_round_times(reports: list[RoundReport]) -> dict[int, RoundTime]:
    """Return the mean round by bucket of batch sizes."""
    by_bucket: dict[int, list[RoundReport]] = defaultdict(list)
    for report in reports:
        by_bucket[batch_bucket(report.batch_size)].append(report)
    round_times = {}
    for bucket, rounds in by_bucket.items():
        sequences = sum(report.batch_size for report in rounds)
        tokens = sequences + sum(sum(report.accepted) for report in rounds)
        seconds = statistics.mean(report.seconds for report in rounds)
        round_times[bucket] = RoundTime(seconds, tokens / sequences)
    return round_times


def with_gaps_filled(round_times: dict[int, RoundTime], slots: int) -> dict[int, RoundTime]:
    """Return the times of all buckets up to that of `slots`; one that was not measured gets those of the nearest."""
    filled = {}
    for bucket in range(1, batch_bucket(slots) + 1):
        nearest = min(round_times, key=lambda known: abs(known - bucket))  # noqa: B023 (used at once)
        filled[bucket] = round_times[nearest]
    return filled


# ---------------------------------------------------------------- predicting


def simulate(lengths: list[list[int]], workers: int, slots: int, round_times: dict[int, RoundTime]) -> list[float]:
    """Return when each worker has finished a rollout, in seconds.

    lengths: of the responses of each group; round_times: by bucket of batch sizes.
    """
    queue = list(reversed(lengths))  # the next group is the last
    max_running = fair_share([len(group) for group in lengths], workers, slots)
    ends = []
    clocks: list[tuple[float, int, list[float]]] = [(0.0, worker, []) for worker in range(workers)]  # a heap
    while clocks:
        now, worker, missing = heapq.heappop(clocks)  # the worker whose round ends first; tokens that sequences miss
        while queue and len(missing) + len(queue[-1]) <= max_running:
            missing = missing + [float(length) for length in queue.pop()]
        if not missing:
            ends.append(now)
            continue
        seconds, tokens = round_times[batch_bucket(len(missing))]
        heapq.heappush(clocks, (now + seconds, worker, [left - tokens for left in missing if left > tokens]))
    return ends


def predict(rollouts: dict[str, Rollout], workers: int, slots: int) -> dict:
    """Return the row for so many workers. rollouts: plain and speculative."""
    ends = {}
    for name, rollout in rollouts.items():
        round_times = with_gaps_filled(rollout.round_times, slots)
        ends[name] = simulate(rollouts["speculative"].lengths, workers, slots, round_times)
    plain, speculative = max(ends["plain"]), max(ends["speculative"])
    row = {"workers": workers, "plain": plain, "speculative": speculative, "ratio": plain / speculative}
    return {**row, "idle": 1 - statistics.mean(ends["speculative"]) / speculative}


def measure(config: Config) -> Result:
    """Return a row for each number of workers."""
    policy = load_policy(config)
    groups = batch_groups(policy.tokenizer, config.responses, config.seed, "train")
    engine = make_engine(policy, config.slots, groups, config.max_new)
    strategies = {"plain": fixed(0), "speculative": Goodput(plans_for(["eagle"]))}
    rollouts = {}
    for _ in range(2):  # the first turn does not count
        for name, strategy in strategies.items():
            rollouts[name] = roll_out(engine, groups, Sampling(max_new=config.max_new), strategy)
    rows = [predict(rollouts, workers, config.slots) for workers in WORKERS]
    seconds = ", ".join(f"{name} {rollout.seconds:.1f} s" for name, rollout in rollouts.items())
    remarks = f"predicted seconds of a rollout of {config.responses} responses; measured with one worker: {seconds}"
    return Result(rows[-1]["ratio"], rows, policy.model.device.type, remarks)
