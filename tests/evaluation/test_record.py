"""ReCoRD's task: prompts as lm-eval's own code makes them, and its two measures by hand."""

from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.tasks
import pytest
from datasets import Dataset

from megatron_dyt.evaluation.tasks import record

from .task_data import Writer
from .task_data import record as make_record

DOCUMENT = {
    "passage": " A flood hit Lima.\n@highlight\nTwo rivers rose\n@highlight\nPeru sent help ",
    "query": "In @placeholder, as in Lima, rain fell; @placeholder waits",
    "entities": ["Peru", "Lima", "Peru"],
    "answers": ["Peru", "Peru"],
}


@pytest.fixture
def theirs() -> ModuleType:
    """lm-eval's util.py, without the import of a module that transformers no longer has."""
    gone = "import transformers.data.metrics.squad_metrics as squad_metrics"
    folder = Path(lm_eval.tasks.__file__).parent / "super_glue" / "record"
    source = (folder / "util.py").read_text()
    assert gone in source
    module = ModuleType("record_util")
    exec(compile(source.replace(gone, ""), "util.py", "exec"), module.__dict__)
    return module


def test_prompts_are_lm_eval_s(theirs: ModuleType) -> None:
    rows = [DOCUMENT, *(make_record(Writer(seed)) for seed in range(5))]
    data = Dataset.from_list([{name: row[name] for name in DOCUMENT} for row in rows])
    ours = list(record.process_docs(data))
    assert ours == list(theirs.process_docs(data))
    for doc in ours:
        for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
            assert getattr(record, name)(doc) == getattr(theirs, name)(doc)
    assert record.doc_to_text(ours[0]) == "A flood hit Lima.\n\n  - Two rivers rose.\n  - Peru sent help.\n"
    assert record.doc_to_choice(ours[0])[0] == "  - In Lima, as in Lima, rain fell; Lima waits"


@pytest.mark.parametrize(
    ("chosen", "answers", "em", "f1"),
    [
        ("the  U.S. Senate!", ["US senate"], 1.0, 1.0),
        ("Anna Bell", ["Bell"], 0.0, 2 / 3),
        ("Anna Bell", ["Carl", "Anna Maria Bell"], 0.0, 0.8),
        ("New York New York", ["York"], 0.0, 0.4),
        ("Anna", ["Carl"], 0.0, 0.0),
        ("The", ["a"], 1.0, 1.0),
        ("The", ["Carl"], 0.0, 0.0),
    ],
)
def test_measures(chosen: str, answers: list[str], em: float, f1: float) -> None:
    doc: dict[str, Any] = {"entities": ["nobody", chosen], "answers": answers}
    results = [(-9.0, False), (-3.0, True)]
    assert record.process_results(doc, results) == {"em": em, "f1": pytest.approx(f1)}
    if em == 0:
        assert record.process_results(doc, results[::-1])["em"] == 0.0
