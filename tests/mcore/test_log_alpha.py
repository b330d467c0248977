"""A DyT that learns the logarithm of alpha: the same function, and updates of alpha by a share of itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore.norm import DyTNorm

Make = Callable[..., Any]


@pytest.fixture
def make_norm(make_config: Make) -> Callable[..., DyTNorm]:
    def make(**settings: Any) -> DyTNorm:
        config = make_config()
        config.dyt = DyTConfig.auto(8, running_scale="none", **settings)
        return DyTNorm(config, 8, role="ffn")

    return make


def test_it_starts_where_the_preset_puts_alpha_whatever_the_way(make_norm: Make) -> None:
    norm = make_norm(alpha_ffn=0.31)
    assert float(norm.effective_alpha()) == pytest.approx(0.31)
    norm.log_alpha.data.fill_(7.0)
    norm.reset_parameters()
    assert float(norm.effective_alpha()) == pytest.approx(0.31)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "log_alpha"]


def test_value_and_gradients_are_those_of_exp_of_ten_times_the_parameter(make_norm: Make) -> None:
    norm, plain = make_norm(), make_norm(log_alpha=False)
    with torch.no_grad():
        norm.log_alpha.fill_(-0.4)
        plain.alpha.fill_(torch.tensor(-4.0).exp())
    x = torch.randn(5, 8)
    found = {}
    for each in (norm, plain):
        ours = x.clone().requires_grad_()
        y = each(ours)
        y.square().sum().backward()
        found[each] = y, ours.grad, each.weight.grad, each.alpha_parameter.grad
    for one, other in zip(found[norm][:3], found[plain][:3], strict=True):
        assert torch.allclose(one, other, rtol=1e-6)
    # d exp(10 p) / dp = 10 exp(10 p).
    assert torch.allclose(found[norm][3], 10 * plain.alpha.detach() * found[plain][3], rtol=1e-6)


@pytest.mark.parametrize("initial", [0.01, 1.0, 50.0])
def test_adam_changes_alpha_by_ten_learning_rates_of_itself(make_norm: Make, initial: float) -> None:
    norm = make_norm(alpha_ffn=initial)
    adam = torch.optim.Adam([norm.log_alpha], lr=1e-3)
    before = float(norm.effective_alpha())
    norm(torch.randn(5, 8)).sum().backward()
    adam.step()
    assert abs(float(norm.effective_alpha()) / before - 1) == pytest.approx(10e-3, rel=1e-2)


def test_16_bits_hold_the_logarithm(make_norm: Make) -> None:
    norm = make_norm().bfloat16()
    assert norm(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert float(norm.effective_alpha()) == pytest.approx(1.0, rel=1e-2)
    assert norm.effective_alpha().dtype == torch.float32
