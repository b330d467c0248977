"""The DyT operator: torch.library ops with autograd, and the one place that chooses a backend.

`megatron_dyt::dyt` and `megatron_dyt::dyt_backward` are opaque to torch.compile, and have fake
(shape-only) versions for tracing. Only x and the parameters are saved for backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "triton", "torch")


class Implementation(NamedTuple):
    """Code for one backend, with the signatures of `cpu_dyt.forward` and `cpu_dyt.backward`."""

    backend: str
    supports: Callable[[torch.device], bool]
    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]


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


# In order of preference: the first that supports the device and has the wanted backend runs.
_IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation("torch", lambda d: d.type == "cpu", cpu_dyt.forward, cpu_dyt.backward),
    "reference": Implementation("torch", lambda d: True, _reference_forward, _reference_backward),
}


def choose_implementation(backend: str, device: torch.device) -> str:
    """The implementation that runs for this backend on this device; ValueError when there is none."""
    for name, implementation in _IMPLEMENTATIONS.items():
        if backend in ("auto", implementation.backend) and implementation.supports(device):
            return name
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    raise ValueError(
        f"backend {backend!r} cannot run on {device}: the Triton kernels are not in this version yet, "
        "and will need a CUDA device; use backend='auto' or 'torch'"
    )


def _needed(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [t for t, needed in zip(gradients, needs, strict=True) if needed and t is not None]


_library = torch.library.Library("megatron_dyt", "DEF")
_library.define(
    "dyt(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, Tensor? shift, str function,"
    " str implementation) -> Tensor"
)
# `needs` says which gradients of x, alpha, weight, bias, shift to compute and return, in that order.
_library.define(
    "dyt_backward(Tensor dy, Tensor x, Tensor alpha, Tensor weight, Tensor? shift, str function,"
    " bool[] needs, str implementation) -> Tensor[]"
)


def _dyt_kernel(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    implementation: str,
) -> Tensor:
    return _IMPLEMENTATIONS[implementation].forward(x, alpha, weight, bias, shift, function)


def _dyt_backward_kernel(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
    implementation: str,
) -> list[Tensor]:
    return _IMPLEMENTATIONS[implementation].backward(dy, x, alpha, weight, shift, function, needs)


def _dyt_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _dyt_backward_fake(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    function: str,
    needs: Sequence[bool],
    implementation: str,
) -> list[Tensor]:
    likes = (x, alpha, weight, weight, shift)
    return [torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in _needed(likes, needs)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha, weight, _, shift, ctx.function, ctx.implementation = inputs
    ctx.save_for_backward(x, alpha, weight, shift)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, alpha, weight, shift = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = iter(
        torch.ops.megatron_dyt.dyt_backward.default(
            dy, x, alpha, weight, shift, ctx.function, needs, ctx.implementation
        )
    )
    return (*(next(gradients) if needed else None for needed in needs), None, None)


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "DyT has no second derivative here, but gradients of its gradients were asked for "
        "(create_graph=True); compute them through megatron_dyt.ops.reference.dyt_forward instead"
    )


# One kernel for all devices: the table above, not the dispatcher, chooses the code.
_library.impl("dyt", _dyt_kernel, "CompositeExplicitAutograd")
_library.impl("dyt_backward", _dyt_backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_dyt::dyt", _dyt_fake, lib=_library)
torch.library.register_fake("megatron_dyt::dyt_backward", _dyt_backward_fake, lib=_library)
torch.library.register_autograd(
    "megatron_dyt::dyt", _differentiate, setup_context=_save_for_backward, lib=_library
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
    if function not in reference.FUNCTIONS:
        raise ValueError(f"function is {function!r}; allowed are {', '.join(reference.FUNCTIONS)}")
    if (shift is not None) != (function == "erf"):
        given = "no shift was" if shift is None else "a shift was"
        raise ValueError(
            f"{given} given with function={function!r}; "
            "give one, of shape (1,), for 'erf' and for nothing else"
        )
    implementation = choose_implementation(backend, x.device)
    y: Tensor = torch.ops.megatron_dyt.dyt.default(x, alpha, weight, bias, shift, function, implementation)
    return y


def _check_tensors(
    x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., hidden) with hidden >= 1")
    hidden = x.shape[-1]
    expected = (
        ("x", x, x.shape),
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
