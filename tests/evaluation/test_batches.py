"""Rows and batches: every item complete, each token under its own ancestors alone."""

import random

import numpy as np
import pytest

from megatron_dyt.evaluation.batches import (
    Item,
    Row,
    batches_of,
    flat_rows,
    plan_batches,
    shared_rows,
)

LIMIT, WIDTH = 10_000, 1_000


def seen_by(row: Row, slot: int) -> list[tuple[int, int]]:
    """(token, position) of all that `slot` attends to, by position."""
    seen = np.flatnonzero(row.visible()[slot])
    return sorted(((row.tokens[i], row.positions[i]) for i in seen), key=lambda pair: pair[1])


def check(rows: list[Row], items: list[Item]) -> None:
    """Each target is predicted from the very tokens before it, at their positions."""
    found = []
    for row in rows:
        for branch in row.branches:
            item = items[branch.item]
            found.append(branch.item)
            assert len(branch.slots) == len(item.targets)
            for back, slot in enumerate(reversed(branch.slots)):
                before = item.inputs[: len(item.inputs) - back]
                assert seen_by(row, slot) == [(token, i) for i, token in enumerate(before)]
    assert sorted(found) == list(range(len(items)))


def random_items(count: int, seed: int = 0) -> list[Item]:
    """Few tokens, so that beginnings are common at every depth."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        inputs = [draw.randrange(2) for _ in range(draw.randint(1, 12))]
        items.append(Item(inputs, [draw.randrange(2) for _ in range(draw.randint(1, len(inputs)))]))
    return items


def test_flat_rows() -> None:
    items = random_items(20)
    rows = flat_rows(items)
    assert [row.tokens for row in rows] == [item.inputs for item in items]
    assert all(row.is_chain for row in rows)
    check(rows, items)


@pytest.mark.parametrize("limit", [12, 30, LIMIT])
def test_shared_rows(limit: int) -> None:
    items = random_items(200)
    rows = shared_rows(items, limit, WIDTH)
    check(rows, items)
    assert all(len(row) <= limit for row in rows)
    assert sum(map(len, rows)) < sum(len(item.inputs) for item in items) * 0.6


def test_context_is_there_once() -> None:
    context = list(range(100, 150))
    items = [Item([*context, 1, 2], [1, 2, 3]), Item([*context, 1, 5], [1, 5, 6]), Item(context, [7])]
    (row,) = shared_rows(items, LIMIT, WIDTH)
    assert len(row) == 50 + 1 + 2
    assert not row.is_chain
    check([row], items)


def test_answers_of_one_token_leave_a_chain() -> None:
    """yes and no after the same context: one sequence, and plain causal attention."""
    items = [Item([1, 2, 3], [4]), Item([1, 2, 3], [5]), Item([1, 2, 3, 4], [6])]
    (row,) = shared_rows(items, LIMIT, WIDTH)
    assert row.tokens == [1, 2, 3, 4]
    assert row.is_chain
    check([row], items)


def test_what_begins_differently_is_apart() -> None:
    items = [Item([token, 1, 1, 1], [1]) for token in range(5)]
    assert len(shared_rows(items, LIMIT, WIDTH)) == 5


def test_sharing_stops_where_it_costs_more() -> None:
    """One token of 50 in common: rows of their own cost less attention in a narrow model."""
    items = [Item([0, *range(100 * i, 100 * i + 49)], [1]) for i in range(1, 9)]
    narrow, wide = shared_rows(items, LIMIT, 16), shared_rows(items, LIMIT, 100_000)
    assert len(narrow) == 8
    assert len(wide) == 1
    check(wide, items)


def test_longest_common_beginning_counts_from_the_item_before() -> None:
    items = [Item([1, 2, 3, 4, 9], [1]), Item([1, 2], [1]), Item([1, 2, 3, 4, 8], [1])]
    check(shared_rows(items, LIMIT, WIDTH), items)


def test_batches_of_chains_and_trees_are_apart() -> None:
    rows = shared_rows(random_items(60, seed=3), 20, WIDTH)
    assert {row.is_chain for row in rows} == {True, False}
    batches = batches_of(rows, 40)
    for batch in batches:
        assert len({row.is_chain for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)


def test_plan_batches() -> None:
    lengths = [3, 9, 1, 4, 4, 200, 4]
    batches = plan_batches(lengths, 12)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [5] in batches  # Longer than the budget: alone.
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 12
    assert len(batches) == 4
    assert plan_batches([], 12) == []


def test_much_shorter_sequences_start_a_batch() -> None:
    """A few long and many short ones in one batch would be padding for the most part."""
    lengths = [400, 390, 310, 290, 100, 90, 85, 12, 2]
    batches = [[lengths[i] for i in batch] for batch in plan_batches(lengths, 10_000)]
    assert batches == [[400, 390, 310], [290], [100, 90, 85], [12, 2]]
