"""T5, BERT, vision transformers and hybrid stacks with DyT, in one process on CPU."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import norm_sites
from megatron_dyt.mcore.monitor import Monitor
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites
from tests import families

pytestmark = pytest.mark.usefixtures("world", "nothing_logged")

RUNNABLE = ("t5", "bert", "vit", "hybrid")


@pytest.mark.parametrize("family", RUNNABLE)
def test_every_parameter_of_a_dyt_family_learns(family: str) -> None:
    model = families.build(family, families.config_for(family))
    assert not list(norm_sites.other_norms(model))
    families.loss_of(family, model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_norms_stay_what_they_were(family: str) -> None:
    model = families.build(family, families.config_for(family, "LayerNorm"))
    assert not list(dyt_sites(model))
    assert {type(norm) for _, norm, _ in norm_sites.other_norms(model)} == {nn.LayerNorm}
    assert "embedding_scale" not in dict(model.named_modules())


def test_t5_without_transformer_engine_has_its_final_norms_with_dyt_only() -> None:
    dyt = families.build("t5", families.config_for("t5"))
    stock = families.build("t5", families.config_for("t5", "LayerNorm"))
    for part in ("encoder", "decoder"):
        assert getattr(dyt, part).final_layernorm.role == "final"
        assert getattr(stock, part).final_layernorm is None


def test_t5_of_single_layer_specs_has_the_same_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.T5 import t5_spec

    expected = {name: site.role for name, site in dyt_sites(families.build("t5", families.config_for("t5")))}
    for part in ("encoder", "decoder"):
        layer = getattr(t5_spec, f"{part}_model_with_local_spec")
        monkeypatch.setattr(
            t5_spec, f"get_t5_{part}_with_local_block_spec", lambda _layers, layer=layer: layer()
        )
    found = {name: site.role for name, site in dyt_sites(families.build("t5", families.config_for("t5")))}
    assert found == expected


def test_one_embedding_scale_serves_encoder_and_decoder() -> None:
    model = families.build("t5", families.config_for("t5"))
    scales = [name for name, _ in model.named_parameters() if name.endswith("embedding_scale.scale")]
    assert scales == ["embedding.embedding_scale.scale"]
    seen: list[torch.Tensor] = []
    model.embedding.embedding_scale.register_forward_hook(lambda *args: seen.append(args[2]))
    families.loss_of("t5", model)
    assert len(seen) == 2


def test_a_vision_model_has_no_embedding_scale() -> None:
    model = families.build("vit", families.config_for("vit"))
    assert not [name for name, _ in model.named_parameters() if "embedding_scale" in name]


def test_the_vision_norms_that_were_not_asked_for_stay_away() -> None:
    config = families.config_for("vit")
    assert families.vit(config, "clip").ln_post is None
    assert families.vit(config, "siglip").ln_pre is None
    radio = families.radio(config, norm=None)
    assert radio.ln_pre is radio.ln_post is None


@pytest.mark.parametrize("family", ["vit", "radio"])
def test_a_vision_model_with_sequence_parallelism_is_refused(family: str) -> None:
    config = families.config_for(family)
    config.sequence_parallel = True
    with pytest.raises(UserError, match="does not split its input over the ranks"):
        families.build(family, config)


@pytest.mark.parametrize("family", RUNNABLE)
def test_start_up_lines_of_a_family(family: str, start_lines: Callable[[Monitor], list[str]]) -> None:
    model = families.build(family, families.config_for(family))
    watch = Monitor([model], linear_gain=1.0)
    watch.look()
    families.loss_of(family, model)
    roles = Counter(site.role for _, site in dyt_sites(model))
    lines = [line for line in start_lines(watch) if line.startswith("DyT ")]
    for role, count in roles.items():
        assert any(line.startswith(f"DyT {role:<5} {count:3d} sites, alpha0") for line in lines), lines
    assert any(line.startswith("DyT embedding scale") for line in lines) is (family != "vit")


def test_a_class_that_calls_its_norm_by_name_gets_dyt_or_what_it_had() -> None:
    made = norm_sites.wrap_norm_class(lambda config, hidden_size, eps: ("stock", hidden_size, eps))
    site = made(config=families.config_for("bert"), hidden_size=8, eps=1e-3)
    assert isinstance(site, DyTNorm)
    assert (site.role, site.hidden_size) == ("final", 8)
    assert made(config=families.config_for("bert", "LayerNorm"), hidden_size=8, eps=1e-3) == (
        "stock",
        8,
        1e-3,
    )


# --- LLaVA ---------------------------------------------------------------------------------------


def llava(language_norm: str, vision_norm: str, vision_dyt: DyTConfig | None = None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    language = families.config_for("gpt", language_norm)
    language.language_model_type = "toy"
    vision = copy.deepcopy(families.config_for("vit", vision_norm))
    vision.vision_model_type = "internvit" if vision_norm != "DyT" else "clip"
    if vision_dyt:
        vision.dyt = vision_dyt
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=get_gpt_layer_local_spec(),
        language_vocab_size=families.VOCABULARY,
        language_max_sequence_length=64,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=False,
        vision_projection_config=families.config_for("gpt", language_norm),
        vision_projection_layer_spec=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
        ),
        img_h=families.IMAGE,
        img_w=families.IMAGE,
        patch_dim=families.PATCH,
    )


def llava_loss(model: Any) -> torch.Tensor:
    tokens = torch.arange(16).reshape(1, 16) * 7 % families.VOCABULARY
    tokens[0, 3] = -200  # the image
    images = torch.randn(1, 3, families.IMAGE, families.IMAGE)
    positions = torch.arange(16)[None]
    output = model(
        images, tokens, positions, None, tokens.clamp_min(0), torch.ones(1, 16), num_image_tiles=None
    )
    loss: torch.Tensor = output[0].mean()
    return loss


def test_llava_with_dyt_in_both_parts_learns(capsys: pytest.CaptureFixture[str]) -> None:
    model = llava("DyT", "DyT", DyTConfig.unit(32))
    assert not list(norm_sites.other_norms(model))
    assert model.vision_model.ln_pre.alpha.item() == 0.25
    llava_loss(model).backward()
    for name, site in dyt_sites(model):
        assert site.alpha_parameter.grad is not None, name
        assert site.alpha_parameter.grad.any(), name
    assert "keeps its" not in capsys.readouterr().out


def test_a_vision_tower_that_keeps_its_norm_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = llava("DyT", "LayerNorm")
    told = (
        "megatron_dyt: DyT: vision_model keeps its 4 LayerNorm: its own config has another normalization.\n"
    )
    assert told in capsys.readouterr().out
    # Once, also when the training loop looks again.
    norm_sites.log_other_norms(model)
    assert capsys.readouterr().out == ""


def test_a_llava_without_dyt_is_not_told_about(capsys: pytest.CaptureFixture[str]) -> None:
    llava("RMSNorm", "LayerNorm")
    assert "DyT" not in capsys.readouterr().out
