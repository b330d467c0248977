"""The comparison runs, in a small form, and its figures are those of the models it names."""

import json
import random
from pathlib import Path

import pytest
import torch

from examples import convert_llama
from megatron_dyt.errors import UserError


def test_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(convert_llama, "SHAPE", small)
    monkeypatch.setattr(convert_llama, "VALIDATION_BATCHES", 3)
    sizes = ["--megabytes", "0.5", "--steps", "40", "--tune-steps", "2", "4", "--tune-lr", "1e-3", "3e-3"]
    convert_llama.main(["--output", str(tmp_path), *sizes])
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {row["way"]: row["losses"] for row in report["results"]}
    assert list(rows) == [name for name, _arguments, _calibrated in convert_llama.WAYS]
    assert all(set(losses) == {"0", "2", "4"} for losses in rows.values())
    train, valid = convert_llama.read_bytes(0.5)
    model = convert_llama.LlamaForCausalLM.from_pretrained(str(tmp_path / "rmsnorm"))
    assert rows["RMSNorm, as it was"]["0"] == pytest.approx(convert_llama.validation_loss(model, valid))
    batch = convert_llama.batch(train, random.Random(2), convert_llama.CALIBRATION_ROWS)
    convert_llama.convert_norms(model, batch)
    expected = convert_llama.validation_loss(model, valid)
    assert rows["DyT, then refined"]["0"] == pytest.approx(expected)
    assert not torch.equal(train[: len(valid)], valid)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="100 KB are the least"):
        convert_llama.main(["--output", str(tmp_path), "--megabytes", "0.05"])
