"""No norm stays unnoticed: what Megatron builds past the spec is an error in a DyT model.

The spec rewrite covers the slots of a layer. A model class that constructs a norm directly would
silently keep LayerNorm or RMSNorm; these wrappers make that a clear error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_dyt.errors import UserError


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


def _refuse(name: str) -> NoReturn:
    raise UserError(
        f"this model builds {name} directly, outside its layer spec, so --normalization DyT would "
        "leave a normalization layer in it. Supported: GPT models with self-attention and MLP or MoE "
        "layers. Use another --normalization for this model."
    )
