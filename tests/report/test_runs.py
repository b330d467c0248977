"""Run directories as numbers: results.json, and the clear error for each thing that is missing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report.runs import load_run, summarize
from tests.report.made_up_runs import read_lines, step_line, write_lines, write_run


def results_of(root: Path, *names: str, elapsed_seconds: float | None = None) -> dict[str, Any]:
    loaded = [load_run(name, root / name) for name in names or ("rmsnorm", "dyt")]
    return summarize(loaded, elapsed_seconds=elapsed_seconds)


def change_metrics(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Rewrite each line of the run's metrics; None leaves it out."""
    path = directory / "checkpoint" / "metrics.jsonl"
    write_lines(path, [new for line in read_lines(path) if (new := change(line)) is not None])


def test_results(runs: Path) -> None:
    results = results_of(runs)
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
        "evaluate": "megatron-dyt eval --load dyt/checkpoint",
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
    [(1, 1), (2, 2), (3, 2), (10, 2), (40, 5)],  # Lines, and the first of them past the warm-up.
)
def test_warm_up_is_left_out_of_the_step_time(tmp_path: Path, count: int, first: int) -> None:
    directory = write_run(tmp_path / "r", final=2.0, ms=10, normalization="RMSNorm")
    write_lines(directory / "checkpoint" / "metrics.jsonl", (step_line(i) for i in range(1, count + 1)))
    steps = load_run("r", directory).steady_steps()
    assert [at for at, _ in steps] == list(range(first, count + 1))


def test_one_run_has_no_ratio(runs: Path) -> None:
    assert results_of(runs, "dyt")["step_time_ratio"] is None


def test_given_elapsed_seconds(runs: Path) -> None:
    assert results_of(runs, elapsed_seconds=77.5)["elapsed_seconds"] == 77.5


def test_elapsed_seconds_from_the_steps_without_run_json(runs: Path) -> None:
    (runs / "rmsnorm" / "run.json").unlink()
    results = results_of(runs, "rmsnorm")
    # Steps 1 to 10 at 20 s, 190 at 0.4 s on average, 20.5 s of evaluation.
    assert results["elapsed_seconds"] == pytest.approx(10 * 20 + 190 * 0.4 + 20.5, abs=0.1)
    assert results["commands"]["rmsnorm"].keys() == {"evaluate"}


def test_versions_that_differ_are_all_named(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace("9.9.9", "9.9.10"))
    assert results_of(runs)["versions"]["torch"] == "9.9.9 / 9.9.10"


def test_run_json_states_the_learning_rate_first(runs: Path) -> None:
    (runs / "dyt" / "run.json").write_text('{"learning_rate": 0.004}')
    assert results_of(runs)["dyt"]["learning_rate"] == 0.004


def test_learning_rate_from_the_steps_without_arguments(runs: Path) -> None:
    change_metrics(runs / "dyt", lambda line: None if line["event"] == "start" else line)
    assert results_of(runs)["dyt"]["learning_rate"] == pytest.approx(1e-5 * 200)


def test_metrics_in_the_directory_itself(runs: Path) -> None:
    """As --metrics-dir writes them; the statistics stay beside the checkpoints."""
    whole = load_run("dyt", runs / "dyt")
    (runs / "dyt" / "checkpoint" / "metrics.jsonl").rename(runs / "dyt" / "metrics.jsonl")
    moved = load_run("dyt", runs / "dyt")
    assert moved.metrics.steps == whole.metrics.steps
    assert moved.stats == whole.stats


def test_missing_directory_and_metrics(runs: Path) -> None:
    with pytest.raises(UserError, match=r"no is no directory.*metrics\.jsonl"):
        load_run("dyt", runs / "no")
    (runs / "dyt" / "checkpoint" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"dyt/checkpoint/metrics\.jsonl is missing.*megatron_dyt\.pretrain"):
        load_run("dyt", runs / "dyt")


