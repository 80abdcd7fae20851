"""A real language model in the engine: whether it is right, what a round costs, and what speculation gains.

    greedy        20 prompts x 80 tokens against model.generate
    identity      128 responses x 100 tokens: chains of 2, 4, 8 and goodput against plain decoding
    generate      the plain engine against model.generate and its continuous batching, tokens per second
    training      a drafter from random weights: tokens per round on held-out prompts by seconds of training
    round         milliseconds of a round by part, for rows and draft lengths; a draft step over a plain round
    speculation   fixed lengths and goodput against plain rollout by batch size, and batch 1 at temperature 0.6
    update        peak memory of an update of 4,096 tokens, with and without --gradient-checkpointing
    step          one GRPO step, plain and TLT, phase by phase

`make smollm2` makes the model (runs/smollm2). Where two ways part at a token whose scores differ by less than 0.001,
which is what float32 kernels of other shapes round to, that is counted as a tie; any other parting is an error. (So
on a GPU `greedy` and `identity` want --actor-dtype float32.)

Ratio: speculative over plain rollout at batch 1, the best fixed length.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench.engine import Contest
from bench.engine import load_models as load_both
from bench.harness import (
    Result,
    Settings,
    load,
    now,
    room,
    rounds_flag,
    take_turns,
    threads_flag,
    train,
    worker_flags,
)
from bench.speculation import Rollout
from bench.step import Party, Steps, row_of
from drafter import Drafter, DrafterTrainer, EagleProposer, collect, fit
from parts.cli import UserError, check_at_least, flag
from parts.engine import acceptance as accept
from parts.engine.interfaces import DraftPlan, Group, Strategy
from parts.engine.model_loading import stop_tokens
from parts.engine.sampling import Sampling, all_token_ids, noise_for, sequence_seed, split_seeds
from parts.files import ROOT
from parts.training.drafter_data import FeatureBuffer, TokenCounts
from rollout import Engine
from strategy import Goodput, plans_for
from tasks import encode_prompt, make_task

PARTS = ("greedy", "identity", "generate", "training", "round", "speculation", "update", "step")
TIE = 1e-3  # of two scores


@dataclass(frozen=True)
class Config(Settings):
    """Settings of this table."""

    model: str = flag("runs/smollm2", "the policy: a folder or a hub name")
    parts: tuple[str, ...] = flag(PARTS, "what is measured", PARTS)
    task: str = flag("countdown-hard", "whose prompts: countdown-hard, gsm8k")
    data: str = flag("", "gsm8k: a local folder with train.jsonl and test.jsonl instead of the hub")
    max_new: int = flag(200, "longest response in tokens")
    batches: tuple[int, ...] = flag((1, 8, 32), "responses at once")
    drafter: str = flag("", "folder of a trained drafter; without it one is trained here")
    out: str = flag("runs/real", "folder for the drafter that is trained")
    prompts: int = flag(600, "prompts rolled out to train it, one response each")
    train: tuple[float, ...] = flag((110.0, 600.0), "seconds of training after which it is measured")
    rounds: int = rounds_flag()
    threads: int = threads_flag()

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rounds", "threads", "max_new", "prompts")
        if list(self.train) != sorted(self.train) or not self.train[0] > 0:
            raise UserError(f"--train {self.train}: seconds above 0, in ascending order")


class Bench:
    """The model and what every part needs of it."""

    def __init__(self, config: Config):
        self.config = config
        self.task = make_task(config.task, config.data)
        started = time.time()
        self.model, self.tokenizer = load(config)
        self.load_seconds = time.time() - started
        self.stop = stop_tokens(self.model, self.tokenizer)
        torch.manual_seed(config.seed)
        self.drafter = Drafter(self.model)
        if config.drafter:
            self.drafter.load(config.drafter)
        self.trained = bool(config.drafter)

    def groups(self, split: str, prompts: int, samples: int = 1) -> list[Group]:
        """The first prompts of a split."""
        result = []
        for i in range(prompts):
            seeds = [sequence_seed(self.config.seed, split, i, k) for k in range(samples)]
            result.append(Group(i, encode_prompt(self.task.problem(split, i), self.tokenizer), seeds))
        return result

    def engine(self, slots: int, groups: list[Group], max_new: int, **settings) -> Engine:
        """An engine with the drafter, with room for the groups."""
        drafters = {"eagle": EagleProposer(self.drafter)}
        engine = Engine(self.model, self.stop, slots, proposers=drafters, frozen=True, **settings)
        engine.reserve(room(groups, max_new))
        return engine

    @torch.no_grad()
    def margin(self, prompt: list[int], ours: list[int], theirs: list[int], sampling: Sampling, seed: int) -> float:
        """Where two responses part: how far apart the scores of the two tokens are there, by an ordinary forward."""
        pairs = zip(ours + [None], theirs + [None])
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        if place >= min(len(ours), len(theirs)):
            return torch.inf  # one is just longer
        ids = torch.tensor([prompt + ours[:place]], device=self.model.device)
        scores = self.model(input_ids=ids, use_cache=False).logits[:, -1].float() / (sampling.temperature or 1)
        seeds = split_seeds(torch.tensor([seed], device=ids.device))
        words = all_token_ids(scores.shape[1], ids.device)
        scores = scores + noise_for(sampling, seeds, torch.full_like(ids[:, :1], place), words).view(-1, 1).T
        return (scores[0, ours[place]] - scores[0, theirs[place]]).abs().item()

    def compare(self, groups: list[Group], ours: dict, theirs: dict, sampling: Sampling) -> dict:
        """Responses by (group, sample) -> how many are equal, parted at a tie, or wrong."""
        counts = {"of": len(ours), "same": 0, "ties": 0, "wrong": 0}
        for group in groups:
            for sample, seed in enumerate(group.seeds):
                a, b = ours[group.key, sample], theirs[group.key, sample]
                if a == b:
                    counts["same"] += 1
                    continue
                tie = self.margin(group.prompt, a, b, sampling, seed) < TIE
                counts["ties" if tie else "wrong"] += 1
        return counts


def tokens_of(engine: Engine, groups: list[Group], sampling: Sampling, strategy: Strategy | None = None) -> dict:
    """(group, sample) -> tokens of the response."""
    return {(r.group, r.sample): r.tokens for r in engine.generate(groups, sampling, strategy)}


def of_length(k: int) -> Strategy:
    """Always so many drafts."""
    return Strategy(DraftPlan("eagle", k)) if k else Strategy()


# ---------------------------------------------------------------- right?


def greedy(bench: Bench) -> list[dict]:
    """20 prompts x 80 tokens against `generate`, one by one."""
    groups = bench.groups("test", 20)
    sampling = Sampling(temperature=0.0, max_new=80)
    ours = tokens_of(bench.engine(20, groups, 80), groups, sampling)
    theirs = {}
    settings = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": 0, "eos_token_id": sorted(bench.stop)}
    bench.model.set_attn_implementation("sdpa")  # its own; the engine's knows no cache but the engine's
    for group in tqdm(groups, desc="generate", unit="prompt"):
        ids = torch.tensor([group.prompt], device=bench.model.device)
        out = bench.model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **settings)
        theirs[group.key, 0] = out[0, len(group.prompt) :].tolist()
    bench.model.set_attn_implementation("slots")
    row = {"name": "equal to generate", **bench.compare(groups, ours, theirs, sampling)}
    return [{"name": "accepted", "load_seconds": bench.load_seconds}, row]


def identity(bench: Bench) -> list[dict]:
    """Speculative against plain tokens."""
    groups = bench.groups("test", 32, samples=4)
    sampling = Sampling(max_new=100)
    engine = bench.engine(32, groups, 100)
    plain = tokens_of(engine, groups, sampling)
    strategies = {f"chain {k}": of_length(k) for k in (2, 4, 8)}
    strategies["goodput"] = Goodput(plans_for(["eagle"]))
    rows = []
    for name, strategy in tqdm(strategies.items(), desc="identity", unit="way"):
        tokens = tokens_of(engine, groups, sampling, strategy)
        rows.append({"name": name, **bench.compare(groups, tokens, plain, sampling)})
    return rows


# ---------------------------------------------------------------- fast?


def against_generate(bench: Bench) -> list[dict]:
    """Tokens per second, the engine's over those of the best of Hugging Face's. As in training, up to 16 samples to a
    prompt; batch 1 is eight prompts one after the other.
    """
    config = bench.config
    models = load_both(config)
    rows = []
    for i, batch in enumerate(config.batches):
        contest = Contest(config, models, batch, turns_before=i * config.rounds)
        contest.use(bench.groups("test", 8 if batch == 1 else -(-batch // 16), samples=min(16, batch)))
        parties = contest.parties()
        parties.pop("prompt lookup", None)
        speeds = take_turns(parties, config.rounds, f"generate, batch {batch}")
        row = {"name": f"batch {batch}"}
        row.update({name: speed.tokens_per_second for name, speed in speeds.items()})
        best = max(speed.tokens_per_second for name, speed in speeds.items() if name != "engine")
        rows.append({**row, "ratio": row["engine"] / best, "over_generate": row["engine"] / row["generate"]})
    return rows


def training(bench: Bench) -> list[dict]:
    """A drafter from random weights."""
    config = bench.config
    groups = bench.groups("train", config.prompts)
    held_out = bench.groups("test", 32)
    engine = bench.engine(64, groups + held_out, max(100, config.max_new), keep_hidden=True)
    engine.frozen = False
    buffer = FeatureBuffer(limit=4 << 30)
    words = TokenCounts(bench.model.config.vocab_size, bench.stop)
    started = time.time()
    collect(engine, groups, Sampling(max_new=config.max_new), buffer, words)
    tokens = sum(len(row.ids) - row.start for row in buffer.sequences)
    rows = [{"name": "data", "tokens": tokens, "seconds": time.time() - started}]
    bench.drafter.words = words.choose()
    for seconds in config.train:
        torch.manual_seed(config.seed)
        learner = Drafter(bench.model)
        learner.words = bench.drafter.words
        trainer = DrafterTrainer(learner, seed=config.seed)
        loss, agreement = fit(trainer, buffer, seconds)
        trainer.publish(bench.drafter)
        list(engine.generate(held_out, Sampling(max_new=100), of_length(4)))
        stats = engine.stats
        row = {"name": f"{seconds:.0f} s", "steps": trainer.steps, "loss": loss, "likeliest_right": agreement}
        row["tokens_per_round"] = stats.spec_tokens / stats.spec_sequence_rounds
        rows.append({**row, "by_depth": [round(right / tried, 2) for right, tried in counted(stats)]})
    bench.drafter.save(config.out)
    bench.trained = True
    return [*rows, *with_and_without(bench, engine, held_out)]


def with_and_without(bench: Bench, engine: Engine, groups: list[Group]) -> list[dict]:
    """The same drafter with its words and with all of them."""
    rows = []
    words = bench.drafter.words
    for name, chosen in (("its words", words), ("all words", None)):
        bench.drafter.words = chosen
        list(engine.generate(groups[:1], Sampling(max_new=100), of_length(4)))
        row = {"name": name, "words": bench.model.config.vocab_size if chosen is None else len(chosen)}
        row["draft_ms_at_batch_1"] = engine.stats.draft_seconds / engine.stats.rounds * 1e3
        list(engine.generate(groups, Sampling(max_new=100), of_length(4)))
        row["tokens_per_round"] = engine.stats.spec_tokens / engine.stats.spec_sequence_rounds
        rows.append(row)
    bench.drafter.words = words
    return rows


def counted(stats) -> list[tuple[int, int]]:
    """(right, tried) by depth."""
    return [(right, tried) for right, tried in zip(stats.accepted, stats.drafted) if tried]


class Stopwatch:
    """Stands in for a function and adds up the seconds that its calls take."""

    def __init__(self, function):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args, **settings):
        started = now()
        result = self.function(*args, **settings)
        self.seconds += now() - started
        return result


def rounds(bench: Bench) -> list[dict]:
    """Milliseconds of a round, and of its parts. Not replayed: nobody could see its parts then."""
    rows = []
    plain = {}
    for batch in bench.config.batches:
        for k in (0, 4, 8):
            groups = bench.groups("test", batch)
            engine = bench.engine(batch, groups, 60)
            engine.set_stop_tokens({-1})  # all rows live to the end
            engine.graphs = None
            sampling = Sampling(max_new=60)
            list(engine.generate(groups, Sampling(max_new=10), of_length(k)))  # memory is touched
            own = accept.sample, accept.sample_columns
            watches = accept.sample, accept.sample_columns = Stopwatch(own[0]), Stopwatch(own[1])
            list(engine.generate(groups, sampling, of_length(k)))
            accept.sample, accept.sample_columns = own
            stats = engine.stats
            whole = (stats.draft_seconds + stats.verify_seconds) / stats.rounds
            row = {"name": f"{batch} rows, k = {k}", "ms": whole * 1e3}
            row["sampling"] = sum(watch.seconds for watch in watches) / stats.rounds / whole
            if k:
                row["draft_ms"] = stats.draft_seconds / stats.rounds * 1e3
                row["draft_step_over_plain"] = row["draft_ms"] / k / plain[batch]
            else:
                plain[batch] = row["ms"]
            rows.append(row)
    return rows


def speculation(bench: Bench) -> list[dict]:
    """Fixed lengths and goodput over plain rollout."""
    config = bench.config
    rows = []
    for batch, temperature in [*((batch, 1.0) for batch in config.batches), (1, 0.6)]:
        groups = bench.groups("test", 4 if batch == 1 else batch)
        sampling = Sampling(temperature, max_new=config.max_new)
        engine = bench.engine(batch, groups, config.max_new)
        strategies = {"plain": Strategy(), **{f"chain {k}": of_length(k) for k in (1, 2, 3, 4, 6)}}
        strategies["goodput"] = Goodput(plans_for(["eagle"]))
        parties = {name: Rollout(engine, strategy, groups, sampling) for name, strategy in strategies.items()}
        for party in parties.values():
            party()  # the turn that does not count
        speeds = take_turns(parties, config.rounds, f"speculation, batch {batch}, temperature {temperature}")
        plain = speeds["plain"].tokens_per_second
        best = max(speed.tokens_per_second for name, speed in speeds.items() if name != "goodput")
        for name, speed in speeds.items():
            row = {"name": f"batch {batch}, T {temperature}: {name}", "batch": batch, "temperature": temperature}
            row.update(mode=name, tokens_per_second=speed.tokens_per_second, ratio=speed.tokens_per_second / plain)
            stats = parties[name].stats
            row["tokens_per_round"] = stats.spec_tokens / max(1, stats.spec_sequence_rounds)
            if name == "goodput":
                row["over_the_best"] = speed.tokens_per_second / best
            rows.append(row)
    return rows


# ---------------------------------------------------------------- learning


def update(bench: Bench) -> list[dict]:
    """Each way in a process of its own."""
    rows = []
    ways = {
        "all logits at once": ["--whole"],
        "in slices": [],
        "in slices, --gradient-checkpointing": ["--gradient-checkpointing"],
    }
    for name, flags in tqdm(ways.items(), desc="update", unit="way"):
        settings = ["--model", bench.config.model, "--device", bench.config.device]
        command = [sys.executable, "-m", "bench.memory", *settings, *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:])} failed: {done.stderr[-500:]}")
        rows.append({"name": name, **json.loads(done.stdout.splitlines()[-1])})
    for row in rows:
        row["ratio"] = row["megabytes"] / rows[0]["megabytes"]
    return rows


def step(bench: Bench) -> list[dict]:
    """The second and third step of a run with 4 prompts x 8 samples and 2 workers, seconds by phase."""
    config = bench.config
    flags = ["--model", config.model, "--task", config.task, "--data", config.data]
    flags += [*worker_flags(config, 2), "--prompts", 4, "--samples", 8, "--max-new", config.max_new, "--steps", 3]
    flags += ["--lr", 1e-6, "--seed", config.seed]
    parties = {
        "plain": ["--drafter", "off", "--strategy", "off"],
        "TLT": ["--drafter-from", config.drafter or config.out],
    }
    rows = []
    for name, more in tqdm(parties.items(), desc="step", unit="party"):
        with tempfile.TemporaryDirectory() as out:
            steps = train([*flags, *more], out).steps
        kept = Steps([steps[i]["seconds"] for i in (2, 3)], [steps[i]["digest"] for i in (2, 3)])
        rows.append({"name": name, **row_of(Party(name, 2, tuple(more)), kept)})
    return [*rows, {"name": "plain / TLT", "rollout": share(rows, "rollout"), "step": share(rows, "step")}]


def share(rows: list[dict], phase: str) -> float:
    """Of plain over TLT; the last to finish decides, so time that is waited counts with the rollout."""
    plain, tlt = rows
    waits = ("rollout", "drafter", "idle") if phase == "rollout" else (phase,)
    return sum(plain[name] for name in waits) / sum(tlt[name] for name in waits)


MEASURES = {
    "greedy": greedy,
    "identity": identity,
    "generate": against_generate,
    "training": training,
    "round": rounds,
    "speculation": speculation,
    "update": update,
    "step": step,
}


def measure(config: Config) -> Result:
    """One or more rows for each part."""
    torch.set_num_threads(config.threads)
    bench = Bench(config)
    rows = []
    # drafts of a random drafter would say nothing, so it learns first
    order = sorted(config.parts, key=lambda part: (part not in ("greedy", "generate", "training"), PARTS.index(part)))
    if not bench.trained and "training" not in order:
        raise UserError("--parts: without `training` a --drafter is needed")
    for part in order:
        if part == "training" and config.drafter:
            continue
        rows += [{"part": part, **row} for row in MEASURES[part](bench)]
        print(f"\n{table([row for row in rows if row['part'] == part])}", flush=True)
    alone = [row for row in rows if row.get("batch") == 1 and row["temperature"] == 1]
    ratios = [row["ratio"] for row in alone if row["mode"].startswith("chain")]
    return Result(max(ratios, default=1.0), rows, bench.model.device.type)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = []
    for row in rows:
        cells = []
        for key, value in row.items():
            if key not in ("part", "name", "batch", "temperature", "mode"):
                cells.append(f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
        lines.append(f"{row['part']:>11}  {row['name']:<34} " + "   ".join(cells))
    return "\n".join(lines)
