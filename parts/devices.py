"""The device to compute on, how much memory it has left, and what a process does with memory that it has freed."""

import ctypes

import torch

from parts.cli import UserError

GPU_TYPES = {"cuda"}  # tests add a device of their own that stands for a GPU


def pick_device(name: str = "auto") -> str:
    """Return cuda or cpu. name: auto takes a GPU if there is one. Raises UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def is_gpu(device: torch.device | str) -> bool:
    """Return whether the device is a GPU: kernels are launched ahead of the host, and memory is limited."""
    return torch.device(device).type in GPU_TYPES


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return the host's tensor on the device. On a GPU the host does not wait until it is there: CUDA has its own copy
    when this returns, so the tensor may be changed or freed. Never for copies in the other direction.
    """
    return tensor.to(device, non_blocking=True)


def has_bfloat16_arithmetic() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 (AVX512_BF16, AMX). Others convert, and are slower."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees. glibc gives large blocks back to the kernel, which must clear
    each page of the next one: an update of a language model on a CPU has hundreds of thousands of such pages. Elsewhere
    than on Linux nothing changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)  # bytes: smaller blocks come from the heap
    mallopt(M_TRIM_THRESHOLD, -1)  # the heap does not shrink


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that torch can still hand out, of this process's share if several have the same
    GPU; None on a CPU, where memory is taken as it is touched.
    """
    if not is_gpu(device):
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share) - torch.cuda.memory_reserved(device))
