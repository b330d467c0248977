"""The fit of DyT to a norm is the least-squares one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dyt.nn.calibrate import Fit, fit, run_doubled
from megatron_dyt.ops.reference import FUNCTIONS


def data(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens whose sizes differ, and RMSNorm of them."""
    torch.manual_seed(5)
    x = torch.randn(3, 40, 16) * torch.rand(3, 40, 1).add(0.5) * scale + 0.1 * scale
    return x, x / x.square().mean(-1, keepdim=True).sqrt() * torch.linspace(0.5, 2, 16)


def error_of(found: Fit, x: Tensor, y: Tensor, function: str = "tanh") -> float:
    made = found.weight * FUNCTIONS[function].value(found.alpha * x) + found.bias
    return float((y - made).square().sum() / y.square().sum())


@pytest.mark.parametrize("function", ["tanh", "erf", "hardtanh", "isru"])
def test_what_dyt_made_is_found_again(function: str) -> None:
    x, _ = data(30)
    weight, bias = torch.linspace(-2, 3, 16), torch.linspace(1, 2, 16)
    found = fit(x, weight * FUNCTIONS[function].value(0.04 * x) + bias, function=function)
    assert float(found.alpha) == pytest.approx(0.04, rel=0.01)
    assert torch.allclose(found.weight, weight, atol=0.01)
    assert torch.allclose(found.bias, bias, atol=0.02)
    assert found.error < 1e-5


@pytest.mark.parametrize("groups", [4, 16])
def test_each_group_is_fitted_as_if_alone(groups: int) -> None:
    x, y = data()
    x = x * torch.logspace(-1, 1, 16)
    found = fit(x, y, groups=groups)
    size = 16 // groups
    squares = 0.0
    for group in range(groups):
        part = slice(size * group, size * (group + 1))
        alone = fit(x[..., part], y[..., part])
        torch.testing.assert_close(found.alpha[group], alone.alpha[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.weight[part], alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias[part], alone.bias, rtol=1e-4, atol=1e-5)
        squares += alone.error * float(y[..., part].square().sum())
    assert found.error == pytest.approx(squares / float(y.square().sum()), rel=1e-4)


def test_a_channel_of_zeros_has_the_others_alpha() -> None:
    x, y = data()
    x[..., 3] = 0
    found = fit(x, y, groups=16)
    assert found.alpha.isfinite().all()
    assert found.weight[3] == 0


@pytest.mark.parametrize("bias", [False, True])
def test_no_neighbour_is_better(bias: bool) -> None:
    x, y = data()
    best = fit(x, y, bias=bias)
    assert best.error == pytest.approx(error_of(best, x, y), rel=1e-4)
    assert 0.001 < best.error < 0.1
    assert bool(best.bias.any()) == bias
    for factor in (0.97, 1.03):
        assert error_of(best._replace(weight=best.weight * factor), x, y) > best.error
        if bias:
            assert error_of(best._replace(bias=best.bias + factor - 1), x, y) > best.error
        assert error_of(best._replace(alpha=best.alpha * factor), x, y) > best.error


def test_weights_are_those_of_a_least_squares_solver() -> None:
    x, y = data()
    found = fit(x, y)
    bounded = torch.tanh(found.alpha * x).flatten(0, 1)
    for channel in (0, 7, 15):
        columns = torch.stack([bounded[:, channel], torch.ones(120)], dim=1)
        solution = torch.linalg.lstsq(columns, y.flatten(0, 1)[:, channel]).solution
        assert torch.allclose(solution, torch.stack([found.weight[channel], found.bias[channel]]), atol=1e-4)


def test_alpha_goes_with_the_scale_of_the_input() -> None:
    small, large = fit(*data(1e-3)), fit(*data(1e3))
    assert small.alpha / large.alpha == pytest.approx(1e6, rel=1e-3)
    assert torch.allclose(small.weight, large.weight, rtol=1e-3)


def test_a_channel_without_a_signal_has_weight_zero() -> None:
    x, y = data()
    x[..., 3] = 0
    for bias in (False, True):
        found = fit(x, y, bias=bias)
        assert found.weight[3] == 0
        assert found.weight.isfinite().all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (None, "zero everywhere")],
)
def test_values_that_tell_nothing(spoil: float | None, message: str) -> None:
    x, y = data()
    x = torch.zeros_like(x) if spoil is None else x.masked_fill(x > 1, spoil)
    with pytest.raises(ValueError, match=message):
        fit(x, y)


class Recorder(torch.nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.seen, self.mask, self.scale, self.mode = ids, mask, scale, self.training


def test_the_batch_is_put_behind_itself() -> None:
    model, ids = Recorder(), torch.arange(6).reshape(3, 2)
    run_doubled(model, ids)
    assert torch.equal(model.seen, torch.cat([ids, ids]))
    run_doubled(model, {"ids": ids, "mask": ids > 2, "scale": torch.ones(1)})
    assert torch.equal(model.mask, torch.cat([ids > 2, ids > 2]))
    assert model.scale.shape == (1,)
    assert (model.mode, model.training) == (False, True)
    with pytest.raises(ValueError, match="but no tensor of sequences"):
        run_doubled(model, {"mask": None})
