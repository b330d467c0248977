"""Files that are either whole or absent."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError, describe


def partial_path(path: Path) -> Path:
    """Where `path` is written before it takes its name; in the same directory, for os.replace."""
    return path.with_name(path.name + ".partial")


@contextmanager
def whole_files(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield temporary paths that become `paths` when the block ends well, and vanish when it fails.

    The renames happen one after the other: where several files belong together, write a manifest
    after the block and remove the old one before it.
    """
    targets = list(paths)
    partials = [partial_path(path) for path in targets]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partials
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, leaving an equal file (and its time stamp) as it is."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with whole_files([path]) as (partial,):
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_text(path: Path) -> str:
    """The UTF-8 text in the file `path` of --text; `UserError` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read as UTF-8 text ({describe(error)})") from error


def read_json(path: Path) -> Any:
    """The value in `path`, or None where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path` during the block, by a lock on its temporary file.

    Raises:
        UserError: another process is writing it.
    """
    # Of the temporary file itself, so that nothing is left of the lock when the file takes its name. It is
    # the data of whoever holds the lock: filelock's releases up to 3.29 empty it before they try to lock it.
    with locked(partial_path(path), f"{path} is being written by another process; wait for it, or stop it"):
        yield


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made where there is none, during the block.

    Raises:
        UserError: another process holds it; the message is `refusal`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, refusal)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, refusal: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(refusal) from error
    except OSError as error:
        # A file system without locks: as if nobody else were there.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
