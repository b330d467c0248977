"""The charts: what they show, that nothing odd stops them, and the two modes of their colours."""

import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_dyt.report import charts, theme
from megatron_dyt.report.charts import ALPHA_STD, Curves
from megatron_dyt.report.dyt_stats import SiteStats, StatsRecord
from tests.report.made_up_runs import site


def record(iteration: int, *sites: dict[str, Any]) -> StatsRecord:
    return StatsRecord(iteration, tuple(SiteStats(**s) for s in sites), None)


def texts(svg: str) -> list[str]:
    return [
        e.text or "" for e in ElementTree.fromstring(svg.encode()).iter("{http://www.w3.org/2000/svg}text")
    ]


def lines(svg: str, color: str) -> int:
    return len(re.findall(rf'style="fill: none; [^"]*stroke: var\(--{color}\)', svg))


CURVES = [
    Curves("rmsnorm", [(1, 9.0), (50, 4.0), (100, 3.0)], [(50, 4.25), (75, 4.0), (100, 3.125)]),
    Curves("dyt", [(1, 9.0), (50, 4.0), (100, 3.0)], [(50, 4.5), (75, 4.0), (100, 3.25)]),
]


def test_losses_of_the_whole_run_and_of_its_second_half() -> None:
    chart = charts.loss_chart(CURVES, "A < B")
    shown = texts(chart.svg)
    for expected in ("Loss", "Loss, second half", "rmsnorm", "dyt", "nats per token, logarithmic scale"):
        assert expected in shown
    assert "Last validation loss: rmsnorm 3.1250; dyt 3.2500." in chart.description
    # Training and validation in two panels, and the legend.
    assert lines(chart.svg, "blue") == lines(chart.svg, "orange") == 2 * 2 + 1


def test_few_losses_have_one_panel() -> None:
    chart = charts.loss_chart([Curves("x", [(1, 3.0), (2, 2.0)], [(2, 2.0)])], "t")
    assert "Loss, second half" not in texts(chart.svg)


def test_a_run_without_finite_losses_has_a_chart_all_the_same() -> None:
    ElementTree.fromstring(charts.loss_chart([Curves("x", [], [])], "t").svg.encode())


@pytest.mark.parametrize("name", ["_hidden", "$a$b", "a<script>&"])
def test_a_legend_shows_any_name_as_it_is(name: str) -> None:
    chart = charts.loss_chart([Curves(name, CURVES[0].train, CURVES[0].validation)], name)
    assert name in [text.removeprefix("\u200b") for text in texts(chart.svg)]


def test_a_long_name_is_cut_in_the_legend_alone() -> None:
    chart = charts.loss_chart([Curves("a" * 40, CURVES[0].train, CURVES[0].validation)], "t")
    assert "a" * 21 + "…" in texts(chart.svg)
    assert "a" * 40 in chart.description


def test_the_same_losses_make_the_same_file() -> None:
    assert charts.loss_chart(CURVES, "t").svg == charts.loss_chart(CURVES, "t").svg


def test_every_color_has_a_light_and_a_dark_value() -> None:
    svg = charts.loss_chart(CURVES, "t").svg
    style = theme.variables()
    assert style in svg
    without_style = svg.replace(style, "")
    assert re.findall("(?:fill|stroke): #", without_style) == []
    for name in set(re.findall(r"var\(--(\w+)\)", without_style)):
        assert style.count(f"--{name}:") == 2


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("mode", [0, 1])
def test_lines_and_text_stand_out_in_both_modes(mode: int) -> None:
    paper = theme.COLORS["paper"][mode]
    for name in ("text", "muted", "blue", "orange", "green", "purple", "brown", "gray"):
        assert contrast(theme.COLORS[name][mode], paper) >= 4.5, name
    ramp = [contrast(theme.COLORS[f"ramp{i}"][mode], paper) for i in range(5)]
    assert ramp == sorted(ramp)
    assert ramp[0] >= 3


def test_alpha_is_compared_with_one_over_std() -> None:
    start = record(1, site("ffn", 1, 0.5, 1.0), site("ffn", 2, 0.5, 2.0))
    end = record(9, site("ffn", 1, 0.75, 4.0), site("ffn", 2, 0.25, 8.0))
    chart = charts.alpha_chart([start, end])
    for expected in (
        "ffn alpha, start: 0.5, 0.5",
        "ffn alpha, end: 0.75, 0.25",
        "ffn 1/std, start: 1, 0.5",
        "ffn 1/std, end: 0.25, 0.125",
    ):
        assert expected in chart.description
    # A panel's two lines and two in the legend.
    assert lines(chart.svg, "orange") == lines(chart.svg, "blue") == 4


def test_a_dead_input_is_left_out() -> None:
    dead = record(1, site("ffn", 1, 0.5, 0.0), site("ffn", 2, 0.5, math.nan))
    assert "ffn 1/std, end: " in charts.alpha_chart([dead]).description + " "
    assert charts.by_layer(dead, [s.name for s in dead.sites], charts.INVERSE_STD) == []


def test_history_follows_each_layer() -> None:
    stats = [record(i, site("attn", 1, 0.5, i), site("attn", 2, 0.5, 2 * i)) for i in (1, 2, 3)]
    first, second = (s.name for s in stats[0].sites)
    assert charts.history(stats, first, ALPHA_STD) == (1, [(1, 0.5), (2, 1.0), (3, 1.5)])
    assert charts.history(stats, second, ALPHA_STD) == (2, [(1, 1.0), (2, 2.0), (3, 3.0)])
    chart = charts.history_chart(stats, ALPHA_STD)
    assert "attn, layer 1: 1.5; attn, layer 2: 3" in chart.description
    assert lines(chart.svg, "ramp0") == lines(chart.svg, "ramp4") == 2  # And the legend.


def test_history_of_a_deep_model_stays_readable() -> None:
    sites = [site("attn", n, 0.5, 1.0, "input_layernorm") for n in range(1, 81)]
    chart = charts.history_chart([record(1, *sites), record(2, *sites)], ALPHA_STD)
    assert chart.description.count("layer ") == 12
    assert [text for text in texts(chart.svg) if text.startswith("layer ")] == ["layer 1", "layer 80"]


def test_sites_of_one_role_in_one_layer_get_panels_of_their_own() -> None:
    sites = [site("qk", n, 1, 1, leaf) for n in (1, 2) for leaf in ("q_layernorm", "k_layernorm")]
    groups = charts.site_groups([record(1, *sites, site("final", 2, 1, 1))])
    assert {key: len(names) for key, names in groups.items()} == {
        "qk (q_layernorm)": 2,
        "qk (k_layernorm)": 2,
        "final": 1,
    }


def test_thin_keeps_both_ends() -> None:
    points = [(float(i), 0.0) for i in range(1000)]
    kept = charts.thin(points, 10)
    assert len(kept) == 10
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert charts.thin(points, 5000) == points


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([4.0, 8.0, 6.0, 2.0], 1, [4.0, 8.0, 6.0, 2.0]),
        # The first keeps its place, the last is a mean of what there is.
        ([4.0, 8.0, 6.0, 2.0], 3, [4.0, 6.0, 16 / 3, 4.0]),
    ],
)
def test_smoothing_is_centred(values: Sequence[float], window: int, expected: Sequence[float]) -> None:
    smoothed = charts.smooth(list(enumerate(values)), window)
    assert [x for x, _ in smoothed] == [0, 1, 2, 3]
    assert [y for _, y in smoothed] == pytest.approx(expected)
