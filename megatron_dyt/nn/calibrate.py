"""Alpha, weight and bias with which DyT does most nearly what a trained norm did.

`weight * f(alpha * x) + bias` is linear in weight and bias, so for each alpha the best of them have a
closed form, channel by channel (least squares), and the best alpha is found on a line.

Experimental: a norm divides each token by its own rms, which no setting of DyT can do. What is left is
for training to make up (docs/convert.md has figures).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_dyt.errors import some
from megatron_dyt.nn.dynamic_tanh import DynamicTanh
from megatron_dyt.ops.reference import Function, by_channel, value_of

# alpha * median|x| from 0.01, where f is a straight line, to 100, where it is a step.
DECADES = 2
# First a quarter of a decade apart; each round after that looks 4 times as closely around the best, so the
# last one's are 0.2 % of alpha apart.
COARSE, FINE, ROUNDS = 17, 9, 5
# Two rows of a batch that hold the same differ by rounding alone, in bf16 over many layers: so much of what
# tokens differ by, or of their size where they do not.
_SAME, _ROUNDING = 0.05, 0.01


class Fit(NamedTuple):
    """`weight * f(alpha * x) + bias` nearest to y.

    Attributes:
        alpha: fp32 (groups,).
        weight, bias: fp32 (hidden,); bias is zero where none was asked for.
        error: sum of squared residuals over the sum of squares of y; 0 is exact, 1 as bad as zero.
    """

    alpha: Tensor
    weight: Tensor
    bias: Tensor
    error: float


def fit(x: Tensor, y: Tensor, *, function: Function = "tanh", bias: bool = True, groups: int = 1) -> Fit:
    """The least-squares fit of DyT to the pairs of x and y, both (..., hidden), any float dtype.

    Args:
        groups: how many alphas; each is searched for its channels alone, on which no other depends.

    Raises:
        ValueError: x or y has values that are not finite, or x is zero everywhere.
    """
    x, y = (tensor.detach().float().flatten(0, -2) for tensor in (x, y))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the norm's input or output has values that are not finite")
    size = _sizes(x, groups)
    if not size.any():
        raise ValueError("the norm's input is zero everywhere")
    # A group of zeros tells nothing about its alpha.
    size = torch.where(size > 0, size, size[size > 0].mean())
    center, reach, points = torch.zeros(groups, device=x.device), float(DECADES), COARSE
    for _ in range(ROUNDS):
        grid = [center + offset for offset in torch.linspace(-reach, reach, points).tolist()]
        errors = torch.stack([_fit_at(10**each / size, x, y, function, bias)[2] for each in grid])
        center = torch.stack(grid).gather(0, errors.argmin(0, keepdim=True))[0]
        reach, points = 2 * reach / (points - 1), FINE
    alpha = 10**center / size
    weight, shift, errors = _fit_at(alpha, x, y, function, bias)
    return Fit(alpha, weight, shift, float(errors.sum() / y.square().sum().clamp_min(1e-30)))


def _sizes(x: Tensor, groups: int) -> Tensor:
    """The median of |x| (tokens, hidden) in each group, its mean where that is 0: (groups,)."""
    values = x.abs().unflatten(-1, (groups, -1)).movedim(-2, 0).flatten(1)
    median = values.median(1).values
    return torch.where(median > 0, median, values.mean(1))


def _fit_at(
    alpha: Tensor, x: Tensor, y: Tensor, function: Function, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias (hidden,) for these alphas, and the sum of squared residuals of each group."""
    bounded = value_of(function)(by_channel(alpha, x.shape[-1]) * x)
    center_x = bounded.mean(0) if bias else torch.zeros_like(bounded[0])
    center_y = y.mean(0) if bias else torch.zeros_like(y[0])
    bounded = bounded - center_x
    centered = y - center_y
    squares = bounded.square().sum(0)
    # A channel that never changes tells nothing about its weight.
    weight = torch.where(squares > 0, (bounded * centered).sum(0) / squares, 0.0)
    residuals = (centered - weight * bounded).square().sum(0).unflatten(0, (len(alpha), -1)).sum(1)
    return weight, center_y - weight * center_x, residuals


