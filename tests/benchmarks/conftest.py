"""Benchmarks can be imported, each other included, as scripts of one directory; a world on the CPU."""

from pathlib import Path

import pytest

from tests.mcore.conftest import world  # noqa: F401

DIRECTORY = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DIRECTORY))
