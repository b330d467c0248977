"""The comparison itself, on runs made up here: what it lets pass and what it reports."""

import copy
from typing import Any

import pytest
import torch

from tests.distributed.compare import ALLOWED, differences
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


def test_the_same_tensors_in_another_layout_are_equal(reference: Run, split: Run, replicated: Run) -> None:
    assert differences(split, reference) == []
    assert differences(replicated, reference) == []


@pytest.mark.parametrize("part", ["gradient", "final"])
@pytest.mark.parametrize("which", [0, 1])
def test_any_rank_that_is_off_is_reported_with_the_parameter(
    reference: Run, replicated: Run, part: str, which: int
) -> None:
    replicated.ranks[which][part][0].data *= 1 + 2e-5
    assert differences(replicated, reference) == [f"{part} of linear.weight: off by 2e-05"]
    replicated.ranks[which][part][0].data.copy_(WEIGHT * (1 + 5e-6))
    assert differences(replicated, reference) == []


@pytest.mark.parametrize("name", ["norm.alpha", "linear_qkv.layer_norm_alpha[3]"])
def test_a_small_gradient_of_alpha_is_measured_by_the_others(name: str) -> None:
    def run(first: float, second: float) -> Run:
        alphas = [
            Shard(each, (1,), (slice(0, 1),), torch.tensor([value]))
            for each, value in ((name, first), ("final_layernorm.alpha", second))
        ]
        return Run("run", [rank(*alphas)])

    small = run(1e-3, 1.0)
    assert differences(run(1e-3 * (1 + 1e-3), 1.0), small)[0].startswith(f"initial of {name}")
    close, far = run(1e-3 * (1 + 1e-3), 1.0), run(1e-3 * (1 + 5e-2), 1.0)
    for each in (close, far):
        for part in ("initial", "final"):
            each.ranks[0][part] = small.ranks[0][part]
    assert differences(close, small) == []
    assert [line.split(":")[0] for line in differences(far, small)] == [f"gradient of {name}"]


def test_initial_weights_must_be_equal_exactly(reference: Run, split: Run) -> None:
    split.ranks[1]["initial"][0].data[0, 0] += 1e-6
    assert [line.split(":")[0] for line in differences(split, reference)] == ["initial of linear.weight"]


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


def test_a_missing_shard_fails(reference: Run, split: Run) -> None:
    del split.ranks[1]["gradient"][0]
    with pytest.raises(AssertionError, match=r"gradient of \['linear.weight'\] is incomplete"):
        differences(split, reference)


def test_a_missing_parameter_fails(reference: Run, split: Run) -> None:
    for each in split.ranks:
        each["gradient"].clear()
    with pytest.raises(AssertionError, match=r"linear\.weight"):
        differences(split, reference)


def test_a_gradient_of_zero_compares_nothing_and_fails(reference: Run, split: Run) -> None:
    for each in [*reference.ranks, *split.ranks]:
        each["gradient"][0].data.zero_()
    with pytest.raises(AssertionError, match="nothing is compared"):
        differences(split, reference)


def test_bf16_may_be_off_by_its_rounding_and_no_more(reference: Run, split: Run) -> None:
    for each in split.ranks:
        each["gradient"][0].data *= 1.05
        each["losses"][1] *= 1.003
        each["final"][0].data *= 1.01
    assert differences(split, reference, ALLOWED["bf16"]) == []
    assert len(differences(split, reference)) == 3
    for each in split.ranks:
        each["gradient"][0].data *= 1.1
    (line,) = differences(split, reference, ALLOWED["bf16"])
    assert line.startswith("gradient of linear.weight")
