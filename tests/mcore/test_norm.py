from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites

Make = Callable[..., Any]
LossOf = Callable[[Any], torch.Tensor]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("function", ["tanh", "erf"])
def test_every_parameter_says_whether_its_gradient_is_partial(
    make_config: Make, sequence_parallel: bool, function: str
) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, bias=True, function=function)
    config.sequence_parallel = sequence_parallel
    norm = DyTNorm(config, 32, role="ffn")
    marks = {name: p.sequence_parallel for name, p in norm.named_parameters()}
    names = {"alpha", "weight", "bias"} | ({"shift"} if function == "erf" else set())
    assert marks == dict.fromkeys(names, sequence_parallel)


@pytest.mark.parametrize("averaged", [False, True])
def test_an_averaged_norm_says_so_on_every_parameter(make_config: Make, averaged: bool) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, bias=True, function="erf")
    norm = DyTNorm(config, 32, role="qk", averaged=averaged)
    marks = [getattr(p, "average_gradients_across_tp_domain", False) for p in norm.parameters()]
    assert marks == [averaged] * 4


@pytest.mark.parametrize("role", ["attn", "ffn", "final", "qk"])
def test_alpha_starts_at_its_roles_value(make_config: Make, role: str) -> None:
    config = make_config()
    config.dyt = DyTConfig.paper(32, alpha_attn=0.11, alpha_ffn=0.12, alpha_final=0.13, alpha_qk=0.14)
    expected = {"attn": 0.11, "ffn": 0.12, "final": 0.13, "qk": 0.14}[role]
    norm = DyTNorm(config=config, hidden_size=8, eps=1e-5, role=role)
    assert norm.alpha.item() == pytest.approx(expected)
    assert norm.weight.shape == (8,)
    assert norm.bias is None
    assert f"role={role}" in repr(norm)


def test_parameters_have_megatrons_dtype(make_config: Make) -> None:
    config = make_config(params_dtype=torch.bfloat16)
    assert {p.dtype for p in DyTNorm(config, 8, role="attn").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("fp32_residual", [False, True])
def test_an_fp32_residual_stream_leaves_the_norm_in_the_parameters_dtype(
    make_config: Make, fp32_residual: bool
) -> None:
    """The linear layers behind it take nothing else."""
    config = make_config(params_dtype=torch.bfloat16, fp32_residual_connection=fp32_residual)
    norm = DyTNorm(config, 32, role="attn")
    x = torch.randn(3, 2, 32, requires_grad=True)
    y = norm(x)
    assert y.dtype == (torch.bfloat16 if fp32_residual else torch.float32)
    expected = torch.tanh(norm.effective_alpha() * x) * norm.weight.float()
    torch.testing.assert_close(y, expected.to(y.dtype))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_forward_is_dyt_and_shows_its_input_to_a_probe(make_config: Make) -> None:
    norm = DyTNorm(make_config(), 32, role="attn")
    x = torch.randn(3, 2, 32)
    seen: list[Any] = []
    norm.probe = lambda module, given: seen.append((module, given))
    torch.testing.assert_close(norm(x), torch.tanh(norm.effective_alpha() * x) * norm.weight)
    assert seen == [(norm, x)]


def test_an_unknown_role_is_refused(make_config: Make) -> None:
    with pytest.raises(UserError, match="role is 'mlp'; allowed: attn, ffn, final, qk"):
        DyTNorm(make_config(), 8, role="mlp")  # type: ignore[arg-type]


def test_sites_are_listed_in_order(make_config: Make, build_gpt: Make) -> None:
    names = [name for name, _ in dyt_sites(build_gpt(make_config(num_layers=1)))]
    assert names == [
        "decoder.layers.0.input_layernorm",
        "decoder.layers.0.pre_mlp_layernorm",
        "decoder.final_layernorm",
    ]


def test_gradients_reach_every_dyt_parameter(make_config: Make, build_gpt: Make, loss_of: LossOf) -> None:
    config = make_config(qk_layernorm=True)
    config.dyt = DyTConfig.unit(32, bias=True)
    model = build_gpt(config)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("log_alpha", [False, True])
def test_alphas_gradient_is_the_slope_of_the_loss(
    make_config: Make, build_gpt: Make, loss_of: LossOf, log_alpha: bool
) -> None:
    config = make_config()
    config.dyt = DyTConfig.paper(32, log_alpha=log_alpha)
    model = build_gpt(config).double()
    loss_of(model).backward()
    for name, site in dyt_sites(model):
        step = 2e-3 if log_alpha else 2e-2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                site.alpha_parameter.add_(sign * step)
                values.append(loss_of(model).item())
                site.alpha_parameter.sub_(sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        # The loss is computed in fp32 whatever the model's dtype.
        assert site.alpha_parameter.grad.item() == pytest.approx(slope, rel=5e-2, abs=1e-4), name
