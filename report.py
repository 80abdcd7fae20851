"""What a run tells: a row of metrics per step, the table, the timeline of the workers, the curves. Nothing here takes part in the training.

A worker is in exactly one state at any moment (train_grpo.Clock). The states, with their marks in the table and their colours in the pictures, are in STATES.
timeline.png shows the last step; trace.json holds every step, for https://ui.perfetto.dev (Chrome's trace format: microseconds, one row per worker).
"""

import json
import zlib

STATES = {"rollout": ("#", "tab:blue"), "speculative": ("=", "tab:cyan"), "drafter": ("d", "tab:green"), "idle": (".", "0.85"), "reward": ("r", "tab:purple"),
          "update": ("u", "tab:orange"), "checkpoint": ("c", "tab:brown")}
ROLLOUT = ("rollout", "speculative", "reward")


def describe(step, responses, rewards, stats, spans, notes):
    """One row of metrics.jsonl. spans: each worker's (state, start, end); the seconds by state are means over the workers and sum to the step.
    notes: each worker's engine statistics and drafter training, see tlt.Team.notes."""
    lengths = sorted(len(r.tokens) for r in responses)
    at = lambda q: lengths[min(len(lengths) - 1, int(q * len(lengths)))]
    seconds = {phase: sum(end - start for mine in spans for state, start, end in mine if state == phase) / len(spans) for phase in STATES if phase != "checkpoint"}
    seconds["step"] = sum(seconds.values())
    return {"step": step, "reward": rewards.mean().item(), "solved": (rewards > 0).any(1).float().mean().item(),
            "flat_groups": int((rewards == rewards[:, :1]).all(1).sum()), "lenient": sum(r.grade.lenient for r in responses) / len(responses),
            "length": {"mean": sum(lengths) / len(lengths), "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": lengths[-1]},
            "truncated": sum(not r.stopped for r in responses) / len(responses), "tokens": sum(lengths),
            "digest": zlib.crc32(repr([r.tokens for r in responses]).encode()),  # equal digests: the same tokens, every one
            "tokens_per_second": sum(lengths) / max(1e-9, seconds["step"] - seconds["update"]), "seconds": seconds, **stats, **speculation(spans, notes)}


def speculation(spans, notes):
    """How speculation and drafter training went in a step, over all workers."""
    total = {k: sum(n[k] for n in notes) for k in notes[0]}
    if not total:
        return {}
    time_in = lambda *states: sum(end - start for mine in spans for state, start, end in mine if state in states)
    last = lambda *states: max((end for mine in spans for state, _, end in mine if state in states), default=0.0)
    rows = max(1, total["spec_row_rounds"])
    return {"speculation": {"tokens_per_round": total["spec_tokens"] / rows, "k": total["spec_drafts"] / rows, "share": total["spec_rounds"] / max(1, total["rounds"]),
                            "acceptance": [total[f"right{j}"] / total[f"tried{j}"] if total[f"tried{j}"] else None for j in range(12)]},  # of the learned drafter, by depth
            "drafter": {"steps": total["drafter_steps"], "loss": total["drafter_loss"] / max(1, total["drafter_steps"]),
                        "reclaimed": time_in("drafter") / max(1e-9, time_in("drafter", "idle")),  # share of the idle time
                        "preempted": max(0.0, last("drafter") - last(*ROLLOUT))}}  # seconds from the last response to the end of drafter training


