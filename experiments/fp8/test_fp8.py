"""FP8 output by a scale that is known beforehand, against fp64."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import exact, make_inputs

sys.path.insert(0, str(Path(__file__).parent))
fp8 = importlib.import_module("fp8")
error = importlib.import_module("error")
BOUNDED, FP8, dyt_fp8, fp8_scale = fp8.BOUNDED, fp8.FP8, fp8.dyt_fp8, fp8.fp8_scale
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
