"""A text corpus that every machine has: the running Python's standard library sources.

    python examples/quickstart/corpus.py --output DIR

writes DIR/train.jsonl, valid.jsonl and heldout.jsonl, one {"text": ..., "path": ...} a file of
source, and DIR/manifest.json. A file's split depends on its relative path alone, so a newer Python
or a slim installation moves no file from one split to another. With --source any other tree of .py
files is used. With --docstrings the texts are English: the docstrings of each file, by default of all
installed packages (some 25 MB with PyTorch and transformers, a minute or two).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_dyt.atomic import read_json, sha256, whole_files, write_json
from megatron_dyt.errors import UserError, run_main

FORMAT = 1
# Upper end of each split's share of the files, in this order.
SPLITS = {"heldout": 0.05, "valid": 0.08, "train": 1.0}
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
MIN_MEGABYTES = 5.0


def split_of(path: str) -> str:
    """The split of a file by the SHA-256 of its relative path."""
    position = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) / 2**64
    return next(split for split, end in SPLITS.items() if position < end)


def source_files(root: Path) -> list[str]:
    """The relative paths of all .py files under `root`, sorted, without installed packages."""
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        # _sysconfigdata holds the build machine's paths and compiler flags, no code.
        if not SKIPPED_DIRECTORIES & set(path.parts) and not path.name.startswith("_sysconfigdata")
    )


def docstrings(source: str) -> str:
    """All docstrings of a file, the module's first; empty where there is none, or no Python 3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Of old escapes, in code that is none of ours.
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text)


def read_sources(
    root: Path, files: Sequence[str], text_of: Callable[[str], str] = str
) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of each file that is valid UTF-8, without empty and repeated texts."""
    seen: set[bytes] = set()
    for name in files:
        try:
            text = text_of((root / name).read_bytes().decode())
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        yield name, text


def fingerprint(root: Path, files: Sequence[str], text_of: Callable[[str], str]) -> dict[str, Any]:
    """What must be equal for an existing corpus to be the one that `root` gives."""
    listing = hashlib.sha256()
    for name in files:
        stat = (root / name).stat()
        listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "source": str(root),
        "text": text_of.__name__,
        "listing_sha256": listing.hexdigest(),
    }


def up_to_date(output: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in `output` if it and the three files are what `made_from` gives, else None."""
    manifest = read_json(output / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("made_from") != made_from:
        return None
    for split, entry in manifest["splits"].items():
        path = output / f"{split}.jsonl"
        if not path.is_file() or sha256(path) != entry["sha256"]:
            return None
    return manifest


def build(root: Path, output: Path, min_megabytes: float, text_of: Callable[[str], str]) -> dict[str, Any]:
    """Write the corpus of `root` to `output` and return its manifest.

    One source file is held in memory at a time.

    Raises:
        UserError: fewer than `min_megabytes` of text, or a split without any.
    """
    files = source_files(root)
    made_from = fingerprint(root, files, text_of)
    counts = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
    with (
        whole_files([output / f"{split}.jsonl" for split in SPLITS]) as partials,
        ExitStack() as stack,
    ):
        writers = {
            split: stack.enter_context(partial.open("wb"))
            for split, partial in zip(SPLITS, partials, strict=True)
        }
        for name, text in read_sources(root, files, text_of):
            split = split_of(name)
            line = json.dumps({"text": text, "path": name}, ensure_ascii=False)
            writers[split].write(line.encode() + b"\n")
            counts[split]["documents"] += 1
            counts[split]["text_bytes"] += len(text.encode())
        _check_enough(root, counts, min_megabytes)
        # An old manifest must not vouch for a half-replaced corpus.
        (output / "manifest.json").unlink(missing_ok=True)
    splits = {
        split: {**count, "sha256": sha256(output / f"{split}.jsonl")} for split, count in counts.items()
    }
    manifest = {"made_from": made_from, "splits": splits}
    write_json(output / "manifest.json", manifest)
    return manifest


def _check_enough(root: Path, counts: dict[str, dict[str, int]], min_megabytes: float) -> None:
    megabytes = sum(count["text_bytes"] for count in counts.values()) / 1e6
    empty = [split for split, count in counts.items() if not count["documents"]]
    if megabytes < min_megabytes or empty:
        found = f"{megabytes:.1f} MB of .py text" + (f", none for {empty[0]}" if empty else "")
        raise UserError(
            f"{root} holds {found}; at least {min_megabytes:g} MB are needed. Use a Python whose "
            "standard library is installed as files, or give a directory of .py files with --source"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a corpus of the standard library's sources.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--source",
        type=Path,
        help="tree of .py files (default: the standard library; with --docstrings the installed packages)",
    )
    parser.add_argument("--docstrings", action="store_true", help="their docstrings in place of their code")
    parser.add_argument("--min-megabytes", type=float, default=MIN_MEGABYTES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    text_of = docstrings if args.docstrings else str
    root = args.source or Path(sysconfig.get_path("purelib" if args.docstrings else "stdlib"))
    if not root.is_dir():
        raise UserError(f"--source {root} is not a directory; give a tree of .py files")
    started = time.monotonic()
    manifest = up_to_date(args.output, fingerprint(root, source_files(root), text_of))
    ending = "up to date"
    if manifest is None:
        manifest = build(root, args.output, args.min_megabytes, text_of)
        ending = f"{time.monotonic() - started:.1f} s"
    for split in ("train", "valid", "heldout"):
        entry = manifest["splits"][split]
        print(f"{split}: {entry['documents']} files, {entry['text_bytes'] / 1e6:.1f} MB")
    print(f"{PurePosixPath(args.output)}: {ending}")
    return 0


if __name__ == "__main__":
    run_main(main)
