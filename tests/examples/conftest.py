"""Data of a test's own in the place of those that packages have."""

from collections.abc import Iterator

import pytest

from tests.examples import made_up


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The domains of examples/beyond_llm read what `made_up` makes."""
    with pytest.MonkeyPatch.context() as patch:
        made_up.install(patch, tmp_path_factory.mktemp("made-up"))
        yield
