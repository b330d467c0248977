"""Folding of DyT's weight and bias into the layers behind it changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore.folding import fold_
from megatron_dyt.mcore.norm import DyTNorm, dyt_sites
from tests import families

Make = Callable[..., Any]


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(32).reshape(2, 16) * 7 % 64
    positions = torch.arange(16).expand(2, 16)
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), diagonal=1)[None, None]
    with torch.no_grad():
        output: torch.Tensor = model(tokens, positions, mask)
    return output


@pytest.fixture
def build(make_config: Make, make_latent_config: Make, build_gpt: Make) -> Make:
    """A GPT whose DyT parameters are all different and far from 1 and 0."""

    def make(latent: bool = False, function: str = "tanh", bias: bool = True, **options: Any) -> Any:
        model_options = {name: options.pop(name) for name in ("tied",) if name in options}
        config = (make_latent_config if latent else make_config)(**options)
        config.dyt = DyTConfig.unit(32, bias=bias, function=function)
        model = build_gpt(config, **model_options).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, norm in dyt_sites(model):
                for parameter in (norm.weight, norm.bias):
                    if parameter is not None:
                        parameter.add_(torch.randn(parameter.shape, generator=generator))
        return model

    return make


CASES = [
    pytest.param({}, 5, id="dense"),
    pytest.param({"function": "erf"}, 5, id="derf"),
    pytest.param({"bias": False}, 5, id="no bias"),
    pytest.param({"add_bias_linear": True}, 5, id="biases of its own"),
    pytest.param({"tied": True}, 4, id="tied"),
    pytest.param({"qk_layernorm": True}, 5, id="queries and keys"),
    pytest.param(
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64},
        3,
        id="experts",
        marks=pytest.mark.needs("experts_without_te"),
    ),
    pytest.param(
        {"latent": True},
        5,
        id="latent attention",
        marks=pytest.mark.needs("latent_attention_without_te"),
    ),
]


@pytest.mark.parametrize(("options", "folded"), CASES)
def test_logits_are_the_same(build: Make, options: dict[str, Any], folded: int) -> None:
    model = build(**options)
    before = logits(model)
    sites = [name for name, _ in dyt_sites(model)]
    result = fold_(model)
    assert len(result.folded) == folded
    assert sorted([*result.folded, *result.left]) == sorted(sites)
    for name in result.folded:
        norm = model.get_submodule(name)
        assert (norm.weight == 1).all()
        assert norm.bias is None or not norm.bias.any()
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * before.abs().max().item())
    # The weights have changed, so this was no comparison of a model with itself.
    assert not torch.equal(after, before)
    assert fold_(model).folded == result.folded  # once more changes nothing
    assert torch.equal(logits(model), after)


def test_what_is_left_has_a_reason(build: Make) -> None:
    result = fold_(build(qk_layernorm=True, tied=True))
    assert set(result.left.values()) == {
        "it does not stand in front of linear layers alone",
        "the output layer is tied to the embedding",
    }
    assert sum(name.endswith(("q_layernorm", "k_layernorm")) for name in result.left) == 4


@pytest.mark.needs("experts_without_te")
def test_experts_are_left(build: Make) -> None:
    result = fold_(build(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=64))
    assert set(result.left.values()) == {"MoELayer reads it in several places"}


def test_multi_token_prediction_keeps_its_output_layer(build: Make) -> None:
    model = build()
    model.mtp_process = True
    assert fold_(model).left == {
        "decoder.final_layernorm": "multi-token prediction uses the output layer too"
    }


def test_other_layers_keep_a_bias_that_they_cannot_take(build: Make) -> None:
    class Linear(torch.nn.Linear):
        pass

    model = build()
    attention = model.decoder.layers[0].self_attention
    attention.linear_qkv = Linear(32, 64, bias=False)
    reasons = fold_(model).left
    assert reasons == {"decoder.layers.0.input_layernorm": "Linear has no bias to take DyT's"}
    attention.linear_qkv = Linear(16, 64)
    model.decoder.layers[0].input_layernorm.bias.data.fill_(1)
    reasons = fold_(model).left
    assert reasons == {"decoder.layers.0.input_layernorm": "Linear has a part of the input channels"}


@pytest.mark.needs("latent_attention_without_te")
def test_sparse_attention_is_left(build: Make) -> None:
    model = build(latent=True)
    # As DSAttention does: its indexer takes what attention is given, and not the projections of it.
    model.decoder.layers[1].self_attention.core_attention.requires_dsa_inputs = True
    before = model.decoder.layers[1].input_layernorm.weight.clone()
    left = {name: why for name, why in fold_(model).left.items() if name.endswith("input_layernorm")}
    assert left == {"decoder.layers.1.input_layernorm": "the indexer of sparse attention reads it too"}
    assert torch.equal(model.decoder.layers[1].input_layernorm.weight, before)


# T5 has an encoder and a decoder of two layers; the decoder's third norm is in front of cross-attention.
FAMILIES = {"gpt": 5, "t5": 8, "bert": 4, "vit": 4, "hybrid": 5}


@pytest.mark.parametrize(("family", "folded"), FAMILIES.items(), ids=FAMILIES.keys())
@pytest.mark.usefixtures("world")
def test_every_family_computes_the_same(family: str, folded: int) -> None:
    # Initial weights as small as usual would hide what is lost behind the residual stream.
    model = families.build(family, families.config_for(family, init_method_std=0.2)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, norm in dyt_sites(model):
            for parameter in (norm.weight, norm.bias):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        before = families.loss_of(family, model)
        weights = {name: p.clone() for name, p in model.named_parameters() if name.endswith("weight")}
        result = fold_(model)
        after = families.loss_of(family, model)
    assert len(result.folded) == folded
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    changed = {name for name, p in model.named_parameters() if name in weights and not p.equal(weights[name])}
    assert len(changed) == 2 * folded  # the norm and the one layer behind it


def test_bf16_weights_and_bias_are_rounded_once(make_config: Make) -> None:
    from megatron_dyt.mcore.folding import _fold_into

    torch.manual_seed(0)
    config = make_config(params_dtype=torch.bfloat16)
    config.dyt = DyTConfig.unit(32, bias=True)
    norm = DyTNorm(config, 32, role="ffn")
    linear = torch.nn.Linear(32, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        weight, bias = linear.weight.double(), linear.bias.double()
        _fold_into(norm, linear)
        exact_weight, exact_bias = weight * norm.weight.double(), bias + weight @ norm.bias.double()
    assert torch.equal(linear.weight, exact_weight.bfloat16())
    assert torch.equal(linear.bias, exact_bias.bfloat16())
