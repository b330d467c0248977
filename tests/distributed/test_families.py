"""GPT without its training loop, T5, BERT, vision transformer, hybrid stacks with DyT: two processes have the
gradients of one."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import cases, family_cases
from tests.distributed.compare import TOLERANCE, differing_gradients
from tests.distributed.record import Run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("family_runs")]


@pytest.mark.parametrize("case", family_cases.PARALLEL, ids=cases.named(family_cases.PARALLEL))
def test_gradients_and_loss_are_those_of_one_process(
    case: dict[str, Any], run_of: Callable[[str], Run]
) -> None:
    run, reference = run_of(case["name"]), run_of(case["like"])
    assert not differing_gradients(run, reference)
    assert run.series("losses") == pytest.approx(reference.series("losses"), rel=TOLERANCE)


@pytest.mark.parametrize("model", family_cases.MODELS)
def test_a_reference_has_dyt_where_the_family_has_norms(model: str, run_of: Callable[[str], Run]) -> None:
    """What is compared is there."""
    alphas = [key for key in run_of(f"family-{model}").full("gradient") if "alpha" in key]
    # Two transformer layers of two to four norms each and what stands outside them, or four hybrid layers.
    expected = {"gpt": 9, "latent_te": 9, "t5": 12, "bert": 6, "vit": 5, "hybrid": 5, "hybrid_moe": 5}
    assert len(alphas) == expected[model]


@pytest.mark.parametrize("model", family_cases.MODELS)
def test_a_checkpoint_of_two_processes_is_the_model_of_one(model: str, run_of: Callable[[str], Run]) -> None:
    loaded, reference = run_of(family_cases.reload(model)["name"]), run_of(f"family-{model}")
    assert set(loaded.errors("initial", reference).values()) == {0.0}
    assert loaded.series("losses") == reference.series("losses")


@pytest.mark.parametrize("model", family_cases.MUTANTS)
def test_without_the_mark_the_gradients_of_exactly_these_are_wrong(
    model: str, run_of: Callable[[str], Run]
) -> None:
    mutant = run_of(family_cases.mutant(model)["name"])
    found = differing_gradients(mutant, run_of(f"family-{model}"))
    wrong = {line.split(":")[0].removeprefix("gradient of ") for line in found}
    # layer_norm_alpha, final_layernorm.alpha, final_norm.alpha, lm_head.layer_norm.alpha
    sites = ("norm_{}", "norm.{}")
    suffixes = tuple(site.format(name) for site in sites for name in family_cases.DYT_PARAMETERS)
    assert wrong == {key for key in mutant.full("gradient") if key.split("[")[0].endswith(suffixes)}
    assert wrong
