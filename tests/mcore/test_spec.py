import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import spec as spec_module
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites, dyt_spec, is_norm, other_norms
from tests import families

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
    before = dict(vars(layer.submodules))
    rewritten = spec_module.rewrite_layer(config, layer.submodules, layer.module)
    assert vars(layer.submodules) == before
    assert layer.submodules.self_attention.submodules.q_layernorm.__name__ == "WrappedTorchNorm"
    assert rewritten.input_layernorm.module is DyTNorm
    assert spec_module.rewrite_block(block).layer_norm.module is DyTNorm
    assert block.layer_norm is nn.RMSNorm


def test_rewriting_twice_changes_nothing_more(make_config: Make, make_spec: Make) -> None:
    config = make_config()
    layer = make_spec(config)
    once = spec_module.rewrite_layer(config, layer.submodules, layer.module)
    assert spec_module.rewrite_layer(config, once, layer.module) == once


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


@pytest.mark.parametrize("overlap", [True, False])
def test_lost_overlaps_are_said(
    make_config: Make,
    build_gpt: Make,
    te_stubs: Any,
    nothing_logged: None,
    capsys: pytest.CaptureFixture[str],
    overlap: bool,
) -> None:
    config = make_config()
    config.tp_comm_overlap = overlap
    build_gpt(config)  # Of local layers, which overlap nothing with any norm.
    assert "--tp-comm-overlap" not in capsys.readouterr().out
    build_gpt(config, spec=te_spec(config))
    assert capsys.readouterr().out.count("--tp-comm-overlap overlaps less") == overlap


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
    expected = {f"decoder.layers.{site}{name}" for site in sites for name in ("log_alpha", "weight")}
    expected |= {"decoder.final_layernorm.log_alpha", "decoder.final_layernorm.weight"}
    expected |= {f"decoder.layers.mlp.linear_fc1.layer_norm_{name}" for name in ("input_rms", "alpha_floor")}
    assert {key for key in keys[0] if "norm" in key} == expected


def test_te_moe_keeps_its_mlp(make_config: Make, te_stubs: Any) -> None:
    config = make_config(num_moe_experts=2)
    layer = te_spec(config)
    parts = spec_module.rewrite_layer(config, layer.submodules, layer.module)
    assert parts.pre_mlp_layernorm.params["role"] == "ffn"
    assert parts.input_layernorm.params["role"] == "attn"


def test_an_empty_qk_slot_is_filled_when_asked_for(make_config: Make, make_spec: Make) -> None:
    config = make_config(qk_layernorm=True)
    attention = make_spec(config).submodules.self_attention
    empty = dataclasses.replace(attention.submodules, q_layernorm=None, k_layernorm=None)
    filled, _ = spec_module.rewrite_attention(config, dataclasses.replace(attention, submodules=empty))
    assert filled.submodules.q_layernorm.module is DyTNorm
    config.qk_layernorm = False
    left, _ = spec_module.rewrite_attention(config, dataclasses.replace(attention, submodules=empty))
    assert left.submodules.q_layernorm is None


def test_a_norm_in_an_unknown_place_is_refused(make_config: Make, make_spec: Make, build_gpt: Make) -> None:
    config = make_config()
    layer = make_spec(config)
    odd = dataclasses.replace(layer.submodules, cross_attention=nn.RMSNorm)
    with pytest.raises(UserError, match=r"RMSNorm at TransformerLayer\.cross_attention"):
        build_gpt(config, spec=dataclasses.replace(layer, submodules=odd))


def test_a_norm_hidden_in_a_partial_is_found(make_config: Make, make_spec: Make, build_gpt: Make) -> None:
    config = make_config()
    layer = make_spec(config)
    mlp = layer.submodules.mlp
    parts = dataclasses.replace(spec_module.submodules_of(mlp), activation_func=nn.LayerNorm)
    # A partial from 0.18 on, a ModuleSpec before.
    build = mlp.func if isinstance(mlp, functools.partial) else mlp.module
    hidden = dataclasses.replace(layer.submodules, mlp=functools.partial(build, submodules=parts))
    with pytest.raises(UserError, match=r"LayerNorm at .*mlp\.activation_func"):
        build_gpt(config, spec=dataclasses.replace(layer, submodules=hidden))


