"""The emulated FP8 recipes, and what the comparison shows."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/fp8_error.py"""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("fp8_error")


def test_recipes_do_what_te_documents(benchmark: ModuleType) -> None:
    delayed = benchmark.Delayed()
    # The first step knows no history: scale 1, which cuts 1000 off at 448.
    assert delayed(torch.tensor([1000.0, 1.0])).tolist() == [448.0, 1.0]
    # The second knows 1000.
    assert delayed(torch.tensor([1000.0, 2000.0])).tolist() == pytest.approx([1000.0, 1000.0])
    # The largest of the history counts, not the last.
    assert delayed(torch.tensor([2000.0, 10.0]))[0].item() == pytest.approx(2000.0)
    assert delayed(torch.tensor([2000.0]))[0].item() == pytest.approx(2000.0)
    assert benchmark.current(torch.tensor([3.0, 1e-9])).tolist() == pytest.approx([3.0, 0.0])


def test_the_bound_is_as_good_as_current_scaling_and_better_than_delayed_at_a_jump(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--steps 6 --tokens 64 --hidden 128 --jump 4 --json"
    benchmark.main([*flags.split(), str(tmp_path / "e.json")])
    found = json.loads((tmp_path / "e.json").read_text())
    for step in found:
        assert 0.01 < step["DyT's bound"] < 1.15 * step["current scaling"]
    assert found[3]["delayed scaling"] > 2 * found[3]["DyT's bound"]
    assert found[5]["delayed scaling"] < 1.1 * found[5]["current scaling"]
    assert "| DyT's bound | " in capsys.readouterr().out
