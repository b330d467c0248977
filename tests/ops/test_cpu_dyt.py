"""The C kernels for CPUs: numbers against fp64 with and without AVX, edges of tiles and blocks, threads."""

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, reference
from megatron_dyt.ops.parameters import Parameters
from tests.ops.cases import needs_cpu_kernels, unit

REPO = Path(__file__).resolve().parents[2]
ONLY_DX = [True] + [False] * 4
LEAST = 1.5e-45  # fp32's smallest number
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) on PATH")


def build(place: Path, **env: str) -> Path:
    """Run setup.py's compilation; returns the library's path, whether or not it has come to be."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(place), "--build-temp", str(place / "temporary")]
    subprocess.run(command, cwd=REPO, env=os.environ | env, check=True, capture_output=True)
    return place / "megatron_dyt/ops/cpu_kernels.so"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for the oldest processors, which know no AVX2; an environment asked for -ffast-math."""
    return build(tmp_path_factory.mktemp("baseline"), CFLAGS="-DBASELINE_ONLY -O3 -ffast-math")


@pytest.fixture(params=["this machine", pytest.param("baseline", marks=needs_compiler)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "baseline":
        library = ctypes.CDLL(str(request.getfixturevalue("baseline")))
        monkeypatch.setattr(cpu_dyt, "_library", library)


class Inputs(NamedTuple):
    """x, dy and other of (rows, hidden): other is a residual in forward, dsum in backward."""

    x: Tensor
    dy: Tensor
    other: Tensor
    parameters: Parameters


def make_inputs(rows: int, hidden: int, function: str = "tanh", dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(rows + hidden)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    parameters = Parameters(
        torch.tensor([0.6]),
        1 + random(hidden),
        random(hidden),
        torch.tensor([0.2]) if function == "erf" else None,
        function,
    )
    x, dy, other = (factor * random(rows, hidden) for factor in (2, 1, 1))
    return Inputs(x.to(dtype), dy.to(dtype), other.to(dtype), parameters)


def run(t: Inputs) -> list[Tensor]:
    """y and sum of x + other; y of x; the gradients with `other` as dsum."""
    needs = [True] * 4 + [t.parameters.shift is not None]
    return [
        *cpu_dyt.residual_forward(t.x, t.other, t.parameters),
        cpu_dyt.forward(t.x, t.parameters),
        *cpu_dyt.backward(t.dy, t.x, t.parameters._replace(bias=None), needs, t.other),
    ]


def run_exactly(t: Inputs) -> list[Tensor]:
    """The same in fp64; of the sum as rounded to x's dtype."""
    total = (t.x + t.other).double()
    parameters = Parameters(*(p.double() if isinstance(p, Tensor) else p for p in t.parameters))
    alpha, weight, _, shift, function = parameters
    dx, *gradients = reference.dyt_backward(
        t.dy.double(), t.x.double(), alpha, weight, shift, function, has_bias=True
    )
    return [
        reference.dyt_forward(total, *parameters),
        total,
        reference.dyt_forward(t.x.double(), *parameters),
        dx + t.other.double(),
        *(gradient for gradient in gradients if gradient is not None),
    ]


def check(t: Inputs) -> None:
    """Each result against fp64; sums against the root of the sum of their terms' squares, some 2 per term."""
    rows, hidden = t.x.shape
    for actual, expected in zip(run(t), run_exactly(t), strict=True):
        assert actual.is_contiguous()
        tolerance = 2**-8 if actual.dtype == torch.bfloat16 else 1e-6
        terms = 1 if actual.dim() == 2 else rows if actual.numel() == hidden else rows * hidden
        assert ((actual.double() - expected).abs() <= tolerance * (expected.abs() + 2 * terms**0.5)).all()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", cpu_dyt.DTYPES)
@pytest.mark.parametrize("function", cpu_dyt.FUNCTIONS)
def test_every_edge_of_tiles_groups_and_blocks(function: str, dtype: torch.dtype) -> None:
    for rows, hidden in itertools.product((0, 1, 17, 64, 100), (1, 7, 64, 511, 512, 513, 1100)):
        check(make_inputs(rows, hidden, function, dtype))


@needs_cpu_kernels
def test_more_rows_than_blocks_can_hold_at_their_least() -> None:
    rows = cpu_dyt._MIN_BLOCK_ROWS * cpu_dyt._BACKWARD_BLOCKS + 1001
    check(make_inputs(rows, 40))


@needs_cpu_kernels
@pytest.mark.parametrize("function", cpu_dyt.FUNCTIONS)
def test_results_do_not_depend_on_the_number_of_threads(function: str) -> None:
    t = make_inputs(500, 700, function)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(t))
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@needs_cpu_kernels
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.repeat(*[1] * (t.dim() - 1), 2)[..., : t.shape[-1]],  # row-strided: read in place
        lambda t: t.mT.contiguous().mT if t.dim() == 2 else t.repeat_interleave(2)[::2],
        lambda t: t[:1].expand(t.shape),
        lambda t: torch.complex(torch.zeros_like(t), t).conj().imag,  # a lazy negation
        lambda t: torch._efficientzerotensor(t.shape),  # no memory at all
    ],
    ids=["row-strided", "column-strided", "expanded", "negated", "without memory"],
)
@pytest.mark.parametrize("name", ["x", "dy", "other", "weight", "bias"])
def test_strides_and_lazy_values(name: str, view: Callable[[Tensor], Tensor]) -> None:
    t = make_inputs(70, 30)
    parameters = t.parameters
    if name in ("weight", "bias"):
        check(t._replace(parameters=parameters._replace(**{name: view(getattr(parameters, name))})))
    else:
        check(t._replace(**{name: view(getattr(t, name))}))


