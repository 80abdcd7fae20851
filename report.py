"""What a run reports: a row of metrics per step, the table, the summary and the model card. Nothing here takes part in
the training.
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm

from parts.engine.model_loading import decode
from parts.files import write_atomically
from parts.running.metrics_log import MetricsLog
from parts.running.pictures import draw_curves, draw_timeline, gantt, score_names, split_metrics, trace
from parts.running.timers import ROLLOUT, STATES, Span

# ---------------------------------------------------------------- rows of metrics.jsonl


@dataclass
class SpeculationStats:
    """What a worker did for speculation in a step. See interfaces.Stats for the first five."""

    rounds: int = 0
    spec_rounds: int = 0
    spec_sequence_rounds: int = 0
    spec_tokens: int = 0
    spec_drafts: int = 0
    drafted: list[int] = field(default_factory=list)  # by depth: draft tokens of the EAGLE drafter that were reached
    accepted: list[int] = field(default_factory=list)  # by depth: those that were accepted
    drafter_steps: int = 0
    drafter_loss: float = 0.0  # their sum

    def add_rollout(self, stats) -> None:
        """Add the totals of a rollout, an interfaces.Stats."""
        self.rounds += stats.rounds
        self.spec_rounds += stats.spec_rounds
        self.spec_sequence_rounds += stats.spec_sequence_rounds
        self.spec_tokens += stats.spec_tokens
        self.spec_drafts += stats.spec_drafts


def metrics_row(
    step: int, responses, rewards, stats: dict, spans: list[list[Span]], speculation: list[SpeculationStats | None]
) -> dict:
    """Return a step's row of metrics.jsonl.

    rewards (P, G); stats: of the update; spans, speculation: of each worker. The seconds by state are means over the
    workers and sum to the step. Equal digests mean that every token is the same.
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
        "zero_variance_groups": int((rewards == rewards[:, :1]).all(1).sum()),
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
        **speculation_figures(spans, speculation),
    }


def time_in(spans: list[list[Span]], *states: str) -> float:
    """Return the seconds that all workers together spent in these states."""
    return sum(span.seconds for worker in spans for span in worker if span.state in states)


def last_end(spans: list[list[Span]], *states: str) -> float:
    """Return when the last worker left one of these states."""
    return max((span.end for worker in spans for span in worker if span.state in states), default=0.0)


def seconds_of_preemption(spans: list[list[Span]]) -> float:
    """Return the seconds from the last response to the end of the drafter training that it ended. A warm start, which
    begins after the last response, does not count.
    """
    over = last_end(spans, *ROLLOUT)
    ends = [span.end for worker in spans for span in worker if span.state == "drafter" and span.start < over]
    return max(0.0, max(ends, default=0.0) - over)


