"""The recorder of CUDA graphs, on a device that is made up: what torch does with pools and streams."""

import contextlib
import weakref

import torch
from conftest import caught

from parts.engine.cuda_graphs import GraphPool, GraphRecorder, RoundShape
from parts.engine.interfaces import DraftPlan
from parts.engine.sampling import Sampling


class Device:
    """What torch.cuda does with graphs: a pool that all its graphs have left takes no new one, and a recording that
    fails leaves its stream in place.
    """

    def __init__(self, monkeypatch):
        self.now = "usual"  # stream
        self.begun_in_inference_mode = False
        self.taken: dict[int, bool] = {}  # pool -> whether a graph has been in it
        self.graphs: list[tuple] = []  # (reference to a graph, pool)
        for name in ("graph", "stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)

    def current_stream(self) -> str:
        return self.now

    def graph_pool_handle(self) -> int:
        self.taken[len(self.taken)] = False
        return len(self.taken) - 1

    @contextlib.contextmanager
    def stream(self, name):
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        alive = any(place == pool and reference() for reference, place in self.graphs)
        assert alive or not self.taken[pool], "use_count > 0"
        before, self.now = self.now, "recording"
        self.begun_in_inference_mode = torch.is_inference_mode_enabled()
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the recording has failed") from None
        self.graphs.append((weakref.ref(graph), pool))
        self.taken[pool] = True
        self.now = before


class FakeGraph:
    def replay(self) -> None:
        pass


SHAPE = RoundShape(1, 128, 0, DraftPlan(), Sampling())


def check_records_again_after_all_was_forgotten(recorder: type[GraphRecorder]) -> None:
    graphs = GraphPool(lambda shape: shape, recorder())
    for _ in range(3):
        for _ in range(3):
            assert graphs.run(SHAPE) == SHAPE
        assert list(graphs.replays) == [SHAPE]
        graphs.forget()


def test_a_recorder_records_again_after_all_was_forgotten(monkeypatch):
    Device(monkeypatch)
    check_records_again_after_all_was_forgotten(GraphRecorder)

    class Leaves(GraphRecorder):
        def __call__(self, function):
            replay = super().__call__(function)
            self.newest = None
            return replay

    caught(check_records_again_after_all_was_forgotten, Leaves)


def check_a_failed_recording_leaves_nothing(device: Device, capsys) -> None:
    """The stream is as before, and what is said is the reason, not that the recording has failed."""

    streams = []

    def compute(shape):
        streams.append(device.now)
        if len(streams) == 2:
            raise RuntimeError("asks the host")
        return device.now

    graphs = GraphPool(compute, GraphRecorder())
    assert [graphs.run(SHAPE) for _ in range(4)] == ["usual"] * 4
    said = capsys.readouterr().err
    assert streams[:2] == ["usual", "recording"]
    assert "asks the host (test_recorder.py, line" in said
    assert said.count("\n") == 1


def test_a_failed_recording_leaves_nothing(monkeypatch, capsys):
    device = Device(monkeypatch)
    check_a_failed_recording_leaves_nothing(device, capsys)
    monkeypatch.setattr(torch.cuda, "stream", lambda name: contextlib.nullcontext())
    caught(check_a_failed_recording_leaves_nothing, device, capsys)


@torch.inference_mode()
def check_what_torch_makes_is_no_inference_tensor(device: Device) -> None:
    """A recording begins outside of inference mode, as a rollout's rounds do not."""
    modes = []
    graphs = GraphPool(lambda shape: modes.append(torch.is_inference_mode_enabled()), GraphRecorder())
    graphs.run(SHAPE)
    graphs.run(SHAPE)
    assert modes == [True, True]
    assert not device.begun_in_inference_mode


def test_what_torch_makes_is_no_inference_tensor(monkeypatch):
    device = Device(monkeypatch)
    check_what_torch_makes_is_no_inference_tensor(device)
    monkeypatch.setattr(torch, "inference_mode", lambda enabled=True: contextlib.nullcontext())
    caught(check_what_torch_makes_is_no_inference_tensor, device)
