"""Learning curves of the same run with several seeds: how much of a result is chance.

Read from finished training runs (`make seeds`): held-out scores at each evaluation, mean and range over the seeds. The
curves are drawn into FIRST RUN/seeds.png. Ratio: mean pass@1 after training over before.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Metrics, Output, Result, device_of, picture, read_metrics
from parts.cli import UserError, flag

COLUMNS = {}


@dataclass(frozen=True)
class Config(Output):
    runs: tuple[str, ...] = flag(("runs/seed-0", "runs/seed-1", "runs/seed-2"), "folders of runs that differ in --seed")


def spread(values: list[float]) -> dict:
    """Return mean, lowest and highest."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def draw(runs: dict[str, Metrics], rows: list[dict], path: Path) -> None:
    """Draw reward, held-out pass@1 and response lengths."""
    with picture(path, ["reward and held-out pass@1", "response length in tokens (grey: the longest)"]) as axes:
        scores, lengths = axes
        for name, metrics in runs.items():
            x, steps = list(metrics.steps), metrics.steps.values()
            scores.plot(x, [row["reward"] for row in steps], lw=0.7, alpha=0.6, label=f"reward, {name}")
            lengths.plot(x, [row["length"]["mean"] for row in steps], label=f"mean, {name}")
            lengths.plot(x, [row["length"]["max"] for row in steps], lw=0.5, color="0.7")
        means = [row["pass@1"]["mean"] for row in rows]
        scores.plot([row["step"] for row in rows], means, "ko-", label="held-out pass@1, mean")
        scores.set(xlabel="RL step", ylim=(0, 1))
        lengths.set(xlabel="RL step")


def measure(config: Config) -> Result:
    """Return a row for each evaluation."""
    runs = {Path(folder).name: read_metrics(folder) for folder in config.runs}
    steps = sorted(set.intersection(*(set(metrics.evaluations) for metrics in runs.values())))
    if not steps:
        raise UserError(f"--runs {' '.join(config.runs)}: no evaluation that all of them have made")
    rows = []
    for step in steps:
        evaluations = [metrics.evaluations[step] for metrics in runs.values()]
        row = {"step": step, "length": spread([e["length"] for e in evaluations])}
        for name in evaluations[0]["eval"]:
            row[name] = spread([e["eval"][name] for e in evaluations])
        rows.append(row)
    picture_path = Path(config.runs[0]) / "seeds.png"
    draw(runs, rows, picture_path)
    ratio = rows[-1]["pass@1"]["mean"] / max(1e-9, rows[0]["pass@1"]["mean"])
    return Result(ratio, rows, device_of(config.runs[0]), f"mean (range) of {len(runs)} runs; wrote {picture_path}")
