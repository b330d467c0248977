"""The compatibility page: it is what its data says, and its data is what the tests said."""

import json
import re
import tomllib
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
    page = compatibility.render(compatibility.collect({}, results, results / "none")).splitlines()
    assert "| family | layout | 0.9.1 | 0.19.2 |" in page
    assert "| dense | tp2 | **fails** | yes |" in page
    assert "| moe | ep2 |  | yes |" in page
    assert "| t5 | tp2_sp |  | skipped |" in page
    assert "| combinations that are refused |  | 1 of 2 |" in page
    assert "| other unit tests of what touches Megatron | 1 of 1 |  |" in page
    assert not [line for line in page if "NOTSET" in line]
    assert "| 0.19.2 | no GPU | 2 |" in page


def test_another_target_s_results_take_the_place_of_skipped_tests(results: Path) -> None:
    skipped = "tests/distributed/test_families.py::test_gradients_and_loss_are_those_of_one_process"
    outcomes = {f"{skipped}[family-t5-tp2_sp]": "passed", "tests/te/test_models.py::test_a": "passed"}
    outcomes["tests/te/test_models.py::test_b"] = "skipped"
    reasons = {"tests/te/test_models.py::test_b": "no layers"}
    (results / "te").mkdir()
    (results / "te/0.19.2.json").write_text(json.dumps(record("0.19.2", outcomes, reasons)))
    page = compatibility.render(compatibility.collect({}, results, results / "none")).splitlines()
    assert "| t5 | tp2_sp |  | yes |" in page
    assert "| models of real Transformer Engine layers, built and saved |  | 1 of 2 |" in page
    assert "| 0.19.2 | no layers | 1 |" in page
    assert "| 0.19.2 | no GPU | 1 |" in page


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """Results of the environment of all newest releases, and of Bridge's."""
    outcomes = {
        "tests/evaluation/test_lm.py::test_a": "passed",
        "tests/evaluation/test_lm.py::test_b": "failed",
        "tests/hf/test_export.py::test_c": "skipped",
        "tests/ops/test_dyt.py::test_d": "passed",
    }
    installed = {"transformers": "99.1", "lm-eval": "9.9", "torch": "98"}
    main = record("0.19.2", outcomes) | {"versions": installed}
    bridge = record("0.19.2", {"tests/test_bridge.py::test_a[real]": "passed"})
    bridge |= {"versions": {"megatron-bridge": "7.7", "transformers": "5.1"}}
    for name, made in (("all", main), ("megatron-bridge", bridge)):
        (tmp_path / "newest" / name).mkdir(parents=True)
        (tmp_path / "newest" / name / "0.19.2.json").write_text(json.dumps(made))
    return tmp_path / "newest"


def test_a_dependency_s_row_counts_the_tests_that_it_concerns(newest: Path) -> None:
    known = {"runs": []}
    page = compatibility.render(compatibility.collect(known, newest / "none", newest)).splitlines()
    pinned = re.search(r"^lm_eval==(.*)$", compatibility.PINS.read_text(), re.MULTILINE)
    assert pinned
    assert f"| lm-eval | {pinned[1]} | 9.9 | abc | tests/evaluation/ | 1 passed, 1 failed |" in page
    rows = [line.split(" | ") for line in page if line.startswith("| transformers")]
    # In the order of TOUCHED, not of the run.
    found = ("99.1", "tests/hf/, tests/evaluation/", "1 passed, 1 failed, 1 skipped |")
    assert [(row[2], row[4], row[5]) for row in rows] == [found]
    assert "| megatron-bridge |  | 7.7 | abc | tests/test_bridge.py | 1 passed |" in page


def test_what_has_no_new_results_stays(results: Path, newest: Path) -> None:
    both = compatibility.collect({}, results, newest)
    assert compatibility.collect(both, results / "none", newest) == both
    assert compatibility.collect(both, results, results / "none") == both


def test_without_results_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="have no results; run `make test`"):
        compatibility.collect({}, tmp_path, tmp_path)


def test_every_dependency_has_its_tests() -> None:
    project = tomllib.loads((compatibility.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # Transformer Engine needs a build, and tools are no part of the product.
    wanted = [project["dependencies"], *(extras[name] for name in extras.keys() - {"te", "docs", "dev"})]
    names = {re.sub(r"[_.]", "-", re.split(r"[^\w.-]", each)[0]) for group in wanted for each in group}
    assert names - {"megatron-dyt"} <= compatibility.TOUCHED.keys()
    paths = compatibility.tests([*compatibility.TOUCHED])
    assert not [path for path in paths if not (compatibility.ROOT / path).exists()]


def test_the_committed_page_is_that_of_the_committed_data() -> None:
    data = json.loads(compatibility.DATA.read_text(encoding="utf-8"))
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.render(data)
    assert not [run for run in data["runs"] if "failed" in run["parallel"].values()]
    assert not [name for name, row in data.get("newest", {}).items() if "failed" in row["outcomes"]]
