"""FP8 output by a scale that is known beforehand, against fp64; stand-ins of Transformer Engine's classes."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.nn import DynamicTanh
from tests.ops.cases import exact, make_inputs

sys.path.insert(0, str(Path(__file__).parent))
fp8 = importlib.import_module("fp8")
error = importlib.import_module("error")
BOUNDED, FP8, dyt_fp8, fp8_scale = fp8.BOUNDED, fp8.FP8, fp8.dyt_fp8, fp8.fp8_scale
quantized_for_te = fp8.quantized_for_te
INF = math.inf


def quantize(inputs: dict[str, Tensor], function: str = "tanh", **options: Any) -> tuple[Tensor, Tensor]:
    positional = (inputs["x"], inputs["alpha"], inputs["weight"], inputs.get("bias"))
    return dyt_fp8(*positional, function=function, shift=inputs.get("shift"), **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("function", BOUNDED)
def test_values_are_rounded_once(function: str, dtype: torch.dtype, bias: bool) -> None:
    inputs = make_inputs((30, 40), function=function, bias=bias, dtype=dtype, parameter_dtype=torch.float32)
    y8, scale_inv = quantize(inputs, function)
    assert (y8.dtype, y8.shape, scale_inv.dtype, scale_inv.shape) == (FP8, (30, 40), torch.float32, (1,))
    assert y8.is_contiguous()
    scaled = exact(inputs, torch.ones_like(inputs["x"]), function)[0] / scale_inv.double()
    # Half a step of e4m3, which has 3 bits behind the first down to 2^-6 and steps of 2^-9 below.
    step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2**-6))) - 3)
    assert ((y8.double() - scaled).abs() <= 0.5 * step * (1 + 1e-4)).all()


def test_the_scale_is_of_the_parameters_alone() -> None:
    inputs = make_inputs((8, 16))
    _, scale_inv = quantize(inputs)
    bound = (inputs["weight"].abs() + inputs["bias"].abs()).max()
    assert scale_inv.item() == pytest.approx(bound.item() / 448, rel=1e-6)
    inputs["x"] = (inputs["x"] * 1000).detach()
    assert torch.equal(quantize(inputs)[1], scale_inv)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_saturates_or_overflows(seed: int) -> None:
    """e4m3 has no infinity: what rounds beyond 448 is NaN, or cut off."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, generator=generator) * 10.0 ** (seed - 10)
    bias = weight * torch.rand(64, generator=generator)
    x = torch.tensor([INF, -INF, 1e30, -1e30, 3.0])[:, None].expand(-1, 64)
    y8, scale_inv = dyt_fp8(x, torch.ones(1), weight, bias)
    assert y8.float().abs().max() == 448
    expected = weight.double() * torch.tanh(x.double()) + bias.double()
    error = (y8.double() * scale_inv.double() - expected).abs()
    assert (error <= 2**-4 * expected.abs() + scale_inv.double() * 2**-9).all()


def test_weights_of_zero_give_zero() -> None:
    y8, scale_inv = dyt_fp8(torch.randn(3, 4), torch.ones(1), torch.zeros(4))
    assert (y8.float() == 0).all()
    assert scale_inv.isfinite().all()


def test_nan_stays_where_it_is() -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = math.nan
    assert dyt_fp8(x, torch.ones(1), torch.ones(4))[0].float().isnan().nonzero().tolist() == [[1, 2]]


def test_no_gradient_and_no_rows() -> None:
    inputs = make_inputs((0, 16))
    y8, scale_inv = quantize(inputs)
    assert y8.shape == (0, 16)
    assert not y8.requires_grad
    assert not scale_inv.requires_grad


def test_bad_input() -> None:
    x, one = torch.ones(2, 4), torch.ones(1)
    with pytest.raises(ValueError, match=r"'identity', whose output has no bound .* allowed are tanh"):
        dyt_fp8(x, one, torch.ones(4), function="identity")
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        dyt_fp8(x, one, torch.ones(3))
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        dyt_fp8(x.long(), one, torch.ones(4))


def test_scale_of_mixed_dtypes_is_fp32() -> None:
    scale = fp8_scale(
        torch.full((4,), 2.0, dtype=torch.bfloat16), torch.full((4,), -1.5, dtype=torch.bfloat16)
    )
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(448 / 3.5)


