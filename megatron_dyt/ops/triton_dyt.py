"""DyT by the Triton kernels: what `cpu_dyt.py` is for CPUs, for CUDA and ROCm devices.

Triton's interpreter (TRITON_INTERPRET=1 before the first import) runs the same kernels on CPU tensors.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megatron_dyt.ops import triton_kernels as kernels
from megatron_dyt.ops import triton_launch as launch
from megatron_dyt.ops.parameters import Parameters

FUNCTIONS = ("tanh", "erf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# How exact f(z) has to be: bits of the result's significand.
_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# A product and a sum are one instruction. It is what Triton does unasked, but 3.9 warns where a launch leaves
# it open, and 3.10 is announced to do otherwise.
_OPTIONS = {"enable_fp_fusion": True}


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU tensors."""
    return not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


def forward(x: Tensor, parameters: Parameters, out: Tensor | None = None) -> Tensor:
    """See `backends.Implementation`, as for the others; for functions in FUNCTIONS and dtypes in DTYPES."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch_forward(x, None, parameters, y, None)
    return y


def residual_forward(x: Tensor, residual: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y, total = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    _launch_forward(x, residual, parameters, y, total)
    return y, total


def backward(
    dy: Tensor, x: Tensor, parameters: Parameters, needs: Sequence[bool], dsum: Tensor | None = None
) -> list[Tensor]:
    """Deterministic: sums have one order, and no atomics."""
    alpha, weight, _, shift, _ = parameters
    outputs = [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if needed and like is not None else None
        for like, needed in zip((x, alpha, weight, weight, shift), needs, strict=True)
    ]
    if x.numel() > 0:
        _launch_backward(dy, x, parameters, dsum, outputs)
    else:
        for output in outputs:
            if output is not None:
                output.zero_()
    return [output for output in outputs if output is not None]


def _as_rows(t: Tensor) -> Tensor:
    """t as (rows, hidden) with contiguous rows: a view where its strides allow it, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _stride_unit(*tensors: Tensor | None) -> int:
    """The power of two, up to 16, that divides the distance between rows in all tensors."""
    return math.gcd(16, *(t.stride(0) for t in tensors if t is not None))


def _on_device_of(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _launch_forward(
    x: Tensor, residual: Tensor | None, parameters: Parameters, y: Tensor, total: Tensor | None
) -> None:
    if x.numel() == 0:
        return
    alpha, weight, bias, shift, function = parameters
    x = _as_rows(x)
    residual = None if residual is None else _as_rows(residual)
    rows, hidden = x.shape
    chip = launch.chip_of(x.device)
    # y is wider than x beside a wider residual.
    tile = launch.forward_tile(chip, rows, hidden, y.itemsize)
    unit = _stride_unit(x, residual)
    grid = (launch.ceil_div(rows, tile.block_m) * launch.ceil_div(hidden, tile.block_n),)
    with _on_device_of(x):
        kernels.forward_kernel[grid](
            x,
            residual,
            alpha,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            shift,
            y,
            total,
            rows,
            x.stride(0) // unit,
            0 if residual is None else residual.stride(0) // unit,
            HIDDEN=hidden,
            STRIDE_UNIT=unit,
            FUNCTION=function,
            PRECISION=_PRECISION[y.dtype],
            PTX=chip.ptx,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.warps,
            **_OPTIONS,
        )


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    parameters: Parameters,
    dsum: Tensor | None,
    outputs: Sequence[Tensor | None],
) -> None:
    alpha, weight, _, shift, _ = parameters
    dx, d_alpha, d_weight, d_bias, d_shift = outputs
    x, dy = _as_rows(x), _as_rows(dy)
    dsum = None if dsum is None or dx is None else _as_rows(dsum)
    rows, hidden = x.shape
    chip = launch.chip_of(x.device)
    unit = _stride_unit(x, dy, dsum)
    tile = launch.backward_tile(chip, hidden, x.itemsize, unit, parameters.name)
    tiles = launch.ceil_div(hidden, tile.block_n)
    programs = launch.row_programs(chip, tile, rows, hidden, x.itemsize)

    per_column = (d_weight is not None) + (d_bias is not None)
    per_tile = (d_alpha is not None) + (d_shift is not None)
    # Rows of partial sums start at multiples of 16 bytes.
    width = launch.ceil_div(per_column * hidden + per_tile * tiles, 4) * 4
    partial = torch.empty(programs * width, dtype=torch.float32, device=x.device) if width > 0 else None
    with _on_device_of(x):
        kernels.backward_kernel[(programs * tiles,)](
            dy,
            x,
            dsum,
            alpha,
            weight.contiguous(),
            shift,
            dx,
            partial,
            rows,
            launch.ceil_div(rows, tile.rows),
            programs,
            dy.stride(0) // unit,
            x.stride(0) // unit,
            0 if dsum is None else dsum.stride(0) // unit,
            HIDDEN=hidden,
            STRIDE_UNIT=unit,
            FUNCTION=parameters.name,
            PRECISION=_PRECISION[x.dtype],
            PTX=chip.ptx,
            NEEDS_ALPHA=d_alpha is not None,
            NEEDS_WEIGHT=d_weight is not None,
            NEEDS_BIAS=d_bias is not None,
            NEEDS_SHIFT=d_shift is not None,
            PARTIAL_WIDTH=width,
            UNROLL=tile.unroll,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.warps,
            **_OPTIONS,
            **launch.backward_options(chip, x.itemsize),
        )
        if partial is not None:
            kernels.finalize_kernel[(launch.ceil_div(hidden, launch.FINALIZE_BLOCK_N),)](
                partial,
                d_alpha,
                d_weight,
                d_bias,
                d_shift,
                programs,
                HIDDEN=hidden,
                TILES=tiles,
                PARTIAL_WIDTH=width,
                BLOCK_P=launch.FINALIZE_BLOCK_P,
                BLOCK_N=launch.FINALIZE_BLOCK_N,
                BLOCK_T=launch.next_power_of_2(tiles),
                num_warps=launch.FINALIZE_WARPS,
                **_OPTIONS,
            )
