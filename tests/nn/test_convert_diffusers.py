"""Models of diffusers become DyT: norms without weight, on queries and keys, and of video."""

from __future__ import annotations

import pytest
import torch

from tests.nn.models import Case, check

diffusers = pytest.importorskip("diffusers")

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
STEPS = torch.tensor([1, 2])
TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))

CASES = {
    "modulated norms without weight": Case(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8
        ),
        {"hidden_states": NOISE, "timestep": STEPS, "class_labels": STEPS, "return_dict": False},
        5,
    ),
    "queries and keys": Case(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        {
            "hidden_states": NOISE[:, :, None].expand(2, 4, 2, 8, 8),
            "timestep": STEPS,
            "encoder_hidden_states": TEXT,
            "return_dict": False,
        },
        15,
    ),
    "RMSNorm of video": Case(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
        ),
        {"sample": NOISE[:, :3, None], "return_dict": False},
        24,
        channels_first=24,
    ),
    "group norms beside": Case(
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=2,
            attention_head_dim=2,
        ),
        {"sample": NOISE, "timestep": 1, "encoder_hidden_states": TEXT, "return_dict": False},
        12,
        left={"GroupNorm": 21},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_converts_calibrates_loads_and_comes_back(case: str) -> None:
    check(CASES[case])
