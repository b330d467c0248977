"""Writing Megatron's indexed dataset: PREFIX.bin, the ids, and PREFIX.idx, where each document is.

Megatron's own builder keeps three Python lists of all documents until the end, and importing it takes a
process 0.7 GB; a worker is to do with less. The format is that of megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

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
_BLOCK = 1 << 20


class IndexedDatasetWriter:
    """Writes documents of one sequence each; memory does not grow with their number.

    Args:
        data, index: the two files.
        dtype: of the ids: uint16 or int32.
    """

    def __init__(self, data: Path, index: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.digest = hashlib.sha256()
        self.data = data.open("wb")
        self.index_path = index
        self.index = index.open("w+b")
        # The lengths come first in the index: they are written as they come, the counts at the end.
        self.index.write(self._header())

    def _header(self) -> bytes:
        code = DTYPE_CODES[self.dtype.name]
        return HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1)

    def add(self, ids: Ids, lengths: Integers) -> None:
        """Append documents: the ids of all of them, and how many each has."""
        data = ids.astype(self.dtype, copy=False).tobytes()
        self.data.write(data)
        self.digest.update(data)
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
        lengths = np.memmap(self.index_path, "<i4", "r", HEADER.size, (self.documents,))
        self.index.seek(0, os.SEEK_END)
        offset = 0
        for start in range(0, self.documents, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype("<i8") * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            self.index.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        for start in range(0, self.documents + 1, _BLOCK):
            self.index.write(np.arange(start, min(start + _BLOCK, self.documents + 1), dtype="<i8").tobytes())

    def close(self) -> None:
        """Close the files, whether they are finished or not."""
        try:
            self.data.close()
        finally:
            self.index.close()
