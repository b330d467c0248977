"""lm-eval's tasks by name, with this package's own and a user's, from the Hub or from local files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dyt.errors import UserError, describe
from megatron_dyt.evaluation import local_data, paper

SEED = 1234
OWN_TASKS = Path(__file__).parent / "tasks"
# What the data sets library and the Hub raise offline are many classes.
_NO_DATA = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")


def load_tasks(names: list[str], include_path: str | None = None, data: Path | None = None) -> dict[str, Any]:
    """lm-eval's loaded tasks (what its `evaluate` takes), zero-shot.

    Args:
        names: tasks, groups or tags of lm-eval, of this package, or of YAML files in `include_path`.
        data: directory of `TASK.SPLIT.jsonl` or `.parquet` files to read instead of the Hub.

    Raises:
        UserError: an unknown name, or data that is missing or not what the task needs.
    """
    manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        own = ", ".join(_index([OWN_TASKS, *([include_path] if include_path else [])]).all_tasks)
        raise UserError(f"--tasks: unknown {', '.join(unknown)}; allowed are lm-eval's tasks and {own}")
    with local_data.instead_of_hub(data) if data else contextlib.nullcontext():
        loaded: dict[str, Any] = _load(manager, names)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except UserError:
        raise
    except Exception as error:
        if "Duplicate task" in str(error):
            raise UserError(f"--tasks {','.join(names)} has a task more than once ({error})") from error
        causes = {type(cause).__name__ for cause in _chain(error)}
        if not causes & set(_NO_DATA):
            raise
        raise UserError(
            f"the data of {', '.join(names)} cannot be had from the Hub ({describe(error)}). Without "
            f"network, run megatron-dyt eval-data --output DIR on a machine that has one, copy DIR here, "
            f"and give --task-data DIR"
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _manager(names: list[str], include_path: str | None) -> Any:
    """An index of no more tasks than `names` need: all 14,000 of lm-eval's take seconds to read."""
    more: list[Any] = [OWN_TASKS, *([include_path] if include_path else [])]
    if not set(names) <= {paper.GROUP, *paper.TASKS}:
        own = _index(more)
        return own if set(names) <= set(own.all_subtasks) else _index(more, everything=True)
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    folders = sorted({task.folder for task in paper.TASKS.values() if task.folder})
    few = _index([*(home / folder for folder in folders), *more])
    # Another lm-eval may keep them elsewhere.
    return few if set(paper.TASKS) <= set(few.all_subtasks) else _index(more, everything=True)


def _index(paths: list[Any], everything: bool = False) -> Any:
    from lm_eval.tasks import TaskManager

    logger = logging.getLogger("lm_eval.tasks._index")

    def unexpected(record: logging.LogRecord) -> bool:
        return "overrides existing task" not in record.getMessage()  # Our record, on purpose.

    logger.addFilter(unexpected)
    try:
        return TaskManager(include_path=[str(path) for path in paths], include_defaults=everything)
    finally:
        logger.removeFilter(unexpected)
