"""How pytest processes (`pytest -n 2`, pytest-xdist) share the tests: one of them runs a folder, in order.

So fixtures of a folder are made once. The folders that start ranks share their launches and are one group.
What takes longest is handed out first, so that both have something to do to the end.
"""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

LAUNCHES = ("tests/distributed/", "tests/faults/")
# By measured time. The cluster's tests mostly wait: they go well beside the launches, which fill all cores.
LONG = ("slurm", "mcore", "evaluation", "end_to_end", "examples", "data", "ops")


def group(nodeid: str) -> str:
    """What one process runs: "tests/ops" of tests/ops/test_dyt.py; the file itself where it is in none."""
    if nodeid.startswith(LAUNCHES):
        return "launches"
    return "/".join(nodeid.split("::")[0].split("/")[:2])


ORDER = {name: place for place, name in enumerate(["launches", *(f"tests/{folder}" for folder in LONG)])}


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests as the groups are to be handed out; a group keeps its order."""
    items.sort(key=lambda item: ORDER.get(group(item.nodeid), len(ORDER)))


class ByFolder(LoadScopeScheduling):
    """Hands out the groups whole, in the order of their tests."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # By default the group of the most tests comes first.
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
