"""The recorder of CUDA graphs, on a simulated device that treats memory pools and streams as torch does."""

import contextlib
import weakref

import torch
from conftest import caught

from parts.engine.cuda_graphs import GraphPool, GraphRecorder, RoundShape
from parts.engine.interfaces import DraftPlan
from parts.engine.sampling import Sampling


class Device:
    """What torch.cuda does with graphs: a pool whose graphs have all been deleted accepts no new one, and a recording
    that fails does not restore the stream.
    """

    def __init__(self, monkeypatch):
        self.current = "usual"  # stream
        self.begun_in_inference_mode = False
        self.used: dict[int, bool] = {}  # pool -> whether a graph was ever in it
        self.graphs: list[tuple] = []  # (reference to a graph, pool)
        for name in ("graph", "stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)

    def current_stream(self) -> str:
        return self.current

    def graph_pool_handle(self) -> int:
        self.used[len(self.used)] = False
        return len(self.used) - 1

    @contextlib.contextmanager
    def stream(self, name):
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        alive = any(other == pool and reference() for reference, other in self.graphs)
        assert alive or not self.used[pool], "use_count > 0"
        before, self.current = self.current, "recording"
        self.begun_in_inference_mode = torch.is_inference_mode_enabled()
        try:
            yield
        except RuntimeError:
            raise RuntimeError("the recording has failed") from None
        self.graphs.append((weakref.ref(graph), pool))
        self.used[pool] = True
        self.current = before


class FakeGraph:
    """A CUDA graph that replays nothing."""

    def replay(self) -> None:
        pass


SHAPE = RoundShape(1, 128, 0, DraftPlan(), Sampling())


def check_records_again_after_a_clear(recorder: type[GraphRecorder]) -> None:
    """After the pool was cleared, rounds are recorded again."""
    graphs = GraphPool(lambda shape: shape, recorder())
    for _ in range(3):
        for _ in range(3):
            assert graphs.run(SHAPE) == SHAPE
        assert list(graphs.replays) == [SHAPE]
        graphs.clear()


def test_a_recorder_records_again_after_a_clear(monkeypatch):
    Device(monkeypatch)
    check_records_again_after_a_clear(GraphRecorder)

    class DropsItsNewestGraph(GraphRecorder):
        def __call__(self, function):
            replay = super().__call__(function)
            self.newest = None
            return replay

    caught(check_records_again_after_a_clear, DropsItsNewestGraph)


def check_a_failed_recording_is_undone(device: Device, capsys) -> None:
    """The stream is the one before, and the message gives the reason, not only that the recording has failed."""
    streams = []

    def compute(shape):
        streams.append(device.current)
        if len(streams) == 2:
            raise RuntimeError("waits for the host")
        return device.current

    graphs = GraphPool(compute, GraphRecorder())
    assert [graphs.run(SHAPE) for _ in range(4)] == ["usual"] * 4
    message = capsys.readouterr().err
    assert streams[:2] == ["usual", "recording"]
    assert "waits for the host (test_recorder.py, line" in message
    assert message.count("\n") == 1


def test_a_failed_recording_is_undone(monkeypatch, capsys):
    device = Device(monkeypatch)
    check_a_failed_recording_is_undone(device, capsys)
    monkeypatch.setattr(torch.cuda, "stream", lambda name: contextlib.nullcontext())
    caught(check_a_failed_recording_is_undone, device, capsys)


@torch.inference_mode()
def check_recording_begins_outside_of_inference_mode(device: Device) -> None:
    """The round itself runs in inference mode, but torch begins the recording outside of it: else the tensors that it
    makes then could not be changed by later recordings.
    """
    modes = []
    graphs = GraphPool(lambda shape: modes.append(torch.is_inference_mode_enabled()), GraphRecorder())
    graphs.run(SHAPE)
    graphs.run(SHAPE)
    assert modes == [True, True]
    assert not device.begun_in_inference_mode


def test_recording_begins_outside_of_inference_mode(monkeypatch):
    device = Device(monkeypatch)
    check_recording_begins_outside_of_inference_mode(device)
    monkeypatch.setattr(torch, "inference_mode", lambda enabled=True: contextlib.nullcontext())
    caught(check_recording_begins_outside_of_inference_mode, device)
