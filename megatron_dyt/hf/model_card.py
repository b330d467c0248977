"""The README.md of an exported or converted model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dyt.hf.model import MODELING_FILE, Model
from megatron_dyt.version import __version__

CODE_NOTE = f"`{MODELING_FILE}` holds the model's code; it needs torch and transformers alone."
# What a folded role's weight went into.
_BEHIND = {"attn": "q, k, v", "ffn": "gate, up", "final": "lm_head"}


def model_card(
    model: Model,
    parameters: int,
    dtype: torch.dtype,
    iteration: int,
    folded: Sequence[str],
    has_tokenizer: bool,
) -> str:
    """Markdown: what the model is, how to load it, what the export changed."""
    shape = model.shape
    facts = {
        "parameters": f"{parameters:,}",
        "layers, hidden, heads / key-value heads": f"{shape.num_layers}, {shape.hidden_size}, "
        f"{shape.num_attention_heads} / {shape.num_query_groups}",
        "vocabulary, positions": f"{shape.vocab_size}, {shape.seq_length}",
        "norm": _norm(model),
        "dtype": str(dtype).removeprefix("torch."),
        "training iteration": str(iteration),
        "exported by": f"megatron_dyt {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    made = "A base language model, trained with Megatron-Core and exported from its checkpoint."
    return card(
        "LLaMA with Dynamic Tanh" if model.dyt else "LLaMA",
        f"{made}\n\n| | |\n|---|---|\n{table}",
        _notes(model, folded, has_tokenizer),
        has_dyt=model.dyt is not None,
        has_tokenizer=has_tokenizer,
    )


def card(title: str, text: str, notes: Sequence[str], *, has_dyt: bool, has_tokenizer: bool) -> str:
    """Markdown with the settings that the Hub reads, and how to load the model."""
    tags = "tags: [dynamic-tanh]\n" if has_dyt else ""
    listed = "".join(f"\n- {note}" for note in notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{tags}---

# {title}

{text}

```python
{_usage(has_dyt, has_tokenizer)}
```
{listed}
"""


def _norm(model: Model) -> str:
    if model.dyt is None:
        return f"RMSNorm, epsilon {model.shape.norm_epsilon:g}"
    bias = " and bias" if model.dyt.bias else ""
    return f"Dynamic Tanh ({model.dyt.function}), with weight{bias}; arXiv 2503.10622"


def _usage(has_dyt: bool, has_tokenizer: bool) -> str:
    trust = ", trust_remote_code=True" if has_dyt else ""
    lines = [f'model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto"{trust})']
    names = "AutoModelForCausalLM"
    if has_tokenizer:
        names += ", AutoTokenizer"
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})")
    return "\n".join([f"from transformers import {names}", "", *lines])


def _notes(model: Model, folded: Sequence[str], has_tokenizer: bool) -> list[str]:
    notes = []
    if model.dyt is not None:
        notes.append(CODE_NOTE)
    for role in folded:
        notes.append(f"The weight of the DyT in front of {_BEHIND[role]} is folded into {_BEHIND[role]}.")
    if model.scale_is_folded(folded):
        untied = ", and the output layer is no longer shared with it" if model.shape.tie_embeddings else ""
        notes.append(f"The learned scale of the embedding is multiplied into it{untied}.")
    if not has_tokenizer:
        notes.append("There is no tokenizer here: the run had none, or it was left out.")
    return notes
