"""A device written in Python that stands for a GPU: what would fail or be slow there fails, or is counted, here.

A tensor of the device `standin` is a `StandIn`. It has no memory of its own: `host` is a CPU tensor with its values, on
which every operator computes (`compute`). So the values are real, and a run here must give the tokens of a run on the
CPU. Three rules of a GPU are enforced:

    tensors of host and device do not meet      an operator that gets both raises HostMeetsDevice, as CUDA does;
                                                numbers and tensors without dimensions are allowed, as they are there
    reading the device, or writing to it,       `waits` counts it, by the line of the project that asked: the host
    makes the host wait                         stops until the device has done all that was asked of it before. A copy
                                                with non_blocking=True to the device does not wait
    what is recorded has no such wait           inside `recording`, a wait raises WaitInRecording

`memory` counts the bytes that tensors of the device take, now and at most. After `without_values` tensors of the device
have shapes and no values (they are on torch's meta device), so that models of any size fit; what is read is zeros.

Left out: kernels that differ from the CPU's and what they take while they run, streams, and the speed.

Source: torch's experimental backends in Python (torch.utils.backend_registration). A wrapper subclass gets every
operator in `__torch_dispatch__`, below autograd and autocast.
"""

import contextlib
import sys
import time
import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch.autograd import grad_mode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from parts.files import ROOT

NAME = "standin"
waits: Counter[str] = Counter()  # "file.py function" -> how often it made the host wait
recorded_now = [False]  # whether a round is being recorded


class Memory:
    """Bytes of the storages that live on the device. Several tensors, views of one another, may share one."""

    def __init__(self):
        self.now = 0
        self.most = 0
        self.alive: set[int] = set()  # storages

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive.add(key)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.change(-size)

    def change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def restart(self) -> int:
        """Forget what was taken at most -> what is taken now."""
        self.most = self.now
        return self.now


memory = Memory()
values_on = {0: "cpu"}  # or meta: there are no values


class HostMeetsDevice(RuntimeError):
    """An operator was given tensors of both."""


class WaitInRecording(RuntimeError):
    """The host waits inside a recorded round."""


class Backend:
    """What torch asks of a module torch.cuda, torch.standin."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]


# ---------------------------------------------------------------- tensors

aten = torch.ops.aten
# their results have sizes, or are numbers, that the host must know
READS_VALUES = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.allclose.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
# what they give where there are no values
READ_AS = {aten._local_scalar_dense.default: 0, aten.equal.default: True, aten.allclose.default: True}
# torch looks at the Python object while these make a new tensor of it
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class StandIn(torch.Tensor):
    """A tensor on the stand-in. host: the CPU tensor that holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, device=f"{NAME}:0", **layout)

    def __init__(self, host: torch.Tensor):
        self.host = host
        memory.note(host.untyped_storage())

    def __repr__(self):
        return f"StandIn({self.host})"

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


def host_of(x):
    """Return the CPU tensor of a StandIn, and everything else as it is."""
    return x.host if isinstance(x, StandIn) else x


def is_on_host(x) -> bool:
    """Return whether x is a tensor of the host that no kernel may read."""
    return isinstance(x, torch.Tensor) and not isinstance(x, StandIn) and x.dim() > 0


def makes_wait(source: torch.Tensor, non_blocking: bool) -> bool:
    """Return whether a copy of it from the host to the device makes the host wait."""
    return is_on_host(source) and source.numel() > 0 and not non_blocking


def mapped(function, value):
    """Return the value, or what is in its lists and tuples, with the function applied. (Operators are not given any
    other containers, and torch's `tree_map` takes most of a test's time.)
    """
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, item) for item in value])
    return function(value)


def leaves_of(value) -> list:
    """Return what is in the value's lists and tuples, or the value."""
    if not isinstance(value, (list, tuple)):
        return [value]
    leaves = []
    for item in value:
        leaves += leaves_of(item)
    return leaves


@cache
def file_of_the_project(name: str) -> str:
    """Return the name of a file without its folder if it belongs to the project and is no test; else an empty text."""
    path = Path(name)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
        return path.name
    return ""


def note_wait() -> None:
    """Count a wait of the host, at the line of the project that causes it. Raises WaitInRecording."""
    frame = sys._getframe(1)
    place = "torch"  # what calls it is a test, or torch's thread for the backward
    while frame and place == "torch":
        file = file_of_the_project(frame.f_code.co_filename)
        if file:
            place = f"{file} {frame.f_code.co_name}"
        frame = frame.f_back
    if recorded_now[0]:
        raise WaitInRecording(f"the host waits for the device in {place}")
    waits[place] += 1


def copied(source: torch.Tensor, kwargs: dict):
    """`Tensor.to`, which alone may take a tensor from one side to the other."""
    device = kwargs.get("device")
    to_device = isinstance(source, StandIn) if device is None else torch.device(device).type == NAME
    if isinstance(source, StandIn) and not to_device:
        note_wait()
    if to_device and makes_wait(source, kwargs.get("non_blocking", False)):
        note_wait()
    settings = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    if not to_device and host_of(source).is_meta:
        return torch.zeros(source.shape, dtype=settings.get("dtype") or source.dtype)
    result = aten._to_copy.default(host_of(source), **settings, device=values_on[0] if to_device else "cpu")
    return StandIn(result) if to_device else result


