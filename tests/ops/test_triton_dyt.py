"""The Triton kernels against fp64: interpreted on the CPU, and on a CUDA device where there is one.

All allocations of the code under test are filled with NaN and have guards on both sides, so that a
kernel that leaves an element out, or writes beyond the end, is seen.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import dyt, dyt_fork, recompute_dyt, triton_dyt, triton_launch
from megatron_dyt.ops.triton_launch import Chip
from tests.ops import cases
from tests.ops.interpreter import interpreted_kernels

# The interpreter's own: it indexes with arrays of one element, and NumPy warns of inf - inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
GUARD = 64

# Few processors, so that a program has several blocks of rows, and yet several programs share them.
SMALL_CHIP = Chip("sm90", processors=3, warp_size=32, ptx=False)
# Terms of dalpha cancel, and each is good to a few ulp.
CUDA_TOLERANCE = cases.TOLERANCE | {FP32: 1e-5}
# The interpreter cuts fp32 to bf16 off instead of rounding.
INTERPRETED_TOLERANCE = CUDA_TOLERANCE | {BF16: 2**-7}
# tanh.approx has a relative error of 2^-11, which is more than a rounding where the bias cancels it.
CUDA_SLACK = 2**-11


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run: interpreted on the CPU, or on the GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    with interpreted_kernels():
        yield "cpu"


@pytest.fixture
def tolerances(device: str) -> dict[str, Any]:
    """What the checks of `cases` allow on this device."""
    if device == "cuda":
        return {"tolerance": CUDA_TOLERANCE, "slack": CUDA_SLACK}
    return {"tolerance": INTERPRETED_TOLERANCE}


@pytest.fixture(autouse=True)
def small_chip(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(triton_launch, "chip_of", lambda _: SMALL_CHIP)
        # One turn of an interpreted program takes as long for many columns as for few.
        monkeypatch.setattr(triton_launch, "FINALIZE_BLOCK_N", 1024)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty that gives NaN between guards, which must be untouched at the end."""
    buffers: list[Tensor] = []
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        shape = real(*size, device="meta").shape
        buffer = torch.full((shape.numel() + 2 * GUARD,), 7.0, **options)
        buffers.append(buffer)
        inner = buffer[GUARD : GUARD + shape.numel()]
        return inner.fill_(NAN).view(shape)

    monkeypatch.setattr(triton_dyt.torch, "empty", empty)
    yield
    monkeypatch.undo()
    assert buffers
    for buffer in buffers:
        assert (buffer[:GUARD] == 7).all()
        assert (buffer[-GUARD:] == 7).all()


