"""CUDA devices while Megatron runs on CPU: what `torch.cuda` answers, and where tensors for a device go.

Megatron asks for the current device, makes streams and events, draws from the CUDA random
generator and reports memory. On CPU there is one device, work is finished when a call returns, and
there is one generator: the answers below say so. A tensor for a CUDA device is made on
the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_dyt.patching import wrapper

_KIBIBYTE = 1024


def current_device() -> torch.device:
    """For `device=torch.cuda.current_device()`, Megatron's usual way to place a tensor."""
    return torch.device("cpu")


def device_count() -> int:
    """One "device" for each process of this machine, as under torchrun with GPUs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for synchronize, set_device, empty_cache, ...: on CPU there is nothing to do."""


def no(*_args: Any, **_kwargs: Any) -> bool:
    return False


def context(*_args: Any, **_kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """Stands in for `torch.cuda.stream(...)` and `torch.cuda.device(...)`."""
    return contextlib.nullcontext()


class Event:
    """`torch.cuda.Event`: the moment at which `record` was called."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, *_args: Any) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between this event and `end`."""
        return 1000.0 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    synchronize = nothing
    wait = nothing


class Stream:
    """`torch.cuda.Stream`: every call has finished when it returns, so waiting is free."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    synchronize = nothing
    wait_stream = nothing
    wait_event = nothing


def current_stream(*_args: Any) -> Stream:
    return Stream()


def get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def memory_now(*_args: Any) -> int:
    """Resident memory of this process, bytes."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_peak(*_args: Any) -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE


def memory_stats(*_args: Any) -> dict[str, int]:
    stats: dict[str, int] = defaultdict(int)
    stats["allocated_bytes.all.current"] = memory_now()
    stats["allocated_bytes.all.peak"] = memory_peak()
    return stats


def device_properties(*_args: Any) -> SimpleNamespace:
    page = os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        multi_processor_count=os.cpu_count() or 1,
        total_memory=page * os.sysconf("SC_PHYS_PAGES"),
    )


def device_capability(*_args: Any) -> tuple[int, int]:
    """(0, 0): older than every GPU, so no feature that asks for a compute capability starts."""
    return (0, 0)


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU when `device` names a CUDA device (by string, device or index), else `device`."""
    if isinstance(device, torch.device):
        names_cuda = device.type == "cuda"
    elif isinstance(device, str):
        names_cuda = device.startswith("cuda")
    else:
        names_cuda = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if names_cuda else device


@wrapper
def device_argument_to_cpu(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("device") is not None:
        kwargs["device"] = _cpu_for_cuda(kwargs["device"])
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False  # For copies to a GPU.
    return factory(*args, **kwargs)


def first_argument_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    convert = device_argument_to_cpu(to)

    @functools.wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_cpu_for_cuda(args[0]), *args[1:])
        return convert(tensor, *args, **kwargs)

    return move


@wrapper
def keeping_rng(start: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """A data loader that starts reading draws a seed from the CPU generator.

    On a GPU that does not touch the generator of dropout. Here it is the same one, and a resumed
    run, which starts to read at another step, would get other dropout masks.
    """
    with torch.random.fork_rng(devices=[]):
        start(*args, **kwargs)


def itself(thing: Any, *_args: Any, **_kwargs: Any) -> Any:
    return thing


@wrapper
def type_named_as_on_cuda(
    type_of: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Megatron's optimizers compare `tensor.type()` with "torch.cuda.FloatTensor" and the like."""
    answer = type_of(tensor, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer
