"""Communication over gloo between CPU processes, where Megatron counts on NCCL and on CUDA devices.

Collectives that gloo lacks (parts of different lengths, for the tokens of experts that are split over tensor
parallel ranks; coalesced ones in flight, for data parallelism), sends between pipeline stages, and the device
meshes of Megatron-FSDP. Each function makes a replacement from the original: see `cpu.replacements`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dyt.patching import Replacement, replaced, wrapper


def _uneven(parts: list[torch.Tensor]) -> bool:
    return any(part.shape != parts[0].shape for part in parts)


@wrapper
def one_by_one_where_uneven(
    all_gather: Callable[..., Any],
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    if async_op or not _uneven(tensor_list):
        return all_gather(tensor_list, tensor, group=group, async_op=async_op)
    tensor_list[dist.get_rank(group)].copy_(tensor)
    for rank, part in enumerate(tensor_list):
        dist.broadcast(part, group=group, group_src=rank)
    return None


@wrapper
def reduced_one_by_one_where_uneven(
    reduce_scatter: Callable[..., Any],
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


@wrapper
def waiting_at_its_end(
    manager: Callable[..., Any], group: Any = None, device: Any = None, async_ops: bool = False
) -> Any:
    """Coalesced collectives have finished when the `with` block is left, asynchronous ones too.

    While a coalesced all_gather is under way, a coalesced reduce_scatter of the same gloo group now and
    then hangs or destroys the heap (torch 2.11: two processes, nothing but those two calls in a loop).
    """
    return manager(group, device, async_ops=False)


@wrapper
def without_device_ids(barrier: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("device_ids", None)
    return barrier(*args, **kwargs)


@wrapper
def sending_its_own_view(
    start: Callable[..., Any], *, tensor_send_prev: Any, tensor_send_next: Any, **rest: Any
) -> Any:
    """A tensor on its way to another stage keeps its memory until it has arrived.

    Up to 0.17 the schedule of virtual stages frees an output (`output.data = ...`) while it is being
    sent, and the next stage receives garbage. A view holds the memory and the send holds the view.
    """
    views = [None if sent is None else sent.detach() for sent in (tensor_send_prev, tensor_send_next)]
    return start(tensor_send_prev=views[0], tensor_send_next=views[1], **rest)


def meshes_on_cpu(mesh: Any) -> SimpleNamespace:
    """All that the adapter uses of the class: meshes made of process groups."""

    def from_group(group: Any, device_type: str, **options: Any) -> Any:
        return mesh.from_group(group, "cpu" if device_type == "cuda" else device_type, **options)

    return SimpleNamespace(from_group=from_group)


@wrapper
def with_a_numbered_device(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """It writes f"cuda:{torch.cuda.current_device()}", so the current device must be a number while it is
    built; what is placed on the device of that number is placed on the CPU (`cpu.replacements`)."""
    with replaced(Replacement("torch.cuda", "current_device", lambda _original: lambda: 0)):
        init(self, *args, **kwargs)
