"""What docs/serving.md says of transformers' own ways to serve an export."""

from __future__ import annotations

from typing import Any

import torch

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


def test_torch_export_of_any_batch_and_length() -> None:
    model = served_model(qk_layernorm=True, dyt_function="erf", dyt_bias=True)
    options = {"use_cache": False}
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": TOKENS} | options, dynamic_shapes=sizes)
        other = torch.arange(3 * 17).reshape(3, 17) * 7 % 64
        found = program.module()(input_ids=other, **options).logits
        assert torch.allclose(found, model(other).logits, atol=1e-5)
