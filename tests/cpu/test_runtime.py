"""The CPU runtime: what it replaces works on CPU, and goes away without a trace."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from megatron_dyt import cpu
from megatron_dyt.cpu import replacements
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import register
from megatron_dyt.patching import Replacement


def held(row: Replacement) -> object:
    """What the owner of a replaced attribute itself holds."""
    owner, name = row.target()
    return vars(owner).get(name, "inherited")


def test_disable_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    register.unregister()  # Its wrappers are made anew each time one below them goes.
    cpu.enable()  # Imports Megatron, which itself changes PyTorch.
    cpu.disable()
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    jit = sys.modules["megatron.core.jit"]

    def state() -> list[object]:
        return [
            *(held(row) for row in replacements.rows()),
            dict(os.environ),
            torch.compile,
            jit.jit_fuser,
            list(logger.filters),
            torch.get_num_threads(),
            sys.modules.get("transformer_engine", "absent"),
        ]

    before = state()
    cpu.enable()
    replaced = [held(row) for row in replacements.rows()]
    cpu.enable()
    assert cpu.is_enabled()
    assert [held(row) for row in replacements.rows()] == replaced
    assert all(now is not then for now, then in zip(replaced, before, strict=False))
    cpu.disable()
    cpu.disable()
    assert not cpu.is_enabled()
    assert state() == before


def test_a_process_that_uses_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="already uses CUDA"):
        cpu.enable()
    assert not cpu.is_enabled()


def test_an_imported_gpu_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", sys)
    with pytest.raises(UserError, match="apex, which needs a GPU, is already imported"):
        cpu.enable()


def test_a_missing_megatron_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("megatron.core", "megatron.core.package_info"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-dyt\[train\]'"):
        cpu.enable()
    assert not cpu.is_enabled()


def test_gpu_packages_are_hidden_from_megatron(runtime: None) -> None:
    with pytest.raises(ImportError):
        __import__("transformer_engine")


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.empty
    broken = [*replacements.rows(), Replacement("torch", "no_such_thing", lambda old: old)]
    monkeypatch.setattr(replacements, "rows", lambda: broken)
    with pytest.raises(RuntimeError, match=r"torch\.no_such_thing"):
        cpu.enable()
    assert not cpu.is_enabled()
    assert torch.empty is original
    assert sys.modules.get("transformer_engine", "absent") == "absent"


def test_a_lone_process_gets_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu.enable()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        cpu.disable()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        cpu.enable()
        assert torch.get_num_threads() == 1
    finally:
        cpu.disable()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fresh() -> list[str]:
    """What a process prints in which the runtime is the first to import Megatron."""
    program = """
import torch
from megatron_dyt import cpu
cpu.enable()
with torch.device("meta"):
    print(torch.empty(2).device, torch.nn.Linear(2, 2).weight.device)
from megatron.core.fusions import fused_bias_swiglu
print(hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    return result.stdout.split()[-3:]


def test_a_device_context_still_places_tensors(fresh: list[str]) -> None:
    """PyTorch keeps what it finds at the first use of such a context."""
    assert fresh[:2] == ["meta", "meta"]


def test_megatrons_fused_functions_stay_eager(fresh: list[str]) -> None:
    """`@jit_fuser` compiles at import; torch.compile would take a compiler, minutes, and other rounding."""
    assert fresh[2] == "False"
