"""The torch.library operations of DyT, with autograd; `dyt.py` has the functions to call.

`megatron_dyt::dyt`, `dyt_residual` and `dyt_backward` are opaque to torch.compile, and have fake
(shape-only) versions for tracing. Only DyT's input (the sum, with a residual) and the parameters are
saved for backward.

An operation adds some 0.1 ms of Python to a call, forward and backward, so it is used where something looks
on (`is_observed`); elsewhere the same formulas run as plain autograd functions. Both have first derivatives,
in reverse mode, alone; where others may be wanted (`is_transformed`) the reference runs.

Operations and autograd functions see tensors only where they are arguments of their own, so `Parameters` and
the implementation's name are spread out there: in what follows, `spread` is these six.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.ops.backends import IMPLEMENTATIONS, needed_gradients
from megatron_dyt.ops.native import is_observed
from megatron_dyt.ops.parameters import Parameters

_SPREAD = "Tensor alpha, Tensor weight, Tensor? bias, Tensor? shift, str function, str implementation"

_library = torch.library.Library("megatron_dyt", "DEF")
_library.define(f"dyt(Tensor x, {_SPREAD}) -> Tensor")
_library.define(f"dyt_residual(Tensor x, Tensor residual, {_SPREAD}) -> (Tensor, Tensor)")
# `needs` says which gradients of x, alpha, weight, bias, shift to compute and return, in that order.
# `dsum` is added to that of x: what reaches x + residual by another way than DyT.
_library.define(f"dyt_backward(Tensor dy, Tensor x, {_SPREAD}, bool[] needs, Tensor? dsum) -> Tensor[]")


def _dyt_kernel(x: Tensor, *spread: Any) -> Tensor:
    *parameters, implementation = spread
    return IMPLEMENTATIONS[implementation].forward(x, Parameters(*parameters))


def _dyt_residual_kernel(x: Tensor, residual: Tensor, *spread: Any) -> tuple[Tensor, Tensor]:
    *parameters, implementation = spread
    return IMPLEMENTATIONS[implementation].residual_forward(x, residual, Parameters(*parameters))


def _dyt_backward_kernel(dy: Tensor, x: Tensor, *spread_and_rest: Any) -> list[Tensor]:
    *parameters, implementation, needs, dsum = spread_and_rest
    return IMPLEMENTATIONS[implementation].backward(dy, x, Parameters(*parameters), needs, dsum)


def _dyt_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _dyt_residual_fake(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


def _dyt_backward_fake(dy: Tensor, x: Tensor, *spread_and_rest: Any) -> list[Tensor]:
    alpha, weight, _, shift, _, _, needs, _ = spread_and_rest
    likes = needed_gradients((x, alpha, weight, weight, shift), needs)
    return [like.new_empty(like.shape) for like in likes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    """Keep what `_gradients` needs of x and `spread`."""
    x, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.save_for_backward(x, alpha, weight, shift)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The same of x, residual and `spread`, with their sum in the place of x."""
    x, residual, *spread = inputs
    _save(ctx, (output[1], *spread), None)
    ctx.dtypes = (x.dtype, residual.dtype)
    # A sum that nothing else reads has no gradient, rather than one of zeros that would have to be read.
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, needs: Sequence[bool], dsum: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of DyT's input, alpha, weight, bias and shift; None where not needed.

    dy: that of DyT's result, None where nothing reads it. dsum: what reaches the input by another way.
    """
    if dy is None:
        return [dsum, None, None, None, None]
    x, alpha, weight, shift = ctx.saved_tensors
    # With create_graph=True gradients are recorded, and the operation is what refuses that.
    at_once = not torch.is_grad_enabled() and not is_observed(dy, x, alpha, weight, shift, dsum)
    backward = _dyt_backward_kernel if at_once else torch.ops.megatron_dyt.dyt_backward.default
    found = iter(backward(dy, x, alpha, weight, None, shift, ctx.function, ctx.implementation, needs, dsum))
    return [next(found) if needed else None for needed in needs]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy, ctx.needs_input_grad[:5]), None, None)


def _differentiate_residual(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, *needs_parameters = ctx.needs_input_grad[:6]
    needs = [needs_x or needs_residual, *needs_parameters]
    d_input, *d_parameters = _gradients(ctx, dy, needs, dsum)
    terms = (
        d_input.to(dtype) if needed and d_input is not None else None
        for needed, dtype in zip((needs_x, needs_residual), ctx.dtypes, strict=True)
    )
    return (*terms, *d_parameters, None, None)


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "DyT has no second derivative here, but gradients of its gradients were asked for "
        "(create_graph=True); compute them through megatron_dyt.ops.reference.dyt_forward instead"
    )


class Dyt(torch.autograd.Function):
    """`megatron_dyt::dyt` without the operation, for where nothing observes it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _save(ctx, args, None)
        return _dyt_kernel(*args)

    backward = staticmethod(_differentiate)


class DytResidual(torch.autograd.Function):
    """`megatron_dyt::dyt_residual` without the operation, for where nothing observes it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = _dyt_residual_kernel(*args)
        _save_sum(ctx, args, output)
        return output

    backward = staticmethod(_differentiate_residual)


class Fork(torch.autograd.Function):
    """`dyt_fork`. No torch.library operation, because those may not return what they were given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *spread: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, (x, *spread), None)
        # A second result that nothing reads has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        dyt = torch.ops.megatron_dyt.dyt.default if is_observed(x, *spread) else _dyt_kernel
        return dyt(x, *spread), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsame: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, ctx.needs_input_grad[:5], dsame), None, None)


def _register(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    # One kernel for all devices: `IMPLEMENTATIONS`, not the dispatcher, chooses the code.
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"megatron_dyt::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=_library)


_register("dyt", _dyt_kernel, _dyt_fake, _differentiate, _save)
_register("dyt_residual", _dyt_residual_kernel, _dyt_residual_fake, _differentiate_residual, _save_sum)
_register("dyt_backward", _dyt_backward_kernel, _dyt_backward_fake, _refuse_double_backward)