def test_another_final_norm_is_refused() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    class OwnNorm(nn.Module):
        pass

    with pytest.raises(UserError, match=r"OwnNorm at decoder\.layer_norm"):
        spec_module.rewrite_block(TransformerBlockSubmodules(layer_norm=OwnNorm))


def test_no_final_norm_stays_none() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    assert spec_module.rewrite_block(TransformerBlockSubmodules(layer_norm=None)).layer_norm is None


# --- parts on their own ------------------------------------------------------------------------------


def layers_of(family: str) -> Iterator[Any]:
    """The layer specs that the models of a family are built of, local ones."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    if family == "gpt":
        yield get_gpt_layer_local_spec(qk_layernorm=True)
        yield get_gpt_layer_local_spec(qk_layernorm=True, num_experts=2)
    elif family == "t5":
        yield t5_spec.encoder_model_with_local_spec()
        yield t5_spec.decoder_model_with_local_spec()
    elif family == "bert":
        yield bert_layer_local_spec
    elif family == "vit":
        yield get_vit_layer_with_local_spec()
    else:
        stack = families.hybrid_spec().submodules
        yield from (stack.attention_layer, stack.mlp_layer)


@pytest.mark.parametrize("family", ["gpt", "t5", "bert", "vit", "hybrid"])
@pytest.mark.usefixtures("world")
def test_a_layer_on_its_own_has_dyt_for_every_norm(family: str) -> None:
    from megatron.core.transformer.spec_utils import build_module

    for layer in layers_of(family):
        norms = [slot for slot in spec_module.LAYER_ROLES if is_norm(getattr(layer.submodules, slot))]
        assert norms
        options = {"num_moe_experts": 2, "qk_layernorm": family == "gpt"}
        built = build_module(layer, config=families.config_for(family, **options), layer_number=1)
        assert {slot: getattr(built, slot).role for slot in norms} == {
            slot: spec_module.LAYER_ROLES[slot] for slot in norms
        }
        assert not list(other_norms(built))


def test_a_layer_on_its_own_is_a_layer_of_a_model(
    make_config: Make, make_spec: Make, build_gpt: Make
) -> None:
    """Built as Megatron's own tests do it, by class and submodules, keywords or not."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    config = make_config(qk_layernorm=True)
    first = build_gpt(config).decoder.layers[0]
    x = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), diagonal=1)[None, None]
    for layer in (
        TransformerLayer(config, make_spec(config).submodules),
        TransformerLayer(submodules=make_spec(config).submodules, config=config, layer_number=1),
    ):
        layer.load_state_dict(first.state_dict())
        assert torch.equal(layer(x, mask)[0], first(x, mask)[0])
        keys = [{t.key for t in tensors(each.sharded_state_dict())} for each in (layer, first)]
        assert keys[0] == keys[1]
        assert "self_attention.linear_qkv.layer_norm_log_alpha" in keys[0]


def tensors(state: dict[str, Any]) -> list[Any]:
    return [value for value in state.values() if hasattr(value, "key")]


def test_a_block_on_its_own_has_dyt(make_config: Make, make_spec: Make) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    config = make_config()
    block = TransformerBlock(config, make_spec(config))
    assert roles(block) == {"attn": 2, "ffn": 2, "final": 1}
    assert stock_norms(block) == []


def test_attention_on_its_own_is_refused_with_what_to_do(make_config: Make, make_spec: Make) -> None:
    """It is no layer: DyT's place for q and k is known there, that for a norm in front is not."""
    from megatron.core.transformer.spec_utils import build_module

    config = make_config(qk_layernorm=True)
    attention = make_spec(config).submodules.self_attention
    with pytest.raises(UserError, match=r"Build it as part of such a layer, put a DyTNorm there yourself"):
        build_module(attention, config=config, layer_number=1)
    own = {name: dyt_spec("qk") for name in spec_module.QK_NORMS}
    attention = dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, **own))
    assert roles(build_module(attention, config=config, layer_number=1)) == {"qk": 2}
