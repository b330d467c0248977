"""A directory of datasets: which one each input goes to, whether old ones may stay, the manifest over all."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_dyt.data.dataset_manifest import (
    END,
    DatasetManifest,
    DirectoryManifest,
    manifest_path,
    manifests,
    output_paths,
    unfinished_mark,
)
from megatron_dyt.data.hub import HubSource
from megatron_dyt.data.shard import Settings, Shard
from megatron_dyt.data.sources import FileSource, Source
from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)

# The name of a part of a data set on the Hub, as `HubSource.name` makes it.
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})")


def check_settings(directory: Path, settings: Settings) -> None:
    """Datasets that are in the directory were made with these settings.

    Raises:
        UserError: with others, so that they would be mixed, or work of hours replaced.
    """
    for name, manifest in manifests(directory).items():
        _check(directory / name, manifest, settings, "write to another directory, or give --overwrite")


def check_shard(prefix: Path, settings: Settings, sources: Sequence[Source]) -> None:
    """The dataset at `prefix`, if there is one, was made with these settings, and of one of these sources at
    least, as it was or in its place; `UserError` otherwise."""
    if (manifest := DatasetManifest.read(prefix)) is None:
        return
    remedy = "give another --output-prefix, or --overwrite"
    _check(prefix, manifest, settings, remedy)
    places = {os.path.realpath(str(source)) for source in sources}
    contents = {str(source.identity()) for source in sources}
    if places.isdisjoint(_places(manifest)) and contents.isdisjoint(map(str, manifest.made_from.sources)):
        others = ", ".join(manifest.sources[:3])
        raise UserError(
            f"{prefix} was made of other data ({others}) than {sources[0]}; {remedy} to replace it"
        )


def check_not_foreign(prefix: Path) -> None:
    """What is at `prefix` was written by this version of this command; `UserError` otherwise."""
    # In this order: a process that is done writes the manifest before it takes the mark away.
    if unfinished_mark(prefix).exists() or DatasetManifest.read(prefix):
        return
    if there := [path for path in output_paths(prefix) if path.exists()]:
        raise UserError(
            f"{there[0]} is there, but no {manifest_path(prefix).name} of this version of prepare-data: "
            "another program or version has made it. Write elsewhere, or give --overwrite to replace it"
        )


def _places(manifest: DatasetManifest) -> set[str]:
    """Where the files of a dataset were. The relative paths that earlier releases wrote say nothing."""
    return {os.path.realpath(path) for path in manifest.sources if os.path.isabs(path)}


def _check(prefix: Path, manifest: DatasetManifest, settings: Settings, remedy: str) -> None:
    if differing := settings.made_from().differing(manifest.made_from):
        raise UserError(
            f"{prefix} was made with other settings ({', '.join(differing)}); {remedy} to replace it"
        )


def write_manifest(
    directory: Path, wanted: Iterable[str], broken: Mapping[str, str], settings: Settings
) -> DirectoryManifest:
    """Write the directory's manifest, over its datasets of these settings, and return it.

    What is there of a broken shard is of an earlier state of its source, and left out. A shard that an
    earlier command has left out as broken stays so until it is wanted again.

    Args:
        wanted: names of the datasets that must be there, unless they are broken.
        broken: what is wrong with the sources of datasets, by the dataset's name.

    Raises:
        UserError: a dataset of `wanted` is neither there nor broken.
    """
    made_from = settings.made_from()
    names = set(wanted)
    before = DirectoryManifest.find(directory)
    if before and before.made_from == made_from:
        for name, problem in before.broken_shards.items():
            if name not in names and not _made_since(directory, name):
                broken = {name: problem, **broken}
    ours = {
        name: manifest
        for name, manifest in manifests(directory).items()
        if name not in broken and not made_from.differing(manifest.made_from)
    }
    if missing := names - set(ours) - set(broken):
        raise UserError(
            f"{directory / min(missing)} has vanished since it was written: another process changes this "
            "directory. Stop it and run this again"
        )
    there = {path.name.removesuffix(END) for path in directory.glob("*" + END)}
    if others := sorted(there - set(ours) - set(broken)):
        _log.warning(
            "%s leaves out datasets that were made with other settings, or by another version: %s",
            DirectoryManifest.path(directory),
            ", ".join(others),
        )
    tokenizer = settings.tokenizer
    manifest = DirectoryManifest.over(ours, broken, tokenizer.name, tokenizer.vocab_size, made_from)
    manifest.write(directory)
    return manifest


def _made_since(directory: Path, name: str) -> bool:
    """Whether a dataset was finished after the directory's manifest: by a run that ended before its own."""
    path = manifest_path(directory / name)
    return path.exists() and path.stat().st_mtime_ns > DirectoryManifest.path(directory).stat().st_mtime_ns


