"""The torch.library operations of DyT, with autograd; `dyt.py` has the functions to call.

`megatron_dyt::dyt`, `dyt_residual` and `dyt_backward` are opaque to torch.compile, and have fake
(shape-only) versions for tracing. Only DyT's input (the sum, with a residual) and the parameters are
saved for backward.

An operation costs a call some 0.1 ms of Python, forward and backward, so it is used where something looks
on (`is_observed`); elsewhere the same formulas run as plain autograd functions. Both have first derivatives,
in reverse mode, alone; where others may be wanted (`is_transformed`) the reference runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from megatron_dyt.ops.backends import IMPLEMENTATIONS, needed_gradients

_library = torch.library.Library("megatron_dyt", "DEF")
_library.define(
    "dyt(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, Tensor? shift, str function,"
    " str implementation) -> Tensor"
)
_library.define(
    "dyt_residual(Tensor x, Tensor residual, Tensor alpha, Tensor weight, Tensor? bias, Tensor? shift,"
    " str function, str implementation) -> (Tensor, Tensor)"
)
# `needs` says which gradients of x, alpha, weight, bias, shift to compute and return, in that order.
# `dsum` is added to that of x: what reaches x + residual by another way than DyT.
_library.define(
    "dyt_backward(Tensor dy, Tensor x, Tensor alpha, Tensor weight, Tensor? shift, str function,"
    " bool[] needs, str implementation, Tensor? dsum=None) -> Tensor[]"
)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, and nothing compiles."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_observed(*tensors: Tensor | None) -> bool:
    """Whether operations on these are seen by torch.compile, a dispatch mode or a subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter, type(None)) for tensor in tensors)
    )


def _dyt_kernel(x: Tensor, *args: Any) -> Tensor:
    *rest, implementation = args
    return IMPLEMENTATIONS[implementation].forward(x, *rest)


def _dyt_residual_kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, implementation = args
    return IMPLEMENTATIONS[implementation].residual_forward(x, *rest)


def _dyt_backward_kernel(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
    implementation: str,
    dsum: Tensor | None = None,
) -> list[Tensor]:
    backward = IMPLEMENTATIONS[implementation].backward
    return backward(dy, x, alpha, weight, shift, function, needs, dsum)


def _dyt_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _dyt_residual_fake(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))  # type: ignore[return-value]


def _dyt_backward_fake(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
    implementation: str,
    dsum: Tensor | None = None,
) -> list[Tensor]:
    likes = (x, alpha, weight, weight, shift)
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for like in needed_gradients(likes, needs)
    ]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    """Keep what `dyt_gradients` needs of `dyt`'s arguments."""
    x, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.save_for_backward(x, alpha, weight, shift)


def dyt_gradients(ctx: Any, dy: Tensor, needs: list[bool], dsum: Tensor | None = None) -> list[Tensor | None]:
    """Gradients of DyT's input, alpha, weight, bias and shift; None where not needed."""
    x, alpha, weight, shift = ctx.saved_tensors
    # With create_graph=True gradients are recorded, and the operation is what refuses that.
    at_once = not torch.is_grad_enabled() and not is_observed(dy, x, alpha, weight, shift, dsum)
    backward = _dyt_backward_kernel if at_once else torch.ops.megatron_dyt.dyt_backward.default
    found = iter(backward(dy, x, alpha, weight, shift, ctx.function, needs, ctx.implementation, dsum))
    return [next(found) if needed else None for needed in needs]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*dyt_gradients(ctx, dy, list(ctx.needs_input_grad[:5])), None, None)


def _save_sum_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.save_for_backward(output[1], alpha, weight, shift)
    # A sum that nothing else reads has no gradient, rather than one of zeros that would have to be read.
    ctx.set_materialize_grads(False)


def _differentiate_residual(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, *needs_parameters = ctx.needs_input_grad[:6]
    needs = [needs_x or needs_residual, *needs_parameters]
    gradients = [dsum, None, None, None, None] if dy is None else dyt_gradients(ctx, dy, needs, dsum)
    d_input, *parameters = gradients
    terms = (
        d_input.to(dtype) if needed and d_input is not None else None
        for needed, dtype in zip((needs_x, needs_residual), ctx.dtypes, strict=True)
    )
    return (*terms, *parameters, None, None)


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "DyT has no second derivative here, but gradients of its gradients were asked for "
        "(create_graph=True); compute them through megatron_dyt.ops.reference.dyt_forward instead"
    )


class Dyt(torch.autograd.Function):
    """`megatron_dyt::dyt` without the operation, for where nothing observes it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        save_for_backward(ctx, args, None)
        return _dyt_kernel(*args)

    backward = staticmethod(_differentiate)


class DytResidual(torch.autograd.Function):
    """`megatron_dyt::dyt_residual` without the operation, for where nothing observes it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = _dyt_residual_kernel(*args)
        _save_sum_for_backward(ctx, args, output)
        return output

    backward = staticmethod(_differentiate_residual)


class Fork(torch.autograd.Function):
    """`dyt_fork`. No torch.library operation, because those may not return what they were given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        save_for_backward(ctx, (x, *args), None)
        # A second result that nothing reads has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        alpha, weight, bias, shift, *_ = args
        observed = is_observed(x, alpha, weight, bias, shift)
        dyt = torch.ops.megatron_dyt.dyt.default if observed else _dyt_kernel
        return dyt(x, *args), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsame: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (dsame, *([None] * 6))
        return (*dyt_gradients(ctx, dy, list(ctx.needs_input_grad[:5]), dsame), None, None)


# One kernel for all devices: the table above, not the dispatcher, chooses the code.
_library.impl("dyt", _dyt_kernel, "CompositeExplicitAutograd")
_library.impl("dyt_residual", _dyt_residual_kernel, "CompositeExplicitAutograd")
_library.impl("dyt_backward", _dyt_backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_dyt::dyt", _dyt_fake, lib=_library)
torch.library.register_fake("megatron_dyt::dyt_residual", _dyt_residual_fake, lib=_library)
torch.library.register_fake("megatron_dyt::dyt_backward", _dyt_backward_fake, lib=_library)
torch.library.register_autograd(
    "megatron_dyt::dyt", _differentiate, setup_context=save_for_backward, lib=_library
)
torch.library.register_autograd(
    "megatron_dyt::dyt_residual",
    _differentiate_residual,
    setup_context=_save_sum_for_backward,
    lib=_library,
)
torch.library.register_autograd("megatron_dyt::dyt_backward", _refuse_double_backward, lib=_library)
