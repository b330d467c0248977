"""Megatron's indexed dataset, written and checked: PREFIX.bin, the ids; PREFIX.idx, where each document is.

Megatron's own builder keeps three Python lists of all documents until the end, and importing it takes a
process 0.7 GB; a worker is to do with less. The format is that of megatron/core/datasets/indexed_dataset.py.

Shapes: T tokens and D documents of what is added at a time, or of the whole dataset.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_dyt.data.word_cache import Ids
from megatron_dyt.data.word_table import Integers

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
# Codes of the types that we write.
DTYPE_CODES = {"uint16": 8, "int32": 4}
# Magic, version, type of the ids, sequences, document boundaries.
HEADER = struct.Struct("<9sQBQQ")
# Documents whose place is computed at a time, and ids that are looked at at a time: 8 and 32 MB.
_DOCUMENTS = 1 << 20
_IDS = 1 << 24


class IndexedDatasetWriter:
    """Writes documents of one sequence each, in a `with` block; memory does not grow with their number.

    Args:
        data, index: the two files.
        dtype: of the ids: uint16 or int32.
    """

    def __init__(self, data: Path, index: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self._digest = hashlib.sha256()
        self.data = data.open("wb")
        self.index_path = index
        self.index = index.open("w+b")
        # The lengths come first in the index: they are written as they come, the counts at the end.
        self.index.write(self._header())

    def _header(self) -> bytes:
        code = DTYPE_CODES[self.dtype.name]
        return HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1)

    def add(self, ids: Ids, lengths: Integers) -> None:
        """Append documents: the ids of all of them, (T,), and how many each has, (D,)."""
        data = ids.astype(self.dtype, copy=False).tobytes()
        self.data.write(data)
        self._digest.update(data)
        self.index.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)

    def finish(self) -> None:
        """Write the rest of the index, and make sure that all is on the disk."""
        self.index.flush()
        if self.documents:
            self._write_offsets()
        self.index.seek(0)
        self.index.write(self._header())
        for file in (self.data, self.index):
            file.flush()
            # Some file systems say only here that they are full.
            os.fsync(file.fileno())

    def _write_offsets(self) -> None:
        """Byte offsets of the sequences, then the numbers of the sequences at which documents begin."""
        lengths = np.memmap(self.index_path, "<i4", "r", HEADER.size, (self.documents,))  # (D,)
        self.index.seek(0, os.SEEK_END)
        offset = 0
        for start in range(0, self.documents, _DOCUMENTS):
            sizes = lengths[start : start + _DOCUMENTS].astype("<i8") * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            self.index.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, self.documents + 1, _DOCUMENTS):
            self.index.write(
                np.arange(start, min(start + _DOCUMENTS, self.documents + 1), dtype="<i8").tobytes()
            )

    def sha256(self) -> str:
        """Of the data file, which is hashed as it is written."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, whether they are finished or not."""
        try:
            self.data.close()
        finally:
            self.index.close()


def contradictions(
    data: Path, index: Path, documents: int, tokens: int, dtype_name: str, vocab_size: int
) -> Iterator[str]:
    """Where the files of a dataset contradict each other, or what is said of them."""
    dtype = np.dtype(dtype_name)
    expected = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.name], documents, documents + 1)
    with index.open("rb") as file:
        if file.read(HEADER.size) != expected:
            yield f"{index.name} does not begin as the index of {documents:,} documents of {dtype} does"
            return
    ids: Ids = np.memmap(data, dtype, "r")  # (T,)
    lengths = np.memmap(index, "<i4", "r", HEADER.size, (documents,))  # (D,) tokens per document
    offsets = np.memmap(index, "<i8", "r", HEADER.size + lengths.nbytes, (documents,))  # (D,) bytes
    ends = np.cumsum(lengths, dtype=np.int64)  # (D,) tokens
    if ends[-1] != len(ids) or not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
        yield f"{index.name} does not divide {data.name} into its documents"
        return
    if len(ids) != tokens:
        yield f"{data.name} has {len(ids):,} tokens, its manifest {tokens:,}"
    largest = max(int(ids[start : start + _IDS].max()) for start in range(0, len(ids), _IDS))
    if largest >= vocab_size:
        yield f"{data.name} holds id {largest}, the vocabulary has {vocab_size}"
