"""A training run against the same steps without speculation and drafter training, step by step.

The steps behind the last checkpoint but one of --run (with --whole, or if there is none, all of them) are made twice
more, without evaluations: plain, then with TLT again. So TLT is measured before and after the plain steps, and its
seconds are the mean of both: a machine that slowly becomes faster or slower favours neither. --plain names a finished
plain run instead; then nothing is made here. With --actor-dtype the rollout of both is in another type than the run's,
so the steps of the run itself are not compared.

In float32 all of them must make the same tokens, so the steps' digests are compared as well, and the held-out results
that the runs have. The rollout's seconds are also shown by how many responses a worker was generating at once:
speculation gains most where they are few. The timelines of the last step are drawn into RUN/paired.png.

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

from bench.harness import Metrics, Output, Result, device_of, read_metrics, tlt_command
from parts.cli import UserError, flag
from parts.engine.model_loading import ACTOR_DTYPES, actor_dtype
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
COLUMNS = {"phase": "", "plain": ".2f", "tlt": ".2f", "ratio": ".2f"}
ACTOR_TYPES = ("", *ACTOR_DTYPES)
WITHOUT_TLT = ("--drafter", "off", "--strategy", "off", "--drafter-from", "")


@dataclass(frozen=True)
class Config(Output):
    run: str = flag("runs/demo", "folder of the run")
    plain: str = flag("", "folder of a finished plain run; without it the steps are made here")
    whole: bool = flag(False, "compare from the first step")
    actor_dtype: str = flag("", "of the weights that generate, in the repeated steps; empty: the run's", ACTOR_TYPES)


def repeat(run: Path, folder: Path, whole: bool, flags: tuple = ()) -> None:
    """Make the last steps of a run once more, or all of them, with further flags, in another folder.

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
        """Return the steps with the same tokens in all runs."""
        runs = [self.plain, *self.tlt]
        return [step for step in self.steps if len({run.steps[step]["digest"] for run in runs}) == 1]

    def seconds(self, runs: list[Metrics], states: tuple[str, ...]) -> float:
        """Return the seconds spent in these states in a step, the mean over steps and runs."""
        total = sum(run.steps[step]["seconds"][state] for run in runs for step in self.steps for state in states)
        return total / len(runs) / len(self.steps)


def read_pair(plain: Path, *tlt: Path) -> Pair:
    """Read the runs in these folders. Raises UserError if they share no step."""
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


def read_spans(folder) -> dict[int, list[list[Span]]]:
    """Return step -> each worker's spans in seconds, from trace.json, without those before the first step."""
    events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    steps: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))  # step, worker
    for event in events:
        if "step" in event["args"]:  # other events name the workers, or are of an evaluation or a checkpoint
            span = Span(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6, event["args"]["rows"])
            steps[event["args"]["step"]][event["tid"]].append(span)
    return {step: [workers[rank] for rank in sorted(workers)] for step, workers in steps.items()}


def row_of(phase: str, plain: float, tlt: float) -> dict:
    """Return a row of the table."""
    return {"phase": phase, "plain": plain, "tlt": tlt, "ratio": plain / max(1e-9, tlt)}


def phase_rows(pair: Pair) -> list[dict]:
    """Return the mean seconds of each phase."""
    seconds = {phase: (pair.seconds([pair.plain], s), pair.seconds(pair.tlt, s)) for phase, s in PHASES.items()}
    return [row_of(phase, plain, tlt) for phase, (plain, tlt) in seconds.items()]


def seconds_by_batch(runs: list[dict[int, list[list[Span]]]], steps: list[int]) -> dict[int, float]:
    """Return a worker's mean seconds in a step, by bucket of responses at once. runs: from read_spans."""
    seconds: dict[int, float] = defaultdict(float)
    for spans, step in itertools.product(runs, steps):
        for span in itertools.chain(*spans[step]):
            if span.state in ("rollout", "speculative") and span.rows:
                seconds[batch_bucket(span.rows)] += span.seconds / len(spans[step]) / len(steps) / len(runs)
    return seconds


def rows_by_batch(plain: dict[int, float], tlt: dict[int, float]) -> list[dict]:
    """Return the rollout's time with 1, 2 to 3, 4 to 7 ... responses at once; from `seconds_by_batch`."""
    rows = []
    for bucket in sorted(plain.keys() | tlt.keys()):
        low, high = 1 << (bucket - 1), (1 << bucket) - 1
        name = f"{low} to {high} at once" if bucket > 1 else "1 at once"
        rows.append(row_of(name, plain.get(bucket, 0.0), tlt.get(bucket, 0.0)))
    return rows


def check_row(pair: Pair) -> dict:
    """Return whether all made the same, and how the idle time was used."""
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
        "preempted": max(run.steps[step]["drafter"]["preempted"] for run in pair.tlt for step in pair.steps),
        "tlt": [pair.seconds([run], ("step",)) for run in pair.tlt],
    }


def remarks_on(pair: Pair, checks: dict) -> str:
    """Return the checks in words."""
    parted = f" (the first that differs: {checks['parted']})" if checks["parted"] is not None else ""
    lines = [f"seconds per step, steps {pair.steps[0]} to {pair.steps[-1]}"]
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


def in_bfloat16(run: Path, device: str) -> str:
    """Return what to expect of the tokens, if that is not equality."""
    settings = json.loads((run / "config.json").read_text())
    if actor_dtype(settings.get("actor_dtype", "auto"), device) == torch.float32:
        return ""
    return (
        "\nthe rollout is in bfloat16, where verifying and plain decoding round differently: tokens differ after a "
        "while, and with them the policies; --actor-dtype float32 makes the same ones"
    )


def measure(config: Config) -> Result:
    """Return a row for each phase, one for each range of responses at once, and one of checks."""
    if config.plain and config.actor_dtype:
        raise UserError("--actor-dtype: it is for the steps that are made here; with --plain none are")
    run = Path(config.run)
    if not (run / "trace.json").exists():
        raise UserError(f"--run {run}: no finished run of tlt.py there")
    name = config.run.rstrip("/") + (f"-{config.actor_dtype}" if config.actor_dtype else "")
    again = Path(name + "-again")
    plain = Path(config.plain or name + "-plain")
    with_tlt = [] if config.actor_dtype else [run]
    if not config.plain:
        flags = ("--actor-dtype", config.actor_dtype) if config.actor_dtype else ()
        repeat(run, plain, config.whole, (*WITHOUT_TLT, *flags))
        repeat(run, again, config.whole, flags)
        with_tlt.append(again)
    pair = read_pair(plain, *with_tlt)
    plain_spans = read_spans(plain)
    tlt_spans = [read_spans(folder) for folder in with_tlt]
    by_batch = rows_by_batch(seconds_by_batch([plain_spans], pair.steps), seconds_by_batch(tlt_spans, pair.steps))
    phases = phase_rows(pair)
    checks = check_row(pair)

    last = pair.steps[-1]
    panels = {f"plain, step {last}": plain_spans[last], f"TLT, step {last}": tlt_spans[0][last]}
    picture = with_tlt[0] / "paired.png"
    draw_timeline(panels, picture)
    device = device_of(run)
    remarks = f"{remarks_on(pair, checks)}\nwrote {picture}{in_bfloat16(with_tlt[0], device)}"
    return Result(phases[-1]["ratio"], [*phases, *by_batch, checks], device, remarks)
