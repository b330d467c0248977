"""Input checked before training starts, so that what is wrong is said at once and clearly."""

from __future__ import annotations

from typing import Any


def check(args: Any) -> None:
    """Raise `UserError` for data that cannot be read."""
