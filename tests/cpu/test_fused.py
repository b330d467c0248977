"""Fused functions: values and gradients are those of Megatron's own code, which runs where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

GROUP = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))


def gradients_and_value(
    function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 1
) -> tuple[Tensor, ...]:
    """function(*inputs), then the gradients of those of floating point for a random upstream gradient."""
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    value.backward(torch.randn(value.shape, generator=generator).to(value.dtype))
    return (value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


# --- attention -----------------------------------------------------------------------------------------


def attention(monkeypatch: pytest.MonkeyPatch, mask_type: str = "causal", **settings: Any) -> torch.nn.Module:
    """Megatron's attention of 4 heads and 2 groups, 8 channels a head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import GlobalMemoryBuffer

    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=settings.pop("groups", 2),
        **{"attention_dropout": 0.0, "masked_softmax_fusion": False, **settings},
    )
    return DotProductAttention(config, 2, AttnMaskType[mask_type], "self", pg_collection=GROUP)


def query_key_value(groups: int = 2, tokens: int = 11, keys: int = 11, dtype: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (tokens, 3, 4, 8), (keys, 3, groups, 8), (keys, 3, groups, 8)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def plain(module: torch.nn.Module) -> Callable[..., Tensor]:
    """Megatron's own forward of `module`, below the runtime's."""
    return type(module).forward.__wrapped__.__get__(module)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("mask_type", "settings"),
    [
        ("causal", {}),
        ("causal", {"groups": 4}),
        ("causal", {"groups": 1}),
        ("no_mask", {}),
        ("padding", {}),
        ("causal", {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}),
    ],
)
def test_attention_without_scores_is_megatrons(
    runtime: None, monkeypatch: pytest.MonkeyPatch, mask_type: str, settings: dict[str, Any]
) -> None:
    inputs = query_key_value(settings.get("groups", 2))
    module = attention(monkeypatch, mask_type, **settings)
    monkeypatch.setattr(torch, "baddbmm", None)  # what Megatron's needs
    found = gradients_and_value(lambda *qkv: module(*qkv, None), inputs)
    monkeypatch.undo()
    module = attention(monkeypatch, mask_type, **settings)
    expected = gradients_and_value(lambda *qkv: plain(module)(*qkv, None), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found[0].is_contiguous()


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {"attention_mask": torch.ones(3, 1, 11, 11, dtype=torch.bool).triu(1)}),
        ({"window_size": (4, 0)}, {}),
        ({"softmax_type": "off-by-one"}, {}),
        ({"attention_dropout": 0.5}, {}),
        ({"mask_type": "no_mask"}, {"keys": 13, "attention_mask": torch.rand(3, 1, 11, 13) > 0.7}),
        ({}, {"tokens": 1}),  # one more token, with the keys of those before
    ],
)
def test_attention_runs_as_megatrons_where_more_is_asked_for(
    runtime: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], given: dict[str, Any]
) -> None:
    from megatron.core.tensor_parallel import random

    mask = given.pop("attention_mask", None)
    inputs = query_key_value(**given)
    module = attention(monkeypatch, **settings)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    results = []
    for forward in (module, plain(module)):
        random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        results.append(gradients_and_value(lambda *qkv, forward=forward: forward(*qkv, mask), inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)
