"""Stand-ins for Transformer Engine's classes: the local ones under TE's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention


class TENorm:
    """Builds torch's norm, as TE's builds TE's."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        if config.normalization != "RMSNorm":
            raise TypeError(f"TENorm was built for {config.normalization}")
        return torch.nn.RMSNorm(hidden_size, eps)


class TEColumnParallelLinear(ColumnParallelLinear):
    """TE's plain linear."""


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """TE's fused norm-linear: what DyT must replace."""


class TERowParallelLinear(RowParallelLinear):
    """TE's row-parallel linear."""


class TESpecProvider(backends.LocalSpecProvider):
    """What `get_gpt_layer_with_transformer_engine_spec` asks."""

    def column_parallel_linear(self) -> type:
        return TEColumnParallelLinear

    def linear(self) -> type:
        # TE's duplicated linear: Megatron's attention takes a column-parallel one as well.
        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return TELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return TENorm

    def core_attention(self) -> type:
        return DotProductAttention


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where Megatron and the plugin look for TE."""
    from megatron.core.extensions import transformer_engine

    # Up to 0.17 the name is there with Transformer Engine only.
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider, raising=False)
    monkeypatch.setattr(transformer_engine, "TEColumnParallelLinear", TEColumnParallelLinear)
    # Names that these modules have taken from Megatron's own.
    monkeypatch.setattr(multi_latent_attention, "TEColumnParallelLinear", TEColumnParallelLinear)
