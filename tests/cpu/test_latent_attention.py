"""The sum of the gradient of the keys' positions; the rest by tests/distributed, on several processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.cpu import latent_attention


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_sum_reaches_a_gradient_of_any_strides(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    """Megatron's own region up to 0.18 reduces a copy of a strided gradient and returns the original."""
    from megatron.core import parallel_state

    def of_two_ranks(tensor: torch.Tensor, **_: Any) -> None:
        assert tensor.is_contiguous()
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", of_two_ranks)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: SimpleNamespace())
    x = torch.randn(3, 4, requires_grad=True)
    gradient = torch.randn(3, 4) if contiguous else torch.randn(4, 3).t()
    given = gradient.clone()
    latent_attention._SumGradient.apply(x).backward(gradient)
    assert torch.equal(x.grad, 2 * given)
    assert torch.equal(gradient, given)  # It may be shared.
