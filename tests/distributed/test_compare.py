"""The comparison itself, on runs made up here: what the runs of test_mutations.py do not show of it."""

import copy
from typing import Any

import pytest
import torch

from tests.distributed.compare import differences
from tests.distributed.record import Run, Shard

WEIGHT = torch.arange(1.0, 9.0).reshape(4, 2)


def shard(rows: slice, data: torch.Tensor) -> Shard:
    return Shard("linear.weight", (4, 2), (rows, slice(0, 2)), data.clone())


def rank(*shards: Shard) -> dict[str, Any]:
    parts = {part: list(copy.deepcopy(shards)) for part in ("initial", "gradient", "final")}
    return parts | {"losses": [4.0, 3.0], "grad_norms": [1.0, 0.5]}


@pytest.fixture
def reference() -> Run:
    return Run("reference", [rank(shard(slice(0, 4), WEIGHT))])


@pytest.fixture
def split() -> Run:
    """The same on two ranks, each with half of the rows."""
    return Run("split", [rank(shard(slice(0, 2), WEIGHT[:2])), rank(shard(slice(2, 4), WEIGHT[2:]))])


@pytest.fixture
def replicated() -> Run:
    """The same on two ranks, each with everything."""
    return Run("replicated", [rank(shard(slice(0, 4), WEIGHT)), rank(shard(slice(0, 4), WEIGHT))])


@pytest.mark.parametrize(
    ("part", "allowed", "wrong"), [("initial", 0, 1e-6), ("gradient", 5e-6, 2e-5), ("final", 5e-6, 2e-5)]
)
def test_one_rank_that_is_off_is_reported_with_the_parameter(
    reference: Run, replicated: Run, part: str, allowed: float, wrong: float
) -> None:
    replicated.ranks[1][part][0].data *= 1 + allowed
    assert differences(replicated, reference) == []
    replicated.ranks[1][part][0].data.copy_(WEIGHT * (1 + wrong))
    (line,) = differences(replicated, reference)
    assert line.startswith(f"{part} of linear.weight: off by ")


@pytest.mark.parametrize("what", ["losses", "grad_norms"])
def test_a_step_that_is_off_is_reported(reference: Run, split: Run, what: str) -> None:
    for each in split.ranks:
        each[what][1] *= 1 + 2e-5
    (line,) = differences(split, reference)
    assert line.startswith(f"{what} of step 2: ")


def test_ranks_with_different_losses_fail(reference: Run, split: Run) -> None:
    split.ranks[1]["losses"][0] = 4.1
    with pytest.raises(AssertionError, match="the ranks' losses differ"):
        differences(split, reference)


def test_a_nan_loss_is_a_difference(reference: Run, split: Run) -> None:
    bad = Run("bad", [split.ranks[0], split.ranks[1] | {"losses": []}])
    bad.ranks[0]["losses"] = [4.0, float("nan")]
    assert differences(bad, reference) == ["losses of step 2: nan for 3.0"]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([1], r"gradient of \['linear.weight'\] is incomplete"), ([0, 1], r"linear\.weight")],
    ids=["shard", "parameter"],
)
def test_what_is_missing_fails(reference: Run, split: Run, ranks: list[int], message: str) -> None:
    for each in ranks:
        split.ranks[each]["gradient"].clear()
    with pytest.raises(AssertionError, match=message):
        differences(split, reference)


def test_a_gradient_of_zero_compares_nothing_and_fails(reference: Run, split: Run) -> None:
    for each in [*reference.ranks, *split.ranks]:
        each["gradient"][0].data.zero_()
    with pytest.raises(AssertionError, match="nothing is compared"):
        differences(split, reference)
