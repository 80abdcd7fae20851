"""How a drafter ages while the policy learns: one that is trained during the run (adaptive) against a static one.

Read from two finished training runs of the same steps. The figure is tokens per round at draft length k = 8, computed
from the acceptance that was measured at each depth, whatever lengths the strategy has chosen:

    E = 1 + sum_{j<=k} prod_{i<=j} c_i          c_i: share of accepted draft tokens at depth i

The curves are drawn into ADAPTIVE/drafter.png.
Ratio: adaptive over static, mean of the last ten steps.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Output, Result, device_of, picture, read_metrics
from parts.cli import UserError, flag

K = 8
PART = 10  # steps in a row of the table
COLUMNS = {"steps": "", "static": ".2f", "adaptive": ".2f", "ratio": ".2f"}


@dataclass(frozen=True)
class Config(Output):
    adaptive: str = flag("runs/adaptive", "folder of a run with --drafter adaptive")
    static: str = flag("runs/static", "folder of a run with --drafter static")


def tokens_per_round(acceptance: list[float | None]) -> float:
    """Return E. acceptance: by depth; None where no draft token was tried: that counts as good as the depth before."""
    total = 1.0
    chance = 1.0  # that all draft tokens so far are accepted
    share = 1.0
    for measured in acceptance[:K]:
        if measured is not None:
            share = measured
        chance *= share
        total += chance
    return total


def curve_of(steps: dict[int, dict]) -> dict[int, float]:
    """Return step -> E, for the steps in which something was drafted. steps: rows of metrics.jsonl."""
    acceptance = {step: row["speculation"]["acceptance"] for step, row in steps.items()}
    return {step: tokens_per_round(shares) for step, shares in acceptance.items() if shares[0] is not None}


def draw(runs: dict[str, dict[int, dict]], curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw tokens per round, and rewards, which must be the same."""
    with picture(path, [f"tokens per round at k = {K}", "reward: the same with any drafter"]) as (left, right):
        for name, steps in runs.items():
            left.plot(list(curves[name]), list(curves[name].values()), label=name)
            style = "-" if name == "adaptive" else "k:"
            right.plot(list(steps), [row["reward"] for row in steps.values()], style, label=name)
        left.set(xlabel="RL step")
        right.set(xlabel="RL step")


def measure(config: Config) -> Result:
    """Return a row for every ten steps."""
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
        means = {name: statistics.mean(curve[step] for step in part) for name, curve in curves.items()}
        rows.append({"steps": [part[0], part[-1]], **means, "ratio": means["adaptive"] / means["static"]})
    return Result(rows[-1]["ratio"], rows, device_of(config.adaptive), f"wrote {config.adaptive}/drafter.png")
