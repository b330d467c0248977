"""DyT by the C kernels of `cpu_kernels.c`: what `triton_dyt.py` is for GPUs, for CPUs.

They are compiled when megatron_dyt is installed (setup.py). Where that was not possible `IS_BUILT` is false,
and the reference runs.
"""

import ctypes
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


# Matrices whose rows may be apart, and the field that says how far.
_STRIDES = {name: f"{name}_stride" for name in ("x", "residual", "dy", "dsum")}


class _Call(ctypes.Structure):
    """`struct call` of the library, which says what each field is."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "blocks", "threads", "function", "is_bf16")),
        *((name, ctypes.c_double) for name in ("alpha", "shift")),
        *((name, ctypes.c_void_p) for name in _STRIDES),
        *((stride, ctypes.c_int64) for stride in _STRIDES.values()),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "y", "sum", "partials")),
        *((name, ctypes.c_void_p) for name in ("dx", "dweight", "dbias", "dalpha", "dshift")),
    )


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
    return t if t.dtype == dtype else t.to(dtype)


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous and uninitialized."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _call(kernel: str, x: Tensor, parameters: Parameters, blocks: int, **tensors: Tensor | None) -> None:
    """Run a kernel on x and on the tensors of these names in `struct call`."""
    hidden = x.shape[-1]
    alpha, weight, bias, shift, function = parameters
    vectors = {"weight": _vector(weight), "bias": None if bias is None else _vector(bias)}
    held = {"x": x, **vectors, **tensors}  # Until the kernel has run.
    fields: dict[str, float] = {
        "rows": x.numel() // hidden,
        "hidden": hidden,
        "blocks": blocks,
        "threads": threads_for(x.numel()),
        "function": FUNCTIONS.index(function),
        "is_bf16": x.dtype == torch.bfloat16,
        "alpha": alpha.item(),
        "shift": 0.0 if shift is None else shift.item(),
    }
    for name, tensor in held.items():
        if tensor is None:
            continue
        if name in _STRIDES:
            tensor, fields[_STRIDES[name]] = _rows(_as(tensor, x.dtype), hidden)
            held[name] = tensor
        fields[name] = address = tensor.data_ptr()
        if not address and tensor.numel():
            raise RuntimeError(f"the memory of {name} has been freed; DyT cannot read or write it")
    getattr(_library, kernel)(ctypes.byref(_Call(**fields)))


def forward(x: Tensor, parameters: Parameters, out: Tensor | None = None) -> Tensor:
    """See `backends.Implementation`, as for the others; x has one of these DTYPES."""
    y = _new(x) if out is None else out
    _call("dyt_forward", x, parameters, _FORWARD_BLOCKS, y=y)
    return y


def residual_forward(x: Tensor, residual: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    if x.dtype != residual.dtype:
        total = torch.add(x, residual).contiguous()
        return forward(total, parameters), total
    y, total = _new(x), _new(x)
    _call("dyt_forward", x, parameters, _FORWARD_BLOCKS, residual=residual, y=y, sum=total)
    return y, total


def backward(
    dy: Tensor, x: Tensor, parameters: Parameters, needs: Sequence[bool], dsum: Tensor | None = None
) -> list[Tensor]:
    alpha, weight, _, shift, _ = parameters
    names = ("dx", "dalpha", "dweight", "dbias", "dshift")
    likes = (x, alpha, weight, weight, alpha if shift is None else shift)
    wanted = [(name, like) for name, like, needed in zip(names, likes, needs, strict=True) if needed]
    gradients = {name: _new(like, x.dtype if name == "dx" else torch.float32) for name, like in wanted}
    hidden = x.shape[-1]
    blocks = max(1, min(_BACKWARD_BLOCKS, x.numel() // hidden // _MIN_BLOCK_ROWS))
    partials = torch.empty((blocks, _SUMS, hidden), dtype=torch.float64, device="cpu")
    _call("dyt_backward", x, parameters, blocks, dy=dy, dsum=dsum, partials=partials, **gradients)
    return [_as(gradients[name], like.dtype) for name, like in wanted]
