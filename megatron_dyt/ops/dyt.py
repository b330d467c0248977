"""The functions of DyT to call: `dyt`, `dyt_residual`, `dyt_fork`, and `recompute_dyt`."""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

from megatron_dyt.ops import reference
from megatron_dyt.ops.backends import IMPLEMENTATIONS, choose_implementation
from megatron_dyt.ops.library import Dyt, DytResidual, Fork
from megatron_dyt.ops.native import is_observed, is_transformed
from megatron_dyt.ops.parameters import Parameters


class Options(TypedDict, total=False):
    """What all functions of this file take by name.

    Attributes:
        function: tanh (the default), erf, hardtanh, sigmoid, isru (z / sqrt(1 + z^2)), arctan, satursin,
            arcsinhclip or identity; or an elementwise function of torch operations, which is given fp32 (fp64
            for fp64 x), runs and is differentiated by torch, without kernels.
        shift: (1,), for erf and only for erf.
        backend: "torch", "triton", or "auto" (the default) for the best that runs on x's device.
    """

    function: reference.Function
    shift: Tensor | None
    backend: str


def _prepare(
    x: Tensor,
    residual: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    *,
    function: reference.Function = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Parameters, str | None]:
    """The parameters, checked, and the name of the implementation; `tensors` are alpha, weight, bias.

    It is None where plain torch code is to run, and be differentiated by torch.
    """
    parameters = Parameters(*tensors, shift, function)
    parameters.check(x, residual)
    if not isinstance(function, str):
        if backend not in ("auto", "torch"):
            raise ValueError(
                f"backend is {backend!r}, but a function of your own runs as torch code; "
                "use backend='auto' or 'torch'"
            )
        return parameters, None
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    implementation = choose_implementation(backend, x.device, function, dtype, parameters.alpha.numel())
    return parameters, None if is_transformed() else implementation


def dyt(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Unpack[Options]
) -> Tensor:
    """Dynamic Tanh, weight * f(alpha * x + shift) + bias (arXiv 2503.10622; erf: arXiv 2512.10938).

    Args:
        x: (..., hidden), fp32, bf16, fp16 or fp64, any strides, any number of rows including none.
        alpha: (1,), or (groups,), where groups divides hidden: one for each group of neighbouring channels.
        weight: (hidden,).
        bias: (hidden,) in weight's dtype, or None.
        options: function, shift, backend: see `Options`.

    Returns:
        y, contiguous, in x's shape and dtype. The math is fp32 (fp64 for fp64 x) whatever the
        parameters' dtypes, and each gradient has the dtype of its tensor. Differentiable once; in transforms
        of torch.func and in forward mode, where plain torch code runs, as often as torch can.

    Raises:
        ValueError: a shape, dtype, device, function or backend that is not as above.
    """
    parameters, implementation = _prepare(x, None, (alpha, weight, bias), **options)
    if implementation is None:
        return reference.dyt_forward(x, *parameters).contiguous()
    if is_observed(x, *parameters):
        return torch.ops.megatron_dyt.dyt.default(x, *parameters, implementation)
    if not torch.is_grad_enabled():
        return IMPLEMENTATIONS[implementation].forward(x, parameters)
    y: Tensor = Dyt.apply(x, *parameters, implementation)
    return y


def dyt_residual(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """The sum of a residual branch, and DyT of it: (dyt(r), r) with r = x + residual.

    On CUDA one kernel reads x and residual and writes both results, and one more in backward adds the
    gradient that reaches r by other ways. Nothing but r is saved for backward.

    Args:
        x: (..., hidden), as for `dyt`.
        residual: in x's shape and on its device, of any allowed dtype.
        alpha, weight, bias, options: as for `dyt`.

    Returns:
        y and r, contiguous, in x's shape and the dtype that x + residual has. y is DyT of r as rounded to
        that dtype.

    Raises:
        ValueError: a shape, dtype, device, function or backend that is not as above.
    """
    parameters, implementation = _prepare(x, residual, (alpha, weight, bias), **options)
    if implementation is None:
        total = (x + residual).contiguous()
        return reference.dyt_forward(total, *parameters), total
    observed = is_observed(x, residual, *parameters)
    call = torch.ops.megatron_dyt.dyt_residual.default if observed else DytResidual.apply
    y, r = call(x, residual, *parameters, implementation)
    return y, r


def dyt_fork(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """(dyt(x), x) for an x that is needed twice, as where a residual branch begins.

    The second result is x itself, as a view. Backward adds its gradient to DyT's in the kernel that
    computes that one, where autograd would add two gradients of x in another pass over memory.

    Arguments and errors: as for `dyt`.
    """
    parameters, implementation = _prepare(x, None, (alpha, weight, bias), **options)
    if not torch.is_grad_enabled() or implementation is None:
        return dyt(x, alpha, weight, bias, **options), x
    y, same = Fork.apply(x, *parameters, implementation)
    return y, same


def recompute_dyt(
    y: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Unpack[Options],
) -> None:
    """Give y, a result of `dyt(x, ...)` whose storage has been resized to 0, its memory and values back.

    For activation recomputation: what autograd has saved of y, views included, has them back too, and
    no version counter moves. Bit for bit what `dyt` gave. No gradients are recorded.

    Args:
        y: contiguous, at the start of its storage, in x's shape; its dtype may be another one.
        x, alpha, ...: as they were for `dyt`.
    """
    parameters, implementation = _prepare(x, None, (alpha, weight, bias), **options)
    storage = y.untyped_storage()
    storage.resize_(y.numel() * y.itemsize)
    with torch.no_grad():
        # A tensor of its own on the same memory: writing to it is no change of y to autograd.
        alias = torch.empty(0, dtype=y.dtype, device=y.device).set_(storage, 0, y.shape, y.stride())
        forward = IMPLEMENTATIONS[implementation or "reference"].forward
        if y.dtype == x.dtype:
            forward(x, parameters, alias)
        else:
            alias.copy_(forward(x, parameters))
