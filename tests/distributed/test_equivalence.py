"""Training with DyT on several processes is training with DyT on one.

Same weights, same data, fp32: the first gradient of every parameter on every rank, the losses and
gradient norms of all steps, and the parameters after them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.compare import differences
from tests.distributed.record import Run

pytestmark = pytest.mark.distributed


def check(case: dict[str, Any], run_of: Callable[[str], Run]) -> None:
    assert not differences(run_of(case["name"]), run_of(case["against"]))


@pytest.mark.parametrize("case", cases.ONE_PROCESS, ids=cases.named(cases.ONE_PROCESS))
@pytest.mark.usefixtures("one")
def test_one_process(case: dict[str, Any], run_of: Callable[[str], Run]) -> None:
    """Gradient accumulation and recomputation change nothing."""
    check(case, run_of)


@pytest.mark.parametrize("case", cases.TWO_PROCESSES, ids=cases.named(cases.TWO_PROCESSES))
@pytest.mark.usefixtures("two")
def test_two_processes(case: dict[str, Any], run_of: Callable[[str], Run]) -> None:
    check(case, run_of)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.FOUR_PROCESSES, ids=cases.named(cases.FOUR_PROCESSES))
@pytest.mark.usefixtures("four")
def test_four_processes(case: dict[str, Any], run_of: Callable[[str], Run]) -> None:
    check(case, run_of)


@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.usefixtures("one")
def test_a_reference_has_every_dyt_parameter_and_trains(model: str, run_of: Callable[[str], Run]) -> None:
    """What is compared is there: DyT's parameters by name, the embedding scale, a loss that falls."""
    reference = run_of(model)
    gradients = reference.full("gradient")
    layers = 4 if model == "dense" else 2
    # The keys under which Megatron saves a layer's norms; the layers are stacked.
    sites = [f"decoder.layers.self_attention.linear_qkv.layer_norm_{{}}[{i}]" for i in range(layers)]
    sites += [f"decoder.layers.mlp.linear_fc1.layer_norm_{{}}[{i}]" for i in range(layers)]
    sites += ["decoder.final_layernorm.{}"]
    if model == "qk":
        for norm in ("q_layernorm", "k_layernorm"):
            sites += [f"decoder.layers.self_attention.{norm}.{{}}[{i}]" for i in range(layers)]
    expected = {site.format(name) for site in sites for name in ("alpha", "weight", "bias")}
    assert expected < gradients.keys()
    assert "embedding.embedding_scale.scale" in gradients
    assert ("output_layer.weight" in gradients) == (model != "tied")
    losses = reference.series("losses")
    assert len(losses) == cases.STEPS
    assert losses[-1] < losses[0]
