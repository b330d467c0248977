"""The closed sets of names that flags, configs and modules share."""

from __future__ import annotations

from typing import Literal

# Where a norm stands: in front of attention, in front of the MLP or MoE, after the last layer,
# or on queries and keys.
Role = Literal["attn", "ffn", "final", "qk"]
Preset = Literal["paper", "unit"]
Function = Literal["tanh", "erf", "hardtanh", "sigmoid", "isru", "identity"]
WeightInit = Literal["one", "unit"]
Backend = Literal["auto", "triton", "torch"]
# What happens when an update makes an alpha <= 0.
OnBadAlpha = Literal["stop", "report"]
