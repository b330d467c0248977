"""Megatron-Core without a GPU. Knows nothing of DyT: `enable()` is all that a program of its own needs."""

from megatron_dyt.cpu.runtime import disable, enable, is_enabled

__all__ = ["disable", "enable", "is_enabled"]
