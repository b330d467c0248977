from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore.embedding import EmbeddingScale


def test_scale_multiplies_the_embeddings_output(
    make_config: Callable[..., Any], build_gpt: Callable[..., Any]
) -> None:
    model = build_gpt(make_config())
    tokens, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    output = model.embedding(tokens, positions)
    plain = model.embedding.word_embeddings.weight[tokens[0]]
    torch.testing.assert_close(output[:, 0], plain * 32**0.5)
    output.sum().backward()
    expected = plain.detach().sum()
    torch.testing.assert_close(model.embedding.embedding_scale.scale.grad, expected[None])


@pytest.mark.parametrize(("rule", "expected"), [("sqrt", 32**0.5), ("unit", 50.0), (3.0, 3.0)])
def test_initial_value_by_rule(
    make_config: Callable[..., Any], build_gpt: Callable[..., Any], rule: str | float, expected: float
) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, embedding_scale=rule)
    scale = build_gpt(config).embedding.embedding_scale.scale
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(expected)


def test_none_has_no_parameter(make_config: Callable[..., Any], build_gpt: Callable[..., Any]) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, embedding_scale="none")
    model = build_gpt(config)
    assert not [name for name, _ in model.named_parameters() if "embedding_scale" in name]


def test_stock_norms_have_no_scale_unless_asked(
    make_config: Callable[..., Any], build_gpt: Callable[..., Any]
) -> None:
    config = make_config("RMSNorm")
    assert not hasattr(build_gpt(config).embedding, "embedding_scale")
    config.embedding_scale = 4.0
    assert build_gpt(config).embedding.embedding_scale.scale.item() == 4.0


def test_only_the_first_stage_has_it(make_config: Callable[..., Any], build_gpt: Callable[..., Any]) -> None:
    model = build_gpt(make_config(), pre_process=False)
    assert not [name for name, _ in model.named_parameters() if "embedding_scale" in name]


@pytest.mark.parametrize(
    ("sequence_parallel", "scatter", "partial"),
    [(False, True, False), (True, True, True), (True, False, False)],
)
def test_gradient_is_partial_exactly_when_the_output_is_sharded(
    make_config: Callable[..., Any], sequence_parallel: bool, scatter: bool, partial: bool
) -> None:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    config = make_config()
    config.sequence_parallel = sequence_parallel
    embedding = LanguageModelEmbedding(config, 64, 16, "rope", scatter_to_sequence_parallel=scatter)
    assert embedding.embedding_scale.scale.sequence_parallel is partial


def test_bf16_is_scaled_in_fp32() -> None:
    # 1 + 2^-7 in bf16 times 3: in bf16 arithmetic the product is rounded once, from the exact one.
    scale = EmbeddingScale(3.0)
    x = torch.full((1, 4), 1.0078125, dtype=torch.bfloat16)
    output = scale(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, (x.double() * 3).to(torch.bfloat16), rtol=0, atol=0)
    assert "initial=3" in repr(scale)


def test_meta_construction_can_be_reset() -> None:
    with torch.device("meta"):
        scale = EmbeddingScale(5.0)
    scale.to_empty(device="cpu")
    scale.reset_parameters()
    assert scale.scale.item() == 5.0
