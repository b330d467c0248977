"""DyT models of real Transformer Engine layers: what they are made of, and what is saved of them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megatron_dyt import compat
from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import norm_sites
from megatron_dyt.mcore.checkpoint import model_tensor_keys
from megatron_dyt.mcore.norm_sites import dyt_sites
from tests import families

EXPERTS = {"num_moe_experts": 2, "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 32}
BIASES = {"add_bias_linear": True, "add_qkv_bias": True}
# Overrides of tests/mcore/conftest.py's configs: LLaMA-like with grouped queries, and latent attention.
GPT: dict[str, dict[str, Any]] = {
    "dense": {},
    "qk": {"qk_layernorm": True},
    "biases": BIASES,
    "sequential experts": EXPERTS,
    "grouped experts": EXPERTS | {"moe_grouped_gemm": True},
    "prediction": {"mtp_num_layers": 1, "qk_layernorm": True},
}
LATENT: dict[str, dict[str, Any]] = {
    "latent": {},
    "latent without q": {"q_lora_rank": None, "qk_layernorm": False},
    "latent without norms": {"qk_layernorm": False},
}
OTHERS = ("t5", "bert", "vit", "hybrid")
ALL = (*GPT, *LATENT, *OTHERS)

type Build = Callable[[str, bool], nn.Module]


@pytest.fixture
def build(make_config: Any, make_latent_config: Any, build_gpt: Any) -> Build:
    """A small model by its name in `ALL`, of Transformer Engine's layers or of local ones."""

    def make(name: str, te: bool) -> nn.Module:
        if name in OTHERS:
            # Its norms are Transformer Engine's in local specs too: only their biases make it the same.
            model: nn.Module = families.build(name, families.config_for(name), te=te)
            return model
        local = {} if te else {"transformer_impl": "local", "moe_grouped_gemm": False}
        config = (
            make_config(**GPT[name] | local)
            if name in GPT
            else make_latent_config(**{"transformer_impl": "transformer_engine"} | LATENT[name] | local)
        )
        config.dyt = DyTConfig.paper(config.hidden_size, bias=True)
        model = build_gpt(config, te=te)
        return model

    return make


def skip_without_local_layers(name: str) -> None:
    if name in LATENT and not compat.has("latent_attention_without_te"):
        pytest.skip("this Megatron has no latent attention of local layers to compare with")


def classes(model: nn.Module) -> Counter[str]:
    return Counter(type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_no_stock_norm_is_left(build: Build, name: str) -> None:
    model = build(name, True)
    assert [path for path, *_ in norm_sites.other_norms(model)] == []
    found = classes(model)
    assert found["TEColumnParallelLinear"] >= 2
    assert found["TERowParallelLinear"] >= 1
    assert "TELayerNormColumnParallelLinear" not in found


@pytest.mark.parametrize("name", ALL)
def test_sites_and_parameters_are_those_of_local_layers(build: Build, name: str) -> None:
    skip_without_local_layers(name)
    models = [build(name, te) for te in (True, False)]
    sites = [{path: site.role for path, site in dyt_sites(model)} for model in models]
    assert sites[0] == sites[1]
    assert sum(p.numel() for p in models[0].parameters()) == sum(p.numel() for p in models[1].parameters())


def tensor_keys(model: nn.Module) -> set[str]:
    return set(model_tensor_keys({"model": model.sharded_state_dict()}))  # type: ignore[operator]


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_keys_are_those_of_local_layers(build: Build, name: str) -> None:
    skip_without_local_layers(name)
    assert tensor_keys(build(name, True)) == tensor_keys(build(name, False))


@pytest.mark.parametrize("from_te", [True, False], ids=["te to local", "local to te"])
@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_moves(
    build: Build, save_model: Callable[[Any, Path], None], tmp_path: Path, name: str, from_te: bool
) -> None:
    from megatron.core import dist_checkpointing

    skip_without_local_layers(name)
    if name == "prediction" and not from_te and not compat.has("training_loop"):
        pytest.skip("0.16 wants an _extra_state of attention in prediction layers; local layers have none")
    saved, loaded = build(name, from_te), build(name, not from_te)
    for number, parameter in enumerate(saved.parameters()):
        nn.init.normal_(parameter, mean=number)
    save_model(saved, tmp_path / "checkpoint")
    state = dist_checkpointing.load({"model": loaded.sharded_state_dict()}, str(tmp_path / "checkpoint"))
    left = loaded.load_state_dict(state["model"], strict=False)
    assert [key for key in left.missing_keys if not key.endswith("_extra_state")] == []
    again = [parameter.sum() for parameter in loaded.parameters()]
    assert sorted(again) == sorted(parameter.sum() for parameter in saved.parameters())


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_a_checkpoint_of_a_stock_norm_moves_to_local_layers_and_back_by_a_flag(
    make_config: Any, build_gpt: Any, save_model: Callable[[Any, Path], None], tmp_path: Path, norm: str
) -> None:
    """Megatron's own: Transformer Engine's final norm has an _extra_state, PyTorch's has none."""
    from megatron.core.dist_checkpointing import load

    te, local = (build_gpt(make_config(norm), te=te) for te in (True, False))
    for model, kind in ((te, "te"), (local, "local")):
        save_model(model, tmp_path / kind)
    load({"model": local.sharded_state_dict()}, str(tmp_path / "te"))
    with pytest.raises(UserError, match=r"final_layernorm\._extra_state.*--dist-ckpt-strictness log_all"):
        load({"model": te.sharded_state_dict()}, str(tmp_path / "local"))
    load({"model": te.sharded_state_dict()}, str(tmp_path / "local"), strict="log_all")


def test_grouped_experts_are_transformer_engines(build: Build) -> None:
    found = classes(build("grouped experts", True))
    assert found["TEGroupedMLP"] == found["TEColumnParallelGroupedLinear"] == 2
    assert "TEGroupedMLP" not in classes(build("sequential experts", True))


def test_down_projections_of_latent_attention_are_duplicated(build: Build) -> None:
    """Whole on every tensor parallel rank, not column-parallel as the local ones."""
    attention: Any = build("latent", True).decoder.layers[0].self_attention  # type: ignore[union-attr]
    for linear in (attention.linear_q_down_proj, attention.linear_kv_down_proj):
        assert type(linear).__name__ == "TELinear"
        assert linear.parallel_mode is None
        # 0.16 leaves Transformer Engine's own mark, by which each rank's copy counts in the gradient norm.
        assert linear.weight.tensor_model_parallel != compat.has("latent_attention_without_te")
    for linear in (attention.linear_q_up_proj, attention.linear_kv_up_proj):
        assert type(linear).__name__ == "TEColumnParallelLinear"
