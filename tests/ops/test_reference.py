"""The reference against formulas written here in fp64 numpy, and against finite differences of them."""

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from megatron_dyt.config import Function
from megatron_dyt.ops.reference import FUNCTIONS, dyt_backward, dyt_forward

Array = np.ndarray
INF, NAN = math.inf, math.nan

# f and f', as a textbook has them.
FORMULAS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "erf": (np.vectorize(math.erf), lambda z: 2 / math.sqrt(math.pi) * np.exp(-(z**2))),
    "hardtanh": (lambda z: np.clip(z, -1, 1), lambda z: (np.abs(z) < 1).astype(z.dtype)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "isru": (lambda z: z / np.sqrt(1 + z**2), lambda z: (1 + z**2) ** -1.5),
    "arctan": (lambda z: np.arctan(z) / (np.pi / 2), lambda z: 2 / np.pi / (1 + z**2)),
    "satursin": (
        lambda z: np.where(np.abs(z) < np.pi / 2, np.sin(z), np.sign(z)),
        lambda z: np.where(np.abs(z) < np.pi / 2, np.cos(z), 0),
    ),
    "arcsinhclip": (
        lambda z: np.clip(np.log(z + np.sqrt(z**2 + 1)), -1, 1),
        lambda z: np.where(np.abs(z) < np.sinh(1), 1 / np.sqrt(z**2 + 1), 0),
    ),
    "identity": (lambda z: z, np.ones_like),
}


def formula_forward(function: str, inputs: dict[str, Array]) -> Array:
    z = inputs["alpha"] * inputs["x"] + inputs.get("shift", 0.0)
    return inputs["weight"] * FORMULAS[function][0](z) + inputs.get("bias", 0.0)


def formula_gradients(function: str, inputs: dict[str, Array], dy: Array) -> dict[str, Array]:
    value, slope = FORMULAS[function]
    x, alpha, weight = inputs["x"], inputs["alpha"], inputs["weight"]
    z = alpha * x + inputs.get("shift", 0.0)
    dz = dy * weight * slope(z)
    gradients = {
        "x": dz * alpha,
        "alpha": np.array([np.sum(dz * x)]),
        "weight": np.sum(dy * value(z), axis=(0, 1)),
        "bias": np.sum(dy, axis=(0, 1)),
        "shift": np.array([np.sum(dz)]),
    }
    return {name: gradients[name] for name in inputs}


def make_inputs(function: str, bias: bool, alpha: float = 0.7) -> tuple[dict[str, Array], Array]:
    random = np.random.default_rng(0)
    inputs = {
        "x": random.normal(size=(3, 4, 5)) * 2,
        "alpha": np.array([alpha]),
        "weight": random.normal(size=5),
    }
    if bias:
        inputs["bias"] = random.normal(size=5)
    if function == "erf":
        inputs["shift"] = np.array([0.3])
    return inputs, random.normal(size=(3, 4, 5))


def run_reference(function: str, inputs: dict[str, Array], dy: Array) -> tuple[Array, dict[str, Array]]:
    """y and the gradients by name, from fp64 tensors."""
    t = {name: torch.from_numpy(array) for name, array in inputs.items()}
    y = dyt_forward(t["x"], t["alpha"], t["weight"], t.get("bias"), function=function, shift=t.get("shift"))
    gradients = dyt_backward(
        torch.from_numpy(dy),
        t["x"],
        t["alpha"],
        t["weight"],
        has_bias="bias" in t,
        function=function,
        shift=t.get("shift"),
    )
    names = ("x", "alpha", "weight", "bias", "shift")
    by_name = {n: g.numpy() for n, g in zip(names, gradients, strict=True) if g is not None}
    return y.numpy(), by_name


def test_the_functions_are_those_that_flags_and_configs_name() -> None:
    assert set(FUNCTIONS) == set(get_args(Function)) == set(FORMULAS)


