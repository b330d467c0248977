"""SVG charts: what is drawn is read back from the picture and compared with the data."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from megatron_dyt.report.figures import (
    STYLE,
    Axis,
    Chart,
    Point,
    Series,
    fit_axis,
    legend_html,
    side_by_side,
    smooth,
    spread,
    thin,
)

SVG = "{http://www.w3.org/2000/svg}"


def chart_of(points: list[Point], *, log: bool | None = None, **series: object) -> Chart:
    return Chart(
        "T",
        "D",
        fit_axis("iteration", [x for x, _ in points], log=False),
        fit_axis("loss", [y for _, y in points], log=log),
        [Series("run", points, "c0", label=True, **series)],  # type: ignore[arg-type]
    )


def scale_of(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    """(position, value) of the ticks of one axis, as a reader of the picture takes them."""
    where = {"xtick": "x", "ytick": "y"}[kind]
    shift = {"xtick": 0, "ytick": -4}[kind]  # text baseline below the tick
    return [
        (float(text.attrib[where]) + shift, float(text.text or ""))
        for text in svg.iter(f"{SVG}text")
        if kind in text.attrib["class"].split()
    ]


def read_linear(scale: list[tuple[float, float]], position: float) -> float:
    (p0, v0), (p1, v1) = scale[0], scale[-1]
    return v0 + (position - p0) / (p1 - p0) * (v1 - v0)


def read_log(scale: list[tuple[float, float]], position: float) -> float:
    (p0, v0), (p1, v1) = scale[0], scale[-1]
    return v0 * (v1 / v0) ** ((position - p0) / (p1 - p0))


def polyline(svg: ElementTree.Element) -> list[Point]:
    (line,) = svg.iter(f"{SVG}polyline")
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_lies_where_a_linear_scale_puts_it() -> None:
    points = [(0.0, 2.0), (50.0, 2.75), (200.0, 2.5), (300.0, 3.25)]
    svg = ElementTree.fromstring(chart_of(points).svg("a"))
    x, y = scale_of(svg, "xtick"), scale_of(svg, "ytick")
    assert len(x) >= 3
    assert len(y) >= 3
    seen = [(read_linear(x, px), read_linear(y, py)) for px, py in polyline(svg)]
    assert [p[0] for p in seen] == pytest.approx([p[0] for p in points], abs=0.5)
    assert [p[1] for p in seen] == pytest.approx([p[1] for p in points], abs=0.005)


def test_a_line_lies_where_a_logarithmic_scale_puts_it() -> None:
    points = [(1.0, 9.0), (100.0, 4.5), (200.0, 2.25), (300.0, 2.0)]
    chart = chart_of(points)
    assert chart.y.log
    svg = ElementTree.fromstring(chart.svg("a"))
    y = scale_of(svg, "ytick")
    seen = [read_log(y, py) for _, py in polyline(svg)]
    assert seen == pytest.approx([p[1] for p in points], rel=0.003)


def test_larger_values_are_higher_and_further_right() -> None:
    (x0, y0), (x1, y1) = polyline(ElementTree.fromstring(chart_of([(0, 1), (1, 2)]).svg("a")))
    assert x1 > x0
    assert y1 < y0


def test_everything_is_inside_the_picture() -> None:
    points = [(float(i), 10.0 / (i + 1)) for i in range(50)]
    chart = chart_of(points, marker="circle")
    svg = ElementTree.fromstring(chart.svg("a", 360, 260))
    assert all(0 < x < 360 and 0 < y < 260 for x, y in polyline(svg))
    for circle in svg.iter(f"{SVG}circle"):
        assert 0 < float(circle.attrib["cx"]) < 360
        assert 0 < float(circle.attrib["cy"]) < 260


def test_points_outside_of_the_axes_are_left_out() -> None:
    points = [(0.0, 9.0), (10.0, 3.0), (20.0, 2.0)]
    chart = Chart("T", "D", Axis("x", 10, 20), Axis("y", 1, 4), [Series("run", points, "c0")])
    assert len(polyline(ElementTree.fromstring(chart.svg("a")))) == 2


def test_marks_carry_their_value_as_hover_text() -> None:
    svg = ElementTree.fromstring(chart_of([(100.0, 2.5), (1200.0, 3.0)], marker="diamond").svg("a"))
    titles = [t.text for path in svg.iter(f"{SVG}path") for t in path.iter(f"{SVG}title")]
    assert titles == ["run: loss 2.5 at iteration 100", "run: loss 3 at iteration 1,200"]


def test_title_and_description_are_tied_to_the_picture() -> None:
    svg = ElementTree.fromstring(chart_of([(0, 1), (1, 2)]).svg("pic"))
    ids = svg.attrib["aria-labelledby"].split()
    named = {e.attrib["id"]: e.text for e in svg if "id" in e.attrib}
    assert [named[i] for i in ids] == ["T", "D"]
    assert svg.attrib["role"] == "img"


def test_names_are_escaped() -> None:
    name = '<b>&"x"'
    series = Series(name, [(0, 1), (1, 2)], "c0", marker="circle", label=True)
    chart = Chart(name, name, Axis(name, 0, 1), Axis(name, 0, 3), [series])
    svg = ElementTree.fromstring(chart.svg("a", legend=[series]))
    texts = [e.text for e in svg.iter() if e.tag in (f"{SVG}text", f"{SVG}title", f"{SVG}desc")]
    assert texts.count(name) == 8  # title, desc, heading, two axes, legend, line, end label
    assert "<b>" not in legend_html([series])


def test_side_by_side_is_a_file_of_its_own() -> None:
    charts = [chart_of([(0, 1), (1, 2)]), chart_of([(0, 3), (1, 4)])]
    text = side_by_side(charts, "Both", charts[0].series, 880, 340)
    svg = ElementTree.fromstring(text.encode())
    assert svg.attrib["viewBox"] == "0 0 880 340"
    assert (svg.attrib["width"], svg.attrib["height"]) == ("880", "340")
    assert len(list(svg.iter(f"{SVG}polyline"))) == 2
    assert next(svg.iter(f"{SVG}style")).text == STYLE
    assert "href" not in text
    assert "url(" not in text


@pytest.mark.parametrize(
    ("values", "log", "low", "high"),
    [
        ([2.0, 3.0], False, 1.95, 3.05),
        ([1.0, 8.0], True, 8**-0.05, 8 * 8**0.05),
        ([0.0, 8.0], False, -0.4, 8.4),
        ([4.0, 4.0], False, 3.8, 4.2),
        ([0.0], False, -0.5, 0.5),
        ([float("nan"), 2.0, 3.0, float("inf")], False, 1.95, 3.05),
        ([], False, -0.05, 1.05),
    ],
)
def test_fit_axis(values: list[float], log: bool, low: float, high: float) -> None:
    axis = fit_axis("y", values)
    assert axis.log == log
    assert (axis.low, axis.high) == pytest.approx((low, high))


def test_an_axis_runs_from_low_to_high() -> None:
    assert [Axis("x", 2, 8).fraction(v) for v in (2, 5, 8)] == [0, 0.5, 1]
    assert [Axis("x", 2, 8, log=True).fraction(v) for v in (2, 4, 8)] == pytest.approx([0, 0.5, 1])


def test_fit_axis_from_zero_stays_linear() -> None:
    axis = fit_axis("y", [1.0, 100.0], zero=True)
    assert (axis.low, axis.log) == (0.0, False)
    assert axis.high > 100


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis("x", 0, 300), ["0", "100", "200", "300"]),
        (Axis("x", 1.9, 3.1), ["2.00", "2.25", "2.50", "2.75", "3.00"]),
        (Axis("x", 0, 100_000), ["0", "20k", "40k", "60k", "80k", "100k"]),
        (Axis("x", 0, 25e6), ["0", "5M", "10M", "15M", "20M", "25M"]),
        (Axis("x", 0.5, 3.5, integer=True), ["1", "2", "3"]),
        (Axis("x", 1, 10_000, log=True), ["1", "10", "100", "1000", "10000"]),
        (Axis("x", 0.16, 1.2, log=True), ["0.2", "0.3", "0.4", "0.5", "0.6", "0.8", "1"]),
        (Axis("x", 2.1, 2.9, log=True), ["2.2", "2.4", "2.6", "2.8"]),
        (Axis("x", -0.01, 0.011), ["-0.010", "-0.005", "0.000", "0.005", "0.010"]),
    ],
)
def test_tick_labels(axis: Axis, labels: list[str]) -> None:
    assert axis.tick_labels() == labels
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks())


def test_smooth_is_centred() -> None:
    points = [(float(i), 3.0 * i) for i in range(11)]
    assert smooth(points, 4)[:9] == points[:9]
    assert smooth([(0, 1), (1, 5), (2, 3)], 2) == [(0, 1), (1, 3), (2, 4)]
    assert smooth(points, 1) == points


def test_thin_keeps_the_ends() -> None:
    points = [(float(i), 0.0) for i in range(1000)]
    thinned = thin(points, 50)
    assert (len(thinned), thinned[0], thinned[-1]) == (50, points[0], points[-1])
    assert all(20 <= b[0] - a[0] <= 21 for a, b in pairwise(thinned))
    assert thin(points[:3], 50) == points[:3]


def test_spread_separates_labels_and_keeps_them_inside() -> None:
    assert spread([10, 50], 15, 0, 100) == [10, 50]
    assert spread([50, 51, 52], 15, 0, 100) == [50, 65, 80]
    assert spread([95, 96], 15, 0, 100) == [85, 100]


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_both_modes() -> None:
    light, dark = (dict(re.findall(r"--(\w+):(#\w{6})", part)) for part in STYLE.split("@media"))
    for colors in (light, dark):
        for name, color in colors.items():
            if name in ("text", "muted") or name.startswith("c"):
                assert contrast(color, colors["bg"]) >= 4.5, (name, color)
            elif name.startswith("r"):
                assert contrast(color, colors["bg"]) >= 3, (name, color)
