"""Attributes replaced for a while, from a table, and put back exactly as they were."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """One row of the table: `module.attribute` becomes `make(original)`.

    `attribute` may be dotted (`Tensor.cuda`). `make` receives what the attribute was.
    """

    module: str
    attribute: str
    make: Callable[[Any], Any]

    def target(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's own name.

        Raises `RuntimeError` naming the attribute when it does not exist: replacing nothing would
        leave a run that fails later and elsewhere.
        """
        owner: Any = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        try:
            for part in path:
                owner = getattr(owner, part)
            getattr(owner, name)
        except AttributeError as error:
            raise RuntimeError(
                f"{self.module}.{self.attribute} does not exist in the installed version, "
                "so it cannot be replaced"
            ) from error
        return owner, name


class Patches:
    """A table of replacements that is applied as a whole and undone as a whole."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def apply(self, table: Iterable[Replacement]) -> None:
        """Replace every row's attribute; when one is missing, put all back and raise."""
        try:
            for row in table:
                owner, name = row.target()
                self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, row.make(getattr(owner, name)))
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back, last replaced first."""
        while self._undo:
            owner, name, original = self._undo.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
