"""Tasks by name, and their documents from local files: as written, or an error that names what is wrong."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from megatron_dyt import cli
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import task_loading
from megatron_dyt.evaluation.paper import TASKS
from megatron_dyt.evaluation.task_loading import load_tasks, read_documents

from .conftest import without_own_tasks
from .task_data import FILES, write_all


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_all(tmp_path, 3)
    return tmp_path


def test_fixtures_have_the_documented_columns(data: Path) -> None:
    assert {f"{name}.{task.split}" for name, task in TASKS.items()} == set(FILES)
    for name, task in TASKS.items():
        read_documents(data / f"{name}.{task.split}.jsonl", task.columns)


def test_tasks_are_made_from_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may shuffle choices as it is made, on each rank, and lm-eval keeps the result on disk."""
    drawn = []

    def load(*_: object) -> dict[str, Any]:
        drawn.append((random.random(), float(np.random.rand())))
        return {"tasks": {}}

    monkeypatch.setattr(task_loading, "_load", load)
    monkeypatch.setattr(task_loading, "_manager", lambda *_: SimpleNamespace(all_tasks=["a"]))
    for _ in range(2):
        load_tasks(["a"])
    assert drawn[0] == drawn[1]


def test_all_tasks_from_files(data: Path) -> None:
    loaded = load_tasks(["dyt_paper"], data=data)
    assert list(loaded["tasks"]) == list(TASKS)
    for name, task in loaded["tasks"].items():
        assert task.config.num_fewshot == 0
        lines = (data / f"{name}.{TASKS[name].split}.jsonl").read_text().splitlines()
        assert len(task.eval_docs) == len(lines) == 3
        task.build_all_requests(rank=0, world_size=1)
        assert len({instance.doc_id for instance in task.instances}) == 3
        metrics = task.process_results(
            task.instances[0].doc, [(-1.0, False) for i in task.instances if i.doc_id == 0]
        )
        assert set(metrics) == {TASKS[name].metric, *TASKS[name].others}
    premise = json.loads((data / "anli_r1.test_r1.jsonl").read_text().splitlines()[0])["premise"]
    assert loaded["tasks"]["anli_r1"].instances[0].args[0].startswith(f"{premise}\nQuestion: ")


def test_one_task_and_a_group_of_lm_eval_s(data: Path) -> None:
    assert list(load_tasks(["record", "piqa"], data=data)["tasks"]) == ["record", "piqa"]


def test_parquet(data: Path) -> None:
    path = data / "arc_easy.test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    Dataset.from_list(rows).to_parquet(str(path.with_suffix(".parquet")))
    (task,) = load_tasks(["arc_easy"], data=data)["tasks"].values()
    assert [doc["question"] for doc in task.eval_docs] == [row["question"] for row in rows]
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"arc_easy.test.parquet cannot be read as parquet"):
        load_tasks(["arc_easy"], data=data)


def test_missing_file(data: Path) -> None:
    (data / "wic.validation.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"task wic is missing: .*wic.validation.jsonl.*eval-data --tasks wic"
    ):
        load_tasks(["dyt_paper"], data=data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no documents"),
        ('{"goal": "a"}\n{"goal"', "line 2 is not JSON"),
        ('{"goal": "a"}\n\n[1]', "line 3 is list"),
        ('{"goal": "a", "sol1": "b", "label": 0}', r"document 1 has no sol2; it has goal, sol1, label"),
    ],
)
def test_wrong_file(data: Path, text: str, message: str) -> None:
    (data / "piqa.validation.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"piqa.validation.jsonl.*{message}"):
        load_tasks(["piqa"], data=data)


def test_a_column_that_begins_later_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2, "b": 3}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == [{"a": 1, "b": None}, {"a": 2, "b": 3}]