def copied_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
    """`Tensor.copy_`."""
    if is_on_host(target) or makes_wait(source, non_blocking):
        note_wait()
    if host_of(source).is_meta and is_on_host(target):
        return target.zero_()
    host_of(target).copy_(host_of(source))
    return target


def check_sides(operator, leaves: list) -> None:
    """Raise HostMeetsDevice if the operator is given a tensor of the host."""
    for leaf in leaves:
        if is_on_host(leaf):
            raise HostMeetsDevice(f"{operator} on the device is given a tensor of the host, {tuple(leaf.shape)}")


def compute(operator, args: tuple, kwargs: dict):
    """Run an operator with at least one StandIn among its arguments."""
    if operator is aten._to_copy.default:
        return copied(args[0], kwargs)
    if operator is aten.copy_.default:
        return copied_into(*args, **kwargs)
    leaves = leaves_of([args, list(kwargs.values())])
    if operator in INDEXED:  # CUDA copies an index of the host to the device, and waits; a mask is counted first
        masks = [x for x in args[1] if x is not None and (is_on_host(x) or x.dtype in (torch.bool, torch.uint8))]
        for _ in masks:
            note_wait()
        check_sides(operator, [args[0], *leaves_of(args[2:3])])
    else:
        check_sides(operator, leaves)
    if operator in READS_VALUES:
        note_wait()
        if args[0].host.is_meta and operator in READ_AS:
            return READ_AS[operator]
    settings = {name: mapped(host_of, value) for name, value in kwargs.items()}
    if "device" in settings:
        settings["device"] = torch.device(values_on[0])
    result = operator(*mapped(host_of, args), **settings)
    changed = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, StandIn)}  # by operators in place
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != NAME:
        return result

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return changed[id(x)] if id(x) in changed else StandIn(x)

    return mapped(wrapped, result)


# ---------------------------------------------------------------- the device


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    """`torch.empty` on the device; zeros, arange and the others begin with it."""
    return StandIn(torch.empty(size, dtype=dtype, device=values_on[0]))


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    """`torch.empty_strided` on the device."""
    return StandIn(torch.empty_strided(size, stride, dtype=dtype, device=values_on[0]))


def copy_from(source, target, non_blocking: bool = False):
    """Copies that torch makes while it builds an index out of a list."""
    return copied_into(target, source, non_blocking)


# what torch.autocast computes in the lower precision on CUDA, as far as this project uses it
LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")
AUTOCAST = "AutocastPrivateUse1"


def in_lower_precision(name: str):
    """Return the operator as autocast runs it: with its float32 arguments cast."""
    operator = getattr(torch.ops.aten, name)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST))

    def cast(x):
        is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(torch.get_autocast_dtype(NAME)) if is_float else x

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return run


kernels: list[torch.library.Library] = []  # they live as long as this


def register() -> None:
    """Make the device known to torch, once in a process."""
    if kernels:
        return
    _setup_privateuseone_for_python_backend(NAME, Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for name in LOWER:
        library.impl(name, in_lower_precision(name), AUTOCAST)
    others = torch.library.Library("_", "IMPL", AUTOCAST)
    others.fallback(torch.library.fallthrough_kernel)
    kernels.extend([library, others])


class Recorder:
    """Stands for cuda_graphs.GraphRecorder: a recorded round runs without a wait, or raises."""

    def __call__(self, function):
        def replay():
            recorded_now[0] = True
            try:
                return function()
            finally:
                recorded_now[0] = False

        return replay


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, **settings):
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        return (later.time - self.time) * 1e3


class NoGrad:
    """inference_mode without its inference tensors, which a tensor of a Python device cannot be."""

    @staticmethod
    def enter(mode) -> None:
        mode.before = torch.is_grad_enabled()
        if mode.mode:
            torch.set_grad_enabled(False)

    @staticmethod
    def exit(mode, *error) -> None:
        torch.set_grad_enabled(mode.before)


def install(patch) -> None:
    """Register the device, and let the project treat it as a GPU. patch: pytest's MonkeyPatch, which undoes all but the
    registration.
    """
    register()
    waits.clear()
    patch.setattr("parts.devices.GPU_TYPES", {"cuda", NAME})
    patch.setattr("parts.engine.cuda_graphs.GraphRecorder", Recorder)
    patch.setattr("parts.engine.sampling.compiled_sample", sys.modules["parts.engine.sampling"].sample_at_once)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 40, 1 << 40))
    patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: 1.0)
    patch.setattr(grad_mode.inference_mode, "__enter__", NoGrad.enter)
    patch.setattr(grad_mode.inference_mode, "__exit__", NoGrad.exit)


class Attention(torch.autograd.Function):
    """Stands for CUDA's attention kernels, which keep no scores: what comes out and what is kept have the shapes of
    theirs, and no values.
    """

    @staticmethod
    def forward(context, query, key, value):
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        context.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(context, gradient):
        query, key, value, _, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention(query, key, value, attn_mask=None, **settings):
    """`scaled_dot_product_attention`, without values. The mask is made by the project and counted there."""
    return Attention.apply(query, key, value)


def without_values(patch) -> None:
    """From now on tensors of the device have no values. Checks of values are passed."""
    patch.setitem(values_on, 0, "meta")
    patch.setattr("rollout.matches_own_code", lambda model, layers: (True, 0.0))
    patch.setattr("drafter.embedding_scale", lambda embedding: 1.0)
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
