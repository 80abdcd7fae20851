"""Rounds that a GPU can replay: few sizes, and a CUDA graph for each.

A round of a small model is a thousand small kernels. Each costs the host some 5 us to launch, whatever its size, so at
small batches the GPU waits for the host nearly all the time. A CUDA graph records the kernels of a round once, with
their addresses and sizes, and then replays them with one call.

So all that a round depends on must be either a size in its `Shape`, for which a graph of its own is recorded, or stand
in a buffer that stays where it is: the engine's rows, the weights. And there must be few shapes:

    rows      live rows, rounded up to 1, 2, 4, 8 ... slots
    view      cached tokens that anyone looks at, rounded up to multiples of 128; from 2,048 on, to multiples of an
              eighth of the power of two below
    gap       entries that the drafter catches up with, rounded up to a power of two above the draft length
    draft     how long, with which drafter

Rows beyond the live ones are free slots: they compute on whatever is in them, and their lengths stay. Tokens beyond a
row's length are masked. So the tokens are those of rounds of exact size; only the time differs.

A shape's first round runs as usual, which also sets up what kernels set up when they are first called. The second is
recorded. Both take longer than those that follow, so strategies do not learn from their times. Prompts, long catch-ups,
n-gram drafts and the rules for study always run as usual.

Left out: graphs of prompts, and recording ahead of time (rows shrink as a rollout goes on, so the largest come first by
themselves, and the memory that they share is as large as it will be).
"""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from parts.cli import reason
from parts.engine.interfaces import Draft
from parts.engine.sampling import Sampling

STEP = 128  # cached tokens
LONGEST_GAP = 16  # entries: longer catch-ups are rare, and run as usual
MOST = 64  # graphs


class Shape(NamedTuple):
    """All that the host decides about a round."""

    rows: int  # B
    view: int  # cache entries that anyone may look at: the valid ones of the longest row, `cur` and k drafts
    gap: int  # entries that the drafter of this round catches up with
    draft: Draft
    sampling: Sampling


def power_above(number: int) -> int:
    """The power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


def rounded(shape: Shape, slots: int, room: int) -> Shape:
    """The shape in whose round this one fits. slots: rows that there are; room: entries of each."""
    step = max(STEP, (1 << shape.view.bit_length()) // 16)
    view = min(room, -(-shape.view // step) * step)
    gap = shape.gap
    if 0 < gap <= LONGEST_GAP:
        gap = power_above(max(gap, shape.draft.k + 1))
    return shape._replace(rows=min(slots, power_above(shape.rows)), view=view, gap=gap)


# ---------------------------------------------------------------- time


class Marks:
    """Two moments of a round: it begins, and its drafts are there. On a GPU by the GPU's clock, since the host is far
    ahead; a graph records them with the kernels.
    """

    def __init__(self, device: torch.device):
        self.times = [0.0, 0.0]
        self.events: list = []
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True, external=True) for _ in self.times]

    def set(self, i: int) -> None:
        """Moment i is now."""
        if self.events:
            self.events[i].record()
        else:
            self.times[i] = time.perf_counter()

    def seconds(self) -> float:
        """Between the two. The host must have waited for the round."""
        if self.events:
            return self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.times[1] - self.times[0]


# ---------------------------------------------------------------- graphs


class Recorder:
    """Records CUDA graphs. One replays at a time, so they share their memory."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.newest: torch.cuda.CUDAGraph | None = None  # kept: a pool that all graphs have left takes no new one

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """-> a function that does what this one does, each time into the same tensor. This one is called, but computes
        nothing now.
        """
        graph = torch.cuda.CUDAGraph()
        # A recording that fails does not leave its stream: what is around it does. And what torch itself makes as it
        # begins is changed by others that record, in or out of inference mode.
        here, outside = torch.cuda.stream(torch.cuda.current_stream()), torch.inference_mode(False)
        recording = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        with here, outside, recording, torch.inference_mode():
            out = function()
        self.newest = graph

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class Graphs:
    """A recorded round for each shape that comes more than once."""

    def __init__(self, compute: Callable[[Shape], torch.Tensor], record: Callable | None = None):
        """compute: a round; it reads its shape and tensors that stay where they are, and nothing else. record: as
        Recorder, which it is by default.
        """
        self.compute = compute
        self.record = record or Recorder()
        self.broken = False
        self.first = False  # the last round took longer than others of its shape: it was the first, or was recorded
        self.replays: dict[Shape, Callable[[], torch.Tensor]] = {}  # the one that was used last stands last
        self.seen: set[Shape] = set()

    def forget(self) -> None:
        """Something has moved: all that was recorded is void."""
        self.replays = {}
        self.seen = set()

    def run(self, shape: Shape) -> torch.Tensor:
        """A round of this shape, replayed if it can be."""
        self.first = False
        if self.broken or shape.gap > LONGEST_GAP:
            return self.compute(shape)
        self.first = shape not in self.replays
        if shape not in self.seen:
            self.seen.add(shape)
            return self.compute(shape)
        replay = self.replays.pop(shape, None) or self.recorded(shape)
        if replay is None:
            return self.compute(shape)
        self.replays[shape] = replay
        return replay()

    def recorded(self, shape: Shape) -> Callable[[], torch.Tensor] | None:
        """The graph of a round, or None, after one line on stderr, where that fails; then nothing is recorded again."""
        if len(self.replays) == MOST:
            del self.replays[next(iter(self.replays))]  # the one that was not used for longest
        try:
            return self.record(lambda: self.compute(shape))
        except RuntimeError as error:  # also torch's own: out of memory, a kernel that asks the host
            cause = error.__context__ or error  # a recording that has failed fails once more when it ends
            place = traceback.extract_tb(cause.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            problem = f"{reason(cause)} ({where})"
            print(f"rounds are not replayed as CUDA graphs, and slower for it: {problem}", file=sys.stderr)
            self.broken = True
            self.forget()
            return None
