"""How far DyT's function is from a straight line."""

import math

import pytest
import torch

from megatron_dyt.nn.statistics import RARE, STRAIGHT, curved_share, input_statistics, is_straight
from megatron_dyt.ops.reference import FUNCTIONS


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "identity"])
@pytest.mark.parametrize("drive", [0.3, 1.0, 4.0])
def test_curved_share_is_what_a_regression_of_normal_values_leaves(function: str, drive: float) -> None:
    z = drive * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = FUNCTIONS[function].value(z)
    left = 1 - float(torch.corrcoef(torch.stack([y, z]))[0, 1] ** 2)
    assert curved_share(function, drive) == pytest.approx(left, rel=0.05, abs=2e-5)


def test_curved_share_at_its_ends() -> None:
    assert curved_share("identity", 3.0) == pytest.approx(0, abs=1e-12)
    assert curved_share("tanh", 0.01) == pytest.approx(2 / 3 * 0.01**4, rel=0.01)
    assert curved_share("hardtanh", 1e4) == pytest.approx(1 - 2 / math.pi, rel=0.01)  # a step
    assert curved_share("tanh", 0.42) < STRAIGHT < curved_share("tanh", 0.43)


def test_few_saturated_elements_make_a_squash() -> None:
    assert is_straight(STRAIGHT / 2, RARE / 2)
    assert not is_straight(STRAIGHT / 2, RARE)
    assert not is_straight(STRAIGHT, 0.0)


def test_a_shift_saturates() -> None:
    x = torch.zeros(8)
    assert float(input_statistics(x, 1.0, "erf", torch.tensor([1.7])).saturated) == 1
    assert float(input_statistics(x, 1.0, "erf").saturated) == 0
