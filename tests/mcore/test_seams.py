"""What we replace exists in every tested release of Megatron, its training loop included, by a record."""

import json

import pytest

from megatron_dyt import compat
from scripts import seams

RECORD = json.loads(seams.RECORD.read_text())
REMAKE = "make it again: python scripts/seams.py MEGATRON_LM (a clone with the release tags)"


def test_the_record_is_of_the_tested_releases_and_of_all_that_is_replaced() -> None:
    assert list(RECORD["absent"]) == list(compat.TESTED), REMAKE
    assert set(RECORD["names"]) == {f"{module}:{name}" for module, name in seams.everything()}, REMAKE


@pytest.mark.parametrize("release", compat.TESTED)
def test_a_release_has_all_that_is_replaced_in_it(release: str) -> None:
    missing = sorted({":".join(each) for each in seams.needed(release)} & set(RECORD["absent"][release]))
    assert not missing, f"Megatron-LM {release} lacks them: give their rows a condition of compat.SINCE"


def test_the_record_is_true_of_the_installed_release() -> None:
    absent = RECORD["absent"][compat.megatron_version()]
    for key in RECORD["names"]:
        module, name = key.split(":")
        if compat.has_training() or not module.startswith("megatron.training"):
            assert seams.exists(seams.installed, module, name) is (key not in absent), key


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        *[(name, True) for name in ("plain", "Class.method", "alias", "fallback", "set", "typed")],
        *[(name, False) for name in ("nested", "Class.nested", "Other.method", "original")],
    ],
)
def test_an_attribute_is_found_where_its_module_binds_it(attribute: str, expected: bool) -> None:
    source = (
        "def plain():\n    def nested(): pass\n"
        "try:\n    from a import original as alias\nexcept ImportError:\n    fallback = None\n"
        "if plain:\n    class Class:\n        def method(self): pass\n"
        "left, set = 1, 2\ntyped: int = 3\n"
    )
    files = {"megatron/m/__init__.py": source}
    assert seams.exists(files.get, "megatron.m", attribute) is expected
    assert not seams.exists(files.get, "megatron.other", attribute)
