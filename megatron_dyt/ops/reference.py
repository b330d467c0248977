"""DyT in plain torch: the ground truth that every other path is tested against.

    z = alpha * x (+ shift)
    y = weight * f(z) + bias

alpha is one number, or one for each group of neighbouring channels (an attention head's, or each channel by
itself).

With f = tanh this is Dynamic Tanh (arXiv 2503.10622; hardtanh, sigmoid and identity are its
ablations), with f = erf and a learnable shift it is Derf (arXiv 2512.10938), whose study also has
isru, arctan, satursin and arcsinhclip (appendix B). Everything is computed in fp32 (fp64 when x is
fp64), whatever the dtypes of x and the parameters.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PointwiseFunction(NamedTuple):
    """One f: its value f(z) and its slope f'(z), both elementwise.

    `saturation` is the |z| from which on the slope is below 0.071 of what it is at 0, as tanh's at 2: next to
    no gradient comes through.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    saturation: float


def _tanh_slope(z: Tensor) -> Tensor:
    # 1 - tanh(z)^2 cancels: in fp32 it is off by 6e-2 at z = 8. This is good to a few ulp everywhere.
    u = torch.exp(-2 * z.abs())
    return 4 * u / (1 + u) ** 2


def _erf_slope(z: Tensor) -> Tensor:
    return (2 / math.sqrt(math.pi)) * torch.exp(-z * z)


def _hardtanh_slope(z: Tensor) -> Tensor:
    return torch.where(z.isnan(), z, (z.abs() < 1).to(z.dtype))


def _sigmoid_slope(z: Tensor) -> Tensor:
    p = torch.sigmoid(-z.abs())
    return p * (1 - p)


def _quarter(z: Tensor) -> Tensor:
    return torch.clamp(z, -math.pi / 2, math.pi / 2)


def _arcsinhclip_slope(z: Tensor) -> Tensor:
    return torch.where(z.isnan(), z, (z.abs() < math.sinh(1)).to(z.dtype)) / torch.sqrt(1 + z * z)


def _isru_value(z: Tensor) -> Tensor:
    # z^2 overflows for large |z| and 1 / z^2 for small: each half uses the form that is safe there.
    small = z / torch.sqrt(1 + z * z)
    large = torch.copysign(1 / torch.sqrt(1 + 1 / (z * z)), z)
    return torch.where(z.abs() <= 1, small, large)


def _isru_slope(z: Tensor) -> Tensor:
    r = 1 / torch.sqrt(1 + z * z)
    return r * r * r


FUNCTIONS: dict[str, PointwiseFunction] = {
    "tanh": PointwiseFunction(torch.tanh, _tanh_slope, 2.0),
    "erf": PointwiseFunction(torch.erf, _erf_slope, 1.63),
    "hardtanh": PointwiseFunction(lambda z: torch.clamp(z, -1, 1), _hardtanh_slope, 1.0),
    "sigmoid": PointwiseFunction(torch.sigmoid, _sigmoid_slope, 4.0),
    "isru": PointwiseFunction(_isru_value, _isru_slope, 2.2),
    "arctan": PointwiseFunction(
        lambda z: (2 / math.pi) * torch.atan(z), lambda z: (2 / math.pi) / (1 + z * z), 3.63
    ),
    # cos(pi / 2) rounds to either side of 0.
    "satursin": PointwiseFunction(
        lambda z: torch.sin(_quarter(z)), lambda z: torch.cos(_quarter(z)) * (z.abs() < math.pi / 2), 1.5
    ),
    "arcsinhclip": PointwiseFunction(
        lambda z: torch.clamp(torch.asinh(z), -1, 1), _arcsinhclip_slope, math.sinh(1)
    ),
    "identity": PointwiseFunction(lambda z: z, torch.ones_like, math.inf),
}


type Function = str | Callable[[Tensor], Tensor]


def value_of(function: Function) -> Callable[[Tensor], Tensor]:
    """f: of `FUNCTIONS` by name, or the caller's own."""
    return FUNCTIONS[function].value if isinstance(function, str) else function


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of all intermediate math: fp64 for fp64 activations, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_channel(alpha: Tensor, hidden: int) -> Tensor:
    """alpha (groups,) for each of the channels: (hidden,); (1,) as it is."""
    return alpha if alpha.numel() in (1, hidden) else alpha.repeat_interleave(hidden // alpha.numel())


def _pre_activation(x: Tensor, alpha: Tensor, shift: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    z = by_channel(alpha.to(dtype), x.shape[-1]) * x.to(dtype)
    return z if shift is None else z + shift.to(dtype)


def dyt_forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    function: Function = "tanh",
) -> Tensor:
    """y = weight * f(alpha * x + shift) + bias, in x's shape and dtype.

    Shapes: x (..., hidden); alpha (groups,), where groups divides hidden; shift (1,); weight and bias
    (hidden,).
    """
    z = _pre_activation(x, alpha, shift)
    t = value_of(function)(z)
    if t.shape != z.shape:
        raise ValueError(
            f"the function makes {tuple(t.shape)} of {tuple(z.shape)}; it must keep the shape, "
            "as an elementwise function"
        )
    y = weight.to(t.dtype) * t
    if bias is not None:
        y = y + bias.to(t.dtype)
    return y.to(x.dtype)


def dyt_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    function: str = "tanh",
    *,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dalpha, dweight, dbias or None, dshift or None) for the upstream gradient dy.

    With g = dy * f'(z), summing over rows r and channels c:

        dx      = g * weight * alpha
        dalpha  = sum_rc weight * g * x        (c of the alpha's group)
        dweight = sum_r dy * f(z)
        dbias   = sum_r dy
        dshift  = sum_rc weight * g

    dx has x's dtype. A parameter's gradient has that parameter's dtype (dbias has weight's), after
    summing in the compute dtype. Where f'(z) is 0, an infinite x adds 0 to dalpha: the limit, not
    0 * inf.
    """
    z = _pre_activation(x, alpha, shift)
    dtype = z.dtype
    f = FUNCTIONS[function]
    w, dy = weight.to(dtype), dy.to(dtype)
    slope = f.slope(z)
    g = w * dy * slope
    dx = (g * by_channel(alpha.to(dtype), x.shape[-1])).to(x.dtype)
    terms = (g * x.to(dtype)).masked_fill(slope == 0, 0)
    dalpha = _sum_rows(terms).reshape(alpha.numel(), -1).sum(1).to(alpha.dtype)
    dweight = _sum_rows(dy * f.value(z)).to(weight.dtype)
    dbias = _sum_rows(dy).to(weight.dtype) if has_bias else None
    dshift = g.sum().reshape(1).to(shift.dtype) if shift is not None else None
    return dx, dalpha, dweight, dbias, dshift


def _sum_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0)