def speculation_figures(spans: list[list[Span]], workers: list[SpeculationStats | None]) -> dict:
    """Return the figures of speculation and drafter training in a step, over all workers; {} where none could draft."""
    if any(n is None for n in workers):
        return {}
    rows = max(1, sum(n.spec_sequence_rounds for n in workers))
    drafted = [sum(depth) for depth in zip_longest(*(n.drafted for n in workers), fillvalue=0)]
    accepted = [sum(depth) for depth in zip_longest(*(n.accepted for n in workers), fillvalue=0)]
    steps = sum(n.drafter_steps for n in workers)
    trained = time_in(spans, "drafter")
    return {
        "speculation": {
            "tokens_per_round": sum(n.spec_tokens for n in workers) / rows,
            "k": sum(n.spec_drafts for n in workers) / rows,
            "share": sum(n.spec_rounds for n in workers) / max(1, sum(n.rounds for n in workers)),
            # of the EAGLE drafter, by depth
            "acceptance": [a / d if d else None for a, d in zip(accepted, drafted)],
        },
        "drafter": {
            "steps": steps,
            "loss": sum(n.drafter_loss for n in workers) / max(1, steps),
            # share of the idle time that was used
            "reclaimed": trained / max(1e-9, trained + time_in(spans, "idle")),
            "preempted": seconds_of_preemption(spans),
        },
    }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k, given `right` of n samples (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def evaluation(step: int, responses, samples: int, seconds: float) -> dict:
    """Return the row of a held-out evaluation. responses: `samples` to each problem, one problem after the other."""
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
    """Prints one line per step; below it the timelines of several workers, and a line about speculation."""

    HEAD = (
        " step  reward  solved  zerovar |  length: mean  p50  p95  max   cut | tok/s |"
        "  rollout drafter    idle  update =  step s |    gap"
    )
    REPEAT_HEAD = 20  # steps

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.rows = 0

    def show(self, row: dict, spans: list[list[Span]]) -> None:
        """Print a step. row: from `metrics_row`; spans: of each worker."""
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
            prompts = f"{extra['groups']} further prompts in the place of zero-variance groups"
            self.say(f"       {prompts}: {extra['seconds']:.2f} s")
        if row["skipped"]:
            self.say("       the gradient was not finite: the policy stays as it was")
        if "speculation" in row:
            self.say("       " + self.drafting(row["speculation"], row["drafter"]))

    def line(self, row: dict) -> str:
        """Return the figures of a step."""
        n = row["length"]
        s = row["seconds"]
        rollout = sum(s[state] for state in ROLLOUT)
        return (
            f"{row['step']:5d}  {row['reward']:6.3f}  {row['solved']:6.2f}  {row['zero_variance_groups']:7d} | "
            f"{n['mean']:13.0f} {n['p50']:4d} {n['p95']:4d} {n['max']:4d} {row['truncated']:5.1%} | "
            f"{row['tokens_per_second']:5.0f} |{rollout:9.2f}{s['drafter']:8.2f}{s['idle']:8.2f}{s['update']:8.2f} ="
            f"{s['step']:8.2f} |{row['gap_max']:7.0e}"
        )

    def drafting(self, speculation: dict, drafter: dict) -> str:
        """Return a line about speculation and drafter training in a step."""
        text = (
            f"{speculation['tokens_per_round']:.2f} tokens per sequence and speculative round, "
            f"k {speculation['k']:.1f}, {speculation['share']:.0%} of the rounds speculative"
        )
        if drafter["steps"]:
            text += (
                f"; drafter: {drafter['steps']} steps, loss {drafter['loss']:.3f}, "
                f"{drafter['reclaimed']:.0%} of the idle time used, stopped within {drafter['preempted'] * 1e3:.0f} ms"
            )
        return text


def show_samples(say: Callable[[str], None], responses, tokenizer) -> None:
    """Print the best and the worst response of a step, shortened."""
    ranked = sorted(responses, key=lambda r: (r.grade.reward, r.grade.strict, r.grade.lenient, -len(r.tokens)))
    for name, r in (("best", ranked[-1]), ("worst", ranked[0])):
        text = decode(r.prompt + r.tokens, tokenizer)
        if len(text) >= 400:
            text = text[:200] + " ... " + text[-200:]
        say(f"  {name} ({len(r.tokens)} tokens, {'right' if r.grade.strict else 'wrong'}): {text}")


def summarise(metrics: list[dict], config) -> dict:
    """Return the summary of a run: evals (rows), seconds (by state, of all steps), text."""
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
        for name in score_names(evals):
            before = first["eval"][name]
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
    """Return the README.md of the policy's folder, made of the run's own figures."""
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
        names = score_names(evals)
        lines.append(f"| RL step | {' | '.join(names)} | mean length |")
        lines.append("| --- " * (len(names) + 2) + "|")
        for e in evals:
            scores = " | ".join(f"{e['eval'][name]:.3f}" for name in names)
            lines.append(f"| {e['step']} | {scores} | {e['length']:.0f} |")
        lines.append("")
        lines.append(
            f"Held out: {evals[-1]['problems']} problems, {evals[-1]['samples']} samples each, temperature "
            f"{config.temperature}, at most {config.max_new} tokens."
        )
    return "\n".join([*lines, "", *drafter_card(steps), ""])


def drafter_card(steps: list[dict]) -> list[str]:
    """Return the lines of the card about the drafter; none if nothing was drafted in the last ten steps."""
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


# ---------------------------------------------------------------- a run as it goes on


class RunReport:
    """What a training run writes and shows: metrics.jsonl, the progress bar, the table, at the end the pictures.

    It exists on every worker; only the one that `writes` prints and touches files.
    metrics: the rows so far, as dicts: a step's (`metrics_row`) or an evaluation's (`evaluation`).
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
        self.log = MetricsLog(config, metrics, first_step) if writes else None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.writes:
            tqdm.write(text)

    def progress(self, text: str) -> None:
        """Show a text beside the bar, twice a second at most."""
        if time.time() > self.bar_shown + 0.5:
            self.bar_shown = time.time()
            self.bar.set_postfix_str(text)

    def add_row(self, row: dict) -> None:
        """Add a row to the metrics."""
        self.metrics.append(row)
        if self.log:
            self.log.write(row)

    def add_step(self, step: int, started: list[float], responses, rewards, stats: dict, spans, speculation) -> dict:
        """Report a finished step -> its row. started, spans, speculation: of each worker."""
        self.history.append((step, started, spans))
        self.spans = []
        for begin, worker_spans in zip(started, spans):
            self.spans.append([s._replace(start=max(s.start, begin)) for s in worker_spans if s.end > begin])
        row = metrics_row(step, responses, rewards, stats, self.spans, speculation)
        self.add_row(row)
        self.table.show(row, self.spans)
        self.bar.update()
        return row

    def add_evaluation(self, row: dict) -> None:
        """Report a held-out evaluation."""
        self.add_row(row)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row["eval"].items())
        self.say(
            f"held-out at step {row['step']}: {scores}, lenient {row['lenient']:.3f}, "
            f"mean length {row['length']:.0f} ({row['problems']} problems, {row['seconds']:.0f} s)"
        )

    def finish(self) -> dict:
        """Draw the pictures -> the summary, the same on every worker."""
        self.bar.close()
        summary = summarise(self.metrics, self.config)
        if self.log:
            self.log.close()
            draw_curves(self.metrics, self.out / "curves.png", self.config)
            if self.history:
                draw_timeline({f"step {self.config.steps}": self.spans}, self.out / "timeline.png")
                write_atomically(self.out / "trace.json", trace(self.history))
        return summary
