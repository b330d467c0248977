"""A directory that is complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_dyt.atomic import partial_path
from megatron_dyt.errors import UserError


def check_free(flag: str, directory: Path) -> None:
    """Raise UserError unless `directory` (given with `flag`) does not exist or is empty."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        kind = "is a directory that is not empty" if directory.is_dir() else "exists"
        raise UserError(f"{flag} {directory} {kind}; give a new directory, or remove it first")


def check_space(flag: str, directory: Path, needed: int) -> None:
    """Raise UserError unless the file system of `directory` has `needed` bytes free."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{flag} {directory}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there. "
            "Free space, or write elsewhere"
        )


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `directory` that takes its name when the block ends well.

    It vanishes when the block fails; what a killed process left of it is removed by the next one.
    """
    partial = partial_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # Replaces an empty directory.
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
