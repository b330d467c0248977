"""The C kernels for CPUs: numbers against fp64 with and without AVX, edges of tiles and blocks, threads."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import cpu_dyt, reference
from tests.ops.cases import needs_cpu_kernels

REPO = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) on PATH")


def build(place: Path, **env: str) -> Path:
    """Run setup.py's compilation; returns the library's path, whether or not it has come to be."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(place), "--build-temp", str(place / "temporary")]
    subprocess.run(command, cwd=REPO, env=os.environ | env, check=True, capture_output=True)
    return place / "megatron_dyt/ops/cpu_kernels.so"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for the oldest processors, as a machine without AVX2 runs them."""
    return build(tmp_path_factory.mktemp("baseline"), CFLAGS="-DBASELINE_ONLY")


@pytest.fixture(params=["this machine", pytest.param("baseline", marks=needs_compiler)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "baseline":
        library = ctypes.CDLL(str(request.getfixturevalue("baseline")))
        monkeypatch.setattr(cpu_dyt, "_library", library)


def inputs(
    rows: int, hidden: int, function: str = "tanh", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(rows + hidden)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "x": (2 * random(rows, hidden)).to(dtype),
        "alpha": torch.tensor([0.6]),
        "weight": 1 + random(hidden),
        "bias": random(hidden),
        "shift": torch.tensor([0.2]) if function == "erf" else None,
        "dy": random(rows, hidden).to(dtype),
        "other": random(rows, hidden).to(dtype),
    }


def run(t: dict[str, Tensor | None], function: str) -> list[Tensor]:
    """y and sum of x + other; y of x; the gradients with `other` as dsum."""
    assert t["x"] is not None
    assert t["dy"] is not None
    parameters = (t["alpha"], t["weight"], t["bias"], t["shift"], function)
    needs = [True] * 4 + [function == "erf"]
    backward = (t["dy"], t["x"], t["alpha"], t["weight"], t["shift"], function, needs, t["other"])
    return [
        *cpu_dyt.residual_forward(t["x"], t["other"], *parameters),  # type: ignore[arg-type]
        cpu_dyt.forward(t["x"], *parameters),  # type: ignore[arg-type]
        *cpu_dyt.backward(*backward),  # type: ignore[arg-type]
    ]


def run_exactly(t: dict[str, Tensor | None], function: str) -> list[Tensor]:
    """The same in fp64; of the sum as rounded to x's dtype."""
    assert t["x"] is not None
    total = t["x"] + t["other"]
    wide = {name: None if tensor is None else tensor.double() for name, tensor in t.items()}
    options = {"function": function, "shift": wide["shift"]}
    forward = (wide["alpha"], wide["weight"], wide["bias"])
    dx, *gradients = reference.dyt_backward(
        wide["dy"],
        wide["x"],
        *forward[:2],
        has_bias=True,
        **options,  # type: ignore[arg-type]
    )
    return [
        reference.dyt_forward(total.double(), *forward, **options),  # type: ignore[arg-type]
        total.double(),
        reference.dyt_forward(wide["x"], *forward, **options),  # type: ignore[arg-type]
        dx + wide["other"],
        *(gradient for gradient in gradients if gradient is not None),
    ]


def check(t: dict[str, Tensor | None], function: str) -> None:
    """Each result against fp64; sums against the root of the sum of their terms' squares, some 2 per term."""
    assert t["x"] is not None
    rows, elements = len(t["x"]), t["x"].numel()
    for actual, expected in zip(run(t, function), run_exactly(t, function), strict=True):
        assert actual.is_contiguous()
        tolerance = 2**-8 if actual.dtype == torch.bfloat16 else 1e-6
        terms = 1 if actual.dim() == 2 else rows if actual.numel() == t["x"].shape[1] else elements
        assert ((actual.double() - expected).abs() <= tolerance * (expected.abs() + 2 * terms**0.5)).all()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", cpu_dyt.DTYPES)
@pytest.mark.parametrize("function", cpu_dyt.FUNCTIONS)
@pytest.mark.parametrize("hidden", [1, 7, 64, 511, 512, 513, 1100])
@pytest.mark.parametrize("rows", [0, 1, 17, 64, 100])
def test_every_edge_of_tiles_groups_and_blocks(
    rows: int, hidden: int, function: str, dtype: torch.dtype
) -> None:
    check(inputs(rows, hidden, function, dtype), function)


