"""Rewrite of a Megatron layer spec: every LayerNorm/RMSNorm slot becomes DyT.

A spec is Megatron's tree of what to build. It is copied, never mutated: Megatron shares spec objects
between models. The field that holds a norm gives its role. Transformer Engine's fused norm-linear
becomes DyT in front of the plain column-parallel linear.

Each kind of layer rewrites its own submodules when it is built, so that DyT is in a layer on its own, in a
block, and in a model class that Megatron does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_dyt.config import Role, is_dyt
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import residual
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import (
    KeptRMSNorm,
    check_built,
    class_name,
    dyt_spec,
    is_norm,
    kept_in_slot,
)
from megatron_dyt.mcore.ranks import log_once
from megatron_dyt.patching import bound, wrapper

if TYPE_CHECKING:
    from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
    from torch import nn

_log = logging.getLogger(__name__)

# What a slot holds: a ModuleSpec, or a partial of the class (the MLP from 0.18 on, MoE).
type Spec = ModuleSpec | functools.partial[Any]

LAYER_ROLES: dict[str, Role] = {
    "input_layernorm": "attn",
    "pre_cross_attn_layernorm": "attn",
    "pre_mlp_layernorm": "ffn",
}
QK_NORMS = ("q_layernorm", "k_layernorm")
# Multi-latent attention has its norms on the latents, in front of the up-projections: TE fuses the two.
LATENT_NORMS = {"q_layernorm": "linear_q_up_proj", "kv_layernorm": "linear_kv_up_proj"}
# enorm and hnorm feed a linear layer, not attention: the paper's "elsewhere", as in front of the MLP.
MTP_ROLES: dict[str, Role] = {"enorm": "ffn", "hnorm": "ffn", "layer_norm": "final"}
# The layer in a prediction layer, which rewrites itself: up to 0.16 the first name, from 0.17 the second.
MTP_LAYERS = ("transformer_layer", "mtp_model_layer")

# Transformer Engine's norm and linear layer in one, matched by name: TE may not be installed.
FUSED_LINEAR = "TELayerNormColumnParallelLinear"

# `TELinear` hands TE what is for the forward pass alone (megatron/core/extensions/transformer_engine.py).
LOST_OVERLAP = (
    "DyT: --tp-comm-overlap overlaps less: the linear layers behind DyT are Transformer Engine's plain ones, "
    "for which Megatron asks for the overlap of the forward pass and not of the backward pass "
    "(tp_comm_bulk_dgrad, tp_comm_bulk_wgrad and tp_comm_overlap_rs_dgrad reach layers with a fused norm "
    "only). The results are the same."
)

# Same checkpoint keys as the local and the TE spec have for their norms, so that a checkpoint moves
# between them: alpha is saved as `...linear_qkv.layer_norm_alpha`.
KEYS_MAP = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
DELTA_NET_KEYS_MAP = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
MAMBA_KEYS_MAP = {"norm.": "mixer.in_proj.layer_norm_"}


@wrapper
def wrap_block_submodules(
    original: Callable[..., TransformerBlockSubmodules],
    config: TransformerConfig,
    *args: object,
    **kwargs: object,
) -> TransformerBlockSubmodules:
    """`transformer_block._get_block_submodules` with DyT as the final norm when the config's norm is DyT."""
    block = original(config, *args, **kwargs)
    return rewrite_block(block) if is_dyt(config) else block


