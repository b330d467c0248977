"""Recipes: the paper's numbers, the flags they become, and that Megatron's own parser takes them."""

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import load, names

PAPER = ("7b", "13b", "34b", "70b")


def value(flags: list[str], flag: str) -> str:
    assert flags.count(flag) == 1, flag
    return flags[flags.index(flag) + 1]


# Parameter counts of the published LLaMA 1 and 2 models; 34B is Code Llama's with a vocabulary of 32,000.
@pytest.mark.parametrize(
    ("name", "billions"), [("7b", 6.738), ("13b", 13.016), ("34b", 33.74), ("70b", 68.976)]
)
def test_sizes_are_those_of_llama(name: str, billions: float) -> None:
    assert load(name).parameters_without_norms / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_run(name: str) -> None:
    recipe = load(name)
    assert recipe.tokens_per_step == 4_194_304
    assert recipe.tokens == 1024 * 204_800_000  # 200B by the paper's count
    assert recipe.lr == (3e-4 if name in ("7b", "13b") else 1.5e-4)
    assert {recipe.weight_decay_on, recipe.warmup_style, recipe.output_init} == {"all", "quadratic", "plain"}
    assert recipe.paper["dyt_loss"] - recipe.paper["norm_loss"] <= 0.0101


@pytest.mark.parametrize("name", ["125m", "350m", "1.4b"])
def test_small_models_see_about_twenty_tokens_a_parameter(name: str) -> None:
    recipe = load(name)
    assert recipe.parameters_without_norms == pytest.approx(
        {"125m": 134e6, "350m": 374e6, "1.4b": 1.36e9}[name], rel=0.01
    )
    assert 19 <= recipe.tokens / recipe.parameters_without_norms <= 22


@pytest.mark.parametrize("name", names())
def test_the_twins_differ_in_the_norm_alone(name: str) -> None:
    recipe = load(name)
    dyt, rms = recipe.flags("DyT"), recipe.flags("RMSNorm")
    assert value(dyt, "--normalization") == "DyT"
    assert value(rms, "--normalization") == "RMSNorm"
    assert value(dyt, "--init-method-std") == value(rms, "--init-method-std")
    shared = rms.index("--normalization")
    assert dyt[:shared] == rms[:shared]
    assert not any(flag.startswith("--dyt-") for flag in rms)
    if recipe.preset == "unit":  # Both start at the same scale.
        assert value(rms, "--embedding-scale") == "unit"


def test_grouped_queries_only_where_there_are_fewer() -> None:
    assert "--group-query-attention" not in load("7b").flags()
    assert value(load("70b").flags(), "--num-query-groups") == "8"


def test_notes_name_what_the_paper_leaves_open() -> None:
    notes = " ".join(load("34b").notes)
    for word in ("train_iters", "warmup_iters", "rope_base"):
        assert word in notes
    assert "alpha0 0.2 in front of attention, 0.05 elsewhere" in load("34b").describe()[1]


def test_an_unknown_recipe_or_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"no recipe '8b'; there are 7b, 13b, 34b, 70b, 125m"):
        load("8b")
    with pytest.raises(UserError, match="DyT and RMSNorm; 'LayerNorm' was given"):
        load("7b").flags("LayerNorm")
