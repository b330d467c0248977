"""What all benchmarks share: the order of turns, summaries, reports, pictures, and the tables in docs."""

import importlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def report() -> dict[str, Any]:
    """A result of cpu_norms whose medians are known: DyT 30 us + 40 us, RMSNorm 20 us + 80 us."""
    common = importlib.import_module("common_report")

    def times(*medians: float) -> dict[str, dict[str, float]]:
        keys = ("median_us", "quartile1_us", "quartile3_us", "min_us")
        names = ("forward", "backward", "both", "CPU time")
        phases = zip(names, (*medians, sum(medians), 2 * medians[0]), strict=True)
        return {phase: dict.fromkeys(keys, value) for phase, value in phases}

    found = common.new_report("cpu_norms", "cpu", {"rounds": 3})
    layers = {"dyt": times(30, 40), "rmsnorm": times(20, 80)}
    found["results"] = [{"tokens": 8, "hidden": 64, "threads": 1, "layers": layers}]
    return found


def test_every_contestant_has_a_turn_a_round_in_changing_order() -> None:
    timing = importlib.import_module("common_timing")
    turns = list(timing.in_turn({"a": 1, "b": 2, "c": 3}, rounds=20, warm_up=2))
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 22
    assert all({name: value for name, value, _ in each} == {"a": 1, "b": 2, "c": 3} for each in rounds)
    assert [counts for _, _, counts in turns] == [False] * 6 + [True] * 60
    # None follows the same other one always.
    before_a = {turns[i - 1][0] for i in range(1, len(turns)) if turns[i][0] == "a"}
    assert before_a >= {"b", "c"}
    assert len({each[0][0] for each in rounds}) == 3


def test_summary_is_in_microseconds() -> None:
    timing = importlib.import_module("common_timing")
    found = timing.summary([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6, 700e-6])
    assert found["median_us"] == pytest.approx(4)
    assert found["min_us"] == pytest.approx(1)
    assert found["quartile1_us"] == pytest.approx(2)
    assert found["quartile3_us"] == pytest.approx(6)


def test_a_report_names_hardware_versions_and_commit(report: dict[str, Any]) -> None:
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["hardware"]["kind"] == "cpu"
    assert report["hardware"]["processors"] >= 1
    assert report["commit"] == "" or len(report["commit"]) == 40


def test_saved_under_benchmark_device_and_date(report: dict[str, Any], tmp_path: Path) -> None:
    common = importlib.import_module("common_report")
    report["hardware"]["name"] = "NVIDIA H200 (141 GB)"
    report["date"] = "2026-01-02 03:04 UTC"
    common.save(report, "<svg/>", tmp_path)
    path = tmp_path / "cpu_norms-nvidia-h200-141-gb-2026-01-02.json"
    assert json.loads(path.read_text()) == report
    assert path.with_suffix(".svg").read_text() == "<svg/>"


def test_bars_are_as_long_as_their_values() -> None:
    picture = importlib.import_module("common_picture")
    bars = [picture.Bar("a < b", 1.0, 0.9, 1.1), picture.Bar("far", 2.0, 1.5, 90.0)]
    root = ET.fromstring(picture.bars_svg("title", "axis", [("group", bars)], reference=1.0).encode())
    space = "{http://www.w3.org/2000/svg}"
    filled = [p for p in root.iter(f"{space}path") if p.get("style", "") == "fill: var(--blue)"]
    shapes = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", p.get("d", ""))] for p in filled]
    near, far = (max(xs) - min(xs) for xs in shapes)
    assert far == pytest.approx(2 * near, rel=1e-3)
    texts = [t.text for t in root.iter(f"{space}text")]
    assert {"a < b", "1.00", "2.00", "group"} <= set(texts)
    # The quartile at 90 ends at the border.
    width = float(root.get("viewBox", "").split()[2])
    paths = [p.get("d", "") for p in root.iter(f"{space}path")]
    assert max(float(x) for d in paths for x in re.findall(r"[ML] ([\d.]+)", d)) <= width


def test_cpu_table_has_dyt_over_rmsnorm(report: dict[str, Any]) -> None:
    norms = importlib.import_module("cpu_norms")
    assert norms.table(report).splitlines()[-1] == "| 8 x 64 | 1 | 100 | 70 | 1.50 | 0.50 | 0.70 | 1.50 |"
    assert ">1.50<" in norms.picture(report)


def test_docs_get_the_newest_result_of_each_kind(report: dict[str, Any], tmp_path: Path) -> None:
    run, common = (importlib.import_module(name) for name in ("run", "common_report"))
    old = report | {"date": "2025-01-01 00:00 UTC", "commit": "a" * 40}
    new = report | {"date": "2025-02-01 00:00 UTC", "commit": "b" * 40, "left_out": {"te": "not installed"}}
    for each in (new, old):
        common.save(each, "<svg/>", tmp_path / "results")
    text = (
        "before\n<!-- results: cpu_norms on cpu -->\nnothing\n<!-- end -->\nbetween\n"
        "<!-- results: kernels on cuda -->\nNot yet measured.\n<!-- end -->\nafter\n"
    )
    docs = tmp_path / "docs" / "benchmarks.md"
    filled = run.fill(text, run.newest(tmp_path / "results"), docs)
    assert "commit bbbbbbbbbbbb" in filled
    assert "aaaa" not in filled
    assert "left out: te (not installed)" in filled
    assert "| 8 x 64 | 1 | 100 | 70 |" in filled
    assert "](../results/cpu_norms-" in filled
    assert "nothing" not in filled
    assert "kernels on cuda -->\nNot yet measured.\n<!-- end -->\nafter\n" in filled
    assert run.fill(filled, run.newest(tmp_path / "results"), docs) == filled


def test_docs_have_a_place_for_every_benchmark() -> None:
    run = importlib.import_module("run")
    text = run.DOCS.read_text()
    names = [f"{name} on cpu" for name in run.ON_CPU] + [f"{name} on cuda" for name in run.ON_GPU]
    for name in names:
        assert text.count(f"<!-- results: {name} -->\n") == 1, name


def test_cpu_norms_measures_every_layer() -> None:
    norms = importlib.import_module("cpu_norms")
    found = norms.measure(4, 8, torch.float32, rounds=2)
    assert found.keys() == norms.make_layers(8, torch.float32).keys()
    for phases in found.values():
        assert all(phases[phase]["min_us"] > 0 for phase in norms.PHASES)
        assert phases["both"]["min_us"] >= phases["forward"]["min_us"]
        assert phases[norms.CPU_TIME]["min_us"] > 0
