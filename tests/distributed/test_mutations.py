"""The comparison has teeth: without one of the special cases that it is about, it fails, and names what is
wrong.

Most mutants train with TP2 and sequence parallelism, and `mark_sequence_parallel` leaves out the
parameters named in `cases.UNMARKED`. Their gradients are then partial sums. The others do without
something of `worker.ABSENCES`.
"""

from collections.abc import Callable

import pytest

from tests.distributed import cases
from tests.distributed.compare import differing_gradients
from tests.distributed.record import Run

pytestmark = pytest.mark.distributed
SCALE = "embedding.embedding_scale.scale"

# How a mutant's parameters are called in a checkpoint.
KEYS = {"norm": "layer_norm_{}|layernorm.{}|enorm.{}|hnorm.{}", "embedding": "embedding_scale.{}"}


def wrong_gradients(mutant: Run, reference: Run) -> set[str]:
    lines = differing_gradients(mutant, reference)
    return {line.split(":")[0].removeprefix("gradient of ") for line in lines}


@pytest.mark.parametrize("mutation", cases.UNMARKED)
@pytest.mark.usefixtures("saves_and_mutants")
def test_a_missing_mark_is_a_wrong_gradient(mutation: str, run_of: Callable[[str], Run]) -> None:
    model, unmarked = cases.UNMARKED[mutation]
    mutant = run_of(f"{model}-without_mark_on_{mutation}")
    suffixes = [
        key.format(name)
        for module, names in unmarked.items()
        for name in names
        for key in KEYS[module].split("|")
    ]
    affected = {key for key in mutant.full("gradient") if key.split("[")[0].endswith(tuple(suffixes))}
    if model == "latent":
        # Megatron sums the gradients of anything of this name, mark or not.
        affected = {key for key in affected if "q_layernorm" not in key}
    # All of the unmarked parameters, and no others.
    assert wrong_gradients(mutant, run_of(model)) == affected
    assert affected


@pytest.mark.usefixtures("saves_and_mutants")
def test_a_query_latents_gradient_that_is_not_averaged_is_doubled(run_of: Callable[[str], Run]) -> None:
    mutant, reference = run_of("latent-without_averaging"), run_of("latent")
    affected = {key for key in mutant.full("gradient") if ".q_layernorm." in key}
    assert len(affected) == 6  # alpha, weight and bias of two layers
    assert wrong_gradients(mutant, reference) == affected
    errors = mutant.errors("gradient", reference)
    assert [errors[key] for key in affected] == pytest.approx([1.0] * 6, rel=1e-4)


@pytest.mark.usefixtures("saves_and_mutants")
def test_copies_of_the_scale_that_are_not_summed_have_parts_of_the_gradient(
    run_of: Callable[[str], Run],
) -> None:
    assert wrong_gradients(run_of("mtp-without_sum_of_copies"), run_of("mtp")) == {SCALE}


@pytest.mark.slow
@pytest.mark.usefixtures("four")
def test_copies_of_the_scale_without_a_bucket_of_their_own_sum_the_wrong_parts(
    run_of: Callable[[str], Run],
) -> None:
    """The distributed optimizer has then finished the scale's gradient on other ranks than the copy's."""
    assert SCALE in wrong_gradients(run_of("mtp-without_bucket"), run_of("mtp"))
