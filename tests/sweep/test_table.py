"""A table of made-up runs: cells, the best of an axis, differences paired by seed; and its figures."""

import re
from pathlib import Path

import pytest

from megatron_dyt.sweep import plots, table
from megatron_dyt.sweep.outcome import Outcome, Status
from megatron_dyt.sweep.spec import Compare, Plot, Run, Seed, Sweep


def run(seed: int, **point: str) -> Run:
    return Run(point, Seed(seed, seed), ())


def outcome(loss: float | None, status: Status = "finished") -> Outcome:
    return Outcome(status, 4, loss, loss, 0.1, 512, 1.0)


# norm, lr, seed -> loss; rmsnorm is best at 1e-2, dyt at 1e-3 because 1e-2 diverges with one seed.
LOSSES = {
    ("rmsnorm", "1e-3", 1): 3.2,
    ("rmsnorm", "1e-3", 2): 3.4,
    ("rmsnorm", "1e-2", 1): 3.0,
    ("rmsnorm", "1e-2", 2): 3.1,
    ("dyt", "1e-3", 1): 3.05,
    ("dyt", "1e-3", 2): 3.25,
    ("dyt", "1e-2", 1): 2.9,
    ("dyt", "1e-2", 2): None,
}
RESULTS = {
    run(seed, norm=norm, lr=lr): outcome(loss, "diverged" if loss is None else "finished")
    for (norm, lr, seed), loss in LOSSES.items()
}
SWEEP = Sweep("A title", (), tuple(RESULTS), ("norm", "lr"), Compare("norm", "rmsnorm", "lr"))


def test_a_cell_has_mean_and_spread_and_counts_what_is_no_number() -> None:
    cells = {tuple(cell.point.values()): cell for cell in table.cells(SWEEP, RESULTS)}
    first, last = cells["rmsnorm", "1e-3"], cells["dyt", "1e-2"]
    assert first.loss is not None
    assert (first.loss.mean, first.loss.std) == (pytest.approx(3.3), pytest.approx(0.2 / 2**0.5))
    assert last.loss is not None
    assert (last.loss.mean, last.loss.std, last.diverged) == (2.9, None, 1)
    assert last.difference is not None
    assert (last.difference.count, last.difference.mean) == (1, pytest.approx(-0.1))
    assert first.difference is None


def test_tables_as_files(tmp_path: Path) -> None:
    paths = table.write(tmp_path, SWEEP, RESULTS)
    rows = {path.name: path.read_text().splitlines() for path in paths if path.suffix == ".csv"}
    assert {name: len(lines) for name, lines in rows.items()} == {
        "table.csv": 9,
        "summary.csv": 5,
        "comparisons.csv": 2,
    }
    assert rows["summary.csv"][0] == (
        "norm,lr,seeds,mean,std,low,high,diverged,failed,missing,pairs,difference,half_width"
    )
    assert rows["summary.csv"][4].startswith("dyt,1e-2,1,2.9,,2.9,2.9,1,0,0,1,-0.1")
    assert rows["comparisons.csv"][1].startswith("dyt,,1e-3,1e-2,2,0.0999")


def test_each_is_compared_at_its_best_that_does_not_diverge() -> None:
    (found,) = table.comparisons(SWEEP, RESULTS)
    assert (found.point, found.best, found.baseline_best) == ({"norm": "dyt"}, "1e-3", "1e-2")
    # Of seed 1 0.05, of seed 2 0.15: mean 0.1, std 0.1 / sqrt(2), t 12.7062 of one degree of freedom.
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.1)
    assert found.difference.half_width == pytest.approx(12.706205 * 0.05)


def test_without_a_best_each_place_is_compared() -> None:
    sweep = Sweep("A title", (), SWEEP.runs, SWEEP.axes, Compare("norm", "rmsnorm", None))
    found = {each.point["lr"]: each.difference for each in table.comparisons(sweep, RESULTS)}
    assert found["1e-3"] is not None
    assert found["1e-3"].mean == pytest.approx(-0.15)
    assert found["1e-2"] is not None
    assert (found["1e-2"].count, found["1e-2"].mean) == (1, pytest.approx(-0.1))


