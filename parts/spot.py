"""Spot training: the drafter learns in time that nobody else wants, between two looks at the clock.

A worker whose rows are done trains on the features of its own responses until the last response of all workers is
there. One micro-step takes about 25 ms, so whoever waits for it waits no longer than that.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from drafter import Drafter, Trainer
from parts import checkpoints
from parts.common import find_folder
from parts.features import FeatureBuffer
from report import Clock


class Spot:
    """A worker's drafter, and what it learns from.

    The learner is kept in float32 and trained on this worker's own responses; the engine drafts with a copy (`served`)
    that changes only between rollouts.
    """

    LEARN_LR = 3e-3  # of a drafter that starts from random weights, for its first YOUNG_STEPS
    FOLLOW_LR = 7e-4  # to follow the policy: at 3e-3 a good drafter gets worse
    YOUNG_STEPS = 1500

    def __init__(self, actor, config, rank: int):
        torch.manual_seed(config.seed)  # every worker's drafter starts alike
        self.learner = Drafter(actor, torch.float32)
        self.served = Drafter(actor)
        start = self.find_start(config)
        if start:
            self.learner.load(start)
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
        """A rollout begins: it drafts with what has been learned."""
        self.buffer.begin(rollout)
        self.trainer.publish(self.served)

    def step(self) -> None:
        """One micro-step."""
        learns = self.young and self.trainer.steps < self.YOUNG_STEPS
        self.trainer.lr = self.LEARN_LR if learns else self.FOLLOW_LR
        loss, _ = self.trainer.step(self.buffer)
        self.loss += loss
        self.steps += 1
        self.steps_since_average += 1

    @torch.no_grad()
    def average(self, all_reduce: Callable[[list[torch.Tensor]], None]) -> None:
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
