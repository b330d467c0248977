"""What each norm of a model does to one batch, as numbers and as points of its input-output map.

The map is that of the norm without its weight and bias, as in the paper's Figures 2 to 4: what DyT puts in
the place of dividing is its function, and the weight stays. `gamma * tanh(alpha * x)`, two numbers per site,
is fitted to it by least squares.
"""

# Dimension letters, of names such as `x_TC`:
#   T  tokens: all positions of all sequences     C  channels     N  points chosen of the T x C     V  classes

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.nn.calibrate import evaluating, fit
from megatron_dyt.nn.statistics import input_statistics
from megatron_dyt.probe import sites
from megatron_dyt.probe.sites import Site

# Elements that a fit of alpha sees, of a larger input evenly chosen ones. It is few that bend a norm: with a
# seventh of these 1 - R^2 of the quickstart's norms was off by a tenth.
_FIT_POINTS = 2**19
# Of the points of a figure, the share that are the largest inputs: a norm bends at its few large ones, which
# an even sample would hardly hold.
_SHARE_OF_LARGEST = 0.05

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Points:
    """Some elements of a norm's input and output, fp32 (N,) each.

    Attributes:
        x, y: of the input, and of the output without weight and bias.
        token_rms, channel_rms: rms of the input over the element's token, and over its channel.
    """

    x: Floats
    y: Floats
    token_rms: Floats
    channel_rms: Floats


@dataclass(frozen=True)
class SiteMeasurement:
    """One norm and one batch.

    Attributes:
        name, place, layer, kind, function: see `sites.Site`.
        tokens, channels: of its input.
        input_std: of all elements of the input.
        token_spread: std over mean of the tokens' rms: what a norm divides out, and a DyT does not.
        kurtosis: of the input's elements, 3 for a normal distribution.
        largest: largest |x| over `input_std`.
        alpha: what DyT multiplies x with; None for another norm.
        tanh_alpha, tanh_gamma: of the tanh that is nearest to the map.
        tanh_r2: 1 - squared error of that tanh / sum of squares of the map.
        line_slope, line_r2: the same of the straight line through 0 that is nearest.
        alpha_std: alpha, or for another norm `tanh_alpha`, times `input_std`.
        saturated: share of elements where the function with that alpha (tanh for another norm) saturates.
        points: see `Points`; None where none were asked for.
    """

    name: str
    place: str
    layer: int | None
    kind: str
    function: str | None
    tokens: int
    channels: int
    input_std: float
    token_spread: float
    kurtosis: float
    largest: float
    alpha: float | None
    tanh_alpha: float
    tanh_gamma: float
    tanh_r2: float
    line_slope: float
    line_r2: float
    alpha_std: float
    saturated: float
    points: Points | None = field(repr=False)


