"""The requests of benchmarks/evaluation.py: the paper's tasks in their proportions."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_rows_are_medians_and_the_largest_difference(benchmark: ModuleType) -> None:
    def taken(seconds: float, logprob: float = -1.0) -> dict[str, Any]:
        return {"seconds": seconds, "cpu_seconds": seconds, "scores": [[logprob, True], [-2.0, False]]}

    reference = taken(1)["scores"]
    slow = benchmark.row_of("hf, batch 64", [taken(s) for s in (2, 1, 9)], reference)
    fast = benchmark.row_of(
        "megatron_dyt, shared, 2 processes", [taken(0.5), taken(0.25, -1.125), taken(9)], reference
    )
    assert (slow["requests_per_second"], slow["max_logprob_difference"]) == (1, 0)
    assert (fast["requests_per_second"], fast["requests_per_cpu_second"]) == (4, 2)
    assert (fast["max_logprob_difference"], fast["greedy_differences"]) == (0.125, 0)
    head, _, first, second = benchmark.table({"results": [slow, fast]}).splitlines()
    column = head.split(" | ").index("over hf, batch 64")
    assert [line.split(" | ")[column] for line in (first, second)] == ["1.0", "4.0"]
