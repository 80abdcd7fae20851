"""Joining the other workers: the process group, and this worker's GPU.

accelerate gives worker i of a host the GPU i modulo their number. Where several workers have the same GPU they divide
its memory, and talk through gloo, on the host (parts/sums.py): NCCL refuses two of them on one device.
"""

import os
from datetime import timedelta

import torch

HOUR = 3600.0  # after so many seconds a collective gives up; loading a model is not waited for in one


def join(config):
    """Join them -> accelerate's Accelerator, which knows this worker's rank and device. config: tlt.TLTConfig."""
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
