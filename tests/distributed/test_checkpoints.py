"""A checkpoint saved by several processes is the same model, and the same training, in one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.distributed import cases
from tests.distributed.compare import TOLERANCE
from tests.distributed.record import Run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("reloads")]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_loaded_parameters_are_the_saved_ones(layout: str, run_of: Callable[[str], Run]) -> None:
    saved = run_of(f"dense-{layout}_saving").full("final")
    loaded = run_of(f"dense-{layout}_loading").full("initial")
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_logits_are_those_of_the_saved_model(layout: str, run_of: Callable[[str], Run]) -> None:
    saved = run_of(f"dense-{layout}_saving").logits("after")
    loaded = run_of(f"dense-{layout}_loading").logits("before")
    error = float((loaded - saved).norm() / saved.norm())
    assert error <= 1e-6


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_training_goes_on_as_without_a_stop(layout: str, run_of: Callable[[str], Run]) -> None:
    """The optimizer's state has come along: the next steps are those of an uninterrupted run."""
    whole = run_of("dense").series("losses")
    first = run_of(f"dense-{layout}_saving").series("losses")
    second = run_of(f"dense-{layout}_loading").series("losses")
    assert len(first) == cases.SAVED_AT
    assert [*first, *second] == pytest.approx(whole, rel=TOLERANCE)
