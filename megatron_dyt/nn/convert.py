"""LayerNorm and RMSNorm of any torch model become DyT, in place, and back.

Knows nothing of transformers or timm: `norms.py` finds out what is a norm, `callers.py` who computes one
without calling it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from megatron_dyt.errors import some
from megatron_dyt.nn.calibrate import calibrate, set_parameters
from megatron_dyt.nn.callers import fused_reads, set_fast_paths
from megatron_dyt.nn.dynamic_tanh import DynamicTanh
from megatron_dyt.nn.norms import Norm, examine, tensors_of
from megatron_dyt.nn.refine import refine as refine_sites
from megatron_dyt.ops.reference import Function

_log = logging.getLogger(__name__)

KINDS = ("layernorm", "rmsnorm")


@dataclass(frozen=True)
class ConvertedNorm:
    """One norm that became DyT.

    Attributes:
        name: of the module in the model, such as "model.layers.0.input_layernorm".
        alpha: what it starts with; of several, their mean.
        error: of the calibration's fit: squared error over the norm's squared output; None without one.
    """

    name: str
    alpha: float
    error: float | None = None


@dataclass(frozen=True)
class LeftNorm:
    """One norm that stayed.

    Attributes:
        name: of the module in the model.
        kind: its class's name, such as "BatchNorm2d".
        reason: why DyT cannot take its place.
    """

    name: str
    kind: str
    reason: str


class Conversion(list[ConvertedNorm]):
    """What was converted, in the order of `model.named_modules()`.

    Attributes:
        left: what `select` took and was not converted.
    """

    def __init__(self, converted: Iterable[ConvertedNorm], left: Iterable[LeftNorm]) -> None:
        super().__init__(converted)
        self.left = list(left)


def convert_norms(
    model: nn.Module,
    calibration: Tensor | Mapping[str, Any] | None = None,
    *,
    alpha_init: float | Callable[[str], float] = 0.5,
    bias: bool | None = None,
    function: Function = "tanh",
    alpha_groups: int | Literal["channels"] = 1,
    sequential: bool = True,
    refine: bool = True,
    select: Callable[[str], bool] | None = None,
    kinds: Collection[str] = KINDS,
) -> Conversion:
    """Replace every LayerNorm and RMSNorm of `model` by a `DynamicTanh`, in place. Experimental.

    What is a norm is tried, whatever its class; what is one and cannot be replaced is left, and a warning
    says why. The norm's weight and bias are kept, and alpha is `alpha_init`: right for a model that is to be
    trained from the start (see docs/initial-scale.md for alpha). A trained model needs `calibration`: it fits
    alpha, weight and bias to what each norm did there, and the model still has to be trained on.

    The parameters are new ones: make the optimizer after this. `restore_norms` takes it back.

    Args:
        calibration: a batch that the model can be called with: a tensor such as token ids (sequences,
            length), or keyword arguments. It runs with twice as many sequences.
        alpha_init: finite and > 0; or a function of the module's name. Ignored with calibration.
        bias: whether DyT has a bias; None: where the norm has one, and everywhere with calibration.
        function, alpha_groups: see `DynamicTanh`; `alpha_groups` has to divide the size of every norm.
        sequential: calibrate each site behind converted ones, to the output of the unconverted model.
        refine: then bring the last site nearer to its norm, by gradient steps on all DyTs together. Not
            without `sequential`.
        select: names of modules to convert; None for all.
        kinds: of "layernorm", "rmsnorm" and "batchnorm", which to convert. DyT in the place of BatchNorm
            costs accuracy (docs/beyond-llm.md), so that has to be asked for.

    Returns:
        What was converted; its attribute `left` is the rest.

    Raises:
        ValueError: no norm can be converted, an argument is not as above, or the calibration does not reach
            every norm. The model is then as it was, as after any other error.
    """
    if unknown := {*kinds} - {*KINDS, "batchnorm"}:
        raise ValueError(f"kinds has {sorted(unknown)}; allowed are layernorm, rmsnorm and batchnorm")
    norms, left = find_norms(model, select, kinds)
    if not norms:
        named = " or ".join(
            {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(each, "BatchNorm") for each in kinds
        )
        raise ValueError(
            f"{type(model).__name__} has no {named}"
            + (" that `select` takes" if select else "")
            + " to convert; convert_norms replaces the norms inside a model"
            + "".join(f". {line}" for line in _summary(left))
        )
    dyts: dict[str, DynamicTanh] = {}
    for name, (module, norm) in norms.items():
        alpha = alpha_init(name) if callable(alpha_init) else alpha_init
        has_bias = bias if bias is not None else calibration is not None or norm.shift is not None
        variant: _Variant = {"function": function, "alpha_groups": alpha_groups}
        dyts[name] = _dyt_like(module, norm, _nearest(model, name), alpha, has_bias, variant)
    try:
        _replace(model, {module: dyts[name] for name, (module, _) in norms.items()})
        sites = [] if calibration is None else calibrate(model, dyts, calibration, sequential=sequential)
        if calibration is not None and sequential and refine:
            refine_sites(model, sites, calibration)
    except BaseException:
        _restore(model, dyts.values())
        raise
    _log.info(f"{len(dyts)} norms of {type(model).__name__} became DyT")
    for line in _summary(left):
        _log.warning(line)
    return Conversion(
        (
            [ConvertedNorm(site.name, float(site.dyt.alpha.detach().mean()), site.error) for site in sites]
            or [ConvertedNorm(name, dyt.alpha_init) for name, dyt in dyts.items()]
        ),
        left,
    )


def restore_norms(model: nn.Module) -> list[str]:
    """Put the norms that `convert_norms` replaced back, as they were before, and return their names.

    They are moved to where the DyTs are now (device and dtype). What the DyTs have learnt is lost.

    Raises:
        ValueError: `model` has no DyT that replaced a norm, or the norm was on the meta device and has no
            values.
    """
    dyts = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DynamicTanh) and module.replaces is not None
    }
    if not dyts:
        raise ValueError(f"{type(model).__name__} has no DyT that convert_norms put in the place of a norm")
    _restore(model, dyts.values())
    return list(dyts)


def find_norms(
    model: nn.Module, select: Callable[[str], bool] | None = None, kinds: Collection[str] = KINDS
) -> tuple[dict[str, tuple[nn.Module, Norm]], list[LeftNorm]]:
    """The norms inside a model by name, and those that have to stay; one that is used twice comes once.

    What is a norm of another kind than `kinds` is in neither.
    """
    norms: dict[str, tuple[nn.Module, Norm]] = {}
    left: list[LeftNorm] = []
    callers, owners = _callers(model), _owners(model)
    for name, module in model.named_modules():
        # Weight norm and spectral norm are parametrizations of weights.
        if not name or "parametrizations" in name.split(".") or (select and not select(name)):
            continue
        found = examine(module, batch_norms="batchnorm" in kinds)
        if isinstance(found, Norm) and _kind(module, found) not in kinds:
            continue
        if isinstance(found, Norm):
            shared = {owner for each in tensors_of(module).values() for owner in owners[id(each)]} - {name}
            if shared:
                found = f"it shares a tensor with {some(sorted(shared))}"
            elif module in callers:
                found = callers[module]
        if isinstance(found, str):
            left.append(LeftNorm(name, type(module).__name__, found))
        elif found is not None:
            norms[name] = (module, found)
    return norms, left


def _kind(module: nn.Module, norm: Norm) -> str:
    if isinstance(module, _BatchNorm):
        return "batchnorm"
    return "layernorm" if norm.formula.centered else "rmsnorm"


def _callers(model: nn.Module) -> dict[nn.Module, str]:
    """Children that are not only called, and what their parents do with them."""
    reads = {kind: fused_reads(kind) for kind in {type(module) for module in model.modules()}}
    return {
        child: f"{type(parent).__name__}.forward reads {read} and may compute the norm without calling it"
        for parent in model.modules()
        for name, read in reads[type(parent)].items()
        if (child := parent._modules.get(name)) is not None
    }


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Names of the modules that have a tensor, by its id."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for tensor in tensors_of(module).values():
            owners.setdefault(id(tensor), set()).add(name)
    return owners


def _summary(left: Iterable[LeftNorm]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for each in left:
        groups.setdefault((each.kind, each.reason), []).append(each.name)
    return [f"left {some(names)} ({kind}): {reason}" for (kind, reason), names in groups.items()]


def _nearest(model: nn.Module, name: str) -> Tensor:
    """A floating-point parameter of the module `name`, or of the smallest one around it that has any."""
    while True:
        for parameter in model.get_submodule(name).parameters():
            if parameter.is_floating_point():
                return parameter
        if not name:
            return torch.empty(0)
        name = name.rpartition(".")[0]


class _Variant(TypedDict):
    """Of `DynamicTanh`."""

    function: Function
    alpha_groups: int | Literal["channels"]


def _dyt_like(
    module: nn.Module, norm: Norm, like: Tensor, alpha: float, bias: bool, variant: _Variant
) -> DynamicTanh:
    """A DyT of the norm's weight and bias, with the device and dtype of `like`; frozen if the norm is."""
    dyt = DynamicTanh(
        norm.size,
        alpha_init=alpha,
        bias=bias,
        channel_dim=norm.channel_dim,
        **variant,
        device=like.device,
        dtype=like.dtype,
    )
    if not like.is_meta:
        set_parameters(dyt, alpha, norm.gain, norm.shift)
    own = list(module.parameters())
    if own and not any(parameter.requires_grad for parameter in own):
        dyt.requires_grad_(False)
    vars(dyt)["replaces"] = module  # not by assignment, which would make it a submodule
    return dyt.train(module.training)


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of `new` in the place of its keys, wherever in the model they stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    set_fast_paths(model)


def _restore(model: nn.Module, dyts: Iterable[DynamicTanh]) -> None:
    norms: dict[nn.Module, nn.Module] = {}
    for dyt in dyts:
        norm = dyt.replaces
        assert norm is not None
        first = next(norm.parameters(), None)
        if first is not None and first.is_meta and not dyt.weight.is_meta:
            raise ValueError("the norms were converted on the meta device and have no values to restore")
        # The others' dtypes may differ from the first one's, as they did before.
        moved = first is not None and first.dtype != dyt.weight.dtype
        norm.to(device=dyt.weight.device, dtype=dyt.weight.dtype if moved else None)
        norms[dyt] = norm.train(dyt.training)
    _replace(model, norms)
