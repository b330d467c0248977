"""What is written is what Megatron's own builder writes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dyt.data import indexed_dataset
from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_equal_to_megatrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.generic]
) -> None:
    monkeypatch.setattr(indexed_dataset, "_DOCUMENTS", 3)
    documents = [np.arange(size, dtype=dtype) + 60_000 for size in (1, 5, 2, 700, 3, 1, 9)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document.astype(np.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    with IndexedDatasetWriter(tmp_path / "ours.bin", tmp_path / "ours.idx", dtype) as writer:
        for some in (documents[:4], [], documents[4:]):
            ids = np.concatenate(some) if some else np.empty(0, dtype)
            writer.add(ids, np.array([len(document) for document in some], np.int64))
        writer.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    assert writer.sha256() == hashlib.sha256((tmp_path / "ours.bin").read_bytes()).hexdigest()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == [each.tolist() for each in documents]
