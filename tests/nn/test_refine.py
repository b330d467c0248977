"""The steps behind a calibration's fit: what they gain and leave alone, and when they are taken back."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_dyt import convert_norms, restore_norms
from megatron_dyt.nn import refine

SIZE = 16


class Blocks(nn.Module):
    """A residual stream through norms, and one at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(SIZE) for _ in range(5))
        self.linears = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=False):
            x = x + 2 * torch.tanh(linear(norm(x)))
        return self.norms[-1](x)


class WithoutGradients(Blocks):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.fixture
def model() -> Blocks:
    torch.manual_seed(4)
    return Blocks()


def inputs(seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(16, 20, SIZE, generator=generator)
        * torch.rand(16, 20, 1, generator=generator).add(0.3)
        * 3
    )


def converted(model: Blocks, **arguments: Any) -> Blocks:
    """A converted copy."""
    model = copy.deepcopy(model)
    convert_norms(model, inputs(), **arguments)
    return model


def same(one: Blocks, other: Blocks) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4, "channels"])
def test_other_inputs_come_nearer_too(model: Blocks, groups: Any) -> None:
    target = model(inputs(10))
    fitted, refined = (
        float((converted(model, refine=way, alpha_groups=groups)(inputs(10)) - target).square().mean())
        for way in (False, True)
    )
    assert refined < (0.97 if groups == 1 else 0.99) * fitted


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_gain_as_much(model: Blocks, dtype: torch.dtype) -> None:
    target = model(inputs(10))
    errors = {}
    for refined in (False, True):
        new = copy.deepcopy(model).to(dtype)
        convert_norms(new, inputs().to(dtype), refine=refined)
        errors[refined] = float((new(inputs(10).to(dtype)).float() - target).square().mean())
    assert errors[True] < 0.98 * errors[False]


def test_nothing_else_changes(model: Blocks) -> None:
    model.linears[0].weight.requires_grad_(False)
    new = converted(model)
    assert not new.linears[0].weight.requires_grad
    assert new.linears[1].weight.requires_grad
    assert all(parameter.grad is None for parameter in new.parameters())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(new.linears, model.linears, strict=True))
    assert not any(module._forward_hooks for module in new.modules())
    restore_norms(new)
    assert same(new, model)


def test_the_report_has_the_alphas_behind_the_steps(model: Blocks) -> None:
    report = convert_norms(model, inputs())
    assert [found.alpha for found in report] == [float(norm.alpha.detach()) for norm in model.norms]


def test_steps_that_do_not_help_are_taken_back(
    model: Blocks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refine, "RATE", 1.0)
    with caplog.at_level(logging.INFO, "megatron_dyt"):
        assert same(converted(model), converted(model, refine=False))
    assert "ends with the fit: steps from it took the error from" in caplog.text


def test_a_model_without_gradients_keeps_the_fit() -> None:
    torch.manual_seed(4)
    model = WithoutGradients()
    assert same(converted(model), converted(model, refine=False))


def test_inside_no_grad_it_works_too(model: Blocks) -> None:
    with torch.no_grad():
        inside = converted(model)
    assert same(inside, converted(model))


class Towers(nn.Module):
    """Two, of which the second one runs last; their results meet behind all norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Blocks(), Blocks()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)])


def test_another_tower_does_not_hinder_the_last_ones() -> None:
    torch.manual_seed(4)
    model = Towers()
    fitted, refined = copy.deepcopy(model), copy.deepcopy(model)
    convert_norms(fitted, inputs(), refine=False)
    convert_norms(refined, inputs())
    assert same(refined.first, fitted.first)
    assert not same(refined.second, fitted.second)
