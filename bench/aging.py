"""How fast a drafter ages: one that is trained along (adaptive) against one that stands still (static).

Read from two finished training runs of the same steps. The figure is tokens per round at draft length k = 8, worked out
from the acceptance that was measured at each depth, whatever lengths the strategy has chosen:

    E = 1 + sum_{j<=k} prod_{i<=j} c_i          c_i: share of right guesses at depth i

The curves are drawn into ADAPTIVE/drafter.png.
Ratio: adaptive over static, mean of the last ten steps.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Output, Result, device_of, read_metrics
from parts.cli import UserError, flag
from parts.running.pictures import pyplot

K = 8
PART = 10  # steps in a row of the table


@dataclass(frozen=True)
class Config(Output):
    """Settings of this table."""

    adaptive: str = flag("runs/adaptive", "folder of a run with --drafter adaptive")
    static: str = flag("runs/static", "folder of a run with --drafter static")


def tokens_per_round(acceptance: list[float | None]) -> float:
    """E. acceptance: by depth; None where no guess was tried, which is taken to be as good as the depth before."""
    total = 1.0
    chance = 1.0  # that the guesses so far are all right
    share = 1.0
    for measured in acceptance[:K]:
        if measured is not None:
            share = measured
        chance *= share
        total += chance
    return total


def curve_of(steps: dict[int, dict]) -> dict[int, float]:
    """Step -> E, for the steps in which something was drafted. steps: rows of metrics.jsonl."""
    curve = {}
    for step, row in steps.items():
        acceptance = row["speculation"]["acceptance"]
        if acceptance[0] is not None:
            curve[step] = tokens_per_round(acceptance)
    return curve


def draw(runs: dict[str, dict[int, dict]], curves: dict[str, dict[int, float]], path: Path) -> None:
    """Tokens per round, and rewards, which must be the same."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 3.6))
    for name, steps in runs.items():
        left.plot(list(curves[name]), list(curves[name].values()), label=name)
        style = "-" if name == "adaptive" else "k:"
        right.plot(list(steps), [row["reward"] for row in steps.values()], style, label=name)
    left.set(xlabel="RL step", title=f"tokens per round at k = {K}")
    right.set(xlabel="RL step", title="reward: the same, whatever drafts")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def measure(config: Config) -> Result:
    """One row for every ten steps."""
    folders = {"adaptive": config.adaptive, "static": config.static}
    runs = {name: read_metrics(folder).steps for name, folder in folders.items()}
    for name, steps in runs.items():
        if not all("speculation" in row for row in steps.values()):
            raise UserError(f"--{name} {folders[name]}: this run was made without a drafter")
    curves = {name: curve_of(steps) for name, steps in runs.items()}
    common_steps = [step for step in curves["adaptive"] if step in curves["static"]]
    if not common_steps:
        raise UserError(f"--adaptive {config.adaptive}, --static {config.static}: no step in which both have drafted")
    draw(runs, curves, Path(config.adaptive) / "drafter.png")
    rows = []
    for i in range(0, len(common_steps), PART):
        part = common_steps[i : i + PART]
        row = {"steps": [part[0], part[-1]]}
        for name, curve in curves.items():
            row[name] = statistics.mean(curve[step] for step in part)
        rows.append(row)
    return Result(rows[-1]["adaptive"] / rows[-1]["static"], rows, device_of(config.adaptive))


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'steps':>9} {'static':>7} {'adaptive':>9} {'ratio':>6}"]
    for row in rows:
        first, last = row["steps"]
        figures = f"{row['static']:7.2f} {row['adaptive']:9.2f} {row['adaptive'] / row['static']:6.2f}"
        lines.append(f"{first:4d}-{last:<4d} {figures}")
    return "\n".join(lines)
