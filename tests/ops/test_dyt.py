"""The op: values, gradients and every way torch runs it, against the fp64 reference."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_dyt.ops import cpu_dyt, dyt
from megatron_dyt.ops.dyt import choose_implementation
from megatron_dyt.ops.reference import FUNCTIONS, dyt_backward, dyt_forward

NAMES = ("x", "alpha", "weight", "bias", "shift")
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
    return {name: t.requires_grad_() for name, t in inputs.items()}


def call(inputs: dict[str, Tensor], function: str = "tanh", **options: Any) -> Tensor:
    positional = (inputs["x"], inputs["alpha"], inputs["weight"], inputs.get("bias"))
    return dyt(*positional, function=function, shift=inputs.get("shift"), **options)


def upstream(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def exact(inputs: dict[str, Tensor], dy: Tensor, function: str) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients by name from the reference in fp64."""
    t = {name: tensor.detach().double() for name, tensor in inputs.items()}
    shift = t.get("shift")
    y = dyt_forward(t["x"], t["alpha"], t["weight"], t.get("bias"), function=function, shift=shift)
    gradients = dyt_backward(
        dy.double(),
        t["x"],
        t["alpha"],
        t["weight"],
        has_bias="bias" in t,
        function=function,
        shift=shift,
    )
    return y, {n: g for n, g in zip(NAMES, gradients, strict=True) if g is not None}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    # Relative to the tensor's size: where terms cancel, an element may be small by chance.
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance,
        atol=min(tolerance, 2e-6) * scale,
        msg=lambda text: f"{name}: {text}",
    )


