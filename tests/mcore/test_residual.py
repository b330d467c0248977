"""Residual add and DyT as one operation in the model: where it is done, and that it changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore import compat, kept, residual
from megatron_dyt.mcore.norm import DyTNorm, dyt_sites
from megatron_dyt.nn import dynamic_tanh

pytestmark = pytest.mark.needs("sum_from_norm")

Run = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of x at every call of the fused operation."""
    calls: list[tuple[int, ...]] = []
    original = dynamic_tanh.dyt_residual

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(dynamic_tanh, "dyt_residual", spy)
    return calls


@pytest.fixture
def run(
    make_config: Callable[..., Any], build_gpt: Callable[..., Any], loss_of: Callable[[Any], torch.Tensor]
) -> Callable[..., Run]:
    """Loss and gradients of a small GPT, with or without fusion."""

    def train(fuse: bool, dtype: torch.dtype = torch.float32, **overrides: Any) -> Run:
        config = make_config(params_dtype=dtype, bf16=dtype == torch.bfloat16, **overrides)
        config.dyt = DyTConfig.unit(32, bias=True, fuse_residual=fuse)
        model = build_gpt(config).to(dtype)
        model.train()
        torch.manual_seed(3)
        loss = loss_of(model)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    return train


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 2),
    "bf16": ({"dtype": torch.bfloat16}, 2),
    "full recompute": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        4,  # once more in backward
    ),
    "mlp recompute": ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, 2),
    "mixture of experts": ({"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}, 2),
    "dropout": ({"hidden_dropout": 0.1}, 0),
    "biases": ({"add_bias_linear": True}, 0),
    "norms recomputed": ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, 0),
}


@pytest.mark.parametrize(("overrides", "calls"), VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradients_are_those_without_fusion(
    run: Callable[..., Run], fused_calls: list[tuple[int, ...]], overrides: dict[str, Any], calls: int
) -> None:
    loss, gradients = run(False, **overrides)
    assert not fused_calls
    fused_loss, fused_gradients = run(True, **overrides)
    assert fused_calls == [(16, 2, 32)] * calls
    assert torch.equal(fused_loss, loss)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=0, msg=name)


def test_evaluation_is_fused_too(
    make_config: Callable[..., Any],
    build_gpt: Callable[..., Any],
    loss_of: Callable[[Any], torch.Tensor],
    fused_calls: list[tuple[int, ...]],
) -> None:
    losses = []
    for fuse in (False, True):
        config = make_config()
        config.dyt = DyTConfig.unit(32, fuse_residual=fuse)
        model = build_gpt(config).eval()
        with torch.no_grad():
            losses.append(loss_of(model))
    assert torch.equal(*losses)
    assert len(fused_calls) == 2


def test_it_is_off_unless_asked_for(run: Callable[..., Run], fused_calls: list[tuple[int, ...]]) -> None:
    assert not DyTConfig.paper(1024).fuse_residual
    run(False)
    assert not fused_calls


def test_probe_sees_the_sum(
    make_config: Callable[..., Any], build_gpt: Callable[..., Any], loss_of: Callable[[Any], torch.Tensor]
) -> None:
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for fuse, inputs in seen.items():
        config = make_config()
        config.dyt = DyTConfig.unit(32, fuse_residual=fuse)
        model = build_gpt(config)
        for _, site in dyt_sites(model):
            site.probe = lambda module, x, inputs=inputs: inputs.append(x.detach().clone())
        loss_of(model)
    assert len(seen[True]) == len(seen[False]) == 5
    for fused, plain in zip(seen[True], seen[False], strict=True):
        assert torch.equal(fused, plain)


OBSTACLES = [
    ("--hidden-dropout", {"hidden_dropout": 0.1}),
    ("biases in linear layers", {"add_bias_linear": True}),
    ("--fp32-residual-connection", {"fp32_residual_connection": True}),
    (
        "--recompute-modules layernorm",
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    ),
    ("activation offloading", {"cpu_offloading": True}),
    ("activation offloading", {"fine_grained_activation_offloading": True}),
    ("--overlap-moe-expert-parallel-comm", {"overlap_moe_expert_parallel_comm": True}),
    ("CUDA graphs", {"cuda_graph_impl": "local"}),
    ("CUDA graphs", {"enable_cuda_graph": True}),
]


@pytest.mark.parametrize(("reason", "settings"), OBSTACLES, ids=[str(s) for _, s in OBSTACLES])
def test_what_stands_in_its_way(
    make_config: Callable[..., Any], reason: str, settings: dict[str, Any]
) -> None:
    config = make_config()
    assert residual.obstacles(config) == []
    for name, value in settings.items():
        setattr(config, name, value)  # past Megatron's own checks of what goes with what
    (found,) = residual.obstacles(config)
    assert found.startswith(reason)


def test_it_says_once_why_it_is_off(
    make_config: Callable[..., Any],
    build_gpt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kept, "_said", set())
    monkeypatch.setattr(compat, "has", lambda _feature: False)
    config = make_config(hidden_dropout=0.1)
    config.dyt = DyTConfig.unit(32, fuse_residual=True)
    for _ in range(2):
        build_gpt(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--dyt-fuse-residual" in line]
    assert "because of megatron-core before 0.17, --hidden-dropout. The results are the same." in line


def test_a_bias_or_dropout_is_megatrons_business(make_config: Callable[..., Any]) -> None:
    x, bias, stream = torch.randn(2, 1, 4), torch.randn(4), torch.randn(2, 1, 4)
    add = residual.deferred_bias_dropout_add
    assert torch.equal(add(True, False)((x, bias), stream, 0.0), x + bias + stream)
    torch.manual_seed(0)
    dropped = add(True, False)((x, None), stream, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, stream + torch.nn.functional.dropout(x, 0.5))
    for training, probability in ((False, 0.5), (True, 0.0)):
        deferred = add(training, False)((x, None), stream, probability)
        assert isinstance(deferred, residual.DeferredSum)
        assert deferred.x is x
        assert deferred.residual is stream


def test_a_layer_with_cross_attention_is_left_alone(make_config: Callable[..., Any]) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import CrossAttention

    from megatron_dyt.mcore import spec as spec_module

    config = make_config()
    config.dyt = DyTConfig.unit(32, fuse_residual=True)
    layer = get_gpt_layer_local_spec(normalization="DyT")
    before = layer.submodules.self_attn_bda
    fused = spec_module.rewrite_layer(config, layer)
    assert fused.submodules.self_attn_bda is residual.deferred_bias_dropout_add
    assert layer.submodules.self_attn_bda is before
    layer.submodules.cross_attention = CrossAttention
    assert spec_module.rewrite_layer(config, layer).submodules.self_attn_bda is before


def test_norm_gives_output_and_sum(make_config: Callable[..., Any]) -> None:
    norm = DyTNorm(make_config(), 32, role="ffn")
    x, stream = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    y, total = norm(residual.DeferredSum(x, stream))
    assert torch.equal(total, x + stream)
    assert torch.equal(y, norm(x + stream))
