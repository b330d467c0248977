"""The CPU runtime, on for one test."""

from collections.abc import Iterator

import pytest

from megatron_dyt import cpu


@pytest.fixture
def runtime() -> Iterator[None]:
    cpu.enable()
    yield
    cpu.disable()
