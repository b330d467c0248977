"""The DyT operators, their reference math and their backends."""

from megatron_dyt.ops.dyt import dyt, dyt_fork, dyt_residual, recompute_dyt
from megatron_dyt.ops.dyt_fp8 import dyt_fp8

__all__ = ["dyt", "dyt_fork", "dyt_fp8", "dyt_residual", "recompute_dyt"]
