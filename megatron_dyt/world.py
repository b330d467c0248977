"""How many ranks there are, which one this is, and what each of them says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def size(group: ProcessGroup | None = None) -> int:
    """How many ranks `group` has (None: all); 1 without process groups."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """This rank's number in `group` (None: among all); 0 without process groups."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather[T](item: T, group: ProcessGroup | None = None) -> list[T]:
    """What each rank of `group` (None: all) gives, in the order of the ranks. A collective."""
    if size(group) == 1:
        return [item]
    items: list[T] = [item] * size(group)
    dist.all_gather_object(items, item, group=group)
    return items
