"""Alpha, weight and bias with which DyT does most nearly what a trained norm did.

`weight * f(alpha * x) + bias` is linear in weight and bias, so for each alpha the best of them have a
closed form, channel by channel (least squares), and the best alpha is found on a line.

Experimental: a norm divides each token by its own rms, which no setting of DyT can do. What is left is
for training to make up (docs/convert.md has figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_dyt.nn.dynamic_tanh import DynamicTanh
from megatron_dyt.ops.reference import FUNCTIONS

# alpha * median|x| from 0.01, where f is a straight line, to 100, where it is a step.
DECADES = 2
# First a quarter of a decade apart; each round after that looks 4 times as closely around the best, so the
# last one's are 0.2 % of alpha apart.
COARSE, FINE, ROUNDS = 17, 9, 5


class Fit(NamedTuple):
    """`weight * f(alpha * x) + bias` nearest to y.

    Attributes:
        weight, bias: fp32 (hidden,); bias is zero where none was asked for.
        error: sum of squared residuals over the sum of squares of y; 0 is exact, 1 as bad as zero.
    """

    alpha: float
    weight: Tensor
    bias: Tensor
    error: float


def fit(x: Tensor, y: Tensor, *, function: str = "tanh", bias: bool = True) -> Fit:
    """The least-squares fit of DyT to the pairs of x and y, both (..., hidden), any float dtype.

    Raises:
        ValueError: x or y has values that are not finite, or x is zero everywhere.
    """
    x, y = (tensor.detach().float().flatten(0, -2) for tensor in (x, y))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the norm's input or output has values that are not finite")
    size = float(x.abs().median()) or float(x.abs().mean())
    if size == 0:
        raise ValueError("the norm's input is zero everywhere")
    grid, step = torch.linspace(-DECADES, DECADES, COARSE), 2 * DECADES / (COARSE - 1)
    for _ in range(ROUNDS):
        fits = [_fit_at(10**exponent / size, x, y, function, bias) for exponent in grid.tolist()]
        best = min(range(len(fits)), key=lambda index: fits[index].error)
        grid = torch.linspace(float(grid[best]) - step, float(grid[best]) + step, FINE)
        step = 2 * step / (FINE - 1)
    return fits[best]


def _fit_at(alpha: float, x: Tensor, y: Tensor, function: str, bias: bool) -> Fit:
    bounded = FUNCTIONS[function].value(alpha * x)
    center_x = bounded.mean(0) if bias else torch.zeros_like(bounded[0])
    center_y = y.mean(0) if bias else torch.zeros_like(y[0])
    bounded -= center_x
    centered = y - center_y
    squares = bounded.square().sum(0)
    # A channel that never changes tells nothing about its weight.
    weight = torch.where(squares > 0, (bounded * centered).sum(0) / squares, 0.0)
    error = (centered - weight * bounded).square().sum() / y.square().sum().clamp_min(1e-30)
    return Fit(alpha, weight, center_y - weight * center_x, float(error))


class CalibratingNorm(nn.Module):
    """Stands in for a norm during one forward pass, and fits `dyt` to it when it is called.

    The batch holds the calibration data twice. Its first half passes through the norms, as before the
    conversion; its second half through the DyTs, fitted so far. So one pass fits all sites, in the order in
    which they run, with one site's activations in memory.

    Args:
        sequential: fit what the second half brings to what the norm gives for the first, so that a
            site makes up for the errors of those before it. Otherwise fit the first half alone.
    """

    def __init__(self, norm: nn.Module, dyt: DynamicTanh, *, sequential: bool) -> None:
        super().__init__()
        self.norm, self.dyt, self.sequential = norm, dyt, sequential
        self.fit: Fit | None = None

    def forward(self, x: Tensor) -> Tensor:
        before, after = x.chunk(2)
        expected = self.norm(before)
        if self.fit is None:
            self.fit = fit(
                after if self.sequential else before,
                expected,
                function=self.dyt.function,
                bias=self.dyt.bias is not None,
            )
            set_parameters(self.dyt, self.fit.alpha, self.fit.weight, self.fit.bias)
        return torch.cat([expected, self.dyt(after)])


@torch.no_grad()
def set_parameters(dyt: DynamicTanh, alpha: float, weight: Tensor | None, bias: Tensor | None) -> None:
    """Fill in the parameters; what is None keeps its initial value."""
    dyt.alpha.fill_(alpha)
    if weight is not None:
        dyt.weight.copy_(weight)
    if dyt.bias is not None and bias is not None:
        dyt.bias.copy_(bias)


@torch.no_grad()
def run_doubled(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
    """One forward pass of `batch`, put twice behind itself along the first dimension, in eval mode.

    Args:
        batch: what the model is called with: a tensor (sequences, ...), or its keyword arguments, of which
            the tensors that have `sequences` rows are doubled.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if isinstance(batch, Tensor):
            model(torch.cat([batch, batch]))
        else:
            model(**_doubled(batch))
    finally:
        for module, mode in training.items():
            module.training = mode


def _doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    if rows is None:
        raise ValueError(f"calibration has {', '.join(batch) or 'nothing'}, but no tensor of sequences")
    return {
        name: torch.cat([value, value])
        if isinstance(value, Tensor) and value.dim() and len(value) == rows
        else value
        for name, value in batch.items()
    }
