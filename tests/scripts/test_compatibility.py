"""The compatibility page: it is what its data says, and its data is what the tests said."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import compatibility

EQUIVALENCE = "tests/distributed/test_equivalence.py::test_two_processes"


def record(version: str, outcomes: dict[str, str], reasons: dict[str, str] | None = None) -> dict[str, Any]:
    head = {"torch": "2", "python": "3", "device": "CPU", "date": "2026-01-01", "commit": "abc"}
    return {"megatron": version, "outcomes": outcomes, "reasons": reasons or {}} | head


@pytest.fixture
def results(tmp_path: Path) -> Path:
    old = {f"{EQUIVALENCE}[dense-tp2]": "failed", "tests/mcore/test_norm.py::test_a": "passed"}
    new = {
        f"{EQUIVALENCE}[dense-tp2]": "passed",
        f"{EQUIVALENCE}[moe-ep2]": "passed",
        f"{EQUIVALENCE}[NOTSET]": "skipped",
        "tests/distributed/test_families.py::test_gradients_and_loss_are_those_of_one_process"
        "[family-t5-tp2_sp]": "skipped",
        "tests/mcore/test_limits.py::test_refused[mla]": "passed",
        "tests/mcore/test_limits.py::test_refused[l2]": "failed",
        "tests/test_atomic.py::test_elsewhere": "passed",
    }
    for version, outcomes in (("0.9.1", old), ("0.19.2", new)):
        reasons = {test: "no GPU" for test, outcome in outcomes.items() if outcome == "skipped"}
        (tmp_path / f"{version}.json").write_text(json.dumps(record(version, outcomes, reasons)))
    return tmp_path


def test_rows_come_from_the_names_of_the_tests(results: Path) -> None:
    page = compatibility.render(compatibility.collect(results)).splitlines()
    assert "| family | layout | 0.9.1 | 0.19.2 |" in page
    assert "| dense | tp2 | **fails** | yes |" in page
    assert "| moe | ep2 |  | yes |" in page
    assert "| t5 | tp2_sp |  | skipped |" in page
    assert "| combinations that are refused |  | 1 of 2 |" in page
    assert "| other unit tests of what touches Megatron | 1 of 1 |  |" in page
    assert not [line for line in page if "NOTSET" in line]
    assert "| 0.19.2 | no GPU | 2 |" in page


def test_without_results_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no results; run `make test`"):
        compatibility.collect(tmp_path)


def test_the_committed_page_is_that_of_the_committed_data() -> None:
    data = json.loads(compatibility.DATA.read_text(encoding="utf-8"))
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.render(data)
    assert not [run for run in data["runs"] if "failed" in run["parallel"].values()]
