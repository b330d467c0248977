"""Inputs and checks that the tests of all implementations share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, dyt, dyt_residual
from megatron_dyt.ops.parameters import Parameters
from megatron_dyt.ops.reference import dyt_backward, dyt_forward

NAMES = ("x", "alpha", "weight", "bias", "shift")
needs_cpu_kernels = pytest.mark.skipif(
    not cpu_dyt.IS_BUILT, reason="the CPU kernels are not compiled: install gcc, then 'make setup'"
)
CPU_IMPLEMENTATIONS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]

# Relative error of one rounding to the dtype, with room for fp32's own error in sums.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def make_inputs(
    shape: tuple[int, ...] = (6, 10),
    *,
    function: str = "tanh",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    alpha: float = 0.6,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Leaf tensors by name that require gradients; x is about N(0, 4), so that f saturates in part."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {
        "x": (2 * random(*shape)).to(dtype),
        "alpha": torch.tensor([alpha]),
        "weight": 1 + random(shape[-1]),
    }
    if bias:
        inputs["bias"] = random(shape[-1])
    if function == "erf":
        inputs["shift"] = torch.tensor([0.2])
    for name in inputs.keys() - {"x"}:
        inputs[name] = inputs[name].to(parameter_dtype or dtype)
    return {name: t.to(device).requires_grad_() for name, t in inputs.items()}


def split(inputs: dict[str, Tensor], function: str = "tanh") -> tuple[Tensor, Parameters]:
    """x, and what else is in the inputs."""
    alpha, weight = inputs["alpha"], inputs["weight"]
    return inputs["x"], Parameters(alpha, weight, inputs.get("bias"), inputs.get("shift"), function)


def unit(columns: int, function: str = "tanh", *, device: str = "cpu") -> Parameters:
    """Parameters with which DyT is the function itself."""
    one, weight = torch.ones(1, device=device), torch.ones(columns, device=device)
    return Parameters(one, weight, None, torch.zeros_like(one) if function == "erf" else None, function)


def call(inputs: dict[str, Tensor], function: str = "tanh", **options: Any) -> Tensor:
    x, (alpha, weight, bias, shift, _) = split(inputs, function)
    return dyt(x, alpha, weight, bias, function=function, shift=shift, **options)


def upstream(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def exact(inputs: dict[str, Tensor], dy: Tensor, function: str) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients by name from the reference in fp64."""
    x, parameters = split({name: t.detach().double() for name, t in inputs.items()}, function)
    alpha, weight, bias, shift, _ = parameters
    y = dyt_forward(x, *parameters)
    gradients = dyt_backward(dy.double(), x, alpha, weight, shift, function, has_bias=bias is not None)
    return y, {n: g for n, g in zip(NAMES, gradients, strict=True) if g is not None}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str, slack: float = 2e-6) -> None:
    # Slack is relative to the tensor's size: where terms cancel, an element may be small by chance.
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance,
        atol=min(tolerance, slack) * scale,
        msg=lambda text: f"{name}: {text}",
    )


def check_against_exact(
    inputs: dict[str, Tensor],
    function: str,
    dy: Tensor | None = None,
    *,
    tolerance: dict[torch.dtype, float] = TOLERANCE,
    slack: float = 2e-6,
    **options: Any,
) -> None:
    """Values and all gradients of `dyt` against the reference in fp64."""
    y = call(inputs, function, **options)
    dy = upstream(y) if dy is None else dy
    gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    exact_y, exact_gradients = exact(inputs, dy, function)
    assert y.dtype == inputs["x"].dtype
    assert y.is_contiguous()
    assert_near(y, exact_y, tolerance[y.dtype], "y", slack)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_near(gradient, exact_gradients[name], tolerance[gradient.dtype], name, slack)


def add_residual(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The inputs with a leaf `residual` like x."""
    x = inputs["x"]
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return {**inputs, "residual": residual.to(dtype or x.dtype).requires_grad_()}


def call_residual(inputs: dict[str, Tensor], function: str = "tanh", **options: Any) -> tuple[Tensor, Tensor]:
    x, (alpha, weight, bias, shift, _) = split(inputs, function)
    return dyt_residual(x, inputs["residual"], alpha, weight, bias, function=function, shift=shift, **options)


def check_residual_against_exact(
    inputs: dict[str, Tensor],
    function: str,
    *,
    tolerance: dict[torch.dtype, float] = TOLERANCE,
    slack: float = 2e-6,
    **options: Any,
) -> None:
    """Both results and all gradients of `dyt_residual` against the reference in fp64.

    The sum is checked first; what follows from it takes it as it is, rounded.
    """
    x, residual = inputs["x"], inputs["residual"]
    y, total = call_residual(inputs, function, **options)
    assert y.dtype == total.dtype == torch.promote_types(x.dtype, residual.dtype)
    assert y.is_contiguous()
    assert total.is_contiguous()
    assert_near(total, x.detach().double() + residual.detach().double(), tolerance[total.dtype], "sum")
    dy, dsum = upstream(y), 3 * upstream(y).flip(-1)
    gradients = dict(
        zip(inputs, torch.autograd.grad((y, total), list(inputs.values()), (dy, dsum)), strict=True)
    )
    of_sum = {"x": total, **{n: t for n, t in inputs.items() if n not in ("x", "residual")}}
    exact_y, expected = exact(of_sum, dy, function)
    assert_near(y, exact_y, tolerance[y.dtype], "y", slack)
    expected["x"] = expected["x"] + dsum.double()
    expected["residual"] = expected["x"]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_near(gradient, expected[name], tolerance[gradient.dtype], f"d{name}", slack)


def check_operations(inputs: dict[str, Tensor], function: str, implementation: str) -> None:
    """torch.library.opcheck of all operations, without and with a residual or its gradient."""
    x, parameters = split(inputs, function)
    residual = x.detach().flip(0).requires_grad_()
    operations = torch.ops.megatron_dyt
    torch.library.opcheck(operations.dyt.default, (x, *parameters, implementation))
    torch.library.opcheck(operations.dyt_residual.default, (x, residual, *parameters, implementation))
    plain = Parameters(*(t.detach() if isinstance(t, Tensor) else t for t in parameters))
    needs = [True] * 3 + [parameters.bias is not None, parameters.shift is not None]
    for dsum in (None, upstream(x)):
        args = (upstream(x), x.detach(), *plain._replace(bias=None), implementation, needs, dsum)
        torch.library.opcheck(operations.dyt_backward.default, args)
