"""A training run against the same steps without speculation and drafter training, step by step.

The steps behind the last checkpoint but one of --run (with --whole, or if there is none, all of them) are made twice
more, without evaluations: plain, then with TLT again. So TLT is measured before and after the plain steps, and its
seconds are the mean of both: a machine that slowly becomes faster or slower favours nobody. --plain names a finished
plain run instead; then nothing is made here.

In float32 all of them must make the same tokens, so the steps' digests are compared as well, and the held-out results
that the runs have. The rollout's seconds are also told by how many responses a worker was writing at once: speculation
gains most where they are few. The timelines of the last step are drawn into RUN/paired.png.

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
from parts.cli import UserError, flag
from parts.engine.model_loading import actor_dtype
from parts.running import checkpoints
from parts.running.pictures import draw_timeline
from parts.running.timers import Span
from strategy import batch_bucket

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


# ---------------------------------------------------------------- the steps once more

WITHOUT_TLT = ("--drafter", "off", "--strategy", "off", "--drafter-from", "")


def repeat(run: Path, folder: Path, whole: bool, flags: tuple = ()) -> None:
    """Make the last steps of a run once more, or all of them, with further flags, into another folder.

    Raises UserError if that fails.
    """
    starts = [] if whole else sorted(run.glob(checkpoints.PATTERN))[:-1]  # a short run has none before the last
    command = ["--config", run / "config.json", "--out", folder, "--eval-every", "0", *flags]
    if starts:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(starts[-1], folder / starts[-1].name)
    done = subprocess.run(tlt_command([*command, "--resume" if starts else "--no-resume"]))
    if done.returncode:
        raise UserError(f"the run in {folder} failed with status {done.returncode}; its message is above")


# ---------------------------------------------------------------- the comparison


class Pair(NamedTuple):
    """Runs of the same steps."""

    plain: Metrics
    tlt: list[Metrics]  # the run, and after the plain one its repetition, if there is one
    steps: list[int]  # that all have made

    def identical(self) -> list[int]:
        """Steps with the same tokens in all runs."""
        runs = [self.plain, *self.tlt]
        return [step for step in self.steps if len({run.steps[step]["digest"] for run in runs}) == 1]

    def drafting(self, name: str) -> list:
        """An entry of the drafter's report, of each step of each run with TLT."""
        return [run.steps[step]["drafter"][name] for run in self.tlt for step in self.steps]

    def seconds(self, runs: list[Metrics], states: tuple[str, ...]) -> float:
        """Spent in these states in a step, the mean over steps and runs."""
        total = sum(run.steps[step]["seconds"][state] for run in runs for step in self.steps for state in states)
        return total / len(runs) / len(self.steps)


def read_pair(plain: Path, *tlt: Path) -> Pair:
    """Raises UserError if the runs share no step."""
    plain_metrics = read_metrics(plain)
    tlt_metrics = [read_metrics(run) for run in tlt]
    steps = []
    for step, row in plain_metrics.steps.items():
        copied = "speculation" in row  # from the checkpoint that the plain run began with
        if not copied and all(step in metrics.steps for metrics in tlt_metrics):
            steps.append(step)
    if not steps:
        raise UserError(f"--run {tlt[0]}, --plain {plain}: these runs have no step in common")
    return Pair(plain_metrics, tlt_metrics, steps)


def phase_rows(pair: Pair) -> list[dict]:
    """Mean seconds of each phase."""
    rows = []
    for phase, states in PHASES.items():
        plain = pair.seconds([pair.plain], states)
        tlt = pair.seconds(pair.tlt, states)
        rows.append({"phase": phase, "plain": plain, "tlt": tlt, "ratio": plain / tlt})
    return rows


def seconds_by_batch(runs: list[dict[int, list[list[Span]]]], steps: list[int]) -> dict[int, float]:
    """strategy.bucket of responses at once -> mean seconds of a worker in a step, over all these runs.

    runs: of each what harness.read_spans gives.
    """
    seconds: dict[int, float] = defaultdict(float)
    for spans in runs:
        for step in steps:
            workers = spans[step]
            for span in itertools.chain(*workers):
                if span.state in ("rollout", "speculative") and span.rows:
                    seconds[batch_bucket(span.rows)] += span.seconds / len(workers) / len(steps) / len(runs)
    return seconds


def rows_by_batch(plain: dict[int, float], tlt: dict[int, float]) -> list[dict]:
    """Where the rollout's time goes: with 1, 2 to 3, 4 to 7 ... responses at once; from `seconds_by_batch`."""
    rows = []
    for number in sorted(plain.keys() | tlt.keys()):
        low, high = 1 << (number - 1), (1 << number) - 1
        taken = {"plain": plain.get(number, 0.0), "tlt": tlt.get(number, 0.0)}
        ratio = taken["plain"] / max(1e-9, taken["tlt"])
        rows.append({"phase": f"{low} to {high} rows" if number > 1 else "1 row", **taken, "ratio": ratio})
    return rows


def check_row(pair: Pair) -> dict:
    """Whether all made the same, and how the idle time was used."""
    identical = pair.identical()
    theirs = pair.plain.evaluations
    ours = pair.tlt[0].evaluations
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
        "tlt": [pair.seconds([run], ("step",)) for run in pair.tlt],
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
    again = Path(config.run.rstrip("/") + "-again")
    plain = Path(config.plain or config.run.rstrip("/") + "-plain")
    with_tlt = [run]
    if not config.plain:
        repeat(run, plain, config.whole, WITHOUT_TLT)
        repeat(run, again, config.whole)
        with_tlt.append(again)
    pair = read_pair(plain, *with_tlt)
    plain_spans = read_spans(plain)
    tlt_spans = [read_spans(folder) for folder in with_tlt]
    by_batch = rows_by_batch(seconds_by_batch([plain_spans], pair.steps), seconds_by_batch(tlt_spans, pair.steps))
    rows = [*phase_rows(pair), *by_batch, check_row(pair)]

    last = pair.steps[-1]
    panels = {f"plain, step {last}": plain_spans[last], f"TLT, step {last}": tlt_spans[0][last]}
    draw_timeline(panels, run / "paired.png")
    device = device_of(run)
    remarks = f"steps {pair.steps[0]} to {last}; wrote {run}/paired.png"
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
    if len(checks["tlt"]) == 2:
        lines.append("TLT: the mean of {:.2f} s before the plain steps and {:.2f} s after them".format(*checks["tlt"]))
    if checks["evaluations"]:
        lines.append(f"the same held-out results in {checks['equal']} of {checks['evaluations']} evaluations")
    lines.append(
        f"{checks['reclaimed']:.0%} of the idle time went into drafter training, "
        f"which ended at most {checks['preempted'] * 1e3:.0f} ms after the last response"
    )
    return "\n".join(lines)
