"""megatron_dyt: Dynamic Tanh (DyT) in place of normalization, for Megatron-Core and plain PyTorch.

Importing this package changes nothing. `register()` adds `--normalization DyT` to Megatron-Core.
Names are loaded on first use, so that `megatron_dyt.DynamicTanh` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_dyt.version import __version__

if TYPE_CHECKING:
    from megatron_dyt.config import DyTConfig
    from megatron_dyt.mcore.register import is_registered, register
    from megatron_dyt.nn import ConvertedNorm, DynamicTanh, convert_norms, restore_norms

_HOME = {
    "ConvertedNorm": "megatron_dyt.nn",
    "DyTConfig": "megatron_dyt.config",
    "DynamicTanh": "megatron_dyt.nn",
    "convert_norms": "megatron_dyt.nn",
    "is_registered": "megatron_dyt.mcore.register",
    "register": "megatron_dyt.mcore.register",
    "restore_norms": "megatron_dyt.nn",
}

__all__ = [
    "ConvertedNorm",
    "DyTConfig",
    "DynamicTanh",
    "__version__",
    "convert_norms",
    "is_registered",
    "register",
    "restore_norms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_dyt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
