"""What the processes of an evaluation must agree on."""

from typing import Any

import pytest

from megatron_dyt import world
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import ranks
from megatron_dyt.evaluation.batches import Item


@pytest.mark.parametrize("same", [True, False])
def test_processes_with_other_requests_do_not_divide_them(
    monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(world, "gather", lambda value, group: [value, value if same else "another"])
    ours: Any = object()
    requests = [Item([1, 2], [3]), Item([4], [5])]
    if same:
        ranks.Ranks(ours).check_same(requests)
    else:
        with pytest.raises(UserError, match=r"different requests.*--task-data.*HF_DATASETS_CACHE"):
            ranks.Ranks(ours).check_same(requests)


def test_what_differs_tells_requests_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(world, "gather", lambda value, group: [seen.append(value)])
    ours: Any = object()
    for requests in ([Item([1], [2])], [Item([1], [3])], [Item([1], [2])]):
        ranks.Ranks(ours).check_same(requests)
    assert seen[0] == seen[2] != seen[1]


def test_one_process_asks_nobody() -> None:
    ranks.Ranks().check_same([Item([1], [2])])
    assert ranks.from_first("value") == "value"
