"""The requests of benchmarks/evaluation.py: the paper's tasks in their proportions."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("evaluation")


def test_mix_is_that_of_the_15_tasks(benchmark: ModuleType) -> None:
    total = sum(kind.documents * kind.choices for kind in benchmark.MIX.values())
    assert 200_000 < total < 215_000
    assert benchmark.MIX["record"].documents * benchmark.MIX["record"].choices / total > 0.5


def test_questions(benchmark: ModuleType) -> None:
    numbers = iter(range(10**6))

    def piece(length: int) -> str:
        return f"piece{next(numbers)} of {length}"

    for name, kind in benchmark.MIX.items():
        pairs = benchmark.questions(kind, "prompt ", piece)
        assert len(pairs) == len(set(pairs)) == kind.choices
        contexts, answers = (set(column) for column in zip(*pairs, strict=True))
        same, varied = (answers, contexts) if name == "winogrande" else (contexts, answers)
        assert len(same) == 1
        assert len(varied) == kind.choices
        assert all(context.startswith("prompt ") for context in contexts)
        if kind.begin:
            assert len({answer.split(" piece")[1] for answer in answers}) == 1
