"""The pretrain entry point, on Megatron's own loop."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

Run = Callable[[list[str]], SimpleNamespace]


def test_trains(megatron_run: Run, tiny_llama: list[str]) -> None:
    run = megatron_run(tiny_llama)
    assert len(run.losses) == 4
    assert run.losses[-1] < run.losses[0]
