"""The DyT operators, their reference math and their backends."""

from megatron_dyt.ops.dyt import dyt, dyt_fork, dyt_residual, recompute_dyt

__all__ = ["dyt", "dyt_fork", "dyt_residual", "recompute_dyt"]
