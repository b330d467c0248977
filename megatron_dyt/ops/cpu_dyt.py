"""DyT by the C kernels of `cpu_kernels.c`: what `triton_dyt.py` is for GPUs, for CPUs.

They are compiled when megatron_dyt is installed (setup.py). Where that was not possible `IS_BUILT` is false,
and the reference runs.
"""

import ctypes
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernels.c")
LIBRARY = SOURCE.with_suffix(".so")

FUNCTIONS = ("tanh", "erf")  # by their numbers in the library
DTYPES = (torch.float32, torch.bfloat16)

# As many as PyTorch's own operators want for each thread.
_ELEMENTS_PER_THREAD = 1 << 15
# Blocks of rows are dealt to threads. In backward each has partial sums of its own.
_FORWARD_BLOCKS = 256
_BACKWARD_BLOCKS, _MIN_BLOCK_ROWS = 64, 32
_SUMS = 4


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


def _open() -> ctypes.CDLL | None:
    """The compiled kernels; None without, or where they were compiled from another source."""
    try:
        library = ctypes.CDLL(str(LIBRARY))  # after torch: they share its OpenMP threads
        library.dyt_source_crc32.restype = ctypes.c_uint32
        is_of_this_version = library.dyt_source_crc32() == zlib.crc32(SOURCE.read_bytes())
    except (OSError, AttributeError):
        return None
    return library if is_of_this_version else None


_library = _open()
IS_BUILT = _library is not None  # by itself, as torch.compile traces what reads it


def _in_memory(t: Tensor) -> Tensor:
    """`t` with the values that its memory has: not negated lazily, not PyTorch's zeros without memory."""
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


def _rows(t: Tensor, hidden: int) -> Tensor:
    """`t` as (rows, hidden) with adjacent columns; a copy only where its strides do not allow a view."""
    rows = _in_memory(t.reshape(-1, hidden))
    return rows if rows.stride(1) == 1 or hidden == 1 else rows.contiguous()


def _vector(t: Tensor) -> Tensor:
    return _in_memory(t.float()).contiguous()


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`; asking first is cheaper."""
    return t if t.dtype == dtype else t.to(dtype)


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous and uninitialized."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _call(
    kernel: str,
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    function: str,
    blocks: int,
    **tensors: Tensor | None,
) -> None:
    """Run a kernel on `x` and the tensors of these names in `struct call`, of (rows, hidden) or vectors.

    The caller holds references to all of them until this returns.
    """
    rows, hidden = x.shape
    fields: dict[str, float] = {
        "rows": rows,
        "hidden": hidden,
        "blocks": blocks,
        "threads": max(1, min(torch.get_num_threads(), rows * hidden // _ELEMENTS_PER_THREAD)),
        "function": FUNCTIONS.index(function),
        "is_bf16": x.dtype == torch.bfloat16,
        "alpha": alpha.item(),
        "shift": 0.0 if shift is None else shift.item(),
    }
    for name, tensor in (("x", x), *tensors.items()):
        if tensor is not None:
            fields[name] = address = tensor.data_ptr()
            if not address and tensor.numel():
                raise RuntimeError(f"the memory of {name} has been freed; DyT cannot read or write it")
            if name in _STRIDES:
                fields[_STRIDES[name]] = tensor.stride(0)
    getattr(_library, kernel)(ctypes.byref(_Call(**fields)))


def forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dyt_forward` for CPU tensors of these DTYPES; the result, or `out`, is contiguous."""
    hidden = x.shape[-1]
    y = _new(x) if out is None else out
    w, b = _vector(weight), None if bias is None else _vector(bias)
    _call("dyt_forward", _rows(x, hidden), alpha, shift, function, _FORWARD_BLOCKS, weight=w, bias=b, y=y)
    return y


def residual_forward(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor]:
    """`reference.dyt_residual_forward` for CPU tensors; both results are contiguous."""
    if x.dtype != residual.dtype:
        total = torch.add(x, residual).contiguous()
        return forward(total, alpha, weight, bias, shift, function), total
    hidden = x.shape[-1]
    y, total = _new(x), _new(x)
    w, b = _vector(weight), None if bias is None else _vector(bias)
    r = _rows(residual, hidden)
    _call(
        "dyt_forward",
        _rows(x, hidden),
        alpha,
        shift,
        function,
        _FORWARD_BLOCKS,
        residual=r,
        weight=w,
        bias=b,
        y=y,
        sum=total,
    )
    return y, total


def backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
    dsum: Tensor | None = None,
) -> list[Tensor]:
    """`reference.dyt_backward` for CPU tensors, with `dsum` added to dx.

    Returns, in this order, those gradients of x, alpha, weight, bias and shift that `needs` asks for.
    """
    hidden = x.shape[-1]
    rows = _rows(x, hidden)
    names = ("dx", "dalpha", "dweight", "dbias", "dshift")
    likes = (x, alpha, weight, weight, alpha if shift is None else shift)
    wanted = [(name, like) for name, like, needed in zip(names, likes, needs, strict=True) if needed]
    gradients = {name: _new(like, x.dtype if name == "dx" else torch.float32) for name, like in wanted}
    upstream, w = _rows(_as(dy, x.dtype), hidden), _vector(weight)
    other = None if dsum is None else _rows(_as(dsum, x.dtype), hidden)
    blocks = max(1, min(_BACKWARD_BLOCKS, len(rows) // _MIN_BLOCK_ROWS))
    partials = w.new_empty((blocks, _SUMS, hidden), dtype=torch.float64)
    _call(
        "dyt_backward",
        rows,
        alpha,
        shift,
        function,
        blocks,
        dy=upstream,
        dsum=other,
        weight=w,
        partials=partials,
        **gradients,
    )
    return [_as(gradients[name], like.dtype) for name, like in wanted]
