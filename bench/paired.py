"""A training run against the same steps without speculation and drafter training, step by step.

The plain run is made here, from the last checkpoint but one of --run (with --whole, or if there is none, from the
start) and without evaluations, unless --plain names a finished one. In float32 both must make the same tokens, so the
steps' digests are compared as well, and the held-out results that both have. The rollout's seconds are also told by how
many responses a worker was writing at once: speculation gains most where they are few. The timelines of the last step
are drawn into RUN/paired.png.

Ratio: seconds per step, plain over TLT.
"""

import itertools
import json
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness import Metrics, Output, Result, device_of, read_metrics, read_spans, tlt_command
from parts.common import UserError, flag
from parts.loading import actor_dtype
from report import Span, draw_timeline
from strategy import bucket

# phases of a step; rollout: until the last response of all workers
PHASES = {
    "rollout": ("rollout", "speculative", "reward", "drafter", "idle"),
    "update": ("update",),
    "step": ("step",),
}


@dataclass(frozen=True)
class Config(Output):
    """Settings of this table."""

    run: str = flag("runs/demo", "folder of the run")
    plain: str = flag("", "folder of a plain run that is there already")
    whole: bool = flag(False, "compare from the first step")


# ---------------------------------------------------------------- the plain run


def train_plain(run: Path, plain: Path, whole: bool) -> None:
    """Repeat the last steps of a run, or all of them, without speculation, into the folder `plain`.

    Raises UserError if that fails.
    """
    starts = [] if whole else sorted(run.glob("checkpoint-??????"))[:-1]  # a short run has none before the last
    flags = ["--config", run / "config.json", "--out", plain, "--drafter", "off", "--strategy", "off"]
    flags += ["--drafter-from", "", "--eval-every", "0", "--resume" if starts else "--no-resume"]
    if starts:
        shutil.rmtree(plain, ignore_errors=True)
        shutil.copytree(starts[-1], plain / starts[-1].name)
    done = subprocess.run(tlt_command(flags))
    if done.returncode:
        raise UserError(f"the plain run in {plain} failed with status {done.returncode}; its message is above")


# ---------------------------------------------------------------- the comparison


class Pair(NamedTuple):
    """Two runs of the same steps."""

    plain: Metrics
    tlt: Metrics
    steps: list[int]  # that both have made

    def identical(self) -> list[int]:
        """Steps with the same tokens."""
        return [step for step in self.steps if self.plain.steps[step]["digest"] == self.tlt.steps[step]["digest"]]

    def drafting(self, name: str) -> list:
        """An entry of the drafter's report, of each step."""
        return [self.tlt.steps[step]["drafter"][name] for step in self.steps]

    def seconds(self, run: Metrics, states: tuple[str, ...]) -> float:
        """Spent in these states, all steps together."""
        return sum(run.steps[step]["seconds"][state] for step in self.steps for state in states)


def read_pair(plain: Path, run: Path) -> Pair:
    """Raises UserError if the runs share no step."""
    plain_metrics = read_metrics(plain)
    tlt_metrics = read_metrics(run)
    steps = []
    for step, row in plain_metrics.steps.items():
        copied = "speculation" in row  # from the checkpoint that the plain run began with
        if step in tlt_metrics.steps and not copied:
            steps.append(step)
    if not steps:
        raise UserError(f"--run {run}, --plain {plain}: these runs have no step in common")
    return Pair(plain_metrics, tlt_metrics, steps)


def phase_rows(pair: Pair) -> list[dict]:
    """Mean seconds of each phase."""
    rows = []
    for phase, states in PHASES.items():
        plain = pair.seconds(pair.plain, states) / len(pair.steps)
        tlt = pair.seconds(pair.tlt, states) / len(pair.steps)
        rows.append({"phase": phase, "plain": plain, "tlt": tlt, "ratio": plain / tlt})
    return rows


