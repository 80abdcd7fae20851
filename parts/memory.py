"""How many rows the memory of a GPU holds."""

import sys

import torch

from parts.common import UserError


def free_memory(device: torch.device) -> int | None:
    """Bytes of GPU memory that torch can still hand out, of this process's share if several have the same GPU; None on
    a CPU, where memory is taken as it is touched.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share) - torch.cuda.memory_reserved(device))


def rows_that_fit(wanted: int, room: int, row_bytes: int, free: float, reserved: float) -> int:
    """Rows of `room` tokens: as many as wanted, or as four fifths of the free bytes, less the reserved ones, hold. Says
    so if they are fewer. Raises UserError if there is no room for one.
    """
    fits = int((free * 0.8 - reserved) / row_bytes)
    sizes = f"{row_bytes / 1e9:.3f} GB each, {free / 1e9:.1f} GB are free"
    if fits < 1 and reserved:
        taken = f"{reserved / 1e9:.1f} GB are for the update"
        raise UserError(f"no row of {room} tokens fits ({sizes}, {taken}): lower --micro-tokens or --max-new")
    if fits < 1:
        raise UserError(f"no row of {room} tokens fits ({sizes}): lower --max-new")
    if fits < wanted:
        print(f"memory holds {fits} rows of {room} tokens, not {wanted} ({sizes})", file=sys.stderr)
    return min(wanted, fits)
