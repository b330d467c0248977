"""The op: values, gradients and every way torch runs it, against the fp64 reference."""

import importlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import backends, cpu_dyt, dyt, dyt_fork, dyt_residual
from megatron_dyt.ops.backends import choose_implementation
from megatron_dyt.ops.reference import FUNCTIONS
from tests.ops.cases import (
    CPU_IMPLEMENTATIONS,
    NAMES,
    TOLERANCE,
    add_residual,
    assert_near,
    call,
    call_residual,
    check_against_exact,
    check_operations,
    check_residual_against_exact,
    exact,
    make_inputs,
    needs_cpu_kernels,
    split,
    upstream,
)

# The name `megatron_dyt.ops.dyt` is the function.
dyt_module = importlib.import_module("megatron_dyt.ops.dyt")


def check_gradients(inputs: dict[str, Tensor], function: Any) -> None:
    def run(*tensors: Tensor) -> Tensor:
        return call(dict(zip(inputs, tensors, strict=True)), function)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: str, bias: bool) -> None:
    inputs = make_inputs(function=function, bias=bias, dtype=torch.float64)
    check_gradients(inputs, function)


def plain(function: Any, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula for x (..., 12), an alpha for each of its groups, in the dtype of its inputs."""
    z = (x.unflatten(-1, (len(alpha), -1)) * alpha[:, None]).flatten(-2)
    return weight * function(z) + bias


# As the caller names it, and as torch has it.
VARIANTS = [("tanh", torch.tanh), ("hardtanh", torch.nn.functional.hardtanh), (torch.sin, torch.sin)]


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(("function", "f"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_by_group_and_functions_of_ones_own(
    function: Any, f: Any, groups: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs((5, 7, 12), dtype=dtype)
    inputs["alpha"] = torch.linspace(0.3, 1.7, groups).to(dtype).requires_grad_()
    tensors = list(inputs.values())
    doubles = [each.detach().double().requires_grad_() for each in tensors]
    x, *parameters = tensors
    expected = plain(f, *doubles)
    dy = upstream(x)
    gradients = torch.autograd.grad(expected, doubles, dy.double())
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    # dx with the gradient of the second result, if there is one.
    ways: dict[str, tuple[tuple[Tensor, ...], float]] = {
        "dyt": ((dyt(x, *parameters, function=function),), 0.0),
        "compiled": ((torch.compile(dyt, backend="aot_eager")(x, *parameters, function=function),), 0.0),
        "residual": (dyt_residual(x, zeros, *parameters, function=function), 1.0),
        "fork": (dyt_fork(x, *parameters, function=function), 1.0),
    }
    for way, (results, other) in ways.items():
        assert_near(results[0], expected, TOLERANCE[dtype], way)
        found = torch.autograd.grad(results, tensors, (dy, ones)[: len(results)])
        for name, mine, right in zip(inputs, found, gradients, strict=True):
            right = right + other if name == "x" else right
            # Two gradients that are each rounded to x's dtype may cancel in their sum.
            slack = 2 * TOLERANCE[dtype] if name == "x" else 2e-6
            assert_near(mine, right, 2 * TOLERANCE[dtype], f"{way}: {name}", slack)


@pytest.mark.parametrize("groups", [2, 10])
@pytest.mark.parametrize("function", ["tanh", "erf", torch.atan])
def test_gradcheck_of_groups(function: Any, groups: int) -> None:
    inputs = make_inputs(function=function, dtype=torch.float64)
    inputs["alpha"] = torch.linspace(0.3, 1.7, groups, dtype=torch.float64).requires_grad_()
    check_gradients(inputs, function)


def test_kernels_are_for_one_alpha() -> None:
    assert choose_implementation("auto", torch.device("cpu"), groups=2) == "reference"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every pair of a function and a dtype, every pair of dtypes.
DTYPE_CASES = [
    (function, dtype, DTYPES[(i + j) % 3])
    for i, function in enumerate(FUNCTIONS)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("function", "dtype", "parameter_dtype"), DTYPE_CASES, ids=str)
def test_dtypes(function: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    inputs = make_inputs((40, 24), function=function, dtype=dtype, parameter_dtype=parameter_dtype)
    check_against_exact(inputs, function)


SHAPES = [(1,), (7,), (0, 64), (1, 1), (3, 7), (2, 3, 64), (3, 1000), (3, 5000), (8193, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_shapes(shape: tuple[int, ...], function: str, dtype: torch.dtype) -> None:
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


def test_dweight_of_small_x_is_accurate_to_the_size_of_tanh() -> None:
    inputs = make_inputs((50, 40))
    inputs["x"] = (inputs["x"].detach() * 1e-3).requires_grad_()
    y = call(inputs)
    dy = upstream(y)
    (dweight,) = torch.autograd.grad(y, inputs["weight"], dy)
    error = (dweight.double() - exact(inputs, dy, "tanh")[1]["weight"]).abs()
    assert (error <= 3e-7 * (dy * y).abs().sum(0)).all()


FROZEN = [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_any_subset_of_gradients(implementation: str) -> None:
    inputs = make_inputs(function="erf")
    dy = upstream(inputs["x"])
    _, expected = exact(inputs, dy, "erf")
    for frozen in FROZEN:
        for name, tensor in inputs.items():
            tensor.requires_grad_(name not in frozen)
            tensor.grad = None
        x, parameters = split(inputs, "erf")
        torch.ops.megatron_dyt.dyt(x, *parameters, implementation).backward(dy)
        for name, tensor in inputs.items():
            if name in frozen:
                assert tensor.grad is None
            else:
                assert tensor.grad is not None
                assert_near(tensor.grad, expected[name], 2e-6, f"{name} with {frozen} frozen")


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    # Neither bias nor shift, and both.
    function = "tanh" if implementation == "reference" else "erf"
    inputs = make_inputs((4, 3, 10), function=function, bias=function == "erf")
    check_operations({**inputs, "x": inputs["x"].transpose(0, 1)}, function, implementation)


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


def test_is_deterministic() -> None:
    inputs = make_inputs((8193, 64))
    runs = []
    for _ in range(2):
        y = call(inputs)
        runs.append((y, *torch.autograd.grad(y, list(inputs.values()), upstream(y))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@needs_cpu_kernels
def test_the_backend_is_chosen_by_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_implementation("auto", cpu) == choose_implementation("torch", cpu) == "cpu"
    assert choose_implementation("auto", cuda) == choose_implementation("triton", cuda) == "triton"
    assert (
        choose_implementation("torch", cuda)
        == choose_implementation("auto", torch.device("mps"))
        == "reference"
    )
    inputs = make_inputs()
    assert torch.equal(call(inputs, backend="torch"), call(inputs))


@pytest.mark.parametrize(
    ("function", "dtype"), [("hardtanh", torch.float32), ("tanh", torch.float64), ("erf", torch.float16)]
)
def test_what_the_cpu_kernels_lack_is_plain_torch(function: str, dtype: torch.dtype) -> None:
    assert choose_implementation("auto", torch.device("cpu"), function, dtype) == "reference"


@pytest.mark.parametrize(("function", "dtype"), [("hardtanh", torch.bfloat16), ("tanh", torch.float64)])
def test_what_our_kernels_lack_is_compiled_on_cuda(function: str, dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    assert choose_implementation("auto", cuda, function, dtype) == "compiled"
    assert choose_implementation("triton", cuda, function, dtype) == "compiled"
    assert choose_implementation("torch", cuda, function, dtype) == "reference"


def check_warns_once_and_runs_torch_code(device: torch.device, message: str) -> None:
    backends._warn_without_kernels.cache_clear()
    with pytest.warns(UserWarning, match=message):
        assert choose_implementation("auto", device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation("auto", device) == choose_implementation("torch", device) == "reference"
    backends._warn_without_kernels.cache_clear()


def test_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_is_installed", lambda: False)
    cuda = torch.device("cuda")
    check_warns_once_and_runs_torch_code(cuda, "the package triton is not installed, so DyT runs as plain")
    with pytest.raises(ValueError, match="need a CUDA or ROCm device, and the package triton, which is not"):
        choose_implementation("triton", cuda)


def test_cpu_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_dyt, "IS_BUILT", False)
    message = r"kernels for CPUs are missing, .*install a C compiler with OpenMP \(gcc\)"
    check_warns_once_and_runs_torch_code(torch.device("cpu"), message)
    check_against_exact(make_inputs(), "tanh")


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
    "alphas": ((X, torch.ones(3), FOUR), {}, r"alpha has 3 values for 4 channels; .* divides 4"),
    "no alpha": ((X, torch.ones(0), FOUR), {}, "alpha has 0 values for 4 channels"),
    "2-d alpha": ((X, torch.ones(2, 2), FOUR), {}, r"alpha has shape \(2, 2\); .* must be \(4,\)"),
    "not elementwise": ((X, ONE, FOUR), {"function": lambda z: z.sum(-1)}, "it must keep the shape"),
    "own function with kernels": (
        (X, ONE, FOUR),
        {"function": torch.sin, "backend": "triton"},
        "backend is 'triton', but a function of your own runs as torch code; use backend='auto' or 'torch'",
    ),
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
    "triton": ((X, ONE, FOUR), {"backend": "triton"}, "backend 'triton' cannot run on cpu: .* CUDA .*'auto'"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dyt(*args, **options)


RESIDUAL_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "residual_dtype"), RESIDUAL_DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_residual(function: str, dtype: torch.dtype, residual_dtype: torch.dtype, bias: bool) -> None:
    inputs = make_inputs((5, 3, 24), function=function, bias=bias, dtype=dtype)
    # Three roundings of dx to bf16, as in the code without fusion: of DyT's share, of the sum, of its copy.
    tolerance = TOLERANCE | {torch.bfloat16: 3 * 2**-8}
    check_residual_against_exact(
        add_residual(inputs, residual_dtype), function, tolerance=tolerance, slack=2**-9
    )


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_residual_equals_add_then_dyt(implementation: str) -> None:
    inputs = add_residual(make_inputs((4, 3, 10)))
    inputs["x"] = inputs["x"].detach().transpose(0, 1).requires_grad_()
    inputs["residual"] = inputs["residual"].detach().transpose(0, 1).requires_grad_()
    x, parameters = split(inputs)
    y, total = torch.ops.megatron_dyt.dyt_residual(x, inputs["residual"], *parameters, implementation)
    plain_total = x + inputs["residual"]
    plain_y = torch.ops.megatron_dyt.dyt(plain_total, *parameters, implementation)
    dy, dsum = upstream(y), upstream(y) - 1
    actual = torch.autograd.grad((y, total), list(inputs.values()), (dy, dsum))
    expected = torch.autograd.grad((plain_y, plain_total), list(inputs.values()), (dy, dsum))
    for name, a, e in zip(
        ("y", "sum", *inputs), (y, total, *actual), (plain_y, plain_total, *expected), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=0, atol=0, msg=name)


def test_residual_with_one_result_unused() -> None:
    inputs = add_residual(make_inputs())
    dy = upstream(inputs["x"])
    y, total = call_residual(inputs)
    _, expected = exact({**inputs, "x": total}, dy, "tanh")
    for name, gradient in zip(
        NAMES[:4], torch.autograd.grad(y, [inputs[n] for n in NAMES[:4]], dy), strict=True
    ):
        assert_near(gradient, expected[name], 2e-6, name)
    _, total = call_residual(inputs)
    total.backward(dy)
    for name in ("x", "residual"):
        assert torch.equal(inputs[name].grad, dy)
    assert inputs["x"].grad is not inputs["residual"].grad
    assert inputs["weight"].grad is None


@pytest.mark.parametrize("needed", [("x",), ("residual",), ("weight",), ("x", "alpha"), ("residual", "bias")])
def test_residual_with_frozen_inputs(needed: tuple[str, ...]) -> None:
    inputs = add_residual(make_inputs())
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in needed)
    y, total = call_residual(inputs)
    dy = upstream(y)
    torch.autograd.backward([y] + [total] * total.requires_grad, [dy] + [dy] * total.requires_grad)
    _, expected = exact({**inputs, "x": total}, dy, "tanh")
    expected["x"] = expected["residual"] = expected["x"] + dy
    for name, tensor in inputs.items():
        if name in needed:
            assert_near(tensor.grad, expected[name], 2e-6, name)
        else:
            assert tensor.grad is None


def test_residual_keeps_only_the_sum_for_backward() -> None:
    inputs = add_residual(make_inputs((16, 10)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total = call_residual(inputs)
    kept = {t.data_ptr() for t in saved if t.numel() > 10}
    assert kept == {total.data_ptr()}


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.ones(3, 4), r"residual has shape \(3, 4\); for x of shape \(2, 4\) it must be \(2, 4\)"),
        (torch.ones(4), r"residual has shape \(4,\)"),
        (X.int(), "residual has dtype torch.int32"),
        (X.to("meta"), "residual is on meta but x is on cpu"),
    ],
    ids=["rows", "broadcast", "dtype", "device"],
)
def test_bad_residual(residual: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dyt_residual(X, residual, ONE, FOUR)


@pytest.mark.parametrize("function", ["hardtanh", "identity"])
def test_what_has_no_kernel_can_be_compiled(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced by Dynamo as for CUDA, run without code generation.
    def compile_without_codegen(f: Any) -> Any:
        return torch.compile(f, dynamic=True, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(backends, "compiled", compile_without_codegen)
    monkeypatch.setattr(dyt_module, "choose_implementation", lambda *args: "compiled")
    for shape in ((6, 10), (9, 10)):
        inputs = make_inputs(shape, function=function)
        check_against_exact(inputs, function)
        check_against_exact({**inputs, "alpha": torch.linspace(0.3, 1.7, 5).requires_grad_()}, function)
    check_residual_against_exact(add_residual(make_inputs(function=function)), function)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_the_operation(grad: bool) -> None:
    """And not the memory that the kernel was to fill."""
    x, other = torch.randn(5, 48), torch.randn(5, 48)
    alpha, weight = torch.tensor([0.5]), torch.randn(48)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(lambda t: dyt(t, alpha, weight), x, check_trace=False)
        again = torch.jit.trace(lambda t: sum(dyt_residual(t, t, alpha, weight)), x, check_trace=False)
    torch.testing.assert_close(traced(other), dyt(other, alpha, weight))
    torch.testing.assert_close(again(other), sum(dyt_residual(other, other, alpha, weight)))
