"""Starts the worker processes of this host and watches over them.

When one dies or hangs, the others are stopped, and the user is told which one it was and what it was doing. No process
is left behind, however it ends.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.multiprocessing as mp

from parts.cli import UserError, script_name
from parts.running.timers import STATES

SLOW_STATES = ("start", "checkpoint")  # loading a model or writing a checkpoint may take long


class Heartbeat:
    """The state of each worker, and the time of its last heartbeat, in shared memory, for the parent process."""

    NAMES = ("start", *STATES)

    def __init__(self, count: int, context=None):
        """context: of multiprocessing."""
        context = context or mp.get_context("spawn")
        self.states = context.Array("i", count, lock=False)
        self.times = context.Array("d", [time.time()] * count, lock=False)

    def beat(self, rank: int, state: str) -> None:
        """A worker enters a state."""
        self.states[rank] = self.NAMES.index(state)
        self.times[rank] = time.time()

    def state(self, rank: int) -> str:
        """Return the state of a worker at its last heartbeat."""
        return self.NAMES[self.states[rank]]

    def overdue(self, patience: float) -> list[int]:
        """Return the workers whose last heartbeat is more than `patience` seconds ago.

        Workers that wait for a hung one in a collective are overdue, too. So are those that wait while another one
        loads the model or writes a checkpoint; then none counts as overdue.
        """
        ranks = range(len(self.times))
        if any(self.state(rank) in SLOW_STATES for rank in ranks):
            return []
        return [rank for rank in ranks if time.time() - self.times[rank] > patience]


def exit_with_the_parent() -> None:
    """Let this child process end as soon as its parent has ended, even if the parent was killed; Ctrl-C is for the
    parent alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def process_pool(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of so many processes; None: one per core. Where the block ends by Ctrl-C or an error, they end in the
    middle of their tasks; by itself a pool would wait until these are done.
    """
    spawn = mp.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=exit_with_the_parent) as pool:
        try:
            yield pool
        except BaseException:
            processes = list((pool._processes or {}).values())  # from Python 3.14 on: pool.terminate_workers()
            pool.shutdown(wait=False, cancel_futures=True)
            end(processes)
            raise


def child(rank: int, work: Callable, config, count: int, port: int, threads: int, errors, heartbeat: Heartbeat) -> None:
    """Run a worker process: set what torchrun would set, and never outlive the parent."""
    exit_with_the_parent()
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
        work(config, lambda state: heartbeat.beat(rank, state))
    except RuntimeError as error:
        if "onnection" in str(error):  # another worker is gone: let its error be reported first
            time.sleep(3)
        raise
    except UserError as error:
        errors.put(str(error))  # several workers may have the same error: the parent prints one line
        os._exit(2)  # at once: the others may wait for this worker in a collective


def free_port() -> int:
    """Return a free port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(work: Callable, config, count: int, patience: float, gpus: bool) -> None:
    """Run work(config, heartbeat) in `count` processes. Raises UserError with the first one of a worker.

    patience: seconds without a heartbeat after which a worker counts as hung. gpus: whether the workers use them.
    Without GPUs (on Linux) the workers are forks of this process: they need not import everything again, which takes
    seconds. CUDA cannot be used in a fork, so there each worker is a new process.
    """
    method = "spawn" if gpus or sys.platform != "linux" else "fork"
    # torch would use all cores in each worker; oversubscribed, they are ten times slower
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the others print C++ stacks when a worker ends
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    errors = mp.get_context(method).SimpleQueue()
    heartbeat = Heartbeat(count, mp.get_context(method))
    arguments = (work, config, count, free_port(), threads, errors, heartbeat)
    context = mp.start_processes(child, arguments, nprocs=count, join=False, start_method=method)
    try:
        # when one has died, a hung one gets 3 s instead of torch's 30
        while not context.join(timeout=1.0, grace_period=3):
            hung = [rank for rank in heartbeat.overdue(patience) if context.processes[rank].is_alive()]
            if hung:
                workers = ", ".join(f"worker {rank} ({heartbeat.state(rank)})" for rank in hung)
                advice = "Continue with --resume; if it was only slow, with a larger --patience."
                stop(f"no heartbeat for {patience:g} s from {workers}; all were stopped. {advice}")
    except mp.ProcessExitedException as error:
        if not errors.empty():
            raise UserError(errors.get()) from error
        cause = f"signal {error.signal_name}" if error.signal_name else f"exit status {error.exit_code}"
        worker = f"worker {error.error_index} died ({cause}) in state {heartbeat.state(error.error_index)}"
        stop(f"{worker}; the others were stopped. Continue with --resume.")
    except mp.ProcessRaisedException as error:
        worker = f"worker {error.error_index} failed in state {heartbeat.state(error.error_index)}"
        stop(f"{worker}; the others were stopped. Continue with --resume.\n{error}")
    finally:  # whatever happened, Ctrl-C included
        end(context.processes)


def stop(reason: str) -> None:
    """End this script with exit status 1."""
    sys.exit(f"{script_name()}: {reason}")


def end(processes: list) -> None:
    """End all processes."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
