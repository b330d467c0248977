"""Hybrid stacks (Mamba, Gated DeltaNet, attention, MLP, MoE layers by a pattern) with DyT.

The class is `HybridStack` from Megatron 0.18, `MambaStack` before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron_dyt.mcore import safety_net
from megatron_dyt.mcore.spec import dyt_spec, is_norm, refuse_leftovers, rewrite_layer, unfuse

# The norm in front of a Mamba mixer, saved under the key that TE's fused norm-linear has for it.
MAMBA_KEYS_MAP = {"norm.": "mixer.in_proj.layer_norm_"}
# Built from its own seam (`spec.wrap_mtp_block_submodules`), not by the stack.
BUILT_ELSEWHERE = ("mtp_block_spec",)


def wrap_stack_init(original: Callable[..., None]) -> Callable[..., None]:
    """`HybridStack.__init__` that builds from a rewritten spec when the config's norm is DyT."""

    @functools.wraps(original)
    def __init__(self: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        dyt = config.normalization == "DyT"
        original(self, config, rewrite_stack(config, submodules) if dyt else submodules, *args, **kwargs)
        if dyt:
            safety_net.check_built(self, "decoder")

    return __init__


def rewrite_stack(config: Any, submodules: Any) -> Any:
    """A copy of a `HybridStackSubmodules` (`MambaStackSubmodules`) in which every norm is DyT.

    Raises:
        UserError: a layer or a norm that this version cannot turn into DyT.
    """
    changes = {
        field.name: rewrite_stack_layer(config, getattr(submodules, field.name))
        for field in dataclasses.fields(submodules)
        if field.name not in BUILT_ELSEWHERE
    }
    rewritten = dataclasses.replace(submodules, **changes)
    for name, layer in changes.items():
        refuse_leftovers(layer, f"decoder.{name}")
    return rewritten


def rewrite_stack_layer(config: Any, layer: Any) -> Any:
    """A copy of the spec of one kind of layer; a kind that the stack lacks is a bare class and stays."""
    if isinstance(layer, type):
        return layer
    if hasattr(layer.submodules, "mixer"):
        return rewrite_mamba_layer(layer)
    return rewrite_layer(config, layer)


def rewrite_mamba_layer(layer: Any) -> Any:
    """A copy of a Mamba layer's ModuleSpec with DyT in front of the mixer, in the role of attention's."""
    parts = layer.submodules
    mixer, fused = unfuse(parts.mixer, "in_proj")
    changes: dict[str, Any] = {"mixer": mixer}
    if fused or is_norm(parts.norm):
        changes["norm"] = dyt_spec("attn")
        changes["sharded_state_dict_keys_map"] = {**parts.sharded_state_dict_keys_map, **MAMBA_KEYS_MAP}
    return dataclasses.replace(layer, submodules=dataclasses.replace(parts, **changes))
