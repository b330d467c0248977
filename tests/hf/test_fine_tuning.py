"""What docs/huggingface.md says of fine-tuning an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTEmbedding, LlamaDyTForCausalLM
from tests.hf.conftest import without_cpu_runtime
from tests.hf.test_modeling_llama_dyt import TOKENS, small_model


def test_embed_scale_is_the_trained_scalar_once_it_has_a_value() -> None:
    model = small_model(embedding_scale=8.0)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.scale.fill_(3.0)
    assert embedding.embed_scale is embedding.scale
    assert not hasattr(small_model(embedding_scale=None).get_input_embeddings(), "embed_scale")
    with without_cpu_runtime(), torch.device("meta"):
        assert not hasattr(LlamaDyTEmbedding(model.config), "embed_scale")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ["embedding", "dora", "tokens"])
def test_peft_on_the_scaled_embedding_merges_to_what_it_computes(adapter: str, tied: bool) -> None:
    """PEFT multiplies what it adds to an embedding's output itself; merged, the embedding does."""
    peft = pytest.importorskip("peft")
    options: dict[str, dict[str, Any]] = {
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    }
    model = small_model(embedding_scale=8.0, tie_word_embeddings=tied)
    with torch.no_grad():
        plain = model(TOKENS).logits
        tuned = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options[adapter])
        ).eval()
        assert torch.allclose(tuned(TOKENS).logits, plain, rtol=0, atol=1e-4)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        expected = tuned(TOKENS).logits
        assert (expected - plain).norm() > 0.01 * plain.norm()
        if tied and adapter != "tokens":
            return  # Merged, the output layer changes too, as a LLaMA's does.
        assert torch.allclose(tuned.merge_and_unload()(TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_peft_saves_and_loads_dyt_among_modules_to_save(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = small_model(dyt_bias=True, qk_layernorm=True)
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=names)
    tuned = peft.get_peft_model(model, config).eval()
    trained = {
        name for name, value in tuned.named_parameters() if value.requires_grad and "lora_" not in name
    }
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"alpha", "weight", "bias"}
    assert len(trained) == 3 * (4 * model.config.num_hidden_layers + 1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in trained:
                parameter.mul_(1.3)
        expected = tuned(TOKENS).logits
        tuned.save_pretrained(str(tmp_path))
        again = peft.PeftModel.from_pretrained(
            small_model(dyt_bias=True, qk_layernorm=True), str(tmp_path)
        ).eval()
        assert torch.allclose(again(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_trainer_decays_no_parameter_of_a_dyt() -> None:
    """By the names of the modules; the embedding's scale is decayed with the embedding."""
    model: LlamaDyTForCausalLM = small_model(
        dyt_function="erf", dyt_bias=True, qk_layernorm=True, embedding_scale=8.0
    )
    decayed = Trainer.get_decay_parameter_names(None, model)
    small = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert small.intersection(decayed) == {"model.embed_tokens.scale"}
