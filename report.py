"""What a run tells: a row of metrics per step, the table, the timeline of the workers, the curves, the model card.

A worker is in exactly one state at any moment (`Clock`). The states, with their marks in the table and their colours in
the pictures, are in STATES. timeline.png shows the last step; trace.json holds every step, for https://ui.perfetto.dev
(Chrome's trace format: microseconds, one row per worker). Nothing here takes part in the training.
"""

import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

STATES = {
    "rollout": ("#", "tab:blue"),
    "speculative": ("=", "tab:cyan"),
    "drafter": ("d", "tab:green"),
    "idle": (".", "0.85"),
    "reward": ("r", "tab:purple"),
    "update": ("u", "tab:orange"),
    "checkpoint": ("c", "tab:brown"),
}
LABELS = {"rollout": "plain rollout", "speculative": "speculative rollout", "drafter": "drafter training"}
ROLLOUT = ("rollout", "speculative", "reward")


class Span(NamedTuple):
    """A worker was in a state from start to end (seconds since 1970)."""

    state: str
    start: float
    end: float
    rows: int = 0  # responses that it was writing; 0: before the first round, or no rollout

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


class Clock:
    """Where a worker's time goes. It is in one state at any moment, so the states' seconds sum to the whole."""

    def __init__(self, tell: Callable[[str], None] | None = None):
        """tell(state) hears of each call of `enter`: a sign of life."""
        self.tell = tell
        self.spans: list[Span] = []
        self.state = "idle"
        self.rows = 0
        self.since = time.time()

    def enter(self, state: str, rows: int | None = None) -> None:
        """From now on the worker is in this state, with so many live rows; None: in a rollout as many as before."""
        if self.tell:
            self.tell(state)
        if rows is None:
            rows = self.rows if state in ROLLOUT else 0
        if (state, rows) != (self.state, self.rows):
            now = time.time()
            self.spans.append(Span(self.state, self.since, now, self.rows))
            self.state = state
            self.rows = rows
            self.since = now

    def take(self) -> list[Span]:
        """The spans since the last call."""
        now = time.time()
        spans = [*self.spans, Span(self.state, self.since, now, self.rows)]
        self.spans = []
        self.since = now
        return spans


# ---------------------------------------------------------------- rows of metrics.jsonl


@dataclass
class WorkerNotes:
    """What a worker did for speculation in a step. See interfaces.Stats for the first five."""

    rounds: int = 0
    spec_rounds: int = 0
    spec_row_rounds: int = 0
    spec_tokens: int = 0
    spec_drafts: int = 0
    tried: list[int] = field(default_factory=list)  # by depth: guesses of the learned drafter that were reached
    right: list[int] = field(default_factory=list)  # by depth: those that were right
    drafter_steps: int = 0
    drafter_loss: float = 0.0  # their sum

    def add_rollout(self, stats) -> None:
        """What a rollout took, as interfaces.Stats."""
        self.rounds += stats.rounds
        self.spec_rounds += stats.spec_rounds
        self.spec_row_rounds += stats.spec_row_rounds
        self.spec_tokens += stats.spec_tokens
        self.spec_drafts += stats.spec_drafts


def describe(
    step: int, responses, rewards, stats: dict, spans: list[list[Span]], notes: list[WorkerNotes | None]
) -> dict:
    """One row of metrics.jsonl.

    rewards (P, G); stats: of the update; spans, notes: of each worker. The seconds by state are means over the
    workers and sum to the step. Equal digests: the same tokens, every one.
    """
    lengths = sorted(len(r.tokens) for r in responses)
    samples = rewards.shape[1]
    right = [[r.grade.strict for r in responses[i : i + samples]] for i in range(0, len(responses), samples)]

    def quantile(q: float) -> int:
        return lengths[min(len(lengths) - 1, int(q * len(lengths)))]

    seconds = {state: time_in(spans, state) / len(spans) for state in STATES if state != "checkpoint"}
    seconds["step"] = sum(seconds.values())
    return {
        "step": step,
        "reward": rewards.mean().item(),
        "solved": sum(any(group) for group in right) / len(right),
        "flat_groups": int((rewards == rewards[:, :1]).all(1).sum()),
        "lenient": sum(r.grade.lenient for r in responses) / len(responses),
        "length": {
            "mean": sum(lengths) / len(lengths),
            "p50": quantile(0.5),
            "p95": quantile(0.95),
            "p99": quantile(0.99),
            "max": lengths[-1],
        },
        "truncated": sum(not r.stopped for r in responses) / len(responses),
        "tokens": sum(lengths),
        "digest": zlib.crc32(repr([r.tokens for r in responses]).encode()),
        "tokens_per_second": sum(lengths) / max(1e-9, seconds["step"] - seconds["update"]),
        "seconds": seconds,
        **stats,
        **speculation(spans, notes),
    }


def time_in(spans: list[list[Span]], *states: str) -> float:
    """Seconds that the workers together were in these states."""
    return sum(span.seconds for worker in spans for span in worker if span.state in states)


def last_end(spans: list[list[Span]], *states: str) -> float:
    """When the last worker left one of these states."""
    return max((span.end for worker in spans for span in worker if span.state in states), default=0.0)


