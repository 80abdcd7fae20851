"""metrics.jsonl, and the tracker that gets the same numbers with --track: TensorBoard or Weights & Biases, through
accelerate's trackers.

Both packages are optional, and only a run that asks for one imports it. TensorBoard's files are in out/tensorboard/; a
new run removes those of an earlier one, a resumed run continues them, and steps that it makes again are shown once. For
Weights & Biases a resumed run is a run of its own. The project is named tlt, and WANDB_MODE, WANDB_PROJECT and so on
mean what they always mean.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from parts.cli import UserError, reason


def open_tracker(config, first_step: int):
    """An accelerate tracker, for rank 0; None if none is wanted. first_step: 0 for a new run. Raises UserError."""
    if config.track == "off":
        return None
    from accelerate import PartialState, tracking

    PartialState(cpu=config.device == "cpu")  # accelerate's logger wants it; it is there already if there is a team
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
    """The numbers of a row of metrics, by names such as length/mean; an evaluation's begin with eval/. Without the
    step, lists, and what is None.
    """
    numbers: dict[str, float] = {}

    def note(name: str, value) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                note(f"{name}/{key}", inner)
        elif isinstance(value, int | float):
            numbers[name.replace("@", "_at_")] = value  # TensorBoard allows few characters

    for name, value in row.items():
        if name != "step":
            note(name if "eval" not in row or name == "eval" else f"eval/{name}", value)
    return numbers
