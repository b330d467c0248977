"""The summary of the paper's tasks: which figure of each, the means, Table 4."""

import re
from argparse import Namespace
from typing import Any

import pytest

from megatron_dyt.evaluation import paper
from megatron_dyt.evaluation.paper import TASKS

SEVEN = Namespace(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, normalization="DyT")


def results() -> dict[str, dict[str, Any]]:
    """Each figure another value: the first 0.01, the next 0.02, ..."""
    values = iter(range(1, 100))
    found: dict[str, dict[str, Any]] = {"some_other": {"acc,none": 1.0}}
    for name, task in TASKS.items():
        metrics = {f"{metric},none": next(values) / 100 for metric in (task.metric, *task.others)}
        found[name] = {"alias": name, **metrics, f"{task.metric}_stderr,none": 0.005}
    return found


def test_means() -> None:
    given = results()
    summary = paper.summary(given, SEVEN)
    assert summary is not None
    chosen = [given[name][f"{TASKS[name].metric},none"] for name in TASKS]
    assert summary["mean"] == pytest.approx(sum(chosen) / 15)
    assert summary["figures"] == 21
    assert summary["mean_of_all_figures"] == pytest.approx(sum(range(1, 22)) / 21 / 100)
    assert summary["tasks"]["arc_easy"]["metric"] == "acc_norm"
    assert summary["tasks"]["record"] == {
        "metric": "em",
        "value": given["record"]["em,none"],
        "stderr": 0.005,
        "others": {"f1": given["record"]["f1,none"]},
    }


def test_table_4() -> None:
    assert paper.table_4() == {
        "7b": {"RMSNorm": 0.513, "DyT": 0.513},
        "13b": {"RMSNorm": 0.529, "DyT": 0.529},
        "34b": {"RMSNorm": 0.536, "DyT": 0.536},
        "70b": {"RMSNorm": 0.549, "DyT": 0.549},
    }


def test_beside_the_row_of_its_size() -> None:
    summary = paper.summary(results(), SEVEN)
    assert summary is not None
    assert summary["paper"]["size"] == "7b"
    assert summary["paper"]["mean"] == 0.513
    shown = paper.format_summary(summary, "DyT", "0.4.13", None)
    means = f"{summary['mean']:.3f} / {summary['mean_of_all_figures']:.3f}"
    assert re.search(rf"\| 7b +\| 0.513 +\| 0.513 +\| DyT {means} +\|", shown)
    assert "not comparable" not in shown
    assert "first 3 documents" in paper.format_summary(summary, "DyT", "0.4.13", 3)


def test_of_another_size() -> None:
    summary = paper.summary(results(), Namespace(**vars(SEVEN) | {"num_layers": 4}))
    assert summary is not None
    assert summary["paper"]["size"] is None
    assert "| of another size" in paper.format_summary(summary, "DyT", "0.4.13", None)


def test_not_all_tasks() -> None:
    given = results()
    del given["wic"]
    assert paper.summary(given, SEVEN) is None
