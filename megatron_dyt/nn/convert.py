"""LayerNorm and RMSNorm of any torch model become DyT, in place.

Knows nothing of transformers: a norm is torch's own, or a module whose class is called ...Norm and that
computes what LayerNorm or RMSNorm computes, which is tried (Llama's, Gemma's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dyt.nn.calibrate import CalibratingNorm, run_doubled, set_parameters
from megatron_dyt.nn.dynamic_tanh import DynamicTanh

# Called ...Norm, and over other dimensions than the last.
OTHER_NORMS = (nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)


@dataclass(frozen=True)
class ConvertedNorm:
    """One norm that became DyT.

    Attributes:
        name: of the module in the model, such as "model.layers.0.input_layernorm".
        alpha: what it starts with.
        error: of the calibration: squared error over the square of the norm's output; None without one.
    """

    name: str
    alpha: float
    error: float | None = None


def convert_norms(
    model: nn.Module,
    calibration: Tensor | Mapping[str, Any] | None = None,
    *,
    alpha_init: float | Callable[[str], float] = 0.5,
    bias: bool | None = None,
    function: str = "tanh",
    sequential: bool = True,
    select: Callable[[str], bool] | None = None,
) -> list[ConvertedNorm]:
    """Replace every LayerNorm and RMSNorm of `model` by a `DynamicTanh`, in place. Experimental.

    The norm's weight and bias are kept, and alpha is `alpha_init`: right for a model that is to be trained
    from the start (see docs/initial-scale.md for alpha). A trained model needs `calibration`: it fits alpha,
    weight and bias to what each norm did there, and the model still has to be trained on.

    Args:
        calibration: a batch that the model can be called with: a tensor such as token ids (sequences,
            length), or keyword arguments. It runs once, with twice as many sequences. First dimension of
            every norm's input must be the sequences.
        alpha_init: finite and > 0; or a function of the module's name. Ignored with calibration.
        bias: whether DyT has a bias; None: where the norm has one, and everywhere with calibration.
        function: see `DynamicTanh`.
        sequential: calibrate each site behind converted ones, to the output of the unconverted model.
        select: names of modules to convert; None for all.

    Returns:
        What was converted, in the order of `model.named_modules()`.

    Raises:
        ValueError: no norm was found, a module called ...Norm does something else, or the calibration
            does not reach every norm. The model is then as it was.
    """
    norms = {name: norm for name, norm in find_norms(model) if select is None or select(name)}
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no LayerNorm or RMSNorm"
            + (" that `select` takes" if select else "")
            + "; convert_norms replaces the norms inside a model"
        )
    pairs: dict[nn.Module, DynamicTanh] = {}
    for name, norm in norms.items():
        alpha = alpha_init(name) if callable(alpha_init) else alpha_init
        pairs[norm] = _dyt_like(name, norm, alpha, bias, function, calibration is not None)
    report = [ConvertedNorm(name, pairs[norm].alpha_init) for name, norm in norms.items()]
    if calibration is not None:
        report = _calibrate(model, norms, pairs, calibration, sequential)
    _replace(model, pairs)
    return report


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every norm over the last dimension; one that is used twice comes once."""
    for name, module in model.named_modules():
        if name and is_norm(module):
            yield name, module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm, or looks like one by class name and weight."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("Norm") and not isinstance(module, OTHER_NORMS)
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _dyt_like(
    name: str, norm: nn.Module, alpha: float, bias: bool | None, function: str, calibrated: bool
) -> DynamicTanh:
    """A DyT of the norm's size, device and dtype, with its weight and bias."""
    weight, shift = _affine(name, norm)
    if bias is None:
        bias = calibrated or shift is not None
    sample = next(norm.parameters(), torch.empty(0))
    dyt = DynamicTanh(
        _size(name, norm),
        alpha_init=alpha,
        bias=bias,
        function=function,
        device=sample.device,
        dtype=sample.dtype,
    )
    if not sample.is_meta:
        set_parameters(dyt, alpha, weight, shift)
    return dyt.train(norm.training)


def _size(name: str, norm: nn.Module) -> int:
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and shape is not None:
        if len(shape) != 1:
            raise ValueError(f"{name} normalizes the last {len(shape)} dimensions; DyT takes the last alone")
        return int(shape[0])
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _affine(name: str, norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """What a norm multiplies by and adds, None for nothing; found by trying it, because some store 1 less."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) or weight is None or weight.is_meta:
        return weight, bias
    x = torch.linspace(-1, 2, 2 * weight.numel(), dtype=torch.float32, device=weight.device)
    x = torch.stack([x[::2], x[1::2].flip(0).square()])
    with torch.no_grad():
        try:
            found = norm(x.to(weight.dtype)).float()
        except Exception as error:
            raise _no_norm(name, norm) from error
        for gain in (weight.float(), 1 + weight.float()):
            for centered in (x, x - x.mean(-1, keepdim=True)):
                shape = centered / centered.square().mean(-1, keepdim=True).sqrt()
                expected = shape * gain + (0 if bias is None else bias.float())
                if torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
                    return gain, bias
    raise _no_norm(name, norm)


def _no_norm(name: str, norm: nn.Module) -> ValueError:
    return ValueError(
        f"{name} ({type(norm).__name__}) computes neither LayerNorm nor RMSNorm over its last dimension; "
        "leave it out with select=lambda name: ..."
    )


def _calibrate(
    model: nn.Module,
    norms: dict[str, nn.Module],
    pairs: dict[nn.Module, DynamicTanh],
    batch: Tensor | Mapping[str, Any],
    sequential: bool,
) -> list[ConvertedNorm]:
    """Fit every DyT in one forward pass. Afterwards the model has its norms again."""
    sites = {norm: CalibratingNorm(norm, dyt, sequential=sequential) for norm, dyt in pairs.items()}
    _replace(model, sites)
    try:
        run_doubled(model, batch)
    finally:
        _replace(model, {site: norm for norm, site in sites.items()})
    fits = {name: sites[norm].fit for name, norm in norms.items()}
    missed = [name for name, found in fits.items() if found is None]
    if missed:
        raise ValueError(
            f"the calibration batch does not reach {', '.join(missed[:4])}"
            + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
            + "; give a batch that does, or leave them out with select=lambda name: ..."
        )
    return [ConvertedNorm(name, found.alpha, found.error) for name, found in fits.items() if found]


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of `new` in the place of its keys, wherever in the model they stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