@dataclass(frozen=True)
class Gradient:
    """Of all parameters of one layer, or of what stands outside the layers, such as "embedding"."""

    part: str
    layer: int | None
    parameters: int
    weight_norm: float
    grad_norm: float


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        loss: mean cross-entropy in nats; None without targets, as `logit_std`.
        logit_std: std of the logits over the classes, mean over the rows.
        gradients: of `loss`, by layer; empty without targets.
    """

    sites: list[SiteMeasurement]
    loss: float | None = None
    logit_std: float | None = None
    gradients: list[Gradient] = field(default_factory=list)


def measure(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    targets: Tensor | None = None,
    *,
    points: int = 20_000,
) -> Measurement:
    """One forward pass of `model`, in eval mode, and with `targets` one backward pass.

    The model and its gradients are left as they were.

    Args:
        batch: what the model is called with: a tensor, or keyword arguments.
        targets: int64, the class of each row of the model's output (or of its `logits`), which is
            (..., classes); -100 for a row that does not count.
        points: at most so many of the elements of each norm's input are kept for figures; 0 for none.

    Raises:
        UserError: the model has no norm that the batch reaches, or values are not finite.
    """
    found = sites.find(model)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no LayerNorm, RMSNorm or DyT to look at; norms of other kinds, and "
            "those inside fused kernels, are not seen"
        )
    results: dict[str, SiteMeasurement] = {}

    def see(site: Site, x: Tensor) -> None:
        if site.name not in results and x.numel():  # A module that is used twice: its first use.
            results[site.name] = _measure_site(site, x.detach(), points)

    with evaluating(model), _hooks(found, see), torch.set_grad_enabled(targets is not None):
        output = model(batch) if isinstance(batch, Tensor) else model(**batch)
    if not results:
        raise UserError(f"the batch reaches none of the {len(found)} norms of {type(model).__name__}")
    ordered = [results[site.name] for site in found if site.name in results]
    if targets is None:
        return Measurement(ordered)
    logits = output if isinstance(output, Tensor) else output.logits
    rows = logits.flatten(0, -2).float()
    loss = nn.functional.cross_entropy(rows, targets.flatten())
    if not bool(loss.isfinite()):
        raise UserError(
            "the loss is not finite: the model's weights are not, or it overflows in its precision"
        )
    return Measurement(ordered, float(loss), float(rows.detach().std(-1).mean()), gradients(model, loss))


@contextlib.contextmanager
def _hooks(found: Sequence[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """`see` is called with each site's input."""
    handles = []
    for site in found:
        if isinstance(site.module, DyTNorm):
            # Its argument may be a sum that is not made yet (mcore/residual.py); it shows the sum.
            site.module.probe = lambda _, x, site=site: see(site, x)
        else:
            handles.append(
                site.module.register_forward_pre_hook(lambda _, inputs, site=site: see(site, inputs[0]))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for site in found:
            if isinstance(site.module, DyTNorm):
                site.module.probe = None


@torch.no_grad()
def _measure_site(site: Site, x: Tensor, points: int) -> SiteMeasurement:
    x_TC, y_TC = (each.movedim(site.channel_dim, -1).flatten(0, -2).float() for each in (x, site.apply(x)))
    if not bool(x_TC.isfinite().all()):
        raise UserError(
            f"the input of {site.name} has values that are not finite; probe an earlier checkpoint"
        )
    token_rms_T, channel_rms_C = (x_TC.square().mean(dim).sqrt() for dim in (1, 0))
    x_N, y_N = (_evenly(each.flatten(), _FIT_POINTS) for each in (x_TC, y_TC))
    try:
        nearest = fit(x_N[:, None], y_N[:, None], bias=False)
    except ValueError as error:
        raise UserError(f"{site.name}: {error}") from error
    tanh_alpha = float(nearest.alpha)
    tanh, line = _regress(torch.tanh(tanh_alpha * x_TC), y_TC), _regress(x_TC, y_TC)
    alpha = tanh_alpha if site.alpha is None else site.alpha
    of_input = input_statistics(x_TC, alpha, site.function or "tanh", site.shift)
    std = float(of_input.std)
    if std == 0:
        raise UserError(f"the input of {site.name} is the same everywhere; give another batch")
    centered = x_TC - x_TC.mean()
    return SiteMeasurement(
        name=site.name,
        place=site.place,
        layer=site.layer,
        kind=site.kind,
        function=site.function,
        tokens=x_TC.shape[0],
        channels=x_TC.shape[1],
        input_std=std,
        token_spread=float(token_rms_T.std(correction=0) / token_rms_T.mean()),
        kurtosis=float(centered.pow(4).mean() / centered.square().mean().square()),
        largest=float(x_TC.abs().max()) / std,
        alpha=site.alpha,
        tanh_alpha=tanh_alpha,
        tanh_gamma=tanh.slope,
        tanh_r2=tanh.r2,
        line_slope=line.slope,
        line_r2=line.r2,
        alpha_std=abs(alpha) * std,
        saturated=float(of_input.saturated),
        points=_points(x_TC, y_TC, token_rms_T, channel_rms_C, points) if points else None,
    )


class _Regression(NamedTuple):
    """y = slope * x, and what it explains of the sum of squares of y."""

    slope: float
    r2: float


def _regress(x: Tensor, y: Tensor) -> _Regression:
    slope = float((x * y).sum() / x.square().sum())
    # From the residual: 1 - R^2 of a nearly exact fit would be lost in the rounding of sums.
    return _Regression(slope, 1 - float((y - slope * x).square().sum() / y.square().sum()))


def _evenly(values_N: Tensor, most: int) -> Tensor:
    """At most about `most` of the values; by a step that is odd, as numbers of channels are even."""
    step = -(-len(values_N) // most)
    return values_N[:: step | 1]


def _points(x_TC: Tensor, y_TC: Tensor, token_rms_T: Tensor, channel_rms_C: Tensor, most: int) -> Points:
    flat = x_TC.flatten()
    some = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:most].to(flat.device)
    largest = flat.abs().topk(min(len(flat), int(_SHARE_OF_LARGEST * most))).indices
    chosen = torch.cat([some[len(largest) :], largest]).unique()
    parts = (
        flat[chosen],
        y_TC.flatten()[chosen],
        token_rms_T[chosen // x_TC.shape[1]],
        channel_rms_C[chosen % x_TC.shape[1]],
    )
    return Points(*(part.cpu().numpy() for part in parts))


def gradients(model: nn.Module, loss: Tensor) -> list[Gradient]:
    """Norms of the gradient of `loss`, by layer; `.grad` of the parameters stays as it is."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    parts: dict[tuple[str, int | None], list[tuple[Tensor, Tensor]]] = {}
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        if grad is not None:
            parts.setdefault(_part(name), []).append((parameter.detach(), grad))
    return [
        Gradient(
            part,
            layer,
            sum(weight.numel() for weight, _ in pairs),
            *(
                float(sum(each.float().square().sum() for each in column)) ** 0.5
                for column in zip(*pairs, strict=True)
            ),
        )
        for (part, layer), pairs in parts.items()
    ]


def _part(name: str) -> tuple[str, int | None]:
    """("decoder.layers.3", 4) of a parameter's name; ("output_layer", None) outside of layers."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1]), int(part) + 1
    return name.rpartition(".")[0], None
