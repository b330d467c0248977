"""lm-eval's tasks by name, with this package's own and a user's, and where their documents come from.

They come from the Hub, or, for machines without network, from a directory of `TASK.SPLIT.jsonl` (one JSON
object per line) or `TASK.SPLIT.parquet` files with the columns of the data set on the Hub, which
`export_documents` makes; only the evaluated split of each task is read.
"""

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dyt.atomic import whole_files
from megatron_dyt.errors import UserError, describe
from megatron_dyt.evaluation import paper
from megatron_dyt.patching import Replacement, replaced, wrapper

_log = logging.getLogger(__name__)

SEED = 1234  # lm-eval's own default.
OWN_TASKS = Path(__file__).parent / "tasks"
SUFFIXES = (".jsonl", ".parquet")
# What the data sets library and the Hub raise offline are many classes.
_NO_DATA = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")


def load_tasks(names: list[str], include_path: str | None = None, data: Path | None = None) -> dict[str, Any]:
    """lm-eval's loaded tasks (what its `evaluate` takes), zero-shot.

    Args:
        names: tasks, groups or tags of lm-eval, of this package, or of YAML files in `include_path`.
        data: directory of `TASK.SPLIT.jsonl` or `.parquet` files to read instead of the Hub.

    Raises:
        UserError: an unknown name, a directory that is not there, or data that is missing or not what the
            task needs.
    """
    for flag, directory in (("--include-path", include_path), ("--task-data", data)):
        if directory is not None and not Path(directory).is_dir():
            raise UserError(f"{flag} {directory}: no such directory")
    manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        own = ", ".join(_index([OWN_TASKS, *([include_path] if include_path else [])]).all_tasks)
        raise UserError(f"--tasks: unknown {', '.join(unknown)}; allowed are lm-eval's tasks and {own}")
    # A task may shuffle its documents' choices as it is made: all ranks, and all machines, have the same.
    seed()
    with _from_files(data) if data else contextlib.nullcontext():
        loaded: dict[str, Any] = _load(manager, names)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        if data:
            for name in ("build_all_requests", "apply_filters", "process_results"):
                setattr(task, name, _naming_the_file(getattr(task, name), data, task))
    return loaded


def seed() -> None:
    """Start Python's and NumPy's random numbers anew, as lm-eval does before it makes tasks and requests."""
    random.seed(SEED)
    np.random.seed(SEED)


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


# --- documents in local files ---------------------------------------------------------------------


@contextlib.contextmanager
def _from_files(directory: Path) -> Iterator[None]:
    """Inside, lm-eval's tasks read their documents from `directory`.

    lm-eval can take another data set for a task, but not for the members of a group.
    """

    def read(task: Any, *_arguments: Any, **_options: Any) -> None:
        task.dataset = _read_splits(directory, task.config)

    @wrapper
    def made(make: Callable[..., None], task: Any, *arguments: Any, **options: Any) -> None:
        _naming_the_file(make, directory, task)(task, *arguments, **options)

    with replaced(
        Replacement("lm_eval.api.task", "ConfigurableTask.download", lambda _download: read),
        Replacement("lm_eval.api.task", "ConfigurableTask.__init__", made),
    ):
        yield


def _naming_the_file(function: Callable[..., Any], directory: Path, task: Any) -> Callable[..., Any]:
    """`function`, which reads the task's documents: what it finds wrong in them is a `UserError`."""

    def named(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (UserError, ImportError, NameError, MemoryError, OSError):
            raise
        # Whatever the task's templates and functions raise.
        except Exception as error:
            if "dataset" not in vars(task):  # Nothing of the file has been read.
                raise
            path = _find_file(directory, task.config.task, evaluated_split(task.config))
            raise UserError(
                f"{path}: task {task.config.task} fails on its documents ({describe(error)}). Make the file "
                "again with megatron-dyt eval-data, or mend the task's definition"
            ) from error

    return named


def _read_splits(directory: Path, config: Any) -> dict[str, Any]:
    """The evaluated split of the task of lm-eval's `config`, as a `datasets.Dataset` by its name.

    The task's other splits stand for few-shot examples, which zero-shot tasks do not take: all are the
    same documents here.
    """
    split = evaluated_split(config)
    # Columns are known of the paper's tasks alone.
    columns = paper.TASKS[config.task].columns if config.task in paper.TASKS else ()
    documents = read_documents(_find_file(directory, config.task, split), columns)
    others = (config.training_split, config.validation_split, config.fewshot_split)
    return {name: documents for name in {split, *others} if name is not None}


def evaluated_split(config: Any) -> str:
    """The split that lm-eval evaluates: the test split where the task has one."""
    return str(config.test_split or config.validation_split)


def _find_file(directory: Path, task: str, split: str) -> Path:
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
    import pyarrow
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
    # The library takes the columns of the first row alone.
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: the documents differ in the type of a column ({error})") from error


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


def export_documents(names: list[str], output: Path, include_path: str | None = None) -> None:
    """Fetch the evaluated split of each task from the Hub into `output`, a directory for `load_tasks`.

    Args:
        names, include_path: tasks, as for `load_tasks`.

    Raises:
        UserError: `output` is a file; what `load_tasks` raises.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a directory")
    for name, task in load_tasks(names, include_path)["tasks"].items():
        split = evaluated_split(task.config)
        path = output / f"{name}.{split}.jsonl"
        with whole_files([path]) as (partial,), partial.open("w", encoding="utf-8") as file:
            for document in task.dataset[split]:
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
        _log.info(f"{len(task.dataset[split]):,} documents in {path}")
