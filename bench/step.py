"""Whole GRPO steps from one policy, in turns: plain and with TLT, 1 and 2 workers, the same prompts and seeds.

Each turn is a short run of tlt.py. Its first step does not count: memory is touched, the strategy tries its plans.
Equal digests mean that parties made the same tokens.

With --trl also TRL's GRPOTrainer (trl.py), and of ours only those with 2 workers.

Ratio: seconds of a step, plain over TLT, with 2 workers; with --trl, TRL over TLT.
"""

import statistics
import tempfile
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from bench import trl
from bench.harness import PolicySettings, Result, train, worker_flags
from parts.cli import check_at_least, flag
from parts.devices import pick_device

# the phases of a step, each the sum of states that a worker can be in (timers.STATES)
PHASES = {
    "rollout": ("rollout", "speculative", "reward"),
    "drafter": ("drafter",),
    "idle": ("idle",),
    "update": ("update",),
    "step": ("step",),
}
COLUMNS = {"party": "", "workers": "", "digest": "", **dict.fromkeys(PHASES, ".2f")}
PLAIN = ("--drafter", "off", "--strategy", "off")


@dataclass(frozen=True)
class Config(PolicySettings):
    max_new: int = flag(960, "longest response in tokens")
    rounds: int = flag(3, "turns of each party")
    steps: int = flag(4, "steps in a turn, with the first, which does not count")
    prompts: int = flag(8, "prompts per step")
    samples: int = flag(8, "samples per prompt")
    task: str = flag("countdown", "whose prompts")
    lora_rank: int = flag(0, "rank of LoRA adapters that learn in place of the policy's weights; 0: all weights learn")
    bf16: bool = flag(False, "the update in bfloat16, which GPUs always do")
    drafter: str = flag("", "folder of a drafter for the policy; without it the policy's own (model/drafter)")
    trl: bool = flag(False, "compare with TRL (pip install trl)")
    trl_batch: int = flag(64, "responses in a forward-backward of TRL's")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 2, "steps")


class Party(NamedTuple):
    """A way to make steps."""

    name: str
    workers: int
    flags: tuple  # of tlt.py


def parties_of(config: Config, workers: tuple[int, ...], flags: tuple = ()) -> list[Party]:
    """Return plain training and TLT with so many workers. flags: further ones of tlt.py."""
    tlt = ("--drafter-from", config.drafter) if config.drafter else ()
    parties = []
    for count in workers:
        parties += [Party("plain", count, (*PLAIN, *flags)), Party("TLT", count, (*tlt, *flags))]
    return parties


def take_turn(config: Config, party: Party, seed: int) -> list[dict]:
    """Train -> the metrics of all steps but the first."""
    flags = ["--model", config.model, *worker_flags(config, party.workers), "--max-new", config.max_new]
    flags += ["--task", config.task, "--lora-rank", config.lora_rank, *(["--bf16"] if config.bf16 else [])]
    flags += ["--prompts", config.prompts, "--samples", config.samples, "--steps", config.steps, "--seed", seed]
    with tempfile.TemporaryDirectory() as out:
        steps = train([*flags, *party.flags], out).steps
    return [steps[step] for step in sorted(steps)[1:]]


def row_of(party: Party, steps: list[dict]) -> dict:
    """Return the mean seconds of each phase, and a digest of all steps. steps: their metrics."""
    digests = [step["digest"] for step in steps]
    row = {"party": party.name, "workers": party.workers, "digest": f"{zlib.crc32(repr(digests).encode()):08x}"}
    for phase, states in PHASES.items():
        row[phase] = statistics.mean(sum(step["seconds"][state] for state in states) for step in steps)
    return row


def compare(config: Config, parties: list[Party]) -> list[dict]:
    """Let the parties, and with --trl TRL, take turns -> a row for each."""
    steps: dict[Party, list[dict]] = {party: [] for party in parties}
    trl_seconds: list[float] = []
    for turn in tqdm(range(config.rounds), desc="step", unit="round"):
        for party in parties:
            steps[party] += take_turn(config, party, config.seed + turn)
        if config.trl:
            trl_seconds += trl.step_seconds(config, config.seed + turn)[1:]
    rows = [row_of(party, steps[party]) for party in parties]
    if config.trl:
        rows.append({"party": "TRL", "workers": 1, "step": statistics.mean(trl_seconds)})
    return rows


def measure(config: Config) -> Result:
    """Return a row for each party."""
    if config.trl:
        trl.check_installed()  # before minutes of measuring
    rows = compare(config, parties_of(config, (2,) if config.trl else (1, 2)))
    seconds = {row["party"]: row["step"] for row in rows}  # those with 2 workers come last
    same = len({row["digest"] for row in rows if "digest" in row}) == 1
    count = config.rounds * (config.steps - 1)
    remarks = f"mean seconds of {count} steps; our parties made {'the same' if same else 'DIFFERENT'} tokens"
    return Result(seconds["TRL" if config.trl else "plain"] / seconds["TLT"], rows, pick_device(config.device), remarks)
