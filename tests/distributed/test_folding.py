"""DyT folded into column-parallel layers: each rank folds its own part, and the loss stays what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.plain import launch
from tests.ranks import Parent

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("folding_worker.py"))


def test_two_tensor_parallel_ranks_compute_the_same(tmp_path: Path, ranks: Parent) -> None:
    ended = launch(ranks, tmp_path, [[WORKER]] * 2)
    assert [each.code for each in ended] == [0, 0], ended[0].err
    results = [[json.loads(line) for line in re.findall("RESULT (.*)", each.out)] for each in ended]
    assert [len(rank) for rank in results] == [4, 4]
    for result in (*results[0], *results[1]):
        # In front of attention and the MLP of two layers, and of the output layer.
        assert result["norms"] == 5
        assert result["folded"] == pytest.approx(result["plain"], rel=1e-5)
    # With and without sequence parallelism it is one model.
    assert results[0][2]["plain"] == pytest.approx(results[0][0]["plain"], rel=1e-5)
