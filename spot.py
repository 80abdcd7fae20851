"""Spot training: the drafter learns in time that nobody else wants, between two looks at the clock.

A worker whose rows are done trains on the features of its own responses until the last response of all workers is
there. One micro-step takes about 25 ms, so whoever waits for it waits no longer than that.

It takes memory that nobody else wants, too. A step that finds too little is given up, and batches become smaller; where
even small ones do not fit, this worker's training ends, and the run goes on without it.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from drafter import Drafter, Trainer, drafter_loss, rate_for, width_of
from parts.engine.interfaces import Response
from parts.engine.kv_cache import kv_heads
from parts.files import find_folder
from parts.running.timers import Clock
from parts.training.drafter_data import MOST, FeatureBuffer, Features, Packed, WordCounts, pack
from parts.training.logprobs import numbers_kept

AllReduce = Callable[[list[torch.Tensor]], None]  # sums over all workers, in place


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Adam's moments come with its first step. They had better be there before: what is in use is not counted as free,
    and memory cannot run out halfway through them. The step that brings them changes no weight, and does not count.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()


def step_bytes(drafter: Drafter, tokens: int, words: int) -> int:
    """Memory that a micro-step of so many entries takes at most, beside weights and moments: what the layer keeps and
    computes anew, logits and targets of `words` words with what the loss makes of them, masks; gradients, bfloat16
    copies of the weights, the rows of the head.
    """
    config = drafter.policy.config
    groups = config.num_attention_heads // kv_heads(config)
    entry = 2 * numbers_kept(config, width_of(drafter.layer)) + 6 * words + 3 * groups * tokens
    weights = sum(p.numel() for p in drafter.parameters())
    return 4 * (tokens * entry + 2 * weights + words * drafter.width)


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
    FEWEST_TOKENS = 64  # of a batch

    def __init__(self, actor, config, rank: int, stop: Iterable[int], checkpoint: Path | None = None):
        """stop: tokens that end a response; checkpoint: that the run goes on from."""
        torch.manual_seed(config.seed)  # every worker's drafter starts alike
        self.learner = Drafter(actor, torch.float32)
        self.served = Drafter(actor)
        start = self.find_start(config, checkpoint)
        self.draft_vocab = config.draft_vocab
        self.words = WordCounts(actor.config.vocab_size, stop)
        if start:
            self.learner.load(start)
            if self.learner.words is not None:
                self.words.add(self.learner.words.tolist())
        self.needs_warm_start = start is None and config.warm_start > 0
        self.young = start is None  # has much to learn
        self.rank = rank
        self.trainer = Trainer(self.learner, seed=config.seed * 1000 + rank)
        self.trainer.publish(self.served)
        self.adaptive = config.drafter == "adaptive"
        if self.trains:
            allocate_moments(self.trainer.optimizer)
        self.fits = True  # a micro-step, into the memory
        self.buffer = FeatureBuffer()
        self.steps_since_average = 0
        self.steps = 0  # since the last notes; and the sum of their losses:
        self.loss = 0.0

    def find_start(self, config, checkpoint: Path | None) -> Path | None:
        """The folder with the drafter to start from: the checkpoint's, --drafter-from, the policy's; or None."""
        places = []
        if checkpoint:
            places.append(checkpoint / "drafter")
        if config.drafter_from:
            places.append(Path(config.drafter_from))
        places.append(Path(find_folder(config.model)) / "drafter")
        return next((place for place in places if (place / "drafter.safetensors").exists()), None)

    @property
    def trains(self) -> bool:
        """Whether it is, or will be, trained."""
        return self.adaptive or self.needs_warm_start

    @property
    def learns(self) -> bool:
        """Whether there is something to learn from, and the memory for it."""
        return self.fits and bool(self.buffer.rows)

    def idle_bytes(self) -> int:
        """Memory to leave to a micro-step; at most 8 GB, since one that runs out of memory is cut finer."""
        words = self.draft_vocab or min(MOST, self.learner.policy.config.vocab_size)
        tokens = self.trainer.tokens + FeatureBuffer.MAX_STRETCH
        return min(8 << 30, step_bytes(self.learner, tokens, words)) if self.trains else 0

    def begin(self, rollout: int) -> None:
        """A rollout begins: it drafts with what has been learned, and the words that were written lately."""
        self.buffer.begin(rollout)
        self.choose_words()
        self.words.fade()
        self.trainer.publish(self.served)

    def choose_words(self) -> None:
        """From now on the drafter guesses and learns the words that were written most."""
        self.learner.words = self.served.words = self.words.choose(self.draft_vocab)

    def count_words(self, responses: Iterable[Response]) -> None:
        """A rollout is done: its responses, of all workers, so that all choose the same words."""
        for response in responses:
            self.words.add(response.tokens)

    def step(self) -> None:
        """One micro-step. One that runs out of memory is given up."""
        young = self.young and self.trainer.steps < self.YOUNG_STEPS
        self.trainer.lr = rate_for(self.learner.width, self.LEARN_LR if young else self.FOLLOW_LR)
        loss = None
        try:
            loss, _ = self.trainer.step(self.buffer)
        except torch.OutOfMemoryError:
            pass  # go on outside, where the step's tensors are gone
        if loss is None:
            self.cut_finer()
            return
        self.loss += loss
        self.steps += 1
        self.steps_since_average += 1

    def cut_finer(self) -> None:
        """Memory has run out: from now on smaller batches, and from FEWEST_TOKENS on none."""
        self.trainer.optimizer.zero_grad()
        torch.cuda.empty_cache()
        self.fits = self.trainer.tokens > self.FEWEST_TOKENS
        self.trainer.tokens //= 2
        how = f"it goes on with batches of {self.trainer.tokens} tokens" if self.fits else "it ends here"
        tqdm.write(f"worker {self.rank}: out of memory in drafter training; {how}")

    def warm_start(self, seconds: float, clock: Clock, all_reduce: AllReduce) -> None:
        """Train until drafting pays, at most so many seconds; all workers stop together."""
        self.needs_warm_start = False
        self.choose_words()  # before the first rollout nothing was known of them
        held_out = self.buffer.hold_out()
        for _ in range(max(1, round(seconds / self.AVERAGE_EVERY))):
            end = time.time() + min(seconds, self.AVERAGE_EVERY)
            train_until(lambda end=end: time.time() >= end, clock, self)
            steps = self.average(all_reduce)
            if not steps or self.agreement(held_out, all_reduce) >= self.PAYS:
                break
        self.buffer.rows += held_out

    def agreement(self, rows: list[Features], all_reduce: AllReduce) -> float:
        """Share of the entries of these rows, and of the other workers' rows, whose likeliest token is guessed."""
        totals = self.count_right(rows)
        all_reduce([totals])
        right, count = totals.tolist()
        return right / max(1.0, count)

    @torch.no_grad()
    def count_right(self, rows: list[Features]) -> torch.Tensor:
        """(2,): entries of these rows whose likeliest token is guessed, and all their entries. Where memory runs out it
        is done by halves; a row that does not fit alone is left out.
        """
        device = self.learner.fc.weight.device
        if not rows:
            return torch.zeros(2, device=device)
        try:
            batch = Packed(*(x.to(device) for x in pack(rows)))
            count = batch.counted.sum()
            return torch.stack([drafter_loss(self.learner, batch, own=0.0)[1] * count, count])
        except torch.OutOfMemoryError:
            batch = None  # go on outside, where its tensors are gone
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return self.count_right(rows[:half]) + self.count_right(rows[half:]) if half else self.count_right([])

    @torch.no_grad()
    def average(self, all_reduce: AllReduce) -> int:
        """The workers' drafters become their mean, weighted by the steps that each has made since the last one
        -> all these steps. In place, so that it needs no memory. Optimizer states stay as they are.
        """
        steps = self.steps_since_average
        total = torch.tensor(float(steps), device=self.learner.fc.weight.device)
        all_reduce([total])
        self.steps_since_average = 0
        if total > 0:
            weights = [*self.learner.parameters(), *self.trainer.average]
            torch._foreach_mul_(weights, steps / total.item())
            all_reduce(weights)
        return int(total)

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
        if spot and spot.learns:
            clock.enter("drafter")
            spot.step()
        else:
            clock.enter("idle")
            time.sleep(0.005)
    clock.enter("idle")
