"""C kernels: how their libraries are opened, and which tensors may be handed to one by their address.

They are compiled when megatron_dyt is installed (setup.py).
"""

import ctypes
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A thread for every so many elements: where PyTorch's own operators start another one
# (at::internal::GRAIN_SIZE). Below, waking a thread takes longer than its share of the work.
_ELEMENTS_PER_THREAD = 1 << 15


def open_library(source: Path, crc32_symbol: str) -> ctypes.CDLL | None:
    """What `source` was compiled to; None without, or where that was another version of it."""
    try:
        library = ctypes.CDLL(str(source.with_suffix(".so")))  # after torch: they share its OpenMP threads
        crc32 = getattr(library, crc32_symbol)
        crc32.restype = ctypes.c_uint32
        is_of_this_version = crc32() == zlib.crc32(source.read_bytes())
    except (OSError, AttributeError):
        return None
    return library if is_of_this_version else None


def threads_for(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))


def in_memory(t: Tensor) -> Tensor:
    """`t` with the values that its memory has: not negated lazily, not PyTorch's zeros without memory."""
    if t._is_zerotensor():
        return t.clone()
    return t.resolve_neg() if t.is_neg() else t


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, and nothing compiles."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), str))


def is_observed(*arguments: object) -> bool:
    """Whether operations on these are seen by torch.compile, torch.jit, a dispatch mode or a subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, arguments))
    )
