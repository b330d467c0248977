"""Rate of data preparation beside SentencePiece's own encode loop, on the same text, in one run.

    python benchmarks/data_preparation.py --scratch DIR [--megabytes 50] [--tokenizer-model llama.model]

The texts are what every machine has: Python sources ("code") and the docstrings in them ("prose"), of the
standard library and the installed packages. For each kind, with a cache that begins empty:

- `plain`: ids = [processor.encode(text) for text in texts], the loop to compare with
- `words`: the word cache; its ids are compared with those of `plain` on every document
- `command`: `prepare-data` from .jsonl.zst to .bin, .idx and manifests in two worker processes, its ids
  compared too, with the largest resident memory of a worker (VmHWM)

Rates are MB of UTF-8 text a second of processor time (one core), because a shared machine gives a process a
changing share of itself; plain and words take turns every 4 MB for the same reason. Without a tokenizer one
with LLaMA 2's settings and 32,000 pieces is trained on the code. Prints JSON; run it from the repository's
root. Needs about 0.3 GB in DIR.
"""

import argparse
import ast
import itertools
import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from megatron_dyt.data import tokenizers
from megatron_dyt.data.dataset_manifest import SENTENCEPIECE
from megatron_dyt.data.train_tokenizer import train

TURN_BYTES = 4_000_000
VOCABULARY = 32_000
SHARDS = 2


def code() -> Iterator[str]:
    """Python sources, the standard library's first."""
    directories = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    seen = set()
    for path in itertools.chain.from_iterable(sorted(Path(each).rglob("*.py")) for each in directories):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if text and path not in seen:
            seen.add(path)
            yield text


def prose() -> Iterator[str]:
    """The docstrings of each source."""
    for text in code():
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, RecursionError, MemoryError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if joined := "\n\n".join(filter(None, docstrings)):
            yield joined


def size_of(text: str) -> int:
    return len(text.encode())


def first_bytes(texts: Iterator[str], count: int) -> list[str]:
    """Texts until there are `count` bytes of them, or no more."""
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += size_of(text)
        if size >= count:
            break
    return taken


def turns(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += size_of(text)
        if size >= TURN_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def compare(texts: list[str], tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Rates of the plain loop and of the word cache, and the ids of the former."""
    processor = tokenizers.load_sentencepiece(tokenizer.file)
    encode = tokenizer.encoder()
    seconds = {"plain": 0.0, "words": 0.0}
    expected: list[np.ndarray] = []
    different = 0
    for batch in turns(texts):
        begun = time.process_time()
        plain = [processor.encode(text) for text in batch]
        between = time.process_time()
        ids, lengths = encode(batch)
        seconds["words"] += time.process_time() - between
        seconds["plain"] += between - begun
        found = np.split(ids, np.cumsum(lengths)[:-1]) if batch else []
        arrays = [np.array(each, tokenizer.dtype) for each in plain]
        different += sum(not np.array_equal(*pair) for pair in zip(arrays, found, strict=True))
        expected += arrays
    megabytes = sum(map(size_of, texts)) / 1e6
    result: dict[str, Any] = {
        f"{name}_mb_per_core_second": megabytes / each for name, each in seconds.items()
    }
    result["times_plain"] = seconds["plain"] / seconds["words"]
    result |= {"documents": len(texts), "documents_with_other_ids": different}
    return result, expected


def run_command(texts: list[str], tokenizer: tokenizers.Tokenizer, scratch: Path) -> dict[str, Any]:
    """`prepare-data` from compressed shards, with what its workers take."""
    (scratch / "shards").mkdir(parents=True, exist_ok=True)
    part = -(-len(texts) // SHARDS)
    for number in range(SHARDS):
        path = scratch / "shards" / f"{number}.jsonl.zst"
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            for text in texts[number * part : (number + 1) * part]:
                file.write(json.dumps({"text": text, "meta": {"pile_set_name": "made"}}).encode() + b"\n")
    output = scratch / "out"
    command = [sys.executable, "-m", "megatron_dyt", "prepare-data", "--input", str(scratch / "shards")]
    command += ["--tokenizer-model", str(tokenizer.file), "--workers", str(SHARDS), "--overwrite"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([*command, "--output", str(output)])
    peak = 0
    while process.poll() is None:
        peak = max([peak, *map(peak_memory, children(process.pid))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit("prepare-data failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = sum(map(size_of, texts)) / 1e6
    return {"command_mb_per_core_second": megabytes / seconds, "worker_peak_mb": peak / 1e6}


def children(parent: int) -> list[int]:
    """The processes that `parent` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may have anything in it.
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent:
            found.append(int(path.parent.name))
    return found


def peak_memory(process: int) -> int:
    """The most bytes that a process had resident so far; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def differing_documents(output: Path, expected: list[np.ndarray], tokenizer: tokenizers.Tokenizer) -> int:
    """Documents of the prepared shards that are not BOS + expected ids + EOS."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    shards = [IndexedDataset(str(output / str(number))) for number in range(SHARDS)]
    found = [shard[index] for shard in shards for index in range(len(shard))]
    whole = ([tokenizer.bos, *ids, tokenizer.eos] for ids in expected)
    return sum(not np.array_equal(*pair) for pair in zip(found, whole, strict=True))


def measure(kind: str, args: argparse.Namespace, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    texts = first_bytes({"code": code, "prose": prose}[kind](), int(args.megabytes * 1e6))
    result, expected = compare(texts, tokenizer)
    scratch = args.scratch / kind
    result |= run_command(texts, tokenizer, scratch)
    result["prepared_documents_that_differ"] = differing_documents(scratch / "out", expected, tokenizer)
    return {"text": kind, "megabytes": sum(map(size_of, texts)) / 1e6, **result}


def find_tokenizer(args: argparse.Namespace) -> tokenizers.Tokenizer:
    path = args.tokenizer_model
    if path is None:
        path = args.scratch / "tokenizer.model"
        sample = args.scratch / "sample.jsonl"
        sample.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in first_bytes(code(), 30_000_000))
        )
        path.write_bytes(train([sample], VOCABULARY, 16_000_000))
    return tokenizers.find(SENTENCEPIECE, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--tokenizer-model", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = find_tokenizer(args)
    results = [measure(kind, args, tokenizer) for kind in ("code", "prose")]
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"vocabulary": tokenizer.vocab_size, **machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
