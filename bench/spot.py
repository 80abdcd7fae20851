"""How much drafter training on one core slows a rollout on another, and the time of training itself. On GPUs: on one
GPU and on another; if there is only one, on the same.

    rollout           rollouts of 8 sequences on one core, while a process on another core trains the drafter, or is
                      stopped, in turns
    drafter training  what that process does meanwhile, in steps of 512 tokens
    packed, padded    drafter training on packed and on padded batches, in tokens of responses per second
    saving            seconds that saving takes the worker: policy and optimizer; the drafter alone

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
    batch_groups,
    fixed,
    load_policy,
    make_engine,
    seconds_per_call,
    take_turns,
)
from drafter import DrafterTrainer
from parts.cli import UserError, flag
from parts.engine.interfaces import Response
from parts.engine.sampling import Sampling
from parts.running import checkpoints
from parts.training.drafter_data import FeatureBuffer

SEQUENCES = 8
ROLLOUTS = 4  # in a turn
TURNS = 5  # in each of --rounds
COLUMNS = {"figure": "", "value": "", "unit": ""}


@dataclass(frozen=True)
class Config(DrafterSettings):
    threads: int = flag(1, "threads that torch computes with, in each of the two processes")
    rounds: int = flag(3, "turns of each party")


# ---------------------------------------------------------------- rollout beside training


def train_forever(config: Config, ready, steps) -> None:
    """Run the process beside the rollout. ready: an event, set when training begins; steps: a counter of its steps."""
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(1)
    policy = load_policy(config)
    groups = batch_groups(policy.tokenizer, 64, config.seed + 1)
    buffer = FeatureBuffer()
    for response in make_engine(policy, 16, groups, config.max_new).generate(groups, Sampling(max_new=config.max_new)):
        buffer.add(response)
    trainer = DrafterTrainer(policy.drafter)
    ready.set()
    while True:
        trainer.step(buffer)
        steps.value += 1


def side_by_side(config: Config, engine, groups) -> list[dict]:
    """Return the speeds of rollouts alone and beside training, and of training. Raises UserError if training fails."""
    context = torch.multiprocessing.get_context("spawn")
    ready, steps = context.Event(), context.Value("l", 0)
    process = context.Process(target=train_forever, args=(config, ready, steps), daemon=True)
    training_speeds: list[float] = []

    def turn(signal_first: int) -> int:
        """Stop or continue training, and roll out -> tokens."""
        os.kill(process.pid, signal_first)
        steps_before, started = steps.value, time.perf_counter()
        tokens = 0
        for _ in range(ROLLOUTS):
            responses = engine.generate(groups, Sampling(max_new=config.max_new), fixed(8))
            tokens += sum(len(response.tokens) for response in responses)
        if signal_first == signal.SIGCONT:
            training_speeds.append((steps.value - steps_before) / (time.perf_counter() - started))
        return tokens

    process.start()
    try:
        while not ready.wait(1):
            if not process.is_alive():
                raise UserError("the training process died; its message is above")
        parties = {"alone": partial(turn, signal.SIGSTOP), "beside drafter training": partial(turn, signal.SIGCONT)}
        speeds = take_turns(parties, TURNS * config.rounds, "spot")
    finally:
        process.kill()
    rows = [{"figure": f"rollout {name}", "value": speed, "unit": "tokens/s"} for name, speed in speeds.items()]
    return [*rows, {"figure": "drafter training", "value": statistics.median(training_speeds), "unit": "steps/s"}]


# ---------------------------------------------------------------- the time of training


class CountingBuffer(FeatureBuffer):
    """Counts the entries that it hands out."""

    entries = 0

    def pack(self, tokens, rng):
        packed = super().pack(tokens, rng)
        self.entries += packed.ids.shape[1]
        return packed


def padded(response: Response, length: int) -> Response:
    """Return the response with so many features. The padding repeats what is there, and takes the time of padding."""
    tokens = (response.tokens * length)[: length + 1 - len(response.prompt)]
    return replace(response, tokens=tokens, hidden=response.hidden.repeat(length, 1)[:length])


def training_speed(policy: Policy, responses: list[Response], length: int, steps: int) -> float:
    """Return the tokens per second, without padding, of training on batches padded to `length` features; 0: packed."""
    buffer = CountingBuffer()
    for response in responses:
        buffer.add(padded(response, length) if length else response)
    features = sum(len(sequence.hidden) for sequence in buffer.sequences)
    useful = sum(len(response.hidden) for response in responses) / features  # the share that is not padding
    trainer = DrafterTrainer(policy.drafter)
    seconds = seconds_per_call(lambda: trainer.step(buffer), steps)
    return buffer.entries * useful / (seconds * steps)


def training_costs(policy: Policy, responses: list[Response], rounds: int) -> list[dict]:
    """Return the rows of packing and saving."""
    rows = []
    longest = max(len(response.hidden) for response in responses)
    for name, length in (("packed", 0), ("padded", longest)):
        speed = training_speed(policy, responses, length, steps=20 * rounds)
        rows.append({"figure": f"drafter training, {name}", "value": speed, "unit": "tokens/s"})
    optimizer = torch.optim.AdamW(policy.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save_all = partial(checkpoints.save, Path(folder), 1, policy.model, optimizer, policy.tokenizer, [])
        for name, save in (("policy and optimizer", save_all), ("the drafter", partial(policy.drafter.save, folder))):
            rows.append({"figure": f"saving {name}", "value": seconds_per_call(save), "unit": "s"})
    return rows


def measure(config: Config) -> Result:
    """Return all rows, measured on one core each for rollout and training."""
    policy = load_policy(config)
    groups = batch_groups(policy.tokenizer, SEQUENCES, config.seed)
    engine = make_engine(policy, SEQUENCES, groups, config.max_new)
    with tempfile.TemporaryDirectory() as folder:
        policy.drafter.save(folder)  # both processes have the same one, also where it was trained here
        rows = side_by_side(replace(config, drafter=folder), engine, groups)
    responses = list(engine.generate(groups, Sampling(max_new=config.max_new)))
    rows += training_costs(policy, responses, config.rounds)
    return Result(rows[1]["value"] / rows[0]["value"], rows, policy.model.device.type)
