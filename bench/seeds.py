"""Learning curves of the same run with several seeds: what is luck, and what is not.

Read from finished training runs (`make seeds`). Held-out scores at each evaluation, mean and range over the seeds;
and the seconds of the last ten steps. The curves are drawn into FIRST RUN/seeds.png. Ratio: mean pass@1 after
training over before.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Metrics, Output, Result, device_of, read_metrics
from parts.cli import UserError, flag
from parts.running.pictures import pyplot

LAST = 10  # steps


@dataclass(frozen=True)
class Config(Output):
    """Settings of this table."""

    runs: tuple[str, ...] = flag(("runs/seed-0", "runs/seed-1", "runs/seed-2"), "folders of runs that differ in --seed")


def spread(values: list[float]) -> dict:
    """Mean, lowest and highest."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def draw(runs: dict[str, Metrics], rows: list[dict], path: Path) -> None:
    """Reward, held-out pass@1 and response lengths."""
    figure, (scores, lengths) = pyplot().subplots(1, 2, figsize=(11, 3.6))
    for name, metrics in runs.items():
        steps = metrics.steps
        scores.plot(list(steps), [row["reward"] for row in steps.values()], lw=0.7, alpha=0.6, label=f"reward, {name}")
        lengths.plot(list(steps), [row["length"]["mean"] for row in steps.values()], label=f"mean, {name}")
        lengths.plot(list(steps), [row["length"]["max"] for row in steps.values()], lw=0.5, color="0.7")
    x = [row["step"] for row in rows if "pass@1" in row]
    y = [row["pass@1"]["mean"] for row in rows if "pass@1" in row]
    scores.plot(x, y, "ko-", label="held-out pass@1, mean")
    scores.set(xlabel="RL step", ylim=(0, 1), title="reward and held-out pass@1")
    lengths.set(xlabel="RL step", title="response length in tokens (grey: the longest)")
    scores.legend(fontsize=7)
    lengths.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def measure(config: Config) -> Result:
    """One row for each evaluation, and one for the last steps."""
    runs = {Path(folder).name: read_metrics(folder) for folder in config.runs}
    evaluated_by_all = set.intersection(*(set(metrics.evaluations) for metrics in runs.values()))
    steps = sorted(evaluated_by_all)
    if not steps:
        raise UserError(f"--runs {' '.join(config.runs)}: no evaluation that all of them have made")
    rows = []
    for step in steps:
        evaluations = [metrics.evaluations[step] for metrics in runs.values()]
        row = {"step": step, "length": spread([e["length"] for e in evaluations])}
        for name in evaluations[0]["eval"]:
            row[name] = spread([e["eval"][name] for e in evaluations])
        rows.append(row)
    seconds = []
    for metrics in runs.values():
        last = list(metrics.steps.values())[-LAST:]
        seconds.append(statistics.mean(row["seconds"]["step"] for row in last))
    draw(runs, rows, Path(config.runs[0]) / "seeds.png")
    ratio = rows[-1]["pass@1"]["mean"] / max(1e-9, rows[0]["pass@1"]["mean"])
    rows.append({"step": "last", "seconds": spread(seconds)})
    return Result(ratio, rows, device_of(config.runs[0]), f"{len(runs)} runs; wrote {config.runs[0]}/seeds.png")


def table(rows: list[dict]) -> str:
    """The rows as text."""
    *evaluations, last = rows
    names = [name for name in evaluations[0] if name != "step"]
    lines = [f"{'step':>6} " + " ".join(f"{name + ' (range)':>24}" for name in names)]
    for row in evaluations:
        cells = []
        for name in names:
            x = row[name]
            digits = 0 if name == "length" else 3
            cells.append(f"{x['mean']:.{digits}f} ({x['low']:.{digits}f} - {x['high']:.{digits}f})")
        lines.append(f"{row['step']:6d} " + " ".join(f"{cell:>24}" for cell in cells))
    seconds = last["seconds"]
    spread_text = f"{seconds['mean']:.2f} ({seconds['low']:.2f} - {seconds['high']:.2f})"
    lines.append(f"seconds per step, last {LAST}: {spread_text}")
    return "\n".join(lines)
