"""Whether prepared data are still what was written: sizes, checksums, the index, the ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dyt.atomic import read_json, sha256
from megatron_dyt.data.collection import collection_path, read_total
from megatron_dyt.data.dataset_manifest import FORMAT, manifest_path
from megatron_dyt.data.indexed_dataset import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_dyt.data.progress import Progress
from megatron_dyt.data.shard import output_paths
from megatron_dyt.errors import UserError

_BLOCK = 1 << 24


def verify(place: Path) -> tuple[int, list[str]]:
    """Read all of a directory of shards, or the dataset of one prefix, again.

    Returns:
        The number of shards, and what is wrong with them.
    """
    problems: list[str] = []
    if collection_path(place).is_file():
        whole = read_total(place)
        prefixes = [place / name for name in whole["shards"]]
        problems += [f"{name} was left out: {problem}" for name, problem in whole["broken_shards"].items()]
        problems += _differences(whole, place)
    elif manifest_path(place).is_file():
        prefixes = [place]
    else:
        raise UserError(f"{place}: neither a directory with manifest.json nor a prefix with .manifest.json")
    sizes = [
        sum(path.stat().st_size for path in output_paths(prefix) if path.is_file()) for prefix in prefixes
    ]
    done = 0
    with Progress("verify", sum(sizes)) as progress:
        for prefix, size in zip(prefixes, sizes, strict=True):
            problems += [f"{prefix}: {problem}" for problem in _problems(prefix)]
            done += size
            progress.update(done)
    return len(prefixes), problems


def _differences(whole: dict[str, Any], directory: Path) -> Iterator[str]:
    """Shards whose manifest is not that of which the directory's was made."""
    for name, shard in whole["shards"].items():
        manifest = read_json(manifest_path(directory / name))
        if isinstance(manifest, dict) and manifest.get("outputs") != shard["outputs"]:
            yield f"{directory / name}: its manifest is not the one that {collection_path(directory)} sums up"


def _problems(prefix: Path) -> Iterator[str]:
    manifest = read_json(manifest_path(prefix))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        yield f"{manifest_path(prefix).name} is missing, damaged or of another version"
        return
    good = True
    for name, expected in manifest["outputs"].items():
        path = prefix.with_name(prefix.name + Path(name).suffix)
        problem = _file_problem(path, expected)
        if problem:
            good = False
            yield f"{path.name} {problem}"
    # The contents of damaged files say nothing more.
    if good and manifest["outputs"]:
        yield from _content_problems(prefix, manifest)


def _file_problem(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes and had {expected['bytes']}"
    if sha256(path) != expected["sha256"]:
        return "has another content (SHA-256) than was written"
    return None


def _content_problems(prefix: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Where index, ids and manifest contradict each other."""
    data_path, index_path = output_paths(prefix)
    count, dtype = manifest["documents"], np.dtype(manifest["dtype"])
    expected = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.name], count, count + 1)
    with index_path.open("rb") as file:
        if file.read(HEADER.size) != expected:
            yield f"{index_path.name} does not begin as the index of {count:,} documents of {dtype} does"
            return
    ids: npt.NDArray[Any] = np.memmap(data_path, dtype, "r")
    lengths = np.memmap(index_path, "<i4", "r", HEADER.size, (count,))
    offsets = np.memmap(index_path, "<i8", "r", HEADER.size + 4 * count, (count,))
    ends = np.cumsum(lengths, dtype=np.int64)
    if ends[-1] != len(ids) or not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
        yield f"{index_path.name} does not divide {data_path.name} into its documents"
        return
    if len(ids) != manifest["tokens"]:
        yield f"{data_path.name} has {len(ids):,} tokens, its manifest {manifest['tokens']:,}"
    largest = max(int(ids[start : start + _BLOCK].max()) for start in range(0, len(ids), _BLOCK))
    if largest >= manifest["vocab_size"]:
        yield f"{data_path.name} holds id {largest}, the vocabulary has {manifest['vocab_size']}"
