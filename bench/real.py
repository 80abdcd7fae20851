"""A real language model in the engine: whether its tokens are right, the time of a round, and the gain of speculation.

    greedy        20 prompts x 80 tokens against model.generate
    identity      128 responses x 100 tokens: chains of 2, 4, 8 and goodput against plain decoding
    generate      the plain engine against model.generate and its continuous batching, tokens per second
    training      a drafter from random weights: tokens per round on held-out prompts by seconds of training
    round         milliseconds of a round by batch size and draft length; a draft step over a plain round
    speculation   fixed lengths and goodput against plain rollout by batch size, and batch 1 at temperature 0.6
    update        peak memory of an update of 4,096 tokens, with and without --gradient-checkpointing
    update-speed  seconds of an update: all weights or LoRA, float32 or bfloat16, each prompt computed once or not
    step          one GRPO step, plain and TLT, phase by phase

`make bench-real` makes the model, SmolLM2-135M taught to search (base/searcher.py). Ties are counted as in identity.py
(so on a GPU `greedy` and `identity` need --actor-dtype float32).

Ratio: speculative over plain rollout at batch 1, the best fixed length.
"""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

import train_grpo
from bench import engine as engine_table
from bench import step as step_table
from bench.harness import (
    Result,
    Settings,
    batch_groups,
    by_name,
    fixed,
    load,
    make_engine,
    make_groups,
    now,
    text_table,
    tokens_per_round,
)
from bench.identity import compare as compare_tokens
from bench.identity import differences
from bench.speculation import compare as compare_speeds
from drafter import Drafter, DrafterTrainer, collect, fit
from parts.cli import UserError, flag
from parts.engine import acceptance
from parts.engine.interfaces import Group
from parts.engine.sampling import Sampling
from parts.files import ROOT
from parts.training import logprobs
from parts.training.drafter_data import FeatureBuffer, TokenCounts
from parts.training.layouts import trainable_parameters
from rollout import Engine
from strategy import Goodput, plans_for
from tasks import make_task

PARTS = ("greedy", "identity", "generate", "training", "round", "speculation", "update", "update-speed", "step")
COLUMNS = {}


@dataclass(frozen=True)
class Config(Settings):
    model: str = flag("runs/searcher", "the policy: a folder or a hub name")
    parts: tuple[str, ...] = flag(PARTS, "what is measured", PARTS)
    task: str = flag("countdown-3", "whose prompts: countdown-3, countdown-hard, gsm8k")
    data: str = flag("", "gsm8k: a local folder with train.jsonl and test.jsonl instead of the hub")
    max_new: int = flag(640, "longest response in tokens")
    batches: tuple[int, ...] = flag((1, 8, 32), "responses at once")
    drafter: str = flag("", "folder of a trained drafter; without it one is trained here")
    out: str = flag("runs/real", "folder for the drafter that is trained")
    prompts: int = flag(600, "prompts rolled out to train it, one response each")
    train: tuple[float, ...] = flag((110.0, 600.0), "seconds of training after which it is measured")
    rounds: int = flag(3, "turns of each party")

    def __post_init__(self):
        super().__post_init__()
        if list(self.train) != sorted(self.train) or not self.train[0] > 0:
            raise UserError(f"--train {self.train}: seconds above 0, in ascending order")


class Bench:
    """The model and what every part needs of it."""

    def __init__(self, config: Config):
        self.config = config
        policy = load(config)
        torch.manual_seed(config.seed)
        self.policy = policy._replace(drafter=Drafter(policy.model))
        if config.drafter:
            self.policy.drafter.load(config.drafter)
        task = make_task(config.task, config.data)
        self.groups = partial(make_groups, policy.tokenizer, seed=config.seed, task=task)
        self.batch_groups = partial(batch_groups, policy.tokenizer, seed=config.seed, task=task)

    def engine(self, slots: int, groups: list[Group], max_new: int, **settings) -> Engine:
        """Return an engine with the drafter and memory for the groups."""
        return make_engine(self.policy, slots, groups, max_new, frozen=True, **settings)


# ---------------------------------------------------------------- right?


