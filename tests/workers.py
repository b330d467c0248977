"""How two pytest processes (`pytest -n 2`, pytest-xdist) share the tests.

One has those that start processes, which share their launches; the other has the rest. Each of the two
groups runs in one process and in its usual order, so a run is the same every time.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

LAUNCHES = ("tests/distributed/", "tests/faults/")


class TwoGroups(LoadScopeScheduling):
    """Hands out the groups whole."""

    def _split_scope(self, nodeid: str) -> str:
        return "launches" if nodeid.startswith(LAUNCHES) else "rest"
