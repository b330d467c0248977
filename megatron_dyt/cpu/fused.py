"""Megatron's functions in fewer passes over memory: the same values and gradients, but for rounding.

Without Transformer Engine Megatron runs each step of a layer as an operation of its own, each of which reads
and writes all of its tensors. Each function makes a replacement from the original, which still runs wherever
what is asked for is more than the replacement computes: see `cpu.replacements`.
"""

# Dimension letters: S  tokens of a sequence   B  sequences   H  heads   G  groups of heads that share keys
#                    D  channels of a head    V  vocabulary

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_dyt.cpu import kernels
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.transformer.dot_product_attention import DotProductAttention


@wrapper
def without_scores(
    forward: Callable[..., Tensor],
    self: DotProductAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`DotProductAttention.forward` that never holds the scores of all pairs of tokens.

    The kernel, and `scaled_dot_product_attention` where there is none, also skip what the causal mask hides
    and read the keys that heads share where they are.
    """
    if attention_mask is not None or not _is_plain(self, query, key, value, *args, **kwargs):
        return forward(self, query, key, value, attention_mask, *args, **kwargs)
    is_causal = _is_causal(self) and query.size(0) > 1
    # With --apply-query-key-layer-scaling the softmax multiplies by what the scores were divided by.
    scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
    if kernels.HAS_ATTENTION and kernels.fits(query, key, value):
        mixed: Tensor = kernels.Attention.apply(query, key, value, is_causal, scale)
        return mixed.flatten(2)
    q_BHSD, k_BGSD, v_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    is_grouped = query.size(2) != key.size(2)
    mixed_BHSD = F.scaled_dot_product_attention(
        q_BHSD, k_BGSD, v_BGSD, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )
    return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)


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


def in_one_pass(original: Any) -> Any:
    """The autograd function of cross-entropy for logits [S, B, V], whose whole vocabulary is on this rank."""

    def apply(logits: Tensor, target: Tensor, *smoothing_and_group: Any) -> Tensor:
        smoothing, group = (*smoothing_and_group, None)[:2]  # Megatron 0.19 gives the group.
        whole = logits.float()
        indices_fit = target.dtype == torch.int64 and target.shape == logits.shape[:-1]
        if smoothing or _size(group) > 1 or not (indices_fit and kernels.fits(whole)):
            return original.apply(logits, target, *smoothing_and_group)
        return kernels.CrossEntropy.apply(whole, target)

    return types.SimpleNamespace(apply=apply)


def _size(group: Any) -> int:
    """Ranks of the tensor parallel group, the one of this process where None is given."""
    from megatron.core import parallel_state

    return (group or parallel_state.get_tensor_model_parallel_group()).size()


@wrapper
def swiglu(original: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Megatron's function inside of its own autograd functions."""
    needs_graph = torch.is_grad_enabled() and y.requires_grad
    return original(y) if needs_graph or not kernels.fits(y) else kernels.swiglu(y)


@wrapper
def swiglu_back(original: Callable[[Tensor, Tensor], Tensor], g: Tensor, y: Tensor) -> Tensor:
    return (
        original(g, y) if torch.is_grad_enabled() or not kernels.fits(g, y) else kernels.swiglu_backward(g, y)
    )


@wrapper
def rotated_at_once(
    original: Callable[..., Tensor], t: Tensor, freqs: Tensor, *args: Any, mscale: float = 1.0, **kwargs: Any
) -> Tensor:
    """`_apply_rotary_pos_emb_bshd`: the first channels of t [S, B, H, D] by angles freqs [S, 1, 1, ...]."""
    is_interleaved = any(args) or any(kwargs.values())
    shapes_fit = t.dim() == freqs.dim() == 4 and freqs.shape[:3] == (t.size(0), 1, 1)
    if is_interleaved or not shapes_fit or freqs.requires_grad or not kernels.fits(t, freqs):
        return original(t, freqs, *args, mscale=mscale, **kwargs)
    return kernels.Rotary.apply(t, torch.cos(freqs) * mscale, torch.sin(freqs) * mscale)


@wrapper
def rms_norm(original: Callable[..., Tensor], self: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    """`torch.nn.RMSNorm.forward`, of which PyTorch's own has no backward pass of its own on a CPU."""
    if self.weight is None or x.shape[-1:] != self.weight.shape or not kernels.fits(x, self.weight):
        return original(self, x)
    eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
    return kernels.RMSNorm.apply(x, self.weight, float(eps))