def greedy(bench: Bench) -> list[dict]:
    """Compare 20 prompts x 80 tokens with `generate`, one by one."""
    groups = bench.groups(20, 1)
    sampling = Sampling(temperature=0.0, max_new=80)
    policy, model = bench.policy, bench.policy.model
    ours = by_name(bench.engine(20, groups, 80).generate(groups, sampling))
    theirs = {}
    settings = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": 0, "eos_token_id": sorted(policy.stop)}
    model.set_attn_implementation("sdpa")  # its own; the engine's knows no cache but the engine's
    for group in tqdm(groups, desc="generate", unit="prompt"):
        ids = torch.tensor([group.prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **settings)
        theirs[group.key, 0] = out[0, len(group.prompt) :].tolist()
    model.set_attn_implementation("slots")
    return [{"mode": "as generate", **differences(policy, groups, ours, theirs, sampling)}]


def identity(bench: Bench) -> list[dict]:
    """Compare speculative with plain tokens."""
    groups = bench.groups(32, 4)
    engine = bench.engine(32, groups, 100)
    ways = {f"chain {k}": (engine, fixed(k)) for k in (2, 4, 8)}
    ways["goodput"] = (engine, Goodput(plans_for(["eagle"])))
    return compare_tokens(bench.policy, ways, groups, Sampling(max_new=100), "identity")


# ---------------------------------------------------------------- fast?


def generate(bench: Bench) -> list[dict]:
    """Compare tokens per second with those of Hugging Face, see engine.py."""
    config = bench.config
    stock = engine_table.load_stock(config, bench.policy)
    rows = []
    for batch in config.batches:
        contest = engine_table.Contest(config, bench.policy, stock, batch, bench.batch_groups(batch))
        rows.append(contest.row(config.rounds, without=("prompt lookup",)))
    return rows


def training(bench: Bench) -> list[dict]:
    """Train a drafter from random weights."""
    config, drafter = bench.config, bench.policy.drafter
    groups = bench.groups(config.prompts, 1, split="train")
    held_out = bench.groups(32, 1)
    engine = bench.engine(64, groups + held_out, max(100, config.max_new))
    engine.frozen = False
    buffer = FeatureBuffer(limit=4 << 30)
    counts = TokenCounts(bench.policy.model.config.vocab_size, bench.policy.stop)
    started = now()
    collect(engine, groups, Sampling(max_new=config.max_new), buffer, counts)
    tokens = sum(len(sequence.ids) - sequence.start for sequence in buffer.sequences)
    rows = [{"name": "data", "tokens": tokens, "seconds": now() - started}]
    drafter.draft_vocab = counts.choose()
    for seconds in config.train:
        torch.manual_seed(config.seed)
        learner = Drafter(bench.policy.model)
        learner.draft_vocab = drafter.draft_vocab
        trainer = DrafterTrainer(learner, seed=config.seed)
        loss, agreement = fit(trainer, buffer, seconds)
        trainer.publish(drafter)
        list(engine.generate(held_out, Sampling(max_new=100), fixed(4)))
        stats = engine.stats
        row = {"name": f"{seconds:.0f} s", "steps": trainer.steps, "loss": loss, "likeliest_right": agreement}
        row["tokens_per_round"] = tokens_per_round(stats)
        rows.append({**row, "by_depth": [a / d for a, d in zip(stats.accepted, stats.drafted) if d]})
    drafter.save(config.out)
    return rows


class Stopwatch:
    """Stands in for a function and adds up the seconds of its calls."""

    def __init__(self, function):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args, **settings):
        started = now()
        result = self.function(*args, **settings)
        self.seconds += now() - started
        return result


def rounds(bench: Bench) -> list[dict]:
    """Measure a round and its parts. It is not replayed: its parts could not be seen then."""
    rows = []
    for batch in bench.config.batches:
        groups = bench.groups(batch, 1)
        engine = bench.engine(batch, groups, 60)
        engine.set_stop_tokens({-1})  # all sequences run to the end
        engine.graphs = None
        plain = 0.0
        for k in (0, 4, 8):
            list(engine.generate(groups, Sampling(max_new=10), fixed(k)))  # memory is touched
            own = acceptance.sample, acceptance.sample_columns
            watches = acceptance.sample, acceptance.sample_columns = Stopwatch(own[0]), Stopwatch(own[1])
            list(engine.generate(groups, Sampling(max_new=60), fixed(k)))
            acceptance.sample, acceptance.sample_columns = own
            stats = engine.stats
            whole = (stats.draft_seconds + stats.verify_seconds) / stats.rounds
            draft = stats.draft_seconds / stats.rounds if k else None
            plain = plain if k else whole
            row = {"name": f"batch {batch}, k = {k}", "ms": whole * 1e3}
            row["sampling"] = sum(watch.seconds for watch in watches) / stats.rounds / whole
            row["draft_ms"] = draft and draft * 1e3
            rows.append({**row, "draft_step_over_plain": draft and draft / k / plain})
    return rows


def speculation(bench: Bench) -> list[dict]:
    """Compare fixed lengths and goodput with plain rollout."""
    config = bench.config
    rows = []
    for batch, temperature in [*((batch, 1.0) for batch in config.batches), (1, 0.6)]:
        groups = bench.groups(4 if batch == 1 else batch, 1)
        sampling = Sampling(temperature, max_new=config.max_new)
        engine = bench.engine(batch, groups, config.max_new)
        ways = {"plain": (engine, fixed(0)), **{f"chain {k}": (engine, fixed(k)) for k in (1, 2, 3, 4, 6)}}
        ways["goodput"] = (engine, Goodput(plans_for(["eagle"])))
        title = f"speculation, batch {batch}, temperature {temperature}"
        compared = compare_speeds(ways, groups, sampling, config.rounds, title)
        best = max(row["ratio"] for row in compared[:-1])
        for row in compared:
            over_best = row["ratio"] / best if row["mode"] == "goodput" else None
            rows.append({"batch": batch, "temperature": temperature, **row, "over_the_best": over_best})
    return rows


