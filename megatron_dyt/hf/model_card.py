"""The README.md of an export."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dyt.hf.config import MODELING_FILE
from megatron_dyt.hf.mapping import hf_tied
from megatron_dyt.hf.shape import LlamaShape
from megatron_dyt.version import __version__

# What a folded role's weight went into.
_BEHIND = {"attn": "q, k, v", "ffn": "gate, up", "final": "lm_head"}


def model_card(
    shape: LlamaShape,
    *,
    parameters: int,
    dtype: torch.dtype,
    iteration: int,
    folded: Sequence[str],
    has_tokenizer: bool,
) -> str:
    """Markdown: what the model is, how to load it, what the export changed."""
    facts = {
        "parameters": f"{parameters:,}",
        "layers, hidden, heads / key-value heads": f"{shape.num_layers}, {shape.hidden_size}, "
        f"{shape.heads} / {shape.kv_heads}",
        "vocabulary, positions": f"{shape.vocab_size}, {shape.max_positions}",
        "norm": _norm(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "training iteration": str(iteration),
        "exported by": f"megatron_dyt {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    notes = "".join(f"\n- {note}" for note in _notes(shape, folded, has_tokenizer))
    tags = "tags: [dynamic-tanh]\n" if shape.dyt else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{tags}---

# {"LLaMA with Dynamic Tanh" if shape.dyt else "LLaMA"}

A base language model, trained with Megatron-Core and exported from its checkpoint.

| | |
|---|---|
{table}

```python
{_usage(shape, has_tokenizer)}
```
{notes}
"""


def _norm(shape: LlamaShape) -> str:
    if shape.dyt is None:
        return f"RMSNorm, epsilon {shape.norm_eps:g}"
    bias = " and bias" if shape.dyt.bias else ""
    return f"Dynamic Tanh ({shape.dyt.function}), with weight{bias}; arXiv 2503.10622"


def _usage(shape: LlamaShape, has_tokenizer: bool) -> str:
    trust = ", trust_remote_code=True" if shape.dyt else ""
    lines = [f'model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto"{trust})']
    names = "AutoModelForCausalLM"
    if has_tokenizer:
        names += ", AutoTokenizer"
        lines.append("tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)")
    return "\n".join([f"from transformers import {names}", "", *lines])


def _notes(shape: LlamaShape, folded: Sequence[str], has_tokenizer: bool) -> list[str]:
    notes = []
    if shape.dyt is not None:
        notes.append(f"`{MODELING_FILE}` holds the model's code; it needs torch and transformers alone.")
    for role in folded:
        notes.append(f"The weight of the DyT in front of {_BEHIND[role]} is folded into {_BEHIND[role]}.")
    if shape.dyt is None and shape.embedding_scale is not None:
        untied = "" if hf_tied(shape) == shape.tied else ", and the output layer is no longer shared with it"
        notes.append(f"The learned scale of the embedding is multiplied into it{untied}.")
    if not has_tokenizer:
        notes.append("There is no tokenizer here: the run had none, or it was left out.")
    return notes
