"""torch modules that know nothing of Megatron."""

from megatron_dyt.nn.dynamic_tanh import DynamicTanh

__all__ = ["DynamicTanh"]
