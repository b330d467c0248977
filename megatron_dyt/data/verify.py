"""Prepared data: checked against their manifests, and as what Megatron's --train-data-path takes."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dyt.atomic import sha256
from megatron_dyt.data.dataset_manifest import (
    DatasetManifest,
    DirectoryManifest,
    Output,
    TokenizerIdentity,
    manifest_path,
    output_paths,
)
from megatron_dyt.data.indexed_dataset import contradictions
from megatron_dyt.errors import UserError
from megatron_dyt.log import progress_bar

_log = logging.getLogger(__name__)


def verified(place: Path) -> str:
    """A line that says that data are as they were written; else logs the problems and raises `UserError`."""
    count, problems = verify(place)
    for problem in problems:
        _log.error("%s", problem)
    if problems:
        raise UserError(
            f"{place}: {len(problems)} problems in {count} shards; remove the files of damaged shards (.bin, "
            ".idx, .manifest.json), and the same prepare-data command writes those anew"
        )
    return f"{place}: {count} shards are as they were written"


def verify(place: Path) -> tuple[int, list[str]]:
    """Read all of a directory of datasets, or the dataset of one prefix, again.

    Returns:
        The number of datasets, and what is wrong with them.
    """
    problems: list[str] = []
    if DirectoryManifest.path(place).is_file():
        whole = DirectoryManifest.read(place)
        prefixes = [place / name for name in whole.shards]
        for name, problem in whole.broken_shards.items():
            _log.warning("%s was left out, as --skip-broken-shards says: %s", name, problem)
        problems += _unlike_their_directory(whole, place)
    elif manifest_path(place).is_file():
        prefixes = [place]
    else:
        raise UserError(f"{place}: neither a directory with manifest.json nor a prefix with .manifest.json")
    sizes = [
        sum(path.stat().st_size for path in output_paths(prefix) if path.is_file()) for prefix in prefixes
    ]
    with progress_bar("verify", sum(sizes), "B") as bar:
        for prefix, size in zip(prefixes, sizes, strict=True):
            problems += [f"{prefix}: {problem}" for problem in _problems(prefix)]
            bar.update(size)
    return len(prefixes), problems


def _unlike_their_directory(whole: DirectoryManifest, directory: Path) -> Iterator[str]:
    """Datasets whose manifest is not that of which the directory's was made."""
    for name, entry in whole.shards.items():
        manifest = DatasetManifest.read(directory / name)
        if manifest and manifest.outputs != entry.outputs:
            yield (
                f"{directory / name}: its manifest is not the one that {DirectoryManifest.path(directory)} "
                "sums up"
            )


def _problems(prefix: Path) -> Iterator[str]:
    manifest = DatasetManifest.read(prefix)
    if manifest is None:
        yield f"{manifest_path(prefix).name} is missing, damaged or of another version"
        return
    damaged = False
    for name, expected in manifest.outputs.items():
        # By suffix: a dataset may have been renamed.
        path = prefix.with_name(prefix.name + Path(name).suffix)
        if problem := _file_problem(path, expected):
            damaged = True
            yield f"{path.name} {problem}"
    # The contents of damaged files say nothing more.
    if manifest.outputs and not damaged:
        yield from contradictions(
            *output_paths(prefix), manifest.documents, manifest.tokens, manifest.dtype, manifest.vocab_size
        )


def _file_problem(path: Path, expected: Output) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"has {size} bytes and had {expected.bytes}"
    if sha256(path) != expected.sha256:
        return "has another content (SHA-256) than was written"
    return None


def blend(places: Sequence[Path]) -> list[str]:
    """The words after --train-data-path, weight prefix weight prefix ..., for directories or prefixes.

    A dataset's weight is its number of tokens, so that every document is as likely as every other. One
    dataset is its prefix alone.

    Raises:
        UserError: no data are there, they were made with different tokenizers, or a path has a space in it.
    """
    weights: dict[Path, int] = {}
    tokenizers: dict[TokenizerIdentity, Path] = {}
    for place in places:
        for prefix, tokens, tokenizer in _datasets(place):
            weights[prefix] = tokens
            tokenizers.setdefault(tokenizer, prefix)
    if len(tokenizers) > 1:
        several = " and ".join(map(str, tokenizers.values()))
        raise UserError(f"{several} were made with different tokenizers and cannot be blended")
    for prefix in weights:
        if len(str(prefix).split()) != 1:
            raise UserError(f"{str(prefix)!r} has a space in its path, at which Megatron divides a blend")
        index = output_paths(prefix)[1]
        if not index.is_file():
            raise UserError(f"{index} is missing, which the manifest names; see --verify")
    if not weights:
        raise UserError(f"there are no documents in {', '.join(map(str, places))}")
    if len(weights) == 1:
        return [str(prefix) for prefix in weights]
    return [word for prefix, tokens in weights.items() for word in (str(tokens), str(prefix))]


def _datasets(place: Path) -> list[tuple[Path, int, TokenizerIdentity]]:
    """(prefix, tokens, tokenizer) of every dataset that has documents."""
    one = None if DirectoryManifest.path(place).is_file() else DatasetManifest.read(place)
    if one:
        return [(place, one.tokens, one.made_from.tokenizer)]
    whole = DirectoryManifest.read(place)
    tokenizer = whole.made_from.tokenizer
    return [(place / name, entry.tokens, tokenizer) for name, entry in whole.shards.items() if entry.tokens]
