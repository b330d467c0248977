"""The DyT operators: torch.library ops with autograd, and the one place that chooses a backend.

`megatron_dyt::dyt`, `dyt_residual` and `dyt_backward` are opaque to torch.compile, and have fake
(shape-only) versions for tracing. Only DyT's input (the sum, with a residual) and the parameters are
saved for backward.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "triton", "torch")


class Implementation(NamedTuple):
    """Code for one backend, with the signatures of `triton_dyt.forward`, `.residual_forward`, `.backward`."""

    backend: str
    supports: Callable[[torch.device, str, torch.dtype], bool]
    forward: Callable[..., Tensor]
    residual_forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]


def _add_first(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """residual_forward of an implementation that has no kernel for it."""

    def residual_forward(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        total = torch.add(x, residual).contiguous()
        return forward(total, *rest), total

    return residual_forward


def _add_last(backward: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """backward of an implementation that does not know `dsum`."""

    def backward_with_sum(*args: Any) -> list[Tensor]:
        *rest, needs, dsum = args
        gradients = backward(*rest, needs)
        if dsum is not None and needs[0]:
            gradients[0] += dsum
        return gradients

    return backward_with_sum


def _reference_forward(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
) -> Tensor:
    y = reference.dyt_forward(x, alpha, weight, bias, function=function, shift=shift)
    return y.contiguous()


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    dx, *parameter_gradients = reference.dyt_backward(
        dy, x, alpha, weight, has_bias=needs[3], function=function, shift=shift
    )
    return _needed((dx.contiguous(), *parameter_gradients), needs)


def _in_triton(name: str) -> Callable[..., Any]:
    """A function of `triton_dyt`, which is imported at the first call: it takes Triton to be there."""

    def call(*args: Any) -> Any:
        from megatron_dyt.ops import triton_dyt

        return getattr(triton_dyt, name)(*args)

    return call


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _compiled_forward(*args: Any) -> Tensor:
    y: Tensor = _compiled(_reference_forward)(*args)
    return y


def _compiled_backward(*args: Any) -> list[Tensor]:
    *tensors, needs = args
    gradients: list[Tensor] = _compiled(_reference_backward)(*tensors, tuple(needs))
    return gradients


@functools.cache
def triton_is_installed() -> bool:
    """Whether the package is there, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _runs_triton(device: torch.device) -> bool:
    if device.type == "cuda":
        return triton_is_installed()
    if device.type != "cpu" or not triton_is_installed():
        return False
    from megatron_dyt.ops import triton_dyt

    return triton_dyt.is_interpreted()


def _runs_our_kernels(device: torch.device, function: str, dtype: torch.dtype) -> bool:
    if not _runs_triton(device):
        return False
    from megatron_dyt.ops import triton_dyt

    return function in triton_dyt.FUNCTIONS and dtype in triton_dyt.DTYPES


# In order of preference: the first that has the wanted backend and supports the call runs. On a CPU the
# Triton kernels run interpreted, so there they come after the code made for it.
_IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation(
        "torch",
        lambda device, function, dtype: device.type == "cpu",
        cpu_dyt.forward,
        _add_first(cpu_dyt.forward),
        _add_last(cpu_dyt.backward),
    ),
    "triton": Implementation(
        "triton",
        _runs_our_kernels,
        _in_triton("forward"),
        _in_triton("residual_forward"),
        _in_triton("backward"),
    ),
    # Inductor makes Triton kernels of the functions and dtypes that ours do not have.
    "compiled": Implementation(
        "triton",
        lambda device, function, dtype: _runs_triton(device),
        _compiled_forward,
        _add_first(_compiled_forward),
        _add_last(_compiled_backward),
    ),
    "reference": Implementation(
        "torch",
        lambda device, function, dtype: True,
        _reference_forward,
        _add_first(_reference_forward),
        _add_last(_reference_backward),
    ),
}


