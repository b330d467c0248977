"""The count of what DyT adds, by hand for small cases, and the page that shows it."""

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import Added, Stage, added, layouts, report, stages, worst
from megatron_dyt.config import DyTConfig
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.recipes import load


def test_one_process_hands_nothing_over() -> None:
    assert added(Stage(2, 64)) == Added(2 * 2 + 1 + 1, 0, 0, 0, 0, 0)


def test_every_part_by_hand() -> None:
    # Two layers: four sites, no final one; the embedding scale.
    found = added(Stage(2, 64, last=False), tp=2, pp=2, dp=4)
    assert found == Added(5, 5 * 64 * 4, 5 * 64 * 2, 5 * 4, 8, 1)
    assert found.total == 1280 + 640 + 20 + 8
    plain = added(Stage(2, 64, first=False), dp=4, distributed_optimizer=False)
    assert plain == Added(5, 5 * 4, 0, 0, 8, 1)
    assert added(Stage(1, 64), tp=2, sequence_parallel=False).sequence == 0
    assert added(Stage(1, 64), dp=2, gradient_bytes=2).reduction == 4 * 64 * 2


def test_bias_and_query_norms_are_counted() -> None:
    biased = Stage(1, 100, bias=True, embedding_scale=False)
    assert biased.extra() == [1, 100] * 3
    assert added(biased, dp=2).reduction == 3 * (64 + 128) * 4
    with_qk = Stage(1, 100, qk_norm=True, head_dim=10, bias=True)
    assert with_qk.extra() == [1, 100] * 3 + [1, 10] * 2 + [1]
    assert added(with_qk, tp=2, sequence_parallel=False).sequence == 22 * 4
    assert added(with_qk, tp=2).sequence == (303 + 22 + 1) * 4


@pytest.mark.parametrize("bias", [False, True])
def test_the_lengths_are_those_of_the_module(bias: bool) -> None:
    """DynamicTanh's parameters but the weight, which RMSNorm has too."""
    module = DynamicTanh(64, alpha_init=DyTConfig.unit(64).alpha_attn, bias=bias)
    own = [p.numel() for name, p in module.named_parameters() if name != "weight"]
    assert Stage(1, 64, last=False, embedding_scale=False, bias=bias).extra() == own * 2


@pytest.mark.parametrize("pp", [1, 4, 16])
def test_the_stages_together_are_the_model(pp: int) -> None:
    recipe = load("70b")
    assert sum(len(stage.extra()) for stage in stages(recipe, pp)) == 2 * recipe.num_layers + 2


def test_more_data_parallel_ranks_add_nothing_to_a_rank() -> None:
    recipe = load("70b")
    assert worst(recipe, 8, 8, 2) == worst(recipe, 8, 8, 64)


def test_the_layouts_reach_the_largest_world() -> None:
    recipe = load("70b")
    found = list(layouts(recipe))
    assert max(tp * pp * dp for tp, pp, dp in found) == scaling.MAX_RANKS
    assert {pp for _, pp, _ in found} == {1, 2, 4, 8, 16}
    assert {tp for tp, _, _ in found} == {1, 2, 4, 8}


def test_the_page_has_the_report() -> None:
    assert f"<!-- scaling -->\n{report()}\n<!-- end -->" in scaling.DOCS.read_text(encoding="utf-8")
    assert "| 4096 |" in report()


def test_a_page_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scaling -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(scaling, "DOCS", page)
    scaling.main(["--write"])
    assert page.read_text() == f"before\n<!-- scaling -->\n{report()}\n<!-- end -->\nafter\n"