def check_against_exact(inputs: dict[str, Tensor], function: str, dy: Tensor | None = None) -> None:
    y = call(inputs, function)
    dy = upstream(y) if dy is None else dy
    gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    exact_y, exact_gradients = exact(inputs, dy, function)
    assert y.dtype == inputs["x"].dtype
    assert y.is_contiguous()
    assert_near(y, exact_y, TOLERANCE[y.dtype], "y")
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_near(gradient, exact_gradients[name], TOLERANCE[gradient.dtype], name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: str, bias: bool) -> None:
    inputs = make_inputs(function=function, bias=bias, dtype=torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        return call(dict(zip(inputs, tensors, strict=True)), function)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes(function: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    inputs = make_inputs((40, 24), function=function, dtype=dtype, parameter_dtype=parameter_dtype)
    check_against_exact(inputs, function)


SHAPES = [(1,), (7,), (0, 64), (1, 1), (3, 7), (2, 3, 64), (3, 1000), (3, 5000), (8193, 64)]


@pytest.mark.parametrize("chunk", [4096, cpu_dyt.CHUNK_ELEMENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_shapes(
    shape: tuple[int, ...],
    function: str,
    dtype: torch.dtype,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_dyt, "CHUNK_ELEMENTS", chunk)
    check_against_exact(make_inputs(shape, function=function, dtype=dtype), function)


@pytest.mark.parametrize("alpha", [-0.6, 0.0])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_alpha_of_any_sign(function: str, alpha: float) -> None:
    check_against_exact(make_inputs(function=function, alpha=alpha), function)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, :, 1::3],
        lambda x: x.flip(0)[:, :1].expand(-1, 7, -1),
    ],
    ids=["transposed", "sliced", "expanded"],
)
def test_strides_of_x(view: Any) -> None:
    inputs = make_inputs((6, 7, 12))
    strided = {**inputs, "x": view(inputs["x"].detach()).requires_grad_()}
    assert not strided["x"].is_contiguous()
    hidden = strided["x"].shape[-1]
    for name in ("weight", "bias"):
        strided[name] = inputs[name].detach()[:hidden].requires_grad_()
    check_against_exact(strided, "tanh")


def test_expanded_upstream_gradient() -> None:
    check_against_exact(make_inputs((6, 10)), "tanh", dy=torch.tensor(0.5).expand(6, 10))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_tanh_slope_is_accurate_to_saturation(implementation: str) -> None:
    # One row long enough for every fast path; alpha = weight = 1, so that dx is the slope itself.
    z = torch.cat([torch.linspace(-44, 44, 40_000), torch.linspace(-8, 8, 40_000)])
    one = torch.ones(1)
    (dx,) = torch.ops.megatron_dyt.dyt_backward(
        torch.ones_like(z),
        z,
        one,
        torch.ones_like(z),
        None,
        "tanh",
        [True, False, False, False, False],
        implementation,
    )
    expected = 1 / torch.cosh(z.double()) ** 2
    assert ((dx.double() - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize("size", [101, 200_001])
def test_tanh_value_is_accurate_from_denormal_to_saturated(size: int) -> None:
    z = torch.logspace(-39, 2, size, dtype=torch.float64).float()
    z = torch.cat([-z, z])
    y = dyt(z, torch.ones(1), torch.ones_like(z))
    torch.testing.assert_close(y.double(), torch.tanh(z.double()), rtol=3e-7, atol=1.5e-45)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("columns", [1, 30_000])
def test_saturated_infinite_and_nan_x(columns: int, implementation: str) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([100.0, -100.0, inf, -inf, 0.0, -0.0, 1e-40])[:, None].expand(-1, columns)
    weight, bias, one = torch.full((columns,), 2.0), torch.full((columns,), 0.5), torch.ones(1)
    args = (x, one, weight, bias, None, "tanh", implementation)
    expected = torch.tensor([2.5, -1.5, 2.5, -1.5, 0.5, 0.5, 0.5])
    torch.testing.assert_close(torch.ops.megatron_dyt.dyt(*args)[:, 0], expected, rtol=0, atol=0)
    dx, dalpha, dweight, dbias = torch.ops.megatron_dyt.dyt_backward(
        torch.ones_like(x), *args[:3], None, "tanh", [True] * 4 + [False], implementation
    )
    assert dx[:, -1].tolist() == [0, 0, 0, 0, 2, 2, 2]
    # Saturated rows add nothing to dalpha, infinite ones included: what is left is weight * 1e-40.
    torch.testing.assert_close(dalpha, torch.tensor([2e-40 * columns]), rtol=1e-4, atol=0)
    assert dweight[0].item() == pytest.approx(0, abs=1e-7)
    assert dbias[0].item() == len(expected)
    poisoned = x.clone()
    poisoned[3, 0] = nan
    y = torch.ops.megatron_dyt.dyt(poisoned, *args[1:])
    gradients = torch.ops.megatron_dyt.dyt_backward(
        torch.ones_like(x), poisoned, *args[1:3], None, "tanh", [True] * 3 + [False] * 2, implementation
    )
    assert y.isnan().sum() == 1
    assert y[3, 0].isnan()
    assert gradients[0].isnan().sum() == 1
    assert gradients[0][3, 0].isnan()
    assert gradients[1].isnan().all()
    assert gradients[2].isnan().nonzero().tolist() == [[0]]


def test_dweight_is_exact_to_fp32_of_the_range_of_tanh() -> None:
    # The CPU path's tanh in dweight is rounded like a number near 1, also where it is small itself.
    inputs = make_inputs((50, 40))
    inputs["x"] = (inputs["x"].detach() * 1e-3).requires_grad_()
    y = call(inputs)
    dy = upstream(y)
    (dweight,) = torch.autograd.grad(y, inputs["weight"], dy)
    error = (dweight.double() - exact(inputs, dy, "tanh")[1]["weight"]).abs()
    assert (error <= 1e-7 * dy.abs().sum(0)).all()
    assert error.max() < 1e-4 * dweight.abs().max()


FROZEN = [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_any_subset_of_gradients(implementation: str) -> None:
    inputs = make_inputs(function="erf")
    dy = upstream(inputs["x"])
    _, expected = exact(inputs, dy, "erf")
    for frozen in FROZEN:
        for name, tensor in inputs.items():
            tensor.requires_grad_(name not in frozen)
            tensor.grad = None
        args = (*inputs.values(), "erf", implementation)
        torch.ops.megatron_dyt.dyt(*args).backward(dy)
        for name, tensor in inputs.items():
            if name in frozen:
                assert tensor.grad is None
            else:
                assert tensor.grad is not None
                assert_near(tensor.grad, expected[name], 2e-6, f"{name} with {frozen} frozen")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", ["tanh", "erf", "identity"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_opcheck(implementation: str, function: str, bias: bool) -> None:
    inputs = make_inputs((4, 3, 10), function=function, bias=bias)
    x, alpha, weight = inputs["x"].transpose(0, 1), inputs["alpha"], inputs["weight"]
    shift = inputs.get("shift")
    torch.library.opcheck(
        torch.ops.megatron_dyt.dyt.default,
        (x, alpha, weight, inputs.get("bias"), shift, function, implementation),
    )
    needs = [True, True, True, bias, shift is not None]
    plain = [t if t is None else t.detach() for t in (x, alpha, weight, shift)]
    torch.library.opcheck(
        torch.ops.megatron_dyt.dyt_backward.default,
        (upstream(x), *plain, function, needs, implementation),
    )


def test_compiles_into_one_graph_with_equal_results() -> None:
    def layer(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dyt(torch.sin(x), alpha, weight, bias) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (6, 9, 17):  # the second compilation is for any number of rows
        inputs = list(make_inputs((rows, 10)).values())
        y = layer(*inputs)
        compiled_y = compiled(*inputs)
        dy = upstream(y)
        torch.testing.assert_close(compiled_y, y, rtol=0, atol=0)
        for actual, expected in zip(
            torch.autograd.grad(compiled_y, inputs, dy),
            torch.autograd.grad(y, inputs, dy),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    inputs = make_inputs()
    plain = call(inputs)
    dy = upstream(plain)
    plain.backward(dy)
    expected = {name: t.grad for name, t in inputs.items()}
    for tensor in inputs.values():
        tensor.grad = None
    y = checkpoint(lambda *t: dyt(*t), *inputs.values(), use_reentrant=use_reentrant)
    y.backward(dy)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, expected[name], rtol=0, atol=0, msg=name)


def test_nothing_but_the_inputs_is_kept_for_backward() -> None:
    inputs = make_inputs((16, 10), function="erf")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(inputs, "erf")
    pointers = {t.data_ptr() for t in inputs.values()}
    assert saved
    assert {t.data_ptr() for t in saved} <= pointers
    # Megatron's CheckpointWithoutOutput frees the output like this until it is recomputed.
    y.untyped_storage().resize_(0)
    dy = upstream(inputs["x"])
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    for (name, expected), actual in zip(exact(inputs, dy, "erf")[1].items(), gradients, strict=True):
        assert_near(actual, expected, 2e-6, name)


def test_two_uses_of_the_same_parameters_add_up() -> None:
    inputs = make_inputs()
    _, alpha, weight, bias = inputs.values()
    y = dyt(call(inputs), alpha, weight, bias)
    dy = upstream(y)
    actual = torch.autograd.grad(y, list(inputs.values()), dy)
    t = [v.detach().double().requires_grad_() for v in inputs.values()]
    inner = t[2] * torch.tanh(t[1] * t[0]) + t[3]
    expected = torch.autograd.grad(t[2] * torch.tanh(t[1] * inner) + t[3], t, dy.double())
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert_near(a, e, 2e-6, name)


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs()
    y = call(inputs)
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_is_deterministic() -> None:
    inputs = make_inputs((8193, 64))
    runs = []
    for _ in range(2):
        y = call(inputs)
        runs.append((y, *torch.autograd.grad(y, list(inputs.values()), upstream(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_the_backend_is_chosen_by_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_implementation("auto", cpu) == choose_implementation("torch", cpu) == "cpu"
    assert choose_implementation("auto", cuda) == choose_implementation("torch", cuda) == "reference"
    inputs = make_inputs()
    assert torch.equal(call(inputs, backend="torch"), call(inputs))


def test_training_after_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    # Temporaries that are kept between calls must not be made as inference tensors.
    monkeypatch.setattr(cpu_dyt, "_workspace", cpu_dyt._Workspace())
    inputs = make_inputs(dtype=torch.bfloat16)
    with torch.inference_mode():
        call(inputs)
    for tensor in cpu_dyt._workspace._memory.values():
        assert not tensor.is_inference()
    check_against_exact(inputs, "tanh")


def test_the_default_device_does_not_matter() -> None:
    inputs = make_inputs()
    dy = upstream(inputs["x"])
    with torch.device("meta"):
        y = call(inputs)
        gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    expected_y, expected = exact(inputs, dy, "tanh")
    assert_near(y, expected_y, 2e-6, "y")
    for gradient, (name, e) in zip(gradients, expected.items(), strict=True):
        assert_near(gradient, e, 2e-6, name)


def test_meta_tensors_give_a_meta_tensor() -> None:
    inputs = {name: t.detach().to("meta") for name, t in make_inputs((3, 4, 10)).items()}
    y = call(inputs)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 4, 10), torch.float32)


ONE, FOUR = torch.ones(1), torch.ones(4)
X = torch.ones(2, 4)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "0-d x": ((torch.ones(()), ONE, ONE), {}, r"x has shape \(\); .* hidden >= 1"),
    "no channels": ((torch.ones(2, 0), ONE, FOUR), {}, r"x has shape \(2, 0\)"),
    "0-d alpha": ((X, torch.tensor(0.5), FOUR), {}, r"alpha has shape \(\); .* must be \(1,\)"),
    "alpha for each channel": ((X, FOUR, FOUR), {}, r"alpha has shape \(4,\)"),
    "short weight": ((X, ONE, torch.ones(3)), {}, r"weight has shape \(3,\); .* must be \(4,\)"),
    "long bias": ((X, ONE, FOUR, torch.ones(5)), {}, r"bias has shape \(5,\)"),
    "2-d shift": (
        (X, ONE, FOUR),
        {"function": "erf", "shift": torch.ones(1, 1)},
        r"shift has shape \(1, 1\)",
    ),
    "integer x": ((X.int(), ONE, FOUR), {}, r"x has dtype torch.int32; allowed are torch.float32"),
    "complex weight": ((X, ONE, FOUR.to(torch.complex64)), {}, "weight has dtype torch.complex64"),
    "two devices": ((X, ONE, FOUR.to("meta")), {}, "weight is on meta but x is on cpu"),
    "bias of another dtype": ((X, ONE, FOUR, FOUR.half()), {}, "bias has dtype torch.float16 but"),
    "unknown function": ((X, ONE, FOUR), {"function": "relu"}, "function is 'relu'; .*tanh.*isru"),
    "erf without shift": ((X, ONE, FOUR), {"function": "erf"}, "no shift was given"),
    "tanh with shift": ((X, ONE, FOUR), {"shift": ONE}, "a shift was given with function='tanh'"),
    "unknown backend": ((X, ONE, FOUR), {"backend": "cuda"}, "backend is 'cuda'; .*auto, triton"),
    "triton": ((X, ONE, FOUR), {"backend": "triton"}, "not in this version yet, .* CUDA .*'auto'"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dyt(*args, **options)
