"""`megatron-dyt eval`: from a checkpoint to a file of results."""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from megatron_dyt import cli, cpu
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.paper import TASKS
from tests.conftest import forget_run
from tests.license_tokenizer import TEXT
from tests.ranks import Parent, Rank

from .conftest import SEQUENCE, Trained, restart, without_own_tasks
from .task_data import write_all

Train = Callable[[str], Trained]
LINES = [line[:30] for line in TEXT.split("\n") if len(line) > 30][:24]
PARAGRAPHS = [part for part in TEXT.split("\n\n") if len(part) > 200][:5]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 2
metadata: {{version: 1.5}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
BITS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
ANSWER = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="session")
def tasks(home: Path) -> Path:
    """A directory with the tasks dyt_choice, dyt_bits, dyt_answer and the group dyt_all."""
    folder = home / "tasks"
    folder.mkdir()
    pairs = list(zip(LINES[::2], LINES[1::2], strict=True))
    choices = [
        {"text": first, "choices": [second, pairs[i - 1][1]], "gold": 0}
        for i, (first, second) in enumerate(pairs)
    ]
    rows = {"choice": choices, "bits": [{"text": part} for part in PARAGRAPHS], "answer": choices[:3]}
    for name, body in {"choice": CHOICE, "bits": BITS, "answer": ANSWER}.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(YAML.format(name=f"dyt_{name}", data=data) + body)
    (folder / "all.yaml").write_text(
        "group: dyt_all\ntask: [dyt_choice]\naggregate_metric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def own_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are cached by their file's place and time: never in the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "cache"))


def run_eval(argv: list[str]) -> None:
    """`megatron-dyt eval ARGV` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["megatron-dyt", "eval", *argv])
        cli.main.main(standalone_mode=False)


def arguments(trained: Trained, tasks: Path, output: Path, *more: str) -> list[str]:
    given = {"--load": trained.directory, "--include-path": tasks, "--output": output}
    return [str(word) for pair in given.items() for word in pair] + list(more)


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_evaluates_a_checkpoint(
    trained: Train,
    norm: str,
    tasks: Path,
    tmp_path: Path,
    fresh_megatron: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "results.json"
    argv = arguments(trained(norm), tasks, output, "--tasks", "dyt_choice,dyt_bits,dyt_answer")
    capsys.readouterr()
    run_eval(argv)
    report = json.loads(output.read_text())
    assert list(output.parent.iterdir()) == [output]
    assert report["prefix_token"] == 1
    assert report["checkpoint"]["iteration"] == 4
    assert report["checkpoint"]["normalization"] == norm
    assert set(report["versions"]) == {"lm_eval", "torch", "megatron_core", "megatron_dyt"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", report["versions"]["megatron_core"])
    assert report["command"] == shlex.join(["megatron-dyt", "eval", *argv])
    assert report["task_versions"]["dyt_bits"] == 1.5
    assert set(report["n-shot"].values()) == {0}  # Whatever the task's file says.
    assert report["n-samples"]["dyt_choice"] == {"original": 12, "effective": 12}
    assert report["processes"] == 1
    assert report["seconds"] > 0
    shown = capsys.readouterr().out
    assert f"{norm} model" in shown
    assert "end of arguments" not in shown  # Megatron's report stays hidden.
    bits = report["results"]["dyt_bits"]["bits_per_byte,none"]
    assert re.search(rf"\| dyt_bits +\| 0 +\| bits_per_byte +\| {bits:.4f}", shown)
    assert "dyt_answer" in report["results"]
    assert not torch.distributed.is_initialized()


def test_figures_are_those_of_the_model(
    trained: Train, tasks: Path, tmp_path: Path, fresh_megatron: None
) -> None:
    """bits per byte and accuracy from Megatron's own logits, one sequence at a time."""
    output = tmp_path / "results.json"
    tasks_flag = ("--tasks", "dyt_choice,dyt_bits", "--limit", "3")
    run_eval(arguments(trained("DyT"), tasks, output, *tasks_flag))
    report = json.loads(output.read_text())["results"]

    forget_run()
    cpu.enable()
    loaded = load_model(str(trained("DyT").directory))
    encode = loaded.tokenizer.tokenize

    def logprob(context: list[int], continuation: list[int]) -> float:
        inputs = torch.tensor([(context + continuation)[:-1]])
        with torch.no_grad():
            logits = loaded.model(inputs, torch.arange(inputs.shape[1])[None], None)[0]
        logits = logits[-len(continuation) :, : loaded.tokenizer.vocab_size].double()
        return float(logits.log_softmax(1).gather(1, torch.tensor([continuation]).T).sum())

    total = 0.0
    for text in PARAGRAPHS[:3]:
        tokens = [1, *encode(text)]
        total += logprob(tokens[:1], tokens[1 : SEQUENCE + 1])
        done = SEQUENCE + 1
        while done < len(tokens):
            end = min(done + SEQUENCE, len(tokens))
            total += logprob(tokens[end - SEQUENCE - 1 : done], tokens[done:end])
            done = end
    size = sum(len(text.encode()) for text in PARAGRAPHS[:3])
    expected = -total / size / math.log(2)
    assert report["dyt_bits"]["bits_per_byte,none"] == pytest.approx(expected, abs=1e-5)

    right = 0
    for row in map(json.loads, (tasks / "choice.jsonl").read_text().splitlines()[:3]):
        context = [1, *encode(row["text"])]
        values = []
        for choice in row["choices"]:
            both = [1, *encode(row["text"] + choice)]
            continuation = both[len(context) :]
            kept = (context + continuation)[-SEQUENCE - 1 : -len(continuation)]
            values.append(logprob(kept, continuation))
        right += values.index(max(values)) == row["gold"]
    assert report["dyt_choice"]["acc,none"] == pytest.approx(right / 3)


def test_groups_are_shown(
    trained: Train,
    tasks: Path,
    tmp_path: Path,
    fresh_megatron: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_own_tasks(monkeypatch)
    output = tmp_path / "results.json"
    more = ("--tasks", "dyt_all", "--limit", "2", "--batch-tokens", "64", "--ckpt-step", "2")
    run_eval(arguments(trained("RMSNorm"), tasks, output, *more))
    report = json.loads(output.read_text())
    assert report["groups"]["dyt_all"]["acc,none"] == report["results"]["dyt_choice"]["acc,none"]
    assert report["checkpoint"]["iteration"] == 2
    assert "| dyt_all" in capsys.readouterr().out


@pytest.fixture(scope="session")
def task_data(home: Path) -> Path:
    write_all(home / "data", 5)
    return home / "data"


def paper_run(trained: Trained, task_data: Path, output: Path, *more: str) -> dict[str, Any]:
    """The paper's tasks in this process, from local files."""
    given = {"--load": trained.directory, "--task-data": task_data, "--output": output}
    flags = [str(word) for pair in given.items() for word in pair]
    run_eval([*flags, "--tasks", "dyt_paper", "--batch-tokens", "600", *more])
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_the_paper_s_tasks_from_local_files(
    trained: Train,
    task_data: Path,
    tmp_path: Path,
    fresh_megatron: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = paper_run(trained("DyT"), task_data, tmp_path / "shared.json", "--cache", str(tmp_path / "kept"))
    assert set(shared["dyt_paper"]["tasks"]) == set(TASKS)
    assert shared["dyt_paper"]["figures"] == 21
    assert shared["n-samples"]["record"] == {"original": 5, "effective": 5}
    values = [row["value"] for row in shared["dyt_paper"]["tasks"].values()]
    assert shared["dyt_paper"]["mean"] == pytest.approx(sum(values) / 15)
    assert shared["limit"] is None
    shown = capsys.readouterr()
    assert re.search(r"\| 7b +\| 0.513 +\| 0.513 +\| +\|", shown.out)
    assert re.search(rf"\| of another size .* {shared['dyt_paper']['mean']:.3f} / ", shown.out)
    assert f"lm-eval {shared['versions']['lm_eval']}" in shown.out
    assert re.search(rf"requests are longer than {SEQUENCE} tokens", shown.out)

    restart()
    again = paper_run(trained("DyT"), task_data, tmp_path / "again.json", "--cache", str(tmp_path / "kept"))
    assert again["results"] == shared["results"]
    assert re.search(r"(\d+) of \1 results are in the cache", capsys.readouterr().out)

    restart()
    flat = paper_run(trained("DyT"), task_data, tmp_path / "flat.json", "--mode", "flat")
    assert flat["results"] == approximately(shared["results"])


def approximately(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        task: {
            name: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
            for name, value in metrics.items()
        }
        for task, metrics in results.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "tp"), [(2, 1), (4, 2)])
def test_processes_give_the_same_results(
    trained: Train,
    tasks: Path,
    tmp_path: Path,
    fresh_megatron: None,
    ranks: Parent,
    processes: int,
    tp: int,
) -> None:
    """Tensor by data parallel 1 x 2 and 2 x 2, with the results of one task in the cache already."""
    alone, together, kept = tmp_path / "one.json", tmp_path / "more.json", tmp_path / "kept"
    names = ("--tasks", "dyt_choice,dyt_bits,dyt_answer", "--batch-tokens", "200")
    cache = ("--cache", str(kept))
    run_eval(arguments(trained("DyT"), tasks, tmp_path / "part.json", "--tasks", "dyt_choice", *cache))
    restart()
    run_eval(arguments(trained("DyT"), tasks, alone, *names))
    flags = [*names, "--tensor-model-parallel-size", str(tp), *cache]
    command = ["-m", "megatron_dyt", "eval", *arguments(trained("DyT"), tasks, together, *flags)]
    logs = [Rank(command, str(tmp_path / f"log{rank}")) for rank in range(processes)]
    codes = ranks.run(logs, watched=True)
    printed = [Path(rank.out).read_text() for rank in logs]
    assert codes == [0] * processes, printed
    one, more = json.loads(alone.read_text()), json.loads(together.read_text())
    assert (more["processes"], more["tensor_model_parallel_size"]) == (processes, tp)
    assert more["results"] == approximately(one["results"])
    for line in ("| dyt_choice ", "24 of 24 results are in the cache"):
        assert [text.count(line) for text in printed] == [1] + [0] * (processes - 1)  # One process reports.

    # What the processes added is there for the next.
    restart()
    (file,) = kept.iterdir()
    run_eval(arguments(trained("DyT"), tasks, tmp_path / "last.json", *names, *cache))
    assert json.loads((tmp_path / "last.json").read_text())["results"] == more["results"]
    assert list(kept.iterdir()) == [file]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "dyt_nothing"], r"unknown dyt_nothing.*dyt_bits"),
        (["--tasks", "dyt_bits", "--include-path", "nowhere"], r"--include-path nowhere: no such"),
        (["--tasks", "dyt_bits", "--task-data", "nowhere"], r"--task-data nowhere: no such"),
        (["--tasks", "dyt_bits", "--output", "."], r"--output \. is a directory"),
        (["--tasks", "dyt_bits", "--max-length", "49"], r"49 was given.*sequences of 48\. Give 1 to 48"),
        (["--tasks", "dyt_bits", "--tp", "3"], r"3 does not divide the 1 processes"),
        (["--tasks", "dyt_bits", "--ckpt-step", "9"], r"iteration 9 is not there"),
        (["--tasks", "dyt_bits", "--device", "tpu"], r"'tpu'.*auto, cpu, cuda"),
        (["--tasks", ","], r"--tasks"),
        (
            ["--tasks", "dyt_bits", "--output", f"{__file__}/o"],
            r"--output .*is not a directory",
        ),
    ],
)
def test_bad_input(
    trained: Train,
    tasks: Path,
    tmp_path: Path,
    fresh_megatron: None,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    without_own_tasks(monkeypatch)
    output = tmp_path / "results.json"
    with pytest.raises(UserError, match=message):
        run_eval(arguments(trained("DyT"), tasks, output, *more))
    assert not output.exists()


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the evaluation, and by the process that writes alone: others may be on other machines."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    argv = ["--load", str(tmp_path / "nowhere"), "--tasks", "t", "--output", str(tmp_path / "new" / "o")]
    with pytest.raises(UserError, match=rf"--output .*o: nothing can be written in {tmp_path}"):
        run_eval(argv)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"nowhere: no such directory"):
        run_eval(argv)


@pytest.mark.parametrize("flag", [["--limit", "0"], ["--batch-tokens", "-1"], ["--ckpt-step", "x"]])
def test_numbers_that_are_none(flag: list[str], tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match=flag[1]):
        run_eval(["--load", "d", "--tasks", "t", "--output", str(tmp_path / "o"), *flag])
