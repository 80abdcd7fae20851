"""Between workers: joining the process group, and sums over all workers.

Joining. accelerate gives worker i of a host the GPU i modulo their number. Workers that have the same GPU divide its
memory, and communicate through gloo, on the host: NCCL refuses two of them on one device.

Sums are made in place, in messages of a bounded size, so that they need little memory beside the tensors. One message
for all gradients would be a second copy of them, and one for each tensor hundreds of small ones.
"""

import os
from collections.abc import Iterator
from datetime import timedelta

import torch

HOUR = 3600.0  # seconds after which a collective times out; no collective waits for a model to be loaded
MESSAGE = 1 << 23  # numbers in a message at most: 32 MB in float32


def join(config):
    """Join the process group -> accelerate's Accelerator, which knows this worker's rank and device. config:
    tlt.TLTConfig.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    shared = config.gpus and config.workers_per_gpu > 1
    group = {"timeout": timedelta(seconds=min(max(HOUR, 2 * config.patience), 24 * HOUR))}
    if shared and "RANK" in os.environ:
        group["backend"] = "gloo"
    accelerator = Accelerator(cpu=not config.gpus, kwargs_handlers=[InitProcessGroupKwargs(**group)])
    if shared:
        torch.cuda.set_per_process_memory_fraction(1 / config.workers_per_gpu, accelerator.device)
    return accelerator


def views_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views that together are the tensor, each of at most MESSAGE numbers. The cut depends on the shape alone, so
    workers whose tensors have different strides still send the same messages.
    """
    if tensor.numel() <= MESSAGE:
        yield tensor
        return
    longest = max(range(tensor.ndim), key=lambda axis: tensor.shape[axis])
    for half in tensor.chunk(2, longest):
        yield from views_of(half)


@torch.no_grad()
def sum_up(tensors: list[torch.Tensor]) -> None:
    """Sum each tensor over all workers of torch's process group, in place; shapes and order must be the same on all."""
    message: list[torch.Tensor] = []
    space = MESSAGE
    for tensor in tensors:
        for view in views_of(tensor):
            if view.numel() > space:
                send(message)
                message = []
                space = MESSAGE
            message.append(view)
            space -= view.numel()
    send(message)


def send(message: list[torch.Tensor]) -> None:
    """Sum these tensors over the workers in one message. A single contiguous tensor needs no copy."""
    if len(message) == 1 and message[0].is_contiguous():
        all_reduce(message[0])
        return
    if not message:
        return
    flat = torch.cat([view.flatten() for view in message])
    all_reduce(flat)
    for view, part in zip(message, flat.split([view.numel() for view in message])):
        view.copy_(part.view_as(view))


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum a tensor over the workers. Workers that share a GPU use gloo, which works on the host."""
    host = tensor.cpu() if torch.distributed.get_backend() == "gloo" else tensor
    torch.distributed.all_reduce(host)
    if host is not tensor:
        tensor.copy_(host)
