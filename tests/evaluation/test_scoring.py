"""Batched scores against one full forward pass per token, and what batching must not change."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt import log
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import forward, scoring
from megatron_dyt.evaluation.batches import Item, shared_rows
from megatron_dyt.evaluation.cache import ResultCache, key_of
from megatron_dyt.evaluation.checkpoint_model import LoadedModel, load_model
from megatron_dyt.evaluation.forward import Forward
from megatron_dyt.evaluation.lm import MegatronDyTLM
from megatron_dyt.evaluation.scoring import Score, Scorer

from .conftest import VOCABULARY, Trained
from .toy import VOCABULARY as TOY_VOCABULARY
from .toy import ToyModel, naive_score, ranks_one_after_the_other

LENGTHS = [(1, 1), (5, 2), (20, 20), (17, 3), (33, 10), (48, 1), (2, 2), (17, 3)]


def toy_scorer(batch_tokens: int = 100, model: ToyModel | None = None, **options: Any) -> Scorer:
    forward = Forward(model or ToyModel(), vocab_size=TOY_VOCABULARY, device=torch.device("cpu"))
    return Scorer(forward, batch_tokens=batch_tokens, **options)


def random_items(vocabulary: int) -> list[Item]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    return [Item(draw(inputs), draw(targets)) for inputs, targets in LENGTHS]


def scorer_of(loaded: LoadedModel, mode: str, batch_tokens: int = 150) -> Scorer:
    return MegatronDyTLM.of(loaded, mode=mode, batch_tokens=batch_tokens).scorer


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_equals_one_forward_pass_a_token(
    trained: Callable[[str], Trained], norm: str, fresh_megatron: None
) -> None:
    """Megatron's own logits, one sequence at a time, against batches of rows and of shared rows."""
    loaded = load_model(str(trained(norm).directory))
    with torch.no_grad():
        # Away from uniform probabilities, where errors would hide.
        loaded.model.output_layer.weight.mul_(4)

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            positions = torch.arange(len(tokens))[None]
            return loaded.model(torch.tensor([tokens]), positions, None)[0, -1, :VOCABULARY].double()

    items = common_items(VOCABULARY)
    # A continuation that the model itself would give.
    own = [7, 8]
    for _ in range(3):
        own.append(int(logits(own).argmax()))
    items.append(Item(own[:-1], own[2:]))
    expected = [naive_score(logits, *item) for item in items]
    for mode in ("flat", "shared"):  # Sharing changes the model.
        scores = scorer_of(loaded, mode).score(items)
        for item, score, (each, greedy) in zip(items, scores, expected, strict=True):
            assert score.logprob == pytest.approx(sum(each), abs=1e-5 * len(item.targets))
            assert score.greedy == greedy
        assert scores[-1].greedy
        assert not scores[2].greedy
        assert any(score.logprob < -1 for score in scores)


@pytest.mark.parametrize("mode", ["flat", "shared"])
def test_batches_do_not_change_scores(
    trained: Callable[[str], Trained], fresh_megatron: None, mode: str
) -> None:
    loaded = load_model(str(trained("DyT").directory))
    items = common_items(VOCABULARY)
    alone = [scorer_of(loaded, mode, 1).score([item])[0] for item in items]
    same(scorer_of(loaded, mode, 10_000).score(items), alone)


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_bf16(trained: Callable[..., Trained], fresh_megatron: None, norm: str) -> None:
    """Megatron wraps such a model; scores of the two modes agree as far as bf16 goes."""
    loaded = load_model(str(trained(norm, unusual="--bf16").directory))
    assert {parameter.dtype for parameter in loaded.model.parameters()} >= {torch.bfloat16}
    items = common_items(VOCABULARY)
    flat, shared = (scorer_of(loaded, mode).score(items) for mode in ("flat", "shared"))
    for item, one, other in zip(items, flat, shared, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.02 * len(item.targets))


def test_slices_of_the_head_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(TOY_VOCABULARY)
    whole = toy_scorer().score(items)
    monkeypatch.setattr(forward, "LOGITS_PER_SLICE", 3 * TOY_VOCABULARY)
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


@pytest.mark.parametrize("share", [None, 8])
def test_a_model_of_nan_has_no_scores(tmp_path: Path, share: int | None) -> None:
    """lm-eval would take the first choice of each question, and give an accuracy near chance."""
    model = ToyModel()
    with torch.no_grad():
        model.embedding[5] = float("nan")
    cache = ResultCache(tmp_path, "model")
    scorer = toy_scorer(model=model, share=share, cache=cache)
    items = [Item([4, 6], [7]), Item([4, 5], [7])]
    with pytest.raises(UserError, match=r"not finite.*--ckpt-step"):
        scorer.score(items)
    assert scorer.score(items[:1])[0].logprob < 0
    assert not cache.get([key_of("score", *items[1])])


