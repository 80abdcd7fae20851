"""The device to compute on, and how much memory it has left."""

import torch

from parts.cli import UserError

# ---------------------------------------------------------------- folders and files


def pick_device(name: str = "auto") -> str:
    """cuda or cpu. name: auto takes a GPU if there is one. Raises UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


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
