"""How workers load a model together, join a process group, share GPUs (which are faked here) and sum tensors.

How the sums are cut into messages is in test_memory.py.
"""

import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import caught, fake_gpus

import tlt
from parts.cli import UserError
from parts.devices import free_memory
from parts.running import communication
from tlt import Board, TLTConfig

# ---------------------------------------------------------------- a model that is downloaded


class WorkersThatLoad:
    """Workers on some hosts that load a model at the same time, each in a thread. Loading lasts until the worker's
    event in `loaded` is set.
    """

    def __init__(self, hosts: list[str], monkeypatch, load=tlt.TLTWorker.loading):
        """hosts: the host of each worker."""
        self.hosts = hosts
        self.load = load
        self.began: list[int] = []  # workers
        self.continued: list[int] = []
        self.loaded = [threading.Event() for _ in hosts]
        self.of_thread = threading.local()
        monkeypatch.setattr(tlt.platform, "node", lambda: self.of_thread.host)
        hosted = Board.host()
        self.workers = []
        for i, host in enumerate(hosts):
            worker = object.__new__(tlt.TLTWorker)
            worker.board = Board("127.0.0.1", hosted.port)
            worker.world_size = len(hosts)
            worker.first_here = hosts.index(host) == i
            self.workers.append(worker)
        self.board = Board("", 0, hosted)
        self.threads = [threading.Thread(target=self.work, args=(i,), daemon=True) for i in range(len(hosts))]

    def work(self, i: int) -> None:
        self.of_thread.host = self.hosts[i]
        with self.load(self.workers[i], "owner/name"):
            self.began.append(i)
            assert self.loaded[i].wait(20)
        self.continued.append(i)

    def until(self, condition) -> None:
        """Wait until the condition holds, at most 10 s."""
        event = threading.Event()
        for _ in range(1000):
            if condition():
                return
            event.wait(0.01)
        raise AssertionError("the condition did not come to hold")


def wait_a_moment() -> None:
    """Wait long enough for something that must not happen to happen."""
    threading.Event().wait(0.15)


def check_one_worker_downloads(monkeypatch, load):
    """Hosts a (workers 0, 1, 2) and b (3, 4): the first worker of each loads, then the others of this host. None
    continues before all have loaded.
    """
    scene = WorkersThatLoad(["a", "a", "a", "b", "b"], monkeypatch, load)
    for thread in scene.threads:
        thread.start()
    try:
        scene.until(lambda: {0, 3} <= set(scene.began))
        wait_a_moment()
        assert sorted(scene.began) == [0, 3]
        scene.loaded[0].set()
        scene.until(lambda: {1, 2} <= set(scene.began))
        wait_a_moment()
        assert sorted(scene.began) == [0, 1, 2, 3]
        for i in (1, 2, 3):
            scene.loaded[i].set()
        scene.until(lambda: 4 in scene.began)
        wait_a_moment()
        assert not scene.continued
        scene.loaded[4].set()
        scene.until(lambda: len(scene.continued) == 5)
    finally:
        for event in scene.loaded:
            event.set()
        for thread in scene.threads:
            thread.join()


def test_one_worker_of_each_host_downloads_and_all_continue_together(monkeypatch):
    right = tlt.TLTWorker.loading
    check_one_worker_downloads(monkeypatch, right)

    def all_at_once(worker, name):
        worker.first_here = True
        return right(worker, name)

    def without_waiting(worker, name):
        worker.world_size = 1
        return right(worker, name)

    caught(check_one_worker_downloads, monkeypatch, all_at_once)
    caught(check_one_worker_downloads, monkeypatch, without_waiting)


def test_a_folder_is_loaded_by_all_workers_at_once(model_folder):
    worker = object.__new__(tlt.TLTWorker)
    worker.board = Board("", 0, Board.host())
    worker.world_size = 1
    worker.first_here = False
    with worker.loading(str(model_folder)):
        pass


# ---------------------------------------------------------------- several workers on one GPU


@pytest.fixture
def joined(monkeypatch):
    """A function that joins, with these settings on two GPUs -> what accelerate and torch were asked for."""
    fake_gpus(monkeypatch, 2)
    requested = SimpleNamespace(backend=None, seconds=0.0, share=1.0, cpu=None)

    def accelerator(cpu, kwargs_handlers):
        settings = kwargs_handlers[0].to_kwargs()
        requested.cpu = cpu
        requested.backend = settings.get("backend")
        requested.seconds = settings["timeout"].total_seconds()
        return SimpleNamespace(device=torch.device("cuda:1"))

    def limit(share, device):
        assert device == torch.device("cuda:1")
        requested.share = share

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)

    def ask(in_group: bool = True, **settings) -> SimpleNamespace:
        requested.share = 1.0
        with monkeypatch.context() as patch:
            if in_group:
                patch.setenv("RANK", "1")
            communication.join(TLTConfig(**settings))
        return requested

    return ask