SHAPES: list[tuple[tuple[int, ...], torch.dtype, str]] = [
    ((0, 64), FP32, "tanh"),
    ((2, 0, 7), BF16, "erf"),
    ((1,), FP32, "tanh"),
    ((1, 1), FP16, "erf"),
    ((8193, 1), FP32, "tanh"),
    ((3, 7), FP32, "tanh"),
    ((3, 7), BF16, "tanh"),
    ((3, 7), FP16, "erf"),
    ((2049, 7), BF16, "tanh"),
    ((3, 64), FP32, "erf"),
    ((3, 5, 64), FP16, "tanh"),
    ((1025, 64), BF16, "tanh"),
    ((1, 1000), FP32, "tanh"),
    ((3, 1000), FP16, "tanh"),
    ((37, 1000), BF16, "erf"),
    ((3, 4096), BF16, "tanh"),
    ((1, 5000), FP32, "tanh"),
    ((3, 5000), BF16, "tanh"),
    ((3, 5120), FP16, "tanh"),
    ((1, 8192), BF16, "tanh"),
    ((5, 8192), FP32, "tanh"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype", "function"), SHAPES, ids=str)
def test_values_and_gradients(
    device: str, tolerances: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, function: str
) -> None:
    inputs = cases.make_inputs(shape, function=function, dtype=dtype, parameter_dtype=FP32, device=device)
    cases.check_against_exact(inputs, function, backend="triton", **tolerances)


RESIDUAL_SHAPES = [
    ((0, 64), FP32, FP32),
    ((3, 7), BF16, BF16),
    ((2, 5, 64), FP16, FP16),
    ((129, 64), BF16, FP32),
    ((3, 1000), FP32, FP32),
    ((3, 4096), FP16, FP16),
    ((3, 5000), BF16, BF16),
    ((1, 5120), BF16, FP32),
    ((3, 8192), BF16, BF16),
    ((8193, 1), FP32, FP32),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype", "residual_dtype"), RESIDUAL_SHAPES, ids=str)
def test_residual(
    device: str,
    tolerances: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> None:
    function = "erf" if dtype == FP16 else "tanh"
    inputs = cases.make_inputs(shape, function=function, dtype=dtype, parameter_dtype=FP32, device=device)
    cases.check_residual_against_exact(
        cases.add_residual(inputs, residual_dtype), function, backend="triton", **tolerances
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parameter_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_dtypes_of_x_and_parameters(
    device: str, tolerances: dict[str, Any], dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    # Each function meets each dtype of x and each of the parameters.
    function = "erf" if dtype == parameter_dtype else "tanh"
    inputs = cases.make_inputs(
        (40, 24),
        function=function,
        bias=function == "erf",
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        device=device,
    )
    cases.check_against_exact(inputs, function, backend="triton", **tolerances)


@pytest.mark.parametrize("alpha", [-0.6, 0.0])
@pytest.mark.parametrize("function", triton_dyt.FUNCTIONS)
def test_alpha_of_any_sign(device: str, tolerances: dict[str, Any], function: str, alpha: float) -> None:
    inputs = cases.make_inputs(function=function, alpha=alpha, device=device)
    cases.check_against_exact(inputs, function, backend="triton", **tolerances)


def surrounded_by_nan(t: Tensor, left: int, right: int) -> Tensor:
    """A copy of t, whose rows lie `left + right` elements apart, with NaN between and around them."""
    wide = torch.full((*t.shape[:-1], left + t.shape[-1] + right), NAN, dtype=t.dtype, device=t.device)
    view = wide[..., left : left + t.shape[-1]]
    return view.copy_(t.detach())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "aligned rows": lambda t: surrounded_by_nan(t, 16, 48),
    "rows at 8 elements": lambda t: surrounded_by_nan(t, 8, 16),
    "odd start and distance": lambda t: surrounded_by_nan(t, 1, 2),
    "last dimension strided": lambda t: torch.stack([t.detach(), t.detach() * NAN], -1)[..., 0],
    "transposed": lambda t: t.detach().transpose(0, 1).contiguous().transpose(0, 1),
    "one row many times": lambda t: t.detach()[:1, :1].expand(t.shape),
    "one number": lambda t: t.detach()[:1, :1, :1].expand(t.shape),
}


@pytest.mark.usefixtures("poisoned")
# 200 columns do not fill a tile, and lie 8 elements off where 64 lie at 16.
@pytest.mark.parametrize(
    ("name", "hidden"), [*((name, 64) for name in VIEWS), ("aligned rows", 200), ("one row many times", 200)]
)
def test_strides(device: str, tolerances: dict[str, Any], name: str, hidden: int) -> None:
    view = VIEWS[name]
    inputs = cases.make_inputs((3, 5, hidden), dtype=BF16, parameter_dtype=FP32, device=device)
    strided = {**inputs, "x": view(inputs["x"]).requires_grad_()}
    cases.check_against_exact(strided, "tanh", backend="triton", **tolerances)
    dy = view(cases.upstream(inputs["x"]))
    cases.check_against_exact(inputs, "tanh", dy, backend="triton", **tolerances)


def random_view(t: Tensor, random: Callable[..., int]) -> Tensor:
    """A copy of t at a random place of a larger tensor, dimensions in a random order of strides."""
    order = sorted(range(t.dim()), key=lambda _: random(0, 1000))
    steps = [random(1, 2) for _ in order]
    before = [random(0, 3) for _ in order]
    sizes = [before[i] + t.shape[d] * steps[i] + random(0, 3) for i, d in enumerate(order)]
    wide = torch.full(sizes, NAN, dtype=t.dtype, device=t.device)
    cut = tuple(slice(before[i], before[i] + t.shape[d] * steps[i], steps[i]) for i, d in enumerate(order))
    view = wide[cut].permute([order.index(d) for d in range(t.dim())])
    return view.copy_(t.detach())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(4))
def test_random_strides(device: str, tolerances: dict[str, Any], seed: int) -> None:
    random = Random(seed).randint
    shape = (random(1, 4), random(1, 4), random(1, 40))
    inputs = cases.add_residual(cases.make_inputs(shape, dtype=BF16, parameter_dtype=FP32, device=device))
    for name in ("x", "residual"):
        inputs[name] = random_view(inputs[name], random).requires_grad_()
    cases.check_residual_against_exact(inputs, "tanh", backend="triton", **tolerances)
    del inputs["residual"]
    dy = random_view(cases.upstream(inputs["x"]), random)
    cases.check_against_exact(inputs, "tanh", dy, backend="triton", **tolerances)


def test_rows_of_residual_and_gradients_may_lie_elsewhere(device: str, tolerances: dict[str, Any]) -> None:
    inputs = cases.add_residual(cases.make_inputs((5, 64), device=device))
    x, parameters = cases.split({name: t.detach() for name, t in inputs.items()})
    residual = inputs["residual"].detach()
    y, total = triton_dyt.residual_forward(
        surrounded_by_nan(x, 0, 16), surrounded_by_nan(residual, 0, 24), parameters
    )
    dy, dsum = cases.upstream(y), cases.upstream(y) + 1
    gradients = triton_dyt.backward(
        surrounded_by_nan(dy, 0, 32),
        surrounded_by_nan(total, 0, 40),
        parameters,
        [True] * 4 + [False],
        surrounded_by_nan(dsum, 0, 8),
    )
    assert torch.equal(total, x + residual)
    exact_y, expected = cases.exact({**inputs, "x": total}, dy, "tanh")
    cases.assert_near(y, exact_y, 2e-6, "y")
    expected["x"] = expected["x"] + dsum
    for gradient, (name, e) in zip(gradients, expected.items(), strict=True):
        cases.assert_near(gradient, e, 1e-5, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("processors", "block_p"), [(1, 2), (5, 2), (40, 32)])
def test_any_number_of_programs_sums_up(
    device: str, processors: int, block_p: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 processors have more programs than there are blocks of rows; 17 of 23 columns fill the tile.
    monkeypatch.setattr(
        triton_launch, "chip_of", lambda _: triton_launch.INTERPRETER._replace(processors=processors)
    )
    monkeypatch.setattr(triton_launch, "FINALIZE_BLOCK_P", block_p)
    monkeypatch.setattr(triton_launch, "FINALIZE_BLOCK_N", 8)
    monkeypatch.setattr(triton_launch, "_MAX_BLOCK_N", 16)
    inputs = cases.make_inputs((321, 23), function="erf", device=device)
    cases.check_against_exact(inputs, "erf", backend="triton")


def lots_of_memory(elements: int, device: str, directory: Path) -> Tensor:
    """bf16 zeros; on a CPU in a file without content, which takes space only where it is written to."""
    if device == "cuda":
        return torch.zeros(elements, dtype=BF16, device=device)
    with (directory / "sparse").open("w+b") as file:
        file.truncate(2 * elements)
        return torch.frombuffer(mmap.mmap(file.fileno(), 2 * elements), dtype=BF16)


def test_offsets_beyond_2_to_the_31(device: str, tolerances: dict[str, Any], tmp_path: Path) -> None:
    hidden, distance = 64, 2**30 + 8
    # An offset cut to 32 bits would lie as far before the first row, and find zeros there.
    storage = lots_of_memory(2**31 + 2 * distance + hidden, device, tmp_path)
    x = storage.as_strided((3, hidden), (distance, 1), 2**31)
    inputs = cases.make_inputs((3, hidden), dtype=BF16, parameter_dtype=FP32, device=device)
    x.copy_(inputs["x"].detach())
    cases.check_against_exact({**inputs, "x": x.requires_grad_()}, "tanh", backend="triton", **tolerances)


def test_any_subset_of_gradients(device: str) -> None:
    inputs = cases.make_inputs((33, 20), function="erf", device=device)
    dy = cases.upstream(inputs["x"])
    _, expected = cases.exact(inputs, dy, "erf")
    x, parameters = cases.split({name: t.detach() for name, t in inputs.items()}, "erf")
    for bits in range(1, 32):
        needs = [bool(bits >> i & 1) for i in range(5)]
        gradients = triton_dyt.backward(dy, x, parameters, needs)
        wanted = [name for name, needed in zip(cases.NAMES, needs, strict=True) if needed]
        for name, gradient in zip(wanted, gradients, strict=True):
            cases.assert_near(gradient, expected[name], 1e-5, f"{name} of {wanted}")


def slope(z: Tensor, function: str, dtype: torch.dtype = FP32) -> Tensor:
    """f'(z) by the backward kernel, as fp64: dx where alpha, weight and dy are 1."""
    z, parameters = z.to(dtype), cases.unit(z.shape[-1], function, device=z.device.type)
    return triton_dyt.backward(torch.ones_like(z), z, parameters, [True] + [False] * 4)[0].double()


def test_slope_is_accurate_to_saturation(device: str) -> None:
    z = torch.cat([torch.linspace(-43, 43, 3000), torch.linspace(-8, 8, 1000)]).to(device)
    # 1e-6, and the rounding of the exponent.
    tolerance = 1e-6 + 1.2e-7 * z.double().abs()
    expected = 1 / torch.cosh(z.double()) ** 2
    assert ((slope(z, "tanh") - expected).abs() <= tolerance * expected).all()
    z = z / 8  # erf' underflows at 9
    tolerance = 1e-6 + 1.2e-7 * z.double() ** 2
    expected = 2 / math.sqrt(math.pi) * torch.exp(-(z.double() ** 2))
    assert ((slope(z, "erf") - expected).abs() <= tolerance * expected).all()


@pytest.mark.parametrize(
    ("function", "dtype", "tolerance"),
    [("tanh", FP32, 5e-7), ("tanh", FP16, 2**-11 * 1.05), ("erf", FP32, 5e-7), ("erf", FP16, 2**-11 * 1.05)],
)
def test_value_is_accurate_from_tiny_to_saturated(
    device: str, function: str, dtype: torch.dtype, tolerance: float
) -> None:
    # Every magnitude, and densely where one formula takes over from another.
    z = torch.cat([torch.logspace(-38 if dtype == FP32 else -4, 2, 3000), torch.linspace(0.05, 4, 3000)])
    z = torch.cat([-z, z]).to(device=device, dtype=dtype)
    y = triton_dyt.forward(z, cases.unit(len(z), function, device=device))
    expected = getattr(torch, function)(z.double())
    assert ((y.double() - expected).abs() / expected.abs()).max() < tolerance


def test_bf16_value_near_zero(device: str) -> None:
    z = torch.logspace(-30, 1, 3000).to(device=device, dtype=BF16)
    y = triton_dyt.forward(z, cases.unit(len(z), device=device))
    expected = torch.tanh(z.double())
    # A rounding, or the interpreter's cut, and the error of tanh.approx.
    assert ((y.double() - expected).abs() / expected).max() < (2**-7 if device == "cpu" else 2**-8 + 2**-11)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_special_values_in_every_dtype(device: str, dtype: torch.dtype) -> None:
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    # A sum that overflows, a NaN in either term, infinities that cancel, zeros and the least numbers.
    x = torch.tensor([largest, -largest, NAN, 1.0, INF, INF, 0.0, -0.0, least], device=device, dtype=dtype)
    residual = torch.tensor([largest, -largest, 1.0, NAN, -INF, 1.0, 0.0, -0.0, 0.0], device=device)
    residual = residual.to(dtype)
    x, residual = (t[:, None].expand(-1, 24).contiguous() for t in (x, residual))
    parameters = cases.unit(24, device=device)._replace(weight=torch.full((24,), 2.0, device=device))
    y, total = triton_dyt.residual_forward(x, residual, parameters)
    assert torch.equal(total.isnan(), (x + residual).isnan())
    assert torch.equal(total.nan_to_num(7), (x + residual).nan_to_num(7))
    values = y[:, -1].tolist()
    assert values[:2] == [2, -2]
    assert all(math.isnan(v) for v in values[2:5])
    assert values[5:8] == [2, 0, 0]
    assert values[8] == pytest.approx(2 * least, rel=2**-7)
    dsum = torch.full_like(x, 0.5)
    dx, dalpha, dweight = triton_dyt.backward(
        torch.ones_like(x), total, parameters, [True] * 3 + [False] * 2, dsum
    )
    # Where f is flat only the gradient that comes by another way is left, and a NaN spreads to no other row.
    slopes = dx[:, -1].tolist()
    assert slopes[:2] + slopes[5:] == pytest.approx([0.5, 0.5, 0.5, 2.5, 2.5, 2.5], rel=2**-7)
    assert all(math.isnan(v) for v in slopes[2:5])
    assert dalpha.isnan().all()
    assert dweight.isnan().all()


@pytest.mark.parametrize("function", triton_dyt.FUNCTIONS)
@pytest.mark.parametrize("columns", [1, 40])
def test_saturated_infinite_and_nan_x(device: str, columns: int, function: str) -> None:
    special = torch.tensor([100.0, -100.0, INF, -INF, 0.0, -0.0, 1e-40], device=device)
    x = special[:, None].expand(-1, columns).contiguous()
    weight, bias = (torch.full((columns,), v, device=device) for v in (2.0, 0.5))
    parameters = cases.unit(columns, function, device=device)._replace(weight=weight, bias=bias)
    dsum = torch.full_like(x, 0.25)
    y = triton_dyt.forward(x, parameters)
    expected = torch.tensor([2.5, -1.5, 2.5, -1.5, 0.5, 0.5, 0.5])
    torch.testing.assert_close(y[:, -1].cpu(), expected, rtol=0, atol=0)
    needs = [True] * 4 + [function == "erf"]
    args = (torch.ones_like(x), x, parameters, needs, dsum)
    dx, dalpha, dweight, dbias, *dshift = triton_dyt.backward(*args)
    at_zero = 2.0 * (1 if function == "tanh" else 2 / math.sqrt(math.pi))
    assert dx[:, -1].tolist() == pytest.approx([0.25] * 4 + [0.25 + at_zero] * 3, rel=1e-6)
    # Saturated rows add nothing to dalpha, infinite ones included, and the rest is denormal.
    assert abs(dalpha.item()) <= 3e-40 * columns
    assert dweight.abs().max().item() <= 1e-6
    assert dbias.tolist() == [len(special)] * columns
    if dshift:
        assert dshift[0].item() == pytest.approx(3 * at_zero * columns, rel=1e-6)

    x[3, 0] = NAN
    y = triton_dyt.forward(x, parameters)
    assert y.isnan().nonzero().tolist() == [[3, 0]]
    dx, dalpha, dweight, dbias, *dshift = triton_dyt.backward(*args)
    assert dx.isnan().nonzero().tolist() == [[3, 0]]
    assert dalpha.isnan().all()
    assert dweight.isnan().nonzero().tolist() == [[0]]
    assert not dbias.isnan().any()
    assert all(t.isnan().all() for t in dshift)


def test_a_steep_alpha_gives_the_right_gradients_and_not_merely_finite_ones(device: str) -> None:
    # |alpha * x| up to 100, where fp32's 1 - tanh^2 has been 0 since 9.
    inputs = cases.make_inputs((40, 24), dtype=FP32, alpha=25.0, device=device)
    inputs["x"] = torch.linspace(-4, 4, 960, device=device).view(40, 24).requires_grad_()
    y = cases.call(inputs, backend="triton")
    dy = cases.upstream(y)
    dx, dalpha = torch.autograd.grad(y, [inputs["x"], inputs["alpha"]], dy)
    _, expected = cases.exact(inputs, dy, "tanh")
    normal = expected["x"].abs() > 1e-36
    assert normal.sum() > 300
    error = (dx.double() - expected["x"]).abs()
    assert (error[normal] / expected["x"][normal].abs()).max() < 1e-5
    assert error[~normal].max() < 2e-36
    cases.assert_near(dalpha, expected["alpha"], 1e-5, "alpha")


def test_the_sum_is_rounded_before_dyt_sees_it(device: str) -> None:
    x = torch.tensor([[1.0, 3.0]], dtype=BF16, device=device)
    residual = torch.tensor([[2.0**-10, 2.0**-9]], dtype=BF16, device=device)
    parameters = cases.unit(2, device=device)
    y, total = triton_dyt.residual_forward(x, residual, parameters)
    assert torch.equal(total, x)
    assert torch.equal(y, triton_dyt.forward(x, parameters))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fork_adds_the_gradient_of_x(device: str, tolerances: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = cases.make_inputs((33, 40), dtype=dtype, parameter_dtype=FP32, device=device)
    y, same = dyt_fork(*inputs.values(), backend="triton")
    dy, dsame = cases.upstream(y), cases.upstream(y).flip(-1)
    gradients = torch.autograd.grad((y, same), list(inputs.values()), (dy, dsame))
    exact_y, expected = cases.exact(inputs, dy, "tanh")
    expected["x"] = expected["x"] + dsame.double()
    cases.assert_near(y, exact_y, tolerances["tolerance"][dtype], "y", tolerances.get("slack", 2e-6))
    for gradient, (name, e) in zip(gradients, expected.items(), strict=True):
        cases.assert_near(gradient, e, tolerances["tolerance"][gradient.dtype], f"d{name}")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_recomputation_gives_the_same_bits(device: str, dtype: torch.dtype) -> None:
    inputs = cases.make_inputs((33, 40), dtype=dtype, parameter_dtype=FP32, device=device)
    y = cases.call(inputs, backend="triton")
    before = y.clone()
    y.untyped_storage().resize_(0)
    recompute_dyt(y, *inputs.values(), backend="triton")
    assert torch.equal(y, before)


@pytest.mark.usefixtures("poisoned")
def test_is_deterministic(device: str) -> None:
    inputs = cases.add_residual(cases.make_inputs((200, 40), dtype=BF16, parameter_dtype=FP32, device=device))
    runs = []
    for _ in range(2):
        results = cases.call_residual(inputs, backend="triton")
        dy = cases.upstream(results[0])
        runs.append((*results, *torch.autograd.grad(results, list(inputs.values()), (dy, dy))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_opcheck(device: str) -> None:
    inputs = cases.make_inputs((4, 3, 10), function="erf", device=device)
    cases.check_operations({**inputs, "x": inputs["x"].transpose(0, 1)}, "erf", "triton")


def test_compiles_into_one_graph_with_equal_results(device: str) -> None:
    def layer(x: Tensor, residual: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, total = torch.ops.megatron_dyt.dyt_residual(
            torch.sin(x), residual, alpha, weight, bias, None, "tanh", "triton"
        )
        return y * 2 + total

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for rows in (6, 9, 17):
        inputs = cases.add_residual(cases.make_inputs((rows, 10), device=device))
        tensors = [inputs[name] for name in ("x", "residual", "alpha", "weight", "bias")]
        y, compiled_y = layer(*tensors), compiled(*tensors)
        dy = cases.upstream(y)
        torch.testing.assert_close(compiled_y, y, rtol=1e-5, atol=1e-5)
        for actual, expected in zip(
            torch.autograd.grad(compiled_y, tensors, dy), torch.autograd.grad(y, tensors, dy), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_and_autocast(device: str) -> None:
    inputs = cases.make_inputs((6, 16), device=device)
    linear = torch.nn.Linear(16, 16, bias=False, device=device)

    def layer(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dyt(linear(x), alpha, weight, bias, backend="triton")

    results = []
    for checkpointed in (False, True):
        with torch.autocast(device, dtype=BF16):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(layer, *inputs.values(), use_reentrant=False)
            else:
                y = layer(*inputs.values())
        assert y.dtype == BF16
        gradients = torch.autograd.grad(y, list(inputs.values()), cases.upstream(y))
        assert [g.dtype for g in gradients] == [FP32] * 4
        results.append((y, *gradients))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_cpu_runs_it_only_when_interpreted(device: str) -> None:
    assert triton_dyt.is_interpreted() == (device == "cpu")
    if device == "cuda":
        with pytest.raises(ValueError, match="backend 'triton' cannot run on cpu"):
            dyt(torch.ones(2, 4), torch.ones(1), torch.ones(4), backend="triton")


@pytest.mark.gpu
def test_auto_is_triton_on_cuda_and_any_function_runs(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    for function in ("tanh", "hardtanh", "isru"):
        inputs = cases.make_inputs(
            (40, 24), function=function, dtype=BF16, parameter_dtype=FP32, device=device
        )
        cases.check_against_exact(inputs, function, slack=CUDA_SLACK)


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    inputs = cases.add_residual(
        cases.make_inputs((256, 1024), dtype=BF16, parameter_dtype=FP32, device=device)
    )

    def step() -> tuple[Tensor, ...]:
        # As in a layer: the fork in front of attention, and the sum behind it.
        first, stream = dyt_fork(*(inputs[name] for name in ("x", "alpha", "weight", "bias")))
        y, total = cases.call_residual({**inputs, "x": first, "residual": inputs["residual"] + stream})
        return (y, total, *torch.autograd.grad((y, total), list(inputs.values()), (dy, dy)))

    dy = cases.upstream(inputs["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs["x"].mul_(0.5)
        inputs["alpha"].mul_(2)
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_outputs_beyond_2_to_the_31_elements(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    hidden, rows = 4096, 2**19 + 3
    row = torch.linspace(-4, 4, hidden, device=device, dtype=BF16)
    x = row.expand(rows, hidden)
    parameters = cases.unit(hidden, device=device)
    y = triton_dyt.forward(x, parameters)
    for i in (0, 2**19 - 1, 2**19, rows - 1):
        torch.testing.assert_close(y[i], torch.tanh(row), rtol=2**-7, atol=0)
    (dx,) = triton_dyt.backward(x, x, parameters, [True] + [False] * 4)
    assert torch.equal(dx[0], dx[-1])
