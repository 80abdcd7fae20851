"""The loop's view of its workers: one process (`Alone`). tlt.Team has the same members for many.

`layout` says how the policy lies on them: whole on each (`Replicated`), or spread (shard.Sharded).
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from parts import adapters
from parts.common import pick_device
from parts.interfaces import Group, Response, Strategy
from parts.loading import actor_dtype, in_dtype
from parts.logprobs import forward_bytes, logprobs_at
from report import Clock, WorkerNotes
from rollout import Engine


def trainable(model) -> list[torch.nn.Parameter]:
    """The weights that learn."""
    return [p for p in model.parameters() if p.requires_grad]


class Replicated:
    """How the policy lies on the workers: whole on each of them."""

    can_retry = True  # a worker that runs out of memory may do its part again without the others

    def __init__(self, actor_dtype: str = "auto"):
        """actor_dtype: as Config.actor_dtype."""
        self.actor_dtype = actor_dtype

    def place(self, model, device: str):
        """-> (the policy that learns, the one that generates: a bfloat16 copy, or in float32 the policy itself)."""
        model.to(device)
        if actor_dtype(self.actor_dtype, device) == torch.float32:
            return model, model
        return model, self.copy_of(model, device)

    def copy_of(self, model, device: str):
        """A copy of the policy to generate with, in its own type."""
        return in_dtype(copy.deepcopy(model).requires_grad_(False), actor_dtype(self.actor_dtype, device))

    def logprobs_at(self, model, ids, picked, targets, temperature) -> tuple[torch.Tensor, torch.Tensor]:
        """As the function of this name."""
        return logprobs_at(model, ids, picked, targets, temperature)

    def my_share(self, shares: list[list], rank: int) -> list:
        """This worker's micro-batches."""
        return shares[rank]

    def sum_and_clip(self, model, limit: float, team: "Alone") -> float:
        """Sum the gradients over the workers, scale them to a norm of at most `limit` -> their norm before."""
        for p in trainable(model):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        team.all_reduce([p.grad for p in trainable(model)])
        return torch.nn.utils.clip_grad_norm_(trainable(model), limit).item()

    def refresh(self, actor, model) -> None:
        """After an update: what generates becomes what has learned."""
        if actor is not model:
            for a, p in zip(actor.parameters(), model.parameters()):
                a.data.copy_(p.data)

    def update_bytes(self, model, tokens: int) -> int:
        """Memory that an update takes beside the engine: gradients, and what a micro-batch of so many tokens needs; of
        that at most 8 GB, since an update that runs out of memory is cut finer.
        """
        weights = sum(p.numel() for p in trainable(model))
        return 4 * weights + min(8 << 30, forward_bytes(model, tokens))

    def moment_bytes(self, model) -> int:
        """Memory that Adam's moments take from the first update on."""
        return 8 * sum(p.numel() for p in trainable(model))


class Adapted(Replicated):
    """Adapters learn beside a policy that stays as it was (parts/adapters.py); the copy that generates has them
    merged.
    """

    def __init__(self, config):
        """config: train_grpo.Config."""
        super().__init__(config.actor_dtype)
        self.rank = config.lora_rank
        self.seed = config.seed

    def place(self, model, device):
        model.to(device)
        actor = self.copy_of(model, device)
        adapters.add(model, self.rank, self.seed)
        return model, actor

    def refresh(self, actor, model):
        adapters.merge_into(actor, model)


class Alone:
    """One process."""

    rank = 0
    size = 1

    def __init__(self, config, tell: Callable[[str], None] | None = None):
        """config: train_grpo.Config; tell: see report.Clock."""
        self.config = config
        self.clock = Clock(tell)
        self.micro_tokens = config.micro_tokens  # falls when memory runs out
        self.tis_cap = max(0.0, config.tis_cap)  # 0: no correction; -1 is settled when it is known what generates
        self.device = pick_device(config.device)
        self.layout = Adapted(config) if config.lora_rank else Replicated(config.actor_dtype)
        self.start: Path | None = None  # the checkpoint that the run goes on from

    def loading(self, name: str) -> contextlib.AbstractContextManager:
        """Around the loading of a model, a folder or a hub name."""
        return contextlib.nullcontext()

    def engine(self, actor, stop: set[int], slots: int, reserve_bytes: int) -> Engine:
        """The engine that generates."""
        return Engine(actor, stop, slots, reserve_bytes=reserve_bytes)

    def idle_bytes(self) -> int:
        """Memory that is needed while others still generate."""
        return 0

    def rollout(self, engine: Engine, groups: list[Group], sampling, grade, progress, learn: bool) -> list[Response]:
        """All responses to the groups, graded, ordered by (group, sample): the same list on every worker.

        progress(number so far) hears of each; learn: whether a drafter may be trained on them (not on held-out ones).
        """
        responses = []
        for response in self.work(engine, groups, sampling, grade):
            responses.append(response)
            progress(len(responses))
        return sorted(responses, key=lambda r: (r.group, r.sample))

    def work(
        self, engine: Engine, groups: Iterable[Group], sampling, grade, strategy: Strategy | None = None
    ) -> Iterator[Response]:
        """This worker's responses, graded as they end."""
        self.clock.enter("rollout")
        for response in engine.generate(groups, sampling, strategy):
            self.clock.enter("reward")
            grade(response)
            yield response
            self.clock.enter("rollout")

    def notes(self) -> WorkerNotes | None:
        """What this worker did for speculation since the last call, for the metrics."""
        return None

    def save(self, folder: Path) -> None:
        """Into each checkpoint: whatever the workers keep beside the policy. Only the worker that writes is asked."""

    def deploy(self, folder: Path) -> None:
        """Into the final policy's folder: whatever else serves it."""

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Add up each tensor over the workers, in place."""

    def gather(self, value) -> list:
        """The values of all workers, by rank."""
        return [value]
