"""A run in pictures: timelines of the workers as text, as PNG and in Chrome's trace format, and the learning curves.

timeline.png shows the last step; trace.json holds every step since the last start, for https://ui.perfetto.dev
(microseconds, one row per worker).
"""

import json
from pathlib import Path

from parts.files import replacing
from parts.running.timers import LABELS, ROLLOUT, STATES, Span


def gantt(spans: list[Span], started: float, seconds: float, width: int = 96) -> str:
    """Return a line of `width` characters: in each, the character of the state that took most of that time."""
    line = ""
    for i in range(width):
        begin = started + seconds * i / width
        end = started + seconds * (i + 1) / width
        share: dict[str, float] = {}
        for span in spans:
            share[span.state] = share.get(span.state, 0.0) + max(0.0, min(end, span.end) - max(begin, span.start))
        longest = max(share, key=share.get, default=None)
        line += STATES[longest][0] if longest and share[longest] > 0 else " "
    return line


# ---------------------------------------------------------------- at the end of a run


def split_metrics(metrics: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return (rows of steps, rows of evaluations)."""
    return [m for m in metrics if "eval" not in m], [m for m in metrics if "eval" in m]


def score_names(evals: list[dict]) -> list[str]:
    """Return the scores that all evaluations have: after a resume with another --eval-samples, k of pass@k differs."""
    names = list(evals[0]["eval"]) if evals else []
    return [name for name in names if all(name in row["eval"] for row in evals)]


def trace(history: list[tuple[int, list[float], list[list[Span]]]]) -> str:
    """Return JSON text in Chrome's trace format. history: see report.RunReport.history."""
    workers = len(history[-1][2]) if history else 0
    events = []
    for rank in range(workers):
        name = {"name": f"worker {rank}"}
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": name})
    for step, started, spans in history:
        for rank, worker in enumerate(spans):
            for span in worker:
                event = {"name": span.state, "ph": "X", "ts": round(span.start * 1e6), "dur": round(span.seconds * 1e6)}
                args = {"step" if span.end > started[rank] else "before": step, "rows": span.rows}
                events.append({**event, "pid": 0, "tid": rank, "args": args})
    return json.dumps({"traceEvents": events})


# ---------------------------------------------------------------- pictures


def pyplot():
    """Return matplotlib's pyplot, for files only. It is imported when the first picture is drawn: only rank 0 draws, at
    the end.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure, path, dpi: int = 100) -> None:
    """Write a figure as PNG, whole or not at all, and close it. Raises UserError."""
    with replacing(Path(path)) as part:
        figure.savefig(part, dpi=dpi, format="png")
    pyplot().close(figure)


def draw_timeline(panels: dict[str, list[list[Span]]], path) -> None:
    """Draw the workers' timelines. panels: title -> each worker's spans, all on one scale. The height of a rollout
    shows how many sequences still run.
    """
    plt = pyplot()
    size = (9, 1.2 + 0.45 * len(panels) + 0.6 * sum(map(len, panels.values())))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False)
    drawn: set[str] = set()
    most = max((span.rows for spans in panels.values() for worker in spans for span in worker), default=0)
    for axis, (title, spans) in zip(axes[:, 0], panels.items()):
        zero = min(worker[0].start for worker in spans)
        for rank, worker in enumerate(spans):
            for span in worker:
                label = None if span.state in drawn else LABELS.get(span.state, span.state)
                drawn.add(span.state)
                bar = (span.start - zero, span.seconds)
                height = 0.9 * span.rows / most if span.state in ROLLOUT and span.rows else 0.9
                axis.broken_barh([bar], (rank + 0.45 - height, height), color=STATES[span.state][1], label=label)
        names = [f"worker {rank}" for rank in range(len(spans))]
        axis.set(title=title, yticks=range(len(spans)), yticklabels=names, ylim=(len(spans) - 0.5, -0.5))
    heights = f"; the height of a rollout: responses that still run, at most {most}" if most else ""
    axes[-1, 0].set_xlabel("seconds" + heights)
    figure.legend(loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.55 / size[1], 1, 1))  # room for the legend
    save_picture(figure, path, dpi=110)


def draw_curves(metrics: list[dict], path, config) -> None:
    """Draw rewards and held-out scores, response lengths and seconds by state over the steps."""
    plt = pyplot()
    steps, evals = split_metrics(metrics)
    figure, (scores, lengths, seconds) = plt.subplots(1, 3, figsize=(13, 3.6))
    x = [m["step"] for m in steps]
    rewards = [m["reward"] for m in steps]
    scores.plot(x, rewards, lw=1, color="0.6", label="reward (training)")
    for name in score_names(evals):
        scores.plot([m["step"] for m in evals], [m["eval"][name] for m in evals], "o-", label=f"held-out {name}")
    scores.set(title=f"{config.task}, {config.loss}, seed {config.seed}", xlabel="RL step")
    scores.set_ylim(min([0, *rewards]), max([1, *rewards]))
    scores.legend()
    for name in ("mean", "p50", "p95", "max"):
        lengths.plot(x, [m["length"][name] for m in steps], label=name)
    lengths.set(title="response length (tokens)", xlabel="RL step")
    lengths.legend()
    states = [state for state in STATES if steps and state in steps[0]["seconds"]]
    if states:
        areas = [[m["seconds"][state] for m in steps] for state in states]
        seconds.stackplot(x, areas, labels=states, colors=[STATES[state][1] for state in states])
        seconds.legend(loc="upper left")
    seconds.set(title="seconds per step", xlabel="RL step")
    figure.tight_layout()
    save_picture(figure, path)
