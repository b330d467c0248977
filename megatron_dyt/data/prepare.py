"""Text to Megatron's indexed datasets: what is to be written, the writing, and what there is then.

One dataset per source in a directory, with a manifest over all, or one dataset of all sources at a prefix. A
document is BOS + text + EOS, as the DyT paper's LLaMA runs have it; Megatron adds neither at training time.
Started again, it goes on from the datasets that are finished.
"""

import errno
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dyt.data import shard_directory, tokenizers, workers
from megatron_dyt.data.dataset_manifest import (
    HUGGING_FACE,
    SENTENCEPIECE,
    DatasetManifest,
    DirectoryManifest,
    Fields,
    Filters,
    all_paths,
    manifests,
    output_paths,
)
from megatron_dyt.data.shard import Settings, Shard, finished
from megatron_dyt.data.sources import BrokenSourceError, FileSource, Source
from megatron_dyt.errors import UserError, describe

_log = logging.getLogger(__name__)

# A full disk, a quota and a limit on a file's size: nothing that a traceback explains.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Destination:
    """Where the data go.

    Attributes:
        place: a directory, or the prefix of one dataset.
        is_prefix: whether `place` is a prefix.
        overwrite: whether data made with other settings, or of other sources, may be replaced.
        skip_broken: whether to leave out sources that cannot be read; for a directory.
    """

    place: Path
    is_prefix: bool = False
    overwrite: bool = False
    skip_broken: bool = False


def find_settings(
    tokenizer_type: str, tokenizer: str, bos: bool, append_eod: bool, fields: Fields, filters: Filters
) -> Settings:
    """The settings, with what is known of the tokenizer; `UserError` when it lacks BOS or EOS."""
    found = tokenizers.find(tokenizer_type, tokenizer)
    for name, wanted, id_, remedy in (
        ("BOS", bos, found.bos, "--no-bos"),
        ("EOS", append_eod, found.eos, "--no-append-eod"),
    ):
        if wanted and id_ is None and found.kind == HUGGING_FACE:
            raise UserError(
                f"{found.file.with_name('tokenizer_config.json')} names no {name.lower()}_token that is in "
                f"{found.file.name}; add it there, or give {remedy}"
            )
        if wanted and id_ is None:
            raise UserError(f"the tokenizer has no {name} token; use another tokenizer or {remedy}")
    return Settings(found, bos, append_eod, fields, filters)


def prepare(sources: Sequence[Source], settings: Settings, destination: Destination, processes: int) -> str:
    """Write what is not finished yet; return a line about what there is then.

    Raises:
        UserError: data would be mixed, lost or twice there; no document is left; the disk is full.
        BrokenSourceError: a source cannot be read to its end.
        RuntimeError: a worker was killed.
    """
    started = time.monotonic()
    place = destination.place
    shards = find_shards(sources, settings, destination)
    todo = [shard for shard in shards if finished(shard, settings) is None]
    existing = [shard.prefix for shard in todo if output_paths(shard.prefix)[1].exists()]
    broken = _write(todo, settings, destination, processes) if todo else {}
    if broken and not destination.skip_broken:
        raise BrokenSourceError("; ".join(broken.values()))
    manifest: DatasetManifest | DirectoryManifest | None
    if destination.is_prefix:
        manifest = DatasetManifest.read(place)
        assert manifest, "it was just written, or found finished"
    else:
        manifest = shard_directory.write_manifest(place, [shard.name for shard in shards], broken, settings)
    if not manifest.documents:
        raise UserError(f"no document is left: {_left_out(manifest) or 'the input is empty'}")
    if replaced := [prefix for prefix in existing if prefix.name not in broken]:
        # Megatron names cached sample indices by the path, not the content (megatron_dataset.py).
        _log.warning(
            "replaced: %s. Delete the indices that Megatron cached for what was there (the directory of "
            "--data-cache-path, else %s/cache) before training",
            ", ".join(map(str, replaced)),
            replaced[0].parent,
        )
    took = f"{time.monotonic() - started:.1f} s" if todo else "up to date"
    return f"{summary(place, manifest)}; {took}"


def summary(place: Path, manifest: DatasetManifest | DirectoryManifest) -> str:
    """One line for people about a dataset or a directory of them."""
    shards = f"{len(manifest.shards)} shards, " if isinstance(manifest, DirectoryManifest) else ""
    left_out = _left_out(manifest)
    return (
        f"{place}: {shards}{manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token"
        + (f"; left out: {left_out}" if left_out else "")
    )


def _left_out(manifest: DatasetManifest | DirectoryManifest) -> str:
    """What is not in the data, and where it is named."""
    return ", ".join(f"{count:,} {what}" for what, count in manifest.left_out().items() if count)


def find_shards(sources: Sequence[Source], settings: Settings, destination: Destination) -> list[Shard]:
    """The datasets that are asked for, finished or not.

    Raises:
        UserError: data would be mixed, lost or twice there, or a source be overwritten.
    """
    _check_place(destination)
    _check_not_written(sources, destination)
    place, overwrite = destination.place, destination.overwrite
    if destination.is_prefix:
        if not overwrite:
            shard_directory.check_shard(place, settings, sources)
        shards = [Shard(place, tuple(sources))]
    else:
        if not overwrite:
            shard_directory.check_settings(place, settings)
        shards = shard_directory.shards_of(place, sources, manifests(place), overwrite)
    if not overwrite:
        for shard in shards:
            shard_directory.check_not_foreign(shard.prefix)
    return shards


def _check_place(destination: Destination) -> None:
    """The place can be what it is to be: a file's name, or a directory."""
    place = destination.place
    if destination.is_prefix and place.name in ("", ".."):
        raise UserError(f"--output-prefix {place} is a directory; give DIR/NAME")
    directory = (place.parent if destination.is_prefix else place).absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        option = "--output-prefix" if destination.is_prefix else "--output"
        raise UserError(f"{option} {place}: {there} is not a directory; choose another place")


def _check_not_written(sources: Sequence[Source], destination: Destination) -> None:
    """No source is where the data go."""
    place = destination.place
    for source in sources:
        if not isinstance(source, FileSource):
            continue
        path = source.path.resolve()
        if destination.is_prefix and path in map(Path.resolve, all_paths(place)):
            raise UserError(f"input {source.path} would be replaced; give another --output-prefix")
        if not destination.is_prefix and place.resolve() in path.parents:
            raise UserError(f"input {source.path} is in the output directory; write to another one")


def _write(
    shards: Sequence[Shard], settings: Settings, destination: Destination, processes: int
) -> dict[str, str]:
    """Write the shards; the problems of broken ones by their names."""
    tokenizer = settings.tokenizer
    if tokenizer.obstacle and tokenizer.kind == SENTENCEPIECE:
        _log.info("%s is used without the word cache, because %s", tokenizer.name, tokenizer.obstacle)
    try:
        name = destination.place.name
        return workers.write_all(shards, settings, processes, destination.skip_broken, name)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(f"writing {destination.place} failed: {describe(error)}") from error
