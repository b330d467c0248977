"""A corpus in the form of The Pile: jsonl.zst shards, a domain in each document's meta, some broken lines."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow

# Domain -> words of its own; the tasks' made-up documents are of the common ones.
DOMAINS = {
    "Pile-CC": "page site click online news today world people time year",
    "Github": "def return class import self value error string test build",
    "Wikipedia (en)": "city born river century album district population film season war",
}
COMMON = (
    "the a of and to in is was for on with as at by from it an be are this which or not but have had work "
    "copyright license notice source object form any person software rights use terms conditions"
)
# Text, then the same line cut off; no JSON; no text; not an object; bytes that are not UTF-8.
BROKEN = (b'{"text": "cut o', b"not json at all", b'{"meta": {}}', b"[1, 2]", b'{"text": "\xff\xfe"}')


def document(source: random.Random, domain: str) -> bytes:
    words = f"{COMMON} {DOMAINS[domain]}".split()
    sentences = [
        " ".join(source.choices(words, k=source.randint(5, 12))) for _ in range(source.randint(2, 8))
    ]
    text = " ".join(f"{sentence.capitalize()}." for sentence in sentences)
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode()


def lines(seed: int, documents: int, broken: int) -> Iterator[bytes]:
    """`documents` good lines with `broken` bad ones spread among them."""
    source = random.Random(seed)
    places = set(source.sample(range(documents), broken))
    for number in range(documents):
        if number in places:
            yield source.choice(BROKEN)
        yield document(source, source.choice(list(DOMAINS)))


def write_shard(path: Path, seed: int, documents: int, broken: int = 0) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(b"\n".join(lines(seed, documents, broken)) + b"\n")


def plain_text(seed: int, documents: int) -> bytes:
    """The good lines as plain jsonl, to train a tokenizer with."""
    return b"\n".join(lines(seed, documents, 0)) + b"\n"