class Table:
    """One line per step; below it the timelines of several workers and what speculation did."""

    head = (" step  reward  solved  flat |  length: mean  p50  p95  max   cut | tok/s |"
            "  rollout drafter    idle  update =  step s |    gap")

    def __init__(self, say):
        self.say, self.rows = say, 0

    def show(self, row, spans):
        if self.rows % 20 == 0:
            self.say(self.head)
        self.rows += 1
        n, s = row["length"], row["seconds"]
        self.say(f"{row['step']:5d}  {row['reward']:6.3f}  {row['solved']:6.2f}  {row['flat_groups']:4d} |  {n['mean']:12.0f} {n['p50']:4d} {n['p95']:4d} "
                 f"{n['max']:4d} {row['truncated']:5.1%} | {row['tokens_per_second']:5.0f} |{sum(s[state] for state in ROLLOUT):9.2f}{s['drafter']:8.2f}"
                 f"{s['idle']:8.2f}{s['update']:8.2f} ={s['step']:8.2f} |{row['gap_max']:7.0e}")
        if len(spans) > 1:
            for rank, mine in enumerate(spans):
                self.say(f"       worker {rank} |{gantt(mine, min(m[0][1] for m in spans), s['step'])}|")
        if row["skipped"]:
            self.say("       the gradient was not finite: the policy stays as it was")
        if "speculation" in row:
            a, d = row["speculation"], row["drafter"]
            self.say(f"       {a['tokens_per_round']:.2f} tokens per row and speculative round, k {a['k']:.1f}, {a['share']:.0%} of the rounds speculative"
                     + (f"; drafter: {d['steps']} steps, loss {d['loss']:.3f}, {d['reclaimed']:.0%} of the idle time used, stopped within {d['preempted'] * 1e3:.0f} ms" if d["steps"] else ""))


def gantt(spans, started, seconds, width=96):
    """A line of `width` characters: in each the state that held most of that moment, by its mark."""
    line = ""
    for i in range(width):
        a, b = started + seconds * i / width, started + seconds * (i + 1) / width
        share = {}
        for state, start, end in spans:
            share[state] = share.get(state, 0.0) + max(0.0, min(b, end) - max(a, start))
        line += STATES[max(share, key=share.get)][0] if share and max(share.values()) > 0 else " "
    return line


def trace(history):
    """history: for each step its number and each worker's spans -> JSON text in Chrome's trace format."""
    events = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"worker {rank}"}} for rank in range(len(history[-1][1]) if history else 0)]
    for step, spans in history:
        for rank, mine in enumerate(spans):
            events += [{"name": state, "ph": "X", "ts": round(start * 1e6), "dur": round((end - start) * 1e6), "pid": 0, "tid": rank, "args": {"step": step}}
                       for state, start, end in mine]
    return json.dumps({"traceEvents": events})


def pyplot():
    """matplotlib's, for files alone. Imported when the first picture is drawn: only rank 0 draws, at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_timeline(panels, path):
    """panels: title -> each worker's spans; drawn one below the other on the same scale."""
    plt = pyplot()
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 0.9 + 1.3 * len(panels)), sharex=True, squeeze=False)
    used = set()
    for axis, (title, spans) in zip(axes[:, 0], panels.items()):
        zero = min(mine[0][1] for mine in spans)
        for rank, mine in enumerate(spans):
            for state, start, end in mine:
                label = None if state in used else {"rollout": "plain rollout", "speculative": "speculative rollout", "drafter": "drafter training"}.get(state, state)
                used.add(state)
                axis.broken_barh([(start - zero, end - start)], (rank - 0.4, 0.8), color=STATES[state][1], label=label)
        axis.set(title=title, yticks=range(len(spans)), yticklabels=[f"worker {rank}" for rank in range(len(spans))], ylim=(len(spans) - 0.5, -0.5))
    axes[-1, 0].set_xlabel("seconds")
    figure.legend(loc="lower center", ncols=len(used), fontsize=8)
    figure.tight_layout(rect=(0, 0.25 / len(panels) ** 2 + 0.02, 1, 1))  # room for the legend
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show_samples(say, responses, tokenizer):
    ranked = sorted(responses, key=lambda r: (r.grade.strict, r.grade.lenient, -len(r.tokens)))
    for name, r in (("best", ranked[-1]), ("worst", ranked[0])):
        text = tokenizer.decode(r.prompt + r.tokens)
        say(f"  {name} ({len(r.tokens)} tokens, {'right' if r.grade.strict else 'wrong'}): {text if len(text) < 400 else text[:200] + ' ... ' + text[-200:]}")


