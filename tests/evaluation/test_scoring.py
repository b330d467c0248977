"""Batched scores against one full forward pass a token, and what batching must not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_dyt.evaluation import scoring
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.scoring import Item, Scorer, plan_batches

from .conftest import VOCABULARY, Trained
from .toy import VOCABULARY as TOY_VOCABULARY
from .toy import ToyModel, naive_score

LENGTHS = [(1, 1), (5, 2), (20, 20), (17, 3), (33, 10), (48, 1), (2, 2), (17, 3)]


def toy_scorer(batch_tokens: int = 100, model: ToyModel | None = None) -> Scorer:
    return Scorer(
        model or ToyModel(),
        vocab_size=TOY_VOCABULARY,
        device=torch.device("cpu"),
        batch_tokens=batch_tokens,
    )


def random_items(vocabulary: int) -> list[Item]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    return [Item(draw(inputs), draw(targets)) for inputs, targets in LENGTHS]


def test_plan_batches() -> None:
    lengths = [3, 9, 1, 4, 4, 200, 4]
    batches = plan_batches(lengths, 12)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [5] in batches  # Longer than the budget: alone.
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 12
    assert len(batches) == 4
    assert plan_batches([], 12) == []


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_equals_one_forward_pass_a_token(
    trained: Callable[[str], Trained], norm: str, fresh_megatron: None
) -> None:
    loaded = load_model(str(trained(norm).directory))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(2)  # Away from uniform probabilities, where errors would hide.

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            positions = torch.arange(len(tokens))[None]
            return loaded.model(torch.tensor([tokens]), positions, None)[0, -1, :VOCABULARY].double()

    items = random_items(VOCABULARY)
    # A continuation that the model itself would give.
    own = [7, 8]
    for _ in range(3):
        own.append(int(logits(own).argmax()))
    items.append(Item(own[:-1], own[2:]))
    scores = loaded.language_model(batch_tokens=150).scorer.score(items)
    for item, score in zip(items, scores, strict=True):
        each, greedy = naive_score(logits, *item)
        assert score.logprob == pytest.approx(sum(each), abs=1e-5 * len(each))
        assert score.greedy == greedy
    assert scores[-1].greedy
    assert not scores[2].greedy
    assert any(score.logprob < -1 for score in scores)


def test_batches_do_not_change_scores(trained: Callable[[str], Trained], fresh_megatron: None) -> None:
    loaded = load_model(str(trained("DyT").directory))
    items = random_items(VOCABULARY)
    alone = [loaded.language_model(1).scorer.score([item])[0] for item in items]
    together = loaded.language_model(10_000).scorer.score(items)
    for one, other in zip(alone, together, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.greedy == other.greedy


def test_slices_of_the_head_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(TOY_VOCABULARY)
    whole = toy_scorer().score(items)
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", 3 * TOY_VOCABULARY)
    sliced = toy_scorer().score(items)
    for one, other in zip(whole, sliced, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_padding_rows_of_the_head_take_no_probability() -> None:
    model = ToyModel()
    items = random_items(TOY_VOCABULARY)
    before = toy_scorer(model=model).score(items)
    with torch.no_grad():
        model.head[TOY_VOCABULARY:] = 1e3
    assert toy_scorer(model=model).score(items) == before


def test_forward_passes_keep_to_the_budget() -> None:
    model = ToyModel()
    toy_scorer(60, model).score(random_items(TOY_VOCABULARY))
    assert max(rows * length for rows, length in model.shapes) <= 60
    assert len(model.shapes) < len(LENGTHS)


def test_ranks_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a process group, one after the other: each fills its rows, the sum has all."""
    items = random_items(TOY_VOCABULARY)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda table, group: parts.append(table.clone()))
    for rank in (0, 1):
        scorer = toy_scorer(60)
        scorer.rank, scorer.ranks = rank, 2
        scorer.score(items)
    first, second = parts
    assert ((first[:, 0] != 0) ^ (second[:, 0] != 0)).all()
    expected = torch.tensor([list(score) for score in toy_scorer(60).score(items)])
    torch.testing.assert_close((first + second).float(), expected)


def test_ranks_share_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[4, 5], [6], [7, 8, 9]]
    parts: list[dict[int, list[int]]] = []

    def gather(everyone: list[dict[int, list[int]]], mine: dict[int, list[int]], group: None) -> None:
        parts.append(mine)
        everyone[:] = [mine, expected_rest]

    whole = toy_scorer(1).generate(prompts, max_new=3, max_length=50, done=lambda new: False)
    expected_rest = {0: whole[0]}
    monkeypatch.setattr(scoring.dist, "all_gather_object", gather)
    scorer = toy_scorer(1)
    scorer.rank, scorer.ranks = 0, 2
    assert scorer.generate(prompts, max_new=3, max_length=50, done=lambda new: False) == whole
    assert sorted(parts[0]) == [1, 2]


def test_progress_is_shown_by_the_first_rank_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_dyt.data.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda table, group: None)
    for rank, shown in ((0, True), (1, False)):
        scorer = toy_scorer(60)
        scorer.rank, scorer.ranks = rank, 2
        scorer.score(random_items(TOY_VOCABULARY), "my task")
        assert ("my task" in capsys.readouterr().err) == shown


def test_greedy_generation_equals_one_forward_pass_a_token() -> None:
    model = ToyModel()
    prompts = [[4, 5, 6], [7], [1, 9, 9, 9]]
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(5):
            row.append(int(model.logits(row).argmax()))
        expected.append(row[len(prompt) :])
    assert (
        toy_scorer(model=model).generate(prompts, max_new=5, max_length=50, done=lambda new: False)
        == expected
    )
    # Stopped rows stay as they are while the others go on.
    stop = expected[0][1]
    stopped = toy_scorer(model=model).generate(
        prompts, max_new=5, max_length=50, done=lambda new: new[-1] == stop
    )
    for new, full in zip(stopped, expected, strict=True):
        assert new == (full[: full.index(stop) + 1] if stop in full else full)
    assert len(stopped[0]) == 2


def test_sampling_depends_on_the_seed_and_not_on_batches() -> None:
    prompts = [[4, 5, 6], [7], [1, 9]]

    def sample(batch_tokens: int, seed: int) -> list[list[int]]:
        return toy_scorer(batch_tokens).generate(
            prompts, max_new=8, max_length=50, done=lambda new: False, temperature=1.5, seed=seed
        )

    assert sample(1, 0) == sample(1000, 0)
    assert sample(1000, 0) != sample(1000, 1)
    assert max(token for new in sample(1000, 0) for token in new) < TOY_VOCABULARY
