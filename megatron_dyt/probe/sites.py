"""The norms of any torch model, DyT among them: where they stand, what they compute without their weights."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.nn.norms import Norm, examine, without_weight
from megatron_dyt.ops.reference import FUNCTIONS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One norm of a model.

    Attributes:
        name: of the module, such as "decoder.layers.3.input_layernorm".
        place: what all norms of that kind share, such as "input_layernorm".
        layer: from 1; None for a norm outside the layers.
        kind: "DyT", "RMSNorm" or "LayerNorm".
        function: DyT's, else None.
        alpha: what multiplies x, a float; None for another norm than DyT.
        shift: Derf's, else None.
        channel_dim: the dimension of x that the norm's weight belongs to.
        apply: x -> what the norm gives without its weight and bias, in fp32, less its value at x = 0.
    """

    name: str
    place: str
    layer: int | None
    module: nn.Module
    kind: str
    function: str | None
    alpha: float | None
    shift: Tensor | None
    channel_dim: int
    apply: Callable[[Tensor], Tensor]


def find(model: nn.Module) -> list[Site]:
    """All norms of `model`, in the order of its modules; what is a norm is tried, whatever its class."""
    modules: dict[str, nn.Module] = {}
    norms: dict[str, Norm | str] = {}
    for name, module in model.named_modules():
        function = dyt_function(module)
        if function is None and isinstance(module, DynamicTanh):
            _log.warning(f"left {name}: it has {module.alpha.numel()} alphas, or a function of your own")
        found = examine(module) if function is None else None
        if function is not None or isinstance(found, Norm):
            modules[name] = module
            norms[name] = found if isinstance(found, Norm) else str(function)
    places = _places(list(norms))
    return [_site(name, *places[name], modules[name], norms[name]) for name in norms]


def dyt_function(module: nn.Module) -> str | None:
    """The function of a DyT of any class: ours, an export's, or the paper's; None for another module."""
    alpha = module.alpha_parameter if isinstance(module, DyTNorm) else getattr(module, "alpha", None)
    if not isinstance(alpha, Tensor) or alpha.numel() != 1 or any(True for _ in module.children()):
        return None
    # The paper's class has no other function than tanh, and so no attribute for it.
    by_name = (
        "tanh" if any(word in type(module).__name__.lower() for word in ("dyt", "dynamictanh")) else None
    )
    function = getattr(module, "function", by_name)
    return function if isinstance(function, str) and function in FUNCTIONS else None


def _site(name: str, place: str, layer: int | None, module: nn.Module, found: Norm | str) -> Site:
    if isinstance(found, Norm):
        kind = "LayerNorm" if found.formula.centered else "RMSNorm"
        plain = without_weight(module, found)
        return Site(
            name, place, layer, module, kind, None, None, None, found.channel_dim, lambda x: plain(x.float())
        )
    # The parameter may be the logarithm of what multiplies x.
    factor = module.effective_alpha() if isinstance(module, DyTNorm) else module.get_parameter("alpha")
    alpha = float(factor.detach())
    shift = getattr(module, "shift", None)
    offset = 0.0 if shift is None else float(shift.detach())
    value = FUNCTIONS[found].value
    at_zero = float(value(torch.tensor(offset)))

    def apply(x: Tensor) -> Tensor:
        return value(alpha * x.float() + offset) - at_zero

    channel_dim = getattr(module, "channel_dim", -1)
    return Site(name, place, layer, module, "DyT", found, alpha, shift, channel_dim, apply)


def _places(names: list[str]) -> dict[str, tuple[str, int | None]]:
    """(place, layer) of each norm."""
    patterns = {name: ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    leaves = Counter(pattern.rpartition(".")[2] for pattern in set(patterns.values()))
    places: dict[str, tuple[str, int | None]] = {}
    seen: Counter[str] = Counter()
    for name, pattern in patterns.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        seen[pattern] += 1
        leaf = pattern.rpartition(".")[2]
        place = leaf if leaves[leaf] == 1 else pattern
        # Blocks inside of stages count on.
        layer = None if not numbers else numbers[0] + 1 if len(numbers) == 1 else seen[pattern]
        places[name] = place, layer
    return places
