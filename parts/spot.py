"""Spot training: the drafter learns in time that nobody else wants, between two looks at the clock.

A worker whose rows are done trains on the features of its own responses until the last response of all workers is
there. One micro-step takes about 25 ms, so whoever waits for it waits no longer than that.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from drafter import Drafter, Trainer, drafter_loss, rate_for
from parts import checkpoints
from parts.common import find_folder
from parts.features import FeatureBuffer, Features, Packed, pack
from parts.interfaces import Response
from parts.vocabulary import WordCounts
from report import Clock

AllReduce = Callable[[list[torch.Tensor]], None]  # sums over all workers, in place


class Spot:
    """A worker's drafter, and what it learns from.

    The learner is kept in float32 and trained on this worker's own responses; the engine drafts with a copy (`served`)
    that changes only between rollouts.
    """

    # learning rates at width 128, see rate_for
    LEARN_LR = 3e-3  # of a drafter that starts from random weights, for its first YOUNG_STEPS
    FOLLOW_LR = 7e-4  # to follow the policy: at 3e-3 a good drafter gets worse
    YOUNG_STEPS = 1500
    PAYS = 0.4  # likeliest tokens right, on responses that it does not train on: from there on drafting gains time
    AVERAGE_EVERY = 2.0  # seconds of the warm start, lest the workers' drafters drift apart

    def __init__(self, actor, config, rank: int, stop: Iterable[int]):
        """stop: tokens that end a response."""
        torch.manual_seed(config.seed)  # every worker's drafter starts alike
        self.learner = Drafter(actor, torch.float32)
        self.served = Drafter(actor)
        start = self.find_start(config)
        self.draft_vocab = config.draft_vocab
        self.words = WordCounts(actor.config.vocab_size, stop)
        if start:
            self.learner.load(start)
            if self.learner.words is not None:
                self.words.add(self.learner.words.tolist())
        self.needs_warm_start = start is None and config.warm_start > 0
        self.young = start is None  # has much to learn
        self.trainer = Trainer(self.learner, seed=config.seed * 1000 + rank)
        self.trainer.publish(self.served)
        self.buffer = FeatureBuffer()
        self.steps_since_average = 0
        self.steps = 0  # since the last notes; and the sum of their losses:
        self.loss = 0.0

    def find_start(self, config) -> Path | None:
        """The folder with the drafter to start from: this run's own, --drafter-from, the policy's; or None."""
        places = []
        if config.resume or checkpoints.restarted():
            places.append(Path(config.out) / "drafter")
        if config.drafter_from:
            places.append(Path(config.drafter_from))
        places.append(Path(find_folder(config.model)) / "drafter")
        return next((place for place in places if (place / "drafter.safetensors").exists()), None)

    def begin(self, rollout: int) -> None:
        """A rollout begins: it drafts with what has been learned, and the words that were written lately."""
        self.buffer.begin(rollout)
        self.learner.words = self.served.words = self.words.choose(self.draft_vocab)
        self.words.fade()
        self.trainer.publish(self.served)

    def count_words(self, responses: Iterable[Response]) -> None:
        """A rollout is done: its responses, of all workers, so that all choose the same words."""
        for response in responses:
            self.words.add(response.tokens)

    def step(self) -> None:
        """One micro-step."""
        learns = self.young and self.trainer.steps < self.YOUNG_STEPS
        width = self.learner.policy.config.hidden_size
        self.trainer.lr = rate_for(width, self.LEARN_LR if learns else self.FOLLOW_LR)
        loss, _ = self.trainer.step(self.buffer)
        self.loss += loss
        self.steps += 1
        self.steps_since_average += 1

    def warm_start(self, seconds: float, clock: Clock, all_reduce: AllReduce) -> None:
        """Train until drafting pays, at most so many seconds; all workers stop together."""
        self.needs_warm_start = False
        held_out = self.buffer.hold_out()
        for _ in range(max(1, round(seconds / self.AVERAGE_EVERY))):
            end = time.time() + min(seconds, self.AVERAGE_EVERY)
            train_until(lambda end=end: time.time() >= end, clock, self)
            self.average(all_reduce)
            if self.agreement(held_out, all_reduce) >= self.PAYS:
                break
        self.buffer.rows += held_out

    @torch.no_grad()
    def agreement(self, rows: list[Features], all_reduce: AllReduce) -> float:
        """Share of the entries of these rows, and of the other workers' rows, whose likeliest token is guessed."""
        totals = torch.zeros(2, device=self.learner.fc.weight.device)  # right, all
        if rows:
            batch = Packed(*(x.to(totals.device) for x in pack(rows)))
            count = batch.counted.sum()
            totals += torch.stack([drafter_loss(self.learner, batch, own=0.0)[1] * count, count])
        all_reduce([totals])
        right, count = totals.tolist()
        return right / max(1.0, count)

    @torch.no_grad()
    def average(self, all_reduce: AllReduce) -> None:
        """The workers' drafters become their mean, weighted by the steps that each has made since the last one.

        Optimizer states stay as they are.
        """
        weights = [*self.learner.parameters(), *self.trainer.average]
        steps = torch.tensor([float(self.steps_since_average)], device=self.learner.fc.weight.device)
        sums = [w * steps for w in weights] + [steps]
        all_reduce(sums)
        total = sums.pop()
        if total > 0:
            for w, weighted in zip(weights, sums):
                w.copy_(weighted / total)
        self.steps_since_average = 0

    def save(self, folder: Path) -> None:
        """The averaged weights, as they are served."""
        self.trainer.publish(self.served)
        self.served.save(folder)


def train_until(over: Callable[[], bool], clock: Clock, spot: Spot | None = None) -> None:
    """Spend the time until over() on the drafter, or wait.

    over() is asked between micro-steps, so at most one of them is in its way; nothing here waits for another worker, so
    nobody has to be told to stop.
    """
    while not over():
        if spot and spot.buffer.rows:
            clock.enter("drafter")
            spot.step()
        else:
            clock.enter("idle")
            time.sleep(0.005)
    clock.enter("idle")
