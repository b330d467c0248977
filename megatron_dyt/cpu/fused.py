"""Megatron's functions in fewer passes over memory: the same values and gradients, but for rounding.

Without Transformer Engine Megatron runs each step of a layer as an operation of its own, each of which reads
and writes all of its tensors. Each function makes a replacement from the original, which still runs wherever
what is asked for is more than the replacement computes: see `cpu.replacements`.
"""

# Dimension letters: S  tokens of a sequence   B  sequences   H  heads   G  groups of heads that share keys
#                    D  channels of a head

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from megatron.core.transformer.dot_product_attention import DotProductAttention


def without_scores(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`DotProductAttention.forward` that never holds the scores of all pairs of tokens.

    `scaled_dot_product_attention` also skips what the causal mask hides, and reads the keys that heads
    share where they are.
    """

    @functools.wraps(forward)
    def attend(
        self: DotProductAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or not _is_plain(self, query, key, value, *args, **kwargs):
            return forward(self, query, key, value, attention_mask, *args, **kwargs)
        q_BHSD, k_BGSD, v_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed_BHSD = F.scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            is_causal=_is_causal(self) and query.size(0) > 1,
            # With --apply-query-key-layer-scaling the softmax multiplies by what the scores were divided by.
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1),
            enable_gqa=query.size(2) != key.size(2),
        )
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)

    return attend


def _is_causal(attention: DotProductAttention) -> bool:
    from megatron.core.transformer.enums import AttnMaskType

    return attention.attn_mask_type == AttnMaskType.causal


def _is_plain(
    attention: DotProductAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask_type: object = None,  # Megatron does not use it either.
    attention_bias: Tensor | None = None,
    packed_seq_params: object = None,
) -> bool:
    """Whether softmax(QK) V is all, with the mask of the layer's own type: no dropout, window or sink."""
    dropout = attention.attention_dropout
    return (
        attention_bias is None
        and packed_seq_params is None
        and not (dropout.training and dropout.p > 0)
        and attention.softmax_offset is None
        and attention.scale_mask_softmax.window_size is None
        # Latent attention's values are narrower; keys of earlier calls make the keys more.
        and query.size(-1) == key.size(-1) == value.size(-1)
        and (query.size(0) == key.size(0) or not _is_causal(attention))
    )