@needs_cpu_kernels
def test_more_rows_than_blocks_can_hold_at_their_least() -> None:
    rows = cpu_dyt._MIN_BLOCK_ROWS * cpu_dyt._BACKWARD_BLOCKS + 1001
    check(inputs(rows, 40), "tanh")


@needs_cpu_kernels
@pytest.mark.parametrize("function", cpu_dyt.FUNCTIONS)
def test_results_do_not_depend_on_the_number_of_threads(function: str) -> None:
    t = inputs(500, 700, function)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(t, function))
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
    t = inputs(70, 30)
    check({**t, name: view(t[name])}, "tanh")  # type: ignore[arg-type]


@needs_cpu_kernels
def test_row_strided_tensors_are_not_copied() -> None:
    wide = torch.zeros(6, 10)
    assert cpu_dyt._rows(wide[:, 2:7], 5).data_ptr() == wide[:, 2:].data_ptr()


@needs_cpu_kernels
def test_freed_memory_is_an_error() -> None:
    t = inputs(3, 4)
    t["dy"].untyped_storage().resize_(0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="the memory of dy has been freed"):
        run(t, "tanh")


@needs_cpu_kernels
def test_an_upstream_gradient_of_another_dtype() -> None:
    t = inputs(70, 30, dtype=torch.bfloat16)
    check({**t, "dy": t["dy"].float(), "other": t["other"].float()}, "tanh")  # type: ignore[union-attr]


@needs_cpu_kernels
def test_sums_over_many_rows_are_exact_to_fp32() -> None:
    rows = 200_000
    x, dy, one, weight = torch.full((rows, 3), 0.3), torch.full((rows, 3), 0.1), torch.ones(1), torch.ones(3)
    needs = [False, True, True, True, False]
    dalpha, dweight, dbias = cpu_dyt.backward(dy, x, one, weight, None, "tanh", needs)
    f, slope = math.tanh(x[0, 0].item()), 1 / math.cosh(x[0, 0].item()) ** 2
    step = dy[0, 0].item()
    # Within a group of rows fp32 rounds the same sum the same way each time.
    assert dalpha.item() == pytest.approx(3 * rows * step * slope * x[0, 0].item(), rel=5e-7)
    assert dweight.tolist() == pytest.approx([rows * step * f] * 3, rel=5e-7)
    assert dbias.tolist() == pytest.approx([rows * step] * 3, rel=5e-7)


@needs_cpu_kernels
def test_the_sign_of_zero() -> None:
    x, one = torch.tensor([[0.0, -0.0] * 9]), torch.ones(1)
    for function in cpu_dyt.FUNCTIONS:
        shift = torch.full((1,), -0.0) if function == "erf" else None
        y = cpu_dyt.forward(x, one, torch.ones(18), None, shift, function)
        assert torch.equal(y.signbit(), x.signbit())


@needs_cpu_kernels
def test_nothing_beside_the_output_is_written() -> None:
    for dtype in cpu_dyt.DTYPES:
        t = inputs(5, 600, dtype=dtype)
        memory = torch.full((5 * 600 + 64,), 7.0, dtype=dtype)
        out = memory[32:-32].view(5, 600)
        y = cpu_dyt.forward(*(t[n] for n in ("x", "alpha", "weight", "bias", "shift")), "tanh", out)  # type: ignore[arg-type]
        assert y.data_ptr() == out.data_ptr()
        assert not (out == 7).any()
        assert (memory[:32] == 7).all()
        assert (memory[-32:] == 7).all()


def along_the_line(function: str) -> tuple[Tensor, Tensor, Tensor]:
    """z, and f and its slope there in fp32, out to where the slope leaves fp32's normal numbers."""
    end = 44.3 if function == "tanh" else 9.3
    z = torch.cat([torch.linspace(-end, end, 100_003), torch.logspace(-38, 0, 10_001), torch.tensor([0.0])])
    one, ones = torch.ones(1), torch.ones_like(z)
    shift = torch.zeros(1) if function == "erf" else None
    value = cpu_dyt.forward(z, one, ones, None, shift, function)
    (slope,) = cpu_dyt.backward(ones, z, one, ones, shift, function, [True] + [False] * 4)
    return z.double(), value.double(), slope.double()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
