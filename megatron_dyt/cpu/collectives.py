"""Collectives that NCCL has and gloo has not: with parts of different lengths, and coalesced ones in flight.

Megatron's dispatcher uses the former for the tokens of experts that are split over tensor parallel ranks,
its data parallelism the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_dyt.patching import Replacement

# Both bind the name at their import.
_COALESCING = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
)


def rows() -> list[Replacement]:
    """For the table of `cpu.replacements`."""
    return [
        Replacement("torch.distributed", "all_gather", _one_by_one_where_uneven),
        Replacement("torch.distributed", "reduce_scatter", _reduced_one_by_one_where_uneven),
        *(Replacement(module, "_coalescing_manager", _waiting_at_its_end) for module in _COALESCING),
    ]


def _uneven(parts: list[torch.Tensor]) -> bool:
    return any(part.shape != parts[0].shape for part in parts)


def _one_by_one_where_uneven(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(all_gather)
    def gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or not _uneven(tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=rank)
        return None

    return gather


def _reduced_one_by_one_where_uneven(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reduce_scatter)
    def scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or not _uneven(input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(input_list):
            mine = part.clone()  # A reduction leaves anything in the ranks that do not receive it.
            dist.reduce(mine, op=op, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                output.copy_(mine)
        return None

    return scatter


def _waiting_at_its_end(manager: Callable[..., Any]) -> Callable[..., Any]:
    """Coalesced collectives have finished when the `with` block is left, asynchronous ones too.

    While a coalesced all_gather is under way, a coalesced reduce_scatter of the same gloo group now and
    then hangs or destroys the heap (torch 2.11: two processes, nothing but those two calls in a loop).
    """

    @functools.wraps(manager)
    def coalesce(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        return manager(group, device, async_ops=False)

    return coalesce
