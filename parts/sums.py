"""Sums over the workers, in place: in messages of a bounded size, so that they need little memory beside the tensors.

One message for all gradients would be a second copy of them, and a message for each tensor hundreds of small ones.
"""

from collections.abc import Iterator

import torch

MESSAGE = 1 << 23  # numbers in a message at most: 32 MB in float32


def views_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that together are the tensor, each of at most MESSAGE numbers. How it is cut depends on its shape alone:
    workers whose tensors lie differently in memory still send the same messages.
    """
    if tensor.numel() <= MESSAGE:
        yield tensor
        return
    longest = max(range(tensor.ndim), key=lambda axis: tensor.shape[axis])
    for half in tensor.chunk(2, longest):
        yield from views_of(half)


@torch.no_grad()
def sum_up(tensors: list[torch.Tensor]) -> None:
    """Add up each tensor over all workers of torch's process group, in place; shapes and order are the same on all."""
    message: list[torch.Tensor] = []
    room = MESSAGE
    for tensor in tensors:
        for view in views_of(tensor):
            if view.numel() > room:
                send(message)
                message = []
                room = MESSAGE
            message.append(view)
            room -= view.numel()
    send(message)


def send(message: list[torch.Tensor]) -> None:
    """Add up these tensors over the workers. One that is contiguous and alone needs no copy."""
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
    """Add it up over the workers. Those that share a GPU talk through gloo, which lives on the host."""
    host = tensor.cpu() if torch.distributed.get_backend() == "gloo" else tensor
    torch.distributed.all_reduce(host)
    if host is not tensor:
        tensor.copy_(host)