def test_tanh_and_its_slope_are_accurate_to_their_own_size() -> None:
    z, value, slope = along_the_line("tanh")
    torch.testing.assert_close(value, torch.tanh(z), rtol=2.5e-7, atol=0)
    torch.testing.assert_close(slope, 1 / torch.cosh(z) ** 2, rtol=5e-7, atol=0)
    one, beyond = torch.ones(1), torch.linspace(44.36, 60, 1000)
    needs = [True] + [False] * 4
    (slope,) = cpu_dyt.backward(torch.ones(1000), beyond, one, torch.ones(1000), None, "tanh", needs)
    assert not slope.any()


@needs_cpu_kernels
@pytest.mark.usefixtures("kernels")
def test_erf_and_its_slope_are_accurate_to_their_own_size() -> None:
    z, value, slope = along_the_line("erf")
    torch.testing.assert_close(value, torch.erf(z), rtol=2.5e-7, atol=0)
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
    one, ones = torch.ones(1), torch.ones(x.shape[1])
    shift = torch.zeros(1) if function == "erf" else None
    y = cpu_dyt.forward(x, one, ones, None, shift, function)
    dx, dalpha = cpu_dyt.backward(
        ones[None].to(dtype), x, one, ones, shift, function, [True, True] + [False] * 3
    )
    assert y[0, :4].tolist() == [1, -1, 1, -1]
    assert y[0, 6:8].tolist() == [1, -1]
    assert dx[0, [0, 1, 2, 3, 6, 7]].tolist() == [0] * 6
    assert (y.isnan() == x.isnan()).all()
    assert (dx.isnan() == x.isnan()).all()
    assert dalpha.isnan().all()
    without = x.nan_to_num(nan=0.0, posinf=inf, neginf=-inf)
    (dalpha,) = cpu_dyt.backward(
        ones[None].to(dtype), without, one, ones, shift, function, [False, True] + [False] * 3
    )
    slope = 1 / math.cosh(0.5) ** 2 if function == "tanh" else 2 / math.sqrt(math.pi) * math.exp(-0.25)
    assert dalpha.item() == pytest.approx(3 * 0.5 * slope, rel=1e-6)


@needs_cpu_kernels
def test_bf16_is_rounded_to_nearest_even() -> None:
    x = torch.linspace(-3, 3, 5001).bfloat16()
    y = cpu_dyt.forward(x, torch.ones(1), torch.full((5001,), 1.7), None, None, "tanh")
    wide = cpu_dyt.forward(x.float(), torch.ones(1), torch.full((5001,), 1.7), None, None, "tanh")
    assert torch.equal(y, wide.bfloat16())


THREADS = """
import os, torch
from megatron_dyt.ops import cpu_dyt

def threads():
    return set(os.listdir("/proc/self/task"))

def forward(elements):
    hidden = elements // 64
    cpu_dyt.forward(torch.zeros(64, hidden), torch.ones(1), torch.ones(hidden), None, None, "tanh")

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
def test_a_library_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build(tmp_path)
    source = tmp_path / "cpu_kernels.c"
    monkeypatch.setattr(cpu_dyt, "LIBRARY", other)
    assert cpu_dyt._open() is not None
    monkeypatch.setattr(cpu_dyt, "SOURCE", source)
    assert cpu_dyt._open() is None  # no source
    source.write_text("/* another version */\n")
    assert cpu_dyt._open() is None
    other.unlink()  # not written over: it is open
    other.write_bytes(b"no library")
    assert cpu_dyt._open() is None


@needs_compiler
def test_fast_math_in_the_environment_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ctypes.CDLL(str(build(tmp_path, CFLAGS="-O3 -ffast-math")))
    monkeypatch.setattr(cpu_dyt, "_library", library)
    x = torch.tensor([math.nan, 1e-40, -3.0])
    y = cpu_dyt.forward(x, torch.ones(1), torch.ones(3), None, None, "tanh")
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=3e-7, atol=2e-45, equal_nan=True)
    assert (torch.tensor([1e-40]) * 1).item() > 0  # PyTorch still has denormals


def test_without_a_working_compiler_the_installation_goes_on_and_leaves_no_earlier_library(
    tmp_path: Path,
) -> None:
    earlier = tmp_path / "megatron_dyt/ops/cpu_kernels.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    assert not build(tmp_path, CC=shutil.which("false") or "false").exists()