@pytest.mark.parametrize(
    ("event", "message"),
    [("train", "no training step"), ("validation", r"no validation loss.*--eval-interval")],
)
def test_metrics_without(runs: Path, event: str, message: str) -> None:
    change_metrics(runs / "dyt", lambda line: None if line["event"] == event else line)
    with pytest.raises(UserError, match=message):
        results_of(runs)


def test_missing_eval(runs: Path) -> None:
    (runs / "rmsnorm" / "eval.json").unlink()
    with pytest.raises(UserError, match=r"eval\.json is missing.*megatron-dyt eval --load"):
        load_run("rmsnorm", runs / "rmsnorm")
    run = load_run("rmsnorm", runs / "rmsnorm", allow_missing_eval=True)
    numbers = summarize([run], allow_missing_eval=True)["rmsnorm"]
    assert numbers["bits_per_byte"] is None
    assert numbers["next_line_acc"] is None


def test_a_checkpoint_directory_as_a_run(runs: Path) -> None:
    directory = runs / "dyt" / "checkpoint"
    with pytest.raises(UserError, match=rf"--load {directory} --tasks"):
        load_run("dyt", directory)
    (directory / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=rf"--load {directory} --tasks"):
        summarize([load_run("dyt", directory)])
    (directory / "dyt_stats.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{directory}/dyt_stats.jsonl is missing"):
        load_run("dyt", directory)


def test_eval_without_a_task(runs: Path) -> None:
    path = runs / "dyt" / "eval.json"
    path.write_text(path.read_text().replace("dyt_next_line", "other"))
    with pytest.raises(UserError, match=r"no 'acc' of task 'dyt_next_line' \(tasks in it: .*other"):
        results_of(runs)


@pytest.mark.parametrize("text", ["{", "[1]", '{"results": [1]}', '{"results": {"t": 3}}', b"\xff\xfe"])
def test_broken_eval(runs: Path, text: str | bytes) -> None:
    (runs / "dyt" / "eval.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"eval\.json"):
        load_run("dyt", runs / "dyt")


def test_missing_stats_of_a_dyt_run(runs: Path) -> None:
    (runs / "dyt" / "checkpoint" / "dyt_stats.jsonl").unlink()
    with pytest.raises(UserError, match=r"dyt_stats\.jsonl is missing.*--normalization DyT"):
        load_run("dyt", runs / "dyt")
    assert load_run("dyt", runs / "dyt", allow_missing_stats=True).stats == ()


def split_stats(directory: Path) -> list[Path]:
    """The DyT run's statistics as two pipeline stages write them: layers 1 and 2; layer 3 and the end."""
    whole = directory / "checkpoint" / "dyt_stats.jsonl"
    records = read_lines(whole)
    files = [whole.with_name(f"dyt_stats.stage{stage}.jsonl") for stage in (0, 1)]
    write_lines(files[0], [record | {"sites": record["sites"][:2]} for record in records])
    write_lines(files[1], [{"iteration": r["iteration"], "sites": r["sites"][2:]} for r in records])
    whole.unlink()
    stages = {"pipeline_model_parallel_size": 2}
    change_metrics(
        directory,
        lambda line: line | {"arguments": line["arguments"] | stages} if line["event"] == "start" else line,
    )
    return files


def test_all_stages_of_a_pipeline_are_put_together(runs: Path) -> None:
    whole = load_run("dyt", runs / "dyt").stats
    split_stats(runs / "dyt")
    assert load_run("dyt", runs / "dyt").stats == whole


def test_a_missing_stage_of_a_pipeline(runs: Path) -> None:
    split_stats(runs / "dyt")[1].unlink()
    with pytest.raises(UserError, match=r"lacks dyt_stats\.stage1\.jsonl of a run with 2 pipeline stages"):
        load_run("dyt", runs / "dyt")


def test_a_run_that_diverged_has_no_validation_loss(runs: Path) -> None:
    lost = {"losses": {"lm loss": None}}
    change_metrics(runs / "dyt", lambda line: line | lost if line["event"] == "validation" else line)
    results = results_of(runs)
    assert results["dyt"]["valid_loss"] is None
    json.dumps(results, allow_nan=False)