def test_ranks_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer requests than ranks: all of them still meet in the exchange of results."""
    parts: list[torch.Tensor] = []
    item = random_items(TOY_VOCABULARY)[1]
    expected = torch.tensor([list(toy_scorer().score([item])[0])], dtype=torch.float64)
    for ranks in ranks_one_after_the_other(monkeypatch, sum=lambda part: parts.append(part.clone())):
        toy_scorer(ranks=ranks).score([item])
    assert [part.shape for part in parts] == [(1, 2), (1, 2)]
    torch.testing.assert_close(parts[0], expected)
    assert not parts[1].any()


@pytest.mark.parametrize("share", [None, 8])
def test_ranks_share_the_work(monkeypatch: pytest.MonkeyPatch, share: int | None) -> None:
    """Two ranks, one after the other: each fills its rows, the sum has all."""
    items = random_items(TOY_VOCABULARY)
    expected = torch.tensor([list(score) for score in toy_scorer(60).score(items)])
    parts: list[list[torch.Tensor]] = []
    for ranks in ranks_one_after_the_other(monkeypatch, sum=lambda part: parts[-1].append(part.clone())):
        parts.append([])
        toy_scorer(60, ranks=ranks, share=share).score(items)
    first, second = (torch.cat(part) for part in parts)
    assert ((first[:, 0] != 0) ^ (second[:, 0] != 0)).all()
    total = (first + second).float()
    torch.testing.assert_close(total[total[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize("rank", [0, 1])
def test_progress_is_shown_by_the_first_rank_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    monkeypatch.setattr(log, "_LOG_SECONDS", 0.0)
    monkeypatch.setenv("RANK", str(rank))
    toy_scorer(60).score(random_items(TOY_VOCABULARY), "my task")
    shown = capsys.readouterr().err
    assert ("my task" in shown) == (rank == 0)
    assert (f"{len(LENGTHS)} of {len(LENGTHS)} requests" in shown) == (rank == 0)


# --- shared contexts ------------------------------------------------------------------------------


def common_items(vocabulary: int, longest: int = 48) -> list[Item]:
    """Contexts with several continuations, some of one token, some with a common beginning."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    items = []
    for length in (30, 3, 17):
        context = draw(length)
        beginning = draw(2)
        for own in (1, 4, 4, 9):
            targets = [*beginning, *draw(own)]
            items.append(Item([*context, *targets[:-1]][-longest:], targets))
        items += [Item(context, draw(1)) for _ in range(3)]
    return [*items, *random_items(vocabulary)]


def same(ones: list[Score], others: list[Score], tolerance: float = 1e-5) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance)
        assert one.greedy == other.greedy


def test_shared_contexts_do_not_change_toy_scores() -> None:
    items = common_items(TOY_VOCABULARY)
    model = ToyModel()
    flat = toy_scorer().score(items)
    for batch_tokens in (60, 1000):
        same(toy_scorer(batch_tokens, model, share=1000).score(items), flat)
    assert sum(rows * length for rows, length in model.shapes[-5:]) < sum(len(i.inputs) for i in items)


def test_padding_sees_itself() -> None:
    """A token that sees nothing would be NaN, and 0 x NaN is NaN for those that do not see it."""
    rows = shared_rows(common_items(TOY_VOCABULARY), 1000, 1000)
    assert len({len(row) for row in rows}) > 1
    mask = toy_scorer().forward._mask(rows)
    assert (mask == 0).any(-1).all()
    assert not mask.isnan().any()


# --- results that are kept ------------------------------------------------------------------------


def test_known_results_are_not_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = common_items(TOY_VOCABULARY)
    expected = toy_scorer().score(items)
    model = ToyModel()
    first = toy_scorer(model=model, cache=ResultCache(tmp_path, "model"))
    assert first.score(items[:9]) == expected[:9]
    assert "in the cache" not in capsys.readouterr().out
    model.shapes.clear()
    again = toy_scorer(model=model, cache=ResultCache(tmp_path, "model"), share=8)
    same(again.score(items), expected)
    assert f"9 of {len(items)} results are in the cache" in capsys.readouterr().out
    model.shapes.clear()
    assert again.score(items) == again.score(items)
    assert model.shapes == []
    toy_scorer(model=model, cache=ResultCache(tmp_path, "another model")).score(items)
    assert model.shapes


def test_the_first_rank_alone_reads_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(TOY_VOCABULARY)
    keys = [key_of("score", *item) for item in items]
    for ranks in ranks_one_after_the_other(monkeypatch, sum=lambda part: part):
        cache = ResultCache(tmp_path / str(ranks.index), "model")
        toy_scorer(60, ranks=ranks, cache=cache).score(items)
        assert cache.path.exists() == (ranks.index == 0)
        assert len(cache.get(keys)) == (len(items) if ranks.index == 0 else 0)


def test_a_kill_leaves_the_rounds_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(TOY_VOCABULARY)
    monkeypatch.setattr(scoring, "ROUND", 2)
    model = ToyModel()

    @functools.wraps(ToyModel.forward)
    def fail_late(*arguments: Any, **options: Any) -> Any:
        if len(model.shapes) == 5:
            raise KeyboardInterrupt
        return ToyModel.forward(model, *arguments, **options)

    monkeypatch.setattr(model, "forward", fail_late)
    with pytest.raises(KeyboardInterrupt):
        toy_scorer(1, model, cache=ResultCache(tmp_path, "model")).score(items)
    model.shapes.clear()
    monkeypatch.undo()
    scores = toy_scorer(1, model, cache=ResultCache(tmp_path, "model")).score(items)
    same(scores, toy_scorer(1).score(items), 0)
    assert len(model.shapes) == len(items) - 4
