"""The comparison has teeth: without one of the marks that it is about, it fails, and names what is wrong.

Each mutant trains with TP2 and sequence parallelism, and `mark_sequence_parallel` leaves out the
parameters named in `cases.MUTATIONS`. Their gradients are then partial sums.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed import cases
from tests.distributed.compare import differing_gradients
from tests.distributed.record import Run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("saves_and_mutants")]

# How a mutant's parameters are called in a checkpoint.
KEYS = {"norm": "layer_norm_{}|layernorm.{}", "embedding": "embedding_scale.{}"}


@pytest.mark.parametrize("mutation", cases.MUTATIONS)
def test_a_missing_mark_is_a_wrong_gradient(mutation: str, run_of: Callable[[str], Run]) -> None:
    model, unmarked = cases.MUTATIONS[mutation]
    mutant = run_of(f"{model}-without_mark_on_{mutation}")
    found = differing_gradients(mutant, run_of(model))
    suffixes = [
        key.format(name)
        for module, names in unmarked.items()
        for name in names
        for key in KEYS[module].split("|")
    ]
    affected = {key for key in mutant.full("gradient") if key.split("[")[0].endswith(tuple(suffixes))}
    # All of the unmarked parameters, and no others.
    assert {line.split(":")[0].removeprefix("gradient of ") for line in found} == affected
    assert affected
