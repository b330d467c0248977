"""The C kernels of `layer_kernels.c` in PyTorch: cross-entropy, SwiGLU, rotary embedding and RMSNorm.

All take and return fp32; `fits` says whether tensors may be given to them. They have first derivatives, in
reverse mode, alone.
"""

# Dimension letters: R  rows, all dimensions but the last    N  channels or vocabulary
#                    S  tokens of a sequence   B  sequences   H  heads   D  channels of a head

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.ops.native import in_memory, is_observed, is_transformed, open_library, threads_for

_library = open_library(Path(__file__).with_name("layer_kernels.c"), "source_crc32")

# Blocks of rows with a sum of their own in backward: enough for 64 cores, and so few that the sums, in fp64,
# are a small part of what 32 rows read and write.
_BLOCKS, _MIN_BLOCK_ROWS = 64, 32


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels are there and can read these: fp32 tensors in memory, and nothing looks on."""
    return (
        _library is not None
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in tensors)
        and not is_transformed()
        and not is_observed(*tensors)
    )


def _call(kernel: str, *arguments: int | float | Tensor) -> None:
    def as_c(argument: int | float | Tensor) -> Any:
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)

    getattr(_library, kernel)(*map(as_c, arguments))


def _shape(x_RN: Tensor) -> tuple[int, int, int]:
    """Rows, columns and threads of a matrix."""
    columns = x_RN.shape[-1]
    return x_RN.numel() // columns, columns, threads_for(x_RN.numel())


def _dense(t: Tensor) -> Tensor:
    return in_memory(t).contiguous()


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


class CrossEntropy(torch.autograd.Function):
    """The loss [...] of logits [..., N] for int64 targets [...]; the gradient takes the logits' place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = _dense(logits), targets.contiguous()
        loss, maximum, total = (_new(*targets.shape) for _ in range(3))
        _call("cross_entropy", *_shape(logits), logits, targets, loss, maximum, total)
        ctx.save_for_backward(logits, targets, maximum, total)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        logits, targets, maximum, total = ctx.saved_tensors
        _call("cross_entropy_backward", *_shape(logits), _dense(dloss), targets, maximum, total, logits)
        torch.autograd.graph.increment_version(logits)  # So that a second backward pass is an error.
        return logits, None


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of the channels of x [..., 2 N] times the second: [..., N]."""
    x = _dense(x)
    out = _new(*x.shape[:-1], x.shape[-1] // 2)
    _call("swiglu", *_shape(out), x, out)
    return out


def swiglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [..., 2 N] for that of the result, dout [..., N]."""
    dout, x = _dense(dout), _dense(x)
    dx = _new(*x.shape)
    _call("swiglu_backward", *_shape(dout), dout, x, dx)
    return dx


class Rotary(torch.autograd.Function):
    """x [S, B, H, D] with the first channels of each head turned; cos and sin [S, ...] have as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dout, cos, sin, is_backward=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_backward: bool = False) -> Tensor:
    x = in_memory(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = _new(*x.shape)
    half, threads = cos.shape[-1] // 2, threads_for(x.numel())
    _call("rotary", *x.shape, half, threads, *x.stride()[:3], is_backward, x, _dense(cos), _dense(sin), out)
    return out


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, with weight [N] and eps added to the mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = _dense(x), _dense(weight)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = _new(*x.shape)
        _call("rms_norm", *_shape(x), eps, x, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, columns, threads = _shape(x)
        blocks = max(1, min(_BLOCKS, rows // _MIN_BLOCK_ROWS))
        dx, dweights = _new(*x.shape), _new(blocks, columns, dtype=torch.float64)
        sizes = rows, columns, blocks, threads
        _call("rms_norm_backward", *sizes, ctx.eps, _dense(dout), x, weight, dx, dweights)
        return dx, dweights.sum(0).float(), None
