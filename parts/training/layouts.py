"""How the policy lies on the workers: whole on each (`ReplicatedLayout`), or frozen with LoRA adapters that learn
(`LoRALayout`). fsdp.py has a third layout, which spreads it over the workers.

The update asks its layout for everything that depends on this, so train_grpo.py knows nothing of LoRA and FSDP.
"""

import copy

import torch

from parts.engine.interfaces import Response
from parts.engine.model_loading import actor_dtype, cast_weights, find_not_finite
from parts.training import lora
from parts.training.logprobs import forward_bytes, token_scores


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    """Return the weights that learn."""
    return [p for p in model.parameters() if p.requires_grad]


class ReplicatedLayout:
    """The policy is whole on each worker."""

    can_retry = True  # a worker that runs out of memory may do its part again without the others
    shares_prompts = True  # in the update, see logprobs.hidden_with_prompts_once

    def __init__(self, actor_dtype: str = "auto"):
        """actor_dtype: as Config.actor_dtype."""
        self.actor_dtype = actor_dtype

    def place(self, model, device: str):
        """Return the policy that learns, and the actor that generates: a bfloat16 copy, or in float32 the policy
        itself.
        """
        model.to(device)
        if actor_dtype(self.actor_dtype, device) == torch.float32:
            return model, model
        return model, self.copy_of(model, device)

    def place_reference(self, model, device: str):
        """Return the frozen policy that the KL penalty refers to."""
        return model.to(device).requires_grad_(False)

    def copy_of(self, model, device: str):
        """Return a copy of the policy to generate with, in its own type."""
        return cast_weights(copy.deepcopy(model).requires_grad_(False), actor_dtype(self.actor_dtype, device))

    def token_scores(self, model, responses: list[Response], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probability and entropy of every response token, both (N,); see logprobs.token_scores."""
        return token_scores(model, responses, temperature)

    def my_share(self, shares: list[list], rank: int) -> list:
        """Return this worker's micro-batches."""
        return shares[rank]

    def sum_and_clip(self, model, max_norm: float, worker) -> float:
        """Sum the gradients over the workers, scale them to a norm of at most max_norm -> their norm before."""
        for p in trainable_parameters(model):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        worker.all_reduce([p.grad for p in trainable_parameters(model)])
        return torch.nn.utils.clip_grad_norm_(trainable_parameters(model), max_norm).item()

    def refresh_actor(self, actor, model) -> None:
        """After an update: copy the weights that have learned into the actor."""
        if actor is not model:
            for a, p in zip(actor.parameters(), model.parameters()):
                a.data.copy_(p.data)

    def find_broken(self, model) -> str | None:
        """Return the name of a weight on this worker that holds nan or inf; None if there is none."""
        return find_not_finite((name, self.local(p)) for name, p in model.named_parameters())

    def local(self, p: torch.Tensor) -> torch.Tensor:
        """Return the part of a weight that lies on this worker."""
        return p

    def update_bytes(self, model, tokens: int) -> int:
        """Return the memory that an update takes beside the engine: gradients, and what a micro-batch of so many tokens
        needs; of that at most 8 GB, since an update that runs out of memory is cut finer.
        """
        weights = sum(p.numel() for p in trainable_parameters(model))
        return 4 * weights + min(8 << 30, forward_bytes(model, tokens))

    def moment_bytes(self, model) -> int:
        """Return the memory that Adam's moments take from the first update on."""
        return 8 * sum(p.numel() for p in trainable_parameters(model))


class LoRALayout(ReplicatedLayout):
    """Adapters learn beside a policy that stays as it was (lora.py); the actor is a copy that has them merged."""

    def __init__(self, config):
        """config: train_grpo.Config."""
        super().__init__(config.actor_dtype)
        self.rank = config.lora_rank
        self.seed = config.seed

    def place(self, model, device):
        model.to(device)
        actor = self.copy_of(model, device)
        lora.add(model, self.rank, self.seed)
        return model.eval(), actor

    def refresh_actor(self, actor, model):
        lora.merge_into(actor, model)
