"""What the tables share: turns, prompts, the policy with its drafter, and the files of finished training runs."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from drafter import Drafter, EagleProposer, warm_start
from parts.cli import UserError, flag
from parts.devices import pick_device
from parts.engine.acceptance import Coupled
from parts.engine.interfaces import DraftPlan, Group, RoundReport, Sequence, Strategy
from parts.engine.model_loading import ACTOR_DTYPES, actor_dtype, cast_weights, load_model, stop_tokens
from parts.engine.ngram import NgramProposer
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import ROOT, find_folder
from parts.running.timers import Span
from rollout import Engine
from strategy import batch_bucket
from tasks import Countdown, encode_prompt

# ---------------------------------------------------------------- settings and results


@dataclass(frozen=True)
class Output:
    """Settings of all tables."""

    json: str = flag("", "also write the result to this file")


@dataclass(frozen=True)
class Settings(Output):
    """Settings of the tables that generate."""

    model: str = flag("base", "the policy: a folder or a hub name")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    actor_dtype: str = flag("auto", "weights that generate: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)
    seed: int = flag(0, "seed of the samples")
    max_new: int = flag(512, "longest response in tokens")


@dataclass(frozen=True)
class DrafterSettings(Settings):
    """Settings of the tables that draft."""

    drafter: str = flag("", "folder of a trained drafter; without it the model's own (model/drafter), else a new one")
    warm: float = flag(60.0, "seconds of training for a new drafter")


def rounds_flag():
    """The field `rounds` of a table that takes turns."""
    return flag(3, "turns of each party")


def threads_flag():
    """The field `threads` of a table that computes in this process."""
    return flag(torch.get_num_threads(), "threads that torch computes with")


class Result(NamedTuple):
    """What a table found."""

    ratio: float  # the headline
    rows: list[dict]  # for the table and for --json
    device: str  # that it was measured on: cpu or cuda
    remarks: str = ""  # lines below the table, for what the rows do not hold


def machine(device: str) -> dict:
    """What the figures were measured on: cpu, or cuda and which GPU."""
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


# ---------------------------------------------------------------- turns


class Speed(NamedTuple):
    """How a party did."""

    tokens_per_second: float  # median over the rounds
    tokens: int  # of its last turn


def now() -> float:
    """Seconds, when a GPU has done all that it was given to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(parties: dict[str, Callable[[], int]], rounds: int, title: str) -> dict[str, Speed]:
    """Each party in turn, `rounds` times. A party is called and returns the number of tokens that it made."""
    speeds: dict[str, list[float]] = {name: [] for name in parties}
    last_tokens = {}
    for _ in tqdm(range(rounds), desc=title, unit="round"):
        for name, party in parties.items():
            started = now()
            tokens = party()
            speeds[name].append(tokens / (now() - started))
            last_tokens[name] = tokens
    return {name: Speed(statistics.median(speeds[name]), last_tokens[name]) for name in parties}


# ---------------------------------------------------------------- prompts


def groups_for(tokenizer, batch: int, seed, split: str = "test") -> list[Group]:
    """`batch` rows of Countdown as in training, with 16 samples a prompt.

    A batch of 1 is eight prompts, one after the other in one slot, so that it lasts long enough to be timed. seed: a
    number or a tuple, which names the samples.
    """
    samples = min(16, batch)
    prompts = max(1, batch // 16) if batch > 1 else 8
    task = Countdown()
    groups = []
    for i in range(prompts):
        seeds = [sequence_seed(seed, i, k) for k in range(samples)]
        groups.append(Group(i, encode_prompt(task.problem(split, i), tokenizer), seeds))
    return groups


def room(groups: list[Group], max_new: int) -> int:
    """Tokens of the longest sequence that these groups may come to: see Engine.reserve."""
    return max(len(group.prompt) for group in groups) + max_new


# ---------------------------------------------------------------- policy, drafter, engine


class Policy(NamedTuple):
    """What rolls out."""

    model: torch.nn.Module
    tokenizer: object
    drafter: Drafter


def load(config: Settings) -> tuple:
    """The model, where and in which type the settings want it, and its tokenizer. Raises UserError."""
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model, device)
    return cast_weights(model, actor_dtype(config.actor_dtype, device)), tokenizer


def load_policy(config: DrafterSettings) -> Policy:
    """The policy with the drafter of --drafter, or with the model's own, or with one that is trained here.

    Raises UserError.
    """
    model, tokenizer = load(config)
    torch.manual_seed(config.seed)
    drafter = Drafter(model)
    own = Path(find_folder(config.model)) / "drafter"
    if config.drafter:
        drafter.load(config.drafter)
    elif own.exists():
        drafter.load(own)
    else:
        groups = groups_for(tokenizer, 1024, config.seed, "train")
        context = room(groups, config.max_new)
        engine = Engine(model, stop_tokens(model, tokenizer), slots=64, context=context, keep_hidden=True)
        warm_start(drafter, engine, groups, Sampling(max_new=config.max_new), config.warm, config.seed)
    return Policy(model, tokenizer, drafter)


