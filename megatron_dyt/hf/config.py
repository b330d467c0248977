"""A LLaMA's shape as transformers' configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from megatron_dyt.config import Role
from megatron_dyt.hf.mapping import hf_biases, hf_tied
from megatron_dyt.hf.shape import LlamaShape
from megatron_dyt.hf.tokenizer import TokenizerFacts

MODELING_FILE = "modeling_llama_dyt.py"
_MODULE = MODELING_FILE.removesuffix(".py")
# What transformers' Auto classes take from a directory with that file.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.LlamaDyTConfig",
    "AutoModel": f"{_MODULE}.LlamaDyTModel",
    "AutoModelForCausalLM": f"{_MODULE}.LlamaDyTForCausalLM",
}


def hf_config(
    shape: LlamaShape, dtype: torch.dtype, tokenizer: TokenizerFacts | None, folded: Sequence[str] = ()
) -> Any:
    """A LlamaDyTConfig, or for RMSNorm a LlamaConfig.

    Args:
        dtype: of the exported tensors.
        tokenizer: gives the special tokens.
        folded: roles whose DyT is folded; see `mapping.hf_parts`.
    """
    from transformers import LlamaConfig

    from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig

    settings = _llama_settings(shape, folded) | {
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos if tokenizer else None,
        "eos_token_id": tokenizer.eos if tokenizer else None,
        "pad_token_id": tokenizer.pad if tokenizer else None,
    }
    if shape.dyt is None:
        return LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
    config = LlamaDyTConfig(**settings, **_dyt_settings(shape, folded), architectures=["LlamaDyTForCausalLM"])
    config.auto_map = dict(AUTO_MAP)
    return config


def _llama_settings(shape: LlamaShape, folded: Sequence[str]) -> dict[str, Any]:
    biases = hf_biases(shape, folded)
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "initializer_range": shape.init_std,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": dict(shape.rope_parameters),
        "tie_word_embeddings": hf_tied(shape),
        "attention_bias": biases.attention,
        "mlp_bias": biases.mlp,
    }


def _dyt_settings(shape: LlamaShape, folded: Sequence[str]) -> dict[str, Any]:
    dyt = shape.dyt
    assert dyt is not None
    roles = [role for role in get_args(Role) if role != "qk" or shape.qk_layernorm]
    return {
        "dyt_function": dyt.function,
        "dyt_bias": dyt.bias,
        "dyt_alpha_init": {role: dyt.alpha(role) for role in roles},
        "dyt_weight_init": {role: dyt.initial_weight(role) for role in roles},
        "dyt_folded": list(folded),
        "embedding_scale": shape.embedding_scale,
        "qk_layernorm": shape.qk_layernorm,
        "lm_head_bias": hf_biases(shape, folded).lm_head,
    }
