"""DyT's output for Transformer Engine, with stand-ins of its classes: real TE needs a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.nn.te_float8 import quantized_for_te
from megatron_dyt.ops import dyt_fp8
from megatron_dyt.ops.dyt_fp8 import fp8_scale


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
    with pytest.raises(UserError, match=r"needs Transformer Engine, .* megatron_dyt\.ops\.dyt_fp8"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))


def test_an_old_transformer_engine_is_refused(te: ModuleType) -> None:
    del te.Float8Quantizer
    with pytest.raises(UserError, match=r"no transformer_engine\.pytorch\.Float8Quantizer"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))
