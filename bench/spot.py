"""What drafter training on one core costs a rollout on another, and what training costs by itself. On GPUs: on one GPU
and on another; if there is but one, on the same.

    alone, beside training   rollouts of 8 rows on one core, while a process on another core trains the drafter, or is
                             stopped, in turns: tokens per second
    training                 what that process does meanwhile: steps per second, of 512 tokens
    packing                  drafter training on packed and on padded batches, in tokens that teach per second
    saving                   seconds that saving takes the worker: policy and optimizer; the drafter alone

Ratio: rollout speed beside training over speed alone.
"""

import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.harness import (
    DrafterSettings,
    Policy,
    Result,
    drafted_engine,
    groups_for,
    load_policy,
    now,
    room,
    rounds_flag,
    take_turns,
)
from drafter import Drafter, DrafterTrainer
from parts.cli import UserError, check_at_least
from parts.engine.interfaces import DraftPlan, Group, Response, Strategy
from parts.engine.sampling import Sampling
from parts.running import checkpoints
from parts.training.drafter_data import FeatureBuffer

ROWS = 8
ROLLOUTS = 4  # in a turn
TURNS = 5  # in each of --rounds


@dataclass(frozen=True)
class Config(DrafterSettings):
    """Settings of this table."""

    rounds: int = rounds_flag()

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rounds", "max_new")


# ---------------------------------------------------------------- rollout beside training


def train_forever(config: Config, ready, steps) -> None:
    """The process beside the rollout. ready: an event, set when training begins; steps: a counter of training steps."""
    torch.set_num_threads(1)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(1)
    policy = load_policy(config)
    engine = drafted_engine(policy, 16)
    trainer = DrafterTrainer(policy.drafter)
    buffer = FeatureBuffer()
    groups = groups_for(policy.tokenizer, 64, config.seed + 1)
    engine.reserve(room(groups, config.max_new))
    for response in engine.generate(groups, Sampling(max_new=config.max_new)):
        buffer.add(response)
    ready.set()
    while True:
        trainer.step(buffer)
        steps.value += 1


class Neighbour:
    """The process that trains: started, stopped and set going again, ended."""

    def __init__(self, config: Config):
        context = torch.multiprocessing.get_context("spawn")
        self.ready = context.Event()
        self.steps = context.Value("l", 0)
        arguments = (config, self.ready, self.steps)
        self.process = context.Process(target=train_forever, args=arguments, daemon=True)

    def start(self) -> None:
        """Until it trains. Raises UserError if it dies."""
        self.process.start()
        while not self.ready.wait(1):
            if not self.process.is_alive():
                raise UserError("the training process died; its message is above")

    def send(self, number: int) -> None:
        """signal.SIGSTOP or signal.SIGCONT"""
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """At once."""
        self.process.kill()


class Turn:
    """A party: rollouts while the neighbour trains or rests. Called, it returns the number of tokens."""

    def __init__(self, neighbour: Neighbour, signal_first: int, roll_out):
        self.neighbour = neighbour
        self.signal_first = signal_first
        self.roll_out = roll_out  # -> tokens
        self.training_speeds: list[float] = []  # the neighbour's steps per second, one number a turn

    def __call__(self) -> int:
        self.neighbour.send(self.signal_first)
        steps_before = self.neighbour.steps.value
        started = time.perf_counter()
        tokens = self.roll_out()
        steps = self.neighbour.steps.value - steps_before
        self.training_speeds.append(steps / (time.perf_counter() - started))
        return tokens


def roll_out(engine, groups: list[Group], sampling: Sampling) -> int:
    """A turn's rollouts -> tokens."""
    strategy = Strategy(DraftPlan("eagle", 8))
    tokens = 0
    for _ in range(ROLLOUTS):
        tokens += sum(len(response.tokens) for response in engine.generate(groups, sampling, strategy))
    return tokens