def drafted_engine(policy: Policy, slots: int, rule=Coupled) -> Engine:
    """An engine with a learned and an n-gram drafter. rule: how drafts are accepted, see parts/accept.py."""
    drafters = {"eagle": EagleProposer(policy.drafter), "ngram": NgramProposer()}
    stop = stop_tokens(policy.model, policy.tokenizer)
    return Engine(policy.model, stop, slots=slots, proposers=drafters, rule=rule)


# ---------------------------------------------------------------- round times


@dataclass
class RoundTotals:
    """Sums over rounds of like batch sizes."""

    seconds: float = 0.0
    tokens: int = 0  # emitted by all rows
    rounds: int = 0
    rows: int = 0


class Watch(Strategy):
    """Another strategy's choices, with totals kept for each bucket of batch sizes. A round's seconds are whole, also
    on a GPU: the engine reads its tokens, and so waits for them, before it reports.
    """

    def __init__(self, inner: Strategy):
        super().__init__()
        self.inner = inner
        self.totals: dict[int, RoundTotals] = defaultdict(RoundTotals)  # by strategy.bucket of the rows

    def drafters_changed(self, methods) -> None:
        """As Strategy.begin."""
        self.inner.drafters_changed(methods)

    def choose(self, running: list[Sequence]) -> DraftPlan:
        """As Strategy.choose."""
        return self.inner.choose(running)

    def observe(self, report: RoundReport) -> None:
        """As Strategy.observe."""
        totals = self.totals[batch_bucket(report.batch_size)]
        totals.seconds += report.seconds
        totals.tokens += report.batch_size + sum(report.accepted)
        totals.rounds += 1
        totals.rows += report.batch_size
        self.inner.observe(report)


# ---------------------------------------------------------------- training runs


class Metrics(NamedTuple):
    """The rows of a run's metrics.jsonl."""

    steps: dict[int, dict]  # by step
    evaluations: dict[int, dict]  # held-out results, by step


def read_metrics(folder) -> Metrics:
    """Of the run in this folder. Raises UserError if there is none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: no metrics.jsonl, so there is no training run in this folder")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "eval" not in row}
    evaluations = {row["step"]: row for row in rows if "eval" in row}
    return Metrics(steps, evaluations)


def read_spans(folder) -> dict[int, list[list[Span]]]:
    """Step -> each worker's spans, from the run's trace.json, without what came before the step; times in seconds."""
    events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    steps: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))  # step, worker
    for event in events:
        if "step" in event["args"]:  # other events name the workers, or are of an evaluation or a checkpoint
            span = Span(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6, event["args"]["rows"])
            steps[event["args"]["step"]][event["tid"]].append(span)
    return {step: [workers[rank] for rank in sorted(workers)] for step, workers in steps.items()}


def device_of(folder) -> str:
    """cpu or cuda, whichever a run in this folder was made on; if it was to choose, what it would choose here."""
    settings = json.loads((Path(folder) / "config.json").read_text())
    return pick_device("cpu" if settings["device"] == "cpu" else "auto")


def worker_flags(config: Settings, workers: int) -> list:
    """Flags of tlt.py for so many workers as these settings want them. They share GPUs if there are fewer."""
    device = pick_device(config.device)
    flags = ["--device", device, "--actor-dtype", config.actor_dtype, "--workers", workers]
    gpus = torch.cuda.device_count() if device == "cuda" else workers
    return [*flags, "--workers-per-gpu", -(-workers // gpus)]


def tlt_command(flags: list) -> list[str]:
    """The command line that trains with these flags, from any working directory."""
    return [sys.executable, str(ROOT / "tlt.py"), *map(str, flags)]


def train(flags: list, out, **environment: str) -> Metrics:
    """Run tlt.py; unless the flags say otherwise without evaluations, with no checkpoint but the last. Of its output
    only those lines are shown that say what makes it slow.

    environment: variables beside this process's own. Raises UserError if it fails.
    """
    quiet = ["--out", out, "--eval-every", 0, "--show-every", 0, "--save-every", 1_000_000]
    command = tlt_command([*quiet, *flags])
    variables = {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    if done.returncode:
        raise UserError(f"tlt.py {' '.join(map(str, flags))} failed:\n{done.stdout[-2000:]}")
    for line in done.stdout.splitlines():
        if "slower for it" in line:  # rounds that are not replayed, a sampler that is not compiled
            tqdm.write(line)
    return read_metrics(out)
