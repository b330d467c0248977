"""The cases of `family_worker.py`: families, and the layouts of two processes that each knows.

A case is a plain dictionary, because it travels to the worker as JSON:

    name        of the case, and of its result files
    family      of `tests.families`
    config      fields of its TransformerConfig
    like        case whose initial weights it starts from; None draws them
    unmarked    as in `cases.py`
    save, load  name of a checkpoint of the model to write, or to take the weights from
"""

import importlib.metadata
from typing import Any

SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": SEQUENCE_PARALLEL,
    "pp2": {"pipeline_model_parallel_size": 2},
}
EXPERTS = {"num_moe_experts": 2, "moe_router_load_balancing_type": "none", "moe_ffn_hidden_size": 64}
# Family, fields of its config, layouts. T5 has no pipeline stages: Megatron's parallel state has none for an
# encoder. Megatron's vision transformer knows no sequence parallelism (`norm_sites.wrap_vision_init`); MoE
# under tensor parallelism wants it.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt": ("gpt", {"qk_layernorm": True}, ("pp2", "tp2", "tp2_sp")),
    # Of duplicated down-projections; without sequence parallelism it is refused.
    "latent_te": ("latent", {}, ("tp2_sp",)),
    "t5": ("t5", {}, ("tp2", "tp2_sp")),
    "bert": ("bert", {}, ("pp2", "tp2", "tp2_sp")),
    "vit": ("vit", {}, ("tp2",)),
    "hybrid": ("hybrid", {}, ("pp2", "tp2", "tp2_sp")),
}
# The router of 0.16 multiplies with Transformer Engine's function, whether it is there or not.
if not importlib.metadata.version("megatron-core").startswith("0.16."):
    MODELS["hybrid_moe"] = ("hybrid", EXPERTS, ("tp2_sp",))
DYT_PARAMETERS = ["alpha", "weight", "bias"]
# With the marks taken off DyT's parameters their gradients are partial sums.
MUTANTS = ("t5", "bert", "hybrid")


def case(model: str, layout: str = "", **options: Any) -> dict[str, Any]:
    """The case `family-model-layout`; without a layout it is the reference."""
    family, config, _ = MODELS[model]
    return {
        "name": f"family-{model}-{layout}" if layout else f"family-{model}",
        "family": family,
        "config": config | LAYOUTS.get(layout, {}),
        "like": f"family-{model}" if layout else None,
        "unmarked": {},
        "save": f"checkpoint-{model}" if layout and layout == MODELS[model][2][-1] else None,
        "load": None,
    } | options


def mutant(model: str) -> dict[str, Any]:
    name = f"family-{model}-unmarked"
    return case(model, "tp2_sp", name=name, unmarked={"norm": DYT_PARAMETERS}, save=None)


def reload(model: str) -> dict[str, Any]:
    """What two processes have saved, in one."""
    return case(model, name=f"family-{model}-reload", load=f"checkpoint-{model}")


REFERENCES = [case(model) for model in MODELS]
PARALLEL = [case(model, layout) for model, (_, _, layouts) in MODELS.items() for layout in layouts]
ALL = [*REFERENCES, *PARALLEL, *(mutant(model) for model in MUTANTS), *map(reload, MODELS)]
