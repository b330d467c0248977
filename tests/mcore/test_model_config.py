"""DyT's settings as dataclass fields: they outlive what loses a plain attribute."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megatron_dyt.config import DyTConfig, DyTFields
from megatron_dyt.errors import UserError
from megatron_dyt.mcore.model_config import initial_embedding_scale

Make = Callable[..., Any]


@pytest.fixture
def make(world: None) -> Make:
    """A small config with fields; keywords override."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    cls = dataclasses.make_dataclass("DyTTransformerConfig", [], bases=(DyTFields, TransformerConfig))

    def build(**values: Any) -> Any:
        size = {"num_layers": 2, "hidden_size": 1024, "num_attention_heads": 4, "normalization": "DyT"}
        return cls(**(size | values))

    return build


def copies(config: Any) -> list[Any]:
    """The config by every way in which Megatron and its users copy one."""
    shallow = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [dataclasses.replace(config), type(config)(**shallow), copy.deepcopy(config), copy.copy(config)]


def test_every_copy_keeps_the_settings(make: Make) -> None:
    given = make(dyt_preset="unit", dyt_bias=True, dyt_alpha_init_ffn=0.3, dyt_function="erf")
    expected = DyTConfig.unit(1024, bias=True, alpha_ffn=0.3, function="erf")
    for config in (given, *copies(given)):
        assert config.dyt == expected
        assert config.init_method_std == 1024**-0.5
        assert config.embedding_init_method_std == 0.02


def test_without_fields_replace_falls_back_to_the_preset(make_config: Make) -> None:
    """What the fields are there for."""
    config = make_config()
    config.dyt = DyTConfig.unit(32)
    assert dataclasses.replace(config).dyt == DyTConfig.auto(32)


def test_alpha_follows_a_changed_width(make: Make) -> None:
    config = make(dyt_preset="paper", dyt_alpha_init_attn=0.7)
    assert (config.dyt.alpha_attn, config.dyt.alpha_ffn) == (0.7, 1.0)
    wider = dataclasses.replace(config, hidden_size=4096, kv_channels=None, ffn_hidden_size=None)
    assert (wider.dyt.alpha_attn, wider.dyt.alpha_ffn) == (0.7, 0.2)


@pytest.mark.parametrize("preset", ["paper", "unit"])
def test_a_given_init_std_stays(make: Make, preset: str) -> None:
    config = make(dyt_preset=preset, init_method_std=0.01, embedding_init_method_std=0.5)
    assert (config.init_method_std, config.embedding_init_method_std) == (0.01, 0.5)


def test_the_init_std_reaches_the_weights(make: Make) -> None:
    import torch

    torch.manual_seed(0)
    weight = make(dyt_preset="unit").init_method(torch.empty(1024, 1024))
    assert weight.std().item() == pytest.approx(1024**-0.5, rel=0.01)


def test_another_norm_with_its_embedding_scale(make: Make) -> None:
    config = make(normalization="RMSNorm", embedding_scale="sqrt")
    assert [initial_embedding_scale(each) for each in (config, *copies(config))] == [32.0] * 5
    assert initial_embedding_scale(make(normalization="RMSNorm")) is None
    assert not hasattr(config, "dyt")


def test_the_models_norms_start_as_the_fields_say(make: Make, build_gpt: Make) -> None:
    size = {"hidden_size": 32, "use_cpu_initialization": True}
    config = dataclasses.replace(
        make(**size, dyt_preset="unit", dyt_alpha_init_ffn=0.3, dyt_alpha_init_final=0.4)
    )
    parameters = dict(build_gpt(config).named_parameters())
    assert parameters["decoder.layers.1.pre_mlp_layernorm.alpha"].tolist() == pytest.approx([0.3])
    assert parameters["decoder.final_layernorm.alpha"].tolist() == pytest.approx([0.4])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"normalization": "RMSNorm", "dyt_bias": True}, "--dyt-bias given with --normalization RMSNorm"),
        ({"dyt_preset": "best"}, "--dyt-preset is 'best'; allowed: paper, unit"),
        ({"dyt_alpha_init_attn": 0.0}, "alpha must start finite and > 0"),
        ({"dyt_alpha_init_qk": 0.5}, "without --qk-layernorm"),
        ({"dyt_embedding_scale": "sqrt", "embedding_scale": "unit"}, "are the same setting"),
        ({"normalization": "RMSNorm", "embedding_scale": "huge"}, "--dyt-embedding-scale is 'huge'"),
        ({"layernorm_zero_centered_gamma": True}, "cannot be combined with layernorm_zero_centered_gamma"),
    ],
)
def test_what_cannot_work(make: Make, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**values)
