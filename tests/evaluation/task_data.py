"""Local data of the paper's 15 tasks: made-up documents with the columns of the real data sets.

`write_all(directory, count)` writes what `--task-data DIRECTORY` reads, `count` documents per task. The
texts are random English words; the schemas are those of the data sets on the Hub, with a few of their
columns that no task needs.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "it",
    "an",
    "be",
    "are",
    "this",
    "which",
    "or",
    "not",
    "but",
    "have",
    "had",
    "work",
    "copyright",
    "license",
    "notice",
    "source",
    "object",
    "form",
    "any",
    "person",
    "software",
    "rights",
    "use",
    "terms",
    "conditions",
]
NAMES = ("Ada", "Bruno Costa", "Chen", "Dora Lind", "The Eagle", "Fargo")
Document = dict[str, Any]


class Writer:
    """Random sentences of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def words(self, least: int, most: int) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(least, most)))

    def sentence(self, least: int = 4, most: int = 12) -> str:
        return self.words(least, most).capitalize() + "."

    def question(self) -> str:
        return self.words(4, 12).capitalize() + "?"

    def pick(self, count: int) -> int:
        return self._random.randrange(count)

    def names(self, count: int) -> list[str]:
        return self._random.sample(NAMES, count)


def anli(write: Writer) -> Document:
    texts = {"premise": write.sentence(12, 25), "hypothesis": write.sentence(), "reason": write.sentence()}
    return {"uid": "u", **texts, "label": write.pick(3)}


def arc(write: Writer) -> Document:
    # A few of the real ones have three or five choices, or digits as labels.
    labels = list(("ABCD", "1234", "ABC")[write.pick(3)])
    choices = {"text": [write.words(1, 6) for _ in labels], "label": labels}
    return {"question": write.question(), "choices": choices, "answerKey": labels[write.pick(len(labels))]}


def boolq(write: Writer) -> Document:
    return {"question": write.words(4, 9), "passage": write.sentence(20, 40), "label": write.pick(2)}


def hellaswag(write: Writer) -> Document:
    endings = [f"{write.words(4, 9)} [step] {write.words(1, 3)}." for _ in range(4)]
    context = {"activity_label": write.words(1, 3).capitalize(), "ctx_a": write.sentence(8, 15)}
    return {**context, "ctx_b": write.words(1, 2), "endings": endings, "label": str(write.pick(4))}


def openbookqa(write: Writer) -> Document:
    choices = {"text": [write.words(1, 5) for _ in range(4)], "label": list("ABCD")}
    return {"question_stem": write.words(4, 10), "choices": choices, "answerKey": "ABCD"[write.pick(4)]}


def piqa(write: Writer) -> Document:
    sentences = {"sol1": write.sentence(6, 14), "sol2": write.sentence(6, 14)}
    return {"goal": write.question(), **sentences, "label": write.pick(2)}


def record(write: Writer) -> Document:
    names = write.names(4)
    article = " ".join(f"{write.words(3, 6).capitalize()} {name} {write.words(2, 4)}." for name in names)
    highlights = "".join(f"\n@highlight\n{write.words(4, 8)}" for _ in range(2))
    return {
        "passage": article + highlights,
        "query": f"{write.words(2, 4).capitalize()} @placeholder {write.words(3, 6)}",
        "entities": [*names, names[0]],
        "entity_spans": {"text": [], "start": [], "end": []},
        "answers": [names[write.pick(4)]],
    }


def rte(write: Writer) -> Document:
    return {"sentence1": write.sentence(10, 25), "sentence2": write.sentence(), "label": write.pick(2)}


def truthfulqa(write: Writer) -> Document:
    one, more = ([write.sentence(3, 8) for _ in range(count)] for count in (4, 6))
    return {
        "question": write.question(),
        "mc1_targets": {"choices": one, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": more, "labels": [1, 1, 0, 0, 0, 0]},
    }


def wic(write: Writer) -> Document:
    word, document = "license", {"label": write.pick(2)}
    for number in "12":
        sentence = f"{write.words(2, 5)} {word} {write.words(2, 5)}."
        start = sentence.index(word)
        document |= {
            "sentence" + number: sentence,
            "start" + number: start,
            "end" + number: start + len(word),
        }
    return document


def winogrande(write: Writer) -> Document:
    first, second = write.names(2)
    sentence = f"{first} {write.words(2, 4)} {second} and _ {write.words(4, 8)}."
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(1 + write.pick(2))}


# File name -> one document.
FILES: dict[str, Callable[[Writer], Document]] = {
    **{f"anli_r{number}.test_r{number}": anli for number in (1, 2, 3)},
    **{"arc_challenge.test": arc, "arc_easy.test": arc, "boolq.validation": boolq},
    **{"hellaswag.validation": hellaswag, "openbookqa.test": openbookqa, "piqa.validation": piqa},
    **{"record.validation": record, "rte.validation": rte},
    **{"truthfulqa_mc1.validation": truthfulqa, "truthfulqa_mc2.validation": truthfulqa},
    **{"wic.validation": wic, "winogrande.validation": winogrande},
}


def write_all(directory: Path, count: int) -> None:
    """Write `count` documents of each task; the same ones each time."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (name, make) in enumerate(FILES.items()):
        write = Writer(seed)
        lines = [json.dumps(make(write)) + "\n" for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
