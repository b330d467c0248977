"""DyT on CPU: the math of `reference.py` in few passes over memory, for training without a GPU.

Rows are processed in chunks, so that the temporaries of one chunk stay in cache and are reused:
fresh memory costs a page fault per 4 KiB, which is more than the arithmetic. For the same reason
nothing but x and the parameters is saved for backward: recomputing f(z) is cheaper than touching one
more activation-sized buffer.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import reference

# 2 MiB of fp32 per temporary. Smaller chunks start threads more often (1 core, 2048 x 1024: 1 << 16 is
# 1.4x slower, on a busy machine much more), larger ones do not fit in cache (1 << 20: 1.3x slower).
CHUNK_ELEMENTS = 1 << 19

# oneDNN's tanh is as accurate as torch.tanh (relative error 8e-8) and 4x faster, but the conversion to
# and from its tensors costs some 50 us a call.
_ONEDNN_MIN_ELEMENTS = 1 << 16
_HAS_ONEDNN_TANH = torch.backends.mkldnn.is_available() and (
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)


class _BackwardSteps(NamedTuple):
    """How one function's backward runs on a chunk, with z = a * x + s and all tensors in one dtype.

    prepare(x, a, s, state) fills `state`; slope(dy, state, g) fills g = dy * f'(z) / scale;
    value(state, x, a) returns f(z) and may overwrite `state`.
    """

    prepare: Callable[[Tensor, float, float, Tensor], None]
    slope: Callable[[Tensor, Tensor, Tensor], object]
    value: Callable[[Tensor, Tensor, float], Tensor]
    scale: float


def _pre_activation(x: Tensor, a: float, s: float, out: Tensor) -> None:
    if x.dtype == out.dtype:
        torch.mul(x, a, out=out)
    else:
        out.copy_(x).mul_(a)
    if s != 0:
        out.add_(s)


def _tanh_prepare(x: Tensor, a: float, s: float, state: Tensor) -> None:
    # p = sigmoid(-2|z|) gives both results: tanh|z| = 1 - 2p and sech^2 = 4 p (1 - p). As p <= 1/2, the
    # second does not cancel, so it is as accurate as the reference's (1 - tanh^2 is not), down to fp32's
    # smallest normal number. The first does for small z: its error is 1e-7 of the range of tanh, not
    # of its value. It serves dweight only, where it is summed; y is from `_value`.
    torch.abs(x, out=state).mul_(-2 * abs(a)).sigmoid_()


def _tanh_slope(dy: Tensor, state: Tensor, g: Tensor) -> None:
    torch.ops.aten.sigmoid_backward.grad_input(dy, state, grad_input=g)


def _tanh_value(state: Tensor, x: Tensor, a: float) -> Tensor:
    one = state.new_ones(())
    torch.sub(one, state, alpha=2, out=state)
    torch.copysign(state, x, out=state)
    return state.neg_() if a < 0 else state


def _backward_steps(function: str) -> _BackwardSteps:
    if function == "tanh":
        return _BackwardSteps(_tanh_prepare, _tanh_slope, _tanh_value, 4.0)
    f = reference.FUNCTIONS[function]
    return _BackwardSteps(
        prepare=_pre_activation,
        slope=lambda dy, z, g: torch.mul(dy, f.slope(z), out=g),
        value=lambda z, x, a: f.value(z),
        scale=1.0,
    )


def _value(function: str, z: Tensor) -> Tensor:
    if (
        function == "tanh"
        and _HAS_ONEDNN_TANH
        and z.dtype == torch.float32
        and z.numel() >= _ONEDNN_MIN_ELEMENTS
    ):
        return z.to_mkldnn().tanh_().to_dense()
    return reference.FUNCTIONS[function].value(z)


def _chunk_rows(rows: int, hidden: int) -> int:
    return max(1, min(rows, CHUNK_ELEMENTS // hidden))


class _Workspace(threading.local):
    """Temporaries that a thread keeps between calls: at most 3 chunks, or 3 rows of a wider hidden."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """(count, rows, hidden) of uninitialised memory, valid until the next call."""
        size = count * rows * hidden
        if dtype not in self._memory or self._memory[dtype].numel() < size:
            with torch.inference_mode(False):  # its tensors could not be written to in training
                self._memory[dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return self._memory[dtype][:size].view(count, rows, hidden)


_workspace = _Workspace()


def _scalar(t: Tensor | None) -> float:
    return 0.0 if t is None else t.item()


def forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.dyt_forward` for CPU tensors; the result, or `out`, is contiguous."""
    dtype = reference.compute_dtype(x)
    hidden = x.shape[-1]
    a, s = _scalar(alpha), _scalar(shift)
    w = weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    y = x.new_empty(x.shape) if out is None else out
    x_rows, y_rows = x.reshape(-1, hidden), y.view(-1, hidden)
    n = _chunk_rows(x_rows.shape[0], hidden)
    buffer = None if y.dtype == dtype else _workspace.take(1, n, hidden, dtype)[0]
    for x_chunk, y_chunk in zip(x_rows.split(n), y_rows.split(n), strict=True):
        z = y_chunk if buffer is None else buffer[: len(x_chunk)]
        _pre_activation(x_chunk, a, s, z)
        t = _value(function, z)
        if b is None:
            torch.mul(t, w, out=y_chunk)
        else:
            torch.addcmul(b, t, w, out=y_chunk)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`reference.dyt_backward` for CPU tensors.

    Returns, in this order, those gradients of x, alpha, weight, bias and shift that `needs` asks for.
    """
    dtype = reference.compute_dtype(x)
    hidden = x.shape[-1]
    a, s = _scalar(alpha), _scalar(shift)
    steps = _backward_steps(function)
    w = weight.to(dtype) * steps.scale
    needs_x, needs_alpha, needs_weight, needs_bias, needs_shift = needs
    dx = x.new_empty(x.shape) if needs_x else None
    # Sums over rows of g * x, dy * f(z), dy and g: separate tensors, as an op's outputs may not alias.
    sums = [x.new_zeros(hidden, dtype=dtype) for _ in range(4)]

    x_rows, dy_rows = x.reshape(-1, hidden), dy.reshape(-1, hidden)
    n = _chunk_rows(x_rows.shape[0], hidden)
    buffers = _workspace.take(3, n, hidden, dtype)
    for start in range(0, x_rows.shape[0], n):
        xc = x_rows[start : start + n].to(dtype)
        dyc = dy_rows[start : start + n].to(dtype)
        state, g, product = buffers[:, : len(xc)]
        steps.prepare(xc, a, s, state)
        steps.slope(dyc, state, g)
        if needs_alpha:
            sums[0] += torch.mul(g, xc, out=product).sum(0)
        if needs_weight:
            sums[1] += torch.mul(dyc, steps.value(state, xc, a), out=product).sum(0)
        if needs_bias:
            sums[2] += dyc.sum(0)
        if needs_shift:
            sums[3] += g.sum(0)
        if dx is not None:
            torch.mul(g, w * a, out=dx.view(-1, hidden)[start : start + n])
    dalpha = (sums[0] * w).sum().reshape(1)
    if needs_alpha and not dalpha.isfinite():
        # 0 * inf, from an infinite x where f is flat: the reference knows that its limit is 0.
        _, dalpha, *_ = reference.dyt_backward(
            dy, x, alpha, weight, has_bias=False, function=function, shift=shift
        )
    candidates = (
        dx,
        dalpha.to(alpha.dtype),
        sums[1].to(weight.dtype),
        sums[2].to(weight.dtype),
        None if shift is None else (sums[3] * w).sum().reshape(1).to(shift.dtype),
    )
    return [t for t, needed in zip(candidates, needs, strict=True) if needed and t is not None]
