"""Attention along the branches of a tree, so that sequences with a common beginning share it.

Megatron's attention takes no mask that means the same in its local and in Transformer Engine's classes,
and its rotary embedding counts slots. Here the softmax attention of every layer is PyTorch's
`scaled_dot_product_attention`, which on GPUs takes a mask without ever holding the scores, and rotary
angles are those of the position ids.
"""

# Dimension letters, of names such as `query_BNSC`:
#   B  rows of a batch     S  slots of a row                      N  query heads
#   C  channels of a head  G  key and value heads (N is a multiple)

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.batches import MODES
from megatron_dyt.mcore.norm_sites import unwrap

_log = logging.getLogger(__name__)

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
    """Softmax attention, causal or by an additive mask, in the place of Megatron's `core_attention`."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_options: Any
    ) -> Tensor:
        """[S, B, N * C] from query [S, B, N, C], key and value [S, B, G, C], all of one dtype.

        The mask is [B, 1, S, S], of 0 and -inf; None is causal.
        """
        query_BNSC, key_BGSC, value_BGSC = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        per_group = query_BNSC.shape[1] // key_BGSC.shape[1]
        key_BNSC, value_BNSC = key_BGSC, value_BGSC
        if per_group > 1:
            key_BNSC, value_BNSC = (
                part.repeat_interleave(per_group, dim=1) for part in (key_BGSC, value_BGSC)
            )
        mixed_BNSC = F.scaled_dot_product_attention(
            query_BNSC,
            key_BNSC,
            value_BNSC,
            attn_mask=None if attention_mask is None else attention_mask.to(query.dtype),
            is_causal=attention_mask is None,
            scale=self.scale,
        )
        return mixed_BNSC.permute(2, 0, 1, 3).flatten(2)


def hidden_size_to_share(model: Any, mode: str) -> int | None:
    """Prepare `model` for shared contexts where `mode` and model allow it; its hidden size, else None.

    `UserError` for a mode that there is not, and for "shared" with a model that does not allow it.
    """
    if mode not in MODES:
        raise UserError(f"the mode {mode!r} was given; allowed are {', '.join(MODES)}")
    if mode == "flat":
        return None
    model = unwrap(model)
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
        # The fused kernels take one position per slot for all rows.
        attention.config.apply_rope_fusion = False
        if hasattr(attention.config, "fused_single_qkv_rope"):
            attention.config.fused_single_qkv_rope = False
        attention.core_attention = SharedAttention(attention.config.softmax_scale)
    if model.position_embedding_type == "rope":
        _turn_by_position_ids(model)


def _turn_by_position_ids(model: Any) -> None:
    """Turn queries and keys by the position ids of each forward pass, where it has a mask."""
    ids_BS: list[Tensor | None] = [None]

    def note(_model: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        _tokens_BS, positions_BS, mask_B1SS = arguments[:3]
        # In a causal batch positions are slots, as Megatron has them.
        ids_BS[0] = None if mask_B1SS is None else positions_BS

    def angles(_module: torch.nn.Module, _arguments: Any, angles_S11C: Tensor) -> Tensor:
        """[S, B, 1, C] where each row has positions of its own."""
        return angles_S11C if ids_BS[0] is None else angles_S11C[:, 0][ids_BS[0].T]

    model.register_forward_pre_hook(note)
    model.rotary_pos_emb.register_forward_hook(angles)
