"""Micro-batches: the samples of one update in pieces that fit the memory.

They are cut by content (length, group and sample of the responses), never by which worker made a response, so that the
sums of an update do not depend on the number of workers. When memory runs out, a worker cuts its own share finer and
does it again; what the other workers do stays as it is.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from parts.cli import UserError
from parts.devices import send
from parts.engine.interfaces import Response
from parts.training.logprobs import worth_sharing
from parts.training.update_stats import UpdateStats


@dataclass
class TrainingSample:
    """A response as the update sees it."""

    response: Response
    advantage: float
    weight: float = 0.0  # of each of its tokens, see train_grpo.token_weights
    old: torch.Tensor | None = None  # (len(tokens),) log p_old, if the trainer has scored it (train_grpo.old_logprobs)
    prompt_number: int = 0  # equal for equal prompts of an update, see best_partition

    @property
    def length(self) -> int:
        """Return the number of tokens, prompt included."""
        return len(self.response.prompt) + len(self.response.tokens)


MicroBatch = list[TrainingSample]


# ---------------------------------------------------------------- cutting


def batch_cost(rows: int, longest: int, tokens: int) -> int:
    """Return the cost of a micro-batch in tokens: its own with padding, and for the launches of its forward and
    backward a 32nd of the largest one's (of shares from a 3rd to a 32nd the fastest on two cores).
    """
    return rows * longest + tokens // 32


def forward_tokens(batch: MicroBatch, share_prompts: bool) -> int:
    """Return how many tokens a forward computes, with padding. share_prompts: each different prompt once, where
    `logprobs.worth_sharing` says so.
    """
    responses = [x.response for x in batch]
    names = [x.prompt_number for x in batch]
    if share_prompts and worth_sharing(responses, names):
        longest_prompt = max(len(r.prompt) for r in responses)
        return len(set(names)) * longest_prompt + len(batch) * max(len(r.tokens) for r in responses)
    return len(batch) * max(x.length for x in batch)


def partition(samples: list[TrainingSample], tokens: int, share_prompts: bool = False) -> list[MicroBatch]:
    """Cut samples into runs of neighbours of at most `tokens` with padding (or a single sample), at the least cost:
    large batches cost padding, many small ones cost launches.

    With f(e) the least cost of the first e samples, f(e) = min over b < e of f(b) + cost of a batch from b to e.
    """
    least = [0]  # f
    begins = [0]  # where the last batch of the first e samples begins
    for end in range(1, len(samples) + 1):
        choices = []
        for begin in range(end - 1, -1, -1):
            size = forward_tokens(samples[begin:end], share_prompts)
            if end - begin > 1 and size > tokens:
                break
            choices.append((least[begin] + batch_cost(1, size, tokens), begin))
        total, begin = min(choices)
        least.append(total)
        begins.append(begin)
    batches = []
    end = len(samples)
    while end:
        batches.append(samples[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def best_partition(samples: list[TrainingSample], tokens: int, share_prompts: bool) -> list[MicroBatch]:
    """Cut samples in the better of two orders: the longest first, which needs little padding, or group by group, which
    computes few prompts.
    """
    numbers: dict[tuple, int] = {}  # prompts are compared once, not for each batch that is considered
    for x in samples:
        x.prompt_number = numbers.setdefault(tuple(x.response.prompt), len(numbers))
    by_length = sorted(samples, key=lambda x: (-x.length, x.response.group, x.response.sample))
    by_group = sorted(samples, key=lambda x: (x.response.group, -x.length, x.response.sample))
    choices = [partition(by_length, tokens, share_prompts)]
    if share_prompts:
        choices.append(partition(by_group, tokens, share_prompts))
    return min(choices, key=lambda batches: sum(forward_tokens(batch, share_prompts) for batch in batches))


def shares_of(
    samples: list[TrainingSample], tokens: int, workers: int, share_prompts: bool = False
) -> list[list[MicroBatch]]:
    """Cut samples into micro-batches and deal them out, the heaviest first to the least loaded worker -> each worker's
    micro-batches. The result depends on the samples alone, not on their order or origin.
    """
    batches = best_partition(samples, tokens, share_prompts)
    sizes = [forward_tokens(batch, share_prompts) for batch in batches]
    shares: list[list[MicroBatch]] = [[] for _ in range(workers)]
    load = [0] * workers
    for size, _, batch in sorted(zip(sizes, range(len(batches)), batches), key=lambda entry: (-entry[0], entry[1])):
        least = load.index(min(load))
        shares[least].append(batch)
        load[least] += batch_cost(1, size, tokens)
    return shares


# ---------------------------------------------------------------- a loop that survives a lack of memory


class MicroBatchSize:
    """How many tokens a micro-batch of this worker may have: it falls when memory runs out, for the rest of the run."""

    def __init__(self, config, rank: int):
        """config: train_grpo.Config."""
        self.wanted = config.micro_tokens
        self.tokens = config.micro_tokens
        self.rank = rank
        self.more_advice = "" if config.gradient_checkpointing else " or add --gradient-checkpointing"

    def halve(self, share: list[MicroBatch]) -> None:
        """Memory has run out with this share. Raises UserError where smaller micro-batches cannot help."""
        if max(len(batch) for batch in share) == 1:
            single = f"a single response of {share[0][0].length} tokens"
            raise UserError(f"out of memory in the update with {single}: lower --max-new{self.more_advice}")
        self.tokens //= 2
        again = f"it is done again with --micro-tokens {self.tokens}"
        tqdm.write(f"worker {self.rank}: out of memory in the update; {again}")

    def cannot_retry(self) -> UserError:
        """Return the error of a worker that may not do its part again alone."""
        return UserError(f"out of memory in the update: lower --micro-tokens {self.wanted}{self.more_advice}")


class MicroBatches:
    """One worker's share of a mini-batch, for a loop of this form:

        for batch in micro_batches:
            with micro_batches.retry_if_out_of_memory():
                (forward, backward, figures added to micro_batches.stats)

    If memory runs out in the body, gradients and figures are reset, the share is cut finer, and the loop begins again.
    The body should be a function call, whose tensors are freed when it fails.
    """

    def __init__(self, samples: list[TrainingSample], optimizer, worker):
        """worker: a train_grpo.Worker."""
        size = worker.micro_batch_size
        self.share_prompts = worker.layout.shares_prompts and not worker.config.gradient_checkpointing
        shares = shares_of(samples, size.wanted, worker.world_size, self.share_prompts)
        self.share = worker.layout.my_share(shares, worker.rank)
        self.optimizer = optimizer  # its gradients are what a failed try has added up
        self.size = size
        self.can_retry = worker.layout.can_retry
        self.stats = UpdateStats()
        self.failed = False

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            if self.size.tokens < self.size.wanted:
                samples = [x for batch in self.share for x in batch]
                self.share = shares_of(samples, self.size.tokens, 1, self.share_prompts)[0]
            self.stats = UpdateStats()
            self.failed = False
            for batch in self.share:
                yield batch
                if self.failed:
                    break
            if not self.failed:
                return
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            if not self.can_retry:
                raise self.size.cannot_retry()
            self.size.halve(self.share)

    @contextlib.contextmanager
    def retry_if_out_of_memory(self) -> Iterator[None]:
        """Note that memory ran out in the block, instead of ending the run."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.failed = True


def per_token(batch: MicroBatch, device) -> tuple[torch.Tensor, ...]:
    """Return the rollout's log-probability, the advantage and the weight of each response token, all (N,)."""
    rollout = torch.cat([x.response.logprobs for x in batch])
    counts = torch.tensor([len(x.response.tokens) for x in batch])
    advantage = torch.tensor([x.advantage for x in batch]).repeat_interleave(counts)
    weight = torch.tensor([x.weight for x in batch]).repeat_interleave(counts)
    return tuple(send(column, device) for column in (rollout, advantage, weight))
