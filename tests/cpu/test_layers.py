"""Norms under sequence parallelism; the gradient of the keys' positions. The rest by tests/distributed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.cpu import layers


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
    layers._SumGradient.apply(x).backward(gradient)
    assert torch.equal(x.grad, 2 * given)
    assert torch.equal(gradient, given)  # It may be shared.


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_pytorchs_norms_are_marked_for_sequence_parallelism(runtime: None, kind: str) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(sequence_parallel: bool) -> torch.nn.Module:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=kind,
            tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
        )
        norm = WrappedTorchNorm(config, 8)
        assert config.sequence_parallel == sequence_parallel
        return norm

    split, whole = build(True), build(False)
    assert type(split) is type(whole) is getattr(torch.nn, kind)
    assert all(parameter.sequence_parallel for parameter in split.parameters())
    assert not any(hasattr(parameter, "sequence_parallel") for parameter in whole.parameters())
