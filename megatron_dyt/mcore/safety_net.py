"""No norm stays unnoticed: what Megatron builds past the spec is an error in a DyT model.

The spec rewrite covers the slots of a layer, `direct.py` the norms that Megatron's model classes build
themselves. A class that constructs a norm in another place would silently keep LayerNorm or RMSNorm; the
wrappers here make that a clear error, and what was built is searched once more. What stays on purpose
(`kept.py`) or belongs to a part of the model whose own config says so is told.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import kept
from megatron_dyt.nn import DynamicTanh


def wrap_new(original: Callable[..., Any]) -> Any:
    """`__new__` of a norm class that refuses to build for a DyT config."""

    @functools.wraps(original)
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, "normalization", None) == "DyT":
            _refuse(cls.__name__)
        return original(cls, config, *args, **kwargs)

    return staticmethod(__new__)


def wrap_fused_init(original: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of apex's norm or TE's fused norm-linear that refuses DyT configs."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config", args[0] if args else None)
        if getattr(config, "normalization", None) == "DyT":
            _refuse(type(self).__name__)
        original(self, *args, **kwargs)

    return __init__


def wrap_block_init(original: Callable[..., None]) -> Callable[..., None]:
    """`TransformerBlock.__init__` that searches what a DyT block was built of."""

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        if config.normalization == "DyT":
            check_built(self, "decoder")

    return __init__


def check_built(model: nn.Module, name: str) -> None:
    """Raise UserError when a part of a DyT model has a norm that is not DyT; tell what stays on purpose.

    Args:
        model: what was built.
        name: what the model calls it, for the message.
    """
    for path, norm, stays in other_norms(model):
        if stays is None:
            raise UserError(
                f"{name}.{path} of this model is {type(norm).__name__}, built outside its layer spec, so "
                "--normalization DyT would leave a normalization layer in it (docs/families.md lists what is "
                "supported). Use another --normalization for this model."
            )
        kept.tell(stays)


def wrap_multimodal_init(original: Callable[..., None]) -> Callable[..., None]:
    """`LLaVAModel.__init__` that tells which parts keep the norm of their own config."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tell_other_norms(self)

    return __init__


def tell_other_norms(model: nn.Module) -> None:
    """Say, for each part (child) of a model with DyT, that it has norms of another kind, where it has."""
    if not any(isinstance(module, DynamicTanh) for module in model.modules()):
        return
    found = Counter(
        (path.split(".")[0], type(norm).__name__) for path, norm, stays in other_norms(model) if not stays
    )
    for (part, norm), count in found.items():
        kept.say_once(f"DyT: {part} keeps its {count} {norm}: its own config has another normalization.")


def other_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, kept.Kept | None]]:
    """(name, module, what it is if it stays on purpose) of every norm in a model that is not DyT."""
    parents = dict(model.named_modules())
    for path, module in parents.items():
        if "norm" in type(module).__name__.lower() and not isinstance(module, DynamicTanh):
            parent, _, attribute = path.rpartition(".")
            yield path, module, kept.in_module(parents[parent], attribute)


def _refuse(name: str) -> NoReturn:
    raise UserError(
        f"this model builds {name} directly, outside its layer spec, so --normalization DyT would "
        "leave a normalization layer in it (docs/families.md lists what is supported). Use another "
        "--normalization for this model."
    )
