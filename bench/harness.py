"""What the tables share: settings, results as text and pictures, prompts and engines, turns, training runs."""

import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from drafter import Drafter, EagleProposer, warm_start
from parts.cli import UserError, check_at_least, flag
from parts.devices import pick_device
from parts.engine.interfaces import DraftPlan, Group, Response, RoundReport, Sequence, Stats, Strategy
from parts.engine.model_loading import ACTOR_DTYPES, load_actor, stop_tokens
from parts.engine.ngram import NgramProposer
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import ROOT, find_folder
from parts.running.pictures import pyplot, save_picture
from rollout import Engine
from tasks import Countdown, encode_prompt

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Output:
    """Settings of all tables."""

    json: str = flag("", "also write the result to this file")

    def __post_init__(self):
        """Raises UserError for a count below 1, or below 0 where 0 is the default."""
        for f in fields(self):
            if type(f.default) is int and f.name != "seed":
                check_at_least(self, min(1, f.default), f.name)


@dataclass(frozen=True)
class PolicySettings(Output):
    """Settings of the tables that run a policy."""

    model: str = flag("base", "the policy: a folder or a hub name")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    actor_dtype: str = flag("auto", "weights that generate: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)
    seed: int = flag(0, "seed of the samples")
    max_new: int = flag(512, "longest response in tokens")


@dataclass(frozen=True)
class Settings(PolicySettings):
    """Settings of the tables that generate in this process."""

    threads: int = flag(torch.get_num_threads(), "threads that torch computes with")


@dataclass(frozen=True)
class DrafterSettings(Settings):
    """Settings of the tables that draft."""

    drafter: str = flag("", "folder of a trained drafter; without it the model's own (model/drafter), else a new one")
    warm: float = flag(60.0, "seconds of training for a new drafter")


# ---------------------------------------------------------------- results


class Result(NamedTuple):
    """What a table found."""

    ratio: float  # the headline
    rows: list[dict]  # for the text and for --json
    device: str  # that it was measured on: cpu or cuda
    remarks: str = ""  # lines below the table


def machine(device: str) -> dict:
    """Return what the figures were measured on. device: cpu or cuda."""
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def cell(value, form: str = "") -> str:
    """Return a value as text. A dictionary holds the mean of several runs, with its interval or the range."""
    if value is None:
        return ""
    if isinstance(value, dict):
        mean = cell(value["mean"], form)
        if "half" in value:
            return f"{mean} +- {cell(value['half'], form)}"
        return f"{mean} ({cell(value['low'], form)} - {cell(value['high'], form)})"
    if isinstance(value, list):
        return " ".join(cell(x, form) for x in value)
    if isinstance(value, float) and not form:
        form = ".0f" if abs(value) >= 1000 else ".3g"
    return f"{value:{form}}"


def text_table(rows: list[dict], columns: dict[str, str]) -> str:
    """Return the rows as text. columns: key -> format (empty: three digits).

    Rows without the last column are left out; what they hold stands in the table's remarks. Without columns all keys
    are shown, and a row with other keys than the one above begins a new table.
    """
    if not columns:
        tables = [list(part) for _, part in itertools.groupby(rows, key=list)]
        return "\n\n".join(text_table(part, dict.fromkeys(part[0], "")) for part in tables)
    shown = [row for row in rows if list(columns)[-1] in row]
    lines = [[key.replace("_", " ") for key in columns]]
    for row in shown:
        lines.append([cell(row.get(key), form) for key, form in columns.items()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [str.ljust if isinstance(shown[0].get(key), str) else str.rjust for key in columns]
    texts = []
    for line in lines:
        texts.append("  ".join(align(text, width) for align, text, width in zip(aligned, line, widths)).rstrip())
    return "\n".join(texts)


@contextlib.contextmanager
def picture(path: Path, titles: list[str]) -> Iterator[list]:
    """Yield axes to draw on, one for each title. After the block the picture is in the file."""
    figure, axes = pyplot().subplots(1, len(titles), figsize=(11, 3.6), squeeze=False)
    yield list(axes[0])
    for axis, title in zip(axes[0], titles):
        axis.set(title=title)
        axis.legend(fontsize=7)
    figure.tight_layout()
    save_picture(figure, path)


# ---------------------------------------------------------------- time


def now() -> float:
    """Return the seconds when a GPU has done everything that it was given to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(parties: dict[str, Callable[[], int]], rounds: int, title: str) -> dict[str, float]:
    """Call each party in turn, `rounds` times -> the median of its tokens per second. A party returns its tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in parties}
    for _ in tqdm(range(rounds), desc=title, unit="round"):
        for name, party in parties.items():
            started = now()
            tokens = party()
            speeds[name].append(tokens / (now() - started))
    return {name: statistics.median(values) for name, values in speeds.items()}


def seconds_per_call(function: Callable[[], object], calls: int = 1, warmup: bool = False) -> float:
    """Return the mean seconds of some calls. warmup: a first call does not count."""
    if warmup:
        function()
    started = now()
    for _ in range(calls):
        function()
    return (now() - started) / calls


class Watch(Strategy):
    """Passes on another strategy's choices and keeps the reports of all rounds. Their seconds are right on a GPU, too:
    the engine waits for its tokens before it reports.
    """

    def __init__(self, inner: Strategy):
        super().__init__()
        self.inner = inner
        self.reports: list[RoundReport] = []

    def choose(self, running: list[Sequence]) -> DraftPlan:
        return self.inner.choose(running)

    def observe(self, report: RoundReport) -> None:
        self.reports.append(report)
        self.inner.observe(report)


# ---------------------------------------------------------------- prompts


def make_groups(tokenizer, prompts: int, samples: int, seed, split: str = "test", task=None) -> list[Group]:
    """Return the first prompts of a task (default: Countdown). seed: a number or a tuple, for the samples."""
    task = task or Countdown()
    groups = []
    for i in range(prompts):
        problem = task.problem(split, i)
        seeds = [sequence_seed(seed, i, k) for k in range(samples)]
        groups.append(Group(i, encode_prompt(problem, tokenizer), seeds, problem=problem))
    return groups


def batch_groups(tokenizer, batch: int, seed, split: str = "test", task=None) -> list[Group]:
    """Return groups of `batch` responses, up to 16 to a prompt as in training. A batch of 1 is eight prompts, one after
    the other in one slot, so that it lasts long enough to be timed.
    """
    prompts = -(-batch // 16) if batch > 1 else 8
    return make_groups(tokenizer, prompts, min(16, batch), seed, split, task)


def longest_sequence(groups: list[Group], max_new: int) -> int:
    """Return the tokens of the longest sequence that these groups may come to: see Engine.reserve."""
    return max(len(group.prompt) for group in groups) + max_new


# ---------------------------------------------------------------- policy, drafter, engine


class Policy(NamedTuple):
    """What generates."""

    model: torch.nn.Module
    tokenizer: object
    drafter: Drafter | None = None

    @property
    def stop(self) -> set[int]:
        """Return the token ids that end a response."""
        return stop_tokens(self.model, self.tokenizer)


def load(config: Settings) -> Policy:
    """Return the policy without a drafter, on the device and in the type that the settings name. Raises UserError."""
    torch.set_num_threads(config.threads)
    return Policy(*load_actor(config.model, pick_device(config.device), config.actor_dtype))


def own_drafter(model: str) -> Path | None:
    """Return the folder of the drafter that a model's folder holds, if any."""
    folder = Path(find_folder(model)) / "drafter"
    return folder if folder.exists() else None


def load_policy(config: DrafterSettings) -> Policy:
    """Return the policy with the drafter of --drafter, or with the model's own, or with one that is trained here.
    Raises UserError.
    """
    policy = load(config)
    torch.manual_seed(config.seed)
    drafter = Drafter(policy.model)
    folder = config.drafter or own_drafter(config.model)
    if folder:
        drafter.load(folder)
    else:
        groups = batch_groups(policy.tokenizer, 1024, config.seed, "train")
        engine = make_engine(policy, 64, groups, config.max_new, keep_hidden=True)
        warm_start(drafter, engine, groups, Sampling(max_new=config.max_new), config.warm, config.seed)
    return policy._replace(drafter=drafter)


def make_engine(policy: Policy, slots: int, groups: list[Group], max_new: int, **settings) -> Engine:
    """Return an engine with memory for these groups; with an EAGLE and an n-gram proposer if there is a drafter.
    settings: further ones of Engine.
    """
    proposers = {"eagle": EagleProposer(policy.drafter), "ngram": NgramProposer()} if policy.drafter else {}
    context = longest_sequence(groups, max_new)
    return Engine(policy.model, policy.stop, slots, context, proposers=proposers, **settings)


def fixed(k: int, method: str = "eagle") -> Strategy:
    """Return the strategy that always drafts k tokens; 0: plain decoding."""
    return Strategy(DraftPlan(method, k) if k else DraftPlan())


def by_name(responses: Iterable[Response]) -> dict[tuple, Response]:
    """Return the responses by (group, sample)."""
    return {(response.group, response.sample): response for response in responses}


def same_tokens(responses: dict[tuple, Response], others: dict[tuple, Response]) -> list[tuple]:
    """Return the names of the responses that have the same tokens in both."""
    return [name for name, response in responses.items() if response.tokens == others[name].tokens]


def tokens_per_round(stats: Stats) -> float:
    """Return the tokens of a sequence in a speculative round."""
    return stats.spec_tokens / max(1, stats.spec_sequence_rounds)


# ---------------------------------------------------------------- training runs


class Metrics(NamedTuple):
    """The rows of a run's metrics.jsonl."""

    steps: dict[int, dict]  # by step
    evaluations: dict[int, dict]  # held-out results, by step


def read_metrics(folder) -> Metrics:
    """Read the metrics of the run in this folder. Raises UserError if there is none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: no metrics.jsonl, so there is no training run in this folder")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "eval" not in row}
    evaluations = {row["step"]: row for row in rows if "eval" in row}
    return Metrics(steps, evaluations)


def device_of(folder) -> str:
    """Return the device of the run in this folder; if it was to choose, what it would choose here."""
    settings = json.loads((Path(folder) / "config.json").read_text())
    return pick_device("cpu" if settings["device"] == "cpu" else "auto")


def worker_flags(config: PolicySettings, workers: int) -> list:
    """Return the flags of tlt.py for so many workers. They share GPUs if there are fewer."""
    device = pick_device(config.device)
    flags = ["--device", device, "--actor-dtype", config.actor_dtype, "--workers", workers]
    gpus = torch.cuda.device_count() if device == "cuda" else workers
    return [*flags, "--workers-per-gpu", -(-workers // gpus)]


def tlt_command(flags: list) -> list[str]:
    """Return the command line that trains with these flags, from any working directory."""
    return [sys.executable, str(ROOT / "tlt.py"), *map(str, flags)]


def train(flags: list, out, **environment: str) -> Metrics:
    """Run tlt.py; unless the flags say otherwise, without evaluations and with no checkpoint but the last. Of its
    output, only the lines that explain a slow run are shown.

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