def rewrite_block(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """A copy of a `TransformerBlockSubmodules` in which the final norm is DyT; its layers see to themselves.

    Raises:
        UserError: a final norm that this version does not know.
    """
    if is_norm(block.layer_norm):
        return dataclasses.replace(block, layer_norm=dyt_spec("final"))
    refuse_leftovers(block.layer_norm, "decoder.layer_norm")
    return block


def rewrite_layer(
    config: TransformerConfig, parts: TransformerLayerSubmodules, layer: type
) -> TransformerLayerSubmodules:
    """A copy of a transformer layer's submodules in which every norm is DyT; `layer` is the layer's class."""
    changes: dict[str, object] = {
        field: dyt_spec(role) for field, role in LAYER_ROLES.items() if is_norm(getattr(parts, field))
    }
    attention, fused = rewrite_attention(config, parts.self_attention)
    changes["self_attention"] = attention
    if fused:
        changes["input_layernorm"] = dyt_spec("attn")
    mlp, fused = unfuse(parts.mlp, "linear_fc1")
    changes["mlp"] = mlp
    if fused:
        changes["pre_mlp_layernorm"] = dyt_spec("ffn")
    keys_map = KEYS_MAP | (DELTA_NET_KEYS_MAP if is_delta_net(submodules_of(attention)) else {})
    keys = {k: v for k, v in keys_map.items() if k.rstrip(".") in changes}
    if is_latent(submodules_of(attention)):
        # Both specs of multi-latent attention have this norm apart, under its own name.
        keys.pop("input_layernorm.", None)
    changes["sharded_state_dict_keys_map"] = {**parts.sharded_state_dict_keys_map, **keys}
    parts = dataclasses.replace(parts, **changes)
    return dataclasses.replace(parts, **residual.spec_changes(config, layer, parts, class_name))


def rewrite_mamba_layer(
    _config: TransformerConfig, parts: MambaLayerSubmodules, _layer: type
) -> MambaLayerSubmodules:
    """A copy of a Mamba layer's submodules with DyT in front of the mixer, in the role of attention's."""
    mixer, fused = unfuse(parts.mixer, "in_proj")
    changes: dict[str, object] = {"mixer": mixer}
    if fused or is_norm(parts.norm):
        changes["norm"] = dyt_spec("attn")
        changes["sharded_state_dict_keys_map"] = {**parts.sharded_state_dict_keys_map, **MAMBA_KEYS_MAP}
    return dataclasses.replace(parts, **changes)


def rewrite_mtp_layer(
    _config: TransformerConfig, parts: MultiTokenPredictionLayerSubmodules, _layer: type
) -> MultiTokenPredictionLayerSubmodules:
    """A copy of a prediction layer's submodules with DyT for its own norms; the inner layer has its turn."""
    changes = {field: dyt_spec(role) for field, role in MTP_ROLES.items() if is_norm(getattr(parts, field))}
    return dataclasses.replace(parts, **changes)


def _rewriting[Parts](rewrite: Callable[[TransformerConfig, Parts, type], Parts]) -> Callable[..., Any]:
    """Of a kind of layer: its `__init__` with the submodules rewritten when the config's norm is DyT."""

    @wrapper
    def __init__(original: Callable[..., None], self: nn.Module, *args: object, **kwargs: object) -> None:
        given = bound(original, self, *args, **kwargs)
        config, parts = given.arguments["config"], given.arguments["submodules"]
        if not is_dyt(config):
            original(self, *args, **kwargs)
            return
        name = type(self).__name__
        given.arguments["submodules"] = rewritten = rewrite(config, parts, type(self))
        refuse_leftovers(rewritten, name)
        if config.tp_comm_overlap and _has_fused_linear(parts):
            log_once(_log, LOST_OVERLAP)
        original(*given.args, **given.kwargs)
        check_built(self, name)

    return __init__


# `TransformerLayer.__init__`, `MambaLayer.__init__` and `MultiTokenPredictionLayer.__init__`.
wrap_layer_init = _rewriting(rewrite_layer)
wrap_mamba_layer_init = _rewriting(rewrite_mamba_layer)
wrap_mtp_layer_init = _rewriting(rewrite_mtp_layer)


def rewrite_attention(config: TransformerConfig, attention: Spec) -> tuple[Spec, bool]:
    """(copy of an attention spec with DyT on q and k where asked, whether qkv had a fused norm)."""
    if is_latent(submodules_of(attention)):
        return rewrite_latent_attention(config, attention), False
    if is_delta_net(submodules_of(attention)):
        return rewrite_delta_net(attention)
    attention, fused = unfuse(attention, "linear_qkv")
    parts = submodules_of(attention)
    changes = {
        field: dyt_spec("qk")
        for field in QK_NORMS
        if hasattr(parts, field)
        and (is_norm(getattr(parts, field)) or _unfilled_qk(config, getattr(parts, field)))
    }
    if changes:
        attention = with_submodules(attention, dataclasses.replace(parts, **changes))
    return attention, fused


def rewrite_latent_attention(config: TransformerConfig, attention: Spec) -> Spec:
    """A copy of a multi-latent attention spec with DyT on the latents that have a norm.

    All tensor parallel ranks have whole latents. Without sequence parallelism so is the gradient of a
    norm on them, yet with `qk_layernorm` Megatron sums that of anything called "q_layernorm" over the
    ranks, as in ordinary attention, where a rank has its heads only.
    """
    for norm, linear in LATENT_NORMS.items():
        attention, fused = unfuse(attention, linear)
        parts = submodules_of(attention)
        if fused or is_norm(getattr(parts, norm)):
            whole = norm == "q_layernorm" and not config.sequence_parallel
            dyt = dyt_spec("qk", averaged=True) if whole else dyt_spec("qk")
            attention = with_submodules(attention, dataclasses.replace(parts, **{norm: dyt}))
    return attention


def is_latent(attention_parts: object) -> bool:
    """Whether these are the submodules of multi-latent attention."""
    return hasattr(attention_parts, "linear_kv_up_proj")


def rewrite_delta_net(attention: Spec) -> tuple[Spec, bool]:
    """(copy of a Gated DeltaNet spec, whether its first linear had a fused norm); its output norm stays."""
    attention, fused = unfuse(attention, "in_proj")
    parts = submodules_of(attention)
    if is_norm(parts.out_norm):
        from megatron.core.transformer.spec_utils import ModuleSpec

        stays = ModuleSpec(module=KeptRMSNorm, params={"norm": parts.out_norm})
        attention = with_submodules(attention, dataclasses.replace(parts, out_norm=stays))
    return attention, fused


def is_delta_net(attention_parts: object) -> bool:
    """Whether these are the submodules of Gated DeltaNet."""
    return hasattr(attention_parts, "out_norm")


def _unfilled_qk(config: TransformerConfig, value: object) -> bool:
    # Since 0.18 an empty slot with --qk-layernorm falls back to TENorm inside SelfAttention.
    return value is None and config.qk_layernorm


def unfuse(spec: Spec, field: str) -> tuple[Spec, bool]:
    """(copy of `spec` whose fused norm-linear in `field` is a plain linear, whether there was one)."""
    parts = submodules_of(spec)
    if class_name(getattr(parts, field, None)) != FUSED_LINEAR:
        return spec, False
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    parts = dataclasses.replace(parts, **{field: TEColumnParallelLinear})
    return with_submodules(spec, parts), True


def _has_fused_linear(parts: object) -> bool:
    return any(class_name(value) == FUSED_LINEAR for *_, value in _walk(parts, ""))


def submodules_of(spec: object) -> Any:
    """What a ModuleSpec or a `functools.partial` (MLP from 0.18, MoE) is built from, or None."""
    if isinstance(spec, functools.partial):
        return spec.keywords.get("submodules")
    return getattr(spec, "submodules", None)


def with_submodules(spec: Spec, parts: object) -> Spec:
    """A copy of a ModuleSpec or partial with other submodules."""
    if isinstance(spec, functools.partial):
        return functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": parts})
    return dataclasses.replace(spec, submodules=parts)


def refuse_leftovers(spec: object, part: str) -> None:
    """Raises UserError when a norm or fused norm-linear is left in a slot that we do not know.

    Args:
        spec: the submodules of a layer, rewritten, or one slot.
        part: what they are of, for the message.
    """
    for path, slot, value in _walk(spec, part):
        name = class_name(value)
        stock = "norm" in name.lower() and name != DyTNorm.__name__
        if stock and kept_in_slot(*slot) is None:
            raise UserError(
                f"--normalization DyT cannot replace {name} at {path}: this place of a norm is not "
                "known (docs/families.md lists those that are). Use another --normalization for this model."
            )


def _walk(
    node: object, path: str, slot: tuple[str, str] = ("", "")
) -> Iterator[tuple[str, tuple[str, str], object]]:
    """(path, (dataclass, field) that holds it, value) of everything in a layer's spec but an inner layer."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _walk(item, f"{path}.{index}", slot)
        return
    yield path, slot, node
    parts = submodules_of(node) if not dataclasses.is_dataclass(node) else node
    if hasattr(node, "submodules"):
        parts = node.submodules
    if dataclasses.is_dataclass(parts) and not isinstance(parts, type):
        for field in dataclasses.fields(parts):
            if field.name in MTP_LAYERS:
                continue
            holder = type(parts).__name__, field.name
            yield from _walk(getattr(parts, field.name), f"{path}.{field.name}", holder)
