"""The DyT operator: `dyt`, its reference math and its backends."""

from megatron_dyt.ops.dyt import dyt

__all__ = ["dyt"]
