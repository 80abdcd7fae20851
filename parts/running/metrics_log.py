"""metrics.jsonl, and the tracker that gets the same numbers with --track: TensorBoard or Weights & Biases, through
accelerate's trackers.

Both packages are optional, and only a run that asks for one imports it. TensorBoard's files are in out/tensorboard/; a
new run removes those of an earlier one, a resumed run continues them, and steps that it makes again are shown once. For
Weights & Biases a resumed run is a run of its own. The project is named tlt, and WANDB_MODE, WANDB_PROJECT and so on
mean what they always mean.
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from parts.cli import UserError, reason
from parts.files import cannot_write, write_atomically


def to_json(value) -> str:
    """Return JSON text, with null for numbers that are not finite: JSON has no NaN."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value):
    """Return the value with None in the place of numbers that are not finite, in dicts and lists, too."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Writes rows of metrics to out/metrics.jsonl and to the tracker. Exists on rank 0 only."""

    def __init__(self, config, metrics: list[dict], first_step: int):
        """metrics: the rows so far; later rows of the file are of steps that will be made again. Raises UserError."""
        self.path = Path(config.out) / "metrics.jsonl"
        self.tracker = open_tracker(config, first_step)
        write_atomically(self.path, "".join(to_json(row) + "\n" for row in metrics))

    def write(self, row: dict) -> None:
        """Write a row, of a step or of an evaluation (which has the key "eval"). Add here what else should get it.
        Raises UserError.
        """
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(to_json(row) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self.tracker:
            self.tracker.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """End the tracker."""
        if self.tracker:
            self.tracker.finish()


def open_tracker(config, first_step: int):
    """Return an accelerate tracker; None if none is wanted. first_step: 0 for a new run. Raises UserError."""
    if config.track == "off":
        return None
    from accelerate import PartialState, tracking

    PartialState(cpu=config.device == "cpu")  # accelerate's logger needs it; with several workers it is there already
    try:
        if config.track == "tensorboard":
            if not first_step:
                shutil.rmtree(Path(config.out) / "tensorboard", ignore_errors=True)
            purge = first_step + 1 if first_step else None
            tracker = tracking.TensorBoardTracker("tensorboard", config.out, purge_step=purge)
        else:
            project = os.environ.get("WANDB_PROJECT", "tlt")
            tracker = tracking.WandBTracker(project, name=Path(config.out).name, dir=config.out)
        tracker.start()
        tracker.store_init_configuration(asdict(config))
    except Exception as error:  # each service has its own: no login, no network, a full disk
        raise UserError(f"--track {config.track}: {reason(error)}") from error
    return tracker


def scalars(row: dict) -> dict[str, float]:
    """Return the numbers of a row of metrics by names such as length/mean; those of an evaluation begin with eval/. The
    step, lists and None are left out.
    """
    numbers: dict[str, float] = {}

    def add(name: str, value) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, int | float):
            numbers[name.replace("@", "_at_")] = value  # TensorBoard allows few characters

    for name, value in row.items():
        if name != "step":
            add(name if "eval" not in row or name == "eval" else f"eval/{name}", value)
    return numbers
