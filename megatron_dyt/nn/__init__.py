"""torch modules that know nothing of Megatron."""

from megatron_dyt.nn.convert import ConvertedNorm, convert_norms
from megatron_dyt.nn.dynamic_tanh import DynamicTanh

__all__ = ["ConvertedNorm", "DynamicTanh", "convert_norms"]
