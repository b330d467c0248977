"""FP8 output by a scale that is known beforehand, against fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import backends, dyt_fp8, triton_dyt
from megatron_dyt.ops.dyt_fp8 import BOUNDED, FP8, fp8_scale
from tests.ops.cases import CPU_IMPLEMENTATIONS, exact, make_inputs

INF = math.inf


def quantize(inputs: dict[str, Tensor], function: str = "tanh", **options: Any) -> tuple[Tensor, Tensor]:
    positional = (inputs["x"], inputs["alpha"], inputs["weight"], inputs.get("bias"))
    return dyt_fp8(*positional, function=function, shift=inputs.get("shift"), **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
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


@pytest.mark.parametrize("implementation", CPU_IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    inputs = {name: t.detach() for name, t in make_inputs((4, 3, 10), function="erf").items()}
    args = (*inputs.values(), "erf", implementation)
    torch.library.opcheck(torch.ops.megatron_dyt.dyt_fp8.default, args)


def test_what_our_kernels_lack_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_codegen(f: Any) -> Any:
        return torch.compile(f, dynamic=True, fullgraph=True, backend="aot_eager")

    # A GPU before Ada: the kernels are for it, but not this one.
    monkeypatch.setattr(triton_dyt, "has_fp8", lambda device: False)
    compiled = []
    monkeypatch.setattr(backends, "compiled", lambda f: compiled.append(f) or without_codegen(f))
    inputs = {name: t.detach() for name, t in make_inputs((4, 10)).items()}
    args = (*inputs.values(), None, "tanh")
    expected = torch.ops.megatron_dyt.dyt_fp8(*args, "reference")
    for implementation in ("compiled", "triton"):
        y8, scale_inv = torch.ops.megatron_dyt.dyt_fp8(*args, implementation)
        assert torch.equal(y8.float(), expected[0].float())
        assert torch.equal(scale_inv, expected[1])
    assert len(compiled) == 2


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
