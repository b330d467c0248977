"""The rewrite of multi-token prediction layers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import spec as spec_module
from megatron_dyt.mcore.norm_sites import dyt_sites

Make = Callable[..., Any]


@pytest.fixture
def block_spec(make_spec: Make) -> Callable[[Any], Any]:
    """Megatron's local spec of the prediction layers of a config."""

    def make(config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        return get_gpt_mtp_block_spec(config, make_spec(config), use_transformer_engine=False)

    return make


def test_every_norm_of_a_prediction_layer_is_dyt(
    make_config: Make, build_gpt: Make, block_spec: Callable[..., Any], loss_of: Callable[[Any], torch.Tensor]
) -> None:
    config = make_config(mtp_num_layers=2, qk_layernorm=True)
    model = build_gpt(config, mtp_block_spec=block_spec(config))
    assert not [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    roles = Counter(site.role for name, site in dyt_sites(model) if name.startswith("mtp."))
    assert roles == {"attn": 2, "ffn": 6, "final": 2, "qk": 4}
    layer = model.mtp.layers[0]
    assert layer.enorm.role == layer.hnorm.role == "ffn"
    assert layer.final_layernorm.role == "final"
    loss_of(model).backward()
    for name, site in dyt_sites(model):
        assert site.alpha_parameter.grad is not None, name
        assert site.alpha_parameter.grad.abs() > 0, name


def test_megatrons_spec_is_not_changed(make_config: Make, block_spec: Callable[..., Any]) -> None:
    config = make_config(mtp_num_layers=1)
    layer = block_spec(config).layer_specs[0]
    before = dict(vars(layer.submodules))
    rewritten = spec_module.rewrite_mtp_layer(config, layer.submodules, layer.module)
    assert vars(layer.submodules) == before
    assert spec_module.rewrite_mtp_layer(config, rewritten, layer.module) == rewritten


def test_other_norms_are_left_alone(
    make_config: Make, build_gpt: Make, block_spec: Callable[..., Any]
) -> None:
    config = make_config("RMSNorm", mtp_num_layers=1)
    model = build_gpt(config, mtp_block_spec=block_spec(config))
    assert isinstance(model.mtp.layers[0].enorm, nn.RMSNorm)
    assert not list(dyt_sites(model))


def test_a_norm_in_an_unknown_place_is_refused(
    make_config: Make, build_gpt: Make, block_spec: Callable[..., Any]
) -> None:
    config = make_config(mtp_num_layers=1)
    block = block_spec(config)
    block.layer_specs[0].submodules.eh_proj = nn.LayerNorm
    with pytest.raises(UserError, match=r"LayerNorm at MultiTokenPredictionLayer\.eh_proj"):
        build_gpt(config, mtp_block_spec=block)
