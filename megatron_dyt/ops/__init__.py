"""The DyT operators, `dyt` and `dyt_residual`, their reference math and their backends."""

from megatron_dyt.ops.dyt import dyt, dyt_residual

__all__ = ["dyt", "dyt_residual"]
