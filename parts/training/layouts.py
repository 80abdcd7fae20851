"""How the policy lies on the workers: whole on each (`ReplicatedLayout`), or frozen with LoRA adapters that learn
(`LoRALayout`). fsdp.py has a third layout, which spreads it over the workers.
"""

import copy

import torch

from parts.engine.model_loading import actor_dtype, in_dtype
from parts.training import lora as adapters
from parts.training.logprobs import forward_bytes, logprobs_at
from train_grpo import Alone


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
