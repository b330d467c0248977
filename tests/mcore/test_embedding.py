from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore import embedding
from megatron_dyt.mcore.embedding import EmbeddingScale

Make = Callable[..., Any]


def test_scale_multiplies_the_embeddings_output(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config())
    tokens, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    output = model.embedding(tokens, positions)
    plain = model.embedding.word_embeddings.weight[tokens[0]]
    torch.testing.assert_close(output[:, 0], plain * 50.0)
    output.sum().backward()
    expected = plain.detach().sum()
    torch.testing.assert_close(model.embedding.embedding_scale.scale.grad, expected[None])


@pytest.mark.parametrize(("rule", "expected"), [("sqrt", 32**0.5), ("unit", 50.0), (3.0, 3.0)])
def test_initial_value_by_rule(
    make_config: Make, build_gpt: Make, rule: str | float, expected: float
) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, embedding_scale=rule)
    scale = build_gpt(config).embedding.embedding_scale.scale
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(expected)


def test_none_has_no_parameter(make_config: Make, build_gpt: Make) -> None:
    config = make_config()
    config.dyt = DyTConfig.unit(32, embedding_scale="none")
    model = build_gpt(config)
    assert not [name for name, _ in model.named_parameters() if "embedding_scale" in name]


def test_stock_norms_have_no_scale_unless_asked(make_config: Make, build_gpt: Make) -> None:
    config = make_config("RMSNorm")
    assert not hasattr(build_gpt(config).embedding, "embedding_scale")
    config.embedding_scale = 4.0
    assert build_gpt(config).embedding.embedding_scale.scale.item() == 4.0


def test_only_the_first_stage_has_it(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config(), pre_process=False)
    assert not [name for name, _ in model.named_parameters() if "embedding_scale" in name]


@pytest.mark.parametrize(
    ("sequence_parallel", "scatter", "partial"),
    [(False, True, False), (True, True, True), (True, False, False)],
)
def test_gradient_is_partial_exactly_when_the_output_is_sharded(
    make_config: Make, sequence_parallel: bool, scatter: bool, partial: bool
) -> None:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    config = make_config()
    config.sequence_parallel = sequence_parallel
    module = LanguageModelEmbedding(config, 64, 16, "rope", scatter_to_sequence_parallel=scatter)
    assert module.embedding_scale.scale.sequence_parallel is partial


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


def two_stages(config: Any, mtp_num_layers: int | None = 1) -> Any:
    """A config that a stage of a pipeline has; the tests' world is one process."""
    config.mtp_num_layers = mtp_num_layers
    config.pipeline_model_parallel_size = 2
    return config


@pytest.mark.parametrize("pre_process", [True, False])
def test_a_scale_that_two_stages_have_is_marked_as_megatron_marks_the_embedding(
    make_config: Make, pre_process: bool
) -> None:
    stage = SimpleNamespace(config=two_stages(make_config()), pre_process=pre_process)
    stage.embedding = SimpleNamespace(embedding_scale=EmbeddingScale(3.0))
    embedding.wrap_setup(lambda self: None)(stage)
    scale = stage.embedding.embedding_scale
    assert scale.scale.shared_embedding
    # The copy is left out of the norm of the gradients, and is not what is saved.
    assert getattr(scale.scale, "shared", False) is not pre_process
    assert scale.sharded_state_dict("e.")["e.scale"].replica_id == (int(not pre_process), 0, 0)


def test_a_scale_that_one_stage_has_is_not_marked(make_config: Make) -> None:
    for config in (make_config(mtp_num_layers=1), two_stages(make_config(), mtp_num_layers=None)):
        stage = SimpleNamespace(config=config, pre_process=True)
        stage.embedding = SimpleNamespace(embedding_scale=EmbeddingScale(3.0))
        embedding.wrap_setup(lambda self: None)(stage)
        assert not hasattr(stage.embedding.embedding_scale.scale, "shared_embedding")


def test_other_norms_without_a_scale_sum_nothing(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(embedding, "sum_copies", lambda *arguments: calls.append(arguments))
    allreduce = embedding.wrap_allreduce(lambda *arguments: None)
    allreduce([], two_stages(make_config("RMSNorm")), "embd", "pp")
    allreduce([], make_config(mtp_num_layers=1), "embd", "pp")
    assert calls == []
    config = two_stages(make_config())
    allreduce(["model"], config, "embd", "pp")
    assert calls == [(["model"], config, "embd", "pp")]


def test_a_stage_without_an_embedding_takes_part_with_zero() -> None:
    weight = SimpleNamespace(main_grad=torch.ones(2, 3, dtype=torch.bfloat16))
    stage = SimpleNamespace(shared_embedding_or_output_weight=lambda: weight)
    gradient = embedding._scale_or_zero(stage).main_grad
    torch.testing.assert_close(gradient, torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("frozen", ["embedding", "scale alone"])
def test_a_frozen_scale_takes_part_with_zero(frozen: str) -> None:
    """The stage without an embedding, which waits for it, cannot know that it is frozen."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    if frozen == "scale alone":
        weight.main_grad = torch.ones(2, 3)  # type: ignore[attr-defined]
    scale = EmbeddingScale(3.0)
    scale.requires_grad_(False)
    stage = SimpleNamespace(
        embedding=SimpleNamespace(embedding_scale=scale), shared_embedding_or_output_weight=lambda: weight
    )
    torch.testing.assert_close(embedding._scale_or_zero(stage).main_grad, torch.zeros(1))
