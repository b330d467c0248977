"""The functions of DyT to call: `dyt`, `dyt_residual`, `dyt_fork`, and `recompute_dyt`."""

import torch
from torch import Tensor

from megatron_dyt.ops import reference
from megatron_dyt.ops.backends import IMPLEMENTATIONS, choose_implementation
from megatron_dyt.ops.checks import check_function, check_tensors
from megatron_dyt.ops.library import Dyt, DytResidual, Fork, is_observed, is_transformed


def dyt(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    function: str = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dynamic Tanh, weight * f(alpha * x + shift) + bias (arXiv 2503.10622; erf: arXiv 2512.10938).

    Args:
        x: (..., hidden), fp32, bf16, fp16 or fp64, any strides, any number of rows including none.
        alpha: (1,).
        weight: (hidden,).
        bias: (hidden,) in weight's dtype, or None.
        function: tanh, erf, hardtanh, sigmoid, isru (z / sqrt(1 + z^2)) or identity.
        shift: (1,), for erf and only for erf.
        backend: "torch", "triton", or "auto" for the best that runs on x's device.

    Returns:
        y, contiguous, in x's shape and dtype. The math is fp32 (fp64 for fp64 x) whatever the
        parameters' dtypes, and each gradient has the dtype of its tensor. Differentiable once; in transforms
        of torch.func and in forward mode, where plain torch code runs, as often as torch can.

    Raises:
        ValueError: a shape, dtype, device, function or backend that is not as above.
    """
    check_tensors(x, alpha, weight, bias, shift)
    check_function(function, shift)
    implementation = choose_implementation(backend, x.device, function, x.dtype)
    if is_transformed():
        return reference.dyt_forward(x, alpha, weight, bias, function=function, shift=shift).contiguous()
    observed = is_observed(x, alpha, weight, bias, shift)
    call = torch.ops.megatron_dyt.dyt.default if observed else Dyt.apply
    y: Tensor = call(x, alpha, weight, bias, shift, function, implementation)
    return y


def dyt_residual(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    function: str = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of a residual branch, and DyT of it: (dyt(r), r) with r = x + residual.

    On CUDA one kernel reads x and residual and writes both results, and one more in backward adds the
    gradient that reaches r by other ways. Nothing but r is saved for backward.

    Args:
        x: (..., hidden), as for `dyt`.
        residual: in x's shape and on its device, of any allowed dtype.
        alpha, weight, bias, function, shift, backend: as for `dyt`.

    Returns:
        y and r, contiguous, in x's shape and the dtype that x + residual has. y is DyT of r as rounded to
        that dtype.

    Raises:
        ValueError: a shape, dtype, device, function or backend that is not as above.
    """
    check_tensors(x, alpha, weight, bias, shift, residual)
    check_function(function, shift)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    implementation = choose_implementation(backend, x.device, function, dtype)
    if is_transformed():
        total = (x + residual).contiguous()
        return reference.dyt_forward(total, alpha, weight, bias, function=function, shift=shift), total
    observed = is_observed(x, residual, alpha, weight, bias, shift)
    call = torch.ops.megatron_dyt.dyt_residual.default if observed else DytResidual.apply
    y, r = call(x, residual, alpha, weight, bias, shift, function, implementation)
    return y, r


def dyt_fork(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    function: str = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(dyt(x), x) for an x that is needed twice, as where a residual branch begins.

    The second result is x itself, as a view. Backward adds its gradient to DyT's in the kernel that
    computes that one, where autograd would add two gradients of x in another pass over memory.

    Arguments and errors: as for `dyt`.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return dyt(x, alpha, weight, bias, function=function, shift=shift, backend=backend), x
    check_tensors(x, alpha, weight, bias, shift)
    check_function(function, shift)
    implementation = choose_implementation(backend, x.device, function, x.dtype)
    y, same = Fork.apply(x, alpha, weight, bias, shift, function, implementation)
    return y, same


def recompute_dyt(
    y: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    function: str = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Give y, a result of `dyt(x, ...)` whose storage has been resized to 0, its memory and values back.

    For activation recomputation: what autograd has saved of y, views included, has them back too, and
    no version counter moves. Bit for bit what `dyt` gave. No gradients are recorded.

    Args:
        y: contiguous, at the start of its storage, in x's shape; its dtype may be another one.
        x, alpha, ...: as they were for `dyt`.
    """
    storage = y.untyped_storage()
    storage.resize_(y.numel() * y.itemsize)
    with torch.no_grad():
        implementation = choose_implementation(backend, x.device, function, x.dtype)
        # A tensor of its own on the same memory: writing to it is no change of y to autograd.
        alias = torch.empty(0, dtype=y.dtype, device=y.device).set_(storage, 0, y.shape, y.stride())
        forward = IMPLEMENTATIONS[implementation].forward
        if y.dtype == x.dtype:
            forward(x, alpha, weight, bias, shift, function, alias)
        else:
            alias.copy_(forward(x, alpha, weight, bias, shift, function))
