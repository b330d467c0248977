"""The rewrite of multi-latent attention's norms."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.mcore import spec as spec_module
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites

Make = Callable[..., Any]
LossOf = Callable[[Any], torch.Tensor]

pytestmark = pytest.mark.needs("latent_attention_without_te")


def te_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm, multi_latent_attention=True
    )


def averaged(module: DyTNorm) -> set[bool]:
    return {getattr(p, "average_gradients_across_tp_domain", False) for p in module.parameters()}


# qk_layernorm without q_lora_rank is refused.
@pytest.mark.parametrize(("qk_layernorm", "q_lora_rank"), [(True, 16), (False, 16), (False, None)])
def test_every_norm_site_is_dyt(
    make_latent_config: Make, build_gpt: Make, loss_of: LossOf, q_lora_rank: int | None, qk_layernorm: bool
) -> None:
    model = build_gpt(make_latent_config(q_lora_rank=q_lora_rank, qk_layernorm=qk_layernorm))
    assert not [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    expected = {"attn": 2, "ffn": 2, "final": 1} | ({"qk": 4} if qk_layernorm else {})
    assert Counter(site.role for _, site in dyt_sites(model)) == expected
    loss_of(model).backward()
    for name, site in dyt_sites(model):
        assert site.alpha_parameter.grad is not None, name
        assert site.alpha_parameter.grad.abs() > 0, name


def test_the_norms_are_on_the_latents(make_latent_config: Make, build_gpt: Make) -> None:
    attention = build_gpt(make_latent_config()).decoder.layers[1].self_attention
    assert (attention.q_layernorm.hidden_size, attention.kv_layernorm.hidden_size) == (16, 24)
    assert attention.q_layernorm.role == attention.kv_layernorm.role == "qk"


def test_a_query_norm_is_averaged_exactly_when_its_gradient_is_whole(
    make_latent_config: Make, make_spec: Make
) -> None:
    config = make_latent_config()
    for sequence_parallel in (False, True):
        config.sequence_parallel = sequence_parallel
        layer = make_spec(config)
        parts = spec_module.rewrite_layer(config, layer.submodules, layer.module).self_attention.submodules
        norms = {name: getattr(parts, name)(config, 16) for name in ("q_layernorm", "kv_layernorm")}
        # Megatron sums the gradients of "q_layernorm" by name, "kv_layernorm" escapes it.
        assert averaged(norms["q_layernorm"]) == {not sequence_parallel}
        assert averaged(norms["kv_layernorm"]) == {False}


def test_ordinary_attention_is_never_averaged(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config(qk_layernorm=True))
    assert {flag for _, site in dyt_sites(model) for flag in averaged(site)} == {False}


def test_transformer_engine_spec_is_unfused_and_saves_the_same_keys(
    make_latent_config: Make, build_gpt: Make, loss_of: LossOf, te_stubs: Any
) -> None:
    from megatron_dyt.mcore.checkpoint import model_tensor_keys

    te_layer = te_spec(make_latent_config())
    before = te_layer.submodules.self_attention.submodules.linear_q_up_proj
    assert before is te_stubs.TELayerNormColumnParallelLinear
    te = build_gpt(make_latent_config(), spec=te_layer)
    local = build_gpt(make_latent_config())
    for layer in te.decoder.layers:
        for linear in ("linear_q_up_proj", "linear_kv_up_proj"):
            assert type(getattr(layer.self_attention, linear)) is te_stubs.TEColumnParallelLinear
        for linear in ("linear_q_down_proj", "linear_kv_down_proj"):
            assert type(getattr(layer.self_attention, linear)) is te_stubs.TELinear
    assert te_layer.submodules.self_attention.submodules.linear_q_up_proj is before  # Not mutated.
    keys = [set(model_tensor_keys({"model": model.sharded_state_dict()})) for model in (te, local)]
    assert keys[0] == keys[1]
    for norm in ("input_layernorm", "self_attention.q_layernorm", "self_attention.kv_layernorm"):
        assert f"decoder.layers.{norm}.log_alpha" in keys[0]
    # The same weights, so the same model.
    assert loss_of(te).item() == loss_of(local).item()


def test_a_spec_without_latent_norms_stays_without(make_latent_config: Make, make_spec: Make) -> None:
    config = make_latent_config(qk_layernorm=False)
    attention = make_spec(config).submodules.self_attention
    before = copy.copy(attention.submodules)
    rewritten = spec_module.rewrite_latent_attention(config, attention)
    assert dataclasses.asdict(rewritten.submodules) == dataclasses.asdict(before)
