"""The distributed optimizer's state in the format that every layout can load, saved from padded buckets.

For `--dist-ckpt-optim-fully-reshardable` Megatron joins the buckets of its gradient buffer without the
padding at their ends, and then cuts the parameters out at their places in the buffer with the padding
(`get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable`; a note there says that something is
wrong). After the first padded bucket every parameter gets its neighbour's values. Hidden sizes are mostly
multiples of the padding, so that RMSNorm models have none; an alpha of one element makes it the rule.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


def wrap_sharded_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.sharded_param_state_fully_reshardable` with places that leave padding out."""

    @functools.wraps(original)
    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _places_without_padding(self.buffers):
            return original(self, *args, **kwargs)

    return sharded_state


@contextlib.contextmanager
def _places_without_padding(buffers: list[Any]) -> Iterator[None]:
    maps = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.param_index_map = unpadded_places(buffer)
        yield
    finally:
        for buffer, places in zip(buffers, maps, strict=True):
            buffer.param_index_map = places


def unpadded_places(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """`buffer.param_index_map`, parameter -> (start, end, bucket), as if no bucket were padded at its end."""
    shifts, unpadded = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
