"""DyT on CPU: the math of `reference.py` in few passes over memory, for training without a GPU.

Rows are processed in chunks, so that the temporaries of one chunk stay in cache and are reused:
fresh memory costs a page fault per 4 KiB, which is more than the arithmetic. For the same reason
nothing but x and the parameters is saved for backward: recomputing f(z) is cheaper than touching one
more activation-sized buffer.

torch.sigmoid is the fastest transcendental function that torch has on CPU (0.22 ns an element on one
AVX-512 core, torch.tanh takes 2.2), and tanh(z) = 1 - 2 sigmoid(-2z). RMSNorm's forward is four passes of
multiplication and addition (0.33 ns), so there is no time for more.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import reference

_aten = torch.ops.aten

# For each thread, 2 MiB of fp32 per temporary. Smaller chunks start threads more often, larger ones do not
# fit in cache.
CHUNK_ELEMENTS = 1 << 19
_MAX_CHUNK_THREADS = 8

# 1 - 2 sigmoid(-2z) is off by up to 1.6e-7 of tanh's range, however small z is; by 4e-8 root mean square. So
# it serves where |z| is typically at least this, by a sample of so many rows and columns.
_SIGMOID_MIN_Z = 1 / 32
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 16, 64
# Below, torch.tanh takes no longer than looking at a sample.
_SIGMOID_MIN_ELEMENTS = 1 << 13

# oneDNN's tanh is as accurate as torch.tanh (relative error 8e-8) and 4x faster, but the conversion to
# and from its tensors costs some 20 us a call.
_ONEDNN_MIN_ELEMENTS = 1 << 14
_HAS_ONEDNN_TANH = torch.backends.mkldnn.is_available() and (
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)


class _BackwardSteps(NamedTuple):
    """How one function's backward runs on a chunk, with z = a * x + s and all tensors in one dtype.

    prepare(x, a, s, state) fills `state`; slope(dy, state, g) fills g = dy * f'(z) / scale;
    weigh(dy, x, a, state, out) fills out = dy * f(z) and may overwrite `state`.
    """

    prepare: Callable[[Tensor, float, float, Tensor], None]
    slope: Callable[[Tensor, Tensor, Tensor], object]
    weigh: Callable[[Tensor, Tensor, float, Tensor, Tensor], object]
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
    # of its value. It serves dweight only, where it is summed.
    torch.abs(x, out=state).mul_(-2 * abs(a)).sigmoid_()


def _tanh_slope(dy: Tensor, state: Tensor, g: Tensor) -> None:
    _aten.sigmoid_backward.grad_input(dy, state, grad_input=g)


def _tanh_weigh(dy: Tensor, x: Tensor, a: float, state: Tensor, out: Tensor) -> None:
    # The gradient of a leaky relu of slope -1 is dy with x's sign: half the time of torch.copysign.
    _aten.leaky_relu_backward.grad_input(dy, x, -1.0, False, grad_input=out)
    torch.addcmul(out, out, state, value=-2, out=out)
    if a < 0:
        out.neg_()


def _backward_steps(function: str) -> _BackwardSteps:
    if function == "tanh":
        return _BackwardSteps(_tanh_prepare, _tanh_slope, _tanh_weigh, 4.0)
    f = reference.FUNCTIONS[function]
    return _BackwardSteps(
        prepare=_pre_activation,
        slope=lambda dy, z, g: torch.mul(dy, f.slope(z), out=g),
        weigh=lambda dy, x, a, z, out: torch.mul(dy, f.value(z), out=out),
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


def _sigmoid_suffices(x_rows: Tensor, a: float) -> bool:
    """Whether |z| = |a x| is large enough for 1 - 2 sigmoid(-2z), by the median of a sample.

    Not the mean: one token or channel of huge activations must not speak for the others. NaN says no.
    """
    rows, columns = x_rows.shape
    if rows * columns < _SIGMOID_MIN_ELEMENTS:
        return False
    # Odd steps: what alternates, as heads or halves of a batch do, is seen on both sides.
    sample = x_rows[:: 1 | rows // _SAMPLED_ROWS, :: 1 | columns // _SAMPLED_COLUMNS]
    return sample.abs().median().item() * abs(a) >= _SIGMOID_MIN_Z


def _chunk_rows(rows: int, hidden: int) -> int:
    elements = CHUNK_ELEMENTS * min(torch.get_num_threads(), _MAX_CHUNK_THREADS)
    return max(1, min(rows, elements // hidden))


class _Workspace(threading.local):
    """Temporaries that a thread keeps between calls: 3 chunks (48 MiB at most), or 3 rows of more."""

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


def _chunks(n: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same n rows of each, one after the other; tensors of no rows are one chunk."""
    if tensors[0].shape[0] <= n:
        return iter((tensors,))
    return zip(*(t.split(n) for t in tensors), strict=True)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`; asking first is cheaper."""
    return t if t.dtype == dtype else t.to(dtype)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


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
    w = _as(weight, dtype)
    b = None if bias is None else _as(bias, dtype)
    y = x.new_empty(x.shape) if out is None else out
    x_rows, y_rows = x.reshape(-1, hidden), y.view(-1, hidden)
    n = _chunk_rows(x_rows.shape[0], hidden)
    value: Callable[[Tensor], Tensor] = functools.partial(_value, function)
    factor = 1.0
    if function == "tanh" and dtype == torch.float32 and _sigmoid_suffices(x_rows, a):
        # weight * tanh(z) + bias = (bias + weight) - 2 * weight * sigmoid(-2z)
        value, a, b, factor = torch.sigmoid_, -2 * a, w if b is None else b + w, -2.0
    buffer = None if y.dtype == dtype else _workspace.take(1, n, hidden, dtype)[0]
    for x_chunk, y_chunk in _chunks(n, x_rows, y_rows):
        z = y_chunk if buffer is None else buffer[: len(x_chunk)]
        _pre_activation(x_chunk, a, s, z)
        t = value(z)
        if b is None:
            torch.mul(t, w, out=y_chunk)
        else:
            torch.addcmul(b, t, w, value=factor, out=y_chunk)
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
    w = _as(weight, dtype) * steps.scale
    wa = w * a
    x_rows, dy_rows = x.reshape(-1, hidden), dy.reshape(-1, hidden)
    dx = x.new_empty(x_rows.shape) if needs[0] else None
    # Over rows, of g * x, dy * f(z), dy and g: separate tensors, as an op's outputs may not alias.
    of_gx = of_value = of_dy = of_g = None

    n = _chunk_rows(x_rows.shape[0], hidden)
    buffers = _workspace.take(3, n, hidden, dtype)
    for x_chunk, dy_chunk, *dx_chunk in _chunks(n, x_rows, dy_rows, *([] if dx is None else [dx])):
        xc, dyc = _as(x_chunk, dtype), _as(dy_chunk, dtype)
        state, g, product = buffers[:, : len(xc)]
        steps.prepare(xc, a, s, state)
        steps.slope(dyc, state, g)
        if needs[1]:
            of_gx = _plus(of_gx, torch.mul(g, xc, out=product).sum(0))
        if needs[2]:
            steps.weigh(dyc, xc, a, state, product)
            of_value = _plus(of_value, product.sum(0))
        if needs[3]:
            of_dy = _plus(of_dy, dyc.sum(0))
        if needs[4]:
            of_g = _plus(of_g, g.sum(0))
        if dx_chunk:
            torch.mul(g, wa, out=dx_chunk[0])

    gradients = [] if dx is None else [dx.view(x.shape)]
    if of_gx is not None:
        dalpha = torch.dot(of_gx, w).reshape(1)
        if not math.isfinite(dalpha.item()):
            # 0 * inf, from an infinite x where f is flat: the reference knows that its limit is 0.
            _, dalpha, *_ = reference.dyt_backward(
                dy, x, alpha, weight, has_bias=False, function=function, shift=shift
            )
        gradients.append(_as(dalpha, alpha.dtype))
    gradients += [_as(t, weight.dtype) for t in (of_value, of_dy) if t is not None]
    if of_g is not None and shift is not None:
        gradients.append(_as(torch.dot(of_g, w).reshape(1), shift.dtype))
    return gradients
