"""Recipes: the paper's numbers, the flags they become, and that Megatron's own parser takes them."""

import pytest

from megatron_dyt.config import DyTConfig
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


# arXiv 2503.10622, Tables 4 and 10, and the code published with it.
@pytest.mark.parametrize(
    ("name", "hidden", "layers", "heads", "groups", "ffn", "lr", "attn", "other"),
    [
        ("7b", 4096, 32, 32, 32, 11008, 3e-4, 0.8, 0.2),
        ("13b", 5120, 40, 40, 40, 13824, 3e-4, 0.6, 0.15),
        ("34b", 8192, 48, 64, 8, 22016, 1.5e-4, 0.2, 0.05),
        ("70b", 8192, 80, 64, 8, 28672, 1.5e-4, 0.2, 0.05),
    ],
)
def test_the_papers_table(
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    groups: int,
    ffn: int,
    lr: float,
    attn: float,
    other: float,
) -> None:
    recipe = load(name)
    shape = (recipe.hidden_size, recipe.num_layers, recipe.num_attention_heads, recipe.num_query_groups)
    assert (*shape, recipe.ffn_hidden_size, recipe.lr) == (hidden, layers, heads, groups, ffn, lr)
    dyt = DyTConfig.preset(recipe.preset, hidden)
    assert (dyt.alpha_attn, dyt.alpha_ffn, dyt.alpha_final) == (attn, other, other)
    assert dyt.embedding_scale == "sqrt"
    assert (recipe.weight_decay, recipe.adam_beta1, recipe.adam_beta2, recipe.clip_grad) == (
        0.1,
        0.9,
        0.95,
        1.0,
    )
    assert (recipe.min_lr_ratio, recipe.warmup_iters, recipe.init_std, recipe.rope_base) == (
        0.1,
        2000,
        0.02,
        10000,
    )
    assert (recipe.vocab_size, recipe.tie_embeddings, recipe.bias) == (32000, False, False)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_run(name: str) -> None:
    recipe = load(name)
    assert recipe.tokens_per_step == 4_194_304
    assert recipe.tokens == 50_000 * 4_194_304
    assert "50,000 steps, so 50,000 is inferred" in recipe.notes[0]
    assert f"that is {recipe.tokens / 1e9:.1f}B" in recipe.notes[0]
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
    if recipe.preset != "paper":  # Both start at the same scale.
        assert value(rms, "--embedding-scale") == "unit"


def test_grouped_queries_only_where_there_are_fewer() -> None:
    assert "--group-query-attention" not in load("7b").flags()
    assert value(load("70b").flags(), "--num-query-groups") == "8"


def test_notes_name_what_the_paper_leaves_open() -> None:
    notes = " ".join(load("34b").notes)
    for word in ("train_iters", "warmup_iters", "warmup_style", "weight_decay_on", "rope_base"):
        assert word in notes
    assert (
        "alpha0 0.2 in front of attention, 0.05 in front of the MLP, 0.05 at the end"
        in load("34b").describe()[1]
    )


def test_an_unknown_recipe_or_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"no recipe '8b'; there are 7b, 13b, 34b, 70b, 125m"):
        load("8b")
    with pytest.raises(UserError, match="DyT and RMSNorm; 'LayerNorm' was given"):
        load("7b").flags("LayerNorm")
