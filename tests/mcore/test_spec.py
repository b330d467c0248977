import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import spec as spec_module
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites

Make = Callable[..., Any]

NORMS = (nn.LayerNorm, nn.RMSNorm)


def roles(model: nn.Module) -> Counter[str]:
    return Counter(site.role for _, site in dyt_sites(model))


def stock_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk", [False, True])
def test_every_norm_site_is_dyt(make_config: Make, build_gpt: Make, qk: bool, tied: bool) -> None:
    model = build_gpt(make_config(qk_layernorm=qk), tied=tied)
    assert stock_norms(model) == []
    expected = {"attn": 2, "ffn": 2, "final": 1} | ({"qk": 4} if qk else {})
    assert roles(model) == expected
    rms = build_gpt(make_config("RMSNorm", qk_layernorm=qk), tied=tied)
    assert len(stock_norms(rms)) == sum(expected.values())
    assert roles(rms) == {}


def test_each_site_has_its_role(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config(qk_layernorm=True))
    layer = model.decoder.layers[1]
    assert layer.input_layernorm.role == "attn"
    assert layer.pre_mlp_layernorm.role == "ffn"
    assert layer.self_attention.q_layernorm.role == layer.self_attention.k_layernorm.role == "qk"
    assert layer.self_attention.q_layernorm.hidden_size == 8
    assert model.decoder.final_layernorm.role == "final"


def test_moe_layers_are_covered(make_config: Make, build_gpt: Make) -> None:
    config = make_config(num_moe_experts=2, moe_router_topk=2, moe_shared_expert_intermediate_size=32)
    model = build_gpt(config)
    assert stock_norms(model) == []
    assert roles(model) == {"attn": 2, "ffn": 2, "final": 1}


def test_megatrons_spec_is_not_changed(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config(qk_layernorm=True)
    layer = make_spec(config)
    block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=nn.RMSNorm)
    before = copy.deepcopy(dataclasses.asdict(layer.submodules), memo={})
    rewritten = spec_module.rewrite_block(config, block)
    assert dataclasses.asdict(layer.submodules).keys() == before.keys()
    assert layer.submodules.input_layernorm is not rewritten.layer_specs[0].submodules.input_layernorm
    assert block.layer_norm is nn.RMSNorm
    assert layer.submodules.self_attention.submodules.q_layernorm.__name__ == "WrappedTorchNorm"
    # One spec for all layers stays one object.
    assert rewritten.layer_specs[0] is rewritten.layer_specs[1]


def test_rewriting_twice_changes_nothing_more(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config()
    block = TransformerBlockSubmodules(layer_specs=[make_spec(config)], layer_norm=nn.RMSNorm)
    once = spec_module.rewrite_block(config, block)
    assert spec_module.rewrite_block(config, once) == once


def te_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )


@pytest.mark.parametrize("qk", [False, True])
def test_transformer_engine_spec_is_unfused(
    make_config: Make, build_gpt: Make, loss_of: Callable[[Any], torch.Tensor], te_stubs: Any, qk: bool
) -> None:
    config = make_config(qk_layernorm=qk)
    model = build_gpt(config, spec=te_spec(config))
    for layer in model.decoder.layers:
        assert type(layer.self_attention.linear_qkv) is te_stubs.TEColumnParallelLinear
        assert type(layer.mlp.linear_fc1) is te_stubs.TEColumnParallelLinear
    local = build_gpt(make_config(qk_layernorm=qk))
    assert roles(model) == roles(local)
    # The same weights, so the same model.
    assert loss_of(model).item() == loss_of(local).item()


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("qk", [False, True], ids=["", "qk"])
def test_local_and_transformer_engine_checkpoints_have_the_same_keys(
    make_config: Make, build_gpt: Make, te_stubs: Any, qk: bool, moe: bool
) -> None:
    from megatron_dyt.mcore.checkpoint import model_tensor_keys

    options = {"qk_layernorm": qk} | ({"num_moe_experts": 2} if moe else {})
    config = make_config(**options)
    te = build_gpt(config, spec=te_spec(config))
    local = build_gpt(make_config(**options))
    keys = [set(model_tensor_keys({"model": model.sharded_state_dict()})) for model in (te, local)]
    assert keys[0] == keys[1]
    sites = ["self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"]
    sites += ["self_attention.q_layernorm.", "self_attention.k_layernorm."] if qk else []
    expected = {f"decoder.layers.{site}{name}" for site in sites for name in ("alpha", "weight")}
    expected |= {"decoder.final_layernorm.alpha", "decoder.final_layernorm.weight"}
    assert {key for key in keys[0] if "norm" in key} == expected


def test_te_moe_keeps_its_mlp(make_config: Make, te_stubs: Any) -> None:
    config = make_config(num_moe_experts=2)
    layer = spec_module.rewrite_layer(config, te_spec(config))
    assert layer.submodules.pre_mlp_layernorm.params["role"] == "ffn"
    assert layer.submodules.input_layernorm.params["role"] == "attn"


def test_an_empty_qk_slot_is_filled_when_asked_for(make_config: Make, make_spec: Make) -> None:
    config = make_config(qk_layernorm=True)
    attention = make_spec(config).submodules.self_attention
    empty = dataclasses.replace(attention.submodules, q_layernorm=None, k_layernorm=None)
    filled, _ = spec_module.rewrite_attention(config, dataclasses.replace(attention, submodules=empty))
    assert filled.submodules.q_layernorm.module is DyTNorm
    config.qk_layernorm = False
    left, _ = spec_module.rewrite_attention(config, dataclasses.replace(attention, submodules=empty))
    assert left.submodules.q_layernorm is None


def test_a_norm_in_an_unknown_place_is_refused(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config()
    layer = make_spec(config)
    odd = dataclasses.replace(layer.submodules, cross_attention=nn.RMSNorm)
    block = TransformerBlockSubmodules(layer_specs=[dataclasses.replace(layer, submodules=odd)])
    with pytest.raises(UserError, match=r"RMSNorm at decoder\.layer_specs\.0\.cross_attention"):
        spec_module.rewrite_block(config, block)


def test_a_norm_hidden_in_a_partial_is_found(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config()
    layer = make_spec(config)
    mlp = layer.submodules.mlp
    parts = dataclasses.replace(spec_module.submodules_of(mlp), activation_func=nn.LayerNorm)
    # A partial from 0.18 on, a ModuleSpec before.
    build = mlp.func if isinstance(mlp, functools.partial) else mlp.module
    partial = functools.partial(build, submodules=parts)
    hidden = dataclasses.replace(layer.submodules, mlp=partial)
    block = TransformerBlockSubmodules(layer_specs=[dataclasses.replace(layer, submodules=hidden)])
    with pytest.raises(UserError, match=r"LayerNorm at .*mlp\.activation_func"):
        spec_module.rewrite_block(config, block)


def test_other_layer_types_are_refused(make_config: Make) -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec

    with pytest.raises(UserError, match="does not support layers of type Linear"):
        spec_module.rewrite_layer(make_config(), ModuleSpec(module=nn.Linear))


def test_no_final_norm_stays_none(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config()
    block = TransformerBlockSubmodules(layer_specs=[make_spec(config)], layer_norm=None)
    assert spec_module.rewrite_block(config, block).layer_norm is None
