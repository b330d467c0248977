"""The report from files to results.json and the page, on small made-up runs with known numbers."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report.compare import main, parse_runs
from megatron_dyt.report.logs import SiteStats, StatsRecord
from megatron_dyt.report.plots import ALPHA_STD, alpha_charts, history_charts, site_groups
from megatron_dyt.report.runs import load_run

ITERATIONS = [1, *range(10, 201, 10)]
VOID = {"meta"}


def loss_at(iteration: int, final: float) -> float:
    return final + 6 * math.exp(-iteration / 30)


def write_run(
    directory: Path, *, final: float, ms: float, normalization: str, bits: float = 1.8, acc: float = 0.35
) -> Path:
    """A run of 200 iterations of 8 x 64 tokens whose numbers follow from the arguments."""
    (directory / "checkpoint").mkdir(parents=True)
    lines = [
        "------------------------ arguments ------------------------",
        f"  normalization ................................... {normalization}",
        "  seq_length ...................................... 64",
        "  lr .............................................. 0.002",
        "-------------------- end of arguments ---------------------",
    ]
    for i in ITERATIONS:
        # The first two lines are warm-up; the rest alternates around `ms`.
        step = 50 * ms if i <= 10 else ms + (-1) ** (i // 10)
        lines.append(
            f" [2025-11-23 21:00:00.000000] iteration {i:8d}/     200 | consumed samples: {8 * i:12d} |"
            f" elapsed time per iteration (ms): {step:.1f} | learning rate: {1e-5 * i:.6E} |"
            f" global batch size:     8 | lm loss: {loss_at(i, final):.6E} | loss scale: 1.0 |"
            " grad norm: 1.000 | number of skipped iterations:   0 | number of nan iterations:   0 |"
        )
        if i % 50 == 0:
            lines.append(
                f" validation loss at iteration {i} | lm loss value: {loss_at(i, final):.6E} | "
                "lm loss PPL: 1.000000E+00 | "
            )
    lines.append(f" validation loss at iteration 200 on validation set | lm loss value: {final:.6E} | ")
    (directory / "train.log").write_text("\n".join(lines) + "\n")
    evaluation = {
        "results": {
            "dyt_bits_per_byte": {
                "alias": "dyt_bits_per_byte",
                "bits_per_byte,none": bits,
                "bits_per_byte_stderr,none": "N/A",
            },
            "dyt_next_line": {"acc,none": acc, "acc_stderr,none": 0.01},
        },
        "versions": {"lm_eval": "0.4.13", "torch": "9.9.9"},
        "checkpoint": {"path": "x", "iteration": 200},
        "command": f"python -m megatron_dyt.evaluation --load {directory.name}/checkpoint",
        "seconds": 20.5,
    }
    (directory / "eval.json").write_text(json.dumps(evaluation))
    (directory / "run.json").write_text(
        json.dumps({"command": ["torchrun", "pretrain", "a<b&c"], "seconds": 100.0})
    )
    if normalization == "DyT":
        write_stats(directory / "checkpoint" / "dyt_stats.jsonl")
    return directory


def site(role: str, layer: int | None, alpha: float, std: float, leaf: str = "norm") -> dict[str, Any]:
    return {
        "name": f"decoder.layers.{layer - 1}.{leaf}" if layer else f"decoder.{leaf}",
        "role": role,
        "layer": layer,
        "alpha": alpha,
        "input_std": std,
        "alpha_std": alpha * std,
        "saturated": 0.03 * (layer or 3),
    }


def write_stats(path: Path) -> None:
    records = [
        {
            "iteration": i,
            "sites": [
                *(site("attn", n, 0.5 + i / 1000, 1 + i * n / 400, "input") for n in (1, 2, 3)),
                site("final", None, 0.25, 2.0 + i / 100, "final_layernorm"),
            ],
            "embedding_scale": 50 + i / 100,
        }
        for i in ITERATIONS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "rmsnorm", final=2.5, ms=400, normalization="RMSNorm", bits=1.9, acc=0.25)
    write_run(tmp_path / "dyt", final=2.375, ms=300, normalization="DyT")
    return tmp_path


def report(root: Path, *options: str, names: tuple[str, ...] = ("rmsnorm", "dyt")) -> dict[str, Any]:
    chosen = [part for name in names for part in ("--run", f"{name}={root / name}")]
    assert main([*chosen, "--output", str(root / "out"), *options]) == 0
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

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(root: Path) -> Page:
    page = Page((root / "out" / "report.html").read_text())
    assert page.open == []
    return page


def test_results(runs: Path) -> None:
    results = report(runs)
    assert results["rmsnorm"] == {
        "valid_loss": 2.5,
        "bits_per_byte": 1.9,
        "next_line_acc": 0.25,
        "seconds_per_step": pytest.approx(0.4, abs=0.0011),
        "tokens": 200 * 8 * 64,
        "learning_rate": 0.002,
    }
    assert results["dyt"]["valid_loss"] == 2.375
    assert results["dyt"]["bits_per_byte"] == 1.8
    assert results["dyt"]["next_line_acc"] == 0.35
    ratio = results["dyt"]["seconds_per_step"] / results["rmsnorm"]["seconds_per_step"]
    assert results["step_time_ratio"] == pytest.approx(ratio)
    assert ratio == pytest.approx(0.75, abs=0.005)
    assert results["elapsed_seconds"] == 2 * (100.0 + 20.5)
    assert results["versions"]["torch"] == "9.9.9"
    assert results["versions"]["lm-eval"] == "0.4.13"
    assert results["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert results["commands"]["dyt"] == {
        "train": "torchrun pretrain a<b&c",
        "evaluate": "python -m megatron_dyt.evaluation --load dyt/checkpoint",
    }
    assert list(results) == [
        "rmsnorm",
        "dyt",
        "elapsed_seconds",
        "step_time_ratio",
        "versions",
        "commands",
    ]


@pytest.mark.parametrize(
    ("count", "first"),
    [(1, 1), (2, 1), (3, 3), (10, 3), (40, 5)],  # lines in the log, first line past the warm-up
)
def test_warm_up_is_left_out_of_the_step_time(tmp_path: Path, count: int, first: int) -> None:
    directory = write_run(tmp_path / "r", final=2.0, ms=10, normalization="RMSNorm")
    line = (directory / "train.log").read_text().splitlines()[5]
    assert "iteration        1/" in line
    lines = (line.replace("iteration        1/", f"iteration {i}/") for i in range(1, count + 1))
    (directory / "train.log").write_text("\n".join(lines))
    steps = load_run("r", directory).steady_steps()
    assert [at for at, _ in steps] == list(range(first, count + 1))


def test_one_run_has_no_ratio(runs: Path) -> None:
    assert report(runs, names=("dyt",))["step_time_ratio"] is None


def test_given_elapsed_seconds(runs: Path) -> None:
    assert report(runs, "--elapsed-seconds", "77.5")["elapsed_seconds"] == 77.5


def test_elapsed_seconds_from_the_log_without_run_json(runs: Path) -> None:
    (runs / "rmsnorm" / "run.json").unlink()
    results = report(runs, names=("rmsnorm",))
    # Lines 1 and 10 at 20 s, 190 iterations at 0.4 s on average, 20.5 s of evaluation.
    assert results["elapsed_seconds"] == pytest.approx(10 * 20 + 190 * 0.4 + 20.5, abs=0.1)
    assert results["commands"]["rmsnorm"].keys() == {"evaluate"}


def test_versions_that_differ_are_all_named(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace("9.9.9", "9.9.10"))
    assert report(runs)["versions"]["torch"] == "9.9.9 / 9.9.10"


def test_run_json_states_the_learning_rate_first(runs: Path) -> None:
    (runs / "dyt" / "run.json").write_text('{"learning_rate": 0.004}')
    assert report(runs)["dyt"]["learning_rate"] == 0.004


def test_learning_rate_from_the_lines_without_arguments(runs: Path) -> None:
    log = runs / "dyt" / "train.log"
    log.write_text(log.read_text().replace("  lr ...", "  xx ..."))
    assert report(runs)["dyt"]["learning_rate"] == pytest.approx(1e-5 * 200)


def test_page_is_well_formed_and_self_contained(runs: Path) -> None:
    report(runs, "--title", "A <i>title</i>")
    page = page_of(runs)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onclick", "onload"}
    assert "A <i>title</i>" in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in page.attributes:
        if name == "aria-labelledby" and value:
            assert set(value.split()) <= set(ids)
    source = (runs / "out" / "report.html").read_text()
    assert "http" not in source.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_page_shows_the_numbers(runs: Path) -> None:
    report(runs)
    text = page_of(runs).text
    for expected in ("2.5000", "2.3750", "−0.1250", "25.0%", "35.0%", "+10.0 points", "× 0.75"):
        assert expected in text, expected
    assert "102,400" in text
    assert "torchrun pretrain a<b&c" in text
    assert any("rmsnorm ends at validation loss 2.5000, dyt at 2.3750 (−0.1250)." in t for t in text)


def test_every_svg_of_the_page_is_xml(runs: Path) -> None:
    report(runs)
    source = (runs / "out" / "report.html").read_text()
    parts = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in source.split("<svg")[1:]]
    pictures = [ElementTree.fromstring(part) for part in parts]
    # Two of loss, alpha, alpha·std and saturation for two roles, embedding scale, step time.
    assert sum(picture.get("role") == "img" for picture in pictures) == 2 + 3 * 2 + 2


def test_curves_hold_the_validation_losses(runs: Path) -> None:
    report(runs)
    svg = ElementTree.parse(runs / "out" / "curves.svg")
    titles = [e.text for e in svg.iter("{http://www.w3.org/2000/svg}title")]
    label = "nats per token, logarithmic scale"
    assert f"dyt: {label} 2.375 at iteration 200" in titles
    assert f"rmsnorm: {label} {loss_at(50, 2.5):.4g} at iteration 50" in titles
    assert "rmsnorm: nats per token 2.5 at iteration 200" in titles


def test_names_are_escaped_in_page_and_curves(runs: Path) -> None:
    name = 'a<script>"&'
    options = ["--run", f"{name}={runs / 'dyt'}", "--output", str(runs / "out")]
    assert main(options) == 0
    assert "<script" not in (runs / "out" / "report.html").read_text()
    assert name in page_of(runs).text
    ElementTree.parse(runs / "out" / "curves.svg")
    assert name in json.loads((runs / "out" / "results.json").read_text())


def test_many_runs(runs: Path) -> None:
    names = [f"r{i}" for i in range(8)]
    options = [part for name in names for part in ("--run", f"{name}={runs / 'rmsnorm'}")]
    assert main([*options, "--output", str(runs / "out")]) == 0
    results = json.loads((runs / "out" / "results.json").read_text())
    assert all(results[name]["valid_loss"] == 2.5 for name in names)
    assert page_of(runs).text.count("same") == 7 * 5


def test_a_run_that_diverged(runs: Path) -> None:
    log = runs / "dyt" / "train.log"
    lines = (
        log.read_text()
        .replace("value: 2.375000E+00", "value: NAN")
        .replace("number of nan iterations:   0", "number of nan iterations:   1")
    )
    log.write_text(lines)
    assert report(runs)["dyt"]["valid_loss"] is None
    text = "".join(page_of(runs).text)
    assert "dyt at –." in text
    assert "dyt: 0 iterations skipped, 20 with loss nan." in text


def test_stale_evaluation_is_pointed_out(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace('"iteration": 200', '"iteration": 150'))
    report(runs)
    assert "dyt: evaluated at iteration 150; its log ends at 200." in page_of(runs).text


def test_missing_directory_and_log(runs: Path) -> None:
    with pytest.raises(UserError, match=r"no is no directory.*train\.log"):
        main(["--run", f"dyt={runs / 'no'}", "--output", str(runs / "out")])
    (runs / "dyt" / "train.log").unlink()
    with pytest.raises(UserError, match=r"train\.log is missing.*megatron_dyt\.pretrain"):
        report(runs)
    assert not (runs / "out").exists()


def test_missing_eval(runs: Path) -> None:
    (runs / "rmsnorm" / "eval.json").unlink()
    with pytest.raises(UserError, match=r"eval\.json is missing.*megatron_dyt\.evaluation --load"):
        report(runs)
    assert not (runs / "out").exists()
    results = report(runs, "--allow-missing-eval")
    assert results["rmsnorm"]["bits_per_byte"] is None
    assert results["rmsnorm"]["next_line_acc"] is None
    assert results["dyt"]["bits_per_byte"] == 1.8
    assert "–" in page_of(runs).text


def test_eval_without_a_task(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace("dyt_next_line", "other"))
    with pytest.raises(UserError, match=r"no 'acc' of task 'dyt_next_line' \(tasks in it: .*other"):
        report(runs)


@pytest.mark.parametrize("text", ["{", "[1]", '{"results": [1]}', '{"results": {"t": 3}}'])
def test_broken_eval(runs: Path, text: str) -> None:
    (runs / "dyt" / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval\.json"):
        report(runs)


def test_missing_stats_of_a_dyt_run(runs: Path) -> None:
    (runs / "dyt" / "checkpoint" / "dyt_stats.jsonl").unlink()
    with pytest.raises(UserError, match=r"dyt_stats\.jsonl is missing.*--normalization DyT"):
        report(runs)
    report(runs, "--allow-missing-stats")
    assert "Embedding scale" not in page_of(runs).text


def split_stats(runs: Path) -> list[Path]:
    """The DyT run's statistics as two pipeline stages write them: layers 1 and 2; layer 3 and the end."""
    whole = runs / "dyt" / "checkpoint" / "dyt_stats.jsonl"
    files = [whole.with_name(f"dyt_stats.stage{stage}.jsonl") for stage in (0, 1)]
    for line in whole.read_text().splitlines():
        record = json.loads(line)
        sites = record["sites"]
        parts = [record | {"sites": sites[:2]}, {"iteration": record["iteration"], "sites": sites[2:]}]
        for file, part in zip(files, parts, strict=True):
            with file.open("a") as output:
                output.write(json.dumps(part) + "\n")
    whole.unlink()
    log = runs / "dyt" / "train.log"
    text = log.read_text()
    argument = "  pipeline_model_parallel_size .................... 2\n"
    log.write_text(text.replace("  seq_length", f"{argument}  seq_length", 1))
    return files


