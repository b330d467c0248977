"""A converted directory holds what convert_norms made of the model, and goes into Megatron."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt import convert_norms
from megatron_dyt.checkpoints.saved_args import find_checkpoint, saved_args
from megatron_dyt.errors import UserError
from megatron_dyt.hf import convert as module
from megatron_dyt.hf import register_auto_classes
from megatron_dyt.hf.directory import SafetensorsReader
from megatron_dyt.hf.export import Export, export
from megatron_dyt.hf.import_model import import_model
from tests.license_tokenizer import TEXT

from .conftest import HF_TOKENS, add_tokenizer, command, hf_directory

SEQUENCES, LENGTH = 6, 20


@pytest.fixture
def llama(tmp_path: Path, tokenizer_model: Path) -> Callable[..., Any]:
    """`llama(**settings)` saves a small LLaMA with its tokenizer in tmp_path/hf, and a text beside it."""

    def make(**settings: Any) -> Any:
        model = hf_directory(tmp_path / "hf", **settings)
        add_tokenizer(tmp_path / "hf", tokenizer_model)
        (tmp_path / "text.txt").write_text(TEXT)
        return model

    return make


def convert(home: Path, *more: str) -> None:
    paths = ["--load", home / "hf", "--output", home / "dyt", "--text", home / "text.txt"]
    command("convert", *paths, "--sequences", str(SEQUENCES), "--length", str(LENGTH), *more)


def calibration(tokenizer_model: Path) -> torch.Tensor:
    """What the command takes of the text: BOS, then the text's tokens without a gap."""
    import sentencepiece

    ids = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).encode(TEXT)
    body = LENGTH - 1
    return torch.tensor([[1, *ids[row * body : (row + 1) * body]] for row in range(SEQUENCES)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_directory_is_the_converted_model(
    llama: Callable[..., Any], tmp_path: Path, tokenizer_model: Path, tied: bool, bias: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(HF_TOKENS).logits
        plain = copy.deepcopy(model)
        convert_norms(plain)
        uncalibrated = plain(HF_TOKENS).logits
    convert(tmp_path, *([] if bias else ["--no-bias"]), "--max-shard-size", "20KB")
    report = convert_norms(model, calibration(tokenizer_model), bias=bias)
    register_auto_classes()
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "dyt"))
    with torch.no_grad():
        expected, found = model(HF_TOKENS).logits, loaded(HF_TOKENS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # Nearer to the model it was made of than without a calibration.
    assert (found - before).norm() < 0.8 * (uncalibrated - before).norm()
    assert loaded.config.dyt_bias == bias
    alphas = [each.alpha for each in report if each.name.endswith("input_layernorm")]
    assert loaded.config.dyt_alpha_init["attn"] == pytest.approx((alphas[0] * alphas[1]) ** 0.5, rel=1e-4)
    files = {path.name for path in (tmp_path / "dyt").iterdir()}
    assert {"modeling_llama_dyt.py", "tokenizer.json", "generation_config.json", "README.md"} <= files
    assert "model.safetensors.index.json" in files
    text = TEXT[:300]
    ids = [AutoTokenizer.from_pretrained(str(tmp_path / part))(text)["input_ids"] for part in ("hf", "dyt")]
    assert ids[0] == ids[1]


def test_it_goes_into_megatron_and_back(llama: Callable[..., Any], tmp_path: Path) -> None:
    llama()
    convert(tmp_path)
    import_model(tmp_path / "dyt", tmp_path / "megatron")
    checkpoint = find_checkpoint(str(tmp_path / "megatron"))
    export(Export(checkpoint, saved_args(checkpoint), tmp_path / "again"))
    first, second = SafetensorsReader(tmp_path / "dyt"), SafetensorsReader(tmp_path / "again")
    assert first.shapes.keys() == second.shapes.keys()
    for name in first.shapes:
        assert torch.equal(first.read(name), second.read(name)[: len(first.read(name))]), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequences", "100000"], r"has \d+ tokens; 100000 sequences of 20 need 1900000"),
        (["--length", "25"], "--length 25 was given; the model has 24 positions"),
        (["--length", "1"], "--length 1 has no room for text behind BOS; give at least 2"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--load", "nowhere"], r"no readable config\.json"),
    ],
)
def test_what_cannot_be_converted(
    llama: Callable[..., Any], tmp_path: Path, more: list[str], message: str
) -> None:
    llama()
    for weights in (tmp_path / "hf").glob("*.safetensors"):
        weights.unlink()  # Said before they are read.
    with pytest.raises(UserError, match=message):
        convert(tmp_path, *more)
    assert not (tmp_path / "dyt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama_dyt"}, "model_type 'llama_dyt'; converted are LLaMAs"),
        ({"quantization_config": {"bits": 4}}, "a quantized model; converted are LLaMAs"),
    ],
)
def test_other_models(
    llama: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    llama()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        convert(tmp_path)


def test_a_failure_leaves_nothing(
    llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama()
    monkeypatch.setattr(module, "_card", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        convert(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "text.txt"}
