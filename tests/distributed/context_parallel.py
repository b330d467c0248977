"""Context parallelism without a GPU: attention that gathers keys and values from all ranks of the group.

Megatron leaves it to Transformer Engine. All else of it is Megatron's: how a batch is split, the angles of
RoPE, the sum of gradients and losses over the ranks.
"""

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.patching import Replacement, wrapper

_ATTENTION = "megatron.core.transformer.dot_product_attention"


def rows() -> list[Replacement]:
    """What makes `--context-parallel-size` work."""
    return [
        Replacement(_ATTENTION, "DotProductAttention.__init__", _for_one_rank),
        Replacement(_ATTENTION, "DotProductAttention.forward", _gathering),
        Replacement("megatron_dyt.cpu.flags", "adjust", _unseen),
    ]


@wrapper
def _unseen(adjust: Callable[[Namespace], Any], args: Namespace) -> Any:
    size, args.context_parallel_size = args.context_parallel_size, 1
    try:
        return adjust(args)
    finally:
        args.context_parallel_size = size


@wrapper
def _for_one_rank(init: Callable[..., None], self: Any, config: Any, *args: Any, **options: Any) -> None:
    config = copy.copy(config)
    config.context_parallel_size = 1
    options.pop("cp_comm_type", None)
    init(self, config, *args, **options)


@wrapper
def _gathering(
    forward: Callable[..., Tensor],
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **options: Any,
) -> Tensor:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    group = parallel_state.get_context_parallel_group()
    key, value = (gather_from_sequence_parallel_region(each, group=group) for each in (key, value))
    places = [positions(rank, group.size(), len(query)) for rank in range(group.size())]
    mask = torch.cat(places)[None, :] > places[group.rank()][:, None]
    return forward(self, query, key, value, mask[None, None], **options)


def positions(rank: int, ranks: int, length: int) -> Tensor:
    """Where a rank's `length` tokens stand: a half in chunk `rank` of 2 * `ranks`, a half in its mirror."""
    half = length // 2
    return torch.cat([torch.arange(half) + chunk * half for chunk in (rank, 2 * ranks - 1 - rank)])
