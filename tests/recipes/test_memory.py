"""The memory model: exact where it counts parameters, by hand where it estimates."""

import pytest

from megatron_dyt.recipes import load, memory, names
from megatron_dyt.recipes.layout import Layout


@pytest.mark.parametrize("name", names())
def test_one_rank_holds_the_whole_model(name: str) -> None:
    recipe = load(name)
    norms = (2 * recipe.num_layers + 1) * (recipe.hidden_size + 1)
    padding = 2 * (recipe.padded_vocab_size() - recipe.vocab_size) * recipe.hidden_size
    expected = recipe.parameters_without_norms + norms + padding + 1  # the embedding scale
    assert memory.stage_parameters(recipe, Layout(1, 1, 1, 1, 1), 0) == expected


def test_a_layers_activations_counted_by_hand() -> None:
    recipe = load("7b")
    tokens, hidden, ffn = 4096, 4096, 11008
    # Two DyT: input and output each. q, k, v, attention's output. SwiGLU: gate, up, product. bf16.
    by_hand = 2 * tokens * (4 * hidden + 3 * hidden + hidden + 3 * ffn) + 4 * tokens * 32
    assert memory.layer_activations(recipe, Layout(1, 1, 1, 1, 1)) == by_hand
    assert memory.layer_activations(recipe, Layout(4, 1, 1, 1, 1)) == by_hand / 4
    assert memory.layer_activations(recipe, Layout(1, 1, 1, 1, 1, "full")) == 2 * tokens * hidden


def test_flash_attention_keeps_its_output_in_two_orders() -> None:
    recipe = load("7b")
    one, two = (memory.layer_activations(recipe, Layout(1, 1, 1, 1, batch)) for batch in (1, 2))
    # [b, s, h] is [s, b, h] with one sequence, and copied with more.
    assert two == 2 * one + 2 * (2 * 4096) * 4096


def test_waiting_forward_passes() -> None:
    recipe = load("70b")
    plain, interleaved = Layout(8, 4, 1, 4, 1), Layout(8, 4, 5, 4, 1)
    assert [memory.chunks_in_flight(recipe, plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    # Megatron's interleaved warmup: 2 (p - 1 - stage) + (v - 1) p forward passes before the first backward.
    assert [memory.chunks_in_flight(recipe, interleaved, stage) for stage in (0, 3)] == [23, 17]


def test_the_optimizer_is_spread_over_data_parallel_ranks() -> None:
    recipe = load("7b")
    alone = memory.stage_memory(recipe, Layout(1, 1, 1, 1, 1), 0)
    spread = memory.stage_memory(recipe, Layout(1, 1, 1, 8, 1), 0)
    assert alone.optimizer == 8 * spread.optimizer
    assert alone.weights == spread.weights == 2 * 6_738_415_682
    assert spread.total > spread.weights + spread.gradients + spread.optimizer


def test_a_checkpoint_has_fourteen_bytes_a_parameter() -> None:
    assert memory.checkpoint_bytes(load("7b")) == 14 * 6_738_415_682


def test_recompute_needs_less() -> None:
    recipe = load("70b")
    by_mode = [
        memory.fullest(recipe, Layout(8, 8, 1, 2, 1, mode)).total for mode in ("none", "selective", "full")
    ]
    assert by_mode == sorted(by_mode, reverse=True)
    assert len(set(by_mode)) == 3