def test_all_stages_of_a_pipeline_are_on_the_page(runs: Path) -> None:
    whole = load_run("dyt", runs / "dyt").stats
    split_stats(runs)
    assert load_run("dyt", runs / "dyt").stats == whole
    report(runs)
    page = (runs / "out" / "report.html").read_text()
    for layer in (1, 2, 3):
        assert f"layer {layer}" in page


def test_a_missing_stage_of_a_pipeline(runs: Path) -> None:
    split_stats(runs)[1].unlink()
    with pytest.raises(UserError, match=r"lacks dyt_stats\.stage1\.jsonl of a run with 2 pipeline stages"):
        report(runs)


def test_log_without_validation(runs: Path) -> None:
    log = runs / "dyt" / "train.log"
    log.write_text(log.read_text().replace("validation loss", "x"))
    with pytest.raises(UserError, match=r"no validation loss.*--eval-interval"):
        report(runs)


def test_log_without_arguments(runs: Path) -> None:
    log = runs / "dyt" / "train.log"
    log.write_text(log.read_text().replace("  seq_length", "  other"))
    with pytest.raises(UserError, match=r"no `seq_length`.*sequence_length"):
        report(runs)
    (runs / "dyt" / "run.json").write_text('{"sequence_length": 32}')
    assert report(runs)["dyt"]["tokens"] == 200 * 8 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dyt"], "give NAME=DIR"),
        (["=dir"], "give NAME=DIR"),
        (["dyt="], "give NAME=DIR"),
        (["a=x", "a=y"], "given twice"),
        (["versions=x"], "key of results.json"),
    ],
)
def test_wrong_run_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_runs(options)