# ---------------------------------------------------------------- learning


def update(bench: Bench) -> list[dict]:
    """Measure the memory of an update, each way in a process of its own."""
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
    return [{**row, "ratio": row["megabytes"] / rows[0]["megabytes"]} for row in rows]


UPDATES = {  # way -> settings of train_grpo.py; the last one is what `make real` does on a CPU
    "all weights, float32, whole sequences": {},
    "all weights, bfloat16, whole sequences": {"bf16": True},
    "all weights, bfloat16, prompts once": {"bf16": True},
    "LoRA, float32, whole sequences": {"lora_rank": 16},
    "LoRA, bfloat16, whole sequences": {"lora_rank": 16, "bf16": True},
    "LoRA, bfloat16, prompts once": {"lora_rank": 16, "bf16": True},
}
NEVER = 2.0  # for logprobs.WORTH_SHARING: a share that prompts cannot have


def update_speed(bench: Bench) -> list[dict]:
    """Measure one update on the same responses each way: 3 prompts x 8 responses, half of them right."""
    policy = bench.policy
    groups = bench.groups(3, 8, split="train")
    engine = bench.engine(24, groups, bench.config.max_new)
    responses = sorted(
        engine.generate(groups, Sampling(max_new=bench.config.max_new)), key=lambda r: (r.group, r.sample)
    )
    tokens = sum(len(r.tokens) for r in responses)
    advantage = [1.0 if i % 2 else -1.0 for i in range(len(responses))]
    worth = logprobs.WORTH_SHARING
    rows = []
    for way, settings in tqdm(UPDATES.items(), desc="update", unit="way"):
        config = train_grpo.Config(device=policy.model.device.type, prompts=3, samples=8, **settings)
        worker = train_grpo.Worker(config)
        model, _ = worker.layout.place(copy.deepcopy(policy.model).requires_grad_(True), config.device)
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.0, fused=True)
        logprobs.WORTH_SHARING = NEVER if "whole" in way else worth
        seconds = []
        for turn in range(2):  # the first allocates
            started = now()
            train_grpo.update(model, None, optimizer, responses, advantage, turn, config, worker)
            seconds.append(now() - started)
        logprobs.WORTH_SHARING = worth
        rows.append({"name": way, "seconds": seconds[-1], "response_tokens_per_s": tokens / seconds[-1]})
    return [{**row, "ratio": rows[0]["seconds"] / row["seconds"]} for row in rows]


def step(bench: Bench) -> list[dict]:
    """Measure the second and third step of a run with 4 prompts x 8 samples and 2 workers, by phase."""
    config = bench.config
    common = {name: getattr(config, name) for name in ("model", "device", "actor_dtype", "seed", "max_new")}
    drafter = config.drafter or config.out
    sizes = {"prompts": 4, "samples": 8, "steps": 3, "rounds": 1, "lora_rank": 16}
    settings = step_table.Config(**common, **sizes, task=config.task, drafter=drafter)
    flags = ("--data", config.data, "--lr", 1e-5)
    rows = step_table.compare(settings, step_table.parties_of(settings, (2,), flags))
    plain, tlt = rows
    # the last worker to finish decides, so time that is waited counts with the rollout
    rollout = [sum(row[phase] for phase in ("rollout", "drafter", "idle")) for row in rows]
    return [*rows, {"party": "plain / TLT", "rollout": rollout[0] / rollout[1], "step": plain["step"] / tlt["step"]}]


FUNCTIONS = dict(zip(PARTS, (greedy, identity, generate, training, rounds, speculation, update, update_speed, step)))


def measure(config: Config) -> Result:
    """Return the rows of all parts; each part's are printed as it ends."""
    # draft tokens of a random drafter would show nothing, so it learns first
    order = sorted(config.parts, key=lambda part: (part not in ("greedy", "generate", "training"), PARTS.index(part)))
    if not config.drafter and "training" not in order:
        raise UserError("--parts: without `training` a --drafter is needed")
    bench = Bench(config)
    rows = []
    for part in order:
        if part == "training" and config.drafter:
            continue
        found = [{"part": part, **row} for row in FUNCTIONS[part](bench)]
        tqdm.write(text_table(found, COLUMNS))
        rows += found
    alone = [row for row in rows if row["part"] == "speculation" and row["batch"] == row["temperature"] == 1]
    ratios = [row["ratio"] for row in alone if row["mode"].startswith("chain")]
    return Result(max(ratios, default=1.0), rows, bench.policy.model.device.type)
