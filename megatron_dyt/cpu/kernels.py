"""The C kernels of `layer_kernels.c` in PyTorch: cross-entropy, SwiGLU, rotary embedding and RMSNorm.

All take and return fp32; `fits` says whether tensors may be given to them. They have first derivatives, in
reverse mode, alone.
"""

# Dimension letters: R  rows, all dimensions but the last    N  channels or vocabulary
#                    S  tokens of a sequence   B  sequences   H  heads   D  channels of a head

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dyt.ops.native import in_memory, is_observed, is_transformed, open_library, threads_for

_library = open_library(Path(__file__).with_name("layer_kernels.c"), "source_crc32")
if _library is not None:
    _library.has_attention.restype = _library.attention_scratch.restype = ctypes.c_int64

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


# The attention of `layer_kernels.c` needs AVX-512.
HAS_ATTENTION = _library is not None and bool(_library.has_attention())


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


def _adjacent(t: Tensor) -> Tensor:
    """`t` in memory, with adjacent channels."""
    t = in_memory(t)
    return t if t.stride(-1) == 1 else t.contiguous()


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
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dout, cos, sin, is_backward=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_backward: bool = False) -> Tensor:
    x = _adjacent(x)
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
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, columns, threads = _shape(x)
        blocks = max(1, min(_BLOCKS, rows // _MIN_BLOCK_ROWS))
        dx, dweights = _new(*x.shape), _new(blocks, columns, dtype=torch.float64)
        sizes = rows, columns, blocks, threads
        _call("rms_norm_backward", *sizes, ctx.eps, _dense(dout), x, weight, dx, dweights)
        return dx, dweights.sum(0).float(), None


class _Heads(ctypes.Structure):
    """`struct heads` of the library: where a tensor's heads are."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("token", "batch", "head")))


_SIZES = ("tokens", "keys", "batch", "heads", "groups", "channels", "is_causal", "threads", "scratch_size")
_HEADS = ("query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue")


class _Attention(ctypes.Structure):
    """`struct attention` of the library."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, _Heads) for name in _HEADS),
        ("log_sums", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


def _attend(is_causal: bool, scale: float, log_sums: Tensor, **tensors: Tensor) -> None:
    """Run the kernel on tensors [S, B, H or G, D] by their names in `struct attention`."""
    query, key = tensors["query"], tensors["key"]
    (tokens, batch, heads, channels), (keys, _, groups, _) = query.shape, key.shape
    library = _library
    assert library is not None
    threads = min(threads_for(batch * heads * tokens * keys), batch * groups)
    size = library.attention_scratch(ctypes.c_int64(keys), ctypes.c_int64(channels))
    scratch = _new(threads, size)
    sizes = (tokens, keys, batch, heads, groups, channels, is_causal, threads, size)
    places = {name: _Heads(t.data_ptr(), *t.stride()[:3]) for name, t in tensors.items()}
    call = _Attention(*sizes, scale, log_sums=log_sums.data_ptr(), scratch=scratch.data_ptr(), **places)
    library.attention(ctypes.byref(call))


class Attention(torch.autograd.Function):
    """softmax(scale q k^T) v [S, B, H, D] of q [S, B, H, D], k and v [keys, B, G, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
        query, key, value = map(_adjacent, (query, key, value))
        tokens, batch, heads, channels = query.shape
        out, log_sums = _new(tokens, batch, heads, channels), _new(batch, heads, tokens)
        _attend(is_causal, scale, log_sums, query=query, key=key, value=value, out=out)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        forward = {"query": query, "key": key, "value": value, "out": out, "dout": _adjacent(dout)}
        found = [_new(*t.shape) for t in (query, key, value)]
        gradients = dict(zip(("dquery", "dkey", "dvalue"), found, strict=True))
        _attend(ctx.is_causal, ctx.scale, log_sums, **forward, **gradients)
        dquery, dkey, dvalue = found
        return dquery, dkey, dvalue, None, None
