"""How hard DyT's function works: what it saturates, and how far it is from a straight line."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops.reference import FUNCTIONS

# The normal distribution is integrated over so many of its standard deviations, at so many points: what
# is left out is below 1e-14, and hardtanh's corners cost 1e-6.
_REACH, _POINTS = 8.0, 4001


# f is a straight line where less of its variance than this is not linear in x: its output is then within 10 %
# of the line's, in rms. For a normal x tanh comes to it at alpha * std = 0.42.
STRAIGHT = 0.01
# f is none where more of the elements than this saturate, few as they are: tanh is 2 - tanh(2) = 1.04 off its
# slope there, and a thousandth of the elements then are 0.6 % of the variance at that alpha * std.
RARE = 0.001


class InputStatistics(NamedTuple):
    """Of the input x of one DyT, scalars of fp32.

    Attributes:
        std: of all elements.
        saturated: share of the elements with |alpha * x + shift| above the function's `saturation`
            (`ops/reference.py`: 2 for tanh).
    """

    std: Tensor
    saturated: Tensor


@torch.no_grad()
def input_statistics(
    x: Tensor, alpha: Tensor | float, function: str, shift: Tensor | None = None
) -> InputStatistics:
    """Of x, of any shape and float dtype. Nothing is read on the host."""
    values = x.detach().float()
    z = values * alpha if shift is None else values * alpha + shift.detach().float()
    saturated = (z.abs() > FUNCTIONS[function].saturation).float().mean()
    return InputStatistics(values.std(correction=0), saturated)


def curved_share(function: str, drive: float) -> float:
    """The share of f(z)'s variance that no straight line in z gives, for z ~ N(0, drive^2).

    1 - cov(f(z), z)^2 / (var f(z) var z): 0 for a straight line, 1 - 2/pi = 0.363 for a step. Small drives
    give tanh 2/3 drive^4.

    Args:
        drive: alpha times the std of the input, > 0.
    """
    t = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    y = FUNCTIONS[function].value(drive * t)
    y = y - (density * y).sum()
    along = float((density * y * t).sum())
    return max(0.0, 1 - along**2 / float((density * y.square()).sum()))


def is_straight(curved: float, saturated: float) -> bool:
    """Whether f works as a straight line: by what of it is not linear, and by saturated x."""
    return curved < STRAIGHT and saturated < RARE
