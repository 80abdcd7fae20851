"""Micro-batches: one update cut into pieces that fit the memory.

They are cut by content (length, group and sample of the responses), never by which worker made a response, so that the
sums of an update do not depend on the number of workers. When memory runs out, a worker cuts its own share finer and
does it again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from parts.cli import UserError
from parts.engine.interfaces import Response
from parts.training.logprobs import token_scores
from train_grpo import Alone


@dataclass
class Example:
    """A response as the update sees it."""

    response: Response
    advantage: float
    weight: float = 0.0  # of each of its tokens, see train_grpo.token_weights
    old: torch.Tensor | None = None  # (len(tokens),) log p_old, where that is not the rollout's

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.response.prompt) + len(self.response.tokens)


def cost(rows: int, longest: int, tokens: int) -> int:
    """Of a micro-batch, in tokens: its own with padding, and for the launches of its forward and backward a 32nd of
    the largest one's (of shares from a 3rd to a 32nd the fastest on two cores).
    """
    return rows * longest + tokens // 32


def cut(examples: list[Example], tokens: int) -> list[list[Example]]:
    """examples: the longest first -> neighbours together, at most `tokens` with padding (or a single one), at the least
    cost: large batches cost padding, many small ones their launches.

    With f(e) the least cost of the first e examples, f(e) = min over b < e of f(b) + cost of a batch from b to e.
    """
    least = [0]  # f
    begins = [0]  # where the last batch of the first e examples begins
    for end in range(1, len(examples) + 1):
        choices = []
        for begin in range(end - 1, -1, -1):
            rows = end - begin
            if rows > 1 and rows * examples[begin].length > tokens:
                break
            choices.append((least[begin] + cost(rows, examples[begin].length, tokens), begin))
        total, begin = min(choices)
        least.append(total)
        begins.append(begin)
    batches = []
    end = len(examples)
    while end:
        batches.append(examples[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def micro_batches(examples: list[Example], tokens: int, workers: int) -> list[list[list[Example]]]:
    """Cut by content: like lengths together, at most `tokens` with padding, the heaviest first to the least loaded
    worker.

    -> a list of micro-batches for each worker. Depends on the examples alone, not on their order or origin.
    """
    batches = cut(sorted(examples, key=lambda x: (-x.length, x.response.group, x.response.sample)), tokens)
    shares: list[list[list[Example]]] = [[] for _ in range(workers)]
    load = [0] * workers
    for batch in sorted(batches, key=lambda batch: -len(batch) * batch[0].length):
        least = load.index(min(load))
        shares[least].append(batch)
        load[least] += cost(len(batch), batch[0].length, tokens)
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


def precision(team: Alone) -> torch.autocast:
    """What the trainer's forwards run in: bfloat16 on GPUs, and where it is asked for."""
    bf16 = team.config.bf16 or team.device != "cpu"
    # without its cache: there the gradients of several uses of a weight would be summed in bfloat16
    return torch.autocast(torch.device(team.device).type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def score(model, examples: list[Example], team: Alone) -> None:
    """Before the first update of a rollout: fill in `old` of this worker's share of a mini-batch. Cut by content, the
    share is the same in every update.
    """
    config = team.config

    def work(batches: list[list[Example]]) -> None:
        for batch in batches:
            team.clock.enter("update")
            with precision(team), torch.no_grad():
                logp, _ = token_scores(model, [x.response for x in batch], config.temperature, team.layout.logprobs_at)
            for x, old in zip(batch, logp.cpu().split([len(x.response.tokens) for x in batch])):
                x.old = old

    share = team.layout.my_share(micro_batches(examples, config.micro_tokens, team.size), team.rank)
    with_less_memory(work, share, lambda: None, team)


def per_token(batch: list[Example], device) -> tuple[torch.Tensor, ...]:
    """-> log-probability in the rollout and under the old policy, advantage and weight of each token, all (N,)."""
    rollout = torch.cat([x.response.logprobs for x in batch])
    old = torch.cat([x.response.logprobs if x.old is None else x.old for x in batch])
    counts = torch.tensor([len(x.response.tokens) for x in batch])
    advantage = torch.tensor([x.advantage for x in batch]).repeat_interleave(counts)
    weight = torch.tensor([x.weight for x in batch]).repeat_interleave(counts)
    return tuple(column.to(device) for column in (rollout, old, advantage, weight))
