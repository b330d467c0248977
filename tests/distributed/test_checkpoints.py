"""A checkpoint saved in one layout is the same model, and the same training, in another, or is refused."""

import os
import socket
from collections.abc import Callable

import pytest
import torch

from tests.distributed import checkpoint_cases as cases
from tests.distributed.compare import TOLERANCE
from tests.distributed.record import Run

pytestmark = pytest.mark.distributed

RunOf = Callable[[str], Run]


def check(load: cases.Load, run_of: RunOf) -> None:
    saved = run_of(f"{load.model}-{load.saver}_saving")
    loaded = run_of(f"{load.model}-{load.saver}_loaded_by_{load.name}")
    check_parameters(saved, loaded)
    check_logits(saved, loaded)
    if load.with_optimizer:
        check_losses(run_of(load.model), saved, loaded)


def check_parameters(saved: Run, loaded: Run) -> None:
    """Every rank has what was saved, bit for bit."""
    before = saved.full("final")
    assert loaded.full("initial").keys() == before.keys()
    for rank in loaded.ranks:
        for shard in rank["initial"]:
            assert torch.equal(shard.data, before[shard.name][shard.place]), shard.name


def check_logits(saved: Run, loaded: Run) -> None:
    before, after = saved.logits("after"), loaded.logits("before")
    assert float((after - before).norm() / before.norm()) <= 1e-6


def check_losses(whole: Run, saved: Run, loaded: Run) -> None:
    """The optimizer's state has come along: the next steps are those of an uninterrupted run."""
    first, second = saved.series("losses"), loaded.series("losses")
    assert len(first) == cases.SAVED_AT
    assert [*first, *second] == pytest.approx(whole.series("losses"), rel=TOLERANCE)


def named(load: cases.Load) -> str:
    return f"{load.model}-{load.saver}-{load.name}"


@pytest.mark.parametrize("load", cases.BY_TWO, ids=named)
@pytest.mark.usefixtures("saves_and_mutants", "reloads")
def test_two_processes_go_on(load: cases.Load, run_of: RunOf) -> None:
    check(load, run_of)


@pytest.mark.parametrize("load", cases.BY_ONE, ids=named)
@pytest.mark.usefixtures("reloads")
def test_one_process_goes_on(load: cases.Load, run_of: RunOf) -> None:
    check(load, run_of)


def refusal_of(load: cases.Load, run_of: RunOf) -> str:
    """What both ranks were told, which is one thing."""
    loaded = run_of(f"{load.model}-{load.saver}_loaded_by_{load.name}")
    assert all("error" in rank for rank in loaded.ranks), "it was loaded"
    # Rank 0 finds it; the other is told where that was.
    (told,) = {
        str(rank["error"]).removesuffix(f" (on {socket.gethostname()}, rank 0)") for rank in loaded.ranks
    }
    return told


@pytest.mark.parametrize(("load", "told"), cases.REFUSED.items(), ids=map(named, cases.REFUSED))
@pytest.mark.usefixtures("saves_and_mutants")
def test_an_optimizer_for_another_layout_is_refused(load: cases.Load, told: str, run_of: RunOf) -> None:
    assert told in refusal_of(load, run_of)


@pytest.mark.skipif("MEGATRON_DYT_LAYOUTS" not in os.environ, reason="minutes: make test-layouts")
@pytest.mark.parametrize("load", cases.MATRIX, ids=named)
@pytest.mark.usefixtures("layouts")
def test_every_layout_goes_on_in_every_other_or_is_refused(load: cases.Load, run_of: RunOf) -> None:
    if cases.resumes(load):
        check(load, run_of)
    else:
        assert "does not load into this layout" in refusal_of(load, run_of)
