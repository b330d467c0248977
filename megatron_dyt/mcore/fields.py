"""The plugin's settings as dataclass fields, for configs that are written in Python and not parsed.

Megatron's command line keeps the settings in its args. A config that is built, copied by
`dataclasses.replace`, or saved as YAML in code (Megatron Bridge) keeps fields alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class DyTFields:
    """Mix-in for a dataclass derived from Megatron's `TransformerConfig`; list it first among the bases.

        @dataclass
        class DyTTransformerConfig(DyTFields, TransformerConfig): ...

    Each field is the flag of the same name, as given: None takes the preset's value, which is looked up
    again whenever `__post_init__` runs, so that a changed `hidden_size` changes alpha. With another
    `normalization` only `embedding_scale` may be set. What cannot work raises UserError in `__post_init__`.

    The preset `unit` also sets `init_method_std` (and `embedding_init_method_std`, unless given), if it is
    still Megatron's default.
    """

    dyt_preset: str | None = None
    dyt_alpha_init_attn: float | None = None
    dyt_alpha_init_ffn: float | None = None
    dyt_alpha_init_final: float | None = None
    dyt_alpha_init_qk: float | None = None
    dyt_bias: bool | None = None
    dyt_embedding_scale: str | float | None = None
    dyt_function: str | None = None
    dyt_weight_init: str | None = None
    dyt_backend: str | None = None
    dyt_fuse_residual: bool | None = None
    embedding_scale: str | float | None = None


def default_init_std(config: Any) -> float:
    """The default of `init_method_std` in the config's class."""
    return float(type(config).__dataclass_fields__["init_method_std"].default)
