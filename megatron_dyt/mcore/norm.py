"""DyTNorm: DyT with Megatron's norm-builder signature and parallelism attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

import torch
from torch import nn

from megatron_dyt.config import Role, check_choice
from megatron_dyt.mcore.residual import DeferredSum, offloads, uses_cuda_graphs
from megatron_dyt.nn import DynamicTanh

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class DyTNorm(DynamicTanh):
    """DynamicTanh as Megatron builds a norm: `DyTNorm(config=..., hidden_size=..., eps=..., role=...)`.

    Parameters are replicated over tensor parallel ranks. Under sequence parallelism each rank sees
    only its part of the sequence, so its gradient is partial: the attribute `sequence_parallel` on a
    parameter makes Megatron sum the gradient over the tensor parallel group
    (`megatron/core/distributed/finalize_model_grads.py`). Without sequence parallelism every rank has
    the whole gradient already and the attribute is False.

    Where Megatron would sum a whole gradient nevertheless, `averaged` makes it average: the average of
    equal gradients is the gradient.

    The class name contains "Norm" because Megatron-FSDP finds replicated modules by that.

    Attributes:
        role: "attn", "ffn", "final" or "qk".
        returns_residual: whether `forward` returns (output, residual).
        refills: whether an output that is recomputed is freed and filled by `mcore/recompute.py`, and not
            by Megatron, which has its own ways with CUDA graphs and offloaded activations.
        output_dtype: the parameters' with `fp32_residual_connection`, where the input is fp32 and the
            layer behind takes what Transformer Engine's norms return; else None, the input's.
        probe: called with (module, input) at each forward while a monitor is looking, else None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float | None = None,
        *,
        role: Role,
        averaged: bool = False,
        returns_residual: bool = False,
    ) -> None:
        """Args:
        config: Megatron's config; `config.dyt` (a DyTConfig) gives alpha, bias and function.
        hidden_size: length of the last dimension (the head's size for role "qk").
        eps: accepted for the builder's signature; DyT divides by nothing.
        role: where the norm stands.
        averaged: average the gradients over the tensor parallel group; see `mark_averaged`.
        returns_residual: return (output, residual), for layers that take both.
        """
        check_choice("role", role, get_args(Role))
        dyt = config.dyt
        super().__init__(
            hidden_size,
            alpha_init=dyt.alpha(role),
            weight_init=dyt.initial_weight(role),
            bias=dyt.bias,
            function=dyt.function,
            backend=dyt.backend,
            dtype=config.params_dtype,
        )
        self.role: Role = role
        self.returns_residual = returns_residual
        self.refills = not (offloads(config) or uses_cuda_graphs(config))
        self.output_dtype = config.params_dtype if config.fp32_residual_connection else None
        self.probe: Callable[[DyTNorm, torch.Tensor], None] | None = None
        mark_sequence_parallel(self, config.sequence_parallel)
        if averaged:
            mark_averaged(self)

    def forward(self, x: torch.Tensor | DeferredSum) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """x: (..., hidden_size) in fp32, bf16 or fp16; returns the same shape, and x's dtype or
        `output_dtype`.

        With `returns_residual`, and for a sum that is still to be made: (output, x or the sum), whose
        gradients backward adds in one kernel.
        """
        gives_both = self.returns_residual
        if isinstance(x, DeferredSum):
            y, x = self.forward_residual(*x.take())
            gives_both = True
        elif gives_both:
            y, x = self.forward_fork(x)
        else:
            y = super().forward(x)
        if self.probe is not None:
            self.probe(self, x)
        if self.output_dtype is not None:
            y = y.to(self.output_dtype)
        return (y, x) if gives_both else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, role={self.role}"


def mark_sequence_parallel(module: nn.Module, sequence_parallel: bool) -> None:
    """Tell Megatron whether the gradients of this module's own parameters are partial sums."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


def mark_averaged(module: nn.Module) -> None:
    """Let Megatron average the gradients of this module's own parameters over tensor parallel ranks.

    For gradients that are whole on every rank, of parameters that Megatron takes for partial ones by
    their name (`finalize_model_grads._allreduce_non_tensor_model_parallel_grads`).
    """
    for parameter in module.parameters(recurse=False):
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


def dyt_sites(model: nn.Module) -> Iterator[tuple[str, DyTNorm]]:
    """(name, module) of every DyTNorm in a model, in the order of the module tree."""
    for name, module in model.named_modules():
        if isinstance(module, DyTNorm):
            yield name, module
