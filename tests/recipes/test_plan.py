"""The chosen layout fits, is about the fastest, and what cannot be planned is refused."""

from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import load
from megatron_dyt.recipes.layout import Cluster
from megatron_dyt.recipes.memory import checkpoint_bytes
from megatron_dyt.recipes.plan import UNSURE, Speeds, days, flops_per_token, ranked

SPEEDS = Speeds()


@pytest.mark.parametrize(
    ("name", "nodes"), [("7b", 64), ("13b", 64), ("34b", 128), ("70b", 128), ("125m", 1)]
)
def test_the_best_plan(name: str, nodes: int) -> None:
    plans = ranked(load(name), Cluster(nodes, 8, 80e9), SPEEDS)
    best = plans[0]
    assert all(plan.fits for plan in plans)
    assert best.step <= (1 + UNSURE) * min(plan.step for plan in plans)
    equal = [plan for plan in plans if plan.step <= (1 + UNSURE) * min(each.step for each in plans)]
    assert best.memory.total == min(plan.memory.total for plan in equal)


def rows_of_the_page() -> list[list[str]]:
    page = Path(__file__).resolve().parents[2] / "docs" / "pretraining.md"
    table = page.read_text().split("## What it costs")[1].split("\n\n")[2]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("row", rows_of_the_page(), ids=lambda row: " ".join(row[:2]))
def test_the_page_has_what_is_planned(row: list[str]) -> None:
    model, gpus, layout, memory, duration, hours, checkpoint = row
    recipe, count = load(model.lower()), int(gpus.replace(",", ""))
    best = ranked(recipe, Cluster(count // 8, 8, 80e9), SPEEDS)[0]
    chunks = f" x {best.layout.vpp} virtual" if best.layout.vpp > 1 else ""
    sizes = (("TP", best.layout.tp, ""), ("PP", best.layout.pp, chunks), ("DP", best.layout.dp, ""))
    assert layout == ", ".join(f"{name} {size}{more}" for name, size, more in sizes if size > 1)
    assert memory == f"{best.memory.total / 1e9:.0f}"
    needed = days(recipe, count, 0.4, SPEEDS.peak)
    assert (duration, hours) == (f"{needed:.1f}", f"{24 * needed * count:,.0f}")
    assert checkpoint == f"{checkpoint_bytes(recipe) / 1e9:.0f} GB"


def test_less_memory_makes_it_split_or_recompute_more() -> None:
    recipe = load("7b")
    large = ranked(recipe, Cluster(1, 8, 140e9), SPEEDS)[0]
    small = ranked(recipe, Cluster(1, 8, 24e9), SPEEDS)[0]
    assert small.memory.total < 24e9 < large.memory.total
    assert small.step > large.step


def test_given_sizes_are_kept() -> None:
    plans = ranked(load("70b"), Cluster(128, 8, 80e9), SPEEDS, {"tp": 8, "micro_batch": 1})
    assert {(plan.layout.tp, plan.layout.micro_batch) for plan in plans} == {(8, 1)}


def test_days_by_hand() -> None:
    recipe = load("7b")
    # 6 FLOPs for each parameter but the embedding's, and causal attention: 6 L s h.
    by_hand = 6 * (recipe.parameters_without_norms - 32000 * 4096) + 6 * 32 * 4096 * 4096
    assert flops_per_token(recipe) == by_hand
    assert days(recipe, 512, 0.4, 989e12) == pytest.approx(
        recipe.tokens * by_hand / (512 * 989e12 * 0.4) / 86400
    )


def test_recomputation_is_paid_for_in_work_and_communication() -> None:
    """By hand for 7B without pipeline: the MLP's matrices, or a third of all, once more."""
    recipe = load("7b")
    given = {"tp": 2, "pp": 1, "micro_batch": 1}
    plans = ranked(recipe, Cluster(64, 8, 1e12), SPEEDS, given)
    none, selective, full = (
        next(plan for plan in plans if plan.layout.recompute == mode)
        for mode in ("none", "selective", "full")
    )
    mlp = 2 * 32 * 3 * 4096 * 11008
    assert selective.compute / none.compute == pytest.approx(1 + mlp / flops_per_token(recipe))
    assert full.compute / none.compute == pytest.approx(4 / 3)
    assert selective.tensor_parallel / none.tensor_parallel == pytest.approx(1.2)
    assert full.tensor_parallel / none.tensor_parallel == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("nodes", "memory", "fixed", "message"),
    [
        (1, 80e9, {}, "does not fit on 1 x 8 GPUs of 80 GB: the leanest layout .* needs .* GB"),
        (7, 80e9, {}, "cannot be laid out on 7 x 8 GPUs"),
        (128, 80e9, {"tp": 3}, "GPUs and --tp 3: TP x PP"),
        (128, 80e9, {"micro_batch": 3}, "GPUs and --micro-batch-size 3: TP x PP"),
        (
            128,
            80e9,
            {"tp": 8, "pp": 3, "vpp": 1, "micro_batch": 1},
            "PP 3 x 1 chunks does not divide 80 layers",
        ),
        (1, 80e9, {"tp": 8, "pp": 4, "vpp": 1, "micro_batch": 1}, "is 32 GPUs; the cluster has 8"),
    ],
)
def test_what_cannot_be_planned(nodes: int, memory: float, fixed: dict[str, int | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranked(load("70b"), Cluster(nodes, 8, memory), SPEEDS, fixed)


def test_a_micro_batch_that_is_given_need_not_be_among_those_that_are_tried() -> None:
    plans = ranked(load("7b"), Cluster(2, 8, 80e9), SPEEDS, {"micro_batch": 16})
    assert {plan.layout.micro_batch for plan in plans} == {16}
