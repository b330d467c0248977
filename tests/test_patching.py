"""Replacements come and go in any order and leave nothing behind."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from megatron_dyt.patching import Patches, Replacement, wrapper


class Parent:
    def greet(self) -> str:
        return "parent"


class Child(Parent):
    pass


@pytest.fixture
def target() -> Iterator[Any]:
    module = ModuleType("patched_module")
    module.answer = lambda: "original"  # type: ignore[attr-defined]
    module.Child = Child  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def wrapped(mark: str) -> Callable[[Any], Any]:
    return lambda original: lambda *args: f"{mark}({original(*args)})"


def row(attribute: str, mark: str) -> Replacement:
    return Replacement("patched_module", attribute, wrapped(mark))


@pytest.mark.parametrize("first_away", ["a", "b"])
def test_two_tables_on_one_attribute_in_any_order(target: Any, first_away: str) -> None:
    original = target.answer
    tables = {"a": Patches(), "b": Patches()}
    for mark, table in tables.items():
        table.apply([row("answer", mark)])
    assert target.answer() == "b(a(original))"
    tables.pop(first_away).undo()
    (left,) = tables
    assert target.answer() == f"{left}(original)"
    tables[left].undo()
    assert target.answer is original


def test_an_inherited_method_is_inherited_again(target: Any) -> None:
    table = Patches()
    table.apply([row("Child.greet", "x")])
    assert Child().greet() == "x(parent)"
    table.undo()
    assert "greet" not in vars(Child)
    assert Child().greet() == "parent"


def test_a_missing_attribute_is_named_and_nothing_stays(target: Any) -> None:
    original = target.answer
    with pytest.raises(RuntimeError, match=r"patched_module\.nothing does not exist"):
        Patches().apply([row("answer", "x"), row("nothing", "x")])
    assert target.answer is original


@wrapper
def twice(original: Callable[[str], str], word: str, *, between: str = " ") -> str:
    return original(word) + between + original(word)


def test_a_wrapper_is_called_with_the_original_and_looks_like_it(target: Any) -> None:
    def answer(word: str) -> str:
        return word.upper()

    target.answer = answer
    table = Patches()
    table.apply([Replacement("patched_module", "answer", twice)])
    assert target.answer("yes", between="-") == "YES-YES"
    assert (target.answer.__name__, twice.__name__) == ("answer", "twice")
