"""Attention along the branches of a tree, so that sequences with a common beginning share it.

Megatron's attention takes no mask that means the same in its local and in Transformer Engine's classes,
and its rotary embedding counts slots. Here the softmax attention of every layer is PyTorch's
`scaled_dot_product_attention`, which on GPUs takes a mask without ever holding the scores, and rotary
angles are those of the position ids.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)

# How requests are computed: "shared" where they begin alike, "flat" each alone, "auto" shared if possible.
MODES = ("auto", "shared", "flat")
# Softmax attention without anything else in it; others keep their own and are not shared.
_PLAIN = ("DotProductAttention", "TEDotProductAttention", "SharedAttention")
_POSITIONS = ("rope", "learned_absolute", "none")
# Settings under which one token depends on others than through plain softmax attention.
_OTHER_ATTENTION = {
    "multi_latent_attention": "multi-latent attention",
    "experimental_attention_variant": "an experimental attention",
    "window_size": "sliding-window attention",
    "mtp_num_layers": "multi-token prediction",
}


class SharedAttention(torch.nn.Module):
    """Softmax attention over [tokens, batch, heads, channels], causal or by an additive mask."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_options: Any
    ) -> Tensor:
        """[tokens, batch, heads * channels]; the mask is [batch, 1, tokens, tokens], None is causal."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else attention_mask.to(query.dtype),
            is_causal=attention_mask is None,
            scale=self.scale,
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


def gpt_of(model: Any) -> Any:
    """The GPT model in what Megatron wraps around it, such as the module that casts for bf16."""
    while hasattr(model, "module"):
        model = model.module
    return model


def hidden_size_to_share(model: Any, mode: str) -> int | None:
    """Prepare `model` for shared contexts where `mode` and model allow it; its hidden size, else None.

    `UserError` for a mode that there is not, and for "shared" with a model that does not allow it.
    """
    if mode not in MODES:
        raise UserError(f"the mode {mode!r} was given; allowed are {', '.join(MODES)}")
    if mode == "flat":
        return None
    model = gpt_of(model)
    reason = why_not_shared(model)
    if reason and mode == "shared":
        raise UserError(f"contexts cannot be shared: {reason}. Use the mode flat, or auto")
    if reason:
        _log.info(f"contexts are not shared: {reason}")
        return None
    share_contexts(model)
    return int(model.config.hidden_size)


def why_not_shared(model: Any) -> str | None:
    """What in `model`, a GPTModel, keeps contexts from being shared; None when they can be."""
    config, kind = model.config, model.position_embedding_type
    for name, what in _OTHER_ATTENTION.items():
        if getattr(config, name, None):
            return f"the model has {what}"
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        return f"the model's softmax is {config.softmax_type}"
    if kind not in _POSITIONS:
        return f"the model's position embedding is {kind}"
    for layer in model.decoder.layers:
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if type(core).__name__ not in _PLAIN:
            return f"a layer's attention is {type(core).__name__}"
    return None


def share_contexts(model: Any) -> None:
    """Let `model` (one that `why_not_shared` has nothing against) attend by mask and position ids.

    Its forward pass then takes, in place of Megatron's mask, None for causal attention or an additive
    mask, and turns queries and keys by the position ids it is given. A second call changes nothing.
    """
    if isinstance(model.decoder.layers[0].self_attention.core_attention, SharedAttention):
        return
    for layer in model.decoder.layers:
        attention = layer.self_attention
        # The fused kernels take one position a slot for all rows.
        attention.config.apply_rope_fusion = False
        if hasattr(attention.config, "fused_single_qkv_rope"):
            attention.config.fused_single_qkv_rope = False
        attention.core_attention = SharedAttention(attention.config.softmax_scale)
    if model.position_embedding_type == "rope":
        _turn_by_position_ids(model)


def _turn_by_position_ids(model: Any) -> None:
    ids: list[Tensor | None] = [None]

    def note(_model: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        _tokens, positions, mask = arguments[:3]
        # In a causal batch positions are slots, as Megatron has them.
        ids[0] = None if mask is None else positions

    def angles(_module: torch.nn.Module, _arguments: Any, by_slot: Tensor) -> Tensor:
        """[tokens, batch, 1, channels] from Megatron's [tokens, 1, 1, channels]."""
        return by_slot if ids[0] is None else by_slot[:, 0][ids[0].T]

    model.register_forward_pre_hook(note)
    model.rotary_pos_emb.register_forward_hook(angles)
