"""Training with DyT on several processes is training with DyT on one.

Same weights, same data, same precision: the first gradient of every parameter on every rank, the losses and
gradient norms of all steps, and the parameters after them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed import cases
from tests.distributed.compare import ALLOWED, differences
from tests.distributed.record import Run

pytestmark = pytest.mark.distributed


def check(case: dict[str, Any], run_of: Callable[[str], Run]) -> None:
    allowed = ALLOWED[case["allowed"]]
    assert not differences(run_of(case["name"]), run_of(case["against"]), allowed)


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


def norm_sites(model: str) -> list[str]:
    """The keys under which Megatron saves the norms of a model; layers are stacked, those of MTP are not."""
    layers = 2 if cases.MODELS[model].startswith("--num-layers 2") else 4
    attn = "{}self_attention.linear_qkv.layer_norm_{{}}"
    if model.startswith("latent"):
        attn = "{}input_layernorm.{{}}"
    layer = [attn, "{}mlp.linear_fc1.layer_norm_{{}}"]
    heads = ("q_layernorm", "k_layernorm")
    qk = {"qk": heads, "auto": heads, "running": heads, "latent": ("q_layernorm", "kv_layernorm")}
    layer += [f"{{}}self_attention.{norm}.{{{{}}}}" for norm in qk.get(model, ())]
    sites = [f"{site.format('decoder.layers.')}[{i}]" for site in layer for i in range(layers)]
    sites += ["decoder.final_layernorm.{}"]
    for i in range({"mtp": 2, "mtp_tied": 1}.get(model, 0)):
        sites += [site.format(f"mtp.layers.{i}.transformer_layer.") for site in layer]
        sites += [f"mtp.layers.{i}.{norm}.{{}}" for norm in ("enorm", "hnorm", "final_layernorm")]
    return sites


@pytest.mark.parametrize("model", cases.named(cases.REFERENCES))
@pytest.mark.usefixtures("one")
def test_a_reference_has_every_dyt_parameter_and_trains(model: str, run_of: Callable[[str], Run]) -> None:
    """What is compared is there: DyT's parameters by name, the embedding scale, updates of all."""
    reference = run_of(model)
    gradients = reference.full("gradient")
    sites = norm_sites(model)
    alpha = {"frozen": (), "auto": ("log_alpha",), "running": ("log_alpha",)}.get(model, ("alpha",))
    learned = (*alpha, "weight", "bias")
    expected = {site.format(name) for site in sites for name in learned}
    found = {key for key in gradients if any(part in key for part in ("norm.", "layer_norm_"))}
    assert found == expected
    assert "embedding.embedding_scale.scale" in gradients
    assert ("output_layer.weight" in gradients) == (model not in ("tied", "mtp_tied"))
    assert len(reference.series("losses")) == cases.STEPS
    before, after = reference.full("initial"), reference.full("final")
    unmoved = {name for name in gradients if torch.equal(before[name], after[name])}
    # An update may be less than bf16 can hold; the optimizer has it in fp32.
    assert unmoved < set(gradients) if model == "bf16" else not unmoved
