"""Worker processes on this host, watched over: when one dies or hangs, the others are stopped and the user is told
which one it was and what it was doing. Nothing is left behind, however it ends.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from parts.cli import UserError, script_name
from parts.running.timers import STATES

SLOW_STATES = ("start", "checkpoint")  # loading a model or writing a checkpoint may take long


class Heartbeat:
    """What each worker is doing, and since when it has said nothing: in shared memory, for the parent."""

    NAMES = ("start", *STATES)

    def __init__(self, count: int, context=None):
        """context: of multiprocessing."""
        context = context or mp.get_context("spawn")
        self.state = context.Array("i", count, lock=False)
        self.heard = context.Array("d", [time.time()] * count, lock=False)

    def tell(self, rank: int, state: str) -> None:
        """A worker says what it does now."""
        self.state[rank] = self.NAMES.index(state)
        self.heard[rank] = time.time()

    def doing(self, rank: int) -> str:
        """The state that a worker was in when it was last heard of."""
        return self.NAMES[self.state[rank]]

    def silent(self, patience: float) -> list[int]:
        """Workers that have said nothing for so many seconds.

        Those that wait for a hung one in a collective are silent, too. So are those that wait while another one loads
        the model or writes a checkpoint; then nobody counts as silent.
        """
        ranks = range(len(self.heard))
        if any(self.doing(rank) in SLOW_STATES for rank in ranks):
            return []
        return [rank for rank in ranks if time.time() - self.heard[rank] > patience]


def child(rank: int, work: Callable, config, count: int, port: int, threads: int, mistakes, pulse: Heartbeat) -> None:
    """A worker process: set what torchrun would set, and never outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def follow_the_parent() -> None:
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_the_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads)
    try:
        work(config, lambda state: pulse.tell(rank, state))
    except RuntimeError as error:
        if "onnection" in str(error):  # another worker is gone: let its reason be heard first
            time.sleep(3)
        raise
    except UserError as error:
        mistakes.put(str(error))  # several workers may make the same mistake: the parent prints one line
        os._exit(2)  # at once: the others may wait for this worker in a collective


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(work: Callable, config, count: int, patience: float, gpus: bool) -> None:
    """Run work(config, tell) in `count` processes. Raises UserError with the first mistake of a worker.

    patience: seconds without a word after which a worker counts as hung. gpus: whether the workers use them. Without
    GPUs (on Linux) the workers are forks of this process: they need not import everything again, which takes seconds.
    CUDA cannot be used in a fork, so there each worker is a new process.
    """
    method = "spawn" if gpus or sys.platform != "linux" else "fork"
    # nobody divides the cores; oversubscribed, they are ten times slower
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a worker that ends makes the others print C++ stacks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    mistakes = mp.get_context(method).SimpleQueue()
    pulse = Heartbeat(count, mp.get_context(method))
    arguments = (work, config, count, free_port(), threads, mistakes, pulse)
    context = mp.start_processes(child, arguments, nprocs=count, join=False, start_method=method)
    try:
        # when one has died, a hung one gets 3 s, not torch's 30
        while not context.join(timeout=1.0, grace_period=3):
            hung = [rank for rank in pulse.silent(patience) if context.processes[rank].is_alive()]
            if hung:
                who = ", ".join(f"worker {rank} ({pulse.doing(rank)})" for rank in hung)
                stop(f"no sign of life for {patience:g} s from {who}; all were stopped. "
                     "Continue with --resume; if it was only slow, with a larger --patience.")  # fmt: skip
    except mp.ProcessExitedException as error:
        if not mistakes.empty():
            raise UserError(mistakes.get()) from error
        cause = f"signal {error.signal_name}" if error.signal_name else f"exit status {error.exit_code}"
        who = f"worker {error.error_index} died ({cause}) in state {pulse.doing(error.error_index)}"
        stop(f"{who}; the others were stopped. Continue with --resume.")
    except mp.ProcessRaisedException as error:
        who = f"worker {error.error_index} failed in state {pulse.doing(error.error_index)}"
        stop(f"{who}; the others were stopped. Continue with --resume.\n{error}")
    finally:  # whatever happened, Ctrl-C included
        end(context.processes)


def stop(why: str) -> None:
    """End this script with exit status 1."""
    sys.exit(f"{script_name()}: {why}")


def end(processes: list) -> None:
    """Nobody stays."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