@pytest.mark.parametrize("alpha", [0.7, -0.7, 0.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", FORMULAS)
def test_values_and_gradients_are_the_formula(function: str, bias: bool, alpha: float) -> None:
    inputs, dy = make_inputs(function, bias, alpha)
    y, gradients = run_reference(function, inputs, dy)
    np.testing.assert_allclose(y, formula_forward(function, inputs), rtol=1e-13, atol=1e-14)
    expected = formula_gradients(function, inputs, dy)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, expected[name], rtol=1e-12, atol=1e-13, err_msg=name, strict=True
        )


@pytest.mark.parametrize("function", FORMULAS)
def test_gradients_are_central_differences_of_the_values(function: str) -> None:
    inputs, dy = make_inputs(function, bias=True)
    _, gradients = run_reference(function, inputs, dy)
    step = 1e-6
    for name, array in inputs.items():
        for index in np.ndindex(array.shape):
            losses = []
            for sign in (1, -1):
                moved = {**inputs, name: array.copy()}
                moved[name][index] += sign * step
                losses.append(np.sum(dy * run_reference(function, moved, dy)[0]))
            difference = (losses[0] - losses[1]) / (2 * step)
            assert gradients[name][index] == pytest.approx(difference, rel=1e-6, abs=1e-8), name


def test_tanh_slope_in_fp32_is_accurate_where_1_minus_tanh_squared_is_not() -> None:
    z = torch.linspace(-43, 43, 20001)
    expected = 1 / torch.cosh(z.double()) ** 2
    error = (FUNCTIONS["tanh"].slope(z).double() - expected).abs() / expected
    assert error.max() < 5e-7


# (z, f(z), f'(z)) where overflow, underflow or cancellation would show.
EXTREMES = [
    ("tanh", 100.0, 1.0, 0.0),
    ("tanh", INF, 1.0, 0.0),
    ("tanh", 1e-40, 1e-40, 1.0),
    ("erf", 100.0, 1.0, 0.0),
    ("erf", INF, 1.0, 0.0),
    ("erf", 1e-30, 2 / math.sqrt(math.pi) * 1e-30, 2 / math.sqrt(math.pi)),
    ("hardtanh", 1.0, 1.0, 0.0),
    ("hardtanh", INF, 1.0, 0.0),
    ("hardtanh", 1e-40, 1e-40, 1.0),
    ("arctan", INF, 1.0, 0.0),
    ("arctan", 1e-30, 2 / math.pi * 1e-30, 2 / math.pi),
    ("satursin", 100.0, 1.0, 0.0),
    ("satursin", INF, 1.0, 0.0),
    ("arcsinhclip", 1e30, 1.0, 0.0),
    ("arcsinhclip", INF, 1.0, 0.0),
    ("isru", 1e30, 1.0, 0.0),
    ("isru", INF, 1.0, 0.0),
    ("isru", 1e-30, 1e-30, 1.0),
    ("isru", 1e-40, 1e-40, 1.0),
    ("identity", INF, INF, 1.0),
    ("identity", 1e-40, 1e-40, 1.0),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("function", "z", "value", "slope"), EXTREMES)
def test_odd_functions_at_extremes(function: str, z: float, value: float, slope: float, sign: int) -> None:
    f = FUNCTIONS[function]
    point = torch.tensor([sign * z])
    torch.testing.assert_close(f.value(point), torch.tensor([sign * value]), rtol=1e-6, atol=0)
    torch.testing.assert_close(f.slope(point), torch.tensor([slope]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("z", "value", "slope"), [(INF, 1.0, 0.0), (-INF, 0.0, 0.0), (0.0, 0.5, 0.25)])
def test_sigmoid_at_extremes(z: float, value: float, slope: float) -> None:
    f = FUNCTIONS["sigmoid"]
    assert (f.value(torch.tensor(z)).item(), f.slope(torch.tensor(z)).item()) == (value, slope)


def test_sigmoid_slope_does_not_cancel_for_large_z() -> None:
    slope = FUNCTIONS["sigmoid"].slope(torch.tensor([20.0, -20.0]))
    expected = torch.full((2,), math.exp(-20) / (1 + math.exp(-20)) ** 2)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", FORMULAS)
def test_nan_reaches_the_value_and_the_slope(function: str) -> None:
    f, nan = FUNCTIONS[function], torch.tensor([NAN])
    assert f.value(nan).isnan().item()
    if function != "identity":  # whose slope does not depend on z
        assert f.slope(nan).isnan().item()


@pytest.mark.parametrize("function", [name for name in FORMULAS if name != "identity"])
def test_saturation_is_where_the_slope_has_fallen_to_7_percent(function: str) -> None:
    f = FUNCTIONS[function]
    z = f.saturation + torch.tensor([-0.01, 0.01], dtype=torch.float64)
    before, after = (f.slope(z) / f.slope(torch.zeros(1, dtype=torch.float64))).tolist()
    assert before > 0.0701
    assert after < 0.0717


def test_the_identity_never_saturates() -> None:
    assert FUNCTIONS["identity"].saturation == math.inf


@pytest.mark.parametrize("function", [name for name in FORMULAS if name != "identity"])
def test_an_infinite_x_adds_its_limit_to_each_gradient(function: str) -> None:
    shift = torch.zeros(1) if function == "erf" else None
    x = torch.tensor([[INF, 0.5], [-INF, 0.25]])
    dx, dalpha, dweight, dbias, dshift = dyt_backward(
        torch.ones(2, 2),
        x,
        torch.ones(1),
        torch.ones(2),
        has_bias=True,
        function=function,
        shift=shift,
    )
    slope = FORMULAS[function][1](np.array([0.5, 0.25]))
    value = FORMULAS[function][0](np.array([0.5, 0.25]))
    expected_dx = torch.tensor([[0, slope[0]], [0, slope[1]]], dtype=torch.float32)
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(dalpha.item(), slope @ [0.5, 0.25], rtol=1e-6, atol=0)
    limit = 1.0 if function == "sigmoid" else 0.0  # f(inf) + f(-inf)
    torch.testing.assert_close(dweight, torch.tensor([limit, value.sum()], dtype=torch.float32))
    assert dbias is not None
    assert dbias.tolist() == [2.0, 2.0]
    if dshift is not None:
        torch.testing.assert_close(dshift.item(), slope.sum(), rtol=1e-6, atol=0)


def test_each_gradient_has_the_dtype_of_its_tensor_and_is_summed_in_fp32() -> None:
    rows = 1001  # bf16 cannot hold it, and a bf16 sum of ones stops at 256
    x = torch.full((rows, 2), 10.0, dtype=torch.bfloat16)
    dx, dalpha, dweight, dbias, dshift = dyt_backward(
        torch.ones_like(x),
        x,
        torch.ones(1, dtype=torch.float16),
        torch.ones(2),
        has_bias=True,
        function="erf",
        shift=torch.zeros(1, dtype=torch.float64),
    )
    assert dbias is not None
    assert dshift is not None
    dtypes = [t.dtype for t in (dx, dalpha, dweight, dbias, dshift)]
    assert dtypes == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float32,
        torch.float64,
    ]
    assert dweight.tolist() == [rows, rows]
    assert dbias.tolist() == [rows, rows]


def test_bf16_is_rounded_once_at_the_end() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    alpha, weight, bias = torch.tensor([0.3]), torch.randn(8), torch.randn(8)
    y = dyt_forward(x, alpha, weight, bias)
    exact = dyt_forward(x.double(), alpha.double(), weight.double(), bias.double())
    assert y.dtype == torch.bfloat16
    half_ulp = exact.abs() * 2**-8 + 1e-7
    assert ((y.double() - exact).abs() <= half_ulp).all()
