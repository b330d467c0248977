"""A running scale: sigma follows what the sites see in training, once each, and alpha is divided by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.running_scale import SMALLEST, running_norms, update

Make = Callable[..., Any]


@pytest.fixture
def make_norm(make_config: Make) -> Callable[..., DyTNorm]:
    """A DyTNorm of width 8 whose running scale decays by 0.75."""

    def make(**settings: Any) -> DyTNorm:
        config = make_config()
        config.dyt = DyTConfig.auto(8, **({"running_scale": 0.75} | settings))
        return DyTNorm(config, 8, role="attn")

    return make


def seen(norm: DyTNorm, *rows: torch.Tensor) -> None:
    for each in rows:
        norm(each)


def test_sigma_is_an_average_of_the_steps_rms(make_norm: Make) -> None:
    norm = make_norm()
    small, large = torch.full((3, 8), 2.0), torch.full((9, 8), 6.0)
    seen(norm, small, large)
    update([norm])
    # Over 3 rows of 2 and 9 rows of 6: a mean square of (3 * 4 + 9 * 36) / 12 = 28.
    first = 0.75 * 1 + 0.25 * 28**0.5
    assert norm.sigma.tolist() == pytest.approx([first])
    seen(norm, small)
    update([norm])
    assert norm.sigma.tolist() == pytest.approx([0.75 * first + 0.25 * 2])


def test_an_auto_dyt_is_a_dyt_with_alpha_over_sigma(make_norm: Make) -> None:
    norm, plain = make_norm(), make_norm(running_scale=0.0)
    norm.sigma.fill_(4.0)
    with torch.no_grad():
        plain.alpha.copy_(norm.alpha / 4)
    x = torch.randn(5, 8)
    results = {}
    for each in (norm, plain):
        ours = x.clone().requires_grad_()
        y = each(ours)
        y.square().sum().backward()
        results[each] = y, ours.grad, each.weight.grad, each.alpha.grad
    for one, other in zip(results[norm][:3], results[plain][:3], strict=True):
        assert torch.equal(one, other)
    # d/da of f(a / sigma * x).
    assert torch.allclose(results[norm][3], results[plain][3] / 4, rtol=1e-6)


@pytest.mark.parametrize("rows", [torch.full((2, 8), float("inf")), torch.full((2, 8), float("nan")), None])
def test_what_is_not_finite_or_was_not_seen_leaves_sigma(make_norm: Make, rows: torch.Tensor | None) -> None:
    norm = make_norm()
    norm.sigma.fill_(3.0)
    if rows is not None:
        norm(rows)
    update([norm])
    assert norm.sigma.tolist() == [3.0]


def test_each_site_has_its_own_decay(make_norm: Make) -> None:
    norms = [make_norm(), make_norm(running_scale=0.5)]
    for norm in norms:
        norm(torch.full((2, 8), 3.0))
    update(norms)
    assert [norm.sigma.item() for norm in norms] == pytest.approx([0.75 + 0.25 * 3, 0.5 + 0.5 * 3])


def test_sigma_does_not_reach_0(make_norm: Make) -> None:
    norm = make_norm(running_scale=0.0001)
    for _ in range(4):
        seen(norm, torch.zeros(2, 8))
        update([norm])
    assert norm.sigma.tolist() == pytest.approx([SMALLEST])


def test_evaluation_is_not_seen(make_norm: Make) -> None:
    norm = make_norm()
    with torch.no_grad():
        norm(torch.full((2, 8), 5.0))
    norm.eval()(torch.full((2, 8), 5.0))
    assert norm.seen is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "recompute",
    [
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
    ],
    ids=["no recompute", "full", "selective"],
)
def test_a_site_counts_its_input_once_whatever_is_recomputed(
    make_config: Make, build_gpt: Make, loss_of: Make, recompute: dict[str, Any], fused: bool
) -> None:
    config = make_config(**recompute)
    config.dyt = DyTConfig.auto(32, fuse_residual=fused)
    norms = running_norms([model := build_gpt(config)])
    assert len(norms) == 5
    inputs: dict[DyTNorm, torch.Tensor] = {}
    for norm in norms:
        norm.probe = lambda module, x: inputs.setdefault(module, x.detach().clone())
    loss_of(model).backward()
    for norm in norms:
        assert norm.seen is not None
        squares = inputs[norm].double().square().sum()
        assert norm.seen.tolist() == pytest.approx([squares.item(), 2 * 16 * 32], rel=1e-6)


def test_a_model_cast_to_16_bits_keeps_its_sigma(make_norm: Make) -> None:
    norm = make_norm()
    norm.sigma.fill_(1 / 3)
    cast = norm.bfloat16()
    assert cast.alpha.dtype == torch.bfloat16
    assert cast.sigma.dtype == torch.float32
    assert torch.equal(cast.sigma, torch.full((1,), 1 / 3))


def test_a_model_built_without_memory_starts_at_1(make_config: Make) -> None:
    config = make_config()
    config.dyt = DyTConfig.auto(8)
    with torch.device("meta"):
        norm = DyTNorm(config, 8, role="attn")
    norm.to_empty(device="cpu").bfloat16()
    norm.reset_parameters()
    assert norm.sigma is not None
    assert (norm.sigma.tolist(), norm.alpha.tolist()) == ([1.0], [0.5])
