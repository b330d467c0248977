"""Folding's benchmark: a folded model leaves out what is folded, and all three are timed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_it_times_three_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import hf_folding

    monkeypatch.setattr(hf_folding, "PROMPT", 8)
    monkeypatch.setattr(sys, "argv", ["hf_folding.py", "--layers", "1", "--hidden", "64", "--rounds", "1"])
    hf_folding.main()
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["DyT", "DyT, folded", "RMSNorm"]


def test_the_folded_model_has_no_weights_of_its_dyts() -> None:
    import hf_folding

    models = hf_folding.make_models(1, 64)
    weights = {
        name: [n for n, _ in models[name].named_parameters() if "norm" in n and n.endswith("weight")]
        for name in ("DyT", "DyT, folded")
    }
    assert len(weights["DyT"]) == 3
    assert weights["DyT, folded"] == []