def rows_by_batch(spans: dict[str, dict[int, list[list[Span]]]], steps: list[int]) -> list[dict]:
    """Where the rollout's time goes: mean seconds of a worker with 1, 2 to 3, 4 to 7 ... responses at once.

    spans: of "plain" and "tlt", as harness.read_spans.
    """
    seconds: dict[int, dict[str, float]] = defaultdict(lambda: {"plain": 0.0, "tlt": 0.0})  # by strategy.bucket
    for name, of_steps in spans.items():
        for step in steps:
            workers = of_steps[step]
            for span in itertools.chain(*workers):
                if span.state in ("rollout", "speculative") and span.rows:
                    seconds[bucket(span.rows)][name] += span.seconds / len(workers) / len(steps)
    rows = []
    for number, taken in sorted(seconds.items()):
        low, high = 1 << (number - 1), (1 << number) - 1
        ratio = taken["plain"] / max(1e-9, taken["tlt"])
        rows.append({"phase": f"{low} to {high} rows" if number > 1 else "1 row", **taken, "ratio": ratio})
    return rows


def check_row(pair: Pair) -> dict:
    """Whether both made the same, and how the idle time was used."""
    identical = pair.identical()
    theirs = pair.plain.evaluations
    ours = pair.tlt.evaluations
    evaluations = [step for step in theirs if step in ours and step >= pair.steps[0]]
    used = pair.seconds(pair.tlt, ("drafter",))
    idle = pair.seconds(pair.tlt, ("idle",))
    return {
        "phase": "checks",
        "steps": len(pair.steps),
        "identical": len(identical),
        "parted": next((step for step in pair.steps if step not in identical), None),
        "evaluations": len(evaluations),
        "equal": sum(theirs[step]["eval"] == ours[step]["eval"] for step in evaluations),
        "reclaimed": used / max(1e-9, used + idle),
        "preempted": max(pair.drafting("preempted")),
    }


def in_bfloat16(run: Path, device: str) -> str:
    """What to expect of the tokens, if that is not equality."""
    settings = json.loads((run / "config.json").read_text())
    if actor_dtype(settings.get("actor_dtype", "auto"), device) == torch.float32:
        return ""
    return (
        "\nwhat generates is in bfloat16, where checking and plain decoding round differently: the tokens part, and "
        "with them the policies; --actor-dtype float32 makes the same ones"
    )


# ---------------------------------------------------------------- the table


def measure(config: Config) -> Result:
    """One row for each phase, one for each range of responses at once, and one of checks."""
    run = Path(config.run)
    if not (run / "trace.json").exists():
        raise UserError(f"--run {run}: no finished run of tlt.py there")
    plain = Path(config.plain or config.run.rstrip("/") + "-plain")
    if not config.plain:
        train_plain(run, plain, config.whole)
    pair = read_pair(plain, run)
    spans = {"plain": read_spans(plain), "tlt": read_spans(run)}
    rows = [*phase_rows(pair), *rows_by_batch(spans, pair.steps), check_row(pair)]

    last = pair.steps[-1]
    panels = {f"plain, step {last}": spans["plain"][last], f"TLT, step {last}": spans["tlt"][last]}
    draw_timeline(panels, run / "paired.png")
    device = device_of(run)
    remarks = f"steps {pair.steps[0]} to {last}; {sum(pair.drafting('steps'))} drafter steps; wrote {run}/paired.png"
    step_ratio = next(row["ratio"] for row in rows if row["phase"] == "step")
    return Result(step_ratio, rows, device, remarks + in_bfloat16(run, device))


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = ["seconds per step", f"{'':>13} {'plain':>7} {'TLT':>7} {'ratio':>6}"]
    *phases, checks = rows
    for row in phases:
        lines.append(f"{row['phase']:>13} {row['plain']:7.2f} {row['tlt']:7.2f} {row['ratio']:6.2f}")
    parted = f" (parted at step {checks['parted']})" if checks["parted"] is not None else ""
    lines.append(f"the same tokens in {checks['identical']} of {checks['steps']} steps{parted}")
    if checks["evaluations"]:
        lines.append(f"the same held-out results in {checks['equal']} of {checks['evaluations']} evaluations")
    lines.append(
        f"{checks['reclaimed']:.0%} of the idle time went into drafter training, "
        f"which ended at most {checks['preempted'] * 1e3:.0f} ms after the last response"
    )
    return "\n".join(lines)
