"""An update in pieces that fit the memory: micro-batches, cut by content, and cut finer when memory runs out. And the
figures that are summed up over them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from parts.common import UserError
from parts.interfaces import Response
from parts.workers import Alone


@dataclass
class Example:
    """A response as the update sees it."""

    response: Response
    advantage: float
    weight: float = 0.0  # of each of its tokens, see train_grpo.token_weights

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.response.prompt) + len(self.response.tokens)


def micro_batches(examples: list[Example], tokens: int, workers: int) -> list[list[list[Example]]]:
    """Cut by content: like lengths together, at most `tokens` with padding, the heaviest first to the least loaded
    worker.

    -> a list of micro-batches for each worker. Depends on the examples alone, not on their order or origin.
    """
    batches: list[list[Example]] = []
    for x in sorted(examples, key=lambda x: (-x.length, x.response.group, x.response.sample)):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= tokens:
            batches[-1].append(x)
        else:
            batches.append([x])
    shares: list[list[list[Example]]] = [[] for _ in range(workers)]
    load = [0] * workers
    for batch in batches:
        least = load.index(min(load))
        shares[least].append(batch)
        load[least] += len(batch) * batch[0].length
    return shares


def with_less_memory(accumulate: Callable[[list], object], share: list[list[Example]], clear: Callable, team: Alone):
    """accumulate(share) for one worker's share of micro-batches. When memory runs out it is cut finer and done again.

    clear() undoes what a failed try has summed up. Only this worker's own share is cut: what the others do stays as it
    is. Raises UserError where that cannot help.
    """
    wanted = team.config.micro_tokens
    more = "" if team.config.gradient_checkpointing else " or add --gradient-checkpointing"
    while True:
        if team.micro_tokens < wanted:
            share = micro_batches([x for batch in share for x in batch], team.micro_tokens, 1)[0]
        try:
            return accumulate(share)
        except torch.OutOfMemoryError:
            pass  # go on outside, where the failed try's tensors are gone
        clear()
        torch.cuda.empty_cache()
        if not team.layout.can_retry:
            raise UserError(f"out of memory in the update: lower --micro-tokens {wanted}{more}")
        if max(len(batch) for batch in share) == 1:
            single = f"a single response of {share[0][0].length} tokens"
            raise UserError(f"out of memory in the update with {single}: lower --max-new{more}")
        team.micro_tokens //= 2
        again = f"it is done again with --micro-tokens {team.micro_tokens}"
        tqdm.write(f"worker {team.rank}: out of memory in the update; {again}")


@dataclass
class UpdateStats:
    """Sums over the tokens of some micro-batches."""

    loss: float = 0.0
    tokens: int = 0
    clipped: int = 0
    kl: float = 0.0
    gap_max: float = 0.0  # largest |log p of the trainer - log p of the rollout|; only where both are the same policy


def combine(parts: list[UpdateStats]) -> dict:
    """The update's figures in the metrics, over all workers and optimizer steps."""
    tokens = max(1, sum(s.tokens for s in parts))
    return {
        "loss": sum(s.loss for s in parts),
        "gap_max": max((s.gap_max for s in parts), default=0.0),
        "clipped": sum(s.clipped for s in parts) / tokens,
        "kl": sum(s.kl for s in parts) / tokens,
    }
