"""Layouts: what Megatron would refuse is refused, and what is listed can run."""

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import load
from megatron_dyt.recipes.layout import Cluster, Layout, check, faults, possible

CLUSTER = Cluster(nodes=16, gpus_per_node=8, gpu_memory=80e9)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(8, 4, 1, 8, 1), "is 256 GPUs; the cluster has 128"),
        (Layout(16, 1, 1, 8, 1), "TP 16 does not divide the 8 GPUs of a node"),
        (Layout(4, 3, 1, 8, 1), "PP 3 x 1 chunks does not divide 80 layers"),
        (Layout(8, 1, 2, 16, 1), "virtual stages need PP of at least 2"),
        (Layout(4, 2, 1, 16, 3), "DP 16 x micro-batch 3 does not divide the batch of 1024"),
        (Layout(2, 16, 5, 4, 32), "virtual stages need a multiple of PP 16 micro-batches, there are 8"),
    ],
)
def test_what_cannot_run_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(load("70b"), CLUSTER, layout)


def test_what_can_run_passes() -> None:
    check(load("70b"), CLUSTER, Layout(8, 4, 5, 4, 1))


def test_every_listed_layout_uses_the_whole_cluster_and_batch() -> None:
    recipe = load("70b")
    found = list(possible(recipe, CLUSTER))
    assert len(found) > 100
    for layout in found:
        assert faults(recipe, CLUSTER, layout) == []
        assert layout.tp * layout.pp * layout.dp == CLUSTER.gpus
        assert layout.micro_batches(recipe) * layout.dp * layout.micro_batch == 1024


def test_the_bubble_is_that_of_the_interleaved_schedule() -> None:
    recipe = load("70b")
    assert Layout(8, 1, 1, 16, 1).bubble(recipe) == 0.0
    assert Layout(8, 4, 1, 4, 1).bubble(recipe) == pytest.approx(3 / 259)
    assert Layout(8, 4, 5, 4, 1).bubble(recipe) == pytest.approx(3 / (5 * 256 + 3))


def test_flags_name_only_what_is_on() -> None:
    assert "--sequence-parallel" not in Layout(1, 1, 1, 128, 1).flags()
    flags = Layout(4, 2, 5, 16, 2, "full").flags()
    for part in ("--sequence-parallel", "--num-virtual-stages-per-pipeline-rank", "--recompute-granularity"):
        assert part in flags
