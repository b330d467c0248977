"""DyT by the C kernels of `cpu_kernels.c`: what `triton_dyt.py` is for GPUs, for CPUs.

They are compiled when megatron_dyt is installed (setup.py). Where that was not possible `IS_BUILT` is false,
and the reference runs.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_dyt.ops.native import in_memory, open_library, threads_for
from megatron_dyt.ops.parameters import Parameters

SOURCE = Path(__file__).with_name("cpu_kernels.c")
LIBRARY = SOURCE.with_suffix(".so")

FUNCTIONS = ("tanh", "erf")  # by their numbers in the library
DTYPES = (torch.float32, torch.bfloat16)

# Blocks of rows are dealt to threads; their numbers do not depend on that of threads, so neither do results.
# Forward: several per thread on any machine, so that no thread waits long for the last one.
_FORWARD_BLOCKS = 256
# Backward: each block has partial sums of its own, 32 bytes per column. In 32 rows of fp32 it moves 384 bytes
# of x, dy and dx per column, so the sums stay below a tenth of that. 64 blocks are enough for 64 cores.
_BACKWARD_BLOCKS, _MIN_BLOCK_ROWS = 64, 32
_SUMS = 4  # SUMS of the library: for dalpha, dweight, dbias and dshift

# `struct call` of the library, which explains it: numbers, matrices, their strides, other pointers.
_CALL = struct.Struct("@6q2d 4P 4q 10P")
_MATRICES = ("x", "residual", "dy", "dsum")
_OTHERS = ("weight", "bias", "y", "sum", "partials", "dx", "dweight", "dbias", "dalpha", "dshift")
_NOT_GIVEN: tuple[None, int] = (None, 0)

# As they are before the CPU runtime wraps them: a wrapper costs as much as they do on a few rows.
_CPU = torch.device("cpu")
_empty, _empty_like, _to = torch.empty, torch.empty_like, Tensor.to

_library = open_library(SOURCE, "dyt_source_crc32")
IS_BUILT = _library is not None  # by itself, as torch.compile traces what reads it


def _rows(t: Tensor, hidden: int) -> tuple[Tensor, int]:
    """`t` with adjacent columns, and the stride of its rows; a copy only where its strides allow no view."""
    if t.is_contiguous():  # Most are; asking is cheaper than a view.
        return in_memory(t), hidden
    rows = in_memory(t.reshape(-1, hidden))
    rows = rows if rows.stride(1) == 1 or hidden == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _vector(t: Tensor) -> Tensor:
    return in_memory(t.float()).contiguous()


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`; asking first is cheaper."""
    return t if t.dtype == dtype else _to(t, dtype)


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous and uninitialized."""
    return _empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _call(
    kernel: str,
    parameters: Parameters,
    blocks: int,
    read: Sequence[Tensor | None],
    written: Sequence[Tensor | None],
) -> None:
    """Run a kernel. `read` are the `_MATRICES`, `written` those of `_OTHERS` from y on."""
    x = read[0]
    assert x is not None
    hidden, elements, dtype = x.shape[-1], x.numel(), x.dtype
    alpha, weight, bias, shift, function = parameters
    matrices, strides = zip(
        *(_NOT_GIVEN if t is None else _rows(_as(t, dtype), hidden) for t in read), strict=True
    )
    vectors = _vector(weight), None if bias is None else _vector(bias)
    held = (*matrices, *vectors, *written)  # Until the kernel has run.
    addresses = [0 if t is None else t.data_ptr() or _no_address(t, held) for t in held]
    call = _CALL.pack(
        elements // hidden,
        hidden,
        blocks,
        threads_for(elements),
        FUNCTIONS.index(function),
        dtype == torch.bfloat16,
        alpha.item(),
        0.0 if shift is None else shift.item(),
        *addresses[: len(_MATRICES)],
        *strides,
        *addresses[len(_MATRICES) :],
    )
    getattr(_library, kernel)(call)


def _no_address(t: Tensor, held: Sequence[Tensor | None]) -> int:
    """0 for a tensor without elements, which has none."""
    if t.numel():
        name = next(name for name, each in zip(_MATRICES + _OTHERS, held, strict=True) if each is t)
        raise RuntimeError(f"the memory of {name} has been freed; DyT cannot read or write it")
    return 0


def forward(x: Tensor, parameters: Parameters, out: Tensor | None = None) -> Tensor:
    """See `backends.Implementation`, as for the others; x has one of these DTYPES."""
    y = _new(x) if out is None else out
    _forward(x, None, parameters, y, None)
    return y


def _forward(
    x: Tensor, residual: Tensor | None, parameters: Parameters, y: Tensor, total: Tensor | None
) -> None:
    blocks = max(1, min(_FORWARD_BLOCKS, x.numel() // x.shape[-1]))
    _call("dyt_forward", parameters, blocks, (x, residual, None, None), (y, total, *[None] * 6))


def residual_forward(x: Tensor, residual: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    if x.dtype != residual.dtype:
        total = torch.add(x, residual).contiguous()
        return forward(total, parameters), total
    y, total = _new(x), _new(x)
    _forward(x, residual, parameters, y, total)
    return y, total


def backward(
    dy: Tensor, x: Tensor, parameters: Parameters, needs: Sequence[bool], dsum: Tensor | None = None
) -> list[Tensor]:
    alpha, weight, _, shift, _ = parameters
    likes = (x, alpha, weight, weight, alpha if shift is None else shift)
    dx = _new(x) if needs[0] else None
    dalpha, dweight, dbias, dshift = [
        _new(like, torch.float32) if needed else None
        for like, needed in zip(likes[1:], needs[1:], strict=True)
    ]
    hidden = x.shape[-1]
    blocks = max(1, min(_BACKWARD_BLOCKS, x.numel() // hidden // _MIN_BLOCK_ROWS))
    partials = _empty(blocks * _SUMS * hidden, dtype=torch.float64, device=_CPU)
    written = (None, None, partials, dx, dweight, dbias, dalpha, dshift)
    _call("dyt_backward", parameters, blocks, (x, None, dy, dsum), written)
    gradients = (dx, dalpha, dweight, dbias, dshift)
    return [_as(t, like.dtype) for t, like in zip(gradients, likes, strict=True) if t is not None]
