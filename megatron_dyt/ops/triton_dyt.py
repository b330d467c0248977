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

FUNCTIONS = ("tanh", "erf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# How exact f(z) has to be: bits of the result's significand.
_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float8_e4m3fn: 8}


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU tensors."""
    return not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


def forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dyt_forward` for functions in FUNCTIONS and dtypes in DTYPES; y, or `out`, is contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch_forward(x, None, alpha, weight, bias, shift, function, y, None)
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
    """`reference.dyt_residual_forward`: (y, x + residual), both contiguous."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y, total = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    _launch_forward(x, residual, alpha, weight, bias, shift, function, y, total)
    return y, total


def has_fp8(device: torch.device) -> bool:
    """Whether the kernels can write FP8 there: the interpreter, and NVIDIA from Ada and Hopper on."""
    if device.type == "cpu":
        return is_interpreted()
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    scale: Tensor,
) -> Tensor:
    """scale * DyT(x), rounded once, to float8_e4m3fn; scale is (1,) in fp32."""
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _launch_forward(x, None, alpha, weight, bias, shift, function, y, None, scale)
    return y


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
    """`reference.dyt_backward`, plus dsum on dx. Deterministic: sums have one order, and no atomics.

    Returns, in this order, those gradients of x, alpha, weight, bias and shift that `needs` asks for.
    """
    likes = (x, alpha, weight, weight, shift)
    outputs = [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if needed and like is not None else None
        for like, needed in zip(likes, needs, strict=True)
    ]
    if x.numel() > 0:
        _launch_backward(dy, x, alpha, weight, shift, function, dsum, outputs)
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
    x: Tensor,
    residual: Tensor | None,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    y: Tensor,
    total: Tensor | None,
    scale: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    x = _as_rows(x)
    residual = None if residual is None else _as_rows(residual)
    rows, hidden = x.shape
    chip = launch.chip_of(x.device)
    # Of what is computed with: y is narrower in FP8, wider than x beside a wider residual.
    tile = launch.forward_tile(chip, rows, hidden, max(x.itemsize, y.itemsize))
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
            scale,
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
        )


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    dsum: Tensor | None,
    outputs: Sequence[Tensor | None],
) -> None:
    dx, d_alpha, d_weight, d_bias, d_shift = outputs
    x, dy = _as_rows(x), _as_rows(dy)
    dsum = None if dsum is None or dx is None else _as_rows(dsum)
    rows, hidden = x.shape
    chip = launch.chip_of(x.device)
    unit = _stride_unit(x, dy, dsum)
    tile = launch.backward_tile(chip, hidden, x.itemsize, unit, function)
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
            FUNCTION=function,
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
            )
