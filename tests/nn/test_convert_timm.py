"""Models of timm become DyT: each class of norm that its models have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_dyt import convert_norms
from tests.nn.models import Case, check

timm = pytest.importorskip("timm")


def of(name: str, **settings: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=5, **settings)


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


CASES = {
    "channels first": Case(lambda: of("convnext_atto"), images(64), 17, channels_first=17),
    "channels first, response norm": Case(
        lambda: of("convnextv2_atto"), images(64), 17, channels_first=17, left={"GlobalResponseNorm": 12}
    ),
    "channels last": Case(lambda: of("vit_tiny_patch16_224", img_size=64, depth=2), images(64), 5),
    "windows": Case(
        lambda: of("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)),
        images(64),
        13,
    ),
    "both": Case(lambda: of("samvit_base_patch16", img_size=64, depth=2), images(64), 6, channels_first=2),
    "batch norm beside": Case(
        lambda: of("xcit_nano_12_p16_224", depth=2), images(64), 11, left={"BatchNorm2d": 6}
    ),
    "with an activation": Case(lambda: of("edgenext_xx_small"), images(64), 20, channels_first=5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_converts_calibrates_loads_and_comes_back(case: str) -> None:
    check(CASES[case])


def test_a_model_of_batch_norms_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"bn1.*\(BatchNorm2d\): it normalizes over the batch.*Table 16"):
        convert_norms(of("resnet18"))
