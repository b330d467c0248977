"""DyTNorm: DyT with Megatron's norm-builder signature, parallelism attributes and recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, get_args

import torch
from torch import Tensor, nn

from megatron_dyt.config import DyTConfig, Role, check_choice
from megatron_dyt.mcore.residual import DeferredSum, offloads, uses_cuda_graphs
from megatron_dyt.nn import DynamicTanh

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.transformer_config import TransformerConfig

# One tensor, or (output, residual): what a norm of Megatron's layers returns.
type NormOutput = Tensor | tuple[Tensor, Tensor]


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
        refills: whether an output that is recomputed is freed and filled by `FreedOutput`, and not by
            Megatron, which has its own ways with CUDA graphs and offloaded activations.
        output_dtype: the parameters' with `fp32_residual_connection`, where the input is fp32 and the
            layer behind takes what Transformer Engine's norms return; else None, the input's.
        probe: called with (module, input) at each forward while a monitor is looking, else None.
        decay: of the running scale, per step; 0 without one.
        sigma: with a running scale a buffer (1,) of fp32, by which alpha is divided; else None.
        seen: with a running scale the sum of squares and the number of the inputs' elements since sigma was
            last updated, (2,) of fp64 (`mcore/running_scale.py`); None before the first.
    """

    sigma: Tensor | None

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
        dyt: DyTConfig = config.dyt
        super().__init__(
            hidden_size,
            alpha_init=dyt.alpha(role),
            weight_init=dyt.initial_weight(role),
            bias=dyt.bias,
            bias_init=dyt.initial_bias(role),
            function=dyt.function,
            backend=dyt.backend,
            dtype=config.params_dtype,
        )
        # Megatron's gradient buffers and optimizers leave out what needs no gradient.
        self.alpha.requires_grad_(not dyt.freeze_alpha)
        if not dyt.alpha_in_grad_norm:
            # What Megatron leaves out of the gradient norm, in every optimizer and in Megatron-FSDP: parameters
            # that another stage counts. It is clipped with all others, which Adam's step does not notice.
            self.alpha.shared = True  # type: ignore[attr-defined]
        self.role: Role = role
        self.returns_residual = returns_residual
        self.refills = not (offloads(config) or uses_cuda_graphs(config))
        self.output_dtype = config.params_dtype if config.fp32_residual_connection else None
        self.probe: Callable[[DyTNorm, Tensor], None] | None = None
        self.decay = dyt.running_scale
        self.register_buffer("sigma", torch.ones(1) if self.decay else None)
        self.seen: Tensor | None = None
        mark_sequence_parallel(self, config.sequence_parallel)
        if averaged:
            mark_averaged(self)

    def forward(self, x: Tensor | DeferredSum) -> NormOutput:  # type: ignore[override]
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
        if self.sigma is not None and self.training and torch.is_grad_enabled():
            self._see(x.detach())
        if self.probe is not None:
            self.probe(self, x)
        if self.output_dtype is not None:
            y = y.to(self.output_dtype)
        return (y, x) if gives_both else y

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Absent while the base class builds its parameters.
        sigma: Tensor | None = getattr(self, "sigma", None)
        if sigma is not None:
            nn.init.ones_(sigma)

    def scaled_alpha(self) -> Tensor:
        """The alpha that multiplies x, (1,): of fp32 with a running scale, else the parameter."""
        return self.alpha if self.sigma is None else self.alpha.float() / self.sigma

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.scaled_alpha(), self.weight, self.bias

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        """Count an input: once where a forward pass is repeated, as one of the two has no gradients on."""
        if self.seen is None:
            self.seen = torch.zeros(2, dtype=torch.float64, device=x.device)
        norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
        # In place and without a tensor made on the host, so that it can be captured in a CUDA graph.
        self.seen[0] += norm.double().square()
        self.seen[1] += x.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.sigma
        super()._apply(fn, recurse)
        # Cast to 16 bits, sigma would be rounded at each step. On the meta device it has no value.
        if before is not None and self.sigma is not None and self.sigma.dtype != torch.float32:
            self.sigma = before.to(self.sigma.device) if not before.is_meta else self.sigma.float()
        return self

    def extra_repr(self) -> str:
        scale = "" if self.sigma is None else ", running scale"
        return f"{super().extra_repr()}, role={self.role}{scale}"


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


# --- --recompute-modules layernorm -------------------------------------------------------------------
#
# Megatron frees a norm's output once the linear layers behind it have run, and recomputes it when the
# gradient has come back to them, by `CheckpointWithoutOutput`. For DyT that takes less than what this class
# does: autograd has DyT's input saved in any case, so the output can be filled from it again, without a
# second graph, random states, or Transformer Engine, which the class needs even without FP8. It also leaves
# the second result of a norm that returns (output, sum) alone, which is the residual stream and still in use.


class FreedOutput:
    """The output of one DyTNorm call, to be freed and filled again.

    Args:
        norm: the module.
        y: its output, contiguous.
        x: the sum or input that it is the DyT of.
    """

    def __init__(self, norm: DyTNorm, y: Tensor, x: Tensor) -> None:
        self.norm = norm
        # Not the tensors of the graph, which would hold it.
        self.y: Tensor | None = y.detach()
        self.x: Tensor | None = x.detach()

    def free_until_gradient_of(self, tensor: Tensor) -> None:
        """Free the output's memory; the hook on `tensor`, a result of what used it, brings it back."""
        assert self.y is not None
        self.y.untyped_storage().resize_(0)
        if tensor.requires_grad:
            tensor.register_hook(self._fill)
        else:
            self._forget()

    def _fill(self, _gradient: Tensor) -> None:
        if self.y is None or self.x is None:
            return  # filled already: another backward of the same graph (retain_graph)
        self.norm.recompute(self.y, self.x)
        self._forget()

    def _forget(self) -> None:
        # The layer keeps this object until its next forward.
        self.y = self.x = None


def wrap_checkpoint[R](original: Callable[..., R]) -> Callable[..., R | NormOutput]:
    """`CheckpointWithoutOutput.checkpoint`, which calls a DyTNorm as it is."""

    @functools.wraps(original)
    def checkpoint(
        self: CheckpointWithoutOutput, run_function: Callable[..., R], *args: Tensor
    ) -> R | NormOutput:
        if not (isinstance(run_function, DyTNorm) and run_function.refills):
            return original(self, run_function, *args)
        output: NormOutput = run_function(*args)
        y, x = output if isinstance(output, tuple) else (output, args[0])
        self.dyt_output = FreedOutput(run_function, y, x)
        return output

    return checkpoint


def wrap_discard(
    original: Callable[[CheckpointWithoutOutput, Tensor], None],
) -> Callable[[CheckpointWithoutOutput, Tensor], None]:
    """`CheckpointWithoutOutput.discard_output_and_register_recompute`, for DyT by `FreedOutput`."""

    @functools.wraps(original)
    def discard_output_and_register_recompute(self: CheckpointWithoutOutput, hook_tensor: Tensor) -> None:
        output: FreedOutput | None = getattr(self, "dyt_output", None)
        if output is None:
            original(self, hook_tensor)
        else:
            output.free_until_gradient_of(hook_tensor)

    return discard_output_and_register_recompute
