"""The bytes of a torch_dist checkpoint against the checksums that are in them.

Each tensor and object of such a checkpoint is a zip archive as `torch.save` writes it, with a CRC-32 of
every record. PyTorch does not look at them when it loads: a flipped bit becomes a wrong weight, silently.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from megatron_dyt.checkpoints.metadata import is_optimizer, read_metadata

_CHUNK = 2**20  # Bytes that are read at once.
_ZIP = b"PK\3\4"
# Megatron's name for what is not sharded (arguments, iteration); before 0.19 it is a file of its own.
_COMMON, _COMMON_FILE = "common_state", "common.pt"


class Item(NamedTuple):
    """A stored tensor shard or object: `length` bytes of `file`, from `offset`."""

    name: str
    file: Path
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}, bytes {self.offset} to {self.offset + self.length} ({self.name})"


def find_damage(directory: Path, wanted: Callable[[str], bool], rank: int = 0, ranks: int = 1) -> str | None:
    """The first damaged item of a checkpoint, with what is wrong with it; None when all are whole.

    Args:
        directory: of one checkpoint (`iter_NNNNNNN`).
        wanted: whether to look at an item, by its key in the checkpoint. Arguments and iteration, which
            every load reads, are looked at always.
        rank, ranks: look at this part of the bytes only, of so many about equal ones.
    """
    items = [item for item in stored_items(directory) if _is_common(item.name) or wanted(item.name)]
    for item in _part(items, rank, ranks):
        reason = _damage(item)
        if reason:
            return f"{item}: {reason}"
    return None


def stored_items(directory: Path) -> list[Item]:
    """All items of a checkpoint by place. Raises what `read_metadata` raises."""
    storage: dict[Any, Any] = read_metadata(directory).storage_data
    items = [
        Item(index.fqn, directory / info.relative_path, info.offset, info.length)
        for index, info in storage.items()
    ]
    common = directory / _COMMON_FILE
    if common.is_file():
        items.append(Item(_COMMON, common, 0, common.stat().st_size))
    return sorted(items, key=lambda item: (item.file, item.offset))


def weights_hash(directory: Path) -> str:
    """A SHA-256 over the checksums that a checkpoint stores of its model tensors, in hexadecimal.

    It reads the ends of the stored archives, not the weights, and compares nothing. A copy of the
    checkpoint elsewhere has the same; one saved at another parallel layout has not.
    """
    digest = hashlib.sha256()
    for item in stored_items(directory):
        if not is_optimizer(item.name):
            digest.update(f"{item.name} {item.length} {_stated_checksums(item)}\n".encode())
    return digest.hexdigest()


def _stated_checksums(item: Item) -> str:
    try:
        with item.file.open("rb") as file:
            archive = cast(IO[bytes], _Slice(file, item.offset, item.length))
            with zipfile.ZipFile(archive) as records:
                return " ".join(str(record.CRC) for record in records.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        # The load will say what is wrong with it.
        return type(error).__name__


def _is_common(name: str) -> bool:
    return name.split("/")[0] == _COMMON


def _part(items: list[Item], rank: int, ranks: int) -> Iterator[Item]:
    total = sum(item.length for item in items)
    before = 0
    for item in items:
        # An empty checkpoint has no bytes to divide.
        if before * ranks // max(total, 1) == rank:
            yield item
        before += item.length


def _damage(item: Item) -> str | None:
    try:
        with item.file.open("rb") as file:
            archive = _Slice(file, item.offset, item.length)
            head = archive.read(len(_ZIP))
            if head != _ZIP:
                return f"it begins with {head!r}, not as torch.save writes"
            archive.seek(0)
            torch._C.PyTorchFileReader(cast(IO[bytes], archive))  # Refuses what torch.load would refuse.
            with zipfile.ZipFile(archive) as records:
                for record in records.infolist():
                    _read_all(records, record)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # PyTorch's text has a paragraph of advice after its first sentence.
        return f"{type(error).__name__}: {str(error).partition('. ')[0].rstrip('.')}"
    return None


def _read_all(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Raises BadZipFile at the end unless the record has the checksum that the archive states."""
    with archive.open(record) as stream:
        while stream.read(_CHUNK):
            pass


class _Slice(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, start + position)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        count = int(self._file.readinto(memoryview(buffer)[:wanted]))
        self._at += count
        return count
