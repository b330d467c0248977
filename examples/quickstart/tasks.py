"""Two zero-shot lm-eval tasks from the corpus's held-out files.

    python examples/quickstart/tasks.py --corpus DIR --output DIR

writes the tasks' YAML and data, to be used with lm-eval's `--include_path DIR`, offline:

dyt_bits_per_byte  how many bits a byte of unseen source costs (lower is better)
dyt_next_line      which of four lines comes next after ten lines of code (accuracy; chance is 0.25)

In dyt_next_line every line, right or wrong, is drawn by one rule: it occurs nowhere in the training
text and shares an identifier with the lines before it in its own file. The four lines of a question
come from four files and have one indentation and one class of length. So a model that ignores the
context, or knows lines by heart, stays at chance.
"""

from __future__ import annotations

import argparse
import json
import keyword
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dyt.atomic import write_atomically
from megatron_dyt.errors import UserError, run_main

CONTEXT_LINES = 10
MIN_CONTEXT_TEXT_LINES = 6
MAX_CONTEXT_CHARACTERS = 700
LINE_CHARACTERS = range(12, 81)
CHOICES = 4
MIN_QUESTIONS = 40
MIN_DOCUMENT_BYTES = 500
DOCUMENT_BYTES = 2000
IDENTIFIER = re.compile(r"[A-Za-z_]\w{3,}")
COMMON_WORDS = frozenset([*keyword.kwlist, "self"])

BITS_PER_BYTE_YAML = """\
task: dyt_bits_per_byte
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1
"""

NEXT_LINE_YAML = """\
task: dyt_next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: "\\n"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@dataclass(frozen=True)
class Line:
    """A line that may be asked for, with the lines before it."""

    path: str
    number: int
    context: str
    text: str

    @property
    def stripped(self) -> str:
        return self.text.strip()

    @property
    def form(self) -> tuple[str, int]:
        """Indentation and class of length: lines of one class differ by at most 10 %.

        Fixed classes, not a window around the right line: in a window the right line would tend to
        be of middle length, and length alone would tell.
        """
        indent = self.text[: len(self.text) - len(self.text.lstrip())]
        return indent, math.floor(math.log(len(self.stripped), 1.1))


def read_corpus(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of a corpus file, with universal newlines."""
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"corpus {path} does not exist or is empty; make it with corpus.py")
    for number, raw in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        try:
            record = json.loads(raw)
            name, text = record["path"], record["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: must be a JSON object with "path" and "text"; '
                "make the corpus again with corpus.py"
            ) from error
        yield name, text.replace("\r\n", "\n").replace("\r", "\n")


def bits_per_byte_documents(heldout: Sequence[tuple[str, str]], total_bytes: int) -> list[dict[str, str]]:
    """The beginnings of held-out files, cut at a line's end, about `total_bytes` in all.

    Each is about 2 KB, or as much longer as few files need to reach `total_bytes`.
    """
    files = [item for item in heldout if len(item[1].encode()) >= MIN_DOCUMENT_BYTES]
    limit = max(DOCUMENT_BYTES, math.ceil(total_bytes / max(len(files), 1)))
    documents, size = [], 0
    for path, text in files:
        if size >= total_bytes:
            break
        cut = cut_at_line(text, limit)
        documents.append({"path": path, "text": cut})
        size += len(cut.encode())
    return documents


def cut_at_line(text: str, limit: int) -> str:
    """The longest run of whole first lines of `text` within `limit` bytes; at least one line."""
    size = 0
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if kept and size > limit:
            break
        kept.append(line)
    return "".join(kept)


def identifiers(text: str) -> set[str]:
    """Names of four letters or more in `text`, without Python's most common words."""
    return set(IDENTIFIER.findall(text)) - COMMON_WORDS


def candidate_lines(path: str, text: str) -> Iterator[Line]:
    """Yield the lines of a file that can be foreseen, in part, from the ten lines before them."""
    lines = text.split("\n")
    for index in range(CONTEXT_LINES, len(lines)):
        line = lines[index].rstrip()
        before = lines[index - CONTEXT_LINES : index]
        context = "\n".join(before).rstrip()
        if (
            len(line.strip()) in LINE_CHARACTERS
            and len(context) <= MAX_CONTEXT_CHARACTERS
            and sum(bool(text.strip()) for text in before) >= MIN_CONTEXT_TEXT_LINES
            and line.strip() not in context
            and identifiers(line) & identifiers(context)
        ):
            yield Line(path, index + 1, context, line)