def summarise(metrics, config):
    evals = [m for m in metrics if "eval" in m]
    steps = [m for m in metrics if "eval" not in m]
    total = {k: sum(m["seconds"][k] for m in steps) for k in steps[-1]["seconds"]} if steps else {"step": 0.0}
    text = f"{len(steps)} steps in {total['step']:.0f} s: " + ", ".join(
        f"{k} {v / max(1e-9, total['step']):.0%}" for k, v in total.items() if k != "step")
    if len(evals) > 1:
        a, b = evals[0], evals[-1]
        text += "\n" + "\n".join(f"held-out {k}: {a['eval'][k]:.3f} -> {b['eval'][k]:.3f} ({b['eval'][k] - a['eval'][k]:+.3f})" for k in a["eval"])
        text += f"\nmean length: {a['length']:.0f} -> {b['length']:.0f} tokens   ({a['problems']} problems x {a['samples']} samples, seed {config.seed})"
    text += f"\nin {config.out}: policy/ (a Hugging Face folder), metrics.jsonl, curves.png, timeline.png, trace.json (for ui.perfetto.dev), the last checkpoints"
    return {"evals": evals, "seconds": total, "text": text}


def model_card(metrics, config):
    """README.md of the policy's folder, from the run's own figures."""
    steps, evals = [m for m in metrics if "eval" not in m], [m for m in metrics if "eval" in m]
    results = [f"| {e['step']} | " + " | ".join(f"{v:.3f}" for v in e["eval"].values()) + f" | {e['length']:.0f} |" for e in evals]
    names = list(evals[0]["eval"]) if evals else []
    table = [f"| RL step | {' | '.join(names)} | mean length |", "| --- " * (len(names) + 2) + "|", *results,
             "", f"Held out: {evals[-1]['problems']} problems, {evals[-1]['samples']} samples each, temperature {config.temperature}, at most {config.max_new} tokens."] if evals else []
    drafted = [m["speculation"] for m in steps[-10:] if m.get("speculation", {}).get("share")]
    drafter = ["## Drafter", "", f"`drafter/` holds the one-layer EAGLE drafter that was trained along: {sum(d['tokens_per_round'] for d in drafted) / len(drafted):.2f} tokens per round at a mean draft "
               f"length of {sum(d['k'] for d in drafted) / len(drafted):.1f} in the last {len(drafted)} steps.", "", "    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)", "",
               "decodes with it (FOLDER: this one), at temperature 0 with the tokens of plain generation."] if drafted else []
    return "\n".join(["---", "library_name: transformers", "tags: [grpo, speculative-decoding]", "---", f"# {config.model}, trained on {config.task}", "",
                      f"{len(steps)} GRPO steps ({config.loss}) of {config.prompts} prompts x {config.samples} samples, learning rate {config.lr:g}, KL weight {config.kl:g}, seed {config.seed}; "
                      f"{sum(m['seconds']['step'] for m in steps):.0f} s. A normal Hugging Face folder.", "", *table, "", *drafter, ""])


def draw_curves(metrics, path, config):
    plt = pyplot()
    steps, evals = [m for m in metrics if "eval" not in m], [m for m in metrics if "eval" in m]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    x = [m["step"] for m in steps]
    axes[0].plot(x, [m["reward"] for m in steps], lw=1, color="0.6", label="reward (training)")
    for k in evals[0]["eval"] if evals else []:
        axes[0].plot([m["step"] for m in evals], [m["eval"][k] for m in evals], "o-", label=f"held-out {k}")
    axes[0].set(title=f"{config.task}, {config.loss}, seed {config.seed}", xlabel="RL step", ylim=(0, 1))
    axes[0].legend()
    for k in ("mean", "p50", "p95", "max"):
        axes[1].plot(x, [m["length"][k] for m in steps], label=k)
    axes[1].set(title="response length (tokens)", xlabel="RL step")
    axes[1].legend()
    names = [k for k in (steps[0]["seconds"] if steps else {}) if k != "step"]
    axes[2].stackplot(x, [[m["seconds"][k] for m in steps] for k in names], labels=names, colors=[STATES[n][1] for n in names])
    axes[2].set(title="seconds per step", xlabel="RL step")
    axes[2].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
