"""Policies that do not fit a GPU whole: FSDP2 spreads fp32 weights, gradients and Adam's moments over the workers.

Each worker keeps a slice of every weight, and gathers a layer when it computes with it. The actor that generates is a
whole copy on each worker, in bfloat16 on a GPU (--actor-dtype). For 7.6 billion weights on 8 GPUs: 16 bytes x 7.6e9 =
122 GB become 15 GB a GPU, the copy is 15 GB.

Each forward gathers weights from all workers, so all must do equally many: shares are filled up with a sample of weight
0. For the same reason no worker can do its part again alone when memory runs out.
"""

import types
from dataclasses import replace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from parts.training.layouts import ReplicatedLayout
from parts.training.logprobs import forward_bytes, logprobs_at, whole_token_scores


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is spread over the workers as a whole. All of them take part."""
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


class FSDPLayout(ReplicatedLayout):
    """The policy is spread over the workers. See ReplicatedLayout for what the methods promise."""

    can_retry = False
    shares_prompts = False  # one forward for each micro-batch, equally many on all workers

    def __init__(self, workers: int, device_type: str, actor_dtype: str = "auto"):
        super().__init__(actor_dtype)
        self.workers = workers
        self.device_type = device_type  # cpu or cuda

    def place(self, model, device):
        actor = self.copy_of(model, device).to(device)
        self.spread(model)
        return model, actor

    def place_reference(self, model, device):
        self.spread(model.requires_grad_(False))
        return model

    def spread(self, model) -> None:
        """Leave a slice of each weight on this worker."""
        mesh = init_device_mesh(self.device_type, (self.workers,))
        for part in (*model.get_decoder().layers, model):
            fully_shard(part, mesh=mesh)  # moves its slice to the GPU
            # sums, not means: the weights of the loss are those of the whole mini-batch
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        # FSDP gathers weights around a method of the module itself
        model.logprobs_at = types.MethodType(logprobs_at, model)
        register_fsdp_forward_method(model, "logprobs_at")

    def token_scores(self, model, responses, temperature):
        def gathered(model, *inputs):
            return model.logprobs_at(*inputs)

        return whole_token_scores(model, responses, temperature, gathered)

    def my_share(self, shares, rank):
        """Return this worker's micro-batches, and as many of one sample of weight 0 as make all shares equally long."""
        share = shares[rank]
        missing = max(len(other) for other in shares) - len(share)
        if not missing:
            return share
        samples = [x for other in shares for batch in other for x in batch]
        filler = replace(min(samples, key=lambda x: x.length), advantage=0.0, weight=0.0)
        return share + [[filler]] * missing

    def sum_and_clip(self, model, max_norm, worker):
        """Clip the gradients, which FSDP has summed -> their norm before."""
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()

    def refresh_actor(self, actor, model):
        for a, p in zip(actor.parameters(), model.parameters()):
            a.data.copy_(full_tensor(p).data)

    def local(self, p):
        return p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p

    def update_bytes(self, model, tokens):
        """Return the memory of an update. Nothing can be cut finer here, so all of a micro-batch must fit."""
        weights = sum(p.numel() for p in model.parameters()) // self.workers
        return 4 * weights + forward_bytes(model, tokens)

    def moment_bytes(self, model):
        return super().moment_bytes(model) // self.workers
