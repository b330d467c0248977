"""Whether a run's report says that DyT works as a straight line, or as a squash."""

from pathlib import Path

import pytest

from megatron_dyt.report.dyt_stats import SiteStats, StatsRecord, work
from megatron_dyt.report.page import write_report
from megatron_dyt.report.runs import load_run


def record(*drives: float, saturated: float = 0.0, roles: str = "attn ffn final") -> StatsRecord:
    names = [role for role in roles.split() for _ in range(len(drives) // len(roles.split()))]
    return StatsRecord(
        200,
        tuple(
            SiteStats(
                f"norm{i}", role, i + 1, alpha=drive / 2, input_std=2.0, alpha_std=drive, saturated=saturated
            )
            for i, (role, drive) in enumerate(zip(names, drives, strict=True))
        ),
        None,
    )


def test_most_sites_decide() -> None:
    found = work(record(0.1, 0.2, 0.9))
    assert found.headline == "At iteration 200 tanh works as a straight line at 2 of 3 sites."
    assert found.by_role[0].startswith("attn: a straight line at 1 of 1; alpha · std 0.1, not linear 0.01%")
    assert found.by_role[2].startswith("final: a straight line at 0 of 1; alpha · std 0.9, not linear 5.8")


@pytest.mark.parametrize(
    ("drives", "saturated", "function", "expected"),
    [
        ((0.5, 0.6, 0.7), 0.0, "tanh", "tanh works as a squash at 3 of 3"),
        ((0.1, 0.1, 0.1), 0.002, "tanh", "tanh works as a squash at 3 of 3"),
        ((0.5, 0.6, 0.7), 0.0, "sigmoid", "sigmoid works as a straight line at 3 of 3"),
        ((9.0, 9.0, 9.0), 0.0, "identity", "identity works as a straight line at 3 of 3"),
    ],
)
def test_function_and_saturation_count(
    drives: tuple[float, ...], saturated: float, function: str, expected: str
) -> None:
    assert expected in work(record(*drives, saturated=saturated), function).headline


def test_the_page_says_it(runs: Path) -> None:
    write_report([load_run("dyt", runs / "dyt")], runs / "out", title="A title")
    assert "tanh works as a" in (runs / "out" / "report.html").read_text()
