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
        assert torch.equal(quantizer.scale, 1 / fp8_scale_inv)
        self.data_, self.scale_inv = data, fp8_scale_inv

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


def test_without_transformer_engine_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UserError, match=r"needs Transformer Engine, .* megatron_dyt\.ops\.dyt_fp8"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))


def test_an_old_transformer_engine_is_refused(te: ModuleType) -> None:
    del te.Float8Quantizer
    with pytest.raises(UserError, match=r"no transformer_engine\.pytorch\.Float8Quantizer"):
        quantized_for_te(DynamicTanh(4), torch.ones(2, 4))
