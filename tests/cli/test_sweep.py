"""How many runs at a time `megatron-dyt sweep` takes where nothing is said."""

import logging

import pytest
import torch

from megatron_dyt.cli import sweep
from megatron_dyt.sweep.spec import Run, Seed, Sweep


def a_sweep(*flags: str) -> Sweep:
    return Sweep("A title", (), (Run({}, Seed(1, 1), flags),), (), None)


@pytest.mark.parametrize(
    ("has_gpu", "flags", "on_gpu"),
    [(False, (), False), (True, (), True), (True, ("--lr", "1", "--device", "cpu"), False)],
)
def test_runs_that_would_share_a_gpu_come_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_gpu: bool,
    flags: tuple[str, ...],
    on_gpu: bool,
) -> None:
    monkeypatch.delenv("MEGATRON_DYT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with caplog.at_level(logging.INFO, "megatron_dyt"):
        assert sweep._on_gpu(a_sweep(*flags)) == on_gpu
    assert ("--nproc 1" in caplog.text) == on_gpu


def test_runs_on_cores_have_memory_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 5 * 2**30 // 4096}
    monkeypatch.setattr(sweep.os, "sysconf", memory.__getitem__)
    assert [sweep._parallel_on_cpu(8, threads) for threads in (1, 4, 8, 16)] == [2, 2, 1, 1]
