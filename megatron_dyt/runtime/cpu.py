"""Megatron-Core without a GPU: the unmodified training loop on CPU processes over gloo.

`enable()` replaces, from one table, what in PyTorch and Megatron needs a CUDA device; `disable()`
puts everything back. Nothing is active unless asked for, and a process that uses CUDA is refused.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import logging
import os
import queue
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dyt.errors import UserError
from megatron_dyt.patching import Patches, Replacement
from megatron_dyt.runtime import cpu_flags
from megatron_dyt.runtime import cuda_stand_ins as stand_in

_patches = Patches()
_closing = contextlib.ExitStack()
_enabled = False


def is_enabled() -> bool:
    """True between `enable()` and `disable()`."""
    return _enabled


def enable() -> None:
    """Let Megatron run on CPU in this process; calling it again changes nothing.

    Call it before `megatron.training` is used. Raises `UserError` when this process already uses
    CUDA, and `RuntimeError` when PyTorch or Megatron lacks something that must be replaced.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_initialized():
        raise UserError(
            "the CPU runtime was asked for, but this process already uses CUDA. Ask for it before "
            "anything touches a GPU, or start with CUDA_VISIBLE_DEVICES= (empty)"
        )
    # torch._dynamo lists PyTorch's functions when it is imported, which must not find stand-ins.
    importlib.import_module("torch._dynamo")
    with contextlib.ExitStack() as undo_on_error:
        undo_on_error.callback(_undo)
        _import_megatron_uncompiled()
        _patches.apply(_table())
        _quiet_rng_warning()
        _satisfy_connection_check()
        _use_all_cores()
        undo_on_error.pop_all()
    _enabled = True


def disable() -> None:
    """Put everything that `enable()` replaced back; without `enable()` it does nothing."""
    global _enabled
    _undo()
    _enabled = False


def _undo() -> None:
    _patches.undo()
    _closing.close()


def _table() -> list[Replacement]:
    rows = [*_torch_cuda_rows(), *_tensor_rows(), *_megatron_core_rows()]
    return [*rows, *_megatron_training_rows()] if _has_megatron_training() else rows


def _has_megatron_training() -> bool:
    return importlib.util.find_spec("megatron.training") is not None


def _always(value: Any) -> Callable[[Any], Any]:
    """A row's `make` for a replacement that does not need the original."""
    return lambda _original: value


# --- torch.cuda -----------------------------------------------------------------------------------

_TORCH_CUDA: dict[str, Any] = {
    "current_device": stand_in.current_device,
    "device_count": stand_in.device_count,
    "set_device": stand_in.nothing,
    "synchronize": stand_in.nothing,
    "empty_cache": stand_in.nothing,
    "reset_peak_memory_stats": stand_in.nothing,
    "set_stream": stand_in.nothing,
    "is_current_stream_capturing": stand_in.no,
    "current_stream": stand_in.current_stream,
    "default_stream": stand_in.current_stream,
    "Stream": stand_in.Stream,
    "Event": stand_in.Event,
    "stream": stand_in.context,
    "device": stand_in.context,
    "get_rng_state": stand_in.get_rng_state,
    "set_rng_state": stand_in.set_rng_state,
    "manual_seed": stand_in.manual_seed,
    "manual_seed_all": stand_in.manual_seed,
    "random.get_rng_state": stand_in.get_rng_state,
    "random.set_rng_state": stand_in.set_rng_state,
    "memory_allocated": stand_in.memory_now,
    "memory_reserved": stand_in.memory_now,
    "device_memory_used": stand_in.memory_now,
    "max_memory_allocated": stand_in.memory_peak,
    "max_memory_reserved": stand_in.memory_peak,
    "memory_stats": stand_in.memory_stats,
    "get_device_properties": stand_in.device_properties,
    "get_device_capability": stand_in.device_capability,
    "nvtx.range_push": stand_in.nothing,
    "nvtx.range_pop": stand_in.nothing,
}


def _torch_cuda_rows() -> list[Replacement]:
    return [Replacement("torch.cuda", name, _always(value)) for name, value in _TORCH_CUDA.items()]


# --- tensors --------------------------------------------------------------------------------------

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "empty_strided"),
    *("arange", "linspace", "eye", "rand", "randn", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("Tensor.new_empty", "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_full"),
    "Tensor.new_tensor",
)


