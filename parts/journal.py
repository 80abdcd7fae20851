"""What a training run writes down and shows: metrics.jsonl, the bar, the table; at the end the pictures. Whatever else
is to be done with each row of metrics is called from Journal.on_row.
"""

import json
import time
from pathlib import Path

from tqdm import tqdm

from parts.common import write_atomically
from parts.tracking import open_tracker, scalars
from report import Span, Table, describe, draw_curves, draw_timeline, summarise, trace


class Journal:
    """On every worker; only the one that `writes` prints and touches files.

    metrics: the rows so far, as dicts: a step's (report.describe) or an evaluation's (report.evaluation).
    """

    def __init__(self, config, metrics: list[dict], first_step: int, writes: bool):
        self.config = config
        self.out = Path(config.out)
        self.metrics = metrics
        self.writes = writes
        self.table = Table(self.say)
        self.bar = tqdm(
            total=config.steps,
            initial=first_step,
            unit="step",
            disable=not writes,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.bar_shown = 0.0  # when its text was last written
        # (step, when it began on each worker, each worker's spans with the evaluation and the checkpoint before it)
        self.history: list[tuple[int, list[float], list[list[Span]]]] = []
        self.spans: list[list[Span]] = []  # each worker's, of the last step
        self.tracker = open_tracker(config, first_step) if writes else None
        if writes:  # steps after the checkpoint will be made again
            write_atomically(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.writes:
            tqdm.write(text)

    def progress(self, text: str) -> None:
        """Show it beside the bar, twice a second at most."""
        if time.time() > self.bar_shown + 0.5:
            self.bar_shown = time.time()
            self.bar.set_postfix_str(text)

    def keep(self, row: dict) -> None:
        """Add a row to the metrics."""
        self.metrics.append(row)
        if self.writes:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.on_row(row)

    def on_row(self, row: dict) -> None:
        """Called on rank 0 with each new row, of a step or of an evaluation (which has the key "eval")."""
        if self.tracker:
            self.tracker.log(scalars(row), step=row["step"])

    def step(self, step: int, started: list[float], responses, rewards, stats: dict, spans, notes) -> dict:
        """A step is done -> its row. started, spans, notes: of each worker."""
        self.history.append((step, started, spans))
        self.spans = []
        for begin, worker in zip(started, spans):
            self.spans.append([s._replace(start=max(s.start, begin)) for s in worker if s.end > begin])
        row = describe(step, responses, rewards, stats, self.spans, notes)
        self.keep(row)
        self.table.show(row, self.spans)
        self.bar.update()
        return row

    def evaluation(self, row: dict) -> None:
        """A held-out evaluation is done."""
        self.keep(row)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row["eval"].items())
        self.say(
            f"held-out at step {row['step']}: {scores}, lenient {row['lenient']:.3f}, "
            f"mean length {row['length']:.0f} ({row['problems']} problems, {row['seconds']:.0f} s)"
        )

    def finish(self) -> dict:
        """Pictures -> the summary, the same on every worker."""
        self.bar.close()
        if self.tracker:
            self.tracker.finish()
        summary = summarise(self.metrics, self.config)
        if self.writes:
            draw_curves(self.metrics, self.out / "curves.png", self.config)
            if self.history:
                draw_timeline({f"step {self.config.steps}": self.spans}, self.out / "timeline.png")
                write_atomically(self.out / "trace.json", trace(self.history))
        return summary
