"""What is measured at the norms of models whose norms are known."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.config import LOG_ALPHA_RATE
from megatron_dyt.errors import UserError
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.probe import Measurement, SiteMeasurement, measure
from tests.mcore.conftest import build_gpt, make_config, make_spec, world  # noqa: F401

SIZE = 32


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    """Layers with a norm each, a norm behind them, and a head of 5 classes."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Block(norm) for norm in norms)
        self.last = nn.RMSNorm(SIZE)
        self.head = nn.Linear(SIZE, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x))


class PaperDyT(nn.Module):
    """As the paper's code has it: no attribute says that it is tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.7]))
        self.weight = nn.Parameter(torch.full((SIZE,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(self.alpha * x)


def batch() -> torch.Tensor:
    return torch.randn(3, 40, SIZE, generator=torch.Generator().manual_seed(0))


def sites(found: Measurement) -> dict[str, SiteMeasurement]:
    return {site.name: site for site in found.sites}


def test_norms_of_all_kinds_are_found_with_place_and_layer() -> None:
    model = Model(nn.LayerNorm(SIZE), nn.RMSNorm(SIZE), DynamicTanh(SIZE, function="erf"), PaperDyT())
    found = measure(model, batch()).sites
    assert [(each.kind, each.function, each.place, each.layer) for each in found] == [
        ("LayerNorm", None, "norm", 1),
        ("RMSNorm", None, "norm", 2),
        ("DyT", "erf", "norm", 3),
        ("DyT", "tanh", "norm", 4),
        ("RMSNorm", None, "last", None),
    ]
    assert {(each.tokens, each.channels) for each in found} == {(120, SIZE)}


def test_statistics_of_the_input() -> None:
    x = batch()
    x[0, 0, 0] = 50.0
    first = measure(Model(DynamicTanh(SIZE, alpha_init=0.8)), x).sites[0]
    std = float(x.std(correction=0))
    assert first.input_std == pytest.approx(std, rel=1e-5)
    assert first.alpha_std == pytest.approx(0.8 * std, rel=1e-5)
    assert first.saturated == pytest.approx(float((x.abs() > 2.5).float().mean()), rel=1e-5)
    assert first.kurtosis == pytest.approx(float(((x - x.mean()) ** 4).mean()) / std**4, rel=1e-4)
    assert first.largest == pytest.approx(50 / std, rel=1e-5)
    rms = x.square().mean(-1).sqrt()
    assert first.token_spread == pytest.approx(float(rms.std(correction=0) / rms.mean()), rel=1e-4)


def test_the_tanh_nearest_to_a_dyt_is_its_own() -> None:
    """Of its map without weight and bias, which are anything."""
    dyt = DynamicTanh(SIZE, alpha_init=0.9)
    nn.init.uniform_(dyt.weight, -2, 2)
    nn.init.uniform_(dyt.bias, -2, 2)
    first = measure(Model(dyt), batch()).sites[0]
    assert first.tanh_alpha == pytest.approx(0.9, rel=0.01)
    assert first.tanh_gamma == pytest.approx(1, rel=0.01)
    assert first.tanh_r2 > 0.9999
    z = torch.tanh(0.9 * batch()).flatten()
    line = float(z @ batch().flatten() / batch().square().sum())
    assert first.line_slope == pytest.approx(line, rel=0.02)
    assert 1 - first.line_r2 == pytest.approx(
        float((z - line * batch().flatten()).square().sum() / z.square().sum()), rel=0.05
    )


def test_a_norm_is_seen_without_its_weight() -> None:
    """A norm of tokens of one size is a straight line, whatever its weight."""
    x = nn.functional.normalize(batch(), dim=-1) * 3
    norm = nn.RMSNorm(SIZE)
    nn.init.uniform_(norm.weight, 0, 9)
    first = measure(Model(norm), x).sites[0]
    assert first.line_r2 == pytest.approx(1, abs=1e-5)
    assert first.line_slope == pytest.approx(SIZE**0.5 / 3, rel=1e-4)
    assert first.token_spread == pytest.approx(0, abs=1e-5)


def test_tokens_of_different_sizes_bend_a_norm() -> None:
    x = batch() * torch.logspace(-1, 1, 40)[:, None]
    first = measure(Model(nn.RMSNorm(SIZE)), x).sites[0]
    assert first.tanh_r2 - first.line_r2 > 0.1
    assert first.points is not None
    slopes = first.points.y / first.points.x
    assert slopes == pytest.approx(1 / first.points.token_rms, rel=0.01)


def test_points_keep_the_largest_inputs() -> None:
    x = batch()
    x[1, 2, 3] = -70.0
    points = measure(Model(nn.RMSNorm(SIZE)), x, points=100).sites[0].points
    assert points is not None
    assert len(points.x) <= 100
    assert points.x.min() == -70
    at = points.x.argmin()
    assert points.token_rms[at] == pytest.approx(float(x[1, 2].square().mean().sqrt()), rel=1e-5)
    assert points.channel_rms[at] == pytest.approx(float(x[..., 3].square().mean().sqrt()), rel=1e-5)


def test_gradients_by_layer_are_those_of_the_loss() -> None:
    model, x, targets = Model(nn.RMSNorm(SIZE), PaperDyT()), batch(), torch.arange(120).reshape(3, 40) % 5
    model.layers[0].eval()
    found = measure(model, x, targets, points=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [model.training, model.layers[0].training, model.layers[1].training] == [True, False, True]
    logits = model(x)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.logit_std == pytest.approx(float(logits.std(-1).mean()), rel=1e-4)
    by_part = {each.part: each for each in found.gradients}
    assert list(by_part) == ["layers.0", "layers.1", "last", "head"]
    for part, each in by_part.items():
        parameters = list(model.get_submodule(part).parameters())
        grads = torch.cat(
            [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        )
        assert each.grad_norm == pytest.approx(float(grads.norm()), rel=1e-4), part
        assert each.parameters == sum(parameter.numel() for parameter in parameters)


def test_channels_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), DynamicTanh(8, channel_dim=1))
    (site,) = measure(model, torch.randn(2, 3, 5, 4)).sites
    assert (site.tokens, site.channels) == (40, 8)


def test_alpha_learned_by_its_logarithm(
    make_config: Callable[..., Any],  # noqa: F811
    build_gpt: Callable[..., Any],  # noqa: F811
) -> None:
    model = build_gpt(make_config("DyT"))
    model.decoder.final_layernorm.log_alpha.data.fill_(math.log(0.7) / LOG_ALPHA_RATE)
    ids = torch.arange(32).reshape(2, 16)
    call = {"input_ids": ids, "position_ids": torch.arange(16).expand(2, 16), "attention_mask": None}
    final = sites(measure(model, call, ids))["decoder.final_layernorm"]
    assert final.alpha == pytest.approx(0.7)
    assert final.tanh_alpha == pytest.approx(final.alpha, rel=0.01)
    assert all(norm.probe is None for norm in model.modules() if hasattr(norm, "probe"))


def test_several_alphas_are_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(DynamicTanh(SIZE, alpha_groups=4), DynamicTanh(SIZE, function=torch.sin))
    with caplog.at_level("WARNING", "megatron_dyt.probe.sites"):
        logging.getLogger("megatron_dyt.probe.sites").addHandler(caplog.handler)
        found = measure(model, batch())
        logging.getLogger("megatron_dyt.probe.sites").removeHandler(caplog.handler)
    assert [site.name for site in found.sites] == ["last"]
    said = " ".join(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert "left layers.0.norm: it has 4 alphas" in said
    assert "left layers.1.norm: " in said


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="Sequential has no LayerNorm, RMSNorm or DyT"):
        measure(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4))
    with pytest.raises(UserError, match=r"input of layers.0.norm has values that are not finite"):
        measure(Model(nn.RMSNorm(SIZE)), torch.full((2, 3, SIZE), torch.nan))

    with pytest.raises(UserError, match=r"input of layers.0.norm is the same everywhere"):
        measure(Model(nn.RMSNorm(SIZE)), torch.ones(2, 3, SIZE))

    class Unreached(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UserError, match="reaches none of the 1 norms of Unreached"):
        measure(Unreached(), batch())
