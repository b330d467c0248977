"""Local data of the paper's 15 tasks: made-up documents with the columns of the real data sets.

`write_all(directory, count)` writes what `--task-data DIRECTORY` reads, `count` documents a task. The
texts are random English words; the schemas are those of the data sets on the Hub.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = (
    "the a of and to in is was for on with as at by from it an be are this which or not but have had "
    "work copyright license notice source object form any person software rights use terms conditions"
)
WORDS = VOCABULARY.split()
NAMES = ("Ada", "Bruno Costa", "Chen", "Dora Lind", "The Eagle", "Fargo")


class Writer:
    """Random sentences of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def words(self, least: int, most: int) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(least, most)))

    def sentence(self, least: int = 4, most: int = 12) -> str:
        return self.words(least, most).capitalize() + "."

    def pick(self, count: int) -> int:
        return self._random.randrange(count)

    def names(self, count: int) -> list[str]:
        return self._random.sample(NAMES, count)


def anli(write: Writer) -> dict[str, Any]:
    return {
        "uid": f"uid-{write.pick(10**6)}",
        "premise": write.sentence(12, 25),
        "hypothesis": write.sentence(),
        "label": write.pick(3),
        "reason": write.sentence(),
    }


def arc(write: Writer) -> dict[str, Any]:
    # A few of the real ones have three or five choices, or digits as labels.
    labels = list(("ABCD", "1234", "ABC")[write.pick(3)])
    return {
        "id": f"q{write.pick(10**6)}",
        "question": write.words(5, 15).capitalize() + "?",
        "choices": {"text": [write.words(1, 6) for _ in labels], "label": labels},
        "answerKey": labels[write.pick(len(labels))],
    }


def boolq(write: Writer) -> dict[str, Any]:
    return {
        "question": write.words(4, 9),
        "passage": write.sentence(20, 40),
        "idx": write.pick(10**6),
        "label": write.pick(2),
    }


def hellaswag(write: Writer) -> dict[str, Any]:
    start = write.sentence(8, 15)
    return {
        "ind": write.pick(10**6),
        "activity_label": write.words(1, 3).capitalize(),
        "ctx_a": start,
        "ctx_b": write.words(1, 2),
        "ctx": start,
        "endings": [write.words(4, 9) + " [step] " + write.words(1, 3) + "." for _ in range(4)],
        "source_id": "activitynet~v_0",
        "split": "val",
        "split_type": "indomain",
        "label": str(write.pick(4)),
    }


def openbookqa(write: Writer) -> dict[str, Any]:
    return {
        "id": f"{write.pick(10**6)}",
        "question_stem": write.words(4, 10),
        "choices": {"text": [write.words(1, 5) for _ in range(4)], "label": list("ABCD")},
        "answerKey": "ABCD"[write.pick(4)],
    }


def piqa(write: Writer) -> dict[str, Any]:
    return {
        "goal": write.words(4, 10) + "?",
        "sol1": write.sentence(6, 14),
        "sol2": write.sentence(6, 14),
        "label": write.pick(2),
    }


def record(write: Writer) -> dict[str, Any]:
    names = write.names(4)
    article = " ".join(f"{write.words(3, 6).capitalize()} {name} {write.words(2, 4)}." for name in names)
    highlights = "".join(f"\n@highlight\n{write.words(4, 8)}" for _ in range(2))
    return {
        "passage": article + highlights,
        "query": f"{write.words(2, 4).capitalize()} @placeholder {write.words(3, 6)}",
        "entities": [*names, names[0]],
        "entity_spans": {"text": [], "start": [], "end": []},
        "answers": [names[write.pick(4)]],
        "idx": {"passage": write.pick(10**6), "query": 0},
    }


def rte(write: Writer) -> dict[str, Any]:
    return {
        "sentence1": write.sentence(10, 25),
        "sentence2": write.sentence(),
        "label": write.pick(2),
        "idx": write.pick(10**6),
    }


def truthfulqa(write: Writer) -> dict[str, Any]:
    one = [write.sentence(3, 8) for _ in range(4)]
    more = [write.sentence(3, 8) for _ in range(6)]
    return {
        "question": write.words(4, 9).capitalize() + "?",
        "mc1_targets": {"choices": one, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": more, "labels": [1, 1, 0, 0, 0, 0]},
    }


def wic(write: Writer) -> dict[str, Any]:
    word = "license"
    sentences = [f"{write.words(2, 5)} {word} {write.words(2, 5)}." for _ in range(2)]
    starts = [sentence.index(word) for sentence in sentences]
    return {
        "word": word,
        "sentence1": sentences[0],
        "sentence2": sentences[1],
        "start1": starts[0],
        "start2": starts[1],
        "end1": starts[0] + len(word),
        "end2": starts[1] + len(word),
        "idx": write.pick(10**6),
        "label": write.pick(2),
    }


def winogrande(write: Writer) -> dict[str, Any]:
    first, second = write.names(2)
    return {
        "sentence": f"{first} {write.words(2, 4)} {second} and _ {write.words(4, 8)}.",
        "option1": first,
        "option2": second,
        "answer": str(1 + write.pick(2)),
    }


# File name -> one document.
FILES: dict[str, Callable[[Writer], dict[str, Any]]] = {
    "anli_r1.test_r1": anli,
    "anli_r2.test_r2": anli,
    "anli_r3.test_r3": anli,
    "arc_challenge.test": arc,
    "arc_easy.test": arc,
    "boolq.validation": boolq,
    "hellaswag.validation": hellaswag,
    "openbookqa.test": openbookqa,
    "piqa.validation": piqa,
    "record.validation": record,
    "rte.validation": rte,
    "truthfulqa_mc1.validation": truthfulqa,
    "truthfulqa_mc2.validation": truthfulqa,
    "wic.validation": wic,
    "winogrande.validation": winogrande,
}


def write_all(directory: Path, count: int) -> None:
    """Write `count` documents of each task; the same ones each time."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (name, make) in enumerate(FILES.items()):
        write = Writer(seed)
        lines = [json.dumps(make(write)) + "\n" for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
