"""`megatron-dyt report` and `megatron-dyt follow` as commands."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_dyt.cli.report import follow, parse_runs, report
from megatron_dyt.errors import UserError
from tests.report.made_up_runs import start_line, step_line, write_lines, write_run


def test_report_writes_its_three_files(tmp_path: Path) -> None:
    for name, norm in (("rmsnorm", "RMSNorm"), ("dyt", "DyT")):
        write_run(tmp_path / name, final=2.5, ms=400, normalization=norm)
    options = [part for name in ("rmsnorm", "dyt") for part in ("--run", f"{name}={tmp_path / name}")]
    options += ["--output", str(tmp_path / "out"), "--title", "Words", "--elapsed-seconds", "60"]
    result = CliRunner().invoke(report, options, catch_exceptions=False)
    assert result.exit_code == 0
    names = ("results.json", "report.html", "curves.svg")
    assert result.output == "".join(f"wrote {tmp_path / 'out' / name}\n" for name in names)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Words</h1>" in page
    assert "1.0 minutes in all" in page


def test_follow_shows_a_finished_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [start_line(), step_line(200, 2.5)])
    result = CliRunner().invoke(follow, [str(tmp_path), "--name", "r"], catch_exceptions=False)
    assert "r: step 200/200, loss 2.500" in result.output


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


def test_wrong_input_ends_in_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_dyt", "report", "--run", "x", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron_dyt: error: --run 'x': give NAME=DIR")
    assert "Traceback" not in done.stderr
