"""Which runs have a Hugging Face form, and with which rotary embedding."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.hf.shape import llama_shape

ARGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": 8,
    "padded_vocab_size": 64,
    "max_position_embeddings": 16,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "norm_epsilon": 1e-6,
    "rotary_base": 10000,
    "init_method_std": 0.02,
    "swiglu": True,
    "normalization": "RMSNorm",
}


def test_plain_llama() -> None:
    shape = llama_shape(Namespace(**ARGS))
    assert (shape.kv_heads, shape.norm_eps, shape.dyt, shape.embedding_scale) == (4, 1e-6, None, None)
    assert shape.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"hybrid_layer_pattern": "M*"}, "hybrid"),
        ({"experimental_attention_variant": "dsa"}, "hybrid"),
        ({"heterogeneous_layers_config_path": "layers.json"}, "heterogeneous layers"),
        ({"spec": ["my.spec", "layers"]}, "--spec"),
        ({"swiglu": False}, "without --swiglu"),
        ({"glu_linear_offset": 1.0}, "--glu-linear-offset"),
        ({"activation_func_clamp_value": 7.0}, "--activation-func-clamp-value"),
        ({"position_embedding_type": "learned_absolute"}, "other than rope"),
        ({"rotary_percent": 0.5}, "--rotary-percent"),
        ({"rotary_interleaved": True}, "--rotary-interleaved"),
        ({"no_rope_freq": [1, 0]}, "--no-rope-freq"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "--use-rope-scaling together"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type"),
        ({"softmax_scale": 0.5}, "--softmax-scale"),
        ({"attention_output_gate": True}, "--attention-output-gate"),
        ({"qk_l2_norm": True}, "--qk-l2-norm"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
        ({"apply_residual_connection_post_layernorm": True}, "post-layernorm"),
        ({"use_mup": True}, "--use-mup"),
        ({"qk_layernorm": True}, "--qk-layernorm with RMSNorm"),
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"num_attention_heads": 5}, "no multiple of the attention heads"),
    ],
)
def test_what_has_no_form(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="no Hugging Face LLaMA form") as error:
        llama_shape(Namespace(**(ARGS | changed)))
    assert named in str(error.value)
    assert ";" not in str(error.value)


def test_several_reasons_are_all_named() -> None:
    with pytest.raises(UserError, match=r"--num-experts.*; --use-mup"):
        llama_shape(Namespace(**(ARGS | {"num_experts": 8, "use_mup": True})))
