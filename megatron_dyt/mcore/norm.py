"""DyTNorm: DyT with Megatron's norm-builder signature, parallelism attributes and recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, get_args

import torch
from torch import Tensor, nn

from megatron_dyt.config import DyTConfig, Role, check_choice
from megatron_dyt.mcore.residual import DeferredSum, offloads, uses_cuda_graphs
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.ops.parameters import alpha_of_log
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.transformer_config import TransformerConfig

# Positions of a sequence that a running scale looks at: enough for the rms of all.
_SAMPLES = 64

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
        log_alpha: the parameter (1,) in place of `alpha` with `dyt_log_alpha`, else None.
        log_alpha_rate: alpha is exp(log_alpha_rate * log_alpha).
        input_rms: with `dyt_running_scale` the average (1,) by which alpha is divided, fp32, saved with the
            parameters; else None (`running_scale`).
        alpha_floor: where there is one what is added to the exponential, (1,) fp32, saved with the
            parameters; else None.
        seen: with it (sum of squares, count) of inputs since the average was updated, (2,) fp32; else None.
    """

    log_alpha: nn.Parameter | None
    input_rms: Tensor | None
    alpha_floor: Tensor | None
    seen: Tensor | None
    function: str  # A flag's value, and no callable.

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
        running = dyt.has_running_scale(role)
        fp32 = torch.float32
        self.register_buffer("input_rms", torch.ones(1, dtype=fp32) if running else None)
        self.register_buffer("seen", torch.zeros(2, dtype=fp32) if running else None, persistent=False)
        self.log_alpha, self.log_alpha_rate = None, dyt.log_alpha_rate
        self._floor = dyt.alpha_floor(role)
        self.register_buffer("alpha_floor", torch.empty(1, dtype=fp32) if self._floor else None)
        if dyt.log_alpha:
            # Another name than alpha's: a checkpoint of the one kind must not load as the other.
            self.log_alpha = self.alpha
            del self.alpha
            self._reset_alpha()
        self.sequence_shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        # Megatron's gradient buffers and optimizers leave out what needs no gradient.
        self.alpha_parameter.requires_grad_(not dyt.freeze_alpha)
        if not dyt.alpha_in_grad_norm:
            # The mark of parameters that another pipeline stage counts: every optimizer and Megatron-FSDP
            # leave them out of the norm. They are clipped with all others; Adam's step does not notice.
            self.alpha_parameter.shared = True  # type: ignore[attr-defined]
        self.role: Role = role
        self.returns_residual = returns_residual
        self.refills = not (offloads(config) or uses_cuda_graphs(config))
        self.output_dtype = config.params_dtype if config.fp32_residual_connection else None
        self.probe: Callable[[DyTNorm, Tensor], None] | None = None
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
        # Not where the layer is frozen: what its alpha is would change all the same.
        if self.seen is not None and self.training and self.weight.requires_grad and torch.is_grad_enabled():
            self._see(x)
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

    @property
    def alpha_parameter(self) -> nn.Parameter:
        """What is learned: `log_alpha`, or `alpha`."""
        return self.alpha if self.log_alpha is None else self.log_alpha

    def effective_alpha(self, parameter: Tensor | None = None) -> Tensor:
        """The alpha that multiplies x, (1,): of fp32 with `log_alpha`, else the parameter.

        parameter: another value of `alpha_parameter`, for the alpha that belongs to it.
        """
        parameter = self.alpha_parameter if parameter is None else parameter
        alpha = parameter
        if self.log_alpha is not None:
            alpha = alpha_of_log(parameter, self.log_alpha_rate, self.alpha_floor)
        return alpha if self.input_rms is None else alpha / self.input_rms

    @torch.no_grad()
    def _see(self, x: Tensor | DeferredSum) -> None:
        """Add a sample of an input to `seen`. A pass that is recomputed counts once: only with gradients."""
        assert self.seen is not None
        terms = x.peek() if isinstance(x, DeferredSum) else (x,)
        # Positions of the whole sequence, of which this rank may have a part. Not the first token, which is
        # unlike all others.
        stride = max(1, len(terms[0]) * self.sequence_shards // _SAMPLES)
        first, *rest = (term.detach()[stride // 2 :: stride] for term in terms)
        sample = first + rest[0] if rest else first
        norm = torch.linalg.vector_norm(sample, dtype=torch.float32)
        # In place and by numbers, as CUDA graphs need it.
        self.seen[0].addcmul_(norm, norm)
        self.seen[1].add_(sample.numel())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but a cast leaves the buffers as they are: 16 bits lose an average's steps."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            # What comes from the meta device has no value yet, and `seen` is not in a checkpoint.
            value = old if not old.is_meta else torch.zeros_like(new) if name == "seen" else new
            setattr(self, name, value.to(new.device, torch.float32))
        return self

    def _reset_alpha(self) -> None:
        # Absent while the base class builds its parameters.
        if getattr(self, "log_alpha", None) is None:
            super()._reset_alpha()
        else:
            start = math.log(self.alpha_init - self._floor) / self.log_alpha_rate
            nn.init.constant_(self.alpha_parameter, start)
        for name, value in (("input_rms", 1.0), ("seen", 0.0), ("alpha_floor", getattr(self, "_floor", 0.0))):
            if (buffer := getattr(self, name, None)) is not None:
                nn.init.constant_(buffer, value)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.effective_alpha(), self.weight, self.bias

    def extra_repr(self) -> str:
        learns = "" if self.log_alpha is None else ", learns log(alpha)"
        return f"{super().extra_repr()}, role={self.role}{learns}"


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


@wrapper
def wrap_checkpoint[R](
    original: Callable[..., R], self: CheckpointWithoutOutput, run_function: Callable[..., R], *args: Tensor
) -> R | NormOutput:
    """`CheckpointWithoutOutput.checkpoint`, which calls a DyTNorm as it is."""
    if not (isinstance(run_function, DyTNorm) and run_function.refills):
        return original(self, run_function, *args)
    output: NormOutput = run_function(*args)
    y, x = output if isinstance(output, tuple) else (output, args[0])
    self.dyt_output = FreedOutput(run_function, y, x)
    return output


@wrapper
def wrap_discard(
    original: Callable[[CheckpointWithoutOutput, Tensor], None],
    self: CheckpointWithoutOutput,
    hook_tensor: Tensor,
) -> None:
    """`CheckpointWithoutOutput.discard_output_and_register_recompute`, for DyT by `FreedOutput`."""
    output: FreedOutput | None = getattr(self, "dyt_output", None)
    if output is None:
        original(self, hook_tensor)
    else:
        output.free_until_gradient_of(hook_tensor)
