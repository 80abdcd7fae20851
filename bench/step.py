"""Whole GRPO steps from one policy, in turns: plain and with TLT, 1 and 2 workers, the same prompts and seeds.

Each turn is a short run of tlt.py. Its first step does not count: memory is touched, the strategy looks around. The
steps' digests tell whether all parties have made the same tokens.

With --trl also TRL's GRPOTrainer (trl.py), and of ours only those with 2 workers.

Ratio: seconds of a step, plain over TLT, with 2 workers; with --trl, TRL over TLT.
"""

import statistics
import tempfile
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from bench import trl
from bench.harness import Result, Settings, rounds_flag, train, worker_flags
from parts.cli import check_at_least, flag
from parts.devices import pick_device

# a step's phases, each the sum of the states that a worker can be in (report.STATES)
PHASES = {
    "rollout": ("rollout", "speculative", "reward"),
    "drafter": ("drafter",),
    "idle": ("idle",),
    "update": ("update",),
    "step": ("step",),
}


@dataclass(frozen=True)
class Config(Settings):
    """Settings of this table."""

    max_new: int = flag(960, "longest response in tokens")
    rounds: int = rounds_flag()
    steps: int = flag(4, "steps in a turn, with the first, which does not count")
    prompts: int = flag(8, "prompts per step")
    samples: int = flag(8, "samples per prompt")
    drafter: str = flag("", "folder of a drafter for the policy; without it the policy's own (model/drafter)")
    trl: bool = flag(False, "compare with TRL (pip install trl)")
    trl_batch: int = flag(64, "responses in a forward-backward of TRL's")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rounds", "max_new", "prompts", "samples", "trl_batch")
        check_at_least(self, 2, "steps")


class Party(NamedTuple):
    """Who makes steps."""

    name: str
    workers: int
    flags: tuple[str, ...]  # of tlt.py


@dataclass
class Steps:
    """What a party's steps took."""

    seconds: list[dict] = field(default_factory=list)  # of each step, by state
    digests: list[int] = field(default_factory=list)  # of each step's tokens


def parties_of(config: Config) -> list[Party]:
    """Ours."""
    plain = ("--drafter", "off", "--strategy", "off")
    tlt = ("--drafter-from", config.drafter) if config.drafter else ()
    parties = []
    for workers in (2,) if config.trl else (1, 2):
        parties += [Party("plain", workers, plain), Party("TLT", workers, tlt)]
    return parties


def take_turn(config: Config, party: Party, seed: int, steps: Steps) -> None:
    """Train, and add all steps but the first to `steps`."""
    flags = ["--model", config.model, *worker_flags(config, party.workers), "--max-new", config.max_new]
    flags += ["--prompts", config.prompts, "--samples", config.samples, "--steps", config.steps, "--seed", seed]
    with tempfile.TemporaryDirectory() as out:
        rows = train([*flags, *party.flags], out).steps
    for step in sorted(rows)[1:]:
        steps.seconds.append(rows[step]["seconds"])
        steps.digests.append(rows[step]["digest"])


def row_of(party: Party, steps: Steps) -> dict:
    """Means over the steps."""
    row = {"party": party.name, "workers": party.workers, "digests": steps.digests}
    for phase, states in PHASES.items():
        sums = []  # the phase's seconds, of each step
        for seconds in steps.seconds:
            sums.append(sum(seconds[state] for state in states))
        row[phase] = statistics.mean(sums)
    return row


def step_seconds(rows: list[dict], name: str) -> float:
    """Of a party; of ours, with 2 workers."""
    return next(row["step"] for row in rows if row["party"] == name and (row["workers"] == 2 or name == "TRL"))


def measure(config: Config) -> Result:
    """One row for each party."""
    if config.trl:
        trl.check_installed()  # before minutes of measuring
    parties = parties_of(config)
    steps = {party: Steps() for party in parties}
    trl_seconds: list[float] = []
    for turn in tqdm(range(config.rounds), desc="step", unit="round"):
        seed = config.seed + turn
        for party in parties:
            take_turn(config, party, seed, steps[party])
        if config.trl:
            trl_seconds += trl.step_seconds(config, seed)[1:]
    rows = [row_of(party, steps[party]) for party in parties]
    if config.trl:
        rows.append({"party": "TRL", "workers": 1, "step": statistics.mean(trl_seconds)})
    slow = step_seconds(rows, "TRL" if config.trl else "plain")
    return Result(slow / step_seconds(rows, "TLT"), rows, pick_device(config.device))


def table(rows: list[dict]) -> str:
    """The rows as text."""
    digests = [row["digests"] for row in rows if "digests" in row]
    same = all(other == digests[0] for other in digests)
    tokens = "the same tokens" if same else "DIFFERENT tokens"
    lines = [f"mean of {len(digests[0])} steps, seconds; our parties made {tokens}"]
    lines.append(f"{'':>8} {'workers':>7} " + " ".join(f"{phase:>8}" for phase in PHASES))
    for row in rows:
        cells = " ".join(f"{row[phase]:8.2f}" if phase in row else " " * 8 for phase in PHASES)
        lines.append(f"{row['party']:>8} {row['workers']:7d} {cells}")
    return "\n".join(lines)
