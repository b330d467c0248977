"""Results on disk, so that an evaluation that was killed goes on where it was.

One SQLite file for each checkpoint and tokenizer. Results come in as transactions: a kill at any time
leaves all of those that were complete. One process reads and writes; the others are told.
"""

import contextlib
import functools
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError

# In every file's name: results of another format or meaning are not found.
FORMAT = 1
_LOOKUPS = 500  # SQLite's oldest limit of variables in a statement is 999.


def key_of(*parts: Any) -> str:
    """A name for a request: equal only for equal `parts` (anything that JSON takes)."""
    text = json.dumps(parts, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ResultCache:
    """Values by `key_of` in `directory`, apart for each `identity` (of model and tokenizer).

    The file is opened with the first use. Every method raises `UserError` when it is no database, is
    damaged, or cannot be written.
    """

    def __init__(self, directory: Path, identity: Any) -> None:
        self.path = directory / f"results-{key_of(FORMAT, identity)}.sqlite"

    @functools.cached_property
    def _database(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=60)
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT)")
        return database

    def check(self) -> None:
        """Read the whole file once."""
        with self._clear_errors():
            (verdict,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those `keys` that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        with self._clear_errors():
            for start in range(0, len(wanted), _LOOKUPS):
                some = wanted[start : start + _LOOKUPS]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, value FROM results WHERE key IN ({marks})"
                found |= {key: json.loads(value) for key, value in self._database.execute(query, some)}
        return found

    def put(self, values: dict[str, Any]) -> None:
        """Add `values` in one transaction."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._clear_errors(), self._database as database:
            database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, ValueError) as error:
            raise UserError(
                f"the result cache {self.path} cannot be used ({type(error).__name__}: {error}). Delete the "
                f"file, or choose another directory with --cache"
            ) from error
