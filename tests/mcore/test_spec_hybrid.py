"""Megatron's own spec of the hybrid stack, with Transformer Engine's classes played by the local ones."""

import dataclasses
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt import compat
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import norm_sites, ranks, spec
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import KeptRMSNorm, dyt_sites
from megatron_dyt.mcore.spec import submodules_of
from tests import families

TE = (
    *("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TERowParallelLinear"),
    "TENorm",
)


@pytest.fixture
def stock(te_stubs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Submodules of Megatron's `hybrid_stack_spec` (`mamba_stack_spec`)."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    for name in TE:
        monkeypatch.setattr(transformer_engine, name, getattr(te_stubs, name))
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", DotProductAttention)
    monkeypatch.setattr(ranks, "_logged", set())
    is_hybrid = compat.hybrid_stack()[1] == "HybridStack"
    name = "hybrid.hybrid_layer_specs" if is_hybrid else "mamba.mamba_layer_specs"
    # A second copy of the module, made of the stand-ins.
    found = importlib.util.find_spec(f"megatron.core.models.{name}")
    assert found is not None
    assert found.loader is not None
    copy = importlib.util.module_from_spec(found)
    found.loader.exec_module(copy)
    return (copy.hybrid_stack_spec if is_hybrid else copy.mamba_stack_spec).submodules


@pytest.fixture
def config(world: None) -> Any:
    return families.config_for("hybrid")


def rewritten(config: Any, layer: Any) -> Any:
    """The submodules that a layer of the stack is built from."""
    mamba = hasattr(layer.submodules, "mixer")
    rewrite: Any = spec.rewrite_mamba_layer if mamba else spec.rewrite_layer
    return rewrite(config, layer.submodules, layer.module)


def test_every_layer_of_the_stock_stack_is_rewritten(stock: Any, config: Any, te_stubs: Any) -> None:
    mamba = rewritten(config, stock.mamba_layer)
    assert (mamba.norm.module, mamba.norm.params) == (DyTNorm, {"role": "attn"})
    assert mamba.mixer.submodules.in_proj is te_stubs.TEColumnParallelLinear
    assert mamba.sharded_state_dict_keys_map == {"norm.": "mixer.in_proj.layer_norm_"}
    attention = rewritten(config, stock.attention_layer)
    assert attention.input_layernorm.params["role"] == "attn"
    assert attention.self_attention.submodules.linear_qkv is te_stubs.TEColumnParallelLinear
    mlp = rewritten(config, stock.mlp_layer)
    assert mlp.pre_mlp_layernorm.params["role"] == "ffn"
    assert submodules_of(mlp.mlp).linear_fc1 is te_stubs.TEColumnParallelLinear
    assert rewritten(config, stock.moe_layer).pre_mlp_layernorm.params["role"] == "ffn"


def test_gated_delta_net_gets_dyt_in_front_and_keeps_its_output_norm(
    stock: Any, config: Any, te_stubs: Any
) -> None:
    if not hasattr(stock, "gdn_layer"):
        pytest.skip("this Megatron has no Gated DeltaNet in its hybrid stack")
    layer = rewritten(config, stock.gdn_layer)
    parts = layer.self_attention.submodules
    assert layer.input_layernorm.params["role"] == "attn"
    assert parts.in_proj is te_stubs.TEColumnParallelLinear
    assert layer.sharded_state_dict_keys_map == {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
    assert parts.out_norm.module is KeptRMSNorm
    norm = parts.out_norm(config=config, hidden_size=8, eps=1e-3)
    assert isinstance(norm, nn.RMSNorm)
    assert (norm.normalized_shape, norm.eps) == ((8,), 1e-3)
    assert config.normalization == "DyT"


def test_the_sparse_attention_indexer_keeps_its_layer_norm(stock: Any, config: Any) -> None:
    if not hasattr(stock, "dsa_layer"):
        pytest.skip("this Megatron has no sparse attention in its hybrid stack")
    layer = rewritten(config, stock.dsa_layer)
    indexer = layer.self_attention.submodules.core_attention.submodules.indexer
    assert layer.input_layernorm.params["role"] == "attn"
    assert indexer.submodules.k_norm.__name__ == "TENorm"


def test_megatrons_spec_is_not_changed(stock: Any, config: Any) -> None:
    layer = stock.mamba_layer
    before = dict(vars(layer.submodules))
    once = rewritten(config, layer)
    assert vars(layer.submodules) == before
    assert spec.rewrite_mamba_layer(config, once, layer.module) == once


def test_a_norm_in_an_unknown_slot_of_a_layer_is_refused(
    stock: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "DENSE_PATTERN", "M-M-")
    monkeypatch.setattr(stock.mamba_layer.submodules, "mamba_bda", nn.LayerNorm)
    with pytest.raises(UserError, match=r"LayerNorm at MambaLayer\.mamba_bda"):
        stock_model(config, stock, monkeypatch)


def stock_model(config: Any, submodules: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec

    spec = families.hybrid_spec()
    monkeypatch.setattr(
        families, "hybrid_spec", lambda: ModuleSpec(module=spec.module, submodules=submodules)
    )
    return families.build("hybrid", config)


def test_the_stock_stack_is_the_same_model_as_one_of_local_layers(
    stock: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dyt.mcore.checkpoint import model_tensor_keys

    local = families.build("hybrid", config)
    te = stock_model(config, stock, monkeypatch)
    assert families.loss_of("hybrid", te).item() == families.loss_of("hybrid", local).item()
    keys = [set(model_tensor_keys({"model": model.sharded_state_dict()})) for model in (te, local)]
    assert keys[0] == keys[1]
    assert "decoder.final_norm.alpha" in keys[0]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_alpha" in keys[0]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_alpha" in keys[0]


class ExtendedRMSNorm(nn.RMSNorm):
    """In the place of Mamba's gated norm."""


class MambaMixer(nn.Module):
    """In the place of Megatron's mixer, which needs CUDA kernels: its two linear layers and its norm."""

    def __init__(self, config: Any, submodules: Any, d_model: int, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        common = {"config": config, "init_method": config.init_method, "is_expert": False}
        common |= {"bias": False, "tp_group": pg_collection.tp}
        self.in_proj = submodules.in_proj(d_model, 2 * d_model, gather_output=False, **common)
        self.norm = ExtendedRMSNorm(2 * d_model)
        self.out_proj = submodules.out_proj(
            2 * d_model, d_model, input_is_parallel=True, skip_bias_add=True, **common
        )

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        inner, _bias = self.in_proj(hidden_states)
        return self.out_proj(self.norm(inner))


def test_a_stack_with_mamba_layers_has_dyt_in_front_of_them_and_tells_what_stays(
    stock: Any, config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families, "DENSE_PATTERN", "M*M-")
    monkeypatch.setattr(stock.mamba_layer.submodules.mixer, "module", MambaMixer)
    model = stock_model(config, stock, monkeypatch)
    assert {name: site.role for name, site in dyt_sites(model)} == {
        "decoder.layers.0.norm": "attn",
        "decoder.layers.1.input_layernorm": "attn",
        "decoder.layers.2.norm": "attn",
        "decoder.layers.3.pre_mlp_layernorm": "ffn",
        "decoder.final_norm": "final",
    }
    assert capsys.readouterr().out.count("MambaMixer.norm) stays as it is: it is computed inside") == 1
    families.loss_of("hybrid", model).backward()
    for name, site in dyt_sites(model):
        assert site.alpha_parameter.grad is not None, name
        assert site.alpha_parameter.grad.any(), name
    key = "decoder.layers.0.mixer.in_proj.layer_norm_alpha"
    assert key in {tensor.key for tensor in leaves(model.sharded_state_dict())}


def leaves(state: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in state.values() if isinstance(value, ShardedTensor)]


def test_another_norm_leaves_a_mamba_layer_alone(stock: Any, make_config: Callable[..., Any]) -> None:
    seen = SimpleNamespace()

    def original(self: Any, config: Any, submodules: Any) -> None:
        seen.submodules = submodules

    parts = stock.mamba_layer.submodules
    spec.wrap_mamba_layer_init(original)(seen, make_config("RMSNorm"), submodules=parts)
    assert seen.submodules is parts


def test_multi_token_prediction_of_a_stack_is_dyt(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(stock, "mtp_block_spec"):
        pytest.skip("this Megatron has no multi-token prediction in its hybrid stack")
    monkeypatch.setattr(families, "DENSE_PATTERN", "*-*-/*-")
    config = families.config_for("hybrid", num_layers=4, mtp_num_layers=1)
    model = stock_model(config, stock, monkeypatch)
    mtp = {name: site.role for name, site in dyt_sites(model.mtp)}
    assert mtp == {
        "layers.0.enorm": "ffn",
        "layers.0.hnorm": "ffn",
        "layers.0.mtp_model_layer.layers.0.input_layernorm": "attn",
        "layers.0.mtp_model_layer.layers.1.pre_mlp_layernorm": "ffn",
        "layers.0.final_layernorm": "final",
    }
    assert not list(norm_sites.other_norms(model))


def test_latent_attention_in_a_stack_is_dyt(stock: Any, te_stubs: Any) -> None:
    if not hasattr(stock, "mla_layer"):
        pytest.skip("this Megatron has no multi-latent attention in its hybrid stack")
    config = families.config_for("hybrid")
    layer = stock.mla_layer
    attention = layer.submodules.self_attention
    fused = dataclasses.replace(
        attention.submodules, linear_kv_up_proj=te_stubs.TELayerNormColumnParallelLinear
    )
    odd = dataclasses.replace(
        layer.submodules, self_attention=dataclasses.replace(attention, submodules=fused)
    )
    latent = rewritten(config, dataclasses.replace(layer, submodules=odd))
    assert latent.input_layernorm.params["role"] == "attn"
    parts = latent.self_attention.submodules
    assert parts.linear_kv_up_proj is te_stubs.TEColumnParallelLinear
    assert parts.kv_layernorm.params["role"] == "qk"


def experimental_layers(config: Any, monkeypatch: pytest.MonkeyPatch, te_stubs: Any) -> list[Any]:
    """The layers of Megatron's block spec of GPT with an experimental attention variant, rewritten."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    # Without TE the module lacks the name.
    monkeypatch.setattr(specs, "TESpecProvider", te_stubs.TESpecProvider, raising=False)
    block = specs.get_transformer_block_with_experimental_attention_variant_spec(config)
    return [rewritten(config, layer) for layer in block.layer_specs]


def test_gpt_with_gated_delta_net_is_dyt(
    make_config: Callable[..., Any], te_stubs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        transformer_impl="transformer_engine",
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
    )
    delta, attention = experimental_layers(config, monkeypatch, te_stubs)
    assert delta.input_layernorm.params["role"] == attention.input_layernorm.params["role"] == "attn"
    assert delta.self_attention.submodules.in_proj is te_stubs.TEColumnParallelLinear
    assert delta.self_attention.submodules.out_norm.module is KeptRMSNorm
    assert delta.pre_mlp_layernorm.params["role"] == "ffn"
    keys = [layer.sharded_state_dict_keys_map["input_layernorm."] for layer in (delta, attention)]
    assert keys == ["self_attention.in_proj.layer_norm_", "self_attention.linear_qkv.layer_norm_"]