def test_run_options_keep_order_and_equal_signs() -> None:
    assert parse_runs(["b=x=1", "a=y"]) == {"b": Path("x=1"), "a": Path("y")}
    assert list(parse_runs(["b=x", "a=y"])) == ["b", "a"]


def test_the_command_line_ends_in_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dyt.report.compare", "--run", "x", "--output"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron_dyt: error: --run 'x': give NAME=DIR")
    assert "Traceback" not in done.stderr


def record(iteration: int, *sites: dict[str, Any]) -> StatsRecord:
    return StatsRecord(iteration, tuple(SiteStats(**s) for s in sites), None)


def test_alpha_chart_compares_alpha_with_one_over_std() -> None:
    start = record(1, site("ffn", 1, 0.5, 1.0), site("ffn", 2, 0.5, 2.0))
    end = record(9, site("ffn", 1, 0.75, 4.0), site("ffn", 2, 0.25, 8.0))
    (chart,) = alpha_charts([start, end])
    assert chart.title == "ffn"
    assert {s.name: list(s.points) for s in chart.series} == {
        "alpha, iteration 1": [(1, 0.5), (2, 0.5)],
        "alpha, iteration 9": [(1, 0.75), (2, 0.25)],
        "1/std, iteration 1": [(1, 1.0), (2, 0.5)],
        "1/std, iteration 9": [(1, 0.25), (2, 0.125)],
    }


