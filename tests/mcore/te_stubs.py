"""Stand-ins for Transformer Engine's classes, for machines without it: local ones under TE's names.

They take what the real ones take, refuse what those refuse and cut weights the same way; tests/te compares.
They have neither the real ones' `_extra_state` nor the weight of the norm that is fused with a linear layer.
"""

from typing import Any

import pytest
import torch
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from megatron_dyt import compat


class TENorm:
    """Builds torch's norm, as TE's builds TE's."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, has_residual: bool = False) -> Any:
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise Exception("Only LayerNorm and RMSNorm are currently supported")
        return norms[config.normalization](hidden_size, eps)


class TELinear(torch.nn.Module):
    """TE's linear for weights that all tensor parallel ranks have whole ("duplicated")."""

    parallel_mode = None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool,
        tp_comm_buffer_name: str | None = None,
        is_expert: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated"
        assert tp_group is None, "duplicated linear should not have tp_group set"
        _refuse(skip_weight_param_allocation=skip_weight_param_allocation)
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, False, 0, 1)
        self.bias = torch.nn.Parameter(torch.zeros(output_size)) if bias else None
        self.returned = bias and skip_bias_add
        for parameter in self.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        # 0.16 leaves the mark that TE itself sets.
        self.weight.tensor_model_parallel = not compat.has("latent_attention_without_te")  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.returned:
            return functional.linear(x, self.weight), self.bias
        return functional.linear(x, self.weight, self.bias), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets)


class TEColumnParallelLinear(ColumnParallelLinear):
    """TE's plain linear."""

    parallel_mode = "column"

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        _refuse(**options)
        super().__init__(input_size, output_size, **options)


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """TE's fused norm-linear: what DyT must replace."""

    parallel_mode = "column"

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        _refuse(**options)
        if options["is_expert"]:
            raise ValueError("Transformer Engine linear layers do not yet support MoE")
        super().__init__(input_size, output_size, **options)


class TERowParallelLinear(RowParallelLinear):
    """TE's row-parallel linear."""

    parallel_mode = "row"

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        if not options["input_is_parallel"]:
            raise ValueError("Transformer Engine linear layers do not support input_is_parallel = False")
        super().__init__(input_size, output_size, **options)


def _refuse(
    gather_output: bool = False, skip_weight_param_allocation: bool = False, **_accepted: object
) -> None:
    if gather_output:
        raise ValueError("Transformer Engine linear layers do not support gather_output = True")
    if skip_weight_param_allocation:
        raise ValueError("Transformer Engine linear layers do not support skip_weight_param_allocation")


class TESpecProvider(backends.LocalSpecProvider):
    """What `get_gpt_layer_with_transformer_engine_spec` asks."""

    def column_parallel_linear(self) -> type:
        return TEColumnParallelLinear

    def linear(self) -> type:
        return TELinear

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
    monkeypatch.setattr(multi_latent_attention, "TELinear", TELinear, raising=False)