def choose_implementation(
    backend: str, device: torch.device, function: str = "tanh", dtype: torch.dtype = torch.float32
) -> str:
    """The implementation that runs for this backend, device, function and dtype of x.

    Raises:
        ValueError: there is none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    if backend == "auto" and device.type == "cuda":
        _warn_without_triton()
    for name, implementation in _IMPLEMENTATIONS.items():
        if backend in ("auto", implementation.backend) and implementation.supports(device, function, dtype):
            return name
    missing = "" if triton_is_installed() else ", and the package triton, which is not installed"
    raise ValueError(
        f"backend {backend!r} cannot run on {device}: the Triton kernels need a CUDA or ROCm device"
        f"{missing}; use backend='auto' or 'torch'"
    )


@functools.cache
def _warn_without_triton() -> None:
    """Say once that this will be slow."""
    if not triton_is_installed():
        warnings.warn(
            "the package triton is not installed, so DyT runs as plain torch code, several times slower; "
            "install triton, or give backend='torch' to say that this is meant",
            stacklevel=4,
        )


def _needed(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [t for t, needed in zip(gradients, needs, strict=True) if needed and t is not None]


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


def _dyt_kernel(x: Tensor, *args: Any) -> Tensor:
    *rest, implementation = args
    return _IMPLEMENTATIONS[implementation].forward(x, *rest)


def _dyt_residual_kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, implementation = args
    return _IMPLEMENTATIONS[implementation].residual_forward(x, *rest)


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
    backward = _IMPLEMENTATIONS[implementation].backward
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
    return [torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in _needed(likes, needs)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.save_for_backward(x, alpha, weight, shift)


def _gradients(ctx: Any, dy: Tensor, needs: list[bool], dsum: Tensor | None = None) -> list[Tensor | None]:
    """Gradients of DyT's input, alpha, weight, bias and shift; None where not needed."""
    x, alpha, weight, shift = ctx.saved_tensors
    found = iter(
        torch.ops.megatron_dyt.dyt_backward.default(
            dy, x, alpha, weight, shift, ctx.function, needs, ctx.implementation, dsum
        )
    )
    return [next(found) if needed else None for needed in needs]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy, list(ctx.needs_input_grad[:5])), None, None)


def _save_sum_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.save_for_backward(output[1], alpha, weight, shift)
    # A sum that nothing else reads has no gradient, rather than one of zeros that would have to be read.
    ctx.set_materialize_grads(False)


def _differentiate_residual(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, *needs_parameters = ctx.needs_input_grad[:6]
    needs = [needs_x or needs_residual, *needs_parameters]
    gradients = [dsum, None, None, None, None] if dy is None else _gradients(ctx, dy, needs, dsum)
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


# One kernel for all devices: the table above, not the dispatcher, chooses the code.
_library.impl("dyt", _dyt_kernel, "CompositeExplicitAutograd")
_library.impl("dyt_residual", _dyt_residual_kernel, "CompositeExplicitAutograd")
_library.impl("dyt_backward", _dyt_backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_dyt::dyt", _dyt_fake, lib=_library)
torch.library.register_fake("megatron_dyt::dyt_residual", _dyt_residual_fake, lib=_library)
torch.library.register_fake("megatron_dyt::dyt_backward", _dyt_backward_fake, lib=_library)
torch.library.register_autograd(
    "megatron_dyt::dyt", _differentiate, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd(
    "megatron_dyt::dyt_residual",
    _differentiate_residual,
    setup_context=_save_sum_for_backward,
    lib=_library,
)
torch.library.register_autograd("megatron_dyt::dyt_backward", _refuse_double_backward, lib=_library)


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
        parameters' dtypes, and each gradient has the dtype of its tensor. Differentiable once.

    Raises:
        ValueError: a shape, dtype, device, function or backend that is not as above.
    """
    _check_tensors(x, alpha, weight, bias, shift)
    _check_function(function, shift)
    implementation = choose_implementation(backend, x.device, function, x.dtype)
    y: Tensor = torch.ops.megatron_dyt.dyt.default(x, alpha, weight, bias, shift, function, implementation)
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
    _check_tensors(x, alpha, weight, bias, shift, residual)
    _check_function(function, shift)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    implementation = choose_implementation(backend, x.device, function, dtype)
    y, r = torch.ops.megatron_dyt.dyt_residual.default(
        x, residual, alpha, weight, bias, shift, function, implementation
    )
    return y, r


def _check_function(function: str, shift: Tensor | None) -> None:
    if function not in reference.FUNCTIONS:
        raise ValueError(f"function is {function!r}; allowed are {', '.join(reference.FUNCTIONS)}")
    if (shift is not None) != (function == "erf"):
        given = "no shift was" if shift is None else "a shift was"
        raise ValueError(
            f"{given} given with function={function!r}; "
            "give one, of shape (1,), for 'erf' and for nothing else"
        )


def _check_tensors(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., hidden) with hidden >= 1")
    hidden = x.shape[-1]
    expected = (
        ("x", x, x.shape),
        ("residual", residual, x.shape),
        ("alpha", alpha, (1,)),
        ("weight", weight, (hidden,)),
        ("bias", bias, (hidden,)),
        ("shift", shift, (1,)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} "
                f"it must be {tuple(shape)}"
            )
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are {allowed}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move them to one device")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(
            f"bias has dtype {bias.dtype} but weight has {weight.dtype}; give both the same dtype"
        )