def speculation(spans: list[list[Span]], notes: list[WorkerNotes | None]) -> dict:
    """How speculation and drafter training went in a step, over all workers; {} where nobody could draft."""
    if any(n is None for n in notes):
        return {}
    rows = max(1, sum(n.spec_row_rounds for n in notes))
    tried = [sum(depth) for depth in zip_longest(*(n.tried for n in notes), fillvalue=0)]
    right = [sum(depth) for depth in zip_longest(*(n.right for n in notes), fillvalue=0)]
    steps = sum(n.drafter_steps for n in notes)
    trained = time_in(spans, "drafter")
    return {
        "speculation": {
            "tokens_per_round": sum(n.spec_tokens for n in notes) / rows,
            "k": sum(n.spec_drafts for n in notes) / rows,
            "share": sum(n.spec_rounds for n in notes) / max(1, sum(n.rounds for n in notes)),
            # of the learned drafter, by depth
            "acceptance": [r / t if t else None for r, t in zip(right, tried)],
        },
        "drafter": {
            "steps": steps,
            "loss": sum(n.drafter_loss for n in notes) / max(1, steps),
            # share of the idle time that was used
            "reclaimed": trained / max(1e-9, trained + time_in(spans, "idle")),
            # seconds from the last response to the end of drafter training
            "preempted": max(0.0, last_end(spans, "drafter") - last_end(spans, *ROLLOUT)),
        },
    }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, seen `right` of n (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def evaluation(step: int, responses, samples: int, seconds: float) -> dict:
    """The row of a held-out evaluation. responses: `samples` to each problem, one problem after the other."""
    groups = [responses[i : i + samples] for i in range(0, len(responses), samples)]
    right = [sum(r.grade.strict for r in group) for group in groups]
    scores = {}
    for k in sorted({1, samples}):
        scores[f"pass@{k}"] = sum(pass_at_k(samples, count, k) for count in right) / len(right)
    return {
        "step": step,
        "eval": scores,
        "lenient": sum(r.grade.lenient for r in responses) / len(responses),
        "problems": len(right),
        "samples": samples,
        "length": sum(len(r.tokens) for r in responses) / len(responses),
        "seconds": seconds,
    }


# ---------------------------------------------------------------- the table


class Table:
    """One line per step; below it the timelines of several workers and what speculation did."""

    HEAD = (
        " step  reward  solved  flat |  length: mean  p50  p95  max   cut | tok/s |"
        "  rollout drafter    idle  update =  step s |    gap"
    )
    REPEAT_HEAD = 20  # steps

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.rows = 0

    def show(self, row: dict, spans: list[list[Span]]) -> None:
        """row: from `describe`; spans: of each worker."""
        if self.rows % self.REPEAT_HEAD == 0:
            self.say(self.HEAD)
        self.rows += 1
        self.say(self.line(row))
        if len(spans) > 1:
            started = min(worker[0].start for worker in spans)
            for rank, worker in enumerate(spans):
                self.say(f"       worker {rank} |{gantt(worker, started, row['seconds']['step'])}|")
        if "extra" in row:
            extra = row["extra"]
            self.say(f"       {extra['groups']} further prompts in the place of flat groups: {extra['seconds']:.2f} s")
        if row["skipped"]:
            self.say("       the gradient was not finite: the policy stays as it was")
        if "speculation" in row:
            self.say("       " + self.drafting(row["speculation"], row["drafter"]))

    def line(self, row: dict) -> str:
        """The figures of a step."""
        n = row["length"]
        s = row["seconds"]
        rollout = sum(s[state] for state in ROLLOUT)
        return (
            f"{row['step']:5d}  {row['reward']:6.3f}  {row['solved']:6.2f}  {row['flat_groups']:4d} | "
            f"{n['mean']:13.0f} {n['p50']:4d} {n['p95']:4d} {n['max']:4d} {row['truncated']:5.1%} | "
            f"{row['tokens_per_second']:5.0f} |{rollout:9.2f}{s['drafter']:8.2f}{s['idle']:8.2f}{s['update']:8.2f} ="
            f"{s['step']:8.2f} |{row['gap_max']:7.0e}"
        )

    def drafting(self, speculation: dict, drafter: dict) -> str:
        """What speculation and drafter training did in a step."""
        text = (
            f"{speculation['tokens_per_round']:.2f} tokens per row and speculative round, k {speculation['k']:.1f}, "
            f"{speculation['share']:.0%} of the rounds speculative"
        )
        if drafter["steps"]:
            text += (
                f"; drafter: {drafter['steps']} steps, loss {drafter['loss']:.3f}, "
                f"{drafter['reclaimed']:.0%} of the idle time used, stopped within {drafter['preempted'] * 1e3:.0f} ms"
            )
        return text


def gantt(spans: list[Span], started: float, seconds: float, width: int = 96) -> str:
    """A line of `width` characters: in each the state that held most of that moment, by its mark."""
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


def show_samples(say: Callable[[str], None], responses, tokenizer) -> None:
    """The best and the worst response of a step, in short."""
    ranked = sorted(responses, key=lambda r: (r.grade.reward, r.grade.strict, r.grade.lenient, -len(r.tokens)))
    for name, r in (("best", ranked[-1]), ("worst", ranked[0])):
        text = tokenizer.decode(r.prompt + r.tokens)
        if len(text) >= 400:
            text = text[:200] + " ... " + text[-200:]
        say(f"  {name} ({len(r.tokens)} tokens, {'right' if r.grade.strict else 'wrong'}): {text}")


# ---------------------------------------------------------------- at the end of a run


def split_metrics(metrics: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows of steps, rows of evaluations)."""
    return [m for m in metrics if "eval" not in m], [m for m in metrics if "eval" in m]


def summarise(metrics: list[dict], config) -> dict:
    """-> evals (rows), seconds (by state, of all steps), text."""
    steps, evals = split_metrics(metrics)
    total = {"step": 0.0}
    if steps:
        total = {state: sum(m["seconds"][state] for m in steps) for state in steps[-1]["seconds"]}
    whole = max(1e-9, total["step"])
    shares = ", ".join(f"{state} {seconds / whole:.0%}" for state, seconds in total.items() if state != "step")
    lines = [f"{len(steps)} steps in {total['step']:.0f} s: {shares}"]
    if len(evals) > 1:
        first = evals[0]
        last = evals[-1]
        for name, before in first["eval"].items():
            after = last["eval"][name]
            lines.append(f"held-out {name}: {before:.3f} -> {after:.3f} ({after - before:+.3f})")
        sizes = f"{first['problems']} problems x {first['samples']} samples, seed {config.seed}"
        lines.append(f"mean length: {first['length']:.0f} -> {last['length']:.0f} tokens   ({sizes})")
    lines.append(
        f"in {config.out}: policy/ (a Hugging Face folder), metrics.jsonl, curves.png, timeline.png, trace.json "
        "(for ui.perfetto.dev), the last checkpoints"
    )
    return {"evals": evals, "seconds": total, "text": "\n".join(lines)}


def model_card(metrics: list[dict], config) -> str:
    """README.md of the policy's folder, from the run's own figures."""
    steps, evals = split_metrics(metrics)
    seconds = sum(m["seconds"]["step"] for m in steps)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [grpo, speculative-decoding]",
        "---",
        f"# {config.model}, trained on {config.task}",
        "",
        f"{len(steps)} GRPO steps ({config.loss}) of {config.prompts} prompts x {config.samples} samples, learning "
        f"rate {config.lr:g}, KL weight {config.kl:g}, seed {config.seed}; {seconds:.0f} s. "
        "A normal Hugging Face folder.",
        "",
    ]
    if evals:
        names = list(evals[0]["eval"])
        lines.append(f"| RL step | {' | '.join(names)} | mean length |")
        lines.append("| --- " * (len(names) + 2) + "|")
        for e in evals:
            scores = " | ".join(f"{value:.3f}" for value in e["eval"].values())
            lines.append(f"| {e['step']} | {scores} | {e['length']:.0f} |")
        lines.append("")
        lines.append(
            f"Held out: {evals[-1]['problems']} problems, {evals[-1]['samples']} samples each, temperature "
            f"{config.temperature}, at most {config.max_new} tokens."
        )
    return "\n".join([*lines, "", *drafter_card(steps), ""])


def drafter_card(steps: list[dict]) -> list[str]:
    """The card's lines about the drafter; none where nothing was drafted in the last ten steps."""
    drafted = [m["speculation"] for m in steps[-10:] if m.get("speculation", {}).get("share")]
    if not drafted:
        return []
    tokens = sum(d["tokens_per_round"] for d in drafted) / len(drafted)
    length = sum(d["k"] for d in drafted) / len(drafted)
    return [
        "## Drafter",
        "",
        f"`drafter/` holds the one-layer EAGLE drafter that was trained along: {tokens:.2f} tokens per round at a mean "
        f"draft length of {length:.1f} in the last {len(drafted)} steps.",
        "",
        "    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)",
        "",
        "decodes with it (FOLDER: this one), at temperature 0 with the tokens of plain generation.",
    ]


def trace(history: list[tuple[int, list[float], list[list[Span]]]]) -> str:
    """history: as journal.Journal.history -> JSON text in Chrome's trace format."""
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
    """matplotlib's, for files alone. Imported when the first picture is drawn: only rank 0 draws, at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_timeline(panels: dict[str, list[list[Span]]], path) -> None:
    """panels: title -> each worker's spans; on one scale. A rollout's bar is as high as responses still run."""
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(metrics: list[dict], path, config) -> None:
    """Rewards and held-out scores, response lengths, seconds by state, over the steps."""
    plt = pyplot()
    steps, evals = split_metrics(metrics)
    figure, (scores, lengths, seconds) = plt.subplots(1, 3, figsize=(13, 3.6))
    x = [m["step"] for m in steps]
    rewards = [m["reward"] for m in steps]
    scores.plot(x, rewards, lw=1, color="0.6", label="reward (training)")
    for name in evals[0]["eval"] if evals else []:
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
    figure.savefig(path, dpi=100)
    plt.close(figure)
