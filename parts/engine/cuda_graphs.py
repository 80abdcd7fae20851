"""Rounds that a GPU can replay: few shapes, and a CUDA graph for each.

A round of a small model is a thousand small kernels. Each costs the host some 5 us to launch, whatever its size, so at
small batches the GPU waits for the host nearly all the time. A CUDA graph records the kernels of a round once, with
their addresses and sizes, and then replays them with one call.

So everything that a round depends on must be either a size in its `RoundShape`, for which a graph of its own is
recorded, or stand in a buffer that stays where it is: the engine's slots, the weights. And there must be few shapes:

    batch_size      running sequences, rounded up to 1, 2, 4, 8 ... slots
    kv_len          cache entries that anyone reads, rounded up to multiples of 128; from 2,048 on, to multiples of an
                    eighth of the power of two below
    catch_up_len    entries that the drafter computes first, rounded up to a power of two above the draft length
    plan            the drafting method and the draft length

Slots beyond the running sequences compute on whatever is in them, and their lengths stay. Entries beyond the length of
a sequence are masked. So the tokens are those of rounds of exact size; only the time differs.

The first round of a shape runs as usual, which also sets up what kernels set up when they are first called. The second
is recorded. Both take longer than those that follow, so strategies do not learn from their times. Prompts, long
catch-ups, n-gram drafts and the rules for study always run as usual. The paper calls the recorded rounds a graph pool.

Left out: graphs of prompts, and recording ahead of time (the batch shrinks as a rollout goes on, so the largest shapes
come first by themselves, and the memory that all graphs share is as large as it will be).
"""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from parts.cli import reason
from parts.devices import is_gpu
from parts.engine.interfaces import DraftPlan
from parts.engine.sampling import Sampling

KV_STEP = 128  # cache entries
MAX_CATCH_UP = 16  # entries; longer catch-ups are rare, and run as usual
# A rollout to 16,384 tokens by 64 responses, whose draft length varies, records 100 to 110 shapes. With fewer graphs
# than that, each shape would be dropped before the next rollout comes to it, and recorded again.
MAX_GRAPHS = 192


class RoundShape(NamedTuple):
    """Everything that the host decides about a round."""

    batch_size: int  # B
    kv_len: int  # cache entries that are read: the valid ones of the longest sequence, `cur` and k draft tokens
    catch_up_len: int  # entries that the drafter of this round catches up with
    plan: DraftPlan
    sampling: Sampling


def power_above(number: int) -> int:
    """Return the smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


def bucketed_shape(shape: RoundShape, slots: int, max_len: int) -> RoundShape:
    """Return the shape in whose round this one fits. slots: how many there are; max_len: entries of each."""
    step = max(KV_STEP, (1 << shape.kv_len.bit_length()) // 16)
    kv_len = min(max_len, -(-shape.kv_len // step) * step)
    catch_up_len = shape.catch_up_len
    if 0 < catch_up_len <= MAX_CATCH_UP:
        catch_up_len = power_above(max(catch_up_len, shape.plan.k + 1))
    return shape._replace(
        batch_size=min(slots, power_above(shape.batch_size)), kv_len=kv_len, catch_up_len=catch_up_len
    )


# ---------------------------------------------------------------- timing


class RoundTimer:
    """Measures the drafting part of a round: from its begin until the draft tokens are there. On a GPU by the GPU's own
    clock, since the host is far ahead of it; a graph records the events together with the kernels.
    """

    def __init__(self, device: torch.device):
        self.times = [0.0, 0.0]
        self.events: list = []
        if is_gpu(device):
            self.events = [torch.cuda.Event(enable_timing=True, external=True) for _ in self.times]

    def round_begins(self) -> None:
        """Mark the begin of a round."""
        self.mark(0)

    def drafts_ready(self) -> None:
        """Mark the end of drafting."""
        self.mark(1)

    def mark(self, i: int) -> None:
        """Record moment i."""
        if self.events:
            self.events[i].record()
        else:
            self.times[i] = time.perf_counter()

    def draft_seconds(self) -> float:
        """Return the seconds between the two marks. The host must have waited for the round."""
        if self.events:
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.times[1] - self.times[0]


# ---------------------------------------------------------------- graphs


class GraphRecorder:
    """Records CUDA graphs. Only one replays at a time, so they share their memory."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.newest: torch.cuda.CUDAGraph | None = None  # kept: a pool that all graphs have left takes no new one

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record the kernels of a function -> a function that replays them, each time into the same result tensor.

        The function is called here, but its kernels do not run yet.
        """
        graph = torch.cuda.CUDAGraph()
        # A recording that fails does not leave its stream, so the stream around it is restored here. And tensors that
        # torch itself makes as it begins are changed by later recordings, in and out of inference mode.
        here, outside = torch.cuda.stream(torch.cuda.current_stream()), torch.inference_mode(False)
        recording = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        with here, outside, recording, torch.inference_mode():
            out = function()
        self.newest = graph

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class GraphPool:
    """A recorded round for each shape that comes more than once."""

    def __init__(self, compute: Callable[[RoundShape], torch.Tensor], record: Callable | None = None):
        """compute: runs a round; it reads its shape and tensors that stay where they are, and nothing else. record: a
        GraphRecorder, which is the default.
        """
        self.compute = compute
        self.record = record or GraphRecorder()
        self.broken = False
        self.warmup = False  # the last round took longer than others of its shape: it was the first, or was recorded
        self.replays: dict[RoundShape, Callable[[], torch.Tensor]] = {}  # the one used last stands last
        self.seen: set[RoundShape] = set()

    def clear(self) -> None:
        """Drop all recordings: something that they read has another address now."""
        self.replays = {}
        self.seen = set()

    def run(self, shape: RoundShape, eager: bool = False) -> torch.Tensor:
        """Run a round of this shape, replayed if possible. eager: it cannot be."""
        self.warmup = False
        if eager or self.broken or shape.catch_up_len > MAX_CATCH_UP:
            return self.compute(shape)
        self.warmup = shape not in self.replays
        if shape not in self.seen:
            self.seen.add(shape)
            return self.compute(shape)
        replay = self.replays.pop(shape, None) or self.recorded(shape)
        if replay is None:
            return self.compute(shape)
        self.replays[shape] = replay
        return replay()

    def recorded(self, shape: RoundShape) -> Callable[[], torch.Tensor] | None:
        """Record a round of this shape. Where that fails, return None after one line on stderr; then nothing is
        recorded again.
        """
        if len(self.replays) == MAX_GRAPHS:
            del self.replays[next(iter(self.replays))]  # the least recently used
        try:
            return self.record(lambda: self.compute(shape))
        except RuntimeError as error:  # also torch's own: out of memory, a kernel that needs the host
            cause = error.__context__ or error  # a recording that has failed fails once more when it ends
            place = traceback.extract_tb(cause.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            problem = f"{reason(cause)} ({where})"
            print(f"rounds are not replayed as CUDA graphs, and slower for it: {problem}", file=sys.stderr)
            self.broken = True
            self.clear()
            return None
