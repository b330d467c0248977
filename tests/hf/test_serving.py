"""What docs/serving.md says of transformers' own ways to serve an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt.hf import register_auto_classes
from tests.hf.test_modeling_llama_dyt import TOKENS, small_model

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def served_model(**settings: Any) -> Any:
    """A model whose greedy tokens differ from each other, with values that no two parameters share."""
    model = small_model(dyt_weight_init={"final": 20.0}, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def test_static_cache_and_assisted_generation() -> None:
    model, assistant = served_model(qk_layernorm=True), served_model(qk_layernorm=True, num_hidden_layers=1)
    expected = model.generate(TOKENS, **GREEDY)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **GREEDY), expected)
    assert torch.equal(
        model.generate(TOKENS[:1], assistant_model=assistant, **GREEDY), model.generate(TOKENS[:1], **GREEDY)
    )


@pytest.fixture(scope="module")
def exported() -> tuple[torch.export.ExportedProgram, torch.Tensor, torch.Tensor]:
    """A program, tokens of another batch and length than it was made with, and the model's logits of them."""
    model = served_model(qk_layernorm=True, dyt_function="erf", dyt_bias=True)
    other = torch.arange(3 * 17).reshape(3, 17) * 7 % 64
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        given = {"input_ids": TOKENS, "use_cache": False}
        program = torch.export.export(model, (), given, dynamic_shapes=sizes)
        return program, other, model(other).logits


def test_torch_export_of_any_batch_and_length(exported: Any) -> None:
    program, tokens, expected = exported
    found = program.module()(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_onnx_of_any_batch_and_length(exported: Any, tmp_path: Path) -> None:
    onnxruntime, *_ = (pytest.importorskip(name) for name in ("onnxruntime", "onnx", "onnxscript"))
    program, tokens, expected = exported
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, output_names=["logits"], verbose=False).save(path)
    (found,) = onnxruntime.InferenceSession(path).run(["logits"], {"input_ids": tokens.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{"qk_layernorm": True}, {"dyt_folded": ["attn", "ffn", "final"]}])
def test_int8_weights_of_torchao(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of the layers' linear modules; DyT, embedding and output layer stay. It is saved as it is."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    register_auto_classes()
    model = served_model(**settings)
    model.save_pretrained(tmp_path / "model")
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=int8)
    for name, parameter in quantized.named_parameters():
        assert (type(parameter) is not torch.nn.Parameter) == name.endswith("proj.weight"), name
    with torch.no_grad():
        expected, found = model(TOKENS).logits, quantized(TOKENS).logits
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()
        quantized.save_pretrained(tmp_path / "int8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
        assert torch.equal(again(TOKENS).logits, found)