class Float8Tensor(torch.Tensor):
    """As TE documents it: a nominal dtype outside, FP8 inside, dequantized by every operation."""

    @staticmethod
    def __new__(cls: Any, *, shape: Any, dtype: torch.dtype, data: Tensor, **_: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=data.device)

    def __init__(
        self, *, data: Tensor, fp8_scale_inv: Tensor, fp8_dtype: str, quantizer: Any, **_: Any
    ) -> None:
        assert data.dtype == torch.uint8
        assert fp8_dtype == quantizer.fp8_dtype == "e4m3"
        self.data_, self.scale_inv, self.scale = data, fp8_scale_inv, quantizer.scale

    def dequantize(self) -> Tensor:
        return (self.data_.view(torch.float8_e4m3fn).float() * self.scale_inv).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.dequantize() if isinstance(a, Float8Tensor) else a for a in args]
        return func(*plain, **(kwargs or {}))


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Transformer Engine as far as it is used."""
    package, module, extension = (
        ModuleType(name)
        for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch")
    )
    module.Float8Tensor = Float8Tensor  # type: ignore[attr-defined]
    module.Float8Quantizer = lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
    extension.DType = SimpleNamespace(kFloat8E4M3="e4m3")  # type: ignore[attr-defined]
    for each in (package, module, extension):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return module


@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_a_linear_layer_sees_the_fp8_values_and_dyt_its_gradient(te: ModuleType, function: str) -> None:
    torch.manual_seed(0)
    norm, linear = DynamicTanh(16, function=function), torch.nn.Linear(16, 8, bias=False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(5, 16, requires_grad=True)
    y = quantized_for_te(norm, x)
    assert isinstance(y, Float8Tensor)
    assert (y.shape, y.dtype) == ((5, 16), torch.float32)
    y8, scale_inv = dyt_fp8(x, norm.alpha, norm.weight, norm.bias, function=function, shift=norm.shift)
    dequantized = y8.float() * scale_inv
    out = linear(y)
    torch.testing.assert_close(out, linear(dequantized))
    g = torch.randn_like(out)
    leaves = [x, *norm.parameters(), linear.weight]
    found = torch.autograd.grad(out, leaves, g)
    expected = torch.autograd.grad(norm(x), leaves[:-1], g @ linear.weight.detach())
    for actual, e in zip(found, (*expected, g.T @ dequantized), strict=True):
        torch.testing.assert_close(actual, e)


def test_the_scale_is_the_one_that_quantized(te: ModuleType) -> None:
    """And no reciprocal of a reciprocal, which rounds twice."""
    norm, weights = DynamicTanh(1), torch.linspace(0.5, 2, 50)
    for weight in weights:
        torch.nn.init.constant_(norm.weight, weight.item())
        y: Any = quantized_for_te(norm, torch.ones(1, 1))
        assert torch.equal(y.scale, fp8_scale(norm.weight, norm.bias))
        assert torch.equal(y.scale_inv, y.scale.reciprocal())


@pytest.mark.gpu
def test_real_transformer_engine_takes_it() -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a CUDA device with FP8")
    torch.manual_seed(0)
    norm = DynamicTanh(64, device="cuda")
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear = te.Linear(64, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
    y: Any = quantized_for_te(norm, x)
    y8, scale_inv = dyt_fp8(x, norm.alpha, norm.weight, norm.bias)
    dequantized = (y8.float() * scale_inv).bfloat16()
    torch.testing.assert_close(y.dequantize(), dequantized)
    with te.fp8_autocast(enabled=True):
        out = linear(y)
    out.sum().backward()
    # The weight is quantized as well, by TE's own recipe: 2^-4 a term.
    expected = dequantized.float() @ linear.weight.float().T
    assert (out.float() - expected).norm() < 2**-4 * expected.norm()
    gradient = norm(x)
    (dx,) = torch.autograd.grad(gradient, x, linear.weight.sum(0).expand_as(gradient))
    assert (x.grad - dx).float().norm() < 2**-3 * dx.float().norm()


def test_without_transformer_engine_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UserError, match=r"needs Transformer Engine, .* dyt_fp8"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))


def test_an_old_transformer_engine_is_refused(te: ModuleType) -> None:
    del te.Float8Quantizer
    with pytest.raises(UserError, match=r"no transformer_engine\.pytorch\.Float8Quantizer"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))


def test_recipes_do_what_te_documents() -> None:
    delayed = error.Delayed()
    # The first step knows no history: scale 1, which cuts 1000 off at 448.
    assert delayed(torch.tensor([1000.0, 1.0])).tolist() == [448.0, 1.0]
    # The second knows 1000.
    assert delayed(torch.tensor([1000.0, 2000.0])).tolist() == pytest.approx([1000.0, 1000.0])
    # The largest of the history counts, not the last.
    assert delayed(torch.tensor([2000.0, 10.0]))[0].item() == pytest.approx(2000.0)
    assert delayed(torch.tensor([2000.0]))[0].item() == pytest.approx(2000.0)
    assert error.current(torch.tensor([3.0, 1e-9])).tolist() == pytest.approx([3.0, 0.0])


def test_the_bound_is_as_good_as_current_scaling_and_better_than_delayed_at_a_jump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--steps 6 --tokens 64 --hidden 128 --jump 4 --json"
    error.main([*flags.split(), str(tmp_path / "e.json")])
    found = json.loads((tmp_path / "e.json").read_text())
    for step in found:
        assert 0.01 < step["DyT's bound"] < 1.15 * step["current scaling"]
    assert found[3]["delayed scaling"] > 2 * found[3]["DyT's bound"]
    assert found[5]["delayed scaling"] < 1.1 * found[5]["current scaling"]
    assert "| DyT's bound | " in capsys.readouterr().out
