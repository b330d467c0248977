"""How pytest processes (`pytest -n 2`, pytest-xdist) share the tests: one of them runs a folder, in order.

So fixtures of a folder are made once. The folders that start ranks share their launches and take longest:
they are one group, which comes first; what the other process has not got to by then is shared out.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

LAUNCHES = ("tests/distributed/", "tests/faults/")


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests so that the group which takes longest is handed out first; a folder keeps its order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LAUNCHES))


class ByFolder(LoadScopeScheduling):
    """Hands out the groups whole."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(LAUNCHES):
            return "launches"
        # "tests/ops" of tests/ops/test_dyt.py, and the file itself where it is in no folder.
        return "/".join(nodeid.split("::")[0].split("/")[:2])