def test_a_baseline_without_an_axis_serves_all_its_values() -> None:
    results = {
        run(1, norm="rmsnorm", width="64"): outcome(3.0),
        run(1, norm="rmsnorm", width="128"): outcome(2.0),
        **{
            run(1, norm="dyt", width=width, alpha=alpha): outcome(loss)
            for width, alpha, loss in [("64", "1", 3.1), ("64", "2", 3.2), ("128", "1", 2.5)]
        },
    }
    sweep = Sweep("", (), tuple(results), ("norm", "width", "alpha"), Compare("norm", "rmsnorm", None))
    found = {(e.point["width"], e.point["alpha"]): e.difference for e in table.comparisons(sweep, results)}
    means = {place: difference and round(difference.mean, 6) for place, difference in found.items()}
    assert means == {("64", "1"): 0.1, ("64", "2"): 0.2, ("128", "1"): 0.5}


def test_seeds_that_only_one_has_finished_are_left_out() -> None:
    results = {each: end for each, end in RESULTS.items() if each != run(2, norm="rmsnorm", lr="1e-2")}
    sweep = Sweep("A title", (), SWEEP.runs, SWEEP.axes, Compare("norm", "rmsnorm", None))
    found = {each.point["lr"]: each.difference for each in table.comparisons(sweep, results)}
    assert found["1e-2"] is not None
    assert found["1e-2"].count == 1
    assert found["1e-3"] is not None
    assert found["1e-3"].count == 2


def test_what_it_has_come_to_as_text() -> None:
    lines = table.lines(SWEEP, RESULTS)
    assert lines[0] == "norm rmsnorm lr 1e-3: 3.3000, std 0.1414 (2 seeds)"
    assert lines[3] == "norm dyt lr 1e-2: 2.9000 (1 seeds), 1 diverged"
    assert lines[-1] == ("norm dyt minus rmsnorm at lr 1e-3 and 1e-2: +0.1000 ± 0.6353 (95 %), 2 seeds")


def test_a_line_per_norm(tmp_path: Path) -> None:
    found = plots.panels(SWEEP, RESULTS, Plot("lr", series="norm"))
    assert {name: {x: point.losses for x, point in line.items()} for name, line in found[""].items()} == {
        "rmsnorm": {"1e-3": [3.2, 3.4], "1e-2": [3.0, 3.1]},
        "dyt": {"1e-3": [3.05, 3.25], "1e-2": [2.9]},
    }
    assert found[""]["dyt"]["1e-2"].diverged == 1


def test_another_axis_is_drawn_at_the_best_of_the_one_that_is_minimised(tmp_path: Path) -> None:
    results = {
        run(1, norm="dyt", width=width, depth=depth, lr=lr): outcome(loss)
        for width, depth, lr, loss in [
            ("64", "2", "1e-3", 3.0),
            ("64", "2", "1e-2", 2.9),
            ("128", "2", "1e-3", 2.5),
            ("64", "4", "1e-3", 2.8),
        ]
    }
    sweep = Sweep("", (), tuple(results), ("norm", "width", "depth", "lr"), Compare("norm", "dyt", "lr"))
    found = plots.panels(sweep, results, Plot("width", series="norm"))
    assert {panel: {x: p.losses for x, p in lines["dyt"].items()} for panel, lines in found.items()} == {
        "depth 2": {"64": [2.9], "128": [2.5]},
        "depth 4": {"64": [2.8]},
    }
    assert found["depth 2"]["dyt"]["64"].best == "1e-2"


def test_figures_are_written(tmp_path: Path) -> None:
    figures = (Plot("lr", series="norm"), Plot("lr", y="norm"))
    sweep = Sweep("A title", (), SWEEP.runs, SWEEP.axes, SWEEP.compare, figures)
    paths = plots.write(tmp_path, sweep, RESULTS)
    assert [path.name for path in paths] == ["loss-lr-norm.svg", "heat-lr-norm.svg"]
    text = paths[-1].read_text()
    assert "<title>A title: loss by lr and norm</title>" in text
    # The four means, and the note of a run that diverged, in their cells.
    assert set(re.findall(r">(\d\.\d{3})<", text)) == {"3.300", "3.050", "3.150", "2.900"}
    assert ">1 diverged<" in text


def test_numbers_are_placed_by_size_and_words_as_they_come() -> None:
    assert plots._places(["1e-2", "8e-3", "1e-2"]) == {"8e-3": 0.008, "1e-2": 0.01}
    assert plots._places(["tanh", "identity"]) == {"tanh": 0.0, "identity": 1.0}


def test_without_a_finished_run_nothing_is_drawn(tmp_path: Path) -> None:
    sweep = Sweep("", (), SWEEP.runs, SWEEP.axes, None, (Plot("lr"), Plot("lr", y="norm")))
    assert plots.write(tmp_path, sweep, {}) == []
