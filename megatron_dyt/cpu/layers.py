"""Megatron's layers where they need a GPU by accident: norms, experts, and multi-latent attention.

Megatron builds multi-latent attention for Transformer Engine. With the layers that need no GPU two things
are missing: attention that takes keys and values of different widths, and a whole gradient of the keys'
positions.
Each function makes a replacement from the original: see `cpu.replacements`.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_dyt.patching import wrapper


def without_fp8(init: Callable[..., None]) -> Callable[..., None]:
    """Megatron 0.19 takes the default, False, for fp8, which needs Transformer Engine."""
    return lambda self, fp8=None: init(self, fp8 or None)


@wrapper
def as_numpy_on_cpu(
    move: Callable[..., Any], tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """Megatron makes split sizes lists on the way off a GPU only, and all_to_all takes nothing else."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return move(tensor, as_numpy, record_stream)


def for_sequence_parallel(new: Callable[..., Any]) -> Any:
    """PyTorch's norms under sequence parallelism, which Megatron allows for TE and apex norms only.

    All that they lack is the mark by which Megatron sums their gradients over the tensor-parallel
    ranks, each of which has seen its part of the sequence.
    """

    @functools.wraps(new)
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm = new(cls, unsplit, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(__new__)


@wrapper
def with_widths(
    init: Callable[..., None],
    self: Any,
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    **kwargs: Any,
) -> None:
    """`DotProductAttention.__init__` that takes the widths of keys and values.

    The computation goes by the tensors' shapes; the width of the result is all that has to be told.
    """
    init(self, *args, **kwargs)
    if v_channels is not None:
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


# For each gather that the running attention layer is about to do: how many columns at the end are the
# keys' positions.
_gathers: list[int] = []


@wrapper
def announcing_gathers(derive: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`get_query_key_value_tensors`, which gathers the query latent, if any, and then the other one."""
    query = [] if self.config.q_lora_rank is None else [0]
    _gathers[:] = [*query, self.config.qk_pos_emb_head_dim]
    return derive(self, *args, **kwargs)


@wrapper
def summing_positions(
    gather: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The gather of a column-parallel latent, whose backward pass takes this rank's columns.

    All heads share the keys' positions, and a rank has the gradient of its own heads: it has to be summed
    over the ranks. Megatron does not (its issue 1699): with tensor parallelism the gradients of the
    down-projection and of all that is below are wrong, whatever the norm.
    """
    whole = gather(x, *args, **kwargs)
    positions = _gathers.pop(0)
    if not positions:
        return whole
    latent, keys = whole.split([whole.size(-1) - positions, positions], dim=-1)
    return torch.cat([latent, _SumGradient.apply(keys)], dim=-1)


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
