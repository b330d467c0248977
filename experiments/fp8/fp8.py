"""DyT with FP8 output, whose scale is known beforehand: |DyT(x)| <= max(|weight| + |bias|) for every x."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.ops import dyt, reference
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


def quantized_for_te(norm: DynamicTanh, x: Tensor) -> Tensor:
    """norm(x) quantized to e4m3 by its known bound, as a Float8Tensor of x's dtype, for a TE linear layer.

    Under `te.fp8_autocast` such a layer uses it instead of quantizing its input with its own recipe. Backward
    passes the gradient straight through the rounding, as FP8 training does.

    Args:
        norm: any function but identity.
        x: (..., hidden_size), fp32, bf16 or fp16.

    Raises:
        UserError: Transformer Engine is not installed, or lacks `Float8Tensor` or `Float8Quantizer`.
        ValueError: as `dyt_fp8`.
    """
    te_classes()
    y: Tensor = _ToFloat8.apply(x, norm.alpha, norm.weight, norm.bias, norm.shift, norm.function)
    return y


def te_classes() -> tuple[Any, Any, Any]:
    """Transformer Engine's (Float8Tensor, Float8Quantizer, the dtype e4m3), or UserError."""
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        dtypes = importlib.import_module("transformer_engine_torch").DType
    except ImportError as error:
        raise UserError(
            f"quantized_for_te needs Transformer Engine, which does not import here ({error}). "
            "Install it, or take the raw tensors of dyt_fp8."
        ) from error
    missing = [name for name in ("Float8Tensor", "Float8Quantizer") if not hasattr(te, name)]
    if missing:
        raise UserError(
            f"this Transformer Engine has no transformer_engine.pytorch.{missing[0]}; install a release that "
            "documents it (2.x), or take the raw tensors of dyt_fp8."
        )
    return te.Float8Tensor, te.Float8Quantizer, dtypes.kFloat8E4M3


class _ToFloat8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *tensors, ctx.function = parameters
        ctx.save_for_backward(x, *tensors)
        y8, scale_inv = dyt_fp8(x, *parameters)
        tensor, quantizer, e4m3 = te_classes()
        y: Tensor = tensor(
            shape=y8.shape,
            dtype=x.dtype,
            data=y8.view(torch.uint8),
            fp8_scale_inv=scale_inv,
            fp8_dtype=e4m3,
            quantizer=quantizer(
                scale=fp8_scale(*tensors[1:3]), amax=torch.zeros_like(scale_inv), fp8_dtype=e4m3
            ),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        x, alpha, weight, bias, shift = leaves
        with torch.enable_grad():
            y = dyt(x, alpha, weight, bias, function=ctx.function, shift=shift)
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
        return (*(None if t is None else next(found) for t in leaves), None)
