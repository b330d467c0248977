"""Where the plugin's lines go: one logger per module, all below the logger "megatron_dyt".

A module does `_log = logging.getLogger(__name__)` and `_log.info(...)`. Entry points and `register()` call
`show()`, so that the lines stand among Megatron's output, each behind "megatron_dyt: ". A program that wants
them elsewhere, or not at all, gives the logger "megatron_dyt" a handler or a level before that.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

ROOT = "megatron_dyt"
# `_log.warning(..., extra=ALL_RANKS)`: for what the other ranks do not see.
ALL_RANKS = {"all_ranks": True}


def show() -> None:
    """Print the plugin's lines from INFO on, on rank 0; calling it again changes nothing.

    Nothing is changed of a logger "megatron_dyt" that the program has given a handler or a level.
    """
    logger = logging.getLogger(ROOT)
    if not logger.handlers:
        logger.addHandler(_StandardOutput())
        logger.propagate = False  # Megatron's root handler would print each line again.
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


# In a log each report of progress is a line that stays.
_LOG_SECONDS = 5.0


def progress_bar(what: str, total: float, unit: str) -> tqdm[Any]:
    """A bar of `total` units (0 where unknown) on stderr, for a `with` block; nothing for what ends at once.

    Like the lines it is rank 0's alone. On a terminal it is drawn in place and vanishes at the end; in a log
    a line is added every few seconds.
    """
    from tqdm import tqdm

    in_place = sys.stderr.isatty()
    seconds = 0.1 if in_place else _LOG_SECONDS
    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    return tqdm(
        desc=what,
        total=total or None,
        unit=unit,
        unit_scale=True,
        mininterval=seconds,
        miniters=1,
        delay=seconds,
        bar_format=None if in_place else line,
        leave=False,
        disable=_rank() != 0,
    )


class _StandardOutput(logging.StreamHandler[Any]):
    """Writes to what `sys.stdout` is when a line comes (it may be redirected meanwhile); errors to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(_is_for_this_rank)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        rank = _rank()
        where = f" [rank {rank}]" if rank else ""
        level = "WARNING: " if record.levelno == logging.WARNING else ""
        return f"{ROOT}{where}: {level}{super().format(record)}"


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    return _rank() == 0 or getattr(record, "all_ranks", False)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)
