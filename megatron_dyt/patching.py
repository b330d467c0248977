"""Attributes replaced for a while, from tables, and put back exactly as they were."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate

_ABSENT = object()


def wrapper[O: Callable[..., Any], **P, R](
    function: Callable[Concatenate[O, P], R],
) -> Callable[[O], Callable[P, R]]:
    """Of a function that takes the original as its first argument, the `make` of a `Replacement`."""

    @functools.wraps(function)
    def make(original: O) -> Callable[P, R]:
        @functools.wraps(original)
        def replaced(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(original, *args, **kwargs)

        return replaced

    return make


def bound(function: Callable[..., Any], *args: object, **kwargs: object) -> inspect.BoundArguments:
    """A call's arguments by their names in `function`: callers give them by place or by name."""
    return _signature(function).bind(*args, **kwargs)


_signature = functools.cache(inspect.signature)


@dataclass(frozen=True)
class Replacement:
    """One row of the table: `module.attribute` becomes `make(original)`.

    `attribute` may be dotted (`Tensor.cuda`). `make` receives what the attribute was. It is called
    again when a replacement below it goes away.
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


@dataclass
class _Slot:
    """One attribute: what it was, and the replacements now stacked on it, oldest first."""

    owner: Any
    name: str
    stored: Any  # What the owner itself held: a class may have inherited the attribute.
    original: Any
    stack: list[Replacement] = field(default_factory=list)

    def rebuild(self) -> None:
        if not self.stack and self.stored is _ABSENT:
            delattr(self.owner, self.name)
            return
        value = self.original if self.stack else self.stored
        for replacement in self.stack:
            value = replacement.make(value)
        setattr(self.owner, self.name, value)


# Two tables may replace the same attribute and go away in any order, so all share the slots.
_slots: dict[tuple[int, str], _Slot] = {}


class Patches:
    """A table of replacements that is applied as a whole and undone as a whole."""

    def __init__(self) -> None:
        self._applied: list[tuple[_Slot, Replacement]] = []

    def apply(self, table: Iterable[Replacement]) -> None:
        """Replace every row's attribute; when one is missing, put all back and raise."""
        try:
            for row in table:
                slot = _slot_of(*row.target())
                slot.stack.append(row)
                self._applied.append((slot, row))
                slot.rebuild()
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Take this table's replacements away; those of other tables stay."""
        while self._applied:
            slot, row = self._applied.pop()
            slot.stack.remove(row)
            slot.rebuild()
            if not slot.stack:
                del _slots[id(slot.owner), slot.name]


@contextlib.contextmanager
def replaced(*table: Replacement) -> Iterator[None]:
    """Within, the attributes of these rows are replaced."""
    patches = Patches()
    patches.apply(table)
    try:
        yield
    finally:
        patches.undo()


def _slot_of(owner: Any, name: str) -> _Slot:
    key = id(owner), name
    if key not in _slots:
        stored = vars(owner).get(name, _ABSENT)
        _slots[key] = _Slot(owner, name, stored, getattr(owner, name))
    return _slots[key]
