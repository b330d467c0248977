"""Multi-latent attention out of Megatron's local layers, which by themselves cannot do it.

Megatron builds it for Transformer Engine. With the layers that need no GPU two things are missing:
attention that takes keys and values of different widths, and a whole gradient of the keys' positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_dyt.patching import Replacement

_LATENT = "megatron.core.transformer.multi_latent_attention"


def rows() -> list[Replacement]:
    """The replacements, for any device; they do nothing to other kinds of attention."""
    attention = "megatron.core.transformer.dot_product_attention"
    return [
        Replacement(attention, "DotProductAttention.__init__", _with_widths),
        Replacement(_LATENT, "MLASelfAttention.get_query_key_value_tensors", _announcing_gathers),
        Replacement(_LATENT, "gather_from_tensor_model_parallel_region", _summing_positions),
    ]


def _with_widths(init: Callable[..., None]) -> Callable[..., None]:
    """`DotProductAttention.__init__` that takes the widths of keys and values.

    The computation goes by the tensors' shapes; the width of the result is all that has to be told.
    """

    @functools.wraps(init)
    def __init__(
        self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        init(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


# For each gather that the running attention layer is about to do: how many columns at the end are the
# keys' positions.
_gathers: list[int] = []


def _announcing_gathers(derive: Callable[..., Any]) -> Callable[..., Any]:
    """`get_query_key_value_tensors`, which gathers the query latent, if any, and then the other one."""

    @functools.wraps(derive)
    def derive_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        query = [] if self.config.q_lora_rank is None else [0]
        _gathers[:] = [*query, self.config.qk_pos_emb_head_dim]
        return derive(self, *args, **kwargs)

    return derive_tensors


def _summing_positions(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The gather of a column-parallel latent, whose backward pass takes this rank's columns.

    All heads share the keys' positions, and a rank has the gradient of its own heads: it has to be summed
    over the ranks. Megatron does not (its issue 1699): with tensor parallelism the gradients of the
    down-projection and of all that is below are wrong, whatever the norm.
    """

    @functools.wraps(gather)
    def gather_columns(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        whole = gather(x, *args, **kwargs)
        positions = _gathers.pop(0)
        if not positions:
            return whole
        latent, keys = whole.split([whole.size(-1) - positions, positions], dim=-1)
        return torch.cat([latent, _SumGradient.apply(keys)], dim=-1)

    return gather_columns


class _SumGradient(torch.autograd.Function):
    """x -> x, whose gradient is the sum over the tensor parallel ranks.

    Not Megatron's `copy_to_tensor_model_parallel_region`: up to 0.18 that loses the sum of a gradient which
    is not contiguous (`tensor_parallel/mappings.py`, `_reduce`), as the one of these columns is.
    """

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        # A copy: autograd may hand the same memory to others.
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=get_tensor_model_parallel_group())
        return total
