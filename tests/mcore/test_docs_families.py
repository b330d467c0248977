"""The table of docs/families.md is what the code does."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.mcore.norm_sites import KEPT, dyt_sites
from tests import families

Make = Callable[..., Any]

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
BUILT = ("t5", "bert", "radio")


def table() -> dict[str, dict[str, str]]:
    """{family: {site: what it becomes}}"""
    rows: dict[str, dict[str, str]] = {}
    for family, site, becomes in re.findall(
        r"^\| (\w+) \| ([\w.]+) \| (\w+) \|$", DOCUMENT.read_text(), re.M
    ):
        rows.setdefault(family, {})[site] = becomes
    return rows


def sites(model: Any) -> dict[str, str]:
    return {re.sub(r"\.\d+\.", ".N.", name): site.role for name, site in dyt_sites(model)}


@pytest.mark.parametrize("family", BUILT)
@pytest.mark.usefixtures("world")
def test_a_family_has_exactly_the_sites_of_the_table(family: str) -> None:
    assert sites(families.build(family, families.config_for(family))) == table()[family]


@pytest.mark.usefixtures("world")
def test_vision_subtypes_have_the_sites_of_the_table_between_them() -> None:
    config = families.config_for("vit")
    found = {subtype: sites(families.vit(config, subtype)) for subtype in ("clip", "siglip", "internvit")}
    assert found["clip"] | found["siglip"] == table()["vit"]
    assert "ln_post" not in found["clip"]
    assert "ln_pre" not in found["siglip"]
    assert not {"ln_pre", "ln_post"} & found["internvit"].keys()


@pytest.mark.usefixtures("world")
def test_a_hybrid_of_local_layers_has_the_sites_of_the_table() -> None:
    expected = table()["hybrid"]
    # Their layers need CUDA packages: test_spec_hybrid.py has the spec.
    for elsewhere in ("norm", "mixer.norm", "self_attention.out_norm"):
        del expected[f"decoder.layers.N.{elsewhere}"]
    assert sites(families.build("hybrid", families.config_for("hybrid"))) == expected


def test_gpt_has_the_sites_of_the_table(make_config: Make, build_gpt: Make) -> None:
    assert sites(build_gpt(make_config(qk_layernorm=True))) == table()["gpt"]


@pytest.mark.needs("latent_attention_without_te")
def test_latent_attention_has_the_sites_of_the_table(make_latent_config: Make, build_gpt: Make) -> None:
    found = sites(build_gpt(make_latent_config(qk_layernorm=True, q_lora_rank=16)))
    without_qk = {site: role for site, role in table()["gpt"].items() if role != "qk"}
    assert found == without_qk | table()["gpt_mla"]


def test_prediction_layers_have_the_sites_of_the_table(
    make_config: Make, make_spec: Make, build_gpt: Make
) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    config = make_config(mtp_num_layers=1)
    block = get_gpt_mtp_block_spec(config, make_spec(config), use_transformer_engine=False)
    found = sites(build_gpt(config, mtp_block_spec=block))
    # The prediction layer's own norms, not those of the layer in it.
    own = {site: role for site, role in found.items() if re.fullmatch(r"mtp\.layers\.N\.\w+", site)}
    assert own == table()["gpt_mtp"]


def test_every_norm_that_stays_is_documented() -> None:
    text = DOCUMENT.read_text()
    for kept in KEPT:
        assert f"`{kept.owner}.{kept.slot}`" in text