def without_known(lines: Iterable[Line], train: Iterable[tuple[str, str]]) -> list[Line]:
    """`lines` without those whose text, indentation aside, is a line of `train` or comes twice."""
    lines = list(lines)
    times = Counter(line.stripped for line in lines)
    # The set shrinks from the small held-out side: the training text is never held in memory.
    unseen = {text for text, count in times.items() if count == 1}
    for _, text in train:
        unseen.difference_update(line.strip() for line in text.split("\n"))
    return [line for line in lines if line.stripped in unseen]


def next_line_questions(
    lines: Sequence[Line], count: int, random_state: random.Random
) -> list[dict[str, object]]:
    """Up to `count` four-way questions; every position holds the right answer equally often.

    `lines` are the candidates, which serve both as questions and as each other's wrong answers.
    """
    by_form: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in lines:
        by_form[line.form].append(line)
    order = random_state.sample(lines, len(lines))
    per_file = Counter[str]()
    files = len({line.path for line in lines})
    # No file gives more than twice its share: one huge file would be a test of that file alone.
    most = math.ceil(2 * count / max(files, 1))
    picked: list[tuple[Line, list[Line]]] = []
    for line in order:
        if len(picked) == count:
            break
        if per_file[line.path] == most:
            continue
        wrong = distractors(line, by_form[line.form], random_state)
        if wrong:
            per_file[line.path] += 1
            picked.append((line, wrong))
    picked = picked[: len(picked) - len(picked) % CHOICES]
    positions = [position % CHOICES for position in range(len(picked))]
    random_state.shuffle(positions)
    return [
        question(line, wrong, position) for (line, wrong), position in zip(picked, positions, strict=True)
    ]


def distractors(line: Line, pool: Sequence[Line], random_state: random.Random) -> list[Line]:
    """Three lines of `pool` from three files other than `line`'s; [] if there are not as many."""
    found: dict[str, Line] = {}
    others = [other for other in pool if other.path != line.path]
    for other in random_state.sample(others, len(others)):
        found.setdefault(other.path, other)
        if len(found) == CHOICES - 1:
            return list(found.values())
    return []


def question(line: Line, wrong: Sequence[Line], position: int) -> dict[str, object]:
    """The task's record, with the right line at `position` (from 0) among the choices."""
    choices = [other.text for other in wrong]
    choices.insert(position, line.text)
    return {
        "path": line.path,
        "line": line.number,
        "context": line.context,
        "choices": choices,
        "answer": position,
    }


def write_task(output: Path, name: str, yaml: str, records: Sequence[object]) -> None:
    """Write `name`.jsonl and `name`.yaml; equal files keep their time stamps, which caches use."""
    data = output / f"{name}.jsonl"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(data, "".join(lines).encode())
    # lm-eval resolves data files from the working directory, so the path must be absolute; a JSON
    # string is a YAML string.
    path = json.dumps(str(data.resolve()), ensure_ascii=False)
    write_atomically(output / f"{name}.yaml", yaml.format(data=path).encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make lm-eval tasks of a corpus's held-out files.")
    parser.add_argument("--corpus", type=Path, required=True, help="directory made by corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--questions", type=int, default=400, help="next-line questions at most")
    parser.add_argument(
        "--bytes", type=int, default=150_000, help="text for bits per byte, about (default: 150000)"
    )
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    if args.questions < MIN_QUESTIONS or args.bytes < 1:
        raise UserError(
            f"--questions must be at least {MIN_QUESTIONS} and --bytes at least 1, "
            f"not {args.questions} and {args.bytes}"
        )
    random_state = random.Random(args.seed)
    heldout = list(read_corpus(args.corpus / "heldout.jsonl"))
    random_state.shuffle(heldout)
    documents = bits_per_byte_documents(heldout, args.bytes)
    candidates = (line for path, text in heldout for line in candidate_lines(path, text))
    lines = without_known(candidates, read_corpus(args.corpus / "train.jsonl"))
    questions = next_line_questions(lines, args.questions, random_state)
    if len(questions) < MIN_QUESTIONS:
        raise UserError(
            f"{args.corpus}/heldout.jsonl gives {len(questions)} next-line questions, fewer than "
            f"{MIN_QUESTIONS}; make the corpus from more source files"
        )
    write_task(args.output, "dyt_bits_per_byte", BITS_PER_BYTE_YAML, documents)
    write_task(args.output, "dyt_next_line", NEXT_LINE_YAML, questions)
    size = sum(len(document["text"].encode()) for document in documents)
    print(f"dyt_bits_per_byte: {len(documents)} documents, {size / 1e3:.0f} KB")
    print(f"dyt_next_line: {len(questions)} questions from {len(lines):,} candidate lines")
    return 0


if __name__ == "__main__":
    run_main(main)
