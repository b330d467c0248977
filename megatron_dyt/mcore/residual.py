"""Residual add and DyT in one kernel, in front of the MLP (`--dyt-fuse-residual`).

A transformer layer adds attention's output to the residual stream and hands the sum to the norm in
front of the MLP. Here the add returns the two terms instead, as a `DeferredSum`. Everything between
passes it on untouched (the slots of cross-attention are identities), and DyTNorm adds and normalizes in
one kernel (`megatron_dyt.ops.dyt_residual`), and returns (output, sum): Megatron's layers take the sum
as the residual since 0.17.

The next layer's input norm is not fused: between layers lie pipeline sends and checkpoint boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_dyt.mcore import compat, kept

# What a slot must build for the sum to reach the norm untouched.
_PASSED_ON = {
    "self_attn_bda": "get_bias_dropout_add",
    "pre_cross_attn_layernorm": "IdentityOp",
    "cross_attention": "IdentityOp",
    "cross_attn_bda": "IdentityFuncOp",
    "pre_mlp_layernorm": "DyTNorm",
}


class DeferredSum:
    """x + residual, both of shape (sequence, batch, hidden), not added yet."""

    __slots__ = ("residual", "x")

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        self.x = x
        self.residual = residual


def deferred_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor | DeferredSum]:
    """Megatron's `get_bias_dropout_add` that leaves a plain add to the norm after it.

    With a bias or dropout there is more to do than add, and Megatron's own function does it.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add_now = get_bias_dropout_add(training, fused)

    def add(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor | DeferredSum:
        x, bias = x_with_bias
        if bias is not None or (training and probability > 0):
            summed: Tensor = add_now(x_with_bias, residual, probability)
            return summed
        return DeferredSum(x, residual)

    return add


def spec_changes(config: Any, parts: Any, name_of: Callable[[Any], str]) -> dict[str, Any]:
    """What to change in a layer's submodules so that the add in front of the MLP's norm is fused.

    Args:
        config: the TransformerConfig, with `config.dyt`.
        parts: the layer's submodules, norms replaced.
        name_of: gives the name of the class or function that a slot holds.
    """
    if not config.dyt.fuse_residual or any(name_of(getattr(parts, f)) != n for f, n in _PASSED_ON.items()):
        return {}
    reasons = obstacles(config)
    if reasons:
        kept.say_once(
            "DyT: residual add and DyT stay two steps (--dyt-fuse-residual), because of "
            f"{', '.join(reasons)}. The results are the same."
        )
        return {}
    return {"self_attn_bda": deferred_bias_dropout_add}


def obstacles(config: Any) -> list[str]:
    """Why residual add and DyT cannot be one in a model with this config; empty when they can."""

    def has(name: str) -> bool:
        return bool(getattr(config, name, False))

    graphs = getattr(config, "cuda_graph_impl", "none") not in (None, "none")
    recomputes_norms = config.recompute_granularity == "selective" and "layernorm" in (
        config.recompute_modules or ()
    )
    found = {
        "megatron-core before 0.17": not compat.has("sum_from_norm"),
        "--hidden-dropout": config.hidden_dropout > 0,
        "biases in linear layers (no --disable-bias-linear)": config.add_bias_linear,
        "--fp32-residual-connection": has("fp32_residual_connection"),
        "--recompute-modules layernorm": recomputes_norms,
        "activation offloading": has("fine_grained_activation_offloading") or has("cpu_offloading"),
        "--overlap-moe-expert-parallel-comm": has("overlap_moe_expert_parallel_comm"),
        "CUDA graphs": graphs or has("enable_cuda_graph") or has("external_cuda_graph"),
    }
    return [reason for reason, applies in found.items() if applies]
