"""DyT's weight and bias folded into the linear layers behind it, in a model in memory, for inference.

    linear(weight * t + bias) = W' t + b'    with    W' = W diag(weight),  b' = b + W bias,  t = f(alpha x)

DyT is then f(alpha x) alone, which is bounded by 1. The same function, up to the rounding of W' and b'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_dyt.mcore.norm import DyTNorm, dyt_sites

# By attention class: the linear layers that take what the norm in front of attention gives, and nothing else.
_ATTENTION_INPUTS = {
    "SelfAttention": ("linear_qkv",),
    "MLASelfAttention": ("linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj"),
    "GatedDeltaNet": ("in_proj",),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Folding(NamedTuple):
    """What `fold_` did: names of the DyTs that are folded, and of those that are not, with the reason."""

    folded: list[str]
    left: dict[str, str]


@torch.no_grad()
def fold_(model: nn.Module) -> Folding:
    """Fold every DyT of a Megatron model that stands in front of linear layers alone, in place.

    Norms are replicated over tensor parallel ranks and column-parallel layers hold all input channels, so
    each rank folds its own part. Left as they are: DyT on queries and keys, in front of experts (the router
    reads it too), of sparse attention (its indexer does), of cross-attention, of a tied output layer, and of
    the heads of T5 and BERT. For evaluation: layers get biases that
    the model's arguments do not know of, so neither train nor save what comes out.

    Returns:
        The names of the sites, folded or not. The model computes the same function either way.
    """
    behind = {norm: (linears, why) for norm, linears, why in _sites_of(model)}
    folding = Folding([], {})
    for name, norm in dyt_sites(model):
        linears, why = behind.get(norm, ([], "it does not stand in front of linear layers alone"))
        why = why or next((reason for linear in linears if (reason := _cannot(norm, linear))), "")
        if why:
            folding.left[name] = why
            continue
        for linear in linears:
            _fold_into(norm, linear)
        norm.weight.fill_(1)
        if norm.bias is not None:
            norm.bias.zero_()
        folding.folded.append(name)
    return folding


def _sites_of(model: nn.Module) -> Iterator[tuple[DyTNorm, list[Any], str]]:
    """(norm, linear layers behind it, why it cannot be folded, if so) of every norm looked at."""
    module: Any
    for module in model.modules():
        norms = [getattr(module, name, None) for name in ("input_layernorm", "pre_mlp_layernorm")]
        if isinstance(norms[0], DyTNorm):
            yield (norms[0], *_behind_input_norm(module.self_attention))
        if isinstance(norms[1], DyTNorm):
            yield (norms[1], *_behind_mlp_norm(module.mlp))
        output = getattr(module, "output_layer", None)
        if output is not None:
            # Only where the final norm is right in front of it: T5's and BERT's output layers have heads of
            # their own, and no attribute of this name beside them.
            decoder = getattr(module, "decoder", None)
            final = getattr(decoder, "final_layernorm", None) or getattr(decoder, "final_norm", None)
            if isinstance(final, DyTNorm):
                yield (final, *_behind_final_norm(module, output))


def _behind_input_norm(attention: Any) -> tuple[list[Any], str]:
    name = type(attention).__name__
    if getattr(getattr(attention, "core_attention", None), "requires_dsa_inputs", False):
        return [], "the indexer of sparse attention reads it too"
    found = [getattr(attention, slot, None) for slot in _ATTENTION_INPUTS.get(name, ())]
    linears = [linear for linear in found if linear is not None]
    return linears, "" if linears else f"attention of type {name} is not known"


def _behind_mlp_norm(mlp: Any) -> tuple[list[Any], str]:
    if type(mlp).__name__ == "MLP":
        return [mlp.linear_fc1], ""
    return [], f"{type(mlp).__name__} reads it in several places"


def _behind_final_norm(model: Any, output: Any) -> tuple[list[Any], str]:
    if getattr(model, "share_embeddings_and_output_weights", False):
        return [], "the output layer is tied to the embedding"
    if getattr(model, "mtp_process", False) or getattr(model, "mtp", None) is not None:
        return [], "multi-token prediction uses the output layer too"
    return [output], ""


def _cannot(norm: DyTNorm, linear: Any) -> str:
    """Why this norm cannot go into this layer, or an empty string."""
    weight = getattr(linear, "weight", None)
    if not (isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype in _DTYPES):
        return f"{type(linear).__name__} has no plain weight"
    if weight.shape[-1] != norm.hidden_size:
        return f"{type(linear).__name__} has a part of the input channels"
    if norm.bias is None or not norm.bias.any():
        return ""
    if not _has_bias(linear) and type(linear).__name__ != "ColumnParallelLinear":
        return f"{type(linear).__name__} has no bias to take DyT's"
    return ""


def _has_bias(linear: Any) -> bool:
    bias = getattr(linear, "bias", None)
    return isinstance(bias, Tensor) and bias.numel() > 0


def _fold_into(norm: DyTNorm, linear: Any) -> None:
    weight = linear.weight.float()
    if norm.bias is not None and norm.bias.any():
        bias = weight @ norm.bias.float()
        if _has_bias(linear):
            linear.bias.add_(bias)
        else:
            linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    linear.weight.copy_(weight * norm.weight.float())
