"""DyT with FP8 output, whose scale is known beforehand: |DyT(x)| <= max(|weight| + |bias|) for every x."""

from typing import Any

import torch
from torch import Tensor

from megatron_dyt.ops import reference
from megatron_dyt.ops.parameters import Parameters

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
# sup |f| is 1 for these; identity has no bound.
BOUNDED = tuple(name for name in reference.FUNCTIONS if name != "identity")


def fp8_scale(weight: Tensor, bias: Tensor | None) -> Tensor:
    """448 / max(|weight| + |bias|), fp32 of shape (1,): what takes DyT's largest possible output to FP8's."""
    bound = weight.float().abs()
    if bias is not None:
        bound = bound + bias.float().abs()
    # Not to infinity, where all weights are 0.
    return FP8_MAX / bound.amax().clamp_min(1e-30).reshape(1)


@torch.no_grad()
def dyt_fp8(x: Tensor, *parameters: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """DyT(x) in FP8 (e4m3) and what to multiply it with: y = y8.float() * scale_inv.

    Nothing saturates, whatever x is. No gradient: a tensor of dtype float8 cannot have one.

    Args:
        x: (..., hidden), as for `megatron_dyt.ops.dyt`.
        parameters, options: those of `Parameters`; any function but identity.

    Returns:
        y8: float8_e4m3fn, contiguous, in x's shape. scale_inv: fp32, (1,).

    Raises:
        ValueError: as `megatron_dyt.ops.dyt`, and for function="identity".
    """
    p = Parameters(*parameters, **options)
    p.check(x)
    if p.function not in BOUNDED:
        raise ValueError(
            f"function is {p.function!r}, whose output has no bound to scale FP8 by; "
            f"allowed are {', '.join(BOUNDED)}"
        )
    scale = fp8_scale(p.weight, p.bias)
    # In fp32, so that it is rounded once.
    y = reference.dyt_forward(x.to(reference.compute_dtype(x)), *p)
    return (y * scale).to(FP8).contiguous(), scale.reciprocal()
