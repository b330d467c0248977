"""Places of parameters in joined buckets; what it is for is in tests/distributed/test_checkpoints.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.mcore import reshardable_optimizer


def buffer() -> Any:
    """Bucket 0 has 100 elements and is padded to 128, bucket 1 65 of 128, bucket 2 128 of 128."""
    starts = {
        "a": (0, 64, 0),
        "b": (64, 100, 0),
        "alpha": (128, 129, 1),
        "c": (192, 193, 1),
        "d": (256, 384, 2),
    }
    buckets = [SimpleNamespace(offset=128 * i, numel_unpadded=n) for i, n in enumerate((100, 65, 128))]
    return SimpleNamespace(param_index_map=starts, buckets=buckets)


def test_padding_at_the_end_of_buckets_is_left_out_and_no_other() -> None:
    assert reshardable_optimizer.unpadded_places(buffer()) == {
        "a": (0, 64, 0),
        "b": (64, 100, 0),
        "alpha": (100, 101, 1),
        "c": (164, 165, 1),
        "d": (165, 293, 2),
    }


def test_the_places_are_put_back() -> None:
    optimizer = SimpleNamespace(buffers=[buffer()])
    before = optimizer.buffers[0].param_index_map

    def fail(self: Any) -> None:
        assert self.buffers[0].param_index_map["alpha"] == (100, 101, 1)
        raise KeyError

    with pytest.raises(KeyError):
        reshardable_optimizer.wrap_sharded_state(fail)(optimizer)
    assert optimizer.buffers[0].param_index_map is before