def _tensor_rows() -> list[Replacement]:
    return [
        *(Replacement("torch", name, _device_argument_to_cpu) for name in _FACTORIES),
        Replacement("torch", "Tensor.to", _first_argument_to_cpu),
        Replacement("torch", "Tensor.cuda", _always(_itself)),
        Replacement("torch", "Tensor.pin_memory", _always(_itself)),
        Replacement("torch", "Tensor.record_stream", _always(stand_in.nothing)),
        Replacement("torch", "Tensor.type", _type_named_as_on_cuda),
        Replacement("torch.nn", "Module.cuda", _always(_itself)),
        Replacement("torch.distributed", "barrier", _without_device_ids),
    ]


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU when `device` names a CUDA device (by string, device or index), else `device`."""
    if isinstance(device, torch.device):
        names_cuda = device.type == "cuda"
    elif isinstance(device, str):
        names_cuda = device.startswith("cuda")
    else:
        names_cuda = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if names_cuda else device


def _device_argument_to_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return factory(*args, **kwargs)

    return make


def _first_argument_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    convert = _device_argument_to_cpu(to)

    @functools.wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_cpu_for_cuda(args[0]), *args[1:])
        return convert(tensor, *args, **kwargs)

    return move


def _itself(thing: Any, *_args: Any, **_kwargs: Any) -> Any:
    return thing


def _type_named_as_on_cuda(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers compare `tensor.type()` with "torch.cuda.FloatTensor" and the like."""

    @functools.wraps(type_of)
    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return named


def _without_device_ids(barrier: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(barrier)
    def wait(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    return wait


# --- Megatron -------------------------------------------------------------------------------------


def _megatron_core_rows() -> list[Replacement]:
    random = "megatron.core.tensor_parallel.random"
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    norm = "megatron.core.transformer.torch_norm"
    return [
        Replacement(random, "_set_cuda_rng_state", _always(stand_in.set_rng_state)),
        # Without --async-save a checkpoint is written by threads of this process, which need no
        # server process (Megatron starts one, and importing PyTorch there takes seconds).
        Replacement(writer, "get_write_results_queue", _always(_results_queue())),
        Replacement(norm, "WrappedTorchNorm.__new__", _for_sequence_parallel),
    ]


def _results_queue() -> Callable[[], queue.Queue[Any]]:
    results: queue.Queue[Any] = queue.Queue()
    return lambda: results


def _for_sequence_parallel(new: Callable[..., Any]) -> Any:
    """PyTorch's norms under sequence parallelism, which Megatron allows for TE and apex norms only.

    All that they lack is the mark by which Megatron sums their gradients over the tensor-parallel
    ranks, each of which has seen its part of the sequence.
    """

    @functools.wraps(new)
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm = new(cls, unsplit, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(__new__)


def _megatron_training_rows() -> list[Replacement]:
    # `training` binds these two names at its import, scripts take them from `initialize`.
    initialize, training = "megatron.training.initialize", "megatron.training.training"
    return [
        Replacement(initialize, "initialize_megatron", _without_cuda_check),
        Replacement(training, "initialize_megatron", _without_cuda_check),
        # The warm-up only draws random numbers here, which would make the initial weights depend on
        # flags such as --seq-length: on CPU they come from the same generator.
        Replacement(initialize, "set_jit_fusion_options", _always(stand_in.nothing)),
        Replacement(training, "set_jit_fusion_options", _always(stand_in.nothing)),
        Replacement("megatron.training.arguments", "validate_args", _after_adjusting_flags),
    ]


def _without_cuda_check(initialize: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize, allow_no_cuda=True)


def _after_adjusting_flags(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def adjust_and_validate(args: Any, *rest: Any, **kwargs: Any) -> Any:
        cpu_flags.adjust(args)
        return validate(args, *rest, **kwargs)

    return adjust_and_validate


def _import_megatron_uncompiled() -> None:
    """Import Megatron with its `@jit_fuser` functions left eager.

    `torch.compile` on CPU needs a C++ compiler and takes longer than a small run. Functions that an
    earlier import has already wrapped run eagerly by torch's compile stance, until `disable()`.
    """
    wrapped_already = "megatron.core" in sys.modules
    if not wrapped_already:
        with _torch_compile_does_nothing():
            importlib.import_module("megatron.core")
    jit = importlib.import_module("megatron.core.jit")
    original = jit.jit_fuser
    jit.disable_jit_fuser()
    _closing.callback(setattr, jit, "jit_fuser", original)
    if wrapped_already:
        _closing.enter_context(torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def _torch_compile_does_nothing() -> Iterator[None]:
    def leave(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
        return function if function is not None else leave

    compile_, torch.compile = torch.compile, leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _quiet_rng_warning() -> None:
    """Megatron warns when a CUDA random context moves the CPU generator; here they are one."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def expected(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logger.addFilter(expected)
    _closing.callback(logger.removeFilter, expected)


def _satisfy_connection_check() -> None:
    """Megatron demands CUDA_DEVICE_MAX_CONNECTIONS=1 with tensor parallelism on any device."""
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    if variable not in os.environ:
        os.environ[variable] = "1"
        _closing.callback(os.environ.pop, variable, None)


def _use_all_cores() -> None:
    """Give a lone process every core, unless the user has set OMP_NUM_THREADS.

    With more processes torchrun sets OMP_NUM_THREADS=1 itself.
    """
    if stand_in.device_count() == 1 and "OMP_NUM_THREADS" not in os.environ:
        _closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(len(os.sched_getaffinity(0)))
