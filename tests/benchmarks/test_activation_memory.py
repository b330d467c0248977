"""The count of what a layer keeps for backward, and what it has to show: DyT keeps no more than RMSNorm."""

import dataclasses
import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_dyt.recipes import load

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/activation_memory.py"""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        return importlib.import_module("activation_memory")


@pytest.fixture(scope="module")
def size(benchmark: ModuleType) -> Any:
    return benchmark.Size(sequence=32, batch=2, hidden=64, ffn=192, heads=4)


@pytest.fixture(scope="module")
def found(benchmark: ModuleType, size: Any, world: None) -> dict[str, Counter[str]]:
    # PyTorch's RMSNorm recomputed is Megatron's, which compiles an extension for it.
    cases = [case for case in benchmark.CASES if not (case.kind == "torch" and case.recomputed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "CASES", cases)
        measured: dict[str, Counter[str]] = benchmark.measure(size)
        return measured


def test_dyt_keeps_no_more_than_rmsnorm(found: dict[str, Counter[str]], size: Any) -> None:
    rms = found["RMSNorm, fused (emulated)"]
    for name in ("DyT", "DyT, residual apart"):
        assert found[name].total() < rms.total() < found["RMSNorm, PyTorch on CPU"].total()
        assert found[name]["bfloat16"] == rms["bfloat16"]
    # What an RMSNorm has more: one fp32 a row, of two norms.
    assert rms["float32"] - found["DyT"]["float32"] == 2 * 4 * size.sequence * size.batch


def test_recomputation_saves_both_outputs(found: dict[str, Counter[str]], size: Any) -> None:
    for name in ("DyT", "DyT, residual apart"):
        saved = found[name] - found[f"{name}, output recomputed"]
        assert saved == Counter(bfloat16=2 * 2 * size.elements)


def test_a_plan_counts_what_a_layer_with_fused_swiglu_keeps(benchmark: ModuleType, world: None) -> None:
    from megatron_dyt.recipes import memory
    from megatron_dyt.recipes.layout import Layout

    size = benchmark.Size(sequence=32, batch=1, hidden=64, ffn=192, heads=4)
    recipe = dataclasses.replace(
        load("7b"),
        seq_length=32,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=4,
    )
    softmax_statistics = 4 * 32 * 4  # There are none on the CPU.
    expected = memory.layer_activations(recipe, Layout(1, 1, 1, 1, 1)) - softmax_statistics
    for fused_residual in (True, False):
        case = benchmark.Case("DyT", "DyT", fused=fused_residual)
        assert benchmark.saved_bytes(benchmark.build_layer(case, size, True), size)["bfloat16"] == expected
        unfused = benchmark.saved_bytes(benchmark.build_layer(case, size), size)["bfloat16"]
        assert unfused == expected + 2 * 2 * 32 * 192


def test_every_storage_counts_once_and_parameters_do_not(benchmark: ModuleType, size: Any) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size.hidden, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, None]:
            return (x.view(-1, size.hidden) * x.flatten(0, 1) * self.weight).float().exp(), None

    counted = benchmark.saved_bytes(Layer(), size)
    # x once though two views of it are saved, x * x, and exp's result.
    assert counted == Counter(bfloat16=2 * 2 * size.elements, float32=4 * size.elements)


def test_the_table_shows_every_case(benchmark: ModuleType, size: Any) -> None:
    kib = Counter(bfloat16=1024 * 10, float32=1024 * 2)
    lines = benchmark.table({case.name: kib for case in benchmark.CASES}, size).splitlines()
    assert len(lines) == 2 + len(benchmark.CASES)
    assert lines[2].startswith("| RMSNorm, fused (emulated) | 10 | 2 | 12 | 1.000 |")


def test_impossible_sizes_are_refused(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--hidden", "100", "--heads", "8"])
    assert "--hidden a multiple of --heads" in capsys.readouterr().err
