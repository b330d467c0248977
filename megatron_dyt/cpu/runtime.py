"""Megatron-Core without a GPU: the unmodified training loop on CPU processes over gloo.

`enable()` replaces, from the table in `cpu.replacements`, what in PyTorch and Megatron needs a CUDA device;
`disable()` puts everything back. Nothing is active unless asked for, and a process that uses CUDA is
refused.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dyt import compat
from megatron_dyt.cpu import replacements
from megatron_dyt.cpu.cuda import device_count
from megatron_dyt.cpu.flags import CONNECTIONS
from megatron_dyt.errors import UserError
from megatron_dyt.patching import Patches

_patches = Patches()
_closing = contextlib.ExitStack()
_enabled = False

# Their kernels exist for GPUs only; without these packages Megatron uses PyTorch's.
_GPU_PACKAGES = ("transformer_engine", "apex")


def is_enabled() -> bool:
    """True between `enable()` and `disable()`."""
    return _enabled


def enable() -> None:
    """Let Megatron run on CPU in this process; calling it again changes nothing.

    Call it before `megatron` is imported: then Megatron's `@jit_fuser` functions stay eager, and
    Transformer Engine and apex are hidden from it. Later works too when neither is installed.

    Raises `UserError` without Megatron-Core, and when this process uses CUDA or one of these packages
    already; `RuntimeError` naming what the installed PyTorch or Megatron lacks.
    """
    global _enabled
    if _enabled:
        return
    _refuse_gpu_process()
    # torch._dynamo lists PyTorch's functions when it is imported, which must not find stand-ins.
    importlib.import_module("torch._dynamo")
    # So does `with torch.device(...)` when it is first used.
    with torch.device("meta"):
        torch.empty(0)
    with contextlib.ExitStack() as undo_on_error:
        undo_on_error.callback(_undo)
        _hide_gpu_packages()
        _import_megatron_uncompiled()
        _patches.apply(replacements.rows())
        _quiet_rng_warning()
        _satisfy_connection_check()
        _use_all_cores()
        _keep_freed_memory()
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


def _refuse_gpu_process() -> None:
    if torch.cuda.is_initialized():
        raise UserError(
            "the CPU runtime was asked for, but this process already uses CUDA. Ask for it before "
            "anything touches a GPU, or start with CUDA_VISIBLE_DEVICES= (empty)"
        )
    for package in _GPU_PACKAGES:
        if sys.modules.get(package) is not None:
            raise UserError(
                f"the CPU runtime was asked for, but {package}, which needs a GPU, is already "
                "imported. Ask for it before importing Megatron or this package"
            )


def _hide_gpu_packages() -> None:
    for package in _GPU_PACKAGES:
        if package not in sys.modules:
            sys.modules[package] = None  # type: ignore[assignment]  # "import" now fails
            _closing.callback(sys.modules.pop, package, None)


def _import_megatron_uncompiled() -> None:
    """Import Megatron with its `@jit_fuser` functions left eager.

    `torch.compile` on CPU needs a C++ compiler and takes longer than a small run. Functions that an
    earlier import has already wrapped run eagerly by torch's compile stance, until `disable()`.
    """
    wrapped_already = "megatron.core" in sys.modules
    if not wrapped_already:
        with _torch_compile_does_nothing():
            compat.megatron_version()  # Imports it: a `UserError` where there is none.
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
    if CONNECTIONS not in os.environ:
        os.environ[CONNECTIONS] = "1"
        _closing.callback(os.environ.pop, CONNECTIONS, None)


def _use_all_cores() -> None:
    """Give a lone process every core, unless the user has set OMP_NUM_THREADS.

    With more processes torchrun sets OMP_NUM_THREADS=1 itself.
    """
    if device_count() == 1 and "OMP_NUM_THREADS" not in os.environ:
        _closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(len(os.sched_getaffinity(0)))


# Options of glibc's mallopt(3) and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, which it would return to the system each time.

    Every step allocates the same activations again, and fresh pages must be zeroed by the kernel:
    that took a fifth of the step time of a small LLaMA. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}.items():
        mallopt(option, value)
        _closing.callback(mallopt, option, _DEFAULTS[option])
