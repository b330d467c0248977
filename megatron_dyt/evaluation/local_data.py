"""Data of lm-eval's tasks in local files, for machines without network.

A directory holds `TASK.SPLIT.jsonl` (one JSON object a line) or `TASK.SPLIT.parquet`, with the columns
of the data set on the Hub; only the evaluated split of each task is read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dyt.atomic import whole_files
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.paper import TASKS
from megatron_dyt.patching import Patches, Replacement

SUFFIXES = (".jsonl", ".parquet")


@contextlib.contextmanager
def instead_of_hub(directory: Path) -> Iterator[None]:
    """Inside, lm-eval's tasks read their documents from `directory`.

    lm-eval can take another data set for a task, but not for the members of a group.
    """
    if not directory.is_dir():
        raise UserError(f"--task-data {directory}: no such directory")

    def make(_download: Callable[..., None]) -> Callable[..., None]:
        def read(task: Any, *_arguments: Any, **_options: Any) -> None:
            task.dataset = read_splits(directory, task.config)

        return read

    patches = Patches()
    patches.apply([Replacement("lm_eval.api.task", "ConfigurableTask.download", make)])
    try:
        yield
    finally:
        patches.undo()


def read_splits(directory: Path, config: Any) -> dict[str, Any]:
    """The evaluated split of the task of lm-eval's `config`, as a `datasets.Dataset` by its name.

    The task's other splits stand for few-shot examples, which zero-shot tasks do not take: all are the
    same documents here.
    """
    split = evaluated_split(config)
    documents = read_documents(find_file(directory, config.task, split), columns_of(config.task))
    others = (config.training_split, config.validation_split, config.fewshot_split)
    return {name: documents for name in {split, *others} if name is not None}


def evaluated_split(config: Any) -> str:
    """The split that lm-eval evaluates: the test split where the task has one."""
    return str(config.test_split or config.validation_split)


def columns_of(task: str) -> tuple[str, ...]:
    """Columns that a document must have, as far as this package knows the task."""
    return TASKS[task].columns if task in TASKS else ()


def find_file(directory: Path, task: str, split: str) -> Path:
    """The file of a task's split; `UserError` naming it when it is not there."""
    paths = [directory / f"{task}.{split}{suffix}" for suffix in SUFFIXES]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(
        f"the data of task {task} is missing: {paths[0]} (or {SUFFIXES[1]}) is not there. Make it on a "
        f"machine with network: megatron-dyt eval-data --tasks {task} --output DIR"
    )


def read_documents(path: Path, columns: tuple[str, ...] = ()) -> Any:
    """The file's documents as a `datasets.Dataset`; `UserError` naming file and line or column."""
    from datasets import Dataset

    rows = list(_json_lines(path)) if path.suffix == ".jsonl" else _parquet_rows(path)
    if not rows:
        raise UserError(f"{path} has no documents; make it again with megatron-dyt eval-data")
    for number, row in enumerate(rows, 1):
        missing = [name for name in columns if name not in row]
        if missing:
            raise UserError(
                f"{path}: document {number} has no {', '.join(missing)}; it has {', '.join(row)}, and needs "
                f"{', '.join(columns)}"
            )
    return Dataset.from_list(rows)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is {type(row).__name__}; a JSON object is needed")
            yield row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({error})") from error
    return rows


def write_documents(path: Path, documents: Any) -> None:
    """Write a data set's documents as JSON lines; the file is whole or absent."""
    with whole_files([path]) as (partial,), partial.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
