"""The page: well formed, self-contained, with the numbers and the warnings."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report.page import write_report
from megatron_dyt.report.runs import load_run
from tests.report.made_up_runs import read_lines, write_lines

VOID = {"meta", "img"}
SVG = "{http://www.w3.org/2000/svg}"


def report(root: Path, *names: str, title: str = "A title", **allowed: bool) -> dict[str, Any]:
    runs = [load_run(name, root / name, **allowed) for name in names or ("rmsnorm", "dyt")]
    write_report(runs, root / "out", title=title, allow_missing_eval=allowed.get("allow_missing_eval", False))
    results: dict[str, Any] = json.loads((root / "out" / "results.json").read_text())
    return results


class Page(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(" ".join(data.split()))

    def figures(self) -> list[ElementTree.Element]:
        sources = [value or "" for name, value in self.attributes if name == "src"]
        head = "data:image/svg+xml;base64,"
        assert all(source.startswith(head) for source in sources)
        return [ElementTree.fromstring(base64.b64decode(source[len(head) :])) for source in sources]


def page_of(root: Path) -> Page:
    page = Page((root / "out" / "report.html").read_text())
    assert page.open == []
    return page


def test_page_is_well_formed_and_self_contained(runs: Path) -> None:
    report(runs, title="A <i>title</i>")
    page = page_of(runs)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"href", "onclick", "onload", "srcset"}
    assert "A <i>title</i>" in page.text
    assert "http" not in (runs / "out" / "report.html").read_text()


def test_page_follows_light_and_dark_mode(runs: Path) -> None:
    report(runs)
    assert "@media (prefers-color-scheme:dark)" in (runs / "out" / "report.html").read_text()
    for figure in page_of(runs).figures():
        styles = "".join(style.text or "" for style in figure.iter(f"{SVG}style"))
        assert "@media (prefers-color-scheme:dark)" in styles


def test_page_shows_the_numbers(runs: Path) -> None:
    report(runs)
    text = page_of(runs).text
    for expected in ("2.5000", "2.3750", "−0.1250", "25.0%", "35.0%", "+10.0 points", "× 0.75"):
        assert expected in text, expected
    assert "102,400" in text
    assert "torchrun pretrain a<b&c" in text
    assert any("rmsnorm ends at validation loss 2.5000, dyt at 2.3750 (−0.1250)." in t for t in text)


def test_page_has_every_figure_with_a_description(runs: Path) -> None:
    report(runs)
    page = page_of(runs)
    # Loss, alpha, alpha·std, saturation, embedding scale, step time.
    titles = [figure.findtext(f"{SVG}title") for figure in page.figures()]
    assert titles == [
        "A title",
        "alpha by layer",
        "alpha · std of the input",
        "percent saturated (tanh: |alpha·x| > 2)",
        "Embedding scale",
        "Step time",
    ]
    alternatives = [value or "" for name, value in page.attributes if name == "alt"]
    assert "Last validation loss: rmsnorm 2.5000; dyt 2.3750." in alternatives[0]
    assert "attn alpha, end: 0.7, 0.7, 0.7" in alternatives[1]
    assert "dyt: 50.01 to 52" in alternatives[4]


def test_curves_are_the_first_figure_as_a_file(runs: Path) -> None:
    report(runs)
    description = ElementTree.parse(runs / "out" / "curves.svg").findtext(f"{SVG}desc")
    assert description is not None
    assert "rmsnorm 2.5000; dyt 2.3750" in description


def test_names_are_escaped(runs: Path) -> None:
    name = 'a<script>"&'
    (runs / "dyt").rename(runs / name)
    assert name in report(runs, name)
    assert "<script" not in (runs / "out" / "report.html").read_text()
    assert name in page_of(runs).text


def test_many_runs(runs: Path) -> None:
    for i in range(8):
        (runs / f"r{i}").symlink_to(runs / "rmsnorm")
    results = report(runs, *(f"r{i}" for i in range(8)))
    assert all(results[f"r{i}"]["valid_loss"] == 2.5 for i in range(8))
    assert page_of(runs).text.count("same") == 7 * 5


def test_a_run_that_diverged_is_told(runs: Path) -> None:
    path = runs / "dyt" / "checkpoint" / "metrics.jsonl"
    lost = {"losses": {"lm loss": None}}
    lines = read_lines(path)
    lines[-1] |= lost
    lines[5] |= lost | {"skipped_steps": 3, "nan_steps": 2}
    write_lines(path, lines)
    assert report(runs)["dyt"]["valid_loss"] is None
    text = page_of(runs).text
    assert any("dyt at –." in t for t in text)
    assert "dyt: 3 iterations skipped, 2 with loss nan." in text


def test_stale_evaluation_is_pointed_out(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace('"iteration": 200', '"iteration": 150'))
    report(runs)
    assert "dyt: evaluated at iteration 150; its training ends at 200." in page_of(runs).text


def test_without_evaluation_a_dash_stands_for_it(runs: Path) -> None:
    (runs / "rmsnorm" / "eval.json").unlink()
    assert report(runs, allow_missing_eval=True)["dyt"]["bits_per_byte"] == 1.8
    assert "–" in page_of(runs).text


def test_without_statistics_there_is_no_alpha(runs: Path) -> None:
    report(runs, "rmsnorm")
    text = " ".join(page_of(runs).text)
    assert "Embedding scale" not in text
    assert "alpha" not in text


def test_nothing_is_written_when_a_number_is_missing(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace("dyt_next_line", "other"))
    with pytest.raises(UserError):
        report(runs)
    assert not (runs / "out").exists()
