"""Norms become DyT, whoever made them, and a model that cannot be converted stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_dyt import DynamicTanh, convert_norms
from megatron_dyt.nn.calibrate import fit

SIZE = 12


class ZeroCenteredNorm(nn.Module):
    """Gemma's: the weight is what it multiplies by, less 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


class CenteredNorm(nn.Module):
    """A LayerNorm of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt() * self.weight + self.bias


class ScaleNorm(nn.Module):
    """Called a norm, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def llama_norm() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(SIZE)


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


KINDS: dict[str, tuple[Callable[[], nn.Module], bool, float]] = {
    # how it is made, whether it has a bias, what its weight multiplies by beyond the stored one
    "LayerNorm": (lambda: nn.LayerNorm(SIZE), True, 0),
    "LayerNorm without bias": (lambda: nn.LayerNorm(SIZE, bias=False), False, 0),
    "RMSNorm": (lambda: nn.RMSNorm(SIZE), False, 0),
    "transformers": (llama_norm, False, 0),
    "zero-centered": (ZeroCenteredNorm, False, 1),
    "own LayerNorm": (CenteredNorm, True, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_and_bias_are_kept(kind: str, dtype: torch.dtype) -> None:
    make, has_bias, less = KINDS[kind]
    norm = randomized(make()).to(dtype)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), norm)
    (found,) = convert_norms(model, alpha_init=0.3)
    dyt = model[1]
    assert isinstance(dyt, DynamicTanh)
    assert (found.name, found.alpha, found.error) == ("1", 0.3, None)
    assert {parameter.dtype for parameter in dyt.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in dyt.parameters())
    assert torch.equal(dyt.weight, (norm.weight.float() + less).to(dtype))
    x = torch.randn(5, SIZE).to(dtype)
    expected = torch.tanh(0.3 * x.double()) * dyt.weight.double()
    if has_bias:
        expected = expected + norm.bias.double()
    assert (dyt.bias is not None) == has_bias
    assert torch.allclose(dyt(x).double(), expected, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_norms_without_weight() -> None:
    model = nn.Sequential(
        nn.LayerNorm(SIZE, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False)
    )
    convert_norms(model)
    assert [module.hidden_size for module in model] == [SIZE, 8]
    assert torch.equal(model[0].weight, torch.ones(SIZE))


def test_places_and_names() -> None:
    shared = nn.LayerNorm(SIZE)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.Linear(SIZE, SIZE), nn.ModuleList([nn.RMSNorm(SIZE)])),
            "b": shared,
            "kept": nn.RMSNorm(SIZE),
            "others": nn.Sequential(nn.BatchNorm1d(SIZE), nn.GroupNorm(2, SIZE), nn.InstanceNorm1d(SIZE)),
        }
    )
    others = list(model["others"])
    alphas = {"a.0": 0.25, "a.2.0": 0.75}
    found = convert_norms(model, alpha_init=alphas.__getitem__, select=lambda name: name != "kept")
    assert {each.name: each.alpha for each in found} == alphas
    assert model["a"][0] is model["b"]
    assert float(model["b"].alpha.detach()) == 0.25
    assert isinstance(model["kept"], nn.RMSNorm)
    assert list(model["others"]) == others


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.RMSNorm(SIZE), CenteredNorm())
    convert_norms(model, alpha_init=0.7)
    assert all(isinstance(module, DynamicTanh) and module.alpha.is_meta for module in model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential has no LayerNorm or RMSNorm"),
        (lambda: nn.LayerNorm(4), "replaces the norms inside a model"),
        (lambda: nn.Sequential(ScaleNorm()), r"0 \(ScaleNorm\) computes neither .*select=lambda"),
        (lambda: nn.Sequential(nn.LayerNorm((3, 4))), "0 normalizes the last 2 dimensions"),
    ],
)
def test_what_cannot_be_converted(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_norms(make())


def test_wrong_alpha() -> None:
    with pytest.raises(ValueError, match=r"alpha_init is -1"):
        convert_norms(nn.Sequential(nn.RMSNorm(4)), alpha_init=-1.0)


# --- calibration ----------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Residual blocks, as in a transformer: norm, linear layer, tanh, added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(randomized(nn.RMSNorm(SIZE)) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + 2 * torch.tanh(linear(norm(x)))
        return x


@pytest.fixture
def blocks() -> Blocks:
    torch.manual_seed(4)
    return Blocks()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(8, 20, SIZE, generator=generator) * 3


@pytest.mark.parametrize("sequential", [True, False])
def test_each_site_is_fitted_to_its_norm(blocks: Blocks, sequential: bool) -> None:
    before = copy.deepcopy(blocks).requires_grad_(False)
    report = convert_norms(blocks, inputs(), sequential=sequential)
    old = new = inputs()
    for index, found in enumerate(report):
        expected = before.norms[index](old)
        best = fit(new if sequential else old, expected)
        dyt = blocks.norms[index]
        assert found.error == pytest.approx(best.error, rel=1e-3)
        assert found.alpha == pytest.approx(best.alpha, rel=1e-3)
        assert torch.allclose(dyt.weight, best.weight, rtol=1e-3)
        assert torch.allclose(dyt.bias, best.bias, atol=1e-4)
        old = old + 2 * torch.tanh(before.linears[index](expected))
        new = new + 2 * torch.tanh(before.linears[index](dyt(new).detach()))


def test_calibration_brings_the_output_near(blocks: Blocks) -> None:
    target, errors = blocks(inputs()).detach(), {}
    ways: dict[str, dict[str, Any]] = {
        "none": {"calibration": None},
        "alone": {"sequential": False},
        "in sequence": {},
    }
    for way, arguments in ways.items():
        model = copy.deepcopy(blocks)
        convert_norms(model, **({"calibration": inputs()} | arguments))
        errors[way] = float((model(inputs()).detach() - target).square().mean())
    assert errors["in sequence"] < 0.2 * errors["none"]
    assert errors["alone"] < 0.2 * errors["none"]


def test_without_a_bias(blocks: Blocks) -> None:
    convert_norms(blocks, inputs(), bias=False)
    assert all(norm.bias is None for norm in blocks.norms)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: setattr(model, "head", nn.RMSNorm(SIZE)), "does not reach head; give a batch"),
        (lambda model: model.linears[1].weight.data.fill_(float("nan")), "not finite"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(
    blocks: Blocks, spoil: Callable[[Blocks], None], message: str
) -> None:
    spoil(blocks)
    modules = list(blocks.modules())
    with pytest.raises(ValueError, match=message):
        convert_norms(blocks, inputs())
    assert list(blocks.modules()) == modules
    assert all(module.training for module in modules)