# --- which dataset an input goes to ----------------------------------------------------------------------


def shards_of(
    directory: Path, sources: Sequence[Source], there: Mapping[str, DatasetManifest], overwrite: bool
) -> list[Shard]:
    """One shard for each source.

    A source that is in the directory keeps its shard, so that nothing is there twice. Others have their own
    name, with their place in it where two are called alike.

    Args:
        there: the manifests of the directory's shards, by name.
        overwrite: whether shards of other sources may be replaced.

    Raises:
        UserError: a shard would hold two sources, or what is there would be there twice or be lost.
    """
    wanted = _names(sources)
    _check_parts(directory, sources, there)
    known = _Known(directory, there, sources)
    names = []
    for source, name in zip(sources, wanted, strict=True):
        shard = known.shard_with(source)
        if shard is None and len(name.split()) != 1:
            raise UserError(
                f"input {source}: a dataset's name cannot have a space ({name!r}), at which Megatron divides "
                "a blend; rename the input"
            )
        if not overwrite and _replaces(source, shard, there.get(shard or name)):
            raise UserError(
                f"{directory / (shard or name)} was made of other data than {source} is now; write to "
                f"another directory, or give --overwrite to replace it{_earlier(there[shard or name])}"
            )
        names.append(shard or name)
    if twice := _twice(names):
        raise UserError(f"two inputs would both be written to {directory / twice}; rename one of them")
    return [Shard(directory / name, (source,)) for name, source in zip(names, sources, strict=True)]


def _replaces(source: Source, shard: str | None, manifest: DatasetManifest | None) -> bool:
    """Whether finished data of another source, or of a data set's other revision, would be lost.

    A file that has changed in its place is made again without a question.
    """
    if manifest is None:
        return False
    if isinstance(source, FileSource):
        return shard is None
    return manifest.made_from.sources != (source.identity(),)


class _Known:
    """The sources of finished shards, by where they were and by what they were."""

    def __init__(
        self, directory: Path, there: Mapping[str, DatasetManifest], sources: Sequence[Source]
    ) -> None:
        self.directory = directory
        self.places: dict[str, str] = {}
        self.contents: dict[str, str] = {}
        self.several = {name for name, manifest in there.items() if len(manifest.sources) > 1}
        for name, manifest in there.items():
            self.places |= dict.fromkeys(_places(manifest), name)
            self.contents |= dict.fromkeys(map(str, manifest.made_from.sources), name)
        # Two files that are alike by name, size and time stamp are told apart by their places alone.
        self.alike = Counter(str(source.identity()) for source in sources)

    def shard_with(self, source: Source) -> str | None:
        content = str(source.identity())
        shard = self.places.get(os.path.realpath(str(source)))
        if shard is None and self.alike[content] == 1:
            shard = self.contents.get(content)
        if shard and shard in self.several:
            raise UserError(
                f"{source} is in {self.directory / shard} already, with other inputs; it would be there "
                "twice. Write to another directory"
            )
        return shard


def _earlier(manifest: DatasetManifest) -> str:
    """How to go on with the revision of a data set of the Hub that a dataset was made of."""
    revision = manifest.made_from.sources[0].get("revision")
    return f". --hf-revision {revision} goes on with what it was made of" if revision else ""


def _check_parts(directory: Path, sources: Sequence[Source], there: Mapping[str, DatasetManifest]) -> None:
    """A data set of the Hub is not there in another number of parts."""
    counts = {source.base: source.count for source in sources if isinstance(source, HubSource)}
    for part in filter(None, map(_PART.fullmatch, there)):
        base, count = part[1], int(part[2])
        if counts.get(base, count) != count:
            raise UserError(
                f"{directory} has {base} in {count} parts, but it has {counts[base]} now: they would "
                f"be there twice. Write to another directory{_earlier(there[part[0]])}"
            )


def _names(sources: Sequence[Source]) -> list[str]:
    names = [source.name for source in sources]
    if _twice(names):
        names = _long_names([source.path for source in sources if isinstance(source, FileSource)])
    return names


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _long_names(paths: Sequence[Path]) -> list[str]:
    """a/x.jsonl and b/x.jsonl as a-x.jsonl and b-x.jsonl."""
    whole = [path.resolve() for path in paths]
    root = os.path.commonpath([path.parent for path in whole])
    return ["-".join(path.relative_to(root).parts) for path in whole]
