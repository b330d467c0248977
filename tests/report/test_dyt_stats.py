"""Reading dyt_stats.jsonl: broken lines, and the files of several pipeline stages."""

import json
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report import dyt_stats
from tests.report.made_up_runs import site


def stats_line(iteration: int, alpha: float, scale: float | None = 50.0) -> str:
    sites = [site("attn", 1, alpha, 2.0, "input_layernorm") | {"saturated": 0.125}]
    return json.dumps({"iteration": iteration, "sites": sites, "embedding_scale": scale})


def test_stats(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    path.write_text(stats_line(1, 0.5) + "\n" + stats_line(10, 0.25, scale=None) + "\n")
    first, last = dyt_stats.read([path])
    assert (first.iteration, last.iteration) == (1, 10)
    assert (first.embedding_scale, last.embedding_scale) == (50.0, None)
    (found,) = last.sites
    assert (found.name, found.role, found.layer) == ("decoder.layers.0.input_layernorm", "attn", 1)
    assert (found.alpha, found.input_std, found.alpha_std, found.saturated) == (0.25, 2.0, 0.5, 0.125)


def test_broken_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    lines = [
        stats_line(10, 0.5),
        stats_line(15, 0.9)[:50] + stats_line(16, 0.9),  # cut off, then appended to
        stats_line(20, 0.4),
        "[]",
        '{"iteration": 25, "sites": [{"name": "x"}]}',
        stats_line(30, 0.3)[:-20],
    ]
    path.write_text("\n".join(lines))
    assert [(r.iteration, r.sites[0].alpha) for r in dyt_stats.read([path])] == [(10, 0.5), (20, 0.4)]


def test_stats_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "dyt_stats.jsonl"
    with pytest.raises(UserError, match="missing or no file"):
        dyt_stats.read([path])
    path.write_text(stats_line(10, 0.5)[:-5])
    with pytest.raises(UserError, match="no complete record"):
        dyt_stats.read([path])


def stage_line(iteration: int, layers: list[int | None], scale: float | None = None) -> str:
    """A pipeline stage's record: one site a layer, alpha a tenth of the layer's number."""
    sites = [site("attn" if layer else "final", layer, (layer or 9) / 10, 1.0) for layer in layers]
    return json.dumps({"iteration": iteration, "sites": sites, "embedding_scale": scale}) + "\n"


def test_stages_are_put_together(tmp_path: Path) -> None:
    """With virtual stages each file has layers from all over; the last stage ended one record earlier."""
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text("".join(stage_line(i, [1, 3], scale=50.0) for i in (1, 10, 20)))
    last.write_text("".join(stage_line(i, [2, 4, None]) for i in (1, 10)))
    for files in ((first, last), (last, first)):
        records = dyt_stats.read(files)
        assert [record.iteration for record in records] == [1, 10]
        assert [site.layer for site in records[1].sites] == [1, 2, 3, 4, 4]
        assert [site.alpha for site in records[1].sites] == [0.1, 0.2, 0.3, 0.4, 0.9]
        assert [record.embedding_scale for record in records] == [50.0, 50.0]


def test_a_run_resumed_with_other_stages(tmp_path: Path) -> None:
    """Begun on one stage to iteration 20, resumed from 10 on two, which write iteration 20 again."""
    whole = tmp_path / "dyt_stats.jsonl"
    whole.write_text("".join(stage_line(i, [1, 2], scale=1.0) for i in (10, 20)))
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text("".join(stage_line(i, [1], scale=2.0) for i in (20, 30)))
    last.write_text("".join(stage_line(i, [2]) for i in (20, 30)))
    records = dyt_stats.read([whole, first, last])
    assert [(record.iteration, record.embedding_scale) for record in records] == [
        (10, 1.0),
        (20, 2.0),
        (30, 2.0),
    ]
    assert all([site.layer for site in record.sites] == [1, 2] for record in records)


def test_stages_without_a_common_record(tmp_path: Path) -> None:
    first, last = tmp_path / "dyt_stats.stage0.jsonl", tmp_path / "dyt_stats.stage1.jsonl"
    first.write_text(stage_line(1, [1]))
    last.write_text(stage_line(2, [2]))
    with pytest.raises(UserError, match=r"stage0\.jsonl, .*stage1\.jsonl: no complete record"):
        dyt_stats.read([first, last])
