"""torch modules that know nothing of Megatron."""

from megatron_dyt.nn.convert import Conversion, ConvertedNorm, LeftNorm, convert_norms, restore_norms
from megatron_dyt.nn.dynamic_tanh import DynamicTanh

__all__ = ["Conversion", "ConvertedNorm", "DynamicTanh", "LeftNorm", "convert_norms", "restore_norms"]
