"""Spot training: idle workers train the drafter until the last response of all workers is finished.

This is what gives TLT its speed at no cost. A worker that has no sequences left trains on the features of its own
responses. Between training steps it checks whether the rollout is over; it needs no other coordination with the rest.
One step takes about 25 ms on a CPU, so the update is delayed by at most that much.

    rollout begins     the averaged weights go to the drafter that the engine uses; older features leave the buffer
    worker is idle     step after step on the buffer (`train_until`); no collective, nothing to wait for
    rollout is over    the workers' drafters are averaged, weighted by the steps that each has made (`average`)

The memory it uses would be idle then, too. A step that runs out of memory is abandoned, and batches become smaller; if
even small ones do not fit, this worker stops training its drafter, and the run continues without that training.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from drafter import Drafter, DrafterTrainer, drafter_loss, mlp_width, scaled_lr
from parts.engine.interfaces import Response
from parts.engine.kv_cache import kv_heads
from parts.files import find_folder
from parts.running.timers import WorkerTimer
from parts.training.drafter_data import (
    MAX_DRAFT_VOCAB,
    FeatureBuffer,
    SequenceFeatures,
    TokenCounts,
    pack,
)
from parts.training.logprobs import activations_per_token

PROGRESS = "progress.json"  # in a checkpoint's drafter/
AllReduce = Callable[[list[torch.Tensor]], None]  # sums over all workers, in place


def train_until(over: Callable[[], bool], timer: WorkerTimer, spot_trainer: "SpotTrainer | None" = None) -> None:
    """Train the drafter until over() is true; if there is nothing to train, just wait.

    over() is called between training steps, so the other workers wait for at most one step. Nothing here waits for
    another worker, so no worker needs a signal to stop.
    """
    while not over():
        if spot_trainer and spot_trainer.can_train:
            timer.enter("drafter")
            spot_trainer.step()
        else:
            timer.enter("idle")
            time.sleep(0.005)
    timer.enter("idle")


class SpotTrainer:
    """A worker's drafter, and the data that it learns from.

    The learner is kept in float32 and trained on this worker's own responses; the engine drafts with a copy (`served`)
    that changes only between rollouts.
    """

    # learning rates at width 128, see scaled_lr
    FROM_SCRATCH_LR = 3e-3  # of a drafter that started from random weights, for its first FROM_SCRATCH_STEPS
    FOLLOW_LR = 7e-4  # to follow the policy: at 3e-3 a good drafter gets worse
    FROM_SCRATCH_STEPS = 1500
    GOOD_ENOUGH = 0.8  # agreement on held-out responses from which idle time is enough to improve the drafter
    LEARNED_BY_HEART = 0.98  # agreement on the training data at which more steps would teach nothing
    WARM_START_PARTS = 4  # of --warm-start, each after a rollout
    AVERAGE_EVERY = 5.0  # seconds, during the warm start, so that the workers' drafters do not drift apart
    MIN_BATCH_TOKENS = 64

    def __init__(self, actor, config, rank: int, stop: Iterable[int], checkpoint: Path | None = None):
        """stop: tokens that end a response; checkpoint: the one that the run continues from."""
        torch.manual_seed(config.seed)  # every worker's drafter starts with the same weights
        self.learner = Drafter(actor, torch.float32)
        self.served = Drafter(actor)
        start = self.find_start(config, checkpoint)
        self.draft_vocab_size = config.draft_vocab
        self.token_counts = TokenCounts(actor.config.vocab_size, stop)
        if start:
            self.learner.load(start)
            if self.learner.draft_vocab is not None:
                self.token_counts.add(self.learner.draft_vocab.tolist())
        self.warm_start_limit = config.warm_start  # seconds
        self.warm_seconds_left = config.warm_start if start is None else 0.0
        self.earlier_steps = 0  # of a drafter that started from random weights, before this process
        self.from_scratch = start is None
        if checkpoint and start == checkpoint / "drafter":
            self.read_progress(start)
        self.needs_warm_start = self.warm_seconds_left > 0
        self.rank = rank
        self.trainer = DrafterTrainer(self.learner, seed=config.seed * 1000 + rank)
        self.trainer.publish(self.served)
        self.adaptive = config.drafter == "adaptive"
        if self.trains:
            allocate_moments(self.trainer.optimizer)
        self.fits = True  # whether a training step fits in memory
        self.buffer = FeatureBuffer()
        self.skipped_steps = 0  # their gradient was not finite
        self.steps_since_average = 0
        self.recent_agreement = 0.0  # a running mean, on the training data
        self.steps = 0  # since the last `take_stats`; below, the sum of their losses
        self.loss = 0.0

    def find_start(self, config, checkpoint: Path | None) -> Path | None:
        """Return the first folder that has a drafter: the checkpoint's, --drafter-from, the policy's; or None."""
        folders = []
        if checkpoint:
            folders.append(checkpoint / "drafter")
        if config.drafter_from:
            folders.append(Path(config.drafter_from))
        folders.append(Path(find_folder(config.model)) / "drafter")
        return next((folder for folder in folders if (folder / "drafter.safetensors").exists()), None)

    @property
    def trains(self) -> bool:
        """Return whether the drafter is, or will be, trained."""
        return self.adaptive or self.needs_warm_start

    @property
    def is_young(self) -> bool:
        """Return whether the drafter started from random weights, not long ago."""
        return self.from_scratch and self.earlier_steps + self.trainer.steps < self.FROM_SCRATCH_STEPS

    @property
    def can_train(self) -> bool:
        """Return whether there is data to learn from, and the memory for it."""
        return self.fits and bool(self.buffer.sequences)

    def idle_bytes(self) -> int:
        """Return the memory to leave for a training step: at most 8 GB, since batches shrink when memory runs out."""
        vocab = self.draft_vocab_size or min(MAX_DRAFT_VOCAB, self.learner.policy.config.vocab_size)
        tokens = self.trainer.tokens + FeatureBuffer.MAX_WINDOW
        return min(8 << 30, step_bytes(self.learner, tokens, vocab)) if self.trains else 0

    def begin_rollout(self, rollout: int) -> None:
        """Prepare a rollout: it drafts with the weights learned so far, and the token ids generated lately."""
        self.buffer.begin_rollout(rollout, keep_all=self.is_young)
        self.choose_draft_vocab()
        self.token_counts.fade()
        self.trainer.publish(self.served)

    def choose_draft_vocab(self) -> None:
        """From now on, draft and learn only the token ids that have been generated most often."""
        self.learner.draft_vocab = self.served.draft_vocab = self.token_counts.choose(self.draft_vocab_size)

    def count_tokens(self, responses: Iterable[Response]) -> None:
        """Count a finished rollout's token ids. All workers count all responses, so all choose the same vocabulary."""
        for response in responses:
            self.token_counts.add(response.tokens)

    # ---------------------------------------------------------------- training

    def step(self) -> None:
        """Make one training step; if it runs out of memory, abandon it."""
        self.trainer.lr = scaled_lr(self.learner.width, self.FROM_SCRATCH_LR if self.is_young else self.FOLLOW_LR)
        loss = None
        try:
            loss, agreement = self.trainer.step(self.buffer)
        except torch.OutOfMemoryError:
            pass  # handled outside this block, where the step's tensors have been freed
        if loss is None:
            self.shrink_batches()
            return
        if math.isnan(loss):
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                tqdm.write(f"worker {self.rank}: the gradient of a drafter step was not finite; such steps are skipped")
            return
        self.recent_agreement += 0.05 * (agreement - self.recent_agreement)
        self.loss += loss
        self.steps += 1
        self.steps_since_average += 1

    def shrink_batches(self) -> None:
        """Memory has run out: halve the batches, or stop training if they are at MIN_BATCH_TOKENS already."""
        self.trainer.optimizer.zero_grad()
        torch.cuda.empty_cache()
        self.fits = self.trainer.tokens > self.MIN_BATCH_TOKENS
        self.trainer.tokens //= 2
        how = f"it continues with batches of {self.trainer.tokens} tokens" if self.fits else "it ends here"
        tqdm.write(f"worker {self.rank}: out of memory in drafter training; {how}")

    @torch.no_grad()
    def average(self, all_reduce: AllReduce) -> int:
        """Replace every worker's drafter by the mean of all, weighted by their steps since the last call; return the
        sum of these steps. It works in place, so it needs no extra memory. Optimizer states stay as they are.
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

    def take_stats(self) -> tuple[int, float]:
        """Return the number of training steps since the last call, and the sum of their losses."""
        stats = self.steps, self.loss
        self.steps = 0
        self.loss = 0.0
        return stats

    def save(self, folder: Path) -> None:
        """Write the averaged weights, as they are served."""
        self.trainer.publish(self.served)
        self.served.save(folder)

    def save_progress(self, folder: Path) -> None:
        """Write what a resumed run needs to know beside the weights."""
        progress = {
            "from_scratch": self.from_scratch,
            "steps": self.earlier_steps + self.trainer.steps,
            "warm_seconds_left": self.warm_seconds_left if self.needs_warm_start else 0.0,
        }
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def read_progress(self, folder: Path) -> None:
        """Continue where `save_progress` was called; checkpoints of earlier versions have no such file."""
        if (folder / PROGRESS).exists():
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            self.from_scratch = progress["from_scratch"]
            self.earlier_steps = progress["steps"]
            self.warm_seconds_left = progress["warm_seconds_left"]

    # ---------------------------------------------------------------- warm start

    def warm_start_seconds(self, rollout_seconds: float, steps_left: int) -> float:
        """Return how long to train after this rollout: a part of what is left of --warm-start. With drafts, a rollout
        may take half as long; more than that, in the steps that are left, cannot be won back.
        """
        part = max(self.warm_start_limit / self.WARM_START_PARTS, min(self.AVERAGE_EVERY, self.warm_start_limit))
        return min(part, self.warm_seconds_left, rollout_seconds * max(0, steps_left - 1) / 2)

    def warm_start(self, seconds: float, timer: WorkerTimer, all_reduce: AllReduce) -> None:
        """Train for at most this many seconds, until the drafter is good or the data is learned by heart. All workers
        stop together. Rank 0 reports progress.

        It comes in parts, after one rollout each, since a single rollout holds too few tokens to learn from.
        """
        if seconds < min(self.AVERAGE_EVERY, self.warm_start_limit):
            self.say("no (further) warm start of the drafter: the steps that are left could not win back its time")
            self.needs_warm_start = False
            return
        self.say(f"warm start: training the drafter for at most {seconds:.0f} s (--warm-start)")
        self.choose_draft_vocab()  # before the first rollout there were no counts
        held_out = self.buffer.hold_out()
        started = time.time()
        agreement = 0.0
        for _ in range(max(1, round(seconds / self.AVERAGE_EVERY))):
            end = time.time() + min(seconds, self.AVERAGE_EVERY)
            train_until(lambda end=end: time.time() >= end, timer, self)
            steps = self.average(all_reduce)
            agreement = self.agreement(held_out, all_reduce)
            learned = torch.tensor([self.recent_agreement, 1.0], device=self.learner.fc.weight.device)
            all_reduce([learned])
            by_heart = (learned[0] / learned[1]).item() >= self.LEARNED_BY_HEART
            if not steps or agreement >= self.GOOD_ENOUGH or by_heart:
                break
        self.buffer.sequences += held_out
        self.warm_seconds_left = max(0.0, self.warm_seconds_left - seconds)
        self.needs_warm_start = agreement < self.GOOD_ENOUGH and self.warm_seconds_left > 0
        self.say(
            f"likeliest token right in {agreement:.0%} of held-out text after {time.time() - started:.0f} s; "
            + (f"at most {self.warm_seconds_left:.0f} s more" if self.needs_warm_start else "the warm start ends")
        )

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.rank == 0:
            tqdm.write(text)

    def agreement(self, sequences: list[SequenceFeatures], all_reduce: AllReduce) -> float:
        """Return the share of entries whose likeliest token the drafter predicts, over all workers' sequences."""
        totals = self.count_right(sequences)
        all_reduce([totals])
        right, count = totals.tolist()
        return right / max(1.0, count)

    @torch.no_grad()
    def count_right(self, sequences: list[SequenceFeatures]) -> torch.Tensor:
        """Return (2,): how many entries of these sequences have their likeliest token predicted, and how many there
        are. If memory runs out, each half is done separately; a single sequence that does not fit is left out.
        """
        device = self.learner.fc.weight.device
        if not sequences:
            return torch.zeros(2, device=device)
        try:
            batch = pack(sequences).on(device)
            count = len(batch.learned)
            right = drafter_loss(self.learner, batch, own=0.0)[1] * count
            return torch.stack([right, torch.full_like(right, count)])
        except torch.OutOfMemoryError:
            batch = None  # handled outside this block, where its tensors have been freed
        torch.cuda.empty_cache()
        half = len(sequences) // 2
        return self.count_right(sequences[:half]) + self.count_right(sequences[half:]) if half else self.count_right([])


# ---------------------------------------------------------------- memory


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make Adam create its moments now instead of in its first step, so that their memory is not mistaken for free and
    cannot run out halfway through. The step that creates them changes no weight, and is not counted.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()


def step_bytes(drafter: Drafter, tokens: int, vocab: int) -> int:
    """Return the most memory that a training step on `tokens` entries takes besides weights and moments: what the
    layer keeps and recomputes, logits and targets over `vocab` token ids, the loss's intermediates, masks, gradients,
    bfloat16 copies of the weights, and the rows of the head.
    """
    config = drafter.policy.config
    groups = config.num_attention_heads // kv_heads(config)
    entry = 2 * activations_per_token(config, mlp_width(drafter.layer)) + 6 * vocab + 3 * groups * tokens
    weights = sum(p.numel() for p in drafter.parameters())
    return 4 * (tokens * entry + 2 * weights + vocab * drafter.width)
