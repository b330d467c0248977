"""`--recompute-modules layernorm` for DyT: the output is freed after use and computed again in backward.

Megatron frees a norm's output once the linear layers behind it have run, and recomputes it when the
gradient has come back to them, by `CheckpointWithoutOutput`. For DyT that takes less than what this class
does: autograd has DyT's input saved in any case, so the output can be filled from it again, without a second
graph, random states, or Transformer Engine, which the class needs even without FP8. It also leaves the
second result of a norm that returns (output, sum) alone, which is the residual stream and still in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_dyt.mcore.norm import DyTNorm


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


def wrap_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """`CheckpointWithoutOutput.checkpoint`, which calls a DyTNorm as it is."""

    @functools.wraps(original)
    def checkpoint(self: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        if not (isinstance(run_function, DyTNorm) and run_function.refills):
            return original(self, run_function, *args)
        output = run_function(*args)
        y, x = output if isinstance(output, tuple) else (output, args[0])
        self.dyt_output = FreedOutput(run_function, y, x)
        return output

    return checkpoint


def wrap_discard(original: Callable[..., Any]) -> Callable[..., Any]:
    """`CheckpointWithoutOutput.discard_output_and_register_recompute`, for DyT by `FreedOutput`."""

    @functools.wraps(original)
    def discard_output_and_register_recompute(self: Any, hook_tensor: Tensor) -> None:
        output: FreedOutput | None = getattr(self, "dyt_output", None)
        if output is None:
            original(self, hook_tensor)
        else:
            output.free_until_gradient_of(hook_tensor)

    return discard_output_and_register_recompute
