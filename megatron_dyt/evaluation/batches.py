"""Which tokens go through the model together: rows, and batches of rows.

A row holds one sequence, or several that begin alike, with their common beginnings once. Then it is a
tree, laid out depth first: a mask lets each token see its own ancestors alone, and positions count from
the root, so that every sequence is computed as if it stood alone.
"""

# Dimension letter: S  slots of a row

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# How requests are computed: "shared" where they begin alike, "flat" each alone, "auto" shared if possible.
MODES = ("auto", "shared", "flat")
# Tokens in one forward pass, padding included: two sequences of the recipes' 4,096.
DEFAULT_BATCH_TOKENS = 8192
# Linear layers of a LLaMA cost 24 h² operations per token and layer, attention 4 h for each token seen: as
# much as for 6 h tokens.
_LINEAR_IN_ATTENTION = 6


class Item(NamedTuple):
    """One sequence: `targets` (at least one) are the tokens after the last ones of `inputs`."""

    inputs: list[int]
    targets: list[int]


class Branch(NamedTuple):
    """Where an item is in a row: `slots` are those whose output predicts its targets."""

    item: int
    slots: list[int]


class Row:
    """Tokens of one row of a batch, in slots from 0; `branches` are the items in it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.branches: list[Branch] = []
        self.is_chain = True
        # Each item's own slots (start, end), and the slots before them that it sees: int64, as many as it
        # has tokens in common with those before it.
        self._segments: list[tuple[int, int, np.ndarray]] = []
        # int64, the slots of the item added last, in the order of its inputs.
        self._path = np.arange(0)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, index: int, item: Item, common: int = 0) -> None:
        """Append item `index`, whose first `common` inputs are those of the item added last."""
        start, end = len(self), len(self) + len(item.inputs) - common
        # What goes on after all tokens so far, or adds none, leaves one chain.
        self.is_chain &= start in (common, end)
        before = self._path[:common]
        self._segments.append((start, end, before))
        self._path = np.concatenate([before, np.arange(start, end)])
        self.tokens += item.inputs[common:]
        self.positions += range(common, len(item.inputs))
        self.branches.append(Branch(index, self._path[-len(item.targets) :].tolist()))

    def takes(self, length: int, common: int, limit: int, hidden_size: int) -> bool:
        """Whether a sequence of `length`, `common` of it shared, costs less here than in its own row."""
        new = length - common
        if len(self) + new > limit:
            return False
        saved = _LINEAR_IN_ATTENTION * hidden_size * common + length**2
        return saved > (2 * len(self) + new) * new

    def visible(self) -> np.ndarray:
        """bool [S, S]: what the token of each slot (first index) attends to."""
        seen_SS = np.zeros((len(self), len(self)), dtype=bool)
        for start, end, before in self._segments:
            seen_SS[start:end, before] = True
            seen_SS[start:end, start:end] = np.tri(end - start, dtype=bool)
        return seen_SS


def flat_rows(items: Sequence[Item]) -> list[Row]:
    """A row for each item."""
    rows = []
    for index, item in enumerate(items):
        rows.append(Row())
        rows[-1].add(index, item)
    return rows


def shared_rows(items: Sequence[Item], limit: int, hidden_size: int) -> list[Row]:
    """Items that begin alike together in rows of up to `limit` tokens, where that saves operations.

    In sorted order the item before is the one with the longest common beginning.
    """
    rows: list[Row] = []
    previous: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: items[i].inputs):
        inputs = items[index].inputs
        common = _common_length(previous, inputs)
        if not rows or not rows[-1].takes(len(inputs), common, limit, hidden_size):
            rows.append(Row())
            common = 0
        rows[-1].add(index, items[index], common)
        previous = inputs
    return rows


def _common_length(first: list[int], second: list[int]) -> int:
    for length, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return length
    return min(len(first), len(second))


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Batches of about equally long rows; trees, which need a mask, apart from chains."""
    batches = []
    for is_chain in (False, True):
        chosen = [row for row in rows if row.is_chain == is_chain]
        for batch in plan_batches([len(row) for row in chosen], batch_tokens):
            batches.append([chosen[i] for i in batch])
    return batches


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices of `lengths`, longest first, so that rows times the longest <= `batch_tokens`.

    A sequence longer than `batch_tokens` gets a batch of its own, and much shorter ones a new batch, so
    that padding is a quarter of it at most (16 tokens per row where that is more).
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        is_alike = longest - lengths[index] <= max(longest // 4, 16)
        if batches and is_alike and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
