"""`recompute_dyt`: an output whose memory was freed comes back for those who had saved it."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import backends, dyt, recompute_dyt
from tests.ops.cases import CPU_IMPLEMENTATIONS, call, make_inputs, needs_cpu_kernels, split, upstream


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize(("function", "dtype"), [("tanh", torch.bfloat16), ("erf", torch.float32)])
def test_values_come_back_bit_for_bit(
    implementation: str, function: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The name `megatron_dyt.ops.dyt` is the function.
    module = importlib.import_module("megatron_dyt.ops.dyt")
    monkeypatch.setattr(module, "choose_implementation", lambda *args: implementation)
    inputs = make_inputs((70, 24), function=function, dtype=dtype)
    y = call(inputs, function)
    view, before, version = y.view(7, 10, 24)[2:], y.clone(), y._version
    y.untyped_storage().resize_(0)
    x, (alpha, weight, bias, shift, _) = split(inputs, function)
    recompute_dyt(y, x, alpha, weight, bias, function=function, shift=shift)
    assert torch.equal(y, before)
    assert torch.equal(view, before.view(7, 10, 24)[2:])
    assert y._version == version


def test_an_output_in_another_dtype_comes_back() -> None:
    inputs = make_inputs((6, 8))
    y = dyt(*inputs.values()).to(torch.bfloat16)
    before = y.clone()
    y.untyped_storage().resize_(0)
    recompute_dyt(y, *inputs.values())
    assert torch.equal(y, before)


@pytest.mark.parametrize("function", ["tanh", torch.sin])
def test_alpha_by_channel(function: Any) -> None:
    x, weight = torch.randn(5, 8), torch.randn(8)
    alpha = torch.linspace(0.3, 1.7, 8)
    y = dyt(x, alpha, weight, function=function)
    before = y.clone()
    y.untyped_storage().resize_(0)
    recompute_dyt(y, x, alpha, weight, function=function)
    assert torch.equal(y, before)


def test_what_the_next_layer_saved_is_right_again() -> None:
    inputs = make_inputs((9, 16))
    linear = torch.nn.Linear(16, 4)
    leaves = [*inputs.values(), linear.weight]
    plain = linear(dyt(*inputs.values()))
    dy = upstream(plain)
    expected = torch.autograd.grad(plain, leaves, dy)
    y = dyt(*inputs.values())
    result = linear(y)
    y.untyped_storage().resize_(0)
    result.register_hook(lambda _: recompute_dyt(y.detach(), *inputs.values()))
    for actual, e in zip(torch.autograd.grad(result, leaves, dy), expected, strict=True):
        assert torch.equal(actual, e)


@needs_cpu_kernels
def test_it_writes_into_the_memory_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second buffer and copy where dtypes agree."""
    inputs = make_inputs((6, 8))
    cpu, outs = backends.IMPLEMENTATIONS["cpu"], []

    def spy(*args: object) -> Tensor:
        outs.append(args[-1])
        return cpu.forward(*args)

    y = dyt(*inputs.values())
    y.untyped_storage().resize_(0)
    monkeypatch.setitem(backends.IMPLEMENTATIONS, "cpu", cpu._replace(forward=spy))
    recompute_dyt(y, *inputs.values())
    assert [out.data_ptr() for out in outs] == [y.data_ptr()]
