"""DyT and the residual stream in one kernel (`--dyt-fuse-residual`), forward and backward.

Megatron's layers take (output, residual) from a norm since 0.17. Two things are made of that:

- A DyTNorm returns its input as the residual. The gradient that comes back through it is then added to
  DyT's own by the kernel that computes that one (`megatron_dyt.ops.dyt_fork`), where autograd would add
  the two in another pass over memory.
- The add behind attention returns its two terms instead of their sum, as a `DeferredSum`. Everything
  between passes it on untouched (unused slots of cross-attention are identities), and the DyTNorm adds
  and normalizes in one kernel (`megatron_dyt.ops.dyt_residual`). The same for cross-attention.

The add behind the MLP is not deferred to the next layer's input norm: see docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from megatron_dyt import compat
from megatron_dyt.mcore.ranks import log_once

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

_log = logging.getLogger(__name__)

# A layer's norms, each in front of a branch whose result is added to what the norm returns beside it.
SITES = ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm")
_NO_CROSS_ATTENTION = {
    "pre_cross_attn_layernorm": "IdentityOp",
    "cross_attention": "IdentityOp",
    "cross_attn_bda": "IdentityFuncOp",
}
_LAYER_MODULE = "megatron.core.transformer.transformer_layer"
_HELP = "This layer has code of its own between attention and the next norm; pass --no-dyt-fuse-residual."


class DeferredSum:
    """x + residual, both of shape (sequence, batch, hidden) and one dtype, not added yet."""

    __slots__ = ("_terms",)

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        self._terms: tuple[Tensor, Tensor] | None = (x, residual)

    def take(self) -> tuple[Tensor, Tensor]:
        """The two terms, once: Megatron's layer holds this object while its MLP runs, and must not hold them.

        Raises:
            RuntimeError: they have been taken.
        """
        if self._terms is None:
            raise RuntimeError(f"the sum in front of a DyTNorm is used twice. {_HELP}")
        terms, self._terms = self._terms, None
        return terms

    def peek(self) -> tuple[Tensor, Tensor]:
        """The two terms, left where they are.

        Raises:
            RuntimeError: they have been taken.
        """
        terms = self.take()
        self._terms = terms
        return terms

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name!r} is asked of a residual sum that is still to be made by the DyTNorm behind it. {_HELP}"
        )


def deferred_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor | DeferredSum]:
    """Megatron's `get_bias_dropout_add` that leaves a plain add to the norm after it.

    With a bias, dropout or two dtypes there is more to do than add, and Megatron's own function does it.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add_now = get_bias_dropout_add(training, fused)

    def add(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor | DeferredSum:
        x, bias = x_with_bias
        if bias is not None or (training and probability > 0) or x.dtype != residual.dtype:
            summed: Tensor = add_now(x_with_bias, residual, probability)
            return summed
        return DeferredSum(x, residual)

    return add


def spec_changes(
    config: TransformerConfig,
    layer: type,
    parts: TransformerLayerSubmodules,
    name_of: Callable[[object], str],
) -> dict[str, object]:
    """What to change in a layer's submodules so that DyT and the residual stream are fused.

    Args:
        config: the TransformerConfig, with `config.dyt`.
        layer: the layer's class.
        parts: its submodules, norms replaced.
        name_of: gives the name of the class or function that a slot holds.
    """
    names = {slot: name_of(getattr(parts, slot)) for slot in (*SITES, *_NO_CROSS_ATTENTION, "self_attn_bda")}
    norms = [site for site in SITES if names[site] == "DyTNorm"]
    if not (config.dyt.fuse_residual and norms):
        return {}
    reasons = obstacles(config, layer)
    if reasons:
        log_once(
            _log,
            "DyT: its kernels do without the residual stream (--dyt-fuse-residual), because of "
            f"{', '.join(reasons)}. The results are the same.",
        )
        return {}
    changes = {site: _returning_residual(getattr(parts, site)) for site in norms}
    adds = _adds_in_front_of_norms(names)
    more = _more_than_add(config)
    if adds and more:
        log_once(
            _log,
            "DyT: the residual add in front of it stays Megatron's kernel (--dyt-fuse-residual), because of "
            f"{', '.join(more)}. The results are the same.",
        )
    return changes if more else changes | dict.fromkeys(adds, deferred_bias_dropout_add)


def _returning_residual(norm: ModuleSpec) -> ModuleSpec:
    """A copy of a DyTNorm's ModuleSpec that makes it return (output, residual)."""
    return dataclasses.replace(norm, params={**norm.params, "returns_residual": True})


def _adds_in_front_of_norms(names: dict[str, str]) -> list[str]:
    """The slots whose sum reaches a DyTNorm and nothing else before it, given what each slot builds."""
    adds = []
    no_cross_attention = all(names[slot] == name for slot, name in _NO_CROSS_ATTENTION.items())
    behind_attention = "pre_mlp_layernorm" if no_cross_attention else "pre_cross_attn_layernorm"
    if names[behind_attention] == "DyTNorm":
        adds.append("self_attn_bda")
    if names["pre_mlp_layernorm"] == "DyTNorm":
        adds.append("cross_attn_bda")
    return [add for add in adds if names[add] == "get_bias_dropout_add"]


def obstacles(config: TransformerConfig, layer: type) -> list[str]:
    """Why the norms of a layer cannot return a residual; empty when they can."""
    found = {
        "megatron-core before 0.17": not compat.has("sum_from_norm"),
        f"the layer class {layer.__name__}": not _is_megatrons(layer),
        "activation offloading": offloads(config),
        "--overlap-moe-expert-parallel-comm": _has(config, "overlap_moe_expert_parallel_comm"),
        "CUDA graphs of parts of a layer": uses_cuda_graphs(config) and _splits_layers(config),
        "--recompute-modules layernorm with CUDA graphs": uses_cuda_graphs(config)
        and config.recompute_granularity == "selective"
        and "layernorm" in (config.recompute_modules or ()),
    }
    return [reason for reason, applies in found.items() if applies]


def _more_than_add(config: TransformerConfig) -> list[str]:
    """Why there is more to do behind attention than to add two tensors."""
    found = {
        "--hidden-dropout": config.hidden_dropout > 0,
        "biases in linear layers (no --disable-bias-linear)": config.add_bias_linear,
        "--fp32-residual-connection": _has(config, "fp32_residual_connection"),
    }
    return [reason for reason, applies in found.items() if applies]


def offloads(config: TransformerConfig) -> bool:
    """Whether activations are moved to the host, and the residual stream's memory with them."""
    return _has(config, "fine_grained_activation_offloading") or _has(config, "cpu_offloading")


def uses_cuda_graphs(config: TransformerConfig) -> bool:
    """Whether Megatron captures layers or the iteration."""
    return getattr(config, "cuda_graph_impl", None) not in (None, "none")


def _splits_layers(config: TransformerConfig) -> bool:
    """Whether graphs end inside a layer, where only tensors can be handed on.

    No scope is the whole layer, but not for experts with Megatron's own graphs: a layer of these can be
    changed to graphs of its parts when it is built (`transition_moe_cudagraphs`). The list is called
    `cuda_graph_modules` from 0.18 on.
    """
    if getattr(config, "cuda_graph_impl", None) == "local" and _has(config, "num_moe_experts"):
        return True
    scopes = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or ()
    return any(getattr(scope, "name", scope) not in ("full", "full_iteration") for scope in scopes)


def _is_megatrons(layer: type) -> bool:
    """Whether a layer class has Megatron's own code around its norms, which takes what they return."""
    for each in layer.__mro__:
        if each.__module__ == _LAYER_MODULE:
            return True
        if any(name.startswith(("forward", "_forward")) for name in vars(each)):
            return False
    return False


def _has(config: object, name: str) -> bool:
    return bool(getattr(config, name, False))