@needs_cpu_kernels
def test_row_strided_tensors_are_not_copied() -> None:
    wide = torch.zeros(6, 10)
    rows, stride = cpu_dyt._rows(wide[:, 2:7], 5)
    assert (rows.data_ptr(), stride) == (wide[:, 2:].data_ptr(), 10)


@needs_cpu_kernels
def test_freed_memory_is_an_error() -> None:
    t = make_inputs(3, 4)
    t.dy.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the memory of dy has been freed"):
        run(t)


@needs_cpu_kernels
def test_an_upstream_gradient_of_another_dtype() -> None:
    t = make_inputs(70, 30, dtype=torch.bfloat16)
    check(t._replace(dy=t.dy.float(), other=t.other.float()))


@needs_cpu_kernels
def test_sums_over_many_rows_are_exact_to_fp32() -> None:
    rows = 200_000
    x, dy = torch.full((rows, 3), 0.3), torch.full((rows, 3), 0.1)
    dalpha, dweight, dbias = cpu_dyt.backward(dy, x, unit(3), [False, True, True, True, False])
    f, slope = math.tanh(x[0, 0].item()), 1 / math.cosh(x[0, 0].item()) ** 2
    step = dy[0, 0].item()
    # Within a group of rows fp32 rounds the same sum the same way each time.
    assert dalpha.item() == pytest.approx(3 * rows * step * slope * x[0, 0].item(), rel=5e-7)
    assert dweight.tolist() == pytest.approx([rows * step * f] * 3, rel=5e-7)
    assert dbias.tolist() == pytest.approx([rows * step] * 3, rel=5e-7)


@needs_cpu_kernels
def test_the_sign_of_zero() -> None:
    x = torch.tensor([[0.0, -0.0] * 9])
    for function in cpu_dyt.FUNCTIONS:
        parameters = unit(18, function)
        if function == "erf":
            parameters = parameters._replace(shift=torch.tensor([-0.0]))
        y = cpu_dyt.forward(x, parameters)
        assert torch.equal(y.signbit(), x.signbit())


@needs_cpu_kernels
def test_nothing_beside_the_output_is_written() -> None:
    for dtype in cpu_dyt.DTYPES:
        t = make_inputs(5, 600, dtype=dtype)
        memory = torch.full((5 * 600 + 64,), 7.0, dtype=dtype)
        out = memory[32:-32].view(5, 600)
        y = cpu_dyt.forward(t.x, t.parameters, out)
        assert y.data_ptr() == out.data_ptr()
        assert not (out == 7).any()
        assert (memory[:32] == 7).all()
        assert (memory[-32:] == 7).all()


def along_the_line(function: str) -> tuple[Tensor, Tensor, Tensor]:
    """z, and f and its slope there in fp32, out to where the slope leaves fp32's normal numbers."""
    end = 44.3 if function == "tanh" else 9.3
    z = torch.cat([torch.linspace(-end, end, 100_003), torch.logspace(-39, 0, 10_001), torch.tensor([0.0])])
    parameters = unit(len(z), function)
    value = cpu_dyt.forward(z, parameters)
    (slope,) = cpu_dyt.backward(torch.ones_like(z), z, parameters, ONLY_DX)
    return z.double(), value.double(), slope.double()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
