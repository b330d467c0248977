"""Calls of even parts reach PyTorch as made, coalesced ones wait; tests/distributed has the uneven ones."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dyt.cpu import collectives


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter"])
def test_arguments_are_passed_on_by_place_and_by_name(name: str) -> None:
    original = inspect.unwrap(getattr(dist, name))
    seen: list[dict[str, Any]] = []

    def record(*args: Any, **kwargs: Any) -> str:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(dict(bound.arguments))
        return "work"

    (row,) = (each for each in collectives.rows() if each.attribute == name)
    replaced = row.make(record)
    whole, part = [torch.zeros(2), torch.zeros(2)], torch.ones(2)
    tensors = (whole, part) if name == "all_gather" else (part, whole)
    options = {"group": "some", "async_op": True}
    if name == "reduce_scatter":
        options = {"op": dist.ReduceOp.MAX, **options}

    assert replaced(*tensors) == "work"
    assert replaced(*tensors, *options.values()) == "work"
    assert replaced(*tensors, **options) == "work"
    defaults, by_place, by_name = seen
    assert by_place == by_name
    assert {key: by_name[key] for key in options} == options
    assert defaults["group"] is None


@pytest.mark.parametrize("module", collectives._COALESCING)
def test_coalesced_collectives_have_finished_when_their_block_is_left(module: str) -> None:
    asked: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[str]:
        asked.append((group, device, async_ops))
        yield "works"

    assert callable(importlib.import_module(module)._coalescing_manager)
    (row,) = (each for each in collectives.rows() if each.module == module)
    with row.make(manager)("group", async_ops=True) as works:
        assert works == "works"
    assert asked == [("group", None, False)]
