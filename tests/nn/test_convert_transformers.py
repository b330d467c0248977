"""Models of transformers become DyT: each class of norm that its models have, at a tiny size."""

from __future__ import annotations

import tempfile

import pytest
import torch
from torch import nn

from megatron_dyt import convert_norms
from tests.nn.models import Case, assert_equal, built, check, outputs

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
WIDTH = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
SAM = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def of(name: str, **settings: object) -> nn.Module:
    """A model by the name of its class, without cache, from the settings of its configuration."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**settings))


def sam() -> nn.Module:
    parts = {
        "vision_config": transformers.SamVisionConfig(
            **WIDTH | {"hidden_size": 32},
            image_size=64,
            patch_size=16,
            output_channels=16,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=48,
            num_pos_feats=8,
        ),
        "prompt_encoder_config": transformers.SamPromptEncoderConfig(**SAM, mask_input_channels=8),
        "mask_decoder_config": transformers.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    }
    config = transformers.SamConfig(**{name: part.to_dict() for name, part in parts.items()})
    return transformers.SamModel(config)


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
STATES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
PROMPT = {"pixel_values": IMAGES, "input_points": torch.ones(2, 1, 1, 2)}
UNUSED_MASK = ("prompt_encoder.mask_embed.layer_norm1", "prompt_encoder.mask_embed.layer_norm2")
TEXT = {"input_ids": IDS, "use_cache": False}

CASES = {
    "LayerNorm": Case(lambda: of("BertModel", **WIDTH), {"input_ids": IDS}, 5),
    "RMSNorm": Case(lambda: of("LlamaForCausalLM", **WIDTH), TEXT, 5),
    "RMSNorm by 1 + weight, queries and keys": Case(
        lambda: of("Gemma3ForCausalLM", **WIDTH, **HEADS), TEXT, 13
    ),
    "LayerNorm by 1 + weight": Case(lambda: of("NemotronForCausalLM", **WIDTH, **HEADS), TEXT, 5),
    "LayerNorm without weight": Case(lambda: of("OlmoForCausalLM", **WIDTH), TEXT, 5),
    "channels first or last": Case(
        lambda: of("ConvNextModel", **STAGES), {"pixel_values": IMAGES}, 10, channels_first=4
    ),
    "channels first, response norm": Case(
        lambda: of("ConvNextV2Model", **STAGES), {"pixel_values": IMAGES}, 10, channels_first=4
    ),
    "channels first in SAM": Case(sam, PROMPT, 18, channels_first=5, unreached=UNUSED_MASK),
    "Mamba, which reads the weight's dtype": Case(lambda: of("MambaForCausalLM", **STATES), TEXT, 3),
    "weights handed to a kernel": Case(
        lambda: of("FalconMambaForCausalLM", **STATES), TEXT, 3, left={"FalconMambaWeightlessRMSNorm": 6}
    ),
    "gated norm": Case(
        lambda: of("Qwen3NextForCausalLM", **WIDTH, **HEADS, **LINEAR),
        TEXT,
        7,
        left={"Qwen3NextRMSNormGated": 1},
    ),
    "group norm": Case(
        lambda: of(
            "Wav2Vec2Model",
            **WIDTH,
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        ),
        {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))},
        6,
        left={"GroupNorm": 1},
    ),
    "a norm of what is not in the batch": Case(
        lambda: of("DebertaV2Model", **WIDTH, relative_attention=True, norm_rel_ebd="layer_norm"),
        {"input_ids": IDS},
        6,
        unreached=("encoder.LayerNorm",),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_converts_calibrates_loads_and_comes_back(case: str) -> None:
    check(CASES[case])


class ConvertedBert(transformers.BertModel):
    """As docs/convert.md says."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        convert_norms(self, bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_save_pretrained_wrote_is_loaded_by_a_class_that_converts(dtype: torch.dtype) -> None:
    case = CASES["LayerNorm"]
    model = built(case)
    convert_norms(model, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = ConvertedBert.from_pretrained(folder, dtype=dtype).eval()
    assert_equal(outputs(loaded, case.batch), outputs(model.to(dtype), case.batch))