def test_tanh_and_its_slope_are_accurate_to_their_own_size() -> None:
    z, value, slope = along_the_line("tanh")
    torch.testing.assert_close(value, torch.tanh(z), rtol=2.5e-7, atol=LEAST)
    torch.testing.assert_close(slope, 1 / torch.cosh(z) ** 2, rtol=5e-7, atol=0)
    beyond = torch.linspace(44.36, 60, 1000)
    (slope,) = cpu_dyt.backward(torch.ones(1000), beyond, unit(1000), ONLY_DX)
    assert not slope.any()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
def test_erf_and_its_slope_are_accurate_to_their_own_size() -> None:
    z, value, slope = along_the_line("erf")
    torch.testing.assert_close(value, torch.erf(z), rtol=2.5e-7, atol=LEAST)
    # The square in the exponent is rounded, as in torch.
    expected = 2 / math.sqrt(math.pi) * torch.exp(-z * z)
    assert ((slope - expected).abs() <= expected * (5e-7 + 6e-8 * z * z)).all()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", cpu_dyt.DTYPES)
@pytest.mark.parametrize("function", cpu_dyt.FUNCTIONS)
def test_saturated_infinite_and_nan_x(function: str, dtype: torch.dtype) -> None:
    inf = math.inf
    x = torch.tensor([[100.0, -100.0, inf, -inf, math.nan, 0.5, 1e30, -3e38] * 3], dtype=dtype)
    parameters, dy = unit(x.shape[1], function), torch.ones_like(x)
    y = cpu_dyt.forward(x, parameters)
    dx, dalpha = cpu_dyt.backward(dy, x, parameters, [True, True] + [False] * 3)
    assert y[0, :4].tolist() == [1, -1, 1, -1]
    assert y[0, 6:8].tolist() == [1, -1]
    assert dx[0, [0, 1, 2, 3, 6, 7]].tolist() == [0] * 6
    assert (y.isnan() == x.isnan()).all()
    assert (dx.isnan() == x.isnan()).all()
    assert dalpha.isnan().all()
    without = x.nan_to_num(nan=0.0, posinf=inf, neginf=-inf)
    (dalpha,) = cpu_dyt.backward(dy, without, parameters, [False, True] + [False] * 3)
    slope = 1 / math.cosh(0.5) ** 2 if function == "tanh" else 2 / math.sqrt(math.pi) * math.exp(-0.25)
    assert dalpha.item() == pytest.approx(3 * 0.5 * slope, rel=1e-6)


@needs_cpu_kernels
def test_bf16_is_rounded_to_nearest_even() -> None:
    x = torch.linspace(-3, 3, 5001).bfloat16()
    parameters = unit(5001)._replace(weight=torch.full((5001,), 1.7))
    y, wide = (cpu_dyt.forward(t, parameters) for t in (x, x.float()))
    assert torch.equal(y, wide.bfloat16())


THREADS = """
import os, torch
from megatron_dyt.ops import cpu_dyt
from megatron_dyt.ops.parameters import Parameters

def threads():
    return set(os.listdir("/proc/self/task"))

def forward(elements):
    hidden = elements // 64
    cpu_dyt.forward(torch.zeros(64, hidden), Parameters(torch.ones(1), torch.ones(hidden)))

torch.set_num_threads(4)
at_first = threads()
forward(1 << 14)
small = threads() - at_first
forward(1 << 18)
large = threads() - at_first
torch.tanh(torch.zeros(1 << 22))
of_torch = threads()
for _ in range(20):
    forward(1 << 16)
    torch.tanh(torch.zeros(1 << 22))
print(len(small), len(large), of_torch == threads() == at_first | large)
"""


@needs_cpu_kernels
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_threads_are_those_of_torch_and_stay() -> None:
    """None for few elements; then the three beside the caller's, which PyTorch uses too, for any size."""
    command = [sys.executable, "-W", "ignore", "-c", THREADS]
    result = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["0", "3", "True"]


@needs_compiler
def test_where_there_is_a_compiler_they_are_built() -> None:
    assert cpu_dyt.IS_BUILT


@needs_compiler
def test_fast_math_in_the_environment_changes_nothing(
    baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dyt, "_library", ctypes.CDLL(str(baseline)))
    x = torch.tensor([math.nan, 1e-40, -3.0])
    y = cpu_dyt.forward(x, unit(3))
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=3e-7, atol=LEAST, equal_nan=True)
    assert (torch.tensor([1e-40]) * 1).item() > 0  # PyTorch still has denormals


def test_without_a_working_compiler_the_installation_goes_on_and_leaves_no_earlier_library(
    tmp_path: Path,
) -> None:
    earlier = tmp_path / "megatron_dyt/ops/cpu_kernels.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    assert not build(tmp_path, CC=shutil.which("false") or "false").exists()
