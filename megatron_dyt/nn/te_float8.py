"""DyT's output as Transformer Engine's Float8Tensor, which TE's linear layers take as it is.

**Not run with Transformer Engine yet**: written from its documentation and tested with stand-ins of its
classes. Nothing calls it unless you do, and no flag switches it on.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.nn.dynamic_tanh import DynamicTanh
from megatron_dyt.ops.backends import choose_implementation
from megatron_dyt.ops.dyt_fp8 import dyt_fp8, fp8_scale
from megatron_dyt.ops.library import dyt_gradients, save_for_backward


def quantized_for_te(norm: DynamicTanh, x: Tensor) -> Tensor:
    """norm(x) quantized to e4m3 by its known bound, as a Float8Tensor of x's dtype, for a TE linear layer.

    Under `te.fp8_autocast` such a layer uses it instead of quantizing its input with its own recipe. All
    tensor parallel ranks have the same scale, because it depends on the parameters alone. Backward passes
    the gradient straight through the rounding, as FP8 training does.

    Args:
        norm: any function but identity.
        x: (..., hidden_size), fp32, bf16 or fp16.

    Raises:
        UserError: Transformer Engine is not installed, or lacks `Float8Tensor` or `Float8Quantizer`.
        ValueError: as `megatron_dyt.ops.dyt_fp8`.
    """
    te_classes()
    y: Tensor = _ToFloat8.apply(
        x, norm.alpha, norm.weight, norm.bias, norm.shift, norm.function, norm.backend
    )
    return y


def te_classes() -> tuple[Any, Any, Any]:
    """Transformer Engine's (Float8Tensor, Float8Quantizer, the dtype e4m3).

    Raises:
        UserError: it is not installed, or lacks one of them.
    """
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        dtypes = importlib.import_module("transformer_engine_torch").DType
    except ImportError as error:
        raise UserError(
            f"quantized_for_te needs Transformer Engine, which does not import here ({error}). "
            "Install it, or take the raw tensors of megatron_dyt.ops.dyt_fp8."
        ) from error
    missing = [name for name in ("Float8Tensor", "Float8Quantizer") if not hasattr(te, name)]
    if missing:
        raise UserError(
            f"this Transformer Engine has no transformer_engine.pytorch.{missing[0]}; install a release that "
            "documents it (2.x), or take the raw tensors of megatron_dyt.ops.dyt_fp8."
        )
    return te.Float8Tensor, te.Float8Quantizer, dtypes.kFloat8E4M3


class _ToFloat8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        function: str,
        backend: str,
    ) -> Tensor:
        y8, scale_inv = dyt_fp8(x, alpha, weight, bias, function=function, shift=shift, backend=backend)
        implementation = choose_implementation(backend, x.device, function, x.dtype)
        save_for_backward(ctx, (x, alpha, weight, bias, shift, function, implementation), None)
        tensor, quantizer, e4m3 = te_classes()
        y: Tensor = tensor(
            shape=y8.shape,
            dtype=x.dtype,
            data=y8.view(torch.uint8),
            fp8_scale_inv=scale_inv,
            fp8_dtype=e4m3,
            quantizer=quantizer(
                scale=fp8_scale(weight, bias), amax=torch.zeros_like(scale_inv), fp8_dtype=e4m3
            ),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*dyt_gradients(ctx, dy, list(ctx.needs_input_grad[:5])), None, None)