def side_by_side(config: Config, engine, groups: list[Group]) -> list[dict]:
    """The rows alone, beside training, training."""
    neighbour = Neighbour(config)
    try:
        neighbour.start()
        rollouts = partial(roll_out, engine, groups, Sampling(max_new=config.max_new))
        alone = Turn(neighbour, signal.SIGSTOP, rollouts)
        beside = Turn(neighbour, signal.SIGCONT, rollouts)
        speeds = take_turns({"alone": alone, "beside training": beside}, TURNS * config.rounds, "spot")
    finally:
        neighbour.end()
    rows = [{"party": name, "tokens_per_second": speed.tokens_per_second} for name, speed in speeds.items()]
    training_speeds = [speed for speed in alone.training_speeds + beside.training_speeds if speed]
    rows.append({"party": "training", "steps_per_second": statistics.median(training_speeds)})
    return rows


# ---------------------------------------------------------------- what training costs


class CountingBuffer(FeatureBuffer):
    """Counts the entries that it hands out."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def pack(self, tokens, rng):
        """As FeatureBuffer.pack."""
        packed = super().pack(tokens, rng)
        self.entries += packed.ids.shape[1]
        return packed


def padded(response: Response, length: int) -> Response:
    """The response with so many features. The padding repeats what is there, and costs what padding costs."""
    tokens = (response.tokens * length)[: length + 1 - len(response.prompt)]
    return replace(response, tokens=tokens, hidden=response.hidden.repeat(length, 1)[:length])


def training_speed(drafter: Drafter, responses: list[Response], length: int, steps: int) -> float:
    """Tokens that teach per second, in batches padded to `length` features; 0: packed."""
    buffer = CountingBuffer()
    for response in responses:
        buffer.add(padded(response, length) if length else response)
    features = sum(len(row.hidden) for row in buffer.sequences)
    useful = sum(len(response.hidden) for response in responses) / features  # the share that is not padding
    trainer = DrafterTrainer(drafter)
    started = now()
    for _ in range(steps):
        trainer.step(buffer)
    return buffer.entries * useful / (now() - started)


def seconds_of(action) -> float:
    """How long a call takes."""
    started = now()
    action()
    return now() - started


def training_costs(policy: Policy, responses: list[Response], rounds: int) -> list[dict]:
    """The rows packing and saving."""
    longest = max(len(response.hidden) for response in responses)
    packing = {"party": "packing"}
    for name, length in (("packed", 0), ("padded", longest)):
        packing[name] = training_speed(policy.drafter, responses, length, steps=20 * rounds)

    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters())
    saving = {"party": "saving"}
    with tempfile.TemporaryDirectory() as folder:
        save_all = partial(checkpoints.save, Path(folder), 1, model, optimizer, policy.tokenizer, [])
        saving["all"] = seconds_of(save_all)
        saving["drafter"] = seconds_of(partial(policy.drafter.save, folder))
    return [packing, saving]


# ---------------------------------------------------------------- the table


def measure(config: Config) -> Result:
    """All rows, on one core each for rollout and training."""
    torch.set_num_threads(1)
    policy = load_policy(config)
    engine = drafted_engine(policy, ROWS)
    groups = groups_for(policy.tokenizer, ROWS, config.seed)
    engine.reserve(room(groups, config.max_new))
    with tempfile.TemporaryDirectory() as folder:
        policy.drafter.save(folder)  # both processes have the same one, also where it was trained here
        rows = side_by_side(replace(config, drafter=folder), engine, groups)
    alone, beside, _ = rows
    responses = list(engine.generate(groups, Sampling(max_new=config.max_new)))
    rows += training_costs(policy, responses, config.rounds)
    return Result(beside["tokens_per_second"] / alone["tokens_per_second"], rows, policy.model.device.type)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    alone, beside, training, packing, saving = rows
    return "\n".join(
        [
            f"rollout alone {alone['tokens_per_second']:.0f} tokens/s, "
            f"beside training {beside['tokens_per_second']:.0f}; "
            f"{training['steps_per_second']:.1f} drafter steps/s of 512 tokens",
            "drafter training, tokens that teach per second: "
            f"packed {packing['packed']:.0f}, padded {packing['padded']:.0f}",
            f"seconds that saving takes: all {saving['all']:.4f}, drafter {saving['drafter']:.4f}",
        ]
    )
