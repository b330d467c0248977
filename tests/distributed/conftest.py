"""Launches of the worker, each once for all tests that look at its results."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases, checkpoint_cases, family_cases, record
from tests.ranks import Parent, Rank

HERE = Path(__file__).parent
# A launch that hangs must fail; give more on a machine that has other work.
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "900"))

Launch = Callable[..., None]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers write."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def launch(results: Path, ranks: Parent) -> Launch:
    """`launch(name, processes, cases, worker)` runs cases, once for a name; failing to is a test failure."""
    problems: dict[str, str | None] = {}

    def start(name: str, processes: int, todo: list[dict[str, Any]], worker: str = "worker.py") -> None:
        if name not in problems:
            job = results / f"{name}.json"
            job.write_text(json.dumps({"output": str(results), "cases": todo}), encoding="utf-8")
            command = [str(HERE / worker), str(job)]
            problems[name] = _run(ranks, command, processes, results / f"{name}.log")
        if problems[name]:
            pytest.fail(f"launch {name} of {processes} processes: {problems[name]}", pytrace=False)

    return start


def _run(ranks: Parent, command: list[str], processes: int, log: Path) -> str | None:
    """Run the worker; returns what went wrong, or None."""
    try:
        codes = ranks.run([Rank(command, str(log))] * processes, watched=True, timeout=TIMEOUT)
    except TimeoutError as late:
        what = str(late)
    else:
        if not any(codes):
            return None
        what = f"exit codes {codes}"
    return "\n".join([what, *log.read_text(encoding="utf-8").splitlines()[-60:]])


@pytest.fixture(scope="session")
def one(launch: Launch) -> None:
    """The runs of one process."""
    launch("one", 1, [*cases.REFERENCES, *cases.ONE_PROCESS])


@pytest.fixture(scope="session")
def two(launch: Launch, one: None) -> None:
    """The runs of two processes."""
    launch("two", 2, cases.TWO_PROCESSES)


@pytest.fixture(scope="session")
def family_runs(launch: Launch) -> None:
    """The runs of models other than GPT; of two processes, the references as well."""
    launch("families", 2, family_cases.ALL, worker="family_worker.py")


@pytest.fixture(scope="session")
def saves_and_mutants(launch: Launch, one: None, checkpoints: Path) -> None:
    """The runs of two processes that save or load a checkpoint, and those with a mark taken away."""
    saves = [checkpoint_cases.saving(saver, checkpoints) for saver in checkpoint_cases.SAVERS]
    loads = [checkpoint_cases.loading(load, checkpoints) for load in checkpoint_cases.BY_TWO]
    loads += [checkpoint_cases.loading(load, checkpoints, may_fail=True) for load in checkpoint_cases.REFUSED]
    launch("saves_and_mutants", 2, [*saves, *loads, *cases.MUTANTS])


@pytest.fixture(scope="session")
def layouts(launch: Launch, checkpoints: Path) -> None:
    """Every layout of two processes loaded by every other."""
    launch("moe_reference", 1, [cases.case("moe")])
    saves = [checkpoint_cases.saving(saver, checkpoints) for saver in checkpoint_cases.MATRIX_SAVERS]
    loads = [checkpoint_cases.loading(load, checkpoints, may_fail=True) for load in checkpoint_cases.MATRIX]
    launch("layouts", 2, [*saves, *loads])


@pytest.fixture(scope="session")
def four(launch: Launch, one: None) -> None:
    """The runs of four processes."""
    launch("four", 4, [*cases.FOUR_PROCESSES, *cases.FOUR_PROCESS_MUTANTS])


@pytest.fixture(scope="session")
def reloads(launch: Launch, saves_and_mutants: None, checkpoints: Path) -> None:
    """What two processes have saved, continued by one."""
    loads = [checkpoint_cases.loading(load, checkpoints) for load in checkpoint_cases.BY_ONE]
    launch("reload", 1, loads)


@pytest.fixture(scope="session")
def checkpoints(results: Path) -> Path:
    return results / "checkpoints"


@pytest.fixture
def run_of(results: Path) -> Callable[[str], record.Run]:
    """The result of a case by its name."""
    return lambda name: record.load(results, name)
