from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """An indexed dataset of two documents, written by Megatron itself."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "corpus")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in ([1, 2, 3], [4, 5]):
        builder.add_document(np.array(document, np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