def test_workers_that_share_a_gpu_use_gloo_and_divide_its_memory(joined):
    requested = joined()  # backend None: accelerate's own choice, which is NCCL
    assert (requested.cpu, requested.backend, requested.share) == (False, None, 1.0)
    requested = joined(workers_per_gpu=2)
    assert (requested.cpu, requested.backend, requested.share) == (False, "gloo", 0.5)
    requested = joined(in_group=False, workers_per_gpu=2)
    assert (requested.backend, requested.share) == (None, 0.5)
    requested = joined(workers_per_gpu=2, device="cpu")
    assert (requested.cpu, requested.backend, requested.share) == (True, None, 1.0)


@pytest.mark.parametrize("patience, seconds", [(600.0, 3600), (7200.0, 14400), (float("inf"), 86400)])
def test_a_collective_waits_longer_than_the_heartbeat_may_be_missing(joined, patience, seconds):
    assert joined(patience=patience).seconds == seconds


def test_accelerate_assigns_the_gpus(monkeypatch):
    """`join` relies on it: worker i of a host gets the GPU i modulo their number."""
    fake_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    devices = []
    for i in range(4):
        state = SimpleNamespace(device=None, distributed_type=DistributedType.MULTI_GPU, local_process_index=i)
        PartialState.set_device(state)
        devices.append(str(state.device))
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    "gpus, flags, count", [(2, [], 2), (2, ["--workers-per-gpu", "2"], 4), (1, ["--workers-per-gpu", "2"], 2)]
)
def test_the_number_of_workers_follows_from_the_gpus(gpus, flags, count, model_folder, tmp_path, monkeypatch):
    fake_gpus(monkeypatch, gpus)
    started = []
    monkeypatch.setattr(tlt, "spawn", lambda worker, config, *rest: started.append(rest))
    argv = ["tlt.py", "--model", str(model_folder), "--out", str(tmp_path), "--max-new", "64", *flags]
    monkeypatch.setattr("sys.argv", argv)
    tlt.main()
    assert started == [(count, 600.0, True)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"workers": 3}, "only 2 GPUs here; raise --workers-per-gpu"),
        ({"workers": 5, "workers_per_gpu": 2}, "only 2 GPUs"),
        ({"workers_per_gpu": 0}, "--workers-per-gpu 0"),
        ({"workers_per_gpu": 2, "shard": True}, "--shard"),
    ],
)
def test_too_many_workers_for_the_gpus_are_refused(settings, message, monkeypatch):
    fake_gpus(monkeypatch, 2)
    TLTConfig(workers=4, workers_per_gpu=2)
    with pytest.raises(UserError, match=message):
        TLTConfig(**settings)


def test_too_many_workers_under_torchrun_are_refused(monkeypatch):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--workers 2: there are only 1 GPUs"):
        TLTConfig()
    TLTConfig(workers_per_gpu=2)


def check_free_memory(monkeypatch, free_memory):
    """A GPU has 100 bytes, of which 40 are free; this process holds 15."""
    gpu = torch.device("cuda:0")
    for share, wanted in ((1.0, 40), (0.5, 35), (0.2, 5)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 100))
            patch.setattr(torch.cuda, "memory_reserved", lambda device: 15)
            patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
            assert free_memory(gpu) == wanted


def test_free_memory_is_that_of_this_workers_share(monkeypatch):
    check_free_memory(monkeypatch, free_memory)
    caught(check_free_memory, monkeypatch, lambda device: torch.cuda.mem_get_info(device)[0])
    assert free_memory(torch.device("cpu")) is None


# ---------------------------------------------------------------- sums on the host


class HostTensor(torch.Tensor):
    """A tensor that was copied from the GPU, the only kind that the fake gloo takes."""


def check_where_sums_are_made(monkeypatch, backend: str):
    """Two workers have the same tensors, which count as being on a GPU, so the sums are twice as large."""
    kinds = set()

    def all_reduce(tensor):
        kinds.add(type(tensor) is HostTensor)
        tensor.mul_(2)

    generator = torch.Generator().manual_seed(0)
    shapes = ((), (0,), (3, 5), (90, 70), (2, 13, 4))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(torch.randn(40, 30, generator=generator).T)  # not contiguous
    wanted = [2 * t for t in tensors]
    with monkeypatch.context() as patch:
        patch.setattr(communication, "MESSAGE", 1000)
        patch.setattr(torch.distributed, "get_backend", lambda: backend)
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(torch.Tensor, "cpu", lambda self: self.clone().as_subclass(HostTensor))
        communication.sum_up(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted))
    assert kinds == {backend == "gloo"}


def test_gloo_sums_on_the_host_and_nccl_where_the_tensors_are(monkeypatch):
    check_where_sums_are_made(monkeypatch, "gloo")
    check_where_sums_are_made(monkeypatch, "nccl")
    monkeypatch.setattr(communication, "all_reduce", lambda tensor: torch.distributed.all_reduce(tensor.cpu()))
    caught(check_where_sums_are_made, monkeypatch, "gloo")  # the sum is not copied back
