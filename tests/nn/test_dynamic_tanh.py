"""The module: its parameters, initial values and agreement with the paper's formula."""

import math
from typing import Any

import pytest
import torch

from megatron_dyt.nn import DynamicTanh


@pytest.mark.parametrize(("function", "bias"), [("tanh", True), ("tanh", False), ("erf", True)])
def test_computes_the_formula(function: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = DynamicTanh(8, alpha_init=0.7, bias=bias, function=function, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    assert (module.shift is not None) == (function == "erf")
    assert (module.bias is not None) == bias
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    z = module.alpha * x + (0 if module.shift is None else module.shift)
    expected = module.weight * getattr(torch, function)(z) + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 8), (2, 8, 3, 4, 5)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_channels_first(shape: tuple[int, ...], contiguous: bool) -> None:
    torch.manual_seed(0)
    module = DynamicTanh(8, alpha_init=0.7, channel_dim=1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(shape) if contiguous else torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    x.requires_grad_()
    weight, bias = (each.view(8, *[1] * (len(shape) - 2)) for each in (module.weight, module.bias))
    expected = weight * torch.tanh(module.alpha * x) + bias
    y = module(x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous() or not contiguous
    inputs = [x, *module.parameters()]
    dy = torch.randn(shape)
    for name, mine, right in zip(
        ["x", "alpha", "weight", "bias"],
        torch.autograd.grad(y, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("alpha_groups", "groups"), [(1, 1), (2, 2), ("channels", 6)])
@pytest.mark.parametrize("function", ["tanh", lambda z: z / (1 + z.abs())])
def test_alpha_by_group(function: Any, alpha_groups: Any, groups: int) -> None:
    module = DynamicTanh(6, function=function, alpha_groups=alpha_groups, channel_dim=1, dtype=torch.float64)
    assert module.alpha.tolist() == [0.5] * groups
    with torch.no_grad():
        module.alpha *= torch.arange(1, groups + 1)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    f = torch.tanh if function == "tanh" else torch.nn.functional.softsign
    # Channel by channel.
    size = 6 // groups
    expected = torch.stack(
        [module.weight[c] * f(module.alpha[c // size] * x[:, c]) + module.bias[c] for c in range(6)], 1
    )
    torch.testing.assert_close(module(x), expected)
    dy = torch.randn_like(x)
    found = torch.autograd.grad(module(x), inputs, dy)
    for mine, right in zip(found, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(mine, right)
    assert (f"alpha_groups={groups}" in repr(module)) == (groups > 1)
    module.reset_parameters()
    assert module.alpha.tolist() == [0.5] * groups


def test_only_forward_takes_channels_first() -> None:
    x = torch.ones(2, 8, 3)
    with pytest.raises(ValueError, match="channel_dim is 1; only forward"):
        DynamicTanh(8, channel_dim=1).forward_residual(x, x)


@pytest.mark.parametrize(("function", "shift"), [("tanh", {}), ("erf", {"shift": [0.0]})])
@pytest.mark.parametrize(("bias", "extra"), [(True, {"bias": [0.0, 0.0, 0.0]}), (False, {})])
def test_initial_parameters(
    bias: bool, extra: dict[str, list[float]], function: str, shift: dict[str, list[float]]
) -> None:
    module = DynamicTanh(3, alpha_init=0.25, bias=bias, function=function)
    values = {name: p.tolist() for name, p in module.named_parameters()}
    assert values == {"alpha": [0.25], "weight": [1.0, 1.0, 1.0], **extra, **shift}


def test_meta_device_then_reset_gives_the_initial_values() -> None:
    module = DynamicTanh(3, alpha_init=0.8, function="erf", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    module.reset_parameters()
    expected = DynamicTanh(3, alpha_init=0.8, function="erf", dtype=torch.bfloat16).state_dict()
    actual = module.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_training_moves_every_parameter_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = DynamicTanh(16, function="erf")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    x, target = torch.randn(64, 16), torch.rand(64, 16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (module(x) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_compiles_into_one_graph() -> None:
    module, x = DynamicTanh(8), torch.randn(3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_repr_shows_the_configuration() -> None:
    assert repr(DynamicTanh(8, bias=False)) == (
        "DynamicTanh(8, alpha_init=0.5, weight_init=1, bias=False, function='tanh')"
    )


@pytest.mark.parametrize("alpha_init", [0.0, -0.5, math.nan, math.inf])
def test_bad_alpha_init(alpha_init: float) -> None:
    with pytest.raises(ValueError, match=f"alpha_init is {alpha_init}; it must be finite and > 0"):
        DynamicTanh(8, alpha_init=alpha_init)


def test_bad_sizes_and_names() -> None:
    with pytest.raises(ValueError, match="hidden_size is 0; it must be at least 1"):
        DynamicTanh(0)
    with pytest.raises(ValueError, match=r"function is 'relu'; allowed are tanh, .*identity"):
        DynamicTanh(8, function="relu")
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"alpha has {groups} values for 8 channels; allowed are 1 and"):
            DynamicTanh(8, alpha_groups=groups)
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed are auto, triton, torch"):
        DynamicTanh(8, backend="cuda")


def test_weight_init_fills_the_weight_and_must_be_finite() -> None:
    assert DynamicTanh(3, weight_init=2.5).weight.tolist() == [2.5] * 3
    with pytest.raises(ValueError, match="weight_init is nan; it must be finite"):
        DynamicTanh(3, weight_init=float("nan"))
