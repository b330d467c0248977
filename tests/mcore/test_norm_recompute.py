"""`--recompute-modules layernorm`: outputs of DyT are freed and computed again, on every release."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore import norm
from megatron_dyt.mcore.norm import DyTNorm

Make = Callable[..., Any]
LossOf = Callable[[Any], torch.Tensor]

Run = tuple[torch.Tensor, dict[str, torch.Tensor]]
LAYERNORM = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


@pytest.fixture
def run(make_config: Make, build_gpt: Make, loss_of: LossOf) -> Callable[..., Run]:
    """Loss and gradients of a small GPT."""

    def train(fuse: bool, dtype: torch.dtype = torch.float32, **overrides: Any) -> Run:
        config = make_config(params_dtype=dtype, bf16=dtype == torch.bfloat16, **overrides)
        config.dyt = DyTConfig.unit(32, bias=True, fuse_residual=fuse)
        model = build_gpt(config).to(dtype)
        loss = loss_of(model)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    return train


MODELS = [
    pytest.param({}, id="dense"),
    pytest.param({"dtype": torch.bfloat16}, id="bf16"),
    pytest.param({"dtype": torch.bfloat16, "fp32_residual_connection": True}, id="fp32 residual"),
    pytest.param(
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64},
        id="experts",
        marks=pytest.mark.needs("experts_without_te"),
    ),
]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("overrides", MODELS)
def test_gradients_are_those_without_recomputation(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], fuse: bool
) -> None:
    filled: list[DyTNorm] = []
    original = DyTNorm.recompute

    def spy(self: DyTNorm, y: torch.Tensor, x: torch.Tensor) -> None:
        assert y.untyped_storage().nbytes() == 0
        filled.append(self)
        original(self, y, x)

    monkeypatch.setattr(DyTNorm, "recompute", spy)
    loss, gradients = run(fuse, **overrides)
    assert not filled
    again_loss, again = run(fuse, **overrides, **LAYERNORM)
    assert len(filled) == len(set(filled)) == 4
    assert torch.equal(again_loss, loss)
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_graph_that_is_retained_can_be_used_again(make_config: Make, build_gpt: Make, fuse: bool) -> None:
    config = make_config(**LAYERNORM)
    config.dyt = DyTConfig.unit(32, bias=True, fuse_residual=fuse)
    model = build_gpt(config)
    tokens = torch.arange(16)[None]
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), diagonal=1)[None, None]
    # Not Megatron's cross entropy, whose backward writes over what it would need again.
    loss = model(tokens, tokens, mask).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(loss, parameters), first, strict=True):
        assert torch.equal(again, gradient)


def test_evaluation_frees_the_outputs_and_holds_nothing(
    make_config: Make, build_gpt: Make, loss_of: LossOf
) -> None:
    model = build_gpt(make_config(**LAYERNORM)).eval()
    plain = build_gpt(make_config()).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(plain))
    for layer in model.decoder.layers:
        for checkpoint in (layer.input_layernorm_checkpoint, layer.pre_mlp_norm_checkpoint):
            assert checkpoint.dyt_output.y is None
            assert checkpoint.dyt_output.x is None


@pytest.mark.parametrize("settings", [{"cuda_graph_impl": "local"}, {"cpu_offloading": True}], ids=str)
def test_with_graphs_and_offloading_megatron_does_it(make_config: Make, settings: dict[str, Any]) -> None:
    config = make_config()
    assert DyTNorm(config, 32, role="attn").refills
    for name, value in settings.items():
        setattr(config, name, value)
    assert not DyTNorm(config, 32, role="attn").refills


def test_other_functions_are_megatrons(make_config: Make) -> None:
    calls: list[Any] = []
    checkpoint = norm.wrap_checkpoint(lambda *args: calls.append(args) or "result")
    discard = norm.wrap_discard(lambda *args: calls.append(args))
    stock = torch.nn.Linear(2, 2)
    owner = type("Owner", (), {})()
    x = torch.ones(1, 2)
    assert checkpoint(owner, stock, x) == "result"
    discard(owner, x)
    assert calls == [(owner, stock, x), (owner, x)]
    site = DyTNorm(make_config(), 32, role="attn")
    site.refills = False
    checkpoint(owner, site, x)
    assert calls[-1] == (owner, site, x)