def test_a_dead_input_is_left_out_of_the_chart() -> None:
    (chart,) = alpha_charts([record(1, site("ffn", 1, 0.5, 0.0), site("ffn", 2, 0.5, math.nan))])
    assert [list(s.points) for s in chart.series[2:]] == [[], []]


def test_history_follows_each_layer() -> None:
    stats = [record(i, site("attn", 1, 0.5, i), site("attn", 2, 0.5, 2 * i)) for i in (1, 2, 3)]
    (chart,) = history_charts(stats, ALPHA_STD)
    assert {s.name: list(s.points) for s in chart.series} == {
        "layer 1": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "layer 2": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    assert [s.color for s in chart.series] == ["r0", "r4"]


def test_history_of_a_deep_model_stays_readable() -> None:
    sites = [site("attn", n, 0.5, 1.0, "input_layernorm") for n in range(1, 81)]
    (chart,) = history_charts([record(1, *sites), record(2, *sites)], ALPHA_STD)
    assert len(chart.series) == 12
    assert [s.name for s in chart.series if s.label] == ["layer 1", "layer 80"]


def test_sites_of_one_role_in_one_layer_get_charts_of_their_own() -> None:
    sites = [site("qk", n, 1, 1, leaf) for n in (1, 2) for leaf in ("q_layernorm", "k_layernorm")]
    groups = site_groups([record(1, *sites, site("final", 2, 1, 1))])
    assert {key: len(names) for key, names in groups.items()} == {
        "qk (q_layernorm)": 2,
        "qk (k_layernorm)": 2,
        "final": 1,
    }