@dataclass
class Site:
    """A DyT that is being fitted to the norm that it replaces.

    The batch holds the calibration data twice. Its first half passes through the norms, as before the
    conversion; its second half through the DyTs, fitted so far. So one pass fits all sites, in the order in
    which they run, with one site's activations in memory.

    Attributes:
        batch_dim: of the DyT's input, the dimension of the sequences.
        fit: None until its forward has run.
    """

    name: str
    dyt: DynamicTanh
    batch_dim: int = 0
    fit: Fit | None = None

    @property
    def error(self) -> float:
        """Of the fit."""
        assert self.fit is not None
        return self.fit.error

    def norm(self, x: Tensor) -> Tensor:
        assert self.dyt.replaces is not None
        y: Tensor = self.dyt.replaces(x)
        return y

    def look(self, x: Tensor) -> Tensor:
        """What the norm gives; finds the dimension of the sequences, where both halves are equal."""
        values = x.float().nan_to_num()  # Values that are not finite are for `fit` to refuse.
        apart = {
            dim: _rms(torch.sub(*values.chunk(2, dim)))
            for dim, length in enumerate(x.shape)
            if length % 2 == 0
        }
        # What differs is small against how tokens differ, to which a channel that is large everywhere adds
        # nothing; rounding follows the size of the values.
        others = [dim for dim in range(x.dim()) if dim != self.dyt.channel_dim % x.dim()]
        spread = _rms(values - values.mean(others, keepdim=True))
        if apart and min(apart.values()) <= max(_SAME * spread, _ROUNDING * _rms(values)):
            self.batch_dim = min(apart, key=apart.__getitem__)
            return self.norm(x)
        raise ValueError(
            f"the calibration cannot tell the sequences in the input of {self.name}, of shape "
            f"{tuple(x.shape)}; leave it out with select=lambda name: ..."
        )

    def calibrate(self, x: Tensor, sequential: bool) -> Tensor:
        """The norm's output for the first half of the sequences, and the fitted DyT's for the second."""
        before, after = x.chunk(2, self.batch_dim)
        expected = self.norm(before)
        if self.fit is None:
            channels = self.dyt.channel_dim
            self.fit = fit(
                (after if sequential else before).movedim(channels, -1),
                expected.movedim(channels, -1),
                function=self.dyt.function,
                bias=self.dyt.bias is not None,
                groups=len(self.dyt.alpha),
            )
            set_parameters(self.dyt, self.fit.alpha, self.fit.weight, self.fit.bias)
        return torch.cat([expected, self.dyt.forward(after)], self.batch_dim)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def calibrate(
    model: nn.Module,
    dyts: Mapping[str, DynamicTanh],
    batch: Tensor | Mapping[str, Any],
    *,
    sequential: bool,
) -> list[Site]:
    """Fit the DyTs of `model`, given by name, to the norms that they replace (`DynamicTanh.replaces`).

    Args:
        batch: see `run_doubled`. Its first sequence runs once more, to find the dimension of the sequences at
            each site.
        sequential: fit what the second half brings to what the norm gives for the first, so that a
            site makes up for the errors of those before it. Otherwise fit the first half alone.

    Raises:
        ValueError: the batch does not reach every DyT, or values are not finite.
    """
    sites = [Site(name, dyt) for name, dyt in dyts.items()]
    with torch.no_grad():
        with hooks(sites, Site.look):
            run_doubled(model, batch, slice(1))
        with hooks(sites, lambda site, x: site.calibrate(x, sequential)):
            run_doubled(model, batch)
    missed = [site.name for site in sites if site.fit is None]
    if missed:
        raise ValueError(
            f"the calibration batch does not reach {some(missed)}; give a batch that does, or leave them out "
            "with select=lambda name: ..."
        )
    return sites


@contextlib.contextmanager
def hooks(sites: Sequence[Site], forward: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """The sites' DyTs return what `forward` makes of their input. Norms evaluate meanwhile.

    Hooks and no modules in their place: blocks such as Mamba's read the dtype of a norm's weight.
    """
    handles = []
    for site in sites:
        assert site.dyt.replaces is not None
        site.dyt.replaces.eval()
        handles.append(
            site.dyt.register_forward_hook(lambda _, inputs, __, site=site: forward(site, inputs[0]))
        )
    try:
        yield
    finally:
        for site, handle in zip(sites, handles, strict=True):
            handle.remove()
            assert site.dyt.replaces is not None
            site.dyt.replaces.train(site.dyt.training)


@torch.no_grad()
def set_parameters(
    dyt: DynamicTanh, alpha: Tensor | float, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Fill in the parameters; what is None keeps its initial value."""
    dyt.alpha.copy_(torch.as_tensor(alpha))
    if weight is not None:
        dyt.weight.copy_(weight)
    if dyt.bias is not None and bias is not None:
        dyt.bias.copy_(bias)


def run_doubled(model: nn.Module, batch: Tensor | Mapping[str, Any], rows: slice = slice(None)) -> None:
    """One forward pass of `batch`, put twice behind itself along the first dimension, in eval mode.

    Args:
        batch: what the model is called with: a tensor (sequences, ...), or its keyword arguments, of which
            the tensors that have `sequences` rows are doubled.
        rows: take these sequences alone.
    """
    with evaluating(model):
        if isinstance(batch, Tensor):
            model(_twice(batch, rows))
        else:
            model(**_doubled(batch, rows))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` is in eval mode in this block, and each of its modules as before after it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def sequences_in(batch: Tensor | Mapping[str, Any]) -> int:
    """Sequences in the batch of `run_doubled`."""
    if isinstance(batch, Tensor):
        return len(batch)
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not lengths:
        raise ValueError(f"calibration has {', '.join(batch) or 'nothing'}, but no tensor of sequences")
    return lengths[0]


def _twice(tensor: Tensor, rows: slice) -> Tensor:
    return torch.cat([tensor[rows], tensor[rows]])


def _doubled(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    length = sequences_in(batch)
    return {
        name: _twice(value, rows)
        if isinstance(value, Tensor) and value.dim() and len(value) == length
        else value
        for name, value in batch.items()
    }
