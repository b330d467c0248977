"""What can run DyT (Triton kernels, torch.compile, CPU code, plain torch), and the one place that chooses."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, reference
from megatron_dyt.ops.parameters import Parameters

BACKENDS = ("auto", "triton", "torch")


class Implementation(NamedTuple):
    """Code for one backend.

    Attributes:
        backend: what a caller names to have it.
        supports: whether it runs for this device, function, dtype of x, and number of alphas.
        forward: (x, parameters, out=None): `reference.dyt_forward`, contiguous; in `out`, which is, if given.
        residual_forward: (x, residual, parameters): forward of x + residual, and x + residual, contiguous.
        backward: (dy, x, parameters, needs, dsum): `reference.dyt_backward`, with `dsum`, if any, added to
            dx. Those gradients of x, alpha, weight, bias and shift that `needs` asks for, in this order.
    """

    backend: str
    supports: Callable[[torch.device, str, torch.dtype, int], bool]
    forward: Callable[..., Tensor]
    residual_forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]


def _add_first(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """residual_forward of an implementation that has no kernel for it."""

    def residual_forward(x: Tensor, residual: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        total = torch.add(x, residual).contiguous()
        return forward(total, parameters), total

    return residual_forward


def _add_last(backward: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """backward of an implementation that does not know `dsum`."""

    def backward_with_sum(
        dy: Tensor, x: Tensor, parameters: Parameters, needs: Sequence[bool], dsum: Tensor | None
    ) -> list[Tensor]:
        gradients = backward(dy, x, parameters, tuple(needs))
        if dsum is not None and needs[0]:
            gradients[0] += dsum
        return gradients

    return backward_with_sum


def _reference_forward(x: Tensor, parameters: Parameters, out: Tensor | None = None) -> Tensor:
    y = reference.dyt_forward(x, *parameters)
    return y.contiguous() if out is None else out.copy_(y)


def _reference_backward(
    dy: Tensor, x: Tensor, parameters: Parameters, needs: tuple[bool, ...]
) -> list[Tensor]:
    alpha, weight, _, shift, _ = parameters
    function = parameters.name
    dx, *of_parameters = reference.dyt_backward(dy, x, alpha, weight, shift, function, has_bias=needs[3])
    return needed_gradients((dx.contiguous(), *of_parameters), needs)


def _in_triton(name: str) -> Callable[..., Any]:
    """A function of `triton_dyt`, which is imported at the first call: it takes Triton to be there."""

    def call(*args: Any) -> Any:
        from megatron_dyt.ops import triton_dyt

        return getattr(triton_dyt, name)(*args)

    return call


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, for any shapes, made once."""
    return torch.compile(function, dynamic=True)


def _compiled_forward(*args: Any) -> Tensor:
    y: Tensor = compiled(_reference_forward)(*args)
    return y


def _compiled_backward(*args: Any) -> list[Tensor]:
    gradients: list[Tensor] = compiled(_reference_backward)(*args)
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


def _runs_our_kernels(device: torch.device, function: str, dtype: torch.dtype, groups: int) -> bool:
    if not _runs_triton(device) or groups != 1:
        return False
    from megatron_dyt.ops import triton_dyt

    return function in triton_dyt.FUNCTIONS and dtype in triton_dyt.DTYPES


def _runs_cpu_kernels(device: torch.device, function: str, dtype: torch.dtype, groups: int) -> bool:
    return (
        device.type == "cpu"
        and groups == 1
        and function in cpu_dyt.FUNCTIONS
        and dtype in cpu_dyt.DTYPES
        and cpu_dyt.IS_BUILT
    )


# In order of preference: the first that has the wanted backend and supports the call runs. On a CPU the
# Triton kernels run interpreted, so there they come after the code made for it.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation(
        "torch", _runs_cpu_kernels, cpu_dyt.forward, cpu_dyt.residual_forward, cpu_dyt.backward
    ),
    "triton": Implementation(
        "triton",
        _runs_our_kernels,
        _in_triton("forward"),
        _in_triton("residual_forward"),
        _in_triton("backward"),
    ),
    # Inductor makes Triton kernels of what ours do not have: functions, dtypes, an alpha by channel.
    "compiled": Implementation(
        "triton",
        lambda device, function, dtype, groups: _runs_triton(device),
        _compiled_forward,
        _add_first(_compiled_forward),
        _add_last(_compiled_backward),
    ),
    "reference": Implementation(
        "torch",
        lambda device, function, dtype, groups: True,
        _reference_forward,
        _add_first(_reference_forward),
        _add_last(_reference_backward),
    ),
}


def choose_implementation(
    backend: str,
    device: torch.device,
    function: str = "tanh",
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
) -> str:
    """The implementation that runs for this backend, device, function, dtype of x and number of alphas.

    Raises:
        ValueError: there is none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    if backend == "auto":
        _warn_without_kernels(device.type)
    for name, implementation in IMPLEMENTATIONS.items():
        if backend in ("auto", implementation.backend) and implementation.supports(
            device, function, dtype, groups
        ):
            return name
    missing = "" if triton_is_installed() else ", and the package triton, which is not installed"
    raise ValueError(
        f"backend {backend!r} cannot run on {device}: the Triton kernels need a CUDA or ROCm device"
        f"{missing}; use backend='auto' or 'torch'"
    )


@functools.cache
def _warn_without_kernels(device_type: str) -> None:
    """Say once that DyT will be slow on such a device."""
    if device_type == "cuda" and not triton_is_installed():
        missing, remedy = "the package triton is not installed", "install triton"
    elif device_type == "cpu" and not cpu_dyt.IS_BUILT:
        missing = f"DyT's kernels for CPUs are missing, or of another source ({cpu_dyt.LIBRARY})"
        remedy = (
            "install a C compiler with OpenMP (gcc) and have them compiled: 'make setup' in a checkout, else "
            "pip install --force-reinstall --no-deps --no-cache-dir --no-binary megatron-dyt megatron-dyt"
        )
    else:
        return
    warnings.warn(
        f"{missing}, so DyT runs as plain torch code, several times slower; {remedy}, or give "
        "backend='torch' to say that this is meant",
        stacklevel=5,  # who calls `dyt`, past it, `_prepare` and `choose_implementation`
    )


def needed_gradients(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Those gradients that are needed, in their order."""
    return [t for t, needed in zip(gradients, needs, strict=True) if needed and t is not None]