GOOD = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answerKey": 5}, r"the documents differ in the type of a column"),
        ({"answerKey": "C"}, r"task arc_easy fails on its documents \(ValueError: 'C' is not in list"),
        ({"choices": None}, r"task arc_easy fails on its documents \(UndefinedError"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_malformed_documents_are_the_file_s_fault(
    data: Path, bad: dict[str, Any], message: str, first: bool
) -> None:
    rows = [GOOD, GOOD | bad]
    (data / "arc_easy.test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:: -1 if first else 1])
    )
    with pytest.raises(UserError, match=rf"arc_easy\.test\.jsonl: {message}"):
        load_tasks(["arc_easy"], data=data)["tasks"]["arc_easy"].build_all_requests(rank=0, world_size=1)


@pytest.mark.parametrize(
    ("task", "bad", "error"),
    [
        ("piqa", {"label": None}, "TypeError: list indices|TypeError: tuple indices"),
        ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}, "IndexError: boolean"),
    ],
)
def test_what_shows_as_documents_are_scored(data: Path, task: str, bad: dict[str, Any], error: str) -> None:
    """In lm-eval's own function, and in one of a task."""
    path = data / f"{task}.validation.jsonl"
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second | bad)))
    loaded = load_tasks([task], data=data)["tasks"][task]
    loaded.build_all_requests(rank=0, world_size=1)
    for instance in loaded.instances:
        instance.resps = [(-1.0, False)]
    loaded.apply_filters()
    answers = [[each.filtered_resps["none"] for each in loaded.instances if each.doc_id == i] for i in (0, 1)]
    assert "acc" in loaded.process_results(loaded.eval_docs[0], answers[0])
    with pytest.raises(UserError, match=rf"{path}: task {task} fails on its documents \(({error})"):
        loaded.process_results(loaded.eval_docs[1], answers[1])
    # Filters may look at documents too.
    loaded._filters[0].apply = lambda _: {}["choices"]
    with pytest.raises(UserError, match=rf"{path}: task {task} fails .*KeyError: 'choices'"):
        loaded.apply_filters()


def test_lm_eval_downloads_again_afterwards(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    load_tasks(["rte"], data=data)
    with pytest.raises(UserError, match=r"data of rte cannot be had.*--task-data DIR"):
        load_tasks(["rte"])


def megatron_dyt_eval_data(argv: list[str]) -> None:
    cli.main.main(["eval-data", *argv], standalone_mode=False)


def test_export(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the Hub, as files that give the same documents."""
    import datasets

    def hub(path: str, name: str | None = None, **_: Any) -> dict[str, Dataset]:
        assert (path, name) in (("aps/super_glue", "wic"), ("allenai/ai2_arc", "ARC-Easy"))
        file = data / ("wic.validation.jsonl" if name == "wic" else "arc_easy.test.jsonl")
        rows = read_documents(file)
        return dict.fromkeys(("train", "validation", "test"), rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    output = tmp_path / "exported"
    megatron_dyt_eval_data(["--output", str(output), "--tasks", "wic,arc_easy"])
    assert sorted(path.name for path in output.iterdir()) == ["arc_easy.test.jsonl", "wic.validation.jsonl"]
    for path in output.iterdir():
        assert list(map(json.loads, path.read_text().splitlines())) == list(
            map(json.loads, (data / path.name).read_text().splitlines())
        )


def test_export_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a directory"):
        megatron_dyt_eval_data(["--output", str(tmp_path / "file")])
    with pytest.raises(UserError, match="names no task"):
        megatron_dyt_eval_data(["--output", str(tmp_path), "--tasks", ","])


def test_task_that_is_named_twice(data: Path) -> None:
    """By itself and in a group: lm-eval says so as a fault of its own."""
    assert list(load_tasks(["arc_easy", "arc_easy"], data=data)["tasks"]) == ["arc_easy"]
    with pytest.raises(UserError, match=r"--tasks arc_easy,dyt_paper has a task more than once .*'arc_easy'"):
        load_tasks(["arc_easy", "dyt_paper"], data=data)


def test_unknown_task(monkeypatch: pytest.MonkeyPatch) -> None:
    without_own_tasks(monkeypatch)
    with pytest.raises(UserError, match=r"unknown a, b;.*dyt_paper, record"):
        load_tasks(["a", "b"])
