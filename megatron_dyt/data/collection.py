"""A directory of shards: DIR/NAME.bin, .idx and .manifest.json of each, DIR/manifest.json over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dyt.atomic import read_json, write_json
from megatron_dyt.data.dataset_manifest import FORMAT, manifest_path
from megatron_dyt.data.settings import Settings
from megatron_dyt.errors import UserError

_END = ".manifest.json"
_SUMS = ("documents", "tokens", "text_bytes", "empty_documents")
_COUNTERS = ("malformed", "filtered")

Manifest = dict[str, Any]


def collection_path(directory: Path) -> Path:
    """Where the manifest of a directory of shards is."""
    return directory / "manifest.json"


def manifests(directory: Path) -> dict[str, Manifest]:
    """The manifest of each finished shard in a directory, by the shard's name."""
    found = {}
    for path in sorted(directory.glob("*" + _END)):
        manifest = read_manifest(path)
        if manifest is not None:
            found[path.name.removesuffix(_END)] = manifest
    return found


def read_manifest(path: Path) -> Manifest | None:
    """A manifest of this version; None where there is none."""
    manifest = read_json(path)
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def check_settings(directory: Path, settings: Settings) -> None:
    """Shards that are in the directory were made with these settings.

    Raises:
        UserError: with others, so that they would be mixed, or work of hours replaced.
    """
    for name, manifest in manifests(directory).items():
        _check(directory / name, manifest, settings, "write to another directory, or give --overwrite")


def check_shard(prefix: Path, settings: Settings) -> None:
    """The dataset at `prefix`, if there is one, was made with these settings; `UserError` otherwise."""
    manifest = read_manifest(manifest_path(prefix))
    if manifest is not None:
        _check(prefix, manifest, settings, "give another --output-prefix, or --overwrite")


def _check(prefix: Path, manifest: Manifest, settings: Settings, remedy: str) -> None:
    if differing := _differing(manifest, settings):
        raise UserError(
            f"{prefix} was made with other settings ({', '.join(differing)}); {remedy} to replace it"
        )


def _differing(manifest: Manifest, settings: Settings) -> list[str]:
    wanted, made_from = settings.made_from(), manifest["made_from"]
    return [key for key in wanted if made_from[key] != wanted[key]]


def total(parts: Mapping[str, Manifest], broken: Mapping[str, str], settings: Settings) -> Manifest:
    """The manifest over all shards: sums, what each holds, and what could not be read."""
    sums: Manifest = {key: sum(part[key] for part in parts.values()) for key in _SUMS}
    for key in _COUNTERS:
        sums[key] = dict(_add(part[key] for part in parts.values()))
    domains: dict[str, Counter[str]] = {}
    for part in parts.values():
        for domain, counts in part["domains"].items():
            domains.setdefault(domain, Counter()).update(counts)
    kept = ("documents", "tokens", "text_bytes", "dtype", "sources", "outputs")
    return {
        "format": FORMAT,
        **sums,
        "domains": {domain: dict(domains[domain]) for domain in sorted(domains)},
        "vocab_size": settings.tokenizer.vocab_size,
        "tokenizer": settings.tokenizer.name,
        "shards": {name: {key: part[key] for key in kept} for name, part in parts.items()},
        "broken_shards": dict(broken),
        "made_from": settings.made_from(),
    }


def _add(counters: Iterable[Mapping[str, int]]) -> Counter[str]:
    result: Counter[str] = Counter()
    for each in counters:
        result.update(each)
    return result


def write_total(
    directory: Path, wanted: Iterable[str], broken: Mapping[str, str], settings: Settings
) -> Manifest:
    """Write the directory's manifest, over its shards of these settings, and return it.

    What is there of a broken shard is of an earlier state of its source, and left out.

    Raises:
        UserError: a shard of `wanted` is neither there nor broken.
    """
    ours = {
        name: manifest
        for name, manifest in manifests(directory).items()
        if name not in broken and not _differing(manifest, settings)
    }
    if missing := set(wanted) - set(ours) - set(broken):
        raise UserError(
            f"{directory / min(missing)} has vanished since it was written: another process changes this "
            "directory. Stop it and run this again"
        )
    manifest = total(ours, broken, settings)
    write_json(collection_path(directory), manifest)
    return manifest


def read_total(directory: Path) -> Manifest:
    """The manifest of a directory of shards; `UserError` where there is none."""
    manifest = read_json(collection_path(directory))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "shards" not in manifest:
        raise UserError(
            f"{directory} has no manifest.json of prepare-data: it is another directory, or prepare-data has "
            "not finished there; run it again with the same --output"
        )
    return manifest
