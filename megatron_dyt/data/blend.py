"""Prepared data as what Megatron's --train-data-path takes: weight prefix weight prefix ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dyt.atomic import read_json
from megatron_dyt.data.collection import collection_path, read_total
from megatron_dyt.data.dataset_manifest import manifest_path
from megatron_dyt.errors import UserError


def blend(places: Sequence[Path]) -> list[str]:
    """The words after --train-data-path for all shards of `places`, directories or dataset prefixes.

    A shard's weight is its number of tokens, so that every document is as likely as every other. One
    shard is its prefix alone.

    Raises:
        UserError: no data are there, they were made with different tokenizers, or a path has a space in it.
    """
    weights: dict[Path, int] = {}
    tokenizers: dict[str, Path] = {}
    for place in places:
        for prefix, tokens, tokenizer in _shards(place):
            weights[prefix] = tokens
            tokenizers.setdefault(tokenizer, prefix)
    if len(tokenizers) > 1:
        several = " and ".join(map(str, tokenizers.values()))
        raise UserError(f"{several} were made with different tokenizers and cannot be blended")
    for prefix in weights:
        if len(str(prefix).split()) != 1:
            raise UserError(f"{str(prefix)!r} has a space in its path, at which Megatron divides a blend")
        if not prefix.with_name(prefix.name + ".idx").is_file():
            raise UserError(f"{prefix}.idx is missing, which the manifest names; see --verify")
    if not weights:
        raise UserError(f"there are no documents in {', '.join(map(str, places))}")
    if len(weights) == 1:
        return [str(prefix) for prefix in weights]
    return [word for prefix, tokens in weights.items() for word in (str(tokens), str(prefix))]


def _shards(place: Path) -> list[tuple[Path, int, str]]:
    """(prefix, tokens, what the tokenizer is) of every shard that has documents."""
    if not collection_path(place).is_file() and manifest_path(place).is_file():
        one = read_json(manifest_path(place))
        return [(place, one["tokens"], str(one["made_from"]["tokenizer"]))]
    whole = read_total(place)
    tokenizer = str(whole["made_from"]["tokenizer"])
    return [
        (place / name, shard["tokens"], tokenizer)
        for name, shard in whole["shards"].items()
        if shard["tokens"]
    ]
