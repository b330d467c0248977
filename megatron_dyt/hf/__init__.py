"""Hugging Face transformers: the model class, export of a Megatron checkpoint, and import.

Importing this package needs neither transformers nor Megatron.
"""

from __future__ import annotations


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know `llama_dyt` models.

    Then an exported directory loads without trust_remote_code. Calling it again changes nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig, LlamaDyTForCausalLM, LlamaDyTModel

    AutoConfig.register(LlamaDyTConfig.model_type, LlamaDyTConfig, exist_ok=True)
    AutoModel.register(LlamaDyTConfig, LlamaDyTModel, exist_ok=True)
    AutoModelForCausalLM.register(LlamaDyTConfig, LlamaDyTForCausalLM, exist_ok=True)
