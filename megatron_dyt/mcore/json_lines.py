"""Files of statistics that a training run appends to: one JSON object per line.

A run never ends by a statistic. A step that is done once more after a resume stands in the file once.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_dyt import log
from megatron_dyt.atomic import write_atomically

_log = logging.getLogger(__name__)


class JsonLines:
    """Appends to the file `path`, whose lines have the `iteration` (training step) that they are of, or none.

    Args:
        resumed_at: the step whose checkpoint this run goes on from; 0 at the start of a run.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self.path = path
        self.resumed_at = resumed_at
        # Whether a line of this process is in the file.
        self.started = False
        self._failed = False

    def append(self, *records: Mapping[str, object]) -> None:
        """Append a line per record. Where that fails, one warning says so, and these lines are missing."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            if self.started or not self._replaces_void(text):
                self._append(text)
            self.started = True
        except OSError as error:
            if not self._failed:
                what = "%s cannot be written (%s); training goes on, and lines will be missing in it"
                _log.warning(what, self.path, error, extra=log.ALL_RANKS)
            self._failed = True

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A full disk may have left half a line.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text if _ends_a_line(self.path) else "\n" + text)

    def _replaces_void(self, text: str) -> bool:
        """Whether there were lines of steps that this run does again, or half a line of one that was killed.

        They move to NAME.abandoned, and `text` is written. Who reads meanwhile sees the file before or after.
        """
        if not self.path.is_file():
            return False
        kept: list[str] = []
        void: list[str] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            (kept if _is_of(line, self.resumed_at) else void).append(line + "\n")
        if void:
            with self.path.with_name(f"{self.path.name}.abandoned").open("a", encoding="utf-8") as file:
                file.writelines(void)
            write_atomically(self.path, "".join([*kept, text]).encode())
        return bool(void)


def _is_of(line: str, last: int) -> bool:
    """Whether a line is whole and of no step after `last`."""
    try:
        return int(json.loads(line).get("iteration", 0)) <= last
    except (ValueError, TypeError, AttributeError):
        return False


def _ends_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
